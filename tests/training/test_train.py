"""The job on one and two ranks: what it leaves behind, and how it ends when something is wrong."""

from __future__ import annotations

import errno
import fcntl
import gzip
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import time
import zlib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

import faults
import jobs
import pytest
import torch
from conftest import BATCH, EPOCHS, STEPS, TEST_IMAGES, TRAIN_IMAGES, write_digits
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tutorial import TutorialCNN, count_correct

from ddp_mnist import TrainConfig, fit
from ddp_mnist.config import Schedule
from ddp_mnist.distributed.context import Context
from ddp_mnist.distributed.launcher import install_excepthook
from ddp_mnist.errors import JobError
from ddp_mnist.report import page as report
from ddp_mnist.run import directory as rundir
from ddp_mnist.run import summary as provenance
from ddp_mnist.run.checkpoint import Checkpoints, TrainState
from ddp_mnist.run.metrics import Metrics, MetricsFile
from ddp_mnist.run.saver import SaveClock
from ddp_mnist.step import TrainStep, learning_rate

Train = Callable[..., jobs.Ended]
RunAt = Callable[[int], Path]

SUMMARY_KEYS = {
    *("finished", "stop_reason", "exit_code", "dataset", "recipe", "epochs", "steps", "samples_seen", "world_size"),
    *("device", "mixed_precision", "threads", "train_correct", "train_count", "train_accuracy", "test_correct"),
    *("test_count", "test_accuracy", "test_loss", "train_seconds", "eval_seconds", "wall_seconds"),
    *("images_per_second", "resumed_from", "wandb_mode"),
}


# --- What a run leaves behind


@pytest.mark.parametrize("world_size", jobs.sizes(1, 2))
def test_the_summary_says_what_was_run_and_what_came_of_it(run_at: RunAt, world_size: int) -> None:
    summary = jobs.read_json(run_at(world_size) / "summary.json")
    assert summary.keys() >= SUMMARY_KEYS
    expected = {
        "finished": True,
        "stop_reason": "finished",
        "exit_code": 0,
        "dataset": "fashion-mnist",
        "recipe": "tutorial",
        "epochs": EPOCHS,
        "steps": STEPS,
        "samples_seen": EPOCHS * TRAIN_IMAGES,
        "world_size": world_size,
        "device": "cpu",
        "mixed_precision": "no",
        "threads": 1,
        "train_count": TRAIN_IMAGES,
        "test_count": TEST_IMAGES,
        "resumed_from": None,
        "wandb_mode": "disabled",
    }
    assert {key: summary[key] for key in expected} == expected
    assert 0 < summary["train_seconds"] < summary["wall_seconds"]
    assert 0 < summary["eval_seconds"] < summary["wall_seconds"]
    assert summary["images_per_second"] == pytest.approx(summary["samples_seen"] / summary["train_seconds"], rel=0.05)
    assert summary["test_accuracy"] == summary["test_correct"] / TEST_IMAGES
    assert summary["train_accuracy"] == summary["train_correct"] / TRAIN_IMAGES


@pytest.mark.parametrize("world_size", jobs.sizes(1, 2))
def test_the_saved_configuration_is_resolved_and_says_how_it_was_started(
    run_at: RunAt, tiny: Path, world_size: int
) -> None:
    run_dir = run_at(world_size)
    saved = jobs.read_json(run_dir / "config.json")
    config = TrainConfig.from_dict(saved["settings"])
    assert config == TrainConfig(
        dataset="fashion-mnist",
        data_dir=tiny,
        output_dir=run_dir,
        epochs=EPOCHS,
        batch_size=BATCH,
        log_every=1,
        threads=1,
        wandb="disabled",
        pictures=False,
    )
    assert saved["versions"]["torch"] == metadata.version("torch")
    assert saved["versions"].keys() >= {"python", "torch", "torchvision", "accelerate", "ddp_mnist"}
    assert saved["launch"]["world_size"] == world_size
    assert str(run_dir) in saved["launch"]["command"]
    assert saved["git"] is None or len(saved["git"]["commit"]) == 40


@pytest.mark.parametrize("why", ["no git", "no checkout"])
def test_what_is_not_known_of_a_results_origin_is_null(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, why: str
) -> None:
    def version(name: str) -> str:
        if name == "wandb":
            raise metadata.PackageNotFoundError(name)
        return "1.2"

    monkeypatch.setattr(metadata, "version", version)
    if why == "no git":
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    facts = provenance.facts(1)
    assert facts["git"] is None
    assert (facts["versions"]["wandb"], facts["versions"]["torch"]) == (None, "1.2")


@pytest.mark.parametrize("world_size", jobs.sizes(1, 2, 3))
def test_the_weights_are_six_plain_fp32_tensors_without_metadata(run_at: RunAt, world_size: int) -> None:
    with safe_open(run_at(world_size) / "model.safetensors", "pt") as file:
        assert file.metadata() is None
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    expected = TutorialCNN().state_dict()
    assert found.keys() == expected.keys()
    assert {name: value.shape for name, value in found.items()} == {
        name: value.shape for name, value in expected.items()
    }
    assert {value.dtype for value in found.values()} == {torch.float32}


