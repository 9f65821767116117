"""The training step against the same arithmetic written plainly, and what its optimizer must not cost."""

from __future__ import annotations

import functools
import itertools
import os
import platform
import re
import sys
from collections import Counter
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

from ddp_mnist import CNN, TrainConfig, fit
from ddp_mnist.data.batches import Batch, Batches, Split
from ddp_mnist.distributed.context import Context
from ddp_mnist.evaluate import evaluate
from ddp_mnist.program import Program
from ddp_mnist.step import TrainStep

CONFIG = TrainConfig(threads=1, wandb="disabled", mixed_precision="no")


@pytest.fixture
def context(process_of_a_job: None) -> Iterator[Context]:
    with Context(CONFIG) as found:
        yield found


@pytest.fixture(scope="module")
def split() -> Split:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (500, 1, 28, 28), generator=generator, dtype=torch.uint8)
    return Split(images, torch.randint(0, 10, (500,), generator=generator))


@pytest.fixture(scope="module")
def batches(split: Split) -> list[Batch]:
    """Fifty steps; the last batch of an epoch, every eighth, has 52 images instead of 64."""
    made = Batches(split, batch_size=64, rank=0, world_size=1, seed=0)
    return list(itertools.islice(itertools.chain.from_iterable(made.epoch(epoch) for epoch in range(10)), 50))


def make_step(context: Context, config: TrainConfig = CONFIG, **options: Any) -> TrainStep:
    return TrainStep(config, context, Program().build_network(config, context, None), **options)


def state_of(step: TrainStep) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in step.network.state_dict().items()}


