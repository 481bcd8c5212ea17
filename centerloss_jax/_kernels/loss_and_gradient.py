"""A loss and its gradient for the rows of a table, computed with the gradient for the features in one pass."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from centerloss_jax._sharding import vary_as


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def loss_and_gradient(
    loss_fn: Callable, class_axis: tuple[str, ...], rows: Array, inputs: Any, integers: Any
) -> tuple[Array, Array]:
    """Returns the loss and its gradient for the rows. The gradient carries no derivative itself.

    loss, gradient = jax.value_and_grad(loss_fn)(rows, inputs, integers)
    return loss, jax.lax.stop_gradient(gradient)

    Where that is differentiated for the features, which are among the inputs, autodiff runs a second backward pass
    beside this one, and keeps what the derivative of the gradient would need. Here one pass returns all gradients.

    The devices of class_axis, a mapped axis or none, have some of the rows each and compute one loss together. What
    JAX differentiates there is the sum of their equal losses.
    """
    loss, gradient = jax.value_and_grad(partial(_on_device, loss_fn))(rows, inputs, integers)
    return loss, gradient / jax.lax.axis_size(class_axis)


@partial(loss_and_gradient.defjvp, symbolic_zeros=True)
def _loss_and_gradient_jvp(loss_fn, class_axis, primals, tangents):
    rows, inputs, integers = primals
    leaves, treedef = jax.tree.flatten((rows, inputs))
    moving = {k: t for k, t in enumerate(jax.tree.leaves(tangents[:2])) if not isinstance(t, SymbolicZero)}

    def loss_of(some):
        rows, inputs = treedef.unflatten([some.get(k, leaf) for k, leaf in enumerate(leaves)])
        return _on_device(loss_fn, rows, inputs, integers)

    loss, gradients = jax.value_and_grad(loss_of)({k: leaves[k] for k in {0, *moving}})
    gradients = {k: gradient / jax.lax.axis_size(class_axis) for k, gradient in gradients.items()}
    loss_dot = sum(jnp.sum(gradients[k] * t) for k, t in moving.items()) + jnp.zeros_like(loss)
    loss_dot = vary_as(jax.lax.psum(loss_dot, class_axis), loss)
    return (loss, gradients[0]), (loss_dot, jnp.zeros_like(gradients[0]))


def _on_device(loss_fn: Callable, rows: Array, inputs: Any, integers: Any) -> Array:
    """Returns the loss as this device's own, which shard_map's check tells from one loss of all devices."""
    return vary_as(loss_fn(rows, inputs, integers), rows)
