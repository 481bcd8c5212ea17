"""The devices of a run: one device, several by `jax.jit` over a mesh, or several by `jax.pmap`.

The same step function runs on each. The layout of the state and of a batch differs, and this module hides it.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import jax_utils
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import centerloss_jax as clj
from experiments.launch.errors import FlagError
from experiments.launch.mesh_axes import mesh_sizes


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices of a run. `axis_name` is set under pmap, `mesh` otherwise.

    The examples are split over all devices of the mesh. The rows of the centers are split over its axis 'classes', if
    it has one.
    """

    devices: tuple[Any, ...]  # of jax.Device
    axis_name: str | None
    mesh: Mesh | None

    def compile(self, step: Callable) -> Callable:
        """Compiles `step(state, images, labels, center_weight) -> (state, metrics)`; the state is updated in place.

        All arguments must be on their devices, since the step transfers none.
        """
        if self.axis_name is None:
            return jax.jit(step, donate_argnums=0)
        step = partial(step, axis_name=self.axis_name)
        return jax.pmap(step, self.axis_name, donate_argnums=0, devices=list(self.devices))

    def place_state(self, state: Any) -> Any:
        """Replicates a state over the devices; the rows of the centers are split over the axis 'classes'."""
        mesh = self.mesh
        if mesh is None:
            assert self.axis_name is not None
            # With the axis of pmap, the first step and the later ones get one layout, and so one program.
            return jax_utils.replicate(state, list(self.devices), self.axis_name)
        by_rows = NamedSharding(mesh, P('classes', None) if 'classes' in mesh.axis_names else P())

        def place(path, leaf):
            if _is_table(path):
                return clj.shard_centers(leaf, by_rows)
            return _put(leaf, NamedSharding(mesh, P()))

        return jax.tree_util.tree_map_with_path(place, state)

    def place_batch(self, images: np.ndarray, labels: np.ndarray) -> tuple[Any, Any]:
        """Splits a batch, or this process's part of it, over the devices, padded with repeated images of label -1."""
        missing = -len(labels) % (len(self.devices) // jax.process_count())
        if missing:
            images = np.resize(images, (len(images) + missing, *images.shape[1:]))
            labels = np.pad(labels, (0, missing), constant_values=-1)
        if self.mesh is not None:
            return self.spread((images, labels))
        shards = len(self.devices)
        stacked = images.reshape(shards, -1, *images.shape[1:]), labels.reshape(shards, -1)
        mesh = Mesh(np.array(self.devices), (self.axis_name,))
        return jax.device_put(stacked, NamedSharding(mesh, P(self.axis_name)))

    def rounded_up(self, batch_size: int) -> int:
        """Returns `batch_size` rounded up to a multiple of the number of devices."""
        return batch_size + -batch_size % len(self.devices)

    def spread(self, arrays: Any) -> Any:
        """Splits arrays of examples, or this process's part of them, over the mesh, if there is one."""
        if self.mesh is None:
            return arrays
        with jax.transfer_guard('allow'):  # with several processes this counts as an implicit transfer
            return jax.make_array_from_process_local_data(NamedSharding(self.mesh, P(self.mesh.axis_names)), arrays)

    def gather(self, arrays: Any) -> Any:
        """Gathers arrays that `spread` split, or results from them, into whole NumPy arrays."""
        if jax.process_count() == 1:
            return jax.device_get(arrays)
        return multihost_utils.process_allgather(arrays, tiled=True)

    def one(self, tree: Any) -> Any:
        """Returns one copy of a replicated tree; centers that a mesh has split are joined to C rows on the host."""
        if self.mesh is None:
            return jax.tree.map(lambda a: a[0], tree)
        whole = lambda path, leaf: clj.unshard_centers(leaf) if _is_table(path) else leaf  # noqa: E731
        return jax.tree_util.tree_map_with_path(whole, tree)

    def fetch(self, tree: Any) -> Any:
        """Returns one copy of a replicated tree as NumPy arrays."""
        one = self.one(jax.device_get(tree)) if self.mesh is None else jax.device_get(self.one(tree))
        return jax.tree.map(np.asarray, one)  # scalars become arrays [], as in a save


def _put(leaf: Any, sharding: NamedSharding) -> Any:
    """Puts an array on its devices; unlike `jax.device_put`, does not compare the values of several processes."""
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    host = np.asarray(jax.device_get(leaf))
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _is_table(path: Any) -> bool:
    return jax.tree_util.keystr(path, simple=True, separator='/').endswith('center/centers')


def choose(parallel: str, mesh: str | None = None) -> Devices:
    """Returns the devices that `--parallel` and `--mesh` select.

    'auto' is a mesh over the devices of all processes, 'none' is the first device of this process.
    """
    # Ordered by process, so that each process holds consecutive examples of a batch.
    found = tuple(sorted(jax.devices(), key=lambda device: (device.process_index, device.id)))
    if mesh is not None:
        sizes = mesh_sizes(mesh)
        if math.prod(sizes.values()) != len(found):
            raise FlagError(f'--mesh {mesh} has {math.prod(sizes.values())} devices, but there are {len(found)}')
        return over_mesh(found, sizes)
    if parallel == 'pmap':
        return Devices(found, axis_name='data', mesh=None)
    used = found if parallel == 'auto' else jax.local_devices()[:1]
    return over_mesh(used, {'data': len(used)})


def over_mesh(devices: Sequence[Any], sizes: Mapping[str, int]) -> Devices:
    """Returns the devices as a mesh whose axes have these names and sizes."""
    grid = np.array(devices).reshape(*sizes.values())
    mesh = Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    return Devices(tuple(devices), axis_name=None, mesh=mesh)
