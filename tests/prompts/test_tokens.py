"""Supervised ids exact to the token, on the real tokenizers."""

import copy
from dataclasses import replace

import numpy as np
import pytest
from conftest import TOKENIZERS, real, real_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from medqlora.core.config import DataEntry
from medqlora.data.cleaning import clean
from medqlora.data.examples import DataError, MultipleChoice, OpenAnswer, Passage
from medqlora.data.reading import read_examples
from medqlora.prompts.chat_template import make_encoder
from medqlora.prompts.encoding import (
    encode_candidates,
    encode_completions,
    encode_prefixes,
    prefix_text,
)
from medqlora.prompts.fingerprint import fingerprint
from medqlora.prompts.rows import encode_examples
from medqlora.prompts.styles import PromptError, candidates, render

MCQ = MultipleChoice(
    "q1",
    "Which falls?",
    ("Na", "K", "Ca", "Cl"),
    2,
    "medmcqa",
    "f line 1",
    explanation="Calcium falls.",
)
OPEN = OpenAnswer(
    "q2", "What is sepsis?", "A dysregulated response to infection.", "medquad", "f line 2"
)
PUBMEDQA = MultipleChoice(
    "q3",
    "Does it help?",
    ("yes", "no", "maybe"),
    0,
    "pubmedqa",
    "f line 3",
    context=tuple(f"Sentence {i} of the abstract." for i in range(60)),
)

# What the model must learn to write, spelled out: completion and end token, nothing else.
SUPERVISED = {
    "llama-3": {"chat": ["C", "<|eot_id|>"], "plain": ["ĠC", "<|end_of_text|>"]},
    "qwen2.5": {"chat": ["C", "<|im_end|>"], "plain": ["ĠC", "<|im_end|>"]},
    "phi-3": {"chat": ["C", "<|end|>"], "plain": ["▁C", "<|endoftext|>"]},
    "smollm2": {"chat": ["C", "<|im_end|>"], "plain": ["ĠC", "<|im_end|>"]},
}


def supervised(table, row=0):
    ids = table.ids[table.offsets[row] : table.offsets[row + 1]]
    return ids[table.prompt_lengths[row] :].tolist()


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("style", ["chat", "plain"])
def test_supervised_ids_are_completion_and_end_token(name, style):
    tokenizer = real_tokenizer(name)
    table, _ = encode_examples(make_encoder(tokenizer, style), [MCQ], 512)
    assert tokenizer.convert_ids_to_tokens(supervised(table)) == SUPERVISED[name][style]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_threads_give_the_rows_of_one_after_the_other(name, monkeypatch):
    """Rows that are cut, rows that cannot fit and plain ones, in small batches on all threads, and
    each alone.
    """
    monkeypatch.setattr("medqlora.prompts.rows.BATCH", 3)
    long = replace(MCQ, question="Which of them falls? " * 40)
    examples = [
        replace(example, id=str(i))
        for i in range(60)
        for example in [(MCQ, PUBMEDQA, OPEN, long)[i % 4]]
    ]
    encoder = make_encoder(real_tokenizer(name))
    table, removals = encode_examples(encoder, examples, 128, drop=True)
    alone = [
        encode_examples(encoder, [example], 128)[0]
        for example in examples
        if example.question is not long.question
    ]
    assert table.ids.tolist() == [token for row in alone for token in row.ids]
    assert list(table.names) == [row.names[0] for row in alone]
    assert [removal.id for removal in removals] == [str(i) for i in range(3, 60, 4)]
    with pytest.raises(DataError, match="f line 1: too long"):
        encode_examples(encoder, examples, 128)


def test_end_token_is_supervised_even_when_it_is_the_pad_token(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)  # loaded once for all tests
    tokenizer.pad_token = tokenizer.eos_token
    for style in ("chat", "plain"):
        encoder = make_encoder(tokenizer, style)
        table, _ = encode_examples(encoder, [MCQ, OPEN], 512)
        assert supervised(table, 0)[-1] == supervised(table, 1)[-1] == encoder.end_id


def test_auto_style_is_the_chat_template_where_there_is_one(tokenizer, monkeypatch):
    assert make_encoder(tokenizer).style == "chat"
    monkeypatch.setattr(tokenizer, "chat_template", None)
    assert make_encoder(tokenizer).style == "plain"
    with pytest.raises(PromptError, match="no chat template"):
        make_encoder(tokenizer, "chat")


@pytest.mark.parametrize("style", ["chat", "plain", "lm_eval"])
@pytest.mark.parametrize("completion", ["letter", "letter_text", "explanation"])
def test_training_prefix_is_the_inference_prefix(tokenizer, style, completion):
    encoder = make_encoder(tokenizer, style, completion)
    for example in (MCQ, PUBMEDQA):
        table, _ = encode_examples(encoder, [example], 4096)
        trained = table.ids[: table.prompt_lengths[0]].tolist()
        assert (
            trained
            == encode_prefixes(encoder, [render(replace(example, answer=None), style, completion)])[
                0
            ]
        )


