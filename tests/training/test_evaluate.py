"""Scores on one rank, test_distributed.py has them on several; and the command that scores a run again."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jobs
import pytest
import torch
import torch.nn.functional as F
from conftest import TEST_IMAGES, TRAIN_IMAGES
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from tutorial import read_raw

from ddp_mnist import fit
from ddp_mnist.config import TrainConfig
from ddp_mnist.data.batches import TensorSet, to_float
from ddp_mnist.distributed.context import Context
from ddp_mnist.evaluate import Score, evaluate, main
from ddp_mnist.model import CNN


@pytest.fixture
def context(process_of_a_job: None) -> Iterator[Context]:
    with Context(TrainConfig(threads=1, mixed_precision="no")) as one:
        yield one


@pytest.fixture(scope="module")
def split() -> TensorSet:
    """Two whole chunks and a short one."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2301, 1, 28, 28), dtype=torch.uint8, generator=generator)
    return TensorSet(images, torch.randint(0, 10, (2301,), generator=generator))


@pytest.fixture
def net() -> CNN:
    torch.manual_seed(0)
    return CNN()


@torch.no_grad()
def logits_of(net: CNN, split: TensorSet) -> Tensor:
    return torch.cat([net(to_float(part)) for part in split.inputs.split(1000)])


def test_loss_accuracy_and_confusion_are_those_of_a_plain_loop(context: Context, net: CNN, split: TensorSet) -> None:
    logits = logits_of(net, split)
    predictions = logits.argmax(1).tolist()
    confusion = [[0] * 10 for _ in range(10)]
    for label, prediction in zip(split.targets.tolist(), predictions, strict=True):
        confusion[label][prediction] += 1
    score = evaluate(net, split, context, classes=10)
    assert [list(row) for row in score.confusion] == confusion
    assert (score.correct, score.count) == (sum(confusion[label][label] for label in range(10)), 2301)
    assert score.loss == pytest.approx(F.cross_entropy(logits.double(), split.targets).item(), rel=1e-6)


def test_the_mistakes_are_those_it_is_most_confident_of(context: Context, net: CNN, split: TensorSet) -> None:
    confidence, predictions = logits_of(net, split).softmax(1).max(1)
    wrong = (predictions != split.targets).nonzero().flatten()
    worst = confidence[wrong].sort(descending=True).values[:25]
    found = evaluate(net, split, context, classes=10).mistakes
    rows = [mistake.index for mistake in found]
    assert len(set(rows)) == 25 and set(rows) <= set(wrong.tolist())
    assert [mistake.confidence for mistake in found] == pytest.approx(worst.tolist(), rel=1e-5)
    assert confidence[rows].tolist() == pytest.approx(worst.tolist(), rel=1e-5)
    assert [mistake.label for mistake in found] == split.targets[rows].tolist()
    assert [mistake.prediction for mistake in found] == predictions[rows].tolist()


def test_a_score_counts_its_diagonal_and_says_so_in_the_tutorials_words() -> None:
    score = Score(0.5, 8, ((3, 1), (0, 4)))
    assert (score.correct, score.count, score.accuracy) == (7, 8, 0.875)
    assert score.sentence() == "Got 7 / 8 with accuracy 87.50"


