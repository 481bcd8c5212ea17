"""The networks and their pooling, beside that of Flax."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from experiments.launch.flags import NETWORKS
from experiments.train.model import TRUNKS, max_pool


@pytest.mark.parametrize('shape', [(2, 4, 6, 3), (2, 5, 6, 3), (2, 4, 7, 3), (2, 5, 7, 3), (2, 1, 4, 3)])
def test_max_pool_returns_the_values_of_flax(shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    np.testing.assert_array_equal(max_pool(x), nn.max_pool(x, (2, 2), (2, 2)))


def test_equal_maxima_share_the_gradient():
    x = np.array([[3, 3, 1, 2, 9], [0, 3, 4, 0, 9], [9, 9, 9, 9, 9]], np.float32)
    gradient = jax.grad(lambda x: max_pool(x[None, :, :, None]).sum())(x)
    third = 1 / 3
    np.testing.assert_allclose(gradient, [[third, third, 0, 0, 0], [0, third, 1, 0, 0], [0, 0, 0, 0, 0]], rtol=1e-6)


def test_the_networks_of_the_flags_are_those_of_the_model():
    assert tuple(TRUNKS) == NETWORKS
