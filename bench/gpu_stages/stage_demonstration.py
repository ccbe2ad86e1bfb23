"""The demonstration as a user runs it: through accelerate launch, killed in the middle and resumed,
scored, merged, scored again.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from medqlora.training.gpu_stage import Stage

ROOT = Path(__file__).parents[2]
WAIT = 200  # A run may take so many seconds.


def main() -> int:
    stage = Stage.from_arguments(sys.argv[1:], __doc__)
    steps, questions = (24, 40) if stage.small else (200, 200)
    environ = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    if stage.device.type == "cpu":
        environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        test = json.dumps(
            [
                {
                    "format": "medmcqa",
                    "path": str(ROOT / "recipes" / "demo" / "data" / "test.jsonl"),
                    "limit": questions,
                }
            ]
        )
        flags = [
            "--data.cache_dir",
            work / "cache",
            "--training.max_steps",
            steps,
            "--training.save_steps",
            steps // 4,
            "--data.test",
            test,
            "--training.eval_steps",
            steps // 2,
            "--lora.dropout",
            "0.05",
            "--training.deterministic",
            "true",
        ]
        whole = train(stage, "whole", work / "whole", flags, environ)
        kill_in_the_middle(stage, work / "killed", flags, steps // 2, environ)
        resumed = train(stage, "resumed", work / "killed", [*flags, "--resume"], environ)
        pairs = [(row["loss"], resumed[step]["loss"]) for step, row in whole.items()]
        stage.figure("resumed run equal to the bit", all(a == b for a, b in pairs))
        stage.check(
            "largest relative difference of a loss after resuming",
            max(abs(a - b) / a for a, b in pairs),
            1e-2,
        )
        metrics = json.loads((work / "killed" / "metrics.json").read_text())
        stage.figure(
            "accuracy",
            {"base": metrics["base"]["accuracy"], "tuned": metrics["accuracy"], "n": metrics["n"]},
        )
        stage.figure("memory_bytes", metrics["memory_bytes"])
        merge_and_score(stage, work, questions, environ)
    return stage.finish()


def launch(output: Path, flags: list) -> list[str]:
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        1,
        "--num_machines",
        1,
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    return list(
        map(str, [*command, ROOT / "recipes" / "sft_qlora.py", "--output_dir", output, *flags])
    )


def read_steps(output: Path) -> dict[int, dict]:
    path = output / "train_log.jsonl"
    rows = map(json.loads, path.read_text().splitlines()) if path.is_file() else []
    return {row["step"]: row for row in rows if "loss" in row}


def run(stage: Stage, name: str, command: list[str], environ: dict[str, str]) -> str:
    """A command that must succeed; its last lines are kept where it does not; -> what it
    printed.
    """
    began = time.perf_counter()
    done = subprocess.run(
        command, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=WAIT, check=False
    )
    stage.figure(f"{name}: seconds", time.perf_counter() - began)
    if done.returncode:
        stage.figure(f"{name}: output", (done.stdout[-1500:] + done.stderr[-2500:]).splitlines())
    stage.check(f"{name}: exit code", done.returncode, 0)
    if done.returncode:
        sys.exit(stage.finish())
    return done.stdout


def train(
    stage: Stage, name: str, output: Path, flags: list, environ: dict[str, str]
) -> dict[int, dict]:
    printed = run(stage, name, launch(output, flags), environ)
    if "--resume" in flags:
        stage.check("nothing was resumed", float("resuming after step" not in printed), 0)
    steps = read_steps(output)
    rates = sorted(row["tokens_per_second"] for row in steps.values())
    stage.figure(f"{name}: tokens per second", rates[len(rates) // 2])
    return steps


def kill_in_the_middle(
    stage: Stage, output: Path, flags: list, step: int, environ: dict[str, str]
) -> None:
    """kill -9 for the launcher and all that it started, once this step is logged."""
    process = subprocess.Popen(
        launch(output, flags),
        env=environ,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    began = time.perf_counter()
    while (
        process.poll() is None
        and time.perf_counter() - began < WAIT
        and max(read_steps(output), default=0) < step
    ):
        time.sleep(0.05)
    ended = process.poll()
    if ended is None:
        for child in [process, *psutil.Process(process.pid).children(recursive=True)]:
            child.kill()
    process.wait()
    stage.check("the run that was to be killed had ended by itself", float(ended is not None), 0)


def merge_and_score(stage: Stage, work: Path, questions: int, environ: dict[str, str]) -> None:
    """The merged model answers as the adapter did."""
    adapter = work / "killed" / "adapter"
    merged = work / "merged"
    output = work / "merged.jsonl"
    run(
        stage,
        "merge",
        [
            sys.executable,
            "recipes/merge_adapter.py",
            "--adapter",
            str(adapter),
            "--output",
            str(merged),
        ],
        environ,
    )
    test = str(ROOT / "recipes" / "demo" / "data" / "test.jsonl")
    predict = [
        sys.executable,
        "eval/predict.py",
        "--model",
        str(merged),
        "--format",
        "medmcqa",
        "--path",
        test,
        "--limit",
        str(questions),
        "--output",
        str(output),
    ]
    run(stage, "predict", predict, environ)
    ours = {
        row["id"]: row["prediction"]
        for row in map(
            json.loads, (work / "killed" / "predictions" / "tuned.jsonl").read_text().splitlines()
        )
    }
    theirs = {
        row["id"]: row["prediction"] for row in map(json.loads, output.read_text().splitlines())
    }
    limit = 0.2 if stage.small else 0.05  # After few steps many answers are near ties.
    stage.check(
        "share of answers that the merged model changes",
        sum(ours[key] != theirs[key] for key in ours) / len(ours),
        limit,
    )


if __name__ == "__main__":
    sys.exit(main())
