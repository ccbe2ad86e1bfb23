"""A search file: what is searched, by which objective, and what no choice may see."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from medqlora.batches.entries import DEFAULT_SPLIT, check_entries, find_home, read_role
from medqlora.core.config import Config, Data, DataEntry, Section
from medqlora.core.config_loading import (
    find_line,
    load_config,
    parse_overrides,
    read_yaml,
    validate,
)
from medqlora.core.errors import ConfigError, UserError
from medqlora.data.cleaning import contamination_keys
from medqlora.training.search.space import (
    Locate,
    Range,
    Space,
    change_tree,
    find_default,
    find_problem,
    find_values,
    list_points,
    read_space,
)

# A few questions stand in several published sets. More than this part of the test is another fault.
MOST_SHARED = 0.01
# The loss is a mean over tokens. Where these keys differ, the tokens differ.
CHANGE_THE_TOKENS = (
    "model.base",
    "model.revision",
    "model.template_arguments",
    "model.trust_remote_code",
    "data.prompt_style",
    "data.completion",
    "data.max_length",
    "data.truncate",
    "data.drop_invalid",
    "data.lowercase",
    "data.retrieval",
    "data.num_passages",
)
# Losses at the same step are compared only where a step means the same in all trials.
CHANGE_THE_STEPS = (
    "data.train",
    "data.temperature",
    "data.deduplicate",
    "data.decontaminate",
    "data.packing",
    "training.epochs",
    "training.max_steps",
    "training.global_batch_tokens",
    "training.eval_steps",
)


class SearchFile(Section):
    """The keys of a search file."""

    recipe: str
    """The recipe whose keys are searched: a YAML file of recipes/sft_qlora.py."""
    fixed: dict[str, Any] = Field({})
    """Keys of the recipe that have other values in all trials, as {section.key: value}."""
    space: dict[str, Any]
    """What is searched, as {section.key: values}: a list; {low: L, high: H} with log: true or
    step: S where wanted; or {times: OTHER_KEY, factor: [F, ...]}.
    """
    method: Literal["sample", "grid"] = "sample"
    """sample draws combinations with Optuna's TPE from the results so far. grid takes all of them.
    """
    objective: Literal["eval_loss", "accuracy"] = "eval_loss"
    """What decides: the lowest loss on data.eval, or the highest accuracy on `validation`."""
    validation: list[DataEntry] = Field([])
    """Multiple-choice questions that every trial answers, as in data.test. The default split is
    validation.
    """
    trials: int = Field(20, ge=1)
    """How many trials are made with method sample, those that fail or are pruned included."""
    seed: int = Field(0, ge=0)
    """Seed of the draws."""
    seeds: list[Annotated[int, Field(ge=0)]] = Field([0], min_length=1)
    """Seeds of training. Each trial is trained once with each; its value is their mean."""
    pruning: Literal["none", "median"] = "none"
    """median ends a trial whose best evaluation loss so far is above the median of finished trials
    at that step, once five have finished. It looks at the first seed.
    """
    max_failures: int = Field(5, ge=1)
    """The command ends after so many trials have failed since its start."""
    confirm: bool = False
    """After the choice, train the recipe and the chosen configuration anew, and compare them on the
    recipe's data.test.
    """


# More trials may be made later, and these change no trial that was made.
FREE_TO_CHANGE = ("trials", "max_failures", "confirm")


@dataclass(frozen=True)
class Search:
    """A search whose every combination was checked.

    Args:
        file: The file's settings.
        tree: The recipe with `fixed`, as plain values.
        space: What is searched.
        default: The point of the space at which the recipe stands.
        points: For method grid all points without the holes, the default first; else empty.
        holes: Combinations that the configuration refuses: their values and the reason.
        shared: How many questions of the recipe's data.test stand in the data of the choice too.
    """

    file: SearchFile
    tree: dict[str, Any]
    space: Space
    default: dict[str, Any]
    points: list[dict[str, Any]]
    holes: list[dict[str, Any]]
    shared: int = 0

    def config(self, point: Mapping[str, Any]) -> Config:
        """Return the configuration at a point, with the recipe's own data.test."""
        return Config.model_validate(change_tree(self.tree, find_values(self.space, point)))

    @property
    def validation(self) -> list[DataEntry]:
        """The questions that trials answer, each entry with its split."""
        return [
            entry.model_copy(update={"split": entry.split or DEFAULT_SPLIT["eval"]})
            for entry in self.file.validation
        ]

    def trial_config(self, point: Mapping[str, Any]) -> Config:
        """Return what a trial trains: it answers the validation questions and never the test."""
        tree = change_tree(self.tree, find_values(self.space, point))
        tree["data"]["test"] = [entry.model_dump(mode="json") for entry in self.validation]
        tree["training"]["seed"] = self.file.seeds[0]
        return Config.model_validate(tree)

    def describe(self) -> dict[str, Any]:
        """Return all that decides what the trials are, for comparison with a later start."""
        file = self.file.model_dump(mode="json", exclude={*FREE_TO_CHANGE, "recipe", "fixed"})
        return {"recipe": self.tree, **file}


