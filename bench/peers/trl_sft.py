"""Tokens per second and peak memory of this project's recipe against TRL's SFTTrainer: same NF4 model, rows and settings.

    python bench/peers/trl_sft.py --tokenizer DIR --data medmcqa/train.jsonl [--dtype float32] [--json FILE]

Builds a random 74M-parameter Llama (build_base.py), then trains it in one process per contestant: TRL packed (best-fit,
padding-free) with and without recomputation, and ours with full recomputation and as our planner chooses. TRL's head runs at labelled
positions only ("compact"), which TRL 1.16 does by itself on a GPU alone; here it is switched on. All see the same tokens; the trained
adapters' loss on the first rows is computed by the same code. Only ratios of one run on one machine mean something. Needs
`pip install trl==1.16.0`.
"""

import argparse
import importlib.util
import json
import runpy
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from medqlora.attention import move_batch
from medqlora.config import ConfigError, UserError, load_config
from medqlora.losses import AnswerLoss
from medqlora.models import DTYPES, load_adapter, load_base
from medqlora.packing import collate
from medqlora.preparation import prepare
from medqlora.runs import check_new, describe_environment, name_command, read_peak_resident, write_json
from medqlora.tokens import make_encoder

RECIPE = Path(__file__).parents[2] / "recipes" / "sft_qlora.py"
WARM_UP = 2  # steps left out of the rate
MEASURED = 100  # rows on which the trained adapters are compared
CONTESTANTS = {"trl, full recomputation": "full", "trl, none": "none", "ours, full recomputation": "full", "ours, as planned": "auto"}


def settings(arguments: argparse.Namespace, base: Path, work: Path, recompute: str) -> list[str]:
    """The recipe's flags; TRL gets the same values from the same configuration."""
    data = json.dumps([{"format": "medmcqa", "path": str(arguments.data), "limit": arguments.rows}])
    return [
        "--model.base", str(base), "--model.dtype", arguments.dtype, "--data.train", data, "--data.prompt_style", "plain",
        "--data.completion", "letter_text", "--data.max_length", "1024", "--data.cache_dir", str(work / "cache"), "--data.eval", "[]",
        "--data.test", "[]", "--training.epochs", str(arguments.epochs), "--training.max_tokens_per_batch", "2048",
        "--training.global_batch_tokens", "2048", "--training.lr", "2e-4", "--training.scheduler", "constant", "--lora.r", "16",
        "--lora.alpha", "32", "--training.warmup_steps", "0", "--training.gradient_checkpointing", recompute,
    ]  # fmt: skip


