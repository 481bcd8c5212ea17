"""Rows of one class together: what Eq. 4 counts, and what is summed before it is rounded."""

import dataclasses

import jax.numpy as jnp
from jax import Array

from centerloss_jax._lookup import MISTAKE


@dataclasses.dataclass(frozen=True)
class Groups:
    """N rows grouped by their index. There are at most N groups, so all arrays keep the length N."""

    order: Array  # int32 [N], the rows, group by group
    indices: Array  # int32 [N], the index of each group, ascending; beyond the last group MISTAKE
    group: Array  # int32 [N], the group of each row
    size: Array  # int32 [N], the number of rows in each group

    def sum(self, values: Array) -> Array:
        return jnp.zeros_like(values).at[self.group].add(values, mode='promise_in_bounds')


def group_rows(indices: Array) -> Groups:
    """Groups rows by index in O(N log N), without an array of the table's length."""
    order = jnp.argsort(indices)
    ordered = indices[order]
    first = jnp.concatenate([jnp.ones(min(1, ordered.size), bool), ordered[1:] != ordered[:-1]])
    group = jnp.cumsum(first, dtype=jnp.int32) - 1
    of_row = jnp.zeros_like(group).at[order].set(group, unique_indices=True)
    return Groups(
        order=order,
        indices=jnp.full_like(indices, MISTAKE).at[group].set(ordered),
        group=of_row,
        size=jnp.zeros_like(group).at[of_row].add(1),
    )
