"""The transformers engine.

Requests run in packed forward passes, the head computes only the positions that are needed, and a
beginning that requests have in common is read once.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from medqlora.batches.plan import fit_bins
from medqlora.engines.interface import (
    Answer,
    EngineError,
    Request,
    Sampling,
    TextStream,
    decode_answer,
)
from medqlora.engines.packed_passes import (
    make_generation_config,
    pad_left,
    plain_generation,
    restrict_last_mlp,
    run_backbone,
    run_packed,
    watch_tokens,
)
from medqlora.engines.packed_requests import count_tokens, gather_logprobs, lay_out
from medqlora.model.agreement import TOLERANCE, choose_way
from medqlora.model.attention.packed_batch import find_device
from medqlora.model.attention.tree import locate_prefix_tree
from medqlora.model.base import unwrap
from medqlora.model.base_weights import describe_quantized
from medqlora.model.hardware import name_dtype
from medqlora.model.reference import find_dtype
from medqlora.model.rotation import find_short_length

# Reading a shorter common beginning again, in tokens, costs less than keeping its keys and values.
WORTH_SHARING = 32
# Another order of sums may change a log-probability by this many times the tolerance of logits.
NATS = 20


class HfEngine:
    """A transformers model, or a PEFT model around one, on one device."""

    name = "hf"

    def __init__(
        self,
        model: torch.nn.Module,
        backend: str,
        max_tokens: int | None = None,
        together: bool = False,
    ):
        """Check on the model itself that rows can be packed, and otherwise run each row alone.

        Args:
            model: the model, as load_base or load_adapter returns it.
            backend: the attention backend that load_base returned with the model.
            max_tokens: tokens per forward pass; by default as many as the device's free memory
                allows.
            together: whether all processes ask the same at the same time, because each holds only a
                part of every layer. Then none of them ends a generation before the others.

        Raises:
            AttentionError: the model's own attention and head give other logits, even on rows that
                run alone.
        """
        self.model = model
        self.together = together
        self.causal = unwrap(model)
        config = self.causal.config.get_text_config()
        # transformers notes in the config how it quantized the weights, or found them.
        # Its dtype is that of computing, where a strategy may hold the weights in another one.
        dtype = getattr(config, "dtype", None) or self.causal.dtype
        self.weights = describe_quantized(self.causal.config) or name_dtype(dtype)
        self.device = find_device(self.causal)
        self.tolerance = NATS * TOLERANCE[find_dtype(self.causal)]
        # XLNet has no limit and says -1.
        self.max_length = max(0, getattr(config, "max_position_embeddings", None) or 0) or None
        self.max_tokens = max_tokens or choose_budget(config, self.device)
        self.shared_ids: list[int] = []
        # These are keys and values by layer, [1, kv heads, shared tokens, width] each.
        self.shared_states: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        # Rows of more tokens are rotated by other factors in some models, and run alone.
        self.short_length = find_short_length(self.causal)
        self.backend, self.isolated = choose_way(model, backend, self.max_length or 1)
        if (self.backend, self.isolated) != (backend, True):
            rows = "packed" if self.isolated else "one at a time, which is slow"
            warnings.warn(
                f"attention {backend} does not compute packed rows as this model does; rows run"
                f" with {self.backend}, {rows}",
                stacklevel=2,
            )
        # A recipe scores the model that it trains, whose dropout must be off in these checks.
        self.model.eval()
        self.restricted = self.can_restrict()
        # Our own backends alone take a tree of segments.
        self.nested = self.backend in ("varlen", "grouped") and self.can_nest()
        self.sharing = self.nested

    # We do not use inference_mode, because torch would compile the model once more for its tensors.
    @torch.no_grad()
    def score(self, requests: Sequence[Request], shared: int = 0) -> list[list[float]]:
        """See interface.Engine.

        Every log-probability is known: an option of several tokens is scored token by token. On
        CUDA out-of-memory the work is divided into smaller passes.

        Raises:
            EngineError: a row is longer than the model's positions, or one request alone does not
                fit into memory.
        """
        # A recipe scores the model that it trains, whose dropout must be off here.
        self.model.eval()
        self.check_lengths(requests)
        scores: dict[int, list[float]] = {}
        packed = []
        for number, request in enumerate(requests):
            if self.isolated and not self.is_long(request):
                packed.append(number)
            else:
                scores[number] = self.score_alone(request)
        together = self.score_packed([requests[number] for number in packed], shared)
        scores |= dict(zip(packed, together, strict=True))
        return [scores[number] for number in range(len(requests))]

    def is_long(self, request: Request) -> bool:
        """Whether a row of a request has other rotary factors than short rows have."""
        # Options of one request may lie on both sides of the border, so they cannot share a prefix.
        longest = len(request.prefix) + max(map(len, request.options)) - 1
        return self.short_length is not None and longest > self.short_length

    def score_packed(self, requests: Sequence[Request], shared: int) -> list[list[float]]:
        """Score requests in packed forward passes; the arguments are those of `score`."""
        scores = [[0.0] * len(request.options) for request in requests]
        sharing = self.choose_sharing(requests, shared)
        # Requests that continue the common beginning run apart from the others, because a tree has
        # one prefix for all of its segments.
        for shares in (True, False):
            members = [number for number, value in enumerate(sharing) if value is shares]
            if not members:
                continue
            skip = shared if shares else 0
            sizes = np.array(
                [count_tokens(requests[number], skip, self.nested) for number in members],
                dtype=np.int64,
            )
            # A bin must hold the largest request, because fit_bins takes none over its capacity.
            capacity = max(self.max_tokens, int(sizes.max()))
            for indices in fit_bins(sizes, capacity):
                numbers = [members[index] for index in indices]
                pack_scores = self.score_pack([requests[number] for number in numbers], skip)
                for number, values in zip(numbers, pack_scores, strict=True):
                    scores[number] = values
        return scores

    def choose_sharing(self, requests: Sequence[Request], shared: int) -> list[bool]:
        """Return which requests continue the common beginning; it has been read for them then."""
        nothing_shared = [False] * len(requests)
        if not requests or not self.sharing or shared < WORTH_SHARING:
            return nothing_shared
        # A long question may have been cut from the left, so that it begins otherwise.
        beginnings = Counter(tuple(request.prefix[:shared]) for request in requests)
        common = list(beginnings.most_common(1)[0][0])
        # At least one token must be left to read, because its hidden state predicts the answer.
        sharing = [
            len(request.prefix) > shared and request.prefix[:shared] == common
            for request in requests
        ]
        if True not in sharing:
            return nothing_shared
        example = requests[sharing.index(True)]
        return sharing if self.read_shared(common, example) else nothing_shared

    def draw_request(self) -> Request:
        """Return a random request whose options have several tokens."""
        vocabulary = min(1_000, self.causal.config.get_text_config().vocab_size)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocabulary, (12,), generator=generator).tolist()
        return Request(ids[:7], [ids[7:9], ids[9:12]])

    @torch.no_grad()
    def can_restrict(self) -> bool:
        """Whether the last layer's MLP may run at the needed places only.

        On a random request the scores must be the same as those of all places.
        """
        request = self.draw_request()
        self.nested = self.restricted = False
        everywhere = np.array(self.run_pack([request], 0))
        self.restricted = True
        try:
            restricted = np.array(self.run_pack([request], 0))
        # An MLP that is routed by all tokens of the row does not run at some of them.
        except RuntimeError:
            return False
        return bool(abs(restricted - everywhere).max() <= self.tolerance)

    @torch.no_grad()
    def can_nest(self) -> bool:
        """Whether options may continue their question in segments of their own.

        On a random request the scores must be the same as those of repeated rows.
        """
        request = self.draw_request()
        self.nested = False
        repeated = np.array(self.run_pack([request], 0))
        self.nested = True
        nested = np.array(self.run_pack([request], 0))
        return bool(abs(nested - repeated).max() <= self.tolerance)

    def score_alone(self, request: Request) -> list[float]:
        """Score one request with one row per forward pass.

        One row serves all options of one token; each longer option has a row of its own.
        """
        single = [i for i, option in enumerate(request.options) if len(option) == 1]
        groups = [single] if single else []
        groups += [[i] for i, option in enumerate(request.options) if len(option) > 1]
        scores: dict[int, float] = {}
        for group in groups:
            options = [request.options[i] for i in group]
            (values,) = self.score_pack([Request(request.prefix, options)], 0)
            scores |= dict(zip(group, values, strict=True))
        return [scores[i] for i in range(len(request.options))]

    def check_lengths(self, requests: Sequence[Request]) -> None:
        """Raise EngineError for a request with a row that is longer than the model's positions."""
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
        """Read a common beginning once, and check on one request that this changes no score.

        Returns:
            Whether the beginning may be shared. Where it may not, a warning says so and nothing is
            shared from then on.
        """
        if ids == self.shared_ids:
            return True
        states: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        tree = locate_prefix_tree([len(ids)], [None], self.device, backend=self.backend)
        run_backbone(self.causal, [ids], [0], {"documents": replace(tree, record=states)})
        self.shared_ids = ids
        self.shared_states = states
        # A layer that does not come through the attention interface would ignore the shared keys
        # without a word.
        alone = self.run_pack([example], 0)
        after = self.run_pack([example], len(ids))
        error = abs(np.array(alone[0]) - np.array(after[0])).max()
        # This condition also holds for NaN, which `error > ...` would let pass.
        if not error <= self.tolerance:
            warnings.warn(
                f"reading the few-shot examples once changes a score by {error:.1e}; they are read"
                " with every question",
                stacklevel=5,
            )
            self.sharing = False
            self.shared_ids = []
            self.shared_states = {}
        return self.sharing

    def score_pack(self, requests: list[Request], shared: int) -> list[list[float]]:
        """Score requests in one forward pass; on CUDA out-of-memory in two passes of half the size.

        The token budget is halved then, for all later packs.
        """
        try:
            return self.run_pack(requests, shared)
        except torch.OutOfMemoryError:
            if len(requests) == 1:
                raise EngineError(
                    f"out of memory on one question of {len(requests[0].prefix)} tokens; use a"
                    " smaller dtype, as nf4"
                ) from None
        # The passes below stand outside the except clause: until that has ended, the error holds
        # the tensors of the failed pass.
        torch.cuda.empty_cache()
        self.max_tokens = max(1, self.max_tokens // 2)
        middle = len(requests) // 2
        first = self.score_pack(requests[:middle], shared)
        return first + self.score_pack(requests[middle:], shared)

    def run_pack(self, requests: list[Request], shared: int) -> list[list[float]]:
        """Score requests in one forward pass, after a common beginning of `shared` tokens."""
        segments, parents, starts, targets = lay_out(requests, shared, self.nested)
        lengths = [len(segment) for segment in segments]
        # Both are int64 [targets].
        places = torch.tensor([target.place for target in targets], device=self.device)
        tokens = torch.tensor([target.token for target in targets], device=self.device)
        # The hidden states of all places are computed where the last MLP cannot be restricted.
        with restrict_last_mlp(self.causal, places.unique()) if self.restricted else nullcontext():
            if shared or any(parent is not None for parent in parents):
                states = self.shared_states if shared else None
                tree = locate_prefix_tree(
                    lengths, parents, self.device, states, shared, self.backend
                )
                hidden = run_backbone(self.causal, segments, starts, {"documents": tree})
            else:
                hidden = run_packed(self.causal, self.backend, segments)
        scores = [[0.0] * len(request.options) for request in requests]
        values = gather_logprobs(self.causal, hidden, places, tokens)
        for target, value in zip(targets, values, strict=True):
            scores[target.request][target.option] += value
        return scores

    @torch.no_grad()
    def generate(self, prefixes: Sequence[list[int]], sampling: Sampling) -> list[list[Answer]]:
        """See interface.Engine.

        Rows of like length run together, padded on the left. Sampled answers depend on the seed and
        on everything else that the same call generates.

        Raises:
            EngineError: a prompt with its answer is longer than the model's positions, or one
                prompt alone does not fit into memory.
        """
        self.model.eval()
        longest = max(map(len, prefixes)) + sampling.max_new_tokens
        self.check_room(longest)
        config = make_generation_config(sampling)
        answers: list[list[Answer]] = [[] for _ in prefixes]
        # The longest prompts come first: pad_left relies on it, and memory runs out early if at
        # all.
        order = sorted(range(len(prefixes)), key=lambda i: -len(prefixes[i]))
        # transformers repeats each prompt `samples` times, so a call has rows * samples rows.
        rows = max(1, self.max_tokens // (longest * sampling.samples))
        # transformers chooses the rotary factors of all rows by the longest one of them.
        limit = self.short_length or longest
        # The seed is set once, so that later groups of rows continue the draws of the first.
        torch.manual_seed(sampling.seed)
        with plain_generation(self.causal):
            while order:
                alone = len(prefixes[order[0]]) + sampling.max_new_tokens > limit
                chosen = order[: 1 if alone else rows]
                ids, mask = pad_left([prefixes[number] for number in chosen], sampling.stop_ids[0])
                width = ids.shape[1]
                try:
                    out = self.causal.generate(
                        input_ids=ids.to(self.device),
                        attention_mask=mask.to(self.device),
                        generation_config=config,
                        synced_gpus=self.together,
                    )
                except torch.OutOfMemoryError:
                    out = None
                # This stands outside the except clause: until that has ended, the error holds the
                # tensors of the failed call.
                if out is None:
                    if rows == 1:
                        raise EngineError(
                            f"out of memory on one answer to {width} tokens; lower --samples, or"
                            " use a smaller dtype, as nf4"
                        )
                    rows //= 2
                    torch.cuda.empty_cache()
                    continue
                # `out` is int64 [prompts * samples, width + new tokens]; a prompt's samples are
                # adjacent.
                order = order[len(chosen) :]
                for row, tokens in enumerate(out[:, width:].tolist()):
                    answers[chosen[row // sampling.samples]].append(decode_answer(tokens, sampling))
        return answers

    def check_room(self, tokens: int) -> None:
        """Raise EngineError where a prompt and its answer need more tokens than the model has."""
        if self.max_length is not None and tokens > self.max_length:
            raise EngineError(
                f"a prompt and its answer need {tokens} tokens, the model has {self.max_length}"
                " positions; lower --max_new_tokens"
            )

    @torch.no_grad()
    def stream(self, prefix: list[int], sampling: Sampling, show: Callable[[str], None]) -> Answer:
        """See interface.Engine.

        Raises:
            EngineError: the prompt with its answer is longer than the model's positions, or does
                not fit into memory.
        """
        self.model.eval()
        self.check_room(len(prefix) + sampling.max_new_tokens)
        answer = TextStream(sampling, show)
        torch.manual_seed(sampling.seed)
        ids = torch.tensor([prefix], device=self.device)  # int64 [1, tokens]
        try:
            with plain_generation(self.causal):
                self.causal.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=make_generation_config(sampling),
                    streamer=watch_tokens(answer.add),
                )
        except torch.OutOfMemoryError:
            raise EngineError(
                f"out of memory on one answer to {len(prefix)} tokens; use a smaller dtype, as nf4"
            ) from None
        return answer.finish()


def choose_budget(config: Any, device: torch.device) -> int:
    """Return how many tokens a forward pass may have.

    On CUDA they are those whose activations of one layer fill 0.4 of the free memory. A token is
    counted as eight vectors of the hidden size and three of the intermediate size, in float32. A
    CPU gains nothing from more than 2,048 tokens.
    """
    if device.type != "cuda":
        return 2_048
    free_bytes, _ = torch.cuda.mem_get_info(device)
    intermediate = getattr(config, "intermediate_size", 4 * config.hidden_size)
    bytes_per_token = 4 * (8 * config.hidden_size + 3 * intermediate)
    return int(np.clip(0.4 * free_bytes / bytes_per_token, 2_048, 131_072))
