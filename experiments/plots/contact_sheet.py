"""A contact sheet: many small images with a caption below each, to check the labels that a network gave them."""

import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.launch.atomic_files import save_figure
from experiments.plots.fonts import fitted

# More images than this would be too small to recognise.
MAX_IMAGES = 60
IMAGES_PER_ROW = 10


def draw_contact_sheet(
    path: Path, images: np.ndarray, captions: list[str], doubtful: np.ndarray, *, title: str
) -> Figure:
    """Writes a contact sheet and returns its figure.

    Args:
        path: The PNG file to write.
        images: `[N, H, W, K]` uint8. Of more than `MAX_IMAGES`, an evenly spaced selection is shown.
        captions: A caption for each image.
        doubtful: `[N]` bool, the images to frame.
        title: The title; the number of images is added if not all are shown.
    """
    shown = np.unique(np.linspace(0, len(images) - 1, min(MAX_IMAGES, len(images))).round().astype(int))
    rows = math.ceil(len(shown) / IMAGES_PER_ROW)
    figure = Figure(figsize=(1.25 * IMAGES_PER_ROW, 1.6 * rows + 0.8), dpi=100, layout='constrained')
    if len(shown) < len(images):
        title += f' ({len(shown)} of {len(images)} images)'
    title, families = fitted(title)
    figure.suptitle(title, fontsize=12, fontweight='bold', fontfamily=families, parse_math=False, wrap=True)
    for axes in figure.subplots(rows, IMAGES_PER_ROW, squeeze=False).flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for axes, index in zip(figure.axes, shown, strict=False):
        image = images[index]
        axes.imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap='gray', vmin=0, vmax=255)
        color = '#c04f00' if doubtful[index] else '0.15'
        caption, families = fitted(captions[index])
        axes.set_xlabel(caption, fontsize=8, color=color, fontfamily=families, parse_math=False)
        if doubtful[index]:
            axes.spines[:].set(visible=True, color=color, linewidth=2.5)
    save_figure(path, figure)
    return figure
