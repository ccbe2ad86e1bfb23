"""Memory of a training step: the recipe's own modules run on the meta device."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import torch
from transformers import PretrainedConfig

from medqlora.core.config import Config
from medqlora.core.config_loading import change
from medqlora.model.attention.backends import Choice, choose_backend
from medqlora.model.attention.documents import locate_documents
from medqlora.model.compiling import outline_kernels, wants_compiling
from medqlora.model.head_loss import AnswerLoss
from medqlora.model.random_base import make_base
from medqlora.model.recomputation import find_arena
from medqlora.training.memory.allocator import replay_allocator
from medqlora.training.memory.sharding import measure_units, sort_resident
from medqlora.training.memory.tracker import (
    CATEGORIES,
    CUBLAS_WORKSPACES,
    META,
    Batch,
    Forecast,
    Tracker,
    UnknownForecast,
)
from medqlora.training.session import Loaded, build, run_micro_batch


class TracedTrainer:
    """As much of a trainer as a micro-batch needs; the tracker is told its phases."""

    def __init__(self, loss_model: AnswerLoss, tracker: Tracker):
        self.loss_model = loss_model
        self.tracker = tracker

    def __call__(self, **batch: Any) -> torch.Tensor:
        self.tracker.phase = "forward"
        return self.loss_model(**batch)

    def backward(self, loss: torch.Tensor) -> None:
        self.tracker.phase = "backward"
        loss.backward()

    def accumulate(self, last: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()


def forecast_step(
    config: Config,
    architecture: PretrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
    storage: torch.dtype,
    batch: Batch,
    place: torch.device = META,
    backend: str | None = None,
) -> Forecast:
    """Memory of one process that trains on batches like `batch`, on one GPU ("cuda") or on a CPU;
    neither need be there.

    config: with training.gradient_checkpointing decided (not auto); dtype: of computing; storage:
    of packed 4-bit weights; place: the CPU instead of the meta device takes the step for real, with
    random weights, and follows its tensors in the same way; backend: of attention, default what
    model.attention chooses there.

    Raises:
        UnknownForecast: an attention backend or an architecture that cannot be followed.
        AttentionError: an attention backend that the recipe refuses there.
    """
    text = architecture.get_text_config()
    backend = (
        backend or check_attention(config.model.attention, device, dtype, architecture).backend
    )
    tracker = Tracker(text.vocab_size, place)
    base = make_base(architecture, config.model, place, dtype, storage)
    if place.type == "meta" and wants_compiling(device, config.training.compile):
        outline_kernels(base)
    if config.training.gradient_checkpointing == "offload" and device.type == "cpu":
        config = change(config, "training", gradient_checkpointing="full")
    with place:
        built = build(Loaded(base, backend, compiled=False), config)
    model = built.model
    trainer = TracedTrainer(built.loss_model.train(), tracker)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sort_resident(tracker, base, model)
    at_loading = dict(tracker.now)
    tracker.phase = "before the step"
    kept = make_states(config.training.optimizer, device, weights)
    for state in kept:
        tracker.follow(state, "optimizer")
    if device.type == "cuda":
        kept.append(tracker.make((CUBLAS_WORKSPACES,), torch.uint8, "workspace"))
    for weight in weights:
        if batch.accumulated:
            weight.grad = torch.zeros_like(weight)
            tracker.follow(weight.grad, "gradients")
        weight.register_post_accumulate_grad_hook(
            lambda parameter: tracker.follow(parameter.grad, "gradients")
        )
    inputs = make_inputs(batch, device, place, backend)
    for tensor in inputs.values():
        tracker.see(
            (
                tensor
                if torch.is_tensor(tensor)
                else [v for v in vars(tensor).values() if torch.is_tensor(v)]
            ),
            "inputs",
        )
    try:
        with tracker:
            run_micro_batch(trainer, inputs, factor=1, last=True)
    # code that looks into tensors, or an operator without shapes
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise UnknownForecast(
            f"{architecture.model_type} with {config.model.quantization} cannot be forecast"
            f" ({' '.join(str(error).split())[:160]}); set training.gradient_checkpointing and"
            " training.max_tokens_per_batch to values, or measure"
        ) from None
    # in place: AdamW and clipping make nothing of size
    tracker.peaks["optimizer step"] = (tracker.total, dict(tracker.now))
    peak, by_category = max(tracker.peaks.values(), key=lambda found: found[0])
    del kept
    return Forecast(
        peak,
        {name: by_category.get(name, 0) for name in CATEGORIES},
        {phase: total for phase, (total, _) in tracker.peaks.items()},
        replay_allocator(tracker.events, expandable=True),
        replay_allocator(tracker.events),
        at_loading,
        sum(weight.numel() for weight in weights),
        text.num_hidden_layers,
        built.recomputed,
        measure_units(base),
        find_arena(base).capacity,
    )


def check_attention(
    requested: str,
    device: torch.device,
    dtype: torch.dtype,
    architecture: PretrainedConfig,
    capability: tuple[int, int] | None = None,
) -> Choice:
    """The backend that a forecast is for. flash, varlen and flex keep the same tensors for the
    backward pass (queries, keys, values, output, one number per row and head) and are forecast
    alike, with the largest buffers, varlen's.

    capability: of a GPU that is not here; default this machine's.

    Raises:
        AttentionError: the recipe refuses it there.
        UnknownForecast: sdpa on a GPU.
    """
    # The machine that trains may have the package, even if this one has not.
    if requested == "flash" and device.type == "cuda":
        return Choice("flash", "model.attention asks for it")
    choice = choose_backend(requested, device, dtype, architecture, capability)
    if device.type == "cuda" and choice.backend == "sdpa":
        raise UnknownForecast(
            "model.attention sdpa: its masks depend on the data and cannot be forecast; use auto,"
            " or measure"
        )
    return choice


def make_states(
    optimizer: str, device: torch.device, weights: list[torch.Tensor]
) -> list[torch.Tensor]:
    """What the optimizer keeps on the device: two float32 moments, or two of 8 bits with a float32
    scale per 256 entries for tensors of 4,096 entries and more (bitsandbytes, optim/optimizer.py).
    Paged states lie outside a GPU's allocator and move to the host when memory is short, so they do
    not count on a GPU."""
    made = []
    for weight in weights:
        size = weight.numel()
        if optimizer == "adamw" or size < 4_096:
            made += [torch.empty(size, device=META) for _ in range(2)]
        # smaller ones are not paged
        elif optimizer == "adamw_8bit" or device.type != "cuda" or size < 100_000:
            made += [torch.empty(size, dtype=torch.uint8, device=META) for _ in range(2)]
            made += [torch.empty(-(-size // 256), device=META) for _ in range(2)]
        else:
            made += [torch.empty(-(-size // 256), device=META) for _ in range(2)]
    return made


def make_inputs(
    batch: Batch, device: torch.device, place: torch.device, backend: str
) -> dict[str, Any]:
    """Arguments of AnswerLoss at `place`; where documents lie, as attention on `device` wants
    it.
    """
    tokens = batch.tokens
    cu_seqlens = torch.tensor(
        [0, *torch.tensor(batch.lengths).cumsum(0).tolist()], dtype=torch.int32
    )
    documents = locate_documents(
        cu_seqlens, max(batch.lengths), device if device.type == "cpu" else META, backend
    )
    moved = {
        name: value.to(place) for name, value in vars(documents).items() if torch.is_tensor(value)
    }
    documents = replace(documents, **moved, on_gpu=device.type == "cuda")
    names = {
        "input_ids": (1, tokens),
        "position_ids": (1, tokens),
        "predict_at": (batch.labelled,),
        "targets": (batch.labelled,),
    }
    return {
        name: torch.zeros(shape, dtype=torch.int64, device=place) for name, shape in names.items()
    } | {"documents": documents}
