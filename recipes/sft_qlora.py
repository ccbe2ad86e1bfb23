"""Fine-tune a language model on medical questions with QLoRA, and say how much better it got.

    accelerate launch recipes/sft_qlora.py  # the embedded demonstration
    accelerate launch recipes/sft_qlora.py --config recipes/configs/NAME.yaml --output_dir runs/mine
    accelerate launch recipes/sft_qlora.py --config … --output_dir runs/mine --resume

Reads top to bottom: check everything, prepare rows, load, score, train, score again, report.
"""

import argparse
import contextlib
import gc
import json
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medqlora.core.environment import prefer_expandable_segments

prefer_expandable_segments(os.environ)  # torch reads it when it is imported.

import torch
import transformers
from accelerate import Accelerator
from peft import PeftModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from medqlora.batches.cache import Prepared, load_plan, load_prepared, prepare_plan, save_prepared
from medqlora.batches.collate import cap_batches, collate, most_supervised
from medqlora.batches.pipeline import count_reasons, prepare
from medqlora.batches.plan import Plan, derive_accumulation, fit_bins, list_budgets
from medqlora.core.config import Config
from medqlora.core.config_loading import change, help_text, load_config
from medqlora.core.environment import MemoryMeter, describe_environment
from medqlora.core.errors import UserError
from medqlora.core.files import (
    append_line,
    check_disk,
    hash_json,
    read_lines,
    write_json,
    write_json_lines,
)
from medqlora.core.run_folder import LOG, check_run, open_run, rewind_log
from medqlora.engines.hf import HfEngine
from medqlora.evaluation.answering import answer
from medqlora.evaluation.comparison import compare_paired
from medqlora.evaluation.metrics import score_predictions
from medqlora.evaluation.predictions import collect_rows
from medqlora.model.adapter import (
    adapter_weights,
    attach_adapter,
    name_parameters,
    restore_adapter,
    save_adapter,
    trainable,
)
from medqlora.model.attention.backends import Choice, choose_backend
from medqlora.model.attention.packed_batch import move_batch, verify_isolation
from medqlora.model.base import (
    backbone_of,
    check_hardware,
    check_length,
    load_base,
    load_tokenizer,
    read_model_config,
)
from medqlora.model.compiling import compile_layers
from medqlora.model.hardware import choose_dtype
from medqlora.model.head_loss import AnswerLoss, count_chunks
from medqlora.model.identity import architecture_hash, resolve_base, sample_weights
from medqlora.model.random_base import count_parameters
from medqlora.model.recomputation import set_checkpointing
from medqlora.prompts.chat_template import Encoder, make_encoder
from medqlora.prompts.encoding import TokenTable
from medqlora.training.checkpoints import Checkpoint, load_newest, save_checkpoint
from medqlora.training.memory.allocator import segments_expand
from medqlora.training.memory.estimate import forecast_plan
from medqlora.training.memory.planner import cost_of_attention, plan_step
from medqlora.training.memory.setting import Setting, StepPlan, available_host, available_memory
from medqlora.training.memory.tracker import GIB
from medqlora.training.optimizers import learning_rate, make_optimizer
from medqlora.training.processes import (
    AgreedError,
    ProcessError,
    check_versions,
    gather,
    share_once,
    start_processes,
    together,
)
from medqlora.training.strategies.gradient_check import (
    compare_gradients,
    compute_reference,
    measure_gradients,
    wake_adapter,
)
from medqlora.training.strategies.launch import (
    Strategy,
    check_strategy,
    choose_storage,
    read_strategy,
)
from medqlora.training.strategies.wrapping import gather_weights, load_states, wrap

ISOLATION_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
console = Console(highlight=False, soft_wrap=True)


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="configuration keys:\n" + help_text(),
    )
    demo = Path(__file__).parent / "configs" / "demo.yaml"
    parser.add_argument(
        "--config", type=Path, default=demo, help="YAML file (default: the embedded demonstration)"
    )
    parser.add_argument(
        "--output_dir", type=Path, help="run folder (default: runs/NAME of the config)"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --output_dir from its newest checkpoint",
    )
    return parser.parse_known_args()


def main() -> int:
    arguments, overrides = parse_arguments()
    config = load_config(arguments.config, overrides)
    output_dir = arguments.output_dir or Path("runs") / arguments.config.stem
    # rows are tokenized in threads of our own
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore", FutureWarning)  # of libraries about each other
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    run = start(config, output_dir, resume=arguments.resume or was_restarted(os.environ))
    prepare_once(run)
    load(run)
    score(run, "base")
    wrap_model(run)
    code = train(run)
    if code == 0:
        finish(run)
    run.accelerator.end_training()
    # gloo's thread needs the interpreter to free its last work; torch 2.13 waits for that thread
    # without letting go of it
    if run.strategy.ranks > 1:
        time.sleep(0.5)
    return code


