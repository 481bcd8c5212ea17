"""The mean square and its gradient from one array."""

import jax
import jax.numpy as jnp
from jax import Array

from centerloss_jax._kernels import platform


@jax.custom_jvp
@jax.jit
def mean_square(x: Array, own_center: Array, counted: Array, valid: Array, count: Array) -> tuple[Array, Array]:
    """Returns the sum of |x - c|^2 over the counted examples, divided by count, and its gradient for x.

    difference = jnp.where(valid[..., None], x - own_center, 0)
    per_example = jnp.where(counted & ~valid, jnp.nan, jnp.sum(difference**2, axis=-1))
    return jnp.sum(per_example) / count, 2 * difference / count

    Autodiff would write a second array for the gradient. The barrier on `gradient` keeps a CPU's compiler from
    computing it again for each use. The barrier on `squares` lets an accelerator's compiler fuse them with the
    gradient. Together they save two fifths of a step of 16,384 examples on two CPU cores.
    """
    # The second mask makes it the transpose of the product in the jvp.
    gradient = jnp.where(valid[..., None], _gradient(x, own_center, valid, count), 0)
    gradient = platform.by_platform(gradient, cpu=jax.lax.optimization_barrier, default=lambda a: a)
    # The gradient times -count/2 is c - x, so one array serves loss, gradient and rows.
    squares = squared_norms(gradient, jnp.broadcast_to(-count / 2, valid.shape))
    per_example = jax.lax.optimization_barrier(squares)
    return jnp.sum(jnp.where(counted & ~valid, jnp.nan, per_example)) / count, gradient


@mean_square.defjvp
def _mean_square_jvp(primals, tangents):
    (x, own_center, _, valid, count), (x_dot, own_center_dot, _, _, _) = primals, tangents
    difference_dot = x_dot.astype(count.dtype) - own_center_dot.astype(count.dtype)
    difference_dot = jnp.where(valid[..., None], difference_dot, 0)
    # Its transpose is the first line of `mean_square`, so XLA computes the gradient once.
    loss_dot = jnp.sum(_gradient(x, own_center, valid, count) * difference_dot)
    return mean_square(*primals), (loss_dot, difference_dot * (2 / count))


def _gradient(x: Array, own_center: Array, valid: Array, count: Array) -> Array:
    """Returns 2 (x - c) / count. Both operands are masked, so that it is finite where an example is ignored."""
    mask, dtype = valid[..., None], count.dtype
    difference = jnp.where(mask, x.astype(dtype), 0) - jnp.where(mask, own_center.astype(dtype), 0)
    return difference * (2 / count)


def squared_norms(values: Array, scale: Array) -> Array:
    """Returns |scale * values|^2 of each row. The loss and the update call it on one array; XLA computes it once."""
    return jnp.sum(jnp.square(scale[..., None] * values), axis=-1)
