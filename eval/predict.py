"""Answer questions with a model and write one prediction per line.

    python eval/predict.py --model BASE --adapter runs/mine/adapter --format medqa \\
        --path dev.jsonl --output tuned.jsonl

With an adapter, prompt style, completion and quantization are the ones it was trained with, unless
given here. Finished batches are kept in OUTPUT.parts: after a crash the same command goes on where
it stopped. --shard I/N answers a part of the questions; the process that finds all parts complete
writes OUTPUT. N may change between runs.
"""

import argparse
import json
import os
import sys
import warnings
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from medqlora.core.config import DataEntry, Model
from medqlora.core.environment import prefer_expandable_segments
from medqlora.core.errors import ConfigError, UserError
from medqlora.core.files import hash_json
from medqlora.data.cleaning import clean
from medqlora.data.examples import DataError, Example
from medqlora.data.formats.registry import FORMATS, find_format
from medqlora.data.reading import read_examples
from medqlora.engines.interface import BATCH_SIZE, Engine
from medqlora.evaluation.answering import predict
from medqlora.evaluation.journal import Journal, split_into_batches
from medqlora.evaluation.method import Method
from medqlora.evaluation.metrics import score_predictions
from medqlora.evaluation.predictions import (
    PredictionError,
    collect_rows,
    read_predictions,
    read_rows,
)
from medqlora.evaluation.questions import ask
from medqlora.prompts.chat_template import Encoder, make_encoder, make_text_encoder
from medqlora.prompts.fingerprint import fingerprint

console = Console(stderr=True, highlight=False, soft_wrap=True)


