"""What center_update leaves out: rows that are not finite, labels beyond the table, what does not count.

Mistakes are counted in the state; what the user left out is not.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import centerloss_jax as clj
from tests.support import oracle, steps
from tests.support.problems import make_problem
from tests.support.steps import update


@jax.jit
def move(x, centers, labels, where=None):
    """The centers after one step at alpha 0.5, and the state of the update."""
    return steps.move(jnp.asarray(centers), clj.center_rows(x, centers, labels, where=where))


NOT_FINITE = [np.nan, np.inf, -np.inf]


@pytest.mark.parametrize('content', NOT_FINITE)
def test_a_feature_that_is_not_finite_leaves_its_example_out(content):
    x = np.array([[content, 0], [1, 1]], np.float32)
    moved, state = move(x, np.zeros((5, 2), np.float32), np.array([3, 4]))
    np.testing.assert_array_equal(moved, [[0, 0], [0, 0], [0, 0], [0, 0], [0.25, 0.25]])
    assert state.left_out == 1


@pytest.mark.parametrize('content', NOT_FINITE)
def test_the_others_move_as_if_it_were_absent_and_the_count_shrinks(content):
    x, centers, labels, _ = make_problem(leading=(16,), dtype=np.float32)
    bad = [2, 3, 11]
    x[2, 0], x[3], x[11, 2] = content, content, content
    moved, state = move(x, centers, labels)
    kept = np.delete(np.arange(16), bad)
    # By both: the oracle skips such examples too, and absence says it without the oracle.
    np.testing.assert_allclose(moved, oracle.center_update(x, centers, labels, 0.5), rtol=1e-5)
    np.testing.assert_allclose(moved, oracle.center_update(x[kept], centers, labels[kept], 0.5), rtol=1e-5)
    assert state.left_out == 3
    assert np.isfinite(state.step_norm)


@pytest.mark.parametrize('size', [1, 4, 64])
@pytest.mark.parametrize('large', [3e38, -3e38])
def test_large_features_are_finite_and_move_their_center_finitely(size, large):
    moved, state = move(np.full((size, 2), large, np.float32), np.zeros((3, 2), np.float32), np.ones(size, int))
    np.testing.assert_allclose(moved[1], np.full(2, large * 0.5 * size / (1 + size)), rtol=1e-5)
    assert state.left_out == 0


def test_a_difference_beyond_float32_leaves_its_example_out():
    centers = np.full((3, 2), -3e38, np.float32)
    moved, state = move(np.full((2, 2), 3e38, np.float32), centers, np.array([1, 1]))
    np.testing.assert_array_equal(moved, centers)
    assert state.left_out == 2


@pytest.mark.parametrize('content', NOT_FINITE)
def test_a_center_that_is_not_finite_stays_as_it_is_and_touches_no_other(content):
    # The rows that pad a table for a mesh hold Inf.
    centers = np.array([[0, 0], [1, 1], [content, content]], np.float32)
    moved, state = move(np.array([[2, 2], [3, 3]], np.float32), centers, np.array([0, 2]))
    np.testing.assert_array_equal(moved, [[0.5, 0.5], [1, 1], [content, content]])
    assert state.left_out == 1
    assert np.isfinite(state.step_norm)


def test_a_run_with_a_bad_batch_goes_on():
    centers, labels = jnp.zeros((4, 2)), np.array([1, 1, 3])
    transform = clj.center_update(0.5)
    state, left_out = transform.init(centers), []
    for step in range(5):
        x = np.ones((3, 2), np.float32)
        x[: step % 3] = np.nan
        centers, state = update(transform, clj.center_rows(x, centers, labels), state, centers)
        left_out.append(int(state.left_out))
    assert left_out == [0, 1, 3, 3, 4]
    assert np.all(np.isfinite(centers))
    # Class 1 met its examples in the steps of 2, 1, 0, 2 and 1 good ones: 2/3 or 3/4 of the gap is left.
    np.testing.assert_allclose(centers[1], np.full(2, 1 - (2 / 3) ** 2 * (3 / 4) ** 2), rtol=1e-5)


@pytest.mark.parametrize('bad', [10, 11, 20, 2**31 - 1])
def test_a_label_beyond_the_table_moves_nothing_and_is_counted(bad):
    # Plain indexing in JAX takes the last row for it.
    x, centers, labels, _ = make_problem(leading=(8,), num_classes=10, dtype=np.float32)
    labels[[1, 6]] = bad
    moved, state = move(x, centers, labels)
    kept = labels != bad
    np.testing.assert_allclose(moved, oracle.center_update(x[kept], centers, labels[kept], 0.5), rtol=1e-5)
    assert state.left_out == 2
    if not np.any(labels == 9):
        np.testing.assert_array_equal(moved[9], centers[9])


def test_identities_numbered_from_one_leave_the_last_row_to_the_bit():
    x, centers, *_ = make_problem(leading=(10,), num_classes=10, dtype=np.float32)
    moved, state = move(x[:9], centers, np.array([1, 2, 3, 4, 5, 6, 7, 8, 10]))
    np.testing.assert_array_equal(moved[9], centers[9])
    assert state.left_out == 1


@pytest.mark.parametrize('negative', [-1, -3, -(2**31)])
def test_unlabelled_examples_pull_no_center_and_are_no_mistake(worked_example, negative):
    # Python's -1 is the last class, and -3 the first.
    labels = np.array([0, negative, 1, 0])
    moved, state = move(worked_example.x, worked_example.centers, labels)
    expected = np.vstack([worked_example.moved[:2], worked_example.centers[2:]])
    np.testing.assert_allclose(moved, expected, rtol=1e-6)
    np.testing.assert_array_equal(moved[2], worked_example.centers[2])
    assert state.left_out == 0


@pytest.mark.parametrize('content', [0, *NOT_FINITE])
def test_what_where_leaves_out_is_no_mistake_whatever_it_holds(worked_example, content):
    x, where = worked_example.x, np.array([True, False, True, True])
    x[1], labels = content, np.array([0, 77, 1, 0])
    moved, state = move(x, worked_example.centers, labels, where)
    np.testing.assert_allclose(moved[:2], worked_example.moved[:2], rtol=1e-6)
    np.testing.assert_array_equal(moved[2], worked_example.centers[2])
    assert state.left_out == 0


NOTHING = {
    'negative labels': (np.ones((4, 2), np.float32), np.full(4, -1), None),
    'where': (np.ones((4, 2), np.float32), np.array([0, 2, 1, 0]), np.zeros(4, bool)),
    'an empty batch': (np.ones((0, 2), np.float32), np.zeros(0, np.int32), None),
    'empty sequences': (np.ones((3, 0, 2), np.float32), np.zeros((3, 0), np.int32), None),
}


@pytest.mark.parametrize(('x', 'labels', 'where'), NOTHING.values(), ids=NOTHING.keys())
def test_nothing_counted_moves_nothing(worked_example, x, labels, where):
    moved, state = move(x, worked_example.centers, labels, where)
    np.testing.assert_array_equal(moved, worked_example.centers)
    assert (state.count, state.left_out, state.step_norm) == (1, 0, 0)
