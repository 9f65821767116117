"""On a GPU: the job as users run it there. Skipped without one; none of this has an equal on a CPU."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jobs
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ddp_mnist import TrainConfig
from ddp_mnist.cuda_graph import can_capture
from ddp_mnist.data.batches import Batch, Batches, Split
from ddp_mnist.data.sources import load
from ddp_mnist.distributed.context import Context
from ddp_mnist.optimizer import save_state
from ddp_mnist.program import Program
from ddp_mnist.run.checkpoint import weights
from ddp_mnist.step import TrainStep

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
    """Flags of every job."""
    return ["--dataset", "fashion-mnist", "--data-dir", str(tiny), "--wandb", "disabled", "--no-pictures"]


@pytest.fixture(scope="module")
def flags(common: list[str]) -> list[str]:
    """Two epochs of 26 steps, the last one of each with a single image."""
    return [*common, "--batch-size", "60", "--epochs", "2", "--log-every", "1"]


def outcome(path: Path) -> dict[str, Any]:
    """The summary of a run directory, with its weights and losses."""
    return jobs.read_json(path / "summary.json") | {
        "weights": load_file(path / "model.safetensors"),
        "losses": [line["train/loss"] for line in jobs.read_metrics(path)],
    }


@pytest.fixture(scope="module")
def run(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The tiny job's outcome, by what is different about it; each is run once."""
    done: dict[Any, dict[str, Any]] = {}

    def go(*arguments: str, ranks: int = 1, cpu: bool = False) -> dict[str, Any]:
        key = (arguments, ranks, cpu)
        if key not in done:
            path = tmp_path_factory.mktemp("gpu") / "run"
            variables = {"CUDA_VISIBLE_DEVICES": ""} if cpu else ONE_GPU
            every = (*flags, "--output-dir", str(path), *arguments)
            jobs.succeeded(jobs.run_ranks(ranks, *every, variables=variables))
            done[key] = outcome(path)
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


