"""Times of served requests -> the figures that `vllm bench serve` reports, by its definitions
(vllm/benchmarks/serve.py): every piece of a stream is an arrival, also one without text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from medqlora.core.errors import UserError

PERCENTILES = (50, 90, 95, 99)
MEASURES = ("ttft", "tpot", "itl", "e2el")


class LatencyError(UserError):
    """A load that cannot be made, or a server that fails under it."""


@dataclass(frozen=True)
class Served:
    """One answered request. sent, arrivals: seconds on one clock, of the request and of each piece
    of its answer; tokens: in the answer."""

    sent: float
    arrivals: tuple[float, ...]
    tokens: int

    @property
    def ttft(self) -> float:
        """Time to first token."""
        return self.arrivals[0] - self.sent

    @property
    def e2el(self) -> float:
        """End-to-end latency."""
        return self.arrivals[-1] - self.sent

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None for a single token, which has none."""
        return (self.e2el - self.ttft) / (self.tokens - 1) if self.tokens > 1 else None

    @property
    def itl(self) -> list[float]:
        """Inter-token latencies: between two pieces of the answer, which hold a token each unless
        the server joins some.
        """
        return np.diff(self.arrivals).tolist()


def summarize(
    served: Sequence[Served], seconds: float, objectives: Mapping[str, float] | None = None
) -> dict:
    """Rates over `seconds`, and mean and percentiles in milliseconds. objectives: most milliseconds
    of ttft, tpot or e2el; goodput counts the requests that keep all of them."""
    objectives = objectives or {}
    found = {
        "ttft": [s.ttft for s in served],
        "e2el": [s.e2el for s in served],
        "tpot": [s.tpot for s in served if s.tpot is not None],
        "itl": [gap for s in served for gap in s.itl],
    }
    good = [
        all(1000 * (getattr(s, name) or 0.0) <= most for name, most in objectives.items())
        for s in served
    ]
    return {
        "requests": len(served),
        "seconds": seconds,
        "requests_per_second": len(served) / seconds,
        "output_tokens_per_second": sum(s.tokens for s in served) / seconds,
        "goodput_requests_per_second": sum(good) / seconds if objectives else None,
        **{f"{name}_ms": describe(found[name]) for name in MEASURES},
    }


def describe(seconds: Sequence[float]) -> dict[str, float] | None:
    """Mean and percentiles in milliseconds; None where there is nothing to describe."""
    if not len(seconds):
        return None
    values = 1000 * np.asarray(seconds)
    return {
        "mean": float(values.mean()),
        **{f"p{q}": float(np.percentile(values, q)) for q in PERCENTILES},
    }


def parse_objectives(texts: Sequence[str]) -> dict[str, float]:
    """["ttft=500", "tpot=50"] -> milliseconds by measure.

    Raises:
        LatencyError: another measure, or no number.
    """
    found = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = -1.0
        if name not in ("ttft", "tpot", "e2el") or not 0 < found[name] < float("inf"):
            raise LatencyError(
                f"--goodput {text}: expected ttft=, tpot= or e2el= and milliseconds, e.g. ttft=500"
            )
    return found


def draw_arrivals(count: int, rate: float, seed: int) -> np.ndarray:
    """Seconds at which requests of a Poisson process arrive, float64 [count], stretched so that the
    last is at count / rate: what is offered is the rate that was asked for."""
    places = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count))
    return places * (count / rate / places[-1])
