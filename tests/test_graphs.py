"""Steps that are recorded and replayed, but for the recording itself, which needs a GPU (tests/test_gpu.py)."""

from __future__ import annotations

import functools
import gc
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddp_mnist import CNN, TrainConfig, graphs
from ddp_mnist import step as steps
from ddp_mnist.checkpoint import Snapshot, TrainState
from ddp_mnist.data import Batch, Split, TrainBatches
from ddp_mnist.errors import JobError
from ddp_mnist.step import TrainStep
from ddp_mnist.world import World

RATE = 2**-10  # exact in fp32, as which a graph reads it
CONFIG = TrainConfig(threads=1, wandb="disabled", lr=RATE)
Figures = list[tuple[float, int, float]]


def as_it_is(run: Callable[[], graphs.Results]) -> tuple[graphs.Results, Callable[[], None]]:
    """In place of a recording: what was recorded is run again, its results are written where the first ones were."""
    run()
    results = run()

    def replay() -> None:
        for old, new in zip(results, run(), strict=True):
            assert (old is None) == (new is None)
            if old is not None:
                old.copy_(new)

    return results, replay


@pytest.fixture(autouse=True)
def no_gpu(process_of_a_job: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "capture", as_it_is)


def digits(seed: int) -> TrainBatches:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (500, 1, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (500,), generator=generator)
    return TrainBatches(Split(images, labels), batch_size=64, rank=0, world_size=1, seed=0)  # the last one has 52


@pytest.fixture(scope="module")
def batches() -> TrainBatches:
    return digits(1)


def made(world: World, *, recorded: bool, snapshot: Snapshot | None = None, **changes: Any) -> TrainStep:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "may_be_recorded", lambda self: recorded)
        step = TrainStep(CONFIG.replace(**changes), world, snapshot)
    assert world.accelerator.mixed_precision == step.config.mixed_precision
    return step


def taken(step: TrainStep, every: Sequence[Batch], rates: Sequence[float] = (RATE,)) -> Figures:
    figures = [
        (*step(batch, rate), float(step.gradient_norm()))
        for batch, rate in zip(every, itertools.cycle(rates), strict=False)
    ]
    return [(float(loss), int(correct), norm) for loss, correct, norm in figures]  # read when all steps are done


def three_epochs(batches: TrainBatches) -> list[Batch]:
    return [batch for epoch in range(3) for batch in batches.epoch(epoch)]


def trained(batches: TrainBatches, *, recorded: bool, rates: Sequence[float] = (RATE,), **changes: Any) -> Any:
    with World(CONFIG.replace(**changes)) as world:
        step = made(world, recorded=recorded, **changes)
        step.settle(batches)
        return taken(step, three_epochs(batches), rates), step.snapshot()


def assert_equal(found: Any, expected: Any) -> None:
    (figures, now), (those, then) = found, expected
    assert figures == those and len(figures) == 24
    for ours, theirs in zip(now, then, strict=True):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_compiled_step_is_recorded_with_its_loss(batches: TrainBatches, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in test_step.py: torch's compiler but for its last stage."""
    traced: list[str] = []

    def as_traced(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        traced.append(str(graph.graph))
        return graph.forward

    with monkeypatch.context() as patch:  # a compiler writes its own passes
        patch.setattr(CNN, "is_written_out", lambda self, images: False)
        expected = trained(batches, recorded=True)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=as_traced))
    found = trained(batches, recorded=True, compile=True)
    assert_equal(found, expected)
    assert len(traced) == 2  # an epoch's last batch has another size
    assert all("conv2d" in graph and "cross_entropy" in graph for graph in traced)
    trained(batches, recorded=True, compile=True, mixed_precision="bf16")
    assert len(traced) == 4  # whole, in bf16 as well
    for _ in range(torch._dynamo.config.recompile_limit):  # each is compiled, however many there were before
        trained(batches, recorded=True, compile=True)
    torch.compiler.reset()
    assert len(traced) == 4 + 2 * torch._dynamo.config.recompile_limit


