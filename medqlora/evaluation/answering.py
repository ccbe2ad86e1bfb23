"""Questions are put to an engine, and its answers become prediction rows."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from medqlora.core.config import ANSWER_TOKENS
from medqlora.data.examples import LETTERS, Example, OpenAnswer
from medqlora.data.formats.registry import FORMATS
from medqlora.engines.interface import BATCH_SIZE, Answer, Engine, EngineError, Sampling
from medqlora.evaluation.fitting import TooLongError
from medqlora.evaluation.journal import split_into_batches
from medqlora.evaluation.method import Method, ScoringError
from medqlora.evaluation.questions import (
    PreparedQuestion,
    derive_seed,
    describe_example,
    describe_passages,
    describe_prompt,
    prepare_questions,
)
from medqlora.prompts.answers import find_final, parse_answer
from medqlora.prompts.chat_template import Encoder, MessageEncoder
from medqlora.prompts.citations import find_citations


def predict(
    engine: Engine,
    encoder: Encoder | MessageEncoder,
    questions: Sequence[PreparedQuestion],
    shared: int,
    method: Method,
    name: str,
    question_batches: Sequence[Sequence[int]] | None = None,
    run_key: str = "",
    done: Collection[str] = (),
    served: Mapping[str, str | None] | None = None,
    failures: list[EngineError] | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """Yield prediction rows, a batch at a time.

    Args:
        engine: runs the model.
        encoder: what `prepare_questions` got.
        questions, shared: what `prepare_questions` returned.
        method: how questions are asked.
        name: written as the model's name.
        question_batches: numbers of the questions of each batch; by default all questions, as
            journal.split_into_batches divides them.
        run_key: a hash of all that the numbers depend on besides the question; it is a part of
            every row's key.
        done: keys of rows that exist; their questions are not asked again.
        served: what a server said of itself; it stands in every row.
        failures: gets one error per question that a server did not answer, which has no row.

    Raises:
        EngineError: a question was not answered, and there is no list of failures.
    """
    by_subject = questions and FORMATS[questions[0].example.dataset].fewshot_by_subject
    # The prompt's fingerprint covers worked examples only where all questions share them.
    fixed = method.fewshot == "fixed" and questions and not by_subject
    common = {
        "prompt_sha256": describe_prompt(
            encoder, method, questions[0].shots if fixed else (), describe_passages(questions)
        ),
        "engine": engine.name,
        "weights": engine.weights,
        "model": name,
        **(served or {}),
    }
    if question_batches is None:
        ids = [entry.example.id for entry in questions]
        question_batches = split_into_batches(ids, BATCH_SIZE[engine.name])
    for question_batch in question_batches:
        keyed = [(questions[number].key(run_key), questions[number]) for number in question_batch]
        # The journal keeps whole batches. A batch of the same questions is therefore skipped or
        # computed as a whole, and its rounding does not depend on a crash.
        keyed = [(key, entry) for key, entry in keyed if key not in done]
        if not keyed:
            continue
        entries = [entry for _, entry in keyed if entry.too_long is None]
        if not entries:
            asked = []
        elif method.scoring == "generate":
            asked = generate_rows(engine, encoder, entries, method)
        else:
            asked = score_rows(engine, entries, shared, method)
        rows = iter(asked)
        finished = []
        for key, entry in keyed:
            row = describe_too_long(entry) if entry.too_long else next(rows)
            if not isinstance(row, EngineError):
                finished.append(row | common | {"key": key})
            elif failures is None:
                raise row
            else:
                failures.append(row)
        yield finished


def describe_too_long(entry: PreparedQuestion) -> dict[str, Any]:
    """Make the row of a question that was left out; it is counted and not scored."""
    kind = "open" if isinstance(entry.example, OpenAnswer) else "choice"
    return describe_example(entry, kind) | {
        "prediction": None,
        "text": None,
        "option_logprobs": None,
        "letter_mass": None,
        "too_long": entry.too_long,
    }


def generate_rows(
    engine: Engine,
    encoder: Encoder | MessageEncoder,
    entries: Sequence[PreparedQuestion],
    method: Method,
) -> list[dict[str, Any] | EngineError]:
    """Let the model write its answers and read them; the error of a failed request stays."""
    # The seed belongs to the batch and not to its turn, so shards and restarts draw alike.
    sampling = make_sampling(encoder, method, derive_seed(entries[0].example.id, method.seed))
    answers = engine.generate([entry.requests[0].prefix for entry in entries], sampling)
    return [
        some if isinstance(some, EngineError) else read_answers(encoder, entry, some, method)
        for entry, some in zip(entries, answers, strict=True)
    ]


def make_sampling(encoder: Encoder | MessageEncoder, method: Method, seed: int) -> Sampling:
    """Return how texts are generated for prompts of an encoder."""
    sampling = Sampling(
        method.max_new_tokens, temperature=method.temperature, samples=method.samples, seed=seed
    )
    if not isinstance(encoder, Encoder):
        return sampling
    tokenizer = encoder.tokenizer
    return replace(
        sampling,
        # A chat template may end a turn with another token than EOS; either one ends an answer.
        # The first one also fills up short rows.
        stop_ids=(encoder.end_id, *{tokenizer.eos_token_id} - {encoder.end_id}),
        decode=functools.partial(tokenizer.decode, skip_special_tokens=True),
    )


def score_rows(
    engine: Engine, entries: Sequence[PreparedQuestion], shared: int, method: Method
) -> list[dict[str, Any] | EngineError]:
    """Ask for the options' log-probabilities and read them; a failed question keeps its error."""
    requests = [request for entry in entries for request in entry.requests]
    # One flat list of requests goes to the engine, which packs those of all questions together.
    scores = iter(engine.score(requests, shared))
    rows = []
    for entry in entries:
        answers = [next(scores) for _ in entry.requests]
        # A question of several requests, as one per order, has no row without each of them.
        failed = [answer for answer in answers if isinstance(answer, EngineError)]
        if failed:
            rows.append(failed[0])
            continue
        values = entry.sort(answers)
        if method.scoring == "perplexity":
            rows.append(read_passage(entry, values))
        else:
            rows.append(read_option_scores(entry, values, method))
    return rows