@pytest.mark.parametrize("world_size", jobs.sizes(1, 2))
def test_metrics_have_a_line_for_every_interval_and_the_score_at_each_epochs_end(
    run_at: RunAt, world_size: int
) -> None:
    lines = jobs.read_metrics(run_at(world_size))
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["epoch"] for line in lines] == [0] * 26 + [1] * 26
    keys = {"step", "epoch", "wall_seconds", "lr", "train/loss", "train/images_per_second"}
    for line in lines:
        scores = {"test/accuracy", "test/loss"} if line["step"] % 26 == 0 else set()
        assert line.keys() >= keys | scores
        assert scores or not line.keys() & {"test/accuracy", "test/loss"}
        assert line["lr"] == 1e-3
        assert line["train/images_per_second"] > 0
    clock = [line["wall_seconds"] for line in lines]
    assert clock == sorted(clock)
    summary = jobs.read_json(run_at(world_size) / "summary.json")
    assert (lines[-1]["test/accuracy"], lines[-1]["test/loss"]) == (summary["test_accuracy"], summary["test_loss"])


@pytest.mark.parametrize("every", [7, 26, 50])
def test_a_lines_loss_is_the_mean_over_the_images_of_its_interval(
    run_at: RunAt, train: Train, tmp_path: Path, every: int
) -> None:
    assert train("--log-every", every, "--output-dir", tmp_path).code == 0
    single = {line["step"]: line["train/loss"] for line in jobs.read_metrics(run_at(1))}
    steps = [line["step"] for line in jobs.read_metrics(tmp_path)]
    assert steps == sorted({*range(every, STEPS + 1, every), 26, 52})
    before = 0
    for line in jobs.read_metrics(tmp_path):
        interval = range(before + 1, line["step"] + 1)
        sizes = [1 if step % 26 == 0 else BATCH for step in interval]
        mean = sum(single[step] * size for step, size in zip(interval, sizes, strict=True)) / sum(sizes)
        assert line["train/loss"] == pytest.approx(mean, rel=1e-6)
        before = line["step"]


def test_the_console_says_what_runs_and_scores_in_the_tutorials_words(
    train: Train, tiny: Path, run_at: RunAt, tmp_path: Path
) -> None:
    out = train("--output-dir", tmp_path).out
    raw = tiny / "FashionMNIST" / "raw"
    for words, prefix in (("training", "train"), ("test", "t10k")):
        correct, count, _ = count_correct(run_at(1) / "model.safetensors", raw, prefix)
        percent = f"{100 * correct / count:.2f}"
        assert f"Checking accuracy on {words} data\nGot {correct} / {count} with accuracy {percent}\n" in out
    for fact in ("fashion-mnist", "1,501 training and 2,303 test images", "1 rank", "1 thread", str(tmp_path)):
        assert fact in out


def test_the_console_says_where_ranks_share_gpus(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = Context.__init__

    def sharing(self: Context, *arguments: Any) -> None:
        build(self, *arguments)
        self.shares_gpus = True

    monkeypatch.setattr(Context, "__init__", sharing)
    assert "1 rank sharing GPUs over gloo, 1 thread each" in train("--max-steps", 1, "--output-dir", tmp_path).out


def test_half_a_line_that_a_full_disk_has_taken_is_no_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", keep=0)
    file.append({"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    whole = file.sync()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (whole + 5, hard))
        file.append({"step": 2})
        file.append({"step": 3})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "metrics.jsonl").stat().st_size == whole
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'metrics.jsonl'}: No space left on device; its lines are kept in memory and tried again."
    ] * 2
    file.append({"step": 4})
    file.close()
    assert jobs.read_metrics(tmp_path) == [{"step": step} for step in (1, 2, 3, 4)]


# --- The same result, or deliberately another one


@pytest.mark.slow
def test_the_seed_decides_the_result(train: Train, run_at: RunAt, tmp_path: Path) -> None:
    for seed in (0, 1):
        assert train("--seed", seed, "--output-dir", tmp_path / str(seed)).code == 0
    first, second, alone = (
        (path / "model.safetensors").read_bytes() for path in (tmp_path / "0", tmp_path / "1", run_at(1))
    )
    assert first == alone
    assert second != alone


