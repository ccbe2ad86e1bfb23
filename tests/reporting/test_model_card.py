"""Model cards: their numbers are those of metrics.json, and what is not known is said."""

import json
import re

import pytest
import yaml
from conftest import DEMO, ROOT, run_inside, run_script
from huggingface_hub import ModelCard, metadata_load
from hypothesis import example, given
from hypothesis import strategies as st
from peft import PeftConfig

import medqlora
from medqlora.core.config_loading import dump_config, load_config
from medqlora.data.formats.registry import FORMATS
from medqlora.evaluation.comparison import compare_paired
from medqlora.evaluation.metrics import score_predictions
from medqlora.evaluation.predictions import collect_rows
from medqlora.model.adapter import read_adapter_metadata
from medqlora.reporting.card_metadata import make_name
from medqlora.reporting.card_tables import clean_cell
from medqlora.reporting.model_card import Merge, write_merged_card, write_run_card
from medqlora.reporting.numbers import interval, interval_points, percent, points

RECIPE = ROOT / "recipes" / "configs" / "demo.yaml"
METADATA = {
    "prompt_style": "plain",
    "completion": "letter",
    "lowercase": False,
    "prompt_sha256": "e" * 64,
    "base": "/models/some-base",
    "quantization": "nf4",
    "double_quantization": True,
    "dtype": "bfloat16",
    "step": 40,
}
FENCE = "````"
ENVIRONMENT = {
    "versions": {"python": "3.11", "torch": "2.13"},
    "hardware": {"cpu": "x86", "cores": 2, "gpus": []},
    "data_sha256": "d" * 64,
    "mixture": [
        {"entry": "data.train[0]", "format": "medmcqa", "path": "x", "rows": 1234, "row_share": 0.8}
    ],
    "data": ["data.train[0] medmcqa train.jsonl, split train: 1,234 rows | <b>answers</b>"],
    "prompt_examples": {"choice": {"prompt": f"Which?\n{FENCE}\nAnswer:", "completion": " C"}},
}


def answer(rights, model):
    return collect_rows(
        {
            "id": f"q{number}",
            "gold": "A",
            "prediction": "A" if right else "B",
            "option_logprobs": {"A": -0.5, "B": -1.0} if right else {"A": -1.0, "B": -0.5},
            "subject": "Anatomy" if number % 3 else "Skin | <b>bone</b>",
            "model": model,
        }
        for number, right in enumerate(rights)
    )


def make_metrics(base=(1, 0, 0, 1, 0) * 15, tuned=(1, 1, 0, 1, 0) * 15):
    before, after = answer(base, "base"), answer(tuned, "tuned")
    return {
        "steps": 50,
        "best_step": 40,
        "eval_loss": 0.4567891234,
        "perplexity": 1.5790123456,
        "memory_bytes": {"peak": 3 * 2**30},
        **score_predictions(after),
        "base": score_predictions(before),
        "comparison": compare_paired(before.right, after.right),
    }


def make_run(folder, metrics=None, config=None, metadata=METADATA, **flags):
    """A finished run, as far as a card reads it."""
    config = config or load_config(RECIPE, [f"--{key}={value}" for key, value in flags.items()])
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "medqlora.json").write_text(json.dumps(metadata))
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "train_log.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    (folder / "removed.jsonl").write_text('{"source": "s", "id": "", "reason": "r"}\n' * 3)
    (folder / "metrics.json").write_text(json.dumps(metrics or make_metrics()))
    return folder


def read_card(folder):
    """The front matter, as the hub's library reads it, and the text of a card."""
    card = ModelCard.load(folder / "README.md")
    assert metadata_load(folder / "README.md") == yaml.safe_load(card.data.to_yaml())
    return card.data, card.text


