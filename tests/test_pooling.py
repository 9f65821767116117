"""Pooling, bias and ReLU as one operation, against torch's three."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddp_mnist import CNN
from ddp_mnist.pooling import relu_of_maxima

LAYOUTS = {"channels_last": torch.channels_last, "usual": torch.contiguous_format}


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def expected(images: Tensor, bias: Tensor | None) -> Tensor:
    pooled = F.max_pool2d(images, 2)
    return F.relu(pooled if bias is None else pooled + bias.view(-1, 1, 1))


def gradients(operation: object, images: Tensor, bias: Tensor | None, weights: Tensor) -> list[Tensor]:
    """Of what the images were made of, and of the bias."""
    source, own = images.clone().requires_grad_(), None if bias is None else bias.clone().requires_grad_()
    made = source * 1  # an input that autograd made, as a convolution's result
    result = operation(made, own)  # type: ignore[operator]
    result.backward(weights)
    return [result.detach(), source.grad, *([] if own is None else [own.grad])]  # type: ignore[list-item, union-attr]


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 8, 28, 28), (2, 5, 6, 10), (2, 3, 7, 9), (0, 4, 4, 4), (1, 1, 2, 2)])
def test_values_and_gradients_are_torchs_bit_for_bit(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, biased: bool
) -> None:
    images = drawn(*shape)
    # No two cells of a window are close, in bf16 either.
    cells = torch.arange(shape[-2])[:, None] % 2 * 2 + torch.arange(shape[-1]) % 2
    turned, moved = (drawn(*shape[:2], 1, 1, seed=seed).mul(4).int() for seed in (3, 4))
    images = (0.1 * images + (cells + turned) % 4 + moved).to(dtype)
    images = images.to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
    bias = drawn(shape[1], seed=1, dtype=dtype) if biased else None
    weights = drawn(*F.max_pool2d(images, 2).shape, seed=2, dtype=dtype).to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
    found = gradients(lambda made, own: relu_of_maxima(made, own, once=True), images, bias, weights)
    wanted = gradients(expected, images, bias, weights)
    assert all(map(torch.equal, found, wanted)) and len(found) == len(wanted)
    assert not len(images) or found[0].is_contiguous(memory_format=LAYOUTS[layout])
    with torch.no_grad():
        assert torch.equal(relu_of_maxima(images.clone(), bias, once=False), wanted[0])
    assert shape[1] != 8 or 0.1 < wanted[0].eq(0).float().mean() < 0.9  # the ReLU has something to do


@pytest.mark.parametrize("window", [[1, 1, 1, 1], [0, 1, 1, 0], [1, 0, 0, 1], [0, 0, 1, 1], [0, 1, 0, 1]])
def test_of_equal_cells_one_gets_all_of_the_gradient(window: list[float]) -> None:
    """Which one: torch's own, but for the second window, where it takes the upper one."""
    images = torch.tensor(window).float().view(1, 1, 2, 2)
    (_, gradient) = gradients(
        lambda *made: relu_of_maxima(*made, once=True), images, None, torch.full((1, 1, 1, 1), 5.0)
    )
    assert gradient.sum() == 5 and gradient.count_nonzero() == 1
    assert gradient[images == 1].sum() == 5
    (_, torchs) = gradients(expected, images, None, torch.full((1, 1, 1, 1), 5.0))
    assert torch.equal(gradient, torchs) == (window != [0, 1, 1, 0])


def test_a_maximum_that_is_no_number_is_none_afterwards() -> None:
    images = torch.zeros(1, 1, 2, 2)
    images[..., 1, 0] = torch.nan
    assert relu_of_maxima(images, None, once=True).isnan().all()


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
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_half_of_a_layer_may_be_frozen(frozen: str) -> None:
    images, labels = drawn(4, 1, 28, 28), torch.arange(4)
    found = []
    for once in (True, False):
        torch.manual_seed(0)
        net = CNN()
        net.once = once
        getattr(net.conv1, frozen).requires_grad_(False)
        F.cross_entropy(net(images), labels).backward()
        found.append([value.grad for value in net.parameters() if value.grad is not None])
    assert all(map(torch.equal, *found)) and len(found[0]) == 5


def test_the_gradient_takes_the_place_of_what_was_pooled() -> None:
    """The largest tensors of a step exist once."""
    held: list[int] = []
    source = drawn(2, 3, 4, 4).requires_grad_()
    made = source * 1
    made.register_hook(lambda gradient: held.append(gradient.data_ptr()))
    place = made.data_ptr()
    relu_of_maxima(made, None, once=True).sum().backward()
    assert held == [place]
