"""Scores of pairs, on features whose scores are known, and their means over seeds."""

import math

import numpy as np
import pytest

from experiments.metrics.held_out import Roc, interval, unknown_auroc, verify

LABELS = np.arange(60) % 4


def around_corners(spread: float) -> np.ndarray:
    """Features of four classes, each along an axis of its own."""
    rng = np.random.default_rng(0)
    return 10 * np.eye(4)[LABELS] + spread * rng.normal(size=(60, 4))


@pytest.mark.parametrize('similarity', ['cosine', 'euclidean'])
def test_classes_that_lie_apart_are_verified_without_a_fault(similarity):
    values, roc = verify(around_corners(0.1), LABELS, similarity)
    assert values.pop('eer') == 0
    assert set(values.values()) == {1.0}
    assert roc.tar_at(0.001) == 1


@pytest.mark.parametrize('similarity', ['cosine', 'euclidean'])
def test_features_that_know_nothing_of_the_class_are_guesses(similarity):
    features = np.random.default_rng(0).normal(size=(1000, 3))
    values, _ = verify(features, np.arange(1000) % 4, similarity)
    for name, chance in (('auc', 0.5), ('eer', 0.5), ('tar_at_far_0.1', 0.1)):
        np.testing.assert_allclose(values[name], chance, atol=0.05)


def test_each_score_is_what_counting_pairs_gives():
    features = around_corners(8)
    values, _ = verify(features, LABELS, 'euclidean')
    like, unlike = [], []
    for i in range(60):
        for j in range(i):
            (like if LABELS[i] == LABELS[j] else unlike).append(-math.dist(features[i], features[j]))
    wins = sum((a > b) + (a == b) / 2 for a in like for b in unlike)
    np.testing.assert_allclose(values['auc'], wins / len(like) / len(unlike), rtol=1e-9)
    shares = []
    for threshold in [math.inf, *like, *unlike]:
        far = sum(score >= threshold for score in unlike) / len(unlike)
        shares.append((far, sum(score >= threshold for score in like) / len(like)))
    for far in (0.1, 0.01, 0.001):
        np.testing.assert_allclose(values[f'tar_at_far_{far:g}'], max(tar for own, tar in shares if own <= far))
    np.testing.assert_allclose(values['verification_accuracy'], max((tar + 1 - far) / 2 for far, tar in shares))
    assert min(abs(far - (1 - tar)) for far, tar in shares) < 0.01
    assert any(abs(far - values['eer']) < 0.01 and abs(1 - tar - values['eer']) < 0.01 for far, tar in shares)


def test_features_that_are_not_finite_have_no_scores():
    features = around_corners(1)
    features[3, 1] = np.nan
    values, _ = verify(features, LABELS, 'cosine')
    assert all(math.isnan(value) for value in values.values())
    assert math.isnan(unknown_auroc(np.array([1.0, 2.0]), np.array([np.nan])))


def test_features_that_all_coincide_have_scores():
    values, _ = verify(np.zeros((60, 4)), LABELS, 'cosine')
    assert values['auc'] == 0.5


def test_a_true_accept_rate_is_taken_where_the_false_one_is_not_above():
    roc = Roc(np.array([0, 0, 0.05, 0.2, 1.0]), np.array([0, 0.3, 0.5, 0.9, 1.0]))
    np.testing.assert_array_equal(roc.tar_at(np.array([0.0, 0.04, 0.05, 0.1, 0.2, 1.0])), [0.3, 0.3, 0.5, 0.5, 0.9, 1])


def test_strangers_are_told_by_their_distance():
    assert unknown_auroc(np.array([1.0, 2.0]), np.array([3.0, 4.0, 5.0])) == 1
    assert unknown_auroc(np.array([1.0, 4.0]), np.array([3.0, 2.0])) == 0.5


def test_an_interval_holds_the_true_mean_19_times_in_20():
    rng = np.random.default_rng(0)
    found = [interval(values) for values in rng.normal(3, 2, size=(4000, 5))]
    np.testing.assert_allclose(np.mean([i.low <= 3 <= i.high for i in found]), 0.95, atol=0.01)
    assert found[0].mean == pytest.approx((found[0].low + found[0].high) / 2)


def test_of_one_seed_there_is_no_interval():
    alone = interval([0.5])
    assert alone.mean == 0.5
    assert math.isnan(alone.low)
