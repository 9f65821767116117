"""The training step against the same arithmetic written plainly, and what its optimizer must not cost."""

from __future__ import annotations

import functools
import itertools
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jobs
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from tutorial import TutorialCNN

from ddp_mnist import CNN, TrainConfig, fit
from ddp_mnist.data import Batch, Split, TrainBatches, to_float
from ddp_mnist.step import Adam, TrainStep
from ddp_mnist.world import World

STEPS = 50


CONFIG = TrainConfig(threads=1, wandb="disabled")


@pytest.fixture
def world(process_of_a_job: None) -> Iterator[World]:
    with World(CONFIG) as found:
        yield found


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (500, 1, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (500,), generator=generator)
    made = TrainBatches(Split(images, labels), batch_size=64, rank=0, world_size=1, seed=0)  # the last one has 52
    return list(itertools.islice(itertools.chain.from_iterable(made.epoch(epoch) for epoch in range(10)), STEPS))


def trained(world: World, batches: list[Batch], config: TrainConfig = CONFIG) -> dict[str, torch.Tensor]:
    step = TrainStep(config, world)
    for batch in batches:
        step(batch, CONFIG.lr)
    return step.snapshot()[0]


def trained_plainly(net: nn.Module, batches: list[Batch], *, fused: bool) -> dict[str, torch.Tensor]:
    """As the tutorial writes it, with torch's own optimizer."""
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=fused)
    for batch in batches:
        optimizer.zero_grad()
        F.cross_entropy(net(to_float(batch.images)), batch.labels).backward()
        optimizer.step()
    return net.state_dict()


def test_fifty_steps_are_those_of_torchs_own_fused_adam_bit_for_bit(world: World, batches: list[Batch]) -> None:
    found = trained(world, batches)
    torch.manual_seed(0)
    net = CNN().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    net.once = True  # what it computes is test_by_hand's
    expected = trained_plainly(net, batches, fused=True)
    assert all(torch.equal(found[name], expected[name]) for name in expected) and found.keys() == expected.keys()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.5},
        {"maximize": True},
        {"amsgrad": True},
        {"weight_decay": 0.5, "decoupled_weight_decay": True},
    ],
)
def test_parameters_without_a_gradient_are_left_alone_as_torchs_own_adam_does(options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(3, generator=generator) for _ in range(3)]
    ours, theirs = ([nn.Parameter(value.clone()) for value in start] for _ in range(2))
    adam = Adam(ours, lr=0.1, fused=True, **options)
    expected = torch.optim.Adam(theirs, lr=0.1, fused=True, **options)
    for used in [(0,), (0, 1), (1,), (0, 2), (0, 1, 2), (), (2,)]:  # the second and the third come later
        for number, (our, their) in enumerate(zip(ours, theirs, strict=True)):
            gradient = torch.randn(3, generator=generator)
            our.grad, their.grad = (gradient if number in used else None for _ in range(2))
        adam.fused_step()
        expected.step()
        assert all(map(torch.equal, ours, theirs))
        assert [float(adam.state[each]["step"]) for each in ours if adam.state[each]] == [
            float(expected.state[each]["step"]) for each in theirs if each in expected.state
        ]


