"""The job on one and several ranks: what it writes, and how it ends when something is wrong."""

from __future__ import annotations

import errno
import fcntl
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import faults
import jobs
import pytest
import torch
from conftest import BATCH, EPOCHS, STEPS, TEST_IMAGES, TRAIN_IMAGES, write_digits
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tutorial import TutorialCNN, count_correct

from ddp_mnist.config import TrainConfig, parse
from ddp_mnist.report import page as report
from ddp_mnist.step import TrainStep, rate_factor

Train = Callable[..., jobs.Ended]
RunAt = Callable[[int], Path]

SUMMARY_KEYS = {
    *("finished", "stop_reason", "exit_code", "dataset", "recipe", "epochs", "steps", "samples_seen", "world_size"),
    *("device", "mixed_precision", "threads", "train_correct", "train_count", "train_accuracy", "test_correct"),
    *("test_count", "test_accuracy", "test_loss", "train_seconds", "eval_seconds", "wall_seconds"),
    *("images_per_second", "resumed_from", "wandb_mode"),
}


def losses(run_dir: Path) -> list[float]:
    return [line["train/loss"] for line in jobs.read_metrics(run_dir)]


def outcome(run_dir: Path) -> tuple[bool, str, int]:
    summary = jobs.read_json(run_dir / "summary.json")
    return summary["finished"], summary["stop_reason"], summary["exit_code"]


# --- What a run writes


@pytest.mark.parametrize("world_size", jobs.sizes(1, 2))
def test_the_summary_has_the_settings_and_the_result(run_at: RunAt, world_size: int) -> None:
    summary = jobs.read_json(run_at(world_size) / "summary.json")
    assert summary.keys() >= SUMMARY_KEYS
    expected = {
        **{"finished": True, "stop_reason": "finished", "exit_code": 0, "resumed_from": None, "steps": STEPS},
        **{"dataset": "fashion-mnist", "recipe": "tutorial", "epochs": EPOCHS, "samples_seen": EPOCHS * TRAIN_IMAGES},
        **{"world_size": world_size, "device": "cpu", "mixed_precision": "no", "threads": 1, "wandb_mode": "disabled"},
        **{"train_count": TRAIN_IMAGES, "test_count": TEST_IMAGES},
    }
    assert {key: summary[key] for key in expected} == expected
    assert 0 < summary["train_seconds"] < summary["wall_seconds"]
    assert 0 < summary["eval_seconds"] < summary["wall_seconds"]
    assert summary["images_per_second"] == pytest.approx(summary["samples_seen"] / summary["train_seconds"], rel=0.05)
    assert summary["test_accuracy"] == summary["test_correct"] / TEST_IMAGES
    assert summary["train_accuracy"] == summary["train_correct"] / TRAIN_IMAGES


@pytest.mark.parametrize("world_size", jobs.sizes(1, 2))
def test_config_json_has_all_settings_the_versions_and_the_command(
    run_at: RunAt, flags: list[str], world_size: int
) -> None:
    run_dir = run_at(world_size)
    saved = jobs.read_json(run_dir / "config.json")
    assert TrainConfig(**saved["settings"]) == parse([*flags, "--output-dir", str(run_dir)])
    assert saved["versions"]["torch"] == metadata.version("torch")
    assert saved["versions"].keys() >= {"python", "torch", "torchvision", "accelerate", "ddp_mnist"}
    assert saved["launch"]["world_size"] == world_size
    assert str(run_dir) in saved["launch"]["command"]
    assert saved["git"] is None or len(saved["git"]["commit"]) == 40


@pytest.mark.parametrize("world_size", jobs.sizes(1, 2))
def test_the_weights_are_the_tutorials_fp32_tensors_without_metadata(run_at: RunAt, world_size: int) -> None:
    with safe_open(run_at(world_size) / "model.safetensors", "pt") as file:
        assert file.metadata() is None
        found = {name: (file.get_tensor(name).shape, file.get_tensor(name).dtype) for name in file.offset_keys()}
    assert found == {name: (value.shape, torch.float32) for name, value in TutorialCNN().state_dict().items()}


