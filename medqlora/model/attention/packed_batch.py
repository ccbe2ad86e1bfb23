"""A packed batch as the model takes it, and the proof that its documents stay apart."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from medqlora.model.attention.backends import AttentionError
from medqlora.model.attention.documents import locate_documents

# The relative error that packed rows may cause in each other, by compute dtype.
ISOLATION_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def packing_arguments(backend: str, batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Keyword arguments that tell the model's attention where documents end; `batch` is from
    packing.collate.
    """
    cu_seqlens = torch.as_tensor(batch["cu_seqlens"])
    longest = batch["max_seqlen"]
    if backend in ("varlen", "grouped"):
        return {"documents": locate_documents(cu_seqlens, longest, device, backend)}
    if backend == "flash":
        cu_seqlens = cu_seqlens.to(device, non_blocking=True)
        return {
            "cu_seq_lens_q": cu_seqlens,
            "cu_seq_lens_k": cu_seqlens,
            "max_length_q": longest,
            "max_length_k": longest,
        }
    return {}


def move_batch(batch: dict[str, Any], backend: str, device: torch.device) -> dict[str, Any]:
    """Batch of packing.collate -> arguments of losses.AnswerLoss on the device; to a GPU from
    pinned memory, without waiting.
    """
    tensors = {
        key: torch.from_numpy(batch[key])
        for key in ("input_ids", "position_ids", "predict_at", "targets")
    }
    if device.type == "cuda":
        tensors = {
            key: tensor.pin_memory().to(device, non_blocking=True)
            for key, tensor in tensors.items()
        }
    return tensors | packing_arguments(backend, batch, device)


def find_device(model: torch.nn.Module) -> torch.device:
    """Where a model computes: where its rotary tables are (offloaded weights rest elsewhere), else
    its weights.
    """
    return next(itertools.chain(model.buffers(), model.parameters())).device


@contextlib.contextmanager
def without_outliers(model: torch.nn.Module) -> Iterator[None]:
    """bitsandbytes' int8 layers multiply the columns in which any row has a large input in 16 bits:
    so one row changes how its neighbours are rounded, which is no mistake of attention."""
    states = [
        module.state
        for module in model.modules()
        if hasattr(getattr(module, "state", None), "threshold")
    ]
    thresholds = [state.threshold for state in states]
    for state in states:
        state.threshold = 0.0
    try:
        yield
    finally:
        for state, threshold in zip(states, thresholds, strict=True):
            state.threshold = threshold


@torch.no_grad()
def verify_isolation(
    backbone: torch.nn.Module, backend: str, vocabulary: int, tolerance: float
) -> float:
    """Prove on the loaded model that packed documents do not see each other.

    Runs three documents of random tokens packed and alone, and packed again with the first one
    changed.

    Returns: the largest difference of hidden states between packed and alone, relative to the
        largest hidden state.

    Raises: AttentionError: the difference is over `tolerance`, or a document changed with its
        neighbour.
    """
    device = find_device(backbone)
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(vocabulary, (length,), generator=generator) for length in (7, 12, 9)]

    def run(parts: list[torch.Tensor]) -> torch.Tensor:
        lengths = torch.tensor([len(part) for part in parts])
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
        batch = {"cu_seqlens": cu_seqlens, "max_seqlen": int(lengths.max())}
        position_ids = torch.cat([torch.arange(len(part)) for part in parts])
        out = backbone(
            input_ids=torch.cat(parts)[None].to(device),
            position_ids=position_ids[None].to(device),
            attention_mask=None,
            use_cache=False,
            **packing_arguments(backend, batch, device),
        )
        return out.last_hidden_state[0].float()  # [tokens, hidden]

    training = backbone.training
    backbone.eval()
    with without_outliers(backbone):
        packed = run(documents)
        alone = torch.cat([run([document]) for document in documents])
        other = run([(documents[0] + 1) % vocabulary, *documents[1:]])
    backbone.train(training)
    scale = packed.abs().max().item()
    error = (packed - alone).abs().max().item() / scale
    leak = (packed - other)[len(documents[0]) :].abs().max().item() / scale
    if not error <= tolerance or not leak <= tolerance / 10:  # also true for NaN
        raise AttentionError(
            f"attention {backend} does not isolate packed rows on this model (packed against alone"
            f" {error:.1e}, neighbour's influence {leak:.1e}, allowed {tolerance:.0e}); choose"
            " another --model.attention or set --data.packing false"
        )
    return error
