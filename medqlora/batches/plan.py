"""Row lengths become one deterministic plan of packed micro-batches, balanced over ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medqlora.core.config import Training
from medqlora.core.errors import UserError

# bins below this are reopened with the next window, so that only an epoch's last bins stay
# underfull
WELL_FILLED = 0.98


class PlanError(UserError):
    """Batch arithmetic that does not work out."""


@dataclass(frozen=True)
class Plan:
    """Which rows go into which micro-batch of which step.

    rows int32 [placed rows]; bins int64 [bins + 1] offsets into rows; steps int64 [steps + 1]
    offsets into bins; epochs float64 [steps]: passes completed after each step. The bins of a step
    are dealt to the ranks in turn.
    """

    rows: np.ndarray
    bins: np.ndarray
    steps: np.ndarray
    epochs: np.ndarray

    def __len__(self) -> int:
        return len(self.steps) - 1

    def rows_of(self, step: int) -> np.ndarray:
        """Row numbers of all ranks and micro-batches of a step."""
        return self.rows[self.bins[self.steps[step]] : self.bins[self.steps[step + 1]]]

    def micro_batches(self, step: int, rank: int = 0, ranks: int = 1) -> list[np.ndarray]:
        """Row numbers of each micro-batch of this rank in step `step` (from 0)."""
        return [
            self.rows[self.bins[b] : self.bins[b + 1]]
            for b in range(self.steps[step] + rank, self.steps[step + 1], ranks)
        ]

    def round(self, step: int, number: int, ranks: int) -> list[np.ndarray]:
        """Row numbers of the micro-batches that the ranks compute side by side, as their
        `number`-th of step `step`.
        """
        first = self.steps[step] + number * ranks
        return [
            self.rows[self.bins[b] : self.bins[b + 1]]
            for b in range(first, min(first + ranks, self.steps[step + 1]))
        ]


def fit_bins(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Best-fit decreasing: indices of `lengths` (each at most `capacity`) in bins of at most
    `capacity` tokens.
    """
    order = np.argsort(-lengths, kind="stable")
    space_bits = 0  # bit s is set while some open bin has s tokens of space
    open_bins: list[list[int] | None] = [None] * (capacity + 1)  # space -> numbers of bins with it
    bins: list[list[int]] = []
    for index, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = space_bits >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            stack = open_bins[space]
            number = stack.pop()
            if not stack:
                space_bits ^= 1 << space
            bins[number].append(index)
        else:
            space = capacity
            number = len(bins)
            bins.append([index])
        space -= length
        if space:
            if open_bins[space]:
                open_bins[space].append(number)
            else:
                open_bins[space] = [number]
                space_bits |= 1 << space
    return bins


def pack_epoch(
    lengths: np.ndarray, rows: np.ndarray, capacity: int, window: int
) -> list[np.ndarray]:
    """Pack shuffled `rows` window by window; rows of underfull bins wait for the next window."""
    packed = []
    waiting = np.empty(0, np.int64)
    for start in range(0, len(rows), window):
        pool = np.concatenate([waiting, rows[start : start + window]])
        last = start + window >= len(rows)
        bins = [pool[chosen] for chosen in fit_bins(lengths[pool], capacity)]
        tokens = np.add.reduceat(
            lengths[np.concatenate(bins)], np.cumsum([0] + [len(b) for b in bins[:-1]])
        )
        full = tokens >= WELL_FILLED * capacity
        packed += [chosen for chosen, keep in zip(bins, full | last, strict=True) if keep]
        under = [chosen for chosen, keep in zip(bins, full | last, strict=True) if not keep]
        waiting = np.concatenate(under) if under else np.empty(0, np.int64)
    return packed


