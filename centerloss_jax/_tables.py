"""A table on a mesh: spread over its devices by rows, and back into the rows that are saved."""

import math
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.typing import ArrayLike

from centerloss_jax._lookup import check_table


def shard_centers(centers: ArrayLike, sharding: NamedSharding) -> Array:
    """Lays a table out over a mesh by rows, filled up to a number of rows that the mesh divides.

    A row that fills it up holds Inf. `nearest_center` never returns one, and a label that hits one is a mistake like
    any beyond the classes: the loss is NaN and the row is dropped and counted. To take such a table to fewer devices,
    go by way of `unshard_centers`: a step looks for these rows among the last ones, as many as there are devices.

    Args:
      centers: `[C, D]`, floating point.
      sharding: such as `NamedSharding(mesh, PartitionSpec('classes', None))`.

    Returns:
      `[C', D]` with that sharding, C' the least multiple of the number of shards from C on.

    Raises:
      TypeError: if centers are not floating point.
      ValueError: if they do not have two dimensions.

    Example:
      >>> import centerloss_jax as clj
      >>> import jax, jax.numpy as jnp
      >>> from jax.sharding import NamedSharding, PartitionSpec
      >>> mesh = jax.make_mesh((jax.device_count(),), ('classes',))
      >>> table = clj.shard_centers(jnp.zeros((10, 2)), NamedSharding(mesh, PartitionSpec('classes', None)))
      >>> table.shape[0] >= 10, clj.unshard_centers(table, num_classes=10).shape
      (True, (10, 2))
    """
    rows = np.asarray(jax.device_get(centers))
    rows = rows.astype(jax.eval_shape(check_table, rows).dtype, copy=False)  # checked where they are, on the host
    names = sharding.spec[0] if len(sharding.spec) else None
    names = (names,) if isinstance(names, str) else names or ()
    shards = math.prod(sharding.mesh.shape[name] for name in names)
    filled_up = len(rows) + -len(rows) % shards

    def part(index: Any) -> np.ndarray:
        own = rows[index]
        first, last, _ = index[0].indices(filled_up)
        return np.pad(own, ((0, last - first - len(own)), (0, 0)), constant_values=np.inf)

    # A part at a time: no device holds the whole table on the way, and each process lays out its own devices' parts.
    return jax.make_array_from_callback((filled_up, rows.shape[1]), sharding, part)


def unshard_centers(table: ArrayLike, num_classes: int | None = None) -> np.ndarray:
    """The C rows of a table on a mesh, on the host: what to save, so that it can be restored on any other mesh.

    If several processes share the mesh, all of them must call it, and each gets all rows.

    Args:
      table: `[C', D]`, as `shard_centers` returns it.
      num_classes: C, to be sure of it; by default the number of rows that do not fill the table up.

    Returns:
      `[C, D]`, a NumPy array of the table's dtype. `shard_centers` lays it out again.

    Raises:
      ValueError: if the table has the centers of more classes or of fewer.

    Example:
      >>> import centerloss_jax as clj
      >>> import jax.numpy as jnp
      >>> clj.unshard_centers(jnp.zeros((10, 2)), num_classes=10).shape
      (10, 2)
    """
    local = not isinstance(table, Array) or table.is_fully_addressable or table.is_fully_replicated
    rows = np.asarray(jax.device_get(table) if local else multihost_utils.process_allgather(table, tiled=True))
    classes = len(rows)
    while classes and np.isposinf(rows[classes - 1]).all():  # only at the end: elsewhere it is a center that became Inf
        classes -= 1
    if num_classes not in (None, classes):
        raise ValueError(f'num_classes is {num_classes}, but the table has the centers of {classes} classes')
    return rows[:classes]
