"""The pixels of a split: in memory if it fits, or else decoded when examples are taken.

TFDS hands over encoded images. Decoded here, they have the size and channels that the set promises, even if
some of its files are grey, CMYK or have a palette.
"""

import dataclasses
import io
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
from PIL import Image

# A split that takes more than this when decoded, in bytes, stays encoded.
MEMORY_LIMIT = 2 * 2**30

# Formats that Pillow may read, whatever the suffix: EPS would start Ghostscript. JPEG covers MPO.
FORMATS = ('PNG', 'JPEG', 'GIF', 'BMP', 'TIFF', 'WEBP')

# Pillow's name for so many channels.
MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}


@dataclasses.dataclass(frozen=True)
class Split:
    """Examples in memory."""

    images: np.ndarray  # [N, H, W, K] uint8, or [N, ...] of another dtype from a .npz file
    labels: np.ndarray  # [N] int32; -1 is no label

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns images `[n, H, W, K]` and labels `[n]` of these examples."""
        return self.images[indices], self.labels[indices]

    def part(self, indices: np.ndarray, classes: np.ndarray) -> 'Split':
        """Returns these examples, with `classes[label]` in place of each label."""
        images, labels = self.take(indices)
        return Split(images, classes[labels].astype(np.int32))

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.images.shape[1:]

    @property
    def dtype(self) -> np.dtype:
        return self.images.dtype


@dataclasses.dataclass(frozen=True)
class LazySplit:
    """Examples that are read and decoded each time they are taken."""

    source: Any  # a TFDS data source of encoded images
    rows: Sequence[int]  # those of its examples that belong to the split
    keys: tuple[str, str]  # what an example calls its image and its label
    image_shape: tuple[int, int, int]
    number: Callable[[Any], int] = int  # of a class, for what an example has as label

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint8)

    def take(self, indices: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
        """Returns images `[n, H, W, K]` and labels `[n]` of these examples."""
        examples = self.source.__getitems__([int(self.rows[index]) for index in indices])
        images = np.empty((len(examples), *self.image_shape), np.uint8)
        labels = np.empty(len(examples), np.int32)
        image_key, label_key = self.keys
        for place, example in enumerate(examples):
            images[place] = _decode(example[image_key], self.image_shape)
            labels[place] = self.number(example[label_key])
        return images, labels

    @cached_property
    def labels(self) -> np.ndarray:
        """Returns the labels of all examples. Reads the examples without decoding the images."""
        return np.array([self.number(self.source[int(row)][self.keys[1]]) for row in self.rows], np.int32)

    def part(self, indices: np.ndarray, classes: np.ndarray) -> 'LazySplit':
        """Returns these examples, with `classes[label]` in place of each label."""
        rows = [self.rows[index] for index in indices]
        return dataclasses.replace(self, rows=rows, number=partial(_renumbered, self.number, classes))

    def in_memory_if_small(self) -> 'Split | LazySplit':
        large = len(self) * int(np.prod(self.image_shape)) > MEMORY_LIMIT
        return self if large else Split(*self.take(range(len(self))))


def _renumbered(number: Callable[[Any], int], classes: np.ndarray, label: Any) -> int:
    return int(classes[number(label)])


def _decode(encoded: bytes, image_shape: tuple[int, int, int]) -> np.ndarray:
    with Image.open(io.BytesIO(encoded), formats=FORMATS) as file:
        return pixels(file, image_shape)


def pixels(image: Image.Image, image_shape: tuple[int, int, int]) -> np.ndarray:
    """Returns an image as an array of this height, width and number of channels, stretched if needed."""
    height, width, channels = image_shape
    image = image.convert(MODES[channels])
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(image_shape)
