"""Real processes that are killed, stopped or run out of disk: the run ends as one that nothing happened to."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import faults
import jobs
import psutil
import pytest
from conftest import STEPS
from faults import Job

from ddp_mnist.storage import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

ENDLESS = ["--epochs", "100000"]


def is_saving(run_dir: Path) -> bool:
    return any((run_dir / "checkpoints").glob(".tmp-step-*"))


def kill(job: Job, run_dir: Path, way: str, seconds: float, victim: int) -> bool:
    """Send kill -9 in a save or after so many seconds, to all ranks or to one. Return False if the job ended first."""
    before = faults.last_step(run_dir)
    if way == "save":
        while job.running() and not is_saving(run_dir):  # a save takes some milliseconds
            pass
    elif way == "one rank":  # in training
        faults.wait_for(lambda: faults.last_step(run_dir) != before or not job.running(), "a step", job)
    else:
        time.sleep(seconds)
    if not job.running():
        return False
    if way == "one rank":
        job.signal(signal.SIGKILL, victim)
        job.wait()  # the others notice
    else:
        job.signal(signal.SIGKILL)
        job.kill()
    return True


def assert_checkpoints_are_whole(run_dir: Path) -> None:
    for path in (run_dir / "checkpoints").glob("step-*"):
        checkpoint.read_checkpoint(path)


@pytest.mark.timeout(3600)  # with --kills 100
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_that_is_killed_at_random_moments_ends_with_the_bytes_of_one_that_was_not(
    request: pytest.FixtureRequest, flags: list[str], tmp_path: Path, world_size: int
) -> None:
    """`--kills N` sets how many there are in all."""
    flags = [*flags, "--epochs", "10", "--checkpoint-every", "25", "--log-every", "20", "--output-dir"]
    expected, run_dir = tmp_path / "expected", tmp_path / "run-0"
    began = time.monotonic()
    jobs.succeeded(jobs.run_ranks(world_size, *flags, str(expected)))
    duration = time.monotonic() - began
    total = request.config.getoption("--kills")
    wanted = total // 2 + (world_size <= total % 2)
    ways = ("save", "moment", "one rank" if world_size > 1 else "moment")
    chance, kills, attempts = random.Random(world_size), 0, 0
    while kills < wanted:
        attempts += 1
        way, seconds = ways[(kills + world_size - 1) % 3], chance.uniform(0, 0.9 * duration)
        with faults.start(world_size, *flags, run_dir) as job:
            hit = kill(job, run_dir, way, seconds, chance.randrange(world_size))
            if hit:
                kills += 1
                assert not job.left()
                assert_checkpoints_are_whole(run_dir)
            else:  # too late: one more run is needed for the rest
                jobs.succeeded(job.wait())
                faults.assert_same_result(run_dir, expected)
                run_dir = tmp_path / f"run-{attempts}"
    jobs.succeeded(jobs.run_ranks(world_size, *flags, str(run_dir)))
    faults.assert_same_result(run_dir, expected)
    found, whole = (jobs.read_json(path / "summary.json") for path in (run_dir, expected))
    assert found["finished"] and found["samples_seen"] == whole["samples_seen"]
    assert not is_saving(run_dir)


def test_a_run_may_change_its_number_of_ranks(
    flags: list[str], train: Callable[..., jobs.Ended], run_at: Callable[[int], Path], tmp_path: Path
) -> None:
    assert train("--max-steps", 11, "--output-dir", tmp_path).code == 0
    jobs.succeeded(jobs.run_ranks(3, *flags, "--max-steps", "23", "--output-dir", str(tmp_path)))
    assert jobs.read_json(tmp_path / "summary.json")["world_size"] == 3
    assert train("--output-dir", tmp_path).code == 0
    found, whole = jobs.read_metrics(tmp_path), jobs.read_metrics(run_at(1))
    assert [line["step"] for line in found] == [line["step"] for line in whole] == list(range(1, STEPS + 1))
    for ours, theirs in zip(found, whole, strict=True):  # another global batch would be off by 1e-2
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], abs=1e-4), ours["step"]
    ours, theirs = (jobs.read_json(path / "summary.json") for path in (tmp_path, run_at(1)))
    assert ours["samples_seen"] == theirs["samples_seen"]
    assert ours["test_accuracy"] == pytest.approx(theirs["test_accuracy"], abs=0.002)


@pytest.mark.parametrize("lost", [0, 1])
def test_the_other_ranks_of_one_that_was_killed_say_so_and_end(flags: list[str], tmp_path: Path, lost: int) -> None:
    arguments = [*flags, *ENDLESS, "--checkpoint-every", 20, "--output-dir", tmp_path]
    with faults.start(2, *arguments) as job:
        faults.wait_until_step(job, tmp_path, 45)
        job.signal(signal.SIGKILL, lost)
        ended = job.wait()
    assert [process.code for process in ended] == ([-9, 1] if lost == 0 else [1, -9])
    printed = ended[1 - lost].err
    assert printed.count(f"error: rank {1 - lost} on ") == 1 and "lost contact with another rank" in printed
    assert "Traceback" not in printed
    assert f"Continue from step {faults.checkpoint_steps(tmp_path)[-1]} with" in printed
    assert str(tmp_path) in faults.printed_command(printed)
    if lost == 1:
        summary = jobs.read_json(tmp_path / "summary.json")
        assert (summary["stop_reason"], summary["exit_code"], summary["finished"]) == ("lost_rank", 1, False)
    else:  # nobody is left who may write
        assert not (tmp_path / "summary.json").exists()


def test_a_rank_that_does_not_answer_is_given_up(flags: list[str], tmp_path: Path) -> None:
    flags = [*flags, *ENDLESS, "--timeout-minutes", "0.1", "--checkpoint-every", "20", "--output-dir", str(tmp_path)]
    with faults.start(2, *flags) as job:
        faults.wait_until_step(job, tmp_path, 25)
        job.signal(signal.SIGSTOP, 1)
        faults.wait_for(lambda: job.processes[0].poll() is not None, "the end of rank 0", job)
        assert job.processes[0].returncode == 1
        assert "did not answer within --timeout-minutes" in job.errors(0) and "Traceback" not in job.errors(0)
        summary = jobs.read_json(tmp_path / "summary.json")
        assert (summary["stop_reason"], summary["exit_code"]) == ("lost_rank", 1)
        job.signal(signal.SIGCONT, 1)  # it finds itself alone
        assert job.wait()[1].code == 1
        assert "lost contact" in job.errors(1)


def test_a_run_directory_is_held_by_one_job_until_it_dies(
    flags: list[str], train: Callable[..., jobs.Ended], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = tmp_path / "run"
    endless = [*flags, *ENDLESS, "--output-dir", str(run_dir)]
    with faults.start(1, *endless) as holder:
        faults.wait_until_step(holder, run_dir, 30)
        # A job waits for half of what its ranks wait for each other, a minute at most.
        message = jobs.the_message([train(*endless, "--max-steps", 1, "--timeout-minutes", 0.05)], 1)
        assert str(run_dir) in message and "held by another job that is still running" in message
        assert "waiting up to 2 s" in caplog.text
        assert holder.running() and not (run_dir / "summary.json").exists()
        with faults.start(1, *endless) as waiting:
            faults.wait_for(lambda: "waiting up to 60 s" in waiting.errors(), "the wait", waiting)
            assert waiting.output() == ""
            holder.kill()  # a dead job holds nothing
            faults.wait_for(lambda: "resumed at step" in waiting.output(), "the start", waiting)


def test_training_goes_on_while_the_disk_is_full_and_no_line_is_lost(flags: list[str], tmp_path: Path) -> None:
    flags = [*flags, *ENDLESS, "--checkpoint-every", "10", "--log-every", "5", "--output-dir", str(tmp_path)]
    with faults.start(1, *flags) as job:
        faults.wait_for(lambda: faults.checkpoint_steps(tmp_path)[1:], "two checkpoints", job)
        process = psutil.Process(job.pids[0])
        # The size that a file may have: metrics.jsonl gets half a line, and a checkpoint's files are larger.
        process.rlimit(psutil.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size + 50, psutil.RLIM_INFINITY))
        for words in ("could not be saved", "kept in memory"):
            faults.wait_for(lambda words=words: job.errors().count(words) >= 3, f"three warnings: {words}", job)
        kept = faults.checkpoint_steps(tmp_path)
        process.rlimit(psutil.RLIMIT_FSIZE, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))
        faults.wait_for(lambda: faults.checkpoint_steps(tmp_path)[0] > kept[-1], "two more checkpoints", job)
        job.signal(signal.SIGTERM)
        (ended,) = job.wait()
    assert ended.code == 75
    warnings = [line for line in ended.err.splitlines() if "could not be saved" in line]
    assert all("File too large" in line and f"The one of step {kept[-1]} is kept." in line for line in warnings)
    assert_checkpoints_are_whole(tmp_path)
    assert not is_saving(tmp_path)
    steps = [line["step"] for line in jobs.read_metrics(tmp_path)]
    epochs = range(STEPS // 2, steps[-1] + 1, STEPS // 2)
    assert steps == sorted({*range(5, steps[-1] + 1, 5), *epochs})
