"""What a submitit job runs, once per rank. Imports nothing heavy before the job runs.

submitit installs a handler that requeues the job as soon as the signal comes, in the middle of a step. While training,
our own stop flag takes the signal instead; when all ranks have saved, submitit's handlers are back and rank 0 raises
the signal again.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import socket
import subprocess
import sys
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import submitit
from submitit.helpers import TorchDistributedEnvironment

from ddp_mnist.config import TrainConfig, parse
from ddp_mnist.distributed.launcher import hard_exit, report_error, show_warnings
from ddp_mnist.distributed.preemption import StopSignal
from ddp_mnist.errors import STOPPED, JobError


@dataclass(frozen=True)
class Job:
    """Pickled at submission, called on every rank of every attempt. Returns the run's summary."""

    flags: tuple[str, ...]
    """Training flags, checked before submission."""
    launcher: str
    """What the training prints in front of its flags when it says how to go on."""
    attempt: int = 0

    def __call__(self) -> dict[str, Any]:
        env = submitit.JobEnvironment()
        main = env.global_rank == 0
        self.join(env)
        show_warnings(main=main)
        logging.getLogger("submitit").propagate = False  # it prints by itself
        try:
            config = self.config(env)
            with StopSignal() as stop:
                from ddp_mnist.trainer import run_attempt  # imports torch

                summary = run_attempt(config, stop=stop).summary
        except JobError as error:
            self.leave(env, report_error(error))
        if main and summary["exit_code"] == STOPPED:
            # Not after TERM: scancel sends it too, and a requeue would bring a cancelled job back to life.
            if env.cluster != "debug" and summary["stop_reason"] in ("SIGUSR2", "max_minutes"):
                try:
                    signal.raise_signal(env._usr_sig())
                except SystemExit as requeued:
                    self.leave(env, requeued.code)
            self.leave(env, STOPPED)
        if env.cluster != "debug":
            # submitit has yet to write the result; what follows it must not take Python down, see `leave`.
            atexit.register(lambda: hard_exit(1 if hasattr(sys, "last_type") else 0))
        return summary

    def leave(self, env: submitit.JobEnvironment, code: Any) -> NoReturn:
        if env.cluster == "debug":  # not our process
            sys.exit(code)
        hard_exit(int(code) & 0xFF)

    def checkpoint(self, *_: object, **__: object) -> submitit.helpers.DelayedSubmission:
        """The next attempt; submitit calls it in its signal handler, on rank 0 alone: no collective, no save."""
        return submitit.helpers.DelayedSubmission(replace(self, attempt=self.attempt + 1))

    __submitit_checkpoint__ = checkpoint  # submitit asks for one name before a requeue and calls the other

    def join(self, env: submitit.JobEnvironment) -> None:
        """Set torch's variables, RANK and so on."""
        # Below the ports that the kernel deals out by itself, another one for every job and attempt.
        port = 10_000 + (zlib.crc32(env.job_id.encode()) + self.attempt) % 22_000
        os.environ["MASTER_PORT"] = str(port)
        # SLURM has dealt out the GPUs: with one visible GPU per rank they could not see each other's.
        distributed = TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        os.environ["MASTER_ADDR"] = _address(distributed.master_addr)
        os.environ["DDP_MNIST_LAUNCHER"] = self.launcher
        os.environ["DDP_MNIST_JOB_ID"] = env.job_id
        os.environ["DDP_MNIST_RESTARTS"] = str(self.attempt)

    def config(self, env: submitit.JobEnvironment) -> TrainConfig:
        """Raises: JobError."""
        config = parse(self.flags)
        config.check_world_size(env.num_tasks)
        if env.cluster == "debug":  # one attempt, and none of submitit's files
            return config
        if config.output_dir is None:  # as in slurm/train.sh: the same after a requeue
            config = config.replace(output_dir=Path("runs") / f"{env.cluster}-{env.job_id}")
        if env.global_rank == 0:
            folder = env.paths.folder
            for leftover in folder.glob("*.save_tmp"):  # of a kill in mid-write; submitit would not requeue again
                leftover.unlink(missing_ok=True)
            started = folder / f"{env.job_id}_started"
            if started.exists():  # --fresh is for the first start, else a requeue would throw away what there is
                config = config.replace(fresh=False)
            started.touch()
        return config


def _address(host: str) -> str:
    """`host`, or where its name does not resolve the address by which SLURM itself reaches it."""
    try:
        socket.getaddrinfo(host, None)
        return host
    except OSError:
        try:
            answer = subprocess.run(["scontrol", "show", "node", host], capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            return host
        found = [word.partition("=")[2] for word in answer.stdout.split() if word.startswith("NodeAddr=")]
        return found[0] if found else host
