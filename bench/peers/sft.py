"""Tokens per second and peak memory of this project's recipe against other trainers, with the same
NF4 model, rows and settings.

    python bench/peers/sft.py --tokenizer DIR --data medmcqa/train.jsonl [--dtype float32] \\
        [--json FILE]
    python bench/peers/sft.py --tokenizer DIR --data medmcqa/train.jsonl \\
        --llamafactory OTHER_ENVIRONMENT/bin/python

Builds a random Llama (build_base.py; 74M parameters by default), then trains it in one process per
contestant:

- TRL packed (best-fit, padding-free), with and without recomputation. Its head runs at labelled
  positions only ("compact"); TRL 1.16 does this by itself on a GPU, and on a CPU it is switched on.
  Where liger-kernel is installed and a GPU is here, TRL runs with it too.
- LLaMA-Factory packed ("neat packing", sdpa), with and without recomputation, where an interpreter
  that has it is given.
- Ours, with full recomputation and as our planner chooses.

All see the same tokens, and the same code computes the trained adapters' loss on the first rows.
They train on the GPU where there is one (nobody has tried this yet), else on the CPU. Only the
ratios of one run on one machine mean something. Needs `pip install trl==1.16.0`.
"""

import argparse
import functools
import importlib.util
import json
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from medqlora.core.entry import enter

    enter()

from medqlora.core.command import CommandParser, run_command, run_early, whole
from medqlora.core.config import Config
from medqlora.core.config_loading import load_config
from medqlora.core.environment import MemoryMeter, describe_environment, name_command
from medqlora.core.errors import ConfigError
from medqlora.core.files import check_new, write_json

RECIPE = Path(__file__).parents[2] / "recipes" / "sft_qlora.py"
WARM_UP = 2  # steps that the rate leaves out
MEASURED = 100  # rows on which the trained adapters are compared
# The part of a name before the comma is a key of RUNS. The value is the recomputation. TRL stands
# first, because ratios are taken to it from the first result on.
CONTESTANTS = {
    "trl, full recomputation": "full",
    "trl, none": "none",
    "trl with liger, full recomputation": "full",
    "trl with liger, none": "none",
    "llamafactory, full recomputation": "full",
    "llamafactory, none": "none",
    "ours, full recomputation": "full",
    "ours, as planned": "auto",
}


def parse_arguments() -> tuple[argparse.Namespace, dict[str, str]]:
    """Read and check the command line; the versions are those of the other trainers."""
    parser = CommandParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_work_flags(parser)
    parser.add_argument(
        "--repetitions",
        type=whole(1),
        default=1,
        help="runs of every contestant, in turn; the median counts (default 1)",
    )
    parser.add_argument(
        "--llamafactory",
        help=(
            "Python interpreter of an environment with llamafactory 0.9.5, which needs older"
            " versions of its own"
        ),
    )
    parser.add_argument(
        "--json", type=Path, help="write the figures to this file, after every contestant"
    )
    parser.add_argument("--contestant", choices=list(CONTESTANTS), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        return arguments, {}
    check_arguments(arguments)
    return arguments, find_versions(arguments.llamafactory)


def add_work_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        help="folder of a tokenizer with 32k tokens or more",
    )
    parser.add_argument("--data", type=Path, required=True, help="MedMCQA file")
    parser.add_argument(
        "--rows", type=whole(100), default=500, help="rows to train on (default 500)"
    )
    parser.add_argument("--epochs", type=whole(1), default=1, help="passes over them (default 1)")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="compute dtype (default float32)",
    )
    parser.add_argument(
        "--shape",
        choices=["74m", "1b"],
        default="74m",
        help="shape of the random model (default %(default)s)",
    )


def check_arguments(arguments: argparse.Namespace) -> None:
    check_new(arguments.json, "--json")
    for path in (arguments.tokenizer, arguments.data):
        if not path.exists():
            raise ConfigError(f"{path}: not here; expected a tokenizer's folder and a MedMCQA file")