@dataclass
class Run:
    """What the stages below hand on."""

    config: Config
    output_dir: Path
    resume: bool
    accelerator: Accelerator
    strategy: Strategy
    dtype: torch.dtype
    memory: MemoryMeter
    memory_bytes: dict[str, int]
    encoder: Encoder
    sizes: tuple[int, int]  # parameters of the base, of the adapter
    architecture: transformers.PretrainedConfig
    attention: Choice
    begun_with: int | None  # tokens per micro-batch of a resumed run
    prepared: Prepared | None = None
    plan: Plan | None = None
    checkpoint: Checkpoint | None = None
    model: PeftModel | None = None
    loss_model: AnswerLoss | None = None
    trainer: Any = None  # of strategies.wrap
    # of the adapter's tensors by name, before they are divided
    shapes: dict[str, torch.Size] = field(default_factory=dict)
    best_step: int = 0
    backend: str = ""
    card: dict[str, Any] = field(default_factory=dict)  # travels with the adapter
    facts: dict[str, Any] = field(default_factory=dict)  # of environment.json

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def rank(self) -> int:
        return self.accelerator.process_index


# ---- everything that can be wrong is said before a weight loads ----------------------------------


def start(config: Config, output_dir: Path, resume: bool) -> Run:
    """Join the processes and check what they were told."""
    kind = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    log_with = None if config.training.log_with == "none" else config.training.log_with
    accelerator = start_processes(
        os.environ, kind.type == "cuda", log_with=log_with, project_dir=output_dir
    )
    if config.training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # Filling only helps to find mistakes, and takes time.
        torch.utils.deterministic.fill_uninitialized_memory = False
    # transformers would divide the base while it loads, or load it on one rank only; here it is
    # whole until it has been scored
    unset_hf_deepspeed_config()
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    # of several machines, only the one whose process died counts a restart
    resume = any(gather(resume))
    with together():
        dtype = choose_dtype(config.model.dtype, kind)
        check_hardware(config.model, kind, dtype)
        strategy = read_strategy(os.environ, accelerator.num_processes)
        check_strategy(strategy, config, dtype, os.environ)
        model_config = read_model_config(
            config.model.base, config.model.revision, config.model.trust_remote_code
        )
        check_length(model_config, config.data.max_length)
        attention = choose_backend(config.model.attention, kind, dtype, model_config)
        # raises where the global batch cannot be divided
        list_budgets(config.training, config.data.max_length, strategy.ranks)
        sizes = count_parameters(model_config, config.lora)
        tokenizer = load_tokenizer(
            config.model.base, config.model.revision, config.model.trust_remote_code
        )
        encoder = make_encoder(tokenizer, config.data.prompt_style, config.data.completion)
        begun_with = read_begun(output_dir, config, strategy.ranks) if resume else None
    with together():
        check_versions(hash_json(config.model_dump(mode="json")))
    with together():
        if accelerator.is_main_process:
            check_run(output_dir, config, resume)
            # 4 bytes for the weight and 8 for AdamW's moments, for the kept checkpoints and the one
            # being written
            check_disk(
                output_dir,
                12 * sizes[1] * (config.training.keep_checkpoints + 2),
                "adapter and checkpoints",
            )
    memory = MemoryMeter(cuda=kind.type == "cuda")
    before = {"before": memory.now()}
    return Run(
        config,
        output_dir,
        resume,
        accelerator,
        strategy,
        dtype,
        memory,
        before,
        encoder,
        sizes,
        model_config,
        attention,
        begun_with,
    )


def was_restarted(environ: Mapping[str, str]) -> bool:
    """Did torch elastic or Slurm start this job again? Then it resumes without being told."""
    return any(
        int(environ.get(name) or 0) > 0
        for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    )


def prepare_once(run: Run) -> None:
    """Rank 0 reads, cleans, tokenizes, decides what the configuration leaves to a forecast, and
    plans; the others map what it wrote. Then the run folder is opened."""
    config = run.config
    data = run.config.data
    # of the fullest GPU
    memory = min(gather(available_memory(run.device, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))))

    def work(report: Callable[[str], None]) -> dict[str, Any]:
        run.prepared = prepare(config, run.encoder, report)
        report("forecasting")
        decided = decide_step(run, memory)
        report("planning")
        run.plan, name = prepare_plan(apply_step(config, decided), run.prepared, run.strategy.ranks)
        return {
            "prepared": save_prepared(data, run.prepared) if run.strategy.ranks > 1 else "",
            "plan": name,
            "step": decided,
        }

    show = console.print if run.accelerator.is_local_main_process else lambda text: None
    shared = share_once(Path(data.cache_dir).expanduser(), work, show)
    run.config, run.facts["step_plan"] = apply_step(config, shared["step"]), shared["step"]
    with together():
        if run.rank == 0:
            open_run(run.output_dir, config)
        else:
            run.prepared, run.plan = (
                load_prepared(data, shared["prepared"]),
                load_plan(data, shared["plan"]),
            )
    run.facts["plan_sha256"] = shared["plan"].removeprefix("plan-")
    with together():
        run.checkpoint, damaged = (
            load_newest(run.output_dir / "checkpoints") if run.resume else (None, [])
        )
    with together():
        found = gather(run.checkpoint and run.checkpoint.state["step"])
        if len(set(found)) > 1:
            raise ProcessError(
                f"ranks see different newest checkpoints (steps {found}); --output_dir must be on a"
                " filesystem that all machines share"
            )
    if run.rank == 0:
        for warning in damaged:
            console.print(f"[yellow]warning: {warning}")
        show_data(run)
        if "no_forecast" in shared["step"]:
            console.print(
                f"[yellow]the memory of a step is not known: {shared['step']['no_forecast']}"
            )
        else:
            show_step(shared["step"])