def test_results_are_those_of_metrics_json(tmp_path):
    metrics = make_metrics()
    write_run_card(make_run(tmp_path / "run", metrics))
    data, text = read_card(tmp_path / "run" / "adapter")
    accuracy, perplexity = data.eval_results
    assert (accuracy.metric_type, accuracy.metric_value) == ("accuracy", metrics["accuracy"])
    assert accuracy.metric_args == {"ci95": metrics["accuracy_ci95"], "n": metrics["n"]}
    assert (perplexity.metric_type, perplexity.metric_value) == (
        "perplexity",
        metrics["perplexity"],
    )
    cells = [
        f"{percent(scores['accuracy'])} ({interval(scores['accuracy_ci95'])})"
        for scores in (metrics["base"], metrics)
    ]
    assert f"| accuracy | 75 | {cells[0]} | {cells[1]} |" in text
    change = metrics["comparison"]
    assert f"{points(change['difference'])} points" in text
    assert interval_points(change["difference_ci95"]) in text
    for name, scores in metrics["per_subject"].items():
        bounds = f"{percent(scores['accuracy'])} ({interval(scores['accuracy_ci95'])}) |"
        assert bounds in next(
            line for line in text.splitlines() if line.startswith(f"| {name[:4]}")
        )
    assert "0.4568 nats" in text


def test_open_answers_have_their_own_scores(tmp_path):
    metrics = {"steps": 5, "best_step": 40, "n": 30}
    for key, value in (("exact_match", 0.25), ("f1", 0.5), ("rouge_l", 0.625)):
        metrics |= {key: value, f"{key}_ci95": [value - 0.125, value + 0.125]}
    write_run_card(make_run(tmp_path / "run", metrics))
    data, text = read_card(tmp_path / "run" / "adapter")
    assert [result.metric_value for result in data.eval_results] == [0.25, 0.5, 0.625]
    assert "| F1 of words | 30 | – | 50.0 % (37.5 – 62.5) |" in text


def test_without_scores_the_card_says_so(tmp_path):
    write_run_card(make_run(tmp_path / "run", {"steps": 5, "best_step": 40}))
    data, text = read_card(tmp_path / "run" / "adapter")
    assert data.eval_results is None
    assert "model_name" not in data.to_dict()
    assert "**No answers were scored.**" in text
    assert "on no questions at all" in text


def test_front_matter_tells_the_hub_what_is_known(tmp_path):
    train = '[{"format": "medmcqa"}, {"format": "medquad", "path": "owner/questions"}]'
    run = make_run(
        tmp_path / "run",
        metadata=METADATA | {"base": "owner/base", "revision": "abc"},
        **{"data.train": train, "data.test": '[{"format": "pubmedqa", "test_pmids": "x"}]'},
    )
    write_run_card(run)
    data, text = read_card(run / "adapter")
    assert (data.base_model, data.base_model_relation) == ("owner/base", "adapter")
    assert (data.library_name, data.pipeline_tag) == ("peft", "text-generation")
    assert data.datasets == ["openlifescienceai/medmcqa", "owner/questions"]
    assert data.language == ["en"]
    assert data.eval_results[0].dataset_type == "qiaojin/PubMedQA"
    assert {"medical", "qlora"} <= set(data.tags)
    assert f"| {clean_cell(FORMATS['medmcqa'].license)} |" in text
    # The questions of somebody else stand under their own licence.
    assert "not known; that of lavita/MedQuAD itself is CC BY 4.0" in text
    assert "(commit `abc`)" in text


def test_a_file_is_no_dataset_of_the_hub(tmp_path):
    """A file in MedMCQA's layout may hold anything, so neither name nor licence is taken for it."""
    write_run_card(make_run(tmp_path / "run"))
    data, text = read_card(tmp_path / "run" / "adapter")
    assert (data.datasets, data.language, data.base_model, data.license) == (None,) * 4
    assert "not known; that of openlifescienceai/medmcqa itself is" in text
    assert "medmcqa train.jsonl" in text
    assert "| train | mcq general.jsonl | – | – | – | not known |" in text


def test_nothing_of_this_machine_is_published(tmp_path):
    write_run_card(make_run(tmp_path / "run"))
    content = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert str(tmp_path) not in content
    assert str(ROOT) not in content
    assert "`some-base`" in content


