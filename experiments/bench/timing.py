"""Times steps, and the copy of a large array as the machine's memory bandwidth.

A step is timed in blocks of eight, after a block that pays for compilation and for fresh memory pages. On a CPU the
host waits for each step. An accelerator gets all eight steps before the wait, as in a training loop, so that the
latency of the wait does not dominate.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 8  # steps
TURN_SECONDS = 4.0  # the time of an arm in a turn, without the warm-up
# Bytes of the array to copy, on a CPU and on an accelerator. It must not fit into a cache.
CPU_COPY_BYTES, ACCELERATOR_COPY_BYTES = 2**28, 2**31


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of a step: the median over blocks, and the quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> 'Timing':
        low, median, high = np.percentile(seconds, [25, 50, 75])
        return cls(float(median), float(low), float(high))

    def row(self) -> dict[str, float]:
        return {'step_seconds': self.median, 'low_seconds': self.low, 'high_seconds': self.high}


def measure(steps: Iterator[Any], rounds: int, wait: Callable[[Any], Any] = jax.block_until_ready) -> list[float]:
    """Times `wait(next(steps))`.

    Args:
        steps: An endless iterator of results.
        rounds: The number of blocks. A slow step gets fewer, unless several processes must run the same steps.
        wait: Waits for a result.

    Returns:
        Seconds of a step in each block.
    """
    limit = TURN_SECONDS if jax.process_count() == 1 else math.inf
    _time_block(steps, wait, limit / 4)
    start = time.perf_counter()
    seconds = [_time_block(steps, wait, limit / 4)]
    while len(seconds) < rounds and time.perf_counter() - start < limit:
        seconds.append(_time_block(steps, wait, limit / 4))
    return seconds


def _time_block(steps: Iterator[Any], wait: Callable[[Any], Any], limit: float) -> float:
    """Returns the seconds of a step over one block, which ends early after `limit` seconds."""
    wait_for_each = on_cpu()
    start, done, last = time.perf_counter(), 0, None
    while done < BLOCK and time.perf_counter() - start < limit:
        last = next(steps)
        if wait_for_each:
            wait(last)
            last = None  # so that the next step can reuse its memory
        done += 1
    wait(last)
    return (time.perf_counter() - start) / done


def on_cpu() -> bool:
    return jax.default_backend() == 'cpu'


def bandwidth() -> float:
    """Returns the bytes per second, read and written together, at which one device copies a large array.

    The target is donated, so that its pages exist. The copy is negated, because XLA would alias a plain copy.
    """
    copy: Callable = jax.jit(lambda target, array: -array, donate_argnums=0, keep_unused=True)
    size = CPU_COPY_BYTES if on_cpu() else ACCELERATOR_COPY_BYTES
    array, target = (jnp.ones(size // 4, jnp.float32, device=jax.local_devices()[0]) for _ in range(2))

    def copies():
        nonlocal target
        while True:
            target = copy(target, array)
            yield target

    return 2 * size / Timing.of(measure(copies(), rounds=3)).median