def answer_questions(
    engine: Engine,
    encoder: Encoder,
    examples: Sequence[Example],
    name: str,
    max_length: int | None = None,
    part: tuple[int, int] = (0, 1),
    max_new_tokens: int = ANSWER_TOKENS,
) -> list[dict[str, Any]]:
    """Return prediction rows of questions of one kind, in their order.

    Multiple-choice questions are answered by letters, open ones by greedily generated text.

    Args:
        engine, encoder, examples: what is asked of which model.
        name: written as the model's name.
        max_length: tokens that the model can read.
        part: (i, n) answers only every n-th batch from the i-th, so that n processes answer all.
            A row does not depend on n.
        max_new_tokens: tokens of a generated answer.

    Raises:
        ScoringError: a question is longer than the model can read.
    """
    open_questions = isinstance(examples[0], OpenAnswer)
    scoring = "generate" if open_questions else "letters"
    method = Method(scoring=scoring, max_new_tokens=max_new_tokens)
    try:
        questions, shared = prepare_questions(encoder, examples, method, (), max_length)
    except TooLongError as error:
        # The error's own advice names flags of eval/predict.py.
        problem = str(error).partition(";")[0]
        raise ScoringError(
            f"data.test: {problem}; take such questions out, or lower data.max_new_tokens where"
            " they are open"
        ) from None
    ids = [example.id for example in examples]
    # All examples are split into batches before the parts are taken, so a row has the same
    # neighbours for every n.
    question_batches = split_into_batches(ids, BATCH_SIZE[engine.name])[part[0] :: part[1]]
    rows = {}
    for batch in predict(engine, encoder, questions, shared, method, name, question_batches):
        rows |= {row["id"]: row for row in batch}
    return [rows[id] for id in ids if id in rows]


