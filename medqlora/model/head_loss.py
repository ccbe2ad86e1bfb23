"""The cross entropy of answers.

The head runs at labelled positions only, on one chunk of them at a time, and the gradient of its
input is computed together with the loss.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from medqlora.model.base import compute_hidden, unwrap
from medqlora.model.fused_head import describe_logits
from medqlora.model.overrides import apply_overrides, make_head_override


class AnswerLoss(torch.nn.Module):
    """A causal language model whose forward returns the summed loss of a packed batch.

    DDP, DeepSpeed and FSDP must wrap this module, not the model inside. The caller divides the sum
    by the number of supervised tokens of the whole global batch, so that neither accumulation nor
    the number of processes changes the gradient.
    """

    def __init__(self, model: torch.nn.Module, chunk: int):
        """Wrap a model, and replace the forward of its head where the head is plain and frozen.

        Args:
            model: A transformers causal LM, or a PEFT model around one.
            chunk: The number of labelled positions that the head computes at a time.
        """
        super().__init__()
        self.model = model
        self.chunk = chunk
        head = unwrap(model).get_output_embeddings()
        # A quantized head and one with an adapter are of other classes. HeadLoss reads a plain
        # weight and makes no gradient of it.
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
        """Compute the summed cross entropy; the arguments are those of batches.collate.collate.

        Args:
            input_ids: int64 [1, tokens].
            position_ids: int64 [1, tokens].
            predict_at: The positions whose next token is supervised, int64 [labelled].
            targets: Those next tokens, int64 [labelled].
            chunks: The number of calls of the head; by default as few as `self.chunk` allows. Where
                the head is divided over ranks, each call gathers it from all of them, so all ranks
                must make the same number of calls (see count_chunks).
            packing: Arguments of the attention (see packed_batch.packing_arguments).

        Returns:
            The sum over the labelled positions, a float32 scalar.
        """
        hidden = compute_hidden(unwrap(self.model), input_ids, position_ids, **packing)
        return self.sum_losses(hidden[0], predict_at, targets, chunks)

    def sum_losses(
        self,
        hidden: torch.Tensor,
        predict_at: torch.Tensor,
        targets: torch.Tensor,
        chunks: int | None = None,
    ) -> torch.Tensor:
        """Compute the summed cross entropy from hidden states, [tokens, hidden]; see forward."""
        causal = unwrap(self.model)
        labelled = hidden.index_select(0, predict_at)  # [labelled, hidden]
        # The chunks' losses are summed in float32, whatever the compute dtype.
        total = labelled.new_zeros((), dtype=torch.float32)
        chunks = chunks or count_chunks(len(targets), self.chunk)
        # With more chunks than positions the last chunks are empty. Their loss is zero, but they
        # call the head as other ranks do.
        hidden_chunks = labelled.tensor_split(chunks)
        target_chunks = targets.tensor_split(chunks)
        for chunk, target in zip(hidden_chunks, target_chunks, strict=True):
            if self.fused:
                # The head is called as a module, so that the hooks of a strategy gather its weight.
                scale, cap = describe_logits(causal)
                loss = causal.get_output_embeddings()(chunk, target, scale, cap)
            elif chunks > 1 and torch.is_grad_enabled():
                # Without recomputation the logits of all chunks would wait for the backward pass.
                loss = checkpoint(sum_cross_entropy, causal, chunk, target, use_reentrant=False)
            else:
                loss = sum_cross_entropy(causal, chunk, target)
            total = total + loss
        return total


def count_chunks(labelled: int, chunk: int) -> int:
    """Return the number of calls of the head for `labelled` positions, at least one."""
    return max(1, -(-labelled // chunk))


def compute_logits(causal: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Compute logits, scaled and capped as the model itself does (see describe_logits).

    Args:
        causal: A transformers causal LM.
        hidden: Hidden states, [positions, hidden].

    Returns:
        float32 [positions, vocab].
    """
    scale, cap = describe_logits(causal)
    logits = causal.get_output_embeddings()(hidden)
    if scale != 1:
        logits = logits * scale
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    return logits.float()


def sum_cross_entropy(
    causal: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Return the summed cross entropy, a float32 scalar.

    Args:
        causal: A transformers causal LM.
        hidden: Hidden states, [positions, hidden].
        targets: The right tokens, int64 [positions].
    """
    return F.cross_entropy(compute_logits(causal, hidden), targets, reduction="sum")
