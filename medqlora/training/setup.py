"""The first stage: everything that can be wrong is said before a weight loads."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from transformers import PretrainedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from medqlora.batches.plan import list_budgets
from medqlora.core.config import Config
from medqlora.core.environment import MemoryMeter
from medqlora.core.files import check_disk, hash_json
from medqlora.core.run_folder import check_run
from medqlora.model.attention.backends import Choice, choose_backend
from medqlora.model.base import check_hardware, check_length, load_tokenizer, read_model_config
from medqlora.model.hardware import choose_dtype, default_device
from medqlora.model.random_base import count_parameters
from medqlora.prompts.chat_template import Encoder, make_encoder
from medqlora.training.processes import (
    agree_on_errors,
    check_versions,
    gather,
    start_processes,
)
from medqlora.training.strategies.launch import Strategy, check_strategy, read_strategy


@dataclass(frozen=True)
class Setup:
    """The processes and what was asked of them, checked.

    Args:
        begun_with: tokens of the bins of a resumed run that a forecast decided on.
        base_parameters, adapter_parameters: how many of each.
        memory_before: bytes in use when the meter began.
    """

    config: Config
    output_dir: Path
    resume: bool
    accelerator: Accelerator
    strategy: Strategy
    dtype: torch.dtype
    encoder: Encoder
    architecture: PretrainedConfig
    attention: Choice
    base_parameters: int
    adapter_parameters: int
    begun_with: int | None
    meter: MemoryMeter
    memory_before: int
    local_ranks: int

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def is_local_main(self) -> bool:
        return self.accelerator.is_local_main_process

    @property
    def rank(self) -> int:
        return self.accelerator.process_index


def start(
    config: Config, output_dir: Path, resume: bool, environ: MutableMapping[str, str]
) -> Setup:
    """Join the processes that the launcher started and check what they were told.

    Raises:
        AgreedError: on every rank, with what is wrong on any.
        ProcessError: the processes do not find each other.
    """
    quiet_libraries(environ)
    kind = default_device()
    training = config.training
    log_with = None if training.log_with == "none" else training.log_with
    accelerator = start_processes(
        environ, kind.type == "cuda", log_with=log_with, project_dir=output_dir
    )
    if training.deterministic:
        environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # Filling only helps to find mistakes, and takes time.
        torch.utils.deterministic.fill_uninitialized_memory = False
    # transformers would divide the base while it loads, or load it on one rank only. Here it is
    # whole until it has been scored.
    unset_hf_deepspeed_config()
    environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    # Of several machines, only the one whose process died counts a restart.
    resume = any(gather(resume or was_restarted(environ)))
    model = config.model
    with agree_on_errors():
        dtype = choose_dtype(model.dtype, kind)
        check_hardware(model, kind, dtype)
        strategy = read_strategy(environ, accelerator.num_processes)
        check_strategy(strategy, config, dtype, environ)
        architecture = read_model_config(model.base, model.revision, model.trust_remote_code)
        check_length(architecture, config.data.max_length)
        attention = choose_backend(model.attention, kind, dtype, architecture)
        list_budgets(training, config.data.max_length, strategy.ranks)
        base_parameters, adapter_parameters = count_parameters(architecture, config.lora)
        tokenizer = load_tokenizer(model.base, model.revision, model.trust_remote_code)
        encoder = make_encoder(tokenizer, config.data.prompt_style, config.data.completion)
        begun_with = read_begun(output_dir, config) if resume else None
    with agree_on_errors():
        check_versions(hash_json(config.model_dump(mode="json")))
    with agree_on_errors():
        if accelerator.is_main_process:
            check_run(output_dir, config, resume)
            check_disk(
                output_dir,
                size_of_checkpoints(adapter_parameters, training.keep_checkpoints),
                "adapter and checkpoints",
            )
    meter = MemoryMeter(cuda=kind.type == "cuda")
    return Setup(
        config=config,
        output_dir=output_dir,
        resume=resume,
        accelerator=accelerator,
        strategy=strategy,
        dtype=dtype,
        encoder=encoder,
        architecture=architecture,
        attention=attention,
        base_parameters=base_parameters,
        adapter_parameters=adapter_parameters,
        begun_with=begun_with,
        meter=meter,
        memory_before=meter.now(),
        local_ranks=int(environ.get("LOCAL_WORLD_SIZE") or 1),
    )


def quiet_libraries(environ: MutableMapping[str, str]) -> None:
    """Stop libraries from warning each other, and from drawing progress bars of their own."""
    environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # Rows are tokenized in our threads.
    warnings.simplefilter("ignore", FutureWarning)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def was_restarted(environ: Mapping[str, str]) -> bool:
    """Did torch elastic or Slurm start this job again? Then it resumes without being told."""
    counters = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(int(environ.get(name) or 0) > 0 for name in counters)


def size_of_checkpoints(adapter_parameters: int, kept: int) -> int:
    """Bytes of the kept checkpoints, the one being written and the adapter: 4 for each weight and 8
    for AdamW's two moments.
    """
    return 12 * adapter_parameters * (kept + 2)


def read_begun(output_dir: Path, config: Config) -> int | None:
    """Tokens of the bins that the run in this folder was packed in, where the configuration leaves
    them to a forecast.
    """
    saved = output_dir / "environment.json"
    if config.training.max_tokens_per_batch != "auto" or not saved.is_file():
        return None
    decided = json.loads(saved.read_text(encoding="utf-8")).get("step_plan", {})
    # Runs of older versions were packed in their processes' micro-batches.
    return decided.get("packed_tokens", decided.get("max_tokens_per_batch"))
