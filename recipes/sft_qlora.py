"""Fine-tune a language model on medical questions with QLoRA, and say how much better it got.

    accelerate launch recipes/sft_qlora.py                                  # the embedded demonstration
    accelerate launch recipes/sft_qlora.py --config recipes/configs/NAME.yaml --output_dir runs/mine
    accelerate launch recipes/sft_qlora.py --config … --output_dir runs/mine --resume

Reads top to bottom: check everything, prepare rows, load, score, train, score again, report.
"""

import argparse
import contextlib
import math
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from medqlora import runs
from medqlora.attention import packing_arguments, verify_isolation
from medqlora.checkpoints import load_newest, save_checkpoint
from medqlora.config import UserError, help_text, load_config
from medqlora.engines.hf import HfEngine
from medqlora.losses import AnswerLoss, backbone_of
from medqlora.metrics import compare_paired, score_predictions
from medqlora.models import (
    adapter_weights,
    architecture_hash,
    attach_adapter,
    check_hardware,
    check_length,
    choose_dtype,
    count_parameters,
    load_base,
    load_tokenizer,
    read_model_config,
    resolve_base,
    restore_adapter,
    sample_weights,
    save_adapter,
    set_checkpointing,
)  # fmt: skip
from medqlora.optimizers import learning_rate, make_optimizer
from medqlora.packing import cap_batches, collate, derive_accumulation, fit_bins
from medqlora.predictions import collect_rows
from medqlora.preparation import count_reasons, prepare, prepare_plan
from medqlora.scoring import answer
from medqlora.tokens import TokenTable, make_encoder

ISOLATION_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
console = Console(highlight=False, soft_wrap=True)


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog="configuration keys:\n" + help_text()
    )
    demo = Path(__file__).parent / "configs" / "demo.yaml"
    parser.add_argument("--config", type=Path, default=demo, help="YAML file (default: the embedded demonstration)")
    parser.add_argument("--output_dir", type=Path, help="run folder (default: runs/NAME of the config)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --output_dir from its newest checkpoint")
    return parser.parse_known_args()


