"""Subjects of a data entry, the division of one file by hash, and questions without answers."""

import json
import random

import pytest
from conftest import real
from hypothesis import example, given, settings
from hypothesis import strategies as st

from medqlora.batches.entries import check_entries
from medqlora.core.config import Data, DataEntry
from medqlora.data.cleaning import clean, squash
from medqlora.data.examples import DataError, MultipleChoice, OpenAnswer, Passage
from medqlora.data.reading import read_entry
from medqlora.data.selection import PARTS, find_part, question_key

# Numbers of questions "What is N?" that are not in the training part.
FIXED = {6: "test", 17: "test", 23: "test", 33: "test"}
SUBJECTS = ("Cardiology", "Neurology", "exams and tests", None)


def ask(question: str, answer: str | None = "x") -> OpenAnswer:
    return OpenAnswer("", question, answer, "qa", "s")


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """400 open questions, each asked twice with different answers and signs."""
    rows = []
    for i in range(400):
        subject = SUBJECTS[i % len(SUBJECTS)]
        rows.append({"question": f"What is {i}?", "answer": f"a{i}", "subject": subject})
        rows.append({"question": f" what  IS {i} !", "answer": f"b{i}", "subject": subject})
    return write(tmp_path_factory.mktemp("selection") / "rows.jsonl", rows)


def read(path, split="train", **entry):
    return read_entry(DataEntry(format="qa", path=path, **entry), split).examples


# ---- the division by hash ------------------------------------------------------------------------


# The Turkish dotless i is the one letter whose capital is that of another letter.
@given(st.text().filter(lambda text: "\u0131" not in text))
@example("Sjo\u0308gren & \xdfeta \ufb01bre \u0345")
@example("\u017f \u0149 \u01f0 \u0390 \u1e9e \u212a")
def test_case_blanks_and_signs_do_not_change_a_part(text):
    part = find_part(ask(text))
    for other in (text.upper(), text.lower(), f"  {text}\t\n?!", text.replace(" ", "\u00a0 - ")):
        assert question_key(other) == question_key(text)
        assert find_part(ask(other, "another answer")) == part


@given(st.text(min_size=1))
def test_rows_that_decontamination_takes_for_one_are_in_one_part(text):
    """Cleaning comes after the division, and must not make two parts' questions equal."""
    cleaned = clean(ask(text))
    assert question_key(cleaned.question) == question_key(text)
    assert question_key(squash(text)) == question_key(text) or "&" in text


def test_a_part_follows_from_the_question_alone():
    choice = MultipleChoice("1", "What is fever?", ("a", "b"), 0, "mcq", "s")
    other = MultipleChoice("2", "WHAT IS FEVER", ("c", "d"), None, "medqa", "t", "Cardiology")
    parts = {find_part(example) for example in (choice, other, ask("what is fever ?"))}
    assert parts == {find_part(Passage("", "What is fever?", "text", "s"))}
    # These values may never change: a change would move questions that were held out into training.
    found = {i: find_part(ask(f"What is {i}?")) for i in range(40)}
    assert {i: part for i, part in found.items() if part != "train"} == FIXED


