"""Tokens per second and peak memory of this project's recipe against other trainers: same NF4
model, rows and settings.

    python bench/peers/sft.py --tokenizer DIR --data medmcqa/train.jsonl [--dtype float32] \\
        [--json FILE]
    python bench/peers/sft.py --tokenizer DIR --data medmcqa/train.jsonl \\
        --llamafactory OTHER_ENVIRONMENT/bin/python

Builds a random Llama (build_base.py; 74M parameters by default), then trains it in one process per
contestant: TRL packed (best-fit, padding-free) with and without recomputation; LLaMA-Factory packed
("neat packing", sdpa) likewise, where an interpreter that has it is given; and ours with full
recomputation and as our planner chooses. TRL's head runs at labelled positions only ("compact"),
which TRL 1.16 does by itself on a GPU alone; on a CPU it is switched on. Where liger-kernel is
installed and a GPU is here, TRL runs with it too. All see the same tokens; the trained adapters'
loss on the first rows is computed by the same code. On a GPU where there is one (not tried yet),
else on the CPU. Only ratios of one run on one machine mean something. Needs `pip install
trl==1.16.0`.
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

import numpy as np
import torch
from transformers import AutoTokenizer

from medqlora.batches.collate import collate
from medqlora.batches.pipeline import prepare
from medqlora.core.command import run_command
from medqlora.core.config_loading import load_config
from medqlora.core.environment import MemoryMeter, describe_environment, name_command
from medqlora.core.errors import ConfigError
from medqlora.core.files import check_new, write_json
from medqlora.data.cleaning import clean, deduplicate
from medqlora.data.reading import read_examples
from medqlora.model.adapter import load_adapter
from medqlora.model.attention.packed_batch import move_batch
from medqlora.model.base import load_base
from medqlora.model.hardware import DTYPES, default_device
from medqlora.model.head_loss import AnswerLoss
from medqlora.prompts.chat_template import make_encoder
from medqlora.prompts.styles import render

RECIPE = Path(__file__).parents[2] / "recipes" / "sft_qlora.py"
WARM_UP = 2  # steps left out of the rate
MEASURED = 100  # rows on which the trained adapters are compared
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
DEVICE = default_device()


def settings(arguments: argparse.Namespace, base: Path, work: Path, recompute: str) -> list[str]:
    """The recipe's flags; TRL gets the same values from the same configuration."""
    data = json.dumps([{"format": "medmcqa", "path": str(arguments.data), "limit": arguments.rows}])
    return [
        "--model.base",
        str(base),
        "--model.dtype",
        arguments.dtype,
        "--data.train",
        data,
        "--data.prompt_style",
        "plain",
        "--data.completion",
        "letter_text",
        "--data.max_length",
        "1024",
        "--data.cache_dir",
        str(work / "cache"),
        "--data.eval",
        "[]",
        "--data.test",
        "[]",
        "--training.epochs",
        str(arguments.epochs),
        "--training.max_tokens_per_batch",
        "2048",
        "--training.global_batch_tokens",
        "2048",
        "--training.lr",
        "2e-4",
        "--training.scheduler",
        "constant",
        "--lora.r",
        "16",
        "--lora.alpha",
        "32",
        "--training.warmup_steps",
        "0",
        "--training.gradient_checkpointing",
        recompute,
    ]


