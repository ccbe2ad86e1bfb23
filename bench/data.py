"""How long does the data take? The preparation of 182,822 made-up rows like MedMCQA's, stage by
stage, and TRL's beside it.

    python bench/data.py  # with the demonstration's tokenizer
    # the same rows through TRL 1.16 as well (pip install trl==1.16.0)
    python bench/data.py --tokenizer DIR --peer --json found.json

Each contestant prepares the file in a process of its own: ours reads, cleans, de-duplicates,
renders, tokenizes, packs and writes, as the recipe does before training; TRL reads the file with
`datasets`, applies the same prompts as prompt and completion, tokenizes and packs (SFTTrainer,
best-fit). TRL's times are also taken with two worker processes, and the better one counts.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from medqlora.core.command import run_command
from medqlora.core.config_loading import load_config
from medqlora.core.environment import describe_environment, name_command, read_peak_resident
from medqlora.core.errors import RunError
from medqlora.core.files import check_new, write_json

ROWS = 182_822  # MedMCQA's training split
ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "recipes" / "demo" / "base"
SUBJECTS = (
    "Anatomy",
    "Biochemistry",
    "Dental",
    "Medicine",
    "Microbiology",
    "Pathology",
    "Pediatrics",
    "Pharmacology",
    "Physiology",
    "Surgery",
)
STAGES = ("read", "clean", "render", "tokenize", "plan", "write")
console = Console(highlight=False, soft_wrap=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=ROWS, help="rows to make up (default 182,822)")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        default=TOKENIZER,
        help="folder of a tokenizer (default: the demonstration's)",
    )
    parser.add_argument(
        "--max_tokens_per_batch", type=int, default=4096, help="tokens of a pack (default 4,096)"
    )
    parser.add_argument("--peer", action="store_true", help="run TRL's preparation too")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument(
        "--contestant", choices=["ours", "whole", "trl", "trl2"], help=argparse.SUPPRESS
    )
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.contestant:
        contestants = {
            "ours": time_stages,
            "whole": prepare_whole,
            "trl": prepare_trl,
            "trl2": prepare_trl,
        }
        found = contestants[arguments.contestant](arguments)
        found["peak_memory_bytes"] = read_peak_resident()
        write_json(arguments.work / f"{arguments.contestant}.json", found)
        return
    check_new(arguments.json, "--json")
    if arguments.rows < 100:
        raise RunError(f"--rows {arguments.rows}: expected 100 or more")
    if not (arguments.tokenizer / "tokenizer.json").is_file():
        raise RunError(
            f"--tokenizer {arguments.tokenizer}: no tokenizer.json there; give the folder of a"
            " tokenizer"
        )
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_rows(work / "rows.jsonl", arguments.rows)
        found = {
            name: run(name, work)
            for name in ("ours", "whole", *(("trl", "trl2") if arguments.peer else ()))
        }
    show(found, arguments.rows)
    if arguments.json:
        settings = {
            "rows": arguments.rows,
            "tokenizer": arguments.tokenizer.name,
            "max_tokens_per_batch": arguments.max_tokens_per_batch,
        }
        write_json(
            arguments.json,
            {
                "command": name_command("bench/data.py", sys.argv[1:]),
                "settings": settings,
                "environment": describe_environment(),
                "results": found,
            },
        )


def run(name: str, work: Path) -> dict:
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--contestant", name, "--work", str(work)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise RunError(
            f"{name} failed: {(done.stderr.strip().splitlines() or ['killed'])[-1][:300]}"
        )
    return json.loads((work / f"{name}.json").read_text(encoding="utf-8"))


def make_rows(path: Path, count: int) -> None:
    """Questions of made-up words, as long as MedMCQA's: about 13 words, options of 3, explanations
    of 60 for two in three.
    """
    rng = np.random.default_rng(0)
    syllables = [
        "car",
        "di",
        "o",
        "neu",
        "ro",
        "hep",
        "a",
        "to",
        "my",
        "pa",
        "thy",
        "gas",
        "tro",
        "en",
        "te",
        "ri",
        "tis",
        "os",
        "te",
        "o",
        "phy",
        "ma",
        "la",
        "ria",
        "in",
        "su",
        "lin",
        "glu",
        "co",
        "se",
        "pro",
        "te",
        "in",
        "ren",
        "al",
    ]
    words = np.array(["".join(rng.choice(syllables, n)) for n in rng.integers(1, 5, 20_000)])
    popularity = 1 / np.arange(1, len(words) + 1)
    popularity /= popularity.sum()

    def texts(lengths: np.ndarray) -> list[str]:
        drawn = rng.choice(words, int(lengths.sum()), p=popularity)
        return [" ".join(part) for part in np.split(drawn, np.cumsum(lengths)[:-1])]

    questions = texts(rng.lognormal(2.4, 0.6, count).clip(4, 150).astype(int))
    options = [texts(rng.lognormal(0.9, 0.7, count).clip(1, 30).astype(int)) for _ in range(4)]
    explanations = texts(rng.lognormal(3.7, 0.8, count).clip(5, 400).astype(int))
    answers = rng.integers(1, 5, count)
    subjects = rng.choice(SUBJECTS, count)
    explained = rng.random(count) < 2 / 3
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            row = {
                "id": f"row-{i}",
                "question": f"{questions[i]}?",
                **{f"op{'abcd'[k]}": options[k][i] for k in range(4)},
                "cop": int(answers[i]),
                "choice_type": "single",
                "exp": explanations[i] if explained[i] else None,
                "subject_name": str(subjects[i]),
                "topic_name": None,
            }
            file.write(json.dumps(row) + "\n")


# ---- contestants ---------------------------------------------------------------------------------


def configure(arguments: argparse.Namespace):
    """Config and encoder of our side."""
    from medqlora.model.base import load_tokenizer
    from medqlora.prompts.chat_template import make_encoder

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # as the recipes do
    data = json.dumps([{"format": "medmcqa", "path": str(arguments.work / "rows.jsonl")}])
    config = load_config(
        ROOT / "recipes" / "configs" / "demo.yaml",
        [
            "--data.train",
            data,
            "--data.eval",
            "[]",
            "--data.test",
            "[]",
            "--data.cache_dir",
            str(arguments.work / "cache"),
            "--data.drop_invalid",
            "true",
            "--data.packing_window",
            "32768",
            "--data.max_length",
            "1024",
            "--training.epochs",
            "1",
            "--training.max_steps",
            "1000000",
            "--training.max_tokens_per_batch",
            str(arguments.max_tokens_per_batch),
            "--training.global_batch_tokens",
            str(arguments.max_tokens_per_batch),
        ],
    )
    return config, make_encoder(load_tokenizer(str(arguments.tokenizer)), "plain", "letter_text")


def time_stages(arguments: argparse.Namespace) -> dict:
    """The functions that prepare() calls, one by one; tokenizing renders again, in its threads."""
    from medqlora.batches.cache import save_arrays
    from medqlora.batches.plan import make_plan
    from medqlora.data.cleaning import clean, deduplicate
    from medqlora.data.reading import read_examples
    from medqlora.prompts.encoding import encode_examples
    from medqlora.prompts.styles import render

    config, encoder = configure(arguments)
    marks = [time.perf_counter()]

    def mark() -> None:
        marks.append(time.perf_counter())

    examples, _ = read_examples(config.data.train[0], "train", True)
    mark()
    examples, _ = deduplicate([clean(example) for example in examples], "exact")
    mark()
    for example in examples:
        render(example, encoder.style, encoder.completion)
    mark()
    table, _ = encode_examples(encoder, examples, config.data.max_length, True)
    mark()
    capacity = arguments.max_tokens_per_batch
    plan = make_plan(table.lengths, capacity=capacity, global_tokens=capacity)
    mark()
    save_arrays(
        arguments.work / "arrays",
        {
            "ids": table.ids,
            "offsets": table.offsets,
            "prompt_lengths": table.prompt_lengths,
            "rows": plan.rows,
        },
    )
    mark()
    seconds = dict(zip(STAGES, np.diff(marks).tolist(), strict=True))
    return {
        "stages": seconds,
        "rows": len(table.lengths),
        "tokens": int(table.lengths.sum()),
        "packs": len(plan.bins) - 1,
    }


def prepare_whole(arguments: argparse.Namespace) -> dict:
    """prepare() and prepare_plan(), as a recipe calls them."""
    from medqlora.batches.cache import prepare_plan
    from medqlora.batches.pipeline import prepare

    config, encoder = configure(arguments)
    began = time.perf_counter()
    prepared = prepare(config, encoder)
    plan, _ = prepare_plan(config, prepared, 1)
    seconds = time.perf_counter() - began
    lengths = prepared.train.lengths
    return {
        "seconds": seconds,
        "rows": len(lengths),
        "tokens": int(lengths.sum()),
        "packs": len(plan.bins) - 1,
    }


def prepare_trl(arguments: argparse.Namespace) -> dict:
    """The same prompts and completions through SFTTrainer's own preparation."""
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    workers = 2 if arguments.contestant == "trl2" else None
    began = time.perf_counter()
    rows = load_dataset(
        "json",
        data_files=str(arguments.work / "rows.jsonl"),
        split="train",
        cache_dir=str(arguments.work / arguments.contestant),
    )

    def to_prompt(row: dict) -> dict:
        options = "\n".join(f"{letter}. {row[f'op{letter.lower()}']}" for letter in "ABCD")
        answer = "ABCD"[row["cop"] - 1]
        return {
            "prompt": f"Question: {row['question']}\n{options}\nAnswer:",
            "completion": f" {answer}. {row[f'op{answer.lower()}']}",
        }

    rows = rows.map(to_prompt, remove_columns=rows.column_names, num_proc=workers)
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=rows,
        args=SFTConfig(
            output_dir=str(arguments.work / "trl"),
            packing=True,
            max_length=arguments.max_tokens_per_batch,
            completion_only_loss=True,
            dataset_num_proc=workers,
            use_cpu=True,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
        ),
    )
    seconds = time.perf_counter() - began
    tokens = sum(map(len, trainer.train_dataset["input_ids"]))
    return {
        "seconds": seconds,
        "rows": arguments.rows,
        "tokens": tokens,
        "packs": len(trainer.train_dataset),
    }


