"""Random problems that hold the numbers and labels at which arithmetic goes wrong, and what the library makes of them.

A new form is a compilation, so there are at most 30 of them. Their values are many.
"""

from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

import centerloss_jax as clj
from tests.support.problems import Problem, make_problem
from tests.support.steps import move

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64]
SIZES = [
    {'leading': (7,)},  # at most as many classes as examples
    {'leading': (2, 3), 'num_classes': 6, 'num_features': 1, 'weights': 'examples'},
    {'leading': (), 'num_classes': 4, 'num_features': 2},
    {'leading': (7,), 'num_classes': 11, 'weights': 'elements'},  # more classes
    {'leading': (8,), 'num_classes': 1, 'num_features': 4, 'weights': 'examples'},
    {'leading': (16,)},
    {'leading': (16,), 'num_classes': 11, 'weights': 'elements'},
]
FORMS = [{**sizes, 'dtype': dtype, 'masked': True} for dtype in DTYPES for sizes in SIZES]

# Signed zeros, numbers whose square underflows, whose square overflows float32, and no numbers at all.
NUMBERS = [0.0, -0.0, 1e-40, -1e-30, 1e18, -1e30, 1e30, np.inf, -np.inf, np.nan]


def some_forms(forms: list[dict]) -> Any:
    """Returns a strategy of the forms, or of some of them in the quick profile, which cannot compile all."""
    return st.sampled_from(forms[::20] if hypothesis.settings().derandomize else forms)


@st.composite
def extreme_problems(draw, forms=FORMS, numbers=NUMBERS) -> Problem:
    """Draws a problem, then numbers to write into it, examples and centers to repeat, and labels."""
    problem = make_problem(draw(st.integers(0, 2**32 - 1)), **draw(some_forms(forms)))
    num_classes = len(problem.centers)
    for array in (problem.x, problem.centers):
        for place, number in _changes(draw, array.size, numbers):
            array.flat[place] = narrowed(number, array.dtype)
    x, labels = problem.x.reshape(-1, problem.x.shape[-1]), problem.labels.reshape(-1)
    for place, example in _changes(draw, len(x), range(len(x))):
        x[place] = x[example]
    for place, example in _changes(draw, num_classes, range(len(x))):
        problem.centers[place] = x[example]
    for place, label in _changes(draw, len(labels), [0, num_classes - 1, num_classes, 2**31 - 1, -1, -(2**31)]):
        labels[place] = label
    return problem


def narrowed(a, dtype) -> Any:
    """Returns numbers as this dtype, Inf for those beyond it."""
    with np.errstate(over='ignore'):
        return np.asarray(a).astype(dtype)


def _changes(draw, size, values):
    """Draws up to three pairs of a place and a value."""
    return draw(st.lists(st.tuples(st.integers(0, size - 1), st.sampled_from(values)), max_size=3))


def coarse(problem: Problem) -> Problem:
    """Rounds features and centers to eighths, so that their differences are exact in every dtype."""
    x, centers = (np.round(8 * a.astype(np.float32)) / 8 for a in (problem.x, problem.centers))
    return problem._replace(x=x.astype(problem.x.dtype), centers=centers.astype(problem.centers.dtype))


class Results(NamedTuple):
    per_example: Any
    loss: Any
    for_x: Any  # gradients of the loss
    for_centers: Any
    values: Any  # of the rows
    moved: Any  # centers after a step
    dropped: Any
    step_norm: Any
    statistics: Any
    intra: Any
    inter: Any
    nearest: Any
    distance: Any


@jax.jit
def _results(x, centers, labels, options, alpha):
    def loss_fn(x, centers):
        return clj.center_loss_and_rows(x, centers, labels, **options)

    (loss, rows), (for_x, for_centers) = jax.value_and_grad(loss_fn, (0, 1), has_aux=True)(x, centers)
    moved, state = move(centers, rows, alpha)
    statistics = clj.class_statistics(x, labels, len(centers), where=options['where'])
    nearest, distance = clj.nearest_center(x, centers, block_size=4)
    return Results(
        per_example=clj.center_loss(x, centers, labels, reduce_fn=None, **options),
        loss=loss,
        for_x=for_x,
        for_centers=for_centers,
        values=rows.values,
        moved=moved,
        dropped=state.dropped,
        step_norm=state.step_norm,
        statistics=statistics,
        intra=statistics.intra,
        inter=statistics.inter,
        nearest=nearest,
        distance=distance,
    )


def results(problem: Problem, alpha: float = 0.5) -> Results:
    """Returns what the library computes for a problem, as NumPy arrays."""
    with jax.enable_x64(problem.x.dtype == np.float64):
        return jax.device_get(_results(*problem.arrays, problem.options, alpha))
