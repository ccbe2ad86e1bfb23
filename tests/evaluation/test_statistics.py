"""The intervals hold what they promise: their coverage, simulated for every interval that is shown.

A 95 % interval of a share cannot cover 95 % everywhere, because counts are whole numbers: Wilson's
covers 95 % on average over all shares, and as little as 90 % at some beyond 0.95. The bounds below
are those of the methods' sources, less three standard errors of the simulation.
"""

import numpy as np
import pytest

from medqlora.evaluation import statistics
from medqlora.evaluation.comparison import compare_counts
from medqlora.evaluation.statistics import (
    bootstrap_interval,
    difference_interval,
    mcnemar_exact,
    mean_interval,
    sign_flip_test,
    wilson_interval,
)

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


# Paired differences of overlaps: chances that B, and that A, is better on a question, and by how
# much (a beta distribution).
DIFFERENCES = {
    "on all questions": (0.6, 0.4, 2, 6),
    "small on all questions": (0.5, 0.5, 20, 380),
    "on few": (0.05, 0.0, 2, 2),
    "on few, both ways": (0.05, 0.05, 2, 2),
    "on very few": (0.02, 0.0, 2, 2),
    "skewed": (1.0, 0.0, 0.3, 6),
}


def draw_differences(rng, kind, trials, n):
    """Differences, float64 [trials, n], and their true mean."""
    up, down, first, second = DIFFERENCES[kind]
    chance = rng.random((trials, n))
    sizes = rng.beta(first, second, (trials, n))
    signs = np.where(chance < up, 1, np.where(chance < up + down, -1, 0))
    return signs * sizes, (up - down) * first / (first + second)


@pytest.mark.parametrize("kind", DIFFERENCES)
def test_bootstrap_of_paired_differences(kind, monkeypatch):
    """Fewer resamples than in use make the simulation short, and the bounds a little coarser."""
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    for n in (20, 100):
        rng = np.random.default_rng(n)
        drawn, truth = draw_differences(rng, kind, 300, n)
        intervals = [bootstrap_interval(row) for row in drawn]
        assert all(
            low <= row.mean() <= high for (low, high), row in zip(intervals, drawn, strict=True)
        )
        # Three standard errors of 300 trials are 0.04. A skewed sample of 20 rarely shows its tail.
        least = 0.85 if kind == "skewed" and n == 20 else 0.91
        assert cover(intervals, truth) > least, n


def test_plain_bootstrap_would_mislead():
    """Without the two added differences a rare difference is missed, and then denied."""
    rng = np.random.default_rng(0)
    drawn, truth = draw_differences(rng, "on few", 300, 20)
    covered = 0
    for row in drawn:
        means = row[rng.integers(20, size=(1000, 20))].mean(1)
        low, high = np.quantile(means, [0.025, 0.975])
        covered += low <= truth <= high
    assert covered / 300 < 0.7


def test_bootstrap_is_the_same_each_time_and_turns_with_the_models():
    differences = np.random.default_rng(1).normal(0.05, 0.2, 200).clip(-1, 1)
    low, high = bootstrap_interval(differences)
    assert (low, high) == bootstrap_interval(differences)
    # The draws are the same, but quantiles are not quite those from the other side.
    assert bootstrap_interval(-differences) == pytest.approx((-high, -low), abs=2e-3)
    # A sample of this size is nearly normal.
    half = 1.96 * differences.std(ddof=1) / 200**0.5
    assert (low, high) == pytest.approx(
        (differences.mean() - half, differences.mean() + half), abs=4e-3
    )


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (0, 1), (1, 4), (3, 3), (0, 9), (2, 11)])
def test_few_sign_flips_are_exact(only_a, only_b):
    """On right and wrong answers the test of all signs is McNemar's exact test."""
    differences = np.repeat([-1.0, 1.0, 0.0], [only_a, only_b, 50])
    assert sign_flip_test(differences) == pytest.approx(mcnemar_exact(only_a, only_b))


def test_many_sign_flips_are_drawn():
    for only_a, only_b in ((40, 40), (30, 50), (20, 60)):
        differences = np.repeat([-1.0, 1.0], [only_a, only_b])
        exact = mcnemar_exact(only_a, only_b)
        assert sign_flip_test(differences) == pytest.approx(exact, abs=0.015)
    # The signs that were seen count too, so the p-value is never 0.
    assert sign_flip_test(np.ones(200)) == 1 / 10_001
    assert sign_flip_test(np.zeros(200)) == 1


def test_sign_flips_reject_as_often_as_they_say(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 500)
    rng = np.random.default_rng(3)
    drawn, _ = draw_differences(rng, "on few, both ways", 600, 100)
    p = np.array([sign_flip_test(row) for row in drawn])
    for level in (0.05, 0.2):
        assert (p <= level).mean() < level + 3 * (level * (1 - level) / 600) ** 0.5
