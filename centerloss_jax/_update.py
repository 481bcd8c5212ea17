"""Eq. 4 of the paper as an optax transform: how centers move."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.core import Tracer
from jax.sharding import Mesh

from centerloss_jax._groups import class_sizes, sums_by_index
from centerloss_jax._lookup import MISTAKE, type_name
from centerloss_jax._mesh import check_axis_name, gather_devices, replicate
from centerloss_jax._rows import RowUpdates, checked, in_table
from centerloss_jax._scatter import squared_norm

Alpha = float | Array | optax.Schedule


class CenterUpdateState(NamedTuple):
    """State of `center_update`. No leaf grows with the number of classes.

    Attributes:
      count: int32 `[]`, number of steps taken.
      left_out: int32 `[]`, number of rows dropped since the start. Rows are dropped if they are not finite, if their
        label is C or more, or if arithmetic has changed them.
      step_norm: float32 `[]`, Euclidean norm of the last move of all centers together.

    Example:
      >>> import centerloss_jax as clj
      >>> import jax.numpy as jnp, optax
      >>> tx = clj.with_centers(optax.adam(1e-3))
      >>> state = tx.init({'params': jnp.zeros(4), 'centers': jnp.zeros((3, 2))})
      >>> optax.tree.get(state, 'step_norm').item()
      0.0
    """

    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]  # optax's name
    left_out: Array
    step_norm: Array


def center_update(
    alpha: Alpha = 0.5,
    *,
    axis_name: str | tuple[str, ...] | None = None,
    mesh: Mesh | None = None,
) -> optax.GradientTransformation:
    r"""Moves each center towards the mean of its own examples in the batch.

    .. math:: c_j \leftarrow c_j - \alpha \frac{\sum_{i: y_i = j} (c_j - x_i)}{1 + n_j}

    where n_j is the number of examples of class j in the batch. The step depends on no learning rate and on no loss
    weight. The factor that is left of the gap, :math:`1 - \alpha n / (1 + n)`, lies in (0, 1] for every n: no batch
    makes a center overshoot. A row that holds a NaN or an Inf is dropped as if its example were absent.

    Args:
      alpha: step in [0, 1], or an optax schedule: a function of the number of steps taken.
      axis_name: the axis of the surrounding `jax.pmap`, `jax.shard_map` or `jax.vmap`. The rows of all devices are
        gathered and n_j counts the global batch, so that every replica makes the move of one device with the whole
        batch. Without it replicas drift apart.
      mesh: under `jax.jit` over a mesh of Auto axes, the mesh, unless `jax.set_mesh` has set it. The rows are then
        replicated before they are scattered, which keeps the table from travelling. Explicit axes need neither.

    Returns:
      An `optax.GradientTransformation` from RowUpdates `[N, D]` to RowUpdates `[N, D]` (under axis_name, the N of all
      devices): those of one class add up to its move. Its state is `CenterUpdateState(count, left_out, step_norm)`.

    Raises:
      ValueError: if alpha is a number outside [0, 1].
      TypeError: if alpha is no number and no schedule; from `update`, if it is given anything but RowUpdates, or rows
        that were averaged or scaled.
      NameError: from `update`, if axis_name is not an axis that surrounds the call.

    Example:
      >>> import centerloss_jax as clj
      >>> import jax.numpy as jnp, optax
      >>> centers = jnp.zeros((3, 2))
      >>> tx = clj.center_update(alpha=1.0)
      >>> state = tx.init(centers)
      >>> rows = clj.center_rows(jnp.array([[4.0, 2.0]]), centers, jnp.array([1]))
      >>> updates, state = tx.update(rows, state, centers)
      >>> optax.apply_updates(centers, updates).tolist()
      [[0.0, 0.0], [2.0, 1.0], [0.0, 0.0]]

    References:
      Wen et al., ECCV 2016, Eq. 4.
    """
    if not callable(alpha) and (jnp.ndim(alpha) != 0 or isinstance(alpha, str)):
        raise TypeError(f'alpha must be a number in [0, 1] or an optax schedule, got {alpha!r}')
    if not callable(alpha) and not isinstance(alpha, Tracer) and not 0 <= alpha <= 1:
        raise ValueError(f'alpha must be in [0, 1] or an optax schedule, got {alpha}')

    def init(params: optax.Params) -> CenterUpdateState:
        del params
        return CenterUpdateState(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32), jnp.zeros([], jnp.float32))

    def update(updates, state, params=None):
        leaves, treedef = jax.tree.flatten(updates, is_leaf=lambda leaf: isinstance(leaf, RowUpdates))
        for leaf in leaves or [None]:
            if not isinstance(leaf, RowUpdates):
                got = 'nothing' if leaf is None else type_name(leaf) if hasattr(leaf, 'dtype') else type(leaf).__name__
                raise TypeError(
                    'center_update takes RowUpdates in the place of a gradient for the centers: pass the rows that '
                    f'center_loss_and_rows, center_rows or CenterLoss return, got {got}. Transforms that accumulate or '
                    'average, such as optax.MultiSteps, go inside with_centers'
                )
        if axis_name is not None:
            check_axis_name(axis_name)
        rate = alpha(state.count) if callable(alpha) else alpha
        tables = [None] * len(leaves) if params is None else treedef.flatten_up_to(params)
        moves = [_move(rows, table, rate, axis_name, mesh) for rows, table in zip(leaves, tables, strict=True)]
        rows, left_out, squares = zip(*moves, strict=True)
        return treedef.unflatten(rows), CenterUpdateState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            left_out=state.left_out + sum(left_out),
            step_norm=jnp.sqrt(sum(squares)).astype(jnp.float32),
        )

    return optax.GradientTransformation(init, update)


def _move(rows, table, rate, axis_name, mesh) -> tuple[RowUpdates, Array, Array]:
    indices, values, scale = checked(rows, table)
    if axis_name is not None:
        indices, values, scale = (gather_devices(a, axis_name) for a in (indices, values, scale))
    indices, values, scale = replicate((indices, values, scale), mesh)
    # The loss has squared the values already, and a compiler does it once.
    squares = jnp.square(scale) * jnp.sum(jnp.square(values), axis=-1)
    finite = jax.lax.platform_dependent(values, scale, squares, cpu=_finite_by_squares, default=_finite)
    usable = (indices >= 0) & (indices < MISTAKE) & finite
    left_out = jnp.sum((indices >= 0) & ~usable, dtype=jnp.int32)
    indices = jnp.where(usable, indices, MISTAKE)
    num_classes = None if table is None else table.shape[0]
    # As `table + rows` names them, so that a compiler sorts and sums once for all.
    names, _, _ = in_table(RowUpdates(indices, values), table)
    rate = jnp.asarray(rate, values.dtype)
    factor = jnp.where(usable, -rate / (1 + class_sizes(names, num_classes, values.size).astype(values.dtype)), 0)
    # Scaled before they are summed, so that many large rows of one class stay finite.
    scale = jnp.where(usable, factor * scale, 0)

    if rows.scale is None or indices.size == 0:
        names, total = sums_by_index(names, values, scale)
        return RowUpdates(names, total), left_out, jnp.sum(jnp.square(total))
    square = squared_norm(names, values, scale, jnp.square(factor) * squares, num_classes)
    return RowUpdates(indices, values, scale=scale), left_out, square


def _finite(values: Array, scale: Array, squares: Array) -> Array:
    del squares
    return jnp.isfinite(scale[:, None] * values).all(axis=-1)


def _finite_by_squares(values: Array, scale: Array, squares: Array) -> Array:
    """The same: only where a square is not finite is it worth a pass over the values."""
    finite = jnp.isfinite(squares)
    return jax.lax.cond(finite.all(), lambda *_: finite, _finite, values, scale, squares)
