import csv
import json

import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import real

from medqlora.core.config import DataEntry
from medqlora.data.examples import DataError, MultipleChoice, OpenAnswer
from medqlora.data.formats.registry import FILE
from medqlora.data.reading import read_entry, read_examples

MEDMCQA = {
    "id": "a",
    "question": "Q?",
    "opa": "1",
    "opb": "2",
    "opc": "3",
    "opd": "4",
    "cop": 4,
    "exp": "Because.",
    "subject_name": "S",
    "topic_name": "T",
    "choice_type": "single",
}
MEDQA = {
    "question": "Q?",
    "answer": "y",
    "options": {"A": "x", "B": "y"},
    "meta_info": "step1",
    "answer_idx": "B",
}


@pytest.fixture
def read(tmp_path):
    def read(format, rows, name="rows.jsonl", split="train", drop=False, **entry):
        path = tmp_path / name
        if name.endswith(".jsonl"):
            path.write_text(
                "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
            )
        elif name.endswith(".json"):
            path.write_text(json.dumps(rows))
        elif name.endswith(".csv"):
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
        else:
            pa.parquet.write_table(pa.Table.from_pylist(rows), path)
        return read_examples(DataEntry(format=format, path=str(path), **entry), split, drop)

    return read


def test_medmcqa_original_counts_from_one(read):
    (example,), _ = read("medmcqa", [MEDMCQA])
    assert (example.answer, example.subject, example.topic, example.choice_type) == (
        3,
        "S",
        "T",
        "single",
    )
    assert example.explanation == "Because."


def test_medmcqa_hub_counts_from_zero(read):
    examples, _ = read("medmcqa", [MEDMCQA | {"cop": 0}, MEDMCQA | {"cop": 3, "id": "b"}])
    assert [example.answer for example in examples] == [0, 3]


def test_medmcqa_numbering_cannot_be_both(read):
    with pytest.raises(DataError, match=r"indexes from 0, 0 at .* line 1 .* 1, 4 at .* line 2"):
        read("medmcqa", [MEDMCQA | {"cop": 0}, MEDMCQA])


@pytest.mark.parametrize("cop", [None, -1])
def test_medmcqa_unlabelled(read, cop):
    (example,), _ = read("medmcqa", [MEDMCQA | {"cop": cop}])
    assert example.answer is None


def test_missing_ids_come_from_content_not_position(read):
    row = {key: value for key, value in MEDMCQA.items() if key != "id"}
    first, _ = read("medmcqa", [row, row | {"question": "R?"}])
    second, _ = read("medmcqa", [row | {"question": "R?"}, row])
    assert [e.id for e in first] == [e.id for e in reversed(second)]
    assert len({e.id for e in first}) == 2


@pytest.mark.parametrize("letters", ["ABCD", "ABCDE"])
def test_medqa_four_and_five_options(read, letters):
    options = {letter: f"option {letter}" for letter in letters}
    (example,), _ = read(
        "medqa",
        [
            MEDQA
            | {
                "options": options,
                "answer": f"option {letters[-1]}",
                "answer_idx": letters[-1],
            }
        ],
    )
    assert (len(example.options), example.answer) == (len(letters), len(letters) - 1)


def test_medqa_harness_form(read):
    (example,), _ = read(
        "medqa",
        [
            {
                "id": 1,
                "sent1": "Q?",
                "ending0": "w",
                "ending1": "x",
                "ending2": "y",
                "ending3": "z",
                "label": 2,
            }
        ],
    )
    assert (example.options, example.answer) == (("w", "x", "y", "z"), 2)


PUBMEDQA = {
    "QUESTION": "Q?",
    "CONTEXTS": ["One.", "Two."],
    "final_decision": "maybe",
    "LONG_ANSWER": "Long.",
}


def test_pubmedqa_original_and_hub(read):
    (original,), _ = read("pubmedqa", {"11": PUBMEDQA}, name="rows.json")
    hub = {
        "pubid": 11,
        "question": "Q?",
        "context": {"contexts": ["One.", "Two."]},
        "long_answer": "Long.",
        "final_decision": "maybe",
    }
    (other,), _ = read("pubmedqa", [hub])
    assert original.id == other.id == "11"
    assert original.context == other.context == ("One.", "Two.")
    assert original.answer == other.answer == 2
    assert original.options == ("yes", "no", "maybe")


