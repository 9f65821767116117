"""Signals, the time limit and a dead launcher, on one rank in this process; several ranks: test_distributed.py."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faults
import jobs
import psutil
import pytest
from conftest import STEPS

from ddp_mnist import fit
from ddp_mnist.config import parse
from ddp_mnist.distributed.launcher import entry_point
from ddp_mnist.distributed.preemption import SIGNALS, StopSignal
from ddp_mnist.step import TrainStep

Train = Callable[..., jobs.Ended]
ALONE: Any = SimpleNamespace(world_size=1)


def send(*names: str) -> None:
    for name in names:
        os.kill(os.getpid(), signal.Signals[name])


def handlers() -> list[Any]:
    return [signal.getsignal(signal.Signals[name]) for name in SIGNALS]


@pytest.mark.parametrize("name", SIGNALS)
def test_the_first_signal_is_the_reason_and_changes_nothing_else(name: str) -> None:
    before = handlers()
    with StopSignal() as stop:
        assert stop.agreed(ALONE, 0) is None
        send(name, "SIGTERM", "SIGTERM")
        assert stop.agreed(ALONE, 1) == name
    assert handlers() == before


def test_on_the_way_out_every_signal_is_ignored(process_of_a_job: None) -> None:
    with StopSignal(ignore_afterwards=True) as stop:
        pass
    send(*SIGNALS)
    assert stop.agreed(ALONE, 0) is None


def test_the_time_limit_counts_from_when_it_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [50.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    limited, unlimited = StopSignal(), StopSignal()
    limited.limit(2)
    unlimited.limit(0)
    for seconds, reason in ((119, None), (2, "max_minutes"), (1e12, "max_minutes")):
        now[0] += seconds
        assert limited.agreed(ALONE, 0) == reason
        assert unlimited.agreed(ALONE, 0) is None


def test_the_time_limit_counts_from_torchruns_start_where_it_has_restarted_the_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    age = (time.time() - psutil.Process(os.getppid()).create_time()) / 60  # of what has started this process, minutes
    for restarts, reason in (("0", None), ("1", "max_minutes")):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        stop = StopSignal()
        stop.limit(age / 2)
        assert stop.agreed(ALONE, 0) == reason


@pytest.mark.parametrize("variables", [{}, {"RANK": "0", "WORLD_SIZE": "1"}], ids=["none", "set by hand"])
def test_a_shell_that_is_gone_is_no_reason_to_stop(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    """`nohup python -m ... & exit`; for launchers that are gone, see test_stop.py."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    stop = StopSignal()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert stop.agreed(ALONE, 0) is None


def test_nohup_is_respected(process_of_a_job: None) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignal() as stop:
        send("SIGHUP")
        assert stop.agreed(ALONE, 0) is None
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


CTRL_C_TWICE = """
import os, signal
from ddp_mnist.distributed.preemption import SIGNALS, StopSignal
if {gone}:
    reader, writer = os.pipe()
    os.dup2(writer, 2)
    os.close(reader)
with StopSignal():
    os.kill(os.getpid(), signal.{first})
    if signal.{first} != signal.SIGINT:
        os.kill(os.getpid(), signal.SIGINT)
    print("still here", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("unreachable", flush=True)
"""


# `... 2>&1 | tee log`: the terminal sends SIGINT to the reader of stderr, too.
@pytest.mark.parametrize(
    ("first", "gone"), [("SIGTERM", False), ("SIGINT", False), ("SIGUSR2", False), ("SIGINT", True)]
)
def test_ctrl_c_twice_leaves_at_once_whatever_began_the_stop(first: str, gone: bool) -> None:
    ended = jobs.run([sys.executable, "-c", CTRL_C_TWICE.format(first=first, gone=gone)])
    assert (ended.code, ended.out) == (130, "still here\n")
    assert ended.err.count("Ctrl-C again leaves at once, without saving") == (0 if gone else 1)


def test_ctrl_c_before_training_ends_a_command_without_a_traceback() -> None:
    @entry_point
    def main() -> int:
        raise KeyboardInterrupt

    assert main() == 130


def test_a_rank_among_others_leaves_together_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with StopSignal():
        send("SIGINT", "SIGINT", "SIGTERM")  # Ctrl-C twice under torchrun


# The first step of a run, one in the middle of an epoch, and an epoch's last.
@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("SIGTERM", 1),
        pytest.param("SIGINT", 14, marks=pytest.mark.slow),
        pytest.param("SIGUSR2", STEPS // 2, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_in_a_checkpoint_and_a_command_that_continues(
    train: Train, run_at: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, step: int
) -> None:
    call, calls = TrainStep.__call__, []

    def signalled(self: TrainStep, batch: Any, rate: float) -> Any:
        calls.append(rate)
        if len(calls) == step:
            send(name, "SIGTERM")
        return call(self, batch, rate)

    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", signalled)
        ended = train("--output-dir", run_dir)
    assert ended.code == 75
    assert f"stopped by {name} after step {step} of {STEPS}" in ended.out
    summary = jobs.read_json(run_dir / "summary.json")
    found = [summary[key] for key in ("finished", "stop_reason", "exit_code", "steps", "resumed_from")]
    assert found == [False, name, 75, step, None]
    assert faults.checkpoint_steps(run_dir)[-1] == step
    assert not (run_dir / "model.safetensors").exists()
    command = shlex.split(faults.printed_command(ended.out))
    assert command[:3] == ["python", "-m", "ddp_mnist.train"] and str(run_dir) in command
    assert train(*command[3:]).code == 0
    faults.assert_same_result(run_dir, run_at(1))


def test_a_run_of_limited_minutes_stops_with_75_and_goes_on(
    train: Train, run_at: Callable[[int], Path], tmp_path: Path
) -> None:
    limited = ["--max-minutes", 1e-6, "--output-dir", tmp_path]
    ended = train(*limited)
    assert ended.code == 75
    assert "stopped by max_minutes after step 0" in ended.out
    assert "--max-minutes 1e-06" in faults.printed_command(ended.out)  # the next attempt has a limit, too
    assert jobs.read_json(tmp_path / "summary.json")["stop_reason"] == "max_minutes"
    # A stop right after a resume keeps the checkpoint it came from.
    (path,) = tmp_path.glob("checkpoints/step-00000000")
    before = path.stat().st_ino
    assert train(*limited).code == 75
    assert path.stat().st_ino == before and faults.checkpoint_steps(tmp_path) == [0]
    assert train("--output-dir", tmp_path).code == 0
    faults.assert_same_result(tmp_path, run_at(1))


def test_fit_in_a_thread_trains_without_handlers(
    flags: list[str], tmp_path: Path, process_of_a_job: None, caplog: pytest.LogCaptureFixture
) -> None:
    codes: list[int] = []
    config = parse([*flags, "--max-steps", "2", "--output-dir", str(tmp_path)])
    thread = threading.Thread(target=lambda: codes.append(fit(config).exit_code))
    thread.start()
    thread.join()
    assert codes == [0]
    assert len([record for record in caplog.records if "started in a thread" in record.getMessage()]) == 1


def test_fit_puts_back_the_handlers_it_found(flags: list[str], tmp_path: Path, process_of_a_job: None) -> None:
    before = handlers()
    fit(parse([*flags, "--max-steps", "2", "--output-dir", str(tmp_path)]))
    assert handlers() == before
