"""Search the keys of a recipe with Optuna, or train every cell of a table of settings.

    python recipes/search.py recipes/configs/search_demo.yaml --output_dir runs/search

Each trial is an ordinary training of recipes/sft_qlora.py in a process of its own. Started again,
the command repeats no finished trial and continues one that was interrupted. Two commands with one
--output_dir share the trials, on machines whose file system has locks. Flags such as --training.lr
set keys of the recipe for all trials.
"""

import argparse
import importlib.util
import os
import sys
from contextlib import ExitStack
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from medqlora.core.entry import enter

    enter()

from medqlora.core.command import CommandParser, make_console, run_command, run_early, whole
from medqlora.core.config_loading import read_yaml
from medqlora.core.entry import LAUNCHED
from medqlora.core.errors import ConfigError, RunError
from medqlora.core.files import check_picture, write_json
from medqlora.core.reading import expand_path
from medqlora.core.run_lock import LOCK
from medqlora.training.search.definition import Search, SearchFile, read_search


def read_arguments() -> tuple[argparse.Namespace, Search]:
    """Read the command line and the search file, and check every combination of values."""
    parser = CommandParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="keys of the search file:\n" + describe_keys(),
        allow_abbrev=False,
    )
    parser.add_argument("search", type=Path, help="YAML file of the search")
    parser.add_argument(
        "--output_dir",
        type=Path,
        help="folder of the search (default: runs/NAME, where NAME is that of the YAML file)",
    )
    parser.add_argument("--trials", type=whole(1), help="wins over the file's key of this name")
    parser.add_argument(
        "--accelerate_config",
        type=Path,
        help="start every training with accelerate launch and this file (default: plain python,"
        " one process)",
    )
    parser.add_argument(
        "--plot", type=Path, help="picture of the trials (.png, .svg or .pdf; needs matplotlib)"
    )
    parser.add_argument(
        "--retry_failed", action="store_true", help="first try the failed trials again, once each"
    )
    arguments, overrides = parser.parse_known_args()
    if LAUNCHED in os.environ or "LOCAL_RANK" in os.environ:
        raise ConfigError(
            "recipes/search.py was started by a launcher; start it with python, and give"
            " --accelerate_config for its trainings"
        )
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError("recipes/search.py needs optuna; pip install -e '.[search]'")
    if arguments.accelerate_config is not None:
        read_yaml(arguments.accelerate_config)
    check_picture(arguments.plot)
    search = read_search(arguments.search, overrides, arguments.trials)
    arguments.output_dir = arguments.output_dir or Path("runs") / arguments.search.stem
    check_folder(arguments.output_dir)
    return arguments, search


def describe_keys() -> str:
    """Return the text of --help about the keys of a search file."""
    lines = []
    for name, field in SearchFile.model_fields.items():
        default = "required" if field.is_required() else f"default {field.default!r}"
        lines.append(f"  {name}  ({default})")
        lines.append(f"      {' '.join((field.description or '').split())}")
    return "\n".join(lines)


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds something else than a search.

    Raises:
        RunError: See above.
    """
    expand_path(folder, "--output_dir")
    if folder.exists() and not folder.is_dir():
        raise RunError(f"--output_dir {folder} is a file; give a folder")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if names - {LOCK} and "search.db" not in names:
        raise RunError(
            f"--output_dir {folder} is not empty and holds no search; choose another folder"
        )


if __name__ == "__main__":
    ARGUMENTS, SEARCH = run_early(read_arguments)

from medqlora.core.run_lock import hold_run
from medqlora.reporting.search_results import collect_results, compare_confirmed, write_best
from medqlora.reporting.search_terminal import (
    describe_results,
    describe_state,
    draw,
    show_value,
    tabulate,
)
from medqlora.training.search.space import find_values
from medqlora.training.search.study import Study, open_study
from medqlora.training.search.trials import (
    CLAIM_PATIENCE,
    Launcher,
    StoppedError,
    claim_trial,
    confirm,
    list_failed,
    run_trial,
)
from medqlora.training.signals import catch_signals

# Where the output is no terminal, rich would take 80 columns and cut the table.
console = make_console(soft_wrap=True, width=None if sys.stdout.isatty() else 160)


def main() -> int:
    """Run the trials that are left, and write the results."""
    folder = ARGUMENTS.output_dir
    with hold_run(folder, CLAIM_PATIENCE):
        study = open_study(folder, SEARCH)
    launcher = Launcher(ARGUMENTS.accelerate_config, catch_signals())
    try:
        failures = run_trials(study, launcher)
        results = collect_results(study, folder)
        left = any(trial["state"] == "running" for trial in results["trials"])
        if SEARCH.file.confirm and results["best"] is not None and not left:
            results["confirmed"] = confirm_choice(study, results, launcher)
    except StoppedError as stopped:
        console.print("stopped; start the same command again to continue")
        return stopped.code
    save(study, results)
    console.print(tabulate(results))
    for line in describe_results(results):
        console.print(line)
    if ARGUMENTS.plot:
        draw(results, ARGUMENTS.plot)
    if failures >= SEARCH.file.max_failures:
        raise RunError(
            f"{failures} trials failed since the start (max_failures), as said above; mend the"
            " cause, and start again with --retry_failed"
        )
    if results["best"] is None and not left:
        raise RunError(
            "no trial is complete, so nothing can be chosen; mend what is said above, and start"
            " again with --retry_failed"
        )
    if results["best"] is None:
        console.print(f"wrote {folder / 'search.json'}")
        return 0
    console.print(f"wrote {folder / 'search.json'}; the choice is {folder / 'best.yaml'}")
    return 0


def run_trials(study: Study, launcher: Launcher) -> int:
    """Run trials until none is left or too many have failed, and return how many have failed."""
    failures = 0
    again = list_failed(study) if ARGUMENTS.retry_failed else []
    while failures < SEARCH.file.max_failures:
        with ExitStack() as held:
            trial = claim_trial(study, ARGUMENTS.output_dir, held, again)
            if trial is None:
                break
            values = find_values(SEARCH.space, trial.params)
            shown = ", ".join(f"{key} {show_value(value)}" for key, value in values.items())
            console.print(f"trial {trial.number}: {shown}")
            run_trial(study, trial, ARGUMENTS.output_dir, launcher)
        results = collect_results(study, ARGUMENTS.output_dir)
        save(study, results)
        ended = results["trials"][trial.number]
        failures += ended["state"] == "failed"
        console.print(f"trial {trial.number} {describe_state(ended)}")
    return failures


def confirm_choice(study: Study, results: dict, launcher: Launcher) -> dict:
    """Train the recipe and the chosen configuration anew, and compare them on the test."""
    points = {"default": SEARCH.default}
    if results["best"] != results["default"]:
        points["best"] = dict(study.trials()[results["best"]].params)
    console.print(f"the choice is made; comparing {' and '.join(points)} on data.test")
    return compare_confirmed(confirm(study, ARGUMENTS.output_dir, points, launcher))


def save(study: Study, results: dict) -> None:
    """Write search.json and best.yaml."""
    write_json(ARGUMENTS.output_dir / "search.json", results)
    if results["best"] is not None:
        write_best(study, results, ARGUMENTS.output_dir / "best.yaml")


if __name__ == "__main__":
    run_command(main)
