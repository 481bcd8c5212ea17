"""The paper's toy: the same network with softmax alone and with center loss, and its 2-D features side by side.

Trains both arms from one seed, and writes config.json, metrics.csv, summary.json, features.png, features.gif and
report.html to --out. A run that was stopped or killed goes on with --resume, from its last save.
"""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

from flax.training.train_state import TrainState
from rich.table import Column, Table

from experiments.data.load import Dataset
from experiments.launch import cli, processes
from experiments.launch.flags import Folder, Settings
from experiments.launch.run_folder import SNAPSHOTS, Run
from experiments.plots.features import animate_features, draw_features
from experiments.plots.report import write_report
from experiments.train.evaluate import evaluate, sample, snapshot_of
from experiments.train.loop import Arm, Job
from experiments.train.snapshots import History, Snapshot
from experiments.train.thresholds import reach_of, write_known

COLUMNS = {
    'test_accuracy': 'test accuracy',
    'nearest_center_accuracy': 'nearest center',
    'intra_inter_ratio': 'intra/inter ratio',
    'train_seconds': 'seconds',
}


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """Settings of a run. They are saved with it."""

    PROGRAM: ClassVar[str] = 'experiments.toy2d'

    out: Folder = Path('runs/toy2d')
    """folder for the files of the run"""


def main(config: Config) -> None:
    job = Job(config)
    if job.finished('features.png', 'features.gif'):
        return
    data = job.load()
    job.start(data)
    arms = (Arm('softmax', 0.0, config.seed), Arm('center', config.center_weight, config.seed))
    histories = {arm.name: History(job.run.out / SNAPSHOTS, arm.name) for arm in arms}
    reach = {}

    def look(arm: Arm, epoch: int, state: TrainState) -> dict[str, float]:
        test = evaluate(state, data.test, job.devices)
        histories[arm.name].add(snapshot_of(epoch, state, test, data.num_classes))
        return test.measures()

    def finish(arm: Arm, state: TrainState) -> dict[str, Any]:
        history = histories[arm.name]
        history.read(config.epochs)
        train, test = (evaluate(state, split, job.devices) for split in (sample(data.train), data.test))
        history.snapshots[-1] = snapshot_of(config.epochs, state, test, data.num_classes, train)
        reach[arm.name] = reach_of(test.distances)
        return {**test.measures(), 'collapsed': test.collapsed(data.num_classes), 'train_seconds': job.seconds(arm)}

    summary = job.train(arms, look, finish)
    job.run.write_summary(summary)
    job.console.print(summary_table(summary))
    if processes.is_main_process():
        write_known(job.run.out, data.class_names, reach)
        _draw(config, data, {arm: history.snapshots for arm, history in histories.items()}, summary, job.run)
    job.tell(f'{job.run.out / "report.html"} has the pictures and all numbers')


def summary_table(summary: dict[str, dict[str, Any]]) -> Table:
    """The results as a terminal shows them."""
    # A word a line, so that a narrow terminal cuts none.
    rows = Table('arm', *(Column(name.replace(' ', '\n'), justify='right') for name in COLUMNS.values()))
    for arm, values in summary.items():
        shown = [f'{values[key]:.{digits}f}' for key, digits in zip(COLUMNS, (4, 4, 4, 1), strict=True)]
        rows.add_row(arm + ('\n(collapsed)' if values['collapsed'] else ''), *shown)
    return rows


def _draw(config: Config, data: Dataset, history: dict[str, list[Snapshot]], summary: dict[str, Any], run: Run) -> None:
    """Draws the pictures and writes the page."""
    arms = {'softmax': 'softmax alone', 'center': f'with center loss, weight {config.center_weight:g}'}
    named = {arms[arm]: snapshots for arm, snapshots in history.items()}
    epochs = 'one epoch' if config.epochs == 1 else f'{config.epochs} epochs'
    title = f'{data.name}, {config.model}, {epochs}, seed {config.seed}'
    picture, film = run.out / 'features.png', run.out / 'features.gif'
    last = {name: snapshots[-1] for name, snapshots in named.items()}
    draw_features(picture, last, data.class_names, title=title)
    animate_features(film, named, data.class_names, title=title)
    write_report(
        run.out / 'report.html',
        title=f'Softmax and center loss: {title}',
        lead='The same network from the same seed, trained by softmax alone and with center loss beside it.',
        summary=summary,
        metrics=run.metrics(),
        pictures={'Features of both arms at the end': picture, 'The test set through the epochs': film},
        config=run.config(),
        command=config.command(),
    )


if __name__ == '__main__':
    cli.main(Config, main, prog=Config.PROGRAM)
