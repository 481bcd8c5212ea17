"""Programs are read as users compile them, with all of the compiler's optimizations."""

import jax
import pytest


@pytest.fixture(autouse=True, scope='module')
def _all_optimizations():
    jax.config.update('jax_disable_most_optimizations', False)
    yield
    jax.config.update('jax_disable_most_optimizations', True)
