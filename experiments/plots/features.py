"""Figures of features and class centers, as in the paper's Fig. 2.

`draw_features` draws one epoch of several training runs ("arms") side by side. `animate_features` draws all of their
epochs. `panel.py` draws each picture and holds the colours. Up to 100 classes are named beside their points, so that no
reader depends on colour.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba_array
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image

from experiments.launch.atomic_files import draft, save_figure
from experiments.plots.fonts import fitted
from experiments.plots.panel import PALETTE, Panel, numbers_of, window_of
from experiments.plots.projection import Plane, plane_of
from experiments.train.snapshots import Snapshot

MAX_FRAMES = 60
FRAME, REST = 150, 2500  # milliseconds of a frame, and of the last one

# What the pictures show, for readers who have not read the paper.
CAPTION = (
    'Each dot is an {example}, at the features that the network computes from it. Colours are classes, white dots '
    'their centers. A classifier needs classes apart; the center loss makes each of them tight, too.'
)


def draw_features(
    path: Path, arms: dict[str, Snapshot], class_names: Sequence[str], *, title: str, kind: str = 'images'
) -> Figure:
    """Writes a figure with a column for each arm, train set above test set, and returns it.

    The caption calls the dots by `kind`, 'images' or 'examples'.
    """
    planes = [plane_of(snapshot.train_features) for snapshot in arms.values()]
    figure, grid = _figure(planes, title, kind, rows=2, panel_inches=4.2, dpi=140)
    for column, plane, (arm, snapshot) in zip(grid.T, planes, arms.items(), strict=True):
        window = window_of(plane, [snapshot], ('train', 'test'))
        Panel(column[0], plane, window, class_names).show(snapshot, 'train', f'{arm}, train set')
        Panel(column[1], plane, window, class_names).show(snapshot, 'test', f'{arm}, test set\n{numbers_of(snapshot)}')
    _freeze_layout(figure)
    save_figure(path, figure)
    return figure


def animate_features(
    path: Path, history: dict[str, list[Snapshot]], class_names: Sequence[str], *, title: str, kind: str = 'images'
) -> None:
    """Writes a GIF of the test set over the epochs, with the arms side by side and constant axis limits.

    Only the last snapshot of each arm needs train features. The projection is fitted on them.
    """
    planes = [plane_of(snapshots[-1].train_features) for snapshots in history.values()]
    figure, grid = _figure(planes, title, kind, rows=1, panel_inches=3.9, dpi=100)
    canvas = FigureCanvasAgg(figure)
    panels = [
        Panel(axes, plane, window_of(plane, snapshots, ('test',)), class_names)
        for axes, plane, snapshots in zip(grid[0], planes, history.values(), strict=True)
    ]

    epochs = list(zip(*history.values(), strict=True))
    frames = []
    for index in np.unique(np.linspace(0, len(epochs) - 1, MAX_FRAMES).round().astype(int)):
        for panel, arm, snapshot in zip(panels, history, epochs[index], strict=True):
            panel.show(snapshot, 'test', f'{arm}\nepoch {snapshot.epoch}, test set\n{numbers_of(snapshot)}')
        if not frames:
            _freeze_layout(figure)
        canvas.draw()
        frames.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]))

    palette = _gif_palette()
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [FRAME] * (len(frames) - 1) + [REST]
    with draft(path) as file:
        frames[0].save(file, 'GIF', save_all=True, append_images=frames[1:], duration=durations, loop=0)


def _figure(
    planes: Sequence[Plane], title: str, kind: str, *, rows: int, panel_inches: float, dpi: int
) -> tuple[Figure, np.ndarray]:
    """Returns an empty figure and its axes `[rows, planes]`, with a column for each plane."""
    columns = len(planes)
    size = (panel_inches * columns, (panel_inches + 0.35) * rows + 0.6)
    figure = Figure(figsize=size, dpi=dpi, layout=ConstrainedLayoutEngine(h_pad=0.1))
    title, families = fitted(title)
    figure.suptitle(title, fontsize=12, fontweight='bold', fontfamily=families, parse_math=False, wrap=True)
    caption = CAPTION.format(example=kind.removesuffix('s'))
    if columns > 1:
        caption += ' The arms have different axes.'
    caption = textwrap.fill(caption, int(11 * size[0]))  # characters of the caption in an inch
    if any(plane.dimensions > 2 for plane in planes):
        caption += '\nEach arm is projected by a PCA, fitted on its train features.'
    figure.supxlabel(caption, fontsize=9, color='0.35')
    return figure, figure.subplots(rows, columns, squeeze=False)


def _freeze_layout(figure: Figure) -> None:
    """Lays out the panels once, so that they do not move between frames."""
    layout = figure.get_layout_engine()
    assert layout is not None
    for _ in range(2):  # the first pass places the headings, the second reserves space for them
        layout.execute(figure)
    figure.set_layout_engine('none')


def _gif_palette() -> Image.Image:
    """Returns a palette of greys, and of each class colour at the strengths that overlapping points produce."""
    strengths = np.array([0.15, 0.3, 0.45, 0.55, 0.7, 0.8, 0.9, 1.0])[:, None, None]
    points = 255 * (1 - strengths * (1 - to_rgba_array(PALETTE)[:, :3]))  # [8, 10, 3]
    greys = np.repeat(np.linspace(0, 255, 32), 3)
    palette = Image.new('P', (1, 1))
    palette.putpalette(np.append(points, greys).round().astype(np.uint8).tobytes())
    return palette
