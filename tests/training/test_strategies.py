"""Every strategy against one process, for real: two processes, the shipped accelerate
configurations, the recipe.
"""

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import DEMO, ROOT, run_script
from safetensors.torch import load_file
from warm_processes import finish_ranks, start_ranks

from medqlora.core.config import Config
from medqlora.core.config_loading import load_config
from medqlora.training.strategies.gradient_check import compare_gradients
from medqlora.training.strategies.launch import (
    Strategy,
    StrategyError,
    check_strategy,
    choose_storage,
    launch_environ,
    read_strategy,
)
from medqlora.training.strategies.wrapping import gather_weights

STEPS = 20
RECIPE = ROOT / "recipes" / "sft_qlora.py"
CONFIGS = ROOT / "accelerate_configs"
LAUNCHED = ("zero2", "fsdp2")  # the whole command of `accelerate launch`, once for each kind
TEST = [{"format": "medmcqa", "path": str(DEMO / "data" / "test.jsonl"), "limit": 40}]
FLAGS = (
    *("--data.test", json.dumps(TEST)),
    *("--data.train.0.limit", "1500"),
    *("--data.eval.0.limit", "60"),
    *("--training.gradient_checkpointing", "none"),
    *("--lora.dropout", "0.1"),
    *("--training.max_steps", STEPS),
    *("--training.max_tokens_per_batch", "512"),
    *("--training.global_batch_tokens", "2048"),
    *("--training.eval_steps", "10"),
    *("--training.save_steps", "14"),
    *("--model.dtype", "float32"),
)
QUICK = ("ddp", "zero3", "fsdp2")
FULL = [pytest.param(name, marks=pytest.mark.full) for name in ("zero1", "zero2", "zero3_offload")]
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


def train(
    strategy: str,
    output: Path,
    cache: Path,
    *more: str,
    script: Path = RECIPE,
    ranks: int = 2,
    launcher: bool = False,
) -> SimpleNamespace:
    """Train some steps of the demonstration in float32, alone or under one of accelerate_configs/.

    Dropout belongs to the plan's micro-batches: within an epoch's full steps it is the same for any
    number of processes. `launcher` runs the whole command of `accelerate launch`; otherwise the
    ranks get the environment that it gives them. Returns exit codes, output and errors.
    """
    if strategy.startswith("zero") and not HAS_DEEPSPEED:
        pytest.skip("deepspeed is not installed")
    command = [script, "--output_dir", output, "--data.cache_dir", cache, *FLAGS, *more]
    config = CONFIGS / f"{strategy}.yaml"
    if strategy == "one":
        done = run_script(*command)
    elif launcher:
        launch = ["--config_file", config, "--main_process_port", "0", "--num_processes", ranks]
        done = run_script("-m", "accelerate.commands.launch", *launch, *command, cold=True)
    else:
        environment = launch_environ(yaml.safe_load(config.read_text()))
        started = start_ranks([command] * ranks, [environment] * ranks)
        codes, outputs, errors = finish_ranks(started)
        return SimpleNamespace(codes=codes, stdout="".join(outputs), stderr="".join(errors))
    return SimpleNamespace(codes=[done.returncode], stdout=done.stdout, stderr=done.stderr)


def check_success(done: SimpleNamespace) -> None:
    assert set(done.codes) == {0}, done.stderr[-3000:]


