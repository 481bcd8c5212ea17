"""The networks: a convolutional trunk, a feature layer with the center loss, and a linear classifier.

The classifier has no bias and the features have no activation. So the softmax separates classes by direction alone,
as in the star of the paper's Fig. 2.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

import centerloss_jax as clj


def max_pool(x: Array) -> Array:
    """Returns `nn.max_pool(x, (2, 2), (2, 2))`, with the gradient shared by equal maxima.

    On CPUs a training step on MNIST takes a third less time than with `nn.max_pool`.

    Args:
        x: `[B, H, W, K]`. The last row or column of an odd size is left out.

    Returns:
        `[B, H // 2, W // 2, K]`.
    """
    batch, height, width, channels = x.shape
    height, width = height // 2, width // 2
    windows = x[:, : 2 * height, : 2 * width].reshape(batch, height, 2, width, 2, channels)
    return windows.max(axis=(2, 4))


class Stages(nn.Module):
    """Stages of two convolutions with PReLU, followed by max pooling, as in the paper."""

    channels: tuple[int, ...]
    width: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for channels in self.channels:
            for _ in range(2):
                x = nn.PReLU(negative_slope_init=0.25)(nn.Conv(channels, (self.width, self.width))(x))
            x = max_pool(x)
        return x.reshape(x.shape[0], -1)


class HiddenLayers(nn.Module):
    """Dense layers with PReLU, for examples that are no images."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x.reshape(len(x), -1)
        for width in self.widths:
            x = nn.PReLU(negative_slope_init=0.25)(nn.Dense(width)(x))
        return x


# LeNets++ is in the paper's Table 1. The small trunk is for CPUs, where XLA's convolutions are slow.
TRUNKS = {'small': ((32, 64), 3), 'lenets++': ((32, 64, 128), 5)}


# The small trunk for the arrays of a .npz file.
WIDTHS = (128, 128)


class Classifier(nn.Module):
    """A trunk, D features, C logits, and the center loss of the features if labels are given."""

    trunk: str | type[nn.Module]  # a name in TRUNKS, or a network of the user's that returns features
    feature_dim: int
    num_classes: int

    @nn.compact
    def __call__(self, images: Array, labels: Array | None = None, axis_name: str | None = None):
        """Returns (features, logits), and with labels also (center loss, rows).

        Args:
            images: `[B, H, W, K]` uint8, or standardized examples `[B, ...]` float32.
            labels: `[B]`, integers.
            axis_name: The mapped axis of the batch under pmap.
        """
        is_image = images.dtype == jnp.uint8
        x = images.astype(jnp.float32) / 127.5 - 1 if is_image else images
        if isinstance(self.trunk, str):
            trunk = Stages(*TRUNKS[self.trunk]) if is_image else HiddenLayers(WIDTHS)
            features = nn.Dense(self.feature_dim, name='features')(trunk(x))
        else:
            features = self._custom(x, train=labels is not None)
        logits = nn.Dense(self.num_classes, use_bias=False, name='logits')(features)
        if labels is None:
            return features, logits
        center = clj.linen.CenterLoss(self.num_classes, name='center')
        return features, logits, *center(features, labels, axis_name=axis_name)

    def _custom(self, x: Array, train: bool) -> Array:
        """Returns the features of a network of the user's, in float32."""
        build: Any = self.trunk
        features = build(feature_dim=self.feature_dim, name='network')(x, train=train)
        shape, wanted = getattr(features, 'shape', None), (len(x), self.feature_dim)
        if shape != wanted:
            raise ValueError(f'the features must have the shape {wanted}, got {shape or type(features).__name__}')
        return features.astype(jnp.float32)
