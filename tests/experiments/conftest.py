"""The coverage of the library is measured by its own tests alone."""

import os

import jax
import pytest
from coverage import Coverage


@pytest.fixture
def all_optimizations():
    """Compiles as users do, for long runs and for tests that read a compiled program."""
    jax.config.update('jax_disable_most_optimizations', False)
    yield
    jax.config.update('jax_disable_most_optimizations', True)


@pytest.fixture(autouse=True, scope='package')
def _no_coverage():
    """Stops `pytest --cov` here and in the processes that the tests start, which would take a third longer."""
    coverage = Coverage.current()
    if coverage is None:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith('COVERAGE_PROCESS')]:
            patch.delenv(name)
        coverage.stop()
        yield
        coverage.start()
