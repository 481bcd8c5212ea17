"""Shapes and dtypes of arguments and results. An error names the argument and what it got, when traced too."""

import operator
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import centerloss_jax as clj
from tests.support.problems import make_problem
from tests.support.steps import move, update

X, CENTERS, LABELS = np.ones((4, 2), np.float32), np.ones((3, 2), np.float32), np.array([0, 2, 1, 0])

WRONG_ARGUMENTS = {
    'x without features': ({'x': np.float32(1), 'labels': 0}, ValueError, r'\bx\b'),
    'centers as a vector': ({'centers': np.ones(2, np.float32)}, ValueError, r'centers.*[(\[]2,?[)\]]'),
    'centers with three axes': (
        {'centers': np.ones((3, 1, 2), np.float32)},
        ValueError,
        r'centers.*[(\[]3, ?1, ?2[)\]]',
    ),
    'centers of another width': (
        {'centers': np.ones((3, 5), np.float32)},
        ValueError,
        r'(?=.*\bx\b)(?=.*centers)(?=.*\b5\b).*\b2\b',
    ),
    'centers that would broadcast': (
        {'centers': np.ones((3, 1), np.float32)},
        ValueError,
        r'(?=.*\bx\b)(?=.*centers)(?=.*\b1\b).*\b2\b',
    ),
    'integer x': ({'x': np.ones((4, 2), np.int32)}, TypeError, r'\bx\b.*int32'),
    'boolean x': ({'x': np.ones((4, 2), bool)}, TypeError, r'\bx\b.*bool'),
    'complex x': ({'x': np.ones((4, 2), np.complex64)}, TypeError, r'\bx\b.*complex64'),
    'x of 8 bits': ({'x': np.ones((4, 2), jnp.float8_e4m3fn)}, TypeError, r'\bx\b.*float16 or wider.*float8_e4m3fn'),
    'centers of 8 bits': ({'centers': np.ones((3, 2), jnp.float8_e5m2)}, TypeError, r'centers.*float8_e5m2'),
    'no features': (
        {'x': np.ones((4, 0), np.float32), 'centers': np.ones((3, 0), np.float32)},
        ValueError,
        r'centers.*D at least 1.*\[3, 0\]',
    ),
    'no classes': ({'centers': np.ones((0, 2), np.float32)}, ValueError, r'centers.*C and D at least 1.*\[0, 2\]'),
    'integer centers': ({'centers': np.ones((3, 2), np.int32)}, TypeError, r'centers.*int32'),
    'where of another shape': ({'where': np.ones(3, bool)}, ValueError, r'where.*\(3,\)'),
    'where that would broadcast': ({'where': np.ones(1, bool)}, ValueError, r'where.*\(1,\)'),
    'where as a column': ({'where': np.ones((4, 1), bool)}, ValueError, r'where.*\(4, ?1\)'),
    'where for each feature': ({'where': np.ones((4, 2), bool)}, ValueError, r'where.*\(4, ?2\)'),
    'where as a scalar': ({'where': np.array(True)}, ValueError, r'where.*\(\)'),
    'where as integers': ({'where': np.ones(4, np.int32)}, TypeError, r'where.*int32'),
    'where as floats': ({'where': np.ones(4, np.float32)}, TypeError, r'where.*float32'),
    'weights as a scalar': ({'weights': np.float32(2)}, ValueError, r'weights.*\(\)'),
    'weights for the features': ({'weights': np.ones(2, np.float32)}, ValueError, r'weights.*\(2,\)'),
    'weights that would broadcast': ({'weights': np.ones(1, np.float32)}, ValueError, r'weights.*\(1,\)'),
    'weights as a column': ({'weights': np.ones((4, 1), np.float32)}, ValueError, r'weights.*\(4, ?1\)'),
    'weights as a row': ({'weights': np.ones((1, 2), np.float32)}, ValueError, r'weights.*\(1, ?2\)'),
    'complex weights': ({'weights': np.ones(4, np.complex64)}, TypeError, r'weights.*complex64'),
    'weights of more axes': (
        {'weights': np.ones((1, 4, 2), np.float32)},
        ValueError,
        r'weights.*\(1, ?4, ?2\)',
    ),
}


