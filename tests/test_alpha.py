"""alpha of center_update: a number, a schedule or a hyperparameter, and nobody's learning rate."""

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
from tests.support.steps import update


def trajectory(transform, steps=4, dtype: Any = np.float64) -> Any:
    """The centers after each step on one batch, which moves them by the alpha of that step."""
    x, centers, labels, _ = make_problem(dtype=dtype)
    state, out = transform.init(centers), []

    @jax.jit
    def step(centers, state):
        return update(transform, clj.center_rows(x, centers, labels), state, centers)

    for _ in range(steps):
        centers, state = step(centers, state)
        out.append(centers)
    return out, state


def expected_trajectory(alphas):
    x, centers, labels, _ = make_problem()
    for alpha in alphas:
        centers = oracle.center_update(x, centers, labels, alpha)
        yield centers


SCHEDULES = {
    'constant': (optax.constant_schedule(0.3), [0.3] * 4),
    'linear': (optax.linear_schedule(1.0, 0.0, 10), [1.0, 0.9, 0.8, 0.7]),
    'warm-up': (optax.linear_schedule(0.0, 1.0, 2), [0.0, 0.5, 1.0, 1.0]),
    'steps': (optax.piecewise_constant_schedule(0.8, {2: 0.5}), [0.8, 0.8, 0.4, 0.4]),
    'a function': (lambda count: 1 / (1 + count), [1.0, 1 / 2, 1 / 3, 1 / 4]),
}


@pytest.mark.parametrize(('schedule', 'alphas'), SCHEDULES.values(), ids=SCHEDULES.keys())
def test_step_k_uses_the_kth_value_of_a_schedule(schedule, alphas):
    with jax.enable_x64(True):
        centers, state = trajectory(clj.center_update(schedule))
    for got, expected in zip(centers, expected_trajectory(alphas), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert state.count == 4


@pytest.mark.parametrize(
    'alpha',
    [0.3, np.float32(0.3), np.float64(0.3), jnp.float32(0.3), np.array(0.3)],
    ids=lambda a: str(type(a)),
)
def test_alpha_may_be_any_kind_of_number(alpha):
    centers, _ = trajectory(clj.center_update(alpha), dtype=np.float32)
    for got, expected in zip(centers, expected_trajectory([0.3] * 4), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
        assert got.dtype == jnp.float32


@pytest.mark.parametrize(('alpha', 'moves'), [(0, False), (0.0, False), (1, True)])
def test_the_ends_of_its_range_are_allowed(alpha, moves):
    _, centers, _, _ = make_problem(dtype=np.float32)
    (moved, *_), state = trajectory(clj.center_update(alpha), dtype=np.float32)
    assert np.any(np.asarray(moved) != centers) == moves
    assert (state.step_norm > 0) == moves
    assert state.count == 4


@pytest.mark.parametrize('make', [clj.center_update, partial(clj.with_centers, optax.sgd(0.1))])
@pytest.mark.parametrize(
    'alpha',
    [-0.1, 1.5, 50, float('nan'), float('inf'), np.float32(-1), np.int32(2), np.array(1.5), jnp.float32(2)],
    ids=repr,
)
def test_a_number_outside_of_0_to_1_is_an_error(make, alpha):
    with pytest.raises(ValueError, match=r'alpha.*\[0, 1\]'):
        make(alpha)


@pytest.mark.parametrize('alpha', [0.3, optax.linear_schedule(1.0, 0.0, 10)], ids=['number', 'schedule'])
def test_injected_as_a_hyperparameter(alpha):
    alphas = [0.3] * 4 if alpha == 0.3 else [1.0, 0.9, 0.8, 0.7]
    centers, state = trajectory(optax.inject_hyperparams(clj.center_update)(alpha=alpha), dtype=np.float32)
    for got, expected in zip(centers, expected_trajectory(alphas), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.hyperparams['alpha'], alphas[-1], rtol=1e-6)


def test_an_injected_alpha_may_be_set_between_steps():
    x, centers, labels, _ = make_problem(dtype=np.float32)
    transform = optax.inject_hyperparams(clj.center_update)(alpha=0.5)
    state: Any = transform.init(centers)
    state.hyperparams['alpha'] = jnp.float32(0.125)
    moved, _ = update(transform, clj.center_rows(x, centers, labels), state, jnp.asarray(centers))
    np.testing.assert_allclose(moved, oracle.center_update(x, centers, labels, 0.125), rtol=1e-5)


def test_centers_follow_their_own_schedule_and_params_theirs():
    x, centers, labels, _ = make_problem(dtype=np.float32)
    params = {'params': jnp.float32(0), 'centers': jnp.asarray(centers)}
    rate = optax.linear_schedule(0.5, 0.0, 2)
    alpha: Any = optax.linear_schedule(0.0, 1.0, 4)
    transform = clj.with_centers(optax.sgd(rate), alpha)
    state = transform.init(params)
    for step, (rate, expected) in enumerate(zip([0.5, 0.25, 0.0], expected_trajectory([0.0, 0.25, 0.5]), strict=True)):
        rows = clj.center_rows(x, params['centers'], labels)
        new, state = update(transform, {'params': jnp.float32(1), 'centers': rows}, state, params)
        assert new['params'] == params['params'] - rate, step
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
