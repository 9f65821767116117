"""Stop and go on, in this process on one rank: what is continued, what is refused, what is found damaged."""

from __future__ import annotations

import json
import pickle
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faults
import jobs
import pytest
import torch
from conftest import BATCH, EPOCHS, STEPS, TRAIN_IMAGES
from safetensors.torch import save_file

from ddp_mnist import trainer
from ddp_mnist.config import RESUME_FIELDS, TrainConfig
from ddp_mnist.data import sources
from ddp_mnist.model import CNN
from ddp_mnist.program import Program
from ddp_mnist.run import saver
from ddp_mnist.run.resume import continue_command
from ddp_mnist.step import TrainStep

Train = Callable[..., jobs.Ended]
EPOCH_STEPS = STEPS // EPOCHS


@pytest.fixture
def expected(run_at: Callable[[int], Path]) -> Path:
    """The run that nothing happened to."""
    return run_at(1)


@pytest.fixture
def stopped(train: Train, tmp_path: Path) -> Path:
    """A run that stopped at step 30, with checkpoints of steps 20 and 30."""
    run_dir = tmp_path / "run"
    assert train("--output-dir", run_dir, "--checkpoint-every", 10, "--max-steps", 30).code == 0
    assert faults.checkpoint_steps(run_dir) == [20, 30]
    return run_dir


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_printed_command_has_the_precision_that_accelerate_launch_was_told(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    for flags, precision in ([], "bf16"), (["--mixed-precision", "no"], "no"):
        ended = train("--max-steps", 1, "--output-dir", tmp_path / precision, *flags)
        command = faults.printed_command(ended.out)
        assert command.startswith("accelerate launch ") and f" --mixed-precision {precision} " in command


@pytest.mark.parametrize(
    ("variables", "launcher"),
    [
        (
            {"ACCELERATE_MIXED_PRECISION": "no"},
            "accelerate launch --multi_gpu --num_processes 8 --num_machines 2 --machine_rank ... --main_process_ip ...",
        ),
        ({"TORCHELASTIC_RUN_ID": "none"}, "torchrun --nnodes 2 --node-rank ... --master-addr ... --nproc-per-node 4"),
    ],
    ids=["accelerate launch", "torchrun"],
)
def test_the_printed_command_of_several_machines_leaves_open_what_differs_on_each(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], launcher: str
) -> None:
    monkeypatch.delenv("DDP_MNIST_DATA", raising=False)  # which the command would write out
    for name, value in {**variables, "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    context: Any = SimpleNamespace(size=8, device=torch.device("cuda"))
    command = continue_command(TrainConfig(seed=3, mixed_precision="bf16"), context, Program())
    assert command == f"{launcher} -m ddp_mnist.train --seed 3 --mixed-precision bf16"


# The first step, the last of an epoch, the first of the next and the last but one, with a line of the log between.
@pytest.mark.parametrize("log_every", [1, 7])
@pytest.mark.slow
def test_a_run_in_pieces_ends_with_the_bytes_of_one_in_one(
    train: Train, expected: Path, tmp_path: Path, log_every: int
) -> None:
    pieces, whole = tmp_path / "pieces", tmp_path / "whole"
    flags = ["--log-every", log_every, "--output-dir"]
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
    assert summary["train_seconds"] > 0
    walls = [line["wall_seconds"] for line in jobs.read_metrics(pieces)]
    assert walls == sorted(walls)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(["--mixed-precision", "bf16"], marks=pytest.mark.slow),
        pytest.param(["--schedule", "onecycle", "--lr", "0.01"], marks=pytest.mark.slow),
        ["--accumulate", "3", "--grad-clip", "0.05", "--widths", "4", "6", "--seed", "5"],
        pytest.param(["--init-from", "weights.safetensors"], marks=pytest.mark.slow),
    ],
    ids=lambda settings: settings[0],
)
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
        assert f"this command says {now}" in message or name == "init_from", message
        assert now in message and str(stopped) in message and "--fresh" in message, message
        assert everything(stopped) == before


