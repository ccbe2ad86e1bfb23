"""The transformers engine.

Requests run in packed forward passes, the head computes only the positions that are needed, and a
beginning that requests have in common is read once.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

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

# The head computes this many positions at a time, which bounds the memory of the logits.
HEAD_ROWS = 128
# Reading a shorter common beginning again, in tokens, costs less than keeping its keys and values.
WORTH_SHARING = 32
# The largest relative difference that packing may make in hidden states, because it changes the
# order of sums. A log-probability may change by 20 times this number of nats.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


class HfEngine:
    """A transformers model, or a PEFT model around one, on one device."""

    name = "hf"

    def __init__(self, model: torch.nn.Module, backend: str, max_tokens: int | None = None):
        """Check on the model itself that rows can be packed, and otherwise run each row alone.

        Args:
            model: the model, as load_base or load_adapter returns it.
            backend: the attention backend that load_base returned with the model.
            max_tokens: tokens per forward pass; by default as many as the device's free memory
                allows.
        """
        self.model = model
        self.causal = unwrap(model)
        self.backend = backend
        config = self.causal.config.get_text_config()
        self.device = find_device(self.causal)
        self.tolerance = TOLERANCE.get(self.causal.dtype, 6e-2)
        self.max_length = getattr(config, "max_position_embeddings", None)
        self.max_tokens = max_tokens or choose_budget(config, self.device)
        self.shared_ids: list[int] = []
        # These are keys and values by layer, [1, kv heads, shared tokens, width] each.
        self.shared_states: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.isolated = True
        try:
            verify_isolation(backbone_of(self.causal), backend, config.vocab_size, self.tolerance)
        except AttentionError:
            warnings.warn(
                "this model's attention mixes packed rows; each row runs alone, which is slow",
                stacklevel=2,
            )
            # Each pass has one row from here on, so plain causal attention is right.
            self.backend = "sdpa"
            self.isolated = False
            self.causal.set_attn_implementation(own_attention(self.causal))
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
        if not self.isolated:
            return [self.score_alone(request) for request in requests]
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

    @torch.no_grad()
    def can_nest(self) -> bool:
        """Whether options may continue their question in segments of their own.

        On a random request the scores must be the same as those of repeated rows.
        """
        vocabulary = min(1_000, self.causal.config.get_text_config().vocab_size)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocabulary, (12,), generator=generator).tolist()
        request = Request(ids[:7], [ids[7:9], ids[9:12]])
        self.nested = False
        repeated = np.array(self.run_pack([request], 0))
        self.nested = True
        nested = np.array(self.run_pack([request], 0))
        return bool(abs(nested - repeated).max() <= 20 * self.tolerance)

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
            (values,) = self.run_pack([Request(request.prefix, options)], 0)
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
        if not error <= 20 * self.tolerance:
            warnings.warn(
                f"reading the few-shot examples once changes a score by {error:.1e}; they are read"
                " with every question",
                stacklevel=4,
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
        with restrict_last_mlp(self.causal, places.unique()):
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
    def generate(self, prefixes: Sequence[list[int]], sampling: Sampling) -> list[list[str]]:
        """See interface.Engine.

        Rows of like length run together, padded on the left. Sampled answers depend on the seed and
        on everything else that the same call generates.

        Raises:
            EngineError: a prompt with its answer is longer than the model's positions, or one
                prompt alone does not fit into memory.
        """
        self.model.eval()
        longest = max(map(len, prefixes)) + sampling.max_new_tokens
        if self.max_length is not None and longest > self.max_length:
            raise EngineError(
                f"a prompt and its answer need {longest} tokens, the model has {self.max_length}"
                " positions; lower --max_new_tokens"
            )
        config = make_generation_config(sampling)
        answers: list[list[str]] = [[] for _ in prefixes]
        # The longest prompts come first: pad_left relies on it, and memory runs out early if at
        # all.
        order = sorted(range(len(prefixes)), key=lambda i: -len(prefixes[i]))
        # transformers repeats each prompt `samples` times, so a call has rows * samples rows.
        rows = max(1, self.max_tokens // (longest * sampling.samples))
        # The seed is set once, so that later groups of rows continue the draws of the first.
        torch.manual_seed(sampling.seed)
        with plain_generation(self.causal):
            while order:
                chosen = order[:rows]
                ids, mask = pad_left([prefixes[number] for number in chosen], sampling.stop_ids[0])
                width = ids.shape[1]
                try:
                    out = self.causal.generate(
                        input_ids=ids.to(self.device),
                        attention_mask=mask.to(self.device),
                        generation_config=config,
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
                order = order[rows:]
                for row, tokens in enumerate(out[:, width:].tolist()):
                    answers[chosen[row // sampling.samples]].append(decode_answer(tokens, sampling))
        return answers


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
    # No mask and no cache may be given: with either one, transformers lets packed rows see each
    # other without a word.
    return backbone_of(causal)(
        input_ids=ids[None],
        position_ids=position_ids[None],
        attention_mask=None,
        use_cache=False,
        **packing,
    ).last_hidden_state[0]


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


def count_tokens(request: Request, shared: int, nested: bool) -> int:
    """Return the number of tokens that `lay_out` makes of a request."""
    # This must agree with lay_out, or packs grow over the budget.
    longer = [len(option) - 1 for option in request.options if len(option) > 1]
    if nested:
        return len(request.prefix) - shared + sum(longer)
    single = len(request.options) > len(longer)
    return single * len(request.prefix) + sum(len(request.prefix) + extra for extra in longer)


class Target(NamedTuple):
    """A token whose log-probability is needed.

    Attributes:
        place: place in the packed row of the position before the token.
        token: the token's id.
        request: number of the request that it belongs to.
        option: number of the option in that request.
    """

    place: int
    token: int
    request: int
    option: int


def lay_out(
    requests: list[Request], shared: int, nested: bool
) -> tuple[list[list[int]], list[int | None], list[int], list[Target]]:
    """Lay requests out as the segments of one packed row.

    A prefix is one segment, and an option of several tokens continues it in a segment of its own.
    Where segments cannot be `nested`, such an option has a row with the prefix repeated. An
    option's last token is not part of the row, because nothing after it is needed.

    Args:
        requests: prompts with their options.
        shared: how many tokens of each prefix have been read before and are left out.
        nested: whether a segment may continue another one.

    Returns:
        The token ids of each segment, the number of the segment that it continues (or None), the
        position of its first token, and the tokens to score.
    """
    segments: list[list[int]] = []
    parents: list[int | None] = []
    starts: list[int] = []
    targets: list[Target] = []
    total = 0

    def add(ids: list[int], parent: int | None, start: int) -> int:
        """Add a segment, and return the place of its last token in the packed row."""
        nonlocal total
        segments.append(ids)
        parents.append(parent)
        starts.append(start)
        total += len(ids)
        return total - 1

    for number, request in enumerate(requests):
        single = [i for i, option in enumerate(request.options) if len(option) == 1]
        prefix_end = parent = None
        if nested or single:
            prefix_end = add(request.prefix[shared:], None, shared)
            parent = len(segments) - 1
            targets += [Target(prefix_end, request.options[i][0], number, i) for i in single]
        for i, option in enumerate(request.options):
            if len(option) < 2:
                continue
            if nested:
                last = add(option[:-1], parent, len(request.prefix))
            else:
                last = add(request.prefix + option[:-1], None, 0)
            before_first = last - len(option) + 1
            for offset, token in enumerate(option):
                # A nested option's first token follows the prefix, which is another segment.
                place = prefix_end if nested and offset == 0 else before_first + offset
                targets.append(Target(place, token, number, i))
    return segments, parents, starts, targets


def gather_logprobs(
    causal: torch.nn.Module, hidden: torch.Tensor, places: torch.Tensor, tokens: torch.Tensor
) -> list[float]:
    """Return the log-probability of each token after its place, in nats.

    The head computes each place once, however many tokens follow it.

    Args:
        causal: a transformers causal LM.
        hidden: hidden states of the packed row, [tokens, hidden].
        places: the place before each token to score, int64 [targets].
        tokens: the ids of these tokens, int64 [targets].
    """
    unique, inverse = torch.unique(places, return_inverse=True)  # int64 [places], int64 [targets]
    values = torch.empty(len(tokens), dtype=torch.float32, device=hidden.device)
    for start in range(0, len(unique), HEAD_ROWS):
        # float32 [at most HEAD_ROWS, vocab]
        logits = compute_logits(causal, hidden[unique[start : start + HEAD_ROWS]])
        here = ((inverse >= start) & (inverse < start + HEAD_ROWS)).nonzero().flatten()
        rows = inverse[here] - start
        # This is log_softmax at the needed tokens, without its copy of all logits.
        values[here] = logits[rows, tokens[here]] - logits.logsumexp(-1)[rows]
    return values.tolist()


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
    causal.set_attn_implementation(own_attention(causal))
    causal.generation_config = GenerationConfig()
    try:
        yield
    finally:
        causal.set_attn_implementation(attention)
        causal.generation_config = settings