def run_ours(arguments: argparse.Namespace, base: Path, work: Path, recompute: str) -> dict:
    output = work / f"run-{recompute}"
    sys.argv = [
        str(RECIPE),
        "--output_dir",
        str(output),
        *settings(arguments, base, work, recompute),
    ]
    try:
        runpy.run_path(str(RECIPE), run_name="__main__")
    except SystemExit as stop:
        if stop.code:
            raise
    rows = [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    timed = rows[WARM_UP:]
    seconds = sum(row["tokens"] / row["tokens_per_second"] for row in timed)
    found = {
        "tokens_per_second": sum(row["tokens"] for row in timed) / seconds,
        "losses": [row["loss"] for row in rows],
    }
    found["peak_memory_bytes"] = MemoryMeter(DEVICE.type == "cuda").read_peak()
    config = load_config(
        RECIPE.parent / "configs" / "demo.yaml", settings(arguments, base, work, recompute)
    )
    model = load_adapter(load_base(config.model, DEVICE)[0], output / "adapter")
    return found | {"final_loss": measure_loss(model, prepare_table(config, base))}


def prepare_table(config, base: Path):
    return prepare(
        config, make_encoder(AutoTokenizer.from_pretrained(base), "plain", "letter_text")
    ).train


@torch.no_grad()
def measure_loss(model, table) -> float:
    """Mean loss per supervised token of the first rows, each alone, whoever trained the model."""
    loss_model = AnswerLoss(model, 1024).eval()
    rows = range(min(MEASURED, len(table.lengths)))
    total = sum(
        loss_model(**move_batch(collate(table, np.array([row])), "sdpa", DEVICE)).item()
        for row in rows
    )
    return total / int(table.supervised[list(rows)].sum())


def run_trl(
    arguments: argparse.Namespace, base: Path, work: Path, recompute: str, liger: bool = False
) -> dict:
    import trl.trainer.utils
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    asked = []  # what decides whether the head runs at labelled positions only, and nothing else
    trl.trainer.utils._use_triton = lambda device: asked.append(device) or True
    config = load_config(
        RECIPE.parent / "configs" / "demo.yaml", settings(arguments, base, work, recompute)
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    table = prepare_table(config, base)
    rows = [
        table.ids[a:b].tolist() for a, b in zip(table.offsets[:-1], table.offsets[1:], strict=True)
    ]
    masks = [
        [0] * int(prompt) + [1] * (len(row) - int(prompt))
        for row, prompt in zip(rows, table.prompt_lengths, strict=True)
    ]
    dtype = DTYPES[arguments.dtype]
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, quantization_config=quantization, device_map={"": DEVICE}
    )
    times = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            # The recipe does so too: loading is not counted.
            MemoryMeter(DEVICE.type == "cuda").begin()

        def on_step_end(self, *args, **kwargs):
            times.append(time.perf_counter())

    half = arguments.dtype == "bfloat16"
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        callbacks=[Clock()],
        train_dataset=Dataset.from_dict({"input_ids": rows, "completion_mask": masks}),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM",
            r=config.lora.r,
            lora_alpha=config.lora.alpha,
            lora_dropout=config.lora.dropout,
            target_modules="all-linear",
        ),
        args=SFTConfig(
            output_dir=str(work / "trl"),
            packing=True,
            max_length=config.training.max_tokens_per_batch,
            per_device_train_batch_size=1,
            completion_only_loss=True,
            num_train_epochs=arguments.epochs,
            learning_rate=config.training.lr,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            gradient_checkpointing=recompute == "full",
            gradient_checkpointing_kwargs={"use_reentrant": False},
            use_cpu=DEVICE.type == "cpu",
            bf16=half,
            use_liger_kernel=liger,
            report_to="none",
            disable_tqdm=True,
            max_grad_norm=config.training.max_grad_norm,
        ),
    )
    tokens = int(table.lengths.sum()) * arguments.epochs
    steps = trainer.get_train_dataloader()
    per_epoch = len(steps)
    trainer.train()
    if not asked:
        raise ConfigError(
            f"trl {version('trl')} does not ask for its compact head as 1.16 does; pip install"
            " trl==1.16.0"
        )
    losses = [float(row["loss"]) for row in trainer.state.log_history if "loss" in row]
    # every step holds a nearly full 2,048-token pack: the part of all tokens after the warm-up is
    # that of the steps
    part = (len(times) - WARM_UP) / (per_epoch * arguments.epochs)
    found = {
        "tokens_per_second": tokens * part / (times[-1] - times[WARM_UP - 1]),
        "losses": losses,
        "peak_memory_bytes": MemoryMeter(DEVICE.type == "cuda").read_peak(),
    }
    return found | {"final_loss": measure_loss(trainer.model, table)}


