"""Steps as CUDA graphs, with a stand-in for the recording, which needs a GPU (tests/training/test_gpu.py)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faults
import pytest
import torch
from torch import Tensor, nn

from ddp_mnist import CNN, TrainConfig, fit
from ddp_mnist.cuda_graph import CUDAGraph
from ddp_mnist.data.batches import Batch, Batches, TensorSet
from ddp_mnist.distributed.context import Context
from ddp_mnist.step import TrainStep

RATE = 2**-10  # exact in fp32, as which a graph reads it
CONFIG = TrainConfig(lr=RATE, threads=1, wandb="disabled", mixed_precision="no", pictures=False)
CAN_CAPTURE: Any = TrainStep._can_capture  # `recorded` replaces it


@pytest.fixture(autouse=True)
def recorded(process_of_a_job: None, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Capture on the CPU: a replay runs the function again, into the same output. Return what was recorded."""
    calls: list[tuple[Any, ...]] = []

    def record(graph: CUDAGraph, arguments: tuple[Any, ...]) -> SimpleNamespace:
        calls.append(arguments)
        function = graph._function
        static = [each.clone() if isinstance(each, Tensor) else each for each in arguments]
        function(*static)  # a warm-up changes what it changes
        output = torch.empty_like(function(*static))  # a capture computes nothing

        def replay() -> None:
            attributes = vars(getattr(function, "__self__", SimpleNamespace()))
            before = attributes.copy()
            output.copy_(function(*static))
            attributes.update(before)  # a replay sets no attribute

        return SimpleNamespace(inputs=static, output=output, graph=SimpleNamespace(replay=replay))

    monkeypatch.setattr(CUDAGraph, "_record", record)
    monkeypatch.setattr(
        "ddp_mnist.step.TrainStep._can_capture",
        lambda step: step._is_builtin if step.config.cuda_graphs is None else step.config.cuda_graphs,
    )
    return calls


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
    """Return eight batches an epoch, of which the last has 52 images instead of 64."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (500, 1, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (500,), generator=generator)
    return Batches(TensorSet(images, labels), batch_size=64, rank=0, world_size=1, seed=0)


def make_step(
    context: Context, *, capture: bool, model: Callable[[], nn.Module] = Restless, **changes: Any
) -> TrainStep:
    torch.manual_seed(0)
    return TrainStep(CONFIG.replace(cuda_graphs=capture, **changes), context, model(), classes=10)


def state_of(step: TrainStep) -> dict[str, Tensor]:
    """Return copies of weights, buffers and the optimizer's state."""
    optimizer = {
        f"{name}/{key}": value
        for name, parameter in step.network.named_parameters()
        for key, value in step.optimizer.state.get(parameter, {}).items()
    }
    return {name: value.clone() for name, value in (step.network.state_dict() | optimizer).items()}


def take(step: TrainStep, batches: Sequence[Batch], factors: Sequence[float] = (1.0,)) -> list[Tensor]:
    """Return loss, count and norm of each step, stacked when all steps are done: a graph must not overwrite them."""
    taken = [
        (*step(batch, factor), step.gradient_norm())
        for batch, factor in zip(batches, itertools.cycle(factors), strict=False)
    ]
    return [torch.stack([each.float() for each in figures]) for figures in taken]


@pytest.mark.parametrize(
    ("model", "changes", "factors"),
    [
        (CNN, {}, (1.0, 0.5, 0.25)),
        (Restless, {}, (1.0,)),
        (Restless, {"accumulate": 4}, (1.0,)),
        (Restless, {"grad_clip": 0.05}, (1.0,)),
        (Restless, {"mixed_precision": "bf16"}, (1.0,)),
    ],
    ids=str,
)
def test_captured_steps_are_the_plain_ones(
    batches: Batches, model: Callable[[], nn.Module], changes: dict[str, Any], factors: Sequence[float]
) -> None:
    """Losses, counts, norms, weights, buffers and the optimizer's state, bit for bit."""
    every = [batch for epoch in range(3) for batch in batches.epoch(epoch)]
    with Context(CONFIG.replace(**changes)) as context:
        plain, captured = (make_step(context, capture=capture, model=model, **changes) for capture in (False, True))
        captured.rehearse(batches)
        expected = take(plain, every, factors)
        assert all(map(torch.equal, take(captured, every, factors), expected))
    assert len({float(figures[0]) for figures in expected}) == 24  # each its own
    ours, theirs = state_of(captured), state_of(plain)
    assert all(torch.equal(ours.pop(name), value) for name, value in theirs.items())
    assert not any(value.any() for value in ours.values())  # of weights that are not trained


def test_a_captured_run_in_pieces_is_the_plain_one_in_one(tiny: Path, tmp_path: Path, recorded: list[Any]) -> None:
    config = CONFIG.replace(dataset="fashion-mnist", data_dir=tiny, batch_size=60, epochs=1, lr=RATE)
    fit(config.replace(output_dir=tmp_path / "plain", cuda_graphs=False))
    assert recorded == []
    for max_steps in (9, 0):
        fit(config.replace(output_dir=tmp_path / "captured", max_steps=max_steps))
    assert len(recorded) == 4  # two sizes of a batch, in two attempts
    faults.assert_same_result(tmp_path / "captured", tmp_path / "plain")


@pytest.mark.filterwarnings("error")
def test_a_capture_changes_nothing(batches: Batches) -> None:
    with Context(CONFIG) as context:
        step = make_step(context, capture=True)
        before, random = state_of(step), torch.get_rng_state()
        step.rehearse(batches)
        torch.testing.assert_close(state_of(step), before, rtol=0, atol=0)
        assert torch.equal(torch.get_rng_state(), random)
        assert all(parameter.grad is None for parameter in step.network.parameters())
        assert step.gradient_norm().isnan()  # of no step yet


@pytest.mark.parametrize(
    ("device", "size", "scaler", "hip", "captured"),
    [
        ("cuda", 1, None, None, [True, False, True, True, False, False]),
        ("cpu", 1, None, None, [False] * 6),
        ("cuda", 2, None, None, [False] * 6),
        ("cuda", 1, "fp16's", None, [False] * 6),
        ("cuda", 1, None, "7.0", [False] * 6),
    ],
)
def test_our_network_is_captured_on_one_nvidia_gpu_and_a_users_on_request(
    monkeypatch: pytest.MonkeyPatch, device: str, size: int, scaler: str | None, hip: str | None, captured: list[bool]
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    accelerator = SimpleNamespace(scaler=scaler)
    context: Any = SimpleNamespace(device=torch.device(device), world_size=size, accelerator=accelerator)
    cases = itertools.product((None, True, False), (True, False))
    steps: list[Any] = [
        SimpleNamespace(config=CONFIG.replace(cuda_graphs=asked), context=context, _is_builtin=ours)
        for asked, ours in cases
    ]
    assert list(map(CAN_CAPTURE, steps)) == captured


def test_a_function_is_captured_once_for_each_shape_type_and_constant(recorded: list[tuple[Any, ...]]) -> None:
    graph = CUDAGraph(lambda tensor, factor: tensor.double().sum() * factor, lambda: [])
    kinds = [(torch.ones(2), 1), (torch.ones(3), 1), (torch.ones(2, dtype=torch.int64), 1), (torch.ones(2), 5)]
    results = [graph(tensor * number, factor) for number in (1, 2, 3) for tensor, factor in kinds]
    # Each result is the caller's to keep, and each call has read its own tensor.
    assert [result.item() for result in results] == [2, 3, 2, 10, 4, 6, 4, 20, 6, 9, 6, 30]
    assert len(recorded) == 4
