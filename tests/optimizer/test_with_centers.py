"""with_centers: one optax transform for the parameters and the centers of a model, in any tree."""

from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx
from flax.core import FrozenDict, freeze
from flax.training.train_state import TrainState

import centerloss_jax as clj
from tests.support import oracle
from tests.support.problems import make_problem
from tests.support.steps import center_state, update

X, CENTERS, LABELS, _ = make_problem(dtype=np.float32)
ROWS = clj.center_rows(X, CENTERS, LABELS)
MOVED = oracle.center_update(X, CENTERS, LABELS, 0.5)


class Model(NamedTuple):
    params: Any
    centers: Any


def _variables(params, centers):
    # The state of a whole NNX model, where only the type of a leaf tells centers from parameters.
    return nnx.State({'layer': {'kernel': nnx.Param(params)}, 'center': {'centers': clj.nnx.Centers(centers)}})


TREES = {
    'dict': lambda params, centers: {'params': {'kernel': params}, 'centers': centers},
    'dict by module': lambda params, centers: {
        'params': {'layer': {'kernel': params}},
        'centers': {'head': {'center': {'centers': centers}}},
    },
    'dict of one leaf each': lambda params, centers: {'params': params, 'centers': centers},
    'FrozenDict': lambda params, centers: freeze({'params': {'kernel': params}, 'centers': {'c': centers}}),
    'FrozenDict below a dict': lambda params, centers: {
        'params': freeze({'kernel': params}),
        'centers': freeze({'c': centers}),
    },
    'NamedTuple': Model,
    'State': lambda params, centers: nnx.State({'params': {'kernel': params}, 'centers': {'c': centers}}),
    'State of variables': _variables,
    'dict of variables': lambda params, centers: {
        'layer': nnx.Param(params),
        'table': clj.nnx.Centers(centers),
    },
}


@pytest.mark.parametrize('tree', TREES.values(), ids=TREES.keys())
def test_params_move_by_the_optimizer_and_centers_by_eq_4_in_any_tree(tree):
    params, gradient = jnp.arange(4.0), jnp.ones(4)
    transform = clj.with_centers(optax.sgd(0.5))
    model = tree(params, jnp.asarray(CENTERS))
    new, state = jax.jit(partial(update, transform))(tree(gradient, ROWS), transform.init(model), model)

    assert jax.tree.structure(new) == jax.tree.structure(model)
    expected = tree(params - 0.5, MOVED.astype(np.float32))
    chex.assert_trees_all_close(new, expected, rtol=1e-5, atol=1e-6)
    assert center_state(state).count == 1


@pytest.mark.parametrize('as_container', [dict, freeze], ids=['dict', 'FrozenDict'])
def test_a_flax_train_state_needs_no_change(as_container):
    params = as_container({'params': {'kernel': jnp.arange(4.0)}, 'centers': {'centers': jnp.asarray(CENTERS)}})
    state = TrainState.create(apply_fn=None, params=params, tx=clj.with_centers(optax.adam(0.1)))
    grads = as_container({'params': {'kernel': jnp.ones(4)}, 'centers': {'centers': ROWS}})
    new = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))(state, grads)
    expected = as_container(
        {'params': {'kernel': jnp.arange(4) - 0.1}, 'centers': {'centers': MOVED.astype(np.float32)}}
    )
    assert isinstance(new.params, FrozenDict if as_container is freeze else dict)
    chex.assert_trees_all_close(new.params, expected, rtol=1e-4, atol=1e-6)
    assert new.step == 1


OPTIMIZERS = {
    'adam': optax.adam(1e-3),
    'momentum': optax.sgd(1e-3, momentum=0.9),
    'adamw': optax.adamw(1e-3),
    'adafactor': optax.adafactor(1e-3),
    'accumulation': optax.MultiSteps(optax.adam(1e-3), 2),
}


