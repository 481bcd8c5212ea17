"""A loss and its gradient for the rows of a table, computed with the gradient for the features in one pass."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def loss_and_gradient(loss_fn: Callable, rows: Array, others: Any, index: Array) -> tuple[Array, Array]:
    """Returns the loss and its gradient for the rows. The gradient carries no derivative itself.

    loss, gradient = jax.value_and_grad(loss_fn)(rows, others, index)
    return loss, jax.lax.stop_gradient(gradient)

    Where that is differentiated for the features, which are among the others, autodiff runs a second backward pass
    beside this one, and keeps what the derivative of the gradient would need. Here one pass returns all gradients.
    """
    return jax.value_and_grad(loss_fn)(rows, others, index)


@partial(loss_and_gradient.defjvp, symbolic_zeros=True)
def _loss_and_gradient_jvp(loss_fn, primals, tangents):
    rows, others, index = primals
    inputs, treedef = jax.tree.flatten((rows, others))
    moving = {k: t for k, t in enumerate(jax.tree.leaves(tangents[:2])) if not isinstance(t, SymbolicZero)}

    def loss_of(some):
        return loss_fn(*treedef.unflatten([some.get(k, leaf) for k, leaf in enumerate(inputs)]), index)

    loss, gradients = jax.value_and_grad(loss_of)({k: inputs[k] for k in {0, *moving}})
    loss_dot = sum(jnp.sum(gradients[k] * t) for k, t in moving.items()) + jnp.zeros_like(loss)
    return (loss, gradients[0]), (loss_dot, jnp.zeros_like(gradients[0]))
