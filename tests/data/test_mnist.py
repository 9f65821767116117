"""The real MNIST: the published figures, from the very files. Needs DDP_MNIST_DATA."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jobs
import pytest

from ddp_mnist.data import mnist as files


def train(mnist: Path, run_dir: Path, world_size: int, recipe: str) -> dict[str, Any]:
    """The summary of one epoch."""
    arguments = ["--dataset", "mnist", "--data-dir", str(mnist), "--wandb", "disabled", "--no-pictures"]
    arguments += ["--threads", "1", "--epochs", "1", "--recipe", recipe, "--output-dir", str(run_dir)]
    jobs.succeeded(jobs.run_ranks(world_size, *arguments))
    summary = jobs.read_json(run_dir / "summary.json")
    assert (summary["train_count"], summary["test_count"], summary["samples_seen"]) == (60_000, 10_000, 60_000)
    assert (summary["recipe"], summary["world_size"], summary["dataset"]) == (recipe, world_size, "mnist")
    return summary


@pytest.mark.mnist
def test_one_epoch_of_the_tutorial_reaches_96_percent_on_one_rank_as_on_two(mnist: Path, tmp_path: Path) -> None:
    for split in files.NAMES:
        files.read_split("mnist", mnist, split)  # unpacked, where there are .gz files alone
    assert set(files.verify("mnist", mnist).values()) == {"ok"}
    one, two = (train(mnist, tmp_path / str(world_size), world_size, "tutorial") for world_size in (1, 2))
    assert (one["steps"], two["steps"]) == (938, 938)
    assert one["test_accuracy"] >= 0.96 and two["test_accuracy"] >= 0.96
    assert abs(one["test_accuracy"] - two["test_accuracy"]) <= 0.003
    from tutorial import count_correct  # imports torch, which a skip need not wait for

    counted = count_correct(tmp_path / "2" / "model.safetensors", mnist / "MNIST" / "raw", "t10k")
    assert counted[:2] == (two["test_correct"], 10_000)


@pytest.mark.mnist
def test_one_epoch_of_the_fast_recipe_reaches_98_percent(mnist: Path, tmp_path: Path) -> None:
    assert train(mnist, tmp_path, 1, "fast")["test_accuracy"] >= 0.98


@pytest.mark.slow
def test_missing_real_data_fail_the_tests_where_they_are_required() -> None:
    this = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "mnist", __file__]
    failed = jobs.run(this, {"DDP_MNIST_REQUIRE": "mnist"})
    assert failed.code == 1 and "passed" not in failed.out
    assert "needs the real MNIST: DDP_MNIST_DATA is not set" in failed.out