def find_versions(interpreter: str | None) -> dict[str, str]:
    """Versions of TRL, and of the llamafactory package that this interpreter has.

    Raises:
        ConfigError: one of them is not installed.
    """
    versions = {}
    if interpreter:
        code = "import importlib.metadata as m; print(m.version('llamafactory'))"
        command = [interpreter, "-c", code]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            raise ConfigError(
                f"--llamafactory {interpreter}: no interpreter with llamafactory; pip install"
                " llamafactory==0.9.5 in an environment of its own"
            ) from None
        versions["llamafactory"] = done.stdout.strip()
    # The package is looked for without importing it, which would take seconds.
    if importlib.util.find_spec("trl") is None:
        raise ConfigError("trl is not installed here; pip install trl==1.16.0")
    versions["trl"] = version("trl")
    return versions


if __name__ == "__main__":
    # Importing torch takes seconds, so mistakes are reported before.
    ARGUMENTS, VERSIONS = run_early(parse_arguments)

import numpy as np
import torch
from transformers import AutoTokenizer

from medqlora.batches.collate import collate
from medqlora.batches.pipeline import prepare
from medqlora.data.cleaning import clean, deduplicate
from medqlora.data.reading import read_examples
from medqlora.model.adapter import load_adapter
from medqlora.model.attention.packed_batch import move_batch
from medqlora.model.base import load_base
from medqlora.model.hardware import DTYPES, default_device
from medqlora.model.head_loss import AnswerLoss
from medqlora.prompts.chat_template import Encoder, make_encoder
from medqlora.prompts.rows import TokenTable
from medqlora.prompts.styles import render

DEVICE = default_device()


def main() -> None:
    arguments = ARGUMENTS
    if arguments.contestant:
        run = RUNS[arguments.contestant.partition(",")[0]]
        figures = run(arguments, CONTESTANTS[arguments.contestant])
        (arguments.work / f"{arguments.contestant}.json").write_text(json.dumps(figures))
        return
    if DEVICE.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None:
        # compete runs the contestants whose trainer has a version here.
        VERSIONS["trl with liger"] = version("liger-kernel")
    with tempfile.TemporaryDirectory() as folder:
        results = compete(arguments, Path(folder))
    for name, figures in results.items():
        print(
            f"{name}: {figures['tokens_per_second_ratio']:.2f} x the tokens/s of TRL at its"
            f" fastest, {figures['peak_memory_ratio']:.2f} x its peak memory; first loss"
            f" {figures['losses'][0]:.3f}, of the trained adapter {figures['final_loss']:.4f},"
            f" {len(figures['losses'])} steps"
        )


# ---- the comparison ------------------------------------------------------------------------------


def compete(arguments: argparse.Namespace, work: Path) -> dict[str, dict]:
    """Run every contestant in a process of its own. Figures are saved as they come."""
    build = [
        sys.executable,
        str(Path(__file__).with_name("build_base.py")),
        f"--tokenizer={arguments.tokenizer}",
        f"--output={work / 'base'}",
        f"--shape={arguments.shape}",
    ]
    subprocess.run(build, check=True)
    environment = describe_environment()
    environment["versions"] |= VERSIONS
    keys = ("rows", "epochs", "dtype", "shape", "repetitions")
    settings = {key: getattr(arguments, key) for key in keys}
    settings |= {"data": arguments.data.name, "tokenizer": arguments.tokenizer.name}
    results: dict[str, dict] = {}
    names = [name for name in CONTESTANTS if name.partition(",")[0] in (*VERSIONS, "ours")]
    # Contestants take turns, so that a machine that grows slower does so for all of them.
    for name in names * arguments.repetitions:
        figures = start(name, work)
        rates = [*results.get(name, {}).get("rates", []), figures["tokens_per_second"]]
        # The rate is the median of all repetitions; losses and memory are those of the last one.
        results[name] = figures | {
            "rates": rates,
            "tokens_per_second": statistics.median(rates),
        }
        add_ratios(results)
        if arguments.json:
            recorded = {
                "command": name_command("bench/peers/sft.py", sys.argv[1:]),
                "settings": settings,
                "environment": environment,
                "results": results,
            }
            write_json(arguments.json, recorded)
    return results


