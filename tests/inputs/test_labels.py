"""The rules for labels, over every function that takes labels, and check_labels.

A negative label leaves its example out, 0 to C - 1 is a class, C or more is an error. Labels are compared in their own
dtype.
"""

from functools import partial

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import centerloss_jax as clj
from tests.support import oracle
from tests.support.family import FAMILY, outcome
from tests.support.problems import make_problem
from tests.support.steps import move

over_family = pytest.mark.parametrize('member', FAMILY)

INTEGERS = [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64]
X = np.array([[1, 2], [3, 4], [0, 1], [2, 2]], np.float32)
CENTERS = np.array([[5, 1], [1, 1], [2, 2]], np.float32)


def assert_names_the_first_bad_label(excinfo, value, position, num_classes):
    """Checks that the message has the argument, the value, its index and the valid range."""
    message = str(excinfo.value)
    assert 'labels' in message
    for expected in (
        rf'(?<!\d){value}(?!\d)',
        rf'(?<!\d){position}(?!\d)',
        rf'\b({num_classes}|{num_classes - 1})\b',
    ):
        excinfo.match(expected)


BAD_LABELS = [-1, 3, 6, 0, 23, 31]


@over_family
@pytest.mark.parametrize('as_type', [list, tuple, np.array, jnp.array], ids=['list', 'tuple', 'numpy', 'jax'])
def test_a_concrete_label_out_of_range_is_an_error(member, as_type):
    x, centers, *_ = make_problem(leading=(6,), num_classes=7, dtype=np.float32)
    with pytest.raises(ValueError, match='labels') as excinfo:
        FAMILY[member](x, centers, as_type(BAD_LABELS))
    assert_names_the_first_bad_label(excinfo, 23, 4, 7)
    assert '31' not in str(excinfo.value)


@over_family
def test_the_index_of_a_bad_label_has_all_coordinates(member):
    x, centers, *_ = make_problem(leading=(2, 3), num_classes=7, dtype=np.float32)
    with pytest.raises(ValueError, match='labels') as excinfo:
        FAMILY[member](x, centers, np.array(BAD_LABELS).reshape(2, 3))
    assert_names_the_first_bad_label(excinfo, 23, '1, ?1', 7)


@over_family
def test_concrete_labels_are_checked_inside_jit_too(member):
    x, centers, *_ = make_problem(leading=(6,), num_classes=7, dtype=np.float32)
    where = np.arange(6) != 4
    with pytest.raises(ValueError, match='labels') as excinfo:
        jax.eval_shape(lambda x: FAMILY[member](x, centers, np.array(BAD_LABELS)), x)
    assert_names_the_first_bad_label(excinfo, 23, 4, 7)
    with pytest.raises(ValueError, match='labels') as excinfo:
        jax.eval_shape(lambda x: FAMILY[member](x, centers, BAD_LABELS, where=where), x)
    assert_names_the_first_bad_label(excinfo, 31, 5, 7)


@over_family
def test_labels_numbered_from_one_are_an_error(member):
    x, centers, *_ = make_problem(leading=(10,), num_classes=10, dtype=np.float32)
    with pytest.raises(ValueError, match='labels') as excinfo:
        FAMILY[member](x, centers, np.arange(1, 11))
    assert_names_the_first_bad_label(excinfo, 10, 9, 10)


@over_family
@pytest.mark.parametrize('traced', [None, 'where', 'all'])
def test_a_label_that_where_leaves_out_is_not_checked(member, traced):
    x, centers, labels, _ = make_problem(dtype=np.float32)
    where = np.arange(7) != 3
    expected = outcome(member, x, centers, labels, where=where)
    labels[3] = 99

    def evaluate(where, labels=labels):
        return outcome(member, x, centers, labels, where=where)

    got = evaluate(where) if traced is None else jax.jit(evaluate)(where, *[labels] * (traced == 'all'))
    chex.assert_trees_all_close(got, expected, rtol=1e-6)
    with pytest.raises(ValueError, match=r'labels.*99'):
        FAMILY[member](x, centers, labels, where=~where)


@over_family
@pytest.mark.parametrize('content', [np.nan, np.inf, 1e30])
@pytest.mark.parametrize('by', ['label', 'where'])
def test_a_batch_with_left_out_examples_equals_the_batch_without_them(member, content, by):
    x, centers, labels, _ = make_problem(dtype=np.float32)
    kept = np.isin(np.arange(7), [0, 3, 5])
    expected = outcome(member, x[kept], centers, labels[kept])
    x[~kept] = content
    if by == 'label':
        labels[~kept] = [-1, -2, -100, np.iinfo(np.int32).min]
        got = outcome(member, x, centers, labels)
    else:
        got = outcome(member, x, centers, labels, where=kept)
    chex.assert_trees_all_close(got, expected, rtol=1e-6)


