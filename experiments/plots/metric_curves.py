"""The columns of metrics.csv against the epoch: a small figure for each column, with a line for each arm."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from experiments.plots.curves import STYLES
from experiments.plots.measures import format_value

NOT_DRAWN = ('epoch', 'arm', 'epoch_seconds', 'steps_per_second')


def metric_figures(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """Draws each column of `metrics` against the epoch.

    Args:
        metrics: Rows with `epoch`, `arm` and columns of numbers. A missing value may be None or NaN.

    Returns:
        A figure for each column that has a finite value other than 0, by the name of the column.
    """
    columns = [name for name in dict.fromkeys(key for row in metrics for key in row) if name not in NOT_DRAWN]
    return {name: _draw_column(name, metrics) for name in columns if np.any(np.nan_to_num(_values(metrics, name)))}


def _draw_column(column: str, metrics: Sequence[Mapping[str, Any]]) -> Figure:
    arms = list(dict.fromkeys(row['arm'] for row in metrics))
    figure = Figure(figsize=(3.4, 2.1 + 0.2 * len(arms)), dpi=200, layout='constrained')
    axes = figure.subplots()
    for place, arm in enumerate(arms):
        rows = [row for row in metrics if row['arm'] == arm]
        values = _values(rows, column)
        color, style = STYLES[place % len(STYLES)]
        last = values[np.isfinite(values)][-1:].tolist()
        label = f'{arm}: {format_value(last[0], column)}' if last else arm
        # The marker shows a value whose neighbours are missing.
        epochs = [row['epoch'] for row in rows]
        (line,) = axes.plot(epochs, values, '.', linestyle=style, color=color, markersize=4, label=label)
        line.set_clip_on(False)  # at 100 % a line lies on the frame
    axes.set_xlabel('epoch')
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
    axes.tick_params(labelsize=9)
    axes.grid(color='0.92')
    _scale(figure, column, _values(metrics, column))
    for text in figure.legend(loc='outside lower left', fontsize=9, frameon=False).get_texts():
        text.set_parse_math(False)
    return figure


def _scale(figure: Figure, column: str, values: np.ndarray) -> None:
    """Makes the y axis logarithmic for values of several magnitudes, and keeps it from enlarging rounding noise."""
    (axes,) = figure.axes
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if 0 < 20 * low < high:
        axes.set_yscale('log')
        return
    if high - low < 0.01 * abs(high):
        axes.set_ylim(low - 0.01 * abs(high), high + 0.01 * abs(high))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    if column.endswith('accuracy'):
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        if high <= 1 < axes.get_ylim()[1]:
            axes.set_ylim(top=1)
    else:
        axes.ticklabel_format(axis='y', useOffset=False)


def _values(rows: Sequence[Mapping[str, Any]], column: str) -> np.ndarray:
    """Returns a column in float64, with NaN for each value that is missing or not finite."""
    values = [row.get(column) for row in rows]
    return np.array([v if isinstance(v, int | float) and math.isfinite(v) else math.nan for v in values], np.float64)
