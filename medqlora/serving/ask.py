"""New questions are answered, each with a confidence, or withheld where it is too low."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from medqlora.core.errors import UserError
from medqlora.data.examples import LETTERS, MultipleChoice, OpenAnswer
from medqlora.engines.interface import BATCH_SIZE, ChatRequest, Engine, EngineError, Request
from medqlora.engines.registry import Asking
from medqlora.evaluation.answering import make_sampling, predict, read_answers
from medqlora.evaluation.fitting import TooLongError, fit_evidence, fit_request
from medqlora.evaluation.journal import split_into_batches
from medqlora.evaluation.method import Method
from medqlora.evaluation.open_answers import token_f1
from medqlora.evaluation.predictions import find_confidence, find_deciding
from medqlora.evaluation.questions import (
    PreparedQuestion,
    derive_seed,
    describe_passages,
    describe_prompt,
    prepare_questions,
)
from medqlora.prompts.answers import find_final
from medqlora.prompts.chat_template import Encoder, MessageEncoder, make_messages
from medqlora.prompts.encoding import encode_prefixes
from medqlora.prompts.styles import Prompt, render
from medqlora.serving.safety import find_reminders
from medqlora.serving.settings import AskSettings

Row = dict[str, Any]
MEASURES = {
    "letters": "its probability among the options",
    "votes": "its share of the samples' votes",
    "consistency": "its mean word overlap (F1) with the samples",
}


class AskError(UserError):
    """A question that the model cannot read."""


def answer_choices(
    engine: Engine, asking: Asking, questions: Sequence[MultipleChoice], settings: AskSettings
) -> list[Row]:
    """Answer questions with options, as eval/predict.py answers them.

    Args:
        engine: runs the model.
        asking: how the model is asked.
        questions: the questions.
        settings: how they are answered.

    Returns:
        A row for each question, in their order; see `finish_row`.

    Raises:
        AskError: a question is longer than the model can read.
        EngineError: a question was not answered.
    """
    method = choose_method(settings)
    try:
        prepared, shared = prepare_questions(
            asking.encoder, questions, method, (), asking.max_length
        )
    except TooLongError as error:
        raise explain_length(error) from None
    served = {}
    if settings.engine == "openai":
        requests = [request for entry in prepared for request in entry.requests]
        served = engine.settle(requests, scored=method.scoring == "letters")
    # Batches are those of eval/predict.py, so that rounding is the same too.
    batches = split_into_batches([question.id for question in questions], BATCH_SIZE[engine.name])
    answered = predict(
        engine, asking.encoder, prepared, shared, method, settings.name, batches, served=served
    )
    rows: dict[int, Row] = {}
    for batch, some in zip(batches, answered, strict=True):
        rows |= dict(zip(batch, some, strict=True))
    return [finish_choice(rows[number], settings) for number in range(len(questions))]


def choose_method(settings: AskSettings) -> Method:
    """Return how questions with options are asked."""
    common = {"max_new_tokens": settings.max_new_tokens, "seed": settings.seed}
    if settings.scoring == "letters":
        return Method(permutations=settings.permutations, **common)
    if settings.samples < 2:
        return Method(scoring="generate", **common)
    return Method(
        scoring="generate",
        samples=settings.samples,
        temperature=settings.temperature,
        **common,
    )


def finish_choice(row: Row, settings: AskSettings) -> Row:
    """Return the row of a question with options; see `finish_row`."""
    letter = row["prediction"]
    answer = None
    if letter is not None:
        answer = f"{letter}. {row['options'][LETTERS.index(letter)]}"
    confidence = find_confidence(row, find_deciding(row))
    if math.isnan(confidence):
        return finish_row(row, settings, answer, None, None)
    measure = "letters" if row["option_logprobs"] else "votes"
    return finish_row(row, settings, answer, confidence, measure)


class Conversation:
    """Open questions to one model, one after the other, with what was said before.

    Attributes:
        turns: the earlier questions, each with its answer, as prompts.
        forgotten: how many of them no longer fitted the model at the last question.
    """

    def __init__(self, engine: Engine, asking: Asking, settings: AskSettings):
        self.engine = engine
        self.asking = asking
        self.settings = settings
        self.turns: list[Prompt] = []
        self.forgotten = 0
        self.method = Method(scoring="generate", max_new_tokens=settings.max_new_tokens)
        self.served: Row | None = None

    def answer(self, question: OpenAnswer, show: Callable[[str], None]) -> Row:
        """Answer an open question.

        The confidence is the mean of SQuAD's F1 between the greedy answer and each of the samples.
        That consistent samples are a sign of trust: Wang et al., Self-Consistency, ICLR 2023. One
        main answer is compared with samples in Manakul et al., SelfCheckGPT, EMNLP 2023.

        Args:
            question: the question.
            show: takes the pieces of the answer's text as they come.

        Returns:
            Its row, see `finish_row`.

        Raises:
            AskError: the question alone is longer than the model can read.
            EngineError: the question was not answered.
        """
        encoder, settings = self.asking.encoder, self.settings
        prompt, entry = self.prepare(question)
        (request,) = entry.requests
        if self.served is None:
            remote = settings.engine == "openai"
            self.served = self.engine.settle([request], scored=False) if remote else {}
        sampling = make_sampling(encoder, self.method, derive_seed(question.id, settings.seed))
        streamed = self.engine.stream(request.prefix, sampling, show)
        samples: list[str] = []
        if settings.samples:
            drawing = replace(sampling, samples=settings.samples, temperature=settings.temperature)
            (drawn,) = self.engine.generate([request.prefix], drawing)
            if isinstance(drawn, EngineError):
                raise drawn
            samples = [sample.text.strip() for sample in drawn]
        row = read_answers(encoder, entry, [streamed], self.method) | {
            "prompt_sha256": describe_prompt(encoder, self.method, (), describe_passages([entry])),
            "engine": self.engine.name,
            "weights": self.engine.weights,
            "model": settings.name,
            "earlier_turns": len(prompt.shots),
            **self.served,
        }
        answer = row["prediction"]
        if not samples:
            return finish_row(row, settings, answer, None, None)
        confidence = measure_consistency(answer, samples)
        return finish_row(row | {"samples": samples}, settings, answer, confidence, "consistency")

    def prepare(self, question: OpenAnswer) -> tuple[Prompt, PreparedQuestion]:
        """Return the prompt of a question behind the earlier turns, and its request.

        The oldest turns are left out where the model cannot read them all.
        """
        encoder = self.asking.encoder
        self.forgotten = 0
        max_length = self.asking.max_length
        if isinstance(encoder, Encoder) and max_length is not None:
            question = fit_evidence(encoder, question, self.method, max_length)
        prompt = render(question, encoder.style, encoder.completion)
        while True:
            prompt = replace(prompt, shots=tuple(self.turns))
            if isinstance(encoder, MessageEncoder):
                request = ChatRequest(make_messages(prompt), [])
                return prompt, PreparedQuestion(question, [()], [request], False)
            (prefix,) = encode_prefixes(encoder, [prompt])
            try:
                parts, cut = fit_request(
                    encoder, question, prompt, prefix, [[]], self.method, self.asking.max_length
                )
            except TooLongError as error:
                if not self.turns:
                    raise explain_length(error) from None
                del self.turns[0]
                self.forgotten += 1
                continue
            ((prefix, _),) = parts
            return prompt, PreparedQuestion(question, [()], [Request(prefix, [])], cut)

    def remember(self, question: OpenAnswer, row: Row) -> None:
        """Keep a question and its answer for the next ones; a withheld answer is not kept."""
        if row["abstained"] or not row["answer"]:
            return
        encoder = self.asking.encoder
        prompt = render(question, encoder.style, encoder.completion)
        self.turns.append(replace(prompt, completion=row["answer"]))


def keeps_turns(encoder: Encoder | MessageEncoder) -> bool:
    """Whether earlier turns can stand before a question in this model's prompts."""
    if isinstance(encoder, MessageEncoder):
        return True
    return encoder.style == "chat" and encoder.frame.between is not None