def assert_same_weights(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in found["weights"].items():
        assert (value - expected["weights"][name]).abs().max() < WEIGHTS, name


def test_a_run_that_was_stopped_goes_on_as_one_that_was_not(run: Run, flags: list[str], tmp_path: Path) -> None:
    for more in (["--max-steps", "17"], []):
        jobs.succeeded(jobs.run_ranks(1, *flags, "--output-dir", str(tmp_path), *more, variables=ONE_GPU))
    resumed = outcome(tmp_path)
    assert resumed["resumed_from"] == 17
    assert_same_curve(resumed, run())
    assert_same_weights(resumed, run())


@pytest.mark.parametrize(
    "more",
    [[], ["--accumulate", "3"], ["--grad-clip", "0.1"], ["--recipe", "fast"], ["--mixed-precision", "bf16"]],
    ids=str,
)
def test_a_captured_step_computes_what_the_plain_one_does(run: Run, more: list[str]) -> None:
    """The uneven last batch and a rate that changes at every step included."""
    captured, plain = run(*more), run(*more, "--no-cuda-graphs")
    assert_same_curve(captured, plain)
    assert_same_weights(captured, plain)


def test_a_compiled_step_computes_what_the_plain_one_does(run: Run) -> None:
    assert_same_curve(run("--compile"), run())
    assert_same_weights(run("--compile"), run())


def test_fifty_captured_steps_are_the_plain_ones(tiny: Path) -> None:
    """In one process, of the same batches, as on the CPU (test_cuda_graph.py), where they are equal bit for bit."""
    config = TrainConfig(dataset="fashion-mnist", data_dir=tiny, wandb="disabled", mixed_precision="no", batch_size=60)
    found = []
    for captured in (True, False):
        with Context(config) as context:
            assert context.device.type == "cuda"
            train, _ = load(config.dataset, config.data_dir)
            batches = Batches(train.to(context.device), batch_size=60, rank=0, world_size=1, seed=0)
            step = TrainStep(config, context, Program().build_network(config, context, None), capture=captured)
            before = weights(step.network)
            step.warm_up(batches)
            assert all(torch.equal(value, before[name]) for name, value in weights(step.network).items())
            assert not any(value.any() for value in save_state(step.network, step.optimizer).values())
            every = itertools.chain.from_iterable(batches.epoch(epoch) for epoch in range(2))
            figures = [(*step(batch, 1e-3), step.gradient_norm()) for batch in itertools.islice(every, 50)]
            losses, correct, norms = (
                torch.tensor([float(value) for value in column]) for column in zip(*figures, strict=True)
            )
            found.append({"losses": losses, "correct": correct, "norms": norms, **weights(step.network)})
            step.close()
    one, other = found
    assert (one["losses"] - other["losses"]).abs().max() < LOSS
    assert (one["correct"] - other["correct"]).abs().max() <= 1
    assert (one["norms"] - other["norms"]).abs().max() < 0.05
    for name in one.keys() - {"losses", "correct", "norms"}:
        assert (one[name] - other[name]).abs().max() < WEIGHTS, name


@pytest.mark.parametrize(
    ("changes", "ours", "captured"),
    [
        ({}, True, True),
        ({"mixed_precision": "bf16"}, True, True),
        ({"cuda_graphs": False}, True, False),
        ({}, False, False),
        ({"cuda_graphs": True}, False, True),
        ({"mixed_precision": "fp16"}, True, False),
        ({"mixed_precision": "fp16", "cuda_graphs": True}, False, False),
    ],
    ids=str,
)
def test_our_network_is_captured_and_a_users_on_request(changes: dict[str, Any], ours: bool, captured: bool) -> None:
    config = TrainConfig(**{"wandb": "disabled", "mixed_precision": "no", **changes})
    with Context(config) as context:
        assert can_capture(config, context, ours=ours) == captured


USERS = """
from torch import nn
from ddp_mnist import run

def network():
    layers = nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5)
    return nn.Sequential(*layers, nn.Linear(8 * 169, 10))

run(model=network)
"""


def test_a_users_network_is_captured_on_request(flags: list[str], tmp_path: Path) -> None:
    """It trains as it does without, also after a stop: dropout draws by the step's seed, and what it draws would show
    in each loss."""
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
        assert_same_curve(found[name], found["plain"])
        assert_same_weights(found[name], found["plain"])
        assert found[name]["weights"]["1.num_batches_tracked"].item() == 52


def test_dropout_draws_anew_at_each_replay_and_the_same_for_the_same_seed() -> None:
    """A rate of 0 leaves the weights alone: losses of one batch differ by what dropout draws, and by nothing else."""
    config = TrainConfig(wandb="disabled", mixed_precision="no")
    with Context(config) as context:
        images = torch.randint(0, 256, (64, 1, 28, 28), dtype=torch.uint8, device=context.device)
        labels = torch.randint(0, 10, (64,), device=context.device)
        network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(784, 10)).to(context.device)
        step = TrainStep(config, context, network, capture=True)
        step.warm_up(Batches(Split(images, labels), batch_size=64, rank=0, world_size=1, seed=0))
        seeds = [*range(10), *range(10)]
        losses = [step(Batch(images, labels, 64, 64, seed), 0.0)[0].item() for seed in seeds]
        step.close()
    assert len(set(losses[:10])) == 10 and losses[10:] == losses[:10]


def test_its_memory_is_in_the_log_and_the_run_scores_the_same_again(common: list[str], tmp_path: Path) -> None:
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
    assert run(ranks=2)["device"] == "cuda" and run(ranks=2)["world_size"] == 2
    assert_same_curve(run(ranks=2), run())


def test_a_network_that_cannot_be_captured_is_told_of_the_flag(common: list[str], tmp_path: Path) -> None:
    program = tmp_path / "asking.py"
    program.write_text(
        "from ddp_mnist import CNN, run\n"
        "class Asking(CNN):\n"
        "    def forward(self, images):\n"
        "        logits = super().forward(images)\n"
        "        assert logits.sum().item() < 1e9\n"
        "        return logits\n"
        "run(model=Asking)\n"
    )
    command = [sys.executable, str(program), *common, "--max-steps", "3", "--output-dir", str(tmp_path / "run")]
    refused, taken = (jobs.run([*command, more], ONE_GPU) for more in ("--cuda-graphs", "--no-cuda-graphs"))
    assert refused.code == 1 and "--no-cuda-graphs" in refused.err and "Traceback" not in refused.err, refused.err
    assert taken.code == 0, taken.err