def test_adams_kernel_gets_parameters_of_one_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it takes no others. torch sorts them, which ours leaves out."""
    kernel, types = torch._fused_adam_, []

    def watched(parameters: list[torch.Tensor], *arguments: Any, **options: Any) -> None:
        types.append({each.dtype for each in parameters})
        kernel(parameters, *arguments, **options)

    monkeypatch.setattr(torch, "_fused_adam_", watched)
    start = [torch.ones(3), torch.ones(3, dtype=torch.float64)]
    ours, theirs = ([nn.Parameter(value.clone()) for value in start] for _ in range(2))
    adam, expected = Adam(ours, lr=0.1, fused=True), torch.optim.Adam(theirs, lr=0.1, fused=True)
    for _ in range(3):
        for each in (*ours, *theirs):
            each.grad = torch.full_like(each, 0.5)
        adam.fused_step()
        expected.step()
    assert all(map(torch.equal, ours, theirs)) and not torch.equal(ours[0], start[0])
    assert types and all(len(each) == 1 for each in types)


def test_after_the_first_step_only_adams_kernel_is_called(
    world: World, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = TrainStep(CONFIG, world)
    step(batches[0], CONFIG.lr)
    monkeypatch.setattr(step.adam, "step", None)
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "adam", None)
    before = step.snapshot()[0]
    step(batches[1], CONFIG.lr)
    assert not torch.equal(step.snapshot()[0]["fc1.weight"], before["fc1.weight"])


def test_while_it_is_trained_a_network_needs_no_more_memory_than_one_backward_pass_does(world: World) -> None:
    step = TrainStep(CONFIG, world)
    loss = step.net(torch.rand(4, 1, 28, 28)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward pass"):
        loss.backward()


def test_a_network_that_was_trained_is_a_network_as_any_other(
    process_of_a_job: None, tiny: Path, tmp_path: Path
) -> None:
    config = CONFIG.replace(dataset="fashion-mnist", data_dir=tiny, output_dir=tmp_path, epochs=1, pictures=False)
    for _ in ("trained", "finished before"):
        net = fit(config).model
        loss = net(torch.rand(4, 1, 28, 28)).logsumexp(1).sum()
        loss.backward(retain_graph=True)
        loss.backward()


def test_fifty_steps_are_the_tutorials_but_for_rounding(world: World, batches: list[Batch]) -> None:
    """The tutorial has another memory layout, another order of ReLU and pooling, and an Adam in separate operations."""
    found = trained(world, batches)
    torch.manual_seed(0)
    expected = trained_plainly(TutorialCNN(), batches, fused=False)
    torch.testing.assert_close(found, dict(expected), rtol=1e-3, atol=1e-4)


def test_a_step_that_fp16_overflows_is_skipped_and_counted(world: World, batches: list[Batch]) -> None:
    """As on a GPU, but for the kernels: the scaler works on a CPU, where fp16 itself is refused."""
    world.accelerator.scaler = torch.amp.GradScaler("cpu")
    step = TrainStep(CONFIG.replace(mixed_precision="fp16"), world)
    step.net.fc1.bias.register_hook(lambda gradient: gradient / (number > 2))
    before = step.snapshot()[0]
    for number, batch in enumerate(batches[:6]):
        step(batch, CONFIG.lr)
        assert step.optimizer.step_was_skipped == (number <= 2)
        same = all(torch.equal(value, before[name]) for name, value in step.snapshot()[0].items())
        assert same == (number <= 2)


@pytest.mark.slow
def test_a_compiled_network_trains_to_the_same_bits(
    world: World, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own compiler, but for its last stage, which needs a C++ compiler: what it has traced runs as it is."""
    traced: list[list[int]] = []

    def as_it_is(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        (images,) = (value for value in inputs if value.shape[1:] == (1, 28, 28))
        traced.append(list(images.shape))
        return graph.forward

    with monkeypatch.context() as patch:  # a compiler writes its own passes
        patch.setattr(CNN, "is_written_out", lambda self, images: False)
        expected = trained(world, batches)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=as_it_is))
    found = trained(world, batches, CONFIG.replace(compile=True))
    torch.compiler.reset()
    assert all(torch.equal(found[name], expected[name]) for name in expected) and found.keys() == expected.keys()
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


STARTED = """
import gc, sys, threading
from ddp_mnist import files, train
survey, aside = files._survey, []

def told(place):
    aside.append(threading.current_thread() is not threading.main_thread())
    return survey(place)

files._survey = told
if "off" in sys.argv:
    gc.disable()
code = train.main([word for word in sys.argv[1:] if word != "off"])
print(code, aside, gc.isenabled(), gc.get_freeze_count() > 100_000)
"""


@pytest.mark.slow
@pytest.mark.parametrize("collector", ["on", "off"])
def test_the_files_are_read_while_torch_is_imported_and_the_collector_rests(
    tiny: Path, tmp_path: Path, collector: str
) -> None:
    """And is afterwards as it was."""
    flags = ["--dataset", "fashion-mnist", "--data-dir", str(tiny), "--wandb", "disabled", "--no-pictures"]
    command = [sys.executable, "-c", STARTED, *flags, "--max-steps", "2", "--output-dir", str(tmp_path)]
    ended = jobs.run([*command, *(["off"] if collector == "off" else [])])
    assert ended.out.endswith(f"0 [True, True] {collector == 'on'} True\n"), ended


FAULTS = """
import resource, statistics, torch
from ddp_mnist import TrainConfig
from ddp_mnist.world import World

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    activations = [torch.ones(1 << 19) for _ in range(40)]  # 2 MiB each
    del activations
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with World(TrainConfig(threads=1)):
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
