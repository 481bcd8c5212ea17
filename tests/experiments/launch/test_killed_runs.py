"""Runs that are killed end as one that was left alone."""

import os
import random
import subprocess
import sys
import time

import pytest

from tests.support.ends import assert_same_ends


def start(*flags: object) -> subprocess.Popen:
    """Starts the command in a process of its own, which says where it computes once it has begun."""
    command = [sys.executable, '-W', 'error', '-m', 'experiments.toy2d', *map(str, flags)]
    environment = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert 'jax' in process.stdout.readline()
    return process


def finish(process: subprocess.Popen) -> None:
    output = process.communicate()
    assert process.returncode == 0, output


@pytest.mark.slow
def test_runs_that_are_killed_at_20_random_moments_end_as_one_that_was_not(tmp_path):
    flags = ('--parallel', 'none', '--batch-size', 100, '--epochs', 5, '--save-every', 0.1, '--resume')
    finish(start(*flags, '--out', tmp_path / 'whole'))
    process = start(*flags, '--out', tmp_path / 'again')  # compiles nothing
    begun = time.monotonic()
    finish(process)
    longest = time.monotonic() - begun

    moments, kills, run_number = random.Random(0), 0, 0
    while kills < 20:
        out = tmp_path / f'run {run_number}'
        process = start(*flags, '--out', out)
        try:
            process.wait(timeout=moments.uniform(0, longest))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            if kills < 20:
                continue
            process = start(*flags, '--out', out)
        finish(process)
        assert_same_ends(out, tmp_path / 'whole')
        run_number += 1
