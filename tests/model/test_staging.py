"""A merge that ends at any moment leaves a whole model or none, and the next one goes through."""

import fcntl
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import warm_processes
from conftest import ROOT, run_script
from test_merging import make_adapter, make_base
from transformers import AutoConfig

from medqlora.core.errors import RunError
from medqlora.core.staging import read_boot, stage_folder
from medqlora.model.merging import merge
from medqlora.model.weight_files import MergeError

SCRIPT = ROOT / "recipes" / "merge_adapter.py"
# Python reports these operations to audit hooks before they are done.
OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "fcntl.flock"}
KILLED = 9


@pytest.fixture
def parts(tmp_path):
    base = make_base(tmp_path / "base", tied=False, shard="150KB")
    _, metadata = make_adapter(base, tmp_path / "adapter", "none")
    return tmp_path / "adapter", base, AutoConfig.from_pretrained(base), metadata


def merge_into(output, parts):
    adapter, base, config, metadata = parts
    with stage_folder(output) as folder:
        for _ in merge(adapter, base, folder, config, metadata, "dequantized"):
            pass


def stage(output, work=lambda folder: None):
    """Make a folder with one file; `work` does more in it."""
    with stage_folder(output) as folder:
        (folder / "file").write_text("content")
        work(folder)


def die_at(operation, output, parts):
    """Merge in a fork that ends without any cleaning at its file operation of a number; say
    whether it got there.
    """
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == KILLED
    left = [operation]

    def count(event, arguments):
        if event in OPERATIONS and (event == "fcntl.flock" or output.name in str(arguments[0])):
            left[0] -= 1
            if left[0] < 0:
                os._exit(KILLED)  # What Python has not written yet is lost, as with a kill.

    sys.addaudithook(count)
    try:
        merge_into(output, parts)
    finally:
        os._exit(0)


def read_all(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_kill_at_any_file_operation_leaves_nothing_half(tmp_path, parts):
    whole = tmp_path / "whole"
    merge_into(whole, parts)
    expected = read_all(whole)
    assert len(expected) > 6
    beginning = set(os.listdir(tmp_path))
    operation = 0
    while die_at(operation, tmp_path / "merged", parts):
        assert not (tmp_path / "merged").exists(), operation
        operation += 1
    assert operation > 12
    # The last one was not killed, and removed what the others had left.
    assert read_all(tmp_path / "merged") == expected
    assert set(os.listdir(tmp_path)) == beginning | {"merged"}


def test_leftovers_are_removed_only_where_they_are_surely_dead(tmp_path):
    start = f"{tmp_path}/.merged.unfinished-{read_boot()}-"
    dead, living = f"{start}{'0' * 16}", f"{start}{'1' * 16}"
    elsewhere = f"{tmp_path}/.merged.unfinished-{read_boot()[::-1]}-{'2' * 16}"
    foreign = [f"{tmp_path}/.merged.tmp", f"{start}mine", f"{tmp_path}/.merged2.unfinished-a-b"]
    for folder in (dead, living, elsewhere, *foreign):
        os.mkdir(folder)
        with open(f"{folder}/file", "w") as file:
            file.write("content")
    os.symlink(foreign[0], f"{start}{'3' * 16}")
    descriptor = os.open(living, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.warns(UserWarning, match="of another process") as caught:
        stage(tmp_path / "merged")
    os.close(descriptor)
    named = [str(warning.message).partition(" is ")[0] for warning in caught]
    assert sorted(named) == sorted([living, elsewhere])
    assert not os.path.exists(dead)
    for folder in (living, elsewhere, *foreign, f"{start}{'3' * 16}"):
        assert os.path.isfile(f"{folder}/file")
    assert os.listdir(tmp_path / "merged") == ["file"]


def test_two_merges_at_once_keep_apart(tmp_path):
    output = tmp_path / "merged"
    with (
        pytest.warns(UserWarning, match="of another process"),
        pytest.raises(RunError, match="has come into being"),
    ):
        stage(output, lambda folder: stage(output))
    assert os.listdir(tmp_path) == ["merged"]
    assert os.listdir(output) == ["file"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MergeError])
def test_an_error_or_interrupt_leaves_nothing(tmp_path, error):
    def fail(folder):
        raise error

    with pytest.raises(error):
        stage(tmp_path / "merged", fail)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [1_000, 100_000, 390_000])
def test_a_full_disk_is_one_line(tmp_path, parts, size):
    beginning = set(os.listdir(tmp_path))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        with pytest.raises(RunError, match=r"merged cannot be written: File too large; free"):
            merge_into(tmp_path / "merged", parts)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert set(os.listdir(tmp_path)) == beginning


@pytest.mark.full
def test_killed_commands_can_be_given_again(tmp_path):
    base = make_base(tmp_path / "base")
    make_adapter(base, tmp_path / "adapter", "nf4")
    command = [SCRIPT, "--adapter", tmp_path / "adapter", "--output"]
    # A model card has the name of its folder.
    whole = tmp_path / "whole" / "merged"
    whole.parent.mkdir()
    assert run_script(*command, whole).returncode == 0
    beginning = set(os.listdir(tmp_path))
    left = set()
    for seconds in (0.0, 0.1, 0.5):
        process = warm_processes.start([*command, tmp_path / "merged"], ROOT)
        # The leftover of an earlier kill has another name.
        while not (new := set(os.listdir(tmp_path)) - beginning - left):
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
        time.sleep(seconds)
        process.kill()
        process.communicate(timeout=60)
        if (tmp_path / "merged").exists():  # It was faster.
            break
        assert process.returncode == -signal.SIGKILL
        assert set(os.listdir(tmp_path)) - beginning == new  # Earlier ones were removed.
        left |= new
    else:
        done = run_script(*command, tmp_path / "merged")
        assert done.returncode == 0, done.stderr
    assert set(os.listdir(tmp_path)) == beginning | {"merged"}
    assert read_all(tmp_path / "merged") == read_all(whole)


@pytest.mark.parametrize("bound", ["nan", "inf", "-0.1", "1.01", "true", "0.1 ", ""])
def test_the_gate_refuses_a_bound_before_any_work(tmp_path, bound):
    (tmp_path / "medqlora.json").write_text("{}")
    gate = ["--adapter", tmp_path, "--format", "medqa", "--path", "p", "--output", tmp_path / "g"]
    gate += ["--max_disagreement_original", bound]
    command = ["bash", ROOT / "launch" / "merge_gate.sh", *gate]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "a fraction from 0 to 1" in done.stderr
    assert os.listdir(tmp_path) == ["medqlora.json"]
