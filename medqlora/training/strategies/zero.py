"""DeepSpeed ZeRO-1, 2 and 3."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from medqlora.model.adapter import trainable
from medqlora.model.base import find_layers, unwrap
from medqlora.model.head_loss import AnswerLoss
from medqlora.model.overrides import GATHERED_OVERRIDES, apply_overrides
from medqlora.model.quantization import is_quantized_linear
from medqlora.training.strategies.launch import Strategy


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
            # empty: see quantization.GatheredMatMul.
            deepspeed.utils.set_z3_leaf_modules(
                loss_model, list({type(layer) for layer in find_layers(causal)})
            )
            apply_overrides(
                [part for part in loss_model.modules() if is_quantized_linear(part)],
                GATHERED_OVERRIDES,
                causal.get_input_embeddings().weight.dtype,
            )
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
