"""Lean norms and gated activations against transformers' own: the same values, the same gradients,
less kept.
"""

import shutil

import pytest
import torch
from conftest import ARCHITECTURES, ROOT, build_model, run_script
from transformers import GPT2Config, GPT2Model

from medqlora.core.config import Lora
from medqlora.model.adapter import attach_adapter
from medqlora.model.attention.documents import DOCUMENTS
from medqlora.model.compiling import compile_kernels, compile_layers
from medqlora.model.dropout import Dropped, DroppedLinear, SeededDropout, draw_kept
from medqlora.model.overrides import BASE_OVERRIDES, apply_overrides


def run(model, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Output, gradient of the input, and bytes that autograd keeps."""
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(inputs_embeds=x, attention_mask=None, use_cache=False).last_hidden_state
    (out.float() * torch.arange(out.shape[-1])).sum().backward()
    return out.detach(), x.grad, sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_overridden_layers_compute_the_same(architecture, dtype):
    model = build_model(architecture).to(dtype).requires_grad_(False).model
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.2)
    x = torch.randn(1, 24, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = run(model, x)
    norms = {"llama": 5, "qwen2": 5, "gemma2": 9, "phi3": 5}[architecture]
    assert apply_overrides(model.modules(), BASE_OVERRIDES, dtype) == norms + 2 + 1
    after = run(model, x)
    assert torch.equal(before[0], after[0])
    scale = before[1].abs().max()
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    assert (before[1] - after[1]).abs().max() <= tolerance * scale
    # in float32 a norm needs no wider copy
    assert after[2] < (1.0 if dtype is torch.float32 else 0.9) * before[2]


@pytest.mark.full
@pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch's compiler needs a C++ compiler on a CPU"
)
def test_compiled_layers_compute_the_same(tmp_path):
    """In a process of its own: tests run without torch's compiler, see conftest. Lengths change, as
    packed batches do.
    """
    (tmp_path / "compare.py").write_text(f"""
import os, sys, torch, torch._dynamo
sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT / "tests" / "model")!r}]
from test_layers import BASE_OVERRIDES, apply_overrides, build_model, compile_layers, run
os.environ["TORCHDYNAMO_DISABLE"] = "0"
# The norms of Gemma have an offset; the plain kind is tried by compile_kernels.
model = build_model("gemma2").requires_grad_(False).model
apply_overrides(model.modules(), BASE_OVERRIDES, torch.float32)
seeded = lambda: torch.Generator().manual_seed(0)
inputs = [torch.randn(1, length, 64, generator=seeded()) for length in (24, 31, 17, 40)]
before = [run(model, x) for x in inputs]
assert compile_layers(model, torch.device("cpu"), True)
for x, (out, gradient, kept) in zip(inputs, before):
    after = run(model, x)
    assert (out - after[0]).abs().max() <= 1e-5 * out.abs().max()
    assert (gradient - after[1]).abs().max() <= 1e-5 * gradient.abs().max()
    assert after[2] == kept
stats = torch._dynamo.utils.counters["stats"]
assert 4 <= stats["unique_graphs"] <= 20, stats
""")
    done = run_script(tmp_path / "compare.py", cold=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.full
@pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch's compiler needs a C++ compiler on a CPU"
)
def test_compiled_layers_are_made_few_times(tmp_path):
    """torch's compiler goes on without compiling after eight variants of a function, in silence.
    Qwen3 has norms of two widths; training, scoring and generating see packed and padded batches of
    many lengths, and single tokens.
    """
    (tmp_path / "count.py").write_text(f"""
import os, sys, torch
sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT / "tests" / "model")!r}]
from conftest import ARCHITECTURES, SMALL, build_model
os.environ["TORCHDYNAMO_DISABLE"] = "0"
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from transformers import Qwen3Config
from medqlora.model import compiling
from medqlora.model.overrides import BASE_OVERRIDES, apply_overrides
from medqlora.model.attention.documents import DOCUMENTS
from medqlora.core.config import Lora
from medqlora.engines.hf import HfEngine
from medqlora.engines.interface import Request, Sampling
from medqlora.model.head_loss import AnswerLoss
from medqlora.model.adapter import attach_adapter
from test_losses import make_batch, make_table
ARCHITECTURES["qwen3"] = lambda: Qwen3Config(**SMALL, head_dim=16)
model = build_model("qwen3", DOCUMENTS).requires_grad_(False)
apply_overrides(model.modules(), BASE_OVERRIDES, torch.float32)
assert compiling.compile_layers(model, torch.device("cpu"), True)
loss = AnswerLoss(attach_adapter(model, Lora(r=4), 0), 1024)
for rows in (range(9), range(5), range(3, 9), range(2)):
    loss(**make_batch(make_table(), rows, "varlen")).backward()