@pytest.mark.parametrize("world_size", jobs.sizes(1, 2))
def test_metrics_have_a_line_for_every_interval_and_a_score_for_every_epoch(run_at: RunAt, world_size: int) -> None:
    lines = jobs.read_metrics(run_at(world_size))
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["epoch"] for line in lines] == [0] * 26 + [1] * 26
    scores = {"test/accuracy", "test/loss"}
    for line in lines:
        assert line.keys() >= {"step", "epoch", "wall_seconds", "lr", "train/loss", "train/images_per_second"}
        assert line.keys() & scores == (scores if line["step"] % 26 == 0 else set())
        assert line["lr"] == 1e-3
        assert line["train/images_per_second"] > 0
    clock = [line["wall_seconds"] for line in lines]
    assert clock == sorted(clock)
    summary = jobs.read_json(run_at(world_size) / "summary.json")
    assert (lines[-1]["test/accuracy"], lines[-1]["test/loss"]) == (summary["test_accuracy"], summary["test_loss"])


def test_the_logged_loss_is_the_mean_over_the_images_since_the_last_line(
    train: Train, run_at: RunAt, tmp_path: Path
) -> None:
    assert train("--log-every", 7, "--output-dir", tmp_path).code == 0
    single, lines = losses(run_at(1)), jobs.read_metrics(tmp_path)
    assert [line["step"] for line in lines] == sorted({*range(7, STEPS + 1, 7), 26, 52})
    before = 0
    for line in lines:
        interval = range(before + 1, line["step"] + 1)
        sizes = [1 if step % 26 == 0 else BATCH for step in interval]
        mean = sum(single[step - 1] * size for step, size in zip(interval, sizes, strict=True)) / sum(sizes)
        assert line["train/loss"] == pytest.approx(mean, rel=1e-6)
        before = line["step"]


def test_the_console_shows_the_job_and_scores_in_the_tutorials_words(
    train: Train, tiny: Path, run_at: RunAt, tmp_path: Path
) -> None:
    out = train("--output-dir", tmp_path).out
    for name, prefix in (("training", "train"), ("test", "t10k")):
        correct, count, _ = count_correct(run_at(1) / "model.safetensors", tiny / "FashionMNIST" / "raw", prefix)
        percent = f"{100 * correct / count:.2f}"
        assert f"Checking accuracy on {name} data\nGot {correct} / {count} with accuracy {percent}\n" in out
    for fact in ("fashion-mnist", "1,501 training and 2,303 test images", "1 rank", "1 thread", str(tmp_path)):
        assert fact in out


