"""Networks as users write them, for `--model tests.support.networks:NAME`."""

import jax.numpy as jnp
from flax import linen as nn


class Normalized(nn.Module):
    """A network with BatchNorm, dropout, and a collection that counts its training steps."""

    feature_dim: int

    @nn.compact
    def __call__(self, images, train: bool):
        steps = self.variable('counts', 'steps', lambda: jnp.zeros((), jnp.int32))
        if train and not self.is_initializing():
            steps.value += 1
        x = nn.Dense(16)(images.reshape(len(images), -1))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        return nn.Dense(self.feature_dim)(x)


class Wide(nn.Module):
    """A network whose features have one dimension too many."""

    feature_dim: int

    @nn.compact
    def __call__(self, images, train: bool):
        return nn.Dense(self.feature_dim + 1)(images.reshape(len(images), -1))


class Unruled(nn.Module):
    """A network whose dropout is left on in evaluation."""

    feature_dim: int

    @nn.compact
    def __call__(self, images, train: bool):
        x = nn.Dropout(0.5, deterministic=False)(images.reshape(len(images), -1))
        return nn.Dense(self.feature_dim)(x)


class Unnamed(nn.Module):
    """A network without feature_dim."""

    @nn.compact
    def __call__(self, images, train: bool):
        return nn.Dense(2)(images.reshape(len(images), -1))


def function(feature_dim: int):
    return Normalized(feature_dim)
