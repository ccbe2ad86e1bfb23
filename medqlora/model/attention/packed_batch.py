"""The arguments of a model for a packed batch, and the proof that its documents stay isolated."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from medqlora.model.attention.backends import AttentionError
from medqlora.model.attention.documents import locate_documents

# The relative difference between packed and single documents that rounding may cause, by compute
# dtype.
ISOLATION_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


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


@torch.no_grad()
def verify_isolation(
    backbone: torch.nn.Module, backend: str, vocabulary: int, tolerance: float
) -> float:
    """Prove on the loaded model that packed documents do not see each other.

    Three documents of random tokens run packed and alone, and packed again with the first one
    changed.

    Args:
        backbone: The model without its head.
        backend: The attention backend.
        vocabulary: The number of tokens to draw from.
        tolerance: The allowed difference (see ISOLATION_TOLERANCE). The influence of a changed
            neighbour may be a tenth of it.

    Returns:
        The largest difference of hidden states between packed and alone, relative to the largest
        hidden state.

    Raises:
        AttentionError: The difference or the influence is over what is allowed.
    """
    device = find_device(backbone)
    # A generator of its own leaves the random numbers of the training as they are.
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(vocabulary, (length,), generator=generator) for length in (7, 12, 9)]

    def run_packed(rows: list[torch.Tensor]) -> torch.Tensor:
        """Return the hidden states of rows in one packed batch, float32 [tokens, hidden]."""
        lengths = torch.tensor([len(row) for row in rows])  # int64 [rows]
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()  # int32 [rows + 1]
        batch = {"cu_seqlens": cu_seqlens, "max_seqlen": int(lengths.max())}
        position_ids = torch.cat([torch.arange(len(row)) for row in rows])  # [tokens]
        # A mask of ones or a cache would let transformers' own backends mix the rows.
        out = backbone(
            input_ids=torch.cat(rows)[None].to(device),
            position_ids=position_ids[None].to(device),
            attention_mask=None,
            use_cache=False,
            **packing_arguments(backend, batch, device),
        )
        return out.last_hidden_state[0].float()

    # Dropout would make two runs of one row differ.
    training = backbone.training
    backbone.eval()
    with without_outliers(backbone):
        packed = run_packed(documents)
        alone = torch.cat([run_packed([document]) for document in documents])
        # Causal attention can leak only into later documents, so the first one is changed.
        changed = run_packed([(documents[0] + 1) % vocabulary, *documents[1:]])
    backbone.train(training)
    scale = packed.abs().max().item()
    error = (packed - alone).abs().max().item() / scale
    # The changed document itself is left out.
    leak = (packed - changed)[len(documents[0]) :].abs().max().item() / scale
    # These conditions also hold for NaN, which `error > tolerance` would let pass.
    # Both packed runs have the same shapes and round alike, so less is allowed for the leak.
    if not error <= tolerance or not leak <= tolerance / 10:
        raise AttentionError(
            f"attention {backend} does not isolate packed rows on this model (packed against alone"
            f" {error:.1e}, neighbour's influence {leak:.1e}, allowed {tolerance:.0e}); choose"
            " another --model.attention or set --data.packing false"
        )
    return error
