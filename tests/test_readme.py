"""README is run: each of its blocks stands alone, and its numbers follow from the library."""

import inspect
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import centerloss_jax as clj

README = (Path(__file__).parents[1] / 'README.md').read_text(encoding='utf-8')
BLOCKS = re.findall(r'^```python\n(.*?)^```$', README, re.MULTILINE | re.DOTALL)
HEADINGS = [re.findall(r'^#+ (.*)$', README.split(block)[0], re.MULTILINE)[-1] for block in BLOCKS]
LINKS = re.findall(r'\]\((?!https?:|#)([^)]+)\)', README)


@pytest.mark.parametrize('block', BLOCKS, ids=HEADINGS)
def test_a_block_runs_as_it_stands_and_its_step_lowers_for_accelerators(block):
    namespace = {'__name__': 'readme', 'center_weight': 0.1}
    exec(compile(block, 'README.md', 'exec'), namespace)
    step = namespace.get('train_step')
    if step is not None:
        arguments = [namespace[name] for name in inspect.signature(step).parameters]
        modules = [value for value in arguments if isinstance(value, nnx.Module)]  # NNX steps have theirs in front
        graphdef, state = nnx.split(modules)

        def run(state, *arrays):
            modules = nnx.merge(graphdef, state)
            return step(*modules, *arrays), nnx.state(modules)

        lowered = jax.jit(run).trace(state, *arguments[len(modules) :]).lower(lowering_platforms=('cuda', 'tpu'))
        assert 'stablehlo' in lowered.as_text()


def test_there_is_a_quickstart_for_each_kind_of_user():
    assert {'Flax Linen', 'Flax NNX', 'Bare JAX', 'Several devices with pmap'} <= set(HEADINGS)


@pytest.mark.parametrize('link', LINKS)
def test_a_link_leads_somewhere(link):
    assert (Path(__file__).parents[1] / link).exists()


@pytest.mark.parametrize(
    ('origin', 'loss', 'weight'),
    [
        ('the paper, Caffe', lambda squares, d: squares.sum() / 2 / len(squares), lambda w, b, d: w / 2),
        ('PyTorch repositories', lambda squares, d: squares.mean(), lambda w, b, d: w),
        ('facenet', lambda squares, d: squares.mean() / d, lambda w, b, d: w / d),
        ('TF1 copies', lambda squares, d: squares.sum() / 2, lambda w, b, d: w * b / 2),
    ],
)
def test_the_table_of_factors_carries_a_weight_over(worked_example, origin, loss, weight):
    row = re.search(rf'^\| {origin} \|.*\| (.*) \|$', README, re.MULTILINE)
    assert row is not None
    x, centers, labels = worked_example.x, worked_example.centers, worked_example.labels
    batch_size, num_features = x.shape
    written = row[1].split(';')[0].replace('λ', 'w').replace('·', '*').replace('B', 'b').replace('D', 'd')
    factor = eval(written, {'w': 0.25, 'b': batch_size, 'd': num_features})
    assert factor == weight(0.25, batch_size, num_features)
    theirs = 0.25 * loss(worked_example.per_example, num_features)
    np.testing.assert_allclose(factor * clj.center_loss(x, centers, labels), theirs, rtol=1e-6)
