"""The report page: what it says, what it must never do, and how a real browser shows it."""

import base64
import contextlib
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import threading
from html.parser import HTMLParser

import pytest
from conftest import run_script

from medqlora.core.command import make_console
from medqlora.reporting.charts import make_ticks
from medqlora.reporting.run_page import render_report
from medqlora.reporting.runs import Run
from medqlora.reporting.scores import judge, name_bin, place_coverage
from medqlora.reporting.terminal import compare_scores
from medqlora.reporting.training import POINTS, curve

# ---- run folders made in code --------------------------------------------------------------------

EVIL = "<script>alert(1)</script>\"'&"


def make_rows(
    model, right, subjects=("Anatomy", "Dermatology & <b>Skin</b>"), prompt="a" * 64, **more
):
    """One row per entry of `right`; the same questions for every model."""
    rows = []
    for i, hit in enumerate(right):
        rng = random.Random(f"{model} {i}")
        gold = "ABCD"[i % 4]
        chosen = gold if hit else "ABCD"[(i + 1) % 4]
        weights = {
            letter: rng.uniform(0.05, 0.2) + (letter == chosen) * rng.uniform(0.2, 3)
            for letter in "ABCD"
        }
        scores = {
            letter: math.log(weight / sum(weights.values())) for letter, weight in weights.items()
        }
        question = (
            f"Question {i} of {EVIL}: which is not seen at {i} years?"
            if i % 2
            else f"Question of kind {EVIL}, which is seen?"
        )
        rows.append(
            {
                "id": f"q{i}",
                "kind": "choice",
                "dataset": "d",
                "subject": subjects[i % len(subjects)],
                "question": question,
                "options": [f"{EVIL} {letter}" for letter in "ABCD"],
                "gold": gold,
                "prediction": chosen,
                "option_logprobs": scores,
                "letter_mass": 0.9,
                "prompt_sha256": prompt,
                "engine": "hf",
                "model": model,
                "choice_type": None,
                "topic": None,
                "text": None,
                **more,
            }
        )
    return rows


def hits(*counts):
    """(both right, fixed, broken, both wrong) -> what base and tuned get right."""
    pairs = [
        pair
        for pair, n in zip([(1, 1), (0, 1), (1, 0), (0, 0)], counts, strict=True)
        for _ in range(n)
    ]
    return [a for a, _ in pairs], [b for _, b in pairs]


def make_log(steps, eval_every=50):
    rng = random.Random(0)
    log = []
    for step in range(1, steps + 1):
        log.append(
            {
                "step": step,
                "loss": 2 / step**0.3 + rng.uniform(0, 0.3),
                "lr": 1e-4 * (1 - step / steps),
                "grad_norm": rng.uniform(0.5, 2),
                "tokens_per_second": rng.uniform(3000, 4000),
                "peak_memory_bytes": 2**30 + step * 2**12,
            }
        )
        if step % eval_every == 0:
            log.append({"step": step, "eval_loss": 2 / step**0.3})
    return log


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(folder, base=None, tuned=None, log=None, **files):
    folder.mkdir(parents=True)
    for name, rows in (("base", base), ("tuned", tuned)):
        if rows is not None:
            write_lines(folder / "predictions" / f"{name}.jsonl", rows)
    if log:
        write_lines(folder / "train_log.jsonl", log)
    for name, tree in files.items():
        (folder / f"{name}.json").write_text(json.dumps(tree))
    return folder


ENVIRONMENT = {
    "versions": {"python": "3.11", "torch": "2.13"},
    "git_commit": "0123abc",
    "seed": 7,
    "hardware": {"cpu": "x86", "cores": 2, "gpus": []},
    "base": {
        "base": f"models/{EVIL}",
        "prompt_style": "chat",
        "completion": "letter",
        "quantization": "nf4",
        "dtype": "bfloat16",
    },
}
MEMORY = {
    "steps": 300,
    "best_step": 250,
    "memory_bytes": {"before": 2**28, "loaded": 2**29, "peak": 2**30, "after": 2**29},
}


