"""Softmax losses over the classes of a table, for tables too large for a matrix of logits.

The loss of an example is log(1 + exp(others - own)), with `own` the logit of its class, and `others` the log-sum-exp of
the logits of all other classes. Only `own` has a margin, and it is taken from the example's own row. `others` is summed
over blocks of classes. Where the table lies over devices, each takes both from its own rows.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jax.sharding import Mesh
from jax.typing import ArrayLike

from centerloss_jax._class_shards import (
    ClassShards,
    combine_shards,
    count_classes,
    find_shards,
    gather_batch,
    take_classes,
)
from centerloss_jax._inputs import (
    IGNORED,
    AxisName,
    check_features,
    check_number,
    check_size,
    check_table,
    class_index,
    compute_dtype,
    is_row,
)
from centerloss_jax._kernels import log_sum_exp_of_others
from centerloss_jax._logits import Cosine, InnerProduct, SquaredDistance, StraightThroughCosine
from centerloss_jax._sharding import flatten, take_rows, vary_as


def class_softmax(
    x: ArrayLike,
    table: ArrayLike,
    labels: ArrayLike | Sequence,
    *,
    where: ArrayLike | None = None,
    block_size: int = 1024,
    num_classes: int | None = None,
    axis_name: AxisName | None = None,
    class_axis: AxisName | None = None,
    mesh: Mesh | None = None,
) -> Array:
    r"""Returns the mean cross-entropy of a softmax over the inner products of features and the rows of a table.

    .. math:: L = -\frac{1}{B} \sum_i \log \frac{\exp(x_i \cdot w_{y_i})}{\sum_j \exp(x_i \cdot w_j)}

    It equals the cross-entropy of the logits `x @ table.T`, without the `[B, C]` array: classes are taken in blocks,
    and a gradient computes their logits again. Memory is O(B * block_size + B * C / block_size + C * D). float16 and
    bfloat16 inputs are computed in float32. A bias is a column of the table, with a 1 appended to x. On accelerators
    the products have the precision of `jax.default_matmul_precision`, as `x @ table.T` has.

    The table may lie over devices by rows. With `class_axis` each device computes the logits of its own rows for the
    examples of all devices, which are gathered, and neither rows nor their gradient move. Features, labels and a few
    numbers for each example do. Lay the table over all axes that the batch lies over, or each of these axes repeats the
    same logits.

    An example is ignored if its label is negative or `where` is False. It enters neither the value nor the denominator
    of the mean nor any gradient, whatever it holds. If every example is ignored the loss is 0.

    `jax.grad` with respect to the table is a dense `[C, D]` array. With many classes take it with respect to some rows
    of the table, as `class_softmax_and_rows` does with `classes=`.

    Args:
      x: features `[..., D]`, floating point.
      table: one row for each class `[C, D]`, floating point.
      labels: classes `[...]`, integers of any dtype. A label of C or more is an error where its value is known; inside
        `jax.jit` the loss is NaN, and the gradient of that example is 0.
      where: bool, labels.shape; False ignores an example.
      block_size: classes that are taken at a time.
      num_classes: C where the table has more rows, as `shard_centers` pads it. The rows from C on get no logit,
        whatever they hold. By default all rows are classes.
      axis_name: axes of the surrounding `jax.pmap` or `jax.shard_map` that the batch lies over. Then `jax.lax.pmean` of
        the result over these and class_axis is the loss of the whole batch. Take it inside the function that is
        differentiated, as with `center_loss`. Without class_axis each device has the whole table.
      class_axis: the axis, or a tuple of axes, that the rows of the table lie over: device k has the R rows from row k
        R on. In `jax.pmap` and `jax.shard_map` the table is this device's part, and labels are classes of the whole
        one. In `jax.pmap`, and in `jax.shard_map` with check_vma=False, JAX differentiates the sum of the losses of all
        devices: divide a gradient for the table by the size of class_axis. Under `jax.jit` it names axes of a mesh, and
        the table is the whole array. On Explicit axes it is read from the type of the table.
      mesh: the mesh of class_axis under `jax.jit`, by default that of `jax.set_mesh`.

    Returns:
      A scalar; float32, or float64 where an input is.

    Raises:
      TypeError: if x or table are not floating point, labels not integers, or where not boolean.
      ValueError: if shapes do not fit, a label whose value is known is C or more, or block_size is not positive; if
        class_axis is not in the mesh, or its devices do not divide the rows.
      NameError: if axis_name is not an axis that surrounds the call.

    Example:
      >>> import centerloss_jax as clj
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[1.0, 2.0], [3.0, 0.0]])
      >>> table = jnp.array([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
      >>> round(clj.class_softmax(x, table, jnp.array([2, 0])).item(), 4)
      2.0627

    References:
      Wen et al., ECCV 2016, Eq. 1, without its bias and as a mean.
    """
    return _loss(InnerProduct(), x, table, labels, where, block_size, num_classes, axis_name, class_axis, mesh)


def margin_softmax(
    x: ArrayLike,
    table: ArrayLike,
    labels: ArrayLike | Sequence,
    *,
    scale: ArrayLike = 64.0,
    angular_margin: ArrayLike = 0.0,
    additive_margin: ArrayLike = 0.4,
    straight_through: bool = False,
    where: ArrayLike | None = None,
    block_size: int = 1024,
    num_classes: int | None = None,
    axis_name: AxisName | None = None,
    class_axis: AxisName | None = None,
    mesh: Mesh | None = None,
) -> Array:
    r"""Returns the mean cross-entropy of a softmax over cosines, with a margin for the class of the example.

    The logit of class j is :math:`s \cos\theta_j`, with :math:`\theta_j` the angle of the features and row j. That of
    the example's class y is

    .. math:: s (\cos(\theta_y + m) - a), \quad\text{or}\quad s (\cos\theta_y - m \sin m - a)
        \quad\text{where}\quad \theta_y + m > \pi

    The second form falls with the angle where the first would rise again; there is a jump between them. CosFace is the
    default, with m = 0. ArcFace is `angular_margin=0.5, additive_margin=0.0`.

    Neither the norm of the features nor that of a row enters the loss. Features or a row of zeros have the cosine 0 and
    the gradient 0. The gradient is bounded at every angle. At an angle of 0 or pi, where the angle has no gradient, its
    part is 0.

    Args:
      x: features `[..., D]`, floating point. See `class_softmax`.
      table: one row for each class `[C, D]`, floating point. See `class_softmax`.
      labels: classes `[...]`, integers below C. See `class_softmax`.
      scale: s, positive.
      angular_margin: m, in radians, from 0 to pi.
      additive_margin: a.
      straight_through: leaves the margins out of the gradient, as insightface's ArcFace does: the derivative of each
        logit for its cosine is s. The value is the same.
      where: bool, labels.shape; False ignores an example.
      block_size: classes that are taken at a time.
      num_classes: C where the table has more rows. See `class_softmax`.
      axis_name: axes of the batch. See `class_softmax`.
      class_axis: axes of the rows of the table. See `class_softmax`.
      mesh: the mesh of class_axis under `jax.jit`. See `class_softmax`.

    Returns:
      A scalar; float32, or float64 where an input is.

    Raises:
      TypeError: for a wrong dtype, or if a scale or margin is no number. See `class_softmax`.
      ValueError: if scale is not positive, or angular_margin not in [0, pi]. See `class_softmax`.

    Example:
      >>> import centerloss_jax as clj
      >>> import jax.numpy as jnp
      >>> x, table = jnp.array([[3.0, 4.0]]), jnp.array([[0.0, 2.0], [2.0, 0.0]])
      >>> round(clj.margin_softmax(x, table, jnp.array([0]), scale=10.0).item(), 4)
      2.1269

    References:
      Wang et al., "CosFace: Large Margin Cosine Loss for Deep Face Recognition", CVPR 2018, Eq. 4.
      Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", CVPR 2019, Eq. 3. The form beyond
      pi is not in the paper; earlier code of insightface has it.
    """
    form = cosine_form(scale, angular_margin, additive_margin, straight_through)
    return _loss(form, x, table, labels, where, block_size, num_classes, axis_name, class_axis, mesh)


def distance_softmax(
    x: ArrayLike,
    table: ArrayLike,
    labels: ArrayLike | Sequence,
    *,
    temperature: ArrayLike = 1.0,
    margin: ArrayLike = 0.0,
    where: ArrayLike | None = None,
    block_size: int = 1024,
    num_classes: int | None = None,
    axis_name: AxisName | None = None,
    class_axis: AxisName | None = None,
    mesh: Mesh | None = None,
) -> Array:
    r"""Returns the mean cross-entropy of a softmax over negative squared distances to the rows of a table.

    The rows are class centers that classify. The logit of class j is :math:`-|x - w_j|^2 / T`, and that of the
    example's class is :math:`(1 + m)` times it.

    The distance to the example's own row is the sum of the squared differences. The others are expanded to a matrix
    product, after the mean of the batch is subtracted from features and rows: their error is relative to the largest
    squared distance of an example or a row from that mean.

    Args:
      x: features `[..., D]`, floating point. See `class_softmax`.
      table: one center for each class `[C, D]`, floating point. See `class_softmax`.
      labels: classes `[...]`, integers below C. See `class_softmax`.
      temperature: T, positive. It is 2 in L-GM, and 1 / gamma in GCPL.
      margin: m, relative to the distance.
      where: bool, labels.shape; False ignores an example.
      block_size: classes that are taken at a time.
      num_classes: C where the table has more rows. See `class_softmax`.
      axis_name: axes of the batch. See `class_softmax`.
      class_axis: axes of the rows of the table. See `class_softmax`.
      mesh: the mesh of class_axis under `jax.jit`. See `class_softmax`.

    Returns:
      A scalar; float32, or float64 where an input is.

    Raises:
      TypeError: for a wrong dtype, or if temperature or margin is no number. See `class_softmax`.
      ValueError: if temperature is not positive. See `class_softmax`.

    Example:
      >>> import centerloss_jax as clj
      >>> import jax.numpy as jnp
      >>> x, centers = jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 1.0], [3.0, 2.0]])
      >>> round(clj.distance_softmax(x, centers, jnp.array([0])).item(), 4)
      0.0486

    References:
      Snell, Swersky and Zemel, "Prototypical Networks for Few-shot Learning", NeurIPS 2017, Eq. 2.
      Yang, Zhang, Yin and Liu, "Robust Classification with Convolutional Prototype Learning", CVPR 2018 (GCPL).
      Wan, Zhong, Li and Chen, "Rethinking Feature Distribution for Loss Functions in Image Classification", CVPR 2018
      (L-GM).
    """
    form = distance_form(temperature, margin)
    return _loss(form, x, table, labels, where, block_size, num_classes, axis_name, class_axis, mesh)


def cosine_form(scale: Any, angular_margin: Any, additive_margin: Any, straight_through: bool) -> Cosine:
    check_number(scale, 'scale', positive=True)
    check_number(angular_margin, 'angular_margin')
    if not isinstance(angular_margin, Tracer) and not 0 <= angular_margin <= math.pi:
        raise ValueError(f'angular_margin must be from 0 to pi, got {angular_margin}')
    check_number(additive_margin, 'additive_margin')
    return (StraightThroughCosine if straight_through else Cosine)(scale, angular_margin, additive_margin)


def distance_form(temperature: Any, margin: Any) -> SquaredDistance:
    check_number(temperature, 'temperature', positive=True)
    check_number(margin, 'margin')
    return SquaredDistance(temperature, margin)


def _loss(form: Any, x: Any, table: Any, labels: Any, where: Any, block_size: Any, *layout: Any) -> Array:
    x, table, index, num_classes, shards = check_arrays(x, table, labels, where, block_size, *layout)
    batch = gather_batch(x, shards), gather_batch(index, shards)
    rows, classes, _ = take_classes(table, None, num_classes, shards)
    loss = mean_loss(*batch, rows, classes, form, None, block_size=int(block_size), shards=shards, sampled=False)
    return vary_as(loss, x, table)


def check_arrays(
    x: Any,
    table: Any,
    labels: Any,
    where: Any,
    block_size: Any,
    num_classes: Any,
    axis_name: Any,
    class_axis: Any,
    mesh: Any,
) -> tuple[Array, Array, Array, int, ClassShards]:
    """Returns x `[B, D]`, the table, the class of each label `[B]`, IGNORED or DROPPED, and how the table lies."""
    table = check_table(table, 'table')
    x = check_features(x, table.shape[1])
    check_size(block_size, 'block_size')
    shards = find_shards(axis_name, class_axis, mesh, table)
    num_classes = count_classes(table, num_classes, shards)
    index = class_index(labels, where, num_classes, x.shape[:-1])
    return flatten(x, index.ndim), table, flatten(index, index.ndim), num_classes, shards


@partial(jax.jit, static_argnames=('block_size', 'shards', 'sampled'))
def mean_loss(
    x: Array,
    index: Array,
    rows: Array,
    classes: Array,
    form: Any,
    center_weight: Any,
    *,
    block_size: int,
    shards: ClassShards,
    sampled: bool,
) -> Array:
    """Returns the mean cross-entropy over the classes of some rows, with the center loss where it has a weight.

    The index of an example is its class, IGNORED or DROPPED. The classes are in ascending order, DROPPED for a row that
    has no logit; without a sample they follow each other.
    """
    dtype = compute_dtype(x.dtype, rows.dtype)
    form = jax.tree.map(lambda number: jnp.asarray(number).astype(dtype), form)
    counted, valid = index != IGNORED, is_row(index)
    x, rows = jnp.where(valid[:, None], x, 0).astype(dtype), rows.astype(dtype)

    logits = partial(_own_and_others, block_size=block_size, sampled=sampled, with_distance=center_weight is not None)
    others, (own, distance, found) = combine_shards(logits, shards, x, rows, classes, index, form)
    valid &= found > 0
    loss = jax.nn.softplus(others - own)
    if center_weight is not None:
        loss += center_weight * distance

    per_example = jnp.where(valid, loss, jnp.where(counted, jnp.nan, 0))
    count = jnp.sum(counted, dtype=jnp.int32).astype(dtype)
    if shards.axis_name and not shards.class_axis:
        count = jax.lax.pmean(count, shards.axis_name)
    return jnp.sum(per_example) / jnp.where(count > 0, count, 1)


def _own_and_others(
    x: Array,
    rows: Array,
    classes: Array,
    index: Array,
    form: Any,
    *,
    block_size: int,
    sampled: bool,
    with_distance: bool,
) -> tuple[Array, tuple[Array, Array | None, Array]]:
    """Returns `others`, and where the own class is among the rows `own`, the squared distance to its row, and a 1."""
    place = jnp.searchsorted(classes, index) if sampled else index - classes[0]
    place = jnp.clip(place, 0, classes.size - 1).astype(jnp.int32)
    found = is_row(index) & (take_rows(classes[:, None], place)[:, 0] == index)
    # A row of padding, which may hold Inf, is read as 0: its derivatives would be NaN.
    own_row = jnp.where(found[:, None], take_rows(rows, place), 0)
    own = jnp.where(found, form.own(x, own_row), 0)
    distance = jnp.where(found, jnp.sum(jnp.square(x - own_row), axis=-1), 0) if with_distance else None
    others = log_sum_exp_of_others(form.logits, x, rows, classes, index, block_size)
    return others, (own, distance, found.astype(jnp.int32))
