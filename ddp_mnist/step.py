"""One optimizer step: forward, backward, the optimizer; and the learning rate."""

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from accelerate.utils import recursively_apply
from torch import Tensor, nn

from ddp_mnist.cuda_graph import CUDAGraph
from ddp_mnist.data.batches import Batch, Batches, seed_generators, to_float
from ddp_mnist.model import CNN
from ddp_mnist.optimizer import Adam, MakeOptimizer, build_optimizer, describe, make_capturable, set_rates

if TYPE_CHECKING:
    from ddp_mnist.config import TrainConfig
    from ddp_mnist.distributed.context import Context

Loss = Callable[[Any, Tensor], Tensor]  # the network's outputs, targets (n, ...) → one value per item (n,)


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the cross entropy of each item, (n,), from logits (n, classes) and class labels (n,)."""
    return F.cross_entropy(outputs, targets, reduction="none")


def call(network: Any, inputs: Any) -> Any:
    """Return the network's outputs for inputs as a data set has them: a dict's entries are keyword arguments."""
    inputs = recursively_apply(to_float, inputs)
    if isinstance(inputs, Mapping):
        return network(**inputs)
    return network(*inputs) if isinstance(inputs, tuple | list) else network(inputs)


class AutocastWrapper(nn.Module):
    """Forward to the network.

    Accelerate adds autocast by patching `forward` of the module that it prepares. That module is this wrapper, so the
    network itself stays as its author wrote it and is scored in fp32.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Return the network's outputs."""
        return self.network(*inputs, **named)


