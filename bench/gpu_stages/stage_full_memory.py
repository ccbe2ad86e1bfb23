"""A true out-of-memory in training: the micro-batch halves once, the global batch and the losses
stay.

The process may take three quarters of what the same run took before. On a CPU, which has no such
bound, the error is raised by hand.
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

import torch
from transformers import AutoConfig, LlamaForCausalLM

from medqlora.training.gpu_stage import Stage

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "recipes" / "demo"
SHARE = 0.75
# One of these runs before the recipe: it bounds the process's memory, or raises the error where a
# micro-batch has too many tokens.
BOUND = "torch.cuda.set_per_process_memory_fraction({share})"
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
            most = max(row["peak_reserved_bytes"] for row in whole)
            before = BOUND.format(
                share=SHARE * most / torch.cuda.get_device_properties(0).total_memory
            )
        halved = train(stage, "halved", work, tokens, before)
        pairs = list(zip(whole, halved, strict=True))
        stage.check(
            "largest relative difference of a loss",
            max(abs(a["loss"] - b["loss"]) / a["loss"] for a, b in pairs),
            2e-2,
        )
        # A gradient that the failed step left behind would show here.
        stage.check(
            "largest relative difference of a gradient norm",
            max(abs(a["grad_norm"] - b["grad_norm"]) / a["grad_norm"] for a, b in pairs),
            5e-2,
        )
        stage.figure(
            "peak_memory_bytes",
            {"whole": whole[-1]["peak_memory_bytes"], "halved": halved[-1]["peak_memory_bytes"]},
        )
    return stage.finish()


def make_model(folder: Path, small: bool) -> None:
    """A random model with the demonstration's tokenizer, whose activations are most of its
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
    for path in (DEMO / "base").iterdir():
        if path.name.startswith(("tokenizer", "special_tokens", "chat_template")):
            shutil.copy(path, folder)


def train(stage: Stage, name: str, work: Path, tokens: int, before: str) -> list[dict]:
    data = json.dumps(
        [{"format": "medmcqa", "path": str(DEMO / "data" / "train.jsonl"), "limit": 3000}]
    )
    flags = [
        "--model.base",
        work / "base",
        "--data.train",
        data,
        "--data.eval",
        "[]",
        "--data.test",
        "[]",
        "--data.cache_dir",
        work / "cache",
        "--output_dir",
        work / name,
        "--training.max_steps",
        3,
        "--training.global_batch_tokens",
        tokens,
        "--training.max_tokens_per_batch",
        tokens,
        "--training.gradient_checkpointing",
        "none",
        "--training.warmup_steps",
        0,
        "--training.lr",
        "1e-4",
    ]
    environ = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    if stage.small:
        environ["CUDA_VISIBLE_DEVICES"] = ""
    command = [
        sys.executable,
        "-c",
        RUN.format(before=before),
        str(ROOT / "recipes" / "sft_qlora.py"),
        *map(str, flags),
    ]
    done = subprocess.run(
        command, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    stage.check(f"{name}: exit code", done.returncode, 0)
    if done.returncode:
        stage.figure(f"{name}: output", (done.stdout[-1500:] + done.stderr[-2500:]).splitlines())
        sys.exit(stage.finish())
    stage.check(
        f"{name}: halvings over or under what is expected",
        abs(done.stdout.count("out of memory: micro-batches of") - bool(before)),
        0,
    )
    return [json.loads(line) for line in (work / name / "train_log.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    sys.exit(main())
