"""Softmax losses with their gradient for the rows of the table, for a training step that moves the rows itself.

The rows are those of a sample of the classes, or of all. Neither time nor memory then depends on the classes that are
not in the sample.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.typing import ArrayLike

from centerloss_jax._class_shards import gather_batch, take_classes
from centerloss_jax._inputs import IGNORED, AxisName, check_classes, check_number, compute_dtype, is_concrete
from centerloss_jax._kernels import loss_and_gradient
from centerloss_jax._logits import InnerProduct
from centerloss_jax._rows import RowUpdates
from centerloss_jax._sharding import vary_as
from centerloss_jax._softmax import check_arrays, cosine_form, distance_form, mean_loss


def class_softmax_and_rows(
    x: ArrayLike,
    table: ArrayLike,
    labels: ArrayLike | Sequence,
    *,
    where: ArrayLike | None = None,
    classes: ArrayLike | Sequence | None = None,
    weight: ArrayLike = 1.0,
    block_size: int = 1024,
    num_classes: int | None = None,
    axis_name: AxisName | None = None,
    class_axis: AxisName | None = None,
    mesh: Mesh | None = None,
) -> tuple[Array, RowUpdates]:
    """Returns `class_softmax` and its gradient for the rows of the table, for a training step.

    With `classes` the softmax is over these classes alone. Time and memory then grow with their number, and not with
    the number of classes in the table.

    The rows carry no gradient, so a factor on the returned loss does not reach them. Pass it as `weight`.

    With `class_axis` the rows stay on the devices that hold them in the table, and `by_rows` moves them there. They are
    gradients of the loss of the whole batch in `jax.jit`, `jax.pmap` and `jax.shard_map`.

    Args:
      x: features `[..., D]`, floating point. See `class_softmax`.
      table: one row for each class `[C, D]`, floating point. See `class_softmax`.
      labels: classes `[...]`, integers below C. See `class_softmax`.
      where: bool, labels.shape; False ignores an example.
      classes: integers `[S]`, distinct and in ascending order, as `sample_classes` returns them. A label that is not
        among them is an error outside of `jax.jit`; inside, the loss is NaN and the gradient of that example 0. None
        takes all classes. With class_axis pass it to `sample_classes` too: in `jax.pmap` and `jax.shard_map` these are
        rows of this device's part of the table, and under `jax.jit` equally many classes of each device.
      weight: a number that multiplies the loss and the rows.
      block_size: classes that are taken at a time.
      num_classes: C where the table has more rows. See `class_softmax`.
      axis_name: axes of the batch. See `class_softmax`.
      class_axis: axes of the rows of the table. See `class_softmax`.
      mesh: the mesh of class_axis under `jax.jit`. See `class_softmax`.

    Returns:
      `(loss, rows)`: a scalar, and RowUpdates of the kind 'gradient' with one row for each of `classes`, or of all
      classes: indices int32 `[S]`, values `[S, D]` in float32 or wider. A row without a logit has the index -1.

    Raises:
      TypeError: for a wrong dtype. See `class_softmax`.
      ValueError: if shapes do not fit, a label whose value is known is C or more or not among the classes, or classes
        are not distinct, in ascending order and from 0 to C - 1.

    Example:
      >>> import centerloss_jax as clj
      >>> import jax
      >>> import jax.numpy as jnp
      >>> table = jnp.zeros((1000, 2))
      >>> def loss_fn(x):
      ...     return clj.class_softmax_and_rows(x, table, jnp.array([7]), classes=jnp.array([7, 500]))
      >>> x = jnp.array([[2.0, 4.0]])
      >>> (loss, rows), grad = jax.value_and_grad(loss_fn, has_aux=True)(x)
      >>> rows.indices.tolist(), rows.values.tolist()
      ([7, 500], [[-1.0, -2.0], [1.0, 2.0]])
    """
    return _loss_and_rows(
        InnerProduct(),
        classes,
        weight,
        None,
        x,
        table,
        labels,
        where,
        block_size,
        num_classes,
        axis_name,
        class_axis,
        mesh,
    )


def margin_softmax_and_rows(
    x: ArrayLike,
    table: ArrayLike,
    labels: ArrayLike | Sequence,
    *,
    scale: ArrayLike = 64.0,
    angular_margin: ArrayLike = 0.0,
    additive_margin: ArrayLike = 0.4,
    straight_through: bool = False,
    where: ArrayLike | None = None,
    classes: ArrayLike | Sequence | None = None,
    weight: ArrayLike = 1.0,
    block_size: int = 1024,
    num_classes: int | None = None,
    axis_name: AxisName | None = None,
    class_axis: AxisName | None = None,
    mesh: Mesh | None = None,
) -> tuple[Array, RowUpdates]:
    """Returns `margin_softmax` and its gradient for the rows of the table, for a training step.

    Args:
      x: features `[..., D]`, floating point. See `class_softmax`.
      table: one row for each class `[C, D]`, floating point. See `class_softmax`.
      labels: classes `[...]`, integers below C. See `class_softmax`.
      scale: the factor of the cosines. See `margin_softmax`.
      angular_margin: added to the angle of the example's class. See `margin_softmax`.
      additive_margin: subtracted from its cosine. See `margin_softmax`.
      straight_through: leaves the margins out of the gradient. See `margin_softmax`.
      where: bool, labels.shape; False ignores an example.
      classes: integers `[S]`, the sampled classes. See `class_softmax_and_rows`.
      weight: a number that multiplies the loss and the rows. A factor on the returned loss does not reach the rows.
      block_size: classes that are taken at a time.
      num_classes: C where the table has more rows. See `class_softmax`.
      axis_name: axes of the batch. See `class_softmax`.
      class_axis: axes of the rows of the table. See `class_softmax`.
      mesh: the mesh of class_axis under `jax.jit`. See `class_softmax`.

    Returns:
      `(loss, rows)`. See `class_softmax_and_rows`.

    Raises:
      TypeError: for a wrong dtype, or if an argument is not a number. See `margin_softmax`.
      ValueError: for a wrong shape, label, class or number. See `margin_softmax` and `class_softmax_and_rows`.

    Example:
      >>> import centerloss_jax as clj
      >>> import jax.numpy as jnp
      >>> x, table = jnp.array([[3.0, 4.0]]), jnp.array([[0.0, 2.0], [2.0, 0.0]])
      >>> y = jnp.array([0])
      >>> loss, rows = clj.margin_softmax_and_rows(x, table, y, scale=10.0, weight=0.5)
      >>> round(loss.item(), 4), rows.indices.tolist()
      (1.0635, [0, 1])
    """
    form = cosine_form(scale, angular_margin, additive_margin, straight_through)
    return _loss_and_rows(
        form, classes, weight, None, x, table, labels, where, block_size, num_classes, axis_name, class_axis, mesh
    )


def distance_softmax_and_rows(
    x: ArrayLike,
    table: ArrayLike,
    labels: ArrayLike | Sequence,
    *,
    temperature: ArrayLike = 1.0,
    margin: ArrayLike = 0.0,
    center_weight: ArrayLike = 0.0,
    where: ArrayLike | None = None,
    classes: ArrayLike | Sequence | None = None,
    weight: ArrayLike = 1.0,
    block_size: int = 1024,
    num_classes: int | None = None,
    axis_name: AxisName | None = None,
    class_axis: AxisName | None = None,
    mesh: Mesh | None = None,
) -> tuple[Array, RowUpdates]:
    """Returns `distance_softmax` with a center loss, and their gradient for the rows of the table, for a training step.

    One table does both jobs: its rows classify, and the center loss pulls features and rows of a class together. The
    rows move by this gradient alone, and not by Eq. 4 of the center loss.

    Args:
      x: features `[..., D]`, floating point. See `class_softmax`.
      table: one center for each class `[C, D]`, floating point. See `class_softmax`.
      labels: classes `[...]`, integers below C. See `class_softmax`.
      temperature: divides the squared distances. See `distance_softmax`.
      margin: relative to the distance of the example's class. See `distance_softmax`.
      center_weight: the factor of `center_loss`, which is added to the loss. Its gradient is added to the rows.
      where: bool, labels.shape; False ignores an example.
      classes: integers `[S]`, the sampled classes. See `class_softmax_and_rows`.
      weight: a number that multiplies the loss and the rows. A factor on the returned loss does not reach the rows.
      block_size: classes that are taken at a time.
      num_classes: C where the table has more rows. See `class_softmax`.
      axis_name: axes of the batch. See `class_softmax`.
      class_axis: axes of the rows of the table. See `class_softmax`.
      mesh: the mesh of class_axis under `jax.jit`. See `class_softmax`.

    Returns:
      `(loss, rows)`. See `class_softmax_and_rows`.

    Raises:
      TypeError: for a wrong dtype, or if an argument is not a number. See `distance_softmax`.
      ValueError: for a wrong shape, label, class or number. See `distance_softmax` and `class_softmax_and_rows`.

    Example:
      >>> import centerloss_jax as clj
      >>> import jax.numpy as jnp
      >>> x, centers = jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 1.0], [3.0, 2.0]])
      >>> y = jnp.array([0])
      >>> loss, rows = clj.distance_softmax_and_rows(x, centers, y, center_weight=0.1)
      >>> round(loss.item(), 4), rows.indices.tolist()
      (0.1486, [0, 1])
    """
    check_number(center_weight, 'center_weight')
    form = distance_form(temperature, margin)
    return _loss_and_rows(
        form,
        classes,
        weight,
        center_weight,
        x,
        table,
        labels,
        where,
        block_size,
        num_classes,
        axis_name,
        class_axis,
        mesh,
    )


def _loss_and_rows(
    form: Any,
    classes: Any,
    weight: Any,
    center_weight: Any,
    x: Any,
    table: Any,
    labels: Any,
    where: Any,
    block_size: Any,
    *layout: Any,
) -> tuple[Array, RowUpdates]:
    check_number(weight, 'weight')
    x, table, index, num_classes, shards = check_arrays(x, table, labels, where, block_size, *layout)
    sampled = classes is not None
    if sampled:
        classes = check_classes(classes, table.shape[0], 1 if shards.mesh is None else shards.num_shards)
        if shards.mesh is not None or not shards.class_axis:
            _check_sample(index, classes)
    batch = gather_batch(x, shards), gather_batch(index, shards)
    rows, classes, indices = take_classes(table, classes, num_classes, shards)
    static = {'block_size': int(block_size), 'shards': shards, 'sampled': sampled}
    loss, gradient = _weighted_loss(*batch, rows, classes, form, weight, center_weight, **static)
    return vary_as(loss, x, table), RowUpdates(indices, gradient, kind='gradient', sharding=shards.sharding)


def _check_sample(index: Array, classes: Array) -> None:
    """Raises an error where all values are known and a label is not among the classes."""
    if is_concrete(index) and is_concrete(classes):
        labels = np.asarray(jax.device_get(index))
        missing = labels[(labels != IGNORED) & ~np.isin(labels, np.asarray(jax.device_get(classes)))]
        if missing.size:
            raise ValueError(
                f'labels name class {missing[0]}, which is not among classes: sample them by sample_classes with these '
                'labels'
            )


@partial(jax.jit, static_argnames=('block_size', 'shards', 'sampled'))
def _weighted_loss(
    x: Array, index: Array, rows: Array, classes: Array, form: Any, weight: Any, center_weight: Any, **static: Any
) -> tuple[Array, Array]:
    """Returns weight times the loss, with the center loss where it has a weight, and the gradient for the rows."""
    dtype = compute_dtype(x.dtype, rows.dtype)
    numbers = jax.tree.map(lambda number: jnp.asarray(number).astype(dtype), (form, weight, center_weight))

    def weighted(rows, inputs, integers):
        (x, (form, weight, center_weight)), (index, classes) = inputs, integers
        return weight * mean_loss(x, index, rows, classes, form, center_weight, **static)

    # Else shard_map's check would sum the gradients of all devices, where each needs its own.
    rows, *inputs = jax.tree.map(lambda a: vary_as(a, x, rows), (rows.astype(dtype), x.astype(dtype), numbers))
    class_axis = () if static['shards'].mesh is not None else static['shards'].class_axis
    return loss_and_gradient(weighted, class_axis, rows, inputs, (index, classes))
