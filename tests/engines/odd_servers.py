"""Servers that answer in odd ways, each with what must come of it: the right predictions, or one
line.

A kind is a function of a handler and the good answer, which writes what the server sends. Every
question's right prediction is B.
"""

import contextlib
import gzip
import http.server
import json
import threading
import time

RIGHT = "right"
LINE = "one line"
SECRET = "sk-verysecretkey0123456789"
# Only a deadline ends an answer of these.
STALLS = ("never answers", "one byte at a time", "headers one byte at a time", "chunks without end")
LONGEST = 6  # A server that never ends gives up after so many seconds, should nobody hang up.
LIMIT = 80 << 20  # The same in bytes.
KINDS = []


def kind(name, expected, api="chat", scoring="generate"):
    """Register a kind of server."""

    def register(function):
        KINDS.append((name, expected, api, scoring, function))
        return function

    return register


def make_good(path, body, letters):
    """Return a good answer; `letters` remembers a tokenizer's ids of A, B, C and D."""
    choice = {"index": 0, "finish_reason": "stop"}
    if path.endswith("/chat/completions"):
        choice["message"] = {"role": "assistant", "content": "B"}
        if body.get("logprobs"):
            top = [
                {"token": t, "logprob": v}
                for t, v in zip("BACD", (-0.1, -3.0, -4, -5), strict=True)
            ]
            choice["logprobs"] = {"content": [{"token": "B", "logprob": -0.1, "top_logprobs": top}]}
    else:
        wanted = body.get("logprob_token_ids")
        letters[:] = wanted or letters
        choice["text"] = "B"
        if wanted:
            values = [-4.0, -0.1, -4, -5]
            top = {f"token_id:{token}": values[i] for i, token in enumerate(wanted)}
            choice["logprobs"] = {"top_logprobs": [top]}
        elif body.get("echo"):
            ids = body["prompt"]
            last = -0.1 if ids[-1] == letters[1] else -4.0
            choice["logprobs"] = {"token_logprobs": [None, *[-1.0] * (len(ids) - 2), last, -0.5]}
    return {"id": "x", "model": body["model"], "choices": [choice] * body.get("n", 1)}


