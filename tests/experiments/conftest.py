"""A finished run for many tests. The coverage of the library is measured by its own tests alone."""

import os
from pathlib import Path

import jax
import pytest
from coverage import Coverage

from experiments import toy2d
from tests.support import tiny


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


@pytest.fixture(scope='session')
def whole(tmp_path_factory) -> Path:
    """A run of two epochs of the digits that nothing disturbed. A test that changes it takes a copy."""
    out = tmp_path_factory.mktemp('whole') / 'a run'
    assert tiny.run(toy2d, *tiny.QUICK, '--epochs', 2, '--out', out) == 0
    return out
