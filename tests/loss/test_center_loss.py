"""center_loss: its value, its reductions and its gradients."""

from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import centerloss_jax as clj
from tests.support import oracle
from tests.support.problems import make_problem, problems


@pytest.mark.parametrize(
    ('reduce_fn', 'expected'),
    [
        pytest.param(jnp.mean, 4.75, id='mean over the batch'),
        pytest.param(jnp.sum, 19.0, id='sum'),
        pytest.param(lambda per_example: per_example.sum() / 2, 9.5, id='the sum with a half, as in the paper'),
        pytest.param(jnp.max, 8.0, id='max'),
        pytest.param(None, [5.0, 5.0, 1.0, 8.0], id='per example'),
    ],
)
def test_value_has_no_half_and_is_a_mean_over_examples(worked_example, reduce_fn, expected):
    loss = clj.center_loss(worked_example.x, worked_example.centers, worked_example.labels, reduce_fn=reduce_fn)
    np.testing.assert_array_equal(loss, expected)


def test_the_default_reduction_is_the_mean(worked_example):
    assert clj.center_loss(worked_example.x, worked_example.centers, worked_example.labels) == 4.75


loss_of: Any = jax.jit(clj.center_loss, static_argnames='reduce_fn')
value_and_grad = jax.jit(jax.value_and_grad(clj.center_loss))


def test_repeating_the_batch_changes_nothing(worked_example):
    x, centers, labels = worked_example.x, worked_example.centers, worked_example.labels
    assert loss_of(np.tile(x, (8, 1)), centers, np.tile(labels, 8)) == 4.75


def test_padding_the_features_with_zeros_changes_nothing(worked_example):
    x, centers = (np.pad(a, ((0, 0), (0, 510))) for a in (worked_example.x, worked_example.centers))
    assert loss_of(x, centers, worked_example.labels) == 4.75


def test_value_is_the_value_of_the_reference_without_its_clamp():
    x, centers, labels, _ = make_problem(leading=(9,), num_classes=6, num_features=4)
    reference = oracle.reference_loss(x, centers, labels, np.float64)
    with jax.enable_x64(True):
        loss = loss_of(x, centers, labels)
    np.testing.assert_allclose(loss, reference - 5e-12, rtol=1e-13)


@jax.jit
def all_gradients(x, centers, weights, labels, where):
    def loss_fn(x, centers, weights):
        return clj.center_loss(x, centers, labels, where=where, weights=weights)

    return jax.value_and_grad(loss_fn, (0, 1, 2))(x, centers, weights)


@hypothesis.given(problem=problems)
def test_value_and_gradients_are_exact_in_float64(problem):
    weights = problem.options.get('weights', np.ones(problem.labels.shape))
    where = problem.options.get('where')

    with jax.enable_x64(True):
        gradients = all_gradients(problem.x, problem.centers, weights, problem.labels, where)
        loss, (for_x, for_centers, for_weights) = gradients

    expected = oracle.center_loss_gradients(*problem.arrays, **problem.options)
    np.testing.assert_allclose(loss, oracle.center_loss(*problem.arrays, **problem.options), rtol=1e-12)
    np.testing.assert_allclose(for_x, expected[0], rtol=1e-12)
    # Examples of one class may cancel: the error is relative to the largest term.
    np.testing.assert_allclose(for_centers, expected[1], rtol=1e-12, atol=1e-12 * np.abs(expected[0]).max())
    per_weight = expected[2] if weights.shape == problem.x.shape else expected[2].sum(-1)
    np.testing.assert_allclose(for_weights, per_weight, rtol=1e-12)


@hypothesis.given(problem=problems)
def test_per_example_values_are_exact_in_float64(problem):
    with jax.enable_x64(True):
        per_example = loss_of(*problem.arrays, **problem.options, reduce_fn=None)
    np.testing.assert_allclose(per_example, oracle.per_example(*problem.arrays, **problem.options), rtol=1e-12)


