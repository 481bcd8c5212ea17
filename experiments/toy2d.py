"""The paper's toy: the same network with softmax alone and with center loss, and its 2-D features side by side.

Trains both arms from one seed, and writes config.json, metrics.csv, summary.json, features.png, features.gif and
report.html to --out.
"""

import dataclasses
import math
import shlex
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import simple_parsing
from flax.training.train_state import TrainState
from rich.console import Console
from rich.table import Column, Table

from experiments import cli, figures
from experiments.batches import train_batches
from experiments.data import Dataset, LazySplit, Split, load
from experiments.devices import Devices, choose
from experiments.evaluation import Evaluation, evaluate
from experiments.figures import Snapshot
from experiments.models import Classifier
from experiments.progress import Progress
from experiments.report import write_report
from experiments.runs import Run, environment, in_a_line
from experiments.training import create_state, train_epoch, train_step

COLUMNS = {
    'test_accuracy': 'test accuracy',
    'nearest_center_accuracy': 'nearest center',
    'intra_inter_ratio': 'intra/inter ratio',
    'train_seconds': 'seconds',
}

# A picture needs no more points than these, however large the set is.
SHOWN = 4000


@dataclasses.dataclass(frozen=True)
class Config:
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
    parallel: Literal['auto', 'pmap', 'none'] = 'auto'
    """devices: auto is all local ones by jit over a mesh, pmap all by jax.pmap, none the first alone"""
    overwrite: bool = simple_parsing.field(default=False, action='store_true')
    """replace the run that --out holds"""

    def __post_init__(self):
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


def _flag(name: str) -> str:
    return '--' + name.replace('_', '-')


def main(config: Config) -> None:
    console = Console()
    devices = choose(config.parallel)
    surroundings = environment(devices)
    console.print(in_a_line(surroundings), highlight=False, soft_wrap=True)
    run = Run(config.out, overwrite=config.overwrite)
    data = load(config.dataset, config.data_dir)
    for note in data.notes:
        console.print(note, highlight=False, soft_wrap=True)
    run.start({**dataclasses.asdict(config), **surroundings})

    model = Classifier(config.model, config.feature_dim, data.num_classes)
    initial = create_state(model, data.image_shape, config.seed, config.learning_rate, config.alpha, devices)
    step = devices.compile(train_step)
    history, summary = {}, {}
    with Progress(console) as progress:
        for arm, weight in (('softmax', 0.0), ('center', config.center_weight)):
            # A copy, since the step updates a state in place.
            state = jax.tree.map(jnp.copy, initial)
            history[arm], summary[arm] = train(arm, weight, state, config, data, devices, step, run, progress)
    run.write_summary(summary)
    console.print(table(summary))
    draw(config, data, history, summary, run)
    console.print(f'{run.out / "report.html"} has the pictures and all numbers', highlight=False, soft_wrap=True)


def train(
    arm: str,
    center_weight: float,
    state: TrainState,
    config: Config,
    data: Dataset,
    devices: Devices,
    step: Callable,
    run: Run,
    progress: Progress,
) -> tuple[list[Snapshot], dict[str, Any]]:
    """Trains one arm, writes a row of metrics an epoch, and returns its snapshots and its summary."""
    start = time.perf_counter()
    batches = train_batches(data.train, config.batch_size, config.seed)
    steps = -(-len(data.train) // config.batch_size)
    weight = jnp.float32(center_weight)
    one = devices.one(state)
    test = evaluate(one, data.test, devices)
    history = [snapshot(0, one, test, data.num_classes)]
    progress.start(arm, config.epochs * steps)
    for epoch in range(1, config.epochs + 1):
        report = partial(progress.report, (epoch - 1) * steps)
        state, metrics = train_epoch(state, step, batches, steps, weight, devices, report)
        one = devices.one(state)
        test = evaluate(one, data.test, devices)
        run.add_metrics({'epoch': epoch, 'arm': arm, **metrics, **measures(test)})
        history.append(snapshot(epoch, one, test, data.num_classes))
    summary = {
        **measures(test),
        'collapsed': test.collapsed(data.num_classes),
        'train_seconds': time.perf_counter() - start,
    }
    shown = evaluate(one, sample(data.train), devices)
    history[-1] = dataclasses.replace(history[-1], train_features=shown.features, train_labels=shown.labels)
    return history, summary


def measures(test: Evaluation) -> dict[str, float]:
    return {
        'test_accuracy': test.accuracy,
        'nearest_center_accuracy': test.nearest_center_accuracy,
        'intra_inter_ratio': test.intra_inter_ratio,
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
