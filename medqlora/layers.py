"""Norms and gated activations that keep less for the backward pass than the models' own, with the
same results.

A norm as transformers writes it keeps its input in float32, a gated activation keeps gate, up,
act(gate) and their product. Here a norm keeps its input as it came, and act(gate) is computed
again: of the 180 KB per token that a layer of Llama-3-8B keeps where it is not recomputed, 44 go.
Liger and Unsloth do the same in Triton; these are plain operations, for any device, and torch's
compiler can make one kernel of each (compile_layers).
"""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable
from dataclasses import astuple, dataclass

import torch
import torch.nn.functional as F

# Norms by what they compute: weight * normalised, cast before the product, or (1 + weight) *
# normalised, cast after it.
PLAIN = {"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "Phi3RMSNorm"}
OFFSET = {"GemmaRMSNorm", "Gemma2RMSNorm"}
GATED = {"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "GemmaMLP", "Gemma2MLP"}
JOINED = {"Phi3MLP"}  # gate and up are one linear map
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


def draw_kept(x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    """bool like x: what dropout with probability p keeps, a function of the seed and the device."""
    if x.is_meta:
        return torch.empty(x.shape, dtype=torch.bool, device=x.device)
    generator = torch.Generator(x.device).manual_seed(seed)
    # bernoulli_ takes twice as long there as whole numbers from 0 to 2^31 - 1
    if x.device.type == "cpu":
        return torch.empty(x.shape, dtype=torch.int32).random_(generator=generator) >= round(
            p * 2**31
        )
    return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(
        1 - p, generator=generator
    )


def draw_seed() -> int:
    """From torch's own generator on the CPU: nothing waits for a GPU, and recomputed layers draw
    the same again.
    """
    return int(torch.randint(2**62, ()))


class DroppedLinear(torch.autograd.Function):
    """dropout(x) W^T that keeps x, which other products keep too, and a seed, instead of the
    dropped input and a mask.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, p: float) -> torch.Tensor:
        """x [tokens, in], weight [out, in] -> [tokens, out]"""
        ctx.p, ctx.seed = p, draw_seed()
        ctx.save_for_backward(x, weight)
        return F.linear(x * draw_kept(x, p, ctx.seed), weight) / (1 - p)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        x, weight = ctx.saved_tensors
        kept = draw_kept(x, ctx.p, ctx.seed)
        gradient = gradient / (1 - ctx.p)
        grad_weight = gradient.t() @ (x * kept) if ctx.needs_input_grad[1] else None
        grad_x = (gradient @ weight).mul_(kept) if ctx.needs_input_grad[0] else None
        return grad_x, grad_weight, None


class Dropped(torch.autograd.Function):
    """dropout(x) that keeps a seed instead of a mask."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, p: float) -> torch.Tensor:
        ctx.p, ctx.seed = p, draw_seed()
        return x * draw_kept(x, p, ctx.seed) / (1 - p)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return gradient * draw_kept(gradient, ctx.p, ctx.seed) / (1 - ctx.p), None


class SeededDropout(torch.nn.Module):
    """torch.nn.Dropout that keeps a seed instead of a mask."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Dropped.apply(x, self.p) if self.training and self.p > 0 else x


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


def wants_compiling(device: torch.device, when: bool | str) -> bool:
    """when: training.compile; auto is on a GPU."""
    return device.type == "cuda" if when == "auto" else bool(when)


def compile_layers(model: torch.nn.Module, device: torch.device, when: bool | str) -> bool:
    """Let torch's compiler (Triton on a GPU, C++ on a CPU) make one kernel of each norm and gated
    activation that lean_layers has changed; -> whether it did. Where it cannot, a warning says why,
    and they stay as they are. Intermediate results are not rounded then. when: training.compile."""
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
