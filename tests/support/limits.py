"""Limits of the system for a while."""

import contextlib
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def limited_to(size: int) -> Iterator[None]:
    """Lets no file grow beyond so many bytes, which to a program is as a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
