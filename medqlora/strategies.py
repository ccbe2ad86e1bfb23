"""How one adapter is trained by many processes: replicated, DeepSpeed ZeRO-1/2/3, FSDP2.

Replicated, Zero and FullyShard do the same with the same methods, so that the training loop does
not know which one it has: call it with a batch for the loss, `backward`, `step`; read and write
whole tensors by name. What is trained, accumulated and reduced is float32 under each; the frozen
base keeps its own storage. Every method is collective: all ranks call it.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from medqlora.config import Config, UserError
from medqlora.losses import AnswerLoss, unwrap
from medqlora.models import find_layers, keep_gathered_weights
from medqlora.optimizers import restore_pages

# relative error of a strategy's gradient, by compute dtype
GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1}
# What a DeepSpeed file may not say, because the recipe does.
RECIPE_OWNS = (
    "fp16",
    "bf16",
    "optimizer",
    "scheduler",
    "gradient_clipping",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "data_types",
)
PRECISION = {"fp16": torch.float16, "bf16": torch.bfloat16}


class StrategyError(UserError):
    """A launch that cannot train this recipe."""


@dataclass(frozen=True)
class Strategy:
    """name: one, ddp, zero1, zero2, zero3 or fsdp2; ranks: processes; settings: of the engine, from
    the accelerate file.
    """

    name: str
    ranks: int = 1
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def sharded(self) -> bool:
        """Is the frozen base divided over the ranks?"""
        return self.name in ("zero3", "fsdp2")


def is_true(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "").lower() in ("true", "1", "yes")


def read_strategy(environ: Mapping[str, str], ranks: int) -> Strategy:
    """What `accelerate launch` was told, from the variables by which it tells its processes.

    Raises: StrategyError: an engine that this recipe does not train with, or a DeepSpeed file that
        says what the recipe owns.
    """
    if is_true(environ, "ACCELERATE_USE_MEGATRON_LM") or is_true(
        environ, "ACCELERATE_USE_PARALLELISM_CONFIG"
    ):
        raise StrategyError(
            "accelerate config: tensor, context and pipeline parallelism are not supported; use"
            " ddp, zero or fsdp2"
        )
    if is_true(environ, "ACCELERATE_USE_DEEPSPEED"):
        return read_zero(environ, ranks)
    if is_true(environ, "ACCELERATE_USE_FSDP"):
        if environ.get("FSDP_VERSION", "1") != "2":
            raise StrategyError(
                "accelerate config: fsdp_version is 1; set fsdp_version: 2 (FSDP1 cannot hold"
                " adapter and base in two dtypes)"
            )
        settings = {
            "offload": is_true(environ, "FSDP_OFFLOAD_PARAMS"),
            "reshard_after_forward": (
                environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false"
            ),
        }
        return Strategy("fsdp2", ranks, settings)
    return Strategy("ddp" if ranks > 1 else "one", ranks)


def launch_environ(accelerate_config: dict[str, Any]) -> dict[str, str]:
    """The variables that `accelerate launch` would set for a configuration file, as far as
    read_strategy looks at them.
    """
    kind = str(accelerate_config.get("distributed_type", "NO")).upper()
    environ = {
        "ACCELERATE_MIXED_PRECISION": (
            str(accelerate_config.get("mixed_precision") or "no").lower().replace("false", "no")
        )
    }
    if kind == "DEEPSPEED":
        given = accelerate_config.get("deepspeed_config") or {}
        names = {
            "zero_stage": "ZERO_STAGE",
            "deepspeed_config_file": "CONFIG_FILE",
            "offload_optimizer_device": "OFFLOAD_OPTIMIZER_DEVICE",
            "offload_param_device": "OFFLOAD_PARAM_DEVICE",
        }
        environ |= {"ACCELERATE_USE_DEEPSPEED": "true"}
        environ |= {
            f"ACCELERATE_DEEPSPEED_{name}": str(given[key])
            for key, name in names.items()
            if given.get(key) is not None
        }
    elif kind == "FSDP":
        given = accelerate_config.get("fsdp_config") or {}
        environ |= {"ACCELERATE_USE_FSDP": "true"}
        environ |= {key.upper(): str(value).lower() for key, value in given.items()}
    elif kind == "MEGATRON_LM":
        environ |= {"ACCELERATE_USE_MEGATRON_LM": "true"}
    if accelerate_config.get("parallelism_config"):
        environ |= {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}
    return environ


def read_zero(environ: Mapping[str, str], ranks: int) -> Strategy:
    file = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if file:
        try:
            given = json.loads(Path(file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StrategyError(f"deepspeed_config_file {file} cannot be read: {error}") from None
        for key, value in given.items():
            unset = value == "auto" or (
                isinstance(value, dict) and value.get("enabled") in (False, "auto")
            )
            if key in RECIPE_OWNS and not unset:
                raise StrategyError(
                    f"deepspeed_config_file {file}: {key} is the recipe's to say; remove it (see"
                    " training.* and model.dtype)"
                )
            if key not in (
                *RECIPE_OWNS,
                "zero_optimization",
                "steps_per_print",
                "wall_clock_breakdown",
            ):
                raise StrategyError(
                    f"deepspeed_config_file {file}: {key} is not used; zero_optimization is all"
                    " that is read, remove the rest"
                )
        zero = dict(given.get("zero_optimization", {}))
    else:
        zero = {"stage": int(environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))}
        for what in ("optimizer", "param"):
            place = environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what.upper()}_DEVICE", "none")
            if place != "none":
                zero[f"offload_{what}"] = {"device": place}
    if "nvme" in json.dumps(zero):
        raise StrategyError("accelerate config: offloading to nvme is not supported; use cpu")
    if zero.get("stage") not in (1, 2, 3):
        raise StrategyError(
            f"accelerate config: zero_stage {zero.get('stage')}; expected 1, 2 or 3"
        )
    return Strategy(f"zero{zero['stage']}", ranks, zero)


def check_strategy(
    strategy: Strategy, config: Config, dtype: torch.dtype, environ: Mapping[str, str]
) -> None:
    """Refuse what cannot train, before a weight loads.

    Raises:
        StrategyError: with the reason and what to use.
    """
    asked = environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", "") and PRECISION.get(asked) is not dtype:
        raise StrategyError(
            f"accelerate config: mixed_precision {asked}, but the recipe computes in"
            f" {str(dtype).removeprefix('torch.')} (model.dtype); set mixed_precision: 'no', the"
            " recipe owns the dtype"
        )
    if strategy.name in ("one", "ddp"):
        return
    if dtype is torch.float16:
        raise StrategyError(
            f"{strategy.name} with float16: loss scaling is done for ddp only; use ddp, or"
            " model.dtype bfloat16 or float32"
        )
    if config.training.optimizer != "adamw":
        raise StrategyError(
            f"{strategy.name} with training.optimizer {config.training.optimizer}: 8-bit states of"
            " a shard cannot be gathered for a checkpoint; use adamw, whose states this strategy"
            " divides already"
        )
    if strategy.sharded and config.model.quantization == "int8":
        raise StrategyError(
            f"{strategy.name} with model.quantization int8: its row scales do not travel with the"
            " shards; use nf4, or ddp"
        )
    if strategy.name == "zero3" and config.lora.variant == "dora":
        raise StrategyError(
            "zero3 with lora.variant dora: it reads the base weight outside the layer that holds"
            " it; use fsdp2, zero2 or ddp"
        )
    if strategy.name == "fsdp2" and strategy.ranks == 1:
        raise StrategyError(
            "fsdp2 with one process has nothing to shard; use accelerate_configs/one_gpu.yaml"
        )


def choose_storage(strategy: Strategy, quantization: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which 4-bit weights are packed. Engines that shard the base move it as the
    compute dtype (uint8 would be replicated by FSDP2, and mixed in one message by ZeRO-3);
    elsewhere uint8."""
    return dtype if strategy.sharded and quantization in ("nf4", "fp4") else torch.uint8