# The mean of a softmax divides its rows too, by one example more.
@pytest.mark.parametrize('member', [member for member in FAMILY if member != 'class_softmax_and_rows'])
@pytest.mark.parametrize('bad', [5, 2**31 - 1])
def test_inside_jit_a_label_out_of_range_changes_no_class(member, bad):
    x, centers, labels, _ = make_problem(dtype=np.float32)
    labels[3] = -1
    expected = outcome(member, x, centers, labels)
    labels[3] = bad
    got = jax.jit(partial(outcome, member))(x, centers, labels)
    for leaf, without in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        # A scalar of the whole batch is NaN. Results by class are as if the example were left out.
        np.testing.assert_allclose(leaf, without if np.ndim(leaf) else np.nan, rtol=1e-6, atol=1e-6)


@over_family
@pytest.mark.parametrize('dtype', INTEGERS)
def test_every_integer_dtype_gives_the_same_result(member, dtype):
    labels = np.array([0, 2, 1, 0], np.int32)
    expected = outcome(member, X, CENTERS, labels)
    chex.assert_trees_all_equal(outcome(member, X, CENTERS, labels.astype(dtype)), expected)
    if np.issubdtype(dtype, np.signedinteger):
        labels[1] = -1
        expected = outcome(member, X, CENTERS, labels)
        chex.assert_trees_all_equal(outcome(member, X, CENTERS, labels.astype(dtype)), expected)


@over_family
def test_labels_may_be_a_list_a_tuple_or_one_integer(member):
    expected = outcome(member, X, CENTERS, np.array([0, 2, 1, 0]))
    for labels in ([0, 2, 1, 0], (0, 2, 1, 0), [np.int8(0), 2, np.uint16(1), 0]):
        chex.assert_trees_all_equal(outcome(member, X, CENTERS, labels), expected)
    expected = outcome(member, X[1], CENTERS, np.array(2))
    for label in (2, np.int64(2), jnp.int32(2)):
        chex.assert_trees_all_equal(outcome(member, X[1], CENTERS, label), expected)


@over_family
def test_labels_may_be_a_list_of_tracers(member):
    expected = outcome(member, X, CENTERS, np.array([0, 2, 1, 0]))
    traced = jax.jit(lambda a, b: outcome(member, X, CENTERS, [a, b, 1, a]))
    chex.assert_trees_all_close(traced(0, 2), expected, rtol=1e-6)
    with pytest.raises(TypeError, match='labels'):
        traced(0.0, 2.0)


# A cast to int32 or int8 would make each of these a valid or a negative label.
FOLDED = {
    'numpy int64': np.array([0, 2, 2**32 + 1, 0]),
    'list': [0, 2, 2**32 + 1, 0],
    'numpy uint32': np.array([0, 2, 2**31 + 5, 0], np.uint32),
    'numpy uint32, all ones': np.array([0, 2, 2**32 - 1, 0], np.uint32),
    'jax uint32': jnp.array([0, 2, 2**31 + 5, 0], jnp.uint32),
    'numpy uint64': np.array([0, 2, 2**64 - 1, 0], np.uint64),
    'numpy uint8': np.array([0, 2, 255, 0], np.uint8),
    'jax uint8': jnp.array([0, 2, 255, 0], jnp.uint8),
    'numpy uint16': np.array([0, 2, 2**16 - 1, 0], np.uint16),
}


@over_family
@pytest.mark.parametrize('labels', FOLDED.values(), ids=FOLDED.keys())
def test_a_label_that_a_cast_would_fold_into_range_is_an_error(member, labels):
    with pytest.raises(ValueError, match='labels') as excinfo:
        FAMILY[member](X, CENTERS, labels)
    assert_names_the_first_bad_label(excinfo, int(labels[2]), 2, 3)


@over_family
@pytest.mark.parametrize('negative', [-(2**32) + 1, -(2**63), -(2**31) - 1])
def test_a_negative_label_that_a_cast_would_fold_into_range_is_left_out(member, negative):
    expected = outcome(member, X, CENTERS, np.array([0, 2, -1, 0]))
    for labels in (np.array([0, 2, negative, 0]), [0, 2, negative, 0]):
        chex.assert_trees_all_equal(outcome(member, X, CENTERS, labels), expected)


