"""Batches of a split, shuffled and prefetched by Grain; their position is one number of the run's state.

Grain's own shuffle takes 23 microseconds an index, a sixth of a small step. So an order is drawn for a whole epoch from
Grain's generator of random numbers, and a split is asked for a batch at a time: no image costs a call of its own.

A batch of P x K examples holds K examples of each of P classes. An epoch has the same number of steps in both forms.
"""

import functools
from collections.abc import Iterator

import grain
import numpy as np

from experiments.data.splits import LazySplit, Split

Batch = tuple[np.ndarray, np.ndarray]  # images [B, H, W, K] uint8, labels [B] int32

# Enough to hide decoding behind a step, and few enough that large images do not fill the memory.
READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)


def steps_of(split: Split | LazySplit, batch_size: int) -> int:
    """Returns the number of batches of an epoch: the number of examples over the batch size, rounded up."""
    return -(-len(split) // batch_size)


def train_batches(
    split: Split | LazySplit,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    *,
    images_per_class: int = 0,
) -> grain.DatasetIterator:
    """Returns batches without end, in another order each epoch; `get_state` and `set_state` continue exactly.

    `batch_size` is that of all processes together: each one gets its share of the same batches,
    `batch_size / process_count` examples, so that their number does not change what a run sees.

    Args:
        split: The examples.
        batch_size: Examples of a batch, a multiple of `images_per_class`.
        seed: Seed of the order. The batch of a step depends on the split, the seed and the step alone.
        process_index: Index of this process.
        process_count: Number of processes.
        images_per_class: Examples of each class in a batch, drawn by `draw_classes`. With 0, all examples are shuffled,
            and the last batch of an epoch is filled up with its first images and the label -1, so that shapes never
            change and BatchNorm sees no other images.
    """
    own, _ = process_slice(batch_size, process_index, process_count)
    steps = steps_of(split, batch_size)

    def draw(_, rng: np.random.Generator) -> np.ndarray:
        if not images_per_class:
            return rng.permutation(len(split))
        return draw_classes(split.labels, batch_size // images_per_class, images_per_class, steps, rng).ravel()

    orders = grain.MapDataset.range(1).seed(seed).random_map(draw).repeat()
    order = functools.lru_cache(maxsize=2)(orders.__getitem__)  # by epoch; threads may be in two of them

    def batch(index: int, step: int) -> Batch:
        indices = np.asarray(order(index // steps))[step * batch_size : (step + 1) * batch_size]
        return _take(split, indices, own, batch_size)

    return iter(grain.MapDataset.range(steps).repeat().map_with_index(batch).to_iter_dataset(READ_OPTIONS))


def draw_classes(
    labels: np.ndarray, classes_per_batch: int, images_per_class: int, steps: int, rng: np.random.Generator
) -> np.ndarray:
    """Draws the P x K batches of an epoch.

    The classes are shuffled in rounds. A round has as many batches of P classes as it can fill, so that each class is
    in at most one of them; the classes that are left over wait for the next round. Each time, a class gives the next K
    of its shuffled examples, and begins again at the first one after the last. So a batch repeats an example only if
    its class has fewer than K.

    Args:
        labels: `[N]`, the classes of all examples. Negative labels are left out.
        classes_per_batch: P, at most the number of classes that occur.
        images_per_class: K.
        steps: The number of batches.
        rng: The generator of random numbers.

    Returns:
        Indices of examples `[steps, P, K]`.
    """
    shuffled = rng.permutation(np.flatnonzero(labels >= 0))
    by_class = shuffled[np.argsort(labels[shuffled], kind='stable')]
    _, starts, counts = np.unique(labels[by_class], return_index=True, return_counts=True)

    in_round = len(counts) // classes_per_batch
    rounds = np.tile(np.arange(len(counts)), (-(-steps // in_round), 1))
    drawn = rng.permuted(rounds, axis=1)[:, : in_round * classes_per_batch].reshape(-1, classes_per_batch)[:steps]

    # How often the class was drawn before in this epoch.
    flat = drawn.ravel()
    sorting = np.argsort(flat, kind='stable')
    times = np.bincount(flat, minlength=len(counts))
    before = np.empty_like(flat)
    before[sorting] = np.arange(len(flat)) - np.repeat(np.cumsum(times) - times, times)

    nth = before.reshape(drawn.shape)[..., None] * images_per_class + np.arange(images_per_class)
    return by_class[starts[drawn][..., None] + nth % counts[drawn][..., None]]


def eval_batches(
    split: Split | LazySplit, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """Returns all examples once in order. The last batch is padded, and each batch is split as in training."""
    own, _ = process_slice(batch_size, process_index, process_count)
    order = grain.MapDataset.range(len(split)).batch(batch_size, batch_fn=np.asarray)
    return iter(order.map(lambda indices: _take(split, indices, own, batch_size)).to_iter_dataset(READ_OPTIONS))


def process_slice(
    batch_size: int, process_index: int, process_count: int, name: str = '--batch-size'
) -> tuple[slice, int]:
    """Returns which examples of a batch a process reads, and how many."""
    if batch_size % process_count:
        raise ValueError(f'{name} must be a multiple of the {process_count} processes, got {batch_size}')
    size = batch_size // process_count
    return slice(process_index * size, (process_index + 1) * size), size


def _take(split: Split | LazySplit, indices: np.ndarray, own: slice, batch_size: int) -> Batch:
    """Returns a process's part of a batch, which is filled up with its first examples and the label -1."""
    if len(indices) == batch_size:
        return split.take(indices[own])
    places, repeated = np.unique(np.resize(np.arange(len(indices)), batch_size)[own], return_inverse=True)
    images, labels = split.take(indices[places])
    return images[repeated], np.where(np.arange(batch_size)[own] < len(indices), labels[repeated], -1)
