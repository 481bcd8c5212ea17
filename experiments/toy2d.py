"""The paper's toy: the same network with softmax alone and with center loss, and its 2-D features side by side.

Trains both arms from one seed, and writes config.json, metrics.csv, summary.json, features.png, features.gif and
report.html to --out. A run that was stopped or killed goes on with --resume, from its last save.
"""

import dataclasses
import math
import shlex
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import simple_parsing
from flax.training.train_state import TrainState
from rich.console import Console
from rich.table import Column, Table

from experiments import cli, figures, processes
from experiments.batches import train_batches
from experiments.checkpoints import RECIPE, Checkpoints, newest
from experiments.data import Dataset, LazySplit, Split, load
from experiments.devices import Devices
from experiments.evaluation import Evaluation, evaluate
from experiments.figures import Snapshot
from experiments.history import History
from experiments.models import Classifier
from experiments.profiling import traced
from experiments.progress import Progress
from experiments.report import write_report
from experiments.runs import CHECKPOINTS, PROFILE, SNAPSHOTS, TENSORBOARD, Run, RunError, environment, in_a_line
from experiments.scalars import Scalars
from experiments.stopping import Stop
from experiments.training import Tally, create_state, train_epoch, train_step
from experiments.where import Where

COLUMNS = {
    'test_accuracy': 'test accuracy',
    'nearest_center_accuracy': 'nearest center',
    'intra_inter_ratio': 'intra/inter ratio',
    'train_seconds': 'seconds',
}

# A picture needs no more points than these, however large the set is.
SHOWN = 4000


@dataclasses.dataclass(frozen=True)
class Config(Where):
    """Settings of a run. They are saved with it."""

    dataset: str = 'digits'
    """a TFDS name such as mnist, fashion_mnist or cifar10; digits, which needs no download; or a folder of images"""
    data_dir: Path | None = None
    """where prepared sets are and go; by default a folder in the user's cache"""
    out: Path = Path('runs/toy2d')
    """folder that the run is written to"""
    model: Literal['small', 'lenets++'] = 'small'
    """network: a small CNN, or the paper's LeNets++, which is slow on a CPU"""
    feature_dim: int = 2
    """number of feature dimensions; other than 2 they are drawn by a PCA"""
    epochs: int = 30
    """passes over the train set"""
    batch_size: int = 32
    """examples in a step, over all devices together"""
    learning_rate: float = 3e-3
    """of Adam, for the parameters; the centers have alpha"""
    center_weight: float = 0.1
    """weight lambda of the center loss in the center arm, 0 or more; the softmax arm has 0"""
    alpha: float = 0.5
    """step of the centers, Eq. 4, in [0, 1]"""
    seed: int = 0
    """of the initialization and of the order of the examples"""
    overwrite: bool = simple_parsing.field(default=False, action='store_true')
    """replace the run that --out holds"""
    resume: bool = simple_parsing.field(default=False, action='store_true')
    """go on with the run that --out holds, or start it; only --epochs may be another"""
    save_every: float = 60.0
    """seconds between saves; each arm is saved at its end in any case"""
    tensorboard: bool = simple_parsing.field(default=False, action='store_true')
    """write the metrics as TensorBoard event files too"""
    profile: bool = simple_parsing.field(default=False, action='store_true')
    """write a jax.profiler trace of a few steps after the first ones"""

    def __post_init__(self):
        super().__post_init__()
        for name in ('feature_dim', 'epochs', 'batch_size'):
            if getattr(self, name) < 1:
                raise ValueError(f'{_flag(name)} must be at least 1, got {getattr(self, name)}')
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f'--learning-rate must be a positive number, got {self.learning_rate}')
        if not 0 <= self.center_weight < math.inf:
            raise ValueError(f'--center-weight must be 0 or more, got {self.center_weight}')
        if not 0 <= self.alpha <= 1:
            raise ValueError(f'--alpha must be in [0, 1], got {self.alpha}')
        if not 0 <= self.seed < 2**32:
            raise ValueError(f'--seed must be in [0, 2**32), got {self.seed}')
        if not self.save_every >= 0:
            raise ValueError(f'--save-every must be 0 or more, got {self.save_every}')
        if self.resume and self.overwrite:
            raise ValueError('--resume goes on with a run and --overwrite replaces it; pass one of them')


def _flag(name: str) -> str:
    return '--' + name.replace('_', '-')