def run_llamafactory(arguments: argparse.Namespace, base: Path, work: Path, recompute: str) -> dict:
    """The same prompts and completions as a file of LLaMA-Factory's, in a process of its
    interpreter.
    """
    config = load_config(
        RECIPE.parent / "configs" / "demo.yaml", settings(arguments, base, work, recompute)
    )
    encoder = make_encoder(AutoTokenizer.from_pretrained(base), "plain", "letter_text")
    examples, _ = deduplicate(
        [clean(example) for example in read_examples(config.data.train[0], "train")[0]],
        config.data.deduplicate,
    )
    prompts = [render(example, encoder.style, encoder.completion) for example in examples]
    rows = [
        {
            "instruction": prompt.user,
            "input": "",
            "output": prompt.completion + encoder.tokenizer.eos_token,
        }
        for prompt in prompts
    ]
    folder = work / f"llamafactory-{recompute}"
    folder.mkdir()
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "dataset_info.json").write_text(
        json.dumps({"rows": {"file_name": "rows.json"}}), encoding="utf-8"
    )
    chosen = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": str(base),
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
        "cutoff_len": config.training.max_tokens_per_batch,
        "packing": True,
        "neat_packing": True,
        "flash_attn": "sdpa",
        "overwrite_cache": True,
        "output_dir": str(folder / "adapter"),
        "save_strategy": "no",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": arguments.epochs,
        "learning_rate": config.training.lr,
        "lr_scheduler_type": "constant",
        "max_grad_norm": config.training.max_grad_norm,
        "optim": "adamw_torch",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": arguments.dtype == "bfloat16",
        "use_cpu": DEVICE.type == "cpu",
        "disable_gradient_checkpointing": recompute == "none",
    }
    (folder / "settings.json").write_text(json.dumps(chosen), encoding="utf-8")
    driver = Path(__file__).with_name("llamafactory_train.py")
    done = subprocess.run(
        [arguments.llamafactory, driver, folder / "settings.json", folder / "figures.json"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ConfigError(
            f"LLaMA-Factory ended with code {done.returncode}:"
            f" {(done.stderr.strip().splitlines() or ['killed'])[-1][:300]}"
        )
    found = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    table = prepare_table(config, base)
    held = int(table.lengths.sum()), int(table.supervised.sum())
    if (found["tokens"], found["supervised"]) != held:
        raise ConfigError(
            f"LLaMA-Factory trained on {found['tokens']:,} tokens, {found['supervised']:,}"
            f" supervised; the others on {held[0]:,} and {held[1]:,}"
        )
    times = found["times"]
    part = (len(found["times"]) - WARM_UP) / len(found["times"])  # every pack is nearly full
    model = load_adapter(load_base(config.model, DEVICE)[0], folder / "adapter")
    return {
        "tokens_per_second": held[0] * arguments.epochs * part / (times[-1] - times[WARM_UP - 1]),
        "losses": found["losses"],
        "peak_memory_bytes": found["peak_memory_bytes"],
        "final_loss": measure_loss(model, table),
    }


RUNS = {
    "trl": run_trl,
    "trl with liger": functools.partial(run_trl, liger=True),
    "llamafactory": run_llamafactory,
    "ours": run_ours,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        help="folder of a tokenizer with 32k tokens or more",
    )
    parser.add_argument("--data", type=Path, required=True, help="MedMCQA file")
    parser.add_argument("--rows", type=int, default=500, help="rows to train on (default 500)")
    parser.add_argument("--epochs", type=int, default=1, help="passes over them (default 1)")
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
        help="of the random model (default %(default)s)",
    )
    parser.add_argument(
        "--repetitions",
        type=int,
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
        run = RUNS[arguments.contestant.partition(",")[0]]
        figures = run(
            arguments, arguments.work / "base", arguments.work, CONTESTANTS[arguments.contestant]
        )
        (arguments.work / f"{arguments.contestant}.json").write_text(json.dumps(figures))
        return
    check_new(arguments.json, "--json")
    if arguments.rows < 100 or arguments.epochs < 1 or arguments.repetitions < 1:
        given = (
            f"--rows {arguments.rows} --epochs {arguments.epochs} --repetitions"
            f" {arguments.repetitions}"
        )
        raise ConfigError(
            f"{given}: expected 100 rows or more, for a few steps after {WARM_UP} of warming up,"
            " and an epoch and a repetition or more"
        )
    for path in (arguments.tokenizer, arguments.data):
        if not path.exists():
            raise ConfigError(f"{path}: not here; expected a tokenizer's folder and a MedMCQA file")
    versions = (
        {"llamafactory": find_version(arguments.llamafactory)} if arguments.llamafactory else {}
    )
    if importlib.util.find_spec("trl") is None:
        raise ConfigError("trl is not installed here; pip install trl==1.16.0")
    versions["trl"] = version("trl")
    if DEVICE.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None:
        versions["trl with liger"] = version("liger-kernel")
    with tempfile.TemporaryDirectory() as folder:
        compete(arguments, Path(folder), versions)


def find_version(interpreter: str) -> str:
    """Raises ConfigError: no llamafactory there."""
    command = [
        interpreter,
        "-c",
        "import importlib.metadata as m; print(m.version('llamafactory'))",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        raise ConfigError(
            f"--llamafactory {interpreter}: no interpreter with llamafactory; pip install"
            " llamafactory==0.9.5 in an environment of its own"
        ) from None


def add_ratios(results: dict[str, dict]) -> None:
    """Rates and memory against TRL at its fastest."""
    best = max(
        (figures for name, figures in results.items() if name.startswith("trl")),
        key=lambda figures: figures["tokens_per_second"],
    )
    for figures in results.values():
        figures["tokens_per_second_ratio"] = (
            figures["tokens_per_second"] / best["tokens_per_second"]
        )
        figures["peak_memory_ratio"] = figures["peak_memory_bytes"] / best["peak_memory_bytes"]


def compete(arguments: argparse.Namespace, work: Path, versions: dict[str, str]) -> None:
    """Every contestant in a process of its own; figures are kept as they come; ratios are to TRL at
    its fastest.
    """
    build = [
        sys.executable,
        str(Path(__file__).with_name("build_base.py")),
        "--tokenizer",
        str(arguments.tokenizer),
        "--output",
        str(work / "base"),
        "--shape",
        arguments.shape,
    ]
    subprocess.run(build, check=True)
    environment = describe_environment()
    environment["versions"] |= versions
    chosen = {
        name: getattr(arguments, name)
        for name in ("rows", "epochs", "dtype", "shape", "repetitions")
    } | {"data": arguments.data.name, "tokenizer": arguments.tokenizer.name}
    results: dict[str, dict] = {}
    names = [name for name in CONTESTANTS if name.partition(",")[0] in (*versions, "ours")]
    for name in names * arguments.repetitions:
        command = [
            sys.executable,
            __file__,
            *sys.argv[1:],
            "--contestant",
            name,
            "--work",
            str(work),
        ]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise ConfigError(
                f"{name} ended with code {done.returncode}:"
                f" {(done.stderr.strip().splitlines() or ['killed'])[-1][:300]}"
            )
        figures = json.loads((work / f"{name}.json").read_text())
        results[name] = figures | {
            "rates": [*results.get(name, {}).get("rates", []), figures["tokens_per_second"]]
        }
        results[name]["tokens_per_second"] = statistics.median(results[name]["rates"])
        for folder in ("run", "llamafactory"):  # The next repetition begins anew.
            shutil.rmtree(work / f"{folder}-{CONTESTANTS[name]}", ignore_errors=True)
        add_ratios(results)
        if arguments.json:
            write_json(
                arguments.json,
                {
                    "command": name_command("bench/peers/sft.py", sys.argv[1:]),
                    "settings": chosen,
                    "environment": environment,
                    "results": results,
                },
            )
    for name, figures in results.items():
        print(
            f"{name}: {figures['tokens_per_second_ratio']:.2f} x the tokens/s of TRL at its"
            f" fastest, {figures['peak_memory_ratio']:.2f} x its peak memory; first loss"
            f" {figures['losses'][0]:.3f}, of the trained adapter {figures['final_loss']:.4f},"
            f" {len(figures['losses'])} steps"
        )


if __name__ == "__main__":
    run_command(main)
