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
    options: dict  # where and weights, as the functions take them

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
    """A problem of these sizes; `masked` adds -1 labels and a `where`; weights: 'examples' or 'elements'."""
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


# Few sizes and many values: a size costs a compilation.
_sizes = [((), 5, 3), ((7,), 5, 3), ((7,), 1, 4), ((2, 3), 5, 1), ((2, 1, 4), 5, 3)]
problems = st.builds(
    lambda sizes, **kwargs: make_problem(leading=sizes[0], num_classes=sizes[1], num_features=sizes[2], **kwargs),
    sizes=st.sampled_from(_sizes),
    seed=st.integers(0, 2**32 - 1),
    masked=st.booleans(),
    weights=st.sampled_from([None, 'examples', 'elements']),
)
