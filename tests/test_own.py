"""A network and data of a user's own: the README's example as it stands there, killed and continued, and bad input."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faults
import jobs
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

from ddp_mnist import Result, TrainConfig, fit
from ddp_mnist.errors import UsageError

README = Path(__file__).parents[1] / "README.md"
STEPS = 3 * 32


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The README's example, as a file."""
    (code,) = re.findall(r"```python\n(.*?fit\(.*?)```", README.read_text(), re.DOTALL)
    path = tmp_path_factory.mktemp("own") / "mine.py"
    path.write_text(code)
    return path


@pytest.fixture(scope="module")
def finished(script: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the example was run on two ranks, without a disturbance."""
    folder = tmp_path_factory.mktemp("finished")
    ended = jobs.run_ranks(2, program=[sys.executable, str(script)], cwd=folder)
    jobs.succeeded(ended)
    return folder / "runs" / "mine"


def test_the_readmes_example_is_short_and_learns(script: Path, finished: Path) -> None:
    assert len([line for line in script.read_text().splitlines() if line.strip()]) <= 25
    summary = jobs.read_json(finished / "summary.json")
    assert (summary["world_size"], summary["steps"], summary["finished"]) == (2, STEPS, True)
    assert summary["samples_seen"] == 3 * summary["train_count"]
    assert summary["test_accuracy"] > 0.9
    assert len(summary["test_confusion"]) == 4


def test_it_is_killed_and_continued_bit_for_bit(script: Path, finished: Path, tmp_path: Path) -> None:
    """Dropout's draws and batch norm's averages included."""
    command = [sys.executable, str(script)]
    environments = [jobs.environment(own) for own in jobs.rank_variables(2)]
    run_dir = tmp_path / "runs" / "mine"
    with faults.Job([command] * 2, environments, cwd=tmp_path) as job:
        faults.wait_for(lambda: faults.checkpoint_steps(run_dir) or not job.running(), "a checkpoint", job)
        job.kill()
    assert not (run_dir / "summary.json").exists(), "the example is too short for this test"
    jobs.succeeded(jobs.run_ranks(2, program=command, cwd=tmp_path))
    assert 0 < jobs.read_json(run_dir / "summary.json")["resumed_from"] < STEPS
    faults.assert_same_result(run_dir, finished)


def test_it_stops_on_a_signal_with_75_and_the_command_that_continues(
    script: Path, finished: Path, tmp_path: Path
) -> None:
    command = [sys.executable, str(script)]
    environments = [jobs.environment(own) for own in jobs.rank_variables(2)]
    run_dir = tmp_path / "runs" / "mine"
    with faults.Job([command] * 2, environments, cwd=tmp_path) as job:
        faults.wait_for(lambda: faults.checkpoint_steps(run_dir) or not job.running(), "a checkpoint", job)
        job.signal(signal.SIGTERM, 1)
        ended = job.wait()
    assert [process.code for process in ended] == [75, 0]
    assert faults.printed_command(ended[0].out).endswith(f"python {script}")
    jobs.succeeded(jobs.run_ranks(2, program=command, cwd=tmp_path))
    faults.assert_same_result(run_dir, finished)


def test_the_averages_that_are_saved_are_those_that_were_scored(script: Path, finished: Path) -> None:
    """Rank 0's buffers; the two passes that settle DDP's buckets do not count."""
    tensors = load_file(finished / "model.safetensors")
    assert tensors["1.num_batches_tracked"].item() == STEPS
    assert tensors["1.num_batches_tracked"].dtype == torch.int64
    namespace: dict[str, Any] = {}
    exec(script.read_text().split("config =")[0], namespace)
    net = namespace["network"]()
    net.load_state_dict(tensors)
    test = namespace["stripes"](503, seed=1)
    with torch.no_grad():
        correct = (net.eval()(test.tensors[0]).argmax(1) == test.tensors[1]).sum().item()
    assert correct == jobs.read_json(finished / "summary.json")["test_correct"]


def test_as_a_whole_command_it_has_the_flags_and_exit_codes(script: Path, tmp_path: Path) -> None:
    text = script.read_text().split("config =")[0].replace("import TrainConfig, fit", "import run")
    path = tmp_path / "command.py"
    path.write_text(f"{text}\nrun(model=network, data=lambda: (stripes(201, seed=0), stripes(53, seed=1)))\n")
    program = [sys.executable, str(path)]
    assert "expected a value from 1" in jobs.the_message([jobs.run([*program, "--epochs", "0"])], 2)
    ended = jobs.run([*program, "--epochs", "2", "--max-steps", "3", "--output-dir", "run"], cwd=tmp_path)
    jobs.succeeded([ended])
    assert jobs.read_json(tmp_path / "run" / "summary.json")["steps"] == 3
    assert faults.printed_command(ended.out).endswith(f"python {path} --output-dir run --epochs 2")


# In this process


def linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(12, 3))


def points(count: int, seed: int = 0) -> TensorDataset:
    draw = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.rand(count, 3, 4, generator=draw), torch.randint(3, (count,), generator=draw))


@pytest.fixture
def fit_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    from ddp_mnist import world

    monkeypatch.setattr(world, "_has_accelerator", lambda world_size: False)

    def run(name: str = "run", model: Any = linear, data: Any = None, **settings: Any) -> Result:
        config = TrainConfig(batch_size=20, epochs=2, threads=1, output_dir=tmp_path / name, **settings)
        return fit(config, model=model, data=data or (points(101), points(31, seed=1)))

    return run


def test_a_result_has_the_summary_and_the_trained_network(fit_here: Callable[..., Result]) -> None:
    result = fit_here()
    assert result.summary == jobs.read_json(result.run_dir / "summary.json")
    assert (result.exit_code, result.summary["steps"], result.summary["samples_seen"]) == (0, 12, 202)
    saved = load_file(result.run_dir / "model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in result.model.state_dict().items())
    again = fit_here()  # finished: the network is loaded, nothing is trained
    assert all(torch.equal(value, saved[name]) for name, value in again.model.state_dict().items())
    assert again.summary == result.summary


def test_what_is_drawn_follows_from_the_seed_and_the_step(fit_here: Callable[..., Result]) -> None:
    whole = fit_here("whole").model.state_dict()
    fit_here("parts", max_steps=5)
    torch.rand(7)  # whatever else draws in between
    parts = fit_here("parts").model.state_dict()
    other = fit_here("other", seed=1).model.state_dict()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not all(torch.equal(whole[name], other[name]) for name in whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": (points(101, seed=5), points(31))}, "holds a run with --dataset own-"),
        ({"model": lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 4))}, "holds a run of another network"),
    ],
    ids=["other data", "other network"],
)
def test_a_run_is_not_continued_as_another(
    fit_here: Callable[..., Result], change: dict[str, Any], message: str
) -> None:
    fit_here(max_steps=5)
    with pytest.raises(UsageError, match=message):
        fit_here(**change)


ONE = torch.zeros(4, 3, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": ((ONE, torch.zeros(4)), points(31))}, "the training set has torch.float32 labels"),
        ({"data": (points(101), (ONE, torch.zeros(3, dtype=torch.int64)))}, "the test set has torch.int64 labels"),
        ({"data": ((ONE, torch.tensor([0, 1, -1, 2])), points(31))}, "has a label -1"),
        ({"data": ((ONE, torch.tensor([0, 1, 3, 2])), points(31))}, "tells 3 classes apart; there is a label 3"),
        ({"model": lambda: nn.Linear(4, 3)}, "expected logits"),
    ],
    ids=["float labels", "other length", "negative label", "too many classes", "no logits"],
)
def test_bad_data_and_networks_get_one_clear_message(
    fit_here: Callable[..., Result], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        fit_here(**change)


def test_uint8_images_are_scaled_and_others_are_not(fit_here: Callable[..., Result]) -> None:
    images, labels = points(101).tensors
    coarse = (images * 255).round()
    as_bytes = fit_here("bytes", data=((coarse.byte(), labels), points(31)))
    as_floats = fit_here("floats", data=((coarse / 255, labels), points(31)))
    assert as_bytes.summary["train_loss"] == pytest.approx(as_floats.summary["train_loss"], rel=1e-5)
