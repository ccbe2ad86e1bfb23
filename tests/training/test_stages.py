"""Several trainings in one command: all are checked first, each goes on from the one before, and a
kill or a signal in any of them loses nothing.
"""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import warm_processes
import yaml
from conftest import DEMO, ROOT, run_inside, run_script

from medqlora.core.errors import UserError
from medqlora.core.files import write_checked
from medqlora.core.run_lock import LOCK
from medqlora.training.stages import check_folders, count_finished, read_stages
from medqlora.training.strategies.launch import launch_environ

SCRIPT = ROOT / "recipes" / "train_stages.py"
NAMES = ("facts", "questions")
MODEL = {"base": str(DEMO / "base"), "dtype": "float32"}
LORA = {"r": 4, "dropout": 0.1}
SHORT = {
    "epochs": 5,
    "max_steps": 6,
    "global_batch_tokens": 512,
    "max_tokens_per_batch": 512,
    "save_steps": 2,
    "eval_steps": 3,
    "gradient_checkpointing": "none",
    "lr": 1e-3,
}


def list_stages(cache) -> list[dict]:
    """Two stages of six steps, on the explanations of the demonstration and on its questions."""
    source = str(DEMO / "data" / "train.jsonl")
    held_out = {"format": "medmcqa", "path": str(DEMO / "data" / "validation.jsonl"), "limit": 16}
    text = {"format": "text", "path": source, "columns": {"text": "exp"}, "limit": 150}
    questions = {"format": "medmcqa", "path": source, "limit": 60}
    return [
        {
            "name": name,
            "config": {
                "model": MODEL,
                "lora": LORA,
                "data": {
                    "train": [entry],
                    "eval": [held_out],
                    "max_length": 128,
                    "cache_dir": str(cache),
                    "order": order,
                },
                "training": SHORT,
            },
        }
        for name, entry, order in (
            ("facts", text, "shuffled"),
            ("questions", questions, "easy_to_hard"),
        )
    ]


def write_stages(folder, stages) -> str:
    path = folder / "stages.yaml"
    path.write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    return str(path)


