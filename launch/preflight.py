"""Check a training before it is started, and print one table of the results.

The checks are of files, keys, dtypes, batch arithmetic, data, disk and machines, and two real steps
are taken with a small model.

    python launch/preflight.py --config recipes/configs/NAME.yaml \\
        --accelerate_config accelerate_configs/NAME.yaml [--section.key VALUE ...]

The second form checks that several machines reach each other. Run it on each machine at the same
time (launch/slurm_train.sbatch does so):

    python launch/preflight.py --rendezvous HOST:PORT --num_machines N --machine_rank R \\
        [--shared_folder DIR]

The exit code is 2 if a check failed. No weights are loaded. A model in a folder needs no network.
"""

import argparse
import copy
import os
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from medqlora.core.entry import enter

    enter()

from medqlora.core.command import CommandParser, above_zero, make_console, run_early, whole
from medqlora.core.config import Config
from medqlora.core.config_loading import change, load_config
from medqlora.core.environment import prefer_expandable_segments
from medqlora.core.errors import ConfigError, UserError


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = CommandParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, help="YAML file of the recipe")
    parser.add_argument("--accelerate_config", type=Path, help="YAML file for accelerate launch")
    parser.add_argument(
        "--output_dir",
        type=Path,
        help="run folder (default: runs/NAME, where NAME is that of the recipe's file)",
    )
    parser.add_argument(
        "--rendezvous",
        metavar="HOST:PORT",
        help="address of machine 0, where all machines meet; no recipe is checked then",
    )
    parser.add_argument(
        "--num_machines", type=whole(1), help="with --rendezvous: number of machines that must meet"
    )
    parser.add_argument(
        "--machine_rank",
        type=whole(0),
        default=os.environ.get("SLURM_NODEID", "0"),
        help="number of this machine, from 0 (default: the one that Slurm gives, or 0)",
    )
    parser.add_argument(
        "--shared_folder",
        type=Path,
        help="with --rendezvous: a folder of machine 0 that every machine must see",
    )
    parser.add_argument(
        "--seconds",
        type=above_zero,
        default=60,
        help=(
            "with --rendezvous: seconds that the machines wait for each other (default %(default)s)"
        ),
    )
    arguments, overrides = parser.parse_known_args()
    if arguments.rendezvous and arguments.num_machines is None:
        raise ConfigError(
            "--rendezvous needs --num_machines, the number of machines that must meet"
        )
    if not arguments.rendezvous:
        if arguments.config is None or arguments.accelerate_config is None:
            raise ConfigError(
                "expected --config FILE and --accelerate_config FILE, or --rendezvous HOST:PORT"
            )
        # The result is not kept: this call refuses mistakes before the slow imports.
        load_config(arguments.config, overrides)
    return arguments, overrides


if __name__ == "__main__":
    # The arguments are checked before torch is imported, which takes seconds. The variable of its
    # allocator must be set before, because torch reads it while it is imported.
    ARGUMENTS, OVERRIDES = run_early(parse_arguments)
    prefer_expandable_segments(os.environ)

import numpy as np
import torch
import transformers
from accelerate.commands.config.config_args import load_config_from_file
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, PretrainedConfig

from medqlora.batches.budgets import PlanError, describe_batch
from medqlora.batches.cache import Prepared
from medqlora.batches.collate import most_supervised
from medqlora.batches.pipeline import prepare
from medqlora.batches.plan import Plan
from medqlora.core.command import run_command
from medqlora.core.files import check_disk
from medqlora.core.run_folder import check_run
from medqlora.model.base import (
    check_hardware,
    check_length,
    find_model,
    load_tokenizer,
    read_model_config,
)
from medqlora.model.base_weights import check_trainable
from medqlora.model.hardware import choose_dtype, default_device
from medqlora.model.initial_adapter import check_initial
from medqlora.prompts.chat_template import Encoder, make_encoder
from medqlora.prompts.rows import TokenTable
from medqlora.training.memory.allocator import segments_expand
from medqlora.training.memory.planner import check_unavoidable, plan_step
from medqlora.training.memory.target import TargetHardware, available_host, available_memory
from medqlora.training.memory.tracker import GIB, UnknownForecast
from medqlora.training.methods import choose_method
from medqlora.training.processes import ProcessError
from medqlora.training.rendezvous import meet
from medqlora.training.session import Session, build, load, prove
from medqlora.training.setup import size_of_checkpoints
from medqlora.training.strategies.launch import (
    Strategy,
    check_strategy,
    choose_storage,
    launch_environ,
    read_accelerate_config,
    read_strategy,
)

