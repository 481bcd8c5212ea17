"""Where to name the classes in a picture of their points, so that no name is taken for another class's."""

from collections.abc import Sequence

import numpy as np

# Angles from the first choice, straight outwards.
_COMPASS = np.pi * np.array([0, 0.25, -0.25, 0.5, -0.5, 0.75, -0.75, 1])


def place_labels(
    clouds: Sequence[np.ndarray], sizes: np.ndarray, window: np.ndarray, *, gap: float
) -> list[np.ndarray | None]:
    """Places the labels of C classes, each beside its points and nearer to them than to any other class's.

    The first choice is outwards of its points, seen from the origin, the last one among them. A place where a
    label stands already is none.

    Args:
      clouds: For each class its points [n, 2].
      sizes: Width and height of each label, [C, 2].
      window: The limits within which to stay, [[left, right], [bottom, top]].
      gap: Between a cloud and its label.

    Returns:
      For each class the middle of its label [2], or None where there is no good place.
    """
    middles = np.stack([cloud.mean(axis=0) for cloud in clouds])
    places: list[np.ndarray | None] = []
    taken = np.empty((0, 2, 2))  # middles and sizes
    for c, (cloud, size) in enumerate(zip(clouds, sizes, strict=True)):
        angles = np.arctan2(middles[c, 1], middles[c, 0]) + _COMPASS
        directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)  # [8, 2]
        edges = np.quantile((cloud - middles[c]) @ directions.T, 0.97, axis=0)  # [8]
        reach = np.stack([edges, np.zeros(8)]) + np.abs(directions) @ size / 2 + gap  # [2, 8]
        choices = (middles[c] + reach[..., None] * directions).reshape(16, 2)

        distances = np.linalg.norm(choices[:, None] - middles, axis=2)  # [16, C]
        own = np.nan_to_num(distances, nan=np.inf).argmin(axis=1) == c
        inside = np.all((choices - size / 2 > window[:, 0]) & (choices + size / 2 < window[:, 1]), axis=1)
        apart = np.abs(choices[:, None] - taken[:, 0]) > (taken[:, 1] + size) / 2  # [16, taken, 2]
        good = choices[own & inside & apart.any(axis=2).all(axis=1)]
        places.append(good[0] if len(good) else None)
        if len(good):
            taken = np.concatenate([taken, [[good[0], size]]])
    return places
