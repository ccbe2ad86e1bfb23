"""How a file writes its answers is decided from all of its rows, once, or the file is refused."""

import csv
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medqlora.core.config import DataEntry
from medqlora.data.answer_reading import READINGS, read_as, settle_answers
from medqlora.data.examples import LETTERS, DataError, MultipleChoice, Written
from medqlora.data.reading import read_entry

WORDS = ["Liver", "Spleen", "Heart", "Lung", "A", "B", "C", "D", "E", "0", "1", "2", "3", "4", "5"]


@st.composite
def files(draw):
    """Questions with their true golds, and how the file writes them."""
    reading = draw(st.sampled_from(READINGS))
    questions = []
    golds = []
    for number in range(draw(st.integers(1, 12))):
        options = tuple(draw(st.lists(st.sampled_from(WORDS), min_size=2, max_size=5, unique=True)))
        gold = draw(st.integers(0, len(options) - 1))
        value = {
            "letter": LETTERS[gold],
            "text": options[gold],
            "index0": gold,
            "index1": gold + 1,
        }[reading]
        # A CSV file holds numbers as text.
        if draw(st.booleans()):
            value = str(value)
        questions.append(
            MultipleChoice(str(number), "Q?", options, Written(value), "mcq", f"line {number}")
        )
        golds.append(gold)
    return reading, questions, golds


def settle(questions, **arguments):
    arguments = {"expected": READINGS, "answer_is": None, "drop_invalid": False} | arguments
    settled, removals, reading = settle_answers(questions, **arguments)
    return [question.answer for question in settled], removals, reading


@settings(max_examples=300, deadline=None)
@given(files())
def test_a_file_gives_its_true_golds_or_is_refused_because_another_reading_fits(file):
    reading, questions, golds = file
    others = [
        [read_as(other, question.answer, question.options) for question in questions]
        for other in READINGS
        if other != reading
    ]
    doubtful = any(None not in other and other != golds for other in others)
    if not doubtful:
        assert settle(questions)[0] == golds
        return
    with pytest.raises(DataError, match=r"can be read in . ways") as error:
        settle(questions)
    # One of the readings that the message offers gives the true golds.
    offered = re.findall(r"answer_is: (\w+)", str(error.value))
    assert golds in [settle(questions, answer_is=named, drop_invalid=True)[0] for named in offered]


@settings(max_examples=300, deadline=None)
@given(files())
def test_a_named_reading_gives_the_true_golds_of_every_file(file):
    reading, questions, golds = file
    assert settle(questions, answer_is=reading)[0] == golds


@settings(max_examples=200, deadline=None)
@given(files(), st.integers(0, 11), st.sampled_from(["Z", "9", "nonsense", ["A", "B"], 4.5, True]))
def test_an_invalid_answer_never_changes_another_rows_gold(file, place, value):
    """With drop_invalid a wrong reading would drop the rows that contradict it."""
    _, questions, golds = file
    place %= len(questions)
    question = questions[place]
    questions[place] = MultipleChoice(
        question.id, "Q?", question.options, Written(value), "mcq", question.source
    )
    true = [gold for number, gold in enumerate(golds) if number != place]
    rest = [item for number, item in enumerate(questions) if number != place]
    try:
        expected = settle(rest)[0] if rest else []
        found, removals, _ = settle(questions, drop_invalid=True)
    except DataError:
        return
    assert expected == true
    assert found == true
    assert len(removals) == 1


@pytest.mark.parametrize(
    ("values", "counts"),
    [
        # The dataset's home counts from 0; a copy may do either, and five rows often hold no 0.
        ([1, 2, 3], "refused"),
        ([0, 2, 3], [0, 2, 3]),
        ([1, 2, 4], [0, 1, 3]),
        ([0, 4], "refused"),
        (["1", "2", "4"], [0, 1, 3]),
        ([1.0, float("nan"), 4.0], [0, None, 3]),
        ([-1, 0], [None, 0]),
    ],
)
@pytest.mark.parametrize("drop", [False, True])
def test_medmcqa_parts(tmp_path, values, counts, drop):
    rows = [
        {"question": "Q?", "opa": "w", "opb": "x", "opc": "y", "opd": "z", "cop": value}
        for value in values
    ]
    path = tmp_path / "part.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = {"format": "medmcqa", "path": str(path)}
    if counts != "refused":
        reading = read_entry(DataEntry(**entry), "train", drop)
        assert [example.answer for example in reading.examples] == counts
        return
    with pytest.raises(DataError, match=r"2 ways.*answer_is: index0 or answer_is: index1"):
        read_entry(DataEntry(**entry), "train", drop)
    named = read_entry(DataEntry(**entry, answer_is="index1"), "train", True)
    assert [example.answer for example in named.examples] == [v - 1 for v in values if v]
    assert "answers are indexes from 1" in named.description