def test_pubmedqa_no_may_arrive_as_false(read):
    (example,), _ = read("pubmedqa", {"11": PUBMEDQA | {"final_decision": False}}, name="rows.json")
    assert example.options[example.answer] == "no"


def test_pubmedqa_test_split_is_the_official_list(read, tmp_path):
    (tmp_path / "test_ground_truth.json").write_text(json.dumps({"2": "yes"}))
    rows = {"1": PUBMEDQA, "2": PUBMEDQA, "3": PUBMEDQA}
    assert [e.id for e in read("pubmedqa", rows, "rows.json", "test")[0]] == ["2"]
    assert [e.id for e in read("pubmedqa", rows, "rows.json", "train")[0]] == ["1", "3"]


def test_pubmedqa_refuses_to_guess_the_test_split(read):
    with pytest.raises(DataError, match="official list of test PMIDs"):
        read("pubmedqa", {"1": PUBMEDQA}, "rows.json", "test")
    with pytest.raises(DataError, match="official list of test PMIDs"):
        read("pubmedqa", {str(i): PUBMEDQA for i in range(501)}, "rows.json", "train")


@pytest.mark.parametrize("list_name", ["test_pmids.txt", "somewhere.txt"])
def test_pubmedqa_evaluates_the_official_questions_whatever_the_file_is_called(tmp_path, list_name):
    rows = {str(number): PUBMEDQA for number in range(1000)}
    (tmp_path / "ori_pqal.json").write_text(json.dumps(rows))
    (tmp_path / list_name).write_text("\n".join(str(number) for number in range(0, 1000, 2)))
    named = {"test_pmids": str(tmp_path / list_name)} if list_name == "somewhere.txt" else {}
    entry = DataEntry(format="pubmedqa", path=str(tmp_path / "ori_pqal.json"), **named)
    for split in (FILE, "test"):
        reading = read_entry(entry, split)
        assert [int(example.id) for example in reading.examples] == list(range(0, 1000, 2))
        assert "500 rows; 500 of them official test questions" in reading.description
    reading = read_entry(entry, "train")
    assert [int(example.id) for example in reading.examples] == list(range(1, 1000, 2))
    assert "500 rows; 0 of them official test questions" in reading.description
    # A part without official questions is taken as it is, unless the user named the list.
    (tmp_path / "part.json").write_text(json.dumps({"1": PUBMEDQA, "3": PUBMEDQA}))
    part = DataEntry(format="pubmedqa", path=str(tmp_path / "part.json"), **named)
    if named:
        with pytest.raises(DataError, match="none of the 2 rows belongs to split test"):
            read_entry(part, FILE)
    else:
        assert "2 rows; 0 of them official" in read_entry(part, FILE).description


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
def test_generic_formats_with_columns(read, name):
    rows = [{"Frage": "Q?", "Antwort": "It is."}]
    (example,), _ = read("qa", rows, name, columns={"question": "Frage", "answer": "Antwort"})
    assert isinstance(example, OpenAnswer)
    assert (example.question, example.answer) == ("Q?", "It is.")
    rows = [{"stem": "Q?", "a": "one", "b": "two", "key": "B"}]
    (example,), _ = read(
        "mcq", rows, name, columns={"question": "stem", "options": ["a", "b"], "answer": "key"}
    )
    assert (example.options, example.answer) == (("one", "two"), 1)


@pytest.mark.parametrize(
    ("answer", "index"),
    [("B", 1), ("b", 1), (["b"], 1), ("B) two", 1), ("two", 1), (2, 1), (0, 0), (None, None)],
)
def test_mcq_answers_by_letter_index_or_text(read, answer, index):
    (example,), _ = read("mcq", [{"question": "Q?", "options": ["one", "two"], "answer": answer}])
    assert example.answer == index


