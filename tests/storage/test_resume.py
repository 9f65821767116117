"""Stop and go on, in this process on one rank: what is continued, what is refused, what is found damaged."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faults
import jobs
import pytest
import torch
from conftest import BATCH, EPOCHS, STEPS, TRAIN_IMAGES
from safetensors.torch import save_file

from ddp_mnist.config import RESUME_FIELDS
from ddp_mnist.data import sources
from ddp_mnist.model import CNN
from ddp_mnist.step import TrainStep
from ddp_mnist.storage.checkpoint import MANIFEST, MODEL, STATE

Train = Callable[..., jobs.Ended]
EPOCH_STEPS = STEPS // EPOCHS


@pytest.fixture
def expected(run_at: Callable[[int], Path]) -> Path:
    """The run that nothing happened to."""
    return run_at(1)


@pytest.fixture
def finished(expected: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(expected, tmp_path / "run"))


@pytest.fixture(scope="session")
def stopped_once(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("stopped") / "run"
    arguments = [*flags, "--output-dir", str(run_dir), "--checkpoint-every", "10", "--max-steps", "30"]
    jobs.succeeded(jobs.run_ranks(1, *arguments))
    return run_dir


@pytest.fixture
def stopped(stopped_once: Path, tmp_path: Path) -> Path:
    """A run that stopped at step 30, with checkpoints of steps 20 and 30."""
    return Path(shutil.copytree(stopped_once, tmp_path / "run"))


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


# The first step, the last of an epoch, the first of the next and the last but one.
@pytest.mark.slow
def test_a_run_in_pieces_ends_with_the_bytes_of_one_in_one(train: Train, expected: Path, tmp_path: Path) -> None:
    pieces, whole = tmp_path / "pieces", tmp_path / "whole"
    flags = ["--log-every", 7, "--output-dir"]
    for step in (1, 2, 24, EPOCH_STEPS, EPOCH_STEPS + 1, STEPS - 1):
        assert train(*flags, pieces, "--max-steps", step).code == 0
        summary = jobs.read_json(pieces / "summary.json")
        assert (summary["steps"], summary["finished"], summary["stop_reason"]) == (step, False, "max_steps")
        assert (summary["train_count"], summary["exit_code"]) == (TRAIN_IMAGES, 0)
    assert train(*flags, pieces).code == 0
    assert train(*flags, whole).code == 0
    faults.assert_same_result(pieces, whole)
    assert (pieces / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    summary = jobs.read_json(pieces / "summary.json")
    assert (summary["finished"], summary["resumed_from"]) == (True, STEPS - 1)
    assert (summary["steps"], summary["samples_seen"]) == (STEPS, EPOCHS * TRAIN_IMAGES)
    walls = [line["wall_seconds"] for line in jobs.read_metrics(pieces)]
    assert walls == sorted(walls)


@pytest.mark.parametrize(
    "settings",
    [
        ["--mixed-precision", "bf16"],
        ["--schedule", "onecycle", "--lr", "0.01"],
        ["--accumulate", "3", "--grad-clip", "0.05", "--widths", "4", "6", "--seed", "5"],
        ["--init-from", "weights.safetensors"],
    ],
    ids=lambda settings: settings[0],
)
@pytest.mark.slow
def test_every_kind_of_run_continues_with_the_same_bytes(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(7)
    save_file(CNN().state_dict(), "weights.safetensors")
    assert train(*settings, "--output-dir", "whole").code == 0
    assert train(*settings, "--output-dir", "pieces", "--max-steps", 17).code == 0
    Path("weights.safetensors").unlink()  # needed for the start only
    assert train(*settings, "--output-dir", "pieces").code == 0
    faults.assert_same_result(Path("pieces"), Path("whole"))


DIFFERENT: dict[str, tuple[list[str], str, str]] = {
    "dataset": (["--dataset", "mnist"], "fashion-mnist", "mnist"),
    "batch_size": (["--batch-size", "30"], str(BATCH), "30"),
    "accumulate": (["--accumulate", "2"], "1", "2"),
    "epochs": (["--epochs", "1"], str(EPOCHS), "1"),
    "lr": (["--lr", "0.002"], "0.001", "0.002"),
    "beta2": (["--beta2", "0.99"], "0.999", "0.99"),
    "schedule": (["--schedule", "onecycle"], "constant", "onecycle"),
    "grad_clip": (["--grad-clip", "1.5"], "0.0", "1.5"),
    "seed": (["--seed", "3"], "0", "3"),
    "widths": (["--widths", "8", "17"], "8 16", "8 17"),
    "init_from": (["--init-from", "some.safetensors"], "no --init-from", "some.safetensors"),
}


def test_another_run_in_its_place_is_refused_by_field_and_values(train: Train, stopped: Path) -> None:
    assert set(DIFFERENT) == set(RESUME_FIELDS)
    before = everything(stopped)
    for name, (flags, was, now) in DIFFERENT.items():
        ended = train(*flags, "--output-dir", stopped)
        message = jobs.the_message([ended], 2)
        assert f"holds a run with {was if was.startswith('no ') else f'{flags[0]} {was}'};" in message, message
        assert f"this command has {flags[0]} {now}" in message or name == "init_from", message
        assert now in message and str(stopped) in message and "--fresh" in message, message
        assert everything(stopped) == before


def test_a_run_is_not_continued_without_its_weights_nor_a_schedule_with_more_epochs(
    train: Train, tmp_path: Path, expected: Path
) -> None:
    flags, weights = ["--schedule", "onecycle", "--output-dir", tmp_path], expected / "model.safetensors"
    assert train(*flags, "--init-from", weights, "--max-steps", 3).code == 0
    message = jobs.the_message([train(*flags)], 2)
    assert f"holds a run with --init-from {weights}; this command has no --init-from." in message
    message = jobs.the_message([train(*flags, "--init-from", weights, "--epochs", 3)], 2)
    assert f"--epochs {EPOCHS}" in message and "has --epochs 3" in message and "constant" in message


@pytest.mark.slow
def test_what_is_no_part_of_the_result_may_differ(
    train: Train, stopped: Path, expected: Path, tiny: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny, tmp_path / "elsewhere")
    flags = ["--data-dir", tmp_path / "elsewhere", "--log-every", 3, "--checkpoint-every", 4, "--keep-checkpoints", 3]
    assert train(*flags, "--timeout-minutes", 1, "--no-progress", "--output-dir", stopped, "--max-steps", 45).code == 0
    # Threads and precision change the last bits only.
    assert train("--threads", 2, "--mixed-precision", "bf16", "--output-dir", stopped).code == 0
    found = {line["step"]: line["train/loss"] for line in jobs.read_metrics(stopped)}
    assert list(found) == [*range(1, 31), *range(33, 46, 3), *range(46, STEPS + 1)]
    whole = {line["step"]: line["train/loss"] for line in jobs.read_metrics(expected)}
    assert all(found[step] == whole[step] for step in range(1, 31))
    assert [found[step] for step in range(46, 53)] == pytest.approx([whole[step] for step in range(46, 53)], rel=0.02)


def test_auto_is_kept_as_what_it_was_when_the_run_began(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step, answer in ((3, "fashion-mnist"), (4, "synthetic")):
        monkeypatch.setattr(sources, "resolve", lambda *_, answer=answer: answer)
        assert train("--dataset", "auto", "--output-dir", tmp_path, "--max-steps", step).code == 0
        assert jobs.read_json(tmp_path / "config.json")["settings"]["dataset"] == "fashion-mnist"
        assert jobs.read_json(tmp_path / "summary.json")["dataset"] == "fashion-mnist"
    message = jobs.the_message([train("--dataset", "synthetic", "--output-dir", tmp_path)], 2)
    assert "--dataset fashion-mnist" in message and "synthetic" in message


def test_a_finished_run_says_so_and_is_not_trained_over(train: Train, finished: Path) -> None:
    before = everything(finished)
    ended = train("--output-dir", finished)
    assert ended.code == 0
    assert f"{finished} is finished" in ended.out and "epoch" not in ended.out
    assert everything(finished) == before
    shutil.rmtree(finished / "checkpoints")
    before = everything(finished)
    message = jobs.the_message([train("--output-dir", finished)], 2)
    assert str(finished) in message and "--fresh" in message
    assert everything(finished) == before


@pytest.mark.slow
def test_more_epochs_go_on_after_the_last_one(
    train: Train, expected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train("--epochs", 1, "--output-dir", tmp_path).code == 0
    assert jobs.read_json(tmp_path / "summary.json")["finished"]
    with monkeypatch.context() as patch:
        patch.delattr(TrainStep, "__call__")
        with pytest.raises(TypeError, match="not callable"):
            train("--output-dir", tmp_path)
    # No summary of an earlier attempt speaks for one that died.
    assert not (tmp_path / "summary.json").exists()
    assert train("--output-dir", tmp_path).code == 0
    faults.assert_same_result(tmp_path, expected)
    summary = jobs.read_json(tmp_path / "summary.json")
    assert (summary["epochs"], summary["resumed_from"]) == (EPOCHS, EPOCH_STEPS)


@pytest.mark.parametrize("lost", ["summary.json", "model.safetensors"])
def test_a_run_that_was_killed_after_its_last_step_is_completed_without_training(
    train: Train, expected: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    (finished / lost).unlink()
    monkeypatch.delattr(TrainStep, "__call__")
    assert train("--output-dir", finished).code == 0
    faults.assert_same_result(finished, expected)
    again, summary = (jobs.read_json(path / "summary.json") for path in (finished, expected))
    for key in ("finished", "exit_code", "steps", "samples_seen", "train_correct", "test_correct", "train_seconds"):
        assert again[key] == summary[key], key
    assert again["resumed_from"] == STEPS


@pytest.mark.slow
def test_fresh_starts_over_and_loses_nothing(train: Train, stopped: Path, expected: Path) -> None:
    for name in ("curves.png", "report.html"):
        (stopped / name).write_text("of the run before")
    before = everything(stopped)
    assert train("--fresh", "--output-dir", stopped).code == 0
    faults.assert_same_result(stopped, expected)
    assert jobs.read_json(stopped / "summary.json")["resumed_from"] is None
    (aside,) = stopped.glob("old-*")
    assert everything(aside) == {name: content for name, content in before.items() if name != ".lock"}


@pytest.mark.parametrize(("damaged", "then"), [([30], "using step-00000020"), ([30, 20], "starts over")])
@pytest.mark.slow
def test_damaged_checkpoints_are_named_and_set_aside_and_the_one_before_them_used(
    train: Train, stopped: Path, expected: Path, caplog: pytest.LogCaptureFixture, damaged: list[int], then: str
) -> None:
    paths = [stopped / "checkpoints" / f"step-{step:08d}" for step in damaged]
    for path in paths:
        (path / MODEL).write_bytes((path / MODEL).read_bytes()[:-1])
    left = [everything(path) for path in paths]
    ended = train("--output-dir", stopped)
    assert ended.code == 0 and ("resumed at step 20 " in ended.out) == (damaged == [30])
    found = warnings(caplog)
    for path, warning in zip(paths, found, strict=True):
        assert f"{path} is damaged ({MODEL} has " in warning and f"damaged-{path.name}" in warning
    assert then in found[-1]
    assert [everything(path.with_name(f"damaged-{path.name}")) for path in paths] == left
    faults.assert_same_result(stopped, expected)


def test_a_checkpoint_that_cannot_be_read_is_reported_and_kept(train: Train, stopped: Path, expected: Path) -> None:
    """Else a run would start over where its checkpoints cannot be read for a moment."""
    path = stopped / "checkpoints" / "step-00000030" / MODEL
    whole = path.read_bytes()
    path.unlink()
    before = everything(stopped)
    path.symlink_to(path)  # reading it fails, and not as reading a file that is not there
    message = jobs.the_message([train("--output-dir", stopped)], 1)
    assert message.startswith(f"error: {path.parent} cannot be read: ")
    path.unlink()
    assert everything(stopped) == before
    path.write_bytes(whole)
    ended = train("--output-dir", stopped)
    assert ended.code == 0 and "resumed at step 30 " in ended.out
    faults.assert_same_result(stopped, expected)


@pytest.mark.parametrize(
    ("ours", "theirs"), [('"epoch":', '"a_field_of_tomorrow": 1, "epoch":'), ('"params":', '"p":')]
)
def test_a_checkpoint_of_another_version_is_reported_and_kept(
    train: Train, stopped: Path, ours: str, theirs: str
) -> None:
    """One that was written whole is not damaged."""
    step = stopped / "checkpoints" / "step-00000030"
    text = (step / STATE).read_text().replace(ours, theirs, 1).encode()
    (step / STATE).write_bytes(text)
    manifest = jobs.read_json(step / MANIFEST)
    manifest[STATE] = {"size": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    (step / MANIFEST).write_text(json.dumps(manifest))
    before = everything(stopped)
    message = jobs.the_message([train("--output-dir", stopped)], 1)
    assert f"{step} is of another version of ddp_mnist" in message and "--fresh" in message
    assert everything(stopped) == before


def test_a_folder_of_another_program_is_left_alone(train: Train, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    before = everything(tmp_path)
    for more in ([], ["--fresh"]):
        message = jobs.the_message([train("--output-dir", tmp_path, *more)], 2)
        assert message.startswith(f"error: {tmp_path} holds a config.json of another program")
    assert everything(tmp_path) == before


def test_what_others_leave_among_the_checkpoints_changes_nothing(train: Train, stopped: Path, expected: Path) -> None:
    folder = stopped / "checkpoints"
    shutil.copytree(folder / "step-00000020", folder / "step-00000040-good")
    shutil.copytree(folder / "step-00000020", folder / "step-notes")
    shutil.copytree(folder / "step-00000030", folder / ".tmp-step-00000040-0123abcd")
    (folder / "step-00000050").write_text("a file")
    (folder / "step-00000030" / ".nfs0000001").write_text("of the file system")
    ended = train("--checkpoint-every", 10, "--output-dir", stopped)
    assert ended.code == 0
    assert "resumed at step 30 " in ended.out
    faults.assert_same_result(stopped, expected)
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {
        *("step-00000040-good", "step-notes", "step-00000040", f"step-{STEPS:08d}")
    }


def test_lines_beyond_the_checkpoint_are_cut(train: Train, stopped: Path, expected: Path) -> None:
    shutil.rmtree(stopped / "checkpoints" / "step-00000030")
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "train/loss": 0.0}\n{"step": 3')
    assert train("--output-dir", stopped).code == 0
    faults.assert_same_result(stopped, expected)


def test_lines_that_are_missing_before_the_checkpoint_are_reported(
    train: Train, stopped: Path, expected: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = stopped / "metrics.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-2]))
    assert train("--output-dir", stopped).code == 0
    assert "earlier lines are missing" in caplog.text
    assert (stopped / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("at", "kept"), [(26, [10, 20]), (3, [])], ids=["with a checkpoint", "without"])
@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_and_says_how_to_go_on(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, kept: list[int]
) -> None:
    call, steps = TrainStep.__call__, itertools.count(1)

    def ruined(self: TrainStep, *arguments: Any) -> Any:
        if next(steps) == at:
            torch.nn.init.constant_(self.network.get_parameter("fc1.bias"), math.nan)
        return call(self, *arguments)

    run_dir = tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TrainStep, "__call__", ruined)
    ended = train("--checkpoint-every", 10, "--output-dir", run_dir)
    assert f"step {at}." in jobs.the_message([ended], 1)
    summary = jobs.read_json(run_dir / "summary.json")
    assert (summary["stop_reason"], summary["exit_code"], summary["finished"]) == ("nan", 1, False)
    assert faults.checkpoint_steps(run_dir) == kept
    command = shlex.split(faults.printed_command(ended.err))
    assert command[:3] == ["python", "-m", "ddp_mnist.train"]
    assert float(command[command.index("--lr") + 1]) < 1e-3
    assert ("--init-from" in command) == bool(kept)
    assert not kept or "step-00000020" in command[command.index("--init-from") + 1]
    assert train(*command[3:]).code == 0
    (new,) = (tmp_path / "runs").iterdir()
    assert jobs.read_json(new / "summary.json")["finished"]
