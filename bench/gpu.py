"""Does everything work on this GPU, and how fast? This is one command for a machine on which
nothing of this project is installed.

    # All stages, in nine minutes on an H100.
    PYTHONPATH=. python bench/gpu.py --output found
    PYTHONPATH=. python bench/gpu.py --output found --stages card,kernels,memory
    # The same scripts on small shapes, as a rehearsal.
    PYTHONPATH=. python bench/gpu.py --output found --device cpu
    # TRL beside ours as well; this needs pip install trl==1.16.0.
    PYTHONPATH=. python bench/gpu.py --output found --peers
    # ddp, zero2, zero3 and fsdp2 on all GPUs against one process as well.
    PYTHONPATH=. python bench/gpu.py --output found --multi

Each stage is a process (bench/gpu_stages/) with a time limit of its own, which writes every finding
at once. OUTPUT/gpu.json has them as soon as the stage ends, also where it fails. A failing stage
stops no other. A stage that does not fit into the remaining minutes is skipped and named. The exit
code is 0 only if everything that ran has passed. bench/gpu_wheels.py makes a folder of the packages
that a bare machine lacks.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from medqlora.core.entry import enter

    enter()

from medqlora.core.command import CommandParser, above_zero, run_command
from medqlora.core.errors import ConfigError
from medqlora.core.files import write_json

ROOT = Path(__file__).parent.parent
FOLDER = Path(__file__).parent / "gpu_stages"
LOG_BYTES = 4 * 2**20  # The log keeps this much of the stages' last output.
LOSS_LIMIT = 1e-4  # largest relative difference of a loss to one process, in float32
RESULTS = "gpu.json"
LOG = "gpu.log"


@dataclass(frozen=True)
class Plan:
    """A stage.

    Args:
        seconds: estimated duration on an H100.
        limit: seconds after which the stage is ended.
    """

    name: str
    seconds: int
    limit: int


# Stages run in this order, because later ones rest on what earlier ones try. Their seconds sum to
# less than nine minutes.
STAGES = (
    Plan("card", 15, 60),
    Plan("kernels", 60, 150),
    Plan("bases", 30, 90),
    Plan("memory", 60, 120),
    Plan("throughput", 75, 150),
    Plan("demonstration", 110, 220),
    Plan("optimizers", 15, 60),
    Plan("full_memory", 40, 120),
    Plan("profile", 30, 90),
    Plan("engine", 40, 100),
)
PEERS = Plan("peers", 400, 1500)
MULTI = Plan("multi", 240, 900)


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="folder for gpu.json and gpu.log; made if it is not there",
    )
    parser.add_argument(
        "--minutes",
        type=above_zero,
        help="time for all stages (default 9, and as long as --peers and --multi may take)",
    )
    parser.add_argument(
        "--stages", help=f"comma-separated (default: {','.join(stage.name for stage in STAGES)})"
    )
    parser.add_argument(
        "--peers",
        action="store_true",
        help="also a random 1B model, ours against TRL, equal packs, three alternating repetitions",
    )
    parser.add_argument(
        "--multi", action="store_true", help="also every strategy on two or more GPUs against one"
    )
    parser.add_argument(
        "--device",
        choices=["cuda", "cpu"],
        default="cuda",
        help="cpu: small shapes, to rehearse the scripts (default cuda)",
    )
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    arguments.output = arguments.output.resolve()  # Stages run in another folder.
    stages = choose_stages(arguments)
    check_device(arguments.device)
    check_output(arguments.output)
    # A process that outlives its stage may still write there. Then the folder cannot be removed,
    # which must not cost the results.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        results = run_stages(stages, arguments, Path(folder))
    show(results)
    ran = [result for result in results.values() if result["status"] != "skipped"]
    return 0 if ran and all(result["status"] == "passed" for result in ran) else 1


def run_stages(stages: list[Plan], arguments: argparse.Namespace, folder: Path) -> dict[str, dict]:
    """Run the stages that fit into the time, one after the other -> their results by name.

    Args:
        folder: for temporary files and for the files of compilers, which stages share.
    """
    minutes = arguments.minutes
    if not minutes:
        # The other stages fit nine minutes. The two optional ones add as long as they may take.
        minutes = 9 + sum(stage.limit for stage in stages if stage in (PEERS, MULTI)) / 60
    environ = make_environ(arguments.device, folder)
    began = time.monotonic()
    results = {}
    for stage in stages:
        left = 60 * minutes - (time.monotonic() - began)
        # A stage begins if its estimate fits. It may then use what time is left, up to its limit.
        if stage.seconds > left:
            reason = f"needs about {stage.seconds} s, {left:.0f} s are left"
            results[stage.name] = {"status": "skipped", "reason": reason}
        else:
            limit = min(stage.limit, max(left, stage.seconds))
            results[stage.name] = run_stage(stage, arguments, environ, limit)
        # The file is written after every stage, so an interrupted run keeps what it has found.
        report = {"device": arguments.device, "minutes": minutes, "stages": results}
        write_json(arguments.output / RESULTS, report)
        print(describe(stage.name, results[stage.name]), flush=True)
    return results


def make_environ(device: str, folder: Path) -> dict[str, str]:
    # The project is not installed on a bare machine, so the stages find it by this path.
    paths = [str(ROOT)]
    if os.environ.get("PYTHONPATH"):
        paths.append(os.environ["PYTHONPATH"])
    # The stages share the folders of compiled kernels, so none is compiled twice. The folders are
    # new, so no kernel of an earlier run is taken.
    environ = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "TMPDIR": str(folder),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
    }
    if device == "cpu":
        # An empty list hides every GPU, because a rehearsal must not touch one.
        environ["CUDA_VISIBLE_DEVICES"] = ""
    return environ


def choose_stages(arguments: argparse.Namespace) -> list[Plan]:
    """The stages that the flags name.

    Raises:
        ConfigError: an unknown stage, or no time.
    """
    known = {stage.name: stage for stage in STAGES}
    names = list(known) if arguments.stages is None else arguments.stages.split(",")
    for name in names:
        if name not in known:
            raise ConfigError(f"--stages {name}: no such stage; there are {', '.join(known)}")
    stages = [known[name] for name in names]
    if arguments.peers:
        stages.append(PEERS)
    if arguments.multi:
        stages.append(MULTI)
    return stages


def check_device(device: str) -> None:
    """Refuse a machine without GPU once, before every stage does.

    Raises:
        ConfigError: torch sees no GPU.
    """
    # Importing torch takes seconds, so the flags have been checked before this.
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "torch sees no GPU here; --device cpu rehearses the stages on small shapes"
        )


def check_output(folder: Path) -> None:
    """Make the folder.

    Raises:
        ConfigError: it holds results, or it cannot be made.
    """
    if (folder / RESULTS).exists():
        raise ConfigError(f"--output {folder} holds {RESULTS}; give another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--output {folder} cannot be made: {error.strerror}; give another folder"
        ) from None


def make_command(stage: Plan, arguments: argparse.Namespace, output: Path) -> list[str]:
    if stage is PEERS:
        # A bare machine has no data but those of the demonstration.
        demo = ROOT / "recipes" / "demo"
        rows, shape = (300, "74m") if arguments.device == "cpu" else (4000, "1b")
        script = ROOT / "bench" / "peers" / "sft.py"
        flags = [
            f"--tokenizer={demo / 'base'}",
            f"--data={demo / 'data' / 'train.jsonl'}",
            "--dtype=bfloat16",
            "--repetitions=3",
            f"--json={output}",
            f"--rows={rows}",
            f"--shape={shape}",
        ]
    elif stage is MULTI:
        script = ROOT / "bench" / "strategies.py"
        flags = [f"--processes={count_processes()}", f"--json={output}"]
        if arguments.device == "cpu":
            flags.append("--steps=4")
        flags += ["--strategies", "ddp", "zero2", "zero3", "fsdp2"]
    else:
        script = FOLDER / f"stage_{stage.name}.py"
        flags = [f"--device={arguments.device}", f"--output={output}"]
    return [sys.executable, str(script), *flags]


def count_processes() -> int:
    """One for each GPU, but at least two."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["nvidia-smi", "-L"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return max(2, len(done.stdout.splitlines()))
    return 2


