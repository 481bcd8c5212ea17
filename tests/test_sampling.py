"""Samples of classes: they hold the classes of the batch, and the others are as likely as each other."""

from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import centerloss_jax as clj

LABELS = np.array([7, 3, 3, 0, 19])
STEPS = 4000


def draw(labels, num_classes, num_sampled, steps=STEPS, seed=0):
    """Returns the samples of some steps, `[steps, num_sampled]`."""
    keys = jax.random.split(jax.random.key(seed), steps)
    return np.asarray(jax.vmap(lambda key: clj.sample_classes(key, labels, num_classes, num_sampled))(keys))


# Draws with replacement, as the sample is a small share of the classes, and a permutation. Draws fall short at times.
SAMPLES = {'drawn': (40, 9), 'permuted': (20, 9), 'all but one': (20, 19)}
over_samples = pytest.mark.parametrize(('num_classes', 'num_sampled'), SAMPLES.values(), ids=SAMPLES.keys())


@over_samples
def test_a_sample_is_sorted_distinct_and_holds_the_classes_of_the_batch(num_classes, num_sampled):
    samples = draw(LABELS, num_classes, num_sampled)
    assert samples.dtype == np.int32
    assert samples.shape == (STEPS, num_sampled)
    assert samples.min() >= 0
    assert samples.max() < num_classes
    assert (np.diff(samples, axis=1) > 0).all()
    assert all((samples == label).any(axis=1).all() for label in LABELS)


def statistic(counts, share, steps):
    """Returns Σ (O - T p)² / (T p (1 - p)) · (M - 1) / M, which is near χ²(M - 1) for M equally likely classes."""
    num = len(counts)
    return np.sum((counts - steps * share) ** 2) / (steps * share * (1 - share)) * (num - 1) / num


@over_samples
def test_the_other_classes_are_equally_likely(num_classes, num_sampled):
    others = np.setdiff1d(np.arange(num_classes), LABELS)
    samples = draw(LABELS, num_classes, num_sampled)
    counts = np.array([(samples == j).sum() for j in others])
    share = (num_sampled - 4) / len(others)
    assert counts.sum() == STEPS * (num_sampled - 4)
    assert 0.001 < stats.chi2.cdf(statistic(counts, share, STEPS), len(others) - 1) < 0.999


@pytest.mark.parametrize(('num_classes', 'num_sampled'), [(40, 9), (20, 9)], ids=['drawn', 'permuted'])
def test_pairs_of_other_classes_are_equally_likely(num_classes, num_sampled):
    others = np.setdiff1d(np.arange(num_classes), LABELS)
    samples = draw(LABELS, num_classes, num_sampled, seed=1)
    is_in = {j: (samples == j).any(axis=1) for j in others}
    counts = np.array([(is_in[j] & is_in[k]).sum() for j, k in combinations(others, 2)])
    drawn, population = num_sampled - 4, len(others)
    share = drawn * (drawn - 1) / (population * (population - 1))
    expected = STEPS * share
    assert abs(counts.mean() - expected) < 1e-9 * expected  # every sample has the same number of pairs
    # Pairs with a class in common are not independent. Under uniform draws the sum has this mean and this spread, by
    # simulation with NumPy.
    rng = np.random.default_rng(0)
    simulated = [np.sum((pair_counts(rng, population, drawn) - expected) ** 2) for _ in range(60)]
    z = (np.sum((counts - expected) ** 2) - np.mean(simulated)) / np.std(simulated)
    assert abs(z) < 4


def pair_counts(rng, population, drawn):
    is_in = np.zeros((STEPS, population))
    np.put_along_axis(is_in, rng.random(is_in.shape).argpartition(drawn, axis=1)[:, :drawn], 1, axis=1)
    together = is_in.T @ is_in
    return together[np.triu_indices(population, 1)]


def test_the_test_of_pairs_sees_samples_of_neighbours():
    starts = np.random.default_rng(0).integers(0, 36, STEPS)
    is_in = np.zeros((STEPS, 36))
    for k in range(5):
        is_in[np.arange(STEPS), (starts + k) % 36] = 1
    assert 0.001 < stats.chi2.cdf(statistic(is_in.sum(axis=0), 5 / 36, STEPS), 35) < 0.999
    counts = (is_in.T @ is_in)[np.triu_indices(36, 1)]
    assert counts.std() > 10 * np.sqrt(counts.mean())


def test_ignored_labels_name_no_class():
    expected = draw(np.array([2, 5, 5]), 50, 6, steps=8)
    labels = jnp.array([-1, 2, 50, 5, 2**31 - 1, -100])
    samples = jax.jit(lambda labels: draw_traced(labels, 50, 6))(labels)
    assert all({2, 5} <= set(sample.tolist()) for sample in samples)
    assert expected.shape == samples.shape
    assert samples.max() < 50
    assert len(set(samples.ravel().tolist())) > 12


def draw_traced(labels, num_classes, num_sampled):
    keys = jax.random.split(jax.random.key(0), 8)
    return jax.vmap(lambda key: clj.sample_classes(key, labels, num_classes, num_sampled))(keys)


@pytest.mark.parametrize('labels', [[], np.zeros((2, 0), int), -1, [-1, -1]])
def test_a_batch_without_classes_samples_among_all(labels):
    sample = clj.sample_classes(jax.random.key(0), labels, 30, 3)
    assert len(set(sample.tolist())) == 3


@pytest.mark.parametrize('labels', [LABELS, LABELS.reshape(1, 5, 1), LABELS.astype(np.uint8), LABELS.tolist()])
def test_labels_may_have_any_shape_and_integer_dtype(labels):
    expected = clj.sample_classes(jax.random.key(3), LABELS, 100, 10)
    np.testing.assert_array_equal(clj.sample_classes(jax.random.key(3), labels, 100, 10), expected)


def test_a_sample_of_all_classes_has_them_all():
    np.testing.assert_array_equal(clj.sample_classes(jax.random.key(0), np.arange(12) % 5, 7, 7), np.arange(7))


def test_a_sample_of_as_many_classes_as_the_batch_has_is_those():
    labels = np.array([70, 3, 99, 41])
    np.testing.assert_array_equal(clj.sample_classes(jax.random.key(0), labels, 100, 4), np.sort(labels))


@pytest.mark.parametrize('num_sampled', [3, 101])
def test_a_sample_that_cannot_hold_the_batch_is_an_error_when_traced(num_sampled):
    with pytest.raises(ValueError, match=rf'num_sampled must be from 4 to 100, got {num_sampled}'):
        jax.eval_shape(lambda key: clj.sample_classes(key, np.arange(4), 100, num_sampled), jax.random.key(0))


def test_a_label_out_of_range_is_an_error_where_it_is_known():
    with pytest.raises(ValueError, match=r'labels\[1\] is 100'):
        clj.sample_classes(jax.random.key(0), [5, 100], 100, 10)
