"""The benchmark as one picture: time of a step against the number of classes, a panel a batch size."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments.launch.atomic_files import save_figure

# Told apart by colour, line and marker, so that print and the colour-blind lose nothing (Okabe and Ito's colours).
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
    """Draws the rows of the first allocator."""
    rows = [row for row in rows if row['allocator'] == rows[0]['allocator']]
    sizes = sorted({row['batch_size'] for row in rows})
    figure = Figure(figsize=(3.6 * len(sizes) + 1.2, 3.8), layout='constrained')
    panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    arms = {**ARM_STYLES, **{row['arm']: OTHER for row in rows if row['arm'] not in ARM_STYLES}}
    for panel, size in zip(panels, sizes, strict=True):
        for arm, (colour, line, marker) in arms.items():
            own = [row for row in rows if row['arm'] == arm and row['batch_size'] == size]
            if own:
                classes, seconds = [row['num_classes'] for row in own], [row['step_seconds'] * 1e3 for row in own]
                panel.plot(classes, seconds, line, color=colour, marker=marker, markersize=5, label=arm)
        ours = [row for row in rows if row['arm'] == 'centerloss_jax' and row['batch_size'] == size]
        floor = [row['step_seconds'] * 1e3 / row['times_copy'] for row in ours]
        classes = [row['num_classes'] for row in ours]
        panel.plot(classes, floor, ':', color='#444444', marker='_', linewidth=0.8)
        below: Any = {'xytext': (0, -3), 'textcoords': 'offset points', 'va': 'top'}
        panel.annotate('5 B D floats at copy speed', (classes[0], min(floor)), fontsize=7, **below)
        panel.set(xscale='log', yscale='log', xlabel='classes C', title=f'B = {size:,}')
        panel.grid(alpha=0.3)
    panels[0].set_ylabel('milliseconds a step')
    handles = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc='outside right center', fontsize=8, frameon=False)
    save_figure(path, figure, dpi=150)
