"""RowUpdates: rows that are added to a table, and that no gradient arithmetic may turn into other rows."""

import operator
from typing import Any

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import centerloss_jax as clj
from tests.support import oracle
from tests.support.problems import make_problem, problems
from tests.support.steps import move

TABLE = np.random.default_rng(0).normal(1, 2, (17, 3)).astype(np.float32)


def make_rows(*indices, seed=1, num_features=3) -> Any:
    """Any, since optax's types do not know rows."""
    values = np.random.default_rng(seed).normal(size=(len(indices), num_features)).astype(np.float32)
    return clj.RowUpdates(jnp.array(indices, jnp.int32), jnp.asarray(values))


def jitted_sum(table, rows):
    return jax.jit(lambda table, rows: table + rows)(table, rows)


both_sums = pytest.mark.parametrize('add', [lambda table, rows: table + rows, jitted_sum], ids=['eager', 'jit'])
both_tables = pytest.mark.parametrize('as_table', [np.asarray, jnp.asarray], ids=['numpy', 'jax'])


@both_sums
@both_tables
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
def test_rows_are_added_where_their_indices_say_and_nowhere_else(as_table, add, indices):
    rows = make_rows(*indices)
    total = add(as_table(TABLE), rows)
    assert isinstance(total, jax.Array)
    np.testing.assert_allclose(total, oracle.add_rows(TABLE, indices, rows.values), rtol=1e-6)
    untouched = [j for j in range(17) if j not in indices]
    np.testing.assert_array_equal(np.asarray(total)[untouched], TABLE[untouched])


@both_sums
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
    chex.assert_type(optax.apply_updates(table, rows), dtype)
    narrow = clj.RowUpdates(rows.indices, rows.values.astype(jnp.bfloat16))
    chex.assert_type(table + narrow, dtype)
    with jax.enable_x64(True):
        wide = clj.RowUpdates(rows.indices, rows.values.astype(jnp.float64))
        chex.assert_type(table + wide, dtype)


def test_optax_apply_updates_computes_p_plus_u():
    # Optax's habit and not its promise: the day this fails, with_centers needs another way into the table.
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
@both_tables
def test_rows_that_do_not_fit_the_table_are_an_error(as_table, values):
    with pytest.raises(ValueError, match=r'[Rr]ow'):
        operator.add(as_table(TABLE), clj.RowUpdates(jnp.array([4, 0]), jnp.asarray(values)))


@pytest.mark.parametrize('other', [0, 1.0, np.float32(0), np.zeros(3, np.float32)], ids=repr)
def test_only_a_table_takes_rows(other):
    # sum([rows, rows]) begins with 0 + rows.
    with pytest.raises((TypeError, ValueError), match=r'RowUpdates|rows|table'):
        operator.add(other, make_rows(4, 0))


# What users do to a whole tree of gradients. Each must leave every row of the table where it was.
MOVES_NOTHING = {
    'added': lambda a, b: jax.tree.map(jnp.add, a, b),
    'added to itself': lambda a, b: jax.tree.map(jnp.add, a, a),
    'added twice': lambda a, b: jax.tree.map(lambda *leaves: sum(leaves), a, b, a),
    'subtracted': lambda a, b: jax.tree.map(jnp.subtract, a, b),
    'times an integer': lambda a, b: jax.tree.map(lambda leaf: 2 * leaf, a),
    'negated': lambda a, b: jax.tree.map(jnp.negative, a),
    'zeroed': lambda a, b: jax.tree.map(jnp.zeros_like, a),
    'multiplied': lambda a, b: jax.tree.map(jnp.multiply, a, b),
    'squared': lambda a, b: jax.tree.map(jnp.square, a),
    'clipped to whole numbers': lambda a, b: optax.clip(1).update(a, optax.EmptyState())[0],
    'reduced to signs': lambda a, b: jax.tree.map(jnp.sign, a),
}

IS_REFUSED = {
    'averaged': lambda a, b: jax.tree.map(lambda p, q: (p + q) / 2, a, b),
    'interpolated': lambda a, b: jax.tree.map(lambda p, q: 0.5 * p + 0.5 * q, a, b),
    'scaled by a number': lambda a, b: jax.tree.map(lambda leaf: 0.1 * leaf, a),
    'scaled by an array': lambda a, b: jax.tree.map(lambda leaf: jnp.float32(1) * leaf, a),
    'clipped': lambda a, b: jax.tree.map(lambda leaf: jnp.clip(leaf, -1.0, 1.0), a),
    'cast': lambda a, b: jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), a),
}


