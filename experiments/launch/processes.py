"""Several processes as one run: they join, agree on when to save, write once, and notice when one of them is lost.

JAX and Orbax do the rest. What they leave open is a process that is killed or fails: the others would wait for it in a
collective for ever, or be aborted without a word. So each one gives a sign of life every few seconds, and a thread that
nothing blocks looks after the others'.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # JAX has no public name for the store that its processes share; Orbax uses it too
from jax.experimental import multihost_utils

from experiments.launch.rendezvous import JoinError, meet

# Seconds: to wait for the others at the start, between two signs of life, and until a process without one is lost.
PATIENCE, BEAT, SILENCE = 60, 2, 20

GO_ON = 'Give the same lines again; a run goes on from its last save, which is whole, with --resume'

_watch: 'Watch | None' = None


def join(coordinator: str | None, count: int | None, index: int | None, patience: float = PATIENCE) -> None:
    """Joins the processes that the surroundings know, or those that meet at the coordinator, HOST:PORT.

    Raises:
      JoinError: if there are no others, or not all of them within `patience` seconds.
    """
    global _watch
    if coordinator is not None and count is not None and index is not None:
        host, _, port = coordinator.rpartition(':')
        meet(host.strip('[]'), int(port), count, index, patience)
    try:
        jax.distributed.initialize(coordinator, count, index)
    except ValueError as error:  # which of its values JAX has not found
        raise JoinError(
            f'--distributed finds no step of Slurm, and no GKE, TPU or MPI job around this process ({error}); in a '
            'batch script of Slurm start it with srun, elsewhere pass '
            '--coordinator HOST:PORT --num-processes N --process-id I'
        ) from error
    # JAX takes SIGTERM for itself and only remembers it. A run that can save listens to it (`stopping`), the rest ends.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if jax.process_count() > 1:
        _watch = Watch(jax.process_index(), jax.process_count())
        _watch.start()


def several() -> bool:
    """Whether this process is one of several."""
    return _watch is not None


def first() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def together(what: str) -> None:
    """Waits until all processes have come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def largest(*values: int) -> list[int]:
    """The largest of each value that any process has."""
    return np.max(_of_all(values), axis=0).tolist()


def total(values: Sequence[int]) -> list[int]:
    """The sums of values over the processes."""
    return np.sum(_of_all(values), axis=0).tolist()


def _of_all(values) -> np.ndarray:
    if jax.process_count() == 1:
        return np.array([values])
    with jax.transfer_guard('allow'):
        return multihost_utils.process_allgather(np.asarray(values, np.int32))


def leave() -> None:
    """Waits for the others at the end of a run, or where all of them have stopped."""
    global _watch
    if _watch is not None:
        together('the end')
        _watch.leave()
        _watch = None


def fail(code: int, message: str) -> None:
    """If this process has others and has not left them, ends it at once and tells them why."""
    if _watch is not None:
        _watch.fail(f'ended with exit code {code}: {message.strip().splitlines()[-1]}', code)


def look_for_the_lost() -> None:
    """After an error of JAX's: if another process was lost the watch says so and ends this one, else it returns."""
    if _watch is not None:
        _watch.join(SILENCE + 5 * BEAT)


class Watch(threading.Thread):
    """Ends this process, with a line, if another one of the run is lost.

    Process 0 looks after all others; they look after process 0, and read there who is lost.
    """

    def __init__(self, index: int, count: int):
        super().__init__(daemon=True)
        self._index, self._count = index, count
        self._store: Any = distributed.global_state.client
        self._calls = ThreadPoolExecutor(1)
        self._done = threading.Event()
        own, watched = ('first', 'others') if index == 0 else ('others', 'first')
        self._own, self._watched = f'run/{own}/', f'run/{watched}/'

    def run(self) -> None:
        heard: dict[int, tuple[str, float]] = {}
        others = range(1, self._count) if self._index == 0 else range(1)
        beat = 0
        while not self._done.wait(BEAT):
            beat += 1
            try:
                self._ask(self._store.key_value_set, f'{self._own}{self._index}', str(beat), allow_overwrite=True)
                signs = dict(self._ask(self._store.key_value_dir_get, self._watched))
                lost = dict(self._ask(self._store.key_value_dir_get, 'run/lost/'))
            except (jax.errors.JaxRuntimeError, TimeoutError):
                if not self._done.is_set():
                    self._exit('process 0 was lost: it answers no more')
                return
            for reason in lost.values():
                self._exit(reason)
            now = time.monotonic()
            for other in others:
                sign = signs.get(f'{self._watched}{other}', '')
                before, since = heard.get(other, (None, now))
                heard[other] = sign, since if sign == before else now
                if now - heard[other][1] > SILENCE:
                    self.fail(f'was lost: nothing was heard of it for {SILENCE} seconds', 1, other)

    def leave(self) -> None:
        self._done.set()
        self.join()

    def fail(self, what: str, code: int, index: int | None = None) -> None:
        """Tells all processes what has become of one of them, by default of this one, and ends this one."""
        self._done.set()
        failed = self._index if index is None else index
        line = f'process {failed} of {self._count} {what}'
        with contextlib.suppress(jax.errors.JaxRuntimeError, TimeoutError):  # process 0 may be lost as well
            self._ask(self._store.key_value_set, f'run/lost/{failed}', line, allow_overwrite=True)
        self._exit('' if index is None else line, code)

    def _ask(self, call: Callable, *args: str, **options: bool) -> Any:
        """The answer of the store. It is in process 0, and where that has stopped or is cut off no call returns."""
        return self._calls.submit(call, *args, **options).result(SILENCE)

    def _exit(self, reason: str, code: int = 1) -> None:
        """Ends the process without waiting for anyone, as Python's exit would."""
        if reason:
            print(f'{reason}. {GO_ON}', file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        if self._index == 0:
            time.sleep(2.5 * BEAT)  # the store that tells the others is in this process
        os._exit(code)
