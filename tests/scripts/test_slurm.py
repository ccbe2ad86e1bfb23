"""A real Slurm with two nodes on this machine, started and stopped here: train on both, be
preempted twice, requeue, resume.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, run_script

MISSING = [
    name for name in ("slurmctld", "slurmd", "munged", "runuser") if shutil.which(name) is None
]
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(
        bool(MISSING),
        reason=f"needs slurm-wlm and munge (Debian packages): no {', '.join(MISSING)} here",
    ),
    pytest.mark.skipif(
        os.name != "posix" or os.geteuid() != 0, reason="starting Slurm's daemons needs root"
    ),
]
STEPS = 40
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=60
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SchedulerParameters=batch_sched_delay=0,sched_interval=1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} RealMemory=1000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus} RealMemory=1000
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two Slurm nodes; -> the environment in which sbatch finds them."""
    folder = tmp_path_factory.mktemp("slurm")
    for parent in [folder, *folder.parents][:-2]:
        parent.chmod(0o755)  # the munge user must come through
    munge = folder / "munge"
    munge.mkdir(mode=0o711)
    (folder / "state").mkdir()
    (munge / "key").write_bytes(os.urandom(1024))
    (munge / "key").chmod(0o400)
    for path in (munge, munge / "key"):
        shutil.chown(path, "munge", "munge")
    files = {f"--{name}": munge / name for name in ("socket", "pid-file", "log-file", "seed-file")}
    options = [str(part) for pair in files.items() for part in pair]
    subprocess.run(
        ["runuser", "-u", "munge", "--", "munged", "--key-file", str(munge / "key"), *options],
        check=True,
        cwd="/",
    )
    text = CONFIGURATION.format(
        host=socket.gethostname().partition(".")[0],
        folder=folder,
        ports=free_ports(3),
        cpus=os.cpu_count(),
    )
    (folder / "slurm.conf").write_text(text)
    environment = os.environ | {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "GLOO_SOCKET_IFNAME": "lo",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    try:
        subprocess.run(["slurmctld"], env=environment, check=True)
        for node in ("n1", "n2"):
            subprocess.run(["slurmd", "-N", node], env=environment, check=True)
        wait(
            lambda: ask(environment, "sinfo", "--noheader", "--states=idle", "--format=%D") == "2",
            30,
            "both nodes idle",
        )
        yield environment
    finally:
        for name in ("slurmd-n1.pid", "slurmd-n2.pid", "ctld.pid", "munge/pid-file"):
            if (folder / name).is_file():
                subprocess.run(["kill", (folder / name).read_text().strip()], check=False)


def ask(environment: dict, *command: str) -> str:
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()


def hasten(environment: dict, job: str) -> bool:
    """Slurm waits two minutes before it starts a requeued job."""
    subprocess.run(
        ["scontrol", "update", f"JobId={job}", "StartTime=now"],
        env=environment,
        capture_output=True,
        check=False,
    )
    return ask(environment, "squeue", "--noheader", "--format=%T") == "RUNNING"


def wait(condition, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.2)


def read_steps(run: Path) -> list[dict]:
    path = run / "train_log.jsonl"
    rows = path.read_text().splitlines() if path.exists() else []
    return [row for row in map(json.loads, rows) if "loss" in row]


def flags(output: Path, cache: Path) -> list[str]:
    return [
        "--data.cache_dir",
        str(cache),
        "--data.test",
        "[]",
        "--data.train.0.limit",
        "600",
        "--training.epochs",
        "12",
        "--data.eval",
        "[]",
        "--training.gradient_checkpointing",
        "none",
        "--training.max_steps",
        str(STEPS),
        "--training.max_tokens_per_batch",
        "512",
        "--training.global_batch_tokens",
        "2048",
        "--training.save_steps",
        "1000",
        "--model.dtype",
        "float32",
    ]


def test_two_nodes_preempted_twice_train_like_one_process(cluster, tmp_path):
    run = tmp_path / "run"
    config = ROOT / "recipes" / "configs" / "demo.yaml"
    common = flags(run, tmp_path / "cache")
    done = run_script(
        "launch/submit.py",
        "--accelerate_config",
        "accelerate_configs/ddp.yaml",
        "--config",
        config,
        "--output_dir",
        run,
        "--nodes",
        "2",
        "--cpu",
        "--job_name",
        "test",
        f"--sbatch=--output={tmp_path}/job.out",
        *common,
        env=cluster,
    )
    assert done.returncode == 0, done.stderr
    job = done.stdout.split()[1].rstrip(":")
    output = tmp_path / "job.out"

    def shown() -> str:
        return output.read_text() if output.exists() else ""

    for number, preempt in enumerate(
        (["scancel", "--batch", "--signal=USR1", job], ["scontrol", "requeue", job])
    ):
        seen = len(read_steps(run))
        wait(
            lambda seen=seen: len(read_steps(run)) > seen + 4,
            120,
            f"steps of start {number}\n{shown()}",
        )
        ask(cluster, *preempt)
        wait(
            lambda: ask(cluster, "squeue", "--noheader", "--format=%T") == "PENDING",
            60,
            f"job requeued\n{shown()}",
        )
        saved = max(int(path.name[5:]) for path in (run / "checkpoints").iterdir())
        # the running step was finished and kept, nothing more was trained
        assert saved == len(read_steps(run)) < STEPS, shown()
        time.sleep(8)  # a node refuses a job that it is still cleaning up after
        wait(lambda: hasten(cluster, job), 60, f"the next start\n{shown()}")
    wait(
        lambda: (run / "metrics.json").exists() and not ask(cluster, "squeue", "--noheader"),
        180,
        "the end of the run",
    )

    assert "requeueing job" in shown()
    assert shown().count("resuming after step") == 2
    assert json.loads((run / "environment.json").read_text())["processes"] == 2
    for start in range(3):
        folder = run / "launch" / f"{job}-{start}"
        assert "rendezvous 127.0.0.1:" in (folder / "environment.txt").read_text()
        assert list(folder.glob("node-0/**/stdout.log"))
        assert list(folder.glob("node-1/**/stdout.log"))
    one = run_script(
        "recipes/sft_qlora.py",
        "--output_dir",
        tmp_path / "one",
        *flags(tmp_path / "one", tmp_path / "cache"),
    )
    assert one.returncode == 0, one.stderr
    assert [row["step"] for row in read_steps(run)] == list(range(1, STEPS + 1))
    for two, alone in zip(read_steps(run), read_steps(tmp_path / "one"), strict=True):
        assert two["loss"] == pytest.approx(alone["loss"], rel=1e-3)
        assert two["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-2)


def test_mistake_ends_the_job_with_one_line(cluster, tmp_path):
    """Too few tokens for two processes: found by both ranks, said once, nothing requeued."""
    command = [
        "sbatch",
        "--parsable",
        "--wait",
        "--nodes=2",
        f"--output={tmp_path}/job.out",
        "launch/slurm_train.sbatch",
        "accelerate_configs/ddp.yaml",
        "recipes/sft_qlora.py",
        "--output_dir",
        str(tmp_path / "run"),
        "--training.global_batch_tokens",
        "1000",
    ]
    environment = cluster | {"MEDQLORA_MAX_RESTARTS": "0"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    shown = (tmp_path / "job.out").read_text()
    assert done.returncode != 0
    said = [
        line
        for line in shown.splitlines()
        if "not a multiple of max_tokens_per_batch" in line and line.startswith("[default")
    ]
    assert len(said) == 1, shown  # torch elastic's summary repeats it
    assert not (tmp_path / "run" / "train_log.jsonl").exists()
