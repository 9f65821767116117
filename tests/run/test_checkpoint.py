"""The files of a checkpoint: published whole or not at all, and never in place of the last good one."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faults
import jobs
import pytest
import torch

from ddp_mnist.config import TrainConfig
from ddp_mnist.data.batches import Batch
from ddp_mnist.distributed.context import Context
from ddp_mnist.model import CNN
from ddp_mnist.optimizer import save_state
from ddp_mnist.program import Program
from ddp_mnist.run import checkpoint, saver
from ddp_mnist.run import directory as rundir
from ddp_mnist.run.checkpoint import Checkpoints, Snapshot, TrainState, weights
from ddp_mnist.run.saver import SaveClock, restore
from ddp_mnist.step import TrainStep

Train = Callable[..., jobs.Ended]


def snapshot(step: int, **changes: Any) -> Snapshot:
    torch.manual_seed(step)
    weights = {name: torch.rand_like(value) for name, value in CNN().state_dict().items()}
    optimizer = {"conv1.weight.step": torch.tensor(float(step)), "conv1.weight.exp_avg": torch.rand(8, 1, 3, 3)}
    state = TrainState(epoch=1, step_in_epoch=3, step=step, samples_seen=60 * step, losses=[0.1, 1 / 3])
    content = {"config": {"widths": [8, 16]}, "scaler": {}, "metrics_bytes": 12}
    return Snapshot(**{"state": state, "weights": weights, "optimizer": optimizer, **content, **changes})


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    # What an fp16 run keeps: a GradScaler's own state, after it has grown once and backed off.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15, growth_interval=1)
    scaler.scale(torch.ones(()))
    scaler.update(2.0**15 / 3)
    saved = snapshot(7, scaler=scaler.state_dict())
    store = Checkpoints(tmp_path, keep=2)
    path = store.publish(saved)
    assert path == tmp_path / "checkpoints" / "step-00000007"
    found = store.newest()
    assert found is not None and found[0] == path
    back = found[1]
    assert (back.state, back.config, back.metrics_bytes) == (saved.state, saved.config, saved.metrics_bytes)
    for tensors, expected in ((back.weights, saved.weights), (back.optimizer, saved.optimizer)):
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    again = torch.amp.GradScaler("cpu")
    again.load_state_dict(back.scaler)
    assert again.state_dict() == scaler.state_dict()
    assert back.scaler["scale"] == scaler.get_scale()


def test_equal_states_are_equal_files(tmp_path: Path) -> None:
    one, two = (Checkpoints(tmp_path / name, keep=2).publish(snapshot(7)) for name in ("one", "two"))
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes()


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_step_restored_from_its_snapshot_is_the_same_step(
    process_of_a_job: None, tmp_path: Path, precision: Any
) -> None:
    torch.manual_seed(0)
    images = torch.randint(256, (12, 1, 28, 28), dtype=torch.uint8)
    batch = Batch(images, torch.arange(12) % 10, count=12, global_size=12, seed=0)
    config = TrainConfig(mixed_precision=precision, threads=1)
    scaler = torch.amp.GradScaler("cpu", growth_interval=2, enabled=precision == "fp16")

    def step_of(found: Snapshot | None) -> TrainStep:
        step = TrainStep(config, context, Program().build_network(config, context, found))
        if found is not None:
            restore(step, found)
        return step

    def three_losses(step: TrainStep) -> list[float]:
        return [step(batch, 1e-3)[0].item() for _ in range(3)]

    # fp16 is refused on a CPU, where its scaler works.
    with Context(config.replace(mixed_precision="no" if precision == "fp16" else precision)) as context:
        context.accelerator.scaler = scaler if precision == "fp16" else None
        step = step_of(None)
        three_losses(step)
        content = {"weights": weights(step.network), "optimizer": save_state(step.network, step.optimizer)}
        assert {value.dtype for tensors in content.values() for value in tensors.values()} == {torch.float32}
        assert len(content["optimizer"]) == 3 * len(content["weights"])
        store = Checkpoints(tmp_path, keep=2)
        store.publish(snapshot(3, **content, scaler=scaler.state_dict()))
        newest = store.newest()
        assert newest is not None
        losses, after = three_losses(step), scaler.state_dict()
        other = step_of(newest[1])
        assert scaler.state_dict() != after or precision != "fp16"
        assert three_losses(other) == losses and scaler.state_dict() == after
        for name, value in step.network.state_dict().items():
            assert torch.equal(other.network.state_dict()[name], value), name


def test_the_newest_are_kept_and_ordered_by_number(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=3)
    for step in (8, 9, 99_999_999, 100_000_000, 100_000_001):
        store.publish(snapshot(step))
    assert names(tmp_path) == ["step-100000000", "step-100000001", "step-99999999"]
    assert store.last_step() == 100_000_001
    found = store.newest()
    assert found is not None and found[1].state.step == 100_000_001


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_a_save_that_fails_leaves_all_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    store = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        store.publish(snapshot(step))

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if call == "write":
            patch.setattr("builtins.open", refuse)
        else:
            patch.setattr(os, call, refuse)
        with pytest.raises(OSError, match="No space left"):
            store.publish(snapshot(3))
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    store.publish(snapshot(3))
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def test_everything_is_on_the_disk_before_its_name_and_old_ones_go_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut at any moment then leaves the old name or the whole new one."""
    store = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        store.publish(snapshot(step))
    calls: list[tuple[str, str, list[str]]] = []
    fsync, rename = os.fsync, os.rename

    def note_fsync(descriptor: int) -> None:
        calls.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name, names(tmp_path)))
        fsync(descriptor)

    def note_rename(source: Path, target: Path) -> None:
        calls.append(("rename", Path(target).name, names(tmp_path)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", note_rename)
    store.publish(snapshot(3))
    order = [(what, name if not name.startswith(".tmp-") else "temporary") for what, name, _ in calls]
    files = ["model.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"]
    assert order[:7] == [
        *(("fsync", name) for name in files),
        ("fsync", "temporary"),
        ("rename", "step-00000003"),
        ("fsync", "checkpoints"),
    ]
    for *_, there in calls[:7]:
        assert {"step-00000001", "step-00000002"} <= set(there)
    assert "step-00000003" in calls[6][2]
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def test_a_kill_while_an_old_one_is_removed_leaves_no_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        store.publish(snapshot(step))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)  # dead before the first file is gone
        store.publish(snapshot(3))
    hidden = [name for name in names(tmp_path) if name.startswith(".tmp-step-00000001-")]
    assert len(hidden) == 1 and "step-00000001" not in names(tmp_path)
    found = store.newest()
    assert found is not None and found[1].state.step == 3
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def test_what_is_damaged_again_and_again_is_all_kept(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=2)
    for content in "abc":
        path = store.publish(snapshot(7))
        (path / "MANIFEST.json").write_text(content)
        assert store.newest() is None
    kept = ["damaged-step-00000007", "damaged-step-00000007-2", "damaged-step-00000007-3"]
    assert names(tmp_path) == kept
    assert [(tmp_path / "checkpoints" / name / "MANIFEST.json").read_text() for name in kept] == ["a", "b", "c"]


def test_a_disk_that_does_not_answer_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a run would start over where its checkpoints cannot be read for a moment."""
    store = Checkpoints(tmp_path, keep=2)
    path = store.publish(snapshot(7))
    read = Path.read_bytes

    def failing(self: Path) -> bytes:
        if self.name == "model.safetensors":
            raise OSError(errno.EIO, "Input/output error")
        return read(self)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", failing)
        with pytest.raises(OSError, match="Input/output error"):
            store.newest()
    found = store.newest()
    assert found is not None and found[0] == path and names(tmp_path) == [path.name]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_a_file_system_that_cannot_sync_directories_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    sync = os.fsync

    def only_files(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    store = Checkpoints(tmp_path, keep=2)
    with pytest.raises(OSError) if number == errno.EIO else contextlib.nullcontext():
        store.publish(snapshot(7))
        assert store.newest() is not None


def test_a_run_keeps_as_many_as_it_was_told(train: Train, tmp_path: Path) -> None:
    flags = ["--checkpoint-every", 10, "--output-dir", tmp_path, "--keep-checkpoints"]
    assert train(*flags, 4, "--max-steps", 45).code == 0
    assert names(tmp_path) == [f"step-{step:08d}" for step in (20, 30, 40, 45)]
    assert train(*flags, 2).code == 0
    assert names(tmp_path) == [f"step-{step:08d}" for step in (50, 52)]
    assert "--keep-checkpoints is 1; expected a value from 2" in jobs.the_message([train(*flags, 1)], 2)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(saver.time, "monotonic", lambda: now[0])
    return now


def test_an_epochs_end_is_saved_where_a_save_takes_under_one_percent_of_the_time(clock: list[float]) -> None:
    saves = SaveClock()
    clock[0] += 0.5
    assert saves.due(epoch_end=True) and not saves.due(epoch_end=False)  # what a save costs is not known yet
    saves.saved(0.1)
    clock[0] += 9.9
    assert not saves.due(epoch_end=True)
    clock[0] += 0.2
    assert saves.due(epoch_end=True) and not saves.due(epoch_end=False)
    saves.saved(30.0)
    clock[0] += 599
    assert not saves.due(epoch_end=True) and not saves.due(epoch_end=False)


def test_ten_minutes_without_a_save_are_the_most(clock: list[float]) -> None:
    saves = SaveClock()
    saves.saved(60.0)
    clock[0] += 600
    assert saves.due(epoch_end=False) and saves.due(epoch_end=True)
    saves.saved(60.0)
    assert not saves.due(epoch_end=False)


def test_an_automatic_save_waits_for_the_line_of_its_interval(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    publish = Checkpoints.publish
    monkeypatch.setattr(
        Checkpoints, "publish", lambda self, found: (saved.append(found.state.step), publish(self, found))[1]
    )
    monkeypatch.setattr(SaveClock, "due", lambda self, *, epoch_end: not epoch_end)
    assert train("--log-every", 10, "--output-dir", tmp_path, "--max-steps", 45).code == 0
    assert saved == [10, 20, 30, 40, 45]


def test_a_file_of_the_run_holds_its_old_content_or_all_of_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "summary.json"
    rundir.write_json(path, {"old": 1})

    def refuse(_: int) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(OSError, match="quota"):
            rundir.write_json(path, {"new": 1})
    assert jobs.read_json(path) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_save_that_fails_is_one_warning_an_attempt_and_the_run_ends_with_1_if_the_last_one_does(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    flags = ["--checkpoint-every", 10, "--output-dir", tmp_path]
    assert train(*flags, "--max-steps", 20).code == 0
    caplog.clear()
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        ended = train(*flags)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [f"step {step} " in text for step, text in zip((30, 40, 50, 52), warnings, strict=True)] == [True] * 4
    assert all("Read-only file system" in text and "step 20 is kept" in text for text in warnings)
    message = jobs.the_message([ended], 1)
    assert "step 52" in message and "Continue from step 20" in ended.err
    summary = jobs.read_json(tmp_path / "summary.json")
    assert (summary["stop_reason"], summary["exit_code"], summary["finished"]) == ("save_failed", 1, False)
    assert faults.last_step(tmp_path) == 52  # it has trained on
    assert train(*flags).code == 0
    assert jobs.read_json(tmp_path / "summary.json")["resumed_from"] == 20
