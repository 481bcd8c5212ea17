"""Predicts the memory and the traffic of a center table on each device, for several meshes, and a classifier's memory.

A step has B examples, D features, C classes and numbers of s bytes. Each of n devices has B/n of the examples. Each
group of k devices has the whole table of centers, with C/k rows on each device. The classifier has C/n rows on each
device, and a step samples S of its C classes.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Column, Table

from experiments.launch import cli
from experiments.launch.errors import FlagError
from experiments.launch.flags import flag
from experiments.launch.mesh_axes import mesh_sizes

GIB, MIB = 2**30, 2**20


class Costs(NamedTuple):
    """Bytes on each device."""

    table: float  # s D C/k: the shard of the table, which the step updates in place
    dense: float  # 4 s D C/k: table, dense gradient and the two moments of Adam
    temporaries: float  # at most; grows with C only where C <= B
    traffic: float  # memory reads and writes of a step, without caches and temporaries
    network: float  # bytes received in a step


def step_costs(
    num_classes: int, num_features: int, batch_size: int, *, data: int = 1, classes: int = 1, itemsize: int = 4
) -> Costs:
    """Returns the costs of one step of loss, gradient for the features and Eq. 4, on a mesh (data, classes).

    Traffic: a device reads its features and writes their gradient (2 B/n rows of D). It reads the centers that its
    group gathers from its shard (B/n), and adds to the centers that move (2 B/k). On one device these are 5 B rows.
    Several devices also write and read the rows of the whole batch (2 B).

    Temporaries: 64 bytes of indices for each example. Where C <= B also the sums of the classes (C rows). On several
    devices also the rows of the whole batch, twice.

    Network, with ring collectives: an all-reduce of the gathered centers of a group, 2 (k-1)/k of B k/n rows, and an
    all-gather of the rows of the whole batch, (n-1)/n of B.
    """
    n, k = data * classes, classes
    row = num_features * itemsize
    table = row * math.ceil(num_classes / k)
    gathered = 2 * batch_size if n > 1 else 0
    traffic = row * (3 * batch_size / n + 2 * batch_size / k + gathered)
    network = row * (2 * (k - 1) / k * batch_size / data + (n - 1) / n * batch_size)
    sums = min(num_classes, batch_size) if num_classes <= batch_size or num_features <= 128 else 0
    rows_held = sums + (2 * batch_size if n > 1 else 0)
    return Costs(table, 4 * table, 64 * batch_size + row * rows_held, traffic, network)


class ClassifierCosts(NamedTuple):
    """Bytes on each device, in float32."""

    weights: float  # 4 D C/n: the shard of the table, which the step updates in place
    momentum: float  # 4 D C/n: the state of SGD with momentum
    adam: float  # 8 D C/n: the state of Adam
    sample: float  # 8 D S/n: the sampled rows and their gradient, which the temporaries include
    temporaries: float  # at most; does not grow with C


def classifier_costs(
    num_classes: int, num_features: int, batch_size: int, num_sampled: int, *, devices: int = 1, block_size: int = 1024
) -> ClassifierCosts:
    """Returns the costs of one step of a sampled softmax and of `by_rows`, with the classes spread over the devices.

    Temporaries: the sampled rows, their gradient, its sums, the rows that the optimizer takes and their updates (5 S/n
    rows), 64 bytes of indices for each sampled class, and four blocks of logits (4 B numbers for each class of a
    block). On several devices also the features of the whole batch and their gradient (2 B rows).
    """
    row = 4 * num_features
    rows, sampled = math.ceil(num_classes / devices), math.ceil(num_sampled / devices)
    gathered = 2 * batch_size if devices > 1 else 0
    temporaries = row * (5 * sampled + gathered) + 64 * sampled + 16 * batch_size * min(block_size, sampled)
    return ClassifierCosts(row * rows, row * rows, 2 * row * rows, 2 * row * sampled, temporaries)


@dataclasses.dataclass(frozen=True)
class Config:
    """The size of a step, and the meshes to compare."""

    num_classes: int = 10_000_000
    """number of classes C"""
    num_features: int = 512
    """number of features D"""
    batch_size: int = 16_384
    """number of examples in a step, summed over all devices"""
    itemsize: int = 4
    """bytes of a number in the table of centers: 4 for float32, 2 for bfloat16"""
    sampled_share: float = 0.1
    """share of the classes that a step of the classifier samples"""
    meshes: tuple[str, ...] = ('data=1', 'classes=8', 'classes=64', 'data=8,classes=8', 'data=64')
    """meshes to compare, each with its axes data and classes"""

    def __post_init__(self):
        for name in ('num_classes', 'num_features', 'batch_size', 'itemsize'):
            if getattr(self, name) < 1:
                raise FlagError(f'{flag(name)} must be at least 1, got {getattr(self, name)}')
        if not 0 < self.sampled_share <= 1:
            raise FlagError(f'--sampled-share must be above 0 and at most 1, got {self.sampled_share}')
        if not self.meshes:
            raise FlagError('--meshes must name at least one mesh')
        for mesh in self.meshes:
            mesh_sizes(mesh)


def main(config: Config) -> None:
    sizes = config.num_classes, config.num_features, config.batch_size
    meshes = {mesh: mesh_sizes(mesh) for mesh in config.meshes}
    numbers = 'table GiB', 'dense GiB', 'temporary MiB', 'traffic MiB', 'network MiB'
    centers = _table('centers', 'mesh', numbers)
    for mesh, axes in meshes.items():
        costs = step_costs(*sizes, **axes, itemsize=config.itemsize)
        centers.add_row(mesh, *_rounded([costs.table / GIB, costs.dense / GIB, *(value / MIB for value in costs[2:])]))
    num_sampled = math.ceil(config.sampled_share * config.num_classes)
    numbers = 'weights GiB', 'momentum GiB', 'Adam GiB', 'sample GiB', 'temporary GiB'
    classifier = _table(f'classifier, {num_sampled:,} classes sampled', 'devices', numbers)
    for devices in sorted({math.prod(axes.values()) for axes in meshes.values()}):
        costs = classifier_costs(*sizes, num_sampled, devices=devices)
        classifier.add_row(str(devices), *_rounded([value / GIB for value in costs]))
    console = Console()
    console.print(centers)
    console.print(classifier)


def _table(title: str, first: str, numbers: Sequence[str]) -> Table:
    return Table(Column(first, no_wrap=True), *(Column(name, justify='right') for name in numbers), title=title)


def _rounded(values: Sequence[float]) -> list[str]:
    return [f'{value:.1f}' if value < 10 else f'{value:.0f}' for value in values]


if __name__ == '__main__':
    cli.main(Config, main, prog='experiments.costs')
