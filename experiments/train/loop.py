"""The training loop of all experiments: a run trains one network in several ways, its arms.

An arm is saved during training, continues from its last save, and writes a row of metrics after each epoch. The
program decides what to measure after an epoch, and what to compute from the final state.
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

from experiments.data.arrays import is_array_file
from experiments.data.batches import process_slice, steps_of, train_batches
from experiments.data.load import Dataset, load
from experiments.data.splits import LazySplit, Split
from experiments.launch import output, processes
from experiments.launch.flags import Settings
from experiments.launch.mesh import Devices
from experiments.launch.network import check_network, find_network
from experiments.launch.run_folder import (
    CHECKPOINTS,
    INPUTS,
    KNOWN,
    METRICS,
    PROFILE,
    SUMMARY,
    TENSORBOARD,
    Run,
    RunError,
    environment,
    format_environment,
    is_whole,
)
from experiments.launch.stopping import Stop
from experiments.train.checkpoint import RECIPE, Checkpoints, newest
from experiments.train.logging import Progress, Scalars, traced
from experiments.train.model import Classifier
from experiments.train.step import Metrics, Tally, TrainState, create_state, train_step

Result = TypeVar('Result')


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train the network of a run."""

    name: str
    center_weight: float
    seed: int


class Job:
    """Runs an experiment from its settings to its trained arms."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.devices = settings.start()
        self.console = output.console()
        self._surroundings = environment(self.devices)
        self.tell(format_environment(self._surroundings))
        self.run = Run(settings.out, overwrite=settings.overwrite, resume=settings.resume)

    def tell(self, line: str) -> None:
        """Prints a line on the first process."""
        self.console.print(line, highlight=False, soft_wrap=True)

    def finished(self, *names: str) -> bool:
        """Returns whether the run and the files `names` are complete. If so, prints a line."""
        settings = {**self.settings.decisive(), 'dataset': self.settings.dataset, 'epochs': self.settings.epochs}
        inputs = (INPUTS,) if is_array_file(self.settings.dataset) else ()
        finished = self.run.finished(settings, (METRICS, SUMMARY, KNOWN, *inputs, *names))
        if finished:
            self.tell(f'the run is finished; see {self.run.out / "report.html"}')
        return finished

    def load(self) -> Dataset:
        """Imports the network, loads the dataset and prints its notes."""
        settings = self.settings
        self.network = find_network(settings.model)
        data = load(settings.dataset, settings.data_dir, settings.image_size, settings.skip_unreadable)
        for note in (data.overview, *data.notes):
            self.tell(note)
        return data

    def start(self, data: Dataset) -> None:
        """Starts or resumes the run on this data."""
        self.data = data
        self.steps = steps_of(data.train, self.settings.batch_size)
        facts = {
            'num_classes': data.num_classes,
            'image_shape': data.image_shape,
            'dtype': data.dtype,
            'train_examples': len(data.train),
        }
        if self.run.resumed:
            self._check_columns()
            self._check_centers()
            self.run.check({**self.settings.decisive(), **facts})
            self.run.check_data(self.settings.dataset, data.identity)
            if newest(self.run.out / CHECKPOINTS) > self.settings.epochs * self.steps:
                epochs, out = self.settings.epochs, self.run.out
                raise RunError(f'--epochs is {epochs}, but the run in {out} has more epochs already')
        for note in self.settings.check_data(data.train):
            self.tell(note)
        self.model = Classifier(self.network, self.settings.feature_dim, data.num_classes)
        check_network(self.model, data.image_shape, data.dtype, self.settings.model)
        self.run.start({**dataclasses.asdict(self.settings), **facts, **self._surroundings}, data.identity)
        if data.standardization and processes.is_main_process():
            data.standardization.save(self.run.out / INPUTS)

    def _check_columns(self) -> None:
        """Raises RunError if metrics.csv of the resumed run lacks a column that this version writes."""
        path = self.run.out / METRICS
        rows = self.run.metrics() if is_whole(path) else []
        missing = [name for name in Metrics._fields if rows and name not in rows[0]]
        if missing:
            raise RunError(
                f'{path} has no column {missing[0]}, because another version wrote it, and the run cannot continue; '
                'name another --out, or pass --overwrite to start again'
            )

    def _check_centers(self) -> None:
        """Raises RunError if the resumed run has another network, or centers of another shape."""
        saved = self.run.config()
        old = saved['model'], [saved.get('num_classes', self.data.num_classes), saved['feature_dim']]
        new = self.settings.model, [self.data.num_classes, self.settings.feature_dim]
        if old != new:
            raise RunError(
                f'the run in {self.run.out} has the network {old[0]} and centers {old[1]} (classes, feature '
                f'dimensions), but the settings ask for {new[0]} and {new[1]}. {RECIPE}'
            )

    def train(
        self,
        arms: Sequence[Arm],
        measure: Callable[[Arm, int, TrainState], dict[str, float]],
        finish: Callable[[Arm, TrainState], Result],
    ) -> dict[str, Result]:
        """Trains each arm up to the last epoch.

        Args:
            arms: The arms to train.
            measure: Returns the measures of an arm after an epoch, from the epoch and the unreplicated state. It is
                also called before the first epoch, with 0.
            finish: Computes the result of an arm from its unreplicated last state.

        Returns:
            The result of each arm, by name.
        """
        settings = self.settings
        self._step = step = self.devices.compile(train_step)
        resume = dataclasses.replace(settings, resume=True, overwrite=False).command()
        traces = settings.profile and processes.is_main_process()
        profile = traced(step, self.run.out / PROFILE) if traces else nullcontext(step)
        results = {}
        with Progress(self.console) as progress, Stop(resume) as stop, profile as step:
            for arm in arms:
                placed = create_state(
                    self.model,
                    self.data.image_shape,
                    arm.seed,
                    settings.learning_rate,
                    settings.alpha,
                    self.devices,
                    self.data.dtype,
                )
                initial = self.devices.fetch(placed)
                folder = self.run.out / CHECKPOINTS / arm.name
                saved_as = {'arm': arm.name, 'seed': arm.seed}
                with Checkpoints(folder, settings.save_every, stop, self.devices, **saved_as) as saves:
                    state = self._train(arm, initial, step, progress, saves, partial(measure, arm))
                results[arm.name] = finish(arm, state)
        return results

    def _train(
        self,
        arm: Arm,
        initial: TrainState,
        step: Callable,
        progress: Progress,
        saves: Checkpoints,
        measure: Callable[[int, TrainState], dict[str, float]],
    ) -> TrainState:
        """Trains one arm from its last save on, and returns its unreplicated last state.

        The row of an epoch and the files of `measure` are written before the save. If the run is interrupted in
        between, the epoch is trained again and both are replaced.
        """
        devices, steps, last = self.devices, self.steps, self.settings.epochs
        process = jax.process_index(), jax.process_count()
        settings, train = self.settings, self.data.train
        batches = train_batches(
            train, settings.batch_size, arm.seed, *process, images_per_class=settings.images_per_class
        )
        weight = devices.place_state(np.float32(arm.center_weight))
        host, tally = saves.restore(initial, batches, self.tell) or (initial, Tally())
        state = devices.place_state(host)
        one = devices.one(state)
        epochs = int(host.step) // steps
        self.run.add_metrics(*saves.rows)
        if host is initial:
            measure(0, one)
        else:
            self.tell(f'the {arm.name} arm continues after {epochs} epochs and {tally.steps} steps')
        writes = self.settings.tensorboard and processes.is_main_process()
        scalars = Scalars(self.run.out / TENSORBOARD / arm.name, saves.rows) if writes else None
        progress.start(arm.name, last, steps, int(host.step))
        if epochs < last:
            compile_ahead(self._step, state, self.data.train, self.settings.batch_size, weight, devices)
        for epoch in range(epochs + 1, last + 1):
            report = partial(progress.report, (epoch - 1) * steps)
            state, metrics = train_epoch(state, step, batches, steps, weight, devices, report, tally, saves)
            tally = Tally()
            one = devices.one(state)
            row = {'epoch': epoch, 'arm': arm.name, **metrics, **measure(epoch, one)}
            self.run.add_metrics(row)
            progress.epoch(row)
            saves.rows = self.run.saved_rows(arm.name)
            if scalars:
                scalars.add(row)
            if epoch == last or saves.due():
                saves.save(state, batches, tally)
        if scalars:
            scalars.close()
        return one

    def seconds(self, arm: Arm) -> float:
        """Returns the training time of an arm."""
        return sum(row['epoch_seconds'] for row in self.run.rows if row['arm'] == arm.name)


class Saves(Protocol):
    """Declares what a training loop needs of `Checkpoints`."""

    def due(self) -> bool: ...
    def save(self, state: TrainState, batches: grain.DatasetIterator, tally: Tally) -> None: ...


def compile_ahead(
    step: Any, state: TrainState, split: Split | LazySplit, batch_size: int, center_weight: Any, devices: Devices
) -> None:
    """Compiles `step` for the batches of a split, so that the time of the first epoch does not include it.

    Later calls of `step` find the compiled program.
    """
    _, size = process_slice(batch_size, jax.process_index(), jax.process_count())
    images, labels = split.take([0] * size)
    step.lower(state, *devices.place_batch(images, labels), center_weight).compile()


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
    """Runs the steps of an epoch that `tally` does not yet hold, and saves when a save is due.

    Args:
        state: The state to train, placed on the devices.
        step: The compiled `train_step`.
        batches: Iterator of (images, labels).
        steps: Number of steps of an epoch.
        center_weight: The weight of the center loss, placed on the devices.
        devices: The devices of the run.
        report: Called a few times per second, and at the end, with the number of steps of this epoch that the devices
            have finished, the metrics of the latest of them and the steps per second.
        tally: Sums over the steps of this epoch that were done before.
        saves: Saves the state, if given.

    Returns:
        The new state, and the row of metrics of the epoch.
    """
    first_start = start = reported = time.perf_counter()
    tally = tally or Tally()
    counts, history, first = [], [], tally.steps
    # An implicit transfer would make the loop wait for the device.
    with jax.transfer_guard('disallow'):
        for done in range(first + 1, steps + 1):
            images, labels = next(batches)
            state, metrics = step(state, *devices.place_batch(images, labels), center_weight)
            counts.append(int((labels >= 0).sum()))
            history.append(metrics)
            last = done == steps
            if not last and time.perf_counter() - reported > 0.3:
                # Waits for an earlier step, so that the devices have the next one already.
                behind = min(2, len(history) - 1)
                latest = devices.fetch(history[-1 - behind])
                reported = time.perf_counter()
                report(done - behind, Metrics(*latest.tolist()), (done - behind - first) / (reported - first_start))
            if last or (saves is not None and saves.due()):
                fetched = devices.fetch(history)
                now = time.perf_counter()
                tally = tally.add(processes.total(counts), fetched, now - start)
                counts, history, start = [], [], now
                if last:
                    report(done, Metrics(*fetched[-1].tolist()), (done - first) / (now - first_start))
                elif saves is not None:
                    saves.save(state, batches, tally)
    return state, tally.row()