def decide_step(run: Run, memory: int) -> dict[str, Any]:
    """Micro-batch and recomputation by forecast, where the configuration says auto. A resumed run
    keeps the micro-batches that it began with, which its plan is made of; recomputation changes no
    number and is decided for the machine at hand.
    """
    config = run.config
    training = run.config.training
    if run.begun_with and training.max_tokens_per_batch == "auto":
        config = change(config, "training", max_tokens_per_batch=run.begun_with)
    storage = choose_storage(run.strategy, config.model.quantization, run.dtype)
    host = available_host(int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
    setting = Setting(
        run.device, run.dtype, storage, run.strategy, memory, host, expandable=segments_expand()
    )
    try:
        found = plan_recipe(run, config, setting)
        cost = cost_of_attention(
            config,
            run.architecture,
            setting,
            found,
            most_supervised(run.prepared.train, found.tokens),
        )
    except Exception as error:  # A model's own code may raise anything on tensors without content.
        if "auto" in (training.max_tokens_per_batch, training.gradient_checkpointing):
            raise  # Nothing can be decided without a forecast.
        given = {
            "max_tokens_per_batch": training.max_tokens_per_batch,
            "gradient_checkpointing": training.gradient_checkpointing,
        }
        return given | {"no_forecast": " ".join(str(error).split())[:200]}
    return {
        "max_tokens_per_batch": found.tokens,
        "gradient_checkpointing": found.checkpointing,
        "predicted_peak_bytes": found.forecast.peak,
        "predicted_needed_bytes": setting.needs(found.forecast, found.short),
        "predicted_host_bytes": found.forecast.host,
        "memory_bytes": memory,
        "layers": found.forecast.layers,
        "recomputed_layers": found.forecast.recomputed,
        "attention_cost_bytes": cost,
    }


def plan_recipe(run: Run, config: Config, setting: Setting) -> StepPlan:
    """The plan of what is auto; where nothing is, the forecast of what the configuration says."""
    training = config.training
    if "auto" in (training.max_tokens_per_batch, training.gradient_checkpointing):
        return plan_step(
            config,
            run.architecture,
            setting,
            lambda tokens: most_supervised(run.prepared.train, tokens),
        )
    tokens = training.max_tokens_per_batch
    labelled = most_supervised(run.prepared.train, tokens)
    return forecast_plan(
        config, run.architecture, setting, tokens, training.gradient_checkpointing, labelled
    )


def read_begun(output_dir: Path, config: Config, ranks: int) -> int | None:
    """The micro-batch, in tokens, that the run in this folder was planned with where the
    configuration says auto.

    Raises:
        ProcessError: so many processes cannot share its global batch in such micro-batches.
    """
    saved = output_dir / "environment.json"
    training = config.training
    facts = json.loads(saved.read_text(encoding="utf-8")) if saved.is_file() else {}
    tokens = facts.get("step_plan", {}).get("max_tokens_per_batch")
    if tokens is None or training.max_tokens_per_batch != "auto":
        return None
    if training.global_batch_tokens % (tokens * ranks):
        micro = training.global_batch_tokens // tokens
        able = ", ".join(str(count) for count in range(1, micro + 1) if micro % count == 0)
        raise ProcessError(
            f"{output_dir} was planned in micro-batches of {tokens} tokens, {micro} in a step,"
            f" which {ranks} processes cannot share; resume on {able} process(es)"
        )
    return tokens


def apply_step(config: Config, decided: dict[str, Any]) -> Config:
    return change(
        config,
        "training",
        max_tokens_per_batch=decided["max_tokens_per_batch"],
        gradient_checkpointing=decided["gradient_checkpointing"],
    )


# ---- load ----------------------------------------------------------------------------------------


def load(run: Run) -> None:
    """The whole quantized base and its adapter on this rank's device, proven to keep packed rows
    apart.
    """
    config = run.config
    training = run.config.training
    with together():
        base_dir = resolve_base(config.model.base, config.model.revision)
        storage = choose_storage(run.strategy, config.model.quantization, run.dtype)
        try:
            base, run.backend = load_base(config.model, run.device, storage)
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0][:200]
            raise TrainingError(
                f"{config.model.base} does not fit: {reason}; every GPU holds the whole base once"
                " (docs/scaling.md)"
            ) from None
        compiled = compile_layers(base, run.device, training.compile)
        vocabulary = base.config.get_text_config().vocab_size
        isolation = verify_isolation(
            backbone_of(base), run.backend, vocabulary, ISOLATION_TOLERANCE[run.dtype]
        )
        run.model = attach_adapter(base, config.lora, training.seed)
        recomputed = set_checkpointing(base, training.gradient_checkpointing)
        run.loss_model = AnswerLoss(run.model, training.loss_chunk_tokens)
        if run.checkpoint is not None:
            restore_adapter(run.model, run.checkpoint.adapter)
    run.memory_bytes["loaded"] = run.memory.now()
    run.card = {
        "prompt_style": run.encoder.style,
        "completion": run.encoder.completion,
        "prompt_sha256": run.prepared.hashes["prompt_sha256"],
        "base": config.model.base,
        "revision": base_dir.name if base_dir.parent.name == "snapshots" else config.model.revision,
        "architecture_sha256": architecture_hash(base.config),
        "base_sha256": sample_weights(base_dir),
        "quantization": config.model.quantization,
        "double_quantization": config.model.double_quantization,
        "dtype": str(run.dtype).removeprefix("torch."),
    }
    run.facts |= describe_environment() | {"seed": training.seed, **run.prepared.hashes}
    run.facts |= {
        "base": run.card,
        "processes": run.strategy.ranks,
        "strategy": run.strategy.name,
        "attention": run.backend,
        "attention_reason": run.attention.reason,
    }
    run.facts |= {
        "recomputed_layers": recomputed,
        "compiled": compiled,
        "isolation_error": isolation,
        "trainable_parameters": run.sizes[1],
    }
    run.facts |= {"mixture": run.prepared.mixture, "storage": str(storage).removeprefix("torch.")}
    if run.rank == 0:
        show_attention(run.attention, isolation, run.facts["step_plan"])
        console.print(
            f"{config.model.base}: {config.model.quantization}, {run.card['dtype']},"
            f" {run.sizes[1]:,} trainable beside {run.sizes[0]:,} frozen parameters; {recomputed}"
            f" layers recomputed{', norms and activations compiled' if compiled else ''};"
            f" {run.device}"
        )