@pytest.fixture(scope="module")
def full_run(tmp_path_factory):
    before, after = hits(60, 90, 25, 45)
    subjects = [
        f"A rather long name of a clinical subject, number {i}" if i % 3 else f"Subject{i}"
        for i in range(21)
    ]
    folder = tmp_path_factory.mktemp("report") / f"run {EVIL.replace('/', '')}"
    make_run(
        folder,
        make_rows("base", before, subjects),
        make_rows("tuned", after, subjects),
        make_log(300),
        environment=ENVIRONMENT,
        metrics=MEMORY,
    )
    (folder / "config.yaml").write_text("model:\n  base: x" + "x" * 200 + "\n")
    permuted = {"permutations": {"ABCD": [-1, -2, -3, -4], "BCDA": [-1, -2, -3, -4]}}
    write_lines(
        folder / "predictions" / "permuted.jsonl", make_rows("p", after, subjects, **permuted)
    )
    write_lines(
        folder / "predictions" / "open.jsonl",
        [
            {
                "id": f"o{i}",
                "kind": "open",
                "gold": "vitamin C",
                "prediction": text,
                "subject": None,
            }
            for i, text in enumerate(["vitamin C", "zinc"])
        ],
    )
    write_lines(
        folder / "predictions" / "texts.jsonl",
        [{"id": "t", "kind": "text", "logprob": -20.0, "tokens": 10, "bytes": 40, "words": 8}],
    )
    return folder


def report(tmp_path, *folders):
    tmp_path.mkdir(exist_ok=True)
    output = tmp_path / "report.html"
    done = run_script("eval/report.py", *folders, "--output", output)
    assert done.returncode == 0, done.stderr
    return output.read_text(encoding="utf-8")


def refuse(tmp_path, *folders, output="report.html"):
    done = run_script("eval/report.py", *folders, "--output", tmp_path / output)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


# ---- the page as text ----------------------------------------------------------------------------

VOID = {"meta", "link", "br", "input", "img", "hr"}


class Page(HTMLParser):
    """Tags must nest; keeps elements, visible text and headings."""

    def __init__(self, text):
        super().__init__()
        self.open = []
        self.elements = []
        self.words = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "title"} & set(self.open):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def find(self, name):
        return [attributes for tag, attributes in self.elements if tag == name]


def check_page(text):
    """What holds for every page, whatever it shows."""
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert not page.find("script")
    assert not [
        key for _, attributes in page.elements for key in attributes if key.startswith("on")
    ]
    for tag, attributes in page.elements:
        for key in ("src", "href", "srcset", "poster", "action", "data", "xlink:href"):
            value = attributes.get(key)
            assert value is None or value.startswith("#") or value == "data:,", (
                f"<{tag} {key}={value}>"
            )
    assert not re.search(
        r"url\(|@import|https?://", re.search(r"<style>(.*?)</style>", text, re.S)[1]
    )
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in page.find("a")} <= set(ids)
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels)), "a heading level is skipped"
    for picture in page.find("svg"):
        assert picture.get("aria-hidden") == "true" or (
            picture["role"] == "img" and picture["aria-label"]
        )
    for region in page.find("div"):
        assert "scroll" not in region.get("class", "") or (
            region["tabindex"] == "0" and region["aria-label"]
        )
    assert {"main", "footer"} <= {tag for tag, _ in page.elements}
    assert "Not medical advice" in page.text
    assert "NaN" not in text
    assert "None" not in page.text
    return page


def test_full_page(full_run, tmp_path):
    text = report(tmp_path, full_run)
    page = check_page(text)
    for title in (
        "Base against tuned",
        "Accuracy by subject",
        "Calibration and confidence",
        "Position bias",
        "Training",
        "Weakest subjects",
        "What changed",
        "Sample questions",
        "All prediction files",
        "How it was made",
    ):
        assert title in page.text, title
    for fact in (
        "calibration error",
        "Brier score",
        "ROUGE-L",
        "perplexity",
        "prompt style chat",
        "seed 7",
        "commit 0123abc",
        "steps 300",
        "n fixed broken both wrong both right",
        "all questions 220 90 (40.9 %) 25 (11.4 %) 45 (20.5 %) 60 (27.3 %)",
        "Broken: 20 of 25 shown",
        "Both wrong: 20 of 45 shown",
        "Fixed: 10 of 90 shown",
        "memory peak 1,024 MiB",
    ):
        assert fact in page.text, fact
    assert len(page.find("details")) >= 50
    assert len(text) < 1_000_000


