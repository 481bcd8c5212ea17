"""The folder of a run: its settings, its metrics (a row for each epoch) and its results."""

import contextlib
import csv
import dataclasses
import json
import math
import os
import platform
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from PIL import Image

from experiments.data.splits import FORMATS
from experiments.launch import processes
from experiments.launch.atomic_files import lock, write_table, write_text
from experiments.launch.errors import DamagedError, RunError
from experiments.launch.mesh import Devices

CONFIG, METRICS, SUMMARY = 'config.json', 'metrics.csv', 'summary.json'
KNOWN, DATA, INPUTS = 'known.json', 'data.json', 'inputs.npz'
LOCK = '.lock'
TABLES = ('verification.csv', 'sweep.csv', 'identities.csv')
PAGES = ('features.png', 'features.gif', 'roc.png', 'weights.png', 'accuracy.png', 'identities.png', 'report.html')
FOLDERS = ('checkpoints', 'snapshots', 'tensorboard', 'profile', 'cells')
CHECKPOINTS, SNAPSHOTS, TENSORBOARD, PROFILE, CELLS = FOLDERS

# Settings that runs of earlier versions do not have, with the values that they used.
ADDED = {'images_per_class': 0}

# The lock of the run of this process. The kernel releases it when the process ends.
_lock = contextlib.ExitStack()


def environment(devices: Devices) -> dict[str, Any]:
    """Returns the devices of a run and the versions of its libraries."""
    kinds = sorted({device.device_kind for device in devices.devices})
    return {
        'processes': jax.process_count(),
        'devices': f'{len(devices.devices)} x {", ".join(kinds)}',
        'backend': jax.default_backend(),
        'versions': {
            'python': platform.python_version(),
            **{name: version(name) for name in ('centerloss_jax', 'jax', 'flax', 'optax')},
        },
    }


def format_environment(surroundings: Mapping[str, Any]) -> str:
    """Returns `environment` as a line of text."""
    versions = ', '.join(f'{name} {number}' for name, number in surroundings['versions'].items())
    return f'{surroundings["devices"]} ({surroundings["backend"]}); {versions}'


def check_folder(out: Path) -> None:
    """Raises RunError if no file can be written to the folder `out`. Leaves no new file or folder."""
    made = []
    try:
        if out.exists() and not out.is_dir():
            raise RunError(f'--out {out} is a file; pass a folder')
        made = [path for path in (out, *out.parents) if not path.exists()]
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise RunError(f'--out {out} cannot be written to ({error.strerror}); pass another folder') from error
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # it does not exist, or another process uses it
                path.rmdir()


