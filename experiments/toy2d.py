"""Trains a network with softmax alone and with center loss, and draws its 2-D features, as in the paper's Fig. 2.

Both arms start from one seed. config.json, metrics.csv, summary.json, features.png, features.gif and report.html are
written to --out. After an interruption, --resume continues the run from its last save.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rich.table import Column, Table

from experiments.launch import cli
from experiments.launch.flags import Folder, Settings

if TYPE_CHECKING:
    from experiments.data.load import Dataset
    from experiments.launch.run_folder import Run
    from experiments.train.snapshots import Snapshot
    from experiments.train.step import TrainState

COLUMNS = {
    'test_accuracy': 'test accuracy',
    'nearest_center_accuracy': 'nearest center',
    'intra_inter_ratio': 'intra/inter ratio',
    'train_seconds': 'seconds',
}


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """Settings of a run, saved in its config.json."""

    PROGRAM: ClassVar[str] = 'experiments.toy2d'

    out: Folder = Path('runs/toy2d')
    """folder for the files of the run"""


def main(config: Config) -> None:
    from experiments.launch import processes
    from experiments.launch.run_folder import SNAPSHOTS
    from experiments.train.evaluate import evaluate, sample, snapshot_of
    from experiments.train.loop import Arm, Job
    from experiments.train.snapshots import History
    from experiments.train.thresholds import threshold_of, write_known

    job = Job(config)
    if job.finished('features.png', 'features.gif'):
        return
    data = job.load()
    job.start(data)
    arms = (Arm('softmax', 0.0, config.seed), Arm('center', config.center_weight, config.seed))
    histories = {arm.name: History(job.run.out / SNAPSHOTS, arm.name) for arm in arms}
    thresholds = {}

    def measure(arm: Arm, epoch: int, state: 'TrainState') -> dict[str, float]:
        test = evaluate(state, data.test, job.devices)
        histories[arm.name].add(snapshot_of(epoch, state, test, data.num_classes))
        return test.measures()

    def finish(arm: Arm, state: 'TrainState') -> dict[str, Any]:
        history = histories[arm.name]
        history.read(config.epochs, job.tell)
        train, test = (evaluate(state, split, job.devices) for split in (sample(data.train), data.test))
        history.snapshots[config.epochs] = snapshot_of(config.epochs, state, test, data.num_classes, train)
        thresholds[arm.name] = threshold_of(test.distances)
        return {**test.measures(), 'collapsed': test.collapsed(data.num_classes), 'train_seconds': job.seconds(arm)}

    summary = job.train(arms, measure, finish)
    job.run.write_summary(summary)
    job.console.print(summary_table(summary))
    if processes.is_main_process():
        write_known(job.run.out, data.class_names, thresholds)
        _draw(config, data, {arm: history.snapshots for arm, history in histories.items()}, summary, job.run)
    job.tell(f'wrote {job.run.out / "report.html"}')


def summary_table(summary: dict[str, dict[str, Any]]) -> Table:
    """Returns the results as a table for a terminal."""
    # One word per line, so that a narrow terminal cuts none.
    rows = Table('arm', *(Column(name.replace(' ', '\n'), justify='right') for name in COLUMNS.values()))
    for arm, values in summary.items():
        shown = [f'{values[key]:.{digits}f}' for key, digits in zip(COLUMNS, (4, 4, 4, 1), strict=True)]
        rows.add_row(arm + ('\n(collapsed)' if values['collapsed'] else ''), *shown)
    return rows


def _draw(
    config: Config, data: 'Dataset', history: dict[str, dict[int, 'Snapshot']], summary: dict[str, Any], run: 'Run'
) -> None:
    """Draws the figures and writes the report."""
    from experiments.plots.features import animate_features, draw_features
    from experiments.plots.panel import legend
    from experiments.plots.report import write_report

    names = {'softmax': 'softmax alone', 'center': f'with center loss, weight {config.center_weight:g}'}
    moments = sorted(set.intersection(*(set(snapshots) for snapshots in history.values())))
    snapshots = {names[arm]: [saved[epoch] for epoch in moments] for arm, saved in history.items()}
    epochs = 'one epoch' if config.epochs == 1 else f'{config.epochs} epochs'
    title = f'{data.name}, {config.model}, {epochs}, seed {config.seed}'
    figure, animation = run.out / 'features.png', run.out / 'features.gif'
    last = {name: epochs[-1] for name, epochs in snapshots.items()}
    draw_features(figure, last, data.class_names, title=title, kind=data.kind)
    animate_features(animation, snapshots, data.class_names, title=title, kind=data.kind)
    write_report(
        run.out / 'report.html',
        title=f'Softmax and center loss: {title}',
        lead='One network and one seed, trained with softmax alone and with softmax and center loss. The first learns '
        'classes apart in direction only, as rays; the second also draws each class together around its center.'
        + legend(data.class_names),
        summary=summary,
        metrics=run.metrics(),
        pictures={'Features after the last epoch': figure, 'Features of the test set over the epochs': animation},
        config=run.config(),
        command=config.command(),
    )


if __name__ == '__main__':
    cli.main(Config, main, prog=Config.PROGRAM)
