"""Where the documents of a packed sequence lie, and their padded places in groups."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DOCUMENTS = "medqlora_documents"  # our name in transformers' AttentionInterface


@dataclass(frozen=True)
class Documents:
    """Where a packed sequence's documents lie.

    cu_seqlens int32 [documents + 1]; max_seqlen: longest; for the grouped path also gather int64
    [padded tokens]: source of each slot, documents of like length side by side and padded to their
    group's longest; scatter int64 [tokens]: slot of each token; real bool [padded tokens, 1, 1];
    groups: (documents, length) of each group; on_gpu: whose kernels run, also where the tensors are
    on the meta device for a forecast.
    """

    cu_seqlens: torch.Tensor
    max_seqlen: int
    gather: torch.Tensor | None = None
    scatter: torch.Tensor | None = None
    real: torch.Tensor | None = None
    groups: tuple[tuple[int, int], ...] = ()
    on_gpu: bool = False


def is_grouped(backend: str, device: torch.device) -> bool:
    """Whether documents lie side by side in groups; a CPU has no variable-length kernel, whatever
    the backend's name.
    """
    return backend == "grouped" or device.type == "cpu"


def locate_documents(
    cu_seqlens: torch.Tensor, max_seqlen: int, device: torch.device, backend: str = "varlen"
) -> Documents:
    """Prepare once per batch what every layer needs. cu_seqlens int32 [documents + 1], on the CPU;
    backend: varlen or grouped.
    """
    if not is_grouped(backend, device):
        return Documents(cu_seqlens.to(device, non_blocking=True), max_seqlen, on_gpu=True)
    starts = cu_seqlens[:-1].tolist()
    lengths = cu_seqlens.diff().tolist()
    groups: list[list[int]] = []
    for document in sorted(range(len(lengths)), key=lambda d: -lengths[d]):
        if groups and lengths[document] >= 0.8 * lengths[groups[-1][0]]:
            groups[-1].append(document)
        else:
            groups.append([document])
    slots = []
    keeps = []
    for members in groups:
        longest = lengths[members[0]]
        place = torch.arange(longest)
        for document in members:
            slots.append(starts[document] + place.clamp(max=lengths[document] - 1))
            keeps.append(place < lengths[document])
    gather = torch.cat(slots)
    real = torch.cat(keeps)
    scatter = torch.empty(int(cu_seqlens[-1]), dtype=torch.int64)
    scatter[gather[real]] = real.nonzero().flatten()
    shapes = tuple((len(members), lengths[members[0]]) for members in groups)
    moved = (tensor.to(device) for tensor in (gather, scatter, real[:, None, None]))
    return Documents(cu_seqlens, max_seqlen, *moved, shapes, on_gpu=device.type != "cpu")


class Pad(torch.autograd.Function):
    """tokens [tokens, heads, width] -> [padded tokens, heads, width]; padding gets no gradient, so
    backward is a gather.
    """

    @staticmethod
    def forward(ctx, tokens, documents):
        ctx.documents = documents
        return tokens.index_select(0, documents.gather)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, ctx.documents.scatter), None


class Unpad(torch.autograd.Function):
    """The inverse of Pad; its backward puts zeros on padding."""

    @staticmethod
    def forward(ctx, padded, documents):
        ctx.documents = documents
        return padded.index_select(0, documents.scatter)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, ctx.documents.gather) * ctx.documents.real, None