def parse_arguments() -> argparse.Namespace:
    defaults = Method()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        required=True,
        help=(
            "folder or hub id of the base or merged model; --engine openai: the server's name"
            " for it"
        ),
    )
    parser.add_argument("--adapter", type=Path, help="adapter folder of a run")
    parser.add_argument("--revision", help="hub commit or tag of the model")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16", "nf4", "fp4", "int8"],
        help=(
            "compute dtype, or a quantization (default: the adapter's quantization and dtype, else"
            " auto)"
        ),
    )
    data = parser.add_argument_group("questions")
    data.add_argument("--format", required=True, help=", ".join(FORMATS))
    data.add_argument("--path", help="file, folder or hub id (default: the dataset's hub home)")
    data.add_argument(
        "--split",
        help=(
            "split of a folder or hub id (default: the one that is scored by convention); a file is"
            " taken as it is"
        ),
    )
    data.add_argument("--subset", help="configuration of a hub dataset")
    data.add_argument(
        "--columns",
        type=parse_columns,
        default={},
        metavar="JSON",
        help="mcq, qa, text: JSON object {our field: column of the file}",
    )
    data.add_argument("--test_pmids", help="pubmedqa: file with the official test PMIDs")
    data.add_argument("--limit", type=int, help="only the first N questions")
    data.add_argument(
        "--drop_invalid", action="store_true", help="leave invalid rows out instead of stopping"
    )
    asking = parser.add_argument_group("asking")
    asking.add_argument(
        "--prompt_style",
        choices=["auto", "chat", "plain", "lm_eval"],
        help="default: the adapter's, else auto",
    )
    asking.add_argument(
        "--completion",
        choices=["letter", "letter_text", "explanation", "text"],
        help="default: the adapter's, else letter",
    )
    asking.add_argument(
        "--scoring",
        choices=["letters", "cloze", "generate", "perplexity"],
        help=(
            "how the answer is read (default: letters, generate for open questions, perplexity for"
            " texts)"
        ),
    )
    asking.add_argument(
        "--normalization",
        choices=["raw", "character", "token"],
        default=defaults.normalization,
        help="cloze: what an option's log-probability is divided by (default %(default)s)",
    )
    asking.add_argument(
        "--permutations",
        type=int,
        default=defaults.permutations,
        help=(
            "orders of the options to ask in: 1, up to the number of options (cyclic), more, or 0"
            " for all (default 1)"
        ),
    )
    asking.add_argument(
        "--num_fewshot",
        type=int,
        default=defaults.num_fewshot,
        help="worked examples before each question (default 0)",
    )
    asking.add_argument(
        "--fewshot",
        choices=["fixed", "nearest"],
        default=defaults.fewshot,
        help="the same examples for all, or the most similar by BM25 (default %(default)s)",
    )
    asking.add_argument(
        "--fewshot_path", help="file, folder or hub id of the worked examples (default: --path)"
    )
    asking.add_argument("--fewshot_split", help="their split (default train; dev for mmlu)")
    asking.add_argument(
        "--max_new_tokens",
        type=int,
        default=defaults.max_new_tokens,
        help="generate: tokens per answer (default %(default)s)",
    )
    asking.add_argument(
        "--temperature",
        type=float,
        default=defaults.temperature,
        help="generate: 0 is greedy (default 0)",
    )
    asking.add_argument(
        "--samples",
        type=int,
        default=defaults.samples,
        help="generate: answers per question, which vote (default 1)",
    )
    asking.add_argument(
        "--seed",
        type=int,
        default=defaults.seed,
        help="of samples and of the choice of worked examples (default 0)",
    )
    running = parser.add_argument_group("running")
    running.add_argument(
        "--engine",
        choices=["hf", "vllm", "openai"],
        default="hf",
        help="what runs the model (default hf)",
    )
    running.add_argument(
        "--attention",
        choices=["auto", "varlen", "flash", "grouped", "flex", "sdpa"],
        default="auto",
        help="hf: attention backend (default auto)",
    )
    running.add_argument(
        "--max_tokens", type=int, help="hf: tokens per forward pass (default: by the free memory)"
    )
    running.add_argument(
        "--max_length",
        type=int,
        help="tokens a prompt and its answer may have (default: the model's positions)",
    )
    running.add_argument(
        "--gpu_memory",
        type=float,
        default=0.9,
        help="vllm: share of the GPU's memory (default 0.9)",
    )
    running.add_argument(
        "--tensor_parallel", type=int, default=1, help="vllm: GPUs per model (default 1)"
    )
    running.add_argument("--server", help="openai: address, as http://127.0.0.1:8000/v1")
    running.add_argument(
        "--api",
        choices=["completions", "chat"],
        default="completions",
        help=(
            "openai: completions takes our token ids (needs --tokenizer); chat is for servers that"
            " take messages only"
        ),
    )
    running.add_argument(
        "--tokenizer",
        help="openai: folder or hub id of the served model's tokenizer (default: --model)",
    )
    running.add_argument(
        "--api_key_variable",
        default="OPENAI_API_KEY",
        help="openai: environment variable with the key (default %(default)s)",
    )
    running.add_argument(
        "--concurrency", type=int, default=32, help="openai: requests in flight (default 32)"
    )
    running.add_argument(
        "--timeout", type=float, default=120, help="openai: seconds per request (default 120)"
    )
    running.add_argument(
        "--retries",
        type=int,
        default=5,
        help="openai: further tries of a failed request (default 5)",
    )
    running.add_argument(
        "--shard", default="0/1", help="I/N: answer part I (from 0) of N (default 0/1, all)"
    )
    running.add_argument(
        "--output", type=Path, required=True, help="predictions file to write (.jsonl)"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.engine == "hf":  # vLLM has an allocator of its own.
        prefer_expandable_segments(os.environ)
    shard, shards = check_arguments(arguments)
    warnings.showwarning = lambda message, *_: console.print(escape(str(message)), style="yellow")
    encoder, metadata, max_length, identity = open_model(arguments)
    method = choose_method(arguments)
    examples = read_questions(arguments, encoder.style)
    pool = read_pool(arguments, encoder.style) if method.num_fewshot else []
    asked, shared = ask(encoder, examples, method, pool, max_length)
    if cut := sum(entry.truncated for entry in asked):
        console.print(
            f"{cut} of {len(asked)} prompts are longer than the model's {max_length} tokens and"
            " were cut",
            style="yellow",
        )
    run_key = hash_json(
        {
            **identity,
            "style": encoder.style,
            "completion": encoder.completion,
            "method": vars(method),
            "engine": arguments.engine,
            "rows": 1,
        }
    )
    keys = [entry.key(run_key) for entry in asked]
    if arguments.output.exists():
        check_finished(arguments.output, keys)
        return
    question_batches = split_into_batches(
        [example.id for example in examples], BATCH_SIZE[arguments.engine]
    )[shard::shards]
    with Journal(arguments.output, shard, shards) as journal:
        done = set(journal.read()) & set(keys)
        if done:
            console.print(
                f"{len(done)} of {len(asked)} predictions stand in {journal.folder} already"
            )
        left = sum(
            keys[number] not in done
            for question_batch in question_batches
            for number in question_batch
        )
        if left:
            engine = open_engine(arguments, metadata, encoder)
            name = (
                f"{arguments.model}+{arguments.adapter}" if arguments.adapter else arguments.model
            )
            batches = predict(
                engine, encoder, asked, shared, method, name, question_batches, run_key, done
            )
            with Progress(console=console, transient=True) as progress:
                task = progress.add_task("predicting", total=left)
                for batch in batches:
                    journal.append(batch)
                    progress.update(task, advance=len(batch))
        if arguments.output.exists():  # another shard was the last
            check_finished(arguments.output, keys)
            return
        rows = journal.read()
        missing = sum(key not in rows for key in keys)
        if missing:
            console.print(
                f"shard {shard}/{shards} is done; {missing} of {len(asked)} questions are left to"
                " other shards; the last one to finish, or any --shard run again, writes"
                f" {arguments.output}"
            )
            return
        ordered = [rows[key] for key in keys]
        journal.finish(arguments.output, ordered)
    console.print(f"{len(ordered)} predictions in {arguments.output}; {summarise(ordered)}")


def check_arguments(arguments: argparse.Namespace) -> tuple[int, int]:
    """-> shard, shards"""
    if arguments.output.suffix != ".jsonl":
        raise ConfigError(f"--output {arguments.output}: expected a name that ends in .jsonl")
    if not arguments.output.parent.is_dir():
        raise ConfigError(
            f"--output {arguments.output}: no folder {arguments.output.parent}; make it first"
        )
    find_format(arguments.format, "--format")
    for name, least in {
        "limit": 1,
        "num_fewshot": 0,
        "permutations": 0,
        "samples": 1,
        "max_new_tokens": 1,
        "max_tokens": 1,
        "max_length": 2,
        "temperature": 0,
        "concurrency": 1,
        "timeout": 0.001,
        "retries": 0,
    }.items():
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name} {value}: expected {least} or more")
    if arguments.engine == "openai" and not arguments.server:
        raise ConfigError(
            "--engine openai: give the server's address with --server, as http://127.0.0.1:8000/v1"
        )
    if arguments.engine == "openai" and arguments.adapter:
        raise ConfigError(
            "--engine openai: the server owns its adapters; give the served adapter's name as"
            " --model, without --adapter"
        )
    try:
        shard, shards = (int(part) for part in arguments.shard.split("/"))
    except ValueError:
        shard = 0
        shards = 0
    if not 0 <= shard < shards:
        raise ConfigError(f"--shard {arguments.shard}: expected I/N with I from 0 to N - 1, as 0/4")
    return shard, shards


