"""The logits of three softmax losses over classes.

`logits` returns the logit of each row of a table, `[B, N]`. `own` returns the logit of each example's own class, `[B]`,
with its margin. A form of logits is a pytree of its numbers, so that they may be traced.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class InnerProduct(NamedTuple):
    """x.w"""

    def logits(self, x: Array, rows: Array) -> Array:
        return x @ rows.T

    def own(self, x: Array, row: Array) -> Array:
        return jnp.sum(x * row, axis=-1)


class Cosine(NamedTuple):
    """s cos(theta), and s (cos(theta + angular_margin) - additive_margin) for the own class.

    Where theta + angular_margin > pi it is s (cos(theta) - angular_margin sin(angular_margin) - additive_margin).
    """

    scale: Array
    angular_margin: Array
    additive_margin: Array

    def logits(self, x: Array, rows: Array) -> Array:
        return self.scale * (unit(x) @ unit(rows).T)

    def own(self, x: Array, row: Array) -> Array:
        return self.scale * self.own_cosine(unit(x), unit(row))

    def own_cosine(self, x: Array, row: Array) -> Array:
        cosine = jnp.sum(x * row, axis=-1)
        # |u - v| |u + v| / 2 keeps its digits and a bounded gradient at 0 and pi, where sqrt(1 - cosine^2) has neither.
        sine = norm(x - row) * norm(x + row) / 2
        sine = jnp.where(is_zero(x) | is_zero(row), 1, sine)
        cos_margin, sin_margin = jnp.cos(self.angular_margin), jnp.sin(self.angular_margin)
        moved = cosine * cos_margin - sine * sin_margin  # cos(theta + angular_margin)
        beyond = cosine - self.angular_margin * sin_margin
        return jnp.where(cosine < -cos_margin, beyond, moved) - self.additive_margin


class StraightThroughCosine(Cosine):
    """Logits with the values of Cosine. Their gradient ignores the margins."""

    def own_cosine(self, x: Array, row: Array) -> Array:
        cosine = jnp.sum(x * row, axis=-1)
        return cosine + jax.lax.stop_gradient(super().own_cosine(x, row) - cosine)


class SquaredDistance(NamedTuple):
    """-|x - w|^2 / T, and (1 + margin) times that for the own class."""

    temperature: Array
    margin: Array

    def logits(self, x: Array, rows: Array) -> Array:
        origin = middle(x)
        x, rows = x - origin, rows - origin
        product = jnp.dot(x, rows.T, precision=jax.lax.Precision.HIGHEST)
        squares = jnp.sum(jnp.square(x), axis=-1)[:, None] + jnp.sum(jnp.square(rows), axis=-1)[None]
        return (2 * product - squares) / self.temperature

    def own(self, x: Array, row: Array) -> Array:
        return -jnp.sum(jnp.square(x - row), axis=-1) / self.temperature * (1 + self.margin)


def unit(v: Array) -> Array:
    """Returns v / |v|, and 0 with the gradient 0 where v is 0. Divides by the largest number before it squares."""
    largest = jax.lax.stop_gradient(jnp.abs(v).max(axis=-1, keepdims=True))
    zero = largest == 0
    v = v / jnp.where(zero, 1, largest)
    squares = jnp.sum(jnp.square(v), axis=-1, keepdims=True)
    return jnp.where(zero, 0, v / jnp.sqrt(jnp.where(zero, 1, squares)))


def norm(v: Array) -> Array:
    """Returns |v|, with the gradient 0 where v is 0."""
    squares = jnp.sum(jnp.square(v), axis=-1)
    zero = squares == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, squares)))


def is_zero(v: Array) -> Array:
    return (v == 0).all(axis=-1)


def middle(x: Array) -> Array:
    """Returns the mean `[1, D]` of the examples, without those of zeros alone, as ignored ones are.

    A distance does not depend on the origin, but its rounding does.
    """
    count = jnp.maximum(jnp.sum(~is_zero(x), dtype=jnp.int32), 1).astype(x.dtype)
    return jax.lax.stop_gradient(jnp.sum(x, axis=0, keepdims=True) / count)