def test_a_terminal_gets_a_bar_and_the_lines_above_it(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    ended = train("--max-steps", 30, "--output-dir", tmp_path / "bar")
    assert re.search(r"30/52 \[.*step/s, loss \d\.\d{4}, [\d,]+ images/s\]", ended.err)
    assert "epoch 1/2 done: train loss" in ended.out and "step 1/52:" not in ended.out
    assert "step/s" not in train("--max-steps", 3, "--no-progress", "--output-dir", tmp_path / "none").err


def test_only_our_own_errors_are_told_in_one_line(process_of_a_job: None, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[type[BaseException]] = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: told.append(kind))
    install_excepthook()
    install_excepthook()  # once is enough
    sys.excepthook(ZeroDivisionError, ZeroDivisionError("a bug"), None)
    assert told == [ZeroDivisionError]


UNCAUGHT = """
import io, sys
from ddp_mnist.errors import UsageError
from ddp_mnist.distributed.context import Context
from ddp_mnist.distributed.launcher import install_excepthook
from ddp_mnist.run.saver import SaveClock
install_excepthook()
sys.stderr = io.StringIO()  # as torch.distributed leaves it
raise UsageError("a mistake")
"""


@pytest.mark.parametrize(("closed", "told"), [("", "err"), (">&-", "err"), ("2>&-", "out"), (">&- 2>&-", "")])
def test_an_error_has_its_message_and_code_whatever_is_closed(closed: str, told: str) -> None:
    ended = jobs.run(["bash", "-c", f'exec "$0" "$@" {closed}', sys.executable, "-c", UNCAUGHT])
    assert ended == jobs.Ended(2, *("error: a mistake\n" if told == name else "" for name in ("out", "err")))


@pytest.mark.slow
def test_a_job_whose_output_is_closed_trains_all_the_same(tiny: Path, tmp_path: Path) -> None:
    flags = ["--dataset", "fashion-mnist", "--data-dir", str(tiny), "--wandb", "disabled", "--no-pictures"]
    flags += ["--max-steps", "2", "--output-dir", str(tmp_path)]
    ended = jobs.run(["bash", "-c", 'exec "$0" "$@" 2>&-', *jobs.TRAIN, *flags])
    assert ended.code == 0, ended.out
    assert jobs.read_json(tmp_path / "summary.json")["steps"] == 2


def test_every_schedule_has_a_shape() -> None:
    for schedule in get_args(Schedule):
        assert learning_rate(TrainConfig(schedule=schedule), 99, 100) > 0


def test_fit_returns_the_summary_it_writes(tiny: Path, tmp_path: Path, process_of_a_job: None) -> None:
    config = TrainConfig(dataset="fashion-mnist", data_dir=tiny, output_dir=tmp_path, max_steps=2, threads=1)
    summary = fit(config).summary
    assert summary == jobs.read_json(tmp_path / "summary.json")
    assert summary["steps"] == 2


@pytest.mark.parametrize(("steps", "samples"), [(5, 300), (26, 1501), (27, 1561)])
def test_max_steps_stops_at_that_step_with_evaluation_and_summary(
    train: Train, run_at: RunAt, tmp_path: Path, steps: int, samples: int
) -> None:
    ended = train("--max-steps", steps, "--output-dir", tmp_path)
    assert ended.code == 0
    summary = jobs.read_json(tmp_path / "summary.json")
    assert (summary["finished"], summary["stop_reason"], summary["exit_code"]) == (False, "max_steps", 0)
    assert (summary["steps"], summary["samples_seen"], summary["test_count"]) == (steps, samples, TEST_IMAGES)
    correct = count_correct(tmp_path / "model.safetensors", Path(ended_data(tmp_path), "FashionMNIST", "raw"), "t10k")[
        0
    ]
    assert summary["test_correct"] == correct
    losses = [line["train/loss"] for line in jobs.read_metrics(tmp_path)]
    assert losses == [line["train/loss"] for line in jobs.read_metrics(run_at(1))][:steps]


def ended_data(run_dir: Path) -> str:
    data_dir: str = jobs.read_json(run_dir / "config.json")["settings"]["data_dir"]
    return data_dir


def test_max_steps_at_the_last_step_is_a_finished_run(train: Train, tmp_path: Path) -> None:
    assert train("--max-steps", STEPS, "--output-dir", tmp_path).code == 0
    summary = jobs.read_json(tmp_path / "summary.json")
    assert (summary["finished"], summary["stop_reason"], summary["steps"]) == (True, "finished", STEPS)


def test_max_steps_does_not_change_the_length_of_the_schedule(train: Train, tmp_path: Path) -> None:
    for name, arguments in {"whole": [], "cut": ["--max-steps", "20"]}.items():
        run_dir = tmp_path / name
        assert train("--schedule", "onecycle", "--lr", "0.01", "--output-dir", run_dir, *arguments).code == 0
    whole, cut = ([line["lr"] for line in jobs.read_metrics(tmp_path / name)] for name in ("whole", "cut"))
    assert cut == whole[:20]
    assert len(set(whole)) == STEPS


@pytest.mark.parametrize("total_steps", [1, 2, 3, 5, 52, 938])
@pytest.mark.parametrize(("schedule", "warm_up", "fall"), [("onecycle", 0.25, "cos"), ("linear", 0.1, "linear")])
def test_a_schedules_rate_is_torchs_with_a_linear_rise(
    schedule: Any, warm_up: float, fall: str, total_steps: int
) -> None:
    def torchs(anneal: str) -> list[float]:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=0.01,
            total_steps=total_steps,
            pct_start=warm_up,
            anneal_strategy=anneal,
            cycle_momentum=False,
        )
        rates = []
        for _ in range(total_steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if len(rates) < total_steps:
                scheduler.step()
        return rates

    config = TrainConfig(schedule=schedule, lr=0.01)
    rising = warm_up * total_steps - 1
    for step, (linear, falling) in enumerate(zip(torchs("linear"), torchs(fall), strict=True)):
        expected = linear if step <= rising else falling
        assert learning_rate(config, step, total_steps) == pytest.approx(expected, rel=1e-9), step


def test_the_one_cycle_rate_begins_at_its_peak_where_there_are_too_few_steps_to_rise() -> None:
    """Four steps, the length at which torch's own divides by zero."""
    rates = [learning_rate(TrainConfig(schedule="onecycle", lr=0.01), step, 4) for step in range(4)]
    assert rates[0] == 0.01
    assert rates == sorted(rates, reverse=True)
    assert rates[3] == pytest.approx(0.01 / 250_000)


def test_the_constant_rate_is_constant() -> None:
    assert {learning_rate(TrainConfig(lr=0.004), step, 100) for step in range(100)} == {0.004}


def test_the_rate_of_the_schedule_is_the_rate_of_the_optimizer(train: Train, tmp_path: Path) -> None:
    """Adam's first step moves every weight that has a gradient by about the rate."""
    torch.manual_seed(0)
    before = TutorialCNN().state_dict()
    for schedule, rate in (("constant", 0.01), ("onecycle", 0.01 / 25), ("linear", 0.01 / 25)):
        run_dir = tmp_path / schedule
        assert train("--schedule", schedule, "--lr", "0.01", "--max-steps", "1", "--output-dir", run_dir).code == 0
        moved = (load_file(run_dir / "model.safetensors")["fc1.bias"] - before["fc1.bias"]).abs()
        assert moved.max().item() == pytest.approx(rate, rel=1e-3)


def test_bf16_learns_with_autocast_and_is_scored_in_fp32(
    train: Train, tiny: Path, run_at: RunAt, tmp_path: Path
) -> None:
    assert train("--mixed-precision", "bf16", "--output-dir", tmp_path).code == 0
    losses = [line["train/loss"] for line in jobs.read_metrics(tmp_path)]
    exact = [line["train/loss"] for line in jobs.read_metrics(run_at(1))]
    assert losses[50] < losses[0] - 0.3
    assert losses[0] != exact[0]  # autocast is on
    assert losses[0] == pytest.approx(exact[0], abs=0.02)
    summary = jobs.read_json(tmp_path / "summary.json")
    assert summary["mixed_precision"] == "bf16"
    correct, _, loss = count_correct(tmp_path / "model.safetensors", tiny / "FashionMNIST" / "raw", "t10k")
    assert summary["test_correct"] == correct
    assert summary["test_loss"] == pytest.approx(loss, rel=1e-5)


def test_accumulation_splits_the_batch_and_keeps_the_curve(train: Train, run_at: RunAt, tmp_path: Path) -> None:
    assert train("--accumulate", "4", "--output-dir", tmp_path).code == 0
    summary = jobs.read_json(tmp_path / "summary.json")
    assert (summary["steps"], summary["samples_seen"]) == (STEPS, EPOCHS * TRAIN_IMAGES)
    for ours, theirs in zip(jobs.read_metrics(tmp_path), jobs.read_metrics(run_at(1)), strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], abs=1e-4)


