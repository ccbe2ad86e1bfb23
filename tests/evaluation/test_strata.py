"""Columns of the data file that prediction rows keep, and scores by their values."""

import json

import numpy as np
import pytest
from conftest import ROOT, run_inside
from hypothesis import given
from hypothesis import strategies as st

from medqlora.batches.pipeline import hash_examples
from medqlora.core.config import DataEntry
from medqlora.data.examples import DataError
from medqlora.data.reading import STRATA, read_entry
from medqlora.evaluation.metrics import score_by, score_predictions
from medqlora.evaluation.open_answers import measure_open
from medqlora.evaluation.predictions import PredictionError, collect_rows
from medqlora.evaluation.questions import PreparedQuestion, describe_example
from medqlora.evaluation.settings import EvaluationSettings, make_entry
from medqlora.evaluation.statistics import wilson_interval
from medqlora.evaluation.strata import NO_VALUE

LEVELS = ("basic", "intermediate", "advanced", None)


def make_rows(pairs, kind="choice", column="level"):
    """Rows of (level, is right); a question without a level keeps null."""
    right, wrong = ("A", "B") if kind == "choice" else ("a fever", "no idea")
    return [
        {
            "id": f"q{number}",
            "kind": kind,
            "gold": right,
            "prediction": right if hit else wrong,
            "columns": {column: level},
        }
        for number, (level, hit) in enumerate(pairs)
    ]


PAIRS = st.lists(st.tuples(st.sampled_from(LEVELS), st.booleans()), min_size=1, max_size=40)


@given(PAIRS)
def test_strata_are_scored_as_their_own_rows(pairs):
    """Each stratum has the scores that its rows have alone, and no row is lost or counted twice."""
    found = score_by(collect_rows(make_rows(pairs)), "level")
    assert sum(scores["n"] for scores in found.values()) == len(pairs)
    assert set(found) == {level or NO_VALUE for level, _ in pairs}
    for name, scores in found.items():
        hits = [hit for level, hit in pairs if (level or NO_VALUE) == name]
        assert scores["accuracy"] == sum(hits) / len(hits)
        assert scores["accuracy_ci95"] == list(wilson_interval(sum(hits), len(hits)))


def test_open_answers_have_strata_too():
    pairs = [("basic", True), ("basic", False), (None, True)]
    rows = collect_rows(make_rows(pairs, "open"))
    found = score_predictions(rows, "level")["by"]["level"]
    assert {name: scores["exact_match"] for name, scores in found.items()} == {
        NO_VALUE: 1,
        "basic": 0.5,
    }
    assert found == score_by(rows, "level")
    assert found["basic"]["f1"] == np.mean(measure_open(rows)["f1"][:2])


def test_the_subject_is_a_stratum_without_being_kept():
    rows = make_rows([(None, True), (None, False)])
    rows[0]["subject"] = "Anatomy"
    assert set(score_by(collect_rows(rows), "subject")) == {"Anatomy", NO_VALUE}


@pytest.mark.parametrize(
    ("rows", "column", "message"),
    [
        (make_rows([("a", True)]), "levle", "there are level"),
        (make_rows([(NO_VALUE, True), (None, True)]), "level", "also a value of the file"),
        (
            [row | {"subject": "x"} for row in make_rows([("y", True)], column="subject")],
            "subject",
            "can be read in two ways",
        ),
        ([{"id": "1", "kind": "text", "logprob": -1.0, "tokens": 1}], "level", "rows of kind text"),
    ],
)
def test_what_cannot_be_grouped_is_refused(rows, column, message):
    with pytest.raises(PredictionError, match=message):
        score_predictions(collect_rows(rows), column)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


QUESTION = {"question": "Which?", "options": ["one", "two"], "answer": "A"}


def read_columns(tmp_path, keep, *more):
    path = write(tmp_path / "q.jsonl", [QUESTION | row for row in more])
    entry = DataEntry(format="mcq", path=path, keep=keep)
    return [dict(example.columns) for example in read_entry(entry, "test").examples]


def test_columns_are_kept_as_text(tmp_path):
    rows = [{"level": "hard", "year": 2019.0, "old": True}, {"level": " ", "year": 7.5}, {}]
    assert read_columns(tmp_path, ["level", "year", "old"], *rows) == [
        {"level": "hard", "year": "2019", "old": "true"},
        {"level": None, "year": "7.5", "old": None},
        {"level": None, "year": None, "old": None},
    ]


@pytest.mark.parametrize(
    ("keep", "row", "message"),
    [
        (["levle"], {"level": "x"}, "no row of q.jsonl has; the first row has question"),
        (["level"], {"level": ["x"]}, 'line 1: keep: "level" is a list'),
        *[([name], {name: "x"}, f"has a {name} of its own") for name in STRATA],
    ],
)
def test_columns_that_cannot_be_kept_are_refused(tmp_path, keep, row, message):
    with pytest.raises(DataError, match=message):
        read_columns(tmp_path, keep, row)


def test_kept_columns_change_neither_the_data_nor_other_rows(tmp_path):
    """A run goes on, and rows that keep nothing have the keys of before."""
    path = write(tmp_path / "q.jsonl", [QUESTION | {"level": "x"}])
    plain, kept = (
        read_entry(DataEntry(format="mcq", path=path, keep=keep), "test").examples
        for keep in ([], ["level"])
    )
    assert hash_examples(plain) == hash_examples(kept)
    rows = [
        describe_example(PreparedQuestion(some[0], [], [], False), "") for some in (plain, kept)
    ]
    assert rows[1] == rows[0] | {"columns": {"level": "x"}}
    keys = [PreparedQuestion(some[0], [], [], False).key("run") for some in (plain, kept)]
    assert keys[0] != keys[1], "rows without the column are not taken for rows with it"


def test_names_of_columns_on_the_command_line():
    flags = {"format": "mcq", "path": "q.jsonl", "model": "m", "output": "o.jsonl"}
    settings = EvaluationSettings(**flags, keep="level, source")
    assert make_entry(settings).keep == ["level", "source"]
    with pytest.raises(ValueError, match="with commas between them"):
        EvaluationSettings(**flags, keep="level,,source")


def test_the_command_scores_strata(tmp_path, monkeypatch):
    path = write(tmp_path / "p.jsonl", make_rows([("basic", True), ("advanced", False)]))
    arguments = [path, "--by", "level", "--output", tmp_path / "m.json"]
    assert run_inside(ROOT / "eval" / "score.py", arguments, monkeypatch) == (0, "")
    written = json.loads((tmp_path / "m.json").read_text())
    assert written["by"]["level"] == score_by(
        collect_rows(make_rows([("basic", 1), ("advanced", 0)])), "level"
    )
    code, complaint = run_inside(ROOT / "eval" / "score.py", [path, "--by", "x"], monkeypatch)
    assert (code, complaint.count("\n")) == (2, 1)
