"""Make one deterministic plan of packed micro-batches, balanced over ranks, from row lengths.

A step is packed in bins. Where the ranks can share the bins evenly, a bin is a micro-batch; else
the rows of the step are divided anew among the ranks. So the rows of a step do not depend on the
number of ranks.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import chain

import numpy as np

from medqlora.batches.budgets import PlanError, count_bins
from medqlora.batches.order import draw_rows, sort_rows

# A bin that is filled to a smaller part is packed again with the next window of rows, so that only
# the last bins of an epoch stay underfull.
WELL_FILLED = 0.98


@dataclass(frozen=True)
class Plan:
    """The rows of every micro-batch of every step.

    The micro-batches of a step are dealt to the ranks in turn.

    Args:
        rows: The row numbers of all micro-batches, one after the other, int32 [placed rows].
        bins: Where each micro-batch begins and ends in `rows`, int64 [micro-batches + 1].
        steps: Where each step begins and ends in `bins`, int64 [steps + 1].
        epochs: The passes over the data that are completed after each step, float64 [steps].
    """

    rows: np.ndarray
    bins: np.ndarray
    steps: np.ndarray
    epochs: np.ndarray

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self.steps) - 1

    def rows_of(self, step: int) -> np.ndarray:
        """Return the row numbers of a step, those of all ranks and micro-batches."""
        return self.rows[self.bins[self.steps[step]] : self.bins[self.steps[step + 1]]]

    def micro_batches(self, step: int, rank: int = 0, ranks: int = 1) -> list[np.ndarray]:
        """Return the row numbers of each micro-batch of a rank in a step, counted from 0."""
        # Micro-batch k of a step belongs to rank k % ranks. `round` relies on the same order.
        numbers = range(self.steps[step] + rank, self.steps[step + 1], ranks)
        return [self.rows[self.bins[number] : self.bins[number + 1]] for number in numbers]

    def hash_steps(self) -> str:
        """Return the SHA-256 of the rows of each step; it is the same for any number of ranks."""
        digest = hashlib.sha256()
        for step in range(len(self)):
            rows = np.sort(self.rows_of(step))
            digest.update(str(rows.size).encode() + rows.tobytes())
        return digest.hexdigest()

    def round(self, step: int, number: int, ranks: int) -> list[np.ndarray]:
        """Return the row numbers of the micro-batches that the ranks compute side by side.

        Args:
            step: The step, counted from 0.
            number: How many micro-batches of the step each rank has computed before.
            ranks: The number of ranks.
        """
        first = self.steps[step] + number * ranks
        numbers = range(first, min(first + ranks, self.steps[step + 1]))
        return [self.rows[self.bins[number] : self.bins[number + 1]] for number in numbers]


def fit_bins(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Pack rows in bins by best-fit decreasing (Johnson et al., SIAM J. Comput. 3, 1974).

    Args:
        lengths: The tokens of each row, int [rows], none over `capacity`.
        capacity: The largest number of tokens in a bin.

    Returns:
        The indices into `lengths` of each bin.
    """
    # A stable sort leaves rows of equal length in their shuffled order, so the seed alone decides.
    order = np.argsort(-lengths, kind="stable")  # int64 [rows], longest first
    # Bit s is set while an open bin has s tokens of space, so that the lowest set bit from a row's
    # length on is the tightest fit.
    space_bits = 0
    bins_with_space: list[list[int] | None] = [None] * (capacity + 1)
    bins: list[list[int]] = []
    for index, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = space_bits >> length
        if fitting:
            # The expression x & -x keeps the lowest set bit of x.
            space = length + (fitting & -fitting).bit_length() - 1
            stack = bins_with_space[space]
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
            if bins_with_space[space]:
                bins_with_space[space].append(number)
            else:
                bins_with_space[space] = [number]
                space_bits |= 1 << space
    return bins


