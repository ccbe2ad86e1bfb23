"""eval/predict.py, score.py and compare.py as commands: kills, shards, wrong input."""

import argparse
import json
import os
import random
import runpy
import shutil
import signal
import time

import pytest
import warm_processes
from conftest import DEMO, ROOT, run_inside, run_script

TEST = DEMO / "data" / "test.jsonl"
TRAIN = DEMO / "data" / "train.jsonl"


def predict(output, *more, model=DEMO / "base", path=TEST, format="medmcqa"):
    return run_script(
        "eval/predict.py",
        "--model",
        model,
        "--format",
        format,
        "--path",
        path,
        "--output",
        output,
        *more,
    )


def predict_inside(output, monkeypatch, *more, path=TEST):
    arguments = [
        "--model",
        DEMO / "base",
        "--format",
        "medmcqa",
        "--path",
        path,
        "--output",
        output,
        *more,
    ]
    return run_inside(ROOT / "eval" / "predict.py", arguments, monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    output = tmp_path_factory.mktemp("whole") / "p.jsonl"
    done = predict(output)
    assert done.returncode == 0, done.stderr
    return output


def test_killed_with_changing_shards_equals_uninterrupted(whole, tmp_path):
    """kill -9 at random moments, another number of shards each time: the finished file is the same
    bytes, and no batch was computed twice."""
    chance = random.Random(int(os.environ.get("MEDQLORA_KILL_SEED", "0")))
    kills = 0
    wanted = int(os.environ.get("MEDQLORA_KILLS", "1"))
    output = tmp_path / "p.jsonl"
    parts = tmp_path / "p.jsonl.parts"
    for _ in range(60):
        shards = chance.randint(1, 5)
        command = [
            "eval/predict.py",
            "--model",
            DEMO / "base",
            "--format",
            "medmcqa",
            "--path",
            TEST,
            "--output",
            output,
            "--shard",
            f"{chance.randrange(shards)}/{shards}",
        ]
        process = warm_processes.start(command, ROOT)
        before = len(list(parts.glob("*.jsonl"))) if parts.exists() else 0
        if kills < wanted:
            deadline = time.monotonic() + 60
            while (
                process.poll() is None
                and time.monotonic() < deadline
                and not (parts.exists() and len(list(parts.glob("*.jsonl"))) > before)
            ):
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 2.5))
            kills += process.poll() is None
            process.send_signal(signal.SIGKILL)
        process.wait(120)
        if parts.exists():
            keys = [
                row["key"]
                for part in parts.glob("*.jsonl")
                for line in part.read_text().splitlines()
                if line.endswith("}")
                for row in json.loads(line)["rows"]
            ]
            assert len(keys) == len(set(keys)), "a batch was computed twice"
        if output.exists():
            break
    assert output.read_bytes() == whole.read_bytes()
    assert not parts.exists()


