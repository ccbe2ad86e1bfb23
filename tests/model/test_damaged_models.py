"""Damaged and odd folders and paths end in one line, or change nothing; a sample of the sweep runs
in every tier.
"""

import json
import os
import shutil

import damages
import pytest
import torch
from conftest import DEMO, ROOT, run_inside
from test_merging import make_adapter, make_base

from medqlora.core.command import quiet_libraries
from medqlora.core.errors import UserError
from medqlora.core.staging import stage_folder
from medqlora.engines.interface import Request
from medqlora.engines.registry import RunSettings, open_engine, prepare_asking
from medqlora.model.adapter import read_adapter_metadata
from medqlora.model.base import load_tokenizer, read_model_config
from medqlora.model.merging import merge
from medqlora.prompts import chat_template
from medqlora.prompts.chat_template import make_encoder
from medqlora.prompts.fingerprint import fingerprint

REQUESTS = [Request([5, 6, 7, 8], [[9], [10], [11, 12]])]
LENGTH = 600  # characters of a message at most


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a base, the same in several files, and an adapter of each."""
    quiet_libraries()
    folder = tmp_path_factory.mktemp("whole")
    for name, shard in (("base", "10GB"), ("sharded", "300KB")):
        base = make_base(folder / name, shard=shard)
        make_adapter(base, folder / f"{name}-adapter", "nf4")
        path = folder / f"{name}-adapter" / "medqlora.json"
        metadata = json.loads(path.read_text())
        encoder = make_encoder(load_tokenizer(str(base)), "plain", "letter", {})
        metadata["prompt_sha256"] = fingerprint(encoder)
        # The hashes would notice nearly every damage; adapters of older versions have none.
        for key in ("weights_sha256", "config_sha256"):
            del metadata[key]
        path.write_text(json.dumps(metadata))
    return folder


def ask(base, adapter, style=None):
    """Do what eval/predict.py does with a model, and return all that its answers depend on."""
    settings = RunSettings(model=str(base), adapter=adapter, prompt_style=style)
    asking = prepare_asking(settings)
    engine = open_engine(settings, asking, 0, None)
    texts = ("Which drug?", "An ulcer  of 3 cm")
    ids = [asking.encoder.tokenizer(text)["input_ids"] for text in texts]
    return engine.score(REQUESTS, 0), ids, asking.encoder.frame


def merge_both(base, adapter):
    """Merge as recipes/merge_adapter.py --verify false does; return what the result answers."""
    output = base.parent / "merged"
    shutil.rmtree(output, ignore_errors=True)
    metadata = read_adapter_metadata(adapter)
    config = read_model_config(str(base))
    with stage_folder(output) as folder:
        for _ in merge(adapter, base, folder, config, metadata, "dequantized"):
            pass
    return ask(output, None)


def list_cases(whole):
    """Return kind, whole folder, what is done with it, and damages of it."""
    base, adapter = whole / "base", whole / "base-adapter"
    sharded, other = whole / "sharded", whole / "sharded-adapter"
    weights = list(damages.damage_weights("adapter_model.safetensors"))
    settings = [
        *damages.damage_json("adapter_config.json"),
        *damages.damage_keys("adapter_config.json", adapter, (True, -1, 0.5, 2**70, "odd", [], {})),
    ]
    metadata = [
        *damages.damage_json("medqlora.json"),
        *damages.damage_keys("medqlora.json", adapter),
    ]
    config = [*damages.damage_json("config.json"), *damages.damage_keys("config.json", base)]
    single = list(damages.damage_weights("model.safetensors"))
    index = list(damages.damage_index(sharded))
    index += damages.damage_json("model.safetensors.index.json")
    tokenizer = list(damages.damage_tokenizer(base))
    templates = [damage for damage in tokenizer if "template" in damage[0]]

    def ask_adapted(folder):
        return ask(base, folder)

    def merge_adapted(folder):
        return merge_both(base, folder)

    # An index says nothing of a folder where its only file has the usual name.
    return [
        ("adapter weights, asked", adapter, ask_adapted, weights),
        ("adapter weights, merged", adapter, merge_adapted, weights),
        ("adapter settings, asked", adapter, ask_adapted, settings),
        ("adapter settings, merged", adapter, merge_adapted, settings),
        ("adapter metadata, asked", adapter, ask_adapted, metadata),
        ("base config, asked", base, lambda folder: ask(folder, None), config),
        ("base weights, asked", base, lambda folder: ask(folder, None), single),
        ("base weights, merged", base, lambda folder: merge_both(folder, adapter), single),
        ("base index, asked", sharded, lambda folder: ask(folder, None), index),
        ("base index, merged", sharded, lambda folder: merge_both(folder, other), index),
        ("tokenizer, asked", base, lambda folder: ask(folder, adapter), tokenizer),
        ("templates, asked", base, lambda folder: ask(folder, None, "chat"), templates),
    ]


def judge(work, folder, expected):
    """Return "refused", "the same", or what is wrong."""
    try:
        found = work(folder)
    except UserError as error:
        text = str(error)
        return "refused" if "\n" not in text and len(text) < LENGTH else f"not one line: {text}"
    except Exception as error:  # noqa: BLE001
        return f"traceback: {type(error).__name__}: {error}"
    return "the same" if found == expected else "another result without a word"


def sweep(whole, tmp_path, every):
    """Try every so-many-th damage; return how many inputs were tried, and what went wrong."""
    tried = 0
    wrong = []
    for kind, source, work, cases in list_cases(whole):
        # Templates have no whole result: the base comes without one.
        expected = None if kind.startswith("templates") else work(source)
        for name, damage in cases[::every]:
            if name in damages.PLAUSIBLE:
                continue
            folder = tmp_path / "damaged"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(source, folder)
            damage(folder)
            tried += 1
            result = judge(work, folder, expected)
            if result not in ("refused", "the same"):
                wrong.append(f"{kind}: {name}: {result}")
    return tried, wrong


def test_a_sample_of_damages_is_one_line(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(chat_template, "LONGEST", 1)
    tried, wrong = sweep(whole, tmp_path, every=13)
    assert not wrong, "\n".join(wrong)
    assert tried > 60


@pytest.mark.full
def test_every_damage_is_one_line(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(chat_template, "LONGEST", 1)
    tried, wrong = sweep(whole, tmp_path, every=1)
    assert not wrong, f"{len(wrong)} of {tried}:\n" + "\n".join(wrong)
    assert tried > 900
    print(f"{tried} damaged folders")


def make_paths(folder):
    """Paths that no model, adapter or output can have."""
    (folder / "file").write_text("x")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere/further")
    return [
        "~nosuchuser/x",
        "x" * 300,
        str(folder / ("y" * 256) / "z"),
        "/".join(["d" * 200] * 25),
        str(folder / "file" / "x"),
        str(folder / "loop"),
        str(folder / "loop" / "x"),
        "/dev/null/x",
        "a\0b",
    ]


COMMANDS = {
    "model": ["eval/predict.py", "--model", "PATH"],
    "adapter": ["eval/predict.py", "--model", DEMO / "base", "--adapter", "PATH"],
    "predictions": ["eval/predict.py", "--model", DEMO / "base", "--output", "PATH/o.jsonl"],
    "merged adapter": ["recipes/merge_adapter.py", "--output", "new", "--adapter", "PATH"],
    "merged base": ["recipes/merge_adapter.py", "--output", "new", "--base", "PATH"],
    "merged output": ["recipes/merge_adapter.py", "--verify", "false", "--output", "PATH"],
    "trained base": ["recipes/sft_qlora.py", "--output_dir", "new", "--model.base", "PATH"],
    "initial adapter": [
        "recipes/sft_qlora.py",
        "--output_dir",
        "new",
        "--lora.init_adapter",
        "PATH",
    ],
    "run folder": ["recipes/sft_qlora.py", "--output_dir", "PATH"],
    "prepared base": ["recipes/prepare_data.py", "--model.base", "PATH"],
    "checked base": ["launch/preflight.py", "--model.base", "PATH"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_paths_that_cannot_be_looked_up_are_one_line(whole, tmp_path, name, monkeypatch):
    script, *flags = COMMANDS[name]
    if script == "eval/predict.py":
        flags += ["--format", "medmcqa", "--path", DEMO / "data" / "test.jsonl", "--limit", "2"]
        flags += [] if "--output" in flags else ["--output", "new.jsonl"]
    if script == "recipes/merge_adapter.py" and "--adapter" not in flags:
        flags += ["--adapter", whole / "base-adapter"]
    if script in ("recipes/prepare_data.py", "launch/preflight.py"):
        flags += ["--config", ROOT / "recipes" / "configs" / "demo.yaml"]
    if script == "launch/preflight.py":
        flags += ["--accelerate_config", ROOT / "accelerate_configs" / "cpu.yaml"]
    monkeypatch.chdir(tmp_path)
    for path in make_paths(tmp_path):
        arguments = [str(flag).replace("PATH", path) for flag in flags]
        code, err = run_inside(ROOT / script, arguments, monkeypatch)
        assert (code, err.count("\n")) == (2, 1), (path, err)
        # Tokens of the data may be kept in runs/ by then.
        assert set(os.listdir(tmp_path)) - {"runs"} == {"file", "loop", "dangling"}


def test_a_base_without_a_layer_or_a_bias_is_not_drawn_at_random(whole, tmp_path):
    """transformers only warns of tensors that are missing and of those that have no place."""
    for key, value, message in (
        ("num_hidden_layers", 1, r"no place for tensor model\.layers\.1"),
        ("num_hidden_layers", 3, r"lack tensor model\.layers\.2"),
        ("attention_bias", True, r"lack tensor .*bias"),
    ):
        shutil.copytree(whole / "base", tmp_path / f"{key}{value}")
        damages.change_key("config.json", (key,), value)(tmp_path / f"{key}{value}")
        with pytest.raises(UserError, match=message):
            ask(tmp_path / f"{key}{value}", None)


def test_a_model_that_gives_all_tokens_one_score_is_refused(whole, tmp_path):
    def silence(weights):
        return {name: torch.zeros_like(tensor) for name, tensor in weights.items()}

    shutil.copytree(whole / "base", tmp_path / "base")
    damages.change_tensors("model.safetensors", silence)(tmp_path / "base")
    with pytest.raises(UserError, match="every token the same probability"):
        ask(tmp_path / "base", None)
