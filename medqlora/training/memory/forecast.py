"""A memory forecast of a training step, which runs the recipe's own modules on the meta device."""

from __future__ import annotations

import contextlib
import functools
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
    sum_unavoidable,
)
from medqlora.training.session import Loaded, build, run_micro_batch
from medqlora.training.strategies.replicated import make_master, move_gradient


class TracedTrainer:
    """The methods of a trainer that a micro-batch needs; it tells the tracker the phase."""

    def __init__(self, loss_model: AnswerLoss, tracker: Tracker):
        self.loss_model = loss_model
        self.tracker = tracker

    def __call__(self, **batch: Any) -> torch.Tensor:
        self.tracker.phase = "forward"
        return self.loss_model(**batch)

    def backward(self, loss: torch.Tensor) -> None:
        """Compute the gradients in the phase "backward"."""
        self.tracker.phase = "backward"
        loss.backward()

    def accumulate(self, last: bool) -> contextlib.AbstractContextManager:
        """Return an empty context: there is no other rank."""
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
    """Forecast the memory of one process that has the whole model and trains on such a batch.

    Args:
        config: The configuration, where training.gradient_checkpointing is not `auto`.
        architecture: Configuration of the base model.
        device: The device that trains, "cuda" or "cpu"; it need not be in this machine.
        dtype: The dtype of computing.
        storage: The dtype that 4-bit weights are packed in.
        batch: Every micro-batch is like this one.
        place: The device of the forecast. On "meta", tensors have no content. On "cpu", the step is
            really taken with random weights, and its tensors are tracked in the same way.
        backend: The attention backend; None takes the one that model.attention chooses on `device`.

    Raises:
        UnknownForecast: The forecast cannot follow the attention backend or the architecture.
        AttentionError: The attention backend does not run on `device`.
    """
    text = architecture.get_text_config()
    if backend is None:
        backend = check_attention(config.model.attention, device, dtype, architecture).backend
    tracker = Tracker(text.vocab_size, place)
    base = make_base(architecture, config.model, place, dtype, storage)
    if place.type == "meta" and wants_compiling(device, config.training.compile):
        # Compiled kernels keep no intermediate results; those of the plain ones would be counted.
        outline_kernels(base)
    if config.training.gradient_checkpointing == "offload" and device.type == "cpu":
        # On a CPU, set_checkpointing recomputes all layers and offloads nothing.
        config = change(config, "training", gradient_checkpointing="full")
    # The context makes the adapter on the device of the forecast as well.
    with place:
        built = build(Loaded(base, backend, compiled=False), config)
    model = built.model
    trainer = TracedTrainer(built.loss_model.train(), tracker)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # The weights were made before the tracker watched, so they are entered one by one.
    sort_resident(tracker, base, model)
    at_loading = dict(tracker.now)
    tracker.phase = "before the step"
    # The tracker counts only live tensors, so these must exist until the step has been taken.
    resident = make_states(config.training.optimizer, device, weights)
    for state in resident:
        tracker.follow(state, "optimizer")
    masters = [make_master(weight) for weight in weights]
    if device.type == "cuda":
        resident.append(tracker.make((CUBLAS_WORKSPACES,), torch.uint8, "workspace"))
    for weight, master in zip(weights, masters, strict=True):
        if master is not weight:
            tracker.follow(master.data, "master weights")
        if batch.accumulated:
            master.grad = torch.zeros_like(master)
            tracker.follow(master.grad, "gradients")
        # The tracker takes a weight's new gradient for one of activations until this hook moves it.
        weight.register_post_accumulate_grad_hook(
            functools.partial(collect_gradient, master=master, tracker=tracker)
        )
    inputs = make_inputs(batch, device, place, backend)
    for value in inputs.values():
        if not torch.is_tensor(value):  # The documents are an object that holds tensors.
            value = [field for field in vars(value).values() if torch.is_tensor(field)]
        tracker.see(value, "inputs")
    try:
        with tracker:
            run_micro_batch(trainer, inputs, factor=1, last=True)
    # The model's code may read the content of a tensor, or call an operator that has no
    # implementation on the meta device.
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise UnknownForecast(
            f"{architecture.model_type} with {config.model.quantization} cannot be forecast"
            f" ({' '.join(str(error).split())[:160]}); set training.gradient_checkpointing and"
            " training.max_tokens_per_batch to values instead of auto, or measure the memory with"
            " bench/memory.py --measure"
        ) from None
    # AdamW and clipping work in place and make no large tensors.
    tracker.peaks["optimizer step"] = (tracker.total, dict(tracker.now))
    peak, by_category = max(tracker.peaks.values(), key=lambda item: item[0])
    del resident
    return Forecast(
        peak=peak,
        by_category={name: by_category.get(name, 0) for name in CATEGORIES},
        by_phase={phase: total for phase, (total, _) in tracker.peaks.items()},
        reserved=replay_allocator(tracker.events, expandable=True),
        reserved_fixed=replay_allocator(tracker.events),
        at_loading=at_loading,
        trainable=sum(weight.numel() for weight in weights),
        layers=text.num_hidden_layers,
        recomputed=built.recomputed,
        largest=measure_units(base),
        host=find_arena(base).capacity,
        full=config.training.method == "full",
        unavoidable=sum_unavoidable(by_category, 4 * sum(weight.numel() for weight in weights)),
    )