def test_text_of_the_data_is_never_markup(full_run, tmp_path):
    text = report(tmp_path, full_run)
    page = check_page(text)
    assert "<script>alert(1)</script>" in page.text
    assert "<b>Skin" not in text
    assert "alert(1)</script>" not in text


def test_same_run_same_bytes(full_run, tmp_path):
    assert report(tmp_path, full_run) == report(tmp_path / "again", full_run)


@pytest.mark.parametrize(
    ("counts", "label", "sentence"),
    [
        (
            (50, 60, 5, 85),
            "Better",
            (
                "Tuned answers 55.0 % of 200 questions right, the base 27.5 %: +27.5 points (95 %"
                " interval +20.5 to"
            ),
        ),
        (
            (50, 5, 60, 85),
            "Worse",
            (
                "Tuned got worse: it answers 27.5 % of 200 questions right, the base 55.0 %: −27.5"
                " points"
            ),
        ),
        (
            (100, 21, 19, 60),
            "No difference shown",
            "No difference was shown: tuned answers 60.5 % of 200 questions right, the base 59.5 %",
        ),
        (
            (100, 0, 0, 100),
            "No difference shown",
            "+0.0 points (95 % interval −1.9 to +1.9, exact McNemar p = 1)",
        ),
        # the interval leaves out 0, the exact test does not
        ((100, 5, 0, 95), "No difference shown", "+2.5 points (95 % interval +0.1 to +5.7"),
    ],
)
def test_verdict(tmp_path, counts, label, sentence):
    before, after = hits(*counts)
    page = check_page(
        report(
            tmp_path,
            make_run(tmp_path / "run", make_rows("base", before), make_rows("tuned", after)),
        )
    )
    assert label in page.text
    assert sentence in page.text
    assert page.text.count("got worse:") == (label == "Worse")


@pytest.mark.parametrize(
    ("low", "high", "p", "kind"),
    [
        (0.001, 0.05, 0.04, "better"),
        (-0.001, 0.05, 0.04, "even"),
        (0.0, 0.05, 0.04, "even"),
        (0.001, 0.05, 0.05, "even"),
        (-0.05, -0.001, 0.04, "worse"),
        (-0.05, 0.0, 0.04, "even"),
    ],
)
def test_interval_and_test_must_both_show_it(low, high, p, kind):
    comparison = {
        "n": 99,
        "accuracy_a": 0.5,
        "accuracy_b": 0.52,
        "difference": (low + high) / 2,
        "difference_ci95": [low, high],
        "mcnemar_p": p,
    }
    verdict = judge(Run("r", comparison=comparison))
    assert verdict.kind == kind
    assert verdict.sentence.startswith("No difference was shown") == (kind == "even")


def test_verdict_is_printed_too(tmp_path):
    before, after = hits(50, 60, 5, 85)
    folder = make_run(tmp_path / "run", make_rows("base", before), make_rows("tuned", after))
    done = run_script("eval/report.py", folder, "--output", tmp_path / "r.html")
    assert "Tuned answers 55.0 % of 200 questions right" in done.stdout


def test_worse_subjects_have_corrected_p(tmp_path):
    before, after = hits(40, 2, 30, 20)
    page = check_page(
        report(
            tmp_path,
            make_run(
                tmp_path / "run",
                make_rows("base", before, ("Only",)),
                make_rows("tuned", after, ("Only",)),
            ),
        )
    )
    assert "got worse" in page.text
    assert "Only 92 76.1 % 45.7 % −30.4" in page.text
    assert "p is corrected for the number of subjects, 1" in page.text


@pytest.mark.parametrize("only", ["base", "tuned", "log"])
def test_missing_parts_are_named(tmp_path, only):
    before, after = hits(10, 5, 1, 4)
    rows = {
        "base": make_rows("base", before),
        "tuned": make_rows("tuned", after),
        "log": make_log(5),
    }
    page = check_page(report(tmp_path, make_run(tmp_path / "run", **{only: rows[only]})))
    missing = {
        "base": "predictions/base.jsonl",
        "tuned": "predictions/tuned.jsonl",
        "log": "train_log.jsonl",
    }
    for name, file in missing.items():
        assert (f"{file} is missing" in page.text) == (name != only)
    assert "environment.json is missing" in page.text
    expected = {
        "log": "nothing is known about right and wrong",
        "base": "Base answers 55.0 % of 20",
        "tuned": "Tuned answers 75.0 % of 20",
    }[only]
    assert expected in page.text
    assert ("what training changed" in page.text) == (only != "log")


