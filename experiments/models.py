"""The networks: a trunk of convolutions, the features that the center loss sees, and a linear classifier on them.

The classifier has no bias and the features no activation behind them. So classes differ by direction alone under the
softmax, which is what makes the star of the paper's Fig. 2.
"""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

import centerloss_jax as clj


class Small(nn.Module):
    """Two convolutions and a hidden layer: small enough for a CPU, on which XLA's convolutions are slow."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for channels in (16, 32):
            x = nn.relu(nn.Conv(channels, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.relu(nn.Dense(128)(x.reshape(x.shape[0], -1)))


class LeNetPlusPlus(nn.Module):
    """The paper's LeNets++ (its Table 1): three stages of two 5 x 5 convolutions, PReLU, and max pooling."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for channels in (32, 64, 128):
            for _ in range(2):
                x = nn.PReLU(negative_slope_init=0.25)(nn.Conv(channels, (5, 5))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return x.reshape(x.shape[0], -1)


TRUNKS: dict[str, Callable[[], nn.Module]] = {'small': Small, 'lenets++': LeNetPlusPlus}


class Classifier(nn.Module):
    """A trunk, D features, C logits, and the center loss of the features where labels are given."""

    trunk: str
    feature_dim: int
    num_classes: int

    @nn.compact
    def __call__(self, images: Array, labels: Array | None = None, axis_name: str | None = None):
        """images `[B, H, W, K]` uint8, labels `[B]`: (features, logits), and with labels (.., center loss, rows)."""
        x = images.astype(jnp.float32) / 127.5 - 1
        features = nn.Dense(self.feature_dim, name='features')(TRUNKS[self.trunk]()(x))
        logits = nn.Dense(self.num_classes, use_bias=False, name='logits')(features)
        if labels is None:
            return features, logits
        center = clj.linen.CenterLoss(self.num_classes, name='center')
        return features, logits, *center(features, labels, axis_name=axis_name)