def start(name: str, work: Path) -> dict:
    """Run one contestant -> its figures."""
    command = [sys.executable, __file__, *sys.argv[1:], f"--contestant={name}", f"--work={work}"]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise ConfigError(f"{name} ended with code {done.returncode}: {last_line(done.stderr)}")
    for folder in ("run", "llamafactory"):  # The next repetition begins anew.
        shutil.rmtree(work / f"{folder}-{CONTESTANTS[name]}", ignore_errors=True)
    return json.loads((work / f"{name}.json").read_text())


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["killed"])[-1][:300]


def add_ratios(results: dict[str, dict]) -> None:
    """Add rates and memory relative to TRL at its fastest."""
    trl = [figures for name, figures in results.items() if name.startswith("trl")]
    best = max(trl, key=lambda figures: figures["tokens_per_second"])
    for figures in results.values():
        rate = figures["tokens_per_second"] / best["tokens_per_second"]
        figures["tokens_per_second_ratio"] = rate
        figures["peak_memory_ratio"] = figures["peak_memory_bytes"] / best["peak_memory_bytes"]


# ---- what all contestants share ------------------------------------------------------------------


def to_flags(arguments: argparse.Namespace, recompute: str) -> list[str]:
    """The recipe's flags; the others get the same values from the same configuration."""
    entry = {"format": "medmcqa", "path": str(arguments.data), "limit": arguments.rows}
    return [
        f"--model.base={arguments.work / 'base'}",
        f"--model.dtype={arguments.dtype}",
        f"--data.train={json.dumps([entry])}",
        "--data.prompt_style=plain",
        "--data.completion=letter_text",
        "--data.max_length=1024",
        f"--data.cache_dir={arguments.work / 'cache'}",
        "--data.eval=[]",
        "--data.test=[]",
        f"--training.epochs={arguments.epochs}",
        # A micro-batch is a step, so no trainer's way of accumulating gradients plays a part.
        "--training.max_tokens_per_batch=2048",
        "--training.global_batch_tokens=2048",
        "--training.lr=2e-4",
        "--training.scheduler=constant",
        "--lora.r=16",
        "--lora.alpha=32",
        "--training.warmup_steps=0",
        f"--training.gradient_checkpointing={recompute}",
    ]


def read_config(arguments: argparse.Namespace, recompute: str) -> Config:
    return load_config(RECIPE.parent / "configs" / "demo.yaml", to_flags(arguments, recompute))


def read_encoder(config: Config) -> Encoder:
    # These are the style and completion of to_flags.
    return make_encoder(AutoTokenizer.from_pretrained(config.model.base), "plain", "letter_text")


def prepare_table(config: Config) -> TokenTable:
    return prepare(config, read_encoder(config)).train


def compute_rate(tokens: int, times: list[float], steps: int) -> float:
    """Tokens per second after the warm-up, from the tokens and the number of all steps, and the
    seconds at which steps ended.
    """
    # Every step holds a nearly full pack, so tokens are divided over steps evenly.
    part = (len(times) - WARM_UP) / steps
    # The clock starts where the last step of the warm-up ended.
    return tokens * part / (times[-1] - times[WARM_UP - 1])


@torch.no_grad()
def measure_loss(model: torch.nn.Module, table: TokenTable) -> float:
    """Mean loss per supervised token of the first rows, each alone, whoever trained the model."""
    loss_model = AnswerLoss(model, 1024).eval()
    rows = list(range(min(MEASURED, len(table.lengths))))
    total = 0.0
    for row in rows:
        # A row that is alone needs no packing: every attention takes its tokens for one document.
        batch = move_batch(collate(table, np.array([row])), "sdpa", DEVICE)
        total += loss_model(**batch).item()
    return total / int(table.supervised[rows].sum())


def measure_adapter(config: Config, adapter: Path, table: TokenTable) -> float:
    return measure_loss(load_adapter(load_base(config.model, DEVICE)[0], adapter), table)


# ---- ours ----------------------------------------------------------------------------------------


