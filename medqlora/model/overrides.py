"""The list of all methods of other libraries' modules that this package replaces.

An override names the exact upstream class and the reason. It is applied only where the old and the
new method agree on the loaded model, in their outputs and in the gradients of their inputs. The
gradient of a norm's weight, which training.method full trains, must agree as well. An override is
recorded in environment.json and can be undone. A class of the same name from elsewhere keeps its
methods, and so does a class whose method computes something else; a warning says so.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from medqlora.model.compiling import ACTIVATIONS, Kernels
from medqlora.model.fused_head import describe_logits, forward_head
from medqlora.model.fused_layers import forward_gated, forward_joined, forward_lora, forward_norm
from medqlora.model.quantization import forward_gathered
from medqlora.model.rotation import forward_rotary, list_variants, read_short_length

# The relative difference that rounding may cause, by compute dtype.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}
TOKENS = 8  # the length of the input that both methods are compared on
# This attribute of a module holds its overrides, each with the instance's own method before it, or
# None where the method was that of the class.
RECORDS = "medqlora_overrides"

Method = Callable[..., Any]


@dataclass(frozen=True)
class Override:
    """The replacement of a method of one upstream class.

    Args:
        name: The name in environment.json.
        upstream: The class, as "module:Class".
        reason: Why the method is replaced.
        replacement: Takes the module and the method's arguments; returns what the upstream method
            returns.
        compare: Takes (module, old method, new method, compute dtype); returns the largest relative
            difference of their outputs and of the gradients of their inputs.
        method: The name of the replaced method.
        subclasses: Whether the override is also for classes that inherit the method.
        suits: Takes a module of the class; returns whether the override is for this one.
        prepare: Takes a module and gives it the attributes that the replacement reads.
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
        """Return the upstream class, or None where its module is not imported.

        A class whose module is not imported has no instance that could be replaced.
        """
        module, _, name = self.upstream.partition(":")
        return getattr(sys.modules.get(module), name, None)

    def covers(self, module: torch.nn.Module, upstream: type | None) -> bool:
        """Whether the override is for a module.

        Args:
            module: The module.
            upstream: The result of find_class.
        """
        if upstream is None:
            return False
        # A subclass may compute something else, so by default the class must be exactly this one.
        if not self.subclasses:
            return type(module) is upstream and self.suits(module)
        # A subclass that defines the method itself keeps it.
        inherited = getattr(type(module), self.method, None) is getattr(upstream, self.method)
        return isinstance(module, upstream) and inherited and self.suits(module)


@dataclass(frozen=True)
class Applied:
    """An override in use.

    Args:
        override: The override.
        difference: The relative difference that was measured on one of its modules, or None where
            the modules are on the meta device and nothing can be measured.
    """

    override: Override
    difference: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return the entry of environment.json."""
        return {
            "name": self.override.name,
            "class": self.override.upstream.replace(":", "."),
            "reason": self.override.reason,
            "measured_difference": self.difference,
        }


def apply_overrides(
    modules: Iterable[torch.nn.Module], overrides: Iterable[Override], dtype: torch.dtype
) -> int:
    """Replace the methods of modules where the old and the new one agree.

    Args:
        modules: The modules; those that no override is for are left as they are.
        overrides: The overrides.
        dtype: The compute dtype.

    Returns:
        The number of methods that are replaced now, also by an earlier call.
    """
    # Weights that are made in inference mode have no gradients, and every proof would fail.
    assert not torch.is_inference_mode_enabled(), "a model is loaded in inference mode"
    modules = list(modules)
    changed = 0
    for override in overrides:
        upstream = override.find_class()
        suited = [module for module in modules if override.covers(module, upstream)]
        fresh = [module for module in suited if not has_override(module, override.name)]
        # Modules that have the override from an earlier call are not wrapped twice.
        changed += len(suited) - len(fresh)
        if not fresh:
            continue
        # Modules of one class run the same code, so one of them stands for all.
        difference = measure_difference(override, fresh[0], dtype)
        # This condition also holds for NaN, which `difference > ...` would let pass.
        if difference is not None and not difference <= TOLERANCE[dtype]:
            warnings.warn(
                f"{override.upstream.replace(':', '.')} computes something else than the override"
                f" {override.name} (relative difference {difference:.1e}, allowed"
                f" {TOLERANCE[dtype]:.0e}); it keeps its own method, which may need more memory",
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
    """Whether an override of this name is applied to a module."""
    return any(applied.override.name == name for applied, _ in module.__dict__.get(RECORDS, []))


def measure_difference(
    override: Override, module: torch.nn.Module, dtype: torch.dtype
) -> float | None:
    """Compare the old and the new method on a module.

    Returns:
        The largest relative difference; infinite where a method fails; None on the meta device.
    """
    tensors = itertools.chain(module.parameters(), module.buffers())
    if any(tensor.is_meta for tensor in tensors):
        return None
    old = getattr(module, override.method)
    override.prepare(module)
    new = functools.partial(override.replacement, module)
    training = module.training
    module.eval()  # With dropout, a method would differ from itself.
    try:
        return override.compare(module, old, new, dtype)
    except torch.OutOfMemoryError:
        # It is a RuntimeError, but it does not mean that the methods differ.
        raise
    # An upstream method with another signature, other attributes or other shapes ends so. It is
    # then a method that has changed.
    except (TypeError, AttributeError, RuntimeError, ValueError):
        return float("inf")
    finally:
        module.train(training)


def replace_method(module: torch.nn.Module, applied: Applied) -> None:
    """Replace a module's method and record the override in the module."""
    override = applied.override
    override.prepare(module)
    records = module.__dict__.setdefault(RECORDS, [])
    # A method of the instance itself, if it has one, is kept for undo_overrides.
    records.append((applied, module.__dict__.get(override.method)))
    # The instance is changed and not the class, so other models keep their methods. Hooks of the
    # module still run, because torch calls self.forward between them.
    setattr(module, override.method, types.MethodType(override.replacement, module))


