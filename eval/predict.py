"""Answer questions with a model and write one prediction per line.

    python eval/predict.py --model BASE --adapter runs/mine/adapter --format medqa \\
        --path dev.jsonl --output tuned.jsonl

With an adapter, prompt style, completion and quantization are the ones it was trained with, unless
they are given here. Every flag may also stand as a key in the YAML file of --config.

Finished batches are kept in OUTPUT.parts: after a crash the same command goes on where it stopped.
--shard I/N answers a part of the questions; the process that finds all parts complete writes
OUTPUT. N may change between runs.
"""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from medqlora.core.entry import enter

    enter()

from rich.progress import Progress

from medqlora.core.command import (
    make_console,
    quiet_libraries,
    read_settings,
    run_command,
    run_early,
)
from medqlora.core.environment import prefer_expandable_segments
from medqlora.core.files import hash_json
from medqlora.engines.server_address import read_key
from medqlora.evaluation.settings import (
    GROUPS,
    EvaluationSettings,
    check_dropping,
    check_output,
    choose_method,
    read_pool,
    read_with_passages,
)


def parse_arguments() -> EvaluationSettings:
    settings = read_settings(__doc__, EvaluationSettings, GROUPS)
    check_output(settings.output)
    if settings.engine == "openai":
        read_key(os.environ, settings.api_key_variable)
    return settings


if __name__ == "__main__":
    # A mistake is said before torch is imported, which takes seconds. torch reads the allocator's
    # variable when it is imported; vLLM has an allocator of its own.
    SETTINGS = run_early(parse_arguments)
    if SETTINGS.engine == "hf":
        prefer_expandable_segments(os.environ)

from medqlora.engines.interface import BATCH_SIZE, Engine, EngineError
from medqlora.engines.registry import Asking, open_engine, prepare_asking
from medqlora.engines.server_answers import Served, describe_served, read_served
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
from medqlora.evaluation.questions import PreparedQuestion, prepare_questions

console = make_console(stderr=True, soft_wrap=True)
SHOWN = 10  # So many ids of questions are named on the terminal; the output holds all.
INTERRUPTED = "interrupted; finished batches are kept, the same command goes on from there"


def main(settings: EvaluationSettings) -> None:
    # Python's own form would add a file name and a line of source.
    warnings.showwarning = lambda message, *_: console.print(str(message), style="yellow")
    if settings.api != "chat":  # A chat server needs no transformers, whose import takes seconds.
        quiet_libraries()
    asking = prepare_asking(settings)
    method = choose_method(settings)
    check_dropping(settings, method, asking.max_length)
    questions, shared = prepare(settings, asking, method)
    run = describe_run(settings, asking, method)
    # A finished command that is given again loads no model and asks no server.
    if settings.output.exists():
        check_finished(settings.output, questions, run)
        return
    shard, shards = (int(part) for part in settings.shard.split("/"))
    with Journal(settings.output, shard, shards) as journal:
        served = find_served(journal.read(), questions, run)
        if served is None:
            served = answer_shard(settings, asking, method, questions, shared, run, journal)
        elif served:
            print(describe_served(served))
        if settings.output.exists():  # Another shard was the last one and wrote it.
            check_finished(settings.output, questions, run)
            return
        rows = journal.read()
        keys = list_keys(questions, run, served)
        missing = sum(key not in rows for key in keys)
        if missing:
            console.print(
                f"shard {settings.shard} is done; {missing} of {len(questions)} questions are left"
                " to other shards; the last one to finish, or any --shard run again, writes"
                f" {settings.output}"
            )
            return
        # Rows stand in the order of the questions, so the bytes do not depend on who finished
        # first.
        ordered = [rows[key] for key in keys]
        journal.finish(settings.output, ordered)
    answered = sum("too_long" not in row for row in ordered)
    console.print(f"{answered} predictions in {settings.output}; {summarise(ordered)}")


def answer_shard(
    settings: EvaluationSettings,
    asking: Asking,
    method: Method,
    questions: list[PreparedQuestion],
    shared: int,
    run: dict[str, Any],
    journal: Journal,
) -> Served:
    """Answer the questions of this shard that have no row, and return what a server said of itself.

    Raises:
        EngineError: the engine cannot run, or questions were not answered. Finished rows are kept.
    """
    engine, served = None, {}
    if settings.engine == "openai":
        engine, served = connect(settings, asking, method, questions)
    shard, shards = (int(part) for part in settings.shard.split("/"))
    ids = [entry.example.id for entry in questions]
    # All questions are split into batches before a shard takes its own. A batch is thus the same
    # for every number of shards, and its rounding too.
    question_batches = split_into_batches(ids, BATCH_SIZE[settings.engine])[shard::shards]
    keys = list_keys(questions, run, served)
    # The parts may also hold rows of other settings, which this output must not take.
    done = set(journal.read()) & set(keys)
    if done:
        console.print(
            f"{len(done)} of {len(questions)} predictions stand in {journal.folder} already"
        )
    left = sum(keys[number] not in done for batch in question_batches for number in batch)
    if not left:
        return served
    engine = engine or open_engine(settings, asking, method.seed, None)
    failures: list[EngineError] = []
    batches = predict(
        engine,
        asking.encoder,
        questions,
        shared,
        method,
        settings.name,
        question_batches,
        hash_json(run | served),
        done,
        served,
        failures,
    )
    # Where nobody watches, a bar would leave an empty line before an error's only line.
    watched = console.is_terminal
    with Progress(console=console, transient=True, disable=not watched) as progress:
        task = progress.add_task("predicting", total=left)
        for batch in batches:
            # A batch of failures alone is no line of the journal.
            if batch:
                journal.append(batch)
            progress.update(task, advance=len(batch))
    if failures:
        raise EngineError(
            f"{len(failures)} of {len(questions)} questions got no answer and have no row, so"
            f" {settings.output} is not written; finished rows are kept in {journal.folder}, and"
            f" the same command asks the others again. The last reason: {failures[-1]}"
        )
    return served


