"""Trains a linear network with softmax and center loss, with JAX and optax alone."""

from functools import partial

import jax
import jax.numpy as jnp
import optax

import centerloss_jax as clj


def apply(params, images):
    features = images @ params['features']
    return features, features @ params['logits']


images, labels = jax.random.normal(jax.random.key(0), (128, 32)), jnp.arange(128) % 10
clj.check_labels(labels, num_classes=10)  # a label of 10 or more is an error here and a NaN in jit
k1, k2 = jax.random.split(jax.random.key(1))
params = {'features': jax.random.normal(k1, (32, 2)) / 6, 'logits': jax.random.normal(k2, (2, 10))}
state = {'params': params, 'centers': jnp.zeros((10, 2))}
tx = clj.with_centers(optax.sgd(0.1), alpha=0.5)
opt_state = tx.init(state)


@partial(jax.jit, donate_argnums=(0, 1))
def train_step(state, opt_state, images, labels):
    def loss_fn(params):
        features, logits = apply(params, images)
        center, rows = clj.center_loss_and_rows(features, state['centers'], labels)
        softmax = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return softmax + 0.1 * center, rows

    (loss, rows), grads = jax.value_and_grad(loss_fn, has_aux=True)(state['params'])
    updates, opt_state = tx.update({'params': grads, 'centers': rows}, opt_state, state)
    return optax.apply_updates(state, updates), opt_state, loss


for _ in range(3):
    state, opt_state, loss = train_step(state, opt_state, images, labels)
    print(f'loss {loss:.3f}, step norm {optax.tree.get(opt_state, "step_norm"):.3f}')
nearest, squared_distance = clj.nearest_center(apply(state['params'], images)[0], state['centers'])
