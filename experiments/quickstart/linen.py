"""Trains a small network with softmax and center loss, in Flax Linen."""

from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

import centerloss_jax as clj


class Model(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, images, labels=None):
        features = nn.Dense(2)(nn.relu(nn.Dense(64)(images)))
        logits = nn.Dense(self.num_classes, use_bias=False)(features)
        if labels is None:  # inference uses no labels and no centers
            return logits
        center, rows = clj.linen.CenterLoss(self.num_classes, name='center')(features, labels)
        return logits, center, rows


model = Model(num_classes=10)
images, labels = jax.random.normal(jax.random.key(0), (128, 32)), jnp.arange(128) % 10
variables = model.init(jax.random.key(1), images, labels)  # collections 'params' and 'centers'
tx = clj.with_centers(optax.adam(1e-3), alpha=0.5)
state = TrainState.create(apply_fn=model.apply, params=variables, tx=tx)


@partial(jax.jit, donate_argnums=0)  # donation lets XLA update the centers in place
def train_step(state, images, labels, center_weight):
    def loss_fn(params):
        variables = {'params': params, 'centers': state.params['centers']}
        logits, center, rows = state.apply_fn(variables, images, labels)
        softmax = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return softmax + center_weight * center, rows

    (loss, rows), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params['params'])
    grads = {'params': grads, 'centers': {'center': {'centers': rows}}}  # rows in place of a gradient
    return state.apply_gradients(grads=grads), loss


for _ in range(3):
    state, loss = train_step(state, images, labels, 0.1)
    # A step norm of 0 means that the centers do not move.
    print(f'loss {loss:.3f}, step norm {optax.tree.get(state.opt_state, "step_norm"):.3f}')
logits = model.apply({'params': state.params['params']}, images)
