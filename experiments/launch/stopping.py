"""SIGINT and SIGTERM as requests to stop: the run saves at its next step, and prints how to continue."""

import signal
from typing import Any

from experiments.launch import processes
from experiments.launch.errors import Stopped


class Stop:
    """Handles SIGINT and SIGTERM inside a `with` statement. A second signal has its default effect."""

    def __init__(self, command: str):
        self._command = command
        self._received = self._signum = 0
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> 'Stop':
        self._handlers = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _handle(self, signum: int, _) -> None:
        self._received = signum
        if not processes.several():
            self._signum = signum
        self.__exit__()

    def synchronize(self, *values: int) -> list[int]:
        """Requests a stop in all processes if one has received a signal; returns the largest of the other values."""
        self._signum, *rest = processes.largest(self._received, *values)
        return rest

    @property
    def requested(self) -> bool:
        return self._signum != 0

    def raise_if_requested(self) -> None:
        """Raises Stopped if a stop was requested. Call it when the state has been saved."""
        if self._signum:
            name = signal.Signals(self._signum).name
            raise Stopped(f'stopped by {name}, and saved. To continue: {self._command}', self._signum)
