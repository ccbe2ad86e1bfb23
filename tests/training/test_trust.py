"""Nothing of an earlier start is trusted unread: other inputs, damage in any file, kills at any
moment of opening, and two trainings in one folder.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import warm_processes
from conftest import DEMO, ROOT, run_inside, run_script

from medqlora.batches.cache import save_arrays, use_cache
from medqlora.core.config import Training
from medqlora.core.errors import RunError
from medqlora.core.files import find_problem, write_checked
from medqlora.core.run_lock import LOCK, hold_run
from medqlora.core.run_origin import describe_changes, find_changes, read_origin
from medqlora.core.seeds import fit_seed
from medqlora.training.progress import note_loss, stops_early
from medqlora.training.session import TrainingError

RECIPE = ROOT / "recipes" / "sft_qlora.py"


def flags(work: Path, *more: str) -> list[str]:
    """A training of six steps on files of its own, with two evaluations and four checkpoints."""
    entries = {
        role: json.dumps([{"format": "medmcqa", "path": str(work / f"{role}.jsonl")}])
        for role in ("train", "eval", "test")
    }
    return [
        *("--output_dir", str(work / "run"), "--data.cache_dir", str(work / "cache")),
        *("--model.base", str(work / "base"), "--data.train", entries["train"]),
        *("--data.eval", entries["eval"], "--data.test", entries["test"], "--lora.r", "4"),
        *("--training.max_steps", "6", "--training.max_tokens_per_batch", "512"),
        *("--training.global_batch_tokens", "512", "--training.gradient_checkpointing", "none"),
        *("--training.eval_steps", "3", "--training.save_steps", "2"),
        # At this rate the loss rises after the first evaluation, so the best adapter is an old one.
        *("--training.lr", "0.01", "--training.scheduler", "constant", *more),
    ]


def write_inputs(work: Path) -> None:
    shutil.copytree(DEMO / "base", work / "base")
    for role, name, rows in (
        ("train", "train", 80),
        ("eval", "validation", 12),
        ("test",) * 2 + (12,),
    ):
        lines = (DEMO / "data" / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (work / f"{role}.jsonl").write_text("".join(lines[:rows]))


def read_result(run: Path) -> dict:
    """What a run leaves, without what belongs to the machine or the start."""
    log = [json.loads(line) for line in (run / "train_log.jsonl").read_text().splitlines()]
    for row in log:
        for key in ("tokens_per_second", "peak_memory_bytes"):
            row.pop(key, None)
    settings = json.loads((run / "adapter" / "adapter_config.json").read_text())
    settings["target_modules"] = sorted(settings["target_modules"])
    metrics = json.loads((run / "metrics.json").read_text())
    for key in ("memory_bytes", "peak_memory_bytes_per_rank"):
        metrics.pop(key)
    metadata = json.loads((run / "adapter" / "medqlora.json").read_text())
    # The order of a set's elements in adapter_config.json differs between two processes.
    metadata.pop("config_sha256", None)
    return {
        "log": log,
        "settings": settings,
        "metrics": metrics,
        "metadata": metadata,
        "removed": (run / "removed.jsonl").read_bytes(),
        "weights": (run / "adapter" / "adapter_model.safetensors").read_bytes(),
        "predictions": [
            (run / "predictions" / f"{name}.jsonl").read_bytes() for name in ("base", "tuned")
        ],
    }


@pytest.fixture(scope="module")
def halfway(tmp_path_factory):
    """A run that a kill ended after its fifth step, and what it leaves when it is not disturbed.

    The checkpoints of steps 2 and 4 are there, and the best adapter is that of step 3.
    """
    work = tmp_path_factory.mktemp("halfway")
    write_inputs(work)
    script = STOPPED.format(step=5)
    process = warm_processes.start(["-c", script, str(RECIPE), *flags(work)], ROOT)
    _, complaint = process.communicate()
    assert process.returncode == 9, complaint
    shutil.copytree(work, work / "kept", ignore=shutil.ignore_patterns("kept"))
    done = run_script(RECIPE, *flags(work, "--resume"))
    assert done.returncode == 0, done.stderr
    return work, read_result(work / "run"), done.stdout


# The process ends as a kill ends it, before the step is logged.
STOPPED = """
import os, runpy, sys
from medqlora.training import session
update, taken = session.Session.update, []
def stop(self, lr):
    taken.append(lr)
    if len(taken) == {step}:
        os._exit(9)
    return update(self, lr)
