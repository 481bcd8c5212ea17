"""Where a run computes: one device, all of them by `jax.jit` over a mesh, or all of them by `jax.pmap`.

The step is the same function in each. What differs is how a state and a batch are laid out, and that is here.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import jax_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MODES = ('auto', 'pmap', 'none')


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices of a run. `axis_name` is set under pmap, `mesh` otherwise."""

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
        if self.mesh is None:
            return jax_utils.replicate(state, list(self.devices))
        return jax.device_put(state, NamedSharding(self.mesh, P()))

    def place_batch(self, images: np.ndarray, labels: np.ndarray) -> tuple[Any, Any]:
        """Spreads a batch over the devices, filled up with the label -1 to a number that they divide."""
        missing = self.rounded_up(len(labels)) - len(labels)
        if missing:
            images = np.pad(images, [(0, missing)] + [(0, 0)] * (images.ndim - 1))
            labels = np.pad(labels, (0, missing), constant_values=-1)
        if self.mesh is not None:
            return jax.device_put((images, labels), NamedSharding(self.mesh, P('data')))
        shards = len(self.devices)
        stacked = images.reshape(shards, -1, *images.shape[1:]), labels.reshape(shards, -1)
        mesh = Mesh(np.array(self.devices), (self.axis_name,))
        return jax.device_put(stacked, NamedSharding(mesh, P(self.axis_name)))

    def rounded_up(self, batch_size: int) -> int:
        """The least number of examples from `batch_size` on that the devices divide."""
        return batch_size + -batch_size % len(self.devices)

    def place_images(self, images: np.ndarray) -> Any:
        """Images for a function of one copy of the state, their number `rounded_up`."""
        return images if self.mesh is None else jax.device_put(images, NamedSharding(self.mesh, P('data')))

    def one(self, tree: Any) -> Any:
        """One copy of what every device has."""
        return tree if self.mesh is not None else jax.tree.map(lambda a: a[0], tree)

    def fetch(self, tree: Any) -> Any:
        """One copy of what every device has, in NumPy, on the host."""
        return self.one(jax.device_get(tree))


def choose(parallel: str) -> Devices:
    """The devices for `--parallel`: 'auto' is a data mesh over all local devices, 'none' the first of them."""
    local = tuple(jax.local_devices())
    if parallel == 'pmap':
        return Devices(local, axis_name='data', mesh=None)
    used = local if parallel == 'auto' else local[:1]
    return Devices(used, axis_name=None, mesh=jax.make_mesh((len(used),), ('data',), (AxisType.Auto,), devices=used))