ROWS = 500  # The check of the data reads this many rows of each entry.


class Unchecked(Exception):
    """Something cannot be checked on this machine; the message says why."""


def main() -> None:
    arguments = ARGUMENTS
    if arguments.rendezvous:
        address = arguments.rendezvous
        machines = arguments.num_machines
        shared = arguments.shared_folder
        print(meet(address, arguments.machine_rank, machines, shared, arguments.seconds))
        return
    warnings.simplefilter("ignore", FutureWarning)  # These warnings are between libraries.
    start = time.perf_counter()
    table = Table(
        title=f"preflight of {arguments.config.name} under {arguments.accelerate_config.name}",
        title_justify="left",
    )
    for column in ("check", "", "result"):
        table.add_column(column)
    results = {
        True: Text("ok", style="green"),
        False: Text("FAILED", style="red"),
        None: Text("not checked", style="yellow"),
    }
    failed = 0
    for check in run_checks(arguments, OVERRIDES):
        # None is no failure, since this machine could not tell.
        failed += check.passed is False
        table.add_row(check.name, results[check.passed], check.text)
    make_console(width=None if sys.stdout.isatty() else 160).print(table)
    print(f"{time.perf_counter() - start:.1f} s")
    if failed:
        raise ProcessError(f"preflight: {failed} check(s) failed; see the table")


@dataclass(frozen=True)
class Check:
    """A row of the table.

    Args:
        name: Name of the check.
        passed: Whether it passed; None if it could not be made on this machine.
        text: The result, or what is wrong.
    """

    name: str
    passed: bool | None
    text: str


@dataclass(frozen=True)
class Launch:
    """The content of the accelerate config.

    Args:
        tree: The file as a dictionary.
        environ: The environment variables that accelerate launch would set.
        strategy: The strategy that follows from them.
        machines: Number of machines.
    """

    tree: dict[str, Any]
    environ: dict[str, str]
    strategy: Strategy
    machines: int

    @property
    def local_ranks(self) -> int:
        """Number of processes on each machine."""
        return self.strategy.ranks // self.machines


@dataclass(frozen=True)
class Precision:
    """The device that trains, the dtype of computing, and the dtype of packed 4-bit weights."""

    device: torch.device
    dtype: torch.dtype
    storage: torch.dtype


@dataclass(frozen=True)
class BaseModel:
    """What is known of the base without its weights."""

    architecture: PretrainedConfig
    trained_parameters: int
    encoder: Encoder


def attempt(name: str, function: Callable[[], tuple[Any, str]]) -> tuple[Check, Any]:
    """Run one check.

    Args:
        name: Name of the check in the table.
        function: Returns a value that later checks need, and a text for the table.

    Returns:
        The row of the table, and the value; None if the check failed or could not be made.
    """
    try:
        value, text = function()
    # A UserError is a mistake that the user can correct. Any other exception is a fault of this
    # code and ends the program.
    except UserError as error:
        return Check(name, False, str(error)), None
    except Unchecked as reason:
        return Check(name, None, str(reason)), None
    return Check(name, True, text), value


def run_checks(arguments: argparse.Namespace, overrides: list[str]) -> Iterator[Check]:
    """Run all checks in order; a check that needs the value of a failed one is left out."""
    check, config = attempt("recipe keys", lambda: read_config(arguments.config, overrides))
    yield check
    check, launch = attempt("accelerate keys", lambda: read_launch(arguments.accelerate_config))
    yield check
    if config is None or launch is None:
        return
    output_dir = arguments.output_dir or Path("runs") / arguments.config.stem
    yield attempt("processes", lambda: check_processes(launch))[0]
    check, precision = attempt("dtype, storage", lambda: check_dtypes(config, launch))
    yield check
    yield attempt("batch", lambda: check_batch(config, launch))[0]
    check, model = attempt("model", lambda: check_model(config))
    yield check
    prepared = None
    if model is not None:
        check, prepared = attempt("data", lambda: check_data(config, model))
        yield check
    yield attempt("disk", lambda: check_places(config, output_dir, model))[0]
    if prepared is not None and precision is not None:
        yield attempt("memory", lambda: forecast(config, launch, model, prepared))[0]
    yield attempt("rendezvous", lambda: check_rendezvous(launch, arguments))[0]
    if prepared is not None and precision is not None:
        yield attempt(
            "two steps", lambda: take_two_steps(config, precision, model, prepared.train)
        )[0]


