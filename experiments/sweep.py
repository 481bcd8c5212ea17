"""Sweeps the weight of the center loss, the step size of the centers and the seed, as in the paper's Fig. 3 and Fig. 5.

Each cell of the grid trains one network on some classes and evaluates it on these and on the held-out classes. Cells
run in parallel, one process per CPU core, or one after the other on the devices that the flags select. config.json,
sweep.csv, summary.json, accuracy.png (Fig. 5), weights.png (Fig. 3, in two dimensions) and report.html are written to
--out. After an interruption, --resume runs the missing cells.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from experiments.launch import cli
from experiments.launch.atomic_files import write_table
from experiments.launch.errors import FlagError
from experiments.launch.flags import NETWORKS, DeviceFlags, Folder, HeldOut, check_alpha, check_weight

if TYPE_CHECKING:
    from experiments.data.load import Dataset
    from experiments.data.open_set import OpenSet
    from experiments.launch.mesh import Devices
    from experiments.launch.run_folder import Run
    from experiments.train.grid import Cell

_TABLE, ACCURACY, WEIGHTS = 'sweep.csv', 'accuracy.png', 'weights.png'

# Pictures of several weights use the alpha that is closest to this one.
DEFAULT_ALPHA = 0.5

# Measures in accuracy.png, with their labels.
DRAWN = {
    'verification_accuracy': 'verification accuracy',
    'unknown_auroc': 'AUROC of unknown classes',
    'intra_inter_ratio': 'intra/inter ratio, known classes',
}


@dataclasses.dataclass(frozen=True)
class Grid(HeldOut):
    """The weights, step sizes and seeds of a sweep."""

    out: Folder = Path('runs/sweep')
    """folder for the files of the sweep"""
    resume: bool = False
    """continue the sweep in --out, or start it; --weights, --alphas and --seeds may change"""
    feature_dim: int = 64
    """number of feature dimensions; weights.png always has 2"""
    weights: tuple[float, ...] = (0.001, 0.01, 0.1, 1.0)
    """weights lambda of the center loss; softmax alone is always trained too"""
    alphas: tuple[float, ...] = (0.01, 0.1, 0.5, 1.0)
    """step sizes alpha of the centers (Eq. 4)"""

    def __post_init__(self):
        super().__post_init__()
        for name in ('weights', 'alphas'):
            object.__setattr__(self, name, tuple(map(float, dict.fromkeys(getattr(self, name)))))
        for weight in self.weights:
            check_weight(weight, '--weights')
        for alpha in self.alphas:
            check_alpha(alpha, '--alphas')
        if not self.weights or not self.alphas:
            raise FlagError('--weights and --alphas must name one value or more')
        if self.model not in NETWORKS:
            raise FlagError(f'--model of a sweep must be {" or ".join(NETWORKS)}, got {self.model}')


@dataclasses.dataclass(frozen=True)
class Config(DeviceFlags, Grid):
    """Settings of a sweep, saved in its config.json."""

    PROGRAM: ClassVar[str] = 'experiments.sweep'
    FREE: ClassVar[tuple[str, ...]] = (
        'out',
        'data_dir',
        'dataset',
        'skip_unreadable',
        'overwrite',
        'resume',
        'weights',
        'alphas',
        'seeds',
        'workers',
        *(field.name for field in dataclasses.fields(DeviceFlags)),
    )

    parallel: Literal['auto', 'pmap', 'none'] = 'auto'
    """auto trains a cell per CPU core, or with --mesh or processes each cell on all devices; none uses one device"""
    workers: int = 0
    """number of processes, each on a CPU core; 0 is one for each core"""

    def __post_init__(self):
        DeviceFlags.__post_init__(self)
        Grid.__post_init__(self)
        if self.workers < 0:
            raise FlagError(f'--workers must be 0 or more, got {self.workers}')
        if self.workers and not self.on_cores:
            raise FlagError('--workers are processes on CPU cores; pass no flag that selects other devices')

    @property
    def on_cores(self) -> bool:
        """Whether cells run on CPU cores, because no flag selects other devices."""
        return self.parallel == 'auto' and not (self.mesh or self.distributed or self.coordinator)

    @property
    def shown_alpha(self) -> float:
        return min(self.alphas, key=lambda alpha: abs(alpha - DEFAULT_ALPHA))


def main(config: Config) -> None:
    import jax

    from experiments.data.load import load
    from experiments.data.open_set import divide
    from experiments.launch import output, processes
    from experiments.launch.mesh import choose
    from experiments.launch.run_folder import CELLS, SUMMARY, Run, environment, format_environment

    if config.on_cores:  # before JAX initializes a backend, so that no accelerator is reserved
        jax.config.update('jax_platforms', 'cpu')
    console = output.console()
    devices = choose('none') if config.on_cores else config.start()
    surroundings = environment(devices)
    console.print(format_environment(surroundings), highlight=False, soft_wrap=True)
    run = Run(config.out, overwrite=config.overwrite, resume=config.resume)
    wanted = {name: getattr(config, name) for name in ('dataset', 'weights', 'alphas', 'seeds')}
    if run.finished({**config.decisive(), **wanted}, (_TABLE, SUMMARY, ACCURACY, WEIGHTS)):
        console.print(f'the sweep is finished; see {run.out / "report.html"}', highlight=False, soft_wrap=True)
        return
    data = load(config.dataset, config.data_dir, config.image_size, config.skip_unreadable)
    open_set = divide(data, config.held_out)
    for note in (data.overview, *data.notes, *open_set.known.notes):
        console.print(note, highlight=False, soft_wrap=True)
    for note in config.check_data(open_set.known.train):
        console.print(note, highlight=False, soft_wrap=True)
    facts = {'num_classes': open_set.known.num_classes, 'train_examples': len(open_set.known.train)}
    if run.resumed:
        run.check({**config.decisive(), **facts})
        run.check_data(config.dataset, open_set.known.identity)
    run.start({**dataclasses.asdict(config), **facts, **surroundings}, open_set.known.identity)
    folder = run.out / CELLS
    folder.mkdir(exist_ok=True)

    cells = cells_of(config)
    train_cells(config, cells, open_set, folder, devices, console)
    if not processes.is_main_process():
        return
    rows = complete([cell.read(folder) for cell in cells])
    write_table(run.out / _TABLE, rows)
    summary = summarize(config, [row for row in rows if row['feature_dim'] == config.feature_dim])
    run.write_summary(summary)
    _draw(config, open_set.known, summary, run)
    console.print(f'wrote {run.out / "report.html"}', highlight=False, soft_wrap=True)


def cells_of(config: Config) -> list['Cell']:
    """Returns the cells of weights.png, then those of the grid and of softmax alone."""
    from experiments.train.grid import Cell

    seeds = range(config.seed, config.seed + config.seeds)
    # At weight 0 the centers do not affect the network, so one alpha is enough.
    pairs = [(0.0, config.shown_alpha), *((weight, alpha) for alpha in config.alphas for weight in config.weights)]
    grid = [Cell(weight, alpha, seed, config.feature_dim) for weight, alpha in pairs for seed in seeds]
    return list(dict.fromkeys([*two_dimensional(config), *grid]))


def two_dimensional(config: Config) -> list['Cell']:
    """Returns the cells of weights.png."""
    from experiments.train.grid import Cell

    return [Cell(weight, config.shown_alpha, config.seed, 2) for weight in sorted({0.0, *config.weights})]


def train_cells(
    config: Config, cells: Sequence['Cell'], open_set: 'OpenSet', folder: Path, devices: 'Devices', console: Console
) -> None:
    """Trains the cells that have no file yet, or a damaged one."""
    import jax

    from experiments.launch import processes
    from experiments.launch.stopping import Stop
    from experiments.train.grid import Task, work_on_cores, work_on_devices

    done = processes.largest(*(cell.done(folder) for cell in cells))
    missing = [cell for cell, is_done in zip(cells, done, strict=True) if not is_done]
    for damaged in (path for cell in missing if (path := cell.path(folder)).exists()):
        console.print(f'{damaged} is damaged; its cell runs again', highlight=False, soft_wrap=True)
    if len(missing) < len(cells):
        console.print(f'{len(cells) - len(missing)} of {len(cells)} cells are done already', highlight=False)
    task = Task(config, config.similarity, folder)
    available = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    workers = max(1, min(config.workers or available, len(missing))) if config.on_cores else jax.process_count()
    work = partial(work_on_cores, workers=workers) if config.on_cores else partial(work_on_devices, devices=devices)
    resume = dataclasses.replace(config, resume=True, overwrite=False).command()
    columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn('cells, {task.fields[last]}'))
    times = TimeElapsedColumn(), TextColumn('left'), TimeRemainingColumn()
    progress = Progress(*columns, *times, console=console, disable=not console.is_terminal)
    with progress as bar, Stop(resume) as stop:
        shown = bar.add_task(
            '',
            total=len(cells),
            completed=len(cells) - len(missing),
            last='1 process' if workers == 1 else f'{workers} processes',
        )
        for number, cell in enumerate(work(task, missing, open_set, stop=stop), start=len(cells) - len(missing) + 1):
            last = f'weight {cell.center_weight:g}, alpha {cell.alpha:g}, seed {cell.seed}'
            bar.update(shown, advance=1, last=last)
            if not console.is_terminal:
                console.print(f'{number} of {len(cells)} cells are done: {last}', highlight=False, soft_wrap=True)


def complete(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns rows with the same columns, NaN where a cell of an earlier version lacks a measure."""
    missing = dict.fromkeys((key for row in rows for key in row), float('nan'))
    return [{**missing, **row} for row in rows]


