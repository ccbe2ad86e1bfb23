"""What did the fine-tuning change? Size, accuracy, latency and memory before and after, in one
command.

    # The demonstration, which is trained first.
    python bench/before_after.py
    # A finished run; the adapter is merged first, unless --merged names the merged model.
    python bench/before_after.py --run runs/mine [--merged DIR] --json before_after.json
    # Accuracy by the values of a column, too.
    python bench/before_after.py --run runs/mine --by subject

It compares the base in 16 bits, the base as the run quantized it, the base with the adapter, and
the merged model, on an entry of the run's data.test. Every model answers with eval/predict.py, and
is measured in a process of its own. What is done is kept in --output, and the same command goes on
from there. The notes below the table say how each figure was measured.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from medqlora.core.entry import enter

    enter()

import yaml
from rich.table import Table

from medqlora.core.command import (
    CommandParser,
    make_console,
    quiet_libraries,
    run_command,
    run_early,
    whole,
)
from medqlora.core.config import Config, DataEntry
from medqlora.core.config_loading import load_config, load_settings
from medqlora.core.environment import (
    MemoryMeter,
    describe_environment,
    name_command,
    prefer_expandable_segments,
)
from medqlora.core.files import check_new, hash_json, write_atomic, write_json
from medqlora.core.reading import expand_path, read_object
from medqlora.data.formats.registry import find_format
from medqlora.data.reading import STRATA
from medqlora.evaluation.settings import (
    EvaluationSettings,
    QuestionSettings,
    choose_method,
    read_with_passages,
)
from medqlora.reporting.before_after import (
    METHOD,
    MODELS,
    BeforeAfterError,
    compare_models,
    compare_strata,
    list_tables,
    name_strata,
    summarise,
)

ROOT = Path(__file__).parents[1]


def parse_arguments() -> tuple[argparse.Namespace, Config | None]:
    """Read and check the command line; the configuration is that of the run, if there is one."""
    parser = CommandParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run", type=Path, help="a finished run (default: train the demonstration)"
    )
    parser.add_argument("--merged", type=Path, help="the merged model (default: merge the adapter)")
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for what is done (default: before_after in the run; runs/before_after_demo)",
    )
    parser.add_argument(
        "--entry",
        type=whole(0),
        default=0,
        help="which entry of data.test is asked, from 0 (default 0)",
    )
    parser.add_argument(
        "--by",
        help="accuracy by this value of each question, too: subject, dataset, topic, choice_type or"
        " a column of the data file",
    )
    parser.add_argument(
        "--limit", type=whole(4), help="ask only the first questions (default: all of the entry)"
    )
    parser.add_argument(
        "--requests",
        type=whole(2),
        default=32,
        help="questions that are timed one by one, and again as many together (default 32)",
    )
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    # A measurement calls this script again and names the settings of its model here.
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return arguments, None
    check_new(arguments.json, "--json")
    demonstration = arguments.run is None
    if demonstration:
        arguments.output = arguments.output or Path("runs") / "before_after_demo"
        arguments.run = arguments.output / "run"
    arguments.run = expand_path(arguments.run, "--run")
    arguments.output = expand_path(arguments.output or arguments.run / "before_after", "--output")
    if arguments.output.exists() and not arguments.output.is_dir():
        raise BeforeAfterError(f"--output {arguments.output} is a file; give a folder")
    if arguments.merged is not None:
        arguments.merged = expand_path(arguments.merged, "--merged")
        if not (arguments.merged / "config.json").is_file():
            raise BeforeAfterError(
                f"--merged {arguments.merged}: no model there; give a folder of"
                " recipes/merge_adapter.py, or leave it out"
            )
    arguments.demonstration = demonstration
    path = ROOT / "recipes" / "configs" / "demo.yaml" if demonstration else find_run(arguments.run)
    config = load_config(path)
    # An entry that cannot be asked is refused before the first model is loaded.
    make_questions(config, arguments)
    arguments.output.mkdir(parents=True, exist_ok=True)
    return arguments, config


# The files of a finished run, and the keys of them that are needed here.
FILES = {
    "config.yaml": (),
    "metrics.json": ("memory_bytes",),
    "environment.json": ("step_plan", "hardware", "trainable_parameters", "processes"),
    "adapter/medqlora.json": (
        *("base", "quantization", "dtype"),
        *("prompt_style", "completion", "template_arguments"),
    ),
}


def find_run(run: Path) -> Path:
    """Return the configuration of a finished run."""
    for name, keys in FILES.items():
        if not (run / name).is_file():
            raise BeforeAfterError(
                f"--run {run}: no {name}, so it is no finished run with an adapter; give the"
                " --output_dir of a training, or finish it with --resume"
            )
        missing = set(keys) - read_json(run / name).keys() if keys else set()
        if missing:
            raise BeforeAfterError(
                f"{run / name}: no key {min(missing)}; the file is damaged, or of another version:"
                " train again"
            )
    return run / "config.yaml"


def read_json(path: Path) -> dict[str, Any]:
    return read_object(path, str(path.parent), BeforeAfterError)


def make_questions(config: Config, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of eval/predict.py that ask an entry of data.test as the training did."""
    entries = config.data.test
    if arguments.entry >= len(entries):
        raise BeforeAfterError(
            f"--entry {arguments.entry}: the run's data.test has {len(entries)} entries, counted"
            " from 0; give one of them"
        )
    entry = entries[arguments.entry]
    place = f"data.test entry {arguments.entry}"
    if find_format(entry.format).scoring != "letters":
        raise BeforeAfterError(
            f"{place}: format {entry.format} holds no multiple-choice questions, and accuracy is"
            " measured on those; choose another with --entry"
        )
    if config.data.lowercase:
        raise BeforeAfterError(
            "data.lowercase: the base cannot be asked in lower case alone; compare the predictions"
            " that the run wrote instead (eval/compare.py)"
        )
    values = entry.model_dump(exclude_defaults=True)
    for name in ("weight", "share"):
        values.pop(name, None)  # They mix training data and mean nothing for questions.
    unknown = values.keys() - (QuestionSettings.model_fields.keys() & DataEntry.model_fields.keys())
    if unknown:
        raise BeforeAfterError(
            f"{place}: {min(unknown)} is no setting of eval/predict.py; write the questions to a"
            " file of their own and name it in the entry"
        )
    if arguments.by and arguments.by not in STRATA:
        values["keep"] = [arguments.by]
    if config.data.retrieval is not None:
        # The base is shown the passages too, so that training alone makes the difference.
        values["retrieval"] = config.data.retrieval
        values["num_passages"] = config.data.num_passages
    values["split"] = entry.split or "test"  # This is the split that a training reads.
    values["drop_invalid"] = config.data.drop_invalid
    limits = [limit for limit in (entry.limit, arguments.limit) if limit is not None]
    return values | ({"limit": min(limits)} if limits else {})


