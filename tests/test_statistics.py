"""class_statistics: counts, means and variances of the classes, of one batch or merged from many."""

from functools import partial
from typing import Any

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.sharding import AxisType, NamedSharding

import centerloss_jax as clj
from tests.support import oracle
from tests.support.problems import make_problem, problems

jitted = jax.jit(clj.class_statistics, static_argnums=2)
loss_of = jax.jit(clj.center_loss)
merge = jax.jit(clj.ClassStatistics.merge)


def assert_statistics(stats, expected, rtol, atol=0.0):
    np.testing.assert_array_equal(stats.count, expected.count)
    np.testing.assert_allclose(stats.mean, expected.mean, rtol=rtol, atol=atol)
    np.testing.assert_allclose(stats.intra, expected.intra, rtol=rtol, atol=atol)
    np.testing.assert_allclose(stats.inter, expected.inter, rtol=rtol, atol=atol)


@hypothesis.given(problem=problems)
def test_are_exact_in_float64(problem):
    where, num_classes = problem.options.get('where'), len(problem.centers)
    hypothesis.assume(np.any(problem.labels[... if where is None else where] >= 0))
    with jax.enable_x64(True):
        stats = jitted(problem.x, problem.labels, num_classes, where=where)
        expected = oracle.class_statistics(problem.x, problem.labels, num_classes, where=where)
        assert_statistics(stats, expected, rtol=1e-12, atol=1e-12)


def test_ratio_is_intra_over_inter():
    x, _, labels, _ = make_problem(leading=(23,), dtype=np.float32)
    stats = jitted(x, labels, 5)
    expected = oracle.class_statistics(x, labels, 5)
    np.testing.assert_allclose(stats.ratio, expected.intra / expected.inter, rtol=1e-5)


def test_variances_of_an_example_by_hand(worked_example):
    stats = clj.class_statistics(worked_example.x, worked_example.labels, 4)
    np.testing.assert_array_equal(stats.count, [2, 1, 1, 0])
    np.testing.assert_array_equal(stats.mean[:3], [[1.5, 2], [0, 1], [3, 4]])
    # Class 0 has its two examples 1/2 on either side; the mean of all is (3/2, 9/4).
    assert stats.intra == 2 * 0.25 / (4 - 3)
    assert stats.inter == (2 * 0.0625 + (2.25 + 1.5625) + (2.25 + 3.0625)) / 4


def test_a_class_without_examples_has_a_mean_that_is_finite():
    stats = jitted(np.ones((2, 3), np.float32), np.array([4, -1]), 6)
    chex.assert_tree_all_finite(stats.mean)
    np.testing.assert_array_equal(stats.count, [0, 0, 0, 0, 1, 0])


def test_the_loss_to_the_class_means_is_the_variance_within_the_classes():
    rng = np.random.default_rng(0)
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2])
    x = rng.normal(size=(3, 16))[labels] + 0.1 * rng.normal(size=(9, 16))
    x = (20 * x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)
    stats = jitted(x, labels, 3)
    np.testing.assert_allclose(loss_of(x, np.zeros((3, 16), np.float32), labels), 400, rtol=1e-5)
    within = loss_of(x, stats.mean, labels)
    np.testing.assert_allclose(within * 9, stats.intra * (9 - 3), rtol=1e-5)
    np.testing.assert_allclose(stats.intra, oracle.class_statistics(x, labels, 3).intra, rtol=1e-5)
    assert within < 40


@hypothesis.given(seed=st.integers(0, 2**32 - 1), cut=st.sampled_from([1, 11]))
@hypothesis.settings(max_examples=10)
def test_merged_parts_equal_the_statistics_of_all(seed, cut):
    x, _, labels, options = make_problem(seed, leading=(23,), masked=True)
    where = options['where']
    with jax.enable_x64(True):
        first = jitted(x[:cut], labels[:cut], 5, where=where[:cut])
        second = jitted(x[cut:], labels[cut:], 5, where=where[cut:])
        expected = oracle.class_statistics(x, labels, 5, where=where)
        assert_statistics(merge(first, second), expected, rtol=1e-12, atol=1e-12)
        assert_statistics(merge(second, first), expected, rtol=1e-12, atol=1e-12)


