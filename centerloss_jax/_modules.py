"""What the Linen and the NNX modules share: a table from its initializer, and the call of a loss that returns rows."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from centerloss_jax._inputs import check_floating_dtype, check_num_classes, check_size
from centerloss_jax._rows import RowUpdates

small_normal = jax.nn.initializers.normal(0.01)


def initial_table(
    init: Any, key: Array, num_classes: int, num_features: int, dtype: DTypeLike, name: str = 'table'
) -> Any:
    """Returns the table that an initializer makes, in the box that it may put it in."""
    check_num_classes(num_classes)
    check_size(num_features, 'num_features')
    if not callable(init):
        raise TypeError(f'{name}_init must be an initializer (key, shape, dtype) -> {name}, got {init!r}')
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f'dtype must be floating point, got {dtype!r}')
    table = init(key, (num_classes, num_features), dtype)
    values = meta.unbox(table)
    if np.shape(values) != (num_classes, num_features):
        shape = list(np.shape(values))
        raise ValueError(f'{name}_init must return an array [{num_classes}, {num_features}], got {shape}')
    check_floating_dtype(values, f'the array of {name}_init')
    return table


def call_loss(
    loss_fn: Callable[..., Any], x: ArrayLike, table: ArrayLike, labels: ArrayLike | Sequence, options: Any
) -> tuple[Array, RowUpdates]:
    """Returns `loss_fn(x, table, labels, **options)`, checked to be a loss with rows."""
    expected = 'loss_fn must be a loss that returns (loss, rows), such as margin_softmax_and_rows'
    if not callable(loss_fn):
        raise TypeError(f'{expected}, got {loss_fn!r}')
    result = loss_fn(x, table, labels, **options)
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], RowUpdates):
        raise TypeError(f'{expected}, but it has returned {type(result).__name__}')
    return result