def pack_epoch(
    lengths: np.ndarray, rows: np.ndarray, capacity: int, window: int
) -> list[np.ndarray]:
    """Pack shuffled rows window by window; the rows of underfull bins join the next window.

    Args:
        lengths: The tokens of each row, int64.
        rows: The row numbers of an epoch, in shuffled order.
        capacity: The largest number of tokens in a bin.
        window: The number of rows that are packed at a time.

    Returns:
        The row numbers of each bin.
    """
    packed = []
    waiting = np.empty(0, np.int64)
    for start in range(0, len(rows), window):
        pool = np.concatenate([waiting, rows[start : start + window]])
        # Rows must not be left waiting after the last window, so it closes every bin.
        last = start + window >= len(rows)
        bins = [pool[indices] for indices in fit_bins(lengths[pool], capacity)]
        bin_starts = np.cumsum([0] + [len(members) for members in bins[:-1]])
        # reduceat would return a wrong sum for an empty bin, and no bin is empty.
        tokens = np.add.reduceat(lengths[np.concatenate(bins)], bin_starts)  # int64 [bins]
        closed = (tokens >= WELL_FILLED * capacity) | last
        packed += [members for members, keep in zip(bins, closed, strict=True) if keep]
        underfull = [members for members, keep in zip(bins, closed, strict=True) if not keep]
        waiting = np.concatenate(underfull) if underfull else np.empty(0, np.int64)
    return packed


def spread_rows(
    lengths: np.ndarray, rows: np.ndarray, count: int, capacity: int
) -> list[np.ndarray]:
    """Spread rows evenly over bins: each row, longest first, goes into the lightest bin.

    Args:
        lengths: The tokens of each row, int.
        rows: The row numbers.
        count: The number of bins. There are more where a bin would be over `capacity`, and fewer
            where there are fewer rows.
        capacity: The largest number of tokens in a bin, at least the longest row.

    Returns:
        The row numbers of each bin; none is empty.
    """
    bins = [[] for _ in range(count)]
    tokens = np.zeros(count, np.int64)  # [bins]
    for row in rows[np.argsort(-lengths[rows], kind="stable")]:
        lightest = int(tokens.argmin())
        # With more bins each holds less. A row over `capacity` would never fit, and the recursion
        # would not end.
        if tokens[lightest] + lengths[row] > capacity:
            return spread_rows(lengths, rows, count + 1, capacity)
        bins[lightest].append(row)
        tokens[lightest] += lengths[row]
    return [np.asarray(members) for members in bins if members]


