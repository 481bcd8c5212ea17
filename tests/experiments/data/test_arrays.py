"""Datasets of .npz files: what is read, how it is standardized and divided, and what is said of what cannot be used."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from experiments.data.arrays import Standardization
from experiments.data.load import load
from experiments.data.open_set import divide
from experiments.launch.errors import DataError
from tests.support.tiny import all_of, counts

RNG = np.random.default_rng(0)
X = RNG.normal(5, [1, 10, 100], (40, 3))
X[:, 2] = 0.1  # constant
Y = np.repeat([7, -1, 30, 4], 10)


def save(path: Path, **arrays) -> str:
    np.savez(path, **arrays)
    return str(path)


def test_a_fifth_of_each_class_is_held_out_and_x_is_standardized_by_the_train_examples(tmp_path):
    data = load(save(tmp_path / 'own.npz', x=X, y=Y))
    assert (data.name, data.class_names, data.image_shape) == ('own.npz', ('-1', '4', '7', '30'), (3,))
    assert (counts(data.train).tolist(), counts(data.test).tolist()) == ([8] * 4, [2] * 4)
    assert data.notes == ('there is no x_test and no y_test: a fifth of each class was held out as test examples',)
    assert data.overview == 'own.npz has 4 classes (-1, 4, 7 and 1 more), 32 train and 8 test examples'
    train, test = data.train.take(range(32))[0], data.test.take(range(8))[0]
    assert train.dtype == test.dtype == np.float32
    rows = [next(i for i in range(40) if np.allclose((X[i] - mean_of(data)) / deviation_of(data), x)) for x in train]
    mean = sum(X[row] for row in rows) / 32
    deviation = np.sqrt(sum((X[row] - mean) ** 2 for row in rows) / 32)
    np.testing.assert_allclose(mean_of(data), mean)
    np.testing.assert_allclose(deviation_of(data)[:2], deviation[:2])
    assert deviation_of(data)[2] == 1
    np.testing.assert_allclose(train[:, :2].std(axis=0), 1, rtol=1e-6)
    _, labels = all_of(data)
    assert [data.class_names[label] for label in labels[:8]] == ['7'] * 8


def mean_of(data) -> np.ndarray:
    return data.standardization.mean


def deviation_of(data) -> np.ndarray:
    return data.standardization.deviation


@pytest.mark.parametrize('shape', [(), (5,), (2, 3, 4)])
@pytest.mark.parametrize('dtype', ['float16', '>f8', 'uint8', 'bool'])
def test_examples_have_any_shape_and_real_dtype(tmp_path, shape, dtype):
    x = RNG.integers(0, 2, (10, *shape)).astype(dtype)
    data = load(save(tmp_path / 'own.npz', x=x, y=np.arange(10) % 2, x_test=x[:4], y_test=np.arange(4) % 2))
    assert (data.image_shape, len(data.train), len(data.test), data.notes) == (shape, 10, 4, ())
    expected = (x.astype(float) - x.astype(float).mean(axis=0)) / np.where(
        np.ptp(x.astype(int), axis=0), x.std(axis=0, dtype=float), 1
    )
    np.testing.assert_allclose(data.train.take(range(10))[0], expected, rtol=1e-5, atol=1e-6)


def test_large_offsets_keep_their_digits(tmp_path):
    x = 1.7e9 + np.arange(20.0)[:, None]
    data = load(save(tmp_path / 'own.npz', x=x, y=np.arange(20) % 2, x_test=x, y_test=np.arange(20) % 2))
    np.testing.assert_allclose(np.diff(data.test.take(range(20))[0][:, 0]), 1 / np.arange(20).std(), rtol=1e-5)


def test_the_fingerprint_is_that_of_the_arrays_alone(tmp_path):
    first = load(save(tmp_path / 'a.npz', x=X, y=Y)).identity
    np.savez_compressed(tmp_path / 'b.npz', x=X, y=Y, other=X)
    assert load(str(tmp_path / 'b.npz')).identity == first
    other = X.copy()
    other[3, 1] += 1e-9
    later = load(save(tmp_path / 'a.npz', x=other, y=Y)).identity
    assert {name for name in first if first[name] != later[name]} == {'x'}


def test_the_known_classes_alone_standardize_an_open_set(tmp_path):
    data = load(save(tmp_path / 'own.npz', x=X * (1 + 99 * (Y == 30))[:, None], y=Y))
    parts = divide(data, '7,30')
    known = parts.known.train.take(range(len(parts.known.train)))[0]
    np.testing.assert_allclose(known[:, :2].mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(known[:, :2].std(axis=0), 1, rtol=1e-5)
    assert parts.known.standardization is not None
    raw = X[np.isin(Y, [-1, 4])]
    found = parts.known.standardization(raw)
    for row in known:
        assert np.isclose(found, row, atol=1e-4).all(axis=1).any()
    assert np.abs(parts.unknown.images).max() > 100


def test_classes_that_only_the_test_split_has_are_named(tmp_path):
    path = save(tmp_path / 'own.npz', x=X, y=Y % 5, x_test=X, y_test=Y % 5 + 3)
    assert load(path).notes[0].startswith('3 of 6 classes are in y_test but not in y: 3, 5, 7')


def change(**arrays):
    return {name: value for name, value in {'x': X, 'y': Y, **arrays}.items() if value is not None}


NAN = X.copy()
NAN[7, 1] = np.nan


@pytest.mark.parametrize(
    ('arrays', 'named'),
    [
        (change(y=None), 'has no y; write it by numpy.savez'),
        (change(x=None, y=None, z=X), 'has no x and no y'),
        (change(x_test=X), 'has no y_test'),
        (change(y_test=Y), 'has no x_test'),
        (change(y=Y[1:]), 'y has 39 labels, but x has 40 rows'),
        (change(x_test=X, y_test=Y[:3]), 'y_test has 3 labels, but x_test has 40 rows'),
        (change(x=NAN), 'x has a NaN or an infinite number in row 7'),
        (change(x_test=NAN, y_test=Y), 'x_test has a NaN'),
        (change(x=X.astype(object)), 'Object arrays'),
        (change(y=Y.astype(object)), 'Object arrays'),
        (change(x=X.astype(str)), 'x must hold real numbers, got <U'),
        (change(x=X + 1j), 'x must hold real numbers, got complex128'),
        (change(y=Y.astype(float)), 'y must be integers, got float64'),
        (change(y=Y > 4), 'y must be integers, got bool'),
        (change(y=Y[:, None]), 'y must have the shape [N], got [40, 1]'),
        (change(y=np.zeros(40, int)), 'single class 0'),
        (change(x=X[:0], y=Y[:0]), 'one row or more, got [0, 3]'),
        (change(x=X[:, :0]), 'one row or more, got [40, 0]'),
        (change(x=np.float64(3)), 'got []'),
        (change(x_test=X[:, :2], y_test=Y), 'x has the shape [3], but of x_test [2]'),
        (change(x=X[:2], y=np.array([3, 4])), 'no class with two examples'),
        (change(x=X * 1e200), 'scale them down'),
    ],
)
def test_what_cannot_be_used_is_one_line_that_names_the_file(tmp_path, arrays, named):
    path = save(tmp_path / 'own.npz', **arrays)
    with pytest.raises(DataError) as error:
        load(path)
    assert named in str(error.value)
    assert '\n' not in str(error.value)


def npy(path: Path) -> None:
    with path.open('wb') as file:
        np.save(file, X)


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps({'x': X}))


def cut(path: Path) -> None:
    np.savez(path, x=X, y=Y)
    path.write_bytes(path.read_bytes()[:500])


@pytest.mark.parametrize(
    ('make', 'named'),
    [(Path.touch, 'cannot be read'), (npy, 'it is no .npz file'), (pickled, 'pickled'), (cut, 'cannot be read')],
)
def test_a_file_of_another_kind_is_one_line(tmp_path, make, named):
    make(tmp_path / 'own.npz')
    with pytest.raises(DataError, match=r'own\.npz') as error:
        load(str(tmp_path / 'own.npz'))
    assert named in str(error.value)
    assert '\n' not in str(error.value)


def test_a_missing_file_and_a_size_for_arrays_are_one_line(tmp_path):
    with pytest.raises(DataError, match=r'own\.npz does not exist'):
        load(str(tmp_path / 'own.npz'))
    with pytest.raises(DataError, match='--image-size resizes images'):
        load(save(tmp_path / 'own.npz', x=X, y=Y), image_size=8)


def test_a_damaged_standardization_is_one_line(tmp_path):
    save(tmp_path / 'inputs.npz', mean=X)
    with pytest.raises(DataError, match=r'inputs\.npz is damaged'):
        Standardization.read(tmp_path / 'inputs.npz')
