"""Examples become text and completion, in named styles."""

from __future__ import annotations

from dataclasses import dataclass

from medqlora.core.errors import UserError
from medqlora.data.examples import LETTERS, Example, MultipleChoice, OpenAnswer, Passage
from medqlora.data.formats.registry import FORMATS, HarnessPrompt


class PromptError(UserError):
    """An example that has no prompt in the asked style."""


INSTRUCTIONS = {  # chat only: plain text shows by its own form what comes next
    "letter": "Answer with the letter of the correct option.",
    "letter_text": "Answer with the letter and the text of the correct option.",
    "explanation": (
        'Explain briefly, then give the letter of the correct option on a last line: "Answer:'
        ' <letter>".'
    ),
}


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model reads and what it should write.

    `user` is the text of the one user turn (chat) or the whole text up to the answer (plain,
    lm_eval). `completion` is None where the example has no known answer; in the text styles it
    carries its leading space.
    """

    user: str
    completion: str | None
    chat: bool
    lead: str = ""  # text before everything, worked examples included
    shots: tuple[Prompt, ...] = ()  # worked examples, each with its completion


def render(
    example: Example,
    style: str,
    completion: str,
    context: str | None = None,
    explanation: str | None = None,
) -> Prompt:
    """Render an example.

    Args: style: "chat", "plain" or "lm_eval". completion: "letter", "letter_text", "explanation" or
        "text" (see config.Data), or "cloze": the question without its options, answered by the text
        of one. context, explanation: shortened texts to use instead of the example's own
        (truncation).

    Raises:
        PromptError: the style or completion does not exist for such an example.
    """
    context = (
        "\n".join(example.context)
        if context is None and not isinstance(example, Passage)
        else context
    )
    if isinstance(example, Passage):
        return Prompt(user="", completion=example.text, chat=False)
    if style == "lm_eval":
        return render_lm_eval(example, context, completion)
    chat = style == "chat"
    if isinstance(example, OpenAnswer):
        user = f"{context}\n\n{example.question}" if context else example.question
        user = (
            user
            if chat
            else (
                f"{f'Context: {context}' + chr(10) if context else ''}Question:"
                f" {example.question}\nAnswer:"
            )
        )
        return Prompt(user, with_space(example.answer, chat), chat)
    if completion == "text":
        raise PromptError(
            f"{example.dataset}: completion text is for open questions; use letter, letter_text or"
            " explanation"
        )
    if completion == "explanation":
        explanation = example.explanation if explanation is None else explanation
    lines = [f"Context: {context}"] if context else []
    lines += [f"Question: {example.question}"]
    if completion == "cloze":
        answer = None if example.answer is None else example.options[example.answer]
        return Prompt(
            "\n".join(lines if chat else [*lines, "Answer:"]), with_space(answer, chat), chat
        )
    lines += [
        f"{letter}. {option}" for letter, option in zip(LETTERS, example.options, strict=False)
    ]
    if chat:
        lines += ["", INSTRUCTIONS[completion]]
    else:
        lines += ["Explanation:" if completion == "explanation" else "Answer:"]
    return Prompt(
        "\n".join(lines), with_space(render_answer(example, completion, explanation), chat), chat
    )


def with_space(completion: str | None, chat: bool) -> str | None:
    return completion if chat or completion is None else f" {completion}"


def render_answer(
    example: MultipleChoice, completion: str, explanation: str | None = None
) -> str | None:
    """The completion's text, without a leading space; None for an unlabelled example."""
    if example.answer is None:
        return None
    letter = LETTERS[example.answer]
    text = example.options[example.answer]
    if completion == "letter":
        return letter
    if completion == "letter_text":
        return f"{letter}. {text}"
    return f"{explanation}\nAnswer: {letter}" if explanation else f"Answer: {letter}"


def render_lm_eval(
    example: MultipleChoice | OpenAnswer, context: str, completion: str = "letter"
) -> Prompt:
    """lm-evaluation-harness 0.4.13's own prompts for medmcqa, medqa_4options, pubmedqa, mmlu and
    headqa, character by character; its headqa, and what it calls continuation elsewhere, are
    cloze."""
    if isinstance(example, OpenAnswer):
        raise PromptError(
            f"{example.dataset}: style lm_eval knows multiple-choice questions only; use plain or"
            " chat"
        )
    harness = find_harness(example)
    if harness.answer == "cloze" and completion != "cloze":
        raise PromptError(
            f"{example.dataset}: style lm_eval asks without the options; use --scoring cloze, or"
            " style plain or chat"
        )
    if context and not harness.takes_context:
        raise PromptError(
            f"{example.dataset}: style lm_eval has no place for a question's context; use plain or"
            " chat"
        )
    right = None if example.answer is None else example.options[example.answer]
    if completion == "cloze" and harness.answer == "letter":
        asked = f"Question: {example.question}\nAnswer:"
        return Prompt(asked, with_space(right, False), chat=False)
    if harness.answer == "letter" and right is not None:
        right = LETTERS[example.answer]
    asked = harness.ask(example, context)
    return Prompt(asked, with_space(right, False), chat=False, lead=harness.lead(example))


def find_harness(example: MultipleChoice) -> HarnessPrompt:
    """The dataset's own prompt, or the common one where the dataset has no file."""
    known = FORMATS.get(example.dataset)
    return known.harness if known else HarnessPrompt()


def candidates(example: MultipleChoice, style: str, completion: str = "letter") -> list[str]:
    """The completions that stand for each option when the model's choice is read from
    probabilities.
    """
    by_text = style == "lm_eval" and find_harness(example).answer == "text"
    if completion == "cloze" or by_text:
        texts = list(example.options)
    else:
        texts = list(LETTERS[: len(example.options)])
    return texts if style == "chat" else [f" {text}" for text in texts]
