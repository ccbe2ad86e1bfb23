"""How a question is asked and its answer read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from medqlora.core.errors import UserError
from medqlora.data.examples import Example, MultipleChoice, OpenAnswer, Passage
from medqlora.prompts.styles import find_harness

MAX_PERMUTATIONS = 120


class ScoringError(UserError):
    """A way of scoring that these examples do not allow."""


@dataclass(frozen=True)
class Method:
    """How examples are asked and answers are read; one default each.

    scoring: "letters" (probability of each letter), "cloze" (of each option's text), "generate"
    (text, then parsed) or "perplexity"; permutations: orders of the options to ask in (1: as they
    stand; the number of options: cyclic; 0: all); normalization: what cloze divides an option's
    log-probability by: "raw" (nothing), "character" or "token"; temperature and samples: of
    generate, several samples vote; fewshot: "fixed" (the same for all) or "nearest" (BM25).
    """

    scoring: str = "letters"
    permutations: int = 1
    normalization: str = "character"
    num_fewshot: int = 0
    fewshot: str = "fixed"
    max_new_tokens: int = 256
    temperature: float = 0.0
    samples: int = 1
    seed: int = 0


def check_method(examples: Sequence[Example], method: Method, style: str) -> None:
    kinds = {type(example) for example in examples}
    wanted = {
        "letters": {MultipleChoice},
        "cloze": {MultipleChoice},
        "perplexity": {Passage},
        "generate": {MultipleChoice, OpenAnswer},
    }
    if not kinds <= wanted[method.scoring] or len(kinds) != 1:
        names = {
            MultipleChoice: "multiple-choice questions",
            OpenAnswer: "open questions",
            Passage: "texts",
        }
        raise ScoringError(
            f"--scoring {method.scoring} is for"
            f" {' or '.join(names[kind] for kind in wanted[method.scoring])}; this data holds"
            f" {' and '.join(sorted(names[kind] for kind in kinds))}: use"
            f" {' or '.join(name for name, some in wanted.items() if kinds <= some)}"
        )
    if method.permutations != 1 and (
        method.scoring != "letters"
        or (style == "lm_eval" and find_harness(examples[0]).answer == "text")
    ):
        raise ScoringError(
            "--permutations is for --scoring letters of questions that show their options; leave"
            " it out"
        )
    if method.scoring != "generate" and (method.samples > 1 or method.temperature > 0):
        raise ScoringError(
            f"--samples and --temperature are for --scoring generate, not {method.scoring}; leave"
            " them out"
        )
    if method.samples > 1 and kinds == {OpenAnswer}:
        raise ScoringError("--samples vote on options; open questions have none, leave it out")
    if method.scoring == "perplexity" and method.num_fewshot:
        raise ScoringError("--num_fewshot is for questions, this data holds texts; leave it out")
    if method.samples > 1 and method.temperature <= 0:
        raise ScoringError(
            f"--samples {method.samples} at temperature 0 would be {method.samples} equal answers;"
            " set --temperature, as 0.7"
        )