def wrap_model(run: Run) -> None:
    """Hand the model to the strategy, and prove on a short batch that its gradients are the whole
    model's.
    """
    training = run.config.training
    run.shapes = {name: weight.shape for name, weight in trainable(run.model).items()}
    batch, targets = choose_probe(run)
    began = time.perf_counter()
    # also for ZeRO on one process: its optimizer has no states to restore before a first step
    # whose scaled loss rounds otherwise; it trains with ddp only
    checked = run.strategy.name != "one" and run.dtype is not torch.float16
    if checked:
        before = wake_adapter(run.model, training.seed)
        reference = compute_reference(run.loss_model, batch, targets, training.seed)
    run.trainer = wrap(
        run.strategy,
        run.loss_model,
        lambda weights: make_optimizer(training, weights),
        training.max_grad_norm,
        run.dtype,
    )
    if checked:
        found = measure_gradients(run.trainer, batch, targets, run.strategy.ranks, training.seed)
        with together():
            error = compare_gradients(reference, found, run.dtype, run.strategy)
        run.trainer.write_weights(before)
        seconds = time.perf_counter() - began
        run.facts["gradient_check"] = {"relative_error": error, "seconds": round(seconds, 3)}
        if run.rank == 0:
            console.print(
                f"{run.strategy.name} on {run.strategy.ranks} processes: gradients of a short batch"
                f" equal the whole model's (error {error:.0e}, {seconds:.1f} s with setting up)"
            )
    if run.checkpoint is not None:
        with together():
            load_states(run.trainer, run.checkpoint.optimizer)
            if run.checkpoint.state.get("loss_scale"):
                run.trainer.write_scale(run.checkpoint.state["loss_scale"])
    if run.strategy.ranks > 1:
        run.memory_bytes["wrapped"] = run.memory.now()
    with together():
        if run.rank == 0:
            write_json(run.output_dir / "environment.json", run.facts)
            write_json_lines(
                run.output_dir / "removed.jsonl",
                [asdict(removal) for removal in run.prepared.removals],
            )
            if run.resume:
                rewind_log(
                    run.output_dir / LOG, run.checkpoint.state["step"] if run.checkpoint else 0
                )
    run.accelerator.init_trackers(
        "medqlora",
        config={key: str(value) for key, value in run.config.model_dump(mode="json").items()},
    )


