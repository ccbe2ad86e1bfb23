"""The strategy `fsdp2`: torch's fully_shard."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from medqlora.model.adapter import trainable
from medqlora.model.base import find_layers, unwrap
from medqlora.model.head_loss import AnswerLoss
from medqlora.training.strategies.launch import Strategy


class FullyShard:
    """A trainer (interface.Trainer) through torch's own fully_shard (FSDP2).

    Accelerate's FSDP2 does not run on CPUs, so the same code could not be tested there. Each
    decoder layer is one unit that is divided and gathered; an untied embedding and its head are one
    unit each. Under an adapter, tied embeddings and the few norms outside the layers stay whole on
    each rank. Where they train, they are the unit of the whole module.

    Trained weights that compute in 16 bits are divided in float32, which makes them the masters;
    fully_shard rounds them when it gathers them, and sums gradients in float32.
    """

    def __init__(
        self,
        strategy: Strategy,
        loss_model: AnswerLoss,
        create_optimizer,
        max_grad_norm: float,
        device: torch.device,
    ):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

        offload_policy = CPUOffloadPolicy() if strategy.settings.get("offload") else OffloadPolicy()
        options = {
            "mesh": init_device_mesh(device.type, (strategy.ranks,)),
            "reshard_after_forward": strategy.settings.get("reshard_after_forward", True),
            "offload_policy": offload_policy,
            "mp_policy": choose_precision(loss_model),
        }
        units, whole = list_units(loss_model)
        # fully_shard must be called for inner modules before the module around them.
        for unit in units:
            keep_masters(unit)
            fully_shard(unit, **options)
        keep_masters(loss_model)
        self.wrapped = fully_shard(loss_model, **options, ignored_params=whole)
        self.divides_all = not whole
        self.module = loss_model
        self.max_grad_norm = max_grad_norm
        self.device = device
        # fully_shard has put divided parameters in the place of the old ones. The optimizer must
        # get the new ones, so they are listed only now.
        self.weights = trainable(loss_model.model)
        self.optimizer = create_optimizer(self.weights.values())

    def __call__(self, **batch: Any) -> torch.Tensor:
        return self.wrapped(**batch)

    def accumulate(self, last: bool):
        # Until the last micro-batch, each rank adds up whole gradients of its own rows. Those of a
        # whole model would take more memory than the divided weights, so they are divided at once.
        self.wrapped.set_requires_gradient_sync(last or self.divides_all)
        return contextlib.nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self, lr: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = torch.nn.utils.clip_grad_norm_(self.weights.values(), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if hasattr(norm, "full_tensor"):  # The norm of divided gradients is itself divided.
            norm = norm.full_tensor()
        return float(norm)

    def read_scale(self) -> dict[str, Any]:
        return {}  # check_strategy refuses float16 under this strategy.

    def write_scale(self, state: dict[str, Any]) -> None:
        """Do nothing: no dtype of this strategy needs a scale."""

    def drop_gradients(self) -> None:
        self.optimizer.zero_grad()

    def read_gradients(self) -> dict[str, torch.Tensor]:
        return {name: self.gather(weight.grad) for name, weight in self.weights.items()}

    def gather(self, tensor: torch.Tensor, keep: bool = True) -> torch.Tensor | None:
        """Return a whole tensor on the host, so that only one at a time is whole on the GPU.

        Without `keep`, this rank only takes part in gathering it.
        """
        tensor = tensor.detach()
        if hasattr(tensor, "full_tensor"):
            # An offloaded part lies on the host, and the mesh gathers on its own device.
            tensor = tensor.to(self.device).full_tensor()
        return tensor.cpu() if keep else None

    def divide(self, value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of a whole tensor, divided and placed as `like` is."""
        from torch.distributed.tensor import distribute_tensor

        if not hasattr(like, "device_mesh"):
            return value.to(like.device)
        # Every rank has the whole tensor, so src_data_rank=None saves sending it.
        divided = distribute_tensor(
            value.to(self.device), like.device_mesh, like.placements, src_data_rank=None
        )
        return divided.to(like.device)

    def read_weights(self, keep: bool = True) -> dict[str, torch.Tensor]:
        values = {}
        for name, weight in self.weights.items():
            value = self.gather(weight, keep)
            if keep:
                values[name] = value
        return values

    def write_weights(self, values: dict[str, torch.Tensor]) -> None:
        # What is still gathered from an evaluation would go on computing with its old weights.
        self.wrapped.reshard()
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(self.divide(values[name], weight))
        # The scoring calls the model inside, not the whole module, which would gather its unit.
        self.wrapped.unshard()

    def read_states(self, keep: bool = True) -> dict[str, dict[str, Any]]:
        states = {}
        for name, weight in self.weights.items():
            if weight in self.optimizer.state:
                state = self.optimizer.state[weight]
                gathered = {key: self.gather(value, keep) for key, value in state.items()}
                if keep:
                    states[name] = gathered
        return states

    def write_states(self, states: dict[str, dict[str, Any]]) -> None:
        # load_state_dict knows parameters by their number, not by name. The only state without
        # dimensions is the number of steps, which is not divided.
        order = list(self.weights)
        numbered = {}
        for name, state in states.items():
            weight = self.weights[name]
            numbered[order.index(name)] = {
                key: self.divide(value, weight) if value.dim() else value
                for key, value in state.items()
            }
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": numbered})


def list_units(
    loss_model: AnswerLoss,
) -> tuple[list[torch.nn.Module], set[torch.nn.Parameter]]:
    """Return the modules that are divided, inner ones first, and the parameters that stay whole."""
    causal = unwrap(loss_model.model)
    layers = find_layers(causal)
    embed = causal.get_input_embeddings()
    head = causal.get_output_embeddings()
    # A parameter may belong to one unit only, and a tied weight would belong to two.
    units = [*layers] if embed.weight is head.weight else [embed, *layers, head]
    divided = set()
    for unit in units:
        divided.update(id(parameter) for parameter in unit.parameters())
    # The outermost module would divide whatever no unit has, unless it is told to ignore it.
    whole = {parameter for parameter in loss_model.parameters() if id(parameter) not in divided}
    # Nobody sums the gradients of what stays whole. What trains is left to the outermost unit.
    if any(parameter.requires_grad for parameter in whole):
        whole = set()
    return units, whole


def choose_precision(loss_model: AnswerLoss) -> Any:
    """Return the policy for trained weights in bfloat16: float32 parts, bfloat16 when gathered."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    dtypes = {weight.dtype for weight in trainable(loss_model.model).values()}
    if dtypes == {torch.float32}:
        return MixedPrecisionPolicy()
    (dtype,) = dtypes
    # Inputs such as rotary tables keep the dtype that the model gives them.
    return MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )


def keep_masters(unit: torch.nn.Module) -> None:
    """Make the trained weights of a unit float32 before it is divided."""
    for parameter in unit.parameters():
        # The parameters of a unit inside are divided already.
        if parameter.requires_grad and not hasattr(parameter, "to_local"):
            parameter.data = parameter.data.float()
