"""Times a step of the center loss over batch sizes and numbers of classes, beside PyTorch and a copy of memory.

A step computes the loss and its gradient for the features, and moves the centers. benchmark.csv and benchmark.png are
written to --out. PyTorch is measured if it is installed. On several devices each layout of the table is an arm, or only
the one that --mesh or --parallel selects.

With --step classifier a step computes a softmax over all classes, then over a sample of them, and moves the table by
SGD with momentum, on one device. benchmark.csv alone is written.

On Linux, glibc returns large arrays to the system, so that on a CPU each step pays for page faults. To measure without
them, set GLIBC_TUNABLES=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=2147483647 in the environment.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments.launch import cli
from experiments.launch.atomic_files import write_table
from experiments.launch.errors import FlagError
from experiments.launch.flags import DeviceFlags, Folder, flag

if TYPE_CHECKING:
    from experiments.bench.turns import Maker


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of the steps to measure, and where the results go."""

    batch_sizes: tuple[int, ...] = (256, 4096, 16384)
    """numbers of examples in a step"""
    classes: tuple[int, ...] = (1_000, 100_000, 1_000_000)
    """numbers of classes"""
    feature_dim: int = 512
    """number of feature dimensions"""
    step: Literal['centers', 'classifier'] = 'centers'
    """what a step moves: the centers of a center loss, or the table of a softmax"""
    sampled_share: float = 0.1
    """share of the classes that a step of the classifier samples; those of the batch always are"""
    rounds: int = 4
    """blocks of eight steps for each arm in each of three turns"""
    out: Folder = Path('runs/benchmark')
    """folder for the table and the picture; earlier ones are replaced"""

    def __post_init__(self):
        for name in ('batch_sizes', 'classes'):
            if min(getattr(self, name), default=0) < 1:
                raise FlagError(f'{flag(name)} must be numbers of 1 or more, got {getattr(self, name)}')
        for name in ('feature_dim', 'rounds'):
            if getattr(self, name) < 1:
                raise FlagError(f'{flag(name)} must be at least 1, got {getattr(self, name)}')
        if not 0 < self.sampled_share <= 1:
            raise FlagError(f'--sampled-share must be above 0 and at most 1, got {self.sampled_share}')


@dataclasses.dataclass(frozen=True)
class Config(DeviceFlags, Sizes):
    """Settings of a benchmark."""

    def __post_init__(self):
        DeviceFlags.__post_init__(self)
        Sizes.__post_init__(self)
        if self.step == 'classifier' and (self.mesh or self.parallel == 'pmap' or self.distributed or self.coordinator):
            raise FlagError('--step classifier runs on one device; remove the flags that choose several')


def main(config: Config) -> None:
    import jax

    from experiments.bench import ours, pytorch, turns
    from experiments.bench.step_times import draw_step_times
    from experiments.bench.tables import timing_table, toy_table
    from experiments.bench.toy import measure_toy
    from experiments.data.batches import process_slice
    from experiments.launch import output, processes
    from experiments.launch.run_folder import check_folder, environment, format_environment

    console = output.console()
    if processes.is_main_process():
        check_folder(config.out)
    tell = partial(console.print, highlight=False, soft_wrap=True)
    devices = config.start()
    for size in config.batch_sizes:
        process_slice(size, jax.process_index(), jax.process_count(), '--batch-sizes')
    tell(format_environment(environment(devices)))
    torch = pytorch.installed() if processes.is_main_process() else None
    tell(f'PyTorch {torch.__version__}' if torch else 'PyTorch is not installed, so it is not measured')
    if config.step == 'classifier':
        rows = measure_classifier(config, torch, console)
        config.out.mkdir(parents=True, exist_ok=True)
        write_table(config.out / 'benchmark.csv', rows)
        tell(f'wrote {config.out / "benchmark.csv"}')
        return
    arms: dict[str, Maker] = ours.layouts(devices, config.mesh)
    if torch:
        arms |= {name: partial(arm, torch) for name, arm in pytorch.FORMS.items()}
    measured = measure_all(config, arms, console)
    low, speed, high = np.percentile([row['copy_bytes_per_second'] for row in measured], [0, 50, 100]) / 1e9
    tell(f'copy of a large array: {speed:.0f} GB/s ({low:.0f} to {high:.0f}), read and write together')
    console.print(timing_table(measured))
    if not processes.is_main_process():
        return
    rows = [{'step': 'center loss', **row} for row in measured]
    if jax.process_count() == 1:
        for name, toy in measure_toy(turns.TURNS * config.rounds, torch).items():
            console.print(toy_table(name, toy))
            rows += [{'step': name, **row} for row in toy]
    config.out.mkdir(parents=True, exist_ok=True)
    write_table(config.out / 'benchmark.csv', rows)
    draw_step_times(config.out / 'benchmark.png', measured)
    tell(f'wrote {config.out / "benchmark.csv"} and benchmark.png')


def measure_classifier(config: Config, torch: Any | None, console: Console) -> list[dict[str, Any]]:
    """Measures a softmax over all classes and one over a sample, prints a table for each, and returns their rows."""
    from experiments.bench import ours_classifier, pytorch_classifier
    from experiments.bench.tables import timing_table

    share = config.sampled_share
    full: dict[str, Maker] = {'centerloss_jax': ours_classifier.full_softmax}
    sampled: dict[str, Maker] = {'centerloss_jax': partial(ours_classifier.sampled_softmax, share=share)}
    if torch:
        full['torch, linear'] = partial(pytorch_classifier.full_linear, torch)
        forms = pytorch_classifier.SAMPLED_FORMS.items()
        sampled |= {name: partial(arm, torch, share=share) for name, arm in forms}
    rows = []
    for step, arms in {'softmax': full, f'softmax over a share of {share:g}': sampled}.items():
        # A copy of the batch is no floor of this step, since it reads rows of the table too.
        measured = [{**row, 'times_copy': None} for row in measure_all(config, arms, console)]
        console.print(timing_table(measured, step))
        rows += [{'step': step, **row} for row in measured]
    return rows


def measure_all(config: Config, arms: Mapping[str, 'Maker'], console: Console) -> list[dict[str, Any]]:
    """Measures each arm on each problem that it can solve, and returns a row for each."""
    from experiments.bench import turns
    from experiments.bench.problem import Problem

    problems = [Problem(b, c, config.feature_dim) for b in config.batch_sizes for c in config.classes]
    rows = []
    columns = TextColumn('{task.description}'), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task('', total=len(problems) * len(arms) * turns.TURNS)

        def report(problem: Problem, arm: str, skipped: str = '') -> None:
            description = f'B={problem.batch_size} C={problem.num_classes} {arm}'
            if skipped:
                progress.print(f'{description} is skipped: {skipped}', highlight=False, soft_wrap=True)
            else:
                progress.update(task, advance=1, description=description)

        for problem in problems:
            rows += turns.measure_problem(arms, problem, config.rounds, partial(report, problem))
    return rows


if __name__ == '__main__':
    cli.main(Config, main, prog='experiments.benchmark')