def choose_probe(run: Run) -> tuple[dict[str, Any], int]:
    """A short row for each rank, and the supervised tokens of all."""
    table = run.prepared.train
    rows = np.argsort(table.lengths, kind="stable")[: run.strategy.ranks]
    mine = rows[run.rank % len(rows)]
    shown = [rows[rank % len(rows)] for rank in range(run.strategy.ranks)]
    targets = int(table.supervised[shown].sum())
    return (
        move_batch(collate(table, np.array([mine])), run.backend, run.device)
        | share_chunks(run, table, [[row] for row in shown]),
        targets,
    )


def share_chunks(run: Run, table: TokenTable, batches: list) -> dict[str, int]:
    """For a divided head, the number of its calls that fits all ranks' batches of one round (see
    AnswerLoss.forward).
    """
    if not run.strategy.sharded:
        return {}
    labelled = [int(table.supervised[rows].sum()) for rows in batches]
    return {"chunks": count_chunks(max(labelled), run.config.training.loss_chunk_tokens)}


# ---- train ---------------------------------------------------------------------------------------


def train(run: Run) -> int:
    """All remaining steps; -> exit code: 0, or 128 + signal where one stopped it."""
    training = run.config.training
    prepared = run.prepared
    plan = run.plan
    trainer = run.trainer
    device = run.device
    rank = run.rank
    ranks = run.strategy.ranks
    is_main = run.rank == 0
    state = {"step": 0, "best_loss": None, "best_step": 0, "patience": 0}
    if run.checkpoint is not None:
        state |= run.checkpoint.state
        if is_main:
            console.print(
                f"resuming after step {state['step']} of {len(plan)} ({run.checkpoint.path})"
            )
    log = run.output_dir / LOG
    stop_signals = catch_signals()
    lengths = prepared.train.lengths
    supervised = prepared.train.supervised
    budget = training.max_tokens_per_batch
    progress = make_progress(disable=not is_main)
    task = progress.add_task("training", total=len(plan), completed=state["step"], facts="")
    run.memory.begin()
    with progress:
        for step in range(state["step"], len(plan)):
            began = time.perf_counter()
            trainer.module.train()
            lr = learning_rate(step, len(plan), training)
            rows_of_step = plan.rows[plan.bins[plan.steps[step]] : plan.bins[plan.steps[step + 1]]]
            targets = int(supervised[rows_of_step].sum())  # of all ranks and micro-batches
            losses = None
            while losses is None:
                batches = cap_batches(lengths, plan.micro_batches(step, rank, ranks), budget)
                losses = accumulate_gradients(run, step, batches, targets)
                if losses is None:
                    budget = recover_from_full_memory(run, budget)
                    progress.console.print(
                        f"[yellow]out of memory: micro-batches of {budget} tokens from here on,"
                        " same global batch"
                    )
            # one message: the loss, and whether any rank was told to stop
            total = torch.stack(
                [
                    torch.stack(losses).sum().float(),
                    torch.tensor(float(stop_signals[0] if stop_signals else 0), device=device),
                ]
            )
            if ranks > 1:
                torch.distributed.all_reduce(total)
            step_loss = total[0].item() / targets
            stopped = bool(total[1].item())
            if not math.isfinite(step_loss):
                with together():
                    raise TrainingError(describe_non_finite(run, batches, losses, step + 1))
            grad_norm = trainer.step(lr)

            done = step + 1
            tokens = int(lengths[rows_of_step].sum())
            row = {
                "step": done,
                "epoch": round(float(plan.epochs[step]), 6),
                "loss": step_loss,
                "lr": lr,
                "grad_norm": grad_norm,
                "tokens": tokens,
                "supervised_tokens": targets,
                "padding_fraction": 0.0,
                "tokens_per_second": tokens / (time.perf_counter() - began),
                "peak_memory_bytes": run.memory.read_peak(),
            }
            if device.type == "cuda":
                row["peak_reserved_bytes"] = run.memory.read_reserved()
            # The loss scale was too high; it is lower from here on.
            if run.dtype is torch.float16 and not math.isfinite(grad_norm):
                row |= {"grad_norm": None, "skipped": True}
            if is_main:
                append_line(log, row)
                run.accelerator.log(row, step=done)
                facts = (
                    f"loss {step_loss:.3f}  lr {lr:.1e}  {row['tokens_per_second']:,.0f} tokens/s "
                    f" {targets} supervised"
                )
                progress.update(
                    task,
                    completed=done,
                    facts=f"{facts}  {row['peak_memory_bytes'] / 2**30:.2f} GiB",
                )
                if not console.is_terminal and (
                    done % max(1, len(plan) // 10) == 0 or done == len(plan)
                ):
                    console.print(
                        f"step {done}/{len(plan)}  {facts} "
                        f" {row['peak_memory_bytes'] / 2**30:.2f} GiB"
                    )
            final = done == len(plan)
            state["step"] = done
            if prepared.eval is not None and (
                final or (training.eval_steps and done % training.eval_steps == 0)
            ):
                eval_loss = evaluate(run, budget)
                better = state["best_loss"] is None or eval_loss < state["best_loss"]
                state |= (
                    {"best_loss": eval_loss, "best_step": done, "patience": 0}
                    if better
                    else {"patience": state["patience"] + 1}
                )
                if is_main:
                    facts = {
                        "step": done,
                        "eval_loss": eval_loss,
                        "perplexity": math.exp(min(eval_loss, 700)),
                    }
                    append_line(log, facts)
                    run.accelerator.log(facts, step=done)
                if better:
                    write_adapter(run, {"step": done, "eval_loss": eval_loss})
            stopping = (
                training.early_stopping_patience is not None
                and state["patience"] >= training.early_stopping_patience
            )
            if (
                final
                or stopping
                or stopped
                or (training.save_steps and done % training.save_steps == 0)
            ):
                path = write_checkpoint(run, state)
                if stopped and not final and is_main:
                    progress.console.print(
                        f"signal {name_signal(stop_signals)}: checkpoint {path} written; continue"
                        " with --resume"
                    )
            if stopped and not final:
                return 128 + (stop_signals[0] if stop_signals else signal.SIGTERM)
            if stopping:
                if is_main:
                    progress.console.print(
                        f"stopping early: no lower evaluation loss in {state['patience']}"
                        " evaluations"
                    )
                break
    if prepared.eval is None:
        write_adapter(run, {"step": len(plan)})
    run.best_step = state["best_step"] or len(plan)
    return 0


def accumulate_gradients(
    run: Run, step: int, batches: list[np.ndarray], targets: int
) -> list[torch.Tensor] | None:
    """Forward and backward of this rank's micro-batches; -> the summed loss of each, or None where
    memory ran out.

    This is a function of its own because nothing may refer to the graph of a failed backward pass
    when the step is tried again: its local variables and the error's traceback end with it.
    """
    trainer = run.trainer
    ranks = run.strategy.ranks
    losses = []
    try:
        for number, rows in enumerate(batches):
            batch = move_batch(collate(run.prepared.train, rows), run.backend, run.device)
            if run.strategy.sharded:
                batch |= share_chunks(run, run.prepared.train, run.plan.round(step, number, ranks))
            # each micro-batch of the plan has its own dropout, whoever computes it: no state to
            # resume
            torch.manual_seed(
                (run.config.training.seed << 40) + (step << 16) + number * ranks + run.rank
            )
            with trainer.accumulate(number == len(batches) - 1):
                loss = trainer(**batch)
                # each strategy averages over ranks; the gradient wanted is that of the sum over all
                # supervised tokens
                trainer.backward(loss * (ranks / targets))
            losses.append(loss.detach())
    except torch.OutOfMemoryError:
        return None
    return losses


def recover_from_full_memory(run: Run, budget: int) -> int:
    """Forget the gradients of a step that ran out of memory; -> tokens of the micro-batches to try
    next.
    """
    if run.strategy.ranks > 1:
        raise TrainingError(
            f"out of memory on rank {run.rank}; lower training.max_tokens_per_batch below {budget}"
        )
    run.trainer.drop_gradients()
    gc.collect()  # Autograd's objects refer to each other in circles.
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
    return budget // 2


def write_checkpoint(run: Run, state: dict[str, Any]) -> Path:
    """Adapter, optimizer and state, whole and by name: any number of processes can continue from
    it.
    """
    with together():
        weights = gather_weights(run.trainer, run.shapes)
    states = run.trainer.read_states()
    folder = run.output_dir / "checkpoints"
    with together():
        if run.rank == 0:
            states = {
                name: {key: v.cpu() if torch.is_tensor(v) else v for key, v in some.items()}
                for name, some in states.items()
            }
            kept = state | {"loss_scale": run.trainer.read_scale()}
            save_checkpoint(
                folder,
                state["step"],
                adapter_weights(run.model, weights),
                states,
                kept,
                run.config.training.keep_checkpoints,
            )
    return folder / f"step-{state['step']}"


def write_adapter(run: Run, facts: dict[str, Any]) -> None:
    with together():
        weights = gather_weights(run.trainer, run.shapes)
    with together():
        if run.rank == 0:
            save_adapter(
                run.output_dir / "adapter",
                run.model,
                run.card | facts,
                adapter_weights(run.model, weights),
            )


# ---- score and report ----------------------------------------------------------------------------


def score(run: Run, name: str) -> None:
    """Answer the test questions with the "base" or the "tuned" model, each rank a part of them. A
    divided model answers all of them on every rank, in step, because its layers are gathered from
    all ranks."""
    path = run.output_dir / "predictions" / f"{name}.jsonl"
    if not run.prepared.test or (name == "base" and gather(path.is_file())[0]):
        return
    whole = name == "base" or not run.strategy.sharded
    part = (run.rank, run.strategy.ranks) if whole else (0, 1)
    with run.model.disable_adapter() if name == "base" else contextlib.nullcontext():
        engine = HfEngine(run.model, run.backend, run.config.training.max_tokens_per_batch)
        rows = answer(engine, run.encoder, run.prepared.test, name, part=part)
    found = {row["id"]: row for rows in gather(rows) for row in rows}
    with together():
        if run.rank == 0:
            path.parent.mkdir(exist_ok=True)
            write_json_lines(path, [found[example.id] for example in run.prepared.test])


def finish(run: Run) -> None:
    """Score the best adapter and write metrics.json."""
    if run.prepared.test:
        run.trainer.write_weights(
            name_parameters(
                run.model, load_file(run.output_dir / "adapter" / "adapter_model.safetensors")
            )
        )
        score(run, "tuned")
    run.memory_bytes |= {"peak": run.memory.read_peak(), "after": run.memory.now()}
    peaks = gather(run.memory_bytes["peak"])
    with together():
        if run.rank == 0:
            lines = read_lines(run.output_dir / LOG)
            report = {
                "steps": lines[-1]["step"] if lines else 0,
                "best_step": run.best_step,
                "memory_bytes": run.memory_bytes,
            }
            report["peak_memory_bytes_per_rank"] = peaks
            if run.prepared.test:
                report |= show_scores(
                    *(
                        read_lines(run.output_dir / "predictions" / f"{name}.jsonl")
                        for name in ("base", "tuned")
                    )
                )
            write_json(run.output_dir / "metrics.json", report)
            show_memory(run.memory_bytes, run.device)
            console.print(f"adapter of step {report['best_step']}: {run.output_dir / 'adapter'}")


class TrainingError(UserError):
    """Training cannot go on."""


@torch.no_grad()
def evaluate(run: Run, budget: int) -> float:
    """Mean loss per supervised token over the whole evaluation set."""
    table = run.prepared.eval
    rank = run.rank
    ranks = run.strategy.ranks
    run.trainer.module.eval()
    total = torch.zeros((), device=run.device)
    bins = fit_bins(table.lengths, max(budget, int(table.lengths.max())))
    # a divided model needs every rank each time: those left over repeat the last batch
    for first in range(0, len(bins), ranks):
        index = first + rank
        batch = move_batch(collate(table, bins[min(index, len(bins) - 1)]), run.backend, run.device)
        loss = run.trainer(**batch, **share_chunks(run, table, bins[first : first + ranks]))
        total += loss if index < len(bins) else 0
    if ranks > 1:
        torch.distributed.all_reduce(total)
    return total.item() / int(table.supervised.sum())


@torch.no_grad()
def describe_non_finite(run: Run, batches: list, losses: list, step: int) -> str:
    """Name the examples of the micro-batches whose loss is not finite, each tried alone (a divided
    model cannot be tried by one rank)."""
    table = run.prepared.train
    suspects = [
        row
        for rows, loss in zip(batches, losses, strict=True)
        if not torch.isfinite(loss)
        for row in rows
    ]
    guilty = []
    if not run.strategy.sharded:
        guilty = [
            r
            for r in suspects
            if not torch.isfinite(
                run.loss_model(**move_batch(collate(table, [r]), run.backend, run.device))
            )
        ]
    everyone = [
        (kind, names)
        for kind, names in gather((bool(guilty), [table.names[row] for row in guilty or suspects]))
        if names
    ]
    sure = [(kind, names) for kind, names in everyone if kind] or everyone
    names = ", ".join([name for _, names in sure for name in names][:10])
    what = (
        "examples"
        if sure and sure[0][0]
        else "among examples"
        if run.strategy.sharded
        else "finite alone but not together: examples"
    )
    return (
        f"step {step}: loss is not finite; {what} {names}; look at these rows, or lower training.lr"
    )


def catch_signals() -> list[int]:
    """SIGTERM, SIGUSR1 (a scheduler's warnings) and SIGINT end training after the running step,
    with a checkpoint. Launcher and scheduler may both send one, so only a Ctrl-C some seconds after
    the first ends it at once.
    """
    caught: list[int] = []
    times: list[float] = []

    def remember(number, frame):
        if number == signal.SIGINT and times and time.monotonic() - times[0] > 3:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        caught.append(number)
        times.append(time.monotonic())

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, remember)
    return caught


