"""A frozen head whose loss and gradient are made together."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def describe_logits(causal: torch.nn.Module) -> tuple[float, float | None]:
    """What the model does to its head's output: factor, and cap of a tanh afterwards."""
    config = causal.config.get_text_config()
    scale = getattr(config, "logit_scale", None)  # Cohere
    if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
        scale = 1 / divisor
    # Gemma-2
    return 1.0 if scale is None else scale, getattr(config, "final_logit_softcapping", None)


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