def main(config: Config) -> None:
    devices = config.start()
    console = Console(quiet=not processes.first())
    surroundings = environment(devices)
    tell = partial(console.print, highlight=False, soft_wrap=True)
    tell(in_a_line(surroundings))
    run = Run(config.out, overwrite=config.overwrite, resume=config.resume)
    if run.finished({**decisive(config), 'epochs': config.epochs}):
        tell(f'{run.out / "report.html"} has it all: the run is finished')
        return
    data = load(config.dataset, config.data_dir)
    for note in data.notes:
        tell(note)
    facts = {'num_classes': data.num_classes, 'image_shape': data.image_shape, 'train_examples': len(data.train)}
    if run.resumed:
        check_centers(run, config, data)
        run.check({**decisive(config), **facts})
        if newest(run.out / CHECKPOINTS) > config.epochs * steps_of(config, data):
            raise RunError(f'--epochs is {config.epochs}, but the run in {run.out} has been trained for more')
    run.start({**dataclasses.asdict(config), **facts, **surroundings})

    model = Classifier(config.model, config.feature_dim, data.num_classes)
    placed = create_state(model, data.image_shape, config.seed, config.learning_rate, config.alpha, devices)
    initial = devices.fetch(placed)
    step = devices.compile(train_step)
    history, summary = {}, {}
    go_on = command(dataclasses.replace(config, resume=True, overwrite=False))
    profile = traced(step, run.out / PROFILE) if config.profile and processes.first() else nullcontext(step)
    with Progress(console) as progress, Stop(go_on) as stop, profile as step:
        for arm, weight in (('softmax', 0.0), ('center', config.center_weight)):
            with Checkpoints(run.out / CHECKPOINTS / arm, config.save_every, stop, devices) as saves:
                history[arm], summary[arm] = train(
                    arm, weight, initial, config, data, devices, step, run, progress, saves, tell
                )
    run.write_summary(summary)
    console.print(table(summary))
    if processes.first():
        draw(config, data, history, summary, run)
    tell(f'{run.out / "report.html"} has the pictures and all numbers')


# Of a run that is resumed these may be others: they say how and where, but not what comes out. So may --epochs.
FREE = ('out', 'data_dir', 'epochs', 'overwrite', 'resume', 'save_every', 'tensorboard', 'profile')
FREE += tuple(field.name for field in dataclasses.fields(Where))