session.Session.update = stop
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def put_back(work: Path) -> None:
    """Bring back run, cache and inputs as the kill left them."""
    for path in (work / "kept").iterdir():
        if path.is_dir():
            shutil.rmtree(work / path.name, ignore_errors=True)
            shutil.copytree(path, work / path.name)
        else:
            shutil.copy(path, work / path.name)


# ---- other inputs --------------------------------------------------------------------------------


def change_weights(work: Path) -> None:
    path = work / "base" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1  # between the samples of sample_weights
    path.write_bytes(bytes(content))


def change_vocabulary(work: Path) -> None:
    """Exchange two tokens that no row may have, so the token ids of all rows stay the same."""
    path = work / "base" / "tokenizer.json"
    tree = json.loads(path.read_text())
    vocabulary = tree["model"]["vocab"]
    rare = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[rare[0]], vocabulary[rare[1]] = vocabulary[rare[1]], vocabulary[rare[0]]
    path.write_text(json.dumps(tree))


def drop_last_line(name: str):
    def change(work: Path) -> None:
        path = work / name
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))

    return change


OTHER_INPUTS = {
    "base": (change_weights, "the files of model.base (base_files_sha256 was"),
    "tokenizer": (change_vocabulary, "the tokenizer or its chat template (tokenizer_sha256 was"),
    "training rows": (drop_last_line("train.jsonl"), "the rows of data.train (data_sha256 was"),
    "evaluation rows": (drop_last_line("eval.jsonl"), "the rows of data.eval (eval_sha256 was"),
    "test questions": (drop_last_line("test.jsonl"), "the questions of data.test (test_sha256"),
}


@pytest.mark.parametrize("what", OTHER_INPUTS)
def test_other_inputs_than_at_the_start_are_refused(halfway, monkeypatch, what):
    work = halfway[0]
    put_back(work)
    change, message = OTHER_INPUTS[what]
    change(work)
    before = (work / "run" / "origin.json").read_bytes()
    code, complaint = run_inside(RECIPE, flags(work, "--resume"), monkeypatch)
    assert (code, complaint.count("\n")) == (2, 1), complaint
    assert message in complaint
    assert "--resume_changed" in complaint
    assert (work / "run" / "origin.json").read_bytes() == before


def test_other_inputs_are_accepted_with_a_flag_and_recorded(halfway, monkeypatch):
    work = halfway[0]
    put_back(work)
    origin = read_origin(work / "run")
    base = (work / "run" / "predictions" / "base.jsonl").read_text().splitlines()
    drop_last_line("test.jsonl")(work)
    given = flags(work, "--resume", "--resume_changed")
    assert run_inside(RECIPE, given, monkeypatch)[0] == 0
    environment = json.loads((work / "run" / "environment.json").read_text())
    (resumption,) = environment["resumptions"]
    assert resumption["changed"] == ["test_sha256"]
    assert resumption["step"] == 4
    assert environment["test_sha256"] != origin["test_sha256"]
    # What the run began with is kept, and the base has answered the questions that are there now.
    assert read_origin(work / "run")["test_sha256"] == origin["test_sha256"]
    again = (work / "run" / "predictions" / "base.jsonl").read_text().splitlines()
    assert (len(base), len(again)) == (12, 11)


def test_another_version_warns_and_is_recorded(halfway):
    """It may also write the same rows or tokenizer in another form; the tokens tell."""
    work = halfway[0]
    put_back(work)
    origin = read_origin(work / "run")
    origin["versions"]["transformers"] = "4.0"
    origin["tokenizer_sha256"] = "f" * 64
    write_checked(work / "run" / "origin.json", origin)
    done = run_script(RECIPE, *flags(work, "--resume"))
    assert done.returncode == 0, done.stderr
    assert "other versions than when the run began: transformers 4.0 -> " in done.stdout
    assert "the tokens of all rows are the same" in done.stdout
    (resumption,) = json.loads((work / "run" / "environment.json").read_text())["resumptions"]
    assert resumption["versions"]["transformers"][0] == "4.0"
    result = read_result(work / "run")
    assert result == halfway[1]


