"""Every shipped recipe trains, scores and merges at its own configuration, on a small model of its
own family and a small part of its own data. Only the model's size, the steps and the batch differ.
"""

import itertools
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from conftest import DEMO, ROOT, real, real_tokenizer, run_inside
from transformers import AutoModelForCausalLM, AutoTokenizer

from medqlora.training.memory.architectures import read_architecture

CONFIGS = ROOT / "recipes" / "configs"
ARCHITECTURES = ROOT / "bench" / "architectures"
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,  # vLLM's kernels for CPUs know this width
}
# Families whose tokenizer is among the real data; the demonstration's stands in for the others.
TOKENIZERS = {"meta-llama": "llama-3", "Qwen": "qwen2.5", "microsoft": "phi-3"}
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}> {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
ROWS = 6  # of each entry
# The quick tier has one recipe of each kind of data; the full tier has all.
QUICK = ("phi3-mini_pubmedqa", "phi3-mini_medquad", "gemma-2b_medmcqa")
RECIPES = [
    pytest.param(path.stem, marks=[] if path.stem in QUICK else pytest.mark.full)
    for path in sorted(CONFIGS.glob("*.yaml"))
    # The second is the first stage of llama3-8b_medqa and is trained with it.
    if path.stem not in ("demo", "llama3-8b_textbooks")
    and not path.stem.endswith("_stages")
    and not path.stem.startswith("search_")
]


def load_recipe(name: str) -> dict:
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))


def take(path: Path, rows: int) -> list[str]:
    with path.open(encoding="utf-8") as file:
        return list(itertools.islice(file, rows))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Small parts of the real data, in folders and files that are named as published."""
    folder = tmp_path_factory.mktemp("data")
    medqa = take(real("medqa/dev_4_options.jsonl"), 120)
    us = folder / "data_clean" / "questions" / "US"
    # Of the training questions, a tenth must be enough to validate with.
    parts = {"train": medqa[2 * ROWS :], "dev": medqa[:ROWS], "test": medqa[ROWS : 2 * ROWS]}
    for split, rows in parts.items():
        text = "".join(rows)
        write(us / "4_options" / f"phrases_no_exclude_{split}.jsonl", text)
        write(us / f"{split}.jsonl", text)
    for book in real("textbooks").glob("*.txt"):
        beginning = book.read_text(encoding="utf-8")[:40_000]
        write(folder / "data_clean" / "textbooks" / "en" / book.name, beginning)
    rows = json.loads(real("pubmedqa/pqal_train.json").read_text())
    labelled = dict(itertools.islice(rows.items(), 2 * ROWS))
    write(folder / "pubmedqa" / "ori_pqal.json", json.dumps(labelled))
    truth = {pmid: row["final_decision"] for pmid, row in [*labelled.items()][:ROWS]}
    write(folder / "pubmedqa" / "test_ground_truth.json", json.dumps(truth))
    write(
        folder / "medmcqa" / "train.jsonl", "".join(take(real("medmcqa/train_partial.jsonl"), 40))
    )
    validation = take(real("medmcqa/validation_part.jsonl"), 40)
    write(folder / "medmcqa" / "validation.jsonl", "".join(validation))
    medquad = take(real("medquad/medquad.jsonl"), 400)[::7]
    write(folder / "medquad.jsonl", "".join(medquad))
    general = [json.loads(row) for row in medquad]
    general = [{"instruction": row["answer"], "response": row["question"]} for row in general]
    write(folder / "general.jsonl", "\n".join(map(json.dumps, general)))
    return folder


def localize(entry: dict, data: Path) -> dict:
    """A recipe's data entry with a small file in the place of its own."""
    path = str(entry.get("path") or "")
    homes = {"medqa": "data_clean/questions/US/4_options", "pubmedqa": "pubmedqa"}
    homes |= {"medmcqa": "medmcqa", "medquad": "medquad.jsonl", "qa": "general.jsonl"}
    home = homes.get(entry["format"], "")
    if "data_clean" in path:
        home = "data_clean" + path.partition("data_clean")[2]
    # medmcqa's hub counts options from 0 and is all 0 to 3; these files are the original ones.
    more = {"answer_is": "index1"} if entry["format"] == "medmcqa" else {}
    limit = min(entry.get("limit", ROWS), ROWS)
    return entry | {"path": str(data / home), "limit": limit} | more


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A maker of small models of a hub model's family; each is made once."""
    folder = tmp_path_factory.mktemp("bases")

    def make(hub_id: str) -> Path:
        base = folder / hub_id.replace("/", "_")
        if base.exists():
            return base
        owner = hub_id.partition("/")[0]
        tokenizer = AutoTokenizer.from_pretrained(DEMO / "base")
        if owner in TOKENIZERS:
            real(f"tokenizers/{TOKENIZERS[owner]}")
            tokenizer = real_tokenizer(TOKENIZERS[owner])
        given = tokenizer.chat_template
        instructed = "nstruct" in hub_id or hub_id.endswith("-it")
        tokenizer.chat_template = (given or TEMPLATE) if instructed else None
        config = read_architecture(hub_id, ARCHITECTURES)
        for key, value in (SMALL | {"vocab_size": len(tokenizer)}).items():
            setattr(config, key, value)
        ids = ("pad_token_id", "bos_token_id", "eos_token_id")
        for key in ids:
            setattr(config, key, getattr(tokenizer, key))
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:2]
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(base)
        tokenizer.save_pretrained(base)
        tokenizer.chat_template = given  # It is shared by all tests of this process.
        return base

    return make