def measure_consistency(answer: str | None, samples: Sequence[str]) -> float:
    """Return the mean F1 of an answer's words with those of samples, from 0 to 1.

    An answer without an end of its thoughts, and such a sample, is consistent with nothing.
    """
    finals = [find_final(sample) or "" for sample in samples]
    return sum(token_f1(answer or "", final) for final in finals) / len(finals)


def finish_row(
    row: Row,
    settings: AskSettings,
    answer: str | None,
    confidence: float | None,
    measure: str | None,
) -> Row:
    """Return the row of an answer.

    Args:
        row: what eval/predict.py writes for it.
        settings: threshold, disclaimer and reminder.
        answer: what the model answers; None where it gave no answer.
        confidence: from 0 to 1; None where it is unknown, which is below every threshold but 0.
        measure: what the confidence is, a key of MEASURES.
    """
    abstained = (confidence or 0.0) < settings.threshold
    kept = {name: value for name, value in row.items() if name not in ("key", "gold")}
    kept |= {
        "answer": answer,
        "confidence": confidence,
        "confidence_is": measure,
        "threshold": settings.threshold,
        "abstained": abstained,
        "reminders": list_reminders(row["question"], settings),
        "disclaimer": settings.closing,
    }
    if abstained:
        kept |= {"prediction": None, "text": None, "withheld": answer}
        known = "unknown" if confidence is None else f"{confidence:.3f}"
        kept["answer"] = (
            f"No answer: the model's confidence is {known}, below the threshold of"
            f" {settings.threshold:g}."
        )
    return kept


