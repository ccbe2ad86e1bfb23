"""The proof at every start that what is computed is what the model computes.

A short packed batch runs through our attention backend, overrides and head. Each of its rows runs
alone through the model as transformers computes it: with eager attention, its own methods and its
own head. Logits and the gradients of the input embeddings must agree.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from medqlora.model.attention.backends import IMPLEMENTATIONS, AttentionError, set_attention
from medqlora.model.attention.packed_batch import find_device, packing_arguments, without_outliers
from medqlora.model.base import compute_hidden, unwrap
from medqlora.model.head_loss import AnswerLoss, compute_logits
from medqlora.model.overrides import without_overrides
from medqlora.model.rotation import prove_rotation

# The tokens of each row. They are few, so that they take less memory than a step of training.
ROWS = (9, 24, 15)
TOKENS = sum(ROWS)
# The names that configs and modules give to the number of keys that a query sees. It is WINDOW
# during the comparison, because rows as short as these would not show a window that is left out.
WINDOW_NAMES = ("sliding_window", "attention_chunk_size", "window_size", "attention_window_size")
WINDOW = 8
# The relative difference of a row's logits or gradients that rounding may cause, by compute dtype.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# Some models enlarge rounding, as a mixture of experts that chooses other experts. A difference may
# be ROUNDINGS times what rounding of the input changes, but never over MOST.
ROUNDINGS = 3
MOST = 0.25
# This attribute of a causal LM holds the backend that packed rows are proven for, and the result.
PROVEN = "medqlora_agreement"
# A model that takes other arguments, or whose head is more than one layer, ends in one of these.
FAILURES = (
    TypeError,
    AttributeError,
    RuntimeError,
    ValueError,
    KeyError,
    IndexError,
    AssertionError,
)


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


@dataclass(frozen=True)
class Outputs:
    """What one way of computing gives for the rows.

    Args:
        logits: float32 [tokens of the row, vocab] of each row.
        gradients: The gradient of the summed loss by the row's input embeddings, float32
            [tokens of the row, hidden] of each row; empty where none was asked for.
    """

    logits: list[torch.Tensor]
    gradients: list[torch.Tensor]


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

        def measure(backend: str, packed: bool) -> Agreement | str:
            """Compare one way with the reference; return the reason where it cannot compute."""
            try:
                return compare(causal, backend, rows, expected, loss_model, packed)
            except torch.OutOfMemoryError:
                raise
            except FAILURES as error:
                return describe(error)

        found = measure(backend, packed)
        tolerance = TOLERANCE.get(causal.dtype, TOLERANCE[torch.bfloat16])
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


def draw_rows(causal: torch.nn.Module) -> list[torch.Tensor]:
    """Return rows of random tokens on the model's device, int64 [tokens of the row] each."""
    config = causal.config.get_text_config()
    positions = max(0, getattr(config, "max_position_embeddings", None) or 0) or max(ROWS)
    # A generator of its own leaves the random numbers of the training as they are.
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(config.vocab_size, (min(length, positions),), generator=generator).to(
            find_device(causal)
        )
        for length in ROWS
    ]