def divide_step(
    lengths: np.ndarray, bins: list[np.ndarray], ranks: int, capacity: int
) -> list[np.ndarray]:
    """Divide the bins of a step anew where the ranks cannot share them evenly, or where a bin is
    larger than a micro-batch.

    Args:
        lengths: The tokens of each row, int64.
        bins: The row numbers of each bin of the step.
        ranks: The number of ranks.
        capacity: The largest number of tokens in a micro-batch.

    Returns:
        The row numbers of a multiple of `ranks` micro-batches that hold the same rows. Where there
        are fewer rows than ranks, the last micro-batches are empty.
    """
    # Bins that can be dealt out evenly stay as they are, which makes them those of one process. An
    # epoch's last step may have fewer bins, which the ranks could share, but a bin may be larger
    # than a micro-batch. A rank that had to split one would run more micro-batches than the others.
    even = len(bins) % ranks == 0
    if even and all(lengths[members].sum() <= capacity for members in bins):
        return bins
    rows = np.concatenate(bins)
    # All ranks must compute the same number of micro-batches, because they wait for each other. The
    # negated floor division rounds up.
    rounds = max(1, -(-int(lengths[rows].sum()) // (ranks * capacity)))
    divided = spread_rows(lengths, rows, rounds * ranks, capacity)
    while len(divided) > rounds * ranks:
        rounds += 1
        divided = spread_rows(lengths, rows, rounds * ranks, capacity)
    empty = [np.empty(0, np.int64)] * (rounds * ranks - len(divided))
    return divided + empty


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
    order_by: np.ndarray | None = None,
) -> Plan:
    """Plan a whole training. The rows of a step do not depend on the number of ranks.

    Args:
        lengths: The tokens of each row, int [rows].
        capacity: The largest number of tokens in a bin.
        global_tokens: The tokens of a step over all ranks, a multiple of `capacity`.
        ranks: The number of ranks.
        micro_tokens: The largest number of tokens in a micro-batch where the ranks cannot share
            the bins of a step evenly (see share_bins); `capacity` by default.
        epochs: The number of passes over the data, which may be a fraction.
        max_steps: The number of steps after which the plan ends, if not before.
        repeats: How often each row is seen per epoch, float64 [rows]; once by default.
        window: The number of rows that are packed at a time.
        seed: The seed of the order of rows and steps.
        packing: Whether to pack. Without packing each micro-batch is one row, which is possible on
            one rank only: steps of whole rounds of micro-batches would depend on `ranks`.
        order_by: A finite value of each row, float [rows]. The steps of an epoch take its rows in
            ascending order of it; None shuffles them. The rows of an epoch are the same.

    Raises:
        PlanError: A row is longer than `capacity`, the global batch cannot be divided, or no row is
            left.
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
    epochs_done = []
    for epoch in range(int(np.ceil(epochs))):
        # Each epoch has a generator of its own, so its rows do not depend on what was drawn before.
        # The order of the draws inside an epoch is part of the plan: rows, bins, then steps.
        generator = np.random.default_rng([seed, epoch])
        rows = sort_rows(draw_rows(repeats, generator), order_by)
        if not packing:
            epoch_steps = plan_single_rows(lengths, rows, global_tokens)
        elif order_by is None:
            epoch_steps = plan_packed_epoch(
                lengths, rows, capacity, bins_per_step, window, generator
            )
        else:
            epoch_steps = plan_sorted_epoch(lengths, rows, capacity, bins_per_step)
        if packing:
            micro = micro_tokens or capacity
            # The number of ranks comes in only here, after the rows of each step are settled.
            epoch_steps = [divide_step(lengths, step, ranks, micro) for step in epoch_steps]
        # The last epoch of a fraction takes its first steps, but at least one.
        part = min(1.0, epochs - epoch)
        epoch_steps = epoch_steps[: max(1, round(len(epoch_steps) * part))]
        count = len(epoch_steps)
        epochs_done += [epoch + part * (number + 1) / count for number in range(count)]
        steps += epoch_steps
        if max_steps and len(steps) >= max_steps:
            break
    steps = steps[:max_steps]
    epochs_done = epochs_done[:max_steps]
    bins = list(chain.from_iterable(steps))
    if not bins:
        raise PlanError("no row is left to train on; give more data")
    return Plan(
        rows=np.concatenate(bins).astype(np.int32),  # [placed rows]
        bins=np.cumsum([0] + [len(members) for members in bins]),  # int64 [micro-batches + 1]
        steps=np.cumsum([0] + [len(step) for step in steps]),  # int64 [steps + 1]
        epochs=np.asarray(epochs_done),  # float64 [steps]
    )


def plan_packed_epoch(
    lengths: np.ndarray,
    rows: np.ndarray,
    capacity: int,
    bins_per_step: int,
    window: int,
    generator: np.random.Generator,
) -> list[list[np.ndarray]]:
    """Return the row numbers of each bin of each step of an epoch."""
    bins = pack_epoch(lengths, rows, capacity, window)
    bins = [bins[i] for i in generator.permutation(len(bins))]
    # Bins of nearly the same size share a step, so that no rank waits long for another. The sort is
    # stable and takes all well filled bins for equal, so these stay shuffled.
    bins.sort(key=lambda members: -min(int(lengths[members].sum()), WELL_FILLED * capacity))
    # The last step of an epoch takes the smallest bins, and perhaps fewer of them.
    last_start = (len(bins) - 1) // bins_per_step * bins_per_step
    steps = [bins[i : i + bins_per_step] for i in range(0, last_start, bins_per_step)]
    steps = [steps[i] for i in generator.permutation(len(steps))]
    steps.append(bins[last_start:])
    return [step for step in steps if step]


def plan_sorted_epoch(
    lengths: np.ndarray, rows: np.ndarray, capacity: int, bins_per_step: int
) -> list[list[np.ndarray]]:
    """Return the row numbers of each bin of each step of an epoch whose rows keep their order.

    Each step takes the next rows, as many as its bins hold. They are packed inside the step only,
    where the order of rows changes no gradient.
    """
    ends = np.cumsum(lengths[rows])  # int64 [rows], the tokens up to and with each row
    steps = []
    first = 0
    while first < len(rows):
        before = ends[first - 1] if first else 0
        # No more tokens than these can fit; whether the rows do, only packing shows.
        last = int(np.searchsorted(ends, before + capacity * bins_per_step, side="right"))
        bins = fit_bins(lengths[rows[first:last]], capacity)
        while len(bins) > bins_per_step:
            # Each bin too many holds at least one row.
            last -= len(bins) - bins_per_step
            bins = fit_bins(lengths[rows[first:last]], capacity)
        steps.append([rows[first:last][indices] for indices in bins])
        first = last
    return steps


def plan_single_rows(
    lengths: np.ndarray, rows: np.ndarray, global_tokens: int
) -> list[list[np.ndarray]]:
    """Return steps of at most `global_tokens` tokens in which each row is a micro-batch."""
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
