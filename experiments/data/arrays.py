"""Arrays of a .npz file as a dataset: tabular data, features of audio, or the embeddings of another network.

x is standardized by the mean and the deviation of the train examples, which a run keeps for `predict`.
"""

import dataclasses
import hashlib
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.data.digits import held_out
from experiments.data.image_files import shown, some
from experiments.data.splits import LazySplit, Split
from experiments.launch.atomic_files import draft
from experiments.launch.errors import DataError

NAMES = ('x', 'y', 'x_test', 'y_test')

# Rows that are converted at once, so that float64 copies stay small.
ROWS = 4096


@dataclasses.dataclass(frozen=True)
class Standardization:
    """Subtracts a mean and divides by a deviation, both float64 of the shape of an example."""

    mean: np.ndarray
    deviation: np.ndarray  # 1 where all examples are equal

    @classmethod
    def of(cls, x: np.ndarray) -> 'Standardization':
        """Returns the mean and the deviation of the examples `[N, ...]`."""
        with np.errstate(over='ignore', invalid='ignore'):
            mean, squares = np.zeros(x.shape[1:]), np.zeros(x.shape[1:])
            for block in _blocks(x):
                mean += block.sum(axis=0) / len(x)
            for block in _blocks(x):
                squares += np.square(block - mean).sum(axis=0)
        if not np.isfinite(squares).all():
            raise DataError('x has numbers whose squares are infinite in float64; scale them down')
        return cls(mean, np.where((x == x[0]).all(axis=0), 1.0, np.sqrt(squares / len(x))))

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Returns standardized examples `[N, ...]` in float32."""
        return np.concatenate([((block - self.mean) / self.deviation).astype(np.float32) for block in _blocks(x)])

    def split(self, split: Split | LazySplit) -> Split:
        """Returns a split with standardized examples."""
        x, labels = split.take(range(len(split)))
        return Split(self(x), labels)

    def then(self, later: 'Standardization') -> 'Standardization':
        """Returns the standardization that equals this one followed by another."""
        return Standardization(self.mean + self.deviation * later.mean, self.deviation * later.deviation)

    def save(self, path: Path) -> None:
        with draft(path) as file:
            np.savez(file, **dataclasses.asdict(self))

    @classmethod
    def read(cls, path: Path) -> 'Standardization':
        """Reads what `save` wrote.

        Raises:
            DataError: if the file is missing or damaged.
        """
        found = _read(path, ('mean', 'deviation'))
        if len(found) < 2:
            raise DataError(f'{path} is damaged; put back a copy of it, or start the run anew with --overwrite')
        return cls(found['mean'], found['deviation'])


class Arrays(NamedTuple):
    """The examples of a file, not standardized."""

    train: Split
    test: Split
    class_names: tuple[str, ...]
    notes: tuple[str, ...]
    fingerprint: Mapping[str, str]


def is_array_file(dataset: str) -> bool:
    """Returns whether a dataset is named as a .npz file."""
    return dataset.endswith('.npz') and not Path(dataset).expanduser().is_dir()


def read_arrays(path: Path) -> Arrays:
    """Reads x `[N, ...]` and y `[N]`, and x_test and y_test, without which a fifth of each class is held out.

    Raises:
        DataError: with what is wrong and what to do, in one line.
    """
    found = _read(path, NAMES)
    wanted = NAMES if {'x_test', 'y_test'} & found.keys() else NAMES[:2]
    if missing := [name for name in wanted if name not in found]:
        raise DataError(
            f'{shown(path)} has no {" and no ".join(missing)}; write it by numpy.savez(file, x=..., y=...), with '
            'x_test=... and y_test=... or without both'
        )
    notes = ()
    pairs = {}
    for x, y in (('x', 'y'), ('x_test', 'y_test'))[: len(wanted) // 2]:
        _check_x(path, x, found[x])
        _check_y(path, y, found[y], x, len(found[x]))
        pairs[x] = found[x], found[y].astype(np.int64)
    if len(pairs) == 2 and found['x'].shape[1:] != found['x_test'].shape[1:]:
        raise DataError(
            f'{shown(path)}: an example of x has the shape {list(found["x"].shape[1:])}, but of x_test '
            f'{list(found["x_test"].shape[1:])}; give both the same shape'
        )
    numbers = np.unique(np.concatenate([y for _, y in pairs.values()]))
    if len(numbers) < 2:
        raise DataError(f'{shown(path)}: y has the single class {numbers[0]}; give examples of two or more')
    train, *rest = (Split(x, np.searchsorted(numbers, y).astype(np.int32)) for x, y in pairs.values())
    names = tuple(map(str, numbers.tolist()))
    if rest:
        (test,) = rest
        if untrained := [names[label] for label in np.setdiff1d(test.labels, train.labels)]:
            notes += (f'{len(untrained)} of {len(names)} classes are in y_test but not in y: {some(untrained)}',)
    else:
        train, test = _divided(path, train)
        notes += ('there is no x_test and no y_test: a fifth of each class was held out as test examples',)
    return Arrays(train, test, names, notes, {name: _fingerprint(array) for name, array in found.items()})


def read_examples(path: Path) -> np.ndarray:
    """Returns x `[N, ...]` of a file, not standardized. Raises DataError as `read_arrays` does."""
    found = _read(path, ('x',))
    if 'x' not in found:
        raise DataError(f'{shown(path)} has no x; write it by numpy.savez(file, x=...)')
    _check_x(path, 'x', found['x'])
    return found['x']


def _read(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Returns the arrays of these names that a file has. Unpickles nothing."""
    try:
        with path.open('rb') as file:
            arrays = np.load(file, allow_pickle=False)
            if not isinstance(arrays, np.lib.npyio.NpzFile):
                raise ValueError('it is no .npz file')
            return {name: arrays[name] for name in names if name in arrays.files}
    except FileNotFoundError as error:
        raise DataError(f'{shown(path)} does not exist') from error
    except OSError as error:
        raise DataError(f'{shown(path)} could not be read ({error.strerror or error})') from error
    except (ValueError, TypeError, EOFError, KeyError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error).partition('\n')[0]
        raise DataError(
            f'{shown(path)} cannot be read ({reason}); write it by numpy.savez from arrays of numbers'
        ) from error


