"""What every implementation of the benchmark is given and gives back: the size of a step, and the steps."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

ALPHA = 0.5


class Problem(NamedTuple):
    """The size of a problem."""

    batch_size: int
    num_classes: int
    feature_dim: int

    def batch(self) -> tuple[np.ndarray, np.ndarray]:
        """Features and labels, the same for every arm."""
        rng = np.random.default_rng(0)
        x = rng.standard_normal((self.batch_size, self.feature_dim), np.float32)
        return x, rng.integers(0, self.num_classes, self.batch_size, np.int32)


class Implementation(NamedTuple):
    """Steps, how to wait for the result of one, and what the compiler says of them, where there is one."""

    steps: Iterator[Any]
    wait: Callable[[Any], Any] = jax.block_until_ready
    temporary_bytes: int | None = None
    accessed_bytes: float | None = None