def test_many_merged_batches_equal_the_statistics_of_all():
    x, _, labels, _ = make_problem(leading=(60,), dtype=np.float32)
    total = jitted(x[:6], labels[:6], 5)
    for i in range(6, 60, 6):
        total = merge(total, jitted(x[i : i + 6], labels[i : i + 6], 5))
    assert_statistics(total, oracle.class_statistics(x, labels, 5), rtol=1e-5)


@pytest.mark.parametrize('empty_first', [False, True])
def test_merging_with_an_empty_batch_is_exact(empty_first):
    x, _, labels, _ = make_problem(leading=(23,), dtype=np.float32)
    stats = jitted(x, labels, 5)
    for nothing in (
        jitted(x[:0], labels[:0], 5),
        jitted(np.full_like(x, np.nan), np.full_like(labels, -1), 5),
    ):
        merged = nothing.merge(stats) if empty_first else stats.merge(nothing)
        chex.assert_trees_all_equal(merged, stats)
        assert merged.intra == stats.intra
        assert merged.inter == stats.inter


@pytest.mark.parametrize(
    ('num_classes', 'num_features'),
    [
        pytest.param(4, 2, id='classes'),
        pytest.param(1, 2, id='a class to broadcast'),
        pytest.param(3, 5, id='features'),
        pytest.param(3, 1, id='a feature to broadcast'),
    ],
)
def test_merging_other_sizes_is_an_error(num_classes, num_features):
    def merge_other():
        stats = clj.class_statistics(np.ones((3, 2), np.float32), np.array([0, 1, 2]), 3)
        other = clj.class_statistics(np.ones((3, num_features), np.float32), np.zeros(3, np.int32), num_classes)
        return stats.merge(other)

    with pytest.raises(ValueError, match=rf'3.*2.*{num_classes}.*{num_features}'):
        jax.eval_shape(merge_other)


