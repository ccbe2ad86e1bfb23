"""What the scores must be that a run folder's metrics.json and environment.json keep.

Values that a report shows are checked. Others, such as those of a later version, are passed over.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from medqlora.evaluation.row_checks import LARGEST, quote
from medqlora.reporting.runs import ReportError

Count = Annotated[int, Field(ge=0, le=LARGEST)]
Share = Annotated[float, Field(ge=0, le=1)]
Loss = Annotated[float, Field(ge=0, le=LARGEST)]
Change = Annotated[float, Field(ge=-1, le=1)]


class Kept(BaseModel):
    """A part of a file; numbers that are texts, booleans, infinite or no number are refused."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, populate_by_name=True)


class Group(Kept):
    """The scores of some questions."""

    n: Annotated[int, Field(ge=1, le=LARGEST)]
    accuracy: Share
    accuracy_ci95: Annotated[list[Share], Field(min_length=2, max_length=2)]


class Bin(Kept):
    """A bin of the reliability curve."""

    low: Share = Field(alias="from")
    to: Share
    n: Annotated[int, Field(ge=1, le=LARGEST)]
    confidence: Share
    accuracy: Share


class Selective(Kept):
    """Accuracy where only the surest answers are kept."""

    n: Annotated[int, Field(ge=1, le=LARGEST)] | None = None
    area_under_risk_coverage: Share
    accuracy_at_coverage: Annotated[
        dict[Annotated[str, Field(pattern=r"^\d{1,3}%$")], Share], Field(min_length=1)
    ]


class Letter(Kept):
    """How often a letter is right and chosen."""

    gold: Share
    predicted: Share
    mean_probability: Share | None


class PositionBias(Kept):
    """What the letters of options do to the answers."""

    letters: dict[str, Letter]
    flip_rate: Share = 0
    per_position: dict[str, Group] | None = None


class Scores(Group):
    """Scores of multiple-choice questions."""

    unparsed: Count
    truncated: Count
    letter_mass: Annotated[float, Field(ge=0, le=1.01)] | None = None
    ece: Share | None = None
    brier: Annotated[float, Field(ge=0, le=2)] | None = None
    near_ties: Count | None = None
    reliability: list[Bin] | None = None
    selective: Selective | None = None
    position_bias: PositionBias | None = None
    per_subject: dict[str, Group] | None = None
    per_dataset: dict[str, Group] | None = None
    per_choice_type: dict[str, Group] | None = None


class Comparison(Kept):
    """The comparison of base and tuned."""

    n: Annotated[int, Field(ge=1, le=LARGEST)]
    accuracy_a: Share
    accuracy_b: Share
    difference: Change
    difference_ci95: Annotated[list[Change], Field(min_length=2, max_length=2)]
    mcnemar_p: Share


class Metrics(Kept):
    """What metrics.json holds beside the scores."""

    best_step: Count | None = None
    memory_bytes: dict[str, Count] | None = None
    base: dict[str, Any] | None = None
    comparison: dict[str, Any] | None = None


Bounds = Annotated[list[Share], Field(min_length=2, max_length=2)]


class Measured(Kept):
    """What a model card says of one model; which scores there are depends on the questions."""

    n: Count | None = None
    accuracy: Share | None = None
    accuracy_ci95: Bounds | None = None
    exact_match: Share | None = None
    exact_match_ci95: Bounds | None = None
    f1: Share | None = None
    f1_ci95: Bounds | None = None
    rouge_l: Share | None = None
    rouge_l_ci95: Bounds | None = None
    unparsed: Count | None = None
    letter_mass: Annotated[float, Field(ge=0, le=1.01)] | None = None
    ece: Share | None = None

    @model_validator(mode="after")
    def check_intervals(self) -> Measured:
        for bounds in type(self).model_fields:
            name = bounds.removesuffix("_ci95")
            lacks = None in (self.n, getattr(self, bounds))
            if name != bounds and getattr(self, name) is not None and lacks:
                raise ValueError(f"{name} needs n and {bounds}")
        return self


class Results(Measured):
    """What a model card says of metrics.json."""

    steps: Count | None = None
    best_step: Count | None = None
    eval_loss: Loss | None = None
    perplexity: Annotated[float, Field(ge=0)] | None = None
    base: Measured | None = None
    comparison: dict[str, Any] | None = None


class Gpu(Kept):
    """A GPU in environment.json."""

    name: str | None = None


class Hardware(Kept):
    """The machine in environment.json."""

    gpus: list[Gpu] | None = None
    cpu: str | None = None
    cores: Count | None = None


class Entry(Kept):
    """A data entry's part of the training rows, in environment.json."""

    entry: str
    rows: Count
    row_share: float


class PromptExample(Kept):
    """An example of a prompt in environment.json."""

    prompt: str
    completion: str


class Environment(Kept):
    """What a report shows first of environment.json; the rest is shown as it is."""

    git_commit: str | None = None
    hardware: Hardware | None = None
    base: dict[str, Any] | None = None
    mixture: list[Entry] | None = None
    data: list[str] | None = None
    prompt_examples: dict[str, PromptExample] | None = None


def check_kept(path: Path, tree: dict[str, Any], schema: type[Kept], where: str = "") -> dict:
    """Return what a schema names of an object in a file.

    Args:
        path: the file.
        tree: the object.
        schema: what it must be.
        where: where it stands in the file, for messages.

    Raises:
        ReportError: a value is of another kind; the message names the first one.
    """
    try:
        checked = schema.model_validate(tree)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in (where, *problem["loc"]) if part != "")
        got = "" if problem["type"] == "missing" else f", got {quote(problem['input'])}"
        raise ReportError(
            f"{path}: {quote(place)[1:-1]}: {problem['msg'].lower()}{got}; correct it or take the"
            " file out of the folder"
        ) from None
    return checked.model_dump(by_alias=True, exclude_unset=True)