class Run:
    """Opens the folder `out`, and resumes or overwrites an earlier run there, or raises RunError.

    A folder holds a run if it holds config.json. Without it, files with the names of a run's files may be the user's.
    """

    def __init__(self, out: Path, *, overwrite: bool, resume: bool = False):
        if processes.is_main_process():
            check_folder(out)
        held = (out / CONFIG).exists()
        if all(processes.largest(held, not held)):
            raise RunError(
                f'--out {out} holds a run on some of the processes only; pass a folder that all processes share'
            )
        if held and not (overwrite or resume):
            raise RunError(
                f'--out {out} holds a run; pass --resume to continue it, --overwrite to replace it, or another folder'
            )
        names = (METRICS, SUMMARY, KNOWN, DATA, INPUTS, *TABLES, *PAGES, *FOLDERS)
        taken = [name for name in names if os.path.lexists(out / name)]
        if taken and not held:
            raise RunError(
                f'--out {out} holds {taken[0]}, but no {CONFIG}, so that it is no run and nothing is removed; '
                'pass another folder'
            )
        self.out = out
        self._held = held
        self.resumed = held and resume
        self.rows: list[dict[str, Any]] = []

    def finished(self, settings: Mapping[str, Any], names: Sequence[str]) -> bool:
        """Returns whether a run with these settings exists whose page and files of these names are complete."""
        if not self.resumed or not (ADDED | self.config()).items() >= plain(settings).items():
            return False
        return all(is_whole(self.out / name) for name in (PAGES[-1], *names))

    def start(self, config: Mapping[str, Any], identity: Mapping[str, str]) -> None:
        """Creates the folder and saves the settings and the fingerprint of the data.

        Removes the files of an earlier run, or only its results if it is resumed, and no other files. With several
        processes, process 0 does all this.
        """
        if processes.is_main_process():
            self._take()
        processes.barrier('folder locked')
        if processes.is_main_process():
            self._clear(config, identity)
        processes.barrier('folder created')

    def _take(self) -> None:
        """Locks the folder. Raises RunError if another run uses it, or has started there since it was checked."""
        self.out.mkdir(parents=True, exist_ok=True)
        _lock.close()
        try:
            _lock.enter_context(lock(self.out / LOCK, wait=False))
        except BlockingIOError as error:
            raise RunError(
                f'--out {self.out} is in use by another run; wait for its end, or pass another folder'
            ) from error
        except OSError as error:
            raise RunError(f'{self.out / LOCK} cannot be locked ({error.strerror}); pass another --out') from error
        if not self._held and (self.out / CONFIG).exists():
            raise RunError(f'--out {self.out} holds a run that has just started; pass another folder')

    def _clear(self, config: Mapping[str, Any], identity: Mapping[str, str]) -> None:
        for name in (*reversed(PAGES), *TABLES, SUMMARY, KNOWN, INPUTS):
            (self.out / name).unlink(missing_ok=True)
        if not self.resumed:
            for name in (METRICS, DATA):
                (self.out / name).unlink(missing_ok=True)
            for name in FOLDERS:
                _remove(self.out / name)
        write_json(self.out / CONFIG, config)  # after the old files and before the new ones: it marks them as a run's
        write_json(self.out / DATA, identity)

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raises RunError if a setting differs from that of the resumed run."""
        saved = ADDED | self.config()
        for name, value in plain(settings).items():
            if name in saved and saved[name] != value:
                raise RunError(
                    f'--resume: {name.replace("_", "-")} is {value}, but the run in {self.out} has {saved[name]}; '
                    'pass that value, or another --out'
                )

    def check_data(self, dataset: str, identity: Mapping[str, str]) -> None:
        """Raises RunError at the first difference between these data and those of the run that is resumed."""
        path, cure = self.out / DATA, 'put back a copy of it, or start the run anew with --overwrite'
        if not path.exists():  # an earlier version wrote none
            self.check({'dataset': dataset})
            return
        saved = read_json(path, cure)
        with reading(path, cure):
            names = [name for name in {**saved, **identity} if saved.get(name) != identity.get(name)]
        if names:
            new, old = (entries.get(names[0], 'absent') for entries in (identity, saved))
            raise RunError(
                f'--resume: {names[0]} is {new}, but was {old} for the run in {self.out}; '
                'give the data of that run, or another --out'
            )

    def saved_rows(self, arm: str) -> list[dict[str, Any]]:
        """Returns the rows of an arm with the values that metrics.csv would give."""
        rows = (row for row in self.rows if row['arm'] == arm)
        return [{key: _number(str(value)) for key, value in row.items()} for row in rows]

    def add_metrics(self, *rows: Mapping[str, Any]) -> None:
        """Adds rows to metrics.csv. The first one names the columns."""
        self.rows += map(dict, rows)
        if rows and processes.is_main_process():
            write_table(self.out / METRICS, self.rows)

    def metrics(self) -> list[dict[str, Any]]:
        """Returns the rows of metrics.csv, numbers as numbers."""
        return [{key: _number(value) for key, value in row.items()} for row in _table(self.out / METRICS)]

    def config(self) -> dict[str, Any]:
        """Returns the settings of the run."""
        return read_config(self.out)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        if processes.is_main_process():
            write_json(self.out / SUMMARY, summary)


def _table(path: Path) -> list[dict[str, str]]:
    with path.open(newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


def is_whole(path: Path) -> bool:
    try:
        if path.suffix == '.json':
            return bool(read_json(path))
        if path.suffix == '.csv':
            whole_rows = all(None not in row and None not in row.values() for row in _table(path))
            return whole_rows and path.read_bytes().endswith(b'\n')
        if path.suffix in ('.png', '.gif'):
            with Image.open(path, formats=FORMATS) as image:
                image.verify()
        return path.stat().st_size > 0
    except Exception:  # Pillow raises some ten types; the run writes the file again
        return False


def _remove(folder: Path) -> None:
    """Removes a folder. Of a link it removes only the link, since its target may be the user's."""
    try:
        if folder.is_symlink():
            folder.unlink()
        elif folder.exists():
            shutil.rmtree(folder)
    except OSError as error:
        raise RunError(f'{folder} cannot be removed ({error.strerror}); remove it, or pass another --out') from error


def _number(text: str) -> float | str:
    """Parses a number that Python has written, so that writing it again gives the same text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def read_config(out: Path, *names: str) -> dict[str, Any]:
    """Returns the settings of a run. Raises DamagedError if an entry of `names` is missing."""
    cure = 'put back a copy of it, or start the run anew with --overwrite'
    config = read_json(out / CONFIG, cure)
    with reading(out / CONFIG, cure):
        missing = [name for name in ('model', 'feature_dim', *names) if name not in config]
        if missing:
            raise ValueError(f'it lacks {", ".join(missing)}')
    return config


def read_json(path: Path, cure: str = 'put back a copy of it') -> Any:
    with reading(path, cure):
        return json.loads(path.read_text(encoding='utf-8'))


@contextlib.contextmanager
def reading(path: Path, cure: str) -> Iterator[None]:
    """Converts an error in reading a file of a run into one that names the file and the cure.

    Raises:
      DamagedError: if it is missing or not whole.
      RunError: if the system fails to read it.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise DamagedError(f'{path} is missing; {cure}') from error
    except OSError as error:
        raise RunError(
            f'{path} could not be read ({error.strerror or error}); correct the error, and run the same command again'
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DamagedError(f'{path} is damaged ({error}); {cure}') from error


def write_json(path: Path, value: Any) -> None:
    """Writes strict JSON; NaN and infinite numbers, which JSON lacks, become null."""
    write_text(path, json.dumps(plain(value), indent=2, allow_nan=False) + '\n')


def plain(value: Any) -> Any:
    """Returns a value as JSON can hold it: dictionaries, lists, texts, finite numbers and null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value
