"""Keeps a trained backbone and trains a new head with centers on top, for classes that the backbone has not seen.

The optimizer inside `with_centers` gets the whole tree, with a masked node in the place of the centers. So a tree of
labels has both keys, and any label for the centers.
"""

from functools import partial

import jax
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits

import centerloss_jax as clj


class Model(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, images, labels=None):
        hidden = nn.relu(nn.Dense(128, name='backbone')(images))
        features = nn.Dense(32, name='features')(hidden)
        logits = nn.Dense(self.num_classes, use_bias=False, name='logits')(features)
        if labels is None:
            return logits
        return logits, *clj.linen.CenterLoss(self.num_classes, name='center')(features, labels)


@partial(jax.jit, donate_argnums=0)
def train_step(state, images, labels):
    def loss_fn(params):
        variables = {'params': params, 'centers': state.params['centers']}
        logits, center, rows = state.apply_fn(variables, images, labels)
        softmax = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return softmax + 0.1 * center, rows

    (loss, rows), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params['params'])
    return state.apply_gradients(grads={'params': grads, 'centers': {'center': {'centers': rows}}}), loss


def train(state, images, labels):
    rng = np.random.default_rng(0)
    for step in range(1, 301):
        batch = rng.integers(0, len(images), 128)
        state, loss = train_step(state, images[batch], labels[batch])
        if step % 100 == 0:
            print(f'step {step}: loss {loss:.3f}, step norm {optax.tree.get(state.opt_state, "step_norm"):.3f}')
    return state


images, labels = load_digits(return_X_y=True)
images, test_images, labels, test_labels = images[400:] / 16, images[:400] / 16, labels[400:], labels[:400]

print('the whole network on the digits 0 to 4')
model, old = Model(5), labels < 5
variables = model.init(jax.random.key(0), images[old], labels[old])
tx = clj.with_centers(optax.adam(3e-3))
state = TrainState.create(apply_fn=model.apply, params=variables, tx=tx)
backbone = jax.device_get(train(state, images[old], labels[old]).params['params']['backbone'])

print('a new head on all digits')
model = Model(10)
variables = model.init(jax.random.key(1), images, labels)
params = {**variables['params'], 'backbone': backbone}
layers = {'backbone': 'frozen', 'features': 'trained', 'logits': 'trained'}
optimizer = optax.partition(
    {'frozen': optax.set_to_zero(), 'trained': optax.adam(3e-3)}, {'params': layers, 'centers': 'trained'}
)
tx = clj.with_centers(optimizer)
state = TrainState.create(apply_fn=model.apply, params={**variables, 'params': params}, tx=tx)
state = train(state, images, labels)
unchanged = all(jax.tree.leaves(jax.tree.map(np.array_equal, state.params['params']['backbone'], backbone)))
accuracy = (state.apply_fn({'params': state.params['params']}, test_images).argmax(-1) == test_labels).mean()
print(f'test accuracy {accuracy:.3f}, backbone unchanged: {unchanged}')
