"""Means and paired differences of few runs."""
import math
from typing import Dict, NamedTuple, Optional, Sequence

from .._extras import require


class Interval(NamedTuple):
    """A mean, and where it lies with a confidence of 95 %."""
    mean: float
    low: float
    high: float
    std: float  # of a single value
    number: int

    @property
    def excludes_zero(self) -> bool:
        """Whether all of it is on one side of zero."""
        return self.low > 0. or self.high < 0.


def interval(values: Sequence[float], level: float = 0.95) -> Optional[Interval]:
    """Student's interval of the mean of independent, normal values; None for fewer than two.

    Args:
        values: Values.
        level: Confidence.
    """
    n = len(values)
    if n < 2:
        return None
    mean = math.fsum(values) / n
    std = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (n - 1))
    half = require('scipy.stats', 'train').t.ppf(.5 + level / 2, n - 1) * std / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, std, n)


def paired(ours: Dict[int, float], theirs: Dict[int, float], level: float = 0.95) -> Optional[Interval]:
    """The interval of the mean of ours - theirs, seed by seed, over the seeds that both have.

    Args:
        ours: Values by seed.
        theirs: Values by seed.
        level: Confidence.
    """
    return interval([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())], level)
