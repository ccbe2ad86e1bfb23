"""Does everything work on this GPU, and how fast? One command for a machine that nothing of this
project is installed on.

    PYTHONPATH=. python bench/gpu.py --output found                      # all stages, in nine
    minutes on an H100 PYTHONPATH=. python bench/gpu.py --output found --stages card,kernels,memory
    PYTHONPATH=. python bench/gpu.py --output found --device cpu         # the same scripts on small
    shapes: a rehearsal PYTHONPATH=. python bench/gpu.py --output found --peers              # and
    TRL beside ours; needs pip install trl==1.16.0 PYTHONPATH=. python bench/gpu.py --output found
    --multi              # and ddp, zero2, zero3 and fsdp2 on all GPUs against one

Each stage is a process (bench/gpu_stages/) with a time limit of its own, which writes what it finds
at once; it is in OUTPUT/gpu.json as soon as the stage ends, also if it fails, and a failing stage
stops no other. A stage that does not fit into the minutes that are left is skipped and named. The
exit code is 0 only if everything that ran has passed. What a bare machine lacks: python
bench/gpu_wheels.py makes a folder of it.
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

from medqlora.core.command import run_command
from medqlora.core.errors import ConfigError
from medqlora.core.files import write_json

ROOT = Path(__file__).parent.parent
FOLDER = Path(__file__).parent / "gpu_stages"
LOG_BYTES = 4 * 2**20  # The log keeps this much of what stages printed last.
LOSS_LIMIT = 1e-4
RESULTS = "gpu.json"
LOG = "gpu.log"


@dataclass(frozen=True)
class Plan:
    """A stage. seconds: what it takes on an H100, an estimate; limit: seconds after which it is
    ended.
    """

    name: str
    seconds: int
    limit: int


# Stages run in this order: what the others rest on comes first. Their seconds sum to less than nine
# minutes.
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
    parser = argparse.ArgumentParser(
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
        type=float,
        help=(
            "time for all stages together (default 9, and as long as --peers and --multi may take)"
        ),
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
    arguments.output = arguments.output.resolve()  # stages run in another folder
    stages = choose_stages(arguments)
    check_device(arguments.device)
    check_output(arguments.output)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        found = run_stages(stages, arguments, Path(folder))
    show(found)
    ran = [facts for facts in found.values() if facts["status"] != "skipped"]
    return 0 if ran and all(facts["status"] == "passed" for facts in ran) else 1


def run_stages(stages: list[Plan], arguments: argparse.Namespace, folder: Path) -> dict[str, dict]:
    """All that fit into the time, one after the other; folder: for temporary files and for what
    compilers make, which stages share.
    """
    minutes = (
        arguments.minutes
        or 9 + sum(stage.limit for stage in stages if stage in (PEERS, MULTI)) / 60
    )
    began = time.monotonic()
    found = {}
    environ = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    }
    environ |= {
        "TMPDIR": str(folder),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
    }
    if arguments.device == "cpu":
        environ["CUDA_VISIBLE_DEVICES"] = ""
    for stage in stages:
        left = 60 * minutes - (time.monotonic() - began)
        if stage.seconds > left:
            found[stage.name] = {
                "status": "skipped",
                "reason": f"needs about {stage.seconds} s, {left:.0f} s are left",
            }
        else:
            found[stage.name] = run_stage(
                stage, arguments, environ, min(stage.limit, max(left, stage.seconds))
            )
        write_json(
            arguments.output / RESULTS,
            {"device": arguments.device, "minutes": minutes, "stages": found},
        )
        print(describe(stage.name, found[stage.name]), flush=True)
    return found


def choose_stages(arguments: argparse.Namespace) -> list[Plan]:
    """Raises ConfigError: an unknown stage, or no time."""
    known = {stage.name: stage for stage in STAGES}
    names = arguments.stages.split(",") if arguments.stages else list(known)
    for name in names:
        if name not in known:
            raise ConfigError(f"--stages {name}: no such stage; there are {', '.join(known)}")
    if arguments.minutes is not None and not arguments.minutes > 0:
        raise ConfigError(f"--minutes {arguments.minutes}: expected more than 0")
    return [known[name] for name in names] + [PEERS] * arguments.peers + [MULTI] * arguments.multi


def check_device(device: str) -> None:
    """Raises ConfigError: no GPU, which every stage would find out by itself."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "torch sees no GPU here; --device cpu rehearses the stages on small shapes"
        )


def check_output(folder: Path) -> None:
    """Raises ConfigError: results stand there, or it cannot be made."""
    if (folder / RESULTS).exists():
        raise ConfigError(f"--output {folder} holds {RESULTS}; give another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--output {folder} cannot be made: {error.strerror}; give another folder"
        ) from None


