"""Trains a ball around one center, as Deep SVDD does, to detect attacks that the training has not seen.

The digits 0 to 2 are genuine, 3 to 6 are the attacks of the training, and 7 to 9 are attacks that appear in the test
alone. Genuine features are pulled into a ball around one center, and the others are pushed out of a larger ball.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

import centerloss_jax as clj

RADIUS = 0.5


@partial(jax.jit, donate_argnums=0)
def train_step(state, images, genuine):
    def loss_fn(params):
        x = state.apply_fn({'params': params}, images)
        labels = jnp.zeros(len(x), int)  # all examples belong to the one center
        squared = clj.center_loss(x, state.params['centers'], labels, reduce_fn=None)
        rows = clj.center_rows(x, state.params['centers'], labels, where=genuine)  # attacks do not move the center
        pull, push = jnp.maximum(squared - RADIUS**2, 0), jnp.maximum((2 * RADIUS) ** 2 - squared, 0)
        return jnp.where(genuine, pull, push).mean(), rows

    (loss, rows), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params['params'])
    return state.apply_gradients(grads={'params': grads, 'centers': rows}), loss


def auroc(features, center):
    """Returns how well the distance to the center separates the attacks of the test from its genuine images."""
    known_attack = (test_digits >= 3) & (test_digits <= 6)
    distances = jnp.linalg.norm(features - center, axis=-1)
    return roc_auc_score(test_digits[~known_attack] > 6, distances[~known_attack])


images, digits = load_digits(return_X_y=True)
images, test_images, digits, test_digits = images[400:] / 16, images[:400] / 16, digits[400:], digits[:400]
images, digits = images[digits < 7], digits[digits < 7]
genuine = digits < 3
aurocs = {'pixels': auroc(test_images, images[genuine].mean(axis=0))}
# Without biases a network cannot map all images to the center.
model = nn.Sequential([nn.Dense(128, use_bias=False), nn.leaky_relu, nn.Dense(16, use_bias=False)])
for name, alpha in {'a fixed center': 0.0, 'a moving center': 0.5}.items():
    features, variables = model.init_with_output(jax.random.key(0), images)
    params = {**variables, 'centers': features[genuine].mean(axis=0, keepdims=True)}  # [1, 16]
    tx = clj.with_centers(optax.adam(1e-3), alpha=alpha)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    rng = np.random.default_rng(0)
    for step in range(1, 201):
        batch = rng.integers(0, len(images), 128)
        state, loss = train_step(state, images[batch], genuine[batch])
        if step % 100 == 0:
            step_norm = optax.tree.get(state.opt_state, 'step_norm')
            print(f'{name}, step {step}: loss {loss:.4f}, step norm {step_norm:.4f}')
    aurocs[name] = auroc(state.apply_fn({'params': state.params['params']}, test_images), state.params['centers'])
for name, value in aurocs.items():
    print(f'{name}: AUROC of unseen attacks {value:.3f}')
