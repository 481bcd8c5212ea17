"""What a user sees before a program computes: its help at once, with what matters first, and errors in flags."""

import dataclasses
import importlib
import subprocess
import sys

import pytest

from experiments.launch.flags import DeviceFlags
from tests.support.tiny import run

PROGRAMS = ('toy2d', 'verification', 'sweep', 'identities', 'predict', 'benchmark', 'costs')
SLOW = ('jax', 'flax', 'optax', 'tensorflow_datasets', 'matplotlib', 'sklearn', 'scipy', 'grain', 'orbax')

# Runs a program with each of two lines, and prints its exit codes and the modules that it has imported.
SCRIPT = """
import contextlib, io, runpy, sys
for program in sys.argv[1].split(','):
    for flags in (['--help'], ['--epoch', '3']):
        sys.argv[1:] = flags
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                runpy.run_module(f'experiments.{program}', run_name='__main__')
            except SystemExit as end:
                code = end.code
        print(code)
print(*sys.modules)
"""


def test_help_and_an_unknown_flag_import_nothing_slow():
    line = [sys.executable, '-c', SCRIPT, ','.join(PROGRAMS)]
    *codes, modules = subprocess.run(line, capture_output=True, text=True, check=True).stdout.splitlines()
    assert codes == ['0', '2'] * len(PROGRAMS)
    assert 'experiments.launch.flags' in modules.split()
    assert not {*SLOW} & {*modules.split()}


@pytest.mark.parametrize(
    ('program', 'feature_dim', 'seed'), [('toy2d', 2, 'random'), ('verification', 64, 'first'), ('sweep', 64, 'first')]
)
def test_a_program_has_the_defaults_that_its_results_were_made_with(capsys, program, feature_dim, seed):
    experiment = importlib.import_module(f'experiments.{program}')
    assert experiment.Config().feature_dim == feature_dim
    assert run(experiment, '--help') == 0
    said = ' '.join(capsys.readouterr().out.replace('│', ' ').split())
    assert f'--seed INT {seed}' in said


@pytest.mark.parametrize('program', PROGRAMS)
def test_help_lists_data_folder_and_epochs_first_and_the_devices_last(program):
    config = importlib.import_module(f'experiments.{program}').Config
    names = [field.name for field in dataclasses.fields(config)]
    devices = [field.name for field in dataclasses.fields(DeviceFlags)]
    if 'epochs' in names:
        assert names[:3] == ['dataset', 'out', 'epochs']
    if issubclass(config, DeviceFlags):
        assert [name for name in names if name != 'workers'][-len(devices) :] == devices


@pytest.mark.parametrize(
    ('given', 'near'),
    [
        (('--epoch', 3), '--epochs'),
        (('--epochs', 3, '--centerweight', 0.1), '--center-weight'),
        (('--wieght', 0.1), '--center-weight'),
        (('--leraning_rate=0.1',), '--learning-rate'),
        (('--size', 8), '--image-size or --batch-size'),
    ],
)
def test_an_unknown_flag_is_answered_with_the_nearest(capsys, given, near):
    assert run(importlib.import_module('experiments.toy2d'), *given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f' is an unknown argument; did you mean {near}?')


def test_an_argument_that_is_near_no_flag_is_answered_with_the_help(capsys):
    assert run(importlib.import_module('experiments.toy2d'), 'abc') == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == 'python -m experiments.toy2d: abc is an unknown argument; --help lists the flags'
