"""Answer-only cross entropy: the head runs at labelled positions alone, a chunk at a time, and its
gradient is made with the loss.
"""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from medqlora.model.base import backbone_of, unwrap


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
        self.lean = type(head) is torch.nn.Linear and not head.weight.requires_grad
        # inside the head's own call, where a strategy that divides it has gathered it
        if self.lean:
            head.forward = types.MethodType(forward_head, head)

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
            if self.lean:
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


def describe_logits(causal: torch.nn.Module) -> tuple[float, float | None]:
    """What the model does to its head's output: factor, and cap of a tanh afterwards."""
    config = causal.config.get_text_config()
    scale = getattr(config, "logit_scale", None)  # Cohere
    if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
        scale = 1 / divisor
    # Gemma-2
    return 1.0 if scale is None else scale, getattr(config, "final_logit_softcapping", None)


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


def forward_head(
    head: torch.nn.Linear,
    hidden: torch.Tensor,
    targets: torch.Tensor | None = None,
    scale: float = 1.0,
    cap: float | None = None,
) -> torch.Tensor:
    """A head's own forward; with targets the summed loss instead."""
    if targets is None:
        return F.linear(hidden, head.weight, head.bias)
    return HeadLoss.apply(hidden, head, targets, scale, cap)


class HeadLoss(torch.autograd.Function):
    """Summed cross entropy of a frozen head. The gradient of its input is made at once from the
    same logits, in their memory, so that neither they nor the head are needed again in the backward
    pass (as Liger-Kernel does, Hsu et al., 2024, arXiv 2410.10989).
    """

    @staticmethod
    def forward(
        ctx,
        hidden: torch.Tensor,
        head: torch.nn.Linear,
        targets: torch.Tensor,
        scale: float,
        cap: float | None,
    ) -> torch.Tensor:
        """hidden [labelled, hidden], targets int64 [labelled] -> float32 []"""
        scores = F.linear(hidden, head.weight, head.bias).float()
        slope = scale  # [labelled, vocab]
        if scale != 1:
            scores *= scale
        if cap is not None:
            scores.div_(cap).tanh_()
            slope = scale * (1 - scores * scores) if ctx.needs_input_grad[0] else None
            scores *= cap
        targets = targets[:, None]
        picked = scores.gather(1, targets)
        highest = scores.amax(1, keepdim=True)
        total = scores.sub_(highest).exp_().sum(1, keepdim=True)
        if ctx.needs_input_grad[0]:
            # small probabilities vanish in it
            ctx.lift = lift = 1024.0 if hidden.dtype is torch.float16 else 1.0
            scores.div_(total).scatter_add_(1, targets, torch.full_like(picked, -1.0))
            if torch.is_tensor(slope) or slope * lift != 1:
                scores *= slope * lift
            ctx.save_for_backward(scores.to(hidden.dtype) @ head.weight)
        return (total.log() + highest - picked).sum()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        (ready,) = ctx.saved_tensors
        return (ready * (gradient / ctx.lift)).to(ready.dtype), None, None, None, None
