"""by_rows: a step on the touched rows is the step of the dense optimizer there, and nothing else changes."""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState

import centerloss_jax as clj
from tests.support.steps import update

C, D = 7, 3
rng = np.random.default_rng(0)
TABLE = rng.normal(1, 2, (C, D)).astype(np.float32)
INDICES = np.array([5, 2, 5, -1, 0])
VALUES = rng.normal(size=(5, D)).astype(np.float32)
TOUCHED, UNTOUCHED = [0, 2, 5], [1, 3, 4, 6]


def rows_of(indices: Any = INDICES, values: Any = VALUES) -> Any:
    return clj.RowUpdates(jnp.asarray(indices), jnp.asarray(values), kind='gradient')


def dense(indices: Any = INDICES, values: Any = VALUES):
    gradient = np.zeros((C, D), np.float32)
    for index, value in zip(indices, values, strict=True):
        if index >= 0:
            gradient[index] += value
    return gradient


def injected(learning_rate):
    return optax.inject_hyperparams(optax.adam)(learning_rate=learning_rate)


def rank_two(params):
    return jax.tree.map(lambda leaf: leaf.ndim == 2, params)


OPTIMIZERS: dict[str, Any] = {
    'sgd': optax.sgd(0.1),
    'momentum': optax.sgd(0.1, momentum=0.9, nesterov=True),
    'adam': optax.adam(0.1),
    'adam by a schedule': optax.adam(optax.linear_schedule(0.1, 0.0, 10)),
    'adam, injected': injected(optax.linear_schedule(0.1, 0.0, 10)),
    'adamw': optax.adamw(0.1, weight_decay=0.1),
    'adamw, masked': optax.adamw(0.1, weight_decay=0.1, mask=rank_two),
    'nadam': optax.nadam(0.1),
    'amsgrad': optax.amsgrad(0.1),
    'adabelief': optax.adabelief(0.1),
    'adagrad': optax.adagrad(0.1),
    'adadelta': optax.adadelta(0.1),
    'rmsprop': optax.rmsprop(0.1, centered=True, momentum=0.9),
    'lion': optax.lion(0.1),
    'yogi': optax.yogi(0.1),
    'sign': optax.sign_sgd(0.1),
    'clipped by element': optax.chain(optax.clip(0.5), optax.sgd(0.1)),
    'groups': optax.partition({'all': optax.adam(0.1)}, lambda tree: jax.tree.map(lambda _: 'all', tree)),
    'schedule-free': optax.contrib.schedule_free_sgd(0.1),
}


@pytest.mark.parametrize('optimizer', OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_a_touched_row_takes_the_step_of_the_dense_optimizer(optimizer):
    # Both start from the state of two dense steps, which has the structure of that of by_rows.
    table, inner = update(optimizer, dense(range(C), TABLE), optimizer.init(TABLE), jnp.asarray(TABLE))
    transform: Any = clj.by_rows(optimizer)
    state = transform.init(table)
    chex.assert_trees_all_equal_shapes_and_dtypes(state.inner_state, inner)
    expected, expected_inner = update(optimizer, dense(), inner, table)
    step = jax.jit(partial(update, transform))
    moved, state = step(rows_of(), state._replace(inner_state=inner), table)

    np.testing.assert_allclose(moved[TOUCHED, :], expected[TOUCHED, :], rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(moved[UNTOUCHED, :], table[UNTOUCHED, :])
    np.testing.assert_allclose(state.update_norm, np.linalg.norm(moved - table), rtol=1e-4)
    assert state.rows_dropped == 0
    for new, old, whole in zip(*map(jax.tree.leaves, (state.inner_state, inner, expected_inner)), strict=True):
        if new.shape == (C, D):
            np.testing.assert_allclose(new[TOUCHED, :], whole[TOUCHED, :], rtol=1e-6, atol=1e-7)
            np.testing.assert_array_equal(new[UNTOUCHED, :], old[UNTOUCHED, :])
        else:
            np.testing.assert_allclose(new, whole, rtol=1e-6)


REDUCES: dict[str, Any] = {
    'clip_by_global_norm': optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)),
    'clip_by_global_norm that is not active': optax.chain(optax.clip_by_global_norm(1e9), optax.adam(0.1)),
    'clip_by_block_rms': optax.chain(optax.clip_by_block_rms(1.0), optax.adam(0.1)),
    'adaptive_grad_clip': optax.chain(optax.adaptive_grad_clip(0.1), optax.sgd(0.1)),
    'apply_if_finite': optax.apply_if_finite(optax.adam(0.1), 3),
    'normalize_by_update_norm': optax.normalize_by_update_norm(),
    'scale_by_param_block_rms': optax.scale_by_param_block_rms(),
    'a reduction that ignores NaN': optax.stateless(
        lambda updates, _: jax.tree.map(lambda a: a * jnp.nanmax(jnp.abs(a)), updates)
    ),
    'lamb': optax.lamb(0.1),
    'lars': optax.lars(0.1),
    'novograd': optax.novograd(0.1),
    'adafactor': optax.adafactor(0.1),
    'adafactor, factored': optax.scale_by_factored_rms(min_dim_size_to_factor=3),
    'sm3': optax.sm3(0.1),
    'muon': optax.contrib.muon(0.1),
    'prodigy': optax.contrib.prodigy(),
    'lbfgs': optax.lbfgs(),
}


