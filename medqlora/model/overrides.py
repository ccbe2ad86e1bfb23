"""Every replaced method of somebody else's module, in one list.

An override names the exact upstream class, says why it is there, and is applied only where old and
new agree on the loaded model, in outputs and in gradients of the input. It is recorded and can be
undone. A class of the same name from elsewhere, or an upstream method that has come to compute
something else, is left alone with a warning.
"""

from __future__ import annotations

import functools
import sys
import types
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from medqlora.model.compiling import ACTIVATIONS, Kernels
from medqlora.model.fused_head import describe_logits, forward_head
from medqlora.model.fused_layers import forward_gated, forward_joined, forward_lora, forward_norm
from medqlora.model.quantization import forward_gathered

# The relative difference that rounding may make, by the dtype of computing.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}
TOKENS = 8  # of the input that old and new are compared on
RECORDS = "medqlora_overrides"  # the attribute of a module that keeps what was replaced in it

Method = Callable[..., Any]


@dataclass(frozen=True)
class Override:
    """A method of one upstream class, and ours.

    Args:
        name: how environment.json calls it.
        upstream: "module:Class", as Python imports it.
        reason: why the upstream method is not good enough.
        replacement: (module, *arguments) -> what the upstream method returns.
        compare: (module, old, new, dtype) -> largest relative difference of their outputs and
            input gradients.
        method: name of the replaced method.
        subclasses: whether it is for classes that inherit the method, too.
        suits: whether it is for this instance.
        prepare: gives a module the attributes that the replacement reads.
    """

    name: str
    upstream: str
    reason: str
    replacement: Method
    compare: Callable[[torch.nn.Module, Method, Method, torch.dtype], float]
    method: str = "forward"
    subclasses: bool = False
    suits: Callable[[torch.nn.Module], bool] = lambda module: True
    prepare: Callable[[torch.nn.Module], None] = lambda module: None

    def find_class(self) -> type | None:
        """The upstream class; None where its module is not loaded, so that it has no instance."""
        module, _, name = self.upstream.partition(":")
        return getattr(sys.modules.get(module), name, None)

    def covers(self, module: torch.nn.Module, upstream: type | None) -> bool:
        """Whether this very class, not a namesake, made the module."""
        if upstream is None:
            return False
        if not self.subclasses:
            return type(module) is upstream and self.suits(module)
        inherited = getattr(type(module), self.method, None) is getattr(upstream, self.method)
        return isinstance(module, upstream) and inherited and self.suits(module)


@dataclass(frozen=True)
class Applied:
    """An override in use; difference: as measured on one of its modules, None where they have no
    content to measure with (forecasts).
    """

    override: Override
    difference: float | None

    def as_dict(self) -> dict[str, Any]:
        """What environment.json says of it."""
        return {
            "name": self.override.name,
            "class": self.override.upstream.replace(":", "."),
            "reason": self.override.reason,
            "measured_difference": self.difference,
        }


def apply_overrides(
    modules: Iterable[torch.nn.Module], overrides: Iterable[Override], dtype: torch.dtype
) -> int:
    """Replace methods of the modules that an override is for, where old and new agree -> how many.

    dtype: of computing.
    """
    modules = list(modules)
    changed = 0
    for override in overrides:
        upstream = override.find_class()
        suited = [module for module in modules if override.covers(module, upstream)]
        fresh = [module for module in suited if not has_override(module, override.name)]
        changed += len(suited) - len(fresh)
        if not fresh:
            continue
        difference = measure_difference(override, fresh[0], dtype)
        if difference is not None and not difference <= TOLERANCE[dtype]:
            warnings.warn(
                f"{override.upstream.replace(':', '.')} computes something else than what"
                f" {override.name} replaces (relative difference {difference:.1e}); it is left as"
                " it is",
                stacklevel=2,
            )
            continue
        applied = Applied(override, difference)
        for module in fresh:
            replace_method(module, applied)
        changed += len(fresh)
    warn_of_namesakes(modules, overrides)
    return changed


def has_override(module: torch.nn.Module, name: str) -> bool:
    return any(applied.override.name == name for applied, _ in module.__dict__.get(RECORDS, []))


def measure_difference(
    override: Override, module: torch.nn.Module, dtype: torch.dtype
) -> float | None:
    """Relative difference of old and new on `module`; infinite where one of them fails."""
    if any(parameter.is_meta for parameter in module.parameters()):
        return None
    old = getattr(module, override.method)
    override.prepare(module)
    new = functools.partial(override.replacement, module)
    training = module.training
    module.eval()  # Dropout would differ from itself.
    try:
        return override.compare(module, old, new, dtype)
    except torch.OutOfMemoryError:
        raise  # It says nothing of the method.
    except (TypeError, AttributeError, RuntimeError, ValueError):
        return float("inf")
    finally:
        module.train(training)


