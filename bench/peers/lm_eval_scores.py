"""Our scores beside those of lm-evaluation-harness: predictions, log-likelihoods, questions per
second, peak memory.

    python bench/peers/lm_eval_scores.py --model DIR --medmcqa FILE --medqa FILE \\
        --pubmedqa FILE [--num_fewshot 5 --shots FILE]
        [--engine hf|vllm] [--batch_size 16] [--limit N] [--json FILE]

Each side runs each task in a process of its own. The harness runs its own tasks medmcqa,
medqa_4options and pubmedqa (their prompt functions and settings) on the given files. With
--num_fewshot both sides get the same examples in the same order. Seconds are those from questions
to results: starting Python and loading the model are left out on both sides. Only the ratios of one
run on one machine mean something. Needs `pip install lm_eval==0.4.13`.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from medqlora.core.entry import enter

    enter()

import numpy as np

from medqlora.core.command import CommandParser, run_command, whole
from medqlora.core.config import DataEntry, Model
from medqlora.core.environment import describe_environment, name_command, read_peak_resident
from medqlora.core.files import check_new, write_json
from medqlora.data.examples import MultipleChoice
from medqlora.data.reading import read_examples
from medqlora.engines.interface import Engine

TASKS = ("medmcqa", "medqa", "pubmedqa")
SIDES = ("harness", "ours")


def read_task(arguments: argparse.Namespace, task: str) -> list[MultipleChoice]:
    path = getattr(arguments, task)
    entry = DataEntry(format=task, path=str(path), limit=arguments.limit)
    examples, _ = read_examples(entry, "all")
    return examples


def read_shots(arguments: argparse.Namespace, task: str) -> list[MultipleChoice]:
    """Labelled questions that are not asked, in the order in which our side shows them
    (medqlora/evaluation/shots.py).
    """
    if not arguments.num_fewshot:
        return []
    asked = {example.question for example in read_task(arguments, task)}
    entry = DataEntry(format=task, path=str(arguments.shots))
    pool, _ = read_examples(entry, "all", drop_invalid=True)
    shots = [example for example in pool if example.question not in asked][: arguments.num_fewshot]
    return [shots[i] for i in draw_order(len(shots))]


def draw_order(count: int) -> list[int]:
    # This must be the draw of medqlora/evaluation/shots.py with seed 0. With another order the two
    # sides would read different prompts.
    return random.Random(0).sample(range(count), count)


def to_harness(example: MultipleChoice) -> dict:
    """A record in the layout of the hub dataset that the harness reads."""
    if example.dataset == "medmcqa":
        return {
            "question": example.question,
            **dict(zip(("opa", "opb", "opc", "opd"), example.options, strict=True)),
            # The hub's copy counts options from 0, as Example.answer does.
            "cop": example.answer,
        }
    if example.dataset == "medqa":
        return {
            "sent1": example.question,
            **{f"ending{i}": option for i, option in enumerate(example.options)},
            "label": example.answer,
        }
    return {
        "QUESTION": example.question,
        "CONTEXTS": list(example.context),
        "final_decision": example.options[example.answer],
    }


def read_harness_task(task: str, file: Path, shots: list[MultipleChoice]) -> dict:
    """The harness's own task, on our data and with our examples."""
    import lm_eval
    import yaml

    folder = Path(lm_eval.__file__).parent / "tasks" / task

    def load_function(loader: yaml.SafeLoader, node: yaml.Node) -> object:
        # The harness, too, loads a task's functions from the file beside it.
        module, _, function = loader.construct_scalar(node).partition(".")
        namespace: dict = {}
        exec((folder / f"{module}.py").read_text(encoding="utf-8"), namespace)
        return namespace[function]

    # A constructor is registered for a whole class, so the class is our own.
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", load_function)
    config = yaml.load((folder / f"{task}.yaml").read_text(encoding="utf-8"), Loader)
    # These keys belong to the hub's dataset and its splits, which a local file does not have.
    unused = ("dataset_name", "training_split", "validation_split", "should_decontaminate")
    for key in (*unused, "doc_to_decontamination_query"):
        config.pop(key, None)
    return config | {
        # The task's prompt functions and metrics stay as they are; only the source of its rows is
        # replaced.
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "task": f"{task}_local",
        "fewshot_config": {"sampler": "first_n", "samples": [to_harness(shot) for shot in shots]},
        "num_fewshot": len(shots),
    }


