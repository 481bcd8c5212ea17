"""How long a step takes, against what the machine can copy in that time.

A step is timed in blocks of eight on arrays that were touched before: the first steps pay for compilation and for fresh
pages, and arms that alternate step by step push each other's tables out of the caches. On a CPU each step is waited
for. An accelerator is given all eight before the wait, as a training loop does it: else the way to it and back would
be most of a step.
"""

import ctypes
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 8  # steps
TURN_SECONDS = 4.0  # seconds for an arm in a turn, once it has warmed up
# Bytes of the array that shows the bandwidth: beyond every cache, on a CPU and on an accelerator.
COPIED, COPIED_THERE = 2**28, 2**31


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds a step: the median of blocks, and their quartiles."""

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
    """Times `wait(next(steps))`: seconds a step in so many blocks of eight, or in fewer.

    Several processes must take the same steps, however slow these are to one of them.
    """
    patience = TURN_SECONDS if jax.process_count() == 1 else math.inf
    _block(steps, wait, patience / 4)
    begun = time.perf_counter()
    seconds = [_block(steps, wait, patience / 4)]
    while len(seconds) < rounds and time.perf_counter() - begun < patience:
        seconds.append(_block(steps, wait, patience / 4))
    return seconds


def _block(steps: Iterator[Any], wait: Callable[[Any], Any], patience: float) -> float:
    """Seconds a step over eight steps, or over those of the first seconds."""
    wait_for_each = on_cpu()
    begun, done, last = time.perf_counter(), 0, None
    while done < BLOCK and time.perf_counter() - begun < patience:
        last = next(steps)
        if wait_for_each:
            wait(last)
            last = None  # or the next step could not have its memory
        done += 1
    wait(last)
    return (time.perf_counter() - begun) / done


def on_cpu() -> bool:
    return jax.default_backend() == 'cpu'


def bandwidth() -> float:
    """Bytes a second that one device reads and writes, together, when it copies a large array to another.

    The other is donated, and so touched before; the sign changes, since XLA would hand on a copy that changes nothing.
    """
    copy: Callable = jax.jit(lambda old, array: -array, donate_argnums=0, keep_unused=True)
    size = COPIED if on_cpu() else COPIED_THERE
    array, other = (jnp.ones(size // 4, jnp.float32, device=jax.local_devices()[0]) for _ in range(2))

    def copies():
        nonlocal other
        while True:
            other = copy(other, array)
            yield other

    return 2 * size / Timing.of(measure(copies(), rounds=3)).median


def keep_freed_memory() -> bool:
    """Tells glibc to keep what is freed, for all that comes after; False where the C library is another.

    By default it maps arrays beyond 32 MB anew each time, so that a step pays for a page fault every 4 KB.
    """
    try:
        mallopt = ctypes.CDLL('libc.so.6').mallopt
    except OSError:
        return False
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    return bool(mallopt(m_trim_threshold, 2**31 - 1) and mallopt(m_top_pad, 2**28) and mallopt(m_mmap_max, 0))
