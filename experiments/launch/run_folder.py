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
from collections.abc import Mapping, Sequence
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
KNOWN = 'known.json'
LOCK = '.lock'
TABLES = ('verification.csv', 'sweep.csv')
PAGES = ('features.png', 'features.gif', 'roc.png', 'weights.png', 'accuracy.png', 'report.html')
FOLDERS = ('checkpoints', 'snapshots', 'tensorboard', 'profile', 'cells')
CHECKPOINTS, SNAPSHOTS, TENSORBOARD, PROFILE, CELLS = FOLDERS


# The lock of the run that this process has begun. The kernel frees it when the process ends.
_lock = contextlib.ExitStack()


class RunError(Exception):
    """Something about a run that its user can put right; the message says how."""


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
        if processes.is_main_process():
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
        names = (METRICS, SUMMARY, KNOWN, *TABLES, *PAGES, *FOLDERS)
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
        return all(_whole(self.out / name) for name in (PAGES[-1], *names))

    def start(self, config: Mapping[str, Any]) -> None:
        """Makes the folder and saves the settings. Of what an earlier run wrote there, and nothing else, it removes
        all, or the results alone if that run is resumed. Of several processes the first one does it.
        """
        if processes.is_main_process():
            self._take()
        processes.barrier('the folder is locked')
        if self.resumed and (self.out / METRICS).exists():
            self.rows = self.metrics()
        processes.barrier('all have seen the folder')
        if processes.is_main_process():
            self._clear(config)
        processes.barrier('the folder is made')

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

    def _clear(self, config: Mapping[str, Any]) -> None:
        for name in (*reversed(PAGES), *TABLES, SUMMARY, KNOWN):
            (self.out / name).unlink(missing_ok=True)
        if not self.resumed:  # the settings are replaced last: until then the rest is known as a run's
            (self.out / METRICS).unlink(missing_ok=True)
            for name in FOLDERS:
                _remove(self.out / name)
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

    def saved_rows(self, arm: str) -> list[dict[str, Any]]:
        """Returns the rows of an arm as they would be read from metrics.csv."""
        rows = (row for row in self.rows if row['arm'] == arm)
        return [{key: _number(str(value)) for key, value in row.items()} for row in rows]

    def keep(self, arm: str, epochs: int, saved: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
        """Drops the rows of an arm beyond its first `epochs` epochs, and returns those.

        Where metrics.csv lacks rows, takes the `saved` ones.
        """
        if sum(row['arm'] == arm for row in self.rows) < len(saved):
            self.rows = [row for row in self.rows if row['arm'] != arm]
            for row in saved:
                self.add_metrics(row)
        self.rows = [row for row in self.rows if row['arm'] != arm or row['epoch'] <= epochs]
        kept = [row for row in self.rows if row['arm'] == arm]
        if [row['epoch'] for row in kept] != list(range(1, epochs + 1)):
            raise RunError(
                f'{self.out / METRICS} lacks rows of the {arm} arm, so the run cannot go on; '
                'pass --overwrite to start it anew'
            )
        return kept

    def add_metrics(self, row: Mapping[str, Any]) -> None:
        """Adds a row to metrics.csv, behind those of the same arm; the first one names the columns."""
        self.rows.append(dict(row))
        arms = list(dict.fromkeys(row['arm'] for row in self.rows))
        self.rows.sort(key=lambda row: arms.index(row['arm']))
        if processes.is_main_process():
            write_table(self.out / METRICS, self.rows)

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.csv, numbers as numbers."""
        with (self.out / METRICS).open(newline='', encoding='utf-8') as file:
            return [{key: _number(value) for key, value in row.items()} for row in csv.DictReader(file)]

    def config(self) -> dict[str, Any]:
        return read_json(self.out / CONFIG)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        if processes.is_main_process():
            write_json(self.out / SUMMARY, summary)


def _whole(path: Path) -> bool:
    try:
        if path.suffix == '.json':
            return bool(read_json(path))
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


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding='utf-8'))


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
