"""What a reader of the pictures relies on: what is drawn, where, and what the figure says about it."""

import dataclasses

import numpy as np
import pytest
from PIL import Image, ImageSequence

from experiments.plots.features import FRAME, MAX_FRAMES, REST, animate_features, draw_features
from experiments.plots.panel import legend
from experiments.plots.projection import plane_of
from experiments.plots.text_placement import place_labels
from experiments.train.snapshots import Snapshot

DIGITS = [str(c) for c in range(10)]


def snapshot(*, epoch=1, num_classes=10, dimensions=2, spread=0.2, seed=0) -> Snapshot:
    """Round clouds with unequal numbers of points, around a place that is not the origin."""
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(num_classes, dimensions)) * 5 + 3
    labels = rng.integers(0, num_classes, 30 * num_classes)
    features = (means[labels] + spread * rng.normal(size=(len(labels), dimensions))).astype(np.float32)
    train, test = slice(20 * num_classes), slice(20 * num_classes, None)
    sets = (features[train], labels[train], features[test], labels[test])
    return Snapshot(epoch, *sets, means, 0.952, 0.941, 0.0654, False)


def texts(figure) -> str:
    """All that a figure says, in one string."""
    return '\n'.join(text.get_text() for text in figure.findobj(lambda a: hasattr(a, 'get_text')))


def frames(path) -> list[tuple[np.ndarray, int]]:
    """The grey values of each picture in a file, and for how many milliseconds it is shown."""
    with Image.open(path) as image:
        return [(np.asarray(f.convert('L'), int), f.info.get('duration', 0)) for f in ImageSequence.Iterator(image)]


def offsets(collection) -> np.ndarray:
    return np.asarray(collection.get_offsets())


def colors(collection) -> set[tuple[float, ...]]:
    return {tuple(color[:3]) for color in np.asarray(collection.get_facecolor()).round(3)}


def test_both_sets_of_both_arms_are_drawn_with_their_numbers(tmp_path):
    arms = {'softmax': snapshot(), 'center': dataclasses.replace(snapshot(seed=1), test_accuracy=0.966)}
    figure = draw_features(tmp_path / 'features.png', arms, DIGITS, title='two arms')
    titles = [axes.get_title() for axes in figure.axes]
    numbers = 'nearest center 94.1 %\nintra/inter ratio 0.0654'
    assert titles == [
        'softmax, train set',
        'center, train set',
        f'softmax, test set\naccuracy 95.2 %, {numbers}',
        f'center, test set\naccuracy 96.6 %, {numbers}',
    ]
    ((picture, _),) = frames(tmp_path / 'features.png')
    assert picture.shape[1] > 1000


def test_names_are_drawn_in_a_font_that_has_their_characters(tmp_path):
    names = ['\u24b6', 'Ä', '\u24b7']  # circled letters, which DejaVu lacks and STIX has; it comes with Matplotlib
    figure = draw_features(tmp_path / 'features.png', {'arm': snapshot(num_classes=3)}, names, title='Ⓐ')
    assert {*names} <= {*texts(figure).splitlines()}
    assert legend(names) == ''


@pytest.mark.parametrize('dimensions', [1, 2])
def test_names_that_no_font_has_are_numbers_that_the_page_explains(tmp_path, dimensions):
    names = ['\U000f0001', 'cat', '\U000f0002']  # private characters
    arms = {'arm': snapshot(num_classes=3, dimensions=dimensions)}
    figure = draw_features(tmp_path / 'features.png', arms, names, title='\U000f0001 set')
    said = texts(figure).splitlines()
    assert {'0', '1', '2', '? set'} <= {*said}
    assert not {*names} & {*said}
    assert legend(names) == f' The numbers in the pictures are classes: 0 is {names[0]}, 1 is cat, 2 is {names[2]}.'


def test_two_dimensions_are_drawn_as_they_are_with_equal_scales(tmp_path):
    arm = snapshot()
    figure = draw_features(tmp_path / 'features.png', {'arm': arm}, DIGITS, title='')
    for axes in figure.axes:
        assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_aspect()) == ('feature 1', 'feature 2', 1.0)
        assert np.ptp(axes.get_xlim()) == pytest.approx(np.ptp(axes.get_ylim()))
        points, centers = map(offsets, axes.collections)
        np.testing.assert_array_equal(centers, arm.centers)
        features = arm.train_features if 'train' in axes.get_title() else arm.test_features
        assert sorted(points.tolist()) == sorted(features.astype(np.float64).tolist())
        for low, high, values in zip(*np.transpose([axes.get_xlim(), axes.get_ylim()]), points.T, strict=True):
            assert low < min(values.min(), 0)  # the origin is in sight
            assert values.max() < high


