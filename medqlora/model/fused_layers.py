"""Norms and gated activations that keep less for the backward pass."""

from __future__ import annotations

import types

import torch

from medqlora.model.compiling import ACTIVATIONS, Kernels

# Norms by what they compute: weight * normalised, cast before the product, or (1 + weight) *
# normalised, cast after it.
PLAIN = {"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "Phi3RMSNorm"}
OFFSET = {"GemmaRMSNorm", "Gemma2RMSNorm"}
GATED = {"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "GemmaMLP", "Gemma2MLP"}
JOINED = {"Phi3MLP"}  # gate and up are one linear map


class Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, module: torch.nn.Module) -> torch.Tensor:
        y, scale = module.kernels.normalise(
            flatten(x), module.weight, epsilon(module), type(module).__name__ in OFFSET
        )
        # not its weight: a strategy may hold that elsewhere until the layer's backward pass
        ctx.module = module
        ctx.save_for_backward(x, scale)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        module, (x, scale) = ctx.module, ctx.saved_tensors
        out = module.kernels.normalise_backward(
            flatten(gradient), flatten(x), scale, module.weight, type(module).__name__ in OFFSET
        )
        return out.view(x.shape), None


def flatten(x: torch.Tensor) -> torch.Tensor:
    """[..., width] -> [tokens, width]: compiled kernels then see few shapes, and are made few
    times.
    """
    return x.detach().flatten(0, -2)


def epsilon(module: torch.nn.Module) -> float:
    return module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps


class GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: torch.Tensor, up: torch.Tensor, module: torch.nn.Module) -> torch.Tensor:
        ctx.module = module
        ctx.save_for_backward(gate, up)
        return module.kernels.gate(flatten(gate), flatten(up), module.lean_activation).view(
            gate.shape
        )

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        saved = map(flatten, ctx.saved_tensors)
        parts = ctx.module.kernels.gate_backward(
            flatten(gradient), *saved, ctx.module.lean_activation
        )
        return *(part.view(gradient.shape) for part in parts), None


def forward_norm(module: torch.nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    return Norm.apply(hidden_states, module)


def forward_gated(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module.down_proj(GatedActivation.apply(module.gate_proj(x), module.up_proj(x), module))


def forward_joined(module: torch.nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    gate, up = module.gate_up_proj(hidden_states).chunk(2, dim=-1)
    return module.down_proj(GatedActivation.apply(gate, up, module))


def lean_layers(model: torch.nn.Module) -> int:
    """Give a frozen model's norms and gated activations the forms above, where their kind is known;
    -> how many.
    """
    config = model.config.get_text_config()
    changed = 0
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    for module in model.modules():
        kind = type(module).__name__
        if kind in PLAIN | OFFSET:
            module.forward = types.MethodType(forward_norm, module)
        elif kind in GATED | JOINED and activation in ACTIVATIONS:
            module.lean_activation = activation
            module.forward = types.MethodType(
                forward_gated if kind in GATED else forward_joined, module
            )
        else:
            continue
        module.kernels = Kernels()
        changed += 1
    return changed