def choose_method(arguments: argparse.Namespace) -> Method:
    kind = find_format(arguments.format)
    scoring = kind.scoring
    if arguments.prompt_style == "lm_eval" and kind.harness.answer == "cloze":
        scoring = "cloze"
    return Method(
        scoring=arguments.scoring or scoring,
        permutations=arguments.permutations,
        normalization=arguments.normalization,
        num_fewshot=arguments.num_fewshot,
        fewshot=arguments.fewshot,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        samples=arguments.samples,
        seed=arguments.seed,
    )


def open_model(arguments: argparse.Namespace) -> tuple[Encoder, dict, int | None, dict]:
    """-> encoder, how the model was trained to be asked, tokens it can read, and what tells it from
    every other model.
    """
    if arguments.engine == "openai" and arguments.api == "chat":
        encoder = make_text_encoder(arguments.completion or "letter")
        return (
            encoder,
            {},
            arguments.max_length,
            {"server": arguments.server, "model": arguments.model},
        )
    import transformers

    from medqlora.model.adapter import check_adapter
    from medqlora.model.base import load_tokenizer, read_model_config
    from medqlora.model.hardware import choose_dtype, default_device
    from medqlora.model.identity import describe_model, read_merged_metadata

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if arguments.engine == "openai":
        metadata = {}
        max_length = arguments.max_length
        identity = {"server": arguments.server, "model": arguments.model}
        source = arguments.tokenizer or arguments.model
    else:
        config = read_model_config(arguments.model, arguments.revision)
        source = arguments.model
        metadata = (
            check_adapter(arguments.adapter, config)
            if arguments.adapter
            else read_merged_metadata(arguments.model)
        )
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        if arguments.max_length and positions and arguments.max_length > positions:
            raise ConfigError(
                f"--max_length {arguments.max_length}: the model has {positions} positions"
            )
        # vLLM generates a token to score one
        room = positions - 1 if positions and arguments.engine == "vllm" else positions
        max_length = arguments.max_length or room
        identity = describe_model(arguments.model, arguments.revision, arguments.adapter)
        loading = resolve_model(arguments, metadata)
        identity |= {
            "quantization": loading.quantization,
            "dtype": str(choose_dtype(loading.dtype, default_device())),
        }
    encoder = make_encoder(
        load_tokenizer(source, arguments.revision),
        arguments.prompt_style or metadata.get("prompt_style", "auto"),
        arguments.completion or metadata.get("completion", "letter"),
    )
    asked_otherwise = arguments.prompt_style or arguments.completion
    if (
        arguments.adapter
        and metadata
        and not asked_otherwise
        and fingerprint(encoder) != metadata["prompt_sha256"]
    ):
        raise ConfigError(
            f"--adapter {arguments.adapter}: this tokenizer does not give the prompts that the"
            f" adapter was trained with; use its base {metadata['base']}, or name a --prompt_style"
        )
    return encoder, metadata, max_length, identity


