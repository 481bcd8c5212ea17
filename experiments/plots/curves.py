"""Curves of means over seeds within their 95 % intervals: two arms that differ by less than seeds do must look so."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from experiments.launch.atomic_files import save_figure
from experiments.train.metrics import FARS, Interval, Roc, interval

# Colours that the colour-blind can tell apart, and a line style for each.
STYLES = (
    ('#0072b2', '-'),
    ('#c04f00', '--'),
    ('#007a5a', '-.'),
    ('#a8487f', ':'),
    ('#777777', (0, (5, 1, 1, 1, 1, 1))),
)


def draw_roc(path: Path, arms: Mapping[str, Sequence[Roc]], *, title: str) -> Figure:
    """Writes a picture of the curves of some arms, each the mean of its seeds; returns the figure."""
    figure = Figure(figsize=(6.4, 5.6), dpi=140, layout='constrained')
    figure.suptitle(title, fontsize=12, fontweight='bold', parse_math=False, wrap=True)
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
    axes.legend(loc='upper left', frameon=False)
    figure.supxlabel(_caption(seeds), fontsize=9, color='0.35')
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
    """Writes a picture of some measures against the weight and against alpha; returns the figure.

    Args:
        path: the PNG file to write.
        measures: by name, the interval for each (weight, alpha).
        softmax: by name, the interval of softmax alone, drawn as a band.
        seeds: how many there were.
        title: what was swept.
    """
    figure = Figure(figsize=(10, 3.1 * len(measures) + 0.8), dpi=120, layout='constrained')
    figure.suptitle(title, fontsize=12, fontweight='bold', parse_math=False, wrap=True)
    grid = figure.subplots(len(measures), 2, squeeze=False, sharey='row', sharex='col')
    names = ('weight lambda of the center loss', 'step alpha of the centers')
    for row, (measure, values) in zip(grid, measures.items(), strict=True):
        row[0].set_ylabel(measure)
        for of, (axes, name) in enumerate(zip(row, names, strict=True)):
            _lines(axes, values, of)
            reference = softmax[measure]
            axes.axhline(reference.mean, color='0.35', linewidth=1.2, label='softmax alone')
            axes.axhspan(reference.low, reference.high, color='0.5', alpha=0.15, linewidth=0)
            if axes in grid[-1]:
                axes.set_xlabel(name)
            axes.grid(color='0.92')
    for axes in grid[0]:
        axes.legend(fontsize=8, frameon=False, loc='lower center', bbox_to_anchor=(0.5, 1), ncols=3)
    figure.supxlabel(_caption(seeds), fontsize=9, color='0.35')
    save_figure(path, figure)
    return figure


def _lines(axes: Axes, values: Mapping[tuple[float, float], Interval], of: int) -> None:
    """A line for each value of the other setting, moved a little aside so that none hides the bars of another."""
    others = sorted({setting[1 - of] for setting in values})
    symbol = ('alpha', 'lambda')[of]
    for place, other in enumerate(others):
        color, style = STYLES[place % len(STYLES)]
        points = sorted((setting[of], value) for setting, value in values.items() if setting[1 - of] == other)
        aside = 1.06 ** (place - (len(others) - 1) / 2)
        x = np.array([setting for setting, _ in points]) * aside
        means = [value.mean for _, value in points]
        bars = [value.half_width for _, value in points]
        axes.errorbar(x, means, bars, color=color, linestyle=style, capsize=2, label=f'{symbol} = {other:g}')
    settings = sorted({setting[of] for setting in values})
    if min(settings) > 0:
        axes.set_xscale('log')
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_locator(LogLocator())
    axes.set_xticks(settings, [f'{setting:g}' for setting in settings])


def _band(axes: Axes, x: np.ndarray, points: Sequence[Interval], color: str) -> None:
    low, high = ([getattr(point, bound) for point in points] for bound in ('low', 'high'))
    axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)


def _caption(seeds: int) -> str:
    return f'Means of {seeds} seeds and their 95 % intervals.' if seeds > 1 else 'One seed: no interval.'
