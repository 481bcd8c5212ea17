"""Retrieval: each example is a query, and all other examples are ranked by their similarity to it."""

import numpy as np
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.preprocessing import normalize

# Scores of at most this number of pairs are in memory at a time. They take 16 MiB, and their order as much again.
PAIRS = 2**21

MEASURED = ('rank_1', 'rank_5', 'map', 'r_precision', 'map_at_r')


def retrieve(features: np.ndarray, labels: np.ndarray, similarity: str, *, pairs: int = PAIRS) -> dict[str, float]:
    """Measures for each example how the others of its class rank among all others.

    A query has R other examples of its class. hit(i) is 1 if the i-th example of its ranking is one of them, else 0,
    and P(i) = (hit(1) + ... + hit(i)) / i. The measures are means over the queries of

        rank-k       1 if hit(i) = 1 for an i <= k, else 0
        mAP          1/R Σ_i P(i) hit(i)
        R-precision  1/R Σ_{i <= R} hit(i)
        MAP@R        1/R Σ_{i <= R} P(i) hit(i)

    Equal similarities rank by index. An example that is alone in its class is no query, but others may retrieve it.

    Args:
        features: `[N, D]`. If a feature is not finite, all measures are NaN.
        labels: `[N]`, the class of each example.
        similarity: `cosine`, or `euclidean` for the negative distance.
        pairs: Number of scores in memory at a time, at least those of one query.

    Returns:
        The measures by name, NaN if there is no query, and the number of examples that are no query.
    """
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    relevant = counts[inverse] - 1  # R of each example
    queries = np.flatnonzero(relevant)
    values = np.full((len(MEASURED), 1), np.nan)
    if len(queries) and np.isfinite(features).all():
        points = features.astype(np.float64)
        points = np.asarray(normalize(points)) if similarity == 'cosine' else points
        # A matrix product may round equal columns differently, so equal points share one.
        distinct, column = np.unique(points, axis=0, return_inverse=True)
        size = max(1, pairs // len(labels))
        blocks = []
        for block in (queries[start : start + size] for start in range(0, len(queries), size)):
            scores = _similarities(points[block], distinct, similarity)[:, column]
            blocks.append(_measure(_hits(scores, block, labels), relevant[block]))
        values = np.concatenate(blocks, axis=1)
    means = dict(zip(MEASURED, values.mean(axis=1).tolist(), strict=True))
    return {**means, 'queries_left_out': len(labels) - len(queries)}


def _similarities(queries: np.ndarray, points: np.ndarray, similarity: str) -> np.ndarray:
    return queries @ points.T if similarity == 'cosine' else -euclidean_distances(queries, points)


def _hits(scores: np.ndarray, queries: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns whether each example of the rankings has the class of its query, bool `[Q, N - 1]`."""
    scores[np.arange(len(queries)), queries] = -np.inf  # a query ranks last, and is cut off
    order = np.argsort(-scores, axis=1, kind='stable')
    return labels[order[:, :-1]] == labels[queries, None]


def _measure(hits: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """Returns the measures of each query, `[len(MEASURED), Q]`, from its hits `[Q, N - 1]` and its R `[Q]`."""
    query, place = np.nonzero(hits)
    first = np.cumsum(relevant) - relevant  # of the hits of each query
    rank = place + 1
    precision = (np.arange(len(rank)) - first[query] + 1) / rank
    within = rank <= relevant[query]

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(query, values, len(relevant)) / relevant

    best = rank[first]
    return np.stack([best <= 1, best <= 5, mean(precision), mean(within), mean(precision * within)])
