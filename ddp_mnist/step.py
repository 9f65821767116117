"""One optimizer step: network and Adam under Accelerate, and the learning rate."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddp_mnist import by_hand
from ddp_mnist.checkpoint import Snapshot, load_weights
from ddp_mnist.checkpoint import weights as checkpoint_weights
from ddp_mnist.config import TrainConfig
from ddp_mnist.data import Batch, Split, TrainBatches, own_float, to_float
from ddp_mnist.errors import UsageError
from ddp_mnist.graphs import Action, Graphs
from ddp_mnist.model import CNN, alike, placed
from ddp_mnist.world import World

log = logging.getLogger(__name__)

STATE = ("step", "exp_avg", "exp_avg_sq")
"""What Adam keeps of each parameter."""
FORWARD = CNN.forward
"""As this module found it: a subclass, or who puts another in its place later, may do more."""


class Adam(torch.optim.Adam):
    """torch's own, less what lets torch.compile trace it: these wrappers import its compiler, a second at every start.
    Where a torch has none, this is its Adam as it is."""

    add_param_group = inspect.unwrap(torch.optim.Adam.add_param_group)
    state_dict = inspect.unwrap(torch.optim.Adam.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Adam.load_state_dict)
    zero_grad = inspect.unwrap(torch.optim.Adam.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))

    def __init__(self, parameters: Iterable[nn.Parameter], **options: Any) -> None:
        super().__init__(parameters, **options)
        self.alike = len({(each.device, each.dtype) for each in self.param_groups[0]["params"]}) == 1

    def begin(self) -> None:
        """Make the states that torch makes in the first step."""
        for parameter in self.param_groups[0]["params"]:
            if parameter.requires_grad and not self.state[parameter]:
                zero = torch.zeros((), device=parameter.device)
                moments = torch.zeros_like(parameter), torch.zeros_like(parameter)
                self.state[parameter] = dict(zip(STATE, (zero, *moments), strict=True))

    @torch.no_grad()
    def fused_step(self) -> None:
        """What `step` comes to for parameters of one type on one device, without its looks for those, for a CUDA graph
        and for hooks (docs/benchmarks/variants.py). Where a parameter is new, or an option is set that a fork may want,
        it is `step` itself."""
        (group,) = self.param_groups
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        states = [self.state[parameter] for parameter in parameters]
        options = group["amsgrad"], group.get("decoupled_weight_decay")
        if not (group["fused"] and self.alike and states and all(states)) or any(options):
            self.step()  # also makes the states
            return
        beta1, beta2 = group["betas"]
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        torch._fused_adam_(
            parameters,
            [parameter.grad for parameter in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            steps,
            amsgrad=False,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )


class TrainStep:
    """Network and optimizer under Accelerate: one call is one optimizer step on this rank's share of a batch."""

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        snapshot: Snapshot | None = None,
        model: Callable[[], nn.Module] | None = None,
        spare: Split | None = None,
    ) -> None:
        """`model`: makes a network of the caller's own; `spare`: where it finds an image when its share has none.

        Raises: UsageError when the snapshot, or the file of `init_from`, is of another network; JobError, on all
        ranks, when that file cannot be used.
        """
        self.config = config
        self.world = world
        self.clipped_from: Tensor | None = None
        torch.manual_seed(config.seed)
        self.net = model() if model else CNN(widths=config.widths)
        if model and spare is not None:
            _shaped(self.net, spare)
        # Our network draws nothing at random; of others we cannot know.
        self.draws = model is not None
        path = config.init_from
        if snapshot is not None:
            try:
                self.net.load_state_dict(snapshot.weights)
            except RuntimeError as error:
                raise UsageError(f"{config.output_dir} holds a run of another network: {error}") from error
        elif path is not None:
            world.agree(lambda: load_weights(self.net, path))
        placed(self.net, world.device, triton=config.triton)
        kind = type(self.net)
        self.name = f"{kind.__module__}.{kind.__qualname__}" if model else None
        """Of the caller's own network; None: it is ours."""
        self.spare = spare if model else None
        # Fused, fp16's scaler leaves it to the kernel to skip a step that overflowed, and nobody learns that it did.
        fused = config.mixed_precision != "fp16"
        self.adam = Adam(self.net.parameters(), lr=config.lr, betas=(0.9, config.beta2), fused=fused)
        self.parameters = list(self.net.parameters())
        self.triton = isinstance(self.net, CNN) and self.net.triton
        if isinstance(self.net, CNN):
            self.net.once = True
        # Placed already. Asking whether they may be placed imports torch's DTensor, and with it all of sympy.
        self.model, self.optimizer = world.accelerator.prepare(self.net, self.adam, device_placement=[False, False])
        self.compiled: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]] | None = None
        self.by_hand: bool | None = None
        """Whether steps are taken without autograd; None before the first, or before `settle`: who hooks into a step,
        or freezes a weight, later sets it to None again, on all ranks, and it is asked again."""
        self.graphs: Graphs | None = None
        if self.may_be_recorded():
            self.adam.begin()
            # What a graph reads must stay where it was when it was recorded.
            self.rate = config.lr
            self.adam.param_groups[0]["lr"] = torch.tensor(config.lr, device=world.device)
            self.graphs = Graphs(self.changing)
        if config.compile:
            self.compile()
        if snapshot is not None:
            self.restore(snapshot)

    def compile(self) -> None:
        """An epoch's last batch has another size, which is compiled by itself."""
        # What earlier runs of this process have compiled counts against torch's limit; beyond it nothing is compiled.
        torch.compiler.reset()
        if self.triton:
            from ddp_mnist import kernels

            kernels.hide_from_compiler()
        if self.graphs is not None:
            self.compiled = torch.compile(self._forward, dynamic=False)
        else:
            # torch's own CUDA graphs, where ours cannot be.
            mode = "reduce-overhead" if self.world.device.type == "cuda" else "default"
            self.model = torch.compile(self.model, mode=mode, dynamic=False)

    def close(self) -> None:
        """Let go of what was recorded and compiled: both hold this object, and with it the data set, alive. The network
        is a network as any other again.

        DDP has to go before the process group: letting go of that last, it waits for gloo's threads with Python's lock
        in hand, and one of them may want that lock. torch 2.11 hung so now and then (pytorch#56297).
        """
        self.graphs = self.compiled = None
        self.model = self.net
        if isinstance(self.net, CNN):
            self.net.once = self.net.triton = False

    def may_be_recorded(self) -> bool:
        """Whether a step can be a CUDA graph: not what another network may do on the way, not with fp16's scaler, which
        decides on the host what becomes of a step, not the exchange with other ranks, and not on AMD's GPUs, where
        nobody has tried it."""
        alone = self.world.device.type == "cuda" and self.world.size == 1 and torch.version.hip is None
        return alone and self.config.cuda_graphs and self.name is None and self.world.accelerator.scaler is None

    def changing(self) -> list[Tensor]:
        """All that a step changes."""
        states = (value for state in self.adam.state.values() for value in state.values())
        return [*self.parameters, *self.net.buffers(), *states]

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
        """(weights, optimizer, scaler) as a checkpoint keeps them. Raises: JobError when a weight is not finite."""
        state = self.adam.state
        optimizer = {
            f"{name}.{key}": value.detach().cpu().contiguous()
            for name, parameter in self.net.named_parameters()
            for key, value in state.get(parameter, {}).items()
        }
        scaler = self.world.accelerator.scaler
        return checkpoint_weights(self.net), optimizer, scaler.state_dict() if scaler is not None else {}

    def restore(self, snapshot: Snapshot) -> None:
        """The optimizer's and the scaler's state as they were saved, which the weights are already."""
        for name, parameter in self.net.named_parameters():
            for key in STATE:
                value = snapshot.optimizer.get(f"{name}.{key}")
                if value is None:  # saved before the first step
                    continue
                # In the parameter's own memory layout: fused Adam walks both in storage order. It counts on the device.
                device = parameter.device if self.adam.defaults["fused"] else torch.device("cpu")
                home = torch.zeros((), device=device) if key == "step" else torch.zeros_like(parameter)
                self.adam.state[parameter][key] = home.copy_(value)
        scaler = self.world.accelerator.scaler
        if scaler is not None and snapshot.scaler:
            scaler.load_state_dict(snapshot.scaler)

    def __call__(self, batch: Batch, rate: float) -> tuple[Tensor, Tensor]:
        """Returns this rank's part of the global mean loss, and how many of its images were recognised: two scalars
        whose sums over the ranks are the loss and the count."""
        if self.graphs is not None:
            return self._replayed(self.graphs, batch, rate)
        for group in self.adam.param_groups:
            group["lr"] = rate
        return self._launched(batch)

    def _launched(self, batch: Batch) -> tuple[Tensor, Tensor]:
        result = self.gradients(batch)
        if self.config.grad_clip:
            self.clipped_from = self.world.accelerator.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        if self.world.accelerator.scaler is not None:
            self.optimizer.step()
        else:
            # What Accelerate's step comes to without a scaler, less its two searches of sys.path for an optional
            # package at every step: 0.1 ms on a local disk, more on one that a cluster shares.
            self.adam.fused_step()
        return result

    def _replayed(self, graphs: Graphs, batch: Batch, rate: float) -> tuple[Tensor, Tensor]:
        if rate != self.rate:
            self.adam.param_groups[0]["lr"].fill_(rate)
            self.rate = rate
        figures, self.clipped_from, *gradients = graphs.replay(kind_of(batch), batch.rows, self.action(batch))
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        assert figures is not None
        loss, correct = figures.clone()  # the next replay overwrites it
        return loss, correct

    def action(self, batch: Batch) -> Action:
        """A step on other rows in that batch's place, as `graphs` records it: [(loss, count), norm, gradients ...]."""

        def launch(rows: Tensor) -> list[Tensor | None]:
            loss, correct = self._launched(Batch(batch.split, rows, batch.global_size, batch.place))
            figures = torch.stack([loss, correct.to(loss.dtype)])
            return [figures, self.clipped_from, *(parameter.grad for parameter in self.parameters)]

        return launch

    def gradient_norm(self) -> Tensor:
        """Of the last step's gradient over all ranks, before clipping: a scalar that the next step may
        overwrite; NaN before the first."""
        if self.clipped_from is not None:
            return self.clipped_from
        gradients = [value.grad for value in self.net.parameters() if value.grad is not None]
        return torch.nn.utils.get_total_norm(gradients) if gradients else torch.tensor(math.nan)

    def gradients(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Forward and backward of a share, in `accumulate` parts; then the ranks exchange gradients, once. They take
        the place of what gradients there are.
        Returns this rank's part of the loss and its count, see `__call__`.

        A rank's loss is its sum / images in the global batch, x world size where DDP is to average over the ranks: the
        result is the true mean, also when the shares are uneven or one of them is empty.
        """
        if self.by_hand is None:  # asked once: it takes a hundredth of a small step
            self.by_hand = self.world.all(self.needs_no_autograd(batch.images))
        for parameter in self.parameters:
            parameter.grad = None
        if self.draws:
            torch.manual_seed(batch.seed)
        result = self._parts(batch)
        if self.by_hand and self.world.size > 1:
            self._exchange()
        return result

    def _parts(self, batch: Batch) -> tuple[Tensor, Tensor]:
        parts = max(1, min(self.config.accumulate, len(batch.labels)))  # none without an image
        if parts == 1:
            return self._part(batch.images, batch.labels, batch.global_size)
        accelerator = self.world.accelerator
        losses, counts = [], []
        shares = zip(batch.images.tensor_split(parts), batch.labels.tensor_split(parts), strict=True)
        for part, (images, labels) in enumerate(shares, start=1):
            with contextlib.nullcontext() if part == parts else accelerator.no_sync(self.model):
                loss, correct = self._part(images, labels, batch.global_size)
            losses.append(loss)
            counts.append(correct)
        return torch.stack(losses).sum(), torch.stack(counts).sum()

    def _part(self, images: Tensor, labels: Tensor, global_size: int) -> tuple[Tensor, Tensor]:
        if self.spare is not None and not len(labels):
            # Many networks cannot take an empty share: they get an image that counts for nothing.
            loss = 0 * F.cross_entropy(self.model(own_float(self.spare.images[:1])), self.spare.labels[:1])
            self._backward(loss)
            return loss.detach(), torch.zeros_like(loss)
        if self.by_hand:
            return self._without_autograd(images, labels, global_size)
        loss, correct = (self.compiled or self._forward)(images, labels, global_size)
        self._backward(loss * self.world.size if self.world.size > 1 else loss)
        return loss.detach(), correct

    def needs_no_autograd(self, images: Tensor) -> bool:
        """Whether `by_hand` is all of this rank's arithmetic: not what another network may do on the way, nor what is
        compiled or recorded, nor a scaled loss, nor what hooks are told, those of DDP's exchange among them (not its
        built-in ones, which leave no trace)."""
        net, model = self.net, self.model
        if self.name is not None or not isinstance(net, CNN) or type(net).forward is not FORWARD:
            return False
        if type(model) is nn.parallel.DistributedDataParallel and not (model._comm_hooks or _hooked(model)):
            model = model.module
        if model is not net or self.config.compile or self.graphs is not None:
            return False
        if self.world.accelerator.scaler is not None or torch.is_autocast_enabled("cpu") or torch.is_anomaly_enabled():
            return False
        if _hooked(net) or any(each._backward_hooks or each._post_accumulate_grad_hooks for each in self.parameters):
            return False
        trained = all(each.requires_grad for each in self.parameters)
        return trained and net.is_written_out(images) and self._loss_is_written_out(net)

    def _loss_is_written_out(self, net: CNN) -> bool:
        """Whether `by_hand` has the loss of `_forward`, which a fork may have changed, asked of noise and of a network
        that is the same everywhere; a warning where not."""
        classes = net.fc1.out_features
        with torch.enable_grad(), torch.device("cpu"), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            probe, other = copy.copy(self), CNN(net.conv1.in_channels, classes, self.config.widths)
            probe.net = probe.model = other
            probe.parameters = list(other.parameters())
            images = torch.randint(256, (4, net.conv1.in_channels, 28, 28), dtype=torch.uint8)
            labels = torch.arange(4) % classes
            try:
                if all(probe._has_this_loss(images, labels, global_size) for global_size in (4, 7)):
                    return True
            except Exception:
                log.debug("TrainStep._forward cannot be compared", exc_info=True)
        log.warning("TrainStep._forward is not what ddp_mnist.by_hand computes, and is taken as it is: slower.")
        return False

    def _has_this_loss(self, images: Tensor, labels: Tensor, global_size: int) -> bool:
        for parameter in self.parameters:
            parameter.grad = None
        loss, correct = self._forward(images, labels, global_size)
        loss.backward()
        found = [loss.detach(), correct.float(), *(parameter.grad for parameter in self.parameters)]
        loss, correct, gradients = by_hand.loss_and_gradients(
            to_float(images), labels, self.parameters, global_size, torch.float32
        )
        return alike([loss, correct.float(), *gradients], found)

    def _without_autograd(self, images: Tensor, labels: Tensor, global_size: int) -> tuple[Tensor, Tensor]:
        dtype = torch.bfloat16 if self.world.accelerator.mixed_precision == "bf16" else torch.float32
        found = by_hand.loss_and_gradients(to_float(images), labels, self.parameters, global_size, dtype)
        loss, correct, gradients = found
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if not _alike(gradient, parameter):  # fused Adam walks both in storage order
                gradient = torch.empty_like(parameter).copy_(gradient)
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return loss, correct

    def _exchange(self) -> None:
        """Each gradient becomes its sum over the ranks, in one exchange for all: what DDP does, when autograd's hooks
        have told it of each of them."""
        # In the order of memory, which is the parameter's own.
        flat = torch.cat([each.grad.as_strided((each.numel(),), (1,)) for each in self.parameters])  # type: ignore[union-attr]
        pieces = self.world.sum(flat).split([each.numel() for each in self.parameters])
        for parameter, piece in zip(self.parameters, pieces, strict=True):
            parameter.grad = piece.as_strided(parameter.shape, parameter.stride())

    def _backward(self, loss: Tensor) -> None:
        if self.world.accelerator.scaler is not None:
            self.world.accelerator.backward(loss)
        else:
            loss.backward()  # what Accelerate's comes to without a scaler, less a division by one

    # The same loss is in by_hand.loss_and_gradients: as long as they differ, a CPU takes this one, and more time.
    def _forward(self, images: Tensor, labels: Tensor, global_size: int) -> tuple[Tensor, Tensor]:
        logits = self.model(to_float(images))
        if self.triton:
            from ddp_mnist import kernels

            if kernels.takes_loss(logits, labels):
                return kernels.loss_and_count(logits, labels, global_size)
        if len(labels) == global_size:
            loss = F.cross_entropy(logits, labels)  # two operations less
        else:
            loss = F.cross_entropy(logits, labels, reduction="sum") / global_size
        return loss, (logits.detach().argmax(1) == labels).sum()

    def settle(self, batches: TrainBatches) -> None:
        """What must be done once before the first step; counts nothing and changes nothing.

        On one GPU its graphs are recorded. Among several ranks: two passes, as DDP, where it exchanges the gradients,
        regroups them after the first backward, which would change the order of sums between the first step of a run
        and the first step after a resume.
        """
        if self.graphs is not None:
            for start in (0, len(batches) - 1):
                batch = next(batches.epoch(0, start))
                self.graphs.recorded(kind_of(batch), batch.rows, self.action(batch))
            self.clipped_from = None
            self.optimizer.zero_grad()
        if self.world.size == 1:
            return
        batch = next(batches.epoch(0))
        buffers = [buffer.clone() for buffer in self.net.buffers()]
        for _ in range(2):
            self.gradients(batch)
        for buffer, before in zip(self.net.buffers(), buffers, strict=True):
            buffer.copy_(before)
        self.optimizer.zero_grad()


@torch.no_grad()
def _shaped(net: nn.Module, split: Split) -> None:
    """Give lazy layers their weights, by one image: Adam, DDP and the order in memory want to see them."""
    if any(nn.parameter.is_lazy(each) for each in (*net.parameters(), *net.buffers())):
        training = net.training
        net.eval()
        net(own_float(split.images[:1].cpu()))
        net.train(training)


def _hooked(net: nn.Module) -> bool:
    own = net._forward_hooks or net._forward_pre_hooks or net._backward_hooks or net._backward_pre_hooks
    return bool(own) or nn.modules.module._has_any_global_hook()


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape have the same order in memory."""
    if one.stride() == other.stride():
        return True
    strides = zip(one.stride(), other.stride(), one.shape, strict=True)
    return all(ours == theirs for ours, theirs, size in strides if size > 1)


def kind_of(batch: Batch) -> tuple[int, int]:
    """One rank's batches of one kind differ in nothing but their rows. A recording keeps its data set alive, so that no
    other gets its id."""
    return id(batch.split), len(batch)


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """The rate of optimizer step `step` (from 0): a function of the step alone, so resuming needs no state.

    onecycle is torch's OneCycleLR with linear warm-up over the first quarter and a cosine down; linear is its linear
    form, with warm-up over the first tenth. Both start at 1/25 of the peak and end at next to nothing.
    """
    if config.schedule == "constant":
        return config.lr
    warm_up = {"onecycle": 0.25, "linear": 0.1}[config.schedule]
    start, end, warm = config.lr / 25, config.lr / 250_000, warm_up * total_steps - 1
    if step < warm:
        return start + (config.lr - start) * step / warm
    done = (step - warm) / (total_steps - 1 - warm)
    left = {"onecycle": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done}
    return end + (config.lr - end) * left[config.schedule]
