"""Forwards of norms, gated activations and LoRA layers that store less for the backward pass.

medqlora/model/overrides.py lists the upstream methods that they replace.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer

from medqlora.model.dropout import DroppedLinear, SeededDropout


class Norm(torch.autograd.Function):
    """An RMS norm that stores its input and one number per token (see compiling.normalise)."""

    @staticmethod
    def forward(
        ctx, x: torch.Tensor, weight: torch.Tensor, module: torch.nn.Module
    ) -> torch.Tensor:
        """Return the normalised x, [..., width].

        Args:
            ctx: What autograd keeps for the backward pass.
            x: [..., width].
            weight: The module's own weight, so that autograd asks for its gradient if it trains.
            module: The norm.
        """
        y, scale = module.kernels.normalise(
            flatten(x), module.weight, epsilon(module), module.norm_offset
        )
        # The module is stored instead of its weight, because a strategy that divides weights over
        # ranks gathers the weight anew for the layer's backward pass.
        ctx.module = module
        ctx.save_for_backward(x, scale)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        """Return the gradients of x, [..., width], and of the weight, [width]."""
        module = ctx.module
        x, scale = ctx.saved_tensors
        out = module.kernels.normalise_backward(
            flatten(gradient), flatten(x), scale, module.weight, module.norm_offset
        )
        grad_weight = None
        if ctx.needs_input_grad[1]:  # The weight of a base under an adapter is frozen.
            normalised = flatten(x).float() * flatten(scale)  # float32 [tokens, width]
            grad_weight = (flatten(gradient).float() * normalised).sum(0).to(module.weight.dtype)
        return out.view(x.shape), grad_weight, None


def flatten(x: torch.Tensor) -> torch.Tensor:
    """Return x [..., width] as a detached view [tokens, width].

    Kernels are compiled anew for each number of dimensions, and this leaves one.
    """
    return x.detach().flatten(0, -2)


def epsilon(module: torch.nn.Module) -> float:
    """Return the number that a norm adds to the mean square; transformers has two names for it."""
    return module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps


class GatedActivation(torch.autograd.Function):
    """A gated activation that stores its two inputs alone (see compiling.gate)."""

    @staticmethod
    def forward(ctx, gate: torch.Tensor, up: torch.Tensor, module: torch.nn.Module) -> torch.Tensor:
        """Return act(gate) * up, all [..., intermediate]."""
        ctx.module = module
        ctx.save_for_backward(gate, up)
        out = module.kernels.gate(flatten(gate), flatten(up), module.activation_name)
        return out.view(gate.shape)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        """Return the gradients of gate and up, [..., intermediate]."""
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = ctx.module.kernels.gate_backward(
            flatten(gradient), flatten(gate), flatten(up), ctx.module.activation_name
        )
        return grad_gate.view(gradient.shape), grad_up.view(gradient.shape), None


def forward_norm(module: torch.nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """Replace the forward of an RMS norm; [..., width] -> [..., width]."""
    return Norm.apply(hidden_states, module.weight, module)


def forward_gated(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Replace the forward of a gated MLP; [..., hidden] -> [..., hidden]."""
    return module.down_proj(GatedActivation.apply(module.gate_proj(x), module.up_proj(x), module))


def forward_joined(module: torch.nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """Replace the forward of a gated MLP whose gate and up projection are one layer (Phi-3).

    Shapes: [..., hidden] -> [..., hidden].
    """
    # The joined weight holds the rows of gate before those of up.
    gate, up = module.gate_up_proj(hidden_states).chunk(2, dim=-1)
    return module.down_proj(GatedActivation.apply(gate, up, module))


def forward_lora(layer: LoraLayer, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Replace the forward of a LoRA layer: base(x) + scaling * B A dropout(x).

    The matrix product with B adds the update to the base layer's output in place. No backward pass
    needs that output, because the base layer is frozen.

    Args:
        layer: The LoRA layer.
        x: [..., in].
        args: Are ignored.
        kwargs: Are ignored.

    Returns:
        [..., out].
    """
    # bitsandbytes' int8 product returns a view for a 3-D input, which must not be changed in place.
    # A 2-D input avoids that.
    flat = x.flatten(0, -2)  # [tokens, in]
    result = layer.base_layer(flat)
    if not layer.disable_adapters and not layer.merged:
        (name,) = layer.lora_A
        # Autograd sees these casts, so the gradients come back in the adapter's float32.
        down = layer.lora_A[name].weight.to(x.dtype)  # [r, in]
        up = layer.lora_B[name].weight.to(x.dtype)  # [out, r]
        dropout = layer.lora_dropout[name]
        if isinstance(dropout, SeededDropout) and dropout.training:
            low = DroppedLinear.apply(flat, down, dropout.p)  # [tokens, r]
        else:
            low = F.linear(dropout(flat), down)
        result.addmm_(low, up.t(), alpha=layer.scaling[name])
    return result.view(*x.shape[:-1], result.shape[-1])
