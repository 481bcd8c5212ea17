"""Metrics of features on held-out classes: verification of pairs, and detection of unknown classes.

scikit-learn computes all curves and areas. A mean over seeds has a 95 % interval, so that arms can be compared.
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
    """The receiver operating characteristic over all pairs."""

    far: np.ndarray  # false accept rate, in ascending order from 0 to 1
    tar: np.ndarray  # true accept rate

    def tar_at(self, far: float | np.ndarray) -> np.ndarray:
        """Returns the largest true accept rate at a false accept rate of at most `far`."""
        return self.tar[np.searchsorted(self.far, far, side='right') - 1]


def verify(
    features: np.ndarray, labels: np.ndarray, similarity: str, *, fars: Sequence[float] = FARS
) -> tuple[dict[str, float], Roc]:
    """Scores all pairs of examples by similarity.

    Args:
        features: `[N, D]`. If a feature is not finite, all measures are NaN.
        labels: `[N]`, of two or more classes, one of them with two or more examples.
        similarity: `cosine`, as in the paper, or `euclidean` for the negative distance.
        fars: False accept rates at which the true accept rate is measured.

    Returns:
        Measures by name, and the ROC.
    """
    names = ('auc', 'eer', *(f'tar_at_far_{far:g}' for far in fars), 'verification_accuracy')
    if not np.isfinite(features).all():
        return dict.fromkeys(names, np.nan), Roc(np.array([0.0, 1.0]), np.array([np.nan, np.nan]))
    features = features.astype(np.float64)
    scores = cosine_similarity(features) if similarity == 'cosine' else -euclidean_distances(features)
    upper = np.triu_indices(len(labels), 1)
    far, tar, _ = roc_curve((labels[:, None] == labels)[upper], scores[upper])
    roc = Roc(far, tar)
    eer = float(np.interp(0, far - (1 - tar), far))  # where FAR equals the false reject rate
    accuracy = float(((tar + 1 - far) / 2).max())  # at the best threshold
    values = (float(auc(far, tar)), eer, *map(float, map(roc.tar_at, fars)), accuracy)
    return dict(zip(names, values, strict=True)), roc


def unknown_auroc(known: np.ndarray, unknown: np.ndarray) -> float:
    """Returns the AUROC of the distances to the nearest center, of known `[N]` against unknown `[M]` classes."""
    distances = np.concatenate([known, unknown])
    if not np.isfinite(distances).all():
        return np.nan
    return float(roc_auc_score(np.arange(len(distances)) >= len(known), distances))


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean with the bounds of its 95 % confidence interval, which are NaN for a single value."""

    mean: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


def interval(values: Sequence[float]) -> Interval:
    """Returns the mean of values with its interval by Student's t distribution."""
    mean, count = float(np.mean(values)), len(values)
    half = math.nan
    if count > 1:
        half = float(stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / math.sqrt(count))
    return Interval(mean, mean - half, mean + half)


def intervals(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> dict[str, Interval]:
    """Returns the interval of each column in `keys` over the rows."""
    return {key: interval([row[key] for row in rows]) for key in keys}
