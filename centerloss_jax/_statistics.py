"""Counts, means and scatter of features by class: how tight classes are and how far apart."""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from centerloss_jax._inputs import (
    DROPPED,
    AxisName,
    check_axis_name,
    check_features,
    check_num_classes,
    class_index,
    compute_dtype,
    is_row,
)
from centerloss_jax._kernels import sum_in_parts
from centerloss_jax._sharding import on_auto_axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ClassStatistics:
    r"""Counts, means and squared deviations of features by class, as a pytree. `merge` joins parts of a dataset.

    Attributes:
      count: int32 `[C]`, examples of each class, n_j; `merge` stops at the largest int32.
      mean: `[C, D]`, class means :math:`\mu_j`; 0 for a class without examples.
      squared_deviation: `[C]`, :math:`\sum_{i: y_i = j} |x_i - \mu_j|^2`.

    Example:
      >>> import centerloss_jax as clj
      >>> import jax.numpy as jnp
      >>> x, labels = jnp.array([[0.0], [2.0], [9.0]]), jnp.array([0, 0, 1])
      >>> statistics = clj.class_statistics(x, labels, num_classes=2)
      >>> statistics.count.tolist(), statistics.mean.tolist()
      ([2, 1], [[1.0], [9.0]])
      >>> statistics.squared_deviation.tolist()
      [2.0, 0.0]
    """

    count: Array
    mean: Array
    squared_deviation: Array

    @property
    def intra(self) -> Array:
        r"""The within-class variance :math:`\frac{1}{N - K} \sum_i |x_i - \mu_{y_i}|^2`, a scalar.

        K is the number of classes that occur. With N examples the sum has N - K degrees of freedom, so the estimate is
        unbiased however few examples a class has. It is NaN where N = K.
        """
        num_present = jnp.sum(self.count > 0, dtype=jnp.int32).astype(self.mean.dtype)
        degrees_of_freedom = self._num_examples() - num_present
        intra = self.squared_deviation.sum() / jnp.maximum(degrees_of_freedom, 1)
        return jnp.where(degrees_of_freedom > 0, intra, jnp.nan)

    @property
    def inter(self) -> Array:
        r"""The between-class variance :math:`\frac{1}{N} \sum_j n_j |\mu_j - \mu|^2`, a scalar; NaN where N = 0."""
        share = (self.count.astype(self.mean.dtype) / self._num_examples())[:, None]
        # Relative to a first estimate, since the mean of means of norm 1e4 is itself rounded.
        origin = jnp.sum(share * self.mean, axis=0, keepdims=True)
        offset = self.mean - origin
        return jnp.sum(share * jnp.square(offset - jnp.sum(share * offset, axis=0, keepdims=True)))

    @property
    def ratio(self) -> Array:
        """The ratio `intra / inter`, a scalar without unit; small where classes are well separated. NaN for 0 / 0."""
        return self.intra / self.inter

    def _num_examples(self) -> Array:
        """Returns N in floating point, since int32 would overflow where each class alone does not."""
        return self.count.astype(self.mean.dtype).sum()

    def merge(self, other: 'ClassStatistics') -> 'ClassStatistics':
        """Returns the statistics of both sets of examples together, by the parallel form of Welford's algorithm.

        Args:
          other: statistics of other examples, for the same number of classes C and of features D.

        Returns:
          ClassStatistics of all examples.

        Raises:
          TypeError: if other is no ClassStatistics.
          ValueError: if the numbers of classes or features differ.

        Example:
          >>> import centerloss_jax as clj
          >>> import jax.numpy as jnp
          >>> labels = jnp.array([0])
          >>> first = clj.class_statistics(jnp.array([[1.0]]), labels, num_classes=1)
          >>> second = clj.class_statistics(jnp.array([[3.0]]), labels, num_classes=1)
          >>> first.merge(second).mean.tolist()
          [[2.0]]

        References:
          Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979.
        """
        if not isinstance(other, ClassStatistics):
            raise TypeError(f'other must be ClassStatistics, got {type(other).__name__}')
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                f'other must have the means of as many classes and features, {list(self.mean.shape)}, '
                f'got {list(other.mean.shape)}'
            )
        largest = jnp.iinfo(self.count.dtype).max
        count = jnp.where(self.count > largest - other.count, largest, self.count + other.count)
        dtype = jnp.promote_types(self.mean.dtype, other.mean.dtype)
        share = other.count.astype(dtype) / jnp.maximum(self.count.astype(dtype) + other.count.astype(dtype), 1)
        gap = other.mean - self.mean
        between = self.count.astype(dtype) * share * jnp.sum(jnp.square(gap), axis=-1)
        return ClassStatistics(
            count=count,
            mean=jnp.where((self.count == 0)[:, None], other.mean, self.mean + share[:, None] * gap),
            squared_deviation=self.squared_deviation + other.squared_deviation + between,
        )


