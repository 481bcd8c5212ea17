"""Rows of one class: how many there are, which is the first, and the order that makes them neighbours."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from centerloss_jax._inputs import DROPPED, at_most
from centerloss_jax._kernels import platform

# Up to this many classes for each row an accelerator counts in arrays `[C]`. Beyond, it sorts the rows.
CLASSES_PER_ROW = 256
# A CPU sums rows of up to this many features in an array `[N, D]`, and wider ones in a loop over sorted rows.
NARROW = 128
# The limit on a CPU for such rows. Two arrays of so many classes are as large as a batch of 16 features.
CLASSES_PER_ROW_ON_CPU = 8
# Rows of one partial sum. A single float32 sum of 2**20 equal numbers is off by 1 %.
ROWS_AT_A_TIME = 8192


@functools.partial(jax.jit, static_argnames=('num_classes', 'num_features'))
def class_sizes(index: Array, num_classes: int | None, num_features: int) -> Array:
    """Returns for each row how many rows share its index, n_j, int32 `[N]`; undefined for DROPPED.

    jnp.sum(index[:, None] == index, axis=1)
    """
    return sizes_and_first(index, num_classes, num_features)[0]


def split_large_batch(index: Array, num_classes: int) -> tuple[Array, int]:
    """Returns an index into several tables of C rows, one for each part of a large batch, and their number.

    The sum of the tables keeps digits that one sum of a million rows loses. Together they have at most N rows.
    """
    if at_most(index.size, 2 * ROWS_AT_A_TIME) or not at_most(2 * num_classes, index.size):
        return index, 1
    parts = min(-(-index.size // ROWS_AT_A_TIME), index.size // num_classes)
    part = jnp.arange(index.size, dtype=jnp.int32) // -(-index.size // parts)
    return jnp.where(index == DROPPED, DROPPED, index + num_classes * part), parts


def sizes_and_first(index: Array, num_classes: int | None, num_features: int) -> tuple[Array, Array]:
    """Returns for each row the number of rows with its index and the first of them, int32 `[N]`; not for DROPPED.

    On a CPU a step of few features takes longer where C passes 8 N, by one sort. It does not where C passes N.
    """
    in_arrays = functools.partial(_count_in_arrays, num_classes=num_classes)
    if at_most(num_classes, index.size):
        return in_arrays(index)
    by_sorting = functools.partial(_count_by_sorting, num_classes=num_classes)
    few_on_cpu = at_most(num_classes, CLASSES_PER_ROW_ON_CPU * index.size) and at_most(num_features, NARROW)
    few = at_most(num_classes, CLASSES_PER_ROW * index.size)
    return platform.by_platform(
        index, cpu=in_arrays if few_on_cpu else by_sorting, default=in_arrays if few else _count_by_sorting
    )


def _count_in_arrays(index: Array, num_classes: Any) -> tuple[Array, Array]:
    rows = jnp.arange(index.size, dtype=jnp.int32)
    first = jnp.full(num_classes, DROPPED, jnp.int32).at[index].min(rows, mode='drop')
    hints: Any = {'mode': 'fill', 'fill_value': 0}
    return counts_by_class(index, num_classes).at[index].get(**hints), first.at[index].get(**hints)


def counts_by_class(index: Array, num_classes: int) -> Array:
    return jnp.zeros(num_classes, jnp.int32).at[index].add(1, mode='drop')


def _count_by_sorting(index: Array, num_classes: int | None = None) -> tuple[Array, Array]:
    order, _, group = sorted_groups(index, num_classes)
    first = jnp.full_like(group, DROPPED).at[group].min(order, mode='promise_in_bounds')
    back: Any = {'unique_indices': True, 'mode': 'promise_in_bounds'}
    zeros = jnp.zeros_like(group)
    return zeros.at[order].set(group_sizes(group)[group], **back), zeros.at[order].set(first[group], **back)


def sorted_groups(index: Array, num_classes: int | None = None) -> tuple[Array, Array, Array]:
    """Returns the order that sorts the rows by index, the sorted index, and the number of each row's group in it.

    With num_classes an index and its row are sorted as one number where 32 bits hold it. A CPU sorts one array in a
    quarter of the time of two.
    """
    size = index.size
    if at_most(1, size) and at_most(num_classes, 2**32 // size - 1):
        key = jnp.minimum(index, num_classes).astype(jnp.uint32) * size + jnp.arange(size, dtype=jnp.uint32)
        key = jnp.sort(key)
        order, index = (key % size).astype(jnp.int32), (key // size).astype(jnp.int32)
        index = jnp.where(index == num_classes, DROPPED, index)
    else:
        order = jnp.argsort(index).astype(jnp.int32)
        index = index[order]
    starts = (jnp.arange(size) == 0) | (index != jnp.roll(index, 1))
    return order, index, jnp.cumsum(starts, dtype=jnp.int32) - 1


def group_sizes(group: Array) -> Array:
    return jnp.zeros_like(group).at[group].add(1, mode='promise_in_bounds')
