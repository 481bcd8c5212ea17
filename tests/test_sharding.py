"""axis_name, meshes and processes: every device has the loss and the centers of one device with the whole batch."""

import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import jax_utils
from jax import P
from jax.sharding import AxisType, NamedSharding

import centerloss_jax as clj
from tests.support import one_of_two, oracle
from tests.support.cases import some_by_default
from tests.support.problems import make_problem
from tests.support.steps import SGD, center_state, linen_state, linen_step, linen_table, make_batch, update

TRANSFORM = clj.center_update(0.5, axis_name='batch')


def local_step(batch, table):
    """Returns the table and the state after one step on each device."""
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
    x[1, 2], labels[3, ::2], labels[5] = np.nan, -1, -1  # all examples of one device are left out
    labels[6, 0] = 77
    centers = np.asarray(jnp.asarray(centers, dtype))
    tables, state = per_device(local_step, (x, labels), centers)
    chex.assert_type(tables, dtype)
    for device in range(1, 8):
        np.testing.assert_array_equal(tables[device], tables[0])
    chex.assert_trees_all_equal(state, jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[0], (8,)), state))

    valid = labels != 77
    expected = oracle.center_update(x[valid], centers, labels[valid], 0.5)
    rtol = 1e-5 if dtype == jnp.float32 else 1e-2
    np.testing.assert_allclose(np.asarray(tables[0], np.float32), expected, rtol=rtol, atol=rtol)
    np.testing.assert_array_equal(state.dropped, [2] * 8)


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


@pytest.mark.parametrize('way', some_by_default(WAYS, 'pmap', 'shard_map, Explicit'))
def test_the_train_step_equals_the_step_of_one_device(way):
    # Left out are every other example of one device and all examples of another.
    images, labels = make_batch(size=64, left_out=[*range(8, 16, 2), *range(40, 48)])
    expected, expected_loss = jax.jit(linen_step)(linen_state(SGD), images, labels)
    state = linen_state(SGD, axis_name='batch')
    state, loss = way(state, images.reshape(8, 8, 6), labels.reshape(8, 8))

    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    for got, want in zip(*map(jax.tree.leaves, (state.params, expected.params)), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max())
    chex.assert_trees_all_close(center_state(state.opt_state), center_state(expected.opt_state), rtol=1e-6)
    assert state.step == 1


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


def data_parallel_step(batch, replicated):
    """Returns loss and gradients by the documented recipe: pmean of the loss inside, of the gradients after."""
    x, labels, where = batch

    def loss_fn(replicated):
        centers, scale = replicated
        loss = clj.center_loss(scale * x, centers, labels, where=where, axis_name='batch')
        return jax.lax.pmean(loss, 'batch')

    loss, gradients = jax.value_and_grad(loss_fn)(replicated)
    return loss, jax.lax.pmean(gradients, 'batch')


@pytest.mark.parametrize('by', ['label', 'where'])
def test_devices_that_count_different_numbers_agree_with_one_device(per_device, by):
    # Squared distances [1, 1] on one device, [4, left out] on the other: the mean of the means would be 2.5.
    x = np.array([[[2, 1], [1, 2]], [[3, 1], [50, 60]]], np.float32)
    centers = np.array([[1, 1], [9, 9], [7, 7]], np.float32)
    labels, where = np.zeros((2, 2), np.int32), np.ones((2, 2), bool)
    if by == 'label':
        labels[1, 1] = -1
    else:
        where[1, 1] = False

    loss, (for_centers, _) = per_device(data_parallel_step, (x, labels, where), (centers, np.float32(1)))
    np.testing.assert_allclose(loss, [2, 2], rtol=1e-6)
    _, expected, _ = oracle.center_loss_gradients(x.reshape(4, 2), centers, labels.reshape(4), where=where.reshape(4))
    for device in range(2):
        np.testing.assert_allclose(for_centers[device], expected, rtol=1e-6)


