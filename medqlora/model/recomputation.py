"""Layers whose activations are computed again in the backward pass.

The method is that of Chen et al. (2016, arXiv 1604.06174). The inputs of such layers, which the
recomputation begins from, can wait in the host's memory.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

from medqlora.model.attention.packed_batch import find_device
from medqlora.model.base import ModelError, find_layers


def set_checkpointing(model: torch.nn.Module, mode: str) -> int:
    """Choose the decoder layers that are computed again in the backward pass.

    Args:
        model: A transformers causal LM, which is changed.
        mode: The value of training.gradient_checkpointing: "none", "full", "every_K" for every
            K-th layer, "first_K" for the first K, or "offload" for all, whose inputs then wait in
            the host's memory on a GPU. The planner of training.memory has resolved "auto".

    Returns:
        The number of these layers.

    Raises:
        ModelError: The model's layers cannot be recomputed.
    """
    if mode == "none":
        return 0
    # This call sets the flag of every layer, and the loop below decides anew for each. The
    # reentrant form would give the first layer's adapters no gradient, because frozen embeddings
    # make an input that needs none.
    try:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    except ValueError:
        raise ModelError(
            f"{type(model).__name__} cannot compute layers again in the backward pass; set"
            " --training.gradient_checkpointing none"
        ) from None
    kind, _, count = mode.partition("_")
    # Only layers that transformers can recompute have this attribute.
    layers = [
        layer for layer in find_layers(model) if hasattr(layer, "_gradient_checkpointing_func")
    ]
    model.host_arena = HostArena()
    for number, layer in enumerate(layers):
        # All four values are computed each time, so an absent count is read as a harmless number.
        layer.gradient_checkpointing = {
            "full": True,
            "offload": True,
            "every": number % int(count or 1) == 0,
            "first": number < int(count or 0),
        }[kind]
        # The backward pass begins with the last layer, so its input need not leave the GPU.
        is_last = number == len(layers) - 1
        if kind == "offload" and find_device(model).type != "cpu" and not is_last:
            layer._gradient_checkpointing_func = functools.partial(
                checkpoint_offloaded, arena=model.host_arena
            )
    return sum(layer.gradient_checkpointing for layer in layers)


@dataclass(eq=False)
class OffloadedTensor:
    """A tensor whose content lies in a HostArena.

    Args:
        device: The device that it came from.
        dtype: Its dtype.
        shape: Its shape.
        start: The byte of the arena at which it begins.
    """

    device: torch.device
    dtype: torch.dtype
    shape: torch.Size
    start: int


class HostArena:
    """Pinned memory of the host for layer inputs that wait for the backward pass.

    The memory is used again in every step. It consists of chunks whose size is a power of two,
    because CUDA's host allocator rounds every block up to one. A tensor may lie in several chunks.
    Its bytes are free again when its OffloadedTensor is deleted. The copies run in the order of the
    GPU's other work, so bytes that are taken again are overwritten only after they were read.
    """

    CHUNK = 32 * 2**20  # bytes

    def __init__(self):
        # The chunks are uint8 and pinned. A forecast on the meta device has none.
        self.chunks: list[torch.Tensor] = []
        self.capacity = 0  # bytes
        self.taken: dict[int, int] = {}  # the first byte of each tensor -> the byte after its last

    def send(self, tensor: torch.Tensor) -> OffloadedTensor:
        """Copy a tensor to the host without waiting for the copy to end."""
        # Layers are sent in order and fetched in the opposite order, so free bytes lie at the end.
        start = max(self.taken.values(), default=0)
        size = tensor.numel() * tensor.itemsize
        offloaded = OffloadedTensor(tensor.device, tensor.dtype, tensor.shape, start)
        if not size:
            return offloaded
        self.grow(start + size, tensor)
        self.taken[start] = start + size
        # Autograd deletes the object once the layer's backward pass has used it.
        weakref.finalize(offloaded, self.taken.pop, start, None)
        if not tensor.is_meta:
            # The copy may run after this call has returned. The allocator gives the tensor's memory
            # only to later work of the same stream, so it is not overwritten before.
            flat = tensor.contiguous().view(-1).view(torch.uint8)
            for chunk, part in self.split(start, size):
                chunk.copy_(flat[part], non_blocking=True)
        return offloaded

    def fetch(self, offloaded: OffloadedTensor) -> torch.Tensor:
        """Return the tensor on its device, without waiting for the copy to end."""
        tensor = torch.empty(offloaded.shape, dtype=offloaded.dtype, device=offloaded.device)
        if not tensor.is_meta and tensor.numel():
            flat = tensor.view(-1).view(torch.uint8)
            for chunk, part in self.split(offloaded.start, len(flat)):
                flat[part].copy_(chunk, non_blocking=True)
        return tensor

    def grow(self, size: int, tensor: torch.Tensor) -> None:
        """Add chunks until the arena has `size` bytes; they are pinned for a tensor of a GPU."""
        while self.capacity < size:
            self.capacity += self.CHUNK
            if not tensor.is_meta:
                # Only pinned memory is copied without waiting.
                self.chunks.append(
                    torch.empty(self.CHUNK, dtype=torch.uint8, pin_memory=tensor.is_cuda)
                )

    def split(self, start: int, size: int) -> Iterator[tuple[torch.Tensor, slice]]:
        """Yield the parts of chunks that hold `size` bytes from `start` on.

        Each part is a uint8 view of a chunk, and comes with the slice of the tensor's bytes that it
        holds.
        """
        done = 0
        while done < size:
            number, offset = divmod(start + done, self.CHUNK)
            length = min(size - done, self.CHUNK - offset)
            yield self.chunks[number][offset : offset + length], slice(done, done + length)
            done += length


def find_arena(model: torch.nn.Module) -> HostArena:
    """Return the arena of a model's offloaded layer inputs; an empty one if none are offloaded."""
    return getattr(model, "host_arena", None) or HostArena()


def checkpoint_offloaded(
    function: Callable, *inputs: torch.Tensor, arena: HostArena | None = None
) -> torch.Tensor:
    """Call a layer like torch's checkpoint, but let its input wait in the host's memory.

    Args:
        function: The layer's forward.
        inputs: Its arguments.
        arena: The memory that the input waits in.

    Returns:
        The layer's output.
    """
    arena = arena or HostArena()
    # torch's checkpoint saves its tensor arguments under these hooks, and what the layer computes
    # under its own. transformers passes a layer its hidden states by position and the rest by name,
    # so the rest stays on the GPU inside `function`.
    with torch.autograd.graph.saved_tensors_hooks(arena.send, arena.fetch):
        return checkpoint(function, *inputs, use_reentrant=False)
