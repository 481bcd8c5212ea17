"""XLA tactics, and the only file that has any: choices by platform, barriers, loops over rows, custom derivatives.

Each kernel equals the plain JAX in its docstring, which `tests/test_kernels.py` compares it with. They save memory
traffic. On a CPU a fresh `[N, D]` array costs more than its arithmetic, and XLA writes one for the operand of a scatter
of many rows. A scatter of one row is an update in place, so a CPU takes the rows of a batch in a loop. An accelerator
takes all rows at once. Without the loops a step of 16,384 examples takes 1.6 to 3.6 times as long on two CPU cores.

The rows of a class are summed before they are added to its center, since thousands of small moves added one by one
would each be rounded. N rows are `values` `[N, D]` times `scale` `[N]`, so that the gradient of the loss, the rows and
the move of the centers share one array. `index` int32 `[N]` is a row of the table or DROPPED.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from centerloss_jax._inputs import DROPPED
from centerloss_jax._sharding import add_rows, take_rows, vary_as

# Classes for each row up to which an accelerator counts them in arrays `[C]` in less time than it sorts the rows.
CLASSES_PER_ROW = 256


def by_platform(*args: Any, cpu: Callable, default: Callable) -> Any:
    """Returns cpu(*args) in a program for CPUs and default(*args) in one for another platform."""
    return jax.lax.platform_dependent(*args, cpu=cpu, default=default)


@jax.custom_jvp
@jax.jit
def mean_square(x: Array, own_center: Array, counted: Array, valid: Array, count: Array) -> tuple[Array, Array]:
    """Returns the mean of |x - c|^2 over the counted examples, and its gradient for x.

    difference = jnp.where(valid[..., None], x - own_center, 0)
    per_example = jnp.where(counted & ~valid, jnp.nan, jnp.sum(difference**2, axis=-1))
    return jnp.sum(per_example) / count, 2 * difference / count

    Autodiff would write a second array for the gradient. A barrier keeps a CPU's compiler from computing the gradient
    again for each use. Another lets an accelerator's compiler fuse the squares with the gradient. On two CPU cores that
    saves two fifths of a step of 16,384 examples.
    """
    mask, dtype = valid[..., None], count.dtype
    difference = jnp.where(mask, x.astype(dtype), 0) - jnp.where(mask, own_center.astype(dtype), 0)
    gradient = by_platform(difference * (2 / count), cpu=jax.lax.optimization_barrier, default=lambda a: a)
    squares = squared_norms(gradient, jnp.broadcast_to(-count / 2, valid.shape))
    per_example = jax.lax.optimization_barrier(squares)
    return jnp.sum(jnp.where(counted & ~valid, jnp.nan, per_example)) / count, gradient


@mean_square.defjvp
def _mean_square_jvp(primals, tangents):
    (_, _, _, valid, count), (x, own_center, _, _, _) = primals, tangents
    loss, gradient = mean_square(*primals)
    change = x.astype(count.dtype) - own_center.astype(count.dtype)
    return (loss, gradient), (jnp.sum(gradient * change), jnp.where(valid[..., None], change, 0) * (2 / count))


def squared_norms(values: Array, scale: Array) -> Array:
    """Returns |scale * values|^2 of each row. The loss and the update call it on one array; XLA computes it once."""
    return jnp.sum(jnp.square(scale[..., None] * values), axis=-1)


@functools.partial(jax.jit, static_argnames='num_classes')
def class_sizes(index: Array, num_classes: int | None) -> Array:
    """Returns the number of rows that have the index of each row, n_j, int32 `[N]`.

    jnp.sum(index[:, None] == index, axis=1)
    """
    return _sizes_and_first(index, num_classes)[0]


@functools.partial(jax.jit, static_argnames='num_classes')
def class_sums(index: Array, values: Array, scale: Array, num_classes: int) -> tuple[Array, Array]:
    """Returns each class, or DROPPED where it has no row, with the sum of its rows: `[C]` and `[C, D]`.

    sums = jax.ops.segment_sum(scale[:, None] * values, index, num_classes)
    return jnp.where(jnp.isin(jnp.arange(num_classes), index), jnp.arange(num_classes), DROPPED), sums
    """
    present = _counts_of_classes(index, num_classes) > 0
    unique = jnp.where(present, jnp.arange(num_classes, dtype=jnp.int32), DROPPED)
    return unique, _class_sums(index, values, scale, num_classes)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _class_sums(index: Array, values: Array, scale: Array, num_classes: int) -> Array:
    zeros = jnp.zeros((num_classes, values.shape[1]), values.dtype)
    # XLA would see that a table of one class is added to, and add each row to the table.
    return jax.lax.optimization_barrier(_add_scaled_rows(zeros, index, values, scale, unique=False))


@_class_sums.defjvp
def _class_sums_jvp(num_classes, primals, tangents):
    (index, values, scale), (_, values_dot, scale_dot) = primals, tangents
    rows_dot = scale[:, None] * values_dot + scale_dot[:, None] * values
    zeros = jnp.zeros((num_classes, values.shape[1]), values.dtype)
    return _class_sums(index, values, scale, num_classes), add_rows(zeros, index, rows_dot)


@jax.jit
def unique_sums(index: Array, values: Array, scale: Array) -> tuple[Array, Array]:
    """Returns each index once, then DROPPED, with the sum of its rows: `[N]` and `[N, D]`.

    unique = jnp.unique(index, size=N, fill_value=DROPPED)
    return unique, jax.ops.segment_sum(scale[:, None] * values, jnp.searchsorted(unique, index), N)
    """
    order, index, group = _sorted_groups(index)
    # A dropped row may hold a NaN.
    scaled = jnp.where((index < DROPPED)[:, None], scale[order][:, None] * take_rows(values, order), 0)
    hints: Any = {'mode': 'promise_in_bounds', 'indices_are_sorted': True}
    unique = jnp.full_like(index, DROPPED).at[group].set(index, **hints)
    return unique, jnp.zeros_like(scaled).at[group].add(scaled, **hints)


@jax.custom_jvp
@jax.jit
def add_class_sums(table: Array, index: Array, values: Array, scale: Array) -> Array:
    """Returns the table with the sum of the rows of each class added to its row, and rounded once.

    table.at[index].add(scale[:, None] * values, mode='drop')
    """
    num_classes = table.shape[0]
    if num_classes <= index.size:
        unique, sums = class_sums(index, values, scale, num_classes)
        return add_rows(table, unique, sums.astype(table.dtype), unique=True)
    repeated = class_sizes(index, num_classes) > 1
    table = _add_scaled_rows(table, jnp.where(repeated, DROPPED, index), values, scale, unique=True)
    return _add_repeated(table, index, values, scale, num_classes)[0]


@add_class_sums.defjvp
def _add_class_sums_jvp(primals, tangents):
    # All rows at once, since a loop of unknown length has no reverse.
    (_, index, values, scale), (table_dot, _, values_dot, scale_dot) = primals, tangents
    rows_dot = scale[:, None] * values_dot + scale_dot[:, None] * values
    return add_class_sums(*primals), add_rows(table_dot, index, rows_dot.astype(table_dot.dtype))


@functools.partial(jax.jit, static_argnames='num_classes')
def squared_norm_of_sums(index: Array, values: Array, scale: Array, norms: Array, num_classes: int | None) -> Array:
    """Returns the squared norm of what `add_class_sums` adds. norms `[N]` are `squared_norms(values, scale)`.

    jnp.sum(unique_sums(index, values, scale)[1] ** 2)
    """
    if index.size == 0:
        return jnp.zeros([], values.dtype)
    sizes = class_sizes(index, num_classes)
    of_single_rows = jnp.sum(jnp.where((sizes == 1) & (index < DROPPED), norms, 0))
    scratch = jnp.zeros((1, values.shape[1]), values.dtype)
    return of_single_rows + _add_repeated(scratch, index, values, scale, num_classes)[1]


def _add_scaled_rows(table: Array, index: Array, values: Array, scale: Array, unique: bool) -> Array:
    """Returns table.at[index].add(scale[:, None] * values, mode='drop'), rounded at each addition."""

    def in_turn(table, index, values, scale):
        def add_row(k, table):
            return add_rows(table, index[k], (scale[k] * values[k]).astype(table.dtype))

        return jax.lax.fori_loop(0, index.size, add_row, vary_as(table, index, values, scale))

    def at_once(table, index, values, scale):
        # Without the barrier XLA computes both again for each number of a row.
        index, scale = jax.lax.optimization_barrier((index, scale))
        return add_rows(table, index, (scale[:, None] * values).astype(table.dtype), unique)

    return by_platform(table, index, values, scale, cpu=in_turn, default=at_once)


def _add_repeated(table: Array, index: Array, values: Array, scale: Array, num_classes: int | None):
    """Returns the table with the sums of the rows whose index is repeated, and the squared norm of these sums."""
    at_once = functools.partial(_add_repeated_at_once, num_classes=num_classes)
    return by_platform(table, index, values, scale, cpu=_add_repeated_in_turn, default=at_once)


def _add_repeated_in_turn(table: Array, index: Array, values: Array, scale: Array) -> tuple[Array, Array]:
    """Sums row by row, in the order in which the rows of a class are neighbours. No array grows with N * D."""
    order, index, group = _sorted_groups(index)
    repeated = (_group_sizes(group)[group] > 1) & (index < DROPPED)
    slot = jnp.where(repeated, jnp.cumsum(repeated, dtype=jnp.int32) - 1, DROPPED)
    order = jnp.zeros_like(order).at[slot].set(order, mode='drop')
    index = jnp.full_like(index, DROPPED).at[slot].set(index, mode='drop')
    last = index != jnp.append(index[1:], DROPPED)

    def add_row(k, carry):
        table, squares, total = carry
        total += scale[order[k]] * values[order[k]]
        table = add_rows(table, jnp.where(last[k], index[k], DROPPED), total.astype(table.dtype))
        return table, squares + jnp.where(last[k], jnp.square(total), 0), jnp.where(last[k], 0, total)

    zeros = jnp.zeros(values.shape[1], values.dtype)
    carry = tuple(vary_as(a, index, values, scale) for a in (table, zeros, zeros))
    table, squares, _ = jax.lax.fori_loop(0, max_over_vmapped_axis(jnp.sum(repeated, dtype=jnp.int32)), add_row, carry)
    return table, jnp.sum(squares)


def _add_repeated_at_once(table: Array, index: Array, values: Array, scale: Array, num_classes: int | None):
    """Sums in an array of N/2 rows, as many as can be repeated."""
    length = max(1, index.size // 2)
    sizes, first = _sizes_and_first(index, num_classes)
    repeated = (sizes > 1) & (index < DROPPED)
    number = jnp.cumsum(repeated & (first == jnp.arange(index.size)), dtype=jnp.int32) - 1
    slot, scale = jax.lax.optimization_barrier((jnp.where(repeated, number[first], length), scale))
    unique = jnp.full(length, DROPPED, index.dtype).at[slot].set(index, mode='drop')
    sums = jnp.zeros((length, values.shape[1]), values.dtype).at[slot].add(scale[:, None] * values, mode='drop')
    return add_rows(table, unique, sums.astype(table.dtype), unique=True), jnp.sum(jnp.square(sums))


def _sizes_and_first(index: Array, num_classes: int | None) -> tuple[Array, Array]:
    """Returns for each row the number of rows with its index and the first of them, int32 `[N]`; not for DROPPED."""
    if num_classes is not None and num_classes <= index.size:
        return _count_in_arrays(index, num_classes)
    if num_classes is None or num_classes > CLASSES_PER_ROW * index.size:
        return _count_by_sorting(index)
    in_arrays = functools.partial(_count_in_arrays, num_classes=num_classes)
    return by_platform(index, cpu=_count_by_sorting, default=in_arrays)


def _count_in_arrays(index: Array, num_classes: int) -> tuple[Array, Array]:
    rows = jnp.arange(index.size, dtype=jnp.int32)
    first = jnp.full(num_classes, DROPPED, jnp.int32).at[index].min(rows, mode='drop')
    hints: Any = {'mode': 'fill', 'fill_value': 0}
    return _counts_of_classes(index, num_classes).at[index].get(**hints), first.at[index].get(**hints)


def _counts_of_classes(index: Array, num_classes: int) -> Array:
    return jnp.zeros(num_classes, jnp.int32).at[index].add(1, mode='drop')


def _count_by_sorting(index: Array) -> tuple[Array, Array]:
    order, _, group = _sorted_groups(index)
    first = jnp.full_like(group, DROPPED).at[group].min(order, mode='promise_in_bounds')
    back: Any = {'unique_indices': True, 'mode': 'promise_in_bounds'}
    zeros = jnp.zeros_like(group)
    return zeros.at[order].set(_group_sizes(group)[group], **back), zeros.at[order].set(first[group], **back)


def _sorted_groups(index: Array) -> tuple[Array, Array, Array]:
    """Returns the order that sorts the rows by index, the sorted index, and the number of each row's group in it."""
    order = jnp.argsort(index).astype(jnp.int32)
    index = index[order]
    starts = jnp.concatenate([jnp.ones(min(1, index.size), bool), index[1:] != index[:-1]])
    return order, index, jnp.cumsum(starts, dtype=jnp.int32) - 1


def _group_sizes(group: Array) -> Array:
    return jnp.zeros_like(group).at[group].add(1, mode='promise_in_bounds')


@jax.custom_batching.custom_vmap
def max_over_vmapped_axis(number: Array) -> Array:
    """Returns `number`, reduced by max over a vmapped axis.

    A loop of as many steps for each table is then one loop. With a length for each, vmap would copy every table in
    every step of the loop.
    """
    return number


@max_over_vmapped_axis.def_vmap
def _max_over_vmapped_axis(axis_size, in_batched, number):
    del axis_size, in_batched
    return max_over_vmapped_axis(jnp.max(number)), False