def test_text_becomes_passages(tmp_path):
    (tmp_path / "book.txt").write_text(
        "\n\n".join(f"Paragraph {i} " + "x" * 500 for i in range(20))
    )
    passages, _ = read_examples(DataEntry(format="text", path=str(tmp_path / "book.txt")), "train")
    assert len(passages) > 3
    assert "Paragraph 0" in passages[0].text
    assert "Paragraph 19" in passages[-1].text
    assert {passage.document for passage in passages} == {"book.txt"}


def test_a_folder_of_books(tmp_path):
    for name in ("anatomy.txt", "pharmacology.md"):
        (tmp_path / name).write_text("\ufeffFirst.\n\nSecond.")
    entry = DataEntry(format="text", path=str(tmp_path))
    reading = read_entry(entry, "train")
    assert [passage.document for passage in reading.examples] == ["anatomy.txt", "pharmacology.md"]
    assert reading.examples[0].text == "First.\n\nSecond."
    (tmp_path / "physiology.pdf").write_bytes(b"%PDF-1.7")
    with pytest.raises(DataError, match=r"physiology.pdf is no text"):
        read_entry(entry, "train")
    (tmp_path / "train.txt").write_text("Only this.")
    assert len(read_entry(entry, "train").examples) == 1
    with pytest.raises(DataError, match="has none for split validation"):
        read_entry(entry, "validation")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_says_the_encoding(tmp_path, encoding):
    (tmp_path / "book.txt").write_text("Café ναι 肝\nnext line", encoding=encoding)
    reading = read_entry(DataEntry(format="text", path=str(tmp_path)), "train")
    assert [passage.text for passage in reading.examples] == ["Café ναι 肝\nnext line"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "empty.txt holds no text"),
        ("blank.md", b" \n\n\n", "blank.md holds no text"),
        ("scan.png", b"\x89PNG", "scan.png is no text"),
        ("train_guide.txt", b"Rails.", "may be a split, or a book beside anatomy.txt"),
        ("Developmental_biology.txt", b"Cells.", "rename the book"),
    ],
)
def test_what_is_no_book_of_a_folder_is_refused_by_name(tmp_path, name, content, message):
    (tmp_path / "anatomy.txt").write_text("Bones.")
    (tmp_path / ".DS_Store").write_bytes(b"\0")  # Hidden files are none of the user's.
    entry = DataEntry(format="text", path=str(tmp_path))
    assert len(read_entry(entry, "train").examples) == 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_entry(entry, "train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("format", "rows", "parts"),
    [
        (
            "medmcqa",
            [MEDMCQA, MEDMCQA | {"opc": " "}],
            ["medmcqa", "line 2", 'option "opc" is empty', "drop_invalid"],
        ),
        ("medmcqa", [MEDMCQA | {"cop": 7}], ["line 1", "cop is 7"]),
        ("medmcqa", [MEDMCQA | {"cop": "x"}], ["cop is 'x'", "expected"]),
        ("medmcqa", [MEDQA], ["line 1", "looks like medqa"]),
        ("medqa", [MEDMCQA], ["looks like medmcqa"]),
        ("medqa", [MEDQA | {"answer_idx": "C"}], ["one of the options"]),
        ("medqa", [MEDQA | {"answer": "x"}], ["must agree"]),
        ("medqa", [MEDQA | {"options": {"A": "x", "C": "y"}}], ["lettered"]),
        ("medquad", [{"question": "Q?", "answer": ""}], ['"answer" is empty']),
        ("mcq", [{"question": "Q?", "options": ["x"], "answer": 0}], ["expected 2 to"]),
        ("mcq", [{"question": "Q?", "options": ["x", "y"], "answer": -1}], ["one of the options"]),
        (
            "mcq",
            [{"question": "Q?", "options": ["x", "y"], "answer": "z z"}],
            ["expected a letter", "'z z'"],
        ),
        ("qa", ["{not json"], ["line 1", "not valid JSON"]),
        ("qa", ['{"question": "Q?", "answer": "A."}', "[1, 2]"], ["line 2", "an object"]),
        ("qa", [], ["no rows"]),
    ],
)
def test_bad_rows_name_format_file_and_line(read, format, rows, parts):
    with pytest.raises(DataError) as error:
        read(format, rows)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_bad_rows_are_dropped_and_listed_when_asked(read):
    examples, removals = read("medmcqa", [MEDMCQA, MEDMCQA | {"opc": "", "id": "bad"}], drop=True)
    assert [e.id for e in examples] == ["a"]
    assert [(r.id, r.reason) for r in removals] == [
        ("bad", 'option "opc" is empty; every option needs text')
    ]