def test_chat_prefix_is_the_template_with_one_bos(tokenizer):
    encoder = make_encoder(tokenizer, "chat")
    prompt = render(MCQ, "chat", "letter")
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt.user}],
        add_generation_prompt=True,
        return_dict=True,
        date_string="26 Jul 2024",
    )["input_ids"]
    ids = encode_prefixes(encoder, [prompt])[0]
    assert ids == expected
    if tokenizer.bos_token_id is not None:
        assert ids.count(tokenizer.bos_token_id) == expected.count(tokenizer.bos_token_id)


REAL = [
    ("medqa", "medqa/dev_4_options.jsonl"),
    ("medmcqa", "medmcqa/validation_part.jsonl"),
    ("pubmedqa", "pubmedqa/pqal_train.json"),
    ("medquad", "medquad/medquad.jsonl"),
]


@pytest.mark.parametrize(("format", "path"), REAL)
@pytest.mark.parametrize("style", ["chat", "plain"])
def test_real_rows_decode_to_their_answer(tokenizer, format, path, style):
    """Prefix and completion, encoded apart, are the tokens of the whole text encoded at once."""
    examples, _ = read_examples(DataEntry(format=format, path=str(real(path)), limit=150), "train")
    examples = [clean(example) for example in examples]
    encoder = make_encoder(tokenizer, style)
    prompts = [render(example, style, "letter") for example in examples]
    prefixes = encode_prefixes(encoder, prompts)
    completions = encode_completions(encoder, prompts, [prompt.completion for prompt in prompts])
    for prompt, prefix, completion in zip(prompts, prefixes, completions, strict=True):
        whole = tokenizer(
            prefix_text(encoder, prompt) + prompt.completion, add_special_tokens=False
        )["input_ids"]
        if style == "plain":
            whole = [*encoder.leading_ids, *whole]
        assert prefix + completion == whole


def test_candidates_are_distinct_and_continue_the_prefix(tokenizer):
    for style in ("chat", "plain", "lm_eval"):
        encoder = make_encoder(tokenizer, style)
        for example in (MCQ, PUBMEDQA):
            prompt = render(example, style, "letter")
            (options,) = encode_candidates(
                encoder, [prompt], encode_prefixes(encoder, [prompt]), [candidates(example, style)]
            )
            assert len({tuple(option) for option in options}) == len(options)
            trained = encode_completions(
                encoder,
                [render(example, style, "letter")],
                [render(example, style, "letter").completion],
            )[0]
            assert options[example.answer] == trained


def test_truncation_cuts_the_context_only(tokenizer):
    encoder = make_encoder(tokenizer)
    full, _ = encode_examples(encoder, [PUBMEDQA], 4096)
    cut, _ = encode_examples(encoder, [PUBMEDQA], 128)
    assert full.lengths[0] > 256
    assert 100 < cut.lengths[0] <= 128
    text = tokenizer.decode(cut.ids)
    assert "Sentence 0 " in text
    assert "Sentence 59" not in text
    for kept in ("Does it help?", "A. yes", "B. no", "C. maybe"):
        assert kept in text
    assert supervised(cut) == supervised(full)


def test_truncation_cuts_the_explanation_and_keeps_the_letter(tokenizer):
    encoder = make_encoder(tokenizer, completion="explanation")
    long = replace(MCQ, explanation="Because calcium binds to many things. " * 40)
    table, _ = encode_examples(encoder, [long], 128)
    assert table.lengths[0] <= 128
    assert tokenizer.decode(supervised(table)[:-1]).endswith("Answer: C")


def test_row_that_cannot_fit_is_an_error_or_a_listed_drop(tokenizer):
    encoder = make_encoder(tokenizer)
    long = replace(MCQ, options=("very long option " * 50, "b", "c", "d"))
    with pytest.raises(DataError, match=r"f line 1.*needs .* tokens without its context"):
        encode_examples(encoder, [long], 64)
    table, removals = encode_examples(encoder, [long, MCQ], 100, drop=True)
    assert (list(table.names), [r.id for r in removals]) == (["q1"], ["q1"])


def test_row_without_answer_is_never_silent(tokenizer):
    with pytest.raises(DataError, match="no supervised token"):
        encode_examples(make_encoder(tokenizer), [replace(MCQ, answer=None)], 512)


def test_passages_are_split_and_supervised_from_their_second_token(tokenizer):
    encoder = make_encoder(tokenizer)
    table, _ = encode_examples(
        encoder, [Passage("p", "The heart pumps blood. " * 60, "text", "f")], 64
    )
    assert len(table.lengths) > 3
    assert table.lengths.max() <= 64
    assert set(table.prompt_lengths) == {1}
    assert table.ids[-1] == encoder.end_id


