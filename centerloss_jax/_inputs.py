"""Checks of arguments with their messages, and the rules for labels.

Labels, and the indices of rows, are compared with 0 and with the number of rows in their own dtype, and narrowed to
int32 after that. JAX without x64 folds the NumPy label 2**32 + 3 to 3, and `jnp.where(y < 0, 1000, y)` on int8 is -24.
"""

import operator
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, export
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh
from jax.typing import ArrayLike

HostOrDevice = np.ndarray | Array
ReduceFn = Callable[[Array], Array]
AxisName = str | tuple[str, ...]

# Indices that name no row: an example that is left out, and a label or row that is dropped because it is a mistake.
IGNORED = -1
DROPPED = int(np.iinfo(np.int32).max)


def check_labels(labels: ArrayLike | Sequence, num_classes: int) -> None:
    """Checks labels on the host, before they enter a compiled step.

    Inside `jax.jit` a label of C or more makes the loss NaN. On the host it is an error that gives its place.

    Args:
      labels: integers of any shape and integer dtype, on the host or on a device. Negative labels pass: they leave an
        example out.
      num_classes: number of classes C; the valid labels are 0 to C - 1.

    Raises:
      TypeError: if labels are not integers, or are traced.
      ValueError: if a label is `num_classes` or more; the message gives the first one and its place. If num_classes is
        no integer of at least 1.

    Example:
      >>> import centerloss_jax as clj
      >>> clj.check_labels([0, 2, -1], num_classes=3)
      >>> clj.check_labels([1, 2, 3], num_classes=3)
      Traceback (most recent call last):
      ValueError: labels[2] is 3, but there are 3 classes: valid labels are 0 to 2; negative ones leave an example out
    """
    check_num_classes(num_classes)
    labels = as_integers(labels)
    check_not_traced(labels, 'labels', 'check_labels')
    labels = np.asarray(jax.device_get(labels))
    _raise_on_mistakes(labels, np.asarray(row_index(labels, num_classes)) == DROPPED, num_classes)


def class_index(
    labels: ArrayLike | Sequence, where: ArrayLike | None, num_classes: int, shape: tuple[int, ...]
) -> Array:
    """Returns the row of each label, int32 of the given shape: IGNORED where left out, DROPPED for labels >= C.

    A label >= C is an error where its value is known; a traced label has none.
    """
    labels = as_integers(labels)
    if labels.shape != shape:
        one_hot = labels.shape == (*shape, num_classes)
        hint = '; for one-hot labels pass labels.argmax(-1)' if one_hot else ''
        raise ValueError(f'labels must have shape {shape}, as x without its last axis, got {labels.shape}{hint}')
    index = row_index(labels, num_classes)
    if where is not None:
        where = _check_where(where, shape)
        xp = np if isinstance(index, np.ndarray) and isinstance(where, np.ndarray) else jnp
        index = xp.where(where, index, np.int32(IGNORED))
    if is_concrete(index):
        _raise_on_mistakes(labels, np.asarray(jax.device_get(index)) == DROPPED, num_classes)
    return jnp.asarray(index)


def row_index(integers: HostOrDevice, num_rows: int) -> HostOrDevice:
    """Narrows integers to int32: IGNORED where they are negative, DROPPED where they are num_rows or more."""
    xp = np if isinstance(integers, np.ndarray) else jnp
    largest = int(jnp.iinfo(integers.dtype).max)
    # A dtype that cannot hold num_rows holds no integer beyond the table.
    in_table = xp.ones_like(integers, dtype=bool) if at_most(largest + 1, num_rows) else integers < num_rows
    narrow = xp.where(in_table, integers, xp.zeros_like(integers)).astype(np.int32)
    return xp.where(integers < 0, np.int32(IGNORED), xp.where(in_table, narrow, np.int32(DROPPED)))


def at_most(number: Any, limit: Any) -> bool:
    """Returns True if number <= limit is known to hold, False for None and for symbolic sizes of `jax.export`."""
    return isinstance(number, Integral) and isinstance(limit, Integral) and number <= limit


def check_key(key: Any) -> None:
    try:
        shape = jax.random.key_data(key).shape[:-1]
    except (TypeError, ValueError):
        raise TypeError(f'key must be a key of jax.random, got {type(key).__name__}') from None
    if shape:
        raise TypeError(f'key must be a key of jax.random, got keys of shape {list(shape)}')


def check_num_classes(num_classes: int) -> None:
    check_size(num_classes, 'num_classes')
    if at_most(DROPPED, num_classes):
        raise ValueError(f'num_classes must be less than {DROPPED}, got {num_classes}')


def check_size(size: Any, name: str) -> None:
    try:
        positive = export.is_symbolic_dim(size) or operator.index(size) >= 1
    except TypeError:
        positive = False
    if not positive:
        raise ValueError(f'{name} must be an integer of at least 1, got {size!r}')


