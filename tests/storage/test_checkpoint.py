"""The files of a checkpoint: published whole or not at all, and never in place of the last good one."""

from __future__ import annotations

import errno
import os
import pickle
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faults
import jobs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddp_mnist.step import TrainStep
from ddp_mnist.storage import directory
from ddp_mnist.storage.checkpoint import MANIFEST, MODEL, OPTIMIZER, STATE, Checkpoints, Snapshot, TrainState

Train = Callable[..., jobs.Ended]
FILES = (MODEL, OPTIMIZER, STATE, MANIFEST)


def snapshot(step: int) -> Snapshot:
    return Snapshot(
        state=TrainState(epoch=1, step_in_epoch=3, step=step, samples_seen=60 * step, train_seconds=1 / 3),
        config={"widths": [8, 16]},
        weights={"weight": torch.arange(9.0) + step, "count": torch.tensor(step)},
        optimizer={"weight.step": torch.tensor(float(step)), "weight.exp_avg": torch.arange(9) / 7},
        optimizer_values={"weight": {"number": 0.1}, "groups": [{"params": []}]},
        scaler={"scale": 2.0**15 / 3},
        metrics_bytes=12,
    )


def publish(run_dir: Path, *steps: int, keep: int = 2) -> Checkpoints:
    store = Checkpoints(run_dir, keep=keep)
    for step in steps:
        store.publish(snapshot(step))
    return store


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def refuse(number: int) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_checkpoint_comes_back_as_it_was_and_nothing_is_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (pickle, torch):
        monkeypatch.setattr(module, "load", refuse(errno.EPERM))
    monkeypatch.setattr(pickle, "loads", refuse(errno.EPERM))
    saved, back = snapshot(7), publish(tmp_path, 7).newest()
    assert {each.name for each in (tmp_path / "checkpoints" / "step-00000007").iterdir()} == set(FILES)
    for name, expected in vars(saved).items():
        torch.testing.assert_close(getattr(back, name), expected, rtol=0, atol=0)


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_save_that_fails_leaves_all_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    store = publish(tmp_path, 1, 2)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse(errno.ENOSPC))
        with pytest.raises(OSError, match="No space left"):
            store.publish(snapshot(3))
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    publish(tmp_path, 3)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def test_everything_is_on_the_disk_before_its_name_and_old_ones_go_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut at any moment then leaves the old name or the whole new one."""
    store = publish(tmp_path, 1, 2)
    calls: list[tuple[str, str, list[str]]] = []
    fsync, rename = os.fsync, os.rename

    def note_fsync(descriptor: int) -> None:
        calls.append(("fsync", Path(f"/proc/self/fd/{descriptor}").readlink().name, names(tmp_path)))
        fsync(descriptor)

    def note_rename(source: Path, target: Path) -> None:
        calls.append(("rename", Path(target).name, names(tmp_path)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", note_rename)
    store.publish(snapshot(3))
    order = [(what, name if not name.startswith(".tmp-") else "temporary") for what, name, _ in calls]
    assert set(order[:4]) == {("fsync", name) for name in FILES}
    assert order[4:7] == [("fsync", "temporary"), ("rename", "step-00000003"), ("fsync", "checkpoints")]
    assert order[7:] == [("rename", "temporary")], "an old one is no checkpoint any more before a file of it is gone"
    assert all({"step-00000001", "step-00000002"} <= set(there) for *_, there in calls[:7])
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def test_what_is_damaged_again_and_again_is_all_kept(tmp_path: Path) -> None:
    for content in "abc":
        store = publish(tmp_path, 7)
        (store.path(7) / MANIFEST).write_text(content)
        assert store.newest() is None
    kept = ["damaged-step-00000007", "damaged-step-00000007-2", "damaged-step-00000007-3"]
    assert names(tmp_path) == kept
    assert [(tmp_path / "checkpoints" / name / MANIFEST).read_text() for name in kept] == ["a", "b", "c"]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("run")
    publish(run_dir, 1, 2)
    return run_dir


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(FILES),
    position=st.integers(0, 10_000),
    change=st.integers(1, 255),
    length=st.integers(0, 10_000) | st.none(),
)
def test_whatever_happens_to_a_files_bytes_a_checkpoint_is_right_or_not_used(
    published: Path, name: str, position: int, change: int, length: int | None
) -> None:
    store = Checkpoints(published, keep=2)
    newest = published / "checkpoints" / "step-00000002"
    good = (newest / name).read_bytes()
    bad = bytearray(good)
    bad[position % len(good)] ^= change
    (newest / name).write_bytes(bytes(bad)[:length])
    found = store.newest()
    assert found is not None
    # A manifest may be written in another way and say the same.
    assert found.state.step == 1 or name == MANIFEST
    assert torch.equal(found.weights["weight"], torch.arange(9.0) + found.state.step)
    for aside in published.glob("checkpoints/damaged-*"):
        aside.rename(newest)
    (newest / name).write_bytes(good)


def test_a_file_system_that_cannot_sync_directories_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def only_files(descriptor: int) -> None:
        (refuse(errno.EINVAL) if stat.S_ISDIR(os.fstat(descriptor).st_mode) else fsync)(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    assert publish(tmp_path, 7).newest() is not None


def test_a_file_of_the_run_holds_its_old_content_or_all_of_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "summary.json"
    directory.write_json(path, {"old": 1})
    monkeypatch.setattr(os, "fsync", refuse(errno.EDQUOT))
    with pytest.raises(OSError, match="quota"):
        directory.write_json(path, {"new": 1})
    assert jobs.read_json(path) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_a_run_keeps_as_many_as_it_was_told(train: Train, tmp_path: Path) -> None:
    flags = ["--checkpoint-every", 10, "--output-dir", tmp_path, "--keep-checkpoints"]
    for keep, more, kept in ((4, ["--max-steps", 45], [20, 30, 40, 45]), (2, [], [50, 52])):
        assert train(*flags, keep, *more).code == 0
        assert faults.checkpoint_steps(tmp_path) == kept


@pytest.mark.parametrize(
    ("step_seconds", "save_seconds", "expected"),  # of epochs of 26 steps, with a line every 10
    [
        pytest.param(1, 0.1, [26, 52, 78], id="after an epoch"),
        pytest.param(1, 30, [26, 78], id="not where a save takes more than 1 % of the time"),
        pytest.param(45, 30, [20, 40, 60, 78], id="after 10 minutes, with a line"),
    ],
)
@pytest.mark.slow
def test_checkpoints_are_saved_automatically(
    train: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step_seconds: float,
    save_seconds: float,
    expected: Any,
) -> None:
    now = [1000.0]

    def takes(seconds: float, function: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*arguments: Any) -> Any:
            now[0] += seconds
            return function(*arguments)

        return slow

    for clock in ("monotonic", "perf_counter"):
        monkeypatch.setattr(time, clock, lambda: now[0])
    monkeypatch.setattr(TrainStep, "__call__", takes(step_seconds, TrainStep.__call__))
    monkeypatch.setattr(Checkpoints, "publish", takes(save_seconds, Checkpoints.publish))
    flags = ["--epochs", 3, "--log-every", 10, "--keep-checkpoints", 9, "--output-dir", tmp_path]
    assert train(*flags).code == 0
    assert faults.checkpoint_steps(tmp_path) == expected


@pytest.mark.slow
def test_a_save_that_fails_is_one_warning_an_attempt_and_the_run_ends_with_1_if_the_last_one_does(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    flags = ["--checkpoint-every", 10, "--output-dir", tmp_path]
    assert train(*flags, "--max-steps", 20).code == 0
    caplog.clear()
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse(errno.EROFS))
        ended = train(*flags)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [f"step {step} " in text for step, text in zip((30, 40, 50), warnings, strict=True)] == [True] * 3
    assert all("Read-only file system" in text and "step 20 is kept" in text for text in warnings)
    message = jobs.the_message([ended], 1)
    assert "step 52" in message and "Continue from step 20 with" in ended.err
    summary = jobs.read_json(tmp_path / "summary.json")
    assert (summary["stop_reason"], summary["exit_code"], summary["finished"]) == ("save_failed", 1, False)
    assert faults.last_step(tmp_path) == 52  # it has trained on
    assert train(*flags).code == 0
    assert jobs.read_json(tmp_path / "summary.json")["resumed_from"] == 20
