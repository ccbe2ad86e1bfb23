"""Attention on every GPU since Turing, as far as it can be seen without one: which backend is taken
and why, what the grouped one computes and keeps, what the variable-length kernel is called with."""

import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ARCHITECTURES, ROOT, build_model, run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig

from medqlora.core.config import Lora, Model
from medqlora.core.config_loading import load_config
from medqlora.model import compiling, dropout, fused_layers
from medqlora.model.adapter import attach_adapter
from medqlora.model.agreement import prove_agreement
from medqlora.model.attention import blocked, documents
from medqlora.model.attention.backends import AttentionError, choose_backend
from medqlora.model.attention.blocked import BlockedAttention
from medqlora.model.attention.documents import locate_documents
from medqlora.model.attention.kernels import attend_documents, attend_fused
from medqlora.model.attention.tree import locate_prefix_tree
from medqlora.model.fused_head import HeadLoss
from medqlora.model.head_loss import AnswerLoss
from medqlora.model.random_base import make_base
from medqlora.training.memory.architectures import read_architecture
from medqlora.training.memory.estimate import assume_labelled
from medqlora.training.memory.forecast import forecast_step
from medqlora.training.memory.planner import cost_of_attention, plan_step
from medqlora.training.memory.target import TargetHardware, parse_size, usable
from medqlora.training.memory.tracker import Batch
from medqlora.training.strategies.launch import Strategy

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
BF16 = torch.bfloat16
FP16 = torch.float16
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
}


def shape(kind: str = "llama", **more):
    return AutoConfig.for_model(kind, **SHAPE | more)


# ---- the choice ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "capability", "more", "backend", "reason"),
    [
        (BF16, (8, 0), {}, "varlen", "runs here"),
        (BF16, (9, 0), {"head_dim": 256}, "varlen", "runs here"),
        (FP16, (7, 5), {}, "grouped", "compute capability 7.5"),
        (torch.float32, (8, 0), {}, "grouped", "float32"),
        (BF16, (8, 0), {"head_dim": 20}, "grouped", "head width 20"),
        (BF16, (8, 0), {"head_dim": 512}, "grouped", "head width 512"),
    ],
)
def test_auto_takes_what_runs_and_says_why(dtype, capability, more, backend, reason):
    choice = choose_backend("auto", CUDA, dtype, shape(**more), capability)
    assert choice.backend == backend
    assert reason in choice.reason


def test_softcap_takes_the_grouped_path():
    gemma = shape("gemma2", head_dim=16, attn_logit_softcapping=50.0)
    assert choose_backend("auto", CUDA, BF16, gemma, (8, 0)) == (
        "grouped",
        "torch's variable-length kernel cannot run: attention softcap",
    )
    with pytest.raises(AttentionError, match="softcap"):
        choose_backend("varlen", CUDA, BF16, gemma, (8, 0))


