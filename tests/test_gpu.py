"""On a GPU: the job as users run it there. Skipped without one; none of this has an equal on a CPU."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jobs
import pytest
import torch
from safetensors.torch import load_file

from ddp_mnist import CNN, TrainConfig
from ddp_mnist.data import TrainBatches, load
from ddp_mnist.step import TrainStep
from ddp_mnist.world import World

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
                "lines": jobs.read_metrics(path),
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


def test_a_run_that_was_stopped_ends_with_the_weights_of_one_that_was_not_bit_for_bit(
    run: Run, tiny: Path, tmp_path: Path
) -> None:
    flags = ["--dataset", "fashion-mnist", "--data-dir", str(tiny), "--wandb", "disabled", "--no-pictures"]
    flags += ["--batch-size", "60", "--epochs", "2", "--log-every", "1", "--output-dir", str(tmp_path)]
    for more in (["--max-steps", "17"], []):
        jobs.succeeded(jobs.run_ranks(1, *flags, *more, variables={"CUDA_VISIBLE_DEVICES": "0"}))
    found = load_file(tmp_path / "model.safetensors")
    # Its kernels add up in the same order at every run.
    assert all(torch.equal(value, found[name]) for name, value in run()["weights"].items())
    assert [line["train/loss"] for line in jobs.read_metrics(tmp_path)] == run()["losses"]


def assert_same_weights(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in found["weights"].items():
        assert (value - expected["weights"][name]).abs().max() < WEIGHTS, name


@pytest.mark.parametrize(
    "more",
    [[], ["--accumulate", "3"], ["--grad-clip", "0.1"], ["--recipe", "fast"], ["--mixed-precision", "bf16"]],
    ids=str,
)
def test_a_recorded_step_computes_what_the_plain_one_does(run: Run, more: list[str]) -> None:
    """The uneven last batch and a rate that changes at every step included."""
    recorded, plain = run(*more), run(*more, "--no-cuda-graphs")
    assert_same_curve(recorded, plain)
    assert_same_weights(recorded, plain)


def test_the_kernels_compute_what_torch_does() -> None:
    command = [sys.executable, str(Path(__file__).parent / "kernel_checks.py"), "cuda"]
    ended = jobs.run(command, {"CUDA_VISIBLE_DEVICES": "0"})
    assert ended.code == 0, ended.err
    for name, error in json.loads(ended.out).items():
        assert error < (2e-2 if "bfloat16" in name else 2e-3 if "float16" in name else 5e-6), name


@pytest.mark.parametrize("more", [[], ["--mixed-precision", "bf16"], ["--widths", "20", "100"]], ids=str)
def test_a_step_of_tritons_kernels_computes_what_one_of_torchs_does(run: Run, more: list[str]) -> None:
    """The second layer of the last is too wide for them: torch's own are beside them."""
    assert_same_curve(run(*more), run(*more, "--no-triton"))
    assert_same_weights(run(*more), run(*more, "--no-triton"))
    ours, others = run(*more)["weights"], run(*more, "--no-triton")["weights"]
    assert not all(torch.equal(value, others[name]) for name, value in ours.items())  # it was another order


def test_a_line_that_is_finished_later_has_the_figures_of_its_own_step(run: Run) -> None:
    more = ["--log-every", "5", "--grad-clip", "0.5"]
    for one, other in zip(run(*more)["lines"], run(*more, "--no-cuda-graphs")["lines"], strict=True):
        assert one["step"] == other["step"]
        assert abs(one["train/loss"] - other["train/loss"]) < 20 * LOSS
        assert abs(one["train/gradient_norm"] - other["train/gradient_norm"]) < 0.05 * other["train/gradient_norm"]
        assert one["train/step_seconds_mean"] > 0


def test_where_triton_cannot_be_used_there_is_a_warning(run: Run, tiny: Path, tmp_path: Path) -> None:
    flags = ["--dataset", "fashion-mnist", "--data-dir", str(tiny), "--wandb", "disabled", "--no-pictures"]
    flags += ["--batch-size", "60", "--epochs", "2", "--log-every", "1", "--output-dir", str(tmp_path / "run")]
    (tmp_path / "file").touch()
    variables = {"CUDA_VISIBLE_DEVICES": "0", "TRITON_CACHE_DIR": str(tmp_path / "file" / "below")}
    (ended,) = jobs.run_ranks(1, *flags, variables=variables)
    assert ended.code == 0 and ended.err.count("Triton cannot be used (NotADirectoryError: ") == 1, ended.err
    assert_same_curve(
        jobs.read_json(tmp_path / "run" / "summary.json")
        | {"losses": [line["train/loss"] for line in jobs.read_metrics(tmp_path / "run")]},
        run("--no-triton"),
    )