def _edges(dtype, num_classes):
    info = np.iinfo(dtype)
    edges = (info.min, -1, 0, num_classes - 1, num_classes, num_classes + 1, info.max, num_classes % 256)
    return sorted({edge for edge in edges if info.min <= edge <= info.max})


@st.composite
def typed_labels(draw):
    """Draws four labels at the limits of their dtype and of C. C itself may not fit the dtype."""
    num_classes = draw(st.sampled_from([1, 128, 256, 300]))
    dtype = draw(st.sampled_from(INTEGERS))
    values = draw(st.lists(st.sampled_from(_edges(dtype, num_classes)), min_size=4, max_size=4))
    return num_classes, np.array(values, dtype)


@jax.jit
def per_example_and_moved(x, centers, labels, where):
    per_example = clj.center_loss(x, centers, labels, where=where, reduce_fn=None)
    return per_example, centers + clj.center_rows(x, centers, labels, where=where)


@hypothesis.given(case=typed_labels(), where=st.lists(st.booleans(), min_size=4, max_size=4))
@hypothesis.settings(max_examples=60)
def test_labels_are_compared_in_their_own_dtype(case, where):
    num_classes, labels = case
    where = np.array(where)
    centers = np.arange(1, 2 * num_classes + 1, dtype=np.float32).reshape(num_classes, 2)
    counted = where & np.array([int(label) >= 0 for label in labels])
    out_of_range = counted & np.array([int(label) >= num_classes for label in labels])
    expected = oracle.per_example(X, centers, np.where(counted & ~out_of_range, labels, 0).astype(int), where=counted)
    expected = np.where(out_of_range, np.nan, np.where(counted, expected, 0))

    per_example = partial(clj.center_loss, reduce_fn=None, where=where)
    if out_of_range.any():
        with pytest.raises(ValueError, match='labels') as excinfo:
            per_example(X, centers, labels)
        assert_names_the_first_bad_label(excinfo, labels[out_of_range][0], np.flatnonzero(out_of_range)[0], num_classes)
    else:
        np.testing.assert_allclose(per_example(X, centers, labels), expected, rtol=1e-6)
    # Without x64, jit narrows 64-bit arguments before any function sees them.
    with jax.enable_x64(labels.dtype.itemsize == 8):
        got, moved = per_example_and_moved(X, centers, labels, where)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    valid = np.where(counted & ~out_of_range, labels, 0).astype(int)
    rows = oracle.center_rows(X, centers, valid, where=counted & ~out_of_range)
    np.testing.assert_allclose(moved, centers + rows, rtol=1e-6)


WRONG_LABELS = {
    'a column': (np.array([[0], [2], [1], [0]]), ValueError, r'labels.*\(4,\).*\(4, ?1\)'),
    'a row': (np.array([[0, 2, 1, 0]]), ValueError, r'labels.*\(4,\).*\(1, ?4\)'),
    'too few': (np.array([0, 2, 1]), ValueError, r'labels.*\(4,\).*\(3,\)'),
    'one for all': (np.array([1]), ValueError, r'labels.*\(4,\).*\(1,\)'),
    'a scalar': (np.array(1), ValueError, r'labels.*\(4,\).*\(\)'),
    'one-hot integers': (np.eye(3, dtype=np.int32)[[0, 2, 1, 0]], ValueError, 'labels.*argmax'),
    'one-hot floats': (np.eye(3, dtype=np.float32)[[0, 2, 1, 0]], (TypeError, ValueError), 'labels.*argmax'),
    'floats': (np.array([0, 2, 1, 0], np.float32), TypeError, r'labels.*float32.*astype'),
    'half floats': (np.array([0, 2, 1, 0], np.float16), TypeError, 'labels.*float16'),
    'booleans': (np.array([True, False, True, True]), TypeError, 'labels.*bool.*where='),
    'complex': (np.array([0, 2, 1, 0], np.complex64), TypeError, 'labels.*complex64'),
}


@over_family
@pytest.mark.parametrize(('labels', 'error', 'message'), WRONG_LABELS.values(), ids=WRONG_LABELS.keys())
@pytest.mark.parametrize('traced', [False, True], ids=['eager', 'traced'])
def test_wrong_shapes_and_dtypes_are_named(member, labels, error, message, traced):
    function = partial(FAMILY[member], X, CENTERS)
    with pytest.raises(error, match=message):
        jax.eval_shape(function, labels) if traced else function(labels)


