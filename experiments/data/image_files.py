"""Which files of a folder are images of which class and split.

No file is left out in silence: what cannot be used is a line that the run prints, or an error.
"""

import hashlib
import os
from pathlib import Path

from experiments.data.digits import held_out
from experiments.data.tfds_cache import DataError

SUFFIXES = ('.png', '.jpg', '.jpeg')

Splits = dict[str, dict[str, list[Path]]]  # split -> class -> files


def find_images(folder: Path) -> tuple[Splits, tuple[str, ...]]:
    """Train and test images by class, from `class/*` or from `train/class/*` and `test/class/*`, and notes.

    Raises:
        DataError: if there are fewer than two classes, or train and test differ in their classes.
    """
    roots = {split: folder / split for split in ('train', 'test')}
    divided = all(root.is_dir() and _classes(root) for root in roots.values())
    splits = {split: _classes(root) for split, root in roots.items()} if divided else {'train': _classes(folder)}
    train = splits['train']
    alone = [split for split, root in roots.items() if not divided and not train and root.is_dir() and _classes(root)]
    if alone:
        (missing,) = roots.keys() - alone
        raise DataError(
            f'{folder} has images of classes in {alone[0]}/, but none in {missing}/.\n'
            f'Add {missing}/class/*.png|jpg|jpeg, or name {folder / alone[0]}, of which a fifth is then held out.'
        )
    if len(train) < 2:
        found = f'only {next(iter(train))}/' if train else 'none'
        raise DataError(
            f'{folder} must hold images of at least two classes, found {found}.\n'
            'Expected are class/*.png|jpg|jpeg, or train/class/* and test/class/*.'
        )
    notes = _notes_on_other_files(folder, splits)
    if divided:
        _check_same_classes(folder, splits)
        return splits, notes
    single = [name for name, paths in train.items() if len(paths) == 1]
    if len(single) == len(train):
        raise DataError(f'{folder} has no class with two images, so that none is left to test on')
    notes += ('there is no train/ and test/: a fifth of each class was held out as test images',)
    if single:
        notes += (f'classes with a single image, which is a train image: {_some(single)}',)
    return _divide(folder, train), notes


def fingerprint(splits: Splits) -> str:
    """Another text whenever a file has been added, removed, moved or written."""
    digest = hashlib.sha256()
    for path in (path for classes in splits.values() for paths in classes.values() for path in paths):
        stat = path.stat() if path.exists() else path.lstat()
        digest.update(os.fsencode(f'{path}\0{stat.st_size}\0{stat.st_mtime_ns}\0'))
    return digest.hexdigest()[:16]


def _classes(root: Path) -> dict[str, list[Path]]:
    """Images by class. Hidden files are none; a broken link is one, to be reported as unreadable."""
    classes = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith('.')):
        paths = (path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.is_dir())
        if images := sorted(path for path in paths if not path.name.startswith('.')):
            classes[folder.name] = images
    return classes


def _check_same_classes(folder: Path, splits: Splits) -> None:
    train, test = splits['train'].keys(), splits['test'].keys()
    if train != test:
        alone = [f'train/{name}' for name in sorted(train - test)] + [f'test/{name}' for name in sorted(test - train)]
        raise DataError(f'train/ and test/ of {folder} must have the same classes; only one of them has {_some(alone)}')


def _divide(folder: Path, classes: dict[str, list[Path]]) -> Splits:
    splits: Splits = {'train': {}, 'test': {}}
    for name, paths in classes.items():
        test = held_out([str(path.relative_to(folder)) for path in paths])
        for path in paths:
            split = 'test' if str(path.relative_to(folder)) in test else 'train'
            splits[split].setdefault(name, []).append(path)
    return splits


def _notes_on_other_files(folder: Path, splits: Splits) -> tuple[str, ...]:
    used = {path for classes in splits.values() for paths in classes.values() for path in paths}
    files = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    others = [path.relative_to(folder) for path in files if path not in used]
    shown = sorted(str(path) for path in others if not any(part.startswith('.') for part in path.parts))
    return (f'files left out, since they are no class/*.png|jpg|jpeg: {_some(shown)}',) if shown else ()


def _some(names: list[str]) -> str:
    return ', '.join(names[:3]) + (f' and {len(names) - 3} more' if len(names) > 3 else '')