def replace_method(module: torch.nn.Module, applied: Applied) -> None:
    override = applied.override
    override.prepare(module)
    kept = module.__dict__.setdefault(RECORDS, [])
    kept.append((applied, module.__dict__.get(override.method)))
    setattr(module, override.method, types.MethodType(override.replacement, module))


def undo_overrides(model: torch.nn.Module) -> int:
    """Give all modules of a model their own methods back -> how many were replaced."""
    undone = 0
    for module in model.modules():
        for applied, before in reversed(module.__dict__.pop(RECORDS, [])):
            method = applied.override.method
            if before is None:
                delattr(module, method)
            else:
                setattr(module, method, before)
            undone += 1
    return undone


def list_overrides(model: torch.nn.Module) -> list[dict[str, Any]]:
    """What is replaced in a model, for environment.json, with the number of modules of each."""
    counts: dict[Applied, int] = {}
    for module in model.modules():
        for applied, _ in module.__dict__.get(RECORDS, []):
            counts[applied] = counts.get(applied, 0) + 1
    return [applied.as_dict() | {"modules": count} for applied, count in counts.items()]


def warn_of_namesakes(modules: list[torch.nn.Module], overrides: Iterable[Override]) -> None:
    names = {override.upstream.partition(":")[2] for override in overrides}
    known = {override.find_class() for override in overrides}
    others = {type(module) for module in modules if type(module).__name__ in names} - known
    for other in sorted(others, key=str):
        warnings.warn(
            f"{other.__module__}.{other.__qualname__} has the name of a class that medqlora makes"
            " lighter, but comes from elsewhere; it is left as it is",
            stacklevel=3,
        )


# ---- how old and new are compared ----------------------------------------------------------------


def draw(
    shape: tuple[int, ...], like: torch.Tensor, dtype: torch.dtype, seed: int = 0
) -> torch.Tensor:
    """Normal numbers that leave torch's own generator as it was."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(like.device, dtype)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest entry; infinite where shape or dtype differ, or where a
    value is not finite, which no comparison of numbers would notice.
    """
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return float("inf")
    difference = (found.float() - expected.float()).abs().max()
    if not torch.isfinite(difference):
        return float("inf")
    return float(difference / expected.float().abs().max().clamp_min(1e-30))


def compare_on(x: torch.Tensor, old: Method, new: Method) -> float:
    """Largest relative difference of old(x) and new(x), and of their gradients of x."""
    results = []
    for method in (old, new):
        given = x.detach().clone().requires_grad_()
        with torch.enable_grad():
            out = method(given)
        # With numbers of its own: a norm's gradient along its input is nearly zero.
        slope = draw(tuple(out.shape), out, out.dtype, seed=1)
        (gradient,) = torch.autograd.grad(out, given, slope)
        results.append((out.detach(), gradient))
    (old_out, old_gradient), (new_out, new_gradient) = results
    return max(relative(new_out, old_out), relative(new_gradient, old_gradient))


def compare_norm(module: torch.nn.Module, old: Method, new: Method, dtype: torch.dtype) -> float:
    shape = (1, TOKENS, module.weight.shape[-1])
    return compare_on(draw(shape, module.weight, dtype), old, new)


def compare_gated(module: torch.nn.Module, old: Method, new: Method, dtype: torch.dtype) -> float:
    linear = next(part for part in module.modules() if isinstance(part, torch.nn.Linear))
    return compare_on(draw((1, TOKENS, linear.in_features), linear.weight, dtype), old, new)


def compare_linear(module: torch.nn.Module, old: Method, new: Method, dtype: torch.dtype) -> float:
    return compare_on(draw((1, TOKENS, module.in_features), module.weight, dtype), old, new)


def compare_lora(module: torch.nn.Module, old: Method, new: Method, dtype: torch.dtype) -> float:
    """With a second factor that is not zero, so that the update has a part in it."""
    (name,) = module.lora_B
    factor = module.lora_B[name].weight
    before = factor.detach().clone()
    with torch.no_grad():
        factor.copy_(draw(tuple(factor.shape), factor, factor.dtype))
    try:
        base = module.get_base_layer()
        return compare_on(draw((1, TOKENS, base.in_features), base.weight, dtype), old, new)
    finally:
        with torch.no_grad():
            factor.copy_(before)


def compare_padding_check(
    module: PreTrainedModel, old: Method, new: Method, dtype: torch.dtype
) -> float:
    """Neither says anything of ids without padding."""
    ids = torch.ones((1, TOKENS), dtype=torch.int64)
    return 0.0 if old(ids, torch.ones_like(ids)) is None and new(ids) is None else float("inf")


# ---- the list ------------------------------------------------------------------------------------


def has_known_activation(module: torch.nn.Module) -> bool:
    return find_activation(module) is not None


def find_activation(module: torch.nn.Module) -> str | None:
    """The name of a gated MLP's activation, where we have its derivative."""
    config = getattr(module, "config", None)
    name = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    return name if name in ACTIVATIONS else None


