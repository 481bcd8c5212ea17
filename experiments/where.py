"""Where an experiment computes: the flags that all of them share. They say how, and never what comes out."""

import dataclasses
from typing import Literal

import simple_parsing

from experiments import processes
from experiments.devices import Devices, choose, mesh_sizes


@dataclasses.dataclass(frozen=True)
class Where:
    """Flags for one device, several, or those of several processes. An experiment's settings are a subclass."""

    parallel: Literal['auto', 'pmap', 'none'] = 'auto'
    """devices: auto is all by jit over a mesh, pmap all by jax.pmap, none the first alone"""
    mesh: str | None = None
    """a mesh such as data=2,classes=4, in place of auto's data=8: examples lie over all of its devices, the rows of the
    centers over the axis classes"""
    distributed: bool = simple_parsing.field(default=False, action='store_true')
    """be one of several processes, which jax.distributed finds under Slurm, GKE, MPI and on TPU pods"""
    coordinator: str | None = None
    """be one of several processes, which meet at HOST:PORT of process 0, where JAX cannot find them itself"""
    num_processes: int | None = None
    """with --coordinator: how many there are"""
    process_id: int | None = None
    """with --coordinator: which one this is, from 0"""

    def __post_init__(self):
        named = {'--coordinator': self.coordinator, '--num-processes': self.num_processes}
        named['--process-id'] = self.process_id
        missing = [flag for flag, value in named.items() if value is None]
        if 0 < len(missing) < len(named):
            raise ValueError(f'{", ".join(named)} go together; {" and ".join(missing)} is missing')
        if self.coordinator is not None:
            host, _, port = self.coordinator.rpartition(':')
            if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
                raise ValueError(f'--coordinator must be HOST:PORT, got {self.coordinator}')
        if self.num_processes is not None and self.num_processes < 1:
            raise ValueError(f'--num-processes must be at least 1, got {self.num_processes}')
        if self.process_id is not None and not 0 <= self.process_id < (self.num_processes or 0):
            raise ValueError(f'--process-id must be from 0 to {(self.num_processes or 0) - 1}, got {self.process_id}')
        if self.mesh is not None:
            mesh_sizes(self.mesh)
        if self.parallel != 'auto':
            for flag, given in (('--mesh', self.mesh), ('--distributed', self.distributed), *named.items()):
                if given:
                    raise ValueError(f'{flag} goes with --parallel auto alone; leave out --parallel {self.parallel}')

    def join(self) -> None:
        """Makes this process one of several, if it is to be. Nothing may ask JAX for a device before."""
        if self.distributed or self.coordinator is not None:
            processes.join(self.coordinator, self.num_processes, self.process_id)

    def start(self) -> Devices:
        """The devices, those of all processes together."""
        return choose(self.parallel, self.mesh)