def test_versions_explain_the_form_of_rows_and_never_their_tokens():
    origin = {"data_sha256": "a" * 64, "tokens_sha256": "b" * 64, "versions": {"torch": "1"}}
    form = origin | {"data_sha256": "c" * 64}
    tokens = origin | {"tokens_sha256": "c" * 64}
    newer = {"torch": "2"}
    assert find_changes(origin, form, newer).harmless
    for hashes, versions in ((form, {"torch": "1"}), (tokens, newer)):
        changes = find_changes(origin, hashes, versions)
        with pytest.raises(RunError, match=r"was .*, now cccccccccccc\)"):
            describe_changes(changes, origin, hashes, accept_changes=False)
        assert describe_changes(changes, origin, hashes, accept_changes=True)
    # An older version recorded no hash of the tokens, so nothing tells that they are the same.
    del origin["tokens_sha256"]
    assert not find_changes(origin, form, newer).harmless
    assert find_changes({}, form, newer).hashes == []


# ---- early stopping, seeds, evaluation loss ------------------------------------------------------


def test_a_run_that_stopped_early_takes_no_more_steps(halfway, tmp_path):
    """Nor does one that a kill ended between its last evaluation and its end."""
    write_inputs(tmp_path)
    # At this rate no evaluation is below the first one.
    stops = ("--training.lr", "1e-30", "--training.early_stopping_patience", "1")
    given = flags(tmp_path, "--training.max_steps", "12", *stops, "--training.warmup_steps", "20")
    done = run_script(RECIPE, *given)
    assert done.returncode == 0, done.stderr
    assert "stopping early" in done.stdout
    assert "training.warmup_steps 20 is longer than the run of 12 steps" in done.stdout
    whole = read_result(tmp_path / "run")
    assert whole["log"][-1]["step"] == 6
    for lost in ("metrics.json", "predictions/tuned.jsonl"):
        (tmp_path / "run" / lost).unlink()
    done = run_script(RECIPE, *given, "--resume")
    assert done.returncode == 0, done.stderr
    assert read_result(tmp_path / "run") == whole


def test_the_state_of_early_stopping():
    training = Training(early_stopping_patience=2)
    state = {"step": 1, "best_loss": None, "best_step": 0, "patience": 0}
    noted = [note_loss(state, loss) for loss in (1.0, 1.0, 0.5)]
    assert (noted, state["patience"]) == ([True, False, True], 0)
    assert not stops_early(state | {"patience": 1}, training)
    assert stops_early(state | {"patience": 2}, training)
    with pytest.raises(TrainingError, match="the evaluation loss is nan"):
        note_loss(state, float("nan"))


def test_evaluation_loss_is_shown_and_in_the_metrics(halfway):
    _, result, shown = halfway
    losses = {row["step"]: row["eval_loss"] for row in result["log"] if "eval_loss" in row}
    assert set(losses) == {3, 6}
    best = min(losses, key=losses.get)
    assert best == 3
    assert result["metrics"]["best_step"] == best
    assert result["metrics"]["eval_loss"] == losses[best]
    assert result["metrics"]["perplexity"] == np.exp(losses[best])
    assert f"step 6/6  evaluation loss {losses[6]:.4f}" in shown
    assert f"adapter of step {best}, evaluation loss {losses[best]:.4f}" in shown


@pytest.mark.parametrize("seed", [2**24, 10**40])
def test_a_seed_of_any_size_trains(tmp_path, monkeypatch, seed):
    assert fit_seed(seed, 300) == seed
    assert fit_seed(seed, 24) < 2**24
    write_inputs(tmp_path)
    given = ("--training.seed", str(seed), "--training.max_steps", "1", "--lora.dropout", "0.1")
    assert run_inside(RECIPE, flags(tmp_path, *given), monkeypatch) == (0, "")


# ---- the lock of a run ---------------------------------------------------------------------------


def test_a_second_training_in_one_folder_is_refused(halfway, monkeypatch):
    work = halfway[0]
    put_back(work)
    with hold_run(work / "run"):
        code, complaint = run_inside(RECIPE, flags(work, "--resume"), monkeypatch)
        assert (code, complaint.count("\n")) == (2, 1), complaint
        assert f"run is in use by process {os.getpid()} on " in complaint
    assert not (work / "run" / LOCK).exists()


