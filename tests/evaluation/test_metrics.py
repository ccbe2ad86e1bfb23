import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from medqlora.evaluation.comparison import compare_paired, compare_predictions
from medqlora.evaluation.metrics import score_predictions
from medqlora.evaluation.open_answers import matches, token_f1
from medqlora.evaluation.predictions import PredictionError, collect_rows
from medqlora.evaluation.statistics import adjust_holm, mcnemar_exact, wilson_interval


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (5, 10, 0.2366, 0.7634),
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),
    ],
)  # the last is Newcombe's example (Statistics in Medicine 17, 1998, table I)
def test_wilson_against_published_values(right, total, low, high):
    assert wilson_interval(right, total) == pytest.approx((low, high), abs=1e-4)


@given(st.integers(1, 5000), st.data())
def test_wilson_holds_the_estimate(total, data):
    right = data.draw(st.integers(0, total))
    low, high = wilson_interval(right, total)
    assert 0 <= low <= right / total <= high <= 1


def sum_binomial(only_a: int, only_b: int) -> float:
    """The test by its definition: twice the smaller tail, in exact fractions."""
    n = only_a + only_b
    tail = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1))
    return float(min(Fraction(1), Fraction(2 * tail, 2**n)))


@given(st.integers(0, 600), st.integers(0, 600))
@example(5, 13)
@example(0, 0)
@example(7, 7)
@example(0, 1000)
def test_mcnemar_is_the_binomial_sum(only_a, only_b):
    expected = sum_binomial(only_a, only_b)
    assert mcnemar_exact(only_a, only_b) == pytest.approx(expected, rel=1e-9)
    assert mcnemar_exact(only_b, only_a) == pytest.approx(expected, rel=1e-9)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=200))
def test_comparison_is_antisymmetric(pairs):
    a = [x for x, _ in pairs]
    b = [y for _, y in pairs]
    forth = compare_paired(a, b)
    back = compare_paired(b, a)
    assert forth["difference"] == pytest.approx(-back["difference"])
    assert forth["mcnemar_p"] == pytest.approx(back["mcnemar_p"])
    assert forth["difference"] == pytest.approx(np.mean(b) - np.mean(a))
    assert forth["difference_ci95"] == pytest.approx([-x for x in back["difference_ci95"][::-1]])
    low, high = forth["difference_ci95"]
    assert -1 <= low <= forth["difference"] <= high <= 1
    assert high - low > 0.01


NUMBERS = itertools.count()


def row(gold, prediction, subject="s", logprobs=None, **more):
    facts = {
        "id": f"q{next(NUMBERS)}",
        "gold": gold,
        "prediction": prediction,
        "subject": subject,
        "letter_mass": 0.5,
    }
    return facts | {"option_logprobs": logprobs, "prompt_sha256": "p"} | more


def score(*rows):
    return score_predictions(collect_rows(rows))


def test_scores_by_hand():
    metrics = score(row("A", "A", "x"), row("A", "B", "x"), row("C", "C", "y"), row("C", None, "y"))
    assert (metrics["n"], metrics["accuracy"], metrics["unparsed"], metrics["letter_mass"]) == (
        4,
        0.5,
        1,
        0.5,
    )
    assert metrics["per_subject"]["x"]["accuracy"] == 0.5
    assert metrics["accuracy_ci95"] == list(wilson_interval(2, 4))


def test_unparsed_is_wrong_even_if_gold_is_missing_too():
    rows = collect_rows([row(None, None)], labelled=False)
    assert not rows.right.any()


SURE = {"A": math.log(0.9), "B": math.log(0.1)}


def test_calibration_by_hand():
    metrics = score(
        *[row("A", "A", logprobs=SURE) for _ in range(6)],
        *[row("B", "A", logprobs=SURE) for _ in range(4)],
    )
    assert metrics["ece"] == pytest.approx(0.3)
    assert metrics["reliability"] == [
        {"from": 0.9, "to": 1.0, "n": 10, "confidence": pytest.approx(0.9), "accuracy": 0.6}
    ]
    assert metrics["brier"] == pytest.approx(0.6 * 0.02 + 0.4 * 1.62)
    assert score(row("A", "A"))["ece"] is None


def test_selective_accuracy_by_hand():
    """Nine sure and right, one unsure and wrong: whoever drops the least confident tenth has none
    wrong.
    """
    unsure = {"A": math.log(0.51), "B": math.log(0.49)}
    selective = score(
        *[row("A", "A", logprobs=SURE) for _ in range(9)], row("B", "A", logprobs=unsure)
    )["selective"]
    assert selective["accuracy_at_coverage"]["90%"] == 1
    assert selective["accuracy_at_coverage"]["100%"] == pytest.approx(0.9)
    assert selective["area_under_risk_coverage"] == pytest.approx(0.01)


def test_margins_and_near_ties():
    tie = {"A": -1.0, "B": -1.005, "C": -3.0}
    metrics = score(row("A", "A", logprobs=tie), row("A", "A", logprobs={"A": -0.5, "B": -2.5}))
    assert metrics["near_ties"] == 1
    assert metrics["margin_quartiles"][1] == pytest.approx(1.0025)