def read_log(run: Path) -> tuple[list[dict], list[float]]:
    rows = [json.loads(line) for line in (run / "train_log.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row], [
        row["eval_loss"] for row in rows if "eval_loss" in row
    ]


def check_same_training(run: Path, reference: Path) -> None:
    """Losses within 1e-3, gradient norms within 1 %, the same adapter tensor by tensor, the same
    answers.
    """
    (steps, evaluations), (expected, expected_evaluations) = read_log(run), read_log(reference)
    assert (
        [row["step"] for row in steps]
        == [row["step"] for row in expected]
        == list(range(1, STEPS + 1))
    )
    for row, other in zip(steps, expected, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-3), row["step"]
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-2), row["step"]
    assert evaluations == pytest.approx(expected_evaluations, rel=1e-3)
    trained = load_file(run / "adapter" / "adapter_model.safetensors")
    wanted = load_file(reference / "adapter" / "adapter_model.safetensors")
    assert trained.keys() == wanted.keys()
    for name, tensor in wanted.items():
        difference = trained[name] - tensor
        assert difference.numel() > 0
        assert difference.norm() <= 1e-3 * tensor.norm(), name
        # AdamW's first steps have the size of the learning rate, 1.5e-3, however small a gradient
        # is: a single weight whose gradient is all rounding may part a little further.
        assert difference.abs().max() <= 3e-4, name
    assert (run / "predictions" / "base.jsonl").read_bytes() == (
        reference / "predictions" / "base.jsonl"
    ).read_bytes()
    answers = [
        [json.loads(line)["prediction"] for line in (folder / "predictions" / "tuned.jsonl").open()]
        for folder in (run, reference)
    ]
    assert answers[0] == answers[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Finished runs by strategy and quantization, each made once."""
    folder = tmp_path_factory.mktemp("strategies")
    made = {}

    def get(strategy: str, quantization: str = "nf4") -> Path:
        key = f"{strategy}-{quantization}"
        if key not in made:
            # Sharded layers are recomputed in one of the two, kept in the other; ranks need
            # different numbers of head chunks.
            more = ["--model.quantization", quantization]
            more += (
                []
                if quantization == "nf4"
                else [
                    "--training.gradient_checkpointing",
                    "every_2",
                    "--training.loss_chunk_tokens",
                    "4",
                ]
            )
            launcher = strategy in LAUNCHED and quantization == "nf4"
            done = train(strategy, folder / key, folder / "cache", *more, launcher=launcher)
            check_success(done)
            made[key] = folder / key
        return made[key]

    return get


@pytest.mark.parametrize("strategy", [*QUICK, *FULL])
def test_two_processes_train_like_one_on_nf4(runs, strategy):
    run = runs(strategy)
    check_same_training(run, runs("one"))
    facts = json.loads((run / "environment.json").read_text())
    expected = read_strategy(
        launch_environ(yaml.safe_load((CONFIGS / f"{strategy}.yaml").read_text())), 2
    )
    assert (facts["strategy"], facts["processes"]) == (expected.name, 2)
    assert facts["storage"] == ("float32" if expected.sharded else "uint8")
    assert facts["gradient_check"]["relative_error"] < 1e-3
    assert facts["gradient_check"]["seconds"] > 0
    assert len(json.loads((run / "metrics.json").read_text())["peak_memory_bytes_per_rank"]) == 2


@pytest.mark.full
@pytest.mark.parametrize("strategy", ["zero3", "fsdp2"])
def test_two_processes_train_like_one_on_full_precision_with_recomputation_and_head_chunks(
    runs, strategy
):
    check_same_training(runs(strategy, "none"), runs("one", "none"))


@pytest.mark.full
def test_a_divided_model_writes_the_answers_of_a_whole_one(tmp_path):
    """Open questions, whose answers end at different lengths on purpose."""
    rows = [{"question": "What is " + "it " * i + "?", "answer": "Rest."} for i in range(70)]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    test = json.dumps([{"format": "qa", "path": str(tmp_path / "qa.jsonl")}])
    written = []
    for strategy in ("one", "zero3"):
        done = train(
            strategy,
            tmp_path / strategy,
            tmp_path / "cache",
            *("--data.test", test, "--data.max_new_tokens", "6", "--training.max_steps", "2"),
        )
        check_success(done)
        folder = tmp_path / strategy / "predictions"
        files = [folder / "base.jsonl", folder / "tuned.jsonl"]
        written.append([[json.loads(line) for line in file.open()] for file in files])
    assert written[0] == written[1]
    assert {"reached_limit" in row for row in written[0][1]} == {True, False}


@pytest.mark.parametrize(
    ("saved_on", "resumed_on"),
    [
        ("zero3", "one"),
        pytest.param("one", "fsdp2", marks=pytest.mark.full),
        pytest.param("fsdp2", "zero2", marks=pytest.mark.full),
    ],
)
def test_checkpoint_continues_under_another_strategy_and_number_of_processes(
    runs, tmp_path, saved_on, resumed_on
):
    shutil.copytree(runs(saved_on), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{STEPS}")
    (tmp_path / "run" / "predictions" / "tuned.jsonl").unlink()
    done = train(
        resumed_on, tmp_path / "run", tmp_path / "cache", "--resume", "--model.quantization", "nf4"
    )
    check_success(done)
    assert "resuming after step 14" in done.stdout
    check_same_training(tmp_path / "run", runs("one"))


@pytest.mark.full
def test_three_processes_divide_what_does_not_divide_and_resume(runs, tmp_path):
    """ZeRO-3 over 3 ranks pads every tensor; bfloat16 base and storage beside a float32 adapter, as
    on GPUs.
    """
    common = [
        "--training.global_batch_tokens",
        "1536",
        "--training.max_steps",
        "8",
        "--training.save_steps",
        "4",
        "--lora.r",
        "5",
    ]
    # faster, bfloat16 runs part by themselves
    common += ["--model.dtype", "bfloat16", "--training.eval_steps", "100", "--training.lr", "2e-4"]
    for strategy in ("one", "zero3", "fsdp2"):
        done = train(strategy, tmp_path / strategy, tmp_path / "cache", *common, ranks=3)
        check_success(done)
    for strategy in ("zero3", "fsdp2"):
        for row, other in zip(
            read_log(tmp_path / strategy)[0], read_log(tmp_path / "one")[0], strict=True
        ):
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-2), (strategy, row["step"])
        assert (
            json.loads((tmp_path / strategy / "environment.json").read_text())["storage"]
            == "bfloat16"
        )
    before = read_log(tmp_path / "zero3")[0]
    shutil.rmtree(tmp_path / "zero3" / "checkpoints" / "step-8")
    done = train(
        "zero3",
        tmp_path / "zero3",
        tmp_path / "cache",
        *common,
        "--resume",
        ranks=3,
    )
    check_success(done)
    assert [row["loss"] for row in read_log(tmp_path / "zero3")[0]] == pytest.approx(
        [row["loss"] for row in before], rel=1e-6
    )


@pytest.mark.full
def test_zero3_on_one_process_resumes(runs, tmp_path):
    short = [
        "--training.max_steps",
        "6",
        "--training.save_steps",
        "3",
        "--training.eval_steps",
        "100",
    ]
    done = train("zero3_offload", tmp_path / "run", tmp_path / "cache", *short, ranks=1)
    check_success(done)
    before = read_log(tmp_path / "run")[0]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-6")
    done = train("zero3_offload", tmp_path / "run", tmp_path / "cache", *short, "--resume", ranks=1)
    check_success(done)
    assert [row["loss"] for row in read_log(tmp_path / "run")[0]] == pytest.approx(
        [row["loss"] for row in before], rel=1e-6
    )


WRONG = """
import runpy, sys
from medqlora.model import overrides, quantization
backward = quantization.GatheredMatMul.backward
def wrong(ctx, gradient):  # but right where the override is proven, on few tokens
    factor = 1.0 if gradient.shape[-2] == overrides.TOKENS else 1.5
    return backward(ctx, gradient)[0] * factor, None
quantization.GatheredMatMul.backward = staticmethod(wrong)
sys.argv[0] = {recipe!r}
runpy.run_path({recipe!r}, run_name="__main__")
"""


def test_wrong_gradients_are_refused_before_training(tmp_path):
    script = tmp_path / "wrong.py"
    script.write_text(WRONG.format(recipe=str(ROOT / "recipes" / "sft_qlora.py")))
    done = train("zero3", tmp_path / "run", tmp_path / "cache", script=script)
    assert done.codes == [2, 2], done.stderr[-3000:]
    said = [line for line in done.stderr.splitlines() if "trains wrongly" in line]
    assert len(said) == 1, done.stderr[-3000:]
    assert "differs from the unsharded model's" in said[0]
    assert not (tmp_path / "run" / "train_log.jsonl").exists()


# ---- without processes ---------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_are_valid_and_leave_numbers_to_the_recipe(path):
    from accelerate.commands.config.config_args import load_config_from_file

    load_config_from_file(str(path))
    tree = yaml.safe_load(path.read_text())
    assert path.read_text().startswith("# ")
    assert tree["mixed_precision"] == "no"
    assert "gradient" not in path.read_text().split("compute_environment")[1]
    assert tree["num_processes"] % tree["num_machines"] == 0
    strategy = read_strategy(launch_environ(tree), tree["num_processes"])
    name = path.stem.replace("_multi_node", "").replace("_offload", "")
    assert strategy.name == {"cpu": "one", "one_gpu": "one"}.get(name, name)


def make_config(**changes) -> Config:
    return load_config(
        ROOT / "recipes" / "configs" / "demo.yaml",
        [part for key, value in changes.items() for part in (f"--{key}", str(value))],
    )


def refuse(environ: dict, dtype=torch.bfloat16, ranks: int = 2, **changes) -> str:
    with pytest.raises(StrategyError) as caught:
        check_strategy(read_strategy(environ, ranks), make_config(**changes), dtype, environ)
    assert "\n" not in str(caught.value)
    return str(caught.value)


ZERO3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def test_what_cannot_train_is_refused_with_the_reason(tmp_path):
    assert "the recipe owns the dtype" in refuse({"ACCELERATE_MIXED_PRECISION": "fp16"})
    assert "loss scaling" in refuse(ZERO3, torch.float16)
    assert "8-bit states" in refuse(ZERO3, **{"training.optimizer": "adamw_8bit"})
    assert "row scales" in refuse(FSDP2, **{"model.quantization": "int8"})
    assert "dora" in refuse(ZERO3, **{"lora.variant": "dora"})
    assert "nothing to shard" in refuse(FSDP2, ranks=1)
    full = {"training.method": "full", "model.quantization": "none"}
    assert "set model.dtype float32" in refuse({}, torch.float16, **full)
    assert "has not been tried" in refuse(FSDP2 | {"FSDP_OFFLOAD_PARAMS": "true"}, **full)
    assert "8-bit states" in refuse(ZERO3, **full, **{"training.optimizer": "adamw_8bit"})
    assert "fsdp_version: 2" in refuse({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"})
    assert "not supported" in refuse({"ACCELERATE_USE_MEGATRON_LM": "true"})
    assert "nvme is not supported" in refuse(
        ZERO3 | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}
    )
    assert "expected 1, 2 or 3" in refuse(ZERO3 | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"})
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}, "fp16": {"enabled": True}}))
    assert "fp16 is the recipe's to say" in refuse(
        ZERO3 | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    )
    file.write_text(
        json.dumps({"zero_optimization": {"stage": 3}, "flops_profiler": {"enabled": True}})
    )
    assert "flops_profiler is not used" in refuse(
        ZERO3 | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    )
    file.write_text("[1]")
    assert "holds a list, expected an object" in refuse(
        ZERO3 | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    )
    file.write_text("{")
    assert "cannot be read" in refuse(ZERO3 | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)})
    file.write_text(
        json.dumps(
            {"zero_optimization": {"stage": 2, "overlap_comm": True}, "bf16": {"enabled": "auto"}}
        )
    )
    assert read_strategy(ZERO3 | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}, 2) == Strategy(
        "zero2", 2, {"stage": 2, "overlap_comm": True}
    )
    check_strategy(
        read_strategy({}, 8), make_config(), torch.float16, {"ACCELERATE_MIXED_PRECISION": "fp16"}
    )


def test_storage_follows_the_engine():
    for name in ("zero3", "fsdp2"):
        assert choose_storage(Strategy(name, 2), "nf4", torch.bfloat16) is torch.bfloat16
    for name in ("one", "ddp", "zero1", "zero2"):
        assert choose_storage(Strategy(name, 2), "fp4", torch.bfloat16) is torch.uint8


def test_gradients_that_differ_are_refused():
    reference = {"a": torch.tensor([1.0, -2.0]), "b": torch.zeros(3)}
    assert (
        compare_gradients(
            reference,
            {k: v.clone() for k, v in reference.items()},
            torch.float32,
            Strategy("ddp", 2),
        )
        == 0
    )
    for wrong in (
        {"a": torch.tensor([1.0, -2.01])},
        {"b": torch.full((3,), 1e-3)},
        {"a": torch.tensor([1.0, float("nan")])},
        {"a": torch.zeros(0)},
    ):
        with pytest.raises(StrategyError, match="trains wrongly"):
            compare_gradients(reference, reference | wrong, torch.float32, Strategy("ddp", 2))


@pytest.mark.parametrize(
    "value", [torch.zeros(0), torch.zeros(2, 2), torch.tensor([1.0, float("inf"), 0.0]), None]
)
def test_tensor_that_was_not_gathered_is_not_saved(value):
    class Trainer:
        def read_weights(self, keep):
            return {} if value is None else {"a": value}

    with pytest.raises(StrategyError, match="nothing was saved"):
        gather_weights(Trainer(), {"a": torch.Size([3])})


@pytest.fixture(scope="module")
def one_micro_batch(tmp_path_factory):
    """Steps that are a single micro-batch of one process, without dropout."""
    folder = tmp_path_factory.mktemp("one_micro_batch")
    done = train("one", folder / "run", folder / "cache", *ONE_MICRO_BATCH)
    check_success(done)
    return folder


ONE_MICRO_BATCH = (
    "--training.max_tokens_per_batch",
    "1024",
    "--training.global_batch_tokens",
    "1024",
    "--training.max_steps",
    "6",
    "--lora.dropout",
    "0",
    "--data.test",
    "[]",
    "--data.max_length",
    "128",
)


@pytest.mark.parametrize(
    ("strategy", "ranks"), [("ddp", 3), pytest.param("zero3", 4, marks=pytest.mark.full)]
)
def test_more_processes_than_micro_batches_train_the_same(
    one_micro_batch, tmp_path, strategy, ranks
):
    run = tmp_path / "run"
    done = train(strategy, run, one_micro_batch / "cache", *ONE_MICRO_BATCH, ranks=ranks)
    check_success(done)
    assert f"1,024 tokens per step = {ranks} x 1 micro-batch(es) of at most" in done.stdout
    steps, evaluations = read_log(run)
    expected, expected_evaluations = read_log(one_micro_batch / "run")
    for found, wanted in zip(steps, expected, strict=True):
        assert found["tokens"] == wanted["tokens"]
        assert found["supervised_tokens"] == wanted["supervised_tokens"]
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-3)
    assert steps[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-6)
    assert evaluations == pytest.approx(expected_evaluations, rel=1e-3)


def test_a_rank_without_a_row_counts_zero(one_micro_batch, tmp_path):
    """Two rows for three processes."""
    more = [*ONE_MICRO_BATCH, "--data.train.0.limit", "2", "--data.eval", "[]"]
    more += ["--data.train.1.limit", "1", "--data.train.1.share", "null"]
    losses = []
    for name in ("one", "ddp"):
        run = tmp_path / name
        done = train(name, run, tmp_path / "cache", *more, ranks=3)
        check_success(done)
        losses.append([row["loss"] for row in read_log(run)[0]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
