"""Two models on the same open questions, through eval/compare.py and the reports of a training."""

import json

import numpy as np
import pytest
from conftest import ROOT, run_inside
from hypothesis import given, settings
from hypothesis import strategies as st

from medqlora.evaluation.comparison import compare_predictions
from medqlora.evaluation.metrics import score_predictions
from medqlora.evaluation.open_answers import OPEN_SCORES, token_f1
from medqlora.evaluation.predictions import PredictionError, collect_rows
from medqlora.evaluation.statistics import RESAMPLES
from medqlora.reporting.terminal import compare_scores

COMPARE = ROOT / "eval" / "compare.py"
WORDS = ("fever", "gout", "rest", "the", "insulin", "печень")


def make(texts, golds=None, subjects=None, model="m", prompt="p"):
    """Prediction rows of open questions."""
    return [
        {
            "id": f"q{i}",
            "kind": "open",
            "dataset": "qa",
            "subject": subjects[i] if subjects else None,
            "question": f"What is {i}?",
            "gold": golds[i] if golds else "fever and rest",
            "prediction": text,
            "model": model,
            "prompt_sha256": prompt,
        }
        for i, text in enumerate(texts)
    ]


def compare(a, b, **more):
    return compare_predictions(collect_rows(a), collect_rows(b), **more)


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


answers = st.lists(st.sampled_from(WORDS), max_size=4).map(" ".join)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(answers, answers, answers.map(lambda text: text + " rest")), min_size=1))
def test_comparison_agrees_with_the_scores_of_each_file(triples):
    first, second, golds = zip(*triples, strict=True)
    a, b = make(first, golds, model="a"), make(second, golds, model="b")
    result = compare(a, b[::-1])  # The order of rows does not matter.
    scores = [score_predictions(collect_rows(rows)) for rows in (a, b)]
    for score, interval in OPEN_SCORES.items():
        part = result[score]
        if part is None:
            assert scores[0][score] is None
            continue
        assert [part["a"], part["b"]] == pytest.approx([one[score] for one in scores])
        assert part["a_ci95"] == pytest.approx(scores[0][interval])
        assert part["difference"] == pytest.approx(part["b"] - part["a"])
        low, high = part["difference_ci95"]
        assert -1 <= low <= part["difference"] + 1e-12
        assert part["difference"] - 1e-12 <= high <= 1
        assert 0 < part["p"] <= 1
        same = all(one == other for one, other, _ in triples)
        assert (low == high == 0) == same
    assert result["f1"]["b_higher"] == sum(token_f1(y, g) > token_f1(x, g) for x, y, g in triples)
    assert result["method"]["resamples"] == RESAMPLES


def test_a_file_against_itself_is_exactly_nothing():
    rows = make(["fever", "rest", "", "gout"] * 10, subjects=["a", "b"] * 20)
    result = compare(rows, rows)
    for part in (result, *result["per_subject"].values()):
        for score in OPEN_SCORES:
            assert part[score]["difference"] == 0
            assert part[score]["difference_ci95"] == [0, 0]
            assert part[score]["p"] == 1
    assert result["agreement"]["same_prediction"] == 1
    # Other texts of the same scores may still differ on other questions.
    other = compare(rows, make(["rest", "fever", "", "gout"] * 10))
    assert other["f1"]["difference"] == 0
    assert other["f1"]["difference_ci95"][0] < 0 < other["f1"]["difference_ci95"][1]


def test_a_real_difference_is_found_and_corrected_by_subject():
    rng = np.random.default_rng(0)
    subjects = [f"s{i % 4}" for i in range(120)]
    # The second model is better in subject s0 alone.
    better = ["fever and rest" if s == "s0" else str(rng.integers(9)) for s in subjects]
    worse = [str(rng.integers(9)) for _ in subjects]
    result = compare(make(worse, subjects=subjects), make(better, subjects=subjects))
    assert result["f1"]["difference_ci95"][0] > 0
    assert result["f1"]["p"] < 1e-3
    parts = result["per_subject"]
    assert parts["s0"]["f1"]["holm_p"] == pytest.approx(4 * parts["s0"]["f1"]["p"])
    assert parts["s0"]["exact_match"]["holm_p"] < 1e-6
    assert all(parts[name]["f1"]["holm_p"] == 1 for name in ("s1", "s2", "s3"))
    back = compare(make(better, subjects=subjects), make(worse, subjects=subjects))
    assert back["f1"]["p"] == result["f1"]["p"]
    assert back["f1"]["difference"] == -result["f1"]["difference"]


