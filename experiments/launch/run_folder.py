"""The folder of a run: what it was asked, what it measured a row at a time, and what came of it."""

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
from experiments.launch.mesh import Devices

CONFIG, METRICS, SUMMARY = 'config.json', 'metrics.csv', 'summary.json'
KNOWN, DATA = 'known.json', 'data.json'
LOCK = '.lock'
TABLES = ('verification.csv', 'sweep.csv')
PAGES = ('features.png', 'features.gif', 'roc.png', 'weights.png', 'accuracy.png', 'report.html')
FOLDERS = ('checkpoints', 'snapshots', 'tensorboard', 'profile', 'cells')
CHECKPOINTS, SNAPSHOTS, TENSORBOARD, PROFILE, CELLS = FOLDERS


# The lock of the run that this process has begun. The kernel frees it when the process ends.
_lock = contextlib.ExitStack()


class RunError(Exception):
    """Something about a run that its user can put right; the message says how."""


class DamagedError(RunError):
    """A file of a run is missing or not whole."""


def environment(devices: Devices) -> dict[str, Any]:
    """Where a run computes and with what."""
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


def in_a_line(surroundings: Mapping[str, Any]) -> str:
    versions = ', '.join(f'{name} {number}' for name, number in surroundings['versions'].items())
    return f'{surroundings["devices"]} ({surroundings["backend"]}); {versions}'


def check_folder(out: Path) -> None:
    """Raises RunError if no file can be written to the folder `out`. What was made to find out is removed again."""
    made = []
    try:
        if out.exists() and not out.is_dir():
            raise RunError(f'--out {out} is a file; name a folder')
        made = [path for path in (out, *out.parents) if not path.exists()]
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise RunError(f'--out {out} cannot be written to ({error.strerror}); name another folder') from error
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # it was not made, or another process uses it
                path.rmdir()


class Run:
    """The folder `out` of a run. If it holds a run already, that one is resumed or overwritten, or it is an error.

    A run is where its settings are. Without them, what has the name of a run's file may be anyone's.
    """

    def __init__(self, out: Path, *, overwrite: bool, resume: bool = False):
        if processes.first():
            check_folder(out)
        held = (out / CONFIG).exists()
        if all(processes.largest(held, not held)):
            raise RunError(
                f'--out {out} holds a run for some of the processes and none for others; name a folder that all see'
            )
        if held and not (overwrite or resume):
            raise RunError(
                f'--out {out} holds a run; name another folder, or pass --resume to go on with it, '
                'or --overwrite to replace it'
            )
        names = (METRICS, SUMMARY, KNOWN, DATA, *TABLES, *PAGES, *FOLDERS)
        taken = [name for name in names if os.path.lexists(out / name)]
        if taken and not held:
            raise RunError(
                f'--out {out} holds {taken[0]}, but no {CONFIG}, so it is no run and nothing is removed; '
                'name another folder'
            )
        self.out = out
        self._held = held
        self.resumed = held and resume
        self.rows: list[dict[str, Any]] = []

    def finished(self, settings: Mapping[str, Any], names: Sequence[str]) -> bool:
        """Returns whether a run of these settings is there and its page and all files of these names are whole."""
        if not self.resumed or not self.config().items() >= plain(settings).items():
            return False
        return all(is_whole(self.out / name) for name in (PAGES[-1], *names))

    def start(self, config: Mapping[str, Any], identity: Mapping[str, str]) -> None:
        """Makes the folder and saves the settings, and what tells the data from others.

        Of what an earlier run wrote there, and nothing else, it removes all, or the results alone if that run is
        resumed. Of several processes the first one does it.
        """
        if processes.first():
            self._take()
        processes.together('the folder is locked')
        if processes.first():
            self._clear(config, identity)
        processes.together('the folder is made')

    def _take(self) -> None:
        """Locks the folder for this process, or raises RunError if another run is or was at work there."""
        self.out.mkdir(parents=True, exist_ok=True)
        _lock.close()
        try:
            _lock.enter_context(lock(self.out / LOCK, wait=False))
        except BlockingIOError as error:
            raise RunError(f'--out {self.out} is in use by another run; wait for its end, or name another') from error
        except OSError as error:
            raise RunError(f'{self.out / LOCK} cannot be locked ({error.strerror}); name another --out') from error
        if not self._held and (self.out / CONFIG).exists():
            raise RunError(f'--out {self.out} holds a run that has begun since; name another folder')

    def _clear(self, config: Mapping[str, Any], identity: Mapping[str, str]) -> None:
        for name in (*reversed(PAGES), *TABLES, SUMMARY, KNOWN):
            (self.out / name).unlink(missing_ok=True)
        if not self.resumed:  # the settings are replaced last: until then the rest is known as a run's
            (self.out / METRICS).unlink(missing_ok=True)
            for name in FOLDERS:
                _remove(self.out / name)
        write_json(self.out / DATA, identity)
        write_json(self.out / CONFIG, config)

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raises RunError at the first setting that is not that of the run that is resumed."""
        saved = self.config()
        for name, value in plain(settings).items():
            if name in saved and saved[name] != value:
                raise RunError(
                    f'--resume: {name.replace("_", "-")} is {value}, but the run in {self.out} has {saved[name]}; '
                    'give that, or another --out'
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
        """Returns the rows of an arm as they would be read from metrics.csv."""
        rows = (row for row in self.rows if row['arm'] == arm)
        return [{key: _number(str(value)) for key, value in row.items()} for row in rows]

    def add_metrics(self, *rows: Mapping[str, Any]) -> None:
        """Adds rows to metrics.csv. The first one names the columns."""
        self.rows += map(dict, rows)
        if rows and processes.first():
            write_table(self.out / METRICS, self.rows)

    def metrics(self) -> list[dict[str, Any]]:
        """Returns the rows of metrics.csv, numbers as numbers."""
        return [{key: _number(value) for key, value in row.items()} for row in _table(self.out / METRICS)]

    def config(self) -> dict[str, Any]:
        return read_config(self.out)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        if processes.first():
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
    except Exception:  # Pillow raises some ten types; the file is made again, whatever it was
        return False


def _remove(folder: Path) -> None:
    """Removes a folder; of a link to one the link, for where it leads is its user's own."""
    try:
        if folder.is_symlink():
            folder.unlink()
        elif folder.exists():
            shutil.rmtree(folder)
    except OSError as error:
        raise RunError(f'{folder} cannot be removed ({error.strerror}); remove it, or name another --out') from error


def _number(text: str) -> float | str:
    """A number as Python writes it, so that writing it again gives the same text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def read_config(out: Path, *names: str) -> dict[str, Any]:
    """Returns the settings of a run, which must have entries of these names."""
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
    """Turns what a file of a run raises while it is read into a line that names the file and what to do.

    Raises:
      DamagedError: if it is missing or not whole.
      RunError: if the system fails to read it.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise DamagedError(f'{path} is missing; {cure}') from error
    except OSError as error:
        raise RunError(f'{path} could not be read ({error.strerror or error}); mend that, and try again') from error
    except (ValueError, TypeError, KeyError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DamagedError(f'{path} is damaged ({error}); {cure}') from error


def write_json(path: Path, value: Any) -> None:
    """Strict JSON: numbers that are not finite, for which JSON has no word, become null."""
    write_text(path, json.dumps(plain(value), indent=2, allow_nan=False) + '\n')


def plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value
