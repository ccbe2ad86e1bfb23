"""Dropout (Srivastava et al., 2014) that stores a seed for the backward pass instead of a mask.

The backward pass draws the mask again from the seed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def draw_kept(x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    """Draw which values dropout keeps; the same seed gives the same mask on the same device.

    Args:
        x: A tensor that gives the shape and the device.
        p: The probability of a value to be dropped.
        seed: The seed.

    Returns:
        bool of x's shape, True where a value is kept.
    """
    # The meta device has no random numbers, and a forecast needs the mask's memory alone.
    if x.is_meta:
        return torch.empty(x.shape, dtype=torch.bool, device=x.device)
    generator = torch.Generator(x.device).manual_seed(seed)
    if x.device.type == "cpu":
        # On a CPU bernoulli_ takes twice as long as drawing whole numbers from 0 to 2^31 - 1.
        numbers = torch.empty(x.shape, dtype=torch.int32).random_(generator=generator)
        # A part p of the numbers lies below p * 2^31.
        return numbers >= round(p * 2**31)
    kept = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    return kept.bernoulli_(1 - p, generator=generator)


def draw_seed() -> int:
    """Draw a seed from torch's generator on the CPU.

    Drawing on the CPU does not wait for the GPU. torch's checkpoint restores this generator, so a
    layer that is computed again draws the same seed.
    """
    return int(torch.randint(2**62, ()))


class DroppedLinear(torch.autograd.Function):
    """Computes dropout(x) W^T and stores x and a seed for the backward pass.

    Other matrix products of x store x anyway, so it takes no further memory; a mask and the
    dropped input would.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, p: float) -> torch.Tensor:
        """Compute the product.

        Args:
            ctx: What autograd keeps for the backward pass.
            x: [tokens, in].
            weight: [out, in].
            p: The probability of a value of x to be dropped.

        Returns:
            [tokens, out].
        """
        ctx.p = p
        # Both passes must draw the same mask. Another one would give a wrong gradient without an
        # error.
        ctx.seed = draw_seed()
        ctx.save_for_backward(x, weight)
        # The factor is applied to the product, which has far fewer columns than x (r of the
        # adapter).
        return F.linear(x * draw_kept(x, p, ctx.seed), weight) / (1 - p)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        """Return the gradients of x [tokens, in] and weight [out, in]."""
        x, weight = ctx.saved_tensors
        kept = draw_kept(x, ctx.p, ctx.seed)  # bool [tokens, in]
        gradient = gradient / (1 - ctx.p)  # [tokens, out]
        grad_weight = gradient.t() @ (x * kept) if ctx.needs_input_grad[1] else None
        grad_x = (gradient @ weight).mul_(kept) if ctx.needs_input_grad[0] else None
        return grad_x, grad_weight, None


class Dropped(torch.autograd.Function):
    """Computes dropout(x) and stores a seed for the backward pass instead of a mask."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, p: float) -> torch.Tensor:
        """Return x with values dropped and the others scaled by 1 / (1 - p); any shape."""
        ctx.p = p
        ctx.seed = draw_seed()
        return x * draw_kept(x, p, ctx.seed) / (1 - p)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        """Return the gradient of x."""
        # Dropout is linear in x, so the gradient passes through the same mask and factor.
        return gradient * draw_kept(gradient, ctx.p, ctx.seed) / (1 - ctx.p), None


class SeededDropout(torch.nn.Module):
    """Does what torch.nn.Dropout does, but stores a seed instead of a mask."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x, with values dropped in training mode; any shape."""
        return Dropped.apply(x, self.p) if self.training and self.p > 0 else x
