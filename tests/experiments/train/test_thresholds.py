"""The distance beyond which an example is of no known class."""

import numpy as np

from experiments.train.thresholds import threshold_of


def test_at_least_95_percent_of_the_distances_are_within_the_threshold():
    distances = np.random.default_rng(0).exponential(size=359)
    within = np.mean(distances <= threshold_of(distances))
    assert 0.95 <= within < 0.953
    assert threshold_of(np.array([2.0])) == 2.0
