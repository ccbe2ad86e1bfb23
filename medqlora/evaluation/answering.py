"""What an engine said becomes prediction rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np

from medqlora.data.examples import LETTERS, Example, OpenAnswer
from medqlora.data.formats.registry import FORMATS
from medqlora.engines.interface import BATCH_SIZE, Engine, Sampling
from medqlora.evaluation.journal import split_into_batches
from medqlora.evaluation.method import Method
from medqlora.evaluation.questions import (
    PreparedQuestion,
    ask,
    describe_example,
    describe_prompt,
    seed_of,
)
from medqlora.prompts.answers import parse_answer
from medqlora.prompts.chat_template import Encoder


def predict(
    engine: Engine,
    encoder: Encoder,
    asked: Sequence[PreparedQuestion],
    shared: int,
    method: Method,
    name: str,
    question_batches: Sequence[Sequence[int]] | None = None,
    run_key: str = "",
    done: Collection[str] = (),
) -> Iterator[list[dict[str, Any]]]:
    """Prediction rows (README), a batch at a time.

    Args:
        asked, shared: of `ask`.
        name: written as the model's name.
        question_batches: numbers of the questions of each batch; default: all, by
            journal.split_into_batches.
        run_key: all that the numbers depend on besides the question; a part of every row's key.
        done: keys of rows that exist.
    """
    by_subject = asked and FORMATS[asked[0].example.dataset].fewshot_by_subject
    fixed = method.fewshot == "fixed" and asked and not by_subject
    digest = describe_prompt(encoder, method, asked[0].shots if fixed else ())
    facts = {"prompt_sha256": digest, "engine": engine.name, "model": name}
    question_batches = (
        split_into_batches([entry.example.id for entry in asked], BATCH_SIZE[engine.name])
        if question_batches is None
        else question_batches
    )
    for question_batch in question_batches:
        entries = [(asked[i], asked[i].key(run_key)) for i in question_batch]
        entries = [(entry, key) for entry, key in entries if key not in done]
        if not entries:
            continue
        if method.scoring == "generate":
            stops = (encoder.end_id, *{encoder.tokenizer.eos_token_id} - {encoder.end_id})
            sampling = Sampling(
                method.max_new_tokens,
                stops,
                decoder(encoder),
                method.temperature,
                method.samples,
                seed_of(entries[0][0].example.id, method.seed),
            )
            found = engine.generate([entry.requests[0].prefix for entry, _ in entries], sampling)
            rows = [
                read_texts(encoder, entry, answers, method)
                for (entry, _), answers in zip(entries, found, strict=True)
            ]
        else:
            scores = iter(
                engine.score(
                    [request for entry, _ in entries for request in entry.requests], shared
                )
            )
            values = [entry.sort([next(scores) for _ in entry.requests]) for entry, _ in entries]
            read = read_passage if method.scoring == "perplexity" else read_option_scores
            rows = [
                read(entry, some, method) for (entry, _), some in zip(entries, values, strict=True)
            ]
        yield [row | facts | {"key": key} for row, (_, key) in zip(rows, entries, strict=True)]


def answer(
    engine: Engine,
    encoder: Encoder,
    examples: Sequence[Example],
    name: str,
    max_length: int | None = None,
    part: tuple[int, int] = (0, 1),
) -> list[dict[str, Any]]:
    """Prediction rows of multiple-choice examples by letters, in their order; part (i, n): only
    every n-th batch from the i-th, so that n processes answer all. A row does not depend on n."""
    asked, shared = ask(encoder, examples, Method(), (), max_length)
    question_batches = split_into_batches(
        [example.id for example in examples], BATCH_SIZE[engine.name]
    )[part[0] :: part[1]]
    rows = {
        row["id"]: row
        for batch in predict(engine, encoder, asked, shared, Method(), name, question_batches)
        for row in batch
    }
    return [rows[example.id] for example in examples if example.id in rows]


def decoder(encoder: Encoder) -> Callable[[list[int]], str]:
    return lambda ids: encoder.tokenizer.decode(ids, skip_special_tokens=True)


def read_option_scores(
    entry: PreparedQuestion, values: list[float], method: Method
) -> dict[str, Any]:
    """Option log-probabilities -> row; over several orders an option's probability is the mean of
    what it gets in each.
    """
    n = len(entry.example.options)
    letters = LETTERS[:n]
    table = np.array(values).reshape(len(entry.orders), n)  # [orders, position]
    row = describe_example(entry, "choice") | {"text": None}
    by_option = np.empty_like(table)  # an option that is unknown (NaN) in one order stays unknown
    for at, order in enumerate(entry.orders):
        by_option[at, list(order)] = table[at]
    logprobs = (
        by_option[0]
        if len(table) == 1
        else np.logaddexp.reduce(by_option, axis=0) - math.log(len(table))
    )
    known = {
        letter: float(value)
        for letter, value in zip(letters, logprobs, strict=True)
        if not np.isnan(value)
    }
    row["option_logprobs"] = known
    row["prediction"] = max(known, key=known.get) if known else None
    row["letter_mass"] = (
        float(np.exp(list(known.values())).sum()) if known and method.scoring == "letters" else None
    )
    if len(entry.orders) > 1:
        row["permutations"] = {
            "".join(letters[i] for i in order): [
                None if math.isnan(value) else value for value in some
            ]
            for order, some in zip(entry.orders, table.tolist(), strict=True)
        }
    if method.scoring == "cloze":
        tokens = entry.sort(
            [[len(option) for option in request.options] for request in entry.requests]
        )
        lengths = {
            "raw": [1] * n,
            "character": [len(option) for option in entry.example.options],
            "token": tokens,
        }
        row["predictions"] = {
            name: letters[int(np.argmax(logprobs / np.array(some)))]
            for name, some in lengths.items()
        }
        row["prediction"] = row["predictions"][method.normalization]
    return row


def read_texts(
    encoder: Encoder, entry: PreparedQuestion, texts: list[str], method: Method
) -> dict[str, Any]:
    """Generated texts -> row; several samples vote, and of equal counts the answer that came first
    wins.
    """
    texts = [text.strip() for text in texts]
    if isinstance(entry.example, OpenAnswer):
        return describe_example(entry, "open") | {
            "prediction": texts[0],
            "text": texts[0],
            "option_logprobs": None,
            "letter_mass": None,
        }
    parsed = [parse_answer(text, entry.example.options, encoder.completion) for text in texts]
    votes = Counter(LETTERS[index] for index in parsed if index is not None)
    row = describe_example(entry, "choice") | {
        "text": texts[0],
        "option_logprobs": None,
        "letter_mass": None,
    }
    row["prediction"] = votes.most_common(1)[0][0] if votes else None
    if method.samples > 1:
        row |= {"samples": texts, "votes": dict(votes)}
    return row


def read_passage(entry: PreparedQuestion, values: list[float], method: Method) -> dict[str, Any]:
    text = entry.example.text
    return describe_example(entry, "text") | {
        "logprob": sum(values),
        "tokens": sum(len(request.options[0]) for request in entry.requests),
        "bytes": len(text.encode()),
        "words": len(text.split()),
    }
