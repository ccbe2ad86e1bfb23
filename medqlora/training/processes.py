"""The processes of one training.

They are joined here, raise an error together, and wait for work that one of them does for all.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from medqlora.core.environment import read_versions
from medqlora.core.errors import UserError
from medqlora.core.files import write_atomic

JOIN = timedelta(minutes=5)  # for all processes to be there
# of one collective operation; loading a base from a slow disk is the longest wait
TIMEOUT = timedelta(minutes=30)
# seconds that a network filesystem may take to show a file to the other nodes
SHARED_FILE_DELAY = 60.0
SETTLE = 0.5  # seconds that gloo's thread needs to free its last work


class ProcessError(UserError):
    """Processes that cannot work together."""


class AgreedError(UserError):
    """An error that every rank raises; rank 0 shows it."""


def start_processes(
    environ: Mapping[str, str], cuda: bool, join: timedelta = JOIN, **options: Any
) -> Accelerator:
    """Join the group that the launcher started (none: one process). Without a GPU, ranks talk over
    gloo.

    Raises:
        ProcessError: more local processes than GPUs, or a master that cannot be reached.
    """
    local = int(environ.get("LOCAL_WORLD_SIZE", "1"))
    if cuda and local > torch.cuda.device_count():
        raise ProcessError(
            f"{local} processes on {socket.gethostname()}, which has {torch.cuda.device_count()}"
            " GPU(s); set num_processes of the accelerate config to the number of GPUs of all"
            " machines"
        )
    zero = environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
    # Accelerate takes gloo for DeepSpeed only if told, and two ranks on CPUs for two trainings
    # unless cpu=True.
    group = (
        [InitProcessGroupKwargs(backend=None if cuda else "gloo")]
        if "LOCAL_RANK" in environ
        else []
    )
    try:
        if "LOCAL_RANK" in environ:
            join_group(environ, cuda, join)
        accelerator = Accelerator(cpu=not cuda and not zero, kwargs_handlers=group, **options)
    except ImportError as error:
        raise ProcessError(
            f"the accelerate config asks for DeepSpeed: {' '.join(str(error).split())}"
        ) from None
    except (dist.DistError, OSError, RuntimeError) as error:
        place = f"{environ.get('MASTER_ADDR')}:{environ.get('MASTER_PORT')}"
        reason = str(error).splitlines()[0][:200]
        raise ProcessError(
            f"rank {environ.get('RANK')} of {environ.get('WORLD_SIZE')} on {socket.gethostname()}"
            f" found no group at {place}: {reason}; check that all machines were started and that"
            " main_process_ip and main_process_port can be reached (launch/preflight.py does)"
        ) from None
    if dist.is_initialized():
        # joining and working share one setting in torch
        dist.distributed_c10d._set_pg_timeout(TIMEOUT, dist.group.WORLD)
    return accelerator


def join_group(environ: Mapping[str, str], cuda: bool, join: timedelta) -> None:
    """The process group, as torch would make it, but with a store of this start alone: after a
    restart on one machine torch's static rendezvous hands out the old store, in which ranks find
    each other's dead addresses (torch 2.13). Several machines meet anew, in a new store."""
    rank = int(environ["RANK"])
    ranks = int(environ["WORLD_SIZE"])
    agent = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # the launcher keeps the store
    store = dist.TCPStore(
        environ["MASTER_ADDR"],
        int(environ["MASTER_PORT"]),
        ranks,
        is_master=rank == 0 and not agent,
        timeout=join,
        wait_for_workers=not agent,
        multi_tenant=True,
    )
    if environ.get("GROUP_WORLD_SIZE", "1") == "1":
        store = dist.PrefixStore(f"start-{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    if cuda:
        torch.cuda.set_device(int(environ["LOCAL_RANK"]))
    # then norms are reduced on the host
    offloads = environ.get("FSDP_OFFLOAD_PARAMS", "").lower() == "true"
    backend = ("cuda:nccl,cpu:gloo" if offloads else "nccl") if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=join)


def settle(environ: Mapping[str, str]) -> None:
    """Let gloo's thread free its last work, while the model and its groups are still alive.

    The thread needs the interpreter for it, and torch 2.13 waits for that thread without letting go
    of the interpreter.
    """
    if int(environ.get("WORLD_SIZE") or 1) > 1:
        time.sleep(SETTLE)