def list_reminders(question: str, settings: AskSettings) -> list[str]:
    """Return the safety reminders that belong to a question."""
    return [] if settings.no_reminder else find_reminders(question)


def describe_answer(row: Row) -> str:
    """Return an answer in words."""
    if row["answer"] is not None:
        return row["answer"] or "(the model's answer is empty)"
    if row.get("unfinished"):
        return "No answer: the model's thoughts have no end; raise --max_new_tokens."
    return "No answer: the model names none of the options."


def describe_confidence(row: Row) -> list[str]:
    """Return lines that say how sure an answer is."""
    lines = []
    if row["confidence"] is not None and not row["abstained"]:
        mass = row.get("letter_mass")
        beside = "" if mass is None else f"; letter mass {mass:.3f}"
        lines.append(
            f"confidence {row['confidence']:.3f} ({MEASURES[row['confidence_is']]}{beside})"
        )
    if row["option_logprobs"] and not row["abstained"]:
        # The probabilities are those before they are divided by the letter mass.
        shares = [f"{name} {math.exp(value):.3f}" for name, value in row["option_logprobs"].items()]
        lines.append(f"probabilities of the letters: {'  '.join(shares)}")
    if row.get("truncated"):
        lines.append("the context was cut to fit the model")
    return lines


def describe_sources(row: Row) -> list[str]:
    """Return lines that say where the passages of a prompt come from, by their numbers."""
    lines = [
        f"[{number}] {make_printable(passage['id'])}"
        for number, passage in enumerate(row.get("passages", []), 1)
    ]
    if row.get("unknown_citations"):
        numbers = ", ".join(map(str, row["unknown_citations"]))
        lines.append(f"the answer cites passages that it was not shown: {numbers}")
    return lines


def explain_length(error: TooLongError) -> AskError:
    """Return the error of a question that is too long, with what eval/ask.py can do about it."""
    problem = str(error).partition(";")[0]
    return AskError(f"{problem}; shorten the question, or lower --max_new_tokens")


def make_printable(text: str) -> str:
    """Return a text without control characters, by which an answer could command a terminal."""
    return "".join(
        "\ufffd"
        if unicodedata.category(character) == "Cc" and character not in "\n\t"
        else character
        for character in text
    )
