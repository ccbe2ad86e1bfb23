"""The processes of one training.

The functions of this module join them to a group, make an error of one the error of all, and let
them wait for work that one of them does for all.
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

from medqlora.core.environment import STAGE, read_versions
from medqlora.core.errors import UserError
from medqlora.core.files import write_atomic

JOIN_TIMEOUT = timedelta(minutes=5)  # All processes must join the group within this time.
# A collective operation may wait this long for a rank. The longest wait is for a rank that loads a
# base from a slow disk.
TIMEOUT = timedelta(minutes=30)
# A network filesystem may take this many seconds to show a new file to the other nodes.
SHARED_FILE_DELAY = 60.0
GLOO_DELAY = 0.5  # The thread of gloo frees its last work within this many seconds.


class ProcessError(UserError):
    """The processes of a training cannot work together."""


class AgreedError(UserError):
    """An error that every rank raises; rank 0 shows it."""


def start_processes(
    environ: Mapping[str, str], cuda: bool, join: timedelta = JOIN_TIMEOUT, **options: Any
) -> Accelerator:
    """Join the process group that the launcher started.

    Without a launcher this is a training of one process. Ranks communicate over NCCL on GPUs and
    over gloo on CPUs.

    Args:
        environ: The environment variables that the launcher set.
        cuda: Whether the processes train on GPUs.
        join: How long to wait for the other processes.
        options: Passed on to `accelerate.Accelerator`.

    Raises:
        ProcessError: There are more local processes than GPUs, DeepSpeed is asked for and not
            installed, or the group cannot be joined in time.
    """
    local = int(environ.get("LOCAL_WORLD_SIZE", "1"))
    if cuda and local > torch.cuda.device_count():
        raise ProcessError(
            f"{local} processes on {socket.gethostname()}, which has {torch.cuda.device_count()}"
            " GPU(s); set num_processes of the accelerate config to the number of GPUs of all"
            " machines"
        )
    launched = "LOCAL_RANK" in environ
    deepspeed = environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
    # Accelerate uses gloo under DeepSpeed only if it is named here.
    backend = None if cuda else "gloo"
    handlers = [InitProcessGroupKwargs(backend=backend)] if launched else []
    try:
        if launched:
            join_group(environ, cuda, join)
        # Without cpu=True, Accelerate makes two separate trainings of two ranks on CPUs.
        cpu = not cuda and not deepspeed
        accelerator = Accelerator(cpu=cpu, kwargs_handlers=handlers, **options)
    except ImportError as error:
        raise ProcessError(
            f"the accelerate config asks for DeepSpeed: {' '.join(str(error).split())}"
        ) from None
    except (dist.DistError, OSError, RuntimeError) as error:
        address = f"{environ.get('MASTER_ADDR')}:{environ.get('MASTER_PORT')}"
        reason = str(error).splitlines()[0][:200]
        raise ProcessError(
            f"rank {environ.get('RANK')} of {environ.get('WORLD_SIZE')} on {socket.gethostname()}"
            f" found no group at {address}: {reason}; check that all machines were started and that"
            " main_process_ip and main_process_port can be reached (launch/preflight.py tries them)"
        ) from None
    if dist.is_initialized():
        # torch has one timeout for joining and for collective operations. The group exists now, so
        # the longer timeout of the operations replaces the one of joining.
        dist.distributed_c10d._set_pg_timeout(TIMEOUT, dist.group.WORLD)
    return accelerator


def join_group(environ: Mapping[str, str], cuda: bool, join: timedelta) -> None:
    """Make the process group as torch would make it, with a separate store for each restart.

    After a restart on one machine, torch's static rendezvous hands out the old store, in which the
    ranks find the addresses of dead processes (torch 2.13). Several machines use the c10d
    rendezvous, which makes a new store by itself.
    """
    rank = int(environ["RANK"])
    ranks = int(environ["WORLD_SIZE"])
    launcher_has_store = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        environ["MASTER_ADDR"],
        int(environ["MASTER_PORT"]),
        ranks,
        is_master=rank == 0 and not launcher_has_store,
        timeout=join,
        wait_for_workers=not launcher_has_store,
        multi_tenant=True,
    )
    # GROUP_WORLD_SIZE counts machines.
    if environ.get("GROUP_WORLD_SIZE", "1") == "1":
        restarts = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"start-{restarts}", store)
    # All stages of recipes/train_stages.py find the launcher's one store.
    if STAGE in environ:
        store = dist.PrefixStore(f"stage-{environ[STAGE]}", store)
    backend = "gloo"
    if cuda:
        torch.cuda.set_device(int(environ["LOCAL_RANK"]))
        # With offloaded parameters, gradient norms are reduced on the host, which needs gloo.
        offloads = environ.get("FSDP_OFFLOAD_PARAMS", "").lower() == "true"
        backend = "cuda:nccl,cpu:gloo" if offloads else "nccl"
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=join)


def wait_for_gloo(environ: Mapping[str, str]) -> None:
    """Give the thread of gloo time to free its last work.

    That thread needs the lock of the Python interpreter for it. When a process group is destroyed,
    torch 2.13 waits for the thread without releasing the lock. Therefore call this function while
    the model and its process groups still exist.
    """
    if int(environ.get("WORLD_SIZE") or 1) > 1:
        time.sleep(GLOO_DELAY)


def end_processes(accelerator: Accelerator, environ: Mapping[str, str]) -> None:
    """Close the trackers that `start_processes` opened, and wait for gloo.

    Call it while the trained model still exists (see `wait_for_gloo`).
    """
    accelerator.end_training()
    wait_for_gloo(environ)


def gather(value: Any) -> list[Any]:
    """Collect one picklable value from each rank; collective.

    Returns:
        The values in the order of the ranks, the same list on every rank.
    """
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def agree_on_errors() -> Iterator[None]:
    """Turn a UserError that any rank raises in the block into an error of every rank; collective.

    Every rank must run the block. A collective operation inside it is allowed only where no rank
    can fail before it; the other ranks would wait for the one that failed.

    Raises:
        AgreedError: The message is that of the lowest rank that failed.
    """
    problem = None
    try:
        yield
    except UserError as error:
        problem = str(error)
    problems = gather(problem)
    if first := next((text for text in problems if text is not None), None):
        raise AgreedError(first) from None


def check_versions(config_hash: str) -> None:
    """Check that every rank has the same packages and the same configuration; collective.

    Raises:
        ProcessError: A rank differs from rank 0. The message names the rank, its host, and what
            differs.
    """
    versions = {"host": socket.gethostname(), "config": config_hash, **read_versions()}
    versions_of_ranks = gather(versions)
    first = versions_of_ranks[0]
    for rank, other in enumerate(versions_of_ranks):
        for key in sorted(other.keys() | first.keys()):
            if key != "host" and other.get(key) != first.get(key):
                raise ProcessError(
                    f"rank {rank} on {other['host']} has {key} {other.get(key)}, rank 0 on"
                    f" {first['host']} has {first.get(key)}; use the same environment and the same"
                    " files on all machines"
                )


def share_once(
    folder: Path, work: Callable[[Callable[[str], None]], dict], show: Callable[[str], None]
) -> dict:
    """Let rank 0 do work whose result every rank needs; collective.

    Rank 0 writes its progress and its result to a file. The other ranks read that file again and
    again. They wait in no collective operation, so hours of work run into no timeout.

    Args:
        folder: Folder of the file, on a filesystem that all machines share.
        work: Takes a function that reports the name of a stage, and returns a result that can be
            written as JSON.
        show: Receives a text on the waiting ranks when rank 0 begins a stage.

    Returns:
        The result of the work, on every rank.

    Raises:
        AgreedError: The work failed, or a rank does not see the file of rank 0.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    # All ranks take rank 0's token, so none reads a file that an earlier start has left.
    token = gather(f"{time.time_ns():x}")[0]
    path = folder / f"shared-{token}.json"
    with agree_on_errors():
        if rank == 0:
            create_shared_file(path)
    with agree_on_errors():
        wait_for_file(path)
    with agree_on_errors():
        result = do_shared_work(path, work) if rank == 0 else wait_for_result(path, show)
    if rank == 0:
        path.unlink(missing_ok=True)
    return result