@pytest.mark.parametrize('optimizer', REDUCES.values(), ids=REDUCES.keys())
def test_an_optimizer_that_reduces_over_rows_is_an_error(optimizer):
    with pytest.raises(ValueError, match=r'by_rows.*each row by itself.*such as adam'):
        clj.by_rows(optimizer).init(TABLE)


ACCUMULATES: dict[str, Any] = {
    'MultiSteps': optax.MultiSteps(optax.adam(0.1), 2),
    'MultiSteps in a chain': optax.chain(optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation()),
    'apply_every': optax.chain(optax.apply_every(2), optax.sgd(0.1)),
}


@pytest.mark.parametrize('optimizer', ACCUMULATES.values(), ids=ACCUMULATES.keys())
def test_an_optimizer_that_accumulates_is_an_error(optimizer):
    with pytest.raises(TypeError, match=r'by_rows accumulates.*concatenate_rows'):
        clj.by_rows(optimizer).init(TABLE)


ADAM: Any = clj.by_rows(optax.adamw(0.1))
adam_step = jax.jit(partial(update, ADAM))


def test_a_step_of_more_rows_than_the_table_has_is_the_dense_step():
    indices = np.concatenate([rng.permutation(C), INDICES])
    values = rng.normal(size=(len(indices), D)).astype(np.float32)
    moved, state = adam_step(rows_of(indices, values), ADAM.init(TABLE), TABLE)
    optimizer = optax.adamw(0.1)
    expected = update(optimizer, dense(indices, values), optimizer.init(TABLE), jnp.asarray(TABLE))
    chex.assert_trees_all_close((moved, state.inner_state), expected, rtol=1e-6, atol=1e-7)


def test_adam_over_steps_is_the_lazy_adam_of_each_row():
    steps = [(rng.integers(0, C, 4), rng.normal(size=(4, D)).astype(np.float32)) for _ in range(5)]
    transform = clj.by_rows(optax.adam(0.1))
    step, table, state = jax.jit(partial(update, transform)), jnp.asarray(TABLE), transform.init(TABLE)
    for indices, values in steps:
        table, state = step(rows_of(indices, values), state, table)

    expected = TABLE.astype(np.float64)
    m, v = np.zeros((C, D)), np.zeros((C, D))
    for t, (indices, values) in enumerate(steps, 1):
        for j in set(indices):
            g = sum(value.astype(np.float64) for k, value in zip(indices, values, strict=True) if k == j)
            m[j] = 0.9 * m[j] + 0.1 * g
            v[j] = 0.999 * v[j] + 0.001 * g**2
            expected[j] -= 0.1 * (m[j] / (1 - 0.9**t)) / (np.sqrt(v[j] / (1 - 0.999**t)) + 1e-8)
    np.testing.assert_allclose(table, expected, rtol=1e-5, atol=1e-6)


