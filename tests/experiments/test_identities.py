"""The experiment on made identities, run whole: what it writes, and how it goes on."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import identities
from experiments.metrics.held_out import Interval
from experiments.train.checkpoint import saved_params
from tests.support import tiny
from tests.support.ends import untimed

SMALL = ('--num-classes', 12, '--batch-size', 6, '--unseen', 5, '--feature-dim', 3, '--steps', 40)
QUICK = (*SMALL, '--losses', 'class', '--sample-shares', 1, '--center-weights', 0, 0.5)
MEASURES = {'eer', 'rank_1', 'tar_at_far_0.1', 'tar_at_far_0.01', 'tar_at_far_0.001', 'tar_at_far_0.0001'}


run = partial(tiny.run, identities)


def table(out: Path) -> list[dict[str, str]]:
    """The rows of a run without times."""
    with (out / 'identities.csv').open(newline='', encoding='utf-8') as file:
        return [untimed(row) for row in csv.DictReader(file)]


@pytest.fixture(scope='module')
def whole(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp('whole') / 'run'
    assert run(*QUICK, '--out', out) == 0
    return out


@pytest.mark.slow
def test_a_run_has_a_row_for_each_network_and_says_that_its_data_is_made(whole):
    rows = table(whole)
    found = [(row['loss'], row['sample_share'], row['center_weight'], row['seed']) for row in rows]
    assert found == [('class', '1.0', weight, '0') for weight in ('0.0', '0.5')]
    assert {row['rows_dropped'] for row in rows} == {'0'}
    summary: dict[str, Any] = json.loads((whole / 'summary.json').read_text())
    assert list(summary) == ['class, all, weight 0', 'class, all, weight 0.5', 'class, all, weight 0.5 - 0']
    for values in summary.values():
        assert values.keys() == MEASURES
    with Image.open(whole / 'identities.png') as picture:
        assert picture.width > 800
    page = (whole / 'report.html').read_text(encoding='utf-8')
    assert 'The data is made, not loaded' in page
    assert 'python -m experiments.identities' in page


def test_a_difference_is_within_a_seed():
    names = ('loss', 'sample_share', 'center_weight', 'seed')
    values = {(0.0, 0): 0.5, (0.25, 0): 0.25, (1.0, 0): 0.125, (0.0, 1): 1.0, (0.25, 1): 0.75, (1.0, 1): 0.5}
    rows = [
        {**dict(zip(names, ('margin', 0.1, *pair), strict=True)), **dict.fromkeys(MEASURES, value)}
        for pair, value in values.items()
    ]
    summary = identities.summarize_trials(rows)
    weights = ('0', '0.25', '0.25 - 0', '1', '1 - 0')
    assert summary.keys() == {f'margin, 0.1, weight {weight}' for weight in weights}
    assert summary['margin, 0.1, weight 0']['eer'].mean == 0.75
    assert summary['margin, 0.1, weight 0.25 - 0']['eer'] == Interval(-0.25, -0.25, -0.25)
    assert summary['margin, 0.1, weight 1 - 0']['rank_1'].mean == -0.4375


@pytest.mark.slow
def test_a_finished_run_says_so_and_other_settings_are_another_run(whole, capsys):
    assert run(*QUICK, '--out', whole, '--resume') == 0
    assert 'the run is finished' in capsys.readouterr().out
    assert run(*QUICK, '--out', whole, '--resume', '--steps', 41) == 2
    assert 'steps is 41' in capsys.readouterr().err
    assert run(*QUICK, '--out', whole) == 2
    assert '--overwrite' in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_is_stopped_or_killed_goes_on_and_ends_alike(whole, tmp_path, monkeypatch, capsys):
    flags = (*QUICK, '--save-every', 0, '--out', tmp_path / 'run', '--resume')
    update = identities.Progress.update

    def interrupting(self, task, *, completed):
        update(self, task, completed=completed)
        if completed == 20 and (tmp_path / 'run/checkpoints/class-1.0-0.5-0').exists():
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(identities.Progress, 'update', interrupting)
        assert run(*flags) == 143
    assert 'To continue: python -m experiments.identities' in capsys.readouterr().err
    newest = tmp_path / 'run/checkpoints/class-1.0-0.5-0'
    assert (newest / '20').exists()

    command = [sys.executable, '-m', 'experiments.identities', *map(str, flags)]
    process = subprocess.Popen(command, env={**os.environ, 'JAX_PLATFORMS': 'cpu'}, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (newest / '30').exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert run(*flags) == 0
    assert not [*(tmp_path / 'run/checkpoints').glob('*/*damaged*')]
    assert table(tmp_path / 'run') == table(whole)
    for folder in (whole / 'checkpoints').iterdir():
        expected, found = (saved_params(path) for path in (folder, tmp_path / 'run/checkpoints' / folder.name))
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert (tmp_path / 'run/identities.png').read_bytes() == (whole / 'identities.png').read_bytes()


@pytest.mark.slow
def test_a_run_may_get_more_seeds_and_trains_no_network_twice(whole, tmp_path):
    shutil.copytree(whole, tmp_path / 'run')
    saves = tmp_path / 'run/checkpoints/class-1.0-0.5-0'
    before = {path: path.stat().st_mtime_ns for path in saves.iterdir()}
    assert run(*QUICK, '--out', tmp_path / 'run', '--resume', '--seeds', 2) == 0
    assert {path: path.stat().st_mtime_ns for path in saves.iterdir()} == before
    assert table(tmp_path / 'run')[:2] == table(whole)
    assert len(table(tmp_path / 'run')) == 4


@pytest.mark.slow
def test_each_softmax_trains_on_a_sample_and_on_all_classes(tmp_path):
    assert run(*SMALL, '--sample-shares', 1, 0.5, '--out', tmp_path / 'run') == 0
    assert len(table(tmp_path / 'run')) == 12


@pytest.mark.parametrize(
    ('flag', 'value'),
    [
        ('--losses', ()),
        ('--sample-shares', (1.5,)),
        ('--sample-shares', (0.01,)),
        ('--center-weights', (-1,)),
        ('--num-classes', (1,)),
        ('--steps', (0,)),
        ('--seeds', (0,)),
        ('--noise', ('nan',)),
        ('--unseen', (1,)),
        ('--seed', (-1,)),
    ],
)
def test_a_wrong_value_is_one_line_that_names_it_and_exit_code_2(tmp_path, capsys, flag, value):
    assert run('--out', tmp_path / 'run', flag, *value) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert flag in error
