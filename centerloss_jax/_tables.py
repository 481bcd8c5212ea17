"""The host side of a table: laid out over a mesh by rows, back on the host, and checked for equal replicas."""

import math
from collections.abc import Callable
from functools import cache, partial
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from centerloss_jax._inputs import as_array, check_not_traced, check_num_classes, check_table, type_name

# Numbers of a replica that are mixed into a checksum at a time.
BLOCK = 2**16


def shard_centers(table: ArrayLike, sharding: NamedSharding, *, fill: float = np.inf) -> Array:
    """Lays a table out over a mesh by rows, padded to a number of rows that the mesh divides.

    By default a padding row holds +Inf. `nearest_center` never returns one. A label that names one is a mistake, as a
    label beyond the table is: its loss is NaN, and its row is dropped and counted. A step recognizes a padding row by
    its first number, so a center whose first number has become +Inf is treated as one. To move a table to another mesh,
    or to save it, call `unshard_centers` first.

    The state that an optimizer keeps for each row has the layout of its table, with `fill=0`:
    `jax.tree.map(lambda leaf: shard_centers(leaf, sharding, fill=0) if np.ndim(leaf) else leaf, state)`.

    Args:
      table: `[C, D]`, floating point. With `fill=0` also `[C]` or `[C, ...]`, of any dtype.
      sharding: layout of the result, such as `NamedSharding(mesh, PartitionSpec('classes', None))`. Trailing axes of
        the specification that are None may be more than those of the table.
      fill: what padding rows hold: `numpy.inf` for centers and classifiers, 0 for the state of an optimizer.

    Returns:
      `[C', ...]` with that sharding, C' the least multiple of the number of shards that is at least C.

    Raises:
      TypeError: if the table is traced, or not floating point where fill is `numpy.inf`, or sharding is no
        NamedSharding.
      ValueError: if the table has no rows, or does not have two dimensions where fill is `numpy.inf`; if fill is
        another number, or sharding has more axes than the table.

    Example:
      >>> import centerloss_jax as clj
      >>> import jax, jax.numpy as jnp
      >>> from jax.sharding import NamedSharding, PartitionSpec
      >>> mesh = jax.make_mesh((jax.device_count(),), ('classes',))
      >>> sharding = NamedSharding(mesh, PartitionSpec('classes', None))
      >>> table = clj.shard_centers(jnp.zeros((10, 2)), sharding)
      >>> table.shape[0] >= 10, clj.unshard_centers(table, num_classes=10).shape
      (True, (10, 2))
      >>> counts = clj.shard_centers(jnp.zeros(10, int), sharding, fill=0)
      >>> counts.shape == table.shape[:1]
      True
    """
    if not isinstance(sharding, NamedSharding):
        raise TypeError(
            "sharding must be a NamedSharding, such as NamedSharding(mesh, PartitionSpec('classes', None)), "
            f'got {type(sharding).__name__}'
        )
    if not isinstance(fill, Real) or fill not in (0, np.inf):
        raise ValueError(f'fill must be numpy.inf for centers, or 0 for the state of an optimizer, got {fill!r}')
    check_not_traced(table, 'table', 'shard_centers')
    rows = _on_host(jax.device_get(table))
    if fill != 0:
        hint = 'for the state of an optimizer pass fill=0'
        if not jnp.issubdtype(rows.dtype, jnp.floating):
            raise TypeError(f'table must be floating point to be padded by Inf, got {type_name(rows)}; {hint}')
        if rows.ndim != 2:
            raise ValueError(f'table must have shape [C, D] to be padded by Inf, got {list(rows.shape)}; {hint}')
    dtype = jax.eval_shape(
        jnp.asarray if fill == 0 else partial(check_table, name='table'), rows
    ).dtype  # without a copy on a device
    rows = rows.astype(dtype, copy=False)
    if any(sharding.spec[rows.ndim :]):
        raise ValueError(f'sharding is {sharding.spec}, of more axes than those of the table {list(rows.shape)}')
    spec = P(*sharding.spec[: rows.ndim])
    names = spec[0] if len(spec) else None
    names = (names,) if isinstance(names, str) else names or ()
    shards = math.prod(sharding.mesh.shape[name] for name in names)
    num_rows = len(rows) + -len(rows) % shards

    def shard(index: Any) -> np.ndarray:
        values = rows[index]
        first, last, _ = index[0].indices(num_rows)
        padding = np.full((last - first - len(values), *values.shape[1:]), fill, values.dtype)
        return np.concatenate([values, padding])

    # Shard by shard: no device holds the whole table, and each process lays out the shards of its own devices.
    sharding = NamedSharding(sharding.mesh, spec)
    return jax.make_array_from_callback((num_rows, *rows.shape[1:]), sharding, shard)


