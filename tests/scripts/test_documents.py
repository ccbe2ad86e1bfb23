"""The documents say what the code does: keys, files, messages and links are compared with it."""

import ast
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, fields

import pytest
import yaml
from conftest import DEMO, ROOT, run_inside, run_script
from huggingface_hub import ModelCard

from medqlora.core.config import DataEntry
from medqlora.core.config_loading import all_keys, load_config
from medqlora.data.examples import MultipleChoice, OpenAnswer, Passage, Removal
from medqlora.data.formats.registry import FORMATS
from medqlora.data.reading import read_examples
from medqlora.engines.interface import Answer
from medqlora.engines.latency import Served, summarize
from medqlora.engines.registry import Asking
from medqlora.evaluation.answering import predict
from medqlora.evaluation.comparison import compare_predictions
from medqlora.evaluation.method import Method
from medqlora.evaluation.metrics import score_predictions
from medqlora.evaluation.mistakes import find_mistakes
from medqlora.evaluation.predictions import collect_rows, read_predictions
from medqlora.evaluation.questions import prepare_questions
from medqlora.evaluation.rating_sheet import HEAD, draw_sheet
from medqlora.evaluation.ratings import summarise_ratings
from medqlora.model.adapter import read_adapter_metadata
from medqlora.prompts.chat_template import make_encoder
from medqlora.reporting.search_results import collect_results, compare_confirmed
from medqlora.serving.ask import Conversation, answer_choices
from medqlora.serving.questions import make_question
from medqlora.serving.settings import AskSettings
from medqlora.training.planning import Decision
from medqlora.training.search.definition import read_search
from medqlora.training.search.study import add_trial, finish_trial, open_study, report_losses
from medqlora.training.search.trials import list_runs

DOCS = ROOT / "docs"


# ---- docs/config.md ------------------------------------------------------------------------------


def test_the_page_of_the_configuration_is_current(monkeypatch, tmp_path):
    script = DOCS / "make_config.py"
    assert run_inside(script, ["--check", DOCS / "config.md"], monkeypatch) == (0, "")
    old = tmp_path / "config.md"
    old.write_text((DOCS / "config.md").read_text().replace("`0.0002`", "`0.0001`"))
    code, complaint = run_inside(script, ["--check", old], monkeypatch)
    assert (code, complaint.count("\n")) == (2, 1)
    assert "does not say what the schema says" in complaint
    assert run_inside(script, ["--write", old], monkeypatch) == (0, "")
    assert old.read_text() == (DOCS / "config.md").read_text()


@pytest.mark.parametrize("key", all_keys())
def test_every_key_of_the_configuration_is_described(key):
    assert f"| `{key}` |" in (DOCS / "config.md").read_text(encoding="utf-8")


# ---- docs/outputs.md -----------------------------------------------------------------------------


def read_section(page: str, heading: str) -> str:
    """The text between this heading and the next one."""
    text = (DOCS / page).read_text(encoding="utf-8")
    _, found, rest = text.partition(f"# {heading}\n")
    assert found, f"{page} has no heading {heading}"
    return re.split(r"^#", rest, maxsplit=1, flags=re.MULTILINE)[0]


