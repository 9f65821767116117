"""Real processes over gloo: change the number of ranks, not the result."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jobs
import pytest
import rank_checks
import torch
import torch.nn.functional as F
from conftest import BATCH, EPOCHS, STEPS, TEST_IMAGES, TRAIN_IMAGES
from safetensors.torch import load_file
from torch import Tensor
from tutorial import TutorialCNN, count_correct, read_raw, train

from ddp_mnist import TrainConfig
from ddp_mnist.data.batches import ShardSampler
from ddp_mnist.distributed.context import Context
from ddp_mnist.distributed.threads import batch_scheduling

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

RunAt = Callable[[int], Path]
RanksAt = Callable[[int], tuple[list[Any], dict[str, list[Any]]]]
PROGRAM = (sys.executable, str(Path(rank_checks.__file__)))


@pytest.fixture(scope="module")
def ranks_at(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> RanksAt:
    """Return what each rank found in rank_checks.py, and its gradients by each variant; one start for a world size."""
    done: dict[int, tuple[list[Any], dict[str, list[Any]]]] = {}

    def start(world_size: int) -> tuple[list[Any], dict[str, list[Any]]]:
        if world_size not in done:
            folder = tmp_path_factory.mktemp(f"ranks-{world_size}")
            # OMP_NUM_THREADS is not set, as under srun; the job sets its threads itself.
            jobs.succeeded(jobs.run_ranks(world_size, str(tiny), str(folder), program=PROGRAM))
            done[world_size] = (
                [jobs.read_json(folder / f"rank-{rank}.json") for rank in range(world_size)],
                {
                    name: [load_file(folder / f"{name}-{rank}.safetensors") for rank in range(world_size)]
                    for name in rank_checks.VARIANTS
                },
            )
        return done[world_size]

    return start


@pytest.fixture(scope="module")
def expected_gradients(tiny: Path) -> dict[str, Tensor]:
    """By the tutorial's network, one process, whole batches and nothing of the package but the order."""
    images, labels = read_raw(tiny / "FashionMNIST" / "raw", "train")
    torch.manual_seed(0)
    net = TutorialCNN()
    found = {}
    for name, count in rank_checks.GRADIENT_IMAGES.items():
        order = torch.tensor(list(ShardSampler(count, rank=0, world_size=1, seed=0)))
        for number, rows in enumerate(order.split(rank_checks.BATCH)):
            loss = F.cross_entropy(net(images[rows]), labels[rows])
            gradient = torch.autograd.grad(loss, list(net.parameters()))
            found[f"{name}/{number}"] = torch.cat([value.flatten() for value in gradient])
            found[f"{name}/{number}/norm"] = found[f"{name}/{number}"].norm().reshape(1)
            found[f"{name}/{number}/loss"] = loss.detach().reshape(1)
    return found


