"""Check a training before it is started: files, keys, dtypes, batch arithmetic, data, disk,
machines, and two real steps.

    python launch/preflight.py --config recipes/configs/NAME.yaml \\
        --accelerate_config accelerate_configs/NAME.yaml [--section.key VALUE ...]

On each machine of a multi-node job, at the same time (the Slurm script does it):

    python launch/preflight.py --rendezvous HOST:PORT --num_machines N --machine_rank R \\
        [--shared_folder DIR]

Prints one table; exit code 2 if anything failed. No weights are loaded and no network is used for a
model in a folder.
"""

import argparse
import json
import os
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import yaml

from medqlora.core.config import Config
from medqlora.core.config_loading import change, load_config
from medqlora.core.environment import prefer_expandable_segments, read_versions
from medqlora.core.errors import ConfigError, UserError
from medqlora.core.files import check_disk, hash_json, write_atomic
from medqlora.core.run_folder import check_run
from medqlora.training.processes import ProcessError

ROWS = 500  # of each data entry that are read, cleaned and tokenized here


class Unchecked(Exception):
    """What cannot be checked on this machine, and why."""


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, help="recipe YAML")
    parser.add_argument("--accelerate_config", type=Path, help="accelerate YAML")
    parser.add_argument(
        "--output_dir", type=Path, help="run folder (default: runs/NAME of the config)"
    )
    parser.add_argument(
        "--rendezvous",
        metavar="HOST:PORT",
        help="meet the other machines there instead of checking a recipe",
    )
    parser.add_argument("--num_machines", type=int, help="with --rendezvous: how many are to meet")
    parser.add_argument(
        "--machine_rank",
        type=int,
        default=int(os.environ.get("SLURM_NODEID", "0")),
        help="default: Slurm's, else 0",
    )
    parser.add_argument(
        "--shared_folder",
        type=Path,
        help="with --rendezvous: every machine must see this folder of machine 0",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=60,
        help="with --rendezvous: how long machines wait for each other; default %(default)s",
    )
    return parser.parse_known_args()


def main() -> None:
    arguments, overrides = parse_arguments()
    prefer_expandable_segments(os.environ)  # torch reads it when it is imported.
    if arguments.rendezvous:
        if arguments.num_machines is None:
            raise ConfigError(
                "--rendezvous needs --num_machines, the number of machines that are to meet"
            )
        print(
            meet(
                arguments.rendezvous,
                arguments.machine_rank,
                arguments.num_machines,
                arguments.shared_folder,
                arguments.seconds,
            )
        )
        return
    if arguments.config is None or arguments.accelerate_config is None:
        raise ConfigError(
            "expected --config FILE and --accelerate_config FILE, or --rendezvous HOST:PORT"
        )
    from rich.console import Console
    from rich.table import Table

    warnings.simplefilter("ignore", FutureWarning)  # of libraries about each other
    began = time.perf_counter()
    table = Table(
        title=f"preflight of {arguments.config.name} under {arguments.accelerate_config.name}",
        title_justify="left",
    )
    for column in ("check", "", "found"):
        table.add_column(column)
    failed = 0
    for name, ok, found in run_checks(arguments, overrides):
        failed += ok is False
        table.add_row(
            name,
            {True: "[green]ok", False: "[red]FAILED", None: "[yellow]not checked"}[ok],
            found.replace("[", "\\["),
        )
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table)
    print(f"{time.perf_counter() - began:.1f} s")
    if failed:
        raise ProcessError(f"preflight: {failed} check(s) failed; see the table")


