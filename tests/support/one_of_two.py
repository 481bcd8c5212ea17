"""One of two processes with two devices each: `python one_of_two.py PORT PROCESS_ID OUT`."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import centerloss_jax as clj

B, D, C = 16, 3, 10


def arrays():
    rng = np.random.default_rng(0)
    images, labels = rng.normal(size=(B, 6)).astype(np.float32), rng.integers(0, C, B).astype(np.int32)
    labels[[1, 9, 13]], labels[4:8] = 3, -1  # one class in both processes, and a device without examples
    model = {
        'params': {'features': rng.normal(size=(6, D)).astype(np.float32)},
        'centers': rng.normal(size=(C, D)).astype(np.float32),
    }
    return model, images, labels


def train(model, images, labels, mesh=None):
    """Model and losses after three steps."""
    tx = clj.with_centers(optax.sgd(0.1), mesh=mesh)
    state, losses = tx.init(model), []

    @partial(jax.jit, donate_argnums=0)
    def step(model, state, images, labels):
        def loss_fn(params):
            return clj.center_loss_and_rows(images @ params['features'], model['centers'], labels)

        (loss, rows), grads = jax.value_and_grad(loss_fn, has_aux=True)(model['params'])
        updates, state = tx.update({'params': grads, 'centers': rows}, state, model)
        return optax.apply_updates(model, updates), state, loss

    for _ in range(3):
        model, state, loss = step(model, state, images, labels)
        losses.append(loss)
    return model, losses


def main(port: str, index: int, out: str) -> None:
    jax.config.update('jax_num_cpu_devices', 2)
    jax.distributed.initialize(f'localhost:{port}', 2, index)
    model, images, labels = arrays()
    mesh = Mesh(np.array(jax.devices()), ('all',), axis_types=(AxisType.Auto,))
    by_rows, everywhere = NamedSharding(mesh, P('all', None)), NamedSharding(mesh, P())
    own = slice(index * B // 2, (index + 1) * B // 2)
    place = partial(jax.make_array_from_process_local_data, NamedSharding(mesh, P('all')))
    model = {
        'params': jax.device_put(model['params'], everywhere),
        'centers': clj.shard_centers(model['centers'], by_rows),
    }
    model, losses = train(model, place(images[own]), place(labels[own]), mesh)

    clj.check_replicas(model)
    clj.check_replicas(jnp.ones((2, 4)), stacked=True)
    try:
        clj.check_replicas({'drifted': jnp.full((2, 4), float(index))}, stacked=True)
    except ValueError as error:
        print(error)
    centers = clj.unshard_centers(model['centers'], C)
    if index == 0:
        features = jax.device_get(model['params']['features'])
        np.savez(out, centers=centers, features=features, losses=jax.device_get(losses))


if __name__ == '__main__':
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