@both_sums
@both_tables
@pytest.mark.parametrize('arithmetic', MOVES_NOTHING.values(), ids=MOVES_NOTHING.keys())
def test_rows_that_arithmetic_has_changed_move_nothing(arithmetic, as_table, add):
    # 7 + 7 is 14, 3 + 4 is 7 and 1 · 1 is 1: rows that the table has.
    summed = arithmetic(make_rows(7, 3, 1), make_rows(7, 4, 1, seed=2))
    np.testing.assert_array_equal(add(as_table(TABLE), summed), TABLE)


@both_sums
@both_tables
@pytest.mark.parametrize('arithmetic', IS_REFUSED.values(), ids=IS_REFUSED.keys())
def test_rows_that_were_scaled_are_refused(arithmetic, as_table, add):
    scaled = arithmetic(make_rows(7, 3, 1), make_rows(7, 4, 2, seed=2))
    with pytest.raises(TypeError, match='RowUpdates'):
        add(as_table(TABLE), scaled)


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


@jax.jit
def added_to_zeros(x, centers, labels, **options):
    return jnp.zeros_like(centers) + clj.center_rows(x, centers, labels, **options)


class TestCenterRows:
    @hypothesis.given(problem=problems)
    def test_are_the_weighted_differences_in_float64(self, problem):
        with jax.enable_x64(True):
            total = added_to_zeros(*problem.arrays, **problem.options)
        expected = oracle.center_rows(*problem.arrays, **problem.options)
        np.testing.assert_allclose(total, expected, rtol=1e-12, atol=1e-12)

    def test_point_from_the_features_to_the_center(self, worked_example):
        rows = clj.center_rows(worked_example.x, worked_example.centers, worked_example.labels)
        np.testing.assert_array_equal(jnp.zeros((3, 2)) + rows, [[-3, -4], [1, 0], [-1, -2]])

    def test_are_as_many_as_the_batch_whatever_the_table(self):
        x, centers, labels, _ = make_problem(leading=(2, 3), num_classes=1000, dtype=np.float32)
        rows = clj.center_rows(x, centers, labels)
        chex.assert_shape(rows.indices, (6,))
        chex.assert_shape(rows.values, (6, 3))
        assert all(leaf.size <= 18 for leaf in map(jnp.asarray, jax.tree.leaves(rows)))

    def test_classes_that_are_absent_stay_to_the_bit(self):
        x, centers, labels, options = make_problem(leading=(128,), num_classes=901, dtype=np.float32, masked=True)
        moved = np.asarray(jnp.asarray(centers) + clj.center_rows(x, centers, labels, **options))
        present = np.isin(np.arange(901), labels[options['where']])
        np.testing.assert_array_equal(moved[~present], centers[~present])
        assert np.all(np.any(moved[present] != centers[present], axis=1))
        gradient = np.asarray(jax.grad(clj.center_loss, 1)(x, centers, labels, **options))
        np.testing.assert_array_equal(gradient[~present], np.zeros_like(gradient[~present]))

    @pytest.mark.parametrize('content', [np.nan, np.inf])
    def test_of_left_out_examples_hold_nothing_that_is_not_finite(self, content):
        x, centers, labels, options = make_problem(dtype=np.float32, weights='elements')
        where = np.arange(7) != 4
        x[[1, 4]], options['weights'][[1, 4]], labels[1] = content, content, -1
        rows = clj.center_rows(x, centers, labels, where=where, **options)
        chex.assert_tree_all_finite(jnp.zeros_like(centers) + rows)
        chex.assert_tree_all_finite(rows.values)

    @pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16], ids=['bfloat16', 'float16'])
    @pytest.mark.parametrize('centers_dtype', [jnp.float32, None], ids=['float32 table', 'narrow table'])
    def test_of_half_precision_are_float32(self, dtype, centers_dtype):
        x, centers = jnp.full((1, 3), 0.25, dtype), jnp.full((2, 3), 100, centers_dtype or dtype)
        rows = clj.center_rows(x, centers, np.array([1]))
        chex.assert_type(rows.values, jnp.float32)
        np.testing.assert_array_equal(jnp.zeros((2, 3)) + rows, [[0] * 3, [99.75] * 3])

    def test_carry_no_gradient(self):
        x, centers, labels, options = make_problem(dtype=np.float32, weights='examples')

        def total(x, centers, weights):
            return jnp.sum(clj.center_rows(x, centers, labels, weights=weights).values)

        gradients = jax.grad(total, (0, 1, 2))(x, centers, options['weights'])
        chex.assert_trees_all_equal(gradients, jax.tree.map(jnp.zeros_like, gradients))

    @pytest.mark.parametrize(('alpha', 'remaining'), [(0.5, 0.75**16), (1.0, 0.5**16)])
    def test_visited_once_a_batch_a_class_closes_half_of_alpha(self, alpha, remaining):
        centers, x = np.full((5, 2), 3, np.float32), np.array([[7, -1]], np.float32)
        gap = x - centers[2]
        visit = jax.jit(lambda centers: move(centers, clj.center_rows(x, centers, [2]), alpha)[0])
        for _ in range(16):
            centers = visit(centers)
        centers = np.asarray(centers)
        np.testing.assert_allclose(x - centers[2], remaining * gap, rtol=1e-2)
        np.testing.assert_array_equal(centers[[0, 1, 3, 4]], np.full((4, 2), 3.0))


