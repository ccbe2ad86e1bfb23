"""A training that begins with an earlier run's adapter goes on from it, and from no other one."""

import json
import re
import shutil

import pytest
import torch
from conftest import DEMO, ROOT, run_script
from safetensors.torch import load_file
from transformers import AutoConfig

from medqlora.core.config import Lora, Model
from medqlora.model.adapter import adapter_weights, attach_adapter, save_adapter
from medqlora.model.adapter_preview import preview_adapter
from medqlora.model.base import ModelError, load_base
from medqlora.model.identity import architecture_hash, sample_weights
from medqlora.model.initial_adapter import check_initial, load_initial

BASE = DEMO / "base"
MODEL = Model(base=str(BASE), dtype="float32")
LORA = Lora(r=4, alpha=8, dropout=0.1, target_modules=["q_proj", "down_proj"])


@pytest.fixture(scope="module", params=["lora", "rslora", "dora"])
def earlier(request, tmp_path_factory):
    """The adapter of a run, with random weights, and the settings that fit it."""
    lora = LORA.model_copy(update={"variant": request.param})
    base, _ = load_base(MODEL, torch.device("cpu"))
    adapted = attach_adapter(base, lora, 0)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    metadata = {
        "base": str(BASE),
        "architecture_sha256": architecture_hash(base.config),
        "base_sha256": sample_weights(BASE),
        "quantization": "nf4",
        "double_quantization": True,
    }
    folder = tmp_path_factory.mktemp("earlier") / "adapter"
    save_adapter(folder, adapted, metadata)
    return lora.model_copy(update={"init_adapter": str(folder)}), adapter_weights(adapted)


def check(model, lora):
    config = AutoConfig.from_pretrained(model.base)
    check_initial(model, lora, config, preview_adapter(config, lora))


def test_no_further_step_leaves_the_adapter_as_it_was(earlier):
    lora, weights = earlier
    check(MODEL, lora)
    adapted = attach_adapter(load_base(MODEL, torch.device("cpu"))[0], lora, 7)
    load_initial(adapted, lora)
    after = adapter_weights(adapted)
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[key], weights[key]) for key in weights)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 8}, "has r 4"),
        ({"alpha": 16}, "has lora_alpha 8"),
        ({"variant": None}, "set lora.variant as in that run"),
        ({"target_modules": ["q_proj"]}, "as in that run (down_proj, q_proj)"),
        (
            {"target_modules": "all-linear"},
            "as in that run (down_proj, q_proj)",
        ),
    ],
)
def test_an_adapter_of_other_settings_is_refused(earlier, changes, message):
    lora, _ = earlier
    if "variant" in changes:
        changes = {"variant": "lora" if lora.variant == "dora" else "dora"}
    with pytest.raises(ModelError, match=re.escape(message)) as caught:
        check(MODEL, lora.model_copy(update=changes))
    assert "\n" not in str(caught.value)


def test_what_does_not_change_the_model_may_differ(earlier):
    lora, _ = earlier
    check(MODEL, lora.model_copy(update={"dropout": 0.0}))
    check(MODEL.model_copy(update={"dtype": "bfloat16"}), lora)


def test_another_base_is_refused(earlier, tmp_path):
    lora, _ = earlier
    for changes, message in (
        ({"quantization": "none"}, "trained with model.quantization nf4, not none"),
        ({"double_quantization": False}, "trained with model.double_quantization True"),
    ):
        with pytest.raises(ModelError, match=message):
            check(MODEL.model_copy(update=changes), lora)
    shutil.copytree(BASE, tmp_path / "base")
    other = MODEL.model_copy(update={"base": str(tmp_path / "base")})
    check(other, lora)  # A copy is the same base.
    path = tmp_path / "base" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ModelError, match=r"the weights of model.base .* are others"):
        check(other, lora)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["num_hidden_layers"] -= 1
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="has another architecture"):
        check(other, lora)


def test_an_adapter_without_a_known_base_is_refused(earlier, tmp_path):
    lora, _ = earlier
    shutil.copytree(lora.init_adapter, tmp_path / "adapter")
    (tmp_path / "adapter" / "medqlora.json").unlink()
    with pytest.raises(ModelError, match="its base is unknown"):
        check(MODEL, lora.model_copy(update={"init_adapter": str(tmp_path / "adapter")}))


# ---- the recipe ----------------------------------------------------------------------------------


def train(folder, name, *more):
    done = run_script(
        ROOT / "recipes" / "sft_qlora.py",
        *("--output_dir", folder / name, "--data.cache_dir", folder / "cache", "--data.test", "[]"),
        *("--data.train.0.limit", "60", "--data.eval.0.limit", "16", "--lora.r", "4"),
        *("--training.gradient_checkpointing", "none", "--training.max_tokens_per_batch", "512"),
        *("--training.global_batch_tokens", "512", "--training.warmup_steps", "0"),
        *("--model.dtype", "float32", *more),
    )
    assert done.returncode == 0, done.stderr
    log = [
        json.loads(line) for line in (folder / name / "train_log.jsonl").read_text().splitlines()
    ]
    losses = [row["loss"] for row in log if "loss" in row]
    return losses, [row["eval_loss"] for row in log if "eval_loss" in row]


def test_the_recipe_goes_on_from_an_adapter_and_resumes(tmp_path):
    _, first = train(tmp_path, "first", "--training.max_steps", "3")
    adapter = tmp_path / "first" / "adapter"
    begin = ("--lora.init_adapter", adapter, "--training.max_steps", "2")
    # A step this small changes nothing.
    _, unchanged = train(tmp_path, "unchanged", *begin, "--training.lr", "1e-12")
    assert unchanged[-1] == pytest.approx(first[-1], rel=1e-4)
    # The first loss is measured before the first step, on the same text and in the same adapter.
    assert len(unchanged) == 2
    assert unchanged[0] == pytest.approx(first[-1], abs=1e-6)
    # Steps that make it worse leave the adapter as it was.
    _, spoilt = train(tmp_path, "spoilt", *begin, "--training.lr", "1")
    assert spoilt[1] > spoilt[0]
    kept = tmp_path / "spoilt" / "adapter"
    said = json.loads((kept / "medqlora.json").read_text())
    assert (said["step"], said["eval_loss"]) == (0, spoilt[0])
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in (adapter, kept)]
    assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])
    whole, measured = train(tmp_path, "whole", *begin, "--training.save_steps", "1")
    metadata = json.loads((tmp_path / "whole" / "adapter" / "medqlora.json").read_text())
    assert metadata["init_adapter"] == {
        "folder": str(adapter),
        "weights_sha256": json.loads((adapter / "medqlora.json").read_text())["weights_sha256"],
        "base": str(BASE),
        "step": 3,
    }
    # The run was killed after its first step, and the earlier run is gone.
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "adapter")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "step-2")
    adapter.rename(tmp_path / "away")
    resumed, again = train(tmp_path, "killed", *begin, "--training.save_steps", "1", "--resume")
    assert (resumed, again) == (whole, measured)
    # A kill before the first checkpoint begins anew, and the log holds each evaluation once.
    shutil.rmtree(tmp_path / "killed" / "checkpoints")
    (tmp_path / "away").rename(adapter)
    resumed, again = train(tmp_path, "killed", *begin, "--training.save_steps", "1", "--resume")
    assert (resumed, again) == (whole, measured)
    names = ("whole/adapter/adapter_model.safetensors", "killed/adapter/adapter_model.safetensors")
    tensors = [load_file(tmp_path / name) for name in names]
    assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])
    copied = json.loads((tmp_path / "killed" / "adapter" / "medqlora.json").read_text())
    assert copied == metadata
