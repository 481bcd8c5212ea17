"""Starts the centers under a trained network from its class means, in Flax Linen and in Flax NNX."""

from functools import partial

import jax
import numpy as np
import optax
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier

import centerloss_jax as clj


class LinenNetwork(nn.Module):
    @nn.compact
    def __call__(self, images):
        features = nn.Dense(32, name='features')(nn.relu(nn.Dense(128, name='hidden')(images)))
        return features, nn.Dense(10, name='logits')(nn.relu(features))


class NNXNetwork(nnx.Module):
    def __init__(self, means, rngs):
        shapes = (64, 128), (128, 32), (32, 10)
        self.hidden, self.features, self.logits = (nnx.Linear(*shape, rngs=rngs) for shape in shapes)
        self.center = clj.nnx.CenterLoss(*means.shape, centers_init=lambda key, shape, dtype: means, rngs=rngs)

    def __call__(self, images):
        features = self.features(nnx.relu(self.hidden(images)))
        return features, self.logits(nnx.relu(features))


@partial(jax.jit, donate_argnums=0)
def linen_step(state, images, labels):
    def loss_fn(params):
        features, logits = state.apply_fn({'params': params}, images)
        center, rows = clj.center_loss_and_rows(features, state.params['centers'], labels)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean() + 0.1 * center, rows

    (loss, rows), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params['params'])
    return state.apply_gradients(grads={'params': grads, 'centers': rows}), loss


@nnx.jit(donate_argnames=('model', 'optimizer'))
def nnx_step(model, optimizer, images, labels):
    def loss_fn(model):
        features, logits = model(images)
        center, rows = model.center(features, labels)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean() + 0.1 * center, rows

    (loss, rows), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    grads.center = {'centers': clj.nnx.Centers(rows)}
    optimizer.update(model, grads)
    return loss


images, labels = load_digits(return_X_y=True)
images, test_images, labels, test_labels = images[400:] / 16, images[:400] / 16, labels[400:], labels[:400]
trained = MLPClassifier((128, 32), early_stopping=True, random_state=0).fit(images, labels)
layers = zip(('hidden', 'features', 'logits'), trained.coefs_, trained.intercepts_, strict=True)
params = {name: {'kernel': np.float32(kernel), 'bias': np.float32(bias)} for name, kernel, bias in layers}
features, logits = LinenNetwork().apply({'params': params}, images)
means = np.asarray(clj.class_statistics(features, labels, num_classes=10).mean)  # on the host: both steps donate theirs
from_zeros, from_means = (clj.center_loss(features, centers, labels) for centers in (0 * means, means))
print(f'first center loss: {from_zeros:.1f} from zeros, {from_means:.1f} from class means')

tx = clj.with_centers(optax.adam(1e-3))
state = TrainState.create(apply_fn=LinenNetwork().apply, params={'params': params, 'centers': means}, tx=tx)
model = NNXNetwork(means, nnx.Rngs(0))
nnx.update(model, params)
optimizer = nnx.Optimizer(model, tx, wrt=(nnx.Param, clj.nnx.Centers))
for step, batch in enumerate(np.random.default_rng(0).integers(0, len(images), (201, 128))):
    state, loss = linen_step(state, images[batch], labels[batch])
    nnx_loss = nnx_step(model, optimizer, images[batch], labels[batch])
    if step % 100 == 0:
        ratio = clj.class_statistics(model(test_images)[0], test_labels, num_classes=10).ratio
        print(f'step {step}: loss in Linen {loss:.3f}, in NNX {nnx_loss:.3f}, ratio {ratio:.3f}')
