"""The transformers engine: packed forward passes, head at the needed positions only, shared
beginnings read once.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from medqlora.batches.plan import fit_bins
from medqlora.engines.interface import EngineError, Request, Sampling, decode_answer
from medqlora.model.attention.backends import AttentionError
from medqlora.model.attention.packed_batch import find_device, packing_arguments, verify_isolation
from medqlora.model.attention.tree import locate_prefix_tree
from medqlora.model.base import backbone_of, unwrap
from medqlora.model.head_loss import compute_logits

HEAD_ROWS = 128  # positions per call of the head: bounds the logits to 128 x vocabulary
# tokens; below this, reading a common beginning again costs less than keeping it
WORTH_SHARING = 32
# relative, of one layer order against another
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


class HfEngine:
    """A transformers model, or a PEFT model around one, on one device."""

    name = "hf"

    def __init__(self, model: torch.nn.Module, backend: str, max_tokens: int | None = None):
        """backend: of models.load_base; max_tokens: tokens per forward pass (None: by the device's
        free memory).
        """
        self.model, self.causal, self.backend = model, unwrap(model), backend
        config = self.causal.config.get_text_config()
        self.device = find_device(self.causal)
        self.max_length = getattr(config, "max_position_embeddings", None)
        self.max_tokens = max_tokens or choose_budget(config, self.device)
        self.shared_ids: list[int] = []
        self.shared_states: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.isolated = True
        try:
            verify_isolation(
                backbone_of(self.causal),
                backend,
                config.vocab_size,
                TOLERANCE.get(self.causal.dtype, 6e-2),
            )
        except AttentionError:
            warnings.warn(
                "this model's attention mixes packed rows; each row runs alone, which is slow",
                stacklevel=2,
            )
            self.backend = "sdpa"
            self.isolated = False
            self.causal.set_attn_implementation(own_attention(self.causal))
        self.nested = self.sharing = self.backend in ("varlen", "grouped") and self.can_nest()

    # We do not use inference_mode, because compiled pieces would be made once more for its tensors.
    @torch.no_grad()
    def score(self, requests: Sequence[Request], shared: int = 0) -> list[list[float]]:
        """See interface.Engine. Every value is known: options of several tokens are scored as
        continuations.

        Raises:
            EngineError: a row longer than the model's positions.
        """
        self.model.eval()
        self.check_lengths(requests)
        if not self.isolated:
            return [self.score_alone(request) for request in requests]
        scores = [[0.0] * len(request.options) for request in requests]
        # a long question may have been cut from the left
        beginnings = Counter(tuple(request.prefix[:shared]) for request in requests)
        common = list(beginnings.most_common(1)[0][0]) if requests else []
        sharing = [False] * len(requests)
        if self.sharing and shared >= WORTH_SHARING:
            sharing = [
                len(request.prefix) > shared and request.prefix[:shared] == common
                for request in requests
            ]
            first = next(
                (request for request, shares in zip(requests, sharing, strict=True) if shares), None
            )
            if first is not None and not self.read_shared(common, first):
                sharing = [False] * len(requests)
        for shares in (True, False):
            members = [i for i, value in enumerate(sharing) if value is shares]
            skip = shared if shares else 0
            sizes = np.array(
                [count_tokens(requests[i], skip, self.nested) for i in members], dtype=np.int64
            )
            for chosen in (
                fit_bins(sizes, max(self.max_tokens, int(sizes.max()))) if members else []
            ):
                numbers = [members[i] for i in chosen]
                for number, values in zip(
                    numbers, self.score_pack([requests[i] for i in numbers], skip), strict=True
                ):
                    scores[number] = values
        return scores

    @torch.no_grad()
    def can_nest(self) -> bool:
        """Whether options may continue their question in segments of their own: the same scores as
        in repeated rows.
        """
        draw = torch.randint(
            min(1_000, self.causal.config.get_text_config().vocab_size),
            (12,),
            generator=torch.Generator().manual_seed(0),
        ).tolist()
        request = Request(draw[:7], [draw[7:9], draw[9:12]])
        self.nested = False
        repeated = self.run_pack([request], 0)
        self.nested = True
        return bool(
            abs(np.array(self.run_pack([request], 0)) - np.array(repeated)).max()
            <= 20 * TOLERANCE.get(self.causal.dtype, 6e-2)
        )

    def score_alone(self, request: Request) -> list[float]:
        """One row per forward pass: the prompt for all options of one token, a row of its own for
        each longer one.
        """
        single = [i for i, option in enumerate(request.options) if len(option) == 1]
        groups = ([single] if single else []) + [
            [i] for i, option in enumerate(request.options) if len(option) > 1
        ]
        found = {}
        for group in groups:
            (values,) = self.run_pack(
                [Request(request.prefix, [request.options[i] for i in group])], 0
            )
            found |= dict(zip(group, values, strict=True))
        return [found[i] for i in range(len(request.options))]

    def check_lengths(self, requests: Sequence[Request]) -> None:
        if self.max_length is None:
            return
        for number, request in enumerate(requests):
            length = len(request.prefix) + max(len(option) for option in request.options) - 1
            if length > self.max_length:
                raise EngineError(
                    f"question {number + 1} has {length} tokens, the model {self.max_length}"
                    " positions; shorten its context"
                )

    def read_shared(self, ids: list[int], example: Request) -> bool:
        """Read a common beginning once, and check on one request that this changes nothing; False
        where it does.
        """
        if ids == self.shared_ids:
            return True
        states: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        branches = replace(
            locate_prefix_tree([len(ids)], [None], self.device, backend=self.backend), record=states
        )
        run_backbone(self.causal, [ids], [0], {"documents": branches})
        self.shared_ids = ids
        self.shared_states = states
        alone = self.run_pack([example], 0)
        after = self.run_pack([example], len(ids))
        error = abs(np.array(alone[0]) - np.array(after[0])).max()
        if not error <= 20 * TOLERANCE.get(self.causal.dtype, 6e-2):  # also true for NaN
            warnings.warn(
                f"reading the few-shot examples once changes a score by {error:.1e}; they are read"
                " with every question",
                stacklevel=3,
            )
            self.sharing = False
            self.shared_ids = []
            self.shared_states = {}
        return self.sharing

    def score_pack(self, requests: list[Request], shared: int) -> list[list[float]]:
        """One forward pass; on CUDA out-of-memory two of half the size, and a smaller budget from
        then on.
        """
        try:
            return self.run_pack(requests, shared)
        except torch.OutOfMemoryError:
            if len(requests) == 1:
                raise EngineError(
                    f"out of memory on one question of {len(requests[0].prefix)} tokens; use a"
                    " smaller dtype, as nf4"
                ) from None
        torch.cuda.empty_cache()
        self.max_tokens = max(1, self.max_tokens // 2)
        middle = len(requests) // 2
        return self.score_pack(requests[:middle], shared) + self.score_pack(
            requests[middle:], shared
        )

    def run_pack(self, requests: list[Request], shared: int) -> list[list[float]]:
        segments, parents, starts, asked = lay_out(requests, shared, self.nested)
        lengths = [len(segment) for segment in segments]
        places, tokens = (
            torch.tensor(values, device=self.device)
            for values in zip(*(pair[:2] for pair in asked), strict=True)
        )
        with restrict_last_mlp(self.causal, places.unique()):
            if shared or any(parent is not None for parent in parents):
                states = self.shared_states if shared else None
                branches = locate_prefix_tree(
                    lengths, parents, self.device, states, shared, self.backend
                )
                hidden = run_backbone(self.causal, segments, starts, {"documents": branches})
            else:
                hidden = run_packed(self.causal, self.backend, segments)
        scores = [[0.0] * len(request.options) for request in requests]
        for (_, _, number, option), value in zip(
            asked, gather_logprobs(self.causal, hidden, places, tokens), strict=True
        ):
            scores[number][option] += value
        return scores

    @torch.no_grad()
    def generate(self, prefixes: Sequence[list[int]], sampling: Sampling) -> list[list[str]]:
        """See interface.Engine. Batches are padded on the left, rows of like length together;
        sampled answers depend on the seed and on what is generated in the same call."""
        self.model.eval()
        longest = max(map(len, prefixes)) + sampling.max_new_tokens
        if self.max_length is not None and longest > self.max_length:
            raise EngineError(
                f"a prompt and its answer need {longest} tokens, the model has {self.max_length}"
                " positions; lower --max_new_tokens"
            )
        drawing = (
            {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
            if sampling.temperature > 0
            else {}
        )
        config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=list(sampling.stop_ids),
            pad_token_id=sampling.stop_ids[0],
            num_return_sequences=sampling.samples,
            **drawing,
        )
        answers: list[list[str]] = [[] for _ in prefixes]
        order = sorted(range(len(prefixes)), key=lambda i: -len(prefixes[i]))
        rows = max(1, self.max_tokens // (longest * sampling.samples))
        torch.manual_seed(sampling.seed)
        with plain_generation(self.causal):
            while order:
                chosen = order[:rows]
                width = len(prefixes[chosen[0]])
                ids = torch.full((len(chosen), width), sampling.stop_ids[0])
                mask = torch.zeros_like(ids)
                for row, number in enumerate(chosen):
                    ids[row, width - len(prefixes[number]) :] = torch.tensor(prefixes[number])
                    mask[row, width - len(prefixes[number]) :] = 1
                try:
                    out = self.causal.generate(
                        input_ids=ids.to(self.device),
                        attention_mask=mask.to(self.device),
                        generation_config=config,
                    )
                except torch.OutOfMemoryError:
                    out = None
                # Not in the except clause: until that has ended, the error holds the tensors of the
                # failed call.
                if out is None:
                    if rows == 1:
                        raise EngineError(
                            f"out of memory on one answer to {width} tokens; lower --samples, or"
                            " use a smaller dtype, as nf4"
                        )
                    rows //= 2
                    torch.cuda.empty_cache()
                    continue
                order = order[rows:]
                for row, tokens in enumerate(out[:, width:].tolist()):
                    answers[chosen[row // sampling.samples]].append(decode_answer(tokens, sampling))
        return answers


def run_packed(causal: torch.nn.Module, backend: str, documents: list[list[int]]) -> torch.Tensor:
    """Hidden states [tokens, hidden] of several documents in one packed forward."""
    lengths = [len(document) for document in documents]
    batch = {
        "cu_seqlens": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        "max_seqlen": max(lengths),
    }
    packing = packing_arguments(backend, batch, find_device(causal))
    return run_backbone(causal, documents, [0] * len(documents), packing)


def run_backbone(
    causal: torch.nn.Module, segments: list[list[int]], starts: list[int], packing: dict[str, Any]
) -> torch.Tensor:
    """Segments whose first tokens stand at positions `starts`, side by side -> hidden states
    [tokens, hidden].
    """
    device = find_device(causal)
    ids = torch.tensor([i for segment in segments for i in segment], device=device)
    position_ids = torch.cat(
        [torch.arange(start, start + len(s)) for start, s in zip(starts, segments, strict=True)]
    ).to(device)
    return backbone_of(causal)(
        input_ids=ids[None],
        position_ids=position_ids[None],
        attention_mask=None,
        use_cache=False,
        **packing,
    ).last_hidden_state[0]


@contextmanager
def restrict_last_mlp(causal: torch.nn.Module, places: torch.Tensor):
    """What follows the last layer's attention is needed at `places` only: its MLP runs there, and
    is zero elsewhere.

    Saves a layer's MLP, 6 to 9 % of a pass through a model of 8 to 13 layers. A layer without an
    `mlp` is left as it is.
    """
    layers = getattr(backbone_of(causal), "layers", None)
    mlp = getattr(layers[-1], "mlp", None) if isinstance(layers, torch.nn.ModuleList) else None
    if not isinstance(mlp, torch.nn.Module):
        yield
        return
    whole: list[torch.Tensor] = []

    def cut(module: torch.nn.Module, inputs: tuple) -> tuple:
        whole[:] = inputs  # [1, tokens, hidden]
        return (inputs[0][:, places],)

    def spread(module: torch.nn.Module, inputs: tuple, out: Any) -> Any:
        if not isinstance(out, torch.Tensor):
            return module.forward(*whole)
        return torch.zeros_like(whole[0]).index_copy(1, places, out)

    hooks = (mlp.register_forward_pre_hook(cut), mlp.register_forward_hook(spread))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def choose_budget(config, device: torch.device) -> int:
    """Tokens per forward pass. On CUDA what free memory holds of one layer's activations, float32,
    eight hidden and three intermediate widths wide; a CPU gains nothing beyond two thousand."""
    if device.type != "cuda":
        return 2_048
    free, _ = torch.cuda.mem_get_info(device)
    per_token = 4 * (
        8 * config.hidden_size + 3 * getattr(config, "intermediate_size", 4 * config.hidden_size)
    )
    return int(np.clip(0.4 * free / per_token, 2_048, 131_072))


def count_tokens(request: Request, shared: int, nested: bool) -> int:
    """Tokens that `lay_out` makes of a request."""
    longer = [len(option) - 1 for option in request.options if len(option) > 1]
    if nested:
        return len(request.prefix) - shared + sum(longer)
    single = len(request.options) > len(longer)
    return single * len(request.prefix) + sum(len(request.prefix) + extra for extra in longer)


def lay_out(
    requests: list[Request], shared: int, nested: bool
) -> tuple[list[list[int]], list[int | None], list[int], list[tuple]]:
    """Requests -> segments of one packed row.

    A prefix is one segment; an option of several tokens continues it in a segment of its own (its
    last token is never read), or, where segments cannot be `nested`, in a repeated row.

    Returns: ids of each segment; the segment that it continues; its first position; and for every
        token asked for (place in the packed row of the position before it, token id, number of the
        request, option).
    """
    segments: list[list[int]] = []
    parents: list[int | None] = []
    starts: list[int] = []
    asked: list[tuple[int, int, int, int]] = []
    total = 0

    def add(ids: list[int], parent: int | None, start: int) -> int:
        nonlocal total
        segments.append(ids)
        parents.append(parent)
        starts.append(start)
        total += len(ids)
        return total - 1  # place of its last token

    for number, request in enumerate(requests):
        single = [i for i, option in enumerate(request.options) if len(option) == 1]
        end = parent = None
        if nested or single:
            end = add(request.prefix[shared:], None, shared)
            parent = len(segments) - 1
            asked += [(end, request.options[i][0], number, i) for i in single]
        for i, option in enumerate(request.options):
            if len(option) > 1 and nested:
                place = add(option[:-1], parent, len(request.prefix))
                asked.append((end, option[0], number, i))
                asked += [
                    (place - len(option) + 1 + at, token, number, i)
                    for at, token in enumerate(option)
                    if at
                ]
            elif len(option) > 1:
                place = add(request.prefix + option[:-1], None, 0)
                asked += [
                    (place - len(option) + 1 + at, token, number, i)
                    for at, token in enumerate(option)
                ]
    return segments, parents, starts, asked


def gather_logprobs(
    causal: torch.nn.Module, hidden: torch.Tensor, places: torch.Tensor, tokens: torch.Tensor
) -> list[float]:
    """Log-probability of token [pairs] after place [pairs] of hidden [tokens, hidden]; each place
    is multiplied once.
    """
    unique, inverse = torch.unique(places, return_inverse=True)
    values = torch.empty(len(tokens), dtype=torch.float32, device=hidden.device)
    for start in range(0, len(unique), HEAD_ROWS):
        # [places, vocab]
        logits = compute_logits(causal, hidden[unique[start : start + HEAD_ROWS]])
        here = ((inverse >= start) & (inverse < start + HEAD_ROWS)).nonzero().flatten()
        rows = inverse[here] - start
        values[here] = logits[rows, tokens[here]] - logits.logsumexp(-1)[rows]
    return values.tolist()


def own_attention(causal: torch.nn.Module) -> str:
    """One of transformers' own attention functions that this model can use."""
    soft = getattr(causal.config.get_text_config(), "attn_logit_softcapping", None) is not None
    return "eager" if soft or not getattr(causal, "_supports_sdpa", True) else "sdpa"


@contextmanager
def plain_generation(causal: torch.nn.Module):
    """Generation pads on the left, which needs one of transformers' own attention functions; and
    what the model's own generation settings add to ours (repetition penalty, top-p) would make two
    engines disagree."""
    attention = causal.config._attn_implementation
    settings = causal.generation_config
    causal.set_attn_implementation(own_attention(causal))
    causal.generation_config = GenerationConfig()
    try:
        yield
    finally:
        causal.set_attn_implementation(attention)
        causal.generation_config = settings