def read_search(path: Path, overrides: list[str], trials: int | None) -> Search:
    """Read a search file, and check every combination of its values.

    Args:
        path: The file. Paths in it that begin with ./ or ../ are relative to it.
        overrides: Arguments `--section.key VALUE`, which win over `fixed`.
        trials: It wins over the file's key, unless it is None.

    Raises:
        UserError: The file, the recipe or a value cannot be used. The message is one line.
    """
    given, root = read_yaml(path)
    locate = functools.partial(locate_line, path, root)
    for key in ("recipe", "space"):
        if key not in given:
            raise ConfigError(f"{path}: {key} is missing; set it in the file (see --help)")
    if trials is not None:
        given = given | {"trials": trials}
    file = validate(SearchFile, given, locate)
    if len(set(file.seeds)) < len(file.seeds):
        raise ConfigError(f"{locate(('seeds',))}: seeds has a seed twice; keep one of them")
    tree = read_tree(file, overrides, locate)
    space = read_space(file.space, tree, lambda loc: locate(("space", *loc)))
    check_objective(file, space, tree, locate)
    default = find_default(space, tree, lambda loc: locate(("space", *loc)))
    holes = []
    points = []
    for point in list_points(space):
        values = find_values(space, point)
        problem = find_problem(tree, values)
        if problem is None:
            points.append(point)
            continue
        holes.append({"parameters": values, "reason": problem})
        if point == default:
            raise ConfigError(f"{locate(('space',))}: the recipe itself is refused: {problem}")
    if file.method == "grid":
        points.sort(key=lambda point: point != default)
    else:
        points = []
    search = Search(file, tree, space, default, points, holes)
    return check_data(search, locate)


def locate_line(path: Path, root: yaml.Node | None, loc: tuple) -> str:
    """Say where a value of the search file stands."""
    return f"{path} line {find_line(root, loc)}"


def read_tree(file: SearchFile, overrides: list[str], locate: Locate) -> dict[str, Any]:
    """Return the recipe with `fixed` and the flags, as plain values."""
    tree = load_config(file.recipe).model_dump(mode="json")
    flags = {".".join(keys): value for keys, value in parse_overrides(list(overrides))}
    for key in flags.keys() & file.space.keys():
        raise ConfigError(f"argument --{key}: the space searches this key; leave one of them out")
    changed = change_tree(tree, {**file.fixed, **flags})

    def place(loc: tuple) -> str:
        name = ".".join(map(str, loc))
        if any(name.startswith(key) for key in flags):
            return f"--{name}"
        return f"{locate(('fixed', *loc))}"

    return validate(Config, changed, place).model_dump(mode="json")


