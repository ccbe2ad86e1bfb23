"""Merged is adapter + the weights that were trained on; a wrong base is refused; memory stays at a
few tensors.
"""

import json
import shutil

import pytest
import torch
from conftest import DEMO, ROOT, SMALL, build_model, run_script
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    GPT2Config,
    MixtralConfig,
    Qwen2MoeConfig,
)

from medqlora.core.config import Lora, Model
from medqlora.core.errors import UserError
from medqlora.core.staging import stage_folder
from medqlora.engines.packed_passes import run_packed
from medqlora.model.adapter import adapter_weights, attach_adapter, load_adapter, save_adapter
from medqlora.model.adapter_preview import preview_adapter
from medqlora.model.base import ModelError, load_base, unwrap
from medqlora.model.checkpoint_names import make_skeleton, quantized_modules
from medqlora.model.head_loss import compute_logits
from medqlora.model.identity import architecture_hash, sample_weights
from medqlora.model.merging import compare_logits, merge
from medqlora.model.weight_files import MergeError, list_shards

CPU = torch.device("cpu")
ROWS = [[5, 6, 7, 8, 9, 10], [20, 30, 40], list(range(50, 90))]


def make_base(folder, architecture="llama", tied=True, shard="10GB"):
    model = build_model(architecture, tie_word_embeddings=tied, vocab_size=1536)
    model.save_pretrained(folder, max_shard_size=shard)
    AutoTokenizer.from_pretrained(DEMO / "base").save_pretrained(folder)
    return folder


def make_adapter(base, folder, quantization, **lora):
    settings = Model(base=str(base), quantization=quantization, dtype="float32")
    model = attach_adapter(load_base(settings, CPU)[0], Lora(r=4, **lora), 0)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        if "magnitude" in name:
            parameter.data.mul_(1.2)
    metadata = {
        "base": str(base),
        "architecture_sha256": architecture_hash(AutoConfig.from_pretrained(base)),
        "dtype": "float32",
        "base_sha256": sample_weights(base),
        "quantization": quantization,
        "double_quantization": True,
        "prompt_style": "plain",
        "completion": "letter",
    }
    save_adapter(folder, model, metadata)
    return model, metadata


def logits(model):
    model.eval()
    causal = unwrap(model)
    with torch.no_grad():
        return [compute_logits(causal, run_packed(causal, "varlen", [row])[-1:])[0] for row in ROWS]


def load_plain(folder):
    return load_base(Model(base=str(folder), quantization="none", dtype="float32"), CPU)[0]


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8", "none"])
def test_merged_is_the_trained_model(tmp_path, architecture, variant, quantization):
    if (variant, quantization) == ("dora", "int8"):
        return  # refused by the configuration
    # int8 training also rounds activations, which no merged weight can show
    bound = 0.05 if quantization == "int8" else 1e-4
    base = make_base(tmp_path / "base", architecture)
    trained, metadata = make_adapter(base, tmp_path / "adapter", quantization, variant=variant)
    for _ in merge(
        tmp_path / "adapter",
        base,
        tmp_path / "merged",
        AutoConfig.from_pretrained(base),
        metadata,
        "dequantized",
    ):
        pass
    figures = compare_logits(logits(trained), logits(load_plain(tmp_path / "merged")))
    assert figures["max_relative_error"] < bound
    assert figures["same_top_token"] == 1 or quantization == "int8"


