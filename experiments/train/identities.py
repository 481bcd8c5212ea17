"""Made identities, which no disk has to hold, and a training step that tells them apart.

Identity j is a latent vector, drawn from a key into which j is folded. An example is a fixed random network of the
latent vector and of a nuisance, with noise. The step makes its batch on the device, from the seed and its number alone,
so that a resumed run sees the batches that it would have seen.
"""

import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import Array

import centerloss_jax as clj
from experiments.launch.mesh import Devices
from experiments.metrics.held_out import verify
from experiments.metrics.retrieval import retrieve
from experiments.train.checkpoint import Checkpoints
from experiments.train.model import HiddenLayers
from experiments.train.step import Tally, TrainState

# Numbers of a latent vector and of a nuisance, of the hidden layer of the random network, and of an example.
LATENT, HIDDEN, SHOWN = 32, 256, 128

# The first identity that no network is trained on. A network is trained on those below its number of classes.
UNSEEN = 2**31
EXAMPLES_OF_UNSEEN = 5
FARS_OF_UNSEEN = (0.1, 0.01, 0.001, 0.0001)

LAYERS = (256, 256)
_LEARNING_RATE, _TABLE_LEARNING_RATE = 1e-3, 1e-2
_ALPHA = 0.5

# Steps between two looks at the clock. A look waits for the device.
_LOOK_EVERY = 10

SOFTMAXES: dict[str, Callable[..., tuple[Array, clj.RowUpdates]]] = {
    'class': clj.class_softmax_and_rows,
    'margin': partial(clj.margin_softmax_and_rows, scale=16.0, additive_margin=0.2),
    'distance': clj.distance_softmax_and_rows,
}


class World(NamedTuple):
    """The identities of a seed, the random network that shows them, and the keys of batches and unseen examples."""

    identities: Array  # a key, into which an identity is folded
    batches: Array  # a key, into which a step is folded
    unseen: Array  # a key
    hidden: Array  # [2 LATENT, HIDDEN]
    shown: Array  # [HIDDEN, SHOWN]


class Setup(NamedTuple):
    """The settings that all networks of a run share."""

    num_classes: int
    steps: int
    batch_size: int
    feature_dim: int
    noise: float
    unseen: int


class Trial(NamedTuple):
    """The settings in which the networks of a run differ."""

    loss: str
    sample_share: float
    center_weight: float
    seed: int

    @property
    def name(self) -> str:
        return '-'.join(map(str, self))


@jax.jit
def make_world(seed: Any) -> World:
    """Returns the world of a seed."""
    identities, batches, unseen, key_of_hidden, key_of_shown = jax.random.split(jax.random.key(seed), 5)
    hidden = 1.5 * jax.random.normal(key_of_hidden, (2 * LATENT, HIDDEN)) / np.sqrt(2 * LATENT)
    shown = jax.random.normal(key_of_shown, (HIDDEN, SHOWN)) / np.sqrt(HIDDEN)
    return World(identities, batches, unseen, hidden, shown)


@jax.jit
def make_examples(world: World, key: Array, identities: Any, noise: float) -> Array:
    """Returns an example of each identity, float32 `[B, SHOWN]`.

    Args:
        world: The world of the identities.
        key: The key of the nuisance and of the noise.
        identities: `[B]`, integers from 0 to 2**32 - 1.
        noise: The deviation of the noise. Without it the numbers of an example have a deviation of about 0.7.
    """
    latent = jax.vmap(lambda j: jax.random.normal(jax.random.fold_in(world.identities, j), (LATENT,)))(identities)
    key_of_nuisance, key_of_noise = jax.random.split(key)
    nuisance = jax.random.normal(key_of_nuisance, latent.shape)
    shown = jnp.tanh(jnp.concatenate([latent, nuisance], axis=1) @ world.hidden) @ world.shown
    return shown + noise * jax.random.normal(key_of_noise, shown.shape)


def make_batch(world: World, key: Array, setup: Setup) -> tuple[Array, Array]:
    """Returns the examples `[B, SHOWN]` of a batch, and their identities `[B]`, each a class."""
    key_of_labels, key_of_examples = jax.random.split(key)
    labels = jax.random.randint(key_of_labels, (setup.batch_size,), 0, setup.num_classes)
    return make_examples(world, key_of_examples, labels, setup.noise), labels


def make_unseen(world: World, setup: Setup) -> tuple[Array, np.ndarray]:
    """Returns examples of identities that no network is trained on, and the identities."""
    labels = np.uint32(UNSEEN) + np.repeat(np.arange(setup.unseen, dtype=np.uint32), EXAMPLES_OF_UNSEEN)
    return make_examples(world, world.unseen, labels, setup.noise), labels


@cache
def _network(feature_dim: int) -> nn.Module:
    return nn.Sequential([HiddenLayers(LAYERS), nn.Dense(feature_dim)])


