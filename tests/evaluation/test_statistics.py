"""The intervals hold what they promise: their coverage, simulated for every interval that is shown.

A 95 % interval of a share cannot cover 95 % everywhere, because counts are whole numbers: Wilson's
covers 95 % on average over all shares, and as little as 90 % at some beyond 0.95. The bounds below
are those of the methods' sources, less three standard errors of the simulation.
"""

import numpy as np
import pytest

from medqlora.evaluation.comparison import compare_counts
from medqlora.evaluation.statistics import difference_interval, mean_interval, wilson_interval

TRIALS = 2000
LEAST = 0.89
SIZES = (20, 100, 600)
SHARES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


def cover(intervals, truth):
    """Return the share of the intervals that hold the truth; all must have a width."""
    low, high = np.array(intervals).T
    assert (high - low > 1e-4).all()
    return float(((low <= truth + 1e-12) & (truth <= high + 1e-12)).mean())


def draw_questions(rng, share, alike, orders, n):
    """Shares of right answers, float64 [TRIALS, n], of questions asked in several orders.

    alike: correlation of two answers to one question.
    """
    strength = 1 / alike - 1
    chances = rng.beta(share * strength, (1 - share) * strength, (TRIALS, n))
    return rng.binomial(orders, chances) / orders


@pytest.mark.parametrize("n", SIZES)
def test_accuracy(n):
    rng = np.random.default_rng(n)
    covered = [
        cover([wilson_interval(int(hits), n) for hits in rng.binomial(n, share, TRIALS)], share)
        for share in SHARES
    ]
    assert min(covered) > LEAST, covered
    assert np.mean(covered) > 0.935, covered


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("alike", [0.1, 0.5, 0.9])
def test_several_orders_of_each_question(n, alike):
    rng = np.random.default_rng(n)
    covered = [
        cover([mean_interval(values) for values in draw_questions(rng, share, alike, 6, n)], share)
        for share in SHARES
    ]
    assert min(covered) > LEAST, covered
    assert np.mean(covered) > 0.935, covered


def test_orders_as_if_independent_would_mislead():
    """Every answer counted as a question of its own: the interval is far too narrow."""
    rng = np.random.default_rng(0)
    values = draw_questions(rng, 0.5, 0.9, 6, 100)
    naive = [wilson_interval(int(6 * row.sum()), 600) for row in values]
    assert cover(naive, 0.5) < 0.65


# Overlaps of words: shares of answers without any and with all, and what lies between.
OVERLAPS = {
    "few": (0.9, 0.02, 2, 4),
    "half": (0.4, 0.1, 2, 2),
    "most": (0.02, 0.9, 4, 2),
    "narrow": (0.0, 0.0, 20, 20),
    "skewed": (0.0, 0.0, 0.2, 8),
}


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", OVERLAPS)
def test_means_of_overlaps(n, kind):
    none, whole, first, second = OVERLAPS[kind]
    rng = np.random.default_rng(n)
    chance = rng.random((TRIALS, n))
    values = np.where(chance < none + whole, 1.0, rng.beta(first, second, (TRIALS, n)))
    values[chance < none] = 0
    truth = whole + (1 - none - whole) * first / (first + second)
    intervals = [mean_interval(row) for row in values]
    assert all(0 <= low <= high <= 1 for low, high in intervals)
    assert cover(intervals, truth) > 0.91


# Shares of questions that only A and only B has right; under 1 they are counts.
DISAGREEMENTS = [
    (0, 0),
    (0, 1),
    (0, 2),
    (1, 1),
    (0, 4),
    (1, 3),
    (0.02, 0.1),
    (0.05, 0.05),
    (0.2, 0.2),
    (0.05, 0.3),
    (0.01, 0.7),
]


@pytest.mark.parametrize("n", SIZES)
def test_paired_differences(n):
    rng = np.random.default_rng(n)
    for only_a, only_b in DISAGREEMENTS:
        shares = [count / n if count >= 1 else count for count in (only_a, only_b)]
        counts = rng.multinomial(n, [*shares, 1 - sum(shares)], TRIALS)
        intervals = [difference_interval(int(a), int(b), n) for a, b, _ in counts]
        assert cover(intervals, shares[1] - shares[0]) > 0.91, (only_a, only_b)


def test_values_of_zero_and_one_are_a_share():
    for right in (0, 1, 7, 20):
        values = np.arange(20) < right
        assert mean_interval(values.astype(float)) == pytest.approx(wilson_interval(right, 20))


@pytest.mark.parametrize("n", [1, 20, 600])
@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_equal_values_leave_a_doubt(n, value):
    low, high = mean_interval(np.full(n, value))
    assert 0 <= low <= value <= high <= 1
    assert high - low > 1 / n / 2
    assert (low == 0) == (value == 0)


@pytest.mark.parametrize("n", [1, 10, 600])
@pytest.mark.parametrize("both", [0, 1])
def test_no_disagreement_leaves_a_doubt(n, both):
    low, high = compare_counts(both * n, 0, 0, n)["difference_ci95"]
    assert low == -high
    # Where none of n disagrees, 3 of n may (Hanley & Lippman-Hand, JAMA 249, 1983).
    assert high >= 3 / (n + 3)
    assert difference_interval(n, 0, n)[0] == -1
    assert difference_interval(n, 0, n)[1] < 0 or n == 1
