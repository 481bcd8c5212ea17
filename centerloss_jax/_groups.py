"""Rows of one class together: what Eq. 4 counts, and what is summed before it is rounded."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from centerloss_jax._lookup import MISTAKE
from centerloss_jax._mesh import take_rows

# Rows of which it is faster to compare all pairs than to sort them.
FEW = 256


def sort_rows(indices: Array) -> tuple[Array, Array]:
    """The order in which the rows of one index are neighbours, and the indices in it, in O(N log N)."""
    order = jnp.argsort(indices).astype(jnp.int32)
    return order, indices[order]


def sums_by_index(indices: Array, values: Array, scale: Array) -> tuple[Array, Array]:
    """Each index once, and beyond them MISTAKE, with the sum of its rows scale * values. They keep the length N."""
    order, indices = sort_rows(indices)
    # What stands for nothing is 0, whatever the values hold.
    scaled = jnp.where((indices < MISTAKE)[:, None], scale[order][:, None] * take_rows(values, order), 0)
    hints: Any = {'mode': 'promise_in_bounds', 'indices_are_sorted': True}
    group = jnp.cumsum(_starts(indices), dtype=jnp.int32) - 1
    names = jnp.full_like(indices, MISTAKE).at[group].set(indices, **hints)
    return names, jnp.zeros_like(scaled).at[group].add(scaled, **hints)


def sums_of_repeated(indices: Array, values: Array, scale: Array, num_classes: int | None) -> tuple[Array, Array]:
    """Each index of several rows with the sum of its rows scale * values; MISTAKE and 0 fill them up to N/2."""
    length = max(1, indices.size // 2)
    sizes, first = _sizes_and_first(indices, num_classes, values.size)
    repeated = (sizes > 1) & (indices < MISTAKE)
    number = jnp.cumsum(repeated & (first == jnp.arange(indices.size)), dtype=jnp.int32) - 1
    slots, scale = jax.lax.optimization_barrier((jnp.where(repeated, number[first], length), scale))
    names = jnp.full(length, MISTAKE, indices.dtype).at[slots].set(indices, mode='drop')
    totals = jnp.zeros((length, values.shape[1]), values.dtype)
    return names, totals.at[slots].add(scale[:, None] * values, mode='drop')


def class_sizes(indices: Array, num_classes: int | None, room: int) -> Array:
    """int32 [N], the number of rows that have the index of each row. `room`: how many numbers it may hold for that."""
    return _sizes_and_first(indices, num_classes, room)[0]


def _sizes_and_first(indices: Array, num_classes: int | None, room: int) -> tuple[Array, Array]:
    """int32 [N] twice: the number of rows that have the index of each row, and the first of them; MISTAKE apart."""
    if num_classes is not None and num_classes <= indices.size:
        return _by_class(indices, num_classes)
    by_any = _by_pairs if indices.size <= FEW else _by_neighbours
    if num_classes is None or 2 * num_classes > room:
        return by_any(indices)
    # To fill two arrays of all classes takes an accelerator less time than to sort.
    return jax.lax.platform_dependent(
        indices, cpu=by_any, default=functools.partial(_by_class, num_classes=num_classes)
    )


def _by_class(indices: Array, num_classes: int) -> tuple[Array, Array]:
    rows = jnp.arange(indices.size, dtype=jnp.int32)
    sizes = jnp.zeros(num_classes, jnp.int32).at[indices].add(1, mode='drop')
    first = jnp.full(num_classes, MISTAKE, jnp.int32).at[indices].min(rows, mode='drop')
    hints: Any = {'mode': 'fill', 'fill_value': 0}
    return sizes.at[indices].get(**hints), first.at[indices].get(**hints)


def _by_pairs(indices: Array) -> tuple[Array, Array]:
    rows = jnp.arange(indices.size, dtype=jnp.int32)
    same = indices[:, None] == indices
    return jnp.sum(same, axis=1, dtype=jnp.int32), jnp.min(jnp.where(same, rows, MISTAKE), axis=1, initial=MISTAKE)


def _by_neighbours(indices: Array) -> tuple[Array, Array]:
    order, indices = sort_rows(indices)
    starts = _starts(indices)
    group = jnp.cumsum(starts, dtype=jnp.int32) - 1
    sizes = jnp.zeros_like(group).at[group].add(1, mode='promise_in_bounds')
    first = jnp.zeros_like(group).at[jnp.where(starts, group, MISTAKE)].set(order, mode='drop')
    back: Any = {'unique_indices': True, 'mode': 'promise_in_bounds'}
    zeros = jnp.zeros_like(group)
    return zeros.at[order].set(sizes[group], **back), zeros.at[order].set(first[group], **back)


def _starts(indices: Array) -> Array:
    """bool [N], where the rows of another index begin in sorted indices."""
    return jnp.concatenate([jnp.ones(min(1, indices.size), bool), indices[1:] != indices[:-1]])
