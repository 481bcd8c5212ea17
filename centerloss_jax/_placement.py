"""A table on a mesh: spread over its devices by rows, and back into the rows that are saved."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding
from jax.typing import ArrayLike

from centerloss_jax._lookup import check_table


def shard_centers(centers: ArrayLike, sharding: NamedSharding) -> Array:
    """Lays a table out over a mesh by rows, filled up to a number of rows that the mesh divides.

    A row that fills it up holds Inf. `nearest_center` never returns one, and a label that hits one is a mistake like
    any beyond the classes: the loss is NaN and the row is dropped and counted.

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
    centers = check_table(centers)
    names = sharding.spec[0] if len(sharding.spec) else None
    names = (names,) if isinstance(names, str) else names or ()
    shards = math.prod(sharding.mesh.shape[name] for name in names)
    missing = -centers.shape[0] % shards
    return jax.device_put(jnp.pad(centers, ((0, missing), (0, 0)), constant_values=jnp.inf), sharding)


def unshard_centers(table: ArrayLike, num_classes: int) -> np.ndarray:
    """The C rows of a table on a mesh, on the host: what to save, so that it can be restored on any other mesh.

    Args:
      table: `[C', D]`, as `shard_centers` returns it.
      num_classes: C.

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
    rows = np.asarray(jax.device_get(table))
    classes = int((~np.isposinf(rows).all(axis=1)).sum())
    if classes != num_classes:
        raise ValueError(f'num_classes is {num_classes}, but the table has the centers of {classes} classes')
    return rows[:num_classes]
