"""Answer-only cross entropy: the head runs at labelled positions alone, a chunk at a time, and its
gradient is made with the loss.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from medqlora.model.base import backbone_of, unwrap
from medqlora.model.fused_head import describe_logits
from medqlora.model.overrides import apply_overrides, make_head_override


class AnswerLoss(torch.nn.Module):
    """A causal language model whose forward is the summed loss over a packed batch's supervised
    tokens.

    Wrap this module (not the model) in DDP, DeepSpeed or FSDP. The sum is normalised by the caller,
    by the supervised tokens of the whole global batch, so that accumulation and the number of
    processes do not change the gradient.
    """

    def __init__(self, model: torch.nn.Module, chunk: int):
        """model: a transformers causal LM, or a PEFT model around one; chunk: labelled positions
        per head call.
        """
        super().__init__()
        self.model = model
        self.chunk = chunk
        head = unwrap(model).get_output_embeddings()
        plain = type(head) is torch.nn.Linear and not head.weight.requires_grad
        self.fused = plain and apply_overrides(
            [head], [make_head_override(unwrap(model))], head.weight.dtype
        )

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        predict_at: torch.Tensor,
        targets: torch.Tensor,
        chunks: int | None = None,
        **packing: Any,
    ) -> torch.Tensor:
        """input_ids, position_ids int64 [1, tokens]; predict_at, targets int64 [labelled]
        (packing.collate) -> float32 []

        chunks: calls of the head; default as few as `chunk` allows. Where the head is divided over
        ranks, each call gathers it from all of them, so they must make the same number of calls:
        see count_chunks.
        """
        causal = unwrap(self.model)
        hidden = backbone_of(causal)(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=None,
            use_cache=False,
            **packing,
        ).last_hidden_state
        labelled = hidden[0].index_select(0, predict_at)  # [labelled, hidden]
        total = labelled.new_zeros((), dtype=torch.float32)
        chunks = chunks or count_chunks(len(targets), self.chunk)
        pieces = list(zip(labelled.tensor_split(chunks), targets.tensor_split(chunks), strict=True))
        for piece, target in pieces:
            if self.fused:
                scale, cap = describe_logits(causal)
                total = total + causal.get_output_embeddings()(piece, target, scale, cap)
            # else all chunks' logits would wait for the backward pass
            elif len(pieces) > 1 and torch.is_grad_enabled():
                total = total + checkpoint(
                    sum_cross_entropy, causal, piece, target, use_reentrant=False
                )
            else:
                total = total + sum_cross_entropy(causal, piece, target)
        return total


def count_chunks(labelled: int, chunk: int) -> int:
    """Calls of the head for so many labelled positions."""
    return max(1, -(-labelled // chunk))


def compute_logits(causal: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Hidden states [positions, hidden] -> logits float32 [positions, vocab], scaled and capped as
    the model itself does.
    """
    scale, cap = describe_logits(causal)
    logits = causal.get_output_embeddings()(hidden)
    logits = logits if scale == 1 else logits * scale
    return (logits if cap is None else cap * torch.tanh(logits / cap)).float()


def sum_cross_entropy(
    causal: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    return F.cross_entropy(compute_logits(causal, hidden), targets, reduction="sum")