def class_statistics(
    x: ArrayLike,
    labels: ArrayLike | Sequence,
    num_classes: int,
    *,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> ClassStatistics:
    r"""Returns counts, means and scatter of features by class, and the intra-class to inter-class variance ratio.

    .. math:: \text{intra} = \frac{1}{N - K} \sum_i |x_i - \mu_{y_i}|^2, \qquad
              \text{inter} = \frac{1}{N} \sum_j n_j |\mu_j - \mu|^2

    with N examples and K classes that occur.

    The absolute center loss grows with the features; this ratio does not. The class means are also good centers to
    start from under a pretrained network.

    Args:
      x: features `[..., D]`, floating point; narrow dtypes are computed in float32.
      labels: classes `[...]`, integers. An example of a negative label is ignored, whatever it holds. A label of C or
        more is an error where its value is known, and ignored inside `jax.jit`.
      num_classes: number of classes C.
      where: bool, labels.shape; False ignores an example.
      axis_name: the axis of the surrounding `jax.pmap`, `jax.shard_map` or `jax.vmap`; every device then has the
        statistics of all examples. This moves O(C D).

    Returns:
      ClassStatistics with `count`, `mean`, `squared_deviation`, and the properties `intra`, `inter` and `ratio`.

    Raises:
      TypeError: if x is not floating point, labels not integers or where not boolean.
      ValueError: if shapes do not fit, or a label whose value is known is C or more.
      NameError: if axis_name is not an axis that surrounds the call.

    Example:
      >>> import centerloss_jax as clj
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[0.0], [2.0], [9.0], [11.0]])
      >>> statistics = clj.class_statistics(x, jnp.array([0, 0, 1, 1]), num_classes=2)
      >>> statistics.mean.tolist(), statistics.intra.item(), statistics.inter.item()
      ([[1.0], [10.0]], 2.0, 20.25)

    References:
      Fisher, "The Use of Multiple Measurements in Taxonomic Problems", 1936, for the ratio.
    """
    check_num_classes(num_classes)
    check_axis_name(axis_name)
    x = check_features(x)
    index = class_index(labels, where, num_classes, x.shape[:-1])
    by_class = partial(_by_class, num_classes=num_classes, axis_name=axis_name)
    return on_auto_axes(by_class, x, index, spec=P())


def _by_class(x: Array, index: Array, num_classes: int, axis_name: AxisName | None) -> ClassStatistics:
    index = index.reshape(-1)
    valid = is_row(index)
    row = jnp.where(valid, index, DROPPED)
    index = jnp.where(valid, index, 0)
    x = jnp.where(valid[:, None], x.reshape(-1, x.shape[-1]).astype(compute_dtype(x.dtype)), 0)

    def sums(values: Array) -> Array:
        total = sum_in_parts(partial(jax.ops.segment_sum, values), row, num_classes)  # drops DROPPED
        return total if axis_name is None else jax.lax.psum(total, axis_name)

    count = sums(jnp.ones_like(index))
    divisor = jnp.maximum(count, 1).astype(x.dtype)[:, None]
    mean = sums(x) / divisor
    # A sum of features of norm 1e4 is rounded; the mean of the residuals corrects it.
    mean = mean + sums(x - mean[index]) / divisor
    return ClassStatistics(count, mean, sums(jnp.sum(jnp.square(x - mean[index]), axis=-1)))