def summarize(config: Config, rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the interval of each measure for each pair of weight and alpha."""
    from experiments.metrics.held_out import intervals
    from experiments.train.grid import Cell

    keys = [key for key, value in rows[0].items() if isinstance(value, float) and key not in Cell._fields]
    groups: dict[tuple[float, float], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row['center_weight'], row['alpha']), []).append(row)
    return {
        name(*pair): {**intervals(seeds, keys), 'collapsed': any(row['collapsed'] for row in seeds)}
        for pair, seeds in groups.items()
    }


def name(weight: float, alpha: float) -> str:
    """Returns the name of a pair in summary.json."""
    return f'weight {weight:g}, alpha {alpha:g}' if weight else 'softmax'


def _draw(config: Config, known: 'Dataset', summary: Mapping[str, Any], run: 'Run') -> None:
    """Draws the figures and writes the report."""
    from experiments.launch.run_folder import CELLS
    from experiments.plots.curves import draw_sweep
    from experiments.plots.features import draw_features
    from experiments.plots.measures import seeds_note
    from experiments.plots.panel import legend
    from experiments.plots.report import write_report
    from experiments.train.snapshots import load_snapshot

    pairs = [(weight, alpha) for weight in config.weights if weight for alpha in config.alphas]
    measures = {label: {pair: summary[name(*pair)][measure] for pair in pairs} for measure, label in DRAWN.items()}
    softmax = {label: summary['softmax'][measure] for measure, label in DRAWN.items()}
    title = f'{known.name}, {known.num_classes} known classes'
    draw_sweep(run.out / ACCURACY, measures, softmax, config.seeds, title=f'{title}, the others held out')
    arms = {}
    for cell in two_dimensional(config):
        arms[f'weight {cell.center_weight:g}'] = load_snapshot(cell.path(run.out / CELLS).with_suffix('.npz'))
    title = f'{title}, alpha {config.shown_alpha:g}'
    draw_features(run.out / WEIGHTS, arms, known.class_names, title=title, kind=known.kind)
    columns = {'softmax': summary['softmax']}
    columns |= {f'weight {weight:g}': summary[name(weight, config.shown_alpha)] for weight in config.weights if weight}
    write_report(
        run.out / 'report.html',
        title=f'Weight of the center loss and step size of the centers: {title}',
        lead=f'At alpha {config.shown_alpha:g}; summary.json has the other alphas too. {seeds_note(config.seeds)}'
        + legend(known.class_names),
        summary=columns,
        metrics=(),
        pictures={
            'Measures against the weight and alpha, beside softmax alone in grey': run.out / ACCURACY,
            'Two-dimensional features for each weight': run.out / WEIGHTS,
        },
        config=run.config(),
        command=config.command(),
    )


if __name__ == '__main__':
    cli.main(Config, main, prog=Config.PROGRAM)