def run_harness(
    arguments: argparse.Namespace, task: str, examples: list[MultipleChoice], work: Path
) -> dict:
    import lm_eval
    import torch
    from lm_eval.tasks import TaskManager

    file = work / f"{task}.jsonl"
    lines = [json.dumps(to_harness(example)) + "\n" for example in examples]
    file.write_text("".join(lines), encoding="utf-8")
    shots = read_shots(arguments, task)
    if arguments.engine == "vllm":
        from lm_eval.models.vllm_causallms import VLLM

        model = VLLM(
            str(arguments.model),
            dtype=arguments.dtype,
            enforce_eager=True,
            batch_size="auto",
            max_model_len=arguments.max_length,
        )
    else:
        from lm_eval.models.huggingface import HFLM

        model = HFLM(
            str(arguments.model),
            dtype=arguments.dtype,
            device="cpu" if arguments.cpu or not torch.cuda.is_available() else "cuda",
            batch_size=arguments.batch_size,
        )
    manager = TaskManager()  # It reads fourteen thousand task files, which does not count.
    began = time.perf_counter()
    result = lm_eval.simple_evaluate(
        model,
        tasks=[read_harness_task(task, file, shots)],
        task_manager=manager,
        log_samples=True,
        # Bootstrapped errors are not compared, and their time would count.
        bootstrap_iters=0,
        num_fewshot=len(shots),
    )
    seconds = time.perf_counter() - began
    # The rows of both sides must stand in the order of the questions.
    samples = sorted(result["samples"][f"{task}_local"], key=lambda sample: sample["doc_id"])
    return {
        "seconds": seconds,
        # A response is a log-likelihood with a flag that says whether it is the greedy choice.
        "logprobs": [[pair[0] for pair in sample["filtered_resps"]] for sample in samples],
        "accuracy": result["results"][f"{task}_local"]["acc,none"],
    }


def run_ours(
    arguments: argparse.Namespace, task: str, examples: list[MultipleChoice], work: Path
) -> dict:
    from medqlora.evaluation.answering import predict
    from medqlora.evaluation.journal import Journal
    from medqlora.evaluation.method import Method
    from medqlora.evaluation.questions import prepare_questions
    from medqlora.model.base import load_tokenizer, read_model_config
    from medqlora.prompts.chat_template import make_encoder

    model = str(arguments.model)
    engine = make_engine(arguments)
    longest = arguments.max_length
    if not longest:
        # Without --max_length a prompt may fill the model's positions.
        longest = read_model_config(model).get_text_config().max_position_embeddings
    encoder = make_encoder(load_tokenizer(model), "lm_eval")
    # prepare_questions draws an order of its own. It gets the shots such that its draw gives back
    # this order.
    shots = read_shots(arguments, task)
    order = draw_order(len(shots))
    shots = [shots[order.index(i)] for i in range(len(shots))]
    method = Method(num_fewshot=len(shots))
    # The model is loaded before the clock starts, as on the other side.
    began = time.perf_counter()
    questions, shared = prepare_questions(encoder, examples, method, shots, longest)
    with Journal(work / f"{task}-predictions.jsonl") as journal:
        for batch in predict(engine, encoder, questions, shared, method, model):
            journal.append(batch)
        rows = {row["id"]: row for row in journal.read().values()}
    seconds = time.perf_counter() - began
    # The journal holds the rows by batch.
    rows = [rows[example.id] for example in examples]
    return {
        "seconds": seconds,
        "logprobs": [list(row["option_logprobs"].values()) for row in rows],
        "accuracy": sum(row["prediction"] == row["gold"] for row in rows) / len(rows),
    }


def make_engine(arguments: argparse.Namespace) -> Engine:
    import torch

    from medqlora.model.base import load_base

    model = str(arguments.model)
    if arguments.engine == "vllm":
        from medqlora.engines.vllm import VllmEngine

        return VllmEngine(model, None, dtype=arguments.dtype, max_length=arguments.max_length)
    from medqlora.engines.hf import HfEngine

    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.cpu else "cpu")
    config = Model(base=model, quantization="none", dtype=arguments.dtype)
    return HfEngine(*load_base(config, device))


