"""Places class names in a figure of points, so that each name is closest to the points of its own class."""

from collections.abc import Sequence

import numpy as np

# Angles relative to the first choice, the direction away from the origin.
_COMPASS = np.pi * np.array([0, 0.25, -0.25, 0.5, -0.5, 0.75, -0.75, 1])


def place_labels(
    clouds: Sequence[np.ndarray], named: Sequence[int], sizes: np.ndarray, window: np.ndarray, *, gap: float
) -> list[np.ndarray | None]:
    """Places the labels of some classes, each nearest to the points of its class and apart from other labels.

    Tries places beside the points first, from the side away from the origin on, and then places among the points.

    Args:
      clouds: The points [n, 2] of each class.
      named: The K classes that have a label.
      sizes: Width and height of each label, [K, 2].
      window: The limits of the axes, [[left, right], [bottom, top]].
      gap: The distance between a cloud and its label.

    Returns:
      The middle [2] of each label, or None for a label that fits nowhere.
    """
    middles = np.stack([np.median(cloud, axis=0) for cloud in clouds])  # a few points far away do not move it
    places: list[np.ndarray | None] = []
    taken = np.empty((0, 2, 2))  # middles and sizes
    for c, size in zip(named, sizes, strict=True):
        cloud = clouds[c]
        angles = np.arctan2(middles[c, 1], middles[c, 0]) + _COMPASS
        directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)  # [8, 2]
        edges = np.quantile((cloud - middles[c]) @ directions.T, 0.95, axis=0)  # [8]
        radii = np.stack([edges, np.zeros(8)]) + np.abs(directions) @ size / 2 + gap  # [2, 8]
        choices = (middles[c] + radii[..., None] * directions).reshape(16, 2)

        distances = np.linalg.norm(choices[:, None] - middles, axis=2)  # [16, C]
        nearest = np.nan_to_num(distances, nan=np.inf).argmin(axis=1) == c
        inside = np.all((choices - size / 2 > window[:, 0]) & (choices + size / 2 < window[:, 1]), axis=1)
        apart = np.abs(choices[:, None] - taken[:, 0]) > (taken[:, 1] + size) / 2  # [16, taken, 2]
        good = choices[nearest & inside & apart.any(axis=2).all(axis=1)]
        places.append(good[0] if len(good) else None)
        if len(good):
            taken = np.concatenate([taken, [[good[0], size]]])
    return places
