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


def divide_step(
    lengths: np.ndarray, bins: list[np.ndarray], ranks: int, capacity: int
) -> list[np.ndarray]:
    """A step's micro-batches for `ranks` processes: the same rows in a multiple of `ranks` bins of
    at most `capacity` tokens. Where there are fewer rows than processes, bins are left empty.
    """
    if len(bins) % ranks == 0:
        return bins
    rows = np.concatenate(bins)
    rounds = max(1, -(-int(lengths[rows].sum()) // (ranks * capacity)))
    divided = level(lengths, rows, rounds * ranks, capacity)
    while len(divided) > rounds * ranks:
        rounds += 1
        divided = level(lengths, rows, rounds * ranks, capacity)
    empty = [np.empty(0, np.int64)] * (rounds * ranks - len(divided))
    return divided + empty


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


def count_bins(global_batch_tokens: int, packed_tokens: int) -> int:
    """Bins of `packed_tokens` tokens that a step is packed in.

    Raises:
        PlanError: the global batch is not a multiple of them.
    """
    bins, rest = divmod(global_batch_tokens, packed_tokens)
    if rest:
        lower = bins * packed_tokens
        raise PlanError(
            f"training.global_batch_tokens {global_batch_tokens} is not a multiple of"
            f" max_tokens_per_batch {packed_tokens}; use {lower + packed_tokens}"
            f"{f' or {lower}' if lower else ''}, or change the other"
        )
    return bins


def share_bins(global_batch_tokens: int, packed_tokens: int, longest: int, ranks: int) -> int:
    """Tokens of a process's micro-batch, where a step is packed in bins of `packed_tokens`.

    The global batch is the experiment, and which rows a step holds does not depend on the number
    of processes. Where the bins cannot be dealt out evenly, the step's rows are divided anew:
    longest-first fills no micro-batch beyond an even share and one row of `longest` tokens.

    Raises:
        PlanError: the global batch is not a multiple of the bins.
    """
    bins = count_bins(global_batch_tokens, packed_tokens)
    if bins % ranks == 0:
        return packed_tokens
    rounds = -(-bins // ranks)
    share = -(-global_batch_tokens // (ranks * rounds))
    return min(packed_tokens, share + longest)


def list_budgets(training: Training, longest: int, ranks: int) -> list[int]:
    """What a process's micro-batch can be in tokens, largest first: what follows from the given
    value, or for auto all that divide the global batch and hold a row of `longest` tokens.

    Raises:
        PlanError: the global batch cannot be divided.
    """
    total = training.global_batch_tokens
    if training.max_tokens_per_batch != "auto":
        return [share_bins(total, training.max_tokens_per_batch, longest, ranks)]
    share, rest = divmod(total, ranks)
    sizes = [share // count for count in range(1, share // longest + 1) if share % count == 0]
    if rest or not sizes:
        # The whole step is one bin, which is divided anew in ever more rounds.
        shares = {-(-total // (ranks * rounds)) for rounds in range(1, total // longest + 1)}
        sizes = sorted({min(total, share + longest) for share in shares}, reverse=True)
    if not sizes:
        raise PlanError(
            f"training.global_batch_tokens {total} is less than a row of data.max_length {longest}"
            " tokens; raise the first or lower the second"
        )
    return sizes


def choose_packing(training: Training, micro_tokens: int, ranks: int) -> int:
    """Tokens of the bins that steps are packed in: the given value; for auto the micro-batch that
    was decided on, or the whole step where it does not divide the global batch.
    """
    if training.max_tokens_per_batch != "auto":
        return training.max_tokens_per_batch
    total = training.global_batch_tokens
    return total if total % (micro_tokens * ranks) else micro_tokens


def describe_batch(training: Training, longest: int, ranks: int) -> str:
    """The batch arithmetic in words; raises as list_budgets."""
    sizes = list_budgets(training, longest, ranks)
    total = f"{training.global_batch_tokens:,} tokens per step = {ranks}"
    if training.max_tokens_per_batch == "auto":
        return f"{total} processes x micro-batches of {sizes[-1]:,} to {sizes[0]:,}, by forecast"
    bins = count_bins(training.global_batch_tokens, training.max_tokens_per_batch)
    batches = f"{total} x {-(-bins // ranks)} micro-batch(es) of"
    if bins % ranks == 0:
        return f"{batches} {sizes[0]:,}"
    return (
        f"{batches} at most {sizes[0]:,}; {bins} of {training.max_tokens_per_batch:,} are divided"
        " among them, with the same rows"
    )


def make_plan(
    lengths: np.ndarray,
    *,
    capacity: int,
    global_tokens: int,
    ranks: int = 1,
    micro_tokens: int | None = None,
    epochs: float = 1.0,
    max_steps: int | None = None,
    repeats: np.ndarray | None = None,
    window: int = 32_768,
    seed: int = 0,
    packing: bool = True,
) -> Plan:
    """Plan a whole training. Which rows a step holds does not depend on the number of processes.

    Args:
        lengths: tokens per row, int [rows].
        capacity: tokens of the bins that rows are packed in.
        global_tokens: tokens per step over all ranks; a multiple of capacity.
        micro_tokens: of a rank's micro-batch, where bins cannot be dealt out evenly (share_bins);
            default capacity.
        repeats: times each row is seen per epoch, float [rows]; default 1.
        packing: False puts one row in each micro-batch, on one rank only: a step of whole rounds
            would depend on the number of ranks.

    Raises:
        PlanError: a row longer than `capacity`, or batch arithmetic that does not work out.
    """
    bins_per_step = count_bins(global_tokens, capacity)
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
            chosen = plan_packed_epoch(lengths, rows, capacity, bins_per_step, window, generator)
            micro = micro_tokens or capacity
            chosen = [divide_step(lengths, step, ranks, micro) for step in chosen]
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
        raise PlanError("no row is left to train on; give more data")
    return Plan(
        rows=np.concatenate(bins).astype(np.int32),
        bins=np.cumsum([0] + [len(b) for b in bins]),
        steps=np.cumsum([0] + [len(s) for s in steps]),
        epochs=np.asarray(ends),
    )


def plan_packed_epoch(
    lengths, rows, capacity, bins_per_step, window, generator
) -> list[list[np.ndarray]]:
    bins = pack_epoch(lengths, rows, capacity, window)
    bins = [bins[i] for i in generator.permutation(len(bins))]
    # Bins of like weight share a step, so that ranks that run side by side wait for nobody; full
    # ones stay shuffled.
    bins.sort(key=lambda chosen: -min(int(lengths[chosen].sum()), WELL_FILLED * capacity))
    cut = (len(bins) - 1) // bins_per_step * bins_per_step
    steps = [bins[i : i + bins_per_step] for i in range(0, cut, bins_per_step)]
    steps = [steps[i] for i in generator.permutation(len(steps))]
    steps.append(bins[cut:])  # the epoch's last step: the lightest bins, and perhaps fewer
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
