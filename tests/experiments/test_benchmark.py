"""The benchmark measures what it says: every arm makes the step of the oracle, and every number is in the table."""

import csv
import gc
import io
import itertools
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from experiments import benchmark
from experiments.bench import ours, ours_classifier, pytorch, pytorch_classifier, timing, turns
from experiments.bench.problem import RATE, Implementation, Problem
from experiments.bench.tables import timing_table
from experiments.launch.errors import FlagError
from experiments.launch.mesh import choose

PROBLEM = Problem(batch_size=64, num_classes=24, feature_dim=6)
MESH = 'data=2,classes=4'
LAYOUTS = ours.layouts(choose('auto')) | ours.layouts(choose('auto', MESH), MESH)


@pytest.fixture(autouse=True, scope='module')
def _collections_are_short():
    """A measurement collects garbage after each arm. What other tests have made is kept out of it."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _copies_are_small(monkeypatch):
    monkeypatch.setattr(timing, 'CPU_COPY_BYTES', 2**20)


@pytest.mark.parametrize('arm', LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_layout_takes_the_same_step_and_is_measured_with_its_memory(arm):
    measured = arm(PROBLEM)
    moved, loss, gradient = next(measured.steps)
    x, labels = PROBLEM.batch()
    np.testing.assert_allclose(np.mean(loss), np.mean(np.sum((x - 1) ** 2, axis=1)), rtol=1e-6)
    # Under pmap each device has the gradient of its own mean, and a copy of the table.
    devices = np.asarray(loss).size
    np.testing.assert_allclose(np.reshape(gradient, x.shape) / devices, 2 / 64 * (x - 1), rtol=1e-5, atol=1e-7)
    counts = np.bincount(labels, minlength=24)[:, None]
    sums = np.stack([np.sum((x - 1)[labels == c], axis=0) for c in range(24)])
    for copy in np.reshape(moved, (devices, 24, 6)):
        np.testing.assert_allclose(copy, 1 + 0.5 * sums / (1 + counts), rtol=1e-5)
    assert measured.temporary_bytes
    assert measured.accessed_bytes > 64 * 6 * 4


def test_one_layout_is_measured_where_it_is_named():
    assert [*ours.layouts(choose('none'))] == ['centerloss_jax']
    assert [*ours.layouts(choose('pmap'))] == ['centerloss_jax', 'pmap']
    assert [*ours.layouts(choose('auto', MESH), MESH)] == ['centerloss_jax', f'mesh {MESH}']


@pytest.mark.skipif(pytorch.installed() is None, reason='PyTorch is not installed')
@pytest.mark.parametrize('arm', pytorch.FORMS.values(), ids=pytorch.FORMS.keys())
def test_every_torch_arm_runs(arm):
    next(arm(pytorch.installed(), PROBLEM).steps)


def softmax_step(table, x, labels):
    """Returns the loss, its gradient for x, and the table after a step, over all classes."""
    logits = x @ table.T
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares = exponentials / exponentials.sum(axis=1, keepdims=True)
    loss = -np.log(shares[np.arange(len(x)), labels]).mean()
    residuals = (shares - np.eye(len(table))[labels]) / len(x)
    return loss, residuals @ table, table - RATE * residuals.T @ x


@pytest.mark.parametrize('share', [None, 1.0])
def test_the_step_of_the_classifier_is_that_of_numpy(share):
    problem = Problem(batch_size=16, num_classes=24, feature_dim=6)
    make = ours_classifier.full_softmax if share is None else partial(ours_classifier.sampled_softmax, share=share)
    measured = make(problem)
    x, labels = problem.batch()
    start = np.asarray(ours_classifier.first_table(problem), np.float64)
    loss, gradient, moved = softmax_step(start, x, labels)
    got_table, got_loss, got_gradient = next(measured.steps)
    np.testing.assert_allclose(got_loss, loss, rtol=1e-5)
    np.testing.assert_allclose(got_gradient, gradient, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(got_table, moved, rtol=1e-4, atol=1e-6)
    assert measured.temporary_bytes


def test_a_sample_has_room_for_every_class_of_a_batch():
    assert ours_classifier.num_sampled(Problem(16, 1000, 6), 0.1) == 100
    assert ours_classifier.num_sampled(Problem(200, 1000, 6), 0.1) == 200
    assert ours_classifier.num_sampled(Problem(200, 100, 6), 0.1) == 100


TORCH_CLASSIFIERS: dict[str, Any] = {'torch, linear': pytorch_classifier.full_linear}
TORCH_CLASSIFIERS |= {name: partial(arm, share=0.9) for name, arm in pytorch_classifier.SAMPLED_FORMS.items()}


@pytest.mark.skipif(pytorch.installed() is None, reason='PyTorch is not installed')
@pytest.mark.parametrize('arm', TORCH_CLASSIFIERS.values(), ids=TORCH_CLASSIFIERS.keys())
def test_every_torch_classifier_runs_with_its_memory(arm):
    measured = arm(pytorch.installed(), Problem(batch_size=16, num_classes=24, feature_dim=6))
    next(measured.steps)
    assert measured.temporary_bytes


@pytest.mark.slow
def test_a_classifier_is_measured_over_all_classes_and_over_a_sample(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(turns, 'TURNS', 1)
    sizes = {'batch_sizes': (16,), 'classes': (24,), 'feature_dim': 6, 'rounds': 1, 'sampled_share': 0.9}
    benchmark.main(benchmark.Config(**sizes, step='classifier', parallel='none', out=tmp_path / 'out'))
    with (tmp_path / 'out' / 'benchmark.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    ours_by_step = {row['step'] for row in rows if row['arm'] == 'centerloss_jax'}
    assert ours_by_step == {'softmax', 'softmax over a share of 0.9'}
    assert all(float(row['step_seconds']) > 0 and float(row['temporary_bytes']) > 0 for row in rows)
    assert 'softmax over a share of 0.9' in capsys.readouterr().out


def test_times_of_the_classifier_fit_a_terminal():
    problem = {'batch_size': 1024, 'num_classes': 1_000_000, 'feature_dim': 128}
    seconds = {'low_seconds': 1.2, 'step_seconds': 1.2345, 'high_seconds': 1.3}
    arms = 'centerloss_jax', *pytorch_classifier.SAMPLED_FORMS
    rows = [{'arm': arm, **problem, **seconds, 'times_copy': None, 'temporary_bytes': 2**31} for arm in arms]
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(timing_table(rows, 'softmax'))
    shown = console.export_text()
    assert all(arm in shown for arm in arms)
    assert shown.count('1234.50') == len(arms)
    assert 'x copy' not in shown


def idle(problem):
    """Returns an arm whose steps compute nothing."""
    del problem
    return Implementation(None for _ in itertools.count())


@pytest.mark.parametrize(('slow', 'expected'), [(60.0, turns.TURNS), (0.0, 1)])
def test_arms_take_turns_but_for_slow_ones(slow, expected, monkeypatch):
    monkeypatch.setattr(turns, 'SLOW', slow)
    made = []

    def arm(problem):
        made.append(problem)
        return idle(problem)

    rows = turns.measure_problem({'ours': arm, 'does not fit': lambda problem: None}, PROBLEM, 1, lambda name: None)
    assert [row['arm'] for row in rows] == ['ours']
    assert len(made) == expected


@pytest.mark.parametrize(
    'error',
    [
        MemoryError(),
        RuntimeError('CUDA out of memory. Tried'),
        RuntimeError("can't allocate memory"),
        'RESOURCE_EXHAUSTED: 2 TB',
    ],
)
def test_an_arm_without_memory_is_skipped_and_named(error):
    error = jax.errors.JaxRuntimeError(error) if isinstance(error, str) else error
    reported = []

    def greedy(problem):
        if len(reported) > 3:  # in the last turn
            raise error
        return idle(problem)

    arms = {'greedy': greedy, 'ours': idle}
    rows = turns.measure_problem(arms, PROBLEM, 1, lambda *words: reported.append(words))
    assert [row['arm'] for row in rows] == ['ours']
    assert ('greedy', 'out of memory') in reported


def test_any_other_error_of_an_arm_is_raised():
    def broken(problem):
        raise RuntimeError('a shape is wrong')

    with pytest.raises(RuntimeError, match='shape'):
        turns.measure_problem({'broken': broken}, PROBLEM, 1, lambda *words: None)


@pytest.mark.slow
def test_numbers_are_written_to_the_table_and_the_picture(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(turns, 'TURNS', 1)
    out = tmp_path / 'a b'
    sizes = {'batch_sizes': (16,), 'classes': (8, 24), 'feature_dim': 4, 'rounds': 1}
    benchmark.main(benchmark.Config(**sizes, parallel='none', out=out))
    with (out / 'benchmark.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    measured = {(row['step'], row['arm'], row['batch_size'], row['num_classes']) for row in rows}
    for arm in ours.layouts(choose('none')):
        assert {('center loss', arm, '16', c) for c in ('8', '24')} <= measured
    assert {arm for step, arm, *_ in measured if step == 'toy'} >= {'centerloss_jax', 'training loop'}
    assert 'centerloss_jax' in {arm for step, arm, *_ in measured if step == 'toy, 28 x 28'}
    assert all(
        0 < float(row['low_seconds']) <= float(row['step_seconds']) <= float(row['high_seconds']) for row in rows
    )
    with Image.open(out / 'benchmark.png') as picture:
        assert picture.width > 500
    shown = capsys.readouterr().out
    assert 'GB/s' in shown
    assert 'PyTorch' in shown


@pytest.mark.parametrize(
    'settings',
    [{'classes': ()}, {'batch_sizes': (0,)}, {'rounds': 0}, {'feature_dim': -1}, {'sampled_share': 1.1}],
    ids=str,
)
def test_wrong_sizes_are_named(settings):
    with pytest.raises(FlagError, match='--' + next(iter(settings)).replace('_', '-')):
        benchmark.Config(**settings)


@pytest.mark.parametrize('settings', [{'parallel': 'pmap'}, {'mesh': 'data=8'}, {'distributed': True}], ids=str)
def test_a_classifier_on_several_devices_is_refused(settings):
    with pytest.raises(FlagError, match='--step classifier runs on one device'):
        benchmark.Config(step='classifier', **settings)
