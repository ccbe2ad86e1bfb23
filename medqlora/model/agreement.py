"""The proof at every start that what is computed is what the model computes.

A short packed batch runs through our attention backend, overrides and head. Each of its rows runs
alone through the model as transformers computes it: with eager attention, its own methods and its
own head. Logits and the gradients of the input embeddings must agree.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from medqlora.model.attention.backends import IMPLEMENTATIONS, AttentionError, set_attention
from medqlora.model.base import unwrap
from medqlora.model.head_loss import AnswerLoss
from medqlora.model.reference import (
    FAILURES,
    Outputs,
    attention_of,
    describe,
    draw_rows,
    find_dtype,
    run_reference,
    run_rows,
    shrink_windows,
    undisturbed,
)
from medqlora.model.rotation import prove_rotation

# The relative difference of a row's logits or gradients that rounding to a dtype may cause.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# Some models enlarge rounding, as a mixture of experts that chooses other experts. A difference may
# be ROUNDINGS times what rounding of the input changes, but never over MOST.
ROUNDINGS = 3
MOST = 0.25
# This attribute of a causal LM holds the backend that packed rows are proven for, and the result.
PROVEN = "medqlora_agreement"


@dataclass(frozen=True)
class Agreement:
    """What was measured.

    Args:
        logits: The largest difference of a row's logits, relative to their 2-norm.
        gradients: The same of the gradients of a row's input embeddings; None where they were not
            compared.
        influence: How much the logits of a row change, relative to their 2-norm, with tokens that
            they must not see: those of another row, and those that follow.
    """

    logits: float
    gradients: float | None
    influence: float

    def within(self, allowed: Agreement) -> bool:
        """Whether no difference is over the allowed one."""
        # No comparison holds for NaN.
        return (
            self.logits <= allowed.logits
            and (self.gradients is None or self.gradients <= allowed.gradients)
            and self.influence <= allowed.influence
        )

    def __str__(self) -> str:
        parts = [f"logits {self.logits:.1e}"]
        if self.gradients is not None:
            parts.append(f"input gradients {self.gradients:.1e}")
        parts.append(f"influence of unseen tokens {self.influence:.1e}")
        return ", ".join(parts)


def prove_agreement(
    model: torch.nn.Module,
    backend: str,
    longest: int,
    loss_model: AnswerLoss | None = None,
    packed: bool = True,
) -> Agreement:
    """Prove on the loaded model that we compute what transformers computes.

    The model's modes, attention, methods and gradients and torch's random numbers are afterwards as
    they were before. A model is proven once for packed rows, before a strategy divides it, and
    keeps the result.

    Args:
        model: A transformers causal LM, or a PEFT model around one. It must be whole on its device
            unless it has been proven.
        backend: The attention backend.
        longest: The length of the longest row that will be computed, in tokens.
        loss_model: The loss of a training on `model`; gradients are compared where it is given.
        packed: Whether rows will be packed.

    Raises:
        AttentionError: A difference is over TOLERANCE, or one of the two ways cannot compute.
    """
    causal = unwrap(model)
    proven_backend, earlier = getattr(causal, PROVEN, (None, None))
    if packed and loss_model is None and backend == proven_backend:
        return earlier
    rows = draw_rows(causal)
    gradients = loss_model is not None
    with undisturbed(model), shrink_windows(causal, longest):
        if packed:
            prove_rotation(causal, longest)
        expected = run_reference(causal, rows, gradients)
        # Nothing could be wrong with the answers of such a model, and nothing right.
        if all(bool(row.min() == row.max()) for row in expected.logits):
            raise AttentionError(
                f"this {type(causal).__name__} gives every token the same probability; its files"
                " are damaged, fetch the model again"
            )

        def measure(backend: str, packed: bool) -> Agreement | str:
            """Compare one way with the reference; return the reason where it cannot compute."""
            try:
                return compare(causal, backend, rows, expected, loss_model, packed)
            except torch.OutOfMemoryError:
                raise
            except FAILURES as error:
                return describe(error)

        found = measure(backend, packed)
        tolerance = TOLERANCE[find_dtype(causal)]
        # Both packed runs have the same shapes and round alike, so less is allowed for the
        # influence.
        allowed = Agreement(tolerance, tolerance, tolerance / 10)
        if isinstance(found, Agreement) and not found.within(allowed):
            allowed = allow_rounding(causal, rows, expected, allowed)
        if isinstance(found, Agreement) and found.within(allowed):
            if packed:
                setattr(causal, PROVEN, (backend, found))
            return found
        remedy = "this architecture is not supported"
        for other, other_packed in list_alternatives(backend, packed):
            try:
                with attention_of(causal, other):
                    tried = measure(other, other_packed)
            # transformers raises these where it has no such attention for the model.
            except (ValueError, KeyError):
                continue
            if isinstance(tried, Agreement) and tried.within(allowed):
                remedy = describe_remedy(backend, other, packed, other_packed)
                break
    raise AttentionError(explain(causal, backend, found, allowed, remedy))


def choose_way(model: torch.nn.Module, backend: str, longest: int) -> tuple[str, bool]:
    """Find a way of computing without gradients that is the model's own, and let the model take it.

    The arguments are those of prove_agreement.

    Returns:
        The attention backend, and whether rows may be packed.

    Raises:
        AttentionError: No way is the model's own.
    """
    causal = unwrap(model)
    for way, packed in ((backend, True), *list_alternatives(backend, True)):
        try:
            set_attention(causal, IMPLEMENTATIONS[way])
            prove_agreement(model, way, longest, packed=packed)
        except AttentionError as error:
            failure = error
        # transformers raises these where it has no such attention for the model.
        except (ValueError, KeyError):
            continue
        else:
            return way, packed
    raise failure


def list_alternatives(backend: str, packed: bool) -> list[tuple[str, bool]]:
    """Return other ways of computing that a model may agree with, the fastest first.

    Args:
        backend: The attention backend that does not agree.
        packed: Whether rows were packed with it.

    Returns:
        For each way the backend, and whether rows are packed.
    """
    ways = [("sdpa", True), ("eager", True)] if packed else []
    ways += [(backend, False), ("sdpa", False), ("eager", False)]
    return [way for way in ways if way != (backend, packed)]


def describe_remedy(backend: str, other: str, packed: bool, other_packed: bool) -> str:
    """Return the flags that lead from one way of computing to another."""
    flags = []
    if other != backend:
        flags.append(f"--model.attention {other}")
    if other_packed != packed:
        flags.append("--data.packing false")
    return f"use {' '.join(flags)}, which agrees"


def allow_rounding(
    causal: torch.nn.Module, rows: list[torch.Tensor], expected: Outputs, allowed: Agreement
) -> Agreement:
    """Return what is allowed to a model that enlarges rounding.

    Args:
        causal: The causal LM.
        rows: The rows.
        expected: What the reference gives for them.
        allowed: What is allowed to other models.
    """
    rounded = run_reference(causal, rows, bool(expected.gradients), round_inputs=True)
    noise = (
        differ(rounded.logits, expected.logits),
        differ(rounded.gradients, expected.gradients),
    )
    logits, gradients = (
        max(tolerance, min(MOST, ROUNDINGS * difference))
        for tolerance, difference in zip((allowed.logits, allowed.gradients), noise, strict=True)
    )
    return Agreement(logits, gradients, allowed.influence)


def compare(
    causal: torch.nn.Module,
    backend: str,
    rows: list[torch.Tensor],
    expected: Outputs,
    loss_model: AnswerLoss | None,
    packed: bool,
) -> Agreement:
    """Run the rows our way, packed or one by one, and compare them with the reference."""
    found = run_rows(causal, backend, rows, loss_model, packed)
    # The other rows must not see the first one, nor any token of the last one its end.
    vocabulary = causal.config.get_text_config().vocab_size
    changed = [row.clone() for row in rows]
    changed[0] = (changed[0] + 1) % vocabulary
    changed[-1][-1] = (changed[-1][-1] + 1) % vocabulary
    after = run_rows(causal, backend, changed, None, packed).logits[1:]
    influence = differ([*after[:-1], after[-1][:-1]], [*found.logits[1:-1], found.logits[-1][:-1]])
    gradients = differ(found.gradients, expected.gradients) if loss_model is not None else None
    return Agreement(differ(found.logits, expected.logits), gradients, influence)


def differ(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Return the largest relative difference of a row; infinite where a value is not finite."""
    largest = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        difference = float((ours - theirs).norm() / theirs.norm().clamp_min(1e-30))
        # max() would pass over NaN.
        largest = max(largest, difference) if np.isfinite(difference) else float("inf")
    return largest


def explain(
    causal: torch.nn.Module,
    backend: str,
    found: Agreement | str,
    allowed: Agreement,
    remedy: str,
) -> str:
    """Return the message for rows whose comparison failed.

    Args:
        causal: The causal LM.
        backend: The attention backend.
        found: What was measured, or why nothing could be.
        allowed: What is allowed.
        remedy: What to do.
    """
    name = type(causal).__name__
    if isinstance(found, str):
        return (
            f"attention {backend} and our head cannot compute what {name}'s own eager attention and"
            f" head compute ({found}); {remedy}"
        )
    limits = f"{allowed.logits:.0e}, {allowed.gradients:.0e} and {allowed.influence:.0e}"
    # This condition also holds for NaN.
    if not found.influence <= allowed.influence:
        return (
            f"attention {backend} does not isolate packed rows or shows later tokens, unlike"
            f" {name}'s own eager attention and head ({found}; allowed {limits}); {remedy}"
        )
    return (
        f"attention {backend} and our head compute something else than {name}'s own eager attention"
        f" and head ({found}; allowed {limits}); {remedy}"
    )