@contextlib.contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Let a model run in eval mode inside the block, and leave no trace in it or in torch."""
    modes = [(module, module.training) for module in model.modules()]
    # Dropout would make two runs of one row differ.
    model.eval()
    try:
        with torch.random.fork_rng(), without_outliers(model):
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def shrink_windows(causal: torch.nn.Module, longest: int) -> Iterator[None]:
    """Let every window that a row of `longest` tokens reaches have WINDOW tokens in the block."""
    holders: dict[int, Any] = {}
    for module in causal.modules():
        for holder in (module, getattr(module, "config", None)):
            holders[id(holder)] = holder
    windows = []
    for holder in holders.values():
        for name in WINDOW_NAMES:
            window = getattr(holder, name, None)
            if type(window) is int and WINDOW < window < longest:
                windows.append((holder, name, window))
                setattr(holder, name, WINDOW)
    try:
        yield
    finally:
        for holder, name, window in windows:
            setattr(holder, name, window)


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


def run_reference(
    causal: torch.nn.Module, rows: list[torch.Tensor], gradients: bool, round_inputs: bool = False
) -> Outputs:
    """Run each row alone as transformers does, with eager attention and the model's own methods.

    Args:
        causal: The causal LM.
        rows: The rows.
        gradients: Whether gradients are asked for.
        round_inputs: Whether each input embedding is moved to a number beside it.

    Raises:
        AttentionError: The model has no such way of computing.
    """
    outputs = Outputs([], [])
    try:
        with (
            attention_of(causal, "eager"),
            without_overrides(causal),
            torch.set_grad_enabled(gradients),
        ):
            for row in rows:
                with embedding_leaf(causal, round_inputs) as leaves:
                    logits = causal(input_ids=row[None], use_cache=False).logits[0].float()
                outputs.logits.append(logits.detach())
                if gradients:
                    loss = F.cross_entropy(logits[:-1], row[1:], reduction="sum")
                    outputs.gradients.append(torch.autograd.grad(loss, leaves[0])[0][0].float())
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        raise AttentionError(
            f"{type(causal).__name__}: transformers' own eager attention and head cannot run, so"
            f" nothing can be compared with them: {describe(error)}; this architecture is not"
            " supported"
        ) from None
    return outputs


@contextlib.contextmanager
def attention_of(causal: torch.nn.Module, backend: str) -> Iterator[None]:
    """Let a model compute with the attention function of a backend inside the block."""
    attention = causal.config._attn_implementation
    set_attention(causal, IMPLEMENTATIONS[backend])
    try:
        yield
    finally:
        set_attention(causal, attention)


def run_ours(
    causal: torch.nn.Module,
    backend: str,
    rows: Sequence[torch.Tensor],
    loss_model: AnswerLoss | None,
) -> Outputs:
    """Run rows in one packed batch as a training and the scoring do.

    Args:
        causal: The causal LM.
        backend: The attention backend.
        rows: The rows.
        loss_model: The loss whose gradients are asked for, or None.
    """
    lengths = [len(row) for row in rows]
    positions = [torch.arange(length) for length in lengths]
    ends = np.cumsum(lengths)
    device = find_device(causal)
    batch = {"cu_seqlens": np.append(0, ends).astype(np.int32), "max_seqlen": max(lengths)}
    inputs = {
        "input_ids": torch.cat(list(rows))[None],
        "position_ids": torch.cat(positions)[None].to(device),
        **packing_arguments(backend, batch, device),
    }
    with torch.no_grad():
        logits = compute_logits(causal, compute_hidden(causal, **inputs)[0])
    gradients = []
    if loss_model is not None:
        # A row's last token predicts none of the row.
        labelled = np.setdiff1d(np.arange(ends[-1]), ends - 1)
        predict_at = torch.from_numpy(labelled).to(device)
        targets = inputs["input_ids"][0, predict_at + 1]
        with torch.enable_grad(), embedding_leaf(causal) as leaves:
            loss = loss_model(**inputs, predict_at=predict_at, targets=targets)
            (gradient,) = torch.autograd.grad(loss, leaves[0])
        gradients = list(gradient[0].float().split(lengths))
    return Outputs(list(logits.split(lengths)), gradients)


@contextlib.contextmanager
def embedding_leaf(
    causal: torch.nn.Module, round_inputs: bool = False
) -> Iterator[list[torch.Tensor]]:
    """Collect the outputs of the input embeddings in the block, as leaves that take gradients.

    Args:
        causal: The causal LM.
        round_inputs: Whether each number is moved to one beside it, up or down at random.
    """
    leaves: list[torch.Tensor] = []

    def cut(module: torch.nn.Module, inputs: Any, out: torch.Tensor) -> torch.Tensor:
        leaf = out.detach()
        if round_inputs:
            generator = torch.Generator().manual_seed(1)
            signs = torch.randint(2, out.shape, generator=generator).to(out.device) * 2 - 1
            leaf = leaf * (1 + torch.finfo(causal.dtype).eps * signs).to(out.dtype)
        leaves.append(leaf.requires_grad_())
        # A model may change its embeddings in place, which a leaf does not allow.
        return leaves[-1].clone()

    hook = causal.get_input_embeddings().register_forward_hook(cut)
    try:
        yield leaves
    finally:
        hook.remove()


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


def run_rows(
    causal: torch.nn.Module,
    backend: str,
    rows: list[torch.Tensor],
    loss_model: AnswerLoss | None,
    packed: bool,
) -> Outputs:
    """Run rows our way, in one packed batch or one by one; see run_ours."""
    outputs = Outputs([], [])
    for batch in [rows] if packed else [[row] for row in rows]:
        part = run_ours(causal, backend, batch, loss_model)
        outputs.logits.extend(part.logits)
        outputs.gradients.extend(part.gradients)
    return outputs


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
    own = f"{type(causal).__name__}'s own eager attention and head"
    if isinstance(found, str):
        return f"attention {backend} and our head cannot compute what {own} do ({found}); {remedy}"
    fault = f"attention {backend} and our head compute something else than {own}"
    if not found.influence <= allowed.influence:
        fault = (
            f"attention {backend} does not isolate packed rows or shows later tokens, unlike {own}"
        )
    limits = f"{allowed.logits:.0e}, {allowed.gradients:.0e} and {allowed.influence:.0e}"
    return f"{fault} ({found}; allowed {limits}); {remedy}"


def describe(error: Exception) -> str:
    """Return the message of an error of a library in one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
