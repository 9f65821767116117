"""The passes that are written out, against torch's autograd of the same operations."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddp_mnist import CNN, TrainConfig, by_hand, model
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


def test_weights_that_changed_between_the_passes_are_told() -> None:
    net = network()
    net.once = True
    loss = net(drawn(2, 1, 28, 28)).sum()
    with torch.no_grad():
        net.conv2.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class OwnConvolution(nn.Conv2d):
    pass


def no_bias(net: CNN) -> None:
    net.conv1.bias = None


def convolution(**settings: Any) -> Callable[[CNN], None]:
    def change(net: CNN) -> None:
        net.conv2 = nn.Conv2d(8, 16, **{"kernel_size": 3, "padding": 1} | settings)

    return change


def own_class(net: CNN) -> None:
    net.conv1 = OwnConvolution(1, 8, 3, padding=1)


def another_layer(net: CNN) -> None:
    net.norm = nn.BatchNorm2d(8)


def another_parameter(net: CNN) -> None:
    net.scale = nn.Parameter(torch.ones(()))


CHANGES = {
    "no bias": no_bias,
    "kernel": convolution(kernel_size=5, padding=2),
    "stride": convolution(stride=2),
    "dilation": convolution(dilation=2, padding=2),
    "groups": convolution(groups=2),
    "edges": convolution(padding_mode="reflect"),
    "class": own_class,
    "layer": another_layer,
    "parameter": another_parameter,
    "attribute": lambda net: setattr(net, "dropout", 0.5),
    "buffer": lambda net: net.register_buffer("mean", torch.zeros(())),
    "type": lambda net: net.double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_it_takes_what_it_was_written_for(change: str) -> None:
    net, images = network(), drawn(2, 1, 28, 28)
    net.once = True
    assert net.is_written_out(images)
    assert net.is_written_out((255 * images).to(torch.uint8))
    for others in (drawn(2, 1, 30, 30), drawn(2, 1, 32, 32), drawn(2, 3, 28, 28), images[0], images.to("meta")):
        assert not net.is_written_out(others)
    assert not net.is_written_out(images.clone().requires_grad_())
    CHANGES[change](net)
    assert not net.is_written_out(images)


@pytest.mark.parametrize("change", ["no bias", "kernel", "groups", "edges", "dilation"])
def test_what_it_does_not_take_is_computed_by_its_own_layers(change: str) -> None:
    net, images = network(), drawn(2, 1, 28, 28)
    CHANGES[change](net)
    hidden = F.max_pool2d(net.conv1(images), 2).relu()
    expected = net.fc1(F.max_pool2d(net.conv2(hidden), 2).relu().flatten(1))
    for once in (True, False):
        net.once = once
        torch.testing.assert_close(net(images), expected)
        with torch.no_grad():
            torch.testing.assert_close(net(images), expected)


def layers(self: CNN, images: Tensor) -> Tensor:
    hidden = model._layer(self.conv2, model._layer(self.conv1, images, triton=False), triton=False)
    return hidden.flatten(1)


def edited(plainly: Callable[[CNN, Tensor], Tensor]) -> Callable[[CNN, Tensor], Tensor]:
    """What somebody makes of `CNN.forward`, below its first lines."""

    def forward(self: CNN, images: Tensor) -> Tensor:
        if self.is_written_out(images):
            return by_hand.logits(images, self.weights())
        return plainly(self, images)

    return forward


ORIGINAL = CNN.forward
EDITS: dict[str, Callable[[CNN, Tensor], Tensor]] = {
    "above": lambda self, images: ORIGINAL(self, 2 * images),
    "dropout": edited(lambda self, images: self.fc1(F.dropout(layers(self, images), 0.5, self.training))),
    "limit": edited(lambda self, images: self.fc1(layers(self, images).clamp(max=6))),
    "gradients only": edited(lambda self, images: self.fc1(layers(self, images).detach())),
    "scores only": edited(lambda self, images: self.fc1(layers(self, images)) * (1 if self.training else 2)),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_change_of_forward_is_seen_and_told(
    edit: str, world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(CNN, "forward", EDITS[edit])
    monkeypatch.setattr("ddp_mnist.step.FORWARD", EDITS[edit])  # in its source
    images = drawn(64, 1, 28, 28)
    net = network().eval()
    random = torch.get_rng_state()
    with torch.no_grad():
        assert not net.is_written_out(images)
    assert caplog.text.count("CNN.forward is not what ddp_mnist.by_hand computes") == 1
    assert torch.equal(torch.get_rng_state(), random) and not net.training
    net.once = True
    assert not net.train().is_written_out(images) and len(caplog.records) == 1
    step = TrainStep(CONFIG, world)
    batch = next(noise(64).epoch(0))
    torch.manual_seed(5)
    loss, _ = step(batch, 0.0)
    found = gradients(step.net)
    step.net.zero_grad()
    torch.manual_seed(5)
    expected = F.cross_entropy(EDITS[edit](step.net, batch.images / 255), batch.labels)  # type: ignore[arg-type]
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(found, gradients(step.net), rtol=1e-3, atol=1e-5)


def smoothed(self: TrainStep, images: Tensor, labels: Tensor, global_size: int) -> tuple[Tensor, Tensor]:
    logits = self.model(images / 255)
    loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=0.1) / global_size
    return loss, (logits.detach().argmax(1) == labels).sum()


def always_right(self: TrainStep, images: Tensor, labels: Tensor, global_size: int) -> tuple[Tensor, Tensor]:
    loss = F.cross_entropy(self.model(images / 255), labels, reduction="sum") / global_size
    return loss, torch.ones_like(labels).sum()


def of_shares_only(self: TrainStep, images: Tensor, labels: Tensor, global_size: int) -> tuple[Tensor, Tensor]:
    loss, correct = FORWARD(self, images, labels, global_size)
    return loss if len(labels) == global_size else 2 * loss, correct


FORWARD = TrainStep._forward


@pytest.mark.parametrize("forward", [smoothed, always_right, of_shares_only])
def test_a_change_of_the_loss_is_seen_and_told(
    forward: Callable[..., tuple[Tensor, Tensor]],
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(TrainStep, "_forward", forward)
    step, batch = TrainStep(CONFIG, world), next(noise(64).epoch(0))
    random = torch.get_rng_state()
    loss, correct = step(batch, 0.0)
    assert torch.equal(torch.get_rng_state(), random)
    found = gradients(step.net)
    step.net.zero_grad()
    expected = forward(step, batch.images, batch.labels, 64)
    expected[0].backward()
    torch.testing.assert_close((loss, correct), (expected[0].detach(), expected[1]))
    torch.testing.assert_close(found, gradients(step.net))
    step(batch, 0.0)
    assert caplog.text.count("TrainStep._forward is not what ddp_mnist.by_hand computes") == 1
    assert step.by_hand is False


def test_the_loss_as_it_is_needs_no_word(world: World, caplog: pytest.LogCaptureFixture) -> None:
    step = TrainStep(CONFIG, world)
    before = {name: value.clone() for name, value in step.net.state_dict().items()}
    assert step.needs_no_autograd(next(noise(64).epoch(0)).images)
    torch.testing.assert_close(step.net.state_dict(), before, rtol=0, atol=0)
    assert not any(value is not None for value in gradients(step.net).values()) and not caplog.records


def test_a_loss_that_fails_says_so_itself(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> tuple[Tensor, Tensor]:
        raise ZeroDivisionError("mine")

    monkeypatch.setattr(TrainStep, "_forward", failing)
    with pytest.raises(ZeroDivisionError, match="mine"):
        TrainStep(CONFIG, world)(next(noise(64).epoch(0)), 0.0)


def test_a_forward_that_fails_says_so_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: CNN, images: Tensor) -> Tensor:
        raise ZeroDivisionError("mine")

    monkeypatch.setattr(CNN, "forward", failing)
    with pytest.raises(ZeroDivisionError, match="mine"):
        network()(drawn(1, 1, 28, 28))
    with torch.no_grad():
        assert not network().is_written_out(drawn(1, 1, 28, 28))


def test_a_first_look_in_inference_mode_is_as_any_other() -> None:
    model.agree.cache_clear()
    with torch.inference_mode():
        assert network().is_written_out(drawn(1, 1, 28, 28))


@pytest.mark.parametrize("weight", [0.0, 1e4, 1e30, torch.nan])
def test_what_a_run_has_learned_does_not_matter(weight: float) -> None:
    """Else a run that continues could go another way, with other bits."""
    model.agree.cache_clear()
    net = network()
    net.once = True
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(weight)
    assert net.is_written_out(drawn(1, 1, 28, 28))


def test_a_network_of_the_callers_is_trained_as_it_is(world: World) -> None:
    """Even if it is one of ours: its forward may be another."""
    called = []

    def made() -> CNN:
        net = CNN()
        forward = net.forward
        net.forward = lambda images: (called.append(len(images)), forward(images))[1]  # type: ignore[method-assign]
        return net

    TrainStep(CONFIG, world, model=made)(next(noise(64).epoch(0)), 1e-3)
    assert called == [64]


def test_a_subclass_has_its_own_forward(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    class Counting(CNN):
        def forward(self, images: Tensor) -> Tensor:
            called.append(len(images))
            return super().forward(images)

    monkeypatch.setattr("ddp_mnist.step.CNN", Counting)
    step = TrainStep(CONFIG, world)
    step(next(noise(64).epoch(0)), 1e-3)
    assert 64 in called


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


def noise(batch_size: int) -> TrainBatches:
    images = torch.randint(256, (500, 1, 28, 28), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return TrainBatches(Split(images, torch.arange(500) % 10), batch_size=batch_size, rank=0, world_size=1, seed=0)


def with_autograd(step: TrainStep) -> None:
    step.needs_no_autograd = lambda images: False  # type: ignore[method-assign]


def throughout(step: TrainStep) -> None:
    step.net.once = False


def usual_order(step: TrainStep) -> None:
    step.net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def frozen(name: str) -> Callable[[TrainStep], None]:
    def freeze(step: TrainStep) -> None:
        step.net.get_parameter(name).requires_grad_(False)

    return freeze


def steps(world: World, *changes: Callable[[TrainStep], object], **settings: Any) -> list[dict[str, Tensor]]:
    """The weights after each of 50 steps, the last of each epoch on a smaller batch."""
    config = CONFIG.replace(**settings)
    step = TrainStep(config, world)
    for change in changes:
        change(step)
    batches = noise(config.batch_size)
    found = []
    for batch in itertools.islice(itertools.chain.from_iterable(map(batches.epoch, range(7))), 50):
        loss, correct = step(batch, 1e-3)
        found.append(step.snapshot()[0] | {"loss": loss, "correct": correct, "norm": step.gradient_norm()})
        found[-1] = {name: value.clone() for name, value in found[-1].items()}
        for parameter in step.parameters:
            assert parameter.grad is None or strides(parameter.grad) == strides(parameter)
    return found


def strides(tensor: Tensor) -> list[int]:
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def close(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    """The first ten steps: Adam makes much of small differences."""
    for ours, theirs in zip(found[:10], expected[:10], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-4)


def equal(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(
        ours.keys() == theirs.keys() and all(map(torch.equal, ours.values(), theirs.values())) for ours, theirs in pairs
    )


@pytest.mark.parametrize("world", ["no", "bf16"], indirect=True)
@pytest.mark.parametrize(
    "settings", [{}, {"accumulate": 3}, {"grad_clip": 0.1}, {"widths": (8, 48)}, {"batch_size": 1}], ids=str
)
def test_fifty_steps_without_autograd_are_those_with_it_bit_for_bit(
    world: World, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = steps(world, with_autograd, **settings)
    if world.accelerator.mixed_precision == "no":  # in bf16 another of equal cells may get the gradient
        close(expected, steps(world, throughout, **settings))

    def none_from_now_on(step: TrainStep) -> None:
        step.by_hand = step.needs_no_autograd(drawn(1, 1, 28, 28))
        monkeypatch.setattr(torch.Tensor, "backward", None)
        monkeypatch.setattr(torch.autograd, "backward", None)

    found = steps(world, none_from_now_on, **settings)
    assert equal(found, expected) and len(found) == 50


def test_weights_in_another_order_get_gradients_in_theirs(world: World) -> None:
    close(steps(world, usual_order), steps(world, throughout))


@pytest.mark.parametrize("name", ["conv1.weight", "conv2.bias", "fc1.weight"])
def test_a_frozen_parameter_stays_as_it_is(world: World, name: str) -> None:
    start, *_, end = found = steps(world, frozen(name))
    assert [each for each in CNN().state_dict() if torch.equal(start[each], end[each])] == [name]
    close(found, steps(world, throughout, frozen(name)))
    assert len(found) == 50


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_hooks_are_called(world: World) -> None:
    called: list[str] = []
    batch = next(noise(64).epoch(0))
    of_weights = ["register_hook", "register_post_accumulate_grad_hook"]
    of_network = ["forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook"]
    names = of_weights + [f"register_{name}" for name in of_network]
    for name in names:
        step = TrainStep(CONFIG, world)
        owner = step.net.conv1.weight if name in of_weights else step.net
        getattr(owner, name)(lambda *_, name=name: called.append(name))
        step(batch, 1e-3)
    handle = nn.modules.module.register_module_forward_hook(lambda net, *_: called.append(type(net).__name__))
    try:
        TrainStep(CONFIG, world)(batch, 1e-3)
    finally:
        handle.remove()
    assert called == [*names, "CNN"]