def test_a_killed_holder_blocks_nobody_and_a_new_folder_goes_with_the_lock(tmp_path):
    folder = tmp_path / "runs" / "new"
    script = (
        "import sys, os\nfrom pathlib import Path\nfrom medqlora.core.run_lock import hold_run\n"
        "with hold_run(Path(sys.argv[1])):\n    os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", script, folder], check=False)
    assert killed.returncode == -9
    assert (folder / LOCK).exists()
    with hold_run(folder):
        pass
    assert list(folder.iterdir()) == []
    folder.rmdir()
    (tmp_path / "runs").rmdir()
    with hold_run(folder):
        assert folder.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def refuse(file, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with hold_run(tmp_path) as warning:
        assert "has no locks (Function not implemented)" in warning


# ---- kills while a run is opened -----------------------------------------------------------------

KILLED = """
import os, sys
from pathlib import Path
from medqlora.core.config_loading import load_config
from medqlora.core.files import write_checked
from medqlora.core.run_folder import check_run, open_run
from medqlora.core.run_lock import hold_run
folder, configuration, last = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
config = load_config(configuration, [])
count = 0
def end(event, arguments):
    global count
    if event in {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "fcntl.flock"}:
        count += any(str(folder) in str(value) for value in arguments) or event == "fcntl.flock"
        if count > last:
            os._exit(9)
sys.addaudithook(end)
with hold_run(folder):
    check_run(folder, config, resume=len(sys.argv) > 4)
    open_run(folder, config, {"data_sha256": "a", "resumptions": []})
    count = -10**9
    os._exit(0)
"""


@pytest.mark.parametrize("begun", [False, pytest.param(True, marks=pytest.mark.full)])
def test_a_kill_at_any_moment_of_opening_leaves_a_folder_that_is_taken(tmp_path, begun):
    """The kill comes before each call to the system in turn, until there is none left."""
    configuration = ROOT / "recipes" / "configs" / "demo.yaml"
    kills = 0
    for last in range(100):
        folder = tmp_path / f"run-{last}"
        first = [sys.executable, "-c", KILLED, folder, configuration, "1000"]
        again = ["--resume"] if begun else []
        if begun:
            assert subprocess.run(first, check=False).returncode == 0
        command = [*first[:-1], str(last), *again]
        code = subprocess.run(command, check=False).returncode
        if code == 0:
            break
        assert code == 9
        kills += 1
        done = subprocess.run([*first, "--resume"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, (last, done.stderr)
        names = sorted(path.name for path in folder.iterdir())
        assert names == ["config.yaml", "origin.json", LOCK], (last, names)
        assert read_origin(folder)["data_sha256"] == "a"
    assert kills >= 8


# The same in the real recipe, up to its first step.
KILLED_RECIPE = """
import os, runpy, sys
from medqlora.training import session
folder, last, count = sys.argv[1], int(sys.argv[2]), 0
def end(event, arguments):
    global count
    if event in {"open", "os.mkdir", "os.rename", "os.remove"} and folder in str(arguments):
        count += 1
        if count > last:
            os._exit(9)
sys.addaudithook(end)
update = session.Session.update
session.Session.update = lambda self, lr: os._exit(0)
sys.argv = sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.full
def test_a_kill_at_any_moment_before_the_first_step_changes_no_result(halfway, monkeypatch):
    work, expected, _ = halfway
    kills = 0
    # Every third moment is tried, because each is a start and a whole resumed run.
    for last in range(0, 100, 3):
        put_back(work)
        shutil.rmtree(work / "run")
        given = [str(work / "run"), str(last), str(RECIPE), *flags(work)]
        process = warm_processes.start(["-c", KILLED_RECIPE, *given], ROOT)
        _, complaint = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == 9, complaint
        kills += 1
        assert run_inside(RECIPE, flags(work, "--resume"), monkeypatch) == (0, ""), last
        assert read_result(work / "run") == expected, last
    assert kills >= 5


# ---- the cache -----------------------------------------------------------------------------------


def test_a_damaged_or_foreign_cache_is_replaced(tmp_path):
    folder = tmp_path / "tokens-0123456789abcdef01234567"
    arrays = {"a": np.arange(9), "b": np.zeros(3)}

    def is_whole():
        return find_problem(folder, ["a.npy", "b.npy"], key="k") is None

    def replace_by_file():
        shutil.rmtree(folder)
        folder.write_text("a file")

    damages = {
        "cut": lambda: os.truncate(folder / "a.npy", 10),
        "missing": lambda: (folder / "b.npy").unlink(),
        "other content": lambda: np.save(folder / "a.npy", np.arange(9) + 1),
        "nonsense": lambda: (folder / "manifest.json").write_text('{"files": 7}'),
        "empty list": lambda: (folder / "manifest.json").write_text('{"key": "k", "files": {}}'),
        "foreign": lambda: (folder / "manifest.json").write_text(
            (folder / "manifest.json").read_text().replace('"k"', '"other"')
        ),
        "a file": replace_by_file,
        "a folder in a file's place": lambda: (
            (folder / "a.npy").unlink(),
            (folder / "a.npy").mkdir(),
        ),
    }
    for name, damage in damages.items():
        save_arrays(folder, arrays, "k")
        assert is_whole(), name
        damage()
        assert not is_whole(), name
        save_arrays(folder, arrays, "k")
        assert is_whole(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache.lock", folder.name]


def test_leftovers_of_kills_are_removed_unless_somebody_writes(tmp_path):
    ours = ["tokens-0123456789abcdef01234567.89abcdef.tmp", "shared-18b.json"]
    ours += [".shared-18b.json.0123456789abcdef.tmp", f"plan-{'0' * 24}.{'1' * 16}.old.tmp"]
    others = ["notes.tmp", "tokens-0123456789abcdef01234567", "shared-notes.json"]
    for name in ours + others:
        (tmp_path / name).mkdir()
    with use_cache(tmp_path):
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {*others, "cache.lock"}
        (tmp_path / ours[0]).mkdir()
        with use_cache(tmp_path):
            assert (tmp_path / ours[0]).exists()
    with use_cache(tmp_path):
        assert not (tmp_path / ours[0]).exists()


# ---- damage in any file --------------------------------------------------------------------------


def flip(path: Path, part: float) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[min(int(len(content) * part), len(content) - 1)] ^= 1
    path.write_bytes(bytes(content))


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = {
    "bit at a third": lambda path: flip(path, 0.33),
    "cut in half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "folder": replace_by_folder,
}


def list_files(work: Path) -> list[str]:
    kept = work / "kept"
    files = [path for place in ("run", "cache") for path in (kept / place).rglob("*")]
    return sorted(str(path.relative_to(kept)) for path in files if path.is_file())


def judge(work: Path, name: str, damage: str, expected: dict, monkeypatch) -> str:
    """Damage one file, resume, and say what came of it."""
    put_back(work)
    DAMAGES[damage](work / name)
    try:
        code, complaint = run_inside(RECIPE, flags(work, "--resume"), monkeypatch)
    except Exception as error:  # noqa: BLE001
        return f"traceback {type(error).__name__}"
    if code == 2 and complaint.count("\n") == 1:
        return "refused"
    if code != 0:
        return f"code {code}"
    try:
        return "equal" if read_result(work / "run") == expected else "silent difference"
    except Exception as error:  # noqa: BLE001
        return f"unreadable result {type(error).__name__}"


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("run/predictions/base.jsonl", "bit at a third"),
        ("run/adapter/adapter_config.json", "bit at a third"),
    ],
)
def test_damage_that_used_to_pass_without_a_word(halfway, monkeypatch, name, damage):
    assert judge(halfway[0], name, damage, halfway[1], monkeypatch) == "equal"


@pytest.mark.full
def test_damage_in_any_file_is_mended_or_said(halfway, monkeypatch):
    work, expected, _ = halfway
    # Each file gets one kind of damage in turn, because every case is a whole resumed run.
    cases = zip(list_files(work), itertools.cycle(DAMAGES), strict=False)
    verdicts = {
        (name, damage): judge(work, name, damage, expected, monkeypatch) for name, damage in cases
    }
    allowed = ("equal", "refused")
    assert {key: found for key, found in verdicts.items() if found not in allowed} == {}
    assert len(verdicts) >= 40