def test_every_window_of_a_file_is_read_right_or_refused(tmp_path):
    """Parts of a file that counts from 0 were once read one too low where they held no 0."""
    golds = [(7 * number * number + 3 * number) % 4 for number in range(120)]
    refused = 0
    for start in range(len(golds) - 5):
        window = golds[start : start + 5]
        rows = [
            {"question": f"Q{i}?", "opa": "w", "opb": "x", "opc": "y", "opd": "z", "cop": gold}
            for i, gold in enumerate(window)
        ]
        path = tmp_path / f"{start}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        try:
            found = read_entry(DataEntry(format="medmcqa", path=str(path)), "train").examples
        except DataError:
            refused += 1
            assert 0 not in window
            continue
        assert [example.answer for example in found] == window
    assert refused < len(golds)


@pytest.mark.parametrize(
    ("options", "answer", "gold"),
    [
        # Other rows say that the file writes texts, or letters.
        (("O", "A", "B", "AB"), "A", {"text": 1, "letter": 0}),
        (("D", "C", "A", "K"), "C", {"text": 1, "letter": 2}),
        (("4", "1", "2", "3"), "2", {"text": 2, "index0": 2, "index1": 1}),
    ],
)
def test_the_other_rows_decide(options, answer, gold):
    clear = {
        "text": [(("Liver", "Spleen"), "Spleen")],
        "letter": [(("Liver", "Spleen"), "B")],
        "index0": [(("Liver", "Spleen"), "0")],
        "index1": [(("Liver", "Spleen"), "2"), (("Liver", "Spleen"), "1")],
    }
    for reading, index in gold.items():
        rows = [*clear[reading], (options, answer)]
        questions = [
            MultipleChoice(str(i), "Q?", options, Written(value), "mcq", f"line {i}")
            for i, (options, value) in enumerate(rows)
        ]
        assert settle(questions)[0][-1] == index, reading
        assert settle(questions)[2] == reading


def test_a_dataset_known_for_one_form_is_not_read_in_another(tmp_path):
    rows = [
        {"question": f"Q{i}?", "subject": "anatomy", "choices": ["4", "3", "2", "1"], "answer": i}
        for i in (1, 2, 3)
    ]
    path = tmp_path / "mmlu.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reading = read_entry(DataEntry(format="mmlu", path=str(path)), "test")
    assert [example.answer for example in reading.examples] == [1, 2, 3]
    path.write_text(json.dumps(rows[0] | {"answer": 4}))
    for drop in (False, True):
        with pytest.raises(DataError, match=r"answer is 4, which does not fit .*answer_is: "):
            read_entry(DataEntry(format="mmlu", path=str(path)), "test", drop)


def test_the_limit_takes_no_part_in_the_decision(tmp_path):
    path = tmp_path / "part.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "A", "B", "C", "answer"])
        writer.writerows([["Q?", "x", "y", "z", value] for value in (1, 2, 2, 3)])
    reading = read_entry(DataEntry(format="mcq", path=str(path), limit=2), "train")
    assert [example.answer for example in reading.examples] == [0, 1]
    assert "2 rows; answers are indexes from 1" in reading.description


def test_several_right_answers_are_no_single_choice():
    question = MultipleChoice("1", "Q?", ("x", "y"), Written(["A", "B"]), "mcq", "line 1")
    with pytest.raises(DataError, match="several right answers"):
        settle([question])


@pytest.mark.parametrize("format", ["qa", "text", "medquad", "pubmedqa", "headqa"])
def test_a_reading_is_never_passed_over(tmp_path, format):
    with pytest.raises(DataError, match="answer_is has no meaning for this format"):
        read_entry(DataEntry(format=format, path=str(tmp_path), answer_is="letter"), "train")


@pytest.mark.parametrize(
    ("format", "key", "value"),
    [
        ("medmcqa", "columns", {"question": "stem"}),
        ("pubmedqa", "columns", {"question": "stem"}),
        ("mcq", "test_pmids", "list.txt"),
        ("medqa", "test_pmids", "list.txt"),
    ],
)
def test_a_key_that_a_format_would_pass_over_is_refused(tmp_path, format, key, value):
    with pytest.raises(DataError, match=f"{key} has no meaning for this format"):
        read_entry(DataEntry(format=format, path=str(tmp_path), **{key: value}), "train")


def test_a_named_reading_holds_for_each_form_of_medqa(tmp_path):
    row = {"sent1": "Q?", "ending0": "x", "ending1": "y", "label": 1}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    for answer_is, index in ((None, 1), ("index0", 1), ("index1", 0)):
        entry = DataEntry(format="medqa", path=str(path), answer_is=answer_is)
        assert read_entry(entry, "train").examples[0].answer == index
