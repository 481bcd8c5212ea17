import json
from itertools import islice

import grain
import numpy as np
import pytest

from experiments.data import batches as module
from experiments.data.batches import eval_batches, train_batches
from experiments.data.splits import Split


def numbered(count: int) -> Split:
    """A split whose labels say which example it is, and whose images say it too."""
    labels = np.arange(count, dtype=np.int32)
    images = np.broadcast_to(labels.astype(np.uint8)[:, None, None, None] + 1, (count, 4, 6, 1))
    return Split(np.ascontiguousarray(images), labels)


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


@pytest.mark.parametrize('steps', [0, 1, 3, 7])
def test_a_restored_position_continues_exactly(steps):
    split = numbered(10)
    iterator = train_batches(split, 4, seed=3)
    take(iterator, steps)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 5)

    for restored in (train_batches(split, 4, seed=3), iterator):
        restored.set_state(state)
        for (images, labels), (expected_images, expected_labels) in zip(take(restored, 5), expected, strict=True):
            np.testing.assert_array_equal(images, expected_images)
            np.testing.assert_array_equal(labels, expected_labels)


@pytest.mark.parametrize('threads', [1, 3, 16])
def test_the_order_does_not_depend_on_the_number_of_threads(monkeypatch, threads):
    expected = take(train_batches(numbered(10), 3, seed=0), 30)
    monkeypatch.setattr(module, 'READ_OPTIONS', grain.ReadOptions(num_threads=threads, prefetch_buffer_size=40))
    for (_, labels), (_, others) in zip(take(train_batches(numbered(10), 3, seed=0), 30), expected, strict=True):
        np.testing.assert_array_equal(labels, others)


def test_processes_share_the_batches_of_one():
    split = numbered(10)
    train = [take(train_batches(split, 4, 0, index, count), 6) for index, count in ((0, 1), (0, 2), (1, 2))]
    test = [list(eval_batches(split, 4, index, count)) for index, count in ((0, 1), (0, 2), (1, 2))]
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
