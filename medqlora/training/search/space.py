"""The space of a search: which keys of a recipe take which values, checked before any training."""

from __future__ import annotations

import functools
import itertools
import json
import math
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from medqlora.core.config import Config
from medqlora.core.config_loading import describe, flatten_types, section_fields, set_key, validate
from medqlora.core.errors import ConfigError

# So many combinations are checked in a few seconds.
MOST_COMBINATIONS = 20_000
# Trials would not be comparable, or would write over each other.
NOT_SEARCHED = {
    "data.eval": "all trials must be measured on the same data",
    "data.test": "a choice must never see it",
    "data.cache_dir": "it changes no result",
    "training.seed": "list several in `seeds` instead",
    "training.save_steps": "it changes no result",
    "training.keep_checkpoints": "it changes no result",
    "training.log_with": "it changes no result",
}

Locate = Callable[[tuple], str]


@dataclass(frozen=True)
class Choices:
    """A key that takes one of several values.

    Args:
        labels: For each value what Optuna's storage holds: itself, or the JSON of a list or object.
        values: The values as the configuration holds them.
    """

    labels: tuple[Any, ...]
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Range:
    """A key that takes any number from `low` to `high`.

    Args:
        whole: Whether the numbers are whole.
        log: Whether they are drawn evenly in the logarithm.
        step: Distance of two neighbouring numbers; None for every number.
    """

    low: float
    high: float
    whole: bool
    log: bool = False
    step: float | None = None


@dataclass(frozen=True)
class Multiple:
    """A key whose value is that of another key times a factor."""

    times: str
    factors: tuple[float, ...]


Space = Mapping[str, Choices | Range | Multiple]


def read_space(given: Mapping[str, Any], tree: dict, locate: Locate) -> Space:
    """Read the space of a search file.

    Args:
        given: The mapping of the file: a key of the configuration -> a list of values, or {low,
            high, log, step}, or {times, factor}.
        tree: The recipe's configuration as plain values.
        locate: Says where a key of the mapping stands.

    Raises:
        ConfigError: A key is unknown or may not be searched, or a value is not allowed.
    """
    if not given:
        raise ConfigError(f"{locate(())}: space is empty; give a key with a list or a range")
    space: dict[str, Choices | Range | Multiple] = {}
    for key, value in given.items():
        place = f"{locate((key,))}: space.{key}"
        refused = [name for name in NOT_SEARCHED if f"{key}.".startswith(f"{name}.")]
        if refused:
            raise ConfigError(f"{place} cannot be searched: {NOT_SEARCHED[refused[0]]}")
        if isinstance(value, list):
            space[key] = read_choices(key, value, tree, place, lambda _, key=key: locate((key,)))
        elif isinstance(value, dict) and "times" in value:
            space[key] = read_multiple(key, value, given, place)
        elif isinstance(value, dict):
            space[key] = read_range(key, value, place, tree, lambda _, key=key: locate((key,)))
        else:
            raise ConfigError(
                f"{place} got {value!r}; expected a list of values, {{low: L, high: H}}, or"
                " {times: KEY, factor: [F]}"
            )
    return space


def read_choices(key: str, given: list, tree: dict, place: str, locate: Locate) -> Choices:
    """Read a list of values, each as the configuration would read it."""
    values = [normalise(key, value, tree, locate) for value in given]
    texts = [json.dumps(value, sort_keys=True) for value in values]
    if not texts:
        raise ConfigError(f"{place} is empty; give at least one value")
    repeated = [text for text in texts if texts.count(text) > 1]
    if repeated:
        raise ConfigError(f"{place} has {repeated[0]} twice; keep one of them")
    labels = [
        text if isinstance(value, (list, dict)) else value
        for text, value in zip(texts, values, strict=True)
    ]
    return Choices(tuple(labels), tuple(values))


