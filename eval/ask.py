"""Put new questions to a base, an adapter, a merged model or a server.

    python eval/ask.py --model BASE --adapter runs/mine/adapter \\
        --question "What causes tetanus?" --option "Clostridium tetani" --option Plasmodium

Without --question and --file, questions are read from stdin, one a line: /reset forgets what was
said before, and /quit ends. Answers to questions with options have the probabilities that
eval/predict.py gives them. Every flag may also stand as a key in the YAML file of --config.
"""

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from medqlora.core.entry import enter

    enter()

from medqlora.core.command import (
    make_console,
    quiet_libraries,
    read_settings,
    run_command,
    run_early,
)
from medqlora.core.environment import prefer_expandable_segments
from medqlora.core.errors import ConfigError, UserError
from medqlora.core.files import check_new
from medqlora.data.examples import MultipleChoice, OpenAnswer
from medqlora.engines.server_address import read_key
from medqlora.serving.questions import Question, make_question, read_questions
from medqlora.serving.safety import REMINDERS
from medqlora.serving.settings import GROUPS, AskSettings


def parse_arguments() -> tuple[AskSettings, list[Question]]:
    settings = read_settings(__doc__, AskSettings, GROUPS)
    check_new(settings.output)
    if settings.engine == "openai":
        read_key(os.environ, settings.api_key_variable)
    if settings.question is None and settings.file is None:
        if sys.stdin is None:
            raise ConfigError("stdin is closed; give --question or --file")
        return settings, []
    return settings, read_questions(settings)


if __name__ == "__main__":
    # A mistake is said before torch is imported, which takes seconds. torch reads the allocator's
    # variable when it is imported; vLLM has an allocator of its own.
    SETTINGS, QUESTIONS = run_early(parse_arguments)
    if SETTINGS.engine == "hf":
        prefer_expandable_segments(os.environ)

from medqlora.data.retrieval import Library, open_library, show_evidence
from medqlora.engines.interface import Engine
from medqlora.engines.registry import Asking, open_engine, prepare_asking
from medqlora.evaluation.settings import choose_retrieval, clean_texts, describe_change
from medqlora.serving.ask import (
    Conversation,
    Row,
    answer_choices,
    describe_answer,
    describe_confidence,
    describe_sources,
    keeps_turns,
    list_reminders,
    make_printable,
)

console = make_console(stderr=True, soft_wrap=True)
COMMANDS = ("/reset", "/quit")


def main(settings: AskSettings, questions: list[Question]) -> None:
    # Python's own form would add a file name and a line of source.
    warnings.showwarning = lambda message, *_: console.print(str(message), style="yellow")
    if settings.api != "chat":  # A chat server needs no transformers, whose import takes seconds.
        quiet_libraries()
    asking = prepare_asking(settings)
    key = read_key(os.environ, settings.api_key_variable) if settings.engine == "openai" else None
    # Mistakes of the texts are said before weights are loaded.
    library = open_passages(settings, asking)
    engine = open_engine(settings, asking, settings.seed, key)
    if settings.engine == "vllm":
        console.print("vLLM in this process gives whole answers, so none is shown while it is made")
    file = settings.output.open("x", encoding="utf-8") if settings.output else None
    try:
        if questions:
            answer_all(engine, asking, settings, dress(questions, asking, library), file)
        else:
            converse(engine, asking, settings, file, library)
    finally:
        if file:
            file.close()


def open_passages(settings: AskSettings, asking: Asking) -> tuple[Library, int] | None:
    """Open the texts that passages come from; None where questions are shown none."""
    retrieval = choose_retrieval(settings, asking.metadata)
    if retrieval is None:
        return None
    library = open_library(retrieval[0], asking.metadata.get("lowercase", False))
    change = describe_change(library, retrieval[1], asking.metadata)
    console.print(f"passages: {library.description}{change}")
    return library, retrieval[1]


def dress(
    questions: list[Question], asking: Asking, passages: tuple[Library, int] | None
) -> list[Question]:
    """Clean texts as eval/predict.py does, and add passages."""
    # A model that was trained on lower-case texts is asked in lower case.
    lowercase = asking.metadata.get("lowercase", False)
    cleaned = clean_texts(questions, asking.encoder.style, lowercase)
    if passages is None:
        return cleaned
    shown, _ = show_evidence(cleaned, *passages)
    without = sum(not question.evidence for question in shown)
    if without:
        console.print(
            f"no passage found for {without} of {len(shown)} questions, which are asked without",
            style="yellow",
        )
    return shown


