"""The connection to one model of an OpenAI-compatible server.

The openai package sends, waits and tries again. Here is decided what a failure means: for the
request alone, for the kind of request, or for all that would follow.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from typing import Any

from medqlora.engines.interface import EngineError
from medqlora.engines.server_address import hide_secrets
from medqlora.engines.server_answers import (
    AnswerError,
    RefusedError,
    parse_answer,
    read_choices,
    read_end,
    read_event,
)

# Only these say that the server does not serve such a request. Any other status can pass: a busy
# server would otherwise change how options are scored.
REFUSALS = (400, 404, 422)
PATIENCE = 64  # Requests that may fail in a row before no more are sent.
# What a provider adds to the name of a model that has versions: a date or a number of its own.
VERSION = re.compile(r"[-@:](latest|\d{3,8}(-\d\d){0,2})")


class StopError(AnswerError):
    """A failure that every further request would share."""


class Connection:
    """One model of one server; `concurrency` requests are in flight at a time.

    A failed request (429, 5xx, timeout, broken connection) is tried again with growing pauses.

    Attributes:
        served: the name of the model in the answers; None before the first one, and for a server
            that names none.
        stopped: the reason why no more requests are sent, or None.
    """

    def __init__(
        self,
        server: str,
        model: str,
        key: str | None = None,
        concurrency: int = 32,
        timeout: float = 120,
        retries: int = 5,
        served_model: str | None = None,
    ):
        """Prepare a connection; nothing is sent yet.

        Args:
            server: the address up to /v1.
            model: the server's name for the model.
            key: sent as bearer token and never written anywhere.
            concurrency: requests in flight.
            timeout: seconds of one request, from its beginning to the answer's last byte.
            retries: further tries of a failed request.
            served_model: the name that must stand in the answers; by default the model's, or that
                of a version of it.

        Raises:
            EngineError: the openai package is missing, or the environment has a value that it
                refuses.
        """
        try:
            import openai

            from medqlora.engines.http_transport import BoundedClient
        except ImportError:
            raise EngineError(
                "--engine openai: the openai package is not installed here; pip install"
                " -e '.[openai]'"
            ) from None
        try:
            # Without a key the client would take the one in OPENAI_API_KEY, or refuse to start; a
            # server that asks for none gets a word in its place.
            self.client = openai.AsyncOpenAI(
                base_url=server,
                api_key=key or "none",
                timeout=timeout,
                max_retries=retries,
                http_client=BoundedClient(timeout),
            )
        # Each library below has errors of its own, whose texts may show a key or a password.
        except Exception as error:  # noqa: BLE001
            raise EngineError(
                f"--server {server}: no HTTP client can be made ({type(error).__name__}); look at"
                " the address, and at the environment variables OPENAI_*, SSL_*, *_PROXY"
            ) from None
        self.server = server
        self.model = model
        self.key = key
        self.concurrency = concurrency
        self.wanted_name = served_model
        self.served: str | None = None
        self.answered = False
        self.failed_in_a_row = 0
        self.stopped: EngineError | None = None
        # One event loop stays for all calls, because open connections belong to their loop. It also
        # ends all requests at once after Ctrl-C, which threads that wait would not.
        self.runner = asyncio.Runner()
        weakref.finalize(self, self.runner.get_loop().close)

    async def complete(self, **body: Any) -> dict[str, Any]:
        """Send one request to /completions."""
        return await self.call(self.client.completions.with_raw_response.create, body)

    async def chat(self, **body: Any) -> dict[str, Any]:
        """Send one request to /chat/completions."""
        return await self.call(self.client.chat.completions.with_raw_response.create, body)

    async def call(
        self, endpoint: Callable[..., Awaitable[Any]], body: dict[str, Any]
    ) -> dict[str, Any]:
        """Send one request and return the answer's object.

        Raises:
            RefusedError: the server does not serve such a request.
            StopError: no request will be answered.
            AnswerError: this request failed.
        """
        with self.explain_failures():
            # The raw answer is taken, because the package's own objects may hold any type.
            response = await endpoint(model=self.model, **body)
        answer = parse_answer(response.content)
        # An answer without choices is an error's, whose sender may be a gateway.
        if answer.get("choices"):
            self.check_name(answer.get("model"))
        return answer

    def stream_completion(self, **body: Any) -> AsyncIterator[dict[str, Any]]:
        """Send one request to /completions; see stream."""
        return self.stream(self.client.completions.with_streaming_response.create, body)

    def stream_chat(self, **body: Any) -> AsyncIterator[dict[str, Any]]:
        """Send one request to /chat/completions; see stream."""
        return self.stream(self.client.chat.completions.with_streaming_response.create, body)

    async def stream(
        self, endpoint: Callable[..., Any], body: dict[str, Any]
    ) -> AsyncIterator[dict[str, Any]]:
        """Send one request, and yield the pieces of its only choice as they come.

        A server that does not stream gives one piece, which is the whole choice.

        Raises:
            AnswerError: see call; or the answer has no end.
        """
        # This module is loaded before the openai package, on which the transport stands.
        from medqlora.engines.http_transport import read_lines

        ended = False
        with self.explain_failures():
            async with (
                asyncio.timeout(self.client.timeout),
                endpoint(model=self.model, stream=True, **body) as response,
            ):
                lines = read_lines(response.http_response)
                if "text/event-stream" not in response.headers.get("content-type", ""):
                    answer = parse_answer(b"\n".join([line async for line in lines]))
                    (choice,) = read_choices(answer)
                    self.check_name(answer.get("model"))
                    yield choice
                    return
                async for line in lines:
                    event = read_event(line)
                    if event is None:
                        continue
                    if event.get("choices"):
                        self.check_name(event.get("model"))
                        (choice,) = read_choices(event)
                        ended = ended or read_end(choice) is not None
                        yield choice
        if not ended:
            raise AnswerError("broke off an answer before its end; look at its log")

    @contextlib.contextmanager
    def explain_failures(self) -> Iterator[None]:
        """Turn what the openai package raises into what it means.

        Raises:
            RefusedError, StopError, AnswerError: see call.
        """
        import openai

        try:
            yield
        # The order matters. A timeout is a kind of APIConnectionError.
        except TimeoutError:
            raise AnswerError(
                f"did not end its answer in {self.client.timeout} s; raise --timeout"
            ) from None
        except openai.APITimeoutError:
            raise AnswerError(
                f"did not answer in {self.client.timeout} s, {self.tries()}; raise --timeout"
            ) from None
        except openai.APIConnectionError as error:
            # Older versions of the package wrap every error of the HTTP client.
            if isinstance(error.__cause__, AnswerError):
                raise error.__cause__ from None
            if type(error.__cause__).__name__ == "ConnectError":
                raise AnswerError(
                    "cannot be reached; is it running, and is the address right?"
                ) from None
            raise AnswerError(
                f"broke off the connection, {self.tries()}; look at its log"
            ) from None
        except openai.APIStatusError as error:
            raise self.read_status(error) from None
        except (openai.OpenAIError, OSError, UnicodeError) as error:
            # Such a text may quote the headers, and so the key.
            raise AnswerError(f"cannot be asked this ({type(error).__name__})") from None

    def tries(self) -> str:
        count = self.client.max_retries + 1
        return f"{count} times" if count > 1 else "once"

    def read_status(self, error: Any) -> AnswerError:
        """Return what a status code other than 2xx means."""
        code = error.status_code
        reason = f"answers {code} for model {self.model}: {error.message}"
        if code in REFUSALS:
            return RefusedError(reason)
        if code in (401, 403):
            return StopError(
                f"refuses the key ({code}); set the environment variable named by"
                " --api_key_variable"
            )
        if 300 <= code < 400:
            place = error.response.headers.get("location", "nowhere").partition("?")[0]
            return StopError(
                "redirects, which is not followed, because the key would go along; if you trust"
                f" it, give the address where it leads as --server: {place}"
            )
        return AnswerError(reason)

    def check_name(self, name: Any) -> None:
        """Check the model's name in an answer against what was asked for, and keep it."""
        if name is not None and not isinstance(name, str):
            raise AnswerError(f'answers nonsense ("model" is of type {type(name).__name__})')
        # A file of predictions holds the name, so a server that echoes the key must not put it
        # there.
        name = hide_secrets(name, self.key) if name else None
        if not self.answered:
            wrong = name != self.wanted_name if self.wanted_name else not self.is_ours(name)
            if wrong:
                raise StopError(
                    f"answers as model {name!r}, not {self.wanted_name or self.model!r}; if it is"
                    " the right one, say so by --served_model"
                )
            self.answered = True
            self.served = name
        if name != self.served:
            raise StopError(
                f"answered as model {self.served!r} and now as {name!r}; one file holds the"
                " answers of one model, give another --output"
            )

    def is_ours(self, name: str | None) -> bool:
        """Whether an answer's name is the model's own, its path, or a version of it.

        The words of a name must agree to the end, because "gpt-4o-mini" is no version of "gpt-4o".
        """
        if name is None:
            return True
        asked, given = ([part for part in text.split("/") if part] for text in (self.model, name))
        if not asked or not given:
            return False
        asked[-1] = asked[-1].removesuffix("-latest").removesuffix(":latest")
        # A server may leave out the folder or the owner, or name them where we did not.
        length = min(len(asked), len(given))
        if asked[-length:-1] != given[-length:-1] or not given[-1].startswith(asked[-1]):
            return False
        rest = given[-1][len(asked[-1]) :]
        return not rest or VERSION.fullmatch(rest) is not None

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine to its end."""
        return self.runner.run(work)

    async def attempt(self, function: Callable[[Any], Awaitable[Any]], item: Any) -> Any:
        """Return function(item); an AnswerError gets the server's name, and loses all secrets."""
        try:
            return await function(item)
        except AnswerError as error:
            text = hide_secrets(str(error), self.key)
            raise type(error)(f"server {self.server} {text}") from None

    def map(self, function: Callable[[Any], Awaitable[Any]], items: Sequence[Any]) -> list[Any]:
        """Return function(item) of each item, in the items' order.

        An EngineError stands in the place of each request that failed. After one that every
        request would share, and after many in a row, the rest is not sent and fails in the same
        way.
        """
        return self.run(self.ask_all(function, items))

    async def ask_all(
        self, function: Callable[[Any], Awaitable[Any]], items: Sequence[Any]
    ) -> list[Any]:
        places = asyncio.Semaphore(self.concurrency)

        async def ask(item: Any) -> Any:
            async with places:
                if self.stopped:
                    return self.stopped
                try:
                    result = await self.attempt(function, item)
                except EngineError as error:
                    self.failed_in_a_row += 1
                    if isinstance(error, StopError) or self.failed_in_a_row >= PATIENCE:
                        self.stopped = error
                    return error
                self.failed_in_a_row = 0
                return result

        return list(await asyncio.gather(*map(ask, items)))
