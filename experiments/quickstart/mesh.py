"""Trains a linear network with softmax and center loss under jax.jit on a mesh, with the centers sharded by rows.

The step is the step for one device, without an `axis_name`. The script trains on Auto axes, on Explicit axes and on one
device, and checks that the centers agree.
"""

import math
from functools import partial

import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import centerloss_jax as clj


def apply(params, images):
    features = images @ params['features']
    return features, features @ params['logits']


def make_step(tx):
    @partial(jax.jit, donate_argnums=(0, 1))  # donation lets each device update its shard in place
    def train_step(state, opt_state, images, labels):
        def loss_fn(params):
            features, logits = apply(params, images)
            center, rows = clj.center_loss_and_rows(features, state['centers'], labels)
            # On Explicit axes JAX 0.12 cannot differentiate optax's loss for integer labels.
            softmax = optax.softmax_cross_entropy(logits, jax.nn.one_hot(labels, 10)).mean()
            return softmax + 0.1 * center, rows

        (loss, rows), grads = jax.value_and_grad(loss_fn, has_aux=True)(state['params'])
        updates, opt_state = tx.update({'params': grads, 'centers': rows}, opt_state, state)
        return optax.apply_updates(state, updates), opt_state, loss

    return train_step


def train(params, centers, images, labels, shape, axis_type):
    """Returns the centers [10, 2] as a NumPy array after three steps on a mesh of this shape, (data, classes)."""
    devices = jax.devices()[: math.prod(shape)]
    mesh = jax.make_mesh(shape, ('data', 'classes'), axis_types=(axis_type,) * 2, devices=devices)
    replicated, by_example = NamedSharding(mesh, P()), NamedSharding(mesh, P(('data', 'classes')))
    table = clj.shard_centers(centers, NamedSharding(mesh, P('classes', None)))  # padded to 12 rows on 4 devices
    state = {'params': jax.device_put(params, replicated), 'centers': table}
    tx = clj.with_centers(optax.sgd(0.1), alpha=0.5, mesh=mesh)  # only Auto axes need mesh=
    opt_state = jax.device_put(tx.init(state), replicated)
    images, labels = jax.device_put((images, labels), by_example)
    train_step = make_step(tx)
    for _ in range(3):
        state, opt_state, loss = train_step(state, opt_state, images, labels)
        print(f'loss {loss:.3f}, step norm {optax.tree.get(opt_state, "step_norm"):.3f}')
    return clj.unshard_centers(state['centers'], num_classes=10)


k1, k2 = jax.random.split(jax.random.key(1))
params = {'features': jax.random.normal(k1, (32, 2)) / 6, 'logits': jax.random.normal(k2, (2, 10))}
params = jax.device_get(params)
images = np.random.default_rng(0).normal(size=(128, 32)).astype(np.float32)
centers, labels = np.zeros((10, 2), np.float32), np.arange(128) % 10

classes = math.gcd(4, jax.device_count())
shape = jax.device_count() // classes, classes
auto = train(params, centers, images, labels, shape, AxisType.Auto)
explicit = train(params, centers, images, labels, shape, AxisType.Explicit)
one_device = train(params, centers, images, labels, (1, 1), AxisType.Auto)
np.testing.assert_allclose(auto, one_device, atol=1e-6)
np.testing.assert_allclose(explicit, one_device, atol=1e-6)

# Centers from one mesh can be restored on any other mesh.
train(params, auto, images, labels, (1, 1), AxisType.Explicit)
