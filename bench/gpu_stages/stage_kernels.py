"""Every kernel that training and scoring call, against the same formula in float64: outputs and
gradients.
"""

import itertools
import os
import sys

from medqlora.core.environment import prefer_expandable_segments

prefer_expandable_segments(os.environ)  # torch reads it when it is imported.

import torch
import torch.nn.functional as F
from transformers import LlamaConfig

from medqlora.model.attention.backends import choose_backend
from medqlora.model.attention.documents import locate_documents
from medqlora.model.attention.kernels import attend_documents
from medqlora.model.attention.tree import locate_prefix_tree
from medqlora.model.compiling import compile_kernels
from medqlora.model.dropout import DroppedLinear, draw_kept, draw_seed
from medqlora.model.fused_head import HeadLoss
from medqlora.training.gpu_stage import Stage, relative_error

# Rounding explains these relative errors of outputs; gradients may have twice as much.
LIMITS = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}
HEADS = 32
KV_HEADS = 8
LAYER = torch.nn.Module()
LAYER.layer_idx = 0


def main() -> int:
    stage = Stage.from_arguments(sys.argv[1:], __doc__)
    torch.manual_seed(0)
    dtypes = [torch.float32, torch.bfloat16] if stage.small else [torch.float16, torch.float32]
    if stage.dtype is torch.bfloat16:
        dtypes.insert(0, torch.bfloat16)
    for dtype, width in itertools.product(dtypes, [64] if stage.small else [64, 128, 256]):
        for backend in list_backends(stage, dtype, width):
            for window in (None, 100):
                check_attention(stage, backend, dtype, width, window, None)
            check_branches(stage, backend, dtype, width)
        check_attention(stage, "grouped", dtype, width, None, 30.0)
    for dtype in dtypes:
        check_compiled(stage, dtype)
        check_head(stage, dtype)
        check_dropout(stage, dtype)
    return stage.finish()


def list_backends(stage: Stage, dtype: torch.dtype, width: int) -> list[str]:
    """grouped, which runs everywhere, and what is chosen here."""
    chosen = choose_backend("auto", stage.device, dtype, LlamaConfig(head_dim=width)).backend
    return sorted({"grouped", chosen} & {"grouped", "varlen"})


def name(*parts) -> str:
    return ", ".join(str(part).removeprefix("torch.") for part in parts if part is not None)


def attend_reference(query, key, value, allowed, softcap) -> torch.Tensor:
    """query [heads, queries, width], key and value [kv heads, keys, width], allowed bool [queries,
    keys] -> [queries, heads, width]
    """
    key, value = (
        tensor.repeat_interleave(query.shape[0] // key.shape[0], dim=0) for tensor in (key, value)
    )
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ value).transpose(0, 1)


def check_attention(
    stage: Stage,
    backend: str,
    dtype: torch.dtype,
    width: int,
    window: int | None,
    softcap: float | None,
) -> None:
    """Packed documents of unlike length, forward and backward."""
    lengths = [120, 7, 64, 1, 129] if stage.small else [700, 7, 64, 1, 129, 512]
    tokens = sum(lengths)
    ends = [0, *itertools.accumulate(lengths)]
    query, key, value = (
        torch.randn(1, count, tokens, width, device=stage.device).to(dtype).requires_grad_()
        for count in (HEADS, KV_HEADS, KV_HEADS)
    )
    documents = locate_documents(
        torch.tensor(ends, dtype=torch.int32), max(lengths), stage.device, backend
    )
    out, _ = attend_documents(
        LAYER, query, key, value, None, sliding_window=window, softcap=softcap, documents=documents
    )
    weights = torch.randn_like(out)
    found = torch.autograd.grad((out * weights).sum(), (query, key, value))
    wide = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    parts = []
    for first, last in itertools.pairwise(ends):
        at = torch.arange(last - first, device=stage.device)
        distance = at[:, None] - at[None]
        allowed = (distance >= 0) & (distance < (window or len(at)))
        parts.append(
            attend_reference(*(tensor[0, :, first:last] for tensor in wide), allowed, softcap)
        )
    expected = torch.cat(parts)[None]
    wanted = torch.autograd.grad((expected * weights.double()).sum(), wide)
    case = name(
        backend,
        dtype,
        f"width {width}",
        window and f"window {window}",
        softcap and f"softcap {softcap}",
    )
    stage.check(f"attention, {case}", relative_error(out, expected), LIMITS[dtype])
    for which, got, right in zip(("query", "key", "value"), found, wanted, strict=True):
        stage.check(
            f"attention's gradient of the {which}, {case}",
            relative_error(got, right),
            2 * LIMITS[dtype],
        )


@torch.no_grad()
def check_branches(stage: Stage, backend: str, dtype: torch.dtype, width: int) -> None:
    """Questions after a shared beginning, with options that continue them."""
    lengths = [70, 3, 2, 45, 4, 1]
    parents = [None, 0, 0, None, 3, 3]
    shared = 33
    tokens = sum(lengths)
    query, key, value = (
        torch.randn(1, count, tokens, width, device=stage.device).to(dtype)
        for count in (HEADS, KV_HEADS, KV_HEADS)
    )
    before = tuple(
        torch.randn(1, KV_HEADS, shared, width, device=stage.device).to(dtype) for _ in range(2)
    )
    branches = locate_prefix_tree(lengths, parents, stage.device, {0: before}, shared, backend)
    out, _ = attend_documents(LAYER, query, key, value, None, documents=branches)
    keys, values = (
        torch.cat(pair, dim=2)[0].double() for pair in zip(before, (key, value), strict=True)
    )
    parts = []
    start = 0
    for number, (first, last) in enumerate(itertools.pairwise(branches.cu_keys.tolist())):
        seen = branches.sources[first:last]
        at = torch.arange(len(seen), device=stage.device)
        allowed = at[len(seen) - lengths[number] :, None] >= at[None]
        parts.append(
            attend_reference(
                query[0, :, start : start + lengths[number]].double(),
                keys[:, seen],
                values[:, seen],
                allowed,
                None,
            )
        )
        start += lengths[number]
    stage.check(
        f"branches, {name(backend, dtype, f'width {width}')}",
        relative_error(out, torch.cat(parts)[None]),
        LIMITS[dtype],
    )


