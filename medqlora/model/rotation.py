"""Rotary embeddings whose factors follow the longest row, computed for each row by itself.

LongRoPE (Ding et al., 2024, arXiv 2402.13753) has factors for short and for long rows, and dynamic
scaling has factors for every length. transformers chooses them by the largest position of a batch,
so one long row would change how its short neighbours are computed.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from medqlora.model.attention.backends import AttentionError

LENGTH_DEPENDENT = ("longrope", "dynamic")
ROW = 8  # the tokens of the rows that prove_rotation compares
# The largest difference of a cosine or sine, which rounding may cause.
TOLERANCE = 1e-6


def list_variants(module: torch.nn.Module) -> dict[str | None, dict[str, Any]]:
    """Return the rotary parameters of a module by layer type.

    Most modules have one set of parameters, for the layer type None. A module without rotary
    parameters has none.
    """
    kinds = getattr(module, "rope_type", None)
    parameters = getattr(getattr(module, "config", None), "rope_parameters", None)
    if isinstance(kinds, str) and isinstance(parameters, dict):
        return {None: parameters}
    if isinstance(kinds, dict) and isinstance(parameters, dict):
        return {kind: parameters[kind] for kind in kinds if isinstance(parameters.get(kind), dict)}
    return {}


def read_short_length(module: torch.nn.Module, layer_type: str | None = None) -> int | None:
    """Return the length of the longest row that has a rotary module's factors for short rows.

    Returns:
        The number of tokens, or None where the factors do not depend on the row's length.
    """
    parameters = list_variants(module).get(layer_type)
    if parameters is None or parameters.get("rope_type") not in LENGTH_DEPENDENT:
        return None
    # Dynamic scaling begins where the model's own positions end.
    longest = getattr(module, "original_max_seq_len", None)
    if parameters["rope_type"] == "longrope":
        longest = parameters.get("original_max_position_embeddings", longest)
    return longest


def find_short_length(model: torch.nn.Module) -> int | None:
    """Return the smallest read_short_length in a model, or None where it has none."""
    lengths = [
        read_short_length(module, layer_type)
        for module in model.modules()
        for layer_type in list_variants(module)
    ]
    return min((length for length in lengths if length is not None), default=None)


def forward_rotary(
    module: torch.nn.Module,
    x: torch.Tensor,
    position_ids: torch.Tensor,
    layer_type: str | None = None,
) -> tuple[torch.Tensor, ...]:
    """Replace the forward of a rotary module: each document gets the factors that it has alone.

    Args:
        module: The rotary module.
        x: Any tensor of the dtype and device of the result.
        position_ids: int64 [rows, tokens]. A document begins where a position does not follow the
            one before it.
        layer_type: The layer type, where the module has parameters for several.

    Returns:
        What the upstream method returns, usually cosine and sine [rows, tokens, width].
    """
    keywords = {} if layer_type is None else {"layer_type": layer_type}

    def rotate(positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return type(module).forward(module, x, positions, **keywords)

    short = read_short_length(module, layer_type)
    # On the meta device positions have no values; a forecast asks for shapes alone.
    if short is None or position_ids.is_meta or int(position_ids.max()) + 1 < short:
        return rotate(position_ids)
    rows = []
    for row in position_ids:  # int64 [tokens]
        begins = (row.diff() != 1).nonzero().flatten() + 1
        parts = []
        for document in row.tensor_split(begins.cpu()):
            # Dynamic scaling keeps the factors of the longest row so far until a short one comes.
            rotate(document.new_zeros((1, 1)))
            parts.append(rotate(document[None]))
        rows.append(tuple(torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True)))
    return tuple(torch.cat(tensors) for tensors in zip(*rows, strict=True))


def prove_rotation(model: torch.nn.Module, longest: int) -> None:
    """Prove that no document's rotation depends on the others in its pack.

    A short document and the last tokens of a long one are rotated packed and alone. The model does
    not run.

    Args:
        model: The model.
        longest: The length of the longest row, in tokens.

    Raises:
        AttentionError: A cosine or a sine differs.
    """
    if longest <= ROW:
        return
    short = torch.arange(ROW)
    # Factors follow the largest position, so the last tokens stand for the whole document.
    long = torch.arange(max(ROW, longest - ROW), longest)
    for module in model.modules():
        parameters = inspect.signature(module.forward).parameters
        for layer_type in list_variants(module):
            if "position_ids" not in parameters:
                continue
            keywords = {} if layer_type is None else {"layer_type": layer_type}
            device = next(module.buffers()).device
            found = []
            # The packed documents come last, after the state that rows alone have left.
            for positions in (short, long, torch.cat((short, long, short))):
                x = torch.zeros((1, len(positions), 1), device=device)
                out = module(x, position_ids=positions[None].to(device), **keywords)
                found.append(out if isinstance(out, tuple) else (out,))
            for first, second, packed in zip(*found, strict=True):
                alone = torch.cat((first, second, first), dim=1)
                difference = float((packed - alone).abs().max())
                # This condition also holds for NaN.
                if not difference <= TOLERANCE:
                    raise AttentionError(
                        f"{type(module).__name__} rotates a row of {ROW} tokens otherwise beside a"
                        f" row of {longest} than alone (difference {difference:.1e}, allowed"
                        f" {TOLERANCE:.0e}); set --data.packing false, or a maximum length of"
                        f" {find_short_length(model)} tokens or less"
                    )