def read_losses(run) -> list[list[tuple]]:
    logs = [(run / name / "train_log.jsonl").read_text().splitlines() for name in NAMES]
    return [
        [(row["step"], row.get("loss"), row.get("eval_loss")) for row in map(json.loads, log)]
        for log in logs
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The file of two stages and their uninterrupted run."""
    folder = tmp_path_factory.mktemp("finished")
    path = write_stages(folder, list_stages(folder / "cache"))
    done = run_script(SCRIPT, path, "--output_dir", folder / "run")
    assert done.returncode == 0, done.stderr
    return path, folder / "run", done.stdout


def test_a_stage_begins_with_the_adapter_of_the_one_before(finished):
    _, run, shown = finished
    assert "stage 2 of 2, questions" in shown
    for name in NAMES:
        for file in ("metrics.json", "environment.json", "config.yaml", "origin.json"):
            assert (run / name / file).is_file()
    first, second = (
        json.loads((run / name / "adapter" / "medqlora.json").read_text()) for name in NAMES
    )
    assert second["init_adapter"]["folder"] == str(run / "facts" / "adapter")
    assert second["init_adapter"]["weights_sha256"] == first["weights_sha256"]
    # Before its first step the second stage measures what the first one has measured last.
    before = json.loads((run / "facts" / "metrics.json").read_text())["eval_loss"]
    step, _, after = read_losses(run)[1][0]
    assert step == 0
    assert after == pytest.approx(before, abs=1e-6)


def test_what_is_finished_is_not_trained_again(finished):
    path, run, _ = finished
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()}
    done = run_script(SCRIPT, path, "--output_dir", run, "--resume")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished; its adapter is") == 2
    assert before == {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match="holds a run; continue it with --resume"):
        check_folders(read_stages(Path(path), [], run), resume=False)
    for name in NAMES:
        stages = read_stages(Path(path), [f"--{name}.training.lr", "0.5"], run)
        with pytest.raises(UserError, match=r"training\.lr was 0\.001"):
            check_folders(stages, resume=True)


# A step takes a tenth of a second at least, so that a kill finds the stage unfinished.
SLOW = """
import runpy, sys, time
from medqlora.training import session
update = session.Session.update
def slow(self, lr):
    time.sleep(0.1)
    return update(self, lr)
session.Session.update = slow
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start_until(arguments: list[str], log, lines: int):
    """Start the script, and return its process when a log has so many lines."""
    process = warm_processes.start(["-c", SLOW, str(SCRIPT), *map(str, arguments)], ROOT)
    while process.poll() is None:
        if log.exists() and log.read_bytes().count(b"\n") >= lines:
            return process
        time.sleep(0.02)
    raise AssertionError(process.communicate())


@pytest.mark.full
def test_killed_in_each_stage_and_resumed_equals_uninterrupted(finished, tmp_path):
    path, run, _ = finished
    arguments = [path, "--output_dir", tmp_path / "run"]
    for name in NAMES:
        process = start_until(arguments, tmp_path / "run" / name / "train_log.jsonl", 4)
        process.kill()
        process.communicate()
        # The process of the stage has ended with it, so its folder is free at once.
        deadline = time.monotonic() + 30
        while holder_lives(tmp_path / "run" / name / LOCK):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        arguments = [path, "--output_dir", tmp_path / "run", "--resume"]
    done = run_script(SCRIPT, *arguments)
    assert done.returncode == 0, done.stderr
    assert read_losses(tmp_path / "run") == read_losses(run)
    weights = [
        folder / "questions/adapter/adapter_model.safetensors" for folder in (run, tmp_path / "run")
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def holder_lives(lock) -> bool:
    """Whether the process that a lock names is still there and no zombie."""
    number = lock.read_text().split()[1]
    try:
        with open(f"/proc/{number}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_a_signal_ends_the_stage_with_a_checkpoint(finished, tmp_path, number):
    path, _, _ = finished
    arguments = [path, "--output_dir", tmp_path / "run"]
    process = start_until(arguments, tmp_path / "run" / "facts" / "train_log.jsonl", 1)
    process.send_signal(number)
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert "continue with --resume" in shown
    assert "stage 2 of 2" not in shown
    assert not (tmp_path / "run" / "questions").exists()


@pytest.mark.full
def test_two_processes_train_both_stages(finished, tmp_path):
    """They join anew in each stage, through the one store that their launcher has. Their steps have
    the rows of one process, in the order of the losses that rank 0 measures.
    """
    path, run, _ = finished
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ddp = yaml.safe_load((ROOT / "accelerate_configs" / "ddp.yaml").read_text())
    environment = launch_environ(ddp) | {
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    flags = [part for name in NAMES for part in (f"--{name}.lora.dropout", "0")]
    command = [SCRIPT, path, "--output_dir", tmp_path / "run", *flags]
    ranks = warm_processes.start_ranks([command] * 2, [environment] * 2)
    codes, _, errors = warm_processes.finish_ranks(ranks)
    assert codes == [0, 0], errors
    for name in NAMES:
        environment = json.loads((tmp_path / "run" / name / "environment.json").read_text())
        assert (environment["processes"], environment["strategy"]) == (2, "ddp")
        alone = json.loads((run / name / "environment.json").read_text())
        for key in ("steps_sha256", "row_losses_sha256", "order"):
            assert environment.get(key) == alone.get(key), key
    assert environment["order"]["name"] == "easy_to_hard"
    (_, second) = read_losses(tmp_path / "run")
    before = json.loads((tmp_path / "run" / "facts" / "metrics.json").read_text())["eval_loss"]
    assert second[0][2] == pytest.approx(before, abs=1e-6)


@pytest.mark.full
def test_the_shipped_demonstration_trains(tmp_path):
    few = [
        *("--facts.training.max_steps", "2", "--questions.training.max_steps", "2"),
        *("--questions.data.train.0.limit", "100", "--questions.data.train.1.limit", "40"),
        *("--questions.data.eval.0.limit", "10", "--questions.data.test", "[]"),
        *("--facts.data.cache_dir", tmp_path / "cache"),
        *("--questions.data.cache_dir", tmp_path / "cache"),
    ]
    path = ROOT / "recipes" / "configs" / "demo_stages.yaml"
    done = run_script(SCRIPT, path, "--output_dir", tmp_path / "run", *few)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run" / "questions" / "metrics.json").read_text())
    assert metrics["steps"] == 2


# ---- mistakes ------------------------------------------------------------------------------------


def refuse(folder, stages, *flags) -> str:
    """The message that refuses these stages; it is one line."""
    with pytest.raises(UserError) as caught:
        read_stages(folder / "stages.yaml", list(flags), folder / "run")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("lora.r", "8", "stage questions: lora.r is 8, and 4 in stage facts"),
        ("lora.alpha", "8", "lora.alpha is 8.0, and 32"),
        ("lora.variant", "dora", "lora.variant is dora, and lora"),
        ("lora.target_modules", "[q_proj]", "lora.target_modules is ['q_proj'], and all-linear"),
        ("model.base", "other/model", "model.base is other/model, and"),
        ("model.quantization", "none", "model.quantization is none, and nf4"),
        ("model.double_quantization", "false", "model.double_quantization is False, and True"),
        ("training.lr", "fast", "stage questions: --questions.training.lr"),
        ("training.lrr", "1", "unknown key training.lrr; did you mean training.lr"),
        ("data.train.0.path", "none.jsonl", "stage questions: medmcqa: no file or folder"),
    ],
)
def test_a_mistake_of_the_second_stage_is_said_first(tmp_path, flag, value, message):
    write_stages(tmp_path, list_stages(tmp_path))
    assert message in refuse(tmp_path, None, f"--questions.{flag}", value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no list of stages; expected stages: [{name: NAME"),
        ("stages: []", "no list of stages"),
        ("stages: {a: b}", "no list of stages"),
        ("stages: [a.yaml]", "line 1: stage has 'a.yaml'; expected name and config"),
        ("stages:\n  - {name: a}", "line 2: stage has name; expected name and config"),
        ("stages: [{name: a, config: b.yaml, lr: 1}]", "stage has name, config, lr"),
        ("stages: [{name: a/b, config: b.yaml}]", "name 'a/b'; expected letters"),
        ("stages: [{name: 1, config: b.yaml}]", "name 1; expected letters"),
        ("stages: [{name: launch, config: b.yaml}]", "is the folder of the launcher's files"),
        ("stages: [{name: a, config: {}}, {name: A, config: {}}]", "name A stands twice"),
        ("stages: [{name: a, config: 3}]", "config is of type int; expected a YAML file"),
        ("stages: [{name: a, config: no.yaml}]", "stage a: "),
        ("stages:\n- name: a\n  config:\n    model: {bas: x}", "stages.yaml line 4: unknown key"),
        ("stages: [{name: a, config: {}}]", "set it in the file or with --a.model VALUE"),
        ("model: {base: x}", "line 1: unknown key model; expected stages: ["),
    ],
)
def test_a_list_that_is_none_is_refused(tmp_path, content, message):
    (tmp_path / "stages.yaml").write_text(content)
    assert message in refuse(tmp_path, None)


def test_a_flag_of_no_stage_is_refused_before_slow_imports(tmp_path, monkeypatch):
    path = write_stages(tmp_path, list_stages(tmp_path))
    for flags, message in (
        (["--training.lr", "1"], "no stage training; expected --NAME.section.key VALUE with NAME"),
        (["--resume_changed"], "give --resume too"),
        (["more.yaml"], "expected --section.key VALUE"),
    ):
        code, err = run_inside(SCRIPT, [path, *flags], monkeypatch)
        assert (code, err.count("\n")) == (2, 1)
        assert message in err


def test_a_row_of_a_later_stage_is_refused_before_the_first_begins(tmp_path):
    stages = list_stages(tmp_path / "cache")
    lines = (DEMO / "data" / "train.jsonl").read_text().splitlines()[:3]
    bad = json.loads(lines[2]) | {"cop": 9}
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines[:2], json.dumps(bad)]))
    stages[1]["config"]["data"]["train"][0]["path"] = "./rows.jsonl"
    done = run_script(SCRIPT, write_stages(tmp_path, stages), "--output_dir", tmp_path / "run")
    assert done.returncode == 2
    assert "rows.jsonl line 3" in done.stderr
    assert not (tmp_path / "run" / "facts").exists()