def name_signal(caught: list[int]) -> str:
    return str(caught[0]) if caught else "of another rank"


# ---- what the user sees --------------------------------------------------------------------------


def make_progress(disable: bool) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[facts]}"),
    )
    return Progress(*columns, console=console, disable=disable or not console.is_terminal)


def show_data(run: Run) -> None:
    prepared = run.prepared
    training = run.config.training
    accumulation = derive_accumulation(
        training.global_batch_tokens, training.max_tokens_per_batch, run.strategy.ranks
    )
    table = Table(title="training data", title_justify="left")
    for column in ("entry", "rows", "rows per epoch", "share of rows", "share of tokens"):
        table.add_column(column, justify="left" if column == "entry" else "right")
    for source in prepared.mixture:
        name = f"{source['entry']} {source['format']} {Path(source['path'] or '').name}"
        table.add_row(
            name,
            f"{source['rows']:,}",
            f"{source['rows_per_epoch']:,}",
            f"{source['row_share']:.1%}",
            f"{source['token_share']:.1%}",
        )
    console.print(table)
    for reason, count in count_reasons(prepared.removals).items():
        console.print(f"removed {count:,}: {reason} (listed in {run.output_dir / 'removed.jsonl'})")
    console.print(
        f"{len(run.plan):,} steps of {accumulation} micro-batch(es) per process;"
        f" {len(prepared.eval.lengths) if prepared.eval else 0:,} rows for the evaluation loss,"
        f" {len(prepared.test):,} test questions"
    )


