"""How fast does it answer? Latency under load, of letters and of texts; and how large a model is.

    python bench/latency.py --model recipes/demo/base  # transformers, one request at a time
    # starts a vLLM server of its own
    python bench/latency.py --model DIR --engine vllm --concurrency 1,8,32 --rate 4,16
    python bench/latency.py --model NAME --engine openai --server http://127.0.0.1:8000/v1 \\
        --tokenizer DIR --goodput ttft=500 --goodput tpot=50
    python bench/latency.py --model DIR --scoring  # letters: one output token, so no TPOT
    # bytes on disk, and in memory in 16 and 4 bits
    python bench/latency.py --model DIR --sizes MERGED_DIR

Prompts are questions of --format and --path (default: the demonstration's). Closed loop:
--concurrency requests are under way at any time. Open loop: requests arrive as a Poisson process of
--rate per second, whether or not the earlier ones are done. Times are the client's: TTFT to the
first token, TPOT per output token after it, ITL between pieces, E2EL to the last
(medqlora/latency.py).

Every loop has questions of its own as far as the file goes, and vLLM is started without its prefix
cache: a prompt that was seen before would be answered sooner.
"""

import argparse
import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import warnings
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from medqlora.core.command import run_command, run_early
from medqlora.core.config import DataEntry, Model
from medqlora.core.environment import describe_environment, name_command, prefer_expandable_segments
from medqlora.core.files import check_new, write_json
from medqlora.data.formats.registry import FORMATS
from medqlora.data.reading import read_examples
from medqlora.engines.interface import Request
from medqlora.engines.latency import (
    LatencyError,
    Served,
    describe,
    draw_arrivals,
    parse_objectives,
    summarize,
)
from medqlora.model.hardware import default_device

QUESTIONS = Path(__file__).parents[1] / "recipes" / "demo" / "data" / "test.jsonl"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
        help="default auto",
    )
    parser.add_argument(
        "--scoring", action="store_true", help="time letter scoring instead of texts"
    )
    parser.add_argument(
        "--concurrency", default="1,4", metavar="N,N", help="closed loops (default 1,4)"
    )
    parser.add_argument("--rate", default="", metavar="R,R", help="open loops, requests per second")
    parser.add_argument(
        "--requests", type=int, default=32, help="requests of each loop (default 32)"
    )
    parser.add_argument(
        "--output_tokens", type=int, default=32, help="tokens of each answer at most (default 32)"
    )
    parser.add_argument(
        "--goodput",
        action="append",
        default=[],
        metavar="MEASURE=MS",
        help="objective: ttft=, tpot= or e2el= milliseconds",
    )
    parser.add_argument(
        "--sizes",
        nargs="*",
        metavar="DIR",
        help="instead of times: sizes of --model and of these, on disk and in memory",
    )
    parser.add_argument("--seed", type=int, default=0, help="of arrivals (default 0)")
    parser.add_argument("--json", type=Path, help="write the figures to this file, after each loop")
    return parser.parse_args()


if __name__ == "__main__":
    # A mistake is said before torch is imported, which takes seconds. torch reads the allocator's
    # variable when it is imported.
    ARGUMENTS = run_early(parse_arguments)
    prefer_expandable_segments(os.environ)

import torch
import transformers

from medqlora.engines.hf import HfEngine, plain_generation
from medqlora.evaluation.method import Method
from medqlora.evaluation.questions import prepare_questions
from medqlora.model.base import load_base, load_tokenizer
from medqlora.model.quantization import list_constants
from medqlora.prompts.chat_template import make_encoder

START_SECONDS = 600  # that a server may take to load


console = Console(highlight=False, soft_wrap=True)


Ask = Callable[[list[int]], Awaitable[Served]]


def main() -> None:
    arguments = ARGUMENTS
    warnings.simplefilter("ignore", FutureWarning)  # Libraries warn each other.
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    loops, objectives = check(arguments)
    found = {
        "command": name_command("bench/latency.py", sys.argv[1:]),
        "environment": describe_environment(),
        "engine": arguments.engine,
        "model": arguments.model,
    }
    if arguments.sizes is not None:
        keep(arguments, found | {"sizes": measure_sizes([arguments.model, *arguments.sizes])})
        return
    requests, distinct = read_questions(arguments, 2 if arguments.scoring else len(loops))
    console.print(
        f"{len(requests):,} prompts of {sum(len(r.prefix) for r in requests) / len(requests):.0f}"
        f" tokens on average, engine {arguments.engine}"
    )
    if not distinct:
        console.print(
            "[yellow]the file has fewer questions: prompts repeat, which a server's prefix cache"
            " answers sooner"
        )
    found["prompts_repeat"] = not distinct
    with start_engine(arguments, requests) as ask_engine:
        if arguments.scoring:
            keep(arguments, found | {"scoring": time_scoring(ask_engine, requests)})
            return
        found |= {"loops": [], "complete": False}
        try:
            asyncio.run(
                run_loops(
                    ask_engine, [r.prefix for r in requests], loops, arguments, objectives, found
                )
            )
            keep(arguments, found | {"complete": True})
        finally:  # Results are shown after a server died, too.
            if found["loops"]:
                show(found["loops"])


