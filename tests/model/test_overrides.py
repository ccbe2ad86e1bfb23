"""Replaced methods are those of the very upstream class, prove themselves, and can be undone."""

import json
import types

import pytest
import torch
from conftest import ARCHITECTURES, build_model
from transformers.models.llama import modeling_llama

from medqlora.core.config import Lora
from medqlora.model import overrides
from medqlora.model.adapter import attach_adapter
from medqlora.model.head_loss import AnswerLoss
from medqlora.model.overrides import (
    ADAPTER_OVERRIDES,
    BASE_OVERRIDES,
    GATHERED_OVERRIDES,
    apply_overrides,
    list_overrides,
    undo_overrides,
)

EVERY = (*BASE_OVERRIDES, *ADAPTER_OVERRIDES, *GATHERED_OVERRIDES)


def forwards(model: torch.nn.Module) -> dict[str, object]:
    return {name: module.__dict__.get("forward") for name, module in model.named_modules()}


def frozen(architecture: str = "llama") -> torch.nn.Module:
    return build_model(architecture).requires_grad_(False)


@pytest.mark.parametrize("override", EVERY, ids=lambda override: override.upstream)
def test_every_upstream_class_exists_and_has_the_method(override):
    module = __import__(override.upstream.partition(":")[0], fromlist=["_"])
    assert override.find_class() is getattr(module, override.upstream.partition(":")[2])
    assert callable(getattr(override.find_class(), override.method))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_replaced_is_recorded_with_its_difference_and_undone(architecture):
    model = frozen(architecture)
    before = forwards(model)
    loss_model = AnswerLoss(attach_adapter(model, Lora(r=4), 0), 16)
    apply_overrides(model.modules(), BASE_OVERRIDES, torch.float32)
    listed = list_overrides(loss_model)
    assert {row["name"] for row in listed} == {
        "RMS norm",
        "gated activation",
        "look for padding",
        "LoRA layer",
        "head with loss",
    }
    for row in listed:
        assert 0 <= row["measured_difference"] < 1e-5
        assert row["modules"] > 0
        assert row["reason"]
        module, _, name = row["class"].rpartition(".")
        assert hasattr(__import__(module, fromlist=["_"]), name)
    assert json.loads(json.dumps(listed)) == listed
    assert undo_overrides(loss_model) == sum(row["modules"] for row in listed)
    assert list_overrides(loss_model) == []
    assert not any(forwards(loss_model).values())
    assert not any(before.values())


def test_proving_leaves_torchs_generator_and_the_adapter_as_they_were():
    model = attach_adapter(frozen(), Lora(r=4), 0)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    apply_overrides(model.modules(), BASE_OVERRIDES, torch.float32)
    assert torch.equal(torch.rand(4), expected)
    factors = [weight for name, weight in model.named_parameters() if "lora_B" in name]
    assert factors
    assert not any(factor.any() for factor in factors)


def test_a_namesake_is_left_alone_with_a_warning():
    """A class called LlamaRMSNorm that comes with a model's own code, and computes another norm."""

    class LlamaRMSNorm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(64), requires_grad=False)
            self.variance_epsilon = 1e-6

        def forward(self, x):
            return self.weight * x / x.abs().mean(-1, keepdim=True)

    model = frozen()
    model.model.norm = namesake = LlamaRMSNorm()
    with pytest.warns(UserWarning, match=r"LlamaRMSNorm has the name .* comes from elsewhere"):
        apply_overrides(model.modules(), BASE_OVERRIDES, torch.float32)
    assert "forward" not in namesake.__dict__
    assert "forward" in model.model.layers[0].input_layernorm.__dict__


CHANGED = {
    "another value": lambda self, x: self.weight * torch.nn.functional.layer_norm(x, (64,)),
    "another dtype": lambda self, x: self.weight.double() * x.double(),
    "another gradient": lambda self, x: (
        modeling_llama.LlamaRMSNorm.original(self, x.detach()) + 0 * x
    ),
    "a gradient that is not a number": lambda self, x: (
        modeling_llama.LlamaRMSNorm.original(self, x) + 0 * (x - x.detach()).abs().sqrt()
    ),
    "another signature": lambda self, x, gate: x,
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_changed_upstream_method_is_left_alone_with_a_warning(monkeypatch, change):
    norm = modeling_llama.LlamaRMSNorm
    monkeypatch.setattr(norm, "original", norm.forward, raising=False)
    monkeypatch.setattr(norm, "forward", CHANGED[change])
    model = frozen()
    with pytest.warns(
        UserWarning, match=r"LlamaRMSNorm computes something else than the override RMS norm"
    ):
        apply_overrides(model.modules(), BASE_OVERRIDES, torch.float32)
    assert "forward" not in model.model.norm.__dict__
    assert "forward" in model.model.layers[0].mlp.__dict__
    assert "RMS norm" not in {row["name"] for row in list_overrides(model)}


def test_a_full_memory_is_not_taken_for_a_changed_method(monkeypatch):
    def fail(self, x):
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", fail)
    with pytest.raises(torch.OutOfMemoryError):
        apply_overrides(frozen().modules(), BASE_OVERRIDES, torch.float32)


def test_a_changed_lora_layer_is_found_although_a_fresh_adapter_adds_nothing(monkeypatch):
    from peft.tuners.lora.layer import Linear

    upstream = Linear.forward
    monkeypatch.setattr(
        Linear, "forward", lambda self, x: 2 * upstream(self, x) - self.base_layer(x)
    )
    with pytest.warns(UserWarning, match="computes something else than the override LoRA layer"):
        model = attach_adapter(frozen(), Lora(r=4), 0)
    assert "LoRA layer" not in {row["name"] for row in list_overrides(model)}


def test_a_method_that_another_library_replaced_comes_back():
    model = frozen()
    norm = model.model.norm
    own = types.MethodType(lambda self, x: type(self).forward(self, x), norm)
    norm.forward = own
    apply_overrides(model.modules(), BASE_OVERRIDES, torch.float32)
    assert norm.forward is not own
    undo_overrides(model)
    assert norm.forward is own


def test_a_method_is_replaced_once():
    model = frozen()
    first = apply_overrides(model.modules(), BASE_OVERRIDES, torch.float32)
    assert apply_overrides(model.modules(), BASE_OVERRIDES, torch.float32) == first
    assert undo_overrides(model) == first


def test_without_content_nothing_is_measured():
    with torch.device("meta"):
        model = build_model("llama").requires_grad_(False)
    apply_overrides(model.modules(), BASE_OVERRIDES, torch.float32)
    differences = {row["name"]: row["measured_difference"] for row in list_overrides(model)}
    assert differences == {
        "RMS norm": None,
        "gated activation": None,
        "look for padding": None,
    }


def test_other_places_do_not_replace_methods():
    """Only overrides.py sets a method of a module."""
    from conftest import ROOT

    for path in (ROOT / "medqlora").rglob("*.py"):
        if path.name != "overrides.py":
            text = path.read_text(encoding="utf-8")
            assert ".forward = " not in text, path
            assert "MethodType" not in text, path
    assert overrides.RECORDS
