"""Trains features towards fixed anchors, one for each known class, and rejects unknown classes by their distance.

The digits 0 to 6 are known; 7 to 9 appear in the test alone. The anchors are either scaled one-hot vectors, as in class
anchor clustering, or a simplex equiangular tight frame. With alpha = 0 the centers stay where they are.
"""

from functools import partial

import jax
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

import centerloss_jax as clj

C, D, SCALE = 7, 32, 3.0


def simplex(num_classes, num_features):
    """Returns unit vectors `[C, D]`, C <= D, with the equal inner products -1 / (C - 1)."""
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(num_features, num_classes)))
    return np.sqrt(num_classes / (num_classes - 1)) * (np.eye(num_classes) - 1 / num_classes) @ basis.T


class Model(nn.Module):
    anchors: np.ndarray

    @nn.compact
    def __call__(self, images, labels=None):
        features = nn.Dense(self.anchors.shape[1])(nn.relu(nn.Dense(128)(images)))
        if labels is None:
            return features
        center = clj.linen.CenterLoss(
            C, centers_init=lambda key, shape, dtype: self.anchors.astype(dtype), name='center'
        )
        return center(features, labels)


@partial(jax.jit, donate_argnums=0)
def train_step(state, images, labels):
    def loss_fn(params):
        return state.apply_fn({'params': params, 'centers': state.params['centers']}, images, labels)

    (loss, rows), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params['params'])
    return state.apply_gradients(grads={'params': grads, 'centers': {'center': {'centers': rows}}}), loss


images, labels = load_digits(return_X_y=True)
images, test_images, labels, test_labels = images[400:] / 16, images[:400] / 16, labels[400:], labels[:400]
images, labels = images[labels < C], labels[labels < C]
known = test_labels < C
results = {}
for name, anchors in {'one-hot': SCALE * np.eye(C), 'simplex': SCALE * simplex(C, D)}.items():
    model = Model(anchors)
    params = model.init(jax.random.key(0), images, labels)
    tx = clj.with_centers(optax.adam(1e-3), alpha=0.0)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    rng = np.random.default_rng(0)
    for step in range(1, 301):
        batch = rng.integers(0, len(images), 128)
        state, loss = train_step(state, images[batch], labels[batch])
        if step % 100 == 0:
            print(f'{name}, step {step}: loss {loss:.3f}')
    nearest, squared = clj.nearest_center(state.apply_fn({'params': state.params['params']}, test_images), anchors)
    accuracy = (nearest == test_labels)[known].mean()
    rejected = (squared > np.quantile(squared[known], 0.95))[~known].mean()
    results[name] = auroc = roc_auc_score(~known, squared)
    print(f'{name}: accuracy of known classes {accuracy:.3f}, AUROC of unknown classes {auroc:.3f}')
    print(f'{name}: the distance that accepts 95% of the known images rejects {rejected:.0%} of the unknown ones')
