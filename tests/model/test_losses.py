"""Packed training is separate training: logits, loss and adapter gradients, on four
architectures.
"""

import copy
import functools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ARCHITECTURES, build_model

from medqlora.batches.collate import collate
from medqlora.core.config import Lora, Model
from medqlora.model import base, quantization, random_base, recomputation
from medqlora.model.adapter import attach_adapter
from medqlora.model.agreement import prove_agreement
from medqlora.model.attention.backends import AttentionError
from medqlora.model.attention.documents import DOCUMENTS
from medqlora.model.attention.packed_batch import packing_arguments
from medqlora.model.fused_head import HeadLoss
from medqlora.model.head_loss import AnswerLoss
from medqlora.model.recomputation import set_checkpointing
from medqlora.prompts.rows import TokenTable
from medqlora.training.strategies.launch import Strategy
from medqlora.training.strategies.replicated import Replicated

CPU = torch.device("cpu")


def make_table(rows: int = 9) -> TokenTable:
    generator = np.random.default_rng(0)
    lengths = generator.integers(8, 60, rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    prompts = np.array([generator.integers(1, length - 1) for length in lengths], np.int32)
    return TokenTable(
        generator.integers(3, 320, offsets[-1]).astype(np.int32),
        offsets,
        prompts,
        [str(i) for i in range(rows)],
        np.arange(rows, dtype=np.int32),
    )


def make_batch(table: TokenTable, rows, backend: str) -> dict:
    batch = collate(table, np.asarray(rows))
    tensors = {
        key: torch.from_numpy(batch[key])
        for key in ("input_ids", "position_ids", "predict_at", "targets")
    }
    return tensors | packing_arguments(backend, batch, CPU)


def plain_loss(model, table: TokenTable, row: int) -> torch.Tensor:
    """The reference: transformers' own eager attention and head over one unpacked row."""
    ids = torch.from_numpy(
        np.array(table.ids[table.offsets[row] : table.offsets[row + 1]], np.int64)
    )[None]
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    start = int(table.prompt_lengths[row]) - 1
    return F.cross_entropy(logits[start:].float(), ids[0, start + 1 :], reduction="sum")


def adapted(architecture: str, attention: str, **lora):
    model = attach_adapter(build_model(architecture, attention), Lora(r=4, alpha=8, **lora), seed=0)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def gradients(model) -> torch.Tensor:
    return torch.cat(
        [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("recompute", ["none", "full", "every_2"])
def test_packed_equals_separate(architecture, recompute):
    """Relative error of loss and of all adapter gradients under 1e-5 in float32."""
    table = make_table()
    reference = adapted(architecture, "eager").train()
    expected = sum(plain_loss(reference, table, row) for row in range(9))
    expected.backward()
    packed = adapted(architecture, DOCUMENTS).train()
    set_checkpointing(packed.get_base_model(), recompute)
    loss = AnswerLoss(packed, chunk=16)(**make_batch(table, range(9), "varlen"))
    loss.backward()
    assert abs(loss.item() / expected.item() - 1) < 1e-5
    wanted = gradients(reference)
    got = gradients(packed)
    assert (torch.linalg.vector_norm(wanted - got) / torch.linalg.vector_norm(wanted)).item() < 1e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_offloaded_inputs_give_the_same_gradients(architecture, monkeypatch):
    """In chunks so small that every input lies in several, over two micro-batches that use the
    arena in turn.
    """
    moved = []
    found = []
    arena = recomputation.HostArena()
    monkeypatch.setattr(recomputation.HostArena, "CHUNK", 1000)
    monkeypatch.setattr(
        recomputation.HostArena,
        "send",
        lambda self, tensor, send=recomputation.HostArena.send: (
            moved.append(tensor.shape) or send(self, tensor)
        ),
    )
    for offload in (False, True):
        model = adapted(architecture, DOCUMENTS).train()
        set_checkpointing(model.get_base_model(), "full")
        for layer in base.find_layers(model.get_base_model()) if offload else []:
            layer._gradient_checkpointing_func = functools.partial(
                recomputation.checkpoint_offloaded, arena=arena
            )
        for _ in range(2):
            AnswerLoss(model, chunk=16)(**make_batch(make_table(), range(9), "varlen")).backward()
        found.append(gradients(model))
    assert torch.equal(*found)
    # torch 2.11's checkpoint saves an empty tensor beside the input
    moved = [shape for shape in moved if shape.numel()]
    tokens = int(make_table().lengths.sum())
    layers = model.config.num_hidden_layers
    assert moved == [(1, tokens, model.config.hidden_size)] * layers * 2
    size = layers * tokens * model.config.hidden_size * 4
    # the second micro-batch used the first one's places
    assert size <= arena.capacity < size + 1000
    assert not arena.taken


def test_isolation_of_int8_is_proven_without_outliers():
    """Their columns are those of the whole pack, so a neighbour changes how a row is rounded."""
    pytest.importorskip("bitsandbytes")
    base = random_base.make_base(
        build_model("llama").config, Model(base="random", quantization="int8"), CPU, torch.float32
    )
    states = [
        module.state
        for module in base.modules()
        if hasattr(getattr(module, "state", None), "threshold")
    ]
    seen = []
    base.model.register_forward_hook(lambda *_: seen.extend(state.threshold for state in states))
    assert prove_agreement(base, "grouped", 64).logits < 1e-2
    assert set(seen) == {0.0}
    assert {state.threshold for state in states} == {quantization.INT8_THRESHOLD}


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_sdpa_fallback_is_isolated_too(architecture):
    table = make_table()
    reference = adapted(architecture, "eager")
    expected = sum(plain_loss(reference, table, row) for row in range(9)).item()
    loss = AnswerLoss(adapted(architecture, "sdpa"), 1024)(**make_batch(table, range(9), "sdpa"))
    assert abs(loss.item() / expected - 1) < 1e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_isolation_is_proven_on_the_model(architecture):
    model = build_model(architecture, DOCUMENTS)
    proven = prove_agreement(model, "varlen", 64)
    assert proven.logits < 1e-4
    assert proven.influence < 1e-5


def test_isolation_check_catches_a_leak():
    """The kwargs of another backend do not reach this one, so all documents see each other."""
    model = build_model("llama", DOCUMENTS)
    with pytest.raises(AttentionError, match="does not isolate"):
        prove_agreement(model, "flex", 64)


def test_chunks_do_not_change_the_loss_or_its_gradient():
    table = make_table()
    results = []
    for chunk in (3, 1024):
        model = adapted("gemma2", DOCUMENTS)
        loss = AnswerLoss(model, chunk)(**make_batch(table, range(9), "varlen"))
        loss.backward()
        results.append((loss.item(), gradients(model)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-4, atol=1e-6)


def test_loss_normalised_over_the_global_batch_does_not_depend_on_the_split():
    table = make_table()
    results = []
    for batches in ([list(range(9))], [[0], [1, 2, 3, 4, 5], [6, 7, 8]]):
        model = adapted("llama", DOCUMENTS)
        total = int((table.lengths - table.prompt_lengths).sum())
        for rows in batches:
            (AnswerLoss(model, 1024)(**make_batch(table, rows, "varlen")) / total).backward()
        results.append(gradients(model))
    assert (
        torch.linalg.vector_norm(results[0] - results[1]) / torch.linalg.vector_norm(results[0])
    ).item() < 1e-5


def test_overridden_lora_forward_is_pefts():
    """Values and gradients of the override against PEFT's own, dropout off and on (same seed),
    rsLoRA too.
    """
    for lora in ({}, {"variant": "rslora"}, {"dropout": 0.3}):
        ours = adapted("llama", DOCUMENTS, **lora).train()
        own = copy.deepcopy(ours)
        for module in own.modules():
            module.__dict__.pop("forward", None)
        table = make_table()
        results = []
        for model in (ours, own):
            torch.manual_seed(3)
            loss = AnswerLoss(model, 1024)(**make_batch(table, range(9), "varlen"))
            loss.backward()
            results.append((loss.item(), gradients(model)))
        assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
        assert (
            torch.linalg.vector_norm(results[0][1] - results[1][1])
            / torch.linalg.vector_norm(results[1][1])
        ).item() < 1e-5


def test_dora_trains_through_pefts_own_forward():
    model = adapted("llama", DOCUMENTS, variant="dora").train()
    AnswerLoss(model, 1024)(**make_batch(make_table(), range(9), "varlen")).backward()
    assert any(
        "magnitude" in name and parameter.grad is not None
        for name, parameter in model.named_parameters()
    )


@pytest.mark.parametrize(
    ("scale", "cap", "bias"),
    [(1.0, None, False), (0.25, None, True), (1.0, 5.0, False), (0.5, 5.0, True)],
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2), (torch.float16, 4e-3)]
)
def test_head_loss_is_cross_entropy(dtype, tolerance, scale, cap, bias):
    """Value and gradient, against torch's in float64; float16 as its loss is scaled, with answers
    that are nearly certain.
    """
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(32, 400, bias=bias).requires_grad_(False)
    hidden = torch.randn(20, 32, generator=generator)
    targets = torch.randint(400, (20,), generator=generator)
    hidden[:5] += 40 * head.weight[targets[:5]]
    head = head.to(dtype)
    hidden = hidden.to(dtype).requires_grad_()
    loss = HeadLoss.apply(hidden, head, targets, scale, cap)
    (loss * 4096 / 20).backward()
    reference = hidden.detach().double().requires_grad_()
    logits = scale * F.linear(
        reference, head.weight.double(), None if head.bias is None else head.bias.double()
    )
    expected = F.cross_entropy(
        logits if cap is None else cap * torch.tanh(logits / cap), targets, reduction="sum"
    )
    (expected * 4096 / 20).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for got, wanted in ((hidden.grad[:5], reference.grad[:5]), (hidden.grad, reference.grad)):
        assert torch.linalg.vector_norm(
            got.double() - wanted
        ) <= tolerance * torch.linalg.vector_norm(wanted)


# ---- float16's loss scale ------------------------------------------------------------------------


def scaled_trainer():
    model = attach_adapter(build_model("llama", DOCUMENTS), Lora(r=4), 0).train()
    return Replicated(
        Strategy("one"),
        AnswerLoss(model, 16),
        lambda weights: torch.optim.SGD(weights, lr=0.1),
        1.0,
        CPU,
        scale=True,
    )


def take_step(trainer, factor: float = 0.01) -> float:
    loss = trainer(**make_batch(make_table(), range(9), "grouped"))
    trainer.backward(loss * factor)
    return trainer.step(0.1)


def test_the_loss_scale_goes_on_where_it_was():
    """A resumed run has the scale of the uninterrupted one, and the number of steps since it last
    changed.
    """
    whole = scaled_trainer()
    whole.write_scale(whole.read_scale() | {"growth_interval": 4, "scale": 8.0})
    resumed = None
    for step in range(6):
        take_step(whole)
        if step == 2:
            resumed = scaled_trainer()
            resumed.write_scale(json.loads(json.dumps(whole.read_scale())))
            resumed.write_weights(whole.read_weights())
        elif resumed:
            take_step(resumed)
    assert whole.read_scale() == resumed.read_scale()
    assert whole.read_scale()["scale"] == 16.0
    assert all(
        torch.equal(value, resumed.read_weights()[name])
        for name, value in whole.read_weights().items()
    )


def test_a_scale_that_is_too_high_skips_the_step_and_falls():
    trainer = scaled_trainer()
    trainer.write_scale(trainer.read_scale() | {"scale": 3e38})
    before = {name: value.clone() for name, value in trainer.read_weights().items()}
    assert not np.isfinite(take_step(trainer, 100))
    assert trainer.read_scale()["scale"] == pytest.approx(1.5e38)
    assert all(torch.equal(value, before[name]) for name, value in trainer.read_weights().items())
