"""Trains a linear network with softmax and center loss on all devices, by jax.pmap.

The step gives the result of one device with the whole batch, also where devices have different numbers of labelled
examples. It needs `axis_name` in the loss, `axis_name` in `with_centers`, and `pmean` of the loss inside the
differentiated function and of the gradients after it. Rows are never reduced.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import jax_utils

import centerloss_jax as clj


def apply(params, images):
    features = images @ params['features']
    return features, features @ params['logits']


k1, k2 = jax.random.split(jax.random.key(1))
params = {'features': jax.random.normal(k1, (32, 2)) / 6, 'logits': jax.random.normal(k2, (2, 10))}
state = {'params': params, 'centers': jnp.zeros((10, 2))}
tx = clj.with_centers(optax.sgd(0.1), axis_name='batch')
state, opt_state = jax_utils.replicate((state, tx.init(state)), axis_name='batch')  # as below: compiles once


@partial(jax.pmap, axis_name='batch', donate_argnums=(0, 1))
def train_step(state, opt_state, images, labels):
    counted = labels >= 0
    count = jax.lax.pmean(counted.sum(), 'batch')

    def loss_fn(params):
        features, logits = apply(params, images)
        center, rows = clj.center_loss_and_rows(features, state['centers'], labels, axis_name='batch')
        each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        softmax = jnp.where(counted, each, 0).sum() / count
        return jax.lax.pmean(softmax + 0.1 * center, 'batch'), rows

    (loss, rows), grads = jax.value_and_grad(loss_fn, has_aux=True)(state['params'])
    grads = jax.lax.pmean(grads, 'batch')
    updates, opt_state = tx.update({'params': grads, 'centers': rows}, opt_state, state)
    return optax.apply_updates(state, updates), opt_state, loss


devices = jax.local_device_count()
images = np.random.default_rng(0).normal(size=(devices, 16, 32)).astype(np.float32)
labels = np.arange(devices * 16).reshape(devices, 16) % 10
labels[-1, 8:] = -1  # the label -1 marks the padding of a short batch
for _ in range(3):
    state, opt_state, loss = train_step(state, opt_state, images, labels)
    print(f'loss {loss[0]:.3f}, step norm {optax.tree.get(opt_state, "step_norm")[0]:.3f}')

# Without axis_name in with_centers the replicas diverge, and pmap raises no error. This check finds it.
clj.check_replicas((state, opt_state), stacked=True)  # stacked: the first axis of each array is the device axis
