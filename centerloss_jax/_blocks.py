"""Many rows a block at a time, in place: what a CPU wants, where a fresh [N, D] array costs more than its arithmetic.

An accelerator has memory at hand and fuses; a CPU faults in every page of a new array, and XLA writes one for each
operand of a scatter. A block of rows stays in its cache, and the loop over blocks needs no other memory.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from centerloss_jax._groups import class_sizes, group_numbers, repeated_rows, sort_rows, sums_by_group
from centerloss_jax._lookup import MISTAKE
from centerloss_jax._mesh import add_rows, take_rows, vary_as

# Numbers in a block: 256 KB of float32, a part of a core's cache.
BLOCK = 2**16


def sums_by_index(indices: Array, values: Array, scale: Array) -> tuple[Array, Array]:
    """Each index once, and beyond them MISTAKE, with the sum of its rows scale * values. They keep the length N."""
    order, indices = sort_rows(indices)
    return sums_by_group(indices, _scaled(indices, take_rows(values, order), scale[order]))


def add_scaled_rows(table: Array, indices: Array, values: Array, scale: Array) -> Array:
    """table with scale * values added to its rows; those beyond the table are dropped.

    The rows of one index are summed before they are added: thousands of small moves that are added to a center one by
    one would each be rounded.
    """
    rows, num_classes = _Rows(indices, values, scale), table.shape[0]
    if num_classes <= indices.size:
        sums = _sums_by_class(rows, num_classes)
        return add_rows(table, jnp.arange(num_classes, dtype=jnp.int32), sums.astype(table.dtype))
    repeated = _Repeated.of(rows)
    table = rows.alone(num_classes).add_to(vary_as(table, values))
    return jax.lax.fori_loop(
        0, repeated.num_blocks(), lambda i, table: _add(table, *sums_by_group(*repeated.block(i))), table
    )


def squared_norm(indices: Array, values: Array, scale: Array, squares: Array, num_classes: int | None) -> Array:
    """The sum over classes of |the sum of their rows scale * values|^2.

    squares [N] are |scale * values|^2, which is all that it takes of a row whose index is not repeated.
    """
    rows = _Rows(indices, values, scale)
    if num_classes is not None and num_classes <= indices.size:
        return jnp.sum(jnp.square(_sums_by_class(rows, num_classes)))
    alone = rows.alone(num_classes).indices < MISTAKE
    repeated = _Repeated.of(rows)

    def add_block(i, so_far):
        total, last, last_index = so_far
        indices, values = repeated.block(i)
        end = group_numbers(indices)[-1]
        _, sums = sums_by_group(indices, values)
        # The first group may have begun in the block before: |a + b|^2 adds 2 a.b.
        before = jnp.where(indices[0] == last_index, last, 0)
        total += jnp.sum(jnp.square(sums)) + 2 * jnp.sum(before * sums[0])
        return total, sums[end] + jnp.where(end == 0, before, 0), indices[-1]

    begun = jnp.sum(jnp.where(alone, squares, 0)), jnp.zeros(values.shape[1], values.dtype), jnp.int32(-1)
    begun = tuple(vary_as(a, values) for a in begun)
    return jax.lax.fori_loop(0, repeated.num_blocks(), add_block, begun)[0]


class _Rows(NamedTuple):
    """N rows, at least one: scale[k] * values[k] for the row indices[k] of a table."""

    indices: Array  # int32 [N]; those beyond the table stand for nothing
    values: Array  # [N, D]
    scale: Array  # [N]

    def add_to(self, table: Array) -> Array:
        """The table with these rows added, a block after the other."""
        return jax.lax.fori_loop(0, self.num_blocks(), lambda i, table: _add(table, *self.block(i)), table)

    def alone(self, num_classes: int | None) -> '_Rows':
        """These rows, where those whose index another row has too stand for nothing."""
        return self._replace(indices=jnp.where(class_sizes(self.indices, num_classes) > 1, MISTAKE, self.indices))

    def block(self, i: Array) -> tuple[Array, Array]:
        size, num_rows = self.block_size(), self.indices.size
        # The last block begins where it still is a whole one; what was in the block before is dropped.
        start = jnp.minimum(i * size, num_rows - size)
        indices, values, scale = (jax.lax.dynamic_slice_in_dim(a, start, size) for a in self)
        new = start + jnp.arange(size, dtype=jnp.int32) >= i * size
        indices = jnp.where(new, indices, MISTAKE)
        return indices, scale[:, None] * values

    def block_size(self) -> int:
        return min(self.indices.size, max(1, BLOCK // self.values.shape[1]))

    def num_blocks(self) -> int:
        return -(-self.indices.size // self.block_size())


class _Repeated(NamedTuple):
    """Those of the rows whose index is that of another, the rows of one index as neighbours."""

    rows: _Rows
    places: Array  # int32 [M], where in `rows`
    indices: Array  # int32 [M]; MISTAKE beyond `number`
    number: Array  # int32 []

    @classmethod
    def of(cls, rows: _Rows) -> '_Repeated':
        return cls(rows, *repeated_rows(rows.indices, rows.num_blocks() * rows.block_size()))

    def block(self, i: Array) -> tuple[Array, Array]:
        size = self.rows.block_size()
        places, indices = (jax.lax.dynamic_slice_in_dim(a, i * size, size) for a in (self.places, self.indices))
        return indices, _scaled(indices, take_rows(self.rows.values, places), self.rows.scale[places])

    def num_blocks(self) -> Array:
        return -(-self.number // self.rows.block_size())


def _sums_by_class(rows: _Rows, num_classes: int) -> Array:
    """[C, D], the sum of the rows of each class."""
    width, dtype = rows.values.shape[1], rows.values.dtype
    return rows.add_to(vary_as(jnp.zeros((num_classes, width), dtype), rows.values))


def _scaled(indices: Array, values: Array, scale: Array) -> Array:
    """scale * values, and 0 where the index stands for nothing, whatever the values hold."""
    return jnp.where((indices < MISTAKE)[:, None], scale[:, None] * values, 0)


def _add(table: Array, indices: Array, values: Array) -> Array:
    return add_rows(table, indices, values.astype(table.dtype))
