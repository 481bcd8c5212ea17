"""The nearest center of each example, as exact as direct differences and nearly as fast as a matrix product.

The expanded square |x|^2 + |c|^2 - 2 x.c is one matrix product, but it is rounded: features of norm 1e4 that lie 1e-2
apart lose every digit. So it only proposes. Its rounding error is bounded, and every center that may be nearest within
that bound is measured by its direct difference. In most blocks of centers an example has no such candidate or one. An
example with many, such as an outlier or one among centers that coincide, is set aside and compared with all centers.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike, DTypeLike

from centerloss_jax._inputs import IGNORED, check_features, check_size, check_table, compute_dtype
from centerloss_jax._sharding import num_shards, on_auto_axes, take_rows, vary_as

# Candidates that an example measures in a block before it is set aside.
ROUNDS = 16
# Examples that are compared with all centers at a time.
EXAMPLES_AT_A_TIME = 8


class Best(NamedTuple):
    """The nearest center so far, for each example."""

    label: Array  # int32 [B], IGNORED where there is none
    distance: Array  # [B], squared; Inf where there is none


class Block(NamedTuple):
    """Some neighbouring centers of the table."""

    start: Array  # int32 [], the class of the first
    centers: Array  # [block, D], 0 where not finite


def nearest_center(x: ArrayLike, centers: ArrayLike, *, block_size: int | np.integer = 1024) -> tuple[Array, Array]:
    r"""The class of the nearest center, and the squared distance to it.

    .. math:: y_i = \arg\min_j |x_i - c_j|^2

    Memory is O(B * block_size + B * D), never B x C. The distance is that of the direct difference. Between equal
    distances the lowest class wins. A center that holds an Inf or a NaN is never returned; the rows that pad a table
    for a mesh hold Inf. The distance can be differentiated for x and for the centers.

    Args:
      x: features `[..., D]`, floating point; narrow dtypes are computed in float32.
      centers: `[C, D]`, floating point.
      block_size: centers that are compared at a time, over all shards together.

    Returns:
      `(labels, distances)`: int32 `[...]`, and the squared Euclidean distances `[...]` in float32 or wider. An
      example that is nearest to none, since it holds a NaN or an Inf or all its squared distances overflow, has the
      label -1 and the distance NaN.

    Raises:
      TypeError: if x or centers are not floating point.
      ValueError: if shapes do not fit, or block_size is not positive.

    Example:
      >>> import centerloss_jax as clj
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[3.0, 2.0], [0.0, 0.5]])
      >>> centers = jnp.array([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]])
      >>> labels, distances = clj.nearest_center(x, centers)
      >>> labels.tolist(), distances.tolist()
      ([2, 0], [1.0, 0.25])

    References:
      Nearest class mean: Mensink, Verbeek, Perronnin and Csurka, "Distance-Based Image Classification: Generalizing to
      New Classes at Near-Zero Cost", 2013.
    """
    centers = check_table(centers)
    x = check_features(x, centers.shape[1])
    check_size(block_size, 'block_size')
    spec = jax.typeof(x).sharding.spec
    search = partial(_nearest, block_size=int(block_size), shards=num_shards(centers))
    return on_auto_axes(search, x, centers, spec=P(*spec[:-1]))


@partial(jax.jit, static_argnames=('block_size', 'shards'))
def _nearest(x: Array, centers: Array, block_size: int, shards: int) -> tuple[Array, Array]:
    flat = x.reshape(-1, x.shape[-1]).astype(compute_dtype(x.dtype, centers.dtype))
    label = _search_shards(jax.lax.stop_gradient(flat), jax.lax.stop_gradient(centers), block_size, shards)
    found = label != IGNORED
    # Measured again, so that the distance has a gradient and the search needs none.
    nearest = take_rows(centers, jnp.where(found, label, 0)).astype(flat.dtype)
    distance = jnp.sum(jnp.square(jnp.where(found[:, None], flat - nearest, jnp.nan)), axis=-1)
    return label.reshape(x.shape[:-1]), distance.reshape(x.shape[:-1])


def _search_shards(x: Array, centers: Array, block_size: int, shards: int) -> Array:
    """Searches each shard of the table alone; only the best of each shard moves between devices."""
    num_classes, num_features = centers.shape
    rows = num_classes // shards
    search = partial(_search, block_size=min(-(-block_size // shards), rows))
    if shards == 1:  # without vmap, which masks every round of the search
        return search(x, centers).label
    best = jax.vmap(search, in_axes=(None, 0))(x, centers.reshape(shards, rows, num_features))
    shard = jnp.argmin(best.distance, axis=0).astype(jnp.int32)[None]  # the first of equals, so the lowest class
    label = jnp.take_along_axis(best.label, shard, axis=0)[0]
    return jnp.where(label == IGNORED, label, label + shard[0] * rows)


def _search(x: Array, centers: Array, block_size: int) -> Best:
    """Returns the nearest center of each example in one shard of the table."""
    # Distances do not depend on the origin, but their rounding does.
    origin = _origin(centers, x.dtype)

    def search_block(i, state):
        best, set_aside = state
        block, finite = _block(centers, i, block_size, x.dtype)
        return _search_block(x, block, _lower_bounds(x, block, origin, finite), best, set_aside)

    best = Best(jnp.full(x.shape[0], IGNORED, jnp.int32), jnp.full(x.shape[0], jnp.inf, x.dtype))
    state = jax.tree.map(lambda a: vary_as(a, x, centers), (best, jnp.zeros(x.shape[0], bool)))
    best, set_aside = jax.lax.fori_loop(0, -(-centers.shape[0] // block_size), search_block, state)

    def compare_some(state):
        best, set_aside = state
        size = min(EXAMPLES_AT_A_TIME, x.shape[0])
        (example,) = jnp.nonzero(set_aside, size=size, fill_value=x.shape[0])
        some = _compare_with_all(x.at[example].get(mode='fill', fill_value=0), centers, block_size)
        best = Best(*(a.at[example].set(b, mode='drop') for a, b in zip(best, some, strict=True)))
        return best, set_aside.at[example].set(False, mode='drop')

    return jax.lax.while_loop(lambda state: state[1].any(), compare_some, (best, set_aside))[0]


def _compare_with_all(x: Array, centers: Array, block_size: int) -> Best:
    """Returns the nearest center of a few examples by direct differences alone."""

    def compare_with_block(i, best):
        block, finite = _block(centers, i, block_size, x.dtype)

        def add_feature(d, squares):
            return squares + jnp.square(x[:, d, None] - block.centers[None, :, d])

        squares = jnp.broadcast_to(jnp.where(finite, jnp.zeros([], x.dtype), jnp.inf), (x.shape[0], block_size))
        squares = jax.lax.fori_loop(0, x.shape[1], add_feature, vary_as(squares, x, centers))
        return _nearer(x, block, _first_of_least(squares), squares.min(axis=-1) < jnp.inf, best)

    best = Best(jnp.full(x.shape[0], IGNORED, jnp.int32), jnp.full(x.shape[0], jnp.inf, x.dtype))
    best = jax.tree.map(lambda a: vary_as(a, x, centers), best)
    return jax.lax.fori_loop(0, -(-centers.shape[0] // block_size), compare_with_block, best)


def _block(centers: Array, i: Array, block_size: int, dtype: DTypeLike) -> tuple[Block, Array]:
    """Returns the i-th block of centers, and bool `[block]` whether each is finite.

    The last block starts early enough to be whole; what is seen twice changes nothing.
    """
    start = jnp.minimum(i * block_size, centers.shape[0] - block_size)
    rows = jax.lax.dynamic_slice_in_dim(centers, start, block_size).astype(dtype)
    finite = jnp.isfinite(rows).all(axis=-1)
    return Block(start, jnp.where(finite[:, None], rows, 0)), finite


def _lower_bounds(x: Array, block: Block, origin: Array, finite: Array) -> Array:
    """Returns a lower bound of each squared distance, `[B, block]`, from one matrix product; Inf rules a center out."""
    usable = jnp.isfinite(x).all(axis=-1)
    x, centers = jnp.where(usable[:, None], x, 0) - origin, block.centers - origin
    norms, radii = jnp.linalg.norm(x, axis=-1)[:, None], jnp.linalg.norm(centers, axis=-1)[None]
    product = jnp.dot(x, centers.T, precision=jax.lax.Precision.HIGHEST)
    # Bounds the error of the shift, of the D products and of their sums, relative to (|x| + |c|)^2.
    slack = 2 * (x.shape[1] + 8) * jnp.finfo(x.dtype).eps
    bound = jnp.square(norms) + jnp.square(radii) - 2 * product - slack * jnp.square(norms + radii)
    # A bound that overflows says nothing, so its center is measured.
    bound = jnp.where(jnp.isfinite(bound), bound, -jnp.inf)
    return jnp.where(finite[None] & usable[:, None], bound, jnp.inf)


def _search_block(x: Array, block: Block, bounds: Array, best: Best, set_aside: Array) -> tuple[Best, Array]:
    """Measures the centers of a block that may be nearest; sets an example with too many of them aside."""

    def measure(state):
        bounds, best, rounds = state
        return *_measure_candidates(x, block, bounds, best), rounds + 1

    def undecided_in_rounds(state):
        bounds, best, rounds = state
        return (_undecided(bounds, best) & ~set_aside).any() & (rounds < ROUNDS)

    bounds, best, _ = jax.lax.while_loop(undecided_in_rounds, measure, (bounds, best, 0))
    return best, set_aside | _undecided(bounds, best)


def _undecided(bounds: Array, best: Best) -> Array:
    """Returns bool `[B]`, whether a center of the block may be nearer, or as near and of a lower class."""
    least = bounds.min(axis=-1)
    return (least <= best.distance) & (least < jnp.inf)


def _measure_candidates(x: Array, block: Block, bounds: Array, best: Best) -> tuple[Array, Best]:
    """Measures for each example the center of the lowest bound."""
    candidate = _first_of_least(bounds)
    possible = jnp.take_along_axis(bounds, candidate[:, None], axis=-1)[:, 0] < jnp.inf
    seen = candidate[:, None] == jnp.arange(bounds.shape[1])[None]
    return jnp.where(seen, jnp.inf, bounds), _nearer(x, block, candidate, possible, best)


def _nearer(x: Array, block: Block, candidate: Array, possible: Array, best: Best) -> Best:
    """Measures one center of the block for each example and returns the nearer of it and the best."""
    distance = jnp.sum(jnp.square(x - block.centers[candidate]), axis=-1)
    label = block.start + candidate
    lower = (distance == best.distance) & (label < best.label)
    nearer = possible & ((distance < best.distance) | lower)
    return Best(*(jnp.where(nearer, a, b) for a, b in zip((label, distance), best, strict=True)))


def _first_of_least(values: Array) -> Array:
    """Returns argmin over the last axis of values without NaN, int32. XLA's own takes five times as long on CPUs."""
    place = jnp.arange(values.shape[-1], dtype=jnp.int32)[None]
    least = values.min(axis=-1, keepdims=True)
    return jnp.where(values == least, place, values.shape[-1] - 1).min(axis=-1)


def _origin(centers: Array, dtype: DTypeLike) -> Array:
    """Returns the middle of the table `[1, D]`: the median of a few centers, which a far one does not move."""
    few = centers[:: -(-centers.shape[0] // 64)].astype(dtype)
    finite = jnp.isfinite(few).all(axis=-1, keepdims=True)
    ordered = jnp.sort(jnp.where(finite, few, jnp.inf), axis=0)
    middle = ordered[jnp.maximum(finite.sum() // 2 - 1, 0)][None]
    return jnp.where(jnp.isfinite(middle), middle, 0)
