"""How long does the data take? The preparation of 182,822 made-up rows like MedMCQA's, stage by
stage, and TRL's beside it.

    # With the demonstration's tokenizer.
    python bench/data.py
    # The same rows through TRL 1.16 as well (pip install trl==1.16.0).
    python bench/data.py --tokenizer DIR --peer --json found.json

Each contestant prepares the file in a process of its own. Ours reads, cleans, de-duplicates,
renders, tokenizes, packs and writes, as the recipe does before training. TRL reads the file with
`datasets`, applies the same prompts as prompt and completion, tokenizes and packs (SFTTrainer,
best-fit). TRL also runs with two worker processes, and the better of its two times counts.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from medqlora.core.entry import enter

    enter()

import numpy as np
from rich.table import Table

from medqlora.core.command import CommandParser, make_console, run_command, whole
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
SYLLABLES = (
    "car di o neu ro hep a to my pa thy gas tro en te ri tis os te o phy ma la ria in su lin glu"
    " co se pro te in ren al"
)
STAGES = ("read", "clean", "render", "tokenize", "plan", "write")
console = make_console(soft_wrap=True)


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", type=whole(100), default=ROWS, help="rows to make up (default 182,822)"
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        default=TOKENIZER,
        help="folder of a tokenizer (default: the demonstration's)",
    )
    parser.add_argument(
        "--max_tokens_per_batch",
        type=whole(1),
        default=4096,
        help="tokens of a pack (default 4,096)",
    )
    parser.add_argument("--peer", action="store_true", help="run TRL's preparation too")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    # The script calls itself with these two flags, once for each contestant.
    parser.add_argument("--contestant", choices=list(CONTESTANTS), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.contestant:
        check_arguments(arguments)
    return arguments


def check_arguments(arguments: argparse.Namespace) -> None:
    check_new(arguments.json, "--json")
    if not (arguments.tokenizer / "tokenizer.json").is_file():
        raise RunError(
            f"--tokenizer {arguments.tokenizer}: no tokenizer.json there; give the folder of a"
            " tokenizer"
        )


def main() -> None:
    arguments = parse_arguments()
    if arguments.contestant:
        figures = CONTESTANTS[arguments.contestant](arguments)
        # The peak counts from the start of the process, so both sides count their libraries too.
        figures["peak_memory_bytes"] = read_peak_resident()
        write_json(arguments.work / f"{arguments.contestant}.json", figures)
        return
    # "ours" times the stages one by one. "whole" times what the recipe calls, with its cache.
    names = ["ours", "whole"]
    if arguments.peer:
        names += ["trl", "trl2"]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_rows(work / "rows.jsonl", arguments.rows)
        results = {name: run(name, work) for name in names}
    show(results, arguments.rows)
    if arguments.json:
        settings = {
            "rows": arguments.rows,
            "tokenizer": arguments.tokenizer.name,
            "max_tokens_per_batch": arguments.max_tokens_per_batch,
        }
        report = {
            "command": name_command("bench/data.py", sys.argv[1:]),
            "settings": settings,
            "environment": describe_environment(),
            "results": results,
        }
        write_json(arguments.json, report)


def run(name: str, work: Path) -> dict:
    """Run one contestant in a process of its own -> its figures."""
    # The child gets the same command line, so all contestants have the same tokenizer and packs.
    command = [sys.executable, __file__, *sys.argv[1:], f"--contestant={name}", f"--work={work}"]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["killed"])[-1][:300]
        raise RunError(f"{name} failed: {reason}")
    return json.loads((work / f"{name}.json").read_text(encoding="utf-8"))


def make_rows(path: Path, count: int) -> None:
    """Write questions of made-up words, as long as MedMCQA's: about 13 words, options of 3, and
    explanations of 60 for two in three.
    """
    rng = np.random.default_rng(0)
    syllables = SYLLABLES.split()
    # The words have ranks, and a word is drawn in proportion to 1 / rank (Zipf's law). As in
    # natural text, a tokenizer meets a few words very often.
    words = np.array(["".join(rng.choice(syllables, n)) for n in rng.integers(1, 5, 20_000)])
    popularity = 1 / np.arange(1, len(words) + 1)  # float64 [words]
    popularity /= popularity.sum()

    def draw_texts(lengths: np.ndarray) -> list[str]:
        drawn = rng.choice(words, int(lengths.sum()), p=popularity)
        return [" ".join(part) for part in np.split(drawn, np.cumsum(lengths)[:-1])]

    # A log-normal length has the mean exp(mu + sigma^2 / 2). The docstring names about the numbers
    # of words that these values give.
    questions = draw_texts(rng.lognormal(2.4, 0.6, count).clip(4, 150).astype(int))
    options = [draw_texts(rng.lognormal(0.9, 0.7, count).clip(1, 30).astype(int)) for _ in "abcd"]
    explanations = draw_texts(rng.lognormal(3.7, 0.8, count).clip(5, 400).astype(int))
    # MedMCQA's own files count the right option from 1.
    answers = rng.integers(1, 5, count)
    subjects = rng.choice(SUBJECTS, count)
    explained = rng.random(count) < 2 / 3
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            row = {
                "id": f"row-{i}",
                "question": f"{questions[i]}?",
                "opa": options[0][i],
                "opb": options[1][i],
                "opc": options[2][i],
                "opd": options[3][i],
                "cop": int(answers[i]),
                "choice_type": "single",
                "exp": explanations[i] if explained[i] else None,
                "subject_name": str(subjects[i]),
                "topic_name": None,
            }
            file.write(json.dumps(row) + "\n")


# ---- contestants ---------------------------------------------------------------------------------


def configure(arguments: argparse.Namespace):
    """The configuration and the encoder of our side."""
    from medqlora.model.base import load_tokenizer
    from medqlora.prompts.chat_template import make_encoder

    # The recipes set this too, because rows are tokenized in our threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    entry = {"format": "medmcqa", "path": str(arguments.work / "rows.jsonl")}
    # The last flags undo what the demonstration sets for its few rows: its small packing window and
    # its limit of steps. A global batch of one micro-batch makes every pack a step.
    config = load_config(
        ROOT / "recipes" / "configs" / "demo.yaml",
        [
            f"--data.train={json.dumps([entry])}",
            "--data.eval=[]",
            "--data.test=[]",
            f"--data.cache_dir={arguments.work / 'cache'}",
            "--data.drop_invalid=true",
            "--data.packing_window=32768",
            "--data.max_length=1024",
            "--training.epochs=1",
            "--training.max_steps=1000000",
            f"--training.max_tokens_per_batch={arguments.max_tokens_per_batch}",
            f"--training.global_batch_tokens={arguments.max_tokens_per_batch}",
        ],
    )
    return config, make_encoder(load_tokenizer(str(arguments.tokenizer)), "plain", "letter_text")


def time_stages(arguments: argparse.Namespace) -> dict:
    """Time the functions that prepare() calls, one by one. Tokenizing renders again, in its
    threads.
    """
    from medqlora.batches.cache import save_arrays
    from medqlora.batches.plan import make_plan
    from medqlora.data.cleaning import clean, deduplicate
    from medqlora.data.reading import read_examples
    from medqlora.prompts.rows import encode_examples
    from medqlora.prompts.styles import render

    config, encoder = configure(arguments)
    times = [time.perf_counter()]
    examples, _ = read_examples(config.data.train[0], "train", True)
    times.append(time.perf_counter())
    examples, _ = deduplicate([clean(example) for example in examples], "exact")
    times.append(time.perf_counter())
    for example in examples:
        render(example, encoder.style, encoder.completion)
    times.append(time.perf_counter())
    table, _ = encode_examples(encoder, examples, config.data.max_length, True)
    times.append(time.perf_counter())
    capacity = arguments.max_tokens_per_batch
    plan = make_plan(table.lengths, capacity=capacity, global_tokens=capacity)
    times.append(time.perf_counter())
    arrays = {
        "ids": table.ids,
        "offsets": table.offsets,
        "prompt_lengths": table.prompt_lengths,
        "rows": plan.rows,
    }
    save_arrays(arguments.work / "arrays", arrays)
    times.append(time.perf_counter())
    return {
        "stages": dict(zip(STAGES, np.diff(times).tolist(), strict=True)),
        "rows": len(table.lengths),
        "tokens": int(table.lengths.sum()),
        "packs": len(plan.bins) - 1,
    }


def prepare_whole(arguments: argparse.Namespace) -> dict:
    """Time prepare() and prepare_plan(), as a recipe calls them."""
    from medqlora.batches.cache import prepare_plan
    from medqlora.batches.pipeline import prepare

    config, encoder = configure(arguments)
    began = time.perf_counter()
    # The cache's folder is new and "ours" writes none, so nothing is read from an earlier run.
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


def to_prompt(row: dict) -> dict:
    """A MedMCQA row -> the prompt and completion that our side renders."""
    # These texts must be those of the style plain with letter_text. Otherwise the two sides would
    # tokenize different texts and the times would not compare.
    options = "\n".join(f"{letter}. {row[f'op{letter.lower()}']}" for letter in "ABCD")
    answer = "ABCD"[row["cop"] - 1]
    return {
        "prompt": f"Question: {row['question']}\n{options}\nAnswer:",
        "completion": f" {answer}. {row[f'op{answer.lower()}']}",
    }


def prepare_trl(arguments: argparse.Namespace) -> dict:
    """Time SFTTrainer's own preparation of the same prompts and completions."""
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    # SFTTrainer needs a model, which preparation does not use.
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    # None makes the rows in the main process.
    workers = 2 if arguments.contestant == "trl2" else None
    # Imports and the tokenizer are loaded before the clock starts, on both sides.
    began = time.perf_counter()
    # datasets returns what it has prepared before, so each contestant has a cache of its own.
    rows = load_dataset(
        "json",
        data_files=str(arguments.work / "rows.jsonl"),
        split="train",
        cache_dir=str(arguments.work / arguments.contestant),
    )
    rows = rows.map(to_prompt, remove_columns=rows.column_names, num_proc=workers)
    trainer = SFTTrainer(
        model=LlamaForCausalLM(shape),
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
    # SFTTrainer has prepared its data when it is made, so no step is taken.
    packs = trainer.train_dataset["input_ids"]
    return {
        "seconds": seconds,
        "rows": arguments.rows,
        "tokens": sum(map(len, packs)),
        "packs": len(packs),
    }


CONTESTANTS = {
    "ours": time_stages,
    "whole": prepare_whole,
    "trl": prepare_trl,
    "trl2": prepare_trl,
}


def show(results: dict, rows: int) -> None:
    table = Table(title=f"{rows:,} rows", title_justify="left")
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    table.add_column("rows/s", justify="right")
    for stage, seconds in results["ours"]["stages"].items():
        table.add_row(stage, f"{seconds:.2f}", f"{rows / max(seconds, 1e-9):,.0f}")
    console.print(table)
    whole = results["whole"]
    console.print(
        f"whole preparation {whole['seconds']:.1f} s, {rows / whole['seconds']:,.0f} rows/s, peak"
        f" {whole['peak_memory_bytes'] / 2**20:,.0f} MiB; {whole['tokens']:,} tokens in"
        f" {whole['packs']:,} packs"
    )
    if "trl" in results:
        # TRL's better time counts, so the ratio is the one that is less in our favour.
        one = results["trl"]
        two = results["trl2"]
        best = one if one["seconds"] <= two["seconds"] else two
        console.print(
            f"TRL {best['seconds']:.1f} s ({one['seconds']:.1f} with one process,"
            f" {two['seconds']:.1f} with two), peak"
            f" {best['peak_memory_bytes'] / 2**20:,.0f} MiB of its main process, {best['tokens']:,}"
            f" tokens in {best['packs']:,} packs: ours {best['seconds'] / whole['seconds']:.1f} x"
            " as fast"
        )


if __name__ == "__main__":
    run_command(main)
