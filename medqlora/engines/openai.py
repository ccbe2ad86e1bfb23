"""Any OpenAI-compatible server (vLLM, SGLang, TGI, hosted).

A server of completions gets our token ids; a chat server gets messages and tokenizes them itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from medqlora.engines.interface import ChatRequest, EngineError, Request, Sampling


class RefusedError(EngineError):
    """The server is there, but does not serve this kind of request."""


TOP = 20  # Hosted servers name at most this many alternatives of a token.


class Connection:
    """One model of one server; `concurrency` requests are in flight at a time.

    A failed request (429, 5xx, timeout) is tried again with growing pauses.
    """

    def __init__(
        self,
        server: str,
        model: str,
        key: str | None = None,
        concurrency: int = 32,
        timeout: float = 120,
        retries: int = 5,
    ):
        """Prepare a connection; nothing is sent yet.

        Args:
            server: the address up to /v1.
            model: the server's name for the model.
            key: sent as bearer token and never written anywhere.
            concurrency: requests in flight.
            timeout: seconds of one request.
            retries: further tries of a failed request.

        Raises:
            EngineError: the openai package is missing.
        """
        try:
            import openai
        except ImportError:
            raise EngineError(
                "--engine openai: the openai package is not installed here; pip install"
                " -e '.[openai]'"
            ) from None
        # Without a key the client would take the one in OPENAI_API_KEY, or refuse to start; a
        # server that asks for none gets a word in its place.
        self.client = openai.OpenAI(
            base_url=server, api_key=key or "none", timeout=timeout, max_retries=retries
        )
        self.server = server
        self.model = model
        self.concurrency = concurrency

    def complete(self, **body: Any) -> Any:
        """Send one request to /completions."""
        return self.call(self.client.completions.create, body)

    def chat(self, **body: Any) -> Any:
        """Send one request to /chat/completions."""
        return self.call(self.client.chat.completions.create, body)

    def call(self, endpoint: Callable[..., Any], body: dict[str, Any]) -> Any:
        """Send one request.

        Raises:
            RefusedError: the server does not serve such a request.
            EngineError: the server cannot be reached, or refuses the key.
        """
        import openai

        try:
            answer = endpoint(model=self.model, **body)
        # The order matters. A timeout is a kind of APIConnectionError.
        # A refused key is a kind of APIStatusError.
        except openai.APITimeoutError:
            raise EngineError(
                f"server {self.server} did not answer in {self.client.timeout} s,"
                f" {self.client.max_retries + 1} times; raise --timeout"
            ) from None
        except openai.APIConnectionError:
            raise EngineError(
                f"server {self.server} cannot be reached; is it running, and is the address right?"
            ) from None
        except openai.AuthenticationError:
            raise EngineError(
                f"server {self.server} refuses the key; set the environment variable named by"
                " --api_key_variable"
            ) from None
        except openai.APIStatusError as error:
            reason = " ".join(str(error.message).split())[:200]
            raise RefusedError(
                f"server {self.server} answers {error.status_code} for model {self.model}: {reason}"
            ) from None
        except (openai.APIError, ValueError) as error:
            raise RefusedError(
                f"server {self.server} answers nonsense ({' '.join(str(error).split())[:120]}); is"
                " it an OpenAI-compatible server?"
            ) from None
        if not getattr(answer, "choices", None):
            raise RefusedError(
                f"server {self.server} answers without choices; is it an OpenAI-compatible server?"
            )
        return answer

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """Return function(item) of each item, with `concurrency` calls at a time."""
        # Threads are enough, because they wait for the network. Results keep the items' order.
        with ThreadPoolExecutor(self.concurrency) as threads:
            return list(threads.map(function, items))

    def pick_options(self, top: Sequence[tuple[str, float]], texts: Sequence[str]) -> list[float]:
        """Return each text's log-probability among the most likely first tokens; NaN if absent."""
        if not top:
            raise EngineError(
                f"server {self.server} answers without log-probabilities; use --scoring generate"
            )
        best: dict[str, float] = {}
        # " A" and "A" are two tokens; the likelier one counts as the letter's.
        for token, logprob in top:
            best[token.strip()] = max(logprob, best.get(token.strip(), -np.inf))
        # An absent option is less likely than those named, which is all that is known of it.
        return [best.get(text.strip(), np.nan) for text in texts]