@pytest.mark.parametrize('fewest', [False, True], ids=['one device counts nothing', 'one example in all'])
def test_some_devices_may_count_nothing(per_device, fewest):
    x, centers, labels, options = make_problem(leading=(4, 6), dtype=np.float32, masked=True)
    where, scale = options['where'], np.float32(1.5)
    if fewest:
        # Fewer examples than devices: the mean count is below one.
        where[:], labels[1, 2], where[1, 2] = False, 3, True
    else:
        where[2] = False
    loss, gradients = per_device(data_parallel_step, (x, labels, where), (centers, scale))

    def one_device(replicated):
        centers, scale = replicated
        return clj.center_loss(scale * x.reshape(24, 3), centers, labels.reshape(24), where=where.reshape(24))

    expected, expected_gradients = jax.value_and_grad(one_device)((centers, scale))
    for device in range(4):
        np.testing.assert_allclose(loss[device], expected, rtol=1e-5)
        got = jax.tree.map(lambda a, device=device: a[device], gradients)
        chex.assert_trees_all_close(got, expected_gradients, rtol=1e-5, atol=1e-6)


def test_the_loss_is_zero_if_no_device_counts_an_example(per_device):
    batch = (np.ones((2, 3, 2), np.float32), np.full((2, 3), -1, np.int32), np.ones((2, 3), bool))
    loss, gradients = per_device(data_parallel_step, batch, (np.ones((4, 2), np.float32), np.float32(1)))
    np.testing.assert_array_equal(loss, [0, 0])
    chex.assert_trees_all_equal(gradients, jax.tree.map(jnp.zeros_like, gradients))


def test_loss_and_rows_take_axis_name_too(per_device):
    x, centers, labels, options = make_problem(leading=(2, 6), dtype=np.float32, masked=True)

    def both(batch, centers):
        x, labels, where = batch
        loss, _ = clj.center_loss_and_rows(x, centers, labels, where=where, axis_name='batch')
        return loss, clj.center_loss(x, centers, labels, where=where, axis_name='batch')

    from_both, alone = per_device(both, (x, labels, options['where']), centers)
    np.testing.assert_array_equal(from_both, alone)
    one_device = oracle.center_loss(x.reshape(12, 3), centers, labels.reshape(12), where=options['where'].reshape(12))
    np.testing.assert_allclose(np.mean(alone), one_device, rtol=1e-5)


@pytest.mark.parametrize('reduce_fn', [jnp.sum, None, lambda per_example: jnp.mean(per_example)])
@pytest.mark.parametrize('loss_fn', [clj.center_loss, clj.center_loss_and_rows])
def test_axis_name_needs_the_mean(worked_example, loss_fn, reduce_fn):
    with pytest.raises(ValueError, match=r'axis_name.*mean'):
        loss_fn(
            worked_example.x,
            worked_example.centers,
            worked_example.labels,
            reduce_fn=reduce_fn,
            axis_name='batch',
        )


@pytest.mark.parametrize('jit', [False, True], ids=['eager', 'jit'])
def test_an_axis_name_that_nothing_binds_is_an_error(worked_example, jit):
    loss_fn = partial(clj.center_loss, axis_name='btach')
    with pytest.raises((NameError, ValueError), match=r'axis_name.*btach'):
        (jax.jit(loss_fn) if jit else loss_fn)(worked_example.x, worked_example.centers, worked_example.labels)


