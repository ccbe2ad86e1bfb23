"""The demonstration as a user runs it through accelerate launch: killed in the middle and resumed,
scored, merged, and scored again.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from medqlora.training.gpu_stage import Stage

ROOT = Path(__file__).parents[2]
DATA = ROOT / "recipes" / "demo" / "data" / "test.jsonl"
WAIT = 200  # A run may take so many seconds.


def main() -> int:
    stage = Stage.from_arguments(sys.argv[1:], __doc__)
    steps, questions = (24, 40) if stage.small else (200, 200)
    environ = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    if stage.device.type == "cpu":
        environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        entry = {"format": "medmcqa", "path": str(DATA), "limit": questions}
        # Dropout is on, because its masks must also be the same after a resume. A checkpoint at
        # every quarter leaves one that is complete when the run is killed after its half.
        flags = [
            f"--data.cache_dir={work / 'cache'}",
            f"--training.max_steps={steps}",
            f"--training.save_steps={steps // 4}",
            f"--data.test={json.dumps([entry])}",
            f"--training.eval_steps={steps // 2}",
            "--lora.dropout=0.05",
            "--training.deterministic=true",
        ]
        whole = train(stage, "whole", work / "whole", flags, environ)
        kill_in_the_middle(stage, work / "killed", flags, steps // 2, environ)
        resumed = train(stage, "resumed", work / "killed", [*flags, "--resume"], environ)
        compare_losses(stage, whole, resumed)
        metrics = json.loads((work / "killed" / "metrics.json").read_text())
        stage.figure(
            "accuracy",
            {"base": metrics["base"]["accuracy"], "tuned": metrics["accuracy"], "n": metrics["n"]},
        )
        stage.figure("memory_bytes", metrics["memory_bytes"])
        merge_and_score(stage, work, questions, environ)
    return stage.finish()


def compare_losses(stage: Stage, whole: dict[int, dict], resumed: dict[int, dict]) -> None:
    pairs = [(row["loss"], resumed[step]["loss"]) for step, row in whole.items()]
    # Equal bits are recorded and not demanded, because not every GPU kernel has a deterministic
    # form.
    stage.figure("resumed run equal to the bit", all(a == b for a, b in pairs))
    # Python's max() would pass over NaN.
    largest = float(np.max([abs(a - b) / a for a, b in pairs]))
    stage.check("largest relative difference of a loss after resuming", largest, 1e-2)


def launch(output: Path, flags: list[str]) -> list[str]:
    """The command of a training on one process."""
    return [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes=1",
        "--num_machines=1",
        "--mixed_precision=no",
        "--dynamo_backend=no",
        str(ROOT / "recipes" / "sft_qlora.py"),
        f"--output_dir={output}",
        *flags,
    ]


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_steps(output: Path) -> dict[int, dict]:
    path = output / "train_log.jsonl"
    rows = read_rows(path) if path.is_file() else []
    # Rows without a loss are those of evaluations.
    return {row["step"]: row for row in rows if "loss" in row}


def run(stage: Stage, name: str, command: list[str], environ: dict[str, str]) -> str:
    """Run a command -> what it printed. Where it fails, its last lines are recorded and the stage
    ends.
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
        # The later commands need the files of this one.
        sys.exit(stage.finish())
    return done.stdout


def train(
    stage: Stage, name: str, output: Path, flags: list[str], environ: dict[str, str]
) -> dict[int, dict]:
    printed = run(stage, name, launch(output, flags), environ)
    if "--resume" in flags:
        # A run that begins anew without a word would give the same losses, and the comparison would
        # prove nothing.
        stage.check("nothing was resumed", float("resuming after step" not in printed), 0)
    steps = read_steps(output)
    rates = sorted(row["tokens_per_second"] for row in steps.values())
    stage.figure(f"{name}: tokens per second", rates[len(rates) // 2])
    return steps


def kill_in_the_middle(
    stage: Stage, output: Path, flags: list[str], step: int, environ: dict[str, str]
) -> None:
    """Kill the launcher and all that it started (SIGKILL), once this step is logged."""
    process = subprocess.Popen(
        launch(output, flags),
        env=environ,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.perf_counter() + WAIT
    while process.poll() is None and time.perf_counter() < deadline:
        # The kill falls into some later step, at no particular point.
        if max(read_steps(output), default=0) >= step:
            break
        time.sleep(0.05)
    ended = process.poll()
    if ended is None:
        # The list is complete before the first is killed, because the children of a dead process
        # can no longer be found through it.
        for child in [process, *psutil.Process(process.pid).children(recursive=True)]:
            child.kill()
    process.wait()
    # A run that ended by itself leaves nothing to resume.
    stage.check("the run that was to be killed had ended by itself", float(ended is not None), 0)


def merge_and_score(stage: Stage, work: Path, questions: int, environ: dict[str, str]) -> None:
    """The merged model answers as the adapter did."""
    merged = work / "merged"
    output = work / "merged.jsonl"
    merge = [
        sys.executable,
        "recipes/merge_adapter.py",
        f"--adapter={work / 'killed' / 'adapter'}",
        f"--output={merged}",
    ]
    run(stage, "merge", merge, environ)
    predict = [
        sys.executable,
        "eval/predict.py",
        f"--model={merged}",
        "--format=medmcqa",
        f"--path={DATA}",
        f"--limit={questions}",
        f"--output={output}",
    ]
    run(stage, "predict", predict, environ)
    # The resumed run continued in the folder of the killed one, so its answers lie there.
    answers = read_answers(work / "killed" / "predictions" / "tuned.jsonl")
    merged_answers = read_answers(output)
    # Merged and unmerged weights round differently, so answers at a tie may change.
    changed = sum(answers[key] != merged_answers[key] for key in answers) / len(answers)
    limit = 0.2 if stage.small else 0.05  # After few steps many answers are near ties.
    stage.check("share of answers that the merged model changes", changed, limit)


def read_answers(path: Path) -> dict[str, str]:
    return {row["id"]: row["prediction"] for row in read_rows(path)}


if __name__ == "__main__":
    sys.exit(main())
