"""Any OpenAI-compatible server (vLLM, SGLang, TGI, hosted): completions with our token ids, or chat
with messages.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from medqlora.engines.interface import EngineError, Request, Sampling
from medqlora.prompts.chat_template import TURN


class RefusedError(EngineError):
    """The server is there, but does not serve this kind of request."""


TOP = 20  # alternatives that hosted servers name at most


class OpenAIEngine:
    """Requests are sent `concurrency` at a time; a failed one is tried again with growing pauses
    (429, 5xx, timeouts).

    How options are scored is found out with the first request, from the most exact way to the
    least: "ids": `logprob_token_ids` (vLLM), one request per question; "echo": the prompt's own
    log-probabilities, one request per option; "top": the most likely first tokens, by their text;
    an option that is not among them is unknown (NaN). Chat servers know "top" only.
    """

    name = "openai"

    def __init__(
        self,
        server: str,
        model: str,
        decode: Callable[[list[int]], str],
        key: str | None = None,
        chat: bool = False,
        concurrency: int = 32,
        timeout: float = 120,
        retries: int = 5,
    ):
        """server: address up to /v1; decode: token ids -> text; key: sent as bearer token, never
        written anywhere; timeout: seconds of one request.

        Raises: EngineError: the openai package is missing, the server cannot be reached or does not
            serve the model.
        """
        try:
            import openai
        except ImportError:
            raise EngineError(
                "--engine openai: the openai package is not installed here; pip install"
                " 'medqlora[openai]'"
            ) from None
        self.client = openai.OpenAI(
            base_url=server, api_key=key or "none", timeout=timeout, max_retries=retries
        )
        self.server = server
        self.model = model
        self.decode = decode
        self.chat = chat
        self.concurrency = concurrency
        self.way = "top" if chat else None

    def call(self, endpoint: Callable[..., Any], **body: Any) -> Any:
        """One request; every failure becomes one line."""
        import openai

        try:
            answer = endpoint(model=self.model, **body)
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

    def score(self, requests: Sequence[Request], shared: int = 0) -> list[list[float]]:
        """See interface.Engine; what is the same at the start of prompts is the server's own to
        cache.
        """
        if self.way is None and requests:
            self.way = self.find_way(
                Request(requests[0].prefix, [[option[0]] for option in requests[0].options])
            )
        score = {"ids": self.score_by_ids, "echo": self.score_by_echo, "top": self.score_by_top}[
            self.way
        ]
        with ThreadPoolExecutor(self.concurrency) as threads:
            return list(threads.map(score, requests))

    def find_way(self, request: Request) -> str:
        for way, score in (("ids", self.score_by_ids), ("echo", self.score_by_echo)):
            with contextlib.suppress(RefusedError):
                if not np.isnan(score(request)).any():
                    return way
        return "top"

    def score_by_ids(self, request: Request) -> list[float]:
        if any(len(option) > 1 for option in request.options):
            return self.score_by_echo(request)
        wanted = [option[0] for option in request.options]
        answer = self.call(
            self.client.completions.create,
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
            answer = self.call(
                self.client.completions.create,
                prompt=ids,
                max_tokens=1,
                temperature=0,
                logprobs=1,
                echo=True,
            )
            values = getattr(answer.choices[0].logprobs, "token_logprobs", None) or []
            if not len(ids) <= len(values) <= len(ids) + 1:
                raise RefusedError(
                    f"server {self.server} answers {len(values)} log-probabilities for {len(ids)}"
                    " tokens"
                )
            scores.append(float(sum(values[len(request.prefix) : len(ids)])))
        return scores

    def score_by_top(self, request: Request) -> list[float]:
        texts = [self.decode(option).strip() for option in request.options]
        if self.chat:
            answer = self.call(
                self.client.chat.completions.create,
                messages=split_turns(self.decode(request.prefix)),
                max_tokens=1,
                temperature=0,
                logprobs=True,
                top_logprobs=TOP,
            )
            content = getattr(answer.choices[0].logprobs, "content", None)
            found = (
                [(entry.token, entry.logprob) for entry in content[0].top_logprobs]
                if content
                else []
            )
        else:
            answer = self.call(
                self.client.completions.create,
                prompt=request.prefix,
                max_tokens=1,
                temperature=0,
                logprobs=TOP,
            )
            top = getattr(answer.choices[0].logprobs, "top_logprobs", None) or [{}]
            found = list(top[0].items())
        if not found:
            raise EngineError(
                f"server {self.server} answers without log-probabilities; use --scoring generate"
            )
        best: dict[str, float] = {}
        # " A" and "A" are two tokens; the likelier one is the letter's
        for token, logprob in found:
            best[token.strip()] = max(logprob, best.get(token.strip(), -np.inf))
        return [best.get(text, np.nan) for text in texts]

    def generate(self, prefixes: Sequence[list[int]], sampling: Sampling) -> list[list[str]]:
        """See interface.Engine. Whether a seed is honoured is the server's affair."""
        settings = {
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "n": sampling.samples,
            "seed": sampling.seed,
        }

        def ask(prefix: list[int]) -> list[str]:
            if self.chat:
                answer = self.call(
                    self.client.chat.completions.create,
                    messages=split_turns(self.decode(prefix)),
                    **settings,
                )
                return [choice.message.content or "" for choice in answer.choices]
            answer = self.call(
                self.client.completions.create,
                prompt=prefix,
                extra_body={"stop_token_ids": list(sampling.stop_ids)},
                **settings,
            )
            return [choice.text for choice in answer.choices]

        with ThreadPoolExecutor(self.concurrency) as threads:
            return list(threads.map(ask, prefixes))


def split_turns(text: str) -> list[dict[str, str]]:
    """Text of tokens.make_text_encoder -> messages, user and assistant in turn."""
    return [
        {"role": ("user", "assistant")[i % 2], "content": turn}
        for i, turn in enumerate(text.removesuffix(TURN).split(TURN))
    ]
