"""The one lookup that everything shares: which row of the table an example meets, and its difference to that row.

Label rules live here and nowhere else. So does the gather: a second, different lookup of the same table in one step
would cost a copy of the table, since XLA scatters in place only where it can order every read before the scatter.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from centerloss_jax._mesh import num_rows_before_padding, take_rows

AnyArray = np.ndarray | Array  # on the host or on a device

# An index that stands for no row: an example that is left out, and a label beyond the table, which is a mistake.
LEFT_OUT = -1
MISTAKE = int(np.iinfo(np.int32).max)


class Rows(NamedTuple):
    """The rows of a batch. All three have the labels' shape."""

    indices: Array  # int32: a row of the table, LEFT_OUT or MISTAKE
    counted: Array  # bool: not left out by `where` or by a negative label
    valid: Array  # bool: counted, and the label is below the number of classes


class Examples(NamedTuple):
    """A batch beside its centers."""

    x: Array  # [..., D]
    own: Array  # [..., D], the center of each example's class
    weights: Array | None  # labels.shape + (1,) or [..., D], in float32 or wider; 0 where the example is not valid
    rows: Rows

    def difference(self) -> Array:
        """[..., D] c_y - x in float32 or wider, and 0 where the example is not valid.

        What is left out is masked before the arithmetic, so that a NaN it holds enters no value and no gradient.
        """
        dtype, mask = wide(self.x.dtype, self.own.dtype), self.rows.valid[..., None]
        return jnp.where(mask, self.own.astype(dtype), 0) - jnp.where(mask, self.x.astype(dtype), 0)


def check_table(centers: ArrayLike, name: str = 'centers') -> Array:
    centers = check_floating(centers, name)
    if centers.ndim != 2 or 0 in centers.shape:
        raise ValueError(f'{name} must have shape [C, D] with C and D at least 1, got {list(centers.shape)}')
    if centers.shape[0] >= MISTAKE:
        raise ValueError(f'{name} must have fewer than {MISTAKE} rows, got {centers.shape[0]}')
    return centers


def check_features(x: ArrayLike, num_features: int | None = None) -> Array:
    x = check_floating(x, 'x')
    if x.ndim < 1 or (num_features is not None and x.shape[-1] != num_features):
        expected = 'D' if num_features is None else f'D={num_features} as the centers have'
        raise ValueError(f'x must have shape [..., D] with {expected}, got {list(x.shape)}')
    return x


def check_floating(a: ArrayLike, name: str) -> Array:
    try:
        array = jnp.asarray(a)
    except (TypeError, ValueError) as error:
        raise TypeError(f'{name} must be a floating point array, got {type(a).__name__}: {error}') from None
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f'{name} must be floating point, got {type_name(array)}; cast it with {name}.astype(...)')
    return array


def type_name(a: AnyArray) -> str:
    """float32[4,2], as JAX writes it."""
    return f'{a.dtype.name}[{",".join(map(str, a.shape))}]'


def wide(*dtypes: np.dtype) -> np.dtype:
    """The dtype that these are computed in: theirs, and float32 at least."""
    return jnp.promote_types(jnp.result_type(*dtypes), jnp.float32)


def as_integers(labels: ArrayLike | Sequence) -> AnyArray:
    """Labels as they are: NumPy's stay NumPy's, since JAX without x64 folds 2**32 + 3 to 3."""
    if not isinstance(labels, jax.Array):
        labels = np.asarray(labels, dtype=np.int32 if np.size(labels) == 0 and isinstance(labels, list) else None)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        hint = 'cast them with labels.astype(int)' if labels.ndim < 2 else 'for one-hot labels pass labels.argmax(-1)'
        hint = 'a mask is passed as where=' if labels.dtype == bool else hint
        raise TypeError(f'labels must be integers, got {type_name(labels)}; {hint}')
    return labels


def below(labels: AnyArray, num_classes: int) -> AnyArray:
    """labels < num_classes, where num_classes may be more than the labels' dtype can hold."""
    return labels < num_classes if num_classes <= jnp.iinfo(labels.dtype).max else labels == labels


