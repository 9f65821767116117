"""Optimizers and losses of the user's own: continued bit for bit, scored by what there is, or refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faults
import jobs
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RMSprop

from ddp_mnist import TrainConfig, fit
from ddp_mnist.errors import JobError, UsageError
from ddp_mnist.report.__main__ import main as report
from ddp_mnist.step import rate_factor
from ddp_mnist.train import main

FLAGS = ("--batch-size", "20", "--epochs", "2", "--threads", "1", "--wandb", "disabled", "--log-every", "1")
Fit = Callable[..., Any]


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def points(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(count, 4, generator=draw), torch.randint(3, (count,), generator=draw)


DATA = points(101), points(31, seed=1)


@pytest.fixture
def fit_here(process_of_a_job: None, tmp_path: Path) -> Fit:
    def run(name: str = "run", *, model: Any = network, data: Any = DATA, **options: Any) -> Any:
        parts = {key: options.pop(key) for key in ("optimizer", "loss") if key in options}
        options = {"batch_size": 20, "epochs": 2, "threads": 1, "pictures": False, "log_every": 1} | options
        config = TrainConfig(output_dir=tmp_path / name, wandb="disabled", **options)
        return fit(config, model=model, data=data, **parts)

    return run


def groups(net: nn.Module, decay: float = 0.1, rate: float = 1e-2) -> list[dict[str, Any]]:
    """Return matrices with decay and vectors without, by name."""
    of_kind = {True: [], False: []}
    for name, parameter in net.named_parameters():
        of_kind[name.endswith("bias")].append(parameter)
    return [{"params": of_kind[False], "weight_decay": decay}, {"params": of_kind[True], "lr": rate}]


class Slowing(SGD):
    """An optimizer that counts in its group, as schedule-free ones do, and in states that are not fp32."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["steps"] = group.get("steps", 0) + 1
            state = self.state[group["params"][0]]
            state["seen"] = state.get("seen", torch.tensor(2**30)) + 1  # as fp32 it would not change
            state["phase"] = "warm" if state.get("phase", "cold") == "cold" else "hot"
            group["weight_decay"] = 0.5 / (group["steps"] + int(state["seen"]) % 7 + len(state["phase"]))
        super().step()


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "SGD": lambda net: SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    "AdamW": lambda net: AdamW(groups(net), lr=3e-3, amsgrad=True),
    "RMSprop": lambda net: RMSprop(net.parameters(), momentum=0.5, centered=True),
    "Adagrad": lambda net: Adagrad(net.parameters(), lr=0.1),
    "NAdam": lambda net: NAdam(net.parameters(), decoupled_weight_decay=True, weight_decay=0.1),
    "Slowing": lambda net: Slowing(net.parameters(), lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_is_continued_bit_for_bit(fit_here: Fit, name: str) -> None:
    settings: dict[str, Any] = {"optimizer": OPTIMIZERS[name], "schedule": "onecycle", "grad_clip": 0.5}
    whole = fit_here("whole", **settings)
    for stop in (5, 6, 0):  # within an epoch, at its end
        pieces = fit_here("pieces", **settings, max_steps=stop)
    assert pieces.summary["resumed_from"] == 6 and pieces.summary["finished"]
    faults.assert_same_result(pieces.run_dir, whole.run_dir)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_trains_as_in_a_plain_loop(fit_here: Fit, name: str) -> None:
    trained = fit_here(optimizer=OPTIMIZERS[name], batch_size=101, epochs=3).model
    torch.manual_seed(0)
    plain = network()
    optimizer = OPTIMIZERS[name](plain)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(plain(DATA[0][0]), DATA[0][1]).backward()
        optimizer.step()
    torch.testing.assert_close(trained.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-5)


def test_with_a_schedule_each_groups_own_rate_is_its_peak(fit_here: Fit) -> None:
    made: list[Optimizer] = []

    def keep(net: nn.Module) -> Optimizer:
        made.append(AdamW(groups(net, rate=0.5), lr=3e-3))
        return made[-1]

    for step in (1, 4):
        fit_here(optimizer=keep, schedule="linear", max_steps=step)
        factor = rate_factor(TrainConfig(schedule="linear"), step - 1, 12)
        assert [group["lr"] for group in made[-1].param_groups] == pytest.approx([3e-3 * factor, 0.5 * factor])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (None, "class: torch.optim.adamw.AdamW, and now ddp_mnist.optimizer.Adam"),
        (OPTIMIZERS["NAdam"], "class: torch.optim.adamw.AdamW, and now torch.optim.nadam.NAdam"),
        (lambda net: AdamW(net.parameters(), lr=3e-3), "groups: 2, and now 1"),
        (lambda net: AdamW(groups(net, decay=0.2), lr=3e-3), "weight_decay in group 0: 0.1, and now 0.2"),
        (lambda net: AdamW(groups(net)[::-1], lr=3e-3), "in group 0"),
    ],
    ids=["ours", "class", "fewer groups", "a setting", "other groups"],
)
def test_a_run_is_not_continued_by_another_optimizer(fit_here: Fit, other: Any, message: str) -> None:
    fit_here(optimizer=lambda net: AdamW(groups(net), lr=3e-3), max_steps=3)
    with pytest.raises(UsageError, match=message) as caught:
        fit_here(optimizer=other)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda net: net, "returned a Sequential; expected a torch.optim.Optimizer"),
        (lambda net: SGD(network().parameters()), "parameters that are not the network's"),
    ],
    ids=["none", "of another network"],
)
def test_an_optimizer_that_no_step_can_use_is_refused(fit_here: Fit, optimizer: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fit_here(optimizer=optimizer)


class Counting(SGD):
    """An optimizer whose state no file of tensors and numbers can hold."""

    def step(self, closure: Any = None) -> None:
        super().step()
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["seen"] = {1, 2}


def test_a_state_that_cannot_be_saved_ends_the_run_at_its_first_step(fit_here: Fit) -> None:
    with pytest.raises(JobError, match="Counting keeps a set, seen; expected tensors"):
        fit_here(optimizer=lambda net: Counting(net.parameters(), lr=0.1))


def test_parameters_that_the_optimizer_does_not_have_neither_move_nor_count_for_clipping(fit_here: Fit) -> None:
    trained = fit_here(
        optimizer=lambda net: SGD(net[2].parameters(), lr=0.5), batch_size=101, epochs=3, grad_clip=0.01
    ).model
    torch.manual_seed(0)
    plain = network()
    optimizer = SGD(plain[2].parameters(), lr=0.5)
    for _ in range(3):
        plain.zero_grad()
        F.cross_entropy(plain(DATA[0][0]), DATA[0][1]).backward()
        nn.utils.clip_grad_norm_(plain[2].parameters(), 0.01)
        optimizer.step()
    torch.testing.assert_close(trained.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.fixture
def command(process_of_a_job: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., jobs.Ended]:
    """Run a script's whole command, with an optimizer, in this process."""

    def run(*flags: str, optimizer: Any = OPTIMIZERS["SGD"]) -> jobs.Ended:
        arguments = [*FLAGS, "--no-pictures", "--output-dir", str(tmp_path / "run"), *flags]
        code = main(arguments, model=network, data=lambda: DATA, optimizer=optimizer)
        return jobs.Ended(code, *capfd.readouterr())

    return run


@pytest.mark.parametrize(
    "flags", [("--lr", "0.01"), ("--beta2", "0.95"), ("--recipe", "fast", "--lr", "0.02")], ids=str
)
def test_a_rate_by_flag_is_refused_beside_an_optimizer(command: Callable[..., jobs.Ended], flags: Any) -> None:
    message = jobs.the_message([command(*flags)], 2)
    assert message.startswith(f"error: {flags[-2]} is {flags[-1]}, which is Adam's; `optimizer` sets its own")


def test_a_recipes_rate_is_ignored_beside_an_optimizer(command: Callable[..., jobs.Ended], tmp_path: Path) -> None:
    ended = command("--recipe", "record", "--schedule", "constant", "--max-steps", "2")
    assert (ended.code, ended.err) == (0, "")
    assert "SGD 0.1 constant" in ended.out
    assert [line["lr"] for line in jobs.read_metrics(tmp_path / "run")] == [0.1, 0.1]
    assert "--lr" not in faults.printed_command(ended.out)


def test_no_message_advises_a_flag_that_an_optimizer_refuses(command: Callable[..., jobs.Ended]) -> None:
    ended = command(optimizer=lambda net: SGD(net.parameters(), lr=float("inf")))
    assert jobs.the_message([ended], 1).startswith("error: the loss became nan at step 2")
    assert "A lower rate may help" in ended.err
    assert not {"--lr", "--beta2"} & set(faults.printed_command(ended.err).split())


# --- Losses, and targets that are no class labels


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean(1)


def masks(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none").mean((1, 2))


LINES = torch.linspace(-1, 1, 41).view(41, 1)
PICTURES = torch.rand(41, 1, 6, 6, generator=torch.Generator().manual_seed(0))
WITHOUT_LABELS: dict[str, Any] = {
    "regression": {
        "model": lambda: nn.Linear(1, 2), "loss": squared,
        "data": ((LINES, torch.cat([LINES, -LINES], 1)),) * 2,
    },
    "segmentation": {
        "model": lambda: nn.Conv2d(1, 3, 3, padding=1), "loss": masks,
        "data": ((PICTURES, (3 * PICTURES[:, 0]).long()),) * 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", WITHOUT_LABELS)
def test_targets_that_are_no_labels_are_trained_and_scored_by_loss_alone(
    fit_here: Fit, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    parts = WITHOUT_LABELS[kind]
    result = fit_here(**parts, lr=0.05, epochs=3, pictures=True)
    summary, lines = result.summary, jobs.read_metrics(result.run_dir)
    for name, (inputs, targets) in zip(("train", "test"), parts["data"], strict=True):
        with torch.no_grad():
            loss = parts["loss"](result.model(inputs), targets).mean().item()
        assert summary[f"{name}_loss"] == pytest.approx(loss, rel=1e-5)
        assert (summary[f"{name}_count"], summary[f"{name}_correct"], summary[f"{name}_accuracy"]) == (41, None, None)
    assert summary["test_confusion"] is None and summary["test_mistakes"] == []
    assert lines[-1]["test/loss"] == summary["test_loss"] < lines[2]["test/loss"]
    assert {line["train/accuracy"] for line in lines} == {None} and lines[-1]["test/accuracy"] is None
    out = capfd.readouterr().out
    assert f"Got a mean loss of {summary['test_loss']:.6g} over 41" in out
    assert "with accuracy" not in out and "test accuracy" not in out
    assert {path.name for path in result.run_dir.glob("*.png")} == {"curves.png"}
    assert report([str(result.run_dir)]) == 0


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (F.cross_entropy, r'for 2 items the loss is \(\); expected one value per item, \(2,\): reduction="none"'),
        (lambda outputs, targets: outputs.square(), r'the loss is \(2, 3\); expected .* reduction="none"'),
        (lambda outputs, targets: 1.0, 'the loss is a float; expected .* reduction="none"'),
        (lambda outputs, targets: outputs.mean(1) - targets.float().mean(), "depends on the other items of its batch"),
        (lambda outputs, targets: outputs[:, 0].squeeze() - targets.squeeze(), "depends on the other items"),
    ],
    ids=["mean", "several", "number", "of the batch", "no shape for one item"],
)
def test_a_loss_of_another_shape_is_refused(fit_here: Fit, loss: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fit_here(loss=loss)


def test_labels_with_a_loss_of_ones_own_still_have_their_accuracy(fit_here: Fit) -> None:
    smooth = functools.partial(F.cross_entropy, reduction="none", label_smoothing=0.2)
    result = fit_here(loss=smooth, optimizer=lambda net: Adam(net.parameters(), lr=1e-2))
    inputs, targets = DATA[1]
    with torch.no_grad():
        outputs = result.model(inputs)
    assert result.summary["test_correct"] == (outputs.argmax(1) == targets).sum().item()
    assert result.summary["test_loss"] == pytest.approx(smooth(outputs, targets).mean().item(), rel=1e-5)


def test_integers_that_are_no_classes_of_the_network_are_targets_of_a_loss_of_ones_own(fit_here: Fit) -> None:
    def binary(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs.squeeze(1), targets.float(), reduction="none")

    data = (DATA[1][0], DATA[1][1] % 2)
    summary = fit_here(model=lambda: nn.Linear(4, 1), data=(data, data), loss=binary).summary
    assert summary["test_accuracy"] is None and 0 < summary["test_loss"] < 1


def test_targets_of_two_kinds_are_refused(fit_here: Fit) -> None:
    inputs, labels = DATA[1]
    with pytest.raises(UsageError, match="training and test targets are of different kinds"):
        fit_here(data=((inputs, labels.float()), (inputs, labels)), loss=lambda outputs, targets: outputs.mean(1))