def test_a_compiled_step_computes_what_the_plain_one_does(run: Run) -> None:
    assert_same_curve(run("--compile"), run())
    assert_same_weights(run("--compile"), run())


def test_fifty_recorded_steps_are_the_plain_ones(tiny: Path) -> None:
    """In one process, of the same batches, as on the CPU (test_graphs.py), where they are equal bit for bit."""
    config = TrainConfig(dataset="fashion-mnist", data_dir=tiny, wandb="disabled", batch_size=60)
    found = []
    for recorded in (True, False):
        with World(config.replace(cuda_graphs=recorded)) as world:
            assert world.device.type == "cuda"
            train, _ = load(config.dataset, config.data_dir)
            batches = TrainBatches(train.to(world.device), batch_size=60, rank=0, world_size=1, seed=0)
            step = TrainStep(config.replace(cuda_graphs=recorded), world)
            assert (step.graphs is not None) == recorded
            step.settle(batches)
            assert not any(value.any() for state in step.adam.state.values() for value in state.values())
            every = itertools.chain.from_iterable(batches.epoch(epoch) for epoch in range(2))
            figures = [(*step(batch, 1e-3), float(step.gradient_norm())) for batch in itertools.islice(every, 50)]
            losses, correct, norms = (
                torch.tensor([float(value) for value in column]) for column in zip(*figures, strict=True)
            )
            found.append({"losses": losses, "correct": correct, "norms": norms, **step.snapshot()[0]})
    one, other = found
    assert (one["losses"] - other["losses"]).abs().max() < LOSS
    assert (one["correct"] - other["correct"]).abs().max() <= 1
    assert (one["norms"] - other["norms"]).abs().max() < 0.05
    for name in one.keys() - {"losses", "correct", "norms"}:
        assert (one[name] - other[name]).abs().max() < WEIGHTS, name


def test_another_network_and_fp16_are_not_recorded(tiny: Path) -> None:
    config = TrainConfig(dataset="fashion-mnist", data_dir=tiny, wandb="disabled")
    with World(config) as world:
        assert TrainStep(config, world, model=CNN).graphs is None
    config = config.replace(mixed_precision="fp16")
    with World(config) as world:
        assert TrainStep(config, world).graphs is None


def test_its_memory_is_in_the_log_and_the_run_scores_the_same_again(run: Run, tiny: Path, tmp_path: Path) -> None:
    flags = ["--dataset", "fashion-mnist", "--data-dir", str(tiny), "--wandb", "disabled", "--no-pictures"]
    variables = {"CUDA_VISIBLE_DEVICES": "0"}
    jobs.succeeded(jobs.run_ranks(1, *flags, "--output-dir", str(tmp_path), variables=variables))
    assert all(line["gpu/memory_bytes"] > 1_000_000 for line in jobs.read_metrics(tmp_path))
    again = jobs.run([sys.executable, "-m", "ddp_mnist.evaluate", str(tmp_path)], variables)
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


def test_the_ways_to_write_a_step_can_be_compared() -> None:
    command = [sys.executable, "docs/benchmarks/variants_gpu.py", "--repeats", "1", "--steps", "2"]
    ended = jobs.run(command, {"CUDA_VISIBLE_DEVICES": "0"}, cwd=Path(__file__).parents[1])
    assert ended.code == 0, ended.err
    assert "| channels_last |" in ended.out


def test_a_network_that_cannot_be_recorded_is_told_of_the_flag(tiny: Path, tmp_path: Path) -> None:
    program = tmp_path / "fork.py"
    program.write_text(
        "import sys\n"
        "from ddp_mnist import CNN, step\n"
        "from ddp_mnist.train import main\n"
        "class Asking(CNN):\n"
        "    def forward(self, images):\n"
        "        logits = super().forward(images)\n"
        "        assert logits.sum().item() < 1e9\n"
        "        return logits\n"
        "step.CNN = Asking\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    flags = ["--dataset", "fashion-mnist", "--data-dir", str(tiny), "--wandb", "disabled", "--no-pictures"]
    flags += ["--max-steps", "3", "--output-dir", str(tmp_path / "run")]
    refused, taken = (
        jobs.run([sys.executable, str(program), *flags, *more], {"CUDA_VISIBLE_DEVICES": "0"})
        for more in ([], ["--no-cuda-graphs"])
    )
    assert refused.code == 1 and "--no-cuda-graphs" in refused.err and "Traceback" not in refused.err, refused.err
    assert taken.code == 0, taken.err
