"""The typed settings of eval/ask.py; its flags and keys are made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from medqlora.core.config import Section
from medqlora.core.reading import expand_path
from medqlora.data.formats.options import read_list
from medqlora.engines.registry import EngineSettings, ModelSettings, RunSettings, parse_object
from medqlora.evaluation.method import Method
from medqlora.evaluation.settings import RetrievalSettings

NONE = "none"


class AskedSettings(RetrievalSettings):
    """What is asked. Without a question and a file, questions are read from stdin, one a line."""

    question: str | None = None
    """One question."""
    option: tuple[str, ...] = ()
    """An option of --question, in the order of their letters; give the flag once for each."""
    file: Path | None = None
    """File with questions, with or without options and answers: .txt has one question a line, and
    .jsonl, .json, .csv, .tsv and .parquet have rows as in docs/data_formats.md. Answers are not
    read.
    """
    columns: dict[str, str | list[str]] = Field({})
    """Our field -> the file's column, as a JSON object on the command line."""

    @field_validator("question")
    @classmethod
    def check_question(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("expected the text of a question")
        return value

    @field_validator("option", mode="before")
    @classmethod
    def check_options(cls, value: Any) -> Any:
        # A single text would be taken apart into its letters.
        if isinstance(value, (list, tuple)):
            return read_list(list(value))
        raise ValueError("expected a list of 2 to 10 texts")

    @field_validator("file")
    @classmethod
    def expand_file(cls, value: Path | None) -> Path | None:
        return None if value is None else expand_path(value, "--file")

    @field_validator("columns", mode="before")
    @classmethod
    def parse_columns(cls, value: Any) -> Any:
        return parse_object(value, '{"question": "stem"}')

    @model_validator(mode="after")
    def check_source(self) -> AskedSettings:
        if self.question is not None and self.file is not None:
            raise ValueError("--question and --file name two sources of questions; give one")
        if self.option and self.question is None:
            raise ValueError("--option belongs to --question; in a file options stand in its rows")
        if self.columns and self.file is None:
            raise ValueError("--columns names columns of --file; give both, or leave it out")
        return self


class AnswerSettings(Section):
    """How it is answered."""

    scoring: Literal["letters", "generate"] = "letters"
    """How a question with options is answered: by the probability of each letter, or in text."""
    permutations: int = Field(Method.model_fields["permutations"].default, ge=0)
    """letters: orders of the options to ask in, as in eval/predict.py."""
    samples: int = Field(5, ge=0, le=1_000)
    """Further answers that are drawn to each question that is answered in text; the confidence is
    their consistency. 0 draws none, and such answers have no confidence.
    """
    temperature: float = Field(0.7, gt=0)
    """Temperature of the samples; the answer itself is greedy."""
    max_new_tokens: int = Field(Method.model_fields["max_new_tokens"].default, ge=1)
    """Tokens per answer in text."""
    seed: int = Field(Method.model_fields["seed"].default, ge=0)
    """Seed of the samples."""
    threshold: float = Field(0.0, ge=0, le=1.01)
    """Answers of a lower confidence are withheld: the model abstains. 0 withholds none, and 1.01
    all.
    """
    disclaimer: str = (
        "A language model wrote this. It can be wrong and is no medical advice: ask a doctor or a"
        " pharmacist before you act on it."
    )
    """Text behind every answer; none prints no text."""
    no_reminder: bool = False
    """Print no safety reminder before answers to questions about emergencies, self-harm and
    dangerous doses.
    """
    output: Path | None = None
    """File to write the answers to as well (.jsonl); it must not exist."""

    @field_validator("disclaimer")
    @classmethod
    def check_disclaimer(cls, value: str) -> str:
        if not value.strip():
            raise ValueError(f"expected a text, or {NONE} for no disclaimer")
        return value

    @field_validator("output")
    @classmethod
    def check_name(cls, value: Path | None) -> Path | None:
        if value is not None and value.suffix != ".jsonl":
            raise ValueError("expected a name that ends in .jsonl")
        return value


class AskSettings(RunSettings, AskedSettings, AnswerSettings):
    """A model, what it is asked, and what an answer is."""

    @model_validator(mode="after")
    def check_confidence(self) -> AskSettings:
        by_letters = bool(self.option) and self.scoring == "letters"
        if by_letters and "samples" in self.model_fields_set:
            raise ValueError(
                "--samples is for answers in text, and letters have a confidence without it; leave"
                " it out, or take --scoring generate"
            )
        if self.threshold > 0 and self.samples == 0 and not by_letters:
            raise ValueError(
                "--threshold needs a confidence, which --samples 0 does not give to answers in"
                " text; draw at least one sample, or leave --threshold out"
            )
        if self.scoring == "generate" and "permutations" in self.model_fields_set:
            raise ValueError("--permutations is for --scoring letters; leave it out")
        return self

    @property
    def closing(self) -> str | None:
        """The text behind every answer, or None."""
        return None if self.disclaimer == NONE else self.disclaimer


# These groups are the headings of --help.
GROUPS = {
    "model": ModelSettings,
    "questions": AskedSettings,
    "passages": RetrievalSettings,
    "answers": AnswerSettings,
    "engine": EngineSettings,
}
