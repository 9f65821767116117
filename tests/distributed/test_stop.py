"""Each signal x each way of starting, real processes: a checkpoint, 75 in summary.json, nothing left running."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import faults
import jobs
import pytest
import slow_save

from ddp_mnist.errors import JobError
from ddp_mnist.run import checkpoint
from ddp_mnist.run import directory as rundir

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

ENDLESS = ["--epochs", "100000", "--log-every", "5"]
TWO_BY_ACCELERATE = "accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
WAYS = {
    "python": (1, "python -m ddp_mnist.train", {}),
    "accelerate": (
        1,
        "accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no "
        "-m ddp_mnist.train",
        {},
    ),
    "torchrun 2": (2, "torchrun --nproc-per-node 2 --master-port {port} -m ddp_mnist.train", {}),
    "accelerate 2": (
        2,
        f"{TWO_BY_ACCELERATE} --dynamo_backend no --main_process_port {{port}} -m ddp_mnist.train",
        {"ACCELERATE_USE_CPU": "1"},
    ),
}
# (way, signal, sent to) → (exit code of what was started, stop_reason). A launcher makes 1 of any code but 0; killed
# by a signal it does not handle, it is gone at once and its workers notice.
DIED = "launcher_died"
CASES = {
    ("python", "TERM", "pid"): (75, "SIGTERM"),
    ("python", "INT", "pid"): (75, "SIGINT"),
    ("python", "USR2", "pid"): (75, "SIGUSR2"),
    ("accelerate", "TERM", "pid"): (-signal.SIGTERM, DIED),
    ("accelerate", "INT", "pid"): (-signal.SIGINT, DIED),
    ("accelerate", "USR2", "pid"): (-signal.SIGUSR2, DIED),
    ("accelerate", "KILL", "pid"): (-signal.SIGKILL, DIED),
    ("accelerate", "TERM", "group"): (-signal.SIGTERM, "SIGTERM"),
    ("accelerate", "INT", "group"): (-signal.SIGINT, "SIGINT"),
    ("accelerate", "USR2", "group"): (-signal.SIGUSR2, "SIGUSR2"),
    ("torchrun 2", "TERM", "pid"): (1, "SIGTERM"),
    ("torchrun 2", "INT", "group"): (1, "SIGINT"),
    ("torchrun 2", "USR2", "group"): (-signal.SIGUSR2, DIED),
    ("torchrun 2", "KILL", "pid"): (-signal.SIGKILL, DIED),
    ("accelerate 2", "TERM", "group"): (1, "SIGTERM"),
    ("accelerate 2", "INT", "pid"): (1, "SIGINT"),
    ("accelerate 2", "USR2", "pid"): (-signal.SIGUSR2, DIED),
    ("accelerate 2", "KILL", "pid"): (-signal.SIGKILL, DIED),
}
Case = tuple[str, str, str]


@dataclass(frozen=True)
class Stopped:
    run_dir: Path
    code: int
    told: str


@pytest.fixture(scope="module")
def stopped(
    request: pytest.FixtureRequest, flags: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Case, Future[Stopped]]]:
    """The chosen cases, two at a time: most of their time is the start of one process after the other."""

    def stop(case: Case, run_dir: Path) -> Stopped:
        way, name, target = case
        _, line, variables = WAYS[way]
        with faults.launch(line, *flags, *ENDLESS, "--output-dir", run_dir, variables=variables) as job:
            faults.wait_until_step(job, run_dir, 5)
            (os.killpg if target == "group" else os.kill)(job.pids[0], signal.Signals[f"SIG{name}"])
            (ended,) = job.wait()
        return Stopped(run_dir, ended.code, ended.out + ended.err)

    chosen = [
        item.callspec.params["case"] for item in request.session.items if "case" in getattr(item, "fixturenames", ())
    ]
    folder = tmp_path_factory.mktemp("stopped")
    with ThreadPoolExecutor(2) as pool:
        ended = {case: pool.submit(stop, case, folder / "-".join(case)) for case in CASES if case in chosen}
    yield ended  # all of them: a test must not see the processes of another's case


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_a_stop_saves_says_how_to_go_on_and_leaves_no_process(stopped: dict[Case, Future[Stopped]], case: Case) -> None:
    found = stopped[case].result()
    code, reason = CASES[case]
    summary = jobs.read_json(found.run_dir / "summary.json")
    assert (summary["stop_reason"], summary["exit_code"], summary["finished"]) == (reason, 75, False)
    assert summary["world_size"] == WAYS[case[0]][0]
    newest = found.run_dir / "checkpoints" / f"step-{summary['steps']:08d}"
    assert checkpoint.read(newest).state.step == summary["steps"]
    assert found.code == code, found.told
    assert found.told.count(f"stopped by {reason} after step {summary['steps']} of ") == 1
    assert "ddp_mnist.train" in faults.printed_command(found.told)
    assert "error: " not in found.told


CONTINUED = {
    "python": (("python", "TERM", "pid"), "python -m"),
    "accelerate": (("accelerate", "INT", "group"), "accelerate launch --num_processes 1 -m"),
    "torchrun 2": (("torchrun 2", "TERM", "pid"), "torchrun --nproc-per-node 2 -m"),
    "accelerate 2": (
        ("accelerate 2", "TERM", "group"),
        "ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu --num_processes 2 -m",
    ),
}


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case, began", CONTINUED.values(), ids=CONTINUED)
def test_the_printed_command_continues_the_run(
    stopped: dict[Case, Future[Stopped]], tmp_path: Path, case: Case, began: str
) -> None:
    found = stopped[case].result()
    before = jobs.read_json(found.run_dir / "summary.json")
    command = faults.printed_command(found.told)
    assert command.startswith(f"{began} ddp_mnist.train "), command
    # As typed, but on a port of its own, since other jobs may run on this machine, and with an end.
    port = jobs.free_port()
    command = command.replace("torchrun ", f"torchrun --master-port {port} ", 1)
    command = command.replace("--multi_gpu ", f"--multi_gpu --main_process_port {port} ", 1)
    until = before["steps"] + 3
    scripts = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    ended = jobs.run(["bash", "-c", f"{command} --max-steps {until}"], {"PATH": scripts}, cwd=tmp_path)
    assert ended.code == 0, ended.err
    after = jobs.read_json(found.run_dir / "summary.json")
    assert (after["resumed_from"], after["steps"]) == (before["steps"], until)
    assert after["world_size"] == before["world_size"]


@pytest.mark.parametrize("told", [0, 1])
def test_ranks_started_one_by_one_leave_in_order(flags: list[str], tmp_path: Path, told: int) -> None:
    """srun --kill-on-bad-exit ends a step with the first rank that fails: that must be rank 0, and the last one.

    A signal to one rank, whichever, is enough; more of them during the save change nothing.
    """
    run_dir, go = tmp_path / "run", tmp_path / "go"
    with faults.start(2, *flags, *ENDLESS, "--output-dir", run_dir, program=slow(go)) as job:
        faults.wait_until_step(job, run_dir, 5)
        job.signal(signal.SIGUSR2, told)
        faults.wait_for((tmp_path / "go.saving").exists, "the save", job)
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGINT, signal.SIGUSR2):
            job.signal(number)
        with pytest.raises(JobError, match="held by another job"):  # the next one has to wait
            rundir.lock(run_dir, patience=0)
        assert job.running() and not (run_dir / "summary.json").exists()
        go.touch()
        faults.wait_for(lambda: job.processes[0].poll() is not None, "the end of rank 0", job)
        assert job.processes[1].poll() is not None  # its exit takes seconds here
        ended = job.wait()
    assert [process.code for process in ended] == [75, 0], [process.err for process in ended]
    summary = jobs.read_json(run_dir / "summary.json")
    assert (summary["stop_reason"], summary["exit_code"]) == ("SIGUSR2", 75)
    assert faults.checkpoint_steps(run_dir)[-1] == summary["steps"]


def slow(go: Path) -> tuple[str, ...]:
    return sys.executable, str(Path(slow_save.__file__)), str(go)


def test_a_signal_during_the_start_ends_in_a_checkpoint(flags: list[str], tmp_path: Path) -> None:
    # As soon as torch is being imported, seconds before the first step; on one of two ranks.
    with faults.start(2, *flags, *ENDLESS, "--output-dir", tmp_path) as job:
        faults.wait_for(lambda: "/libtorch" in Path(f"/proc/{job.pids[1]}/maps").read_text(), "torch's import", job)
        assert not (tmp_path / "config.json").exists()
        job.signal(signal.SIGTERM, 1)
        ended = job.wait()
    assert [process.code for process in ended] == [75, 0], [process.err for process in ended]
    summary = jobs.read_json(tmp_path / "summary.json")
    assert (summary["stop_reason"], summary["exit_code"]) == ("SIGTERM", 75)
    assert faults.checkpoint_steps(tmp_path) == [summary["steps"]]
    assert summary["steps"] <= 2


def test_ctrl_c_twice_leaves_at_once(flags: list[str], tmp_path: Path) -> None:
    run_dir, go = tmp_path / "run", tmp_path / "go"
    with faults.start(1, *flags, *ENDLESS, "--output-dir", run_dir, program=slow(go)) as job:
        faults.wait_until_step(job, run_dir, 5)
        job.signal(signal.SIGINT)
        faults.wait_for((tmp_path / "go.saving").exists, "the save", job)
        assert "Ctrl-C again leaves at once, without saving" in job.errors()
        job.signal(signal.SIGINT)
        (ended,) = job.wait()
    assert ended.code == 130
    assert not (run_dir / "summary.json").exists()
