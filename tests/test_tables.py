"""The host side of a table: shard_centers, unshard_centers and padding rows, and check_replicas."""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import centerloss_jax as clj
from tests.support import oracle
from tests.support.cases import some_by_default
from tests.support.problems import make_problem
from tests.support.steps import update


def mesh_of(num_devices: int) -> Mesh:
    return jax.make_mesh((num_devices,), ('classes',), (AxisType.Auto,), devices=jax.devices()[:num_devices])


def over(num_devices: int) -> NamedSharding:
    return NamedSharding(mesh_of(num_devices), P('classes', None))


@pytest.fixture
def table() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)


@pytest.mark.parametrize(('num_devices', 'rows'), [(8, 16), (4, 12), (2, 10), (1, 10)])
def test_a_table_is_padded_to_a_size_that_the_mesh_divides(table, num_devices, rows):
    sharded = clj.shard_centers(table, over(num_devices))
    assert sharded.shape == (rows, 3)
    assert len(sharded.sharding.device_set) == num_devices
    np.testing.assert_array_equal(sharded[:10], table)
    assert np.isposinf(sharded[10:]).all()


def test_padding_of_any_number_of_rows_is_removed():
    for num_classes in range(9, 17):
        table = np.ones((num_classes, 3), np.float32)
        np.testing.assert_array_equal(clj.unshard_centers(clj.shard_centers(table, over(8))), table)


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


LEAVES: dict[str, Any] = {
    'float32 [C, D]': np.arange(1, 31, dtype=np.float32).reshape(10, 3),
    'bfloat16 [C, 1]': np.arange(1, 11).astype(ml_dtypes.bfloat16)[:, None],
    'int32 [C]': np.arange(1, 11, dtype=np.int32),
    'bool [C]': np.arange(10) % 2 == 1,
    'complex64 [C, 2, 3]': np.arange(1, 61, dtype=np.complex64).reshape(10, 2, 3),
}


