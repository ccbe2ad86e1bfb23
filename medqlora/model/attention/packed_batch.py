"""The arguments of a model for a packed batch."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch

from medqlora.model.attention.documents import locate_documents


def packing_arguments(backend: str, batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return the keyword arguments that tell a model's attention where documents end.

    Args:
        backend: The attention backend.
        batch: A micro-batch (see batches.collate.collate).
        device: The device that is computed on.
    """
    cu_seqlens = torch.as_tensor(batch["cu_seqlens"])
    longest = batch["max_seqlen"]
    if backend in ("varlen", "grouped"):
        return {"documents": locate_documents(cu_seqlens, longest, device, backend)}
    if backend == "flash":
        # Where one of the four is missing, each layer infers them from position_ids and waits for
        # the GPU. The lengths are Python ints for the same reason.
        cu_seqlens = cu_seqlens.to(device, non_blocking=True)
        return {
            "cu_seq_lens_q": cu_seqlens,
            "cu_seq_lens_k": cu_seqlens,
            "max_length_q": longest,
            "max_length_k": longest,
        }
    # transformers' sdpa and flex find the documents where position_ids begin anew, but only if
    # there is neither a mask nor a cache.
    return {}


def move_batch(batch: dict[str, Any], backend: str, device: torch.device) -> dict[str, Any]:
    """Return a micro-batch as arguments of head_loss.AnswerLoss on a device.

    Args:
        batch: A micro-batch (see batches.collate.collate).
        backend: The attention backend.
        device: The device that is computed on.
    """
    tensors = {}
    for key in ("input_ids", "position_ids", "predict_at", "targets"):
        tensor = torch.from_numpy(batch[key])
        if device.type == "cuda":
            # Only a copy from pinned memory runs beside the GPU's work.
            tensor = tensor.pin_memory().to(device, non_blocking=True)
        tensors[key] = tensor
    return tensors | packing_arguments(backend, batch, device)


def find_device(model: torch.nn.Module) -> torch.device:
    """Return the device that a model computes on.

    That is the device of its first buffer, which is a table of rotary embeddings, because weights
    may be offloaded elsewhere. A model without buffers computes where its weights are.
    """
    return next(itertools.chain(model.buffers(), model.parameters())).device


@contextlib.contextmanager
def without_outliers(model: torch.nn.Module) -> Iterator[None]:
    """Let int8 layers compute without their search for outliers inside the block.

    int8 layers of bitsandbytes multiply a column in 16 bits where any row has a large input in it.
    So one row changes how its neighbours are rounded, which is no fault of the attention.
    """
    states = [
        module.state
        for module in model.modules()
        if hasattr(getattr(module, "state", None), "threshold")
    ]
    thresholds = [state.threshold for state in states]
    for state in states:
        # bitsandbytes does not look for outliers where the threshold is zero.
        state.threshold = 0.0
    try:
        yield
    finally:
        for state, threshold in zip(states, thresholds, strict=True):
            state.threshold = threshold
