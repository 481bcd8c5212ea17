"""A trace of a few training steps, for TensorBoard's profiler, Perfetto or XProf."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

# The first steps compile and fill caches.
WARM_UP, TRACED = 5, 5


@contextmanager
def traced(step: Callable, folder: Path) -> Iterator[Callable]:
    """A training step whose calls after the warm-up are traced into the folder, a few of them."""
    calls = 0
    tracing = False

    def stop(result: Any = None) -> None:
        nonlocal tracing
        jax.block_until_ready(result)  # steps run behind their calls
        jax.profiler.stop_trace()
        tracing = False

    def call(*args):
        nonlocal calls, tracing
        if calls == WARM_UP:
            jax.block_until_ready(args)
            jax.profiler.start_trace(folder)
            tracing = True
        calls += 1
        result = step(*args)
        if tracing and calls == WARM_UP + TRACED:
            stop(result)
        return result

    try:
        yield call
    finally:
        if tracing:
            stop()
