"""A mean over seeds with its 95 % interval, without which no two arms can be compared."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and the bounds within which, at 95 %, the mean over all seeds lies. Of one value there are no bounds."""

    mean: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


def interval(values: Sequence[float]) -> Interval:
    """By Student's t, since seeds are few."""
    mean, count = float(np.mean(values)), len(values)
    half = math.nan
    if count > 1:
        half = float(stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / math.sqrt(count))
    return Interval(mean, mean - half, mean + half)


def intervals(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> dict[str, Interval]:
    """That of each of these columns over the rows."""
    return {key: interval([row[key] for row in rows]) for key in keys}
