"""A training on one file of open questions, which it divides, and everything that follows."""

import json

import pytest
from conftest import DEMO, ROOT, run_inside, run_script

RECIPE = ROOT / "recipes" / "sft_qlora.py"
STEPS = "40"
THINGS = ("fever", "gout", "asthma", "anaemia", "scurvy", "rickets", "measles", "mumps")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short training on the train part of a file, scored on its test part."""
    folder = tmp_path_factory.mktemp("open")
    rows = [
        {
            "question": f"How is {thing} number {i} treated?",
            "answer": f"With rest and {THINGS[i % 8]}.",
            "qtype": "treatment" if i % 2 else "symptoms",
        }
        for thing in THINGS
        for i in range(40)
    ]
    path = folder / "medquad.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = {"format": "medquad", "path": str(path), "split_by": "hash"}
    done = run_script(
        RECIPE,
        *("--output_dir", folder / "run", "--data.cache_dir", folder / "cache"),
        *("--data.train", json.dumps([entry])),
        *("--data.eval", json.dumps([entry])),
        *("--data.test", json.dumps([entry | {"subjects": ["Treatment"]}])),
        *("--data.completion", "text", "--data.max_new_tokens", "12"),
        *("--training.max_steps", STEPS, "--training.eval_steps", STEPS, "--training.lr", "1e-2"),
        *("--training.max_tokens_per_batch", "1024", "--training.global_batch_tokens", "1024"),
        *("--training.epochs", "20", "--training.gradient_checkpointing", "none"),
        *("--model.dtype", "float32", "--model.quantization", "none", "--data.max_length", "64"),
    )
    assert done.returncode == 0, done.stderr
    return path, folder / "run", done.stdout


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_base_and_tuned_are_scored_on_the_held_out_part(trained):
    _, run, shown = trained
    base, tuned = (read(run / "predictions" / f"{name}.jsonl") for name in ("base", "tuned"))
    assert [row["id"] for row in base] == [row["id"] for row in tuned]
    assert {row["kind"] for row in base + tuned} == {"open"}
    assert {row["subject"] for row in base + tuned} == {"treatment"}
    held = {row["question"] for row in tuned}
    assert len(held) == len(tuned) > 5
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["n"] == metrics["base"]["n"] == metrics["comparison"]["n"] == len(tuned)
    assert metrics["f1"] == pytest.approx(metrics["comparison"]["f1"]["b"])
    assert metrics["base"]["f1"] == pytest.approx(metrics["comparison"]["f1"]["a"])
    # The form of the answers is learned within these steps.
    assert metrics["f1"] > metrics["base"]["f1"]
    assert metrics["reached_limit"] == sum("reached_limit" in row for row in tuned)
    assert "data.test[0] medquad medquad.jsonl, split test by a hash of each question" in shown
    assert "rows of Treatment\n" in shown
    assert "scores on the open test questions" in shown
    assert "difference in F1 +" in shown


def test_commands_give_what_the_training_gave(trained, tmp_path, monkeypatch):
    path, run, _ = trained
    output = tmp_path / "tuned.jsonl"
    done = run_script(
        ROOT / "eval" / "predict.py",
        *("--model", DEMO / "base", "--adapter", run / "adapter", "--dtype", "float32"),
        *("--format", "medquad", "--path", path, "--split_by", "hash", "--split", "test"),
        *("--subjects", "treatment", "--max_new_tokens", "12", "--output", output),
    )
    assert done.returncode == 0, done.stderr
    own = {"key", "model"}
    rows, expected = (
        [{key: value for key, value in row.items() if key not in own} for row in read(file)]
        for file in (output, run / "predictions" / "tuned.jsonl")
    )
    assert rows == expected
    # These three need no torch, so they run in this process.
    base = run / "predictions" / "base.jsonl"
    for name, arguments in (
        ("score.py", [output, "--output", tmp_path / "metrics.json"]),
        ("compare.py", [base, output, "--output", tmp_path / "comparison.json"]),
        ("report.py", [run, "--output", tmp_path / "report.html"]),
    ):
        assert run_inside(ROOT / "eval" / name, arguments, monkeypatch) == (0, "")
    metrics = json.loads((run / "metrics.json").read_text())
    scores = json.loads((tmp_path / "metrics.json").read_text())
    assert {key: metrics[key] for key in scores} == scores
    assert json.loads((tmp_path / "comparison.json").read_text()) == metrics["comparison"]
    page = (tmp_path / "report.html").read_text()
    assert "Base against tuned on open questions" in page
    assert "Tuned has F1" in page
