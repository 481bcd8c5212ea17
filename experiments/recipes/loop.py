"""Trains with a schedule for the center weight, clipped gradients, averaged parameters, logs and checkpoints.

The last epochs resume on one device. `JAX_NUM_CPU_DEVICES=8` makes eight devices of a CPU.
"""

import math
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen as nn
from flax.training import train_state
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

import centerloss_jax as clj

center_weight = optax.linear_schedule(0.0, 0.1, transition_steps=60)


class Model(nn.Module):
    @nn.compact
    def __call__(self, images, labels=None):
        features = nn.Dense(32)(nn.relu(nn.Dense(128)(images)))
        logits = nn.Dense(10, use_bias=False)(features)
        if labels is None:
            return features, logits
        return logits, *clj.linen.CenterLoss(10, name='center')(features, labels)


class TrainState(train_state.TrainState):
    average: Any  # exponential moving average of the parameters


@partial(jax.jit, donate_argnums=0)
def train_step(state, images, labels):
    def loss_fn(params):
        logits, center, rows = state.apply_fn({**state.params, 'params': params}, images, labels)
        softmax = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return softmax + center_weight(state.step) * center, rows

    (loss, rows), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params['params'])
    state = state.apply_gradients(grads={'params': grads, 'centers': {'center': {'centers': rows}}})
    average = optax.incremental_update(state.params['params'], state.average, step_size=0.05)
    return state.replace(average=average), loss


def train(folder, num_devices, steps):
    """Trains up to this number of steps, from the last checkpoint in the folder if there is one."""
    mesh = Mesh(np.array(jax.devices()[:num_devices]), ('data',))
    replicated, by_example = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec('data'))
    params = Model().init(jax.random.key(0), images, labels)
    tx = clj.with_centers(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-3)), mesh=mesh)
    average = jax.tree.map(np.copy, params['params'])  # a copy, because the step donates its state
    state = jax.device_put(TrainState.create(apply_fn=Model().apply, params=params, tx=tx, average=average), replicated)
    with ocp.CheckpointManager(folder) as checkpoints:
        if checkpoints.latest_step() is not None:  # `state` gives the layout, whatever devices saved it
            state = checkpoints.restore(checkpoints.latest_step(), args=ocp.args.StandardRestore(state))
        for step in range(int(state.step) + 1, steps + 1):
            batch = np.random.default_rng(step).integers(0, len(images), 128)  # the same after a restart
            state, loss = train_step(state, *jax.device_put((images[batch], labels[batch]), by_example))
            if step % 20 == 0:
                checkpoints.save(step, args=ocp.args.StandardSave(state))
                features, logits = state.apply_fn({'params': state.average}, test_images)
                log = {'loss': loss, 'test accuracy': (logits.argmax(-1) == test_labels).mean()}
                log['ratio'] = clj.class_statistics(features, test_labels, num_classes=10).ratio
                log |= {name: optax.tree.get(state.opt_state, name) for name in ('step_norm', 'dropped')}
                print(f'step {step}, {num_devices} devices:', ', '.join(f'{name} {log[name]:.3g}' for name in log))


images, labels = load_digits(return_X_y=True)
images, test_images, labels, test_labels = images[400:] / 16, images[:400] / 16, labels[400:], labels[:400]
with TemporaryDirectory() as folder:
    train(folder, num_devices=math.gcd(128, jax.device_count()), steps=120)
    train(folder, num_devices=1, steps=160)
