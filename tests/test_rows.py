"""RowUpdates and concatenate_rows: rows are added to a table, and gradient arithmetic never moves another row."""

import operator
import pickle
from typing import Any

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax import P

import centerloss_jax as clj
from tests.support import oracle
from tests.support.cases import some_by_default
from tests.support.rows import IS_REFUSED, MOVES_NOTHING, TABLE, make_rows
from tests.support.steps import move

jitted_sum = jax.jit(operator.add)
SUMS = {
    'numpy': operator.add,
    'jax': lambda table, rows: operator.add(jnp.asarray(table), rows),
    'jit': jitted_sum,
}
all_sums = pytest.mark.parametrize('add', SUMS.values(), ids=SUMS.keys())
eager_and_jit = pytest.mark.parametrize('add', [operator.add, jitted_sum], ids=['eager', 'jit'])


@all_sums
@pytest.mark.parametrize(
    'indices',
    [
        pytest.param([4, 0, 16], id='distinct'),
        pytest.param([4, 4, 0, 4], id='repeated'),
        pytest.param([], id='none'),
        pytest.param([4, 17, 2**31 - 1], id='beyond the table'),
        pytest.param([4, -1, -17, -(2**31)], id='negative'),
    ],
)
def test_rows_are_added_where_their_indices_say_and_nowhere_else(add, indices):
    rows = make_rows(*indices)
    total = add(TABLE, rows)
    assert isinstance(total, jax.Array)
    np.testing.assert_allclose(total, oracle.add_rows(TABLE, indices, rows.values), rtol=1e-6)
    untouched = [j for j in range(17) if j not in indices]
    np.testing.assert_array_equal(np.asarray(total)[untouched], TABLE[untouched])


@eager_and_jit
@pytest.mark.parametrize(
    'indices',
    [
        np.array([4, 100, -1, -2], np.int8),
        np.array([4, 255, 44, 1], np.uint8),
        np.array([4, -1, 300, 255], np.int16),
        np.array([4, 2**31 + 5, 2**32 - 1, 7], np.uint32),
    ],
    ids=lambda indices: indices.dtype.name,
)
def test_indices_of_any_integer_dtype(add, indices):
    # 300 rows: more than int8 and uint8 hold, so a size cast to the indices' dtype would wrap.
    table = np.random.default_rng(0).normal(1, 2, (300, 3)).astype(np.float32)
    values = make_rows(*range(4)).values
    total = add(table, clj.RowUpdates(jnp.asarray(indices), values))
    np.testing.assert_allclose(total, oracle.add_rows(table, indices, values), rtol=1e-6)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_table_keeps_its_dtype(dtype):
    rows = make_rows(4, 0)
    table = jnp.asarray(TABLE, dtype)
    chex.assert_type(table + rows, dtype)
    expected = oracle.add_rows(np.asarray(table), rows.indices, rows.values)
    np.testing.assert_allclose(table + rows, expected, rtol=float(jnp.finfo(dtype).eps))
    chex.assert_type(optax.apply_updates(table, rows), dtype)
    narrow = clj.RowUpdates(rows.indices, rows.values.astype(jnp.bfloat16))
    chex.assert_type(table + narrow, dtype)
    with jax.enable_x64(True):
        wide = clj.RowUpdates(rows.indices, rows.values.astype(jnp.float64))
        chex.assert_type(table + wide, dtype)


def test_optax_apply_updates_computes_p_plus_u():
    # Optax does not promise this. If it changes, with_centers needs another way to update the table.
    params = {'kernel': jnp.ones(5), 'centers': jnp.asarray(TABLE)}
    rows = make_rows(4, 0, 4)
    new: Any = optax.apply_updates(params, {'kernel': jnp.full(5, 0.5), 'centers': rows})
    np.testing.assert_array_equal(new['kernel'], np.full(5, 1.5))
    np.testing.assert_allclose(new['centers'], oracle.add_rows(TABLE, [4, 0, 4], rows.values), rtol=1e-6)