@pytest.mark.parametrize(
    ("card", "license"),
    [
        ("---\nlicense: gemma\n---\n# Base\n", "gemma"),
        ("---\nlicense: other\nlicense_name: llama3\n---\n", "other"),
        ("---\nlicense: [a\n---\n", None),
        ("---\nlicense: 5\n---\n", None),
        ("no front matter", None),
        (None, None),
    ],
)
def test_the_licence_of_the_base_is_that_of_its_card(tmp_path, card, license):
    base = tmp_path / "base"
    base.mkdir()
    if card is not None:
        (base / "README.md").write_text(card)
    run = make_run(tmp_path / "run", metadata=METADATA | {"base": str(base)})
    write_run_card(run)
    data, text = read_card(run / "adapter")
    assert data.license == license
    assert ("The base: not known here" in text) == (license is None)


def test_texts_of_others_are_no_markup(tmp_path):
    write_run_card(make_run(tmp_path / "run"))
    _, text = read_card(tmp_path / "run" / "adapter")
    assert r"rows \| \<b\>answers\</b\>" in text
    # A prompt with a fence of its own stands in a longer one.
    assert f"`{FENCE}text\nWhich?\n{FENCE}\nAnswer:⟦ C⟧\n`{FENCE}" in text


@pytest.mark.parametrize(
    ("formats", "said", "unsaid"),
    [
        (["text"], ["plain texts, which have no prompts"], ["learned to write", "Which?"]),
        (["medquad"], ["learned to write the answer's text"], ["`letter`", "Which?"]),
        (["medmcqa", "text"], ["learned to write `letter`", "Which?"], ["plain texts"]),
    ],
)
def test_prompts_are_those_that_were_trained(tmp_path, formats, said, unsaid):
    entries = json.dumps([{"format": name, "path": "some.jsonl"} for name in formats])
    write_run_card(make_run(tmp_path / "run", **{"data.train": entries}))
    text = read_card(tmp_path / "run" / "adapter")[1].partition("## Prompts")[2]
    prompts = text.partition("## Training")[0]
    assert all(words in prompts for words in said)
    assert not any(words in prompts for words in unsaid)


@given(st.text())
@example("a|b`c\n| d | <script>")
def test_a_cell_stays_one_cell(text):
    cell = clean_cell(text)
    assert len(cell.splitlines()) <= 1
    assert not re.search(r"(?<!\\)(\\\\)*[|`<>*_\[\]]", cell)


@given(st.text())
@example("my run (old)")
def test_names_are_those_of_repositories(name):
    assert re.fullmatch(r"[A-Za-z0-9_][\w.-]*", make_name(name), re.ASCII)


def test_an_edited_card_is_kept(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    path = run / "adapter" / "README.md"
    script = ROOT / "eval" / "report.py"
    assert "hf upload OWNER/run" in write_run_card(run)
    # One that nobody has touched is written again, with the predictions that have come since.
    (run / "predictions").mkdir()
    row = {"id": "1", "gold": "A", "prediction": "A", "model": "/m/base+/m/adapter", "engine": "hf"}
    (run / "predictions" / "medqa.jsonl").write_text(json.dumps(row) + "\n")
    assert run_inside(script, [run, "--card"], monkeypatch) == (0, "")
    content = path.read_text()
    assert "| medqa.jsonl | base+adapter | hf | 1 | accuracy 100.0 % (20.7 – 100.0) |" in content
    path.write_text(content.replace("research", "studies"))
    code, complaint = run_inside(script, [run, "--card"], monkeypatch)
    assert (code, complaint.count("\n")) == (2, 1)
    assert "is kept" in write_run_card(run, keep_edited=True)
    assert "studies" in path.read_text()
    code, complaint = run_inside(script, [run], monkeypatch)
    assert (code, complaint.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.json", '{"accuracy": "high"}', "metrics.json: accuracy"),
        ("metrics.json", '{"accuracy_ci95": [0.1]}', "metrics.json: accuracy_ci95"),
        ("metrics.json", '{"f1": 0.5, "n": 3}', "f1 needs n and f1_ci95"),
        (
            "environment.json",
            '{"prompt_examples": {"choice": {}}}',
            "prompt_examples.choice.prompt",
        ),
        ("environment.json", '{"mixture": [{"entry": 1}]}', "environment.json: mixture"),
        ("config.yaml", "model: {}", "config.yaml: model.base"),
        ("config.yaml", "", "config.yaml: the file"),
    ],
)
def test_damaged_runs_are_refused_in_one_line(tmp_path, monkeypatch, name, content, message):
    run = make_run(tmp_path / "run")
    (run / name).write_text(content)
    code, complaint = run_inside(ROOT / "eval" / "report.py", [run, "--card"], monkeypatch)
    assert (code, complaint.count("\n")) == (2, 1)
    assert message in complaint
    assert not (run / "adapter" / "README.md").exists()


