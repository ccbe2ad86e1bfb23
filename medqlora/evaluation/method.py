"""How a question is asked and how its answer is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from medqlora.core.config import ANSWER_TOKENS, Section
from medqlora.core.errors import UserError
from medqlora.data.examples import Example, MultipleChoice, OpenAnswer, Passage
from medqlora.prompts.styles import find_harness

MAX_PERMUTATIONS = 120  # Five options have 5! = 120 orders.


class ScoringError(UserError):
    """A scoring method that these examples do not allow."""


class Method(Section):
    """How examples are asked and answers are read."""

    scoring: Literal["letters", "cloze", "generate", "perplexity"] = "letters"
    """How the answer is read: by the probability of each letter, by the probability of each
    option's text (cloze), from generated text, or, for texts, by their perplexity.
    """
    normalization: Literal["raw", "character", "token"] = "character"
    """cloze: what an option's log-probability is divided by: nothing, its characters or its
    tokens.
    """
    permutations: int = Field(1, ge=0)
    """Orders of the options to ask in: 1 as they stand, up to the number of options cyclic ones,
    0 all of them.
    """
    num_fewshot: int = Field(0, ge=0)
    """Worked examples before each question."""
    fewshot: Literal["fixed", "nearest"] = "fixed"
    """fixed: the same worked examples for all questions; nearest: the most similar ones by BM25."""
    max_new_tokens: int = Field(ANSWER_TOKENS, ge=1)
    """generate: tokens per answer."""
    temperature: float = Field(0.0, ge=0)
    """generate: 0 is greedy."""
    samples: int = Field(1, ge=1)
    """generate: answers per question; several vote."""
    seed: int = Field(0, ge=0)
    """Seed of the samples and of the choice of worked examples."""


ALLOWED_KINDS = {
    "letters": (MultipleChoice,),
    "cloze": (MultipleChoice,),
    "perplexity": (Passage,),
    "generate": (MultipleChoice, OpenAnswer),
}
KIND_NAMES = {
    MultipleChoice: "multiple-choice questions",
    OpenAnswer: "open questions",
    Passage: "texts",
}


def check_method(examples: Sequence[Example], method: Method, style: str) -> None:
    """Refuse a method that does not fit the examples or the prompt style.

    Raises:
        ScoringError: one line with what to do.
    """
    # This check comes first, because the others look at the first example only.
    check_kinds(examples, method)
    # A prompt that is completed by an option's text does not list the options by letters, so their
    # order changes nothing in it.
    shows_options = style != "lm_eval" or find_harness(examples[0]).answer != "text"
    if method.permutations != 1 and not (method.scoring == "letters" and shows_options):
        raise ScoringError(
            "--permutations is for --scoring letters of questions that show their options; leave"
            " it out"
        )
    if method.scoring != "generate" and (method.samples > 1 or method.temperature > 0):
        raise ScoringError(
            f"--samples and --temperature are for --scoring generate, not {method.scoring}; leave"
            " them out"
        )
    if method.samples > 1 and isinstance(examples[0], OpenAnswer):
        raise ScoringError("--samples vote on options; open questions have none, leave it out")
    if method.scoring == "perplexity" and method.num_fewshot:
        raise ScoringError("--num_fewshot is for questions, this data holds texts; leave it out")
    if method.samples > 1 and method.temperature <= 0:
        raise ScoringError(
            f"--samples {method.samples} at temperature 0 would be {method.samples} equal answers;"
            " set --temperature, as 0.7"
        )


def check_kinds(examples: Sequence[Example], method: Method) -> None:
    """Refuse examples of several kinds, and kinds that the scoring method cannot score."""
    kinds = {type(example) for example in examples}
    allowed = ALLOWED_KINDS[method.scoring]
    if len(kinds) == 1 and kinds <= set(allowed):
        return
    held = " and ".join(sorted(KIND_NAMES[kind] for kind in kinds))
    fitting = [name for name, some in ALLOWED_KINDS.items() if kinds <= set(some)]
    raise ScoringError(
        f"--scoring {method.scoring} is for {' or '.join(KIND_NAMES[kind] for kind in allowed)};"
        f" this data holds {held}: use {' or '.join(fitting) or 'one kind at a time'}"
    )
