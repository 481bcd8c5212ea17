"""Trains a Flax Linen network with BatchNorm, softmax and center loss.

`batch_stats` is a field of the train state. In `apply`, `batch_stats` is mutable and the centers are not.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training import train_state

import centerloss_jax as clj


class Model(nn.Module):
    @nn.compact
    def __call__(self, images, labels=None):
        x = nn.BatchNorm(use_running_average=labels is None)(nn.Dense(64)(images))
        features = nn.Dense(2)(nn.relu(x))
        logits = nn.Dense(10, use_bias=False)(features)
        if labels is None:
            return logits
        return logits, *clj.linen.CenterLoss(10, name='center')(features, labels)


class TrainState(train_state.TrainState):
    batch_stats: Any


model = Model()
images, labels = jax.random.normal(jax.random.key(0), (128, 32)), jnp.arange(128) % 10
variables = model.init(jax.random.key(1), images, labels)
state = TrainState.create(
    apply_fn=model.apply,
    params={'params': variables['params'], 'centers': variables['centers']},
    tx=clj.with_centers(optax.adam(1e-3)),
    batch_stats=variables['batch_stats'],
)


@partial(jax.jit, donate_argnums=0)
def train_step(state, images, labels):
    def loss_fn(params):
        variables = {'params': params, 'centers': state.params['centers'], 'batch_stats': state.batch_stats}
        (logits, center, rows), changed = state.apply_fn(variables, images, labels, mutable=['batch_stats'])
        softmax = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return softmax + 0.1 * center, (rows, changed['batch_stats'])

    (loss, (rows, batch_stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params['params'])
    grads = {'params': grads, 'centers': {'center': {'centers': rows}}}  # rows in place of a gradient
    return state.apply_gradients(grads=grads, batch_stats=batch_stats), loss


for _ in range(3):
    state, loss = train_step(state, images, labels)
    print(f'loss {loss:.3f}, step norm {optax.tree.get(state.opt_state, "step_norm"):.3f}')
logits = model.apply({'params': state.params['params'], 'batch_stats': state.batch_stats}, images)
