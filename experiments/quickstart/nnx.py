"""Trains a small network with softmax and center loss, in Flax NNX."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import centerloss_jax as clj


class Model(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(32, 64, rngs=rngs)
        self.norm = nnx.BatchNorm(64, rngs=rngs)
        self.features = nnx.Linear(64, 2, rngs=rngs)
        self.logits = nnx.Linear(2, 10, use_bias=False, rngs=rngs)
        self.center = clj.nnx.CenterLoss(num_classes=10, num_features=2, rngs=rngs)

    def __call__(self, images):
        features = self.features(nnx.relu(self.norm(self.hidden(images))))
        return features, self.logits(features)


model = Model(nnx.Rngs(0))
# wrt must contain Centers: nnx.Optimizer does not update variables of other types.
optimizer = nnx.Optimizer(model, clj.with_centers(optax.adam(1e-3)), wrt=(nnx.Param, clj.nnx.Centers))


@nnx.jit(donate_argnames=('model', 'optimizer'))  # donation lets XLA update the centers in place
def train_step(model, optimizer, images, labels):
    def loss_fn(model):
        features, logits = model(images)
        center, rows = model.center(features, labels)
        softmax = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return softmax + 0.1 * center, rows

    (loss, rows), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    grads.center = {'centers': clj.nnx.Centers(rows)}  # rows in place of a gradient
    optimizer.update(model, grads)
    return loss


images, labels = jax.random.normal(jax.random.key(0), (128, 32)), jnp.arange(128) % 10
for _ in range(3):
    loss = train_step(model, optimizer, images, labels)
    print(f'loss {loss:.3f}, step norm {optax.tree.get(optimizer.opt_state, "step_norm")[...]:.3f}')
model.eval()
features, logits = model(images)
