"""Forwards of norms, gated activations and LoRA layers that keep less for the backward pass.

They stand in for upstream ones as medqlora/model/overrides.py lists.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer

from medqlora.model.dropout import DroppedLinear, SeededDropout


class Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, module: torch.nn.Module) -> torch.Tensor:
        y, scale = module.kernels.normalise(
            flatten(x), module.weight, epsilon(module), module.norm_offset
        )
        # not its weight: a strategy may hold that elsewhere until the layer's backward pass
        ctx.module = module
        ctx.save_for_backward(x, scale)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        module, (x, scale) = ctx.module, ctx.saved_tensors
        out = module.kernels.normalise_backward(
            flatten(gradient), flatten(x), scale, module.weight, module.norm_offset
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
        return module.kernels.gate(flatten(gate), flatten(up), module.activation_name).view(
            gate.shape
        )

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        saved = map(flatten, ctx.saved_tensors)
        parts = ctx.module.kernels.gate_backward(
            flatten(gradient), *saved, ctx.module.activation_name
        )
        return *(part.view(gradient.shape) for part in parts), None


def forward_norm(module: torch.nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    return Norm.apply(hidden_states, module)


def forward_gated(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module.down_proj(GatedActivation.apply(module.gate_proj(x), module.up_proj(x), module))


def forward_joined(module: torch.nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    gate, up = module.gate_up_proj(hidden_states).chunk(2, dim=-1)
    return module.down_proj(GatedActivation.apply(gate, up, module))


def forward_lora(layer: LoraLayer, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """base(x) + scaling * B A dropout(x); x [..., in] -> [..., out]. The update is added by the
    matrix product itself, in place: what a frozen base layer gives is needed by no backward
    pass."""
    flat = x.flatten(0, -2)  # [tokens, in]
    result = layer.base_layer(flat)
    if not layer.disable_adapters and not layer.merged:
        (name,) = layer.lora_A
        down = layer.lora_A[name].weight.to(x.dtype)
        up = layer.lora_B[name].weight.to(x.dtype)
        dropout = layer.lora_dropout[name]
        if isinstance(dropout, SeededDropout) and dropout.training:
            low = DroppedLinear.apply(flat, down, dropout.p)  # [tokens, r]
        else:
            low = F.linear(dropout(flat), down)
        result.addmm_(low, up.t(), alpha=layer.scaling[name])
    return result.view(*x.shape[:-1], result.shape[-1])