def test_rows_are_a_pytree():
    rows = make_rows(4, 0)
    leaves, treedef = jax.tree.flatten(rows)
    rebuilt = jax.tree.unflatten(treedef, leaves)
    assert isinstance(rebuilt, clj.RowUpdates)
    chex.assert_trees_all_equal(rebuilt, rows)
    through_jit = jax.jit(lambda rows: rows)(rows)
    np.testing.assert_array_equal(TABLE + through_jit, TABLE + rows)
    _, through_scan = jax.lax.scan(lambda carry, _: (carry, carry), rows, length=2)
    second = jax.tree.map(lambda leaf: leaf[1], through_scan)
    np.testing.assert_array_equal(TABLE + second, TABLE + rows)


# Rows of center_rows, whose values are a product of two leaves.
X, LABELS = np.random.default_rng(2).normal(size=(2, 3, 3)).astype(np.float32), np.array([[0, 0, 1], [2, 1, -1]])
eq_4 = jax.jit(move)


def batch_rows(k) -> Any:
    return clj.center_rows(X[k], TABLE, LABELS[k])


def through_orbax(rows, path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / 'rows', {'rows': rows})
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / 'rows', jax.eval_shape(lambda: {'rows': rows}))['rows']


COPIES = {
    'pickle': lambda rows, path: pickle.loads(pickle.dumps(rows)),
    'flatten': lambda rows, path: jax.tree.unflatten(jax.tree.structure(rows), jax.tree.leaves(rows)),
    'device_get': lambda rows, path: jax.device_get(rows),
    'orbax': through_orbax,
}


@pytest.mark.parametrize('kind', ['centers', 'gradient', None])
@pytest.mark.parametrize('copy', COPIES.values(), ids=COPIES.keys())
def test_copied_rows_are_of_the_same_kind(copy, kind, tmp_path):
    assert copy(clj.RowUpdates(LABELS[0], X[0], kind=kind), tmp_path).kind == kind


@pytest.mark.parametrize('copy', COPIES.values(), ids=COPIES.keys())
def test_copied_rows_move_centers_as_the_rows_do(copy, tmp_path):
    rows = batch_rows(0)
    moved, state = eq_4(TABLE, copy(rows, tmp_path))
    chex.assert_trees_all_equal((moved, state), eq_4(TABLE, rows))
    assert state.dropped == 0


def test_rows_leave_a_shard_map_joined_along_the_batch():
    def local(x, labels, table):
        return clj.center_rows(x, table, labels)

    mesh = jax.make_mesh((2,), ('data',), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(P('data'), P('data'), P()), out_specs=P('data'))
    rows = jax.jit(mapped)(X.reshape(6, 3), LABELS.reshape(6), TABLE)
    moved, state = eq_4(TABLE, jax.device_get(rows))
    np.testing.assert_allclose(moved, oracle.center_update(X.reshape(6, 3), TABLE, LABELS.reshape(6), 0.5), rtol=1e-5)
    assert state.dropped == 0


def test_a_mean_of_the_floating_leaves_over_devices_is_not_noticed(per_device):
    # A mean of equal constants is the constant. Each device then moves its own classes by the mean of all values.
    def step(batch, table):
        def mean_of_floats(leaf):
            return jax.lax.pmean(leaf, 'batch') if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

        moved, state = move(table, jax.tree.map(mean_of_floats, clj.center_rows(batch[0], table, batch[1])))
        return moved, state.dropped

    moved, dropped = per_device(step, (X, LABELS), TABLE)
    np.testing.assert_array_equal(dropped, [0, 0])
    assert np.any(np.abs(moved[0] - oracle.center_update(X[0], TABLE, LABELS[0], 0.5)) > 0.1)


INT64 = clj.RowUpdates(np.array([2**32 + 1, 3, -(2**32) + 1]), np.ones((3, 3), np.float32))


def test_an_int64_index_beyond_the_table_is_dropped_without_x64():
    # As int32 the first index would be 1, and the last one too.
    expected = oracle.add_rows(TABLE, [3], np.ones((1, 3)))
    np.testing.assert_allclose(TABLE + INT64, expected, rtol=1e-6)
    np.testing.assert_allclose(TABLE + clj.concatenate_rows(INT64, INT64), 2 * expected - TABLE, rtol=1e-6)
    moved, state = move(jnp.asarray(TABLE), INT64)
    np.testing.assert_array_equal(np.flatnonzero(np.any(moved != TABLE, axis=1)), [3])
    assert state.dropped == 1


