"""Dropout that keeps a seed instead of a mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def draw_kept(x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    """bool like x: what dropout with probability p keeps, a function of the seed and the device."""
    if x.is_meta:
        return torch.empty(x.shape, dtype=torch.bool, device=x.device)
    generator = torch.Generator(x.device).manual_seed(seed)
    # bernoulli_ takes twice as long there as whole numbers from 0 to 2^31 - 1
    if x.device.type == "cpu":
        return torch.empty(x.shape, dtype=torch.int32).random_(generator=generator) >= round(
            p * 2**31
        )
    return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(
        1 - p, generator=generator
    )


def draw_seed() -> int:
    """From torch's own generator on the CPU: nothing waits for a GPU, and recomputed layers draw
    the same again.
    """
    return int(torch.randint(2**62, ()))


class DroppedLinear(torch.autograd.Function):
    """dropout(x) W^T that keeps x, which other products keep too, and a seed, instead of the
    dropped input and a mask.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, p: float) -> torch.Tensor:
        """x [tokens, in], weight [out, in] -> [tokens, out]"""
        ctx.p, ctx.seed = p, draw_seed()
        ctx.save_for_backward(x, weight)
        return F.linear(x * draw_kept(x, p, ctx.seed), weight) / (1 - p)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        x, weight = ctx.saved_tensors
        kept = draw_kept(x, ctx.p, ctx.seed)
        gradient = gradient / (1 - ctx.p)
        grad_weight = gradient.t() @ (x * kept) if ctx.needs_input_grad[1] else None
        grad_x = (gradient @ weight).mul_(kept) if ctx.needs_input_grad[0] else None
        return grad_x, grad_weight, None


class Dropped(torch.autograd.Function):
    """dropout(x) that keeps a seed instead of a mask."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, p: float) -> torch.Tensor:
        ctx.p, ctx.seed = p, draw_seed()
        return x * draw_kept(x, p, ctx.seed) / (1 - p)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return gradient * draw_kept(gradient, ctx.p, ctx.seed) / (1 - ctx.p), None


class SeededDropout(torch.nn.Module):
    """torch.nn.Dropout that keeps a seed instead of a mask."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Dropped.apply(x, self.p) if self.training and self.p > 0 else x
