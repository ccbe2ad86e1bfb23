"""The strategies `zero1`, `zero2` and `zero3`: DeepSpeed ZeRO."""

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

# DeepSpeed's default bucket takes 2 GB. One that holds all gradients of an adapter is enough, and
# one of this many elements is large enough for messages to be fast.
LARGEST_BUCKET = 200_000_000


class Zero:
    """A trainer (interface.Trainer) through DeepSpeed ZeRO (arXiv:1910.02054).

    Stage 1 divides the optimizer's states over the ranks, stage 2 also the gradients, and stage 3
    also the weights of the base. States and weights lie on the GPU, or offloaded in host memory.

    Trained weights in bfloat16 make a bfloat16 engine, which keeps float32 masters of them.
    """

    def __init__(
        self, strategy: Strategy, loss_model: AnswerLoss, create_optimizer, max_grad_norm: float
    ):
        import deepspeed

        self.module = loss_model
        self.weights = trainable(loss_model.model)
        causal = unwrap(loss_model.model)
        if strategy.sharded:
            # A decoder layer is gathered as a whole. The fused adapter code does not call the
            # adapters' own modules, so DeepSpeed would not gather them. One message per layer is
            # faster than fourteen besides.
            layer_types = {type(layer) for layer in find_layers(causal)}
            deepspeed.utils.set_z3_leaf_modules(loss_model, list(layer_types))
            # A weight is empty outside the forward pass of its layer. The replaced matrix products
            # (quantization.GatheredMatMul) do not keep it for the backward pass.
            apply_overrides(
                [part for part in loss_model.modules() if is_quantized_linear(part)],
                GATHERED_OVERRIDES,
                causal.get_input_embeddings().weight.dtype,
            )
            # The input of the first layer must need a gradient. Otherwise DeepSpeed releases that
            # layer before the gradients of its adapters are computed.
            causal.get_input_embeddings().register_forward_hook(
                lambda module, inputs, output: output.requires_grad_(torch.is_grad_enabled())
            )
        elements = sum(map(torch.numel, self.weights.values()))
        bucket = {"reduce_bucket_size": min(elements, LARGEST_BUCKET)}
        # The caller scales the loss and says which micro-batch is the last, so DeepSpeed must count
        # no accumulation of its own and divide nothing by it.
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": max_grad_norm,
            "zero_optimization": bucket | strategy.settings,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        }
        if all(weight.dtype is torch.bfloat16 for weight in self.weights.values()):
            settings["bf16"] = {"enabled": True}
            # Without these two, gradients would add up in bfloat16 over micro-batches and ranks.
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
            settings["communication_data_type"] = "fp32"
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=loss_model,
            optimizer=create_optimizer(self.weights.values()),
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
            self.engine.step()  # This only counts the micro-batch; the last one makes the update.

    def step(self, lr: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def drop_gradients(self) -> None:
        """Clear the gradients by a step that changes nothing.

        DeepSpeed has no other method to drop gradients that it has reduced. The step has learning
        rate and weight decay 0, and the optimizer's states are restored after it.
        """
        self.engine.set_gradient_accumulation_boundary(True)
        states = self.read_states()
        decays = [group["weight_decay"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["weight_decay"] = 0.0
        self.step(0.0)
        for group, decay in zip(self.optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay
        self.write_states(states)

    def read_gradients(self) -> dict[str, torch.Tensor]:
        from deepspeed.utils import safe_get_full_grad

        return {name: safe_get_full_grad(weight) for name, weight in self.weights.items()}

    def read_weights(self, keep: bool = True) -> dict[str, torch.Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        values = {}
        for name, weight in self.weights.items():
            value = safe_get_full_fp32_param(weight)
            if keep:
                values[name] = value.cpu()
        return values

    def write_weights(self, values: dict[str, torch.Tensor]) -> None:
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        divided = self.engine.zero_optimization_stage() == 3
        # One weight at a time is whole, because a GPU may have no memory for all of them.
        for name, weight in self.weights.items():
            gathered = deepspeed.zero.GatheredParameters(weight, modifier_rank=0, enabled=divided)
            with torch.no_grad(), gathered:
                weight.copy_(values[name])
        # The optimizer has a float32 copy of its own, which the next step would write back.
        for name, weight in self.weights.items():
            value = values[name].to(self.engine.device, torch.float32)
            if hasattr(weight, "ds_id"):  # ZeRO-3 has divided this weight.
                safe_set_local_fp32_param(weight, self.take_part(value, weight))
            else:
                safe_set_full_fp32_param(weight, value)

    def take_part(self, value: torch.Tensor, weight: torch.nn.Parameter) -> torch.Tensor:
        """Return this rank's part of a whole tensor under ZeRO-3, flat.

        ZeRO-3 pads a tensor that cannot be divided evenly over the ranks. DeepSpeed's own functions
        safe_set_full_* read past the end of such a tensor (version 0.19.8).
        """
        size = weight.ds_tensor.numel()
        ranks = dist.get_world_size()
        padded = torch.nn.functional.pad(value.flatten(), (0, size * ranks - value.numel()))
        return padded.narrow(0, size * dist.get_rank(), size)

    def inner_states(self) -> Iterator[dict[str, Any]]:
        """Return the states of the torch optimizer inside DeepSpeed's."""
        return iter(self.optimizer.optimizer.state.values())

    def read_states(self, keep: bool = True) -> dict[str, dict[str, Any]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        steps = [float(state["step"]) for state in self.inner_states()]
        if not steps:
            return {}
        states = {}
        for name, weight in self.weights.items():
            state = {"step": torch.tensor(steps[0])}
            for key in ("exp_avg", "exp_avg_sq"):
                value = safe_get_full_optimizer_state(weight, key)
                if keep:
                    state[key] = value.cpu()
            if keep:
                states[name] = state
        return states

    def write_states(self, states: dict[str, dict[str, Any]]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if not states:  # There were no states before the first step, so zeros take their place.
            for state in self.inner_states():
                for value in state.values():
                    value.zero_()
            return
        for name, weight in self.weights.items():
            for key in ("exp_avg", "exp_avg_sq"):
                value = states[name][key].to(self.engine.device)
                if hasattr(weight, "ds_id"):
                    safe_set_local_optimizer_state(weight, self.take_part(value, weight), key)
                else:
                    safe_set_full_optimizer_state(weight, value, key)
        # DeepSpeed keeps one number of steps for all weights.
        (step,) = {float(state["step"]) for state in states.values()}
        for state in self.inner_states():
            state["step"].fill_(step)

    def read_scale(self) -> dict[str, Any]:
        return {}  # check_strategy refuses float16 under this strategy.

    def write_scale(self, state: dict[str, Any]) -> None:
        """Do nothing: no dtype of this strategy needs a scale."""
