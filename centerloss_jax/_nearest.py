"""The nearest center of each example, as exact as direct differences and nearly as fast as a matrix product.

The expanded square |x|^2 + |c|^2 - 2 x.c is one matrix product, but it is rounded: features of norm 1e4 that lie 1e-2
apart lose every digit. So it only proposes. Its rounding error is bounded, and every center that may be nearest within
that bound is measured by its direct difference. For most blocks of centers no example needs even one; where there are
too many, as among centers that coincide, the whole block is measured.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from centerloss_jax._lookup import LEFT_OUT, check_features, check_table, wide
from centerloss_jax._mesh import num_shards, on_auto_axes

# Candidates of a block that are measured one by one before all of them are.
ROUNDS = 16


def nearest_center(x: ArrayLike, centers: ArrayLike, *, block_size: int = 1024) -> tuple[Array, Array]:
    r"""The class of the nearest center, and the squared distance to it.

    .. math:: y_i = \arg\min_j |x_i - c_j|^2

    Memory is O(B * block_size), never B x C. The distance is that of the direct difference; between equal distances
    the lowest class wins. A center that holds an Inf or a NaN, as the rows that pad a table for a mesh do, is never
    returned.

    Args:
      x: features `[..., D]`, floating point; narrow dtypes are computed in float32.
      centers: `[C, D]`, floating point.
      block_size: centers that are compared at a time.

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
      >>> centers = jnp.array([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]])
      >>> labels, distances = clj.nearest_center(jnp.array([[3.0, 2.0], [0.0, 0.5]]), centers)
      >>> labels.tolist(), distances.tolist()
      ([2, 0], [1.0, 0.25])

    References:
      Nearest class mean: Mensink, Verbeek, Perronnin and Csurka, "Distance-Based Image Classification: Generalizing to
      New Classes at Near-Zero Cost", 2013.
    """
    centers = check_table(centers)
    x = check_features(x, centers.shape[1])
    if not isinstance(block_size, int) or block_size < 1:
        raise ValueError(f'block_size must be an integer of at least 1, got {block_size!r}')
    spec = jax.typeof(x).sharding.spec
    search = partial(_nearest, block_size=block_size, shards=num_shards(centers))
    return on_auto_axes(search, x, centers, spec=P(*spec[:-1]))


@partial(jax.jit, static_argnames=('block_size', 'shards'))
def _nearest(x: Array, centers: Array, block_size: int, shards: int) -> tuple[Array, Array]:
    """Searches each device's part of the table by itself; what travels is the best of each part."""
    num_classes, num_features = centers.shape
    rows = num_classes // shards
    flat = x.reshape(-1, num_features).astype(wide(x.dtype, centers.dtype))
    search = partial(_search, block_size=min(-(-block_size // shards), rows))
    if shards == 1:  # not vmapped, which would mask every round of the search
        labels, distances = (best[None] for best in search(flat, centers))
    else:
        parts = centers.reshape(shards, rows, num_features)
        labels, distances = jax.vmap(search, in_axes=(None, 0))(flat, parts)
    best = jnp.argmin(distances, axis=0)[None]  # the first of equals, and so the lowest class
    label = jnp.take_along_axis(labels, best, axis=0)[0]
    distance = jnp.take_along_axis(distances, best, axis=0)[0]
    found = label != LEFT_OUT
    label = jnp.where(found, label + best[0] * rows, LEFT_OUT).astype(jnp.int32)
    return label.reshape(x.shape[:-1]), jnp.where(found, distance, jnp.nan).reshape(x.shape[:-1])


def _search(x: Array, centers: Array, block_size: int) -> tuple[Array, Array]:
    """Labels `[B]` and squared distances `[B]` in one part of the table; LEFT_OUT and Inf where there is none."""
    num_classes, num_features = centers.shape
    dtype = x.dtype
    # Distances do not depend on the origin, but their rounding does.
    origin = _origin(centers, dtype)
    usable = jnp.isfinite(x).all(axis=-1)
    shifted = jnp.where(usable[:, None], x, 0) - origin
    norms = jnp.linalg.norm(shifted, axis=-1)
    # Bounds the error of the shift, of the D products and of their sums, relative to (|x| + |c|)^2.
    slack = 2 * (num_features + 8) * jnp.finfo(dtype).eps

    def block(i, best):
        # The last block starts early enough to be whole; what it sees again changes nothing.
        start = jnp.minimum(i * block_size, num_classes - block_size)
        own = jax.lax.dynamic_slice_in_dim(centers, start, block_size).astype(dtype)
        finite = jnp.isfinite(own).all(axis=-1)
        there = jnp.where(finite[:, None], own - origin, 0)
        radii = jnp.linalg.norm(there, axis=-1)
        product = jnp.dot(shifted, there.T, precision=jax.lax.Precision.HIGHEST)
        expanded = (norms * norms)[:, None] + (radii * radii) - 2 * product
        lowest = expanded - slack * jnp.square(norms[:, None] + radii)
        # What overflows says nothing, so it is measured. A center that is not finite is never a candidate.
        lowest = jnp.where(jnp.isfinite(lowest), lowest, -jnp.inf)
        lowest = jnp.where(finite & usable[:, None], lowest, jnp.inf)

        def settle(candidate, best):
            labels, distances = best
            possible = jnp.take_along_axis(lowest, candidate[:, None], axis=-1)[:, 0] < jnp.inf
            distance = jnp.sum(jnp.square(x - own[candidate]), axis=-1)
            label = (start + candidate).astype(jnp.int32)
            closer = possible & ((distance < distances) | ((distance == distances) & (label < labels)))
            return jnp.where(closer, label, labels), jnp.where(closer, distance, distances)

        def unsettled(state):
            lowest, (_, distances), _ = state
            least = lowest.min(axis=-1)
            return ((least <= distances) & (least < jnp.inf)).any()

        def measure_one(state):
            lowest, best, rounds = state
            candidate = _first_of_least(lowest)
            seen = candidate[:, None] == jnp.arange(block_size)
            return jnp.where(seen, jnp.inf, lowest), settle(candidate, best), rounds + 1

        def measure_all(state):
            lowest, best, rounds = state

            def add_feature(d, squares):
                return squares + jnp.square(x[:, d, None] - jnp.where(finite, own[:, d], 0))

            # Begun from the state: what does not depend on it XLA would move out of the loop, and always do.
            squares = jax.lax.fori_loop(0, num_features, add_feature, jnp.where(lowest < jnp.inf, 0, jnp.inf))
            candidate = _first_of_least(squares)
            return jnp.full_like(lowest, jnp.inf), settle(candidate, best), rounds

        state = lowest, best, 0
        state = jax.lax.while_loop(lambda state: unsettled(state) & (state[2] < ROUNDS), measure_one, state)
        # No bound tells centers apart that coincide, as those do that never moved. This runs once or not at all; a
        # lax.cond, which it is, would run both ways under vmap.
        return jax.lax.while_loop(unsettled, measure_all, state)[1]

    best = jnp.full(x.shape[0], LEFT_OUT, jnp.int32), jnp.full(x.shape[0], jnp.inf, dtype)
    return jax.lax.fori_loop(0, -(-num_classes // block_size), block, best)


def _first_of_least(values: Array) -> Array:
    """argmin over the last axis of values without NaN. XLA's own takes five times as long on CPUs, entry by entry."""
    place = jnp.arange(values.shape[-1], dtype=jnp.int32)
    least = values.min(axis=-1, keepdims=True)
    return jnp.where(values == least, place, values.shape[-1] - 1).min(axis=-1)


def _origin(centers: Array, dtype) -> Array:
    """Where the table lies: the median of a few centers, which a far one does not move."""
    few = centers[:: -(-centers.shape[0] // 64)].astype(dtype)
    finite = jnp.isfinite(few).all(axis=-1, keepdims=True)
    ordered = jnp.sort(jnp.where(finite, few, jnp.inf), axis=0)
    middle = ordered[finite.sum() // 2 - (finite.sum() > 0)]
    return jnp.where(jnp.isfinite(middle), middle, 0)
