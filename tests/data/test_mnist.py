"""The real MNIST: the published figures, from the very files. Needs DDP_MNIST_DATA."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jobs
import pytest

Score = Callable[[int], dict[str, Any]]


@pytest.fixture(scope="module")
def one_epoch(mnist: Path, tmp_path_factory: pytest.TempPathFactory) -> Score:
    """The summary of the tutorial's recipe after one epoch, by number of ranks."""
    done: dict[int, dict[str, Any]] = {}

    def run(world_size: int) -> dict[str, Any]:
        if world_size not in done:
            run_dir = tmp_path_factory.mktemp("mnist-runs") / str(world_size)
            arguments = ["--dataset", "mnist", "--data-dir", str(mnist), "--wandb", "disabled", "--threads", "1"]
            ended = jobs.run_ranks(world_size, *arguments, "--epochs", "1", "--output-dir", str(run_dir))
            jobs.succeeded(ended)
            done[world_size] = jobs.read_json(run_dir / "summary.json") | {"run_dir": run_dir}
        return done[world_size]

    return run


@pytest.mark.mnist
@pytest.mark.parametrize("world_size", [1, 2])
def test_one_epoch_of_the_tutorial_reaches_96_percent_with_exact_counts(
    one_epoch: Score, mnist: Path, world_size: int
) -> None:
    summary = one_epoch(world_size)
    assert (summary["train_count"], summary["test_count"], summary["samples_seen"]) == (60_000, 10_000, 60_000)
    assert (summary["steps"], summary["world_size"], summary["dataset"]) == (938, world_size, "mnist")
    assert summary["test_accuracy"] >= 0.96
    from tutorial import count_correct  # imports torch, which a skip need not wait for

    weights, raw = summary["run_dir"] / "model.safetensors", mnist / "MNIST" / "raw"
    assert count_correct(weights, raw, "t10k")[:2] == (summary["test_correct"], 10_000)


@pytest.mark.mnist
def test_two_ranks_score_as_one(one_epoch: Score) -> None:
    assert abs(one_epoch(1)["test_accuracy"] - one_epoch(2)["test_accuracy"]) <= 0.003


@pytest.mark.mnist
def test_one_epoch_of_the_fast_recipe_reaches_98_percent(mnist: Path, tmp_path: Path) -> None:
    arguments = ["--recipe", "fast", "--dataset", "mnist", "--data-dir", str(mnist), "--wandb", "disabled"]
    jobs.succeeded(jobs.run_ranks(1, *arguments, "--threads", "1", "--epochs", "1", "--output-dir", str(tmp_path)))
    summary = jobs.read_json(tmp_path / "summary.json")
    assert summary["test_accuracy"] >= 0.98
    assert (summary["recipe"], summary["test_count"]) == ("fast", 10_000)


@pytest.mark.slow
def test_the_real_data_are_skipped_with_a_reason_but_not_where_they_are_required() -> None:
    this = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", "-m", "mnist", os.path.abspath(__file__)]
    skipped, failed = (jobs.run(this, {"DDP_MNIST_REQUIRE": names}) for names in ("", "mnist"))
    assert (skipped.code, failed.code) == (0, 1)
    assert " skipped" in skipped.out and "passed" not in skipped.out
    for ended in (skipped, failed):
        assert "needs the real MNIST: DDP_MNIST_DATA is not set" in ended.out
