"""The kernels of norms and gated activations, in three forms.

They are plain functions of torch, the same functions compiled, or functions that only allocate
their outputs, for forecasts of memory.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import astuple, dataclass

import torch
import torch.nn.functional as F

# Each activation with its backward function, which takes the gradient of the output and the input.
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
    """Compute an RMS norm (Zhang and Sennrich, 2019, arXiv 1910.07467, equation 4).

    Args:
        x: [..., width].
        weight: [width].
        eps: Is added to the mean square.
        offset: Whether the factor is 1 + weight, as in Gemma, instead of weight.

    Returns:
        The normalised x, [..., width] in x's dtype; and 1 / sqrt(mean(x^2) + eps), which the
        backward pass needs, float32 [..., 1].
    """
    wide = x.float()  # float32 [..., width]
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)  # float32 [..., 1]
    # Gemma multiplies by its weight before it rounds to x's dtype, the others afterwards. The order
    # decides the last bits.
    if offset:
        return (wide * scale * (1.0 + weight.float())).to(x.dtype), scale
    return weight * (wide * scale).to(x.dtype), scale


def normalise_backward(
    gradient: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, offset: bool
) -> torch.Tensor:
    """Compute the gradient of an RMS norm's input.

    Args:
        gradient: The gradient of the output, [..., width].
        x: The input, [..., width].
        scale: The second result of normalise, float32 [..., 1].
        weight: [width].
        offset: As in normalise.

    Returns:
        The gradient of x, [..., width] in x's dtype.
    """
    if offset:
        gradient = gradient.float() * (1.0 + weight.float())
    else:
        # The forward pass multiplied in x's dtype, so autograd would round this product there too.
        gradient = (gradient * weight).to(x.dtype).float()
    normalised = x.float() * scale  # float32 [..., width]
    # A norm does not notice a change of x's length, so the gradient loses its part along x.
    along = (gradient * normalised).mean(-1, keepdim=True)  # float32 [..., 1]
    return (scale * (gradient - normalised * along)).to(x.dtype)


def gate(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """Compute a gated activation, act(gate) * up (Shazeer, 2020, arXiv 2002.05202, equation 5).

    Args:
        gate: [..., intermediate].
        up: [..., intermediate].
        activation: A key of ACTIVATIONS.

    Returns:
        [..., intermediate].
    """
    return ACTIVATIONS[activation][0](gate) * up


def gate_backward(
    gradient: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gradients of gate and up from that of the output, all [..., intermediate]."""
    activate, activate_backward = ACTIVATIONS[activation]
    # act(gate) is computed again, because GatedActivation keeps gate and up alone.
    return activate_backward(gradient * up, gate), gradient * activate(gate)


@dataclass(frozen=True)
class Kernels:
    """The four functions above, or others that stand in for them.

    Their arguments must be detached. A function is compiled once for tensors that require a
    gradient and once for those that do not, and detaching leaves one of the two.
    """

    normalise: Callable = normalise
    normalise_backward: Callable = normalise_backward
    gate: Callable = gate
    gate_backward: Callable = gate_backward


def make_empty(x: torch.Tensor, *_) -> torch.Tensor:
    """Return a tensor like x whose content is not set."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def outline_norm(x: torch.Tensor, *_) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tensors like the results of normalise."""
    return make_empty(x), torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)


def outline_norm_backward(gradient: torch.Tensor, x: torch.Tensor, *_) -> torch.Tensor:
    """Return a tensor like the result of normalise_backward."""
    return make_empty(x)


def outline_gate_backward(
    gradient: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, *_
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tensors like the results of gate_backward."""
    return make_empty(gate), make_empty(up)


# Compiled kernels allocate their outputs and no intermediate results, and neither do these.
OUTLINES = Kernels(outline_norm, outline_norm_backward, make_empty, outline_gate_backward)


def outline_kernels(model: torch.nn.Module) -> None:
    """Let a model on the meta device allocate what it would allocate with compiled kernels."""
    for module in model.modules():
        if hasattr(module, "kernels"):
            module.kernels = OUTLINES


def wants_compiling(device: torch.device, setting: bool | str) -> bool:
    """Whether kernels are to be compiled by training.compile; "auto" means on a GPU only."""
    return device.type == "cuda" if setting == "auto" else bool(setting)


def compile_layers(model: torch.nn.Module, device: torch.device, setting: bool | str) -> bool:
    """Compile the norms and gated activations that overrides.py has replaced, one kernel each.

    torch's compiler writes Triton for a GPU and C++ for a CPU. A compiled kernel does not round
    intermediate results. Where compiling fails, a warning says why and the layers stay as they are.

    Args:
        model: The model, which is changed.
        device: The device that it computes on.
        setting: The value of training.compile.

    Returns:
        Whether the layers were compiled.
    """
    if not wants_compiling(device, setting):
        return False
    try:
        kernels = compile_kernels(device)
    # A missing C++ compiler, a Triton that does not fit torch, a driver that is too old and a
    # read-only cache folder end in unrelated types of errors. The plain kernels compute the same
    # without a compiler, so the training goes on with them.
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


# All models of a process share the kernels of a device, so each is compiled once.
@functools.cache
def compile_kernels(device: torch.device) -> Kernels:
    """Compile the kernels and run them once, so that a compiler that fails is noticed here.

    They are compiled again for each dtype and width, but not for each number of tokens.
    """
    kernels = Kernels(*map(compile_for_all_lengths, astuple(Kernels())))
    # A single row would run uncompiled (see compile_for_all_lengths), so there are two.
    x = torch.ones(2, 8, device=device)
    with torch.no_grad():
        y, scale = kernels.normalise(x, x[0], 1e-6, False)
        kernels.normalise_backward(y, x, scale, x[0], False)
        kernels.gate_backward(x, kernels.gate(x, x, "silu"), x, "silu")
    return kernels


def strip_view(argument):
    """Return a tensor with the same memory that is no view; other arguments are returned as is.

    For a view, the compiler would also make a variant for each shape of the viewed tensor.
    """
    if torch.is_tensor(argument) and argument._base is not None and argument.is_contiguous():
        return torch.ops.aten._unsafe_view(argument, argument.shape)
    return argument


def compile_for_all_lengths(function: Callable) -> Callable:
    """Compile a function of tensors [tokens, width] once for all numbers of tokens.

    torch's compiler would otherwise make one variant for the first number of tokens and another for
    all numbers. It makes eight variants at most and then runs the function uncompiled, in silence.
    """
    compiled = torch.compile(function)

    def run(*arguments):
        # The compiler would make another variant for a single token.
        if len(arguments[0]) == 1:
            return function(*arguments)
        arguments = [strip_view(argument) for argument in arguments]
        for argument in arguments:
            # The last dimension is the width; a kernel that is compiled for it is faster.
            if torch.is_tensor(argument):
                torch._dynamo.mark_static(argument, argument.dim() - 1)
                # mark_dynamic would raise an error where the compiler fixes the length after all.
                if argument.dim() == 2:
                    torch._dynamo.maybe_mark_dynamic(argument, 0)
        return compiled(*arguments)

    return run
