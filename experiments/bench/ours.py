"""The step of this library on one center table, in each layout of the table over the devices.

A step computes the loss and its gradient for the features, and moves the centers by Eq. 4. The table is donated.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import centerloss_jax as clj
from experiments.bench.problem import ALPHA, Implementation, Problem
from experiments.data.batches import process_slice
from experiments.launch.mesh import Devices, choose


def center_step(table, state, x, labels, axis_name=None, mesh=None):
    """Returns (table, state, loss, gradient for x) after one step."""

    def loss_fn(x):
        loss, rows = clj.center_loss_and_rows(x, table, labels, axis_name=axis_name)
        return loss if axis_name is None else jax.lax.pmean(loss, axis_name), rows

    (loss, rows), gradient = jax.value_and_grad(loss_fn, has_aux=True)(x)
    transform: Any = clj.center_update(ALPHA, axis_name=axis_name, mesh=mesh)
    updates, state = transform.update(rows, state, table)
    return optax.apply_updates(table, updates), state, loss, gradient


def one_device(problem: Problem) -> Implementation:
    """Runs the step on the default device."""
    table = jnp.ones((problem.num_classes, problem.feature_dim))
    state = clj.center_update().init(table)
    return _compile(jax.jit(center_step, donate_argnums=0), table, state, jax.device_put(problem.batch()))


def all_devices(problem: Problem, devices: Devices, rows_over: str | None = None) -> Implementation:
    """Runs the step on all of `devices`, with the rows of the table sharded over the mesh axis `rows_over`."""
    table = jnp.ones((problem.num_classes, problem.feature_dim))
    state = devices.place_state(clj.center_update().init(table))
    if devices.mesh is not None and rows_over is not None:
        table = clj.shard_centers(table, NamedSharding(devices.mesh, P(rows_over, None)))
    else:
        table = devices.place_state(table)
    step = center_step if devices.mesh is None else partial(center_step, mesh=devices.mesh)
    block, _ = process_slice(problem.batch_size, jax.process_index(), jax.process_count())
    batch = devices.place_batch(*(array[block] for array in problem.batch()))
    return _compile(devices.compile(step), table, state, batch)


def _compile(jitted: Any, table: Any, state: Any, batch: Any) -> Implementation:
    compiled = jitted.lower(table, state, *batch).compile()

    def steps():
        nonlocal table, state
        while True:
            table, state, loss, gradient = jitted(table, state, *batch)
            yield table, loss, gradient
            del loss, gradient  # so that the next step can reuse their memory

    cost = compiled.cost_analysis() or {}
    return Implementation(
        steps(),
        temporary_bytes=compiled.memory_analysis().temp_size_in_bytes,
        accessed_bytes=cost.get('bytes accessed'),
    )


def layouts(devices: Devices, mesh: str | None = None) -> dict[str, Any]:
    """Returns the arms: one device, and the layout that `--mesh` names, or else every layout over the devices."""
    arms: dict[str, Any] = {'centerloss_jax': one_device}
    if mesh is not None:
        rows_over = 'classes' if 'classes' in mesh else None
        return arms | {f'mesh {mesh}': partial(all_devices, devices=devices, rows_over=rows_over)}
    if devices.mesh is None:
        return arms | {'pmap': partial(all_devices, devices=devices)}
    if len(devices.devices) == 1:
        return arms
    arms['mesh, replicated'] = partial(all_devices, devices=devices)
    arms['mesh, by rows'] = partial(all_devices, devices=devices, rows_over='data')
    if jax.process_count() == 1:
        arms['pmap'] = partial(all_devices, devices=choose('pmap'))
    return arms
