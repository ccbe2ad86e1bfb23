"""How fast does a model answer, and how large is it? Latency under load, for letters and for texts.

    # transformers answers one request at a time.
    python bench/latency.py --model recipes/demo/base
    # This starts a vLLM server of its own.
    python bench/latency.py --model DIR --engine vllm --concurrency 1,8,32 --rate 4,16
    python bench/latency.py --model NAME --engine openai --server http://127.0.0.1:8000/v1 \\
        --tokenizer DIR --goodput ttft=500 --goodput tpot=50
    # Letters have one output token, so they have no TPOT.
    python bench/latency.py --model DIR --scoring
    # Bytes on disk, and in memory in 16 and 4 bits.
    python bench/latency.py --model DIR --sizes MERGED_DIR

Prompts are questions of --format and --path (default: the demonstration's). In a closed loop,
--concurrency requests are under way at any time. In an open loop, requests arrive as a Poisson
process of --rate per second, whether or not the earlier ones are answered. The client measures the
times: TTFT to the first token, TPOT per output token after it, ITL between pieces, E2EL to the last
piece (medqlora/engines/latency.py).

Every loop has questions of its own as long as the file has enough, and vLLM is started without its
prefix cache, because a prompt that was seen before would be answered sooner.
"""

import argparse
import asyncio
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from medqlora.core.entry import enter

    enter()

from rich.table import Table

from medqlora.core.command import (
    CommandParser,
    make_console,
    quiet_libraries,
    run_command,
    run_early,
    whole,
)
from medqlora.core.config import DataEntry, Model
from medqlora.core.environment import describe_environment, name_command, prefer_expandable_segments
from medqlora.core.files import check_new, write_json
from medqlora.data.formats.registry import FORMATS
from medqlora.data.reading import read_entry
from medqlora.engines.interface import Engine, Request
from medqlora.engines.latency import (
    LatencyError,
    Served,
    describe_scoring,
    draw_arrivals,
    parse_objectives,
    summarize,
    time_scoring,
)
from medqlora.engines.server_address import check_address, hide_secrets, read_key

QUESTIONS = Path(__file__).parents[1] / "recipes" / "demo" / "data" / "test.jsonl"


def parse_arguments() -> argparse.Namespace:
    """Read and check the command line."""
    parser = CommandParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_engine_flags(parser)
    add_question_flags(parser)
    add_load_flags(parser)
    parser.add_argument(
        "--sizes",
        nargs="*",
        metavar="DIR",
        help="instead of times: sizes of --model and of these folders, on disk and in memory",
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file, after each loop")
    arguments = parser.parse_args()
    check_arguments(arguments)
    return arguments


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, help="folder or hub id; --engine openai: the server's name for it"
    )
    parser.add_argument(
        "--engine", choices=["hf", "vllm", "openai"], default="hf", help="what answers (default hf)"
    )
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16", "nf4"],
        default="auto",
        help="compute dtype; nf4: hf only (default auto)",
    )
    parser.add_argument("--server", help="openai: address up to /v1")
    parser.add_argument(
        "--api_key_variable",
        default="OPENAI_API_KEY",
        help="openai: environment variable with the key (default %(default)s)",
    )
    parser.add_argument("--tokenizer", help="openai: folder or hub id of the model's tokenizer")


def add_question_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format",
        choices=sorted(FORMATS),
        default="medmcqa",
        help="format of the questions (default medmcqa)",
    )
    parser.add_argument(
        "--path",
        default=str(QUESTIONS),
        help="file of the questions (default: the demonstration's)",
    )
    parser.add_argument(
        "--prompt_style",
        choices=["auto", "chat", "plain", "lm_eval"],
        default="auto",
        help="style of the prompts (default auto)",
    )
    parser.add_argument(
        "--scoring", action="store_true", help="time letter scoring instead of texts"
    )


def add_load_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--concurrency", default="1,4", metavar="N,N", help="closed loops (default 1,4)"
    )
    parser.add_argument("--rate", default="", metavar="R,R", help="open loops, requests per second")
    parser.add_argument(
        "--requests", type=whole(1), default=32, help="requests of each loop (default 32)"
    )
    parser.add_argument(
        "--output_tokens",
        type=whole(1),
        default=32,
        help="tokens of each answer at most (default 32)",
    )
    parser.add_argument(
        "--goodput",
        action="append",
        default=[],
        metavar="MEASURE=MS",
        help="objective: ttft=, tpot= or e2el= milliseconds",
    )
    parser.add_argument("--seed", type=whole(0), default=0, help="seed of the arrivals (default 0)")


