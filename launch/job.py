"""The job that submitit runs, once per rank.

submitit's signal handler requeues the job as soon as the signal comes, in the middle of a step. While training, our
StopSignal catches the signal instead. When all ranks have saved, the job raises it again for submitit's handler.
"""

import atexit
import logging
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import submitit
from submitit.helpers import TorchDistributedEnvironment

from ddp_mnist.config import TrainConfig
from ddp_mnist.distributed.launcher import entry_point, hard_exit, show_warnings
from ddp_mnist.distributed.preemption import StopSignal
from ddp_mnist.errors import STOPPED


@dataclass(frozen=True)
class Job:
    """The pickled job, which submitit calls on every rank of every attempt."""

    config: TrainConfig  # checked before submission
    launcher: str  # the words in front of the flags in the command that continues the run
    attempt: int = 0

    def __call__(self) -> int:
        """Run this rank's part of the job. Return 0, or end the process with another exit code."""
        env = submitit.JobEnvironment()
        # SLURM has assigned the GPUs; NCCL wants every rank to see those of its neighbours.
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        attempt, meeting = self.attempt, f"127.0.0.1:{os.environ['MASTER_PORT']}"
        if env.cluster == "slurm":
            attempt = int(os.environ.get("SLURM_RESTART_COUNT", "0"))  # submitit misses restarts after a dead node
            meet = Path(__file__).parents[1] / "slurm" / "meet.sh"
            meeting = subprocess.check_output([meet, ",".join(env.hostnames), str(attempt)], text=True).strip()
        os.environ["MASTER_ADDR"], _, os.environ["MASTER_PORT"] = meeting.rpartition(":")
        os.environ["DDP_MNIST_LAUNCHER"] = self.launcher
        os.environ["DDP_MNIST_JOB_ID"] = env.job_id
        os.environ["DDP_MNIST_RESTARTS"] = str(attempt)
        # --fresh is for the first start only: a requeued job would not continue the run but start over.
        if code := self._train(env, self.config.replace(fresh=self.config.fresh and attempt == 0)):
            hard_exit(code)
        # Only at Python's exit, because submitit must write the result first. If it raises, Python sets `last_type`.
        atexit.register(lambda: hard_exit(1 if hasattr(sys, "last_type") else 0))
        return code

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Return the next attempt. submitit calls it in its signal handler, on rank 0 alone: no collective, no save."""
        return submitit.helpers.DelayedSubmission(replace(self, attempt=self.attempt + 1))

    @entry_point
    def _train(self, env: submitit.JobEnvironment, config: TrainConfig) -> int:
        show_warnings(main=env.global_rank == 0)
        logging.getLogger("submitit").propagate = False  # submitit prints its own messages
        if env.cluster == "slurm" and config.output_dir is None:  # as in slurm/train.sh: the same after a requeue
            config = config.replace(output_dir=Path("runs") / f"slurm-{env.job_id}")
        with StopSignal() as stop:
            from ddp_mnist.trainer import run_attempt  # imports torch

            result = run_attempt(config, stop=stop)
        # Not after TERM: scancel sends it too, and a requeue would bring a cancelled job back to life.
        requeue = result.exit_code == STOPPED and result.summary["stop_reason"] in ("SIGUSR1", "SIGUSR2", "max_minutes")
        if requeue and env.cluster != "debug":
            try:
                signal.raise_signal(env._usr_sig())
            except SystemExit as requeued:  # submitit exits on rank 0
                return int(requeued.code or 0) & 0xFF
        return result.exit_code
