"""Trains a network with a sampled margin softmax and center loss under jax.jit, with both tables sharded by rows.

Two tables and the momentum of one grow with the number of classes, and each device has its part of them. Time, traffic
and temporaries grow with the batch and the sample. So C can be 10,000,000 where the devices have the memory.
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import centerloss_jax as clj

C, D, B = 10_007, 32, 128
S = 2 * B * jax.device_count()  # the sampled classes; the share of each device holds the classes of the batch
mesh = jax.make_mesh((jax.device_count(),), ('classes',), axis_types=(AxisType.Auto,))
by_row = NamedSharding(mesh, PartitionSpec('classes'))
replicated = NamedSharding(mesh, PartitionSpec())
network = nn.Sequential([nn.Dense(256), nn.relu, nn.Dense(D)])


@partial(jax.jit, out_shardings=by_row)
def make_table(key, scale):
    """Returns a table that no device holds whole. Rows of Inf pad it to a number that the devices divide."""
    num_rows = C + -C % jax.device_count()
    rows = scale * jax.random.normal(key, (num_rows, D))
    return jnp.where(jnp.arange(num_rows)[:, None] < C, rows, jnp.inf)


@partial(jax.jit, donate_argnums=0)  # donation lets each device update its rows in place
def train_step(state, images, labels, key):
    tables = {name: state.params[name] for name in ('classifier', 'centers')}
    classes = clj.sample_classes(key, labels, C, S, class_axis='classes', mesh=mesh)
    softmax_and_rows = partial(
        clj.margin_softmax_and_rows, scale=16.0, classes=classes, num_classes=C, class_axis='classes', mesh=mesh
    )

    def loss_fn(params):
        features = state.apply_fn({'params': params}, images)
        softmax, rows = softmax_and_rows(features, tables['classifier'], labels)
        # The softmax sees the directions of the features alone, and so does the center loss.
        directions = features / jnp.linalg.norm(features, axis=1, keepdims=True)
        center, moves = clj.center_loss_and_rows(directions, tables['centers'], labels)
        return softmax + 0.1 * center, {'classifier': rows, 'centers': moves}

    (loss, rows), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params['params'])
    return state.apply_gradients(grads={'params': grads, **rows}), loss


@partial(jax.jit, static_argnums=0, out_shardings=(replicated, replicated))
def make_batch(size, key):
    """Returns images of random classes, each the vector of its class with noise."""
    key_of_labels, key_of_noise = jax.random.split(key)
    labels = jax.random.randint(key_of_labels, (size,), 0, C)
    shown = jax.vmap(lambda label: jax.random.normal(jax.random.fold_in(jax.random.key(0), label), (64,)))(labels)
    return shown + 0.1 * jax.random.normal(key_of_noise, shown.shape), labels


keys = jax.random.split(jax.random.key(1), 3)
params = {
    'params': jax.device_put(network.init(keys[0], jnp.zeros((1, 64)))['params'], replicated),
    'classifier': make_table(keys[1], 0.01),
    'centers': make_table(keys[2], 0.0),
}
classifier = clj.by_rows(optax.sgd(0.1, momentum=0.9), mesh=mesh)
tx = clj.with_centers(optax.adam(1e-3), alpha=0.5, classifier=classifier, mesh=mesh)
# Under jax.jit the momentum is laid out as the table.
state = jax.jit(partial(TrainState.create, apply_fn=network.apply, tx=tx))(params=params)

images, labels = make_batch(B, jax.random.key(2))
for key in jax.random.split(jax.random.key(3), 5):
    state, loss = train_step(state, images, labels, key)
    print(f'loss {loss:.3f}, step norm {optax.tree.get(state.opt_state, "step_norm"):.3f}')

tables = {name: state.params[name] for name in ('classifier', 'centers')}
tables['momentum'] = optax.tree.get(state.opt_state, 'trace')['classifier']
assert all(table.sharding.is_equivalent_to(by_row, 2) for table in tables.values())
# Saved without padding, tables and momentum can be restored on any number of devices.
saved = {name: clj.unshard_centers(table, num_classes=C) for name, table in tables.items()}
assert all(table.shape == (C, D) for table in saved.values())
