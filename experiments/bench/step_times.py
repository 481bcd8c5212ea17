"""The benchmark as a picture: time of a step against the number of classes, with a panel for each batch size."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments.launch.atomic_files import save_figure

# Okabe and Ito's colours. Line styles and markers differ too, for print and for colour-blind readers.
ARM_STYLES = {
    'centerloss_jax': ('#000000', '-', 'o'),
    'torch, B x C matrix': ('#D55E00', '--', 's'),
    'torch, autograd': ('#CC79A7', '--', '^'),
    'torch, sparse SGD': ('#0072B2', ':', 'D'),
    'torch, index_add_': ('#009E73', '-.', 'v'),
    'torch, compiled': ('#E69F00', '-.', 'P'),
    'mesh, replicated': ('#56B4E9', '-', '<'),
    'mesh, by rows': ('#999999', '-', '>'),
    'pmap': ('#F0E442', '-', 'X'),
}
OTHER = ('#56B4E9', '-', '<')  # the mesh that --mesh names


def draw_step_times(path: Path, rows: list[dict[str, Any]]) -> None:
    """Draws the rows of benchmark.csv whose step is the center loss."""
    sizes = sorted({row['batch_size'] for row in rows})
    figure = Figure(figsize=(3.6 * len(sizes) + 1.2, 3.8), layout='constrained')
    panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    arms = {**ARM_STYLES, **{row['arm']: OTHER for row in rows if row['arm'] not in ARM_STYLES}}
    for panel, size in zip(panels, sizes, strict=True):
        for arm, (colour, line, marker) in arms.items():
            points = [row for row in rows if row['arm'] == arm and row['batch_size'] == size]
            if points:
                classes = [row['num_classes'] for row in points]
                milliseconds = [row['step_seconds'] * 1e3 for row in points]
                panel.plot(classes, milliseconds, line, color=colour, marker=marker, markersize=5, label=arm)
        ours = [row for row in rows if row['arm'] == 'centerloss_jax' and row['batch_size'] == size]
        copy = [row['step_seconds'] * 1e3 / row['times_copy'] for row in ours]
        classes = [row['num_classes'] for row in ours]
        panel.plot(classes, copy, ':', color='#444444', marker='_', linewidth=0.8)
        # A step may beat this line where its arrays fit into the cache: with few classes, on the left.
        offset: Any = {'xytext': (0, -3), 'textcoords': 'offset points', 'va': 'top', 'ha': 'right'}
        panel.annotate('5 B D floats at copy speed', (classes[-1], min(copy)), fontsize=7, **offset)
        panel.set(xscale='log', yscale='log', xlabel='classes C', title=f'B = {size:,}')
        panel.grid(alpha=0.3)
    panels[0].set_ylabel('milliseconds per step')
    handles = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc='outside right center', fontsize=8, frameon=False)
    save_figure(path, figure, dpi=150)
