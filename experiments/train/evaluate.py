"""Evaluates a state on a split: features, both accuracies, the intra/inter ratio, and whether features collapsed."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import centerloss_jax as clj
from experiments.data.batches import eval_batches
from experiments.data.open_set import OpenSet
from experiments.data.splits import LazySplit, Split
from experiments.launch.mesh import Devices
from experiments.metrics.held_out import Roc, unknown_auroc, verify
from experiments.metrics.retrieval import retrieve
from experiments.train.snapshots import Snapshot
from experiments.train.step import TrainState
from experiments.train.thresholds import threshold_of

EVAL_BATCH_SIZE = 512

# A figure shows at most this number of examples of a split.
DRAWN_EXAMPLES = 4000

# Collapsed features have at least this softmax loss, relative to ln C, and at least this intra/inter ratio.
COLLAPSED_LOSS, COLLAPSED_RATIO = 0.98, 2.0


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The evaluation of one state on one split of N examples with D feature dimensions."""

    features: np.ndarray  # [N, D]
    labels: np.ndarray  # [N]
    distances: np.ndarray  # [N], to the nearest center
    accuracy: float  # of the classifier, in [0, 1]
    nearest_center_accuracy: float  # in [0, 1]
    softmax_loss: float  # mean cross-entropy
    intra_inter_ratio: float  # NaN if all features are equal

    def measures(self) -> dict[str, float]:
        """Returns the measures of a test set under their names in metrics.csv and summary.json."""
        return {
            'test_accuracy': self.accuracy,
            'nearest_center_accuracy': self.nearest_center_accuracy,
            'intra_inter_ratio': self.intra_inter_ratio,
        }

    def collapsed(self, num_classes: int) -> bool:
        """Returns whether the features carry no information about the class. The ratio may be NaN."""
        at_chance = not self.softmax_loss < COLLAPSED_LOSS * math.log(num_classes)
        return at_chance and not self.intra_inter_ratio < COLLAPSED_RATIO


def centers_of(state: TrainState) -> np.ndarray:
    """Returns the centers `[C, D]` of an unreplicated state."""
    return np.asarray(jax.device_get(state.params['centers']['center']['centers']))


def evaluate(state: TrainState, split: Split | LazySplit, devices: Devices) -> Evaluation:
    """Evaluates an unreplicated state on a whole split."""
    features, logits, labels = embed(state, split, devices)
    distances, values = jax.device_get(_measure(features, logits, labels, centers_of(state)))
    return Evaluation(features, labels, distances, **{name: float(value) for name, value in values.items()})


def embed(state: TrainState, split: Split | LazySplit, devices: Devices) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns features, logits and labels of a whole split."""
    outputs, variables = [], {'params': state.params['params'], **state.collections}
    batch_size = devices.rounded_up(EVAL_BATCH_SIZE)
    for batch in eval_batches(split, batch_size, jax.process_index(), jax.process_count()):
        images, labels = devices.spread(batch)
        outputs.append((*_predict(variables, images, state.apply_fn), labels))
    # The last batch is padded.
    columns = zip(*devices.gather(outputs), strict=True)
    features, logits, labels = (np.concatenate(column)[: len(split)] for column in columns)
    return features, logits, labels


def nearest(state: TrainState, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the classes `[N]` of the nearest centers of an unreplicated state, and the distances `[N]` to them."""
    classes, squared_distances = jax.device_get(clj.nearest_center(features, centers_of(state)))
    return classes, np.sqrt(squared_distances)


@jax.jit(static_argnames='apply_fn')
def _predict(variables, images: Array, apply_fn) -> tuple[Array, Array]:
    return apply_fn(variables, images)


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
    """Returns evenly spaced examples of a split, as many as a figure shows."""
    return Split(*split.take(np.linspace(0, len(split) - 1, min(DRAWN_EXAMPLES, len(split))).astype(int)))


def snapshot_of(
    epoch: int, state: TrainState, test: Evaluation, num_classes: int, train: Evaluation | None = None
) -> Snapshot:
    """Returns the data of a figure of a state. Without `train`, the snapshot has no train features."""
    return Snapshot(
        epoch=epoch,
        train_features=train.features if train else test.features[:0],
        train_labels=train.labels if train else test.labels[:0],
        test_features=test.features[:DRAWN_EXAMPLES],
        test_labels=test.labels[:DRAWN_EXAMPLES],
        centers=centers_of(state),
        **test.measures(),
        collapsed=test.collapsed(num_classes),
    )


def evaluate_open_set(
    state: TrainState, open_set: OpenSet, similarity: str, devices: Devices
) -> tuple[dict[str, Any], Roc, float]:
    """Evaluates an unreplicated state on known and on held-out classes.

    Returns:
        Measures by name, the ROC of the pairs of held-out examples, and the threshold for unknown classes.
    """
    test = evaluate(state, open_set.known.test, devices)
    features, _, labels = embed(state, open_set.unknown, devices)
    pairs, roc = verify(features, labels, similarity)
    _, distances = nearest(state, features)
    values = {
        **test.measures(),
        **pairs,
        **retrieve(features, labels, similarity),
        'unknown_auroc': unknown_auroc(test.distances, distances),
        'collapsed': test.collapsed(open_set.known.num_classes),
    }
    return values, roc, threshold_of(test.distances)
