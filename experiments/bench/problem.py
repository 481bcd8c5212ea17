"""The interface of an implementation: it is given the size of a step, and returns an endless iterator of steps."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

ALPHA = 0.5  # of the centers
RATE, MOMENTUM = 0.1, 0.9  # of the SGD of a classifier


class Problem(NamedTuple):
    """The size of a step."""

    batch_size: int
    num_classes: int
    feature_dim: int

    def batch(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns features `[B, D]` and labels `[B]`; each call returns equal arrays."""
        rng = np.random.default_rng(0)
        x = rng.standard_normal((self.batch_size, self.feature_dim), np.float32)
        return x, rng.integers(0, self.num_classes, self.batch_size, np.int32)


class Implementation(NamedTuple):
    """Steps, a function that waits for the result of a step, and what the compiler reports, if there is one."""

    steps: Iterator[Any]
    wait: Callable[[Any], Any] = jax.block_until_ready
    temporary_bytes: int | None = None
    accessed_bytes: float | None = None