def check_arguments(arguments: argparse.Namespace) -> None:
    check_new(arguments.json, "--json")
    if arguments.engine == "openai" and not (arguments.server and arguments.tokenizer):
        raise LatencyError("--engine openai needs --server ADDRESS and --tokenizer DIR")
    if arguments.engine == "openai":
        check_address(arguments.server)
        read_key(os.environ, arguments.api_key_variable)
    if arguments.dtype == "nf4" and arguments.engine != "hf":
        raise LatencyError(
            f"--dtype nf4 --engine {arguments.engine}: only hf runs 4-bit bases; merge first"
            " (recipes/merge_adapter.py)"
        )
    # Both raise for a value that is not allowed. They are called again where it is used.
    list_loads(arguments)
    parse_objectives(arguments.goodput)


def list_loads(arguments: argparse.Namespace) -> list[tuple[str, float]]:
    """Each loop's kind, concurrency or rate, and its level."""
    closed = parse_levels("--concurrency", arguments.concurrency, whole=True)
    opened = parse_levels("--rate", arguments.rate, whole=False)
    if not closed and not opened:
        raise LatencyError("--concurrency and --rate are empty; give at least one level")
    return [("concurrency", level) for level in closed] + [("rate", level) for level in opened]


MOST_LOAD = 100_000  # One machine cannot hold more connections than this.


def parse_levels(flag: str, text: str, whole: bool) -> list[float]:
    try:
        levels = [float(part) for part in text.split(",")] if text else []
    except ValueError:
        # NaN fails the comparison below, which then reports the flag.
        levels = [math.nan]
    for level in levels:
        if not 0 < level <= MOST_LOAD or (whole and not level.is_integer()):
            expected = "whole numbers" if whole else "numbers"
            raise LatencyError(
                f"{flag} {text}: expected {expected} above 0 and up to {MOST_LOAD:,}, e.g. 1,8"
            )
    return levels


if __name__ == "__main__":
    # Importing torch takes seconds, so mistakes are reported before. torch reads the allocator's
    # variable when it is imported.
    ARGUMENTS = run_early(parse_arguments)
    prefer_expandable_segments(os.environ)

import torch

from medqlora.engines.hf import HfEngine
from medqlora.engines.packed_passes import plain_generation
from medqlora.evaluation.method import Method
from medqlora.evaluation.questions import prepare_questions
from medqlora.model.base import load_base, load_tokenizer
from medqlora.model.hardware import default_device
from medqlora.model.quantization import count_bytes
from medqlora.prompts.chat_template import make_encoder

START_SECONDS = 600  # A server may take so long to load.

console = make_console(soft_wrap=True)

# An Answer takes the token ids of a prompt.
Answer = Callable[[list[int]], Awaitable[Served]]


def main() -> None:
    arguments = ARGUMENTS
    quiet_libraries()
    figures = {
        "command": name_command("bench/latency.py", sys.argv[1:]),
        "environment": describe_environment(),
        "engine": arguments.engine,
        "model": arguments.model,
    }
    if arguments.sizes is not None:
        sizes = measure_sizes([arguments.model, *arguments.sizes])
        save(arguments, figures | {"sizes": sizes})
        return
    # Scoring asks one half of the prompts alone and the other half in one batch.
    loops = 2 if arguments.scoring else len(list_loads(arguments))
    requests, distinct = read_questions(arguments, loops)
    mean = sum(len(request.prefix) for request in requests) / len(requests)
    console.print(
        f"{len(requests):,} prompts of {mean:.0f} tokens on average, engine {arguments.engine}"
    )
    if not distinct:
        console.print(
            "the file has fewer questions: prompts repeat, which a server's prefix cache answers"
            " sooner",
            style="yellow",
        )
    figures["prompts_repeat"] = not distinct
    if arguments.scoring:
        scoring = time_scoring(make_scorer(arguments, requests), requests)
        console.print(describe_scoring(scoring))
        save(arguments, figures | {"scoring": scoring})
    else:
        run_loops(arguments, requests, figures)


def save(arguments: argparse.Namespace, figures: dict) -> None:
    if arguments.json:
        write_json(arguments.json, figures)


