"""The files of saves: which are finished, which are damaged, and which the system failed to read.

A save is damaged if its content is wrong. It is moved aside, and an older save is used. If the system fails to read a
save, as with too many open files, nothing is moved and the run ends.
"""

import functools
import itertools
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.launch.errors import RunError

# Orbax gives this name to the folder of an unfinished save; older releases add the time.
_UNFINISHED = re.compile(r'\d+\.orbax-checkpoint-tmp(-\d+)?')

# TensorStore writes the number of a system error into its message.
_OS_ERROR = re.compile(r"\[OS error (\d+)|os_error_code='(\d+)'")


def unfinished_saves(folder: Path) -> list[Path]:
    """Returns the folders of unfinished saves. Other files in the folder may belong to the user."""
    paths = _listed(folder)
    return [path for path in paths if _UNFINISHED.fullmatch(path.name) and path.is_dir() and not path.is_symlink()]


def saved_steps(folder: Path) -> list[int]:
    """Returns the steps that have a save, the newest first. Orbax returns none if it fails to list the folder."""
    paths = [path for path in _listed(folder) if path.name.isdecimal() and path.name == str(int(path.name))]
    for path in paths:
        if path.is_symlink() or not path.is_dir():
            raise RunError(f'{path} has the name of a save, but is a link or a file; move it out of the folder')
    return sorted((int(path.name) for path in paths), reverse=True)


def move_aside(save: Path) -> Path:
    """Renames a damaged save, so that its step can be saved again, and returns the new path."""
    names = (f'{save.name}.damaged{number or ""}' for number in itertools.count())
    aside = next(path for name in names if not os.path.lexists(path := save.with_name(name)))
    return save.rename(aside)


def check_readable(path: Path) -> None:
    """Raises RunError if the system fails to read a file of a save. Orbax may report the file as missing."""
    if path.is_dir():
        for entry in _listed(path):
            check_readable(entry)
        return
    try:
        with path.open('rb') as file:
            while file.read(2**20):
                pass
    except OSError as error:
        raise _unreadable(path, error) from error


def check_system(save: Path, error: BaseException | None) -> None:
    """Raises RunError if the system failed while Orbax read a save. Otherwise the save is damaged."""
    absent = FileNotFoundError, IsADirectoryError, NotADirectoryError
    for cause in _causes(error):
        failed = isinstance(cause, MemoryError) or (isinstance(cause, OSError) and not isinstance(cause, absent))
        if failed or _OS_ERROR.search(str(cause)):
            raise _unreadable(save, cause) from error
    check_readable(save)


def system_reason(error: BaseException) -> str:
    """Returns the message of the system error among the causes of an error, or else the first line of the error."""
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        if code := _OS_ERROR.search(str(cause)):
            return os.strerror(int(code[1] or code[2]))
    return first_line(error)


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and its causes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir()) if folder.exists() else []
    except OSError as error:
        raise _unreadable(folder, error) from error


def _unreadable(path: Path, error: BaseException) -> RunError:
    return RunError(
        f'{path} could not be read ({system_reason(error)}); nothing is removed. Correct the error, '
        'or move the save to another folder, and run the same command again'
    )


@functools.cache
def hide_abandoned_reads() -> None:
    """Hides the tracebacks of reads that Orbax abandons after another read of the same save has failed."""
    hook = sys.unraisablehook

    def unless_abandoned(unraisable: Any) -> None:
        if str(unraisable.exc_value) != 'Event loop is closed':
            hook(unraisable)

    sys.unraisablehook = unless_abandoned
    logging.getLogger('asyncio').addFilter(lambda record: 'never retrieved' not in record.getMessage())
