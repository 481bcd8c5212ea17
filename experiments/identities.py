"""Compares classifiers over many made identities, with and without center loss, on identities not trained on.

The data is made, not loaded: an identity is a random vector, an example a random network of it, of a nuisance and of
noise. So no disk limits the number of classes. Trains each softmax over all classes and over a sample of them, and
verifies and retrieves examples of unseen identities. config.json, identities.csv, summary.json, identities.png and
report.html are written to --out. After an interruption, --resume continues the run from its last save.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rich.progress import Progress
from rich.table import Column, Table

from experiments.launch import cli
from experiments.launch.atomic_files import write_table
from experiments.launch.errors import FlagError
from experiments.launch.flags import Folder, Resumable, check_run, check_weight, flag

if TYPE_CHECKING:
    from experiments.launch.run_folder import Run
    from experiments.train.identities import Trial

_TABLE, _PICTURE = 'identities.csv', 'identities.png'

_MEASURED = ('eer', 'tar_at_far_0.1', 'tar_at_far_0.01', 'tar_at_far_0.001', 'tar_at_far_0.0001', 'rank_1')
_DRAWN = ('eer', 'tar_at_far_0.001', 'rank_1')

# Ends the name of a difference between a weight and no weight in summary.json.
_DIFFERENCE = ' - 0'


@dataclasses.dataclass(frozen=True)
class Config(Resumable):
    """Settings of a run, saved in its config.json."""

    PROGRAM: ClassVar[str] = 'experiments.identities'
    FREE: ClassVar[tuple[str, ...]] = (
        *('out', 'overwrite', 'resume', 'save_every'),
        *('losses', 'sample_shares', 'center_weights', 'seeds'),
    )

    out: Folder = Path('runs/identities')
    """folder for the files of the run"""
    num_classes: int = 10_000
    """number of identities to train on"""
    losses: tuple[Literal['class', 'margin', 'distance'], ...] = ('class', 'margin', 'distance')
    """softmaxes: of inner products, of cosines with a margin, of squared distances"""
    sample_shares: tuple[float, ...] = (1.0, 0.1)
    """shares of the classes in the softmax of a step; 1 takes all classes"""
    center_weights: tuple[float, ...] = (0.0, 0.01)
    """weights lambda of the center loss; 0 trains without it"""
    steps: int = 1200
    """number of training steps of each network"""
    batch_size: int = 256
    """number of examples in a step"""
    feature_dim: int = 64
    """number of feature dimensions"""
    noise: float = 0.8
    """deviation of the noise in an example; without it the deviation is about 0.7"""
    unseen: int = 1000
    """number of identities to verify, five examples of each"""
    seed: int = 0
    """first random seed of identities, examples and initialization"""
    seeds: int = 1
    """number of seeds to train with"""
    save_every: float = 60.0
    """seconds between saves; each network is always saved at its end"""
    overwrite: bool = False
    """delete the run in --out and start a new one"""
    resume: bool = False
    """continue the run in --out, or start it; losses, shares, weights and --seeds may change"""

    def __post_init__(self):
        for name in ('losses', 'sample_shares', 'center_weights'):
            if not getattr(self, name):
                raise FlagError(f'{flag(name)} must name one value or more')
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))
        self.check_at_least(1, 'steps', 'batch_size', 'feature_dim', 'seeds')
        self.check_at_least(2, 'num_classes', 'unseen')
        if self.num_classes >= 2**31:
            raise FlagError(f'--num-classes must be below 2**31, got {self.num_classes}')
        for name in ('noise', 'save_every'):
            if not getattr(self, name) >= 0:
                raise FlagError(f'{flag(name)} must be 0 or more, got {getattr(self, name)}')
        for weight in self.center_weights:
            check_weight(weight, '--center-weights')
        fewest = min(self.batch_size, self.num_classes)
        for share in self.sample_shares:
            if not (0 < share <= 1 and round(share * self.num_classes) >= fewest):
                raise FlagError(
                    f'--sample-shares must be at most 1, and a sample must have the {fewest} classes that a batch may '
                    f'have, got {share:g} of {self.num_classes} classes'
                )
        check_run(self.seed, self.resume, self.overwrite)


def main(config: Config) -> None:
    from experiments.launch import output
    from experiments.launch.mesh import choose
    from experiments.launch.run_folder import CHECKPOINTS, SUMMARY, Run, environment, format_environment
    from experiments.launch.stopping import Stop
    from experiments.train.checkpoint import Checkpoints
    from experiments.train.identities import LAYERS, Setup, train_trial

    console, devices = output.console(), choose('none')
    tell = partial(console.print, highlight=False, soft_wrap=True)
    surroundings = environment(devices)
    tell(format_environment(surroundings))
    run = Run(config.out, overwrite=config.overwrite, resume=config.resume)
    wanted = {name: getattr(config, name) for name in ('losses', 'sample_shares', 'center_weights', 'seeds')}
    if run.finished({**config.decisive(), **wanted}, (_TABLE, SUMMARY, _PICTURE)):
        tell(f'the run is finished; see {run.out / "report.html"}')
        return
    if run.resumed:
        run.check(config.decisive())
    run.start({**dataclasses.asdict(config), 'model': f'MLP {LAYERS}', **surroundings}, {})

    setup = Setup(**{name: getattr(config, name) for name in Setup._fields})
    trials, rows = trials_of(config), []
    resume = dataclasses.replace(config, resume=True, overwrite=False).command()
    with Progress(console=console, disable=not console.is_terminal) as progress, Stop(resume) as stop:
        for number, trial in enumerate(trials, start=1):
            task = progress.add_task(trial.name, total=config.steps)
            report = partial(progress.update, task)
            folder, saved_as = run.out / CHECKPOINTS / trial.name, {'arm': trial.name, 'seed': trial.seed}
            with Checkpoints(folder, config.save_every, stop, devices, **saved_as) as saves:
                rows.append(row := train_trial(trial, setup, saves, devices, tell, report))
            progress.remove_task(task)
            tell(f'{number} of {len(trials)}, {trial.name}: EER {row["eer"]:.4f}, rank-1 {row["rank_1"]:.3f}')
    write_table(run.out / _TABLE, rows)
    summary = summarize_trials(rows)
    run.write_summary(summary)
    console.print(unseen_table(summary))
    _draw(config, run, rows, summary)
    tell(f'wrote {run.out / "report.html"}')


def trials_of(config: Config) -> list['Trial']:
    """Returns the networks to train, seed by seed."""
    from experiments.train.identities import Trial

    seeds = range(config.seed, config.seed + config.seeds)
    forms = itertools.product(config.losses, config.sample_shares, config.center_weights)
    return [Trial(*form, seed) for seed, form in itertools.product(seeds, list(forms))]


def classifier_name(row: Mapping[str, Any]) -> str:
    """Returns the name of a softmax and its sample."""
    share = row['sample_share']
    return f'{row["loss"]}, {"all" if share == 1 else format(share, "g")}'


def summarize_trials(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the intervals of each network over the seeds, and of the differences that a weight makes in a seed."""
    from experiments.metrics.held_out import intervals

    groups: dict[str, dict[float, list[Mapping[str, Any]]]] = {}
    for row in rows:
        groups.setdefault(classifier_name(row), {}).setdefault(row['center_weight'], []).append(row)
    summary = {}
    for name, weights in groups.items():
        for weight, seeds in weights.items():
            summary[f'{name}, weight {weight:g}'] = intervals(seeds, _MEASURED)
        for weight in filter(None, weights) if 0 in weights else ():
            pairs = zip(weights[weight], weights[0], strict=True)
            changes = [{key: new[key] - old[key] for key in _MEASURED} for new, old in pairs]
            summary[f'{name}, weight {weight:g}{_DIFFERENCE}'] = intervals(changes, _MEASURED)
    return summary


