"""Scores on one rank; tests/test_distributed.py has them on several."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddp_mnist.config import TrainConfig
from ddp_mnist.data import Split, to_float
from ddp_mnist.evaluate import Score, evaluate
from ddp_mnist.model import CNN
from ddp_mnist.world import World


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[World]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    threads = torch.get_num_threads()
    with World(TrainConfig(threads=1, mixed_precision=getattr(request, "param", "no"))) as one:
        yield one
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def split() -> Split:
    """Two whole chunks and a short one."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2301, 1, 28, 28), dtype=torch.uint8, generator=generator)
    return Split(images, torch.randint(0, 10, (2301,), generator=generator))


@pytest.fixture
def net() -> CNN:
    torch.manual_seed(0)
    return CNN()


@torch.no_grad()
def logits_of(net: CNN, split: Split) -> Tensor:
    return torch.cat([net(to_float(part)) for part in split.images.split(1000)])


def test_loss_accuracy_and_confusion_are_those_of_a_plain_loop(world: World, net: CNN, split: Split) -> None:
    logits = logits_of(net, split)
    predictions = logits.argmax(1).tolist()
    confusion = [[0] * 10 for _ in range(10)]
    for label, prediction in zip(split.labels.tolist(), predictions, strict=True):
        confusion[label][prediction] += 1
    score = evaluate(net, split, world)
    assert [list(row) for row in score.confusion] == confusion
    assert score.correct == sum(a == b for a, b in zip(split.labels.tolist(), predictions, strict=True))
    assert score.count == len(split) == 2301
    assert score.accuracy == score.correct / 2301
    assert score.loss == pytest.approx(F.cross_entropy(logits.double(), split.labels).item(), rel=1e-6)


def test_a_score_counts_its_diagonal_and_says_so_in_the_tutorials_words() -> None:
    score = Score(0.5, ((3, 1), (0, 4)))
    assert (score.correct, score.count, score.accuracy) == (7, 8, 0.875)
    assert score.sentence() == "Got 7 / 8 with accuracy 87.50"


def test_scoring_neither_trains_nor_leaves_gradients(world: World, net: CNN, split: Split) -> None:
    before = {name: value.clone() for name, value in net.state_dict().items()}
    evaluate(net, split, world)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize("world", ["bf16"], indirect=True)
def test_a_network_prepared_for_bf16_is_scored_in_fp32(world: World, net: CNN, split: Split) -> None:
    expected = F.cross_entropy(logits_of(net, split).double(), split.labels).item()
    prepared = world.accelerator.prepare(net)
    with torch.no_grad():
        rough = F.cross_entropy(prepared(to_float(split.images)), split.labels).item()
    assert rough != pytest.approx(expected, rel=1e-6)  # or this test would prove nothing
    assert evaluate(net, split, world).loss == pytest.approx(expected, rel=1e-6)


def test_an_empty_directory_is_not_needed_to_score(tmp_path: Path, world: World, net: CNN, split: Split) -> None:
    few = Split(split.images[:3], split.labels[:3])
    assert evaluate(net, few, world).count == 3
    assert list(tmp_path.iterdir()) == []
