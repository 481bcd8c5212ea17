"""Where a run computes: one device, all of them by `jax.jit` over a mesh, or all of them by `jax.pmap`.

The step is the same function in each. What differs is how a state and a batch are laid out, and that is here.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import jax_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import centerloss_jax as clj

MODES = ('auto', 'pmap', 'none')
AXES = ('data', 'classes')


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices of a run. `axis_name` is set under pmap, `mesh` otherwise.

    Over a mesh every device has its share of the examples, and of the centers those rows that the axis 'classes', where
    there is one, gives it.
    """

    devices: tuple[Any, ...]  # of jax.Device
    axis_name: str | None
    mesh: Mesh | None

    def compile(self, step: Callable) -> Callable:
        """Compiles `step(state, images, labels, center_weight) -> (state, metrics)`; the state is updated in place.

        All arguments must have been placed: the step moves nothing to a device by itself.
        """
        if self.axis_name is None:
            return jax.jit(step, donate_argnums=0)
        step = partial(step, axis_name=self.axis_name)
        return jax.pmap(step, self.axis_name, donate_argnums=0, devices=list(self.devices))

    def place_state(self, state: Any) -> Any:
        mesh = self.mesh
        if mesh is None:
            return jax_utils.replicate(state, list(self.devices))
        by_rows = NamedSharding(mesh, P('classes', None) if 'classes' in mesh.axis_names else P())

        def place(path, leaf):
            if _is_table(path):
                return clj.shard_centers(leaf, by_rows)
            return jax.device_put(leaf, NamedSharding(mesh, P()))

        return jax.tree_util.tree_map_with_path(place, state)

    def place_batch(self, images: np.ndarray, labels: np.ndarray) -> tuple[Any, Any]:
        """Spreads a batch over the devices, filled up with the label -1 to a number that they divide."""
        missing = self.rounded_up(len(labels)) - len(labels)
        if missing:
            images = np.pad(images, [(0, missing)] + [(0, 0)] * (images.ndim - 1))
            labels = np.pad(labels, (0, missing), constant_values=-1)
        if self.mesh is not None:
            return jax.device_put((images, labels), NamedSharding(self.mesh, P(self.mesh.axis_names)))
        shards = len(self.devices)
        stacked = images.reshape(shards, -1, *images.shape[1:]), labels.reshape(shards, -1)
        mesh = Mesh(np.array(self.devices), (self.axis_name,))
        return jax.device_put(stacked, NamedSharding(mesh, P(self.axis_name)))

    def rounded_up(self, batch_size: int) -> int:
        """The least number of examples from `batch_size` on that the devices divide."""
        return batch_size + -batch_size % len(self.devices)

    def place_images(self, images: np.ndarray) -> Any:
        """Images for a function of one copy of the state, their number `rounded_up`."""
        if self.mesh is None:
            return images
        return jax.device_put(images, NamedSharding(self.mesh, P(self.mesh.axis_names)))

    def one(self, tree: Any) -> Any:
        """One copy of what the devices have; the centers in C rows, on the host if they are spread over a mesh."""
        if self.mesh is None:
            return jax.tree.map(lambda a: a[0], tree)
        whole = lambda path, leaf: clj.unshard_centers(leaf) if _is_table(path) else leaf  # noqa: E731
        return jax.tree_util.tree_map_with_path(whole, tree)

    def fetch(self, tree: Any) -> Any:
        """One copy of what the devices have, in NumPy, on the host."""
        one = self.one(jax.device_get(tree)) if self.mesh is None else jax.device_get(self.one(tree))
        return jax.tree.map(np.asarray, one)  # a number as an array [], which a save can be compared with


def _is_table(path: Any) -> bool:
    return jax.tree_util.keystr(path, simple=True, separator='/').endswith('center/centers')


def choose(parallel: str, mesh: str | None = None) -> Devices:
    """The devices for `--parallel` and `--mesh`. 'auto' is a mesh over all local ones, 'none' the first."""
    local = tuple(jax.local_devices())
    if mesh is not None:
        sizes = mesh_sizes(mesh)
        if math.prod(sizes.values()) != len(local):
            raise ValueError(f'--mesh {mesh} has {math.prod(sizes.values())} devices, but there are {len(local)}')
        return over_mesh(local, sizes)
    if parallel == 'pmap':
        return Devices(local, axis_name='data', mesh=None)
    used = local if parallel == 'auto' else local[:1]
    return over_mesh(used, {'data': len(used)})


def over_mesh(devices: Sequence[Any], sizes: Mapping[str, int]) -> Devices:
    """These devices as a mesh with axes of these names and sizes."""
    axis_types = (AxisType.Auto,) * len(sizes)
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types, devices=devices)
    return Devices(tuple(devices), axis_name=None, mesh=mesh)


def mesh_sizes(mesh: str) -> dict[str, int]:
    """The axes of a mesh as `--mesh` names them, such as 'data=2,classes=4', and their sizes."""
    sizes = {}
    for axis in mesh.split(','):
        name, _, size = axis.partition('=')
        if name not in AXES or name in sizes or not size.isdecimal() or int(size) < 1:
            raise ValueError(
                f'--mesh must name the axes {" and ".join(AXES)}, or one of them, each once with its number of '
                f'devices, such as data=2,classes=4; got {mesh}'
            )
        sizes[name] = int(size)
    return sizes
