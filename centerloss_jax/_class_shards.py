"""Softmax over classes whose table lies over devices by rows: device k has the R rows from row k R on.

Features and labels of all devices are gathered. Each device computes the logits of its own rows for all examples. A
maximum and a few sums of `[B]` numbers combine them to one softmax. No row of the table, its gradient or its optimizer
state moves.

In `jax.shard_map` and `jax.pmap` the table, the sample and its indices are those of one device. Under `jax.jit` they
are whole arrays, and the functions below enter a `jax.shard_map` of their own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from centerloss_jax._inputs import (
    DROPPED,
    IGNORED,
    axis_names,
    check_axis_name,
    check_mesh,
    check_num_classes,
    is_mapped,
)
from centerloss_jax._sharding import (
    first_row,
    gather_devices,
    num_row_shards,
    on_auto_axes,
    replicate,
    row_axes,
    take_rows,
    vary_as,
)


class ClassShards(NamedTuple):
    """How the rows of a table lie over devices. All fields are static."""

    num_shards: int = 1
    class_axis: tuple[str, ...] = ()  # the mesh axes that the rows lie over
    axis_name: tuple[str, ...] = ()  # other mapped axes that the batch lies over
    mesh: Any = None  # None inside of shard_map and pmap, where arrays are those of one device

    @property
    def sharding(self) -> NamedSharding | None:
        """The layout of rows under `jax.jit`."""
        return None if self.mesh is None else NamedSharding(self.mesh, P(self.class_axis))


def find_shards(axis_name: Any, class_axis: Any, mesh: Any, table: Array | None = None) -> ClassShards:
    """Checks the arguments and returns the layout. On Explicit axes the default is the layout of the table."""
    check_axis_name(axis_name)
    check_mesh(mesh)
    axis_name, class_axis = axis_names(axis_name, 'axis_name'), axis_names(class_axis, 'class_axis')
    type_axes, type_mesh = _layout_in_type(table)
    if type_axes and class_axis not in ((), type_axes):
        raise ValueError(f'class_axis is {class_axis}, but the rows of the table lie over {type_axes}')
    class_axis = class_axis or type_axes
    if not class_axis:
        if mesh is not None:
            raise ValueError('mesh goes with class_axis, the axis of the mesh that the rows of the table lie over')
        return ClassShards(axis_name=axis_name)
    if all(map(is_mapped, class_axis)):
        if mesh is not None:
            raise ValueError('mesh goes with jax.jit: inside of jax.shard_map or jax.pmap leave it out')
        others = tuple(name for name in axis_name if name not in class_axis)
        return ClassShards(jax.lax.axis_size(class_axis), class_axis, others)
    if axis_name:
        raise ValueError(
            f'axis_name={axis_name} is an axis of the jax.shard_map or jax.pmap around this call, but '
            f'class_axis={class_axis} is none: map over both, or leave axis_name out under jax.jit'
        )
    mesh = mesh or type_mesh or jax.sharding.get_abstract_mesh()
    missing = [name for name in class_axis if name not in mesh.axis_names]
    if missing:
        raise ValueError(
            f'class_axis={class_axis} is not in the mesh, whose axes are {mesh.axis_names}: pass mesh=, call it inside '
            'of jax.set_mesh(mesh), or name an axis of the jax.shard_map or jax.pmap around this call'
        )
    return ClassShards(num_row_shards(NamedSharding(mesh, P(class_axis))), class_axis, mesh=mesh)


def count_classes(table: Array, num_classes: Any, shards: ClassShards) -> int:
    """Returns the number of classes: the rows of the table on all devices where num_classes is None."""
    num_rows = table.shape[0]
    if shards.mesh is None:
        num_rows *= shards.num_shards
    elif num_rows % shards.num_shards:
        raise ValueError(
            f'table must have a number of rows that its {shards.num_shards} shards divide, got {num_rows}: '
            'shard_centers pads it, and num_classes= leaves the padding out'
        )
    if num_classes is None:
        return num_rows
    check_num_classes(num_classes)
    if not export.is_symbolic_dim(num_rows) and num_classes > num_rows:
        raise ValueError(f'num_classes must be at most {num_rows}, the rows of the table, got {num_classes}')
    return num_classes


def gather_batch(a: Array, shards: ClassShards) -> Array:
    """Returns the features or labels of all devices where the rows of the table lie over devices."""
    if shards.mesh is not None:
        return replicate(a, shards.mesh)
    if not shards.class_axis:
        return a
    if not jnp.issubdtype(a.dtype, jnp.floating):
        return gather_devices(a, shards.axis_name + shards.class_axis)
    a = jax.lax.all_gather(a, shards.class_axis, tiled=True)
    if not shards.axis_name:
        return a
    # shard_map's check must see that the gradient of a row is the same on all devices that hold the row.
    checked = jax.typeof(jax.lax.axis_index(shards.axis_name)).manual_axis_type.varying
    return jax.lax.all_gather(a, shards.axis_name, tiled=True, to='invarying' if checked else 'varying')


def take_classes(
    table: Array, classes: Array | None, num_classes: int, shards: ClassShards
) -> tuple[Array, Array, Array]:
    """Returns the rows of some classes or of all, their classes, and their indices for RowUpdates.

    A row that stands for no class has the class DROPPED and the index IGNORED: a row of padding, and, where a table
    lies over devices, a row of another device.
    """
    num_rows = table.shape[0] if shards.mesh is None else table.shape[0] // shards.num_shards

    def take(table: Array, classes: Array | None) -> tuple[Array, Array, Array]:
        first = first_row(shards.class_axis, num_rows)
        if classes is None:
            index, rows = jnp.arange(num_rows, dtype=jnp.int32), table
        else:
            index = classes if shards.mesh is None else classes - first
            rows = take_rows(table, jnp.clip(index, 0, num_rows - 1))
        is_class = (index >= 0) & (index < num_rows) & (index + first < num_classes)
        classes = index + first
        index = classes if shards.mesh is not None else index
        return rows, jnp.where(is_class, classes, DROPPED), jnp.where(is_class, index, IGNORED)

    if shards.mesh is None:
        return take(table, classes)
    by_class = P(shards.class_axis)
    return jax.shard_map(take, mesh=shards.mesh, in_specs=by_class, out_specs=by_class)(table, classes)


def combine_shards(logits: Callable, shards: ClassShards, x: Array, rows: Array, classes: Array, *batch: Any) -> Any:
    """Returns what `logits` returns for a table that lies on one device.

    logits(x, rows, classes, *batch) returns for each example the log-sum-exp over the classes that are not its own, and
    sums that are 0 unless its own class is among the rows.
    """
    if not shards.class_axis:
        leaves, treedef = jax.tree.flatten((x, rows, classes, *batch))
        of_example = P(*jax.typeof(x).sharding.spec[:1])
        return on_auto_axes(lambda *leaves: logits(*treedef.unflatten(leaves)), *leaves, spec=of_example)

    def combine(x: Array, rows: Array, classes: Array, *batch: Any) -> Any:
        # Marked here, so that a gradient is summed over devices once, and not in each turn of a loop.
        x, batch = jax.tree.map(lambda a: vary_as(a, rows), (x, batch))
        others, sums = logits(x, rows, classes, *batch)
        largest = jax.lax.pmax(jax.lax.stop_gradient(others), shards.class_axis)
        total = jax.lax.psum(jnp.exp(others - largest), shards.class_axis)
        return largest + jnp.log(total), jax.lax.psum(sums, shards.class_axis)

    if shards.mesh is None:
        return combine(x, rows, classes, *batch)
    by_class = P(shards.class_axis)
    specs = P(), by_class, by_class, *([P()] * len(batch))
    return jax.shard_map(combine, mesh=shards.mesh, in_specs=specs, out_specs=P())(x, rows, classes, *batch)


def _layout_in_type(table: Array | None) -> tuple[tuple[str, ...], Any]:
    """Returns the mesh axes that the rows of a table lie over on Explicit axes, and their mesh."""
    if table is None:
        return (), None
    sharding = jax.typeof(table).sharding
    return (row_axes(sharding), sharding.mesh) if AxisType.Explicit in sharding.mesh.axis_types else ((), None)
