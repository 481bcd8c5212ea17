"""The output of a run during training: its progress, TensorBoard's event files, and a profile of a few steps.

A terminal shows a progress line with loss, accuracy, steps per second and the remaining time, and a bar if it is wide.
A log gets a line for each epoch instead. The event files do not need TensorFlow. The profile can be opened in
TensorBoard's profiler, Perfetto or XProf.
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

# Columns of a terminal that has room for the bar and the center loss.
WIDE = 90

# Steps before the profile, which compile and fill caches, and steps in it.
WARM_UP, TRACED = 5, 5


class Progress:
    """The progress of one arm after the other. Use it in a `with` statement."""

    def __init__(self, console: Console):
        self._console = console
        self._live = console.is_terminal or console.is_jupyter
        self._wide = console.width >= WIDE
        self._bars = RichProgress(
            TextColumn('{task.description}'),
            *([BarColumn(bar_width=8)] if self._wide else []),
            TaskProgressColumn(),
            TextColumn('{task.fields[numbers]}'),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=console,
            disable=not self._live,
        )

    def __enter__(self) -> 'Progress':
        self._bars.start()
        return self

    def __exit__(self, *_) -> None:
        self._bars.stop()

    def start(self, arm: str, epochs: int, steps: int, done: int = 0) -> None:
        """Starts an arm of `epochs` epochs of `steps` steps, `done` of which were taken before."""
        self._epochs = epochs
        self._task = self._bars.add_task(arm, total=epochs * steps, completed=done, numbers='')

    def report(self, before: int, done: int, metrics: Metrics, steps_per_second: float) -> None:
        """Shows `done` steps of an epoch that began after `before` steps, with the latest metrics."""
        loss, accuracy = f'loss {metrics.softmax_loss:.3f}', f'acc {metrics.train_accuracy:.0%}'
        if self._wide:
            loss, accuracy = f'{loss}, center {metrics.center_loss:.3f}', f'accuracy {metrics.train_accuracy:.0%}'
        numbers = f'{loss}, {accuracy}, {steps_per_second:.0f} steps/s'
        self._bars.update(self._task, completed=before + done, numbers=numbers)

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Prints a line for a finished epoch from its row of metrics, where no terminal shows the progress."""
        if self._live:
            return
        self._console.print(
            f'{row["arm"]}, epoch {row["epoch"]} of {self._epochs}: loss {row["softmax_loss"]:.3f}, center loss '
            f'{row["center_loss"]:.3f}, accuracy {row["train_accuracy"]:.1%}, '
            f'test accuracy {row["test_accuracy"]:.1%}, {row["steps_per_second"]:.0f} steps/s',
            highlight=False,
            soft_wrap=True,
        )


class Scalars:
    """The event files of one arm, rewritten with the rows that the run has so far."""

    def __init__(self, folder: Path, rows: Iterable[Mapping[str, Any]]):
        # Entries cannot be removed from an event file, and a resumed run repeats some epochs.
        shutil.rmtree(folder, ignore_errors=True)
        self._writer = SummaryWriter(str(folder))
        for row in rows:
            self.add(row)

    def add(self, row: Mapping[str, Any]) -> None:
        """Writes each number of a row at its epoch."""
        for name, value in row.items():
            if name != 'epoch' and isinstance(value, int | float):
                self._writer.add_scalar(name, value, int(row['epoch']))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


@contextmanager
def traced(step: Callable, folder: Path) -> Iterator[Callable]:
    """Wraps a training step, and writes a profile of a few calls after the warm-up to the folder."""
    calls = 0
    tracing = False

    def stop(result: Any = None) -> None:
        nonlocal tracing
        jax.block_until_ready(result)  # JAX dispatches steps asynchronously
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
