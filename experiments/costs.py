"""What a center table costs a device: memory, and bytes a step. The model is a few products, and a table of them.

B examples a step, D features, C classes, numbers of s bytes; n devices, of which k share the rows of the table. Every
device has B/n of the examples, and every group of k devices the whole table.
"""

import dataclasses
import math
from typing import NamedTuple

from rich.console import Console
from rich.table import Column, Table

from experiments.launch import cli
from experiments.launch.errors import FlagError
from experiments.launch.flags import flag
from experiments.launch.mesh import mesh_sizes

GIB, MIB = 2**30, 2**20


class Costs(NamedTuple):
    """Bytes, for each device."""

    table: float  # s D C/k: its part of the table, which the step updates in place
    dense: float  # 4 times that: the same table with a dense gradient and the two moments of Adam
    temporaries: float  # 2 s B D at most, whatever C is
    traffic: float  # a step's reads and writes of its memory, caches and temporaries left aside
    network: float  # what it receives in a step


def step_costs(
    num_classes: int, num_features: int, batch_size: int, *, data: int = 1, classes: int = 1, itemsize: int = 4
) -> Costs:
    """The costs of one step of loss, gradient for the features and Eq. 4, on a mesh (data, classes) of devices.

    Traffic: a device reads its features and writes their gradient (2 B/n rows of D), reads the centers of the examples
    that its group looks up in its part (B/n), and adds to those that moved there (2 B/k); so 5 B rows on one device. On
    more than one it also writes and reads the rows of the whole batch (2 B).

    Network, with ring collectives: an all-reduce of the group's looked-up centers, 2 (k-1)/k of B k/n rows, and an
    all-gather of the rows of the whole batch, (n-1)/n of B.
    """
    n, k = data * classes, classes
    row = num_features * itemsize
    table = row * math.ceil(num_classes / k)
    gathered = 2 * batch_size if n > 1 else 0
    traffic = row * (3 * batch_size / n + 2 * batch_size / k + gathered)
    network = row * (2 * (k - 1) / k * batch_size / data + (n - 1) / n * batch_size)
    return Costs(table, 4 * table, 2 * batch_size * row, traffic, network)


@dataclasses.dataclass(frozen=True)
class Config:
    """The job, and the meshes that it is to be compared on."""

    num_classes: int = 10_000_000
    """number of classes C"""
    num_features: int = 512
    """number of features D"""
    batch_size: int = 16_384
    """number of examples in a step, summed over all devices"""
    itemsize: int = 4
    """bytes of a number in the table: 4 for float32, 2 for bfloat16"""
    meshes: tuple[str, ...] = ('data=1', 'classes=8', 'classes=64', 'data=8,classes=8', 'data=64')
    """meshes to compare, each with its axes data and classes"""

    def __post_init__(self):
        for name in ('num_classes', 'num_features', 'batch_size', 'itemsize'):
            if getattr(self, name) < 1:
                raise FlagError(f'{flag(name)} must be at least 1, got {getattr(self, name)}')
        if not self.meshes:
            raise FlagError('--meshes must name at least one mesh')
        for mesh in self.meshes:
            mesh_sizes(mesh)


def main(config: Config) -> None:
    numbers = ('table GiB', 'dense GiB', 'temporary MiB', 'traffic MiB', 'network MiB')
    table = Table(Column('mesh', no_wrap=True), *(Column(name, justify='right') for name in numbers))
    job = config.num_classes, config.num_features, config.batch_size
    for mesh in config.meshes:
        costs = step_costs(*job, **mesh_sizes(mesh), itemsize=config.itemsize)
        shown = [costs.table / GIB, costs.dense / GIB, *(each / MIB for each in costs[2:])]
        table.add_row(mesh, *(f'{each:.1f}' if each < 10 else f'{each:.0f}' for each in shown))
    Console().print(table)


if __name__ == '__main__':
    cli.main(Config, main, prog='experiments.costs')
