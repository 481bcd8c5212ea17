"""Which classes are trained on and which are verified, on sets of every shape that TFDS has."""

import dataclasses
import pickle

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from experiments.data import open_set, splits
from experiments.data.load import Dataset, load
from experiments.data.open_set import divide
from experiments.data.splits import Split
from tests.support.tiny import all_of, counts, prepare

LABELS = np.arange(60, dtype=np.int32) % 10


def numbered(labels: np.ndarray, first: int = 0) -> Split:
    """Images that say which example they are."""
    numbers = np.arange(first, first + len(labels), dtype=np.uint8)
    return Split(np.broadcast_to(numbers[:, None, None, None], (len(labels), 4, 6, 1)), labels.astype(np.int32))


DATA = Dataset('ten', tuple('abcdefghij'), numbered(LABELS[:40]), numbered(LABELS[40:], 40), ())


def numbers_of(split) -> list[int]:
    return split.take(range(len(split)))[0][:, 0, 0, 0].tolist()


@pytest.mark.parametrize(
    ('held_out', 'unknown'),
    [('', [7, 8, 9]), ('0.3', [7, 8, 9]), ('.5', [5, 6, 7, 8, 9]), ('7-9', [7, 8, 9]), ('0, 4-5,9', [0, 4, 5, 9])],
)
def test_every_labelled_example_is_known_or_unknown_and_known_classes_are_numbered_anew(held_out, unknown):
    parts = divide(DATA, held_out)
    known = [c for c in range(10) if c not in unknown]
    assert sorted(set(parts.unknown.labels.tolist())) == unknown
    assert parts.known.class_names == tuple(DATA.class_names[c] for c in known)
    for split, whole in ((parts.known.train, DATA.train), (parts.known.test, DATA.test)):
        own = np.isin(whole.labels, known)
        assert numbers_of(split) == [n for n, is_own in zip(numbers_of(whole), own, strict=True) if is_own]
        assert [known[label] for label in split.labels] == whole.labels[own].tolist()
    assert sorted(numbers_of(parts.known.train) + numbers_of(parts.known.test) + numbers_of(parts.unknown)) == [
        *range(60)
    ]


@pytest.mark.parametrize(
    ('names', 'held_out', 'unknown'),
    [
        ('abcdefghij', 'h,i', [7, 8]),
        ('abcdefghij', 'b, 7-8', [1, 7, 8]),
        (('golden-dog', *'bcdefghij'), 'golden-dog,c', [0, 2]),
        ([str(number) for number in range(1, 11)], '7-9', [6, 7, 8]),
        ([str(number) for number in range(1, 11)], '10,1', [0, 9]),
        ([f'{number:02d}' for number in range(1, 11)], '7-9', [6, 7, 8]),
        (('0.3', 'x', *'cdefghij'), '0.3,x', [0, 1]),
    ],
)
def test_classes_are_held_out_by_name_and_numbers_are_names_where_all_names_are(names, held_out, unknown):
    parts = divide(dataclasses.replace(DATA, class_names=tuple(names)), held_out)
    assert sorted(set(parts.unknown.labels.tolist())) == unknown
    assert f'({names[unknown[0]]}, {names[unknown[1]]}' in parts.known.notes[-1]


def test_numbers_that_are_no_names_are_one_line_where_all_names_are_numbers():
    data = dataclasses.replace(DATA, class_names=tuple(str(number) for number in range(1, 11)))
    with pytest.raises(ValueError, match=r'--held-out must be names .*\(1, 2, 3 and 7 more\).*got 0-3'):
        divide(data, '0-3')


@pytest.mark.parametrize('held_out', ['10', '7-12', '9-7', 'seven', '7-', '1.5', '-1', '3', '0-8', '0.05', '.95'])
def test_held_out_classes_that_are_not_there_or_too_few_are_one_line_that_names_the_flag(held_out):
    with pytest.raises(ValueError, match='--held-out must') as error:
        divide(DATA, held_out)
    assert '\n' not in str(error.value)