INTERRUPTED = """
import os, runpy, signal, sys
from medqlora.evaluation.journal import Journal
# A shell may have started the tests with the signal ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
append = Journal.append
def append_and_interrupt(self, batch):
    append(self, batch)
    os.kill(os.getpid(), signal.SIGINT)
Journal.append = append_and_interrupt
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_interrupted_run_keeps_its_batches(whole, tmp_path):
    """Ctrl-C, here after the first batch: one line, exit code 130, and the same command completes
    the file.
    """
    output = tmp_path / "p.jsonl"
    process = run_script(
        "-c",
        INTERRUPTED,
        "eval/predict.py",
        "--model",
        DEMO / "base",
        "--format",
        "medmcqa",
        "--path",
        TEST,
        "--output",
        output,
    )
    complaint = process.stderr
    assert process.returncode == 130
    assert "the same command goes on from there" in complaint.splitlines()[-1]
    assert "Traceback" not in complaint
    assert predict(output).returncode == 0
    assert output.read_bytes() == whole.read_bytes()


def test_finished_file_is_left_alone(whole, tmp_path):
    before = whole.stat().st_mtime_ns
    done = predict(whole)
    assert done.returncode == 0
    assert "complete already: 600 predictions" in done.stderr
    assert whole.stat().st_mtime_ns == before
    other = predict(whole, "--prompt_style", "lm_eval")
    assert other.returncode == 2
    assert "holds other predictions" in other.stderr
    assert whole.stat().st_mtime_ns == before


def test_rows_have_the_keys_of_the_contract(whole):
    for line in whole.read_text().splitlines():
        row = json.loads(line)
        assert {
            "id",
            "dataset",
            "subject",
            "gold",
            "prediction",
            "option_logprobs",
            "letter_mass",
            "text",
            "prompt_sha256",
            "engine",
            "model",
        } <= set(row)
        assert row["engine"] == "hf"


def test_more_questions_reuse_what_is_there(whole, tmp_path):
    """A larger --limit answers the further questions only: rows are keyed by question, prompt,
    model and settings.
    """
    output = tmp_path / "p.jsonl"
    assert predict(output, "--limit", "40", "--shard", "1/2").returncode == 0
    done = predict(output, "--limit", "60", "--shard", "0/1")
    assert done.returncode == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["id"] for row in rows] == [
        json.loads(line)["id"] for line in TEST.read_text().splitlines()[:60]
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shard", "3/2"], "shard got '3/2'; expected I/N"),
        (["--shard", "a"], "shard got 'a'; expected I/N"),
        (["--limit", "0"], "--limit: limit got '0'; input should be greater than or equal to 1"),
        (["--engine", "openai"], "give the server's address"),
        (
            [
                "--engine",
                "openai",
                "--server",
                "http://127.0.0.1:9/v1",
                "--tokenizer",
                str(DEMO / "base"),
                "--retries",
                "0",
            ],
            "cannot be reached",
        ),
        (
            ["--num_fewshot", "3", "--fewshot_path", "nowhere.jsonl"],
            "no file or folder nowhere.jsonl",
        ),
        (["--num_fewshot", "700", "--fewshot_path", str(TEST)], "0 labelled examples are left"),
        (
            ["--scoring", "perplexity"],
            (
                "--scoring perplexity is for texts; this data holds multiple-choice questions: use"
                " letters or cloze or generate"
            ),
        ),
        (["--samples", "5", "--scoring", "generate"], "set --temperature"),
        (["--max_length", "9999"], "the model has 512 positions"),
        (["--prompt_style", "chat"], "no chat template"),
        (["--max_length", "16"], "the model has room for"),
    ],
)
def test_wrong_flags(tmp_path, monkeypatch, arguments, message):
    code, shown = predict_inside(tmp_path / "p.jsonl", monkeypatch, *arguments)
    assert code == 2, shown
    assert message in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "p.jsonl").exists()


def test_wrong_data(tmp_path, monkeypatch):
    lines = TEST.read_text().splitlines()
    first = json.loads(lines[0])
    cases = {
        "empty": ("", "holds no rows"),
        "twice": ("\n".join([*lines, lines[0]]), "ids must be unique"),
        "gold": (json.dumps(first | {"cop": 9}) + "\n", "cop is 9"),
        "cut": (lines[0] + "\n" + lines[1][:30] + "\n", "line 2: not valid JSON"),
    }
    for name, (content, message) in cases.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text(content)
        code, shown = predict_inside(tmp_path / "out.jsonl", monkeypatch, path=path)
        assert code == 2, name
        assert message in shown, name
        assert not (tmp_path / "out.jsonl").exists()
    # Nothing is left where every row is dropped.
    code, shown = predict_inside(
        tmp_path / "out.jsonl", monkeypatch, "--drop_invalid", path=tmp_path / "gold.jsonl"
    )
    assert code == 2
    assert "no valid row is left of 1; the first one that was left out: gold.jsonl line 1" in shown
    code, shown = predict_inside(tmp_path / "no" / "out.jsonl", monkeypatch)
    assert code == 2
    assert "make it first" in shown


def test_hidden_answers_and_submission(tmp_path):
    """A test split without labels is answered, cannot be scored, and gives MedMCQA's submission
    file.
    """
    rows = [json.loads(line) | {"cop": None} for line in TEST.read_text().splitlines()[:20]]
    (tmp_path / "hidden.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = predict(tmp_path / "p.jsonl", path=tmp_path / "hidden.jsonl")
    assert done.returncode == 0
    assert "no labels" in done.stderr
    scored = run_script("eval/score.py", tmp_path / "p.jsonl")
    assert scored.returncode == 2
    assert "hidden answers cannot be scored" in scored.stderr
    written = run_script("eval/score.py", tmp_path / "p.jsonl", "--submission", tmp_path / "s.csv")
    assert written.returncode == 0
    header, *lines = (tmp_path / "s.csv").read_text().splitlines()
    assert header == "id,Prediction (correct option)"
    letters = {
        row["id"]: row["prediction"]
        for row in map(json.loads, (tmp_path / "p.jsonl").read_text().splitlines())
    }
    assert lines == [f"{id},{'ABCD'.index(letter) + 1}" for id, letter in letters.items()]


def test_too_long_questions_are_left_out_and_counted(tmp_path, monkeypatch):
    rows = [json.loads(line) for line in TEST.read_text().splitlines()[:6]]
    rows[2]["question"] = "word " * 2000
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "p.jsonl"
    code, shown = predict_inside(output, monkeypatch, "--drop_invalid", path=path)
    assert code == 2
    assert "leave such questions out with --drop_too_long" in shown
    for text in ("5 predictions in", "p.jsonl is complete already: 5 predictions"):
        code, shown = predict_inside(output, monkeypatch, "--drop_too_long", path=path)
        assert code == 0, shown
        assert f"longer than the model's 512 tokens and are left out: {rows[2]['id']}" in shown
        assert text in shown
    scored = run_script("eval/score.py", output, "--output", tmp_path / "m.json")
    assert "questions left out as too long 1" in scored.stdout
    metrics = json.loads((tmp_path / "m.json").read_text())
    assert (metrics["n"], metrics["too_long_ids"]) == (5, [rows[2]["id"]])
    refused = run_script("eval/score.py", output, "--submission", tmp_path / "s.csv")
    assert refused.returncode == 2
    assert "1 have none" in refused.stderr
    compared = run_script("eval/compare.py", output, output)
    assert "left out as too long: A 1, B 1" in compared.stdout


def test_brackets_in_data_are_text(tmp_path):
    """Subjects, ids and paths that look like the markup of the console."""
    rows = [
        json.loads(line) | {"subject_name": "[/x] [red]odd"}
        for line in TEST.read_text().splitlines()[:5]
    ]
    (tmp_path / "odd.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, rows[0] | {"id": "[/y]", "opa": ""}])
    )
    done = predict(tmp_path / "p.jsonl", "--drop_invalid", path=tmp_path / "odd.jsonl")
    assert done.returncode == 0, done.stderr
    assert 'option "opa" is empty' in done.stderr
    scored = run_script("eval/score.py", tmp_path / "p.jsonl")
    assert scored.returncode == 0, scored.stderr
    assert "[red]odd" in scored.stdout


def test_repeated_ids_and_changed_labels(tmp_path):
    lines = TEST.read_text().splitlines()[:4]
    (tmp_path / "twice.jsonl").write_text("\n".join([*lines, lines[0]]) + "\n")
    refused = predict(tmp_path / "p.jsonl", path=tmp_path / "twice.jsonl")
    assert refused.returncode == 2
    assert "--drop_invalid keeps the first" in refused.stderr
    assert (
        predict(tmp_path / "p.jsonl", "--drop_invalid", path=tmp_path / "twice.jsonl").returncode
        == 0
    )
    assert len((tmp_path / "p.jsonl").read_text().splitlines()) == 4
    first = json.loads(lines[0])
    (tmp_path / "twice.jsonl").write_text(
        "\n".join([json.dumps(first | {"cop": first["cop"] % 4 + 1}), *lines[1:]]) + "\n"
    )
    changed = predict(tmp_path / "p.jsonl", path=tmp_path / "twice.jsonl")
    assert changed.returncode == 2
    assert "holds other predictions" in changed.stderr


def test_open_answers_and_text(tmp_path):
    questions = [
        {"id": f"o{i}", "question": "What is fever?", "answer": "A high temperature."}
        for i in range(3)
    ]
    (tmp_path / "open.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    done = predict(
        tmp_path / "o.jsonl", "--max_new_tokens", "8", path=tmp_path / "open.jsonl", format="qa"
    )
    assert done.returncode == 0, done.stderr
    assert (
        run_script(
            "eval/score.py", tmp_path / "o.jsonl", "--output", tmp_path / "o.json"
        ).returncode
        == 0
    )
    assert {"n", "exact_match", "f1", "rouge_l", "unparsed", "per_subject"} <= set(
        json.loads((tmp_path / "o.json").read_text())
    )
    (tmp_path / "text.txt").write_text("Fever is a high temperature.\n\n" * 10)
    done = predict(tmp_path / "t.jsonl", path=tmp_path / "text.txt", format="text")
    assert done.returncode == 0, done.stderr
    scored = run_script("eval/score.py", tmp_path / "t.jsonl", "--output", tmp_path / "t.json")
    assert "perplexity" in scored.stdout
    assert json.loads((tmp_path / "t.json").read_text())["perplexity"] > 1


def test_compare_and_gate(whole, tmp_path):
    other = tmp_path / "plain32.jsonl"
    assert predict(other, "--dtype", "float32").returncode == 0
    done = run_script("eval/compare.py", whole, other, "--output", tmp_path / "c.json")
    assert done.returncode == 0, done.stderr
    comparison = json.loads((tmp_path / "c.json").read_text())
    keys = {
        "n",
        "accuracy_a",
        "accuracy_b",
        "difference",
        "difference_ci95",
        "mcnemar_p",
        "only_a_right",
        "only_b_right",
    }
    assert keys <= set(comparison)
    assert comparison["n"] == 600
    gate = run_script(
        "eval/compare.py",
        other,
        other,
        whole,
        "--max_disagreement",
        "0.2",
        "--max_mean_difference",
        "0.5",
    )
    assert gate.returncode == 0, gate.stdout
    assert gate.stdout.count("ok:") == 2
    rows = [json.loads(line) for line in other.read_text().splitlines()]
    for row in rows[:100]:
        row["prediction"] = "A" if row["prediction"] != "A" else "B"
    (tmp_path / "changed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    gate = run_script(
        "eval/compare.py", other, tmp_path / "changed.jsonl", "--max_disagreement", "0.01"
    )
    assert gate.returncode == 1
    assert "FAILED" in gate.stdout
    assert "16.67%" in gate.stdout
    read_bound = runpy.run_path(str(ROOT / "eval" / "compare.py"))["read_bound"]
    for bound in ("nan", "inf", "-0.1", "1.01", "1e999"):
        with pytest.raises(argparse.ArgumentTypeError, match="from 0 to 1"):
            read_bound(bound, 1)
    assert [read_bound(bound, 1) for bound in ("0", "0.02", "1e-3", ".5")] == [0, 0.02, 0.001, 0.5]
    taken = run_script("eval/compare.py", whole, other, "--output", other)
    assert taken.returncode == 2
    assert "exists; give a new file name" in taken.stderr
    for files, message in (
        ([other], "got 1 prediction files"),
        ([other, other, whole], "got 3 prediction files"),
        ([other, TEST], "expected a row"),
    ):
        refused = run_script("eval/compare.py", *files)
        assert refused.returncode == 2
        assert message in refused.stderr or 'no "gold"' in refused.stderr


@pytest.mark.full
def test_two_hundred_thousand_predictions(tmp_path):
    """Scoring, comparing and reporting need no torch and less than a gigabyte."""
    chance = random.Random(0)
    run = tmp_path / "run" / "predictions"
    run.mkdir(parents=True)
    for name, share in (("base", 0.4), ("tuned", 0.5)):
        with (run / f"{name}.jsonl").open("w") as file:
            for i in range(200_000):
                logprobs = {letter: -3 * chance.random() - 0.1 for letter in "ABCD"}
                best = max(logprobs, key=logprobs.get)
                row = {
                    "id": f"q{i}",
                    "kind": "choice",
                    "dataset": "medmcqa",
                    "subject": f"subject {i % 21}",
                    "topic": f"topic {i % 500}",
                    "choice_type": "single",
                    "question": (
                        f"Which of these is not seen in patient number {i} with fever for {i % 9}"
                        " days?"
                    ),
                    "options": ["one", "two", "three", "four"],
                    "gold": best if chance.random() < share else "A",
                    "prediction": best,
                    "option_logprobs": logprobs,
                    "letter_mass": 0.9,
                    "text": None,
                    "prompt_sha256": "p",
                    "engine": "hf",
                    "model": name,
                    "key": f"{i:032x}",
                }
                row["gold"] = "ABCD"[i % 4]
                file.write(json.dumps(row) + "\n")
    peaks = []
    for command in (
        ["eval/score.py", run / "tuned.jsonl"],
        ["eval/compare.py", run / "base.jsonl", run / "tuned.jsonl"],
        ["eval/report.py", run.parent, "--output", tmp_path / "r.html"],
    ):
        watch = (
            "import runpy, sys\n"
            "from medqlora.core.environment import read_peak_resident\n"
            "sys.argv = sys.argv[1:]\n"
            "sys.path.insert(0, 'eval')\n"
            "try:\n"
            "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "except SystemExit as stop:\n"
            "    assert not stop.code, stop.code\n"
            "assert 'torch' not in sys.modules\n"
            "print('peak', read_peak_resident())"
        )
        done = run_script("-c", watch, *command, cold=True)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]))
    assert max(peaks) < 1 << 30


def test_what_decides_the_prompts_travels_with_the_model(tmp_path, monkeypatch):
    """A merged model is asked as it was trained: same case, same template, same arguments."""
    shutil.copytree(DEMO / "base", tmp_path / "merged")
    settings = tmp_path / "merged" / "tokenizer_config.json"
    template = (
        "{% for m in messages %}{{ 'Briefly. ' if brief else '' }}{{ m.content }}"
        "{{ eos_token if m.role == 'assistant' else ' Reply:' }}{% endfor %}"
    )
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": template}))

    def ask(name, *flags):
        output = tmp_path / f"{name}.jsonl"
        more = ["--model", tmp_path / "merged", "--limit", 3, *flags]
        code, shown = predict_inside(output, monkeypatch, *more)
        assert code == 0, shown
        return [json.loads(line) for line in output.read_text().splitlines()]

    plain = ask("plain")
    metadata = {"prompt_style": "chat", "completion": "letter", "template_arguments": {"brief": 1}}
    card = tmp_path / "merged" / "medqlora.json"
    card.write_text(json.dumps(metadata | {"lowercase": True}))
    trained = ask("trained")
    assert [row["question"] for row in trained] == [row["question"].lower() for row in plain]
    assert trained[0]["prompt_sha256"] != plain[0]["prompt_sha256"]
    # The flag says the same, or something else.
    named = ask("named", "--template_arguments", '{"brief": 1}')
    assert named[0]["prompt_sha256"] == trained[0]["prompt_sha256"]
    other = ask("other", "--template_arguments", "{}")
    assert other[0]["prompt_sha256"] == plain[0]["prompt_sha256"]
    for flags, message in (
        (["--template_arguments", '{"bref": 1}'], "has no such argument"),
        (["--template_arguments", "brief"], "expected a JSON object"),
        (["--template_arguments", '{"brief": 1}', "--prompt_style", "plain"], "no chat template"),
    ):
        more = ["--model", tmp_path / "merged", *flags]
        code, shown = predict_inside(tmp_path / "no.jsonl", monkeypatch, *more)
        assert (code, message in shown) == (2, True), shown
