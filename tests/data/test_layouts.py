"""Files in the layouts that people publish are read; anything else is refused by what it is."""

import csv
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medqlora.core.config import DataEntry
from medqlora.data.examples import LETTERS, DataError
from medqlora.data.reading import read_entry

TEXTS = ["Liver", "Spleen", "Heart", "Lung"]
ROW = {"question": "Which organ makes bile?", "options": TEXTS, "answer": "A"}


@pytest.fixture
def read(tmp_path):
    def read(content, name="rows.jsonl", format="mcq", split="train", drop=False, **entry):
        path = tmp_path / name
        if isinstance(content, (list, tuple)) and name.endswith(".jsonl"):
            content = "".join(json.dumps(row) + "\n" for row in content)
        elif not isinstance(content, (str, bytes)):
            content = json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_entry(DataEntry(format=format, path=str(path), **entry), split, drop)

    return read


OPTIONS = {
    "list": TEXTS,
    "by letter": dict(zip("ABCD", TEXTS, strict=True)),
    "by small letter": dict(zip("abcd", TEXTS, strict=True)),
    "by letter, shuffled": dict(zip("DBCA", [TEXTS[i] for i in (3, 1, 2, 0)], strict=True)),
    "with a missing fifth": dict(zip("ABCDE", [*TEXTS, None], strict=True)),
    "with NaN as the fifth": dict(zip("ABCDE", [*TEXTS, math.nan], strict=True)),
    "list with a missing fifth": [*TEXTS, None],
    "by number": dict(zip("1234", TEXTS, strict=True)),
    "columns of Arrow": {"label": list("ABCD"), "text": TEXTS},
    "JSON text": json.dumps(TEXTS),
    "Python text": str(TEXTS),
    "Python text by letter": str(dict(zip("ABCD", TEXTS, strict=True))),
}
OPTIONS["by name"] = {f"option{i}": text for i, text in enumerate(TEXTS, 1)}
OPTIONS["by name and letter"] = {
    f"Option {letter}": text for letter, text in zip("ABCD", TEXTS, strict=True)
}
OPTIONS |= {
    f"objects of {letter} and {text}": [
        {letter: name, text: value} for name, value in zip("ABCD", TEXTS, strict=True)
    ]
    for letter in ("letter", "label", "key", "id")
    for text in ("text", "content", "value", "option")
}
OPTIONS["objects of letter and label"] = [
    {"letter": name, "label": value} for name, value in zip("ABCD", TEXTS, strict=True)
]
OPTIONS["objects without letters"] = [{"text": value} for value in TEXTS]


@pytest.mark.parametrize("layout", OPTIONS)
def test_layouts_of_options(read, layout):
    (example,) = read([ROW | {"options": OPTIONS[layout]}]).examples
    assert (example.options, example.answer) == (tuple(TEXTS), 0)
    choices = {key: value for key, value in ROW.items() if key != "options"}
    (example,) = read([choices | {"choices": OPTIONS[layout]}]).examples
    assert example.options == tuple(TEXTS)


