"""Two ways of computing a few short rows: ours, and the model's own in transformers."""

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
from medqlora.model.base import compute_hidden
from medqlora.model.head_loss import AnswerLoss, compute_logits
from medqlora.model.overrides import without_overrides

# The tokens of each row. They are few, so that they take less memory than a step of training.
ROWS = (24, 15)
TOKENS = sum(ROWS)
# The names that configs and modules give to the number of keys that a query sees. It is WINDOW
# during the comparison, because rows as short as these would not show a window that is left out.
WINDOW_NAMES = ("sliding_window", "attention_chunk_size", "window_size", "attention_window_size")
WINDOW = 8
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
class Outputs:
    """What one way of computing gives for the rows.

    Args:
        logits: float32 [tokens of the row, vocab] of each row.
        gradients: The gradient of the summed loss by the row's input embeddings, float32
            [tokens of the row, hidden] of each row; empty where none was asked for.
    """

    logits: list[torch.Tensor]
    gradients: list[torch.Tensor]


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


def find_dtype(causal: torch.nn.Module) -> torch.dtype:
    """Return the dtype that a model rounds to, which is that of its coarsest weights."""
    # Embeddings and adapters may be float32 in a model that computes in 16 bits. bitsandbytes
    # computes with its int8 weights in float16.
    roundings = {torch.float32: torch.float32, torch.int8: torch.float16}
    roundings |= {dtype: dtype for dtype in (torch.float16, torch.bfloat16)}
    dtypes = {roundings.get(parameter.dtype) for parameter in causal.parameters()} - {None}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


@contextlib.contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Let a model run in eval mode inside the block, and leave no trace in it or in torch."""
    modes = [(module, module.training) for module in model.modules()]
    # Dropout would make two runs of one row differ.
    model.eval()
    try:
        device = find_device(model)
        # Without a list, torch would warn where there are several GPUs.
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), without_outliers(model):
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
    ids = torch.cat(list(rows))  # int64 [tokens]
    inputs = {
        "input_ids": ids[None],
        "position_ids": torch.cat(positions)[None].to(device),
        **packing_arguments(backend, batch, device),
    }
    gradients = []
    with torch.set_grad_enabled(loss_model is not None), embedding_leaf(causal) as leaves:
        hidden = compute_hidden(causal, **inputs)[0]  # [tokens, hidden]
        with torch.no_grad():
            logits = compute_logits(causal, hidden)
        if loss_model is not None:
            # A row's last token predicts none of the row.
            labelled = np.setdiff1d(np.arange(ends[-1]), ends - 1)
            predict_at = torch.from_numpy(labelled).to(device)
            loss = loss_model.sum_losses(hidden, predict_at, ids[predict_at + 1])
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
            leaf = leaf * (1 + torch.finfo(find_dtype(causal)).eps * signs).to(out.dtype)
        leaves.append(leaf.requires_grad_())
        # A model may change its embeddings in place, which a leaf does not allow.
        return leaves[-1].clone()

    hook = causal.get_input_embeddings().register_forward_hook(cut)
    try:
        yield leaves
    finally:
        hook.remove()


def describe(error: Exception) -> str:
    """Return the message of an error of a library in one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