def test_a_gpu_of_this_machine_is_asked_for_its_capability(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert choose_backend("auto", CUDA, FP16, shape()).backend == "grouped"
    with pytest.raises(
        AttentionError, match=r"here is compute capability 7.5, below 8.0; use auto"
    ):
        choose_backend("flash", CUDA, FP16, shape())


def test_a_broken_flash_attn_is_passed_over_and_said(tmp_path, monkeypatch):
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text(
        "raise ImportError('undefined symbol: _ZN3c10')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    # whose kernel comes with torch
    assert choose_backend("auto", CUDA, BF16, shape(), (8, 0)).backend == "varlen"
    choice = choose_backend(
        "auto", CUDA, BF16, shape("gemma2", attn_logit_softcapping=50.0), (8, 0)
    )
    assert choice.backend == "grouped"
    assert (
        "flash-attn is passed over: its import ends in ImportError (undefined symbol"
        in choice.reason
    )
    with pytest.raises(AttentionError, match="undefined symbol"):
        choose_backend("flash", CUDA, BF16, shape(), (8, 0))


def test_values_of_another_width_take_the_grouped_path():
    deepseek = AutoConfig.for_model(
        "deepseek_v2",
        qk_rope_head_dim=16,
        qk_nope_head_dim=32,
        v_head_dim=32,
        hidden_size=64,
        num_attention_heads=4,
    )
    choice = choose_backend("auto", CUDA, BF16, deepseek, (8, 0))
    assert (choice.backend, "values 32 wide" in choice.reason) == ("grouped", True), choice


@pytest.mark.parametrize("requested", ["auto", "varlen", "grouped"])
def test_a_cpu_has_one_path(requested):
    assert choose_backend(requested, CPU, torch.float32, shape()).backend == "grouped"


# ---- the variable-length kernel's call -----------------------------------------------------------


@pytest.mark.parametrize("window", [None, 16])
def test_varlen_is_called_as_this_torch_takes_it(window):
    """With grouped heads, on a GPU that FakeTensorMode plays; gradients need one, and are followed
    on the meta device.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        out, _ = attend_documents(
            *fake_packed(),
            None,
            sliding_window=window,
            documents=fake_documents(torch.device("cuda")),
        )
        assert out.shape == (1, 64, 32, 128)
        assert out.device.type == "cuda"
    module, query, key, value = fake_packed(place="meta")
    out, _ = attend_documents(
        module,
        query,
        key,
        value,
        None,
        sliding_window=window,
        documents=fake_documents(torch.device("meta")),
    )
    out.sum().backward()
    assert [tensor.grad.shape for tensor in (query, key, value)] == [
        query.shape,
        key.shape,
        value.shape,
    ]


def fake_documents(device: torch.device):
    return documents.Documents(torch.empty(3, dtype=torch.int32, device=device), 40, on_gpu=True)


def fake_packed(dtype: torch.dtype = BF16, place: str = "cuda"):
    """32 heads on 8, 128 wide, of 64 packed tokens."""
    module = torch.nn.Module()
    module.layer_idx = 0
    query, key, value = (
        torch.empty(1, count, 64, 128, device=place, dtype=dtype, requires_grad=place == "meta")
        for count in (32, 8, 8)
    )
    return module, query, key, value


@pytest.mark.parametrize(("softcap", "window"), [(None, None), (30.0, None), (None, 16)])
def test_grouped_runs_on_a_gpu_without_flash_attention(softcap, window):
    """float16 on Turing: every operation of the path has an implementation for CUDA tensors, and
    every gradient a shape.
    """
    documents = locate_documents(torch.tensor([0, 24, 64], dtype=torch.int32), 40, CPU, "grouped")
    how = {"softcap": softcap, "sliding_window": window}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        moved = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
            for name, tensor in vars(documents).items()
            if torch.is_tensor(tensor)
        }
        out, _ = attend_documents(
            *fake_packed(FP16), None, documents=replace(documents, **moved, on_gpu=True), **how
        )
        assert (out.shape, out.device.type) == ((1, 64, 32, 128), "cuda")
    moved = {
        name: tensor.to("meta")
        for name, tensor in vars(documents).items()
        if torch.is_tensor(tensor)
    }
    module, query, key, value = fake_packed(FP16, "meta")
    out, _ = attend_documents(
        module, query, key, value, None, documents=replace(documents, **moved, on_gpu=True), **how
    )
    out.sum().backward()
    assert [tensor.grad.shape for tensor in (query, key, value)] == [
        query.shape,
        key.shape,
        value.shape,
    ]


@pytest.mark.parametrize("dtype", [BF16, FP16, torch.float32])
def test_shared_prefixes_and_nested_options_run_in_groups_too(dtype):
    branches = locate_prefix_tree([7, 3, 2, 9, 4], [None, 0, 0, None, 3], CPU, backend="grouped")
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        module = torch.nn.Module()
        module.layer_idx = 0
        query, key, value = (
            torch.empty(1, count, 25, 64, device="cuda", dtype=dtype) for count in (8, 2, 2)
        )

        def move(tensor):
            return (
                None
                if tensor is None
                else torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
            )

        groups = tuple(tuple(map(move, group)) for group in branches.groups)
        placed = replace(
            branches,
            groups=groups,
            scatter=move(branches.scatter),
            sources=move(branches.sources),
            masks={},
        )
        assert attend_documents(module, query, key, value, None, documents=placed)[0].shape == (
            1,
            25,
            8,
            64,
        )


# ---- a whole model on a GPU that FakeTensorMode plays: nothing of it may lie on the CPU ----------

needs_cuda_build = pytest.mark.skipif(
    torch.version.cuda is None,
    reason="this torch is built for CPUs; the lowest versions' torch is not",
)


def fake(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")


@needs_cuda_build
@pytest.mark.parametrize(
    ("architecture", "backend"),
    [
        (name, backend)
        for name in ARCHITECTURES
        for backend in ("varlen", "grouped")
        if (name, backend) != ("gemma2", "varlen")
    ],
)
def test_a_model_and_its_loss_run_on_a_gpu(architecture, backend):
    base = make_base(
        ARCHITECTURES[architecture](),
        Model(base="random", quantization="none"),
        torch.device("meta"),
        BF16,
    )
    with torch.device("meta"):
        model = attach_adapter(base, Lora(r=4), 0)
    documents = locate_documents(torch.tensor([0, 24, 64], dtype=torch.int32), 40, CPU, "grouped")
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for module in model.modules():
            module._parameters |= {
                name: torch.nn.Parameter(fake(value), requires_grad=False)
                for name, value in module._parameters.items()
                if value is not None
            }
            module._buffers |= {
                name: fake(value) for name, value in module._buffers.items() if value is not None
            }
        moved = {
            name: fake(tensor)
            for name, tensor in vars(documents).items()
            if torch.is_tensor(tensor)
        }
        placed = (
            fake_documents(CUDA)
            if backend == "varlen"
            else replace(documents, **moved, on_gpu=True)
        )
        ids, labelled = (
            torch.zeros(shape, dtype=torch.int64, device="cuda") for shape in ((1, 64), (10,))
        )
        loss = AnswerLoss(model, 16)(ids, ids.clone(), labelled, labelled.clone(), documents=placed)
    assert (loss.device.type, loss.shape) == ("cuda", ())


class Context:
    """What autograd hands to a Function."""

    needs_input_grad = (True,) * 8

    def save_for_backward(self, *tensors) -> None:
        self.saved_tensors = tensors


@needs_cuda_build
def test_gradients_of_our_own_functions_run_on_a_gpu(monkeypatch):
    monkeypatch.setattr(
        dropout,
        "draw_kept",
        lambda x, p, seed: torch.empty(x.shape, dtype=torch.bool, device=x.device),
    )
    monkeypatch.setattr(dropout, "draw_seed", lambda: 0)
    head = torch.nn.Linear(64, 100, bias=False, device="meta", dtype=BF16)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        head.weight = torch.nn.Parameter(fake(head.weight), requires_grad=False)
        x = torch.empty(1, 64, 64, device="cuda", dtype=BF16)
        up = torch.empty(1, 64, 64, device="cuda", dtype=BF16)
        module = SimpleNamespace(
            kernels=compiling.Kernels(),
            weight=x[0, 0].clone(),
            variance_epsilon=1e-6,
            activation_name="silu",
            norm_offset=False,
        )
        targets = torch.zeros(64, dtype=torch.int64, device="cuda")
        query, key, value = (
            torch.empty(2, heads, 40, 16, device="cuda", dtype=FP16) for heads in (4, 2, 2)
        )
        for function, inputs in (
            (fused_layers.Norm, (x, module.weight, module)),
            (fused_layers.GatedActivation, (x, up, module)),
            (dropout.DroppedLinear, (x[0], up[0], 0.1)),
            (dropout.Dropped, (x, 0.1)),
            (HeadLoss, (x[0], head, targets, 1.0, 30.0)),
            (BlockedAttention, (query, key, value, None, None, 16, None)),
        ):
            context = Context()
            out = function.forward(context, *inputs)
            found = function.backward(context, torch.empty_like(out))
            tensors = [
                tensor
                for tensor in (found if isinstance(found, tuple) else (found,))
                if tensor is not None
            ]
            assert {tensor.device.type for tensor in [out, *tensors]} == {"cuda"}, function
            assert tensors[0].shape == inputs[0].shape


# ---- the same numbers ----------------------------------------------------------------------------


def reference(query, key, value, window, softcap):
    """Attention as its formula says, in float64."""
    query, key, value = (tensor.double() for tensor in (query, key, value))
    key, value = (
        tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value)
    )
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(query.shape[2])[:, None] - torch.arange(key.shape[2])[None]
    hidden = (distance < 0) | (distance >= (window or key.shape[2]))
    return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ value


@given(
    st.integers(1, 3),
    st.integers(1, 40),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([None, 1, 5, 16]),
    st.sampled_from([None, 2.0]),
    st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_blocks_compute_attention_and_its_gradients(rows, tokens, kv_heads, window, softcap, seed):
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(rows, heads, tokens, 8, generator=generator, requires_grad=True)
        for heads in (4, kv_heads, kv_heads)
    )
    before = blocked.SCORE_BYTES
    blocked.SCORE_BYTES = 16 * 4  # the least: blocks of 16 queries
    try:
        out = BlockedAttention.apply(
            query, key, value, None, None, window if window and window < tokens else None, softcap
        )
        weights = torch.randn(out.shape, generator=generator)
        found = torch.autograd.grad((out * weights).sum(), (query, key, value))
    finally:
        blocked.SCORE_BYTES = before
    wanted = reference(query, key, value, window, softcap)
    assert (out - wanted).abs().max() < 1e-5
    for got, expected in zip(
        found, torch.autograd.grad((wanted * weights).sum(), (query, key, value)), strict=True
    ):
        assert (got - expected).abs().max() < 1e-4 * max(1, expected.abs().max())


def test_blocks_take_a_mask_where_queries_are_the_last_of_their_keys():
    query = torch.randn(2, 4, 5, 8)
    key = torch.randn(2, 2, 37, 8)
    value = torch.randn(2, 2, 37, 8)
    distance = torch.arange(32, 37)[:, None] - torch.arange(37)[None]
    mask = ((distance >= 0) & (distance < 20))[None, None].expand(2, 1, 5, 37)
    out = BlockedAttention.apply(query, key, value, mask, None, None, None)
    wide = [tensor.repeat_interleave(2, dim=1) for tensor in (key, value)]
    assert (out - F.scaled_dot_product_attention(query, *wide, mask)).abs().max() < 1e-5


def test_odd_head_widths_are_padded_for_a_gpu():
    query, key, value = (torch.randn(2, 4, 9, 20) for _ in range(3))
    plain = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert (attend_fused(query, key, value, None, None, on_gpu=True) - plain).abs().max() < 1e-6


# ---- what it keeps -------------------------------------------------------------------------------


def make_config(*flags: str):
    return load_config(ROOT / "recipes" / "configs" / "llama3-8b_medmcqa.yaml", list(flags))


@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("llama", {}),
        ("phi3", {"pad_token_id": 0, "sliding_window": 48}),
        ("mistral", {"sliding_window": 32}),
    ],
)
def test_grouped_needs_little_more_than_the_kernel(kind, more, mode):
    """At most 1.5 times its memory, with lengths that differ, with windows shorter than a row, and
    whatever is recomputed.
    """
    config = make_config("--training.gradient_checkpointing", mode)
    arguments = (
        shape(kind, **more | {"hidden_size": 512, "num_attention_heads": 8}),
        CUDA,
        FP16,
        torch.uint8,
        Batch((500, 470, 310, 300, 290, 64), 20),
    )
    varlen, grouped = (
        forecast_step(config, *arguments, backend=backend).peak for backend in ("varlen", "grouped")
    )
    assert varlen < grouped < 1.5 * varlen


def test_softcap_keeps_no_scores():
    config = make_config("--training.gradient_checkpointing", "none")
    gemma = shape(
        "gemma2",
        head_dim=64,
        hidden_size=512,
        num_attention_heads=8,
        sliding_window=300,
        attn_logit_softcapping=50.0,
    )
    found = {
        length: (
            forecast_step(
                config, gemma, CUDA, BF16, torch.uint8, Batch((length,) * (2048 // length), 20)
            ).by_phase["forward"]
        )
        for length in (64, 1024)
    }
    # All layers' scores of rows of 1,024 would take 64 MiB for each head and layer; here those of
    # one block live, a few times over.
    assert found[1024] - found[64] < 3 * blocked.SCORE_BYTES


@pytest.mark.parametrize("length", [512, 1024])
def test_a_t4_gets_a_plan(length):
    config = make_config(
        "--data.max_length", str(length), "--training.max_tokens_per_batch", "auto"
    )
    architecture = read_architecture("llama3-8b", ROOT / "bench" / "architectures")
    t4 = TargetHardware(
        CUDA,
        FP16,
        torch.uint8,
        Strategy("one"),
        usable(parse_size("16GiB"), CUDA),
        capability=(7, 5),
    )
    plan = plan_step(config, architecture, t4, lambda tokens: assume_labelled(config, tokens))
    assert t4.holds(plan.forecast)
    assert plan.tokens >= length
    assert 0 < cost_of_attention(config, architecture, t4, plan, 32) < 0.5 * plan.forecast.peak


def test_start_up_says_backend_reason_and_cost(tmp_path):
    flags = [
        "--training.max_steps",
        "1",
        "--data.test",
        "[]",
        "--data.eval",
        "[]",
        "--output_dir",
        tmp_path / "run",
    ]
    done = run_script(ROOT / "recipes" / "sft_qlora.py", *flags)
    assert done.returncode == 0, done.stderr
    assert "attention grouped isolates packed rows" in done.stdout
    assert "a CPU has no variable-length kernel" in done.stdout


def test_models_of_both_names_are_the_same():
    model = build_model("llama", documents.DOCUMENTS)
    errors = {prove_agreement(model, name, 64).logits for name in ("varlen", "grouped")}
    assert len(errors) == 1
