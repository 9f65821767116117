"""The passes that are written out, against torch's autograd of the same operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddp_mnist import CNN, TrainConfig, by_hand
from ddp_mnist.data import Split, TrainBatches
from ddp_mnist.step import TrainStep
from ddp_mnist.world import World

CONFIG = TrainConfig(threads=1, wandb="disabled")
LAYOUTS = {"channels_last": torch.channels_last, "usual": torch.contiguous_format}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(layout: str = "channels_last", **shape: Any) -> CNN:
    torch.manual_seed(0)
    return CNN(**shape).to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]


def plainly(net: CNN, images: Tensor, dtype: torch.dtype) -> Tensor:
    """The logits by torch's operations. Each bias is added in its convolution; its gradient is summed where it is the
    same for all that is pooled, by adding what is nothing but has that gradient."""
    hidden = images.to(dtype)
    for convolution in (net.conv1, net.conv2):
        weight, bias = convolution.weight.to(dtype), convolution.bias
        pooled = F.max_pool2d(F.conv2d(hidden, weight, bias.detach().to(dtype), padding=1), 2)  # type: ignore[union-attr]
        hidden = F.relu(pooled + (bias - bias.detach()).to(dtype).view(-1, 1, 1))  # type: ignore[union-attr, operator]
    weight = net.fc1.weight.to(dtype).unflatten(1, hidden.shape[1:]).permute(0, 2, 3, 1).flatten(1)
    bias = net.fc1.bias
    logits = F.linear(hidden.permute(0, 2, 3, 1).flatten(1), weight, bias.detach().to(dtype)).float()
    return logits + (bias - bias.detach())


def gradients(net: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in net.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("count", "shape"),
    [(64, {}), (1, {}), (5, {"in_channels": 3, "num_classes": 7, "widths": (4, 5)}), (7, {"widths": (8, 48)}), (0, {})],
)
def test_loss_count_and_gradients_are_autograds_bit_for_bit(
    count: int, shape: dict[str, Any], layout: str, dtype: torch.dtype
) -> None:
    net = network(layout, **shape)
    images = drawn(count, net.conv1.in_channels, 28, 28)
    labels = torch.arange(count) % net.fc1.out_features
    logits = plainly(net, images, dtype)
    wanted = F.cross_entropy(logits, labels, reduction="sum") / 99
    wanted.backward()
    loss, correct, found = by_hand.loss_and_gradients(images, labels, net.weights(), 99, dtype)
    assert torch.equal(loss, wanted.detach()) and int(correct) == int((logits.argmax(1) == labels).sum())
    for gradient, (name, expected) in zip(found, gradients(net).items(), strict=True):
        assert expected is not None and gradient.dtype == torch.float32 and gradient.shape == expected.shape
        if dtype == torch.float32:
            assert torch.equal(gradient, expected), name
        else:  # in bf16 many cells are equal, of which another may get the gradient
            assert (gradient - expected).norm() <= 0.1 * expected.norm(), name
    assert count != 64 or 0 < int(correct) < count

    net.zero_grad()
    net.once = True
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        again = net(images)
    assert torch.equal(again, logits)
    (F.cross_entropy(again, labels, reduction="sum") / 99).backward()
    assert all(torch.equal(each, other) for each, other in zip(found, gradients(net).values(), strict=True))  # type: ignore[arg-type]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        assert torch.equal(net(images), logits)


def layer(images: Tensor) -> by_hand.Layer:
    """Of a convolution that changes nothing, so that its images are what is pooled."""
    weight = torch.zeros(images.shape[1], images.shape[1], 3, 3, dtype=images.dtype)
    weight[..., 1, 1].fill_diagonal_(1)
    return by_hand._layer(images, weight, torch.zeros(images.shape[1], dtype=images.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 8, 28, 28), (2, 5, 6, 10), (0, 4, 4, 4), (1, 1, 2, 2)])
def test_pooling_is_torchs_bit_for_bit(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    # No two cells of a window are close, in bf16 either.
    cells = torch.arange(shape[-2])[:, None] % 2 * 2 + torch.arange(shape[-1]) % 2
    turned, moved = (drawn(*shape[:2], 1, 1, seed=seed).mul(4).int() for seed in (3, 4))
    images = (0.1 * drawn(*shape) + (cells + turned) % 4 + moved).to(dtype).to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
    weights = drawn(*shape[:2], shape[2] // 2, shape[3] // 2, seed=2).to(dtype).to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
    source = images.clone().requires_grad_()
    expected = F.relu(F.max_pool2d(source, 2))
    expected.backward(weights)
    made = layer(images)
    assert torch.equal(made.pooled, expected)
    gradient, *_ = by_hand._of_layer(made, weights, of_images=True)
    assert torch.equal(gradient, source.grad)  # type: ignore[arg-type]
    assert shape[1] != 8 or 0.1 < expected.eq(0).float().mean() < 0.9  # the ReLU has something to do


@pytest.mark.parametrize("window", [[1, 1, 1, 1], [0, 1, 1, 0], [1, 0, 0, 1], [0, 0, 1, 1], [0, 1, 0, 1]])
def test_of_equal_cells_one_gets_all_of_the_gradient(window: list[float]) -> None:
    """Which one: torch's own, but for the second window, where it takes the upper one."""
    images = torch.tensor(window).float().view(1, 1, 2, 2)
    weights = torch.full((1, 1, 1, 1), 5.0)
    gradient, _, of_bias = by_hand._of_layer(layer(images), weights, of_images=True)
    assert gradient.sum() == of_bias.sum() == 5 and gradient.count_nonzero() == 1
    assert gradient[images == 1].sum() == 5
    source = images.clone().requires_grad_()
    F.max_pool2d(source, 2).backward(weights)
    assert torch.equal(gradient, source.grad) == (window != [0, 1, 1, 0])  # type: ignore[arg-type]


