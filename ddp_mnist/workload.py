"""The network and the data to train: ours or those of the script that has called `fit`."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ddp_mnist.data.batches import Batches, Split, to_float
from ddp_mnist.data.sources import UserData, load, validate_user_data
from ddp_mnist.distributed.launcher import report_once_per_host
from ddp_mnist.errors import UsageError
from ddp_mnist.model import CNN
from ddp_mnist.run.checkpoint import Snapshot, load_weights

if TYPE_CHECKING:
    from ddp_mnist.config import TrainConfig
    from ddp_mnist.distributed.context import Context


@dataclass(frozen=True)
class Workload:
    """The network and data of our own command, or those that a script brings, with its settings."""

    model: Callable[[], nn.Module] | None = None
    """Makes the script's network; None: ours."""
    data: tuple[Split, Split] | None = None
    """The script's training set and test set; None: those of `config.dataset`."""
    data_name: str | None = None
    """Stands for exactly these data: it has a hash of them."""
    script_config: TrainConfig | None = None
    """The settings in the script's source; None: the script takes our flags."""

    @classmethod
    def of(
        cls, model: Callable[[], nn.Module] | None, data: UserData | None, script_config: TrainConfig | None
    ) -> Workload:
        """Return the workload with its data checked. Raises: UsageError."""
        if data is None:
            return cls(model, script_config=script_config)
        with report_once_per_host():
            name, sets = validate_user_data(data)
        return cls(model, sets, name, script_config)

    @property
    def is_script(self) -> bool:
        """Return whether it is not our own command."""
        return (self.model, self.data, self.script_config) != (None, None, None)

    def load_data(self, config: TrainConfig, context: Context) -> tuple[Batches, Split]:
        """Return this rank's batches and the test set, on its device. Collective. Raises: JobError, on all ranks."""
        train, test = self.data or context.run_on_all_ranks(lambda: load(config.dataset, config.data_dir))
        train, test = train.to(context.device), test.to(context.device)
        shard = {"rank": context.rank, "world_size": context.world_size, "seed": config.seed}
        return Batches(train, batch_size=config.batch_size, **shard), test

    def check_same_data(self, context: Context) -> None:
        """Raise UsageError on all ranks if a rank was given other data than rank 0. Collective."""
        first = context.broadcast(self.data_name)

        def compare() -> None:
            if self.data_name != first:
                raise UsageError("it was given other data than rank 0. Seed whatever draws or splits them.")

        context.run_on_all_ranks(compare)

    def build_network(
        self, config: TrainConfig, context: Context, snapshot: Snapshot | None, image: Tensor | None = None
    ) -> nn.Module:
        """Return the network on this rank's device, with its weights. Collective.

        Args:
            config: Seed, widths and --init-from.
            context: The ranks of the job.
            snapshot: The run's checkpoint; None: the weights are those of --init-from, or random.
            image: One image of the data set (1, ...), by which lazy layers get their shapes.

        Raises:
            UsageError: The weights are of another network.
            JobError: The file of --init-from cannot be used; on all ranks.
        """
        torch.manual_seed(config.seed)
        network = self.model() if self.model else CNN(widths=config.widths)
        if hasattr(network, "_orig_mod"):  # its weights would be saved under names that the plain module does not have
            raise UsageError("the network is compiled already; return the module itself, and use --compile.")
        if image is not None:
            _initialize_lazy_layers(network, image)
        if not any(parameter.requires_grad for parameter in network.parameters()):
            raise UsageError("the network has no parameter to train: all have requires_grad=False, or there is none.")
        path = config.init_from
        if snapshot is not None:
            try:
                network.load_state_dict(snapshot.weights)
            except RuntimeError as error:
                raise UsageError(f"{config.output_dir} holds a run of another network: {error}") from error
        elif path is not None:
            context.run_on_all_ranks(lambda: load_weights(network, path))
        return move_to_device(network, context.device)

    def network_name(self, network: nn.Module) -> str | None:
        """Return the name of the class of the script's network; None if the network is ours."""
        return f"{type(network).__module__}.{type(network).__qualname__}" if self.model else None


def check_single_item(network: nn.Module, images: Tensor) -> None:
    """Raise UsageError if one image is all that a rank gets in a batch, and batch norm, say, cannot train on one."""
    if len(images) == 1:
        try:
            deepcopy(network)(to_float(images))
        except ValueError as error:
            layers = sorted({type(each).__name__ for each in network.modules() if "Norm" in type(each).__name__})
            raise UsageError(
                f"the last batch of an epoch leaves one item to a rank; {', '.join(layers) or 'the network'} cannot be "
                f"trained on one ({error}). Choose another --batch-size, or leave an item out of the training set."
            ) from error


def move_to_device(network: nn.Module, device: torch.device) -> nn.Module:
    """Move the network to the device, in place, and return it."""
    network.to(device)
    # With NCHW weights a step takes 1.8 times as long on a CPU. Not for other networks: `view` may fail in them.
    if device.type == "cpu" and isinstance(network, CNN):
        network.to(memory_format=torch.channels_last)
    return network


@torch.no_grad()
def _initialize_lazy_layers(network: nn.Module, image: Tensor) -> None:
    """Give lazy layers their weights: Adam, DDP and the memory format need to see them."""
    if any(nn.parameter.is_lazy(each) for each in (*network.parameters(), *network.buffers())):
        training = network.training
        network.eval()
        network(to_float(image.cpu().clone()))
        network.train(training)
