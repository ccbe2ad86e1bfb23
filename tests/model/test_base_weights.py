"""Weights that are quantized in their files are not trained on; neither they nor a merge into
dequantized weights are quantized again.
"""

import json

import pytest
import torch
from conftest import DEMO, build_model
from transformers import AutoConfig, AutoModelForCausalLM

from medqlora.core.config import Model
from medqlora.model.base import ModelError, load_base
from medqlora.model.base_weights import (
    MERGED_WEIGHTS,
    WeightsError,
    check_quantizable,
    check_trainable,
    describe_quantized,
)
from medqlora.model.merging import make_dequantizer

CPU = torch.device("cpu")
# What the files of quantized models say, and how it is named.
QUANTIZED = {
    "nf4": {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "fp4": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "mxfp4": {"quant_method": "mxfp4"},
}


def save_quantized(folder, kind):
    """Save a model; one that bitsandbytes can quantize here has real quantized weights."""
    build_model("llama", vocab_size=512).save_pretrained(folder)
    if kind in ("nf4", "fp4", "int8"):
        settings = Model(base=str(folder), quantization=kind, dtype="float32")
        load_base(settings, CPU)[0].save_pretrained(folder)
        return str(folder)
    path = folder / "config.json"
    settings = json.loads(path.read_text()) | {"quantization_config": QUANTIZED[kind]}
    path.write_text(json.dumps(settings))
    return str(folder)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_files_with_quantized_weights_are_not_trained_on(kind):
    config = AutoConfig.from_pretrained(DEMO / "base")
    config.quantization_config = QUANTIZED[kind]
    assert describe_quantized(config) == kind
    for quantization in ("nf4", "fp4", "int8", "none"):
        model = Model(base="quantized", quantization=quantization)
        with pytest.raises(WeightsError, match=rf"quantized already \({kind}\)"):
            check_trainable(model, config)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantized_files_are_evaluated_as_they_are(tmp_path, kind):
    base = save_quantized(tmp_path, kind)
    ids = torch.arange(5, 30)[None]
    expected = AutoModelForCausalLM.from_pretrained(base)(ids, use_cache=False).logits
    for quantization in ("none", kind):
        model, _ = load_base(Model(base=base, quantization=quantization, dtype="float32"), CPU)
        assert describe_quantized(model.config) == kind
        logits = model(ids, use_cache=False).logits
        assert (logits - expected).abs().max() < 1e-2 * expected.abs().max()
    with pytest.raises(WeightsError, match="cannot be loaded as fp4"):
        load_base(Model(base=base, quantization="fp4"), CPU)


@pytest.mark.parametrize("kind", ["gptq", "awq", "compressed-tensors"])
def test_quantized_files_that_cannot_be_loaded_are_one_line(tmp_path, kind):
    base = save_quantized(tmp_path, kind)
    with pytest.raises(WeightsError, match="cannot be loaded as nf4"):
        load_base(Model(base=base, quantization="nf4"), CPU)
    with pytest.raises(ModelError, match=f"its {kind} weights cannot be loaded here") as caught:
        load_base(Model(base=base, quantization="none"), CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wanted", ["nf4", "fp4", "int8", "none"])
@pytest.mark.parametrize("weights", ["dequantized", "original", None])
@pytest.mark.parametrize("trained", ["nf4", "fp4", "int8", "none"])
def test_a_merge_into_dequantized_weights_is_not_quantized_again(
    tmp_path, trained, weights, wanted
):
    """A merge of an older version does not say which weights it holds: dequantized was the
    default.
    """
    metadata = {"quantization": trained} | ({MERGED_WEIGHTS: weights} if weights else {})
    (tmp_path / "medqlora.json").write_text(json.dumps(metadata))
    config = AutoConfig.from_pretrained(DEMO / "base")
    model = Model(base=str(tmp_path), quantization=wanted)
    same = {trained, wanted} <= {"nf4", "fp4"} or trained == wanted
    if weights != "original" and same and wanted != "none":
        with pytest.raises(WeightsError, match=r"lora\.init_adapter"):
            check_quantizable(model, config)
    else:
        check_quantizable(model, config)


@pytest.mark.parametrize("first", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("second", ["nf4", "fp4", "int8"])
def test_what_is_refused_loses_updates_and_what_is_not_keeps_them(first, second):
    """The part of a rank-16 update of 0.3 % of the weight's norm that is left after the second
    quantization.
    """
    torch.manual_seed(0)
    trained_on = make_dequantizer(first, True, torch.bfloat16)(torch.randn(512, 512) * 0.02)
    trained_on = trained_on.bfloat16().float()
    update = torch.randn(512, 16) @ torch.randn(16, 512)
    update *= 0.003 * trained_on.norm() / update.norm()
    again = make_dequantizer(second, True, torch.bfloat16)
    merged = (trained_on + update).bfloat16()
    change = again(merged).float() - again(trained_on).float()
    kept = ((change * update).sum() / (update * update).sum()).item()
    refused = {first, second} <= {"nf4", "fp4"} or first == second
    assert (0.8 < kept < 1.25) is not refused
