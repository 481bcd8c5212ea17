"""What a run of toy2d leaves, to compare a run that was disturbed with one that was not."""

import csv
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.train import checkpoint

ARMS = ('softmax', 'center')


def untimed(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not name.endswith(('_seconds', '_per_second'))}


def what_came_out(out: Path) -> dict[str, Any]:
    """All that a run leaves, but for times: rows, summary, pictures, snapshots, and the arrays of its last saves."""
    with (out / 'metrics.csv').open(newline='', encoding='utf-8') as file:
        rows = [untimed(row) for row in csv.DictReader(file)]
    summary = json.loads((out / 'summary.json').read_text(encoding='utf-8'))
    ends = {'rows': rows, 'summary': {arm: untimed(values) for arm, values in summary.items()}}
    for name in ('features.png', 'features.gif'):
        ends[name] = (out / name).read_bytes()
    for path in sorted((out / 'snapshots').iterdir()):
        with np.load(path) as arrays:
            ends[path.name] = {name: array.tobytes() for name, array in arrays.items()}
    for arm in ARMS:
        saved = checkpoint.saved_params(out / 'checkpoints' / arm)
        ends[arm] = {jax.tree_util.keystr(p): a.tobytes() for p, a in jax.tree_util.tree_leaves_with_path(saved)}
    return ends


def assert_same_ends(out: Path, other: Path) -> None:
    ends, others = what_came_out(out), what_came_out(other)
    assert ends.keys() == others.keys()
    for name, value in ends.items():
        assert value == others[name], name