def test_passages_of_one_document_fill_rows_and_documents_stay_apart(tokenizer):
    """Every token of a document stands once, in order, and all its rows but the last are full."""
    encoder = make_encoder(tokenizer)
    books = []
    for book in range(3):
        for place in range(40):
            # The seventh passage of each book was removed.
            if place == 7:
                continue
            text = f"Book {book}, passage {place}. " + "The heart pumps blood. " * (place % 5)
            books.append(
                Passage(f"{book}-{place}", text.strip(), "text", "f", f"book {book}", place)
            )
    alone = Passage("alone", "One row is a document of its own.", "text", "f", "line 1", 0)
    table, _ = encode_examples(encoder, [*books, alone], 64)
    runs = {}  # the rows of each run of passages without a gap
    for row, example in enumerate(table.examples):
        ids = table.ids[table.offsets[row] : table.offsets[row + 1]].tolist()
        runs.setdefault(int(example), []).append(ids)
    assert len(runs) == 7
    for first, rows in runs.items():
        assert all(len(ids) == 64 for ids in rows[:-1])
        joined = [token for ids in rows for token in ids]
        assert joined[-1] == encoder.end_id
        text = tokenizer.decode(joined[len(encoder.leading_ids) : -1])
        members = [
            passage
            for number, passage in enumerate([*books, alone])
            if number >= first and all(later <= first or number < later for later in runs)
        ]
        expected = "\n\n".join(passage.text for passage in members)
        assert text.strip() == expected.strip()


def test_answers_are_cut_only_when_asked_and_never_teach_to_stop_there(tokenizer):
    encoder = make_encoder(tokenizer)
    long = OpenAnswer("o", "What?", "word " * 300, "qa", "f line 1", context=("seen " * 100,))
    short = OpenAnswer("s", "What?", "That.", "qa", "f line 2")
    with pytest.raises(DataError, match=r"too long: needs .* --data.truncate answer"):
        encode_examples(encoder, [short, long], 128)
    table, removals = encode_examples(encoder, [short, long], 128, drop=True)
    assert (list(table.names), len(removals), table.cuts) == (["s"], 1, {})
    table, removals = encode_examples(encoder, [short, long], 128, truncate_answers=True)
    assert (removals, table.cuts) == ([], {"context": 1, "answer": 1})
    assert table.lengths[1] == 128
    assert table.ids[table.offsets[1] - 1] == encoder.end_id
    cut = table.ids[table.offsets[1] : table.offsets[2]].tolist()
    assert encoder.end_id not in cut[table.prompt_lengths[1] :]
    # A question that is too long by itself, and a letter, cannot be cut.
    for example in (replace(long, question="why " * 300), replace(MCQ, question="why " * 300)):
        with pytest.raises(DataError, match="too long"):
            encode_examples(encoder, [example], 128, truncate_answers=True)


def test_fingerprint_tells_prompts_apart(tokenizer):
    prints = {
        fingerprint(make_encoder(tokenizer, style, completion))
        for style in ("chat", "plain", "lm_eval")
        for completion in ("letter", "letter_text")
    }
    assert len(prints) == 5  # lm_eval has one completion
    assert fingerprint(make_encoder(tokenizer, "chat")) == fingerprint(
        make_encoder(tokenizer, "auto")
    )


@settings(max_examples=60, deadline=None)
@given(
    question=st.text(min_size=1, max_size=80),
    options=st.lists(st.text(min_size=1, max_size=30), min_size=2, max_size=5),
    answer=st.integers(0, 1),
    style=st.sampled_from(["plain", "lm_eval"]),
)
def test_any_text_keeps_prefix_and_end(demo_tokenizer, question, options, answer, style):
    example = MultipleChoice("q", question, tuple(options), answer, "medqa", "f")
    encoder = make_encoder(demo_tokenizer, style)
    table, _ = encode_examples(encoder, [example], 10_000)
    prefix = encode_prefixes(encoder, [render(replace(example, answer=None), style, "letter")])[0]
    assert table.ids[: table.prompt_lengths[0]].tolist() == prefix
    assert demo_tokenizer.decode(supervised(table)[:-1]) == f" {'AB'[answer]}"
    assert supervised(table)[-1] == encoder.end_id
    assert np.all(table.prompt_lengths < table.lengths)


def test_template_that_writes_two_beginnings_is_refused(monkeypatch):
    """Llama-3's template writes BOS; one that writes it twice would shift every position of every
    prompt.
    """
    tokenizer = copy.deepcopy(real_tokenizer("llama-3"))
    make_encoder(tokenizer, "chat")
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    with pytest.raises(PromptError, match="second beginning-of-sequence token"):
        make_encoder(tokenizer, "chat")


def test_no_prompt_begins_twice(tokenizer):
    for style in ("chat", "plain", "lm_eval"):
        (prefix,) = encode_prefixes(make_encoder(tokenizer, style), [render(MCQ, style, "letter")])
        assert tokenizer.bos_token_id is None or prefix[:2].count(tokenizer.bos_token_id) <= 1