def open_engine(arguments: argparse.Namespace, metadata: dict, encoder: Encoder) -> Engine:
    if arguments.engine == "openai":
        from medqlora.engines.openai import OpenAIEngine

        return OpenAIEngine(
            arguments.server,
            arguments.model,
            encoder.tokenizer.decode,
            os.environ.get(arguments.api_key_variable),
            arguments.api == "chat",
            concurrency=arguments.concurrency,
            timeout=arguments.timeout,
            retries=arguments.retries,
        )
    if arguments.engine == "vllm":
        from medqlora.engines.vllm import VllmEngine

        return VllmEngine(
            arguments.model,
            arguments.adapter,
            dtype=arguments.dtype or "auto",
            revision=arguments.revision,
            max_length=arguments.max_length,
            gpu_memory=arguments.gpu_memory,
            tensor_parallel=arguments.tensor_parallel,
            seed=arguments.seed,
        )
    from medqlora.engines.hf import HfEngine
    from medqlora.model.adapter import load_adapter
    from medqlora.model.base import load_base
    from medqlora.model.hardware import default_device

    model, backend = load_base(resolve_model(arguments, metadata), default_device())
    if arguments.adapter:
        model = load_adapter(model, arguments.adapter)
    return HfEngine(model, backend, arguments.max_tokens)


def parse_columns(text: str) -> dict:
    try:
        columns = json.loads(text)
    except json.JSONDecodeError:
        columns = None
    if not isinstance(columns, dict):
        raise argparse.ArgumentTypeError(
            f'got {text!r}; expected a JSON object, e.g. \'{{"question": "stem"}}\''
        )
    return columns


