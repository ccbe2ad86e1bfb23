"""The first stage of a training: find every mistake of the user before any weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PretrainedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from medqlora.batches.budgets import list_budgets
from medqlora.core.command import quiet_libraries
from medqlora.core.config import Config
from medqlora.core.environment import MemoryMeter, was_restarted
from medqlora.core.files import check_disk, hash_json
from medqlora.core.run_folder import check_run
from medqlora.core.run_lock import hold_run
from medqlora.core.run_origin import read_origin
from medqlora.model.adapter_preview import Preview
from medqlora.model.attention.backends import Choice, choose_backend
from medqlora.model.base import (
    check_hardware,
    check_length,
    find_model,
    load_tokenizer,
    read_model_config,
)
from medqlora.model.base_weights import check_trainable
from medqlora.model.hardware import choose_dtype, default_device, explain_idle_gpu
from medqlora.model.initial_adapter import check_initial
from medqlora.prompts.chat_template import Encoder, make_encoder
from medqlora.training.methods import Method, choose_method
from medqlora.training.processes import (
    agree_on_errors,
    check_versions,
    gather,
    start_processes,
)
from medqlora.training.strategies.launch import Strategy, check_strategy, read_strategy

# A restarted job waits this many seconds for the lock of its run: a process of the start before may
# still be ending, and a network file system may give its lock back late.
RESTART_PATIENCE = 60.0


@dataclass(frozen=True)
class Setup:
    """The processes of a training and its checked configuration.

    Args:
        accept_changes: Whether a resumed run may have other data, base, tokenizer or prompts.
        origin: What the resumed run began with (see read_origin); empty for a new one.
        lock: Holds the lock of the run folder on rank 0 until it is closed.
        warnings: What the user should know of the machine.
        dtype: The dtype of computing.
        encoder: Tokenizer and prompt style.
        architecture: Configuration of the base model, without weights.
        attention: The chosen attention backend and the reason for it.
        method: What training.method decides.
        preview: Sizes of the base and of what trains, and what becomes of them.
        resumed_packed_tokens: Tokens of the bins that the resumed run was packed into, where a
            forecast decided on them; None otherwise.
        memory_before: Bytes in use when the meter was made.
        local_ranks: Number of processes of this run on this machine.
    """

    config: Config
    output_dir: Path
    resume: bool
    accept_changes: bool
    origin: dict[str, Any]
    lock: ExitStack
    warnings: list[str]
    accelerator: Accelerator
    strategy: Strategy
    dtype: torch.dtype
    encoder: Encoder
    architecture: PretrainedConfig
    attention: Choice
    method: Method
    preview: Preview
    resumed_packed_tokens: int | None
    meter: MemoryMeter
    memory_before: int
    local_ranks: int

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.accelerator.device

    @property
    def is_local_main(self) -> bool:
        """Whether this is the first process of its machine."""
        return self.accelerator.is_local_main_process

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        return self.accelerator.process_index


def start(
    config: Config,
    output_dir: Path,
    resume: bool,
    environ: MutableMapping[str, str],
    accept_changes: bool = False,
) -> Setup:
    """Join the processes that the launcher started, and check configuration and hardware.

    Args:
        accept_changes: Whether a resumed run may have other data, base, tokenizer or prompts.
        environ: The environment variables; some are set for torch and the libraries.

    Raises:
        AgreedError: A rank met an error of the user; every rank raises it.
        ProcessError: The processes do not find each other.
    """
    # Rows are tokenized in threads of this package; the tokenizer's own threads would compete.
    environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    quiet_libraries()
    device = default_device()
    training = config.training
    log_with = None if training.log_with == "none" else training.log_with
    accelerator = start_processes(
        environ, device.type == "cuda", log_with=log_with, project_dir=output_dir
    )
    if training.deterministic:
        # Without this variable, torch refuses matrix products on a GPU in deterministic mode.
        environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # torch fills new memory only to reveal reads of uninitialized values, which takes time.
        torch.utils.deterministic.fill_uninitialized_memory = False
    # transformers would divide the base while it loads it, or load it on one rank only. This recipe
    # needs the whole base on each rank until the base has been scored.
    unset_hf_deepspeed_config()
    environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    # Only the machine whose process died counts a restart, so the ranks must agree on it.
    restarted = any(gather(was_restarted(environ)))
    resume = resume or restarted
    model = config.model
    # No collective operation may stand in this block, because any rank may fail at any line of it.
    with agree_on_errors():
        dtype = choose_dtype(model.dtype, device)
        check_hardware(model, device, dtype)
        strategy = read_strategy(environ, accelerator.num_processes)
        check_strategy(strategy, config, dtype, environ)
        architecture = read_model_config(model.base, model.revision, model.trust_remote_code)
        check_trainable(model, architecture)
        check_length(architecture, config.data.max_length)
        attention = choose_backend(model.attention, device, dtype, architecture)
        # This call only refuses a global batch that cannot be divided.
        list_budgets(training, config.data.max_length, strategy.ranks)
        method = choose_method(config)
        preview = method.preview(architecture, config)
        folder = find_model(model.base)
        if folder is not None:  # A base on the hub is checked when it has been downloaded.
            method.check_base(folder, architecture)
        # A resumed run has the weights in its checkpoints, and its folder may be gone.
        if config.lora.init_adapter is not None and not resume:
            check_initial(model, config.lora, architecture, preview)
        tokenizer = load_tokenizer(model.base, model.revision, model.trust_remote_code)
        encoder = make_encoder(
            tokenizer, config.data.prompt_style, config.data.completion, model.template_arguments
        )
        origin = read_origin(output_dir, accept_changes) if resume else {}
    # check_versions is collective. In a block of its own, no rank can fail before it.
    with agree_on_errors():
        check_versions(hash_json(config.model_dump(mode="json")))
    lock = ExitStack()
    idle = explain_idle_gpu()
    # An empty list of devices hides the GPUs on purpose.
    hidden = environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    warnings = [idle] if idle and not hidden else []
    with agree_on_errors():
        if accelerator.is_main_process:
            # Nothing is written yet: plan_run makes the run folder after the data.
            check_run(output_dir, config, resume)
            check_disk(
                output_dir,
                size_of_checkpoints(config, preview.trained_parameters, dtype),
                f"{method.folder} and checkpoints",
            )
            # From here on no other training can write to the folder.
            warning = lock.enter_context(hold_run(output_dir, RESTART_PATIENCE * restarted))
            warnings += [warning] if warning else []
    meter = MemoryMeter(cuda=device.type == "cuda")
    return Setup(
        config=config,
        output_dir=output_dir,
        resume=resume,
        accept_changes=accept_changes,
        origin=origin,
        lock=lock,
        warnings=warnings,
        accelerator=accelerator,
        strategy=strategy,
        dtype=dtype,
        encoder=encoder,
        architecture=architecture,
        attention=attention,
        method=method,
        preview=preview,
        resumed_packed_tokens=read_packed_tokens(origin, config),
        meter=meter,
        memory_before=meter.now(),
        local_ranks=int(environ.get("LOCAL_WORLD_SIZE") or 1),
    )


def size_of_checkpoints(config: Config, parameters: int, dtype: torch.dtype) -> int:
    """Return the bytes of disk that a run needs, from above.

    A checkpoint holds 4 bytes of each trained parameter for its weight, and 8 for AdamW's two
    float32 moments. Those that are kept and the one that is being written are there at a time.
    Beside each of them, and in the run folder, there may be another best adapter, in 4 bytes, or
    another best model, in the compute dtype.

    Args:
        config: The configuration.
        parameters: Number of trained parameters.
        dtype: The dtype of computing.
    """
    checkpoints = config.training.keep_checkpoints + 1
    best = dtype.itemsize if config.training.method == "full" else 4
    return parameters * (12 * checkpoints + best * (checkpoints + 1))


def read_packed_tokens(origin: Mapping[str, Any], config: Config) -> int | None:
    """Return the number of tokens of the bins that a resumed run was packed into.

    It is None where the configuration gives the number itself, or where the run has not begun.

    Args:
        origin: What the run began with (see read_origin).
    """
    if config.training.max_tokens_per_batch != "auto":
        return None
    return origin.get("packed_tokens")