def read_multiple(key: str, given: dict, space: Mapping[str, Any], place: str) -> Multiple:
    """Read a value that is another key's times a factor."""
    other, factors = given["times"], given.get("factor")
    unknown = given.keys() - {"times", "factor"}
    if unknown or not isinstance(factors, list) or not factors:
        raise ConfigError(f"{place}: expected {{times: KEY, factor: [F, ...]}}")
    numbers = [read_number(factor, f"{place}.factor") for factor in factors]
    if min(numbers) <= 0 or len(set(numbers)) < len(numbers):
        raise ConfigError(f"{place}.factor: expected different numbers above 0")
    target = space.get(other) if isinstance(other, str) else None
    if other == key or target is None or (isinstance(target, dict) and "times" in target):
        raise ConfigError(
            f"{place}.times got {other!r}; expected another key of this space that is no multiple"
            " itself"
        )
    for name in (key, other):
        if not number_kinds(name):
            raise ConfigError(f"{place}: {name} holds no number, so nothing is a multiple of it")
    # A key such as training.max_tokens_per_batch also takes words.
    for value in target if isinstance(target, list) else ():
        read_number(value, f"{place}: {other}")
    return Multiple(other, tuple(numbers))


def read_range(key: str, given: dict, place: str, tree: dict, locate: Locate) -> Range:
    """Read a range; the key's own type says whether its numbers are whole."""
    unknown = given.keys() - {"low", "high", "log", "step"}
    if unknown or not {"low", "high"} <= given.keys():
        raise ConfigError(
            f"{place}: expected {{low: L, high: H}}, with log: true or step: S where wanted"
        )
    kinds = number_kinds(key)
    if not kinds:
        normalise(key, given["low"], tree, locate)  # It names an unknown key.
        raise ConfigError(f"{place} holds no number; list its values instead of a range")
    whole = float not in kinds
    low = read_number(given["low"], f"{place}.low")
    high = read_number(given["high"], f"{place}.high")
    step = None if given.get("step") is None else read_number(given["step"], f"{place}.step")
    log = given.get("log", False)
    if not isinstance(log, bool):
        raise ConfigError(f"{place}.log got {log!r}; expected true or false")
    for name, number in (("low", low), ("high", high), ("step", step)):
        if whole and number is not None and number != int(number):
            raise ConfigError(f"{place}.{name} got {number}; {key} is a whole number")
    if not low < high:
        raise ConfigError(f"{place}: low {low:g} is not below high {high:g}; exchange them")
    if log and (low <= 0 or step is not None):
        raise ConfigError(f"{place}: log takes a low above 0, and no step; leave log out")
    if step is not None and not is_multiple(high - low, step):
        raise ConfigError(f"{place}: from low to high is no multiple of step {step:g}; change one")
    for end in (low, high):
        normalise(key, int(end) if whole else end, tree, locate)
    return Range(low, high, whole, log, step)


def read_number(value: Any, place: str) -> float:
    """Return a finite number; YAML 1.1 reads 1e-5 as a text."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{place} got {value!r}; expected a number")
    return number


def number_kinds(key: str) -> set[type]:
    """Return int, float or both, as the configuration's key allows; empty for other keys."""
    parts = [int(part) if part.isdigit() else part for part in key.split(".")]
    field = section_fields(tuple(parts[:-1])).get(parts[-1])
    if field is None:
        return set()
    kinds = set()
    for kind in flatten_types(field.annotation):
        if typing.get_origin(kind) is typing.Annotated:
            kind = typing.get_args(kind)[0]
        kinds |= {kind} & {int, float}
    return kinds


def is_multiple(number: float, step: float) -> bool:
    """Whether a number is a positive whole multiple of a step, up to rounding."""
    return step > 0 and number > 0 and math.isclose(number / step, round(number / step))


def normalise(key: str, value: Any, tree: dict, locate: Locate) -> Any:
    """Return a value as the configuration holds it, whatever the other sections say.

    Raises:
        ConfigError: The key is unknown, or does not take the value.
    """
    section = key.split(".")[0]
    changed = change_tree(tree, {key: value})
    schema = Config.model_fields.get(section)
    try:
        if schema is None:
            raise ConfigError("unknown")
        checked = schema.annotation.model_validate(changed[section]).model_dump(mode="json")
    except (ValidationError, ConfigError):
        validate(Config, changed, locate)  # It says what is wrong, with the nearest key.
        raise
    return read_key({section: checked}, key)


