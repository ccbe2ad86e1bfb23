"""The loss of a frozen head, computed together with the gradient of its input."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def describe_logits(causal: torch.nn.Module) -> tuple[float, float | None]:
    """Return what a model does to the output of its head to get logits.

    Configs give these numbers many names. A name that is not here is noticed at the start of every
    run (see agreement.prove_agreement).

    Returns:
        The factor by which the output is multiplied (Cohere, Granite and Falcon-H1 have one), and
        the cap of the function cap * tanh(logits / cap) that follows in Gemma-2, or None.
    """
    config = causal.config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):
        value = getattr(config, name, None)
        scale *= 1.0 if value is None else value
    # Granite's number divides the logits, Cohere's multiplies them.
    divisor = getattr(config, "logits_scaling", None)
    if divisor is not None:
        scale /= divisor
    cap = getattr(config, "final_logit_softcapping", None)
    if cap is None:
        cap = getattr(config, "logits_soft_cap", None)  # RecurrentGemma's name
    return scale, cap


def forward_head(
    head: torch.nn.Linear,
    hidden: torch.Tensor,
    targets: torch.Tensor | None = None,
    scale: float = 1.0,
    cap: float | None = None,
) -> torch.Tensor:
    """Compute a head's output, or its summed loss where targets are given.

    Args:
        head: The head, [vocab, hidden].
        hidden: [positions, hidden].
        targets: The right tokens, int64 [positions].
        scale: The first result of describe_logits.
        cap: The second result of describe_logits.

    Returns:
        [positions, vocab] without targets; a float32 scalar with them.
    """
    if targets is None:
        return F.linear(hidden, head.weight, head.bias)
    return HeadLoss.apply(hidden, head, targets, scale, cap)


class HeadLoss(torch.autograd.Function):
    """Computes the summed cross entropy of a frozen head.

    The forward pass also computes the gradient of the head's input, in the memory of the logits.
    So the backward pass needs neither the logits nor the head. The method is that of Liger-Kernel's
    fused linear cross entropy (Hsu et al., 2024, arXiv 2410.10989).
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
        """Compute the loss.

        Args:
            ctx: What autograd keeps for the backward pass.
            hidden: The hidden states of labelled positions, [labelled, hidden].
            head: The frozen head, [vocab, hidden].
            targets: The right tokens, int64 [labelled].
            scale: The first result of describe_logits.
            cap: The second result of describe_logits.

        Returns:
            The sum over the positions, a float32 scalar.
        """
        # The scores, float32 [labelled, vocab], are the largest tensor here. What follows works in
        # their memory.
        scores = F.linear(hidden, head.weight, head.bias).float()
        # The derivative of the logits by the head's output: a number, or [labelled, vocab].
        slope = scale
        if scale != 1:
            scores *= scale
        if cap is not None:
            scores.div_(cap).tanh_()
            # The slope is made while the scores hold tanh(s / cap).
            slope = scale * (1 - scores * scores) if ctx.needs_input_grad[0] else None
            scores *= cap
        targets = targets[:, None]
        # The targets' logits are read before the scores are overwritten. Taking off the largest
        # logit keeps exp from overflowing.
        target_logits = scores.gather(1, targets)  # [labelled, 1]
        highest = scores.amax(1, keepdim=True)
        sum_exp = scores.sub_(highest).exp_().sum(1, keepdim=True)  # [labelled, 1]
        if ctx.needs_input_grad[0]:
            # float16 would round small probabilities to zero, so they are enlarged until backward.
            ctx.grad_factor = 1024.0 if hidden.dtype is torch.float16 else 1.0
            # The gradient of the logits is the probabilities, less 1 at the target.
            minus_one = torch.full_like(target_logits, -1.0)
            scores.div_(sum_exp).scatter_add_(1, targets, minus_one)
            if torch.is_tensor(slope) or slope * ctx.grad_factor != 1:
                scores *= slope * ctx.grad_factor
            # Only this product, [labelled, hidden], waits for the backward pass.
            ctx.save_for_backward(scores.to(hidden.dtype) @ head.weight)
        return (sum_exp.log() + highest - target_logits).sum()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        """Return the gradient of the hidden states, [labelled, hidden]."""
        (grad_hidden,) = ctx.saved_tensors
        scaled = (grad_hidden * (gradient / ctx.grad_factor)).to(grad_hidden.dtype)
        return scaled, None, None, None, None
