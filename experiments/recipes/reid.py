"""Trains with triplet, softmax and center loss, as the strong baseline of person re-identification does.

The triplet and the center loss take the features before the BNNeck, the classifier and the retrieval those behind it.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training import train_state
from sklearn.datasets import load_digits

import centerloss_jax as clj


class Model(nn.Module):
    @nn.compact
    def __call__(self, images, labels=None):
        features = nn.Dense(64)(nn.relu(nn.Dense(256)(images)))
        neck = nn.BatchNorm(use_running_average=labels is None, use_bias=False)(features)
        if labels is None:
            return neck
        logits = nn.Dense(10, use_bias=False)(neck)
        return features, logits, *clj.linen.CenterLoss(10, name='center')(features, labels)


class TrainState(train_state.TrainState):
    batch_stats: dict


def batch_hard_triplet(x, labels, margin=0.3):
    """Returns the mean of the largest distance within a class minus the smallest between classes, plus the margin."""
    distances = jnp.sqrt(jnp.maximum(jnp.square(x[:, None] - x).sum(axis=-1), 1e-12))
    same = labels[:, None] == labels
    positive, negative = jnp.where(same, distances, 0).max(axis=1), jnp.where(same, jnp.inf, distances).min(axis=1)
    return nn.relu(positive - negative + margin).mean()


@partial(jax.jit, donate_argnums=0)
def train_step(state, images, labels):
    def loss_fn(params):
        variables = {'params': params, 'centers': state.params['centers'], 'batch_stats': state.batch_stats}
        (x, logits, center, rows), changed = state.apply_fn(variables, images, labels, mutable=['batch_stats'])
        softmax = optax.softmax_cross_entropy(logits, optax.smooth_labels(jax.nn.one_hot(labels, 10), 0.1)).mean()
        return softmax + batch_hard_triplet(x, labels) + 0.0005 * center, (rows, changed['batch_stats'])

    (loss, (rows, stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params['params'])
    grads = {'params': grads, 'centers': {'center': {'centers': rows}}}
    return state.apply_gradients(grads=grads, batch_stats=stats), loss


def retrieval(x):
    """Returns rank-1 and mAP, by cosine similarity, of each test image among all others."""
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    nearest = np.argsort(2 * np.eye(len(x)) - x @ x.T, axis=1)[:, :-1]  # without the image itself, which comes last
    hits = test_labels[nearest] == test_labels[:, None]
    precision = hits.cumsum(axis=1) / np.arange(1, len(x))
    return hits[:, 0].mean(), ((precision * hits).sum(axis=1) / hits.sum(axis=1)).mean()


images, labels = load_digits(return_X_y=True)
images, test_images, labels, test_labels = images[400:] / 16, images[:400] / 16, labels[400:], labels[:400]
variables = Model().init(jax.random.key(0), images, labels)
stats, params = variables['batch_stats'], {name: variables[name] for name in ('params', 'centers')}
P, K = 8, 8  # classes of a batch, and images of each class
# Equals SGD of rate r = 0.5 on the centers: alpha = 2 r (1 + n) / B, with n = K and B = P K.
tx = clj.with_centers(optax.adam(optax.linear_schedule(3.5e-5, 3.5e-4, 100)), alpha=2 * 0.5 * (1 + K) / (P * K))
state = TrainState.create(apply_fn=Model().apply, params=params, tx=tx, batch_stats=stats)
print('pixels: rank-1 {:.3f}, mAP {:.3f}'.format(*retrieval(test_images)))
rng = np.random.default_rng(0)
for step in range(1, 601):
    batch = np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:K] for c in rng.permutation(10)[:P]])
    state, loss = train_step(state, images[batch], labels[batch])
    if step % 200 == 0:
        x = state.apply_fn({'params': state.params['params'], 'batch_stats': state.batch_stats}, test_images)
        print('step {}: loss {:.3f}, rank-1 {:.3f}, mAP {:.3f}'.format(step, loss, *retrieval(np.asarray(x))))
