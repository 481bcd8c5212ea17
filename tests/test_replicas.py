"""check_replicas: one bit that one device has alone is found, and nothing is said of replicas that agree."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax import P
from jax.sharding import AxisType, NamedSharding

import centerloss_jax as clj
from centerloss_jax import _replicas
from tests.support.problems import make_problem
from tests.support.steps import update


def step(axis_name):
    """A step of centers, their transform's state and one parameter, under an axis that axis_name names or forgets."""
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


def on_devices(mesh, spec, part: Any):
    """An array of which each device has what `part(device, index)` gives it."""
    sharding = NamedSharding(mesh, spec)
    places = sharding.addressable_devices_indices_map((16, 3))
    arrays = [jax.device_put(part(device, index), device) for device, index in places.items()]
    return jax.make_array_from_single_device_arrays((16, 3), sharding, arrays)


SPECS = [P(), P('classes', None), P('data'), P(None, None)]


@pytest.mark.parametrize('axis_type', [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize('spec', SPECS, ids=str)
def test_the_parts_of_an_array_are_compared_with_those_at_the_same_place(axis_type, spec):
    mesh = jax.make_mesh((2, 4), ('data', 'classes'), axis_types=(axis_type,) * 2)
    table = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    clj.check_replicas({'a': on_devices(mesh, spec, lambda _, index: table[index])})

    def but_one(device, index):
        part = table[index].copy()
        if device.id == 6:
            part[-1, -1] = np.nextafter(part[-1, -1], np.inf)
        return part

    with pytest.raises(ValueError, match=r"\['a'\].*replicas 6 differ from replica [024]"):
        clj.check_replicas({'a': on_devices(mesh, spec, but_one)})


def test_a_table_spread_over_all_devices_has_no_replicas():
    mesh = jax.make_mesh((8,), ('classes',), axis_types=(AxisType.Auto,))
    clj.check_replicas(
        clj.shard_centers(np.arange(30, dtype=np.float32).reshape(10, 3), NamedSharding(mesh, P('classes')))
    )


DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.int32, np.int8, np.bool_, np.complex64]


@pytest.mark.parametrize('columns', [2, 2**15])
@pytest.mark.parametrize('dtype', DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_every_dtype_and_every_place_counts(dtype, columns):
    same = np.ones((8, 3, columns), dtype)  # of many columns two rows at a time are read, and then one again
    clj.check_replicas(same, stacked=True)
    swapped = same.copy()
    swapped[3, 1, 0] = swapped[5, 1, 1] = 0  # one value each, but at other places
    with pytest.raises(ValueError, match='replicas 3, 5 differ from replica 0'):
        clj.check_replicas(swapped, stacked=True)
    swapped[[0, 1, 2, 4, 6, 7], 1, 0] = 0
    with pytest.raises(ValueError, match='replicas 5 differ from replica 0'):
        clj.check_replicas(swapped, stacked=True)


def test_not_a_number_is_like_itself_and_keys_and_empty_trees_pass():
    clj.check_replicas({'a': np.full((4, 2), np.nan), 'key': jax.random.key(0), 'b': 3.0})
    clj.check_replicas(np.full((4, 2), np.nan), stacked=True)
    clj.check_replicas({}, stacked=True)


def test_a_number_has_no_axis_of_devices():
    with pytest.raises(ValueError, match='axis of devices'):
        clj.check_replicas({'step': jnp.zeros([])}, stacked=True)


def test_the_table_is_read_where_it_lies_and_not_copied():
    table = jax.ShapeDtypeStruct((1, 100_000, 64), jnp.float32)
    analysis: Any = _replicas._checksums.lower(table).compile().memory_analysis()
    assert analysis.temp_size_in_bytes < 1_000_000
