"""Measures the arms of one problem in turns, with a copy in each turn, so that other load affects all arms alike."""

import gc
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from experiments.bench.problem import Implementation, Problem
from experiments.bench.timing import Timing, bandwidth, measure

TURNS = 3
SLOW = 2.0  # seconds of a step; a slower arm gets one turn
# A step reads the features, their centers and the gradient, and writes the gradient and the centers.
ARRAYS_COPIED = 5

Maker = Callable[[Problem], Implementation | None]


def measure_problem(
    arms: Mapping[str, Maker],
    problem: Problem,
    rounds: int,
    report: Callable[..., None],
) -> list[dict[str, Any]]:
    """Measures the arms on one problem.

    Args:
        arms: By name, a function that returns None if the arm cannot solve the problem.
        problem: The size of the step.
        rounds: Blocks of steps in each turn.
        report: Called with the name of an arm before each turn, and with the name and a reason if the arm is skipped.

    Returns:
        A row for each arm that was measured, over the blocks of all turns.
    """
    speeds: list[float] = []
    blocks: dict[str, list[float]] = {}
    compiled: dict[str, dict[str, Any]] = {}
    for turn in range(TURNS):
        speeds.append(bandwidth())
        for name, make in arms.items():
            report(name)
            if turn and (name not in blocks or (min(blocks[name]) > SLOW and jax.process_count() == 1)):
                continue
            try:
                arm = make(problem)
                if arm is None:
                    continue
                blocks[name] = blocks.get(name, []) + measure(arm.steps, rounds, arm.wait)
                compiled[name] = {'temporary_bytes': arm.temporary_bytes, 'accessed_bytes': arm.accessed_bytes}
                # Frees the arrays before the next arm.
                arm.steps.close()  # pyright: ignore[reportAttributeAccessIssue]  # a generator
            except (MemoryError, RuntimeError) as error:
                if not _out_of_memory(error) or jax.process_count() > 1:
                    raise
                report(name, 'out of memory')
                blocks.pop(name, None)
            arm = None
            gc.collect()
    speed = float(np.median(speeds))
    copy_seconds = ARRAYS_COPIED * problem.batch_size * problem.feature_dim * 4 / speed
    rows = []
    for name, seconds in blocks.items():
        timing = Timing.of(seconds)
        copied = {'times_copy': timing.median / copy_seconds, 'copy_bytes_per_second': speed}
        rows.append({'arm': name, **problem._asdict(), **timing.row(), **copied, **compiled[name]})
    return rows


def _out_of_memory(error: Exception) -> bool:
    """Returns whether Python, JAX or PyTorch ran out of memory."""
    message = str(error).lower()
    phrases = 'resource_exhausted', 'out of memory', "can't allocate memory"
    return isinstance(error, MemoryError) or any(phrase in message for phrase in phrases)