def end_processes(accelerator: Accelerator, environ: Mapping[str, str]) -> None:
    """End what start_processes began. Call it before the trained model is let go."""
    accelerator.end_training()
    settle(environ)


def gather(value: Any) -> list[Any]:
    """The value of each rank, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def agree_on_errors() -> Iterator[None]:
    """Raise on all ranks what a user did wrong on any; the block waits for other ranks only where
    all of them do.

    Raises:
        AgreedError: with the message of the lowest rank that failed.
    """
    problem = None
    try:
        yield
    except UserError as error:
        problem = str(error)
    problems = gather(problem)
    if found := next((text for text in problems if text is not None), None):
        raise AgreedError(found) from None


def check_versions(config_hash: str) -> None:
    """Every rank runs the same packages on the same configuration.

    Raises:
        ProcessError: naming the rank, its host and what differs.
    """
    mine = {"host": socket.gethostname(), "config": config_hash, **read_versions()}
    everyone = gather(mine)
    for rank, facts in enumerate(everyone):
        for key in sorted(facts.keys() | everyone[0].keys()):
            if key != "host" and facts.get(key) != everyone[0].get(key):
                hosts = (
                    f"rank {rank} on {facts['host']} has {key} {facts.get(key)}, rank 0 on"
                    f" {everyone[0]['host']} has {everyone[0].get(key)}"
                )
                raise ProcessError(f"{hosts}; use the same environment and files on all machines")


def share_once(
    folder: Path, work: Callable[[Callable[[str], None]], dict], show: Callable[[str], None]
) -> dict:
    """Rank 0 does `work(report)` and writes what it returns to a file; the others wait for the
    file, in no collective operation, so that hours of work run into no timeout. Node-local rank 0
    passes rank 0's reports to `show`.

    Raises:
        AgreedError: the work failed, or a rank does not see rank 0's file.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    token = gather(f"{time.time_ns():x}")[0]
    path = folder / f"shared-{token}.json"
    with agree_on_errors():
        if rank == 0:
            begin(path)
    with agree_on_errors():
        await_file(path)
    with agree_on_errors():
        result = lead(path, work) if rank == 0 else follow(path, show)
    if rank == 0:
        path.unlink(missing_ok=True)
    return result


def begin(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ProcessError(
            f"data.cache_dir {path.parent} cannot be made: {error.strerror}; name another folder"
        ) from None
    write_atomic(path, json.dumps({"stage": "starting"}))


def await_file(path: Path) -> None:
    begun = time.monotonic()
    while not path.exists():
        if time.monotonic() - begun > SHARED_FILE_DELAY:
            raise ProcessError(
                f"{socket.gethostname()} does not see {path.parent}, which rank 0 writes to;"
                " data.cache_dir must be on a filesystem that all machines share"
            )
        time.sleep(0.2)


def lead(path: Path, work: Callable[[Callable[[str], None]], dict]) -> dict:
    def report(stage: str) -> None:
        write_atomic(path, json.dumps({"stage": stage}))

    try:
        result = work(report)
    # whatever it is, the others must not wait for a result that never comes
    except BaseException as error:
        write_atomic(path, json.dumps({"error": str(error)}))
        raise
    write_atomic(path, json.dumps({"result": result}))
    return result


def follow(path: Path, show: Callable[[str], None]) -> dict:
    stage = ""
    seen = time.monotonic()
    while True:
        try:
            note = json.loads(path.read_text(encoding="utf-8"))
            seen = time.monotonic()
        except (OSError, ValueError):  # a network filesystem between two versions of the file
            if time.monotonic() - seen > SHARED_FILE_DELAY:
                raise ProcessError(
                    f"{socket.gethostname()} lost sight of {path.parent}; data.cache_dir must stay"
                    " mounted"
                ) from None
            note = {}
        if "error" in note:
            raise ProcessError(note["error"])
        if "result" in note:
            return note["result"]
        if note.get("stage", stage) != stage:
            stage = note["stage"]
            show(f"waiting for rank 0: {stage}")
        time.sleep(0.2)
