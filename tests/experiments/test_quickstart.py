"""Runs each file of `experiments/quickstart` as `python -m` does, on eight devices."""

import inspect
import math
import re
import runpy
from pathlib import Path

import jax
import pytest
from flax import nnx

FOLDER = Path(__file__).parents[2] / 'experiments' / 'quickstart'
NAMES = sorted(path.stem for path in FOLDER.glob('*.py') if path.stem != '__init__')
OTHERS = [name for name in NAMES if name != 'linen']


def test_there_is_a_quickstart_for_each_way_to_train():
    assert {'linen', 'linen_batchnorm', 'nnx', 'bare_jax', 'pmap', 'mesh', 'classifier'} <= set(NAMES)


@pytest.mark.parametrize('name', ['linen', *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_a_quickstart_runs_moves_its_centers_and_lowers_for_accelerators(name, capsys):
    namespace = runpy.run_module(f'experiments.quickstart.{name}', run_name='__main__')

    printed = re.findall(r'^loss (.*), step norm (.*)$', capsys.readouterr().out, re.MULTILINE)
    assert len(printed) >= 3
    for loss, step_norm in printed:
        assert math.isfinite(float(loss))
        assert float(step_norm) > 0
    assert float(printed[2][0]) < float(printed[0][0])

    train_step = namespace.get('train_step')
    if train_step is None:  # mesh builds its step in a function
        return
    known = {'center_weight': 0.1} | namespace
    arguments = [known[parameter] for parameter in inspect.signature(train_step).parameters]
    modules = [value for value in arguments if isinstance(value, nnx.Module)]  # the first arguments of an NNX step
    graphdef, state = nnx.split(modules)

    def run(state, *arrays):
        modules = nnx.merge(graphdef, state)
        return train_step(*modules, *arrays), nnx.state(modules)

    lowered = jax.jit(run).trace(state, *arguments[len(modules) :]).lower(lowering_platforms=('cuda', 'tpu'))
    assert 'stablehlo' in lowered.as_text()
