"""A sample of the classes: those of the batch, and others drawn without replacement."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from centerloss_jax._inputs import DROPPED, as_integers, check_key, check_num_classes, check_size, class_index, is_row


def sample_classes(key: ArrayLike, labels: ArrayLike | Sequence, num_classes: int, num_sampled: int) -> Array:
    """Draws classes for a softmax: every class of the batch, the rest at random among the others.

    The others are drawn uniformly without replacement. Time and memory grow with S log S + B log B, S the number of
    sampled classes and B of labels, and not with the number of classes.

    As in Partial FC, a softmax over the sample is not corrected by the log of the probability that a class is drawn.
    Its loss is below the loss over all classes, and its gradient is a biased estimate of the gradient of that loss.

    Args:
      key: a key of `jax.random`.
      labels: integers of any shape and dtype. Negative labels name no class, and inside `jax.jit` labels of C or more
        name none either.
      num_classes: number of classes C.
      num_sampled: number of classes S in the sample: at least the smaller of C and the number of labels, at most C.

    Returns:
      The classes, int32 `[S]`, distinct and in ascending order.

    Raises:
      TypeError: if key is not one key, or labels are not integers.
      ValueError: if num_sampled could not hold the classes of every batch, or is more than C, or a label whose value is
        known is C or more.

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
    fewest = min(labels.size, num_classes)
    if not fewest <= num_sampled <= num_classes:
        raise ValueError(
            f'num_sampled must be from {fewest} to {num_classes}, got {num_sampled}: the sample holds the classes of '
            f'{labels.size} labels, out of {num_classes} classes'
        )
    index = class_index(labels, None, num_classes, labels.shape)
    return _sample(key, index.reshape(-1), int(num_classes), int(num_sampled))


@partial(jax.jit, static_argnames=('num_classes', 'num_sampled'))
def _sample(key: Array, index: Array, num_classes: int, num_sampled: int) -> Array:
    present, num_present = _distinct(jnp.where(is_row(index), index, DROPPED))
    # The others are numbered from 0. Number k is class k + (how many present classes have at most k others below).
    population, count = num_classes - num_present, num_sampled - num_present
    if num_classes > 4 * num_sampled:
        drawn = _draw(key, population, count, num_sampled)
    else:  # draws would repeat too often
        numbers = jax.random.permutation(key, num_classes).astype(jnp.int32)
        drawn, _ = _keep_first(numbers, numbers < population, count, num_sampled)
    others_below = jnp.where(present == DROPPED, DROPPED, present - jnp.arange(present.size, dtype=jnp.int32))
    skipped = jnp.searchsorted(others_below, drawn, side='right').astype(jnp.int32)
    others = jnp.where(drawn == DROPPED, DROPPED, drawn + skipped)
    return jnp.sort(jnp.concatenate([present, others]))[:num_sampled]


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

    state = key, jnp.full(size, DROPPED, jnp.int32), jnp.int32(0)
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
