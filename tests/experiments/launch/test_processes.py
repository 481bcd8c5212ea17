"""Several processes on the loopback: one answer, one set of files, and nobody waits for a process that has gone."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import toy2d
from experiments.train.checkpoint import saved_params
from experiments.train.save_files import saved_steps, unfinished_saves
from tests.support import tiny
from tests.support.ends import untimed
from tests.support.tiny import COLUMNS, rows, strict

run = partial(tiny.run, toy2d)

# Two processes save at every 16th step, and an epoch has three.
SAVED_TWICE = ('--batch-size', 500, '--epochs', 12, '--save-every', 0.01)
QUICK = ('--batch-size', 500, '--epochs', 1)


def free_port() -> int:
    with socket.create_server(('', 0)) as server:
        return server.getsockname()[1]


def start(index: int, port: int, *flags: object, experiment: str = 'toy2d') -> subprocess.Popen:
    """Starts one of two processes, which has two devices."""
    flags = ('--coordinator', f'localhost:{port}', '--num-processes', 2, '--process-id', index, *flags)
    return subprocess.Popen(
        [sys.executable, '-W', 'error', '-m', f'experiments.{experiment}', *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '2'},
    )


def start_one(*flags: object) -> subprocess.Popen:
    """Starts a process that is the only one of its run, with one device."""
    command = [sys.executable, '-W', 'error', '-m', 'experiments.toy2d', '--parallel', 'none', *map(str, flags)]
    environment = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def start_two(*flags: object, experiment: str = 'toy2d', own: tuple = ((), ())) -> list[subprocess.Popen]:
    """Starts both processes of a run; `own` has flags of one of them."""
    port = free_port()
    return [start(index, port, *flags, *own[index], experiment=experiment) for index in range(2)]


def finish(process: subprocess.Popen, timeout: float = 300) -> tuple[int, str, str]:
    """Exit code, and what was printed but for the lines of JAX's transport, which has no flag to be quiet."""
    try:
        output, errors = process.communicate(timeout=timeout)
    finally:
        process.kill()
    # Its threads write into one another's lines.
    lines = [line for line in output.splitlines() if not re.search(r'Gloo|peer ranks|^\d*$', line)]
    return process.returncode, '\n'.join(lines), errors


