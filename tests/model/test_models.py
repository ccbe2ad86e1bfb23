"""Quantized bases, adapters and the bitsandbytes traps."""

import json
import shutil
from itertools import pairwise

import pytest
import torch
from conftest import DEMO, build_model
from test_losses import make_batch, make_table
from transformers import AutoConfig

from medqlora.core.config import Lora, Model, Training
from medqlora.model import hardware
from medqlora.model.adapter import (
    adapter_weights,
    attach_adapter,
    load_adapter,
    read_adapter_metadata,
    restore_adapter,
    save_adapter,
)
from medqlora.model.adapter_preview import preview_adapter
from medqlora.model.attention.documents import DOCUMENTS
from medqlora.model.base import ModelError, check_length, load_base, read_model_config
from medqlora.model.hardware import choose_dtype
from medqlora.model.head_loss import AnswerLoss
from medqlora.model.identity import architecture_hash, sample_weights
from medqlora.model.recomputation import set_checkpointing
from medqlora.training.optimizers import learning_rate, make_optimizer, restore_pages

CPU = torch.device("cpu")


def load(quantization="nf4", dtype="float32", **settings):
    return load_base(
        Model(base=str(DEMO / "base"), quantization=quantization, dtype=dtype, **settings), CPU
    )[0]


def run_gradients(model):
    model.train()
    for parameter in model.parameters():
        parameter.grad = None
    AnswerLoss(model, 1024)(**make_batch(make_table(), range(9), "varlen")).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8", "none"])
def test_every_storage_trains(quantization):
    model = attach_adapter(load(quantization), Lora(r=4), 0)
    gradient = run_gradients(model)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() > 0
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trainable)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_evaluating_first_does_not_change_the_gradients(dtype):
    """bitsandbytes repacks 4-bit weights at the first evaluation on an AVX512-BF16 CPU and then
    loses input gradients.
    """
    fresh = run_gradients(attach_adapter(load(dtype=dtype), Lora(r=4), 0))
    model = attach_adapter(load(dtype=dtype), Lora(r=4), 0)
    model.eval()
    with torch.no_grad():
        AnswerLoss(model, 1024)(**make_batch(make_table(), range(9), "varlen"))
    assert torch.equal(run_gradients(model), fresh)


def test_embeddings_stay_in_the_compute_dtype_unless_asked():
    assert load(dtype="bfloat16").get_input_embeddings().weight.dtype == torch.bfloat16
    assert (
        load(dtype="bfloat16", upcast_embeddings=True).get_input_embeddings().weight.dtype
        == torch.float32
    )


def test_adapter_targets_attention_and_mlp_not_the_head():
    model = attach_adapter(build_model("llama", tie_word_embeddings=False), Lora(r=4), 0)
    names = {name.split(".")[-4] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "phi3"])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_adapter_size_is_known_without_weights(architecture, variant):
    model = build_model(architecture)
    lora = Lora(r=4, variant=variant)
    config = model.config
    base = model.num_parameters()
    adapter = sum(p.numel() for p in attach_adapter(model, lora, 0).parameters() if p.requires_grad)
    preview = preview_adapter(config, lora)
    assert (preview.base_parameters, preview.trained_parameters) == (base, adapter)


