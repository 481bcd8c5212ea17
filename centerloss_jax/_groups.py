"""Rows of one class together: what Eq. 4 counts, and what is summed before it is rounded."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from centerloss_jax._lookup import MISTAKE


class Groups(NamedTuple):
    """N rows in an order in which those of one index, a group, are neighbours."""

    order: Array  # int32 [N], the rows, group by group
    indices: Array  # int32 [N], the index of each, in that order
    group: Array  # int32 [N], the group of each, in that order, from 0 upwards

    def sums(self, values: Array) -> tuple[Array, Array]:
        """The index of each group, and the sum of its rows of `values` [N, D], which are in this order.

        There are at most N groups, so both keep the length N. Beyond the last group the index is MISTAKE.
        """
        hints: Any = {'mode': 'promise_in_bounds', 'indices_are_sorted': True}
        indices = jnp.full_like(self.indices, MISTAKE).at[self.group].set(self.indices, **hints)
        return indices, jnp.zeros_like(values).at[self.group].add(values, **hints)


def group_rows(indices: Array) -> Groups:
    """Groups rows by index in O(N log N), without an array of the table's length."""
    order = jnp.argsort(indices).astype(jnp.int32)
    return neighbours(order, indices[order])


def class_sizes(indices: Array, num_classes: int | None) -> Array:
    """int32 [N], the number of rows that have the index of each row; counted in O(N) where there are few classes."""
    if num_classes is not None and num_classes <= indices.size:
        counts = jnp.zeros(num_classes, jnp.int32).at[indices].add(1, mode='drop')
        return counts.at[indices].get(mode='fill', fill_value=0)
    order, _, group = group_rows(indices)
    counts = jnp.zeros_like(group).at[group].add(1, mode='promise_in_bounds')
    return jnp.zeros_like(group).at[order].set(counts[group], unique_indices=True, mode='promise_in_bounds')


def neighbours(order: Array, indices: Array) -> Groups:
    """Groups rows that are in order already."""
    return Groups(order, indices, jnp.cumsum(~as_before(indices), dtype=jnp.int32) - 1)


def as_before(indices: Array) -> Array:
    """bool [N], whether an index is that of the row before it."""
    return jnp.concatenate([jnp.zeros(min(1, indices.size), bool), indices[1:] == indices[:-1]])