def prepare_norm(module: torch.nn.Module, offset: bool) -> None:
    module.kernels = Kernels()
    module.norm_offset = offset


def prepare_gated(module: torch.nn.Module) -> None:
    module.kernels = Kernels()
    module.activation_name = find_activation(module)


def is_plain_lora(module: torch.nn.Module) -> bool:
    linear = isinstance(module.get_base_layer(), torch.nn.Linear)
    return linear and len(module.lora_A) == 1 and not module.lora_variant


def skip_padding_check(model: PreTrainedModel, *_: Any) -> None:
    pass


MODELS = "transformers.models.{0}.modeling_{0}:{1}"
PLAIN_NORMS = {
    "llama": "LlamaRMSNorm",
    "mistral": "MistralRMSNorm",
    "qwen2": "Qwen2RMSNorm",
    "qwen3": "Qwen3RMSNorm",
    "phi3": "Phi3RMSNorm",
}
# These multiply by 1 + weight, in float32.
OFFSET_NORMS = {"gemma": "GemmaRMSNorm", "gemma2": "Gemma2RMSNorm"}
GATED_MLPS = {
    "llama": "LlamaMLP",
    "mistral": "MistralMLP",
    "qwen2": "Qwen2MLP",
    "qwen3": "Qwen3MLP",
    "gemma": "GemmaMLP",
    "gemma2": "Gemma2MLP",
}
LORA_LAYERS = (
    "peft.tuners.lora.layer:Linear",
    "peft.tuners.lora.bnb:Linear4bit",
    "peft.tuners.lora.bnb:Linear8bitLt",
)


def make_norm(model: str, name: str, offset: bool) -> Override:
    return Override(
        name="RMS norm",
        upstream=MODELS.format(model, name),
        reason="autograd keeps a float32 copy of the input; ours keeps the input and one number"
        " per token",
        replacement=forward_norm,
        compare=compare_norm,
        prepare=functools.partial(prepare_norm, offset=offset),
    )


def make_gated(model: str, name: str, replacement: Method) -> Override:
    return Override(
        name="gated activation",
        upstream=MODELS.format(model, name),
        reason="autograd keeps the activation beside its input; ours computes it again",
        replacement=replacement,
        compare=compare_gated,
        suits=has_known_activation,
        prepare=prepare_gated,
    )


BASE_OVERRIDES = (
    *(make_norm(model, name, offset=False) for model, name in PLAIN_NORMS.items()),
    *(make_norm(model, name, offset=True) for model, name in OFFSET_NORMS.items()),
    *(make_gated(model, name, forward_gated) for model, name in GATED_MLPS.items()),
    make_gated("phi3", "Phi3MLP", forward_joined),
    Override(
        name="look for padding",
        upstream="transformers.modeling_utils:PreTrainedModel",
        reason="packed rows have no padding, and looking for it waits for the GPU",
        replacement=skip_padding_check,
        compare=compare_padding_check,
        method="warn_if_padding_and_no_attention_mask",
        subclasses=True,
    ),
)
ADAPTER_OVERRIDES = tuple(
    Override(
        name="LoRA layer",
        upstream=upstream,
        reason="PEFT clones the base layer's output, casts the input to float32 and back, and"
        " scales and adds in passes of their own; ours adds in the matrix product",
        replacement=forward_lora,
        compare=compare_lora,
        suits=is_plain_lora,
    )
    for upstream in LORA_LAYERS
)
GATHERED_OVERRIDES = (
    Override(
        name="4-bit product",
        upstream="bitsandbytes.nn.modules:Linear4bit",
        reason="bitsandbytes keeps the packed weight for the backward pass, when ZeRO-3 has"
        " released it; ours reads the layer again",
        replacement=forward_gathered,
        compare=compare_linear,
    ),
)


def make_head_override(causal: torch.nn.Module) -> Override:
    """The override of a frozen head, whose loss depends on what the model does to its logits."""
    scale, cap = describe_logits(causal)

    def compare(head: torch.nn.Module, old: Method, new: Method, dtype: torch.dtype) -> float:
        targets = torch.arange(TOKENS, device=head.weight.device) % head.out_features

        def old_loss(hidden: torch.Tensor) -> torch.Tensor:
            logits = old(hidden).float() * scale
            logits = logits if cap is None else cap * torch.tanh(logits / cap)
            return F.cross_entropy(logits, targets, reduction="sum")

        x = draw((TOKENS, head.in_features), head.weight, head.weight.dtype)
        in_loss = compare_on(x, old_loss, lambda hidden: new(hidden, targets, scale, cap))
        return max(in_loss, compare_on(x, old, new))

    return Override(
        name="head with loss",
        upstream="torch.nn.modules.linear:Linear",
        reason="the gradient is made with the loss, in the logits' memory, inside the head's own"
        " call, where a strategy that divides the head has gathered it",
        replacement=forward_head,
        compare=compare,
    )