def _check_x(path: Path, name: str, x: np.ndarray) -> None:
    if x.dtype.kind not in 'biuf':
        raise DataError(f'{shown(path)}: {name} must hold real numbers, got {x.dtype}; convert it to float')
    if not x.ndim or not x.size:
        raise DataError(f'{shown(path)}: {name} must have the shape [N, ...] with one row or more, got {list(x.shape)}')
    for start in range(0, len(x), ROWS):
        finite = np.isfinite(x[start : start + ROWS]).reshape(len(x[start : start + ROWS]), -1).all(axis=1)
        if not finite.all():
            raise DataError(
                f'{shown(path)}: {name} has a NaN or an infinite number in row {start + finite.argmin()}; '
                'replace it, or leave that row out'
            )


def _check_y(path: Path, name: str, y: np.ndarray, x_name: str, count: int) -> None:
    if y.ndim != 1:
        raise DataError(
            f'{shown(path)}: {name} must have the shape [N], got {list(y.shape)}; for one-hot labels '
            f'save {name}.argmax(-1)'
        )
    if len(y) != count:
        raise DataError(f'{shown(path)}: {name} has {len(y)} labels, but {x_name} has {count} rows; give one for each')
    if y.dtype.kind not in 'iu':
        raise DataError(f'{shown(path)}: {name} must be integers, got {y.dtype}; number the classes from 0')


def _divided(path: Path, split: Split) -> tuple[Split, Split]:
    """Returns train and test examples, which are a fifth of each class."""
    test = np.zeros(len(split), bool)
    order = np.argsort(split.labels, kind='stable')
    for rows in np.split(order, np.flatnonzero(np.diff(split.labels[order])) + 1):
        test[[int(key) for key in held_out([f'{row:09d}' for row in rows])]] = True
    if not test.any():
        raise DataError(f'{shown(path)} has no class with two examples, so that none is left to test on')
    return Split(*split.take(~test)), Split(*split.take(test))


def _fingerprint(array: np.ndarray) -> str:
    """Returns a text that changes with the shape, the dtype and the values."""
    checksum = hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()[:16]
    return f'{array.dtype}{list(array.shape)} with checksum {checksum}'


def _blocks(x: np.ndarray) -> Iterator[np.ndarray]:
    """Yields some rows after the other in float64."""
    return (x[start : start + ROWS].astype(np.float64) for start in range(0, len(x), ROWS))
