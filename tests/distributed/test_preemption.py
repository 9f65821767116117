"""Signals, the time limit and a dead launcher: one flag, the same answer on all ranks."""

from __future__ import annotations

import itertools
import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faults
import jobs
import pytest
import stop_checks
from conftest import STEPS

from ddp_mnist import trainer
from ddp_mnist.distributed import preemption
from ddp_mnist.distributed.launcher import command
from ddp_mnist.distributed.preemption import StopSignal
from ddp_mnist.step import TrainStep

Train = Callable[..., jobs.Ended]
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR2")
ALONE: Any = SimpleNamespace(size=1)


def send(name: str) -> None:
    os.kill(os.getpid(), signal.Signals[name])


@pytest.mark.parametrize("name", SIGNALS)
def test_the_first_signal_is_the_reason_and_changes_nothing_else(name: str) -> None:
    before = [signal.getsignal(signal.Signals[other]) for other in SIGNALS]
    with StopSignal() as stop:
        assert stop.agreed(ALONE, 0) is None
        send(name)
        for _ in range(3):
            send("SIGTERM")
        assert stop.agreed(ALONE, 1) == name
    assert [signal.getsignal(signal.Signals[other]) for other in SIGNALS] == before


def test_on_the_way_out_every_signal_is_ignored(process_of_a_job: None) -> None:
    with StopSignal(ignore_afterwards=True) as stop:
        pass
    for name in SIGNALS:
        send(name)
    assert stop.agreed(ALONE, 0) is None


def test_the_time_limit_counts_from_when_it_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [50.0]
    monkeypatch.setattr(preemption.time, "monotonic", lambda: now[0])
    stop, unlimited = StopSignal(), StopSignal()
    stop.limit(2)
    unlimited.limit(0)
    now[0] += 119
    assert stop.agreed(ALONE, 0) is None
    now[0] += 2
    assert stop.agreed(ALONE, 1) == "max_minutes"
    now[0] = 1e12
    assert unlimited.agreed(ALONE, 1) is None


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        *(({"WORLD_SIZE": "1"}, "launcher_died"), ({"ACCELERATE_MIXED_PRECISION": "no"}, "launcher_died")),
        ({}, None),  # nohup python -m ... & exit
    ],
)
def test_a_parent_that_is_gone_ends_the_run_only_if_it_was_a_launcher(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], reason: str | None
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    stop = StopSignal()
    assert stop.agreed(ALONE, 0) is None
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert stop.agreed(ALONE, 1) == reason


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.slow
def test_ctrl_c_twice_leaves_at_once_whatever_began_the_stop(first: str) -> None:
    script = f"""
import os, signal
from ddp_mnist.distributed.preemption import StopSignal
with StopSignal():
    for number in {{signal.{first}, signal.SIGINT}}:
        os.kill(os.getpid(), number)
    print("still here", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("unreachable", flush=True)
"""
    ended = jobs.run([sys.executable, "-c", script])
    assert (ended.code, ended.out) == (130, "still here\n")
    assert ended.err.count("Ctrl-C again") == 1


def test_ctrl_c_before_training_ends_a_command_without_a_traceback() -> None:
    @command
    def main() -> int:
        raise KeyboardInterrupt

    assert main() == 130


def test_ctrl_c_is_taken_also_where_it_has_ended_the_reader_of_stderr() -> None:
    # `... 2>&1 | tee log`: the terminal sends SIGINT to both.
    script = """
import os, signal
from ddp_mnist.distributed.preemption import StopSignal
from types import SimpleNamespace
reader, writer = os.pipe()
os.dup2(writer, 2)
os.close(reader)
with StopSignal() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    print(stop.agreed(SimpleNamespace(size=1), 0))
"""
    assert jobs.run([sys.executable, "-c", script]).out == "SIGINT\n"


