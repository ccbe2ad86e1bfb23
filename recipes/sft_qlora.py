"""Fine-tune a language model on medical questions with QLoRA, and measure how much better it gets.

    accelerate launch recipes/sft_qlora.py                 # the embedded demonstration
    accelerate launch recipes/sft_qlora.py --config FILE.yaml --output_dir runs/mine [--resume]

It checks the configuration, prepares rows, loads and scores the base, trains, and scores again.
"""

import contextlib
import itertools
import math
import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from medqlora.core.entry import enter

    enter()

from medqlora.batches.entries import check_entries
from medqlora.core.command import make_console, read_recipe, run_command, run_early
from medqlora.core.environment import prefer_expandable_segments

if __name__ == "__main__":
    # The arguments are checked before torch is imported, which takes seconds. The variable of its
    # allocator must be set before, because torch reads it while it is imported.
    DEMO = Path(__file__).parent / "configs" / "demo.yaml"
    ARGUMENTS, CONFIG = run_early(
        lambda: read_recipe(__doc__, DEMO, lambda config: check_entries(config.data)), os.environ
    )
    prefer_expandable_segments(os.environ)

from medqlora.core.config import Config
from medqlora.core.files import read_lines, write_json
from medqlora.engines.hf import HfEngine
from medqlora.evaluation.answering import answer_questions
from medqlora.reporting.model_card import write_run_card
from medqlora.reporting.terminal import (
    Display,
    compare_scores,
    describe_check,
    describe_memory,
    describe_model,
    describe_planned,
    describe_result,
    measure_perplexity,
)
from medqlora.training.optimizers import learning_rate
from medqlora.training.planning import Planned, plan_run
from medqlora.training.processes import agree_on_errors, end_processes, gather
from medqlora.training.progress import begin, is_due, measures_first, note_loss, stops_early
from medqlora.training.records import (
    describe_run,
    has_base_predictions,
    load_best,
    make_metadata,
    restore,
    restore_weights,
    write_best,
    write_checkpoint,
    write_predictions,
    write_start,
)
from medqlora.training.session import Built, Session, TrainingError, build, load, prove
from medqlora.training.setup import Setup, start
from medqlora.training.signals import catch_signals, exit_code, name_signal, run_rank
from medqlora.training.strategies.gradient_check import open_session
from medqlora.training.strategies.launch import choose_storage

console = make_console(soft_wrap=True)


def main(config: Config, output_dir: Path, resume: bool, accept_changes: bool) -> int:
    """Run all stages, and return the exit code."""
    setup = start(config, output_dir, resume, os.environ, accept_changes)
    with setup.lock:  # One training at a time writes to the run folder.
        return run_stages(setup)


def run_stages(setup: Setup) -> int:
    """Run all stages after the first checks, and return the exit code."""
    planned = plan_run(setup, console.print if setup.is_local_main else lambda stage: None)
    say(setup, *describe_planned(setup, planned))

    with agree_on_errors():
        storage = choose_storage(setup.strategy, setup.config.model.quantization, setup.dtype)
        loaded = load(planned.config, setup.device, storage)
        built = build(loaded, planned.config)
        restore_weights(setup, planned, built)
        agreement = prove(built, planned.config)
        metadata = make_metadata(setup, planned, loaded.base)
    memory = {"before": setup.memory_before, "loaded": setup.meter.now()}
    say(setup, *describe_model(setup, planned, loaded, built, agreement))
    score(setup, planned, built, "base")

    session, check = open_session(setup, planned.config, built, planned.prepared.train)
    if check is not None:
        say(setup, describe_check(setup, check))
    restore(session, planned)
    if setup.strategy.ranks > 1:
        memory["wrapped"] = setup.meter.now()
    environment = describe_run(setup, planned, loaded, built, metadata, agreement, check)
    write_start(setup, planned, environment)

    state = begin(planned.checkpoint)
    code = train(setup, planned, session, metadata, state)
    if code == 0:
        finish(setup, planned, session, memory, state)
    end_processes(setup.accelerator, os.environ)
    return code