def check_objective(file: SearchFile, space: Space, tree: dict, locate: Locate) -> None:
    """Refuse an objective that cannot be measured or compared between the trials.

    Raises:
        ConfigError: See above.
    """
    if file.method == "grid" and any(isinstance(part, Range) for part in space.values()):
        key = next(key for key, part in space.items() if isinstance(part, Range))
        raise ConfigError(
            f"{locate(('space', key))}: method grid takes lists, and space.{key} is a range; list"
            " its values, or take method: sample"
        )
    if file.objective == "accuracy" and not file.validation:
        raise ConfigError(
            f"{locate(('objective',))}: objective accuracy needs questions under validation; they"
            " must not be those of data.test"
        )
    if file.objective == "eval_loss":
        if not tree["data"]["eval"]:
            raise ConfigError(
                f"{locate(('objective',))}: objective eval_loss needs data.eval in the recipe; or"
                " take objective: accuracy with validation"
            )
        for key in find_below(space, CHANGE_THE_TOKENS):
            raise ConfigError(
                f"{locate(('space', key))}: space.{key} changes the tokens whose loss is measured,"
                " so losses cannot be compared; take objective: accuracy with validation"
            )
    if file.pruning == "none":
        return
    if file.method == "grid" or file.objective != "eval_loss":
        raise ConfigError(
            f"{locate(('pruning',))}: pruning compares evaluation losses; it needs method: sample"
            " and objective: eval_loss"
        )
    if tree["training"]["eval_steps"] is None:
        raise ConfigError(
            f"{locate(('pruning',))}: pruning needs training.eval_steps in the recipe or in fixed"
        )
    for key in find_below(space, CHANGE_THE_STEPS):
        raise ConfigError(
            f"{locate(('space', key))}: space.{key} changes what a step is, so pruning cannot"
            " compare losses at equal steps; set pruning: none"
        )


def find_below(space: Space, names: tuple[str, ...]) -> list[str]:
    """Return the keys of a space that are one of the names or stand below it."""
    return [key for key in space if any(f"{key}.".startswith(f"{name}.") for name in names)]


def check_data(search: Search, locate: Locate) -> Search:
    """Refuse data that do not exist, and a choice by the test; return the search with `shared`.

    Raises:
        UserError: See above.
    """
    check_files(search, locate)
    data = search.config(search.default).data
    if not data.test:
        if search.file.confirm:
            raise ConfigError(
                f"{locate(('confirm',))}: confirm needs data.test in the recipe, which no choice"
                " has seen"
            )
        return search
    homes = {find_home(entry, entry.split or DEFAULT_SPLIT["test"]) for entry in data.test}
    for name, entries in (("data.eval", data.eval), ("validation", search.validation)):
        for index, entry in enumerate(entries):
            if find_home(entry, entry.split or DEFAULT_SPLIT["eval"]) in homes:
                raise ConfigError(
                    f"{locate(())}: {name}[{index}] is the same data as data.test of the recipe, so"
                    " the search would choose by the test; give other data, or set fixed:"
                    " {data.test: []} and confirm the choice on fresh questions"
                )
    return replace(search, shared=count_shared(data, search.validation))


def check_files(search: Search, locate: Locate) -> None:
    """Check the data entries of every trial, as a training does at its start.

    Raises:
        ConfigError: A file does not exist, or trials would be measured on what they train on.
    """
    points = [search.default]
    # Where the space changes the data, every combination has its own.
    if find_below(search.space, ("data",)):
        points += [
            point
            for point in list_points(search.space)
            if find_problem(search.tree, find_values(search.space, point)) is None
        ]
    for point in points:
        try:
            check_entries(search.trial_config(point).data)
        except UserError as error:
            # The questions of `validation` stand in a trial's data.test.
            text = str(error).replace("data.test[", "validation[")
            raise ConfigError(f"{locate(())}: {text}") from None


def count_shared(data: Data, validation: list[DataEntry]) -> int:
    """Count the test questions that stand in the data of the choice too.

    Args:
        data: The recipe's data.
        validation: The questions that the trials answer.

    Raises:
        ConfigError: They are more than MOST_SHARED of the test.
    """
    trial = data.model_copy(update={"test": validation})
    seen = set()
    for section, role in ((data, "eval"), (trial, "test")):
        entries, _, _ = read_role(section, role)
        seen |= {key for examples in entries for one in examples for key in contamination_keys(one)}
    entries, _, _ = read_role(data, "test")
    tests = [example for examples in entries for example in examples]
    shared = sum(any(key in seen for key in contamination_keys(one)) for one in tests)
    if shared > MOST_SHARED * len(tests):
        raise ConfigError(
            f"{shared:,} of the {len(tests):,} questions of data.test stand in data.eval or in"
            " validation too, so the search would choose by the test; give other data, or set"
            " fixed: {data.test: []}"
        )
    return shared
