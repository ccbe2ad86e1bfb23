"""The memory that each recipe needs, in the comment at its head: forecast, recorded and written.

    # Forecast these recipes (minutes each), record the figures, and write the comments.
    python bench/recipe_memory.py --forecast recipes/configs/llama3-8b_medmcqa.yaml
    # Write the comments of all recipes again, from the records.
    python bench/recipe_memory.py --write
    # End with exit code 2 if a comment is not that of its record, or a record not of its recipe.
    python bench/recipe_memory.py --check

A recipe asks for a forecast by a line of comment that begins with "# Memory by forecast" and ends
with a colon. Flags in this line belong to the forecast: keys of the recipe, --gpus and --strategy.
The lines below it are replaced. The records are bench/results/predicted/recipe_*.json. Forecasts
need no GPU; they are those of bench/memory.py --fit.
"""

import argparse
import json
import os
import re
import shlex
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from medqlora.core.entry import enter

    enter()

from medqlora.core.command import (
    CommandParser,
    make_console,
    quiet_libraries,
    run_command,
    whole,
)
from medqlora.core.config import Config
from medqlora.core.config_loading import load_config
from medqlora.core.environment import describe_environment, name_command, prefer_expandable_segments
from medqlora.core.errors import ConfigError
from medqlora.core.files import write_atomic, write_json

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes" / "configs"
RECORDS = ROOT / "bench" / "results" / "predicted"
ARCHITECTURES = ROOT / "bench" / "architectures"
SIZES = (8, 12, 16, 24, 40, 80)  # GiB of a GPU
GIB = 2**30
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
# A heading with its flags, and the lines below it that this script writes.
BLOCK = re.compile(
    r"^# Memory by forecast, CUDA context included(?:, with (?P<flags>.*))?:\n(?:#   .*\n)*",
    re.MULTILINE,
)
# These keys change the training but no tensor of its step.
NEUTRAL = {
    "training": {
        "epochs",
        "max_steps",
        "lr",
        "scheduler",
        "warmup_steps",
        "weight_decay",
        "max_grad_norm",
        "eval_steps",
        "save_steps",
        "keep_checkpoints",
        "early_stopping_patience",
        "log_with",
        "seed",
    },
    "lora": {"init_adapter"},
}

