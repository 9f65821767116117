"""Start a job without waiting for it, do something bad to it, and see that nothing of it is left."""

from __future__ import annotations

import ctypes
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
FOREVER = jobs.FOREVER
PORT = "{port}"


class Job:
    """The processes of one job: ranks started one by one, or a launcher and what it starts. Leaving ends them all."""

    def __init__(
        self,
        commands: Sequence[Sequence[str]],
        environments: Sequence[Mapping[str, str]],
        *,
        cwd: Path | None = None,
        powerless: bool = False,
    ) -> None:
        """`powerless`: file permissions bind it, also where the tests run as root."""
        self.mark = uuid.uuid4().hex
        self._folder = tempfile.TemporaryDirectory()
        self._outputs = [Path(self._folder.name, str(number)) for number in range(len(commands))]
        self.processes: list[subprocess.Popen[bytes]] = []
        try:
            for command, variables, output in zip(commands, environments, self._outputs, strict=True):
                with open(f"{output}.out", "wb") as out, open(f"{output}.err", "wb") as err:
                    self.processes.append(
                        subprocess.Popen(
                            command,
                            # What is killed cannot clean up: its temporary files go with those of the job.
                            env={**variables, MARK: self.mark, "TMPDIR": self._folder.name},
                            cwd=cwd,
                            stdin=subprocess.DEVNULL,
                            stdout=out,
                            stderr=err,
                            start_new_session=True,
                            preexec_fn=_give_up_power if powerless else None,
                        )
                    )
        except BaseException:
            self.end()
            raise

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes]

    def output(self, rank: int = 0) -> str:
        return Path(f"{self._outputs[rank]}.out").read_text(errors="replace")

    def errors(self, rank: int = 0) -> str:
        return Path(f"{self._outputs[rank]}.err").read_text(errors="replace")

    def told(self) -> str:
        """All that any of its processes has written."""
        ranks = range(len(self.processes))
        return "\n".join(text for rank in ranks for text in (self.output(rank), self.errors(rank)))

    def running(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def left(self) -> list[psutil.Process]:
        """Its processes that still exist, wherever they hang in the tree; a zombie is gone."""
        for process in self.processes:
            process.poll()
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def signal(self, number: int, *ranks: int) -> None:
        for rank in ranks or range(len(self.processes)):
            with suppress(ProcessLookupError):
                os.kill(self.pids[rank], number)

    def kill(self) -> None:
        """kill -9 for all its processes, in one go."""
        for process in self.left():
            with suppress(psutil.Error):
                process.kill()
        for started in self.processes:
            started.wait(timeout=30)

    def wait(self, seconds: float = FOREVER) -> list[jobs.Ended]:
        """All that was started has ended by itself, and nothing is left of it."""
        wait_for(lambda: not self.running(), "the end of the job", self, seconds=seconds)
        wait_for(lambda: not self.left(), "the end of its last process", self, seconds=seconds)
        return [
            jobs.Ended(process.returncode, self.output(rank), self.errors(rank))
            for rank, process in enumerate(self.processes)
        ]

    def end(self) -> None:
        self.kill()
        self._folder.cleanup()


def start(world_size: int, *arguments: Any, program: Sequence[str] = jobs.TRAIN, powerless: bool = False) -> Job:
    """One process per rank, as `srun` starts them; a job of one rank has no launcher."""
    ranks = jobs.rank_variables(world_size) if world_size > 1 else [{}]
    command = [*program, *map(str, arguments)]
    return Job([command] * world_size, [jobs.environment(own) for own in ranks], powerless=powerless)


def launch(line: str, *arguments: Any, variables: Mapping[str, str] | None = None, cwd: Path | None = None) -> Job:
    """A launcher of this environment, such as `torchrun --master-port {port} -m ddp_mnist.train`."""
    name, *words = line.replace(PORT, str(jobs.free_port())).split()
    first = [sys.executable] if name == "python" else [sys.executable, str(Path(sys.executable).parent / name)]
    return Job([[*first, *words, *map(str, arguments)]], [jobs.environment(variables)], cwd=cwd)


def wait_for(condition: Callable[[], Any], what: str, job: Job | None = None, *, seconds: float = FOREVER) -> None:
    """Raises: AssertionError with what the job has said, when it does not come true in `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:.0f} s for {what}\n{job.told() if job else ''}"
        time.sleep(0.01)


def wait_until_step(job: Job, run_dir: Path, step: int) -> None:
    """metrics.jsonl has come to that step."""
    wait_for(lambda: last_step(run_dir) >= step or not job.running(), f"step {step}", job)
    assert job.running(), f"ended before step {step}\n{job.told()}"


def last_step(run_dir: Path) -> int:
    """Of metrics.jsonl, which may be growing; -1 without a line."""
    with suppress(OSError):
        lines = (run_dir / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
        if lines:
            return json.loads(lines[-1])["step"]
    return -1


def checkpoint_steps(run_dir: Path) -> list[int]:
    """Of the published checkpoints, oldest first."""
    return sorted(int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step-*"))


def unfinished_saves(run_dir: Path) -> list[Path]:
    return list((run_dir / "checkpoints").glob(".tmp-step-*"))


def train_losses(run_dir: Path) -> list[tuple[int, float | None]]:
    """(step, train/loss) of every line: two runs that agree here took the same steps, with the same bits."""
    return [(line["step"], line.get("train/loss")) for line in jobs.read_metrics(run_dir)]


def assert_same_result(run_dir: Path, expected: Path) -> None:
    """Every byte of the weights, and every line of the curve: none missing, none twice."""
    assert train_losses(run_dir) == train_losses(expected)
    weights = [(path / "model.safetensors").read_bytes() for path in (run_dir, expected)]
    assert weights[0] == weights[1]


def printed_command(text: str) -> str:
    """The line under `continue with` or `with`, as a user would copy it."""
    lines = text.splitlines()
    (number,) = [number for number, line in enumerate(lines) if line.endswith((" with", "continue with", "help:"))]
    return lines[number + 1].strip()


def _give_up_power() -> None:
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP of CAP_DAC_OVERRIDE, from the program it becomes
