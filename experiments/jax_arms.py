"""What the benchmark measures of this library: one step on one table, in each layout over the devices.

A step is the loss, its gradient for the features, and the centers moved by Eq. 4, with the table donated.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import centerloss_jax as clj

ALPHA = 0.5


class Cell(NamedTuple):
    """The size of a problem."""

    batch_size: int
    num_classes: int
    feature_dim: int

    def batch(self) -> tuple[np.ndarray, np.ndarray]:
        """Features and labels, the same for every arm."""
        rng = np.random.default_rng(0)
        x = rng.standard_normal((self.batch_size, self.feature_dim), np.float32)
        return x, rng.integers(0, self.num_classes, self.batch_size, np.int32)


class Arm(NamedTuple):
    """Steps that wait for their results, and what the compiler says of them, where there is one."""

    steps: Iterator[Any]
    temporary_bytes: int | None = None
    accessed_bytes: float | None = None


def step(table, state, x, labels, axis_name=None, mesh=None):
    """(table, state, loss, gradient for x)."""

    def loss_fn(x):
        loss, rows = clj.center_loss_and_rows(x, table, labels, axis_name=axis_name)
        return loss if axis_name is None else jax.lax.pmean(loss, axis_name), rows

    (loss, rows), gradient = jax.value_and_grad(loss_fn, has_aux=True)(x)
    transform: Any = clj.center_update(ALPHA, axis_name=axis_name, mesh=mesh)
    updates, state = transform.update(rows, state, table)
    return optax.apply_updates(table, updates), state, loss, gradient


def _arm(compiled: Any, table: Any, state: Any, batch: Any) -> Arm:
    def steps():
        nonlocal table, state
        while True:
            table, state, *rest = compiled(table, state, *batch)
            yield jax.block_until_ready((table, rest))

    cost = compiled.cost_analysis() or {}
    return Arm(steps(), compiled.memory_analysis().temp_size_in_bytes, cost.get('bytes accessed'))


def _compile(jitted: Any, table: Any, batch: Any, state: Any = None) -> Arm:
    state = clj.center_update().init(table) if state is None else state
    return _arm(jitted.lower(table, state, *batch).compile(), table, state, batch)


def one_device(cell: Cell) -> Arm:
    table = jnp.ones((cell.num_classes, cell.feature_dim))
    return _compile(jax.jit(step, donate_argnums=(0, 1)), table, jax.device_put(cell.batch()))


def _mesh(cell: Cell, by_rows: bool) -> Arm:
    mesh = jax.make_mesh((jax.device_count(),), ('data',), (AxisType.Auto,))
    layout = NamedSharding(mesh, P('data', None) if by_rows else P())
    table = clj.shard_centers(jnp.ones((cell.num_classes, cell.feature_dim)), layout)
    state = jax.device_put(clj.center_update().init(table), NamedSharding(mesh, P()))
    batch = jax.device_put(cell.batch(), NamedSharding(mesh, P('data')))
    return _compile(jax.jit(partial(step, mesh=mesh), donate_argnums=(0, 1)), table, batch, state)


def replicated(cell: Cell) -> Arm:
    return _mesh(cell, by_rows=False)


def by_rows(cell: Cell) -> Arm:
    return _mesh(cell, by_rows=True)


def pmapped(cell: Cell) -> Arm:
    devices = jax.device_count()
    mesh = jax.make_mesh((devices,), ('data',), (AxisType.Auto,))
    spread = NamedSharding(mesh, P('data'))
    table = jax.device_put(np.ones((devices, cell.num_classes, cell.feature_dim), np.float32), spread)
    state = jax.device_put(
        jax.tree.map(lambda a: np.zeros((devices,), a.dtype), clj.center_update().init(table)), spread
    )
    batch = jax.device_put(tuple(a.reshape(devices, -1, *a.shape[1:]) for a in cell.batch()), spread)
    mapped = jax.pmap(partial(step, axis_name='data'), 'data', donate_argnums=(0, 1))
    return _compile(mapped, table, batch, state)


def arms() -> dict[str, Any]:
    """What this machine can measure; with one device there is one layout."""
    several = {'mesh, replicated': replicated, 'mesh, by rows': by_rows, 'pmap': pmapped}
    return {'centerloss_jax': one_device, **(several if jax.device_count() > 1 else {})}