def read_questions(arguments: argparse.Namespace, loops: int) -> tuple[list[Request], bool]:
    """--requests prompts for each loop, with the letters they can be answered by, and whether they
    are distinct: a file with fewer questions is repeated.
    """
    count = arguments.requests * loops
    tokenizer = load_tokenizer(arguments.tokenizer or arguments.model)
    encoder = make_encoder(tokenizer, arguments.prompt_style)
    entry = DataEntry(format=arguments.format, path=arguments.path, limit=count)
    reading = read_entry(entry, "test")
    print(reading.description)
    questions, _ = prepare_questions(encoder, reading.examples, Method())
    requests = [question.requests[0] for question in questions]
    if not requests:
        raise LatencyError(f"--path {arguments.path}: no question in it")
    return [requests[i % len(requests)] for i in range(count)], len(requests) >= count


def load_hf(arguments: argparse.Namespace) -> tuple[torch.nn.Module, str]:
    """The model in transformers, and its attention backend."""
    quantization = "none"
    dtype = arguments.dtype
    if dtype == "nf4":
        quantization = "nf4"
        # nf4 names how weights are stored, and the dtype of computing is chosen as usual.
        dtype = "auto"
    model = Model(base=arguments.model, quantization=quantization, dtype=dtype)
    return load_base(model, default_device())


# ---- letters -------------------------------------------------------------------------------------


def make_scorer(arguments: argparse.Namespace, requests: list[Request]) -> Engine:
    if arguments.engine == "hf":
        return HfEngine(*load_hf(arguments))
    if arguments.engine == "vllm":
        from medqlora.engines.vllm import VllmEngine

        return VllmEngine(
            arguments.model,
            None,
            dtype=arguments.dtype,
            # vLLM counts the one token that it answers too.
            max_length=max(len(request.prefix) for request in requests) + 1,
            prefix_caching=False,
        )
    from medqlora.engines.openai import CompletionsEngine, Connection

    tokenizer = load_tokenizer(arguments.tokenizer)
    key = read_key(os.environ, arguments.api_key_variable)
    connection = Connection(arguments.server, arguments.model, key)
    return CompletionsEngine(connection, tokenizer.decode)


# ---- texts ---------------------------------------------------------------------------------------


@contextmanager
def start_answering(arguments: argparse.Namespace, requests: list[Request]) -> Iterator[Answer]:
    """A coroutine function that answers one prompt."""
    if arguments.engine == "hf":
        with answer_with_hf(arguments) as answer:
            yield answer
    elif arguments.engine == "vllm":
        longest = max(len(request.prefix) for request in requests)
        with serve_vllm(arguments, longest) as address:
            yield Client(arguments, address, "none").answer
    else:
        key = read_key(os.environ, arguments.api_key_variable) or "none"
        yield Client(arguments, arguments.server, key).answer