def test_gradient_for_the_centers_is_the_gradient_of_the_mean(worked_example):
    gradient = jax.grad(clj.center_loss, argnums=1)(worked_example.x, worked_example.centers, worked_example.labels)
    np.testing.assert_array_equal(gradient, [[-1.5, -2.0], [0.5, 0.0], [-0.5, -1.0]])


def test_gradient_is_zero_at_the_center_and_not_clamped_beside_it():
    centers = np.array([[1.0, 2.0], [3.0, 5.0], [7.0, 11.0]], np.float32)
    x = centers[[1, 2]] + np.array([[0, 0], [1e-6, 0]], np.float32)
    _, gradient = value_and_grad(x, centers, np.array([1, 2]))
    np.testing.assert_array_equal(gradient, x - centers[[1, 2]])
    assert gradient[1, 0] > 0


def test_the_second_derivative_is_that_of_a_square():
    x, centers, labels, _ = make_problem(leading=(4,), dtype=np.float32)
    second = jax.jit(jax.hessian(lambda row: clj.center_loss(jnp.asarray(x).at[1].set(row), centers, labels)))(x[1])
    np.testing.assert_allclose(second, 2 / 4 * np.eye(3), rtol=1e-6)


def test_sequences_with_padded_steps():
    x = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    centers = np.array([[0, 0], [1, 1], [2, 2]], np.float32)
    labels = np.array([[0, 1, -1], [2, 2, 0]])
    np.testing.assert_array_equal(loss_of(x, centers, labels, reduce_fn=None), [[1, 5, 0], [41, 85, 221]])
    loss, gradient = value_and_grad(x, centers, labels)
    np.testing.assert_allclose(loss, 353 / 5, rtol=1e-7)
    np.testing.assert_array_equal(gradient[0, 2], [0.0, 0.0])
    np.testing.assert_allclose(gradient[1, 1], 2 / 5 * (x[1, 1] - 2), rtol=1e-6)


def test_more_padded_steps_change_nothing_to_the_bit():
    x, centers, labels, _ = make_problem(leading=(2, 3), dtype=np.float32)
    x, centers = np.round(x * 8) / 8, np.round(centers * 8) / 8  # sums are exact in any order
    padding = np.random.default_rng(1).normal(size=(2, 5, 3)).astype(np.float32)
    longer_x = np.concatenate([x, padding], axis=1)
    longer_labels = np.concatenate([labels, np.full((2, 5), -1, np.int32)], axis=1)
    loss, gradient = value_and_grad(x, centers, labels)
    longer_loss, longer_gradient = value_and_grad(longer_x, centers, longer_labels)
    assert loss == longer_loss
    np.testing.assert_array_equal(longer_gradient[:, :3], gradient)
    np.testing.assert_array_equal(longer_gradient[:, 3:], np.zeros((2, 5, 3)))


def test_leading_dimensions_do_not_change_the_value():
    x, centers, labels, options = make_problem(leading=(2, 1, 4), masked=True, weights='examples')
    loss = loss_of(x, centers, labels, **options)
    flat = {name: option.reshape(8) for name, option in options.items()}
    np.testing.assert_allclose(loss, loss_of(x.reshape(8, 3), centers, labels.reshape(8), **flat))


def test_weights_multiply_the_squares_and_the_mean_divides_by_examples(worked_example):
    x, centers, labels = worked_example.x, worked_example.centers, worked_example.labels
    weights = np.array([1, 10, 100, 1000], np.float32)
    assert clj.center_loss(x, centers, labels, weights=weights) == (5 + 50 + 100 + 8000) / 4
    elements = np.array([[1, 2], [3, 4], [5, 6], [7, 8]], np.float32)
    per_example = clj.center_loss(x, centers, labels, weights=elements, reduce_fn=None)
    np.testing.assert_array_equal(per_example, [1 + 8, 3 + 16, 5 + 0, 28 + 32])