def documented_keys(heading: str, kind: str = "") -> list[list[str]]:
    """Keys in the first column of the tables under a heading, as segments.

    kind: only rows whose second column names this kind of prediction.
    """
    keys = []
    for line in read_section("outputs.md", heading).splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| `") and (not kind or cells[1] == "all" or kind in cells[1]):
            keys += [key.split(".") for key in re.findall(r"`([^`]+)`", cells[0])]
    return keys


def list_keys(tree, path=()) -> Iterator[tuple[str, ...]]:
    """Every path to a leaf of a JSON tree; "[]" after a name stands for each element of a list."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from list_keys(value, (*path, key))
    elif isinstance(tree, list) and tree:
        for value in tree:
            yield from list_keys(value, (*path[:-1], f"{path[-1]}[]"))
    else:
        yield path


def fits(key: list[str], path: tuple[str, ...]) -> bool:
    """Whether a documented key, or the object that it names, is at the beginning of a path.

    An empty list or object has the keys that are documented for its elements.
    """
    for wanted, found in zip(key, path, strict=False):
        name = wanted.removesuffix("[]")
        if not re.fullmatch(r"[A-Z]{2,}", name) and name != found.removesuffix("[]"):
            return False
    return True


def undocumented(tree, *keys: list[list[str]]) -> set[str]:
    known = [key for some in keys for key in some]
    return {".".join(path) for path in list_keys(tree) if not any(fits(key, path) for key in known)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of two steps with all that a run writes."""
    folder = tmp_path_factory.mktemp("documented")
    flags = {
        "--output_dir": folder / "run",
        "--data.cache_dir": folder / "cache",
        "--data.train.0.limit": 60,
        "--data.eval.0.limit": 10,
        "--data.test.0.limit": 24,
        "--training.max_steps": 2,
        "--training.max_tokens_per_batch": 512,
        "--training.global_batch_tokens": 512,
    }
    command = [part for flag, value in flags.items() for part in (flag, str(value))]
    done = run_script(ROOT / "recipes" / "sft_qlora.py", *command)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_every_file_of_a_run_is_documented(run):
    section = read_section("outputs.md", "The run folder")
    section += read_section("outputs.md", "checkpoints/step-N/")
    section += read_section("outputs.md", "adapter/")
    for path in run.rglob("*"):
        if path.is_file():
            assert path.name in section, path
    for line in (run / "train_log.jsonl").read_text().splitlines():
        assert not undocumented(json.loads(line), documented_keys("train_log.jsonl"))
    (checkpoint,) = (run / "checkpoints").iterdir()
    keys = documented_keys("checkpoints/step-N/")
    for name in ("state.json", "manifest.json"):
        assert not undocumented(json.loads((checkpoint / name).read_text()), keys)
    metadata = json.loads((run / "adapter" / "medqlora.json").read_text())
    assert not undocumented(metadata, documented_keys("adapter/"))


def test_the_environment_is_documented(run):
    environment = json.loads((run / "environment.json").read_text())
    base = environment.pop("base")
    assert not undocumented(environment, documented_keys("environment.json"))
    assert not undocumented(base, documented_keys("adapter/"))
    removal = asdict(Removal("file line 1", "id", "reason"))
    assert not undocumented(removal, documented_keys("removed.jsonl"))
    decision = {"step_plan": {field.name: 0 for field in fields(Decision)}}
    assert not undocumented(decision, documented_keys("environment.json"))


def test_the_metrics_of_a_run_are_documented(run):
    metrics = json.loads((run / "metrics.json").read_text())
    scores = documented_keys("Scores of multiple-choice questions")
    assert not undocumented(metrics.pop("base"), scores)
    assert not undocumented(metrics.pop("comparison"), documented_keys("comparison.json")[:8])
    assert not undocumented(metrics, scores, documented_keys("metrics.json of a run"))


def test_the_model_card_of_a_run_has_its_metrics(run):
    metrics = json.loads((run / "metrics.json").read_text())
    card = ModelCard.load(run / "adapter" / "README.md")
    accuracy, perplexity = card.data.eval_results
    assert (accuracy.metric_value, perplexity.metric_value) == (
        metrics["accuracy"],
        metrics["perplexity"],
    )
    assert "Question: Which?\nA. one" in card.text
    # It was written last, and the adapter is read as before.
    assert read_adapter_metadata(run / "adapter")["step"] == metrics["best_step"]


METHODS = {
    "letters": Method(),
    "letters in every order": Method(permutations=4),
    "cloze": Method(scoring="cloze"),
    "generated": Method(scoring="generate", max_new_tokens=2),
    "votes": Method(scoring="generate", max_new_tokens=2, samples=3, temperature=1.0),
}


class AnyAnswers:
    """An engine that scores options by their order and writes A, B or nothing."""

    name = "hf"
    weights = "float32"

    def score(self, requests, shared=0):
        return [[-1.0 - number for number in range(len(r.options))] for r in requests]

    def generate(self, prefixes, sampling):
        answers = [Answer("A", reached_limit=True), Answer("B"), Answer("<think>")]
        return [answers[: sampling.samples] for _ in prefixes]

    def stream(self, prefix, sampling, show):
        return Answer("A")


@pytest.mark.parametrize("name", METHODS)
def test_predictions_and_scores_are_documented(demo_tokenizer, name, tmp_path):
    path = str(DEMO / "data" / "test.jsonl")
    entry = DataEntry(format="medmcqa", path=path, limit=8, keep=["exp"])
    examples, _ = read_examples(entry, "test")
    encoder = make_encoder(demo_tokenizer, "plain", "letter")
    asked, shared = prepare_questions(encoder, examples, METHODS[name])
    batches = predict(AnyAnswers(), encoder, asked, shared, METHODS[name], "m")
    rows = [row | {"truncated": True} for batch in batches for row in batch]
    for row in rows:
        assert not undocumented(row, documented_keys("Predictions", "choice"))
    columns = collect_rows(rows)
    keys = documented_keys("Scores of multiple-choice questions")
    assert not undocumented(score_predictions(columns), keys)
    assert not undocumented(
        {"by": score_predictions(columns, "subject")["by"]}, documented_keys("Scores by strata")
    )
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = {"errors": find_mistakes(read_predictions(path))}
    assert not undocumented(found, documented_keys("Kinds of mistakes"))
    comparison = compare_predictions(columns, columns)
    assert not undocumented(comparison, documented_keys("comparison.json"))


@pytest.mark.parametrize(
    ("example", "method", "kind", "heading"),
    [
        (
            OpenAnswer("1", "What is fever?", "A high temperature.", "qa", "line 1"),
            Method(scoring="generate"),
            "open",
            "Scores of open questions",
        ),
        (
            Passage("1", "Fever is a high temperature.", "text", "line 1"),
            Method(scoring="perplexity"),
            "text",
            "Scores of texts",
        ),
    ],
)
def test_predictions_of_texts_are_documented(demo_tokenizer, example, method, kind, heading):
    encoder = make_encoder(demo_tokenizer, "plain", "letter")
    asked, shared = prepare_questions(encoder, [example], method)
    (rows,) = predict(AnyAnswers(), encoder, asked, shared, method, "m")
    assert {row["kind"] for row in rows} == {kind}
    for row in rows:
        assert not undocumented(row, documented_keys("Predictions", kind))
    columns = collect_rows(rows)
    assert not undocumented(score_predictions(columns), documented_keys(heading))
    if kind == "open":
        keys = documented_keys("comparison.json of open questions")
        assert not undocumented(compare_predictions(columns, columns), keys)


def test_ratings_are_documented(tmp_path):
    row = {"id": "1", "gold": "A", "prediction": "B", "question": "Which?", "model": "m"}
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path in paths:
        path.write_text(json.dumps(row) + "\n")
    sheet = draw_sheet([read_predictions(path) for path in paths], seed=0)
    keys = documented_keys("Ratings")
    assert not undocumented(sheet.key.model_dump(), keys)
    section = read_section("outputs.md", "Ratings")
    assert all(f"`{column}`" in section for column in HEAD)
    ratings = dict.fromkeys(sheet.key.items, (1, 2, 3, 4, 5))
    summary = summarise_ratings([ratings, ratings], sheet.key) | {"sheets": ["a.csv"]}
    assert not undocumented(summary, keys)


@pytest.mark.parametrize("threshold", [0.0, 1.01])
def test_answers_to_new_questions_are_documented(demo_tokenizer, threshold):
    asking = Asking(make_encoder(demo_tokenizer, "plain", "letter"), {}, 512, {})
    settings = AskSettings(model="m", threshold=threshold, samples=2)
    choice = make_question("Which?", ("a", "b"), "typed")
    other = make_question("Why?", (), "typed")
    rows = answer_choices(AnyAnswers(), asking, [choice], settings)
    rows.append(Conversation(AnyAnswers(), asking, settings).answer(other, print))
    for row, kind in zip(rows, ("choice", "open"), strict=True):
        keys = documented_keys("Predictions", kind), documented_keys("Answers")
        assert not undocumented(row, *keys)
        assert ("withheld" in row) == row["abstained"] == (threshold > 1)


RECORDED = {
    "safety_": "bench/safety.py",
    "memory_": "bench/memory.py",
    "fit_": "bench/memory.py",
    "recipe_": "bench/recipe_memory.py",
    "claim_": "bench/memory.py",
    "t4_": "bench/memory.py",
    "data_": "bench/data.py",
    "before_": "bench/before_after.py",
    "strategies_": "bench/strategies.py",
}


def test_the_results_of_a_search_are_documented(run, tmp_path):
    search = read_search(ROOT / "recipes" / "configs" / "search_demo.yaml", [], None)
    study = open_study(tmp_path, search)
    for point in search.points[:2]:
        trial = add_trial(study, point)
        report_losses(study, trial, {3: 1.5})
        finish_trial(study, trial, 0.5, {"value_per_seed": [0.5], "seconds": 1.0})
        (folder,) = list_runs(study, tmp_path, trial.number)
        shutil.copytree(run / "predictions", folder / "predictions")
    results = collect_results(study, tmp_path)
    results["confirmed"] = compare_confirmed({"default": run, "best": run})
    assert not undocumented(results, documented_keys("search.json"))
    assert results["trials"][1]["comparison"]["difference"] == 0


def test_recorded_benchmarks_are_documented():
    for path in (ROOT / "bench" / "results").rglob("*.json"):
        recorded = json.loads(path.read_text())
        prefix = path.stem.partition("_")[0] + "_"
        recorded.pop("environment", None)
        recorded.pop("command", None)
        if "shapes" in path.parts:
            continue
        if prefix == "throughput_":
            for case in recorded["cases"]:
                assert not undocumented(case, documented_keys("bench/throughput.py")), path
        elif prefix in ("sft_", "lm_"):
            results = recorded["results"]
            for found in results.values() if isinstance(results, dict) else results:
                assert not undocumented(found, documented_keys("bench/peers/")), path
        else:
            assert not undocumented(recorded, documented_keys(RECORDED[prefix])), path


def test_latencies_are_documented():
    served = [Served(0.0, (0.5, 0.6), 2), Served(0.0, (0.5,), 1)]
    loop = {"concurrency": 1} | summarize(served, 1.0, {"ttft": 1.0}) | {"short_answers": 1}
    assert not undocumented({"loops": [loop]}, documented_keys("bench/latency.py"))


def test_every_documented_key_is_in_the_code():
    """A key that was renamed or never written must not stay in the page."""
    folders = ("medqlora", "recipes", "eval", "bench")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    text = (DOCS / "outputs.md").read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    keys = [key for heading in headings for key in documented_keys(heading)]
    assert len(keys) > 200
    for segment in {part.replace("[]", "") for key in keys for part in key}:
        # These prefixes and suffixes are put around a name when it is written.
        name = re.sub(r"^(per|by)_|_ms$|^p\d\d$", "", segment)
        if re.fullmatch(r"\w+", segment) and not re.fullmatch(r"[A-Z]{2,}", segment):
            assert name in code, segment


# ---- docs/data_formats.md ------------------------------------------------------------------------


def read_blocks(page: str) -> list[tuple[str, str, str]]:
    """Code blocks with a comment above them -> (file name, data entry in the comment, content)."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(r"<!-- (\S+)(?: (\{.*?\}))? -->\n```\w+\n(.*?)```", text, re.DOTALL)


ROWS = [block for block in read_blocks("data_formats.md") if block[1]]


@pytest.mark.parametrize(("name", "entry", "content"), ROWS, ids=[entry for _, entry, _ in ROWS])
def test_rows_of_the_formats_are_read(tmp_path, name, entry, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    entry = DataEntry(path=str(tmp_path / name), **yaml.safe_load(entry))
    examples, removals = read_examples(entry, "train")
    assert len(examples) == content.count("\n") - name.endswith(".csv")
    assert not removals
    for example in examples:
        if isinstance(example, MultipleChoice):
            assert example.answer is not None


def test_every_format_has_a_row_and_its_home():
    assert {yaml.safe_load(entry)["format"] for _, entry, _ in ROWS} == set(FORMATS)
    text = (DOCS / "data_formats.md").read_text(encoding="utf-8")
    for name, format in FORMATS.items():
        (line,) = re.findall(rf"^\| `{name}` \| .*$", text, re.MULTILINE)
        if format.hub is not None:
            home = ", ".join(filter(None, format.hub))
            assert line.endswith(f"| {home} | {format.published_split} |"), line


def test_the_added_dataset_and_its_test_work(tmp_path):
    files = {name: content for name, more, content in read_blocks("data_formats.md") if not more}
    assert list(files) == ["medqlora/data/formats/nursing.py", "tests/data/test_nursing.py"]
    found = {}
    try:
        for content in files.values():
            exec(content, found)
        found["test_nursing"](tmp_path)
    finally:
        FORMATS.pop("nursing", None)


# ---- configurations in the pages -----------------------------------------------------------------


@pytest.mark.parametrize("page", ["guide.md", "data_formats.md"])
def test_configurations_of_the_pages_are_valid(page, tmp_path):
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        (tmp_path / "c.yaml").write_text(block, encoding="utf-8")
        load_config(tmp_path / "c.yaml", [] if "base:" in block else ["--model.base", "x"])


# ---- docs/troubleshooting.md ---------------------------------------------------------------------


def list_messages() -> Iterator[str]:
    """Every text of the code, with "…" in place of what is put into it."""
    folders = ("medqlora", "recipes", "eval", "bench", "launch")
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [n.value if isinstance(n, ast.Constant) else "…" for n in node.values]
                yield "".join(parts)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_explained_messages_are_those_of_the_code():
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    messages = list(list_messages())
    found = [
        line.split("` | ")[0].removeprefix("| `")
        for line in text.splitlines()
        if line.startswith("| `")
    ]
    assert len(found) > 50
    for explained in found:
        pieces = [piece for piece in explained.split("…") if len(piece) > 3]
        wanted = re.compile(".*".join(map(re.escape, pieces)), re.DOTALL)
        assert any(wanted.search(message) for message in messages), explained


# ---- all pages -----------------------------------------------------------------------------------

PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *DOCS.glob("*.md"),
        ROOT / "eval" / "README.md",
        ROOT / "bench" / "README.md",
    ]
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_named_files_exist(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert link.startswith("http") or (page.parent / link).exists(), link
    code = re.findall(r"`((?:medqlora|recipes|eval|bench|launch|tests|docs)/[\w./-]+)`", text)
    for name in code:
        placeholder = re.search(r"/[A-Z-]+/", name)
        assert placeholder or (ROOT / name).exists(), name


def test_the_readme_is_short_and_says_early_what_has_not_been_run():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 130
    assert lines.index("## What has not been run") < 50
    prose = [line for line in lines if not line.startswith(("|", "python", "accelerate", "bash"))]
    assert max(map(len, prose)) <= 100
    assert len((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").splitlines()) <= 100


def test_every_page_can_be_reached_from_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in DOCS.glob("*.md"):
        assert f"(docs/{page.name})" in text, page
