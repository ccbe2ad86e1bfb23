"""What an adapter stands on, and which tokenizer it is asked with, or one line that refuses."""

import json
import shutil
import warnings

import pytest
import torch
from conftest import DEMO
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from medqlora.core.config import Lora, Model
from medqlora.core.errors import ConfigError
from medqlora.engines.registry import RunSettings, open_engine, prepare_asking
from medqlora.model.adapter import attach_adapter, save_adapter
from medqlora.model.adapter_tokenizer import choose_tokenizer
from medqlora.model.base import ModelError, load_base
from medqlora.model.identity import architecture_hash
from medqlora.model.merging import merge

BASE = DEMO / "base"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Adapters by the quantization of their training; "elsewhere" is one of another program."""
    folders = {}
    for quantization in ("nf4", "int8", "none"):
        folder = tmp_path_factory.mktemp(quantization)
        base, _ = load_base(
            Model(base=str(BASE), quantization=quantization, dtype="float32"), torch.device("cpu")
        )
        metadata = {
            "base": str(BASE),
            "architecture_sha256": architecture_hash(base.config),
            "quantization": quantization,
            "double_quantization": True,
            "dtype": "float32",
            "prompt_style": "plain",
            "completion": "letter",
        }
        save_adapter(folder / "adapter", attach_adapter(base, Lora(r=4), 0), metadata)
        folders[quantization] = folder / "adapter"
    folders["elsewhere"] = tmp_path_factory.mktemp("elsewhere") / "adapter"
    shutil.copytree(folders["none"], folders["elsewhere"])
    (folders["elsewhere"] / "medqlora.json").unlink()
    return folders


OTHER = "another model"
# Trained on, flags, and the weights that run or what the refusal says.
CASES = [
    ("nf4", {}, "nf4"),
    ("nf4", {"dtype": "nf4"}, "nf4"),
    ("nf4", {"dtype": "auto"}, "nf4"),
    ("nf4", {"dtype": "fp4"}, "was trained on nf4 weights, not fp4"),
    ("nf4", {"dtype": "int8"}, "was trained on nf4 weights, not int8"),
    ("nf4", {"dtype": "bfloat16"}, OTHER),
    ("nf4", {"dtype": "float32"}, OTHER),
    ("nf4", {"dtype": "float32", "base_weights": "dequantized"}, "nf4"),
    ("nf4", {"dtype": "float32", "base_weights": "original"}, "float32"),
    ("nf4", {"base_weights": "original"}, "float32"),
    ("nf4", {"dtype": "nf4", "base_weights": "original"}, "leave one of the two out"),
    ("nf4", {"engine": "vllm"}, OTHER),
    ("nf4", {"engine": "vllm", "dtype": "bfloat16"}, OTHER),
    ("nf4", {"engine": "vllm", "base_weights": "dequantized"}, OTHER),
    ("int8", {}, "int8"),
    ("int8", {"engine": "vllm"}, OTHER),
    ("none", {}, "float32"),
    ("none", {"dtype": "bfloat16"}, "bfloat16"),
    ("none", {"dtype": "nf4"}, "nf4"),
    ("none", {"base_weights": "original"}, "float32"),
    ("elsewhere", {"dtype": "bfloat16"}, "bfloat16"),
    ("elsewhere", {"dtype": "nf4"}, "nf4"),
]


@pytest.mark.parametrize(("trained", "flags", "expected"), CASES)
def test_an_adapter_stands_on_the_weights_of_its_training(adapters, trained, flags, expected):
    settings = RunSettings(
        model=str(BASE), adapter=adapters[trained], prompt_style="plain", **flags
    )
    if expected in ("nf4", "int8", "float32", "bfloat16"):
        asking = prepare_asking(settings)
        assert open_engine(settings, asking, 0, None).weights == expected
        return
    with pytest.raises(ConfigError, match=expected) as caught:
        prepare_asking(settings)
    assert "\n" not in str(caught.value)


def test_base_weights_without_an_adapter_is_refused():
    with pytest.raises(ValueError, match="says what an adapter stands on"):
        RunSettings(model=str(BASE), base_weights="original")


# ---- the tokenizer beside an adapter -------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def beside(folder, adapters, change):
    """Copy the foreign adapter, and save a changed tokenizer of the base beside it."""
    shutil.copytree(adapters["elsewhere"], folder)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


def choose(adapter):
    return choose_tokenizer(str(BASE), None, adapter, AutoConfig.from_pretrained(BASE))


def pad(tokenizer):
    """What trainers leave in a saved tokenizer without another meaning for us."""
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    tokenizer("a", padding="max_length", max_length=8, truncation=True)


def set_template(tokenizer):
    tokenizer.chat_template = TEMPLATE


def set_end(tokenizer):
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(5)


def test_an_equal_tokenizer_beside_an_adapter_changes_nothing(adapters, tmp_path):
    _, differences = choose(beside(tmp_path / "adapter", adapters, pad))
    assert differences == []
    assert choose(adapters["elsewhere"])[1] == choose(None)[1] == []


@pytest.mark.parametrize(
    ("change", "difference"), [(set_template, "chat template"), (set_end, "end token")]
)
def test_a_tokenizer_beside_an_adapter_is_used_and_said(adapters, tmp_path, change, difference):
    adapter = beside(tmp_path / "adapter", adapters, change)
    settings = RunSettings(model=str(BASE), adapter=adapter)
    with pytest.warns(UserWarning, match=f"differs from the base's in {difference}; the adapter's"):
        encoder = prepare_asking(settings).encoder
    expected = AutoTokenizer.from_pretrained(BASE)
    change(expected)
    assert encoder.tokenizer.chat_template == expected.chat_template
    assert encoder.tokenizer.eos_token == expected.eos_token
    folders = (adapter, BASE, tmp_path / "merged")
    for _ in merge(*folders, AutoConfig.from_pretrained(BASE), {}, "original"):
        pass
    merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert (merged.chat_template, merged.eos_token) == (expected.chat_template, expected.eos_token)
    assert merged("Which?") == expected("Which?")


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_chat_template_alone_is_used(adapters, tmp_path, place):
    adapter = tmp_path / "adapter"
    shutil.copytree(adapters["elsewhere"], adapter)
    text = TEMPLATE if place.endswith("jinja") else json.dumps({"chat_template": TEMPLATE})
    (adapter / place).write_text(text)
    tokenizer, differences = choose(adapter)
    assert (tokenizer.chat_template, differences) == (TEMPLATE, ["chat template"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        asking = prepare_asking(RunSettings(model=str(BASE), adapter=adapter))
    assert asking.encoder.style == "chat"


def test_added_tokens_without_an_embedding_are_refused(adapters, tmp_path):
    adapter = beside(
        tmp_path / "adapter", adapters, lambda tokenizer: tokenizer.add_tokens(["<new>"])
    )
    with pytest.raises(ModelError, match=r"token '<new>' with id \d+, but the embedding has"):
        choose(adapter)


def test_added_tokens_with_an_embedding_are_used(adapters, tmp_path):
    adapter = beside(
        tmp_path / "adapter", adapters, lambda tokenizer: tokenizer.add_tokens(["<new>"])
    )
    rows = AutoConfig.from_pretrained(BASE).vocab_size + 1
    path = adapter / "adapter_model.safetensors"
    width = AutoConfig.from_pretrained(BASE).hidden_size
    weights = load_file(path) | {
        "base_model.model.model.embed_tokens.weight": torch.zeros(rows, width)
    }
    save_file(weights, path)
    tokenizer, differences = choose(adapter)
    assert "vocabulary" in differences
    assert tokenizer.convert_tokens_to_ids("<new>") == rows - 1


def test_another_vocabulary_is_refused(adapters, tmp_path):
    adapter = tmp_path / "adapter"
    beside(adapter, adapters, lambda tokenizer: None)
    path = adapter / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    names = list(vocabulary)[-2:]
    vocabulary[names[0]], vocabulary[names[1]] = vocabulary[names[1]], vocabulary[names[0]]
    path.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="is not that of the base"):
        choose(adapter)
