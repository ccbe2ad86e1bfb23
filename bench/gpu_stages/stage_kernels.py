"""Every kernel that training and scoring call, compared with the same formula in float64: outputs
and gradients.
"""

import itertools
import os
import sys
from collections.abc import Sequence

from medqlora.core.environment import prefer_expandable_segments

prefer_expandable_segments(os.environ)  # torch reads this variable when it is imported.

import torch
import torch.nn.functional as F
from transformers import LlamaConfig

from medqlora.model.attention.backends import choose_backend
from medqlora.model.attention.documents import locate_documents
from medqlora.model.attention.kernels import attend_documents
from medqlora.model.attention.tree import locate_prefix_tree
from medqlora.model.compiling import Kernels, compile_kernels
from medqlora.model.dropout import DroppedLinear, draw_kept, draw_seed
from medqlora.model.fused_head import HeadLoss
from medqlora.training.gpu_stage import Stage, relative_error

# Rounding explains these relative errors of outputs. Gradients may have twice as much.
LIMITS = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}
HEADS = 32
KV_HEADS = 8
# The attention function looks up the keys and values of a shared beginning by this number.
LAYER = torch.nn.Module()
LAYER.layer_idx = 0


def main() -> int:
    stage = Stage.from_arguments(sys.argv[1:], __doc__)
    torch.manual_seed(0)
    dtypes = [torch.float32, torch.bfloat16] if stage.small else [torch.float16, torch.float32]
    if stage.dtype is torch.bfloat16:
        dtypes.insert(0, torch.bfloat16)
    widths = [64] if stage.small else [64, 128, 256]
    for dtype, width in itertools.product(dtypes, widths):
        for backend in list_backends(stage, dtype, width):
            for window in (None, 100):
                check_attention(stage, backend, dtype, width, window, None)
            check_shared_beginning(stage, backend, dtype, width)
        # The variable-length kernel has no softcap, so only grouped is tried with one.
        check_attention(stage, "grouped", dtype, width, None, 30.0)
    for dtype in dtypes:
        check_compiled(stage, dtype)
        check_head(stage, dtype)
        check_dropout(stage, dtype)
    return stage.finish()


def list_backends(stage: Stage, dtype: torch.dtype, width: int) -> list[str]:
    """grouped, which runs everywhere, and varlen where it is chosen here."""
    chosen = choose_backend("auto", stage.device, dtype, LlamaConfig(head_dim=width)).backend
    return sorted({"grouped", chosen} & {"grouped", "varlen"})


def name(*parts) -> str:
    return ", ".join(str(part).removeprefix("torch.") for part in parts if part is not None)


def draw(stage: Stage, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=stage.device).to(dtype)


