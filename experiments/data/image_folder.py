"""A user's own images as a TFDS dataset.

Files differ in size and in channels, and some are broken. Each case has one outcome: a line that the run
prints, or an error before anything is prepared.
"""

import collections
import contextlib
import hashlib
import io
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import ExifTags, Image

from experiments.data.digits import classification_info, prepare_once
from experiments.data.image_files import Splits, find_images, fingerprint, shown, stamp
from experiments.data.splits import FORMATS, MODES, pixels
from experiments.launch.atomic_files import lock
from experiments.launch.errors import DataError

# Width and height where fewer than half of the images share a size: small, and things can be recognised.
FALLBACK_SIZE = (64, 64)

# What turns an image upright, by the orientation in its EXIF.
ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

PNG = b'\x89PNG\r\n\x1a\n'

# The lock of the copy that this process reads. The kernel releases it when the process ends.
_in_use = contextlib.ExitStack()


def image_folder(
    folder: Path, data_dir: Path, image_size: int = 0, skip_unreadable: bool = False
) -> tuple[tfds.core.DatasetBuilder, tuple[str, ...]]:
    """Returns the images of a folder and notes on them.

    Each image size has a copy of its own, which holds images resized from the files. Copies are prepared again when the
    files of the folder change. Removes the copies of earlier states of the folder that no process reads.

    Raises:
        DataError: if a file cannot be read, unless `skip_unreadable`.
    """
    splits, notes = find_images(folder)
    place, state = hashlib.sha256(os.fsencode(folder)).hexdigest()[:8], stamp(splits)
    size = f'-{image_size}' if image_size else ''
    home = data_dir / 'image_folders' / f'{folder.name}-{place}-{state}{size}'
    copy = home / ImageFolder.name / str(ImageFolder.VERSION)
    _in_use.close()
    with contextlib.suppress(OSError):  # as in a cache that may only be read
        home.mkdir(parents=True, exist_ok=True)
        _in_use.enter_context(lock(home / '.lock', shared=True))
    builder = prepare_once(copy, lambda: ImageFolder(folder, splits, image_size, skip_unreadable, data_dir=home))
    for other in home.parent.iterdir():
        found = re.fullmatch(rf'.*-{place}-([0-9a-f]{{16}})(-\d+)?', other.name)
        if found and found[1] != state:
            with contextlib.suppress(OSError), lock(other / '.lock', wait=False):
                shutil.rmtree(other, ignore_errors=True)
    facts = builder.info.metadata or {}
    if unreadable := facts.get('unreadable'):
        if not skip_unreadable:
            raise _unreadable_error(folder, unreadable)
        _, notes = find_images(folder, {folder / name for name in unreadable})
        notes += (f'{len(unreadable)} images cannot be read and are left out:', *_lines(unreadable))
    return builder, (*notes, *builder.info.description.splitlines())