def test_every_question_is_in_exactly_one_part(file):
    parts = {split: read(file, split, split_by="hash") for split in PARTS}
    assert sum(map(len, parts.values())) == 800
    keys = {split: {squash(row.question) for row in rows} for split, rows in parts.items()}
    assert sum(map(len, keys.values())) == 400
    assert set().union(*keys.values()) == {squash(f"What is {i}") for i in range(400)}
    # 400 draws of 10 % are 24 to 56, but for one case in 10,000.
    assert 24 <= len(keys["validation"]) <= 56
    assert 24 <= len(keys["test"]) <= 56


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), kept=st.integers(20, 400))
def test_neither_order_nor_number_of_rows_matters(tmp_path_factory, file, seed, kept):
    whole = {row.question for row in read(file, "test", split_by="hash")}
    with open(file, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    random.Random(seed).shuffle(rows)
    other = write(tmp_path_factory.mktemp("other") / "part.jsonl", rows[:kept])
    held = {row["question"] for row in rows[:kept]} & whole
    if held:
        assert {row.question for row in read(other, "test", split_by="hash")} == held
    else:
        with pytest.raises(DataError, match=r"none of the .* rows falls into split test"):
            read(other, "test", split_by="hash")


def test_limit_counts_the_rows_of_the_part(file):
    rows = read(file, "test", split_by="hash")
    assert read(file, "test", split_by="hash", limit=5) == rows[:5]
    entry = DataEntry(format="qa", path=file, split_by="hash", split="test")
    assert read_entry(entry, "train").examples == rows


def test_one_file_for_three_roles(file):
    def check(train, test, **more):
        entries = [DataEntry(format="qa", path=file, **entry) for entry in (train, test)]
        check_entries(Data(train=entries[:1], test=entries[1:], **more))

    divided = {"split_by": "hash"}
    check(divided, divided, eval=[DataEntry(format="qa", path=file, **divided)])
    for train, test in (
        ({}, {}),
        (divided, {}),
        ({}, divided),
        (divided, divided | {"split": "train"}),
    ):
        with pytest.raises(DataError, match=r"data.test\[0\] is the same data as data.train\[0\]"):
            check(train, test)
    with pytest.raises(DataError, match="has the parts train, validation, test, got split dev"):
        check(divided, divided | {"split": "dev"})


def test_the_official_test_questions_of_pubmedqa_stay_held_out(tmp_path):
    rows = {
        str(i): {"QUESTION": f"Is it {i}?", "CONTEXTS": ["c"], "final_decision": "yes"}
        for i in range(100, 200)
    }
    path = tmp_path / "ori_pqal.json"
    path.write_text(json.dumps(rows))
    (tmp_path / "test_pmids.txt").write_text("\n".join(str(i) for i in range(100, 150)))

    def read_ids(split, **more):
        entry = DataEntry(format="pubmedqa", path=str(path), **more)
        return {row.id for row in read_entry(entry, split).examples}

    parts = [read_ids(split, split_by="hash") for split in PARTS]
    assert set().union(*parts) == {str(i) for i in range(150, 200)}
    assert sum(map(len, parts)) == 50
    train = DataEntry(format="pubmedqa", path=str(path), split_by="hash")
    check_entries(
        Data(train=[train], eval=[train], test=[train.model_copy(update={"split_by": None})])
    )


def test_the_only_split_of_a_hub_dataset_is_divided(file, monkeypatch):
    import datasets

    def load(hub, subset, split, revision):
        assert (hub, split) == ("owner/name", "train")
        with open(file, encoding="utf-8") as lines:
            return datasets.Dataset.from_list([json.loads(line) for line in lines])

    monkeypatch.setattr(datasets, "load_dataset", load)
    for split in PARTS:
        held = [row.question for row in read("owner/name", split, split_by="hash")]
        assert held == [row.question for row in read(file, split, split_by="hash")]
    entry = DataEntry(format="qa", path="owner/name", split_by="hash")
    check_entries(Data(train=[entry], eval=[entry], test=[entry]))
    whole = entry.model_copy(update={"split_by": None, "split": "train"})
    with pytest.raises(DataError, match="is the same data as"):
        check_entries(Data(train=[whole], test=[entry]))


def test_medquad_is_divided_without_a_shared_question():
    path = str(real("medquad/medquad.jsonl"))
    parts = {split: set() for split in PARTS}
    for row in read_entry(DataEntry(format="medquad", path=path), "train").examples:
        parts[find_part(row)].add(squash(clean(row).question))
    assert not parts["train"] & parts["test"]
    assert not parts["train"] & parts["validation"]
    assert not parts["validation"] & parts["test"]
    total = sum(map(len, parts.values()))
    assert {split: round(len(keys) / total, 1) for split, keys in parts.items()} == {
        "train": 0.8,
        "validation": 0.1,
        "test": 0.1,
    }


# ---- subjects ------------------------------------------------------------------------------------


def test_subjects_are_taken_whatever_their_case(file):
    rows = read(file, subjects=["CARDIOLOGY", " exams  and tests"])
    assert {row.subject for row in rows} == {"Cardiology", "exams and tests"}
    assert len(rows) == 400
    assert read(file, subjects=["cardiology"], limit=3) == read(file, subjects=["Cardiology"])[:3]
    held = read(file, "test", subjects=["Neurology"], split_by="hash")
    assert held == [r for r in read(file, "test", split_by="hash") if r.subject == "Neurology"]
    entry = DataEntry(format="qa", path=file, subjects=["cardiology"])
    assert "200 rows of cardiology" in read_entry(entry, "train").description


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Cardiolgy", r"no row has the subject 'Cardiolgy'; the nearest .*: cardiology \(200\)"),
        ("Card", "no row has the subject 'Card'"),
        ("Dentistry", r"the most frequent of 3 subjects, with their rows: .*neurology \(200\)"),
    ],
)
def test_unknown_subjects_are_named(file, name, message):
    for split_by in (None, "hash"):
        with pytest.raises(DataError, match=message):
            read(file, subjects=["Cardiology", name], split_by=split_by)