@pytest.mark.parametrize(
    ("parts", "variant"), [(parts, name) for name, each in rank_checks.VARIANTS.items() for parts in each.parts]
)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_gradient_of_every_batch_is_the_single_process_one(
    ranks_at: RanksAt, expected_gradients: dict[str, Tensor], world_size: int, parts: int, variant: str
) -> None:
    _, gradients = ranks_at(world_size)
    for name in rank_checks.VARIANTS[variant].images:
        for step in range(-(-rank_checks.GRADIENT_IMAGES[name] // rank_checks.BATCH)):
            for found in gradients[variant]:
                key = f"{name}/{parts}/{step}"
                torch.testing.assert_close(found[key], expected_gradients[f"{name}/{step}"], rtol=1e-4, atol=1e-6)
                for figure, bound in (("loss", 1e-6), ("norm", 1e-5)):
                    expected = expected_gradients[f"{name}/{step}/{figure}"]
                    torch.testing.assert_close(found[f"{key}/{figure}"], expected, rtol=bound, atol=0)


@pytest.mark.parametrize("variant", rank_checks.VARIANTS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_gradients_are_the_same_bits_on_all_ranks(ranks_at: RanksAt, world_size: int, variant: str) -> None:
    first, *others = ranks_at(world_size)[1][variant]
    assert all(torch.equal(first[key], other[key]) for other in others for key in first)


@pytest.mark.parametrize("network", ["ours", "a user's"])
def test_every_step_is_accelerates_backward_through_ddp(ranks_at: RanksAt, network: str) -> None:
    for rank in ranks_at(2)[0]:
        steps = rank["calls"][network]
        assert len(steps) == 30
        assert all(backward >= 1 and forward >= 1 for backward, forward in steps)


@pytest.mark.skipif(sys.platform != "linux", reason="the policies of Linux")
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_gloos_threads_never_interrupt_one_that_runs(ranks_at: RanksAt, world_size: int) -> None:
    for rank in ranks_at(world_size)[0]:
        found = rank["policies"]
        assert set(found["gloo"]) == (set() if world_size == 1 else {os.SCHED_BATCH})
        assert found["own"] == [os.SCHED_OTHER]


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_ranks_hold_the_same_weights_after_a_run(ranks_at: RanksAt, world_size: int) -> None:
    found, _ = ranks_at(world_size)
    assert all(rank["trained"] == found[0]["trained"] for rank in found)
    assert [run["steps"] for run in found[0]["trained"]] == [26, 40]
    assert len({run["weights"] for run in found[0]["trained"]}) == 2


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_score_is_the_same_on_all_ranks_and_at_every_world_size(ranks_at: RanksAt, world_size: int) -> None:
    (alone,), _ = ranks_at(1)
    found, _ = ranks_at(world_size)
    for rank in found:
        assert rank["score"]["confusion"] == alone["score"]["confusion"]
        assert rank["score"]["loss"] == pytest.approx(alone["score"]["loss"], rel=1e-12)
        assert rank["score"]["mistakes"] == alone["score"]["mistakes"]
    assert sum(map(sum, alone["score"]["confusion"])) == TEST_IMAGES


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_warm_up_changes_nothing(ranks_at: RanksAt, world_size: int) -> None:
    for rank in ranks_at(world_size)[0]:
        assert rank["warm-up"]["after"] == rank["warm-up"]["before"]
        assert rank["warm-up"]["without gradient"]


@pytest.mark.parametrize("settings", [*rank_checks.FIFTY_STEPS, "bf16"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_all_ranks_hold_the_same_weights_after_fifty_steps(ranks_at: RanksAt, world_size: int, settings: str) -> None:
    assert len({rank["fifty steps"][settings] for rank in ranks_at(world_size)[0]}) == 1


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_bf16_is_computed_in_at_every_world_size(ranks_at: RanksAt, world_size: int) -> None:
    for rank in ranks_at(world_size)[0]:
        assert 1e-4 < rank["bf16 from fp32"] < 0.1


@pytest.mark.skipif(sys.platform != "linux", reason="the policies of Linux")
def test_a_container_that_forbids_policies_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", refused)
    with batch_scheduling():
        entered = True
    assert entered and os.sched_getscheduler(0) == os.SCHED_OTHER


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_clipping_limits_the_norm_of_the_global_gradient(
    ranks_at: RanksAt, expected_gradients: dict[str, Tensor], world_size: int
) -> None:
    before = expected_gradients["one left/0/norm"].item()
    assert before > 10 * rank_checks.CLIP
    for rank in ranks_at(world_size)[0]:
        assert rank["clipped"] == pytest.approx([rank_checks.CLIP, before], rel=1e-3)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_sum_and_broadcast(ranks_at: RanksAt, world_size: int) -> None:
    for rank in ranks_at(world_size)[0]:
        assert rank["size"] == world_size
        assert rank["sum"] == [world_size, sum(range(world_size))]
        assert rank["broadcast"] == "from rank 0"


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_what_fails_on_one_rank_is_the_same_error_on_all(ranks_at: RanksAt, world_size: int) -> None:
    found, _ = ranks_at(world_size)
    where = "" if world_size == 1 else f"rank {world_size - 1}: "
    for number, rank in enumerate(found):
        failures = rank["failures"]
        assert failures["none"] == number
        expected = {"type": "JobError", "message": f"{where}the disk is gone", "exit_code": 1, "stop_reason": "disk"}
        assert failures["job"] == expected
        assert failures["usage"]["message"] == f"{where}a bad value"
        assert (failures["usage"]["type"], failures["usage"]["exit_code"]) == ("UsageError", 2)
        if number == world_size - 1:  # a bug keeps its traceback where it is
            assert failures["bug"] == {"type": "ZeroDivisionError", "message": "a bug"}
        else:
            assert failures["bug"]["message"] == f"{where}ZeroDivisionError('a bug')"
            assert (failures["bug"]["type"], failures["bug"]["exit_code"]) == ("JobError", 1)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_job_has_the_threads_it_was_told_whatever_accelerate_sets(ranks_at: RanksAt, world_size: int) -> None:
    assert [rank["threads"] for rank in ranks_at(world_size)[0]] == [2] * world_size


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_scores_are_those_of_one_process_with_the_tutorials_network_to_the_image(
    run_at: RunAt, tiny: Path, world_size: int
) -> None:
    run_dir = run_at(world_size)
    summary = jobs.read_json(run_dir / "summary.json")
    for split, prefix, images in (("train", "train", TRAIN_IMAGES), ("test", "t10k", TEST_IMAGES)):
        correct, count, loss = count_correct(run_dir / "model.safetensors", tiny / "FashionMNIST" / "raw", prefix)
        assert count == images
        assert (summary[f"{split}_correct"], summary[f"{split}_count"]) == (correct, count)
        assert summary[f"{split}_accuracy"] == correct / count
        assert summary[f"{split}_loss"] == pytest.approx(loss, rel=1e-5)
    assert summary["test_accuracy"] > 0.5  # it has learned


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_image_is_seen_once_an_epoch(run_at: RunAt, world_size: int) -> None:
    summary = jobs.read_json(run_at(world_size) / "summary.json")
    assert (summary["world_size"], summary["steps"]) == (world_size, STEPS)
    assert summary["samples_seen"] == EPOCHS * TRAIN_IMAGES
    assert (summary["train_count"], summary["test_count"]) == (TRAIN_IMAGES, TEST_IMAGES)


@pytest.fixture(scope="module")
def tutorials(tiny: Path) -> tuple[list[float], list[float]]:
    """(losses, accuracies) of every step of the tutorial's own loop, in one process, over the same global batches."""
    sampler = ShardSampler(TRAIN_IMAGES, rank=0, world_size=1, seed=0)
    batches: list[Tensor] = []
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        batches += torch.tensor(list(sampler)).split(BATCH)
    return train(*read_raw(tiny / "FashionMNIST" / "raw", "train"), batches)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_curve_is_the_tutorials_at_every_world_size(
    run_at: RunAt, tutorials: tuple[list[float], list[float]], world_size: int
) -> None:
    """In each epoch's last batch all ranks but one have no image."""
    lines = jobs.read_metrics(run_at(world_size))
    losses, accuracies = tutorials
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["train/loss"] for line in lines] == pytest.approx(losses, rel=0, abs=1e-4)
    assert losses[-2] < losses[0] - 0.3  # it goes somewhere
    # One image may be at the edge.
    assert [line["train/accuracy"] for line in lines] == pytest.approx(accuracies, rel=0, abs=1.01 / BATCH)
    assert max(accuracies) > 0.5


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_same_command_gives_the_same_bytes(
    run_at: RunAt, flags: list[str], tmp_path: Path, world_size: int
) -> None:
    # Logging is no part of the result, and all ranks of the second run find nothing but their own machine's default.
    jobs.succeeded(jobs.run_ranks(world_size, *flags, "--log-every", "17", "--output-dir", str(tmp_path)))
    again, first = tmp_path / "model.safetensors", run_at(world_size) / "model.safetensors"
    assert again.read_bytes() == first.read_bytes()


LAUNCHERS = {
    "accelerate launch": (1, "accelerate launch --num_processes 1 --num_machines 1 --dynamo_backend no -m", {}),
    "torchrun, one process": (1, "torchrun --nproc-per-node 1 --master-port {port} -m", {}),
    "torchrun": (2, "torchrun --nproc-per-node 2 --master-port {port} -m", {}),
    "accelerate launch --multi_gpu": (
        2,
        "accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --dynamo_backend no "
        "--main_process_port {port} -m",
        {"ACCELERATE_USE_CPU": "1"},
    ),
    "accelerate launch --config_file": (
        2,
        "accelerate launch --config_file {config} --main_process_port {port} -m",
        {},
    ),
}
ACCELERATE_CONFIG = """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
machine_rank: 0
num_machines: 1
num_processes: 2
mixed_precision: 'no'
use_cpu: false
"""


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_changes_nothing_but_the_number_of_ranks(
    run_at: RunAt, flags: list[str], tmp_path: Path, launcher: str
) -> None:
    world_size, line, variables = LAUNCHERS[launcher]
    config = tmp_path / "accelerate.yaml"
    config.write_text(ACCELERATE_CONFIG)
    name, *words = line.format(port=jobs.free_port(), config=config).split()
    scripts = Path(sys.executable).parent
    command = [sys.executable, str(scripts / name), *words, "ddp_mnist.train", *flags]
    ended = jobs.run([*command, "--output-dir", str(tmp_path / "run")], variables)
    assert ended.code == 0, ended.err
    assert ended.out.count("Checking accuracy on test data") == 1
    found, expected = (jobs.read_json(path / "summary.json") for path in (tmp_path / "run", run_at(world_size)))
    for key in ("world_size", "steps", "samples_seen", "train_correct", "test_correct", "threads", "mixed_precision"):
        assert found[key] == expected[key], key
    weights = [(path / "model.safetensors").read_bytes() for path in (tmp_path / "run", run_at(world_size))]
    assert weights[0] == weights[1]


def test_a_rank_takes_its_share_of_the_machine_by_default(flags: list[str], tmp_path: Path) -> None:
    arguments = [*flags, "--threads", "0", "--max-steps", "1", "--output-dir", str(tmp_path)]
    jobs.succeeded(jobs.run_ranks(2, *arguments, variables={"OMP_NUM_THREADS": "1"}))
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert jobs.read_json(tmp_path / "summary.json")["threads"] == share


def test_all_ranks_agree_on_a_new_run_directory(flags: list[str], tmp_path: Path) -> None:
    ended = jobs.run_ranks(2, *flags, "--max-steps", "1", cwd=tmp_path)
    jobs.succeeded(ended)
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name.endswith("-tutorial")
    assert {path.name for path in run_dir.iterdir()} >= {"summary.json", "config.json", "model.safetensors"}
    assert "Checking accuracy" in ended[0].out
    assert ended[1].out == ""


@pytest.mark.parametrize("before", [None, "false"])
def test_ddp_is_not_told_of_a_gpu_that_is_not_there(
    process_of_a_job: None, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    """Where ranks share a GPU, Accelerate would name it by the rank's number; on a GPU, tests/training/test_gpu.py."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    if before is not None:
        monkeypatch.setenv("ACCELERATE_BYPASS_DEVICE_MAP", before)
    with Context(TrainConfig(threads=1)):
        assert os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] == "true"
    assert os.environ.get("ACCELERATE_BYPASS_DEVICE_MAP") == before
