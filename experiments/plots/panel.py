"""The train or test set of one arm on one pair of axes: points, class centers and class names."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba_array
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from experiments.plots.fonts import families_for
from experiments.plots.projection import Plane
from experiments.plots.text_placement import place_labels
from experiments.train.snapshots import Snapshot

MAX_POINTS = 4000
MAX_NAMED_CLASSES = 20
MAX_NUMBERS = 100  # of more classes, an evenly spaced selection is numbered
MAX_NAME_LENGTH = 11

# Paul Tol's "muted" scheme for colour-blind readers, with a darker grey for points.
PALETTE = (
    *('#CC6677', '#332288', '#DDCC77', '#117733', '#88CCEE'),
    *('#882255', '#44AA99', '#999933', '#AA4499', '#777777'),
)
_NO_CLASS = '#DDDDDD'


class Panel:
    """A pair of axes for one arm. `show` moves the artists instead of creating new ones, which makes frames cheap."""

    def __init__(self, axes: Axes, plane: Plane, window: np.ndarray, class_names: Sequence[str]):
        self.axes, self.plane, self.window = axes, plane, window
        names, num_classes = names_to_draw(class_names), len(class_names)
        families = families_for(names)
        self.colors = to_rgba_array([*(PALETTE[c % len(PALETTE)] for c in range(num_classes)), _NO_CLASS])

        axes.set(xlabel=plane.axis_names[0], ylabel=plane.axis_names[1], xlim=window[0], ylim=window[1])
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.spines[:].set_color('0.8')
        axes.tick_params(color='0.8', labelcolor='0.35')
        axes.axvline(plane.origin[0], color='0.88', linewidth=1, zorder=0)
        if plane.dimensions == 1:
            shown = range(0, num_classes, -(-num_classes // MAX_NAMED_CLASSES))
            axes.set_yticks(list(shown), [names[c] for c in shown], fontfamily=families, parse_math=False)
        else:
            axes.set_aspect('equal')
            axes.axhline(plane.origin[1], color='0.88', linewidth=1, zorder=0)

        few = num_classes <= MAX_NAMED_CLASSES
        self.label_size = 10 if few else 7
        self.named = range(0, num_classes, -(-num_classes // MAX_NUMBERS))
        self.points = axes.scatter([], [], linewidths=0, alpha=0.55, rasterized=True)
        self.centers = axes.scatter([], [], s=26 if few else 10, c='white', edgecolors='black', zorder=3)
        halo = withStroke(linewidth=2.5, foreground='white')
        style: dict[str, Any] = {'path_effects': [halo], 'parse_math': False, 'zorder': 4}
        style |= {'ha': 'center', 'va': 'center', 'fontfamily': families}
        self.labels = [] if plane.dimensions == 1 else [
            axes.text(0, 0, names[c], fontsize=self.label_size, fontweight='bold', **style) for c in self.named
        ]  # fmt: skip
        self.note = axes.text(0.5, 0.08, '', transform=axes.transAxes, fontsize=10, **style)

    def show(self, snapshot: Snapshot, split: str, heading: str) -> None:
        """Shows the `train` or `test` split of a snapshot."""
        features, labels = _split_of(snapshot, split)
        num_classes = len(snapshot.centers)
        finite = np.flatnonzero(np.isfinite(features).all(axis=1))
        drawn = np.random.default_rng(0).permutation(finite)[:MAX_POINTS]
        labels = labels[drawn]
        points = self.plane.points(features[drawn], labels)
        if self.plane.dimensions == 1:  # jitter, because the points of a class would hide each other
            points[:, 1] += np.random.default_rng(0).uniform(-0.35, 0.35, len(points))
        centers = self.plane.points(snapshot.centers, np.arange(num_classes))

        size = np.clip(5000 / max(len(points), 1), 4, 12)  # large enough for a few points
        self.points.set(offsets=points, sizes=[size], facecolor=self.colors[labels])
        self.centers.set_offsets(centers)
        self._place_names([points[labels == c] for c in range(num_classes)], centers, snapshot.collapsed)
        self.axes.set_title(heading, fontsize=10, parse_math=False)
        self.note.set_text(_note(snapshot, features))

    def _place_names(self, clouds: list[np.ndarray], centers: np.ndarray, collapsed: bool) -> None:
        em = self.label_size / 250 * np.ptp(self.window[0])  # a panel is about 250 points wide
        sizes = np.array([[0.7 * em * len(text.get_text()), em] for text in self.labels])
        clouds = [cloud if len(cloud) else centers[c : c + 1] for c, cloud in enumerate(clouds)]
        places = place_labels(clouds, self.named, sizes, self.window, gap=0.4 * em) if len(sizes) else []
        for text, place in zip(self.labels, places, strict=True):
            text.set(visible=place is not None and not collapsed, position=(0, 0) if place is None else place)


def window_of(plane: Plane, snapshots: Iterable[Snapshot], splits: Sequence[str]) -> np.ndarray:
    """Returns square limits [[left, right], [bottom, top]] for the points and centers of all snapshots."""
    clouds = []
    for snapshot in snapshots:
        clouds.append(plane.points(snapshot.centers, np.arange(len(snapshot.centers))))
        for split in splits:
            features, labels = _split_of(snapshot, split)
            clouds.append(plane.points(features, labels))
    if plane.dimensions <= 2:  # under a PCA the origin may be far from all points
        clouds.append(plane.origin[None])
    points = np.concatenate(clouds)
    points = points[np.isfinite(points).all(axis=1)]
    if not len(points):
        return np.array([[-1.0, 1.0], [-1.0, 1.0]])
    low, high = points.min(axis=0), points.max(axis=0)
    half = (high - low) / 2 if plane.dimensions == 1 else np.full(2, (high - low).max() / 2)
    half = np.where(half > 0, 1.1 * half, 1.0)
    middle = (low + high) / 2
    return np.stack([middle - half, middle + half], axis=1)


def _split_of(snapshot: Snapshot, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the features and labels of the `train` or `test` split, with C for each label outside of [0, C)."""
    features, labels = getattr(snapshot, f'{split}_features'), getattr(snapshot, f'{split}_labels')
    num_classes = len(snapshot.centers)
    return features, np.where((labels >= 0) & (labels < num_classes), labels, num_classes)