def stacked_by_scan():
    return jax.lax.scan(lambda carry, xy: (carry, clj.center_rows(xy[0], TABLE, xy[1])), 0, (X, LABELS))[1]


def in_another_vmap():
    one = jax.vmap(lambda x, labels: clj.center_rows(x, TABLE, labels))
    return jax.tree.map(lambda leaf: leaf[0], jax.vmap(one)(X[None], LABELS[None]))


STACKED: dict[str, Any] = {
    'vmap': lambda: jax.vmap(lambda x, labels: clj.center_rows(x, TABLE, labels))(X, LABELS),
    'vmap twice': in_another_vmap,
    'scan': stacked_by_scan,
    'pmap': lambda: jax.device_get(jax.pmap(lambda x, labels: clj.center_rows(x, TABLE, labels))(X, LABELS)),
}


@pytest.mark.parametrize('stack', some_by_default(STACKED, 'vmap', 'scan', 'pmap'))
def test_stacked_rows_have_the_values_of_each_and_can_be_joined(stack):
    stacked = stack()
    np.testing.assert_allclose(stacked.values, [batch_rows(k).values for k in range(2)], rtol=1e-6)
    expected, _ = eq_4(TABLE, clj.concatenate_rows(batch_rows(0), batch_rows(1)))
    for joined in (
        clj.concatenate_rows(stacked),
        jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), stacked),
    ):
        moved, state = eq_4(TABLE, joined)
        np.testing.assert_allclose(moved, expected, rtol=1e-6)
        assert state.dropped == 0


def test_stacked_moves_of_center_update_have_the_values_of_each():
    # Each row has a scale of its own here, so that a wrong axis of the scale gives wrong values where N equals D.
    transform: Any = clj.center_update(1.0)

    def moves(x, labels):
        return transform.update(clj.center_rows(x, TABLE, labels), transform.init(TABLE), TABLE)[0]

    stacked = jax.jit(jax.vmap(moves))(X, LABELS)
    np.testing.assert_allclose(stacked.values, [moves(X[k], LABELS[k]).values for k in range(2)], rtol=1e-6)


@pytest.mark.parametrize('name', ['added', 'squared', 'floats halved', 'floats clipped', 'floats normalized'])
def test_stacked_rows_that_arithmetic_has_changed_move_nothing(name):
    changed = MOVES_NOTHING[name](stacked := stacked_by_scan(), stacked)
    moved, state = eq_4(TABLE, clj.concatenate_rows(changed))
    np.testing.assert_array_equal(moved, TABLE)
    assert state.dropped == 6


@eager_and_jit
def test_stacked_rows_are_added_by_joining_them(add):
    with pytest.raises(ValueError, match='concatenate_rows'):
        add(TABLE, stacked_by_scan())
    with pytest.raises(ValueError, match='concatenate_rows'):
        move(jnp.asarray(TABLE), stacked_by_scan())


def test_accumulation_by_scan_is_the_step_of_the_whole_batch():
    @jax.jit
    def step(table, x, labels):
        _, rows = jax.lax.scan(lambda carry, xy: (carry, clj.center_rows(xy[0], table, xy[1])), None, (x, labels))
        return move(table, clj.concatenate_rows(rows))[0]

    expected = oracle.center_update(X.reshape(6, 3), TABLE, LABELS.reshape(6), 0.5)
    np.testing.assert_allclose(step(TABLE, X, LABELS), expected, rtol=1e-5)


@pytest.mark.parametrize(
    'values',
    [
        np.ones((2, 5), np.float32),
        np.ones((2, 1), np.float32),
        np.ones((1, 3), np.float32),
        np.ones(3, np.float32),
    ],
    ids=lambda values: str(values.shape),
)
@all_sums
def test_rows_that_do_not_fit_the_table_are_an_error(add, values):
    with pytest.raises(ValueError, match=r'[Rr]ow'):
        add(TABLE, clj.RowUpdates(jnp.array([4, 0]), jnp.asarray(values)))


def test_rows_of_integers_are_an_error():
    with pytest.raises(TypeError, match=r'values of RowUpdates.*int32\[2,3\]'):
        operator.add(TABLE, clj.RowUpdates(jnp.array([4, 0]), jnp.ones((2, 3), jnp.int32)))


