"""What a trained state is worth on a split: its features, both accuracies, the variance ratio, and collapse."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from jax import Array

import centerloss_jax as clj
from experiments.data.batches import eval_batches
from experiments.data.open_set import OpenSet
from experiments.data.splits import LazySplit, Split
from experiments.launch.mesh import Devices
from experiments.train.metrics import Roc, unknown_auroc, verify
from experiments.train.snapshots import Snapshot
from experiments.train.thresholds import reach_of

EVAL_BATCH_SIZE = 512

# A picture needs no more points than these, however large the set is.
PICTURED_EXAMPLES = 4000

# The softmax loss of features that tell nothing of the class, as a share of ln C, and their intra/inter ratio.
COLLAPSED_LOSS, COLLAPSED_RATIO = 0.98, 2.0


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One split under one state: N examples, D feature dimensions."""

    features: np.ndarray  # [N, D]
    labels: np.ndarray  # [N]
    distances: np.ndarray  # [N], to the nearest center
    accuracy: float  # of the classifier, in [0, 1]
    nearest_center_accuracy: float  # in [0, 1]
    softmax_loss: float  # mean cross-entropy
    intra_inter_ratio: float  # NaN where all features coincide

    def measures(self) -> dict[str, float]:
        """What metrics and summaries tell of a test set, by the names that they have there."""
        return {
            'test_accuracy': self.accuracy,
            'nearest_center_accuracy': self.nearest_center_accuracy,
            'intra_inter_ratio': self.intra_inter_ratio,
        }

    def collapsed(self, num_classes: int) -> bool:
        """Whether the features tell nothing of the class. Where all coincide the ratio is not a number."""
        at_chance = not self.softmax_loss < COLLAPSED_LOSS * math.log(num_classes)
        return at_chance and not self.intra_inter_ratio < COLLAPSED_RATIO


def centers_of(state: TrainState) -> np.ndarray:
    """The centers of one copy of a state, [C, D]."""
    return np.asarray(jax.device_get(state.params['centers']['center']['centers']))


def evaluate(state: TrainState, split: Split | LazySplit, devices: Devices) -> Evaluation:
    """Evaluates one copy of a state over a whole split."""
    features, logits, labels = embed(state, split, devices)
    distances, values = jax.device_get(_measure(features, logits, labels, centers_of(state)))
    return Evaluation(features, labels, distances, **{name: float(value) for name, value in values.items()})


def embed(state: TrainState, split: Split | LazySplit, devices: Devices) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, logits and labels of a whole split."""
    parts = []
    batch_size = devices.rounded_up(EVAL_BATCH_SIZE)
    for batch in eval_batches(split, batch_size, jax.process_index(), jax.process_count()):
        images, labels = devices.spread(batch)
        parts.append((*_predict(state.params['params'], images, state.apply_fn), labels))
    # The last batch is filled up.
    columns = zip(*devices.gather(parts), strict=True)
    features, logits, labels = (np.concatenate(column)[: len(split)] for column in columns)
    return features, logits, labels


def nearest(state: TrainState, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The classes of the nearest centers of one copy of a state, and the distances to them."""
    classes, squared_distances = jax.device_get(clj.nearest_center(features, centers_of(state)))
    return classes, np.sqrt(squared_distances)


@jax.jit(static_argnames='apply_fn')
def _predict(params, images: Array, apply_fn) -> tuple[Array, Array]:
    return apply_fn({'params': params}, images)


@jax.jit
def _measure(features: Array, logits: Array, labels: Array, centers: Array) -> tuple[Array, dict[str, Array]]:
    nearest, squared_distances = clj.nearest_center(features, centers)
    return jnp.sqrt(squared_distances), {
        'accuracy': (logits.argmax(-1) == labels).mean(),
        'nearest_center_accuracy': (nearest == labels).mean(),
        'softmax_loss': optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(),
        'intra_inter_ratio': clj.class_statistics(features, labels, len(centers)).ratio,
    }


def sample(split: Split | LazySplit) -> Split:
    """Examples from all over a split, as many as a picture shows."""
    return Split(*split.take(np.linspace(0, len(split) - 1, min(PICTURED_EXAMPLES, len(split))).astype(int)))


def snapshot_of(
    epoch: int, state: TrainState, test: Evaluation, num_classes: int, train: Evaluation | None = None
) -> Snapshot:
    """What a picture shows of a state; of the train set nothing where it was not evaluated."""
    return Snapshot(
        epoch=epoch,
        train_features=train.features if train else test.features[:0],
        train_labels=train.labels if train else test.labels[:0],
        test_features=test.features[:PICTURED_EXAMPLES],
        test_labels=test.labels[:PICTURED_EXAMPLES],
        centers=centers_of(state),
        **test.measures(),
        collapsed=test.collapsed(num_classes),
    )


def judge(state: TrainState, open_set: OpenSet, similarity: str, devices: Devices) -> tuple[dict[str, Any], Roc, float]:
    """What one copy of a state is worth on known and on held-out classes, its curve, and its reach."""
    test = evaluate(state, open_set.known.test, devices)
    features, _, labels = embed(state, open_set.unknown, devices)
    pairs, roc = verify(features, labels, similarity)
    _, distances = nearest(state, features)
    values = {
        **test.measures(),
        **pairs,
        'unknown_auroc': unknown_auroc(test.distances, distances),
        'collapsed': test.collapsed(open_set.known.num_classes),
    }
    return values, roc, reach_of(test.distances)
