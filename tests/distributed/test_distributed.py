"""Real processes over gloo: change the number of ranks, not the result."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faults
import jobs
import pytest
import rank_checks
import torch
import torch.nn.functional as F
from conftest import BATCH, EPOCHS, STEPS, TEST_IMAGES, TRAIN_IMAGES
from safetensors.torch import load_file
from torch import Tensor
from tutorial import TutorialCNN, count_correct, read_raw, train

from ddp_mnist.data.batches import ShardSampler

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

RunAt = Callable[[int], Path]


@dataclass(frozen=True)
class Ranks:
    """Return what every rank of one job of rank_checks.py has found."""

    found: list[dict[str, Any]]
    gradients: list[dict[str, Tensor]]


@pytest.fixture(scope="module", params=[1, 2, 3])
def ranks(request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    size, folder = request.param, tmp_path_factory.mktemp("ranks")
    # OMP_NUM_THREADS is not set, as under srun; the job sets its threads itself.
    program = (sys.executable, rank_checks.__file__)
    jobs.succeeded(jobs.run_ranks(size, str(tiny), str(folder), program=program))
    return Ranks(
        [jobs.read_json(folder / f"rank-{rank}.json") for rank in range(size)],
        [load_file(folder / f"rank-{rank}.safetensors") for rank in range(size)],
    )


@pytest.fixture(scope="module")
def expected_gradients(tiny: Path) -> dict[str, Tensor]:
    """By the tutorial's network, one process, whole batches and nothing of the package but the order."""
    images, labels = read_raw(tiny / "FashionMNIST" / "raw", "train")
    torch.manual_seed(0)
    net = TutorialCNN()
    found = {}
    for count in rank_checks.IMAGES:
        order = torch.tensor(list(ShardSampler(count, rank=0, world_size=1, seed=0)))
        for number, rows in enumerate(order.split(rank_checks.BATCH)):
            loss = F.cross_entropy(net(images[rows]), labels[rows])
            gradient = torch.cat([each.flatten() for each in torch.autograd.grad(loss, list(net.parameters()))])
            found[f"{count}/{number}"] = gradient
            found[f"{count}/{number}/norm"] = gradient.norm().reshape(1)
            found[f"{count}/{number}/loss"] = loss.detach().reshape(1)
    return found


@pytest.mark.parametrize("variant", rank_checks.VARIANTS)
def test_the_gradient_of_every_batch_is_the_single_process_one(
    ranks: Ranks, expected_gradients: dict[str, Tensor], variant: str
) -> None:
    for gradients in ranks.gradients:
        found = {key.partition("/")[2]: value for key, value in gradients.items() if key.startswith(variant)}
        assert found
        for key, value in found.items():
            expected = expected_gradients[key]
            if variant == "clipped" and value.numel() > 1:  # the norm is that before clipping
                assert expected.norm() > 10 * rank_checks.CLIP
                expected = expected * rank_checks.CLIP / expected.norm()
            rtol = {"loss": 1e-6, "norm": 1e-5}.get(key.split("/")[-1], 1e-4)
            torch.testing.assert_close(value, expected, rtol=rtol, atol=1e-6)


def test_all_ranks_hold_the_same_gradients_and_weights_to_the_bit(ranks: Ranks) -> None:
    first, *others = ranks.gradients
    assert all(torch.equal(first[key], other[key]) for other in others for key in first)
    runs = ranks.found[0]["runs"]
    assert all(rank["runs"] == runs for rank in ranks.found)
    assert [run["steps"] for run in runs.values()] == [26, 40, 26]
    assert len({run["weights"] for run in runs.values()}) == 3


