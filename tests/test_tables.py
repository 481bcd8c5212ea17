"""Tables on a mesh: padding, what a pad row does, saving and restoring, and the functions that search a whole table."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import centerloss_jax as clj
from tests.support import oracle
from tests.support.programs import collective_sizes

TABLES = [P(), P('classes', None), P('data', None), P(('data', 'classes'), None)]


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=['auto', 'explicit'])
def mesh(request):
    return jax.make_mesh((2, 4), ('data', 'classes'), axis_types=(request.param,) * 2)


def mesh_of(num_devices: int) -> Mesh:
    return jax.make_mesh((num_devices,), ('classes',), (AxisType.Auto,), devices=jax.devices()[:num_devices])


def over(num_devices: int) -> NamedSharding:
    return NamedSharding(mesh_of(num_devices), P('classes', None))


@pytest.fixture
def table() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)


@pytest.mark.parametrize(('num_devices', 'rows'), [(8, 16), (4, 12), (2, 10), (1, 10)])
def test_a_table_is_filled_up_to_what_the_mesh_divides(table, num_devices, rows):
    sharded = clj.shard_centers(table, over(num_devices))
    assert sharded.shape == (rows, 3)
    assert len(sharded.sharding.device_set) == num_devices
    np.testing.assert_array_equal(sharded[:10], table)
    assert np.isposinf(sharded[10:]).all()


def test_a_table_saved_on_eight_devices_is_restored_on_four_and_on_one(table, tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        saved = clj.unshard_centers(clj.shard_centers(table, over(8)), num_classes=10)
        for num_devices in (4, 1):
            path = tmp_path / str(num_devices)
            checkpointer.save(path, {'centers': saved})
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(path, {'centers': np.zeros((10, 3), np.float32)})['centers']
            sharded = clj.shard_centers(restored, over(num_devices))
            saved = clj.unshard_centers(sharded, num_classes=10)
            np.testing.assert_array_equal(saved, table)


@pytest.mark.parametrize('num_classes', [9, 11, 17])
def test_a_wrong_number_of_classes_loses_no_center(table, num_classes):
    with pytest.raises(ValueError, match='num_classes'):
        clj.unshard_centers(clj.shard_centers(table, over(8)), num_classes)


@pytest.mark.parametrize('num_classes', [None, 10])
def test_a_center_that_became_inf_is_saved_with_those_behind_it(table, num_classes):
    table[4] = np.inf
    saved = clj.unshard_centers(clj.shard_centers(table, over(8)), num_classes)
    np.testing.assert_array_equal(saved, table)


@pytest.mark.parametrize('sizes', [(1, 1), (8, 1), (1, 8), (2, 4)])
def test_explicit_axes_need_no_jit(table, sizes):
    # An axis of one device is an axis too.
    devices = jax.devices()[: sizes[0] * sizes[1]]
    mesh = jax.make_mesh(sizes, ('data', 'classes'), axis_types=(AxisType.Explicit,) * 2, devices=devices)
    x, labels = np.ones((16, 3), np.float32), np.array([*range(10), -1, 3, 3, -1, 9, 0])
    on_mesh = jax.device_put((x, labels), NamedSharding(mesh, P(('data', 'classes'))))
    centers = clj.shard_centers(table, NamedSharding(mesh, P('classes')))
    loss = clj.center_loss(on_mesh[0], centers, on_mesh[1])
    np.testing.assert_allclose(loss, oracle.center_loss(x, table, labels), rtol=1e-6)
    np.testing.assert_array_equal(clj.center_rows(on_mesh[0], centers, on_mesh[1]).indices, labels)
    statistics = clj.class_statistics(on_mesh[0], on_mesh[1], 10)
    np.testing.assert_array_equal(statistics.count, [2, 1, 1, 3, 1, 1, 1, 1, 1, 2])


def test_a_label_that_hits_a_pad_row_is_a_mistake(table):
    mesh = mesh_of(8)
    centers = clj.shard_centers(table, NamedSharding(mesh, P('classes', None)))
    x, labels = jnp.ones((2, 3)), jnp.array([4, 12])

    @jax.jit
    def step(x):
        each, rows = clj.center_loss_and_rows(x, centers, labels, reduce_fn=None)
        return each, jax.grad(lambda x: clj.center_loss(x, centers, labels, reduce_fn=None)[0])(x), rows

    each, gradient, rows = step(x)
    assert np.isnan(each).tolist() == [False, True]
    assert np.isfinite(gradient).all()
    tx = clj.center_update(0.5, mesh=mesh)
    updates, state = jax.jit(tx.update)(rows, tx.init(centers), centers)
    assert state.left_out == 1
    moved: Any = optax.apply_updates(centers, updates)
    assert np.isposinf(moved[10:]).all()
    np.testing.assert_array_equal(np.flatnonzero((moved[:10] != table).any(axis=1)), [4])


def test_a_pad_row_is_found_where_the_mesh_is_larger_than_this_machine():
    centers = jnp.zeros((32, 3)).at[20:].set(jnp.inf)
    with jax.sharding.use_abstract_mesh(AbstractMesh((16,), ('classes',), axis_types=(AxisType.Auto,))):
        each = jax.jit(partial(clj.center_loss, reduce_fn=None))(jnp.ones((3, 3)), centers, jnp.array([19, 20, 31]))
    np.testing.assert_array_equal(each, [3, np.nan, np.nan])


def test_a_center_that_became_inf_is_no_padding_for_the_classes_after_it():
    centers = jnp.zeros((8, 3)).at[3].set(jnp.inf)
    loss, rows = jax.jit(clj.center_loss_and_rows)(jnp.ones((2, 3)), centers, jnp.array([2, 7]))
    assert loss == 3
    assert rows.indices.tolist() == [2, 7]


@pytest.fixture(scope='module')
def nearest():
    rng = np.random.default_rng(1)
    x, centers = rng.normal(size=(16, 3)).astype(np.float32), rng.normal(size=(4093, 3)).astype(np.float32)
    return x, centers, oracle.nearest_center(x, centers)


@pytest.mark.parametrize('batch_spec', [P('data'), P(('data', 'classes'))], ids=lambda spec: f'batch {spec}')
@pytest.mark.parametrize('spec', TABLES, ids=str)
def test_the_nearest_center_is_the_same_on_a_mesh_and_the_table_stays(nearest, mesh, spec, batch_spec):
    x, centers, (expected_labels, expected_distances) = nearest
    table = clj.shard_centers(centers, NamedSharding(mesh, spec))
    batch = jax.device_put(x, NamedSharding(mesh, batch_spec))
    compiled = jax.jit(clj.nearest_center).lower(batch, table).compile()
    labels, distances = compiled(batch, table)
    np.testing.assert_array_equal(labels, expected_labels)
    np.testing.assert_allclose(distances, expected_distances, rtol=1e-6)
    assert max(collective_sizes(compiled), default=0) < 512  # a device's part of the table has 1,536 numbers


@pytest.mark.parametrize('spec', [P('data'), P(('data', 'classes'))], ids=str)
def test_class_statistics_are_the_same_on_a_mesh(mesh, spec):
    rng = np.random.default_rng(2)
    x, labels = rng.normal(size=(16, 2, 3)).astype(np.float32), rng.integers(-1, 4, (16, 2)).astype(np.int32)
    labels[-2:] = -1  # all that the last device has
    place = lambda a: jax.device_put(a, NamedSharding(mesh, spec))  # noqa: E731
    on_mesh = jax.jit(lambda x, labels: clj.class_statistics(x, labels, 4))(place(x), place(labels))
    alone = clj.class_statistics(x, labels, 4)
    for field in ('count', 'mean', 'squared_deviation', 'intra', 'inter', 'ratio'):
        np.testing.assert_allclose(getattr(on_mesh, field), getattr(alone, field), rtol=1e-6, atol=1e-7)
