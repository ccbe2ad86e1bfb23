"""Prediction files and kept scores that are damaged, or odd at one key: refused in one line.

The commands run in this process, because each of several hundred files would start an interpreter.
"""

import copy
import json
import runpy
import sys

import pytest
from conftest import ROOT

CHOICE = {
    "id": "q1",
    "kind": "choice",
    "dataset": "medmcqa",
    "subject": "Anatomy",
    "topic": "Hand",
    "choice_type": "single",
    "question": "Which?",
    "options": ["one", "two", "three"],
    "gold": "A",
    "prediction": "B",
    "option_logprobs": {"A": -1.5, "B": -0.5, "C": -3.0},
    "normalized_logprobs": {"A": -1.5, "B": -0.5, "C": -3.0},
    "letter_mass": 0.8,
    "text": None,
    "prompt_sha256": "a" * 64,
    "engine": "hf",
    "model": "m",
    "weights": "nf4",
    "key": "k1",
    "truncated": True,
    "permutations": {"ABC": [-1.5, -0.5, -3.0], "BCA": [-0.5, -3.0, None]},
    "predictions": {"raw": "B", "character": "B"},
    "votes": {"A": 1, "B": 3},
    "samples": ["B", "B", "A", "B"],
}
OPEN = {key: CHOICE[key] for key in ("id", "subject", "question", "model", "engine", "key")}
OPEN |= {"kind": "open", "gold": "the liver", "prediction": "liver", "text": "liver"}
TEXT = {"id": "t1", "kind": "text", "logprob": -9.5, "tokens": 4, "bytes": 20, "words": 3}
ODD = (
    True,
    "",
    "odd",
    7,
    -1,
    2**70,
    10**400,
    0.5,
    float("nan"),
    float("inf"),
    "\ud800",
    [],
    ["A", 1],
    {},
    {"A": "odd"},
    {"Z": -1.0},
    {"A": float("nan")},
    {"A": 2**70},
    None,
)
# What a key may well be; null stands for a missing value where a key may be missing.
FINE = {
    "id": ("odd",),
    "kind": (),
    "gold": ("odd",),  # of an open question only
    "prediction": ("odd", "", None),
    "options": (None,),
    "option_logprobs": ({}, None),
    "normalized_logprobs": ({}, None),
    "letter_mass": (0.5, None),
    "truncated": (True, None),
    "permutations": ({}, None),
    "predictions": ({}, None),
    "votes": ({}, None),
    "samples": ([], None),
    "logprob": (-1,),
    "tokens": (7,),
    "bytes": (7, None),
    "words": (7, None),
}


def is_fine(kind, key, value):
    """Whether a row may have this value there; 1 is not true here, unlike in Python."""
    texts = ("", "odd", None)
    allowed = FINE.get(key, texts)
    if kind == "choice" and key in ("gold", "prediction"):
        return False  # A row with votes has a prediction.
    return any(type(value) is type(other) and value == other for other in allowed)


def run(script, *arguments):
    """Run a command as a program and return its exit code; an exception is a traceback."""
    before = sys.argv
    sys.argv = [str(script), *map(str, arguments)]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as exit:
        return exit.code
    finally:
        sys.argv = before
    raise AssertionError("a command ends with sys.exit")


def check_refused(capsys, script, *arguments, line=None):
    """The command ends with exit code 2 and a single line, which names the line of the file."""
    capsys.readouterr()
    code = run(script, *arguments)
    shown = capsys.readouterr()
    assert code == 2, shown.out
    assert len(shown.err.splitlines()) == 1, shown.err
    assert line is None or f" line {line}: " in shown.err, shown.err
    shown.err.encode()


