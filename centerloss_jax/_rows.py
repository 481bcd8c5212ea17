"""RowUpdates: a change to a few rows of a table, in the place of a gradient of the table's size."""

import dataclasses
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, export
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from centerloss_jax._inputs import (
    DROPPED,
    IGNORED,
    AxisName,
    as_array,
    check_floating,
    check_table,
    compute_dtype,
    is_row,
    row_index,
    type_name,
)
from centerloss_jax._kernels import add_class_sums, squared_norms, unique_sums
from centerloss_jax._sharding import (
    add_rows,
    first_row,
    gather_devices,
    num_row_shards,
    replicate,
    row_axes,
    set_rows,
    take_rows,
)

# Arithmetic on the rows changes these: no sum, multiple, square, sign or clip of such a number is itself.
# Half precision holds neither of the two floats. They differ, so that subtracting their mean changes them.
GUARD = np.array([-700_000_001], np.int32)
FLOAT_GUARD = np.array([[-700_000_064.0, 3.0000002]], np.float32)

LEAVES = 'indices', '_values', '_scale', '_guard', '_float_guard'

Kind = Literal['centers', 'gradient'] | None


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(eq=False, init=False)
class RowUpdates:
    r"""A sparse `[C, D]` array that stands where a gradient or an update of a table would.

    `table + rows` adds the values to the rows of the table, :math:`t_{k_i} \leftarrow t_{k_i} + v_i`, in place where
    the step donates the table. `optax.apply_updates` computes that sum for each leaf of the parameters, so optax's
    optimizers and Flax's train states take rows for a table of centers unchanged. A row with a negative index, or with
    one beyond the table, is dropped.

    Rows are not gradients. The sum of two RowUpdates, over devices or over passes, would name other classes, since it
    adds the indices. Private constants detect arithmetic on all leaves, on the integer ones alone or on the floating
    ones alone: such rows move nothing, and `center_update` counts them. Where a leaf has another dtype afterwards, as
    after a mean or a cast, it is a TypeError. Reduce, clip and accumulate inside `with_centers`, and join the rows of
    several passes by `concatenate_rows`. A `jax.lax.pmean` of the floating leaves alone is not detected, since it
    leaves constants as they are.

    The kind of rows says what moves their table. `center_update` takes 'centers', the differences c - x of
    `center_rows`. `by_rows` takes 'gradient', the gradient of a loss for rows of its table. Each refuses the kind of
    the other, and takes rows without a kind. The kind is static, and updates keep the kind of their rows.

    Rows that `jax.vmap`, `jax.lax.scan` or `jax.pmap` has stacked have leading axes: indices `[..., N]` and values
    `[..., N, D]`. `concatenate_rows` joins them into rows that can be added to a table.

    Attributes:
      indices: integers `[N]`, rows of the table.
      values: floating point `[N, D]`, what is added to them.
      kind: 'centers', 'gradient', or None for rows that any transform takes.
      sharding: None, or the layout of rows that lie over a mesh with their part of the table, equally many on each
        device, as a softmax with `class_axis` returns them under `jax.jit`. `table + rows`, `by_rows` and
        `concatenate_rows` then run on each device for its own rows. It is static.

    Raises:
      ValueError: if kind is another.
      TypeError: if sharding is no NamedSharding.
      TypeError: from `table + rows`, if the indices are no longer integers, or the values not floating point.
      ValueError: from `table + rows`, if the shapes do not fit the table.

    Example:
      >>> import centerloss_jax as clj
      >>> import jax.numpy as jnp
      >>> rows = clj.RowUpdates(jnp.array([1, 1]), jnp.array([[1.0, 2.0], [3.0, 4.0]]))
      >>> (jnp.zeros((3, 2)) + rows).tolist()
      [[0.0, 0.0], [4.0, 6.0], [0.0, 0.0]]
    """

    indices: ArrayLike
    _values: ArrayLike  # [N, D]; times _scale they are the values, so that loss, rows and move share one array
    _scale: ArrayLike | None  # [N], or None for ones
    _guard: ArrayLike  # GUARD
    _float_guard: ArrayLike  # FLOAT_GUARD
    kind: Kind
    sharding: NamedSharding | None

    def __init__(
        self,
        indices: ArrayLike,
        values: ArrayLike,
        *,
        kind: Kind = None,
        sharding: NamedSharding | None = None,
        _scale: ArrayLike | None = None,
        _guard: ArrayLike = GUARD,
        _float_guard: ArrayLike = FLOAT_GUARD,
    ):
        if kind not in ('centers', 'gradient', None):
            raise ValueError(f"kind must be 'centers', 'gradient' or None, got {kind!r}")
        if sharding is not None and not isinstance(sharding, NamedSharding):
            raise TypeError(f'sharding must be a NamedSharding or None, got {type(sharding).__name__}')
        self.kind, self.sharding = kind, sharding
        self.indices, self._values, self._scale = indices, values, _scale
        self._guard, self._float_guard = _guard, _float_guard

    @property
    def values(self) -> ArrayLike:
        return self._values if self._scale is None else jnp.asarray(self._scale)[..., None] * self._values

    def tree_flatten_with_keys(self):
        """Lists the leaves with their names. @private"""
        return [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in LEAVES], (self.kind, self.sharding)

    @classmethod
    def tree_unflatten(cls, aux, leaves):
        """Restores rows from their leaves. @private"""
        (kind, sharding), (indices, values, *others) = aux, leaves
        return cls(indices, values, kind=kind, sharding=sharding, **dict(zip(LEAVES[2:], others, strict=True)))

    if TYPE_CHECKING:
        # optax's type of a tree has arrays, iterables and mappings, and no pytree node of another class.
        def __iter__(self) -> Iterator[Array]: ...

    # Without it a NumPy table would add the rows elementwise by itself.
    __array_ufunc__ = None

    def __radd__(self, table: ArrayLike) -> Array:
        if not isinstance(table, (jax.Array, np.ndarray)):
            return NotImplemented
        table = check_table(table, 'the table')
        if self.sharding is not None:
            sharding = self.sharding
            arrays = resolve_shards(self, table, num_row_shards(sharding))

            def add(table, arrays):
                return table + rows_of_device(arrays, table, sharding)

            return jax.shard_map(add, mesh=sharding.mesh, in_specs=sharding.spec, out_specs=sharding.spec)(
                table, arrays
            )
        index, values, scale = replicate(resolve_for_scatter(self, table))
        if compute_dtype(table.dtype) != table.dtype:
            # In a narrow dtype each addition rounds: sum the rows of a class in float32 and round once.
            unique, sums = unique_sums(index, values, scale)
            old = take_rows(table, jnp.where(unique < table.shape[0], unique, 0))
            return set_rows(table, unique, (old.astype(sums.dtype) + sums).astype(table.dtype))
        if self._scale is None or index.size == 0:
            return add_rows(table, index, values.astype(table.dtype))
        return add_class_sums(table, index, values, scale)


