"""Machines meet before a training, so that one that is missing or different is named."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from torch.distributed import DistError, TCPStore

from medqlora.core.environment import read_versions
from medqlora.core.files import hash_json, write_atomic
from medqlora.training.processes import ProcessError


def meet(place: str, rank: int, machines: int, shared: Path | None, seconds: float) -> str:
    """All machines at one address, with the same packages and a common folder.

    Raises:
        ProcessError: who is missing, or what differs.
    """

    host, _, port = place.rpartition(":")
    mine = f"machine {rank} ({socket.gethostname()})"
    if not host or not port.isdigit():
        raise ProcessError(f"--rendezvous {place}: expected HOST:PORT")
    if rank != 0 and not wait_for(lambda: can_connect(host, int(port)), seconds):
        raise ProcessError(
            f"{mine} cannot reach machine 0 at {place} within {seconds:.0f} s; check address, port"
            " and firewall, and that all were started"
        )
    try:
        store = TCPStore(
            host,
            int(port),
            is_master=rank == 0,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
        )
    except (DistError, OSError) as error:
        raise ProcessError(
            f"{mine} cannot open {place}: {str(error).splitlines()[0][:160]}; give machine 0's"
            " address and a free port"
        ) from None
    token = f"{time.time_ns():x}"
    if shared is not None and rank == 0:
        write_atomic(shared / "meeting.json", json.dumps(token))
    if rank == 0:
        store.set("token", token)
    problem = ""
    if rank != 0 and shared is not None:  # said to all, so that all end with it
        problem = look_for(shared / "meeting.json", store.get("token").decode(), mine, seconds)
    store.set(
        f"machine-{rank}",
        json.dumps({"host": socket.gethostname(), "versions": read_versions(), "problem": problem}),
    )
    facts = []
    for other in range(machines):
        if not wait_for(lambda key=f"machine-{other}": has_come(store, key, place), seconds):
            raise ProcessError(
                f"machine {other} of {machines} did not come to {place} within {seconds:.0f} s; was"
                f" it started, with --machine_rank {other}?"
            )
        facts.append(json.loads(store.get(f"machine-{other}")))
    store.add("left", 1)
    if rank == 0:  # the store lives in this process until all have read it
        wait_for(lambda: store.add("left", 0) >= machines, seconds)
    for other, found in enumerate(facts):
        if found["problem"]:
            raise ProcessError(found["problem"])
        for key in sorted(found["versions"].keys() | facts[0]["versions"].keys()):
            if found["versions"].get(key) != facts[0]["versions"].get(key):
                raise ProcessError(
                    f"machine {other} ({found['host']}) has {key} {found['versions'].get(key)},"
                    f" machine 0 ({facts[0]['host']}) {facts[0]['versions'].get(key)}; use the same"
                    " environment on all machines"
                )
    return (
        f"{mine}: {machines} machine(s) met at {place}, packages"
        f" {hash_json(facts[0]['versions'])[:8]}"
    )


def look_for(path: Path, token: str, mine: str, seconds: float) -> str:
    def is_there() -> bool:
        try:
            return json.loads(path.read_text(encoding="utf-8")) == token
        except (OSError, ValueError):
            return False

    if wait_for(is_there, seconds / 2):  # a network filesystem may take its time
        return ""
    return (
        f"{mine} does not see {path.parent} of machine 0; --output_dir and data.cache_dir must be"
        " on a filesystem that all machines share"
    )


def has_come(store, key: str, place: str) -> bool:

    try:
        return store.check([key])
    except DistError:
        raise ProcessError(f"machine 0 has left {place}; look at what it said") from None


def can_connect(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