if __name__ == "__main__":
    # Importing torch takes seconds, so mistakes are reported before. torch reads the allocator's
    # variable when it is imported.
    ARGUMENTS, CONFIG = run_early(parse_arguments)
    prefer_expandable_segments(os.environ)

from medqlora.engines.latency import time_scoring
from medqlora.engines.registry import open_engine, prepare_asking
from medqlora.evaluation.predictions import read_predictions
from medqlora.evaluation.questions import prepare_questions
from medqlora.model.hardware import default_device
from medqlora.model.identity import describe_model, resolve_base
from medqlora.model.quantization import count_bytes

console = make_console(soft_wrap=True)


def main() -> None:
    arguments = ARGUMENTS
    quiet_libraries()
    if arguments.worker:
        measure_here(arguments.worker, arguments.requests)
        return
    if arguments.demonstration:
        train_demonstration(arguments.run)
    settings = list_settings(CONFIG, find_merged(arguments), arguments)
    models = {}
    predictions = {}
    for name in MODELS:
        models[name] = measure_model(name, settings[name], arguments)
        predictions[name] = read_predictions(arguments.output / f"{name}.jsonl")
        models[name] |= summarise(predictions[name])
        # A column without values is refused after the first model, and not after the last one.
        strata = name_strata(predictions[name], arguments.by) if arguments.by else {}
    figures = {
        "models": models,
        "comparisons": compare_models(predictions),
        "training": describe_training(arguments),
    }
    if arguments.by:
        figures["strata"] = compare_strata(predictions, strata)
    show(figures, arguments)
    if arguments.json:
        about = {
            "command": name_command("bench/before_after.py", sys.argv[1:]),
            "environment": describe_environment(),
            "device": default_device().type,
            "method": METHOD,
        }
        write_json(arguments.json, about | figures)


