"""The cells of a sweep: each trains one network and says what it is worth. Spawned processes work on them.

A cell that is done is a file, so that a sweep that was stopped goes on with the others. A process trains many cells
with one compiled step, since to start JAX and to compile takes longer than a cell of the digits.
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

from experiments.batches import steps_of, train_batches
from experiments.data import load
from experiments.devices import choose
from experiments.evaluation import evaluate
from experiments.history import load_snapshot, save_snapshot
from experiments.models import Classifier
from experiments.open_set import divide
from experiments.runs import RunError, read_json, write_json
from experiments.settings import Common
from experiments.stopping import Stop
from experiments.toy2d import sample, snapshot
from experiments.training import create_state, train_epoch, train_step
from experiments.verification import judge


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


def work(task: Task, cells: Sequence[Cell], workers: int, stop: Stop) -> Iterator[Cell]:
    """Trains the cells on so many processes and yields each one when it is done; raises Stopped if it was asked to."""
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
                stop.obey()
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
def _prepared() -> tuple[Any, ...]:
    """Data, devices and step of this process."""
    settings = _task.settings
    parts = divide(load(settings.dataset, settings.data_dir, settings.image_size), _task.held_out)
    devices = choose('none')
    return parts, devices, devices.compile(train_step)


@cache  # the same object, so that cells share a compiled step
def _model(feature_dim: int) -> Classifier:
    parts, *_ = _prepared()
    return Classifier(_task.settings.model, feature_dim, parts.known.num_classes)


def _train(cell: Cell) -> None:
    settings = _task.settings
    parts, devices, step = _prepared()
    known = parts.known
    begun = time.perf_counter()
    model = _model(cell.feature_dim)
    state = create_state(model, known.image_shape, cell.seed, settings.learning_rate, cell.alpha, devices)
    batches = train_batches(known.train, settings.batch_size, cell.seed)
    steps = steps_of(known.train, settings.batch_size)
    weight = devices.place_state(np.float32(cell.center_weight))
    for _ in range(settings.epochs):
        state, _ = train_epoch(state, step, batches, steps, weight, devices, lambda *_: None)
    values, _, _ = judge(state, parts, _task.similarity, devices)
    if cell.feature_dim == 2:
        train, test = (evaluate(state, split, devices) for split in (sample(known.train), known.test))
        shown = snapshot(settings.epochs, state, test, known.num_classes, train)
        save_snapshot(cell.path(_task.folder).with_suffix('.npz'), shown)
    # The file says that the cell is done, so it comes last.
    write_json(cell.path(_task.folder), {**cell._asdict(), **values, 'train_seconds': time.perf_counter() - begun})