def run_stage(
    stage: Plan, arguments: argparse.Namespace, environ: dict[str, str], limit: float
) -> dict[str, Any]:
    """Run one stage to its end or its limit -> its result, also where it did not get far."""
    output = arguments.output / f"{stage.name}.json"
    began = time.monotonic()
    # In a session of its own the stage leads a process group, which can be killed as a whole.
    process = subprocess.Popen(
        make_command(stage, arguments, output),
        env=environ,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=limit)
        status = "passed" if process.returncode == 0 else "failed"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # The group also holds the processes that the stage started.
        printed, _ = process.communicate()
        status = "out of time"
    except KeyboardInterrupt:
        # Ctrl-C reaches this process alone, because the stage is in another session.
        os.killpg(process.pid, 9)
        raise
    write_log(arguments.output / LOG, stage.name, printed)
    findings = read_findings(output)
    # The scripts of --peers and --multi exit with 0 whatever they measured, so their checks decide.
    if status == "passed" and not all(check["ok"] for check in findings.get("checks", [])):
        status = "failed"
    result = {
        "status": status,
        "seconds": round(time.monotonic() - began, 1),
        "exit_code": process.returncode,
        **findings,
    }
    if status != "passed":
        # gpu.json must explain a failure by itself, because the log may be left on the machine.
        result["last_lines"] = printed.decode(errors="replace").strip().splitlines()[-12:]
    return result


