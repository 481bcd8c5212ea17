"""Anyone's own images, made into a TFDS set that is read like all others.

Files differ in size and in channels, and some are broken. Each case has one outcome: a line that the run
prints, or an error before anything is prepared.
"""

import collections
import hashlib
import os
import re
import shutil
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import ExifTags, Image, ImageOps

from experiments.data.digits import classification_info, prepare_once
from experiments.data.image_files import Splits, find_images, fingerprint
from experiments.data.splits import FORMATS
from experiments.data.tfds_cache import DataError

# Width and height where fewer than half of the images share a size: small, and things can be recognised.
FALLBACK_SIZE = (64, 64)


def image_folder(folder: Path, data_dir: Path) -> tuple[tfds.core.DatasetBuilder, tuple[str, ...]]:
    """The images of this folder, prepared again whenever its files change, and notes on them."""
    splits, notes = find_images(folder)
    place = hashlib.sha256(os.fsencode(folder)).hexdigest()[:8]
    home = data_dir / 'image_folders' / f'{folder.name}-{place}-{fingerprint(splits)}'
    copy = home / ImageFolder.name / str(ImageFolder.VERSION)
    builder = prepare_once(copy, lambda: ImageFolder(folder, splits, data_dir=home))
    for other in home.parent.iterdir():
        if other != home and re.fullmatch(f'.*-{place}-[0-9a-f]{{16}}', other.name):
            shutil.rmtree(other, ignore_errors=True)
    return builder, (*notes, *builder.info.description.splitlines())


class ImageFolder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The files of a folder, brought to one size and one number of channels. Its description says how."""

    VERSION = tfds.core.Version('1.0.0')

    def __init__(self, folder: Path, splits: Splits, **kwargs):
        self._folder, self._files = folder, splits
        self._size, self._mode, self._notes = _common_form(folder, splits)
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        width, height = self._size
        image_shape = (height, width, len(Image.new(self._mode, (1, 1)).getbands()))
        return classification_info(self, '\n'.join(self._notes), image_shape, sorted(self._files['train']))

    def _split_generators(self, dl_manager):
        del dl_manager
        return {split: self._generate_examples(classes) for split, classes in self._files.items()}

    def _generate_examples(self, classes):
        for label, name in enumerate(sorted(self._files['train'])):
            for path in classes.get(name, []):
                image = _image_or_path(path, self._size, self._mode)
                yield os.fsencode(path.relative_to(self._folder)), {'image': image, 'label': label}


def _common_form(folder: Path, splits: Splits) -> tuple[tuple[int, int], str, list[str]]:
    """Size (width, height) and mode that all images will have, and what to say about it. Reads every file."""
    paths = [path for classes in splits.values() for paths in classes.values() for path in paths]
    sizes, modes = collections.Counter(), collections.Counter()
    transparent, broken = 0, []
    for path in paths:
        try:
            image, is_transparent = open_image(path)
        except Exception as error:  # Pillow raises some ten types for files that it cannot read
            broken.append(f'  {path.relative_to(folder)}: {str(error).replace(str(path), path.name)}')
            continue
        sizes[image.size] += 1
        modes[image.mode] += 1
        transparent += is_transparent
    if broken:
        more = [f'  and {len(broken) - 3} more'] if len(broken) > 3 else []
        head = f'{len(broken)} of {len(paths)} images in {folder} cannot be read, so nothing was prepared:'
        raise DataError('\n'.join([head, *broken[:3], *more, 'Repair or remove them, and run again.']))

    notes = []
    size, count = max(sizes.items(), key=lambda item: (item[1], item[0]))
    if 2 * count < len(paths):
        size, count = FALLBACK_SIZE, sizes[FALLBACK_SIZE]
    if count < len(paths):
        notes.append(f'{len(paths) - count} of {len(paths)} images were stretched to {size[0]}x{size[1]} pixels')
    mode = 'RGB' if modes['RGB'] else 'L'
    if mode == 'RGB' and modes['L']:
        notes.append(f'{modes["L"]} of {len(paths)} images are grey among coloured ones and were made coloured')
    if transparent:
        notes.append(f'{transparent} of {len(paths)} images have transparent parts, which were laid on white')
    return size, mode, notes


def open_image(path: Path) -> tuple[Image.Image, bool]:
    """The image of a file upright, in mode L or RGB, transparent parts laid on white; and whether it had such parts."""
    with Image.open(path, formats=FORMATS) as file:
        image = ImageOps.exif_transpose(file)
    grey = image.mode in ('1', 'L', 'LA') or image.mode.startswith('I')
    if image.mode.startswith('I'):  # 16 bits a pixel
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    transparent = False
    if image.has_transparency_data:
        image = image.convert('RGBA')
        transparent = bool(np.asarray(image)[..., 3].min() < 255)
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return image.convert('L' if grey else 'RGB'), transparent


def _image_or_path(path: Path, size: tuple[int, int], mode: str) -> Image.Image | str:
    """The path where the file can be stored as it is, which keeps a JPEG small."""
    with Image.open(path, formats=FORMATS) as file:
        upright = file.getexif().get(ExifTags.Base.Orientation, 1) == 1
        if file.size == size and file.mode == mode and upright and not file.has_transparency_data:
            return str(path)
    image, _ = open_image(path)
    return image.convert(mode).resize(size, Image.Resampling.BILINEAR)
