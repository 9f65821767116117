"""Start a job without waiting for it, do something bad to it, and check that nothing of it is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import jobs
import psutil

MARK = "DDP_MNIST_TEST_JOB"  # in the environment of every process of a job, wherever its launcher puts it


class Job:
    """The processes of one job: ranks started one by one, or a launcher. Leaving the `with` block kills them all."""

    def __init__(
        self, commands: Sequence[Sequence[str]], environments: Sequence[Mapping[str, str]], *, cwd: Path | None = None
    ) -> None:
        self._mark = uuid.uuid4().hex
        self._folder = tempfile.TemporaryDirectory()
        self._outputs = [Path(self._folder.name, str(number)) for number in range(len(commands))]
        self.processes: list[subprocess.Popen[bytes]] = []
        # What is killed cannot clean up: its temporary files go with those of the job.
        marked = {MARK: self._mark, "TMPDIR": self._folder.name}
        for command, variables, output in zip(commands, environments, self._outputs, strict=True):
            with output.with_suffix(".out").open("wb") as out, output.with_suffix(".err").open("wb") as err:
                self.processes.append(
                    subprocess.Popen(
                        command,
                        env={**variables, **marked},
                        cwd=cwd,
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=err,
                        start_new_session=True,
                    )
                )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._folder.cleanup()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes]

    def output(self, rank: int = 0) -> str:
        return self._outputs[rank].with_suffix(".out").read_text(errors="replace")

    def errors(self, rank: int = 0) -> str:
        return self._outputs[rank].with_suffix(".err").read_text(errors="replace")

    def running(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def left(self) -> list[psutil.Process]:
        """Return the processes that still exist, wherever they hang in the tree; a zombie is gone."""
        for process in self.processes:
            process.poll()
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def signal(self, number: int, *ranks: int) -> None:
        """Send a signal to these ranks; to all of them where none is named."""
        for rank in ranks or range(len(self.processes)):
            with suppress(ProcessLookupError):
                os.kill(self.pids[rank], number)

    def kill(self) -> None:
        """Send kill -9 to all processes in one go."""
        for process in self.left():
            with suppress(psutil.Error):
                process.kill()
        for started in self.processes:
            started.wait(timeout=30)

    def wait(self, seconds: float = jobs.FOREVER) -> list[jobs.Ended]:
        """Wait until all that was started has ended by itself and nothing is left of it."""
        wait_for(lambda: not self.running(), "the end of the job", self, seconds=seconds)
        wait_for(lambda: not self.left(), "the end of its last process", self, seconds=seconds)
        return [
            jobs.Ended(process.returncode, self.output(rank), self.errors(rank))
            for rank, process in enumerate(self.processes)
        ]


def start(world_size: int, *arguments: Any, program: Sequence[str] = jobs.TRAIN) -> Job:
    """Start one process per rank, as `srun` does; a job of one rank has no launcher."""
    ranks = jobs.rank_variables(world_size) if world_size > 1 else [{}]
    command = [*program, *map(str, arguments)]
    return Job([command] * world_size, [jobs.environment(own) for own in ranks])


def launch(line: str, *arguments: Any, variables: Mapping[str, str] | None = None) -> Job:
    """Start a launcher of this environment, such as `torchrun --master-port {port} -m ddp_mnist.train`."""
    name, *words = line.format(port=jobs.free_port()).split()
    first = [sys.executable] if name == "python" else [sys.executable, str(Path(sys.executable).parent / name)]
    return Job([[*first, *words, *map(str, arguments)]], [jobs.environment(variables)])


def wait_for(condition: Callable[[], Any], what: str, job: Job | None = None, *, seconds: float = jobs.FOREVER) -> None:
    """Raises: AssertionError with all that the job has printed, when the condition is not true within `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= end:
            ranks = range(len(job.processes)) if job else ()
            printed = [text for rank in ranks if job for text in (job.output(rank), job.errors(rank))]
            raise AssertionError("\n".join([f"waited {seconds:.0f} s for {what}", *printed]))
        time.sleep(0.01)


def wait_until_step(job: Job, run_dir: Path, step: int) -> None:
    """Wait until metrics.jsonl has come to that step. Raises: AssertionError when the job ends before."""
    wait_for(lambda: last_step(run_dir) >= step or not job.running(), f"step {step}", job)
    assert job.running(), f"ended before step {step}\n{job.errors()}"


def last_step(run_dir: Path) -> int:
    """Return the last step of metrics.jsonl, which may be growing; -1 without a line."""
    with suppress(OSError):
        lines = (run_dir / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
        if lines:
            return json.loads(lines[-1])["step"]
    return -1


def checkpoint_steps(run_dir: Path) -> list[int]:
    """Return the steps of the published checkpoints, oldest first."""
    return sorted(int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step-*"))


def assert_same_result(run_dir: Path, expected: Path) -> None:
    """Compare every byte of the weights, and the loss of every line: none missing, none twice."""
    runs = run_dir, expected
    losses = [[(line["step"], line.get("train/loss")) for line in jobs.read_metrics(run)] for run in runs]
    assert losses[0] == losses[1]
    weights = [(run / "model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1]


def printed_command(text: str) -> str:
    """Return the line under `continue with`, `with` or `help:`, as a user would copy it."""
    lines = text.splitlines()
    (number,) = [number for number, line in enumerate(lines) if line.endswith((" with", "help:"))]
    return lines[number + 1].strip()
