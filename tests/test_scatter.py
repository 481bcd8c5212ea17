"""Batches of many rows of few and of many classes: one by one, as CPUs take them, and at once, the answer is Eq. 4."""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import centerloss_jax as clj
from tests.support import oracle
from tests.support.steps import move

FEATURES = 16
SIZES = [200, 1024, 1345]  # of few rows all pairs are compared
CLASSES = [1, 7, 900, 5000]  # fewer than the rows, which are summed by class, and more


@pytest.fixture(autouse=True, params=['cpu', 'default'], ids=['one by one', 'at once'])
def way(request, monkeypatch):
    """Each test runs as CPUs take the rows, and as all other devices do."""

    def platform_dependent(*args, **ways):
        return ways.get(request.param, ways['default'])(*args)

    monkeypatch.setattr(jax.lax, 'platform_dependent', platform_dependent)
    jitted: Any = step
    jitted.clear_cache()
    yield request.param
    jitted.clear_cache()


@partial(jax.jit, donate_argnums=0)
def step(centers, state, x, labels, mask):
    rows = clj.center_rows(x, centers, labels, where=mask)
    transform: Any = clj.center_update(0.5)
    updates, state = transform.update(rows, state, centers)
    return optax.apply_updates(centers, updates), state


def problem(size, num_classes, dtype: Any = np.float32):
    """Half the examples belong to one class."""
    rng = np.random.default_rng(size + num_classes)
    x, centers = rng.normal(size=(size, FEATURES)).astype(dtype), rng.normal(size=(num_classes, FEATURES)).astype(dtype)
    labels = np.where(rng.random(size) < 0.5, num_classes // 3, rng.integers(-1, num_classes, size))
    return x, centers, labels, rng.random(size) < 0.9


def run(centers, *batch):
    return step(jnp.asarray(centers), clj.center_update().init(centers), *batch)


@pytest.mark.parametrize('num_classes', CLASSES)
@pytest.mark.parametrize('size', SIZES)
def test_many_rows_move_their_centers_as_eq_4_says(size, num_classes):
    x, centers, labels, mask = problem(size, num_classes)
    moved, state = run(centers, x, labels, mask)
    expected = oracle.center_update(x, centers, np.where(mask, labels, -1), 0.5)
    np.testing.assert_allclose(moved, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.step_norm, np.linalg.norm(expected - centers), rtol=1e-5)
    assert state.left_out == 0


def test_more_classes_than_numbers_in_the_batch():
    rng = np.random.default_rng(0)
    x, centers = rng.normal(size=(300, 3)).astype(np.float32), rng.normal(size=(2000, 3)).astype(np.float32)
    labels = np.where(rng.random(300) < 0.5, 7, rng.integers(0, 100, 300))
    moved, state = run(centers, x, labels, np.ones(300, bool))
    expected = oracle.center_update(x, centers, labels, 0.5)
    np.testing.assert_allclose(moved, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.step_norm, np.linalg.norm(expected - centers), rtol=1e-5)


@pytest.mark.parametrize('num_classes', CLASSES)
def test_in_float64_to_1e_12(num_classes):
    with jax.enable_x64(True):
        x, centers, labels, mask = problem(SIZES[-1], num_classes, np.float64)
        moved, state = run(centers, x, labels, mask)
        expected = oracle.center_update(x, centers, np.where(mask, labels, -1), 0.5)
        np.testing.assert_allclose(moved, expected, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(state.step_norm, np.linalg.norm(expected - centers), rtol=1e-6)


@pytest.mark.parametrize('num_classes', CLASSES)
def test_a_step_size_in_float64_leaves_a_float32_table_as_it_is(num_classes):
    x, centers, labels, _ = problem(SIZES[0], num_classes)

    @jax.jit
    def by_half(centers):
        transform: Any = clj.center_update(lambda count: np.float64(0.5) + 0.0 * count)
        updates, state = transform.update(clj.center_rows(x, centers, labels), transform.init(centers), centers)
        return centers + updates, state

    with jax.enable_x64(True):
        moved, state = by_half(centers)
    chex.assert_type([moved, state.step_norm], jnp.float32)
    np.testing.assert_allclose(moved, oracle.center_update(x, centers, labels, 0.5), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('num_classes', [7, 5000])
@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_are_as_if_absent(bad, num_classes):
    x, centers, labels, mask = problem(SIZES[-1], num_classes)
    broken = x.copy()
    broken[::100, 2] = bad
    moved, state = run(centers, broken, labels, mask)
    present = mask & (np.arange(len(x)) % 100 != 0)
    expected, alone = run(centers, x, labels, present)
    np.testing.assert_allclose(moved, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.step_norm, alone.step_norm, rtol=1e-5)
    assert state.left_out == np.sum(mask & ~present & (labels >= 0))


def test_a_bfloat16_table_is_rounded_once():
    x = np.full((SIZES[0], 1), 101.0, np.float32)
    moved, _ = run(jnp.full((1, 1), 100.0, jnp.bfloat16), x, np.zeros(len(x), int), np.ones(len(x), bool))
    assert moved[0, 0] == 100.5


@pytest.mark.parametrize('num_classes', [1, 5000])
def test_thousands_of_moves_below_the_rounding_of_a_center_add_up(num_classes):
    x, centers = np.full((4096, FEATURES), 100.1, np.float32), np.full((num_classes, FEATURES), 100, np.float32)
    moved, _ = run(centers, x, np.zeros(len(x), int), np.ones(len(x), bool))
    np.testing.assert_allclose(moved[0], 100 + 0.5 * 0.1 * 4096 / 4097, rtol=1e-6)


@pytest.mark.parametrize('num_classes', CLASSES)
def test_the_same_batch_gives_the_same_bits(num_classes):
    x, centers, labels, mask = problem(SIZES[-1], num_classes)
    chex.assert_trees_all_equal(run(centers, x, labels, mask), run(centers, x, labels, mask))


def test_moves_that_were_summed_are_dropped():
    x, centers, labels, mask = problem(SIZES[0], 7)
    transform: Any = clj.center_update(0.5)
    moves, _ = transform.update(clj.center_rows(x, centers, labels, where=mask), transform.init(centers))
    np.testing.assert_array_equal(centers + jax.tree.map(jnp.add, moves, moves), centers)


def test_temporaries_do_not_depend_on_the_number_of_classes(way):
    # At once, two arrays of all classes may together be as large as the batch.
    numbers, limit = {'cpu': ((1000, 10_000, 1_000_000), 2), 'default': ((1000, 3_000_000, 6_000_000), 4)}[way]

    def memory(num_classes) -> Any:
        shape = jax.ShapeDtypeStruct
        arguments = shape((num_classes, 512), jnp.float32), shape((4096, 512), jnp.float32)
        labels, mask = shape((4096,), jnp.int32), shape((4096,), jnp.bool)
        state = jax.eval_shape(clj.center_update().init, arguments[0])
        return step.lower(arguments[0], state, arguments[1], labels, mask).compile().memory_analysis()

    few, more, many = (memory(number) for number in numbers)
    assert more.temp_size_in_bytes == many.temp_size_in_bytes
    assert max(few.temp_size_in_bytes, many.temp_size_in_bytes) < limit * 4096 * 512 * 4
    assert many.alias_size_in_bytes >= 1_000_000 * 512 * 4


@pytest.mark.parametrize('repeated', [[0, 0], [1, 9], [63, 30]])
def test_under_vmap_each_table_moves_by_its_own_rows_and_a_cpu_copies_none(repeated, way):
    num_classes = 5000
    labels = np.stack([np.arange(64) % (64 - number) for number in repeated])
    x, tables = np.random.default_rng(0).normal(size=(2, 64, 3)), jnp.ones((2, num_classes, 3))
    everywhere = np.ones(64, bool)
    state = clj.center_update().init(tables)
    vmapped = jax.jit(jax.vmap(step, (0, None, 0, 0, None)), donate_argnums=0)
    memory: Any = vmapped.lower(tables, state, x, labels, everywhere).compile().memory_analysis()
    assert way != 'cpu' or memory.temp_size_in_bytes < tables.nbytes // 2
    moved, states = vmapped(tables, state, x, labels, everywhere)
    for k in range(2):
        expected, state = run(jnp.ones((num_classes, 3)), x[k], labels[k], everywhere)
        np.testing.assert_allclose(moved[k], expected, rtol=1e-6)
        np.testing.assert_allclose(states.step_norm[k], state.step_norm, rtol=1e-6)


@pytest.mark.parametrize('num_classes', [3, 50])
def test_a_move_can_be_differentiated_for_its_step_and_its_table(num_classes):
    def after(alpha, centers):
        rows = clj.center_rows(x, jax.lax.stop_gradient(centers), labels)
        return move(centers, rows, alpha)[0]

    x, labels = jnp.arange(20.0).reshape(10, 2), jnp.array([0, 1, 1, 2, 0, -1, 2, 2, 1, 0])
    centers = jnp.ones((num_classes, 2))
    of_alpha, of_centers = jax.jit(jax.grad(lambda *args: jnp.sum(after(*args)), argnums=(0, 1)))(0.5, centers)
    np.testing.assert_allclose(of_alpha, jnp.sum(after(1.0, centers) - after(0.0, centers)), rtol=1e-5)
    np.testing.assert_array_equal(of_centers, np.ones_like(centers))


def test_devices_with_tables_of_their_own_under_the_replication_check():
    tables = jnp.arange(8.0)[:, None, None] + jnp.ones((8, 3, 2))
    x, labels = jnp.zeros((8 * SIZES[0], 2)), jnp.arange(8 * SIZES[0]) % 3
    mesh = jax.make_mesh((8,), ('data',), (jax.sharding.AxisType.Auto,))

    def own(tables, x, labels):
        moved, state = move(tables[0], clj.center_rows(x, tables[0], labels))
        return moved[None], state.step_norm[None]

    def from_one(table, x, labels):
        return move(table, clj.center_rows(x, table, labels))[0][None]

    split = jax.P('data')
    moved, norms = jax.jit(jax.shard_map(own, mesh=mesh, in_specs=split, out_specs=split))(tables, x, labels)
    left = 1 - 0.5 * np.bincount(labels[: SIZES[0]]) / (1 + np.bincount(labels[: SIZES[0]]))
    np.testing.assert_allclose(moved, left[:, None] * np.asarray(tables), rtol=1e-2)
    np.testing.assert_allclose(norms, np.linalg.norm(tables - moved, axis=(1, 2)), rtol=1e-5)
    shared = jax.jit(jax.shard_map(from_one, mesh=mesh, in_specs=(jax.P(), split, split), out_specs=split))
    chex.assert_trees_all_close(shared(tables[0], x, labels)[0], moved[0])


@pytest.mark.parametrize('num_classes', [3, 50])
@pytest.mark.parametrize('varying', ['indices', 'values', 'scale'])
def test_rows_of_which_a_part_is_the_same_on_all_devices(varying, num_classes):
    parts = {'indices': jnp.array([1, 2, 1, 0]), 'values': jnp.ones((4, 2)), 'scale': jnp.arange(4.0)}
    mesh = jax.make_mesh((2,), ('data',), (jax.sharding.AxisType.Auto,))

    def add(part):
        rows = clj.RowUpdates(**parts | {varying: part})
        return (jnp.zeros((num_classes, 2)) + rows)[None]

    stacked = jnp.concatenate([parts[varying], parts[varying][::-1]])
    got = jax.jit(jax.shard_map(add, mesh=mesh, in_specs=jax.P('data'), out_specs=jax.P('data')))(stacked)
    for device, part in enumerate([parts[varying], parts[varying][::-1]]):
        np.testing.assert_allclose(got[device], add(part)[0])