def compare(task: str, engine: str, results: dict[str, dict]) -> dict:
    """Ratios of the two sides, and how far their answers lie apart."""
    harness = results["harness"]
    ours = results["ours"]
    theirs = np.array(harness["logprobs"])  # [questions, options]
    logprobs = np.array(ours["logprobs"])  # [questions, options]
    ranked = np.sort(theirs, axis=1)  # [questions, options], ascending
    memory = None  # vLLM's memory is that of another process.
    if engine == "hf":
        memory = ours["peak_memory_bytes"] / harness["peak_memory_bytes"]
    return {
        "task": task,
        "questions": len(theirs),
        "accuracy": harness["accuracy"],
        "accuracy_ours": ours["accuracy"],
        "different_predictions": int((theirs.argmax(1) != logprobs.argmax(1)).sum()),
        # Where this is larger than twice the difference below, no prediction can differ.
        "smallest_margin": float((ranked[:, -1] - ranked[:, -2]).min()),
        "max_logprob_difference": float(abs(theirs - logprobs).max()),
        # Both sides answer the same questions, so rates have the inverse ratio of seconds.
        "questions_per_second_ratio": harness["seconds"] / ours["seconds"],
        "peak_memory_ratio": memory,
    }


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, required=True, help="folder of a model, for instance of build_base.py"
    )
    for task in TASKS:
        parser.add_argument(
            f"--{task}", type=Path, help=f"labelled {task} file; left out: not compared"
        )
    parser.add_argument(
        "--shots",
        type=Path,
        help="file of the same format to take few-shot examples from (one task at a time)",
    )
    parser.add_argument(
        "--num_fewshot",
        type=whole(0),
        default=0,
        help="worked examples before each question (default 0)",
    )
    parser.add_argument("--limit", type=whole(1), help="first N questions of each file")
    add_engine_flags(parser)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument(
        "--record",
        type=Path,
        help="write the harness's own log-likelihoods to this file (.npz), for tests",
    )
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.side:
        check_new(arguments.json, "--json")
        check_new(arguments.record, "--record")
    return arguments


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--engine", choices=["hf", "vllm"], default="hf", help="backend of both sides (default hf)"
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="compute dtype (default float32)",
    )
    parser.add_argument(
        "--batch_size",
        type=whole(1),
        default=16,
        help="rows per batch of the harness's hf backend (default 16)",
    )
    parser.add_argument(
        "--max_length", type=whole(1), help="vllm: tokens per row (default: the model's positions)"
    )
    parser.add_argument("--cpu", action="store_true", help="use no GPU")


def main() -> None:
    arguments = parse_arguments()
    if arguments.side:
        run = run_harness if arguments.side == "harness" else run_ours
        examples = read_task(arguments, arguments.task)
        figures = run(arguments, arguments.task, examples, arguments.work)
        # It is the peak of the whole process, loading included, on both sides.
        figures["peak_memory_bytes"] = read_peak_resident()
        (arguments.work / f"{arguments.side}.json").write_text(json.dumps(figures))
        return
    results = []
    recorded = {}
    for task in TASKS:
        if getattr(arguments, task):
            sides = run_sides(task)
            recorded[task] = np.array(sides["harness"]["logprobs"])
            results.append(compare(task, arguments.engine, sides))
            show(results[-1], arguments.num_fewshot)
    if arguments.record:
        np.savez_compressed(arguments.record, **recorded)
    if arguments.json:
        keys = ("engine", "dtype", "num_fewshot", "batch_size", "max_length", "limit")
        settings = {key: getattr(arguments, key) for key in keys}
        settings["model"] = arguments.model.name
        settings["files"] = {task: getattr(arguments, task).name for task in recorded}
        environment = describe_environment()
        environment["versions"]["lm_eval"] = version("lm_eval")
        report = {
            "command": name_command("bench/peers/lm_eval_scores.py", sys.argv[1:]),
            "settings": settings,
            "environment": environment,
            "results": results,
        }
        write_json(arguments.json, report)


def run_sides(task: str) -> dict[str, dict]:
    """Run each side in a process of its own -> its figures."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        # A new process holds the memory of its own side alone.
        for side in SIDES:
            flags = [*sys.argv[1:], f"--side={side}", f"--task={task}", f"--work={folder}"]
            command = [sys.executable, __file__, *flags]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            results[side] = json.loads((Path(folder) / f"{side}.json").read_text())
    return results


def show(result: dict, num_fewshot: int) -> None:
    memory = ""
    if result["peak_memory_ratio"] is not None:
        memory = f", {result['peak_memory_ratio']:.2f} x its peak memory"
    print(
        f"{result['task']}, {num_fewshot}-shot, {result['questions']} questions:"
        f" {result['questions_per_second_ratio']:.1f} x the harness's questions/s{memory};"
        f" {result['different_predictions']} predictions differ, log-likelihoods by"
        f" {result['max_logprob_difference']:.1e} at most; accuracy {result['accuracy']:.4f} and"
        f" {result['accuracy_ours']:.4f}"
    )


if __name__ == "__main__":
    run_command(main)
