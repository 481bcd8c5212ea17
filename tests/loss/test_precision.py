"""Precision of the loss: large norms in float32, half precision, float64, and programs under jax_debug_nans."""

from functools import partial

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import centerloss_jax as clj
from tests.support import oracle
from tests.support.problems import make_problem
from tests.support.steps import move

loss_of = jax.jit(clj.center_loss, static_argnames='reduce_fn')
loss_and_gradient = jax.jit(jax.value_and_grad(clj.center_loss))
loss_and_gradients = jax.jit(jax.value_and_grad(clj.center_loss, (0, 1)))


def test_close_vectors_of_large_norm_keep_their_digits():
    a = np.float32(1e4) / np.sqrt(np.float32(2))
    x, centers = np.array([[a, a]]), np.array([[a + np.float32(0.01), a]])
    assert x.dtype == centers.dtype == np.float32
    loss, gradient = loss_and_gradient(x, centers, np.array([0]))
    np.testing.assert_allclose(loss, 9.5367e-05, rtol=1e-3)
    np.testing.assert_allclose(loss, oracle.center_loss(x, centers, [0]), rtol=1e-6)
    np.testing.assert_allclose(gradient, 2.0 * (x.astype(np.float64) - centers), rtol=1e-6)


@hypothesis.given(seed=st.integers(0, 2**32 - 1))
def test_large_norms_in_float32_where_the_expanded_square_is_nonsense(seed):
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(5, 8))
    centers *= 1e4 / np.linalg.norm(centers, axis=-1, keepdims=True)
    labels = rng.integers(0, 5, 16)
    offsets = rng.normal(size=(16, 8))
    offsets *= 1e-2 / np.linalg.norm(offsets, axis=-1, keepdims=True)
    x, centers = (centers[labels] + offsets).astype(np.float32), centers.astype(np.float32)

    exact = oracle.center_loss(x, centers, labels)
    for_x, for_centers, _ = oracle.center_loss_gradients(x, centers, labels)
    loss, gradients = loss_and_gradients(x, centers, labels)
    np.testing.assert_allclose(loss, exact, rtol=1e-5)
    np.testing.assert_allclose(gradients[0], for_x, rtol=1e-5)
    np.testing.assert_allclose(gradients[1], for_centers, rtol=1e-3, atol=1e-5 * np.abs(for_x).max())

    expanded = oracle.reference_loss(x, centers, labels, np.float32)
    assert abs(expanded - exact) > 0.99 * exact  # it has not one right digit


HALF = [jnp.bfloat16, jnp.float16]


@pytest.mark.parametrize('dtype', HALF, ids=['bfloat16', 'float16'])
def test_half_precision_accumulates_in_float32(dtype):
    x, centers = jnp.full((1, 512), 200, dtype), jnp.zeros((3, 512), dtype)
    loss, gradient = loss_and_gradient(x, centers, np.array([1]))
    chex.assert_type(loss, jnp.float32)
    assert loss == 2.048e7
    chex.assert_type(gradient, dtype)
    np.testing.assert_array_equal(gradient.astype(jnp.float32), np.full((1, 512), 400))


@pytest.mark.parametrize('reduce_fn', [jnp.mean, jnp.sum, None], ids=['mean', 'sum', 'none'])
@pytest.mark.parametrize(
    ('x_dtype', 'centers_dtype'),
    [
        (jnp.bfloat16, jnp.bfloat16),
        (jnp.float16, jnp.float16),
        (jnp.bfloat16, jnp.float32),
        (jnp.float32, jnp.float16),
        (jnp.float16, jnp.bfloat16),
    ],
)
def test_the_loss_of_narrow_inputs_is_float32(x_dtype, centers_dtype, reduce_fn):
    x, centers, labels, options = make_problem(dtype=np.float32, masked=True, weights='elements')
    x, centers = jnp.asarray(x, x_dtype), jnp.asarray(centers, centers_dtype)
    weights = jnp.asarray(options.pop('weights'), x_dtype)
    loss = loss_of(x, centers, labels, weights=weights, reduce_fn=reduce_fn, **options)
    chex.assert_type(loss, jnp.float32)
    expected = oracle.per_example(x, centers, labels, weights=weights, **options)
    if reduce_fn is jnp.mean:
        expected = oracle.center_loss(x, centers, labels, weights=weights, **options)
    elif reduce_fn is jnp.sum:
        expected = expected.sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_a_difference_may_be_beyond_the_range_of_float16():
    x, centers = jnp.full((1, 2), 6e4, jnp.float16), jnp.full((3, 2), -6e4, jnp.float16)
    np.testing.assert_allclose(loss_of(x, centers, np.array([2])), 2 * 1.2e5**2, rtol=1e-3)


