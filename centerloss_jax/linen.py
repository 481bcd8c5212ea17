"""The losses as Linen modules. Their tables are variable collections."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from centerloss_jax._inputs import AxisName, ReduceFn, check_features
from centerloss_jax._loss import center_loss_and_rows
from centerloss_jax._modules import call_loss, initial_table, small_normal
from centerloss_jax._rows import RowUpdates
from centerloss_jax._softmax_rows import margin_softmax_and_rows


class CenterLoss(nn.Module):
    """The center loss with its table of centers, for Flax Linen.

    The table is the variable 'centers' of the collection 'centers'. The module computes the loss and the rows; it does
    not move the centers, so the collection need not be mutable. Pass the rows to the optimizer in place of a gradient:
    `grads={'params': grads, 'centers': {'center': {'centers': rows}}}` for a module with the name 'center'. Inference
    needs neither the module nor the centers.

    The call takes the arguments of `centerloss_jax.center_loss_and_rows` without `centers`. D is taken from x at
    initialization.

    Attributes:
      num_classes: number of classes C of the dataset, not of a batch.
      centers_init: initializer `(key, [C, D], dtype) -> centers`, or None for zeros. It may box the centers, as
        `nn.with_partitioning` does. To start from class means, pass
        `lambda key, shape, dtype: class_statistics(...).mean.astype(dtype)`.
      dtype: dtype of the table. The loss is computed in float32 or wider.

    Returns:
      From the call, `(loss, rows)`: the loss, and RowUpdates for the optimizer.

    Raises:
      TypeError: from the call, for a wrong dtype. See `centerloss_jax.center_loss`. At initialization, if centers_init
        is no function or its centers are not floating point.
      ValueError: from the call, for a wrong shape or a label of C or more. At initialization, if num_classes is no
        integer of at least 1 or centers_init returns another shape.

    Example:
      >>> import centerloss_jax as clj
      >>> import jax, jax.numpy as jnp
      >>> center = clj.linen.CenterLoss(num_classes=3)
      >>> x, labels = jnp.array([[3.0, 4.0]]), jnp.array([1])
      >>> variables = center.init(jax.random.key(0), x, labels)
      >>> variables['centers']['centers'].shape
      (3, 2)
      >>> loss, rows = center.apply(variables, x, labels)
      >>> loss.item(), rows.values.tolist()
      (25.0, [[-3.0, -4.0]])

    References:
      Wen et al., ECCV 2016.
    """

    num_classes: int
    centers_init: Callable[..., Any] | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
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
        x = check_features(x)
        centers = self.variable('centers', 'centers', self._init_centers, x.shape[-1])
        return center_loss_and_rows(
            x, centers.value, labels, where=where, weights=weights, reduce_fn=reduce_fn, axis_name=axis_name
        )

    def _init_centers(self, num_features: int) -> Any:
        centers_init = nn.initializers.zeros if self.centers_init is None else self.centers_init
        key = self.make_rng('params')
        return initial_table(centers_init, key, self.num_classes, num_features, self.dtype, 'centers')


class SoftmaxLoss(nn.Module):
    """A softmax loss over many classes with its table, for Flax Linen.

    The table is the variable 'table' of the collection 'classifier'. The module computes the loss and the rows; it does
    not move the table, so the collection need not be mutable. Pass the rows to the optimizer in place of a gradient:
    `grads={'params': grads, 'centers': ..., 'classifier': {'softmax': {'table': rows}}}` for a module with the name
    'softmax' and the optimizer `with_centers(..., classifier=by_rows(...))`. Without centers, combine the optimizers by
    `optax.partition`.

    The call takes the arguments of loss_fn without `table`. D is taken from x at initialization.

    Attributes:
      num_classes: number of classes C of the dataset, not of a batch or a sample.
      loss_fn: `margin_softmax_and_rows`, `class_softmax_and_rows` or `distance_softmax_and_rows`, or a
        `functools.partial` of one that sets its numbers, such as a scale.
      table_init: initializer `(key, [C, D], dtype) -> table`, by default normal numbers of standard deviation 0.01. It
        may box the table, as `nn.with_partitioning` does. A zero row has no gradient in `margin_softmax_and_rows`.
      dtype: dtype of the table. The loss is computed in float32 or wider.

    Returns:
      From the call, `(loss, rows)`: the loss, and RowUpdates of the kind 'gradient' for the optimizer.

    Raises:
      TypeError: from the call, for a wrong dtype, or if loss_fn returns no rows. At initialization, if table_init is no
        function or its table is not floating point.
      ValueError: from the call, for a wrong shape, label, class or number. See
        `centerloss_jax.class_softmax_and_rows`. At initialization, if num_classes is no integer of at least 1 or
        table_init returns another shape.

    Example:
      >>> import centerloss_jax as clj
      >>> import jax, jax.numpy as jnp
      >>> softmax = clj.linen.SoftmaxLoss(num_classes=1000, loss_fn=clj.class_softmax_and_rows)
      >>> x, labels = jnp.array([[3.0, 4.0]]), jnp.array([7])
      >>> variables = softmax.init(jax.random.key(0), x, labels)
      >>> variables['classifier']['table'].shape
      (1000, 2)
      >>> loss, rows = softmax.apply(variables, x, labels, classes=jnp.array([7, 500]), weight=0.5)
      >>> rows.indices.tolist(), rows.values.shape
      ([7, 500], (2, 2))
    """

    num_classes: int
    loss_fn: Callable[..., Any] = margin_softmax_and_rows
    table_init: Callable[..., Any] = small_normal
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: ArrayLike, labels: ArrayLike | Sequence, **options: Any) -> tuple[Array, RowUpdates]:
        """Returns `loss_fn(x, table, labels, **options)` for the table `[C, D]` of the module."""
        x = check_features(x)
        table = self.variable('classifier', 'table', self._init_table, x.shape[-1])
        return call_loss(self.loss_fn, x, table.value, labels, options)

    def _init_table(self, num_features: int) -> Any:
        return initial_table(self.table_init, self.make_rng('params'), self.num_classes, num_features, self.dtype)
