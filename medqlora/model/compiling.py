"""Kernels of norms and gated activations: plain, outlined for forecasts, or compiled."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import astuple, dataclass

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "gelu_pytorch_tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda gradient, x: torch.ops.aten.gelu_backward(gradient, x, approximate="tanh"),
    ),
}


def normalise(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """x / sqrt(mean(x^2) + eps) times a weight, and 1 / sqrt(...) float32 (Zhang and Sennrich,
    2019, arXiv 1910.07467); x [..., width].
    """
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if offset:
        return (wide * scale * (1.0 + weight.float())).to(x.dtype), scale
    return weight * (wide * scale).to(x.dtype), scale


def normalise_backward(
    gradient: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, offset: bool
) -> torch.Tensor:
    gradient = (
        gradient.float() * (1.0 + weight.float())
        if offset
        else (gradient * weight).to(x.dtype).float()
    )
    normalised = x.float() * scale
    return (scale * (gradient - normalised * (gradient * normalised).mean(-1, keepdim=True))).to(
        x.dtype
    )


def gate(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """act(gate) * up, all [..., intermediate] (Shazeer, 2020, arXiv 2002.05202)."""
    return ACTIVATIONS[activation][0](gate) * up


def gate_backward(
    gradient: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    act, derive = ACTIVATIONS[activation]
    return derive(gradient * up, gate), gradient * act(gate)


@dataclass(frozen=True)
class Kernels:
    """The four functions above, as they are or compiled. Their arguments are detached: a compiled
    function would be made anew for arguments with a gradient and for such without."""

    normalise: Callable = normalise
    normalise_backward: Callable = normalise_backward
    gate: Callable = gate
    gate_backward: Callable = gate_backward


def make_empty(x: torch.Tensor, *_) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def outline_norm(x: torch.Tensor, *_) -> tuple[torch.Tensor, torch.Tensor]:
    return make_empty(x), torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)


def outline_norm_backward(gradient: torch.Tensor, x: torch.Tensor, *_) -> torch.Tensor:
    return make_empty(x)


def outline_gate_backward(
    gradient: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, *_
) -> tuple[torch.Tensor, torch.Tensor]:
    return make_empty(gate), make_empty(up)


# Compiled kernels allocate their outputs and nothing in between; a forecast of them uses these.
OUTLINES = Kernels(outline_norm, outline_norm_backward, make_empty, outline_gate_backward)


def outline_kernels(model: torch.nn.Module) -> None:
    """Let a model without content forecast the memory of compiled norms and gated activations."""
    for module in model.modules():
        if hasattr(module, "kernels"):
            module.kernels = OUTLINES


def wants_compiling(device: torch.device, when: bool | str) -> bool:
    """when: training.compile; auto is on a GPU."""
    return device.type == "cuda" if when == "auto" else bool(when)


def compile_layers(model: torch.nn.Module, device: torch.device, when: bool | str) -> bool:
    """Let torch's compiler (Triton on a GPU, C++ on a CPU) make one kernel of each norm and gated
    activation that overrides.py has replaced -> whether it did.

    Intermediate results are not rounded then. Where the compiler fails, a warning says why, and the
    layers stay as they are. when: training.compile.
    """
    if not wants_compiling(device, when):
        return False
    try:
        kernels = compile_kernels(device)
    # whatever a compiler, a missing one or its driver may raise
    except Exception as error:  # noqa: BLE001
        warnings.warn(
            "training.compile: torch.compile does not work here"
            f" ({' '.join(str(error).split())[:200]}); going on without",
            stacklevel=2,
        )
        return False
    for module in model.modules():
        if hasattr(module, "kernels"):
            module.kernels = kernels
    return True


@functools.cache
def compile_kernels(device: torch.device) -> Kernels:
    """Compiled on first use for each dtype and width, for all lengths; tried here on a few
    numbers.
    """
    kernels = Kernels(*map(compile_for_all_lengths, astuple(Kernels())))
    x = torch.ones(2, 8, device=device)
    with torch.no_grad():
        y, scale = kernels.normalise(x, x[0], 1e-6, False)
        kernels.normalise_backward(y, x, scale, x[0], False)
        kernels.gate_backward(x, kernels.gate(x, x, "silu"), x, "silu")
    return kernels


def forget_base(argument):
    """A tensor that is no view, with the same memory: for a view the compiler would also look at
    the shape of what it is a view of.
    """
    if torch.is_tensor(argument) and argument._base is not None and argument.is_contiguous():
        return torch.ops.aten._unsafe_view(argument, argument.shape)
    return argument


def compile_for_all_lengths(function: Callable) -> Callable:
    """A compiled function of tensors [tokens, width]. torch's compiler would otherwise make one
    variant for the first number of tokens and another for all numbers; it makes eight at most, and
    then goes on without compiling, in silence.
    """
    compiled = torch.compile(function)

    def run(*arguments):
        # The compiler would make a variant of its own for a single token.
        if len(arguments[0]) == 1:
            return function(*arguments)
        arguments = [forget_base(argument) for argument in arguments]
        for argument in arguments:
            # The last dimension is the width; a kernel that knows it is faster.
            if torch.is_tensor(argument):
                torch._dynamo.mark_static(argument, argument.dim() - 1)
                if argument.dim() == 2:
                    torch._dynamo.maybe_mark_dynamic(argument, 0)
        return compiled(*arguments)

    return run
