"""The softmax losses over classes: values and gradients against the oracle and dense autodiff, extremes, samples."""

from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

import centerloss_jax as clj
from tests.support import oracle
from tests.support.problems import make_problem

# A loss, its form with rows, its oracle, and the options of both.
FORMS: dict[str, tuple[Any, Any, Any, dict]] = {
    'class': (clj.class_softmax, clj.class_softmax_and_rows, oracle.class_logit, {}),
    'CosFace': (
        clj.margin_softmax,
        clj.margin_softmax_and_rows,
        oracle.margin_logit,
        {'scale': 5.0, 'additive_margin': 0.3},
    ),
    'ArcFace': (
        clj.margin_softmax,
        clj.margin_softmax_and_rows,
        oracle.margin_logit,
        {'scale': 6.0, 'angular_margin': 0.5, 'additive_margin': 0.1},
    ),
    'ArcFace, straight through': (
        clj.margin_softmax,
        clj.margin_softmax_and_rows,
        oracle.margin_logit,
        {'scale': 6.0, 'angular_margin': 0.5, 'additive_margin': 0.1, 'straight_through': True},
    ),
    'distance': (
        clj.distance_softmax,
        clj.distance_softmax_and_rows,
        oracle.distance_logit,
        {'temperature': 7.0, 'margin': 0.2},
    ),
}
over_forms = pytest.mark.parametrize(('loss', 'loss_and_rows', 'logit', 'options'), FORMS.values(), ids=FORMS.keys())

# Blocks of 4 classes: 11 are three blocks with padding, 8 are two without, 3 are one.
CLASSES = [3, 8, 11]


def gradients(loss, x, table, labels, **options):
    return jax.value_and_grad(partial(loss, **options), (0, 1))(x, table, labels)


@over_forms
@pytest.mark.parametrize(('dtype', 'tolerance'), [(np.float64, 1e-10), (np.float32, 1e-5)], ids=['float64', 'float32'])
@pytest.mark.parametrize('num_classes', CLASSES)
def test_loss_and_gradients_are_those_of_the_oracle(loss, loss_and_rows, logit, options, num_classes, dtype, tolerance):
    problem = make_problem(leading=(2, 3), num_classes=num_classes, num_features=4, dtype=dtype, masked=True)
    expected = oracle.softmax(logit, *problem.arrays, **problem.options, **options)
    with jax.enable_x64(dtype == np.float64):
        got = gradients(loss, *problem.arrays, **problem.options, **options, block_size=4)
        value, rows = loss_and_rows(*problem.arrays, **problem.options, **options, block_size=4)
    assert expected[0] > 0.5
    value_got, (for_x, for_table) = got
    np.testing.assert_allclose(value_got, expected[0], rtol=tolerance)
    np.testing.assert_allclose(for_x, expected[1], rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(for_table, expected[2], rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(value, expected[0], rtol=tolerance)
    np.testing.assert_array_equal(rows.indices, np.arange(num_classes))
    np.testing.assert_allclose(rows.values, expected[2], rtol=tolerance, atol=tolerance)
