"""What the flags say of the data before a run trains on them."""

import dataclasses

import numpy as np
import pytest

from experiments import toy2d
from experiments.data.splits import Split
from experiments.launch.errors import DataError

CONFIG = dataclasses.replace(toy2d.Config(), batch_size=12)


def of_classes(*labels: int) -> Split:
    return Split(np.zeros((len(labels), 8, 8, 1), np.uint8), np.array(labels, np.int32))


def test_classes_with_too_few_images_for_a_batch_are_said_once():
    train = of_classes(0, 0, 0, 0, 1, 1, 1, 2, 2, 4, 4, 4, 4, 4, -1)
    assert CONFIG.check_data(train) == []
    assert dataclasses.replace(CONFIG, images_per_class=2, batch_size=8).check_data(train) == []
    (note,) = dataclasses.replace(CONFIG, images_per_class=4).check_data(train)
    assert note == '2 of 4 classes have fewer than 4 train images; a batch repeats them'


def test_only_classes_with_train_images_can_be_in_a_batch():
    with pytest.raises(DataError, match='12 with --images-per-class 3 is 4 classes a batch, but digits has only 3 '):
        dataclasses.replace(CONFIG, images_per_class=3).check_data(of_classes(0, 0, 0, 1, 1, 1, 4, 4, 4, -1))
