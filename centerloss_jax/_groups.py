"""Rows of one class together: what Eq. 4 counts, and what is summed before it is rounded.

A group is the rows of one index, as neighbours in rows that are sorted by index.
"""

from typing import Any

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
    group = _group_numbers(indices)
    names = jnp.full_like(indices, MISTAKE).at[group].set(indices, **hints)
    return names, jnp.zeros_like(scaled).at[group].add(scaled, **hints)


def class_sizes(indices: Array, num_classes: int | None) -> Array:
    """int32 [N], the number of rows that have the index of each row."""
    if num_classes is not None and num_classes <= indices.size:
        counts = jnp.zeros(num_classes, jnp.int32).at[indices].add(1, mode='drop')
        return counts.at[indices].get(mode='fill', fill_value=0)
    if indices.size <= FEW:
        return jnp.sum(indices[:, None] == indices, axis=0, dtype=jnp.int32)
    order, indices = sort_rows(indices)
    group = _group_numbers(indices)
    counts = jnp.zeros_like(group).at[group].add(1, mode='promise_in_bounds')
    return jnp.zeros_like(group).at[order].set(counts[group], unique_indices=True, mode='promise_in_bounds')


def _group_numbers(indices: Array) -> Array:
    """int32 [N], the group of each of the sorted rows, from 0 upwards."""
    first = jnp.zeros(min(1, indices.size), bool)
    return jnp.cumsum(jnp.concatenate([first, indices[1:] != indices[:-1]]), dtype=jnp.int32)
