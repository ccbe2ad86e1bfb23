"""Passages of plain texts: found, numbered, cited, left out where they repeat the question's own
context, and the same in training and evaluation.
"""

import json
from dataclasses import replace

import pytest
from conftest import DEMO, ROOT, run_inside
from hypothesis import given
from hypothesis import strategies as st

from medqlora.batches.cache import load_prepared, save_prepared
from medqlora.batches.pipeline import prepare
from medqlora.core.config import Config
from medqlora.data.examples import DataError, Evidence, MultipleChoice, OpenAnswer, Passage
from medqlora.data.retrieval import (
    CHARACTERS,
    add_evidence,
    cut_passages,
    cut_text,
    open_library,
    share_run,
)
from medqlora.engines.interface import Answer
from medqlora.evaluation.answering import read_answers
from medqlora.evaluation.method import Method
from medqlora.evaluation.metrics import score_predictions
from medqlora.evaluation.predictions import collect_rows
from medqlora.evaluation.questions import describe_prompt, prepare_questions
from medqlora.evaluation.settings import describe_change
from medqlora.prompts.chat_template import make_encoder
from medqlora.prompts.citations import HEADING, find_citations
from medqlora.prompts.encoding import encode_prefixes
from medqlora.prompts.fingerprint import fingerprint
from medqlora.prompts.rows import encode_examples
from medqlora.prompts.styles import PromptError, render

BOOK = """The liver makes bile. Bile is kept in the gallbladder until a meal.

The kidney filters the blood. Each kidney has about a million nephrons.

Insulin is made by beta cells of the pancreas. It lowers blood glucose.
"""
ABSTRACT = (
    "We asked whether gallbladder volume after a meal predicts the later formation of stones in"
    " two hundred patients who were followed for five years at one hospital."
)
QUESTION = MultipleChoice(
    "q1", "Where is bile kept?", ("gallbladder", "heart", "skin", "eye"), 0, "medmcqa", "line 1"
)


@pytest.fixture
def library(tmp_path):
    (tmp_path / "book.txt").write_text(BOOK)
    return open_library(str(tmp_path / "book.txt"))


@given(st.text(alphabet="ab .!?\n", max_size=4_000))
def test_pieces_hold_every_word_in_order(text):
    pieces = cut_text(text)
    assert all(0 < len(piece) <= CHARACTERS for piece in pieces)
    # A word over the limit is the only thing that is cut.
    if max(map(len, text.split()), default=0) <= CHARACTERS:
        assert " ".join(pieces).split() == text.split()


def test_pieces_are_numbered_through_their_text():
    sentences = "A sentence of some words. " * 60
    passages = [
        Passage(f"p{i}", sentences, "text", f"book passage {i}", "book", i) for i in range(2)
    ]
    pieces = cut_passages(passages)
    assert [piece.id for piece in pieces] == [f"book#{i + 1}" for i in range(len(pieces))]
    assert len(pieces) > 2


def test_the_most_similar_passage_comes_first_and_resolves(library):
    (shown,), said = add_evidence([QUESTION], library, 2)
    assert "gallbladder" in shown.evidence[0].text
    assert said == "1 of 1 questions get passages"
    by_id = {piece.id: piece for piece in library.pieces}
    assert all(by_id[piece.id] == piece for piece in shown.evidence)
    # Only pieces that share a word with the question are shown.
    assert all("bile" in piece.text.lower() for piece in shown.evidence)


def test_the_own_abstract_is_left_out_and_said(tmp_path):
    (tmp_path / "abstracts.txt").write_text(f"{ABSTRACT}\n\nGallbladder stones are common.")
    library = open_library(str(tmp_path / "abstracts.txt"))
    # Both texts are one piece, so the other one is searched apart.
    (tmp_path / "other.txt").write_text("Gallbladder stones are common.")
    question = replace(QUESTION, dataset="pubmedqa", context=(ABSTRACT,))
    with pytest.raises(DataError, match="no passages found for any"):
        add_evidence([question], library, 1)
    both = open_library(str(tmp_path))
    (shown,), said = add_evidence(
        [replace(question, question="Does gallbladder volume predict stones?")], both, 2
    )
    assert [piece.id for piece in shown.evidence] == ["other.txt#1"]
    assert "1 passages that repeat a question's own context were left out" in said


