"""Trains an embedding by rows: an image is the sum of the embeddings of its 64 pixels, each one of 17 grey values.

Then it times a step of Adam on a table of 100,000 rows, by rows and with a dense gradient, at several shares of rows.
"""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import centerloss_jax as clj


def bag_loss(model, taken, labels):
    """Returns the softmax loss of the sums of the taken embeddings [B, 64, D]."""
    logits = taken.sum(axis=1) @ model
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@partial(jax.jit, donate_argnums=(0, 1))
def train_step(params, state, tokens, labels):
    taken = params['table'][tokens]
    grads, gradient = jax.grad(bag_loss, argnums=(0, 1))(params['net'], taken, labels)
    rows = clj.RowUpdates(tokens.reshape(-1), gradient.reshape(-1, taken.shape[-1]), kind='gradient')
    updates, state = tx.update({'net': grads, 'table': rows}, state, params)
    return optax.apply_updates(params, updates), state


images, labels = load_digits(return_X_y=True)
tokens = (images + 17 * np.arange(64)).astype(np.int32)  # [N, 64], one of 17 grey values at each of 64 places
params = {'net': 0.1 * jax.random.normal(jax.random.key(0), (16, 10)), 'table': jnp.zeros((17 * 64, 16))}
tx = optax.partition(
    {'net': optax.adam(1e-2), 'table': clj.by_rows(optax.adam(1e-2))}, {'net': 'net', 'table': 'table'}
)
state = tx.init(params)
rng = np.random.default_rng(0)
for _ in range(100):
    batch = rng.integers(400, len(images), 128)
    params, state = train_step(params, state, tokens[batch], labels[batch])
predictions = np.argmax(params['table'][tokens[:400]].sum(axis=1) @ params['net'], axis=-1)
print(f'test accuracy {np.mean(predictions == labels[:400]):.3f}')


def square_loss(taken):
    return jnp.sum(jnp.square(taken - 1))


@partial(jax.jit, donate_argnums=(0, 1))
def rows_step(table, state, tokens):
    rows = clj.RowUpdates(tokens, jax.grad(square_loss)(table[tokens]), kind='gradient')
    updates, state = clj.by_rows(optax.adam(1e-3)).update(rows, state, table)
    return optax.apply_updates(table, updates), state


@partial(jax.jit, donate_argnums=(0, 1))
def dense_step(table, state, tokens):
    gradient = jax.grad(lambda table: square_loss(table[tokens]))(table)
    updates, state = optax.adam(1e-3).update(gradient, state, table)
    return optax.apply_updates(table, updates), state


for share in (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0):
    touched, times = rng.permutation(100_000)[: int(share * 100_000)], {rows_step: [], dense_step: []}
    steps = {rows_step: clj.by_rows(optax.adam(1e-3)), dense_step: optax.adam(1e-3)}
    carries = {step: (table := jnp.zeros((100_000, 128)), tx.init(table)) for step, tx in steps.items()}
    for _ in range(10):  # in turns, so that other load affects both alike
        for step in steps:
            start = time.perf_counter()
            carries[step] = jax.block_until_ready(step(*carries[step], touched))
            times[step].append(1000 * (time.perf_counter() - start))
    print(f'share {share}: {np.median(times[rows_step]):.1f} ms by rows, {np.median(times[dense_step]):.1f} ms dense')
