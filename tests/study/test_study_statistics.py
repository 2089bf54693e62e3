"""Intervals against SciPy and by hand."""
import numpy as np
import pytest
from scipy import stats

from elsa_models.study.statistics import interval, paired


def test_by_hand():
    found = interval([1., 2., 3.])
    assert found.mean == 2. and found.std == 1. and found.number == 3
    half = 4.302652729749464 / 3 ** .5  # Student's, two degrees of freedom
    assert found.low == pytest.approx(2. - half) and found.high == pytest.approx(2. + half)
    assert not found.excludes_zero and interval([-1., -2., -3.], .5).excludes_zero
    assert interval([1.]) is None and interval([]) is None


def test_pairs_against_scipy():
    rng = np.random.default_rng(0)
    a, b = rng.normal(1., 1., 8), rng.normal(size=8)
    found = paired(dict(enumerate(a)), {i: b[i] for i in reversed(range(8))})
    expected = stats.ttest_rel(a, b).confidence_interval(.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.excludes_zero == (stats.ttest_rel(a, b).pvalue < .05)
    fewer = paired(dict(enumerate(a)), dict(enumerate(b[:5])))  # seeds of both alone
    assert fewer.number == 5 and fewer.mean == pytest.approx((a[:5] - b[:5]).mean())