def test_a_center_is_seen_in_the_picture(tmp_path):
    """Against the same picture with one center moved, pixels differ at both places and in no other panel."""
    arm = snapshot()
    moved = dataclasses.replace(arm, centers=arm.centers + np.eye(10)[:, :1] * [1.5, 0])
    pictures = []
    for name, s in (('a.png', arm), ('b.png', moved)):
        figure = draw_features(tmp_path / name, {'moved': s, 'still': arm}, DIGITS, title='')
        pictures.append(frames(tmp_path / name)[0][0])
    different = np.argwhere(pictures[0] != pictures[1])
    assert 20 < len(different) < 2000
    assert different[:, 1].max() < pictures[0].shape[1] / 2
    axes = figure.axes[0]
    for center in (arm.centers[0], moved.centers[0]):
        x, y = axes.transData.transform(center) * 140 / figure.dpi
        assert np.min(np.hypot(*(different - [pictures[0].shape[0] - y, x]).T)) < 8


def test_classes_are_named_beside_their_points(tmp_path):
    arm = snapshot()
    figure = draw_features(tmp_path / 'features.png', {'arm': arm}, DIGITS, title='')
    for axes in figure.axes:
        labels = [t for t in axes.texts if t.get_text() in DIGITS and t.get_visible()]
        assert len(labels) >= 9  # of two classes that lie on each other, one may find no place
        for label in labels:
            nearest = np.argmin(np.linalg.norm(arm.centers - np.asarray(label.get_position()), axis=1))
            assert label.get_text() == str(nearest)


def test_a_name_stays_at_its_cluster_whatever_a_few_points_do():
    rng = np.random.default_rng(0)
    clouds = [rng.normal(place, 1, (200, 2)) for place in ([20, 0], [-20, 0])]
    clouds[0][:8] += [0, 300]
    sizes = np.full((2, 2), 2.0)
    places = place_labels(clouds, [0, 1], sizes, np.array([[-400, 400]] * 2), gap=1)
    for place, middle in zip(places, ([20, 0], [-20, 0]), strict=True):
        assert place is not None
        assert np.linalg.norm(place - middle) < 6


def test_pictures_say_what_they_show_and_that_axes_differ(tmp_path):
    for arms, differ in (({'arm': snapshot()}, False), ({'a': snapshot(), 'b': snapshot()}, True)):
        figure = draw_features(tmp_path / 'features.png', arms, DIGITS, title='')
        caption = ' '.join(str(figure.get_supxlabel()).split())
        assert 'Each dot is an image' in caption
        assert ('different axes' in caption) == differ


def test_the_dots_of_arrays_are_called_examples(tmp_path):
    figure = draw_features(tmp_path / 'features.png', {'arm': snapshot()}, DIGITS, title='', kind='examples')
    assert 'Each dot is an example, at' in ' '.join(str(figure.get_supxlabel()).split())


def test_a_name_at_the_edge_does_not_lie_on_the_frame(tmp_path):
    arm = snapshot(num_classes=2, spread=0.05)
    figure = draw_features(tmp_path / 'features.png', {'arm': arm}, ['albatross', 'cormorant'], title='')
    for axes in figure.axes:
        frame = axes.get_window_extent()
        for text in (t for t in axes.texts if t.get_visible() and t.get_text()):
            box = text.get_window_extent().shrunk(0.9, 0.9)
            assert frame.x0 < box.x0 < box.x1 < frame.x1
            assert frame.y0 < box.y0 < box.y1 < frame.y1


def test_the_title_of_the_animation_stands_apart_from_the_headings(tmp_path):
    history = {arm: [snapshot()] for arm in ('softmax alone', 'with center loss, weight 1000')}
    animate_features(tmp_path / 'features.gif', history, DIGITS, title='digits, small, 30 epochs, seed 0')
    ((picture, _),) = frames(tmp_path / 'features.gif')
    blank = np.min(picture[10:45], axis=1) > 200  # the title ends there, and the headings begin
    assert np.convolve(blank, np.ones(6)).max() == 6
    assert (picture[:, -2:] > 200).all()  # and no heading is cut


def test_labels_of_many_classes_do_not_lie_on_each_other(tmp_path):
    names = [f'class with a long name {c}' for c in range(100)]
    figure = draw_features(
        tmp_path / 'features.png', {'arm': snapshot(num_classes=100, dimensions=64)}, names, title=''
    )
    for axes in figure.axes:
        shown = [t for t in axes.texts if t.get_visible() and t.get_text()]
        assert len(shown) > 40
        boxes = [t.get_window_extent().shrunk(0.8, 0.8) for t in shown]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        assert not axes.get_legend()
        assert {t.get_text() for t in shown} <= {str(c) for c in range(100)}