def _serialize(aux: tuple[Kind, NamedSharding | None]) -> bytes:
    kind, sharding = aux
    if sharding is None:
        return json.dumps([kind]).encode()
    mesh, types = sharding.mesh, [axis_type.name for axis_type in sharding.mesh.axis_types]
    return json.dumps([kind, mesh.axis_names, mesh.axis_sizes, types, row_axes(sharding)]).encode()


def _deserialize(aux: bytes) -> tuple[Kind, NamedSharding | None]:
    """Restores the axes of a mesh, but not its devices."""
    kind, *layout = json.loads(aux)
    if not layout:
        return kind, None
    names, sizes, types, class_axis = layout
    mesh = AbstractMesh(tuple(sizes), tuple(names), tuple(AxisType[name] for name in types))
    return kind, NamedSharding(mesh, P(tuple(class_axis)))


export.register_pytree_node_serialization(
    RowUpdates,
    serialized_name='centerloss_jax.RowUpdates',
    serialize_auxdata=_serialize,
    deserialize_auxdata=_deserialize,
)


def concatenate_rows(*rows: RowUpdates) -> RowUpdates:
    """Joins the rows of several passes over one table into one update.

    `center_update` then counts the examples of a class over all of them, as if they had been one batch. The passes can
    be arguments, or rows that `jax.lax.scan` or `jax.vmap` has stacked along leading axes.

    Args:
      *rows: RowUpdates of `[..., N_k, D]` with one D.

    Returns:
      RowUpdates of all rows in order, indices `[N]` and values `[N, D]`. Their kind is that of the arguments that have
      one. Rows that lie with their class shard stay there.

    Raises:
      TypeError: if an argument is not RowUpdates, its rows were scaled or averaged, or two have different kinds.
      ValueError: if there are none, D differs, or they lie over devices in different ways.

    Example:
      >>> import centerloss_jax as clj
      >>> import jax.numpy as jnp
      >>> rows = clj.RowUpdates(jnp.array([1]), jnp.ones((1, 2)))
      >>> clj.concatenate_rows(rows, rows).indices.tolist()
      [1, 1]
    """
    if not rows:
        raise ValueError('concatenate_rows needs at least one RowUpdates')
    parts = [_resolve_stacked(part, DROPPED) for part in rows]
    widths = sorted({values.shape[-1] for _, values, _ in parts})
    if len(widths) > 1:
        raise ValueError(f'rows must belong to one table, got values of {widths} features')
    kinds: set[Kind] = {part.kind for part in rows if part.kind is not None}
    if len(kinds) > 1:
        raise TypeError(
            "rows must be of one kind, got 'centers' and 'gradient': join the rows of each table by themselves"
        )
    sharding = rows[0].sharding
    if any(part.sharding != sharding for part in rows):
        raise ValueError('rows must all lie with their class shard in the same way, or none of them: got two layouts')
    if sharding is None:
        index, values, scale = _join(replicate(parts))  # layouts may differ on Explicit axes
    else:
        specs = [P(*[None] * (index.ndim - 1), row_axes(sharding)) for index, _, _ in parts]
        on_devices = jax.shard_map(_join, mesh=sharding.mesh, in_specs=(specs,), out_specs=sharding.spec)
        index, values, scale = on_devices(parts)
    scale = None if all(part._scale is None for part in rows) else scale
    return RowUpdates(index, values, kind=kinds.pop() if kinds else None, sharding=sharding, _scale=scale)


