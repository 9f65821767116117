"""On a GPU: the job as users run it there. Skipped without one; none of this has an equal on a CPU."""

from __future__ import annotations

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


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The tiny job's summary and weights, by what is different about it; each is run once."""
    done: dict[Any, dict[str, Any]] = {}
    gpus = {"CUDA_VISIBLE_DEVICES": "0"}

    def go(*arguments: str, ranks: int = 1, cpu: bool = False) -> dict[str, Any]:
        key = (arguments, ranks, cpu)
        if key not in done:
            path = tmp_path_factory.mktemp("gpu") / "run"
            flags = ["--dataset", "fashion-mnist", "--data-dir", str(tiny), "--wandb", "disabled", "--no-pictures"]
            flags += ["--batch-size", "60", "--epochs", "2", "--log-every", "1", "--output-dir", str(path)]
            variables = {"CUDA_VISIBLE_DEVICES": ""} if cpu else gpus
            jobs.succeeded(jobs.run_ranks(ranks, *flags, *arguments, variables=variables))
            done[key] = jobs.read_json(path / "summary.json") | {
                "weights": load_file(path / "model.safetensors"),
                "losses": [line["train/loss"] for line in jobs.read_metrics(path)],
            }
        return done[key]

    return go


def assert_same_curve(found: dict[str, Any], expected: dict[str, Any]) -> None:
    first, other = torch.tensor(found["losses"]), torch.tensor(expected["losses"])
    assert first.shape == other.shape
    assert (first - other).abs().max() < 20 * LOSS and (first[:50] - other[:50]).abs().max() < LOSS
    assert found["samples_seen"] == expected["samples_seen"] and found["test_count"] == expected["test_count"]


def test_one_gpu_is_used_and_trains_as_the_cpu_does(run: Run) -> None:
    assert run()["device"] == "cuda"
    assert_same_curve(run(), run(cpu=True))


def test_a_run_goes_on_where_it_stopped(run: Run, tiny: Path, tmp_path: Path) -> None:
    flags = ["--dataset", "fashion-mnist", "--data-dir", str(tiny), "--wandb", "disabled", "--no-pictures"]
    flags += ["--batch-size", "60", "--epochs", "2", "--log-every", "1", "--output-dir", str(tmp_path)]
    for more in (["--max-steps", "17"], []):
        jobs.succeeded(jobs.run_ranks(1, *flags, *more, variables={"CUDA_VISIBLE_DEVICES": "0"}))
    losses = [line["train/loss"] for line in jobs.read_metrics(tmp_path)]
    assert_same_curve(jobs.read_json(tmp_path / "summary.json") | {"losses": losses}, run())


def test_cuda_graphs_compute_the_same_the_uneven_last_batch_included(run: Run) -> None:
    assert_same_curve(run("--compile"), run())
    for name, value in run("--compile")["weights"].items():
        assert (value - run()["weights"][name]).abs().max() < WEIGHTS


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_learns_and_keeps_fp32_weights(run: Run, precision: str) -> None:
    summary = run("--mixed-precision", precision)
    assert summary["mixed_precision"] == precision
    assert summary["losses"][-1] < 0.8 * summary["losses"][0]
    assert summary["skipped_steps"] <= 5  # fp16's scaler finding its scale
    assert {value.dtype for value in summary["weights"].values()} == {torch.float32}


def test_two_ranks_share_one_gpu_over_gloo(run: Run) -> None:
    assert run(ranks=2)["device"] == "cuda" and run(ranks=2)["world_size"] == 2
    assert_same_curve(run(ranks=2), run())