def check_every_command(capsys, tmp_path, path, kind, line):
    """Scoring, comparison and report of the same file."""
    check_refused(capsys, "eval/score.py", path, line=line)
    good = tmp_path / "good.jsonl"
    good.write_text(json.dumps({"choice": CHOICE, "open": OPEN, "text": TEXT}[kind]) + "\n")
    folder = tmp_path / "run"
    (folder / "predictions").mkdir(parents=True, exist_ok=True)
    path.replace(folder / "predictions" / "tuned.jsonl")
    check_refused(capsys, "eval/report.py", folder, "--output", tmp_path / "r.html", line=line)
    if kind == "choice":
        damaged = folder / "predictions" / "tuned.jsonl"
        check_refused(capsys, "eval/compare.py", damaged, damaged, line=line)
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize("kind", ["choice", "open", "text"])
def test_odd_values_of_every_key(tmp_path, capsys, kind):
    """Each key in turn holds each odd value: refused with its line, or scored where it is fine."""
    good = {"choice": CHOICE, "open": OPEN, "text": TEXT}[kind]
    path = tmp_path / "p.jsonl"
    refused = 0
    for key in good:
        for value in ODD:
            second = good | {"id": "q2", key: value}
            path.write_text(json.dumps(good) + "\n" + json.dumps(second) + "\n")
            if is_fine(kind, key, value) and key != "model":
                assert run("eval/score.py", path) == 0, (key, value, capsys.readouterr().err)
                continue
            try:
                check_refused(capsys, "eval/score.py", path, line=2)
            except AssertionError as error:
                raise AssertionError(f"{key} is {value!r}: {error}") from None
            refused += 1
    assert refused > 10 * len(good)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", None),
        (b"\n", 1),
        (b"{", 1),
        (json.dumps(CHOICE).encode()[:-40], 1),
        (b"\x00\xff\xfe\x80" * 50, 1),
        (json.dumps(CHOICE).encode("utf-16"), 1),
        (b"\xef\xbb\xbf" + json.dumps(CHOICE).encode(), 1),
        (b"[" * 100_000, 1),
        (b'{"id": ' * 100_000, 1),
        (b'{"id": "a", "id": "b", "gold": "A", "prediction": "A"}', 1),
        (b'{"id": "a", "gold": "A", "prediction": "A", "letter_mass": ' + b"9" * 5000 + b"}", 1),
        (b'{"id": "a\xed\xa0\x80", "gold": "A", "prediction": "A"}', 1),
        (b"{}", 1),
        (b"null", 1),
        (b"NaN", 1),
        (json.dumps(CHOICE).encode() + b"\n" + json.dumps(CHOICE).encode(), 2),
        (json.dumps(CHOICE).encode() + b"\n" + json.dumps(OPEN).encode(), 2),
        (
            json.dumps(CHOICE).encode()
            + b"\n"
            + json.dumps(CHOICE | {"id": "2", "model": "n"}).encode(),
            2,
        ),
    ],
)
def test_damaged_files(tmp_path, capsys, content, line):
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    check_every_command(capsys, tmp_path, path, "choice", line)


@pytest.mark.parametrize("key", ["id", "gold", "prediction", "logprob", "tokens"])
def test_missing_keys(tmp_path, capsys, key):
    for good in (CHOICE, OPEN, TEXT):
        if key not in good:
            continue
        path = tmp_path / "p.jsonl"
        path.write_text(json.dumps({k: v for k, v in good.items() if k != key}) + "\n")
        check_refused(capsys, "eval/score.py", path, line=1)


def test_every_place_where_a_file_may_be_cut(tmp_path, capsys):
    whole = (json.dumps(CHOICE) + "\n").encode()
    path = tmp_path / "p.jsonl"
    for end in range(0, len(whole) - 1, 7):
        path.write_bytes(whole[:end] if end else b"")
        check_refused(capsys, "eval/score.py", path)


def test_folders_and_missing_files(tmp_path, capsys):
    for path in (tmp_path, tmp_path / "no.jsonl", tmp_path / ("n" * 300), "~nobody/p.jsonl"):
        check_refused(capsys, "eval/score.py", path)
        check_refused(capsys, "eval/compare.py", path, path)
    for path in (tmp_path / "no", tmp_path / ("n" * 300), tmp_path):
        check_refused(capsys, "eval/report.py", path, "--output", tmp_path / "r.html")


@pytest.mark.parametrize("flag", ["--max_disagreement", "--max_mean_difference"])
@pytest.mark.parametrize("bound", ["nan", "inf", "-1", "odd", ""])
def test_bounds_are_numbers(tmp_path, capsys, flag, bound):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(CHOICE) + "\n")
    check_refused(capsys, "eval/compare.py", path, path, flag, bound)


