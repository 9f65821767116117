"""The training step against the same arithmetic written plainly, and what a start must not cost."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jobs
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from tutorial import TutorialCNN

from ddp_mnist import CNN, TrainConfig
from ddp_mnist.data.batches import Batch, Batches, TensorSet
from ddp_mnist.distributed.context import Context
from ddp_mnist.step import TrainStep

CONFIG = TrainConfig(threads=1, wandb="disabled", mixed_precision="no")


@pytest.fixture
def context(process_of_a_job: None) -> Iterator[Context]:
    with Context(CONFIG) as found:
        yield found


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    """Fifty steps; the last batch of an epoch, every eighth, has 52 images instead of 64."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (500, 1, 28, 28), generator=generator, dtype=torch.uint8)
    split = TensorSet(images, torch.randint(0, 10, (500,), generator=generator))
    made = Batches(split, batch_size=64, rank=0, world_size=1, seed=0)
    return list(itertools.islice(itertools.chain.from_iterable(made.epoch(epoch) for epoch in range(10)), 50))


def make_step(context: Context, config: TrainConfig = CONFIG, **options: Any) -> TrainStep:
    torch.manual_seed(0)
    return TrainStep(config, context, CNN().to(memory_format=torch.channels_last), **options)


def changed_tensors(step: TrainStep, batch: Batch) -> set[str]:
    """Take a step. Return the names of the weights that it has changed."""
    before = {name: value.clone() for name, value in step.network.state_dict().items()}
    step(batch, 1.0)
    return {name for name, value in step.network.state_dict().items() if not torch.equal(value, before[name])}


def train_plainly(
    network: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Batch], grad_clip: float = 0.0, **options: Any
) -> tuple[list[float], list[float]]:
    """Train as the tutorial writes it: whole batches, torch's mean. Return each step's loss and gradient norm."""
    losses, norms = [], []
    for batch in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(network(batch.inputs.float() / 255), batch.targets, **options)
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(network.parameters(), grad_clip or float("inf")).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


def sgd(network: nn.Module) -> torch.optim.Optimizer:
    """Return an optimizer whose steps are as long as the gradient: unlike Adam's they show a loss that is scaled."""
    return torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize(("accumulate", "grad_clip"), [(1, 0.0), (2, 0.3), (4, 0.0)])
def test_the_loss_is_the_mean_cross_entropy_over_the_global_batch(
    context: Context, batches: list[Batch], accumulate: int, grad_clip: float
) -> None:
    """Also that of the epoch's smaller last batch, and in however many parts it is computed."""
    step = make_step(context, CONFIG.replace(accumulate=accumulate, grad_clip=grad_clip), optimizer=sgd)
    losses, norms = [], []
    for batch in batches[:10]:
        losses.append(step(batch, 1.0)[0].item())
        norms.append(step.gradient_norm().item())
    torch.manual_seed(0)
    network = CNN()
    expected, expected_norms = train_plainly(network, sgd(network), batches[:10], grad_clip)
    assert len(batches[7].targets) == 52
    assert not grad_clip or min(expected_norms) < grad_clip < max(expected_norms)
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(norms, expected_norms, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(step.network.state_dict(), network.state_dict(), rtol=0, atol=1e-6)


def test_another_loss_is_trained_with(context: Context, batches: list[Batch]) -> None:
    smooth = functools.partial(F.cross_entropy, reduction="none", label_smoothing=0.2)
    step = make_step(context, CONFIG.replace(accumulate=2), loss=smooth, optimizer=sgd)
    losses = [step(batch, 1.0)[0].item() for batch in batches[:10]]
    torch.manual_seed(0)
    network = CNN()
    expected, _ = train_plainly(network, sgd(network), batches[:10], label_smoothing=0.2)
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(step.network.state_dict(), network.state_dict(), rtol=0, atol=1e-6)


def test_fifty_steps_are_the_tutorials_but_for_rounding(context: Context, batches: list[Batch]) -> None:
    """The tutorial has another memory layout, another order of ReLU and pooling, and an Adam in separate operations."""
    step = make_step(context)
    for batch in batches:
        step(batch, 1.0)
    torch.manual_seed(0)
    network = TutorialCNN()
    train_plainly(network, torch.optim.Adam(network.parameters(), lr=1e-3), batches)
    torch.testing.assert_close(step.network.state_dict(), network.state_dict(), rtol=1e-3, atol=1e-4)


def test_a_hook_on_a_layer_changes_what_is_trained(context: Context, batches: list[Batch]) -> None:
    step = make_step(context)
    step.network.conv2.register_full_backward_hook(lambda layer, into, out: (into[0] * 0,))
    assert changed_tensors(step, batches[0]) == {"conv2.weight", "conv2.bias", "fc1.weight", "fc1.bias"}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_every_step_is_a_backward_of_accelerate(
    context: Context, batches: list[Batch], monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    """One for each part of the batch; without them nothing is learned."""
    step, calls = make_step(context, CONFIG.replace(accumulate=accumulate)), []
    monkeypatch.setattr(Accelerator, "backward", lambda self, loss, **_: calls.append(loss))
    assert changed_tensors(step, batches[0]) == set()
    assert len(calls) == accumulate


def test_a_step_that_fp16_overflows_is_skipped_and_counted(context: Context, batches: list[Batch]) -> None:
    """As on a GPU, but for the kernels: the scaler works on a CPU, where fp16 itself is refused."""
    context.accelerator.scaler = torch.amp.GradScaler("cpu")
    step = make_step(context, CONFIG.replace(mixed_precision="fp16"))
    step.network.fc1.bias.register_hook(lambda gradient: gradient / (number > 2))
    for number, batch in enumerate(batches[:6]):
        changed = changed_tensors(step, batch)
        assert step.context.accelerator.optimizer_step_was_skipped == (number <= 2) == (not changed)


@pytest.mark.slow
def test_a_compiled_network_trains_to_the_same_bits(
    context: Context, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own compiler, but for its last stage, which needs a C++ compiler: what it has traced runs as it is."""
    traced: list[list[int]] = []

    def run_as_traced(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        (images,) = (value for value in inputs if value.shape[1:] == (1, 28, 28))
        traced.append(list(images.shape))
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=run_as_traced))
    plain, compiled = make_step(context), make_step(context, CONFIG.replace(compile=True))
    for batch in batches:
        plain(batch, 1e-3)
        compiled(batch, 1e-3)
    torch.compiler.reset()
    torch.testing.assert_close(compiled.network.state_dict(), plain.network.state_dict(), rtol=0, atol=0)
    assert traced == [[64, 1, 28, 28], [52, 1, 28, 28]]  # an epoch's last batch has a graph of its own


@pytest.mark.slow
def test_one_process_starts_without_torchs_compiler(flags: list[str], tmp_path: Path) -> None:
    """A second of each start, which torch's optimizers take for it, and half a second, which Accelerate does."""
    command = [jobs.TRAIN[0], "-X", "importtime", *jobs.TRAIN[1:], *flags, "--max-steps", "2"]
    ended = jobs.run([*command, "--output-dir", str(tmp_path)])
    assert ended.code == 0, ended.err
    imported = set(re.findall(r"^import time:.*\| +(\S+)$", ended.err, re.MULTILINE))
    assert "torch.optim" in imported
    assert not imported & {"torch._dynamo", "torch.distributed.tensor", "sympy", "torchvision", "matplotlib", "wandb"}
