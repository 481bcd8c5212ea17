"""center_loss with axis_name: the answer of one device, when devices count different numbers of examples."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import centerloss_jax as clj
from tests.support import oracle
from tests.support.problems import make_problem


def data_parallel_step(batch, replicated):
    """Loss and gradients of the replicated arrays, reduced as the documentation says: inside, and after."""
    x, labels, where = batch

    def loss_fn(replicated):
        centers, scale = replicated
        loss = clj.center_loss(scale * x, centers, labels, where=where, axis_name='batch')
        return jax.lax.pmean(loss, 'batch')

    loss, gradients = jax.value_and_grad(loss_fn)(replicated)
    return loss, jax.lax.pmean(gradients, 'batch')


@pytest.mark.parametrize('by', ['label', 'where'])
def test_devices_that_count_different_numbers_agree_with_one_device(per_device, by):
    # Squared distances [1, 1] on one device, [4, left out] on the other: the mean of the means would be 2.5.
    x = np.array([[[2, 1], [1, 2]], [[3, 1], [50, 60]]], np.float32)
    centers = np.array([[1, 1], [9, 9], [7, 7]], np.float32)
    labels, where = np.zeros((2, 2), np.int32), np.ones((2, 2), bool)
    if by == 'label':
        labels[1, 1] = -1
    else:
        where[1, 1] = False

    loss, (for_centers, _) = per_device(data_parallel_step, (x, labels, where), (centers, np.float32(1)))
    np.testing.assert_allclose(loss, [2, 2], rtol=1e-6)
    _, expected, _ = oracle.center_loss_gradients(x.reshape(4, 2), centers, labels.reshape(4), where=where.reshape(4))
    for device in range(2):
        np.testing.assert_allclose(for_centers[device], expected, rtol=1e-6)


@pytest.mark.parametrize('fewest', [False, True], ids=['one device counts nothing', 'one example in all'])
def test_some_devices_may_count_nothing(per_device, fewest):
    x, centers, labels, options = make_problem(leading=(4, 6), dtype=np.float32, masked=True)
    where, scale = options['where'], np.float32(1.5)
    if fewest:
        # Fewer examples than devices: the mean count is below one.
        where[:], labels[1, 2], where[1, 2] = False, 3, True
    else:
        where[2] = False
    loss, gradients = per_device(data_parallel_step, (x, labels, where), (centers, scale))

    def one_device(replicated):
        centers, scale = replicated
        return clj.center_loss(scale * x.reshape(24, 3), centers, labels.reshape(24), where=where.reshape(24))

    expected, expected_gradients = jax.value_and_grad(one_device)((centers, scale))
    for device in range(4):
        np.testing.assert_allclose(loss[device], expected, rtol=1e-5)
        got = jax.tree.map(lambda a, device=device: a[device], gradients)
        chex.assert_trees_all_close(got, expected_gradients, rtol=1e-5, atol=1e-6)


def test_nothing_counted_on_any_device_is_zero(per_device):
    batch = (np.ones((2, 3, 2), np.float32), np.full((2, 3), -1, np.int32), np.ones((2, 3), bool))
    loss, gradients = per_device(data_parallel_step, batch, (np.ones((4, 2), np.float32), np.float32(1)))
    np.testing.assert_array_equal(loss, [0, 0])
    chex.assert_trees_all_equal(gradients, jax.tree.map(jnp.zeros_like, gradients))


def test_loss_and_rows_take_the_axis_too(per_device):
    x, centers, labels, options = make_problem(leading=(2, 6), dtype=np.float32, masked=True)

    def both(batch, centers):
        x, labels, where = batch
        loss, _ = clj.center_loss_and_rows(x, centers, labels, where=where, axis_name='batch')
        return loss, clj.center_loss(x, centers, labels, where=where, axis_name='batch')

    from_both, alone = per_device(both, (x, labels, options['where']), centers)
    np.testing.assert_array_equal(from_both, alone)
    one_device = oracle.center_loss(x.reshape(12, 3), centers, labels.reshape(12), where=options['where'].reshape(12))
    np.testing.assert_allclose(np.mean(alone), one_device, rtol=1e-5)


@pytest.mark.parametrize('reduce_fn', [jnp.sum, None, lambda per_example: jnp.mean(per_example)])
@pytest.mark.parametrize('loss_fn', [clj.center_loss, clj.center_loss_and_rows])
def test_axis_name_needs_the_mean(worked_example, loss_fn, reduce_fn):
    with pytest.raises(ValueError, match=r'axis_name.*mean'):
        loss_fn(
            worked_example.x,
            worked_example.centers,
            worked_example.labels,
            reduce_fn=reduce_fn,
            axis_name='batch',
        )


@pytest.mark.parametrize('jit', [False, True], ids=['eager', 'jit'])
def test_an_axis_name_that_nothing_binds_is_an_error(worked_example, jit):
    loss_fn = partial(clj.center_loss, axis_name='btach')
    with pytest.raises((NameError, ValueError), match=r'axis_name.*btach'):
        (jax.jit(loss_fn) if jit else loss_fn)(worked_example.x, worked_example.centers, worked_example.labels)