CHECK = {"mean_relative_error": 0.01, "max_relative_error": 0.02, "same_top_token": 1.0}


@pytest.mark.parametrize(
    ("merge", "measured"),
    [
        (Merge("dequantized", CHECK), True),
        (Merge("dequantized", None), False),
        (Merge("original", CHECK), False),
    ],
)
def test_a_merged_model_has_results_only_where_it_is_the_trained_one(tmp_path, merge, measured):
    metrics = make_metrics()
    run = make_run(tmp_path / "run", metrics)
    merged = tmp_path / "merged"
    merged.mkdir()
    (merged / "medqlora.json").write_text(json.dumps(METADATA))
    assert write_merged_card(merged, "merged", run / "adapter", merge) is None
    data, text = read_card(merged)
    assert (data.library_name, data.base_model_relation) == ("transformers", "finetune")
    assert bool(data.eval_results) == measured
    assert ("before it was merged" in text) == measured
    assert ("and was not measured" in text) != measured
    assert f"| accuracy | 75 | {percent(metrics['base']['accuracy'])}" in text


@pytest.mark.parametrize(
    ("step", "config", "metadata", "message"),
    [
        (None, None, METADATA, "no run folder"),
        (20, None, METADATA, "of step 20"),
        (40, "a: [", METADATA, "not valid YAML"),
        (40, "model: 3", METADATA, "config.yaml"),
        (40, None, {}, "of step None"),
    ],
)
def test_a_merged_model_without_its_run_says_so(tmp_path, step, config, metadata, message):
    """The adapter lies alone, or beside files that are damaged or of another step."""
    run = make_run(tmp_path / "run", make_metrics() | {"best_step": step}, metadata=metadata)
    if step is None:
        (run / "metrics.json").unlink()
    if config is not None:
        (run / "config.yaml").write_text(config)
    reason = write_merged_card(run / "adapter", "m", run / "adapter", Merge("dequantized", CHECK))
    assert message in reason
    data, text = read_card(run / "adapter")
    assert data.eval_results is None
    assert "What it was trained on is not known." in text


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == medqlora.__version__
    assert {"cff-version", "message", "title", "authors"} <= set(citation)


@pytest.mark.full
def test_cards_of_a_real_run_and_of_its_merged_model(tmp_path):
    limits = {"train.0": 60, "eval.0": 10, "test.0": 24}
    flags = [part for key, n in limits.items() for part in (f"--data.{key}.limit", str(n))]
    flags += ["--training.max_steps", "2", "--data.cache_dir", tmp_path / "cache"]
    run = tmp_path / "run"
    done = run_script("recipes/sft_qlora.py", "--output_dir", run, *flags)
    assert done.returncode == 0, done.stderr
    assert f"hf upload OWNER/run {run / 'adapter'}" in done.stdout.replace("\n", " ")
    metrics = json.loads((run / "metrics.json").read_text())
    # The card changes neither what the adapter is nor how it is read.
    assert read_adapter_metadata(run / "adapter")["step"] == 2
    assert PeftConfig.from_pretrained(run / "adapter").r == 32
    merged = tmp_path / "merged"
    done = run_script("recipes/merge_adapter.py", "--adapter", run / "adapter", "--output", merged)
    assert done.returncode == 0, done.stderr
    assert "hf upload OWNER/merged" in done.stdout
    for folder in (run / "adapter", merged):
        data, text = read_card(folder)
        assert data.eval_results[0].metric_value == metrics["accuracy"]
        assert "Question: Which?\nA. one" in text
    assert str(DEMO) not in (merged / "README.md").read_text()
