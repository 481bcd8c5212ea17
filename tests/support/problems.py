"""Random inputs on which a wrong axis, count or mask gives a wrong value.

The sizes differ from each other, the classes have unequal counts, and no center is zero.
"""

from typing import NamedTuple

import hypothesis.strategies as st
import numpy as np
from numpy.typing import DTypeLike


class Problem(NamedTuple):
    x: np.ndarray  # [..., D]
    centers: np.ndarray  # [C, D]
    labels: np.ndarray  # [...]
    options: dict  # the keyword arguments where and weights, if the problem has them

    @property
    def arrays(self):
        return self.x, self.centers, self.labels


def make_problem(
    seed: int = 0,
    leading: tuple[int, ...] = (7,),
    num_classes: int = 5,
    num_features: int = 3,
    dtype: DTypeLike = np.float64,
    masked: bool = False,
    weights: str | None = None,
) -> Problem:
    """Returns a random problem of these sizes.

    Args:
      masked: adds a `where` and negative labels.
      weights: 'examples' or 'elements' adds weights of that shape.
    """
    rng = np.random.default_rng(seed)
    x = rng.normal(1.0, 2.0, (*leading, num_features)).astype(dtype)
    centers = rng.normal(-1.0, 2.0, (num_classes, num_features)).astype(dtype)
    # The smaller of two draws: low labels are frequent, high ones rare or absent.
    labels = rng.integers(0, num_classes, (2, *leading)).min(axis=0).astype(np.int32)
    options = {}
    if masked:
        labels = np.where(rng.random(leading) < 0.2, -1, labels).astype(np.int32)
        options['where'] = np.asarray(rng.random(leading) < 0.7)
    if weights:
        shape = {'examples': leading, 'elements': x.shape}[weights]
        options['weights'] = np.asarray(rng.uniform(0.1, 3.0, shape), dtype)
    return Problem(x, centers, labels, options)


# A problem's sizes and its options. A new form costs a compilation, so they are few and their values are many.
FORMS = [
    {'leading': ()},
    {'leading': (), 'masked': True, 'weights': 'elements'},
    {'leading': (7,)},
    {'leading': (7,), 'weights': 'examples'},
    {'leading': (7,), 'masked': True, 'weights': 'elements'},
    {'leading': (7,), 'num_classes': 1, 'num_features': 4, 'masked': True, 'weights': 'examples'},
    {'leading': (2, 3), 'num_features': 1, 'masked': True},
    {'leading': (2, 3), 'num_features': 1, 'weights': 'elements'},
    {'leading': (2, 1, 4), 'masked': True, 'weights': 'examples'},
]
problems = st.builds(
    lambda form, seed: make_problem(seed, **form), form=st.sampled_from(FORMS), seed=st.integers(0, 2**32 - 1)
)
