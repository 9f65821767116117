"""Which network is trained: ours or the caller's, with which weights, and where it lies."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ddp_mnist.config import TrainConfig
from ddp_mnist.data.batches import to_float
from ddp_mnist.distributed.context import Context
from ddp_mnist.errors import UsageError
from ddp_mnist.model import CNN
from ddp_mnist.run.checkpoint import Snapshot, load_weights


def build_network(
    config: TrainConfig,
    context: Context,
    model: Callable[[], nn.Module] | None,
    snapshot: Snapshot | None,
    image: Tensor | None = None,
) -> nn.Module:
    """Return the network on this rank's device, with the weights of the snapshot, of --init-from, or random ones.

    Args:
        config: Seed, widths and --init-from.
        context: The ranks of the job.
        model: Makes the caller's own network; None: ours.
        snapshot: The run's checkpoint; None: it begins.
        image: One image of the data set (1, ...), on the CPU, by which lazy layers get their shapes.

    Raises:
        UsageError: The weights are of another network.
        JobError: The file of --init-from cannot be used; on all ranks.
    """
    torch.manual_seed(config.seed)
    network = model() if model else CNN(widths=config.widths)
    if image is not None:
        _give_shapes(network, image)
    path = config.init_from
    if snapshot is not None:
        try:
            network.load_state_dict(snapshot.weights)
        except RuntimeError as error:
            raise UsageError(f"{config.output_dir} holds a run of another network: {error}") from error
    elif path is not None:
        context.run_on_all_ranks(lambda: load_weights(network, path))
    return move_to_device(network, context.device)


def move_to_device(network: nn.Module, device: torch.device) -> nn.Module:
    """Move the network to the device, in place, and return it."""
    network.to(device)
    # On a CPU a step of our network with NCHW weights takes 1.8 times as long. 5 dimensions have no such format.
    if device.type == "cpu" and all(parameter.dim() <= 4 for parameter in network.parameters()):
        network.to(memory_format=torch.channels_last)
    return network


@torch.no_grad()
def _give_shapes(network: nn.Module, image: Tensor) -> None:
    """Give lazy layers their weights: Adam, DDP and the memory format need to see them."""
    if any(nn.parameter.is_lazy(each) for each in (*network.parameters(), *network.buffers())):
        training = network.training
        network.eval()
        network(to_float(image.clone()))
        network.train(training)
