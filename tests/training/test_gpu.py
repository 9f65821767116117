"""The job on a GPU, as users run it there. Skipped without one."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jobs
import pytest
import torch
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

Run = Callable[..., dict[str, Any]]
# GPU kernels add in another order: no promise of equal bits, the same curve.
LOSS, WEIGHTS = 2e-3, 2e-2
ONE_GPU = {"CUDA_VISIBLE_DEVICES": "0"}


@pytest.fixture(scope="module")
def common(tiny: Path) -> list[str]:
    """Return the flags of every job."""
    return ["--dataset", "fashion-mnist", "--data-dir", str(tiny), "--wandb", "disabled", "--no-pictures"]


@pytest.fixture(scope="module")
def flags(common: list[str]) -> list[str]:
    """Return the flags of two epochs of 26 steps, the last one of each with a single image."""
    return [*common, "--batch-size", "60", "--epochs", "2", "--log-every", "1"]


def outcome(path: Path) -> dict[str, Any]:
    """Return the summary of a run directory, with its weights and losses."""
    return jobs.read_json(path / "summary.json") | {
        "weights": load_file(path / "model.safetensors"),
        "losses": [line["train/loss"] for line in jobs.read_metrics(path)],
    }


@pytest.fixture(scope="module")
def run(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a function that runs the tiny job with more flags, once each, and returns its outcome."""

    @functools.cache
    def run_once(*arguments: str, ranks: int = 1, cpu: bool = False) -> dict[str, Any]:
        path = tmp_path_factory.mktemp("gpu") / "run"
        variables = {"CUDA_VISIBLE_DEVICES": ""} if cpu else ONE_GPU
        ended = jobs.run_ranks(ranks, *flags, "--output-dir", str(path), *arguments, variables=variables)
        jobs.succeeded(ended)
        return outcome(path) | {"out": ended[0].out}

    return run_once


def assert_same_curve(found: dict[str, Any], expected: dict[str, Any]) -> None:
    first, other = torch.tensor(found["losses"]), torch.tensor(expected["losses"])
    assert first.shape == other.shape
    assert (first - other).abs().max() < 20 * LOSS and (first[:50] - other[:50]).abs().max() < LOSS
    assert found["samples_seen"] == expected["samples_seen"] and found["test_count"] == expected["test_count"]


