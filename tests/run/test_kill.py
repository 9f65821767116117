"""kill -9, real processes: whatever is killed, whenever, the run ends with the bytes of one that was not.

`--kills N` sets how many random kills there are in all. They hit the real MNIST where DDP_MNIST_DATA says it is,
else a few generated digits.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import faults
import jobs
import psutil
import pytest
from conftest import STEPS, write_digits
from faults import Job

from ddp_mnist.run import checkpoint
from ddp_mnist.run import directory as rundir

pytestmark = pytest.mark.slow

RUNS = (1, 2, 1, 2, 1)  # ranks of each
SAVE_EVERY = 50


@pytest.fixture(scope="session")
def kill_flags(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of a few seconds that saves every 50 steps."""
    flags = [
        "--wandb",
        "disabled",
        "--no-pictures",
        "--threads",
        "1",
        "--checkpoint-every",
        str(SAVE_EVERY),
        "--log-every",
        "20",
    ]
    if Path(os.environ.get("DDP_MNIST_DATA", "."), "MNIST", "raw").is_dir():
        root = request.getfixturevalue("mnist")
        return [*flags, "--dataset", "mnist", "--data-dir", str(root), "--epochs", "1"]
    root = tmp_path_factory.mktemp("digits")
    write_digits(root, 6437, 1000)  # 101 steps an epoch, the last of them uneven
    return [*flags, "--dataset", "fashion-mnist", "--data-dir", str(root), "--epochs", "4"]


@pytest.fixture(scope="session")
def unhurt(kill_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], tuple[Path, float]]:
    """The run that is not killed, and the seconds it took, by its number of ranks."""
    done: dict[int, tuple[Path, float]] = {}

    def run(world_size: int) -> tuple[Path, float]:
        if world_size not in done:
            path = tmp_path_factory.mktemp("unhurt") / "run"
            began = time.monotonic()
            jobs.succeeded(jobs.run_ranks(world_size, *kill_flags, "--output-dir", str(path)))
            done[world_size] = path, time.monotonic() - began
        return done[world_size]

    return run


def kill_in_a_save(job: Job, run_dir: Path) -> bool:
    """kill -9 for all ranks while a checkpoint is half written. False: the job has ended, no save was caught."""
    rank_0 = psutil.Process(job.pids[0])
    while job.running():
        if not faults.unfinished_saves(run_dir):
            continue
        with suppress(psutil.Error):
            rank_0.suspend()
            if faults.unfinished_saves(run_dir):  # and it will stay so
                job.kill()
                assert faults.unfinished_saves(run_dir)
                return True
            rank_0.resume()
    return False


