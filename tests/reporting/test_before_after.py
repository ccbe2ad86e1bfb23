"""Comparisons of a base, its quantized form, the tuned and the merged model, from their rows."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medqlora.evaluation.comparison import compare_predictions
from medqlora.evaluation.predictions import PredictionError, read_predictions
from medqlora.reporting.before_after import (
    MODELS,
    PAIRS,
    BeforeAfterError,
    compare_models,
    compare_strata,
    list_tables,
    name_strata,
    summarise,
)

LEVELS = ("basic", "intermediate", "advanced")


def write_rows(path, right: list[bool], **changes) -> None:
    """Write predictions of two options, of which A is right."""
    lines = []
    for number, hit in enumerate(right):
        row = {
            "id": f"q{number}",
            "kind": "choice",
            "dataset": "mcq",
            "subject": None,
            "question": "What?",
            "options": ["yes", "no"],
            "gold": "A",
            "prediction": "A" if hit else "B",
            "option_logprobs": {"A": -0.1 if hit else -2.4, "B": -2.4 if hit else -0.1},
            "letter_mass": 1.0,
            "text": None,
            "prompt_sha256": "p",
            "engine": "hf",
            "model": path.stem,
            "columns": {"level": LEVELS[number % 3]},
        }
        lines.append(json.dumps(row | changes) + "\n")
    path.write_text("".join(lines))


def read_models(folder, answers: dict[str, list[bool]]) -> dict:
    predictions = {}
    for name, right in answers.items():
        write_rows(folder / f"{name}.jsonl", right)
        predictions[name] = read_predictions(folder / f"{name}.jsonl")
    return predictions


ANSWERS = st.lists(st.tuples(*[st.booleans()] * 4), min_size=6, max_size=40)


@given(ANSWERS)
def test_comparisons_are_paired_and_strata_add_up(tmp_path_factory, answers):
    folder = tmp_path_factory.mktemp("models")
    columns = zip(*answers, strict=True)
    predictions = read_models(folder, dict(zip(MODELS, map(list, columns), strict=True)))
    compared = compare_models(predictions)
    assert list(compared) == [f"{after}_against_{before}" for before, after in PAIRS]
    for (before, after), result in zip(PAIRS, compared.values(), strict=True):
        whole = compare_predictions(predictions[before], predictions[after])
        adjusted = result.pop("holm_p")
        assert result == {key: whole[key] for key in result}
        assert result["mcnemar_p"] <= adjusted <= 1
    names = name_strata(predictions["tuned"], "level")
    strata = compare_strata(predictions, names)
    assert set(strata) == set(LEVELS)
    for name in MODELS:
        parts = [part["models"][name] for part in strata.values()]
        assert sum(part["n"] for part in parts) == len(answers)
        right = sum(part["n"] * part["accuracy"] for part in parts)
        assert right == pytest.approx(summarise(predictions[name])["accuracy"] * len(answers))
    pairs = [part["tuned_against_base_quantized"] for part in strata.values()]
    tuned = compared["tuned_against_base_quantized"]
    for key in ("n", "only_a_right", "only_b_right"):
        assert sum(pair[key] for pair in pairs) == tuned[key]


def test_models_that_answered_other_questions_are_refused(tmp_path):
    predictions = read_models(tmp_path, {name: [True] * 6 for name in MODELS})
    write_rows(tmp_path / "merged.jsonl", [True] * 5)
    predictions["merged"] = read_predictions(tmp_path / "merged.jsonl")
    with pytest.raises(PredictionError, match="different questions"):
        compare_models(predictions)
    write_rows(tmp_path / "merged.jsonl", [True] * 6, prompt_sha256="other")
    predictions["merged"] = read_predictions(tmp_path / "merged.jsonl")
    with pytest.raises(PredictionError, match="different prompts"):
        compare_models(predictions)


def test_strata_are_values_of_a_row_or_of_the_data(tmp_path):
    path = tmp_path / "a.jsonl"
    write_rows(path, [True, False, True])
    rows = read_predictions(path)
    assert list(name_strata(rows, "level").values()) == list(LEVELS)
    assert set(name_strata(rows, "dataset").values()) == {"mcq"}
    with pytest.raises(BeforeAfterError, match="no question has a value"):
        name_strata(rows, "subject")


def test_tables_show_what_was_measured(tmp_path):
    predictions = read_models(tmp_path, {name: [True, False] * 3 for name in MODELS})
    timed = {"e2el_ms": {"p50": 12.34, "p95": 56.78}, "questions_per_second": 9.0}
    measured = {"disk_bytes": 2**20, "memory_bytes": 2**21, "weights": "nf4", "scoring": timed}
    training = {
        "measured_peak_bytes": 2**22,
        "measured_step_bytes": None,
        "predicted_peak_bytes": None,
        "full_tuning_predicted_bytes": 2**24,
        "base_parameters": 1_000_000,
        "trainable_parameters": 5_000,
        "trainable_share": 0.005,
        "adapter_bytes": 2**19,
    }
    figures = {
        "models": {name: measured | summarise(rows) for name, rows in predictions.items()},
        "comparisons": compare_models(predictions),
        "training": training,
        "strata": compare_strata(predictions, name_strata(predictions["tuned"], "level")),
    }
    tables = list_tables(figures, "level")
    assert len(list_tables(figures, None)) == len(tables) - 1
    for _, head, rows in tables:
        assert {len(row) for row in rows} == {len(head)}
    texts = [" ".join(row) for _, _, rows in tables for row in rows]
    assert any("2.0 MiB 50.0%" in text and "12.3 / 56.8 ms" in text for text in texts)
    # Without a measured step there is no row of it, and an unknown forecast is no number.
    assert not any(text.startswith("this run, one step") for text in texts)
    assert "this run, predicted  5,000 0.50% 0.5 MiB" in texts
    assert "full fine-tuning, predicted 16.0 MiB 1,000,000 100.00% " in texts
