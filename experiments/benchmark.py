"""Step time over classes and batch sizes, beside what PyTorch users write, and against the machine's copy bandwidth.

A step is the loss, its gradient for the features, and the centers moved. Writes benchmark.csv and benchmark.png to
--out. PyTorch takes part if it is installed. On several devices each layout of the table has an arm, or the one that
--mesh or --parallel names. The arms of a cell take turns, and a copy with them: what else a machine does comes and
goes, and would fall on one of them alone.
"""

import dataclasses
import gc
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from experiments.bench import ours, pytorch
from experiments.bench.problem import Implementation, Problem
from experiments.bench.timing import Timing, bandwidth, keep_freed_memory, measure, on_cpu
from experiments.data.batches import process_slice, steps_of, train_batches
from experiments.data.load import load
from experiments.launch import cli, processes
from experiments.launch.atomic_files import write_table
from experiments.launch.errors import FlagError
from experiments.launch.flags import DeviceFlags, Folder, flag
from experiments.launch.mesh import choose
from experiments.launch.run_folder import check_folder, environment, format_environment
from experiments.plots.step_times import draw_step_times
from experiments.train.loop import train_epoch
from experiments.train.model import Classifier
from experiments.train.step import create_state, train_step

TURNS = 3
SLOW = 2.0  # seconds a step, of which one turn tells enough
# A step reads x, the centers of the batch and the gradient, and writes the gradient and the centers.
PASSES = 5


@dataclasses.dataclass(frozen=True)
class Config(DeviceFlags):
    """What is measured."""

    batch_sizes: tuple[int, ...] = (256, 4096, 16384)
    """numbers of examples in a step"""
    classes: tuple[int, ...] = (1_000, 100_000, 1_000_000)
    """numbers of classes"""
    feature_dim: int = 512
    """number of feature dimensions"""
    rounds: int = 4
    """blocks of eight steps that an arm is timed for in each of three turns"""
    allocator: Literal['default', 'kept', 'both'] = 'both'
    """glibc's settings: as they are, or such that freed memory is kept, or on a CPU one after the other"""
    out: Folder = Path('runs/benchmark')
    """folder for the table and the picture; what an earlier benchmark wrote there is replaced"""

    def __post_init__(self):
        super().__post_init__()
        for name in ('batch_sizes', 'classes'):
            if min(getattr(self, name), default=0) < 1:
                raise FlagError(f'{flag(name)} must be numbers of 1 or more, got {getattr(self, name)}')
        for name in ('feature_dim', 'rounds'):
            if getattr(self, name) < 1:
                raise FlagError(f'{flag(name)} must be at least 1, got {getattr(self, name)}')


def main(config: Config) -> None:
    console = Console(quiet=not processes.is_main_process())
    if processes.is_main_process():
        check_folder(config.out)  # before a quarter of an hour is spent
    tell = partial(console.print, highlight=False, soft_wrap=True)
    devices = config.start()
    for size in config.batch_sizes:
        process_slice(size, jax.process_index(), jax.process_count(), '--batch-sizes')
    tell(format_environment(environment(devices)))
    torch = pytorch.installed() if processes.is_main_process() else None
    tell(f'PyTorch {torch.__version__}' if torch else 'PyTorch is not installed, so its arms are missing')
    arms: dict[str, Callable[[Problem], Implementation | None]] = ours.layouts(devices, config.mesh)
    if torch:
        arms |= {name: partial(arm, torch) for name, arm in pytorch.FORMS.items()}
    rows: list[dict[str, Any]] = []
    every = ('default', 'kept') if on_cpu() else ('default',)
    for allocator in every if config.allocator == 'both' else (config.allocator,):
        if allocator != 'default' and not keep_freed_memory():
            tell('the C library is not glibc, so its defaults are all that was measured')
            break
        measured = measure_all(config, arms, allocator, console)
        low, speed, high = np.percentile([row['copy_bytes_per_second'] for row in measured], [0, 50, 100]) / 1e9
        copied = f'{speed:.0f} GB/s ({low:.0f} to {high:.0f})'
        tell(f'allocator: {allocator}; a large array is copied at {copied}, read and write together')
        console.print(timing_table(measured))
        rows += measured
    if not processes.is_main_process():
        return
    if jax.process_count() == 1:
        rows += measure_toy(config, torch, console)
    config.out.mkdir(parents=True, exist_ok=True)
    write_table(config.out / 'benchmark.csv', rows)
    draw_step_times(config.out / 'benchmark.png', rows)
    tell(f'{config.out / "benchmark.csv"} has all figures, and benchmark.png beside it the picture')