def wait_for(path: Path, found: int, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while len(list(path.glob('*'))) < found:
        assert time.monotonic() < deadline, f'{path} has not come'
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.usefixtures('all_optimizations')  # as its processes
def test_a_run_of_two_processes_is_that_of_one_with_the_whole_batch(tmp_path):
    # The rows of the centers lie over both processes, and 10 are none that 4 devices divide.
    together, alone = tmp_path / 'together', tmp_path / 'alone'
    ends = [finish(process) for process in start_two(*QUICK, '--mesh', 'classes=4', '--out', together)]
    assert [code for code, *_ in ends] == [0, 0], ends
    assert '4 x cpu' in ends[0][1]
    assert ends[0][2] == ''
    assert ends[1][1:] == ('', '')  # the second one writes nothing
    assert strict(together / 'config.json')['processes'] == 2
    assert (together / 'report.html').exists()

    assert run(*QUICK, '--parallel', 'none', '--out', alone) == 0
    for got, expected in zip(rows(together), rows(alone), strict=True):
        for name in COLUMNS - {'arm'}:
            np.testing.assert_allclose(float(got[name]), float(expected[name]), rtol=1e-4, atol=1e-4, err_msg=name)
    for arm in ('softmax', 'center'):
        got, expected = (saved_params(out / 'checkpoints' / arm) for out in (together, alone))
        assert got['centers']['center']['centers'].shape == (10, 2)
        for leaf, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            # Adam divides gradients by their size, and so the rounding of small ones: a step of it is 3e-3. What is
            # owed to 1e-6 is tested by SGD, in tests/test_two_processes.py.
            np.testing.assert_allclose(leaf, other, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_every_experiment_runs_in_two_processes_of_which_the_first_writes(tmp_path):
    toy, out = tmp_path / 'toy', tmp_path / 'out'
    assert run(*QUICK, '--parallel', 'none', '--out', toy) == 0
    sweep = *QUICK, '--feature-dim', 2, '--seeds', 1, '--weights', 0.1, '--alphas', 0.5
    flags = {
        'verification': (*QUICK, '--images-per-class', 100, '--seeds', 1, '--mesh', 'data=2,classes=2'),
        'sweep': (*sweep, '--mesh', 'data=2,classes=2'),
        'predict': ('--run', toy, '--images', 'digits:test'),
        'benchmark': ('--batch-sizes', 16, '--classes', 10, '--feature-dim', 4, '--rounds', 1, '--mesh', 'classes=4'),
    }
    files = {'verification': 'report.html', 'sweep': 'report.html', 'predict': 'predictions.csv'}
    for experiment, own in flags.items():
        both = start_two(*own, '--out', out / experiment, experiment=experiment)
        first, second = map(finish, both)
        assert (first[0], second[0]) == (0, 0), (experiment, first, second)
        assert second[1:] == ('', '')
        assert (out / experiment / files.get(experiment, 'benchmark.csv')).exists()
    assert len(list((out / 'sweep' / 'cells').glob('*.json'))) == 2


def assert_jax_ends_it_within_a_minute(process: subprocess.Popen, startup: float = 0.0) -> None:
    begun = time.monotonic()
    code, _, errors = finish(process)
    assert time.monotonic() - begun < 60 + startup
    assert code not in (0, 2)
    assert 'coordination' in errors.lower()


@pytest.mark.slow
@pytest.mark.parametrize('missing', [1, 0], ids=['any', 'the coordinator'])
def test_a_process_that_is_missing_ends_the_other_within_a_minute(tmp_path, missing):
    begun = time.monotonic()
    finish(start(0, free_port(), '--help'))
    startup = time.monotonic() - begun  # Python and its imports, which take long on busy cores
    process = start(1 - missing, free_port(), *QUICK, '--out', tmp_path / 'run')
    assert_jax_ends_it_within_a_minute(process, startup)
    assert not (tmp_path / 'run').exists()


@pytest.mark.slow
@pytest.mark.parametrize('killed', [1, 0], ids=['any', 'the coordinator'])
@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGSTOP], ids=['killed', 'stopped'])
def test_a_process_that_is_lost_ends_the_other_within_a_minute_and_the_last_save_is_whole(tmp_path, killed, number):
    # A stopped process is like a machine without power or network: no connection is closed.
    both = start_two('--batch-size', 500, '--epochs', 300, '--save-every', 0.1, '--out', tmp_path / 'run')
    wait_for(tmp_path / 'run' / 'checkpoints' / 'softmax', 2)
    both[killed].send_signal(number)
    assert_jax_ends_it_within_a_minute(both[1 - killed])
    both[killed].kill()
    finish(both[killed])
    assert saved_params(tmp_path / 'run' / 'checkpoints' / 'softmax')['centers']['center']['centers'].shape == (10, 2)


def rows_of(out: Path, arm: str) -> list[dict[str, str]]:
    """The rows of an arm without times."""
    return [untimed(row) for row in rows(out) if row['arm'] == arm]


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory) -> Path:
    """A run of one process that was not killed."""
    out = tmp_path_factory.mktemp('undisturbed') / 'run'
    code, *printed = finish(start_one(*SAVED_TWICE, '--out', out))
    assert code == 0, printed
    return out


@pytest.mark.slow
@pytest.mark.parametrize('killed', [1, 0], ids=['any', 'the coordinator'])
def test_one_process_finishes_a_run_of_two_of_which_one_was_killed_during_a_save(tmp_path, undisturbed, killed):
    out = tmp_path / 'run'
    saves = out / 'checkpoints' / 'softmax'
    both = start_two(*SAVED_TWICE, '--out', out)
    while not (saved_steps(saves) and unfinished_saves(saves)):
        assert both[killed].poll() is None
        time.sleep(0.001)
    both[killed].kill()
    assert_jax_ends_it_within_a_minute(both[1 - killed])
    finish(both[killed])
    before = rows_of(out, 'softmax')

    code, output, errors = finish(start_one(*SAVED_TWICE, '--out', out, '--resume'))
    assert (code, errors) == (0, ''), output
    continued = re.search(r'the softmax arm continues after (\d+) epochs', output)
    assert continued
    epochs = int(continued[1])
    after = rows_of(out, 'softmax')
    assert epochs > 0
    assert after[:epochs] == before[:epochs]
    for row, expected in zip(after, rows_of(undisturbed, 'softmax'), strict=True):
        for name in ('softmax_loss', 'train_accuracy', 'test_accuracy', 'intra_inter_ratio'):
            np.testing.assert_allclose(float(row[name]), float(expected[name]), rtol=0.05, err_msg=name)
    assert rows_of(out, 'center') == rows_of(undisturbed, 'center')  # one process trained this arm alone


