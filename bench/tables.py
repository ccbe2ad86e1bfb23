"""The measured and predicted tables of the documentation, made from the recorded figures in
bench/results.

    # Replace what stands between the markers <!-- table NAME --> and <!-- end of NAME -->.
    python bench/tables.py --write docs/benchmarks.md docs/memory.md docs/claims.md docs/gpu.md \
        eval/README.md
    # End with exit code 2 if a page holds other tables.
    python bench/tables.py --check docs/benchmarks.md docs/memory.md docs/claims.md docs/gpu.md

Nobody types a figure between markers: record it with the command in its file, then write the pages.
"""

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from medqlora.core.entry import enter

    enter()

from medqlora.core.command import CommandParser, run_command
from medqlora.core.errors import ConfigError
from medqlora.core.files import write_atomic
from medqlora.reporting.before_after import describe_accuracy, tabulate_training
from medqlora.reporting.claims import list_rows

RESULTS = Path(__file__).parent / "results"
# Measured figures stand in a folder of their machine. Forecasts are the same everywhere.
MACHINE = RESULTS / "cpu-2-cores"
PREDICTED = RESULTS / "predicted"
CLAIMS = Path(__file__).parent / "claims.json"
GIB = 2**30
NOT_YET = "none recorded yet"


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def markdown(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|---" * len(head) + "|"
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"


# ---- measured ------------------------------------------------------------------------------------


def table_strategies() -> Iterator[str]:
    rows = []
    for name, result in read(MACHINE / "strategies_demo.json")["rows"].items():
        if name == "one":
            continue
        row = [name, f"{result['loss_difference']:.0e}", f"{result['grad_norm_difference']:.0e}"]
        row += [f"{result['gradient_check']['seconds']:.1f} s", f"{result['speed']:.2f} x"]
        rows.append(row)
    head = ["", "largest difference of a loss", "of a gradient norm", "start-up check", "tokens/s"]
    return markdown(head, rows)


def table_sft() -> Iterator[str]:
    rows = []
    for path in sorted(MACHINE.glob("sft_*.json")):
        recorded = read(path)
        for name, result in recorded["results"].items():
            # The recorded names have no versions. These are the ones that were compared.
            full_name = name.replace("trl", "TRL 1.16")
            row = [
                recorded["settings"]["dtype"],
                full_name.replace("llamafactory", "LLaMA-Factory 0.9.5"),
                f"{result['tokens_per_second_ratio']:.2f} x",
                f"{result['peak_memory_ratio']:.2f} x",
                f"{result['final_loss']:.4f}",
            ]
            rows.append(row)
    return markdown(["", "", "real tokens/s", "peak memory", "loss of the trained adapter"], rows)


def table_data() -> Iterator[str]:
    results = read(MACHINE / "data_smollm2.json")["results"]
    ours = results["whole"]
    # trl2 is TRL with two worker processes.
    trl = results["trl"]
    rows = [
        [
            "ours",
            f"{trl['seconds'] / ours['seconds']:.1f} x",
            f"{results['trl2']['seconds'] / ours['seconds']:.1f} x",
            *describe_preparation(ours),
        ],
        ["TRL 1.16", "1.0 x", "", *describe_preparation(trl)],
    ]
    head = ["", "rows/s against its default", "against two worker processes"]
    return markdown([*head, "peak memory", "tokens", "packs"], rows)


def describe_preparation(result: dict) -> list[str]:
    return [mib(result["peak_memory_bytes"]), f"{result['tokens']:,}", f"{result['packs']:,}"]


def table_measured() -> Iterator[str]:
    rows = []
    for path in sorted(MACHINE.glob("memory_*.json")):
        result = read(path)
        row = [
            path.stem.removeprefix("memory_").replace("_", ", "),
            result["dtype"],
            f"{result['recomputed_layers']} of {result['layers']}",
            f"{result['predicted_peak_bytes'] / GIB:.3f}",
            f"{result['measured_peak_bytes'] / GIB:.3f}",
            f"{result['relative_error']:+.1%}",
        ]
        rows.append(row)
    head = ["case", "dtype", "layers recomputed", "predicted GiB", "measured GiB", "error"]
    return markdown(head, rows)


def table_throughput() -> Iterator[str]:
    results = read(MACHINE / "throughput_demo.json")["cases"]
    # The first case of a sweep is what the others are compared with.
    first = results[0]["real_tokens_per_second"]
    rows = []
    for result in results:
        settings = [f"{key.rpartition('.')[2]} {value}" for key, value in result["case"].items()]
        row = [
            ", ".join(settings),
            f"{result['real_tokens_per_second'] / first:.2f} x",
            f"{result['model_flops_utilisation']:.0%}",
            mib(result["peak_memory_bytes"]),
        ]
        rows.append(row)
    return markdown(["", "real tokens/s", "utilisation", "memory above the start"], rows)


def table_before_after() -> Iterator[str]:
    """Times are left out, because those of so small a model are Python's."""
    rows = []
    for name, model in read(MACHINE / "before_after_demo.json")["models"].items():
        row = [f"{name.replace('_', ' ')} ({model['weights']})"]
        row += [f"{model[key] / 1e6:.2f} MB" for key in ("disk_bytes", "memory_bytes")]
        rows.append([*row, *describe_accuracy(model)])
    return markdown(["", "on disk", "in memory", "accuracy", "95 % interval"], rows)


def table_training_memory() -> Iterator[str]:
    training = read(MACHINE / "before_after_demo.json")["training"]
    _, head, rows = tabulate_training(training)
    return markdown(head, rows)


def table_lm_eval() -> Iterator[str]:
    rows = []
    for path in sorted(MACHINE.glob("lm_eval_*.json")):
        recorded = read(path)
        settings = recorded["settings"]
        # Each file records a single task.
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
    """The stages of every recorded GPU, by the name of its folder."""
    return {path.parent.name: read(path)["stages"] for path in sorted(RESULTS.glob("*/gpu.json"))}


def gpu_table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    # A page has its table before any GPU has been recorded.
    return markdown(head, rows or [[NOT_YET, *[""] * (len(head) - 1)]])


def table_gpu_checks() -> Iterator[str]:
    return gpu_table(["", "stage", "", "checks passed", "seconds"], rows_of_checks(read_gpus()))


def rows_of_checks(gpus: dict[str, dict]) -> list[list[str]]:
    rows = []
    for name, stages in gpus.items():
        for stage, result in stages.items():
            checks = result.get("checks", [])
            passed = f"{sum(check['ok'] for check in checks)} of {len(checks)}" if checks else ""
            seconds = f"{result.get('seconds', 0):.0f}"
            rows.append([name, stage, result["status"], passed, seconds])
    return rows


def table_gpu_memory() -> Iterator[str]:
    head = ["", "case", "peak GiB, predicted", "measured", "error"]
    head += ["reserved GiB, predicted", "measured", "error"]
    return gpu_table(head, rows_of_memory(read_gpus()))


def rows_of_memory(gpus: dict[str, dict]) -> list[list[str]]:
    rows = []
    for name, stages in gpus.items():
        for case, figures in stages.get("memory", {}).get("figures", {}).items():
            row = [name, case]
            for kind in ("peak", "reserved"):
                predicted = figures[f"predicted_{kind}_bytes"]
                measured = figures[f"measured_{kind}_bytes"]
                row += [gib(predicted), gib(measured), f"{predicted / measured - 1:+.1%}"]
            rows.append(row)
    return rows


def table_gpu_speed() -> Iterator[str]:
    head = ["", "case", "tokens/s", "utilisation", "peak GiB"]
    return gpu_table(head, rows_of_speed(read_gpus()))


def rows_of_speed(gpus: dict[str, dict]) -> list[list[str]]:
    rows = []
    for name, stages in gpus.items():
        for case, figures in stages.get("throughput", {}).get("figures", {}).items():
            # The stage also records the model, and the cases that did not fit the memory.
            if not isinstance(figures, dict) or "tokens_per_second" not in figures:
                continue
            used = figures["model_flops_utilisation"]
            peak = figures["peak_memory_bytes"]
            row = [name, case, f"{figures['tokens_per_second']:,.0f}"]
            rows.append([*row, f"{used:.0%}" if used else "?", gib(peak) if peak else ""])
    return rows


# ---- predicted -----------------------------------------------------------------------------------

WITH_SCREEN = {"7.5GiB": "8GiB with a screen on it"}  # We assume half a GiB for a screen.

# Unsloth's table for Llama-3.1-8B, r=32: memory of the GPU, and tokens of the longest row.
LENGTH_CLAIMS = {
    "8GiB": 2_972,
    "12GiB": 21_848,
    "16GiB": 40_724,
    "24GiB": 78_475,
    "80GiB": 342_733,
}


def table_fit() -> Iterator[str]:
    """What bench/memory.py --fit says for each shape and GPU."""
    results = [read(path) for path in sorted(PREDICTED.glob("fit_*.json"))]
    sizes = {result["card"] for result in results}
    # A sort of the texts would put 12GiB before 8GiB.
    sizes = sorted(sizes, key=lambda size: float(size.removesuffix("GiB")))
    fits = {(result["model"], result["card"]): describe_fit(result) for result in results}
    rows = []
    for model in sorted({result["model"] for result in results}):
        # A field stays empty where no forecast is recorded, as where the model does not fit.
        rows.append([model, *(fits.get((model, size), "") for size in sizes)])
    return markdown(["", *(WITH_SCREEN.get(size, size) for size in sizes)], rows)


def table_t4() -> Iterator[str]:
    """What bench/memory.py --fit 16GiB --capability 7.5 says."""
    rows = []
    for path in sorted(PREDICTED.glob("t4_*.json")):
        result = read(path)
        row = [result["model"], path.stem.rpartition("_")[2], describe_fit(result)]
        row += [gib(result["predicted_peak_bytes"]), gib(result["predicted_reserved_bytes"])]
        rows.append(row)
    return markdown(["", "row", "micro-batch, layers recomputed", "peak GiB", "reserved GiB"], rows)


def describe_fit(result: dict) -> str:
    layers = f"{result['recomputed_layers']} of {result['layers']}"
    if result["gradient_checkpointing"] == "offload":
        layers = "all, offloaded"
    return f"{result['max_tokens_per_batch']:,} tokens, {layers}; rows to {result['longest_row']:,}"


def table_lengths() -> Iterator[str]:
    rows = []
    for size, published in LENGTH_CLAIMS.items():
        result = read(PREDICTED / f"claim_llama3.1-8b_{size}.json")
        rows.append([size.replace("GiB", " GB"), f"{published:,}", f"{result['longest_row']:,}"])
    return markdown(["", "published", "predicted here"], rows)


# ---- figures that others publish: bench/claims.json ----------------------------------------------


def read_forecast(name: str) -> dict:
    return read(PREDICTED / f"{name}.json")


def table_claims(project: str) -> Iterator[str]:
    """A project's settings, and its claims with our figure, the verdict and the reason."""
    checked = read(CLAIMS)["projects"][project]
    yield from textwrap.wrap(checked["settings"], 100)
    yield ""
    rows = list_rows(checked["claims"], read_forecast)
    yield from markdown(["published", "ours", "verdict", "why"], list(rows))


def table_commands() -> Iterator[str]:
    """What the authors of each project run, and the command that does it here."""
    projects = read(CLAIMS)["projects"].values()
    rows = [[project["title"], *command] for project in projects for command in project["commands"]]
    return markdown(["", "their command", "here"], rows)


# ---- the pages -----------------------------------------------------------------------------------


def table_safety() -> Iterator[str]:
    rows = []
    for row in read(RESULTS / "safety.json")["rates"]:
        low, high = row["rate_ci95"]
        name = row["part"].replace("_", " ")
        interval = f"{low:.2%} to {high:.2%}"
        wrong = f"{row['wrong']:,}"
        rows.append([name, row["kind"], f"{row['n']:,}", wrong, f"{row['rate']:.2%}", interval])
    head = ["questions", "kind", "n", "missed, or alarms", "rate", "95 % interval"]
    return markdown(head, rows)


TABLES = {
    "safety": table_safety,
    "strategies": table_strategies,
    "sft": table_sft,
    "data": table_data,
    "before_after": table_before_after,
    "training_memory": table_training_memory,
    "lm_eval": table_lm_eval,
    "measured": table_measured,
    "throughput": table_throughput,
    "fit": table_fit,
    "t4": table_t4,
    "lengths": table_lengths,
    "claims_qwen": partial(table_claims, "qwen"),
    "claims_phi": partial(table_claims, "phi"),
    "claims_pubmedqa": partial(table_claims, "pubmedqa"),
    "claims_gemma": partial(table_claims, "gemma"),
    "claims_medqa": partial(table_claims, "medqa"),
    "commands": table_commands,
    "gpu_checks": table_gpu_checks,
    "gpu_memory": table_gpu_memory,
    "gpu_speed": table_gpu_speed,
}


def fill(page: Path) -> tuple[str, str]:
    """The page's text as it is, and with the tables of the results.

    Raises:
        ConfigError: no such page, an unknown table, or figures that are not recorded.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{page}: {error.strerror}; give a page of the documentation") from None

    def replace(match: re.Match) -> str:
        name = match[1]
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

    # The closing marker must have the name of the opening one, so a lost marker cannot swallow the
    # next table.
    pattern = r"<!-- table (\w+) -->\n.*?<!-- end of \1 -->"
    return text, re.sub(pattern, replace, text, flags=re.DOTALL)


def main() -> None:
    parser = CommandParser(
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
    # The pages are checked before any is written.
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
