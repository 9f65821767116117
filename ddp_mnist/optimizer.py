"""Make the optimizer, our Adam or the script's own; turn its state into tensors and numbers for a checkpoint."""

import inspect
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ddp_mnist.errors import JobError, UsageError

if TYPE_CHECKING:
    from ddp_mnist.config import TrainConfig

# A function, network → its optimizer. It gets the network, not the parameters, so that it can group them by name.
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


class Adam(torch.optim.Adam):
    """Adam without torch.compile's wrappers, which import the compiler: seconds of CPU time at every start."""

    add_param_group = inspect.unwrap(torch.optim.Adam.add_param_group)
    load_state_dict = inspect.unwrap(torch.optim.Adam.load_state_dict)
    zero_grad = inspect.unwrap(torch.optim.Adam.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))


def build_optimizer(config: "TrainConfig", make: MakeOptimizer | None, network: nn.Module) -> torch.optim.Optimizer:
    """Return what `make` returns, else Adam. Raises UsageError: that is no optimizer, or has other parameters."""
    if make is None:
        # With the fused kernel Accelerate does not notice that fp16's scaler has skipped a step.
        fused = config.mixed_precision != "fp16"
        return Adam(network.parameters(), lr=config.lr, betas=(0.9, config.beta2), fused=fused)
    optimizer = make(network) if callable(make) else make
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UsageError(f"`optimizer` returned a {type(optimizer).__name__}; expected a torch.optim.Optimizer.")
    known = set(network.parameters())
    if not all(known.issuperset(group["params"]) for group in optimizer.param_groups):
        raise UsageError("`optimizer` has parameters that are not the network's; expected those of its argument.")
    return optimizer


def describe(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the optimizer's class and, for each group, its settings and its parameters' names, as JSON types."""
    names = {parameter: name for name, parameter in network.named_parameters()}
    kernels = ("foreach", "capturable", "differentiable", "fused")  # settings that depend on the machine
    groups = []
    for group in optimizer.param_groups:
        settings = {key: list(value) if isinstance(value, tuple) else value for key, value in group.items()}
        settings["params"] = [names[parameter] for parameter in group["params"]]
        groups.append({key: value for key, value in settings.items() if key not in kernels and _is_plain(value)})
    return {"class": f"{type(optimizer).__module__}.{type(optimizer).__qualname__}", "groups": groups}


def check_same(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise UsageError if a run's optimizer has changed. `saved`, `now`: what `describe` returned before any step."""
    facts = [("class", saved["class"], now["class"]), ("groups", len(saved["groups"]), len(now["groups"]))]
    for number, (was, is_) in enumerate(zip(saved["groups"], now["groups"], strict=False)):
        # Compare the keys that both have: another version of torch may have other settings.
        facts += [(f"{key} in group {number}", was[key], is_[key]) for key in was if key in is_]
    for what, was, is_ in facts:
        if was != is_:
            raise UsageError(
                f"the run's optimizer has {what}: {was}, and now {is_}. Continue it with the same optimizer, choose "
                "another output directory, or start over with --fresh."
            )


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, list) else isinstance(value, int | float | str | None)


def make_capturable(optimizer: Adam) -> None:
    """Let a CUDA graph capture Adam's step: its rate and state become tensors that are changed in place only."""
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
        group["lr"] = torch.tensor(group["lr"], device=group["params"][0].device)
        group["capturable"] = True
        for parameter in filter(lambda each: each.requires_grad, group["params"]):
            # Adam would make these in its first step, but a capture restores only tensors that exist before it.
            state = optimizer.state[parameter]
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each group's rate to `factor` times its initial rate; change a tensor in place: a CUDA graph reads it."""
    for group in optimizer.param_groups:
        if "initial_lr" not in group:  # the key that torch's own schedules use
            group["initial_lr"] = float(group["lr"])
        rate = factor * group["initial_lr"]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def save_state(network: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the optimizer's state by `<parameter>.<name of the state>`: (tensors on the CPU, other values for JSON).

    The values' "groups" are the groups' settings: some optimizers count steps in them. Raises JobError: another type.
    """
    tensors: dict[str, Tensor] = {}
    values = {"groups": describe(network, optimizer)["groups"]}
    for name, parameter in network.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                # A copy: safetensors refuses tensors that share memory.
                tensors[f"{name}.{key}"] = value.detach().cpu().contiguous().clone()
            elif _is_plain(value):
                values[f"{name}.{key}"] = value
            else:
                raise JobError(f"{type(optimizer).__name__} keeps a {type(value).__name__}, {key}; expected tensors")
    return tensors, values


def load_state(
    network: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], values: dict[str, Any]
) -> None:
    """Fill the optimizer's state from what `save_state` has returned."""
    parameters = dict(network.named_parameters())
    groups = [
        # Take the saved settings, except the rate: each step sets the rate, and for a CUDA graph it must stay a tensor.
        # torch finds parameters by their position in the groups, so the saved "params" may be names.
        now | was | {"lr": now["lr"], "params": was["params"]}
        for now, was in zip(optimizer.param_groups, values.pop("groups"), strict=True)
    ]
    state: dict[str, dict[str, Any]] = defaultdict(dict)
    for full_name, value in (values | tensors).items():
        name, _, key = full_name.rpartition(".")
        if isinstance(value, Tensor) and value.shape == parameters[name].shape:
            # Use the parameter's memory layout: the fused kernel walks parameter and state in storage order.
            value = torch.empty_like(parameters[name], dtype=value.dtype, device="cpu").copy_(value)
        state[name][key] = value
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for name, saved in state.items():  # undo a cast: torch chose the devices, but also used the parameter's type
        now = optimizer.state[parameters[name]]
        now |= {key: value.to(now[key].device) if isinstance(value, Tensor) else value for key, value in saved.items()}
