"""A real out-of-memory error in training: the micro-batch is halved once, and the global batch and
the losses stay the same.

The process may take three quarters of the memory that the same run took before. A CPU has no such
bound, so there the error is raised by hand.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from medqlora.core.environment import prefer_expandable_segments

prefer_expandable_segments(os.environ)  # torch reads this variable when it is imported.

import numpy as np
import torch
from transformers import AutoConfig, LlamaForCausalLM

from medqlora.training.gpu_stage import Stage

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "recipes" / "demo"
# This share is meant to be too small for a whole micro-batch and large enough for half of one.
SHARE = 0.75
# One of these two runs before the recipe. The first bounds the process's memory; the second raises
# the error where a micro-batch has too many tokens.
BOUND = "torch.cuda.set_per_process_memory_fraction({share})"
# The second one lets a forecast pass, which calls the same method on the meta device.
RAISE = """
from medqlora.model import head_loss
plain = head_loss.AnswerLoss.forward
def refuse(self, input_ids, **more):
    if torch.is_grad_enabled() and not input_ids.is_meta and input_ids.shape[1] > {tokens}:
        raise torch.OutOfMemoryError("raised by hand")
    return plain(self, input_ids=input_ids, **more)
head_loss.AnswerLoss.forward = refuse
"""
RUN = (
    "import runpy, sys, torch\n{before}\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0],"
    " run_name='__main__')\n"
)


def main() -> int:
    stage = Stage.from_arguments(sys.argv[1:], __doc__)
    tokens = 512 if stage.small else 16_384
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_model(work / "base", stage.small)
        whole = train(stage, "whole", work, tokens, "")
        if stage.small:
            before = RAISE.format(tokens=tokens // 2)
        else:
            # torch takes the bound as a fraction of the GPU, and it applies to what the allocator
            # reserves and not to what tensors hold.
            most = max(row["peak_reserved_bytes"] for row in whole)
            total = torch.cuda.get_device_properties(0).total_memory
            before = BOUND.format(share=SHARE * most / total)
        halved = train(stage, "halved", work, tokens, before)
    # Halving changes the order of sums but not the rows of a step, so the losses must stay.
    loss = largest_difference(whole, halved, "loss")
    stage.check("largest relative difference of a loss", loss, 2e-2)
    # A gradient that the failed step left behind would show here.
    norm = largest_difference(whole, halved, "grad_norm")
    stage.check("largest relative difference of a gradient norm", norm, 5e-2)
    stage.figure(
        "peak_memory_bytes",
        {"whole": whole[-1]["peak_memory_bytes"], "halved": halved[-1]["peak_memory_bytes"]},
    )
    return stage.finish()


def largest_difference(rows: list[dict], others: list[dict], key: str) -> float:
    pairs = zip(rows, others, strict=True)
    # Python's max() would pass over NaN.
    return float(np.max([abs(row[key] - other[key]) / row[key] for row, other in pairs]))


def make_model(folder: Path, small: bool) -> None:
    """Write a random model with the demonstration's tokenizer. Activations are most of its
    memory.
    """
    config = AutoConfig.from_pretrained(DEMO / "base")
    if not small:
        config.update(
            {
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 6,
                "num_attention_heads": 16,
                "num_key_value_heads": 4,
                "head_dim": 64,
            }
        )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    # The shape is new and the vocabulary is not, so the tokenizer fits.
    for path in (DEMO / "base").iterdir():
        if path.name.startswith(("tokenizer", "special_tokens", "chat_template")):
            shutil.copy(path, folder)


def train(stage: Stage, name: str, work: Path, tokens: int, before: str) -> list[dict]:
    """Run the recipe -> the rows of its log.

    Args:
        tokens: of the micro-batch, which is the whole global batch.
        before: code that runs first.
    """
    entry = {"format": "medmcqa", "path": str(DEMO / "data" / "train.jsonl"), "limit": 3000}
    # The global batch is one micro-batch and nothing is recomputed. A step's activations then fill
    # the memory, and halving is the only way out.
    flags = [
        f"--model.base={work / 'base'}",
        f"--data.train={json.dumps([entry])}",
        "--data.eval=[]",
        "--data.test=[]",
        f"--data.cache_dir={work / 'cache'}",
        f"--output_dir={work / name}",
        "--training.max_steps=3",
        f"--training.global_batch_tokens={tokens}",
        f"--training.max_tokens_per_batch={tokens}",
        "--training.gradient_checkpointing=none",
        "--training.warmup_steps=0",
        "--training.lr=1e-4",
    ]
    environ = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    if stage.small:
        environ["CUDA_VISIBLE_DEVICES"] = ""
    recipe = str(ROOT / "recipes" / "sft_qlora.py")
    command = [sys.executable, "-c", RUN.format(before=before), recipe, *flags]
    done = subprocess.run(
        command, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    stage.check(f"{name}: exit code", done.returncode, 0)
    if done.returncode:
        stage.figure(f"{name}: output", (done.stdout[-1500:] + done.stderr[-2500:]).splitlines())
        sys.exit(stage.finish())
    # One halving is expected where memory is bounded, and none elsewhere.
    halvings = done.stdout.count("out of memory: training continues with micro-batches of")
    stage.check(f"{name}: halvings over or under what is expected", abs(halvings - bool(before)), 0)
    return [json.loads(line) for line in (work / name / "train_log.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    sys.exit(main())