def measure_all(
    config: Config, arms: dict[str, Callable[[Problem], Implementation | None]], allocator: str, console: Console
) -> list[dict[str, Any]]:
    """A row for each arm that can be measured on each problem."""
    problems = [Problem(b, c, config.feature_dim) for b in config.batch_sizes for c in config.classes]
    rows = []
    columns = TextColumn('{task.description}'), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task('', total=len(problems) * len(arms) * TURNS)

        def tell(problem: Problem, arm: str, left_out: str = '') -> None:
            named = f'B={problem.batch_size} C={problem.num_classes} {arm}'
            if left_out:
                progress.print(f'{named} is left out: {left_out}', highlight=False, soft_wrap=True)
            else:
                progress.update(task, advance=1, description=named)

        for problem in problems:
            rows += [
                {'allocator': allocator, **row}
                for row in measure_problem(arms, problem, config.rounds, partial(tell, problem))
            ]
    return rows


def measure_problem(
    arms: dict[str, Callable[[Problem], Implementation | None]],
    problem: Problem,
    rounds: int,
    tell: Callable[..., None],
) -> list[dict[str, Any]]:
    """A row for each arm that can be measured on this problem, from the blocks of all turns."""
    speeds: list[float] = []
    blocks: dict[str, list[float]] = {}
    compiled: dict[str, dict[str, Any]] = {}
    for turn in range(TURNS):
        speeds.append(bandwidth())
        for name, make in arms.items():
            tell(name)
            if turn and (name not in blocks or (min(blocks[name]) > SLOW and jax.process_count() == 1)):
                continue
            try:
                arm = make(problem)
                if arm is None:
                    continue
                blocks[name] = blocks.get(name, []) + measure(arm.steps, rounds, arm.wait)
                compiled[name] = {'temporary_bytes': arm.temporary_bytes, 'accessed_bytes': arm.accessed_bytes}
                # Its arrays are given back before the next arm comes.
                arm.steps.close()  # pyright: ignore[reportAttributeAccessIssue]  # a generator
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error) or jax.process_count() > 1:
                    raise
                tell(name, 'out of memory')
                blocks.pop(name, None)
            arm = None
            gc.collect()
    speed = float(np.median(speeds))
    floor = PASSES * problem.batch_size * problem.feature_dim * 4 / speed
    rows = []
    for name, seconds in blocks.items():
        timing = Timing.of(seconds)
        copied = {'times_copy': timing.median / floor, 'copy_bytes_per_second': speed}
        rows.append({'arm': name, **problem._asdict(), **timing.row(), **copied, **compiled[name]})
    return rows


def out_of_memory(error: Exception) -> bool:
    """Python's, JAX's and PyTorch's ways to say so."""
    said = str(error).lower()
    words = 'resource_exhausted', 'out of memory', "can't allocate memory"
    return isinstance(error, MemoryError) or any(word in said for word in words)


