"""The files of a folder of images, by class and split.

No file is left out in silence: what cannot be used is a line that the run prints, or an error.
"""

import hashlib
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from experiments.data.digits import held_out
from experiments.launch.errors import DataError

SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp')

# The names of images, as messages show them.
IMAGES = '*' + '|'.join(SUFFIXES).replace('|.', '|')

# What the folder of the test images may be called beside train/; the first one that is there is taken.
TEST_NAMES = ('test', 'val', 'valid', 'validation')

Splits = dict[str, dict[str, list[Path]]]  # split -> class -> files


def find_images(folder: Path, without: Collection[Path] = ()) -> tuple[Splits, tuple[str, ...]]:
    """Returns train and test images by class, from `class/*` or from `train/class/*` and `test/class/*`, and notes.

    Args:
        folder: The folder of the images.
        without: Files to leave out, without a note.

    Raises:
        DataError: if there are fewer than two classes, or if a class of test is not in train.
    """
    images, others = walk(folder)
    images = [path for path in images if path not in without]
    test_name = next((name for name in TEST_NAMES if _classes(folder / name, images)), 'test')
    roots = {'train': folder / 'train', 'test': folder / test_name}
    splits = {split: _classes(root, images) for split, root in roots.items()}
    alone = [root.name for split, root in roots.items() if splits[split]]
    divided = len(alone) == 2
    if not divided:
        splits = {'train': _classes(folder, images)}
    train = splits['train']
    if not train and alone:
        there, missing = alone[0], test_name if alone == ['train'] else 'train'
        raise DataError(
            f'{shown(folder)} has images of classes in {there}/, but none in {missing}/.\n'
            f'Add {missing}/class/{IMAGES}, or name {shown(folder / there)}, of which a fifth is then held out.'
        )
    if len(train) < 2:
        found = f'only {next(iter(train))}/' if train else 'none'
        raise DataError(
            f'{shown(folder)} must hold images of at least two classes, found {found}.\n'
            f'Expected are class/{IMAGES}, or train/class/* and test/class/*.'
        )
    used = {path for classes in splits.values() for paths in classes.values() for path in paths}
    left_out = others + [path for path in images if path not in used]
    notes = notes_on(folder, left_out, f'class/{IMAGES}')
    if divided:
        if untrained := [f'{test_name}/{name}' for name in splits['test'].keys() - train.keys()]:
            raise DataError(
                f'{shown(folder)} has classes in {test_name}/ that train/ lacks: {some(sorted(untrained))}; '
                'add train images of them, or remove them'
            )
        if untested := [name for name in train if name not in splits['test']]:
            notes += (
                f'{len(untested)} of {len(train)} classes have train images but no test images: {some(untested)}',
            )
        if test_name != 'test':
            notes += (f'there is no test/: the images of {test_name}/ are the test images',)
        return splits, notes
    single = [name for name, paths in train.items() if len(paths) == 1]
    if len(single) == len(train):
        raise DataError(f'{shown(folder)} has no class with two images, so that none is left to test on')
    notes += ('there is no train/ and test/: a fifth of each class, at least one image, was held out as test images',)
    if single:
        notes += (f'classes with a single image, which is a train image: {some(single)}',)
    return _divide(folder, train), notes


def walk(folder: Path) -> tuple[list[Path], list[Path]]:
    """Returns the images and the other files at any depth.

    Hidden files and folders are neither. Links are followed. An image has a suffix of `SUFFIXES` and is a regular file,
    or a broken link, so that it is reported as unreadable.
    """
    images, others = [], []
    for path in _files(folder):
        regular = path.is_file() or not path.exists()
        (images if regular and path.suffix.lower() in SUFFIXES else others).append(path)
    return images, others


def notes_on(folder: Path, left_out: Sequence[Path], expected: str) -> tuple[str, ...]:
    """Returns a line on the files that are left out, and why."""
    special = [path for path in left_out if path.exists() and not path.is_file()]
    rest = sorted(set(left_out) - set(special))
    notes = (f'files left out, since they are no {expected}: {some(_relative(folder, rest))}',) if rest else ()
    if special:
        notes += (f'left out, since they are no regular files: {some(_relative(folder, special))}',)
    return notes


def natural_order(names: Iterable[str]) -> list[str]:
    """Returns the names sorted, as numbers where all of them are numbers."""
    names = list(names)
    if all_numbers(names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def all_numbers(names: Iterable[str]) -> bool:
    return all(name.isascii() and name.isdecimal() for name in names)


def some(names: Sequence[str]) -> str:
    """Returns the first names as one line."""
    return ', '.join(names[:3]) + (f' and {len(names) - 3} more' if len(names) > 3 else '')


def shown(path: Path | str) -> str:
    """Returns a path as text that can be printed: bytes that are no UTF-8 are escaped."""
    return os.fsencode(path).decode(errors='backslashreplace')


def stamp(splits: Splits) -> str:
    """Returns a text that changes if a file is added, removed, moved or written. Reads no file."""
    digest = hashlib.sha256()
    for path in (path for classes in splits.values() for paths in classes.values() for path in paths):
        stat = path.stat() if path.exists() else path.lstat()
        digest.update(os.fsencode(f'{path}\0{stat.st_size}\0{stat.st_mtime_ns}\0'))
    return digest.hexdigest()[:16]


def fingerprint(folder: Path, splits: Splits) -> dict[str, str]:
    """Returns a text for the images of each class and split. It changes with names, sizes and contents."""
    found = {}
    for split, classes in splits.items():
        for name, paths in classes.items():
            digest = hashlib.sha256()
            for path in paths:
                content = path.read_bytes()
                digest.update(os.fsencode(f'{path.relative_to(folder)}\0{len(content)}\0'))
                digest.update(hashlib.sha256(content).digest())
            found[f'{split} images of class {name}'] = f'{len(paths)} files with checksum {digest.hexdigest()[:16]}'
    return found


def _files(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yields all files that are not hidden. A link to a folder above it is passed over."""
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as entries:
        entries = sorted(entries, key=lambda entry: entry.name)
    for entry in entries:
        if entry.name.startswith('.'):
            continue
        if entry.is_dir():
            yield from _files(Path(entry.path), (*above, real))
        else:
            yield Path(entry.path)


def _relative(folder: Path, paths: Sequence[Path]) -> list[str]:
    return [shown(path.relative_to(folder)) for path in paths]


def _classes(root: Path, images: Sequence[Path]) -> dict[str, list[Path]]:
    """Returns the images of `root/class/` by class."""
    classes: dict[str, list[Path]] = {}
    for path in images:
        if path.parent.parent == root:
            classes.setdefault(path.parent.name, []).append(path)
    for name in classes:
        if shown(name) != name:
            raise DataError(f'{shown(root / name)} has a name that is no UTF-8; rename it, or set PYTHONUTF8=1')
    return {name: classes[name] for name in natural_order(classes)}


def _divide(folder: Path, classes: dict[str, list[Path]]) -> Splits:
    splits: Splits = {'train': {}, 'test': {}}
    for name, paths in classes.items():
        test = held_out([str(path.relative_to(folder)) for path in paths])
        for path in paths:
            split = 'test' if str(path.relative_to(folder)) in test else 'train'
            splits[split].setdefault(name, []).append(path)
    return splits
