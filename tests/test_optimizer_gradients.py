"""Arithmetic on gradients beside centers: inside with_centers it works, around it no center moves wrongly."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import centerloss_jax as clj
from tests.support import oracle
from tests.support.problems import make_problem
from tests.support.steps import center_state, update

X, CENTERS, LABELS, _ = make_problem(leading=(4,), num_classes=17, dtype=np.float32)
LABELS = np.array([3, 7, 7, -1])
ROWS = clj.center_rows(X, CENTERS, LABELS)
MODEL = {'params': jnp.zeros(4), 'centers': jnp.asarray(CENTERS)}
GRADS = {'params': jnp.array([3.0, 0.0, 4.0, 0.0]), 'centers': ROWS}


def take_steps(transform, *all_grads) -> Any:
    """The model after each step. Rows are those of the first step: what is asked is where they go."""
    model, state, models = MODEL, transform.init(MODEL), []
    for grads in all_grads:
        model, state = update(transform, grads, state, model)
        models.append(model)
    return models, state


def test_clipping_inside_measures_the_params_alone():
    transform = clj.with_centers(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)))
    (model,), _ = take_steps(transform, GRADS)
    np.testing.assert_allclose(model['params'], [-0.6, 0, -0.8, 0], rtol=1e-6)
    np.testing.assert_allclose(model['centers'], oracle.center_update(X, CENTERS, LABELS, 0.5), rtol=1e-5, atol=1e-6)


def test_accumulation_inside_moves_centers_at_every_micro_step():
    accumulate: Any = optax.MultiSteps(optax.sgd(1.0), 2)
    transform = clj.with_centers(accumulate)
    other = {**GRADS, 'params': 3 * GRADS['params']}
    (first, second), state = take_steps(transform, GRADS, other)
    np.testing.assert_array_equal(first['params'], np.zeros(4))
    np.testing.assert_array_equal(second['params'], [-6, 0, -8, 0])
    # n_j counts a micro-step's examples: each is a move by Eq. 4 of its own.
    move = oracle.center_update(X, CENTERS, LABELS, 0.5) - CENTERS
    np.testing.assert_allclose(first['centers'], CENTERS + move, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(second['centers'], CENTERS + 2 * move, rtol=1e-5, atol=1e-6)
    assert center_state(state).count == 2


def test_passes_that_are_joined_are_one_batch():
    halves = [clj.center_rows(X[part], CENTERS, LABELS[part]) for part in (slice(0, 2), slice(2, 4))]
    grads = {'params': GRADS['params'], 'centers': clj.concatenate_rows(*halves)}
    (model,), _ = take_steps(clj.with_centers(optax.sgd(1.0)), grads)
    expected = oracle.center_update(X, CENTERS, LABELS, 0.5)
    np.testing.assert_allclose(model['centers'], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('content', [np.nan, np.inf])
@pytest.mark.parametrize('place', ['params', 'centers'])
def test_apply_if_finite_around_skips_a_bad_step_and_takes_the_next(content, place):
    x = X.copy()
    x[1, 0] = content
    bad = {'params': GRADS['params'].at[1].set(content), 'centers': clj.center_rows(x, CENTERS, LABELS)}
    bad = {**GRADS, place: bad[place]}
    transform = optax.apply_if_finite(clj.with_centers(optax.sgd(1.0)), 3)
    (skipped, taken), state = take_steps(transform, bad, GRADS)
    np.testing.assert_array_equal(skipped['params'], MODEL['params'])
    np.testing.assert_array_equal(skipped['centers'], CENTERS)
    np.testing.assert_array_equal(taken['params'], -GRADS['params'])
    expected = oracle.center_update(X, CENTERS, LABELS, 0.5)
    np.testing.assert_allclose(taken['centers'], expected, rtol=1e-5, atol=1e-6)
    assert center_state(state.inner_state).count == 1


def test_hyperparameters_of_both_can_be_injected():
    make = optax.inject_hyperparams(lambda rate, alpha: clj.with_centers(optax.sgd(rate), alpha))
    (model,), state = take_steps(make(rate=0.25, alpha=optax.linear_schedule(1.0, 0.0, 10)), GRADS)
    np.testing.assert_array_equal(model['params'], -0.25 * GRADS['params'])
    expected = oracle.center_update(X, CENTERS, LABELS, 1.0)
    np.testing.assert_allclose(model['centers'], expected, rtol=1e-5, atol=1e-6)
    assert state.hyperparams['alpha'] == 1.0


HARMLESS = {'identity': optax.identity(), 'zero_nans': optax.zero_nans()}
RAISES = {
    'clip_by_global_norm': optax.clip_by_global_norm(1.0),
    'clip': optax.clip(1.0),
    'clip_by_block_rms': optax.clip_by_block_rms(1.0),
    'adaptive_grad_clip': optax.adaptive_grad_clip(0.1),
    'normalize': optax.normalize_by_update_norm(),
    'scale': optax.scale(0.5),
    'momentum': optax.trace(0.9),
    'ema': optax.ema(0.9),
    'adam': optax.scale_by_adam(),
    'weight decay': optax.add_decayed_weights(1e-4),
    'noise': optax.add_noise(0.1, 0.1, 0),
}
# What keeps integers integers cannot be refused when traced: such rows move nothing.
MOVES_NOTHING = {
    'scale by an integer': optax.scale(2),
    'ascent': optax.scale(-1),
    'schedule, which optax casts to integers': optax.scale_by_schedule(lambda count: 0.5),
    'set_to_zero': optax.set_to_zero(),
    'clip to integers': optax.clip(1),
    'clip to larger integers': optax.clip(5),
    'sign': optax.scale_by_sign(),
    'square': optax.stateless(lambda updates, params: jax.tree.map(jnp.square, updates)),
}


def around(transform, where):
    centers = clj.with_centers(optax.sgd(1.0))
    return optax.chain(transform, centers) if where == 'before' else optax.chain(centers, transform)


both_sides = pytest.mark.parametrize('where', ['before', 'after'])


@both_sides
@pytest.mark.parametrize('transform', HARMLESS.values(), ids=HARMLESS.keys())
def test_around_what_changes_no_number_works(transform, where):
    (model,), _ = take_steps(around(transform, where), GRADS)
    expected = oracle.center_update(X, CENTERS, LABELS, 0.5)
    np.testing.assert_allclose(model['centers'], expected, rtol=1e-5, atol=1e-6)


@both_sides
@pytest.mark.parametrize('transform', RAISES.values(), ids=RAISES.keys())
def test_around_what_scales_is_an_error(transform, where):
    # The message is optax's or JAX's where they see the rows first.
    with pytest.raises((TypeError, ValueError)):
        take_steps(around(transform, where), GRADS)


@both_sides
@pytest.mark.parametrize('transform', [RAISES['scale'], RAISES['clip']], ids=['scale', 'clip'])
def test_where_the_library_sees_the_rows_it_says_where_to_put_it(transform, where):
    with pytest.raises(TypeError, match=r'RowUpdates.*inside, with_centers\('):
        take_steps(around(transform, where), GRADS)


@both_sides
@pytest.mark.parametrize('transform', MOVES_NOTHING.values(), ids=MOVES_NOTHING.keys())
def test_around_what_keeps_integers_moves_no_center(transform, where):
    models, _ = take_steps(around(transform, where), GRADS, GRADS)
    np.testing.assert_array_equal(models[-1]['centers'], CENTERS)


@pytest.mark.parametrize('every', [1, 2])
def test_accumulation_around_is_an_error_that_names_the_rows(every):
    transform = optax.MultiSteps(clj.with_centers(optax.sgd(1.0)), every)
    with pytest.raises(TypeError, match='RowUpdates'):
        take_steps(transform, GRADS)


@pytest.mark.parametrize('jit', [False, True], ids=['eager', 'jit'])
def test_two_trees_of_gradients_that_were_added_move_no_center_and_are_counted(jit):
    # 7 + 7 is 14, which is a class of the table.
    transform = clj.with_centers(optax.sgd(1.0))
    step = partial(update, transform)
    added = optax.tree.add(GRADS, GRADS)
    model, state = (jax.jit(step) if jit else step)(added, transform.init(MODEL), MODEL)
    np.testing.assert_array_equal(model['centers'], CENTERS)
    np.testing.assert_array_equal(model['params'], -2 * GRADS['params'])
    # All four: a sum no longer shows which row was that of an example without a label.
    assert center_state(state).left_out == 4
