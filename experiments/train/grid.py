"""The cells of a sweep: each trains one network and says what it is worth.

Spawned processes work on them side by side, each on a CPU core, or the devices of a mesh one after the other. A cell
that is done is a file, so that a sweep that was stopped goes on with the others. A process trains many cells with one
compiled step, since to start JAX and to compile takes longer than a cell of the digits.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.data.batches import steps_of, train_batches
from experiments.data.load import load
from experiments.data.open_set import OpenSet, divide
from experiments.launch import processes
from experiments.launch.flags import Common
from experiments.launch.mesh import Devices, choose
from experiments.launch.run_folder import RunError, read_json, write_json
from experiments.launch.stopping import Stop
from experiments.train.evaluate import evaluate, judge, sample, snapshot_of
from experiments.train.loop import train_epoch
from experiments.train.model import Classifier
from experiments.train.snapshots import load_snapshot, save_snapshot
from experiments.train.step import create_state, train_step


class Cell(NamedTuple):
    center_weight: float
    alpha: float
    seed: int
    feature_dim: int

    def path(self, folder: Path) -> Path:
        weight, alpha, seed, feature_dim = self
        return folder / f'weight-{weight!r}-alpha-{alpha!r}-seed-{seed}-dim-{feature_dim}.json'

    def read(self, folder: Path) -> dict[str, Any]:
        """The measures of a cell that is done."""
        values = read_json(self.path(folder))
        return {key: float('nan') if value is None else value for key, value in values.items()}

    def done(self, folder: Path) -> bool:
        """Whether the cell is there and whole."""
        try:
            self.read(folder)
            if self.feature_dim == 2:
                load_snapshot(self.path(folder).with_suffix('.npz'))
        except (FileNotFoundError, ValueError, RunError):
            return False
        return True


class Task(NamedTuple):
    """What all cells of a sweep have in common."""

    settings: Common
    held_out: str
    similarity: str
    folder: Path


def load_open_set(settings: Common, held_out: str) -> OpenSet:
    """The dataset of a sweep, known and held-out classes."""
    return divide(load(settings.dataset, settings.data_dir, settings.image_size), held_out)


def work_on_devices(
    task: Task, cells: Sequence[Cell], open_set: OpenSet, devices: Devices, stop: Stop
) -> Iterator[Cell]:
    """Trains the cells one after the other and yields each one when it is done; raises Stopped if it was asked to."""
    trainer = Trainer(task, open_set, devices)
    for cell in cells:
        trainer.train(cell)
        yield cell
        stop.synchronize()
        stop.raise_if_requested()


def work_on_cores(task: Task, cells: Sequence[Cell], workers: int, stop: Stop) -> Iterator[Cell]:
    """The same by so many processes at once, each on a CPU core."""
    context = multiprocessing.get_context('spawn')  # JAX has threads, which a fork would lose
    cores = context.SimpleQueue()
    available = sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else [None]
    for number in range(workers):
        cores.put(available[number % len(available)])
    with ProcessPoolExecutor(workers, context, _begin, (task, cores)) as pool:
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


_task: Task


def _begin(task: Task, cores: Any) -> None:
    """Prepares a process, on a core of its own: the threads of several would disturb each other."""
    global _task
    _task = task
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first process ends the others
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
    return Trainer(_task, load_open_set(_task.settings, _task.held_out), choose('none'))


def _train(cell: Cell) -> None:
    _trainer().train(cell)


class Trainer:
    """Trains cells on some devices, all of them with one compiled step."""

    def __init__(self, task: Task, open_set: OpenSet, devices: Devices):
        self._task, self._open_set, self._devices = task, open_set, devices
        self._step = devices.compile(train_step)
        # The same object for all cells of a dimension, so that they share a compiled step.
        self._model = cache(lambda dim: Classifier(task.settings.model, dim, open_set.known.num_classes))

    def train(self, cell: Cell) -> None:
        """Trains a cell and writes its files."""
        task, devices, known = self._task, self._devices, self._open_set.known
        settings, model = task.settings, self._model(cell.feature_dim)
        begun = time.perf_counter()
        state = create_state(model, known.image_shape, cell.seed, settings.learning_rate, cell.alpha, devices)
        own = jax.process_index(), jax.process_count()
        batches = train_batches(known.train, settings.batch_size, cell.seed, *own)
        steps = steps_of(known.train, settings.batch_size)
        weight = devices.place_state(np.float32(cell.center_weight))
        for _ in range(settings.epochs):
            state, _ = train_epoch(state, self._step, batches, steps, weight, devices, lambda *_: None)
        one = devices.one(state)
        values, _, _ = judge(one, self._open_set, task.similarity, devices)
        if cell.feature_dim == 2:
            train, test = (evaluate(one, split, devices) for split in (sample(known.train), known.test))
            shown = snapshot_of(settings.epochs, one, test, known.num_classes, train)
            if processes.is_main_process():
                save_snapshot(cell.path(task.folder).with_suffix('.npz'), shown)
        if processes.is_main_process():  # the file says that the cell is done, so it comes last
            done = {**cell._asdict(), **values, 'train_seconds': time.perf_counter() - begun}
            write_json(cell.path(task.folder), done)
