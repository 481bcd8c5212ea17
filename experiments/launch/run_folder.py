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


# The lock of the run of this process. The kernel releases it when the process ends.
_lock = contextlib.ExitStack()


class RunError(Exception):
    """An error about a run that the user can correct; the message says how."""


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
    """The folder `out` of a run. An earlier run there is resumed or overwritten, or it is an error.

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
        names = (METRICS, SUMMARY, KNOWN, *TABLES, *PAGES, *FOLDERS)
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
        if not self.resumed or not self.config().items() >= plain(settings).items():
            return False
        return all(_whole(self.out / name) for name in (PAGES[-1], *names))

    def start(self, config: Mapping[str, Any]) -> None:
        """Creates the folder and saves the settings.

        Removes the files of an earlier run, or only its results if it is resumed, and no other files. With several
        processes, process 0 does all this.
        """
        if processes.is_main_process():
            self._take()
        processes.barrier('folder locked')
        if self.resumed and (self.out / METRICS).exists():
            self.rows = self.metrics()
        processes.barrier('folder checked')
        if processes.is_main_process():
            self._clear(config)
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

    def _clear(self, config: Mapping[str, Any]) -> None:
        for name in (*reversed(PAGES), *TABLES, SUMMARY, KNOWN):
            (self.out / name).unlink(missing_ok=True)
        if not self.resumed:  # config.json is replaced last: it marks the other files as a run's
            (self.out / METRICS).unlink(missing_ok=True)
            for name in FOLDERS:
                _remove(self.out / name)
        write_json(self.out / CONFIG, config)

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raises RunError if a setting differs from that of the resumed run."""
        saved = self.config()
        for name, value in plain(settings).items():
            if name in saved and saved[name] != value:
                raise RunError(
                    f'--resume: {name.replace("_", "-")} is {value}, but the run in {self.out} has {saved[name]}; '
                    'pass that value, or another --out'
                )

    def saved_rows(self, arm: str) -> list[dict[str, Any]]:
        """Returns the rows of an arm with the values that metrics.csv would give."""
        rows = (row for row in self.rows if row['arm'] == arm)
        return [{key: _number(str(value)) for key, value in row.items()} for row in rows]

    def keep(self, arm: str, epochs: int, saved: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
        """Drops the rows of an arm after its first `epochs` epochs, and returns the other rows of the arm.

        If metrics.csv lacks rows, uses the `saved` ones.
        """
        if sum(row['arm'] == arm for row in self.rows) < len(saved):
            self.rows = [row for row in self.rows if row['arm'] != arm]
            for row in saved:
                self.add_metrics(row)
        self.rows = [row for row in self.rows if row['arm'] != arm or row['epoch'] <= epochs]
        kept = [row for row in self.rows if row['arm'] == arm]
        if [row['epoch'] for row in kept] != list(range(1, epochs + 1)):
            raise RunError(
                f'{self.out / METRICS} lacks rows of the {arm} arm, so that the run cannot continue; '
                'pass --overwrite to replace it'
            )
        return kept

    def add_metrics(self, row: Mapping[str, Any]) -> None:
        """Adds a row to metrics.csv, after the other rows of its arm."""
        self.rows.append(dict(row))
        arms = list(dict.fromkeys(row['arm'] for row in self.rows))
        self.rows.sort(key=lambda row: arms.index(row['arm']))
        if processes.is_main_process():
            write_table(self.out / METRICS, self.rows)

    def metrics(self) -> list[dict[str, Any]]:
        """Reads the rows of metrics.csv, with numbers as int or float."""
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


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding='utf-8'))


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