def run_ours(arguments: argparse.Namespace, recompute: str) -> dict:
    output = arguments.work / f"run-{recompute}"
    # The recipe reads its arguments from here, as when it is started by hand.
    sys.argv = [str(RECIPE), f"--output_dir={output}", *to_flags(arguments, recompute)]
    try:
        runpy.run_path(str(RECIPE), run_name="__main__")
    except SystemExit as stop:
        if stop.code:
            raise
    rows = [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    # The log has the tokens and the rate of each step, hence its seconds.
    timed = steps[WARM_UP:]
    seconds = sum(step["tokens"] / step["tokens_per_second"] for step in timed)
    # The peak is read before another model is loaded to measure the adapter.
    peak = MemoryMeter(DEVICE.type == "cuda").read_peak()
    config = read_config(arguments, recompute)
    return {
        "tokens_per_second": sum(step["tokens"] for step in timed) / seconds,
        "losses": [step["loss"] for step in steps],
        "peak_memory_bytes": peak,
        "final_loss": measure_adapter(config, output / "adapter", prepare_table(config)),
    }


# ---- TRL -----------------------------------------------------------------------------------------


def run_trl(arguments: argparse.Namespace, recompute: str, liger: bool = False) -> dict:
    import trl.trainer.utils
    from transformers import TrainerCallback

    times = []
    calls = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            # Peaks are counted from here, as the recipe does: loading does not count.
            MemoryMeter(DEVICE.type == "cuda").begin()

        def on_step_end(self, *args, **kwargs):
            times.append(time.perf_counter())

    # The only use of this function is to decide whether the head runs at labelled positions only.
    trl.trainer.utils._use_triton = lambda device: calls.append(device) or True
    config = read_config(arguments, recompute)
    table = prepare_table(config)
    trainer = make_trl_trainer(arguments, config, table, Clock(), liger)
    # A batch is one pack, and a pack is one step.
    steps = len(trainer.get_train_dataloader()) * arguments.epochs
    trainer.train()
    if not calls:
        raise ConfigError(
            f"trl {version('trl')} does not ask for its compact head as 1.16 does; pip install"
            " trl==1.16.0"
        )
    # The peak is read before the loss is measured, which takes memory of its own.
    peak = MemoryMeter(DEVICE.type == "cuda").read_peak()
    tokens = int(table.lengths.sum()) * arguments.epochs
    return {
        "tokens_per_second": compute_rate(tokens, times, steps),
        "losses": [float(row["loss"]) for row in trainer.state.log_history if "loss" in row],
        "peak_memory_bytes": peak,
        "final_loss": measure_loss(trainer.model, table),
    }


def make_trl_trainer(
    arguments: argparse.Namespace, config: Config, table: TokenTable, clock, liger: bool
):
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    # This is how our side quantizes too: NF4 with double quantization.
    dtype = DTYPES[arguments.dtype]
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    base = config.model.base
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(
            base, dtype=dtype, quantization_config=quantization, device_map={"": DEVICE}
        ),
        processing_class=AutoTokenizer.from_pretrained(base),
        callbacks=[clock],
        train_dataset=to_dataset(table),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM",
            r=config.lora.r,
            lora_alpha=config.lora.alpha,
            lora_dropout=config.lora.dropout,
            target_modules="all-linear",
        ),
        args=SFTConfig(
            output_dir=str(arguments.work / "trl"),
            packing=True,
            # With packing this is the length of a pack.
            max_length=config.training.max_tokens_per_batch,
            per_device_train_batch_size=1,
            completion_only_loss=True,
            num_train_epochs=arguments.epochs,
            learning_rate=config.training.lr,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            gradient_checkpointing=config.training.gradient_checkpointing == "full",
            gradient_checkpointing_kwargs={"use_reentrant": False},
            use_cpu=DEVICE.type == "cpu",
            bf16=arguments.dtype == "bfloat16",
            use_liger_kernel=liger,
            report_to="none",
            disable_tqdm=True,
            max_grad_norm=config.training.max_grad_norm,
        ),
    )


def to_dataset(table: TokenTable):
    from datasets import Dataset

    rows = []
    masks = []
    for row, prompt in enumerate(table.prompt_lengths.tolist()):
        ids = table.ids[table.offsets[row] : table.offsets[row + 1]].tolist()
        rows.append(ids)
        masks.append([0] * prompt + [1] * (len(ids) - prompt))  # The completion is supervised.
    return Dataset.from_dict({"input_ids": rows, "completion_mask": masks})