def test_files_that_do_not_belong_together_are_refused():
    rows = make(["fever", "rest"])
    choice = [{"id": f"q{i}", "gold": "A", "prediction": "A"} for i in range(2)]
    for other, message in (
        (rows[:1], "hold different questions"),
        (make(["fever", "rest"], ["x", "fever and rest"]), "id q0 has label 'fever and rest' in"),
        (make(["fever", "rest"], prompt="other"), "were asked with different prompts"),
        (choice, "holds predictions of kind open and .* of kind choice"),
    ):
        with pytest.raises(PredictionError, match=message):
            compare(rows, other)
    assert compare(rows, rows[:1], common=True)["n"] == 1
    assert compare(rows, make(["a", "b"], prompt="other"), any_prompt=True)["n"] == 2
    text = [{"id": "t", "kind": "text", "logprob": -1.0, "tokens": 3}]
    with pytest.raises(PredictionError, match="kind text; paired comparison is for answers"):
        compare(text, text)


def test_command(tmp_path, monkeypatch, capsys):
    subjects = ["gout", "rare"] * 1 + ["gout"] * 28
    a = write(tmp_path / "a.jsonl", make(["fever"] * 30, subjects=subjects))
    b = write(tmp_path / "b.jsonl", make(["fever and rest"] * 15 + ["fever"] * 15, None, subjects))
    code, errors = run_inside(COMPARE, [a, b, "--output", tmp_path / "c.json"], monkeypatch)
    assert (code, errors) == (0, "")
    written = json.loads((tmp_path / "c.json").read_text())
    assert written["f1"]["b_higher"] == written["exact_match"]["b_higher"] == 15
    assert set(written["per_subject"]) == {"gout", "rare"}
    code, _ = run_inside(COMPARE, [a, b, "--max_disagreement", "0.5"], monkeypatch)
    assert code == 0
    code, _ = run_inside(COMPARE, [a, b, "--max_disagreement", "0.49"], monkeypatch)
    assert code == 1
    code, errors = run_inside(COMPARE, [a, b, "--max_mean_difference", "0.1"], monkeypatch)
    assert code == 2
    assert "have no option_logprobs in common" in errors


def test_training_says_what_it_found_and_what_was_cut():
    base = make(["fever"] * 40, subjects=["a", "b"] * 20, model="base")
    tuned = make(["fever and rest"] * 39 + [""], subjects=["a", "b"] * 20, model="tuned")
    base[0]["reached_limit"] = 1
    scores, shown = compare_scores(base, tuned)
    assert scores["exact_match"] == 39 / 40
    assert scores["base"]["exact_match"] == 0
    assert scores["comparison"]["f1"]["b_higher"] == 39
    assert scores["reached_limit"] == 0
    assert scores["base"]["reached_limit"] == 1
    table, difference, method, *odd = shown
    assert [column.header for column in table.columns][2:] == [
        "base",
        "95 % interval",
        "tuned",
        "95 % interval",
    ]
    cells = list(table.columns[0].cells)
    assert list(map(str, cells)) == ["exact match", "F1", "ROUGE-L", "F1, a", "F1, b"]
    assert "difference in F1 +4" in difference.plain
    assert f"{RESAMPLES:,} resamples" in method.plain
    assert [line.plain for line in odd] == [
        "answers that were cut at data.max_new_tokens: base 1, tuned 0 of 40",
        "empty answers: base 0, tuned 1 of 40",
    ]
