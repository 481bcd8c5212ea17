"""center_update: Eq. 4 of the paper, its alpha and its state."""

from functools import partial
from typing import Any

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import centerloss_jax as clj
from tests.support import oracle
from tests.support.problems import make_problem, problems
from tests.support.steps import move, update


def step(x, centers, labels, alpha: Any = 0.5, **options):
    return move(jnp.asarray(centers), clj.center_rows(x, centers, labels, **options), alpha)


jitted: Any = jax.jit(step)


@hypothesis.given(problem=problems, alpha=st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_centers_move_by_eq_4_in_float64(problem, alpha):
    with jax.enable_x64(True):
        moved, state = jitted(*problem.arrays, alpha, **problem.options)
    expected = oracle.center_update(*problem.arrays, alpha=alpha, **problem.options)
    np.testing.assert_allclose(moved, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(state.step_norm, np.linalg.norm(expected - problem.centers), rtol=1e-6)


@pytest.mark.parametrize('call', [step, jitted], ids=['eager', 'jit'])
def test_an_example_by_hand(worked_example, call):
    moved, state = call(worked_example.x, worked_example.centers, worked_example.labels)
    np.testing.assert_allclose(moved, worked_example.moved, rtol=1e-6)
    step_norm = np.linalg.norm(worked_example.moved - worked_example.centers)
    np.testing.assert_allclose(state.step_norm, step_norm, rtol=1e-6)


def test_one_example_moves_its_center_half_the_way_at_alpha_1():
    moved, _ = jitted(np.array([[4, 2]], np.float32), np.zeros((3, 2), np.float32), np.array([1]), 1.0)
    np.testing.assert_array_equal(moved, [[0, 0], [2, 1], [0, 0]])


@pytest.mark.parametrize(('size', 'alpha'), [(1, 0.5), (1, 1.0), (64, 0.5), (64, 0.95), (4096, 1.0)])
def test_a_batch_of_one_class_never_overshoots(size, alpha):
    # A fixed decay for each example, as in other implementations, leaves -2.2 of the gap of 64 examples at 0.95.
    x, labels, centers = np.zeros((size, 1), np.float32), np.zeros(size, np.int32), jnp.ones((2, 1))
    factor = 1 - alpha * size / (1 + size)
    gaps = [1.0]
    for _ in range(8):
        centers, _ = jitted(x, centers, labels, alpha)
        gaps.append(float(centers[0, 0]))
        assert 0 <= gaps[-1] < gaps[-2]
    np.testing.assert_allclose(gaps, factor ** np.arange(9), rtol=1e-2, atol=1e-30)
    assert centers[1, 0] == 1


def test_a_hundred_steps_of_one_class_close_the_gap():
    x, labels = np.zeros((64, 1), np.float32), np.zeros(64, np.int32)
    once, _ = jitted(x, jnp.ones((2, 1)), labels)
    np.testing.assert_allclose(once[0, 0], 0.507692, rtol=1e-5)
    many = jax.lax.fori_loop(0, 100, lambda _, centers: step(x, centers, labels)[0], jnp.ones((2, 1)))
    np.testing.assert_allclose(many[0, 0], 3.63e-30, rtol=1e-2)


def test_the_order_of_the_examples_does_not_matter():
    x, centers, labels, _ = make_problem(leading=(64,), dtype=np.float32)
    shuffled = np.random.default_rng(1).permutation(64)
    moved, _ = jitted(x, centers, labels)
    np.testing.assert_allclose(jitted(x[shuffled], centers, labels[shuffled])[0], moved, rtol=1e-5, atol=1e-6)


def test_classes_that_are_absent_stay_to_the_bit():
    x, centers, labels, options = make_problem(leading=(128,), num_classes=901, dtype=np.float32, masked=True)
    moved = np.asarray(jitted(x, centers, labels, **options)[0])
    present = np.isin(np.arange(901), labels[options['where']])
    np.testing.assert_array_equal(moved[~present], centers[~present])
    assert np.all(np.any(moved[present] != centers[present], axis=1))


@pytest.mark.parametrize('num_classes', [4, 7, 8, 50])
def test_an_absent_center_keeps_a_negative_zero_and_a_subnormal_number(num_classes):
    x, centers = np.ones((7, 2), np.float32), np.zeros((num_classes, 2), np.float32)
    centers[1], centers[3] = -0.0, 1e-40
    moved, _ = jitted(x, centers, np.array([0, 2, 0, 0, 2, -1, 0]))
    np.testing.assert_array_equal(np.asarray(moved)[[1, 3]].view(np.int32), centers[[1, 3]].view(np.int32))


EXPONENTS = [16, 20, pytest.param(23, marks=pytest.mark.slow)]


@pytest.mark.parametrize('exponent', EXPONENTS)
@pytest.mark.parametrize('num_classes', [1, 3, 'N / 2', 'N', 'N + 1', 2**23 + 1])
def test_the_sum_over_many_examples_of_one_class_keeps_its_digits(exponent, num_classes):
    n = 2**exponent
    num_classes = {'N / 2': n // 2, 'N': n, 'N + 1': n + 1}.get(num_classes, num_classes)
    labels = np.full(n, num_classes - 1)
    moved, state = jitted(np.full((n, 1), 0.1, np.float32), np.zeros((num_classes, 1), np.float32), labels)
    np.testing.assert_allclose(moved[-1, 0], 0.5 * 0.1 * n / (n + 1), rtol=1e-4)
    np.testing.assert_allclose(state.step_norm, 0.5 * 0.1 * n / (n + 1), rtol=1e-4)


# A CPU sums them in two ways.
@pytest.mark.parametrize('num_features', [2, pytest.param(129, marks=pytest.mark.slow)])
def test_the_sums_over_many_examples_of_two_classes_keep_their_digits(num_features):
    n, num_classes = 2**16, 2**16 + 1
    x, labels = np.full((n, num_features), 0.1, np.float32), np.zeros(n, int)
    labels[::4], labels[1], labels[2] = 5, 7, num_classes - 1
    moved, _ = jitted(x, np.zeros((num_classes, num_features), np.float32), labels)
    count = np.bincount(labels, minlength=num_classes)
    expected = np.broadcast_to((0.5 * 0.1 * count / (count + 1))[:, None], moved.shape)
    np.testing.assert_allclose(moved, expected, rtol=1e-4)


def test_the_largest_class_count_of_int32_labels():
    # Without params the number of rows is not known: every index below the largest int32 is a row.
    indices = jnp.array([2**31 - 2, 0, 2**31 - 2])
    transform: Any = clj.center_update(0.5)
    updates, state = jax.jit(transform.update)(clj.RowUpdates(indices, jnp.ones((3, 2))), transform.init(None))
    np.testing.assert_array_equal(updates.indices, indices)
    np.testing.assert_allclose(updates.values, [[-1 / 6, -1 / 6], [-1 / 4, -1 / 4], [-1 / 6, -1 / 6]], rtol=1e-6)
    assert state.dropped == 0


# The update rules of other implementations, where every class of the batch has n examples.
@pytest.mark.parametrize('n', [1, 2, 5])
class TestOtherRules:
    def problem(self, n):
        x, centers, _, _ = make_problem(leading=(5 * n,), dtype=np.float32)
        return x, centers, np.tile(np.arange(5), n)

    def test_gradient_descent_on_the_loss_divides_by_the_batch(self, n):
        x, centers, labels = self.problem(n)
        rate = 0.2
        descended = centers - rate * jax.jit(jax.grad(clj.center_loss, 1))(x, centers, labels)
        moved, _ = jitted(x, centers, labels, alpha=2 * rate * (1 + n) / len(x))
        np.testing.assert_allclose(moved, descended, rtol=1e-5)

    def test_a_fixed_decay_for_each_example_is_an_alpha_that_grows_with_n(self, n):
        x, centers, labels = self.problem(n)
        decayed = centers.astype(np.float64)
        for example, label in zip(x, labels, strict=True):
            decayed[label] -= (1 - 0.95) * (centers[label].astype(np.float64) - example)
        moved, _ = jitted(x, centers, labels, alpha=0.05 * (1 + n))
        np.testing.assert_allclose(moved, decayed, rtol=1e-5)


def test_several_tables_move_each_by_its_own_rows():
    tables, rows, expected = {}, {}, {}
    for name, seed, num_classes in (('identity', 0, 5), ('camera', 1, 4)):
        x, tables[name], labels, _ = make_problem(seed, num_classes=num_classes, dtype=np.float32)
        rows[name] = clj.center_rows(x, tables[name], labels)
        expected[name] = oracle.center_update(x, tables[name], labels, 0.5)
    transform = clj.center_update(0.5)
    moved, state = jax.jit(partial(update, transform))(rows, transform.init(tables), tables)
    chex.assert_trees_all_close(moved, expected, rtol=1e-5)
    both = [np.linalg.norm(expected[name] - tables[name]) for name in tables]
    np.testing.assert_allclose(state.step_norm, np.linalg.norm(both), rtol=1e-5)
    assert state.count == 1


def test_the_state_counts_steps_and_keeps_the_last_norm_alone(worked_example):
    centers = jnp.asarray(worked_example.centers)
    transform = clj.center_update(0.5)
    state, norms = transform.init(centers), []
    move_again = jax.jit(partial(update, transform))
    for step in range(1, 4):
        rows = clj.center_rows(worked_example.x, centers, worked_example.labels)
        moved, state = move_again(rows, state, centers)
        np.testing.assert_allclose(state.step_norm, np.linalg.norm(moved - centers), rtol=1e-5)
        assert state.count == step
        centers, norms = moved, [*norms, float(state.step_norm)]
    assert norms[0] > norms[1] > norms[2] > 0


@pytest.mark.parametrize('num_classes', [3, 1000])
def test_the_state_does_not_grow_with_the_table(num_classes):
    state = clj.center_update().init(jnp.zeros((num_classes, 2)))
    assert [leaf.shape for leaf in jax.tree.leaves(state)] == [()] * 3


def test_one_trace_serves_every_step():
    @jax.jit
    @partial(chex.assert_max_traces, n=1)
    def traced(x, centers, labels):
        return step(x, centers, labels, alpha=optax.linear_schedule(1.0, 0.0, 10))

    for seed in range(3):
        traced(*make_problem(seed, dtype=np.float32).arrays)
    chex.clear_trace_counter()


def trajectory(transform, steps=4, dtype: Any = np.float64) -> Any:
    """Returns the centers after each step on one batch, which moves them by the alpha of that step."""
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
def test_alpha_may_be_0_and_1(alpha, moves):
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
def test_an_alpha_outside_of_0_to_1_is_an_error(make, alpha):
    with pytest.raises(ValueError, match=r'alpha.*\[0, 1\]'):
        make(alpha)


@pytest.mark.parametrize('make', [clj.center_update, partial(clj.with_centers, optax.sgd(0.1))])
@pytest.mark.parametrize('alpha', [np.array([0.5, 0.5]), 'half', None, [0.5]], ids=repr)
def test_an_alpha_that_is_no_number_is_an_error(make, alpha):
    with pytest.raises(TypeError, match='alpha must be a number'):
        make(alpha)


@pytest.mark.parametrize('alpha', [0.3, optax.linear_schedule(1.0, 0.0, 10)], ids=['number', 'schedule'])
def test_alpha_may_be_an_injected_hyperparameter(alpha):
    alphas = [0.3] * 4 if alpha == 0.3 else [1.0, 0.9, 0.8, 0.7]
    centers, state = trajectory(optax.inject_hyperparams(clj.center_update)(alpha=alpha), dtype=np.float32)
    for got, expected in zip(centers, expected_trajectory(alphas), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.hyperparams['alpha'], alphas[-1], rtol=1e-6)


def test_an_injected_alpha_may_change_between_steps():
    x, centers, labels, _ = make_problem(dtype=np.float32)
    transform = optax.inject_hyperparams(clj.center_update)(alpha=0.5)
    state: Any = transform.init(centers)
    state.hyperparams['alpha'] = jnp.float32(0.125)
    moved, _ = update(transform, clj.center_rows(x, centers, labels), state, jnp.asarray(centers))
    np.testing.assert_allclose(moved, oracle.center_update(x, centers, labels, 0.125), rtol=1e-5)


def test_a_float32_table_moves_by_the_float32_amount_of_narrow_features():
    x, centers = jnp.full((1, 2), 100.5, jnp.bfloat16), jnp.full((3, 2), 100.0)
    moved, _ = jitted(x, centers, np.array([1]))
    chex.assert_type(moved, jnp.float32)
    np.testing.assert_array_equal(moved, [[100, 100], [100.125, 100.125], [100, 100]])


def test_a_narrow_table_rounds_the_whole_move_of_a_class_once():
    centers = jnp.full((3, 2), 100, jnp.bfloat16)
    x = jnp.full((64, 2), 101, jnp.bfloat16)
    moved, _ = jitted(x, centers, np.ones(64, int))
    chex.assert_type(moved, jnp.bfloat16)
    np.testing.assert_array_equal(moved.astype(jnp.float32), [[100, 100], [100.5, 100.5], [100, 100]])
    # Half a unit in the last place is 1/4 here, and a smaller move is lost.
    stalled, _ = jitted(x[:1] - 0.5, centers, np.array([1]))
    np.testing.assert_array_equal(stalled, centers)
    # The unit of float16 at 100 is 1/16.
    moved, _ = jitted(x[:1] - 0.5, centers.astype(jnp.float16), np.array([1]))
    np.testing.assert_array_equal(moved, jnp.array([[100, 100], [100.125, 100.125], [100, 100]], jnp.float16))
