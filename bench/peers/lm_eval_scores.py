"""Our scores beside lm-evaluation-harness's own: predictions, log-likelihoods, questions per
second, peak memory.

    python bench/peers/lm_eval_scores.py --model DIR --medmcqa FILE --medqa FILE \\
        --pubmedqa FILE [--num_fewshot 5 --shots FILE]
        [--engine hf|vllm] [--batch_size 16] [--limit N] [--json FILE]

One process per side and task. The harness runs its own tasks medmcqa, medqa_4options and pubmedqa
(their prompt functions and settings) on the given files; with --num_fewshot both sides get the same
examples in the same order. Seconds are those from questions to results: starting Python and loading
the model are left out on both sides. Only ratios of one run on one machine mean something. Needs
`pip install lm_eval==0.4.13`.
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

import numpy as np

from medqlora.core.config import DataEntry
from medqlora.core.environment import describe_environment, name_command, read_peak_resident
from medqlora.data.examples import MultipleChoice
from medqlora.data.reading import read_examples

TASKS = ("medmcqa", "medqa", "pubmedqa")
SIDES = ("harness", "ours")


def read_task(arguments: argparse.Namespace, task: str, path: Path) -> list[MultipleChoice]:
    examples, _ = read_examples(
        DataEntry(format=task, path=str(path), limit=arguments.limit), "all"
    )
    return examples


def read_shots(arguments: argparse.Namespace, task: str) -> list[MultipleChoice]:
    """Labelled questions that are not asked, in the order in which our side shows them
    (scoring.choose_shots).
    """
    if not arguments.num_fewshot:
        return []
    asked = {example.question for example in read_task(arguments, task, getattr(arguments, task))}
    pool, _ = read_examples(
        DataEntry(format=task, path=str(arguments.shots)), "all", drop_invalid=True
    )
    shots = [example for example in pool if example.question not in asked][: arguments.num_fewshot]
    return [shots[i] for i in random.Random(0).sample(range(len(shots)), len(shots))]


def to_harness(example: MultipleChoice) -> dict:
    """A record in the layout of the hub dataset that the harness reads."""
    if example.dataset == "medmcqa":
        return {
            "question": example.question,
            **dict(zip(("opa", "opb", "opc", "opd"), example.options, strict=True)),
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


def harness_task(task: str, file: Path, shots: list[MultipleChoice]) -> dict:
    """The harness's own task file with another place of the data."""
    import lm_eval
    import yaml

    folder = Path(lm_eval.__file__).parent / "tasks" / task
    name = "medqa.yaml" if task == "medqa" else f"{task}.yaml"

    def load_function(loader: yaml.SafeLoader, node: yaml.Node) -> object:
        module, _, function = loader.construct_scalar(node).partition(".")
        namespace: dict = {}
        # the harness loads its task functions by path too
        exec((folder / f"{module}.py").read_text(encoding="utf-8"), namespace)
        return namespace[function]

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", load_function)
    config = yaml.load((folder / name).read_text(encoding="utf-8"), Loader)
    for key in (
        "dataset_name",
        "training_split",
        "validation_split",
        "should_decontaminate",
        "doc_to_decontamination_query",
    ):
        config.pop(key, None)
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "task": f"{task}_local",
    }
    return (
        config
        | data
        | {
            "fewshot_config": {
                "sampler": "first_n",
                "samples": [to_harness(shot) for shot in shots],
            }
        }
    )


def run_harness(
    arguments: argparse.Namespace, task: str, examples: list[MultipleChoice], work: Path
) -> dict:
    import lm_eval
    import torch
    from lm_eval.tasks import TaskManager

    file = work / f"{task}.jsonl"
    file.write_text(
        "".join(json.dumps(to_harness(example)) + "\n" for example in examples), encoding="utf-8"
    )
    shots = read_shots(arguments, task)
    config = harness_task(task, file, shots) | {"num_fewshot": len(shots)}
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
    manager = TaskManager()  # reads fourteen thousand task files: not counted
    began = time.perf_counter()
    result = lm_eval.simple_evaluate(
        model,
        tasks=[config],
        task_manager=manager,
        log_samples=True,
        bootstrap_iters=0,
        num_fewshot=len(shots),
    )
    seconds = time.perf_counter() - began
    samples = sorted(result["samples"][f"{task}_local"], key=lambda sample: sample["doc_id"])
    return {
        "seconds": seconds,
        "logprobs": [[pair[0] for pair in sample["filtered_resps"]] for sample in samples],
        "accuracy": result["results"][f"{task}_local"]["acc,none"],
    }


