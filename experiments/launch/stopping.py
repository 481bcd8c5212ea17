"""SIGTERM and Ctrl-C as a wish that a run fulfils where its state is whole: it saves, and says how to go on."""

import signal
from typing import Any

from experiments.launch import processes


class Stopped(Exception):
    """The run was asked to stop and has saved; the message says how to go on."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.exit_code = 128 + signum  # as shells have it: 130 for Ctrl-C, 143 for SIGTERM


class Stop:
    """Listens to both signals within its `with` statement; a second one ends the process as it always did."""

    def __init__(self, command: str):
        self._command = command
        self._heard = self._signum = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> 'Stop':
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, signum: int, _) -> None:
        self._heard = signum
        if not processes.several():
            self._signum = signum
        self.__exit__()

    def agree(self, *others: int) -> list[int]:
        """Asks all processes of a run to stop if one of them was asked; returns the largest of their other numbers."""
        self._signum, *rest = processes.largest(self._heard, *others)
        return rest

    @property
    def asked(self) -> bool:
        return self._signum != 0

    def obey(self) -> None:
        """Raises Stopped if the run was asked to stop."""
        if self._signum:
            name = signal.Signals(self._signum).name
            raise Stopped(f'stopped by {name}, and saved. To go on: {self._command}', self._signum)