def decisive(config: Config) -> dict[str, Any]:
    """The settings that decide what comes out of an epoch."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE}


def steps_of(config: Config, data: Dataset) -> int:
    """Steps of an epoch."""
    return -(-len(data.train) // config.batch_size)


def check_centers(run: Run, config: Config, data: Dataset) -> None:
    """Raises RunError if the network or its centers would not be those of the run that is resumed."""
    saved = run.config()
    old = saved['model'], [saved.get('num_classes', data.num_classes), saved['feature_dim']]
    new = config.model, [data.num_classes, config.feature_dim]
    if old != new:
        raise RunError(
            f'the run in {run.out} has a network {old[0]} with centers {old[1]}, but here they are {new[0]} '
            f'and {new[1]} (classes, feature dimensions). {RECIPE}'
        )


def train(
    arm: str,
    center_weight: float,
    initial: TrainState,
    config: Config,
    data: Dataset,
    devices: Devices,
    step: Callable,
    run: Run,
    progress: Progress,
    saves: Checkpoints,
    tell: Callable[[str], None],
) -> tuple[list[Snapshot], dict[str, Any]]:
    """Trains one arm from its last save on, writes a row of metrics an epoch, and returns its snapshots and summary.

    A save comes after the row and the snapshot of each epoch that it has; those beyond it are made again.
    """
    batches = train_batches(data.train, config.batch_size, config.seed, jax.process_index(), jax.process_count())
    steps = steps_of(config, data)
    weight = devices.place_state(np.float32(center_weight))
    host, tally = saves.restore(initial, batches, tell) or (initial, Tally())
    state = devices.place_state(host)
    one = devices.one(state)
    epochs = int(host.step) // steps
    rows = run.keep(arm, epochs)
    history = History(run.out / SNAPSHOTS, arm)
    if host is initial:
        history.add(snapshot(0, one, evaluate(one, data.test, devices), data.num_classes))
    else:
        history.load(epochs)
        tell(f'the {arm} arm goes on after {epochs} epochs and {tally.steps} steps')
    scalars = Scalars(run.out / TENSORBOARD / arm, rows) if config.tensorboard and processes.first() else None
    progress.start(arm, config.epochs * steps, int(host.step))
    for epoch in range(epochs + 1, config.epochs + 1):
        report = partial(progress.report, (epoch - 1) * steps)
        state, metrics = train_epoch(state, step, batches, steps, weight, devices, report, tally, saves)
        tally = Tally()
        one = devices.one(state)
        history.add(snapshot(epoch, one, evaluate(one, data.test, devices), data.num_classes))
        row = {'epoch': epoch, 'arm': arm, **metrics, **measures(history.snapshots[-1])}
        run.add_metrics(row)
        if scalars:
            scalars.add(row)
        if epoch == config.epochs or saves.due():
            saves.save(state, batches, tally)
    if scalars:
        scalars.close()
    last = history.snapshots[-1]
    summary = {
        **measures(last),
        'collapsed': last.collapsed,
        'train_seconds': sum(row['epoch_seconds'] for row in run.keep(arm, config.epochs)),
    }
    shown = evaluate(one, sample(data.train), devices)
    last = dataclasses.replace(last, train_features=shown.features, train_labels=shown.labels)
    return [*history.snapshots[:-1], last], summary


def measures(shown: Snapshot) -> dict[str, float]:
    return {
        'test_accuracy': shown.test_accuracy,
        'nearest_center_accuracy': shown.nearest_center_accuracy,
        'intra_inter_ratio': shown.intra_inter_ratio,
    }


def sample(split: Split | LazySplit) -> Split:
    """Examples from all over a split, as many as a picture shows."""
    return Split(*split.take(np.linspace(0, len(split) - 1, min(SHOWN, len(split))).astype(int)))


def snapshot(epoch: int, state: TrainState, test: Evaluation, num_classes: int) -> Snapshot:
    return Snapshot(
        epoch=epoch,
        train_features=test.features[:0],
        train_labels=test.labels[:0],
        test_features=test.features[:SHOWN],
        test_labels=test.labels[:SHOWN],
        centers=np.asarray(jax.device_get(state.params['centers']['center']['centers'])),
        test_accuracy=test.accuracy,
        nearest_center_accuracy=test.nearest_center_accuracy,
        intra_inter_ratio=test.intra_inter_ratio,
        collapsed=test.collapsed(num_classes),
    )


def table(summary: dict[str, dict[str, Any]]) -> Table:
    """The results as a terminal shows them."""
    rows = Table('arm', *(Column(name, justify='right') for name in COLUMNS.values()))
    for arm, values in summary.items():
        shown = [f'{values[key]:.{digits}f}' for key, digits in zip(COLUMNS, (4, 4, 4, 1), strict=True)]
        rows.add_row(arm + (' (collapsed)' if values['collapsed'] else ''), *shown)
    return rows


def draw(config: Config, data: Dataset, history: dict[str, list[Snapshot]], summary: dict[str, Any], run: Run) -> None:
    """Draws the pictures and writes the page."""
    arms = {'softmax': 'softmax alone', 'center': f'with center loss, weight {config.center_weight:g}'}
    named = {arms[arm]: snapshots for arm, snapshots in history.items()}
    title = f'{data.name}, {config.model}, {config.epochs} epochs, seed {config.seed}'
    picture, film = run.out / 'features.png', run.out / 'features.gif'
    last = {name: snapshots[-1] for name, snapshots in named.items()}
    figures.draw_features(picture, last, data.class_names, title=title)
    figures.animate_features(film, named, data.class_names, title=title)
    write_report(
        run.out / 'report.html',
        title=f'Softmax and center loss: {title}',
        lead='The same network from the same seed, trained by softmax alone and with center loss beside it.',
        summary=summary,
        metrics=run.metrics(),
        pictures={'Features of both arms at the end': picture, 'The test set through the epochs': film},
        config=run.config(),
        command=command(config),
    )


def command(config: Config) -> str:
    """The command line that makes this run again."""
    words = ['python', '-m', 'experiments.toy2d']
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            words += [_flag(field.name)] if value is True else [_flag(field.name), str(value)]
    return shlex.join(words)


if __name__ == '__main__':
    cli.main(Config, main, prog='experiments.toy2d')