def test_scores_of_metrics_json_stand_in_for_predictions(tmp_path):
    part = {"n": 20, "accuracy": 0.5, "accuracy_ci95": [0.3, 0.7], "unparsed": 0, "truncated": 0}
    comparison = {
        "n": 20,
        "accuracy_a": 0.25,
        "accuracy_b": 0.5,
        "difference": 0.25,
        "difference_ci95": [0.05, 0.45],
        "mcnemar_p": 0.03,
    }
    metrics = part | {"base": part | {"accuracy": 0.25}, "comparison": comparison}
    page = check_page(
        report(tmp_path, make_run(tmp_path / "run", log=make_log(5), metrics=metrics))
    )
    assert "Tuned answers 50.0 % of 20 questions right, the base 25.0 %" in page.text
    assert "kept in metrics.json" in page.text


def test_incomplete_metrics_json_is_no_score(tmp_path):
    metrics = {"accuracy": 0.5, "base": {"accuracy": 0.2}, "comparison": {}}
    assert (
        "nothing is known about right and wrong"
        in check_page(
            report(tmp_path, make_run(tmp_path / "run", log=make_log(5), metrics=metrics))
        ).text
    )


def test_contradiction_with_metrics_json_is_said(tmp_path):
    rows = make_rows("tuned", hits(10, 5, 1, 4)[1])
    page = check_page(
        report(tmp_path, make_run(tmp_path / "run", tuned=rows, metrics={"accuracy": 0.99}))
    )
    assert "metrics.json says 99.0 % for the tuned model, its predictions give 75.0 %" in page.text


@pytest.mark.parametrize("change", ["questions", "prompt"])
def test_what_cannot_be_compared_is_said(tmp_path, change):
    before, after = hits(10, 5, 1, 4)
    tuned = (
        make_rows("tuned", after, prompt="b" * 64)
        if change == "prompt"
        else make_rows("tuned", after)[:-3]
    )
    page = check_page(
        report(tmp_path, make_run(tmp_path / "run", make_rows("base", before), tuned))
    )
    assert "Base and tuned are not compared" in page.text
    assert ("different prompts" if change == "prompt" else "different questions") in page.text
    assert "McNemar" not in page.text


def test_open_answers_as_base_and_tuned(tmp_path):
    rows = [
        {
            "id": f"o{i}",
            "kind": "open",
            "gold": "vitamin C",
            "prediction": "vitamin C",
            "subject": None,
        }
        for i in range(3)
    ]
    page = check_page(report(tmp_path, make_run(tmp_path / "run", rows, rows)))
    assert "No difference was shown: tuned has F1 100.0 % on 3 open questions" in page.text
    assert "100.0 % (43.9 – 100.0)" in page.text
    assert "Open answers of base and tuned: 3 of 3 shown" in page.text
    assert page.text.count("tuned (F1 of words 100.0 %) wrote: vitamin C") == 3


def test_open_answers_are_shown(tmp_path):
    """Ten of each file, drawn by a hash; an empty one and one of another script say so."""
    answers = [(EVIL, "skin"), ("", "liver"), ("печень", "печень")] * 5
    rows = [
        {"id": f"o{i}", "kind": "open", "gold": gold, "prediction": text, "question": f"What {i}?"}
        for i, (text, gold) in enumerate(answers)
    ]
    run = make_run(tmp_path / "run", tuned=rows)
    page = check_page(report(tmp_path, run))
    assert "Open answers of tuned: 10 of 15 shown" in page.text
    assert "tuned wrote nothing." in page.text
    assert re.search(r"0\.0 % \(0\.0 – \d+\.\d\) of 10", page.text)
    scored = run_script("eval/score.py", run / "predictions" / "tuned.jsonl")
    assert "no ROUGE-L of 5 right answers that are not in Latin letters" in scored.stdout


