"""The errors and the requests to stop that end a program with one line. Nothing slow is imported for them."""


class FlagError(Exception):
    """Reports flags that cannot be used, in one line. It is not a ValueError, which tyro would print in a box."""


class DataError(Exception):
    """Reports an error of the data and its cure to the user, in one to ten lines."""


class RunError(Exception):
    """An error about a run that the user can correct; the message says how."""


class DamagedError(RunError):
    """A file of a run is missing or not whole."""


class Stopped(Exception):
    """Raised when a requested stop has been saved; the message says how to continue."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.exit_code = 128 + signum  # as in shells: 130 for SIGINT, 143 for SIGTERM
