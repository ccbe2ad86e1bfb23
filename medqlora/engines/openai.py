"""Any OpenAI-compatible server (vLLM, SGLang, TGI, hosted).

A server of completions gets our token ids; a chat server gets messages and tokenizes them itself.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from medqlora.engines.interface import Answer, ChatRequest, EngineError, Request, Sampling
from medqlora.engines.server_answers import (
    RefusedError,
    Served,
    pick_options,
    read_choices,
    read_echo,
    read_first_alternatives,
    read_first_top,
    read_generated,
    read_wanted,
)
from medqlora.engines.server_connection import Connection, StopError

TOP = 20  # Hosted servers name at most this many alternatives of a token.


class CompletionsEngine:
    """A server that takes our token ids.

    How it scores options is found with the first request, from the most exact way to the least:
    "ids" asks for the options' own tokens (vLLM's `logprob_token_ids`, one request per question);
    "echo" reads the prompt's own log-probabilities (one request per option); "top" looks among the
    most likely first tokens by their text, where an absent option is unknown (NaN).
    """

    name = "openai"
    weights = None

    def __init__(self, connection: Connection, decode: Callable[[list[int]], str]):
        self.connection = connection
        self.decode = decode
        self.scoring: str | None = None

    def settle(self, requests: Sequence[Request], scored: bool = True) -> Served:
        """Send one small request, and choose how options are scored.

        Args:
            requests: what will be asked; at least one.
            scored: whether options are scored, or texts generated.

        Returns:
            What only the server's answer tells, and every row depends on: the name of the model,
            and the way of scoring.

        Raises:
            EngineError: the server does not answer.
        """
        ways = {"ids": self.score_by_ids, "echo": self.score_by_echo, "top": self.score_by_top}
        if not scored:
            ways = {None: self.ask_briefly}
        # The trial has options of one token: longer ones go through echo, which would hide whether
        # ids works.
        trials = [
            Request(request.prefix, [option[:1] for option in request.options])
            for request in choose_trials(requests)
        ]
        self.scoring = try_ways(self.connection, ways, trials)
        return {"served_model": self.connection.served, "scoring_way": self.scoring}

    def score(self, requests: Sequence[Request], shared: int = 0) -> list[list[float]]:
        """See interface.Engine; the server caches what prompts have in common by itself."""
        if not requests:
            return []
        if self.scoring is None:
            self.settle(requests)
        methods = {"ids": self.score_by_ids, "echo": self.score_by_echo, "top": self.score_by_top}
        return self.connection.map(methods[self.scoring], requests)

    async def ask_briefly(self, request: Request) -> None:
        answer = await self.connection.complete(prompt=request.prefix, max_tokens=1, temperature=0)
        read_choices(answer)

    async def score_by_ids(self, request: Request) -> list[float]:
        if any(len(option) > 1 for option in request.options):
            return await self.score_by_echo(request)
        wanted = [option[0] for option in request.options]
        # Tokens are named by id in the answer, because two tokens may have the same text.
        answer = await self.connection.complete(
            prompt=request.prefix,
            max_tokens=1,
            temperature=0,
            logprobs=len(wanted),
            extra_body={"logprob_token_ids": wanted, "return_tokens_as_token_ids": True},
        )
        return read_wanted(read_choices(answer)[0], wanted)

    async def score_by_echo(self, request: Request) -> list[float]:
        scores = []
        for option in request.options:
            ids = request.prefix + option
            answer = await self.connection.complete(
                prompt=ids, max_tokens=1, temperature=0, logprobs=1, echo=True
            )
            start = len(request.prefix)
            scores.append(read_echo(read_choices(answer)[0], ids, start, self.decode))
        return scores

    async def score_by_top(self, request: Request) -> list[float]:
        answer = await self.connection.complete(
            prompt=request.prefix, max_tokens=1, temperature=0, logprobs=TOP
        )
        top = read_first_top(read_choices(answer)[0])
        texts = [self.decode(option) for option in request.options]
        return pick_options(list(top.items()), texts)

    def generate(self, prefixes: Sequence[list[int]], sampling: Sampling) -> list[list[Answer]]:
        """See interface.Engine. A server may ignore the seed."""

        async def ask(prefix: list[int]) -> list[Answer]:
            answer = await self.connection.complete(
                prompt=prefix,
                # This parameter is not OpenAI's own, so it travels in extra_body.
                extra_body={"stop_token_ids": list(sampling.stop_ids)},
                **request_sampling(sampling),
            )
            choices = read_choices(answer, sampling.samples)
            return [read_generated(choice, chat=False) for choice in choices]

        return self.connection.map(ask, prefixes)

    def stream(self, prefix: list[int], sampling: Sampling, show: Callable[[str], None]) -> Answer:
        """See interface.Engine."""

        def ask(prefix: list[int]) -> Awaitable[Answer]:
            pieces = self.connection.stream_completion(
                prompt=prefix,
                extra_body={"stop_token_ids": list(sampling.stop_ids)},
                **request_sampling(sampling),
            )
            return join_pieces(pieces, show, chat=False)

        return self.connection.run(self.connection.attempt(ask, prefix))


class ChatEngine:
    """A server that takes messages only. Options are scored by the most likely first tokens."""

    name = "openai"
    weights = None

    def __init__(self, connection: Connection, template_arguments: Mapping[str, Any] | None = None):
        """Talk to a chat server.

        Args:
            connection: the server.
            template_arguments: values of the chat template's own arguments. Servers of vLLM and
                SGLang know them; others refuse the request.
        """
        self.connection = connection
        self.extra: dict[str, Any] = {}
        if template_arguments:
            self.extra = {"extra_body": {"chat_template_kwargs": dict(template_arguments)}}

    def settle(self, requests: Sequence[ChatRequest], scored: bool = True) -> Served:
        """See CompletionsEngine.settle; a chat server scores options in one way only."""
        ways = {"top": self.score_by_top} if scored else {None: self.ask_briefly}
        way = try_ways(self.connection, ways, choose_trials(requests))
        return {"served_model": self.connection.served, "scoring_way": way}

    def score(self, requests: Sequence[ChatRequest], shared: int = 0) -> list[list[float]]:
        """See interface.Engine."""
        return self.connection.map(self.score_by_top, requests)

    async def ask_briefly(self, request: ChatRequest) -> None:
        answer = await self.connection.chat(
            messages=request.prefix, max_tokens=1, temperature=0, **self.extra
        )
        read_choices(answer)

    async def score_by_top(self, request: ChatRequest) -> list[float]:
        answer = await self.connection.chat(
            messages=request.prefix,
            max_tokens=1,
            temperature=0,
            logprobs=True,
            top_logprobs=TOP,
            **self.extra,
        )
        alternatives = read_first_alternatives(read_choices(answer)[0])
        return pick_options(alternatives, request.options)

    def generate(
        self, prefixes: Sequence[list[dict[str, str]]], sampling: Sampling
    ) -> list[list[Answer]]:
        """See interface.Engine. A server may ignore the seed."""

        async def ask(messages: list[dict[str, str]]) -> list[Answer]:
            answer = await self.connection.chat(
                messages=messages, **request_sampling(sampling), **self.extra
            )
            choices = read_choices(answer, sampling.samples)
            return [read_generated(choice, chat=True) for choice in choices]

        return self.connection.map(ask, prefixes)

    def stream(
        self, prefix: list[dict[str, str]], sampling: Sampling, show: Callable[[str], None]
    ) -> Answer:
        """See interface.Engine."""

        def ask(messages: list[dict[str, str]]) -> Awaitable[Answer]:
            pieces = self.connection.stream_chat(
                messages=messages, **request_sampling(sampling), **self.extra
            )
            return join_pieces(pieces, show, chat=True)

        return self.connection.run(self.connection.attempt(ask, prefix))


async def join_pieces(
    pieces: AsyncIterator[dict[str, Any]], show: Callable[[str], None], chat: bool
) -> Answer:
    """Return the answer of a choice that comes in pieces, and show each of them."""
    answers = []
    async for piece in pieces:
        answers.append(read_generated(piece, chat))
        show(answers[-1].text)
    text = "".join(answer.text for answer in answers)
    return Answer(text, any(answer.reached_limit for answer in answers))


def choose_trials(requests: Sequence[Any]) -> list[Any]:
    """Return the two shortest requests.

    A server refuses a prompt that is too long for it, and that says nothing about the way of
    scoring. The second stands in where the first one fails.
    """
    return sorted(requests, key=lambda request: len(str(request.prefix)))[:2]


def try_ways(
    connection: Connection,
    ways: Mapping[str | None, Callable[[Any], Awaitable[Any]]],
    trials: Sequence[Any],
) -> str | None:
    """Return the first way in which the server answers a trial.

    Only a refusal leads to the next way. Any other failure may pass, and is no reason for a less
    exact one.

    Raises:
        EngineError: no trial is answered.
    """
    failure = None
    for trial in trials:
        for name, ask in ways.items():
            try:
                connection.run(connection.attempt(ask, trial))
                return name
            except StopError:
                raise
            except RefusedError as error:
                failure = error
            except EngineError as error:
                failure = error
                break
    raise failure


def request_sampling(sampling: Sampling) -> dict[str, Any]:
    """Return a request's sampling parameters as OpenAI names them."""
    return {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "n": sampling.samples,
        "seed": sampling.seed,
    }