def run_checks(
    arguments: argparse.Namespace, overrides: list[str]
) -> Iterator[tuple[str, bool | None, str]]:
    """(name, passed or None where it could not be checked, what was found); a check whose ground is
    missing is left out.
    """
    facts: dict = {}

    def check(name: str, function: Callable[[], str]) -> tuple[str, bool | None, str]:
        try:
            found = function()
        except UserError as error:
            return name, False, str(error)
        except Unchecked as reason:
            return name, None, str(reason)
        return name, True, found

    def recipe() -> str:
        facts["config"] = load_config(arguments.config, overrides)
        return f"{facts['config'].model.base}, {facts['config'].model.quantization}"

    yield check("recipe keys", recipe)
    yield check("accelerate keys", lambda: read_accelerate(arguments.accelerate_config, facts))
    if "config" not in facts or "strategy" not in facts:
        return
    config = facts["config"]
    output_dir = arguments.output_dir or Path("runs") / arguments.config.stem
    yield check("processes", lambda: check_processes(facts))
    yield check("dtype, storage", lambda: check_dtypes(config, facts))
    yield check("batch", lambda: check_batch(config, facts))
    yield check("model", lambda: check_model(config, facts))
    if "encoder" in facts:
        yield check("data", lambda: check_data(config, facts))
    yield check("disk", lambda: check_places(config, output_dir, facts))
    if "prepared" in facts and "dtype" in facts:
        yield check("memory", lambda: forecast(config, facts))
    yield check("rendezvous", lambda: check_rendezvous(facts, arguments))
    if "prepared" in facts and "dtype" in facts:
        yield check("two steps", lambda: take_two_steps(config, facts))


def read_accelerate(path: Path, facts: dict) -> str:
    from accelerate.commands.config.config_args import load_config_from_file

    from medqlora.training.strategies.launch import launch_environ, read_strategy

    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        load_config_from_file(str(path))  # accelerate's own check of the keys
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}; give the path of an accelerate YAML"
        ) from None
    except (yaml.YAMLError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())[:300]}") from None
    facts["accelerate"], facts["environ"] = tree, launch_environ(tree)
    machines = int(tree.get("num_machines") or 1)
    ranks = int(tree.get("num_processes") or 1)
    if ranks % machines:
        raise ConfigError(
            f"{path}: num_processes {ranks} is not a multiple of num_machines {machines}; it counts"
            " the processes of all machines"
        )
    if str(tree.get("distributed_type")).upper() in ("NO", "FALSE") and ranks > 1:
        raise ConfigError(
            f"{path}: num_processes {ranks} with distributed_type NO starts one process; use"
            " MULTI_GPU, DEEPSPEED or FSDP"
        )
    facts["strategy"], facts["machines"] = read_strategy(facts["environ"], ranks), machines
    return f"{facts['strategy'].name}, {ranks} process(es) on {machines} machine(s)"


def check_processes(facts: dict) -> str:
    import torch

    local = facts["strategy"].ranks // facts["machines"]
    gpus = torch.cuda.device_count()
    if facts["strategy"].name.startswith("zero"):
        try:
            import deepspeed  # noqa: F401
        except ImportError:
            raise ProcessError(
                "deepspeed is not installed; pip install 'medqlora[deepspeed]', or use ddp or fsdp2"
            ) from None
    if not gpus:
        raise Unchecked(f"{local} per machine; no GPU here to count")
    if local > gpus:
        raise ProcessError(
            f"{local} processes per machine, {gpus} GPU(s) here; set num_processes to the GPUs of"
            " all machines"
        )
    return f"{local} of {gpus} GPU(s)" + ("" if local == gpus else "; the others stay idle")


def check_dtypes(config: Config, facts: dict) -> str:
    import torch

    from medqlora.model.base import check_hardware
    from medqlora.model.hardware import choose_dtype
    from medqlora.training.strategies.launch import check_strategy, choose_storage

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts["device"], dtype = device, choose_dtype(config.model.dtype, device)
    check_hardware(config.model, device, dtype)
    check_strategy(facts["strategy"], config, dtype, facts["environ"])
    facts["dtype"], facts["storage"] = (
        dtype,
        choose_storage(facts["strategy"], config.model.quantization, dtype),
    )
    stored = (
        f", 4-bit weights stored as {facts['storage']}"
        if config.model.quantization in ("nf4", "fp4")
        else ""
    )
    return f"compute {dtype}, adapter and its gradients torch.float32{stored}"


def check_batch(config: Config, facts: dict) -> str:
    from medqlora.batches.plan import describe_batch

    return describe_batch(config.training, config.data.max_length, facts["strategy"].ranks)


def check_model(config: Config, facts: dict) -> str:
    from medqlora.model.base import check_length, load_tokenizer, read_model_config
    from medqlora.model.random_base import count_parameters
    from medqlora.prompts.chat_template import make_encoder

    model = config.model
    facts["model_config"] = read_model_config(model.base, model.revision, model.trust_remote_code)
    check_length(facts["model_config"], config.data.max_length)
    facts["sizes"] = count_parameters(facts["model_config"], config.lora)
    facts["encoder"] = make_encoder(
        load_tokenizer(model.base, model.revision, model.trust_remote_code),
        config.data.prompt_style,
        config.data.completion,
    )
    return (
        f"{facts['sizes'][0]:,} parameters, adapter {facts['sizes'][1]:,}; prompts"
        f" {facts['encoder'].style}"
    )


