"""Line charts of metrics over epochs, as the geometry of small SVG drawings.

A page that draws them itself, instead of embedding pictures of them, can give them its own text, its colours
for light and dark, and one column on a phone.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.ticker import LogLocator, MaxNLocator

WIDTH, HEIGHT = 320, 180
LEFT, RIGHT, TOP, BOTTOM = 46, 312, 8, 156

NOT_CHARTED = ('epoch', 'arm', 'seconds', 'steps_per_second')


@dataclasses.dataclass(frozen=True)
class Curve:
    arm: str
    path: str  # the `d` of an SVG path
    last: float | None


@dataclasses.dataclass(frozen=True)
class Chart:
    column: str
    logarithmic: bool
    x_ticks: list[tuple[float, float]]  # position in the drawing, value
    y_ticks: list[tuple[float, float]]
    curves: list[Curve]


def charts(metrics: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """A chart for each column of metrics rows, unless it is empty or all 0. Rows have `epoch` and `arm`."""
    columns = [c for c in dict.fromkeys(key for row in metrics for key in row) if c not in NOT_CHARTED]
    return [_chart(c, metrics) for c in columns if any(_finite(row.get(c)) for row in metrics)]


def _chart(column: str, metrics: Sequence[Mapping[str, Any]]) -> Chart:
    values = [v for row in metrics if (v := _finite(row.get(column))) is not None]
    low, high = min(values), max(values)
    logarithmic = low > 0 and high > 20 * low
    scale = math.log10 if logarithmic else float
    if logarithmic:
        low, high = low / 1.2, high * 1.2
        ticks = LogLocator(subs=(1, 3) if high < 1000 * low else (1,), numticks=6).tick_values(low, high)
    else:  # values that are all but equal get an axis that does not blow up their noise
        ticks = MaxNLocator(4).tick_values(low, max(high, low + 1e-2 * abs(low)) if low else max(high, 1e-9))
        low, high = ticks[0], ticks[-1]
    y_range = (scale(low), scale(high))

    epochs = [row['epoch'] for row in metrics]
    x_range = (min(epochs), max(epochs))
    x_ticks = MaxNLocator(5, integer=True).tick_values(*x_range)

    def x(epoch: float) -> float:
        return _between(epoch, *x_range, LEFT, RIGHT)

    def y(value: float) -> float:
        return _between(scale(value), *y_range, BOTTOM, TOP)

    curves = []
    for arm in dict.fromkeys(row['arm'] for row in metrics):
        points = [(row['epoch'], _finite(row.get(column))) for row in metrics if row['arm'] == arm]
        path, pen_down = '', False
        for epoch, value in points:
            if value is not None:
                place = f'{x(epoch):.1f} {y(value):.1f}'
                path += f'L{place}' if pen_down else f'M{place}h0'  # h0: a point that stands alone is a dot
            pen_down = value is not None
        last = [value for _, value in points if value is not None][-1:]
        if last:
            curves.append(Curve(str(arm), path, last[0]))
    return Chart(
        column,
        logarithmic,
        [(x(t), t) for t in sorted({*map(float, x_ticks)}) if x_range[0] <= t <= x_range[1]],
        [(y(t), t) for t in map(float, ticks) if low <= t <= high],
        curves,
    )


def _finite(value: float | None) -> float | None:
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _between(value: float, low: float, high: float, start: float, end: float) -> float:
    return start + (end - start) * (value - low) / (high - low) if high > low else (start + end) / 2