def read_config(path: Path, overrides: list[str]) -> tuple[Config, str]:
    """Read the recipe's configuration."""
    config = load_config(path, overrides)
    return config, f"{config.model.base}, {config.model.quantization}"


def read_launch(path: Path) -> tuple[Launch, str]:
    """Read the accelerate config, and check its keys and numbers."""
    tree = read_accelerate_config(path)
    try:
        load_config_from_file(str(path))  # Accelerate checks the keys of the file here.
    # Accelerate has no error of its own for a wrong value.
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{path}: accelerate cannot read this file: {' '.join(str(error).split())[:300]}"
        ) from None
    machines = tree.get("num_machines") or 1
    ranks = tree.get("num_processes") or 1
    if ranks % machines:
        raise ConfigError(
            f"{path}: num_processes {ranks} is not a multiple of num_machines {machines}; it counts"
            " the processes of all machines"
        )
    # YAML reads a bare NO as false.
    if str(tree.get("distributed_type")).upper() in ("NO", "FALSE") and ranks > 1:
        raise ConfigError(
            f"{path}: num_processes is {ranks}, but distributed_type NO starts one process; use"
            " MULTI_GPU, DEEPSPEED or FSDP"
        )
    environ = launch_environ(tree)
    strategy = read_strategy(environ, ranks)
    text = f"{strategy.name}, {ranks} process(es) on {machines} machine(s)"
    return Launch(tree, environ, strategy, machines), text


def check_processes(launch: Launch) -> tuple[None, str]:
    """Check that the processes of this machine have a GPU each, and the package of the strategy."""
    local = launch.local_ranks
    gpus = torch.cuda.device_count()
    if launch.strategy.name.startswith("zero") and find_spec("deepspeed") is None:
        raise ProcessError(
            "deepspeed is not installed; pip install -e '.[deepspeed]', or use ddp or fsdp2"
        )
    if not gpus:
        raise Unchecked(f"{local} process(es) per machine; this machine has no GPU to count")
    if local > gpus:
        raise ProcessError(
            f"{local} processes per machine, but {gpus} GPU(s) here; set num_processes to the"
            " number of GPUs of all machines"
        )
    idle = "" if local == gpus else "; the others stay idle"
    return None, f"{local} of {gpus} GPU(s) used{idle}"


def check_dtypes(config: Config, launch: Launch) -> tuple[Precision, str]:
    """Check the dtype of computing against the hardware and the strategy."""
    # The two steps are taken here, so this is the device of this machine; `forecast` takes that of
    # the training.
    device = default_device()
    dtype = choose_dtype(config.model.dtype, device)
    check_hardware(config.model, device, dtype)
    check_strategy(launch.strategy, config, dtype, launch.environ)
    storage = choose_storage(launch.strategy, config.model.quantization, dtype)
    trained = "masters" if config.training.method == "full" else "adapter"
    text = f"compute {dtype}, {trained} and their gradients torch.float32"
    if config.model.quantization in ("nf4", "fp4"):
        text += f", 4-bit weights stored as {storage}"
    return Precision(device, dtype, storage), text


def check_batch(config: Config, launch: Launch) -> tuple[None, str]:
    """Check that the global batch can be divided into micro-batches."""
    return None, describe_batch(config.training, config.data.max_length, launch.strategy.ranks)


def check_model(config: Config) -> tuple[BaseModel, str]:
    """Check the base's configuration, what will train, and the tokenizer."""
    model = config.model
    architecture = read_model_config(model.base, model.revision, model.trust_remote_code)
    check_trainable(model, architecture)
    check_length(architecture, config.data.max_length)
    method = choose_method(config)
    preview = method.preview(architecture, config)
    if (folder := find_model(model.base)) is not None:
        method.check_base(folder, architecture)
    if config.lora.init_adapter is not None:
        check_initial(model, config.lora, architecture, preview)
    tokenizer = load_tokenizer(model.base, model.revision, model.trust_remote_code)
    encoder = make_encoder(
        tokenizer, config.data.prompt_style, config.data.completion, model.template_arguments
    )
    trained = preview.trained_parameters
    what = "trained" if config.training.method == "full" else "adapter"
    text = f"{preview.base_parameters:,} parameters, {what} {trained:,}"
    kept = preview.describe_kept(model, choose_dtype(model.dtype, default_device()))
    parts = [text, f"prompt style {encoder.style}", kept, preview.unmergeable]
    return BaseModel(architecture, trained, encoder), "; ".join(part for part in parts if part)