def check_data(config: Config, facts: dict) -> str:
    """The first rows of every entry through reading, cleaning, separation and tokenization."""
    from medqlora.batches.pipeline import count_reasons, prepare
    from medqlora.batches.plan import PlanError

    tree = config.model_dump()
    for role in ("train", "eval", "test"):
        for entry in tree["data"][role]:
            entry["limit"] = min(entry["limit"] or ROWS, ROWS)
    with tempfile.TemporaryDirectory() as folder:
        tree["data"]["cache_dir"] = folder
        prepared = prepare(Config.model_validate(tree), facts["encoder"])
        table = prepared.train
        if not len(table.lengths):
            raise PlanError("data.train: no row is left")
        facts["prepared"] = prepared
        dropped = ", ".join(
            f"{count} {reason}" for reason, count in count_reasons(prepared.removals).items()
        )
        supervised = int(table.supervised.sum())
        facts["rows"] = [
            table.ids[table.offsets[i] : table.offsets[i] + table.lengths[i]].tolist()
            for i in range(min(8, len(table.lengths)))
        ]
        facts["prompt_lengths"] = table.prompt_lengths[:8].tolist()
        return (
            f"of the first {ROWS} rows of each entry: {len(table.lengths):,} to train on,"
            f" {int(table.lengths.mean())} tokens each, {supervised / len(table.lengths):.1f}"
            f" supervised; removed: {dropped or 'none'}"
        )


def check_places(config: Config, output_dir: Path, facts: dict) -> str:
    check_run(output_dir, config, resume=True)
    size = facts["sizes"][1] if "sizes" in facts else 0
    check_disk(
        output_dir, 12 * size * (config.training.keep_checkpoints + 2), "adapter and checkpoints"
    )
    for place, key in (
        (output_dir, "--output_dir"),
        (Path(config.data.cache_dir).expanduser(), "data.cache_dir"),
    ):
        existing = next(parent for parent in [place, *place.absolute().parents] if parent.exists())
        try:
            with tempfile.TemporaryFile(dir=existing):
                pass
        except OSError as error:
            raise ConfigError(
                f"{key} {place}: cannot write to {existing}: {error.strerror}; choose another"
                " folder"
            ) from None
    return (
        f"{output_dir}: {12 * size * (config.training.keep_checkpoints + 2) / 2**20:,.0f} MiB"
        " needed, and free"
    )


