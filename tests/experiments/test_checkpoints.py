"""Runs that are stopped, killed, extended or moved to other devices end as one that was left alone."""

import csv
import json
import shlex
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments import checkpoints, cli, toy2d
from experiments.progress import Progress

ARMS = ('softmax', 'center')
STEPS = 3  # an epoch of the digits has at this batch size
QUICK = ('--parallel', 'none', '--batch-size', 500)


def run(*flags: object) -> int:
    """Runs the command as a user does, and returns its exit code."""
    with pytest.raises(SystemExit) as end:
        cli.main(toy2d.Config, toy2d.main, 'experiments.toy2d', [str(flag) for flag in flags])
    code = end.value.code
    assert isinstance(code, int)
    return code


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
        saved = checkpoints.saved_params(out / 'checkpoints' / arm)
        ends[arm] = {jax.tree_util.keystr(p): a.tobytes() for p, a in jax.tree_util.tree_leaves_with_path(saved)}
    return ends


def assert_same_ends(out: Path, other: Path) -> None:
    ends, others = what_came_out(out), what_came_out(other)
    assert ends.keys() == others.keys()
    for name, value in ends.items():
        assert value == others[name], name


@pytest.fixture(scope='module')
def whole(tmp_path_factory) -> Path:
    """A run of four epochs that nothing disturbed."""
    out = tmp_path_factory.mktemp('whole') / 'run'
    assert run(*QUICK, '--epochs', 4, '--out', out) == 0
    return out


def interrupt_at(monkeypatch, step: int, signum: int) -> None:
    """Sends the process a signal where the progress bar is told of a step of an epoch, beginning with the third."""
    report = Progress.report

    def interrupting(self, before, done, *rest):
        if (before, done) == (2 * STEPS, step):
            signal.raise_signal(signum)
        report(self, before, done, *rest)

    monkeypatch.setattr(Progress, 'report', interrupting)


def test_a_run_that_is_stopped_in_both_arms_says_how_to_go_on_and_ends_as_if_it_had_not(
    whole, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    out = Path('a run') / 'of mine'
    flags = (*QUICK, '--epochs', 4, '--out', out)
    for signum, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        with monkeypatch.context() as patch:
            interrupt_at(patch, STEPS, signum)
            assert run(*flags) == code
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1
        command = shlex.split(said[0].partition('To go on: ')[2])
        assert command[:3] == ['python', '-m', 'experiments.toy2d']
        flags = command[3:]
        assert '--resume' in flags
        assert not (out / 'report.html').exists()
    # The first signal met the softmax arm, and the next one too, since that epoch had to be told again.
    assert run(*flags) == 0
    assert_same_ends(out, whole)
