"""The center loss, and the rows that its centers move by."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from centerloss_jax._lookup import Examples, examples, wide
from centerloss_jax._mesh import check_axis_name
from centerloss_jax._rows import RowUpdates

ReduceFn = Callable[[Array], Array]
AxisName = str | tuple[str, ...]


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
    r"""Mean squared distance of features to the center of their own class.

    .. math:: L = \frac{1}{B} \sum_i \sum_d w_{id} (x_{id} - c_{y_i d})^2

    There is no factor 1/2, and the mean is over examples, not over feature dimensions. The difference is taken
    directly: nothing of size B x C is formed, and no square is expanded. float16 and bfloat16 inputs are computed in
    float32.

    An example is *left out* where its label is negative or `where` is False: of the value, of the mean's denominator
    and of every gradient, whatever it holds. If nothing is counted the loss is 0.

    `jax.grad` with respect to the centers is a dense `[C, D]` array, summed in the dtype of the centers; `center_rows`
    is what scales.

    Args:
      x: features `[..., D]`, floating point.
      centers: one center a class `[C, D]`, floating point.
      labels: classes `[...]`, integers of any dtype. A label of C or more is a mistake: an error where the labels are
        concrete; inside `jax.jit` that example's value is NaN and its gradient 0.
      where: bool, labels.shape; False leaves an example out.
      weights: real numbers, labels.shape or x.shape, that multiply the squared differences. The mean still divides by
        the number of examples.
      reduce_fn: `jnp.mean` (over the examples that count), `None` for the loss of each example, or a function that is
        called with them all, 0 for those left out, such as `jnp.sum`.
      axis_name: the axis of the surrounding `jax.pmap`, `jax.shard_map` or `jax.vmap`, with `jnp.mean` alone. The
        denominator is then the mean count over the devices, so that `jax.lax.pmean` of this loss, taken inside the
        function that is differentiated, is the loss of the whole batch.

    Returns:
      A scalar, or labels.shape with `reduce_fn=None`; float32, or float64 where an input is.

    Raises:
      TypeError: if x or centers are not floating point, labels not integers, where not boolean,
        or reduce_fn no function.
      ValueError: if shapes do not fit, or a concrete label is C or more.
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
    return _reduce(examples(x, centers, labels, where, weights), reduce_fn, axis_name)


