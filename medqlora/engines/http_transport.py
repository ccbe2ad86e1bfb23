"""The HTTP client under the openai package: it follows no redirect, and bounds every answer."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import AsyncIterator
from typing import Any

import openai

from medqlora.engines.server_answers import AnswerError

# The openai package stands on httpx or on httpx2, depending on its version.
httpx = importlib.import_module(
    openai.DefaultAsyncHttpxClient.__base__.__module__.partition(".")[0]
)
MAX_ANSWER = 32 << 20  # Bytes. A prompt of 128k tokens that is echoed takes about half of them.


class BoundedClient(openai.DefaultAsyncHttpxClient):
    """An HTTP client whose answers are read whole, within a deadline and a size."""

    def __init__(self, seconds: float):
        """Prepare a client.

        Args:
            seconds: a whole request may take so long, from the connection to the last byte. The
                library's own timeout is one of each read, so a server that sends a byte a second
                would never end.
        """
        super().__init__(
            # A redirect could send prompts and key to another server.
            follow_redirects=False,
            timeout=seconds,
            # The connection's `concurrency` is the only bound on requests.
            limits=httpx.Limits(),
        )
        self.seconds = seconds
        # A small compressed answer could fill the memory.
        self.headers["Accept-Encoding"] = "identity"

    async def send(self, request: Any, **options: Any) -> Any:
        """Send a request and return its complete answer.

        Of an answer that the openai package wants to read as it comes, only the headers have come.

        Raises:
            AnswerError: an answer that is too large or compressed.
            httpx.RequestError: the openai package tries again after it.
        """
        streamed = options.get("stream", False)
        options |= {"stream": True, "follow_redirects": False}
        try:
            async with asyncio.timeout(self.seconds):
                response = await super().send(request, **options)
                if streamed and response.status_code == httpx.codes.OK:
                    return response
                try:
                    content = await read_bounded(response)
                finally:
                    await response.aclose()
        except TimeoutError:
            raise httpx.ReadTimeout("no complete answer in time", request=request) from None
        return httpx.Response(
            response.status_code, headers=response.headers, content=content, request=request
        )


async def read_bounded(response: Any) -> bytes:
    """Return an answer's bytes."""
    content = bytearray()
    async for piece in read_pieces(response):
        content += piece
    return bytes(content)


async def read_pieces(response: Any) -> AsyncIterator[bytes]:
    """Yield an answer's bytes as they come.

    Raises:
        AnswerError: the answer is too large or compressed.
    """
    if response.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise AnswerError("answers in a compressed form that was not asked for")
    size = 0
    async for piece in response.aiter_raw():
        size += len(piece)
        if size > MAX_ANSWER:
            raise AnswerError(f"answers with more than {MAX_ANSWER >> 20} MiB")
        yield piece


async def read_lines(response: Any) -> AsyncIterator[bytes]:
    """Yield the lines of an answer as they come, without their ends.

    Raises:
        AnswerError: see read_pieces; or the connection broke off.
    """
    line = b""
    try:
        async for piece in read_pieces(response):
            *lines, line = (line + piece).split(b"\n")
            for whole in lines:
                yield whole.rstrip(b"\r")
    except httpx.HTTPError:
        raise AnswerError("broke off the connection in an answer; look at its log") from None
    if line:
        yield line
