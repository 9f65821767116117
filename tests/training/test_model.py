"""The network against the tutorial's class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from tutorial import TutorialCNN, read_raw

from ddp_mnist.model import CNN

KEYS = ["conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias", "fc1.weight", "fc1.bias"]


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(64, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def test_it_has_the_tutorials_9098_parameters_under_the_tutorials_names() -> None:
    ours, theirs = CNN().state_dict(), TutorialCNN().state_dict()
    assert list(ours) == list(theirs) == KEYS
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}
    assert sum(parameter.numel() for parameter in CNN().parameters()) == 9098


def test_a_seed_gives_the_tutorials_initial_weights() -> None:
    torch.manual_seed(3)
    ours = CNN().state_dict()
    torch.manual_seed(3)
    theirs = TutorialCNN().state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in KEYS)


def test_state_dicts_go_both_ways_with_the_same_logits(images: Tensor) -> None:
    for source, target in ((TutorialCNN(), CNN()), (CNN(), TutorialCNN())):
        target.load_state_dict(source.state_dict())
        torch.testing.assert_close(target(images), source(images), rtol=0, atol=1e-5)


def test_trained_weights_give_the_tutorials_logits_also_channels_last(
    run_at: Callable[[int], Path], tiny: Path
) -> None:
    trained = load_file(run_at(1) / "model.safetensors")
    images, _ = read_raw(tiny / "FashionMNIST" / "raw", "t10k")
    theirs, ours = TutorialCNN(), CNN()
    theirs.load_state_dict(trained)
    ours.load_state_dict(trained)
    with torch.no_grad():
        expected = theirs(images[:500])
        assert expected.abs().max() > 1  # trained, not fresh
        torch.testing.assert_close(ours(images[:500]), expected, rtol=0, atol=1e-5)
        ours.to(memory_format=torch.channels_last)
        torch.testing.assert_close(ours(images[:500]), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [28, 29])
def test_in_bf16_the_logits_are_the_tutorials_but_for_rounding(size: int) -> None:
    """29: its pooling leaves out a row and a column."""
    images = torch.rand(16, 1, size, size, generator=torch.Generator().manual_seed(0))
    ours, theirs = CNN().to(memory_format=torch.channels_last), TutorialCNN()
    theirs.load_state_dict(ours.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        found = ours(images)
    torch.testing.assert_close(found.float(), theirs(images), rtol=0, atol=2e-2)


def test_channels_classes_and_widths_are_what_was_asked_for() -> None:
    net = CNN(in_channels=3, num_classes=7, widths=(4, 5))
    shapes = [tuple(net.state_dict()[name].shape) for name in KEYS]
    assert shapes == [(4, 3, 3, 3), (4,), (5, 4, 3, 3), (5,), (7, 5 * 49), (7,)]
    assert net(torch.zeros(2, 3, 28, 28)).shape == (2, 7)


def test_logits_are_fp32_and_an_image_is_judged_alone(images: Tensor) -> None:
    net = CNN()
    with torch.no_grad():
        together = net(images)
        assert together.dtype == torch.float32
        assert together.shape == (64, 10)
        torch.testing.assert_close(torch.cat([net(images[:1]), net(images[1:])]), together, rtol=0, atol=1e-6)
        assert net(images[:0]).shape == (0, 10)
