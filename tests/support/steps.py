"""The training steps of the documentation: with a Linen TrainState, and with an nnx.Optimizer."""

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx
from flax.training import train_state

import centerloss_jax as clj


def update(transform: Any, grads: Any, state: Any, model: Any) -> Any:
    """Returns `(model, state)` after one step of an optax transform. Any, since optax's types do not know rows."""
    updates, state = transform.update(grads, state, model)
    return optax.apply_updates(model, updates), state


def move(centers: Any, rows: Any, alpha: Any = 0.5) -> Any:
    """Returns `(centers, state)` after the first step of `center_update` on a bare table."""
    transform = clj.center_update(alpha)
    return update(transform, rows, transform.init(centers), centers)


SGD = optax.sgd(0.1)


class Batch(NamedTuple):
    images: Any  # [B, 6]
    labels: Any  # [B], negative for an example that only pads the batch


def make_batch(seed=0, size=8, num_classes=5, left_out=()) -> Batch:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, (2, size)).min(axis=0).astype(np.int32)
    labels[list(left_out)] = -1
    return Batch(rng.normal(1, 2, (size, 6)).astype(np.float32), labels)


def softmax_loss(logits, labels, axis_name=None):
    """Returns the mean over the examples with a label; under axis_name, over those of all devices."""
    counted = labels >= 0
    per_example = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(counted, labels, 0))
    count = jnp.sum(counted, dtype=jnp.float32)
    if axis_name is not None:
        count = jax.lax.pmean(count, axis_name)
    return jnp.sum(per_example, where=counted) / jnp.where(count > 0, count, 1)


class LinenModel(nn.Module):
    num_classes: int = 5
    num_features: int = 3
    batch_norm: bool = False
    axis_name: str | None = None
    table_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, labels=None, *, train=False):
        features = nn.Dense(self.num_features)(images)
        if self.batch_norm:
            features = nn.BatchNorm(use_running_average=not train)(features)
        logits = nn.Dense(10)(nn.relu(features))
        if labels is None:
            return logits
        center_loss = clj.linen.CenterLoss(self.num_classes, dtype=self.table_dtype, name='center')
        return logits, *center_loss(features, labels, axis_name=self.axis_name)


class LinenState(train_state.TrainState):
    """Holds batch statistics too, as Flax's documentation shows; an empty dict for a model without them."""

    batch_stats: Any


# A train state holds functions, which jax.jit compares by identity: the same ones, so that tests share programs.
_linen_model = cache(LinenModel)


@cache
def _linen_init(**model_options):
    return jax.jit(LinenModel(**model_options).init)


@cache
def _with_centers(tx, alpha, axis_name=None):
    return clj.with_centers(tx or optax.adam(1e-2), alpha, axis_name=axis_name)


def linen_state(tx=None, *, alpha=0.5, seed=0, **model_options) -> LinenState:
    """Returns the initial state. axis_name is passed to the model and to the optimizer."""
    axis_name = model_options.get('axis_name')
    tx = _with_centers(tx, alpha, axis_name)
    # The model is initialized on one device, where no axis is bound.
    variables = _linen_init(**{**model_options, 'axis_name': None})(jax.random.key(seed), *make_batch())
    return LinenState.create(
        apply_fn=_linen_model(**model_options).apply,
        params={'params': variables['params'], 'centers': variables['centers']},
        tx=tx,
        batch_stats=variables.get('batch_stats', {}),
    )


def linen_step(state, images, labels, *, center_weight=1.0, axis_name=None):
    def loss_fn(params):
        variables = {
            'params': params,
            'centers': state.params['centers'],
            'batch_stats': state.batch_stats,
        }
        (logits, center, rows), changed = state.apply_fn(variables, images, labels, train=True, mutable=['batch_stats'])
        loss = softmax_loss(logits, labels, axis_name) + center_weight * center
        if axis_name is not None:
            loss = jax.lax.pmean(loss, axis_name)
        return loss, (rows, changed.get('batch_stats', {}))

    (loss, (rows, batch_stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params['params'])
    if axis_name is not None:
        grads = jax.lax.pmean(grads, axis_name)
    grads = {'params': grads, 'centers': {'center': {'centers': rows}}}
    return state.apply_gradients(grads=grads, batch_stats=batch_stats), loss


def linen_table(state):
    return state.params['centers']['center']['centers']


def center_state(opt_state) -> clj.CenterUpdateState:
    """Returns the CenterUpdateState inside the state of with_centers."""
    return opt_state.inner_states['centers'].inner_state


class NnxModel(nnx.Module):
    def __init__(self, num_classes=5, num_features=3, *, batch_norm=False, table_dtype=jnp.float32, rngs):
        self.inner = nnx.Linear(6, num_features, rngs=rngs)
        self.norm = nnx.BatchNorm(num_features, rngs=rngs) if batch_norm else lambda features: features
        self.outer = nnx.Linear(num_features, 10, rngs=rngs)
        self.center = clj.nnx.CenterLoss(num_classes, num_features, dtype=table_dtype, rngs=rngs)

    def __call__(self, images, labels=None):
        features = self.norm(self.inner(images))
        logits = self.outer(nnx.relu(features))
        return logits if labels is None else (logits, *self.center(features, labels))


def nnx_pair(tx=None, *, alpha=0.5, seed=0, graph=True, **model_options) -> tuple[NnxModel, nnx.Optimizer]:
    """Returns a model and its optimizer. graph: Flax's graph mode, or its tree mode."""
    model = NnxModel(**model_options, rngs=nnx.Rngs(seed))
    return model, nnx.Optimizer(model, _with_centers(tx, alpha), wrt=(nnx.Param, clj.nnx.Centers), graph=graph)


def nnx_step(model, optimizer, images, labels, *, center_weight=1.0, graph=True):
    def loss_fn(model):
        logits, center, rows = model(images, labels)
        return softmax_loss(logits, labels) + center_weight * center, rows

    (loss, rows), grads = nnx.value_and_grad(loss_fn, has_aux=True, graph=graph)(model)
    # By attribute: in graph mode the gradients are an nnx.State, in tree mode they are a model.
    grads.center = {'centers': clj.nnx.Centers(rows)}
    optimizer.update(model, grads)
    return loss


@cache
def jit_nnx_step(*, graph=True):
    @partial(nnx.jit, donate_argnames=('model', 'optimizer'), graph=graph)
    def jitted(model, optimizer, images, labels, center_weight):
        return nnx_step(model, optimizer, images, labels, center_weight=center_weight, graph=graph)

    def step(model, optimizer, images, labels, center_weight=1.0):
        return jitted(model, optimizer, images, labels, center_weight)

    return step


def nnx_arrays(model):
    """Returns the model's variables as NumPy copies, which donation does not delete."""
    return jax.tree.map(np.asarray, nnx.as_pure(nnx.state(model)))


def nnx_table(model):
    return np.asarray(model.center.centers[...])
