"""Eq. 4 of the paper as an optax transform: how centers move."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.core import meta
from jax import Array, export
from jax.sharding import Mesh

from centerloss_jax._inputs import (
    DROPPED,
    AxisName,
    alpha_at,
    at_most,
    check_alpha,
    check_axis_name,
    check_mesh,
)
from centerloss_jax._kernels import class_sizes, class_sums, squared_norm_of_sums
from centerloss_jax._rows import RowUpdates, check_rows, gather_finite, resolve_for_scatter

Alpha = float | Array | optax.Schedule


class CenterUpdateState(NamedTuple):
    """State of `center_update`. No leaf grows with the number of classes.

    Attributes:
      count: int32 `[]`, number of steps taken.
      dropped: int32 `[]`, number of rows dropped since the start. Rows are dropped if they or their squared norm are
        not finite, if their label is C or more, or if arithmetic has changed them.
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
    dropped: Array
    step_norm: Array


export.register_namedtuple_serialization(CenterUpdateState, serialized_name='centerloss_jax.CenterUpdateState')


def center_update(
    alpha: Alpha = 0.5, *, axis_name: AxisName | None = None, mesh: Mesh | None = None
) -> optax.GradientTransformation:
    r"""Moves each center towards the mean of its own examples in the batch.

    .. math:: c_j \leftarrow c_j - \alpha \frac{\sum_{i: y_i = j} (c_j - x_i)}{1 + n_j}

    where n_j is the number of examples of class j in the batch. The step depends on no learning rate and on no loss
    weight. A step leaves the factor :math:`1 - \alpha n / (1 + n)` of the gap between a center and the mean of its
    examples. Without weights, or with weights in [0, 1], the factor lies in (0, 1] for every n, so that no batch makes
    a center overshoot.

    A row is dropped, as if its example were absent, if it holds a NaN or an Inf or if its squared norm overflows the
    dtype of the computation (features of 2e19 in float32).

    Args:
      alpha: step in [0, 1], or an optax schedule: a function of the number of steps taken.
      axis_name: the axis of the surrounding `jax.pmap`, `jax.shard_map` or `jax.vmap`. The rows of all devices are
        gathered and n_j counts the global batch, so that every replica makes the move of one device with the whole
        batch. Without it replicas drift apart.
      mesh: the mesh of Auto axes under `jax.jit`. It is not needed where `jax.set_mesh` has set it, nor on Explicit
        axes. The rows are replicated before they are scattered, so that no table moves between devices.

    Returns:
      An `optax.GradientTransformation` from RowUpdates `[N, D]` to RowUpdates that move the centers: one row for each
      class where C <= N, else one for each example. Its state is `CenterUpdateState(count, dropped, step_norm)`.

    Raises:
      ValueError: if alpha is a number outside [0, 1].
      TypeError: if alpha is no number and no schedule, or mesh no mesh; from `update`, if a schedule returns no number,
        if it is given anything but RowUpdates, rows of a gradient, or rows that were averaged or scaled.
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
    check_alpha(alpha)
    check_mesh(mesh)

    def init(params: optax.Params) -> CenterUpdateState:
        del params
        return CenterUpdateState(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32), jnp.zeros([], jnp.float32))

    def update(updates, state, params=None):
        check_axis_name(axis_name)
        leaves, treedef = jax.tree.flatten(updates, is_leaf=lambda leaf: isinstance(leaf, RowUpdates))
        check_rows(leaves, 'center_update', 'centers', 'the rows of center_loss_and_rows, center_rows or CenterLoss')
        alpha_now = alpha_at(alpha, state.count)
        boxes = [None] * len(leaves) if params is None else treedef.flatten_up_to(params)
        tables = meta.unbox(boxes)  # a table may be boxed with the names of its axes, as by nn.with_partitioning
        moves = [_move(rows, table, alpha_now, axis_name, mesh) for rows, table in zip(leaves, tables, strict=True)]
        rows, dropped, squared_norm = zip(*moves, strict=True)
        rows = [_in_box(box, update) for box, update in zip(boxes, rows, strict=True)]
        return treedef.unflatten(rows), CenterUpdateState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            dropped=state.dropped + sum(dropped),
            step_norm=jnp.sqrt(sum(squared_norm)).astype(jnp.float32),
        )

    return optax.GradientTransformation(init, update)


def _move(rows: RowUpdates, table: Array | None, alpha: Any, axis_name: AxisName | None, mesh: Mesh | None):
    """Returns the moves of one table's centers, the number of dropped rows, and the squared norm of all moves."""
    index, values, scale, norms, dropped = gather_finite(rows, table, axis_name, mesh)  # scale * values = c - x

    # Computed exactly as `table + rows` will, so that XLA shares the sort.
    scatter_index, _, _ = resolve_for_scatter(RowUpdates(index, values), table)
    num_classes = None if table is None else table.shape[0]
    n = class_sizes(scatter_index, num_classes, values.shape[1]).astype(values.dtype)
    factor = jnp.where(index == DROPPED, 0, -jnp.asarray(alpha, values.dtype) / (1 + n))
    scale = factor * scale  # -alpha (c - x) / (1 + n), before the sum, so that many large rows stay finite

    if at_most(num_classes, index.size):
        unique, sums = class_sums(scatter_index, values, scale, num_classes)
        return RowUpdates(unique, sums, kind=rows.kind), dropped, jnp.sum(jnp.square(sums))
    squared_norm = squared_norm_of_sums(scatter_index, values, scale, jnp.square(factor) * norms, num_classes)
    return RowUpdates(index, values, kind=rows.kind, _scale=scale), dropped, squared_norm


def _in_box(box: Any, rows: RowUpdates) -> Any:
    return box.replace_boxed(rows) if isinstance(box, meta.AxisMetadata) else rows
