"""Several processes as one run: their start, barriers, and reductions over them.

`jax.distributed` ends the others if a process is missing, killed or fails. The timeouts here bound how long that takes.
"""

import signal
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.launch.errors import FlagError

# Seconds. With each, a failed run ends within a minute, the start of Python included.
INITIALIZATION_TIMEOUT, HEARTBEAT_TIMEOUT, SHUTDOWN_TIMEOUT = 30, 20, 20


def initialize(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Starts `jax.distributed`; arguments that are None are detected from Slurm, GKE, TPU or MPI.

    If a process is missing, JAX ends the others with its own message and exit code 134.

    Raises:
        FlagError: if JAX detects no cluster.
    """
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=INITIALIZATION_TIMEOUT,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
            shutdown_timeout_seconds=SHUTDOWN_TIMEOUT,
        )
    except ValueError as error:
        raise FlagError(
            f'--distributed detects no Slurm, GKE, TPU or MPI job ({error}); in a batch script of Slurm start the '
            'program with srun, elsewhere pass --coordinator HOST:PORT --num-processes N --process-id I'
        ) from error
    # JAX's handler only records SIGTERM. `stopping.Stop` installs one that saves; until then SIGTERM ends the process.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def several() -> bool:
    """Returns whether this process was started as one of several."""
    return jax.distributed.is_initialized()


def is_main_process() -> bool:
    """Returns whether this process writes files and prints."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until all processes have reached the barrier of this name."""
    if several():
        multihost_utils.sync_global_devices(name)


def largest(*values: int) -> list[int]:
    """Returns the largest of each value over the processes."""
    return np.max(_gather(values), axis=0).tolist()


def total(values: Sequence[int]) -> list[int]:
    """Returns the sum of each value over the processes."""
    return np.sum(_gather(values), axis=0).tolist()


def check_same(flags: Mapping[str, Any]) -> None:
    """Compares flags, by name, over the processes.

    Raises:
        FlagError: in all processes, if a flag has different values; the message names each one.
    """
    if any(_differ([sorted(flags)])):
        raise FlagError('the processes run different programs; start all of them with the same command')
    differ = dict(zip(flags, _differ(list(flags.values())), strict=True))
    if any(differ.values()):
        values = ', '.join(f'{name} {value}' for name, value in flags.items() if differ[name])
        raise FlagError(f'the processes have different flags; process {jax.process_index()} has {values}')


def _differ(values: Sequence[Any]) -> list[bool]:
    """Returns for each value whether it differs between processes, by its checksum."""
    checksums = _gather([zlib.crc32(repr(value).encode()) >> 1 for value in values])
    return (checksums != checksums[0]).any(axis=0).tolist()


def _gather(values: Sequence[int]) -> np.ndarray:
    """Returns the values of all processes, int32 `[processes, values]`."""
    if jax.process_count() == 1:
        return np.array([values])
    with jax.transfer_guard('allow'):
        return multihost_utils.process_allgather(np.asarray(values, np.int32))
