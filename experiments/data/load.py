"""One way to read every dataset of images: as a data source of tensorflow-datasets (TFDS), whoever prepared it.

A set has its name in TFDS (`mnist`, `emnist/letters`), is `digits`, or is the folder of one's own images.
Reading takes no TensorFlow and no network; what is not there yet is prepared first. A .npz file is read as it is.
"""

import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import tensorflow_datasets as tfds

from experiments.data import digits, prepare, tfds_cache
from experiments.data.arrays import Standardization, is_array_file, read_arrays
from experiments.data.image_files import natural_order, shown, some
from experiments.data.image_folder import FALLBACK_SIZE, image_folder
from experiments.data.splits import MODES, LazySplit, Split
from experiments.launch.errors import DataError


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Two splits, and the lines that a run prints about them."""

    name: str
    class_names: tuple[str, ...]
    train: Split | LazySplit
    test: Split | LazySplit
    notes: tuple[str, ...]
    fingerprint: Mapping[str, str] = dataclasses.field(default_factory=dict)  # what tells these data from others
    standardization: Standardization | None = None  # of the examples of a .npz file

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def identity(self) -> dict[str, str]:
        """Returns the fingerprint and the class names, which differ for other data."""
        return {**{f'class {number}': name for number, name in enumerate(self.class_names)}, **self.fingerprint}

    @property
    def kind(self) -> str:
        """Returns what the examples are called: images, or examples for those of a .npz file."""
        return 'images' if self.standardization is None else 'examples'

    @property
    def overview(self) -> str:
        """Returns a line with the numbers of classes and examples and the first class names."""
        sizes = f'{len(self.train)} train and {len(self.test)} test {self.kind}'
        return f'{self.name} has {self.num_classes} classes ({some(self.class_names)}), {sizes}'

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Returns height, width and channels, or the shape of an example of a .npz file."""
        return self.train.image_shape

    @property
    def dtype(self) -> str:
        """Returns the dtype of the examples."""
        return str(self.train.dtype)


def load(dataset: str, data_dir: Path | None = None, image_size: int = 0, skip_unreadable: bool = False) -> Dataset:
    """Reads a dataset, and prepares it first if it is not there.

    Args:
        dataset: a name in the catalogue of TFDS, or `digits`, or a folder of images: `class/*.png|jpg|jpeg|webp`,
            or `train/class/*` and `test/class/*`; or a .npz file with arrays x and y, and x_test and y_test.
        data_dir: an existing folder of prepared sets; by default one in the user's cache, which is created.
        image_size: width and height that images are brought to; 0 leaves them as they are.
        skip_unreadable: leaves out images of a folder that cannot be read, with a note for each.

    Raises:
        DataError: with what is wrong and what to do, in one to ten lines.
    """
    folder = _data_folder(data_dir)
    if is_array_file(dataset):
        return _standardized(dataset, image_size)
    try:
        return _dataset(*_builder(dataset, folder, image_size, skip_unreadable), image_size)
    except (OSError, RuntimeError) as error:  # ArrayRecord has RuntimeError for a missing or damaged file
        raise DataError(
            f'{shown(dataset)} could not be read or prepared in {folder}: {error}; correct the error, or pass another '
            '--data-dir'
        ) from error


def _data_folder(data_dir: Path | None) -> Path:
    """Returns the folder of the prepared sets. Raises DataError if the user has named one that does not exist."""
    folder = data_dir or Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache') / 'centerloss_jax'
    try:
        folder = folder.expanduser().absolute()
    except RuntimeError as error:  # nobody has that home
        raise DataError(f'{folder} has no place ({error}); pass another --data-dir') from error
    if data_dir and not folder.is_dir():
        raise DataError(f'--data-dir {folder} is not a folder that exists; create it, or pass another --data-dir')
    return folder


def _standardized(dataset: str, image_size: int) -> Dataset:
    if image_size:
        raise DataError(f'--image-size resizes images, but {shown(dataset)} has arrays; leave it out')
    path = Path(dataset).expanduser()
    arrays = read_arrays(path)
    standardization = Standardization.of(arrays.train.images)
    train, test = map(standardization.split, (arrays.train, arrays.test))
    return Dataset(shown(path.name), arrays.class_names, train, test, arrays.notes, arrays.fingerprint, standardization)


