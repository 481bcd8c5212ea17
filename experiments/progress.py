"""A bar an arm: loss, accuracy, step rate and the time left while a run trains. A narrow terminal has no bar."""

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from experiments.training import Metrics

# Columns that a line with everything takes.
WIDE = 90


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
