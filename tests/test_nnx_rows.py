"""Rows beside the gradients of nnx: the ways to put them there, and the ways to lose them, which are errors."""

import chex
import numpy as np
import optax
import pytest
from flax import nnx

import centerloss_jax as clj
from tests.support.steps import NnxModel, jit_nnx_step, make_batch, nnx_arrays, nnx_pair, nnx_table, softmax_loss

both_modes = pytest.mark.parametrize('graph', [True, False], ids=['graph', 'tree'])


def gradients(model, batch, graph):
    def loss_fn(model):
        logits, center, rows = model(*batch)
        return softmax_loss(logits, batch.labels) + center, rows

    (_, rows), grads = nnx.value_and_grad(loss_fn, has_aux=True, graph=graph)(model)
    return grads, rows


def as_a_state_of_params(grads, rows):
    # Without the gradients of centers and batch statistics, which tree mode takes too.
    grads = nnx.state(grads, nnx.Param)
    grads['center'] = {'centers': clj.nnx.Centers(rows)}
    return grads


def as_an_attribute(grads, rows):
    grads.center = {'centers': clj.nnx.Centers(rows)}
    return grads


def as_an_item(grads, rows):
    grads['center'] = {'centers': clj.nnx.Centers(rows)}
    return grads


PLACED = {
    'attribute, graph': (as_an_attribute, True),
    'attribute, tree': (as_an_attribute, False),
    'state of params, graph': (as_a_state_of_params, True),
    'state of params, tree': (as_a_state_of_params, False),
    'item, graph': (as_an_item, True),
}


@pytest.mark.parametrize(('place', 'graph'), PLACED.values(), ids=PLACED.keys())
def test_ways_to_put_rows_beside_the_gradients(place, graph):
    batch, (model, optimizer) = make_batch(), nnx_pair(optax.sgd(0.1), graph=graph, batch_norm=True)
    expected, reference = nnx_pair(optax.sgd(0.1), graph=graph, batch_norm=True)
    jit_nnx_step(graph=graph)(expected, reference, *batch)
    optimizer.update(model, place(*gradients(model, batch, graph)))
    chex.assert_trees_all_close(nnx_arrays(model), nnx_arrays(expected), rtol=1e-5, atol=1e-6)
    assert np.any(nnx_table(model) != 0)


def _set(value):
    def place(grads, rows):
        grads.center = {} if value is None else {'centers': value(rows)}

    return place


LOST = {
    'forgotten': lambda grads, rows: None,
    'not wrapped': _set(lambda rows: rows),
    'wrapped in a type that wrt leaves out': _set(nnx.Variable),
    'an empty entry': _set(None),
}


@both_modes
@pytest.mark.parametrize('place', LOST.values(), ids=LOST.keys())
def test_rows_that_the_optimizer_would_lose_are_an_error(place, graph):
    model, optimizer = nnx_pair(graph=graph)
    before = nnx_arrays(model)
    grads, rows = gradients(model, make_batch(), graph)
    place(grads, rows)
    with pytest.raises(ValueError, match=r'no centers.*wrt.*centerloss_jax.nnx.Centers\(rows\)'):
        optimizer.update(model, grads)
    chex.assert_trees_all_equal(nnx_arrays(model), before)


class TwoTables(NnxModel):
    def __init__(self, *, rngs):
        super().__init__(rngs=rngs)
        self.other = clj.nnx.CenterLoss(4, 6, rngs=rngs)


# In tree mode the gradients hold one for the forgotten table too, and an optimizer without a state, as sgd,
# would take it for a parameter's. A state of params does not have it.
@pytest.mark.parametrize(
    ('optimizer', 'place', 'graph'),
    [
        pytest.param(optax.adam(1e-2), as_an_attribute, True, id='adam, attribute, graph'),
        pytest.param(optax.adam(1e-2), as_an_attribute, False, id='adam, attribute, tree'),
        pytest.param(optax.sgd(0.1), as_an_attribute, True, id='sgd, attribute, graph'),
        pytest.param(optax.sgd(0.1), as_a_state_of_params, True, id='sgd, state of params, graph'),
        pytest.param(optax.sgd(0.1), as_a_state_of_params, False, id='sgd, state of params, tree'),
    ],
)
def test_rows_of_one_table_of_two_are_an_error(optimizer, place, graph):
    model = TwoTables(rngs=nnx.Rngs(0))
    transform = clj.with_centers(optimizer)
    optimizer = nnx.Optimizer(model, transform, wrt=(nnx.Param, clj.nnx.Centers), graph=graph)
    before = nnx_arrays(model)
    grads = place(*gradients(model, make_batch(), graph))
    with pytest.raises((ValueError, TypeError)):
        optimizer.update(model, grads)
    chex.assert_trees_all_equal(nnx_arrays(model), before)
