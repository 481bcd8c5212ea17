"""Scaled rows scattered into a table, those of one class summed before they are added.

Thousands of small moves that are added to a center one by one would each be rounded.

A CPU takes the rows one after the other: a fresh [N, D] array costs more there than its arithmetic, and XLA writes one
for the operand of a scatter of many rows. A scatter of one row is an update in place, and a loop over such needs no
other memory. An accelerator takes them all at once.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from centerloss_jax._groups import class_sizes, sort_rows, sums_of_repeated
from centerloss_jax._lookup import MISTAKE
from centerloss_jax._mesh import add_rows, vary_as


@jax.custom_jvp
def add_scaled_rows(table: Array, indices: Array, values: Array, scale: Array) -> Array:
    """table with scale * values added to its rows; those beyond the table are dropped."""
    num_classes = table.shape[0]
    if num_classes <= indices.size:
        sums = _sums_by_class(indices, values, scale, num_classes)
        return _add(table, jnp.arange(num_classes, dtype=jnp.int32), sums)
    repeated = class_sizes(indices, num_classes, values.size) > 1
    table = _add_each(table, jnp.where(repeated, MISTAKE, indices), values, scale, unique=True)
    return _over_sums(indices, repeated, values, scale, num_classes, _add, table)


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

    def add_squares(so_far, index, total):
        del index
        return so_far + jnp.sum(jnp.square(total).reshape(-1, total.shape[-1]), axis=0)

    repeated = class_sizes(indices, num_classes, values.size) > 1
    alone = jnp.sum(jnp.where(repeated | (indices == MISTAKE), 0, squares))
    zeros = jnp.zeros(values.shape[1], values.dtype)
    return alone + jnp.sum(_over_sums(indices, repeated, values, scale, num_classes, add_squares, zeros))


def _sums_by_class(indices: Array, values: Array, scale: Array, num_classes: int) -> Array:
    """[C, D], the sum of the rows of each class.

    Without the barrier XLA would see that they are added to a table of one class, and add each row to that.
    """
    zeros = jnp.zeros((num_classes, values.shape[1]), values.dtype)
    return jax.lax.optimization_barrier(_add_each(zeros, indices, values, scale, unique=False))


def _add_each(table: Array, indices: Array, values: Array, scale: Array, unique: bool) -> Array:
    """table with scale * values added to its rows, and rounded each time."""

    def in_turn(table, indices, values, scale):
        def add_row(k, table):
            return _add(table, indices[k], scale[k] * values[k])

        return jax.lax.fori_loop(0, indices.size, add_row, vary_as(table, indices, values, scale))

    def at_once(table, indices, values, scale):
        # Else XLA computes them again for each number of a row.
        indices, scale = jax.lax.optimization_barrier((indices, scale))
        return _add(table, indices, scale[:, None] * values, unique)

    return jax.lax.platform_dependent(table, indices, values, scale, cpu=in_turn, default=at_once)


def _over_sums(
    indices: Array,
    repeated: Array,
    values: Array,
    scale: Array,
    num_classes: int | None,
    fn: Callable[[Array, Array, Array], Array],
    state: Array,
) -> Array:
    """state = fn(state, index, total) for each index that is repeated, `total` the sum of its rows.

    fn takes one index or many, and also MISTAKE with a total of 0.
    """

    def in_turn(indices, repeated, values, scale, state):
        order, indices = sort_rows(jnp.where(repeated, indices, MISTAKE))
        names = jnp.where(indices != jnp.append(indices[1:], MISTAKE), indices, MISTAKE)

        def add_row(k, carry):
            state, total = carry
            total += scale[order[k]] * values[order[k]]
            last = names[k] < MISTAKE
            return fn(state, names[k], jnp.where(last, total, 0)), jnp.where(last, 0, total)

        begun = state, jnp.zeros(values.shape[1], values.dtype)
        begun = tuple(vary_as(a, indices, values, scale) for a in begun)
        return jax.lax.fori_loop(0, _largest(jnp.sum(indices < MISTAKE, dtype=jnp.int32)), add_row, begun)[0]

    def at_once(indices, repeated, values, scale, state):
        del repeated
        return fn(state, *sums_of_repeated(indices, values, scale, num_classes))

    return jax.lax.platform_dependent(indices, repeated, values, scale, state, cpu=in_turn, default=at_once)


@jax.custom_batching.custom_vmap
def _largest(number: Array) -> Array:
    """The same; under vmap the largest of all, or each would copy its table in every turn of the loop."""
    return number


@_largest.def_vmap
def _largest_of_all(axis_size, in_batched, number):
    del axis_size, in_batched
    return _largest(jnp.max(number)), False


def _add(table: Array, indices: Array, rows: Array, unique: bool = True) -> Array:
    return add_rows(table, indices, rows.astype(table.dtype), unique)