@pytest.mark.slow
def test_a_process_that_fails_ends_the_other_within_a_minute_and_the_last_save_is_whole(tmp_path):
    both = start_two('--batch-size', 500, '--epochs', 300, '--save-every', 0.1, '--out', tmp_path / 'run')
    wait_for(tmp_path / 'run' / 'checkpoints' / 'softmax', 2)
    (tmp_path / 'run' / 'metrics.csv').unlink()
    (tmp_path / 'run' / 'metrics.csv').mkdir()  # only process 0 writes there
    assert_jax_ends_it_within_a_minute(both[1])
    code, _, errors = finish(both[0])
    assert code != 0
    assert 'metrics.csv' in errors
    assert saved_params(tmp_path / 'run' / 'checkpoints' / 'softmax')['centers']['center']['centers'].shape == (10, 2)


@pytest.mark.slow
def test_a_signal_to_one_process_saves_and_stops_both(tmp_path):
    both = start_two('--batch-size', 500, '--epochs', 300, '--out', tmp_path / 'run')
    wait_for(tmp_path / 'run' / 'snapshots', 3)
    both[1].send_signal(signal.SIGTERM)
    for index, (code, _, errors) in enumerate(map(finish, both)):
        assert code == 143
        assert len(errors.splitlines()) == 1
        assert f'--process-id {index}' in errors
        assert '--resume' in errors
    assert len(list((tmp_path / 'run' / 'checkpoints' / 'softmax').iterdir())) == 1


@pytest.mark.slow
def test_an_error_of_all_processes_is_one_line_of_each(tmp_path):
    both = start_two('--batch-size', 499, '--epochs', 1, '--out', tmp_path / 'run')
    for code, _, errors in map(finish, both):
        assert code == 2
        assert len(errors.splitlines()) == 1
        assert '--batch-size must be a multiple of the 2 processes, got 499' in errors


@pytest.mark.slow
def test_processes_with_other_flags_end_with_a_line_that_names_these_flags(tmp_path):
    own = ((), ('--learning-rate', 0.1, '--num-processes', 3))
    both = start_two(*QUICK, '--out', tmp_path / 'run', own=own)
    for index, (code, _, errors) in enumerate(map(finish, both)):
        assert code == 2
        (line,) = errors.splitlines()
        assert f'process {index} has' in line
        assert '--learning-rate' in line
        assert '--batch-size' not in line
    assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_a_folder_that_is_not_the_same_for_all_is_one_line_and_exit_code_2(tmp_path):
    assert run(*QUICK, '--parallel', 'none', '--out', tmp_path / '0') == 0
    both = start_two(*QUICK, '--resume', own=(('--out', tmp_path / '0'), ('--out', tmp_path / '1')))
    for code, _, errors in map(finish, both):
        assert code == 2
        assert len(errors.splitlines()) == 1
        assert 'pass a folder that all processes share' in errors


THIRD = ('--num-processes', 3, '--process-id', 2)


@pytest.mark.parametrize(
    ('flags', 'named'),
    [
        (('--coordinator', 'localhost:1234'), ('--num-processes', '--process-id', 'missing')),
        (THIRD, ('--coordinator', 'missing')),
        (('--coordinator', 'localhost', *THIRD), ('HOST:PORT', 'localhost')),
        (('--coordinator', 'localhost:99999', *THIRD), ('HOST:PORT', '99999')),
        (('--coordinator', 'a:1', '--num-processes', 3, '--process-id', 3), ('--process-id', '0 to 2', '3')),
        (('--coordinator', 'a:1', '--num-processes', 3, '--process-id', -1), ('--process-id', '-1')),
        (('--coordinator', 'a:1', '--num-processes', 0, '--process-id', 0), ('--num-processes', '0')),
        (('--coordinator', 'a:1', *THIRD, '--parallel', 'pmap'), ('--coordinator', '--parallel pmap')),
        (('--distributed', '--parallel', 'none'), ('--distributed', '--parallel none')),
    ],
)
def test_flags_that_do_not_fit_are_one_line_that_names_them_and_exit_code_2(tmp_path, capsys, flags, named):
    assert run('--out', tmp_path / 'run', *flags) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert all(word in error for word in named)


@pytest.mark.slow
def test_no_cluster_around_a_process_is_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, '-m', 'experiments.toy2d', '--distributed', '--out', str(tmp_path / 'run')]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert '--coordinator HOST:PORT' in result.stderr
