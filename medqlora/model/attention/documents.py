"""The positions of documents in a packed sequence, and their padding in groups of like length."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DOCUMENTS = "medqlora_documents"  # the name of our function in transformers' AttentionInterface


@dataclass(frozen=True)
class Documents:
    """The positions of the documents of a packed sequence.

    The backend grouped lays documents of like length side by side, each padded to the longest of
    its group. A place of this layout is called a slot. The other backends need no slots.

    Args:
        cu_seqlens: Where documents begin and end in the sequence, int32 [documents + 1].
        max_seqlen: The length of the longest document.
        gather: The token of each slot, int64 [slots]; padding repeats a document's last token.
        scatter: The slot of each token, int64 [tokens].
        real: Whether a slot is no padding, bool [slots, 1, 1].
        groups: The number of documents and the padded length of each group.
        on_gpu: Whether a GPU's kernels run; for a forecast on the meta device, those of the GPU
            that is forecast.
    """

    cu_seqlens: torch.Tensor
    max_seqlen: int
    gather: torch.Tensor | None = None
    scatter: torch.Tensor | None = None
    real: torch.Tensor | None = None
    groups: tuple[tuple[int, int], ...] = ()
    on_gpu: bool = False


def is_grouped(backend: str, device: torch.device) -> bool:
    """Whether documents are laid side by side in groups.

    A CPU has no variable-length kernel, so documents are grouped there with the backend varlen too.
    """
    return backend == "grouped" or device.type == "cpu"


def locate_documents(
    cu_seqlens: torch.Tensor, max_seqlen: int, device: torch.device, backend: str = "varlen"
) -> Documents:
    """Prepare once per batch what the attention of every layer needs.

    Args:
        cu_seqlens: Where documents begin and end, int32 [documents + 1], on the CPU.
        max_seqlen: The length of the longest document.
        device: The device that is computed on.
        backend: "varlen" or "grouped".
    """
    # The variable-length kernel reads cu_seqlens, so tokens stay where they are.
    if not is_grouped(backend, device):
        return Documents(cu_seqlens.to(device, non_blocking=True), max_seqlen, on_gpu=True)
    starts = cu_seqlens[:-1].tolist()
    lengths = cu_seqlens.diff().tolist()
    groups: list[list[int]] = []
    # A group takes documents of at least 80 % of its longest, so at most a fifth of it is padding.
    for document in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        if groups and lengths[document] >= 0.8 * lengths[groups[-1][0]]:
            groups[-1].append(document)
        else:
            groups.append([document])
    sources = []
    real_parts = []
    for members in groups:
        positions = torch.arange(lengths[members[0]])  # [padded length]
        for document in members:
            # Padding repeats the last token. It lies behind all real keys, so causal attention
            # hides it from real queries.
            sources.append(starts[document] + positions.clamp(max=lengths[document] - 1))
            real_parts.append(positions < lengths[document])
    gather = torch.cat(sources)  # int64 [slots]
    real = torch.cat(real_parts)  # bool [slots]
    scatter = torch.empty(int(cu_seqlens[-1]), dtype=torch.int64)
    # Each token has exactly one real slot, so this inverts `gather`.
    scatter[gather[real]] = real.nonzero().flatten()
    shapes = tuple((len(members), lengths[members[0]]) for members in groups)
    return Documents(
        cu_seqlens,
        max_seqlen,
        gather=gather.to(device),
        scatter=scatter.to(device),
        real=real[:, None, None].to(device),
        groups=shapes,
        on_gpu=device.type != "cpu",
    )


class Pad(torch.autograd.Function):
    """Lays tokens in slots: [tokens, heads, width] -> [slots, heads, width].

    Padding passes no gradient on, so the backward pass reads the slot of each token.
    """

    @staticmethod
    def forward(ctx, tokens: torch.Tensor, documents: Documents) -> torch.Tensor:
        """Return the token of each slot."""
        ctx.documents = documents
        return tokens.index_select(0, documents.gather)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        """Return the gradient of the tokens."""
        # The gradient of padding is zero already: Unpad.backward clears it for queries, and no real
        # query sees a padded key. Reading one slot per token equals the sum over its slots.
        return grad.index_select(0, ctx.documents.scatter), None


class Unpad(torch.autograd.Function):
    """Takes tokens out of slots: [slots, heads, width] -> [tokens, heads, width]."""

    @staticmethod
    def forward(ctx, padded: torch.Tensor, documents: Documents) -> torch.Tensor:
        """Return the slot of each token."""
        ctx.documents = documents
        return padded.index_select(0, documents.scatter)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        """Return the gradient of the slots, which is zero for padding."""
        # `gather` gives padding the gradient of a document's last token. Without the factor that
        # gradient would reach the keys and values of real tokens once more.
        return grad.index_select(0, ctx.documents.gather) * ctx.documents.real, None