@pytest.mark.parametrize(('changed', 'error', 'message'), WRONG_ARGUMENTS.values(), ids=WRONG_ARGUMENTS.keys())
@pytest.mark.parametrize('function', [clj.center_loss, clj.center_rows, clj.center_loss_and_rows])
@pytest.mark.parametrize('traced', [False, True], ids=['eager', 'traced'])
def test_wrong_arguments_are_named(function, changed, error, message, traced):
    arguments = {'x': X, 'centers': CENTERS, 'labels': LABELS} | changed
    call = partial(jax.eval_shape, function) if traced else function
    with pytest.raises(error, match=message):
        call(arguments.pop('x'), arguments.pop('centers'), arguments.pop('labels'), **arguments)


@pytest.mark.parametrize('function', [clj.center_loss, clj.center_loss_and_rows])
@pytest.mark.parametrize(
    ('options', 'message'),
    [
        pytest.param({'reduce_fn': 'mean'}, r"reduce_fn.*'mean'", id='reduce_fn that is no function'),
        pytest.param({'axis_name': 0}, 'axis_name.*got 0', id='axis_name that is no name'),
        pytest.param({'axis_name': ('batch', 0)}, r'axis_name.*\(.batch., 0\)', id='axis_name with a number'),
    ],
)
def test_options_of_another_type_are_named(function, options, message):
    with pytest.raises(TypeError, match=message):
        function(X, CENTERS, LABELS, **options)


def test_an_argument_that_is_no_array_is_named():
    with pytest.raises(TypeError, match=r'\bx\b.*str'):
        clj.center_loss('features', CENTERS, LABELS)  # pyright: ignore[reportArgumentType]  # the error under test


def test_more_classes_than_int32_can_number_are_an_error():
    x, centers = jax.ShapeDtypeStruct((4, 1), jnp.float32), jax.ShapeDtypeStruct((2**31 - 1, 1), jnp.float32)
    with pytest.raises(ValueError, match=r'centers.*2147483647'):
        jax.eval_shape(clj.center_loss, x, centers, LABELS)


@pytest.mark.parametrize('function', [clj.center_loss, clj.center_loss_and_rows])
def test_one_trace_serves_every_step(function):
    traced = chex.assert_max_traces(function, n=1)
    step = jax.jit(traced)
    for seed in range(3):
        x, centers, labels, _ = make_problem(seed, dtype=np.float32)
        step(x, centers, labels)
    chex.clear_trace_counter()


def arrays_of(rows: Any):
    return rows.indices, rows.values


def loss_and_rows(x, centers, labels):
    loss, rows = clj.center_loss_and_rows(x, centers, labels)
    return loss, *arrays_of(rows)


def two_passes(x, centers, labels):
    rows = clj.center_rows(x, centers, labels)
    return arrays_of(clj.concatenate_rows(rows, rows))


def class_statistics(x, centers, labels):
    statistics = clj.class_statistics(x, labels, len(centers))
    return statistics.count, statistics.mean, statistics.intra, statistics.inter, statistics.ratio


def center_update(x, centers, labels):
    transform: Any = clj.center_update(0.5)
    updates, state = transform.update(clj.center_rows(x, centers, labels), transform.init(None))
    return *arrays_of(updates), *state


def with_centers(x, centers, labels):
    transform = clj.with_centers(optax.sgd(0.1))
    model = {'params': jnp.ones(4), 'centers': jnp.asarray(centers)}
    grads = {'params': jnp.ones(4), 'centers': clj.center_rows(x, centers, labels)}
    model, _ = update(transform, grads, transform.init(model), model)
    return model['params'], model['centers']


def linen_module(x, centers, labels):
    loss, rows = clj.linen.CenterLoss(len(centers)).apply({'centers': {'centers': centers}}, x, labels)
    return loss, *arrays_of(rows)


def nnx_module(x, centers, labels):
    module = clj.nnx.CenterLoss(*centers.shape, centers_init=lambda *_: jnp.asarray(centers), rngs=nnx.Rngs(0))
    loss, rows = module(x, labels)
    return loss, *arrays_of(rows)


FLOAT, INTEGER = jnp.float32, jnp.int32