# Models whose files have other names or layouts than the loaded model.
LAYOUTS = {
    "gpt2": (GPT2Config(vocab_size=1536, n_embd=64, n_layer=2, n_head=4, n_positions=512), {}),
    "gpt2 as the hub has it": (
        GPT2Config(vocab_size=1536, n_embd=64, n_layer=2, n_head=4, n_positions=512),
        {},
    ),
    "mixtral": (
        MixtralConfig(**SMALL | {"vocab_size": 1536}, num_local_experts=4),
        {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    ),
    "qwen2_moe": (
        Qwen2MoeConfig(
            **SMALL | {"vocab_size": 1536},
            num_experts=4,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
        ),
        {},
    ),
    "gemma3 with vision": (
        Gemma3Config(
            text_config=SMALL | {"vocab_size": 1536, "head_dim": 16, "query_pre_attn_scalar": 16},
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            mm_tokens_per_image=4,
        ),
        {},
    ),
}


def make_other_base(folder, config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_that_transformers_converts_are_merged(tmp_path, name, quantization):
    config, lora = LAYOUTS[name]
    base = make_other_base(tmp_path / "base", config)
    if "hub" in name:  # Its files are those of the model without a head.
        weights = load_file(base / "model.safetensors")
        weights = {key.removeprefix("transformer."): value for key, value in weights.items()}
        save_file(weights, base / "model.safetensors", {"format": "pt"})
    trained, metadata = make_adapter(base, tmp_path / "adapter", quantization, **lora)
    assert preview_adapter(config, Lora(r=4, **lora)).unmergeable is None
    folders = (tmp_path / "adapter", base, tmp_path / "merged")
    for _ in merge(*folders, AutoConfig.from_pretrained(base), metadata, "dequantized"):
        pass
    figures = compare_logits(logits(trained), logits(load_plain(tmp_path / "merged")))
    assert figures["max_relative_error"] < 1e-4


def test_an_adapter_with_the_names_of_an_older_transformers_is_read(tmp_path):
    base = make_other_base(tmp_path / "base", LAYOUTS["gemma3 with vision"][0])
    lora = {"target_modules": ["gate_proj", "down_proj"]}  # The vision model has no such layer.
    trained, _ = make_adapter(base, tmp_path / "adapter", "none", **lora)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    new, old = "model.model.language_model.", "model.language_model.model."
    weights = load_file(path)
    assert all(new in key for key in weights)
    save_file({key.replace(new, old): value for key, value in weights.items()}, path)
    (tmp_path / "adapter" / "medqlora.json").unlink()
    loaded = load_adapter(load_plain(base), tmp_path / "adapter")
    folders = (tmp_path / "adapter", base, tmp_path / "merged")
    for _ in merge(*folders, AutoConfig.from_pretrained(base), {}, "original"):
        pass
    for other in (loaded, load_plain(tmp_path / "merged")):
        assert compare_logits(logits(trained), logits(other))["max_relative_error"] < 1e-4


def test_an_adapter_of_experts_is_announced_and_evaluated_but_not_merged(tmp_path):
    config = LAYOUTS["mixtral"][0]
    preview = preview_adapter(config, Lora(r=4))
    base = make_other_base(tmp_path / "base", config)
    trained, metadata = make_adapter(base, tmp_path / "adapter", "nf4")
    trainable = [weight for weight in trained.parameters() if weight.requires_grad]
    if preview.unmergeable is None:
        pytest.skip("this version of PEFT leaves the experts alone")
    assert preview.trained_parameters == sum(weight.numel() for weight in trainable)
    kept = sum(
        weight.numel()
        for name, weight in trained.named_parameters()
        if weight.dim() > 1 and "experts" in name and "lora_" not in name
    )
    routers = sum(layer.mlp.gate.weight.numel() for layer in unwrap(trained).model.layers)
    assert preview.kept_parameters == kept + routers
    loaded = load_base(Model(base=str(base), quantization="nf4", dtype="float32"), CPU)[0]
    loaded = load_adapter(loaded, tmp_path / "adapter")
    assert compare_logits(logits(trained), logits(loaded))["max_relative_error"] < 1e-5
    folders = (tmp_path / "adapter", base, tmp_path / "merged")
    with pytest.raises(ModelError, match=r"target_parameters .* cannot be merged"):
        next(merge(*folders, AutoConfig.from_pretrained(base), metadata, "original"))


def test_original_base_is_another_model_after_nf4_training(tmp_path):
    base = make_base(tmp_path / "base")
    trained, metadata = make_adapter(base, tmp_path / "adapter", "nf4")
    errors = {}
    for kind in ("dequantized", "original"):
        for _ in merge(
            tmp_path / "adapter",
            base,
            tmp_path / kind,
            AutoConfig.from_pretrained(base),
            metadata,
            kind,
        ):
            pass
        errors[kind] = compare_logits(logits(trained), logits(load_plain(tmp_path / kind)))[
            "mean_relative_error"
        ]
    assert errors["dequantized"] < 1e-4 < 0.02 < errors["original"]


@pytest.mark.parametrize("tied", [True, False])
def test_shards_tokenizer_and_config_are_carried(tmp_path, tied):
    base = make_base(tmp_path / "base", tied=tied, shard="150KB")
    trained, metadata = make_adapter(base, tmp_path / "adapter", "none")
    for _ in merge(
        tmp_path / "adapter",
        base,
        tmp_path / "merged",
        AutoConfig.from_pretrained(base),
        metadata,
        "dequantized",
    ):
        pass
    names = [path.name for path in list_shards(base)]
    assert len(names) > 2
    assert [path.name for path in list_shards(tmp_path / "merged")] == names
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")  # without this project's code
    assert stock.config.tie_word_embeddings is tied
    assert (
        "lm_head.weight"
        in {key for path in list_shards(tmp_path / "merged") for key in load_file(path)}
    ) is not tied
    assert (
        compare_logits(logits(trained), logits(load_plain(tmp_path / "merged")))[
            "max_relative_error"
        ]
        < 1e-4
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")(
        "Which?"
    ) == AutoTokenizer.from_pretrained(base)("Which?")
    assert "quantization_config" not in json.loads(
        (tmp_path / "merged" / "config.json").read_text()
    )


def test_quantized_modules_are_those_the_library_quantizes(tmp_path):
    for tied in (True, False):
        base = make_base(tmp_path / f"base{tied}", tied=tied)
        model = load_base(Model(base=str(base), quantization="nf4", dtype="float32"), CPU)[0]
        found = {
            name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"
        }
        assert quantized_modules(make_skeleton(AutoConfig.from_pretrained(base))) == found


def test_wrong_shapes_leave_nothing_behind(tmp_path):
    base = make_base(tmp_path / "base")
    _, metadata = make_adapter(base, tmp_path / "adapter", "none")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(
        {
            key: value[:, :-1].contiguous() if "lora_A" in key else value
            for key, value in load_file(path).items()
        },
        path,
    )
    config = AutoConfig.from_pretrained(base)
    with (
        pytest.raises(MergeError, match="not the base"),
        stage_folder(tmp_path / "merged") as folder,
    ):
        list(merge(tmp_path / "adapter", base, folder, config, metadata, "original"))
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_command_verifies_and_refuses_another_base(tmp_path):
    base = make_base(tmp_path / "base")
    make_adapter(base, tmp_path / "adapter", "nf4")
    script = ROOT / "recipes" / "merge_adapter.py"
    done = run_script(script, "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    assert "relative logit error" in done.stdout
    again = run_script(script, "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged")
    assert (again.returncode, "exists" in again.stderr) == (2, True)
    shutil.copytree(base, tmp_path / "sibling")
    weights = load_file(tmp_path / "sibling" / "model.safetensors")
    save_file(
        {key: value + 0.01 for key, value in weights.items()},
        tmp_path / "sibling" / "model.safetensors",
        {"format": "pt"},
    )
    other = run_script(
        script,
        "--adapter",
        tmp_path / "adapter",
        "--output",
        tmp_path / "x",
        "--base",
        tmp_path / "sibling",
    )
    assert (other.returncode, other.stderr.count("\n")) == (2, 1)
    assert "not those the adapter was trained on" in other.stderr
    assert not (tmp_path / "x").exists()


NAN_LOGITS = """
import runpy, sys
from medqlora.model import merging
compare = merging.compare_logits

def spoil(reference, merged):
    return compare(reference, [logits * float("nan") for logits in merged])

merging.compare_logits = spoil
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_logits_that_are_no_numbers_are_refused(tmp_path):
    make_adapter(make_base(tmp_path / "base"), tmp_path / "adapter", "nf4")
    script = ROOT / "recipes" / "merge_adapter.py"
    arguments = [script, "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged"]
    done = run_script("-c", NAN_LOGITS, *arguments)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "is not the trained one" in done.stderr
    # Nothing stands under the name, so nobody takes the refused model for a checked one.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["adapter", "base", "sum"])
def test_weights_that_are_no_numbers_are_not_merged(tmp_path, where, value):
    base = make_base(tmp_path / "base")
    _, metadata = make_adapter(base, tmp_path / "adapter", "nf4")
    path = tmp_path / ("base/model" if where == "base" else "adapter/adapter_model")
    path = path.with_suffix(".safetensors")
    weights = load_file(path)
    name = next(name for name in weights if "layers.1.mlp" in name)
    if where == "sum":  # Each factor is finite, and the product is not.
        weights = {name: torch.full_like(tensor, 3e20) for name, tensor in weights.items()}
    else:
        weights[name][1, 1] = value
    save_file(weights, path, {"format": "pt"})
    for kind in ("dequantized", "original"):
        folders = (tmp_path / "adapter", base, tmp_path / kind)
        with pytest.raises(UserError, match=r"not finite|no numbers"):
            list(merge(*folders, AutoConfig.from_pretrained(base), metadata, kind))
    if where == "base":
        for quantization in ("nf4", "fp4", "int8", "none"):
            settings = Model(base=str(base), quantization=quantization, dtype="float32")
            with pytest.raises(ModelError, match=rf"{name} has NaN or infinite"):
                load_base(settings, CPU)


def test_one_prompt_without_numbers_is_seen():
    logits = [torch.arange(9.0), torch.arange(9.0)]
    for position in range(2):
        spoilt = [row.clone() for row in logits]
        spoilt[position][3] = float("nan")
        for pair in ((logits, spoilt), (spoilt, logits)):
            figures = compare_logits(*pair)
            assert figures["max_relative_error"] == figures["mean_relative_error"] == float("inf")


MEASURE = """
import sys
from pathlib import Path
import torch, psutil
from transformers import AutoConfig
import bitsandbytes
from medqlora.model.merging import merge
from medqlora.model.adapter import read_adapter_metadata
from medqlora.core.environment import read_peak_resident
folder = Path(sys.argv[1])
before = psutil.Process().memory_info().rss
config = AutoConfig.from_pretrained(folder / "base")
metadata = read_adapter_metadata(folder / "adapter")
folders = (folder / "adapter", folder / "base", folder / "merged")
work = merge(*folders, config, metadata, "dequantized")
for _ in work:
    pass
print(read_peak_resident() - before)
"""


@pytest.mark.full
def test_memory_of_merging_a_sharded_gigabyte(tmp_path):
    """Peak resident memory under 600 MB above the interpreter's, for a 1 GB model in four
    shards.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=9,
        num_attention_heads=16,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base", max_shard_size="260MB")
    assert sum(path.stat().st_size for path in (tmp_path / "base").glob("*.safetensors")) > 1e9
    assert len(list_shards(tmp_path / "base")) >= 4
    adapted = attach_adapter(model, Lora(r=8), 0)
    metadata = {
        "base": "x",
        "architecture_sha256": architecture_hash(config),
        "quantization": "nf4",
        "double_quantization": True,
        "dtype": "bfloat16",
    }
    save_adapter(tmp_path / "adapter", adapted, metadata)
    assert adapter_weights(adapted)
    del model, adapted
    done = run_script("-c", MEASURE, tmp_path, cold=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 600e6, f"{int(done.stdout) / 1e6:.0f} MB"


def test_loaded_adapter_equals_the_trained_one(tmp_path):
    base = make_base(tmp_path / "base")
    trained, _ = make_adapter(base, tmp_path / "adapter", "nf4")
    loaded = load_adapter(
        load_base(Model(base=str(base), quantization="nf4", dtype="float32"), CPU)[0],
        tmp_path / "adapter",
    )
    assert compare_logits(logits(trained), logits(loaded))["max_relative_error"] == 0