def unseen_table(summary: Mapping[str, Mapping[str, Any]]) -> Table:
    """Returns the results as a table for a terminal."""
    from experiments.plots.measures import format_value, measure_name

    table = Table('', *(Column(measure_name(key), justify='right') for key in _DRAWN))
    for name, values in summary.items():
        table.add_row(name, *(format_value(values[key], key, difference=name.endswith(_DIFFERENCE)) for key in _DRAWN))
    return table


def _draw(config: Config, run: 'Run', rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> None:
    """Draws the figure and writes the report."""
    from experiments.plots.curves import draw_points
    from experiments.plots.measures import measure_name, seeds_note
    from experiments.plots.report import write_report

    names = dict.fromkeys(map(classifier_name, rows))
    weights = [f'weight {weight:g}' for weight in config.center_weights]

    def panels(ending: str) -> dict[str, dict[str, dict[str, Any]]]:
        """Returns the intervals by measure, softmax and weight, without those that the summary lacks."""
        keys = {
            name: {w: f'{name}, {w}{ending}' for w in weights if f'{name}, {w}{ending}' in summary} for name in names
        }
        measures = _DRAWN if any(keys.values()) else ()
        return {
            measure_name(measure): {
                name: {w: summary[key][measure] for w, key in row.items()} for name, row in keys.items()
            }
            for measure in measures
        }

    title = f'{config.num_classes} made identities, {config.unseen} others verified'
    caption = (
        'The data is made. Each point is a network trained with one weight of the center loss, over all classes in '
        'each step or over a share.\nA change is the difference to weight 0 within a seed.'
    )
    draw_points(run.out / _PICTURE, panels(''), panels(_DIFFERENCE), config.seeds, title=title, caption=caption)
    lead = (
        'The data is made, not loaded: an identity is a random vector, an example a random network of it, of a '
        'nuisance and of noise. A softmax is over all classes in each step, or over a share of them. '
        f'{seeds_note(config.seeds)} A row that ends in - 0 is the difference to weight 0 within a seed'
    )
    write_report(
        run.out / 'report.html',
        title=title,
        lead=lead + (': the center loss changes a measure if this interval excludes 0.' if config.seeds > 1 else '.'),
        summary=summary,
        metrics=(),
        pictures={'Error, true accepts and retrieval of unseen identities, by softmax and weight': run.out / _PICTURE},
        config=run.config(),
        command=config.command(),
        differences=[name for name in summary if name.endswith(_DIFFERENCE)],
    )


if __name__ == '__main__':
    cli.main(Config, main, prog=Config.PROGRAM)
