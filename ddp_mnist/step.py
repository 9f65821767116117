"""One optimizer step: forward, backward, the optimizer; and the learning rate."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddp_mnist.cuda_graph import CUDAGraph, can_capture
from ddp_mnist.data.batches import Batch, Batches, to_float
from ddp_mnist.optimizer import Adam, make_adam, make_capturable, set_rate, state_tensors

if TYPE_CHECKING:
    from ddp_mnist.config import TrainConfig
    from ddp_mnist.distributed.context import Context

Loss = Callable[[Tensor, Tensor], Tensor]  # the network's outputs (n, ...), targets (n,) → one loss per item (n,)


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of each item (n,), of logits (n, classes) and classes (n,)."""
    return F.cross_entropy(outputs, targets, reduction="none")


class AutocastWrapper(nn.Module):
    """Forward to the network.

    Accelerate patches `forward` of the module that it prepares, to autocast. It patches this wrapper, so that the
    network itself stays as its author wrote it and is scored in fp32.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Return the network's outputs."""
        return self.network(images)


class TrainStep:
    """Network, loss and optimizer under Accelerate: one call is one optimizer step on this rank's part of a batch."""

    def __init__(
        self,
        config: TrainConfig,
        context: Context,
        network: nn.Module,
        *,
        loss: Loss = cross_entropy,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
        capture: bool = False,
    ) -> None:
        """Wrap the network, which is on the context's device, and make its optimizer. Collective.

        `loss` returns one loss per item; the step takes their mean over the global batch. `optimizer` makes that of a
        network; default: Adam. `capture`: run the step as a CUDA graph where possible, unless --no-cuda-graphs is set.
        """
        self.config, self.context, self.network, self.loss = config, context, network, loss
        self.optimizer = optimizer(network) if optimizer else make_adam(config, network)
        self.model: Any = self._wrap(network)
        if context.accelerator.scaler is not None:
            # Only fp16 needs Accelerate's optimizer, whose `step` searches sys.path: 15 % of a step on a CPU.
            self.optimizer = context.accelerator.prepare(self.optimizer, device_placement=[False])
        self._norm: Tensor | None = None
        """Norm of the last gradient, if clipping or a CUDA graph gave it; else None, and `.grad` has the gradient."""
        self._graph: CUDAGraph | None = None
        if can_capture(config, context, ours=capture) and isinstance(self.optimizer, Adam):
            make_capturable(self.optimizer)
            self._graph = CUDAGraph(self._run_captured, self._mutable_state)

    def _wrap(self, network: nn.Module) -> Any:
        # They are on the device. To see whether it may move them, Accelerate would import DTensor, and with it sympy.
        model = self.context.accelerator.prepare(AutocastWrapper(network), device_placement=[False])
        if self.config.compile:
            torch.compiler.reset()  # earlier compilations of this process count towards a limit
            model = torch.compile(model, dynamic=False)
        return model

    def __call__(self, batch: Batch, rate: float) -> tuple[Tensor, Tensor]:
        """Take one optimizer step at the learning rate `rate`.

        Returns:
            (loss, correct): this rank's share of each, as scalars on the device. Summed over the ranks they are the
            mean loss and the correct predictions of the global batch.
        """
        set_rate(self.optimizer, rate)
        self._seed(batch.seed)
        arguments = batch.images, batch.labels, batch.count, batch.global_size
        if self._graph is None:
            return self._run(*arguments)
        loss, correct, self._norm = self._graph(*arguments).unbind()
        return loss, correct

    def _run(self, images: Tensor, labels: Tensor, count: int, global_size: int) -> tuple[Tensor, Tensor]:
        self.optimizer.zero_grad()
        loss, correct = self._accumulate_gradients(images, labels, count, global_size)
        if self.config.grad_clip:
            parameters = self.network.parameters()
            self._norm = self.context.accelerator.clip_grad_norm_(parameters, self.config.grad_clip)
        self.optimizer.step()
        return loss, correct

    def _accumulate_gradients(
        self, images: Tensor, labels: Tensor, count: int, global_size: int
    ) -> tuple[Tensor, Tensor]:
        """Run forward and backward in `accumulate` parts; DDP averages the gradients over the ranks in the last one."""
        # A last batch may have fewer rows than parts. A dummy batch has one row, and is never split.
        parts = min(self.config.accumulate, len(labels))
        if parts == 1:
            return self._forward_backward(images, labels, count, global_size)
        results = []
        for number, part in enumerate(zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True), 1):
            last = number == parts
            with contextlib.nullcontext() if last else self.context.accelerator.no_sync(self.model):
                results.append(self._forward_backward(*part, len(part[1]), global_size))
        losses, correct = zip(*results, strict=True)
        return torch.stack(losses).sum(), torch.stack(correct).sum()

    def _forward_backward(self, images: Tensor, labels: Tensor, count: int, global_size: int) -> tuple[Tensor, Tensor]:
        outputs = self.model(to_float(images))
        # A rank with no item in this batch runs a dummy item: `count` 0 drops its loss, and its gradient is zero.
        loss = self.loss(outputs, labels)[:count].sum() / global_size
        # `loss` is divided by the whole global batch, and DDP divides the sum of the ranks' gradients by the world size
        # once more. Times the world size, the gradient is that of the global mean, however uneven the shares.
        # (Add a term that is not per item, such as a weight penalty, times count / global_size.)
        self.context.accelerator.backward(loss * self.context.world_size)
        correct = (outputs.detach().argmax(1) == labels)[:count].sum()
        return loss.detach(), correct

    def gradient_norm(self) -> Tensor:
        """Return the norm of the last step's gradient over all ranks, before clipping; NaN before the first step."""
        if self._norm is not None:
            return self._norm
        gradients = [each.grad for each in self.network.parameters() if each.grad is not None]
        return nn.utils.get_total_norm(gradients) if gradients else torch.tensor(math.nan)

    @property
    def was_skipped(self) -> bool:
        """Return whether fp16's loss scaler has left out the last step."""
        return self.context.accelerator.optimizer_step_was_skipped

    def _seed(self, seed: int) -> None:
        # Not torch.manual_seed: it formats a stack trace for CUDA's sake, 265 us instead of 2.
        torch.default_generator.manual_seed(seed)
        if self.context.device.type != "cpu":
            torch.get_device_module(self.context.device).manual_seed(seed)

    def warm_up(self, batches: Batches) -> None:
        """Let DDP order its buckets, and capture the CUDA graphs. Collective.

        Weights, buffers and random state stay as they are.

        DDP reorders its buckets in the forward after the first backward, which changes the order of sums at 3 and more
        ranks. Two passes put that before step 1, so that a new run and a resumed one sum in the same order.
        """
        device = self.context.device
        buffers = [buffer.clone() for buffer in self.network.buffers()]
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            batch = next(batches.epoch(0))
            for number in range(2 if torch.distributed.is_initialized() else 0):  # also with one rank of torchrun
                self.optimizer.zero_grad()
                self._accumulate_gradients(batch.images, batch.labels, batch.count, batch.global_size)
                if number == 0 and any(each.requires_grad and each.grad is None for each in self.network.parameters()):
                    # A layer that `forward` does not use: DDP has to be made anew to look for it in every step.
                    self.context.accelerator._models.clear()
                    self.context.accelerator.ddp_handler.find_unused_parameters = True
                    self.model = self._wrap(self.network)
            for buffer, before in zip(self.network.buffers(), buffers, strict=True):
                buffer.copy_(before)
            if self._graph is not None:
                for start in (0, len(batches) - 1):  # the last batch of an epoch may be smaller
                    batch = next(batches.epoch(0, start))
                    self._graph.capture(batch.images, batch.labels, batch.count, batch.global_size)
        self._norm = None
        self.optimizer.zero_grad()

    def close(self) -> None:
        """Release DDP, the graphs and the compiled network. Call it before the process group is destroyed.

        The last reference to the group would otherwise wait for gloo's threads while it holds Python's lock, which one
        of them may want (pytorch#56297: seen with torch 2.11).
        """
        self._graph, self.model = None, self.network

    def _run_captured(self, *arguments: Any) -> Tensor:
        """Run one step; return loss, correct and the gradient's norm as one tensor.

        The norm is computed inside, since `.grad` belongs to the graph that was captured last.
        """
        self._norm = None
        loss, correct = self._run(*arguments)
        return torch.stack([loss, correct.to(loss.dtype), self.gradient_norm()])

    def _mutable_state(self) -> list[Tensor]:
        return [*self.network.parameters(), *self.network.buffers(), *state_tensors(self.optimizer)]


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """Return the rate of optimizer step `step` (from 0). It follows from the step alone: resuming needs no state.

    onecycle rises in a straight line over the first quarter of all steps and falls along a cosine; linear rises over
    the first tenth and falls in a straight line. As torch's OneCycleLR, from 1/25 of the peak and to 1/250,000.
    """
    if config.schedule == "constant":
        return config.lr
    start, end = config.lr / 25, config.lr / 250_000
    peak_step = (0.25 if config.schedule == "onecycle" else 0.1) * total_steps - 1
    if step < peak_step:
        return start + (config.lr - start) * step / peak_step
    passed = (step - peak_step) / (total_steps - 1 - peak_step)  # 0 at the peak, 1 at the last step
    height = (1 + math.cos(math.pi * passed)) / 2 if config.schedule == "onecycle" else 1 - passed
    return end + (config.lr - end) * height
