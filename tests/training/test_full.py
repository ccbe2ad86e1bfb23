"""training.method full: every strategy, resuming, and its memory."""

import json
import shutil
import signal
import time

import pytest
import torch
import warm_processes
from conftest import DEMO, ROOT, build_model, run_inside, run_script
from full_steps import copy, open_steps, take
from safetensors.torch import load_file
from transformers import AutoConfig
from warm_processes import finish_ranks, start_ranks

from medqlora.core.config import Config
from medqlora.training.memory.architectures import read_architecture
from medqlora.training.memory.forecast import forecast_step
from medqlora.training.memory.planner import plan_step
from medqlora.training.memory.sharding import divide
from medqlora.training.memory.target import TargetHardware
from medqlora.training.memory.tracker import GIB, META, Batch, ForecastError
from medqlora.training.strategies.launch import Strategy

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
RECIPE = ROOT / "recipes" / "sft_qlora.py"


def check_same(found, expected, dtype: str) -> None:
    """The steps are those of one process: to rounding in float32, and within a few parts of a
    hundred in bfloat16, whose rounding parts any two runs.
    """
    bound = {"float32": 1e-4, "bfloat16": 3e-2}[dtype]
    for (loss, norm), (other, other_norm) in zip(found[0], expected[0], strict=True):
        assert loss == pytest.approx(other, rel=bound)
        assert norm == pytest.approx(other_norm, rel=3 * bound)
    # No update has been rounded before the first loss.
    first = 1e-5 if dtype == "float32" else 1e-3
    assert found[0][0][0] == pytest.approx(expected[0][0][0], rel=first)
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        assert found[1][name].dtype is torch.float32
        assert (found[1][name] - value).norm() <= bound * value.norm(), name
    assert found[2] == pytest.approx(expected[2], rel=bound)


@pytest.mark.full
@pytest.mark.parametrize(("dtype", "tied"), [("float32", True), ("bfloat16", False)])
def test_thirty_steps_of_every_strategy_are_those_of_one_process(dtype, tied, tmp_path):
    pytest.importorskip("deepspeed")
    base = tmp_path / "base"
    build_model("llama", tie_word_embeddings=tied).save_pretrained(base)

    def go_on(steps, weights=None, states=None):
        """Take steps on one process, from the weights and states of a checkpoint if given."""
        session, table, plan = open_steps(str(base), dtype, "one")
        if weights is not None:
            session.trainer.write_weights(weights)
            session.trainer.write_states(states)
        figures = take(session, table, plan, steps)
        return figures, copy(session.trainer.read_weights()), session.evaluate(table)

    alone = go_on(range(30))
    names = ("ddp", "fsdp2", "zero1", "zero2", "zero3", "zero3_offload")
    script = ROOT / "tests" / "training" / "full_steps.py"
    codes, _, errors = finish_ranks(start_ranks([[script, base, dtype, tmp_path, *names]] * 2), 600)
    assert codes == [0, 0], errors[0][-3000:]
    for name in names:
        found = torch.load(tmp_path / f"{name}-{dtype}.pt")
        check_same((found["figures"], found["last"], found["eval"]), alone, dtype)
        # A checkpoint of any strategy continues on one process.
        figures, *rest = go_on(range(20, 30), found["weights"], found["states"])
        check_same((found["figures"][:20] + figures, *rest), alone, dtype)


# ---- the recipe ----------------------------------------------------------------------------------


def flags(run, cache, *more) -> list:
    return [
        *("--output_dir", run, "--data.cache_dir", cache, "--data.test", "[]"),
        *("--training.method", "full", "--model.quantization", "none", "--training.lr", "3e-4"),
        *("--model.dtype", "bfloat16", "--data.max_length", "128", "--data.train.0.limit", "200"),
        *("--data.eval.0.limit", "20", "--training.max_steps", "8"),
        *("--training.max_tokens_per_batch", "256", "--training.global_batch_tokens", "512"),
        *("--training.eval_steps", "3", "--training.save_steps", "2", *more),
    ]


def read_losses(run) -> list[float]:
    rows = [json.loads(line) for line in (run / "train_log.jsonl").read_text().splitlines()]
    return [row.get("loss", row.get("eval_loss")) for row in rows]