# ---- LLaMA-Factory -------------------------------------------------------------------------------


def run_llamafactory(arguments: argparse.Namespace, recompute: str) -> dict:
    """Train on a file of the same prompts and completions, in a process of that interpreter."""
    config = read_config(arguments, recompute)
    folder = arguments.work / f"llamafactory-{recompute}"
    folder.mkdir()
    write_rows(config, folder)
    settings = folder / "settings.json"
    output = folder / "figures.json"
    settings.write_text(json.dumps(choose_settings(arguments, config, folder)), encoding="utf-8")
    # Its interpreter has other versions of the libraries, so nothing is shared but files.
    driver = Path(__file__).with_name("llamafactory_train.py")
    command = [arguments.llamafactory, driver, settings, output]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(
            f"LLaMA-Factory ended with code {done.returncode}: {last_line(done.stderr)}"
        )
    figures = json.loads(output.read_text(encoding="utf-8"))
    table = prepare_table(config)
    tokens = int(table.lengths.sum())
    supervised = int(table.supervised.sum())
    # Rates compare only if no template or cutoff added or removed a token.
    if (figures["tokens"], figures["supervised"]) != (tokens, supervised):
        raise ConfigError(
            f"LLaMA-Factory trained on {figures['tokens']:,} tokens, {figures['supervised']:,}"
            f" supervised; the others on {tokens:,} and {supervised:,}"
        )
    times = figures["times"]
    return {
        "tokens_per_second": compute_rate(tokens * arguments.epochs, times, len(times)),
        "losses": figures["losses"],
        "peak_memory_bytes": figures["peak_memory_bytes"],
        "final_loss": measure_adapter(config, folder / "adapter", table),
    }


def write_rows(config: Config, folder: Path) -> None:
    """Write the cleaned rows in LLaMA-Factory's layout."""
    encoder = read_encoder(config)
    read, _ = read_examples(config.data.train[0], "train")
    examples, _ = deduplicate([clean(example) for example in read], config.data.deduplicate)
    rows = []
    for example in examples:
        prompt = render(example, encoder.style, encoder.completion)
        # The template "empty" is asked for below, so the end token must be part of the answer.
        answer = prompt.completion + encoder.tokenizer.eos_token
        rows.append({"instruction": prompt.user, "input": "", "output": answer})
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    index = {"rows": {"file_name": "rows.json"}}
    (folder / "dataset_info.json").write_text(json.dumps(index), encoding="utf-8")


def choose_settings(arguments: argparse.Namespace, config: Config, folder: Path) -> dict:
    training = config.training
    return {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": config.model.base,
        "quantization_bit": 4,
        "quantization_method": "bnb",
        "double_quantization": True,
        "finetuning_type": "lora",
        "lora_target": "all",
        "lora_rank": config.lora.r,
        "lora_alpha": config.lora.alpha,
        "lora_dropout": config.lora.dropout,
        "dataset": "rows",
        "dataset_dir": str(folder),
        "template": "empty",
        # With packing this is the length of a pack. Neat packing keeps its documents apart.
        "cutoff_len": training.max_tokens_per_batch,
        "packing": True,
        "neat_packing": True,
        "flash_attn": "sdpa",
        "overwrite_cache": True,
        "output_dir": str(folder / "adapter"),
        "save_strategy": "no",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": arguments.epochs,
        "learning_rate": training.lr,
        "lr_scheduler_type": "constant",
        "max_grad_norm": training.max_grad_norm,
        "optim": "adamw_torch",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": arguments.dtype == "bfloat16",
        "use_cpu": DEVICE.type == "cpu",
        "disable_gradient_checkpointing": training.gradient_checkpointing == "none",
    }


RUNS = {
    "trl": run_trl,
    "trl with liger": functools.partial(run_trl, liger=True),
    "llamafactory": run_llamafactory,
    "ours": run_ours,
}

if __name__ == "__main__":
    run_command(main)