def test_a_run_starts_from_the_weights_it_is_given(train: Train, run_at: RunAt, tmp_path: Path) -> None:
    trained = run_at(1)
    assert train("--init-from", trained / "model.safetensors", "--output-dir", tmp_path).code == 0
    fresh = jobs.read_metrics(trained)
    assert jobs.read_metrics(tmp_path)[0]["train/loss"] < fresh[0]["train/loss"] - 0.3
    final = jobs.read_json(trained / "summary.json")["test_accuracy"]
    assert jobs.read_json(tmp_path / "summary.json")["test_accuracy"] > final


def test_widths_change_the_network(train: Train, tmp_path: Path) -> None:
    assert train("--widths", "3", "5", "--max-steps", "1", "--output-dir", tmp_path).code == 0
    assert load_file(tmp_path / "model.safetensors")["conv2.weight"].shape == (5, 3, 3, 3)


@pytest.mark.slow
def test_auto_without_files_and_network_is_generated_digits_and_says_so(train: Train, tmp_path: Path) -> None:
    arguments = ["--dataset", "auto", "--data-dir", tmp_path / "data", "--max-steps", "1", "--log-every", "50"]
    ended = train(*arguments, "--output-dir", tmp_path / "run")
    assert ended.code == 0
    assert "THIS IS NOT MNIST" in ended.out + ended.err
    assert "synthetic" in ended.out
    summary = jobs.read_json(tmp_path / "run" / "summary.json")
    assert (summary["dataset"], summary["train_count"], summary["test_count"]) == ("synthetic", 60_000, 10_000)
    assert jobs.read_json(tmp_path / "run" / "config.json")["settings"]["dataset"] == "synthetic"


# --- Bad input: one message from one rank, the right exit code, nobody left behind


@pytest.mark.parametrize("world_size", jobs.sizes(1, 2))
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bogus", "1"], ["--bogus"]),
        (["--dataset", "cifar"], ["cifar", "--dataset", "mnist", "synthetic"]),
        (["--epochs", "three"], ["--epochs", "three"]),
        (["--epochs", "0"], ["--epochs is 0", "expected"]),
        (["--batch-size", "0"], ["--batch-size is 0", "expected"]),
        (["--lr", "0"], ["--lr is 0", "expected"]),
        (["--lr", "nan"], ["--lr is nan", "expected"]),
        (["--lr", "inf"], ["--lr is inf", "expected"]),
        (["--widths", "8"], ["--widths"]),
    ],
    ids=" ".join,
)
def test_a_bad_flag_is_one_message_from_one_rank_and_exit_code_2(
    tmp_path: Path, world_size: int, arguments: list[str], words: list[str]
) -> None:
    message = jobs.the_message(jobs.run_ranks(world_size, *arguments, cwd=tmp_path), 2)
    for word in words:
        assert word in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--epochz", "3"], ["--lr", "0"], ["--mixed-precision", "fp16"]], ids=" ".join)
def test_each_machine_tells_of_a_bad_flag(tmp_path: Path, arguments: list[str]) -> None:
    """Before its ranks have met those of others, which may have been given better ones."""
    flags = ["--dataset", "synthetic", *arguments]
    machine = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    ended = jobs.run_ranks(2, *flags, cwd=tmp_path, variables=machine)
    assert [len(jobs.messages([rank])) for rank in ended] == [1, 1]
    assert [rank.code for rank in ended] == [2, 2]


