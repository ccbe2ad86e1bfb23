"""Render examples as prompt and completion in one of the named styles."""

from __future__ import annotations

from dataclasses import dataclass

from medqlora.core.errors import UserError
from medqlora.data.examples import LETTERS, Example, MultipleChoice, OpenAnswer, Passage
from medqlora.data.formats.registry import FORMATS, HarnessPrompt, letter_options
from medqlora.prompts.citations import render_evidence


class PromptError(UserError):
    """An example that has no prompt in the requested style."""


# Only the chat style needs instructions: the other styles end in "Answer:" or "Explanation:".
# A chat prompt with options ends in one of these texts, and changing it changes the fingerprint of
# every chat adapter that was trained with it.
INSTRUCTIONS = {
    "letter": "Answer with the letter of the correct option.",
    "letter_text": "Answer with the letter and the text of the correct option.",
    "explanation": (
        'Explain briefly, then give the letter of the correct option on a last line: "Answer:'
        ' <letter>".'
    ),
}


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model reads and what it should write.

    Args:
        user: The user's turn in the chat style; in the other styles the text up to the answer.
        completion: The text that the model should write, or None where the answer is not known. In
            the styles without chat it begins with a space.
        chat: Whether the style is chat.
        lead: The text before everything else, worked examples included.
        shots: The worked examples, each with its completion.
    """

    user: str
    completion: str | None
    chat: bool
    lead: str = ""
    shots: tuple[Prompt, ...] = ()


def render(
    example: Example,
    style: str,
    completion: str,
    context: str | None = None,
    explanation: str | None = None,
) -> Prompt:
    """Render an example as a prompt with its completion.

    Args:
        example: The example.
        style: "chat", "plain" or "lm_eval".
        completion: "letter", "letter_text", "explanation" or "text" (see config.Data), or "cloze",
            which asks without the options and is answered by the text of one.
        context: A text to use instead of the example's own context, which was too long.
        explanation: A text to use instead of the example's own explanation, which was too long.

    Raises:
        PromptError: The style or the completion does not exist for such an example.
    """
    if isinstance(example, Passage):
        return Prompt(user="", completion=example.text, chat=False)
    # An empty text is a context that was cut away, and None stands for the example's own.
    if context is None:
        context = "\n".join(example.context)
    if style == "lm_eval":
        return render_lm_eval(example, context, completion)
    chat = style == "chat"
    if isinstance(example, OpenAnswer):
        return render_open_question(example, context, chat)
    if completion == "text":
        raise PromptError(
            f"{example.dataset}: completion text is for open questions; use letter, letter_text or"
            " explanation"
        )
    if completion == "explanation":
        explanation = example.explanation if explanation is None else explanation
    lines = render_evidence(example.evidence)
    lines += [f"Context: {context}"] if context else []
    lines.append(f"Question: {example.question}")
    if completion == "cloze":
        answer = None if example.answer is None else example.options[example.answer]
        if not chat:
            lines.append("Answer:")
        return Prompt("\n".join(lines), with_space(answer, chat), chat)
    lines += letter_options(example)
    if chat:
        lines += ["", INSTRUCTIONS[completion]]
    else:
        lines.append("Explanation:" if completion == "explanation" else "Answer:")
    answer = render_answer(example, completion, explanation)
    return Prompt("\n".join(lines), with_space(answer, chat), chat)


def render_open_question(example: OpenAnswer, context: str, chat: bool) -> Prompt:
    """Render an open question in the chat style or the plain style."""
    evidence = render_evidence(example.evidence)
    if chat:
        user = f"{context}\n\n{example.question}" if context else example.question
        user = "\n".join([*evidence, user])
    else:
        lines = [*evidence, f"Context: {context}"] if context else evidence
        lines += [f"Question: {example.question}", "Answer:"]
        user = "\n".join(lines)
    return Prompt(user, with_space(example.answer, chat), chat)


def with_space(completion: str | None, chat: bool) -> str | None:
    """Return a completion with the space that separates it from the text before it.

    A chat template separates turns by itself.
    """
    # Most tokenizers join a blank to the word behind it: " A" and "A" are different tokens. The
    # blank therefore belongs to the completion and never to the prompt.
    return completion if chat or completion is None else f" {completion}"


def render_answer(
    example: MultipleChoice, completion: str, explanation: str | None = None
) -> str | None:
    """Return the completion without a leading space, or None for an unlabelled example.

    Args:
        example: The example.
        completion: "letter", "letter_text" or "explanation".
        explanation: The explanation that stands before the letter, if there is one.
    """
    # `answers.parse_answer` must find the letter again in each of the forms below.
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
    """Render the prompt of lm-evaluation-harness 0.4.13, character by character.

    Its tasks are medmcqa, medqa_4options, pubmedqa, mmlu and headqa. The task headqa and the
    variants that it calls continuation ask without the options, which is called cloze here.

    Raises:
        PromptError: The harness has no such prompt.
    """
    if isinstance(example, OpenAnswer):
        raise PromptError(
            f"{example.dataset}: style lm_eval knows multiple-choice questions only; use plain or"
            " chat"
        )
    if example.evidence:
        raise PromptError(
            f"{example.dataset}: style lm_eval has no place for passages; use plain or chat, or ask"
            " without retrieval"
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
        user = f"Question: {example.question}\nAnswer:"
        return Prompt(user, with_space(right, False), chat=False)
    if harness.answer == "letter" and right is not None:
        right = LETTERS[example.answer]
    user = harness.ask(example, context)
    return Prompt(user, with_space(right, False), chat=False, lead=harness.lead(example))


def find_harness(example: MultipleChoice) -> HarnessPrompt:
    """Return the dataset's own prompt, or the common one for a dataset without a format."""
    registered = FORMATS.get(example.dataset)
    return registered.harness if registered else HarnessPrompt()


def candidates(example: MultipleChoice, style: str, completion: str = "letter") -> list[str]:
    """Return the completion that stands for each option when a model's choice is scored.

    The model chooses the option whose completion it finds most likely.
    """
    by_text = style == "lm_eval" and find_harness(example).answer == "text"
    if completion == "cloze" or by_text:
        texts = list(example.options)
    else:
        texts = list(LETTERS[: len(example.options)])
    # The blank must be as in training (with_space), or other tokens would be scored.
    return texts if style == "chat" else [f" {text}" for text in texts]
