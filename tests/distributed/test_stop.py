"""Signals to jobs of real processes: a checkpoint, 75 in summary.json, nothing left running."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import faults
import jobs
import pytest

from ddp_mnist.errors import JobError
from ddp_mnist.storage import checkpoint, directory

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

ENDLESS = ["--epochs", "100000", "--log-every", "5"]
ACCELERATE = "accelerate launch --num_machines 1 --mixed_precision no --dynamo_backend no --num_processes"
# Name → (ranks, how to start them, how the command that continues the run begins).
WAYS = {
    "python": (1, "python -m ddp_mnist.train", "python -m"),
    "accelerate": (1, f"{ACCELERATE} 1 -m ddp_mnist.train", "accelerate launch --num_processes 1 -m"),
    "torchrun 2": (
        2,
        "torchrun --nproc-per-node 2 --master-port {port} -m ddp_mnist.train",
        "torchrun --nproc-per-node 2 -m",
    ),
    "accelerate 2": (
        2,
        f"{ACCELERATE} 2 --multi_gpu --main_process_port {{port}} -m ddp_mnist.train",
        "ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu --num_processes 2 -m",
    ),
}
# (way, signal, sent to, exit code of what was started, stop_reason). A launcher makes 1 of any code but 0; killed by a
# signal it does not handle, it is gone at once and its workers notice.
CASES = [
    ("python", "TERM", "pid", 75, "SIGTERM"),
    ("accelerate", "TERM", "group", -signal.SIGTERM, "SIGTERM"),
    ("torchrun 2", "TERM", "pid", 1, "SIGTERM"),
    ("torchrun 2", "INT", "group", 1, "SIGINT"),
    ("torchrun 2", "KILL", "pid", -signal.SIGKILL, "launcher_died"),
    ("accelerate 2", "TERM", "group", 1, "SIGTERM"),
    ("accelerate 2", "USR2", "pid", -signal.SIGUSR2, "launcher_died"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(case[:3]))
def test_a_stop_saves_says_how_to_go_on_and_leaves_no_process(
    flags: list[str], tmp_path: Path, case: tuple[str, str, str, int, str]
) -> None:
    way, name, target, code, reason = case
    world_size, line, again = WAYS[way]
    run_dir, variables = tmp_path / "run", {"ACCELERATE_USE_CPU": "1"}  # for Accelerate's launcher with several ranks
    with faults.launch(line, *flags, *ENDLESS, "--output-dir", run_dir, variables=variables) as job:
        faults.wait_until_step(job, run_dir, 5)
        (os.killpg if target == "group" else os.kill)(job.pids[0], signal.Signals[f"SIG{name}"])
        (ended,) = job.wait()
    printed = ended.out + ended.err
    assert ended.code == code, printed
    summary = jobs.read_json(run_dir / "summary.json")
    assert (summary["stop_reason"], summary["exit_code"], summary["finished"]) == (reason, 75, False)
    assert summary["world_size"] == world_size
    steps = summary["steps"]
    assert checkpoint.read_checkpoint(run_dir / "checkpoints" / f"step-{steps:08d}").state.step == steps
    assert printed.count(f"stopped by {reason} after step {steps} of ") == 1 and "error: " not in printed
    command = faults.printed_command(printed)
    assert command.startswith(f"{again} ddp_mnist.train "), command
    if name == "TERM":  # one of each way
        assert_it_continues(command, run_dir, summary)


def assert_it_continues(command: str, run_dir: Path, before: dict[str, Any]) -> None:
    """As typed, but on a port of its own, since other jobs may run on this machine, and with an end."""
    port, until = jobs.free_port(), before["steps"] + 3
    command = command.replace("torchrun ", f"torchrun --master-port {port} ", 1)
    command = command.replace("--multi_gpu ", f"--multi_gpu --main_process_port {port} ", 1)
    scripts = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    ended = jobs.run(["bash", "-c", f"{command} --max-steps {until}"], {"PATH": scripts})
    assert ended.code == 0, ended.err
    after = jobs.read_json(run_dir / "summary.json")
    assert (after["resumed_from"], after["steps"]) == (before["steps"], until)
    assert after["world_size"] == before["world_size"]


# The training command on a slow machine: a save waits for a file, and ranks other than 0 take seconds to leave.
SLOW_SAVE = """
import os, sys, time
from pathlib import Path
from ddp_mnist.distributed.launcher import hard_exit
from ddp_mnist.storage.checkpoint import Checkpoints
from ddp_mnist.train import main

def publish_slowly(self, snapshot):
    Path("saving").touch()
    while not Path("go").exists():
        time.sleep(0.01)
    return publish(self, snapshot)

publish, Checkpoints.publish = Checkpoints.publish, publish_slowly
code = main(sys.argv[1:])
if os.environ["RANK"] != "0":
    time.sleep(2)
hard_exit(code)
"""


def test_ranks_started_one_by_one_leave_in_order(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """srun --kill-on-bad-exit ends a step with the first rank that fails: that must be rank 0, and the last one.

    A signal to one rank is enough; more of them during the save change nothing.
    """
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "run"
    arguments = [*flags, *ENDLESS, "--checkpoint-every", 10**9, "--output-dir", run_dir]
    with faults.start(2, *arguments, program=(sys.executable, "-c", SLOW_SAVE)) as job:
        faults.wait_until_step(job, run_dir, 5)
        job.signal(signal.SIGUSR2, 1)
        faults.wait_for(Path("saving").exists, "the save", job)
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGINT, signal.SIGUSR2):
            job.signal(number)
        with pytest.raises(JobError, match="held by another job"):  # the next one has to wait
            directory.lock(run_dir, patience=0)
        assert job.running() and not (run_dir / "summary.json").exists()
        Path("go").touch()
        faults.wait_for(lambda: job.processes[0].poll() is not None, "the end of rank 0", job)
        assert job.processes[1].poll() is not None  # its exit takes seconds here
        ended = job.wait()
    assert [process.code for process in ended] == [75, 0], [process.err for process in ended]
    summary = jobs.read_json(run_dir / "summary.json")
    assert (summary["stop_reason"], summary["exit_code"]) == ("SIGUSR2", 75)
    assert faults.checkpoint_steps(run_dir) == [summary["steps"]]


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
