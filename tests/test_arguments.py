"""Shapes and dtypes of the arguments: an error names the argument and what it got, when traced too."""

from functools import partial

import chex
import jax
import numpy as np
import pytest

import centerloss_jax as clj
from tests.support.problems import make_problem

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
def test_one_trace_serves_every_step(function):
    traced = chex.assert_max_traces(function, n=1)
    step = jax.jit(traced)
    for seed in range(3):
        x, centers, labels, _ = make_problem(seed, dtype=np.float32)
        step(x, centers, labels)
    chex.clear_trace_counter()