def measure_toy(config: Config, torch: Any | None, console: Console) -> list[dict[str, Any]]:
    """The whole training step of the toy, network and optimizers included, in both libraries; and the loop around ours.

    The loop reads batches and keeps metrics, as `experiments.toy2d` does between two evaluations.
    """
    data, devices = load('digits'), choose('none')
    batch_size = 32
    batches = train_batches(data.train, batch_size, seed=0)
    images, labels = next(batches)
    state = create_state(Classifier('small', 2, data.num_classes), data.image_shape, 0, 3e-3, 0.5, devices)
    step, weight = devices.compile(train_step), devices.place_state(np.float32(0.1))
    batch = devices.place_batch(images, labels)

    def bare():
        nonlocal state
        while True:
            state, metrics = step(state, *batch, weight)
            yield state, metrics

    arms = {'centerloss_jax': Implementation(bare())}
    if torch:
        arms['torch'] = pytorch.toy_step(torch, images, labels, data.num_classes, 3e-3)
    timings = {name: Timing.of(measure(arm.steps, TURNS * config.rounds, arm.wait)) for name, arm in arms.items()}
    seconds = []
    for _ in range(TURNS * config.rounds):
        state, metrics = train_epoch(
            state, step, batches, steps_of(data.train, batch_size), weight, devices, lambda *_: None
        )
        seconds.append(1 / metrics['steps_per_second'])
    timings['the loop around it'] = Timing.of(seconds)
    shown = Table('training step of the toy, B=32', Column('ms', justify='right'), Column('x ours', justify='right'))
    for name, timing in timings.items():
        shown.add_row(name, f'{timing.median * 1e3:.2f}', f'{timing.median / timings["centerloss_jax"].median:.2f}')
    console.print(shown)
    problem = Problem(batch_size, data.num_classes, 2)
    return [{'allocator': 'toy', 'arm': name, **problem._asdict(), **timing.row()} for name, timing in timings.items()]


def timing_table(rows: list[dict[str, Any]]) -> Table:
    """Milliseconds a step with half the distance of their quartiles, as multiples of ours and of the copy floor."""
    names = 'ms', '±', 'x ours', 'x floor', 'MB'
    shown = Table('B', 'C', Column('arm', no_wrap=True), *(Column(name, justify='right') for name in names))
    our_seconds = {problem_of(row): row['step_seconds'] for row in rows if row['arm'] == 'centerloss_jax'}
    for row in rows:
        spread = f'{(row["high_seconds"] - row["low_seconds"]) / 2 / row["step_seconds"]:.0%}'
        temporary = '' if row['temporary_bytes'] is None else f'{row["temporary_bytes"] / 1e6:.1f}'
        ratio = row['step_seconds'] / our_seconds[problem_of(row)]
        numbers = f'{row["step_seconds"] * 1e3:.2f}', spread, f'{ratio:.2f}', f'{row["times_copy"]:.1f}', temporary
        shown.add_row(str(row['batch_size']), f'{row["num_classes"]:.0e}', row['arm'], *numbers)
    best = peers(rows)
    if best:
        mean = math.exp(np.mean(np.log(best)))
        shown.caption = (
            f'The best peer takes {mean:.2f} times ours where B >= 4,096 (geometric mean of {len(best)} cells)'
        )
    return shown


def problem_of(row: dict[str, Any]) -> tuple[int, int]:
    return row['batch_size'], row['num_classes']


def peers(rows: list[dict[str, Any]]) -> list[float]:
    """The time of the best PyTorch arm as a multiple of ours, a number for each problem with B >= 4,096."""
    our_seconds = {problem_of(row): row['step_seconds'] for row in rows if row['arm'] == 'centerloss_jax'}
    theirs: dict[tuple[int, int], float] = {}
    for row in rows:
        if row['arm'].startswith('torch') and row['batch_size'] >= 4096:
            theirs[problem_of(row)] = min(row['step_seconds'], theirs.get(problem_of(row), math.inf))
    return [seconds / our_seconds[problem] for problem, seconds in theirs.items()]


if __name__ == '__main__':
    cli.main(Config, main, prog='experiments.benchmark')
