"""The cells of a sweep: each trains and evaluates one network.

Spawned processes run cells in parallel, each on a CPU core, or all devices run one cell after the other. A finished
cell is a file, so that a resumed sweep runs only the others. A process runs many cells with one compiled step, because
to start JAX and compile takes longer than a cell of the digits.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.data.batches import steps_of, train_batches
from experiments.data.open_set import OpenSet
from experiments.launch import processes
from experiments.launch.errors import DamagedError
from experiments.launch.flags import Common
from experiments.launch.mesh import Devices, choose
from experiments.launch.run_folder import read_json, reading, write_json
from experiments.launch.stopping import Stop
from experiments.train.evaluate import evaluate, evaluate_open_set, sample, snapshot_of
from experiments.train.loop import compile_ahead, train_epoch
from experiments.train.model import Classifier
from experiments.train.snapshots import load_snapshot, save_snapshot
from experiments.train.step import create_state, train_step


class Cell(NamedTuple):
    """The settings in which the cells of a sweep differ."""

    center_weight: float
    alpha: float
    seed: int
    feature_dim: int

    def path(self, folder: Path) -> Path:
        weight, alpha, seed, feature_dim = self
        return folder / f'weight-{weight!r}-alpha-{alpha!r}-seed-{seed}-dim-{feature_dim}.json'

    def read(self, folder: Path) -> dict[str, Any]:
        """Reads the measures of a finished cell, with NaN for null."""
        path, cure = self.path(folder), 'run the same command again with --resume'
        values = read_json(path, cure)
        with reading(path, cure):
            return {key: float('nan') if value is None else value for key, value in values.items()}

    def done(self, folder: Path) -> bool:
        """Returns whether the files of the cell exist and are whole."""
        try:
            self.read(folder)
            if self.feature_dim == 2:
                load_snapshot(self.path(folder).with_suffix('.npz'))
        except DamagedError:
            return False
        return True


class Task(NamedTuple):
    """The settings that all cells of a sweep share."""

    settings: Common
    similarity: str
    folder: Path


def work_on_devices(
    task: Task, cells: Sequence[Cell], open_set: OpenSet, devices: Devices, stop: Stop
) -> Iterator[Cell]:
    """Runs the cells one after the other on all devices, and yields each one when it is done.

    Raises:
        Stopped: If a signal asked the sweep to stop.
    """
    trainer = Trainer(task, open_set, devices)
    for cell in cells:
        trainer.train(cell)
        yield cell
        stop.synchronize()
        stop.raise_if_requested()


def work_on_cores(task: Task, cells: Sequence[Cell], open_set: OpenSet, workers: int, stop: Stop) -> Iterator[Cell]:
    """Runs the cells in `workers` processes, each on a CPU core, and yields each cell when it is done.

    All processes get the examples of `open_set`, so that a dataset that changes does not change the cells.

    Raises:
        Stopped: If a signal asked the sweep to stop.
    """
    context = multiprocessing.get_context('spawn')  # a fork would lose the threads of JAX
    cores = context.SimpleQueue()
    available = sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else [None]
    for number in range(workers):
        cores.put(available[number % len(available)])
    with ProcessPoolExecutor(workers, context, _begin, (task, open_set, cores)) as pool:
        futures = {pool.submit(_train, cell): cell for cell in cells}
        try:
            while futures:
                done, _ = wait(futures, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                    yield futures.pop(future)
                stop.raise_if_requested()
        finally:
            if futures:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in multiprocessing.active_children():
                    process.terminate()


_work: tuple[Task, OpenSet]


def _begin(task: Task, open_set: OpenSet, cores: Any) -> None:
    """Prepares a worker and pins it to one core, so that the threads of workers do not compete."""
    global _work
    _work = task, open_set
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the workers after Ctrl-C
    threading.Thread(target=_end_with_parent, daemon=True).start()
    core = cores.get()
    if core is not None:
        os.sched_setaffinity(0, [core])
    jax.config.update('jax_platforms', 'cpu')


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


@cache
def _trainer() -> 'Trainer':
    return Trainer(*_work, choose('none'))


def _train(cell: Cell) -> None:
    _trainer().train(cell)


class Trainer:
    """Runs cells on some devices with one compiled step."""

    def __init__(self, task: Task, open_set: OpenSet, devices: Devices):
        self._task, self._open_set, self._devices = task, open_set, devices
        self._step = devices.compile(train_step)
        # Cells with one feature dimension share a model object, and so a compiled step.
        self._model = cache(lambda dim: Classifier(task.settings.model, dim, open_set.known.num_classes))

    def train(self, cell: Cell) -> None:
        """Trains and evaluates a cell, and writes its files."""
        task, devices, known = self._task, self._devices, self._open_set.known
        settings, model = task.settings, self._model(cell.feature_dim)
        state = create_state(
            model, known.image_shape, cell.seed, settings.learning_rate, cell.alpha, devices, known.dtype
        )
        process = jax.process_index(), jax.process_count()
        batches = train_batches(
            known.train, settings.batch_size, cell.seed, *process, images_per_class=settings.images_per_class
        )
        steps = steps_of(known.train, settings.batch_size)
        weight = devices.place_state(np.float32(cell.center_weight))
        compile_ahead(self._step, state, known.train, settings.batch_size, weight, devices)
        seconds = 0.0
        for _ in range(settings.epochs):
            state, row = train_epoch(state, self._step, batches, steps, weight, devices, lambda *_: None)
            seconds += row['epoch_seconds']
        one = devices.one(state)
        values, _, _ = evaluate_open_set(one, self._open_set, task.similarity, devices)
        if cell.feature_dim == 2:
            train, test = (evaluate(one, split, devices) for split in (sample(known.train), known.test))
            snapshot = snapshot_of(settings.epochs, one, test, known.num_classes, train)
            if processes.is_main_process():
                save_snapshot(cell.path(task.folder).with_suffix('.npz'), snapshot)
        if processes.is_main_process():  # this file marks the cell as done, so it comes last
            measures = {**cell._asdict(), **values, 'train_seconds': seconds}
            write_json(cell.path(task.folder), measures)