def names_to_draw(class_names: Sequence[str]) -> list[str]:
    """Returns shortened names, or class numbers if there are many classes, two are equal, or no font has them."""
    short = _shortened(class_names)
    if len(short) > MAX_NAMED_CLASSES or len(set(short)) < len(short) or families_for(short) is None:
        return [str(c) for c in range(len(short))]
    return short


def _shortened(class_names: Sequence[str]) -> list[str]:
    return [name if len(name) <= MAX_NAME_LENGTH else name[: MAX_NAME_LENGTH - 1] + '…' for name in class_names]


def legend(class_names: Sequence[str]) -> str:
    """Returns a sentence on what the numbers in a picture stand for, '' where it has names or too many numbers."""
    numbers = names_to_draw(class_names)
    if numbers == _shortened(class_names) or len(numbers) > MAX_NAMED_CLASSES:
        return ''
    pairs = (f'{number} is {name}' for number, name in zip(numbers, class_names, strict=True))
    return f' The numbers in the pictures are classes: {", ".join(pairs)}.'


def numbers_of(snapshot: Snapshot) -> str:
    """Returns the measures of the test set as text for a heading."""
    ratio = snapshot.intra_inter_ratio
    return (
        f'accuracy {100 * snapshot.test_accuracy:.1f} %, '
        f'nearest center {100 * snapshot.nearest_center_accuracy:.1f} %\n'
        f'intra/inter ratio {f"{ratio:.3g}" if np.isfinite(ratio) else "undefined"}'
    )


def _note(snapshot: Snapshot, features: np.ndarray) -> str:
    notes = ['collapsed: the features carry\nno information about the class'] if snapshot.collapsed else []
    for kind, rows in (('points', features), ('centers', snapshot.centers)):
        if count := np.sum(~np.isfinite(rows).all(axis=1)):
            notes.append(f'{count} of {len(rows)} {kind} are not finite')
    return '\n'.join(notes)
