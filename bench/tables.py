"""The measured and predicted tables of the documentation, made from the recorded figures in
bench/results.

    # replace what stands between <!-- table NAME --> and <!-- end of NAME -->
    python bench/tables.py --write docs/benchmarks.md docs/memory.md docs/claims.md docs/gpu.md
    # exit code 2 if a page holds other tables
    python bench/tables.py --check docs/benchmarks.md docs/memory.md docs/claims.md docs/gpu.md

No figure between markers is typed: record it with the command in its file, then write the pages.
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

from medqlora.core.command import run_command
from medqlora.core.errors import ConfigError
from medqlora.core.files import write_atomic

RESULTS = Path(__file__).parent / "results"
MACHINE = RESULTS / "cpu-2-cores"
GIB = 2**30


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def markdown(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|---" * len(head) + "|"
    for row in rows:
        yield "| " + " | ".join(row) + " |"


# ---- measured ------------------------------------------------------------------------------------


def table_strategies() -> Iterator[str]:
    rows = []
    for name, found in read(MACHINE / "strategies_demo.json")["rows"].items():
        if name != "one":
            check = found["gradient_check"]["seconds"]
            rows.append(
                [
                    name,
                    f"{found['loss_difference']:.0e}",
                    f"{found['grad_norm_difference']:.0e}",
                    f"{check:.1f} s",
                    f"{found['speed']:.2f} x",
                ]
            )
    return markdown(
        ["", "largest difference of a loss", "of a gradient norm", "start-up check", "tokens/s"],
        rows,
    )


def table_sft() -> Iterator[str]:
    rows = []
    for path in sorted(MACHINE.glob("sft_*.json")):
        recorded = read(path)
        for name, found in recorded["results"].items():
            rows.append(
                [
                    recorded["settings"]["dtype"],
                    name.replace("trl", "TRL 1.16").replace("llamafactory", "LLaMA-Factory 0.9.5"),
                    f"{found['tokens_per_second_ratio']:.2f} x",
                    f"{found['peak_memory_ratio']:.2f} x",
                    f"{found['final_loss']:.4f}",
                ]
            )
    return markdown(["", "", "real tokens/s", "peak memory", "loss of the trained adapter"], rows)


def table_data() -> Iterator[str]:
    found = read(MACHINE / "data_smollm2.json")["results"]
    whole = found["whole"]
    rows = [
        [
            "ours",
            f"{found['trl']['seconds'] / whole['seconds']:.1f} x",
            f"{found['trl2']['seconds'] / whole['seconds']:.1f} x",
            f"{whole['peak_memory_bytes'] / 2**20:,.0f} MiB",
            f"{whole['tokens']:,}",
            f"{whole['packs']:,}",
        ]
    ]
    trl = found["trl"]
    rows.append(
        [
            "TRL 1.16",
            "1.0 x",
            "",
            f"{trl['peak_memory_bytes'] / 2**20:,.0f} MiB",
            f"{trl['tokens']:,}",
            f"{trl['packs']:,}",
        ]
    )
    return markdown(
        [
            "",
            "rows/s against its default",
            "against two worker processes",
            "peak memory",
            "tokens",
            "packs",
        ],
        rows,
    )


def table_measured() -> Iterator[str]:
    rows = []
    for path in sorted(MACHINE.glob("memory_*.json")):
        found = read(path)
        name = path.stem.removeprefix("memory_").replace("_", ", ")
        rows.append(
            [
                name,
                found["dtype"],
                f"{found['recomputed_layers']} of {found['layers']}",
                f"{found['predicted_peak_bytes'] / GIB:.3f}",
                f"{found['measured_peak_bytes'] / GIB:.3f}",
                f"{found['relative_error']:+.1%}",
            ]
        )
    return markdown(
        ["case", "dtype", "layers recomputed", "predicted GiB", "measured GiB", "error"], rows
    )


def table_throughput() -> Iterator[str]:
    cases = read(MACHINE / "throughput_demo.json")["cases"]
    first = cases[0]["real_tokens_per_second"]
    rows = []
    for found in cases:
        case = ", ".join(
            f"{key.rpartition('.')[2]} {value}" for key, value in found["case"].items()
        )
        rows.append(
            [
                case,
                f"{found['real_tokens_per_second'] / first:.2f} x",
                f"{found['model_flops_utilisation']:.0%}",
                f"{found['peak_memory_bytes'] / 2**20:,.0f} MiB",
            ]
        )
    return markdown(["", "real tokens/s", "utilisation", "memory above the start"], rows)


def table_lm_eval() -> Iterator[str]:
    rows = []
    for path in sorted(MACHINE.glob("lm_eval_*.json")):
        recorded = read(path)
        settings = recorded["settings"]
        (found,) = recorded["results"]
        memory = found["peak_memory_ratio"]
        rows.append(
            [
                f"`{settings['engine']}`",
                f"{settings['num_fewshot']}",
                f"{found['questions']}",
                f"{settings['batch_size']}" if settings["engine"] == "hf" else "",
                f"{found['questions_per_second_ratio']:.1f} x",
                "" if memory is None else f"{memory:.2f} x",
                f"{found['different_predictions']}",
            ]
        )
    return markdown(
        [
            "backend",
            "worked examples",
            "questions",
            "rows per batch of the harness",
            "questions/s",
            "peak memory",
            "predictions that differ",
        ],
        rows,
    )


# ---- on GPUs: bench/gpu.py -----------------------------------------------------------------------


def read_gpus() -> dict[str, dict]:
    """Folder name -> stages of every recorded GPU."""
    return {path.parent.name: read(path)["stages"] for path in sorted(RESULTS.glob("*/gpu.json"))}


NOT_YET = "none recorded yet"


def table_gpu_checks() -> Iterator[str]:
    return markdown(
        ["", "stage", "", "checks passed", "seconds"],
        rows_of_checks(read_gpus()) or [[NOT_YET, "", "", "", ""]],
    )


def rows_of_checks(gpus: dict[str, dict]) -> list[list[str]]:
    rows = []
    for name, stages in gpus.items():
        for stage, facts in stages.items():
            checks = facts.get("checks", [])
            passed = f"{sum(check['ok'] for check in checks)} of {len(checks)}" if checks else ""
            rows.append([name, stage, facts["status"], passed, f"{facts.get('seconds', 0):.0f}"])
    return rows


def table_gpu_memory() -> Iterator[str]:
    head = [
        "",
        "case",
        "peak GiB, predicted",
        "measured",
        "error",
        "reserved GiB, predicted",
        "measured",
        "error",
    ]
    return markdown(head, rows_of_memory(read_gpus()) or [[NOT_YET, *[""] * 7]])


def rows_of_memory(gpus: dict[str, dict]) -> list[list[str]]:
    rows = []
    for name, stages in gpus.items():
        for case, found in stages.get("memory", {}).get("figures", {}).items():
            pairs = [
                (found[f"predicted_{kind}_bytes"], found[f"measured_{kind}_bytes"])
                for kind in ("peak", "reserved")
            ]
            rows.append(
                [
                    name,
                    case,
                    *(
                        cell
                        for a, b in pairs
                        for cell in (f"{a / GIB:.2f}", f"{b / GIB:.2f}", f"{a / b - 1:+.1%}")
                    ),
                ]
            )
    return rows


def table_gpu_speed() -> Iterator[str]:
    return markdown(
        ["", "case", "tokens/s", "utilisation", "peak GiB"],
        rows_of_speed(read_gpus()) or [[NOT_YET, "", "", "", ""]],
    )


def rows_of_speed(gpus: dict[str, dict]) -> list[list[str]]:
    rows = []
    for name, stages in gpus.items():
        for case, found in stages.get("throughput", {}).get("figures", {}).items():
            # The model's facts and cases that did not fit stand there too.
            if not isinstance(found, dict) or "tokens_per_second" not in found:
                continue
            used = found["model_flops_utilisation"]
            peak = found["peak_memory_bytes"]
            rows.append(
                [
                    name,
                    case,
                    f"{found['tokens_per_second']:,.0f}",
                    f"{used:.0%}" if used else "?",
                    f"{peak / GIB:.2f}" if peak else "",
                ]
            )
    return rows


# ---- predicted -----------------------------------------------------------------------------------


def table_fit() -> Iterator[str]:
    """What bench/memory.py --fit says for each shape and card."""
    files = [read(path) for path in sorted((RESULTS / "predicted").glob("fit_*.json"))]
    cards = sorted(
        {found["card"] for found in files}, key=lambda card: float(card.removesuffix("GiB"))
    )
    names = sorted({found["model"] for found in files})
    cells = {(found["model"], found["card"]): describe_fit(found) for found in files}
    heads = [WITH_SCREEN.get(card, card) for card in cards]
    return markdown(
        ["", *heads], [[name, *(cells.get((name, card), "") for card in cards)] for name in names]
    )


WITH_SCREEN = {"7.5GiB": "8GiB with a screen on it"}  # The screen is taken to need half a GiB.


def table_t4() -> Iterator[str]:
    """What bench/memory.py --fit 16GiB --capability 7.5 says."""
    rows = []
    for path in sorted((RESULTS / "predicted").glob("t4_*.json")):
        found = read(path)
        length = path.stem.rpartition("_")[2]
        rows.append(
            [
                found["model"],
                length,
                describe_fit(found),
                f"{found['predicted_peak_bytes'] / GIB:.2f}",
                f"{found['predicted_reserved_bytes'] / GIB:.2f}",
            ]
        )
    return markdown(["", "row", "micro-batch, layers recomputed", "peak GiB", "reserved GiB"], rows)


def describe_fit(found: dict) -> str:
    layers = (
        "all, offloaded"
        if found["gradient_checkpointing"] == "offload"
        else f"{found['recomputed_layers']} of {found['layers']}"
    )
    return f"{found['max_tokens_per_batch']:,} tokens, {layers}; rows to {found['longest_row']:,}"


# What others' pages say, and the forecast that is nearest to it.
MEMORY_CLAIMS = (
    ("Llama-3-8B, QLoRA, 256 tokens", "6.2 to 6.5 GB", "claim_llama3-8b_256"),
    ("an 8B model trained at 1,024 tokens", "on 8 GB", "claim_llama3-8b_1024"),
    ("Phi-3-mini, 1,024 tokens", "12 to 13 GB", "claim_phi3-mini_1024"),
    ("Gemma-2B, QLoRA instead of full fine-tuning", "10 GB instead of 40", "claim_gemma-2b_1024"),
)
# Unsloth's table for Llama-3.1-8B, r=32
LENGTH_CLAIMS = (
    ("8GiB", 2_972),
    ("12GiB", 21_848),
    ("16GiB", 40_724),
    ("24GiB", 78_475),
    ("80GiB", 342_733),
)
SHARE_CLAIM = ("trainable parameters of Llama-3-8B", "0.17 %", "claim_llama3-8b_share")


def table_published() -> Iterator[str]:
    rows = []
    for claim, published, name in MEMORY_CLAIMS:
        found = read(RESULTS / "predicted" / f"{name}.json")
        rows.append(
            [
                claim,
                published,
                (
                    f"{(found['predicted_peak_bytes'] + found['context_bytes']) / 1e9:.1f} GB with"
                    " the CUDA context"
                ),
            ]
        )
    for card, published in LENGTH_CLAIMS:
        found = read(RESULTS / "predicted" / f"claim_llama3.1-8b_{card}.json")
        rows.append(
            [
                f"Llama-3.1-8B, r=32, longest row on {card.replace('GiB', ' GB')}",
                f"{published:,} (Unsloth)",
                f"{found['longest_row']:,}",
            ]
        )
    claim, published, name = SHARE_CLAIM
    found = read(RESULTS / "predicted" / f"{name}.json")
    rows.append(
        [
            f"{claim}, r=32 on queries and values",
            published,
            f"{found['trainable_parameters'] / found['base_parameters']:.2%}".replace("%", " %"),
        ]
    )
    return markdown(["", "published", "predicted here"], rows)


TABLES = {
    "strategies": table_strategies,
    "sft": table_sft,
    "data": table_data,
    "lm_eval": table_lm_eval,
    "measured": table_measured,
    "throughput": table_throughput,
    "fit": table_fit,
    "t4": table_t4,
    "published": table_published,
    "gpu_checks": table_gpu_checks,
    "gpu_memory": table_gpu_memory,
    "gpu_speed": table_gpu_speed,
}


def fill(page: Path) -> tuple[str, str]:
    """(text as it is, text with the tables of the results).

    Raises:
        ConfigError: no such page, an unknown table, or figures that are not recorded.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{page}: {error.strerror}; give a page of the documentation") from None

    def replace(found: re.Match) -> str:
        name = found[1]
        if name not in TABLES:
            raise ConfigError(f"{page}: unknown table {name}; there are {', '.join(TABLES)}")
        try:
            lines = "\n".join(TABLES[name]())
        except (OSError, KeyError, IndexError, ValueError) as error:
            raise ConfigError(
                f"table {name}: its figures are not recorded under {RESULTS} ({error}); run the"
                " benchmark with --json"
            ) from None
        return f"<!-- table {name} -->\n{lines}\n<!-- end of {name} -->"

    return text, re.sub(
        r"<!-- table (\w+) -->\n.*?<!-- end of \1 -->", replace, text, flags=re.DOTALL
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--write", type=Path, nargs="+", default=[], help="pages whose tables are replaced"
    )
    parser.add_argument(
        "--check", type=Path, nargs="+", default=[], help="pages whose tables must be these"
    )
    arguments = parser.parse_args()
    if not arguments.write and not arguments.check:
        raise ConfigError("expected --write PAGE or --check PAGE")
    for page in arguments.check:
        before, after = fill(page)
        if before != after:
            raise ConfigError(
                f"{page}: its tables are not those of bench/results; run python bench/tables.py"
                f" --write {page}"
            )
    for page in arguments.write:
        write_atomic(page, fill(page)[1])


if __name__ == "__main__":
    run_command(main)
