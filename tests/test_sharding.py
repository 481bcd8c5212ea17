"""Data parallelism by axis_name: every device makes the move of one device with the whole batch."""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import jax_utils
from jax import P
from jax.sharding import AxisType

import centerloss_jax as clj
from tests.support import oracle
from tests.support.problems import make_problem
from tests.support.programs import collective_sizes
from tests.support.steps import center_state, linen_state, linen_step, make_batch, update

TRANSFORM = clj.center_update(0.5, axis_name='batch')


def local_step(batch, table):
    """The table and the update's state after one step, as each device has them."""
    x, labels = batch
    rows = clj.center_rows(x, table, labels)
    return update(TRANSFORM, rows, TRANSFORM.init(table), table)


def test_two_devices_with_one_class_make_the_move_of_the_whole_batch(per_device):
    # 1.3333 would be the mean of the devices' moves, and 2.6667 their sum.
    x, labels = np.array([[[1], [2]], [[3], [10]]], np.float32), np.zeros((2, 2), np.int32)
    tables, state = per_device(local_step, (x, labels), np.array([[0], [7]], np.float32))
    np.testing.assert_allclose(tables[0], [[1.6], [7]], rtol=1e-6)
    np.testing.assert_array_equal(tables[0], tables[1])
    np.testing.assert_allclose(state.step_norm, [1.6, 1.6], rtol=1e-6)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16], ids=['float32', 'bfloat16'])
def test_all_devices_have_one_table_to_the_bit_and_one_state(per_device, dtype):
    x, centers, labels, _ = make_problem(leading=(8, 6), dtype=np.float32)
    x[1, 2], labels[3, ::2], labels[5] = np.nan, -1, -1  # one device counts nothing
    labels[6, 0] = 77
    centers = np.asarray(jnp.asarray(centers, dtype))
    tables, state = per_device(local_step, (x, labels), centers)
    chex.assert_type(tables, dtype)
    for device in range(1, 8):
        np.testing.assert_array_equal(tables[device], tables[0])
    chex.assert_trees_all_equal(state, jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[0], (8,)), state))

    known = labels != 77
    expected = oracle.center_update(x[known], centers, labels[known], 0.5)
    rtol = 1e-5 if dtype == jnp.float32 else 1e-2
    np.testing.assert_allclose(np.asarray(tables[0], np.float32), expected, rtol=rtol, atol=rtol)
    np.testing.assert_array_equal(state.left_out, [2] * 8)


def replicate(tree, num_devices=8):
    return jax.tree.map(lambda leaf: np.stack([leaf] * num_devices), tree)


def by_pmap(state, images, labels):
    step = jax.pmap(partial(linen_step, axis_name='batch'), axis_name='batch', donate_argnums=0)
    state, loss = step(jax_utils.replicate(state), images, labels)
    for leaf in jax.tree.leaves(state):
        np.testing.assert_array_equal(leaf, jnp.broadcast_to(leaf[:1], leaf.shape))
    return jax_utils.unreplicate(state), loss[0]


def by_shard_map(state, images, labels, check_vma=True, axis_type=AxisType.Auto):
    mesh = jax.make_mesh((8,), ('batch',), axis_types=(axis_type,))
    step = jax.shard_map(
        partial(linen_step, axis_name='batch'),
        mesh=mesh,
        in_specs=(P(), P('batch'), P('batch')),
        out_specs=(P(), P()),
        check_vma=check_vma,
    )
    flat = images.reshape(-1, images.shape[-1]), labels.reshape(-1)
    batch = jax.device_put(flat, jax.NamedSharding(mesh, P('batch')))
    return jax.jit(step, donate_argnums=0)(jax.device_put(state, jax.NamedSharding(mesh, P())), *batch)


WAYS = {
    'pmap': by_pmap,
    'shard_map': by_shard_map,
    'shard_map, Explicit': partial(by_shard_map, axis_type=AxisType.Explicit),
    'shard_map, unchecked': partial(by_shard_map, check_vma=False),
}


@pytest.mark.parametrize('way', WAYS.values(), ids=WAYS.keys())
def test_the_whole_train_step_is_that_of_one_device(way):
    # Left out: every other example of one device, all examples of another.
    images, labels = make_batch(size=64, left_out=[*range(8, 16, 2), *range(40, 48)])
    expected, expected_loss = jax.jit(linen_step)(linen_state(optax.sgd(0.1)), images, labels)
    state = linen_state(optax.sgd(0.1), axis_name='batch')
    state, loss = way(state, images.reshape(8, 8, 6), labels.reshape(8, 8))

    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    for got, want in zip(*map(jax.tree.leaves, (state.params, expected.params)), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max())
    chex.assert_trees_all_close(center_state(state.opt_state), center_state(expected.opt_state), rtol=1e-6)
    assert state.step == 1


