"""Rows added to a table one after the other, in place: what a CPU wants.

There a fresh [N, D] array costs more than its arithmetic, and XLA writes one for the operand of a scatter of many rows.
A scatter of one row is an update in place, and a loop over such needs no other memory. An accelerator scatters all rows
at once.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from centerloss_jax._groups import class_sizes, sort_rows
from centerloss_jax._lookup import MISTAKE
from centerloss_jax._mesh import add_rows, vary_as


@jax.custom_jvp
def add_scaled_rows(table: Array, indices: Array, values: Array, scale: Array) -> Array:
    """table with scale * values added to its rows; those beyond the table are dropped.

    The rows of one index are summed before they are added: thousands of small moves that are added to a center one by
    one would each be rounded.
    """
    num_classes = table.shape[0]
    if num_classes <= indices.size:
        sums = _sums_by_class(indices, values, scale, num_classes)
        return add_rows(table, jnp.arange(num_classes, dtype=jnp.int32), sums.astype(table.dtype))
    repeated = class_sizes(indices, num_classes) > 1
    table = _add_each(table, jnp.where(repeated, MISTAKE, indices), values, scale)
    return _over_sums(jnp.where(repeated, indices, MISTAKE), values, scale, _add, table)


@add_scaled_rows.defjvp
def _add_scaled_rows_jvp(primals, tangents):
    """At once, since a loop of unknown length has no reverse."""
    (_, indices, values, scale), (table, _, of_values, of_scale) = primals, tangents
    change = scale[:, None] * of_values + of_scale[:, None] * values
    return add_scaled_rows(*primals), add_rows(table, indices, change.astype(table.dtype))


def squared_norm(indices: Array, values: Array, scale: Array, squares: Array, num_classes: int | None) -> Array:
    """The sum over classes of |the sum of their rows scale * values|^2.

    squares [N] are |scale * values|^2, which is all that it takes of a row whose index is not repeated.
    """
    if num_classes is not None and num_classes <= indices.size:
        return jnp.sum(jnp.square(_sums_by_class(indices, values, scale, num_classes)))

    def add_square(so_far, index, total):
        return so_far + jnp.where(index < MISTAKE, jnp.square(total), 0)

    repeated = class_sizes(indices, num_classes) > 1
    alone = jnp.sum(jnp.where(repeated | (indices == MISTAKE), 0, squares))
    zeros = jnp.zeros(values.shape[1], values.dtype)
    return alone + jnp.sum(_over_sums(jnp.where(repeated, indices, MISTAKE), values, scale, add_square, zeros))


def _sums_by_class(indices: Array, values: Array, scale: Array, num_classes: int) -> Array:
    """[C, D], the sum of the rows of each class."""
    return _add_each(jnp.zeros((num_classes, values.shape[1]), values.dtype), indices, values, scale)


def _add_each(table: Array, indices: Array, values: Array, scale: Array) -> Array:
    def add_row(k, table):
        return _add(table, indices[k], scale[k] * values[k])

    return jax.lax.fori_loop(0, indices.size, add_row, vary_as(table, indices, values, scale))


def _over_sums(
    indices: Array, values: Array, scale: Array, fn: Callable[[Array, Array, Array], Array], state: Array
) -> Array:
    """state = fn(state, index, total) for each index but MISTAKE, `total` the sum of its rows.

    In between fn is called with MISTAKE as the index.
    """
    order, indices = sort_rows(indices)
    names = jnp.where(indices != jnp.append(indices[1:], MISTAKE), indices, MISTAKE)

    def add_row(k, carry):
        state, total = carry
        total += scale[order[k]] * values[order[k]]
        return fn(state, names[k], total), jnp.where(names[k] < MISTAKE, 0, total)

    begun = state, jnp.zeros(values.shape[1], values.dtype)
    begun = tuple(vary_as(a, indices, values, scale) for a in begun)
    return jax.lax.fori_loop(0, _largest(jnp.sum(indices < MISTAKE, dtype=jnp.int32)), add_row, begun)[0]


@jax.custom_batching.custom_vmap
def _largest(number: Array) -> Array:
    """The same; under vmap the largest of all, or each would copy its table in every turn of the loop."""
    return number


@_largest.def_vmap
def _largest_of_all(axis_size, in_batched, number):
    del axis_size, in_batched
    return _largest(jnp.max(number)), False


def _add(table: Array, index: Array, row: Array) -> Array:
    return add_rows(table, index, row.astype(table.dtype))