@pytest.mark.parametrize('num_devices', [8, 4, 1])
@pytest.mark.parametrize('leaf', LEAVES.values(), ids=LEAVES.keys())
def test_the_state_of_an_optimizer_has_the_layout_of_its_table(leaf, num_devices):
    sharded = clj.shard_centers(leaf, over(num_devices), fill=0)
    assert sharded.shape == (10 + -10 % num_devices, *leaf.shape[1:])
    assert sharded.dtype == leaf.dtype
    assert {shard.data.shape[0] for shard in sharded.addressable_shards} == {len(sharded) // num_devices}
    np.testing.assert_array_equal(sharded[10:], np.zeros_like(sharded[10:]))
    np.testing.assert_array_equal(clj.unshard_centers(sharded, 10), leaf)


@pytest.mark.parametrize('leaf', LEAVES.values(), ids=LEAVES.keys())
@pytest.mark.parametrize('num_classes', [1, 8, 17])
def test_a_wrong_number_of_classes_loses_no_state(leaf, num_classes):
    with pytest.raises(ValueError, match=rf'num_classes is {num_classes}, but the table has rows of 16 classes'):
        clj.unshard_centers(clj.shard_centers(leaf, over(8), fill=0), num_classes)


def test_padding_may_hold_the_number_with_which_an_optimizer_starts(table):
    state: Any = clj.by_rows(optax.adagrad(0.1)).init(clj.shard_centers(table, over(8)))
    np.testing.assert_array_equal(
        clj.unshard_centers(optax.tree.get(state, 'sum_of_squares'), 10), np.full((10, 3), 0.1, np.float32)
    )


def test_a_nan_beyond_the_classes_is_no_padding():
    with pytest.raises(ValueError, match='num_classes is 3'):
        clj.unshard_centers(np.array([1, 2, 3, np.nan, np.nan], np.float32), 3)


ADAM = clj.by_rows(optax.adam(0.1))


@jax.jit
def adam_step(run, x, labels):
    """Returns the table and the state after a step on the squared distances of features to the rows of their labels."""
    table, state = run
    rows = clj.RowUpdates(labels, table[labels] - x, kind='gradient')
    return update(ADAM, rows, state, table)


def test_a_run_with_adam_that_is_saved_on_eight_devices_goes_on_on_four_and_on_one():
    rng, num_classes = np.random.default_rng(0), 1003
    batches = [(rng.normal(size=(32, 3)).astype(np.float32), rng.integers(0, num_classes, 32)) for _ in range(6)]
    table = rng.normal(size=(num_classes, 3)).astype(np.float32)

    def load(num_devices, table, state):
        put = lambda leaf: clj.shard_centers(leaf, over(num_devices), fill=0) if np.ndim(leaf) else leaf  # noqa: E731
        return clj.shard_centers(table, over(num_devices)), jax.tree.map(put, state)

    def save(run) -> Any:
        return jax.tree.map(lambda leaf: clj.unshard_centers(leaf, num_classes) if leaf.ndim else np.asarray(leaf), run)

    saved = start = table, jax.tree.map(np.asarray, ADAM.init(table))
    for num_devices in (8, 4, 1):
        run = load(num_devices, *saved)
        for batch in batches[:2]:
            run = adam_step(run, *batch)
        assert optax.tree.get(run[1], 'mu').sharding.is_equivalent_to(over(num_devices), 2)
        saved, batches = save(run), batches[2:] + batches[:2]
        assert {leaf.shape for leaf in jax.tree.leaves(saved)} == {(num_classes, 3), ()}
    expected = load(1, *start)
    for batch in batches:
        expected = adam_step(expected, *batch)
    chex.assert_trees_all_close(saved, save(expected), rtol=1e-6, atol=1e-6)
    assert (saved[0] != table).any(axis=1).sum() > 150


@pytest.mark.parametrize('num_classes', [None, 10])
def test_a_center_that_became_inf_is_saved_with_the_centers_after_it(table, num_classes):
    table[4] = np.inf
    saved = clj.unshard_centers(clj.shard_centers(table, over(8)), num_classes)
    np.testing.assert_array_equal(saved, table)


SIZES = {'one device': (1, 1), 'one axis': (1, 8), 'two axes': (2, 4)}


@pytest.mark.parametrize(('data', 'classes'), some_by_default(SIZES, 'two axes'))
def test_explicit_axes_need_no_jit(table, data, classes):
    devices = jax.devices()[: data * classes]
    mesh = jax.make_mesh((data, classes), ('data', 'classes'), axis_types=(AxisType.Explicit,) * 2, devices=devices)
    x, labels = np.ones((16, 3), np.float32), np.array([*range(10), -1, 3, 3, -1, 9, 0])
    on_mesh = jax.device_put((x, labels), NamedSharding(mesh, P(('data', 'classes'))))
    centers = clj.shard_centers(table, NamedSharding(mesh, P('classes')))
    loss = clj.center_loss(on_mesh[0], centers, on_mesh[1])
    np.testing.assert_allclose(loss, oracle.center_loss(x, table, labels), rtol=1e-6)
    np.testing.assert_array_equal(clj.center_rows(on_mesh[0], centers, on_mesh[1]).indices, labels)
    statistics = clj.class_statistics(on_mesh[0], on_mesh[1], 10)
    np.testing.assert_array_equal(statistics.count, [2, 1, 1, 3, 1, 1, 1, 1, 1, 2])


def test_a_label_that_hits_a_padding_row_is_dropped(table):
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
    assert state.dropped == 1
    moved: Any = optax.apply_updates(centers, updates)
    assert np.isposinf(moved[10:]).all()
    np.testing.assert_array_equal(np.flatnonzero((moved[:10] != table).any(axis=1)), [4])


def test_a_padding_row_is_found_on_a_mesh_larger_than_this_machine():
    centers = jnp.zeros((32, 3)).at[20:].set(jnp.inf)
    with jax.sharding.use_abstract_mesh(AbstractMesh((16,), ('classes',), axis_types=(AxisType.Auto,))):
        each = jax.jit(partial(clj.center_loss, reduce_fn=None))(jnp.ones((3, 3)), centers, jnp.array([19, 20, 31]))
    np.testing.assert_array_equal(each, [3, np.nan, np.nan])


def test_a_center_that_became_inf_does_not_hide_the_classes_after_it():
    centers = jnp.zeros((8, 3)).at[3].set(jnp.inf)
    loss, rows = jax.jit(clj.center_loss_and_rows)(jnp.ones((2, 3)), centers, jnp.array([2, 7]))
    assert loss == 3
    assert rows.indices.tolist() == [2, 7]


def step(axis_name):
    """Returns a step under the axis 'batch'. axis_name: 'batch', or None as if it were forgotten."""
    transform = clj.with_centers(optax.sgd(0.1), axis_name=axis_name)

    def run(x, labels, model):
        rows = clj.center_rows(x, model['centers'], labels)
        grads = {'params': jax.lax.pmean(x.sum(), 'batch'), 'centers': rows}
        return update(transform, grads, transform.init(model), model)

    return run


def after_pmap(axis_name, x, labels, model):
    return jax.pmap(step(axis_name), axis_name='batch', in_axes=(0, 0, None))(
        x.reshape(8, 2, 3), labels.reshape(8, 2), model
    )


def after_shard_map(axis_name, x, labels, model):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ('batch',))
    specs = P('batch'), P('batch'), P()
    mapped = jax.shard_map(step(axis_name), mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    return jax.jit(mapped)(x, labels, model)


@pytest.mark.parametrize(('run', 'stacked'), [(after_pmap, True), (after_shard_map, False)], ids=['pmap', 'shard_map'])
def test_a_forgotten_axis_name_is_found(run, stacked):
    x, centers, labels, _ = make_problem(leading=(16,), dtype=np.float32)
    model = {'params': np.ones([], np.float32), 'centers': centers}
    clj.check_replicas(run('batch', x, labels, model), stacked=stacked)
    drifted, _ = run(None, x, labels, model)
    with pytest.raises(ValueError, match=r"\['centers'\].* 1, 2, 3, 4, 5, 6, 7 differ from replica 0.*axis_name="):
        clj.check_replicas(drifted, stacked=stacked)
    clj.check_replicas(drifted['params'], stacked=stacked)


def on_devices(mesh, spec, block: Any):
    """Returns an array whose block on each device is `block(device, index)`."""
    sharding = NamedSharding(mesh, spec)
    places = sharding.addressable_devices_indices_map((16, 3))
    arrays = [jax.device_put(block(device, index), device) for device, index in places.items()]
    return jax.make_array_from_single_device_arrays((16, 3), sharding, arrays)


SPECS = [P(), P('classes', None), P('data'), P(None, None)]


@pytest.mark.parametrize('axis_type', [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize('spec', SPECS, ids=str)
def test_blocks_of_one_index_are_compared(axis_type, spec):
    mesh = jax.make_mesh((2, 4), ('data', 'classes'), axis_types=(axis_type,) * 2)
    table = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    clj.check_replicas({'a': on_devices(mesh, spec, lambda _, index: table[index])})

    def one_bit_differs(device, index):
        block = table[index].copy()
        if device.id == 6:
            block[-1, -1] = np.nextafter(block[-1, -1], np.inf)
        return block

    with pytest.raises(ValueError, match=r"\['a'\].*replicas 6 differ from replica [024]"):
        clj.check_replicas({'a': on_devices(mesh, spec, one_bit_differs)})


def test_a_table_sharded_over_all_devices_has_no_replicas():
    mesh = jax.make_mesh((8,), ('classes',), axis_types=(AxisType.Auto,))
    clj.check_replicas(
        clj.shard_centers(np.arange(30, dtype=np.float32).reshape(10, 3), NamedSharding(mesh, P('classes')))
    )


DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.int32, np.int8, ml_dtypes.int4, np.bool_, np.complex64]


@pytest.mark.parametrize('columns', [2, 2**15])
@pytest.mark.parametrize('dtype', DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_a_value_of_any_dtype_that_moved_is_found(dtype, columns):
    same = np.ones((8, 3, columns), dtype)  # with many columns rows are read two at a time
    clj.check_replicas(same, stacked=True)
    swapped = same.copy()
    swapped[3, 1, 0] = swapped[5, 1, 1] = 0  # one zero each, at different indices
    with pytest.raises(ValueError, match='replicas 3, 5 differ from replica 0'):
        clj.check_replicas(swapped, stacked=True)
    swapped[[0, 1, 2, 4, 6, 7], 1, 0] = 0
    with pytest.raises(ValueError, match='replicas 5 differ from replica 0'):
        clj.check_replicas(swapped, stacked=True)


@pytest.mark.parametrize('other', [np.nextafter(1.0, 2.0), 2.0, np.int64(2), np.int64(1 + 2**32)], ids=repr)
def test_both_halves_of_a_wide_number_are_compared(other):
    with jax.enable_x64(True), pytest.raises(ValueError, match='replicas 1 differ from replica 0'):
        clj.check_replicas(np.array([1, other], np.asarray(other).dtype), stacked=True)


def test_equal_nans_random_keys_and_empty_trees_pass():
    clj.check_replicas({'a': np.full((4, 2), np.nan), 'key': jax.random.key(0), 'b': 3.0})
    clj.check_replicas(np.full((4, 2), np.nan), stacked=True)
    clj.check_replicas({}, stacked=True)


def test_a_scalar_has_no_axis_of_devices():
    with pytest.raises(ValueError, match='axis of devices'):
        clj.check_replicas({'step': jnp.zeros([])}, stacked=True)


@pytest.mark.parametrize('shape', [(0,), (0, 3)], ids=str)
def test_an_axis_of_no_devices_is_an_error(shape):
    with pytest.raises(ValueError, match=r"axis of devices.*\['step'\].*\[0"):
        clj.check_replicas({'step': jnp.zeros(shape)}, stacked=True)


@pytest.mark.parametrize('stacked', [False, True])
def test_replicas_without_numbers_pass(stacked):
    clj.check_replicas({'a': jnp.zeros((2, 0)), 'b': jnp.zeros((2, 3, 0))}, stacked=stacked)


@pytest.mark.parametrize('stacked', [False, True])
def test_replicas_are_not_checked_inside_jit(stacked):
    with pytest.raises(TypeError, match=r"\['a'\].*outside of jax.jit"):
        jax.eval_shape(lambda a: clj.check_replicas({'a': a}, stacked=stacked), jnp.ones((2, 3)))