@pytest.mark.parametrize('other', [0, 1.0, np.float32(0), np.zeros(3, np.float32)], ids=repr)
def test_only_a_table_takes_rows(other):
    # sum([rows, rows]) starts with 0 + rows.
    with pytest.raises((TypeError, ValueError), match=r'RowUpdates|rows|table'):
        operator.add(other, make_rows(4, 0))


@all_sums
@pytest.mark.parametrize('arithmetic', MOVES_NOTHING.values(), ids=MOVES_NOTHING.keys())
def test_rows_that_arithmetic_has_changed_move_nothing(arithmetic, add):
    summed = arithmetic(make_rows(7, 3, 1), make_rows(7, 4, 1, seed=2))
    np.testing.assert_array_equal(add(TABLE, summed), TABLE)


@all_sums
@pytest.mark.parametrize('arithmetic', IS_REFUSED.values(), ids=IS_REFUSED.keys())
def test_rows_that_were_scaled_are_refused(arithmetic, add):
    scaled = arithmetic(make_rows(7, 3, 1), make_rows(7, 4, 2, seed=2))
    with pytest.raises(TypeError, match='RowUpdates'):
        add(TABLE, scaled)


def test_optax_transforms_over_the_whole_tree_move_no_center():
    table, rows = {'centers': jnp.asarray(TABLE)}, {'centers': make_rows(7, 3)}
    accumulated = optax.tree.add(rows, rows)
    chex.assert_trees_all_equal(optax.apply_updates(table, accumulated), table)
    with pytest.raises(TypeError, match='RowUpdates'):
        optax.apply_updates(table, optax.tree.scale(0.5, rows))


def test_summed_over_devices_rows_move_nothing(per_device):
    # Label 3 on both of two devices becomes row 6.
    x, labels = np.ones((2, 2, 3), np.float32), np.array([[3, 1], [3, 2]], np.int32)

    def step(batch, table):
        rows = clj.center_rows(batch[0], table, batch[1])
        return table + jax.lax.psum(rows, 'batch')

    for table in per_device(step, (x, labels), TABLE):
        np.testing.assert_array_equal(table, TABLE)


def test_averaged_over_devices_rows_are_refused(per_device):
    def step(batch, table):
        rows = clj.center_rows(batch[0], table, batch[1])
        return table + jax.lax.pmean(rows, 'batch')

    with pytest.raises(TypeError, match='RowUpdates'):
        per_device(step, (np.ones((2, 2, 3), np.float32), np.full((2, 2), 3, np.int32)), TABLE)