def test_stages_that_no_longer_belong_together_are_refused(finished, tmp_path):
    path, run, _ = finished
    shutil.copytree(run, tmp_path / "run")
    stages = read_stages(ROOT / path, [], tmp_path / "run")
    assert count_finished(stages) == 2
    (tmp_path / "run" / "questions" / "metrics.json").unlink()
    assert count_finished(stages) == 1
    metadata = tmp_path / "run" / "facts" / "adapter" / "medqlora.json"
    tree = json.loads(metadata.read_text())
    metadata.write_text(json.dumps(tree | {"weights_sha256": "0" * 64}))
    with pytest.raises(UserError, match="stage questions began with another adapter"):
        count_finished(stages)
    os.remove(tmp_path / "run" / "facts" / "metrics.json")
    with pytest.raises(UserError, match="facts before it is not finished"):
        count_finished(stages)
    # A stage that has not begun asks nothing of the one before.
    shutil.rmtree(tmp_path / "run" / "questions")
    assert count_finished(stages) == 0
    (tmp_path / "run" / "questions").mkdir()
    write_checked(tmp_path / "run" / "questions" / "origin.json", {"init_adapter": None})
    with pytest.raises(UserError, match="not finished"):
        count_finished(stages)


def test_paths_are_relative_to_the_list_and_bases_are_compared_as_folders(tmp_path):
    stages = list_stages(tmp_path)
    (tmp_path / "configs").mkdir()
    for number, stage in enumerate(stages):
        (tmp_path / "configs" / f"{number}.yaml").write_text(yaml.safe_dump(stage["config"]))
        stage["config"] = f"configs/{number}.yaml"
    write_stages(tmp_path, stages)
    other = f"{DEMO}/../demo/base"
    first, second = read_stages(
        tmp_path / "stages.yaml", ["--questions.model.base", other], tmp_path / "run"
    )
    assert first.config.lora.init_adapter is None
    assert second.config.lora.init_adapter == str(tmp_path / "run" / "facts" / "adapter")
    assert second.replaced is None
    flags = ["--questions.lora.init_adapter", "elsewhere"]
    assert read_stages(tmp_path / "stages.yaml", flags, tmp_path)[1].replaced == "elsewhere"
