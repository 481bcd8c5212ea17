"""What features are worth for classes that were never trained on: pairs told apart, neighbours found, strangers seen.

All curves and areas are scikit-learn's. A mean over seeds has its 95 % interval, without which no two arms can be
compared.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from sklearn.metrics import auc, roc_auc_score, roc_curve
from sklearn.metrics.pairwise import cosine_similarity, euclidean_distances

FARS = (0.1, 0.01, 0.001)


class Roc(NamedTuple):
    """The receiver operating characteristic of all pairs: accepted shares of unlike and of like ones."""

    far: np.ndarray  # false accept rate, rising from 0 to 1
    tar: np.ndarray  # true accept rate

    def tar_at(self, far: float | np.ndarray) -> np.ndarray:
        """The largest true accept rate whose false accept rate is not above this one."""
        return self.tar[np.searchsorted(self.far, far, side='right') - 1]


def verify(features: np.ndarray, labels: np.ndarray, similarity: str) -> tuple[dict[str, float], Roc]:
    """Scores all pairs of examples by similarity.

    Args:
        features: `[N, D]`. If any is not finite, no measure is a number.
        labels: `[N]`, each of two classes or more, one of them with two examples or more.
        similarity: `cosine`, the paper's, or `euclidean`, the negative distance.

    Returns:
        Measures by name, and the curve.
    """
    names = ('auc', 'eer', *(f'tar_at_far_{far:g}' for far in FARS), 'recall_at_1', 'verification_accuracy')
    if not np.isfinite(features).all():
        return dict.fromkeys(names, np.nan), Roc(np.array([0.0, 1.0]), np.array([np.nan, np.nan]))
    features = features.astype(np.float64)
    alike = cosine_similarity(features) if similarity == 'cosine' else -euclidean_distances(features)
    upper = np.triu_indices(len(labels), 1)
    far, tar, _ = roc_curve((labels[:, None] == labels)[upper], alike[upper])
    roc = Roc(far, tar)
    eer = float(np.interp(0, far - (1 - tar), far))  # where as many are falsely accepted as falsely rejected
    accuracy = float(((tar + 1 - far) / 2).max())  # of the best threshold, as many like as unlike pairs
    values = (float(auc(far, tar)), eer, *map(float, map(roc.tar_at, FARS)), _recall(alike, labels), accuracy)
    return dict(zip(names, values, strict=True)), roc


def _recall(alike: np.ndarray, labels: np.ndarray) -> float:
    """Share of the examples whose most similar other example is of their class, if there is such an example."""
    np.fill_diagonal(alike, -np.inf)
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    findable = counts[inverse] > 1
    return float((labels[alike.argmax(axis=1)] == labels)[findable].mean())


def unknown_auroc(known: np.ndarray, unknown: np.ndarray) -> float:
    """How well the distance to the nearest center tells examples of known classes `[N]` from those of others `[M]`."""
    distances = np.concatenate([known, unknown])
    if not np.isfinite(distances).all():
        return np.nan
    return float(roc_auc_score(np.arange(len(distances)) >= len(known), distances))


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and the bounds within which, at 95 %, the mean over all seeds lies. Of one value there are no bounds."""

    mean: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


def interval(values: Sequence[float]) -> Interval:
    """By Student's t, since seeds are few."""
    mean, count = float(np.mean(values)), len(values)
    half = math.nan
    if count > 1:
        half = float(stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / math.sqrt(count))
    return Interval(mean, mean - half, mean + half)


def intervals(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> dict[str, Interval]:
    """That of each of these columns over the rows."""
    return {key: interval([row[key] for row in rows]) for key in keys}