def read_findings(file: Path) -> dict[str, Any]:
    """The checks and figures that a stage wrote. Its file is removed, because gpu.json has them."""
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    file.unlink()
    # Stages write checks themselves. Figures of bench/strategies.py are checked here, and those of
    # bench/peers/sft.py have no limits.
    return tree if "checks" in tree else {"figures": tree, "checks": check_strategies(tree)}


def check_strategies(tree: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare the losses of every strategy of bench/strategies.py with one process."""
    checks = []
    for name, row in tree.get("rows", {}).items():
        if name == "one":
            continue
        value = row["loss_difference"]
        # A difference that is NaN fails, because no comparison with NaN is true.
        check = {"name": f"{name}: largest relative difference of a loss", "value": value}
        checks.append(check | {"limit": LOSS_LIMIT, "ok": value <= LOSS_LIMIT})
    return checks


def write_log(path: Path, name: str, printed: bytes) -> None:
    before = path.read_bytes() if path.is_file() else b""
    path.write_bytes((before + f"\n==== {name} ====\n".encode() + printed)[-LOG_BYTES:])


# ---- what the user sees --------------------------------------------------------------------------


def describe(name: str, result: dict[str, Any]) -> str:
    if result["status"] == "skipped":
        return f"{name}: skipped, {result['reason']}"
    checks = result.get("checks", [])
    failed = [check for check in checks if not check["ok"]]
    lines = [
        f"{name}: {result['status']} in {result['seconds']:.0f} s, {len(checks) - len(failed)} of"
        f" {len(checks)} checks"
    ]
    for check in failed[:8]:
        lines.append(f"    {check['name']}: {check['value']:.3g}, allowed {check['limit']:g}")
    return "\n".join(lines)


def show(results: dict[str, dict]) -> None:
    print("\nstage           status        seconds   checks")
    for name, result in results.items():
        checks = result.get("checks", [])
        passed = f"{sum(check['ok'] for check in checks)} of {len(checks)}" if checks else ""
        print(f"{name:15} {result['status']:13} {result.get('seconds', 0):7.0f}   {passed}")


if __name__ == "__main__":
    run_command(main)
