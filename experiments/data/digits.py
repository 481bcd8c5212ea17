"""The default dataset, and the functions that the TFDS builders of this project share.

They give TFDS encoded images, so that preparing a set takes neither TensorFlow nor a network.
"""

import contextlib
import hashlib
import io
import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from experiments.data.tfds_cache import lock_cache, read, unfinished
from experiments.launch.atomic_files import sync_tree


def digits(data_dir: Path) -> tfds.core.DatasetBuilder:
    """Returns scikit-learn's handwritten digits, prepared on first use."""
    return prepare_once(data_dir / Digits.name / str(Digits.VERSION), lambda: Digits(data_dir=data_dir))


class Digits(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """1,797 handwritten digits of 8 x 8 pixels, which scikit-learn has inside."""

    VERSION = tfds.core.Version('1.0.0')

    def _info(self) -> tfds.core.DatasetInfo:
        return classification_info(self, 'Digits of scikit-learn.', (8, 8, 1), 10)

    def _split_generators(self, dl_manager):
        del dl_manager
        from sklearn.datasets import load_digits

        bunch: Any = load_digits()
        images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # from 0..16
        keys = [f'{index:04d}' for index in range(len(images))]
        test = set()
        for digit in range(10):
            test |= held_out([key for key, label in zip(keys, bunch.target, strict=True) if label == digit])
        examples = list(zip(keys, images, bunch.target, strict=True))
        return {
            'train': self._generate_examples([example for example in examples if example[0] not in test]),
            'test': self._generate_examples([example for example in examples if example[0] in test]),
        }

    def _generate_examples(self, examples):
        for key, image, label in examples:
            yield key, {'image': Image.fromarray(image), 'label': int(label)}


def prepare_once(copy: Path, make_builder: Callable[[], tfds.core.GeneratorBasedBuilder]) -> tfds.core.DatasetBuilder:
    """Returns the copy in this folder, and prepares it first if it is absent. TFDS renames a complete copy to it."""
    if not copy.exists():
        with lock_cache(copy.parent):
            if not copy.exists():
                for left in unfinished(copy.parent):
                    shutil.rmtree(left)
                tfds.disable_progress_bar()
                with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints what it does
                    make_builder().download_and_prepare(file_format='array_record')
                sync_tree(copy)
    return read(copy)


def held_out(keys: Collection[str]) -> set[str]:
    """Returns a fifth of the keys of one class, never all, chosen by hash, so that every run has the same ones."""
    count = max(1, round(len(keys) / 5)) if len(keys) > 1 else 0
    return set(sorted(keys, key=lambda key: hashlib.sha256(os.fsencode(key)).digest())[:count])


def classification_info(
    builder: tfds.core.DatasetBuilder,
    description: str,
    image_shape: tuple[int, int, int],
    num_classes: int,
    facts: dict[str, Any] | None = None,
) -> tfds.core.DatasetInfo:
    """Returns the TFDS description of a dataset of images and labels, with `facts` as its metadata."""
    features = tfds.features.FeaturesDict(
        {
            'image': tfds.features.Image(shape=image_shape),
            'label': tfds.features.ClassLabel(num_classes=num_classes),
        }
    )
    return tfds.core.DatasetInfo(
        builder=builder,
        description=description,
        features=features,
        supervised_keys=('image', 'label'),
        metadata=tfds.core.MetadataDict(facts) if facts else None,
    )
