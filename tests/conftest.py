"""What the whole suite shares: eight CPU devices, one worked example, one way to run on several devices."""

from tempfile import TemporaryDirectory
from typing import NamedTuple

import hypothesis
import jax
import numpy as np
import pytest

# Before anything asks for a device: the number is fixed from then on.
jax.config.update('jax_num_cpu_devices', 8)

# Many tests compile the same program, a run of an experiment above all: only the first of a process pays for it.
COMPILED = TemporaryDirectory(prefix='compiled')
jax.config.update('jax_compilation_cache_dir', COMPILED.name)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)

# Every new shape is a compilation, so few examples; derandomized, so that a failure is one for everybody.
hypothesis.settings.register_profile('suite', max_examples=25, deadline=None, derandomize=True)
hypothesis.settings.load_profile('suite')


class WorkedExample(NamedTuple):
    """A batch small enough to check by hand; `moved` is Eq. 4 of the paper with alpha 0.5."""

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


def _shard_map(check_vma):
    def over(fn, num_devices):
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:num_devices]), ('batch',))

        def local(batch, replicated):
            out = fn(jax.tree.map(lambda a: a[0], batch), replicated)
            return jax.tree.map(lambda a: a[None], out)

        specs = (jax.P('batch'), jax.P())
        mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=jax.P('batch'), check_vma=check_vma)
        return jax.jit(mapped)

    return over


@pytest.fixture(
    params=[
        pytest.param(_vmap, id='vmap'),
        pytest.param(_pmap, id='pmap'),
        pytest.param(_shard_map(True), id='shard_map'),
        pytest.param(_shard_map(False), id='shard_map_unchecked'),
    ]
)
def per_device(request):
    """Runs `fn(batch, replicated)` over the axis 'batch', the leading one of every array in `batch`.

    The results are stacked, so that a test sees what each device got.
    """

    def run(fn, batch, replicated):
        return request.param(fn, len(jax.tree.leaves(batch)[0]))(batch, replicated)

    return run
