"""A run of several arms, the same network trained in several ways: the one loop behind each of the experiments.

An arm is saved on its way, goes on from its last save, and writes a row of metrics an epoch. What is measured after an
epoch, and what is made of the arm at its end, is the experiment's own.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Protocol, TypeVar

import grain
import jax
import numpy as np
from flax.training.train_state import TrainState
from rich.console import Console

from experiments.data.batches import steps_of, train_batches
from experiments.data.load import Dataset, load
from experiments.launch import processes
from experiments.launch.flags import Settings
from experiments.launch.mesh import Devices
from experiments.launch.run_folder import (
    CHECKPOINTS,
    KNOWN,
    METRICS,
    PROFILE,
    SUMMARY,
    TENSORBOARD,
    Run,
    RunError,
    environment,
    format_environment,
)
from experiments.launch.stopping import Stop
from experiments.train.checkpoint import RECIPE, Checkpoints, newest
from experiments.train.logging import Progress, Scalars, traced
from experiments.train.model import Classifier
from experiments.train.step import Metrics, Tally, create_state, train_step

Result = TypeVar('Result')


@dataclasses.dataclass(frozen=True)
class Arm:
    name: str
    center_weight: float
    seed: int


class Job:
    """A run from its settings to its trained arms."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.devices = settings.start()
        self.console = Console(quiet=not processes.is_main_process())
        self._surroundings = environment(self.devices)
        self.tell(format_environment(self._surroundings))
        self.run = Run(settings.out, overwrite=settings.overwrite, resume=settings.resume)

    def tell(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)

    def finished(self, *names: str) -> bool:
        """Whether the run is there and whole, with further files of these names; it says so."""
        settings = {**self.settings.decisive(), 'epochs': self.settings.epochs}
        finished = self.run.finished(settings, (METRICS, SUMMARY, KNOWN, *names))
        if finished:
            self.tell(f'{self.run.out / "report.html"} has it all: the run is finished')
        return finished

    def load(self) -> Dataset:
        """The dataset of the settings; what is to say of it is said."""
        data = load(self.settings.dataset, self.settings.data_dir, self.settings.image_size)
        for note in data.notes:
            self.tell(note)
        return data

    def start(self, data: Dataset) -> None:
        """Begins the run, or goes on with it, on this data."""
        self.data = data
        self.steps = steps_of(data.train, self.settings.batch_size)
        facts = {'num_classes': data.num_classes, 'image_shape': data.image_shape, 'train_examples': len(data.train)}
        if self.run.resumed:
            self._check_centers()
            self.run.check({**self.settings.decisive(), **facts})
            if newest(self.run.out / CHECKPOINTS) > self.settings.epochs * self.steps:
                epochs, out = self.settings.epochs, self.run.out
                raise RunError(f'--epochs is {epochs}, but the run in {out} has been trained for more')
        self.settings.check_data(len(data.train), data.image_shape)
        self.run.start({**dataclasses.asdict(self.settings), **facts, **self._surroundings})

    def _check_centers(self) -> None:
        """Raises RunError if the network or its centers would not be those of the run that is resumed."""
        saved = self.run.config()
        old = saved['model'], [saved.get('num_classes', self.data.num_classes), saved['feature_dim']]
        new = self.settings.model, [self.data.num_classes, self.settings.feature_dim]
        if old != new:
            raise RunError(
                f'the run in {self.run.out} has a network {old[0]} with centers {old[1]}, but here they are {new[0]} '
                f'and {new[1]} (classes, feature dimensions). {RECIPE}'
            )

    def train(
        self,
        arms: Sequence[Arm],
        look: Callable[[Arm, int, TrainState], dict[str, float]],
        finish: Callable[[Arm, TrainState], Result],
    ) -> dict[str, Result]:
        """Trains each arm to its end.

        Args:
            arms: what to train.
            look: measures of an arm after an epoch, and before the first one, of one copy of its state.
            finish: what is made of one copy of an arm's last state.

        Returns:
            What `finish` made of each arm, by name.
        """
        settings = self.settings
        model = Classifier(settings.model, settings.feature_dim, self.data.num_classes)
        step = self.devices.compile(train_step)
        go_on = dataclasses.replace(settings, resume=True, overwrite=False).command()
        traces = settings.profile and processes.is_main_process()
        profile = traced(step, self.run.out / PROFILE) if traces else nullcontext(step)
        results = {}
        with Progress(self.console) as progress, Stop(go_on) as stop, profile as step:
            for arm in arms:
                placed = create_state(
                    model, self.data.image_shape, arm.seed, settings.learning_rate, settings.alpha, self.devices
                )
                initial = self.devices.fetch(placed)
                folder = self.run.out / CHECKPOINTS / arm.name
                whose = {'arm': arm.name, 'seed': arm.seed}
                with Checkpoints(folder, settings.save_every, stop, self.devices, **whose) as saves:
                    state = self._train(arm, initial, step, progress, saves, partial(look, arm))
                results[arm.name] = finish(arm, state)
        return results

    def _train(
        self,
        arm: Arm,
        initial: TrainState,
        step: Callable,
        progress: Progress,
        saves: Checkpoints,
        look: Callable[[int, TrainState], dict[str, float]],
    ) -> TrainState:
        """Trains one arm from its last save on and returns one copy of its last state.

        A save comes after the row of each epoch that it has, and after whatever `look` keeps of it; those beyond it
        are made again.
        """
        devices, steps, last = self.devices, self.steps, self.settings.epochs
        own = jax.process_index(), jax.process_count()
        batches = train_batches(self.data.train, self.settings.batch_size, arm.seed, *own)
        weight = devices.place_state(np.float32(arm.center_weight))
        host, tally = saves.restore(initial, batches, self.tell) or (initial, Tally())
        state = devices.place_state(host)
        one = devices.one(state)
        epochs = int(host.step) // steps
        rows = self.run.keep(arm.name, epochs, saves.rows)
        if host is initial:
            look(0, one)
        else:
            self.tell(f'the {arm.name} arm goes on after {epochs} epochs and {tally.steps} steps')
        writes = self.settings.tensorboard and processes.is_main_process()
        scalars = Scalars(self.run.out / TENSORBOARD / arm.name, rows) if writes else None
        progress.start(arm.name, last * steps, int(host.step))
        for epoch in range(epochs + 1, last + 1):
            report = partial(progress.report, (epoch - 1) * steps)
            state, metrics = train_epoch(state, step, batches, steps, weight, devices, report, tally, saves)
            tally = Tally()
            one = devices.one(state)
            row = {'epoch': epoch, 'arm': arm.name, **metrics, **look(epoch, one)}
            self.run.add_metrics(row)
            saves.rows = self.run.saved_rows(arm.name)
            if scalars:
                scalars.add(row)
            if epoch == last or saves.due():
                saves.save(state, batches, tally)
        if scalars:
            scalars.close()
        return one

    def seconds(self, arm: Arm) -> float:
        """How long the arm was trained."""
        return sum(row['epoch_seconds'] for row in self.run.keep(arm.name, self.settings.epochs))