# ---- steps in processes of their own -------------------------------------------------------------


def run_step(purpose: str, script: str, *flags: object) -> None:
    """Run another script to its end, and say so; its last line is the reason where it fails."""
    console.print(f"{purpose} …", style="dim")
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["killed, out of memory?"])[-1]
        raise BeforeAfterError(f"{purpose}: {script} ended with code {done.returncode}: {last}")


def train_demonstration(run: Path) -> None:
    """Train the demonstration, or finish what a killed process has begun."""
    if (run / "metrics.json").is_file():
        return
    flags = ["--output_dir", run]
    if (run / "config.yaml").is_file():
        flags.append("--resume")
    run_step("training the demonstration", "recipes/sft_qlora.py", *flags)
    find_run(run)


def find_merged(arguments: argparse.Namespace) -> Path:
    """Return the merged model; the adapter is merged first unless this was done before."""
    folder = arguments.merged or arguments.output / "merged"
    adapter = arguments.run / "adapter"
    if not folder.exists():
        run_step(
            "merging the adapter",
            "recipes/merge_adapter.py",
            *("--adapter", adapter, "--output", folder),
        )
    # A model that another program merged has no such file, and nothing is known of its adapter.
    metadata = folder / "medqlora.json"
    trained = read_json(adapter / "medqlora.json").get("weights_sha256")
    if metadata.is_file() and read_json(metadata).get("weights_sha256") != trained:
        raise BeforeAfterError(
            f"{folder} was merged from another adapter than {adapter}; give a new --output, or"
            " another --merged"
        )
    return folder