class TestConcatenateRows:
    @eager_and_jit
    def test_adds_all_parts(self, add):
        parts = make_rows(4, 0, 4), make_rows(4, 16, seed=2), make_rows(seed=3), make_rows(17, -1, 9, seed=4)
        joined = clj.concatenate_rows(*parts)
        assert isinstance(joined, clj.RowUpdates)
        expected = TABLE
        for part in parts:
            expected = oracle.add_rows(expected, part.indices, part.values)
        np.testing.assert_allclose(add(TABLE, joined), expected, rtol=1e-6)

    def test_of_one_part_adds_that_part(self):
        rows = make_rows(4, 0, 4)
        np.testing.assert_array_equal(TABLE + clj.concatenate_rows(rows), TABLE + rows)

    @eager_and_jit
    @pytest.mark.parametrize('place', [0, 1, 2])
    def test_only_a_part_that_was_summed_is_dropped(self, add, place):
        summed = jax.tree.map(jnp.add, make_rows(7, 3), make_rows(7, 4, seed=2))
        parts = [make_rows(4, 0, 4), make_rows(16, 4, seed=3)]
        expected = TABLE
        for part in parts:
            expected = oracle.add_rows(expected, part.indices, part.values)
        parts.insert(place, summed)
        joined = clj.concatenate_rows(*parts)
        np.testing.assert_allclose(add(TABLE, joined), expected, rtol=1e-6)
        np.testing.assert_array_equal(np.asarray(add(TABLE, joined))[[7, 14]], TABLE[[7, 14]])

    @eager_and_jit
    def test_of_joined_rows_that_were_summed_moves_nothing(self, add):
        joined = [clj.concatenate_rows(make_rows(7, 3, seed=s), make_rows(1, seed=s + 1)) for s in (1, 3)]
        np.testing.assert_array_equal(add(TABLE, jax.tree.map(jnp.add, *joined)), TABLE)
        # Joined after they were summed, then summed again.
        twice = clj.concatenate_rows(jax.tree.map(jnp.add, *joined), make_rows(2))
        np.testing.assert_array_equal(add(TABLE, jax.tree.map(jnp.add, twice, twice)), TABLE)

    def test_may_be_joined_again(self):
        parts = make_rows(4, 0), make_rows(4, 16, seed=2), make_rows(9, seed=3)
        summed = jax.tree.map(jnp.add, make_rows(7, 3), make_rows(7, 4, seed=2))
        nested = clj.concatenate_rows(clj.concatenate_rows(parts[0], summed), clj.concatenate_rows(*parts[1:]))
        flat = clj.concatenate_rows(*parts)
        np.testing.assert_allclose(TABLE + nested, TABLE + flat, rtol=1e-6)

    def test_counts_a_class_of_several_passes_once_in_eq_4(self):
        # Two passes that are joined are one batch and move the center by 4/3. Their sum would move it by 2.
        x, centers = np.array([[2.0], [6.0]], np.float32), np.zeros((2, 1), np.float32)
        passes = [clj.center_rows(row[None], centers, [1]) for row in x]
        moved, _ = jax.jit(move)(centers, clj.concatenate_rows(*passes))
        np.testing.assert_allclose(moved, oracle.center_update(x, centers, [1, 1], 0.5), rtol=1e-6)

    def test_a_summed_part_is_counted(self):
        summed = jax.tree.map(jnp.add, make_rows(7, 3, 1), make_rows(7, 4, 2, seed=2))
        joined = clj.concatenate_rows(make_rows(4, 0), summed)
        _, state = jax.jit(move)(TABLE, joined)
        assert state.dropped == 3

    @pytest.mark.parametrize('kind', ['centers', 'gradient', None])
    def test_keeps_the_kind_of_the_parts_that_have_one(self, kind):
        part = clj.RowUpdates(LABELS[0], X[0], kind=kind)
        for parts in [(part,), (part, part), (make_rows(4), part), (part, make_rows(4))]:
            assert clj.concatenate_rows(*parts).kind == kind

    def test_parts_of_two_kinds_are_an_error(self):
        with pytest.raises(TypeError, match=r"'centers' and 'gradient'.*by themselves"):
            clj.concatenate_rows(batch_rows(0), clj.RowUpdates(LABELS[0], X[0], kind='gradient'))

    def test_parts_of_other_widths_are_an_error(self):
        with pytest.raises(ValueError, match=r'3.*5|5.*3'):
            clj.concatenate_rows(make_rows(4), make_rows(4, num_features=5))

    @pytest.mark.parametrize('arithmetic', IS_REFUSED.values(), ids=IS_REFUSED.keys())
    def test_a_part_that_was_scaled_is_refused(self, arithmetic):
        scaled = arithmetic(make_rows(7, 3), make_rows(7, 4, seed=2))
        with pytest.raises(TypeError, match='RowUpdates'):
            clj.concatenate_rows(make_rows(4), scaled)

    @pytest.mark.parametrize('parts', [(), (np.ones((2, 3)),), (None,), ([],)], ids=repr)
    def test_takes_rows_and_at_least_one(self, parts):
        with pytest.raises((TypeError, ValueError), match=r'RowUpdates|rows|table'):
            clj.concatenate_rows(*parts)


@hypothesis.given(
    indices=st.lists(st.integers(-20, 40), min_size=6, max_size=6),
    other=st.lists(st.integers(-20, 40), min_size=6, max_size=6),
)
def test_for_all_indices_a_sum_moves_nothing_and_a_join_adds_both(indices, other):
    a, b = make_rows(*indices), make_rows(*other, seed=2)
    np.testing.assert_array_equal(jitted_sum(TABLE, jax.tree.map(jnp.add, a, b)), TABLE)
    expected = oracle.add_rows(oracle.add_rows(TABLE, indices, a.values), other, b.values)
    np.testing.assert_allclose(jitted_sum(TABLE, clj.concatenate_rows(a, b)), expected, rtol=1e-5, atol=1e-6)
