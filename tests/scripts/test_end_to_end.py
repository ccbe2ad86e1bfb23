"""The real commands on the embedded demonstration: train, kill, resume, stop, merge, predict,
score, and every user mistake.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import warm_processes
from conftest import DEMO, ROOT, run_inside, run_script

RECIPE = ROOT / "recipes" / "sft_qlora.py"
STEPS = 24


def flags(output: Path, cache: Path, *more: str) -> list[str]:
    """A short run of the demonstration with dropout, evaluation and checkpoints."""
    test = json.dumps(
        [{"format": "medmcqa", "path": str(DEMO / "data" / "test.jsonl"), "limit": 60}]
    )
    return [
        str(RECIPE),
        "--output_dir",
        str(output),
        "--data.cache_dir",
        str(cache),
        "--data.test",
        test,
        "--data.train.0.limit",
        "600",
        "--data.eval.0.limit",
        "60",
        "--training.max_steps",
        str(STEPS),
        "--training.gradient_checkpointing",
        "none",
        "--training.max_tokens_per_batch",
        "512",
        "--training.global_batch_tokens",
        "1024",
        "--training.eval_steps",
        "6",
        "--training.save_steps",
        "4",
        "--lora.dropout",
        "0.1",
        *more,
    ]


def losses(output: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row] + [
        (row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("finished")
    done = run_script(*flags(folder / "run", folder / "cache"))
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_run_folder_is_complete(finished):
    run = finished[0] / "run"
    shown = finished[1]
    for name in (
        "config.yaml",
        "environment.json",
        "train_log.jsonl",
        "removed.jsonl",
        "metrics.json",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/medqlora.json",
        "predictions/base.jsonl",
        "predictions/tuned.jsonl",
    ):
        assert (run / name).is_file(), name
    rows = [json.loads(line) for line in (run / "train_log.jsonl").read_text().splitlines()]
    keys = {
        "step",
        "epoch",
        "loss",
        "lr",
        "grad_norm",
        "tokens",
        "supervised_tokens",
        "padding_fraction",
        "tokens_per_second",
        "peak_memory_bytes",
    }
    assert all(keys <= set(row) for row in rows if "loss" in row)
    assert all({"step", "eval_loss", "perplexity"} <= set(row) for row in rows if "loss" not in row)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    metrics = json.loads((run / "metrics.json").read_text())
    assert {
        "n",
        "accuracy",
        "accuracy_ci95",
        "unparsed",
        "letter_mass",
        "ece",
        "per_subject",
        "base",
        "comparison",
        "memory_bytes",
    } <= set(metrics)
    assert metrics["n"] == 60
    metadata = json.loads((run / "adapter" / "medqlora.json").read_text())
    assert {"prompt_style", "prompt_sha256", "base", "quantization"} <= set(metadata)
    environment = json.loads((run / "environment.json").read_text())
    assert {
        "versions",
        "git_commit",
        "hardware",
        "seed",
        "data_sha256",
        "prompt_sha256",
        "plan_sha256",
    } <= set(environment)
    for part in ("95 % interval", "McNemar p", "memory of this process", "isolates packed rows"):
        assert part in " ".join(shown.split())


def test_loss_falls(finished):
    values = [loss for _, loss in losses(finished[0] / "run")][:STEPS]
    assert sum(values[-4:]) < sum(values[:4])


# A step takes a fifth of a second at least: so a kill or a signal finds the training unfinished.
SLOW = """
import runpy, sys, time
from medqlora.training import session
update = session.Session.update
def slow(self, lr):
    time.sleep(0.2)
    return update(self, lr)
session.Session.update = slow
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_killed_at_random_moments_and_resumed_equals_uninterrupted(finished, tmp_path):
    """kill -9, wherever it is (a save included), then --resume, until the run is through: the
    losses are the same bits.
    """
    expected = losses(finished[0] / "run")
    chance = random.Random(int(os.environ.get("MEDQLORA_KILL_SEED", "0")))
    kills = 0
    wanted = int(os.environ.get("MEDQLORA_KILLS", "1"))
    for _ in range(12):
        resume = ["--resume"] if (tmp_path / "run").exists() else []
        arguments = [*flags(tmp_path / "run", finished[0] / "cache"), *resume]
        log = tmp_path / "run" / "train_log.jsonl"
        seen = log.stat().st_size if log.exists() else 0
        if kills < wanted:
            process = warm_processes.start(["-c", SLOW, *arguments], ROOT)
            while process.poll() is None and (not log.exists() or log.stat().st_size <= seen):
                time.sleep(0.02)
            time.sleep(chance.uniform(0, 1.2))
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
        else:
            process = warm_processes.start(arguments, ROOT)
        _, complaint = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, complaint
    assert kills > 0
    assert losses(tmp_path / "run") == expected
    for name in ("adapter/adapter_model.safetensors", "predictions/tuned.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (
            finished[0] / "run" / name
        ).read_bytes(), name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_writes_a_checkpoint_and_resumes(finished, tmp_path, number):
    arguments = flags(tmp_path / "run", finished[0] / "cache", "--training.save_steps", "1000")
    process = warm_processes.start(["-c", SLOW, *arguments], ROOT)
    log = tmp_path / "run" / "train_log.jsonl"
    while process.poll() is None and not log.exists():
        time.sleep(0.05)
    process.send_signal(number)
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert "continue with --resume" in shown
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    step = int(saved.name[5:])
    assert 1 <= step < STEPS
    done = run_script(*arguments, "--resume")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == losses(finished[0] / "run")


