"""Pictures of features and their class centers: the way in which the paper shows what the center loss does.

`draw_features` draws one moment of some training runs ("arms") side by side, `animate_features` all of their
epochs. Classes are told apart by names at their points; colour only helps.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba_array
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image

from experiments.launch.atomic_files import draft, save_figure
from experiments.plots.panel import PALETTE, Panel, numbers_of, window_of
from experiments.plots.projection import Plane, plane_of
from experiments.train.snapshots import Snapshot

MAX_FRAMES = 60


def draw_features(path: Path, arms: dict[str, Snapshot], class_names: Sequence[str], *, title: str) -> Figure:
    """Writes a picture with a column for each arm, its train set above its test set; returns the figure."""
    planes = [plane_of(snapshot.train_features) for snapshot in arms.values()]
    figure, grid = _figure(planes, title, rows=2, panel_inches=4.2, dpi=140)
    for column, plane, (arm, snapshot) in zip(grid.T, planes, arms.items(), strict=True):
        window = window_of(plane, [snapshot], ('train', 'test'))
        Panel(column[0], plane, window, class_names).show(snapshot, 'train', f'{arm}, train set')
        Panel(column[1], plane, window, class_names).show(snapshot, 'test', f'{arm}, test set\n{numbers_of(snapshot)}')
    _lay_out_for_good(figure)
    save_figure(path, figure)
    return figure


def animate_features(path: Path, history: dict[str, list[Snapshot]], class_names: Sequence[str], *, title: str) -> None:
    """Writes a GIF of the test set through the epochs, the arms side by side, in windows that stand still.

    Train features are asked of each arm's last snapshot only, for the projection; the others may have none.
    """
    planes = [plane_of(snapshots[-1].train_features) for snapshots in history.values()]
    figure, grid = _figure(planes, title, rows=1, panel_inches=3.9, dpi=100)
    canvas = FigureCanvasAgg(figure)
    panels = [
        Panel(axes, plane, window_of(plane, snapshots, ('test',)), class_names)
        for axes, plane, snapshots in zip(grid[0], planes, history.values(), strict=True)
    ]

    moments = list(zip(*history.values(), strict=True))
    frames = []
    for index in np.unique(np.linspace(0, len(moments) - 1, MAX_FRAMES).round().astype(int)):
        for panel, arm, snapshot in zip(panels, history, moments[index], strict=True):
            panel.show(snapshot, 'test', f'{arm}\nepoch {snapshot.epoch}, test set\n{numbers_of(snapshot)}')
        if not frames:
            _lay_out_for_good(figure)
        canvas.draw()
        frames.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]))

    palette = _gif_palette()
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    # It goes round, and begins at its end: what shows one frame only shows what came out.
    frames = [frames[-1], *frames[:-1]]
    durations = [2000] + [150] * (len(frames) - 1)  # milliseconds
    with draft(path) as file:
        frames[0].save(file, 'GIF', save_all=True, append_images=frames[1:], duration=durations, loop=0)


def _figure(
    planes: Sequence[Plane], title: str, *, rows: int, panel_inches: float, dpi: int
) -> tuple[Figure, np.ndarray]:
    """An empty figure with `rows` panels [rows, planes] for each plane."""
    columns = len(planes)
    size = (panel_inches * columns, (panel_inches + 0.35) * rows + 0.6)
    figure = Figure(figsize=size, dpi=dpi, layout=ConstrainedLayoutEngine(h_pad=0.1))
    figure.suptitle(title, fontsize=12, fontweight='bold', parse_math=False, wrap=True)
    caption = 'White dots are the class centers.'
    if any(plane.dimensions > 2 for plane in planes):
        caption += '\nEach arm: one linear PCA, fitted on its train features.'
    figure.supxlabel(caption, fontsize=9, color='0.35')
    return figure, figure.subplots(rows, columns, squeeze=False)


def _lay_out_for_good(figure: Figure) -> None:
    """Places the panels, which then stand still."""
    for _ in range(2):  # the first layout moves the headings, the second makes room for them there
        figure.draw_without_rendering()
    figure.set_layout_engine('none')


def _gif_palette() -> Image.Image:
    """Greys, and the class colours as strong as overlapping points make them: none is lost to the text."""
    strengths = np.array([0.15, 0.3, 0.45, 0.55, 0.7, 0.8, 0.9, 1.0])[:, None, None]
    points = 255 * (1 - strengths * (1 - to_rgba_array(PALETTE)[:, :3]))  # [8, 10, 3]
    greys = np.repeat(np.linspace(0, 255, 32), 3)
    palette = Image.new('P', (1, 1))
    palette.putpalette(np.append(points, greys).round().astype(np.uint8).tobytes())
    return palette