def test_a_rank_among_others_leaves_together_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with StopSignal():  # Ctrl-C twice under torchrun: INT, then TERM
        for name in ("SIGINT", "SIGINT", "SIGTERM"):
            send(name)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of three ranks was told at every step."""
    folder = tmp_path_factory.mktemp("answers")
    program = (sys.executable, str(Path(stop_checks.__file__)))
    jobs.succeeded(jobs.run_ranks(3, str(folder), program=program))
    return [jobs.read_json(folder / f"rank-{rank}.json") for rank in range(3)]


@pytest.mark.slow
@pytest.mark.distributed
def test_all_ranks_get_the_same_answer_at_the_same_step(answers: list[dict[str, Any]]) -> None:
    assert answers[1] == answers[0] and answers[2] == answers[0]


@pytest.mark.slow
@pytest.mark.distributed
def test_one_rank_that_was_signalled_is_enough(answers: list[dict[str, Any]]) -> None:
    for case, reason, step in (("rank 2", "SIGUSR2", 77), ("at once", "SIGTERM", 0)):
        found = answers[0][case]
        assert found["reason"] == reason
        # Seen by the next question, read one interval later.
        later = [asked for asked in found["asked"] if asked >= step]
        assert len(later) == 1 and step < found["step"] <= step + 200
    assert answers[0]["never"]["reason"] is None
    assert answers[0]["two reasons"]["reason"] == "SIGTERM"


@pytest.mark.slow
@pytest.mark.distributed
def test_they_ask_about_every_100_ms_whatever_a_step_takes(answers: list[dict[str, Any]]) -> None:
    asked = answers[0]["never"]["asked"]
    intervals = [later - earlier for earlier, later in itertools.pairwise(asked)]
    assert intervals[:3] == [1, 1, 2]  # it grows from 1 by doubling: the first steps of a run are slow
    half = stop_checks.STEPS // 2
    for step, interval in zip(asked, intervals, strict=False):
        if 128 <= step < half - 102:
            assert interval == 102  # steps of 1 / 1024 s
        if step >= half + 150:
            assert interval == 3  # steps of 1 / 32 s
    assert max(intervals) == 102


@pytest.mark.parametrize("at", [0, 13, STEPS // 2 - 1])
@pytest.mark.parametrize("name", [SIGNALS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in SIGNALS[1:])])
def test_a_signal_ends_in_a_checkpoint_and_a_command_that_continues(
    train: Train, run_at: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, at: int
) -> None:
    call = TrainStep.__call__

    def signalled(self: TrainStep, batch: Any, rate: float) -> Any:
        if state["left"] == 0:
            send(name)
            send("SIGTERM")
        state["left"] -= 1
        return call(self, batch, rate)

    state = {"left": at}
    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", signalled)
        ended = train("--output-dir", run_dir)
    assert ended.code == 75
    assert f"stopped by {name} after step {at + 1} of {STEPS}" in ended.out
    summary = jobs.read_json(run_dir / "summary.json")
    found = [summary[key] for key in ("finished", "stop_reason", "exit_code", "steps", "resumed_from")]
    assert found == [False, name, 75, at + 1, None]
    assert faults.checkpoint_steps(run_dir)[-1] == at + 1
    assert not (run_dir / "model.safetensors").exists()
    command = shlex.split(faults.printed_command(ended.out))
    assert command[:3] == ["python", "-m", "ddp_mnist.train"] and str(run_dir) in command
    assert train(*command[3:]).code == 0
    faults.assert_same_result(run_dir, run_at(1))


def test_a_run_of_limited_minutes_stops_with_75_and_goes_on(
    train: Train, run_at: Callable[[int], Path], tmp_path: Path
) -> None:
    ended = train("--max-minutes", 1e-6, "--output-dir", tmp_path)
    assert ended.code == 75
    assert "stopped by max_minutes after step 0" in ended.out
    assert "--max-minutes 1e-06" in faults.printed_command(ended.out)  # the next attempt has a limit, too
    assert faults.checkpoint_steps(tmp_path) == [0]
    assert jobs.read_json(tmp_path / "summary.json")["stop_reason"] == "max_minutes"
    assert train("--output-dir", tmp_path).code == 0
    faults.assert_same_result(tmp_path, run_at(1))


def test_a_stop_right_after_a_resume_keeps_the_checkpoint_it_came_from(train: Train, tmp_path: Path) -> None:
    assert train("--max-steps", 5, "--output-dir", tmp_path).code == 0
    (path,) = tmp_path.glob("checkpoints/step-*")
    before = (path.stat().st_ino, faults.train_losses(tmp_path))
    assert train("--max-minutes", 1e-6, "--output-dir", tmp_path).code == 75
    assert (path.stat().st_ino, faults.train_losses(tmp_path)) == before


def test_fit_puts_back_the_handlers_it_found(flags: list[str], tmp_path: Path, process_of_a_job: None) -> None:
    from ddp_mnist.config import parse

    before = [signal.getsignal(signal.Signals[name]) for name in SIGNALS]
    trainer.fit(parse([*flags, "--max-steps", "2", "--output-dir", str(tmp_path)]))
    assert [signal.getsignal(signal.Signals[name]) for name in SIGNALS] == before