def test_damaged_newest_checkpoint_falls_back(finished, tmp_path):
    shutil.copytree(finished[0] / "run", tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / f"step-{STEPS}"
    os.truncate(newest / "optimizer.pt", 100)
    done = run_script(*flags(tmp_path / "run", finished[0] / "cache"), "--resume")
    assert done.returncode == 0, done.stderr
    assert "damaged" in done.stdout
    assert losses(tmp_path / "run") == losses(finished[0] / "run")


PATCHED = """
import runpy, sys, torch
from medqlora.model import head_loss
forward, calls = head_loss.AnswerLoss.forward, []
def patched(self, **batch):
    calls.append(batch["input_ids"].shape[1])
    {body}
    return forward(self, **batch)
head_loss.AnswerLoss.forward = patched
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_patched(body: str, arguments: list[str]) -> subprocess.CompletedProcess:
    return run_script("-c", PATCHED.format(body=body), *arguments)


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_global_batch(finished, tmp_path):
    body = (
        "if torch.is_grad_enabled() and calls[-1] > 256: raise torch.OutOfMemoryError('too much')"
    )
    plain = ["--lora.dropout", "0", "--model.dtype", "float32", "--training.max_steps", "8"]
    done = run_patched(body, flags(tmp_path / "run", finished[0] / "cache", *plain))
    assert done.returncode == 0, done.stderr
    assert "micro-batches of 256 tokens" in done.stdout
    whole = run_script(*flags(tmp_path / "whole", finished[0] / "cache", *plain))
    assert whole.returncode == 0, whole.stderr
    for (step, halved), (_, expected) in zip(
        losses(tmp_path / "run"), losses(tmp_path / "whole"), strict=True
    ):
        assert halved == pytest.approx(expected, rel=1e-4), step


ALIVE = """
import runpy, sys, weakref, torch
from medqlora.model import fused_layers, overrides, reference
kept, calls = [], []
forward, backward = fused_layers.GatedActivation.forward, fused_layers.GatedActivation.backward
def count():
    return sum(storage() is not None for storage in kept)
def starting_up(tensor):  # the forecast, the proofs of agreement and of overrides
    return tensor.is_meta or tensor.shape[1] in (overrides.TOKENS, reference.TOKENS)
def record(ctx, gate, up, module):
    if starting_up(gate) or not gate.requires_grad:
        return forward(ctx, gate, up, module)
    if "raised" in calls and "said" not in calls:
        calls.append("said")
        print(f"alive when the step is tried again: {count()}", flush=True)
    elif "raised" not in calls:
        kept.append(weakref.ref(gate.untyped_storage()))
    return forward(ctx, gate, up, module)
def fail(ctx, gradient):
    if starting_up(gradient):
        return backward(ctx, gradient)
    calls.append("layer")
    if len(calls) == 2:
        print(f"alive when memory runs out: {count()} of {len(kept)}", flush=True)
        calls.append("raised")
        raise torch.OutOfMemoryError("too much")
    return backward(ctx, gradient)
fused_layers.GatedActivation.forward = staticmethod(record)
fused_layers.GatedActivation.backward = staticmethod(fail)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_out_of_memory_in_the_backward_pass_leaves_nothing_of_the_failed_step(finished, tmp_path):
    """The smaller micro-batch has the memory to itself: no tensor that a layer kept is alive when
    it begins.
    """
    more = [
        "--training.gradient_checkpointing",
        "none",
        "--training.max_steps",
        "2",
        "--training.eval_steps",
        "2",
        "--data.test",
        "[]",
    ]
    done = run_script("-c", ALIVE, *flags(tmp_path / "run", finished[0] / "cache", *more))
    assert done.returncode == 0, done.stderr
    assert "alive when memory runs out: 3 of 4" in done.stdout  # the last layer's were used
    assert "alive when the step is tried again: 0" in done.stdout
    assert "micro-batches of 256 tokens" in done.stdout


def test_non_finite_loss_names_the_examples(finished, tmp_path):
    body = (
        "if len(calls) == 5: self.model.get_base_model().get_input_embeddings().weight.data[300] ="
        " float('nan')"
    )
    done = run_patched(body, flags(tmp_path / "run", finished[0] / "cache"))
    assert done.returncode == 2
    assert "loss is not finite" in done.stderr.splitlines()[-1]


def test_merge_predict_score(finished, tmp_path):
    adapter = finished[0] / "run" / "adapter"
    done = run_script(
        ROOT / "recipes" / "merge_adapter.py", "--adapter", adapter, "--output", tmp_path / "merged"
    )
    assert done.returncode == 0, done.stderr
    common = ["--format", "medmcqa", "--path", DEMO / "data" / "test.jsonl", "--limit", "60"]
    predict = ROOT / "eval" / "predict.py"
    done = run_script(
        predict,
        "--model",
        DEMO / "base",
        "--adapter",
        adapter,
        *common,
        "--output",
        tmp_path / "tuned.jsonl",
    )
    assert done.returncode == 0, done.stderr
    ours = (finished[0] / "run" / "predictions" / "tuned.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in (tmp_path / "tuned.jsonl").read_text().splitlines()]
    keys = {
        "id",
        "dataset",
        "subject",
        "gold",
        "prediction",
        "option_logprobs",
        "letter_mass",
        "text",
        "prompt_sha256",
        "engine",
        "weights",
        "model",
    }
    assert all(keys <= set(row) for row in rows)
    by_id = {row["id"]: row["prediction"] for row in map(json.loads, ours)}
    # the recipe and the command agree
    assert {row["id"]: row["prediction"] for row in rows} == by_id
    done = run_script(
        predict, "--model", tmp_path / "merged", *common, "--output", tmp_path / "merged.jsonl"
    )
    assert done.returncode == 0, done.stderr
    merged = [json.loads(line) for line in (tmp_path / "merged.jsonl").read_text().splitlines()]
    assert sum(a["prediction"] == b["prediction"] for a, b in zip(rows, merged, strict=True)) >= 57
    done = run_script(
        ROOT / "eval" / "score.py", tmp_path / "tuned.jsonl", "--output", tmp_path / "metrics.json"
    )
    assert done.returncode == 0, done.stderr
    scored = json.loads((tmp_path / "metrics.json").read_text())
    reported = json.loads((finished[0] / "run" / "metrics.json").read_text())
    assert scored["accuracy"] == reported["accuracy"]


# ---- mistakes: one line on stderr, exit code 2 ---------------------------------------------------


def entry(path, format="medmcqa", **more):
    return json.dumps([{"format": format, "path": str(path), **more}])


TRAIN = DEMO / "data" / "train.jsonl"
MISTAKES = {
    "unknown key": (["--training.lrr", "1"], "did you mean training.lr"),
    "ill-typed key": (["--training.lr", "fast"], "number"),
    "missing config": (["--config", "/nowhere.yaml"], "No such file"),
    "missing file": (["--data.train.0.path", "/nowhere/x.jsonl"], "no file or folder"),
    "wrong format": (["--data.train", entry(TRAIN, "medqa")], "looks like medmcqa"),
    "train is eval": (["--data.eval", entry(TRAIN)], "same data as data.train[0]"),
    "no train": (["--data.train", "[]"], "data.train is empty"),
    "unlabelled eval": (["--data.eval", entry("UNLABELLED")], "cannot be evaluated on"),
    "missing base": (["--model.base", "/nowhere/model"], "no such folder"),
    "too long": (["--data.max_length", "600"], "512 positions"),
    "quantization": (["--model.dtype", "float16"], "not trainable on a CPU"),
    "batch arithmetic": (["--training.global_batch_tokens", "5000"], "not a multiple"),
    "attention": (["--model.attention", "flash"], "needs a GPU of compute capability 8.0"),
    "folder of another run": (["--output_dir", "FINISHED"], "--resume"),
    "folder of something else": (["--output_dir", str(DEMO)], "holds no run"),
    "another recipe": (
        ["--output_dir", "FINISHED", "--resume", "--training.lr", "1e-5"],
        "training.lr was",
    ),
    "tiny disk": (["--lora.r", "9000000"], "free space"),
    "chat without template": (["--data.prompt_style", "chat"], "no chat template"),
    "broken row": (["--data.train", entry("BROKEN")], 'line 2: option "opb" is empty'),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_with_one_line_and_code_2(finished, tmp_path, monkeypatch, mistake):
    arguments, message = MISTAKES[mistake]
    row = json.loads(TRAIN.read_text().splitlines()[0])
    (tmp_path / "unlabelled.jsonl").write_text(json.dumps(row | {"cop": None}) + "\n")
    (tmp_path / "broken.jsonl").write_text(
        json.dumps(row) + "\n" + json.dumps(row | {"opb": ""}) + "\n"
    )
    places = {
        "FINISHED": finished[0] / "run",
        "UNLABELLED": tmp_path / "unlabelled.jsonl",
        "BROKEN": tmp_path / "broken.jsonl",
    }
    for name, path in places.items():
        arguments = [argument.replace(name, str(path)) for argument in arguments]
    if mistake in ("folder of another run", "another recipe"):
        arguments = [*flags(finished[0] / "run", finished[0] / "cache")[1:], *arguments]
    elif "--output_dir" not in arguments:
        arguments = [
            "--output_dir",
            str(tmp_path / "run"),
            "--data.cache_dir",
            str(tmp_path / "cache"),
            *arguments,
        ]
    before = sorted((finished[0] / "run").rglob("*"))
    code, complaint = run_inside(RECIPE, arguments, monkeypatch)
    lines = [line for line in complaint.splitlines() if line.strip()]
    assert code == 2, complaint
    assert len(lines) == 1, complaint
    assert message in lines[0]
    assert sorted((finished[0] / "run").rglob("*")) == before


def test_mistakes_of_prediction(finished, tmp_path, monkeypatch):
    adapter = finished[0] / "run" / "adapter"
    common = ["--format", "medmcqa", "--path", DEMO / "data" / "test.jsonl"]
    predict = ROOT / "eval" / "predict.py"
    lines = (DEMO / "data" / "test.jsonl").read_text().splitlines()
    (tmp_path / "twice.jsonl").write_text("\n".join([*lines, lines[0]]))
    (tmp_path / "open.jsonl").write_text(
        '{"question": "What is fever?", "answer": "A high temperature."}\n'
    )
    for arguments, message in [
        (["--model", "/nowhere", *common, "--output", tmp_path / "p.jsonl"], "no such folder"),
        (
            [
                "--model",
                DEMO / "base",
                "--adapter",
                tmp_path,
                *common,
                "--output",
                tmp_path / "p.jsonl",
            ],
            "give a run's adapter folder",
        ),
        (
            ["--model", DEMO / "base", *common, "--output", tmp_path / "no" / "p.jsonl"],
            "make it first",
        ),
        (["--model", DEMO / "base", *common, "--output", tmp_path / "twice.jsonl"], "exists"),
        (
            [
                "--model",
                DEMO / "base",
                "--format",
                "medmcqa",
                "--path",
                tmp_path / "twice.jsonl",
                "--output",
                tmp_path / "p.jsonl",
            ],
            "unique",
        ),
        (
            [
                "--model",
                DEMO / "base",
                "--adapter",
                adapter,
                "--format",
                "qa",
                "--path",
                tmp_path / "open.jsonl",
                "--scoring",
                "letters",
                "--output",
                tmp_path / "p.jsonl",
            ],
            "this data holds open questions: use generate",
        ),
    ]:
        code, complaint = run_inside(predict, arguments, monkeypatch)
        assert (code, complaint.strip().count("\n")) == (2, 0), complaint
        assert message in complaint
    score = ROOT / "eval" / "score.py"
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "cut.jsonl").write_text('{"id": "a", "gold"')
    for path, message in [
        ("empty.jsonl", "is empty"),
        ("cut.jsonl", "not valid JSON"),
        ("none.jsonl", "cannot be read"),
    ]:
        code, complaint = run_inside(score, [tmp_path / path], monkeypatch)
        assert (code, complaint.strip().count("\n")) == (2, 0), complaint
        assert message in complaint


def test_eight_bit_optimizer_is_saved_and_resumed(finished, tmp_path):
    """Its states hold plain numbers beside tensors."""
    common = [
        "--training.optimizer",
        "adamw_8bit",
        "--training.max_steps",
        "8",
        "--training.save_steps",
        "4",
        "--data.test",
        "[]",
    ]
    done = run_script(*flags(tmp_path / "run", finished[0] / "cache", *common))
    assert done.returncode == 0, done.stderr
    before = losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-8")
    done = run_script(*flags(tmp_path / "run", finished[0] / "cache", *common), "--resume")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == before