console = make_console(soft_wrap=True)


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    purpose = parser.add_mutually_exclusive_group(required=True)
    purpose.add_argument(
        "--forecast", action="store_true", help="forecast, record and write the comments"
    )
    purpose.add_argument("--write", action="store_true", help="write the comments")
    purpose.add_argument("--check", action="store_true", help="compare the comments")
    parser.add_argument(
        "recipes",
        type=Path,
        nargs="*",
        help="YAML files (default: those of recipes/configs that ask for a forecast)",
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    recipes = arguments.recipes or find_recipes()
    # Every file is read before any is changed.
    asked = {recipe: read_blocks(recipe) for recipe in recipes}
    if arguments.forecast:
        # torch reads the allocator's variable when it is imported.
        prefer_expandable_segments(os.environ)
        quiet_libraries()
    for recipe, blocks in asked.items():
        if arguments.forecast:
            record(recipe, blocks)
        before = recipe.read_text(encoding="utf-8")
        after = fill(recipe, before)
        if arguments.check and before != after:
            raise ConfigError(
                f"{recipe}: its forecast is not that of {find_record(recipe).name}; run python"
                " bench/recipe_memory.py --write"
            )
        if not arguments.check:
            write_atomic(recipe, after)


def find_recipes() -> list[Path]:
    """Return the recipes that ask for a forecast."""
    paths = sorted(RECIPES.glob("*.yaml"))
    return [path for path in paths if BLOCK.search(path.read_text(encoding="utf-8"))]


def read_blocks(recipe: Path) -> list[str]:
    """Return the flags of each forecast that a recipe asks for.

    Raises:
        ConfigError: There is no such file, it asks for none, or its flags are wrong.
    """
    try:
        text = recipe.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{recipe}: {error}; give the YAML file of a recipe") from None
    blocks = [match["flags"] or "" for match in BLOCK.finditer(text)]
    for flags in blocks:
        load_config(recipe, parse_flags(flags)[2])
    if not blocks:
        raise ConfigError(
            f'{recipe}: no line "# Memory by forecast, CUDA context included:" asks for a'
            " forecast; add one"
        )
    return blocks


def parse_flags(flags: str) -> tuple[int, str, list[str]]:
    """Return the number of GPUs, the strategy, and the recipe's keys of a heading.

    Raises:
        ConfigError: The flags are wrong.
    """
    parser = CommandParser()
    parser.add_argument("--gpus", type=whole(1), default=1)
    parser.add_argument("--strategy", choices=STRATEGIES, default="ddp")
    try:
        words = shlex.split(flags)
    except ValueError as error:
        raise ConfigError(f"flags of a forecast {flags!r}: {error}; correct the heading") from None
    known, overrides = parser.parse_known_args(words)
    return known.gpus, known.strategy if known.gpus > 1 else "one", overrides


def find_record(recipe: Path) -> Path:
    return RECORDS / f"recipe_{recipe.stem}.json"


def describe_need(config: Config) -> dict:
    """Return what a recipe says otherwise than the defaults, as far as its memory follows from it.

    A record whose recipe says something else now is out of date.
    """
    said = config.model_dump(mode="json", exclude_defaults=True)
    need = {
        section: {
            key: value
            for key, value in said.get(section, {}).items()
            if key not in NEUTRAL.get(section, ())
        }
        for section in ("model", "lora", "training")
    }
    formats = sorted({entry.format for entry in config.data.train})
    data = {key: getattr(config.data, key) for key in ("max_length", "completion", "packing")}
    return need | {"data": data | {"formats": formats}}


# ---- the comments --------------------------------------------------------------------------------


def fill(recipe: Path, text: str) -> str:
    """Return a recipe's text with the forecasts of its record.

    Raises:
        ConfigError: There is no record, or it is of another state of the recipe.
    """
    path = find_record(recipe)
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ConfigError(
            f"{recipe}: no forecast is recorded in {path.name}; run python bench/recipe_memory.py"
            f" --forecast {recipe}"
        ) from None

    def replace(match: re.Match) -> str:
        flags = match["flags"] or ""
        _, _, overrides = parse_flags(flags)
        need = describe_need(load_config(recipe, overrides))
        found = [entry for entry in recorded["forecasts"] if entry["flags"] == flags]
        if not found or found[0]["recipe"] != need:
            raise ConfigError(
                f"{recipe}: the recipe has changed since {path.name} was recorded; run python"
                f" bench/recipe_memory.py --forecast {recipe}"
            )
        heading = match[0].partition("\n")[0]
        return "\n".join([heading, *describe_plans(found[0]["plans"])]) + "\n"

    return BLOCK.sub(replace, text)


def describe_plans(plans: list[dict]) -> list[str]:
    """Return the lines of comment about all sizes of GPU; small ones that fail share a line."""
    failing = [plan["gib"] for plan in plans if plan["peak_bytes"] is None]
    lines = [f"#   {failing[-1]:>2} GiB or less: does not fit"] if failing else []
    return lines + [describe_plan(plan) for plan in plans if plan["peak_bytes"] is not None]


def describe_plan(plan: dict) -> str:
    """Return the line of comment about one size of GPU that fits."""
    layers = f"{plan['recomputed_layers']} of {plan['layers']} layers recomputed"
    if plan["gradient_checkpointing"] == "offload":
        layers = "all layers recomputed and offloaded"
    peak = (plan["peak_bytes"] + plan["context_bytes"]) / GIB
    place = f"#   {plan['gib']:>2} GiB"
    return f"{place}: {peak:5.2f} GiB, micro-batches of {plan['tokens']:>6,} tokens, {layers}"


# ---- the forecasts -------------------------------------------------------------------------------


def record(recipe: Path, blocks: list[str]) -> None:
    """Forecast each size of GPU for each of a recipe's blocks, and write the figures."""
    forecasts = []
    for flags in blocks:
        _, _, overrides = parse_flags(flags)
        plans = []
        for gib in SIZES:
            plans.append(forecast(recipe, flags, gib))
            console.print(f"{recipe.stem} {flags}".strip(), describe_plans(plans[-1:])[0])
        need = describe_need(load_config(recipe, overrides))
        forecasts.append({"flags": flags, "recipe": need, "plans": plans})
    arguments = ["--forecast", f"recipes/configs/{recipe.name}"]
    figures = {
        "forecasts": forecasts,
        "command": name_command("bench/recipe_memory.py", arguments),
        "environment": describe_environment(),
    }
    write_json(find_record(recipe), figures)


def forecast(recipe: Path, flags: str, gib: int) -> dict:
    """Return the plan of a recipe on a GPU of so many GiB.

    Args:
        flags: Keys of the recipe, --gpus and --strategy.
    """
    import torch

    from medqlora.model.hardware import choose_dtype
    from medqlora.training.memory.allocator import segments_expand
    from medqlora.training.memory.architectures import read_architecture
    from medqlora.training.memory.estimate import assume_labelled
    from medqlora.training.memory.planner import plan_step
    from medqlora.training.memory.target import CONTEXT, KERNELS, TargetHardware, usable
    from medqlora.training.memory.tracker import ForecastError
    from medqlora.training.strategies.launch import Strategy, check_strategy, choose_storage

    gpus, name, overrides = parse_flags(flags)
    config = load_config(recipe, overrides)
    device = torch.device("cuda")
    dtype = choose_dtype(config.model.dtype, device, None)
    strategy = Strategy(name, gpus)
    check_strategy(strategy, config, dtype, {})
    target = TargetHardware(
        device,
        dtype,
        choose_storage(strategy, config.model.quantization, dtype),
        strategy,
        usable(gib * GIB, device),
        expandable=segments_expand(),
    )
    architecture = read_architecture(config.model.base, ARCHITECTURES, config.model.revision)
    try:
        plan = plan_step(
            config, architecture, target, lambda tokens: assume_labelled(config, tokens)
        )
    except ForecastError:
        return {"gib": gib, "peak_bytes": None}
    return {
        "gib": gib,
        "peak_bytes": plan.forecast.peak,
        "reserved_bytes": target.needs(plan.forecast, plan.short),
        "host_bytes": plan.forecast.host,
        "context_bytes": CONTEXT + KERNELS,
        "tokens": plan.tokens,
        "gradient_checkpointing": plan.checkpointing,
        "recomputed_layers": plan.forecast.recomputed,
        "layers": plan.forecast.layers,
    }


if __name__ == "__main__":
    run_command(main)
