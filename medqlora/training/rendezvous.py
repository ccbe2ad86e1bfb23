"""A meeting of all machines before a training, which names a missing or a different machine."""

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


def meet(address: str, rank: int, machines: int, shared: Path | None, seconds: float) -> str:
    """Check that all machines reach machine 0, have the same packages, and see a common folder.

    Args:
        address: HOST:PORT of machine 0.
        rank: Number of this machine, from 0.
        machines: Number of machines that must come.
        shared: Folder that all machines must see; None checks no folder.
        seconds: How long to wait for each of the other machines.

    Returns:
        A line that says what was checked.

    Raises:
        ProcessError: A machine is missing or cannot be reached, its packages differ, or it does not
            see the folder.
    """
    host, _, port = address.rpartition(":")
    this_machine = f"machine {rank} ({socket.gethostname()})"
    if not host or not port.isdigit():
        raise ProcessError(f"--rendezvous {address}: expected HOST:PORT, such as 10.0.0.1:29501")
    # A plain connection is tried first, so that an unreachable address has its own message.
    if rank != 0 and not wait_for(lambda: can_connect(host, int(port)), seconds):
        raise ProcessError(
            f"{this_machine} cannot reach machine 0 at {address} within {seconds:.0f} s; check"
            " address, port and firewall, and that all machines were started"
        )
    try:
        # The store opens before all machines are there, so the wait below can name a missing one.
        store = TCPStore(
            host,
            int(port),
            is_master=rank == 0,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
        )
    except (DistError, OSError) as error:
        raise ProcessError(
            f"{this_machine} cannot open {address}: {str(error).splitlines()[0][:160]}; give"
            " machine 0's address and a free port"
        ) from None
    token = f"{time.time_ns():x}"
    # The token tells this meeting from an earlier one, whose file may lie in the folder. The file
    # is written before the token is announced, so whoever has the token may expect the file.
    if shared is not None and rank == 0:
        write_atomic(shared / "meeting.json", json.dumps(token))
    if rank == 0:
        store.set("token", token)
    problem = ""
    if rank != 0 and shared is not None:
        # The problem goes to all machines instead of being raised here, so that all of them end
        # with it.
        # The call waits until machine 0 has set the token.
        expected = store.get("token").decode()
        problem = find_problem(shared / "meeting.json", expected, this_machine, seconds)
    description = {"host": socket.gethostname(), "versions": read_versions(), "problem": problem}
    store.set(f"machine-{rank}", json.dumps(description))
    descriptions = []
    for other in range(machines):
        if not wait_for(lambda key=f"machine-{other}": has_key(store, key, address), seconds):
            raise ProcessError(
                f"machine {other} of {machines} did not come to {address} within {seconds:.0f} s;"
                f" check that it was started with --machine_rank {other}"
            )
        descriptions.append(json.loads(store.get(f"machine-{other}")))
    # TCPStore.add returns the new value, so adding 0 reads the counter.
    store.add("left", 1)
    if rank == 0:  # The store lives in this process, so it must not end before all have read it.
        wait_for(lambda: store.add("left", 0) >= machines, seconds)
    # Every machine compares the same descriptions, so all of them end with the same error.
    compare_machines(descriptions)
    packages = hash_json(descriptions[0]["versions"])[:8]
    return f"{this_machine}: {machines} machine(s) met at {address}, packages {packages}"


def compare_machines(descriptions: list[dict]) -> None:
    """Raise the problem of the first machine that has one or differs from machine 0."""
    first = descriptions[0]
    for number, other in enumerate(descriptions):
        if other["problem"]:
            raise ProcessError(other["problem"])
        for key in sorted(other["versions"].keys() | first["versions"].keys()):
            if other["versions"].get(key) != first["versions"].get(key):
                raise ProcessError(
                    f"machine {number} ({other['host']}) has {key} {other['versions'].get(key)},"
                    f" machine 0 ({first['host']}) has {first['versions'].get(key)}; use the same"
                    " environment on all machines"
                )


def find_problem(path: Path, token: str, this_machine: str, seconds: float) -> str:
    """Wait until a file holds the token of machine 0; return a problem, or "" if it does."""

    def is_there() -> bool:
        try:
            return json.loads(path.read_text(encoding="utf-8")) == token
        except (OSError, ValueError):
            return False

    if wait_for(is_there, seconds / 2):  # A network filesystem may show the file late.
        return ""
    return (
        f"{this_machine} does not see {path.parent} of machine 0; --output_dir and data.cache_dir"
        " must be on a filesystem that all machines share"
    )


def has_key(store: TCPStore, key: str, address: str) -> bool:
    """Say whether a machine has written this key to the store."""
    try:
        return store.check([key])
    except DistError:
        raise ProcessError(
            f"machine 0 no longer answers at {address}; its own output says why it ended"
        ) from None


def can_connect(host: str, port: int) -> bool:
    """Say whether something listens at this address."""
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait for a condition; return whether it came true within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