def test_a_terminal_gets_a_bar_and_the_epochs_above_it(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    ended = train("--max-steps", 30, "--output-dir", tmp_path / "bar")
    assert re.search(r"30/52 \[.*step/s, loss \d\.\d{4}, [\d,]+ images/s\]", ended.err)
    assert "epoch 1/2 done: train loss" in ended.out and "step 1/52:" not in ended.out
    assert "step/s" not in train("--max-steps", 3, "--no-progress", "--output-dir", tmp_path / "none").err


# --- What flags change


def test_the_seed_decides_the_result(train: Train, run_at: RunAt, tmp_path: Path) -> None:
    for seed in (0, 1):
        assert train("--seed", seed, "--max-steps", 3, "--output-dir", tmp_path / str(seed)).code == 0
    first, second = losses(tmp_path / "0"), losses(tmp_path / "1")
    assert first == losses(run_at(1))[:3]
    assert not set(first) & set(second)


@pytest.mark.parametrize("steps", [26, 27, STEPS])
def test_max_steps_stops_at_that_step_with_evaluation_and_summary(
    train: Train, run_at: RunAt, tiny: Path, tmp_path: Path, steps: int
) -> None:
    samples = {26: 1501, 27: 1561, STEPS: EPOCHS * TRAIN_IMAGES}[steps]
    assert train("--max-steps", steps, "--output-dir", tmp_path).code == 0
    assert outcome(tmp_path) == ((True, "finished", 0) if steps == STEPS else (False, "max_steps", 0))
    summary = jobs.read_json(tmp_path / "summary.json")
    assert (summary["steps"], summary["samples_seen"], summary["test_count"]) == (steps, samples, TEST_IMAGES)
    correct, *_ = count_correct(tmp_path / "model.safetensors", tiny / "FashionMNIST" / "raw", "t10k")
    assert summary["test_correct"] == correct
    assert losses(tmp_path) == losses(run_at(1))[:steps]


@pytest.mark.parametrize("schedule", ["constant", "onecycle", "linear"])
def test_the_optimizer_uses_the_rate_of_the_schedule_also_before_max_steps(
    train: Train, tmp_path: Path, schedule: Any
) -> None:
    """Adam's first step moves every weight that has a gradient by about the rate."""
    flags = ["--schedule", schedule, "--lr", "0.01", "--output-dir", tmp_path, "--max-steps"]
    assert train(*flags, 1).code == 0
    torch.manual_seed(0)
    moved = (load_file(tmp_path / "model.safetensors")["fc1.bias"] - TutorialCNN().state_dict()["fc1.bias"]).abs()
    assert train(*flags, 10).code == 0
    config = TrainConfig(schedule=schedule, lr=0.01)
    rates = [0.01 * rate_factor(config, step, STEPS) for step in range(10)]
    assert [line["lr"] for line in jobs.read_metrics(tmp_path)] == rates
    assert moved.max().item() == pytest.approx(rates[0], rel=1e-3)


def rates_of_torch(anneal: str, rehearse: float, total_steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1.0, total_steps, pct_start=rehearse, anneal_strategy=anneal, cycle_momentum=False
    )
    rates = [optimizer.param_groups[0]["lr"]]
    for _ in range(total_steps - 1):
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.slow  # torch's schedulers import its compiler
@pytest.mark.parametrize("total_steps", [1, 3, 52, 938])
@pytest.mark.parametrize(("schedule", "rehearse", "anneal"), [("onecycle", 0.25, "cos"), ("linear", 0.1, "linear")])
def test_a_schedule_has_the_rates_of_torch_with_a_linear_warm_up(
    schedule: Any, rehearse: float, anneal: str, total_steps: int
) -> None:
    config = TrainConfig(schedule=schedule)
    linear, annealed = (rates_of_torch(name, rehearse, total_steps) for name in ("linear", anneal))
    last = rehearse * total_steps - 1
    expected = [linear[step] if step <= last else annealed[step] for step in range(total_steps)]
    assert [rate_factor(config, step, total_steps) for step in range(total_steps)] == pytest.approx(expected, rel=1e-9)


def test_bf16_trains_with_autocast(train: Train, run_at: RunAt, tmp_path: Path) -> None:
    assert train("--mixed-precision", "bf16", "--output-dir", tmp_path).code == 0
    found, exact = losses(tmp_path), losses(run_at(1))
    assert found[50] < found[0] - 0.3
    assert found[0] != exact[0]  # autocast is on
    assert found[0] == pytest.approx(exact[0], abs=0.02)
    assert jobs.read_json(tmp_path / "summary.json")["mixed_precision"] == "bf16"


def test_a_run_starts_from_the_weights_it_is_given(train: Train, run_at: RunAt, tmp_path: Path) -> None:
    init = run_at(1) / "model.safetensors"
    assert train("--init-from", init, "--max-steps", 3, "--output-dir", tmp_path).code == 0
    assert losses(tmp_path)[0] < losses(run_at(1))[0] - 0.3


@pytest.mark.slow
def test_auto_without_files_and_network_uses_generated_digits_and_says_so(train: Train, tmp_path: Path) -> None:
    arguments = ["--dataset", "auto", "--data-dir", tmp_path / "data", "--max-steps", "1"]
    ended = train(*arguments, "--output-dir", tmp_path / "run")
    assert ended.code == 0
    assert "THIS IS NOT MNIST" in ended.out + ended.err
    assert "synthetic" in ended.out
    summary = jobs.read_json(tmp_path / "run" / "summary.json")
    assert (summary["dataset"], summary["train_count"], summary["test_count"]) == ("synthetic", 60_000, 10_000)
    assert jobs.read_json(tmp_path / "run" / "config.json")["settings"]["dataset"] == "synthetic"


def test_runs_without_an_output_directory_each_get_a_new_one(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda *_: "20261127-101530")  # all in one second
    for _ in range(3):
        assert train("--max-steps", 1).code == 0
    names = [f"20261127-101530-tutorial{suffix}" for suffix in ("", "-2", "-3")]
    assert sorted(path.name for path in Path("runs").iterdir()) == names
    assert all(Path("runs", name, "summary.json").is_file() for name in names)


# --- Bad input: one message from one rank, the right exit code, no process left


@pytest.mark.parametrize(
    ("world_size", "arguments", "words"),
    [
        (1, ["--epochs", "three"], ["--epochs", "three"]),
        (2, ["--bogus", "1"], ["--bogus"]),
        (2, ["--dataset", "cifar"], ["cifar", "--dataset", "mnist", "synthetic"]),
        (2, ["--lr", "nan"], ["--lr is nan", "it should be"]),
        (3, ["--batch-size", "64"], ["--batch-size 64", "3 ranks", "63 or 66"]),
        pytest.param(2, ["--mixed-precision", "fp16"], ["fp16", "bf16"], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_bad_flag_is_one_message_from_one_rank_and_exit_code_2(
    tmp_path: Path, world_size: int, arguments: list[str], words: list[str]
) -> None:
    message = jobs.the_message(jobs.run_ranks(world_size, *arguments, cwd=tmp_path), 2)
    assert all(word in message for word in words), message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [["--epochz", "3"], pytest.param(["--mixed-precision", "fp16"], marks=pytest.mark.slow)], ids=" ".join
)
def test_each_machine_reports_a_bad_flag(tmp_path: Path, arguments: list[str]) -> None:
    """Before its ranks have met those of others, which may have been given better ones."""
    machine = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    ended = jobs.run_ranks(2, "--dataset", "synthetic", *arguments, cwd=tmp_path, variables=machine)
    assert [(rank.code, len(jobs.messages([rank]))) for rank in ended] == [(2, 1), (2, 1)]


def test_a_bad_precision_of_accelerate_launch_is_named_like_a_flag(tmp_path: Path) -> None:
    ended = jobs.run_ranks(2, cwd=tmp_path, variables={"ACCELERATE_MIXED_PRECISION": "fp8"})
    assert "--mixed-precision is 'fp8'" in jobs.the_message(ended, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"])
def test_what_a_default_config_of_accelerate_asks_for_beyond_ddp_is_refused(tmp_path: Path, name: str) -> None:
    ended = jobs.run_ranks(2, cwd=tmp_path, variables={name: "true"})
    assert f"the environment says {name}=true" in jobs.the_message(ended, 2)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (("--batch-size", "64"), "error: --batch-size 64 does not divide by 3 ranks"),
        (("--lr", "-1"), "error: --lr is -1.0"),
        (("--epochz", "3"), "Unrecognized options: --epochz"),
    ],
)
def test_a_mistake_is_reported_under_torchrun_also_by_a_rank_0_that_starts_late(
    tmp_path: Path, mistake: tuple[str, str], message: str
) -> None:
    """torchrun ends all ranks with the first one that fails."""
    late = "import os, time\nif os.environ.get('RANK') == '0':\n    time.sleep(3)\n"
    (tmp_path / "sitecustomize.py").write_text(late)
    path = os.pathsep.join([str(tmp_path), jobs.environment()["PYTHONPATH"]])
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "3", "-m", "ddp_mnist.train", *mistake]
    ended = jobs.run([sys.executable, *command], {"PYTHONPATH": path})
    assert ended.code != 0
    assert (ended.out + ended.err).count(message) == 1, ended.err


def test_help_into_a_pipe_that_closes_is_quiet() -> None:
    command = f"{shlex.join(jobs.TRAIN)} --help | head -n 3"
    ended = jobs.run(["bash", "-o", "pipefail", "-c", command])
    assert ended.out.count("\n") == 3 and ended.err == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [("RANK", "two"), ("RANK", "1"), ("LOCAL_WORLD_SIZE", "0"), ("WORLD_SIZE", "0"), ("WORLD_SIZE", "")],
)
def test_a_launchers_variable_that_is_no_number_is_named(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    message = jobs.the_message([train("--output-dir", tmp_path / "run")], 2)
    assert f"the environment says {name}={value}; expected a whole number" in message and f"unset {name}" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        (["--output-dir", "runs"], "runs"),
        (["--output-dir", "runs/mine"], "runs/mine"),
        # Root may write where others may not, but nobody makes directories here.
        (["--output-dir", "/proc/run"], "/proc/run"),
        ([], "runs"),
    ],
    ids=["a file", "below a file", "not writable", "none given"],
)
def test_an_unusable_run_directory_is_named(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").write_text("mine")
    message = jobs.the_message([train(*arguments)], 1)
    assert re.fullmatch(rf"error: .*{path} cannot be written: .+\. Choose another path with --output-dir\.", message)
    assert Path("runs").read_text() == "mine"


@pytest.mark.parametrize("name", ["metrics.jsonl", "model.safetensors"])
def test_a_folder_in_the_way_of_a_file_of_the_run_is_named(
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
def test_a_summary_that_cannot_be_written_loses_nothing_else(
    train: Train, run_at: RunAt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], code: int
) -> None:
    path, rehearse = tmp_path / "summary.json", TrainStep.rehearse
    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "rehearse", lambda *arguments: (path.mkdir(), rehearse(*arguments)))
        ended = train(*more, "--output-dir", tmp_path)
    assert ended.code == code
    if code == 1:
        assert f"{path} could not be written: Is a directory." in ended.err
    command = shlex.split(faults.printed_command(ended.err if code == 1 else ended.out))
    path.rmdir()
    assert train(*command[3:], "--max-minutes", 0).code == 0
    faults.assert_same_result(tmp_path, run_at(1))
    assert jobs.read_json(path)["resumed_from"] == (STEPS if code == 1 else 0)


