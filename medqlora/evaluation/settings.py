"""The typed settings of an evaluation; the flags and keys of eval/predict.py are made of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from medqlora.core.config import Data, DataEntry, Section
from medqlora.core.errors import ConfigError
from medqlora.core.json_reading import parse_json
from medqlora.core.reading import expand_path
from medqlora.data.cleaning import clean, drop_repeated_ids
from medqlora.data.examples import DataError, Example
from medqlora.data.formats.registry import FILE, FORMATS, find_format
from medqlora.data.reading import Reading, read_entry, read_examples
from medqlora.data.retrieval import Library, add_evidence, open_library
from medqlora.data.selection import PARTS
from medqlora.engines.registry import EngineSettings, ModelSettings, RunSettings, parse_object
from medqlora.evaluation.method import Method


class RetrievalSettings(Section):
    """Which texts are shown with a question."""

    retrieval: str | None = None
    """File or folder of plain texts. Each question is shown the passages that are most similar to
    it; none asks a model without passages that was trained with them.
    """
    num_passages: int | None = Field(None, ge=1)
    """Passages per question, at most; by default as in the training, or 3."""


class QuestionSettings(RetrievalSettings):
    """Which questions are asked."""

    format: str
    """Dataset, or layout of the records, as in a training configuration's data entries."""
    path: str | None = None
    """File, folder or hub id; by default the dataset's hub home."""
    split: str | None = None
    """Split of a folder or hub id, by default the one that scores are published on; a file is taken
    as it is.
    """
    subset: str | None = None
    """Configuration name of a hub dataset, or the name of a set in a .json file that has several.
    """
    answer_is: Literal["letter", "text", "index0", "index1"] | None = None
    """How the file writes its answers, where all its rows can be read in two ways: as letters or
    texts of options, or as indexes from 0 or from 1.
    """
    columns: dict[str, str | list[str]] = Field({})
    """mcq, qa, text: our field -> the file's column, as a JSON object on the command line."""
    test_pmids: str | None = None
    """pubmedqa: file with the official test PMIDs."""
    split_by: Literal["hash"] | None = None
    """hash divides a file by a hash of each question, as in a training configuration's data
    entries; --split names the part: train, validation or test.
    """
    subjects: Annotated[list[str], Field(min_length=1)] | None = None
    """Ask only questions of these subjects: one name, or a JSON list of several."""
    keep: list[str] = Field([])
    """Columns of the file that the rows keep, as COLUMN[,COLUMN]; eval/score.py --by groups answers
    by them.
    """
    limit: int | None = Field(None, ge=1)
    """Ask only the first questions."""
    drop_invalid: bool = False
    """Leave invalid rows out instead of stopping at the first."""
    drop_too_long: bool = False
    """Leave questions out whose prompt is longer than the model can read, instead of stopping at
    the first; they are counted and named.
    """
    fewshot_path: str | None = None
    """File, folder or hub id of the worked examples; by default --path."""
    fewshot_split: str | None = None
    """Split of the worked examples; by default train, and dev for mmlu."""

    @field_validator("format")
    @classmethod
    def check_format(cls, value: str) -> str:
        try:
            find_format(value)
        except DataError as error:
            # pydantic catches a ValueError and reports it with the key.
            raise ValueError(str(error)) from None
        return value

    @field_validator("columns", mode="before")
    @classmethod
    def parse_columns(cls, value: Any) -> Any:
        return parse_object(value, '{"question": "stem"}')

    @field_validator("subjects", mode="before")
    @classmethod
    def parse_subjects(cls, value: Any) -> Any:
        # A subject's name may hold commas, so only a JSON list stands for several names.
        if isinstance(value, str):
            return parse_json(value) if value.lstrip().startswith("[") else [value]
        return value

    @field_validator("keep", mode="before")
    @classmethod
    def split_names(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        names = [name.strip() for name in value.split(",")]
        if not all(names):
            raise ValueError("expected names of columns with commas between them, as level,source")
        return names


class MethodSettings(Method):
    """How questions are asked."""

    scoring: Literal["letters", "cloze", "generate", "perplexity"] | None = None
    """How the answer is read: by the probability of each letter, by the probability of each
    option's text (cloze), from generated text, or, for texts, by their perplexity. By default
    letters, generate for open questions and perplexity for texts.
    """


class OutputSettings(Section):
    """What is written."""

    shard: str = "0/1"
    """I/N answers part I (from 0) of N."""
    output: Path
    """Predictions file to write (.jsonl)."""

    @field_validator("shard")
    @classmethod
    def check_shard(cls, value: str) -> str:
        numbers = re.fullmatch(r"(\d+)/(\d+)", value)
        if not numbers or int(numbers[1]) >= int(numbers[2]):
            raise ValueError("expected I/N with I from 0 to N - 1, as 0/4")
        return value


class EvaluationSettings(RunSettings, QuestionSettings, MethodSettings, OutputSettings):
    """One evaluation: a model, questions, a method, and the file for the predictions."""


# These groups are the headings of --help.
GROUPS = {
    "model": ModelSettings,
    "questions": QuestionSettings,
    "passages": RetrievalSettings,
    "method": Method,
    "engine": EngineSettings,
    "output": OutputSettings,
}


def check_output(output: Path) -> None:
    """Refuse a predictions file that cannot be written."""
    expand_path(output, "--output")
    if output.suffix != ".jsonl":
        raise ConfigError(f"--output {output}: expected a name that ends in .jsonl")
    if not output.parent.is_dir():
        raise ConfigError(f"--output {output}: no folder {output.parent}; make it first")


def choose_method(settings: EvaluationSettings) -> Method:
    """Return the method; where the scoring is not given, the dataset decides it."""
    values = {name: getattr(settings, name) for name in Method.model_fields}
    if settings.scoring is None:
        kind = find_format(settings.format)
        values["scoring"] = kind.scoring
        # The harness scores some datasets, such as HeadQA, by the options' texts.
        if settings.prompt_style == "lm_eval" and kind.harness.answer == "cloze":
            values["scoring"] = "cloze"
    return Method(**values)


def check_dropping(settings: EvaluationSettings, method: Method, max_length: int | None) -> None:
    """Refuse to drop what is too long where nothing is, or where no length is known."""
    if not settings.drop_too_long:
        return
    if method.scoring == "perplexity":
        raise ConfigError(
            "--drop_too_long is for questions; texts are read in windows, so none is too long:"
            " leave it out"
        )
    if max_length is None:
        fix = "leave it out" if settings.api == "chat" else "give --max_length, or leave it out"
        raise ConfigError(f"--drop_too_long: it is not known how much this model can read; {fix}")


def choose_split(settings: QuestionSettings) -> str:
    """Return the split that scores are published on.

    A file is taken as it is; of PubMedQA's file the official test questions are taken.
    """
    if settings.split or settings.split_by:
        # The published split may be another than the part that was held out of a training.
        if not settings.split:
            raise DataError(
                f"--split_by {settings.split_by} needs --split {{{','.join(PARTS)}}}: which part is"
                " asked"
            )
        return settings.split
    if settings.path and Path(settings.path).expanduser().is_file():
        return FILE
    return find_format(settings.format).published_split


def make_entry(settings: QuestionSettings) -> DataEntry:
    """Return the data entry of the questions."""
    return DataEntry(
        format=settings.format,
        path=settings.path,
        subset=settings.subset,
        limit=settings.limit,
        test_pmids=settings.test_pmids,
        columns=settings.columns,
        answer_is=settings.answer_is,
        split_by=settings.split_by,
        subjects=settings.subjects,
        keep=settings.keep,
    )


def read_questions(settings: QuestionSettings, style: str, lowercase: bool = False) -> Reading:
    """Read the questions to ask.

    Style lm_eval keeps texts as they stand, because its prompts are the reference harness's own;
    other styles get cleaned texts, as in training.

    Args:
        settings: which questions.
        style: the prompt style.
        lowercase: whether the model was trained on lower-case texts.

    Returns:
        Examples with unique ids, and the rows that were left out.

    Raises:
        DataError: an invalid row or a repeated id, unless `drop_invalid` is set.
    """
    entry = make_entry(settings)
    split = choose_split(settings)
    reading = read_entry(entry, split, settings.drop_invalid, unlabelled=True)
    if not reading.examples:
        raise DataError(
            f"{settings.format}: no valid row is left of {len(reading.removals)}; the first one"
            f" that was left out: {reading.removals[0].source}: {reading.removals[0].reason}"
        )
    flag = None if settings.drop_invalid else "--drop_invalid"
    unique, repeated = drop_repeated_ids(reading.examples, settings.format, flag)
    removals = reading.removals + repeated
    return Reading(clean_texts(unique, style, lowercase), removals, reading.description)


def choose_retrieval(
    settings: RetrievalSettings, metadata: Mapping[str, Any]
) -> tuple[str, int] | None:
    """Return which texts questions get passages of, and how many; None where they get none.

    Args:
        settings: what is given.
        metadata: how the model was trained to be asked (see registry.Asking).

    Raises:
        ConfigError: the flags contradict each other, or the model was trained with passages and
            nothing says whether it gets some.
    """
    trained = metadata.get("retrieval") or {}
    if settings.retrieval is None and trained:
        raise ConfigError(
            f"this model was trained with passages of {trained['path']} ({trained['num_passages']}"
            " per question); give such texts with --retrieval, or --retrieval none to ask without"
        )
    if settings.retrieval in (None, "none"):
        if settings.num_passages:
            raise ConfigError("--num_passages needs texts; give them with --retrieval")
        return None
    count = settings.num_passages or trained.get("num_passages")
    return settings.retrieval, count or Data.model_fields["num_passages"].default


def check_retrieval(method: Method) -> None:
    """Refuse passages where the method has no place for them.

    Raises:
        ConfigError: texts are scored, or there are worked examples.
    """
    if method.scoring == "perplexity":
        raise ConfigError("--retrieval is for questions, this data holds texts; leave it out")
    if method.num_fewshot:
        raise ConfigError(
            "--retrieval and --num_fewshot exclude each other: worked examples would stand without"
            " passages; leave one out"
        )


def describe_change(library: Library, count: int, metadata: Mapping[str, Any]) -> str:
    """Say where passages are others than in the model's training; empty where nothing differs."""
    trained = metadata.get("retrieval")
    if not trained:
        return ""
    changes = []
    if library.sha256 != trained["library_sha256"]:
        changes.append("these are other texts than in training")
    if count != trained["num_passages"]:
        changes.append(f"{count} per question instead of {trained['num_passages']}")
    return "; ".join(["", *changes])


def read_with_passages(
    settings: EvaluationSettings, method: Method, style: str, metadata: Mapping[str, Any]
) -> Reading:
    """Read the questions to ask, with the passages that they are shown.

    Args:
        settings: which questions, and which texts.
        method: how they are asked.
        style: the prompt style.
        metadata: how the model was trained to be asked (see registry.Asking).

    Raises:
        ConfigError: see choose_retrieval and check_retrieval.
        DataError: see read_questions and retrieval.add_evidence.
    """
    retrieval = choose_retrieval(settings, metadata)
    if retrieval is not None:
        check_retrieval(method)
    # A model that was trained on lower-case texts is asked in lower case.
    lowercase = metadata.get("lowercase", False)
    reading = read_questions(settings, style, lowercase)
    if retrieval is None:
        return reading
    path, count = retrieval
    library = open_library(path, lowercase)
    examples, found = add_evidence(reading.examples, library, count)
    description = f"{reading.description}\n--retrieval {library.description}; {found}"
    description += describe_change(library, count, metadata)
    return Reading(examples, reading.removals, description)


def read_pool(settings: QuestionSettings, style: str, lowercase: bool = False) -> list[Example]:
    """Read the examples that worked examples are taken from; see read_questions."""
    # The limit bounds the questions and not the pool.
    entry = make_entry(settings).model_copy(update={"limit": None, "keep": []})
    if settings.fewshot_path:
        # Another file may write its answers otherwise, and is taken as it is.
        own = {"answer_is": None, "split_by": None, "subjects": None}
        entry = entry.model_copy(update={"path": settings.fewshot_path, **own})
    split = settings.fewshot_split or FORMATS[settings.format].fewshot_split
    # An invalid row only makes the pool smaller, while leaving a question out changes a score.
    examples, _ = read_examples(entry, split, drop_invalid=True)
    return clean_texts(examples, style, lowercase)


def clean_texts(examples: list[Example], style: str, lowercase: bool) -> list[Example]:
    """Return the examples with cleaned texts, unless the style is lm_eval."""
    if style == "lm_eval":
        return examples
    return [clean(example, lowercase) for example in examples]