def check_data(config: Config, model: BaseModel) -> tuple[Prepared, str]:
    """Read, clean, separate and tokenize the first rows of every data entry."""
    tree = config.model_dump()
    for role in ("train", "eval", "test"):
        for entry in tree["data"][role]:
            entry["limit"] = min(entry["limit"] or ROWS, ROWS)
    with tempfile.TemporaryDirectory() as folder:
        # The tables of these few rows are of no later use, so they go with the folder.
        tree["data"]["cache_dir"] = folder
        prepared = prepare(Config.model_validate(tree), model.encoder)
        table = prepared.train
        if not len(table.lengths):
            raise PlanError(
                f"data.train: none of the first {ROWS} rows of each entry is left; give other data"
                " or a larger data.max_length"
            )
        supervised = int(table.supervised.sum()) / len(table.lengths)
        text = (
            f"of the first {ROWS} rows of each entry: {len(table.lengths):,} to train on,"
            f" {int(table.lengths.mean())} tokens each, {supervised:.1f} supervised;"
            f" {'; '.join(prepared.descriptions)}"
        )
        # The table is mapped from the temporary folder, so it is copied before that is removed.
        return replace(prepared, train=copy.deepcopy(prepared.train)), text


def check_places(config: Config, output_dir: Path, model: BaseModel | None) -> tuple[None, str]:
    """Check that the run folder and the cache can be written, and that the disk has space."""
    # A run of the same configuration may be there already, to be resumed.
    check_run(output_dir, config, resume=True)
    parameters = model.trained_parameters if model is not None else 0
    dtype = choose_dtype(config.model.dtype, default_device())
    size = size_of_checkpoints(config, parameters, dtype)
    check_disk(output_dir, size, f"{choose_method(config).folder} and checkpoints")
    for place, key in (
        (output_dir, "--output_dir"),
        (Path(config.data.cache_dir).expanduser(), "data.cache_dir"),
    ):
        # The folder may not exist yet, so its nearest existing parent is tried.
        existing = next(parent for parent in [place, *place.absolute().parents] if parent.exists())
        try:
            with tempfile.TemporaryFile(dir=existing):
                pass
        except OSError as error:
            raise ConfigError(
                f"{key} {place}: cannot write to {existing}: {error.strerror}; choose another"
                " folder"
            ) from None
    return None, f"{output_dir}: {size / 2**20:,.0f} MiB are needed and free"


def forecast(
    config: Config, launch: Launch, model: BaseModel, prepared: Prepared
) -> tuple[None, str]:
    """Forecast what the recipe will decide, and the memory that it needs on each GPU.

    On a machine without a GPU nothing can be decided, and the least memory is forecast instead.
    """
    gpu = torch.cuda.is_available()
    # This machine may be a login node, so the accelerate config says what the training runs on.
    device = torch.device("cpu" if launch.tree.get("use_cpu") else "cuda")
    dtype = choose_dtype(config.model.dtype, device)
    memory = available_memory(torch.device("cuda")) if gpu else sys.maxsize
    target = TargetHardware(
        device,
        dtype,
        choose_storage(launch.strategy, config.model.quantization, dtype),
        launch.strategy,
        memory,
        # The processes of a machine share its host memory.
        available_host(launch.local_ranks or 1) if gpu else sys.maxsize,
        expandable=segments_expand(),
    )
    training = config.training
    undecided = "auto" in (training.gradient_checkpointing, training.max_tokens_per_batch)
    # Without a bound the planner would recompute nothing, but the least memory is asked for.
    if not gpu and training.gradient_checkpointing == "auto":
        config = change(config, "training", gradient_checkpointing="full")
    try:
        plan = plan_step(
            config,
            model.architecture,
            target,
            # The head computes supervised positions only, so their largest number is needed.
            lambda tokens: most_supervised(prepared.train, tokens),
        )
    except UnknownForecast as error:
        if undecided:
            raise  # The recipe needs the forecast to decide, and would fail too.
        raise Unchecked(str(error)) from None
    check_unavoidable(plan.forecast, target)
    text = (
        f"{plan.forecast.peak / GIB:.2f} GiB predicted per process at {plan.tokens:,} tokens,"
        f" {plan.forecast.recomputed} of {plan.forecast.layers} layers recomputed"
    )
    if not gpu:
        return None, f"{text}; this machine has no GPU to compare with"
    if not target.holds(plan.forecast):
        raise ProcessError(
            f"{text}, but only {memory / GIB:.2f} GiB may be used here; lower"
            " training.max_tokens_per_batch, or set it and training.gradient_checkpointing to auto"
        )
    return None, f"{text}, of {memory / GIB:.2f} GiB that may be used here"