def answer_all(
    engine: Engine,
    asking: Asking,
    settings: AskSettings,
    questions: list[Question],
    file: IO[str] | None,
) -> None:
    """Answer the questions of a file, or the one of --question; each stands alone."""
    choices = [number for number, q in enumerate(questions) if isinstance(q, MultipleChoice)]
    rows = {}
    if choices:
        answered = answer_choices(engine, asking, [questions[n] for n in choices], settings)
        rows = dict(zip(choices, answered, strict=True))
    talk = Conversation(engine, asking, settings)
    for number, question in enumerate(questions):
        if len(questions) > 1:
            print(f"Question {number + 1}: {make_printable(question.question)}")
        show_reminders(question.question, settings)
        if number in rows:
            row = rows[number]
            print(make_printable(describe_answer(row)))
        else:
            row = answer_open(talk, question, settings)
        finish(row, file)


def converse(
    engine: Engine,
    asking: Asking,
    settings: AskSettings,
    file: IO[str] | None,
    passages: tuple[Library, int] | None,
) -> None:
    """Answer open questions from stdin, each behind what was said before."""
    talk = Conversation(engine, asking, settings)
    remembers = keeps_turns(asking.encoder)
    memory = (
        "earlier questions and answers are part of each prompt until /reset"
        if remembers
        else "this model's prompts have no place for earlier questions, so each stands alone"
    )
    console.print(f"one question a line; {memory}; /quit ends")
    asked = False
    for line in read_lines():
        if line == "/quit":
            return
        if line == "/reset":
            talk.turns.clear()
            console.print("forgotten")
        elif line.startswith("/"):
            console.print(f"no such command: {line}; there are {' and '.join(COMMANDS)}")
        elif line:
            asked = True
            (question,) = dress([make_question(line, (), "stdin")], asking, passages)
            answer_line(talk, question, settings, remembers, file)
    if not asked and not sys.stdin.isatty():
        raise ConfigError("no question on stdin; write one a line, or give --question or --file")


def answer_line(
    talk: Conversation,
    question: OpenAnswer,
    settings: AskSettings,
    remembers: bool,
    file: IO[str] | None,
) -> None:
    """Answer one line of stdin; on a terminal a question that fails is no end."""
    show_reminders(question.question, settings)
    try:
        row = answer_open(talk, question, settings)
    except UserError as error:
        if not sys.stdin.isatty():
            raise
        console.print(str(error), style="yellow")
        return
    if talk.forgotten:
        console.print(
            f"{talk.forgotten} earlier questions no longer fit the model and are forgotten",
            style="yellow",
        )
    if remembers:
        talk.remember(question, row)
    finish(row, file)


def read_lines() -> Iterator[str]:
    """Yield the lines of stdin without blanks around them; a terminal shows a prompt."""
    if sys.stdin.isatty():
        # With this module imported, input() lets a line be edited; some systems lack it.
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
        while True:
            try:
                yield input("> ").strip()
            except EOFError:
                return
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode().strip()
        except UnicodeDecodeError:
            raise ConfigError(f"stdin line {number}: not UTF-8 text; convert it") from None


def answer_open(talk: Conversation, question: OpenAnswer, settings: AskSettings) -> Row:
    """Answer an open question, and print the answer while it is made where it may be shown."""
    # Whether an answer is withheld is known when the samples are drawn.
    streamed = settings.threshold == 0 and settings.engine != "vllm"
    row = talk.answer(question, make_printer() if streamed else lambda piece: None)
    if not streamed or row["answer"] != row["text"] or not row["answer"]:
        print(("\n" if streamed else "") + make_printable(describe_answer(row)), end="")
    print(flush=True)
    return row


def make_printer() -> Callable[[str], None]:
    """Return what prints the pieces of one answer; blanks before its first word are left out."""
    began = False

    def show(piece: str) -> None:
        nonlocal began
        piece = piece if began else piece.lstrip()
        began = began or bool(piece)
        print(make_printable(piece), end="", flush=True)

    return show


def show_reminders(question: str, settings: AskSettings) -> None:
    for kind in list_reminders(question, settings):
        print(REMINDERS[kind])


def finish(row: Row, file: IO[str] | None) -> None:
    """Print what stands behind an answer, and write its row."""
    for line in [*describe_sources(row), *describe_confidence(row)]:
        print(line)
    if row["disclaimer"]:
        print(row["disclaimer"])
    print(flush=True)
    if file:
        # A line is written at once, so that Ctrl-C loses no answer that was shown.
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()


if __name__ == "__main__":
    run_command(lambda: main(SETTINGS, QUESTIONS))