class TestConcatenateRows:
    @both_sums
    def test_is_all_of_them(self, add):
        parts = make_rows(4, 0, 4), make_rows(4, 16, seed=2), make_rows(seed=3), make_rows(17, -1, 9, seed=4)
        joined = clj.concatenate_rows(*parts)
        assert isinstance(joined, clj.RowUpdates)
        expected = TABLE
        for part in parts:
            expected = oracle.add_rows(expected, part.indices, part.values)
        np.testing.assert_allclose(add(TABLE, joined), expected, rtol=1e-6)

    def test_of_one_is_the_same(self):
        rows = make_rows(4, 0, 4)
        np.testing.assert_array_equal(TABLE + clj.concatenate_rows(rows), TABLE + rows)

    @both_sums
    @pytest.mark.parametrize('place', [0, 1, 2])
    def test_a_part_that_was_summed_is_dropped_alone(self, add, place):
        summed = jax.tree.map(jnp.add, make_rows(7, 3), make_rows(7, 4, seed=2))
        parts = [make_rows(4, 0, 4), make_rows(16, 4, seed=3)]
        expected = TABLE
        for part in parts:
            expected = oracle.add_rows(expected, part.indices, part.values)
        parts.insert(place, summed)
        joined = clj.concatenate_rows(*parts)
        np.testing.assert_allclose(add(TABLE, joined), expected, rtol=1e-6)
        np.testing.assert_array_equal(np.asarray(add(TABLE, joined))[[7, 14]], TABLE[[7, 14]])

    @both_sums
    def test_is_itself_guarded(self, add):
        joined = [clj.concatenate_rows(make_rows(7, 3, seed=s), make_rows(1, seed=s + 1)) for s in (1, 3)]
        np.testing.assert_array_equal(add(TABLE, jax.tree.map(jnp.add, *joined)), TABLE)
        # Joined after they were summed, and summed again after that.
        twice = clj.concatenate_rows(jax.tree.map(jnp.add, *joined), make_rows(2))
        np.testing.assert_array_equal(add(TABLE, jax.tree.map(jnp.add, twice, twice)), TABLE)

    def test_may_be_joined_again(self):
        parts = make_rows(4, 0), make_rows(4, 16, seed=2), make_rows(9, seed=3)
        summed = jax.tree.map(jnp.add, make_rows(7, 3), make_rows(7, 4, seed=2))
        nested = clj.concatenate_rows(clj.concatenate_rows(parts[0], summed), clj.concatenate_rows(*parts[1:]))
        flat = clj.concatenate_rows(*parts)
        np.testing.assert_allclose(TABLE + nested, TABLE + flat, rtol=1e-6)

    def test_counts_a_class_of_several_passes_once_in_eq_4(self):
        # Joined, two passes over one table are one batch and move the center by 4/3; summed, they would by 2.
        x, centers = np.array([[2.0], [6.0]], np.float32), np.zeros((2, 1), np.float32)
        passes = [clj.center_rows(row[None], centers, [1]) for row in x]
        moved, _ = move(centers, clj.concatenate_rows(*passes))
        np.testing.assert_allclose(moved, oracle.center_update(x, centers, [1, 1], 0.5), rtol=1e-6)

    def test_a_summed_part_is_counted(self):
        summed = jax.tree.map(jnp.add, make_rows(7, 3, 1), make_rows(7, 4, 2, seed=2))
        joined = clj.concatenate_rows(make_rows(4, 0), summed)
        _, state = move(TABLE, joined)
        assert state.left_out == 3

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
def test_whatever_the_indices_a_sum_moves_nothing_and_a_join_adds_both(indices, other):
    a, b = make_rows(*indices), make_rows(*other, seed=2)
    np.testing.assert_array_equal(TABLE + jax.tree.map(jnp.add, a, b), TABLE)
    expected = oracle.add_rows(oracle.add_rows(TABLE, indices, a.values), other, b.values)
    np.testing.assert_allclose(TABLE + clj.concatenate_rows(a, b), expected, rtol=1e-5, atol=1e-6)