def test_a_set_whose_splits_share_no_class_is_divided_by_its_splits():
    own = dataclasses.replace(DATA, train=numbered(LABELS % 4), test=numbered(4 + LABELS % 6))
    parts = divide(own)
    assert sorted(set(parts.unknown.labels.tolist())) == [4, 5, 6, 7, 8, 9]
    assert parts.known.num_classes == 4
    train, test = numbers_of(parts.known.train), numbers_of(parts.known.test)
    assert sorted(train + test) == [*range(60)]
    assert (counts(parts.known.test) > 0).all()
    assert (counts(parts.known.train) > counts(parts.known.test)).all()
    assert 'a fifth of each class, at least one, was held out' in parts.known.notes[0]


def test_a_class_of_two_images_has_one_of_them_to_test():
    labels = np.repeat(np.arange(4), [1, 2, 4, 5])
    own = dataclasses.replace(DATA, train=numbered(labels), test=numbered(4 + LABELS % 6))
    parts = divide(own)
    assert counts(parts.known.train).tolist() == [1, 1, 3, 4]
    assert counts(parts.known.test).tolist() == [0, 1, 1, 1]
    with pytest.raises(ValueError, match='ten has no known class with two images'):
        divide(dataclasses.replace(own, train=numbered(np.arange(4))))


def test_of_many_held_out_examples_whole_classes_are_verified(monkeypatch):
    monkeypatch.setattr(open_set, 'LIMIT', 25)
    parts, again = divide(DATA, '0.5'), divide(DATA, '0.5')
    assert counts(parts.unknown)[counts(parts.unknown) > 0].tolist() == [6, 6, 6, 6]
    np.testing.assert_array_equal(parts.unknown.images, again.unknown.images)
    assert any('4 of the 5 held-out classes' in note for note in parts.known.notes)


def test_examples_without_a_label_belong_nowhere():
    own = dataclasses.replace(DATA, test=numbered(np.where(LABELS == 3, -1, LABELS)))
    parts = divide(own, '7-9')
    assert set(parts.known.test.labels.tolist()) == {0, 1, 2, 4, 5, 6}


def test_notes_call_the_examples_of_an_array_file_examples_and_others_images(tmp_path):
    np.savez(tmp_path / 'own.npz', x=np.arange(120.0).reshape(60, 2), y=LABELS)
    arrays = load(str(tmp_path / 'own.npz'))
    for data, kind in ((DATA, 'images'), (arrays, 'examples')):
        note = divide(data).known.notes[-1]
        assert f' {kind}; 3 others are verified ' in note
        assert note.endswith(f', 18 {kind}')


def test_a_split_too_large_for_memory_is_divided_alike(tmp_path, monkeypatch):
    images = [(Image.fromarray(np.full((4, 6), n, np.uint8)), int(label)) for n, label in enumerate(LABELS % 5)]
    features = {'image': tfds.features.Image(shape=(4, 6, 1)), 'label': tfds.features.ClassLabel(num_classes=5)}
    prepare(tmp_path, {'train': images[:40], 'test': images[40:]}, features=features)
    in_memory = divide(load('mnist', tmp_path))
    monkeypatch.setattr(splits, 'MEMORY_LIMIT', 10)
    parts = divide(load('mnist', tmp_path))
    assert isinstance(parts.known.train, splits.LazySplit)
    for array, expected in zip(all_of(parts.known), all_of(in_memory.known), strict=True):
        np.testing.assert_array_equal(array, expected)
    np.testing.assert_array_equal(parts.unknown.images, in_memory.unknown.images)
    sent = pickle.loads(pickle.dumps(parts.known))  # as to the workers of a sweep
    for array, expected in zip(all_of(sent), all_of(in_memory.known), strict=True):
        np.testing.assert_array_equal(array, expected)
