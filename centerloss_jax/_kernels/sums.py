"""Sums of the rows of each class, returned or added to a table."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from centerloss_jax._inputs import DROPPED, at_most
from centerloss_jax._kernels import platform
from centerloss_jax._kernels.groups import (
    NARROW,
    ROWS_AT_A_TIME,
    class_sizes,
    counts_by_class,
    group_sizes,
    sizes_and_first,
    sorted_groups,
    sum_in_parts,
)
from centerloss_jax._kernels.platform import max_over_vmapped_axis
from centerloss_jax._sharding import add_rows, take_rows, vary_as


@functools.partial(jax.jit, static_argnames='num_classes')
def class_sums(index: Array, values: Array, scale: Array, num_classes: int) -> tuple[Array, Array]:
    """Returns each class, or DROPPED where it has no row, with the sum of its rows: `[C]` and `[C, D]`.

    sums = jax.ops.segment_sum(scale[:, None] * values, index, num_classes)
    return jnp.where(jnp.isin(jnp.arange(num_classes), index), jnp.arange(num_classes), DROPPED), sums
    """
    present = counts_by_class(index, num_classes) > 0
    unique = jnp.where(present, jnp.arange(num_classes, dtype=jnp.int32), DROPPED)
    return unique, _class_sums(index, values, scale, num_classes)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _class_sums(index: Array, values: Array, scale: Array, num_classes: int) -> Array:
    def sum_by(index, num_rows):
        zeros = jnp.zeros((num_rows, values.shape[1]), values.dtype)
        # Else XLA merges the later addition to a table of one class into this sum, and rounds at each row.
        return jax.lax.optimization_barrier(_add_scaled_rows(zeros, index, values, scale, unique=False))

    return sum_in_parts(sum_by, index, num_classes)


@_class_sums.defjvp
def _class_sums_jvp(num_classes, primals, tangents):
    # All rows at once, since the reverse of a loop would keep every step of it.
    (index, values, scale), (_, values_dot, scale_dot) = primals, tangents
    rows_dot = scale[:, None] * values_dot + scale_dot[:, None] * values
    zeros = jnp.zeros((num_classes, values.shape[1]), values.dtype)
    return _class_sums(index, values, scale, num_classes), add_rows(zeros, index, rows_dot)


@jax.custom_jvp
@jax.jit
def add_class_sums(table: Array, index: Array, values: Array, scale: Array) -> Array:
    """Returns the table with the sum of the rows of each class added to its row, which is rounded once.

    table.at[index].add(scale[:, None] * values, mode='drop')
    """
    num_classes = table.shape[0]
    if at_most(num_classes, index.size):
        unique, sums = class_sums(index, values, scale, num_classes)
        return add_rows(table, unique, sums.astype(table.dtype), unique=True)

    def narrow(table, index, values, scale):
        unique, sums = sums_in_first_rows(index, values, scale, num_classes)
        return add_rows(table, unique, sums.astype(table.dtype), unique=True)

    def wide(table, index, values, scale):
        repeated = class_sizes(index, num_classes, values.shape[1]) > 1
        table = _add_scaled_rows(table, jnp.where(repeated, DROPPED, index), values, scale, unique=True)
        return _add_repeated(table, index, values, scale, num_classes)[0]

    cpu = narrow if _is_narrow(values) else wide
    return platform.by_platform(table, index, values, scale, cpu=cpu, default=wide)


@add_class_sums.defjvp
def _add_class_sums_jvp(primals, tangents):
    # All rows at once, since a loop of unknown length has no reverse.
    (_, index, values, scale), (table_dot, _, values_dot, scale_dot) = primals, tangents
    rows_dot = scale[:, None] * values_dot + scale_dot[:, None] * values
    return add_class_sums(*primals), add_rows(table_dot, index, rows_dot.astype(table_dot.dtype))


@jax.jit
def unique_sums(index: Array, values: Array, scale: Array) -> tuple[Array, Array]:
    """Returns each index once, then DROPPED, with the sum of its rows: `[N]` and `[N, D]`.

    unique = jnp.unique(index, size=N, fill_value=DROPPED)
    return unique, jax.ops.segment_sum(scale[:, None] * values, jnp.searchsorted(unique, index), N)
    """
    order, index, group = sorted_groups(index)
    # A dropped row may hold a NaN.
    scaled = jnp.where((index < DROPPED)[:, None], scale[order][:, None] * take_rows(values, order), 0)
    hints: Any = {'mode': 'promise_in_bounds', 'indices_are_sorted': True}
    unique = jnp.full_like(index, DROPPED).at[group].set(index, **hints)
    return unique, jnp.zeros_like(scaled).at[group].add(scaled, **hints)


@functools.partial(jax.jit, static_argnames='num_classes')
def squared_norm_of_sums(index: Array, values: Array, scale: Array, norms: Array, num_classes: int | None) -> Array:
    """Returns the squared norm of what `add_class_sums` adds. norms `[N]` are `squared_norms(values, scale)`.

    jnp.sum(unique_sums(index, values, scale)[1] ** 2)
    """
    if index.size == 0:
        return jnp.zeros([], values.dtype)

    def narrow(index, values, scale, norms):
        del norms
        return jnp.sum(jnp.square(sums_in_first_rows(index, values, scale, num_classes)[1]))

    def wide(index, values, scale, norms):
        sizes = class_sizes(index, num_classes, values.shape[1])
        of_single_rows = jnp.sum(jnp.where((sizes == 1) & (index < DROPPED), norms, 0))
        scratch = jnp.zeros((1, values.shape[1]), values.dtype)
        return of_single_rows + _add_repeated(scratch, index, values, scale, num_classes)[1]

    cpu = narrow if _is_narrow(values) else wide
    return platform.by_platform(index, values, scale, norms, cpu=cpu, default=wide)


def _is_narrow(values: Array) -> bool:
    """Returns whether a CPU sums the rows in an array `[N, D]`; not for symbolic sizes.

    XLA compiles a loop to one function only if a step reads and writes less than 1 kB. In the loop over sorted rows it
    starts each operation by itself, and for few features that takes longer than the array.
    """
    return at_most(0, values.shape[0]) and at_most(values.shape[1], NARROW)


def sums_in_first_rows(index: Array, values: Array, scale: Array, num_classes: int | None) -> tuple[Array, Array]:
    """Returns each class and its sum in the place of its first row, DROPPED and 0 elsewhere: `[N]` and `[N, D]`.

    is_first = (jnp.argmax(index[:, None] == index, axis=1) == jnp.arange(N)) & (index < DROPPED)
    sums = jax.ops.segment_sum(scale[:, None] * values, index, num_classes)
    return jnp.where(is_first, index, DROPPED), jnp.where(is_first[:, None], sums.at[index].get(mode='fill'), 0)

    It needs no sort where classes are counted in arrays, and sums in half the time of `unique_sums` on two CPU cores.
    """
    _, first = sizes_and_first(index, num_classes, values.shape[1])
    first = jnp.where(index < DROPPED, first, DROPPED)
    unique = jnp.where(first == jnp.arange(index.size), index, DROPPED)
    return unique, _class_sums(first, values, scale, index.size)


def _add_scaled_rows(table: Array, index: Array, values: Array, scale: Array, unique: bool) -> Array:
    """Returns table.at[index].add(scale[:, None] * values, mode='drop'), rounded at each addition."""

    def in_turn(table, index, values, scale):
        def add_row(k, table):
            return add_rows(table, index[k], (scale[k] * values[k]).astype(table.dtype))

        return jax.lax.fori_loop(0, index.size, add_row, vary_as(table, index, values, scale))

    def at_once(table, index, values, scale):
        # Without the barrier XLA computes both again for each feature.
        index, scale = jax.lax.optimization_barrier((index, scale))
        return add_rows(table, index, (scale[:, None] * values).astype(table.dtype), unique)

    return platform.by_platform(table, index, values, scale, cpu=in_turn, default=at_once)


def _add_repeated(table: Array, index: Array, values: Array, scale: Array, num_classes: int | None):
    """Returns the table with the sums of the rows whose index is repeated, and the squared norm of these sums."""
    in_turn = functools.partial(_add_repeated_in_turn, num_classes=num_classes)
    at_once = functools.partial(_add_repeated_at_once, num_classes=num_classes)
    return platform.by_platform(table, index, values, scale, cpu=in_turn, default=at_once)


def _add_repeated_in_turn(table: Array, index: Array, values: Array, scale: Array, num_classes: int | None):
    """Sums row by row, in the order in which the rows of a class are neighbours. No array grows with N * D."""
    order, index, group = sorted_groups(index, num_classes)
    # Moves the repeated rows to the front.
    repeated = (group_sizes(group)[group] > 1) & (index < DROPPED)
    slot = jnp.where(repeated, jnp.cumsum(repeated, dtype=jnp.int32) - 1, DROPPED)
    order = jnp.zeros_like(order).at[slot].set(order, mode='drop')
    index = jnp.full_like(index, DROPPED).at[slot].set(index, mode='drop')
    unique = jnp.where(index != jnp.append(index[1:], DROPPED), index, DROPPED)  # in the last row of each class
    in_parts = not at_most(index.size, 2 * ROWS_AT_A_TIME)

    def add_row(k, carry):
        table, squares, total, *part = carry
        row, last = scale[order[k]] * values[order[k]], unique[k] < DROPPED
        if in_parts:
            flush = last | (k % ROWS_AT_A_TIME == 0)
            row, part = jnp.where(flush, part[0] + row, 0), [jnp.where(flush, 0, part[0] + row)]
        total += row
        of_class = jnp.where(last, total, 0)
        table = add_rows(table, unique[k], of_class.astype(table.dtype))
        return table, squares + jnp.square(of_class), jnp.where(last, 0, total), *part

    zeros = [jnp.zeros(values.shape[1], values.dtype)] * (3 if in_parts else 2)
    carry = tuple(vary_as(a, index, values, scale) for a in (table, *zeros))
    num_repeated = max_over_vmapped_axis(jnp.sum(repeated, dtype=jnp.int32))
    table, squares, *_ = jax.lax.fori_loop(0, num_repeated, add_row, carry)
    return table, jnp.sum(squares)


def _add_repeated_at_once(table: Array, index: Array, values: Array, scale: Array, num_classes: int | None):
    """Sums in an array of N/2 rows, since at most N/2 indices occur twice."""
    length = (index.size + 1) // 2
    sizes, first = sizes_and_first(index, num_classes, values.shape[1])
    repeated = (sizes > 1) & (index < DROPPED)
    number = jnp.cumsum(repeated & (first == jnp.arange(index.size)), dtype=jnp.int32) - 1
    slot = jnp.where(repeated, number[first], DROPPED)
    unique = jnp.full(length, DROPPED, index.dtype).at[slot].set(index, mode='drop')
    sums = _class_sums(slot, values, scale, length)
    return add_rows(table, unique, sums.astype(table.dtype), unique=True), jnp.sum(jnp.square(sums))
