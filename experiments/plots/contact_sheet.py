"""A sheet of small pictures with a line below each, to see at a glance what a network took them for."""

import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.launch.atomic_files import save_figure

# Pictures on a sheet: more are too small to be recognised.
MAX_IMAGES = 60
IMAGES_A_ROW = 10


def draw_contact_sheet(
    path: Path, images: np.ndarray, captions: list[str], doubtful: np.ndarray, *, title: str
) -> Figure:
    """Writes images `[N, H, W, K]` with their captions, those that are doubtful `[N]` in a frame; returns the figure.

    Of many images some from all over are shown, and the title says so.
    """
    shown = np.unique(np.linspace(0, len(images) - 1, min(MAX_IMAGES, len(images))).round().astype(int))
    rows = math.ceil(len(shown) / IMAGES_A_ROW)
    figure = Figure(figsize=(1.25 * IMAGES_A_ROW, 1.6 * rows + 0.8), dpi=100, layout='constrained')
    if len(shown) < len(images):
        title += f' ({len(shown)} of {len(images)} images)'
    figure.suptitle(title, fontsize=12, fontweight='bold', parse_math=False, wrap=True)
    for axes in figure.subplots(rows, IMAGES_A_ROW, squeeze=False).flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for axes, place in zip(figure.axes, shown, strict=False):
        image = images[place]
        axes.imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap='gray', vmin=0, vmax=255)
        color = '#c04f00' if doubtful[place] else '0.15'
        axes.set_xlabel(captions[place], fontsize=8, color=color, parse_math=False)
        if doubtful[place]:
            axes.spines[:].set(visible=True, color=color, linewidth=2.5)
    save_figure(path, figure)
    return figure
