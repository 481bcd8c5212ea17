"""The losses as NNX modules. Their tables are Variables of the types `Centers` and `Table`."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from centerloss_jax._inputs import AxisName, ReduceFn
from centerloss_jax._loss import center_loss_and_rows
from centerloss_jax._modules import call_loss, initial_table, small_normal
from centerloss_jax._rows import RowUpdates
from centerloss_jax._softmax_rows import margin_softmax_and_rows


class Centers(nnx.Variable):
    """Variable type of a table of centers. Filters distinguish it from parameters by this type.

    Args:
      value: `[C, D]` centers in a model, or RowUpdates in the gradients of one.

    Example:
      >>> import centerloss_jax as clj
      >>> from flax import nnx
      >>> center = clj.nnx.CenterLoss(num_classes=3, num_features=2, rngs=nnx.Rngs(0))
      >>> nnx.state(center, clj.nnx.Centers)['centers'][...].shape
      (3, 2)
    """


class Table(nnx.Variable):
    """Variable type of a table that `by_rows` moves: a classifier or an embedding whose gradient is rows.

    Args:
      value: `[C, D]` table in a model, or RowUpdates of the kind 'gradient' in the gradients of one.

    Example:
      >>> import centerloss_jax as clj
      >>> import jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> class Model(nnx.Module):
      ...     def __init__(self):
      ...         self.table = clj.nnx.Table(jnp.zeros((3, 2)))
      >>> optimizer = nnx.Optimizer(Model(), clj.by_rows(optax.adam(1e-3)), wrt=clj.nnx.Table)
    """


# A Linen model that nnx.bridge.ToNNX wraps has its tables in variables of these types too.
nnx.register_variable_name('centers', Centers)
nnx.register_variable_name('classifier', Table)


class CenterLoss(nnx.Module):
    """The center loss with its table of centers, for Flax NNX.

    The module computes the loss and the rows; it does not move the centers. Pass the rows to the optimizer in place of
    a gradient: `grads.center = {'centers': Centers(rows)}`. The optimizer is an `nnx.Optimizer` of
    `centerloss_jax.with_centers` with `wrt=(nnx.Param, Centers)`. Inference does not call the module.

    The call takes the arguments of `centerloss_jax.center_loss_and_rows` without `centers`.

    Args:
      num_classes: number of classes C of the dataset, not of a batch.
      num_features: number of feature dimensions D.
      centers_init: initializer `(key, [C, D], dtype) -> centers`. To start from class means, pass
        `lambda key, shape, dtype: class_statistics(...).mean.astype(dtype)`.
      dtype: dtype of the table. The loss is computed in float32 or wider.
      rngs: source of the initializer's key.

    Attributes:
      centers: `Centers` variable `[C, D]`.

    Returns:
      From the call, `(loss, rows)`: the loss, and RowUpdates for the optimizer.

    Raises:
      TypeError: if rngs are no nnx.Rngs, centers_init is no function or its centers are not floating point; from the
        call, for a wrong dtype. See `centerloss_jax.center_loss`.
      ValueError: if num_classes or num_features is no integer of at least 1, or centers_init returns another shape;
        from the call, for a wrong shape or a label of C or more.

    Example:
      >>> import centerloss_jax as clj
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> center = clj.nnx.CenterLoss(num_classes=3, num_features=2, rngs=nnx.Rngs(0))
      >>> loss, rows = center(jnp.array([[3.0, 4.0]]), jnp.array([1]))
      >>> loss.item(), rows.values.tolist()
      (25.0, [[-3.0, -4.0]])

    References:
      Wen et al., ECCV 2016.
    """

    def __init__(
        self,
        num_classes: int,
        num_features: int,
        *,
        centers_init: Callable[..., Array] = nnx.initializers.zeros,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        table = initial_table(centers_init, _key(rngs), num_classes, num_features, dtype, 'centers')
        self.centers = Centers(table)

    def __call__(
        self,
        x: ArrayLike,
        labels: ArrayLike | Sequence,
        *,
        where: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        reduce_fn: ReduceFn | None = jnp.mean,
        axis_name: AxisName | None = None,
    ) -> tuple[Array, RowUpdates]:
        """Returns `center_loss_and_rows` for the centers `[C, D]` of the module."""
        return center_loss_and_rows(
            x,
            self.centers[...],
            labels,
            where=where,
            weights=weights,
            reduce_fn=reduce_fn,
            axis_name=axis_name,
        )


class SoftmaxLoss(nnx.Module):
    """A softmax loss over many classes with its table, for Flax NNX.

    The module computes the loss and the rows; it does not move the table. Pass the rows to the optimizer in place of a
    gradient: `grads.softmax = {'table': Table(rows)}` for a module with the name 'softmax'. The optimizer is an
    `nnx.Optimizer` of `centerloss_jax.with_centers(..., classifier=by_rows(...))` with
    `wrt=(nnx.Param, Centers, Table)`.

    The call takes the arguments of loss_fn without `table`.

    Args:
      num_classes: number of classes C of the dataset, not of a batch or a sample.
      num_features: number of feature dimensions D.
      loss_fn: `margin_softmax_and_rows`, `class_softmax_and_rows` or `distance_softmax_and_rows`, or a
        `functools.partial` of one that sets its numbers, such as a scale.
      table_init: initializer `(key, [C, D], dtype) -> table`, by default normal numbers of standard deviation 0.01. A
        zero row has no gradient in `margin_softmax_and_rows`.
      dtype: dtype of the table. The loss is computed in float32 or wider.
      rngs: source of the initializer's key.

    Attributes:
      table: `Table` variable `[C, D]`.

    Returns:
      From the call, `(loss, rows)`: the loss, and RowUpdates of the kind 'gradient' for the optimizer.

    Raises:
      TypeError: if rngs are no nnx.Rngs, table_init is no function or its table is not floating point; from the call,
        for a wrong dtype, or if loss_fn returns no rows.
      ValueError: if num_classes or num_features is no integer of at least 1, or table_init returns another shape; from
        the call, for a wrong shape, label, class or number. See `centerloss_jax.class_softmax_and_rows`.

    Example:
      >>> import centerloss_jax as clj
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> softmax = clj.nnx.SoftmaxLoss(1000, 2, loss_fn=clj.class_softmax_and_rows, rngs=nnx.Rngs(0))
      >>> x, labels = jnp.array([[3.0, 4.0]]), jnp.array([7])
      >>> loss, rows = softmax(x, labels, classes=jnp.array([7, 500]), weight=0.5)
      >>> rows.indices.tolist(), rows.values.shape
      ([7, 500], (2, 2))
    """

    def __init__(
        self,
        num_classes: int,
        num_features: int,
        *,
        loss_fn: Callable[..., Any] = margin_softmax_and_rows,
        table_init: Callable[..., Any] = small_normal,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.table = Table(initial_table(table_init, _key(rngs), num_classes, num_features, dtype))
        self.loss_fn = loss_fn

    def __call__(self, x: ArrayLike, labels: ArrayLike | Sequence, **options: Any) -> tuple[Array, RowUpdates]:
        """Returns `loss_fn(x, table, labels, **options)` for the table `[C, D]` of the module."""
        return call_loss(self.loss_fn, x, self.table[...], labels, options)


def _key(rngs: nnx.Rngs) -> Array:
    if not isinstance(rngs, nnx.Rngs):
        raise TypeError(f'rngs must be nnx.Rngs, such as nnx.Rngs(0), got {rngs!r}')
    return rngs.params()
