"""jit over a mesh: for each layout of the table, the step of one device, in place, with no collective of its size."""

from functools import partial
from typing import Any

import chex
import jax
import numpy as np
import optax
import pytest
from jax import P
from jax.sharding import AxisType, NamedSharding

import centerloss_jax as clj
from tests.support.cases import some_by_default
from tests.support.problems import make_problem
from tests.support.programs import AS_USERS, collective_sizes, collectives_in_loops

# Far more classes than examples, since XLA may gather a small table. No mesh divides the number of classes.
B, D, C = 64, 6, 100_003


def step(table, state, x, labels, mesh=None):
    def loss_fn(x):
        return clj.center_loss_and_rows(x, table, labels)

    (loss, rows), gradient = jax.value_and_grad(loss_fn, has_aux=True)(x)
    updates, state = clj.center_update(0.5, mesh=mesh).update(rows, state, table)
    return optax.apply_updates(table, updates), state, loss, gradient


def make_arrays():
    x, table, labels, _ = make_problem(leading=(B,), num_classes=C, num_features=D, dtype=np.float32)
    labels[::7] = -1
    labels[[9, 17, 18, 40, 62]], labels[[10, 63]] = 5, C - 1  # examples of one class on several devices
    labels[:8], x[5] = -1, np.nan  # all examples of the first device are left out
    return table, clj.center_update().init(table), x, labels


@pytest.fixture(scope='module')
def one_device():
    arrays = make_arrays()
    return arrays, jax.jit(step)(*arrays)


# Shape of the mesh, layout of the table, layout of the batch.
BOTH = ('data', 'classes')
LAYOUTS = {
    'replicated': ((8,), P(), P('data')),
    'by rows': ((8,), P('data', None), P('data')),
    'two axes, replicated': ((2, 4), P(), P('data')),
    'two axes, by rows': ((2, 4), P('classes', None), P('data')),
    'two axes, by rows, batch over both': ((2, 4), P('classes', None), P(BOTH)),
    'two axes, by rows along the batch': ((2, 4), P('data', None), P('data')),
    'two axes, by rows over both': ((2, 4), P(BOTH, None), P('data')),
    'two axes, all over both': ((2, 4), P(BOTH, None), P(BOTH)),
}
MESHES = {
    'Auto, mesh=': (AxisType.Auto, 'argument'),
    'Auto, set_mesh': (AxisType.Auto, 'set_mesh'),
    'Explicit': (AxisType.Explicit, 'nothing'),
}

CASES = {f'{mesh}, {layout}': (*MESHES[mesh], *LAYOUTS[layout]) for mesh in MESHES for layout in LAYOUTS}
BY_DEFAULT = [
    'Auto, mesh=, two axes, by rows along the batch',
    'Auto, set_mesh, two axes, all over both',
    'Explicit, two axes, by rows along the batch',
]


@pytest.mark.parametrize(('axis_type', 'named_by', 'shape', 'spec', 'batch_spec'), some_by_default(CASES, *BY_DEFAULT))
def test_the_step_equals_the_step_of_one_device_and_moves_no_table(
    one_device, axis_type, named_by, shape, spec, batch_spec
):
    (table, state, x, labels), expected = one_device
    mesh = jax.make_mesh(shape, BOTH[: len(shape)], axis_types=(axis_type,) * len(shape))
    put = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))  # noqa: E731
    sharded = clj.shard_centers(table, NamedSharding(mesh, spec))
    shard = sharded.addressable_shards[0].data.nbytes
    arrays = sharded, put(state, P()), put(x, batch_spec), put(labels, batch_spec)
    lowered = partial(step, mesh=mesh if named_by == 'argument' else None)
    with jax.set_mesh(mesh if named_by == 'set_mesh' else jax.sharding.get_mesh()):
        compiled = jax.jit(lowered, donate_argnums=0).lower(*arrays).compile(AS_USERS)
        moved, state, loss, gradient = compiled(*arrays)

    assert moved.sharding.is_equivalent_to(sharded.sharding, 2)
    moved = clj.unshard_centers(moved, C)
    for got, want in zip((moved, loss, gradient), expected[:1] + expected[2:], strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max())
    chex.assert_trees_all_close(state, expected[1], rtol=1e-6)
    sizes = collective_sizes(compiled)
    # Each part of a table sharded over eight devices has far more elements than the batch.
    assert sizes
    assert max(sizes) <= 2 * B * D
    assert not collectives_in_loops(compiled)
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < C * D * 4 // 8 // 4
    assert memory.alias_size_in_bytes >= shard


@pytest.mark.parametrize('spec', [P(), P('data', None)], ids=['replicated', 'by rows'])
@pytest.mark.parametrize('axis_type', [AxisType.Auto, AxisType.Explicit], ids=lambda axis_type: axis_type.name)
@pytest.mark.parametrize('num_classes', [C - 3, pytest.param(16, marks=pytest.mark.slow)])
def test_rows_are_added_in_place_without_an_update(axis_type, spec, num_classes):
    def add(table, x, labels):
        return table + clj.center_rows(x, table, labels)

    table, _, x, labels = make_arrays()
    table, labels = table[:num_classes], np.minimum(labels, num_classes - 1)
    mesh = jax.make_mesh((8,), ('data',), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(table, NamedSharding(mesh, spec))
        batch = jax.device_put((x, labels), NamedSharding(mesh, P('data')))
        compiled = jax.jit(add, donate_argnums=0).lower(sharded, *batch).compile(AS_USERS)
        moved = compiled(sharded, *batch)
    np.testing.assert_allclose(moved, jax.jit(add)(table, x, labels), rtol=0, atol=1e-6 * np.abs(table).max())
    assert max(collective_sizes(compiled)) <= 2 * B * D
    assert not collectives_in_loops(compiled)