def test_ranks_have_the_threads_they_were_told_or_their_share_of_the_cpus(ranks: Ranks) -> None:
    share = max(1, len(os.sched_getaffinity(0)) // len(ranks.found))
    for rank in ranks.found:
        assert rank["threads"] == 2
        assert [run["threads"] for run in rank["runs"].values()] == [1, 1, share]


def test_ranks_sum_and_broadcast(ranks: Ranks) -> None:
    size = len(ranks.found)
    for number, rank in enumerate(ranks.found):
        assert rank["sum"] == [size, sum(range(size))]
        assert rank["broadcast"] == ["from rank 0", 0, 0]
        assert rank["run on all"] == number


def test_what_fails_on_one_rank_is_the_same_error_on_all(ranks: Ranks) -> None:
    last = len(ranks.found) - 1
    where = f"rank {last}: " if last else ""
    for number, rank in enumerate(ranks.found):
        expected = {"type": "JobError", "message": f"{where}the disk is gone", "exit_code": 1, "stop_reason": "disk"}
        assert rank["job error"] == expected
        assert rank["usage error"]["message"] == f"{where}a bad value"
        assert (rank["usage error"]["type"], rank["usage error"]["exit_code"]) == ("UsageError", 2)
        if number == last:  # a bug keeps its traceback where it is
            assert (rank["bug"]["type"], rank["bug"]["message"]) == ("ZeroDivisionError", "a bug")
        else:
            assert (rank["bug"]["type"], rank["bug"]["exit_code"]) == ("JobError", 1)
            assert rank["bug"]["message"] == f"{where}ZeroDivisionError('a bug')"


def test_all_ranks_stop_at_the_same_step_where_one_of_them_has_a_reason(ranks: Ranks) -> None:
    stops = ranks.found[0]["stop"]
    assert all(rank["stop"] == stops for rank in ranks.found)
    assert stops["never"] == [None, 799]
    expected = {"one rank": ("SIGUSR2", 77), "at once": ("SIGTERM", 0), "two reasons": ("SIGTERM", 50)}
    for case, (reason, signalled) in expected.items():
        found, step = stops[case]
        # They ask about every 100 ms, and read the answer when they ask again.
        assert found == reason and signalled <= step <= signalled + 0.2 * rank_checks.STEPS_PER_SECOND


def test_a_lost_rank_is_a_job_error_and_a_bug_is_not(ranks: Ranks) -> None:
    """Whatever the library says of it, and whichever collective meets it first."""
    lost, bug = ["JobError", "lost_rank"], ["RuntimeError", None]
    for rank in ranks.found[:-1]:
        assert rank["alone"] == {"sum": lost, "stop": lost, "bug": bug}


@pytest.fixture(scope="module")
def tutorials(tiny: Path) -> tuple[list[float], list[float]]:
    """Losses and accuracies of the tutorial's own loop, in one process, over the same global batches."""
    sampler = ShardSampler(TRAIN_IMAGES, rank=0, world_size=1, seed=0)
    batches: list[Tensor] = []
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        batches += torch.tensor(list(sampler)).split(BATCH)
    return train(*read_raw(tiny / "FashionMNIST" / "raw", "train"), batches)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_curve_is_the_tutorials_at_every_world_size(
    run_at: RunAt, tutorials: tuple[list[float], list[float]], world_size: int
) -> None:
    """In each epoch's last batch all ranks but one have no image."""
    lines = jobs.read_metrics(run_at(world_size))
    losses, accuracies = tutorials
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["train/loss"] for line in lines] == pytest.approx(losses, rel=0, abs=1e-4)
    # One image may be at the edge.
    assert [line["train/accuracy"] for line in lines] == pytest.approx(accuracies, rel=0, abs=1.01 / BATCH)
    assert losses[-2] < losses[0] - 0.3 and max(accuracies) > 0.5  # it has learned


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_image_is_seen_once_an_epoch_and_scored_as_by_one_process(
    run_at: RunAt, tiny: Path, world_size: int
) -> None:
    run_dir = run_at(world_size)
    summary = jobs.read_json(run_dir / "summary.json")
    assert [summary[key] for key in ("world_size", "steps")] == [world_size, STEPS]
    assert summary["samples_seen"] == EPOCHS * TRAIN_IMAGES
    for split, prefix, images in (("train", "train", TRAIN_IMAGES), ("test", "t10k", TEST_IMAGES)):
        correct, count, loss = count_correct(run_dir / "model.safetensors", tiny / "FashionMNIST" / "raw", prefix)
        assert (summary[f"{split}_correct"], summary[f"{split}_count"]) == (correct, count) == (correct, images)
        assert summary[f"{split}_accuracy"] == correct / count
        assert summary[f"{split}_loss"] == pytest.approx(loss, rel=1e-5)


def test_accelerate_launch_changes_nothing_but_the_number_of_ranks(
    run_at: RunAt, flags: list[str], tmp_path: Path
) -> None:
    """For torchrun, see test_launchers.py."""
    line = "accelerate launch --multi_gpu --num_processes 2 --main_process_port {port} -m ddp_mnist.train"
    arguments, variables = [*flags, "--log-every", 17, "--output-dir", tmp_path], {"ACCELERATE_USE_CPU": "1"}
    with faults.launch(line, *arguments, variables=variables) as job:
        (ended,) = job.wait()
    assert ended.code == 0, ended.err
    assert ended.out.count("Checking accuracy on test data") == 1
    found, expected = (jobs.read_json(path / "summary.json") for path in (tmp_path, run_at(2)))
    for key in ("world_size", "steps", "samples_seen", "train_correct", "test_correct", "threads", "mixed_precision"):
        assert found[key] == expected[key], key
    weights = [(path / "model.safetensors").read_bytes() for path in (tmp_path, run_at(2))]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("variable", "launcher"),
    [
        (
            "ACCELERATE_MIXED_PRECISION",
            "ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu --num_processes 2 --num_machines 2 "
            "--machine_rank ... --main_process_ip ... -m ddp_mnist.train .* --mixed-precision bf16 ",
        ),
        (
            "TORCHELASTIC_RUN_ID",
            "torchrun --nnodes 2 --node-rank ... --master-addr ... --nproc-per-node 1 -m ddp_mnist.train ",
        ),
    ],
    ids=["accelerate launch", "torchrun"],
)
def test_two_machines_agree_on_a_run_directory_and_print_what_to_type_on_each(
    flags: list[str], tmp_path: Path, variable: str, launcher: str
) -> None:
    variables = {"LOCAL_WORLD_SIZE": "1", variable: "bf16"}
    ended = jobs.run_ranks(2, *flags, "--max-steps", "1", cwd=tmp_path, variables=variables)
    jobs.succeeded(ended)
    assert re.match(launcher, faults.printed_command(ended[0].out))
    assert "Checking accuracy" in ended[0].out and ended[1].out == ""
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name.endswith("-tutorial")
    assert {path.name for path in run_dir.iterdir()} >= {"summary.json", "config.json", "model.safetensors"}