def check_classes(classes: ArrayLike | Sequence, num_rows: int, num_shards: int = 1) -> Array:
    """Returns the classes of a sample, int32 `[S]`; their order and their range are checked where values are known.

    With num_shards, each shard of the rows has as many of them as the others.
    """
    classes = as_integers(classes, 'classes')
    if classes.ndim != 1 or classes.size == 0:
        raise ValueError(f'classes must have shape [S] with S at least 1, got {list(classes.shape)}')
    index = row_index(classes, num_rows)
    by_shard = classes.size % num_shards == 0
    if is_concrete(index):
        known = np.asarray(jax.device_get(index))
        if not ((known >= 0) & (known < num_rows)).all() or not (np.diff(known) > 0).all():
            raise ValueError(
                f'classes must be distinct, in ascending order and from 0 to {num_rows - 1}, as sample_classes '
                'returns them'
            )
        if by_shard and num_shards > 1:
            shard = np.repeat(np.arange(num_shards), classes.size // num_shards)
            by_shard = (known // (num_rows // num_shards) == shard).all()
    if not by_shard:
        raise ValueError(
            f'classes must have equally many for each of the {num_shards} shards of the table, as sample_classes with '
            'class_axis= returns them'
        )
    return jnp.asarray(index)


def check_not_traced(a: Any, name: str, function: str) -> None:
    if isinstance(a, Tracer):
        raise TypeError(f'{function} reads the values of {name}, but they are traced: call it outside of jax.jit')


def check_table(centers: ArrayLike, name: str = 'centers') -> Array:
    centers = check_floating(centers, name)
    if centers.ndim != 2 or 0 in centers.shape:
        raise ValueError(f'{name} must have shape [C, D] with C and D at least 1, got {list(centers.shape)}')
    if at_most(DROPPED, centers.shape[0]):
        raise ValueError(f'{name} must have fewer than {DROPPED} rows, got {centers.shape[0]}')
    return centers


def check_features(x: ArrayLike, num_features: int | None = None) -> Array:
    x = check_floating(x, 'x')
    if x.ndim < 1 or x.shape[-1] == 0 or (num_features is not None and x.shape[-1] != num_features):
        expected = 'D at least 1' if num_features is None else f'D={num_features} as the centers have'
        raise ValueError(f'x must have shape [..., D] with {expected}, got {list(x.shape)}')
    return x


def check_weights(weights: ArrayLike, x: Array) -> Array:
    """Returns weights that broadcast against x: `[..., 1]` or x.shape."""
    array, by_example = as_array(weights, 'weights', 'real numbers'), x.shape[:-1]
    if array.shape not in (by_example, x.shape):
        raise ValueError(f'weights must have shape {by_example}, as the labels, or {x.shape}, as x, got {array.shape}')
    if not jnp.isrealobj(array) or jnp.issubdtype(array.dtype, jax.dtypes.extended):
        raise TypeError(f'weights must be real numbers, got {type_name(array)}')
    return array if array.shape == x.shape else array[..., None]


def check_reduction(reduce_fn: ReduceFn | None, axis_name: AxisName | None) -> None:
    if axis_name is not None and reduce_fn is not jnp.mean:
        raise ValueError('axis_name goes with reduce_fn=jnp.mean alone: it sets the denominator of the mean')
    if reduce_fn is not None and not callable(reduce_fn):
        raise TypeError(f'reduce_fn must be a function such as jnp.sum, or None, got {reduce_fn!r}')


def check_axis_name(axis_name: AxisName | None) -> None:
    if not all(map(is_mapped, axis_names(axis_name, 'axis_name'))):
        raise NameError(
            f'axis_name={axis_name!r} is not the name of an axis here: pass the axis_name of the jax.pmap, '
            'jax.shard_map or jax.vmap around this call, or leave axis_name out on one device and under a plain jax.jit'
        )


def axis_names(names: AxisName | None, argument: str) -> tuple[str, ...]:
    """Returns the names of mapped or mesh axes as a tuple."""
    as_tuple = () if names is None else names if isinstance(names, tuple) else (names,)
    if not all(isinstance(name, str) for name in as_tuple):
        raise TypeError(f'{argument} must be the name of an axis or a tuple of names, got {names!r}')
    return as_tuple


def is_mapped(name: str) -> bool:
    """Returns whether the call is inside of a `jax.pmap`, `jax.shard_map` or `jax.vmap` over this axis."""
    try:
        jax.lax.axis_size(name)
    except NameError:
        return False
    return True


def check_optimizer(optimizer: Any, name: str) -> None:
    if not hasattr(optimizer, 'update'):
        raise TypeError(f'{name} must be an optax optimizer, such as optax.adam(1e-3), got {optimizer!r}')


def check_mesh(mesh: Any) -> None:
    if mesh is not None and not isinstance(mesh, (Mesh, AbstractMesh)):
        raise TypeError(f'mesh must be a jax.sharding.Mesh, got {mesh!r}')


def check_alpha(alpha: Any) -> None:
    if callable(alpha):
        return
    if not _is_real_number(alpha):
        raise TypeError(f'alpha must be a number in [0, 1] or an optax schedule, got {alpha!r}')
    if not isinstance(alpha, Tracer) and not 0 <= alpha <= 1:
        raise ValueError(f'alpha must be in [0, 1] or an optax schedule, got {alpha}')


def check_number(number: Any, name: str, *, positive: bool = False) -> None:
    if not _is_real_number(number):
        raise TypeError(f'{name} must be a number, got {number!r}')
    if positive and not isinstance(number, Tracer) and not number > 0:
        raise ValueError(f'{name} must be positive, got {number}')


def alpha_at(alpha: Any, count: Array) -> Any:
    """Returns the alpha of a step, from the schedule where it is one."""
    if not callable(alpha):
        return alpha
    value = alpha(count)
    if not _is_real_number(value):
        raise TypeError(f'alpha must be a schedule that returns a number, got {value!r}')
    return value


def is_row(index: Array) -> Array:
    """Returns whether an index that is IGNORED, DROPPED or a row is a row."""
    return (index != IGNORED) & (index != DROPPED)


def compute_dtype(*dtypes: np.dtype) -> np.dtype:
    """Returns the dtype of a computation on these dtypes: their common one, and float32 at least."""
    with jax.numpy_dtype_promotion('standard'):  # an explicit choice, which 'strict' would refuse
        return jnp.promote_types(jnp.result_type(*dtypes), jnp.float32)


def type_name(a: HostOrDevice) -> str:
    """Returns the type as JAX writes it: float32[4,2]."""
    return f'{a.dtype.name}[{",".join(map(str, a.shape))}]'


def as_integers(labels: ArrayLike | Sequence, name: str = 'labels') -> HostOrDevice:
    """Checks the dtype. NumPy and Python labels stay NumPy's, since JAX without x64 would fold them to 32 bits."""
    traced = isinstance(labels, (list, tuple)) and any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(labels))
    array = as_array(labels, name, 'integers', jnp if traced or isinstance(labels, jax.Array) else np)
    if isinstance(labels, list) and array.size == 0:
        array = array.astype(np.int32)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        hint = f'cast them with {name}.astype(int)' if array.ndim < 2 else 'for one-hot labels pass labels.argmax(-1)'
        hint = 'a mask is passed as where=' if array.dtype == bool else hint
        raise TypeError(f'{name} must be integers, got {type_name(array)}; {hint}')
    return array


def _raise_on_mistakes(labels: HostOrDevice, mistakes: np.ndarray, num_classes: int) -> None:
    if mistakes.any():
        place = tuple(int(i) for i in np.argwhere(mistakes)[0])
        subscript = ', '.join(map(str, place))
        bad = np.asarray(jax.device_get(labels))[place]
        raise ValueError(
            f'labels{f"[{subscript}]" if place else ""} is {bad}, but there are {num_classes} classes: valid labels '
            f'are 0 to {num_classes - 1}; negative ones leave an example out'
        )


def _check_where(where: ArrayLike, shape: tuple[int, ...]) -> HostOrDevice:
    mask = where if isinstance(where, jax.Array) else as_array(where, 'where', 'boolean', np)
    if mask.dtype != bool:
        raise TypeError(f'where must be boolean, got {type_name(mask)}')
    if mask.shape != shape:
        raise ValueError(f'where must have shape {shape}, as the labels have, got {mask.shape}')
    return mask


def check_floating(a: ArrayLike, name: str) -> Array:
    array = as_array(a, name, 'a floating point array')
    check_floating_dtype(array, name)
    return array


def check_floating_dtype(array: Any, name: str) -> None:
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f'{name} must be floating point, got {type_name(array)}; cast with .astype(...)')
    if array.dtype.itemsize < 2:
        raise TypeError(f'{name} must be float16 or wider, got {type_name(array)}; cast with .astype(...)')


def as_array(a: Any, name: str, kind: str, xp: Any = jnp) -> Any:
    """Returns `a` as an array of JAX or of NumPy."""
    try:
        return xp.asarray(a)
    except (TypeError, ValueError) as error:
        raise TypeError(f'{name} must be {kind}, got {type(a).__name__} that is no array') from error


def _is_real_number(a: Any) -> bool:
    numbers: Any = (Real, np.ndarray, jax.Array)
    return isinstance(a, numbers) and np.ndim(a) == 0 and np.isrealobj(a)


def is_concrete(a: HostOrDevice) -> bool:
    """Returns whether this process can read the values of `a`."""
    if isinstance(a, Tracer):
        return False
    return not isinstance(a, jax.Array) or a.is_fully_addressable
