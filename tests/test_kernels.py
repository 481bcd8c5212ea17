"""Each kernel equals its plain JAX line, and Eq. 4 holds, in the programs for CPUs and for other platforms.

A CPU takes the rows of a batch one by one, an accelerator takes them all at once. Both programs run here on a CPU.
"""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import centerloss_jax as clj
from centerloss_jax import _kernels
from centerloss_jax._inputs import DROPPED
from centerloss_jax._kernels import platform
from tests.support import oracle
from tests.support.programs import memory, shapes
from tests.support.steps import move

FEATURES, WIDE = 3, 129
# For 64 rows: counted in arrays [C] by class, and by first row; sorted on a CPU, and on an accelerator too.
CLASSES = [1, 7, 64, 65, 512, 513, 20_000]


@pytest.fixture(scope='module', autouse=True, params=['cpu', 'default'], ids=['one by one', 'at once'])
def way(request):
    """Chooses the program for CPUs or the one for other platforms, where the kernels make that choice."""

    def by_platform(*args, cpu, default):
        return {'cpu': cpu, 'default': default}[request.param](*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platform, 'by_platform', by_platform)
        jax.clear_caches()
        yield request.param
    jax.clear_caches()


def make_rows(size: int, num_classes: int, num_features: int):
    """Returns float64 rows of which about half have one index, a tenth are dropped, and some indices are unique."""
    rng = np.random.default_rng(size + num_classes)
    index = np.where(rng.random(size) < 0.5, num_classes // 3, rng.integers(0, num_classes, size)).astype(np.int32)
    index[rng.random(size) < 0.1] = DROPPED
    return jnp.asarray(index), jnp.asarray(rng.normal(size=(size, num_features))), jnp.asarray(rng.normal(size=size))


def plain_sums(index, values, scale, num_classes):
    return jax.ops.segment_sum(scale[:, None] * values, index, num_classes)


@pytest.fixture(
    params=[
        (7, FEATURES),
        (65, FEATURES),
        (20_000, FEATURES),
        (1000, WIDE),
        pytest.param((65, WIDE), marks=pytest.mark.slow),
    ]
)
def rows(request):
    num_classes, num_features = request.param
    with jax.enable_x64(True):
        yield *make_rows(64, num_classes, num_features), num_classes


def test_class_sizes_equals_a_comparison_of_all_pairs(rows):
    index, _, _, num_classes = rows
    index = np.asarray(index)
    there = index != DROPPED
    for classes in (num_classes, None):
        sizes = _kernels.class_sizes(index, classes, rows[1].shape[1])
        np.testing.assert_array_equal(sizes[there], np.sum(index[:, None] == index, axis=1)[there])


def test_class_sums_equals_a_segment_sum(rows):
    unique, sums = _kernels.class_sums(*rows)
    index, num_classes = rows[0], rows[-1]
    classes = np.arange(num_classes)
    np.testing.assert_array_equal(unique, np.where(np.isin(classes, index), classes, DROPPED))
    np.testing.assert_allclose(sums, plain_sums(*rows), rtol=1e-12, atol=1e-12)


def test_unique_sums_equals_a_segment_sum_over_unique_indices(rows):
    index, values, scale, _ = rows
    unique, sums = _kernels.unique_sums(index, values, scale)
    expected = np.full(64, DROPPED)
    expected[: len(np.unique(index))] = np.unique(index)
    np.testing.assert_array_equal(unique, expected)
    there = expected != DROPPED
    segments = np.searchsorted(expected, index)
    np.testing.assert_allclose(sums[there], plain_sums(segments, values, scale, 64)[there], rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(sums[~there], np.zeros((64 - there.sum(), values.shape[1])))


def test_sums_in_first_rows_are_the_class_sums_at_the_first_row_of_each_class(rows):
    unique, sums = _kernels.sums_in_first_rows(*rows)
    index, first = np.asarray(rows[0]), np.zeros(64, bool)
    first[np.unique(index, return_index=True)[1]] = True
    first &= index != DROPPED
    np.testing.assert_array_equal(unique, np.where(first, index, DROPPED))
    np.testing.assert_allclose(sums[first], plain_sums(*rows)[index[first]], rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(sums[~first], 0)


def test_add_class_sums_equals_a_scatter_add(rows):
    index, values, scale, num_classes = rows
    table = jnp.arange(num_classes * values.shape[1], dtype=values.dtype).reshape(num_classes, -1)
    expected = table.at[index].add(scale[:, None] * values, mode='drop')
    got = _kernels.add_class_sums(table, index, values, scale)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


def test_squared_norm_of_sums_equals_the_norm_of_unique_sums(rows):
    index, values, scale, num_classes = rows
    norms = _kernels.squared_norms(values, scale)
    np.testing.assert_allclose(norms, np.sum(np.square(scale[:, None] * values), axis=-1), rtol=1e-12)
    for classes in (num_classes, None):
        got = _kernels.squared_norm_of_sums(index, values, scale, norms, classes)
        expected = np.sum(np.square(plain_sums(index, values, scale, num_classes)))
        np.testing.assert_allclose(got, expected, rtol=1e-12)


@pytest.mark.parametrize('num_features', [1, WIDE])
@pytest.mark.parametrize('num_classes', [5, 50_000, pytest.param(30_000, marks=pytest.mark.slow)])
def test_sums_of_several_large_classes_keep_their_digits(num_classes, num_features):
    size, rng = 40_000, np.random.default_rng(0)
    index = rng.choice([1, 2, num_classes - 1], size, p=[0.5, 0.4, 0.1]).astype(np.int32)
    index[::100], index[7] = DROPPED, 0
    counts = np.bincount(index[index < DROPPED], minlength=num_classes)
    values = np.full((size, num_features), 0.1, np.float32)
    values[index == DROPPED] = np.nan
    table = np.zeros((num_classes, num_features), np.float32)
    added = _kernels.add_class_sums(table, index, values, np.ones(size, np.float32))
    expected = np.broadcast_to(counts[:, None] * np.float64(np.float32(0.1)), added.shape)
    np.testing.assert_allclose(added, expected, rtol=1e-4)  # one sum of 16,000 is off by 1.5e-4


def test_mean_square_equals_the_mean_and_its_gradient():
    rng = np.random.default_rng(0)
    x, own_center = rng.normal(size=(2, 7, FEATURES))
    counted, valid, count = np.arange(7) != 2, ~np.isin(np.arange(7), [2, 4]), np.float64(6)

    def plain(x, own_center):
        difference = jnp.where(valid[:, None], x - own_center, 0)
        per_example = jnp.where(counted & ~valid, jnp.nan, jnp.sum(jnp.square(difference), axis=-1))
        return jnp.sum(per_example) / count, 2 * difference / count

    def kernel(x, own_center):
        return _kernels.mean_square(x, own_center, counted, valid, count)

    with jax.enable_x64(True):
        chex.assert_trees_all_close(kernel(x, own_center), plain(x, own_center), rtol=1e-12)
        valid = counted
        chex.assert_trees_all_close(kernel(x, own_center), plain(x, own_center), rtol=1e-12)
        for transform in (jax.jacrev, jax.jacfwd):
            got, expected = (jax.jit(transform(function, (0, 1)))(x, own_center) for function in (kernel, plain))
            chex.assert_trees_all_close(got, expected, rtol=1e-12, atol=1e-12)


def test_max_over_vmapped_axis_is_the_number_and_under_vmap_the_maximum():
    numbers = jnp.array([3, 5, 2])
    np.testing.assert_array_equal(platform.max_over_vmapped_axis(numbers[0]), 3)
    np.testing.assert_array_equal(jax.vmap(platform.max_over_vmapped_axis)(numbers), 5)


@partial(jax.jit, donate_argnums=0)
def step(centers, state, x, labels, where):
    rows = clj.center_rows(x, centers, labels, where=where)
    transform: Any = clj.center_update(0.5)
    updates, state = transform.update(rows, state, centers)
    return optax.apply_updates(centers, updates), state


def make_batch(size, num_classes, dtype: Any = np.float32, num_features=FEATURES):
    """Returns a batch in which half of the examples have one class."""
    rng = np.random.default_rng(size + num_classes)
    x, centers = (rng.normal(size=(rows, num_features)).astype(dtype) for rows in (size, num_classes))
    labels = np.where(rng.random(size) < 0.5, num_classes // 3, rng.integers(-1, num_classes, size))
    return x, centers, labels, rng.random(size) < 0.9


def run(centers, *batch):
    return step(jnp.asarray(centers), clj.center_update().init(centers), *batch)


@pytest.mark.parametrize(
    ('num_classes', 'num_features'), [*((number, FEATURES) for number in CLASSES), (65, WIDE), (1000, WIDE)]
)
def test_centers_move_by_eq_4_in_float64(num_classes, num_features):
    with jax.enable_x64(True):
        x, centers, labels, where = make_batch(64, num_classes, np.float64, num_features)
        moved, state = run(centers, x, labels, where)
        expected = oracle.center_update(x, centers, np.where(where, labels, -1), 0.5)
        np.testing.assert_allclose(moved, expected, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(state.step_norm, np.linalg.norm(expected - centers), rtol=1e-6)
        assert state.dropped == 0


@pytest.mark.parametrize('num_classes', [900, 5000])
def test_centers_of_many_rows_move_by_eq_4_in_float32(num_classes):
    x, centers, labels, where = make_batch(1345, num_classes)
    moved, state = run(centers, x, labels, where)
    expected = oracle.center_update(x, centers, np.where(where, labels, -1), 0.5)
    np.testing.assert_allclose(moved, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.step_norm, np.linalg.norm(expected - centers), rtol=1e-5)
    chex.assert_trees_all_equal(run(centers, x, labels, where), (moved, state))


@pytest.mark.parametrize('num_classes', [7, 500])
def test_an_alpha_in_float64_keeps_a_float32_table_in_float32(num_classes):
    x, centers, labels, _ = make_batch(64, num_classes)

    @jax.jit
    def by_half(centers):
        transform: Any = clj.center_update(lambda count: np.float64(0.5) + 0.0 * count)
        updates, state = transform.update(clj.center_rows(x, centers, labels), transform.init(centers), centers)
        return centers + updates, updates.values, state

    with jax.enable_x64(True):
        moved, values, state = by_half(centers)
    chex.assert_type([moved, values, state.step_norm], jnp.float32)
    np.testing.assert_allclose(moved, oracle.center_update(x, centers, labels, 0.5), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(('num_classes', 'num_features'), [(7, FEATURES), (500, FEATURES), (500, WIDE)])
@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_change_nothing(bad, num_classes, num_features):
    x, centers, labels, where = make_batch(64, num_classes, num_features=num_features)
    broken = x.copy()
    broken[::10, 2] = bad
    moved, state = run(centers, broken, labels, where)
    present = where & (np.arange(len(x)) % 10 != 0)
    expected, alone = run(centers, x, labels, present)
    np.testing.assert_allclose(moved, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.step_norm, alone.step_norm, rtol=1e-5)
    assert state.dropped == np.sum(where & ~present & (labels >= 0))


def test_a_bfloat16_table_is_rounded_once():
    x = np.full((64, 1), 101.0, np.float32)
    moved, _ = run(jnp.full((1, 1), 100.0, jnp.bfloat16), x, np.zeros(64, int), np.ones(64, bool))
    assert moved[0, 0] == 100.5


@pytest.mark.parametrize('num_classes', [1, 5000])
def test_thousands_of_moves_below_the_rounding_of_a_center_add_up(num_classes):
    x, centers = np.full((4096, FEATURES), 100.1, np.float32), np.full((num_classes, FEATURES), 100, np.float32)
    moved, _ = run(centers, x, np.zeros(4096, int), np.ones(4096, bool))
    np.testing.assert_allclose(moved[0], 100 + 0.5 * 0.1 * 4096 / 4097, rtol=1e-6)


def test_updates_that_were_summed_move_nothing():
    x, centers, labels, where = make_batch(64, 7)

    @jax.jit
    def add_twice(centers):
        transform: Any = clj.center_update(0.5)
        updates, _ = transform.update(clj.center_rows(x, centers, labels, where=where), transform.init(centers))
        return centers + jax.tree.map(jnp.add, updates, updates)

    np.testing.assert_array_equal(add_twice(centers), centers)


def test_temporaries_do_not_depend_on_the_number_of_classes(way):
    # At once, two arrays of all classes may together be as large as the batch.
    numbers, limit = {'cpu': ((1000, 10_000, 1_000_000), 2), 'default': ((1000, 3_000_000, 6_000_000), 4)}[way]

    def analysis(num_classes) -> Any:
        table, x, *batch = shapes(
            ((num_classes, 512), jnp.float32), ((4096, 512), jnp.float32), ((4096,), jnp.int32), ((4096,), jnp.bool)
        )
        return memory(step, table, jax.eval_shape(clj.center_update().init, table), x, *batch)

    few, more, many = (analysis(number) for number in numbers)
    assert more.temp_size_in_bytes == many.temp_size_in_bytes
    assert max(few.temp_size_in_bytes, many.temp_size_in_bytes) < limit * 4096 * 512 * 4
    assert many.alias_size_in_bytes >= 1_000_000 * 512 * 4


def test_under_vmap_each_table_moves_by_its_rows_and_a_cpu_copies_none(way):
    num_classes, everywhere = 5000, np.ones(64, bool)
    x, tables = np.random.default_rng(0).normal(size=(2, 64, 3)), np.ones((2, num_classes, 3), np.float32)
    state = clj.center_update().init(tables)
    vmapped = jax.jit(jax.vmap(step, (0, None, 0, 0, None)), donate_argnums=0)
    shape = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    compiled = vmapped.lower(tables, state, x, shape, everywhere).compile()
    analysis: Any = compiled.memory_analysis()
    assert way != 'cpu' or analysis.temp_size_in_bytes < tables.nbytes // 2
    for repeated in ([0, 0], [1, 9], [63, 30]):
        labels = np.stack([np.arange(64, dtype=np.int32) % (64 - number) for number in repeated])
        moved, states = vmapped(jnp.asarray(tables), state, x, labels, everywhere)
        for k in range(2):
            expected, alone = run(tables[k], x[k], labels[k], everywhere)
            np.testing.assert_allclose(moved[k], expected, rtol=1e-6)
            np.testing.assert_allclose(states.step_norm[k], alone.step_norm, rtol=1e-6)


@pytest.mark.parametrize('num_classes', [3, 50])
def test_a_move_has_derivatives_for_alpha_and_for_the_table(num_classes):
    @jax.jit
    def after(alpha, centers):
        rows = clj.center_rows(x, jax.lax.stop_gradient(centers), labels)
        return move(centers, rows, alpha)[0]

    x, labels = jnp.arange(20.0).reshape(10, 2), jnp.array([0, 1, 1, 2, 0, -1, 2, 2, 1, 0])
    centers = jnp.ones((num_classes, 2))
    of_alpha, of_centers = jax.jit(jax.grad(lambda *args: jnp.sum(after(*args)), argnums=(0, 1)))(0.5, centers)
    np.testing.assert_allclose(of_alpha, jnp.sum(after(1.0, centers) - after(0.0, centers)), rtol=1e-5)
    np.testing.assert_array_equal(of_centers, np.ones_like(centers))


def test_devices_may_have_different_tables_under_the_replication_check():
    size = 64
    tables = jnp.arange(8.0)[:, None, None] + jnp.ones((8, 3, 2))
    x, labels = jnp.zeros((8 * size, 2)), jnp.arange(8 * size) % 3
    mesh = jax.make_mesh((8,), ('data',), (jax.sharding.AxisType.Auto,))

    def from_each(tables, x, labels):
        moved, state = move(tables[0], clj.center_rows(x, tables[0], labels))
        return moved[None], state.step_norm[None]

    def from_one(table, x, labels):
        return move(table, clj.center_rows(x, table, labels))[0][None]

    split = jax.P('data')
    moved, norms = jax.jit(jax.shard_map(from_each, mesh=mesh, in_specs=split, out_specs=split))(tables, x, labels)
    for device in range(8):
        own_labels = np.asarray(labels[device * size : (device + 1) * size])
        factor = 1 - 0.5 * np.bincount(own_labels) / (1 + np.bincount(own_labels))
        np.testing.assert_allclose(moved[device], factor[:, None] * np.asarray(tables[device]), rtol=1e-5)
    np.testing.assert_allclose(norms, np.linalg.norm(tables - moved, axis=(1, 2)), rtol=1e-5)
    shared = jax.jit(jax.shard_map(from_one, mesh=mesh, in_specs=(jax.P(), split, split), out_specs=split))
    chex.assert_trees_all_close(shared(tables[0], x, labels)[0], moved[0])


@pytest.mark.parametrize('num_classes', [3, pytest.param(50, marks=pytest.mark.slow)])
def test_one_field_of_the_rows_may_vary_over_devices(num_classes):
    fields: dict[str, Any] = {'indices': jnp.array([1, 2, 1, 0]), 'values': jnp.ones((4, 2)), '_scale': jnp.arange(4.0)}
    mesh = jax.make_mesh((2,), ('data',), (jax.sharding.AxisType.Auto,))

    def add(varying):
        """Adds rows of which one field differs between the devices, for each of the three fields."""
        rows = [clj.RowUpdates(**fields | {name: field}) for name, field in varying.items()]
        return [(jnp.zeros((num_classes, 2)) + part)[None] for part in rows]

    stacked = {name: jnp.concatenate([field, field[::-1]]) for name, field in fields.items()}
    got = jax.jit(jax.shard_map(add, mesh=mesh, in_specs=jax.P('data'), out_specs=jax.P('data')))(stacked)
    for device, order in enumerate([slice(None), slice(None, None, -1)]):
        expected = jax.jit(add)({name: field[order] for name, field in fields.items()})
        for sharded, alone in zip(got, expected, strict=True):
            np.testing.assert_allclose(sharded[device], alone[0])
