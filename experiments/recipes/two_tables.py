"""Trains one network with two tables of centers, one for the digit and one for its parity, at their own alphas."""

from functools import partial

import jax
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits

import centerloss_jax as clj


class Model(nn.Module):
    @nn.compact
    def __call__(self, images, labels=None):
        hidden = nn.relu(nn.Dense(128)(images))
        by_digit, by_parity = nn.Dense(16)(hidden), nn.Dense(4)(hidden)
        logits = nn.Dense(10, use_bias=False)(by_digit), nn.Dense(2, use_bias=False)(by_parity)
        if labels is None:
            return by_digit, by_parity
        digits, parities = labels
        digit_loss, digit_rows = clj.linen.CenterLoss(10, name='digit')(by_digit, digits)
        parity_loss, parity_rows = clj.linen.CenterLoss(2, name='parity')(by_parity, parities)
        rows = {'digit': {'centers': digit_rows}, 'parity': {'centers': parity_rows}}
        return logits, digit_loss + parity_loss, rows


images, digits = load_digits(return_X_y=True)
images, parities = images / 16, digits % 2
model = Model()
variables = model.init(jax.random.key(0), images, (digits, parities))
# with_centers moves all tables of a model at one alpha, and its step norm is of all moves together.
tx = optax.partition(
    {'params': optax.adam(3e-3), 'digit': clj.center_update(alpha=0.5), 'parity': clj.center_update(alpha=0.1)},
    {'params': 'params', 'centers': {'digit': 'digit', 'parity': 'parity'}},
)
state = TrainState.create(apply_fn=model.apply, params=variables, tx=tx)


@partial(jax.jit, donate_argnums=0)
def train_step(state, images, labels):
    def loss_fn(params):
        variables = {'params': params, 'centers': state.params['centers']}
        logits, center, rows = state.apply_fn(variables, images, labels)
        by_digit, by_parity = map(optax.softmax_cross_entropy_with_integer_labels, logits, labels)
        return (by_digit + by_parity).mean() + 0.1 * center, rows

    (loss, rows), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params['params'])
    return state.apply_gradients(grads={'params': grads, 'centers': rows}), loss


held_out = 400
rng = np.random.default_rng(0)
for step in range(1, 301):
    batch = rng.integers(held_out, len(images), 128)
    state, loss = train_step(state, images[batch], (digits[batch], parities[batch]))
    if step % 100 == 0:
        norms = optax.tree.get_all_with_path(state.opt_state, 'step_norm')
        moves = ', '.join(f'{jax.tree_util.keystr(path[1:2], simple=True)} {norm:.3f}' for path, norm in norms)
        print(f'step {step}: loss {loss:.3f}, step norms: {moves}')
features = state.apply_fn({'params': state.params['params']}, images[:held_out])
tables = jax.tree.leaves(state.params['centers'])
accuracies = []
for x, centers, labels in zip(features, tables, (digits, parities), strict=True):
    nearest, _ = clj.nearest_center(x, centers)
    accuracies.append((nearest == labels[:held_out]).mean())
print('test accuracy of the nearest center: digit {:.3f}, parity {:.3f}'.format(*accuracies))