def test_of_very_many_classes_a_selection_is_numbered(tmp_path):
    arm = snapshot(num_classes=250)
    figure = draw_features(tmp_path / 'features.png', {'arm': arm}, [f'class {c}' for c in range(250)], title='')
    for axes in figure.axes:
        numbers = [text.get_text() for text in axes.texts if text.get_text()]
        assert numbers == [str(c) for c in range(0, 250, 3)]
        assert len(offsets(axes.collections[1])) == 250


@pytest.mark.parametrize(
    ('names', 'shown'),
    [
        (['cat', 'dog', 'frog'], ['cat', 'dog', 'frog']),
        (['sulphur-crested cockatoo', 'dog', '$frog$'], ['sulphur-cr…', 'dog', '$frog$']),
        (['long-tailed tit', 'long-tailed skua', 'gull'], ['0', '1', '2']),
    ],
)
def test_long_names_are_shortened_or_numbered(tmp_path, names, shown):
    figure = draw_features(tmp_path / 'features.png', {'arm': snapshot(num_classes=3)}, names, title='')
    assert [t.get_text() for t in figure.axes[0].texts if t.get_text()] == shown


def test_more_dimensions_are_projected_and_the_figure_says_so(tmp_path):
    arm = snapshot(dimensions=5)
    figure = draw_features(tmp_path / 'features.png', {'arm': arm}, DIGITS, title='')
    assert 'Each arm is projected by a PCA, fitted on its train features' in texts(figure)
    centred = arm.train_features - arm.train_features.mean(axis=0, dtype=np.float64)
    _, scales, directions = np.linalg.svd(centred, full_matrices=False)
    shares = scales**2 / np.sum(scales**2)
    for axes in figure.axes:
        assert axes.get_xlabel() == f'PCA 1 ({100 * shares[0]:.0f} % of variance)'
        assert axes.get_ylabel() == f'PCA 2 ({100 * shares[1]:.0f} % of variance)'
        centers = offsets(axes.collections[1])
        expected = (arm.centers - arm.train_features.mean(axis=0, dtype=np.float64)) @ directions[:2].T
        np.testing.assert_allclose(np.abs(centers), np.abs(expected), rtol=1e-4, atol=1e-4)


def test_centers_lie_in_their_clouds_after_projection():
    arm = snapshot(dimensions=64)
    plane = plane_of(arm.train_features)
    points, centers = (
        plane.points(arm.test_features, arm.test_labels),
        plane.points(arm.centers, np.arange(10)),
    )
    for c in range(10):
        cloud = points[arm.test_labels == c]
        assert np.all(np.abs(cloud.mean(axis=0) - centers[c]) < 0.3)


def test_one_dimension_is_drawn_against_the_class(tmp_path):
    arm = snapshot(dimensions=1)
    figure = draw_features(tmp_path / 'features.png', {'arm': arm}, DIGITS, title='')
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ('feature 1', 'class')
    assert [t.get_text() for t in axes.get_yticklabels()] == DIGITS
    points, centers = map(offsets, axes.collections)
    np.testing.assert_array_equal(centers, np.stack([arm.centers[:, 0], np.arange(10)], axis=1))
    x_of_7 = np.sort(points[np.round(points[:, 1]) == 7, 0])
    np.testing.assert_array_equal(x_of_7, np.sort(arm.train_features[arm.train_labels == 7, 0]))


def test_at_most_some_thousand_points_are_drawn_always_the_same_and_of_every_class(tmp_path):
    arm = snapshot()
    many = dataclasses.replace(
        arm,
        train_features=np.tile(arm.train_features, (100, 1)),
        train_labels=np.tile(arm.train_labels, 100),
    )
    first, again = (
        draw_features(tmp_path / 'features.png', {'arm': many}, DIGITS, title='').axes[0].collections[0]
        for _ in range(2)
    )
    assert 2000 <= len(offsets(first)) <= 5000
    np.testing.assert_array_equal(offsets(first), offsets(again))
    assert len(colors(first)) == 10


def test_a_label_that_names_no_class_is_grey_not_the_last_class(tmp_path):
    arm = snapshot()
    arm = dataclasses.replace(arm, train_labels=np.where(arm.train_labels < 5, -7, 1000))
    figure = draw_features(tmp_path / 'features.png', {'arm': arm}, DIGITS, title='')
    assert colors(figure.axes[0].collections[0]) == {(0.867, 0.867, 0.867)}