@pytest.mark.parametrize(
    "names",
    [
        "ABCD",
        "abcd",
        ["opa", "opb", "opc", "opd"],
        ["option_a", "option_b", "option_c", "option_d"],
        ["Option A", "Option B", "Option C", "Option D"],
        ["choice1", "choice2", "choice3"],
        ["option0", "option1", "option2"],
        ["optionA", "optionB", "optionC", "optionD"],
    ],
)
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_columns_of_options(tmp_path, names, delimiter, bom):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(bom)
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["question", *names, "answer"])
        writer.writerow(["Which, of these; is\tright?", *TEXTS[: len(names)], "B"])
        # A question with one option less has an empty cell.
        writer.writerow(["Which?", *TEXTS[: len(names) - 1], "", "A"])
    first, second = read_entry(DataEntry(format="mcq", path=str(path)), "train").examples
    assert (first.question, first.answer) == ("Which, of these; is\tright?", 1)
    assert first.options == tuple(TEXTS[: len(names)])
    assert second.options == tuple(TEXTS[: len(names) - 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": ["Q?"]}, r'"question" is a list \(\[\'Q\?\'\]\); expected text'),
        ({"question": {"text": "Q?"}}, '"question" is an object'),
        ({"question": 3}, '"question" is of type int'),
        ({"question": True}, '"question" is a truth value'),
        ({"question": " "}, '"question" is empty'),
        ({"question": math.nan}, '"question" is empty'),
        ({"explanation": ["because"]}, '"explanation" is a list'),
        ({"subject": ["anatomy"]}, '"subject" is a list'),
        ({"context": {"a": "b"}}, '"context" is an object'),
        ({"context": ["a", {"b": "c"}]}, '"context" is an object'),
        ({"options": [["Liver"], ["Spleen"]]}, 'option "A" is a list'),
        ({"options": [True, False]}, 'option "A" is a truth value'),
        ({"options": [2.0, 3.0]}, 'option "A" is the float 2.0'),
        ({"options": ["Liver", "", "Heart"]}, 'option "B" is empty'),
        ({"options": {"A": "Liver", "C": "Heart"}}, "lettered A, C; expected A, B"),
        ({"options": {"A": "Liver", "a": "Heart"}}, 'two options have the letter "A"'),
        ({"options": "['Liver' 'Spleen']"}, "a numpy array"),
        ({"options": "[Liver, Spleen]"}, "neither JSON nor a Python list"),
        ({"options": "Liver, Spleen"}, "expected 2 to 10 texts"),
        ({"options": [{"name": "Liver"}, {"name": "Heart"}]}, "an option has name"),
        ({"options": {"label": ["A"], "text": ["Liver", "Heart"]}}, "as letters for 2 texts"),
        ({"answer": ["A", "B"]}, "several right answers"),
    ],
)
def test_what_is_no_text_is_refused_by_its_type(read, change, message):
    with pytest.raises(DataError, match=message) as error:
        read([ROW | change])
    assert "rows.jsonl line 1" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("answer", ["B", "b", "(B)", "B.", "B) Spleen", ["B"], "['B']", "Spleen"])
def test_forms_of_an_answer(read, answer):
    (example,) = read([ROW | {"answer": answer}]).examples
    assert example.answer == 1
    capitals = {name.capitalize(): value for name, value in ROW.items()}
    (example,) = read([capitals | {"Answer": answer}]).examples
    assert example.answer == 1


@pytest.mark.parametrize(
    ("context", "passages"),
    [
        ("One.", ("One.",)),
        (["One.", "Two."], ("One.", "Two.")),
        ("['One.', 'Two.']", ("One.", "Two.")),
        ("[Letter] One.", ("[Letter] One.",)),
        (None, ()),
        (math.nan, ()),
    ],
)
def test_forms_of_a_context(read, context, passages):
    assert read([ROW | {"context": context}]).examples[0].context == passages
    if passages:
        row = {"QUESTION": "Q?", "CONTEXTS": context, "final_decision": "no", "pubid": 1}
        assert read([row], format="pubmedqa").examples[0].context == passages


@pytest.mark.parametrize("format", ["qa", "medquad"])
def test_an_open_answer_is_text_or_a_number(read, format):
    row = {"question": "How many kidneys?", "answer": 2}
    assert read([row], format=format).examples[0].answer == "2"
    for answer in (["two"], {"text": "two"}, True, 2.0):
        with pytest.raises(DataError, match='"answer" is'):
            read([row | {"answer": answer}], format=format)
    # The letter of a multiple-choice question must not be learned as an open answer.
    for options in ({"options": TEXTS}, {"A": "x", "B": "y", "C": "z"}, {"choices": TEXTS}):
        with pytest.raises(DataError, match="the row has options"):
            read([row | {"answer": "A"} | options], format=format)