@pytest.mark.parametrize('optimizer', OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize('tree', [TREES['dict by module'], _variables], ids=['dict', 'State of variables'])
def test_no_optimizer_state_grows_with_the_number_of_classes(optimizer, tree):
    def shapes(num_classes):
        transform = clj.with_centers(optimizer)
        state = transform.init(tree(jnp.ones((4, 6)), jnp.zeros((num_classes, 3))))
        return [leaf.shape for leaf in jax.tree.leaves(state)]

    assert shapes(1000) == shapes(1001)
    assert not any(1000 in shape or 3000 in shape for shape in shapes(1000))


def test_weight_decay_changes_params_alone():
    model = {'params': jnp.ones(4), 'centers': jnp.asarray(CENTERS)}
    transform = clj.with_centers(optax.adamw(1e-2, weight_decay=0.5))
    new, _ = jax.jit(partial(update, transform))(
        {'params': jnp.zeros(4), 'centers': ROWS}, transform.init(model), model
    )
    np.testing.assert_allclose(new['params'], np.full(4, 0.995), rtol=1e-6)
    np.testing.assert_allclose(new['centers'], MOVED, rtol=1e-5, atol=1e-6)


TABLE = jnp.asarray(CENTERS)
WITHOUT_CENTERS = {
    'params alone': {'params': {'kernel': jnp.ones(4)}},
    'other names': {'model': jnp.ones(4), 'table': TABLE},
    'a third key': {'params': jnp.ones(4), 'centers': TABLE, 'batch_stats': jnp.ones(4)},
    'centers below params': {'params': {'kernel': jnp.ones(4), 'centers': TABLE}},
    'a State without Centers': nnx.State({'layer': {'kernel': nnx.Param(jnp.ones(4))}}),
    'a list': [jnp.ones(4), TABLE],
    'an array': TABLE,
    'nothing': {},
}


@pytest.mark.parametrize('tree', WITHOUT_CENTERS.values(), ids=WITHOUT_CENTERS.keys())
def test_a_tree_in_which_nothing_is_a_center_is_an_error(tree):
    with pytest.raises(ValueError, match=r"no centers.*'params' and 'centers'.*wrt"):
        clj.with_centers(optax.adam(1e-3)).init(tree)


def test_the_error_names_the_keys_it_found():
    with pytest.raises(ValueError, match=r'batch_stats'):
        clj.with_centers(optax.adam(1e-3)).init(WITHOUT_CENTERS['a third key'])


FORGOTTEN = {
    'the entry': ({'params': jnp.ones(4)}, ValueError, 'no centers.*RowUpdates'),
    'the rows, for a dense gradient': (
        {'params': jnp.ones(4), 'centers': {'a': TABLE, 'b': TABLE}},
        TypeError,
        'RowUpdates.*center_loss_and_rows',
    ),
    'the rows, for None': (
        {'params': jnp.ones(4), 'centers': {'a': None, 'b': None}},
        TypeError,
        'RowUpdates.*center_loss_and_rows',
    ),
    'the rows, for nothing': (
        {'params': jnp.ones(4), 'centers': {}},
        TypeError,
        'RowUpdates.*center_loss_and_rows',
    ),
    'one table of two': ({'params': jnp.ones(4), 'centers': {'a': ROWS}}, ValueError, 'b'),
    'one table of two, for None': (
        {'params': jnp.ones(4), 'centers': {'a': ROWS, 'b': None}},
        ValueError,
        'None',
    ),
    'one table of two, for a gradient': (
        {'params': jnp.ones(4), 'centers': {'a': ROWS, 'b': TABLE}},
        TypeError,
        'RowUpdates.*center_loss_and_rows',
    ),
}


@pytest.mark.parametrize('jit', [False, True], ids=['eager', 'jit'])
@pytest.mark.parametrize(('grads', 'error', 'message'), FORGOTTEN.values(), ids=FORGOTTEN.keys())
def test_forgotten_rows_are_an_error(grads, error, message, jit):
    model = {'params': jnp.ones(4), 'centers': {'a': TABLE, 'b': TABLE}}
    state = TrainState.create(apply_fn=None, params=model, tx=clj.with_centers(optax.sgd(0.1)))
    step = lambda state: state.apply_gradients(grads=grads)  # noqa: E731
    with pytest.raises(error, match=message):
        (jax.jit(step) if jit else step)(state)


def test_alpha_and_learning_rate_follow_separate_schedules():
    x, centers, labels, _ = make_problem(dtype=np.float32)
    params = {'params': jnp.float32(0), 'centers': jnp.asarray(centers)}
    rate = optax.linear_schedule(0.5, 0.0, 2)
    alpha: Any = optax.linear_schedule(0.0, 1.0, 4)
    transform = clj.with_centers(optax.sgd(rate), alpha)
    state = transform.init(params)
    step = jax.jit(partial(update, transform))
    for rate, alpha in [(0.5, 0.0), (0.25, 0.25), (0.0, 0.5)]:
        rows = clj.center_rows(x, params['centers'], labels)
        expected = oracle.center_update(x, params['centers'], labels, alpha)
        new, state = step({'params': jnp.float32(1), 'centers': rows}, state, params)
        assert new['params'] == params['params'] - rate
        np.testing.assert_allclose(new['centers'], expected, rtol=1e-5, atol=1e-6)
        params = new


def test_without_a_learning_rate_params_stay_and_centers_move(worked_example):
    params = {'params': {'kernel': jnp.ones(3)}, 'centers': jnp.asarray(worked_example.centers)}
    rows = clj.center_rows(worked_example.x, worked_example.centers, worked_example.labels)
    transform = clj.with_centers(optax.sgd(0.0), alpha=0.5)
    grads = {'params': {'kernel': jnp.full(3, 7.0)}, 'centers': rows}
    new, _ = update(transform, grads, transform.init(params), params)
    np.testing.assert_array_equal(new['params']['kernel'], np.ones(3))
    np.testing.assert_allclose(new['centers'], worked_example.moved, rtol=1e-6)


def test_a_step_keeps_the_shapes_and_dtypes_of_the_state():
    transform = clj.with_centers(optax.adam(1e-3))
    model = {'params': {'kernel': jnp.ones((4, 6))}, 'centers': TABLE}
    state = transform.init(model)
    grads = {'params': {'kernel': jnp.ones((4, 6))}, 'centers': ROWS}
    updates, new_state = jax.eval_shape(transform.update, grads, state, model)
    assert isinstance(updates['centers'], clj.RowUpdates)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)