# For labels of shape s, n labels in all, 5 classes and 3 features.
RESULTS = {
    'center_loss': (clj.center_loss, lambda s, n: ((), FLOAT)),
    'center_loss of each example': (partial(clj.center_loss, reduce_fn=None), lambda s, n: (s, FLOAT)),
    'center_rows': (
        lambda *arrays: arrays_of(clj.center_rows(*arrays)),
        lambda s, n: (((n,), INTEGER), ((n, 3), FLOAT)),
    ),
    'center_loss_and_rows': (loss_and_rows, lambda s, n: (((), FLOAT), ((n,), INTEGER), ((n, 3), FLOAT))),
    'concatenate_rows': (two_passes, lambda s, n: (((2 * n,), INTEGER), ((2 * n, 3), FLOAT))),
    'table + rows': (lambda x, c, labels: jnp.asarray(c) + clj.center_rows(x, c, labels), lambda s, n: ((5, 3), FLOAT)),
    'nearest_center': (
        lambda x, c, labels: clj.nearest_center(x, c, block_size=2),
        lambda s, n: ((s, INTEGER), (s, FLOAT)),
    ),
    'class_statistics': (
        class_statistics,
        lambda s, n: (((5,), INTEGER), ((5, 3), FLOAT), ((), FLOAT), ((), FLOAT), ((), FLOAT)),
    ),
    'center_update': (
        center_update,
        lambda s, n: (((n,), INTEGER), ((n, 3), FLOAT), ((), INTEGER), ((), INTEGER), ((), FLOAT)),
    ),
    'with_centers': (with_centers, lambda s, n: (((4,), FLOAT), ((5, 3), FLOAT))),
    'linen.CenterLoss': (linen_module, lambda s, n: (((), FLOAT), ((n,), INTEGER), ((n, 3), FLOAT))),
    'nnx.CenterLoss': (nnx_module, lambda s, n: (((), FLOAT), ((n,), INTEGER), ((n, 3), FLOAT))),
}


@pytest.mark.parametrize(('function', 'expected'), RESULTS.values(), ids=RESULTS.keys())
@pytest.mark.parametrize(
    ('shape', 'traced'),
    [
        pytest.param((), True, id='one example, traced'),
        pytest.param((2, 4), True, id='sequences, traced'),
        pytest.param((2, 4), False, id='sequences, eager'),
    ],
)
def test_results_have_the_documented_shapes_and_dtypes(function, expected, shape, traced):
    arrays = make_problem(leading=shape, dtype=np.float32).arrays
    results = jax.eval_shape(function, *arrays) if traced else function(*arrays)
    expected = expected(shape, int(np.prod(shape)))
    expected = [expected] if isinstance(expected[1], type(FLOAT)) else expected
    for result, (shape, dtype) in zip(jax.tree.leaves(results), expected, strict=True):
        chex.assert_shape(result, shape)
        chex.assert_type(result, dtype)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16], ids=['float32', 'bfloat16'])
def test_a_step_keeps_the_dtypes_of_the_table_and_the_state(dtype):
    x, centers, labels, _ = make_problem(dtype=np.float32)
    centers = jnp.asarray(centers, dtype)
    moved, state = jax.eval_shape(lambda: move(centers, clj.center_rows(x, centers, labels)))
    chex.assert_trees_all_equal_shapes_and_dtypes(moved, jax.eval_shape(lambda: centers))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, jax.eval_shape(clj.center_update().init, centers))


def test_features_of_8_bits_are_named_by_functions_without_centers():
    narrow = np.ones((4, 2), jnp.float8_e4m3fn)
    for call in (lambda: clj.nearest_center(narrow, CENTERS), lambda: clj.class_statistics(narrow, LABELS, 3)):
        with pytest.raises(TypeError, match=r'\bx\b.*float16 or wider.*float8_e4m3fn'):
            call()


def test_statistics_of_no_features_are_an_error():
    with pytest.raises(ValueError, match=r'\bx\b.*D at least 1.*\[4, 0\]'):
        clj.class_statistics(np.ones((4, 0), np.float32), LABELS, 3)


def test_a_table_of_8_bits_takes_no_rows():
    with pytest.raises(TypeError, match=r'the table.*float16 or wider.*float8_e5m2'):
        operator.add(jnp.ones((3, 2), jnp.float8_e5m2), clj.center_rows(X, CENTERS, LABELS))
