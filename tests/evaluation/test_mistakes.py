"""The kinds of mistakes: which answers are of which kind, and what a file does not tell."""

import json
import math

import pytest
from conftest import ROOT, run_inside
from hypothesis import given, settings
from hypothesis import strategies as st

from medqlora.evaluation.mistakes import CONFIDENT, SAMPLES, find_mistakes, repeats
from medqlora.evaluation.predictions import PredictionError, read_predictions
from medqlora.reporting.mistakes import tabulate_kinds, tabulate_subjects


def make_row(number, prediction="B", chances=(0.4, 0.6), **more):
    """A question whose right answer is A; without log-probabilities for chances of None."""
    logprobs = None
    if chances is not None:
        logprobs = {"A": math.log(chances[0]), "B": math.log(chances[1])}
    return {
        "id": f"q{number}",
        "kind": "choice",
        "question": "Which?",
        "options": ["one", "two"],
        "gold": "A",
        "prediction": prediction,
        "option_logprobs": logprobs,
        "letter_mass": None if chances is None else 0.9,
    } | more


def make_open(number, prediction, gold, **more):
    row = {"id": f"o{number}", "kind": "open", "question": "What?", "gold": gold}
    return row | {"prediction": prediction, "text": prediction} | more


def find(tmp_path, rows):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return find_mistakes(read_predictions(path))


def kinds_of(tmp_path, row):
    """The kinds that a single wrong answer is of."""
    found = find(tmp_path, [row])
    return {name for name, kind in found["kinds"].items() if kind["n"]}


FLIPS = {"AB": [math.log(0.3), math.log(0.7)], "BA": [math.log(0.2), math.log(0.8)]}
STEADY = {"AB": [math.log(0.3), math.log(0.7)], "BA": [math.log(0.8), math.log(0.2)]}


@pytest.mark.parametrize(
    ("row", "kinds"),
    [
        (make_row(1), {"other"}),
        (make_row(1, None, None, text="Perhaps."), {"unparsed"}),
        (make_row(1, None, None, text="<think>", unfinished=1), {"unfinished"}),
        (make_row(1, truncated=True), {"truncated"}),
        (make_row(1, permutations=FLIPS), {"position_bound"}),
        (make_row(1, permutations=STEADY), {"other"}),
        (make_row(1, letter_mass=0.49), {"low_letter_mass"}),
        (make_row(1, letter_mass=0.5), {"other"}),
        (make_row(1, chances=(0.4999, 0.5001)), {"near_tie"}),
        (make_row(1, chances=(0.09, 0.91)), {"confident"}),
        (make_row(1, chances=None, votes={"B": 9, "A": 1}), {"confident"}),
        (make_row(1, chances=(0.01, 0.99), letter_mass=0.1), {"confident", "low_letter_mass"}),
    ],
)
def test_kinds_of_choices(tmp_path, row, kinds):
    assert kinds_of(tmp_path, row) == kinds


GOLD = "Drink water and rest for a day or two."


@pytest.mark.parametrize(
    ("prediction", "kinds"),
    [
        ("Rest and drink a lot of clear water.", {"other"}),
        ("", {"empty"}),
        ("Ask somebody else about these unusual things.", {"no_shared_word"}),
        ("Water.", {"much_shorter"}),
        ("water " + "very much of it " * 8 + ".", {"much_longer", "repeated"}),
        ("Rest. " + " ".join(f"step{i}" for i in range(40)) + ".", {"much_longer"}),
    ],
)
def test_kinds_of_open_answers(tmp_path, prediction, kinds):
    assert kinds_of(tmp_path, make_open(1, prediction, GOLD)) == kinds


def test_an_answer_that_the_engine_cut_is_of_that_kind(tmp_path):
    row = make_open(1, "Rest and drink a lot of clear water, and then", GOLD)
    assert kinds_of(tmp_path, row) == {"other"}
    assert kinds_of(tmp_path, row | {"reached_limit": 1}) == {"cut"}
    assert kinds_of(tmp_path, make_row(1, reached_limit=1)) == {"cut"}


def test_what_the_file_does_not_tell_is_no_zero(tmp_path):
    """Without permutations nobody knows whether an answer depends on the order of the options."""
    found = find(tmp_path, [make_row(1), make_row(2, "A", (0.6, 0.4))])
    unknown = found["kinds"]["position_bound"]
    assert (unknown["n"], unknown["known"], unknown["share_ci95"]) == (None, 0, None)
    cells = {row[0]: row for row in tabulate_kinds(found).rows}
    assert cells["position bound"][2:] == ["–", "–", "–"]
    assert "does not say" in cells["position bound"][1]
    # One of three wrong answers has permutations, so the share is one of one.
    found = find(tmp_path, [make_row(1), make_row(2), make_row(3, permutations=FLIPS)])
    assert found["kinds"]["position_bound"]["share"] == 1
    assert "known of 1" in {row[0]: row for row in tabulate_kinds(found).rows}["position bound"][1]


ROWS = st.lists(
    st.tuples(
        st.sampled_from("AB"),
        st.sampled_from(("x", "y", None)),
        st.sampled_from((0.05, 0.3, 0.5, 0.6, 0.95)),
    ),
    min_size=1,
    max_size=60,
)


@settings(max_examples=40)
@given(ROWS)
def test_counts_add_up(tmp_path_factory, drawn):
    """Subjects add up to the whole, right answers are of no kind, each wrong one is of some."""
    rows = [
        make_row(number, letter, (1 - chance, chance), subject=subject)
        for number, (letter, subject, chance) in enumerate(drawn)
    ]
    found = find(tmp_path_factory.mktemp("m"), rows)
    wrong = sum(letter == "B" for letter, _, _ in drawn)
    assert (found["n"], found["wrong"]) == (len(drawn), wrong)
    sure = sum(letter == "B" and chance >= CONFIDENT for letter, _, chance in drawn)
    assert (found["kinds"]["confident"]["n"] or 0) == sure
    for name, kind in found["kinds"].items():
        parts = [part["kinds"][name] for part in found["per_subject"].values()]
        assert sum(part["n"] or 0 for part in parts) == (kind["n"] or 0)
        assert sum(part["known"] for part in parts) == kind["known"] <= wrong
        assert len(kind["samples"]) == min(SAMPLES, kind["n"] or 0)
        assert all(sample["prediction"] == "B" for sample in kind["samples"])
    assert sum(kind["n"] or 0 for kind in found["kinds"].values()) >= wrong
    table = tabulate_subjects(found)
    if table is not None:
        assert sum(int(row[2]) for row in table.rows) == wrong


def test_repetition():
    assert repeats("take one tablet every day " * 3)
    assert not repeats("take one tablet every day " * 2)


def test_the_command_shows_kinds_and_samples(tmp_path, monkeypatch, capsys):
    path = tmp_path / "p.jsonl"
    rows = [make_row(number, chances=(0.05, 0.95)) for number in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [path, "--errors", "--output", tmp_path / "m.json"]
    assert run_inside(ROOT / "eval" / "score.py", arguments, monkeypatch) == (0, "")
    errors = json.loads((tmp_path / "m.json").read_text())["errors"]
    assert errors == find_mistakes(read_predictions(path))
    assert errors["kinds"]["confident"]["samples"][0]["options"] == ["one", "two"]


def test_texts_have_no_mistakes(tmp_path):
    with pytest.raises(PredictionError, match="leave it out"):
        find(tmp_path, [{"id": "1", "kind": "text", "logprob": -1.0, "tokens": 1}])