def forecast(config: Config, facts: dict) -> str:
    """What the recipe will decide and need on each GPU; on a machine without one, its least."""
    import torch

    from medqlora.batches.collate import most_supervised
    from medqlora.model.hardware import choose_dtype
    from medqlora.training.memory.allocator import segments_expand
    from medqlora.training.memory.planner import plan_step
    from medqlora.training.memory.setting import Setting, available_host, available_memory
    from medqlora.training.memory.tracker import GIB, UnknownForecast
    from medqlora.training.strategies.launch import choose_storage

    gpu = torch.cuda.is_available()
    # where it will train; this may be a login node
    device = torch.device("cpu" if facts["accelerate"].get("use_cpu") else "cuda")
    dtype = choose_dtype(config.model.dtype, device)
    memory = available_memory(torch.device("cuda")) if gpu else sys.maxsize
    storage = choose_storage(facts["strategy"], config.model.quantization, dtype)
    host = available_host(facts["strategy"].ranks // facts["machines"] or 1) if gpu else sys.maxsize
    setting = Setting(
        device, dtype, storage, facts["strategy"], memory, host, expandable=segments_expand()
    )
    undecided = "auto" in (
        config.training.gradient_checkpointing,
        config.training.max_tokens_per_batch,
    )
    if not gpu and config.training.gradient_checkpointing == "auto":
        config = change(config, "training", gradient_checkpointing="full")
    try:
        plan = plan_step(
            config,
            facts["model_config"],
            setting,
            lambda tokens: most_supervised(facts["prepared"].train, tokens),
        )
    except UnknownForecast as error:
        if undecided:
            raise  # the recipe would need the forecast too
        raise Unchecked(str(error)) from None
    found = (
        f"{plan.forecast.peak / GIB:.2f} GiB predicted per process at {plan.tokens:,} tokens,"
        f" {plan.forecast.recomputed} of {plan.forecast.layers} layers recomputed"
    )
    if not gpu:
        return f"{found}; no GPU here to compare with"
    if not setting.holds(plan.forecast):
        raise ProcessError(
            f"{found}, {memory / GIB:.2f} GiB may be used here; lower"
            " training.max_tokens_per_batch, or set both to auto"
        )
    return f"{found}, of {memory / GIB:.2f} GiB that may be used here"


def check_rendezvous(facts: dict, arguments: argparse.Namespace) -> str:
    if facts["machines"] == 1:
        return "one machine"
    tree = facts["accelerate"]
    host = tree.get("main_process_ip")
    port = tree.get("main_process_port")
    if not host or not port:
        raise Unchecked(
            "the accelerate config names no main_process_ip and main_process_port;"
            " launch/slurm_train.sbatch derives them"
        )
    rank = int(arguments.machine_rank or tree.get("machine_rank") or 0)
    try:
        address = socket.gethostbyname(str(host))
        if rank == 0:
            with socket.create_server((address, int(port))):
                return f"{host}:{port} is free on this machine"
    except OSError as error:
        what = "use" if rank == 0 else "resolve"
        raise ProcessError(
            f"main_process_ip {host}, port {port}: cannot {what} it here:"
            f" {error.strerror or error}; it must be machine 0's"
        ) from None
    return (
        f"{host} is {address}; meet with --rendezvous {host}:{port} --num_machines"
        f" {facts['machines']} on all machines at once"
    )


def take_two_steps(config: Config, facts: dict) -> str:
    """Train two fake layers of this architecture, quantized as asked, on this recipe's own rows."""
    import numpy as np
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    from medqlora.batches.collate import collate
    from medqlora.core.config import Model
    from medqlora.model.adapter import attach_adapter
    from medqlora.model.attention.packed_batch import move_batch, verify_isolation
    from medqlora.model.base import backbone_of, load_base
    from medqlora.model.head_loss import AnswerLoss
    from medqlora.model.recomputation import set_checkpointing
    from medqlora.prompts.encoding import TokenTable
    from medqlora.training.optimizers import make_optimizer
    from medqlora.training.strategies.launch import Strategy
    from medqlora.training.strategies.wrapping import wrap

    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        try:
            small = shrink(facts["model_config"])
            AutoModelForCausalLM.from_config(small, dtype=torch.float32).save_pretrained(folder)
        # an architecture with rules of its own
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise Unchecked(
                f"two fake layers of it cannot be made: {' '.join(str(error).split())[:120]}"
            ) from None
        vocabulary = small.get_text_config().vocab_size
        fake = Model(**(config.model.model_dump() | {"base": folder, "revision": None}))
        base, backend = load_base(fake, facts["device"], facts["storage"])
    isolation = verify_isolation(backbone_of(base), backend, vocabulary, 5e-2)
    model = attach_adapter(base, config.lora, config.training.seed)
    mode = config.training.gradient_checkpointing
    recomputed = set_checkpointing(base, "full" if mode == "auto" else mode)
    trainer = wrap(
        Strategy("one"),
        AnswerLoss(model, 64),
        lambda weights: make_optimizer(config.training, weights),
        1.0,
        facts["dtype"],
    )
    lengths = np.array([len(row) for row in facts["rows"]])
    ids = np.concatenate([np.asarray(row) % vocabulary for row in facts["rows"]])
    table = TokenTable(
        ids,
        np.concatenate([[0], lengths.cumsum()]),
        np.array(facts["prompt_lengths"]),
        [""] * len(lengths),
    )
    batch = collate(table, np.arange(len(lengths)))
    tensors = move_batch(batch, backend, facts["device"])
    losses = []
    for _ in range(2):
        trainer.module.train()
        loss = trainer(**tensors)
        trainer.backward(loss / len(batch["targets"]))
        norm = trainer.step(config.training.lr)
        losses.append(loss.item() / len(batch["targets"]))
    if not np.isfinite([*losses, norm]).all():
        raise ProcessError(
            f"two fake layers of this architecture: losses {losses}, gradient norm {norm}; report"
            " this with the recipe"
        )
    return (
        f"losses {losses[0]:.3f}, {losses[1]:.3f}; attention {backend} isolates rows (error"
        f" {isolation:.0e}); {recomputed} of 2 recomputed"
    )


def shrink(config):
    """The same architecture, two layers and narrow."""
    small = type(config)(**config.to_dict())
    text = small.get_text_config()
    changes = {
        "num_hidden_layers": 2,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size_per_layer_input": 0,
    }
    for key, value in changes.items():
        if hasattr(text, key):
            setattr(text, key, value)
    if isinstance(getattr(text, "layer_types", None), list):
        text.layer_types = text.layer_types[:2]
    # long-context factors fit one width only
    if isinstance(rope := getattr(text, "rope_parameters", None), dict) and "rope_type" in rope:
        text.rope_parameters = {
            key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope
        } | {"rope_type": "default"}
    small.quantization_config = None
    del small.quantization_config
    return small


def meet(place: str, rank: int, machines: int, shared: Path | None, seconds: float) -> str:
    """All machines at one address, with the same packages and a common folder.

    Raises:
        ProcessError: who is missing, or what differs.
    """
    from torch.distributed import DistError, TCPStore

    host, _, port = place.rpartition(":")
    mine = f"machine {rank} ({socket.gethostname()})"
    if not host or not port.isdigit():
        raise ProcessError(f"--rendezvous {place}: expected HOST:PORT")
    if rank != 0 and not wait_for(lambda: can_connect(host, int(port)), seconds):
        raise ProcessError(
            f"{mine} cannot reach machine 0 at {place} within {seconds:.0f} s; check address, port"
            " and firewall, and that all were started"
        )
    try:
        store = TCPStore(
            host,
            int(port),
            is_master=rank == 0,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
        )
    except (DistError, OSError) as error:
        raise ProcessError(
            f"{mine} cannot open {place}: {str(error).splitlines()[0][:160]}; give machine 0's"
            " address and a free port"
        ) from None
    token = f"{time.time_ns():x}"
    if shared is not None and rank == 0:
        write_atomic(shared / "meeting.json", json.dumps(token))
    if rank == 0:
        store.set("token", token)
    problem = ""
    if rank != 0 and shared is not None:  # said to all, so that all end with it
        problem = look_for(shared / "meeting.json", store.get("token").decode(), mine, seconds)
    store.set(
        f"machine-{rank}",
        json.dumps({"host": socket.gethostname(), "versions": read_versions(), "problem": problem}),
    )
    facts = []
    for other in range(machines):
        if not wait_for(lambda key=f"machine-{other}": has_come(store, key, place), seconds):
            raise ProcessError(
                f"machine {other} of {machines} did not come to {place} within {seconds:.0f} s; was"
                f" it started, with --machine_rank {other}?"
            )
        facts.append(json.loads(store.get(f"machine-{other}")))
    store.add("left", 1)
    if rank == 0:  # the store lives in this process until all have read it
        wait_for(lambda: store.add("left", 0) >= machines, seconds)
    for other, found in enumerate(facts):
        if found["problem"]:
            raise ProcessError(found["problem"])
        for key in sorted(found["versions"].keys() | facts[0]["versions"].keys()):
            if found["versions"].get(key) != facts[0]["versions"].get(key):
                raise ProcessError(
                    f"machine {other} ({found['host']}) has {key} {found['versions'].get(key)},"
                    f" machine 0 ({facts[0]['host']}) {facts[0]['versions'].get(key)}; use the same"
                    " environment on all machines"
                )
    return (
        f"{mine}: {machines} machine(s) met at {place}, packages"
        f" {hash_json(facts[0]['versions'])[:8]}"
    )


def look_for(path: Path, token: str, mine: str, seconds: float) -> str:
    def is_there() -> bool:
        try:
            return json.loads(path.read_text(encoding="utf-8")) == token
        except (OSError, ValueError):
            return False

    if wait_for(is_there, seconds / 2):  # a network filesystem may take its time
        return ""
    return (
        f"{mine} does not see {path.parent} of machine 0; --output_dir and data.cache_dir must be"
        " on a filesystem that all machines share"
    )


def has_come(store, key: str, place: str) -> bool:
    from torch.distributed import DistError

    try:
        return store.check([key])
    except DistError:
        raise ProcessError(f"machine 0 has left {place}; look at what it said") from None


def can_connect(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