def main() -> int:
    arguments, overrides = parse_arguments()
    config = load_config(arguments.config, overrides)
    output_dir = arguments.output_dir or Path("runs") / arguments.config.stem
    training = config.training
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    # ---- everything that can be wrong is said before a weight loads --------------------------------------------------
    kind = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = choose_dtype(config.model.dtype, kind)
    check_hardware(config.model, kind, dtype)
    accelerator = Accelerator(
        cpu=kind.type == "cpu",  # without it two processes on a CPU would train two unsynchronised copies
        mixed_precision="fp16" if dtype is torch.float16 else "no",
        log_with=None if training.log_with == "none" else training.log_with, project_dir=output_dir,
    )  # fmt: skip
    device, rank, ranks = accelerator.device, accelerator.process_index, accelerator.num_processes
    is_main = accelerator.is_main_process
    memory = runs.MemoryMeter(cuda=device.type == "cuda")
    memory_before = memory.now()
    model_config = read_model_config(config.model.base, config.model.revision, config.model.trust_remote_code)
    check_length(model_config, config.data.max_length)
    accumulation = derive_accumulation(training.global_batch_tokens, training.max_tokens_per_batch, ranks)
    base_size, adapter_size = count_parameters(model_config, config.lora)
    encoder = make_encoder(
        load_tokenizer(config.model.base, config.model.revision, config.model.trust_remote_code),
        config.data.prompt_style, config.data.completion,
    )  # fmt: skip
    # 4 bytes for the weight and 8 for AdamW's moments, for the kept checkpoints and the one being written
    runs.check_run(output_dir, config, arguments.resume)
    runs.check_disk(output_dir, 12 * adapter_size * (training.keep_checkpoints + 2), "adapter and checkpoints")
    prepared = prepare(config, encoder)
    plan, plan_hash = prepare_plan(config, prepared, ranks)
    if is_main:
        runs.open_run(output_dir, config)
    accelerator.wait_for_everyone()
    checkpoints, log = output_dir / "checkpoints", output_dir / runs.LOG
    checkpoint, warnings = load_newest(checkpoints) if arguments.resume else (None, [])
    if is_main:
        for warning in warnings:
            console.print(f"[yellow]warning: {warning}")
        show_data(prepared, plan, accumulation, output_dir)

    # ---- load ----------------------------------------------------------------------------------------------------------
    base_dir = resolve_base(config.model.base, config.model.revision)
    base, backend = load_base(config.model, device)
    isolation = verify_isolation(backbone_of(base), backend, base.config.get_text_config().vocab_size, ISOLATION_TOLERANCE[dtype])
    model = attach_adapter(base, config.lora, training.seed)
    recomputed = set_checkpointing(base, training.gradient_checkpointing, device)
    loss_model = AnswerLoss(model, training.loss_chunk_tokens)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(training, weights)
    loss_model, optimizer = accelerator.prepare(loss_model, optimizer)
    start, best_loss, best_step, patience = 0, math.inf, 0, 0
    if checkpoint is not None:
        restore_adapter(model, checkpoint.adapter)
        optimizer.load_state_dict(checkpoint.optimizer)
        start, best_step, patience = (checkpoint.state[key] for key in ("step", "best_step", "patience"))
        best_loss = checkpoint.state["best_loss"] or math.inf
    if is_main and arguments.resume:
        runs.rewind_log(log, start)
    card = {
        "prompt_style": encoder.style, "completion": encoder.completion, "prompt_sha256": prepared.hashes["prompt_sha256"],
        "base": config.model.base, "revision": base_dir.name if base_dir.parent.name == "snapshots" else config.model.revision,
        "architecture_sha256": architecture_hash(base.config), "base_sha256": sample_weights(base_dir),
        "quantization": config.model.quantization, "double_quantization": config.model.double_quantization,
        "dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    if is_main:
        facts = runs.describe_environment() | {"seed": training.seed, **prepared.hashes, "plan_sha256": plan_hash}
        facts |= {"base": card, "processes": ranks, "attention": backend, "gradient_checkpointing": recomputed}
        facts |= {"isolation_error": isolation, "trainable_parameters": adapter_size, "mixture": prepared.mixture}
        runs.write_json(output_dir / "environment.json", facts)
        runs.write_json_lines(output_dir / "removed.jsonl", [asdict(removal) for removal in prepared.removals])
        trainable = f"{adapter_size:,} trainable beside {base_size:,} frozen parameters"
        console.print(
            f"{config.model.base}: {config.model.quantization}, {card['dtype']}, {trainable}; attention {backend} isolates packed "
            f"rows (error {isolation:.0e}); recomputation {recomputed}; {device}"
        )
        if checkpoint is not None:
            console.print(f"resuming after step {start} of {len(plan)} ({checkpoint.path})")
    accelerator.init_trackers("medqlora", config={key: str(value) for key, value in config.model_dump(mode="json").items()})
    memory_loaded = memory.now()

    # ---- score before --------------------------------------------------------------------------------------------------
    predictions = output_dir / "predictions"
    if is_main and prepared.test and not (predictions / "base.jsonl").is_file():
        predictions.mkdir(exist_ok=True)
        with model.disable_adapter():
            rows = answer(HfEngine(model, backend, training.max_tokens_per_batch), encoder, prepared.test, "base")
        runs.write_json_lines(predictions / "base.jsonl", rows)

    # ---- train ---------------------------------------------------------------------------------------------------------
    stop_signals = catch_signals()
    lengths, supervised = prepared.train.lengths, prepared.train.lengths - prepared.train.prompt_lengths
    budget = training.max_tokens_per_batch
    progress = make_progress(disable=not is_main)
    task = progress.add_task("training", total=len(plan), completed=start, facts="")
    with progress:
        for step in range(start, len(plan)):
            began = time.perf_counter()
            model.train()
            torch.manual_seed((training.seed << 40) + (step << 12) + rank)  # each step has its own dropout: no state to resume
            lr = learning_rate(step, len(plan), training)
            for group in optimizer.param_groups:
                group["lr"] = lr
            rows_of_step = plan.rows[plan.bins[plan.steps[step]] : plan.bins[plan.steps[step + 1]]]
            targets = int(supervised[rows_of_step].sum())  # of all ranks and micro-batches
            while True:
                batches = cap_batches(lengths, plan.micro_batches(step, rank, ranks), budget)
                try:
                    losses = []
                    for number, rows in enumerate(batches):
                        batch = move(collate(prepared.train, rows), backend, device)
                        last = number == len(batches) - 1
                        with contextlib.nullcontext() if last else accelerator.no_sync(loss_model):
                            loss = loss_model(**batch)
                            # DDP averages over ranks; the gradient wanted is that of the sum over all supervised tokens
                            accelerator.backward(loss * (ranks / targets))
                        losses.append(loss.detach())
                    break
                except torch.OutOfMemoryError:
                    if ranks > 1:
                        raise TrainingError(f"out of memory on rank {rank}; lower training.max_tokens_per_batch below {budget}") from None
                    optimizer.zero_grad()
                    torch.cuda.empty_cache()
                    budget //= 2
                    progress.console.print(f"[yellow]out of memory: micro-batches of {budget} tokens from here on, same global batch")
            step_loss = accelerator.reduce(torch.stack(losses).sum(), "sum").item() / targets
            if not math.isfinite(step_loss):
                raise TrainingError(describe_non_finite(loss_model, prepared.train, batches, losses, backend, device, step + 1))
            grad_norm = accelerator.clip_grad_norm_(weights, training.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()

            done, tokens = step + 1, int(lengths[rows_of_step].sum())
            row = {
                "step": done, "epoch": round(float(plan.epochs[step]), 6), "loss": step_loss, "lr": lr, "grad_norm": float(grad_norm),
                "tokens": tokens, "supervised_tokens": targets, "padding_fraction": 0.0,
                "tokens_per_second": tokens / (time.perf_counter() - began), "peak_memory_bytes": memory.read_peak(),
            }  # fmt: skip
            if is_main:
                runs.append_line(log, row)
                accelerator.log(row, step=done)
                facts = f"loss {step_loss:.3f}  lr {lr:.1e}  {row['tokens_per_second']:,.0f} tokens/s  {targets} supervised"
                progress.update(task, completed=done, facts=f"{facts}  {row['peak_memory_bytes'] / 2**30:.2f} GiB")
                if not console.is_terminal and (done % max(1, len(plan) // 10) == 0 or done == len(plan)):
                    console.print(f"step {done}/{len(plan)}  {facts}  {row['peak_memory_bytes'] / 2**30:.2f} GiB")
            final = done == len(plan)
            if prepared.eval is not None and (final or (training.eval_steps and done % training.eval_steps == 0)):
                eval_loss = evaluate(accelerator, loss_model, prepared.eval, budget, backend)
                better = eval_loss < best_loss
                best_loss, best_step, patience = (eval_loss, done, 0) if better else (best_loss, best_step, patience + 1)
                if is_main:
                    facts = {"step": done, "eval_loss": eval_loss, "perplexity": math.exp(min(eval_loss, 700))}
                    runs.append_line(log, facts)
                    accelerator.log(facts, step=done)
                    if better:
                        save_adapter(output_dir / "adapter", model, card | {"step": done, "eval_loss": eval_loss})
            stopping = training.early_stopping_patience is not None and patience >= training.early_stopping_patience
            if is_main and (final or stopping or stop_signals or (training.save_steps and done % training.save_steps == 0)):
                state = {"best_loss": best_loss if math.isfinite(best_loss) else None, "best_step": best_step, "patience": patience}
                path = save_checkpoint(checkpoints, done, adapter_weights(model), optimizer.state_dict(), state, training.keep_checkpoints)
                if stop_signals and not final:
                    progress.console.print(f"signal {stop_signals[0]}: checkpoint {path} written; continue with --resume")
            if stop_signals and not final:
                return 128 + stop_signals[0]
            if stopping:
                progress.console.print(f"stopping early: no lower evaluation loss in {patience} evaluations")
                break
    if is_main and prepared.eval is None:
        save_adapter(output_dir / "adapter", model, card | {"step": len(plan)})
    accelerator.wait_for_everyone()

    # ---- score after and report ----------------------------------------------------------------------------------------
    if is_main:
        report = {"steps": runs.read_lines(log)[-1]["step"] if log.is_file() else 0, "best_step": best_step or len(plan)}
        report["memory_bytes"] = {
            "before": memory_before, "loaded": memory_loaded, "peak": memory.read_peak(), "after": memory.now()
        }  # fmt: skip
        if prepared.test:
            restore_adapter(model, read_saved_adapter(output_dir / "adapter"))
            tuned = answer(HfEngine(model, backend, training.max_tokens_per_batch), encoder, prepared.test, "tuned")
            runs.write_json_lines(predictions / "tuned.jsonl", tuned)
            report |= show_scores(runs.read_lines(predictions / "base.jsonl"), tuned)
        runs.write_json(output_dir / "metrics.json", report)
        show_memory(report["memory_bytes"], device)
        console.print(f"adapter of step {report['best_step']}: {output_dir / 'adapter'}")
    accelerator.end_training()
    if ranks > 1:  # gloo's thread needs the interpreter to free its last work; torch 2.13 waits for that thread without letting go of it
        time.sleep(0.5)
    return 0


class TrainingError(UserError):
    """Training cannot go on."""


def move(batch: dict, backend: str, device: torch.device) -> dict:
    """Numpy batch of packing.collate -> arguments of AnswerLoss on the device."""
    tensors = {key: torch.from_numpy(batch[key]) for key in ("input_ids", "position_ids", "predict_at", "targets")}
    if device.type == "cuda":
        tensors = {key: tensor.pin_memory().to(device, non_blocking=True) for key, tensor in tensors.items()}
    return tensors | packing_arguments(backend, batch, device)


@torch.no_grad()
def evaluate(accelerator: Accelerator, loss_model: torch.nn.Module, table: TokenTable, budget: int, backend: str) -> float:
    """Mean loss per supervised token over the whole evaluation set."""
    module = accelerator.unwrap_model(loss_model)
    module.eval()
    total = torch.zeros((), device=accelerator.device)
    bins = fit_bins(table.lengths, max(budget, int(table.lengths.max())))
    for rows in bins[accelerator.process_index :: accelerator.num_processes]:
        total += module(**move(collate(table, rows), backend, accelerator.device))
    return accelerator.reduce(total, "sum").item() / int((table.lengths - table.prompt_lengths).sum())


@torch.no_grad()
def describe_non_finite(loss_model, table, batches, losses, backend, device, step) -> str:
    """Name the examples of the micro-batches whose loss is not finite, each tried alone."""
    suspects = [row for rows, loss in zip(batches, losses, strict=True) if not torch.isfinite(loss) for row in rows]
    guilty = [r for r in suspects if not torch.isfinite(loss_model(**move(collate(table, [r]), backend, device)))]
    names = ", ".join(table.names[row] for row in (guilty or suspects)[:10])
    what = "examples" if guilty else "finite alone but not together: examples"
    return f"step {step}: loss is not finite; {what} {names}; look at these rows, or lower training.lr"


def catch_signals() -> list[int]:
    """SIGTERM and SIGINT end training after the running step, with a checkpoint; a second one ends it at once."""
    caught: list[int] = []

    def remember(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, remember)
    return caught


def read_saved_adapter(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


# ---- what the user sees --------------------------------------------------------------------------------------------


def make_progress(disable: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[facts]}"))
    return Progress(*columns, console=console, disable=disable or not console.is_terminal)


def show_data(prepared, plan, accumulation: int, output_dir: Path) -> None:
    table = Table(title="training data", title_justify="left")
    for column in ("entry", "rows", "rows per epoch", "share of rows", "share of tokens"):
        table.add_column(column, justify="left" if column == "entry" else "right")
    for source in prepared.mixture:
        name = f"{source['entry']} {source['format']} {Path(source['path'] or '').name}"
        table.add_row(name, f"{source['rows']:,}", f"{source['rows_per_epoch']:,}", f"{source['row_share']:.1%}", f"{source['token_share']:.1%}")
    console.print(table)
    for reason, count in count_reasons(prepared.removals).items():
        console.print(f"removed {count:,}: {reason} (listed in {output_dir / 'removed.jsonl'})")
    console.print(
        f"{len(plan):,} steps of {accumulation} micro-batch(es) per process; "
        f"{len(prepared.eval.lengths) if prepared.eval else 0:,} rows for the evaluation loss, {len(prepared.test):,} test questions"
    )


def show_scores(base: list[dict], tuned: list[dict]) -> dict:
    """Print base against tuned; -> the keys of metrics.json, for the tuned model, with `base` and `comparison` inside."""
    base, tuned = collect_rows(base), collect_rows(tuned)
    before, after = score_predictions(base), score_predictions(tuned)
    comparison = compare_paired(base.right, tuned.right)
    table = Table(title="accuracy on the test questions", title_justify="left")
    for column in ("", "n", "base", "95 % interval", "tuned", "95 % interval"):
        table.add_column(column, justify="left" if not column else "right")
    lines = [("all", before, after)] + [(name, s, after["per_subject"][name]) for name, s in before["per_subject"].items()]
    for name, a, b in lines:
        intervals = [f"{s['accuracy_ci95'][0]:.1%} – {s['accuracy_ci95'][1]:.1%}" for s in (a, b)]
        table.add_row(name, str(a["n"]), f"{a['accuracy']:.1%}", intervals[0], f"[bold]{b['accuracy']:.1%}", intervals[1])
    console.print(table)
    low, high = comparison["difference_ci95"]
    p = comparison["mcnemar_p"]
    console.print(
        f"difference {comparison['difference']:+.1%} (95 % interval {low:+.1%} to {high:+.1%}), paired exact McNemar p "
        f"{'< 1e-12' if p < 1e-12 else f'= {p:.2g}'}"
    )
    return {**after, "base": before, "comparison": comparison}


def show_memory(memory: dict[str, int], device: torch.device) -> None:
    kind = "GPU memory, allocated" if device.type == "cuda" else "memory of this process, resident"
    console.print(f"{kind}: " + ", ".join(f"{name} {value / 2**20:,.0f} MiB" for name, value in memory.items()))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # before the first step; later ones end with a checkpoint
        sys.exit(130)