@pytest.mark.parametrize(
    ("path", "message"),
    [("missing.jsonl", "no file"), ("x.xlsx", "ends in .xlsx"), (".", "name the file")],
)
def test_bad_paths(tmp_path, path, message):
    (tmp_path / "x.xlsx").write_text("")
    with pytest.raises(DataError, match=message):
        read_examples(DataEntry(format="medmcqa", path=str(tmp_path / path)), "train")


def test_folder_is_searched_by_split(tmp_path):
    (tmp_path / "dev.jsonl").write_text(json.dumps(MEDMCQA))
    examples, _ = read_examples(DataEntry(format="medmcqa", path=str(tmp_path)), "validation")
    assert len(examples) == 1


@pytest.mark.parametrize(
    ("format", "path", "rows"),
    [
        ("medqa", "medqa/dev_4_options.jsonl", 1272),
        ("medqa", "medqa/dev_5_options.jsonl", 1272),
        ("medqa", "medqa/train_partial.jsonl", 3069),
        ("medmcqa", "medmcqa/validation_part.jsonl", 1242),
        ("medmcqa", "medmcqa/train_partial.jsonl", 3006),
        ("pubmedqa", "pubmedqa/pqal_train.json", 500),
        ("medquad", "medquad/medquad.jsonl", 16359),
    ],
)
def test_real_files(format, path, rows):
    examples, removals = read_examples(DataEntry(format=format, path=str(real(path))), "train")
    assert (len(examples), removals) == (rows, [])
    assert all(example.answer is not None for example in examples)
    if isinstance(examples[0], MultipleChoice):
        assert all(0 <= example.answer < len(example.options) for example in examples)


MMLU = {"question": "Q?", "subject": "anatomy", "choices": ["1", "2", "3", "4"], "answer": 3}
HEADQA = {
    "name": "Cuaderno_2013",
    "year": "2013",
    "category": "nursery",
    "qid": "7",
    "qtext": "Q?",
    "ra": 2,
    "answers": [{"aid": 1, "atext": "x"}, {"aid": 2, "atext": "y"}],
}


def test_mmlu_takes_the_medical_subjects(read):
    examples, _ = read(
        "mmlu", [MMLU, MMLU | {"subject": "astronomy"}, MMLU | {"subject": "medical_genetics"}]
    )
    assert [(example.subject, example.answer) for example in examples] == [
        ("anatomy", 3),
        ("medical_genetics", 3),
    ]
    with pytest.raises(DataError, match="none of the medical subjects anatomy, clinical_knowledge"):
        read("mmlu", [MMLU | {"subject": "astronomy"}])
    assert len(read("mmlu", [MMLU | {"subject": "astronomy"}], subset="astronomy")[0]) == 1
    with pytest.raises(DataError, match=r"answer is 4, which does not fit .* answer_is: "):
        read("mmlu", [MMLU | {"answer": 4}])


def test_headqa_counts_by_the_answers_own_numbers(read):
    (example,), _ = read("headqa", [HEADQA])
    assert (example.id, example.answer, example.options, example.subject) == (
        "Cuaderno_2013-7",
        1,
        ("x", "y"),
        "nursery",
    )
    assert read("headqa", [HEADQA | {"ra": -1}])[0][0].answer is None
    with pytest.raises(DataError, match="ra is 0; the answers are numbered 1, 2"):
        read("headqa", [HEADQA | {"ra": 0}])


def test_a_label_outside_the_options_is_refused_everywhere(read):
    """-1 is "hidden" where the dataset says so and an error elsewhere; it is never the last
    option.
    """
    for format, row in (
        ("mcq", {"question": "Q?", "options": ["x", "y"], "answer": -1}),
        ("medqa", MEDQA | {"answer_idx": "C", "answer": "z"}),
        ("mmlu", MMLU | {"answer": "E"}),
        ("medmcqa", MEDMCQA | {"cop": 5}),
    ):
        with pytest.raises(DataError):
            read(format, [row])