def test_a_row_comes_out_the_same_whatever_other_rows_are_in_the_step():
    beside = rows_of(np.array([1, 5, 3, 3, 6]), VALUES)
    moved, state = adam_step(beside, ADAM.init(TABLE), TABLE)
    alone, own_state = adam_step(rows_of(np.array([-1, 5, -1, -1, -1]), VALUES), ADAM.init(TABLE), TABLE)
    np.testing.assert_array_equal(moved[5], alone[5])
    chex.assert_trees_all_equal(*(optax.tree.get(s, 'nu')[5] for s in (state, own_state)))


@pytest.mark.parametrize(('content', 'index'), [(np.nan, 2), (np.inf, 2), (2e19, 2), (1.0, C), (1.0, 2**31 - 1)])
def test_a_bad_row_is_dropped_and_counted(content, index):
    indices, values = INDICES.copy(), VALUES.copy()
    indices[1], values[1, 0] = index, content
    moved, state = adam_step(rows_of(indices, values), ADAM.init(TABLE), TABLE)
    without, state_without = adam_step(rows_of(np.array([5, -1, 5, -1, 0])), ADAM.init(TABLE), TABLE)
    assert state.rows_dropped == 1
    chex.assert_trees_all_equal(moved, without)
    chex.assert_trees_all_equal(state.inner_state, state_without.inner_state)


def test_rows_that_were_summed_move_nothing():
    moved, state = adam_step(jax.tree.map(jnp.add, rows_of(), rows_of()), ADAM.init(TABLE), TABLE)
    np.testing.assert_array_equal(moved, TABLE)
    assert state.rows_dropped == len(INDICES)
    assert state.update_norm == 0


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_a_narrow_table_moves_in_float32_and_is_rounded_once(dtype):
    narrow = jnp.asarray(TABLE, dtype)
    moved, state = adam_step(rows_of(), ADAM.init(narrow), narrow)
    wide, wide_state = adam_step(rows_of(), ADAM.init(narrow.astype(jnp.float32)), narrow.astype(jnp.float32))
    np.testing.assert_array_equal(moved, wide.astype(dtype))
    chex.assert_trees_all_equal(state, wide_state)


def test_a_step_without_rows_changes_the_step_count_alone():
    state = ADAM.init(TABLE)
    moved, new = adam_step(rows_of(np.zeros(0, np.int32), np.zeros((0, D), np.float32)), state, TABLE)
    np.testing.assert_array_equal(moved, TABLE)
    assert optax.tree.get(new, 'count') == 1
    assert new.update_norm == 0
    chex.assert_trees_all_equal(optax.tree.get(new, 'mu'), optax.tree.get(state, 'mu'))


def test_the_state_has_the_dtype_that_the_optimizer_is_given():
    transform = clj.by_rows(optax.adam(0.1, mu_dtype=jnp.bfloat16))
    state = transform.init(TABLE)
    _, new_state = jax.eval_shape(partial(update, transform), rows_of(), state, TABLE)
    chex.assert_type(optax.tree.get(state, 'mu'), jnp.bfloat16)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)


def test_a_leaf_that_all_rows_share_is_not_taken_for_rows_where_c_equals_d():
    def by_feature(updates, state, params=None):
        del params
        return jax.tree.map(jnp.multiply, updates, state), jax.tree.map(lambda leaf: leaf + 1, state)

    scale_features: Any = optax.GradientTransformation(
        lambda params: jax.tree.map(lambda leaf: jnp.arange(leaf.shape[1], dtype=leaf.dtype), params), by_feature
    )
    transform, square = clj.by_rows(scale_features), jnp.zeros((D, D))
    moved, state = update(transform, rows_of([2], np.ones((1, D))), transform.init(square), square)
    np.testing.assert_array_equal(moved, [[0, 0, 0], [0, 0, 0], [0, 1, 2]])
    np.testing.assert_array_equal(state.inner_state, [1, 2, 3])