def collect_gradient(weight: torch.Tensor, master: torch.Tensor, tracker: Tracker) -> None:
    """Do with a new gradient what strategies.replicated does, and count the result."""
    if master is not weight:
        move_gradient(weight, master)
    tracker.follow(master.grad, "gradients")


def check_attention(
    requested: str,
    device: torch.device,
    dtype: torch.dtype,
    architecture: PretrainedConfig,
    capability: tuple[int, int] | None = None,
) -> Choice:
    """Choose the attention backend of a forecast.

    flash, varlen and flex keep the same tensors for the backward pass: queries, keys, values, the
    output, and one number per row and head. Their forecast is the same, with the buffers of varlen,
    which are the largest.

    Args:
        requested: Value of model.attention.
        device: The device that trains; it need not be in this machine.
        dtype: The dtype of computing.
        capability: Compute capability of the GPU; None takes the one of this machine's GPU.

    Raises:
        AttentionError: The backend does not run on `device`.
        UnknownForecast: The backend is eager, or sdpa on a GPU.
    """
    # The machine that trains may have the package of flash attention even if this one does not.
    if requested == "flash" and device.type == "cuda":
        return Choice("flash", "model.attention asks for it")
    choice = choose_backend(requested, device, dtype, architecture, capability)
    if choice.backend == "eager" or (device.type == "cuda" and choice.backend == "sdpa"):
        raise UnknownForecast(
            f"model.attention {choice.backend}: the masks of this backend depend on the data, so"
            " their memory cannot be forecast; set model.attention to auto, or measure the memory"
            " with bench/memory.py --measure"
        )
    return choice


def make_states(
    optimizer: str, device: torch.device, weights: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Make the tensors that the optimizer keeps on the device, without content.

    AdamW keeps two float32 moments. The 8-bit optimizers keep two moments of 8 bits with a float32
    scale per 256 entries for tensors of at least 4,096 entries (bitsandbytes, optim/optimizer.py).
    Paged moments, of at least 100,000 entries, lie outside the GPU's allocator and move to the host
    when memory is short. They are not counted on a GPU.

    Args:
        optimizer: Value of training.optimizer.
        device: The device that trains.
        weights: The trainable parameters.
    """
    states = []
    for weight in weights:
        size = weight.numel()
        if optimizer == "adamw" or size < 4_096:
            states += [torch.empty(size, device=META) for _ in range(2)]  # float32 [size]
            continue
        paged = optimizer != "adamw_8bit" and device.type == "cuda" and size >= 100_000
        if not paged:
            states += [torch.empty(size, dtype=torch.uint8, device=META) for _ in range(2)]
        states += [torch.empty(-(-size // 256), device=META) for _ in range(2)]  # float32 [blocks]
    return states


def make_inputs(
    batch: Batch, device: torch.device, place: torch.device, backend: str
) -> dict[str, Any]:
    """Make the arguments of AnswerLoss.forward at `place`.

    The documents of the batch are located as the attention backend on `device` needs them.
    """
    ends = torch.tensor(batch.lengths).cumsum(0).tolist()
    cu_seqlens = torch.tensor([0, *ends], dtype=torch.int32)  # int32 [rows + 1]
    # The GPU need not be in this machine, so the meta device takes its place. `on_gpu` then tells
    # the attention which kernels to forecast.
    document_device = device if device.type == "cpu" else META
    documents = locate_documents(cu_seqlens, max(batch.lengths), document_device, backend)
    moved = {
        name: value.to(place) for name, value in vars(documents).items() if torch.is_tensor(value)
    }
    documents = replace(documents, **moved, on_gpu=device.type == "cuda")
    inputs: dict[str, Any] = {}
    for name in ("input_ids", "position_ids"):
        inputs[name] = torch.zeros((1, batch.tokens), dtype=torch.int64, device=place)
    for name in ("predict_at", "targets"):
        inputs[name] = torch.zeros(batch.labelled, dtype=torch.int64, device=place)
    inputs["documents"] = documents
    return inputs