def check_rendezvous(launch: Launch, arguments: argparse.Namespace) -> tuple[None, str]:
    """Check the address at which the machines meet; machine 0 tries to open its port."""
    if launch.machines == 1:
        return None, "one machine"
    tree = launch.tree
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
            # The port is closed again at once; opening it shows that nothing else uses it.
            with socket.create_server((address, int(port))):
                return None, f"{host}:{port} is free on this machine"
    except OSError as error:
        action = "use" if rank == 0 else "resolve"
        raise ProcessError(
            f"main_process_ip {host}, port {port}: cannot {action} it here:"
            f" {error.strerror or error}; it must be machine 0's"
        ) from None
    text = (
        f"{host} is {address}; to try it, run --rendezvous {host}:{port} --num_machines"
        f" {launch.machines} on all machines at once"
    )
    return None, text


def take_two_steps(
    config: Config, precision: Precision, model: BaseModel, table: TokenTable
) -> tuple[None, str]:
    """Take two optimizer steps on rows of the data, with two narrow layers of the architecture.

    The layers have random weights, and are quantized as the recipe says.
    """
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        try:
            small = shrink(model.architecture)
            # The model goes through a folder, so it is loaded and quantized as in a training.
            AutoModelForCausalLM.from_config(small, dtype=torch.float32).save_pretrained(folder)
        # The code of an architecture may refuse the sizes of a narrow model.
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise Unchecked(
                "two narrow layers of this architecture cannot be made:"
                f" {' '.join(str(error).split())[:120]}"
            ) from None
        changed = change(config, "model", base=folder, revision=None)
        # There is no forecast for the small model, so auto has nothing to decide by.
        if config.training.gradient_checkpointing == "auto":
            changed = change(changed, "training", gradient_checkpointing="full")
        rows = np.arange(min(8, len(table.lengths)))
        tokens = int(table.lengths[rows].sum())
        changed = change(changed, "training", max_tokens_per_batch=tokens)
        loaded = load(changed, precision.device, precision.storage)
    built = build(loaded, changed)
    agreement = prove(built, changed)
    session = Session(built, changed, Strategy("one"), precision.device, precision.dtype)
    # The ids of the real tokenizer go beyond the small vocabulary.
    table = replace(table, ids=table.ids % built.vocabulary)
    targets = int(table.supervised[rows].sum())
    ends = np.array([0, len(rows)])
    # The plan has one step of one micro-batch, which is taken twice.
    plan = Plan(rows=rows, bins=ends, steps=np.array([0, 1]), epochs=np.ones(1))
    figures = []
    for _ in range(2):
        # The figures alternate: the loss per supervised token in nats, then the gradient's norm.
        gradients = session.accumulate(table, plan, 0, targets)
        total, _ = session.sum_over_ranks(gradients.losses)
        figures += [total / targets, session.trainer.step(config.training.lr)]
    if not np.isfinite(figures).all():
        raise ProcessError(
            f"two narrow layers of this architecture gave losses {figures[::2]} and gradient norms"
            f" {figures[1::2]}, which must be finite; report this with the recipe"
        )
    text = (
        f"losses {figures[0]:.3f}, {figures[2]:.3f}; attention {loaded.backend} isolates rows"
        f" (error {agreement.logits:.0e}); {built.recomputed} of 2 layers recomputed"
    )
    return None, text


def shrink(config: PretrainedConfig) -> PretrainedConfig:
    """Return the same architecture with two narrow layers and a small vocabulary."""
    small = type(config)(**config.to_dict())
    text = small.get_text_config()
    changes = {
        "num_hidden_layers": 2,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,  # 4 heads of width 64 fill the hidden size.
        "vocab_size": 512,
        # Special tokens must lie in the small vocabulary too.
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
    # The factors for long contexts fit only the original width, so the default rotation is used.
    rope = getattr(text, "rope_parameters", None)
    if isinstance(rope, dict) and "rope_type" in rope:
        kept = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
        text.rope_parameters = kept | {"rope_type": "default"}
    small.quantization_config = None  # The attribute may be missing, and must exist to be deleted.
    del small.quantization_config
    return small


if __name__ == "__main__":
    run_command(main)
