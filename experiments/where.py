"""Where an experiment computes: the flags that all of them share. They say how, and never what comes out."""

import dataclasses
from typing import Literal

from experiments.devices import Devices, choose, mesh_sizes


@dataclasses.dataclass(frozen=True)
class Where:
    """Flags for one device, several, or a mesh. An experiment's settings are a subclass."""

    parallel: Literal['auto', 'pmap', 'none'] = 'auto'
    """devices: auto is all by jit over a mesh, pmap all by jax.pmap, none the first alone"""
    mesh: str | None = None
    """a mesh such as data=2,classes=4, in place of auto's data=8: examples lie over all of its devices, the rows of the
    centers over the axis classes"""

    def __post_init__(self):
        if self.mesh is not None:
            mesh_sizes(self.mesh)
            if self.parallel != 'auto':
                raise ValueError(f'--mesh is a way of --parallel auto; leave out --parallel {self.parallel}, or --mesh')

    def start(self) -> Devices:
        """The devices. Nothing may ask JAX for one before."""
        return choose(self.parallel, self.mesh)
