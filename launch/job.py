"""The job that submitit runs, once per rank.

submitit's signal handler requeues the job as soon as the signal comes, in the middle of a step. While training, our
StopSignal takes the signal instead; when all ranks have saved, submitit's handler is back and gets it again.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import subprocess
import sys
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import submitit
from submitit.helpers import TorchDistributedEnvironment

from ddp_mnist.config import TrainConfig
from ddp_mnist.distributed.launcher import entry_point, hard_exit, show_warnings
from ddp_mnist.distributed.preemption import StopSignal
from ddp_mnist.errors import STOPPED

MEET = Path(__file__).parents[1] / "slurm" / "meet.sh"


@dataclass(frozen=True)
class Job:
    """The pickled job, which submitit calls on every rank of every attempt."""

    config: TrainConfig
    """Settings, checked before submission."""
    launcher: str
    """The words in front of the flags in the command that continues the run."""
    attempt: int = 0

    def __call__(self) -> int:
        """Run this rank's part of the job and return its exit code; on a cluster only if it is 0."""
        env = submitit.JobEnvironment()
        # SLURM has assigned the GPUs; NCCL wants every rank to see those of its neighbours.
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        if env.cluster == "slurm":
            meet = [str(MEET), ",".join(env.hostnames), str(self.attempt)]
            meeting = subprocess.run(meet, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
        else:  # as there: not a port that the kernel assigns by itself, and another one for every job and attempt
            meeting = f"127.0.0.1:{10_000 + (zlib.crc32(env.job_id.encode()) + self.attempt) % 22_000}"
        os.environ["MASTER_ADDR"], _, os.environ["MASTER_PORT"] = meeting.rpartition(":")
        os.environ["DDP_MNIST_LAUNCHER"] = self.launcher
        os.environ["DDP_MNIST_JOB_ID"] = env.job_id
        os.environ["DDP_MNIST_RESTARTS"] = str(self.attempt)
        code = self._train(env)
        if env.cluster != "debug":  # which runs in the user's process
            if code:
                hard_exit(code)
            # submitit has yet to write the result, and may fail.
            atexit.register(lambda: hard_exit(1 if hasattr(sys, "last_type") else 0))
        return code

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Return the next attempt. submitit calls it in its signal handler, on rank 0 alone: no collective, no save."""
        return submitit.helpers.DelayedSubmission(replace(self, attempt=self.attempt + 1))

    @entry_point
    def _train(self, env: submitit.JobEnvironment) -> int:
        show_warnings(main=env.global_rank == 0)
        logging.getLogger("submitit").propagate = False  # it prints by itself
        config = self.config
        if env.cluster == "slurm" and config.output_dir is None:  # as in slurm/train.sh: the same after a requeue
            config = config.replace(output_dir=Path("runs") / f"slurm-{env.job_id}")
        if env.cluster != "debug" and env.global_rank == 0:
            started = env.paths.folder / f"{env.job_id}_started"
            if started.exists():  # --fresh is for the first start: a requeued job would throw away what there is
                config = config.replace(fresh=False)
            started.touch()
        with StopSignal() as stop:
            from ddp_mnist.trainer import run_attempt  # imports torch

            result = run_attempt(config, stop=stop)
        # Not after TERM: scancel sends it too, and a requeue would bring a cancelled job back to life.
        requeue = result.exit_code == STOPPED and result.summary["stop_reason"] in ("SIGUSR1", "SIGUSR2", "max_minutes")
        if requeue and env.cluster != "debug":
            try:
                signal.raise_signal(env._usr_sig())
            except SystemExit as requeued:  # on rank 0
                return int(requeued.code or 0) & 0xFF
        return result.exit_code