@pytest.mark.parametrize('dtype', HALF, ids=['bfloat16', 'float16'])
def test_counts_more_examples_than_half_precision_can_count(dtype):
    x, centers, labels = jnp.ones((4099, 2), dtype), jnp.zeros((3, 2), dtype), np.arange(4099) % 3
    assert loss_of(x, centers, labels) == 2.0
    assert loss_of(x, centers, labels, reduce_fn=jnp.sum) == 8198.0


def test_one_float64_input_makes_the_loss_float64():
    x, centers, labels, _ = make_problem(dtype=np.float32)
    with jax.enable_x64(True):
        chex.assert_type(jax.eval_shape(clj.center_loss, x, centers, labels), jnp.float32)
        for arrays in ((x, centers.astype(np.float64)), (x.astype(np.float64), centers)):
            chex.assert_type(jax.eval_shape(clj.center_loss, *arrays, labels), jnp.float64)


@pytest.mark.parametrize('jit', [False, True], ids=['eager', 'jit'])
def test_a_program_without_nan_passes_under_debug_nans(jit):
    x, centers, labels, options = make_problem(dtype=np.float32, masked=True, weights='examples')
    # An example that where leaves out may have any label, that of a padding row too.
    options['where'][0], labels[0] = False, 77
    centers = np.concatenate([centers, np.full((3, 3), np.inf, np.float32)])
    for reduce_fn in (jnp.mean, jnp.sum):
        loss_fn = partial(clj.center_loss_and_rows, reduce_fn=reduce_fn)
        gradients = jax.value_and_grad(loss_fn, (0, 1), has_aux=True)
        with jax.debug_nans(True):
            (loss, _), for_both = (jax.jit(gradients) if jit else gradients)(x, centers, labels, **options)
        assert np.isfinite(loss)
        chex.assert_tree_all_finite(for_both)


def test_an_empty_mean_passes_under_debug_nans():
    with jax.debug_nans(True):
        loss, _ = jax.value_and_grad(clj.center_loss)(jnp.ones((4, 2)), jnp.ones((3, 2)), jnp.full(4, -1))
    assert loss == 0


# Outside of jit JAX checks each operation, so that reading a NaN at all is an error there.
@pytest.mark.parametrize(('content', 'jit'), [(np.nan, True), (np.inf, True), (np.inf, False)])
def test_an_example_left_out_that_is_not_finite_passes_under_debug_nans(content, jit):
    x, centers, labels, _ = make_problem(dtype=np.float32)
    x[2], labels[2] = content, -1
    with jax.debug_nans(True):
        gradients = loss_and_gradient if jit else jax.value_and_grad(clj.center_loss)
        loss, gradient = gradients(x, centers, labels)
    assert np.isfinite(loss)
    chex.assert_tree_all_finite(gradient)


@jax.jit
def alone_and_beside_rows(x, centers, labels):
    both, rows = clj.center_loss_and_rows(x, centers, labels)
    return clj.center_loss(x, centers, labels), both, rows.values


@pytest.mark.parametrize('size', [1, 5, 256])
@pytest.mark.parametrize('difference', [1e-17, -1e-17, 1e19, -1e19])
def test_squares_near_the_limits_of_float32_keep_their_digits(difference, size):
    x, centers = np.zeros((size, 2), np.float32), np.zeros((3, 2), np.float32)
    x[0, 0] = difference
    alone, both, values = alone_and_beside_rows(x, centers, np.ones(size, int))
    expected = np.float64(np.float32(difference)) ** 2 / size
    np.testing.assert_allclose([alone, both], [expected] * 2, rtol=1e-6)
    np.testing.assert_allclose(values[0], [-difference, 0], rtol=1e-6)


@pytest.mark.parametrize('jit', [False, True], ids=['eager', 'jit'])
def test_finite_inputs_pass_under_debug_infs(jit):
    x, centers, labels, options = make_problem(dtype=np.float32, masked=True, weights='examples')
    for function in (clj.center_loss, clj.center_loss_and_rows, clj.center_rows):
        with jax.debug_infs(True):
            result = (jax.jit(function) if jit else function)(x, centers, labels, **options)
        chex.assert_tree_all_finite(jax.tree.leaves(result))
    with jax.debug_infs(True):
        update = jax.jit(move) if jit else move
        moved, state = update(jnp.asarray(centers), clj.center_rows(x, centers, labels))
        assert clj.class_statistics(x, labels, 5).count.sum() == np.sum(labels >= 0)
    chex.assert_tree_all_finite((moved, state.step_norm))