class OddServer:
    """A server of one kind; `only` is a text of the questions that it answers oddly, or all.

    Both may change while it runs.
    """

    def __init__(self, behave, only=""):
        self.asked = 0
        self.behave = behave
        self.only = only
        outer = self
        letters = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                outer.asked += 1
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                self.body = json.loads(raw)
                self.asked = outer.asked
                good = make_good(self.path, self.body, letters)
                with contextlib.suppress(OSError):
                    (outer.behave if outer.only.encode() in raw else send)(self, good)

            def do_GET(self):  # A redirected POST arrives as a GET.
                outer.asked += 1
                outer.redirected = dict(self.headers)
                send(self, {"model": "m", "choices": []})

            def log_message(self, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.block_on_close = False
        self.http.handle_error = lambda *_: None
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()


def send(handler, content, status=200, headers=(), length=None):
    """Send an object as JSON, or bytes as they are."""
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    handler.send_response(status)
    given = dict(headers)
    given.setdefault("Content-Type", "application/json")
    given.setdefault("Content-Length", str(len(content) if length is None else length))
    for name, value in given.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(content)


# ---- status codes --------------------------------------------------------------------------------


def fail_with(status):
    return lambda handler, good: send(handler, {"error": {"message": f"no {SECRET}"}}, status)


for status in (400, 401, 403, 404, 405, 408, 409, 413, 418, 422, 429, 500, 502, 503, 504, 599):
    kind(f"always {status}", LINE)(fail_with(status))
for status in (429, 500, 503):
    kind(f"always {status} to letters", LINE, "completions", "letters")(fail_with(status))


@kind("503 once, then well", RIGHT)
@kind("503 once to letters, then well", RIGHT, "completions", "letters")
def fail_once(handler, good):
    send(handler, good, 503 if handler.asked == 1 else 200)


@kind("refuses to score by ids with 400", RIGHT, "completions", "letters")
def refuse_ids(handler, good):
    send(handler, good, 400 if "logprob_token_ids" in handler.body else 200)


@kind("an error under status 200", LINE)
def send_error(handler, good):
    send(handler, {"error": {"message": f"overloaded, key {SECRET}", "code": 503}})


@kind("redirect", LINE)
def redirect(handler, good):
    place = f"http://127.0.0.1:{handler.server.server_port}/elsewhere?key={SECRET}"
    send(handler, b"", 302, {"Location": place})


@kind("redirect of the method too", LINE)
def redirect_post(handler, good):
    place = f"http://user:{SECRET}@127.0.0.1:{handler.server.server_port}/v1/chat/completions"
    send(handler, good, 307 if handler.asked < 9 else 200, {"Location": place})


@kind("204 without content", LINE)
def send_nothing(handler, good):
    handler.send_response(204)
    handler.end_headers()


# ---- the connection ------------------------------------------------------------------------------


@kind("never answers", LINE)
def hang(handler, good):
    time.sleep(LONGEST)


@kind("one byte at a time", LINE)
def drip(handler, good):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(10 * LONGEST):
        handler.wfile.write(b" ")
        time.sleep(0.1)


@kind("headers one byte at a time", LINE)
def drip_headers(handler, good):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    for _ in range(10 * LONGEST):
        handler.wfile.write(b"a")
        time.sleep(0.1)


@kind("chunks without end", LINE)
def drip_chunks(handler, good):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _ in range(10 * LONGEST):
        handler.wfile.write(b"1\r\n \r\n")
        time.sleep(0.1)


@kind("gigabytes", LINE)
def flood(handler, good):
    handler.send_response(200)
    handler.send_header("Content-Length", str(1 << 40))
    handler.end_headers()
    for _ in range(LIMIT >> 20):
        handler.wfile.write(b" " * (1 << 20))


BOMB = gzip.compress(b'{"choices": [], "pad": "' + b"a" * LIMIT + b'"}', 1)


@kind("gzip bomb", LINE)
def bomb(handler, good):
    send(handler, BOMB, headers={"Content-Encoding": "gzip"})


@kind("endless headers", LINE)
def flood_headers(handler, good):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for _ in range(1000):
        handler.wfile.write(b"X: " + b"a" * 1000 + b"\r\n")


@kind("content longer than its length", LINE)
def cut_by_length(handler, good):
    send(handler, good, length=40)


@kind("content shorter than its length", LINE)
def too_short(handler, good):
    handler.close_connection = True
    send(handler, good, length=4000)


@kind("closed before an answer", LINE)
def close(handler, good):
    handler.close_connection = True
    handler.connection.shutdown(2)


@kind("reset in the middle", LINE)
def reset(handler, good):
    import socket
    import struct

    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{")
    handler.connection.close()


@kind("not HTTP", LINE)
def speak_otherwise(handler, good):
    handler.wfile.write(b"220 mail.example ESMTP\r\n")


@kind("a length that is no number", LINE)
def odd_length(handler, good):
    send(handler, good, length="many")


@kind("compressed although not asked", LINE)
def compress(handler, good):
    send(handler, b"no gzip", headers={"Content-Encoding": "gzip"})


# ---- the content ---------------------------------------------------------------------------------


def always(content):
    return lambda handler, good: send(handler, content)


def change(function):
    """A server that changes the good answer, or its first choice."""

    def behave(handler, good):
        good = json.loads(json.dumps(good))  # Choices are no longer one object.
        send(handler, function(good, good["choices"][0]))

    return behave


CONTENTS = {
    "an HTML page": b"<html><body>Please log in</body></html>",
    "empty": b"",
    "null": b"null",
    "a list": b"[]",
    "a number": b"7",
    "a text": b'"B"',
    "cut JSON": b'{"choices": [{"message"',
    "invalid UTF-8": b'{"choices": [{"message": {"content": "\xff\xfe"}}], "model": "m"}',
    "deep JSON": b"[" * 200_000,
    "deep JSON inside": b'{"choices": ' + b'[{"a":' * 100_000,
    "an enormous number": b'{"choices": ' + b"9" * 5000 + b"}",
    "an event stream": b'data: {"choices": []}\n\ndata: [DONE]\n\n',
    "an empty object": b"{}",
    "choices null": b'{"model": "m", "choices": null}',
    "choices empty": b'{"model": "m", "choices": []}',
    "choices a text": b'{"model": "m", "choices": "B"}',
    "choices an object": b'{"model": "m", "choices": {"0": {"message": {"content": "A"}}}}',
    "a choice that is a text": b'{"model": "m", "choices": ["A"]}',
    "a choice that is null": b'{"model": "m", "choices": [null]}',
    "a choice without a message": b'{"model": "m", "choices": [{"index": 0}]}',
    "a message that is a text": b'{"model": "m", "choices": [{"message": "A"}]}',
    "a model that is a number": b'{"model": 5, "choices": [{"message": {"content": "B"}}]}',
    "another model": b'{"model": "other", "choices": [{"message": {"content": "B"}}]}',
}
for name, content in CONTENTS.items():
    kind(name, LINE)(always(content))
    if "model" not in name:
        kind(f"{name} to letters", LINE, "completions", "letters")(always(content))


@kind("a byte order mark", RIGHT)
def mark(handler, good):
    send(handler, b"\xef\xbb\xbf" + json.dumps(good).encode())


@kind("another model from the third answer on", LINE)
def swap(handler, good):
    send(handler, good | {"model": "m" if handler.asked < 3 else "m-2024-08-06"})


def with_message(**values):
    def edit(good, choice):
        choice["message"].update(values)
        return good

    return change(edit)


def with_choice(**values):
    def edit(good, choice):
        choice.update(values)
        return good

    return change(edit)


kind("content a number", LINE)(with_message(content=5))
kind("content a list", LINE)(with_message(content=[{"type": "text", "text": "B"}]))
kind("withheld by a content filter", LINE)(with_choice(finish_reason="content_filter"))
kind("a tool call", LINE)(
    with_choice(finish_reason="tool_calls", message={"content": None, "tool_calls": [{}]})
)
kind("finish reason odd", LINE)(with_choice(finish_reason={"a": 1}))
kind("a lone surrogate", RIGHT)(with_message(content="Answer: B\n\ud800"))
kind("cut by length", RIGHT)(with_choice(finish_reason="length"))
kind("more keys than asked", RIGHT)(with_choice(logprobs=None, extra=[1], index=0))
kind("two choices for one", LINE)(change(lambda good, choice: good | {"choices": [choice] * 2}))
kind("a model named by its path", RIGHT)(change(lambda good, _: good | {"model": "/models/m"}))
kind("a dated model", RIGHT)(change(lambda good, _: good | {"model": "m-2024-08-06"}))
kind("no model name", RIGHT)(change(lambda good, _: {"choices": good["choices"]}))
kind("a model's smaller sibling", LINE)(change(lambda good, _: good | {"model": "m-mini"}))


# ---- log-probabilities ---------------------------------------------------------------------------


def with_chat_top(value):
    """Letters of a chat server, with one value in the place of B's log-probability."""

    def edit(good, choice):
        choice["logprobs"]["content"][0]["top_logprobs"][0]["logprob"] = value
        return good

    return change(edit)


def with_top(edit):
    """Letters by token ids, with other values."""

    def behave(good, choice):
        if "logprobs" in choice and "top_logprobs" in choice["logprobs"]:
            top = choice["logprobs"]["top_logprobs"][0]
            choice["logprobs"]["top_logprobs"] = edit(top)
        return good

    return change(behave)


ODD_VALUES = {
    "NaN": float("nan"),
    "infinite": float("inf"),
    "minus infinite": float("-inf"),
    "positive": 2.5,
    "a text": "-0.1",
    "null": None,
    "true": True,
    "a list": [-0.1],
    "enormous": -(10**400),
}
for name, value in ODD_VALUES.items():
    kind(f"log-probability {name}", LINE, scoring="letters")(with_chat_top(value))
    kind(f"log-probability {name} by ids", LINE, "completions", "letters")(
        with_top(lambda top, value=value: [dict.fromkeys(top, value)])
    )
for name, edit in {
    "a number": lambda top: 5,
    "a text": lambda top: "abc",
    "of a number": lambda top: [5],
    "a list of lists": lambda top: [[[1, 2]]],
}.items():
    kind(f"alternatives {name}", LINE, "completions", "letters")(with_top(edit))
for name, value in {
    "null": None,
    "a text": "abc",
    "a list": [1],
    "content a text": {"content": "abc"},
    "content of numbers": {"content": [1]},
    "content empty": {"content": []},
    "alternatives null": {"content": [{"token": "B", "top_logprobs": None}]},
    "alternatives of texts": {"content": [{"token": "B", "top_logprobs": ["B"]}]},
    "a token that is a number": {"content": [{"top_logprobs": [{"token": 5, "logprob": -1}]}]},
}.items():
    kind(f"log-probabilities {name}", LINE, scoring="letters")(with_choice(logprobs=value))


@kind("one id fewer from the second question on", LINE, "completions", "letters")
def forget_an_id(handler, good):
    if handler.asked > 1:
        top = good["choices"][0]["logprobs"]["top_logprobs"][0]
        del top[list(top)[1]]
    send(handler, good)


def with_echo(edit):
    """Letters of a server that refuses ids and echoes prompts; `edit` changes the echo."""

    def behave(handler, good):
        if "logprob_token_ids" in handler.body:
            send(handler, {"error": {"message": "unknown field"}}, 400)
            return
        logprobs = good["choices"][0]["logprobs"]
        if handler.asked > 8:  # The trial went well.
            good["choices"][0]["logprobs"] = edit(logprobs["token_logprobs"], handler.body)
        send(handler, good)

    return behave


for name, expected, edit in (
    ("well", RIGHT, lambda values, body: {"token_logprobs": values}),
    ("fewer tokens", LINE, lambda values, body: {"token_logprobs": values[5:]}),
    ("more tokens", LINE, lambda values, body: {"token_logprobs": [*values, -1.0, -1.0]}),
    ("a null", LINE, lambda values, body: {"token_logprobs": [None] * len(values)}),
    ("a positive value", LINE, lambda values, body: {"token_logprobs": [3.0] * len(values)}),
    ("NaN", LINE, lambda values, body: {"token_logprobs": [float("nan")] * len(values)}),
    ("texts", LINE, lambda values, body: {"token_logprobs": ["-1"] * len(values)}),
    ("a text", LINE, lambda values, body: {"token_logprobs": "x" * len(values)}),
    (
        "other tokens",
        LINE,
        lambda values, body: {"token_logprobs": values, "tokens": ["Z"] * len(values)},
    ),
    (
        "the tokens by id",
        RIGHT,
        lambda values, body: {
            "token_logprobs": values,
            "tokens": [f"token_id:{token}" for token in [*body["prompt"], 7]],
        },
    ),
):
    kind(f"echo with {name}", expected, "completions", "letters")(with_echo(edit))


@kind("503 to ids for a while, then a server of texts", LINE, "completions", "letters")
def hide_ids(handler, good):
    """What turned an accuracy of 23.5 % into one of 31.0 %: scoring changed without a word."""
    if "logprob_token_ids" in handler.body or handler.body.get("echo"):
        send(handler, {"error": {"message": "busy"}}, 503)
        return
    top = {"A": -0.2, "B": -1.0, "C": -3.0, "D": -4.0}
    good["choices"][0]["logprobs"] = {"top_logprobs": [top]}
    send(handler, good)
