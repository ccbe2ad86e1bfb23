"""Lean norms and gated activations against transformers' own: the same values, the same gradients, less kept."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURES, build_model, run_script
from transformers import GPT2Config, GPT2Model

from medqlora.layers import compile_kernels, compile_layers, lean_layers


def run(model, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Output, gradient of the input, and bytes that autograd keeps."""
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(inputs_embeds=x, attention_mask=None, use_cache=False).last_hidden_state
    (out.float() * torch.arange(out.shape[-1])).sum().backward()
    return out.detach(), x.grad, sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lean_layers_compute_the_same(architecture, dtype):
    model = build_model(architecture).to(dtype).requires_grad_(False).model
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.2)
    x = torch.randn(1, 24, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = run(model, x)
    norms = {"llama": 5, "qwen2": 5, "gemma2": 9, "phi3": 5}[architecture]
    assert lean_layers(model) == norms + 2
    after = run(model, x)
    assert torch.equal(before[0], after[0])
    scale, tolerance = before[1].abs().max(), 1e-5 if dtype is torch.float32 else 2e-2
    assert (before[1] - after[1]).abs().max() <= tolerance * scale
    assert after[2] < (1.0 if dtype is torch.float32 else 0.9) * before[2]  # in float32 a norm needs no wider copy


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's compiler needs a C++ compiler on a CPU")
def test_compiled_layers_compute_the_same(tmp_path):
    """In a process of its own: tests run without torch's compiler, see conftest. Lengths change, as packed batches do."""
    (tmp_path / "compare.py").write_text(f"""
import os, sys, torch, torch._dynamo
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_layers import build_model, compile_layers, lean_layers, run
os.environ["TORCHDYNAMO_DISABLE"] = "0"
model = build_model("gemma2").requires_grad_(False).model  # its norms have an offset; the plain kind is tried by compile_kernels
lean_layers(model)
inputs = [torch.randn(1, length, 64, generator=torch.Generator().manual_seed(0)) for length in (24, 31, 17, 40)]
before = [run(model, x) for x in inputs]
assert compile_layers(model, torch.device("cpu"), True)
for x, (out, gradient, kept) in zip(inputs, before):
    after = run(model, x)
    assert (out - after[0]).abs().max() <= 1e-5 * out.abs().max()
    assert (gradient - after[1]).abs().max() <= 1e-5 * gradient.abs().max()
    assert after[2] == kept
assert 4 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 20, torch._dynamo.utils.counters["stats"]
""")
    done = run_script(tmp_path / "compare.py")
    assert done.returncode == 0, done.stderr


def test_a_machine_without_a_compiler_goes_on(monkeypatch):
    def refuse(*_):
        raise RuntimeError("no compiler")

    compile_kernels.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda function: refuse)
    model = build_model("llama").requires_grad_(False).model
    lean_layers(model)
    with pytest.warns(UserWarning, match="no compiler"):
        assert not compile_layers(model, torch.device("cpu"), True)
    assert not compile_layers(model, torch.device("cpu"), "auto")
    run(model, torch.randn(1, 8, 64))


def test_unknown_layers_are_left_alone():
    model = GPT2Model(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=8))
    assert lean_layers(model) == 0


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_gradients_are_those_of_finite_differences(architecture):
    model = build_model(architecture).double().requires_grad_(False).model
    lean_layers(model)
    layer = model.layers[0]
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True) * 0.5
    assert torch.autograd.gradcheck(lambda h: layer.mlp(h), x, atol=1e-4)