@pytest.mark.parametrize(
    "changes",
    [{}, {"accumulate": 4}, {"grad_clip": 0.05}, {"rates": (RATE, RATE / 2, RATE * 2)}, {"mixed_precision": "bf16"}],
    ids=str,
)
def test_replayed_steps_are_the_plain_steps_bit_for_bit(batches: TrainBatches, changes: dict[str, Any]) -> None:
    assert_equal(trained(batches, recorded=True, **changes), trained(batches, recorded=False, **changes))


class Averaging(CNN):
    """With something that a step changes and that is no weight."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.normal = nn.BatchNorm2d(1)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(self.normal(images))


class Frozen(CNN):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.conv1.requires_grad_(False)


@pytest.mark.parametrize("network", [Averaging, Frozen])
def test_so_they_are_of_a_fork_whose_network_has_averages_or_frozen_weights(
    batches: TrainBatches, network: type[CNN], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "CNN", network)
    assert_equal(trained(batches, recorded=True), trained(batches, recorded=False))


def test_what_a_graph_reads_and_writes_stays_where_it_was(batches: TrainBatches) -> None:
    """The stand-in for a recording would not notice if it moved: a graph has the addresses."""
    with World(CONFIG) as world:
        plain = made(world, recorded=False)
        taken(plain, three_epochs(batches)[:5])
        weights, optimizer, scaler = plain.snapshot()
        state = Snapshot(TrainState(), {}, weights, optimizer, scaler, metrics_bytes=0)
        step = made(world, recorded=True, snapshot=state)
        step.settle(batches)
        assert step.graphs is not None

        def read() -> list[Tensor]:
            recordings = step.graphs._recordings.values()  # type: ignore[union-attr]
            return [*step.changing(), step.adam.param_groups[0]["lr"], *(each.rows for each in recordings)]

        before = [(id(tensor), tensor.data_ptr()) for tensor in read()]
        assert len(before) == 6 + 3 * 6 + 1 + 2
        rest, rates = three_epochs(batches)[5:], (RATE, RATE / 4)
        found = taken(step, rest, rates)
        assert [(id(tensor), tensor.data_ptr()) for tensor in read()] == before
        assert step.adam.param_groups[0]["lr"].item() == rates[(len(rest) - 1) % 2]
        # Continued from the snapshot, it is the plain step that went on.
        assert found == taken(plain, rest, rates)


def test_one_step_may_learn_from_two_data_sets(batches: TrainBatches) -> None:
    both = [batch for pair in zip(batches.epoch(0), digits(2).epoch(0), strict=True) for batch in pair]
    with World(CONFIG) as world:
        recorded, plain = (made(world, recorded=each) for each in (True, False))
        assert taken(recorded, both) == taken(plain, both)


@pytest.mark.parametrize("changes", [{}, {"compile": True}], ids=str)
def test_a_closed_step_keeps_nothing_alive(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    batches = digits(3)
    kept = [weakref.ref(batches.split)]
    with World(CONFIG) as world:
        step = made(world, recorded=True, **changes)
        step.settle(batches)
        taken(step, list(batches.epoch(0)))
        gc.disable()
        try:
            step.close()
            kept.append(weakref.ref(step))
            del step, batches
            assert [what() for what in kept] == [None, None]
        finally:
            gc.enable()


def test_what_cannot_be_recorded_is_told_with_the_flag_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        """Of CUDA, as much as `capture` uses: a stream that is no stream, and a graph that takes nothing."""

        def __call__(self, *arguments: object) -> Refusing:
            return self

        def wait_stream(self, stream: object) -> None:
            pass

        replay = None

        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture\nmore")

    monkeypatch.undo()
    for name in ("Stream", "current_stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, Refusing())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: torch.no_grad())

    ran: list[int] = []

    def run() -> graphs.Results:
        ran.append(1)
        if len(ran) > graphs.WARM_UP:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")
        return []

    with pytest.raises(JobError, match=r"\(CUDA error: operation not permitted when .* capturing\).*--no-cuda-graphs"):
        graphs.capture(run)
