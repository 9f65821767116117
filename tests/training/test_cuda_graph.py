"""Steps as CUDA graphs, with a stand-in for the capture itself, which needs a GPU (tests/training/test_gpu.py)."""

from __future__ import annotations

import functools
import gc
import itertools
import weakref
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddp_mnist import TrainConfig, cuda_graph
from ddp_mnist.cuda_graph import CUDAGraph, can_capture
from ddp_mnist.data.batches import Batch, Batches, Split
from ddp_mnist.distributed.context import Context
from ddp_mnist.errors import JobError
from ddp_mnist.optimizer import save_state
from ddp_mnist.program import Program
from ddp_mnist.run.checkpoint import Snapshot, TrainState, weights
from ddp_mnist.run.saver import restore
from ddp_mnist.step import TrainStep

RATE = 2**-10  # exact in fp32, as which a graph reads it
CONFIG = TrainConfig(threads=1, wandb="disabled", mixed_precision="no")


def record_on_cpu(graph: CUDAGraph, arguments: tuple[Any, ...]) -> Any:
    """Stand in for `CUDAGraph._record`: a replay runs the function again, into the same output."""
    function = graph._function
    static = [each.clone() if isinstance(each, Tensor) else each for each in arguments]
    for _ in range(cuda_graph.WARM_UP_CALLS):
        function(*static)
    output = torch.empty_like(function(*static))  # a capture computes nothing

    def replay() -> None:
        attributes = vars(getattr(function, "__self__", SimpleNamespace()))
        before = attributes.copy()
        output.copy_(function(*static))
        attributes.update(before)  # a replay sets no attribute

    return cuda_graph._Recording(
        [each for each in static if isinstance(each, Tensor)], output, SimpleNamespace(replay=replay)
    )


@pytest.fixture(autouse=True)
def no_gpu(process_of_a_job: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CUDAGraph, "_record", record_on_cpu)


class Restless(nn.Module):
    """A user's network with all that may go wrong: averages, dropout, frozen weights, a buffer that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.normal = nn.BatchNorm2d(1)
        self.frozen = nn.Conv2d(1, 4, 5, stride=4).requires_grad_(False)
        self.out = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(144, 10))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, images: Tensor) -> Tensor:
        self.calls += self.training
        return self.out(self.frozen(self.normal(images)))


@pytest.fixture(scope="module")
def batches() -> Batches:
    """Eight batches an epoch, of which the last has 52 images instead of 64."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (500, 1, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (500,), generator=generator)
    return Batches(Split(images, labels), batch_size=64, rank=0, world_size=1, seed=0)


def three_epochs(batches: Batches) -> list[Batch]:
    return [batch for epoch in range(3) for batch in batches.epoch(epoch)]


def make_step(
    context: Context,
    batches: Batches,
    *,
    capture: bool,
    config: TrainConfig = CONFIG,
    model: Callable[[], nn.Module] | None = None,
    snapshot: Snapshot | None = None,
) -> TrainStep:
    step = TrainStep(config, context, Program(model).build_network(config, context, snapshot), capture=capture)
    if snapshot is not None:
        restore(step, snapshot)
    step.warm_up(batches)
    return step


def snapshot_of(step: TrainStep) -> Snapshot:
    return Snapshot(TrainState(), {}, weights(step.network), save_state(step.network, step.optimizer), {}, 0)


def take(step: TrainStep, batches: Sequence[Batch], rates: Sequence[float] = (RATE,)) -> list[Tensor]:
    """Return loss, count and norm of each step, stacked when all steps are done: a graph must not overwrite them."""
    taken = [
        (*step(batch, rate), step.gradient_norm()) for batch, rate in zip(batches, itertools.cycle(rates), strict=False)
    ]
    return [torch.stack([each.float() for each in figures]) for figures in taken]