# ---- what metrics.json and environment.json keep -------------------------------------------------

GROUP = {"n": 20, "accuracy": 0.5, "accuracy_ci95": [0.3, 0.7]}
SCORES = GROUP | {
    "unparsed": 0,
    "truncated": 0,
    "letter_mass": 0.9,
    "ece": 0.1,
    "brier": 0.5,
    "near_ties": 0,
    "reliability": [{"from": 0.2, "to": 0.3, "n": 20, "confidence": 0.25, "accuracy": 0.5}],
    "selective": {
        "n": 20,
        "area_under_risk_coverage": 0.4,
        "accuracy_at_coverage": {"10%": 0.5, "100%": 0.5},
    },
    "position_bias": {
        "letters": {"A": {"gold": 0.5, "predicted": 0.5, "mean_probability": 0.5}},
        "flip_rate": 0.1,
        "per_position": {"A": GROUP},
    },
    "per_subject": {"Anatomy": GROUP},
}
METRICS = SCORES | {
    "steps": 3,
    "best_step": 2,
    "memory_bytes": {"peak": 2**30},
    "base": SCORES,
    "comparison": {
        "n": 20,
        "accuracy_a": 0.25,
        "accuracy_b": 0.5,
        "difference": 0.25,
        "difference_ci95": [0.05, 0.45],
        "mcnemar_p": 0.03,
    },
}
ENVIRONMENT = {
    "seed": 7,
    "git_commit": "0123abc",
    "hardware": {"cpu": "x86", "cores": 2, "gpus": [{"name": "one"}]},
    "base": {"base": "b", "dtype": "float32"},
}


def list_places(tree, place=()):
    """Yield the place of every value in objects and lists."""
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield (*place, key)
        yield from list_places(tree[key], (*place, key))


MISSING = object()


def put(tree, place, value):
    """Return a copy of a tree with another value at a place, or none."""
    changed = copy.deepcopy(tree)
    here = changed
    for key in place[:-1]:
        here = here[key]
    if value is MISSING:
        del here[place[-1]]
    else:
        here[place[-1]] = value
    return changed


@pytest.mark.parametrize(
    ("name", "tree"), [("metrics.json", METRICS), ("environment.json", ENVIRONMENT)]
)
def test_odd_values_of_kept_files(tmp_path, capsys, name, tree):
    """Whatever stands where: a page, or one line that names the file; never a traceback."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "train_log.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    output = tmp_path / "r.html"
    refused = []
    for place in list_places(tree):
        for value in (*ODD, MISSING):
            (folder / name).write_text(json.dumps(put(tree, place, value)))
            capsys.readouterr()
            code = run("eval/report.py", folder, "--output", output)
            error = capsys.readouterr().err
            if code == 2:
                assert len(error.splitlines()) == 1, (place, value, error)
                assert str(folder / name) in error
                refused.append(place)
            else:
                assert code == 0, (place, value)
                # Numbers that are none never reach the page.
                assert "Infinity" not in output.read_text()
                output.unlink()
    places = set(list_places(tree))
    if name == "metrics.json":
        numbers = [place for place in places if place[-1] not in ("steps",)]
        assert set(numbers) <= set(refused)
        assert len(refused) > 10 * len(numbers)


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a": ' * 200 + b"1" + b"}" * 200,
        b'{"n": 1, "n": 2}',
        b'{"n": ' + b"9" * 5000 + b"}",
        b"7",
        b"NaN",
    ],
)
@pytest.mark.parametrize("name", ["metrics.json", "environment.json"])
def test_damaged_kept_files(tmp_path, capsys, name, content):
    (tmp_path / "train_log.jsonl").write_bytes(b'{"step": 1' + b"9" * 5000 + b"}\n" + b"[" * 9999)
    (tmp_path / name).write_bytes(content)
    check_refused(capsys, "eval/report.py", tmp_path, "--output", tmp_path / "r.html")


def test_folders_in_place_of_kept_files(tmp_path, capsys):
    for name in ("metrics.json", "environment.json", "config.yaml"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / "train_log.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
        (folder / name).mkdir()
        check_refused(capsys, "eval/report.py", folder, "--output", tmp_path / "r.html")
