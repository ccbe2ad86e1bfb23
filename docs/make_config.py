"""Make docs/config.md from the schema of the configuration.

    python docs/make_config.py --write docs/config.md
    python docs/make_config.py --check docs/config.md    # exit code 2 if the page is not current

Every key, type, default and description of the page is read from the pydantic models in MODELS.
To describe another model, add a line there.
"""

import argparse
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from medqlora.core.entry import enter

    enter()

from medqlora.core.command import CommandParser, run_command
from medqlora.core.config import Data, DataEntry, Lora, Model, Training
from medqlora.core.errors import ConfigError
from medqlora.core.files import write_atomic
from medqlora.engines.registry import EngineSettings, ModelSettings
from medqlora.evaluation.settings import MethodSettings, OutputSettings, QuestionSettings
from medqlora.serving.settings import AnswerSettings, AskedSettings

# Heading of a table, what stands before the keys in it, and the model that it describes.
MODELS: list[tuple[str, str, type[BaseModel]]] = [
    ("`model`: the base", "model.", Model),
    ("`lora`: the adapter", "lora.", Lora),
    ("`data`: what is read and how it is asked", "data.", Data),
    ("An entry of `data.train`, `data.eval` or `data.test`", "", DataEntry),
    ("`training`: steps, memory and what is kept", "training.", Training),
    ("Evaluation: the model", "", ModelSettings),
    ("Evaluation: the questions", "", QuestionSettings),
    ("Evaluation: the method", "", MethodSettings),
    ("Evaluation: the engine", "", EngineSettings),
    ("Evaluation: the output", "", OutputSettings),
    ("Asking: the questions", "", AskedSettings),
    ("Asking: the answers", "", AnswerSettings),
]
BEGINNING = """\
# Configuration

<!-- This page is made from the schema: python docs/make_config.py --write docs/config.md -->

A configuration is one YAML file with the sections `model`, `lora`, `data` and `training`. It states
only what differs from the defaults below; `model.base` is the one key without a default. Every key
can also be given on the command line of a recipe as `--section.key VALUE`, where VALUE is YAML, and
then wins over the file. The number in a flag such as `--data.train.0.limit 500` is the place of an
entry in a list, counted from 0.

Paths that begin with `./` or `../` are relative to the YAML file when they stand in it, and to the
working folder when they stand on the command line. An unknown key ends the program before any work,
with the file's line and the nearest valid key. The resolved configuration is written to
`config.yaml` in the run folder and is itself valid input.

The settings of an evaluation have no sections. Each of them is a flag of `eval/predict.py`
(`--key VALUE`) and a key in the YAML file that is given with `--config`. `eval/ask.py` takes the
keys of the model, of the engine and of asking in the same way.
"""
NAMES = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "boolean",
    Path: "path",
    type(None): "null",
}
BOUNDS = (
    (annotated_types.Ge, "ge", "{} or more"),
    (annotated_types.Gt, "gt", "above {}"),
    (annotated_types.Le, "le", "at most {}"),
    (annotated_types.Lt, "lt", "below {}"),
)


def make_page() -> str:
    lines = [BEGINNING.rstrip("\n")]
    for heading, prefix, model in MODELS:
        lines += ["", f"## {heading}", "", *make_table(prefix, model)]
    return "\n".join(lines) + "\n"


def make_table(prefix: str, model: type[BaseModel]) -> Iterator[str]:
    yield "| key | type | default | allowed values | meaning |"
    yield "|---|---|---|---|---|"
    for name, field in model.model_fields.items():
        cells = [
            f"`{prefix}{name}`",
            name_type(field.annotation),
            name_default(field),
            name_values(field),
            " ".join((field.description or "").split()),
        ]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def name_type(annotation: Any) -> str:
    """The type in words; literals are texts."""
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin is typing.Annotated:
        return name_type(arguments[0])
    if origin is Literal:
        return "text"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(name_type(argument) for argument in arguments))
    if origin in (list, tuple):
        return f"list of {name_type(arguments[0])}"
    if origin is dict:
        return f"mapping of {name_type(arguments[0])} to {name_type(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "entries"
    return NAMES.get(annotation) or getattr(annotation, "__name__", str(annotation))


def name_default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return "`null`" if default is None else f"`{default}`"


def name_values(field: FieldInfo) -> str:
    """Literals and numeric bounds; empty where the type says all."""
    values = list(list_literals(field.annotation))
    bounds = list(list_bounds([*field.metadata, *list_metadata(field.annotation)]))
    return ", ".join([*(f"`{value}`" for value in values), *bounds])


def list_literals(annotation: Any) -> Iterator[str]:
    """The values that a literal, or a literal inside a union, allows."""
    if typing.get_origin(annotation) is Literal:
        yield from map(str, typing.get_args(annotation))
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for argument in typing.get_args(annotation):
            yield from list_literals(argument)


def list_metadata(annotation: Any) -> Iterator[Any]:
    """Constraints inside a union, where pydantic leaves them on the member."""
    for argument in typing.get_args(annotation):
        if typing.get_origin(argument) is typing.Annotated:
            for constraint in argument.__metadata__:
                yield from (
                    constraint.metadata if isinstance(constraint, FieldInfo) else [constraint]
                )


def list_bounds(metadata: list[Any]) -> Iterator[str]:
    for kind, attribute, words in BOUNDS:
        for constraint in metadata:
            if isinstance(constraint, kind):
                yield words.format(getattr(constraint, attribute))


def main() -> None:
    parser = CommandParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", type=Path, help="page to write")
    parser.add_argument("--check", type=Path, help="page that must be current")
    arguments = parser.parse_args()
    if not arguments.write and not arguments.check:
        raise ConfigError("expected --write PAGE or --check PAGE")
    if arguments.check:
        try:
            text = arguments.check.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"--check {arguments.check}: {error.strerror}; give docs/config.md"
            ) from None
        if text != make_page():
            raise ConfigError(
                f"{arguments.check} does not say what the schema says; run python"
                f" docs/make_config.py --write {arguments.check}"
            )
    if arguments.write:
        write_atomic(arguments.write, make_page())


if __name__ == "__main__":
    run_command(main)