def test_rows_without_probabilities(tmp_path):
    """Answers that were generated have no log-probabilities, and some cannot be read."""
    before, after = hits(10, 5, 1, 4)
    generated = [
        row | {"option_logprobs": None, "letter_mass": None, "text": f"It is {EVIL}"}
        for row in make_rows("tuned", after)
    ]
    generated[-1]["prediction"] = None
    page = check_page(
        report(tmp_path, make_run(tmp_path / "run", make_rows("base", before), generated))
    )
    assert "tuned named no option" in page.text
    assert "tuned wrote:" in page.text


def test_position_bias_with_permutations(tmp_path):
    """Scores that follow the position: every answer turns over, and only a right option at A is
    found.
    """
    rows = make_rows(
        "tuned", [1] * 8, permutations={"ABCD": [-1, -2, -3, -4], "BCDA": [-1, -2, -3, -4]}
    )
    page = check_page(report(tmp_path, make_run(tmp_path / "run", tuned=rows)))
    assert "100.0 % of the answers change with the order" in page.text
    assert "A 4 100.0 %" in page.text


def test_several_runs(tmp_path):
    before, after = hits(50, 60, 5, 85)
    runs = [
        make_run(
            tmp_path / name / "mine",
            make_rows("base", before),
            make_rows("tuned", right),
            make_log(5),
        )
        for name, right in (("one", after), ("two", before), ("three", [*after[:-1], 1]))
    ]
    runs.append(make_run(tmp_path / "other", log=make_log(5)))
    page = check_page(report(tmp_path, *runs, runs[0]))
    assert "4 runs compared" in page.text
    assert page.text.count("No difference was shown") == 1
    for folder in runs[:3]:
        assert str(folder) in page.text, "folders of one name are told apart by their path"
    assert "other is not compared with" in page.text


def test_many_subjects_fold(tmp_path):
    before, after = hits(60, 90, 25, 45)
    subjects = [f"subject {i}" for i in range(44)]
    page = check_page(
        report(
            tmp_path,
            make_run(
                tmp_path / "run",
                make_rows("base", before * 4, subjects),
                make_rows("tuned", after * 4, subjects),
            ),
        )
    )
    assert "4 more, of lower accuracy" in page.text


def test_small_subjects_share_a_row(tmp_path):
    """Two subjects have 19 and 18 questions: they stand together in tables, apart in the scores."""
    subjects = ["large"] * 25 + ["small"] * 19 + ["tiny"] * 18
    base = make_rows("base", [1] * 50 + [0] * 12, subjects)
    tuned = make_rows("tuned", [0] * 12 + [1] * 50, subjects)
    run = make_run(tmp_path / "run", base, tuned)
    page = check_page(report(tmp_path, run))
    assert "2 subjects under 20 questions 37 100.0 % 90.6 – 100.0" in page.text
    assert "2 subjects under 20 questions n = 37" in page.text
    assert not re.search(r"\b(small|tiny) (\d|n =)", page.text)
    files = [run / "predictions" / f"{name}.jsonl" for name in ("base", "tuned")]
    scored = run_script("eval/score.py", files[0], "--output", tmp_path / "m.json")
    assert re.search(
        r"2 subjects under 20 questions +│ +37 │ +67\.6% │ +51\.5% – 80\.4%", scored.stdout
    )
    assert set(json.loads((tmp_path / "m.json").read_text())["per_subject"]) == set(subjects)
    compared = run_script("eval/compare.py", *files, "--output", tmp_path / "c.json")
    assert re.search(r"2 subjects under 20 +│ +37 │.*\+32\.4", compared.stdout)
    assert set(json.loads((tmp_path / "c.json").read_text())["per_subject"]) == set(subjects)


def test_the_kinds_of_mistakes_stand_on_the_page(tmp_path):
    """The tuned model has 20 wrong answers; no row says what the order of options does."""
    run = make_run(
        tmp_path / "run", make_rows("base", [0] * 60), make_rows("tuned", [1, 1, 0] * 20)
    )
    page = check_page(report(tmp_path, run))
    assert "Kinds of the 20 wrong answers of 60" in page.text
    assert re.search(r"position bound it changes .* \(the file does not say\) – – –", page.text)
    right = make_run(tmp_path / "right", make_rows("base", [1] * 60), make_rows("tuned", [1] * 60))
    (tmp_path / "two").mkdir()
    assert "Kinds of mistakes" not in check_page(report(tmp_path / "two", right)).text