def unshard_centers(table: ArrayLike, num_classes: int | None = None) -> np.ndarray:
    """Returns the C rows of a table on the host, without padding. Save these: they can be restored on any mesh.

    If several processes share the mesh, all of them must call it, and each gets all rows.

    Args:
      table: `[C', ...]`, as `shard_centers` returns it: a table, or the state of an optimizer for its rows.
      num_classes: C, which is checked: the rows after it must be padding, so all their numbers are equal. By default
        all rows but those of +Inf at the end. The state of an optimizer needs it, since it is not padded by Inf.

    Returns:
      `[C, ...]`, a NumPy array of the table's dtype. `shard_centers` lays it out again.

    Raises:
      TypeError: if the table is no array of numbers, or is traced.
      ValueError: if the table has no rows; if num_classes is no integer of at least 1, or the table has rows of another
        number of classes.

    Example:
      >>> import centerloss_jax as clj
      >>> import jax.numpy as jnp
      >>> clj.unshard_centers(jnp.zeros((10, 2)), num_classes=10).shape
      (10, 2)
      >>> clj.unshard_centers(jnp.zeros((16, 2)), num_classes=10).shape
      (10, 2)
    """
    if num_classes is not None:
        check_num_classes(num_classes)
    check_not_traced(table, 'table', 'unshard_centers')
    local = not isinstance(table, Array) or table.is_fully_addressable or table.is_fully_replicated
    rows = _on_host(jax.device_get(table) if local else multihost_utils.process_allgather(table, tiled=True))
    classes = len(rows)
    if jnp.issubdtype(rows.dtype, jnp.floating):
        while classes and np.isposinf(rows[classes - 1]).all():  # padding is at the end
            classes -= 1
    if num_classes is None:
        return rows[:classes]
    padding = rows[num_classes:]
    if classes < len(rows):
        matches = num_classes == classes
    else:  # padding holds 0, or the number with which the state of an optimizer starts
        matches = num_classes <= classes and (padding.size == 0 or (padding == padding.flat[0]).all())
    if not matches:
        raise ValueError(f'num_classes is {num_classes!r}, but the table has rows of {classes} classes')
    return rows[:num_classes]


def _on_host(table: Any) -> np.ndarray:
    """Returns the array on the host. Raises an error if it is none, or has no rows."""
    rows = as_array(table, 'table', 'an array of numbers', np)
    if not (jnp.issubdtype(rows.dtype, np.number) or rows.dtype == bool):
        raise TypeError(f'table must be an array of numbers, got {type_name(rows)}')
    if rows.ndim == 0 or len(rows) == 0:
        raise ValueError(f'table must have shape [C, ...] with C at least 1, got {list(rows.shape)}')
    return rows


