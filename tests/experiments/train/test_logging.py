"""What a run shows on its way and at its end is whole on a narrow terminal too."""

import io

import pytest
from rich.console import Console

from experiments import toy2d
from experiments.train.logging import Progress
from experiments.train.step import Metrics


@pytest.mark.parametrize('width', [60, 80, 90, 120])
@pytest.mark.parametrize('arm', ['softmax', 'center-3'])
def test_a_line_has_the_arm_the_share_done_loss_accuracy_rate_and_time_left(width, arm):
    console = Console(file=io.StringIO(), width=width)
    with Progress(console) as progress:
        progress.start(arm, 900)
        progress.report(0, 900, Metrics(0.833, 16.548, 0.66, 0, 0, 0), 1341)
    (line,) = console.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]  # it is a StringIO
    assert '…' not in line
    for part in (arm, '100%', 'loss 0.833', '66%', '1341 steps/s', '00:00'):
        assert part in line


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