def show_step(decided: dict[str, Any]) -> None:
    console.print(
        f"micro-batches of {decided['max_tokens_per_batch']:,} tokens,"
        f" {decided['recomputed_layers']} of {decided['layers']} layers recomputed: predicted peak"
        f" {decided['predicted_peak_bytes'] / GIB:.2f} GiB, with the allocator's reserve"
        f" {decided['predicted_needed_bytes'] / GIB:.2f} GiB, of"
        f" {decided['memory_bytes'] / GIB:.2f} GiB that may be used"
        + (
            "; [yellow]it will hardly fit[/]"
            if decided["predicted_needed_bytes"] > decided["memory_bytes"]
            else ""
        )
        + (
            f"; {decided['predicted_host_bytes'] / GIB:.2f} GiB pinned in the host's memory"
            if decided["predicted_host_bytes"]
            else ""
        )
    )


def show_attention(choice: Choice, isolation: float, decided: dict[str, Any]) -> None:
    cost = decided.get("attention_cost_bytes")
    more = (
        f"; forecast: {cost / GIB:.2f} GiB more than the variable-length kernel would need"
        if cost is not None
        else ""
    )
    console.print(
        f"attention {choice.backend} isolates packed rows (error {isolation:.0e});"
        f" {choice.reason}{more}"
    )


