"""Limits of the system for a while."""

import contextlib
import resource
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def limited_to(size: int) -> Iterator[None]:
    """Lets no file grow beyond so many bytes, which to a program is as a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # JAX would truncate an entry of the compilation cache that the tests of this process share.
    shortest = jax.config.values['jax_persistent_cache_min_compile_time_secs']
    jax.config.update('jax_persistent_cache_min_compile_time_secs', float('inf'))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        jax.config.update('jax_persistent_cache_min_compile_time_secs', shortest)
