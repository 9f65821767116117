"""The network against the tutorial's class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from tutorial import TutorialCNN, read_raw

from ddp_mnist.model import CNN

KEYS = ["conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias", "fc1.weight", "fc1.bias"]


def test_a_seed_gives_the_tutorials_9098_weights_under_its_names() -> None:
    states = []
    for network in (CNN, TutorialCNN):
        torch.manual_seed(3)
        states.append(network().state_dict())
    ours, theirs = states
    assert list(ours) == list(theirs) == KEYS
    assert all(torch.equal(ours[name], theirs[name]) for name in KEYS)
    assert sum(value.numel() for value in ours.values()) == 9098


def test_trained_weights_give_the_tutorials_logits_in_any_memory_format(
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


def test_channels_classes_and_widths_can_be_chosen() -> None:
    net = CNN(in_channels=3, num_classes=7, widths=(4, 5))
    shapes = [tuple(net.state_dict()[name].shape) for name in KEYS]
    assert shapes == [(4, 3, 3, 3), (4,), (5, 4, 3, 3), (5,), (7, 5 * 49), (7,)]
    assert net(torch.zeros(2, 3, 28, 28)).shape == (2, 7)


def test_logits_are_fp32_and_each_image_is_judged_alone() -> None:
    net, images = CNN(), torch.rand(64, 1, 28, 28)
    with torch.no_grad():
        together = net(images)
        assert together.dtype == torch.float32
        assert together.shape == (64, 10)
        torch.testing.assert_close(torch.cat([net(images[:1]), net(images[1:])]), together, rtol=0, atol=1e-6)
        assert net(images[:0]).shape == (0, 10)
