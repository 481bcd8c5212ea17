"""The one training step and the one loop over an epoch that all experiments share."""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from jax import Array

import centerloss_jax as clj
from experiments.batches import Batch
from experiments.devices import Devices
from experiments.models import Classifier


def create_state(
    model: Classifier,
    image_shape: tuple[int, ...],
    seed: int,
    learning_rate: float,
    alpha: float,
    devices: Devices,
) -> TrainState:
    """A stock TrainState whose params hold the network's parameters and, beside them, the centers."""
    images, labels = jnp.zeros((1, *image_shape), jnp.uint8), jnp.zeros(1, jnp.int32)
    variables = jax.jit(model.init)(jax.random.key(seed), images, labels)
    tx = clj.with_centers(optax.adam(learning_rate), alpha=alpha, axis_name=devices.axis_name, mesh=devices.mesh)
    params = {'params': variables['params'], 'centers': variables['centers']}
    return devices.place_state(TrainState.create(apply_fn=model.apply, params=params, tx=tx))


class Metrics(NamedTuple):
    """What a step tells; all scalars."""

    softmax_loss: Any  # mean cross-entropy
    center_loss: Any  # mean squared distance, before it is weighted
    train_accuracy: Any
    gradient_norm: Any
    center_step_norm: Any
    rows_left_out: Any  # since the start


def train_step(
    state: TrainState, images: Array, labels: Array, center_weight: Array, axis_name: str | None = None
) -> tuple[TrainState, Metrics]:
    """One step of L = softmax + center_weight * center, and its metrics. Examples with label -1 are left out.

    The weight is an argument of the compiled step: with 0 it is the softmax arm, bit for bit, centers moving too.
    """

    def mean(value):
        return value if axis_name is None else jax.lax.pmean(value, axis_name)

    counted = labels >= 0
    count = jnp.maximum(mean(counted.sum().astype(jnp.float32)), 1e-9)

    def loss_fn(params):
        variables = {'params': params, 'centers': state.params['centers']}
        _, logits, center, rows = state.apply_fn(variables, images, labels, axis_name)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        softmax = mean(jnp.where(counted, each, 0).sum() / count)
        center = mean(center)
        accuracy = mean((counted & (logits.argmax(-1) == labels)).sum() / count)
        return softmax + center_weight * center, (rows, softmax, center, accuracy)

    (_, (rows, softmax, center, accuracy)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params['params'])
    grads = mean(grads)
    state = state.apply_gradients(grads={'params': grads, 'centers': {'center': {'centers': rows}}})
    opt_state: Any = state.opt_state
    centers = opt_state.inner_states['centers'].inner_state
    return state, Metrics(softmax, center, accuracy, optax.tree.norm(grads), centers.step_norm, centers.left_out)


def train_epoch(
    state: TrainState,
    step: Callable,
    batches: Iterator[Batch],
    steps: int,
    center_weight: Array,
    devices: Devices,
    report: Callable[[int, Metrics, float], None],
) -> tuple[TrainState, dict[str, float]]:
    """Runs `steps` steps, and a few times a second tells `report` steps done, latest metrics, steps a second.

    Returns the state and the epoch's metrics: means over its examples, and the rows left out so far.
    """
    start = told = time.perf_counter()
    history, counts = [], []
    for done in range(1, steps + 1):
        images, labels = next(batches)
        counts.append((labels >= 0).sum())
        state, metrics = step(state, *devices.place_batch(images, labels), center_weight)
        history.append(metrics)
        now = time.perf_counter()
        if now - told > 0.3 or done == steps:
            # An earlier step's metrics: reading the latest would make the host wait for the device.
            latest = jax.device_get(devices.one(history[max(0, len(history) - 3)]))
            report(done, latest, done / (now - start))
            told = now
    fetched = jax.device_get([devices.one(metrics) for metrics in history])
    seconds = time.perf_counter() - start
    weights = np.array(counts) / sum(counts)
    means = Metrics(*(float(np.dot(weights, values)) for values in zip(*fetched, strict=True)))
    epoch = means._replace(rows_left_out=int(fetched[-1].rows_left_out))._asdict()
    return state, {**epoch, 'epoch_seconds': seconds, 'steps_per_second': steps / seconds}
