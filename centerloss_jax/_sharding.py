"""Where arrays lie: the few lines in which the library speaks of devices, meshes and axis names."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def take_rows(table: Array, indices: Array) -> Array:
    """table[indices] for indices that are rows of the table. [..., D], laid out over the devices as the indices are."""
    return table.at[indices].get(mode='promise_in_bounds', out_sharding=_as_indices(table, indices, None))


def num_rows_before_padding(table: Array) -> Array:
    """The number of rows but for the last ones that fill the table up for a mesh: they hold Inf.

    They are fewer than the devices, so this looks at a few numbers, and on one device at none. Only those at the end
    count: a center that became Inf stands for itself alone.
    """
    num_rows = table.shape[0]
    num_devices = max(jax.device_count(), _mesh_of(table).size)
    last = jnp.arange(max(0, num_rows + 1 - num_devices), num_rows, dtype=jnp.int32)
    first_numbers = table.at[last, 0].get(mode='promise_in_bounds', out_sharding=_as_indices(table, last))
    return jnp.max(jnp.where(jnp.isposinf(first_numbers), 0, last + 1), initial=num_rows - last.size)


def _as_indices(table: Array, indices: Array, *more: None) -> NamedSharding | None:
    """On Explicit axes the layout of the indices, and of more axes."""
    sharding = jax.typeof(indices).sharding
    for mesh in (sharding.mesh, jax.typeof(table).sharding.mesh):
        if _has(AxisType.Explicit, mesh):
            return NamedSharding(mesh, P(*sharding.spec, *more))
    return None


def add_rows(table: Array, indices: Array, values: Array, unique: bool = False) -> Array:
    """table with values added to its rows, laid out as the table is; rows beyond the table are dropped.

    Where those within the table are unique, a GPU that is asked for the same bits every time need not order them.
    """
    sharding = jax.typeof(table).sharding
    out = sharding if _has(AxisType.Explicit, sharding.mesh) else None
    return table.at[indices].add(values, mode='drop', unique_indices=unique, out_sharding=out)


def set_rows(table: Array, indices: Array, values: Array) -> Array:
    """table with its rows replaced; the indices within the table are unique, those beyond it are dropped."""
    sharding = jax.typeof(table).sharding
    out = sharding if _has(AxisType.Explicit, sharding.mesh) else None
    return table.at[indices].set(values, mode='drop', out_sharding=out)


def on_auto_axes(fn: Callable, *args: Array, spec: P) -> Any:
    """fn(*args), its operations laid out by XLA also where the axes are Explicit. `spec` is that of its results."""
    meshes = [mesh for a in args if _has(AxisType.Explicit, mesh := jax.typeof(a).sharding.mesh)]
    if not meshes:
        return fn(*args)
    return jax.sharding.auto_axes(fn, out_sharding=NamedSharding(meshes[0], spec))(*args)


def num_shards(table: Array) -> int:
    """A number of equal parts of the table's rows, such that each part lies on one device.

    Under `jax.jit` on Auto axes a table's layout is not known, but it is even: the parts of the whole mesh will do.
    """
    mesh = _mesh_of(table)
    on_devices = not mesh.empty and not _has(AxisType.Manual, mesh)
    return math.gcd(table.shape[0], mesh.size) if on_devices else 1


def _mesh_of(table: Array) -> Any:
    """The mesh that a table lies on as far as can be known, or that of the surroundings, or an empty one."""
    mesh = jax.typeof(table).sharding.mesh
    if mesh.empty and not isinstance(table, Tracer) and isinstance(table.sharding, NamedSharding):
        mesh = table.sharding.mesh
    return jax.sharding.get_abstract_mesh() if mesh.empty else mesh


def gather_devices(a: Array, axis_name: str | tuple[str, ...]) -> Array:
    """Joins the arrays of all devices along their first axis, the same on each.

    'invarying' tells shard_map's replication check that the result is the same everywhere. vmap has no such check, and
    JAX 0.10 refuses the word there.
    """
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    on_devices = set(names) <= set(jax.sharding.get_abstract_mesh().manual_axes)
    return jax.lax.all_gather(a, axis_name, tiled=True, to='invarying' if on_devices else 'varying')


def vary_as(a: Array, *others: Array) -> Array:
    """The same, and under shard_map free to differ between the devices where `others` may: what a loop carries must."""
    varying = frozenset().union(*(jax.typeof(other).manual_axis_type.varying for other in others))
    names = varying - jax.typeof(a).manual_axis_type.varying
    return jax.lax.pcast(a, tuple(names), to='varying') if names else a


def check_axis_name(axis_name: str | tuple[str, ...]) -> None:
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f'axis_name must be the name of an axis or a tuple of names, got {axis_name!r}')
    try:
        jax.lax.axis_size(axis_name)
    except NameError:
        raise NameError(
            f'axis_name={axis_name!r} is not the name of an axis here: pass the axis_name of the jax.pmap, '
            'jax.shard_map or jax.vmap around this call, or leave axis_name out on one device and under a plain jax.jit'
        ) from None


def replicate(tree, mesh: Mesh | None = None):
    """Makes small arrays the same on every device of the mesh that they, the caller or the surroundings name.

    Left to itself XLA scatters a sharded batch into a replicated table by reducing the whole table over the devices.
    With replicated rows each device applies all of them to its own part, and O(B D) travels.
    """

    def leaf(a):
        own = jax.typeof(a).sharding.mesh
        if _has(AxisType.Explicit, own):
            return jax.reshard(a, NamedSharding(own, P()))
        around = mesh if mesh is not None else jax.sharding.get_abstract_mesh()
        if _has(AxisType.Auto, around):
            return jax.lax.with_sharding_constraint(a, NamedSharding(around, P()))
        return a

    return jax.tree.map(leaf, tree)


def _has(axis_type: AxisType, mesh) -> bool:
    return axis_type in mesh.axis_types