@over_family
@pytest.mark.parametrize(
    'labels',
    [
        pytest.param([0.0, 2.0, 1.0, 0.0], id='floats'),
        pytest.param([True, False, True, True], id='booleans'),
        pytest.param([0, 2, 2**63 + 1, 0], id='beyond int64, which NumPy makes floats'),
        pytest.param([0, 2, 2**70, 0], id='beyond uint64, which NumPy makes objects'),
        pytest.param(['0', '2', '1', '0'], id='strings'),
    ],
)
def test_lists_of_anything_but_integers_are_errors(member, labels):
    with pytest.raises(TypeError, match='labels'):
        FAMILY[member](X, CENTERS, labels)


@over_family
def test_one_hot_labels_of_sequences_say_argmax(member):
    x = np.ones((2, 4, 2), np.float32)
    with pytest.raises((TypeError, ValueError), match=r'labels.*argmax'):
        FAMILY[member](x, CENTERS, jax.nn.one_hot(np.ones((2, 4), int), 3))


def test_inside_jit_a_label_out_of_range_is_dropped_and_counted():
    x, centers, *_ = make_problem(leading=(6,), num_classes=10, dtype=np.float32)
    labels, where = np.array([0, 10, -1, 4, 11, 3]), np.array([True, True, True, True, True, False])

    @jax.jit
    def step(centers, labels):
        return move(centers, clj.center_rows(x, centers, labels, where=where))

    moved, state = step(centers, labels)
    unmoved = [j for j in range(10) if j not in (0, 4)]
    np.testing.assert_array_equal(np.asarray(moved)[unmoved], centers[unmoved])
    valid = np.array([0, -1, -1, 4, -1, -1])
    np.testing.assert_allclose(moved, oracle.center_update(x, centers, valid, 0.5), rtol=1e-6)
    assert state.dropped == 2


class TestCheckLabels:
    def test_names_the_first_bad_label(self):
        with pytest.raises(ValueError, match='labels') as excinfo:
            clj.check_labels(np.arange(1, 11), 10)
        assert_names_the_first_bad_label(excinfo, 10, 9, 10)

    def test_gives_every_coordinate(self):
        with pytest.raises(ValueError, match='labels') as excinfo:
            clj.check_labels([[0, 6, -1], [5, 23, 31]], 7)
        assert_names_the_first_bad_label(excinfo, 23, '1, ?1', 7)
        assert '31' not in str(excinfo.value)

    @pytest.mark.parametrize('labels', FOLDED.values(), ids=FOLDED.keys())
    def test_folds_nothing(self, labels):
        with pytest.raises(ValueError, match='labels') as excinfo:
            clj.check_labels(labels, 3)
        assert_names_the_first_bad_label(excinfo, int(labels[2]), 2, 3)

    @pytest.mark.parametrize(
        'labels',
        [
            pytest.param([0, 2, 1, 0], id='list'),
            pytest.param(jnp.array([[0, 2], [1, 0]]), id='jax'),
            pytest.param(np.array([0, -1, -100, -(2**63)]), id='negative'),
            pytest.param(np.zeros((0,), np.int32), id='empty'),
            pytest.param(np.array([0, 2], np.uint8), id='unsigned'),
            pytest.param(2, id='one integer'),
        ],
    )
    def test_passes_what_is_right(self, labels):
        clj.check_labels(labels, 3)

    def test_the_class_count_need_not_fit_the_labels_dtype(self):
        clj.check_labels(np.array([100, 127, -128], np.int8), 300)
        clj.check_labels(np.array([100, 255], np.uint8), 256)
        with pytest.raises(ValueError, match=r'255'):
            clj.check_labels(np.array([100, 255], np.uint8), 255)

    @pytest.mark.parametrize('num_classes', [0, -3])
    def test_needs_at_least_one_class(self, num_classes):
        with pytest.raises(ValueError, match=f'num_classes.*{num_classes}'):
            clj.check_labels([-1], num_classes)

    @pytest.mark.parametrize('dtype', [np.float32, bool])
    def test_only_integers_are_labels(self, dtype):
        with pytest.raises(TypeError, match=f'labels.*{np.dtype(dtype)}'):
            clj.check_labels(np.array([0, 1], dtype), 3)


def test_an_empty_list_is_the_labels_of_no_example():
    assert clj.class_statistics(np.zeros((0, 2)), [], 3).count.tolist() == [0, 0, 0]
    clj.check_labels([], 3)