def test_position_bias_and_flips():
    always_first = {"ABC": [-0.1, -3, -3], "BCA": [-0.1, -3, -3], "CAB": [-0.1, -3, -3]}
    steady = {"ABC": [-3, -0.1, -3], "BCA": [-0.1, -3, -3], "CAB": [-3, -3, -0.1]}
    logprobs = {"A": -1.0, "B": -1.1, "C": -1.2}
    bias = score(
        row("B", "A", logprobs=logprobs, permutations=always_first),
        row("B", "B", logprobs=logprobs, permutations=steady),
    )["position_bias"]
    assert bias["flip_rate"] == 0.5
    assert bias["per_position"]["A"]["accuracy"] == 1
    assert bias["per_position"]["B"]["accuracy"] == 0.5
    assert bias["letters"]["A"]["predicted"] == 0.5
    assert bias["letters"]["B"]["gold"] == 1


def test_votes_are_a_confidence():
    metrics = score(row("A", "A", votes={"A": 3, "B": 1}), row("A", "B", votes={"B": 4}))
    assert metrics["ece"] == pytest.approx((0.25 + 1) / 2)


@pytest.mark.parametrize(
    ("text", "gold", "f1"),
    [
        ("The cat sat.", "cat  sat", 1),
        ("a dog", "cat", 0),
        ("cat sat", "cat ran", 0.5),
        ("the", "an", 0),
        ("", "", 0),
        ("?!", "the liver", 0),
    ],
)
def test_squad_f1(text, gold, f1):
    assert token_f1(text, gold) == f1
    assert matches(text, gold) is (f1 == 1)


