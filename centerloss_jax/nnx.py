"""CenterLoss as an nnx.Module, with its centers as a Variable of a type of their own."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from centerloss_jax._inputs import AxisName, ReduceFn
from centerloss_jax._loss import center_loss_and_rows
from centerloss_jax._rows import RowUpdates


class Centers(nnx.Variable):
    """The type of a center table, so that filters tell it from parameters: `wrt=(nnx.Param, Centers)`."""


class CenterLoss(nnx.Module):
    """The center loss with its table of centers, for Flax NNX.

    The module computes; it does not move the centers. Its rows go to the optimizer in the place of a gradient, as
    `grads.center = {'centers': Centers(rows)}`, with an `nnx.Optimizer` of `with_centers` and
    `wrt=(nnx.Param, Centers)`. At inference simply do not call it.

    Args:
      num_classes: number of classes C of the data, not of a batch.
      num_features: number of feature dimensions D.
      centers_init: initializer `(key, [C, D], dtype) -> centers`; zeros by default. To start from class means pass
        `lambda key, shape, dtype: class_statistics(...).mean.astype(dtype)`.
      dtype: of the table, float32 by default. The loss is computed in float32 at least.
      rngs: source of the initializer's key.

    Attributes:
      centers: `Centers` variable `[C, D]`.

    Example:
      >>> import centerloss_jax as clj
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> center = clj.nnx.CenterLoss(num_classes=3, num_features=2, rngs=nnx.Rngs(0))
      >>> loss, rows = center(jnp.array([[3.0, 4.0]]), jnp.array([1]))
      >>> loss.item(), rows.values.tolist()
      (25.0, [[-3.0, -4.0]])

    Raises:
      ValueError: if num_classes or num_features is below 1.

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
        if num_classes < 1 or num_features < 1:
            raise ValueError(f'num_classes and num_features must be at least 1, got {num_classes} and {num_features}')
        self.centers = Centers(centers_init(rngs.params(), (num_classes, num_features), dtype))

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
        """`center_loss_and_rows` with the module's centers."""
        return center_loss_and_rows(
            x,
            self.centers[...],
            labels,
            where=where,
            weights=weights,
            reduce_fn=reduce_fn,
            axis_name=axis_name,
        )
