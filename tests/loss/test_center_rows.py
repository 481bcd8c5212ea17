"""center_rows, and center_loss_and_rows, which returns the loss and the rows of one lookup."""

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import centerloss_jax as clj
from tests.support import oracle
from tests.support.problems import make_problem, problems


@jax.jit
def added_to_zeros(x, centers, labels, **options):
    return jnp.zeros_like(centers) + clj.center_rows(x, centers, labels, **options)


@hypothesis.given(problem=problems)
def test_rows_are_the_weighted_differences_in_float64(problem):
    with jax.enable_x64(True):
        total = added_to_zeros(*problem.arrays, **problem.options)
    expected = oracle.center_rows(*problem.arrays, **problem.options)
    np.testing.assert_allclose(total, expected, rtol=1e-12, atol=1e-12)


def test_a_row_points_from_the_features_to_the_center(worked_example):
    rows = clj.center_rows(worked_example.x, worked_example.centers, worked_example.labels)
    np.testing.assert_array_equal(jnp.zeros((3, 2)) + rows, [[-3, -4], [1, 0], [-1, -2]])


def test_there_are_as_many_rows_as_examples_for_any_table():
    x, centers, labels, _ = make_problem(leading=(2, 3), num_classes=1000, dtype=np.float32)
    rows = clj.center_rows(x, centers, labels)
    chex.assert_shape(rows.indices, (6,))
    chex.assert_shape(rows.values, (6, 3))
    assert all(leaf.size <= 18 for leaf in map(jnp.asarray, jax.tree.leaves(rows)))


def test_neither_rows_nor_gradient_change_a_class_that_is_absent():
    x, centers, labels, options = make_problem(leading=(128,), num_classes=901, dtype=np.float32, masked=True)
    moved = np.asarray(jax.jit(lambda centers: centers + clj.center_rows(x, centers, labels, **options))(centers))
    present = np.isin(np.arange(901), labels[options['where']])
    np.testing.assert_array_equal(moved[~present], centers[~present])
    assert np.all(np.any(moved[present] != centers[present], axis=1))
    gradient = np.asarray(jax.jit(jax.grad(clj.center_loss, 1))(x, centers, labels, **options))
    np.testing.assert_array_equal(gradient[~present], np.zeros_like(gradient[~present]))


@pytest.mark.parametrize('content', [np.nan, np.inf])
def test_rows_of_examples_that_are_left_out_are_finite(content):
    x, centers, labels, options = make_problem(dtype=np.float32, weights='elements')
    where = np.arange(7) != 4
    x[[1, 4]], options['weights'][[1, 4]], labels[1] = content, content, -1
    rows = clj.center_rows(x, centers, labels, where=where, **options)
    chex.assert_tree_all_finite(jnp.zeros_like(centers) + rows)
    chex.assert_tree_all_finite(rows.values)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16], ids=['bfloat16', 'float16'])
@pytest.mark.parametrize('centers_dtype', [jnp.float32, None], ids=['float32 table', 'narrow table'])
def test_rows_of_half_precision_are_float32(dtype, centers_dtype):
    x, centers = jnp.full((1, 3), 0.25, dtype), jnp.full((2, 3), 100, centers_dtype or dtype)
    rows = clj.center_rows(x, centers, np.array([1]))
    chex.assert_type(rows.values, jnp.float32)
    np.testing.assert_array_equal(jnp.zeros((2, 3)) + rows, [[0] * 3, [99.75] * 3])


def test_rows_carry_no_gradient():
    x, centers, labels, options = make_problem(dtype=np.float32, weights='examples')

    def total(x, centers, weights):
        return jnp.sum(clj.center_rows(x, centers, labels, weights=weights).values)

    gradients = jax.grad(total, (0, 1, 2))(x, centers, options['weights'])
    chex.assert_trees_all_equal(gradients, jax.tree.map(jnp.zeros_like, gradients))


REDUCTIONS = jnp.mean, jnp.sum, None


@jax.jit
def loss_and_rows(x, centers, labels, **options):
    return [clj.center_loss_and_rows(x, centers, labels, reduce_fn=fn, **options) for fn in REDUCTIONS]


@jax.jit
def loss_then_rows(x, centers, labels, **options):
    losses = [clj.center_loss(x, centers, labels, reduce_fn=fn, **options) for fn in REDUCTIONS]
    return losses, clj.center_rows(x, centers, labels, **options)


@hypothesis.given(problem=problems)
def test_loss_and_rows_equal_the_results_of_the_two_functions(problem):
    losses, expected = loss_then_rows(*problem.arrays, **problem.options)
    for (loss, rows), separate in zip(loss_and_rows(*problem.arrays, **problem.options), losses, strict=True):
        chex.assert_trees_all_close(loss, separate, rtol=2e-6)
        chex.assert_trees_all_equal(rows.indices, expected.indices)
        chex.assert_trees_all_close(rows.values, expected.values, rtol=1e-6)


def test_rows_do_not_depend_on_how_the_loss_is_reduced(worked_example):
    arrays = worked_example.x, worked_example.centers, worked_example.labels
    _, rows = clj.center_loss_and_rows(*arrays)
    for reduce_fn in (jnp.sum, jnp.max, None):
        _, others = clj.center_loss_and_rows(*arrays, reduce_fn=reduce_fn)
        chex.assert_trees_all_equal(rows.indices, others.indices)
        chex.assert_trees_all_close(rows.values, others.values, rtol=1e-6)


@pytest.mark.parametrize('transform', [jax.grad, jax.jacfwd, jax.hessian], ids=['reverse', 'forward', 'second'])
def test_loss_and_rows_have_the_derivatives_of_the_loss(transform):
    x, centers, labels, options = make_problem(dtype=np.float32, masked=True)
    alone = transform(lambda x, c: 0.3 * clj.center_loss(x, c, labels, **options), (0, 1))
    with_rows = transform(lambda x, c: 0.3 * clj.center_loss_and_rows(x, c, labels, **options)[0], (0, 1))
    got, expected = jax.jit(with_rows)(x, centers), jax.jit(alone)(x, centers)
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-7)


def test_loss_and_rows_have_the_gradients_of_the_loss_alone():
    x, centers, labels, options = make_problem(dtype=np.float32, masked=True, weights='examples')

    def with_rows(x, centers):
        loss, rows = clj.center_loss_and_rows(x, centers, labels, **options)
        return loss + jnp.sum(rows.values)

    gradients = jax.grad(with_rows, (0, 1))(x, centers)
    expected = jax.grad(clj.center_loss, (0, 1))(x, centers, labels, **options)
    chex.assert_trees_all_equal(gradients, expected)