def kill_at_a_moment(job: Job, seconds: float) -> bool:
    """kill -9 for all ranks that long after their start. False: they have ended before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and job.running():
        time.sleep(0.002)
    running = job.running()
    job.kill()
    return running


def kill_one_rank(job: Job, run_dir: Path, rank: int, seconds: float) -> bool:
    """kill -9 for one rank in training; the others notice and leave. False: the job has ended before."""
    before = faults.last_step(run_dir)
    with suppress(AssertionError):  # it may end first
        faults.wait_for(lambda: faults.last_step(run_dir) != before or not job.running(), "a step", job)
    time.sleep(seconds)
    if job.processes[rank].poll() is not None:
        job.wait(60)
        return False
    job.signal(signal.SIGKILL, rank)
    job.wait(60)
    return True


def assert_checkpoints_are_whole(run_dir: Path) -> None:
    for path in (run_dir / "checkpoints").glob("step-*"):
        checkpoint.read(path)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("number", range(len(RUNS)))
@pytest.mark.distributed
def test_a_run_that_is_killed_at_random_moments_ends_with_the_bytes_of_one_that_was_not(
    request: pytest.FixtureRequest,
    kill_flags: list[str],
    unhurt: Callable[[int], tuple[Path, float]],
    tmp_path: Path,
    number: int,
) -> None:
    world_size = RUNS[number]
    expected, duration = unhurt(world_size)
    total = request.config.getoption("--kills")
    wanted = total // len(RUNS) + (number < total % len(RUNS))
    chance = random.Random(number)
    kills, attempts, caught = 0, 0, 0
    run_dir = tmp_path / "run-0"
    while kills < wanted:
        way = ("save", "moment", "rank")[attempts % (2 + (world_size > 1))]
        attempts += 1
        with faults.start(world_size, *kill_flags, "--output-dir", run_dir) as job:
            if way == "save":
                hit = kill_in_a_save(job, run_dir)
                caught += hit
            elif way == "moment":
                hit = kill_at_a_moment(job, chance.uniform(0, duration))
            else:
                hit = kill_one_rank(job, run_dir, chance.randrange(world_size), chance.uniform(0, 1))
            assert not job.left()
            if hit:
                kills += 1
                if (run_dir / "checkpoints").is_dir():
                    assert_checkpoints_are_whole(run_dir)
            else:  # too late: one more run is needed for the rest
                jobs.succeeded(job.wait())
                faults.assert_same_result(run_dir, expected)
                run_dir = tmp_path / f"run-{attempts}"
    assert caught or not wanted
    jobs.succeeded(jobs.run_ranks(world_size, *kill_flags, "--output-dir", str(run_dir)))
    faults.assert_same_result(run_dir, expected)
    summary = jobs.read_json(run_dir / "summary.json")
    assert summary["finished"] and summary["samples_seen"] == jobs.read_json(expected / "summary.json")["samples_seen"]
    assert not faults.unfinished_saves(run_dir)
    print(f"{kills} kills of {world_size} ranks, {caught} in a save: equal")


@pytest.mark.distributed
def test_three_ranks_continue_with_the_same_bytes(
    flags: list[str], run_at: Callable[[int], Path], tmp_path: Path
) -> None:
    # From three ranks on the order in which gradients are summed is gloo's to choose.
    flags = [*flags, "--checkpoint-every", "9", "--output-dir", str(tmp_path)]
    with faults.start(3, *flags) as job:
        faults.wait_for(lambda: faults.checkpoint_steps(tmp_path)[1:], "two checkpoints", job)
        job.kill()
    jobs.succeeded(jobs.run_ranks(3, *flags))
    faults.assert_same_result(tmp_path, run_at(3))
    assert jobs.read_json(tmp_path / "summary.json")["resumed_from"] in range(18, STEPS + 1)


@pytest.mark.distributed
def test_a_run_may_change_its_number_of_ranks_three_times(
    flags: list[str], run_at: Callable[[int], Path], tmp_path: Path
) -> None:
    for world_size, until in ((2, 11), (1, 23), (4, 35), (2, 0)):
        ended = jobs.run_ranks(world_size, *flags, "--max-steps", str(until), "--output-dir", str(tmp_path))
        jobs.succeeded(ended)
        assert jobs.read_json(tmp_path / "summary.json")["world_size"] == world_size
    found, whole = jobs.read_metrics(tmp_path), jobs.read_metrics(run_at(2))
    assert [line["step"] for line in found] == [line["step"] for line in whole] == list(range(1, STEPS + 1))
    for ours, theirs in zip(found, whole, strict=True):  # another global batch would be off by 1e-2
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], abs=1e-4), ours["step"]
    ours, theirs = (jobs.read_json(path / "summary.json") for path in (tmp_path, run_at(2)))
    assert ours["samples_seen"] == theirs["samples_seen"]
    assert ours["test_accuracy"] == pytest.approx(theirs["test_accuracy"], abs=0.002)


ENDLESS = ["--epochs", "100000"]


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.distributed
def test_the_other_ranks_of_one_that_was_killed_say_so_and_end(flags: list[str], tmp_path: Path, lost: int) -> None:
    arguments = [*flags, *ENDLESS, "--checkpoint-every", 20, "--output-dir", tmp_path]
    with faults.start(2, *arguments) as job:
        faults.wait_until_step(job, tmp_path, 45)
        job.signal(signal.SIGKILL, lost)
        ended = job.wait(60)
    assert [process.code for process in ended] == ([-9, 1] if lost == 0 else [1, -9])
    told = ended[1 - lost].err
    assert told.count(f"error: rank {1 - lost} on ") == 1 and "lost contact with another rank" in told
    assert "Traceback" not in told
    command = faults.printed_command(told)
    assert f"Continue from step {faults.checkpoint_steps(tmp_path)[-1]} with" in told
    assert str(tmp_path) in command
    if lost == 1:
        summary = jobs.read_json(tmp_path / "summary.json")
        assert (summary["stop_reason"], summary["exit_code"], summary["finished"]) == ("lost_rank", 1, False)
    else:  # nobody is left who may write
        assert not (tmp_path / "summary.json").exists()


@pytest.mark.distributed
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
        assert job.wait(60)[1].code == 1
        assert "lost contact" in job.errors(1)


@pytest.mark.distributed
def test_a_rank_that_is_killed_while_the_job_is_built_is_missed_too(flags: list[str], tmp_path: Path) -> None:
    # Rank 0 waits for the directory, which another job holds, and rank 1 for rank 0.
    holder = rundir.lock(tmp_path)
    assert holder is not None
    with holder, faults.start(2, *flags, "--output-dir", tmp_path) as job:
        faults.wait_for(lambda: "is held by another job" in job.errors(0), "the wait", job)
        job.signal(signal.SIGKILL, 0)
        ended = job.wait(60)
    assert ended[1].code == 1
    # Rank 1 may still be saying hello to rank 0 when that one dies.
    told = ("lost contact with another rank", "could not be brought together")
    assert any(words in ended[1].err for words in told) and "Traceback" not in ended[1].err


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
            holder.signal(signal.SIGKILL)  # a dead job holds nothing
            faults.wait_for(lambda: "resumed at step" in waiting.output(), "the start", waiting)


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_training_goes_on_when_nothing_can_be_saved(
    flags: list[str], train: Callable[..., jobs.Ended], tmp_path: Path, how: str
) -> None:
    """A disk that fills up, or a folder that may no longer be written, under a running job; then all is well again."""
    run_dir, folder = tmp_path / "run", tmp_path / "run" / "checkpoints"
    endless = [*flags, *ENDLESS, "--checkpoint-every", "10", "--log-every", "100", "--output-dir", str(run_dir)]
    with faults.start(1, *endless, powerless=True) as job:
        faults.wait_for(lambda: faults.checkpoint_steps(run_dir)[1:], "two checkpoints", job)
        if how == "full":
            psutil.Process(job.pids[0]).rlimit(psutil.RLIMIT_FSIZE, (60_000, psutil.RLIM_INFINITY))
        else:
            folder.chmod(0o555)
        faults.wait_for(lambda: job.errors().count("could not be saved") >= 3, "three warnings", job)
        kept = faults.checkpoint_steps(run_dir)
        step = faults.last_step(run_dir)
        faults.wait_for(lambda: faults.last_step(run_dir) >= step + 200, "training to go on", job)
        job.signal(signal.SIGTERM)
        (ended,) = job.wait()
    folder.chmod(0o755)
    reason = "File too large" if how == "full" else "Permission denied"
    warnings = [line for line in ended.err.splitlines() if line.startswith("warning: ")]
    assert all(reason in line and f"The one of step {kept[-1]} is kept." in line for line in warnings), warnings
    failed = [int(line.split("of step ")[1].split()[0]) for line in warnings]
    *due, last = failed  # the last one is the stop's own, which tries again where a save that was due has just failed
    assert due == [*range(kept[-1] + 10, due[-1] + 1, 10)] and due[-1] <= last <= due[-1] + 10
    assert jobs.the_message([ended], 1).startswith(f"error: the checkpoint of step {failed[-1]} could not be saved")
    assert f"Continue from step {kept[-1]} with" in ended.err
    summary = jobs.read_json(run_dir / "summary.json")
    assert (summary["stop_reason"], summary["exit_code"]) == ("save_failed", 1)
    assert [path.name for path in sorted(folder.iterdir())] == [f"step-{step:08d}" for step in kept]
    assert_checkpoints_are_whole(run_dir)
    # The checkpoint that was kept is good.
    assert train(*endless, "--max-steps", kept[-1] + 1).code == 0
    assert jobs.read_json(run_dir / "summary.json")["resumed_from"] == kept[-1]


def test_no_line_is_lost_where_the_disk_was_full_for_a_while(flags: list[str], tmp_path: Path) -> None:
    with faults.start(1, *flags, *ENDLESS, "--log-every", 5, "--output-dir", tmp_path) as job:
        faults.wait_until_step(job, tmp_path, 30)
        process = psutil.Process(job.pids[0])
        process.rlimit(psutil.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size, psutil.RLIM_INFINITY))
        faults.wait_for(lambda: job.errors().count("kept in memory") >= 3, "three warnings", job)
        process.rlimit(psutil.RLIMIT_FSIZE, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))
        step = faults.last_step(tmp_path)
        faults.wait_for(lambda: faults.last_step(tmp_path) > step, "the next line", job)
        job.signal(signal.SIGTERM)
        assert job.wait()[0].code == 75
    steps = [line["step"] for line in jobs.read_metrics(tmp_path)]
    epochs = range(26, steps[-1] + 1, 26)
    assert steps == sorted({*range(5, steps[-1] + 1, 5), *epochs})