class CompletionsEngine:
    """A server that takes our token ids.

    How it scores options is found with the first request, from the most exact method to the least:
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

    def score(self, requests: Sequence[Request], shared: int = 0) -> list[list[float]]:
        """See interface.Engine; the server caches what prompts have in common by itself."""
        if self.scoring is None and requests:
            first = requests[0]
            # The trial has options of one token: longer ones go through echo, which would hide
            # whether ids works.
            self.scoring = self.choose_scoring(
                Request(first.prefix, [[option[0]] for option in first.options])
            )
        methods = {"ids": self.score_by_ids, "echo": self.score_by_echo, "top": self.score_by_top}
        return self.connection.map(methods[self.scoring], requests) if requests else []

    def choose_scoring(self, request: Request) -> str:
        """Return the most exact method that the server answers this request with."""
        for name, score in (("ids", self.score_by_ids), ("echo", self.score_by_echo)):
            # Other errors pass through: a server that cannot be reached is no reason for a less
            # exact method. A server that ignores the wanted ids answers with other keys, which
            # shows as NaN.
            with contextlib.suppress(RefusedError):
                if not np.isnan(score(request)).any():
                    return name
        return "top"

    def score_by_ids(self, request: Request) -> list[float]:
        if any(len(option) > 1 for option in request.options):
            return self.score_by_echo(request)
        wanted = [option[0] for option in request.options]
        # Tokens are named by id in the answer, because two tokens may have the same text.
        answer = self.connection.complete(
            prompt=request.prefix,
            max_tokens=1,
            temperature=0,
            logprobs=len(wanted),
            extra_body={"logprob_token_ids": wanted, "return_tokens_as_token_ids": True},
        )
        top = getattr(answer.choices[0].logprobs, "top_logprobs", None) or [{}]
        return [top[0].get(f"token_id:{token}", np.nan) for token in wanted]

    def score_by_echo(self, request: Request) -> list[float]:
        scores = []
        for option in request.options:
            ids = request.prefix + option
            answer = self.connection.complete(
                prompt=ids, max_tokens=1, temperature=0, logprobs=1, echo=True
            )
            values = getattr(answer.choices[0].logprobs, "token_logprobs", None) or []
            # The generated token may follow those of the prompt. Another number shows that the
            # server did not read our ids, and the sum would be over other tokens.
            if not len(ids) <= len(values) <= len(ids) + 1:
                raise RefusedError(
                    f"server {self.connection.server} answers {len(values)} log-probabilities for"
                    f" {len(ids)} tokens"
                )
            scores.append(float(sum(values[len(request.prefix) : len(ids)])))
        return scores

    def score_by_top(self, request: Request) -> list[float]:
        answer = self.connection.complete(
            prompt=request.prefix, max_tokens=1, temperature=0, logprobs=TOP
        )
        top = getattr(answer.choices[0].logprobs, "top_logprobs", None) or [{}]
        texts = [self.decode(option) for option in request.options]
        return self.connection.pick_options(list(top[0].items()), texts)

    def generate(self, prefixes: Sequence[list[int]], sampling: Sampling) -> list[list[str]]:
        """See interface.Engine. A server may ignore the seed."""

        def ask(prefix: list[int]) -> list[str]:
            answer = self.connection.complete(
                prompt=prefix,
                # This parameter is not OpenAI's own, so it travels in extra_body.
                extra_body={"stop_token_ids": list(sampling.stop_ids)},
                **request_sampling(sampling),
            )
            return [choice.text for choice in answer.choices]

        return self.connection.map(ask, prefixes)


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

    def score(self, requests: Sequence[ChatRequest], shared: int = 0) -> list[list[float]]:
        """See interface.Engine."""

        def ask(request: ChatRequest) -> list[float]:
            answer = self.connection.chat(
                messages=request.prefix,
                max_tokens=1,
                temperature=0,
                logprobs=True,
                top_logprobs=TOP,
                **self.extra,
            )
            tokens = getattr(answer.choices[0].logprobs, "content", None)
            alternatives = tokens[0].top_logprobs if tokens else []
            top = [(entry.token, entry.logprob) for entry in alternatives]
            return self.connection.pick_options(top, request.options)

        return self.connection.map(ask, requests)

    def generate(
        self, prefixes: Sequence[list[dict[str, str]]], sampling: Sampling
    ) -> list[list[str]]:
        """See interface.Engine. A server may ignore the seed."""

        def ask(messages: list[dict[str, str]]) -> list[str]:
            answer = self.connection.chat(
                messages=messages, **request_sampling(sampling), **self.extra
            )
            # A message without content counts as an empty answer.
            return [choice.message.content or "" for choice in answer.choices]

        return self.connection.map(ask, prefixes)


def request_sampling(sampling: Sampling) -> dict[str, Any]:
    """Return a request's sampling parameters as OpenAI names them."""
    return {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "n": sampling.samples,
        "seed": sampling.seed,
    }