@pytest.mark.slow
def test_pictures_that_cannot_be_drawn_do_not_fail_the_run(
    train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    page = tmp_path / "report.html"
    page.mkdir()
    assert train("--pictures", "--output-dir", tmp_path).code == 0
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    why, command = warning.split("; try  ")
    assert why.startswith("the pictures could not be drawn (JobError: ") and f"{tmp_path} could not be written" in why
    assert jobs.read_json(tmp_path / "summary.json")["finished"]
    page.rmdir()
    assert command == f"python -m ddp_mnist.report {tmp_path}"
    assert report.main(command.split()[3:]) == 0
    assert page.is_file()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK], ids=["no such call", "no lock daemon"])
def test_a_file_system_without_locks_is_one_warning(
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


def make_bad_data(root: Path, kind: str) -> str:
    """Make a data set whose training images are damaged or missing; return why they cannot be used."""
    path = write_digits(root, 100, 50) / "train-images-idx3-ubyte"
    if kind == "missing":
        shutil.rmtree(path.parent)
        return "missing"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    return f"{len(content) - 1} bytes"


def assert_names_the_bad_file(message: str, root: Path, why: str) -> None:
    assert str(root / "FashionMNIST" / "raw" / "train-images-idx3-ubyte") in message
    assert why in message
    assert "python -m ddp_mnist.data fetch --dataset fashion-mnist" in message


@pytest.mark.parametrize("kind", ["short", "missing"])
def test_a_bad_data_file_is_named_with_what_is_wrong_and_what_to_do(train: Train, tmp_path: Path, kind: str) -> None:
    root, run_dir = tmp_path / "data", tmp_path / "run"
    why = make_bad_data(root, kind)
    ended = train("--data-dir", root, "--output-dir", run_dir)
    assert_names_the_bad_file(jobs.the_message([ended], 1), root, why)
    assert not (run_dir / "model.safetensors").exists()
    summary = jobs.read_json(run_dir / "summary.json")
    assert (summary["finished"], summary["exit_code"], summary["steps"]) == (False, 1, 0)
    assert summary["dataset"] == "fashion-mnist" and summary["test_count"] is None


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("bad_ranks", [{0, 1}, {1}], ids=str)
def test_bad_data_end_all_ranks_with_one_message(flags: list[str], tmp_path: Path, bad_ranks: set[int]) -> None:
    root, run_dir = tmp_path / "data", tmp_path / "run"
    why = make_bad_data(root, "short")
    ended = jobs.run_ranks(
        2,
        *flags,
        *("--output-dir", str(run_dir)),
        per_rank=lambda rank: ["--data-dir", str(root)] if rank in bad_ranks else [],
    )
    message = jobs.the_message(ended, 1)
    assert_names_the_bad_file(message, root, why)
    assert "rank 1" in message or 0 in bad_ranks
    assert not (run_dir / "model.safetensors").exists()


def test_mnist_without_files_and_network_says_how_to_get_it(train: Train, tmp_path: Path) -> None:
    ended = train("--dataset", "mnist", "--data-dir", tmp_path / "data", "--output-dir", tmp_path / "run")
    message = jobs.the_message([ended], 1)
    for word in (str(tmp_path / "data" / "MNIST" / "raw"), "python -m ddp_mnist.data fetch", "--dataset synthetic"):
        assert word in message


@pytest.mark.parametrize(
    ("content", "more", "code", "why"),
    [
        (None, [], 1, "No such file"),
        (b"not safetensors", [], 1, "cannot be read"),
        ({}, ["--widths", "4", "4"], 2, "--widths"),
        ({"conv1.bias": torch.full((8,), math.nan)}, [], 1, "not finite"),
    ],
    ids=["missing", "damaged", "other widths", "not finite"],
)
def test_bad_initial_weights_are_named(
    train: Train, tmp_path: Path, content: Any, more: list[str], code: int, why: str
) -> None:
    path = tmp_path / "init.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        save_file(TutorialCNN().state_dict() | content, path)
    message = jobs.the_message([train("--init-from", path, *more, "--output-dir", tmp_path / "run")], code)
    assert str(path) in message
    assert why in message


# Finite weights whose loss is finite once, and whose first gradient overflows: step 2 is the first without a number.
OVERFLOWING = {"conv1.weight": 1e37, "conv1.bias": 0.0, "conv2.weight": 1e-37, "conv2.bias": 0.0, "fc1.weight": 1e5}


def write_weights(path: Path, factors: dict[str, float]) -> Path:
    torch.manual_seed(0)
    scaled = {name: value * factors.get(name, 1.0) for name, value in TutorialCNN().state_dict().items()}
    assert all(value.isfinite().all() for value in scaled.values())
    save_file(scaled, path)
    return path


def assert_ended_by_nan(run_dir: Path) -> None:
    assert not (run_dir / "model.safetensors").exists()
    assert outcome(run_dir) == (False, "nan", 1)
    assert jobs.read_json(run_dir / "summary.json").keys() >= SUMMARY_KEYS
    jobs.read_metrics(run_dir)


@pytest.mark.parametrize(
    ("factors", "more", "why"),
    [
        ({"fc1.weight": 1e38}, ["--log-every", "10000"], "at step 1"),
        (OVERFLOWING, ["--log-every", "1"], "at step 2"),
        (OVERFLOWING, ["--log-every", "10000"], "at step 2"),
        (OVERFLOWING, ["--max-steps", "1"], "not finite"),
    ],
    ids=["at once", "after a step", "read later", "weights of the last step"],
)
def test_a_loss_or_weights_that_are_not_finite_end_the_run_and_are_not_published(
    train: Train, tmp_path: Path, factors: dict[str, float], more: list[str], why: str
) -> None:
    init, run_dir = write_weights(tmp_path / "init.safetensors", factors), tmp_path / "run"
    assert why in jobs.the_message([train("--init-from", init, *more, "--output-dir", run_dir)], 1)
    assert_ended_by_nan(run_dir)


# Rank 0 takes three seconds for its summary.
SLOW_DISK = """
import os, sys, time
from ddp_mnist import train

replace = os.replace
def slowly(source, target, **options):
    if str(target).endswith("summary.json"):
        time.sleep(3)
    replace(source, target, **options)
os.replace = slowly
train.launcher.hard_exit(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_no_rank_exits_before_the_error_is_reported(flags: list[str], tmp_path: Path) -> None:
    """As srun --kill-on-bad-exit ends rank 0 with the first that exits, also one on another machine."""
    init, program = write_weights(tmp_path / "init.safetensors", OVERFLOWING), tmp_path / "slow.py"
    program.write_text(SLOW_DISK)
    arguments = [*flags, "--init-from", init, "--output-dir", tmp_path / "run"]
    command = [sys.executable, str(program), *map(str, arguments)]
    machine = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    environments = [jobs.environment(rank | machine) for rank in jobs.rank_variables(2)]
    with faults.Job([command] * 2, environments) as job:
        faults.wait_for(lambda: job.processes[1].poll() is not None, "the end of rank 1", job)
        job.signal(signal.SIGKILL, 0)
        first, second = job.wait(60)
    assert first.err.count("error: the loss became") == 1 and "A lower rate may help" in first.err
    assert "at step 2" in first.err and "error: " not in second.err
    assert_ended_by_nan(tmp_path / "run")


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
    message = jobs.the_message(jobs.run_together([command] * 2, environments), 1)
    assert all(word in message for word in ("WORLD_SIZE=1", "Accelerate counts 2", "torchrun")), message
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_missing_rendezvous_address_is_explained(flags: list[str], tmp_path: Path) -> None:
    variables = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    message = jobs.the_message([jobs.run([*jobs.TRAIN, *flags], variables, cwd=tmp_path)], 1)
    assert all(word in message for word in ("MASTER_ADDR", "2 ranks", "torchrun")), message


# --- Any console will do

needs_full_disk = pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's disk that is always full")


@pytest.mark.parametrize(
    ("console", "stream"), [("", "err"), ("2>&-", "out"), (">&- 2>&-", None), (">/dev/full 2>&1", None)]
)
@needs_full_disk
def test_an_error_has_its_exit_code_whatever_is_closed_or_full(console: str, stream: str | None) -> None:
    ended = jobs.run(["bash", "-c", f"{shlex.join([*jobs.TRAIN, '--epochs', '0'])} {console}"])
    assert ended.code == 2
    assert [name for name in ("out", "err") if "error: --epochs is 0" in getattr(ended, name)] == (
        [stream] if stream else []
    )


@pytest.mark.slow
@pytest.mark.parametrize("console", ["2>&-", ">/dev/full 2>&1"])
@needs_full_disk
def test_a_job_trains_whatever_is_closed_full_or_not_printable(flags: list[str], tmp_path: Path, console: str) -> None:
    run_dir = tmp_path / "Läufe"
    command = [*jobs.TRAIN, *flags, "--max-steps", "2", "--output-dir", str(run_dir)]
    variables = {"PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": "1"}
    ended = jobs.run(["bash", "-c", f"{shlex.join(command)} {console}"], variables)
    assert ended.code == 0, ended.err
    assert jobs.read_json(run_dir / "summary.json")["steps"] == 2
    assert "L\\xe4ufe" in ended.out or "full" in console