def _builder(
    dataset: str, data_dir: Path, image_size: int, skip_unreadable: bool
) -> tuple[str, tfds.core.DatasetBuilder, tuple[str, ...]]:
    """Returns the name of a dataset, the builder of its prepared copy, and notes.

    A name wins over a folder: `./mnist` is the folder.
    """
    catalogue = tfds.list_builders(with_community_datasets=False)
    name = re.split('[/:]', dataset)[0]
    folder = Path(dataset).expanduser().resolve()
    if dataset == 'digits':
        return dataset, digits.digits(data_dir), ()
    if name in catalogue:
        return dataset, prepare.public(dataset, data_dir), ()
    if folder.is_dir():
        return shown(folder.name), *image_folder(folder, data_dir, image_size, skip_unreadable)
    if copy := tfds_cache.find(dataset, data_dir):
        return dataset, copy, ()
    near = difflib.get_close_matches(name, ['digits', *catalogue], n=3)
    hint = f'; did you mean {" or ".join(near)}?' if near else ''
    raise DataError(
        f'{shown(dataset)} is neither a dataset of tensorflow-datasets nor a folder of images nor a .npz file{hint}'
    )


def _dataset(name: str, builder: Any, notes: tuple[str, ...], image_size: int) -> Dataset:
    features = builder.info.features
    keys = _keys(name, builder.info)
    height, width, channels = features[keys[0]].shape
    if image_size:
        width, height = image_size, image_size
    elif height is None or width is None:
        width, height = FALLBACK_SIZE
        notes += (f'images of {name} differ in size; all were stretched to {width}x{height} pixels',)
    encoded = {key: tfds.decode.SkipDecoding() for key in features if _is_image(features[key])}
    sources = {
        split: builder.as_data_source(split, decoders=encoded, file_format='array_record')
        for split in builder.info.splits
    }
    class_names, number = _class_numbers(features[keys[1]], sources, keys[1])
    facts = builder.info.metadata or {}
    class_names = tuple(facts.get('class_names', class_names))
    splits = {
        split: LazySplit(source, range(len(source)), keys, (height, width, channels), number)
        for split, source in sources.items()
    }
    train, test, note = _train_and_test(name, splits)
    fingerprint = facts.get('fingerprint') or _fingerprint(builder.info)
    return Dataset(name, class_names, train.in_memory_if_small(), test.in_memory_if_small(), notes + note, fingerprint)


def _fingerprint(info: tfds.core.DatasetInfo) -> dict[str, str]:
    """Returns the name, version and splits of a dataset."""
    splits = {f'split {name}': f'{split.num_examples} examples' for name, split in info.splits.items()}
    return {'dataset': info.full_name, **splits}


def _keys(name: str, info: tfds.core.DatasetInfo) -> tuple[str, str]:
    """Returns the keys of the image and the label in an example. The dataset says which of several labels it means."""
    features: Any = info.features
    images = [key for key in features if _is_image(features[key])]
    labels = [key for key in features if isinstance(features[key], tfds.features.ClassLabel)]
    if not labels:  # as in lfw, whose labels are the names of people
        labels = [key for key in features if key == 'label' and isinstance(features[key], tfds.features.Text)]
    for keys in (info.supervised_keys, (*images, *labels)):
        if keys and len(keys) == 2 and keys[0] in images and keys[1] in labels:
            return cast(tuple[str, str], keys)
    described = ', '.join(f'{key} ({type(features[key]).__name__})' for key in features)
    raise DataError(
        f'{name} is no set for image classification, which takes one image of 8 bits a channel and one class '
        f'label; it has {described[:300]}'
    )


def _class_numbers(feature: Any, sources: dict[str, Any], key: str) -> tuple[tuple[str, ...], Callable[[Any], int]]:
    """Returns the class names, and a function from the label of an example to its class."""
    if isinstance(feature, tfds.features.ClassLabel):
        return tuple(feature.names), int
    found = {source[index][key] for source in sources.values() for index in range(len(source))}
    names = natural_order(name.decode() for name in found)
    return tuple(names), {name.encode(): number for number, name in enumerate(names)}.__getitem__


def _is_image(feature: Any) -> bool:
    if not isinstance(feature, tfds.features.Image):
        return False
    image: Any = feature
    return image.shape[-1] in MODES and np.dtype(image.np_dtype) == np.uint8


def _train_and_test(name: str, splits: dict[str, LazySplit]) -> tuple[LazySplit, LazySplit, tuple[str, ...]]:
    """Returns the splits for training and testing, and notes on the choice."""
    if 'train' not in splits:
        raise DataError(f'{name} has no split named train, only {", ".join(splits)}')
    train = splits['train']
    for candidate in ('test', 'validation'):
        if candidate not in splits:
            continue
        split = splits[candidate]
        _, labels = split.take(range(min(100, len(split))))
        if labels.max() >= 0:  # a competition's test split has the label -1 throughout
            note = f'{name} has no labelled test split; its validation split was taken as one'
            return train, split, (note,) if candidate == 'validation' else ()
    rows = range(len(train))
    test = dataclasses.replace(train, rows=rows[4::5])
    train = dataclasses.replace(train, rows=[row for row in rows if row % 5 != 4])
    return train, test, (f'{name} has no labelled test split; every fifth train image was held out as one',)