def test_a_maximum_that_is_no_number_is_none_afterwards() -> None:
    images = torch.zeros(1, 1, 2, 2)
    images[..., 1, 0] = torch.nan
    assert layer(images).pooled.isnan().all()


def test_the_gradient_takes_the_place_of_what_was_pooled() -> None:
    """The largest tensors of a step exist once."""
    made = layer(drawn(2, 1, 4, 4))
    ours = made.convolved.data_ptr()
    kept = {each.untyped_storage().data_ptr() for each in (made.above, made.below)}
    by_hand._of_layer(made, torch.ones(2, 1, 2, 2), of_images=True)
    assert kept == {ours} and made.convolved.sum() == (made.pooled > 0).sum()


def test_what_can_be_used_once_says_so_and_the_rest_can_be_used_as_any_network() -> None:
    images, labels = drawn(4, 1, 28, 28), torch.arange(4)
    net = CNN()
    loss = F.cross_entropy(net(images), labels)
    loss.backward(retain_graph=True)
    loss.backward()

    def of_weights(weights: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(net, weights, (images,)), labels)

    weights = {name: value.detach() for name, value in net.named_parameters()}
    transformed = torch.func.grad(of_weights)(weights)
    for name, value in net.named_parameters():
        torch.testing.assert_close(2 * transformed[name], value.grad)
    net.once = True
    loss = F.cross_entropy(net(images), labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward pass"):
        loss.backward()


def no_bias(net: CNN) -> None:
    net.conv1.bias = None


def wider_kernel(net: CNN) -> None:
    net.conv1 = nn.Conv2d(1, 8, 5, padding=2)


def mirrored_edges(net: CNN) -> None:
    net.conv2.padding_mode = "reflect"


def another_layer(net: CNN) -> None:
    net.norm = nn.BatchNorm2d(8)


def doubles(net: CNN) -> None:
    net.double()


@pytest.mark.parametrize("change", [wider_kernel, mirrored_edges, another_layer, doubles, no_bias])
def test_it_takes_what_it_was_written_for(change: Callable[[CNN], None]) -> None:
    net, images = network(), drawn(2, 1, 28, 28)
    net.once = True
    assert net.is_written_out(images)
    assert net.is_written_out((255 * images).to(torch.uint8))
    for others in (drawn(2, 1, 30, 30), drawn(2, 1, 32, 32), drawn(2, 3, 28, 28), images[0], images.to("meta")):
        assert not net.is_written_out(others)
    assert not net.is_written_out(images.clone().requires_grad_())
    change(net)
    assert not net.is_written_out(images)


def test_gradients_of_images_are_autograds() -> None:
    net = network()
    net.once = True
    images = drawn(2, 1, 28, 28).requires_grad_()
    net(images).sum().backward()
    assert images.grad is not None and images.grad.count_nonzero()


@pytest.fixture
def world(process_of_a_job: None, request: pytest.FixtureRequest) -> Iterator[World]:
    with World(CONFIG.replace(mixed_precision=getattr(request, "param", "no"))) as found:
        yield found


def steps(world: World, *, by_autograd: bool, frozen: str | None = None, **settings: Any) -> list[dict[str, Tensor]]:
    """The weights after each of 50 steps, the last of each epoch on a smaller batch."""
    step = TrainStep(CONFIG.replace(**settings), world)
    if frozen:
        step.net.get_parameter(frozen).requires_grad_(False)
    if by_autograd:
        step.may_be_written_out = lambda images: False  # type: ignore[method-assign]
    images = torch.randint(256, (500, 1, 28, 28), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    batches = TrainBatches(Split(images, torch.arange(500) % 10), batch_size=64, rank=0, world_size=1, seed=0)
    found = []
    for epoch in range(7):
        for batch in batches.epoch(epoch):
            loss, correct = step(batch, 1e-3)
            found.append(step.snapshot()[0] | {"loss": loss, "correct": correct, "norm": step.gradient_norm()})
            found[-1] = {name: value.clone() for name, value in found[-1].items()}
    return found[:50]


@pytest.mark.parametrize("world", ["no", "bf16"], indirect=True)
@pytest.mark.parametrize("settings", [{}, {"accumulate": 3}, {"grad_clip": 0.1}, {"widths": (8, 48)}], ids=str)
def test_fifty_steps_without_autograd_are_those_with_it_bit_for_bit(
    world: World, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = steps(world, by_autograd=True, **settings)
    monkeypatch.setattr(torch.Tensor, "backward", None)
    monkeypatch.setattr(torch.autograd, "backward", None)
    found = steps(world, by_autograd=False, **settings)
    assert len(found) == len(expected) == 50
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("frozen", ["conv1.weight", "conv2.bias"])
def test_a_frozen_parameter_stays_as_it_is(world: World, frozen: str) -> None:
    start, *_, end = steps(world, by_autograd=False, frozen=frozen)
    assert [name for name in CNN().state_dict() if torch.equal(start[name], end[name])] == [frozen]