def check_replicas(tree: Any, *, stacked: bool = False) -> None:
    """Checks on the host that replicas have not drifted apart.

    Under `jax.pmap`, and in a `jax.shard_map` without its replication check, a forgotten `axis_name` or `pmean` is no
    error: each device goes on with its own centers and parameters. Call this once after the first steps, and with
    each save. Each device reads its replicas once, and one checksum for each moves to the host. If several processes
    share the devices, all of them must call it.

    Args:
      tree: any tree of arrays, such as a train state. Replicas must be equal to the bit. An array on one device passes.
      stacked: whether the first axis of every array is the axis of the devices, as `jax.pmap` returns arrays.

    Raises:
      TypeError: if a leaf is no array or is traced.
      ValueError: if replicas differ. The message names the first such array and the replicas that differ.

    Example:
      >>> import centerloss_jax as clj
      >>> import jax.numpy as jnp
      >>> clj.check_replicas({'centers': jnp.zeros((2, 10, 3))}, stacked=True)
      >>> clj.check_replicas({'centers': jnp.arange(6.0).reshape(2, 3, 1)}, stacked=True)
      Traceback (most recent call last):
      ValueError: ['centers'] is not the same on all devices: replicas 1 differ from replica 0. Pass axis_name= ...
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path) or 'tree'
        check_not_traced(leaf, name, 'check_replicas')
        leaf = as_array(leaf, name, 'numbers')
        if stacked and (not leaf.ndim or not len(leaf)):
            raise ValueError(f'stacked=True asks for a first axis of devices, but {name} has shape {list(leaf.shape)}')
        shards = ['all'] * len(leaf) if stacked else _shard_of_each_device(leaf)
        checksums = _gather_processes(_checksums(leaf) if stacked else _checksum_by_device(leaf))
        shards *= len(checksums) // len(shards)  # each process may hold its own array
        first: dict[str, int] = {}
        others = [n for n, shard in enumerate(shards) if checksums[first.setdefault(shard, n)] != checksums[n]]
        if others:
            raise ValueError(
                f'{name} is not the same on all devices: replicas {", ".join(map(str, others))} '
                f'differ from replica {first[shards[others[0]]]}. Pass axis_name= to with_centers or center_update and '
                'to the loss, and reduce the gradients of the parameters by jax.lax.pmean'
            )


def _shard_of_each_device(leaf: Array) -> list[str]:
    """Returns which shard of an array each device holds, in the order of the mesh."""
    shards = leaf.sharding.devices_indices_map(leaf.shape)
    return [str(shards[device]) for device in _devices(leaf)]


def _devices(leaf: Array) -> list[Any]:
    """Returns the devices of an array in the order of its mesh."""
    if isinstance(leaf.sharding, NamedSharding):
        return list(np.asarray(leaf.sharding.mesh.devices).flat)
    return list(leaf.sharding.device_set)


def _checksum_by_device(leaf: Array) -> Array:
    """Returns the checksum of the shard that each device holds, in the order of the mesh."""
    if not isinstance(leaf.sharding, NamedSharding):
        return _checksums(leaf[None])
    return _compiled_checksum(leaf.sharding.mesh, leaf.sharding.spec)(leaf)


@cache
def _compiled_checksum(mesh: Any, spec: P) -> Callable[[Array], Array]:
    """Returns one function for each layout, so that JAX compiles once for each shape."""
    by_device = partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=P(mesh.axis_names), check_vma=False)
    return jax.jit(by_device(_checksum))


def _gather_processes(checksums: Array) -> list[int]:
    """Returns the checksums of all processes on the host."""
    if jax.process_count() == 1:
        return np.asarray(jax.device_get(checksums)).tolist()
    return multihost_utils.process_allgather(checksums, tiled=True).reshape(-1).tolist()


def _checksum(shard: Array) -> Array:
    return _checksums(shard[None])


@jax.jit
def _checksums(a: Array) -> Array:
    """Returns a checksum of the bits of each entry of the first axis, uint32 `[n]`."""
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a = jax.random.key_data(a)
    if a.dtype == bool or (jnp.issubdtype(a.dtype, jnp.integer) and jnp.iinfo(a.dtype).bits < 8):
        a = a.astype(jnp.int8)
    if jnp.iscomplexobj(a):
        a = jnp.stack([a.real, a.imag], axis=-1)
    if not a.size:
        return jnp.zeros(a.shape[0], jnp.uint32)
    a = a.reshape(a.shape[0], a.shape[1] if a.ndim > 1 else 1, -1)
    _, rows, columns = a.shape
    block = min(rows, max(1, BLOCK // columns))
    column = jnp.arange(columns, dtype=jnp.uint32)[None, None]

    # In blocks, since XLA would write the mixed bits of the whole table before it adds them.
    def add(i: Array, total: Array) -> Array:
        start = jnp.minimum(i * block, rows - block)  # the last block is whole too, and counts what is new in it
        bits = _bits(jax.lax.dynamic_slice_in_dim(a, start, block, axis=1))
        row = start + jnp.arange(block, dtype=jnp.int32)[None, :, None]
        bits = _mixed(_mixed(bits + row.astype(jnp.uint32)) + column)
        return total + jnp.where(row >= i * block, bits, 0).sum(axis=(1, 2), dtype=jnp.uint32)

    return jax.lax.fori_loop(0, -(-rows // block), add, jnp.zeros(a.shape[0], jnp.uint32))


def _bits(a: Array) -> Array:
    """Returns the bits as uint32 `[n, rows, columns]`; the two halves of a wider number are mixed into one."""
    bits = jax.lax.bitcast_convert_type(a, jnp.dtype(f'uint{8 * min(a.dtype.itemsize, 4)}')).astype(jnp.uint32)
    return bits if bits.ndim == a.ndim else _mixed(bits[..., 0]) + bits[..., 1]


def _mixed(bits: Array) -> Array:
    """Permutes uint32 by the last steps of MurmurHash3."""
    bits = (bits ^ (bits >> 16)) * np.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * np.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