engine = HfEngine(model, "varlen", 400)
for count in (1, 3, 7, 12):
    engine.score([Request(list(range(5, 30 + number)), [[4], [5, 6]]) for number in range(count)])
for prompts in ([list(range(5, 20)), list(range(5, 12))], [list(range(5, 25))]):
    engine.generate(prompts, Sampling(max_new_tokens=5, stop_ids=(2,), decode=str))
for name in ("normalise", "normalise_backward", "gate", "gate_backward"):
    variants = len(_debug_get_cache_entry_list(getattr(compiling, name).__code__))
    assert 1 <= variants <= 4, (name, variants)
""")
    done = run_script(tmp_path / "count.py", cold=True)
    assert done.returncode == 0, done.stderr


def test_a_machine_without_a_compiler_goes_on(monkeypatch):
    def refuse(*_):
        raise RuntimeError("no compiler")

    compile_kernels.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda function: refuse)
    model = build_model("llama").requires_grad_(False).model
    apply_overrides(model.modules(), BASE_OVERRIDES, torch.float32)
    with pytest.warns(UserWarning, match="no compiler"):
        assert not compile_layers(model, torch.device("cpu"), True)
    assert not compile_layers(model, torch.device("cpu"), "auto")
    run(model, torch.randn(1, 8, 64))


def test_unknown_layers_are_left_alone():
    model = GPT2Model(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=8))
    assert apply_overrides(list(model.modules())[1:], BASE_OVERRIDES, torch.float32) == 0


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_gradients_are_those_of_finite_differences(architecture):
    model = build_model(architecture).double().requires_grad_(False).model
    apply_overrides(model.modules(), BASE_OVERRIDES, torch.float64)
    layer = model.layers[0]
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True) * 0.5
    assert torch.autograd.gradcheck(lambda h: layer.mlp(h), x, atol=1e-4)


# ---- dropout that keeps a seed -------------------------------------------------------------------


def test_dropped_linear_is_dropout_before_a_linear_map():
    x = torch.randn(50, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    out = DroppedLinear.apply(x, weight, 0.3)
    torch.manual_seed(3)
    assert torch.equal(
        out,
        torch.nn.functional.linear(x * draw_kept(x, 0.3, int(torch.randint(2**62, ()))), weight)
        / 0.7,
    )

    def again(x, weight):
        torch.manual_seed(3)
        return DroppedLinear.apply(x, weight, 0.3), Dropped.apply(x, 0.3)

    assert torch.autograd.gradcheck(again, (x[:5].detach().requires_grad_(), weight))


def test_dropout_drops_the_share_it_is_told_and_only_in_training():
    dropout = SeededDropout(0.2)
    x = torch.ones(400, 500)
    torch.manual_seed(0)
    first = dropout(x)
    second = dropout(x)
    assert (first == 0).float().mean().item() == pytest.approx(0.2, abs=0.01)
    assert first.mean().item() == pytest.approx(1, abs=0.01)
    assert not torch.equal(first, second)
    assert torch.equal(dropout.eval()(x), x)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_dropout_keeps_no_mask_and_is_the_same_when_layers_are_recomputed(variant):
    """What autograd keeps with dropout is what it keeps without, but for DoRA's dropped input."""
    kept = {}
    gradients = {}
    for dropout, recomputed in ((0.0, False), (0.1, False), (0.1, True)):
        model = attach_adapter(
            build_model("llama", DOCUMENTS), Lora(r=4, dropout=dropout, variant=variant), 0
        ).train()
        if recomputed:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        storages = {}

        def pack(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        torch.manual_seed(7)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = (
                model.get_base_model()
                .model(input_ids=torch.arange(3, 99)[None], attention_mask=None, use_cache=False)
                .last_hidden_state
            )
        out.square().sum().backward()
        kept[dropout, recomputed] = sum(storages.values())
        gradients[dropout, recomputed] = torch.cat(
            [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        )
    if variant == "lora":
        assert kept[0.1, False] <= 1.01 * kept[0.0, False]
    assert torch.equal(gradients[0.1, False], gradients[0.1, True])
    assert not torch.equal(gradients[0.1, False], gradients[0.0, False])