class InPlace(nn.Module):
    """As many networks begin: they normalise what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(784, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.out(images.sub_(0.1).div_(0.3).flatten(1))


def test_a_network_that_writes_over_its_input_changes_no_data(context: Context, split: TensorSet) -> None:
    torch.manual_seed(0)
    net, images = InPlace(), to_float(split.inputs)
    floats, before = TensorSet(images, split.targets), images.clone()
    first = evaluate(net, floats, context, classes=10)
    assert torch.equal(images, before)
    assert evaluate(net, floats, context, classes=10) == first == evaluate(net, split, context, classes=10)


def test_scoring_leaves_weights_gradients_and_modes_as_they_are(context: Context, split: TensorSet) -> None:
    net = nn.Sequential(nn.BatchNorm2d(1), nn.BatchNorm2d(1).eval(), nn.Flatten(), nn.Dropout(), nn.Linear(784, 10))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert evaluate(net, split, context, classes=10) == evaluate(net, split, context, classes=10)  # without dropout
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert [layer.training for layer in net] == [True, False, True, True, True]


# --- Scoring calls the module that was trained, whatever it is


def with_a_pre_hook() -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    net.register_forward_pre_hook(lambda module, inputs: ((inputs[0] - 1.0) * -30,))
    return net


class Called(nn.Linear):
    """Does something around its forward."""

    def __call__(self, images: Tensor) -> Tensor:
        return super().__call__(1 - images.flatten(1)) * -5


def with_a_call_of_its_own() -> nn.Module:
    return Called(784, 10)


def with_layers_that_differ_in_training() -> nn.Module:
    linear = parametrizations.spectral_norm(nn.Linear(784, 10))  # its buffers change at each call
    return nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Dropout(0.5), linear)


@pytest.mark.parametrize("model", [with_a_pre_hook, with_a_call_of_its_own, with_layers_that_differ_in_training])
def test_a_run_scores_the_module_that_it_trains(
    process_of_a_job: None, tiny: Path, tmp_path: Path, model: Callable[[], nn.Module]
) -> None:
    """Its counts are those of a plain loop over the network that `fit` returns, in fp32."""
    config = TrainConfig(dataset="fashion-mnist", data_dir=tiny, output_dir=tmp_path, threads=1, wandb="disabled")
    result = fit(config.replace(mixed_precision="bf16", epochs=1, batch_size=60, pictures=False), model=model)
    for name, prefix, count in (("test", "t10k", TEST_IMAGES), ("train", "train", TRAIN_IMAGES)):
        images, labels = read_raw(tiny / "FashionMNIST" / "raw", prefix)
        assert result.summary[f"{name}_count"] == count
        with torch.no_grad():
            assert result.summary[f"{name}_correct"] == (result.model(images).argmax(1) == labels).sum()
    saved, own = load_file(tmp_path / "model.safetensors"), model().state_dict()
    assert saved.keys() == own.keys()  # no wrapper's names
    assert all(torch.equal(saved[name], value) for name, value in result.model.state_dict().items())


def test_scores_are_in_fp32_after_a_training_in_bf16(process_of_a_job: None, tiny: Path, tmp_path: Path) -> None:
    """They are those of a new network with the saved weights, which nothing has been wrapped around."""
    config = TrainConfig(dataset="fashion-mnist", data_dir=tiny, output_dir=tmp_path, threads=1, wandb="disabled")
    result = fit(config.replace(mixed_precision="bf16", epochs=1, batch_size=60, pictures=False))
    network = CNN()
    network.load_state_dict(load_file(tmp_path / "model.safetensors"))
    images, labels = read_raw(tiny / "FashionMNIST" / "raw", "t10k")
    with torch.no_grad():
        loss = nn.functional.cross_entropy(network(images), labels)
    assert result.summary["test_loss"] == pytest.approx(loss.item(), rel=1e-5)


# --- python -m ddp_mnist.evaluate RUN_DIR

RunAt = Callable[[int], Path]
Command = Callable[..., jobs.Ended]
PROGRAM = (sys.executable, "-m", "ddp_mnist.evaluate")
COUNTS = ("train_correct", "train_count", "test_correct", "test_count")


@pytest.fixture
def rescore(process_of_a_job: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """The command in this process, one rank on the CPU."""
    monkeypatch.delenv("DDP_MNIST_DATA", raising=False)

    def run(*arguments: Any) -> jobs.Ended:
        capfd.readouterr()
        return jobs.Ended(main([*map(str, arguments), "--threads", "1"]), *capfd.readouterr())

    return run


@pytest.fixture
def a_run(run_at: RunAt, tmp_path: Path) -> Path:
    """A finished run to be spoiled."""
    return Path(shutil.copytree(run_at(1), tmp_path / "run"))


def listing(folder: Path) -> dict[str, Any]:
    """All that a change of anything in the directory would change."""
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in [folder, *sorted(folder.rglob("*"))]
    }


def test_a_finished_run_is_scored_again_to_its_summarys_counts_in_the_words_of_training(
    rescore: Command, run_at: RunAt
) -> None:
    run_dir = run_at(1)
    before = listing(run_dir)
    ended = rescore(run_dir)
    assert (ended.code, ended.err) == (0, "")
    summary = jobs.read_json(run_dir / "summary.json")
    train, test = (f"{summary[f'{name}_correct']} / {summary[f'{name}_count']}" for name in ("train", "test"))
    assert f"Checking accuracy on training data\nGot {train} with accuracy " in ended.out
    assert f"Checking accuracy on test data\nGot {test} with accuracy " in ended.out
    assert f"step {summary['steps']}" in ended.out
    assert listing(run_dir) == before


def test_other_counts_than_the_runs_own_are_an_error(rescore: Command, a_run: Path) -> None:
    summary = jobs.read_json(a_run / "summary.json")
    (a_run / "summary.json").write_text(json.dumps(summary | {"test_correct": summary["test_correct"] + 1}))
    message = jobs.the_message([rescore(a_run)], 1)
    assert f"test_correct is {summary['test_correct']}, summary.json says {summary['test_correct'] + 1}" in message
    assert "train_" not in message
    ended = rescore(a_run, "--json")
    assert (ended.code, json.loads(ended.out)["agrees"]) == (1, False)


def test_without_a_summary_there_is_nothing_to_agree_with(rescore: Command, a_run: Path) -> None:
    shutil.rmtree(a_run / "checkpoints")
    (a_run / "summary.json").unlink()
    found = json.loads(rescore(a_run, "--json").out)
    assert (found["agrees"], found["step"]) == (None, None)
    assert found["weights"] == str(a_run / "model.safetensors")


def test_the_data_may_lie_elsewhere_by_now(rescore: Command, a_run: Path, tiny: Path) -> None:
    config = jobs.read_json(a_run / "config.json")
    config["settings"]["data_dir"] = str(a_run / "gone")
    (a_run / "config.json").write_text(json.dumps(config))
    assert rescore(a_run, "--data-dir", tiny).code == 0
    assert not (a_run / "gone").exists()


def test_a_run_that_goes_on_is_scored_at_its_newest_checkpoint_that_verifies(
    rescore: Command, a_run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    summary = jobs.read_json(a_run / "summary.json")
    # A kill leaves no summary, and perhaps the final weights of a stop before.
    (a_run / "summary.json").unlink()
    save_file(CNN().state_dict(), a_run / "model.safetensors")
    newest, older = (a_run / "checkpoints" / f"step-{step:08}" for step in (summary["steps"], summary["steps"] // 2))
    before = listing(a_run)
    found = json.loads(rescore(a_run, "--json").out)
    assert (found["step"], found["agrees"], found["weights"]) == (summary["steps"], None, str(newest))
    assert {name: found[name] for name in COUNTS} == {name: summary[name] for name in COUNTS}
    assert listing(a_run) == before
    (newest / "optimizer.safetensors").write_bytes(b"short")
    before = listing(a_run)
    ended = rescore(a_run)
    assert ended.code == 0 and f"{older}, step {summary['steps'] // 2}, on" in ended.out
    assert [record.getMessage().split(" is damaged")[0] for record in caplog.records] == [str(newest)]
    assert listing(a_run) == before


def forget_all_weights(run: Path) -> None:
    (run / "model.safetensors").unlink()
    shutil.rmtree(run / "checkpoints")


def cut_weights(run: Path) -> None:
    (run / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes()[:-100])


def ruin_weights(run: Path) -> None:
    tensors = load_file(run / "model.safetensors")
    save_file({**tensors, "fc1.bias": torch.full((10,), math.nan)}, run / "model.safetensors")


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "no directory": (lambda run: shutil.rmtree(run), " is not a run directory of ddp_mnist"),
    "no run": (lambda run: (run / "config.json").unlink(), " is not a run directory of ddp_mnist"),
    "foreign config": (lambda run: (run / "config.json").write_text("[]"), "config.json is damaged, or not what "),
    "cut config": (lambda run: (run / "config.json").write_text('{"settings'), "config.json is damaged, or "),
    "foreign setting": (
        lambda run: (run / "config.json").write_text('{"settings": {"depth": 3}}'),
        "config.json is damaged, or not what this version writes: unknown setting depth",
    ),
    "cut weights": (cut_weights, "model.safetensors cannot be read"),
    "other widths": (
        lambda run: save_file(CNN(widths=(4, 4)).state_dict(), run / "model.safetensors"),
        "does not fit this network; is it of other --widths?",
    ),
    "ruined weights": (ruin_weights, "model.safetensors holds weights that are not finite"),
    "no weights": (forget_all_weights, "holds no weights yet"),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_a_spoilt_or_foreign_run_directory_is_reported_in_one_message(rescore: Command, a_run: Path, kind: str) -> None:
    spoil, expected = SPOILT[kind]
    spoil(a_run)
    before = listing(a_run.parent)
    ended = rescore(a_run)
    message = jobs.the_message([ended], 2 if kind == "other widths" else 1)
    assert message.startswith(f"error: {a_run}") and expected in message
    assert (ended.out, listing(a_run.parent)) == ("", before)


# --- Several ranks


@pytest.mark.slow
@pytest.mark.distributed
def test_three_ranks_count_the_same(run_at: RunAt) -> None:
    run_dir = run_at(1)
    ended = jobs.run_ranks(3, str(run_dir), "--json", "--threads", "1", program=PROGRAM)
    jobs.succeeded(ended)
    found, summary = json.loads(ended[0].out), jobs.read_json(run_dir / "summary.json")
    assert [process.out for process in ended[1:]] == ["", ""]
    assert {name: found[name] for name in COUNTS} == {name: summary[name] for name in COUNTS}
    assert found["test_loss"] == pytest.approx(summary["test_loss"], rel=1e-6)
    assert (found["world_size"], found["step"], found["agrees"]) == (3, summary["steps"], True)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_that_is_not_there_is_reported_by_one_rank_and_all_leave(tmp_path: Path) -> None:
    ended = jobs.run_ranks(2, str(tmp_path / "nothing"), "--threads", "1", program=PROGRAM)
    assert "nothing is not a run directory of ddp_mnist" in jobs.the_message(ended, 1)


@pytest.mark.parametrize(("rank", "reports"), [("0", True), ("1", False)])
def test_a_wrong_flag_is_reported_by_rank_0_alone(
    rescore: Command, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], rank: str, reports: bool
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="2"):
        rescore("run", "--bogus")
    assert ("unrecognized arguments: --bogus" in capfd.readouterr().err) == reports