def test_an_optimizer_that_is_none_of_optax_is_an_error():
    with pytest.raises(TypeError, match=r'optimizer.*0\.1'):
        clj.with_centers(0.1)  # pyright: ignore[reportArgumentType]  # the error under test


LAYERS = {'params': {'backbone': jnp.ones(2), 'head': jnp.ones(2)}, 'centers': TABLE}
LAYERS_GRADS = {'params': {'backbone': jnp.ones(2), 'head': jnp.ones(2)}, 'centers': ROWS}
LABELS_OF_LAYERS = {'backbone': 'frozen', 'head': 'train'}
FREEZES = {
    'a tree of labels with both keys': lambda transforms: optax.partition(
        transforms, {'params': LABELS_OF_LAYERS, 'centers': 'train'}
    ),
    'a function': lambda transforms: optax.partition(
        transforms,
        partial(jax.tree_util.tree_map_with_path, lambda path, _: LABELS_OF_LAYERS.get(path[-1].key, 'train')),
    ),
    'a mask with both keys': lambda transforms: optax.chain(
        transforms['train'],
        optax.masked(transforms['frozen'], {'params': {'backbone': True, 'head': False}, 'centers': False}),
    ),
}


@pytest.mark.parametrize('freeze_backbone', FREEZES.values(), ids=FREEZES.keys())
def test_a_backbone_can_be_frozen_by_labels_for_the_whole_tree(freeze_backbone):
    transform = clj.with_centers(freeze_backbone({'train': optax.sgd(0.5), 'frozen': optax.set_to_zero()}))
    new, _ = update(transform, LAYERS_GRADS, transform.init(LAYERS), LAYERS)
    np.testing.assert_array_equal(new['params']['backbone'], [1, 1])
    np.testing.assert_array_equal(new['params']['head'], [0.5, 0.5])
    np.testing.assert_allclose(new['centers'], MOVED, rtol=1e-5, atol=1e-6)


def test_labels_for_the_params_alone_do_not_fit_the_tree():
    transforms: Any = {'train': optax.sgd(0.5), 'frozen': optax.set_to_zero()}
    with pytest.raises(ValueError, match=r'dict'):
        clj.with_centers(optax.partition(transforms, LABELS_OF_LAYERS)).init(LAYERS)


def test_lookahead_has_params_of_another_tree_and_does_not_work_inside():
    transform = clj.with_centers(optax.lookahead(optax.sgd(0.1), sync_period=2, slow_step_size=0.5))
    with pytest.raises((AttributeError, TypeError, ValueError)):
        update(transform, LAYERS_GRADS, transform.init(LAYERS), LAYERS)


def test_the_state_of_the_optimizer_gives_the_params_of_a_schedule_free_evaluation():
    inner = optax.contrib.schedule_free_sgd(0.5)
    transform = clj.with_centers(inner)
    model, state = update(transform, LAYERS_GRADS, transform.init(LAYERS), LAYERS)
    inside = {'params': model['params'], 'centers': optax.MaskedNode()}
    got: Any = optax.contrib.schedule_free_eval_params(state.inner_states['params'].inner_state, inside)
    params, inner_state = update(inner, LAYERS_GRADS['params'], inner.init(LAYERS['params']), LAYERS['params'])
    expected = optax.contrib.schedule_free_eval_params(inner_state, params)
    chex.assert_trees_all_close(got['params'], expected)
