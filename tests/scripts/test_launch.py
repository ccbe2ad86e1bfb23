"""Preflight, the Slurm script's filling, and the scaling page, as commands."""

import json
import shutil
import socket
import subprocess

import pytest
import torch
import warm_processes
import yaml
from conftest import ROOT, real, run_inside, run_script
from safetensors.torch import save_file
from transformers import Gemma2Config, LlamaConfig, Phi3Config

PREFLIGHT = ROOT / "launch" / "preflight.py"
SUBMIT = ROOT / "launch" / "submit.py"
CONFIGS = ROOT / "accelerate_configs"
DEMO_YAML = ROOT / "recipes" / "configs" / "demo.yaml"


def preflight(output, *more, config=DEMO_YAML, accelerate=CONFIGS / "cpu.yaml"):
    arguments = [
        "--config",
        config,
        "--accelerate_config",
        accelerate,
        "--output_dir",
        output,
        "--data.cache_dir",
        output.parent / "cache",
        *more,
    ]
    return run_script(PREFLIGHT, *arguments)


def test_preflight_of_the_demonstration(tmp_path):
    done = preflight(tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    for part in (
        "recipe keys",
        "accelerate keys",
        "dtype, storage",
        "batch",
        "model",
        "data",
        "disk",
        "memory",
        "rendezvous",
        "two steps",
    ):
        assert part in done.stdout
    assert "isolates rows" in done.stdout
    assert "GiB predicted per process at" in done.stdout
    assert "FAILED" not in done.stdout
    assert list(tmp_path.iterdir()) == []  # nothing was written


PUBLISHED = {
    "llama3-8b": lambda: LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_theta=500000.0,
    ),
    "gemma2-2b": lambda: Gemma2Config(),
    "phi3-mini": lambda: Phi3Config(
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_scaling={"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.5] * 48},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_preflight_of_published_architectures_without_their_weights(tmp_path, name):
    """Eight GPUs under FSDP2, on real questions."""
    base = tmp_path / "base"
    shutil.copytree(real(f"tokenizers/{'llama-3' if 'llama' in name else 'qwen2.5'}"), base)
    PUBLISHED[name]().save_pretrained(base)
    save_file({"unused": torch.zeros(1)}, base / "model.safetensors")
    strategy = yaml.safe_load((CONFIGS / "fsdp2.yaml").read_text()) | {"num_processes": 8}
    (tmp_path / "fsdp2.yaml").write_text(yaml.safe_dump(strategy))
    data = json.dumps([{"format": "medmcqa", "path": str(real("medmcqa/train_partial.jsonl"))}])
    config = tmp_path / "recipe.yaml"
    config.write_text(
        yaml.safe_dump({"model": {"base": str(base)}, "data": {"prompt_style": "plain"}})
    )
    done = preflight(
        tmp_path / "run",
        "--data.train",
        data,
        "--data.drop_invalid",
        "true",
        "--training.global_batch_tokens",
        "65536",
        "--training.max_tokens_per_batch",
        "8192",
        config=config,
        accelerate=tmp_path / "fsdp2.yaml",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "65,536 tokens per step = 8 x 1 micro-batch(es) of 8,192" in done.stdout
    assert "isolates rows" in done.stdout
    assert "GiB predicted per process at" in done.stdout


MISTAKES = {
    "accelerate key": ([], {"num_gpus": 2}, "num_gpus"),
    "machines": (
        [],
        {"num_processes": 3, "num_machines": 2, "distributed_type": "MULTI_GPU"},
        "not a multiple of num_machines",
    ),
    "data": (["--data.train.0.path", "/nowhere.jsonl"], {}, "no file or folder"),
    "master": (
        [],
        {
            "num_processes": 2,
            "num_machines": 2,
            "distributed_type": "MULTI_GPU",
            "main_process_ip": "192.0.2.1",
            "main_process_port": 29500,
        },
        "it must be machine 0's",
    ),
}


def test_a_misspelt_key_is_said_before_anything_is_imported(tmp_path):
    done = preflight(tmp_path / "run", "--training.lrr", "1")
    assert done.returncode == 2
    assert done.stderr == "--training.lrr: unknown key training.lrr; did you mean training.lr?\n"
    assert not done.stdout


@pytest.mark.parametrize("mistake", MISTAKES)
def test_preflight_finds(tmp_path, mistake):
    overrides, changes, message = MISTAKES[mistake]
    tree = yaml.safe_load((CONFIGS / "cpu.yaml").read_text()) | changes
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(tree))
    done = preflight(tmp_path / "run", *overrides, accelerate=tmp_path / "accelerate.yaml")
    assert done.returncode == 2
    assert "check(s) failed" in done.stderr.splitlines()[-1]
    shown = " ".join(done.stdout.replace("│", " ").split())
    assert message in shown, shown


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def meet(*machines: list[str]) -> list[tuple[int, str]]:
    """Start all machines' preflights at once; return exit code and last line of each."""
    port = free_port()
    started = [
        warm_processes.start(
            [
                str(PREFLIGHT),
                "--rendezvous",
                f"127.0.0.1:{port}",
                "--num_machines",
                "2",
                "--seconds",
                "6",
                *more,
            ],
            ROOT,
            join_outputs=True,
        )
        for more in machines
    ]
    return [
        (process.returncode, shown.strip().splitlines()[-1])
        for process, (shown, _) in [(p, p.communicate(timeout=60)) for p in started]
    ]


@pytest.mark.full
def test_machines_meet_or_say_who_is_missing(tmp_path):
    for code, line in meet(["--machine_rank", "0"], ["--machine_rank", "1"]):
        assert code == 0
        assert "2 machine(s) met" in line
    ((code, line),) = meet(["--machine_rank", "0"])
    assert (code, "machine 1 of 2 did not come" in line) == (2, True)
    ((code, line),) = meet(["--machine_rank", "1"])
    assert (code, "cannot reach machine 0" in line) == (2, True)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    for code, line in meet(
        ["--machine_rank", "0", "--shared_folder", str(tmp_path / "a")],
        ["--machine_rank", "1", "--shared_folder", str(tmp_path / "b")],
    ):
        assert (code, "does not see" in line) == (2, True)


# ---- Slurm ---------------------------------------------------------------------------------------


def submit(*more: str):
    return run_script(
        SUBMIT,
        "--accelerate_config",
        CONFIGS / "ddp.yaml",
        "--config",
        "recipes/configs/llama3-8b_medmcqa.yaml",
        "--output_dir",
        "runs/mine",
        "--nodes",
        "8",
        "--gpus_per_node",
        "8",
        *more,
    )


def test_dry_run_for_64_gpus(tmp_path):
    done = submit(
        "--partition",
        "gpu",
        "--time",
        "2-00:00:00",
        "--sbatch=--mem=0",
        "--dry_run",
        "--training.global_batch_tokens",
        "1048576",
        "--training.max_tokens_per_batch",
        "8192",
        "--data.train",
        '[{format: medmcqa, path: "a b.jsonl"}]',
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    directives = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    for directive in (
        "nodes=8",
        "gpus-per-node=8",
        "ntasks-per-node=1",
        "time=2-00:00:00",
        "partition=gpu",
        "requeue",
        "signal=B:USR1@120",
        "mem=0",
    ):
        assert directives.count(directive) == 1, directive
    assert len({directive.partition("=")[0] for directive in directives}) == len(directives)
    assert (
        "# 64 processes = 8 node(s) x 8; 1,048,576 tokens per step = 64 x 2 micro-batch(es) of"
        " 8,192" in lines
    )
    script = tmp_path / "filled.sbatch"
    script.write_text(done.stdout)
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    shown = subprocess.run(
        [
            "bash",
            "-c",
            next(line for line in lines if line.startswith("set -- ")) + '; printf "%s\n" "$@"',
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert shown[:2] == [str(CONFIGS / "ddp.yaml"), "recipes/sft_qlora.py"]
    # one argument, blanks and quotes as they were
    assert shown[-1] == '[{format: medmcqa, path: "a b.jsonl"}]'


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            [
                *("--training.global_batch_tokens", "10000"),
                *("--training.max_tokens_per_batch", "8192"),
            ],
            "not a multiple of max_tokens_per_batch 8192",
        ),
        (["--nodes", "0"], "expected a whole number from 1"),
        (["--time", "tomorrow"], "expected [DAYS-]HH:MM:SS"),
        (["--recipe", "recipes/none.py"], "no such file"),
        (["--training.lrr", "1"], "did you mean training.lr"),
        (["--accelerate_config", str(CONFIGS / "one_gpu.yaml")], "is for one process"),
        (
            [
                "--accelerate_config",
                str(CONFIGS / "zero3.yaml"),
                "--training.optimizer",
                "adamw_8bit",
            ],
            "8-bit states",
        ),
    ],
)
def test_submission_that_could_not_run_is_refused(more, message):
    done = submit("--dry_run", *more)
    assert (done.returncode, len(done.stderr.splitlines()), done.stdout) == (2, 1, "")
    assert message in done.stderr


def submit_stages(*more: str):
    stages = ["--stages", "recipes/configs/demo_stages.yaml", "--output_dir", "runs/mine"]
    return run_script(SUBMIT, "--accelerate_config", CONFIGS / "ddp.yaml", *stages, *more)


def test_stages_are_submitted_as_one_job():
    done = submit_stages("--gpus_per_node", "2", "--facts.training.lr", "1e-4", "--dry_run")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "#SBATCH --job-name=demo_stages" in lines
    (command,) = [line for line in lines if line.startswith("set -- ")]
    assert command.endswith(
        "recipes/train_stages.py recipes/configs/demo_stages.yaml --output_dir runs/mine"
        " --facts.training.lr 1e-4"
    )
    for more, message in (
        (["--recipe", "recipes/sft_qlora.py"], "--stages is for recipes/train_stages.py alone"),
        (["--config", "a.yaml"], "not allowed with argument --stages"),
        (["--questions.lora.r", "8"], "stage questions: lora.r is 8"),
    ):
        done = submit_stages("--dry_run", *more)
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr


def test_submission_without_slurm_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    done = submit("--training.global_batch_tokens", "524288")
    assert (done.returncode, "sbatch was not found" in done.stderr) == (2, True)


# ---- the scaling page ----------------------------------------------------------------------------


def test_scaling_page_holds_the_scripts_tables(monkeypatch, tmp_path):
    script = ROOT / "bench" / "scaling.py"
    assert run_inside(script, ["--check", ROOT / "docs" / "scaling.md"], monkeypatch) == (0, "")
    (tmp_path / "page.md").write_text("nothing")
    code, complaint = run_inside(script, ["--check", tmp_path / "page.md"], monkeypatch)
    assert (code, complaint.count("\n")) == (2, 1)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_last_line_of_a_launched_mistake_is_ours(processes):
    """accelerate adds its own traceback, and our line stands below it once more."""
    command = ["accelerate", "launch", "--cpu", f"--num_processes={processes}"]
    if processes > 1:
        command = [
            "accelerate",
            "launch",
            "--config_file",
            ROOT / "accelerate_configs" / "ddp.yaml",
        ]
    # The file is read by whoever waits for the last process that writes to it.
    done = subprocess.run(
        [*command, ROOT / "recipes" / "sft_qlora.py", "--training.lrr", "3"],
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )
    line = "--training.lrr: unknown key training.lrr; did you mean training.lr?"
    assert done.stderr.splitlines()[-1] == line
    assert done.stderr.count(line) == 2
    assert done.returncode == 1


@pytest.mark.parametrize(
    "script",
    ["recipes/prepare_data.py", "recipes/sft_qlora.py", "eval/score.py", "launch/submit.py"],
)
def test_a_script_outside_its_environment_says_so(script):
    # Without site packages Python has its own library only.
    done = run_script("-S", "-I", ROOT / script, cold=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "is not installed for" in done.stderr
    assert ".venv/bin/activate" in done.stderr or "launch/demo.sh" in done.stderr