def resolve_model(arguments: argparse.Namespace, metadata: dict) -> Model:
    """How the model is loaded: as the adapter was trained, unless --dtype says otherwise."""
    quantized = arguments.dtype in ("nf4", "fp4", "int8")
    return Model(
        base=arguments.model,
        revision=arguments.revision,
        attention=arguments.attention,
        quantization=(
            arguments.dtype
            if quantized
            else "none"
            if arguments.dtype
            else metadata.get("quantization", "none")
        ),
        double_quantization=metadata.get("double_quantization", True),
        dtype="auto" if quantized else arguments.dtype or metadata.get("dtype", "auto"),
    )


def read_questions(arguments: argparse.Namespace, style: str) -> list[Example]:
    """Examples with unique ids; the reference harness's own prompts are made from the text as it
    stands.
    """
    entry = DataEntry(
        format=arguments.format,
        path=arguments.path,
        subset=arguments.subset,
        limit=arguments.limit,
        test_pmids=arguments.test_pmids,
        columns=arguments.columns,
    )
    examples, removals = read_examples(entry, choose_split(arguments), arguments.drop_invalid)
    for removal in removals:
        console.print(f"left out {removal.source}: {removal.reason}", style="yellow", markup=False)
    seen: dict[str, str] = {}
    for example in examples:
        first = seen.setdefault(example.id, example.source)
        if first != example.source:
            problem = f"{example.source}: id {example.id} stands at {first} too; ids must be unique"
            if not arguments.drop_invalid:
                raise DataError(f"{arguments.format}: {problem} (--drop_invalid keeps the first)")
            console.print(f"left out {problem}", style="yellow", markup=False)
    examples = [example for example in examples if seen[example.id] == example.source]
    return examples if style == "lm_eval" else [clean(example) for example in examples]


def choose_split(arguments: argparse.Namespace) -> str:
    """The split that scores are published on; a file is taken as it is (of PubMedQA's: all but the
    official test).
    """
    if arguments.split:
        return arguments.split
    return (
        "validation"
        if arguments.path and Path(arguments.path).expanduser().is_file()
        else find_format(arguments.format).published_split
    )


def read_pool(arguments: argparse.Namespace, style: str) -> list[Example]:
    entry = DataEntry(
        format=arguments.format,
        path=arguments.fewshot_path or arguments.path,
        subset=arguments.subset,
        test_pmids=arguments.test_pmids,
        columns=arguments.columns,
    )
    split = arguments.fewshot_split or find_format(arguments.format).fewshot_split
    examples, _ = read_examples(entry, split, drop_invalid=True)
    return examples if style == "lm_eval" else [clean(example) for example in examples]


def check_finished(output: Path, keys: list[str]) -> None:
    """An output of this very command is left as it is; any other is never written over."""
    try:
        found = read_predictions(output, labelled=False)
        same = {row.get("key") for row in read_rows(output, found.offsets)} == set(keys)
    except PredictionError as error:
        raise PredictionError(
            f"--output {output} exists and is no finished predictions file ({error}); give a new"
            " file name"
        ) from None
    if not same:
        raise PredictionError(
            f"--output {output} exists and holds other predictions (another model, prompt, setting"
            " or data); give a new file name"
        )
    console.print(f"{output} is complete already: {len(found)} predictions")


def summarise(rows: list[dict]) -> str:
    labelled = [row for row in rows if row["kind"] == "text" or row["gold"] is not None]
    if not labelled:
        return "no labels"
    if labelled[0]["kind"] == "open":
        return "score them with eval/score.py"
    scores = score_predictions(collect_rows(labelled))
    if labelled[0]["kind"] == "text":
        return f"perplexity {scores['perplexity']:.3f} over {scores['tokens']} tokens"
    mass = "" if scores["letter_mass"] is None else f", letter mass {scores['letter_mass']:.3f}"
    return f"accuracy {scores['accuracy']:.1%}{mass}" + (
        f", {scores['unparsed']} without an answer" if scores["unparsed"] else ""
    )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(
            str(error)
            .replace("--data.drop_invalid true", "--drop_invalid")
            .replace("--data.", "--"),
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print(
            "interrupted; finished batches are kept, the same command goes on from there",
            file=sys.stderr,
        )
        sys.exit(130)