def test_a_bad_precision_of_accelerate_launch_is_named_like_a_flag(tmp_path: Path) -> None:
    ended = jobs.run_ranks(2, cwd=tmp_path, variables={"ACCELERATE_MIXED_PRECISION": "fp8"})
    assert "--mixed-precision is fp8" in jobs.the_message(ended, 2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, "two") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")),
        *(("RANK", "-1"), ("WORLD_SIZE", "0"), ("LOCAL_WORLD_SIZE", "0"), ("WORLD_SIZE", "")),
    ],
)
@pytest.mark.slow
def test_a_variable_of_a_launcher_that_is_no_number_is_named(
    flags: list[str], tmp_path: Path, name: str, value: str
) -> None:
    arguments = [*flags, "--output-dir", str(tmp_path / "run")]
    ended = jobs.run([*jobs.TRAIN, *arguments], {name: value}, cwd=tmp_path)
    assert f"the environment says {name}={value}; expected a whole number" in jobs.the_message([ended], 2)
    assert f"unset {name}" in ended.err
    assert not (tmp_path / "run").exists()


def test_a_batch_that_the_ranks_do_not_divide_names_the_nearest_sizes(tmp_path: Path) -> None:
    message = jobs.the_message(jobs.run_ranks(3, "--batch-size", "64", cwd=tmp_path), 2)
    for word in ("--batch-size 64", "3 ranks", "63 or 66"):
        assert word in message


@pytest.mark.parametrize("world_size", jobs.sizes(1, 2))
@pytest.mark.slow
def test_fp16_without_a_gpu_is_refused_before_anything_is_written(
    flags: list[str], tmp_path: Path, world_size: int
) -> None:
    run_dir = tmp_path / "run"
    ended = jobs.run_ranks(world_size, *flags, "--mixed-precision", "fp16", "--output-dir", str(run_dir))
    message = jobs.the_message(ended, 2)
    assert "fp16" in message
    assert "bf16" in message
    assert not run_dir.exists()


def unusable_directories(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    file = tmp_path / "file"
    file.write_text("mine")
    return {
        "a file": (file, "is a file"),
        "below a file": (file / "run", "below a file"),
        # Root may write where others may not, but nobody makes directories here.
        "not writable": (Path("/proc/run"), "cannot be written"),
    }


@pytest.mark.parametrize("kind", ["a file", "below a file", "not writable"])
def test_an_unusable_output_directory_is_named(train: Train, tmp_path: Path, kind: str) -> None:
    path, why = unusable_directories(tmp_path)[kind]
    message = jobs.the_message([train("--output-dir", path)], 1)
    for word in ("--output-dir", str(path), why, "Choose another"):
        assert word in message
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.distributed
def test_an_unusable_output_directory_ends_all_ranks_with_one_message(flags: list[str], tmp_path: Path) -> None:
    path, why = unusable_directories(tmp_path)["below a file"]
    message = jobs.the_message(jobs.run_ranks(2, *flags, "--output-dir", str(path)), 1)
    assert why in message
    assert str(path) in message


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "model.safetensors", "summary.json"])
def test_what_is_in_the_way_of_a_file_of_the_run_is_told(
    train: Train, run_at: RunAt, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "run" / name
    path.mkdir(parents=True)
    message = jobs.the_message([train("--output-dir", path.parent)], 1)
    assert message.startswith(f"error: {path} c") and message.endswith(": Is a directory.")
    path.rmdir()
    assert train("--output-dir", path.parent).code == 0
    faults.assert_same_result(path.parent, run_at(1))


@pytest.mark.parametrize(("more", "code"), [([], 1), (["--max-minutes", "1e-6"], 75)], ids=["at the end", "at a stop"])
def test_a_summary_that_cannot_be_written_is_told_after_all_is_saved(
    train: Train,
    run_at: RunAt,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    more: list[str],
    code: int,
) -> None:
    path, publish = tmp_path / "summary.json", Checkpoints.publish
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "publish", lambda *given: (path.mkdir(exist_ok=True), publish(*given))[1])
        ended = train(*more, "--checkpoint-every", 100, "--output-dir", tmp_path)
    assert ended.code == code
    assert f"{path} could not be written: Is a directory." in (ended.err if code == 1 else caplog.text)
    command = shlex.split(faults.printed_command(ended.err if code == 1 else ended.out))
    path.rmdir()
    assert train(*command[3:], "--max-minutes", 0).code == 0
    faults.assert_same_result(tmp_path, run_at(1))
    assert jobs.read_json(path)["resumed_from"] == (STEPS if code == 1 else 0)


@pytest.mark.slow
def test_pictures_that_cannot_be_drawn_do_not_fail_the_run(
    train: Train, run_at: RunAt, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    page = tmp_path / "report.html"
    page.mkdir()
    assert train("--pictures", "--output-dir", tmp_path).code == 0
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    told, command = warning.split("; try  ")
    assert told.startswith("the pictures could not be drawn (JobError: ") and f"{tmp_path} cannot be written" in told
    assert jobs.read_json(tmp_path / "summary.json")["finished"]
    page.rmdir()
    assert command == f"python -m ddp_mnist.report {tmp_path}"
    assert report.main(command.split()[3:]) == 0
    assert page.is_file()


def test_without_a_directory_of_its_own_a_run_gets_one_that_nobody_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rundir.time, "strftime", lambda _: "20261127-101530")  # all in one second
    made = [str(rundir.create(TrainConfig(recipe="fast"))) for _ in range(3)]
    assert made == [f"runs/20261127-101530-fast{more}" for more in ("", "-2", "-3")]
    assert all(Path(path).is_dir() for path in made)