def check_labels(labels: ArrayLike | Sequence, num_classes: int) -> None:
    """Checks labels on the host, before they enter a compiled step.

    Inside `jax.jit` a label that names no class can only make the loss NaN; here it is an error with its place.

    Args:
      labels: integers of any shape and integer dtype, on the host or on a device. Negative labels pass: they leave an
        example out.
      num_classes: number of classes C; the valid labels are 0 to C - 1.

    Raises:
      TypeError: if labels are not integers.
      ValueError: if a label is `num_classes` or more, with the first one and its place; if num_classes is below 1.

    Example:
      >>> import centerloss_jax as clj
      >>> clj.check_labels([0, 2, -1], num_classes=3)
      >>> clj.check_labels([1, 2, 3], num_classes=3)
      Traceback (most recent call last):
      ValueError: labels[2] is 3, but there are 3 classes: valid labels are 0 to 2; negative ones leave an example out
    """
    if num_classes < 1:
        raise ValueError(f'num_classes must be at least 1, got {num_classes}')
    labels = np.asarray(jax.device_get(as_integers(labels)))
    _raise_on_mistakes(labels, ~np.asarray(below(labels, num_classes)), num_classes)


def _raise_on_mistakes(labels: AnyArray, mistakes: np.ndarray, num_classes: int) -> None:
    if mistakes.any():
        place = tuple(int(i) for i in np.argwhere(mistakes)[0])
        subscript = ', '.join(map(str, place))
        bad = np.asarray(jax.device_get(labels))[place]
        raise ValueError(
            f'labels{f"[{subscript}]" if place else ""} is {bad}, but there are {num_classes} classes: valid labels '
            f'are 0 to {num_classes - 1}; negative ones leave an example out'
        )


def rows_of(labels: ArrayLike | Sequence, where: ArrayLike | None, num_classes: int, shape: tuple[int, ...]) -> Rows:
    """Maps labels to rows of a table, comparing them in their own dtype before they are narrowed to int32."""
    labels = as_integers(labels)
    if labels.shape != shape:
        one_hot = labels.shape == (*shape, num_classes)
        hint = '; for one-hot labels pass labels.argmax(-1)' if one_hot else ''
        raise ValueError(f'labels must have shape {shape}, as x without its last axis, got {labels.shape}{hint}')
    xp = np if isinstance(labels, np.ndarray) else jnp
    counted = labels >= 0
    if where is not None:
        where = check_where(where, shape)
        counted = counted & where
    in_table = below(labels, num_classes)
    mistakes = counted & ~in_table
    if is_concrete(mistakes):
        _raise_on_mistakes(labels, np.asarray(jax.device_get(mistakes)), num_classes)
    valid = counted & in_table
    narrow = xp.where((labels >= 0) & in_table, labels, xp.zeros_like(labels)).astype(np.int32)
    indices = jnp.where(counted, jnp.where(valid, narrow, np.int32(MISTAKE)), np.int32(LEFT_OUT))
    return Rows(indices, jnp.asarray(counted), jnp.asarray(valid))


def check_where(where: ArrayLike, shape: tuple[int, ...]) -> AnyArray:
    mask = where if isinstance(where, jax.Array) else np.asarray(where)
    if mask.dtype != bool:
        raise TypeError(f'where must be boolean, got {type_name(mask)}')
    if mask.shape != shape:
        raise ValueError(f'where must have shape {shape}, as the labels have, got {mask.shape}')
    return mask


def is_concrete(a: AnyArray) -> bool:
    """Whether this process can read the values of `a`, which inside a transformation it can not."""
    if isinstance(a, Tracer):
        return False
    return not isinstance(a, jax.Array) or a.is_fully_addressable


def examples(
    x: ArrayLike,
    centers: ArrayLike,
    labels: ArrayLike | Sequence,
    where: ArrayLike | None,
    weights: ArrayLike | None,
) -> Examples:
    """Checks a batch and sets it beside its centers, by one gather."""
    centers = check_table(centers)
    x = check_features(x, centers.shape[1])
    rows = rows_of(labels, where, centers.shape[0], x.shape[:-1])
    # The label of a row that only pads the table for a mesh is as far beyond the classes as any.
    valid = rows.valid & (rows.indices < num_rows_before_padding(centers))
    rows = Rows(jnp.where(rows.valid & ~valid, MISTAKE, rows.indices), rows.counted, valid)
    own = take_rows(centers, jnp.where(valid, rows.indices, 0))
    if weights is not None:
        weights = jnp.asarray(weights)
        if weights.shape not in (valid.shape, x.shape):
            raise ValueError(
                f'weights must have shape {valid.shape}, as the labels, or {x.shape}, as x, got {weights.shape}'
            )
        if jnp.issubdtype(weights.dtype, jnp.complexfloating):
            raise TypeError(f'weights must be real numbers, got {type_name(weights)}')
        weights = weights.astype(wide(x.dtype, centers.dtype))
        weights = jnp.where(valid[..., None], weights if weights.shape == x.shape else weights[..., None], 0)
    return Examples(x, own, weights, rows)