def test_two_tables_of_one_shape_have_a_state_each():
    tables = {'items': jnp.asarray(TABLE), 'users': jnp.asarray(TABLE[::-1])}
    rows = {'items': rows_of(), 'users': rows_of([3], np.ones((1, D)))}
    both, state = adam_step(rows, ADAM.init(tables), tables)
    apart = {name: adam_step(rows[name], ADAM.init(tables[name]), tables[name]) for name in tables}
    chex.assert_trees_all_close(both, {name: moved for name, (moved, _) in apart.items()}, rtol=1e-6)
    for name, (_, own_state) in apart.items():
        chex.assert_trees_all_close(optax.tree.get(state, 'nu')[name], optax.tree.get(own_state, 'nu'), rtol=1e-6)
    np.testing.assert_allclose(state.update_norm**2, sum(s.update_norm**2 for _, s in apart.values()), rtol=1e-5)


def test_a_boxed_table_keeps_its_box():
    boxed = nn.Partitioned(jnp.asarray(TABLE), ('classes', None))
    moved, state = update(ADAM, rows_of(), ADAM.init(boxed), boxed)
    assert isinstance(optax.tree.get(state, 'mu'), nn.Partitioned)
    np.testing.assert_allclose(moved.value, adam_step(rows_of(), ADAM.init(TABLE), TABLE)[0], rtol=1e-6)


@pytest.mark.parametrize('init', [jax.jit, lambda init: partial(jax.eval_shape, init)], ids=['jit', 'eval_shape'])
def test_init_can_be_traced_also_where_the_learning_rate_is(init):
    inside = clj.by_rows(injected(0.1))
    around = optax.inject_hyperparams(lambda rate: clj.by_rows(optax.sgd(rate)))(rate=0.1)
    for transform in (inside, around):
        chex.assert_trees_all_equal_shapes_and_dtypes(init(transform.init)(TABLE), transform.init(TABLE))


def test_init_raises_no_alarm_where_nans_are_searched_for():
    with jax.debug_nans(True), jax.debug_infs(True):
        ADAM.init(TABLE)


def test_devices_with_a_table_each_take_the_step_of_their_mean_gradient(per_device):
    transform = clj.by_rows(optax.adamw(0.1), axis_name='batch')
    indices = np.stack([INDICES, INDICES[::-1]])
    indices[0, 0] = 4

    def step(batch, table):
        moved, state = update(transform, rows_of(*batch), transform.init(table), table)
        return moved, state.inner_state

    got = per_device(step, (indices, np.stack([VALUES, 2 * VALUES])), TABLE)
    both = clj.concatenate_rows(rows_of(indices[0], VALUES / 2), rows_of(indices[1], VALUES))
    expected, state = adam_step(both, ADAM.init(TABLE), TABLE)
    for device in range(2):
        of_device = jax.tree.map(lambda leaf, device=device: leaf[device], got)
        chex.assert_trees_all_close(of_device, (expected, state.inner_state), rtol=1e-5, atol=1e-6)


def test_steps_inside_a_scan_are_those_outside():
    def step(carry, _):
        table, state = carry
        return update(ADAM, rows_of(), state, table), None

    (scanned, scanned_state), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=3))((TABLE, ADAM.init(TABLE)))
    table, state = jnp.asarray(TABLE), ADAM.init(TABLE)
    for _ in range(3):
        table, state = adam_step(rows_of(), state, table)
    chex.assert_trees_all_close((scanned, scanned_state), (table, state), rtol=1e-6)


def test_partition_gives_each_table_its_optimizer():
    transform: Any = optax.partition({'net': optax.sgd(1.0), 'items': ADAM}, {'net': 'net', 'items': 'items'})
    model = {'net': jnp.ones(2), 'items': jnp.asarray(TABLE)}
    moved, _ = update(transform, {'net': jnp.ones(2), 'items': rows_of()}, transform.init(model), model)
    np.testing.assert_array_equal(moved['net'], [0, 0])
    np.testing.assert_allclose(moved['items'], adam_step(rows_of(), ADAM.init(TABLE), TABLE)[0], rtol=1e-6)