def test_adapter_initialisation_follows_the_seed():
    first, second, other = (
        adapter_weights(attach_adapter(build_model("llama"), Lora(r=4), seed)) for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_unknown_target_is_refused():
    with pytest.raises(ModelError, match="target_modules"):
        attach_adapter(build_model("llama"), Lora(target_modules=["query"]), 0)


@pytest.mark.parametrize(
    ("mode", "expected"), [("none", 0), ("full", 4), ("every_2", 2), ("every_3", 2), ("first_3", 3)]
)
def test_checkpointing_recomputes_the_layers_asked_for(mode, expected):
    model = build_model("llama", DOCUMENTS, num_hidden_layers=4)
    assert set_checkpointing(model, mode) == expected
    assert sum(layer.gradient_checkpointing for layer in model.model.layers) == expected


def save(tmp_path, **lora):
    model = attach_adapter(load(), Lora(r=4, **lora), 0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    metadata = {
        "base": "demo",
        "architecture_sha256": architecture_hash(model.get_base_model().config),
    }
    save_adapter(tmp_path / "adapter", model, metadata)
    return model


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
def test_saved_adapter_loads_to_the_same_model(tmp_path, variant):
    model = save(tmp_path, variant=variant).eval()
    loaded = load_adapter(load(), tmp_path / "adapter").eval()
    batch = make_batch(make_table(), range(9), "varlen")
    with torch.no_grad():
        assert torch.equal(AnswerLoss(model, 1024)(**batch), AnswerLoss(loaded, 1024)(**batch))


def test_peft_itself_reads_the_adapter(tmp_path):
    from peft import PeftModel

    model = save(tmp_path)
    other = PeftModel.from_pretrained(load(), tmp_path / "adapter")
    assert all(
        torch.equal(value, adapter_weights(other)[key])
        for key, value in adapter_weights(model).items()
    )


def test_changed_adapter_file_is_seen(tmp_path):
    save(tmp_path)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ModelError, match="cut or changed"):
        read_adapter_metadata(tmp_path / "adapter")


def test_adapter_for_another_base_is_refused(tmp_path):
    save(tmp_path)
    with pytest.raises(ModelError, match="trained on demo"):
        load_adapter(build_model("llama"), tmp_path / "adapter")
    with pytest.raises(ModelError, match="does not fit"):
        restore_adapter(
            attach_adapter(build_model("llama"), Lora(r=8), 0),
            adapter_weights(attach_adapter(build_model("llama"), Lora(r=4), 0)),
        )


def test_base_is_recognised_by_its_weights(tmp_path):
    shutil.copytree(DEMO / "base", tmp_path / "base")
    assert sample_weights(tmp_path / "base") == sample_weights(DEMO / "base")
    path = tmp_path / "base" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    assert sample_weights(tmp_path / "base") != sample_weights(DEMO / "base")


def test_bad_models_are_refused_before_weights_load(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickled").mkdir()
    shutil.copy(DEMO / "base" / "config.json", tmp_path / "pickled")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"x")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({}))
    for name, message in (
        ("empty", "no config.json"),
        ("pickled", "no .safetensors"),
        ("adapter", "this is an adapter"),
        ("no", "no such folder"),
    ):
        with pytest.raises(ModelError, match=message):
            read_model_config(str(tmp_path / name))
    with pytest.raises(ModelError, match="512 positions"):
        check_length(AutoConfig.from_pretrained(DEMO / "base"), 513)
    with pytest.raises(ModelError, match="float16 is not trainable on a CPU"):
        load(dtype="float16")


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "constant"])
def test_learning_rate(scheduler):
    training = Training(lr=1.0, scheduler=scheduler, warmup_steps=10)
    rates = [learning_rate(step, 100, training) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1.0
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert rates[-1] == 1.0 if scheduler == "constant" else rates[-1] < 0.02
    ratio = Training(lr=1.0, scheduler=scheduler, warmup_steps=0.1)
    assert [learning_rate(step, 100, ratio) for step in range(100)] == rates


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_optimizers_step(optimizer):
    model = attach_adapter(build_model("llama", DOCUMENTS), Lora(r=4), 0)
    weights = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in weights]
    chosen = make_optimizer(Training(optimizer=optimizer, lr=1e-2), weights)
    run_gradients(model)
    chosen.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, weights, strict=True))


def test_paged_states_are_paged_again_after_loading(monkeypatch):
    """bitsandbytes loads the states of its paged optimizers as plain tensors; the next step is the
    same either way.
    """
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    start = torch.randn(100, 100)
    runs = [[torch.nn.Parameter(start.clone())] for _ in range(2)]
    trainers = [
        make_optimizer(Training(optimizer="paged_adamw_8bit", lr=1e-2), weights) for weights in runs
    ]
    pages = []
    make = trainers[1].get_state_buffer
    monkeypatch.setattr(
        trainers[1],
        "get_state_buffer",
        lambda weight, dtype: pages.append(make(weight, dtype)) or pages[-1],
    )
    for step in range(2):
        if step == 1:
            trainers[1].load_state_dict(trainers[0].state_dict())
            runs[1][0].data.copy_(runs[0][0].data)
            restore_pages(trainers[1])
            states = trainers[1].state[runs[1][0]]
            assert [states["state1"] is pages[0], states["state2"] is pages[1]] == [True, True]
        for weights, optimizer in zip(runs, trainers, strict=True):
            if step == 1 or optimizer is trainers[0]:
                weights[0].grad = torch.ones_like(start) * (step + 1)
                optimizer.step()
    assert torch.equal(runs[0][0], runs[1][0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_what_a_gpu_that_is_not_here_computes_in_does_not_depend_on_this_cpu(monkeypatch):
    """A login node plans for the nodes that train."""
    found = []
    for units in (True, False):
        monkeypatch.setattr(hardware, "has_bf16_units", lambda units=units: units)
        found.append(choose_dtype("auto", torch.device("cuda")))
    assert found == [torch.bfloat16] * 2
    assert choose_dtype("float32", torch.device("cuda")) is torch.float32
