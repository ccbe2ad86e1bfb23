"""Layers whose activations are computed again in the backward pass.

What they begin from can wait in the host's memory.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

from medqlora.model.attention.packed_batch import find_device
from medqlora.model.base import find_layers


def set_checkpointing(model: torch.nn.Module, mode: str) -> int:
    """Recompute no, all, every k-th or the first k decoder layers in the backward pass (mode:
    training.gradient_checkpointing, not auto, which memory.plan_step decides); offload: all, and on
    a GPU their inputs wait in the host's memory; -> how many.
    """
    if mode == "none":
        return 0
    model.gradient_checkpointing_enable({"use_reentrant": False})
    kind, _, count = mode.partition("_")
    layers = [
        layer for layer in find_layers(model) if hasattr(layer, "_gradient_checkpointing_func")
    ]
    model.host_arena = HostArena()
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = {
            "full": True,
            "offload": True,
            "every": number % int(count or 1) == 0,
            "first": number < int(count or 0),
        }[kind]
        # the last layer's is needed at once
        if kind == "offload" and find_device(model).type != "cpu" and number < len(layers) - 1:
            layer._gradient_checkpointing_func = functools.partial(
                checkpoint_offloaded, arena=model.host_arena
            )
    return sum(layer.gradient_checkpointing for layer in layers)


@dataclass(eq=False)
class Waiting:
    """A tensor that waits in a HostArena, from byte `start` on."""

    device: torch.device
    dtype: torch.dtype
    shape: torch.Size
    start: int


class HostArena:
    """Pinned memory of the host, used again in every step, for layer inputs that wait for the
    backward pass.

    It grows by chunks of a power of two, because that is what CUDA's host allocator rounds every
    block up to; a tensor may lie in several. A place is free again when its Waiting is gone. Copies
    run in the order of the GPU's own work, so a place that is taken again is written after it was
    read.
    """

    CHUNK = 32 * 2**20  # bytes

    def __init__(self):
        # They are uint8 and pinned; a forecast, which moves nothing, has none.
        self.chunks: list[torch.Tensor] = []
        self.capacity = 0  # bytes
        self.taken: dict[int, int] = {}  # start -> end of what waits

    def send(self, tensor: torch.Tensor) -> Waiting:
        """Copy a tensor to the host, without waiting for the copy."""
        start = max(self.taken.values(), default=0)
        size = tensor.numel() * tensor.itemsize
        waiting = Waiting(tensor.device, tensor.dtype, tensor.shape, start)
        if not size:
            return waiting
        self.grow(start + size, tensor)
        self.taken[start] = start + size
        weakref.finalize(waiting, self.taken.pop, start, None)
        if not tensor.is_meta:
            flat = tensor.contiguous().view(-1).view(torch.uint8)
            for chunk, inside in self.cut(start, size):
                chunk.copy_(flat[inside], non_blocking=True)
        return waiting

    def fetch(self, waiting: Waiting) -> torch.Tensor:
        """The tensor on its device again."""
        tensor = torch.empty(waiting.shape, dtype=waiting.dtype, device=waiting.device)
        if not tensor.is_meta and tensor.numel():
            flat = tensor.view(-1).view(torch.uint8)
            for chunk, inside in self.cut(waiting.start, len(flat)):
                flat[inside].copy_(chunk, non_blocking=True)
        return tensor

    def grow(self, size: int, tensor: torch.Tensor) -> None:
        while self.capacity < size:
            self.capacity += self.CHUNK
            if not tensor.is_meta:
                self.chunks.append(
                    torch.empty(self.CHUNK, dtype=torch.uint8, pin_memory=tensor.is_cuda)
                )

    def cut(self, start: int, size: int) -> Iterator[tuple[torch.Tensor, slice]]:
        """The parts of the chunks that bytes start ... start + size lie in, each with its part of
        the tensor's bytes.
        """
        done = 0
        while done < size:
            number, offset = divmod(start + done, self.CHUNK)
            length = min(size - done, self.CHUNK - offset)
            yield self.chunks[number][offset : offset + length], slice(done, done + length)
            done += length


def find_arena(model: torch.nn.Module) -> HostArena:
    """Where a model's offloaded layer inputs wait; an empty one where none are offloaded."""
    return getattr(model, "host_arena", None) or HostArena()


def checkpoint_offloaded(
    function: Callable, *inputs: torch.Tensor, arena: HostArena | None = None
) -> torch.Tensor:
    """As torch's checkpoint, but a layer's input waits for the backward pass in the host's
    memory.
    """
    arena = arena or HostArena()
    with torch.autograd.graph.saved_tensors_hooks(arena.send, arena.fetch):
        return checkpoint(function, *inputs, use_reentrant=False)
