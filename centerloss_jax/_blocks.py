"""Many rows a block at a time, in place: what a CPU wants, where a fresh [N, D] array costs more than its arithmetic.

An accelerator has memory at hand and fuses; a CPU faults in every page of a new array, and XLA writes one for each
operand of a scatter. A block of rows stays in its cache, and the loop over blocks needs no other memory.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from centerloss_jax._groups import group_rows
from centerloss_jax._lookup import MISTAKE
from centerloss_jax._mesh import add_rows, take_rows

# Rows of a block. At D = 512 it has 2 MB, the cache of a core.
BLOCK = 1024


def add_scaled_rows(table: Array, indices: Array, values: Array, scale: Array) -> Array:
    """table with scale * values added to its rows; rows beyond the table are dropped."""
    return jax.lax.platform_dependent(table, indices, values, scale, cpu=_add_in_blocks, default=_add_at_once)


def _add_at_once(table: Array, indices: Array, values: Array, scale: Array) -> Array:
    return add_rows(table, indices, (scale[:, None] * values).astype(table.dtype))


def _add_in_blocks(table: Array, indices: Array, values: Array, scale: Array) -> Array:
    size = min(BLOCK, indices.shape[0])

    def add_block(i, table):
        # The last block starts early enough to be whole; what it meets again is dropped.
        start = jnp.minimum(i * size, indices.shape[0] - size)
        block = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size)
        again = start + jnp.arange(size) < i * size
        # Rows of a class are summed first: thousands of small moves added one by one to a center would be rounded each.
        groups = group_rows(jnp.where(again, MISTAKE, block(indices)))
        return add_rows(table, groups.indices, groups.sum(block(scale)[:, None] * block(values)).astype(table.dtype))

    # The first block stands before the loop, whose carry then varies over the devices of a shard_map as the rows do.
    return jax.lax.fori_loop(1, -(-indices.shape[0] // size), add_block, add_block(0, table))


def squared_norm_of_sums(order: Array, group: Array, values: Array, scale: Array) -> Array:
    """The sum over groups of |sum of the group's scale * values|^2; rows whose scale is 0 do not count.

    `order` [N] sorts the rows by `group` [N]. A group may go on in the next block: then |a + b|^2 adds 2 a.b.
    """
    size = min(BLOCK, order.shape[0])
    missing = -order.shape[0] % size
    group = jnp.pad(group[order], (0, missing), mode='edge')
    scale = jnp.pad(scale[order], (0, missing))
    order = jnp.pad(order, (0, missing))

    def add_block(i, so_far):
        total, last, last_group = so_far
        block = partial(jax.lax.dynamic_slice_in_dim, start_index=i * size, slice_size=size)
        of_row, factor = block(group), block(scale)[:, None]
        moves = jnp.where(factor == 0, 0, factor * take_rows(values, block(order)))
        sums = jnp.zeros_like(moves).at[of_row - of_row[0]].add(moves, mode='promise_in_bounds')
        before = jnp.where(of_row[0] == last_group, last, 0)
        total += jnp.sum(jnp.square(sums)) + 2 * jnp.sum(before * sums[0])
        return total, sums.at[0].add(before)[of_row[-1] - of_row[0]], of_row[-1]

    # Of no rows, and so varying over the devices of a shard_map as the rows do.
    begun = jnp.sum(values[:0]), jnp.sum(values[:0], axis=0), jnp.min(group[:0], initial=-1)
    return jax.lax.fori_loop(0, order.shape[0] // size, add_block, begun)[0]