def test_p_values_are_written_alike(tmp_path):
    """A p-value of 1e-40 has no digit that means anything, on the page and on the terminal."""
    run = make_run(tmp_path / "run", make_rows("base", [0] * 150), make_rows("tuned", [1] * 150))
    assert "exact McNemar p < 1e-12" in check_page(report(tmp_path, run)).text
    files = [run / "predictions" / f"{name}.jsonl" for name in ("base", "tuned")]
    compared = run_script("eval/compare.py", *files)
    assert compared.stdout.count("< 1e-12") == 5
    assert not re.search(r"\de-", compared.stdout.replace("1e-12", ""))


def test_training_shows_its_scores_alike():
    """The table at the end of a training folds small subjects and takes no name for markup."""
    subjects = ["[/x] large"] * 25 + ["small"] * 3 + ["tiny"] * 2
    base = [row | {"letter_mass": 0.1} for row in make_rows("base", [0] * 30, subjects)]
    scores, (table, difference) = compare_scores(base, make_rows("tuned", [1] * 30, subjects))
    console = make_console(width=120, file=io.StringIO())
    console.print(table, difference)
    shown = " ".join(console.file.getvalue().split())
    assert "[/x] large │ 25" in shown
    assert "2 subjects under 20 questions │ 5 │ 0.0%" in shown
    assert "the base gives only 10.0% of its probability to letters at all" in shown
    assert set(scores["per_subject"]) == set(subjects)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"letter_mass": 0.03}, "the base gives only 3.0% of its probability to letters at all"),
        (
            {"letter_mass": None, "option_logprobs": None, "prediction": None},
            "only 0.0% of the answers of the base name an option",
        ),
    ],
)
def test_better_needs_a_base_that_knows_the_form(tmp_path, changes, words):
    """A base that hardly gives letters has a meaningless score by letters."""
    base = [row | changes for row in make_rows("base", [0] * 100)]
    run = make_run(tmp_path / "run", base, make_rows("tuned", [1] * 100))
    page = check_page(report(tmp_path, run))
    assert "Not comparable Not a comparison of knowledge: tuned answers 100.0 %" in page.text
    assert words in page.text
    assert "Better" not in page.text


def test_bins_are_named_as_they_are(tmp_path):
    """The upper bound belongs to the last bin alone; of five answers a tenth is a fifth."""
    sure = {"A": 0.0, "B": -50.0, "C": -50.0, "D": -50.0}
    rows = [row | {"gold": "A", "prediction": "A"} for row in make_rows("tuned", [1] * 5)]
    rows = [row | {"option_logprobs": sure} for row in rows]
    page = check_page(report(tmp_path, make_run(tmp_path / "run", tuned=rows)))
    assert "90 to 100 % tuned 5" in page.text.replace("\u00a0", " ")
    assert name_bin(0.3, 0.4).replace("\u00a0", " ") == "30 to under 40 %"
    assert name_bin(1 / 15, 2 / 15).replace("\u00a0", " ") == "6.667 to under 13.33 %"
    selective = {"n": 5, "accuracy_at_coverage": {"10%": 1.0, "25%": 0.5, "100%": 0.4}}
    assert place_coverage(selective) == [(0.2, 1.0), (0.4, 0.5), (1.0, 0.4)]