def test_an_answer_among_the_passages_is_said(library):
    question = OpenAnswer("o", "What makes insulin?", BOOK.split("\n\n")[2].strip(), "qa", "line 1")
    _, said = add_evidence([question], library, 1)
    assert "1 open questions are shown words of their own answer" in said


@given(st.lists(st.integers(0, 3), max_size=40), st.lists(st.integers(0, 3), max_size=40))
def test_sharing_a_run_is_symmetric_and_holds_of_parts(first, second):
    one = [str(number) for number in first]
    two = [str(number) for number in second]
    assert share_run(one, two) == share_run(two, one)
    assert share_run(one + two, one) == (len(one) >= 5)


def test_bad_texts_are_one_line(tmp_path):
    for content, message in (("... !!!", "no words to search for"), ("", "holds no text")):
        (tmp_path / "book.txt").write_text(content)
        with pytest.raises(DataError, match=message):
            open_library(str(tmp_path))
    with pytest.raises(DataError, match=r"retrieval nowhere.txt: .*no file or folder"):
        open_library("nowhere.txt")


@given(st.lists(st.integers(1, 9), max_size=8), st.integers(0, 9))
def test_citations_that_are_written_are_read(numbers, count):
    text = "So it is " + " and ".join(f"[{number}]" for number in numbers)
    known, unknown = find_citations(text, count)
    assert known == [n for n in dict.fromkeys(numbers) if n <= count]
    assert unknown == [n for n in dict.fromkeys(numbers) if n > count]


def test_forms_of_citations():
    assert find_citations("seen [1, 3] and [2-4], not (5) or [x]", 3) == ([1, 3, 2], [4])
    assert find_citations("[0] [12]", 9) == ([], [0, 12])
    assert find_citations("[9-7]", 9) == ([9, 7], [])


def test_every_style_shows_the_same_numbers(library):
    (shown,), _ = add_evidence([QUESTION], library, 2)
    for style in ("chat", "plain"):
        lines = render(shown, style, "letter").user.split("\n")
        assert lines[0] == HEADING
        for number, piece in enumerate(shown.evidence, 1):
            assert lines[number] == f"[{number}] {piece.text}"
    with pytest.raises(PromptError, match="no place for passages"):
        render(shown, "lm_eval", "letter")


def test_training_prefix_is_inference_prompt(library, demo_tokenizer):
    (shown,), _ = add_evidence([QUESTION], library, 2)
    encoder = make_encoder(demo_tokenizer)
    table, _ = encode_examples(encoder, [shown], 512)
    prefix = table.ids[: table.prompt_lengths[0]].tolist()
    (question,), _ = prepare_questions(encoder, [shown], Method())
    assert (
        question.requests[0].prefix
        == prefix
        == encode_prefixes(encoder, [render(shown, encoder.style, "letter")])[0]
    )


def test_passages_that_do_not_fit_are_left_out_whole(library, demo_tokenizer):
    (shown,), _ = add_evidence([QUESTION], library, 2)
    shown = replace(shown, evidence=(*shown.evidence, Evidence("x#1", "x", "word " * 400)))
    encoder = make_encoder(demo_tokenizer)
    questions, _ = prepare_questions(encoder, [shown], Method(permutations=4), max_length=300)
    kept = questions[0].example.evidence
    assert kept == shown.evidence[:-1]
    assert questions[0].truncated
    # Every order of the options shows the same passages.
    texts = [encoder.tokenizer.decode(request.prefix) for request in questions[0].requests]
    assert len(texts) == 4
    assert all(f"[{len(kept)}]" in text and f"[{len(kept) + 1}]" not in text for text in texts)
    table, _ = encode_examples(encoder, [shown], 300)
    assert table.cuts == {"passages": 1}
    assert table.lengths[0] <= 300


