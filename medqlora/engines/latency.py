"""From the times of served requests to the figures that `vllm bench serve` reports.

The definitions are those of vllm/benchmarks/serve.py: every piece of a stream is an arrival, even
one without text.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from medqlora.core.errors import UserError
from medqlora.engines.interface import Engine, EngineError, Request

PERCENTILES = (50, 90, 95, 99)
MEASURES = ("ttft", "tpot", "itl", "e2el")


class LatencyError(UserError):
    """A load that cannot be made, or a server that fails under it."""


@dataclass(frozen=True)
class Served:
    """One answered request.

    Attributes:
        sent: time of the request, in seconds.
        arrivals: times of the pieces of its answer, in seconds on the same clock; at least one.
        tokens: number of tokens in the answer.
    """

    sent: float
    arrivals: tuple[float, ...]
    tokens: int

    @property
    def ttft(self) -> float:
        """Time to first token, in seconds."""
        return self.arrivals[0] - self.sent

    @property
    def e2el(self) -> float:
        """End-to-end latency, in seconds."""
        return self.arrivals[-1] - self.sent

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first, in seconds; None for an answer of one token."""
        # The first token's time is TTFT, so the rest is divided by one token less.
        if self.tokens < 2:
            return None
        return (self.e2el - self.ttft) / (self.tokens - 1)

    @property
    def itl(self) -> list[float]:
        """Inter-token latencies: the seconds between two pieces of the answer.

        A piece holds one token unless the server joins several.
        """
        return np.diff(self.arrivals).tolist()


def summarize(
    served: Sequence[Served], seconds: float, objectives: Mapping[str, float] | None = None
) -> dict:
    """Return rates over `seconds`, and mean and percentiles of each measure in milliseconds.

    Args:
        served: the answered requests.
        seconds: time from the first request to the last answer.
        objectives: the most milliseconds that a request may take by ttft, tpot or e2el. Goodput
            counts the requests that keep all of them; it is None without objectives.
    """
    objectives = objectives or {}
    times = {
        "ttft": [request.ttft for request in served],
        "e2el": [request.e2el for request in served],
        "tpot": [request.tpot for request in served if request.tpot is not None],
        # The gaps of all answers are pooled, so a long answer counts more than a short one.
        "itl": [gap for request in served for gap in request.itl],
    }
    good = sum(keeps_objectives(request, objectives) for request in served)
    return {
        "requests": len(served),
        "seconds": seconds,
        "requests_per_second": len(served) / seconds,
        "output_tokens_per_second": sum(request.tokens for request in served) / seconds,
        "goodput_requests_per_second": good / seconds if objectives else None,
        **{f"{measure}_ms": describe(times[measure]) for measure in MEASURES},
    }


def keeps_objectives(request: Served, objectives: Mapping[str, float]) -> bool:
    """Whether a request took at most the milliseconds of every objective."""
    for measure, most in objectives.items():
        # An answer of one token has no time per further token, and keeps any bound on it.
        seconds = getattr(request, measure) or 0.0
        # Times are in seconds and objectives in milliseconds.
        if not 1000 * seconds <= most:
            return False
    return True


def describe(seconds: Sequence[float]) -> dict[str, float] | None:
    """Return mean and percentiles in milliseconds, or None where there are no values."""
    if not len(seconds):
        return None
    values = 1000 * np.asarray(seconds)
    return {
        "mean": float(values.mean()),
        **{f"p{percent}": float(np.percentile(values, percent)) for percent in PERCENTILES},
    }


def parse_objectives(texts: Sequence[str]) -> dict[str, float]:
    """Read objectives such as ["ttft=500", "tpot=50"] into milliseconds by measure.

    Raises:
        LatencyError: the measure is another one, or the value is no positive number.
    """
    objectives = {}
    for text in texts:
        measure, _equals, value = text.partition("=")
        try:
            milliseconds = float(value)
        except ValueError:
            milliseconds = -1.0
        # A request has many inter-token latencies, so itl is no objective. NaN fails the
        # comparison.
        if measure not in ("ttft", "tpot", "e2el") or not 0 < milliseconds < float("inf"):
            raise LatencyError(
                f"--goodput {text}: expected ttft=, tpot= or e2el= and milliseconds, e.g. ttft=500"
            )
        objectives[measure] = milliseconds
    return objectives


def draw_arrivals(count: int, rate: float, seed: int) -> np.ndarray:
    """Draw the times at which the requests of a Poisson process are sent.

    The times are stretched so that the last one is at count / rate. Without this the rate of the
    drawn requests would differ by chance from the rate that was asked for.

    Args:
        count: number of requests.
        rate: requests per second.
        seed: of the random draws.

    Returns:
        Seconds from the start, float64 [count].
    """
    # The gaps of a Poisson process are exponential, with a mean of 1 / rate seconds.
    times = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count))
    return times * (count / rate / times[-1])


def time_scoring(engine: Engine, requests: Sequence[Request]) -> dict:
    """Score one half of the questions each alone, and the other half in one batch.

    The answer is a letter, so the time of one question is both TTFT and E2EL.

    Args:
        engine: what answers.
        requests: the questions, at least two.

    Returns:
        How many questions each half has, the time of one alone in milliseconds, and rates per
        second.

    Raises:
        EngineError: a question was not answered.
    """
    alone = requests[: len(requests) // 2]
    batch = requests[len(requests) // 2 :]
    engine.score(alone[:2])  # The first calls load kernels and do not count.
    seconds = []
    for request in alone:
        began = time.perf_counter()
        # No shared beginning is named, so each prompt is read as a whole.
        check_answered(engine.score([request]))
        seconds.append(time.perf_counter() - began)
    began = time.perf_counter()
    check_answered(engine.score(batch))
    batch_seconds = time.perf_counter() - began
    tokens = sum(len(request.prefix) for request in batch)
    return {
        "questions": len(batch),
        "e2el_ms": describe(seconds),
        "questions_per_second_alone": len(alone) / sum(seconds),
        "questions_per_second": len(batch) / batch_seconds,
        "prefill_tokens_per_second": tokens / batch_seconds,
    }


def check_answered(answers: Sequence) -> None:
    """Raise the error that stands in the place of a failed request's answer."""
    for answer in answers:
        if isinstance(answer, EngineError):
            raise answer


def describe_scoring(figures: Mapping) -> str:
    """Return what time_scoring measured, in words."""
    return (
        f"letters, {figures['questions']} questions: alone p50 {figures['e2el_ms']['p50']:.1f} ms,"
        f" p99 {figures['e2el_ms']['p99']:.1f} ms; in one batch"
        f" {figures['questions_per_second']:,.1f} questions/s,"
        f" {figures['prefill_tokens_per_second']:,.0f} prompt tokens/s"
    )
