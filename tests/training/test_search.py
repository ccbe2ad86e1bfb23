"""Searches: the space and its mistakes, draws that a kill does not change, storage, results."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import DEMO, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from medqlora.core.config_loading import load_config
from medqlora.core.errors import UserError
from medqlora.evaluation.comparison import compare_predictions
from medqlora.evaluation.predictions import read_predictions
from medqlora.reporting import search_results, search_terminal
from medqlora.training.search import trials as running
from medqlora.training.search.definition import read_search
from medqlora.training.search.study import (
    STORAGE,
    add_trial,
    draw_point,
    finish_trial,
    measure_importances,
    next_point,
    open_study,
    report_losses,
)

CONFIGS = ROOT / "recipes" / "configs"
VALIDATION = {"format": "medmcqa", "path": str(DEMO / "data" / "validation.jsonl")}
TEST = {"format": "medmcqa", "path": str(DEMO / "data" / "test.jsonl")}
SEARCH = {
    "recipe": str(CONFIGS / "demo.yaml"),
    "fixed": {"data.test": []},
    "space": {
        "lora.r": [8, 16, 32],
        "lora.alpha": {"times": "lora.r", "factor": [1, 2]},
        "training.lr": {"low": "1e-4", "high": 1e-2, "log": True},
    },
}


def read(folder: Path, overrides: list[str] = (), trials: int | None = None, **changes):
    path = folder / "search.yaml"
    path.write_text(yaml.safe_dump(SEARCH | changes), encoding="utf-8")
    return read_search(path, list(overrides), trials)


def read_grid(folder: Path, **changes):
    space = {"lora.r": [16, 32], "lora.variant": ["lora", "rslora"]}
    return read(folder, space=space, method="grid", **changes)


# ---- the space -----------------------------------------------------------------------------------

MISTAKES = {
    "unknown key": ({"space": {"lora.rr": [8]}}, "did you mean lora.r"),
    "key without section": ({"space": {"lr": [1e-4, 1e-3]}}, "did you mean training.lr"),
    "no list": ({"space": {"lora.r": 8}}, "expected a list"),
    "empty list": ({"space": {"lora.r": []}}, "at least one value"),
    "empty space": ({"space": {}}, "space is empty"),
    "value twice": ({"space": {"training.lr": [1e-3, "1e-3"]}}, "twice"),
    "bad value": ({"space": {"lora.r": [8, "many"]}}, "many"),
    "value below the least": ({"space": {"lora.r": [0, 32]}}, "greater than or equal to 1"),
    "range of words": ({"space": {"lora.variant": {"low": 1, "high": 2}}}, "lora.variant"),
    "range upside down": ({"space": {"lora.r": {"low": 64, "high": 8}}}, "exchange"),
    "range of one number": ({"space": {"lora.r": {"low": 8, "high": 8}}}, "exchange"),
    "range with a word": ({"space": {"lora.r": {"low": "a", "high": 8}}}, "expected a number"),
    "half ranks": ({"space": {"lora.r": {"low": 8.5, "high": 64}}}, "whole number"),
    "log from zero": ({"space": {"lora.dropout": {"low": 0, "high": 0.1, "log": True}}}, "log"),
    "odd step": ({"space": {"lora.r": {"low": 8, "high": 64, "step": 5}}}, "no multiple of step"),
    "unknown key of a range": ({"space": {"lora.r": {"low": 8, "hihg": 9}}}, "expected {low"),
    "multiple of nothing": ({"space": {"lora.alpha": {"times": "lora.r", "factor": [2]}}}, "times"),
    "multiple without factor": (
        {"space": {"lora.r": [32], "lora.alpha": {"times": "lora.r"}}},
        "factor",
    ),
    "multiple of a word": (
        {
            "space": {
                "training.max_tokens_per_batch": ["auto", 1024],
                "training.global_batch_tokens": {
                    "times": "training.max_tokens_per_batch",
                    "factor": [1],
                },
            }
        },
        "expected a number",
    ),
    "default outside a list": ({"space": {"lora.r": [8, 16]}}, "recipe's own value"),
    "default outside a range": ({"space": {"training.lr": {"low": 1, "high": 2}}}, "own value"),
    "seed": ({"space": {"training.seed": [0, 1]}}, "seeds"),
    "test data": ({"space": {"data.test": [[], [TEST]]}}, "must never see"),
    "entry of the test": ({"space": {"data.eval.0.limit": [5, 6]}}, "same data"),
    "loss over other tokens": (
        {"space": {"data.completion": ["letter", "letter_text"]}},
        "changes the tokens",
    ),
    "grid of a range": ({"method": "grid"}, "method grid takes lists"),
    "accuracy without questions": ({"objective": "accuracy"}, "validation"),
    "loss without data": ({"fixed": {"data.eval": [], "data.test": []}}, "needs data.eval"),
    "pruning by accuracy": (
        {"objective": "accuracy", "validation": [VALIDATION], "pruning": "median"},
        "pruning",
    ),
    "pruning without losses": (
        {"pruning": "median", "fixed": {"training.eval_steps": None, "data.test": []}},
        "eval_steps",
    ),
    "pruning of other steps": (
        {"pruning": "median", "space": {"training.max_steps": [10, 1100]}},
        "what a step is",
    ),
    "confirming without a test": ({"confirm": True}, "needs data.test"),
    "validation that is the test": (
        {"objective": "accuracy", "validation": [TEST], "fixed": {}},
        "choose by the test",
    ),
    "eval that is the test": ({"fixed": {"data.test": [VALIDATION]}}, "choose by the test"),
    "validation that is not there": ({"validation": [{"format": "mcq", "path": "no"}]}, "no"),
    "validation that is trained on": (
        {"validation": [VALIDATION | {"path": str(DEMO / "data" / "train.jsonl")}]},
        "validation[0] is the same data as data.train",
    ),
    "unknown fixed key": ({"fixed": {"training.lrr": 1}}, "did you mean training.lr"),
    "unknown key of the file": ({"trails": 3}, "did you mean trials"),
    "seed twice": ({"seeds": [1, 1]}, "twice"),
    "no recipe": ({"recipe": "nothing.yaml"}, "nothing.yaml"),
    "too many": (
        {
            "space": {f"training.{key}": list(range(1, 40)) for key in ("epochs", "max_grad_norm")}
            | {"training.loss_chunk_tokens": list(range(1000, 1040))}
        },
        "combinations",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, tmp_path):
    changes, expected = MISTAKES[name]
    with pytest.raises(UserError) as caught:
        read(tmp_path, **changes)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_line_of_a_mistake_is_named(tmp_path):
    path = tmp_path / "search.yaml"
    path.write_text(
        f"recipe: {CONFIGS / 'demo.yaml'}\nfixed: {{data.test: []}}\nspace:\n  lora.r: 3\n"
    )
    with pytest.raises(UserError, match=r"search\.yaml line 4: space\.lora\.r"):
        read_search(path, [], None)


def test_questions_of_the_test_in_other_files_are_counted_and_refused(tmp_path):
    rows = (DEMO / "data" / "test.jsonl").read_text().splitlines()[:50]
    copy = tmp_path / "copy.jsonl"
    copy.write_text("\n".join(rows) + "\n")
    changes = {"fixed": {}, "objective": "accuracy"}
    with pytest.raises(UserError, match=r"50 of the .* stand in data\.eval or in validation"):
        read(tmp_path, **changes, validation=[VALIDATION | {"path": str(copy)}])
    copy.write_text(
        "\n".join([*rows[:1], *(DEMO / "data" / "validation.jsonl").read_text().splitlines()])
    )
    assert read(tmp_path, **changes, validation=[VALIDATION | {"path": str(copy)}]).shared == 1


def test_trials_never_read_the_test(tmp_path):
    search = read(tmp_path, fixed={}, objective="accuracy", validation=[VALIDATION])
    recipe = load_config(CONFIGS / "demo.yaml")
    assert search.config(search.default) == recipe
    trial = search.trial_config(search.default)
    assert [entry.path for entry in trial.data.test] == [VALIDATION["path"]]
    assert trial.data.eval == recipe.data.eval


@settings(max_examples=25, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 64), min_size=1, max_size=3, unique=True),
    factors=st.lists(st.sampled_from([0.5, 1, 2, 4]), min_size=1, max_size=3, unique=True),
    low=st.floats(1e-6, 1e-3),
    ratio=st.floats(1.01, 100),
    seed=st.integers(0, 2**40),
)
def test_every_draw_is_a_valid_configuration(tmp_path_factory, ranks, factors, low, ratio, seed):
    space = {
        "lora.r": ranks,
        "lora.alpha": {"times": "lora.r", "factor": factors},
        "training.lr": {"low": low, "high": low * ratio},
        "training.warmup_steps": {"low": 0, "high": 4, "step": 2},
    }
    fixed = {"lora.r": ranks[0], "lora.alpha": ranks[0] * factors[0], "training.lr": low}
    fixed |= {"training.warmup_steps": 2, "data.test": []}
    search = read(tmp_path_factory.getbasetemp(), space=space, fixed=fixed, seed=seed)
    point = draw_point(search, [], [])
    config = search.trial_config(point)
    assert config.lora.r in ranks
    assert config.lora.alpha / config.lora.r in factors
    assert low <= config.training.lr <= low * ratio
    assert config.training.warmup_steps in (0, 2, 4)
    assert search.config(search.default).training.lr == low


def test_a_combination_that_the_configuration_refuses_is_a_hole(tmp_path):
    space = {"lora.variant": ["lora", "dora"], "model.quantization": ["nf4", "int8"]}
    search = read(tmp_path, space=space, method="grid")
    assert len(search.points) == 3
    (hole,) = search.holes
    assert hole["parameters"] == {"lora.variant": "dora", "model.quantization": "int8"}
    assert "int8" in hole["reason"]
    sampled = read(tmp_path, space=space, trials=30)
    study = open_study(tmp_path, sampled)
    taken = []
    while (point := next_point(sampled, study.trials())) is not None:
        trial = add_trial(study, point)
        finish_trial(study, trial, 1.0, {})
        taken.append(point)
    assert sorted(map(str, taken)) == sorted(map(str, search.points))


def test_lists_are_values(tmp_path):
    space = {
        "lora.target_modules": ["all-linear", ["q_proj", "v_proj"]],
        "data.packing": [True, False],
    }
    search = read(tmp_path, space=space, method="grid")
    targets = {str(search.config(point).lora.target_modules) for point in search.points}
    assert targets == {"all-linear", "['q_proj', 'v_proj']"}


@pytest.mark.parametrize("name", ["search_demo", "search_medmcqa"])
def test_shipped_searches_are_valid_and_hold_the_published_cells(name, tmp_path):
    path = CONFIGS / f"{name}.yaml"
    if name == "search_medmcqa":
        # A search with a test reads it at once, to count shared questions; the hub is out of reach.
        text = path.read_text(encoding="utf-8").replace("./", f"{CONFIGS}/")
        text = text.replace("confirm: true", "confirm: false")
        path = tmp_path / path.name
        path.write_text(text.replace("data.eval: []", "data.eval: []\n  data.test: []"))
    search = read_search(path, [], None)
    assert len(search.holes) == 1
    assert search.file.method == "grid"
    assert (name != "search_medmcqa") or len(search.points) == 11


# ---- the storage ---------------------------------------------------------------------------------


def run_all(study, value_of, until: int) -> list[dict]:
    """Draw and finish trials, without training, until there are so many."""
    while len(study.trials()) < until:
        trial = add_trial(study, next_point(study.search, study.trials()))
        finish_trial(study, trial, value_of(trial.params), {"seconds": 1.0})
    return [trial.params for trial in study.trials()]


def value_of(point: dict) -> float:
    return abs(np.log(point["training.lr"] / 1e-3)) + point["lora.r"] / 64


def test_draws_after_a_restart_are_those_of_one_start(tmp_path):
    search = read(tmp_path, trials=16)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = run_all(open_study(tmp_path / "a", search), value_of, 16)
    for until in (1, 5, 12, 16):
        parts = run_all(open_study(tmp_path / "b", search), value_of, until)
    assert parts == whole
    assert whole[0] == search.default
    assert len({json.dumps(point) for point in whole}) == 16
    assert next_point(search, open_study(tmp_path / "a", search).trials()) is None
    shares = measure_importances(open_study(tmp_path / "a", search))
    assert shares.keys() == search.space.keys()
    assert sum(shares.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 3}, "seed was 0"),
        ({"fixed": {"data.test": [], "training.epochs": 1}}, "recipe.training.epochs"),
        ({"space": {"lora.r": [16, 32]}}, "space"),
        ({"seeds": [0, 1]}, "seeds"),
    ],
)
def test_another_search_in_the_same_folder_is_refused(tmp_path, changes, named):
    open_study(tmp_path, read(tmp_path))
    open_study(tmp_path, read(tmp_path, trials=99, max_failures=1))
    with pytest.raises(UserError, match=named):
        open_study(tmp_path, read(tmp_path, **changes))


def test_a_damaged_storage_is_one_line(tmp_path):
    search = read(tmp_path)
    run_all(open_study(tmp_path, search), value_of, 2)
    path = tmp_path / STORAGE
    whole = path.read_bytes()
    for damaged in (b"no database", b"\0" * 5000, whole[:4096] + b"x" * 4096, whole[:5000]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="storage of the search cannot be used") as caught:
            run_all(open_study(tmp_path, search), value_of, 3)
        assert "\n" not in str(caught.value)


def test_a_folder_of_odd_name_holds_a_storage(tmp_path):
    folder = tmp_path / "50%?mode=ro#x [é]"
    folder.mkdir()
    run_all(open_study(folder, read(tmp_path)), value_of, 1)
    assert (folder / STORAGE).is_file()


def test_where_a_trial_is_pruned_does_not_depend_on_when_somebody_looks(tmp_path):
    search = read(tmp_path, pruning="median", seed=1)
    study = open_study(tmp_path, search)
    for number in range(5):
        trial = add_trial(study, next_point(search, study.trials()))
        report_losses(study, trial, {step: 3 - step / 10 + number / 10 for step in (1, 2, 3)})
        finish_trial(study, trial, 1.0, {})

    @settings(max_examples=12)
    @given(
        losses=st.lists(st.floats(2, 4), min_size=3, max_size=3),
        looks=st.lists(st.integers(1, 3), max_size=3).map(sorted),
    )
    def check(losses: list[float], looks: list[int]) -> None:
        lowest = np.minimum.accumulate(losses)
        expected = [step for step, low in enumerate(lowest, 1) if low > 3.2 - step / 10 + 1e-12]
        trial = add_trial(study, search.default)
        found = None
        # A look may come twice at one step: after a kill between the loss and the judgement.
        for look in [*looks, 3]:
            found = report_losses(study, trial, dict(enumerate(losses[:look], 1)))
            if found is not None:
                break
        finish_trial(study, trial, None, {"failure": "of the next example"})
        assert found == (expected[0] if expected else None)

    check()


def test_two_processes_share_the_trials(tmp_path):
    search = read_grid(tmp_path)
    study = open_study(tmp_path, search)
    with ExitStack() as first, ExitStack() as second:
        one = running.claim_trial(study, tmp_path, first, [])
        two = running.claim_trial(study, tmp_path, second, [])
        assert (one.number, two.number) == (0, 1)
        second.close()  # The second process is killed; its trial goes on first.
        with ExitStack() as third:
            assert running.claim_trial(study, tmp_path, third, []).number == 1
    assert len(study.trials()) == 2


def test_failed_trials_are_tried_again_once(tmp_path):
    search = read_grid(tmp_path)
    study = open_study(tmp_path, search)
    for value in (None, 1.0):
        trial = add_trial(study, next_point(search, study.trials()))
        finish_trial(study, trial, value, {} if value else {"failure": "full disk"})
    again = running.list_failed(study)
    assert again == [search.default]
    with ExitStack() as held:
        trial = running.claim_trial(study, tmp_path, held, again)
        assert (trial.number, trial.params, again) == (2, search.default, [])
        finish_trial(study, trial, 2.0, {})
        assert running.claim_trial(study, tmp_path, held, again).params == search.points[2]
    assert running.list_failed(study) == []
    assert search_results.collect_results(study, tmp_path)["default"] == 2


# ---- trainings -----------------------------------------------------------------------------------

TRAINING = """
import pathlib, signal, sys, time
run = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
run.mkdir(exist_ok=True)
def end(number, frame):
    (run / "ended").write_text("")
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
(run / "began").write_text("")
time.sleep(60)
"""
WATCHER = """
import sys
from pathlib import Path
from medqlora.training.search import trials
trials.RECIPE = Path(sys.argv[1])
trials.Launcher().train(Path("x"), Path(sys.argv[2]), 0)
"""


def wait_until(true, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux tells a child of its parent's death"
)
def test_a_training_ends_with_a_search_that_is_killed(tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(TRAINING)
    run = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", WATCHER, recipe, run])
    wait_until((run / "began").exists)
    process.kill()
    process.wait()
    wait_until((run / "ended").exists)


def test_a_signal_or_a_pruned_trial_ends_the_training(tmp_path, monkeypatch):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(TRAINING)
    monkeypatch.setattr(running, "RECIPE", recipe)
    pruned = tmp_path / "pruned"
    began = (pruned / "began").exists
    assert running.Launcher().train(Path("x"), pruned, 0, began) is None
    assert (pruned / "ended").exists()
    with pytest.raises(running.StoppedError) as stopped:
        running.Launcher(caught=[signal.SIGINT]).train(Path("x"), tmp_path / "stopped", 0)
    assert stopped.value.code == 130


LOGS = {
    "a line of ours\n": "a line of ours",
    "step 3\nTraceback (most recent call last):\n  File x\nOutOfMemoryError: 2 GiB\n": (
        "OutOfMemoryError: 2 GiB"
    ),
    "our line\nTraceback (most recent call last):\n  File x\n"
    "subprocess.CalledProcessError: Command x returned non-zero exit status 2.\n": "our line",
    "": "exit code 1 without a word",
}


@pytest.mark.parametrize("log", LOGS)
def test_the_line_of_a_failure_is_found(tmp_path, log):
    (tmp_path / "log").write_text(log)
    assert running.describe_end(1, tmp_path / "log") == LOGS[log]


def test_a_training_that_was_killed_by_the_system_is_named(tmp_path):
    assert "SIGKILL" in running.describe_end(-9, tmp_path / "log")


# ---- results -------------------------------------------------------------------------------------


def write_predictions(path: Path, right: list[bool]) -> None:
    row = {
        "dataset": "medmcqa",
        "subject": "s",
        "gold": "A",
        "option_logprobs": {"A": -1.0, "B": -2.0},
    }
    row |= {"letter_mass": 1.0, "text": None, "prompt_sha256": "p", "engine": "hf", "model": "m"}
    rows = [
        row
        | {"id": str(number), "question": "Which?", "prediction": "A" if hit else "B"}
        | ({} if hit else {"option_logprobs": {"A": -2.0, "B": -1.0}})
        for number, hit in enumerate(right)
    ]
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def finished(tmp_path):
    """A grid of four cells: three complete with two seeds each, one failed."""
    search = read_grid(tmp_path, objective="accuracy", validation=[VALIDATION], seeds=[0, 1])
    study = open_study(tmp_path, search)
    generator = np.random.default_rng(0)
    for number, share in enumerate((0.5, 0.7, 0.9)):
        trial = add_trial(study, next_point(search, study.trials()))
        values = []
        for run in running.list_runs(study, tmp_path, number):
            right = list(generator.random(200) < share)
            write_predictions(run / search_results.TUNED, right)
            values.append(sum(right) / 200)
        facts = {"value_per_seed": values, "seconds": 1.0, "folder": "here"}
        finish_trial(study, trial, sum(values) / 2, facts)
    trial = add_trial(study, next_point(search, study.trials()))
    finish_trial(study, trial, None, {"failure": "out of memory", "folder": "here"})
    return study, tmp_path


def test_results_are_the_paired_tests_of_the_predictions(finished):
    study, folder = finished
    results = search_results.collect_results(study, folder)
    states = [trial["state"] for trial in results["trials"]]
    assert states == ["complete", "complete", "complete", "failed"]
    assert results["best"] == 2
    files = [
        running.list_runs(study, folder, number)[0] / search_results.TUNED for number in range(3)
    ]
    rows = [read_predictions(file) for file in files]
    p_values = []
    for number in (1, 2):
        trial = results["trials"][number]
        expected = compare_predictions(rows[0], rows[number])
        for key in ("difference", "mcnemar_p", "only_a_right", "difference_ci95"):
            assert trial["comparison"][key] == expected[key]
        p_values.append(expected["mcnemar_p"])
        assert trial["accuracy"] == pytest.approx(np.mean(trial["accuracy_per_seed"]))
        low, high = trial["accuracy_ci95"]
        assert low < trial["accuracy"] < high
    # Holm: the smaller of two p-values is doubled, the larger one is not.
    corrected = [results["trials"][number]["comparison"]["holm_p"] for number in (1, 2)]
    assert min(corrected) == min(1, 2 * min(p_values))
    assert max(corrected) == max(p_values)
    json.dumps(results, allow_nan=False)


def test_the_results_are_said(finished, tmp_path):
    study, folder = finished
    results = search_results.collect_results(study, folder)
    table = search_terminal.tabulate(results)
    assert table.row_count == 4
    said = " ".join(line.plain for line in search_terminal.describe_results(results))
    assert "trial 3 failed: out of memory" in said
    assert "trial 2 is chosen by accuracy on the validation questions" in said
    assert "No trial has read the recipe's data.test" in said
    picture = tmp_path / "picture.svg"
    search_terminal.draw(results, picture)
    # matplotlib names the ticks of an axis one by one; there is one for each complete trial.
    assert picture.read_text().count('id="ytick_') == 3


def test_a_folder_that_was_removed_is_said(finished):
    study, folder = finished
    shutil.rmtree(running.trial_folder(folder, 1))
    results = search_results.collect_results(study, folder)
    assert results["trials"][1]["value"] is not None
    assert results["trials"][1]["comparison"] is None
    said = " ".join(line.plain for line in search_terminal.describe_results(results))
    assert "trial 1: its predictions are no longer in here" in said


def test_the_choice_is_a_recipe(finished):
    study, folder = finished
    search_results.write_best(
        study, search_results.collect_results(study, folder), folder / "best.yaml"
    )
    config = load_config(folder / "best.yaml")
    assert config == study.search.config(study.trials()[2].params)


# ---- the command ---------------------------------------------------------------------------------

SMALL = {
    "fixed": {
        "data.train": [VALIDATION | {"path": str(DEMO / "data" / "train.jsonl"), "limit": 100}],
        "data.eval": [VALIDATION | {"limit": 20}],
        "data.test": [],
        "training.max_steps": 6,
        "training.eval_steps": 3,
        "training.save_steps": 1,
    },
    "trials": 1,
}


def search_command(folder: Path, name: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, ROOT / "recipes" / "search.py", "search.yaml", "--output_dir", name],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


def list_results(folder: Path) -> tuple[dict, list[bytes]]:
    results = json.loads((folder / "search.json").read_text())
    for trial in results["trials"]:
        del trial["seconds"], trial["folder"]
    adapters = sorted(folder.glob("trials/*/seed-0/adapter/adapter_model.safetensors"))
    return results, [path.read_bytes() for path in adapters]


@pytest.mark.full
def test_a_killed_search_equals_the_uninterrupted_one(tmp_path):
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(SEARCH | SMALL))
    whole = search_command(tmp_path, "whole")
    assert "trial 0 complete:" in whole.communicate(timeout=600)[0]
    killed = search_command(tmp_path, "killed")
    run = tmp_path / "killed" / "trials" / "000" / "seed-0"
    wait_until(lambda: list(run.glob("checkpoints/step-*")), 300)
    killed.kill()
    killed.communicate()
    resumed = search_command(tmp_path, "killed")
    printed, _ = resumed.communicate(timeout=600)
    assert resumed.returncode == 0, printed
    assert "resuming after step" in run.with_suffix(".log").read_text()
    assert list_results(tmp_path / "killed") == list_results(tmp_path / "whole")
    # A finished trial is not repeated.
    printed, _ = search_command(tmp_path, "killed").communicate(timeout=600)
    assert "trial 0:" not in printed
    assert list_results(tmp_path / "killed") == list_results(tmp_path / "whole")
