"""Many rows a block at a time, in place: what a CPU wants, where a fresh [N, D] array costs more than its arithmetic.

An accelerator has memory at hand and fuses; a CPU faults in every page of a new array, and XLA writes one for each
operand of a scatter. A block of rows stays in its cache, and the loop over blocks needs no other memory.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from centerloss_jax._groups import Groups, as_before, group_rows, neighbours
from centerloss_jax._lookup import MISTAKE
from centerloss_jax._mesh import add_rows, take_rows, vary_as

# Numbers in a block: 256 KB of float32, a part of a core's cache.
BLOCK = 2**16


def sums_by_index(indices: Array, values: Array, scale: Array) -> tuple[Array, Array]:
    """Each index once, and beyond them MISTAKE, with the sum of its rows scale * values. They keep the length N."""
    return _Rows.by_index(indices, values, scale).sums()


def add_scaled_rows(table: Array, indices: Array, values: Array, scale: Array) -> Array:
    """table with scale * values added to its rows; those beyond the table are dropped.

    The rows of one index are summed before they are added: thousands of small moves that are added to a center one by
    one would each be rounded.
    """
    if table.shape[0] <= indices.size:
        sums = _sums(indices, values, scale, table.shape[0])
        return add_rows(table, jnp.arange(table.shape[0], dtype=jnp.int32), sums.astype(table.dtype))
    rows = _Rows.repeated_first(indices, values, scale).in_whole_blocks()
    table = vary_as(table, values)
    singles = rows.num_blocks_with_repeated()
    table = jax.lax.fori_loop(0, singles, lambda i, table: _add_sums(table, rows.block(i)), table)
    return jax.lax.fori_loop(singles, rows.num_blocks(), lambda i, table: _add(table, rows.block(i)), table)


def squared_norm(indices: Array, values: Array, scale: Array, squares: Array, num_classes: int | None) -> Array:
    """The sum over classes of |the sum of their rows scale * values|^2.

    squares [N] are |scale * values|^2, which is all that it takes of a row whose index is not repeated.
    """
    if num_classes is not None and num_classes <= indices.size:
        return jnp.sum(jnp.square(_sums(indices, values, scale, num_classes)))
    rows = _Rows.repeated_first(indices, values, scale)
    repeated = rows.repeated()
    alone = jnp.sum(jnp.where(repeated | (rows.scale == 0), 0, squares[rows.order]))
    rows = rows._replace(scale=jnp.where(repeated, rows.scale, 0)).in_whole_blocks()

    def add_block(i, so_far):
        total, last, last_index = so_far
        block = rows.block(i)
        group = block.groups().group
        _, sums = block.sums()
        # The first group may have begun in the block before: |a + b|^2 adds 2 a.b.
        before = jnp.where(block.indices[0] == last_index, last, 0)
        total += jnp.sum(jnp.square(sums)) + 2 * jnp.sum(before * sums[0])
        return total, sums[group[-1]] + jnp.where(group[-1] == 0, before, 0), block.indices[-1]

    begun = alone, vary_as(jnp.zeros(values.shape[1], values.dtype), values), vary_as(jnp.int32(-1), indices)
    return jax.lax.fori_loop(0, rows.num_blocks_with_repeated(), add_block, begun)[0]


def _sums(indices: Array, values: Array, scale: Array, num_classes: int) -> Array:
    """[C, D], the sum of the rows of each class."""
    rows = _Rows(indices, jnp.arange(indices.size, dtype=jnp.int32), scale, values).in_whole_blocks()
    begun = vary_as(jnp.zeros((num_classes, values.shape[1]), values.dtype), values)
    return jax.lax.fori_loop(0, rows.num_blocks(), lambda i, sums: _add(sums, rows.block(i)), begun)


class _Rows(NamedTuple):
    """N rows, at least one: scale[k] * values[order[k]] for the row indices[k] of a table."""

    indices: Array  # int32 [N]; those beyond the table stand for nothing
    order: Array  # int32 [N]
    scale: Array  # [N]; where it is 0 the row is 0, whatever the values hold
    values: Array  # [M, D]

    @classmethod
    def by_index(cls, indices: Array, values: Array, scale: Array) -> '_Rows':
        """Rows of one index as neighbours."""
        order, indices, _ = group_rows(indices)
        return cls(indices, order, scale[order], values)

    @classmethod
    def repeated_first(cls, indices: Array, values: Array, scale: Array) -> '_Rows':
        """Rows of one index as neighbours, those that are repeated before those that are not."""
        rows = cls.by_index(indices, values, scale)
        repeated = rows.repeated()
        front = jnp.cumsum(repeated, dtype=jnp.int32)
        place = jnp.where(repeated, front - 1, front[-1] + jnp.arange(front.size, dtype=jnp.int32) - front)
        return rows.each(lambda a: jnp.zeros_like(a).at[place].set(a, unique_indices=True, mode='promise_in_bounds'))

    def in_whole_blocks(self) -> '_Rows':
        missing = -self.indices.size % self.block_size()
        padded = self.each(lambda a: jnp.pad(a, (0, missing)))
        return padded._replace(indices=jnp.pad(self.indices, (0, missing), constant_values=MISTAKE))

    def block(self, i: Array | int) -> '_Rows':
        size = self.block_size()
        return self.each(lambda a: jax.lax.dynamic_slice_in_dim(a, i * size, size))

    def block_size(self) -> int:
        return min(self.indices.size, max(1, BLOCK // self.values.shape[1]))

    def num_blocks(self) -> int:
        return self.indices.size // self.block_size()

    def num_blocks_with_repeated(self) -> Array:
        """The number of blocks up to the last that has repeated rows."""
        end = jnp.max(jnp.where(self.repeated(), jnp.arange(1, self.indices.size + 1, dtype=jnp.int32), 0))
        return -(-end // self.block_size())

    def repeated(self) -> Array:
        """bool [N], whether a neighbour has the same index."""
        before = as_before(self.indices)
        return (before | jnp.roll(before, -1)) & (self.indices < MISTAKE)

    def each(self, fn) -> '_Rows':
        return _Rows(fn(self.indices), fn(self.order), fn(self.scale), self.values)

    def rows(self) -> Array:
        scale = self.scale[:, None]
        return jnp.where(scale == 0, 0, scale * take_rows(self.values, self.order))

    def groups(self) -> Groups:
        return neighbours(self.order, self.indices)

    def sums(self) -> tuple[Array, Array]:
        return self.groups().sums(self.rows())


def _add(table: Array, rows: _Rows) -> Array:
    return add_rows(table, rows.indices, rows.rows().astype(table.dtype))


def _add_sums(table: Array, rows: _Rows) -> Array:
    indices, sums = rows.sums()
    return add_rows(table, indices, sums.astype(table.dtype))