def test_a_column_that_is_not_there_is_named(read):
    with pytest.raises(DataError, match='has no "question"; it has stem, options, answer'):
        read([{"stem": "Q?", "options": TEXTS, "answer": "A"}])
    with pytest.raises(DataError, match='has no "options"; it has question, answers, correct'):
        read([{"question": "Q?", "answers": TEXTS, "correct": "A"}])
    columns = {"options": "answers", "answer": "correct_answers"}
    row = {"question": "Q?", "answers": {"a": "x", "b": "y"}, "correct_answers": ["b"]}
    (example,) = read([row], columns=columns).examples
    assert (example.options, example.answer) == (("x", "y"), 1)
    assert "1 without an answer" in read([{"question": "Q?", "options": TEXTS}]).description


def test_two_groups_of_columns_are_refused_until_one_is_named(read):
    row = {"question": "Q?", "A": "x", "B": "y", "opa": "v", "opb": "w", "answer": "B"}
    with pytest.raises(DataError, match="may stand in A, B or in opa, opb; name the columns"):
        read([row])
    (example,) = read([row], columns={"options": ["opa", "opb"]}).examples
    assert example.options[example.answer] == "w"


WHOLE = [ROW | {"id": "1"}, ROW | {"id": "2", "answer": "B"}]
LINES = "".join(json.dumps(row) + "\n" for row in WHOLE)
FILES = {
    "rows.jsonl": LINES,
    "crlf.jsonl": LINES.replace("\n", "\r\n"),
    "list.jsonl": json.dumps(WHOLE),
    "lines.json": LINES,
    "list.json": json.dumps(WHOLE),
    "pretty.json": json.dumps(WHOLE, indent=2),
    "by-id.json": json.dumps({row["id"]: row for row in WHOLE}),
    "pretty-by-id.json": json.dumps({row["id"]: row for row in WHOLE}, indent=2),
    "with-version.json": json.dumps({"version": "1.0", "licence": {"a": "b"}, "data": WHOLE}),
    "one.json": json.dumps(WHOLE[0]),
}


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("name", FILES)
def test_forms_of_json(read, name, bom):
    examples = read(bom + FILES[name], name).examples
    assert [(item.id, item.answer) for item in examples] == [("1", 0), ("2", 1)][: len(examples)]
    assert len(examples) == (1 if name == "one.json" else 2)


def test_a_file_of_several_sets_names_them(read):
    other = [row | {"id": f"other {row['id']}"} for row in WHOLE]
    by_id = {row["id"]: row for row in other}
    for sets in ({"medqa": WHOLE, "mmlu": other}, {"medqa": WHOLE, "mmlu": by_id}):
        with pytest.raises(DataError, match="holds the sets medqa, mmlu; name one with subset"):
            read(sets, "benchmark.json")
        assert len(read(sets, "benchmark.json", subset="medqa").examples) == 2
        found = read(sets, "benchmark.json", subset="mmlu").examples
        assert [item.id for item in found] == ["other 1", "other 2"]
    for name in ("bench", "train"):
        with pytest.raises(DataError, match="holds the sets medqa, mmlu; name one with subset"):
            read({"medqa": WHOLE, "mmlu": other}, "benchmark.json", subset=name)
    for content, file in ((WHOLE, "list.json"), (LINES, "rows.jsonl"), ("question\nQ?", "r.csv")):
        with pytest.raises(DataError, match="has no named sets; leave subset x out"):
            read(content, file, subset="x")
    # A set that has the name of the split is that split, as a file in a folder would be.
    sets = {"train": WHOLE, "test": other}
    assert read(sets, "all.json", split="train").examples[0].id == "1"
    assert read(sets, "all.json", split="test").examples[0].id == "other 1"
    with pytest.raises(DataError, match="holds the sets train, test"):
        read(sets, "all.json", split="file")


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (
            "id,question,a,b,answer\n1,Q, x?,y,z,A\n",
            "r.csv",
            "row has 6 cells, the header 5; quote",
        ),
        ("question,a,b,answer\nQ?,y\n", "r.csv", 'has 2 cells, the header 4; it ends before "b"'),
        ("question,a,b,a,answer\nQ?,y,z,w,A\n", "r.csv", 'two columns have the name "a"'),
        ('question,a,b,answer\nQ?,"y,z,A\nQ?,y,z,A\n', "r.csv", "close each quotation mark"),
        ("Which?,Liver,Spleen,A\nWhat?,Heart,Lung,B\n", "r.csv", 'no "question"; it has Which?'),
        ('{"question": "Q?", "question": "R?"}\n', "r.jsonl", '"question" stands twice'),
        ('[{"question": "Q?", "question": "R?"}]', "r.json", '"question" stands twice'),
        (b"\x00\x01\x02text", "r.txt", "r.txt is not UTF-8 text: it is a binary file"),
        (b"%PDF-1.7 \xff\xfe", "r.txt", "r.txt is not UTF-8 text .* it is a PDF document"),
        ("é".encode("latin-1"), "r.txt", "r.txt is not UTF-8 text .* iconv -f ISO-8859-1"),
        ("plain text".encode("utf-16-le"), "r.txt", "looks like UTF-16LE .* iconv -f UTF-16LE"),
        ("é text".encode("utf-16-be"), "r.txt", "looks like UTF-16BE .* iconv -f UTF-16BE"),
        (b"\xff\xfe\x00", "r.txt", "begins as utf-16-le text and is none"),
        ("question\n".encode("utf-16"), "r.csv", "r.csv is not UTF-8 text"),
        ("[1, 2]", "r.json", "expected a list of objects"),
    ],
)
def test_damaged_files_are_refused(read, content, name, message):
    format = "text" if name.endswith(".txt") else "mcq"
    with pytest.raises(DataError, match=message):
        read(content, name, format)


