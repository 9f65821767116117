"""Gather what is trained: network, data, loss and optimizer, ours or those of a script that calls `fit` or `run`."""

from collections.abc import Callable
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object, recursively_apply, send_to_device
from torch import nn

from ddp_mnist.config import RECIPES, USER_DATA_PREFIX, TrainConfig
from ddp_mnist.data.batches import Batches, Split, seed_generators
from ddp_mnist.data.sources import UserData, load_mnist, validate_user_data
from ddp_mnist.distributed.launcher import report_once_per_host
from ddp_mnist.errors import UsageError
from ddp_mnist.evaluate import evaluation_mode, find_classes, move_to_device
from ddp_mnist.model import CNN
from ddp_mnist.step import Loss, call, cross_entropy
from ddp_mnist.storage.checkpoint import Snapshot, load_weights

if TYPE_CHECKING:
    from ddp_mnist.distributed.context import Context
    from ddp_mnist.optimizer import MakeOptimizer


class Workload:
    """The settings, and the parts of the job that a script may bring."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        model: Callable[[], nn.Module] | None = None,
        data: UserData | None = None,
        optimizer: "MakeOptimizer | None" = None,
        loss: Loss | None = None,
        script_config: TrainConfig | None = None,
    ) -> None:
        """Take the parts, as for `fit`; None: the package's. Check a script's data; put their hash into the settings.

        `script_config`: the settings that a script gave to `fit`; None: they come from flags. The printed command that
        continues the run depends on it. Raises: UsageError.
        """
        self.config, self.script_config = config, script_config
        self.make_network, self.make_optimizer, self.loss = model, optimizer, loss or cross_entropy
        self.sets: tuple[Split, Split] | None = None
        self.is_script = any(part is not None for part in (model, data, optimizer, loss, script_config))
        with report_once_per_host():
            if isinstance(model, nn.Module):
                raise UsageError("`model` is a network; expected a function that makes one, such as its class.")
            for name in ("lr", "beta2") if optimizer is not None else ():
                value = getattr(config, name)
                if value not in (getattr(TrainConfig, name), RECIPES[config.recipe].get(name)):
                    raise UsageError(f"--{name} is {value}, which is Adam's; `optimizer` sets its own. Leave it out.")
            if data is not None:
                digest, self.sets = validate_user_data(data, config)
                self.config = config.replace(dataset=USER_DATA_PREFIX + digest)

    def load_data(self, context: "Context") -> tuple[Batches, Split]:
        """Return (batches, test set), both on this rank's device. Collective. Raises: JobError, on all ranks."""
        config = self.config
        if isinstance(self.loss, nn.Module):
            self.loss.to(context.device)  # a loss may hold tensors, such as class weights

        def place() -> tuple[Batches, Split]:
            train, test = (each.to(context.device) for each in self.sets or load_mnist(config.dataset, config.data_dir))
            shard = {"rank": context.rank, "world_size": context.world_size, "seed": config.seed}
            return Batches(train, batch_size=config.batch_size, **shard), test

        return context.run_on_all_ranks(place)

    def check_same_data(self) -> None:
        """Raise UsageError on all ranks if a rank was given other data than rank 0. Collective."""
        names = gather_object([self.config.dataset])
        if others := [rank for rank, name in enumerate(names) if name != names[0]]:
            raise UsageError(f"rank {others[0]} was given other data than rank 0. Seed whatever draws or splits them.")

    def build_network(self, context: "Context", snapshot: Snapshot | None, inputs: Any = None) -> nn.Module:
        """Return the network on this rank's device, with the weights of the snapshot, else of --init-from. Collective.

        `inputs`: of one item or more; lazy layers get their shapes from them. Raises on all ranks UsageError: the
        weights belong to another network; JobError: the file of --init-from cannot be used.
        """
        seed_generators(self.config.seed, context.device)
        network = self.make_network() if self.make_network else CNN(widths=self.config.widths)
        if hasattr(network, "_orig_mod"):  # its weights would be saved under names that the plain module does not have
            raise UsageError("the network is compiled already; return the module itself, and use --compile.")
        if not network.training:  # as from_pretrained returns it. Otherwise single layers in eval() stay in eval()
            network.train()
        if inputs is not None and any(map(nn.parameter.is_lazy, (*network.parameters(), *network.buffers()))):
            # Give lazy layers their shapes now: the optimizer, DDP and the memory format need the weights.
            with torch.no_grad(), evaluation_mode(network):
                call(network, send_to_device(inputs, torch.device("cpu")))
        if not any(parameter.requires_grad for parameter in network.parameters()):
            raise UsageError("the network has no parameter to train: all have requires_grad=False, or there is none.")
        path = self.config.init_from
        if snapshot is not None:
            try:
                network.load_state_dict(snapshot.weights)
            except RuntimeError as error:
                raise UsageError(f"{self.config.output_dir} holds a run of another network: {error}") from error
        elif path is not None:
            context.run_on_all_ranks(lambda: load_weights(network, path, flag="--init-from "))
        return move_to_device(network, context.device)

    def try_out(self, network: nn.Module, batches: Batches, test_set: Split) -> int | None:
        """Run network and loss on a few items. Return the number of classes; None: the targets are no class labels.

        Raises UsageError: network, data and loss do not fit each other.
        """
        classes = find_classes(network, batches.train_set, self.loss)
        if find_classes(network, test_set, self.loss) != classes:
            raise UsageError("training and test targets are of different kinds; expected class labels in both or none.")
        sizes = (batches.local_size, batches.items_in_last_batch)
        if any(size // min(self.config.accumulate, size) == 1 for size in sizes):
            _check_single_item(network, recursively_apply(lambda tensor: tensor[:1], batches.dummy[0]))
        return classes


def _check_single_item(network: nn.Module, inputs: Any) -> None:
    """Raise UsageError if the network cannot train on one item, as batch norm cannot."""
    try:
        call(deepcopy(network), inputs)
    except ValueError as error:
        layers = sorted({type(each).__name__ for each in network.modules() if "Norm" in type(each).__name__})
        raise UsageError(
            f"a rank gets a single item, in an epoch's last batch or a part of --accumulate; "
            f"{', '.join(layers) or 'the network'} cannot be trained on one ({error}). Choose another --batch-size, or "
            "leave an item out of the training set."
        ) from error