def test_lost_lines_of_the_log_are_counted(tmp_path):
    run = make_run(tmp_path / "run", tuned=make_rows("tuned", [1, 0]), log=make_log(3))
    with (run / "train_log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    page = check_page(report(tmp_path, run))
    assert "train_log.jsonl has 1 line(s) that are no rows" in page.text


def test_long_texts_are_cut(tmp_path):
    rows = make_rows("tuned", [0] * 30, question="word " * 20_000)
    text = report(tmp_path, make_run(tmp_path / "run", tuned=rows))
    assert "(cut)" in check_page(text).text
    assert len(text) < 1_000_000


# ---- refusals ------------------------------------------------------------------------------------


def test_existing_output_is_kept(full_run, tmp_path):
    (tmp_path / "report.html").write_text("mine")
    assert "exists; give a new file name" in refuse(tmp_path, full_run)
    assert (tmp_path / "report.html").read_text() == "mine"


def test_refusals_name_what_is_wrong(tmp_path):
    assert "not a folder" in refuse(tmp_path, tmp_path / "nowhere")
    empty = make_run(tmp_path / "empty")
    assert "holds neither predictions" in refuse(tmp_path, empty)
    run = make_run(tmp_path / "run", log=make_log(3))
    assert "make it first" in refuse(tmp_path, run, output="no/such/report.html")
    (run / "metrics.json").write_text("{")
    assert "metrics.json: not valid JSON" in refuse(tmp_path, run)
    (run / "metrics.json").write_text("[]")
    assert "expected an object, got list" in refuse(tmp_path, run)
    (run / "metrics.json").unlink()
    rows = make_rows("base", [1, 0])
    write_lines(run / "predictions" / "base.jsonl", rows)
    write_lines(run / "predictions" / "tuned.jsonl", [rows[0], rows[0]])
    assert "line 2: id q0 stands on line 1 too" in refuse(tmp_path, run)
    assert not (tmp_path / "report.html").exists()


# ---- curves --------------------------------------------------------------------------------------


def test_long_curves_keep_their_extremes():
    log = make_log(10_000, eval_every=10**9)
    log[4321]["loss"] = 99.0
    line = curve("training", log, "loss")
    assert len(line.points) == POINTS
    assert max(high for _, _, high in line.spread) == 99.0
    assert min(low for _, low, _ in line.spread) == min(row["loss"] for row in log)
    assert len(render_report([Run("r", log=log)])) < 200_000


def test_damaged_log_values_are_left_out():
    log = [
        {"step": 1, "loss": float("nan")},
        {"step": 2, "loss": "high"},
        {"step": 3},
        {"loss": 1.0},
        {"step": 4, "loss": 2.0},
    ]
    assert curve("", log, "loss").points == [(4, 2.0)]
    check_page(render_report([Run("r", log=log)]))


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 0), (3, 3), (-2, 5), (0.00012, 0.00034), (0, 12_345), (1e9, 3e9)]
)
def test_ticks_are_few_and_cover(low, high):
    ticks = make_ticks(low, high)
    assert ticks[0] <= low <= high <= ticks[-1]
    assert 2 <= len(ticks) <= 7


# ---- colours -------------------------------------------------------------------------------------


