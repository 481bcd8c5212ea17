"""Evaluates features on classes that were held out of training, with softmax alone and with center loss.

Trains both arms from several seeds, verifies pairs of held-out examples, and retrieves each example's class among the
others. Also measures how well the distance to the nearest center separates known from unknown classes. config.json,
metrics.csv, verification.csv, summary.json, roc.png and report.html are written to --out. After an interruption,
--resume continues the run from its last save.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from rich.table import Column, Table

from experiments.launch import cli
from experiments.launch.atomic_files import write_table
from experiments.launch.flags import Folder, HeldOut, Settings

if TYPE_CHECKING:
    from experiments.data.open_set import OpenSet
    from experiments.metrics.held_out import Roc
    from experiments.train.loop import Job
    from experiments.train.step import TrainState

_TABLE, _PICTURE = 'verification.csv', 'roc.png'

# Name of the difference between both arms in summary.json.
DIFFERENCE = 'center - softmax'


@dataclasses.dataclass(frozen=True)
class Config(Settings, HeldOut):
    """Settings of a run, saved in its config.json."""

    PROGRAM: ClassVar[str] = 'experiments.verification'

    out: Folder = Path('runs/verification')
    """folder for the files of the run"""
    # Comparison has these fields too, and would decide their defaults.
    feature_dim: int = HeldOut.feature_dim
    """number of feature dimensions"""
    seed: int = HeldOut.seed
    """first random seed of the initialization and of the order of the examples"""


def main(config: Config) -> None:
    from experiments.data.open_set import divide
    from experiments.launch import processes
    from experiments.train.evaluate import evaluate, evaluate_open_set
    from experiments.train.loop import Arm, Job
    from experiments.train.thresholds import write_known

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

    def measure(arm: Arm, epoch: int, state: 'TrainState') -> dict[str, float]:
        return evaluate(state, open_set.known.test, job.devices).measures()

    def finish(arm: Arm, state: 'TrainState') -> tuple[dict[str, Any], 'Roc', float]:
        values, roc, threshold = evaluate_open_set(state, open_set, config.similarity, job.devices)
        return {**values, 'train_seconds': job.seconds(arm)}, roc, threshold

    results = job.train([arm for _, arm in arms.values()], measure, finish)
    rows, rocs, thresholds = [], {'softmax': [], 'center': []}, {}
    for full_name, (name, arm) in arms.items():
        values, roc, thresholds[full_name] = results[full_name]
        rows.append({'arm': name, 'seed': arm.seed, **values})
        rocs[name].append(roc)
    summary = compare(rows)
    job.run.write_summary(summary)
    job.console.print(interval_table(summary))
    if processes.is_main_process():
        write_table(job.run.out / _TABLE, rows)
        write_known(job.run.out, open_set.known.class_names, thresholds)
        _draw(config, job, open_set, rocs, summary)
    job.tell(f'wrote {job.run.out / "report.html"}')


def compare(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the interval of each measure for both arms, and for their difference within a seed."""
    from experiments.metrics.held_out import intervals

    softmax, center = ([row for row in rows if row['arm'] == arm] for arm in ('softmax', 'center'))
    keys = [key for key, value in rows[0].items() if isinstance(value, float)]
    differences = [{key: c[key] - s[key] for key in keys} for c, s in zip(center, softmax, strict=True)]
    summary: dict[str, dict[str, Any]] = {
        'softmax': intervals(softmax, keys),
        'center': intervals(center, keys),
        DIFFERENCE: intervals(differences, keys),
    }
    for arm, seeds in (('softmax', softmax), ('center', center)):
        summary[arm]['queries_left_out'] = seeds[0]['queries_left_out']  # seeds share the held-out examples
        summary[arm]['collapsed'] = any(row['collapsed'] for row in seeds)
    return summary


def interval_table(summary: Mapping[str, Mapping[str, Any]]) -> Table:
    """Returns a table for a terminal, with the mean of each measure and, of several seeds, half of its interval."""
    from experiments.metrics.held_out import Interval
    from experiments.plots.measures import format_value, measure_name

    table = Table('', *(Column(arm, justify='right') for arm in summary))
    for key, value in summary['softmax'].items():
        if isinstance(value, Interval):
            cells = (format_value(values[key], key, difference=arm == DIFFERENCE) for arm, values in summary.items())
            table.add_row(measure_name(key), *cells)
    return table


def mean_rows(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Averages rows of metrics over the seeds of an arm; arms are named `center-3` and so on."""
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in metrics:
        groups.setdefault((row['arm'].rpartition('-')[0], row['epoch']), []).append(row)
    return [
        {'epoch': epoch, 'arm': arm, **{key: float(np.mean([row[key] for row in rows])) for key in [*rows[0]][2:]}}
        for (arm, epoch), rows in groups.items()
    ]


def _draw(
    config: Config, job: 'Job', open_set: 'OpenSet', rocs: Mapping[str, list['Roc']], summary: Mapping[str, Any]
) -> None:
    """Draws the ROC curves and writes the report."""
    from experiments.plots.curves import draw_roc
    from experiments.plots.measures import seeds_note
    from experiments.plots.report import write_report

    out = job.run.out
    names = {'softmax': 'softmax alone', 'center': f'with center loss, weight {config.center_weight:g}'}
    labelled = {f'{names[arm]} (AUC {summary[arm]["auc"].mean:.3f})': curves for arm, curves in rocs.items()}
    title = f'{open_set.known.name}, {len(set(open_set.unknown.labels.tolist()))} held-out classes'
    draw_roc(out / _PICTURE, labelled, title=f'Pairs of {title}')
    lead = f'{seeds_note(config.seeds)} The last column is the difference within a seed'
    lead += ': the center loss changes a measure if this interval excludes 0.' if config.seeds > 1 else '.'
    write_report(
        out / 'report.html',
        title=f'Verification of held-out classes: {title}',
        lead=lead,
        summary=summary,
        metrics=mean_rows(job.run.metrics()),
        pictures={'ROC curve: pairs of one class are accepted rightly, pairs of two classes falsely': out / _PICTURE},
        config=job.run.config(),
        command=config.command(),
        differences=(DIFFERENCE,),
    )


if __name__ == '__main__':
    cli.main(Config, main, prog=Config.PROGRAM)
