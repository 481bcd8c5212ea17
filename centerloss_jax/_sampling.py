"""A sample of the classes: those of the batch, and others drawn without replacement."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from centerloss_jax._class_shards import ClassShards, find_shards, gather_batch
from centerloss_jax._inputs import (
    DROPPED,
    AxisName,
    as_integers,
    check_key,
    check_num_classes,
    check_size,
    class_index,
    is_row,
)
from centerloss_jax._sharding import first_row, vary_as


def sample_classes(
    key: ArrayLike,
    labels: ArrayLike | Sequence,
    num_classes: int,
    num_sampled: int,
    *,
    axis_name: AxisName | None = None,
    class_axis: AxisName | None = None,
    mesh: Mesh | None = None,
) -> Array:
    """Draws classes for a softmax: every class of the batch, the rest at random among the others.

    The others are drawn uniformly without replacement. Time and memory grow with S log S + B log B, S the number of
    sampled classes and B of labels, and not with the number of classes.

    As in Partial FC, a softmax over the sample is not corrected by the log of the probability that a class is drawn.
    Its loss is below the loss over all classes, and its gradient is a biased estimate of the gradient of that loss.

    With `class_axis` each of k devices draws S / k of its own rows of the table, those of the batch among them. A
    device with fewer rows that are classes takes rows of padding too, which get no logit.

    Args:
      key: a key of `jax.random`, the same on all devices.
      labels: integers of any shape and dtype. Negative labels name no class, and inside `jax.jit` labels of C or more
        name none either.
      num_classes: number of classes C.
      num_sampled: number of classes S in the sample: at least the smaller of C and the number of labels. Over k
        devices the share S / k must be at least the smaller of the labels of all devices and the rows of one.
      axis_name: other axes of the surrounding `jax.shard_map` or `jax.pmap` that the batch lies over.
      class_axis: the axes that the rows of the table lie over, as `shard_centers` lays them out. See `class_softmax`.
      mesh: the mesh of class_axis under `jax.jit`, by default that of `jax.set_mesh`.

    Returns:
      The classes, int32 `[S]`, distinct and in ascending order. Inside `jax.shard_map` and `jax.pmap` with class_axis,
      the rows of this device's part of the table, int32 `[S / k]`.

    Raises:
      TypeError: if key is not one key, or labels are not integers.
      ValueError: if num_sampled could not hold the classes of every batch, is too large, or is not divided by the
        devices of class_axis; if a label whose value is known is C or more; if class_axis is not in the mesh.
      NameError: if axis_name is not an axis that surrounds the call.

    Example:
      >>> import centerloss_jax as clj
      >>> import jax
      >>> key, labels = jax.random.key(0), [70, 3, 3, -1]
      >>> classes = clj.sample_classes(key, labels, num_classes=100, num_sampled=5)
      >>> classes.shape, 3 in classes, 70 in classes
      ((5,), True, True)

    References:
      An et al., "Partial FC: Training 10 Million Identities on a Single Machine", ICCVW 2021.
      An et al., "Killing Two Birds with One Stone: Efficient and Robust Training of Face Recognition CNNs by Partial
      FC", CVPR 2022.
    """
    check_key(key)
    check_num_classes(num_classes)
    check_size(num_sampled, 'num_sampled')
    labels = as_integers(labels)
    shards = find_shards(axis_name, class_axis, mesh)
    index = class_index(labels, None, num_classes, labels.shape)
    index = gather_batch(index.reshape(-1), shards)
    k, num_rows = shards.num_shards, -(-num_classes // shards.num_shards)
    fewest = min(index.size, num_rows)
    if num_sampled % k or not fewest <= num_sampled // k <= num_rows:
        multiple = f', a multiple of {k}' if k > 1 else ''
        raise ValueError(
            f'num_sampled must be from {k * fewest} to {k * num_rows}{multiple}, got {num_sampled}: the sample holds '
            f'the classes of {index.size} labels, out of {num_rows} classes' + (' on each device' if k > 1 else '')
        )
    return _sample_shards(key, index, int(num_classes), int(num_sampled), shards)


@partial(jax.jit, static_argnames=('num_classes', 'num_sampled', 'shards'))
def _sample_shards(key: Array, index: Array, num_classes: int, num_sampled: int, shards: ClassShards) -> Array:
    """Returns the sample of this device, or under `jax.jit` that of all devices."""
    size, num_rows = num_sampled // shards.num_shards, -(-num_classes // shards.num_shards)
    if not shards.class_axis:
        return _sample(key, index, num_classes, num_classes, size)

    def draw(key: Array, index: Array) -> Array:
        key = jax.random.fold_in(key, jax.lax.axis_index(shards.class_axis))
        first = first_row(shards.class_axis, num_rows)
        present = is_row(index) & (index >= first) & (index < first + num_rows)
        local = jnp.where(present, index - first, DROPPED)
        drawn = _sample(key, local, num_rows, jnp.clip(num_classes - first, 0, num_rows), size)
        return drawn if shards.mesh is None else drawn + first

    if shards.mesh is None:
        return draw(key, index)
    return jax.shard_map(draw, mesh=shards.mesh, in_specs=P(), out_specs=P(shards.class_axis))(key, index)


def _sample(key: Array, index: Array, num_rows: int, num_classes: Array | int, size: int) -> Array:
    """Samples the first num_classes of some rows, and where they are too few the rows behind them."""
    present, num_present = _distinct(jnp.where(is_row(index), index, DROPPED))
    # The others are numbered from 0. Number k is class k + (how many present classes have at most k others below).
    population, count = num_classes - num_present, jnp.minimum(num_classes, size) - num_present
    if num_rows > 4 * size:
        drawn = _draw(key, population, count, size)
    else:  # draws would repeat too often
        numbers = jax.random.permutation(key, num_rows).astype(jnp.int32)
        drawn, _ = _keep_first(numbers, numbers < population, count, size)
    others_below = jnp.where(present == DROPPED, DROPPED, present - jnp.arange(present.size, dtype=jnp.int32))
    skipped = jnp.searchsorted(others_below, drawn, side='right').astype(jnp.int32)
    others = jnp.where(drawn == DROPPED, DROPPED, drawn + skipped)
    sample = jnp.sort(jnp.concatenate([present, others]))[:size]
    return jnp.where(sample == DROPPED, jnp.arange(size, dtype=jnp.int32), sample)


def _draw(key: Array, population: Array, count: Array, size: int) -> Array:
    """Returns `count` distinct integers below `population`, DROPPED in the rest of int32 `[size]`.

    Draws with replacement until enough are distinct.
    """

    def missing(state):
        return state[2] < count

    def draw_more(state):
        key, drawn, _ = state
        key, key_of_draws = jax.random.split(key)
        more = jax.random.randint(key_of_draws, (size,), 0, population, jnp.int32)
        both = jnp.concatenate([drawn, more])
        order = jnp.argsort(both, stable=True)
        is_new = jnp.zeros(both.shape, bool).at[order].set(_is_first(both[order]))
        return key, *_keep_first(both, is_new, count, size)

    state = jax.tree.map(lambda a: vary_as(a, population), (key, jnp.full(size, DROPPED, jnp.int32), jnp.int32(0)))
    return jax.lax.while_loop(missing, draw_more, state)[1]


def _keep_first(numbers: Array, usable: Array, count: Array, size: int) -> tuple[Array, Array]:
    """Returns the first `count` usable numbers, in ascending order, and how many there are.

    The first in the order of the draws, and not the least: every set is then as likely as another.
    """
    kept = usable & (jnp.cumsum(usable, dtype=jnp.int32) <= count)
    return jnp.sort(jnp.where(kept, numbers, DROPPED))[:size], jnp.sum(kept, dtype=jnp.int32)


def _distinct(index: Array) -> tuple[Array, Array]:
    """Returns the distinct indices in order, DROPPED in the places that are left, and their number."""
    ordered = jnp.sort(index)
    first = _is_first(ordered)
    return jnp.sort(jnp.where(first, ordered, DROPPED)), jnp.sum(first, dtype=jnp.int32)


def _is_first(ordered: Array) -> Array:
    """Returns whether each of some sorted indices is the first of its value, and not DROPPED."""
    before = jnp.concatenate([jnp.full(1, -1, ordered.dtype), ordered[:-1]])
    return (ordered != before) & (ordered != DROPPED)
