"""Rows of one class together: what Eq. 4 counts, and what is summed before it is rounded.

A group is the rows of one index, as neighbours in rows that are sorted by index.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array

from centerloss_jax._lookup import MISTAKE


def sort_rows(indices: Array) -> tuple[Array, Array]:
    """The order in which the rows of one index are neighbours, and the indices in it, in O(N log N)."""
    order = jnp.argsort(indices).astype(jnp.int32)
    return order, indices[order]


def group_numbers(indices: Array) -> Array:
    """int32 [N], the group of each of the sorted rows, from 0 upwards."""
    return jnp.cumsum(~_as_before(indices), dtype=jnp.int32) - 1


def sums_by_group(indices: Array, values: Array) -> tuple[Array, Array]:
    """The index of each group of the sorted rows, and the sum of its `values` [N, D].

    There are at most N groups, so both keep the length N. Beyond the last group the index is MISTAKE.
    """
    hints: Any = {'mode': 'promise_in_bounds', 'indices_are_sorted': True}
    group = group_numbers(indices)
    names = jnp.full_like(indices, MISTAKE).at[group].set(indices, **hints)
    return names, jnp.zeros_like(values).at[group].add(values, **hints)


def class_sizes(indices: Array, num_classes: int | None) -> Array:
    """int32 [N], the number of rows that have the index of each row; counted in O(N) where there are few classes."""
    if num_classes is not None and num_classes <= indices.size:
        counts = jnp.zeros(num_classes, jnp.int32).at[indices].add(1, mode='drop')
        return counts.at[indices].get(mode='fill', fill_value=0)
    order, indices = sort_rows(indices)
    group = group_numbers(indices)
    counts = jnp.zeros_like(group).at[group].add(1, mode='promise_in_bounds')
    return jnp.zeros_like(group).at[order].set(counts[group], unique_indices=True, mode='promise_in_bounds')


def repeated_rows(indices: Array, length: int) -> tuple[Array, Array, Array]:
    """The rows whose index another row has too: their places, their indices, and how many they are.

    The first two have this length, N or more; in front the rows of one index are neighbours, and beyond them the
    indices are MISTAKE.
    """
    order, indices = sort_rows(indices)
    before = _as_before(indices)
    repeated = (before | jnp.roll(before, -1)) & (indices < MISTAKE)
    front = jnp.cumsum(repeated, dtype=jnp.int32)
    place = jnp.where(repeated, front - 1, length)
    places = jnp.zeros(length, jnp.int32).at[place].set(order, mode='drop')
    return places, jnp.full(length, MISTAKE, jnp.int32).at[place].set(indices, mode='drop'), front[-1]


def _as_before(indices: Array) -> Array:
    """bool [N], whether an index is that of the row before it."""
    return jnp.concatenate([jnp.zeros(min(1, indices.size), bool), indices[1:] == indices[:-1]])
