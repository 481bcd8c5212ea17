"""Measures of retrieval beside their definitions in loops, and beside scikit-learn's average precision."""

import math

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from experiments.metrics.retrieval import retrieve

NAMES = ('rank_1', 'rank_5', 'map', 'r_precision', 'map_at_r')
SIMILARITIES = {
    'cosine': lambda a, b: sum(a * b) / math.sqrt(sum(a * a) * sum(b * b)),
    'euclidean': lambda a, b: -math.dist(a, b),
}

# Classes of 1, 2, 3, 7 and 12 examples in mixed order, which overlap.
LABELS = np.random.default_rng(0).permutation(np.repeat([5, 2, 9, 0, 7], [1, 2, 3, 7, 12]))
FEATURES = np.random.default_rng(1).normal(size=(25, 3)).astype(np.float32) + np.eye(10, 3)[LABELS].astype(np.float32)


def by_loops(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The measures from the scores of all pairs, query by query and rank by rank."""
    queries = []
    for query in range(len(labels)):
        gallery = [other for other in range(len(labels)) if other != query]
        ranking = sorted(gallery, key=lambda other: (-scores[query, other], other))
        relevant = sum(labels[other] == labels[query] for other in gallery)
        if not relevant:
            continue
        found, rank_1, rank_5, average, within, average_within = 0, 0.0, 0.0, 0.0, 0.0, 0.0
        for rank, other in enumerate(ranking, start=1):
            if labels[other] != labels[query]:
                continue
            found += 1
            average += found / rank / relevant
            rank_1 = max(rank_1, float(rank == 1))
            rank_5 = max(rank_5, float(rank <= 5))
            if rank <= relevant:
                within += 1 / relevant
                average_within += found / rank / relevant
        queries.append((rank_1, rank_5, average, within, average_within))
    means = dict(zip(NAMES, np.mean(queries, axis=0), strict=True))
    return {**means, 'queries_left_out': len(labels) - len(queries)}


def assert_equal(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-12, err_msg=name)


@pytest.mark.parametrize('similarity', ['cosine', 'euclidean'])
@pytest.mark.parametrize('pairs', [1, 60, 10**6], ids=['one query', 'two queries', 'all queries'])
def test_measures_equal_their_definitions_in_blocks_of_any_size(similarity, pairs):
    features = FEATURES.astype(float)
    scores = np.array([[SIMILARITIES[similarity](a, b) for b in features] for a in features])
    expected = by_loops(scores, LABELS)
    assert expected['queries_left_out'] == 1
    assert len(set(expected.values())) == 6
    assert_equal(retrieve(FEATURES, LABELS, similarity, pairs=pairs), expected)


@pytest.mark.parametrize('similarity', ['cosine', 'euclidean'])
def test_equal_similarities_rank_by_index(similarity):
    # Points on two rays, each of them several times.
    rng = np.random.default_rng(2)
    features, labels = np.eye(2)[rng.integers(0, 2, 40)] * rng.integers(1, 3, (40, 1)), rng.integers(0, 3, 40)
    scores = [[SIMILARITIES[similarity](a, b) for b in features] for a in features]
    assert_equal(retrieve(features, labels, similarity, pairs=200), by_loops(np.array(scores), labels))
    # Points that a matrix product would tell apart by its rounding.
    features = np.tile(rng.normal(size=33), (40, 1))
    assert_equal(retrieve(features, labels, similarity), by_loops(np.zeros((40, 40)), labels))


def test_a_case_by_hand():
    # On a line, with the classes a b a a b and a tie of the first two for the third.
    features, labels = np.array([[0.0], [2.0], [1.0], [4.0], [9.0]]), np.array([0, 1, 0, 0, 1])
    # Rankings: 0 -> 2 1 3 4 is a b a b; 1 -> 2 0 3 4 is a a a b, as 0 and 3 tie;
    # 2 -> 0 1 3 4 is a b a b, as 0 and 1 tie; 3 -> 1 2 0 4 is b a a b; 4 -> 3 1 2 0 is a b a a.
    expected = {
        'rank_1': 2 / 5,
        'rank_5': 1.0,
        'map': ((1 + 2 / 3) / 2 + 1 / 4 + (1 + 2 / 3) / 2 + (1 / 2 + 2 / 3) / 2 + 1 / 2) / 5,
        'r_precision': (1 / 2 + 0 + 1 / 2 + 1 / 2 + 0) / 5,
        'map_at_r': (1 / 2 + 0 + 1 / 2 + 1 / 4 + 0) / 5,
        'queries_left_out': 0,
    }
    assert_equal(retrieve(features, labels, 'euclidean'), expected)


def test_map_is_the_mean_of_the_average_precision_of_scikit_learn():
    scores = -np.array([[math.dist(a, b) for b in FEATURES] for a in FEATURES])
    others = ~np.eye(25, dtype=bool)
    queries = np.flatnonzero(np.bincount(LABELS)[LABELS] > 1)
    expected = [
        average_precision_score(LABELS[others[query]] == LABELS[query], scores[query, others[query]])
        for query in queries
    ]
    np.testing.assert_allclose(retrieve(FEATURES, LABELS, 'euclidean')['map'], np.mean(expected), rtol=1e-6)


@pytest.mark.parametrize('labels', [[], [3], [3, 1, 2]])
def test_without_a_query_there_are_no_measures(labels):
    values = retrieve(np.ones((len(labels), 2)), np.array(labels, int), 'cosine')
    assert values.pop('queries_left_out') == len(labels)
    assert all(math.isnan(value) for value in values.values())


def test_features_that_are_not_finite_have_no_measures():
    values = retrieve(np.where(np.arange(25)[:, None] == 3, np.inf, FEATURES), LABELS, 'cosine')
    assert values.pop('queries_left_out') == 1
    assert all(math.isnan(value) for value in values.values())
