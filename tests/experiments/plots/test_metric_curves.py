"""The charts of metrics over epochs: what is drawn, on which scale, and what the legend says."""

import math

import numpy as np
import pytest
from matplotlib.axes import Axes

from experiments.plots.metric_curves import metric_figures


def row(epoch: int, arm: str, **values: float | None) -> dict:
    return {'epoch': epoch, 'arm': arm, **values}


def axes_of(*rows: dict) -> Axes:
    """Returns the axes of the only chart of some rows."""
    (figure,) = metric_figures(rows).values()
    figure.draw_without_rendering()
    (axes,) = figure.axes
    return axes


def ticks(axes: Axes) -> list[str]:
    """Returns the labels of the ticks on the y axis that a reader sees."""
    low, high = axes.get_ylim()
    return [
        label.get_text()
        for place, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
        if low <= place <= high and label.get_text()
    ]


def test_a_chart_has_a_line_for_each_arm_through_its_values():
    axes = axes_of(*(row(e, arm, loss=e * scale) for e in (1, 2, 5) for arm, scale in (('softmax', 1), ('center', 2))))
    for line, values in zip(axes.lines, ([1, 2, 5], [2, 4, 10]), strict=True):
        np.testing.assert_array_equal(line.get_xydata(), np.stack([[1, 2, 5], values], axis=1))
    assert axes.get_yscale() == 'linear'
    assert axes.get_xlabel() == 'epoch'
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 2


def test_the_legend_names_each_arm_with_its_last_value():
    rows = [row(e, arm, test_accuracy=e / 10) for e in (1, 2) for arm in ('softmax', '$center$')]
    (figure,) = metric_figures([*rows, row(3, 'softmax', test_accuracy=None)]).values()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ['softmax: 20 %', '$center$: 20 %']
    assert not any(text.get_parse_math() for text in legend.get_texts())


def test_columns_without_anything_to_show_have_no_chart():
    rows = [row(e, 'arm', loss=e, empty=None, zero=0, nan=math.nan, epoch_seconds=1.0) for e in (1, 2)]
    assert [*metric_figures(rows)] == ['loss']
    assert metric_figures([]) == {}


def test_values_of_several_magnitudes_get_a_logarithmic_axis():
    axes = axes_of(*(row(e, 'arm', ratio=10.0**-e) for e in (1, 2, 3)))
    assert axes.get_yscale() == 'log'
    assert {0.1, 0.01, 0.001} <= {round(place, 9) for place in axes.get_yticks()}


def test_a_missing_value_is_a_gap_and_a_value_between_gaps_has_a_marker():
    axes = axes_of(*(row(e, 'arm', loss=v) for e, v in enumerate([1.0, 2.0, None, 3.0, math.nan, 4.0])))
    (line,) = axes.lines
    np.testing.assert_array_equal(line.get_ydata(), [1, 2, np.nan, 3, np.nan, 4])
    assert line.get_marker() == '.'


@pytest.mark.parametrize('values', [[0.5], [2.3026] * 3, [2.3026, 2.30261], [-1.0, 3.0], [1e-9, 1e9]])
def test_odd_values_lie_within_a_chart_whose_ticks_differ(values):
    axes = axes_of(*(row(e, 'arm', loss=v) for e, v in enumerate(values)))
    low, high = axes.get_ylim()
    assert low < min(values) <= max(values) < high
    assert len(ticks(axes)) >= 2
    assert len(set(ticks(axes))) == len(ticks(axes))


@pytest.mark.parametrize('values', [[0.2, 1.0], [0.99, 1.0], [1.0, 1.0]])
def test_shares_end_at_100_percent_with_their_last_point_in_sight(values):
    axes = axes_of(*(row(e, 'arm', test_accuracy=v) for e, v in enumerate(values)))
    assert axes.get_ylim()[1] == 1
    assert ticks(axes)[-1].startswith('100')
    assert not axes.lines[0].get_clip_on()


def test_values_that_differ_by_rounding_alone_look_equal():
    low, high = axes_of(*(row(e, 'arm', loss=2.3026 + e * 1e-6) for e in range(3))).get_ylim()
    assert high - low > 0.02
