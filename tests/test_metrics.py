import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medqlora.metrics import calibration_error, compare_paired, mcnemar_exact, score_predictions, wilson_interval


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],
)  # the last is Newcombe's example (Statistics in Medicine 17, 1998, table I)
def test_wilson_against_published_values(right, total, low, high):
    assert wilson_interval(right, total) == pytest.approx((low, high), abs=1e-4)


@given(st.integers(1, 5000), st.data())
def test_wilson_holds_the_estimate(total, data):
    right = data.draw(st.integers(0, total))
    low, high = wilson_interval(right, total)
    assert 0 <= low <= right / total <= high <= 1


def test_mcnemar_against_the_binomial_sum():
    exact = 2 * sum(math.comb(18, i) for i in range(6)) / 2**18
    assert mcnemar_exact(5, 13) == pytest.approx(exact)
    assert mcnemar_exact(0, 0) == 1
    assert mcnemar_exact(7, 7) == 1
    assert mcnemar_exact(0, 400) < 1e-100


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=200))
def test_comparison_is_antisymmetric(pairs):
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    forth, back = compare_paired(a, b, 200), compare_paired(b, a, 200)
    assert forth["difference"] == pytest.approx(-back["difference"])
    assert forth["mcnemar_p"] == pytest.approx(back["mcnemar_p"])
    assert forth["difference"] == pytest.approx(np.mean(b) - np.mean(a))


def row(gold, prediction, subject="s", logprobs=None):
    return {"id": "x", "gold": gold, "prediction": prediction, "subject": subject, "letter_mass": 0.5, "option_logprobs": logprobs}


def test_scores_by_hand():
    metrics = score_predictions([row("A", "A", "x"), row("A", "B", "x"), row("C", "C", "y"), row("C", None, "y")])
    assert (metrics["n"], metrics["accuracy"], metrics["unparsed"], metrics["letter_mass"]) == (4, 0.5, 1, 0.5)
    assert metrics["per_subject"]["x"]["accuracy"] == 0.5
    assert metrics["accuracy_ci95"] == list(wilson_interval(2, 4))


def test_unparsed_is_wrong_even_if_gold_is_missing_too():
    assert score_predictions([row(None, None)])["accuracy"] == 0


def test_calibration_error_by_hand():
    sure = {"A": math.log(0.9), "B": math.log(0.1)}
    rows = [row("A", "A", logprobs=sure)] * 6 + [row("B", "A", logprobs=sure)] * 4
    assert calibration_error(rows) == pytest.approx(0.3)
    assert calibration_error([row("A", "A")]) is None
