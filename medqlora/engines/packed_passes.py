"""Forward passes over packed rows, and the settings under which transformers generates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from medqlora.engines.interface import Sampling
from medqlora.model.attention.backends import set_attention
from medqlora.model.attention.packed_batch import find_device, packing_arguments
from medqlora.model.base import backbone_of, compute_hidden


def run_packed(causal: torch.nn.Module, backend: str, documents: list[list[int]]) -> torch.Tensor:
    """Run the model without its head on several documents in one packed forward pass.

    Args:
        causal: a transformers causal LM.
        backend: its attention backend.
        documents: the token ids of each.

    Returns:
        Hidden states in the model's dtype, [tokens of all documents, hidden].
    """
    lengths = [len(document) for document in documents]
    batch = {
        # Variable-length kernels take these offsets as int32, [documents + 1].
        "cu_seqlens": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        "max_seqlen": max(lengths),
    }
    packing = packing_arguments(backend, batch, find_device(causal))
    return run_backbone(causal, documents, [0] * len(documents), packing)


def run_backbone(
    causal: torch.nn.Module, segments: list[list[int]], starts: list[int], packing: dict[str, Any]
) -> torch.Tensor:
    """Run the model without its head on segments that stand side by side in one row.

    Args:
        causal: a transformers causal LM.
        segments: the token ids of each segment.
        starts: the position of each segment's first token.
        packing: arguments of the attention that tell it where the segments are.

    Returns:
        Hidden states in the model's dtype, [tokens of all segments, hidden].
    """
    device = find_device(causal)
    # int64 [tokens]
    ids = torch.tensor([i for segment in segments for i in segment], device=device)
    # Positions count within a document and not over the packed row.
    positions = [
        torch.arange(start, start + len(segment))
        for start, segment in zip(starts, segments, strict=True)
    ]
    position_ids = torch.cat(positions).to(device)  # int64 [tokens]
    return compute_hidden(causal, ids[None], position_ids[None], **packing)[0]


@contextmanager
def restrict_last_mlp(causal: torch.nn.Module, places: torch.Tensor) -> Iterator[None]:
    """Run the last layer's MLP at `places` only, and let its output be zero elsewhere.

    Nothing after the last attention mixes positions, so the other ones are not needed. This saves a
    layer's MLP, 6 to 9 % of a pass through a model of 8 to 13 layers. A layer without an `mlp` is
    left as it is.

    Args:
        causal: a transformers causal LM.
        places: positions in the packed row, int64 [places].
    """
    layers = getattr(backbone_of(causal), "layers", None)
    mlp = None
    if isinstance(layers, torch.nn.ModuleList):
        mlp = getattr(layers[-1], "mlp", None)
    if not isinstance(mlp, torch.nn.Module):
        yield
        return
    all_inputs: list[torch.Tensor] = []  # The only element is [1, tokens, hidden].

    def select_places(module: torch.nn.Module, inputs: tuple) -> tuple:
        """Keep the MLP's input, and let it run at the places only."""
        all_inputs[:] = inputs
        return (inputs[0][:, places],)  # [1, places, hidden]

    def restore_places(module: torch.nn.Module, inputs: tuple, out: Any) -> Any:
        """Put the MLP's output back to the places, with zeros elsewhere."""
        # An output of another form, such as a tuple with a router's choice, is made for all tokens.
        if not isinstance(out, torch.Tensor):
            # The module itself would run these hooks again.
            return module.forward(*all_inputs)
        # Hidden states elsewhere lack this MLP's part from here on and must not be read.
        return torch.zeros_like(all_inputs[0]).index_copy(1, places, out)

    hooks = (
        mlp.register_forward_pre_hook(select_places),
        mlp.register_forward_hook(restore_places),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def make_generation_config(sampling: Sampling) -> GenerationConfig:
    """Return transformers' settings for `sampling`; temperature 0 is greedy."""
    drawing = {}
    if sampling.temperature > 0:
        drawing = {
            "do_sample": True,
            "temperature": sampling.temperature,
            # These two values switch the filters off, so the whole distribution is drawn from.
            "top_k": 0,
            "top_p": 1.0,
        }
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=list(sampling.stop_ids),
        # Rows that end early are filled with a stop token, at which decode_answer cuts.
        pad_token_id=sampling.stop_ids[0],
        num_return_sequences=sampling.samples,
        **drawing,
    )


def watch_tokens(see: Callable[[list[int]], None]) -> BaseStreamer:
    """Return what transformers tells each new token of one answer; `see` gets its id."""

    class Watcher(BaseStreamer):
        prompt = True

        def put(self, value: torch.Tensor) -> None:
            """Take the prompt, which comes first, or the next token."""
            if not self.prompt:
                see(value.flatten().tolist())
            self.prompt = False

        def end(self) -> None:
            """Take the end of the answer, which says nothing new."""

    return Watcher()


def pad_left(rows: list[list[int]], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and attention mask, int64 [rows, width]; the first row is the longest."""
    # New tokens are appended at the right, so each prompt's last token must stand there.
    width = len(rows[0])
    ids = torch.full((len(rows), width), padding)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, width - len(row) :] = torch.tensor(row)
        mask[number, width - len(row) :] = 1
    return ids, mask


def own_attention(causal: torch.nn.Module) -> str:
    """Return the name of an attention function of transformers that this model can use."""
    softcap = getattr(causal.config.get_text_config(), "attn_logit_softcapping", None)
    # The sdpa function does not support a softcap of the attention's logits.
    if softcap is not None or not getattr(causal, "_supports_sdpa", True):
        return "eager"
    return "sdpa"


@contextmanager
def plain_generation(causal: torch.nn.Module) -> Iterator[None]:
    """Generate with an attention function of transformers and without the model's own settings.

    Our attention backends do not take left padding. Settings that a model brings along, such as a
    repetition penalty or top-p, would be added to ours, and two engines would disagree.
    """
    attention = causal.config._attn_implementation
    settings = causal.generation_config
    set_attention(causal, own_attention(causal))
    causal.generation_config = GenerationConfig()
    try:
        yield
    finally:
        set_attention(causal, attention)
        causal.generation_config = settings
