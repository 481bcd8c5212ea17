"""The center loss, Eq. 2 of the paper, and the rows that its centers move by, the sum of Eq. 4."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from centerloss_jax._inputs import (
    DROPPED,
    IGNORED,
    AxisName,
    ReduceFn,
    check_axis_name,
    check_features,
    check_reduction,
    check_table,
    check_weights,
    class_index,
    compute_dtype,
    is_row,
)
from centerloss_jax._kernels import mean_square
from centerloss_jax._rows import RowUpdates
from centerloss_jax._sharding import flatten, take_rows


def center_loss(
    x: ArrayLike,
    centers: ArrayLike,
    labels: ArrayLike | Sequence,
    *,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    reduce_fn: ReduceFn | None = jnp.mean,
    axis_name: AxisName | None = None,
) -> Array:
    r"""Returns the mean squared distance of features to the center of their class.

    .. math:: L = \frac{1}{B} \sum_i \sum_d w_{id} (x_{id} - c_{y_i d})^2

    There is no factor 1/2, and the mean is over examples, not over feature dimensions. The difference is taken
    directly: nothing of size B x C is formed, and no square is expanded. float16 and bfloat16 inputs are computed in
    float32.

    An example is ignored if its label is negative or `where` is False. It enters neither the value nor the denominator
    of the mean nor any gradient, whatever it holds. If every example is ignored the loss is 0.

    `jax.grad` with respect to the centers is a dense `[C, D]` array, summed in the dtype of the centers. Its cost grows
    with C; that of `center_rows` does not.

    Args:
      x: features `[..., D]`, floating point.
      centers: one center for each class `[C, D]`, floating point.
      labels: classes `[...]`, integers of any dtype. A label of C or more is an error where its value is known; inside
        `jax.jit` the loss of that example is NaN and its gradient 0.
      where: bool, labels.shape; False ignores an example.
      weights: real numbers, labels.shape or x.shape, that multiply the squared differences. The mean still divides by
        the number of examples.
      reduce_fn: `jnp.mean` for the mean over the examples that are not ignored, `None` for the loss of each example, or
        a function such as `jnp.sum` that is called with the losses of all examples, 0 where ignored.
      axis_name: the axis of the surrounding `jax.pmap`, `jax.shard_map` or `jax.vmap`; with `reduce_fn=jnp.mean` only.
        Divides by the mean count over the devices, so that `jax.lax.pmean` of the result is the loss of the whole
        batch. Take it inside the function that is differentiated.

    Returns:
      A scalar, or labels.shape with `reduce_fn=None`; float32, or float64 where an input is.

    Raises:
      TypeError: if x or centers are not floating point, labels not integers, where not boolean, or reduce_fn no
        function.
      ValueError: if shapes do not fit, or a label whose value is known is C or more.
      NameError: if axis_name is not an axis that surrounds the call.

    Example:
      >>> import centerloss_jax as clj
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0], [0.0, 1.0], [2.0, 2.0]])
      >>> centers = jnp.array([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]])
      >>> clj.center_loss(x, centers, jnp.array([0, 2, 1, 0])).item()
      4.75
      >>> clj.center_loss(x, centers, jnp.array([0, 2, 1, -1]), reduce_fn=None).tolist()
      [5.0, 5.0, 1.0, 0.0]

    References:
      Wen, Zhang, Li and Qiao, "A Discriminative Feature Learning Approach for Deep Face Recognition", ECCV 2016, Eq. 2,
      which is `0.5 * center_loss(..., reduce_fn=jnp.sum)`.
    """
    return _loss_and_rows(x, centers, labels, where, weights, reduce_fn, axis_name)[0]


def center_rows(
    x: ArrayLike,
    centers: ArrayLike,
    labels: ArrayLike | Sequence,
    *,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> RowUpdates:
    r"""Returns the difference of each example's center and features, :math:`w_i (c_{y_i} - x_i)`, as rows of the table.

    `center_update` takes the rows in place of a gradient. Their cost grows with the batch and not with the table. They
    carry no gradient.

    Args:
      x: features `[..., D]`, floating point. See `center_loss`.
      centers: centers `[C, D]`, floating point. See `center_loss`.
      labels: classes `[...]`, integers. See `center_loss`.
      where: bool, labels.shape; False ignores an example.
      weights: real numbers, labels.shape or x.shape, that multiply the rows. They do not enter n_j of Eq. 4.

    Returns:
      RowUpdates of N rows of the kind 'centers', N the number of labels: indices int32 `[N]`, values `[N, D]` in
      float32 or wider. An ignored example has the index -1. Inside `jax.jit` a label of C or more has the largest int32
      as its index, and `center_update` counts it as dropped.

    Raises:
      TypeError: for a wrong dtype. See `center_loss`.
      ValueError: if shapes do not fit, or a label whose value is known is C or more.

    Example:
      >>> import centerloss_jax as clj
      >>> import jax.numpy as jnp
      >>> x, labels = jnp.array([[1.0, 2.0], [4.0, 4.0]]), jnp.array([2, -1])
      >>> rows = clj.center_rows(x, jnp.zeros((3, 2)), labels)
      >>> rows.indices.tolist(), rows.values[0].tolist()
      ([2, -1], [-1.0, -2.0])

    References:
      Wen et al., ECCV 2016, Eq. 4.
    """
    return _loss_and_rows(x, centers, labels, where, weights, None, None)[1]


def center_loss_and_rows(
    x: ArrayLike,
    centers: ArrayLike,
    labels: ArrayLike | Sequence,
    *,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    reduce_fn: ReduceFn | None = jnp.mean,
    axis_name: AxisName | None = None,
) -> tuple[Array, RowUpdates]:
    """Returns `center_loss` and `center_rows` from one gather of whole centers, for a training step.

    Args:
      x: features `[..., D]`, floating point. See `center_loss`.
      centers: centers `[C, D]`, floating point. See `center_loss`.
      labels: classes `[...]`, integers. See `center_loss`.
      where: bool, labels.shape; False ignores an example.
      weights: real numbers, labels.shape or x.shape, that multiply the squared differences and the rows.
      reduce_fn: reduction of the loss; it does not change the rows. See `center_loss`.
      axis_name: axis of the mean of the loss; it does not change the rows. See `center_loss`.

    Returns:
      `(loss, rows)`, both for the centers before the update, as Eq. 4 asks.

    Raises:
      TypeError: for a wrong dtype. See `center_loss`.
      ValueError: if shapes do not fit, or a label whose value is known is C or more.
      NameError: if axis_name is not an axis that surrounds the call.

    Example:
      >>> import centerloss_jax as clj
      >>> import jax, jax.numpy as jnp
      >>> x, centers, labels = jnp.array([[3.0, 4.0]]), jnp.zeros((3, 2)), jnp.array([2])
      >>> value_and_grad = jax.value_and_grad(clj.center_loss_and_rows, has_aux=True)
      >>> (loss, rows), grad = value_and_grad(x, centers, labels)
      >>> loss.item(), grad.tolist(), rows.values.tolist()
      (25.0, [[6.0, 8.0]], [[-3.0, -4.0]])

    References:
      Wen et al., ECCV 2016, Eq. 2 and 4.
    """
    return _loss_and_rows(x, centers, labels, where, weights, reduce_fn, axis_name)


def _loss_and_rows(
    x: ArrayLike,
    centers: ArrayLike,
    labels: ArrayLike | Sequence,
    where: ArrayLike | None,
    weights: ArrayLike | None,
    reduce_fn: ReduceFn | None,
    axis_name: AxisName | None,
) -> tuple[Array, RowUpdates]:
    """Computes both; under `jax.jit` XLA drops the one that is not used.

    Ignored examples are masked before the arithmetic, so that a NaN in one enters no value and no gradient.
    """
    check_reduction(reduce_fn, axis_name)
    check_axis_name(axis_name)
    centers = check_table(centers)
    x = check_features(x, centers.shape[1])
    dtype = compute_dtype(x.dtype, centers.dtype)

    index = class_index(labels, where, centers.shape[0], x.shape[:-1])
    index = _mark_padding(centers, index)
    counted, valid = index != IGNORED, is_row(index)
    own_center = take_rows(centers, jnp.where(valid, index, 0))

    count = jnp.sum(counted, dtype=jnp.int32).astype(dtype)
    if axis_name is not None:
        count = jax.lax.pmean(count, axis_name)
    count = jnp.where(count > 0, count, 1)

    if reduce_fn is jnp.mean and weights is None:
        # The default. It equals the general form below, but loss, gradient and rows share one [..., D] array.
        loss, gradient = mean_square(x, own_center, counted, valid, count)
        return loss, _as_rows(index, gradient, -count / 2)

    mask = valid[..., None]
    difference = jnp.where(mask, x.astype(dtype), 0) - jnp.where(mask, own_center.astype(dtype), 0)
    weight = 1 if weights is None else jnp.where(mask, check_weights(weights, x).astype(dtype), 0)
    squared = jnp.sum(weight * jnp.square(difference), axis=-1)
    per_example = jnp.where(counted & ~valid, jnp.nan, squared)
    if reduce_fn is jnp.mean:
        loss = jnp.sum(per_example) / count
    else:
        loss = per_example if reduce_fn is None else reduce_fn(per_example)
    return loss, _as_rows(index, weight * difference, -jnp.ones([], dtype))


def _mark_padding(centers: Array, index: Array) -> Array:
    """Returns the index with DROPPED for rows that pad the table for a mesh. Padding rows hold +Inf.

    The first number of a row is enough to tell. It is a gather of its own, since a slice of the gathered center would
    keep a `[..., D]` array, and it compares with Inf, since `jnp.isposinf` raises under `jax_debug_infs`.
    """
    valid = is_row(index)
    first = take_rows(centers[:, :1], jnp.where(valid, index, 0))[..., 0]
    return jnp.where(valid & (first == jnp.inf), DROPPED, index)


def _as_rows(index: Array, difference: Array, scale: Array) -> RowUpdates:
    """Returns rows of scale * difference, which carry no gradient."""
    values = flatten(jax.lax.stop_gradient(difference), index.ndim)
    scale = jnp.broadcast_to(scale, values.shape[:1])
    return RowUpdates(flatten(index, index.ndim), values, kind='centers', _scale=scale)