def _join(parts: list[tuple[Array, Array, Array]]) -> list[Array]:
    parts = [(index.ravel(), values.reshape(-1, values.shape[-1]), scale.ravel()) for index, values, scale in parts]
    return [jnp.concatenate(arrays) for arrays in zip(*parts, strict=True)]


def check_rows(leaves: list[Any], transform: str, kind: Kind, source: str) -> None:
    """Raises an error if `transform` is given anything but rows, no rows, or rows of another kind than its own."""
    for leaf in leaves or [None]:
        if not isinstance(leaf, RowUpdates):
            got = 'nothing' if leaf is None else type_name(leaf) if hasattr(leaf, 'dtype') else type(leaf).__name__
            raise TypeError(
                f'{transform} takes RowUpdates in the place of a gradient for its tables: pass {source}, got {got}. '
                'Transforms that accumulate or average, such as optax.MultiSteps, go into the optimizer of with_centers'
            )
        if leaf.kind not in (kind, None):
            other = 'by_rows(optimizer)' if leaf.kind == 'gradient' else 'center_update'
            raise TypeError(
                f'{transform} takes {source}, of the kind {kind!r}, got rows of the kind {leaf.kind!r}, which {other} '
                'takes: with_centers(..., classifier=by_rows(optimizer)) gives each table its own'
            )


def gather_finite(rows: RowUpdates, table: Array | None, axis_name: AxisName | None, mesh: Mesh | None):
    """Returns the index, values and scale of the rows of all devices, their squared norms, and how many are dropped.

    The index is DROPPED for ignored rows, for dropped rows, and for rows whose squared norm is not finite.
    """
    index, values, scale = resolve(rows, table)
    if axis_name is not None:
        index, values, scale = (gather_devices(a, axis_name) for a in (index, values, scale))
    index, values, scale = replicate((index, values, scale), mesh)
    norms = squared_norms(values, scale)
    finite = jnp.isfinite(norms)
    dropped = jnp.sum((index != IGNORED) & ((index == DROPPED) | ~finite), dtype=jnp.int32)
    return jnp.where((index != IGNORED) & finite, index, DROPPED), values, scale, norms, dropped


def resolve_for_scatter(rows: RowUpdates, table: Array | None) -> tuple[Array, Array, Array]:
    """Returns what `resolve` returns, with DROPPED in place of IGNORED: a negative index would wrap around."""
    index, values, scale = resolve(rows, table)
    return jnp.where(index == IGNORED, DROPPED, index), values, scale