def test_a_short_row_is_dropped_when_asked_and_never_read_as_unlabelled(read):
    content = "question,a,b,answer\nQ?,y,z,A\nR?,y,z\n"
    with pytest.raises(DataError, match="row 2"):
        read(content, "rows.csv")
    reading = read(content, "rows.csv", drop=True)
    assert len(reading.examples) == len(reading.removals) == 1


def test_long_cells_are_read(read):
    text = "long " * 40_000
    (example,) = read(f"question,answer\nQ?,{text}\n", "rows.csv", "qa").examples
    assert len(example.answer) == len(text)


def test_mmlu_without_a_header(read):
    content = "Which bone?,Femur,Radius,Tibia,Fibula,B\nHow many?,1,2,3,4,D\n"
    first, second = read(content, "anatomy_test.csv", "mmlu").examples
    assert (first.question, first.options[first.answer]) == ("Which bone?", "Radius")
    assert second.options[second.answer] == "4"


def test_equal_options_are_told(read):
    reading = read([ROW, ROW | {"options": ["x", "y", "x"], "answer": "B"}])
    assert "1 with two equal options, such as rows.jsonl line 2" in reading.description


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=2, max_size=10))
def test_options_survive_every_layout(tmp_path_factory, texts):
    """Whatever the texts are, all layouts give the same options, or all refuse them."""
    letters = dict(zip(LETTERS, texts, strict=False))
    layouts = [
        texts,
        letters,
        [{"letter": letter, "text": text} for letter, text in letters.items()],
        json.dumps(texts),
        repr(texts),
        repr(letters),
    ]
    path = tmp_path_factory.mktemp("layouts") / "rows.jsonl"
    rows = [{"question": "Q?", "options": layout, "answer": "A"} for layout in layouts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = read_entry(DataEntry(format="mcq", path=str(path)), "train").examples
    assert {example.options for example in examples} == {tuple(texts)}


CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(str.strip)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=4), st.sampled_from(",;\t"))
def test_cells_of_a_table_survive(tmp_path_factory, cells, delimiter):
    path = tmp_path_factory.mktemp("tables") / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["question", "answer"])
        writer.writerows(cells)
    examples = read_entry(DataEntry(format="qa", path=str(path)), "train").examples
    assert [(example.question, example.answer) for example in examples] == cells
