"""Answer multiple-choice questions with a model and write one prediction per line.

    python eval/predict.py --model BASE --adapter runs/mine/adapter --format medqa --path dev.jsonl --output tuned.jsonl

With an adapter, prompt style, completion and quantization are the ones it was trained with, unless given here.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import track

from medqlora.attention import IMPLEMENTATIONS
from medqlora.cleaning import clean
from medqlora.config import ConfigError, DataEntry, Model, UserError
from medqlora.examples import DataError, MultipleChoice, read_examples
from medqlora.metrics import score_predictions
from medqlora.models import check_adapter, load_adapter, load_base, load_tokenizer, read_model_config
from medqlora.runs import write_json_lines
from medqlora.scoring import predict_letters
from medqlora.tokens import fingerprint, make_encoder

console = Console(stderr=True, highlight=False, soft_wrap=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id of the base or merged model")
    parser.add_argument("--adapter", type=Path, help="adapter folder of a run")
    parser.add_argument("--format", required=True, help="medmcqa, medqa, pubmedqa or mcq")
    parser.add_argument("--path", help="file, folder or hub id (default: the dataset's hub home)")
    parser.add_argument("--split", default="validation", help="split name (default validation)")
    parser.add_argument("--test_pmids", help="pubmedqa: file with the official test PMIDs")
    parser.add_argument("--engine", choices=["hf"], default="hf", help="what runs the model (default hf)")
    parser.add_argument("--prompt_style", choices=["auto", "chat", "plain", "lm_eval"], help="default: the adapter's, else auto")
    parser.add_argument("--scoring", choices=["letters"], default="letters", help="how the answer is read (default letters)")
    parser.add_argument("--limit", type=int, help="only the first N questions")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16", "nf4", "fp4", "int8"],
                        help="compute dtype, or a quantization (default: the adapter's quantization and dtype, else auto)")  # fmt: skip
    parser.add_argument("--attention", choices=["auto", *IMPLEMENTATIONS], default="auto", help="attention backend (default auto)")
    parser.add_argument("--revision", help="hub commit or tag of the model")
    parser.add_argument("--max_tokens", type=int, default=8192, help="tokens per forward pass (default 8192)")
    parser.add_argument("--drop_invalid", action="store_true", help="leave invalid rows out instead of stopping")
    parser.add_argument("--output", type=Path, required=True, help="predictions file to write (.jsonl)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if arguments.output.exists():
        raise ConfigError(f"--output {arguments.output} exists; give a new file name")
    if not arguments.output.parent.is_dir():
        raise ConfigError(f"--output {arguments.output}: no folder {arguments.output.parent}; make it first")
    if arguments.limit is not None and arguments.limit < 1:
        raise ConfigError(f"--limit {arguments.limit}: expected 1 or more")

    model_config = read_model_config(arguments.model, arguments.revision)
    card = check_adapter(arguments.adapter, model_config) if arguments.adapter else read_merged_card(arguments.model)
    encoder = make_encoder(
        load_tokenizer(arguments.model, arguments.revision),
        arguments.prompt_style or card.get("prompt_style", "auto"), card.get("completion", "letter"),
    )  # fmt: skip
    if arguments.adapter and card and not arguments.prompt_style and fingerprint(encoder) != card["prompt_sha256"]:
        raise ConfigError(
            f"--adapter {arguments.adapter}: this tokenizer does not give the prompts that the adapter was trained with; use its "
            f"base {card['base']}, or name a --prompt_style"
        )
    examples = read_questions(arguments, encoder.style)
    model, backend = load_base(resolve_model(arguments, card), torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if arguments.adapter:
        model = load_adapter(model, arguments.adapter)
    name = f"{arguments.model}+{arguments.adapter}" if arguments.adapter else arguments.model
    predictions = predict_letters(model, backend, encoder, examples, name, arguments.max_tokens)
    rows = {row["id"]: row for row in track(predictions, "predicting", len(examples), console=console, transient=True)}
    write_json_lines(arguments.output, [rows[example.id] for example in examples])
    scores = score_predictions([row for row in rows.values() if row["gold"] is not None])
    facts = f"accuracy {scores['accuracy']:.1%}, letter mass {scores['letter_mass']:.3f}" if scores["n"] else "no labels"
    console.print(f"{len(rows)} predictions in {arguments.output}; {facts}")


def read_merged_card(model: str) -> dict:
    """How a merged model was trained to be asked; nothing for other models."""
    path = Path(model) / "medqlora.json"
    facts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {key: facts[key] for key in ("prompt_style", "completion") if key in facts}


def read_questions(arguments: argparse.Namespace, style: str) -> list[MultipleChoice]:
    """Questions with unique ids; the reference harness's own prompts are made from the text as it stands."""
    if arguments.format not in ("medmcqa", "medqa", "pubmedqa", "mcq"):
        raise ConfigError(f"--format {arguments.format}: letters can be scored for medmcqa, medqa, pubmedqa and mcq")
    entry = DataEntry(format=arguments.format, path=arguments.path, limit=arguments.limit, test_pmids=arguments.test_pmids)
    examples, removals = read_examples(entry, arguments.split, arguments.drop_invalid)
    for removal in removals:
        console.print(f"[yellow]left out {removal.source}: {removal.reason}")
    seen: dict[str, str] = {}
    for example in examples:
        if example.id in seen:
            raise DataError(f"{arguments.format}: {example.source}: id {example.id} stands at {seen[example.id]} too; ids must be unique")
        seen[example.id] = example.source
    return examples if style == "lm_eval" else [clean(example) for example in examples]


def resolve_model(arguments: argparse.Namespace, card: dict) -> Model:
    dtype = arguments.dtype
    quantized = dtype in ("nf4", "fp4", "int8")
    return Model(
        base=arguments.model, revision=arguments.revision, attention=arguments.attention,
        quantization=dtype if quantized else "none" if dtype else card.get("quantization", "none"),
        double_quantization=card.get("double_quantization", True),
        dtype="auto" if quantized else dtype or card.get("dtype", "auto"),
    )  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
