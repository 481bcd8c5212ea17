"""The folder of a run: what it was asked, what it measured a row at a time, and what came of it."""

import csv
import dataclasses
import json
import math
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from experiments.devices import Devices

CONFIG, METRICS, SUMMARY = 'config.json', 'metrics.csv', 'summary.json'
PAGES = ('features.png', 'features.gif', 'report.html')


class RunError(Exception):
    """Something about a run that its user can put right; the message says how."""


def environment(devices: Devices) -> dict[str, Any]:
    """Where a run computes and with what."""
    kinds = sorted({device.device_kind for device in devices.devices})
    return {
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


class Run:
    """A new run in the folder `out`, which must not hold one, unless it may be overwritten."""

    def __init__(self, out: Path, *, overwrite: bool):
        if out.exists() and not out.is_dir():
            raise RunError(f'--out {out} is a file; name a folder')
        if (out / CONFIG).exists() and not overwrite:
            raise RunError(f'--out {out} holds a run; name another folder, or pass --overwrite to replace it')
        self.out = out

    def start(self, config: Mapping[str, Any]) -> None:
        """Makes the folder, removes what an earlier run wrote there and nothing else, and saves the settings."""
        self.out.mkdir(parents=True, exist_ok=True)
        for name in (CONFIG, METRICS, SUMMARY, *PAGES):
            (self.out / name).unlink(missing_ok=True)
        write_json(self.out / CONFIG, config)

    def add_metrics(self, row: Mapping[str, Any]) -> None:
        """Appends a row to metrics.csv; the first one names the columns."""
        path = self.out / METRICS
        new = not path.exists()
        with path.open('a', newline='', encoding='utf-8') as file:
            writer = csv.DictWriter(file, list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.csv, numbers as numbers."""
        with (self.out / METRICS).open(newline='', encoding='utf-8') as file:
            return [{key: _number(value) for key, value in row.items()} for row in csv.DictReader(file)]

    def config(self) -> dict[str, Any]:
        return json.loads((self.out / CONFIG).read_text(encoding='utf-8'))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        write_json(self.out / SUMMARY, summary)


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def write_json(path: Path, value: Any) -> None:
    """Strict JSON: numbers that are not finite, for which JSON has no word, become null."""
    path.write_text(json.dumps(plain(value), indent=2, allow_nan=False) + '\n', encoding='utf-8')


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