def read_option_scores(
    entry: PreparedQuestion, values: list[float], method: Method
) -> dict[str, Any]:
    """Make a row of option log-probabilities.

    Over several orders an option's probability is the mean of its probabilities in each. An option
    that is unknown (NaN) in one order stays unknown.
    """
    n = len(entry.example.options)
    letters = LETTERS[:n]
    table = np.array(values).reshape(len(entry.orders), n)  # [orders, position]
    by_option = np.empty_like(table)  # [orders, option]
    for number, order in enumerate(entry.orders):
        # Position p of an order shows option order[p].
        by_option[number, list(order)] = table[number]
    logprobs = by_option[0]  # [options]
    if len(table) > 1:
        # Probabilities are averaged in logarithms, where small ones do not underflow.
        logprobs = np.logaddexp.reduce(by_option, axis=0) - math.log(len(table))
    known = {
        letter: float(value)
        for letter, value in zip(letters, logprobs, strict=True)
        if not np.isnan(value)
    }
    row = describe_example(entry, "choice") | {"text": None}
    row["option_logprobs"] = known
    row["prediction"] = max(known, key=known.get) if known else None
    row["letter_mass"] = None
    # The texts of cloze scoring are no letters and have no mass.
    if known and method.scoring == "letters":
        row["letter_mass"] = float(np.exp(list(known.values())).sum())
    if len(entry.orders) > 1:
        row["permutations"] = describe_orders(entry, table)
    if method.scoring == "cloze":
        normalized = normalize_cloze(entry, logprobs)
        # Of equal values the first one is the largest. An unknown option is never chosen.
        row["predictions"] = {
            name: max(values, key=values.get) if values else None
            for name, values in normalized.items()
        }
        row["prediction"] = row["predictions"][method.normalization]
        row["normalized_logprobs"] = normalized[method.normalization]
    return row


def describe_orders(entry: PreparedQuestion, table: np.ndarray) -> dict[str, list[float | None]]:
    """Return each order, written in letters, with its log-probabilities by position; None is
    unknown.

    table: log-probabilities [orders, position].
    """
    described = {}
    for order, values in zip(entry.orders, table.tolist(), strict=True):
        name = "".join(LETTERS[i] for i in order)
        described[name] = [None if math.isnan(value) else value for value in values]
    return described


def normalize_cloze(entry: PreparedQuestion, logprobs: np.ndarray) -> dict[str, dict[str, float]]:
    """Return the options' log-probabilities by letter under each normalization.

    Options whose log-probability is unknown (NaN) are left out.
    """
    options = entry.example.options
    # A longer text has more factors below one, for which a division makes up.
    lengths = {
        "raw": [1] * len(options),
        "character": [len(option) for option in options],
        "token": entry.sort(
            [[len(option) for option in request.options] for request in entry.requests]
        ),
    }
    return {
        name: {
            letter: float(value)
            for letter, value in zip(LETTERS, logprobs / np.array(some), strict=False)
            if not np.isnan(value)
        }
        for name, some in lengths.items()
    }


def read_answers(
    encoder: Encoder | MessageEncoder,
    entry: PreparedQuestion,
    answers: list[Answer],
    method: Method,
) -> dict[str, Any]:
    """Make a row of generated answers.

    Several samples vote; of equal counts the answer that came first wins.
    """
    texts = [answer.text.strip() for answer in answers]
    finals = [find_final(text) for text in texts]
    # These keys are absent from most rows, as "truncated" is.
    counts = {
        "unfinished": finals.count(None),
        "reached_limit": sum(answer.reached_limit for answer in answers),
    }
    odd: dict[str, Any] = {name: count for name, count in counts.items() if count}
    if entry.example.evidence:
        known, unknown = find_citations(finals[0] or "", len(entry.example.evidence))
        odd |= {"citations": known, "unknown_citations": unknown}
    if isinstance(entry.example, OpenAnswer):
        return describe_example(entry, "open") | {
            # Thoughts are no part of the answer.
            "prediction": None if finals[0] is None else finals[0].strip(),
            "text": texts[0],
            "option_logprobs": None,
            "letter_mass": None,
            **odd,
        }
    parsed = [parse_answer(text, entry.example.options, encoder.completion) for text in texts]
    # A text that names no option has no vote; it is never taken for a letter.
    votes = Counter(LETTERS[index] for index in parsed if index is not None)
    row = describe_example(entry, "choice") | {
        "text": texts[0],
        "option_logprobs": None,
        "letter_mass": None,
        **odd,
    }
    row["prediction"] = votes.most_common(1)[0][0] if votes else None
    if method.samples > 1:
        row |= {"samples": texts, "votes": dict(votes)}
    return row


def read_passage(entry: PreparedQuestion, values: list[float]) -> dict[str, Any]:
    """Make a row of a text's log-probabilities."""
    text = entry.example.text
    return describe_example(entry, "text") | {
        "logprob": sum(values),
        "tokens": sum(len(request.options[0]) for request in entry.requests),
        # These two do not depend on the tokenizer, so models can be compared by them.
        "bytes": len(text.encode()),
        "words": len(text.split()),
    }
