"""How many tokens a bin and a micro-batch have: the arithmetic of a step and its ranks."""

from __future__ import annotations

from medqlora.core.config import Training
from medqlora.core.errors import UserError


class PlanError(UserError):
    """A batch size that cannot be kept, or rows that cannot be packed."""


def count_bins(global_batch_tokens: int, packed_tokens: int) -> int:
    """Return the number of bins of `packed_tokens` tokens that a step is packed in.

    Raises:
        PlanError: The global batch is not a multiple of the bins.
    """
    bins, rest = divmod(global_batch_tokens, packed_tokens)
    if rest:
        lower = bins * packed_tokens
        higher = lower + packed_tokens
        multiples = f"{higher} or {lower}" if lower else f"{higher}"
        raise PlanError(
            f"training.global_batch_tokens {global_batch_tokens} is not a multiple of"
            f" max_tokens_per_batch {packed_tokens}; use {multiples}, or change the other"
        )
    return bins


def share_bins(global_batch_tokens: int, packed_tokens: int, longest: int, ranks: int) -> int:
    """Return the largest number of tokens in a rank's micro-batch.

    A micro-batch is a bin where the ranks can share the bins of a step evenly. Where they cannot,
    `divide_step` spreads the rows of the step, which fills no micro-batch beyond an even share and
    one row.

    Args:
        global_batch_tokens: The tokens of a step.
        packed_tokens: The tokens of a bin.
        longest: The tokens of the longest row.
        ranks: The number of ranks.

    Raises:
        PlanError: The global batch is not a multiple of the bins.
    """
    bins = count_bins(global_batch_tokens, packed_tokens)
    if bins % ranks == 0:
        return packed_tokens
    rounds = -(-bins // ranks)
    share = -(-global_batch_tokens // (ranks * rounds))
    return min(packed_tokens, share + longest)


def list_budgets(training: Training, longest: int, ranks: int) -> list[int]:
    """Return the sizes in tokens that a rank's micro-batch can have, largest first.

    A given training.max_tokens_per_batch leaves one size. For "auto" the sizes are all that divide
    a rank's part of the global batch and hold a row of `longest` tokens.

    Raises:
        PlanError: The global batch cannot be divided so.
    """
    total = training.global_batch_tokens
    if training.max_tokens_per_batch != "auto":
        return [share_bins(total, training.max_tokens_per_batch, longest, ranks)]
    share, rest = divmod(total, ranks)
    sizes = [share // count for count in range(1, share // longest + 1) if share % count == 0]
    if rest or not sizes:
        # The whole step is one bin, whose rows are spread over 1, 2, 3 ... micro-batches per rank.
        shares = {-(-total // (ranks * rounds)) for rounds in range(1, total // longest + 1)}
        sizes = sorted({min(total, share + longest) for share in shares}, reverse=True)
    if not sizes:
        raise PlanError(
            f"training.global_batch_tokens {total} is less than a row of data.max_length {longest}"
            " tokens; raise the first or lower the second"
        )
    return sizes


def choose_packing(training: Training, micro_tokens: int, ranks: int) -> int:
    """Return the size in tokens of the bins that steps are packed in.

    It is the given training.max_tokens_per_batch. For "auto" it is the size of the micro-batch that
    was decided on, or the whole step where micro-batches of this size do not divide the step.

    Args:
        training: The configuration's section.
        micro_tokens: The decided size of a rank's micro-batch.
        ranks: The number of ranks.
    """
    if training.max_tokens_per_batch != "auto":
        return training.max_tokens_per_batch
    total = training.global_batch_tokens
    # A resumed run must be packed in the same bins, or its steps would have other rows.
    # `planning.decide_step` therefore records this number.
    return total if total % (micro_tokens * ranks) else micro_tokens


def describe_batch(training: Training, longest: int, ranks: int) -> str:
    """Return a line that says how a step is divided into micro-batches.

    Raises:
        PlanError: The global batch cannot be divided.
    """
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
