"""Norms and gated activations that keep less for the backward pass than the models' own, with the same results.

A norm as transformers writes it keeps its input in float32, a gated activation keeps gate, up, act(gate) and their product. Here a norm
keeps its input as it came, and act(gate) is computed again: of the 180 KB per token that a layer of Llama-3-8B keeps where it is not
recomputed, 44 go. Liger and Unsloth do the same in Triton; these are plain operations, for any device.
"""

from __future__ import annotations

import types

import torch
import torch.nn.functional as F

# Norms by what they compute: weight * normalised, cast before the product, or (1 + weight) * normalised, cast after it.
PLAIN = {"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "Phi3RMSNorm"}
OFFSET = {"GemmaRMSNorm", "Gemma2RMSNorm"}
GATED = {"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "GemmaMLP", "Gemma2MLP"}
JOINED = {"Phi3MLP"}  # gate and up are one linear map
ACTIVATIONS = {"silu": (F.silu, torch.ops.aten.silu_backward), "gelu_pytorch_tanh": (
    lambda x: F.gelu(x, approximate="tanh"), lambda gradient, x: torch.ops.aten.gelu_backward(gradient, x, approximate="tanh"))}  # fmt: skip


class Norm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) times a frozen weight (Zhang and Sennrich, 2019, arXiv 1910.07467), x [..., width]."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, module: torch.nn.Module) -> torch.Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon(module))
        ctx.module = module  # not its weight: a strategy may hold that elsewhere until the layer's backward pass
        ctx.save_for_backward(x, scale)
        if type(module).__name__ in OFFSET:
            return (wide * scale * (1.0 + module.weight.float())).to(x.dtype)
        return module.weight * (wide * scale).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        x, scale = ctx.saved_tensors
        weight = ctx.module.weight
        if type(ctx.module).__name__ in OFFSET:
            gradient = gradient.float() * (1.0 + weight.float())
        else:
            gradient = (gradient * weight).to(x.dtype).float()
        normalised = x.float() * scale
        gradient = scale * (gradient - normalised * (gradient * normalised).mean(-1, keepdim=True))
        return gradient.to(x.dtype), None


def epsilon(module: torch.nn.Module) -> float:
    return module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps


class GatedActivation(torch.autograd.Function):
    """act(gate) * up, all [..., intermediate] (Shazeer, 2020, arXiv 2002.05202)."""

    @staticmethod
    def forward(ctx, gate: torch.Tensor, up: torch.Tensor, name: str) -> torch.Tensor:
        ctx.name = name
        ctx.save_for_backward(gate, up)
        return ACTIVATIONS[name][0](gate) * up

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        gate, up = ctx.saved_tensors
        act, derive = ACTIVATIONS[ctx.name]
        return derive(gradient * up, gate), gradient * act(gate), None


def forward_norm(module: torch.nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    return Norm.apply(hidden_states, module)


def forward_gated(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module.down_proj(GatedActivation.apply(module.gate_proj(x), module.up_proj(x), module.lean_activation))


def forward_joined(module: torch.nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    gate, up = module.gate_up_proj(hidden_states).chunk(2, dim=-1)
    return module.down_proj(GatedActivation.apply(gate, up, module.lean_activation))


def lean_layers(model: torch.nn.Module) -> int:
    """Give a frozen model's norms and gated activations the forms above, where their kind is known; -> how many."""
    config, changed = model.config.get_text_config(), 0
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    for module in model.modules():
        kind = type(module).__name__
        if kind in PLAIN | OFFSET:
            module.forward = types.MethodType(forward_norm, module)
        elif kind in GATED | JOINED and activation in ACTIVATIONS:
            module.lean_activation = activation
            module.forward = types.MethodType(forward_gated if kind in GATED else forward_joined, module)
        else:
            continue
        changed += 1
    return changed