@pytest.fixture(scope="module")
def train(tmp_path_factory, data, bases):
    """A runner of recipes -> the run folder; each recipe is run once."""
    folder = tmp_path_factory.mktemp("runs")

    def run(name: str, monkeypatch, *more: str) -> Path:
        tree = load_recipe(name)
        output = folder / name
        if output.exists():
            return output
        arguments = ["--config", CONFIGS / f"{name}.yaml", "--output_dir", output]
        arguments += ["--model.base", bases(tree["model"]["base"])]
        for role in ("train", "eval", "test"):
            if role in tree["data"]:
                entries = [localize(entry, data) for entry in tree["data"][role]]
                arguments += [f"--data.{role}", json.dumps(entries)]
        # A step holds at least one of the longest rows.
        batch = tree["data"].get("max_length", 1024)
        arguments += ["--training.global_batch_tokens", batch, "--training.max_steps", 2]
        arguments += ["--data.max_new_tokens", 4, "--data.cache_dir", folder / "cache", *more]
        recipe = ROOT / "recipes" / "sft_qlora.py"
        code, complaint = run_inside(recipe, arguments, monkeypatch)
        assert code == 0, complaint
        return output

    return run


def merge(output: Path, merged: Path, monkeypatch) -> None:
    arguments = ["--adapter", output / "adapter", "--output", merged]
    script = ROOT / "recipes" / "merge_adapter.py"
    assert run_inside(script, arguments, monkeypatch) == (0, "")
    assert (merged / "config.json").is_file()


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains_scores_and_merges(name, train, monkeypatch, tmp_path):
    tree = load_recipe(name)
    more = []
    if "init_adapter" in tree.get("lora", {}):
        first = Path(tree["lora"]["init_adapter"]).parent.name
        more = ["--lora.init_adapter", train(first, monkeypatch) / "adapter"]
    output = train(name, monkeypatch, *more)
    log = [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log if "loss" in row] == [1, 2]
    metrics = json.loads((output / "metrics.json").read_text())
    if "test" in tree["data"]:
        assert 0 < metrics["n"] <= ROWS
        tuned = (output / "predictions" / "tuned.jsonl").read_text().splitlines()
        assert len(tuned) == metrics["n"] == metrics["base"]["n"]
    if "eval" in tree["data"]:
        assert metrics["perplexity"] > 1
    merge(output, tmp_path / "merged", monkeypatch)


@pytest.mark.full
@pytest.mark.skipif(
    "MEDQLORA_VLLM_PYTHON" not in os.environ,
    reason="vLLM is not here; set MEDQLORA_VLLM_PYTHON to a Python that has it",
)
def test_a_merged_recipe_is_served_by_vllm(train, data, monkeypatch, tmp_path):
    # phi3-mini_medquad answers by text; this recipe shares its base and answers by letter.
    output = train("phi3-mini_pubmedqa", monkeypatch)
    merge(output, tmp_path / "merged", monkeypatch)
    asked = tmp_path / "vllm.jsonl"
    flags = f"--format pubmedqa --path {data / 'pubmedqa'} --split test --limit {ROWS}"
    command = [
        os.environ["MEDQLORA_VLLM_PYTHON"],
        "eval/predict.py",
        *("--model", tmp_path / "merged", *flags.split()),
        *("--engine", "vllm", "--dtype", "float32", "--output", asked),
    ]
    environ = os.environ | {
        "PYTHONPATH": str(ROOT),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    done = subprocess.run(
        [*map(str, command)], cwd=ROOT, env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    tuned = map(json.loads, (output / "predictions" / "tuned.jsonl").read_text().splitlines())
    trained = {row["id"]: row for row in tuned}
    for row in map(json.loads, asked.read_text().splitlines()):
        assert row["prompt_sha256"] == trained[row["id"]]["prompt_sha256"]
        for letter, value in row["option_logprobs"].items():
            # The merged weights are rounded to 16 bits.
            assert value == pytest.approx(trained[row["id"]]["option_logprobs"][letter], abs=0.05)