@cache  # states with one optimizer object share a compiled step
def _optimizer(steps: int, has_centers: bool) -> optax.GradientTransformation:
    schedules = (optax.cosine_decay_schedule(rate, steps) for rate in (_LEARNING_RATE, _TABLE_LEARNING_RATE))
    network, classifier = map(optax.adam, schedules)
    if has_centers:
        return clj.with_centers(network, _ALPHA, classifier=clj.by_rows(classifier))
    transforms: Any = {'params': network, 'classifier': clj.by_rows(classifier)}
    return optax.partition(transforms, {name: name for name in transforms})


def start_identities(loss: str, seed: int, setup: Setup) -> TrainState:
    """Returns the state before the first step. The distance softmax has no centers beside its table."""
    key_of_network, key_of_table = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1))
    network, shape = _network(setup.feature_dim), (setup.num_classes, setup.feature_dim)
    params: dict[str, Any] = {
        'params': network.init(key_of_network, jnp.zeros((1, SHOWN)))['params'],
        'classifier': jax.random.normal(key_of_table, shape) / np.sqrt(setup.feature_dim),
    }
    if loss != 'distance':
        params['centers'] = jnp.zeros(shape)
    tx = _optimizer(setup.steps, 'centers' in params)
    return TrainState.create(apply_fn=network.apply, params=params, tx=tx, collections={}, dropout_key=None)


@partial(jax.jit, static_argnames=('loss', 'num_sampled', 'setup'), donate_argnames='state')
def identities_step(
    state: TrainState, world: World, center_weight: Any, *, loss: str, num_sampled: int, setup: Setup
) -> tuple[TrainState, Array]:
    """Takes one step on L = softmax + center_weight * center, the softmax over all classes or over a sample.

    The classifier moves by `by_rows`. The centers move by Eq. 4, also at weight 0. The margin softmax sees directions
    alone, so the center loss could shrink the features; there it is that of the features divided by their norms. The
    distance softmax has one table for both: its rows move by the gradient of L, and not by Eq. 4.

    Returns:
        The new state, and L.
    """
    key_of_batch, key_of_sample = jax.random.split(jax.random.fold_in(world.batches, state.step))
    examples, labels = make_batch(world, key_of_batch, setup)
    classes = None
    if num_sampled < setup.num_classes:
        classes = clj.sample_classes(key_of_sample, labels, setup.num_classes, num_sampled)

    params: Any = state.params

    def loss_fn(network):
        features = state.apply_fn({'params': network}, examples)
        softmax_and_rows = partial(SOFTMAXES[loss], features, params['classifier'], labels, classes=classes)
        if loss == 'distance':
            total, rows = softmax_and_rows(center_weight=center_weight)
            return total, {'classifier': rows}
        softmax, rows = softmax_and_rows()
        if loss == 'margin':
            features /= jnp.linalg.norm(features, axis=1, keepdims=True)
        center, moves = clj.center_loss_and_rows(features, params['centers'], labels)
        return softmax + center_weight * center, {'classifier': rows, 'centers': moves}

    (total, rows), grads = jax.value_and_grad(loss_fn, has_aux=True)(params['params'])
    return state.apply_gradients(grads={'params': grads, **rows}), total


def train_trial(
    trial: Trial,
    setup: Setup,
    saves: Checkpoints,
    devices: Devices,
    tell: Callable[[str], None],
    report: Callable[..., None],
) -> dict[str, Any]:
    """Trains a network from its last save on, and measures it on unseen identities.

    Args:
        trial: The network.
        setup: The settings of the run.
        saves: The saves of the network. The last one has its measures, so that they are computed once.
        devices: The device.
        tell: Prints a line.
        report: Called with `completed=`, the number of finished steps.

    Returns:
        The settings of the network and its measures.
    """
    start = devices.fetch(devices.place_state(start_identities(trial.loss, trial.seed, setup)))
    host, tally = saves.restore(start, None, tell) or (start, Tally())
    if saves.rows:
        return saves.rows[0]
    world, weight = make_world(trial.seed), np.float32(trial.center_weight)
    num_sampled = round(trial.sample_share * setup.num_classes)
    state, before = devices.place_state(host), tally.seconds
    settings = {'loss': trial.loss, 'num_sampled': num_sampled, 'setup': setup}
    step = identities_step.lower(state, world, weight, **settings).compile()  # its time does not count
    began = time.perf_counter()
    for done in range(int(host.step) + 1, setup.steps + 1):
        state, loss = step(state, world, weight)
        if done % _LOOK_EVERY and done < setup.steps:
            continue
        loss.block_until_ready()
        report(completed=done)
        tally = Tally(steps=done, seconds=before + time.perf_counter() - began)
        if done < setup.steps and saves.due():
            saves.save(state, None, tally)
    examples, identities = make_unseen(world, setup)
    features = np.asarray(state.apply_fn({'params': state.params['params']}, examples))
    pairs, _ = verify(features, identities, 'cosine', fars=FARS_OF_UNSEEN)
    ranks = retrieve(features, identities, 'cosine')
    dropped = int(optax.tree.get(state.opt_state, 'rows_dropped'))
    measures = {**pairs, 'rank_1': ranks['rank_1'], 'rows_dropped': dropped, 'train_seconds': tally.seconds}
    saves.rows = [row := {**trial._asdict(), **measures}]
    saves.save(state, None, tally)
    return row