def check(arguments: argparse.Namespace) -> tuple[list[tuple[str, float]], dict[str, float]]:
    """-> loads as (kind, level), and objectives."""
    check_new(arguments.json, "--json")
    if arguments.engine == "openai" and not (arguments.server and arguments.tokenizer):
        raise LatencyError("--engine openai needs --server ADDRESS and --tokenizer DIR")
    if arguments.dtype == "nf4" and arguments.engine != "hf":
        raise LatencyError(
            f"--dtype nf4 --engine {arguments.engine}: 4-bit bases are run by hf; merge first"
            " (recipes/merge_adapter.py)"
        )
    if arguments.requests < 1 or arguments.output_tokens < 1:
        raise LatencyError(
            f"--requests {arguments.requests}, --output_tokens {arguments.output_tokens}: expected"
            " 1 or more"
        )
    if arguments.seed < 0:
        raise LatencyError(f"--seed {arguments.seed}: expected 0 or more")
    loops = [
        ("concurrency", level) for level in parse_levels("--concurrency", arguments.concurrency)
    ]
    loops += [("rate", level) for level in parse_levels("--rate", arguments.rate)]
    return loops, parse_objectives(arguments.goodput)


def parse_levels(flag: str, text: str) -> list[float]:
    """Loads: of --concurrency whole numbers, of --rate any above 0."""
    try:
        levels = [float(part) for part in text.split(",")] if text else []
    except ValueError:
        levels = [-1.0]
    whole = flag == "--concurrency"
    if not all(0 < level < float("inf") and (level.is_integer() or not whole) for level in levels):
        raise LatencyError(
            f"{flag} {text}: expected {'whole ' if whole else ''}numbers above 0, e.g. 1,8"
        )
    return levels


def keep(arguments: argparse.Namespace, found: dict) -> None:
    if arguments.json:
        write_json(arguments.json, found)


def read_questions(arguments: argparse.Namespace, loops: int) -> tuple[list[Request], bool]:
    """Prompts with the letters they can be answered by, --requests for each loop; the file's over
    again where it has fewer (then False)."""
    tokenizer = load_tokenizer(arguments.tokenizer or arguments.model)
    wanted = arguments.requests * loops
    encoder = make_encoder(tokenizer, arguments.prompt_style)
    examples, _ = read_examples(
        DataEntry(format=arguments.format, path=arguments.path, limit=wanted), "test"
    )
    questions, _ = prepare_questions(encoder, examples, Method())
    requests = [entry.requests[0] for entry in questions]
    if not requests:
        raise LatencyError(f"--path {arguments.path}: no question in it")
    return [requests[i % len(requests)] for i in range(wanted)], len(requests) >= wanted


@contextmanager
def start_engine(arguments: argparse.Namespace, requests: list[Request]):
    """What answers: for texts a coroutine function, for letters an engine of medqlora.engines."""
    if arguments.engine == "hf":
        yield from run_hf(arguments)
    elif arguments.engine == "vllm" and arguments.scoring:
        from medqlora.engines.vllm import VllmEngine

        yield VllmEngine(
            arguments.model,
            None,
            dtype=arguments.dtype,
            max_length=max(len(r.prefix) for r in requests) + 1,
            prefix_caching=False,
        )
    elif arguments.engine == "vllm":
        with serve_vllm(arguments, max(len(r.prefix) for r in requests)) as server:
            yield ask_server(
                server,
                arguments.model,
                None,
                arguments.output_tokens,
                load_tokenizer(arguments.model),
            )
    else:
        key = os.environ.get(arguments.api_key_variable)
        if arguments.scoring:
            from medqlora.engines.openai import CompletionsEngine, Connection

            connection = Connection(arguments.server, arguments.model, key)
            yield CompletionsEngine(connection, load_tokenizer(arguments.tokenizer).decode)
        else:
            yield ask_server(
                arguments.server,
                arguments.model,
                key,
                arguments.output_tokens,
                load_tokenizer(arguments.tokenizer),
            )


