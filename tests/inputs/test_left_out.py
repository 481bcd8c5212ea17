"""Examples that `where` or a negative label leaves out change no value and no gradient, whatever they hold."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import centerloss_jax as clj
from tests.support.cases import some_by_default
from tests.support.problems import make_problem


def test_the_mean_is_over_the_examples_with_a_label(worked_example):
    x, centers = worked_example.x, worked_example.centers
    labels = np.array([0, -1, 1, 0])
    loss, gradient = jax.value_and_grad(clj.center_loss)(x, centers, labels)
    np.testing.assert_allclose(loss, 14 / 3, rtol=1e-7)
    np.testing.assert_array_equal(gradient[1], [0, 0])
    moved = np.asarray(jnp.asarray(centers) + clj.center_rows(x, centers, labels))
    np.testing.assert_array_equal(moved, [[-3, -4], [2, 1], [2, 2]])


LEFT_OUT = {'by its label': (-1, True), 'by another negative label': (-100, True), 'by where': (2, False)}


def loss_of_both(x, centers, weights, labels, where, **options):
    loss, _ = clj.center_loss_and_rows(x, centers, labels, where=where, weights=weights, **options)
    return loss + clj.center_loss(x, centers, labels, where=where, weights=weights, **options)


gradients = jax.jit(jax.value_and_grad(loss_of_both, argnums=(0, 1, 2)), static_argnames='reduce_fn')


@pytest.mark.parametrize('reduce_fn', [jnp.mean, jnp.max], ids=['mean', 'max'])
@pytest.mark.parametrize(('label', 'counts'), LEFT_OUT.values(), ids=LEFT_OUT.keys())
@pytest.mark.parametrize('content', [np.nan, np.inf, 3e38])
def test_an_example_left_out_changes_no_value_and_no_gradient(content, label, counts, reduce_fn):
    x, centers, labels, options = make_problem(dtype=np.float32, weights='elements')
    where = np.ones(7, bool)
    kept = np.arange(7) != 3
    expected, expected_gradients = gradients(
        x[kept], centers, options['weights'][kept], labels[kept], where[kept], reduce_fn=reduce_fn
    )

    x[3], options['weights'][3], labels[3], where[3] = content, content, label, counts
    loss, (for_x, for_centers, for_weights) = gradients(
        x, centers, options['weights'], labels, where, reduce_fn=reduce_fn
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_array_equal(for_x[3], np.zeros(3))
    np.testing.assert_array_equal(for_weights[3], np.zeros(3))
    remaining = (for_x[kept], for_centers, for_weights[kept])
    chex.assert_trees_all_close(remaining, expected_gradients, rtol=1e-6)


@pytest.mark.parametrize('content', [np.nan, np.inf])
def test_a_center_without_counted_examples_may_hold_anything(content):
    x, centers, labels, _ = make_problem(dtype=np.float32)
    labels[labels == 1] = 0
    labels[[2, 5]] = 1
    where = labels != 1
    expected, expected_gradients = gradients(x, centers, None, labels, where, reduce_fn=jnp.mean)
    centers[1] = content
    loss, changed_gradients = gradients(x, centers, None, labels, where, reduce_fn=jnp.mean)
    assert loss == expected
    chex.assert_trees_all_equal(changed_gradients, expected_gradients)


NOTHING_COUNTED = {
    'negative labels': ((4,), np.full(4, -1), {}),
    'where': ((4,), np.array([0, 2, 1, 0]), {'where': np.zeros(4, bool)}),
    'both': ((4,), np.array([-1, 2, -1, 0]), {'where': np.array([True, False, True, False])}),
    'empty batch': ((0,), np.zeros(0, np.int32), {}),
    'empty sequences': ((3, 0), np.zeros((3, 0), np.int32), {'where': np.zeros((3, 0), bool)}),
    'empty and weighted': ((0,), np.zeros(0, np.int32), {'weights': np.zeros(0, np.float32)}),
    'a single example': ((), np.array(-1), {}),
}


@pytest.mark.parametrize(('leading', 'labels', 'options'), NOTHING_COUNTED.values(), ids=NOTHING_COUNTED.keys())
@pytest.mark.parametrize('jit', some_by_default({'eager': False, 'jit': True}, 'jit'))
def test_without_examples_the_loss_and_its_gradients_are_zero(leading, labels, options, jit):
    x, centers, *_ = make_problem(leading=leading, dtype=np.float32)
    of_loss = jax.value_and_grad(clj.center_loss, (0, 1))
    loss, (for_x, for_centers) = (jax.jit(of_loss) if jit else of_loss)(x, centers, labels, **options)
    assert loss == 0.0
    np.testing.assert_array_equal(for_x, np.zeros_like(x))
    np.testing.assert_array_equal(for_centers, np.zeros_like(centers))


def loss_alone(*arrays, **options):
    return clj.center_loss(*arrays, **options)


def loss_beside_rows(*arrays, **options):
    return clj.center_loss_and_rows(*arrays, **options)[0]


both_losses = pytest.mark.parametrize('loss', [loss_alone, loss_beside_rows])


@both_losses
def test_forward_mode_ignores_the_tangent_of_an_example_left_out(loss):
    x, tangent = jnp.array([[1.0, 2.0], [jnp.nan, 1.0]]), jnp.array([[1.0, 1.0], [jnp.nan, jnp.nan]])
    value, derivative = jax.jvp(lambda x: loss(x, jnp.zeros((3, 2)), np.array([0, -1])), (x,), (tangent,))
    assert (value, derivative) == (5, 6)


@both_losses
def test_forward_mode_ignores_the_tangent_of_a_center_without_examples(loss):
    # The example left out gathers row 0.
    centers = jnp.array([[jnp.nan, 0.0], [1.0, 2.0], [0.0, 0.0]])
    value, derivative = jax.jvp(lambda c: loss(jnp.ones((2, 2)), c, np.array([1, -1])), (centers,), (centers,))
    assert (value, derivative) == (1, 4)


MASKS = {
    'all counted': ([0, 2, 1, 0, 4, 4, 3], None),
    'negative labels': ([0, -1, 1, 0, -7, 4, 3], None),
    'where': ([0, 2, 1, 0, 4, 4, 3], [True, False, True, True, False, True, False]),
    'both': ([-1, 2, 1, 0, 4, -1, 3], [True, False, True, True, False, True, False]),
    'none counted': ([-1] * 7, None),
}


@jax.jit
def both_modes(x, centers, labels, where, weights, tangents):
    """Returns the derivative along the tangents for each loss and reduction, by forward and by reverse mode."""
    results = []
    for loss in (loss_alone, loss_beside_rows):
        for options in ({}, {'weights': weights}, {'reduce_fn': jnp.sum}):
            function = lambda x, c, loss=loss, options=options: loss(x, c, labels, where=where, **options)  # noqa: E731
            forward = jax.jvp(function, (x, centers), tangents)[1]
            gradients = jax.grad(function, (0, 1))(x, centers)
            # A gradient is 0 where it is masked; the tangent there is NaN.
            products = jax.tree.map(lambda g, t: jnp.sum(jnp.where(g == 0, 0, g * t)), gradients, tangents)
            results.append((forward, sum(products)))
    return results


@pytest.mark.parametrize(('labels', 'where'), MASKS.values(), ids=MASKS.keys())
def test_forward_mode_equals_reverse_mode_for_every_mask(labels, where):
    x, centers, _, options = make_problem(dtype=np.float32, weights='elements')
    rng, labels = np.random.default_rng(3), np.array(labels)
    counted = (labels >= 0) & (True if where is None else np.array(where))
    tangents = rng.normal(size=x.shape).astype(np.float32), rng.normal(size=centers.shape).astype(np.float32)
    tangents[0][~counted] = np.nan
    tangents[1][~np.isin(np.arange(5), labels[counted])] = np.nan
    where = np.ones(7, bool) if where is None else np.array(where)
    for forward, reverse in both_modes(x, centers, labels, where, options['weights'], tangents):
        np.testing.assert_allclose(forward, reverse, rtol=1e-5)