def widen(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Copies in float64 that take gradients."""
    # Without detach the gradients would flow on into the tensors that are checked.
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def check_gradients(
    stage: Stage,
    label: str,
    case: str,
    names: Sequence[str],
    gradients: Sequence[torch.Tensor],
    expected: Sequence[torch.Tensor],
    limit: float,
) -> None:
    for which, gradient, wanted in zip(names, gradients, expected, strict=True):
        stage.check(f"{label} {which}, {case}", relative_error(gradient, wanted), 2 * limit)


def attend_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: torch.Tensor,
    softcap: float | None,
) -> torch.Tensor:
    """Attention by its formula -> [queries, heads, width].

    Args:
        query: [heads, queries, width].
        key, value: [kv heads, keys, width].
        allowed: bool [queries, keys].
    """
    # Each key head serves this many query heads.
    groups = query.shape[0] // key.shape[0]
    key = key.repeat_interleave(groups, dim=0)  # [heads, keys, width]
    value = value.repeat_interleave(groups, dim=0)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5  # [heads, queries, keys]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    # The mask comes after the softcap, whose tanh would make minus infinity a finite score.
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return (weights @ value).transpose(0, 1)


def check_attention(
    stage: Stage,
    backend: str,
    dtype: torch.dtype,
    width: int,
    window: int | None,
    softcap: float | None,
) -> None:
    """Packed documents of unlike length, forward and backward."""
    # Unlike lengths give the backend grouped several groups. A document of one token is the edge.
    lengths = [120, 7, 64, 1, 129] if stage.small else [700, 7, 64, 1, 129, 512]
    tokens = sum(lengths)
    ends = [0, *itertools.accumulate(lengths)]
    # Each is [1, heads or kv heads, tokens, width].
    inputs = [
        draw(stage, dtype, 1, heads, tokens, width).requires_grad_()
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    documents = locate_documents(
        torch.tensor(ends, dtype=torch.int32), max(lengths), stage.device, backend
    )
    output, _ = attend_documents(
        LAYER, *inputs, None, sliding_window=window, softcap=softcap, documents=documents
    )
    # Random weights make each output count differently, so no error can cancel in the sum.
    weights = torch.randn_like(output)  # [1, tokens, heads, width]
    gradients = torch.autograd.grad((output * weights).sum(), inputs)
    wide = widen(*inputs)
    parts = []
    for first, last in itertools.pairwise(ends):
        place = torch.arange(last - first, device=stage.device)
        distance = place[:, None] - place[None]  # [queries, keys], positive for earlier keys
        # A window counts the query's own token.
        allowed = (distance >= 0) & (distance < (window or len(place)))
        # Each is [heads or kv heads, tokens of the document, width].
        document = [tensor[0, :, first:last] for tensor in wide]
        parts.append(attend_reference(*document, allowed, softcap))
    expected = torch.cat(parts)[None]
    wanted = torch.autograd.grad((expected * weights.double()).sum(), wide)
    case = name(
        backend,
        dtype,
        f"width {width}",
        window and f"window {window}",
        softcap and f"softcap {softcap}",
    )
    limit = LIMITS[dtype]
    stage.check(f"attention, {case}", relative_error(output, expected), limit)
    names = ("query", "key", "value")
    check_gradients(stage, "attention's gradient of the", case, names, gradients, wanted, limit)


@torch.no_grad()
def check_shared_beginning(stage: Stage, backend: str, dtype: torch.dtype, width: int) -> None:
    """Questions after a shared beginning, with options that continue them."""
    lengths = [70, 3, 2, 45, 4, 1]
    # Segments 1 and 2 continue segment 0; 4 and 5 continue segment 3.
    parents = [None, 0, 0, None, 3, 3]
    shared = 33
    tokens = sum(lengths)
    query = draw(stage, dtype, 1, HEADS, tokens, width)
    key = draw(stage, dtype, 1, KV_HEADS, tokens, width)
    value = draw(stage, dtype, 1, KV_HEADS, tokens, width)
    shared_key = draw(stage, dtype, 1, KV_HEADS, shared, width)
    shared_value = draw(stage, dtype, 1, KV_HEADS, shared, width)
    cache = {0: (shared_key, shared_value)}  # by layer
    tree = locate_prefix_tree(lengths, parents, stage.device, cache, shared, backend)
    output, _ = attend_documents(LAYER, query, key, value, None, documents=tree)
    keys = torch.cat([shared_key, key], dim=2)[0].double()  # [kv heads, shared + tokens, width]
    values = torch.cat([shared_value, value], dim=2)[0].double()
    parts = []
    start = 0
    for length, (first, last) in zip(
        lengths, itertools.pairwise(tree.cu_keys.tolist()), strict=True
    ):
        seen = tree.sources[first:last]
        # A segment's queries belong to the last of its keys, so they stand at the end of the
        # square.
        place = torch.arange(len(seen), device=stage.device)
        allowed = place[len(seen) - length :, None] >= place[None]
        queries = query[0, :, start : start + length].double()
        parts.append(attend_reference(queries, keys[:, seen], values[:, seen], allowed, None))
        start += length
    case = name(backend, dtype, f"width {width}")
    stage.check(f"branches, {case}", relative_error(output, torch.cat(parts)[None]), LIMITS[dtype])


def check_compiled(stage: Stage, dtype: torch.dtype) -> None:
    """Norms and gated activations as the compiler makes them, with lengths that change."""
    width = 512
    try:
        kernels = compile_kernels(stage.device)
    # The compiler, a missing one or its driver may raise anything. Training goes on without it, so
    # this stage does too, and says so.
    except Exception as error:  # noqa: BLE001
        stage.figure("no compiler", " ".join(str(error).split())[:300])
        return
    weight = torch.rand(width, device=stage.device).to(dtype) + 0.5  # [width]
    # A single token runs without the compiler. The other numbers must all be right in the one
    # kernel that is compiled for any number.
    for tokens in (17, 1, 256, 1000):
        x = draw(stage, dtype, tokens, width)
        up = draw(stage, dtype, tokens, width)
        g = draw(stage, dtype, tokens, width)
        for offset in (False, True):
            check_norm(stage, kernels, x, g, weight, offset)
        for activation in ("silu", "gelu_pytorch_tanh"):
            check_gate(stage, kernels, x, up, g, activation)


def check_norm(
    stage: Stage,
    kernels: Kernels,
    x: torch.Tensor,
    g: torch.Tensor,
    weight: torch.Tensor,
    offset: bool,
) -> None:
    """Compare the norm of x and its gradient.

    Args:
        g: the gradient of the norm's output.
        offset: whether 1 is added to the weight, as Gemma does.
    """
    eps = 1e-6
    # A norm's weight is frozen, so only its input has a gradient.
    output, scale = kernels.normalise(x, weight, eps, offset)  # [tokens, width], [tokens, 1]
    gradient = kernels.normalise_backward(g, x, scale, weight, offset)
    (wide,) = widen(x)
    normalised = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    expected = normalised * (weight.double() + offset)
    (wanted,) = torch.autograd.grad((expected * g.double()).sum(), wide)
    case = name(x.dtype, f"{len(x)} tokens", "with offset" if offset else None)
    limit = LIMITS[x.dtype]
    stage.check(f"compiled norm, {case}", relative_error(output, expected), limit)
    stage.check(f"compiled norm's gradient, {case}", relative_error(gradient, wanted), 2 * limit)


def check_gate(
    stage: Stage,
    kernels: Kernels,
    x: torch.Tensor,
    up: torch.Tensor,
    g: torch.Tensor,
    activation: str,
) -> None:
    """Compare the activation of x times up, and both gradients; g: the gradient of the output."""
    wide, wide_up = widen(x, up)
    if activation == "silu":
        expected = F.silu(wide) * wide_up
    else:
        expected = F.gelu(wide, approximate="tanh") * wide_up
    wanted = torch.autograd.grad((expected * g.double()).sum(), (wide, wide_up))
    case = name(activation, x.dtype, f"{len(x)} tokens")
    limit = LIMITS[x.dtype]
    output = kernels.gate(x, up, activation)
    gradients = kernels.gate_backward(g, x, up, activation)
    stage.check(f"compiled gate, {case}", relative_error(output, expected), limit)
    names = ("gate", "up")
    check_gradients(stage, "compiled gradient of", case, names, gradients, wanted, limit)


def check_head(stage: Stage, dtype: torch.dtype) -> None:
    """The fused head and cross entropy, with and without softcap."""
    head = torch.nn.Linear(256, 4_000, bias=False, device=stage.device, dtype=dtype)
    # HeadLoss makes the gradient of its input only, which is right for a frozen head.
    head.requires_grad_(False)
    torch.nn.init.normal_(head.weight, std=0.05)
    targets = torch.randint(4_000, (50,), device=stage.device)
    hidden = draw(stage, dtype, 50, 256).requires_grad_()  # [labelled, hidden]
    for cap in (None, 5.0):
        loss = HeadLoss.apply(hidden, head, targets, 1.0, cap)
        (gradient,) = torch.autograd.grad(loss, hidden)
        (wide,) = widen(hidden)
        logits = wide @ head.weight.double().t()  # [labelled, vocab], float64
        if cap:
            logits = cap * torch.tanh(logits / cap)
        # HeadLoss sums over positions; whoever calls it divides.
        expected = F.cross_entropy(logits, targets, reduction="sum")
        (wanted,) = torch.autograd.grad(expected, wide)
        case = name(dtype, cap and f"softcap {cap}")
        stage.check(f"head's loss, {case}", relative_error(loss, expected), LIMITS[dtype])
        stage.check(f"head's gradient, {case}", relative_error(gradient, wanted), 2 * LIMITS[dtype])


def check_dropout(stage: Stage, dtype: torch.dtype) -> None:
    """Dropout that keeps a seed instead of a mask: both passes have the same mask, and it drops the
    share that is asked for.
    """
    x = draw(stage, dtype, 500, 256).requires_grad_()
    weight = draw(stage, dtype, 16, 256).requires_grad_()
    torch.manual_seed(5)
    output = DroppedLinear.apply(x, weight, 0.1)
    g = torch.randn_like(output)
    gradients = torch.autograd.grad((output * g).sum(), (x, weight))
    # The call above drew its mask's seed from this state. draw_seed draws the same seed again.
    torch.manual_seed(5)
    kept = draw_kept(x, 0.1, draw_seed())  # bool [tokens, in]
    wide, wide_weight = widen(x, weight)
    expected = F.linear(wide * kept / 0.9, wide_weight)
    wanted = torch.autograd.grad((expected * g.double()).sum(), (wide, wide_weight))
    case = name(dtype)
    stage.check(f"dropout, {case}", relative_error(output, expected), LIMITS[dtype])
    names = ("input", "weight")
    check_gradients(
        stage, "dropout's gradient of the", case, names, gradients, wanted, LIMITS[dtype]
    )
    # By chance the share of 128,000 values deviates by about 0.001.
    dropped = (~kept).float().mean().item()
    stage.check(f"dropout's share less 0.1, {case}", abs(dropped - 0.1), 0.01)


if __name__ == "__main__":
    sys.exit(main())