def test_a_run_from_given_weights_is_not_continued_without_them(train: Train, tmp_path: Path, expected: Path) -> None:
    flags = ["--output-dir", tmp_path, "--max-steps", 3]
    weights = expected / "model.safetensors"
    assert train(*flags, "--init-from", weights).code == 0
    message = jobs.the_message([train(*flags)], 2)
    assert f"holds a run with --init-from {weights}; this command has none." in message


def test_more_epochs_are_refused_under_a_schedule_whose_length_they_would_change(train: Train, tmp_path: Path) -> None:
    flags = ["--schedule", "onecycle", "--output-dir", tmp_path]
    assert train(*flags, "--max-steps", 3).code == 0
    message = jobs.the_message([train(*flags, "--epochs", 3)], 2)
    assert f"--epochs {EPOCHS}" in message and "says 3" in message and "constant" in message
    assert train(*flags, "--max-steps", 4).code == 0


def test_what_is_no_part_of_the_result_may_differ(
    train: Train, stopped: Path, expected: Path, tiny: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny, tmp_path / "elsewhere")
    flags = ["--data-dir", tmp_path / "elsewhere", "--log-every", 3, "--checkpoint-every", 4, "--keep-checkpoints", 3]
    assert train(*flags, "--timeout-minutes", 1, "--no-progress", "--output-dir", stopped).code == 0
    assert (stopped / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    steps = [line["step"] for line in jobs.read_metrics(stopped)]
    assert steps == [*range(1, 31), *range(33, STEPS, 3), STEPS]


@pytest.mark.parametrize("change", [["--threads", "2"], ["--mixed-precision", "bf16"]], ids=lambda change: change[0])
@pytest.mark.slow
def test_threads_and_precision_may_differ(train: Train, stopped: Path, expected: Path, change: list[str]) -> None:
    assert train(*change, "--output-dir", stopped).code == 0
    found, whole = jobs.read_metrics(stopped), jobs.read_metrics(expected)
    assert [line["step"] for line in found] == [line["step"] for line in whole]
    for ours, theirs in zip(found, whole, strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=0.02)


def test_auto_is_kept_as_what_it_was_when_the_run_began(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {"auto": "fashion-mnist"}
    monkeypatch.setattr(sources, "resolve", lambda dataset, root: answers.get(dataset, dataset))
    flags = ["--dataset", "auto", "--output-dir", tmp_path]
    assert train(*flags, "--max-steps", 3).code == 0
    assert jobs.read_json(tmp_path / "config.json")["settings"]["dataset"] == "fashion-mnist"
    answers["auto"] = "synthetic"
    assert train(*flags, "--max-steps", 4).code == 0
    assert jobs.read_json(tmp_path / "summary.json")["dataset"] == "fashion-mnist"
    message = jobs.the_message([train("--dataset", "synthetic", "--output-dir", tmp_path)], 2)
    assert "--dataset fashion-mnist" in message and "synthetic" in message


def test_a_finished_run_says_so_and_changes_nothing(train: Train, expected: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(expected, run_dir)
    before = everything(run_dir)
    ended = train("--output-dir", run_dir)
    assert ended.code == 0
    assert f"{run_dir} is finished" in ended.out and "epoch" not in ended.out
    assert everything(run_dir) == before


def test_a_run_whose_steps_are_all_saved_is_seen_as_finished(train: Train, tmp_path: Path) -> None:
    flags = ["--checkpoint-every", EPOCH_STEPS, "--output-dir", tmp_path]
    assert train(*flags).code == 0
    assert faults.checkpoint_steps(tmp_path) == [EPOCH_STEPS, STEPS]
    assert "is finished" in train(*flags).out


def test_more_epochs_go_on_after_the_last_one(train: Train, expected: Path, tmp_path: Path) -> None:
    assert train("--epochs", 1, "--output-dir", tmp_path).code == 0
    assert jobs.read_json(tmp_path / "summary.json")["finished"]
    assert train("--output-dir", tmp_path).code == 0
    faults.assert_same_result(tmp_path, expected)
    assert jobs.read_json(tmp_path / "summary.json")["resumed_from"] == EPOCH_STEPS


@pytest.mark.parametrize("lost", ["summary.json", "model.safetensors"])
def test_a_run_that_was_killed_after_its_last_step_is_completed_without_training(
    train: Train, expected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(expected, run_dir)
    summary = jobs.read_json(run_dir / "summary.json")
    (run_dir / lost).unlink()
    monkeypatch.delattr(TrainStep, "__call__")
    assert train("--output-dir", run_dir).code == 0
    faults.assert_same_result(run_dir, expected)
    again = jobs.read_json(run_dir / "summary.json")
    for key in ("finished", "exit_code", "steps", "samples_seen", "train_correct", "test_correct", "train_seconds"):
        assert again[key] == summary[key], key
    assert again["resumed_from"] == STEPS


@pytest.mark.slow
def test_no_summary_of_an_earlier_attempt_speaks_for_one_that_died(
    train: Train, expected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train("--epochs", 1, "--output-dir", tmp_path).code == 0
    with monkeypatch.context() as patch:
        # Gone between its last checkpoint and its weights: those of one epoch still lie there.
        patch.setattr(saver, "publish_weights", _die)
        with pytest.raises(ZeroDivisionError):
            train("--output-dir", tmp_path)
    assert faults.checkpoint_steps(tmp_path)[-1] == STEPS
    assert not (tmp_path / "summary.json").exists()
    assert train("--output-dir", tmp_path).code == 0
    faults.assert_same_result(tmp_path, expected)
    assert jobs.read_json(tmp_path / "summary.json")["epochs"] == EPOCHS


def _die(*_: object) -> None:
    raise ZeroDivisionError("no error of a user")


@pytest.mark.slow
def test_fresh_starts_over_and_loses_nothing(train: Train, stopped: Path, expected: Path) -> None:
    before = everything(stopped)
    ended = train("--fresh", "--seed", 0, "--output-dir", stopped)
    assert ended.code == 0
    faults.assert_same_result(stopped, expected)
    assert jobs.read_json(stopped / "summary.json")["resumed_from"] is None
    (aside,) = stopped.glob("old-*")
    kept = everything(aside)
    assert kept == {name: content for name, content in before.items() if name != ".lock"}
    assert {"metrics.jsonl", "summary.json", "model.safetensors", "config.json"} < set(kept)
    assert {"checkpoints/step-00000020/state.json", "checkpoints/step-00000030/state.json"} < set(kept)
    # What was set aside can be gone back to.
    assert train("--output-dir", aside).code == 0
    faults.assert_same_result(aside, expected)


def test_a_finished_run_without_its_checkpoints_is_not_trained_over(
    train: Train, expected: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(expected, run_dir)
    shutil.rmtree(run_dir / "checkpoints")
    before = everything(run_dir)
    message = jobs.the_message([train("--output-dir", run_dir)], 2)
    assert str(run_dir) in message and "--fresh" in message
    assert everything(run_dir) == before


FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def halve(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, halve, empty, lengthen, flip, Path.unlink], ids=lambda how: how.__name__)
@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_set_aside_and_the_one_before_it_used(
    train: Train,
    stopped: Path,
    expected: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], Any],
) -> None:
    for name in FILES:
        run_dir = tmp_path / name
        shutil.copytree(stopped, run_dir)
        damaged = run_dir / "checkpoints" / "step-00000030"
        damage(damaged / name)
        left = everything(damaged)
        caplog.clear()
        ended = train("--output-dir", run_dir)
        if (damage, name) == (truncate, "MANIFEST.json"):  # its last byte is a line's end: nothing is lost
            assert "resumed at step 30 " in ended.out
            continue
        assert ended.code == 0
        (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert f"{damaged} is damaged" in warning and "damaged-step-00000030" in warning, warning
        assert "using step-00000020" in warning, warning
        assert name == "MANIFEST.json" or name in warning, warning
        assert "resumed at step 20 " in ended.out
        assert everything(damaged.with_name("damaged-step-00000030")) == left
        faults.assert_same_result(run_dir, expected)


def test_a_run_all_of_whose_checkpoints_are_damaged_starts_over_and_says_so(
    train: Train, stopped: Path, expected: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for path in stopped.glob("checkpoints/step-*"):
        shutil.rmtree(path)
        path.mkdir()
    assert train("--output-dir", stopped).code == 0
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert ["step-00000030 is damaged" in warnings[0], "step-00000020 is damaged" in warnings[1]] == [True, True]
    assert "starting over" in warnings[1] and len(warnings) == 2
    faults.assert_same_result(stopped, expected)


@pytest.mark.parametrize("more", [[], ["--fresh"]], ids=["a damaged one", "--fresh"])
@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_set_aside_is_told(
    train: Train, flags: list[str], stopped: Path, expected: Path, more: list[str]
) -> None:
    folder = stopped / "checkpoints"
    truncate(folder / "step-00000030" / "state.json")
    before = everything(stopped)
    folder.chmod(0o555)
    with faults.start(1, *flags, *more, "--output-dir", stopped, powerless=True) as job:
        message = jobs.the_message(job.wait(), 1)
    folder.chmod(0o755)
    assert message.startswith(f"error: {stopped} cannot be used: ") and "Permission denied: " in message
    assert str(folder) in message
    assert everything(stopped) == before
    assert train(*more, "--output-dir", stopped).code == 0
    faults.assert_same_result(stopped, expected)


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
    with open(stopped / "metrics.jsonl", "a") as file:
        file.write('{"step": 31, "train/loss": 0.0}\n{"step": 3')
    assert train("--output-dir", stopped).code == 0
    faults.assert_same_result(stopped, expected)


def test_lines_that_are_missing_before_the_checkpoint_are_told(
    train: Train, stopped: Path, expected: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = stopped / "metrics.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-2]))
    assert train("--output-dir", stopped).code == 0
    assert "earlier lines are missing" in caplog.text
    assert (stopped / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()


def test_a_checkpoint_holds_nothing_that_must_be_unpickled(
    train: Train, stopped: Path, expected: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    assert train("--output-dir", stopped).code == 0
    faults.assert_same_result(stopped, expected)
    for path in stopped.glob("checkpoints/*/*"):
        assert path.name in FILES
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        else:
            json.loads(content)


def infinite_rate(at: int) -> Callable[..., float]:
    rate = trainer.learning_rate

    def learning_rate(config: Any, step: int, total_steps: int) -> float:
        return float("inf") if step >= at and config.lr == 1e-3 else rate(config, step, total_steps)

    return learning_rate


@pytest.mark.parametrize("at", [25, STEPS - 1], ids=["in the middle", "in the last step"])
@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_and_says_how_to_go_on(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    run_dir = tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer, "learning_rate", infinite_rate(at))
    ended = train("--checkpoint-every", 10, "--output-dir", run_dir)
    message = jobs.the_message([ended], 1)
    assert ("step 27" if at == 25 else "not finite") in message
    summary = jobs.read_json(run_dir / "summary.json")
    assert (summary["stop_reason"], summary["exit_code"], summary["finished"]) == ("nan", 1, False)
    assert faults.checkpoint_steps(run_dir) == ([10, 20] if at == 25 else [40, 50])
    command = shlex.split(faults.printed_command(ended.err))
    assert command[:3] == ["python", "-m", "ddp_mnist.train"]
    assert float(command[command.index("--lr") + 1]) < 1e-3
    assert f"step-{20 if at == 25 else 50:08d}" in command[command.index("--init-from") + 1]
    assert train(*command[3:]).code == 0
    (new,) = (tmp_path / "runs").iterdir()
    assert jobs.read_json(new / "summary.json")["finished"]


def test_a_run_that_fails_without_a_checkpoint_promises_none(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "learning_rate", infinite_rate(2))
    ended = train("--output-dir", tmp_path)
    assert jobs.the_message([ended], 1).startswith("error: the loss became")
    assert "--init-from" not in ended.err and "--lr " in faults.printed_command(ended.err)