def test_doubled_weights_double_the_loss_and_zero_weights_still_count():
    x, centers, labels, options = make_problem(dtype=np.float32, weights='examples')
    weights = options['weights']
    loss = clj.center_loss(x, centers, labels, weights=weights)
    np.testing.assert_allclose(clj.center_loss(x, centers, labels, weights=2 * weights), 2 * loss, rtol=1e-6)
    weights[1:] = 0
    expected = weights[0] * ((x[0] - centers[labels[0]]) ** 2).sum() / 7
    np.testing.assert_allclose(clj.center_loss(x, centers, labels, weights=weights), expected, rtol=1e-6)


def test_reduce_fn_gets_every_example_and_zero_for_each_that_is_left_out():
    x, centers, labels, _ = make_problem(dtype=np.float32)
    where = np.arange(7) != 4
    labels[1] = -1
    seen = []

    def reduce_fn(per_example):
        seen.append(per_example)
        return jnp.mean(per_example)

    loss = clj.center_loss(x, centers, labels, where=where, reduce_fn=reduce_fn)
    expected = oracle.per_example(x, centers, labels, where=where)
    (per_example,) = seen
    np.testing.assert_allclose(per_example, expected, rtol=1e-6)
    np.testing.assert_array_equal(per_example[jnp.array([1, 4])], [0, 0])
    # Only jnp.mean itself leaves examples out of the denominator: another function sees the whole shape.
    np.testing.assert_allclose(loss, expected.sum() / 7, rtol=1e-6)


@pytest.mark.parametrize('bad', [5, 6, 2**31 - 1])
def test_inside_jit_a_label_out_of_range_is_nan_for_that_example_alone(bad):
    x, centers, labels, options = make_problem(dtype=np.float32, weights='elements')
    labels[3] = bad

    @jax.jit
    def evaluate(x, centers, weights, labels):
        def loss_fn(x, centers, weights, reduce_fn=jnp.sum):
            return clj.center_loss(x, centers, labels, weights=weights, reduce_fn=reduce_fn)

        arrays = x, centers, weights
        return loss_fn(*arrays, None), loss_fn(*arrays, jnp.mean), jax.grad(loss_fn, (0, 1, 2))(*arrays)

    per_example, mean, gradients = evaluate(x, centers, options['weights'], labels)
    assert np.isnan(mean)
    # Its gradient is that of an example that is left out. The oracle's mean is over the other six.
    labels[3] = -1
    expected = oracle.per_example(x, centers, labels, **options)
    expected[3] = np.nan
    np.testing.assert_allclose(per_example, expected, rtol=1e-5)
    for got, mean_gradient in zip(gradients, oracle.center_loss_gradients(x, centers, labels, **options), strict=True):
        np.testing.assert_allclose(got, 6 * mean_gradient, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(gradients[0][3], np.zeros(3))
    np.testing.assert_array_equal(gradients[2][3], np.zeros(3))


def test_vmap_over_examples_gives_the_loss_of_each():
    x, centers, labels, options = make_problem(dtype=np.float32, masked=True, weights='elements')
    labels[3], options['where'][3] = 5, True

    def one(x, label, where, weights):
        return clj.center_loss(x, centers, label, where=where, weights=weights)

    mapped = jax.jit(jax.vmap(one))(x, labels, options['where'], options['weights'])
    labels[3] = -1
    expected = oracle.per_example(x, centers, labels, **options)
    expected[3] = np.nan
    np.testing.assert_allclose(mapped, expected, rtol=1e-5)


def test_a_label_that_hits_a_pad_row_gives_a_loss_that_is_not_finite():
    x, centers, labels, _ = make_problem(dtype=np.float32)
    padded = np.concatenate([centers, np.full((3, 3), np.inf, np.float32)])
    labels[3] = 6
    per_example = clj.center_loss(x, padded, labels, reduce_fn=None)
    np.testing.assert_array_equal(np.isfinite(per_example), np.arange(7) != 3)