def run_hf(arguments: argparse.Namespace):
    """transformers answers one request after the other: what waits, waits in its queue, and that
    counts.
    """
    device = default_device()
    quantized = arguments.dtype == "nf4"
    base, backend = load_base(
        Model(
            base=arguments.model,
            quantization="nf4" if quantized else "none",
            dtype="auto" if quantized else arguments.dtype,
        ),
        device,
    )
    if arguments.scoring:
        yield HfEngine(base, backend)
        return

    @torch.inference_mode()
    def generate(prompt: list[int], sent: float) -> Served:
        cache = None
        tokens = torch.tensor([prompt], device=device)
        arrivals = []
        for _ in range(arguments.output_tokens):
            out = base(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            tokens = out.logits[:, -1:].argmax(-1)
            tokens.tolist()  # waits for the device: a token has arrived when the client can read it
            arrivals.append(time.perf_counter())
        return Served(sent, tuple(arrivals), len(arrivals))

    with ThreadPoolExecutor(1) as queue, plain_generation(base):

        async def answer(prompt: list[int]) -> Served:
            return await asyncio.get_running_loop().run_in_executor(
                queue, generate, prompt, time.perf_counter()
            )

        yield answer


@contextmanager
def serve_vllm(arguments: argparse.Namespace, longest: int):
    """A vLLM server of this Python on a free local port; -> its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [
        "--model",
        arguments.model,
        "--served-model-name",
        arguments.model,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--dtype",
        arguments.dtype,
        "--max-model-len",
        str(longest + arguments.output_tokens + 1),
        "--no-enable-prefix-caching",
    ]
    if not torch.cuda.is_available():
        flags += ["--enforce-eager"]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        with log.open("w") as file:
            command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags]
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
        except OSError:
            time.sleep(0.5)
    lines = [line for line in log.read_text(errors="replace").splitlines() if "Error" in line] or [
        "no reason in its log"
    ]
    raise LatencyError(
        f"the vLLM server did not start: {lines[-1].strip()[:300]}; is vllm installed for"
        f" {sys.executable}?"
    )


def ask_server(address: str, model: str, key: str | None, output_tokens: int, tokenizer) -> Ask:
    """Streams completions of an OpenAI-compatible server. vLLM is told to go on after an end token,
    so that answers are equally long, and to say how many tokens it gave; a server that refuses
    either is asked without."""
    try:
        import openai
    except ImportError:
        raise LatencyError(
            "the openai package is not installed here; pip install 'medqlora[openai]'"
        ) from None
    optional = [{"extra_body": {"ignore_eos": True}}, {"stream_options": {"include_usage": True}}]
    clients = []

    async def open_stream(prompt: list[int]):
        body = {
            "model": model,
            "prompt": prompt,
            "max_tokens": output_tokens,
            "temperature": 0,
            "stream": True,
        }
        while True:
            try:
                return await clients[0].completions.create(
                    **body, **{key: value for part in optional for key, value in part.items()}
                )
            except openai.BadRequestError:
                if not optional:
                    raise
                del optional[0]

    async def answer(prompt: list[int]) -> Served:
        if not clients:  # made once, in the loop that uses it: it takes a while
            clients.append(
                openai.AsyncOpenAI(
                    base_url=address, api_key=key or "none", max_retries=0, timeout=600
                )
            )
        sent = time.perf_counter()
        arrivals = []
        tokens = 0
        text = ""
        ended = False
        try:
            async for piece in await open_stream(prompt):
                if piece.choices:
                    arrivals.append(time.perf_counter())
                    text += piece.choices[0].text or ""
                    ended = ended or piece.choices[0].finish_reason is not None
                tokens = piece.usage.completion_tokens if piece.usage else tokens
        except openai.OpenAIError as error:
            raise LatencyError(
                f"server {address}: {' '.join(str(error).split())[:200]}; is it running, and does"
                f" it serve {model}?"
            ) from None
        # a connection that breaks while it streams: of whatever HTTP library the openai package
        # uses
        except Exception as error:  # noqa: BLE001
            raise LatencyError(
                f"server {address} broke off an answer: {type(error).__name__} {error}; look at"
                " its log"
            ) from None
        if not ended:
            raise LatencyError(
                f"server {address} broke off an answer after {len(arrivals)} pieces, without a"
                " reason for its end; look at its log"
            )
        return Served(
            sent,
            tuple(arrivals),
            tokens or max(1, len(tokenizer.encode(text, add_special_tokens=False))),
        )

    return answer


async def run_loops(
    answer: Ask,
    prompts: list[list[int]],
    loops: list[tuple[str, float]],
    arguments,
    objectives: dict[str, float],
    found: dict,
) -> None:
    """Every load in turn on its own prompts, after two answers that do not count; each is kept as
    soon as it is there.
    """
    for _ in range(2):
        await answer(prompts[-1])
    count = arguments.requests
    for number, (kind, level) in enumerate(loops):
        served, seconds = await run_loop(
            answer, prompts[number * count : (number + 1) * count], kind, level, arguments
        )
        short = sum(s.tokens < arguments.output_tokens for s in served)
        found["loops"].append(
            {kind: level} | summarize(served, seconds, objectives) | {"short_answers": short}
        )
        keep(arguments, found)


async def run_loop(
    answer: Ask, prompts: list[list[int]], kind: str, level: float, arguments: argparse.Namespace
) -> tuple[list[Served], float]:
    """All prompts under one load; -> what was served, and the seconds from the first request to the
    last answer.
    """
    began = time.perf_counter()
    if kind == "rate":
        places = draw_arrivals(len(prompts), level, arguments.seed)

        async def arrive(prompt: list[int], at: float) -> Served:
            await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
            return await answer(prompt)

        tasks = [arrive(prompt, at) for prompt, at in zip(prompts, places, strict=True)]
    else:
        gate = asyncio.Semaphore(int(level))

        async def wait_for_turn(prompt: list[int]) -> Served:
            async with gate:
                return await answer(prompt)

        tasks = [wait_for_turn(prompt) for prompt in prompts]
    served = await asyncio.gather(*tasks)
    return served, max(s.arrivals[-1] for s in served) - began


def time_scoring(engine, requests: list[Request]) -> dict:
    """Letters: one half of the questions each alone, the other half together."""
    alone = requests[: len(requests) // 2]
    others = requests[len(requests) // 2 :]
    engine.score(alone[:2])
    seconds = []
    for request in alone:
        began = time.perf_counter()
        engine.score([request])
        seconds.append(time.perf_counter() - began)
    began = time.perf_counter()
    engine.score(others)
    together = time.perf_counter() - began
    tokens = sum(len(request.prefix) for request in others)
    found = {
        "questions": len(others),
        "e2el_ms": describe(seconds),
        "questions_per_second_alone": len(alone) / sum(seconds),
        "questions_per_second": len(others) / together,
        "prefill_tokens_per_second": tokens / together,
    }
    console.print(
        f"letters, {len(others)} questions: alone p50 {found['e2el_ms']['p50']:.1f} ms, p99"
        f" {found['e2el_ms']['p99']:.1f} ms; together {found['questions_per_second']:,.1f}"
        f" questions/s, {found['prefill_tokens_per_second']:,.0f} prompt tokens/s"
    )
    return found


def measure_sizes(models: list[str]) -> list[dict]:
    """Bytes of each model's weight files, and of its loaded tensors in 16 bits and in NF4."""
    device = default_device()
    table = Table(title="sizes in MiB", title_justify="left")
    for column in ("model", "weights on disk", "loaded, 16 bits", "loaded, nf4"):
        table.add_column(column, justify="left" if column == "model" else "right")
    found = []
    for model in models:
        folder = Path(model).expanduser()
        if not folder.is_dir():
            raise LatencyError(f"--sizes {model}: no such folder; sizes are of folders")
        sizes = {
            "model": model,
            "disk_bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        }
        for name in ("none", "nf4"):
            base, _ = load_base(Model(base=model, quantization=name, dtype="bfloat16"), device)
            sizes["loaded_16_bit_bytes" if name == "none" else "loaded_nf4_bytes"] = count_bytes(
                base
            )
            del base
        table.add_row(
            folder.name,
            *(
                f"{sizes[key] / 2**20:,.1f}"
                for key in ("disk_bytes", "loaded_16_bit_bytes", "loaded_nf4_bytes")
            ),
        )
        found.append(sizes)
    console.print(table)
    return found


def count_bytes(base: torch.nn.Module) -> int:
    """Of all weights, buffers and quantization constants."""
    tensors = [
        *base.parameters(),
        *base.buffers(),
        *(tensor for parameter in base.parameters() for tensor in list_constants(parameter)),
    ]
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors
    }
    return sum(storages.values())


def show(loops: list[dict]) -> None:
    table = Table(title="latency in milliseconds", title_justify="left")
    columns = (
        "load",
        "requests/s",
        "tokens/s",
        "TTFT p50",
        "p99",
        "TPOT p50",
        "p99",
        "ITL p50",
        "p99",
        "E2EL p50",
        "p99",
        "goodput/s",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "load" else "right")
    for loop in loops:
        load = (
            f"{loop['concurrency']:g} at a time"
            if "concurrency" in loop
            else f"{loop['rate']:g} per second"
        )
        cells = [
            f"{loop[f'{name}_ms'][q]:,.1f}" if loop[f"{name}_ms"] else "–"
            for name in ("ttft", "tpot", "itl", "e2el")
            for q in ("p50", "p99")
        ]
        goodput = loop["goodput_requests_per_second"]
        table.add_row(
            load,
            f"{loop['requests_per_second']:,.2f}",
            f"{loop['output_tokens_per_second']:,.0f}",
            *cells,
            "" if goodput is None else f"{goodput:,.2f}",
        )
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table)


if __name__ == "__main__":
    run_command(main)
