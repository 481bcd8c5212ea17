"""center_update: Eq. 4 of the paper, as an optax transform whose state does not grow with the table."""

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
from absl.testing import parameterized

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


@pytest.mark.parametrize(('size', 'alpha'), [(1, 1.0), (64, 0.5), (64, 0.95), (4096, 1.0)])
def test_a_batch_of_one_class_never_overshoots(size, alpha):
    # A fixed decay for each example, as other codes have it, leaves -2.2 of the gap of 64 examples at 0.95.
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


def test_the_order_of_the_examples_is_of_no_account():
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


def test_the_largest_class_count_of_int32_labels():
    # Without a table at hand rows up to int32's largest but one are rows.
    indices = jnp.array([2**31 - 2, 0, 2**31 - 2])
    transform: Any = clj.center_update(0.5)
    updates, state = transform.update(clj.RowUpdates(indices, jnp.ones((3, 2))), transform.init(None))
    np.testing.assert_array_equal(updates.indices[:2], [0, 2**31 - 2])
    np.testing.assert_allclose(updates.values[:2], [[-1 / 4, -1 / 4], [-1 / 3, -1 / 3]], rtol=1e-6)
    assert state.left_out == 0


# What other codes call the same step, where every class of the batch has n examples.
@pytest.mark.parametrize('n', [1, 2, 5])
class TestOtherRules:
    def problem(self, n):
        x, centers, _, _ = make_problem(leading=(5 * n,), dtype=np.float32)
        return x, centers, np.tile(np.arange(5), n)

    def test_gradient_descent_on_the_loss_divides_by_the_batch(self, n):
        x, centers, labels = self.problem(n)
        rate = 0.2
        descended = centers - rate * jax.grad(clj.center_loss, 1)(x, centers, labels)
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
    moved, state = update(transform, rows, transform.init(tables), tables)
    chex.assert_trees_all_close(moved, expected, rtol=1e-5)
    both = [np.linalg.norm(expected[name] - tables[name]) for name in tables]
    np.testing.assert_allclose(state.step_norm, np.linalg.norm(both), rtol=1e-5)
    assert state.count == 1


def test_the_state_counts_steps_and_keeps_the_last_norm_alone(worked_example):
    centers = jnp.asarray(worked_example.centers)
    transform = clj.center_update(0.5)
    state, norms = transform.init(centers), []
    for step in range(1, 4):
        rows = clj.center_rows(worked_example.x, centers, worked_example.labels)
        moved, state = update(transform, rows, state, centers)
        np.testing.assert_allclose(state.step_norm, jnp.linalg.norm(moved - centers), rtol=1e-5)
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


# Any, since chex annotates a decorator as an object and a variant as a function that never returns.
variants: Any = chex.variants(with_jit=True, without_jit=True, with_pmap=True)


class ShapesTest(chex.TestCase):
    variant: Any

    @variants
    @parameterized.named_parameters(('float32', jnp.float32), ('bfloat16', jnp.bfloat16))
    def test_update(self, dtype):
        transform = clj.center_update(0.5)
        rows = clj.RowUpdates(jnp.arange(7, dtype=jnp.int32), jnp.ones((7, 3), dtype))
        table = jnp.ones((5, 3), dtype)
        updates, state = self.variant(transform.update)(rows, transform.init(table), table)
        assert isinstance(updates, clj.RowUpdates)
        chex.assert_shape([updates.indices, updates.values], [(7,), (7, 3)])
        chex.assert_type([updates.indices, updates.values], [jnp.int32, jnp.float32])
        chex.assert_shape([state.count, state.left_out, state.step_norm], ())
        chex.assert_type([state.count, state.left_out, state.step_norm], [jnp.int32, jnp.int32, jnp.float32])
        assert jax.tree.structure(state) == jax.tree.structure(transform.init(table))