def check_compiled(stage: Stage, dtype: torch.dtype) -> None:
    """Norms and gated activations as the compiler makes them, with lengths that change."""
    width = 512
    eps = 1e-6
    try:
        kernels = compile_kernels(stage.device)
    # training goes on without a compiler, and so does this
    except Exception as error:  # noqa: BLE001
        stage.figure("no compiler", " ".join(str(error).split())[:300])
        return
    weight = torch.rand(width, device=stage.device).to(dtype) + 0.5
    for tokens in (17, 1, 256, 1000):
        x, up, g = (torch.randn(tokens, width, device=stage.device).to(dtype) for _ in range(3))
        wide, wide_up = (tensor.double().requires_grad_() for tensor in (x, up))
        for offset in (False, True):
            y, scale = kernels.normalise(x, weight, eps, offset)
            expected = (
                wide
                * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
                * (weight.double() + offset)
            )
            (wanted,) = torch.autograd.grad((expected * g.double()).sum(), wide)
            case = name(dtype, f"{tokens} tokens", "with offset" if offset else None)
            stage.check(f"compiled norm, {case}", relative_error(y, expected), LIMITS[dtype])
            stage.check(
                f"compiled norm's gradient, {case}",
                relative_error(kernels.normalise_backward(g, x, scale, weight, offset), wanted),
                2 * LIMITS[dtype],
            )
        for activation, function in (
            ("silu", F.silu),
            ("gelu_pytorch_tanh", lambda t: F.gelu(t, approximate="tanh")),
        ):
            expected = function(wide) * wide_up
            wanted = torch.autograd.grad((expected * g.double()).sum(), (wide, wide_up))
            found = kernels.gate_backward(g, x, up, activation)
            case = name(activation, dtype, f"{tokens} tokens")
            stage.check(
                f"compiled gate, {case}",
                relative_error(kernels.gate(x, up, activation), expected),
                LIMITS[dtype],
            )
            for which, got, right in zip(("gate", "up"), found, wanted, strict=True):
                stage.check(
                    f"compiled gradient of {which}, {case}",
                    relative_error(got, right),
                    2 * LIMITS[dtype],
                )


def check_head(stage: Stage, dtype: torch.dtype) -> None:
    """Head and cross entropy in one, with and without softcap."""
    head = torch.nn.Linear(256, 4_000, bias=False, device=stage.device, dtype=dtype).requires_grad_(
        False
    )
    torch.nn.init.normal_(head.weight, std=0.05)
    targets = torch.randint(4_000, (50,), device=stage.device)
    hidden = torch.randn(50, 256, device=stage.device).to(dtype).requires_grad_()
    for cap in (None, 5.0):
        loss = HeadLoss.apply(hidden, head, targets, 1.0, cap)
        (found,) = torch.autograd.grad(loss, hidden)
        wide = hidden.detach().double().requires_grad_()
        logits = wide @ head.weight.double().t()
        expected = F.cross_entropy(
            logits if cap is None else cap * torch.tanh(logits / cap), targets, reduction="sum"
        )
        case = name(dtype, cap and f"softcap {cap}")
        stage.check(f"head's loss, {case}", relative_error(loss, expected), LIMITS[dtype])
        stage.check(
            f"head's gradient, {case}",
            relative_error(found, torch.autograd.grad(expected, wide)[0]),
            2 * LIMITS[dtype],
        )


def check_dropout(stage: Stage, dtype: torch.dtype) -> None:
    """Dropout that keeps a seed: the same mask in both passes, and the share that is asked for."""
    x = torch.randn(500, 256, device=stage.device).to(dtype).requires_grad_()
    weight = torch.randn(16, 256, device=stage.device).to(dtype).requires_grad_()
    torch.manual_seed(5)
    out = DroppedLinear.apply(x, weight, 0.1)
    g = torch.randn_like(out)
    found = torch.autograd.grad((out * g).sum(), (x, weight))
    torch.manual_seed(5)
    kept = draw_kept(x, 0.1, draw_seed())
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    expected = F.linear(wide[0] * kept / 0.9, wide[1])
    wanted = torch.autograd.grad((expected * g.double()).sum(), wide)
    stage.check(f"dropout, {name(dtype)}", relative_error(out, expected), LIMITS[dtype])
    for which, got, right in zip(("input", "weight"), found, wanted, strict=True):
        stage.check(
            f"dropout's gradient of the {which}, {name(dtype)}",
            relative_error(got, right),
            2 * LIMITS[dtype],
        )
    stage.check(
        f"dropout's share less 0.1, {name(dtype)}", abs((~kept).float().mean().item() - 0.1), 0.01
    )


if __name__ == "__main__":
    sys.exit(main())