def assert_same_result(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert_same_curve(found, expected)
    for name, value in found["weights"].items():
        assert (value - expected["weights"][name]).abs().max() < WEIGHTS, name


def test_one_gpu_is_used_and_trains_as_the_cpu_does(run: Run) -> None:
    assert run()["device"] == "cuda"
    assert_same_curve(run(), run(cpu=True))


@pytest.mark.parametrize(
    "more",
    [[], ["--accumulate", "3"], ["--grad-clip", "0.1"], ["--recipe", "fast"], ["--mixed-precision", "bf16"]],
    ids=str,
)
def test_a_captured_step_computes_what_the_plain_one_does(run: Run, more: list[str]) -> None:
    """The uneven last batch and a rate that changes at every step included."""
    assert_same_result(run(*more), run(*more, "--no-cuda-graphs"))


def test_a_compiled_step_computes_what_the_plain_one_does(run: Run) -> None:
    assert_same_result(run("--compile"), run())


USERS = """
from torch import nn
from ddp_mnist import run

def network():
    layers = nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5)
    return nn.Sequential(*layers, nn.Linear(8 * 169, 10))

run(model=network)
"""


def test_a_users_network_is_captured_on_request(flags: list[str], tmp_path: Path) -> None:
    """Dropout draws by the step's seed, also after a stop: another draw would show in the loss."""
    program = tmp_path / "users.py"
    program.write_text(USERS)
    found = {}
    for name, *attempts in (
        ("plain", []),
        ("captured", ["--cuda-graphs"]),
        ("stopped", ["--cuda-graphs", "--max-steps", "17"], ["--cuda-graphs"]),
    ):
        for more in attempts:
            every = (*flags, "--output-dir", str(tmp_path / name), *more)
            jobs.succeeded(jobs.run_ranks(1, *every, program=[sys.executable, str(program)], variables=ONE_GPU))
        found[name] = outcome(tmp_path / name)
    assert found["stopped"]["resumed_from"] == 17
    for name in ("captured", "stopped"):
        assert_same_result(found[name], found["plain"])
        assert found[name]["weights"]["1.num_batches_tracked"].item() == 52


def test_the_memory_is_logged_and_the_run_scores_the_same_again(common: list[str], tmp_path: Path) -> None:
    jobs.succeeded(jobs.run_ranks(1, *common, "--output-dir", str(tmp_path), variables=ONE_GPU))
    assert all(line["gpu/memory_bytes"] > 1_000_000 for line in jobs.read_metrics(tmp_path))
    again = jobs.run([sys.executable, "-m", "ddp_mnist.evaluate", str(tmp_path)], ONE_GPU)
    assert again.code == 0, again.err


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_learns_and_keeps_fp32_weights(run: Run, precision: str) -> None:
    summary = run("--mixed-precision", precision)
    assert summary["mixed_precision"] == precision
    assert sum(summary["losses"][-6:-1]) < 0.8 * sum(summary["losses"][:5])  # the very last batch is one image
    assert summary["skipped_steps"] <= 5  # fp16's scaler finding its scale
    assert {value.dtype for value in summary["weights"].values()} == {torch.float32}


def test_two_ranks_share_one_gpu_over_gloo(run: Run) -> None:
    found = run(ranks=2)
    assert (found["device"], found["world_size"]) == ("cuda", 2) and "2 ranks sharing GPUs over gloo" in found["out"]
    assert_same_curve(found, run())


WAITING = """
from ddp_mnist import CNN, run

class Waiting(CNN):
    def forward(self, images):
        logits = super().forward(images)
        assert logits.sum().item() < 1e9  # waits for the GPU
        return logits

run(model=Waiting)
"""


def test_a_network_that_cannot_be_captured_names_the_flag_that_helps(common: list[str], tmp_path: Path) -> None:
    program = tmp_path / "waiting.py"
    program.write_text(WAITING)
    command = [sys.executable, str(program), *common, "--max-steps", "3", "--output-dir", str(tmp_path / "run")]
    refused, taken = (jobs.run([*command, more], ONE_GPU) for more in ("--cuda-graphs", "--no-cuda-graphs"))
    assert refused.code == 1 and "--no-cuda-graphs" in refused.err and "Traceback" not in refused.err, refused.err
    assert taken.code == 0, taken.err


LOADED = """
import torch
from torch import nn
from torchvision.datasets import FakeData
from torchvision.transforms import ToTensor
from ddp_mnist import run

class Pairs(torch.utils.data.Dataset):
    def __init__(self, length):
        self.pictures = FakeData(length, (3, 8, 8), transform=ToTensor())
    def __len__(self):
        return len(self.pictures)
    def __getitem__(self, row):
        picture, label = self.pictures[row]
        return {"picture": picture + torch.rand(3, 8, 8)}, label

class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(192, 10)
    def forward(self, picture):
        return self.out(picture.flatten(1))

run(model=Network, data=lambda: (Pairs(145), Pairs(41)))
"""


def test_workers_feed_the_gpu_the_items_that_they_feed_the_cpu(tmp_path: Path) -> None:
    program = tmp_path / "loaded.py"
    program.write_text(LOADED)
    flags = ["--batch-size", "12", "--log-every", "1", "--cuda-graphs", "--no-pictures", "--wandb", "disabled"]
    found = {}
    for name, variables, *attempts in (
        ("cpu", {"CUDA_VISIBLE_DEVICES": ""}, []),
        ("gpu", ONE_GPU, ["--workers", "2", "--max-steps", "17"], ["--workers", "1"]),
    ):
        for more in attempts:
            every = (*flags, "--output-dir", str(tmp_path / name), *more)
            jobs.succeeded(jobs.run_ranks(1, *every, program=[sys.executable, str(program)], variables=variables))
        found[name] = outcome(tmp_path / name)
    assert found["gpu"]["device"] == "cuda" and found["gpu"]["resumed_from"] == 17
    assert_same_result(found["gpu"], found["cpu"])