class Saves(Protocol):
    """Where a loop leaves what it has, now and then."""

    def due(self) -> bool: ...
    def save(self, state: TrainState, batches: grain.DatasetIterator, tally: Tally) -> None: ...


def train_epoch(
    state: TrainState,
    step: Callable,
    batches: grain.DatasetIterator,
    steps: int,
    center_weight: Any,
    devices: Devices,
    report: Callable[[int, Metrics, float], None],
    tally: Tally | None = None,
    saves: Saves | None = None,
) -> tuple[TrainState, dict[str, float]]:
    """Runs an epoch of `steps` steps, or the rest of it behind `tally`, and saves within it where a save is due.

    A few times a second it tells `report` steps done, latest metrics, steps a second.

    Returns the state and the epoch's metrics: means over its examples, and the rows left out so far.
    """
    begun = start = told = time.perf_counter()
    tally = tally or Tally()
    counts, history, first = [], [], tally.steps
    # Nothing may go to a device or come from it by the way: each such transfer would make the loop wait.
    with jax.transfer_guard('disallow'):
        for done in range(first + 1, steps + 1):
            images, labels = next(batches)
            state, metrics = step(state, *devices.place_batch(images, labels), center_weight)
            counts.append(int((labels >= 0).sum()))
            history.append(metrics)
            now = time.perf_counter()
            if now - told > 0.3 or done == steps:
                # An earlier step's metrics: reading the latest would make the host wait for the device.
                latest = devices.fetch(history[max(0, len(history) - 3)])
                report(done, Metrics(*latest.tolist()), (done - first) / (now - begun))
                told = now
            last = done == steps
            if last or (saves is not None and saves.due()):
                fetched = devices.fetch(history)
                now = time.perf_counter()
                tally = tally.add(processes.total(counts), fetched, now - start)
                counts, history, start = [], [], now
                if saves is not None and not last:
                    saves.save(state, batches, tally)
    return state, tally.row()
