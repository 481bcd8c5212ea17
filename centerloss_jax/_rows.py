"""RowUpdates: a change to a few rows of a table, in the place of a gradient of the table's size."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from centerloss_jax._groups import sums_by_index
from centerloss_jax._lookup import MISTAKE, check_table, type_name, wide
from centerloss_jax._mesh import add_rows, replicate, set_rows, take_rows
from centerloss_jax._scatter import add_scaled_rows

# Odd, large and negative: no sum, multiple, square, sign or clip of it is itself, as it would be for 1.
GUARD = -700_000_001


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(eq=False, init=False)
class RowUpdates:
    r"""A sparse `[C, D]` array that stands where a gradient or an update of a table would.

    `table + rows` scatters the rows into the table, :math:`t_{k_i} \leftarrow t_{k_i} + v_i`, in place where the step
    donates the table. `optax.apply_updates` computes just that for each leaf of the parameters, so stock optimizers and
    train states take rows for a center table unchanged. A row with a negative index, or with one beyond the table, is
    dropped.

    Rows are not gradients. Summed over devices or with another pass, or clipped, their indices would name other
    classes. The third field shows that, and such rows are dropped, and counted by `center_update`; a mean or a scaled
    copy is a TypeError. Reduce, clip and accumulate inside `with_centers` instead, and join the rows of several passes
    by `concatenate_rows`.

    Attributes:
      indices: integers `[N]`, rows of the table.
      values: floating point `[N, D]`.

    The rest is not for users. `guard` int32 `[]` is a constant, and arithmetic on the rows makes it something else.
    `unscaled` `[N, D]` and `scale` `[N]`, or None for ones, have the values as their product: on a CPU a fresh [N, D]
    array costs more than its arithmetic, so the gradient of the loss, the rows and the move share one, up to a factor.

    Example:
      >>> import centerloss_jax as clj
      >>> import jax.numpy as jnp
      >>> rows = clj.RowUpdates(jnp.array([1, 1]), jnp.array([[1.0, 2.0], [3.0, 4.0]]))
      >>> (jnp.zeros((3, 2)) + rows).tolist()
      [[0.0, 0.0], [4.0, 6.0], [0.0, 0.0]]
    """

    indices: ArrayLike
    unscaled: ArrayLike
    guard: ArrayLike
    scale: ArrayLike | None

    def __init__(
        self,
        indices: ArrayLike,
        values: ArrayLike,
        *,
        guard: ArrayLike = np.int32(GUARD),  # noqa: B008
        scale: ArrayLike | None = None,
    ):
        self.indices, self.unscaled, self.guard, self.scale = indices, values, guard, scale

    @property
    def values(self) -> ArrayLike:
        return self.unscaled if self.scale is None else jnp.asarray(self.scale)[:, None] * self.unscaled

    def tree_flatten_with_keys(self):
        names = 'indices', 'unscaled', 'guard', 'scale'
        return [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in names], None

    @classmethod
    def tree_unflatten(cls, _, leaves):
        indices, unscaled, guard, scale = leaves
        return cls(indices, unscaled, guard=guard, scale=scale)

    # Without it a NumPy table would add the rows up elementwise by itself.
    __array_ufunc__ = None

    def __radd__(self, table: ArrayLike) -> Array:
        if not isinstance(table, (jax.Array, np.ndarray)):
            return NotImplemented
        table = check_table(table, 'the table')
        indices, values, scale = replicate(in_table(self, table))
        if wide(table.dtype) == table.dtype:
            if self.scale is None or indices.size == 0:
                return add_rows(table, indices, values.astype(table.dtype))
            return add_scaled_rows(table, indices, values, scale)
        # In a narrow dtype each addition rounds: sum a class's rows first, in float32, and round once.
        indices, values = sums_by_index(indices, values, scale)
        old = take_rows(table, jnp.where(indices < table.shape[0], indices, 0))
        return set_rows(table, indices, (old + values).astype(table.dtype))


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
    parts = [checked(part) for part in rows]
    widths = sorted({values.shape[1] for _, values, _ in parts})
    if len(widths) > 1:
        raise ValueError(f'rows must belong to one table, got values of {widths} features')
    indices, values, scale = (jnp.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return RowUpdates(indices, values, scale=None if all(part.scale is None for part in rows) else scale)


def in_table(rows: RowUpdates, table: Array | None) -> tuple[Array, Array, Array]:
    """As `checked`, and the indices of rows that are left out are MISTAKE too."""
    indices, values, scale = checked(rows, table)
    return jnp.where(indices < 0, MISTAKE, indices), values, scale


def checked(rows: RowUpdates, table: Array | None = None) -> tuple[Array, Array, Array]:
    """Indices as int32, unscaled values in float32 or wider, and their scale.

    Indices that name no row of the table are MISTAKE.
    """
    if not isinstance(rows, RowUpdates):
        raise TypeError(f'expected RowUpdates, as center_rows returns, got {type(rows).__name__}')
    indices, values, guard = jnp.asarray(rows.indices), jnp.asarray(rows.unscaled), jnp.asarray(rows.guard)
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
    num_classes = MISTAKE
    if table is not None:
        num_classes, width = table.shape
        if values.shape[1] != width:
            raise ValueError(f'rows of {values.shape[1]} features cannot be added to a table {list(table.shape)}')
    whole = (guard == GUARD) & (indices < num_classes if num_classes <= jnp.iinfo(indices.dtype).max else True)
    narrow = jnp.where(indices >= 0, jnp.where(whole, indices, 0).astype(jnp.int32), -1)
    values = values.astype(wide(values.dtype))
    scale = jnp.ones(indices.shape, values.dtype) if rows.scale is None else jnp.asarray(rows.scale)
    return jnp.where(whole, narrow, MISTAKE), values, scale
