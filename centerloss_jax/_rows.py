"""RowUpdates: a change to a few rows of a table, in the place of a gradient of the table's size."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from centerloss_jax._inputs import DROPPED, check_table, compute_dtype, row_index, type_name
from centerloss_jax._kernels import add_class_sums, unique_sums
from centerloss_jax._sharding import add_rows, replicate, set_rows, take_rows

# Odd, large and negative: no sum, multiple, square, sign or clip of it is itself, as it would be for 1.
GUARD = -700_000_001


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(eq=False, init=False)
class RowUpdates:
    r"""A sparse `[C, D]` array that stands where a gradient or an update of a table would.

    `table + rows` adds the values to the rows of the table, :math:`t_{k_i} \leftarrow t_{k_i} + v_i`, in place where
    the step donates the table. `optax.apply_updates` computes that sum for each leaf of the parameters, so optax's
    optimizers and Flax's train states take rows for a table of centers unchanged. A row with a negative index, or with
    one beyond the table, is dropped.

    Rows are not gradients. The sum of two RowUpdates, over devices or over passes, would name other classes, since it
    adds the indices. A private constant detects this: such rows move nothing, and `center_update` counts them. A mean
    or a scaled copy is a TypeError. Reduce, clip and accumulate inside `with_centers`, and join the rows of several
    passes by `concatenate_rows`.

    Attributes:
      indices: integers `[N]`, rows of the table.
      values: floating point `[N, D]`, what is added to them.

    Raises:
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
    _guard: ArrayLike  # int32 [], GUARD until arithmetic on the rows changes it
    _scale: ArrayLike | None  # [N], or None for ones

    def __init__(
        self,
        indices: ArrayLike,
        values: ArrayLike,
        *,
        _guard: ArrayLike = np.int32(GUARD),  # noqa: B008
        _scale: ArrayLike | None = None,
    ):
        self.indices, self._values, self._guard, self._scale = indices, values, _guard, _scale

    @property
    def values(self) -> ArrayLike:
        return self._values if self._scale is None else jnp.asarray(self._scale)[:, None] * self._values

    def tree_flatten_with_keys(self):
        names = 'indices', '_values', '_guard', '_scale'
        return [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in names], None

    @classmethod
    def tree_unflatten(cls, _, leaves):
        indices, values, guard, scale = leaves
        return cls(indices, values, _guard=guard, _scale=scale)

    # Without it a NumPy table would add the rows elementwise by itself.
    __array_ufunc__ = None

    def __radd__(self, table: ArrayLike) -> Array:
        if not isinstance(table, (jax.Array, np.ndarray)):
            return NotImplemented
        table = check_table(table, 'the table')
        index, values, scale = replicate(resolve(self, table))
        if compute_dtype(table.dtype) != table.dtype:
            # In a narrow dtype each addition rounds: sum the rows of a class in float32 and round once.
            unique, sums = unique_sums(index, values, scale)
            old = take_rows(table, jnp.where(unique < table.shape[0], unique, 0))
            return set_rows(table, unique, (old + sums).astype(table.dtype))
        if self._scale is None or index.size == 0:
            return add_rows(table, index, values.astype(table.dtype))
        return add_class_sums(table, index, values, scale)


def concatenate_rows(*rows: RowUpdates) -> RowUpdates:
    """Joins the rows of several passes over one table into one update.

    `center_update` then counts the examples of a class over all of them, as if they had been one batch.

    Args:
      *rows: RowUpdates of `[N_k, D]` with one D.

    Returns:
      RowUpdates of the sum of N_k rows.

    Raises:
      TypeError: if an argument is not RowUpdates, or its rows were scaled or averaged.
      ValueError: if there are none, or D differs.

    Example:
      >>> import centerloss_jax as clj
      >>> import jax.numpy as jnp
      >>> rows = clj.RowUpdates(jnp.array([1]), jnp.ones((1, 2)))
      >>> clj.concatenate_rows(rows, rows).indices.tolist()
      [1, 1]
    """
    if not rows:
        raise ValueError('concatenate_rows needs at least one RowUpdates')
    parts = [resolve(part) for part in rows]
    widths = sorted({values.shape[1] for _, values, _ in parts})
    if len(widths) > 1:
        raise ValueError(f'rows must belong to one table, got values of {widths} features')
    index, values, scale = (jnp.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return RowUpdates(index, values, _scale=None if all(part._scale is None for part in rows) else scale)


def resolve(rows: RowUpdates, table: Array | None = None) -> tuple[Array, Array, Array]:
    """Checks rows and returns their index, values in float32 or wider, and scale.

    The index is int32 `[N]`: a row of the table, IGNORED, or DROPPED where it is beyond the table or arithmetic has
    changed it.
    """
    if not isinstance(rows, RowUpdates):
        raise TypeError(f'expected RowUpdates, as center_rows returns, got {type(rows).__name__}')
    indices = rows.indices if isinstance(rows.indices, np.ndarray) else jnp.asarray(rows.indices)
    values, guard = jnp.asarray(rows._values), jnp.asarray(rows._guard)
    if not jnp.issubdtype(indices.dtype, jnp.integer) or not jnp.issubdtype(guard.dtype, jnp.integer):
        raise TypeError(
            f'the indices of RowUpdates must be integers, got {type_name(indices)}: rows are not gradients, and these '
            'were averaged or scaled as if they were. Keep them out of pmean, clipping, scaling and accumulation: put '
            'such transforms inside, with_centers(optax.chain(clip, adam)), and reduce the gradients of params alone'
        )
    if indices.ndim != 1 or values.ndim != 2 or indices.shape[0] != values.shape[0]:
        raise ValueError(
            f'RowUpdates must have indices [N] and values [N, D], got {list(indices.shape)} and {list(values.shape)}'
        )
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise TypeError(f'the values of RowUpdates must be floating point, got {type_name(values)}')
    num_rows = DROPPED
    if table is not None:
        num_rows, width = table.shape
        if values.shape[1] != width:
            raise ValueError(f'rows of {values.shape[1]} features cannot be added to a table {list(table.shape)}')
    index = jnp.where(guard == GUARD, jnp.asarray(row_index(indices, num_rows)), DROPPED)
    values = values.astype(compute_dtype(values.dtype))
    scale = jnp.ones(index.shape, values.dtype) if rows._scale is None else jnp.asarray(rows._scale)
    return index, values, scale
