"""Prepared copies of datasets: where they are on disk, and whether they can be read.

A copy is looked for by its folder alone, so that no other version of its code keeps anyone from reading.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import dataset_builder

from experiments.launch import atomic_files
from experiments.launch.errors import DataError

# The features that a copy may have, by the name that TFDS writes.
FEATURES = {
    f'{feature.__module__}.{feature.__qualname__}'
    for feature in vars(tfds.features).values()
    if isinstance(feature, type) and issubclass(feature, tfds.features.FeatureConnector)
}


# TFDS gives these names to the folder of an unfinished copy or download.
_UNFINISHED = re.compile(r'incomplete\.[A-Z0-9]{6}_\d+\.\d+\.\d+|.+\.tmp\.[0-9a-f]{32}')


@contextlib.contextmanager
def lock_cache(data_dir: Path) -> Iterator[None]:
    """Lets one process prepare; the others of the same run wait, and then find the copy there."""
    data_dir.mkdir(parents=True, exist_ok=True)
    with atomic_files.lock(data_dir / '.lock'):
        yield


def unfinished(folder: Path) -> list[Path]:
    """Returns the folders at any depth that TFDS writes a copy or a download to before it renames them."""
    paths = [path for path in folder.rglob('*') if _UNFINISHED.fullmatch(path.name)]
    return [path for path in paths if path.is_dir() and not path.is_symlink()]


def _versions(folder: Path, pattern: str = '') -> list[Path]:
    """Returns the complete copies in a folder, the newest last. TFDS renames a copy when it is complete."""
    found = [info.parent for info in folder.glob('*/dataset_info.json')]
    found = [path for path in found if re.fullmatch(r'\d+\.\d+\.\d+', path.name) and path.match(pattern or '*')]
    return sorted(found, key=lambda path: [int(number) for number in path.name.split('.')])


def find(name: str, data_dir: Path) -> tfds.core.DatasetBuilder | None:
    """Returns the newest copy of `set`, `set/config` or `set/config:version`, or None."""
    path, _, version = name.partition(':')
    folder = data_dir / path
    versions = _versions(folder, version)
    if not versions and '/' not in path and folder.is_dir():
        configs = sorted(config.name for config in folder.iterdir() if _versions(config, version))
        default = dataset_builder.load_default_config_name(epath.Path(folder))
        if default is None and configs:
            choice = ', '.join(f'{name}/{config}' for config in configs)
            raise DataError(f'{folder} holds several configurations of {name}; name one: {choice}')
        versions = _versions(folder / default, version) if default else []
    return read(versions[-1]) if versions else None


def _check_features(path: Path) -> None:
    """Raises DataError if a copy names a class that is no feature of TFDS, which imports any module named there."""
    if not path.exists():
        return
    for name in _class_names(path.read_text(encoding='utf-8')):
        if name not in FEATURES:
            raise DataError(f'{path} names {name}, which is no feature of TFDS; nothing is imported for it')


def _class_names(text: str) -> Iterator[str]:
    """Yields the names of classes at any depth, repeated keys and documents within documents included."""
    pairs: list[tuple[str, Any]] = []
    json.loads(text, object_pairs_hook=lambda found: pairs.extend(found) or dict(found))
    for key, value in pairs:
        if key in ('pythonClassName', 'python_class_name', 'type') and isinstance(value, str):
            yield value
        elif key == 'content' and isinstance(value, str):
            with contextlib.suppress(json.JSONDecodeError):
                yield from _class_names(value)


def read(folder: Path) -> tfds.core.DatasetBuilder:
    """Reads the copy in this folder, which must be ArrayRecord, the format with random access."""
    try:
        _check_features(folder / 'features.json')
        builder = tfds.builder_from_directory(folder)
    except DataError:
        raise
    except Exception as error:  # whatever a damaged copy makes TFDS raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f'{folder} is not a dataset that TFDS can read: {reason}') from error
    formats = [file_format.value for file_format in builder.info.available_file_formats()]
    if 'array_record' not in formats:
        raise DataError(
            f'{folder} is stored as {" and ".join(formats)}, but reading needs array_record: '
            'pass another --data-dir to prepare a new copy there'
        )
    return builder
