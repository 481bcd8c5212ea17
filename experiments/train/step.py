"""The training step of all experiments, its metrics, and the sums of metrics over an epoch."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state
from jax import Array
from jax.sharding import Mesh

import centerloss_jax as clj
from experiments.launch.mesh import Devices
from experiments.train.model import Classifier


class TrainState(train_state.TrainState):
    """Adds what a network has beside parameters and centers. `params` is `{'params': network, 'centers': centers}`."""

    collections: Mapping[str, Any]  # of variables that training changes, such as the running statistics of BatchNorm
    dropout_key: Any  # uint32 [2], the data of the key that all steps derive theirs from; None without a custom network


def create_state(
    model: Classifier,
    image_shape: tuple[int, ...],
    seed: int,
    learning_rate: float,
    alpha: float,
    devices: Devices,
    dtype: Any = 'uint8',
) -> TrainState:
    """Returns the state before the first step, placed on the devices."""
    key, dropout_key = jax.random.key(seed), None
    if not isinstance(model.trunk, str):
        dropout_key = jax.random.key_data(jax.random.fold_in(key, 1))
    images, labels = jnp.zeros((1, *image_shape), dtype), jnp.zeros(1, jnp.int32)
    variables = initial_variables(model, key, images, labels)
    params = {name: variables.pop(name) for name in ('params', 'centers')}
    tx = _optimizer(learning_rate, alpha, devices.axis_name, devices.mesh)
    state = TrainState.create(
        apply_fn=model.apply, params=params, tx=tx, collections=variables, dropout_key=dropout_key
    )
    return devices.place_state(state)


@jax.jit(static_argnames='model')
def initial_variables(model: Classifier, key: Array, images: Array, labels: Array) -> Any:
    """Returns all variables of a network."""
    return model.init({'params': key, 'dropout': key}, images, labels)


@functools.cache  # states with one optimizer object share a compiled step
def _optimizer(
    learning_rate: float, alpha: float, axis_name: str | None, mesh: Mesh | None
) -> optax.GradientTransformation:
    return clj.with_centers(optax.adam(learning_rate), alpha=alpha, axis_name=axis_name, mesh=mesh)


class Metrics(NamedTuple):
    """The metrics of a step, in the order of the array that the step returns."""

    softmax_loss: Any  # mean cross-entropy
    center_loss: Any  # mean squared distance, before the weight
    train_accuracy: Any
    gradient_norm: Any
    center_step_norm: Any
    rows_dropped: Any  # since the start


def train_step(
    state: TrainState, images: Array, labels: Array, center_weight: Array, axis_name: str | None = None
) -> tuple[TrainState, Array]:
    """Takes one step on L = softmax + center_weight * center.

    The weight is an argument of the compiled step. At weight 0 the network is trained exactly as with softmax alone,
    and the centers still move.

    Args:
        state: The state to update.
        images: `[B, H, W, K]` uint8.
        labels: `[B]`, integers. An example with label -1 is ignored.
        center_weight: The weight of the center loss, a scalar.
        axis_name: The mapped axis of the batch under pmap.

    Returns:
        The new state, and its `Metrics` as one array `[6]`, so that they are read in one transfer.
    """

    def mean(value):
        return value if axis_name is None else jax.lax.pmean(value, axis_name)

    rngs = {}
    if state.dropout_key is not None:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.dropout_key), state.step)
        rngs['dropout'] = key if axis_name is None else jax.random.fold_in(key, jax.lax.axis_index(axis_name))
    counted = labels >= 0
    count = jnp.maximum(mean(counted.sum().astype(jnp.float32)), 1e-9)

    def loss_fn(params):
        variables = {'params': params, 'centers': state.params['centers'], **state.collections}
        (_, logits, center, rows), collections = state.apply_fn(
            variables, images, labels, axis_name, mutable=[*state.collections], rngs=rngs
        )
        each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        softmax = mean(jnp.where(counted, each, 0).sum() / count)
        center = mean(center)
        accuracy = mean((counted & (logits.argmax(-1) == labels)).sum() / count)
        return softmax + center_weight * center, (rows, collections, softmax, center, accuracy)

    (_, auxiliary), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params['params'])
    rows, collections, softmax, center, accuracy = auxiliary
    grads = mean(grads)
    state = state.apply_gradients(
        grads={'params': grads, 'centers': {'center': {'centers': rows}}},
        collections=_averaged(collections, counted.sum(), axis_name),
    )
    opt_state: Any = state.opt_state
    centers = opt_state.inner_states['centers'].inner_state
    metrics = Metrics(softmax, center, accuracy, optax.tree.norm(grads), centers.step_norm, centers.dropped)
    return state, jnp.stack([value.astype(jnp.float32) for value in metrics])


def _averaged(collections: Mapping[str, Any], counted: Array, axis_name: str | None) -> Mapping[str, Any]:
    """Averages running statistics over the devices of pmap, weighted by the examples that each device counted."""
    if axis_name is None:
        return collections
    share = counted / jax.lax.psum(counted, axis_name)

    def average(value):
        if not jnp.issubdtype(value.dtype, jnp.inexact):
            return value
        return jax.lax.psum(value * share, axis_name).astype(value.dtype)

    return jax.tree.map(average, collections)


class Tally(NamedTuple):
    """Sums over the finished steps of an epoch, from which its row of metrics is computed. JSON can store them."""

    steps: int = 0
    seconds: float = 0.0
    examples: int = 0
    sums: Sequence[float] = (0.0,) * len(Metrics._fields)  # sums of each metric times the number of examples
    dropped: int = 0

    def add(self, counts: Sequence[int], metrics: Sequence[np.ndarray], seconds: float) -> 'Tally':
        """Adds steps one at a time, so that the sums do not depend on when a run was interrupted."""
        sums = np.array(self.sums, np.float64)
        for count, values in zip(counts, metrics, strict=True):
            sums += count * values.astype(np.float64)
        dropped = int(metrics[-1][Metrics._fields.index('rows_dropped')])
        examples = self.examples + sum(counts)
        return Tally(self.steps + len(counts), self.seconds + seconds, examples, sums.tolist(), dropped)

    def row(self) -> dict[str, float]:
        """Returns the row of metrics: means over the examples, and the number of rows dropped since the start."""
        means = Metrics(*(value / self.examples for value in self.sums))._replace(rows_dropped=self.dropped)
        return {**means._asdict(), 'epoch_seconds': self.seconds, 'steps_per_second': self.steps / self.seconds}