def train(setup: Setup, planned: Planned, session: Session, metadata: dict, state: dict) -> int:
    """Take all remaining steps, which `state` follows, and return the exit code."""
    training = planned.config.training
    plan = planned.plan
    table = planned.prepared.train
    # A run that has stopped early takes no more steps when it is resumed.
    end = state["step"] if stops_early(state, training) else len(plan)
    signals = catch_signals()
    setup.meter.begin()
    with Display(console, setup, planned, state["step"]) as display:
        if measures_first(planned, state):
            evaluate(setup, planned, session, metadata, state, display)
        for step in range(state["step"], end):
            start_time = time.perf_counter()
            lr = learning_rate(step, len(plan), training)
            rows = plan.rows_of(step)
            targets = int(table.supervised[rows].sum())  # This counts all ranks.
            gradients = session.accumulate(table, plan, step, targets, display.say)
            total, flags = session.sum_over_ranks(gradients.losses, float(bool(signals)))
            loss = total / targets
            if not math.isfinite(loss):
                with agree_on_errors():
                    raise TrainingError(session.describe_non_finite(table, gradients, step + 1))
            norm = session.update(lr)
            state["step"] = done = step + 1
            tokens = int(table.lengths[rows].sum())
            row = {
                "step": done,
                "epoch": round(float(plan.epochs[step]), 6),
                "loss": loss,
                "lr": lr,
                "tokens": tokens,
                "supervised_tokens": targets,
                "padding_fraction": 0.0,
                "tokens_per_second": tokens / (time.perf_counter() - start_time),
            }
            display.log_step(row | norm | setup.meter.read_peaks())

            stopped = flags > 0
            final = done == len(plan)
            if planned.prepared.eval is not None and is_due(done, training.eval_steps, final):
                evaluate(setup, planned, session, metadata, state, display)
            stopping = stops_early(state, training)
            if stopped or stopping or is_due(done, training.save_steps, final):
                path = write_checkpoint(session, setup.output_dir, state)
            if stopped and not final:
                display.say(f"{name_signal(signals)}: {path} is written; continue with --resume")
                return exit_code(signals)
            if stopping:
                display.say(f"stopping early: no lower loss in {state['patience']} evaluations")
                break
    if planned.prepared.eval is None:
        state["best_step"] = len(plan)
        write_best(session, setup.output_dir, metadata | {"step": len(plan)})
    return 0


def evaluate(
    setup: Setup, planned: Planned, session: Session, metadata: dict, state: dict, display: Display
) -> None:
    """Measure the evaluation loss, note it in `state`, and write what is the best."""
    loss = session.evaluate(planned.prepared.eval)
    with agree_on_errors():
        lowest = note_loss(state, loss)
    display.log_evaluation(state["step"], loss, state["best_step"])
    if lowest:
        measured = {"step": state["step"], "eval_loss": loss}
        write_best(session, setup.output_dir, metadata | measured)


def score(setup: Setup, planned: Planned, built: Built, name: str) -> None:
    """Answer the test questions with the "base" or the "tuned" model, and write the predictions.

    Each rank answers a part of them. A divided model answers all of them on every rank at the same
    time, because its layers are gathered from all ranks.
    """
    test = planned.prepared.test
    if not test or (name == "base" and gather(has_base_predictions(setup, planned))[0]):
        return
    divided = name == "tuned" and setup.strategy.sharded
    part = (0, 1) if divided else (setup.rank, setup.strategy.ranks)
    model = built.model
    untrained = built.method.without_training(model)
    with untrained if name == "base" else contextlib.nullcontext():
        tokens = planned.config.training.max_tokens_per_batch
        engine = HfEngine(model, built.backend, tokens, divided)
        limits = engine.max_length, part, planned.config.data.max_new_tokens
        rows = answer_questions(engine, setup.encoder, test, name, *limits)
    by_id = {row["id"]: row for row in itertools.chain(*gather(rows))}
    with agree_on_errors():
        if setup.rank == 0:
            write_predictions(setup, planned, name, [by_id[example.id] for example in test])


def finish(setup: Setup, planned: Planned, session: Session, memory: dict, state: dict) -> None:
    """Score the best adapter or model, and write metrics.json and the model card."""
    with agree_on_errors():
        setup.method.check(setup.output_dir / setup.method.folder)  # It refuses a damaged one.
    if planned.prepared.test:
        load_best(session, setup.output_dir)
        score(setup, planned, session.built, "tuned")
    memory = memory | {"peak": setup.meter.read_peak(), "after": setup.meter.now()}
    peaks = gather(memory["peak"])
    with agree_on_errors():
        if setup.rank != 0:
            return
        report = {
            "steps": state["step"],
            "best_step": state["best_step"],
            **measure_perplexity(state["best_loss"]),
            "memory_bytes": memory,
            "peak_memory_bytes_per_rank": peaks,
        }
        if planned.prepared.test:
            folder = setup.output_dir / "predictions"
            answers = [read_lines(folder / f"{name}.jsonl") for name in ("base", "tuned")]
            scores, shown = compare_scores(*answers)
            report |= scores
            say(setup, *shown)
        write_json(setup.output_dir / "metrics.json", report)
        say(setup, describe_memory(memory, setup.device), describe_result(setup, state))
        say(setup, write_run_card(setup.output_dir, keep_edited=True))


def say(setup: Setup, *texts: object) -> None:
    """Print texts or tables on rank 0."""
    if setup.rank == 0:
        for text in texts:
            console.print(text)


if __name__ == "__main__":
    FLAGS = (ARGUMENTS.output_dir, ARGUMENTS.resume, ARGUMENTS.resume_changed)
    run_command(lambda: run_rank(main, os.environ, CONFIG, *FLAGS))