def run_ours(arguments: argparse.Namespace, base: Path, work: Path, recompute: str) -> dict:
    output = work / f"run-{recompute}"
    sys.argv = [str(RECIPE), "--output_dir", str(output), *settings(arguments, base, work, recompute)]
    try:
        runpy.run_path(str(RECIPE), run_name="__main__")
    except SystemExit as stop:
        if stop.code:
            raise
    rows = [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    timed = rows[WARM_UP:]
    seconds = sum(row["tokens"] / row["tokens_per_second"] for row in timed)
    found = {"tokens_per_second": sum(row["tokens"] for row in timed) / seconds, "losses": [row["loss"] for row in rows]}
    found["peak_memory_bytes"] = read_peak_resident()
    config = load_config(RECIPE.parent / "configs" / "demo.yaml", settings(arguments, base, work, recompute))
    model = load_adapter(load_base(config.model, torch.device("cpu"))[0], output / "adapter")
    return found | {"final_loss": measure_loss(model, prepare_table(config, base))}


def prepare_table(config, base: Path):
    return prepare(config, make_encoder(AutoTokenizer.from_pretrained(base), "plain", "letter_text")).train


@torch.no_grad()
def measure_loss(model, table) -> float:
    """Mean loss per supervised token of the first rows, each alone, whoever trained the model."""
    loss_model = AnswerLoss(model, 1024).eval()
    rows = range(min(MEASURED, len(table.lengths)))
    total = sum(loss_model(**move_batch(collate(table, np.array([row])), "sdpa", torch.device("cpu"))).item() for row in rows)
    return total / int(table.supervised[list(rows)].sum())


def run_trl(arguments: argparse.Namespace, base: Path, work: Path, recompute: str) -> dict:
    import trl.trainer.utils
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    asked = []  # what decides whether the head runs at labelled positions only, and nothing else
    trl.trainer.utils._use_triton = lambda device: asked.append(device) or True
    config = load_config(RECIPE.parent / "configs" / "demo.yaml", settings(arguments, base, work, recompute))
    tokenizer = AutoTokenizer.from_pretrained(base)
    table = prepare_table(config, base)
    rows = [table.ids[a:b].tolist() for a, b in zip(table.offsets[:-1], table.offsets[1:], strict=True)]
    masks = [[0] * int(prompt) + [1] * (len(row) - int(prompt)) for row, prompt in zip(rows, table.prompt_lengths, strict=True)]
    dtype = DTYPES[arguments.dtype]
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, quantization_config=quantization, device_map={"": "cpu"})
    times = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            times.append(time.perf_counter())

    half = arguments.dtype == "bfloat16"
    trainer = SFTTrainer(
        model=model, processing_class=tokenizer, callbacks=[Clock()],
        train_dataset=Dataset.from_dict({"input_ids": rows, "completion_mask": masks}),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear"),
        args=SFTConfig(
            output_dir=str(work / "trl"), packing=True, max_length=2048, per_device_train_batch_size=1, completion_only_loss=True,
            num_train_epochs=arguments.epochs, learning_rate=2e-4, lr_scheduler_type="constant", logging_steps=1, save_strategy="no",
            gradient_checkpointing=recompute == "full", gradient_checkpointing_kwargs={"use_reentrant": False}, use_cpu=True,
            bf16=half, report_to="none", disable_tqdm=True, max_grad_norm=1.0,
        ),
    )  # fmt: skip
    tokens = int(table.lengths.sum()) * arguments.epochs
    steps = trainer.get_train_dataloader()
    per_epoch = len(steps)
    trainer.train()
    if not asked:
        raise ConfigError(f"trl {version('trl')} does not ask for its compact head as 1.16 does; pip install trl==1.16.0")
    losses = [float(row["loss"]) for row in trainer.state.log_history if "loss" in row]
    # every step holds a nearly full 2,048-token pack: the part of all tokens after the warm-up is that of the steps
    part = (len(times) - WARM_UP) / (per_epoch * arguments.epochs)
    found = {"tokens_per_second": tokens * part / (times[-1] - times[WARM_UP - 1]), "losses": losses, "peak_memory_bytes": read_peak_resident()}
    return found | {"final_loss": measure_loss(trainer.model, table)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a tokenizer with 32k tokens or more")
    parser.add_argument("--data", type=Path, required=True, help="MedMCQA file")
    parser.add_argument("--rows", type=int, default=500, help="rows to train on (default 500)")
    parser.add_argument("--epochs", type=int, default=1, help="passes over them (default 1)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="compute dtype (default float32)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--contestant", choices=list(CONTESTANTS), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        run = run_trl if arguments.contestant.startswith("trl") else run_ours
        figures = run(arguments, arguments.work / "base", arguments.work, CONTESTANTS[arguments.contestant])
        (arguments.work / f"{arguments.contestant}.json").write_text(json.dumps(figures))
        return
    check_new(arguments.json, "--json")
    for path in (arguments.tokenizer, arguments.data):
        if not path.exists():
            raise ConfigError(f"{path}: not here; expected a tokenizer's folder and a MedMCQA file")
    if importlib.util.find_spec("trl") is None:
        raise ConfigError("trl is not installed here; pip install trl==1.16.0")
    with tempfile.TemporaryDirectory() as folder:
        results = compete(arguments, Path(folder))
    for name, figures in results.items():
        print(
            f"{name}: {figures['tokens_per_second_ratio']:.2f} x the tokens/s of TRL at its fastest, {figures['peak_memory_ratio']:.2f} x its peak memory; "
            f"first loss {figures['losses'][0]:.3f}, of the trained adapter {figures['final_loss']:.4f}, {len(figures['losses'])} steps"
        )
    if arguments.json:
        environment = describe_environment()
        environment["versions"]["trl"] = version("trl")
        chosen = {name: getattr(arguments, name) for name in ("rows", "epochs", "dtype")} | {"data": arguments.data.name, "tokenizer": arguments.tokenizer.name}
        write_json(arguments.json, {"command": name_command("bench/peers/trl_sft.py", sys.argv[1:]), "settings": chosen, "environment": environment, "results": results})


def compete(arguments: argparse.Namespace, work: Path) -> dict[str, dict]:
    """Every contestant in a process of its own; -> figures by name, with ratios to TRL at its fastest."""
    build = [sys.executable, str(Path(__file__).with_name("build_base.py")), "--tokenizer", str(arguments.tokenizer), "--output", str(work / "base")]
    subprocess.run(build, check=True)
    results = {}
    for name in CONTESTANTS:
        command = [sys.executable, __file__, *sys.argv[1:], "--contestant", name, "--work", str(work)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise ConfigError(f"{name} ended with code {done.returncode}: {(done.stderr.strip().splitlines() or ['killed'])[-1][:300]}")
        results[name] = json.loads((work / f"{name}.json").read_text())
    best = max((figures for name, figures in results.items() if name.startswith("trl")), key=lambda figures: figures["tokens_per_second"])
    for figures in results.values():
        figures["tokens_per_second_ratio"] = figures["tokens_per_second"] / best["tokens_per_second"]
        figures["peak_memory_ratio"] = figures["peak_memory_bytes"] / best["peak_memory_bytes"]
    return results


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
