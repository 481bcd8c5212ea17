"""The open set: pairs of classes that were never trained on are verified, with softmax alone and with center loss.

Trains both arms on some classes of a dataset, from several seeds, and then asks of the held-out classes which pairs are
alike, and how well the distance to the nearest center tells that their examples belong to no known class. Writes
config.json, metrics.csv, verification.csv, summary.json, roc.png and report.html to --out. A run that was stopped or
killed goes on with --resume, from its last save.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from flax.training.train_state import TrainState
from rich.table import Column, Table

from experiments.data.open_set import OpenSet, divide
from experiments.launch import cli, processes
from experiments.launch.atomic_files import write_table
from experiments.launch.errors import FlagError
from experiments.launch.flags import Folder, Settings
from experiments.plots.curves import draw_roc
from experiments.plots.report import MEASURES, write_report
from experiments.train.evaluate import evaluate, judge
from experiments.train.loop import Arm, Job
from experiments.train.metrics import Interval, Roc, intervals
from experiments.train.thresholds import write_known

_TABLE, _PICTURE = 'verification.csv', 'roc.png'


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """Settings of a run. They are saved with it."""

    PROGRAM: ClassVar[str] = 'experiments.verification'

    out: Folder = Path('runs/verification')
    """folder for the files of the run"""
    feature_dim: int = 64
    """number of feature dimensions"""
    seed: int = 0
    """first random seed of the initialization and of the order of the examples"""
    seeds: int = 5
    """number of seeds; both arms are trained with each"""
    held_out: str = ''
    """classes to verify: 7-9, or 0,4-6, or a fraction such as 0.3; default: classes only in the test split, or 0.3"""
    similarity: Literal['cosine', 'euclidean'] = 'cosine'
    """similarity of a pair: the cosine, as in the paper, or the Euclidean distance"""

    def __post_init__(self):
        super().__post_init__()
        if self.seeds < 1:
            raise FlagError(f'--seeds must be at least 1, got {self.seeds}')


def main(config: Config) -> None:
    job = Job(config)
    if job.finished(_TABLE, _PICTURE):
        return
    open_set = divide(job.load(), config.held_out)
    for note in open_set.known.notes:
        job.tell(note)
    job.start(open_set.known)
    arms = {
        f'{name}-{seed}': (name, Arm(f'{name}-{seed}', weight, seed))
        for seed in range(config.seed, config.seed + config.seeds)
        for name, weight in (('softmax', 0.0), ('center', config.center_weight))
    }

    def look(arm: Arm, epoch: int, state: TrainState) -> dict[str, float]:
        return evaluate(state, open_set.known.test, job.devices).measures()

    def finish(arm: Arm, state: TrainState) -> tuple[dict[str, Any], Roc, float]:
        values, roc, reach = judge(state, open_set, config.similarity, job.devices)
        return {**values, 'train_seconds': job.seconds(arm)}, roc, reach

    results = job.train([arm for _, arm in arms.values()], look, finish)
    rows, rocs, reach = [], {'softmax': [], 'center': []}, {}
    for full_name, (name, arm) in arms.items():
        values, roc, reach[full_name] = results[full_name]
        rows.append({'arm': name, 'seed': arm.seed, **values})
        rocs[name].append(roc)
    summary = compare(rows)
    job.run.write_summary(summary)
    job.console.print(interval_table(summary))
    if processes.is_main_process():
        write_table(job.run.out / _TABLE, rows)
        write_known(job.run.out, open_set.known.class_names, reach)
        _draw(config, job, open_set, rocs, summary)
    job.tell(f'{job.run.out / "report.html"} has the pictures and all numbers')


def compare(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The interval of each measure for both arms, and for what the center loss adds to the softmax of the same seed."""
    softmax, center = ([row for row in rows if row['arm'] == arm] for arm in ('softmax', 'center'))
    keys = [key for key, value in rows[0].items() if isinstance(value, float)]
    added = [{key: own[key] - other[key] for key in keys} for own, other in zip(center, softmax, strict=True)]
    summary: dict[str, dict[str, Any]] = {
        'softmax': intervals(softmax, keys),
        'center': intervals(center, keys),
        'center - softmax': intervals(added, keys),
    }
    for arm, own in (('softmax', softmax), ('center', center)):
        summary[arm]['collapsed'] = any(row['collapsed'] for row in own)
    return summary


def interval_table(summary: Mapping[str, Mapping[str, Any]]) -> Table:
    """The results as a terminal shows them: mean and half of the 95 % interval."""
    rows = Table('', *(Column(arm, justify='right') for arm in summary))
    for key, value in summary['softmax'].items():
        if isinstance(value, Interval):
            name = MEASURES[key][0] if key in MEASURES else key.replace('_', ' ')
            rows.add_row(name, *(f'{arm[key].mean:.4f} ± {arm[key].half_width:.4f}' for arm in summary.values()))
    return rows


def mean_rows(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of metrics, of arms such as `center-3`, as their means over the seeds."""
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in metrics:
        groups.setdefault((row['arm'].rpartition('-')[0], row['epoch']), []).append(row)
    return [
        {'epoch': epoch, 'arm': arm, **{key: float(np.mean([row[key] for row in rows])) for key in [*rows[0]][2:]}}
        for (arm, epoch), rows in groups.items()
    ]


def _draw(
    config: Config, job: Job, open_set: OpenSet, rocs: Mapping[str, list[Roc]], summary: Mapping[str, Any]
) -> None:
    """Draws the curves and writes the page."""
    out = job.run.out
    names = {'softmax': 'softmax alone', 'center': f'with center loss, weight {config.center_weight:g}'}
    labelled = {f'{names[arm]} (AUC {summary[arm]["auc"].mean:.3f})': curves for arm, curves in rocs.items()}
    title = f'{open_set.known.name}, {len(set(open_set.unknown.labels.tolist()))} held-out classes'
    draw_roc(out / _PICTURE, labelled, title=f'Pairs of {title}')
    seeds = f'{config.seeds} seeds' if config.seeds > 1 else 'one seed'
    write_report(
        out / 'report.html',
        title=f'Verification of classes that were not trained on: {title}',
        lead=f'Means over {seeds} with their 95 % intervals. The last column is the difference within a seed: '
        'the center loss changes a measure if its interval leaves out 0.',
        summary=summary,
        metrics=mean_rows(job.run.metrics()),
        pictures={'Which share of like pairs is accepted at which share of unlike ones': out / _PICTURE},
        config=job.run.config(),
        command=config.command(),
    )


if __name__ == '__main__':
    cli.main(Config, main, prog=Config.PROGRAM)
