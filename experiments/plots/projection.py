"""Maps features of any dimension D to points in a plane, and names the axes after the mapping.

D = 1 is drawn against the class, and D = 2 is drawn directly. For D > 2, a PCA fitted on the train features projects
train features, test features and centers alike, so that a center lies among the points of its class.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from sklearn.decomposition import PCA


@dataclasses.dataclass(frozen=True)
class Plane:
    """A mapping of features [N, D] and labels [N] to points [N, 2], with the names of both axes."""

    points: Callable[[np.ndarray, np.ndarray], np.ndarray]
    axis_names: tuple[str, str]
    origin: np.ndarray  # [2], the point of features that are 0
    dimensions: int  # D


def plane_of(train_features: np.ndarray) -> Plane:
    """Returns the plane for train features [N, D]. A feature that is not finite becomes NaN."""
    dimensions = train_features.shape[1]
    if dimensions == 1:
        return Plane(_against_class, ('feature 1', 'class'), np.zeros(2), dimensions)
    if dimensions == 2:
        return Plane(_unchanged, ('feature 1', 'feature 2'), np.zeros(2), dimensions)

    finite = train_features[np.isfinite(train_features).all(axis=1)].astype(np.float64)
    if len(finite) < 2:
        return Plane(_nowhere, ('PCA 1', 'PCA 2'), np.zeros(2), dimensions)
    with np.errstate(invalid='ignore'):  # equal features have no variance, and its shares are 0 / 0
        pca = PCA(n_components=2).fit(finite)
    mean, components = np.asarray(pca.mean_), np.asarray(pca.components_)

    def points(features: np.ndarray, _: np.ndarray) -> np.ndarray:
        return (_or_nan(features) - mean) @ components.T  # pca.transform raises on NaN

    shares = ['no' if np.isnan(s) else f'{100 * s:.0f} % of' for s in pca.explained_variance_ratio_]
    first, second = (f'PCA {i} ({share} variance)' for i, share in enumerate(shares, start=1))
    return Plane(points, (first, second), -components @ mean, dimensions)


def _unchanged(features: np.ndarray, _: np.ndarray) -> np.ndarray:
    return _or_nan(features)


def _against_class(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.stack([_or_nan(features)[:, 0], labels], axis=1)


def _nowhere(features: np.ndarray, _: np.ndarray) -> np.ndarray:
    return np.full((len(features), 2), np.nan)


def _or_nan(features: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(features), features, np.nan).astype(np.float64)