def assert_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def train_plainly(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    *,
    grad_clip: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[list[float], list[float]]:
    """Train as the tutorial writes it: whole batches, torch's mean. Return each step's loss and gradient norm."""
    losses, norms = [], []
    for batch in batches:
        optimizer.zero_grad()
        outputs = network(batch.images.float() / 255)
        loss = F.cross_entropy(outputs, batch.labels, label_smoothing=label_smoothing)
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(network.parameters(), grad_clip or float("inf")).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


def sgd(network: nn.Module) -> torch.optim.Optimizer:
    """Unlike Adam's, its steps are as long as the gradient: a loss that is off by a factor shows."""
    return torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("grad_clip", [0.0, 0.3])
def test_the_loss_is_the_mean_cross_entropy_over_the_global_batch(
    context: Context, batches: list[Batch], accumulate: int, grad_clip: float
) -> None:
    """Also of the epoch's smaller last batch, and whatever the parts that it is computed in."""
    step = make_step(context, CONFIG.replace(accumulate=accumulate, grad_clip=grad_clip), optimizer=sgd)
    losses, norms = [], []
    for batch in batches[:10]:
        losses.append(step(batch, 0.1)[0].item())
        norms.append(step.gradient_norm().item())
    torch.manual_seed(0)
    network = CNN()
    expected, expected_norms = train_plainly(network, sgd(network), batches[:10], grad_clip=grad_clip)
    assert len(batches[7].labels) == 52
    assert not grad_clip or min(expected_norms) < grad_clip < max(expected_norms)
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(norms, expected_norms, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(step.network.state_dict(), network.state_dict(), rtol=0, atol=1e-6)


def test_another_loss_is_trained_with(context: Context, batches: list[Batch]) -> None:
    smooth = functools.partial(F.cross_entropy, reduction="none", label_smoothing=0.2)
    step = make_step(context, CONFIG.replace(accumulate=2), loss=smooth, optimizer=sgd)
    losses = [step(batch, 0.1)[0].item() for batch in batches[:10]]
    torch.manual_seed(0)
    network = CNN()
    expected, _ = train_plainly(network, sgd(network), batches[:10], label_smoothing=0.2)
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(step.network.state_dict(), network.state_dict(), rtol=0, atol=1e-6)
    other = make_step(context, optimizer=sgd)
    for batch in batches[:10]:
        other(batch, 0.1)
    assert (other.network.fc1.weight - step.network.fc1.weight).abs().max() > 1e-3


def test_fifty_steps_are_the_tutorials_but_for_rounding(context: Context, batches: list[Batch]) -> None:
    """The tutorial has another memory layout, another order of ReLU and pooling, and an Adam in separate operations."""
    step = make_step(context)
    for batch in batches:
        step(batch, 1e-3)
    torch.manual_seed(0)
    network = TutorialCNN()
    train_plainly(network, torch.optim.Adam(network.parameters(), lr=1e-3), batches)
    torch.testing.assert_close(step.network.state_dict(), network.state_dict(), rtol=1e-3, atol=1e-4)


def test_hooks_on_layers_run_in_training_and_in_scoring(context: Context, batches: list[Batch], split: Split) -> None:
    step = make_step(context)
    calls: Counter[str] = Counter()

    def count(name: str, *_: Any) -> None:
        calls[name] += 1

    for name in ("conv1", "conv2", "fc1"):
        layer = getattr(step.network, name)
        layer.register_forward_pre_hook(functools.partial(count, f"{name} before"))
        layer.register_forward_hook(functools.partial(count, f"{name} after"))
        layer.register_full_backward_pre_hook(functools.partial(count, f"{name} backward"))
    step(batches[0], 1e-3)
    assert len(calls) == 9 and set(calls.values()) == {1}
    calls.clear()
    evaluate(step.network, split, context)
    assert len(calls) == 6 and min(calls.values()) >= 2  # 500 images are two chunks


def test_a_hook_on_a_layer_changes_what_is_trained(context: Context, batches: list[Batch]) -> None:
    step = make_step(context)
    step.network.conv2.register_full_backward_hook(lambda layer, into, out: (into[0] * 0,))
    before = state_of(step)
    step(batches[0], 1e-3)
    changed = {name for name, value in state_of(step).items() if not torch.equal(value, before[name])}
    assert changed == {"conv2.weight", "conv2.bias", "fc1.weight", "fc1.bias"}


def linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


@pytest.mark.parametrize("model", [None, linear], ids=["ours", "a user's"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_every_step_is_a_backward_of_accelerate(
    tiny: Path,
    tmp_path: Path,
    process_of_a_job: None,
    monkeypatch: pytest.MonkeyPatch,
    model: Callable[[], nn.Module] | None,
    accumulate: int,
) -> None:
    """Counted in a whole run."""
    steps, backward, call = [0], Accelerator.backward, TrainStep.__call__
    backwards: Counter[int] = Counter()

    def counted_backward(self: Accelerator, loss: Tensor, **options: Any) -> None:
        backwards[steps[0]] += 1
        backward(self, loss, **options)

    def counted_step(self: TrainStep, *arguments: Any) -> Any:
        steps[0] += 1
        return call(self, *arguments)

    monkeypatch.setattr(Accelerator, "backward", counted_backward)
    monkeypatch.setattr(TrainStep, "__call__", counted_step)
    config = CONFIG.replace(dataset="fashion-mnist", data_dir=tiny, output_dir=tmp_path, epochs=1, pictures=False)
    result = fit(config.replace(batch_size=60, accumulate=accumulate), model=model)
    assert steps == [26] == [result.summary["steps"]]
    # The epoch's last batch is a single image.
    assert backwards == dict.fromkeys(range(1, 26), accumulate) | {26: 1}


def test_no_gradient_comes_from_anywhere_else(
    context: Context, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Accelerator, "backward", lambda *_, **__: None)
    step = make_step(context)
    before = state_of(step)
    step(batches[0], 1e-3)
    assert_bits(state_of(step), before)


def test_a_step_that_fp16_overflows_is_skipped_and_counted(context: Context, batches: list[Batch]) -> None:
    """As on a GPU, but for the kernels: the scaler works on a CPU, where fp16 itself is refused."""
    context.accelerator.scaler = torch.amp.GradScaler("cpu")
    step = make_step(context, CONFIG.replace(mixed_precision="fp16"))
    step.network.fc1.bias.register_hook(lambda gradient: gradient / (number > 2))
    before = state_of(step)
    for number, batch in enumerate(batches[:6]):
        step(batch, 1e-3)
        assert step.was_skipped == (number <= 2)
        same = all(torch.equal(value, before[name]) for name, value in step.network.state_dict().items())
        assert same == (number <= 2)


@pytest.mark.slow
def test_a_compiled_network_trains_to_the_same_bits(
    context: Context, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own compiler, but for its last stage, which needs a C++ compiler: what it has traced runs as it is."""
    traced: list[list[int]] = []

    def as_it_is(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        (images,) = (value for value in inputs if value.shape[1:] == (1, 28, 28))
        traced.append(list(images.shape))
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=as_it_is))
    plain, compiled = make_step(context), make_step(context, CONFIG.replace(compile=True))
    for batch in batches:
        plain(batch, 1e-3)
        compiled(batch, 1e-3)
    torch.compiler.reset()
    assert_bits(state_of(compiled), state_of(plain))
    assert traced == [[64, 1, 28, 28], [52, 1, 28, 28]]  # an epoch's last batch has a graph of its own


@pytest.mark.slow
def test_one_process_starts_without_torchs_compiler(tiny: Path, tmp_path: Path) -> None:
    """Of each start, a second that torch's optimizers take for it, and half a second that Accelerate does."""
    command = [
        jobs.TRAIN[0],
        "-X",
        "importtime",
        *jobs.TRAIN[1:],
        "--dataset",
        "fashion-mnist",
        "--data-dir",
        str(tiny),
    ]
    flags = ["--wandb", "disabled", "--no-pictures", "--max-steps", "2", "--output-dir", str(tmp_path)]
    ended = jobs.run([*command, *flags])
    assert ended.code == 0, ended.err
    imported = set(re.findall(r"^import time:.*\| +(\S+)$", ended.err, re.MULTILINE))
    assert "torch.optim" in imported
    assert not imported & {"torch._dynamo", "torch.distributed.tensor", "sympy", "torchvision", "matplotlib", "wandb"}


FAULTS = """
import resource, statistics, torch
from ddp_mnist import TrainConfig
from ddp_mnist.distributed.context import Context

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    activations = [torch.ones(1 << 19) for _ in range(40)]  # 2 MiB each
    del activations
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with Context(TrainConfig(threads=1)):
    rounds = [faults() for _ in range(10)]
assert rounds[0] > 10, rounds  # it counts
print(statistics.median(rounds[1:]))
"""


def pages_of_a_round(*variables: str) -> float:
    tuned = [name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]
    untuned = ["env", *(word for name in tuned for word in ("-u", name))]
    ended = jobs.run([*untuned, *variables, sys.executable, "-c", FAULTS])
    assert ended.code == 0, ended.err
    return float(ended.out)


glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")


@pytest.mark.slow
@glibc
def test_memory_that_a_step_frees_stays_for_the_next() -> None:
    assert pages_of_a_round() < 10  # 20,448 are given back and taken again otherwise, or 40 huge ones


@pytest.mark.slow
@glibc
def test_an_allocator_that_the_user_has_tuned_is_left_alone() -> None:
    assert pages_of_a_round("MALLOC_MMAP_THRESHOLD_=65536") > 10  # each tensor has pages of its own