def test_the_fingerprint_of_rows_names_the_texts(library, demo_tokenizer, tmp_path):
    encoder = make_encoder(demo_tokenizer)
    plain = describe_prompt(encoder, Method())
    assert plain == fingerprint(encoder)
    assert describe_prompt(encoder, Method(), (), [[library.sha256], 2]) != plain


def test_prepared_data_keep_their_passages(tmp_path, demo_tokenizer):
    (tmp_path / "book.txt").write_text(BOOK)
    entries = {}
    for name, organ in (("train", "liver"), ("test", "kidney")):
        row = {"question": f"What is the {organ} for?", "options": ["bile", "blood"], "answer": "A"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
        entries[name] = [{"format": "mcq", "path": str(tmp_path / f"{name}.jsonl")}]
    data = {**entries, "cache_dir": str(tmp_path / "cache")}
    encoder = make_encoder(demo_tokenizer)
    without = prepare(Config(model={"base": "x"}, data=data), encoder)
    config = Config(model={"base": "x"}, data=data | {"retrieval": str(tmp_path / "book.txt")})
    prepared = prepare(config, encoder)
    assert "kidney" in prepared.test[0].evidence[0].text
    assert load_prepared(config.data, save_prepared(config.data, prepared)).test == prepared.test
    for key in ("data_sha256", "test_sha256", "tokens_sha256"):
        assert without.hashes[key] != prepared.hashes[key]
    assert without.hashes["prompt_sha256"] == prepared.hashes["prompt_sha256"]


def test_generated_answers_are_read_for_citations(library, demo_tokenizer):
    (shown,), _ = add_evidence([OpenAnswer("o", "Where is bile?", "There.", "qa", "l")], library, 2)
    encoder = make_encoder(demo_tokenizer)
    method = Method(scoring="generate")
    (entry,), _ = prepare_questions(encoder, [shown], method)
    row = read_answers(
        encoder, entry, [Answer("In the gallbladder [1], or elsewhere [7].")], method
    )
    assert (row["citations"], row["unknown_citations"]) == ([1], [7])
    assert row["passages"][0]["id"] in {piece.id for piece in library.pieces}
    scores = score_predictions(collect_rows([row | {"model": "m"}]))
    assert scores["citations"] == {"shown": 1, "citing": 1, "citations": 1, "unknown": 1}


def test_other_passages_than_in_training_are_said(library):
    trained = {"path": "book", "num_passages": 3, "library_sha256": library.sha256}
    assert describe_change(library, 3, {}) == ""
    assert describe_change(library, 3, {"retrieval": trained}) == ""
    other = trained | {"library_sha256": "0"}
    said = describe_change(library, 2, {"retrieval": other})
    assert said == "; these are other texts than in training; 2 per question instead of 3"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_passages", "2"], "--num_passages needs texts"),
        (["--retrieval", "BOOK", "--num_fewshot", "1"], "exclude each other"),
        (["--retrieval", "nowhere.txt"], "retrieval nowhere.txt"),
        (["--retrieval", "BOOK", "--prompt_style", "lm_eval"], "no place for passages"),
    ],
)
def test_flags_that_do_not_fit_are_one_line(flags, message, tmp_path, monkeypatch):
    (tmp_path / "book.txt").write_text(BOOK.replace("blood", "antidote"))
    arguments = ["--model", DEMO / "base", "--format", "medmcqa", "--limit", "3"]
    arguments += ["--path", DEMO / "data" / "test.jsonl", "--output", tmp_path / "p.jsonl"]
    arguments += [str(tmp_path / "book.txt") if flag == "BOOK" else flag for flag in flags]
    code, said = run_inside(ROOT / "eval" / "predict.py", arguments, monkeypatch)
    assert code == 2
    assert message in said