def connect(
    settings: EvaluationSettings,
    asking: Asking,
    method: Method,
    questions: list[PreparedQuestion],
) -> tuple[Engine, Served]:
    """Connect to the server, and learn from one answer what all rows depend on."""
    # The settings hold the variable's name only, so the key itself is never written.
    key = read_key(os.environ, settings.api_key_variable)
    engine = open_engine(settings, asking, method.seed, key)
    asked = [entry for entry in questions if entry.too_long is None]
    requests = [request for entry in asked for request in entry.requests]
    served = engine.settle(requests, scored=method.scoring != "generate")
    # The console writes to stderr, where an error must be the only line.
    print(describe_served(served))
    return engine, served


def prepare(
    settings: EvaluationSettings, asking: Asking, method: Method
) -> tuple[list[PreparedQuestion], int]:
    """Read the questions and make their requests; say what was left out or cut."""
    style = asking.encoder.style
    reading = read_with_passages(settings, method, style, asking.metadata)
    # The console writes to stderr, where an error must be the only line.
    print(reading.description)
    for removal in reading.removals:
        line = f"left out {removal.source}: {removal.reason}"
        console.print(line, style="yellow")
    lowercase = asking.metadata.get("lowercase", False)
    pool = read_pool(settings, style, lowercase) if method.num_fewshot else []
    questions, shared = prepare_questions(
        asking.encoder,
        reading.examples,
        method,
        pool,
        asking.max_length,
        settings.drop_too_long,
    )
    say_too_long(questions, asking.max_length)
    cut = sum(entry.truncated for entry in questions)
    if cut:
        console.print(
            f"{cut} of {len(questions)} prompts are longer than the model's {asking.max_length}"
            " tokens and were cut",
            style="yellow",
        )
    return questions, shared


def say_too_long(questions: list[PreparedQuestion], max_length: int | None) -> None:
    """Say how many questions are left out because they do not fit, and name some of them."""
    ids = [entry.example.id for entry in questions if entry.too_long]
    if not ids:
        return
    named = ", ".join(ids[:SHOWN]) + (", …" if len(ids) > SHOWN else "")
    console.print(
        f"{len(ids)} of {len(questions)} questions are longer than the model's {max_length} tokens"
        f" and are left out: {named}",
        style="yellow",
    )


def describe_run(settings: EvaluationSettings, asking: Asking, method: Method) -> dict[str, Any]:
    """Return what a prediction row depends on besides the question and a server's own word."""
    return {
        **asking.identity,
        "style": asking.encoder.style,
        "completion": asking.encoder.completion,
        "method": vars(method),
        "engine": settings.engine,
        "rows": 4,  # This number rises with every change of what a row holds.
    }


def list_keys(questions: list[PreparedQuestion], run: dict[str, Any], served: Served) -> list[str]:
    """Return the key of each question's row."""
    run_key = hash_json(run | served)
    return [entry.key(run_key) for entry in questions]


def find_served(
    rows: dict[str, dict], questions: list[PreparedQuestion], run: dict[str, Any]
) -> Served | None:
    """Return what the server said of itself in rows that answer all questions; None without them.

    Such rows were complete when a kill came, and need no server any more.
    """
    distinct = {tuple(read_served(row).items()) for row in rows.values()}
    for served in map(dict, distinct):
        if rows.keys() >= set(list_keys(questions, run, served)):
            return served
    return None


def check_finished(output: Path, questions: list[PreparedQuestion], run: dict[str, Any]) -> None:
    """Leave the output of this very command as it is, and refuse to write over any other."""
    try:
        predictions = read_predictions(output, labelled=False)
        rows = read_rows(output, [*predictions.offsets, *predictions.too_long.values()])
        keys = list_keys(questions, run, read_served(rows[0]))
        same = {row.get("key") for row in rows} == set(keys)
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
    console.print(f"{output} is complete already: {len(predictions)} predictions")


def summarise(rows: list[dict]) -> str:
    """Return the main score of the rows in a few words."""
    labelled = [row for row in rows if row["kind"] == "text" or row["gold"] is not None]
    if not labelled:
        return "no labels, so nothing can be scored"
    if labelled[0]["kind"] == "open":
        return "score them with eval/score.py"
    scores = score_predictions(collect_rows(labelled))
    if labelled[0]["kind"] == "text":
        return f"perplexity {scores['perplexity']:.3f} over {scores['tokens']} tokens"
    parts = [f"accuracy {scores['accuracy']:.1%}"]
    if scores["letter_mass"] is not None:
        parts.append(f"letter mass {scores['letter_mass']:.3f}")
    if scores["unparsed"]:
        parts.append(f"{scores['unparsed']} without an answer")
    if scores["too_long"]:
        parts.append(f"{scores['too_long']} questions left out as too long")
    if scores["unfinished"]:
        parts.append(f"{scores['unfinished']} of them broke off while thinking")
    return ", ".join(parts)


if __name__ == "__main__":
    run_command(lambda: main(SETTINGS), INTERRUPTED)
