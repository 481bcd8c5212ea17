"""Accumulates gradients and rows over micro-batches, so that a step equals one step with the whole batch.

`clj.with_centers(optax.MultiSteps(optax.adam(3e-3), 4))` accumulates too, over four calls of an ordinary step. There
the centers move at each call.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits

import centerloss_jax as clj


class Model(nn.Module):
    @nn.compact
    def __call__(self, images, labels=None):
        features = nn.Dense(32)(nn.relu(nn.Dense(128)(images)))
        logits = nn.Dense(10, use_bias=False)(features)
        if labels is None:
            return logits
        return logits, *clj.linen.CenterLoss(10, name='center')(features, labels)


@partial(jax.jit, donate_argnums=0)
def train_step(state, images, labels):  # [micro-batches, examples, pixels] and [micro-batches, examples]
    def loss_fn(params, images, labels):
        variables = {'params': params, 'centers': state.params['centers']}
        logits, center, rows = state.apply_fn(variables, images, labels)
        softmax = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return softmax + 0.1 * center, rows

    def micro_step(total, batch):
        (loss, rows), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params['params'], *batch)
        return jax.tree.map(jnp.add, total, grads), (loss, rows)

    zeros = jax.tree.map(jnp.zeros_like, state.params['params'])
    total, (losses, rows) = jax.lax.scan(micro_step, zeros, (images, labels))
    grads = jax.tree.map(lambda leaf: leaf / len(images), total)
    rows = clj.concatenate_rows(rows)  # rows are joined and never added
    return state.apply_gradients(grads={'params': grads, 'centers': {'center': {'centers': rows}}}), losses.mean()


images, labels = load_digits(return_X_y=True)
images, test_images, labels, test_labels = images[400:] / 16, images[:400] / 16, labels[400:], labels[:400]
model = Model()
tx = clj.with_centers(optax.adam(3e-3))
create = partial(TrainState.create, apply_fn=model.apply, tx=tx)
whole = create(params=model.init(jax.random.key(0), images, labels))
parts = create(params=model.init(jax.random.key(0), images, labels))
rng = np.random.default_rng(0)
for step in range(1, 201):
    batch = rng.integers(0, len(images), 128)
    whole, _ = train_step(whole, images[batch][None], labels[batch][None])
    parts, loss = train_step(parts, images[batch].reshape(4, 32, 64), labels[batch].reshape(4, 32))
    if step in (1, 100, 200):
        distance = optax.tree.norm(optax.tree.sub(whole.params, parts.params)) / optax.tree.norm(whole.params)
        print(f'step {step}: loss {loss:.3f}, relative distance to steps with the whole batch {distance:.1e}')
accuracy = (parts.apply_fn({'params': parts.params['params']}, test_images).argmax(-1) == test_labels).mean()
print(f'test accuracy {accuracy:.3f}')