def test_two_processes_have_the_centers_params_and_loss_of_one_process(tmp_path):
    with socket.create_server(('', 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, '-W', 'error', str(Path(one_of_two.__file__))]
    environment = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
    both = [
        subprocess.Popen(
            [*command, str(port), str(index), str(tmp_path / 'out.npz')],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for index in range(2)
    ]
    ends = [(*process.communicate(timeout=120), process.returncode) for process in both]
    assert [code for *_, code in ends] == [0, 0], ends
    # Both processes report the array that differs.
    message = "['drifted'] is not the same on all devices: replicas 2, 3 differ from"
    assert all(message in printed for printed, *_ in ends)

    model, losses = one_of_two.train(*one_of_two.arrays())
    with np.load(tmp_path / 'out.npz') as got:
        expected = {'centers': model['centers'], 'features': model['params']['features'], 'losses': losses}
        for name, want in expected.items():
            np.testing.assert_allclose(got[name], want, rtol=0, atol=1e-6 * np.abs(want).max(), err_msg=name)


def test_a_mesh_of_auto_axes_that_nobody_names_gives_the_right_answer():
    def step(table, state, x, labels):
        _, rows = clj.center_loss_and_rows(x, table, labels)
        return update(clj.center_update(0.5), rows, state, table)

    # XLA chooses to move the table here. The argument mesh prevents that.
    x, table, labels, _ = make_problem(leading=(64,), num_classes=1003, dtype=np.float32)
    x[5], x[[20, 60]], labels[::7], labels[33] = np.nan, np.inf, -1, 1003
    state = clj.center_update().init(table)
    expected = jax.jit(step)(table, state, x, labels)
    assert expected[1].dropped == 4
    mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
    x, labels = jax.device_put((x, labels), NamedSharding(mesh, P('data')))
    table, state = jax.device_put((table, state), NamedSharding(mesh, P()))
    moved, state = jax.jit(step)(table, state, x, labels)
    np.testing.assert_allclose(moved, expected[0], rtol=0, atol=1e-6 * np.abs(expected[0]).max())
    chex.assert_trees_all_close(state, expected[1], rtol=1e-6)


@pytest.mark.parametrize('spec', [P(), P('data', None)], ids=['replicated', 'by rows'])
def test_the_linen_step_on_a_mesh_is_that_of_one_device(spec):
    images, labels = make_batch(size=64, num_classes=16, left_out=range(8))
    state = linen_state(SGD, num_classes=16)
    expected, expected_loss = jax.jit(linen_step)(state, images, labels)
    mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
    layout = jax.tree.map(lambda leaf: NamedSharding(mesh, spec if jnp.shape(leaf) == (16, 3) else P()), state)
    with jax.set_mesh(mesh):
        batch = jax.device_put((images, labels), NamedSharding(mesh, P('data')))
        got, loss = jax.jit(linen_step, donate_argnums=0)(jax.device_put(state, layout), *batch)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    chex.assert_trees_all_close(got.params, expected.params, rtol=1e-5, atol=1e-6)
    assert linen_table(got).sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)


SPECS = P(), P('data'), P('data', 'seq'), P(None, 'seq'), P(('data', 'seq'))


@pytest.mark.parametrize(
    'batch_spec', some_by_default({str(spec): spec for spec in SPECS}, str(SPECS[2]), str(SPECS[3]))
)
def test_sequences_on_explicit_axes_may_be_split_along_any_axis(batch_spec):
    x, centers, labels, _ = make_problem(leading=(8, 4), num_classes=13, dtype=np.float32)
    mesh = jax.make_mesh((2, 4), ('data', 'seq'), axis_types=(AxisType.Explicit,) * 2)
    put = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))  # noqa: E731
    arrays = put(x, batch_spec), put(centers, P()), put(labels, batch_spec)

    @jax.jit
    def step(x, centers, labels):
        loss, rows = clj.center_loss_and_rows(x, centers, labels)
        moved, state = update(clj.center_update(0.5), rows, clj.center_update().init(centers), centers)
        gradient = jax.grad(clj.center_loss)(x, centers, labels)
        return (loss, moved, gradient, *clj.nearest_center(x, centers)), state

    (loss, moved, gradient, nearest, _), state = step(*arrays)
    np.testing.assert_allclose(loss, oracle.center_loss(x, centers, labels), rtol=1e-5)
    np.testing.assert_allclose(moved, oracle.center_update(x, centers, labels, 0.5), rtol=1e-5, atol=1e-6)
    for_x, *_ = oracle.center_loss_gradients(x, centers, labels)
    np.testing.assert_allclose(gradient, for_x, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(nearest, oracle.nearest_center(x, centers)[0])
    assert state.dropped == 0
    statistics = jax.jit(lambda x, labels: clj.class_statistics(x, labels, 13))(arrays[0], arrays[2])
    np.testing.assert_array_equal(statistics.count, np.bincount(labels.ravel(), minlength=13))


@pytest.mark.parametrize('jit', some_by_default({'eager': False, 'jit': True}, 'jit'))
def test_rows_of_two_layouts_on_explicit_axes_can_be_joined(jit):
    x, centers, labels, _ = make_problem(leading=(8,), num_classes=13, dtype=np.float32)
    mesh = jax.make_mesh((2, 4), ('data', 'seq'), axis_types=(AxisType.Explicit,) * 2)
    put = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))  # noqa: E731
    table = put(centers, P())

    def join(x, labels, other_x, other_labels):
        rows = clj.center_rows(x, table, labels), clj.center_rows(other_x, table, other_labels)
        return table + clj.concatenate_rows(*rows)

    arrays = put(x, P('data')), put(labels, P('data')), put(x, P()), put(labels, P())
    got = (jax.jit(join) if jit else join)(*arrays)
    np.testing.assert_allclose(got, centers + 2 * oracle.center_rows(x, centers, labels), rtol=1e-5, atol=1e-6)