def change_tree(tree: dict, values: Mapping[str, Any]) -> dict:
    """Return a copy of a tree of plain values with some dotted keys replaced."""
    copy = json.loads(json.dumps(tree))
    for key, value in values.items():
        set_key(copy, tuple(key.split(".")), value)
    return copy


def read_key(tree: dict, key: str) -> Any:
    """Return the value of a dotted key."""
    node: Any = tree
    for part in key.split("."):
        node = node[int(part)] if isinstance(node, list) else node[part]
    return node


def find_values(space: Space, point: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration's values at a point of the space.

    Args:
        space: The space.
        point: For each key the number that was drawn, the label of a choice, or a factor.
    """
    values: dict[str, Any] = {}
    for key, part in space.items():
        if isinstance(part, Choices):
            values[key] = part.values[part.labels.index(point[key])]
        elif isinstance(part, Range):
            values[key] = int(point[key]) if part.whole else point[key]
    for key, part in space.items():
        if isinstance(part, Multiple):
            product = values[part.times] * point[key]
            whole = float not in number_kinds(key) and product == int(product)
            values[key] = int(product) if whole else product
    return {key: values[key] for key in space}


def find_default(space: Space, tree: dict, locate: Locate) -> dict[str, Any]:
    """Return the point of the space at which the recipe itself stands.

    Raises:
        ConfigError: The space does not hold it.
    """
    point = {}
    for key, part in space.items():
        value = read_key(tree, key)
        inside = False
        if isinstance(part, Choices):
            inside = value in part.values
            point[key] = part.labels[part.values.index(value)] if inside else None
        elif isinstance(part, Range) and value is not None and not isinstance(value, str):
            inside = part.low <= value <= part.high
            inside &= (
                part.step is None or value == part.low or is_multiple(value - part.low, part.step)
            )
            point[key] = value
        elif isinstance(part, Multiple):
            other = read_key(tree, part.times)
            numbers = all(isinstance(number, (int, float)) for number in (value, other))
            near = [
                factor for factor in part.factors if numbers and math.isclose(factor * other, value)
            ]
            inside = bool(near)
            point[key] = near[0] if inside else None
        if not inside:
            raise ConfigError(
                f"{locate((key,))}: space.{key} does not hold {value!r}, the recipe's own value,"
                " which every trial is compared with; add it, or give another in fixed"
            )
    return point


def list_points(space: Space) -> Iterator[dict[str, Any]]:
    """Yield every combination of choices, factors and ends of ranges.

    Raises:
        ConfigError: There are too many to check.
    """
    ends = {}
    for key, part in space.items():
        if isinstance(part, Choices):
            ends[key] = part.labels
        elif isinstance(part, Multiple):
            ends[key] = part.factors
        else:
            ends[key] = (
                tuple(map(int, (part.low, part.high))) if part.whole else (part.low, part.high)
            )
    count = math.prod(map(len, ends.values()))
    if count > MOST_COMBINATIONS:
        raise ConfigError(
            f"space has {count:,} combinations of values; at most {MOST_COMBINATIONS:,} can be"
            " checked before the first trial; search fewer keys or values at once"
        )
    for values in itertools.product(*ends.values()):
        yield dict(zip(ends, values, strict=True))


def find_problem(tree: dict, values: Mapping[str, Any]) -> str | None:
    """Say why the configuration refuses a combination of values; None where it takes it."""
    try:
        Config.model_validate(change_tree(tree, values))
    except ValidationError as error:
        place = functools.partial(", ".join, [f"{key} {value}" for key, value in values.items()])
        return describe(error, lambda loc: place()).removeprefix("config: ")
    except ConfigError as error:
        return str(error)
    return None
