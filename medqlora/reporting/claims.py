"""Figures that others publish, beside what the recorded forecasts say, and a verdict on each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from medqlora.core.errors import ConfigError

# Two figures agree if ours is at most this part of the published one away from it. Forecasts of
# memory were measured to a few percent, and published figures are often rounded to two digits.
TOLERANCE = 0.1
VERDICTS = ("plausible", "partly", "refuted", "not checkable here")
# Bytes, shares and seconds of a unit. A unit that is not here is a number of things.
UNITS = {"GB": 1e9, "GiB": 2**30, "MB": 1e6, "%": 0.01, "minutes": 60.0}
WEIGHTS = ("quantized weights", "quantization state", "other base weights", "embeddings and head")
# Mixed-precision training with Adam holds, for each weight, 2 bytes of it and 2 of its gradient in
# 16 bits, and 12 of float32: the master weight and two moments (Rajbhandari et al., ZeRO, SC 2020,
# section 3.1).
FULL_TUNING_BYTES = 16


def sum_categories(record: Mapping, names: Sequence[str] = WEIGHTS) -> int:
    """Return the bytes of some categories of a forecast; without names those of the base."""
    return sum(record["by_category"][name] for name in names)


def least_seconds(record: Mapping, tokens: int) -> float:
    """Return the seconds that training on so many tokens takes at the least on a T4.

    Every weight takes 6 operations per token where all layers are recomputed (time_per_token in
    training/memory/estimate.py); no GPU reaches the rate of its data sheet.
    """
    from medqlora.training.trial import PEAK_FLOPS  # It imports torch, which takes seconds.

    return 6 * record["base_parameters"] * tokens / PEAK_FLOPS["T4"]


def most_tokens(record: Mapping, bandwidth: float) -> float:
    """Return how many tokens per second one answer can have at the most.

    Each token reads the quantized layers and the head once. Embeddings and head are equally large
    here, and of the embeddings only a row is read.
    """
    read = sum_categories(record, WEIGHTS[:3]) + sum_categories(record, WEIGHTS[3:]) / 2
    return bandwidth / read


# Each takes a recorded forecast and the options of the figure, and returns bytes, a share or a
# number.
QUANTITIES: dict[str, Callable[..., float]] = {
    "tensors": lambda record: record["predicted_peak_bytes"],
    "tensors and context": lambda record: record["predicted_peak_bytes"] + record["context_bytes"],
    "weights in 32 bits": lambda record: 4 * record["base_parameters"],
    "weights in 16 bits": lambda record: 2 * record["base_parameters"],
    "weights in NF4": sum_categories,
    "share saved by NF4": lambda record: (
        1 - sum_categories(record) / (2 * record["base_parameters"])
    ),
    "full fine-tuning": lambda record: FULL_TUNING_BYTES * record["base_parameters"],
    "share saved by QLoRA": lambda record: (
        1 - record["predicted_peak_bytes"] / (FULL_TUNING_BYTES * record["base_parameters"])
    ),
    "moments of all weights": lambda record: 8 * record["base_parameters"],
    "gradients of all weights": lambda record: 4 * record["base_parameters"],
    "8-bit moments of the adapter": lambda record: 2 * record["trainable_parameters"],
    "adapter in 16 bits": lambda record: 2 * record["trainable_parameters"],
    "trainable parameters": lambda record: record["trainable_parameters"],
    "trainable share": lambda record: record["trainable_parameters"] / record["base_parameters"],
    "longest row": lambda record: record["longest_row"],
    "least seconds on a T4": least_seconds,
    "most tokens per second": most_tokens,
}
FORMULAS: dict[str, Callable[[float], float]] = {
    "exp": math.exp,
    "log": math.log,
    "one of": lambda options: 1 / options,
}
# These come out of the simulated step. All others are counted, or computed from counts.
PREDICTED = ("tensors", "tensors and context", "longest row", "share saved by QLoRA")
BOUNDS = {"least seconds on a T4": "at least ", "most tokens per second": "at most "}


def find_value(figure: Mapping[str, Any], records: Callable[[str], Mapping]) -> float:
    """Return our value of a figure, in bytes, seconds, shares or numbers.

    Args:
        figure: the figure. Its `ours` says where our value is from: `record`, the name of a
            recorded forecast, and `quantity`, one of QUANTITIES, with its `options`; or `formula`,
            one of FORMULAS, `of` a number; or a `published` number in the figure's `unit`.
        records: returns the forecast of a name.
    """
    ours = figure["ours"]
    if "record" in ours:
        measure = QUANTITIES[ours["quantity"]]
        return measure(records(ours["record"]), **ours.get("options", {}))
    if "formula" in ours:
        return FORMULAS[ours["formula"]](ours["of"])
    return ours["published"] * UNITS.get(figure["unit"], 1)


def agrees(figure: Mapping[str, Any], value: float) -> bool:
    """Say whether our value of a figure confirms the published one.

    Args:
        figure: the figure, with its `claimed` number, or the lowest and highest of a range, in its
            `unit`; and with the `relation` that ours must have to all of it: `equal` (up to
            TOLERANCE), `exact` (a count), `at most` or `at least`.
        value: what find_value returns for it.
    """
    unit = UNITS.get(figure["unit"], 1)
    claimed = figure["claimed"] if isinstance(figure["claimed"], list) else [figure["claimed"]] * 2
    low, high = (number * unit for number in claimed)
    relation = figure["relation"]
    if relation == "at most":
        return value <= low
    if relation == "at least":
        return value >= high
    assert relation in ("equal", "exact"), relation
    tolerance = TOLERANCE if relation == "equal" else 0
    return low * (1 - tolerance) <= value <= high * (1 + tolerance)


def judge(claim: Mapping[str, Any], records: Callable[[str], Mapping]) -> str:
    """Return the verdict that the figures of a claim give.

    It is plausible if every figure agrees with ours, refuted if none does, and otherwise partly.
    Figures of relation `beside` are only shown. Where there is no other, it is not checkable.
    """
    agreed = [
        agrees(figure, find_value(figure, records))
        for figure in claim["figures"]
        if figure["relation"] != "beside"
    ]
    if not agreed:
        return "not checkable here"
    return "plausible" if all(agreed) else "partly" if any(agreed) else "refuted"


def check_claim(claim: Mapping[str, Any], records: Callable[[str], Mapping]) -> None:
    """Refuse a claim whose verdict is not that of its figures.

    Raises:
        ConfigError: the verdict is another one.
    """
    found = judge(claim, records)
    if claim["verdict"] != found:
        raise ConfigError(
            f"claim {claim['published']!r}: the verdict is {claim['verdict']!r}, and its figures"
            f" give {found!r}; correct the verdict, or the figures"
        )


def describe_figure(figure: Mapping[str, Any], value: float) -> str:
    """Return our value of a figure in the unit of the claim, and where it is from."""
    ours = figure["ours"]
    number = value / UNITS.get(figure["unit"], 1)
    quantity = ours.get("quantity", "")
    before = BOUNDS.get(quantity, "")
    # Whole numbers, as of questions and parameters, are written in full.
    digits = 0 if float(number).is_integer() or number >= 1000 else 2 if number < 10 else 1
    name = f"{ours['name']}: " if "name" in ours else ""
    source = "predicted" if quantity in PREDICTED else "computed"
    if "published" in ours:
        source = "published"
    return f"{name}{before}{number:,.{digits}f} {figure['unit']}".rstrip() + f" ({source})"


def list_rows(
    claims: Sequence[Mapping[str, Any]], records: Callable[[str], Mapping]
) -> Iterator[list[str]]:
    """Yield a row of the page for each claim: what is published, ours, the verdict and why.

    Raises:
        ConfigError: a verdict is not that of the figures.
    """
    for claim in claims:
        check_claim(claim, records)
        ours = [describe_figure(figure, find_value(figure, records)) for figure in claim["figures"]]
        yield [claim["published"], "; ".join(ours), claim["verdict"], claim["reason"]]
