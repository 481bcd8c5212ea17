"""Layouts over devices: gather and scatter of table rows on Auto, Explicit and Manual mesh axes.

On Explicit axes a gather and a scatter must be told the layout of their result. On Auto axes XLA chooses it, and a
constraint on the scattered rows keeps it from moving the table. Inside `jax.shard_map` axes are Manual.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def take_rows(table: Array, index: Array) -> Array:
    """Returns table[index] `[..., D]`, laid out as the index is. Every index must be a row of the table."""
    return table.at[index].get(mode='promise_in_bounds', out_sharding=_layout_of_rows(table, index))


def add_rows(table: Array, index: Array, values: Array, unique: bool = False) -> Array:
    """Returns the table with values added to its rows; an index beyond the table is dropped.

    unique: no row is named twice. A GPU that must repeat its bits then need not order the additions.
    """
    return table.at[index].add(values, mode='drop', unique_indices=unique, out_sharding=_layout_of_table(table))


def set_rows(table: Array, index: Array, values: Array) -> Array:
    """Returns the table with rows replaced. No row may be named twice; an index beyond the table is dropped."""
    return table.at[index].set(values, mode='drop', out_sharding=_layout_of_table(table))


def flatten(a: Array, num_axes: int) -> Array:
    """Returns `a` with its first num_axes axes as one. On Explicit axes all but the first are replicated before."""
    sharding = jax.typeof(a).sharding
    if _has(AxisType.Explicit, sharding.mesh) and any(axis is not None for axis in sharding.spec[1:num_axes]):
        a = jax.reshard(a, NamedSharding(sharding.mesh, P(sharding.spec[0])))
    return a.reshape(-1, *a.shape[num_axes:])


def replicate(tree: Any, mesh: Mesh | None = None) -> Any:
    """Lays arrays out replicated on their own mesh, on `mesh`, or on the ambient mesh.

    Without it XLA all-reduces the whole table where a sharded batch is scattered into it. With it, XLA all-gathers the
    rows, O(B D), and each device scatters them into its part of the table.
    """

    def leaf(a: Array) -> Array:
        array_mesh = jax.typeof(a).sharding.mesh
        if _has(AxisType.Explicit, array_mesh):
            return jax.reshard(a, NamedSharding(array_mesh, P()))
        auto_mesh = mesh if mesh is not None else jax.sharding.get_abstract_mesh()
        if _has(AxisType.Auto, auto_mesh):
            return jax.lax.with_sharding_constraint(a, NamedSharding(auto_mesh, P()))
        return a

    return jax.tree.map(leaf, tree)


def lay_out_as(a: Array, table: Array) -> Array:
    """Returns `a` laid out as a table of its shape under `jax.jit`, where XLA would replicate an array of zeros.

    XLA lays out the operands of a `where` alike. It does not see that this one never takes the table.
    """
    inside_shard_map = jax.sharding.get_abstract_mesh().manual_axes
    if not isinstance(table, Tracer) or inside_shard_map or a.shape != table.shape:
        return a
    return jnp.where((table < 0) & (table > 0), table.astype(a.dtype), a)


def gather_devices(a: Array, axis_name: str | tuple[str, ...]) -> Array:
    """Returns the arrays of all devices along a mapped axis, joined on their first axis, the same on each device.

    'invarying' tells shard_map that the result is the same on each device. vmap has no such check, and JAX 0.10 refuses
    the word there.
    """
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    on_devices = set(names) <= set(jax.sharding.get_abstract_mesh().manual_axes)
    return jax.lax.all_gather(a, axis_name, tiled=True, to='invarying' if on_devices else 'varying')


def vary_as(a: Array, *others: Array) -> Array:
    """Marks `a` as varying over the axes that `others` vary over, as shard_map's check asks of a loop's carry."""
    varying = frozenset().union(*(jax.typeof(other).manual_axis_type.varying for other in others))
    names = varying - jax.typeof(a).manual_axis_type.varying
    return jax.lax.pcast(a, tuple(names), to='varying') if names else a


def first_row(class_axis: tuple[str, ...], num_rows: int) -> Array | int:
    """Returns the first row of this device's part of a table, which has num_rows rows and lies over class_axis."""
    return jax.lax.axis_index(class_axis) * num_rows if class_axis else 0


def row_axes(sharding: NamedSharding) -> tuple[str, ...]:
    """Returns the mesh axes that the first axis of an array lies over."""
    axes = sharding.spec[0] if len(sharding.spec) else None
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def num_row_shards(sharding: NamedSharding) -> int:
    return math.prod(sharding.mesh.shape[name] for name in row_axes(sharding))


def on_auto_axes(fn: Callable, *args: Array, spec: P) -> Any:
    """Returns fn(*args) with its operations laid out by XLA, on Explicit axes too. `spec` is that of the results."""
    meshes = [mesh for a in args if _has(AxisType.Explicit, mesh := jax.typeof(a).sharding.mesh)]
    if not meshes:
        return fn(*args)
    return jax.sharding.auto_axes(fn, out_sharding=NamedSharding(meshes[0], spec))(*args)


def num_shards(table: Array) -> int:
    """Returns a number of equal parts of the table's rows, such that each part lies on one device.

    Under `jax.jit` on Auto axes the layout of a table is not known but is even, so the size of the mesh serves.
    """
    mesh = jax.typeof(table).sharding.mesh
    mesh = jax.sharding.get_abstract_mesh() if mesh.empty else mesh
    on_devices = not mesh.empty and not _has(AxisType.Manual, mesh)
    return math.gcd(table.shape[0], mesh.size) if on_devices else 1


def _layout_of_rows(table: Array, index: Array) -> NamedSharding | None:
    """Returns the layout of gathered rows on Explicit axes: that of the index, with whole rows."""
    sharding = jax.typeof(index).sharding
    for mesh in (sharding.mesh, jax.typeof(table).sharding.mesh):
        if _has(AxisType.Explicit, mesh):
            return NamedSharding(mesh, P(*sharding.spec, None))
    return None


def _layout_of_table(table: Array) -> NamedSharding | None:
    """Returns the layout of a table on Explicit axes."""
    sharding = jax.typeof(table).sharding
    return sharding if _has(AxisType.Explicit, sharding.mesh) else None


def _has(axis_type: AxisType, mesh: Any) -> bool:
    return axis_type in mesh.axis_types