def command_of(stage: Plan, arguments: argparse.Namespace, file: Path) -> list[str]:
    if stage is PEERS:
        demo = ROOT / "recipes" / "demo"
        more = (
            ["--rows", "300", "--shape", "74m"]
            if arguments.device == "cpu"
            else ["--rows", "4000", "--shape", "1b"]
        )
        return [
            sys.executable,
            str(ROOT / "bench" / "peers" / "sft.py"),
            "--tokenizer",
            str(demo / "base"),
            "--data",
            str(demo / "data" / "train.jsonl"),
            "--dtype",
            "bfloat16",
            "--repetitions",
            "3",
            "--json",
            str(file),
            *more,
        ]
    if stage is MULTI:
        more = ["--steps", "4"] if arguments.device == "cpu" else []
        return [
            sys.executable,
            str(ROOT / "bench" / "strategies.py"),
            "--strategies",
            "ddp",
            "zero2",
            "zero3",
            "fsdp2",
            "--processes",
            str(count_processes()),
            "--json",
            str(file),
            *more,
        ]
    return [
        sys.executable,
        str(FOLDER / f"stage_{stage.name}.py"),
        "--device",
        arguments.device,
        "--output",
        str(file),
    ]


def count_processes() -> int:
    """All GPUs; without any, two processes."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return max(
            2,
            len(
                subprocess.run(
                    ["nvidia-smi", "-L"], capture_output=True, text=True, check=True
                ).stdout.splitlines()
            ),
        )
    return 2


def run_stage(
    stage: Plan, arguments: argparse.Namespace, environ: dict[str, str], limit: float
) -> dict[str, Any]:
    """Run one stage to its end or its limit; -> what it found, also if it did not get far."""
    file = arguments.output / f"{stage.name}.json"
    began = time.monotonic()
    process = subprocess.Popen(
        command_of(stage, arguments, file),
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
        os.killpg(process.pid, 9)  # The group holds what the stage has started, too.
        printed, _ = process.communicate()
        status = "out of time"
    except KeyboardInterrupt:
        os.killpg(process.pid, 9)
        raise
    write_log(arguments.output / LOG, stage.name, printed)
    found = read_found(file)
    if status == "passed" and not all(check["ok"] for check in found.get("checks", [])):
        status = "failed"
    facts = {
        "status": status,
        "seconds": round(time.monotonic() - began, 1),
        "exit_code": process.returncode,
        **found,
    }
    if status != "passed":
        facts["last_lines"] = printed.decode(errors="replace").strip().splitlines()[-12:]
    return facts


def read_found(file: Path) -> dict[str, Any]:
    """What a stage wrote; its file is then part of gpu.json."""
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    file.unlink()
    return tree if "checks" in tree else {"figures": tree, "checks": check_strategies(tree)}


def check_strategies(tree: dict[str, Any]) -> list[dict[str, Any]]:
    """Losses of every strategy in float32 against one process."""
    rows = {
        name: row["loss_difference"] for name, row in tree.get("rows", {}).items() if name != "one"
    }
    return [
        {
            "name": f"{name}: largest relative difference of a loss",
            "value": value,
            "limit": LOSS_LIMIT,
            "ok": value <= LOSS_LIMIT,
        }
        for name, value in rows.items()
    ]


def write_log(path: Path, name: str, printed: bytes) -> None:
    before = path.read_bytes() if path.is_file() else b""
    path.write_bytes((before + f"\n==== {name} ====\n".encode() + printed)[-LOG_BYTES:])


# ---- what the user sees --------------------------------------------------------------------------


def describe(name: str, facts: dict[str, Any]) -> str:
    if facts["status"] == "skipped":
        return f"{name}: skipped, {facts['reason']}"
    checks = facts.get("checks", [])
    wrong = [check for check in checks if not check["ok"]]
    text = (
        f"{name}: {facts['status']} in {facts['seconds']:.0f} s, {len(checks) - len(wrong)} of"
        f" {len(checks)} checks"
    )
    return text + "".join(
        f"\n    {check['name']}: {check['value']:.3g}, allowed {check['limit']:g}"
        for check in wrong[:8]
    )


def show(found: dict[str, dict]) -> None:
    print("\nstage           status        seconds   checks")
    for name, facts in found.items():
        checks = facts.get("checks", [])
        passed = f"{sum(check['ok'] for check in checks)} of {len(checks)}" if checks else ""
        print(f"{name:15} {facts['status']:13} {facts.get('seconds', 0):7.0f}   {passed}")


if __name__ == "__main__":
    run_command(main)