# Each step waits, so the kill finds the training between two checkpoints.
SLOW = """
import runpy, sys, time
from medqlora.training import session
update = session.Session.update
def slow(self, lr):
    time.sleep(0.3)
    return update(self, lr)
session.Session.update = slow
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_killed_run_resumes_and_equals_the_uninterrupted_one(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = run_script(RECIPE, *flags(whole, tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "weights train beside 0 frozen parameters, embeddings and head included" in said
    assert "the optimizer updates float32 masters" in said
    assert "lora.r, lora.alpha" in said
    assert not (whole / "adapter").exists()
    process = warm_processes.start(["-c", SLOW, RECIPE, *flags(killed, tmp_path / "cache")], ROOT)
    while process.poll() is None and not (killed / "checkpoints" / "step-4").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    # The best model is gone too; the checkpoint has its files under other names.
    shutil.rmtree(killed / "model")
    done = run_script(RECIPE, *flags(killed, tmp_path / "cache", "--resume"))
    assert done.returncode == 0, done.stderr
    assert read_losses(killed) == read_losses(whole)
    for name in ("model.safetensors", "config.json", "medqlora.json", "tokenizer.json"):
        assert (killed / "model" / name).read_bytes() == (whole / "model" / name).read_bytes(), name
    masters = [
        load_file(run / "checkpoints" / "step-8" / "weights.safetensors") for run in (whole, killed)
    ]
    assert all(torch.equal(masters[0][name], masters[1][name]) for name in masters[0])
    # The best step is the last one here, and its model is what the masters round to.
    written = load_file(whole / "model" / "model.safetensors")
    assert all(torch.equal(written[name], masters[0][name].bfloat16()) for name in written)


def test_the_model_is_asked_as_it_was_trained(tmp_path, monkeypatch):
    test = [{"format": "medmcqa", "path": str(DEMO / "data" / "test.jsonl"), "limit": 20}]
    more = ["--data.test", json.dumps(test), "--training.max_steps", "2"]
    more += ["--data.prompt_style", "lm_eval"]
    run = tmp_path / "run"
    code, said = run_inside(RECIPE, flags(run, tmp_path / "cache", *more), monkeypatch)
    assert code == 0, said
    asked = ["--model", run / "model", "--format", "medmcqa", "--path", test[0]["path"]]
    asked += ["--split", "test", "--limit", 20, "--output", tmp_path / "rows.jsonl"]
    code, said = run_inside(ROOT / "eval" / "predict.py", asked, monkeypatch)
    assert code == 0, said
    tuned, alone = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (run / "predictions" / "tuned.jsonl", tmp_path / "rows.jsonl")
    )
    for row, other in zip(tuned, alone, strict=True):
        assert row["prompt_sha256"] == other["prompt_sha256"]
        assert row["weights"] == other["weights"] == "bfloat16"
        assert row["option_logprobs"] == pytest.approx(other["option_logprobs"], abs=0.1)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model.quantization", "nf4"], "set model.quantization to none"),
        (["--lora.init_adapter", "runs/mine/adapter"], "training.method full has no adapter"),
        (["--model.dtype", "float16"], "set model.dtype to bfloat16 or float32"),
        (["--model.upcast_embeddings", "true"], "float32 masters of every weight"),
    ],
)
def test_what_full_fine_tuning_cannot_use_is_refused(more, message, tmp_path, monkeypatch):
    code, said = run_inside(RECIPE, flags(tmp_path / "run", tmp_path, *more), monkeypatch)
    assert code == 2
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


# ---- memory --------------------------------------------------------------------------------------


def make_full(**training) -> Config:
    training = {"gradient_checkpointing": "none"} | training | {"method": "full"}
    model = {"base": "", "quantization": "none"}
    return Config.model_validate({"model": model, "training": training})


def make_shape():
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return AutoConfig.for_model("llama", **sizes, **heads, vocab_size=500)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["none", "full"])
def test_the_forecast_is_the_real_step(dtype, mode):
    config = make_full(gradient_checkpointing=mode)
    batch = Batch((60, 57, 30, 29, 24), 40)
    found = [
        forecast_step(config, make_shape(), CPU, dtype, torch.uint8, batch, place)
        for place in (META, CPU)
    ]
    assert found[0].peak == pytest.approx(found[1].peak, rel=2e-3)
    for name, value in found[0].by_category.items():
        assert value == pytest.approx(found[1].by_category[name], rel=0.02, abs=8192), name
    weights = found[0].trainable
    expected = {
        "trained weights": dtype.itemsize * weights,
        "master weights": 0 if dtype is torch.float32 else 4 * weights,
        "gradients": 4 * weights,
        "optimizer": 8 * weights,
    }
    for name, value in expected.items():
        # The tracker counts blocks of 512 bytes.
        assert found[0].by_category[name] == pytest.approx(value, rel=0.02), name
    assert found[0].unavoidable == pytest.approx(sum(expected.values()), rel=0.02)


@pytest.mark.parametrize(
    ("name", "divided"),
    [
        ("ddp", ()),
        ("zero1", ("optimizer", "master weights")),
        ("zero2", ("optimizer", "master weights", "gradients")),
        ("zero3", ("optimizer", "master weights", "gradients", "trained weights")),
        ("fsdp2", ("optimizer", "master weights", "gradients")),
    ],
)
def test_what_a_strategy_divides_of_a_whole_model(name, divided):
    batch = Batch((64,), 8)
    one = forecast_step(make_full(), make_shape(), CUDA, torch.bfloat16, torch.uint8, batch)
    four = divide(one, Strategy(name, 4))
    for category in ("optimizer", "master weights", "trained weights", "gradients"):
        whole = 4 * one.trainable if category == "gradients" else one.by_category[category]
        share = -(-whole // 4) if category in divided else whole
        # The divided masters of fsdp2 are its weights.
        if name == "fsdp2" and category == "trained weights":
            share = 0
        assert four.by_category[category] == share, category
    assert sum(four.by_category.values()) == four.peak
    # The gradients that a strategy is checked with are there beside the loaded base.
    assert four.loaded == one.loaded + one.by_category["trained weights"]


def test_llama_8b_needs_18_bytes_a_weight_and_is_refused_in_one_line():
    shape = read_architecture("llama3-8b", ROOT / "bench" / "architectures")
    config = make_full(max_tokens_per_batch="auto", gradient_checkpointing="auto")
    target = TargetHardware(CUDA, torch.bfloat16, torch.uint8, Strategy("one"), 80 * GIB)
    with pytest.raises(ForecastError) as caught:
        plan_step(config, shape, target, lambda tokens: tokens // 32)
    needed = 18 * 8_030_261_248 / GIB
    assert f"needs {needed:.2f} GiB for 8,030,261,248 weights" in str(caught.value)
    assert "80.00 GiB may be used; train an adapter" in str(caught.value)
    assert "\n" not in str(caught.value)
