"""Scores on one rank, test_distributed.py has them on several; and the command that scores a run again."""

from __future__ import annotations

import json
import math
import shutil
import signal
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
from ddp_mnist.data import sources
from ddp_mnist.data.batches import Split, to_float
from ddp_mnist.distributed.context import Context
from ddp_mnist.evaluate import Score, evaluate, main
from ddp_mnist.model import CNN
from ddp_mnist.step import TrainStep


@pytest.fixture
def context(process_of_a_job: None, request: pytest.FixtureRequest) -> Iterator[Context]:
    with Context(TrainConfig(threads=1, mixed_precision=getattr(request, "param", "no"))) as one:
        yield one


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


def test_loss_accuracy_and_confusion_are_those_of_a_plain_loop(context: Context, net: CNN, split: Split) -> None:
    logits = logits_of(net, split)
    predictions = logits.argmax(1).tolist()
    confusion = [[0] * 10 for _ in range(10)]
    for label, prediction in zip(split.labels.tolist(), predictions, strict=True):
        confusion[label][prediction] += 1
    score = evaluate(net, split, context)
    assert [list(row) for row in score.confusion] == confusion
    assert score.correct == sum(a == b for a, b in zip(split.labels.tolist(), predictions, strict=True))
    assert score.count == len(split) == 2301
    assert score.accuracy == score.correct / 2301
    assert score.loss == pytest.approx(F.cross_entropy(logits.double(), split.labels).item(), rel=1e-6)


def test_the_mistakes_are_those_it_is_most_confident_of(context: Context, net: CNN, split: Split) -> None:
    confidence, said = logits_of(net, split).softmax(1).max(1)
    wrong = (said != split.labels).nonzero().flatten()
    worst = confidence[wrong].sort(descending=True).values[:25]
    found = evaluate(net, split, context).mistakes
    assert [mistake.confidence for mistake in found] == pytest.approx(worst.tolist(), rel=1e-5)
    assert len({mistake.index for mistake in found}) == 25
    for mistake in found:
        row = mistake.index
        assert (mistake.label, mistake.prediction) == (split.labels[row].item(), said[row].item())
        assert mistake.label != mistake.prediction and mistake.confidence == pytest.approx(
            confidence[row].item(), rel=1e-5
        )


def test_a_score_counts_its_diagonal_and_says_so_in_the_tutorials_words() -> None:
    score = Score(0.5, ((3, 1), (0, 4)))
    assert (score.correct, score.count, score.accuracy) == (7, 8, 0.875)
    assert score.sentence() == "Got 7 / 8 with accuracy 87.50"


