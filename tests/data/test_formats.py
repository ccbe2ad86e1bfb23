"""A dataset is one file: everything else follows from what the file registers."""

import ast
import json

import pytest
from conftest import ROOT, run_script

from medqlora.core.config import DataEntry
from medqlora.data.examples import DataError
from medqlora.data.formats.registry import FORMATS, Format, find_format, register
from medqlora.data.reading import read_examples

# The file that a user would add, for questions whose answer is the text of the right option.
ADDED = """
from medqlora.data.examples import MultipleChoice
from medqlora.data.formats.fields import need_text, written_answer
from medqlora.data.formats.options import read_options
from medqlora.data.formats.registry import Format, register


def parse_nursing(record, source, entry):
    return MultipleChoice(
        id="",
        question=need_text(record, "stem"),
        options=read_options(record.get("choices")),
        answer=written_answer(record, "right"),
        dataset="nursing",
        source=source,
    )


register(
    Format(
        name="nursing",
        parse=parse_nursing,
        published_split="validation",
        signatures=(frozenset({"stem", "choices", "right"}),),
        answers=("text",),
    )
)
"""
ROW = {"stem": "Which vitamin?", "choices": ["A", "C", "D"], "right": "C"}
USED = """
import json, pathlib, sys
import medqlora.data.formats as formats
formats.__path__.append(sys.argv[1])
import importlib
importlib.import_module("medqlora.data.formats.nursing")
from medqlora.core.config import DataEntry
from medqlora.data.reading import read_examples
from medqlora.prompts.styles import render
(example,), _ = read_examples(DataEntry(format="nursing", path=sys.argv[2]), "train")
print(example.answer, example.id[:8], repr(render(example, "lm_eval", "letter").user))
"""


def test_one_added_file_is_a_dataset(tmp_path):
    (tmp_path / "formats").mkdir()
    (tmp_path / "formats" / "nursing.py").write_text(ADDED)
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW))
    done = run_script("-c", USED, tmp_path / "formats", tmp_path / "rows.jsonl")
    assert done.returncode == 0, done.stderr
    asked = "Question: Which vitamin?\\nA. A\\nB. C\\nC. D\\nAnswer:"
    # "C" is also the letter of the third option, but this dataset writes texts.
    assert done.stdout.strip() == f"1 nursing- '{asked}'"


def test_no_other_file_decides_by_the_name_of_a_dataset():
    names = {name for name in FORMATS if name not in ("mcq", "qa", "text")}
    for path in [*(ROOT / "medqlora").rglob("*.py"), *(ROOT / "eval").glob("*.py")]:
        if path.parent.name == "formats":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                used = {leaf.value for leaf in ast.walk(node) if isinstance(leaf, ast.Constant)}
                assert not names & used, f"{path}:{node.lineno} {ast.unparse(node)}"


def test_a_misspelt_format_is_named_with_its_neighbour():
    with pytest.raises(DataError, match=r"format medqq: expected one of .*; did you mean medqa\?"):
        find_format("medqq")
    with pytest.raises(DataError, match="did you mean pubmedqa"):
        read_examples(DataEntry(format="pubmedq", path="x.jsonl"), "train")


def test_two_files_cannot_register_one_name():
    with pytest.raises(AssertionError, match="two files"):
        register(Format(name="medqa", parse=FORMATS["medqa"].parse))