def resolve(rows: RowUpdates, table: Array | None = None) -> tuple[Array, Array, Array]:
    """Checks rows and returns their index, values in float32 or wider, and scale.

    The index is int32 `[N]`: a row of the table, IGNORED, or DROPPED where it is beyond the table or arithmetic has
    changed the rows.
    """
    if table is not None and table.ndim != 2:
        raise ValueError(f'the table of the rows must have shape [C, D], got {list(table.shape)}')
    index, values, scale = _resolve_stacked(rows, DROPPED if table is None else table.shape[0])
    if index.ndim != 1:
        raise ValueError(
            f'RowUpdates must have indices [N] and values [N, D], got {list(index.shape)} and {list(values.shape)}; '
            'join stacked rows by concatenate_rows'
        )
    if table is not None and values.shape[1] != table.shape[1]:
        raise ValueError(f'rows of {values.shape[1]} features cannot be added to a table {list(table.shape)}')
    return index, values, scale


def resolve_shards(rows: RowUpdates, table: Array, num_shards: int) -> tuple[Array, Array, Array | None]:
    """Returns the index, values and scale of rows that lie with their class shard, to enter `jax.shard_map`."""
    index, values, scale = resolve(rows, table)
    if table.shape[0] % num_shards or index.size % num_shards:
        raise ValueError(
            f'the rows lie over {num_shards} shards of their table, which must divide their number {index.size} and '
            f'that of the table, {table.shape[0]}: pass the table that the softmax was given'
        )
    return index, values, None if rows._scale is None else scale


def rows_of_device(arrays: tuple[Array, Array, Array | None], table: Array, sharding: NamedSharding) -> RowUpdates:
    """Returns the rows of this device and of its part of the table. A row of another device is dropped."""
    index, values, scale = arrays
    local = index - first_row(row_axes(sharding), table.shape[0])
    local = jnp.where((local >= 0) & (local < table.shape[0]), local, DROPPED)
    return RowUpdates(jnp.where(is_row(index), local, index), values, _scale=scale)


def _resolve_stacked(rows: RowUpdates, num_rows: int) -> tuple[Array, Array, Array]:
    """Returns index `[..., N]`, values `[..., N, D]` and scale `[..., N]`, with whatever axes are stacked."""
    if not isinstance(rows, RowUpdates):
        raise TypeError(f'expected RowUpdates, as center_rows returns, got {type(rows).__name__}')
    # A NumPy index is compared before JAX without x64 folds it to 32 bits.
    host = isinstance(rows.indices, np.ndarray)
    indices = as_array(rows.indices, 'the indices of RowUpdates', 'integers', np if host else jnp)
    values = check_floating(rows._values, 'the values of RowUpdates')
    guard, float_guard = jnp.asarray(rows._guard), jnp.asarray(rows._float_guard)
    integers = jnp.issubdtype(indices.dtype, jnp.integer) and jnp.issubdtype(guard.dtype, jnp.integer)
    if not integers or float_guard.dtype != FLOAT_GUARD.dtype:
        raise TypeError(
            f'RowUpdates were averaged, scaled or cast as if they were gradients: the indices are {type_name(indices)} '
            f'and a constant of float32 is {float_guard.dtype.name}. Keep them out of pmean, clipping, scaling and '
            'accumulation: put such transforms inside, with_centers(optax.chain(clip, adam)), and reduce the gradients '
            'of params alone'
        )
    if indices.ndim < 1 or values.shape[:-1] != indices.shape:
        raise ValueError(
            f'RowUpdates must have indices [N] and values [N, D], got {list(indices.shape)} and {list(values.shape)}'
        )
    first, second = FLOAT_GUARD[0]
    floats_unchanged = (float_guard[..., 0] == first) & (float_guard[..., 1] == second)
    unchanged = (guard == GUARD[0]).all(-1) & floats_unchanged.all(-1)
    index = jnp.where(unchanged[..., None], jnp.asarray(row_index(indices, num_rows)), DROPPED)
    values = values.astype(compute_dtype(values.dtype))
    scale = jnp.ones(index.shape, values.dtype) if rows._scale is None else jnp.asarray(rows._scale)
    return index, values, scale
