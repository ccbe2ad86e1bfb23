"""Lean norms and gated activations against transformers' own: the same values, the same gradients, less kept."""

import pytest
import torch
from conftest import ARCHITECTURES, build_model
from transformers import GPT2Config, GPT2Model

from medqlora.layers import lean_layers


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
    scale = before[1].abs().max()
    assert (before[1] - after[1]).abs().max() <= (1e-5 if dtype is torch.float32 else 2e-2) * scale
    assert after[2] < (1.0 if dtype is torch.float32 else 0.9) * before[2]  # in float32 a norm needs no wider copy


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