def wrap(
    strategy: Strategy,
    loss_model: AnswerLoss,
    optimizer_of,
    max_grad_norm: float,
    dtype: torch.dtype,
):
    """The whole model of each rank -> the strategy's trainer. optimizer_of: parameters -> torch
    optimizer.
    """
    device = next(loss_model.parameters()).device
    if strategy.name.startswith("zero"):
        return Zero(strategy, loss_model, optimizer_of, max_grad_norm)
    if strategy.name == "fsdp2":
        return FullyShard(strategy, loss_model, optimizer_of, max_grad_norm, device)
    return Replicated(
        strategy, loss_model, optimizer_of, max_grad_norm, device, scale=dtype is torch.float16
    )


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }


class Replicated:
    """Each rank holds everything (torch DistributedDataParallel; nothing at all on one process).
    float16 losses are scaled.
    """

    def __init__(
        self,
        strategy: Strategy,
        loss_model: AnswerLoss,
        optimizer_of,
        max_grad_norm: float,
        device: torch.device,
        scale: bool,
    ):
        self.module = loss_model
        self.max_grad_norm = max_grad_norm
        self.weights = trainable(loss_model.model)
        self.optimizer = optimizer_of(self.weights.values())
        self.scaler = torch.amp.GradScaler(device.type, enabled=scale)
        self.wrapped = loss_model
        if strategy.ranks > 1:
            ddp = torch.nn.parallel.DistributedDataParallel
            renamed = "forward_sync_buffers" in inspect.signature(ddp).parameters  # torch 2.13
            self.wrapped = ddp(
                loss_model,
                device_ids=[device.index] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                **{"forward_sync_buffers" if renamed else "broadcast_buffers": False},
            )

    def __call__(self, **batch: Any) -> torch.Tensor:
        return self.wrapped(**batch)

    def backward(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss).backward()

    def accumulate(self, last: bool):
        """Context of a micro-batch's forward and backward; gradients are averaged over ranks with
        the step's last one.
        """
        return (
            self.wrapped.no_sync()
            if self.wrapped is not self.module and not last
            else contextlib.nullcontext()
        )

    def step(self, lr: float) -> float:
        """Clip, update, clear the gradients; -> global norm before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.weights.values(), self.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return float(norm)

    def drop_gradients(self) -> None:
        self.optimizer.zero_grad()

    def read_gradients(self) -> dict[str, torch.Tensor]:
        return {
            name: weight.grad.detach() / self.scaler.get_scale()
            for name, weight in self.weights.items()
        }

    def read_weights(self) -> dict[str, torch.Tensor]:
        """The adapter's whole float32 tensors by parameter name."""
        return {name: weight.detach() for name, weight in self.weights.items()}

    def write_weights(self, values: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(values[name])

    def read_states(self) -> dict[str, dict[str, Any]]:
        """The optimizer's whole state tensors by parameter name."""
        return {
            name: dict(self.optimizer.state[weight])
            for name, weight in self.weights.items()
            if weight in self.optimizer.state
        }

    def write_states(self, states: dict[str, dict[str, Any]]) -> None:
        # torch's own loading casts and moves; it knows parameters by number
        order = list(self.weights)
        given = self.optimizer.state_dict() | {
            "state": {order.index(name): state for name, state in states.items()}
        }
        self.optimizer.load_state_dict(given)
        restore_pages(self.optimizer)

    def read_scale(self) -> dict[str, Any]:
        """State of float16's loss scaling; empty for other dtypes."""
        return self.scaler.state_dict()

    def write_scale(self, state: dict[str, Any]) -> None:
        self.scaler.load_state_dict(state)


class Zero:
    """DeepSpeed: optimizer states divided (1), gradients too (2), base weights too (3), on the GPU
    or offloaded.
    """

    def __init__(
        self, strategy: Strategy, loss_model: AnswerLoss, optimizer_of, max_grad_norm: float
    ):
        import deepspeed

        self.module, self.weights = loss_model, trainable(loss_model.model)
        causal = unwrap(loss_model.model)
        if strategy.sharded:
            # A decoder layer is gathered whole: adapters are used without calling their own
            # modules, and one message is faster than fourteen. Outside its forward pass a weight is
            # empty: see models.keep_gathered_weights.
            deepspeed.utils.set_z3_leaf_modules(
                loss_model, list({type(layer) for layer in find_layers(causal)})
            )
            keep_gathered_weights(loss_model)
            # The first layer's input needs a gradient, else DeepSpeed releases that layer before
            # its adapters are done.
            causal.get_input_embeddings().register_forward_hook(
                lambda module, inputs, output: output.requires_grad_(torch.is_grad_enabled())
            )
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": max_grad_norm,
            "zero_optimization": (
                {"reduce_bucket_size": sum(map(torch.numel, self.weights.values()))}
                | strategy.settings
            ),
            # ^ DeepSpeed's default bucket is 2 GB, more than an adapter needs altogether
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        }
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=loss_model,
            optimizer=optimizer_of(self.weights.values()),
            config=settings,
            dist_init_required=False,
        )

    def __call__(self, **batch: Any) -> torch.Tensor:
        return self.engine(**batch)

    def accumulate(self, last: bool):
        self.engine.set_gradient_accumulation_boundary(last)
        return contextlib.nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # counts the micro-batch; nothing is updated before the boundary

    def step(self, lr: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def drop_gradients(self) -> None:
        """A step that changes nothing: DeepSpeed has no other way to forget gradients it has
        reduced.
        """
        self.engine.set_gradient_accumulation_boundary(True)
        before = self.read_states()
        decay = [group["weight_decay"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["weight_decay"] = 0.0
        self.step(0.0)
        for group, value in zip(self.optimizer.param_groups, decay, strict=True):
            group["weight_decay"] = value
        self.write_states(before)

    def read_gradients(self) -> dict[str, torch.Tensor]:
        from deepspeed.utils import safe_get_full_grad

        return {name: safe_get_full_grad(weight) for name, weight in self.weights.items()}

    def read_weights(self) -> dict[str, torch.Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        return {
            name: safe_get_full_fp32_param(weight).cpu() for name, weight in self.weights.items()
        }

    def write_weights(self, values: dict[str, torch.Tensor]) -> None:
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        with (
            torch.no_grad(),
            deepspeed.zero.GatheredParameters(
                list(self.weights.values()),
                modifier_rank=0,
                enabled=self.engine.zero_optimization_stage() == 3,
            ),
        ):
            for name, weight in self.weights.items():
                weight.copy_(values[name])
        for name, weight in self.weights.items():
            value = values[name].to(self.engine.device, torch.float32)
            if hasattr(weight, "ds_id"):
                safe_set_local_fp32_param(weight, self.cut(value, weight))
            else:
                safe_set_full_fp32_param(weight, value)

    def cut(self, value: torch.Tensor, weight: torch.nn.Parameter) -> torch.Tensor:
        """This rank's part of a whole tensor under ZeRO-3, which pads what does not divide by the
        ranks. (DeepSpeed's own safe_set_full_* reads past the end there, 0.19.8.)"""
        size = weight.ds_tensor.numel()
        ranks = dist.get_world_size()
        padded = torch.nn.functional.pad(value.flatten(), (0, size * ranks - value.numel()))
        return padded.narrow(0, size * dist.get_rank(), size)

    def inner_states(self) -> Iterator[dict[str, Any]]:
        return iter(self.optimizer.optimizer.state.values())

    def read_states(self) -> dict[str, dict[str, Any]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        steps = [float(state["step"]) for state in self.inner_states()]
        if not steps:
            return {}
        return {
            name: (
                {"step": torch.tensor(steps[0])}
                | {
                    key: safe_get_full_optimizer_state(weight, key).cpu()
                    for key in ("exp_avg", "exp_avg_sq")
                }
            )
            for name, weight in self.weights.items()
        }

    def write_states(self, states: dict[str, dict[str, Any]]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if not states:  # back to before the first step
            for state in self.inner_states():
                for value in state.values():
                    value.zero_()
            return
        for name, weight in self.weights.items():
            for key in ("exp_avg", "exp_avg_sq"):
                value = states[name][key].to(self.engine.device)
                if hasattr(weight, "ds_id"):
                    safe_set_local_optimizer_state(weight, self.cut(value, weight), key)
                else:
                    safe_set_full_optimizer_state(weight, value, key)
        (step,) = {float(state["step"]) for state in states.values()}
        for state in self.inner_states():
            state["step"].fill_(step)

    def read_scale(self) -> dict[str, Any]:
        return {}  # This strategy refuses float16.

    def write_scale(self, state: dict[str, Any]) -> None:
        """A run that began in float16 goes on in another dtype, which needs no scale."""


class FullyShard:
    """FSDP2 through torch's own fully_shard, so that the same code runs on GPUs and on CPU
    processes (Accelerate has no CPU path): one unit per decoder layer, one for an untied embedding
    and one for the head. Tied embeddings and the few norms outside the layers stay whole on each
    rank."""

    def __init__(
        self,
        strategy: Strategy,
        loss_model: AnswerLoss,
        optimizer_of,
        max_grad_norm: float,
        device: torch.device,
    ):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

        causal = unwrap(loss_model.model)
        layers = find_layers(causal)
        embed = causal.get_input_embeddings()
        head = causal.get_output_embeddings()
        units = [*layers] if embed.weight is head.weight else [embed, *layers, head]
        inside = {id(parameter) for unit in units for parameter in unit.parameters()}
        whole = {parameter for parameter in loss_model.parameters() if id(parameter) not in inside}
        options = {
            "mesh": init_device_mesh(device.type, (strategy.ranks,)),
            "reshard_after_forward": strategy.settings.get("reshard_after_forward", True),
            "offload_policy": (
                CPUOffloadPolicy() if strategy.settings.get("offload") else OffloadPolicy()
            ),
        }
        for unit in units:
            fully_shard(unit, **options)
        self.wrapped = fully_shard(loss_model, **options, ignored_params=whole)
        self.module = loss_model
        self.max_grad_norm = max_grad_norm
        self.device = device
        self.weights = trainable(loss_model.model)
        self.optimizer = optimizer_of(self.weights.values())

    def __call__(self, **batch: Any) -> torch.Tensor:
        return self.wrapped(**batch)

    def accumulate(self, last: bool):
        self.wrapped.set_requires_gradient_sync(last)
        return contextlib.nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self, lr: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = torch.nn.utils.clip_grad_norm_(self.weights.values(), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def read_scale(self) -> dict[str, Any]:
        return {}  # This strategy refuses float16.

    def write_scale(self, state: dict[str, Any]) -> None:
        """A run that began in float16 goes on in another dtype, which needs no scale."""

    def drop_gradients(self) -> None:
        self.optimizer.zero_grad()

    def read_gradients(self) -> dict[str, torch.Tensor]:
        return {name: self.gather(weight.grad) for name, weight in self.weights.items()}

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Whole, on the host: one tensor at a time is whole on the GPU."""
        tensor = tensor.detach()
        return (
            tensor.to(self.device).full_tensor() if hasattr(tensor, "full_tensor") else tensor
        ).cpu()

    def divide(self, value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        from torch.distributed.tensor import distribute_tensor

        if not hasattr(like, "device_mesh"):
            return value.to(like.device)
        return distribute_tensor(
            value.to(self.device), like.device_mesh, like.placements, src_data_rank=None
        ).to(like.device)

    def read_weights(self) -> dict[str, torch.Tensor]:
        return {name: self.gather(weight) for name, weight in self.weights.items()}

    def write_weights(self, values: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(self.divide(values[name], weight))

    def read_states(self) -> dict[str, dict[str, Any]]:
        return {
            name: {key: self.gather(value) for key, value in self.optimizer.state[weight].items()}
            for name, weight in self.weights.items()
            if weight in self.optimizer.state
        }

    def write_states(self, states: dict[str, dict[str, Any]]) -> None:
        order = list(self.weights)
        shards = {
            order.index(name): {
                key: self.divide(value, self.weights[name]) if value.dim() else value
                for key, value in state.items()
            }
            for name, state in states.items()
        }
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": shards})


def gather_weights(trainer, shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """The adapter's whole tensors, each compared with the shape it had before it was divided.

    Raises:
        StrategyError: one that came back empty, in part, or not finite.
    """
    values = trainer.read_weights()
    for name, shape in shapes.items():
        value = values.get(name)
        if value is None or value.shape != shape or not bool(torch.isfinite(value).all()):
            got = (
                "nothing"
                if value is None
                else (
                    f"shape {tuple(value.shape)}"
                    if value.shape != shape
                    else "values that are not finite"
                )
            )
            raise StrategyError(
                f"gathering the adapter: {name} came back with {got}, expected {tuple(shape)};"
                " nothing was saved"
            )
    return values


def load_states(trainer, states: dict[str, dict[str, Any]]) -> None:
    """Optimizer states of a checkpoint, whatever strategy and number of processes wrote it.

    Raises:
        StrategyError: they belong to another adapter or optimizer.
    """
    wrong = sorted(states.keys() ^ trainer.weights.keys())
    if wrong:
        raise StrategyError(
            f"the checkpoint's optimizer does not fit this adapter: {wrong[0]} is missing or"
            " surplus; start without --resume"
        )
    trainer.write_states(states)


def wake_adapter(model: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Fill the adapter's zero tensors with noise, the same on every rank, so that no gradient of
    the check is zero only because a fresh adapter's second factor is; -> the values as they
    were."""
    weights = trainable(model)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in weights.values():
            if not weight.any():
                weight.normal_(std=0.02)
    return before


def measure_gradients(
    trainer, batch: dict[str, Any], targets: int, ranks: int, seed: int
) -> dict[str, torch.Tensor]:
    """The adapter's gradients of one batch per rank, without a step; targets: supervised tokens of
    all ranks.
    """
    torch.manual_seed(seed)
    trainer.module.train()
    with trainer.accumulate(last=True):
        trainer.backward(trainer(**batch) * (ranks / targets))
    gradients = {name: value.clone() for name, value in trainer.read_gradients().items()}
    trainer.drop_gradients()
    return gradients


def compute_reference(
    loss_model: AnswerLoss, batch: dict[str, Any], targets: int, seed: int
) -> dict[str, torch.Tensor]:
    """The same gradients from the whole model on each rank, summed over ranks in float32."""
    torch.manual_seed(seed)
    loss_model.train()
    weights = trainable(loss_model.model)
    gradients = torch.autograd.grad(loss_model(**batch) / targets, list(weights.values()))
    gradients = [gradient.contiguous() for gradient in gradients]
    for gradient in gradients:
        if dist.is_initialized():
            dist.all_reduce(gradient)
    return dict(zip(weights, gradients, strict=True))


def compare_gradients(
    reference: dict[str, torch.Tensor],
    found: dict[str, torch.Tensor],
    dtype: torch.dtype,
    strategy: Strategy,
) -> float:
    """Largest error of a tensor relative to the reference's largest entry.

    Raises:
        StrategyError: the strategy does not train this model rightly.
    """
    worst = 0.0
    where = ""
    for name, expected in reference.items():
        got = found[name].to(expected.device)
        error = math.inf
        if got.shape == expected.shape and bool(torch.isfinite(got).all()):
            error = float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
        if error > worst:
            worst = error
            where = name
    if worst > GRADIENT_TOLERANCE[dtype]:
        raise StrategyError(
            f"{strategy.name}: on a short batch the gradient of {where} differs from the unsharded"
            f" model's by {worst:.1e} (relative); this combination of model, engine and versions"
            " trains wrongly; use ddp, or training.gradient_checkpointing full"
        )
    return worst
