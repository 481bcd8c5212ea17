"""Writes files atomically: after a kill or a power cut each one is complete or absent."""

import contextlib
import csv
import fcntl
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

# A spreadsheet runs text that starts with one of these as a formula. It may skip a tab or a line end first.
FORMULAS = ('=', '+', '-', '@', '\t', '\r')


@contextlib.contextmanager
def draft(path: Path) -> Iterator[IO[bytes]]:
    """Opens a temporary file beside `path` and renames it to `path` at the end. Follows no links.

    Raises:
      OSError: if the file cannot be written; the error names it.
    """
    beside = path.with_name(f'.{path.name}.draft')
    try:
        beside.unlink(missing_ok=True)
        with _open(beside, os.O_RDWR | os.O_EXCL) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        sync(path.parent)
    except OSError as error:  # a full disk has no name in it
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def sync_tree(path: Path) -> None:
    """Waits until a folder, its contents and its name are on the disk."""
    for parent, _, names in os.walk(path):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on the disk."""
    number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def save_figure(path: Path, figure: Any, **options: Any) -> None:
    """Saves a figure of Matplotlib in the format of the file's suffix."""
    with draft(path) as file:
        figure.savefig(file, format=path.suffix[1:], **options)


@contextlib.contextmanager
def lock(path: Path, *, wait: bool = True, shared: bool = False) -> Iterator[None]:
    """Locks a file until the block or the process ends. Creates it if absent, and keeps its contents.

    Any number of processes may hold a shared lock at once.

    Raises:
      BlockingIOError: if another process holds the lock and `wait` is false.
    """
    with _open(path, os.O_RDWR) as file:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        yield


def _open(path: Path, flags: int) -> IO[bytes]:
    return open(os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), 'r+b')


def write_text(path: Path, text: str) -> None:
    """Writes text as UTF-8, with its line ends unchanged."""
    with draft(path) as file:
        file.write(text.encode())


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows as CSV, with the columns of the first row. Text that a spreadsheet would run gets an apostrophe."""
    table = io.StringIO(newline='')
    writer = csv.DictWriter(table, list(rows[0]))
    writer.writeheader()
    writer.writerows({key: _inert(value) for key, value in row.items()} for row in rows)
    write_text(path, table.getvalue())


def _inert(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULAS) else value
