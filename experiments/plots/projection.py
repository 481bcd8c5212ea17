"""How features of any dimension become points in a picture. Which way was taken is named on the axes.

Two dimensions are drawn as they are, one against the class. More than two are never cut to the first two
columns, which are no better than any other two: they go through one linear projection, a PCA fitted on the
train features, so that test points and centers lie in the same plane, a center inside its cloud.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from sklearn.decomposition import PCA


@dataclasses.dataclass(frozen=True)
class Plane:
    """How features [N, D] and their labels [N] become points [N, 2], and what the two axes are called."""

    points: Callable[[np.ndarray, np.ndarray], np.ndarray]
    axis_names: tuple[str, str]
    origin: np.ndarray  # [2], where features of zero lie
    dimensions: int  # D


def plane_of(train_features: np.ndarray) -> Plane:
    """The plane for features like these [N, D]. Features that are not finite become points that are not."""
    dimensions = train_features.shape[1]
    if dimensions == 1:
        return Plane(_against_class, ('feature 1', 'class'), np.zeros(2), dimensions)
    if dimensions == 2:
        return Plane(_as_they_are, ('feature 1', 'feature 2'), np.zeros(2), dimensions)

    finite = train_features[np.isfinite(train_features).all(axis=1)].astype(np.float64)
    if len(finite) < 2:
        return Plane(_nowhere, ('PCA 1', 'PCA 2'), np.zeros(2), dimensions)
    with np.errstate(invalid='ignore'):  # features that coincide have no variance to share out: 0 / 0
        pca = PCA(n_components=2).fit(finite)
    mean, components = np.asarray(pca.mean_), np.asarray(pca.components_)

    def points(features: np.ndarray, _: np.ndarray) -> np.ndarray:
        return (_or_nan(features) - mean) @ components.T  # pca.transform would refuse NaN

    shares = ['no' if np.isnan(s) else f'{100 * s:.0f} % of' for s in pca.explained_variance_ratio_]
    first, second = (f'PCA {i} ({share} variance)' for i, share in enumerate(shares, start=1))
    return Plane(points, (first, second), -components @ mean, dimensions)


def _as_they_are(features: np.ndarray, _: np.ndarray) -> np.ndarray:
    return _or_nan(features)


def _against_class(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.stack([_or_nan(features)[:, 0], labels], axis=1)


def _nowhere(features: np.ndarray, _: np.ndarray) -> np.ndarray:
    return np.full((len(features), 2), np.nan)


def _or_nan(features: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(features), features, np.nan).astype(np.float64)
