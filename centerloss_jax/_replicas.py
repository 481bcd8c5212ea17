"""Whether the devices still have the same copy of what they should share."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

# Numbers of a replica that are read at a time.
BLOCK = 2**16


def check_replicas(tree: Any, *, stacked: bool = False) -> None:
    """Checks on the host that replicas have not drifted apart.

    Under `jax.pmap`, and in a `jax.shard_map` without its replication check, a forgotten `axis_name` or `pmean` is no
    error: every device trains on, with centers and parameters of its own. Call this once after the first steps, and
    with each save. It reads every replica once, where it lies; what travels is one number for each. Of several
    processes all must call it.

    Args:
      tree: any tree of arrays, such as a train state. Parts of an array that lie on several devices must be the same
        to the bit on each of them. Arrays on one device pass.
      stacked: whether the first axis of every array is that of the devices, as `jax.pmap` returns them.

    Raises:
      ValueError: if they differ. It names the first such array, and the devices that have another copy than the first.

    Example:
      >>> import centerloss_jax as clj
      >>> import jax.numpy as jnp
      >>> clj.check_replicas({'centers': jnp.zeros((2, 10, 3))}, stacked=True)
      >>> clj.check_replicas({'centers': jnp.arange(6.0).reshape(2, 3, 1)}, stacked=True)
      Traceback (most recent call last):
      ValueError: ['centers'] is not the same on all devices: replicas 1 differ from replica 0. Pass axis_name= ...
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        leaf = jnp.asarray(leaf)
        if stacked and not leaf.ndim:
            raise ValueError(f'stacked=True, but {jax.tree_util.keystr(path)} is a number and has no axis of devices')
        parts = ['all'] * len(leaf) if stacked else _places(leaf)
        checksums = _on_the_host(_checksums(leaf) if stacked else _checksum_by_device(leaf))
        parts *= len(checksums) // len(parts)  # once for each process, if each has an array of its own
        first: dict[str, int] = {}
        others = [n for n, part in enumerate(parts) if checksums[first.setdefault(part, n)] != checksums[n]]
        if others:
            raise ValueError(
                f'{jax.tree_util.keystr(path)} is not the same on all devices: replicas {", ".join(map(str, others))} '
                f'differ from replica {first[parts[others[0]]]}. Pass axis_name= to with_centers or center_update and '
                'to the loss, and reduce the gradients of the parameters by jax.lax.pmean'
            )


def _places(leaf: Array) -> list[str]:
    """Which part of an array each device has."""
    places = leaf.sharding.devices_indices_map(leaf.shape)
    return [str(places[device]) for device in _devices(leaf)]


def _devices(leaf: Array) -> list[Any]:
    """In the order of the mesh."""
    if isinstance(leaf.sharding, NamedSharding):
        return list(np.asarray(leaf.sharding.mesh.devices).flat)
    return list(leaf.sharding.device_set)


def _checksum_by_device(leaf: Array) -> Array:
    """The checksum of the part that each device has, in the order of the mesh."""
    if not isinstance(leaf.sharding, NamedSharding):
        return _checksums(leaf[None])
    mesh, spec = leaf.sharding.mesh, leaf.sharding.spec
    by_device = partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=P(mesh.axis_names), check_vma=False)
    return jax.jit(by_device(lambda part: _checksums(part[None])))(leaf)


def _on_the_host(checksums: Array) -> list[int]:
    """Those of all processes."""
    if jax.process_count() == 1:
        return np.asarray(jax.device_get(checksums)).tolist()
    return multihost_utils.process_allgather(checksums, tiled=True).reshape(-1).tolist()


@jax.jit
def _checksums(a: Array) -> Array:
    """A number for each entry of the first axis, uint32 [n], that another bit anywhere changes."""
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a = jax.random.key_data(a)
    if a.dtype == bool:
        a = a.astype(jnp.uint8)
    if jnp.iscomplexobj(a):
        a = jnp.stack([a.real, a.imag], axis=-1)
    if not a.size:
        return jnp.zeros(a.shape[0], jnp.uint32)
    a = a.reshape(a.shape[0], a.shape[1] if a.ndim > 1 else 1, -1)
    _, rows, columns = a.shape
    block = min(rows, max(1, BLOCK // columns))
    column = jnp.arange(columns, dtype=jnp.uint32)

    # In blocks: left to itself XLA writes the mixed bits of the whole table down before it adds them up.
    def add(i: Array, total: Array) -> Array:
        start = jnp.minimum(i * block, rows - block)  # the last block is whole too, and counts what is new in it
        bits = _bits(jax.lax.dynamic_slice_in_dim(a, start, block, axis=1))
        row = start + jnp.arange(block)[:, None]
        bits = _mixed(_mixed(bits + row.astype(jnp.uint32)) + column)
        return total + jnp.where(row >= i * block, bits, 0).sum(axis=(1, 2), dtype=jnp.uint32)

    return jax.lax.fori_loop(0, -(-rows // block), add, jnp.zeros(a.shape[0], jnp.uint32))


def _bits(a: Array) -> Array:
    """uint32 [n, rows, columns]; of a wider number both halves."""
    bits = jax.lax.bitcast_convert_type(a, jnp.dtype(f'uint{8 * min(a.dtype.itemsize, 4)}')).astype(jnp.uint32)
    return bits if bits.ndim == a.ndim else _mixed(bits[..., 0]) + bits[..., 1]


def _mixed(bits: Array) -> Array:
    """A permutation of uint32 without a pattern: the last steps of MurmurHash3."""
    bits = (bits ^ (bits >> 16)) * np.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * np.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