def show_scores(base: list[dict], tuned: list[dict]) -> dict:
    """Print base against tuned; -> the keys of metrics.json, for the tuned model, with `base` and
    `comparison` inside.
    """
    base = collect_rows(base)
    tuned = collect_rows(tuned)
    before = score_predictions(base)
    after = score_predictions(tuned)
    comparison = compare_paired(base.right, tuned.right)
    table = Table(title="accuracy on the test questions", title_justify="left")
    for column in ("", "n", "base", "95 % interval", "tuned", "95 % interval"):
        table.add_column(column, justify="left" if not column else "right")
    lines = [("all", before, after)] + [
        (name, s, after["per_subject"][name]) for name, s in before["per_subject"].items()
    ]
    for name, a, b in lines:
        intervals = [f"{s['accuracy_ci95'][0]:.1%} – {s['accuracy_ci95'][1]:.1%}" for s in (a, b)]
        table.add_row(
            name,
            str(a["n"]),
            f"{a['accuracy']:.1%}",
            intervals[0],
            f"[bold]{b['accuracy']:.1%}",
            intervals[1],
        )
    console.print(table)
    low, high = comparison["difference_ci95"]
    p = comparison["mcnemar_p"]
    console.print(
        f"difference {comparison['difference']:+.1%} (95 % interval {low:+.1%} to {high:+.1%}),"
        f" paired exact McNemar p {'< 1e-12' if p < 1e-12 else f'= {p:.2g}'}"
    )
    return {**after, "base": before, "comparison": comparison}


def show_memory(memory: dict[str, int], device: torch.device) -> None:
    kind = "GPU memory, allocated" if device.type == "cuda" else "memory of this process, resident"
    console.print(
        f"{kind}: "
        + ", ".join(f"{name} {value / 2**20:,.0f} MiB" for name, value in memory.items())
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        # the launcher ends the other ranks; each is ending with this code already
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if not isinstance(error, AgreedError) or os.environ.get("RANK", "0") == "0":
            print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # before the first step; later ones end with a checkpoint
        sys.exit(130)
    except Exception as error:
        get_error_handler().record_exception(error)  # the launcher shows it with the rank
        raise