@contextmanager
def answer_with_hf(arguments: argparse.Namespace) -> Iterator[Answer]:
    """Let transformers answer one request after the other. The time that a request waits in the
    queue counts.
    """
    base, _ = load_hf(arguments)
    device = default_device()

    @torch.inference_mode()
    def generate(prompt: list[int], sent: float) -> Served:
        cache = None
        tokens = torch.tensor([prompt], device=device)  # int64 [1, prompt tokens], later [1, 1]
        arrivals = []
        # An end token does not end the loop, so all answers are equally long.
        for _ in range(arguments.output_tokens):
            # The head runs at the last position only: out.logits is [1, 1, vocab].
            out = base(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            tokens = out.logits[:, -1:].argmax(-1)
            # A token has arrived when the client can read it, so this waits for the device.
            tokens.tolist()
            arrivals.append(time.perf_counter())
        return Served(sent, tuple(arrivals), len(arrivals))

    with ThreadPoolExecutor(1) as queue, plain_generation(base):

        async def answer(prompt: list[int]) -> Served:
            loop = asyncio.get_running_loop()
            # The time is read here and not in the thread, so a wait in the queue counts as latency.
            return await loop.run_in_executor(queue, generate, prompt, time.perf_counter())

        yield answer


@contextmanager
def serve_vllm(arguments: argparse.Namespace, longest: int) -> Iterator[str]:
    """Start a vLLM server with this Python on a free local port -> its address.

    Args:
        longest: tokens of the longest prompt.
    """
    with socket.socket() as free:
        # The system names a free port. Another program could take it before the server does.
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [
        f"--model={arguments.model}",
        f"--served-model-name={arguments.model}",
        "--host=127.0.0.1",
        f"--port={port}",
        f"--dtype={arguments.dtype}",
        f"--max-model-len={longest + arguments.output_tokens + 1}",
        "--no-enable-prefix-caching",
    ]
    if not torch.cuda.is_available():
        # Without a GPU there are no CUDA graphs to capture.
        flags.append("--enforce-eager")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        with log.open("w") as file:
            command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags]
            # Ctrl-C reaches this process alone, because the server is in another session. It is
            # ended below.
            server = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
        try:
            wait_until_healthy(server, port, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()


def wait_until_healthy(server: subprocess.Popen, port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            return
        # urllib's errors are OSErrors, also that of a server that answers with an error code.
        except OSError:
            time.sleep(0.5)
    lines = [line for line in log.read_text(errors="replace").splitlines() if "Error" in line]
    reason = lines[-1].strip()[:300] if lines else "no reason in its log"
    raise LatencyError(
        f"the vLLM server did not start: {reason}; is vllm installed for {sys.executable}?"
    )


class Client:
    """Streams completions of an OpenAI-compatible server at an address that ends in /v1."""

    def __init__(self, arguments: argparse.Namespace, address: str, key: str):
        try:
            import openai
        except ImportError:
            raise LatencyError(
                "the openai package is not installed here; pip install -e '.[openai]'"
            ) from None
        self.openai = openai
        self.address = address
        self.key = key
        self.model = arguments.model
        self.output_tokens = arguments.output_tokens
        self.tokenizer = load_tokenizer(arguments.tokenizer or arguments.model)
        # vLLM is told to go on after an end token, so that all answers are equally long, and to
        # count its tokens. A server that refuses either is asked without.
        self.optional = {
            "extra_body": {"ignore_eos": True},
            "stream_options": {"include_usage": True},
        }
        self.connection = None

    async def open_stream(self, prompt: list[int]):
        while True:
            try:
                return await self.connection.completions.create(
                    model=self.model,
                    prompt=prompt,
                    max_tokens=self.output_tokens,
                    temperature=0,
                    stream=True,
                    **self.optional,
                )
            except self.openai.BadRequestError:
                if not self.optional:
                    raise
                # A dict keeps its order, so ignore_eos is given up before the count of tokens.
                del self.optional[next(iter(self.optional))]

    async def answer(self, prompt: list[int]) -> Served:
        # Making a connection takes a while, and it belongs to the event loop that uses it.
        if self.connection is None:
            # A request that is sent again would be measured as one slow answer, hence no retries.
            self.connection = self.openai.AsyncOpenAI(
                base_url=self.address,
                api_key=self.key,
                max_retries=0,
                timeout=600,
                # A redirect could send prompts and key to another server.
                http_client=self.openai.DefaultAsyncHttpxClient(follow_redirects=False),
            )
        sent = time.perf_counter()
        arrivals = []
        tokens = 0
        text = ""
        ended = False
        try:
            async for piece in await self.open_stream(prompt):
                # Every piece is an arrival, even one without text, as in vLLM's own benchmark. The
                # piece that brings the count of tokens has no choices and is none.
                if piece.choices:
                    arrivals.append(time.perf_counter())
                    text += piece.choices[0].text or ""
                    ended = ended or piece.choices[0].finish_reason is not None
                tokens = piece.usage.completion_tokens if piece.usage else tokens
        except self.openai.OpenAIError as error:
            raise LatencyError(
                f"server {self.address}: {hide_secrets(str(error), self.key)}; is it running, and"
                f" does it serve {self.model}?"
            ) from None
        # The openai package lets errors of its HTTP library through where a connection breaks in
        # the middle of a stream, and which library that is depends on its version.
        except Exception as error:  # noqa: BLE001
            raise LatencyError(
                f"server {self.address} broke off an answer: {type(error).__name__}; look"
                " at its log"
            ) from None
        # A broken stream may end like a complete one. Only the reason for the end tells them apart.
        if not ended:
            raise LatencyError(
                f"server {self.address} broke off an answer after {len(arrivals)} pieces, without a"
                " reason for its end; look at its log"
            )
        # A server that counts no tokens leaves only the text to count.
        counted = max(1, len(self.tokenizer.encode(text, add_special_tokens=False)))
        return Served(sent, tuple(arrivals), tokens or counted)


def run_loops(arguments: argparse.Namespace, requests: list[Request], figures: dict) -> None:
    """Run every loop and show the table, also where a server dies under a later loop."""
    figures |= {"loops": [], "complete": False}
    prompts = [request.prefix for request in requests]
    with start_answering(arguments, requests) as answer:
        try:
            asyncio.run(time_loops(answer, prompts, arguments, figures))
            save(arguments, figures | {"complete": True})
        finally:
            if figures["loops"]:
                show(figures["loops"])


async def time_loops(
    answer: Answer, prompts: list[list[int]], arguments: argparse.Namespace, figures: dict
) -> None:
    """Run each load on its own prompts, after two answers that do not count. Its figures are saved
    as soon as they are there.
    """
    # These two load kernels and open connections.
    for _ in range(2):
        await answer(prompts[-1])
    count = arguments.requests
    objectives = parse_objectives(arguments.goodput)
    for number, (kind, level) in enumerate(list_loads(arguments)):
        chosen = prompts[number * count : (number + 1) * count]
        served, seconds = await time_loop(answer, chosen, kind, level, arguments.seed)
        # Rates of short answers do not compare with those of full ones, so their number is
        # recorded.
        short = sum(one.tokens < arguments.output_tokens for one in served)
        summary = summarize(served, seconds, objectives)
        figures["loops"].append({kind: level} | summary | {"short_answers": short})
        save(arguments, figures)


async def time_loop(
    answer: Answer, prompts: list[list[int]], kind: str, level: float, seed: int
) -> tuple[list[Served], float]:
    """Send all prompts under one load -> what was served, and the seconds from the first request to
    the last answer.
    """
    began = time.perf_counter()
    if kind == "rate":

        async def arrive(prompt: list[int], at: float) -> Served:
            # Requests have absolute times, so one that is sent late does not shift those after it.
            await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
            return await answer(prompt)

        arrivals = draw_arrivals(len(prompts), level, seed)
        tasks = [arrive(prompt, at) for prompt, at in zip(prompts, arrivals, strict=True)]
    else:
        # A request is sent when its turn comes, so a wait at the gate is no part of its latency.
        gate = asyncio.Semaphore(int(level))

        async def wait_for_turn(prompt: list[int]) -> Served:
            async with gate:
                return await answer(prompt)

        tasks = [wait_for_turn(prompt) for prompt in prompts]
    served = await asyncio.gather(*tasks)
    return served, max(one.arrivals[-1] for one in served) - began


def show(loops: list[dict]) -> None:
    table = Table(title="latency in milliseconds", title_justify="left")
    table.add_column("load")
    columns = ["requests/s", "tokens/s"]
    for measure in ("TTFT", "TPOT", "ITL", "E2EL"):
        columns += [f"{measure} p50", "p99"]
    for column in [*columns, "goodput/s"]:
        table.add_column(column, justify="right")
    for loop in loops:
        if "concurrency" in loop:
            row = [f"{loop['concurrency']:g} at a time"]
        else:
            row = [f"{loop['rate']:g} per second"]
        row.append(f"{loop['requests_per_second']:,.2f}")
        row.append(f"{loop['output_tokens_per_second']:,.0f}")
        for measure in ("ttft", "tpot", "itl", "e2el"):
            for quantile in ("p50", "p99"):
                times = loop[f"{measure}_ms"]
                row.append(f"{times[quantile]:,.1f}" if times else "–")
        goodput = loop["goodput_requests_per_second"]
        row.append("" if goodput is None else f"{goodput:,.2f}")
        table.add_row(*row)
    make_console(width=None if sys.stdout.isatty() else 160).print(table)


# ---- sizes ---------------------------------------------------------------------------------------


def measure_sizes(models: list[str]) -> list[dict]:
    """Bytes of each model's weight files, and of its loaded tensors in 16 bits and in NF4."""
    device = default_device()
    table = Table(title="sizes in MiB", title_justify="left")
    table.add_column("model")
    for column in ("weights on disk", "loaded, 16 bits", "loaded, nf4"):
        table.add_column(column, justify="right")
    results = []
    for model in models:
        folder = Path(model).expanduser()
        if not folder.is_dir():
            raise LatencyError(f"--sizes {model}: no such folder; sizes are of folders")
        sizes = {
            "disk_bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        }
        for key, quantization in (("loaded_16_bit_bytes", "none"), ("loaded_nf4_bytes", "nf4")):
            chosen = Model(base=model, quantization=quantization, dtype="bfloat16")
            base, _ = load_base(chosen, device)
            sizes[key] = count_bytes(base)
            del base  # Two models need not fit the memory at once.
        table.add_row(folder.name, *(f"{size / 2**20:,.1f}" for size in sizes.values()))
        results.append({"model": model} | sizes)
    console.print(table)
    return results


if __name__ == "__main__":
    run_command(main)
