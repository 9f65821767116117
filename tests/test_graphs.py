"""Steps that are recorded and replayed, but for the recording itself, which needs a GPU (tests/test_gpu.py)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ddp_mnist import TrainConfig, graphs
from ddp_mnist.data import Split, TrainBatches
from ddp_mnist.step import TrainStep
from ddp_mnist.world import World

RATE = 2**-10  # exact in fp32, as which a graph reads it
CONFIG = TrainConfig(threads=1, wandb="disabled", lr=RATE)


def as_it_is(run: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
    """In place of a recording: what was recorded is run again, its results are written where the first ones were."""
    run()
    results = run()

    def replay() -> None:
        for old, new in zip(results, run(), strict=True):
            old.copy_(new)

    return results, replay


@pytest.fixture
def world(process_of_a_job: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(graphs, "capture", as_it_is)
    with World(CONFIG) as found:
        yield found


@pytest.fixture(scope="module")
def batches() -> TrainBatches:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (500, 1, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (500,), generator=generator)
    return TrainBatches(Split(images, labels), batch_size=64, rank=0, world_size=1, seed=0)  # the last one has 52


def trained(world: World, batches: TrainBatches, *, recorded: bool, rates: Any = (RATE,), **changes: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "may_be_recorded", lambda self: recorded)
        step = TrainStep(CONFIG.replace(**changes), world)
    step.settle(batches)
    figures = []
    every = itertools.chain.from_iterable(batches.epoch(epoch) for epoch in range(3))
    for batch, rate in zip(every, itertools.cycle(rates), strict=False):
        loss, correct = step(batch, rate)
        figures.append((loss, correct, step.gradient_norm()))
    return [(float(loss), int(correct), norm) for loss, correct, norm in figures], step.snapshot()


def test_a_compiled_step_is_recorded_with_its_loss(
    world: World, batches: TrainBatches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in test_step.py: torch's compiler but for its last stage."""
    traced: list[str] = []

    def as_traced(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        traced.append(str(graph.graph))
        return graph.forward

    expected = trained(world, batches, recorded=True)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=as_traced))
    found = trained(world, batches, recorded=True, compile=True)
    assert found[0] == expected[0]
    assert len(traced) == 2  # an epoch's last batch has another size
    assert all("conv2d" in graph and "cross_entropy" in graph for graph in traced)
    for _ in range(torch._dynamo.config.recompile_limit):  # each is compiled, however many there were before
        trained(world, batches, recorded=True, compile=True)
    torch.compiler.reset()
    assert len(traced) == 2 * (1 + torch._dynamo.config.recompile_limit)


@pytest.mark.parametrize(
    "changes",
    [{}, {"accumulate": 4}, {"grad_clip": 0.5}, {"rates": (RATE, RATE / 2, RATE * 2)}, {"mixed_precision": "bf16"}],
    ids=str,
)
def test_replayed_steps_are_the_plain_steps_bit_for_bit(
    world: World, batches: TrainBatches, changes: dict[str, Any]
) -> None:
    (found, now), (expected, then) = (trained(world, batches, recorded=each, **changes) for each in (True, False))
    assert found == expected and len(found) == 24
    for ours, theirs in zip(now, then, strict=True):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
