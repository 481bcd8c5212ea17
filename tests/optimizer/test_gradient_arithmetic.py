"""Gradient arithmetic beside centers: inside with_centers it works, and around it no center moves wrongly."""

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

# The sum of two labels is a class too.
X, CENTERS, LABELS, _ = make_problem(leading=(4,), num_classes=17, dtype=np.float32)
LABELS = np.array([3, 7, 7, -1])
MOVED = oracle.center_update(X, CENTERS, LABELS, 0.5)
MODEL = {'params': jnp.zeros(4), 'centers': jnp.asarray(CENTERS)}
GRADS = {'params': jnp.array([3.0, 0.0, 4.0, 0.0]), 'centers': clj.center_rows(X, CENTERS, LABELS)}


def take_steps(transform, *all_grads) -> Any:
    """Returns the model after each step, and the last state. The rows are those of the first step throughout."""
    model, state, models = MODEL, transform.init(MODEL), []
    step = jax.jit(partial(update, transform))
    for grads in all_grads:
        model, state = step(grads, state, model)
        models.append(model)
    return models, state


def trace_step(transform):
    """Traces a step without compiling it."""
    jax.eval_shape(partial(update, transform), GRADS, transform.init(MODEL), MODEL)


def test_clipping_inside_takes_the_norm_of_the_params_alone():
    transform = clj.with_centers(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)))
    (model,), _ = take_steps(transform, GRADS)
    np.testing.assert_allclose(model['params'], [-0.6, 0, -0.8, 0], rtol=1e-6)
    np.testing.assert_allclose(model['centers'], MOVED, rtol=1e-5, atol=1e-6)


def test_accumulation_inside_moves_the_centers_at_every_micro_step():
    accumulate: Any = optax.MultiSteps(optax.sgd(1.0), 2)
    transform = clj.with_centers(accumulate)
    other = {**GRADS, 'params': 3 * GRADS['params']}
    (first, second), state = take_steps(transform, GRADS, other)
    np.testing.assert_array_equal(first['params'], np.zeros(4))
    np.testing.assert_array_equal(second['params'], [-6, 0, -8, 0])
    # n_j counts the examples of one micro-step: each micro-step is a move by Eq. 4.
    move = MOVED - CENTERS
    np.testing.assert_allclose(first['centers'], CENTERS + move, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(second['centers'], CENTERS + 2 * move, rtol=1e-5, atol=1e-6)
    assert center_state(state).count == 2


def test_two_passes_that_are_joined_are_one_batch():
    halves = [clj.center_rows(X[part], CENTERS, LABELS[part]) for part in (slice(0, 2), slice(2, 4))]
    grads = {'params': GRADS['params'], 'centers': clj.concatenate_rows(*halves)}
    (model,), _ = take_steps(clj.with_centers(optax.sgd(1.0)), grads)
    np.testing.assert_allclose(model['centers'], MOVED, rtol=1e-5, atol=1e-6)


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
    np.testing.assert_allclose(taken['centers'], MOVED, rtol=1e-5, atol=1e-6)
    assert center_state(state.inner_state).count == 1


def test_alpha_and_learning_rate_can_be_injected_hyperparameters():
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
# The indices stay integers, so nothing can be refused when traced: such rows must move no center.
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


WITH_CENTERS = clj.with_centers(optax.sgd(1.0))
update_of_centers = jax.jit(WITH_CENTERS.update)
apply_updates = jax.jit(optax.apply_updates)


def around(transform, where):
    return optax.chain(*((transform, WITH_CENTERS) if where == 'before' else (WITH_CENTERS, transform)))


def take_steps_around(transform, where, steps):
    """Takes the steps of `around(transform, where)`. with_centers, which all cases share, is compiled once."""
    model, state, own_state = MODEL, WITH_CENTERS.init(MODEL), transform.init(MODEL)
    for _ in range(steps):
        updates = GRADS
        if where == 'before':
            updates, own_state = transform.update(updates, own_state, model)
        updates, state = update_of_centers(updates, state, model)
        if where == 'after':
            updates, own_state = transform.update(updates, own_state, model)
        model = apply_updates(model, updates)
    return model


both_sides = pytest.mark.parametrize('where', ['before', 'after'])


@both_sides
@pytest.mark.parametrize('transform', HARMLESS.values(), ids=HARMLESS.keys())
def test_a_transform_around_it_that_changes_no_number_works(transform, where):
    (model,), _ = take_steps(around(transform, where), GRADS)
    np.testing.assert_allclose(model['centers'], MOVED, rtol=1e-5, atol=1e-6)


@both_sides
@pytest.mark.parametrize('transform', RAISES.values(), ids=RAISES.keys())
def test_a_transform_around_it_that_scales_is_an_error(transform, where):
    # Optax or JAX may see the rows first: then the message is theirs.
    with pytest.raises((TypeError, ValueError)):
        trace_step(around(transform, where))


@both_sides
@pytest.mark.parametrize('transform', [RAISES['scale'], RAISES['clip']], ids=['scale', 'clip'])
def test_the_error_says_to_put_the_transform_inside(transform, where):
    with pytest.raises(TypeError, match=r'RowUpdates.*inside, with_centers\('):
        trace_step(around(transform, where))


@both_sides
@pytest.mark.parametrize('transform', MOVES_NOTHING.values(), ids=MOVES_NOTHING.keys())
def test_a_transform_around_it_that_keeps_integers_moves_no_center(transform, where):
    model = take_steps_around(transform, where, steps=2)
    np.testing.assert_array_equal(model['centers'], CENTERS)


@pytest.mark.parametrize('every', [1, 2])
def test_accumulation_around_is_an_error_that_names_the_rows(every):
    transform = optax.MultiSteps(clj.with_centers(optax.sgd(1.0)), every)
    with pytest.raises(TypeError, match='RowUpdates'):
        trace_step(transform)


def test_two_trees_of_gradients_that_were_added_move_no_center_and_are_counted():
    # 7 + 7 is 14, which is a class of the table.
    (model,), state = take_steps(clj.with_centers(optax.sgd(1.0)), optax.tree.add(GRADS, GRADS))
    np.testing.assert_array_equal(model['centers'], CENTERS)
    np.testing.assert_array_equal(model['params'], -2 * GRADS['params'])
    # All four, since a sum does not show which example had no label.
    assert center_state(state).dropped == 4
