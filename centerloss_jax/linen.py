"""The center loss as a Linen module. Its centers are a variable collection."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from centerloss_jax._inputs import AxisName, ReduceFn, check_features, initial_centers
from centerloss_jax._loss import center_loss_and_rows
from centerloss_jax._rows import RowUpdates


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
        return initial_centers(centers_init, self.make_rng('params'), self.num_classes, num_features, self.dtype)