X, LABELS, CENTERS = rng.normal(size=(4, D)).astype(np.float32), np.array([1, 0, 1, 3]), TABLE[:5]
CENTER_ROWS = clj.center_rows(X, CENTERS, LABELS)
ALL_THREE = clj.with_centers(optax.sgd(1.0), classifier=ADAM)


@pytest.fixture(scope='module')
def expected_model():
    """The parameters, centers and classifier after one step of each by itself."""
    moves = clj.center_update(0.5)
    centers, _ = update(moves, CENTER_ROWS, moves.init(CENTERS), jnp.asarray(CENTERS))
    return np.zeros(2), centers, adam_step(rows_of(), ADAM.init(TABLE), TABLE)[0]


def test_a_train_state_moves_params_centers_and_classifier(expected_model):
    params = {'params': jnp.ones(2), 'centers': {'c': jnp.asarray(CENTERS)}, 'classifier': {'w': jnp.asarray(TABLE)}}
    state = TrainState.create(apply_fn=None, params=params, tx=ALL_THREE)
    grads = {'params': jnp.ones(2), 'centers': {'c': CENTER_ROWS}, 'classifier': {'w': rows_of()}}
    new = jax.jit(lambda state: state.apply_gradients(grads=grads))(state)
    got = new.params['params'], new.params['centers']['c'], new.params['classifier']['w']
    chex.assert_trees_all_close(got, expected_model, rtol=1e-6, atol=1e-6)
    moved = [np.linalg.norm(new - old) for new, old in zip(got[1:], (CENTERS, TABLE), strict=True)]
    norms = [optax.tree.get(new.opt_state, name) for name in ('step_norm', 'update_norm')]
    np.testing.assert_allclose(norms, moved, rtol=1e-4)


class Model(nnx.Module):
    def __init__(self, table_type=clj.nnx.Table):
        self.bias = nnx.Param(jnp.ones(2))
        self.center = clj.nnx.CenterLoss(5, D, centers_init=lambda *_: jnp.asarray(CENTERS), rngs=nnx.Rngs(0))
        self.table = table_type(jnp.asarray(TABLE))


@nnx.jit
def nnx_step(model, optimizer, rows):
    grads = nnx.grad(lambda model: jnp.sum(model.bias[...]))(model)
    grads.center = {'centers': clj.nnx.Centers(CENTER_ROWS)}
    grads.table = type(model.table)(rows)
    optimizer.update(model, grads)


WRT = nnx.Param, clj.nnx.Centers, clj.nnx.Table


def test_an_nnx_optimizer_moves_params_centers_and_classifier(expected_model):
    model = Model()
    optimizer = nnx.Optimizer(model, ALL_THREE, wrt=WRT)
    nnx_step(model, optimizer, rows_of())
    got = model.bias[...], model.center.centers[...], model.table[...]
    chex.assert_trees_all_close(got, expected_model, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('table_type', [clj.nnx.Table, nnx.Param])
def test_eq_4_moves_no_classifier_in_an_nnx_model(table_type):
    model = Model(table_type)
    optimizer = nnx.Optimizer(model, clj.with_centers(optax.sgd(1.0)), wrt=WRT)
    with pytest.raises(TypeError, match=r"center_update.*kind 'gradient'.*classifier=by_rows"):
        nnx_step(model, optimizer, rows_of())


def test_rows_without_a_kind_are_an_error_where_only_the_kind_tells_tables_apart():
    model = Model()
    optimizer = nnx.Optimizer(model, ALL_THREE, wrt=WRT)
    with pytest.raises(TypeError, match=r"kind='gradient'.*for the classifier"):
        nnx_step(model, optimizer, clj.RowUpdates(jnp.asarray(INDICES), jnp.asarray(VALUES)))


@pytest.mark.parametrize('tree', [{'params': jnp.ones(2), 'centers': CENTERS}, {'centers': clj.nnx.Centers(CENTERS)}])
def test_a_classifier_that_is_not_in_the_tree_is_an_error(tree):
    with pytest.raises(
        ValueError, match=r"no classifier.*'params' and 'centers' and 'classifier'.*nnx.Table.*keys .*centers"
    ):
        ALL_THREE.init(tree)