def assert_same(found: TrainStep, expected: TrainStep) -> None:
    """Bit for bit, but that a captured step has a state of zeros also for weights that are not trained."""
    ours, theirs = snapshot_of(found), snapshot_of(expected)
    assert ours.weights.keys() == theirs.weights.keys() and ours.optimizer.keys() >= theirs.optimizer.keys() > set()
    assert all(torch.equal(ours.weights[name], value) for name, value in theirs.weights.items())
    assert all(torch.equal(ours.optimizer[name], value) for name, value in theirs.optimizer.items())
    assert not any(ours.optimizer[name].any() for name in ours.optimizer.keys() - theirs.optimizer.keys())


@pytest.mark.parametrize(
    "changes",
    [{}, {"accumulate": 4}, {"grad_clip": 0.05}, {"rates": (RATE, RATE / 2, RATE * 2)}, {"mixed_precision": "bf16"}],
    ids=str,
)
@pytest.mark.parametrize("model", [None, Restless], ids=["ours", "a user's"])
def test_captured_steps_are_the_plain_ones_also_after_a_restore(
    batches: Batches, model: Callable[[], nn.Module] | None, changes: dict[str, Any]
) -> None:
    """Losses, counts, norms, weights, buffers and the optimizer's state, bit for bit."""
    rates = changes.get("rates", (RATE,))
    config = CONFIG.replace(**{name: value for name, value in changes.items() if name != "rates"})
    every = three_epochs(batches)
    with Context(config) as context:
        make = functools.partial(make_step, context, batches, config=config, model=model)
        plain, captured = make(capture=False), make(capture=True)
        expected = take(plain, every[:9], rates)
        assert all(map(torch.equal, take(captured, every[:9], rates), expected))
        assert_same(captured, plain)
        resumed = make(capture=True, snapshot=snapshot_of(captured))
        expected = take(plain, every[9:], rates)
        for step in (captured, resumed):
            assert all(map(torch.equal, take(step, every[9:], rates), expected))
            assert_same(step, plain)
        assert len({float(figures[0]) for figures in expected}) == 15  # each its own


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("trained", [False, True])
def test_a_capture_changes_nothing(batches: Batches, trained: bool) -> None:
    with Context(CONFIG) as context:
        snapshot = None
        if trained:
            plain = make_step(context, batches, capture=False, model=Restless)
            take(plain, three_epochs(batches)[:3])
            snapshot = snapshot_of(plain)
        network = Program(Restless).build_network(CONFIG, context, snapshot)
        step = TrainStep(CONFIG, context, network, capture=True)
        if snapshot is not None:
            restore(step, snapshot)
        before, random = snapshot_of(step), torch.get_rng_state()
        step.warm_up(batches)
        after = snapshot_of(step)
        assert torch.equal(torch.get_rng_state(), random)
        assert before.optimizer and "calls" in before.weights
        for now, then in ((after.weights, before.weights), (after.optimizer, before.optimizer)):
            assert now.keys() == then.keys() and all(torch.equal(now[name], then[name]) for name in then)
        assert all(parameter.grad is None for parameter in network.parameters())
        assert step.gradient_norm().isnan()  # of no step yet


def test_what_a_graph_reads_and_writes_stays_where_it_was(batches: Batches) -> None:
    """The stand-in for a capture would not notice if it moved: a graph has the addresses."""
    with Context(CONFIG) as context:
        plain = make_step(context, batches, capture=False)
        take(plain, three_epochs(batches)[:3])
        step = make_step(context, batches, capture=True, snapshot=snapshot_of(plain))

        def addresses() -> list[tuple[int, int]]:
            (group,) = step.optimizer.param_groups
            return [(id(tensor), tensor.data_ptr()) for tensor in (*step._mutable_state(), group["lr"])]

        before = addresses()
        assert len(before) == 6 + 3 * 6 + 1
        take(step, three_epochs(batches)[3:], (RATE, RATE / 2))
        assert addresses() == before


