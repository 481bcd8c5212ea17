"""What a run shows on its way and at its end: on a terminal, however narrow, and in a log."""

import io

import numpy as np
import pytest
from rich.console import Console

from experiments import toy2d
from experiments.data.batches import steps_of, train_batches
from experiments.data.load import load
from experiments.launch.mesh import choose
from experiments.train.logging import Progress
from experiments.train.loop import compile_ahead, train_epoch
from experiments.train.model import Classifier
from experiments.train.step import Metrics, create_state, train_step

ROW = {
    'epoch': 1,
    'arm': 'center',
    'softmax_loss': 0.833,
    'center_loss': 16.548,
    'train_accuracy': 0.66,
    'test_accuracy': 0.651,
    'steps_per_second': 90.2,
}


@pytest.mark.parametrize('width', [60, 80, 90, 120])
@pytest.mark.parametrize('arm', ['softmax', 'center-3'])
def test_a_line_has_the_arm_the_share_done_loss_accuracy_rate_and_time_left(width, arm):
    file = io.StringIO()
    with Progress(Console(file=file, width=width, force_terminal=True, color_system=None)) as progress:
        progress.start(arm, 30, 30)
        progress.report(870, 30, Metrics(0.833, 16.548, 0.66, 0, 0, 0), 1341)
        progress.epoch(ROW)
    *_, line = (line for line in file.getvalue().splitlines() if 'steps/s' in line)
    assert '…' not in line
    for part in (arm, '100%', 'loss 0.833', '66%', '1341 steps/s', '00:00'):
        assert part in line


def test_a_log_has_a_line_for_each_epoch_and_nothing_else():
    file = io.StringIO()
    with Progress(Console(file=file, width=60)) as progress:
        progress.start('center', 30, 45)
        for epoch in (1, 2):
            progress.report(45 * (epoch - 1), 45, Metrics(0.8, 16.5, 0.66, 0, 0, 0), 1341)
            progress.epoch({**ROW, 'epoch': epoch})
    first, second = file.getvalue().splitlines()
    numbers = 'loss 0.833, center loss 16.548, accuracy 66.0%, test accuracy 65.1%, 90 steps/s'
    assert first == f'center, epoch 1 of 30: {numbers}'
    assert second == f'center, epoch 2 of 30: {numbers}'


def test_finished_steps_are_reported_at_the_rate_of_the_row_and_without_compilation(tmp_path):
    data, devices, size = load('digits', tmp_path), choose('none'), 64
    state = create_state(Classifier('small', 2, 10), data.image_shape, 0, 3e-3, 0.5, devices)
    traces, reports = [], []

    def traced_step(*args):
        traces.append(args)
        return train_step(*args)

    step, weight = devices.compile(traced_step), devices.place_state(np.float32(0.1))
    compile_ahead(step, state, data.train, size, weight, devices)
    assert len(traces) == 1
    steps, batches = steps_of(data.train, size), train_batches(data.train, size, 0)
    _, row = train_epoch(state, step, batches, steps, weight, devices, lambda *values: reports.append(values))
    assert len(traces) == 1
    done = [count for count, _, _ in reports]
    assert done == sorted(set(done))
    assert done[-1] == steps
    assert reports[-1][-1] == pytest.approx(row['steps_per_second'])


@pytest.mark.parametrize('width', [60, 80, 120])
def test_the_table_of_results_cuts_no_word(width):
    values = {'test_accuracy': 0.9, 'nearest_center_accuracy': 0.9, 'intra_inter_ratio': 0.1, 'train_seconds': 1221.0}
    console = Console(file=io.StringIO(), width=width)
    console.print(
        toy2d.summary_table({'softmax': {**values, 'collapsed': False}, 'center': {**values, 'collapsed': True}})
    )
    shown = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]  # it is a StringIO
    assert '…' not in shown
    assert all(word in shown for word in ('accuracy', 'intra/inter', 'seconds', '(collapsed)', '1221.0'))