def show(found: dict, rows: int) -> None:
    table = Table(title=f"{rows:,} rows", title_justify="left")
    for column in ("stage", "seconds", "rows/s"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage, seconds in found["ours"]["stages"].items():
        table.add_row(stage, f"{seconds:.2f}", f"{rows / max(seconds, 1e-9):,.0f}")
    console.print(table)
    whole = found["whole"]
    line = (
        f"whole preparation {whole['seconds']:.1f} s, {rows / whole['seconds']:,.0f} rows/s, peak"
        f" {whole['peak_memory_bytes'] / 2**20:,.0f} MiB"
    )
    console.print(f"{line}; {whole['tokens']:,} tokens in {whole['packs']:,} packs")
    if "trl" in found:
        best = min((found["trl"], found["trl2"]), key=lambda side: side["seconds"])
        console.print(
            f"TRL {best['seconds']:.1f} s ({found['trl']['seconds']:.1f} with one process,"
            f" {found['trl2']['seconds']:.1f} with two), peak"
            f" {best['peak_memory_bytes'] / 2**20:,.0f} MiB of its main process, {best['tokens']:,}"
            f" tokens in {best['packs']:,} packs: ours {best['seconds'] / whole['seconds']:.1f} x"
            " as fast"
        )


if __name__ == "__main__":
    run_command(main)
