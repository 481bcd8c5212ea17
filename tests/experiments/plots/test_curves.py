"""What a reader of curves over seeds relies on: means, their intervals, and how many seeds there were."""

import numpy as np
import pytest
from PIL import Image

from experiments.metrics.held_out import Interval, Roc, interval
from experiments.plots.curves import draw_points, draw_roc, draw_sweep


def curve(power: float) -> Roc:
    far = np.linspace(0, 1, 2001)
    return Roc(far, far**power)


def test_the_curves_of_seeds_are_drawn_as_their_mean_in_its_interval(tmp_path):
    arms = {'softmax alone': [curve(0.3), curve(0.4)], 'with center loss': [curve(0.2), curve(0.3)]}
    figure = draw_roc(tmp_path / 'roc.png', arms, title='two $arms')
    (axes,) = figure.axes
    lines = {str(line.get_label()): np.asarray(line.get_ydata()) for line in axes.lines}
    assert lines.keys() == {*arms, 'chance'}
    grid = np.asarray(axes.lines[0].get_xdata())
    for arm, curves in arms.items():
        np.testing.assert_allclose(lines[arm], np.mean([own.tar_at(grid) for own in curves], axis=0))
    assert (grid[0], grid[-1]) == (0.001, 1)
    assert len(axes.collections) == 2
    assert 'Means over 2 seeds with 95 % intervals' in figure.get_supxlabel()
    with Image.open(tmp_path / 'roc.png') as picture:
        assert picture.width > 800


def test_the_legend_of_the_curves_covers_none_of_them(tmp_path):
    arms = {f'an arm with a long name (AUC 0.{n})': [curve(1 / n)] for n in (1, 50)}
    figure = draw_roc(tmp_path / 'roc.png', arms, title='two arms')
    (axes,) = figure.axes
    legend = axes.get_legend()
    assert legend
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())


def test_one_seed_has_no_interval_and_the_picture_says_so(tmp_path):
    figure = draw_roc(tmp_path / 'roc.png', {'softmax': [curve(0.3)]}, title='one')
    assert str(figure.get_supxlabel()).endswith('One seed.')
    assert 'interval' not in figure.get_supxlabel()


def test_one_weight_one_alpha_and_one_seed_are_a_point_in_sight(tmp_path):
    values = {(0.1, 0.5): interval([0.7])}
    figure = draw_sweep(tmp_path / 'sweep.png', {'auc': values}, {'auc': interval([0.6])}, 1, title='a cell')
    for axes, setting in zip(figure.axes, (0.1, 0.5), strict=True):
        point, *_ = axes.containers[0]
        assert point.get_marker() == 'o'
        np.testing.assert_allclose(point.get_xydata(), [[setting, 0.7]])
        (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
        assert left < setting < right
        assert low < 0.7 < high
    assert 'interval' not in figure.get_supxlabel()


@pytest.mark.parametrize(('high', 'top'), [(1.0, 1.0), (1.4, None)])
def test_shares_end_at_100_percent(tmp_path, high, top):
    values = {(weight, 0.5): Interval(high, high - 0.2, high + 0.2) for weight in (0.1, 1.0)}
    figure = draw_sweep(tmp_path / 'sweep.png', {'auc': values}, {'auc': interval([0.9, 0.95])}, 2, title='a sweep')
    for axes in figure.axes:
        assert axes.get_ylim()[1] == (top or pytest.approx(high + 0.2, abs=0.1))


def test_points_have_a_line_for_each_row_and_a_change_the_colour_of_its_series(tmp_path):
    values = {
        row: {series: Interval(m + n, m, m + 2 * n) for n, series in ((1, 'a'), (2, 'b'))}
        for m, row in ((0, 'x'), (5, 'y'))
    }
    changes = {row: {'b': Interval(1, 0, 2)} for row in 'xy'}
    texts = {'title': 'two', 'caption': 'Points.'}
    figure = draw_points(
        tmp_path / 'points.png', dict.fromkeys(('e', 'r'), values), {'e': changes, 'r': changes}, 3, **texts
    )
    assert [axes.get_xlabel() for axes in figure.axes] == ['e', 'r', 'change of e', 'change of r']
    for above, below in zip(figure.axes[:2], figure.axes[2:], strict=True):
        points = [np.array(container[0].get_xydata(), float) for container in above.containers]
        np.testing.assert_allclose([series[:, 0] for series in points], [[1, 6], [2, 7]])
        heights = np.array([series[:, 1] for series in points])
        assert len(np.unique(heights)) == 4
        np.testing.assert_array_equal(heights.round(), [[0, 1], [0, 1]])
        _, change = (container[0] for container in below.containers)
        np.testing.assert_array_equal(np.array(change.get_ydata(), float), heights[1])
        first, second = (container[0].get_color() for container in above.containers)
        assert change.get_color() == second != first
        assert np.asarray(below.lines[0].get_xdata()).tolist() == [0, 0]
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ['x', 'y']
    assert 'Points. Means over 3 seeds' in figure.get_supxlabel()
    assert len(draw_points(tmp_path / 'points.png', {'e': values}, {}, 1, **texts).axes) == 1


@pytest.mark.parametrize('alphas', [(0.5,), (0.1, 0.5, 1.0)])
def test_a_measure_is_drawn_against_each_setting_with_softmax_alone_beside_it(tmp_path, alphas):
    weights = (0.01, 0.1, 1.0)
    values = {(w, a): Interval(w + a, w + a - 0.1, w + a + 0.1) for w in weights for a in alphas}
    softmax = interval([0.2, 0.4])
    figure = draw_sweep(tmp_path / 'sweep.png', {'auc': values}, {'auc': softmax}, 2, title='a sweep')
    against_weight, against_alpha = figure.axes
    assert against_weight.get_ylabel() == 'auc'
    assert len(against_weight.containers) == len(alphas)
    assert len(against_alpha.containers) == len(weights)
    for axes, settings in ((against_weight, weights), (against_alpha, alphas)):
        assert [text.get_text() for text in axes.get_xticklabels()] == [f'{setting:g}' for setting in settings]
        (reference,) = (line for line in axes.lines if line.get_label() == 'softmax alone')
        assert np.unique(np.asarray(reference.get_ydata())).tolist() == pytest.approx([0.3])
    drawn = against_weight.containers[0][0].get_ydata()
    assert np.asarray(drawn).tolist() == pytest.approx([w + alphas[0] for w in weights])