def center_rows(
    x: ArrayLike,
    centers: ArrayLike,
    labels: ArrayLike | Sequence,
    *,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> RowUpdates:
    r"""The difference of each example's center to its features, :math:`w_i (c_{y_i} - x_i)`, as rows of the table.

    This is what `center_update` takes in place of a gradient. It costs what the batch holds, not what the table holds,
    and carries no gradient itself.

    Args:
      x: features `[..., D]`, as for `center_loss`, and so for the others.
      centers: `[C, D]`.
      labels: `[...]`.
      where: bool, labels.shape.
      weights: labels.shape or x.shape. They scale the rows, not the number of examples n_j that Eq. 4 divides by.

    Returns:
      RowUpdates of N rows, N the number of labels: indices int32 `[N]`, values `[N, D]` in float32 or wider. The rows
      of examples that are left out have the index -1; those of labels beyond the table, inside `jax.jit`, the largest
      int32, and `center_update` counts them.

    Raises:
      As `center_loss`.

    Example:
      >>> import centerloss_jax as clj
      >>> import jax.numpy as jnp
      >>> rows = clj.center_rows(jnp.array([[1.0, 2.0], [4.0, 4.0]]), jnp.zeros((3, 2)), jnp.array([2, -1]))
      >>> rows.indices.tolist(), rows.values[0].tolist()
      ([2, -1], [-1.0, -2.0])

    References:
      Wen et al., ECCV 2016, Eq. 4.
    """
    return _rows(examples(x, centers, labels, where, weights))


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
    """`center_loss` and `center_rows` from one lookup: the form for a training step.

    Args:
      x: features `[..., D]`, as for `center_loss`, and so for the others.
      centers: `[C, D]`.
      labels: `[...]`.
      where: bool, labels.shape.
      weights: labels.shape or x.shape.
      reduce_fn: as for `center_loss`; it concerns the loss alone.
      axis_name: as for `center_loss`; it concerns the loss alone.

    Returns:
      `(loss, rows)`. Both belong to the centers as they came in, as Eq. 4 asks.

    Raises:
      As `center_loss`.

    Example:
      >>> import centerloss_jax as clj
      >>> import jax, jax.numpy as jnp
      >>> loss_fn = lambda x: clj.center_loss_and_rows(x, jnp.zeros((3, 2)), jnp.array([2]))
      >>> (loss, rows), grad = jax.value_and_grad(loss_fn, has_aux=True)(jnp.array([[3.0, 4.0]]))
      >>> loss.item(), grad.tolist(), rows.values.tolist()
      (25.0, [[6.0, 8.0]], [[-3.0, -4.0]])

    References:
      Wen et al., ECCV 2016, Eq. 2 and 4.
    """
    batch = examples(x, centers, labels, where, weights)
    if reduce_fn is jnp.mean and weights is None:
        return _mean_and_rows(batch, axis_name)
    return _reduce(batch, reduce_fn, axis_name), _rows(batch)


def _reduce(batch: Examples, reduce_fn: ReduceFn | None, axis_name: AxisName | None) -> Array:
    if axis_name is not None and reduce_fn is not jnp.mean:
        raise ValueError('axis_name goes with reduce_fn=jnp.mean alone: it sets the denominator of the mean')
    if reduce_fn is not None and not callable(reduce_fn):
        raise TypeError(f'reduce_fn must be a function such as jnp.sum, or None, got {reduce_fn!r}')
    squares = jnp.square(batch.difference())
    per_example = jnp.sum(squares if batch.weights is None else batch.weights * squares, axis=-1)
    per_example = jnp.where(batch.rows.counted & ~batch.rows.valid, jnp.nan, per_example)
    if reduce_fn is jnp.mean:
        return jnp.sum(per_example) / _count(batch, axis_name)
    return per_example if reduce_fn is None else reduce_fn(per_example)


def _count(batch: Examples, axis_name: AxisName | None) -> Array:
    """What the mean divides by."""
    count = jnp.sum(batch.rows.counted, dtype=jnp.int32).astype(wide(batch.x.dtype, batch.own.dtype))
    if axis_name is not None:
        check_axis_name(axis_name)
        count = jax.lax.pmean(count, axis_name)
    return jnp.where(count > 0, count, 1)


def _rows(batch: Examples) -> RowUpdates:
    values = batch.difference() if batch.weights is None else batch.weights * batch.difference()
    return _as_rows(batch, values, jnp.ones([], values.dtype))


def _as_rows(batch: Examples, values: Array, scale: Array) -> RowUpdates:
    values = jax.lax.stop_gradient(values.reshape(-1, values.shape[-1]))
    return RowUpdates(batch.rows.indices.reshape(-1), values, scale=jnp.broadcast_to(scale, values.shape[:1]))


def _mean_and_rows(batch: Examples, axis_name: AxisName | None) -> tuple[Array, RowUpdates]:
    """The same from one array: the gradient of the loss for x, of which the rows are a multiple."""
    count = _count(batch, axis_name)
    loss, gradient = _mean_square(batch.x, batch.own, batch.rows.counted, batch.rows.valid, count)
    return loss, _as_rows(batch, gradient, -count / 2)


@jax.custom_jvp
def _mean_square(x: Array, own: Array, counted: Array, valid: Array, count: Array) -> tuple[Array, Array]:
    """(1/n) sum |x - c|^2 over the counted examples, NaN for one that is not valid; and its gradient, 2 (x - c) / n.

    Autodiff would write another array for the gradient. Here it is the array that the loss is computed from. So that
    it stays one, a barrier keeps a CPU's compiler from computing it again for each use; an accelerator's takes the
    gradient and the sums of its squares in one pass, if another keeps these apart.
    """
    mask, dtype = valid[..., None], count.dtype
    difference = jnp.where(mask, x.astype(dtype), 0) - jnp.where(mask, own.astype(dtype), 0)
    gradient = jax.lax.platform_dependent(
        difference * (2 / count), cpu=jax.lax.optimization_barrier, default=lambda gradient: gradient
    )
    per_example = jax.lax.optimization_barrier(jnp.sum(jnp.square(gradient), axis=-1))
    return jnp.sum(jnp.where(counted & ~valid, jnp.nan, per_example)) * (count / 4), gradient


@_mean_square.defjvp
def _mean_square_jvp(primals, tangents):
    (_, _, _, valid, count), (x, own, _, _, _) = primals, tangents
    loss, gradient = _mean_square(*primals)
    change = x.astype(count.dtype) - own.astype(count.dtype)
    return (loss, gradient), (jnp.sum(gradient * change), jnp.where(valid[..., None], change, 0) * (2 / count))
