"""Curves of means over seeds with 95 % intervals, so that a difference within the noise of the seeds looks like one."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from experiments.launch.atomic_files import save_figure
from experiments.metrics.held_out import FARS, Interval, Roc, interval
from experiments.plots.fonts import fitted
from experiments.plots.measures import seeds_note

# Colours that colour-blind readers can tell apart, each with a line style.
STYLES = (
    ('#0072b2', '-'),
    ('#c04f00', '--'),
    ('#007a5a', '-.'),
    ('#a8487f', ':'),
    ('#777777', (0, (5, 1, 1, 1, 1, 1))),
)

# What the pictures show, for readers who have not read the paper.
_ROC = (
    'A pair of images is accepted as one class if its features are similar enough.\n'
    'The higher the curve, the more pairs of one class are accepted\n'
    'at the same share of wrongly accepted pairs.'
)
_SWEEP = (
    'Each point is a network trained with one weight and one step size, evaluated on classes that it has seen and\n'
    'on classes that it has not. Accuracy and AUROC should be high, the ratio low: then classes are tight and apart.'
)


def draw_roc(path: Path, arms: Mapping[str, Sequence[Roc]], *, title: str) -> Figure:
    """Writes the ROC curves of several arms, each as the mean over its seeds, and returns the figure."""
    figure = Figure(figsize=(6.4, 5.6), dpi=140, layout='constrained')
    title, families = fitted(title)
    figure.suptitle(title, fontsize=12, fontweight='bold', fontfamily=families, parse_math=False, wrap=True)
    axes = figure.subplots()
    grid = np.logspace(np.log10(min(FARS)), 0, 200)
    seeds = max(map(len, arms.values()))
    for (color, style), (arm, curves) in zip(STYLES, arms.items(), strict=False):
        points = [interval(list(column)) for column in np.transpose([curve.tar_at(grid) for curve in curves])]
        axes.plot(grid, [point.mean for point in points], linestyle=style, color=color, linewidth=2, label=arm)
        _band(axes, grid, points, color)
    axes.plot(grid, grid, color='0.6', linewidth=1, label='chance')
    axes.set(xscale='log', xlim=(grid[0], 1), ylim=(0, 1), xlabel='false accept rate', ylabel='true accept rate')
    axes.grid(color='0.9')
    axes.legend(frameon=False, loc='lower center', bbox_to_anchor=(0.5, 1))
    figure.supxlabel(f'{_ROC}\n{seeds_note(seeds)}', fontsize=9, color='0.35')
    save_figure(path, figure)
    return figure


def draw_sweep(
    path: Path,
    measures: Mapping[str, Mapping[tuple[float, float], Interval]],
    softmax: Mapping[str, Interval],
    seeds: int,
    *,
    title: str,
) -> Figure:
    """Writes a figure of measures against the weight and against alpha, and returns it.

    Args:
        path: The PNG file to write.
        measures: By name, the interval for each (weight, alpha).
        softmax: By name, the interval of softmax alone, drawn as a band.
        seeds: The number of seeds.
        title: What was swept.
    """
    figure = Figure(figsize=(10, 3.1 * len(measures) + 0.8), dpi=120, layout='constrained')
    title, families = fitted(title)
    figure.suptitle(title, fontsize=12, fontweight='bold', fontfamily=families, parse_math=False, wrap=True)
    grid = figure.subplots(len(measures), 2, squeeze=False, sharey='row', sharex='col')
    labels = ('weight lambda of the center loss', 'step size alpha of the centers')
    for row, (measure, values) in zip(grid, measures.items(), strict=True):
        row[0].set_ylabel(measure)
        for setting, (axes, label) in enumerate(zip(row, labels, strict=True)):
            _lines(axes, values, setting)
            reference = softmax[measure]
            axes.axhline(reference.mean, color='0.35', linewidth=1.2, label='softmax alone')
            if seeds > 1:
                axes.axhspan(reference.low, reference.high, color='0.5', alpha=0.15, linewidth=0)
            if axes in grid[-1]:
                axes.set_xlabel(label)
            axes.grid(color='0.92')
        if max(value.mean for value in values.values()) <= 1 < row[0].get_ylim()[1]:
            row[0].set_ylim(top=1)  # an interval of shares may reach beyond 100 %
    for axes in grid[0]:
        axes.legend(fontsize=8, frameon=False, loc='lower center', bbox_to_anchor=(0.5, 1), ncols=3)
    figure.supxlabel(f'{_SWEEP} {seeds_note(seeds)}', fontsize=9, color='0.35')
    save_figure(path, figure)
    return figure


def draw_points(
    path: Path,
    values: Mapping[str, Mapping[str, Mapping[str, Interval]]],
    changes: Mapping[str, Mapping[str, Mapping[str, Interval]]],
    seeds: int,
    *,
    title: str,
    caption: str,
) -> Figure:
    """Writes a figure of points with their intervals, and returns it.

    Args:
        path: The PNG file to write.
        values: `{measure: {row: {series: interval}}}`. Each measure has a panel, each row a line, each series a colour.
        changes: Differences to another series in the same form, for a second row of panels, or empty.
        seeds: The number of seeds.
        title: What was compared.
        caption: What the picture shows.
    """
    rows = list(next(iter(values.values())))
    series = list(dict.fromkeys(name for panel in values.values() for row in panel.values() for name in row))
    shown = [(measure, panel, False) for measure, panel in values.items()]
    shown += [(f'change of {measure}', panel, True) for measure, panel in changes.items()]
    lines = len(shown) // len(values)
    figure = Figure(figsize=(10, (0.4 * len(rows) + 0.8) * lines + 1), dpi=120, layout='constrained')
    title, families = fitted(title)
    figure.suptitle(title, fontsize=12, fontweight='bold', fontfamily=families, parse_math=False, wrap=True)
    grid = figure.subplots(lines, len(values), squeeze=False, sharey=True)
    for axes, (label, panel, is_change) in zip(grid.flat, shown, strict=True):
        if is_change:
            axes.axvline(0, color='0.35', linewidth=1.2)
        for place, name in enumerate(series):
            points = [(number, panel[row][name]) for number, row in enumerate(rows) if name in panel[row]]
            y = [number + (place + 1) / (len(series) + 1) - 0.5 for number, _ in points]
            means, bars = [point.mean for _, point in points], [point.half_width for _, point in points]
            color, marker = STYLES[place % len(STYLES)][0], 'osD^v'[place % len(STYLES)]
            axes.errorbar(means, y, xerr=bars, color=color, linestyle='', marker=marker, capsize=2, label=name)
        axes.set_xlabel(label)
        axes.locator_params(axis='x', nbins=4)  # labels such as -0.015 stay apart
        axes.grid(color='0.92', axis='x')
    grid[0, 0].set_yticks(range(len(rows)), rows)
    grid[0, 0].invert_yaxis()
    grid[0, 0].legend(frameon=False, loc='lower left', bbox_to_anchor=(0, 1), ncols=5)
    figure.supxlabel(f'{caption} {seeds_note(seeds)}', fontsize=9, color='0.35')
    save_figure(path, figure)
    return figure


def _lines(axes: Axes, values: Mapping[tuple[float, float], Interval], setting: int) -> None:
    """Draws the values against setting 0 (weight) or 1 (alpha), with a line for each value of the other setting.

    Lines are shifted along x, so that their error bars do not overlap.
    """
    others = sorted({pair[1 - setting] for pair in values})
    symbol = ('alpha', 'lambda')[setting]
    for line, other in enumerate(others):
        color, style = STYLES[line % len(STYLES)]
        points = sorted((pair[setting], value) for pair, value in values.items() if pair[1 - setting] == other)
        shift = 1.06 ** (line - (len(others) - 1) / 2)
        x = np.array([place for place, _ in points]) * shift
        means = [value.mean for _, value in points]
        bars = [value.half_width for _, value in points]
        label = f'{symbol} = {other:g}'
        axes.errorbar(x, means, bars, color=color, linestyle=style, marker='o', markersize=4, capsize=2, label=label)
    ticks = sorted({pair[setting] for pair in values})
    if min(ticks) > 0:
        axes.set_xscale('log')
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_locator(LogLocator())
    axes.set_xticks(ticks, [f'{tick:g}' for tick in ticks])


def _band(axes: Axes, x: np.ndarray, points: Sequence[Interval], color: str) -> None:
    low, high = ([getattr(point, bound) for point in points] for bound in ('low', 'high'))
    axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