def test_rows_without_subjects(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"question": "What?", "answer": "x"}])
    with pytest.raises(DataError, match="the rows name no subjects, so leave subjects out"):
        read(path, subjects=["Cardiology"])
    with pytest.raises(ValueError, match="at least 1 item"):
        DataEntry(format="qa", path=path, subjects=[])


# ---- questions without answers -------------------------------------------------------------------


def read_bare(path, unlabelled=True, drop=False):
    return read_entry(DataEntry(format="qa", path=str(path)), "file", drop, unlabelled)


def test_a_text_file_has_a_question_on_each_line(tmp_path):
    path = tmp_path / "questions.txt"
    path.write_bytes("\ufeffWhat is fever?\r\n\r\n  Was heißt Fieber\u2028hier? \n".encode())
    reading = read_bare(path)
    assert [row.question for row in reading.examples] == [
        "What is fever?",
        "Was heißt Fieber\u2028hier?",
    ]
    assert [row.source for row in reading.examples] == [
        "questions.txt line 1",
        "questions.txt line 3",
    ]
    assert {row.answer for row in reading.examples} == {None}
    assert "no row has an answer" in reading.description
    with pytest.raises(DataError, match=r'questions.txt line 1: the row has no "answer"'):
        read_bare(path, unlabelled=False)
    path.write_text("\n \n")
    with pytest.raises(DataError, match="holds no rows"):
        read_bare(path)
    path.write_bytes(b"caf\xe9?")
    with pytest.raises(DataError, match="is not UTF-8 text"):
        read_bare(path)


@pytest.mark.parametrize("empty", [{}, {"answer": ""}, {"answer": None}, {"answer": " \n"}])
def test_all_rows_decide_whether_answers_are_missing(tmp_path, empty):
    bare = {"question": "What is fever?"} | empty
    whole = {"question": "What is gout?", "answer": "Crystals."}
    path = tmp_path / "rows.jsonl"
    write(path, [bare])
    assert read_bare(path).examples[0].answer is None
    write(path, [whole, bare])
    for unlabelled in (True, False):
        with pytest.raises(DataError, match=r"rows.jsonl line 2: .*answer.*drop_invalid"):
            read_bare(path, unlabelled)
        reading = read_bare(path, unlabelled, drop=True)
        assert [row.question for row in reading.examples] == ["What is gout?"]
        assert [removal.source for removal in reading.removals] == ["rows.jsonl line 2"]
