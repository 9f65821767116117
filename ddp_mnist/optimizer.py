"""Adam, and the state of any optimizer as named tensors for a checkpoint."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ddp_mnist.config import TrainConfig


class Adam(torch.optim.Adam):
    """Adam without torch.compile's wrappers, which import its compiler: 2.75 s of CPU time at every start."""

    add_param_group = inspect.unwrap(torch.optim.Adam.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Adam.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))


def make_adam(config: TrainConfig, network: nn.Module) -> Adam:
    """Return Adam for all parameters of the network, with the configured rate and beta2."""
    # With the fused kernel Accelerate does not notice that fp16's scaler has skipped a step.
    fused = config.mixed_precision != "fp16"
    return Adam(network.parameters(), lr=config.lr, betas=(0.9, config.beta2), fused=fused)


def make_capturable(optimizer: Adam) -> None:
    """Let a CUDA graph capture Adam's step: its rate and all state become tensors that stay where they are."""
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"], device=group["params"][0].device)
        group["capturable"] = True
        for parameter in filter(lambda each: each.requires_grad, group["params"]):
            # Made here: a capture restores only tensors that exist before it.
            state = optimizer.state[parameter]
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all groups; in place where a CUDA graph reads it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return all tensors of the optimizer's state."""
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def save_state(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state on the CPU, as `<parameter>.<name of the state>`; {} before a first step."""
    return {
        f"{name}.{key}": value.detach().cpu().contiguous()
        for name, parameter in network.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_state(network: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Tensor]) -> None:
    """Fill the optimizer's state from what `save_state` has returned."""
    parameters = dict(network.named_parameters())
    group_of = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    for full_name, value in saved.items():
        name, _, key = full_name.rpartition(".")
        parameter = parameters[name]
        if value.shape == parameter.shape and key != "step":
            # In the parameter's own memory layout: the fused kernel walks both in storage order.
            target = torch.empty_like(parameter, requires_grad=False)
        else:  # Adam's `step` is on the CPU, unless fused or capturable
            group = group_of[parameter]
            on_device = key != "step" or group.get("fused") or group.get("capturable")
            target = torch.empty_like(value, device=parameter.device if on_device else "cpu")
        optimizer.state[parameter][key] = target.copy_(value)