def list_settings(
    config: Config, merged: Path, arguments: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Return the settings of eval/predict.py for each model."""
    trained = read_json(arguments.run / "adapter" / "medqlora.json")
    if not trained.get("double_quantization", True):
        raise BeforeAfterError(
            "model.double_quantization false: eval/predict.py loads a quantized base with double"
            " quantization only, which would be another base than the trained one"
        )
    base = {"model": config.model.base, "revision": trained.get("revision")}
    prompts = {key: trained[key] for key in ("prompt_style", "completion", "template_arguments")}
    sixteen = trained["dtype"] if trained["dtype"] != "float32" else "bfloat16"
    quantization = trained["quantization"]
    # A run on unquantized weights is compared with the usual 4-bit base too.
    quantized = "nf4" if quantization == "none" else quantization
    models = {
        "base_16_bit": base | prompts | {"dtype": sixteen},
        "base_quantized": base | prompts | {"dtype": quantized},
        "tuned": base | {"adapter": str(arguments.run / "adapter")},
        "merged": {"model": str(merged), "dtype": trained["dtype"]} | prompts,
    }
    questions = make_questions(config, arguments)
    return {name: model | questions for name, model in models.items()}


def measure_model(
    name: str, settings: dict[str, Any], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Let a model answer all questions, and measure it; what is there already is taken."""
    output = arguments.output / f"{name}.jsonl"
    chosen = load_settings(EvaluationSettings, None, settings | {"output": output})
    path = arguments.output / f"{name}.yaml"
    values = settings | {"output": str(output)}
    write_atomic(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    # It leaves a finished file of the same model and questions as it is, and refuses another one.
    run_step(f"{name}: answering", "eval/predict.py", "--config", path)
    identity = describe_model(chosen.model, chosen.revision, chosen.adapter)
    key = hash_json([settings, identity, arguments.requests])
    piece = arguments.output / f"{name}.json"
    if piece.is_file() and read_json(piece).get("key") != key:
        raise BeforeAfterError(
            f"{piece} was measured of another model or with other settings; give a new --output"
        )
    if not piece.is_file():
        run_step(
            f"{name}: measuring",
            "bench/before_after.py",
            *("--worker", path, "--requests", arguments.requests),
        )
        measured = arguments.output / f"{name}.measured"
        write_json(piece, {"key": key} | read_json(measured))
        measured.unlink()
    figures = read_json(piece)
    del figures["key"]
    return {"disk_bytes": size_on_disk(chosen)} | figures


def size_on_disk(settings: EvaluationSettings) -> int:
    """Return the bytes of the files with weights that a model is loaded from."""
    folders = [resolve_base(settings.model, settings.revision)]
    if settings.adapter:
        folders.append(settings.adapter)
    return sum(path.stat().st_size for place in folders for path in place.glob("*.safetensors"))


def measure_here(path: Path, count: int) -> None:
    """Load the model of a settings file, time its answers, and write the figures beside it."""
    settings = load_settings(EvaluationSettings, path, {})
    asking = prepare_asking(settings)
    method = choose_method(settings)
    reading = read_with_passages(settings, method, asking.encoder.style, asking.metadata)
    examples = reading.examples[: 2 * count]
    if len(examples) < 4:
        raise BeforeAfterError(
            f"{len(examples)} questions: expected at least 4, two of each to time alone and in a"
            " batch"
        )
    questions, _ = prepare_questions(asking.encoder, examples, method, (), asking.max_length)
    requests = [question.requests[0] for question in questions]
    meter = MemoryMeter(default_device().type == "cuda")
    before = meter.now()
    engine = open_engine(settings, asking, method.seed, None)
    loaded = meter.now() - before
    size = count_bytes(engine.model)
    meter.begin()
    scoring = time_scoring(engine, requests)
    figures = {
        "weights": engine.weights,
        "memory_bytes": size,
        "process_bytes": loaded,
        "peak_process_bytes": meter.read_peak() - before,
        "scoring": scoring,
    }
    write_json(path.with_suffix(".measured"), figures)


# ---- figures -------------------------------------------------------------------------------------


def describe_training(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the memory of the run's training beside the forecast of full fine-tuning."""
    environment = read_json(arguments.run / "environment.json")
    memory = read_json(arguments.run / "metrics.json")["memory_bytes"]
    forecast = forecast_full_tuning(arguments, environment)
    adapter = arguments.run / "adapter" / "adapter_model.safetensors"
    return {
        "measured_peak_bytes": memory["peak"] - memory["before"],
        "measured_step_bytes": measure_step(arguments, environment),
        "predicted_peak_bytes": environment["step_plan"].get("predicted_peak_bytes"),
        "full_tuning_predicted_bytes": forecast["predicted_peak_bytes"],
        "base_parameters": forecast["base_parameters"],
        "trainable_parameters": environment["trainable_parameters"],
        "trainable_share": environment["trainable_parameters"] / forecast["base_parameters"],
        "adapter_bytes": adapter.stat().st_size,
        "processes": environment["processes"],
        "hardware": environment["hardware"],
    }


def forecast_full_tuning(arguments: argparse.Namespace, environment: dict) -> dict[str, Any]:
    """Forecast the run's step with every weight of the unquantized base trained."""
    device = "cuda" if environment["hardware"]["gpus"] else "cpu"
    flags = [f"--device={device}", "--training.method=full", "--model.quantization=none"]
    return run_memory("full_tuning", arguments, environment, flags)


def measure_step(arguments: argparse.Namespace, environment: dict) -> int | None:
    """Measure a step of a run on a CPU in a fresh process, where the run's log tells little.

    The log of a run on a GPU counts tensors alone, so nothing is measured again.
    """
    if environment["hardware"]["gpus"] or default_device().type != "cpu":
        return None
    return run_memory("step", arguments, environment, ["--measure"])["measured_peak_bytes"]


def run_memory(
    name: str, arguments: argparse.Namespace, environment: dict, flags: list[str]
) -> dict[str, Any]:
    """Run bench/memory.py on the run's own step, unless its figures are there."""
    path = arguments.output / f"{name}.json"
    plan = environment["step_plan"]
    if not path.is_file():
        run_step(
            f"memory: {name}",
            "bench/memory.py",
            *("--config", arguments.run / "config.yaml", "--json", path),
            f"--training.max_tokens_per_batch={plan['max_tokens_per_batch']}",
            f"--training.gradient_checkpointing={plan['gradient_checkpointing']}",
            *flags,
        )
    return read_json(path)


def show(figures: Mapping[str, Any], arguments: argparse.Namespace) -> None:
    for title, head, rows in list_tables(figures, arguments.by):
        if arguments.markdown:
            lines = [head, ["---"] * len(head), *rows]
            print(f"\n{title}\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in lines))
            continue
        table = Table(title=title, title_justify="left")
        for number, column in enumerate(head):
            table.add_column(column, justify="right" if number else "left")
        for row in rows:
            table.add_row(*row)
        make_console(width=None if sys.stdout.isatty() else 160).print(table)
    for column, text in METHOD.items():
        console.print(f"{column}: {text}")


if __name__ == "__main__":
    run_command(main)