@pytest.mark.parametrize(
    ("kind", "why"), [("a file", "Not a directory"), ("a link to nowhere", "File exists")], ids=lambda word: word
)
def test_where_no_directory_can_be_made_the_flag_that_names_one_is_told(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, why: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").touch() if kind == "a file" else Path("runs").symlink_to("gone")
    message = jobs.the_message([train()], 1)
    assert re.fullmatch(
        rf"error: runs/[\d-]+-tutorial cannot be made: {why}\. Choose a place with --output-dir\.", message
    )


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK], ids=["no such call", "no lock daemon"])
def test_a_file_system_without_locks_is_told_and_trained_on(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    (tmp_path / ".lock").touch()  # of a job that was killed, here or where the directory was copied from
    monkeypatch.setattr(fcntl, "flock", refuse)
    assert train("--max-steps", 3, "--output-dir", tmp_path).code == 0
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith(f"{tmp_path} cannot be locked (") and os.strerror(code) in warning
    assert "only one job" in warning
    assert jobs.read_json(tmp_path / "summary.json")["steps"] == 3


IMAGES = "train-images-idx3-ubyte"


def damaged(tmp_path: Path, kind: str) -> tuple[str, str]:
    """A data set whose training images are bad and have no good .gz; returns (--data-dir, words of the message)."""
    folder = write_digits(tmp_path / "data", 100, 50)
    path = folder / IMAGES
    content = path.read_bytes()
    if kind == "short":
        path.write_bytes(content[:-1])
        return str(tmp_path / "data"), f"wrong length: {len(content) - 1} bytes, expected {len(content)}"
    if kind == "magic":
        path.write_bytes(b"\0\0\x08\x01" + content[4:])
        return str(tmp_path / "data"), "magic number 2049, expected 2051"
    if kind == "hash":
        (folder / f"{IMAGES}.gz").write_bytes(gzip.compress(content))  # not torchvision's, but it holds a CRC
        changed = content[:-1] + bytes([content[-1] ^ 1])
        path.write_bytes(changed)
        return str(tmp_path / "data"), f"CRC {zlib.crc32(changed):08x}, expected {zlib.crc32(content):08x}"
    shutil.rmtree(folder)
    return str(tmp_path / "data"), "missing"


def says_what_to_do_about(message: str, tmp_path: Path, why: str) -> None:
    assert str(tmp_path / "data" / "FashionMNIST" / "raw" / IMAGES) in message
    assert why in message
    assert "python -m ddp_mnist.data fetch --dataset fashion-mnist" in message


@pytest.mark.parametrize("kind", ["short", "magic", "hash", "missing"])
def test_a_bad_data_file_is_named_with_what_is_wrong_and_what_to_do(train: Train, tmp_path: Path, kind: str) -> None:
    data_dir, why = damaged(tmp_path, kind)
    ended = train("--data-dir", data_dir, "--output-dir", tmp_path / "run")
    says_what_to_do_about(jobs.the_message([ended], 1), tmp_path, why)
    assert not (tmp_path / "run" / "model.safetensors").exists()
    summary = jobs.read_json(tmp_path / "run" / "summary.json")
    assert (summary["finished"], summary["exit_code"], summary["steps"]) == (False, 1, 0)
    assert summary["dataset"] == "fashion-mnist" and summary["test_count"] is None


@pytest.mark.parametrize("kind", ["short", "magic", "hash"])
@pytest.mark.slow
@pytest.mark.distributed
def test_a_bad_data_file_is_one_message_from_two_ranks(flags: list[str], tmp_path: Path, kind: str) -> None:
    data_dir, why = damaged(tmp_path, kind)
    ended = jobs.run_ranks(2, *flags, "--data-dir", data_dir, "--output-dir", str(tmp_path / "run"))
    says_what_to_do_about(jobs.the_message(ended, 1), tmp_path, why)


@pytest.mark.slow
@pytest.mark.distributed
def test_data_that_are_bad_on_one_rank_alone_end_all_ranks_and_name_it(flags: list[str], tmp_path: Path) -> None:
    data_dir, why = damaged(tmp_path, "short")
    ended = jobs.run_ranks(
        2,
        *flags,
        *("--output-dir", str(tmp_path / "run")),
        per_rank=lambda rank: ["--data-dir", data_dir] if rank == 1 else [],
    )
    message = jobs.the_message(ended, 1)
    assert "rank 1" in message
    says_what_to_do_about(message, tmp_path, why)
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_mnist_without_files_and_network_says_how_to_get_it(train: Train, tmp_path: Path) -> None:
    ended = train("--dataset", "mnist", "--data-dir", tmp_path / "data", "--output-dir", tmp_path / "run")
    message = jobs.the_message([ended], 1)
    for word in (str(tmp_path / "data" / "MNIST" / "raw"), "python -m ddp_mnist.data fetch", "--dataset synthetic"):
        assert word in message


GLOO = "[/build/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:20000"


def test_a_rank_that_is_lost_before_anything_is_built_leaves_a_summary(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object) -> None:
        raise RuntimeError(GLOO)

    monkeypatch.setattr("ddp_mnist.program.load", load)
    message = jobs.the_message([train("--output-dir", tmp_path)], 1)
    assert "lost contact with another rank" in message and "(Connection closed by peer" in message
    summary = jobs.read_json(tmp_path / "summary.json")
    assert (summary["stop_reason"], summary["exit_code"]) == ("lost_rank", 1)


@pytest.mark.parametrize(
    ("content", "code", "why"),
    [
        (None, 1, "does not exist"),
        (b"not safetensors", 1, "not a whole safetensors file"),
        ({"fc1.weight": torch.zeros(10, 5)}, 2, "fc1.weight"),
        ({"conv1.bias": torch.full((8,), math.nan)}, 1, "not finite"),
    ],
    ids=["missing", "damaged", "other shapes", "not finite"],
)
def test_bad_initial_weights_are_named(train: Train, tmp_path: Path, content: Any, code: int, why: str) -> None:
    path = tmp_path / "init.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        save_file({**TutorialCNN().state_dict(), **content}, path)
    message = jobs.the_message([train("--init-from", path, "--output-dir", tmp_path / "run")], code)
    assert str(path) in message
    assert why in message


def test_initial_weights_of_other_widths_are_refused_with_a_hint(train: Train, run_at: RunAt, tmp_path: Path) -> None:
    init = run_at(1) / "model.safetensors"
    message = jobs.the_message([train("--init-from", init, "--widths", "4", "4", "--output-dir", tmp_path)], 2)
    assert "--widths" in message


# Finite weights whose loss is finite once, and whose first gradient overflows: step 2 is the first without a number.
OVERFLOWING = {"conv1.weight": 1e37, "conv1.bias": 0.0, "conv2.weight": 1e-37, "conv2.bias": 0.0, "fc1.weight": 1e5}


def weights_file(path: Path, factors: dict[str, float]) -> Path:
    torch.manual_seed(0)
    scaled = {name: value * factors.get(name, 1.0) for name, value in TutorialCNN().state_dict().items()}
    assert all(value.isfinite().all() for value in scaled.values())
    save_file(scaled, path)
    return path


def ended_as_nan(run_dir: Path, message: str, step: int) -> None:
    assert f"at step {step}" in message
    assert not (run_dir / "model.safetensors").exists()
    summary = jobs.read_json(run_dir / "summary.json")
    assert (summary["finished"], summary["stop_reason"], summary["exit_code"]) == (False, "nan", 1)
    assert summary.keys() >= SUMMARY_KEYS
    jobs.read_metrics(run_dir)


@pytest.mark.parametrize("every", [1, 10_000])
@pytest.mark.parametrize(
    ("factors", "step"), [({"fc1.weight": 1e38}, 1), (OVERFLOWING, 2)], ids=["at once", "after a step"]
)
def test_a_loss_that_is_not_finite_ends_the_run_and_says_at_which_step(
    train: Train, tmp_path: Path, factors: dict[str, float], step: int, every: int
) -> None:
    init, run_dir = weights_file(tmp_path / "init.safetensors", factors), tmp_path / "run"
    ended = train("--init-from", init, "--log-every", every, "--output-dir", run_dir)
    ended_as_nan(run_dir, jobs.the_message([ended], 1), step)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_loss_that_is_not_finite_ends_all_ranks_with_one_message(flags: list[str], tmp_path: Path) -> None:
    init, run_dir = weights_file(tmp_path / "init.safetensors", OVERFLOWING), tmp_path / "run"
    ended = jobs.run_ranks(2, *flags, "--init-from", str(init), "--log-every", "5", "--output-dir", str(run_dir))
    ended_as_nan(run_dir, jobs.the_message(ended, 1), 2)


SLOW_DISK = """
import sys, time
from ddp_mnist import train
from ddp_mnist.run.summary import SummaryWriter

write = SummaryWriter.write
def slowly(self, summary):
    if self.context.is_main:
        time.sleep(3)
    write(self, summary)
SummaryWriter.write = slowly
train.hard_exit(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_nobody_leaves_before_the_reason_is_told(flags: list[str], tmp_path: Path) -> None:
    """As srun --kill-on-bad-exit ends rank 0 with the first that leaves."""
    init, program = weights_file(tmp_path / "init.safetensors", OVERFLOWING), tmp_path / "slow.py"
    program.write_text(SLOW_DISK)
    arguments = [*flags, "--init-from", init, "--output-dir", tmp_path / "run"]
    with faults.start(2, *arguments, program=(sys.executable, str(program))) as job:
        faults.wait_for(lambda: job.processes[1].poll() is not None, "the end of rank 1", job)
        job.signal(signal.SIGKILL, 0)
        told = job.wait(60)[0].err
    assert told.count("error: the loss became") == 1 and "A lower rate may help" in told
    ended_as_nan(tmp_path / "run", told, 2)


def test_a_checkpoint_comes_with_all_lines_up_to_its_step(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SaveClock, "SECONDS", 0.0)  # as if ten minutes had passed, at every line
    assert train("--log-every", 5, "--max-steps", 13, "--output-dir", tmp_path).code == 0
    written = (tmp_path / "metrics.jsonl").read_bytes()
    for step, checkpoint in [(10, "step-00000010"), (10, "step-00000013")]:
        state = jobs.read_json(tmp_path / "checkpoints" / checkpoint / "state.json")
        assert json.loads(written[: state["metrics_bytes"]].splitlines()[-1])["step"] == step


@pytest.mark.parametrize("more", [[], ["--checkpoint-every", "13"]], ids=["clock", "steps"])
def test_an_epoch_is_saved_after_its_score(
    train: Train, tmp_path: Path, more: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint between its last step and its score could not be continued."""
    monkeypatch.setattr(SaveClock, "SECONDS", 0.0)
    assert train("--log-every", 13, *more, "--output-dir", tmp_path).code == 0
    state = jobs.read_json(tmp_path / "checkpoints" / f"step-{STEPS:08d}" / "state.json")["state"]
    assert (state["epoch"], state["step_in_epoch"]) == (EPOCHS, 0)
    ended = train("--log-every", 13, *more, "--output-dir", tmp_path)
    assert ended.code == 0 and "Nothing to do" in ended.out


@pytest.mark.parametrize(
    "more",
    [
        ["--log-every", "1000", "--checkpoint-every", "5"],
        ["--log-every", "5", "--checkpoint-every", "5"],
        ["--log-every", "25", "--checkpoint-every", "10"],
        ["--log-every", "1000", "--max-steps", "10"],
    ],
    ids=" ".join,
)
def test_waiting_for_the_gpu_is_part_of_the_training_time(
    train: Train, tmp_path: Path, more: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where figures are read is where a GPU does what was launched."""
    read, waits = Metrics._read, []

    def waiting(self: Metrics, state: TrainState) -> None:
        time.sleep(0.2)
        waits.append(state.step)
        read(self, state)

    monkeypatch.setattr(Metrics, "_read", waiting)
    assert train(*more, "--output-dir", tmp_path).code == 0
    assert waits
    assert jobs.read_json(tmp_path / "summary.json")["train_seconds"] > 0.2 * len(waits)


@pytest.mark.parametrize("arguments", [["--max-steps", "1"], ["--batch-size", "2000", "--epochs", "1"]], ids=" ".join)
def test_weights_that_the_last_step_has_ruined_are_not_published(
    train: Train, tmp_path: Path, arguments: list[str]
) -> None:
    init, run_dir = weights_file(tmp_path / "init.safetensors", OVERFLOWING), tmp_path / "run"
    message = jobs.the_message([train("--init-from", init, *arguments, "--output-dir", run_dir)], 1)
    assert "not finite" in message
    assert not (run_dir / "model.safetensors").exists()
    summary = jobs.read_json(run_dir / "summary.json")
    assert (summary["finished"], summary["stop_reason"], summary["exit_code"]) == (False, "nan", 1)
    jobs.read_metrics(run_dir)


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_that_would_each_train_alone_refuse_to(flags: list[str], tmp_path: Path) -> None:
    """mpirun's variables: Accelerate takes them for two ranks, while WORLD_SIZE is not set."""
    common = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    common["MASTER_PORT"] = str(jobs.free_port())
    environments = [
        jobs.environment({**common, "OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_LOCAL_RANK": rank}) for rank in "01"
    ]
    command = [*jobs.TRAIN, *flags, "--output-dir", str(tmp_path / "run")]
    message = jobs.the_message(jobs.run_together([command, command], environments), 1)
    for word in ("WORLD_SIZE=1", "Accelerate counts 2", "torchrun"):
        assert word in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("missing", ["", "LOCAL_RANK"])
@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_that_accelerate_does_not_see_refuse_to_train_alone(tmp_path: Path, missing: str) -> None:
    """Accelerate without cpu=True counts one process on a machine without a GPU, whatever the launcher says."""
    program = (
        f"import os; os.environ.pop({missing!r}, None)\n"
        "import accelerate, functools, ddp_mnist.distributed.context as context, ddp_mnist.train as train\n"
        "real = context.Accelerator\n"
        "context.Accelerator = lambda cpu, **options: real(cpu=False, **options)\n"
        "train.hard_exit(train.main())\n"
    )
    ended = jobs.run_ranks(2, "--output-dir", str(tmp_path / "run"), program=(sys.executable, "-c", program))
    message = jobs.the_message(ended, 1)
    for word in ("WORLD_SIZE=2", "Accelerate counts 1", "alone"):
        assert word in message
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_a_missing_rendezvous_address_is_explained(flags: list[str], tmp_path: Path) -> None:
    variables = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    ended = jobs.run([*jobs.TRAIN, *flags, "--output-dir", str(tmp_path / "run")], variables)
    message = jobs.the_message([ended], 1)
    for word in ("MASTER_ADDR", "2 ranks", "torchrun"):
        assert word in message


def test_what_is_not_a_number_is_null_in_json(tmp_path: Path) -> None:
    rundir.write_json(tmp_path / "file.json", {"test_loss": math.inf, "train_loss": math.nan, "steps": 3, "lr": 0.5})
    expected = {"test_loss": None, "train_loss": None, "steps": 3, "lr": 0.5}
    assert jobs.read_json(tmp_path / "file.json") == expected


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's disk that is always full")
def test_a_console_that_takes_nothing_changes_no_exit_code(flags: list[str], tmp_path: Path) -> None:
    def code(*arguments: str, stream: str) -> int:
        command = f"{shlex.join([*jobs.TRAIN, *flags, '--output-dir', str(tmp_path), *arguments])} {stream}>/dev/full"
        return jobs.run(["bash", "-c", command], {"PYTHONUNBUFFERED": "1"}).code

    assert code("--mixed-precision", "fp16", stream="2") == 2
    assert code("--epochs", "1", stream="1") == 0
    assert code("--epochs", "1", stream="1") == 0  # finished already


@pytest.mark.slow
def test_a_path_that_the_consoles_encoding_lacks_ends_nothing(flags: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "Läufe"
    command = [*jobs.TRAIN, *flags, "--max-steps", "1", "--output-dir", str(run_dir)]
    ended = jobs.run(command, {"PYTHONIOENCODING": "ascii"})
    assert ended.code == 0, ended.err
    assert "L\\xe4ufe" in ended.out


def test_what_fails_while_the_job_is_built_lets_go_of_its_step(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DDP must not outlive the process group."""
    closed = []

    def failing(*_: object, **__: object) -> None:
        raise JobError("no room for metrics.jsonl")

    monkeypatch.setattr("ddp_mnist.trainer.Metrics", failing)
    monkeypatch.setattr(TrainStep, "close", lambda self: closed.append(self))
    assert train("--output-dir", tmp_path).code == 1
    assert len(closed) == 1
