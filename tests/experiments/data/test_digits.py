from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from sklearn.datasets import load_digits

from experiments.data.load import load
from tests.support.tiny import all_of, counts


def test_digits_are_those_of_scikit_learn(tmp_path):
    dataset = load('digits', tmp_path)
    assert dataset.image_shape == (8, 8, 1)
    assert dataset.class_names == tuple('0123456789')
    images, labels = all_of(dataset)
    data, target = load_digits(return_X_y=True)
    pixels = np.rint(data / 16 * 255).astype(int)
    expected = Counter((int(label), *image) for image, label in zip(pixels, target, strict=True))
    assert Counter((int(label), *image.ravel()) for image, label in zip(images, labels, strict=True)) == expected


def test_a_fifth_of_each_digit_is_held_out_and_always_the_same(tmp_path_factory):
    dataset, again = (load('digits', tmp_path_factory.mktemp('data')) for _ in range(2))
    train, test = (counts(split) for split in (dataset.train, dataset.test))
    np.testing.assert_allclose(test, (train + test) / 5, atol=0.5)
    for found, expected in zip(all_of(again), all_of(dataset), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_processes_that_start_together_prepare_once(tmp_path):
    with ThreadPoolExecutor(3) as pool:
        sizes = pool.map(lambda _: len(load('digits', tmp_path).train), range(3))
    assert len(set(sizes)) == 1