class ImageFolder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The files of a folder, brought to one size and one number of channels. Its description says how."""

    VERSION = tfds.core.Version('2.0.0')

    def __init__(self, folder: Path, splits: Splits, image_size: int, skip_unreadable: bool, **kwargs):
        self._folder = folder
        self._shape, self._odd, self._unreadable, self._notes = _common_form(folder, splits, image_size)
        if self._unreadable and not skip_unreadable:
            raise _unreadable_error(folder, self._unreadable)
        self._files, _ = find_images(folder, {folder / name for name in self._unreadable})
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        # The label file of TFDS has a stripped line for a name, so the names are kept here.
        names = list(self._files['train'])
        facts = {'class_names': names, 'fingerprint': fingerprint(self._folder, self._files)}
        facts['unreadable'] = self._unreadable
        return classification_info(self, '\n'.join(self._notes), self._shape, len(names), facts)

    def _split_generators(self, dl_manager):
        del dl_manager
        return {split: self._generate_examples(classes) for split, classes in self._files.items()}

    def _generate_examples(self, classes):
        for label, name in enumerate(self._files['train']):
            for path in classes.get(name, []):
                unchanged = path not in self._odd and _has_shape(path, self._shape)
                image = str(path) if unchanged else _fitted(path, self._shape)
                yield os.fsencode(path.relative_to(self._folder)), {'image': image, 'label': label}


def _common_form(
    folder: Path, splits: Splits, image_size: int
) -> tuple[tuple[int, int, int], set[Path], dict[str, str], list[str]]:
    """Reads all files.

    Returns:
        The common shape of the images, the files with damaged metadata, the reasons why files cannot be read by their
        names, and notes.
    """
    paths = [path for classes in splits.values() for paths in classes.values() for path in paths]
    sizes, modes = collections.Counter(), collections.Counter()
    transparent, odd, unreadable = 0, set(), {}
    for path in paths:
        try:
            image, is_transparent, is_odd = open_image(path)
        except Exception as error:  # Pillow raises some ten types for files that it cannot read
            unreadable[str(path.relative_to(folder))] = str(error).replace(str(path), path.name)
            continue
        odd |= {path} if is_odd else set()
        sizes[image.size] += 1
        modes[image.mode] += 1
        transparent += is_transparent
    notes, count = [], sizes.total()
    size = (image_size, image_size) if image_size else _common_size(sizes)
    if stretched := count - sizes[size]:
        notes.append(f'{stretched} of {count} images were stretched to {size[0]}x{size[1]} pixels')
    mode = 'RGB' if modes['RGB'] else 'L'
    if mode == 'RGB' and modes['L']:
        notes.append(f'{modes["L"]} of {count} images are grey among coloured ones and were made coloured')
    if transparent:
        notes.append(f'{transparent} of {count} images have transparent parts, which were laid on white')
    if odd:
        notes.append(f'{len(odd)} of {count} images have damaged metadata, which was left out')
    width, height = size
    return (height, width, 3 if mode == 'RGB' else 1), odd, unreadable, notes


def _unreadable_error(folder: Path, unreadable: Mapping[str, str]) -> DataError:
    more = [f'  and {len(unreadable) - 3} more'] if len(unreadable) > 3 else []
    head = f'{len(unreadable)} images in {shown(folder)} cannot be read, so nothing was prepared:'
    cure = 'Repair or remove them, or pass --skip-unreadable to leave them out.'
    return DataError('\n'.join([head, *_lines(unreadable)[:3], *more, cure]))


def _lines(unreadable: Mapping[str, str]) -> list[str]:
    return [f'  {shown(name)}: {reason}' for name, reason in unreadable.items()]


def _common_size(sizes: collections.Counter) -> tuple[int, int]:
    """Returns the most frequent size, or a small one if fewer than half of the images have it."""
    size, count = max(sizes.items(), key=lambda item: (item[1], item[0]), default=(FALLBACK_SIZE, 0))
    return size if 2 * count >= sizes.total() else FALLBACK_SIZE


def open_image(path: Path) -> tuple[Image.Image, bool, bool]:
    """Reads the image of a file upright, in mode L or RGB, transparent parts laid on white.

    Returns:
        The image, whether it had such parts, and whether its metadata is damaged.
    """
    image, odd = _decoded(path)
    if not odd and (turn := ORIENTATIONS.get(_orientation(image))) is not None:
        image = image.transpose(turn)
    grey = image.mode in ('1', 'L', 'LA') or image.mode.startswith('I')
    if image.mode.startswith('I'):  # 16 bits a pixel
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    transparent = False
    if image.has_transparency_data:
        image = image.convert('RGBA')
        transparent = bool(np.asarray(image)[..., 3].min() < 255)
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return image.convert('L' if grey else 'RGB'), transparent, odd


def _decoded(path: Path) -> tuple[Image.Image, bool]:
    """Reads the pixels of a file, and says whether its metadata is damaged."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.load()
    except Exception:  # Pillow raises some ten types
        content = _without_metadata(path.read_bytes())
        if content is None:
            raise
        with contextlib.suppress(Exception), Image.open(io.BytesIO(content), formats=FORMATS) as image:
            image.load()
            return image, True
        raise
    try:
        _orientation(image)
    except Exception:  # Pillow raises some ten types for EXIF too
        return image, True
    return image, False


def _orientation(image: Image.Image) -> int:
    """Returns how a camera was held, 1 to 8; 1 is upright."""
    with warnings.catch_warnings(action='error'):  # of Pillow, on damaged EXIF
        return image.getexif().get(ExifTags.Base.Orientation, 1)


def _without_metadata(content: bytes) -> bytes | None:
    """Returns a PNG with the chunks that its pixels need, None for another format."""
    if not content.startswith(PNG):
        return None
    kept, place = [PNG], len(PNG)
    while place < len(content):
        end = place + 12 + int.from_bytes(content[place : place + 4])
        name = content[place + 4 : place + 8]
        if name[:1].isupper() or name == b'tRNS':  # a lower case letter: not critical
            kept.append(content[place:end])
        place = end
    return b''.join(kept)


def _has_shape(path: Path, shape: tuple[int, int, int]) -> bool:
    """Returns whether the file can be stored unchanged, which keeps a JPEG small."""
    height, width, channels = shape
    with Image.open(path, formats=FORMATS) as file:
        upright = _orientation(file) == 1
        same = file.size == (width, height) and file.mode == MODES[channels]
        return same and upright and not file.has_transparency_data


def _fitted(path: Path, shape: tuple[int, int, int]) -> Image.Image:
    image, _, _ = open_image(path)
    array = pixels(image, shape)
    return Image.fromarray(array[..., 0] if shape[-1] == 1 else array)
