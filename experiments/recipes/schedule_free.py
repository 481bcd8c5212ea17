"""Trains with schedule-free Adam inside `with_centers`, and evaluates the averaged parameters."""

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
        features = nn.Dense(32)(nn.relu(nn.Dense(128)(images)))
        logits = nn.Dense(10, use_bias=False)(features)
        if labels is None:
            return features, logits
        return logits, *clj.linen.CenterLoss(10, name='center')(features, labels)


images, labels = load_digits(return_X_y=True)
images, test_images, labels, test_labels = images[400:] / 16, images[:400] / 16, labels[400:], labels[:400]
model = Model()
variables = model.init(jax.random.key(0), images, labels)
tx = clj.with_centers(optax.contrib.schedule_free_adamw(1e-2, warmup_steps=20))
state = TrainState.create(apply_fn=model.apply, params=variables, tx=tx)


@partial(jax.jit, donate_argnums=0)
def train_step(state, images, labels):
    def loss_fn(params):
        variables = {'params': params, 'centers': state.params['centers']}
        logits, center, rows = state.apply_fn(variables, images, labels)
        softmax = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return softmax + 0.1 * center, rows

    (loss, rows), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params['params'])
    grads = {'params': grads, 'centers': {'center': {'centers': rows}}}
    return state.apply_gradients(grads=grads), loss


def averaged(state):
    """Returns the parameters to evaluate. The optimizer inside `with_centers` has a masked node for the centers."""
    inside = {'params': state.params['params'], 'centers': optax.MaskedNode()}
    schedule_free_state = optax.tree.get(state.opt_state, 'ScheduleFreeState')
    return optax.tree.get(optax.contrib.schedule_free_eval_params(schedule_free_state, inside), 'params')


rng = np.random.default_rng(0)
for step in range(1, 301):
    batch = rng.integers(0, len(images), 128)
    state, loss = train_step(state, images[batch], labels[batch])
    if step % 100 == 0:
        step_norm = optax.tree.get(state.opt_state, 'step_norm')
        print(f'step {step}: loss {loss:.3f}, step norm {step_norm:.3f}')
        for name, params in (('last', state.params['params']), ('averaged', averaged(state))):
            features, logits = state.apply_fn({'params': params}, test_images)
            ratio = clj.class_statistics(features, test_labels, num_classes=10).ratio
            print(
                f'{name} parameters: test accuracy {(logits.argmax(-1) == test_labels).mean():.3f}, ratio {ratio:.3f}'
            )