@pytest.mark.parametrize(
    ("device", "size", "scaler", "hip"),
    [("cpu", 1, None, None), ("cuda", 2, None, None), ("cuda", 1, "fp16's", None), ("cuda", 1, None, "7.0")],
)
def test_nothing_is_captured_off_one_nvidia_gpu_or_in_fp16_even_on_request(
    monkeypatch: pytest.MonkeyPatch, device: str, size: int, scaler: str | None, hip: str | None
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    accelerator = SimpleNamespace(scaler=scaler)
    context: Any = SimpleNamespace(device=torch.device(device), size=size, accelerator=accelerator)
    assert not any(
        can_capture(CONFIG.replace(cuda_graphs=asked), context, ours=ours)
        for asked in (None, True)
        for ours in (True, False)
    )


def test_a_function_is_captured_once_for_each_shape_type_and_constant() -> None:
    runs: list[tuple[Any, ...]] = []

    def function(tensor: Tensor, factor: int) -> Tensor:
        runs.append((tuple(tensor.shape), tensor.dtype, factor))
        return tensor.double().sum() * factor

    graph = CUDAGraph(function, lambda: [])
    kinds = [(torch.ones(2), 1), (torch.ones(3), 1), (torch.ones(2, dtype=torch.int64), 1), (torch.ones(2), 5)]
    results = [graph(tensor * number, factor) for number in (1, 2, 3) for tensor, factor in kinds]
    # Each result is the caller's to keep, and each call has read its own tensor.
    assert [result.item() for result in results] == [2, 3, 2, 10, 4, 6, 4, 20, 6, 9, 6, 30]
    assert [runs.count(kind) for kind in dict.fromkeys(runs)] == [cuda_graph.WARM_UP_CALLS + 1 + 3] * 4


def test_a_closed_step_keeps_nothing_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = torch.zeros(6, 1, 28, 28, dtype=torch.uint8), torch.arange(6)
    batches = Batches(Split(images, labels), batch_size=4, rank=0, world_size=1, seed=0)
    with Context(CONFIG) as context:
        step = make_step(context, batches, capture=True)
        take(step, list(batches.epoch(0)))
        kept = weakref.ref(step), weakref.ref(batches.split)
        gc.disable()
        try:
            step.close()
            del step, batches
            assert [what() for what in kept] == [None, None]
        finally:
            gc.enable()


@pytest.mark.slow
def test_a_compiled_step_is_captured(batches: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in test_step.py: torch's compiler but for its last stage."""
    traced: list[str] = []

    def as_traced(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        traced.append(str(graph.graph))
        return graph.forward

    compile_as_traced = functools.partial(torch.compile, backend=as_traced)
    with Context(CONFIG) as context:
        plain = make_step(context, batches, capture=False)
        monkeypatch.setattr(torch, "compile", compile_as_traced)
        step = make_step(context, batches, capture=True, config=CONFIG.replace(compile=True))
        assert all(map(torch.equal, take(step, three_epochs(batches)), take(plain, three_epochs(batches))))
        assert_same(step, plain)
        # An epoch's last batch has another size; and no part of the network runs outside of a graph.
        assert len(traced) == 2 and all("conv2d" in graph and "linear" in graph for graph in traced)
        # Each is compiled, however many there were before in this process.
        for number in range(torch._dynamo.config.recompile_limit):
            make_step(context, batches, capture=True, config=CONFIG.replace(compile=True))
            assert len(traced) == 4 + 2 * number
    torch.compiler.reset()


def test_a_function_that_cannot_be_captured_is_told_of_the_flag_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        """Of CUDA, as much as a capture uses: a stream that is no stream, and a graph that takes nothing."""

        def __call__(self, *arguments: object) -> Refusing:
            return self

        def wait_stream(self, stream: object) -> None:
            pass

        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture\nmore")

    monkeypatch.undo()
    for name in ("Stream", "current_stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, Refusing())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: torch.no_grad())
    ran: list[int] = []

    def run(tensor: Tensor) -> Tensor:
        ran.append(1)
        if len(ran) > cuda_graph.WARM_UP_CALLS:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")
        return tensor

    with pytest.raises(JobError) as caught:
        CUDAGraph(run, lambda: [])(torch.ones(1))
    why = "CUDA error: operation not permitted when stream is capturing"
    assert str(caught.value) == f"a step cannot be captured as a CUDA graph ({why}). Use --no-cuda-graphs."
