"""The files of a run: environment.json, checkpoints, and the best adapter or model with its
metadata.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from medqlora.core.config import Data
from medqlora.core.environment import describe_environment
from medqlora.core.errors import RunError
from medqlora.core.files import (
    hash_file,
    hash_json,
    write_atomic,
    write_checked,
    write_json,
    write_json_lines,
)
from medqlora.core.run_folder import LOG, rewind_log
from medqlora.core.run_origin import ORIGIN
from medqlora.model.agreement import Agreement
from medqlora.model.base import ModelError
from medqlora.model.hardware import name_dtype
from medqlora.model.identity import architecture_hash, resolve_base, sample_weights
from medqlora.model.initial_adapter import describe_initial, load_initial
from medqlora.model.overrides import list_overrides
from medqlora.prompts.fingerprint import show_probes
from medqlora.training.checkpoints import Checkpoint, save_checkpoint
from medqlora.training.planning import Planned, find_initial
from medqlora.training.processes import agree_on_errors
from medqlora.training.session import Built, Loaded, Session
from medqlora.training.setup import Setup
from medqlora.training.strategies.gradient_check import GradientCheck
from medqlora.training.strategies.launch import choose_storage
from medqlora.training.strategies.wrapping import gather_weights, load_states

BASE_PREDICTIONS = Path("predictions") / "base.jsonl"


def make_metadata(setup: Setup, planned: Planned, base: torch.nn.Module) -> dict[str, Any]:
    """Return the content of medqlora.json: the prompts of an adapter or a trained model, and the
    base it belongs to or began from.
    """
    model = setup.config.model
    initial = find_initial(setup)
    folder = resolve_base(model.base, model.revision)
    # The hub's cache keeps a model in snapshots/COMMIT, so the folder's name is the exact revision
    # even where the configuration names a branch or nothing.
    from_hub = folder.parent.name == "snapshots"
    return {
        "prompt_style": setup.encoder.style,
        "completion": setup.encoder.completion,
        "template_arguments": model.template_arguments,
        "lowercase": setup.config.data.lowercase,
        "max_length": setup.config.data.max_length,
        "prompt_sha256": planned.prepared.hashes["prompt_sha256"],
        "base": model.base,
        "revision": folder.name if from_hub else model.revision,
        "architecture_sha256": architecture_hash(base.config),
        "base_sha256": sample_weights(folder),
        "quantization": model.quantization,
        "double_quantization": model.double_quantization,
        "dtype": name_dtype(setup.dtype),
        **({} if initial is None else {"init_adapter": initial}),
        **describe_retrieval(setup.config.data, planned.prepared.hashes),
    }


def describe_retrieval(data: Data, hashes: Mapping[str, str]) -> dict[str, Any]:
    """Return the key of medqlora.json that says what questions were shown; empty for nothing."""
    if data.retrieval is None:
        return {}
    return {
        "retrieval": {
            "path": data.retrieval,
            "num_passages": data.num_passages,
            "library_sha256": hashes["library_sha256"],
        }
    }


def restore_weights(setup: Setup, planned: Planned, built: Built) -> None:
    """Load the adapter's weights of the checkpoint, or those of lora.init_adapter.

    They are loaded before a strategy divides them. The masters of a whole model are set by
    `restore`, and until then the model is the base.

    Raises:
        ModelError: The weights do not fit, or lora.init_adapter has changed since the run began.
    """
    if planned.checkpoint is not None:
        built.method.restore(built.model, planned.checkpoint.weights)
        return
    lora = setup.config.lora
    if lora.init_adapter is None:
        return
    if describe_initial(lora) != find_initial(setup):
        raise ModelError(
            f"--resume: lora.init_adapter {lora.init_adapter} holds other weights than when the run"
            " began; start a new run"
        )
    load_initial(built.model, lora)


def describe_run(
    setup: Setup,
    planned: Planned,
    loaded: Loaded,
    built: Built,
    metadata: dict[str, Any],
    agreement: Agreement,
    check: GradientCheck | None,
) -> dict[str, Any]:
    """Return the content of environment.json.

    Args:
        metadata: What `make_metadata` returns.
        agreement: What `session.prove` returns.
        check: Result of the gradient check; None where there was none.
    """
    quantization = setup.config.model.quantization
    environment = {
        **describe_environment(),
        "seed": setup.config.training.seed,
        **planned.hashes,
        "resumptions": planned.origin.get("resumptions", []),
        "plan_sha256": planned.plan_sha256,
        "order": planned.order,
        "step_plan": planned.decision.as_dict(),
        "base": metadata,
        "prompt_examples": show_probes(setup.encoder),
        "processes": setup.strategy.ranks,
        "strategy": setup.strategy.name,
        "attention": built.backend,
        "attention_reason": setup.attention.reason,
        # These are the overrides that took effect on this model, not all that exist.
        "overrides": list_overrides(built.loss_model),
        "recomputed_layers": built.recomputed,
        "compiled": loaded.compiled,
        "isolation_error": agreement.logits,
        "input_gradient_error": agreement.gradients,
        "trainable_parameters": setup.preview.trained_parameters,
        "mixture": planned.prepared.mixture,
        "data": planned.prepared.descriptions,
        "storage": name_dtype(choose_storage(setup.strategy, quantization, setup.dtype)),
    }
    if check is not None:
        environment["gradient_check"] = {
            "relative_error": check.relative_error,
            "seconds": round(check.seconds, 3),
        }
    return environment


def write_start(setup: Setup, planned: Planned, environment: dict[str, Any]) -> None:
    """Write environment.json and removed.jsonl; collective.

    A resumed run also puts back the log and the best adapter or model as they were at its
    checkpoint.
    """
    with agree_on_errors():
        # A return inside the block still takes part in its agreement, which every rank must.
        if setup.rank != 0:
            return
        folder = setup.output_dir
        write_json(folder / "environment.json", environment)
        removals = [asdict(removal) for removal in planned.prepared.removals]
        write_json_lines(folder / "removed.jsonl", removals)
        if setup.resume:
            restore_files(setup, planned.checkpoint)


def restore_files(setup: Setup, checkpoint: Checkpoint | None) -> None:
    """Put back the log and the best adapter or model as they were at a checkpoint.

    Read from a checkpoint they are whole, and of the same step as its weights.

    Args:
        setup: The setup of the run.
        checkpoint: The checkpoint; None for a run that begins anew, whose whole log is dropped.
    """
    log = setup.output_dir / LOG
    # Checkpoints of older versions hold no copies.
    if checkpoint is None or not (checkpoint.path / LOG).is_file():
        # An evaluation before the first step has a row of step 0, which is made again.
        rewind_log(log, checkpoint.state["step"] if checkpoint is not None else -1)
    else:
        write_atomic(log, (checkpoint.path / LOG).read_bytes())
    if checkpoint is not None:
        try:
            setup.method.put_back(checkpoint.path, setup.output_dir / setup.method.folder)
        except OSError as error:
            raise RunError(
                f"cannot put back {setup.output_dir / setup.method.folder}:"
                f" {error.strerror or error}; free space, or move away what is there"
            ) from None


def make_folder(path: Path) -> None:
    """Make a folder of the run.

    Raises:
        RunError: The disk refuses, or a file is in its place.
    """
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise RunError(
            f"cannot make folder {path}: {error.strerror}; free space, or move away what is there"
        ) from None


def has_base_predictions(setup: Setup, planned: Planned) -> bool:
    """Say whether an earlier start has answered the same questions with the same base; on rank 0.

    Otherwise they are answered again: where the file is missing, was changed, or was written by a
    version that did not record its hash.
    """
    recorded = setup.origin.get("base_predictions") or {}
    path = setup.output_dir / BASE_PREDICTIONS
    return (
        path.is_file()
        and recorded.get("inputs_sha256") == hash_json(planned.hashes)
        and recorded.get("sha256") == hash_file(path)
    )


def write_predictions(setup: Setup, planned: Planned, name: str, rows: list[dict]) -> None:
    """Write the predictions of the "base" or the "tuned" model; on rank 0.

    The hash of those of the base goes to origin.json, because a resumed run uses them again.
    """
    path = setup.output_dir / "predictions" / f"{name}.jsonl"
    make_folder(path.parent)
    write_json_lines(path, rows)
    if name == "base":
        digests = {"inputs_sha256": hash_json(planned.hashes), "sha256": hash_file(path)}
        write_checked(setup.output_dir / ORIGIN, planned.origin | {"base_predictions": digests})


def write_checkpoint(session: Session, output_dir: Path, state: dict[str, Any]) -> Path:
    """Write a checkpoint on rank 0; collective.

    Weights and optimizer states are whole tensors by name, so any strategy and any number of
    processes can continue from them.

    Returns:
        The folder of the checkpoint.

    Raises:
        AgreedError: The weights cannot be gathered, or the disk refused.
    """
    writes = session.rank == 0
    with agree_on_errors():
        # gather_weights is collective. It checks only after all tensors have been gathered, so no
        # rank fails while another waits.
        weights = gather_weights(session.trainer, session.built.shapes, keep=writes)
    # Rank 0 alone writes the states, but reading them is collective.
    states = session.trainer.read_states(keep=writes)
    folder = output_dir / "checkpoints"
    method = session.built.method
    with agree_on_errors():
        if writes:
            tensors = method.list_tensors(session.built.model, weights)
            save_checkpoint(
                folder,
                state["step"],
                move_to_cpu(tensors),
                # Some strategies return the live tensors of their optimizer.
                {name: move_to_cpu(tensors) for name, tensors in states.items()},
                # Which float16 steps overflow and are skipped depends on the loss scale.
                state | {"loss_scale": session.trainer.read_scale()},
                session.config.training.keep_checkpoints,
                method.weights_file,
                method.list_best(output_dir / method.folder),
                method.keep_file,
                log=output_dir / LOG,
            )
    return folder / f"step-{state['step']}"


def move_to_cpu(state: dict[str, Any]) -> dict[str, Any]:
    """Return a dictionary with its tensors on the CPU."""
    return {key: value.cpu() if torch.is_tensor(value) else value for key, value in state.items()}


def write_best(session: Session, output_dir: Path, metadata: dict[str, Any]) -> None:
    """Write the present adapter or model with its metadata on rank 0; collective.

    Raises:
        AgreedError: The weights cannot be gathered, or they cannot be written.
    """
    writes = session.rank == 0
    method = session.built.method
    with agree_on_errors():
        weights = gather_weights(session.trainer, session.built.shapes, keep=writes)
    with agree_on_errors():
        if writes:
            folder = output_dir / method.folder
            method.save(folder, session.built.model, session.config, metadata, weights)


def load_best(session: Session, output_dir: Path) -> None:
    """Let the model be that of the best adapter or model; collective.

    Raises:
        AgreedError: What was written is damaged.
    """
    method = session.built.method
    with agree_on_errors():
        values = method.load(output_dir / method.folder, session.built.model)
    session.trainer.write_weights(values)


def restore(session: Session, planned: Planned) -> None:
    """Load masters, optimizer states and loss scale of the checkpoint that the run continues from.

    A new run is left as it is. An adapter's weights were loaded before a strategy divided them.

    Raises:
        AgreedError: The weights or states belong to another adapter, base or optimizer.
    """
    if planned.checkpoint is None:
        return
    values = session.built.method.name_restored(planned.checkpoint.weights)
    if values:
        with agree_on_errors():
            check_restored(values, session.built.shapes)
        session.trainer.write_weights(values)
    with agree_on_errors():
        # load_states is collective. All ranks have read the same checkpoint, so its check fails on
        # all of them or on none.
        load_states(session.trainer, planned.checkpoint.optimizer)
        if planned.checkpoint.state.get("loss_scale"):
            session.trainer.write_scale(planned.checkpoint.state["loss_scale"])


def check_restored(values: dict[str, torch.Tensor], shapes: dict[str, torch.Size]) -> None:
    """Refuse a checkpoint of another model.

    Raises:
        ModelError: A weight is missing, surplus or of another shape.
    """
    for name in sorted(values.keys() | shapes.keys()):
        if name not in values or name not in shapes or values[name].shape != shapes[name]:
            raise ModelError(
                f"checkpoint does not fit this base: weight {name} is missing, surplus or of"
                " another shape; start a new run without --resume"
            )
