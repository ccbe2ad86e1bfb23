"""A GPU that torch cannot use is said with the reason."""

import pytest
import torch

from medqlora.model.hardware import explain_idle_gpu


@pytest.fixture
def devices(tmp_path):
    for name in ("nvidia0", "nvidia-caps", "null"):
        (tmp_path / name).touch()
    return tmp_path


def test_a_torch_for_cpus_is_named(devices, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built for CPUs alone" in explain_idle_gpu(devices)


def test_an_old_driver_is_named(devices, monkeypatch):
    def fail():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\n…")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", fail)
    text = explain_idle_gpu(devices)
    assert "built for CUDA 13.0, and The NVIDIA driver on your system is too old (found" in text
    assert "\n" not in text


def test_nothing_is_said_of_a_gpu_that_works_or_is_not_there(devices, monkeypatch):
    (devices / "nvidia0").unlink()
    assert explain_idle_gpu(devices) is None
    (devices / "nvidia0").touch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert explain_idle_gpu(devices) is None
