"""Eight CPU devices, a worked example, and a fixture that runs a function on several devices."""

import gc
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import hypothesis
import jax
import numpy as np
import pytest

# XLA reads its flags once. Its older emitters of fused loops, which JAX 0.10 still has, compile in half the time. Tests
# of compiled programs take the newer ones.
older_emitters = ' --xla_cpu_use_fusion_emitters=false' if jax.__version_info__ < (0, 11) else ''
os.environ.setdefault('XLA_FLAGS', '--xla_cpu_parallel_codegen_split_count=1' + older_emitters)

# JAX fixes the number of devices when the first one is used.
jax.config.update('jax_num_cpu_devices', 8)

# Many tests compile the same program: only the first test of a worker pays for it, and the processes that tests start
# read its cache. Workers share none, since JAX writes a cache without a lock. `.ci/run` keeps them for the slow tests.
COMPILED = TemporaryDirectory(prefix='compiled')
cache = Path(os.environ.get('TESTS_COMPILATION_CACHE', COMPILED.name), os.environ.get('PYTEST_XDIST_WORKER', 'main'))
os.environ |= {
    'JAX_COMPILATION_CACHE_DIR': str(cache),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1',
}
jax.config.update('jax_compilation_cache_dir', str(cache))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)

# The tests run each program a few times: LLVM's optimizations would cost more than they save. tests/compiled has them.
jax.config.update('jax_disable_most_optimizations', True)

# Nor do they read where an operation comes from, which JAX would write into each program.
jax.config.update('jax_traceback_in_locations_limit', 0)

# Tracing makes many objects, and each full collection would visit those of all imported packages: a tenth of the time.
gc.freeze()
gc.set_threshold(2_000_000, 20, 100)

# Few examples, since a new shape is a compilation. Derandomized, so that everybody sees the same failure. `.ci/nightly`
# takes the other profile.
hypothesis.settings.register_profile('suite', max_examples=25, deadline=None, derandomize=True)
hypothesis.settings.register_profile('nightly', max_examples=1000, deadline=None, print_blob=True)
hypothesis.settings.load_profile('suite')


class WorkedExample(NamedTuple):
    """A batch that can be checked by hand. `moved` holds the centers after Eq. 4 of the paper with alpha 0.5."""

    x: np.ndarray
    centers: np.ndarray
    labels: np.ndarray
    per_example: np.ndarray
    moved: np.ndarray


@pytest.fixture
def worked_example() -> WorkedExample:
    return WorkedExample(
        x=np.array([[1, 2], [3, 4], [0, 1], [2, 2]], np.float32),
        centers=np.array([[0, 0], [1, 1], [2, 2]], np.float32),
        labels=np.array([0, 2, 1, 0], np.int32),
        per_example=np.array([5, 5, 1, 8], np.float32),
        moved=np.array([[1 / 2, 2 / 3], [3 / 4, 1], [9 / 4, 5 / 2]], np.float32),
    )


def _vmap(fn, _):
    return jax.jit(jax.vmap(fn, in_axes=(0, None), axis_name='batch'))


def _pmap(fn, _):
    return jax.pmap(fn, in_axes=(0, None), axis_name='batch')


def _shard_map(fn, num_devices):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:num_devices]), ('batch',))

    def local(batch, replicated):
        out = fn(jax.tree.map(lambda a: a[0], batch), replicated)
        return jax.tree.map(lambda a: a[None], out)

    specs = (jax.P('batch'), jax.P())
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=jax.P('batch')))


# jax.pmap is a jax.shard_map without the replication check.
@pytest.fixture(
    params=[
        pytest.param(_vmap, id='vmap', marks=pytest.mark.slow),
        pytest.param(_pmap, id='pmap'),
        pytest.param(_shard_map, id='shard_map'),
    ]
)
def per_device(request):
    """Runs `fn(batch, replicated)` over the axis 'batch', the leading axis of every array in `batch`.

    The results of the devices are stacked.
    """

    def run(fn, batch, replicated):
        return request.param(fn, len(jax.tree.leaves(batch)[0]))(batch, replicated)

    return run