@pytest.mark.parametrize(('dimensions', 'value'), [(1, 0.0), (2, 7.0), (64, 7.0)])
def test_collapsed_features_are_drawn_and_called_so(tmp_path, dimensions, value):
    arm = snapshot(dimensions=dimensions)
    arm = dataclasses.replace(
        arm,
        train_features=np.full_like(arm.train_features, value),
        test_features=np.full_like(arm.test_features, value),
        centers=np.full_like(arm.centers, value),
        intra_inter_ratio=float('nan'),
        collapsed=True,
    )
    figure = draw_features(tmp_path / 'features.png', {'arm': arm}, DIGITS, title='')
    assert all('collapsed' in ' '.join(t.get_text() for t in axes.texts) for axes in figure.axes)
    assert 'intra/inter ratio undefined' in figure.axes[1].get_title()
    history = {'arm': [arm, dataclasses.replace(arm, epoch=2)]}
    animate_features(tmp_path / 'features.gif', history, DIGITS, title='')
    assert len(frames(tmp_path / 'features.gif')) == 2


@pytest.mark.parametrize(('dimensions', 'value'), [(1, np.nan), (2, np.inf), (64, np.inf)])
def test_features_that_are_not_finite_are_counted_in_the_panel(tmp_path, dimensions, value):
    arm = snapshot(dimensions=dimensions)
    some, centers = arm.train_features.copy(), arm.centers.copy()
    some[:3, 0], centers[4] = value, value
    arm = dataclasses.replace(
        arm, train_features=some, test_features=np.full_like(arm.test_features, value), centers=centers
    )
    figure = draw_features(tmp_path / 'features.png', {'arm': arm}, DIGITS, title='')
    train, test = (axes.texts[-1].get_text() for axes in figure.axes)
    if dimensions > 1:
        assert {t.get_text() for t in figure.axes[1].texts if t.get_visible()} & set(DIGITS)
    assert train == '3 of 200 points are not finite\n1 of 10 centers are not finite'
    assert test == '100 of 100 points are not finite\n1 of 10 centers are not finite'


def test_nothing_finite_at_all_is_still_a_picture(tmp_path):
    arm = snapshot(dimensions=64)
    arm = dataclasses.replace(
        arm, **{k: getattr(arm, k) * np.nan for k in ('train_features', 'test_features', 'centers')}
    )
    figure = draw_features(tmp_path / 'features.png', {'arm': arm}, DIGITS, title='')
    assert '200 of 200 points are not finite' in texts(figure)
    assert figure.axes[0].get_xlabel() == 'PCA 1'


def test_the_animation_has_every_epoch_and_rests_at_the_last(tmp_path):
    history = {arm: [snapshot(epoch=e, spread=1 / e) for e in range(1, 6)] for arm in ('softmax', 'center')}
    none = dataclasses.replace(history['center'][0], train_features=np.empty((0, 2)), train_labels=np.empty(0, int))
    history['center'][0] = none  # train features of the last epoch are enough
    animate_features(tmp_path / 'features.gif', history, DIGITS, title='through the epochs')
    assert [duration for _, duration in frames(tmp_path / 'features.gif')] == [FRAME] * 4 + [REST]


@pytest.mark.slow
def test_a_long_animation_is_thinned_but_keeps_the_first_and_the_last_epoch(tmp_path):
    first, middle, last = (snapshot(num_classes=2, seed=seed) for seed in range(3))
    animate_features(tmp_path / 'long.gif', {'arm': [first, *[middle] * 200, last]}, ['a', 'b'], title='')
    # Epochs that look the same are one picture, shown for as long as all of them.
    pictures, durations = zip(*frames(tmp_path / 'long.gif'), strict=True)
    assert durations == (FRAME, FRAME * (MAX_FRAMES - 2), REST)
    animate_features(tmp_path / 'last.gif', {'arm': [first, last]}, ['a', 'b'], title='')
    (first_alone, _), _ = frames(tmp_path / 'last.gif')
    assert not np.array_equal(pictures[0], pictures[2])
    assert np.mean(pictures[0] != first_alone) < np.mean(pictures[2] != first_alone)


def test_windows_of_the_animation_stand_still(tmp_path):
    """What is left of the panel and below it has the same pixels all the time, whatever the points do."""
    history = {'arm': [snapshot(epoch=e, spread=spread) for e, spread in ((1, 3.0), (20, 0.01))]}
    animate_features(tmp_path / 'features.gif', history, DIGITS, title='')
    (first, _), (last, _) = frames(tmp_path / 'features.gif')
    changed = np.argwhere(first != last)
    assert len(changed) > 500
    assert changed[:, 0].max() < 0.86 * first.shape[0]
    assert changed[:, 1].min() > 0.15 * first.shape[1]