class TrainStep:
    """Network, loss and optimizer under Accelerate: one call is one optimizer step on this rank's part of a batch."""

    def __init__(
        self,
        config: "TrainConfig",
        context: "Context",
        network: nn.Module,
        *,
        loss: Loss = cross_entropy,
        optimizer: MakeOptimizer | None = None,
        classes: int | None = None,
    ) -> None:
        """Wrap the network, which is on the context's device, and make its optimizer. Collective.

        `loss` returns one value per item; the step takes their mean over the global batch. `optimizer`: a function,
        network → its optimizer; None: Adam. `classes`: how many there are; None: no labels, nothing counts as correct.
        """
        self.config, self.context, self.network, self.loss, self.classes = config, context, network, loss, classes
        self.optimizer = build_optimizer(config, optimizer, network)
        self.optimizer_identity = describe(network, self.optimizer)
        unchanged = {type(each) for each in network.modules()} == {CNN, nn.Conv2d, nn.MaxPool2d, nn.Linear}
        self._is_builtin = unchanged and loss is cross_entropy
        self._trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.wrapped: Any = self._wrap(network)
        if context.accelerator.scaler is not None:
            # Only fp16 needs Accelerate's optimizer, whose slow `step` searches sys.path at each call.
            # A fused optimizer with this mark skips steps itself, and nobody sees it. Without it the scaler skips them.
            vars(self.optimizer).pop("_step_supports_amp_scaling", None)
            self.optimizer = context.accelerator.prepare(self.optimizer, device_placement=[False])
        self._norm: Tensor | None = None
        """Norm of the last step's gradient if clipping or a CUDA graph computed it; None: compute it from `.grad`."""
        self._graph: CUDAGraph | None = None
        if self._can_capture() and isinstance(self.optimizer, Adam):
            make_capturable(self.optimizer)
            self._graph = CUDAGraph(self._run_captured, self._mutable_state)

    def _can_capture(self) -> bool:
        # Not with DDP, nor with fp16, whose scaler decides on the CPU whether to step, nor on ROCm (not tested).
        context, asked = self.context, self.config.cuda_graphs
        single_gpu = context.device.type == "cuda" and context.world_size == 1 and torch.version.hip is None
        return single_gpu and context.accelerator.scaler is None and (self._is_builtin if asked is None else asked)

    def _wrap(self, network: nn.Module) -> Any:
        # The weights are on the device already; to move them, Accelerate would import DTensor and sympy.
        wrapped = self.context.accelerator.prepare(AutocastWrapper(network), device_placement=[False])
        if self.config.compile:
            torch.compiler.reset()  # earlier compilations in this process count towards a limit
            wrapped = torch.compile(wrapped, dynamic=False)
        return wrapped

    def __call__(self, batch: Batch, factor: float) -> tuple[Tensor, Tensor]:
        """Take one optimizer step; each group's learning rate is `factor`, 0-1, times its peak.

        Return (loss, correct): this rank's share of each, as scalars on the device. Summed over the ranks they are the
        mean loss and the number of correct predictions of the global batch.
        """
        set_rates(self.optimizer, factor)
        if not self._is_builtin:  # the built-in CNN draws no random numbers
            seed_generators(batch.seed, self.context.device)
        arguments = batch.inputs, batch.targets, batch.count, batch.global_size
        if self._graph is None:
            return self._run(*arguments)
        loss, correct, self._norm = self._graph(*arguments).unbind()
        return loss, correct

    def _run(self, inputs: Any, targets: Tensor, count: int, global_size: int) -> tuple[Tensor, Tensor]:
        self.network.zero_grad()  # not the optimizer's, which may leave out parameters
        loss, correct = self._accumulate_gradients(inputs, targets, count, global_size)
        if self.config.grad_clip:
            self._norm = self.context.accelerator.clip_grad_norm_(self._trained, self.config.grad_clip)
        self.optimizer.step()
        return loss, correct

    def _accumulate_gradients(
        self, inputs: Any, targets: Tensor, count: int, global_size: int
    ) -> tuple[Tensor, Tensor]:
        """Run forward and backward in `accumulate` parts; DDP averages gradients over the ranks in the last part."""
        # An epoch's last batch may have fewer rows than parts. A dummy batch is never split.
        parts = min(self.config.accumulate, count) or 1
        if parts == 1:
            return self._forward_backward(inputs, targets, count, global_size)
        results = []
        for number in range(parts):
            some_inputs, some_targets = recursively_apply(
                lambda t, i=number: t.tensor_split(parts)[i], (inputs, targets)
            )
            last = number == parts - 1
            with contextlib.nullcontext() if last else self.context.accelerator.no_sync(self.wrapped):
                results.append(self._forward_backward(some_inputs, some_targets, len(some_targets), global_size))
        losses, correct = zip(*results, strict=True)
        return torch.stack(losses).sum(), torch.stack(correct).sum()

    def _forward_backward(self, inputs: Any, targets: Tensor, count: int, global_size: int) -> tuple[Tensor, Tensor]:
        outputs = call(self.wrapped, inputs)
        # A rank with no item in this batch runs dummies: `count` is 0, which drops their loss: the gradient is zero.
        loss = self.loss(outputs, targets)[:count].sum() / global_size
        # `loss` is already divided by the size of the global batch. DDP also divides the sum of the ranks' gradients by
        # the world size; the factor below undoes that. So uneven shares, too, give the gradient of the global mean.
        # To penalize weights, add `loss = loss + penalty * count / global_size` here: over all ranks it counts once.
        self.context.accelerator.backward(loss * self.context.world_size)
        if self.classes is None:
            return loss.detach(), torch.zeros_like(loss)
        correct = (outputs.detach().argmax(1) == targets)[:count].sum()
        return loss.detach(), correct

    def gradient_norm(self) -> Tensor:
        """Return the norm of the last step's gradient over all ranks, before clipping; NaN before the first step."""
        if self._norm is not None:
            return self._norm
        gradients = [each.grad for each in self._trained if each.grad is not None]
        return nn.utils.get_total_norm(gradients) if gradients else torch.tensor(math.nan)

    @property
    def rate(self) -> float:
        """Return the first group's learning rate in the last step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def rehearse(self, batches: Batches) -> None:
        """Let DDP order its buckets and find unused layers, and capture the CUDA graphs. Collective.

        DDP reorders its buckets in the forward after the first backward, which changes the order of sums at 3 and more
        ranks. Two passes here make it do so before step 1: a new run and a resumed run then sum in the same order.
        Weights, buffers and random state stay as they were.
        """
        if self.context.world_size == 1 and self._graph is None:
            return
        device = self.context.device
        buffers = [buffer.clone() for buffer in self.network.buffers()]
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            batch = self.context.run_on_all_ranks(batches.sample)
            arguments = batch.inputs, batch.targets, batch.count, batch.global_size
            if self.context.world_size > 1:
                with self.context.accelerator.no_sync(self.wrapped):  # else DDP waits for gradients that never come
                    self._accumulate_gradients(*arguments)
                unused = any(each.requires_grad and each.grad is None for each in self.network.parameters())
                if self.context.sum(torch.tensor(float(unused), device=device)):
                    # A layer that `forward` does not use, on one rank or all: DDP must look for it in every step.
                    self.context.accelerator._models.clear()
                    self.context.accelerator.ddp_handler.find_unused_parameters = True
                    self.wrapped = self._wrap(self.network)
                for _ in range(2):
                    self.network.zero_grad()
                    self._accumulate_gradients(*arguments)
            for buffer, before in zip(self.network.buffers(), buffers, strict=True):
                buffer.copy_(before)
            if not isinstance(batch.inputs, Tensor):
                self._graph = None  # a CUDAGraph copies tensors, but no tuples or dicts of tensors
            if self._graph is not None:
                for start in (0, len(batches) - 1):  # the last batch of an epoch may be smaller
                    batch = batches.sample(start)
                    self._graph.capture(batch.inputs, batch.targets, batch.count, batch.global_size)
        self._norm = None
        self.network.zero_grad()

    def close(self) -> None:
        """Release DDP, the graphs and the compiled network. Call it before the process group is destroyed.

        Otherwise freeing the last reference to the group waits for gloo's threads and holds the GIL, which one of those
        threads may need (pytorch#56297: seen with torch 2.11).
        """
        self._graph, self.wrapped = None, self.network

    def _run_captured(self, *arguments: Any) -> Tensor:
        """Run one step; return loss, correct and the gradient's norm as one tensor.

        The graph includes the norm: each graph has its own gradients, and `.grad` belongs to the last captured graph.
        """
        self._norm = None
        loss, correct = self._run(*arguments)
        return torch.stack([loss, correct.to(loss.dtype), self.gradient_norm()])

    def _mutable_state(self) -> list[Tensor]:
        state = [tensor for each in self.optimizer.state.values() for tensor in each.values()]
        return [*self.network.parameters(), *self.network.buffers(), *state]


def rate_factor(config: "TrainConfig", step: int, total_steps: int) -> float:
    """Return the learning rate of optimizer step `step` (from 0) as a fraction, 0-1, of the peak.

    It depends on the step alone: resuming needs no state. onecycle rises in a straight line over the first quarter of
    all steps and falls along a cosine; linear rises over the first tenth and falls in a straight line. Both begin
    at 1/25 of the peak and end at 1/250,000 of it, as torch's OneCycleLR does.
    """
    if config.schedule == "constant":
        return 1.0
    start, end = 1 / 25, 1 / 250_000
    peak_step = (0.25 if config.schedule == "onecycle" else 0.1) * total_steps - 1
    if step < peak_step:
        return start + (1 - start) * step / peak_step
    passed = (step - peak_step) / (total_steps - 1 - peak_step)  # 0 at the peak, 1 at the last step
    height = (1 + math.cos(math.pi * passed)) / 2 if config.schedule == "onecycle" else 1 - passed
    return end + (1 - end) * height