def level(lengths: np.ndarray, rows: np.ndarray, count: int, capacity: int) -> list[np.ndarray]:
    """Spread rows over at least `count` bins as evenly as longest-first allows, no bin over
    `capacity`.
    """
    bins = [[] for _ in range(count)]
    tokens = np.zeros(count, np.int64)
    for row in rows[np.argsort(-lengths[rows], kind="stable")]:
        lightest = int(tokens.argmin())
        if tokens[lightest] + lengths[row] > capacity:
            return level(lengths, rows, count + 1, capacity)
        bins[lightest].append(row)
        tokens[lightest] += lengths[row]
    return [np.asarray(chosen) for chosen in bins if chosen]


def level_for_ranks(
    lengths: np.ndarray, rows: np.ndarray, count: int, ranks: int, capacity: int
) -> list[np.ndarray]:
    """Like `level`, with a number of bins that is a multiple of `ranks`. Where there are too few
    rows to split, the lightest bins (fewer than `ranks` rows) sit this epoch out."""
    bins = level(lengths, rows, -(-count // ranks) * ranks, capacity)
    while len(bins) % ranks:
        bins.sort(key=len)
        if len(bins[-1]) < 2:
            bins.sort(key=lambda chosen: -int(lengths[chosen].sum()))
            return bins[: len(bins) // ranks * ranks]
        most = bins.pop()
        bins += [most[::2], most[1::2]]
    return bins


def draw_rows(repeats: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Each row floor(repeats) times, and once more for a random part of those with a fraction;
    shuffled.
    """
    whole = np.floor(repeats).astype(np.int64)
    rows = [np.repeat(np.arange(len(repeats)), whole)]
    for fraction in np.unique(repeats - whole):
        candidates = np.flatnonzero(repeats - whole == fraction)
        rows.append(generator.choice(candidates, round(fraction * len(candidates)), replace=False))
    return generator.permutation(np.concatenate(rows))


def derive_accumulation(global_batch_tokens: int, max_tokens_per_batch: int, ranks: int) -> int:
    """Micro-batches per rank and step.

    Raises:
        PlanError: the global batch is not a multiple of micro-batch x ranks.
    """
    per_round = max_tokens_per_batch * ranks
    if global_batch_tokens % per_round:
        lower = global_batch_tokens // per_round * per_round
        upper = -(-global_batch_tokens // per_round) * per_round
        raise PlanError(
            f"training.global_batch_tokens {global_batch_tokens} is not a multiple of"
            f" max_tokens_per_batch {max_tokens_per_batch} x {ranks} process(es); use"
            f" {upper}{f' or {lower}' if lower else ''}, or change the other"
        )
    return global_batch_tokens // per_round


def list_budgets(training: Training, longest: int, ranks: int) -> list[int]:
    """What training.max_tokens_per_batch can be, largest first: the given value, or for auto all
    that divide the global batch and hold a row of `longest` tokens.

    Raises:
        PlanError: the global batch cannot be divided.
    """
    if training.max_tokens_per_batch != "auto":
        derive_accumulation(training.global_batch_tokens, training.max_tokens_per_batch, ranks)
        return [training.max_tokens_per_batch]
    share, rest = divmod(training.global_batch_tokens, ranks)
    sizes = [share // count for count in range(1, share // longest + 1) if share % count == 0]
    if rest or not sizes:
        raise PlanError(
            f"training.global_batch_tokens {training.global_batch_tokens} on {ranks} process(es)"
            f" has no micro-batch of data.max_length {longest} tokens or more; give a multiple of"
            f" {longest * ranks}"
        )
    return sizes


def describe_batch(training: Training, longest: int, ranks: int) -> str:
    """The batch arithmetic in words; raises as list_budgets."""
    sizes = list_budgets(training, longest, ranks)
    if training.max_tokens_per_batch == "auto":
        return (
            f"{training.global_batch_tokens:,} tokens per step = {ranks} processes x micro-batches"
            f" of {sizes[-1]:,} to {sizes[0]:,}, by forecast"
        )
    return (
        f"{training.global_batch_tokens:,} tokens per step = {ranks} x"
        f" {training.global_batch_tokens // (ranks * sizes[0])} micro-batch(es) of {sizes[0]:,}"
    )


def make_plan(
    lengths: np.ndarray,
    *,
    capacity: int,
    global_tokens: int,
    ranks: int = 1,
    epochs: float = 1.0,
    max_steps: int | None = None,
    repeats: np.ndarray | None = None,
    window: int = 32_768,
    seed: int = 0,
    packing: bool = True,
) -> Plan:
    """Plan a whole training.

    Args: lengths: tokens per row, int [rows]. capacity: tokens per micro-batch. global_tokens:
        tokens per step over all ranks; a multiple of capacity x ranks. repeats: times each row is
        seen per epoch, float [rows]; default 1. packing: False puts one row in each micro-batch; on
        one rank only, for a step of whole rounds would depend on their number.

    Raises:
        PlanError: a row longer than `capacity`, or batch arithmetic that does not work out.
    """
    accumulation = derive_accumulation(global_tokens, capacity, ranks)
    if ranks > 1 and not packing:
        raise PlanError(
            f"data.packing false with {ranks} processes: steps would depend on their number; use"
            " data.packing true, or one process"
        )
    if len(lengths) and lengths.max() > capacity:
        raise PlanError(
            f"row of {lengths.max()} tokens is over max_tokens_per_batch {capacity}; lower"
            " data.max_length"
        )
    lengths = np.asarray(lengths, np.int64)
    repeats = np.ones(len(lengths)) if repeats is None else repeats
    steps = []
    ends = []
    for epoch in range(int(np.ceil(epochs))):
        generator = np.random.default_rng([seed, epoch])
        rows = draw_rows(repeats, generator)
        if packing:
            chosen = plan_packed_epoch(
                lengths, rows, capacity, accumulation * ranks, ranks, window, generator
            )
        else:
            chosen = plan_single_rows(lengths, rows, global_tokens)
        chosen = chosen[: max(1, round(len(chosen) * min(1.0, epochs - epoch)))]
        ends += [
            epoch + min(1.0, epochs - epoch) * (i + 1) / len(chosen) for i in range(len(chosen))
        ]
        steps += chosen
        if max_steps and len(steps) >= max_steps:
            break
    steps = steps[:max_steps]
    ends = ends[:max_steps]
    bins = [chosen for step in steps for chosen in step]
    if not bins:
        raise PlanError(
            f"{len(lengths)} row(s) are too few for {ranks} process(es); give more data or fewer"
            " processes"
        )
    return Plan(
        rows=np.concatenate(bins).astype(np.int32),
        bins=np.cumsum([0] + [len(b) for b in bins]),
        steps=np.cumsum([0] + [len(s) for s in steps]),
        epochs=np.asarray(ends),
    )


def plan_packed_epoch(
    lengths, rows, capacity, bins_per_step, ranks, window, generator
) -> list[list[np.ndarray]]:
    bins = pack_epoch(lengths, rows, capacity, window)
    bins = [bins[i] for i in generator.permutation(len(bins))]
    # Bins of like weight share a step, so that ranks that run side by side wait for nobody; full
    # ones stay shuffled. A step's rows do not depend on the number of ranks.
    bins.sort(key=lambda chosen: -min(int(lengths[chosen].sum()), WELL_FILLED * capacity))
    cut = (len(bins) - 1) // bins_per_step * bins_per_step
    steps = [bins[i : i + bins_per_step] for i in range(0, cut, bins_per_step)]
    steps = [steps[i] for i in generator.permutation(len(steps))]
    rest = bins[cut:]  # the epoch's last step: the lightest bins, perhaps too few for all ranks
    steps.append(
        level_for_ranks(lengths, np.concatenate(rest), len(rest), ranks, capacity)
        if ranks > 1
        else rest
    )
    return [step for step in steps if step]


def plan_single_rows(lengths, rows, global_tokens) -> list[list[np.ndarray]]:
    steps = []
    step = []
    tokens = 0
    for row in rows:
        if step and tokens + lengths[row] > global_tokens:
            steps.append(step)
            step = []
            tokens = 0
        step.append(np.asarray([row]))
        tokens += lengths[row]
    return [*steps, step] if step else steps