def test_open_answers():
    rows = [
        row("the liver", "The liver.", kind="open"),
        row("kidney and ureter", "kidney", kind="open"),
        row("skin", "", kind="open"),
    ]
    metrics = score(*rows)
    assert metrics["exact_match"] == pytest.approx(1 / 3)
    assert metrics["f1"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert metrics["rouge_l"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert metrics["unparsed"] == 1
    for key in ("exact_match", "f1", "rouge_l"):
        low, high = metrics[f"{key}_ci95"]
        assert 0 <= low < metrics[key] < high <= 1


def test_empty_answers_have_no_score():
    """An answer without words scores nothing, even where the right one has none either."""
    metrics = score(
        row("the liver", "", kind="open"),
        row("the liver", "The", kind="open"),
        row("%", "%", kind="open"),
    )
    assert (metrics["exact_match"], metrics["f1"], metrics["rouge_l"]) == (0, 0, 0)
    assert (metrics["n"], metrics["unparsed"]) == (3, 1)
    assert (metrics["wordless_references"], metrics["rouge_l_n"]) == (1, 2)


def test_rouge_is_for_latin_letters():
    """ROUGE's words are of a to z: other scripts are counted and never scored 0."""
    answers = ("la fièvre élevée", "печень", "肝臓", "α")
    metrics = score(*[row(text, text, kind="open") for text in answers])
    assert metrics["exact_match"] == 1
    assert (metrics["rouge_l"], metrics["rouge_l_n"]) == (1, 1)
    metrics = score(*[row(text, text, str(i), kind="open") for i, text in enumerate(answers[1:])])
    assert (metrics["rouge_l"], metrics["rouge_l_ci95"], metrics["rouge_l_n"]) == (None, None, 0)
    assert metrics["per_subject"]["0"]["rouge_l"] is None


def test_cloze_is_calibrated_by_what_decides():
    """By characters B is right with a probability of 0.73, though its text as a whole is rare."""
    cloze = {"predictions": {"raw": "A", "character": "B"}, "options": ["ab", "a" * 20]}
    logprobs = {"A": -3.0, "B": -10.0}
    by_length = {"A": -1.5, "B": -0.5}
    metrics = score(row("B", "B", logprobs=logprobs, normalized_logprobs=by_length, **cloze))
    chance = 1 / (1 + math.exp(-1))
    assert metrics["ece"] == pytest.approx(1 - chance)
    assert metrics["brier"] == pytest.approx(2 * (1 - chance) ** 2)
    assert metrics["margin_quartiles"][1] == pytest.approx(1)
    assert metrics["per_normalization"]["raw"]["accuracy"] == 0
    # Rows of earlier versions do not hold what decided, so nothing is known of its probability.
    assert score(row("B", "B", logprobs=logprobs, **cloze))["ece"] is None


def test_letters_without_options_keep_their_columns():
    rows = collect_rows([row("C", "C", logprobs={"A": -2.0, "C": -0.1}), row("D", None)])
    assert rows.logprobs[0].tolist() == pytest.approx([-2.0, math.nan, -0.1], nan_ok=True)
    metrics = score_predictions(rows)
    wrong = 1 / (1 + math.exp(1.9))
    assert metrics["brier"] == pytest.approx(2 * wrong**2)
    assert metrics["position_bias"]["letters"]["C"]["mean_probability"] == pytest.approx(1 - wrong)


def test_orders_of_one_question_are_one_observation():
    """24 orders put the right one of four options six times at each place, with like answers."""
    orders = ["".join(order) for order in itertools.permutations("ABCD")]
    sure = {order: [0.0 if letter == "A" else -9.0 for letter in order] for order in orders}
    lost = {order: [0.0 if letter == "B" else -9.0 for letter in order] for order in orders}
    rows = [row("A", "A", permutations=sure) for _ in range(5)]
    rows += [row("A", "B", permutations=lost) for _ in range(5)]
    place = score(*rows)["position_bias"]["per_position"]["A"]
    assert (place["n"], place["questions"], place["accuracy"]) == (60, 10, 0.5)
    assert place["accuracy_ci95"] == pytest.approx(wilson_interval(5, 10))
    unknown = {"AB": [None, None], "BA": [None, None]}
    assert score(row("A", None, permutations=unknown))["position_bias"]["flip_rate"] == 0


def test_unfinished_thoughts_have_a_count_of_their_own():
    read = row("A", "A", text="<think>x</think>A", unfinished=1)  # another sample was read
    broken = row("A", None, unfinished=1)
    metrics = score(read, broken, row("A", None))
    assert (metrics["unparsed"], metrics["unfinished"]) == (2, 1)
    metrics = score(row("fever", None, kind="open", unfinished=1))
    assert (metrics["unparsed"], metrics["unfinished"], metrics["f1"]) == (1, 1, 0)


def test_perplexity():
    rows = [
        {
            "id": f"t{i}",
            "kind": "text",
            "logprob": -math.log(4) * n,
            "tokens": n,
            "bytes": 2 * n,
            "words": n // 2,
        }
        for i, n in enumerate((10, 30))
    ]
    metrics = score(*rows)
    assert metrics["perplexity"] == pytest.approx(4)
    assert metrics["word_perplexity"] == pytest.approx(16)
    assert metrics["bits_per_byte"] == pytest.approx(1)


def test_holm_by_hand():
    assert adjust_holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_comparison_names_what_changed():
    first = [
        row("A", "A", "x"),
        row("A", "B", "x", question="Which is NOT true of 5 mg?"),
        row("C", "B", "y"),
    ]
    second = [{**first[0], "prediction": "B"}, {**first[1], "prediction": "A"}, first[2]]
    result = compare_predictions(collect_rows(first), collect_rows(second[::-1]))
    assert (result["n"], result["only_a_right"], result["only_b_right"], result["difference"]) == (
        3,
        1,
        1,
        0,
    )
    outcomes = result["outcomes"]
    assert outcomes["fixed"]["ids"] == [first[1]["id"]]
    assert outcomes["broken"]["ids"] == [first[0]["id"]]
    assert outcomes["fixed"]["by_negation"] == {"negated": 1}
    assert outcomes["fixed"]["by_numbers"] == {"with numbers": 1}
    assert outcomes["both_wrong"]["by_subject"] == {"y": 1}
    assert result["per_subject"]["y"]["n"] == 1
    assert result["agreement"]["different_predictions"] == 2


def test_questions_left_out_are_counted_and_compared_with_nothing():
    first, second, third = (row("A", "A", too_long=None) for _ in range(3))
    dropped = second | {"prediction": None, "too_long": 700}
    metrics = score(first, dropped, third)
    assert (metrics["n"], metrics["accuracy"], metrics["unparsed"]) == (2, 1, 0)
    assert (metrics["too_long"], metrics["too_long_ids"]) == (1, [second["id"]])
    some, all_three = collect_rows([first, dropped, third]), collect_rows([first, second, third])
    with pytest.raises(
        PredictionError, match=r"1 only in the second, 2 in both; 1 and 0 were left out as too long"
    ):
        compare_predictions(some, all_three)
    for a, b, common in ((some, all_three, True), (some, some, False)):
        result = compare_predictions(a, b, common)
        assert (result["n"], result["too_long_a"], result["too_long_b"]) == (2, 1, int(b is some))
    with pytest.raises(PredictionError, match="all 1 questions are longer than the model can read"):
        collect_rows([dropped])


def test_comparison_refuses_what_cannot_be_compared():
    a = [row("A", "A"), row("A", "B")]
    b = [row("A", "A"), row("A", "B")]
    with pytest.raises(
        PredictionError, match="2 only in the first, 2 only in the second, 0 in both"
    ):
        compare_predictions(collect_rows(a), collect_rows(b), common=True)
    with pytest.raises(PredictionError, match=r"different questions .1 only in the first"):
        compare_predictions(collect_rows(a), collect_rows(a[:1]))
    assert compare_predictions(collect_rows(a), collect_rows(a[:1]), common=True)["n"] == 1
    with pytest.raises(PredictionError, match=r"label 'A' in .* and 'B'"):
        compare_predictions(collect_rows(a), collect_rows([a[0] | {"gold": "B"}, a[1]]))
    other = [r | {"prompt_sha256": "q"} for r in a]
    with pytest.raises(PredictionError, match="different prompts"):
        compare_predictions(collect_rows(a), collect_rows(other))
    assert (
        compare_predictions(collect_rows(a), collect_rows(other), any_prompt=True)["difference"]
        == 0
    )