def pmapped(fn):
    shapes = ((8, 8, 6), np.float32), ((8, 8), np.int32), ((8, 100_003, 6), np.float32)
    return jax.pmap(fn, axis_name='batch', donate_argnums=2), [jax.ShapeDtypeStruct(*shape) for shape in shapes]


def shard_mapped(fn, axis_type=AxisType.Auto):
    mesh = jax.make_mesh((8,), ('batch',), axis_types=(axis_type,))
    specs = P('batch'), P('batch'), P()
    shapes = ((64, 6), np.float32), ((64,), np.int32), ((100_003, 6), np.float32)
    arrays = [
        jax.ShapeDtypeStruct(*shape, sharding=jax.NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    return jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=P()), donate_argnums=2), arrays


@pytest.mark.parametrize(
    'way',
    [pmapped, shard_mapped, partial(shard_mapped, axis_type=AxisType.Explicit)],
    ids=['pmap', 'shard_map', 'shard_map, Explicit'],
)
def test_what_travels_and_the_temporaries_do_not_grow_with_the_table(way):
    def step(x, labels, table):
        def loss_fn(x):
            loss, rows = clj.center_loss_and_rows(x, table, labels, axis_name='batch')
            return jax.lax.pmean(loss, 'batch'), rows

        (loss, rows), _ = jax.value_and_grad(loss_fn, has_aux=True)(x)
        return *update(TRANSFORM, rows, TRANSFORM.init(table), table), loss

    jitted, arrays = way(step)
    compiled = jitted.lower(*arrays).compile()
    assert 0 < max(collective_sizes(compiled)) <= 64 * 6
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 100_003 * 6 * 4 // 10
    assert memory.alias_size_in_bytes >= 100_003 * 6 * 4


def test_a_mesh_of_two_axes_may_name_both():
    x, centers, labels, _ = make_problem(leading=(16,), dtype=np.float32)
    transform = clj.center_update(0.5, axis_name=('data', 'more'))

    def step(x, labels, table):
        return update(transform, clj.center_rows(x, table, labels), transform.init(table), table)

    mesh = jax.make_mesh((4, 2), ('data', 'more'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    batch = P(('data', 'more'))
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(batch, batch, P()), out_specs=P())
    table, _ = jax.jit(mapped)(x, labels, centers)
    np.testing.assert_allclose(table, oracle.center_update(x, centers, labels, 0.5), rtol=1e-5, atol=1e-6)


def test_a_forgotten_axis_name_is_an_error_under_the_replication_check():
    x, centers, labels, _ = make_problem(leading=(16,), dtype=np.float32)
    transform = clj.center_update(0.5)

    def step(x, labels, table):
        return update(transform, clj.center_rows(x, table, labels), transform.init(table), table)[0]

    mesh = jax.sharding.Mesh(np.array(jax.devices()), ('batch',))
    specs = P('batch'), P('batch'), P()
    mapped = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P())
    with pytest.raises(ValueError, match='out_specs'):
        jax.jit(mapped)(x, labels, centers)


def update_of_centers(axis_name):
    transform = clj.center_update(0.5, axis_name=axis_name)
    return lambda rows, table: update(transform, rows, transform.init(table), table)


def update_of_a_model(axis_name):
    transform = clj.with_centers(optax.sgd(0.1), axis_name=axis_name)

    def step(rows, table):
        model = {'params': jnp.ones(2), 'centers': table}
        return update(transform, {'params': jnp.ones(2), 'centers': rows}, transform.init(model), model)

    return step


@pytest.mark.parametrize('make', [update_of_centers, update_of_a_model], ids=['center_update', 'with_centers'])
class TestUnboundAxisName:
    rows, table = clj.RowUpdates(jnp.arange(3), jnp.ones((3, 2))), jnp.zeros((4, 2))

    @pytest.mark.parametrize('axis_name', ['batch', ('batch', 'more')], ids=str)
    @pytest.mark.parametrize('jit', [False, True], ids=['eager', 'jit'])
    def test_on_one_device_is_an_error(self, make, axis_name, jit):
        step = make(axis_name)
        with pytest.raises(NameError, match=r"axis_name=.*'batch'"):
            (jax.jit(step) if jit else step)(self.rows, self.table)

    @pytest.mark.parametrize('axis_name', ['btach', ('batch', 'mroe')], ids=str)
    def test_with_a_typo_is_an_error_inside_of_another_axis(self, make, axis_name):
        mapped = jax.pmap(make(axis_name), axis_name='batch', in_axes=(0, None))
        with pytest.raises(NameError, match=r'axis_name=.*(btach|mroe)'):
            mapped(replicate(self.rows, 2), self.table)
