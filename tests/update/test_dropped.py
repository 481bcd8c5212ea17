"""The rows that center_update drops and counts, the examples that it ignores, and the updates that it refuses.

Rows that are not finite, that were summed or that have a label >= C are counted. Examples that the caller left out
are not.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import centerloss_jax as clj
from tests.support import oracle, steps
from tests.support.problems import make_problem
from tests.support.rows import IS_REFUSED, MOVES_NOTHING, TABLE, make_rows
from tests.support.steps import update


@jax.jit
def move(x, centers, labels, where=None):
    """Returns the centers after one step at alpha 0.5, and the state."""
    return steps.move(jnp.asarray(centers), clj.center_rows(x, centers, labels, where=where))


NOT_FINITE = [np.nan, np.inf, -np.inf]


@pytest.mark.parametrize('content', NOT_FINITE)
def test_an_example_with_a_feature_that_is_not_finite_is_dropped(content):
    x = np.array([[content, 0], [1, 1]], np.float32)
    moved, state = move(x, np.zeros((5, 2), np.float32), np.array([3, 4]))
    np.testing.assert_array_equal(moved, [[0, 0], [0, 0], [0, 0], [0, 0], [0.25, 0.25]])
    assert state.dropped == 1


@pytest.mark.parametrize('content', NOT_FINITE)
def test_other_examples_move_their_centers_as_if_it_were_absent(content):
    x, centers, labels, _ = make_problem(leading=(16,), dtype=np.float32)
    bad = [2, 3, 11]
    x[2, 0], x[3], x[11, 2] = content, content, content
    moved, state = move(x, centers, labels)
    kept = np.delete(np.arange(16), bad)
    # The oracle skips such examples. The second line does not rely on that.
    np.testing.assert_allclose(moved, oracle.center_update(x, centers, labels, 0.5), rtol=1e-5)
    np.testing.assert_allclose(moved, oracle.center_update(x[kept], centers, labels[kept], 0.5), rtol=1e-5)
    assert state.dropped == 3
    assert np.isfinite(state.step_norm)


@pytest.mark.parametrize('size', [1, 4, 64])
@pytest.mark.parametrize('large', [1e19, -1e19])
def test_large_features_are_finite_and_move_their_center_finitely(size, large):
    moved, state = move(np.full((size, 2), large, np.float32), np.zeros((3, 2), np.float32), np.ones(size, int))
    np.testing.assert_allclose(moved[1], np.full(2, large * 0.5 * size / (1 + size)), rtol=1e-5)
    assert state.dropped == 0


@pytest.mark.parametrize('large', [2e19, -3e38])
def test_a_row_whose_squared_norm_overflows_float32_is_dropped_and_not_in_n_j(large):
    x = np.array([[large, 0], [4, 2]], np.float32)
    moved, state = move(x, np.zeros((3, 2), np.float32), np.ones(2, int))
    np.testing.assert_array_equal(moved, [[0, 0], [1, 0.5], [0, 0]])
    assert state.dropped == 1


def test_an_example_whose_difference_overflows_is_dropped():
    centers = np.full((3, 2), -3e38, np.float32)
    moved, state = move(np.full((2, 2), 3e38, np.float32), centers, np.array([1, 1]))
    np.testing.assert_array_equal(moved, centers)
    assert state.dropped == 2


@pytest.mark.parametrize('content', NOT_FINITE)
def test_a_center_that_is_not_finite_does_not_change_and_changes_no_other(content):
    # The padding rows of a table on a mesh hold Inf.
    centers = np.array([[0, 0], [1, 1], [content, content]], np.float32)
    moved, state = move(np.array([[2, 2], [3, 3]], np.float32), centers, np.array([0, 2]))
    np.testing.assert_array_equal(moved, [[0.5, 0.5], [1, 1], [content, content]])
    assert state.dropped == 1
    assert np.isfinite(state.step_norm)


def test_steps_after_a_bad_batch_move_the_centers():
    centers, labels = jnp.zeros((4, 2)), np.array([1, 1, 3])
    transform = clj.center_update(0.5)
    state, left_out = transform.init(centers), []

    @jax.jit
    def next_step(x, centers, state):
        return update(transform, clj.center_rows(x, centers, labels), state, centers)

    for step in range(5):
        x = np.ones((3, 2), np.float32)
        x[: step % 3] = np.nan
        centers, state = next_step(x, centers, state)
        left_out.append(int(state.dropped))
    assert left_out == [0, 1, 3, 3, 4]
    assert np.all(np.isfinite(centers))
    # Class 1 has 2, 1, 0, 2 and 1 good examples: a step leaves 2/3, 3/4 or all of the gap.
    np.testing.assert_allclose(centers[1], np.full(2, 1 - (2 / 3) ** 2 * (3 / 4) ** 2), rtol=1e-5)


@pytest.mark.parametrize('bad', [10, 11, 20, 2**31 - 1])
def test_a_label_beyond_the_table_moves_nothing_and_is_counted(bad):
    # jnp indexing would clamp it to the last row.
    x, centers, labels, _ = make_problem(leading=(8,), num_classes=10, dtype=np.float32)
    labels[[1, 6]] = bad
    moved, state = move(x, centers, labels)
    kept = labels != bad
    np.testing.assert_allclose(moved, oracle.center_update(x[kept], centers, labels[kept], 0.5), rtol=1e-5)
    assert state.dropped == 2
    if not np.any(labels == 9):
        np.testing.assert_array_equal(moved[9], centers[9])


def test_labels_numbered_from_one_do_not_change_the_last_row():
    x, centers, *_ = make_problem(leading=(10,), num_classes=10, dtype=np.float32)
    moved, state = move(x[:9], centers, np.array([1, 2, 3, 4, 5, 6, 7, 8, 10]))
    np.testing.assert_array_equal(moved[9], centers[9])
    assert state.dropped == 1


@pytest.mark.parametrize('negative', [-1, -3, -(2**31)])
def test_negative_labels_move_no_center_and_are_not_counted(worked_example, negative):
    # NumPy indexing would take -1 for the last class and -3 for the first.
    labels = np.array([0, negative, 1, 0])
    moved, state = move(worked_example.x, worked_example.centers, labels)
    expected = np.vstack([worked_example.moved[:2], worked_example.centers[2:]])
    np.testing.assert_allclose(moved, expected, rtol=1e-6)
    np.testing.assert_array_equal(moved[2], worked_example.centers[2])
    assert state.dropped == 0


@pytest.mark.parametrize('content', [0, *NOT_FINITE])
def test_examples_that_where_leaves_out_are_not_counted(worked_example, content):
    x, where = worked_example.x, np.array([True, False, True, True])
    x[1], labels = content, np.array([0, 77, 1, 0])
    moved, state = move(x, worked_example.centers, labels, where)
    np.testing.assert_allclose(moved[:2], worked_example.moved[:2], rtol=1e-6)
    np.testing.assert_array_equal(moved[2], worked_example.centers[2])
    assert state.dropped == 0


NOTHING = {
    'negative labels': (np.ones((4, 2), np.float32), np.full(4, -1), None),
    'where': (np.ones((4, 2), np.float32), np.array([0, 2, 1, 0]), np.zeros(4, bool)),
    'an empty batch': (np.ones((0, 2), np.float32), np.zeros(0, np.int32), None),
    'empty sequences': (np.ones((3, 0, 2), np.float32), np.zeros((3, 0), np.int32), None),
}


@pytest.mark.parametrize(('x', 'labels', 'where'), NOTHING.values(), ids=NOTHING.keys())
def test_a_batch_without_examples_moves_nothing(worked_example, x, labels, where):
    moved, state = move(x, worked_example.centers, labels, where)
    np.testing.assert_array_equal(moved, worked_example.centers)
    assert (state.count, state.dropped, state.step_norm) == (1, 0, 0)


update_rows = jax.jit(steps.move)


@pytest.mark.parametrize('arithmetic', MOVES_NOTHING.values(), ids=MOVES_NOTHING.keys())
def test_rows_that_arithmetic_has_changed_are_dropped_and_counted(arithmetic):
    rows = arithmetic(make_rows(7, 3, 1), make_rows(7, 4, 2))
    moved, state = update_rows(TABLE, rows)
    np.testing.assert_array_equal(moved, TABLE)
    assert state.dropped == 3


@pytest.mark.parametrize('bound', [10, 10**4, 10**7, 5 * 10**8])
def test_rows_of_a_large_table_that_were_clipped_are_dropped_and_counted(bound):
    # Without params no index is known to be beyond the table.
    rows = clj.RowUpdates(jnp.array([2**31 - 3, 7]), jnp.ones((2, 3)))
    clipped = jax.tree.map(lambda leaf: jnp.clip(leaf, -bound, bound), rows)
    transform: Any = clj.center_update(0.5)
    updates, state = jax.jit(transform.update)(clipped, transform.init(None))
    np.testing.assert_array_equal(updates.values, np.zeros((2, 3)))
    assert state.dropped == 2


eager_and_jit = pytest.mark.parametrize('call', [steps.move, update_rows], ids=['eager', 'jit'])


@eager_and_jit
@pytest.mark.parametrize('arithmetic', IS_REFUSED.values(), ids=IS_REFUSED.keys())
def test_rows_that_were_scaled_are_refused(arithmetic, call):
    rows = arithmetic(make_rows(7, 3), make_rows(7, 4))
    with pytest.raises(TypeError, match=r'RowUpdates.*with_centers'):
        call(TABLE, rows)


# Over two devices label 3 becomes row 6.
@pytest.mark.parametrize('num_devices', [2, 8])
def test_rows_summed_over_devices_are_dropped_and_counted(per_device, num_devices):
    x = np.ones((num_devices, 2, 3), np.float32)
    labels = np.tile(np.array([3, 1], np.int32), (num_devices, 1))
    transform = clj.center_update(0.5)

    def step(batch, table):
        rows = jax.lax.psum(clj.center_rows(batch[0], table, batch[1]), 'batch')
        updates, state = transform.update(rows, transform.init(table), table)
        return optax.apply_updates(table, updates), state

    tables, state = per_device(step, (x, labels), TABLE)
    for device in range(num_devices):
        np.testing.assert_array_equal(tables[device], TABLE)
    np.testing.assert_array_equal(state.dropped, [2] * num_devices)


@pytest.mark.parametrize('reduce', [jax.lax.psum, jax.lax.pmean], ids=['psum', 'pmean'])
def test_rows_reduced_over_devices_never_move_another_class_under_axis_name(per_device, reduce):
    transform = clj.center_update(0.5, axis_name='batch')

    def step(batch, table):
        rows = reduce(clj.center_rows(batch[0], table, batch[1]), 'batch')
        updates, state = transform.update(rows, transform.init(table), table)
        return optax.apply_updates(table, updates), state

    batch = np.ones((2, 2, 3), np.float32), np.full((2, 2), 3, np.int32)
    if reduce is jax.lax.pmean:
        with pytest.raises(TypeError, match=r'RowUpdates.*pmean'):
            per_device(step, batch, TABLE)
    else:
        tables, state = per_device(step, batch, TABLE)
        np.testing.assert_array_equal(tables[0], TABLE)
        np.testing.assert_array_equal(state.dropped, [4, 4])


NOT_ROWS = {
    'a dense gradient': jnp.asarray(TABLE),
    'a NumPy gradient': TABLE,
    'a tree with a dense gradient': {'center': {'centers': TABLE}},
    'rows beside a dense gradient': {'a': make_rows(1), 'b': TABLE},
    'a pair of indices and values': (make_rows(1).indices, make_rows(1).values),
    'a number': 0.0,
    'None': None,
    'nothing in a tree': {'center': {}},
}


@pytest.mark.parametrize('updates', NOT_ROWS.values(), ids=NOT_ROWS.keys())
@eager_and_jit
def test_anything_but_rows_is_an_error_that_says_what_to_pass(updates, call):
    with pytest.raises(TypeError, match=r'RowUpdates.*center_loss_and_rows'):
        call(TABLE, updates)


def test_the_error_names_what_it_got():
    with pytest.raises(TypeError, match=r'17, ?3'):
        steps.move(TABLE, TABLE)


@pytest.mark.parametrize(
    ('indices', 'values'),
    [
        pytest.param(jnp.arange(2), jnp.ones((2, 5)), id='of another width'),
        pytest.param(jnp.arange(2), jnp.ones((2, 1)), id='that would broadcast'),
        pytest.param(jnp.arange(2), jnp.ones((3, 3)), id='of another number'),
        pytest.param(jnp.arange(2)[:, None], jnp.ones((2, 3)), id='with a column of indices'),
        pytest.param(jnp.arange(2), jnp.ones(3), id='as a vector'),
    ],
)
def test_rows_that_do_not_fit_the_table_are_an_error(indices, values):
    with pytest.raises(ValueError, match=r'[Rr]ow'):
        steps.move(TABLE, clj.RowUpdates(indices, values))