def create_shared_file(path: Path) -> None:
    """Write the first version of the file through which rank 0 tells its progress."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ProcessError(
            f"data.cache_dir {path.parent} cannot be created: {error.strerror}; name another folder"
        ) from None
    write_atomic(path, json.dumps({"stage": "starting"}))


def wait_for_file(path: Path) -> None:
    """Wait until this machine sees a file that rank 0 wrote."""
    start = time.monotonic()
    while not path.exists():
        if time.monotonic() - start > SHARED_FILE_DELAY:
            raise ProcessError(
                f"{socket.gethostname()} does not see {path.parent}, which rank 0 writes to;"
                " data.cache_dir must be on a filesystem that all machines share"
            )
        time.sleep(0.2)


def do_shared_work(path: Path, work: Callable[[Callable[[str], None]], dict]) -> dict:
    """Do the work on rank 0, and write its progress and its result to the shared file."""

    def report(stage: str) -> None:
        write_atomic(path, json.dumps({"stage": stage}))

    try:
        result = work(report)
    # Whatever ends the work, Ctrl-C included, the other ranks must not wait for a result that never
    # comes. The error is raised again after they have been told.
    except BaseException as error:
        write_atomic(path, json.dumps({"error": str(error)}))
        raise
    write_atomic(path, json.dumps({"result": result}))
    return result


def wait_for_result(path: Path, show: Callable[[str], None]) -> dict:
    """Read the shared file until rank 0 has written its result or its error."""
    stage = ""
    last_read = time.monotonic()
    while True:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            last_read = time.monotonic()
        # A network filesystem may show no file or a part of it while rank 0 replaces it.
        except (OSError, ValueError):
            if time.monotonic() - last_read > SHARED_FILE_DELAY:
                raise ProcessError(
                    f"{socket.gethostname()} does not see {path.parent} any more; data.cache_dir"
                    " must stay mounted"
                ) from None
            content = {}
        if "error" in content:
            raise ProcessError(content["error"])
        if "result" in content:
            return content["result"]
        if content.get("stage", stage) != stage:
            stage = content["stage"]
            show(f"waiting for rank 0: {stage}")
        time.sleep(0.2)
