"""Train in stages: each begins with the adapter of the one before, textbooks and then questions.

    python recipes/train_stages.py STAGES.yaml --output_dir runs/mine [--resume]
    accelerate launch [--config_file FILE.yaml] recipes/train_stages.py STAGES.yaml [--resume]

STAGES.yaml lists the stages. The configuration of each is a file, or stands there itself:

    stages:
      - {name: textbooks, config: llama3-8b_textbooks.yaml}
      - {name: medqa, config: llama3-8b_medqa.yaml}

Each stage is a run of recipes/sft_qlora.py in the folder OUTPUT_DIR/NAME. All stages are checked
before the first one starts, their rows included. --resume leaves out the finished ones.
--NAME.section.key VALUE sets a key of a stage, e.g. --medqa.training.lr 1e-4.
"""

import argparse
import contextlib
import ctypes
import hashlib
import os
import runpy
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from medqlora.core.entry import enter

    enter()

from medqlora.core.command import CommandParser, make_console, run_command, run_early
from medqlora.core.config_loading import dump_config
from medqlora.core.entry import LAUNCHER
from medqlora.core.environment import STAGE, was_restarted
from medqlora.core.errors import ConfigError, RunError
from medqlora.core.files import write_atomic
from medqlora.core.run_folder import LAUNCH
from medqlora.training.stages import Stage, check_folders, count_finished, read_stages

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
DIE_WITH_PARENT = 1  # This is PR_SET_PDEATHSIG of Linux's prctl.
console = make_console(soft_wrap=True)


def parse_arguments() -> tuple[argparse.Namespace, list[Stage]]:
    """Read the command line and all configurations."""
    parser = CommandParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", type=Path, metavar="STAGES.yaml", help="list of the stages")
    parser.add_argument(
        "--output_dir",
        type=Path,
        help="folder of all stages (default: runs/NAME, where NAME is that of STAGES.yaml)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue in --output_dir, in any of the stages"
    )
    parser.add_argument(
        "--resume_changed",
        action="store_true",
        help="with --resume: continue a stage although data, base, tokenizer or prompts are others"
        " than when it began",
    )
    arguments, overrides = parser.parse_known_args()
    if arguments.resume_changed and not arguments.resume:
        raise ConfigError("--resume_changed only says how to resume; give --resume too")
    arguments.output_dir = arguments.output_dir or Path("runs") / arguments.stages.stem
    return arguments, read_stages(arguments.stages, overrides, arguments.output_dir)


def main(arguments: argparse.Namespace, stages: list[Stage]) -> int:
    """Run the stages that are left, and return the exit code of the last one.

    Under a launcher each of its processes runs this. The processes of a stage are then the
    launcher's ranks, which join anew in every stage.
    """
    resume = arguments.resume or was_restarted(os.environ)
    done = count_finished(stages) if resume else 0
    caught = catch_signals()
    first = os.environ.get("RANK", "0") == "0"
    if first:
        check_folders(stages, resume)
        say_replaced(stages)
        # The stage that comes next checks its own rows.
        for stage in stages[done + 1 :]:
            console.print(f"stage {stage.name}: checking and tokenizing its rows")
            code = run_script("prepare_data.py", stage, ["--show", "0"], caught, silent=True)
            if code != 0:
                return code
    flags = ["--resume"] if arguments.resume else []
    flags += ["--resume_changed"] if arguments.resume_changed else []
    for number, stage in enumerate(stages, 1):
        title = f"stage {number} of {len(stages)}, {stage.name}"
        if number <= done:
            say(first, f"{title}: finished; its adapter is {stage.adapter}")
            continue
        say(first, f"{title}: {stage.folder}")
        code = run_script(
            "sft_qlora.py", stage, ["--output_dir", str(stage.folder), *flags], caught
        )
        if code != 0:
            return code
    return 0


def say(first: bool, text: str) -> None:
    """Print a text on rank 0."""
    if first:
        console.print(text)


def say_replaced(stages: list[Stage]) -> None:
    """Say where a stage does not begin with the adapter that its own configuration names."""
    for stage in stages:
        if stage.replaced is not None:
            console.print(
                f"stage {stage.name}: lora.init_adapter {stage.replaced} of its configuration is"
                f" replaced by {stage.config.lora.init_adapter}"
            )


def write_config(stage: Stage) -> Path:
    """Write the configuration of a stage beside its folder, for the script that reads it.

    Its name has a hash of the content, so nothing else is written over. Every rank writes the same.

    Raises:
        RunError: The folder cannot be written.
    """
    text = dump_config(stage.config)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    path = stage.folder.with_name(LAUNCH) / f"{stage.name}-{digest}.yaml"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"--output_dir {path.parents[1]} cannot be made: {error.strerror}; choose another"
        ) from None
    write_atomic(path, text)
    return path


# ---- the process of a stage ----------------------------------------------------------------------


def catch_signals() -> dict[str, int]:
    """Pass on the signals that end a training to the process of the stage.

    Returns:
        The id of that process under "process" while there is one, and under "signal" the number of
        the first signal that came.
    """
    caught: dict[str, int] = {}

    def pass_on(number, frame):
        caught.setdefault("signal", number)
        # The process may have ended just now.
        with contextlib.suppress(ProcessLookupError):
            if "process" in caught:
                os.kill(caught["process"], number)

    for number in SIGNALS:
        signal.signal(number, pass_on)
    return caught


def run_script(
    name: str, stage: Stage, arguments: list[str], caught: dict[str, int], silent: bool = False
) -> int:
    """Run a recipe in a process of its own, and return its exit code in the form of a shell.

    A new process gives back all memory of the stage, on the GPU too. It is a fork of this one,
    which has imported nothing large, and not a new program: so it keeps its place among the
    launcher's ranks, and it ends with this process even after kill -9.

    Args:
        name: The file of the script.
        caught: The result of catch_signals.
        silent: Whether only mistakes are printed.
    """
    script = Path(__file__).with_name(name)
    command = [str(script), "--config", str(write_config(stage)), *arguments]
    sys.stdout.flush()
    # A signal must find either this process, which knows of the new one, or the new one itself.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    parent, launcher = os.getpid(), os.getppid()
    process = os.fork()
    if process == 0:
        os.environ |= {STAGE: stage.name, LAUNCHER: str(launcher)}
        begin_process(parent, silent)
        sys.argv = command
        # The script ends the process: it never returns.
        runpy.run_path(str(script), run_name="__main__")
    caught["process"] = process
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    _, status = os.waitpid(process, 0)
    del caught["process"]
    code = os.waitstatus_to_exitcode(status)
    if code == 0 and "signal" in caught:
        # The signal came when the stage was nearly over, and the next one must not begin.
        return 128 + caught["signal"]
    return 128 - code if code < 0 else code


def begin_process(parent: int, silent: bool) -> None:
    """Let the new process be as a new program would be."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != parent:  # It has ended before the call.
            os._exit(128 + signal.SIGKILL)
    for number in SIGNALS:
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, default)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    if silent:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


if __name__ == "__main__":
    # The lists are read before anything else, so that a misspelt key is said at once.
    ARGUMENTS, STAGES = run_early(parse_arguments, os.environ)
    run_command(lambda: main(ARGUMENTS, STAGES))
