import json
from itertools import islice

import grain
import numpy as np
import pytest

from experiments.data import batches as module
from experiments.data.batches import draw_classes, eval_batches, train_batches
from experiments.data.splits import Split


def numbered(count: int) -> Split:
    """A split whose labels say which example it is, and whose images say it too."""
    labels = np.arange(count, dtype=np.int32)
    images = np.broadcast_to(labels.astype(np.uint8)[:, None, None, None] + 1, (count, 4, 6, 1))
    return Split(np.ascontiguousarray(images), labels)


def of_classes(*counts: int) -> Split:
    """A split with so many examples of each class, whose images say which example it is, in mixed order."""
    split = numbered(sum(counts))
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    return Split(split.images, labels.astype(np.int32))


def examples_of(batches: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Which examples of a split by `of_classes` are in the batches, `[steps, B]`."""
    return np.stack([images[:, 0, 0, 0].astype(int) - 1 for images, _ in batches])


def take(iterator, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    return list(islice(iterator, count))


@pytest.mark.parametrize('batch_size', [1, 4, 5, 10, 16])
def test_an_epoch_holds_each_example_once_and_is_filled_up_to_whole_batches(batch_size):
    split = numbered(10)
    batches = take(train_batches(split, batch_size, seed=0), 2 * -(-10 // batch_size))
    for epoch in (batches[: len(batches) // 2], batches[len(batches) // 2 :]):
        for images, labels in epoch:
            assert images.shape == (batch_size, 4, 6, 1)
            assert images.dtype == np.uint8
            assert labels.shape == (batch_size,)
            assert labels.dtype == np.int32
            counted = labels >= 0
            np.testing.assert_array_equal(images[counted, 0, 0, 0], labels[counted] + 1)
            np.testing.assert_array_equal(images, np.resize(images[counted], images.shape))
        labels = np.concatenate([labels for _, labels in epoch])
        assert sorted(labels[labels >= 0]) == list(range(10))
        assert not (labels[:10] == -1).any()


def test_each_epoch_and_each_seed_has_an_order_of_its_own():
    split = numbered(50)
    first, second = (labels.tolist() for _, labels in take(train_batches(split, 50, seed=0), 2))
    ((_, other),) = take(train_batches(split, 50, seed=1), 1)
    assert first != list(range(50))
    assert first != second
    assert first != other.tolist()
    assert first == take(train_batches(split, 50, seed=0), 1)[0][1].tolist()


@pytest.mark.parametrize('counts', [(6, 6, 6, 6), (1, 3, 4, 5, 11), (40, 2, 2, 2)])
def test_a_batch_of_p_by_k_holds_k_images_of_each_of_p_classes(counts):
    split, epochs, steps = of_classes(*counts), 3, -(-sum(counts) // 12)
    batches = take(train_batches(split, 12, seed=0, images_per_class=4), epochs * steps)
    examples = examples_of(batches)
    np.testing.assert_array_equal(split.labels[examples], [labels for _, labels in batches])
    for row in examples:
        labels = split.labels[row].reshape(3, 4)
        assert (labels == labels[:, :1]).all()
        assert len(set(labels[:, 0])) == 3
        for images, label in zip(row.reshape(3, 4), labels[:, 0], strict=True):
            # Only a class with fewer images repeats them, each about as often.
            _, times = np.unique(images, return_counts=True)
            assert len(times) == min(4, counts[label])
            assert np.ptp(times) <= 1


@pytest.mark.parametrize(('counts', 'batch_size'), [((8,) * 6, 12), ((2,) * 30, 6), ((4,) * 3, 6)])
def test_an_epoch_of_equal_classes_that_k_divides_holds_each_image_once(counts, batch_size):
    split, each = of_classes(*counts), 4 if counts[0] == 8 else 2
    steps = -(-len(split) // batch_size)
    epochs = take(train_batches(split, batch_size, seed=0, images_per_class=each), 2 * steps)
    first, second = examples_of(epochs[:steps]), examples_of(epochs[steps:])
    for epoch in (first, second):
        assert sorted(epoch.ravel()) == list(range(len(split)))
    assert not np.array_equal(first, second)
    other = take(train_batches(split, batch_size, seed=1, images_per_class=each), steps)
    assert not np.array_equal(first, examples_of(other))


def test_classes_are_drawn_equally_often_and_so_are_the_images_of_a_class():
    split = of_classes(5, 9, 40, 3, 1)
    labels = np.concatenate([split.labels, [-1, -1]])  # the last two belong to no class
    indices = draw_classes(labels, 2, 4, 20, np.random.default_rng(0))
    assert indices.shape == (20, 2, 4)
    # A round has two batches of two of the five classes.
    for pair in split.labels[indices][:, :, 0].reshape(10, 4):
        assert len(set(pair)) == 4
    times = np.bincount(indices.ravel(), minlength=len(labels))
    assert not times[-2:].any()
    for label in range(5):
        assert np.ptp(times[:-2][split.labels == label]) <= 1


@pytest.mark.parametrize('each', [0, 2])
@pytest.mark.parametrize('steps', [0, 1, 3, 7])
def test_a_restored_position_continues_exactly(steps, each):
    split = of_classes(2, 3, 5)
    iterator = train_batches(split, 4, seed=3, images_per_class=each)
    take(iterator, steps)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 5)

    for restored in (train_batches(split, 4, seed=3, images_per_class=each), iterator):
        restored.set_state(state)
        for (images, labels), (expected_images, expected_labels) in zip(take(restored, 5), expected, strict=True):
            np.testing.assert_array_equal(images, expected_images)
            np.testing.assert_array_equal(labels, expected_labels)


@pytest.mark.parametrize('each', [0, 3])
@pytest.mark.parametrize('threads', [1, 3, 16])
def test_the_order_does_not_depend_on_the_number_of_threads(monkeypatch, threads, each):
    split = of_classes(2, 3, 5)
    expected = examples_of(take(train_batches(split, 3, seed=0, images_per_class=each), 30))
    monkeypatch.setattr(module, 'READ_OPTIONS', grain.ReadOptions(num_threads=threads, prefetch_buffer_size=40))
    found = examples_of(take(train_batches(split, 3, seed=0, images_per_class=each), 30))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize('each', [0, 2])
def test_processes_share_the_batches_of_one(each):
    split, parts = of_classes(2, 3, 5), ((0, 1), (0, 2), (1, 2))
    train = [take(train_batches(split, 4, 0, *part, images_per_class=each), 6) for part in parts]
    test = [list(eval_batches(split, 4, index, count)) for index, count in parts]
    for batches in (train, test):
        for (images, labels), first, second in zip(*batches, strict=True):
            np.testing.assert_array_equal(np.concatenate([first[1], second[1]]), labels)
            np.testing.assert_array_equal(np.concatenate([first[0], second[0]]), images)


def test_a_batch_that_processes_cannot_share_is_an_error():
    with pytest.raises(ValueError, match='multiple of the 3 processes, got 4'):
        train_batches(numbered(10), 4, 0, 0, 3)


@pytest.mark.parametrize('batch_size', [1, 3, 10, 16])
def test_evaluation_sees_all_examples_once_and_in_order(batch_size):
    batches = list(eval_batches(numbered(10), batch_size))
    assert {images.shape for images, _ in batches} == {(batch_size, 4, 6, 1)}
    labels = np.concatenate([labels for _, labels in batches])
    assert labels.tolist() == [*range(10), *[-1] * (len(labels) - 10)]
    assert len(batches) == -(-10 // batch_size)
