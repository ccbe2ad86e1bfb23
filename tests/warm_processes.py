"""Processes that begin with torch, transformers and PEFT already imported.

Importing them takes a process five seconds, and the tests start hundreds of processes. A server
imports them once; each process is a fork of it, which then runs a script as Python would run it:
with its own arguments, environment, working folder and exit code. Our own modules are not imported
before the fork. Tests of imports, memory and launchers start real interpreters instead, and so
does every test if MEDQLORA_COLD=1.
"""

import array
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import types
from pathlib import Path

PACKAGES = (
    "torch",
    "transformers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "peft",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "pydantic",
    "rich.progress",
)
ROOT = Path(__file__).parent.parent
MESSAGE = 1 << 20  # bytes of a request at most


class WarmProcess:
    """A started process, with those methods of subprocess.Popen that the tests use."""

    def __init__(self, arguments: list[str], pid: int, status: int, outputs: list):
        self.args = arguments
        self.pid = pid
        self.returncode: int | None = None
        self.status = status  # reading end of a pipe; it gives the exit status when there is one
        self.outputs = outputs

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            ready, _, _ = select.select([self.status], [], [], timeout)
            if not ready:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = int(os.read(self.status, 32))
            os.close(self.status)
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        texts = []
        for file in self.outputs:
            file.seek(0)
            texts.append(file.read().decode())
        return texts[0], texts[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Server:
    """The process that imports the packages and forks."""

    def __init__(self):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket = ours
        self.process = subprocess.Popen([sys.executable, __file__], stdin=theirs)
        theirs.close()

    def start(
        self, arguments: list[str], cwd: Path, environment: dict[str, str], join_outputs: bool
    ) -> WarmProcess:
        # They are read after the process has ended, and then vanish with the object.
        outputs = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        reading, writing = os.pipe()
        request = {"arguments": arguments, "cwd": str(cwd), "environment": environment}
        files = [outputs[0], outputs[0] if join_outputs else outputs[1]]
        descriptors = [*(file.fileno() for file in files), writing]
        socket.send_fds(self.socket, [json.dumps(request).encode()], descriptors)
        os.close(writing)
        pid = int(self.socket.recv(64))
        return WarmProcess(arguments, pid, reading, outputs)


@functools.cache
def server() -> Server:
    return Server()


def start(
    arguments: list[str],
    cwd: Path,
    env: dict[str, str] | None = None,
    join_outputs: bool = False,
) -> WarmProcess | subprocess.Popen:
    """Start `python ARGUMENTS`; `join_outputs` sends stderr where stdout goes."""
    arguments = list(map(str, arguments))
    env = dict(os.environ if env is None else env)
    if os.environ.get("MEDQLORA_COLD") == "1":
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=cwd,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if join_outputs else subprocess.PIPE,
            text=True,
        )
    return server().start(arguments, cwd, env, join_outputs)


def start_ranks(
    commands: list[list[str]], environments: list[dict] | None = None, cwd: Path = ROOT
) -> list[WarmProcess]:
    """Start one process per command, as a launcher starts ranks, each to be looked at by itself."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    count = len(commands)
    ranks = []
    for rank, command in enumerate(commands):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        if environments:
            environment |= environments[rank]
        ranks.append(start(command, cwd, environment))
    return ranks


def finish_ranks(
    ranks: list[WarmProcess], seconds: float = 300
) -> tuple[list[int], list[str], list[str]]:
    """Wait for all ranks and return their exit codes, outputs and errors."""
    shown = [rank.communicate(timeout=seconds) for rank in ranks]
    return [rank.returncode for rank in ranks], [out for out, _ in shown], [err for _, err in shown]


# ---- inside the server ---------------------------------------------------------------------------


def serve(connection: socket.socket) -> list[str]:
    """Fork at each request; in a fork, return the arguments to run."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # Keepers are not waited for.
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, MESSAGE, 3)
        if not message:
            os._exit(0)  # The tests are over.
        request = json.loads(message)
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            if keep(connection, descriptors[2]):
                return prepare(request, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def keep(connection: socket.socket, status: int) -> bool:
    """Fork once more. The parent passes on the child's exit status; the child returns True."""
    pid = os.fork()
    if pid == 0:
        connection.close()
        os.close(status)
        return True
    connection.send(str(pid).encode())
    connection.close()
    _, code = os.waitpid(pid, 0)
    os.write(status, str(os.waitstatus_to_exitcode(code)).encode())
    os._exit(0)


def prepare(request: dict, descriptors: array.array) -> list[str]:
    """Become what the request asks for."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, source in enumerate((nothing, *descriptors[:2])):
        os.dup2(source, target)
    for descriptor in (nothing, *descriptors[:2]):
        os.close(descriptor)
    return request["arguments"]


def run(arguments: list[str]) -> None:
    """Run a script, `-c CODE` or `-m MODULE` as the interpreter does."""
    sys.path[:] = [*os.environ.get("PYTHONPATH", "").split(os.pathsep), *sys.path[1:]]
    first, *rest = arguments
    if first == "-m":
        sys.argv = rest
        sys.path.insert(0, os.getcwd())
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path.insert(0, "")
        main = types.ModuleType("__main__")
        sys.modules["__main__"] = main
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(first).resolve().parent))
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    for package in PACKAGES:
        importlib.import_module(package)
    # Objects of the packages are left alone by the garbage collector of every fork.
    gc.freeze()
    run(serve(socket.socket(fileno=os.dup(0))))