def contrast(first, second):
    """WCAG 2.2: ratio of relative luminances, 1 to 21."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        parts = [
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
        ]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_in_both_schemes():
    text = render_report([Run("r", log=make_log(3))])
    light, dark = (
        dict(re.findall(r"--([\w]+): (#\w{6})", block))
        for block in re.findall(r":root \{(.*?)\}", text, re.S)
    )
    assert light.keys() == dark.keys()
    for colours in (light, dark):
        for name in ("ink", "soft", "link", "better", "worse", "even"):
            for ground in ("page", "card"):
                assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
        for name in ("a", "b", "axis"):
            assert contrast(colours[name], colours["page"]) >= 3, name
        assert contrast(colours["ink"], colours["fill"]) >= 3, "intervals on filled bars"


# ---- a real browser ------------------------------------------------------------------------------

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)


class Browser:
    """A headless Chromium, spoken to by the DevTools protocol over two pipes."""

    def __init__(self, profile):
        to_browser, self.writer = os.pipe()
        reader, from_browser = os.pipe()
        flags = (
            "--headless=new --disable-gpu --hide-scrollbars --no-first-run --remote-debugging-pipe"
            + " --no-sandbox" * (os.getuid() == 0)
        )
        command = (
            f'exec "{CHROMIUM}" {flags} --user-data-dir="{profile}" 3<&{to_browser}'
            f" 4>&{from_browser}"
        )
        self.process = subprocess.Popen(
            ["bash", "-c", command], pass_fds=(to_browser, from_browser), stderr=subprocess.DEVNULL
        )
        # a browser that hangs fails the test instead of holding it
        self.watch = threading.Timer(60, self.process.kill)
        self.watch.start()
        os.close(to_browser)
        os.close(from_browser)
        self.reader = os.fdopen(reader, "rb")
        self.count = 0
        self.events = []
        self.session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters} | (
            {"sessionId": self.session} if self.session else {}
        )
        os.write(self.writer, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.count:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def receive(self):
        parts = bytearray()
        while (byte := self.reader.read(1)) != b"\0":
            assert byte, "the browser has gone"
            parts += byte
        return json.loads(parts)

    def show(self, path, width, dark):
        """Load a page at a width, in a colour scheme; what happened while it loaded is in
        `events`.
        """
        self.events = []
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )
        self.call("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive())

    def evaluate(self, expression):
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)[
            "result"
        ].get("value")

    def press(self, key, code):
        for kind in ("rawKeyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code
            )

    def photograph(self):
        return base64.b64decode(self.call("Page.captureScreenshot")["data"])

    def close(self):
        with contextlib.suppress(AssertionError, OSError):
            self.session = None
            self.call("Browser.close")
        self.process.wait(timeout=20)
        self.watch.cancel()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip(
            "no chromium on PATH; install Debian's package chromium, or Chrome, to see the page in"
            " a browser"
        )
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def page_file(full_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    report(folder, full_run)
    return folder / "report.html"


FOCUSED = """(() => { const e = document.activeElement;
  const box = e.getBoundingClientRect(), style = getComputedStyle(e);
  return { tag: e.tagName, order: [...document.querySelectorAll('*')].indexOf(e),
           ring: style.outlineStyle != 'none',
           shown: box.bottom > 0 && box.top < innerHeight }; })()"""


@pytest.mark.full
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1200, 360])
def test_browser_shows_the_page(browser, page_file, width, dark):
    browser.show(page_file, width, dark)
    problems = [
        e
        for e in browser.events
        if e["method"] in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    ]
    assert not problems
    requests = [
        e["params"]["request"]["url"]
        for e in browser.events
        if e["method"] == "Network.requestWillBeSent"
    ]
    assert not [url for url in requests if not url.startswith(("file:", "data:"))]
    assert browser.evaluate("innerWidth") == width
    photograph = browser.photograph()
    ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")
    browser.evaluate("document.body.style.visibility = 'hidden'")
    assert len(photograph) > 3 * len(browser.photograph()), "the page is blank"
    browser.evaluate("document.body.style.visibility = ''")
    browser.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert browser.evaluate(
        "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    ), "the page scrolls sideways"
    outside = (
        "[...document.querySelectorAll('svg text')].filter(e => e.getBoundingClientRect().right >"
        " innerWidth + 1 || e.getBoundingClientRect().left < -1).length"
    )
    assert browser.evaluate(outside) == 0, "labels of a chart stand outside the window"
    smallest = (
        "Math.min(...[...document.querySelectorAll('svg text')].map(e =>"
        " e.getBoundingClientRect().height))"
    )
    assert browser.evaluate(smallest) >= 10, "labels of a chart are too small to read"


@pytest.mark.full
def test_browser_keyboard(browser, page_file):
    browser.show(page_file, 1200, False)
    seen = []
    for _ in range(25):
        browser.press("Tab", 9)
        seen.append(browser.evaluate(FOCUSED))
    assert [e["tag"] for e in seen[:2]] == ["A", "A"], "skip link, then the sections"
    assert all(a["order"] < b["order"] for a, b in itertools.pairwise(seen)), "Tab follows the page"
    assert all(e["ring"] and e["shown"] for e in seen), "focus is visible"
    assert {"A", "DIV", "SUMMARY"} <= {e["tag"] for e in seen}
    while seen[-1]["tag"] != "SUMMARY":
        browser.press("Tab", 9)
        seen.append(browser.evaluate(FOCUSED))
    browser.press("Enter", 13)
    browser.call("Input.dispatchKeyEvent", type="char", text="\r")
    assert browser.evaluate("document.activeElement.parentElement.open") is True


@pytest.mark.full
def test_browser_prints_in_light_colours(browser, page_file):
    browser.show(page_file, 1200, True)
    assert len(base64.b64decode(browser.call("Page.printToPDF")["data"])) > 20_000
    browser.call(
        "Emulation.setEmulatedMedia",
        media="print",
        features=[{"name": "prefers-color-scheme", "value": "dark"}],
    )
    assert (
        browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    )
    browser.call("Emulation.setEmulatedMedia", media="")