def tight_classes_far_out(num_examples=600, num_features=4):
    """Returns features and labels of three classes with norm 1e4, 1e-2 from their class mean."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=(3, num_features))
    means *= 1e4 / np.linalg.norm(means, axis=-1, keepdims=True)
    offsets = rng.normal(size=(num_examples, num_features))
    offsets *= 1e-2 / np.linalg.norm(offsets, axis=-1, keepdims=True)
    labels = rng.integers(0, 3, (2, num_examples)).min(axis=0)
    return (means[labels] + offsets).astype(np.float32), labels


def test_large_norms_in_float32_keep_their_digits():
    x, labels = tight_classes_far_out()
    expected = oracle.class_statistics(x, labels, 3)
    stats = jitted(x, labels, 3)
    np.testing.assert_allclose(stats.intra, expected.intra, rtol=1e-3)
    np.testing.assert_allclose(stats.inter, expected.inter, rtol=1e-3)
    expanded = (x**2).sum(-1).mean() - (np.asarray(expected.mean, np.float32)[labels] ** 2).sum(-1).mean()
    assert abs(expanded - expected.intra) > expected.intra


def test_large_norms_in_float32_keep_their_digits_when_merged():
    x, labels = tight_classes_far_out()
    total = jitted(x[:60], labels[:60], 3)
    for i in range(60, 600, 60):
        total = merge(total, jitted(x[i : i + 60], labels[i : i + 60], 3))
    # float32 rounds the mean of each part to 5e-4.
    np.testing.assert_allclose(total.intra, oracle.class_statistics(x, labels, 3).intra, rtol=1e-2)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16], ids=['bfloat16', 'float16'])
def test_half_precision_accumulates_in_float32(dtype):
    # 4,099 examples are more than either type can count, and their sum of 200s more than float16 holds.
    x = jnp.concatenate([jnp.full((2050, 2), 200, dtype), jnp.full((2049, 2), 202, dtype)])
    stats = jitted(x, np.zeros(4099, np.int32), 2)
    expected = oracle.class_statistics(x, np.zeros(4099, np.int32), 2)
    chex.assert_type([stats.mean, stats.intra, stats.inter], jnp.float32)
    np.testing.assert_array_equal(stats.count, [4099, 0])
    np.testing.assert_allclose(stats.mean[0], expected.mean[0], rtol=1e-6)
    np.testing.assert_allclose(stats.intra, expected.intra, rtol=1e-4)


@pytest.mark.parametrize('exponent', [16, 20, pytest.param(23, marks=pytest.mark.slow)])
@pytest.mark.parametrize('num_classes', [1, 3, 2**20])
def test_sums_over_many_examples_of_one_class_keep_their_digits(exponent, num_classes):
    n = 2**exponent
    x = np.tile(np.array([[0.1], [0.3]], np.float32), (n // 2, 1))
    stats = jitted(x, np.zeros(n, np.int32), num_classes)
    assert stats.count[0] == n
    np.testing.assert_allclose(stats.mean[0], 0.2, rtol=1e-5)
    np.testing.assert_allclose(stats.squared_deviation[0], 0.01 * n, rtol=1e-4)


def test_counts_beyond_int32_do_not_turn_negative():
    # Each class holds less than int32 can count, all of them hold more, and so do two parts of one class.
    count = jnp.array([2**31 - 2, 2**31 - 2], jnp.int32)
    stats = clj.ClassStatistics(count, jnp.array([[1.0], [3.0]]), jnp.array([2.0**31, 2.0**31]))
    np.testing.assert_allclose([stats.intra, stats.inter], [1, 1], rtol=1e-6)
    both = stats.merge(stats)
    np.testing.assert_array_equal(both.count, [2**31 - 1] * 2)
    np.testing.assert_allclose(both.mean, stats.mean)


@pytest.mark.parametrize('content', [np.nan, np.inf, 3e38])
def test_an_example_that_is_left_out_may_hold_anything(content):
    x, _, labels, _ = make_problem(leading=(9,), dtype=np.float32)
    where = np.arange(9) != 4
    labels[2], x[[2, 4]] = -1, content
    stats = jitted(x, labels, 5, where=where)
    x[[2, 4]] = 0
    assert_statistics(stats, oracle.class_statistics(x, labels, 5, where=where), rtol=1e-5)


def test_the_ratio_of_collapsed_classes_is_nan():
    # All features are equal: both variances are 0, and 0 / 0 is NaN.
    stats = jitted(np.full((4, 2), 3, np.float32), np.array([0, 1, 1, 0]), 3)
    assert stats.intra == 0
    assert stats.inter == 0
    assert np.isnan(stats.ratio)
    # Two equal points a class: the variance within the classes is 0.
    stats = jitted(np.array([[1, 2], [3, 4], [1, 2], [3, 4]], np.float32), np.array([0, 1, 0, 1]), 3)
    assert stats.ratio == 0


def test_the_variance_within_classes_of_one_example_each_is_not_a_number():
    # Noise whose classes have one example each would otherwise count as perfectly tight.
    stats = jitted(np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32), np.array([0, 1, 2, 3]), 4)
    assert np.isnan(stats.intra)
    assert np.isnan(stats.ratio)


@pytest.mark.parametrize('examples', [2, 3, 50])
def test_the_variance_within_classes_does_not_depend_on_how_many_examples_a_class_has(examples):
    x = np.random.default_rng(0).normal(size=(600 * examples, 3)).astype(np.float32)
    stats = jitted(x, np.repeat(np.arange(600), examples), 600)
    np.testing.assert_allclose(stats.intra, 3, rtol=0.1)


def test_every_device_gets_the_statistics_of_all(per_device):
    x, _, labels, options = make_problem(leading=(4, 6), dtype=np.float32, masked=True)
    where = options['where']
    where[1], x[1, 2] = False, np.nan  # all examples of one device are left out

    def statistics(batch, _):
        x, labels, where = batch
        stats = clj.class_statistics(x, labels, 5, where=where, axis_name='batch')
        return stats, stats.ratio

    stats, ratio = per_device(statistics, (x, labels, where), np.zeros(()))
    x[1] = 0
    expected = oracle.class_statistics(x.reshape(24, 3), labels.reshape(24), 5, where=where.reshape(24))
    for device in range(4):
        local = jax.tree.map(lambda leaf, device=device: leaf[device], stats)
        assert_statistics(local, expected, rtol=1e-5, atol=1e-6)
        assert ratio[device] == ratio[0]


def test_large_norms_keep_their_digits_over_devices():
    x, labels = tight_classes_far_out()
    statistics = partial(clj.class_statistics, num_classes=3, axis_name='batch')
    stats = jax.jit(jax.vmap(statistics, axis_name='batch'))(x.reshape(4, 150, 4), labels.reshape(4, 150))
    first = jax.tree.map(lambda leaf: leaf[0], stats)
    np.testing.assert_allclose(first.intra, oracle.class_statistics(x, labels, 3).intra, rtol=1e-3)


def test_an_axis_name_that_nothing_binds_is_an_error():
    with pytest.raises((NameError, ValueError), match=r'axis_name.*btach'):
        clj.class_statistics(np.ones((4, 2), np.float32), np.zeros(4, np.int32), 3, axis_name='btach')


WRONG_ARGUMENTS = {
    'x without features': ({'x': np.float32(1), 'labels': 0}, ValueError, r'\bx\b'),
    'integer x': ({'x': np.ones((4, 2), np.int32)}, TypeError, r'\bx\b.*int32'),
    'where of another shape': ({'where': np.ones(3, bool)}, ValueError, r'where.*\(3,\)'),
    'where that would broadcast': ({'where': np.ones(1, bool)}, ValueError, r'where.*\(1,\)'),
    'where as integers': ({'where': np.ones(4, np.int32)}, TypeError, r'where.*int32'),
}


@pytest.mark.parametrize(('changed', 'error', 'message'), WRONG_ARGUMENTS.values(), ids=WRONG_ARGUMENTS.keys())
def test_wrong_arguments_are_named(changed, error, message):
    arguments = {'x': np.ones((4, 2), np.float32), 'labels': np.array([0, 2, 1, 0]), 'where': None} | changed
    with pytest.raises(error, match=message):
        clj.class_statistics(arguments['x'], arguments['labels'], 3, where=arguments['where'])


@pytest.mark.parametrize('num_classes', [0, -3])
def test_there_is_at_least_one_class(num_classes):
    with pytest.raises(ValueError, match=f'num_classes.*{num_classes}'):
        clj.class_statistics(np.ones((4, 2), np.float32), np.full(4, -1), num_classes)


@pytest.mark.parametrize('spec', [P('data'), P(('data', 'classes'))], ids=str)
@pytest.mark.parametrize('axis_type', [AxisType.Auto, AxisType.Explicit], ids=lambda axis_type: axis_type.name)
def test_class_statistics_are_the_same_on_a_mesh(axis_type, spec):
    mesh = jax.make_mesh((2, 4), ('data', 'classes'), axis_types=(axis_type,) * 2)
    rng = np.random.default_rng(2)
    x, labels = rng.normal(size=(16, 2, 3)).astype(np.float32), rng.integers(-1, 4, (16, 2)).astype(np.int32)
    labels[-2:] = -1  # all examples of the last device
    place = lambda a: jax.device_put(a, NamedSharding(mesh, spec))  # noqa: E731
    on_mesh = jax.jit(lambda x, labels: clj.class_statistics(x, labels, 4))(place(x), place(labels))
    alone = jitted(x, labels, 4)
    for field in ('count', 'mean', 'squared_deviation', 'intra', 'inter', 'ratio'):
        np.testing.assert_allclose(getattr(on_mesh, field), getattr(alone, field), rtol=1e-6, atol=1e-7)


def test_a_number_of_classes_from_numpy_gives_the_same_bits_for_a_large_batch():
    x, labels = np.full((2**15, 1), 0.1, np.float32), np.zeros(2**15, np.int32)
    num_classes: Any = np.int64(3)
    chex.assert_trees_all_equal(clj.class_statistics(x, labels, num_classes), clj.class_statistics(x, labels, 3))
