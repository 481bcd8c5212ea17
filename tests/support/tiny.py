"""What the tests of experiments share: tiny prepared datasets, as no test may need a download, and the command line."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from experiments.data.load import Dataset, load
from experiments.data.splits import LazySplit, Split
from experiments.launch import cli

# Flags of a run of few steps.
QUICK = ('--parallel', 'none', '--batch-size', 500)

# Columns of metrics.csv.
COLUMNS = {
    *('epoch', 'arm', 'softmax_loss', 'center_loss', 'train_accuracy', 'test_accuracy'),
    *('nearest_center_accuracy', 'intra_inter_ratio', 'center_step_norm', 'rows_dropped'),
}


def prepare(
    data_dir: Path,
    splits: dict[str, list],
    *,
    name: str = 'mnist',
    version: str = '3.0.1',
    config: str | None = None,
    features: dict | None = None,
    image_shape: tuple[int | None, int | None, int] = (4, 6, 1),
) -> Path:
    """Prepares images and labels by split, as TFDS would, and returns the folder of the copy."""
    label = tfds.features.ClassLabel(num_classes=3)
    features_dict = features or {'image': tfds.features.Image(shape=image_shape), 'label': label}

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features_dict))

        def _split_generators(self, dl_manager):
            del dl_manager
            return {split: self._generate_examples(examples) for split, examples in splits.items()}

        def _generate_examples(self, examples):
            for key, (image, label) in enumerate(examples):
                yield key, {'image': image, 'label': label}

    Tiny.name = name
    builder_config = tfds.core.BuilderConfig(name=config) if config else None
    builder = Tiny(data_dir=data_dir, config=builder_config)
    builder.download_and_prepare(file_format='array_record')
    return Path(builder.data_dir)


def examples(count: int, *, first: int = 0, label: int | None = None) -> list[tuple[Image.Image, int]]:
    """Images of 4 x 6 pixels whose top left pixel is their number, and whose label is that modulo 3."""
    images = np.random.default_rng(0).integers(0, 256, (count, 4, 6), dtype=np.uint8)
    images[:, 0, 0] = np.arange(first, first + count)
    numbers = range(first, first + count)
    labels = [number % 3 if label is None else label for number in numbers]
    return [(Image.fromarray(image), label) for image, label in zip(images, labels, strict=True)]


def all_of(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of both splits."""
    images, labels = zip(*(split.take(range(len(split))) for split in (dataset.train, dataset.test)), strict=True)
    return np.concatenate(images), np.concatenate(labels)


def counts(split: Split | LazySplit) -> np.ndarray:
    """How many examples each class has."""
    return np.bincount(split.take(range(len(split)))[1])


def run(experiment: Any, *flags: object) -> int:
    """Runs the command of an experiment's module as a user does, and returns its exit code."""
    with pytest.raises(SystemExit) as end:
        cli.main(experiment.Config, experiment.main, experiment.__name__, [str(flag) for flag in flags])
    code = end.value.code
    assert isinstance(code, int)
    return code


def refuse(constant: str):
    raise AssertionError(f'{constant} is not JSON')


def strict(path: Path) -> dict:
    return json.loads(path.read_text(encoding='utf-8'), parse_constant=refuse)


def rows(out: Path) -> list[dict[str, str]]:
    with (out / 'metrics.csv').open(newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


def digits_test() -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of the test split of the digits."""
    split = load('digits').test
    return split.take(range(len(split)))
