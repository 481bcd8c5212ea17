"""What a run tells while it trains: a progress bar, TensorBoard's event files, and a trace of a few steps.

The bar shows loss, accuracy, step rate and the time left; a narrow terminal has no bar. The event files are written
without TensorFlow. The trace is for TensorBoard's profiler, Perfetto or XProf.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from tensorboardX import SummaryWriter

from experiments.train.step import Metrics

# Columns that a line with everything takes.
WIDE = 90

# The first steps that are traced come behind some that compile and fill caches.
WARM_UP, TRACED = 5, 5


class Progress:
    """A rich progress bar for one arm after the other. Use it in a `with` statement."""

    def __init__(self, console: Console):
        self._wide = console.width >= WIDE
        self._bars = RichProgress(
            TextColumn('{task.description}'),
            *([BarColumn(bar_width=8)] if self._wide else []),
            TaskProgressColumn(),
            TextColumn('{task.fields[numbers]}'),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=console,
        )

    def __enter__(self) -> 'Progress':
        self._bars.start()
        return self

    def __exit__(self, *_) -> None:
        self._bars.stop()

    def start(self, arm: str, steps: int, done: int = 0) -> None:
        self._task = self._bars.add_task(arm, total=steps, completed=done, numbers='')

    def report(self, before: int, done: int, metrics: Metrics, steps_per_second: float) -> None:
        """Shows that `done` steps of an epoch are done, and `before` it began that many."""
        loss, right = f'loss {metrics.softmax_loss:.3f}', f'{metrics.train_accuracy:.0%}'
        if self._wide:
            loss, right = f'{loss}, center {metrics.center_loss:.3f}', f'accuracy {right}'
        else:
            right = f'{right} right'
        numbers = f'{loss}, {right}, {steps_per_second:.0f} steps/s'
        self._bars.update(self._task, completed=before + done, numbers=numbers)


class Scalars:
    """The event files of one arm. They begin with the rows that there are, in place of earlier files."""

    def __init__(self, folder: Path, rows: Iterable[Mapping[str, Any]]):
        # An event file cannot lose its last entries, which a resumed run repeats: it is written again.
        shutil.rmtree(folder, ignore_errors=True)
        self._writer = SummaryWriter(str(folder))
        for row in rows:
            self.add(row)

    def add(self, row: Mapping[str, Any]) -> None:
        """Writes each number of a row that has an epoch."""
        for name, value in row.items():
            if name != 'epoch' and isinstance(value, int | float):
                self._writer.add_scalar(name, value, int(row['epoch']))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


@contextmanager
def traced(step: Callable, folder: Path) -> Iterator[Callable]:
    """A training step whose calls after the warm-up are traced into the folder, a few of them."""
    calls = 0
    tracing = False

    def stop(result: Any = None) -> None:
        nonlocal tracing
        jax.block_until_ready(result)  # steps run behind their calls
        jax.profiler.stop_trace()
        tracing = False

    def call(*args):
        nonlocal calls, tracing
        if calls == WARM_UP:
            jax.block_until_ready(args)
            jax.profiler.start_trace(folder)
            tracing = True
        calls += 1
        result = step(*args)
        if tracing and calls == WARM_UP + TRACED:
            stop(result)
        return result

    try:
        yield call
    finally:
        if tracing:
            stop()