class InPlace(nn.Module):
    """As many networks begin: they normalise what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(784, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.out(images.sub_(0.1).div_(0.3).flatten(1))


def test_a_network_that_writes_over_its_input_changes_no_data(context: Context, split: Split) -> None:
    torch.manual_seed(0)
    net, images = InPlace(), to_float(split.images)
    floats, before = Split(images, split.labels), images.clone()
    first = evaluate(net, floats, context)
    assert torch.equal(images, before)
    assert evaluate(net, floats, context) == first == evaluate(net, split, context)


def test_scoring_neither_trains_nor_leaves_gradients(context: Context, net: CNN, split: Split) -> None:
    before = {name: value.clone() for name, value in net.state_dict().items()}
    evaluate(net, split, context)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize("context", ["bf16"], indirect=True)
def test_a_network_that_is_trained_in_bf16_is_scored_in_fp32(context: Context, net: CNN, split: Split) -> None:
    expected = F.cross_entropy(logits_of(net, split).double(), split.labels).item()
    step = TrainStep(TrainConfig(mixed_precision="bf16"), context, net)
    with torch.no_grad():
        rough = F.cross_entropy(step.model(to_float(split.images)), split.labels).item()
    assert rough != pytest.approx(expected, rel=1e-6)  # or this test would prove nothing
    assert evaluate(net, split, context).loss == pytest.approx(expected, rel=1e-6)


# --- Scoring calls the module that was trained, whatever it is


def linear() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


def with_a_pre_hook() -> nn.Module:
    net = linear()
    net.register_forward_pre_hook(lambda module, inputs: ((inputs[0] - 1.0) * -30,))
    return net


def with_a_hook_on_a_layer() -> nn.Module:
    net = linear()
    net[1].register_forward_hook(lambda module, inputs, outputs: -outputs)
    return net


def with_a_forward_of_its_own() -> nn.Module:
    net = linear()
    forward = net.forward
    net.forward = lambda images: -forward(images)  # type: ignore[method-assign, assignment]
    return net


class Called(nn.Linear):
    """Does something around its forward."""

    def __call__(self, images: Tensor) -> Tensor:
        return super().__call__(1 - images.flatten(1)) * -5


def with_a_call_of_its_own() -> nn.Module:
    return Called(784, 10)


def with_a_norm_of_its_weights() -> nn.Module:
    return nn.Sequential(nn.Flatten(), parametrizations.weight_norm(nn.Linear(784, 10)))


def with_an_estimate_of_its_weights_norm() -> nn.Module:
    """Buffers that change at each call in training."""
    return nn.Sequential(nn.Flatten(), parametrizations.spectral_norm(nn.Linear(784, 10)))


def with_averages_and_dropout() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(784, 10))


class Centring(nn.Linear):
    """Keeps an average in a buffer, and is another function in training."""

    def __init__(self) -> None:
        super().__init__(784, 10)
        self.register_buffer("mean", torch.zeros(784))

    def forward(self, images: Tensor) -> Tensor:
        images = images.flatten(1)
        if self.training:
            self.mean.lerp_(images.mean(0), 0.2)  # type: ignore[operator, union-attr]
        logits = super().forward(images - self.mean)  # type: ignore[operator]
        return logits if self.training else logits.roll(1, dims=1)


class FrozenAverages(nn.Sequential):
    """Its first layer never leaves evaluation mode."""

    def __init__(self) -> None:
        super().__init__(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(784, 10))

    def train(self, mode: bool = True) -> FrozenAverages:
        super().train(mode)
        self[0].eval()
        return self


MODULES = [
    with_a_pre_hook,
    with_a_hook_on_a_layer,
    with_a_forward_of_its_own,
    with_a_call_of_its_own,
    with_a_norm_of_its_weights,
    with_an_estimate_of_its_weights_norm,
    with_averages_and_dropout,
    Centring,
    FrozenAverages,
]


@torch.no_grad()
def confusion_of(model: nn.Module, folder: Path, prefix: str) -> list[list[int]]:
    confusion = [[0] * 10 for _ in range(10)]
    images, labels = read_raw(folder, prefix)
    for some, their in zip(images.split(100), labels.split(100), strict=True):
        for label, said in zip(their.tolist(), model(some).argmax(1).tolist(), strict=True):
            confusion[label][said] += 1
    return confusion


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("model", MODULES)
def test_a_run_scores_the_module_that_it_trains(
    process_of_a_job: None, tiny: Path, tmp_path: Path, model: Callable[[], nn.Module], precision: Any
) -> None:
    """Its counts are those of a plain loop over the network that `fit` returns, in fp32."""
    config = TrainConfig(dataset="fashion-mnist", data_dir=tiny, output_dir=tmp_path, threads=1, wandb="disabled")
    config = config.replace(mixed_precision=precision, epochs=1, batch_size=60, pictures=False)
    result = fit(config, model=model)
    raw = tiny / "FashionMNIST" / "raw"
    test, train = (confusion_of(result.model, raw, prefix) for prefix in ("t10k", "train"))
    assert result.summary["test_confusion"] == test
    for name, confusion, count in (("test", test, TEST_IMAGES), ("train", train, TRAIN_IMAGES)):
        assert result.summary[f"{name}_count"] == count
        assert result.summary[f"{name}_correct"] == sum(confusion[label][label] for label in range(10))
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


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.slow
@pytest.mark.distributed
def test_any_number_of_ranks_counts_the_same(run_at: RunAt, world_size: int) -> None:
    run_dir = run_at(1)
    ended = jobs.run_ranks(world_size, str(run_dir), "--json", "--threads", "1", program=PROGRAM)
    jobs.succeeded(ended)
    found, summary = json.loads(ended[0].out), jobs.read_json(run_dir / "summary.json")
    assert [process.out for process in ended[1:]] == [""] * (world_size - 1)
    assert {name: found[name] for name in COUNTS} == {name: summary[name] for name in COUNTS}
    assert (found["train_count"], found["test_count"]) == (TRAIN_IMAGES, TEST_IMAGES)
    assert found["test_loss"] == pytest.approx(summary["test_loss"], rel=1e-6)
    assert (found["world_size"], found["step"], found["agrees"]) == (world_size, summary["steps"], True)


def test_a_launchers_variable_that_is_no_number_is_told(
    rescore: Command, a_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "two")
    assert "the environment says RANK=two" in jobs.the_message([rescore(a_run)], 2)


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


def test_a_score_on_generated_digits_says_so(
    rescore: Command, a_run: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = sources.load
    asked: list[str] = []

    def drawn(dataset: str, root: Path) -> tuple[Split, Split]:
        asked.append(dataset)
        return load("fashion-mnist", tiny)  # 70,000 digits are not drawn for this

    monkeypatch.setattr(sources, "load", drawn)
    assert "THIS IS NOT MNIST" not in rescore(a_run).out
    config = jobs.read_json(a_run / "config.json")
    config["settings"]["dataset"] = "synthetic"
    (a_run / "config.json").write_text(json.dumps(config))
    ended = rescore(a_run)
    assert (ended.code, asked) == (0, ["fashion-mnist", "synthetic"])
    assert f", on synthetic\n{sources.SYNTHETIC_WARNING}\nChecking accuracy on training data\n" in ended.out


def test_ctrl_c_ends_it_without_a_word(rescore: Command, a_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "load", lambda dataset, root: signal.raise_signal(signal.SIGINT))
    assert rescore(a_run) == jobs.Ended(130, "", "")


@pytest.mark.slow
def test_a_run_that_goes_on_is_scored_at_its_newest_checkpoint_that_verifies(
    rescore: Command, train: Command, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stop = ("--checkpoint-every", "5", "--keep-checkpoints", "4", "--output-dir", tmp_path)
    assert train("--max-steps", "10", *stop).code == 0
    early = jobs.read_json(tmp_path / "summary.json")
    assert json.loads(rescore(tmp_path, "--json").out)["agrees"] is True  # a stop at --max-steps is scored, too
    old = (tmp_path / "model.safetensors").read_bytes()
    assert train("--max-steps", "20", *stop).code == 0
    late = jobs.read_json(tmp_path / "summary.json")
    # What a kill leaves: no summary, and the final weights of the stop before.
    (tmp_path / "summary.json").unlink()
    (tmp_path / "model.safetensors").write_bytes(old)
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / ".tmp-step-00000025-0123").mkdir()
    before = listing(tmp_path)
    found = json.loads(rescore(tmp_path, "--json").out)
    assert (found["step"], found["agrees"]) == (20, None)
    assert found["weights"] == str(checkpoints / "step-00000020")
    assert found["test_correct"] == late["test_correct"] != early["test_correct"]
    assert listing(tmp_path) == before
    for name in ("step-00000020", "step-00000015"):
        (checkpoints / name / "optimizer.safetensors").write_bytes(b"short")
    before = listing(tmp_path)
    ended = rescore(tmp_path)
    assert ended.code == 0
    assert f"{checkpoints / 'step-00000010'}, step 10, on" in ended.out
    assert [record.getMessage().split(" is damaged")[0] for record in caplog.records] == [
        str(checkpoints / "step-00000020"),
        str(checkpoints / "step-00000015"),
    ]
    assert listing(tmp_path) == before


def spoil_nothing_there(run: Path) -> None:
    shutil.rmtree(run)


def spoil_file(run: Path) -> None:
    shutil.rmtree(run)
    run.write_text("not a directory")


def spoil_foreign(run: Path) -> None:
    (run / "config.json").unlink()


def spoil_foreign_config(run: Path) -> None:
    (run / "config.json").write_text('{"model_type": "bert"}')


def spoil_config_list(run: Path) -> None:
    (run / "config.json").write_text("[]")


def spoil_config(run: Path) -> None:
    (run / "config.json").write_bytes((run / "config.json").read_bytes()[:100])


def spoil_setting_names(run: Path) -> None:
    (run / "config.json").write_text('{"settings": {"depth": 3}}')


def spoil_setting_values(run: Path) -> None:
    (run / "config.json").write_text('{"settings": {"widths": 3}}')


def spoil_config_place(run: Path) -> None:
    (run / "config.json").unlink()
    (run / "config.json").mkdir()


def spoil_weights(run: Path) -> None:
    (run / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes()[:-100])


def spoil_shapes(run: Path) -> None:
    save_file(CNN(widths=(4, 4)).state_dict(), run / "model.safetensors")


def spoil_values(run: Path) -> None:
    tensors = load_file(run / "model.safetensors")
    save_file({**tensors, "fc1.bias": torch.full((10,), math.nan)}, run / "model.safetensors")


def spoil_all_weights(run: Path) -> None:
    (run / "model.safetensors").unlink()
    for file in (run / "checkpoints").glob("*/MANIFEST.json"):
        file.write_text("{}")


SPOILT = {
    spoil_nothing_there: "does not exist; expected a run directory",
    spoil_file: "is a file; expected a run directory",
    spoil_foreign: "is not a run directory of ddp_mnist: there is no config.json in it",
    spoil_foreign_config: "is not a run directory of ddp_mnist: its config.json has no settings",
    spoil_config_list: "is not a run directory of ddp_mnist: its config.json has no settings",
    spoil_config: "config.json is damaged: ",
    spoil_config_place: "config.json cannot be read: Is a directory",
    spoil_setting_names: "config.json is not what this version writes: unknown setting depth",
    spoil_setting_values: "config.json is not what this version writes: ",
    spoil_weights: "model.safetensors is not a whole safetensors file",
    spoil_shapes: "model.safetensors does not fit the network of config.json beside it: conv1.weight is (4, 1, 3, 3), "
    "expected (8, 1, 3, 3); ",
    spoil_values: "model.safetensors holds weights that are not finite",
    spoil_all_weights: "holds no weights yet",
}


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__.removeprefix("spoil_"))
def test_a_spoilt_or_foreign_run_directory_is_told_in_one_message(
    rescore: Command, a_run: Path, spoil: Callable[[Path], None]
) -> None:
    spoil(a_run)
    before = listing(a_run) if a_run.is_dir() else {}
    ended = rescore(a_run)
    message = jobs.the_message([ended], 1)
    assert message.startswith(f"error: {a_run}") and SPOILT[spoil] in message
    assert "--init-from" not in message
    assert ended.out == ""
    assert before == (listing(a_run) if before else {})


@pytest.mark.parametrize(("arguments", "code"), [(["--threads", "1"], 1), (["--bogus"], 2), (["--threads", "-1"], 2)])
@pytest.mark.slow
@pytest.mark.distributed
def test_a_mistake_is_told_by_one_rank_and_all_leave(tmp_path: Path, arguments: list[str], code: int) -> None:
    ended = jobs.run_ranks(2, str(tmp_path / "nothing"), *arguments, program=PROGRAM)
    assert [process.code for process in ended] == [code, code]
    told = [process.err for process in ended]
    assert told[0].count("error: ") == 1 and "Traceback" not in told[0]
    assert "error: " not in told[1]