def run_ours(
    arguments: argparse.Namespace, task: str, examples: list[MultipleChoice], work: Path
) -> dict:
    import torch

    from medqlora.core.config import Model
    from medqlora.evaluation.answering import predict
    from medqlora.evaluation.journal import Journal
    from medqlora.evaluation.method import Method
    from medqlora.evaluation.questions import prepare_questions
    from medqlora.model.base import load_base, load_tokenizer, read_model_config
    from medqlora.prompts.chat_template import make_encoder

    model = str(arguments.model)
    if arguments.engine == "vllm":
        from medqlora.engines.vllm import VllmEngine

        engine = VllmEngine(model, None, dtype=arguments.dtype, max_length=arguments.max_length)
    else:
        from medqlora.engines.hf import HfEngine

        device = torch.device("cuda" if torch.cuda.is_available() and not arguments.cpu else "cpu")
        engine = HfEngine(
            *load_base(Model(base=model, quantization="none", dtype=arguments.dtype), device)
        )
    longest = (
        arguments.max_length or read_model_config(model).get_text_config().max_position_embeddings
    )
    encoder = make_encoder(load_tokenizer(model), "lm_eval")
    shots = read_shots(arguments, task)
    # our own draw restores the order
    shots = [shots[i] for i in invert(random.Random(0).sample(range(len(shots)), len(shots)))]
    method = Method(num_fewshot=len(shots))
    began = time.perf_counter()
    questions, shared = prepare_questions(encoder, examples, method, shots, longest)
    with Journal(work / f"{task}-predictions.jsonl") as journal:
        for batch in predict(engine, encoder, questions, shared, method, model):
            journal.append(batch)
        rows = {row["id"]: row for row in journal.read().values()}
    seconds = time.perf_counter() - began
    rows = [rows[example.id] for example in examples]
    right = [row["prediction"] == row["gold"] for row in rows]
    return {
        "seconds": seconds,
        "logprobs": [list(row["option_logprobs"].values()) for row in rows],
        "accuracy": sum(right) / len(right),
    }


def invert(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=lambda i: order[i])


def compare(task: str, engine: str, examples: list[MultipleChoice], found: dict[str, dict]) -> dict:
    """Ratios, and how far the two sides' answers lie apart."""
    harness = found["harness"]
    ours = found["ours"]
    pairs = list(zip(harness["logprobs"], ours["logprobs"], strict=True))
    best = [[max(range(len(values)), key=lambda i: values[i]) for values in pair] for pair in pairs]
    margins = [sorted(values)[-1] - sorted(values)[-2] for values, _ in pairs]
    return {
        "task": task,
        "questions": len(examples),
        "accuracy": harness["accuracy"],
        "accuracy_ours": ours["accuracy"],
        "different_predictions": sum(a != b for a, b in best),
        "smallest_margin": min(margins),
        "max_logprob_difference": max(
            abs(a - b) for x, y in pairs for a, b in zip(x, y, strict=True)
        ),
        "questions_per_second_ratio": harness["seconds"] / ours["seconds"],
        # vLLM: another process
        "peak_memory_ratio": (
            ours["peak_memory_bytes"] / harness["peak_memory_bytes"] if engine == "hf" else None
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
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
        type=int,
        default=0,
        help="worked examples before each question (default 0)",
    )
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
        type=int,
        default=16,
        help="rows per batch of the harness's hf backend (default 16)",
    )
    parser.add_argument(
        "--max_length", type=int, help="vllm: tokens per row (default: the model's positions)"
    )
    parser.add_argument("--limit", type=int, help="first N questions of each file")
    parser.add_argument("--cpu", action="store_true", help="use no GPU")
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
    if arguments.side:
        examples = read_task(arguments, arguments.task, getattr(arguments, arguments.task))
        found = (run_harness if arguments.side == "harness" else run_ours)(
            arguments, arguments.task, examples, arguments.work
        )
        found["peak_memory_bytes"] = read_peak_resident()
        (arguments.work / f"{arguments.side}.json").write_text(json.dumps(found))
        return
    results = []
    recorded = {}
    for task in (name for name in TASKS if getattr(arguments, name)):
        with tempfile.TemporaryDirectory() as folder:
            for side in SIDES:
                command = [
                    sys.executable,
                    __file__,
                    *sys.argv[1:],
                    "--side",
                    side,
                    "--task",
                    task,
                    "--work",
                    folder,
                ]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            found = {
                side: json.loads((Path(folder) / f"{side}.json").read_text()) for side in SIDES
            }
        results.append(
            compare(
                task, arguments.engine, read_task(arguments, task, getattr(arguments, task)), found
            )
        )
        facts = results[-1]
        memory = (
            ""
            if facts["peak_memory_ratio"] is None
            else f", {facts['peak_memory_ratio']:.2f} x its peak memory"
        )
        recorded[task] = np.array(found["harness"]["logprobs"])  # [questions, options]
        print(
            f"{task}, {arguments.num_fewshot}-shot, {facts['questions']} questions:"
            f" {facts['questions_per_second_ratio']:.1f} x the harness's questions/s{memory};"
            f" {facts['different_predictions']} predictions differ, log-likelihoods by"
            f" {facts['max_logprob_difference']:.1e} at most; accuracy {facts['accuracy']:.4f} and"
            f" {facts['accuracy_ours']:.4f}"
        )
    if arguments.record:
        np.savez_compressed(arguments.record, **recorded)
    if arguments.json:
        settings = {
            name: getattr(arguments, name)
            for name in ("engine", "dtype", "num_fewshot", "batch_size", "max_length", "limit")
        }
        settings |= {
            "model": arguments.model.name,
            "files": {task: getattr(arguments, task).name for task in recorded},
        }
        environment = describe_environment()
        environment["versions"]["lm_eval"] = version("lm_eval")
        arguments.json.write_text(
            json.dumps(
                {
                    "command": name_command("bench/peers/lm_eval_scores.py", sys.argv[1:]),
                    "settings": settings,
                    "environment": environment,
                    "results": results,
                },
                indent=2,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