def undo_overrides(model: torch.nn.Module) -> int:
    """Give all modules of a model their own methods back.

    Returns:
        The number of methods that were replaced.
    """
    undone = 0
    for module in model.modules():
        # The newest override is undone first, because it recorded what the one before had set.
        for applied, own_method in reversed(module.__dict__.pop(RECORDS, [])):
            name = applied.override.method
            if own_method is None:
                delattr(module, name)
            else:
                setattr(module, name, own_method)
            undone += 1
    return undone


@contextlib.contextmanager
def without_overrides(model: torch.nn.Module) -> Iterator[None]:
    """Let all modules of a model compute with their own methods inside the block."""
    replaced = []
    for module in model.modules():
        # The oldest record of a method holds what the module had before any override.
        for applied, own_method in reversed(module.__dict__.get(RECORDS, [])):
            name = applied.override.method
            replaced.append((module, name, module.__dict__[name]))
            module.__dict__[name] = own_method
            if own_method is None:
                del module.__dict__[name]
    try:
        yield
    finally:
        for module, name, method in reversed(replaced):
            module.__dict__[name] = method


def list_overrides(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Return the overrides in use in a model, each with its number of modules."""
    counts: dict[Applied, int] = {}
    for module in model.modules():
        for applied, _ in module.__dict__.get(RECORDS, []):
            counts[applied] = counts.get(applied, 0) + 1
    return [applied.as_dict() | {"modules": count} for applied, count in counts.items()]


def warn_of_namesakes(modules: list[torch.nn.Module], overrides: Iterable[Override]) -> None:
    """Warn of classes that have the name of an upstream class but are not that class."""
    names = {override.upstream.partition(":")[2] for override in overrides}
    known = {override.find_class() for override in overrides}
    others = {type(module) for module in modules if type(module).__name__ in names} - known
    for other in sorted(others, key=str):
        warnings.warn(
            f"{other.__module__}.{other.__qualname__} has the name of a class that medqlora"
            " overrides, but comes from elsewhere; it keeps its own methods, which may need more"
            " memory",
            stacklevel=3,
        )


# ---- the comparison of the old and the new method ------------------------------------------------


def draw_normal(
    shape: tuple[int, ...], like: torch.Tensor, dtype: torch.dtype, seed: int = 0
) -> torch.Tensor:
    """Return normal random numbers on the device of `like`.

    They come from a generator of their own, so that the random numbers of a training do not depend
    on the overrides.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(like.device, dtype)


def relative_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference of two tensors by the largest expected entry.

    It is infinite where the shapes or dtypes differ or a difference is not finite. A NaN needs that
    check, because max() and comparisons would pass over it.
    """
    if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
        return float("inf")
    difference = (actual.float() - expected.float()).abs().max()
    if not torch.isfinite(difference):
        return float("inf")
    return float(difference / expected.float().abs().max().clamp_min(1e-30))


def compare_on(
    x: torch.Tensor, old: Method, new: Method, weights: tuple[torch.Tensor, ...] = ()
) -> float:
    """Return the largest relative difference of two methods on an input.

    Args:
        x: The input, of any shape.
        old: The old method.
        new: The new method.
        weights: Weights whose gradients are compared too; each must require a gradient.

    Returns:
        The difference of old(x) and new(x), or of the gradients of x or of a weight if that is
        larger.
    """
    results = []
    for method in (old, new):
        leaf = x.detach().clone().requires_grad_()
        with torch.enable_grad():
            out = method(leaf)
        # The gradient of the output must not be the input or the output: a norm maps a gradient
        # along its input to nearly zero.
        grad_out = draw_normal(tuple(out.shape), out, out.dtype, seed=1)
        gradients = torch.autograd.grad(out, (leaf, *weights), grad_out)
        results.append((out.detach(), *gradients))
    expected, found = results
    return max(itertools.starmap(relative_difference, zip(found, expected, strict=True)))


def compare_norm(module: torch.nn.Module, old: Method, new: Method, dtype: torch.dtype) -> float:
    """Compare the forwards of a norm, and the gradients of its weight."""
    shape = (1, TOKENS, module.weight.shape[-1])
    frozen = not module.weight.requires_grad
    module.weight.requires_grad_(True)
    try:
        return compare_on(draw_normal(shape, module.weight, dtype), old, new, (module.weight,))
    finally:
        # The base is frozen while overrides are applied; training.method full thaws it afterwards.
        module.weight.requires_grad_(not frozen)


def compare_gated(module: torch.nn.Module, old: Method, new: Method, dtype: torch.dtype) -> float:
    """Compare the forwards of a gated MLP."""
    # The first linear layer takes the MLP's own input, so its width is the right one.
    linear = next(part for part in module.modules() if isinstance(part, torch.nn.Linear))
    return compare_linear(linear, old, new, dtype)


def compare_linear(module: torch.nn.Module, old: Method, new: Method, dtype: torch.dtype) -> float:
    """Compare the forwards of a linear layer, or of a module that begins with it."""
    shape = (1, TOKENS, module.in_features)
    return compare_on(draw_normal(shape, module.weight, dtype), old, new)


def compare_lora(module: torch.nn.Module, old: Method, new: Method, dtype: torch.dtype) -> float:
    """Compare the forwards of a LoRA layer.

    The factor B of a new adapter is zero. It gets random numbers for the comparison, so that a
    difference of the update is noticed.
    """
    (name,) = module.lora_B
    factor = module.lora_B[name].weight
    before = factor.detach().clone()
    with torch.no_grad():
        factor.copy_(draw_normal(tuple(factor.shape), factor, factor.dtype))
    try:
        return compare_linear(module.get_base_layer(), old, new, dtype)
    finally:
        with torch.no_grad():
            # A training that began from the random B would begin with a random update.
            factor.copy_(before)


def compare_rotary(module: torch.nn.Module, old: Method, new: Method, dtype: torch.dtype) -> float:
    """Compare the forwards of a rotary module on single rows, short and long."""
    device = next(module.buffers()).device
    differences = []
    for layer_type in list_variants(module):
        keywords = {} if layer_type is None else {"layer_type": layer_type}
        short = read_short_length(module, layer_type) or TOKENS
        # A row is told by its last tokens, because factors follow its largest position.
        for last in (0, TOKENS - 1, short - 1, short):
            positions = torch.arange(max(0, last + 1 - TOKENS), last + 1, device=device)[None]
            x = draw_normal((1, positions.shape[1], 1), positions, dtype)
            rotated = zip(new(x, positions, **keywords), old(x, positions, **keywords), strict=True)
            differences += [relative_difference(ours, theirs) for ours, theirs in rotated]
    return max(differences)


def compare_padding_check(
    module: PreTrainedModel, old: Method, new: Method, dtype: torch.dtype
) -> float:
    """Check that both methods return nothing for ids without padding."""
    ids = torch.ones((1, TOKENS), dtype=torch.int64)
    same = old(ids, torch.ones_like(ids)) is None and new(ids) is None
    return 0.0 if same else float("inf")


# ---- the list ------------------------------------------------------------------------------------


def has_known_activation(module: torch.nn.Module) -> bool:
    """Whether compiling.ACTIVATIONS has the activation of a gated MLP."""
    return find_activation(module) is not None


def find_activation(module: torch.nn.Module) -> str | None:
    """Return the key in compiling.ACTIVATIONS of a gated MLP's activation, or None."""
    config = getattr(module, "config", None)
    # Gemma's configs call it hidden_activation, the others hidden_act.
    name = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    return name if name in ACTIVATIONS else None


def prepare_norm(module: torch.nn.Module, offset: bool) -> None:
    """Give a norm the attributes that forward_norm reads."""
    # compile_layers and outline_kernels look for this attribute and put other kernels there.
    module.kernels = Kernels()
    module.norm_offset = offset


def prepare_gated(module: torch.nn.Module) -> None:
    """Give a gated MLP the attributes that its replacement reads."""
    module.kernels = Kernels()
    module.activation_name = find_activation(module)


def is_plain_lora(module: torch.nn.Module) -> bool:
    """Whether a LoRA layer has a linear base, one adapter, no bias and no variant such as DoRA."""
    linear = isinstance(module.get_base_layer(), torch.nn.Linear)
    biased = any(factor.bias is not None for factor in module.lora_B.values())
    return linear and len(module.lora_A) == 1 and not module.lora_variant and not biased


def skip_padding_check(model: PreTrainedModel, *_: Any) -> None:
    """Do nothing."""


MODELS = "transformers.models.{0}.modeling_{0}:{1}"
# These norms round to the input's dtype before they multiply by the weight.
PLAIN_NORMS = {
    "llama": "LlamaRMSNorm",
    "mistral": "MistralRMSNorm",
    "qwen2": "Qwen2RMSNorm",
    "qwen3": "Qwen3RMSNorm",
    "phi3": "Phi3RMSNorm",
}
# These norms multiply by 1 + weight, in float32.
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
    """Return the override of an architecture's RMS norm."""
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
    """Return the override of an architecture's gated MLP."""
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
# strategies.zero applies these where ZeRO-3 divides the weights.
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


def make_rotary_overrides(model: torch.nn.Module) -> tuple[Override, ...]:
    """Return the overrides of a model's rotary modules whose factors depend on the row's length.

    Each architecture has a rotary class of its own, so the classes are those of the model.
    """
    classes = {
        type(module)
        for module in model.modules()
        for layer_type in list_variants(module)
        if read_short_length(module, layer_type) is not None
    }
    return tuple(
        Override(
            name="rotary embedding",
            upstream=f"{upstream.__module__}:{upstream.__qualname__}",
            reason="the factors of a batch follow its longest row; ours follow each row",
            replacement=forward_rotary,
            compare=compare_rotary,
        )
        for upstream in sorted(classes, key=str)
    )


def make_head_override(causal: torch.nn.Module) -> Override:
    """Return the override of a frozen head.

    Its loss depends on the model, which may scale or cap the logits.
    """
    # They are fixed here for the comparison; AnswerLoss passes them with every call.
    scale, cap = describe_logits(causal)

    def compare(head: torch.nn.Module, old: Method, new: Method, dtype: torch.dtype) -> float:
        # The remainder keeps the targets valid for a vocabulary of fewer than TOKENS tokens.
        targets = torch.arange(TOKENS, device=head.weight.device) % head.out_features  # [TOKENS]

        def old_loss(hidden: torch.Tensor) -> torch.Tensor:
            logits = old(hidden).float() * scale
            if cap is not None:
                logits = cap * torch.tanh(logits / cap)
            return F.cross_entropy(logits, targets, reduction="sum")

        def new_loss(hidden: torch.Tensor) -> torch.Tensor:
            return new(hidden, targets, scale, cap)

        x = draw_normal((TOKENS, head.in_features), head.weight, head.weight.dtype)
        # forward_head has two forms, the loss with targets and the plain output; both are compared.
        return max(compare_on(x, old_loss, new_loss), compare_on(x, old, new))

    return Override(
        name="head with loss",
        upstream="torch.nn.modules.linear:Linear",
        reason="the gradient is made with the loss, in the logits' memory, inside the head's own"
        " call, where a strategy that divides the head has gathered it",
        replacement=forward_head,
        compare=compare,
    )
