"""Submit a training job with submitit: checks the flags, hands over, prints where to look.

    python -m launch.submit --nodes 2 --gpus-per-node 8 --time-min 60 --follow -- --recipe fast --epochs 20

What follows `--` are training flags. Run it from the repository's root, on a disk that the nodes share.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from ddp_mnist.config import TrainConfig
from ddp_mnist.errors import JobError, UsageError
from launch.check import check, split_flags
from launch.job import Job

POLL_SECONDS = 2.0
WAITING = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "REQUEUED", "RESIZING")
"""States of a SLURM job that has not ended."""


def options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch.submit",
        usage="%(prog)s [options] -- TRAINING_FLAGS",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--cluster",
        choices=["slurm", "local", "debug"],
        default="slurm",
        help="local: this machine, in the background; debug: this process",
    )
    add("--nodes", type=_positive, default=1, help="machines")
    add("--gpus-per-node", type=int, default=0, help="GPUs, and with them ranks, on each; 0: CPU")
    add("--tasks-per-node", type=_positive, help="ranks on each (default: one per GPU, else 1)")
    add("--cpus-per-task", type=_positive, default=1, help="CPUs of a rank")
    add("--mem-gb", type=float, help="memory of a node in GB (default: the cluster's)")
    add("--time-min", type=_positive, default=60, help="time limit of an attempt in minutes")
    add("--partition", help="SLURM partition (default: the cluster's)")
    add("--account", help="SLURM account (default: yours)")
    add("--sbatch", action="append", default=[], metavar="NAME=VALUE", help="any other option of sbatch; repeatable")
    add("--setup", action="append", default=[], metavar="COMMAND", help="shell command before the ranks start")
    add("--max-requeues", type=int, default=20, help="how often the job may be put back into the queue")
    add("--job-name", default="ddp_mnist", help="what squeue shows")
    add("--folder", default="runs/submitit/%j", help="submitit's files and the logs")
    add("--follow", action="store_true", help="show rank 0's log until the job ends, and exit as it did")
    given = parser.parse_args(argv)
    if given.tasks_per_node is None:
        given.tasks_per_node = given.gpus_per_node or 1
    if given.cluster != "slurm" and given.nodes > 1:
        parser.error(f"--cluster {given.cluster} is this machine alone: --nodes is {given.nodes}, expected 1")
    if given.cluster == "debug" and given.tasks_per_node > 1:
        parser.error(f"--cluster debug is one process: {given.tasks_per_node} ranks were asked for, expected 1")
    if wrong := [word for word in given.sbatch if "=" not in word]:
        parser.error(f"--sbatch {wrong[0]}: expected NAME=VALUE")
    return given


def make_executor(given: argparse.Namespace) -> submitit.AutoExecutor:
    limits = {"slurm_max_num_timeout": given.max_requeues, "local_max_num_timeout": given.max_requeues}
    executor = submitit.AutoExecutor(folder=given.folder, cluster=given.cluster, **limits)
    executor.update_parameters(
        name=given.job_name,
        nodes=given.nodes,
        tasks_per_node=given.tasks_per_node,
        cpus_per_task=given.cpus_per_task,
        timeout_min=given.time_min,
        stderr_to_stdout=True,
        # As in slurm/train.sh: two minutes to save.
        slurm_signal_delay_s=120,
        # srun takes over neither from sbatch, and one dead rank must not leave the others waiting.
        slurm_srun_args=[
            f"--cpus-per-task={given.cpus_per_task}",
            "--kill-on-bad-exit=1",
            "--wait=0",
            "--open-mode=append",
        ],
        slurm_setup=[*given.setup, _import_check()],
        slurm_additional_parameters={"requeue": True} | dict(word.split("=", 1) for word in given.sbatch),
        **{
            name: value
            for name, value in {
                "gpus_per_node": given.gpus_per_node,
                "mem_gb": given.mem_gb,
                "slurm_partition": given.partition,
                "slurm_account": given.account,
            }.items()
            if value
        },
    )
    return executor


def _import_check() -> str:
    """A shell command that ends the job with one message where unpickling would end it with a traceback per rank."""
    python = shlex.quote(sys.executable)
    # The modules that the job needs first; what follows fails by itself with a message that names it.
    advice = f"cannot import this repository in $PWD with {python}: keep both on a disk that all nodes share"
    return (
        f"{python} -c 'import launch.job, ddp_mnist.config' || "
        f'{{ echo "error: $(hostname) {advice}, or use --setup" >&2; exit 1; }}'
    )


def training_flags(given: argparse.Namespace, flags: Sequence[str]) -> tuple[str, ...]:
    """Defaults of a cluster job in front of the user's flags, which beat them."""
    first = ["--dataset", "mnist"]
    if given.cluster == "slurm":  # its CPUs are dealt out per rank; elsewhere the job itself shares them out
        first += ["--threads", str(given.cpus_per_task)]
    if given.cluster == "local":  # its job ids are process ids, which come again
        first += ["--output-dir", f"runs/local-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"]
    return (*first, *flags)


def submit(given: argparse.Namespace, flags: Sequence[str], launcher: str) -> tuple[submitit.Job, TrainConfig]:
    """Check, then submit. Raises: JobError; FailedJobError when sbatch refuses."""
    if program := os.environ.get("PROGRAM"):
        raise UsageError(
            f"PROGRAM is {program!r}, which is for slurm/train.sh and slurm/sweep.sh: a submitit job runs "
            "ddp_mnist.train. Submit it with sbatch, or `unset PROGRAM`."
        )
    config = check(flags, given.nodes * given.tasks_per_node)
    if given.cluster == "slurm" and shutil.which("sbatch") is None:
        raise UsageError(
            "there is no sbatch on PATH: submit from a login node of a SLURM cluster, or use --cluster local."
        )
    return make_executor(given).submit(Job(tuple(flags), launcher)), config


def follow(job: submitit.Job, ended: Callable[[], int | None]) -> int:
    """Copy rank 0's log to the console until the job has ended; returns its outcome."""
    log, at = job.paths.stdout, 0
    while True:
        outcome = ended()  # before reading, so that the last lines are not missed
        if log.exists():
            with open(log, errors="replace") as file:
                file.seek(at)
                sys.stdout.write(file.read())
                sys.stdout.flush()
                at = file.tell()
        if outcome is not None:
            return outcome
        time.sleep(POLL_SECONDS)


def slurm_outcome(job: submitit.Job) -> int | None:
    """The job's exit code, as a shell gives it; None while it has not ended.

    Asks the controller: submitit asks the accounting store, which not every cluster has.
    """
    answer = subprocess.run(["scontrol", "--oneliner", "show", "job", job.job_id], capture_output=True, text=True)
    found = dict(re.findall(r"(\S+?)=(\S*)", answer.stdout))
    if "JobState" not in found:
        if "Invalid job id" not in answer.stderr:
            return None  # the controller is busy or restarting
        found = {"JobState": "COMPLETED" if job.paths.result_pickle.exists() else "FORGOTTEN", "ExitCode": "1:0"}
    if found["JobState"] in WAITING:
        return None
    code, signal_number = map(int, found["ExitCode"].split(":"))
    outcome = 0 if found["JobState"] == "COMPLETED" else code or (128 + signal_number if signal_number else 1)
    if outcome:
        print(f"error: job {job.job_id} is {found['JobState']}, exit code {outcome}", file=sys.stderr)
    return outcome


def local_outcome(job: submitit.Job) -> int | None:
    """0: finished; 1: not. The local executor keeps no exit codes."""
    if not job.done():
        return None
    code = 0 if job.paths.result_pickle.exists() else 1
    if code:
        print(f"error: job {job.job_id} ended before its training was done, see {job.paths.stdout}", file=sys.stderr)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    own, flags = split_flags(words)
    given = options(own)
    launcher = shlex.join(["python", "-m", "launch.submit", *(word for word in own if word != "--follow"), "--"])
    try:
        job, config = submit(given, training_flags(given, flags), launcher)
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except FailedJobError:  # submitit has printed what sbatch said
        return 1
    except FailedSubmissionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if given.cluster == "debug":
        return int(job.result()["exit_code"])
    ranks = given.nodes * given.tasks_per_node
    print(f"job {job.job_id} on {given.cluster}: {ranks} rank{'s' if ranks > 1 else ''}")
    print(f"  run   {config.output_dir or Path('runs') / f'slurm-{job.job_id}'}")
    others = f" (other ranks: {job.job_id}_<rank>_log.out beside it)" if ranks > 1 else ""
    print(f"  log   {job.paths.stdout}{others}")
    if given.cluster == "slurm":
        print(f"  stop  scancel {job.job_id}")
    sys.stdout.flush()
    if not given.follow:
        return 0
    ended = slurm_outcome if given.cluster == "slurm" else local_outcome
    try:
        return follow(job, lambda: ended(job))
    except KeyboardInterrupt:
        print(f"\nno longer following; job {job.job_id} goes on", file=sys.stderr)
        return 130


def _positive(word: str) -> int:
    if not word.isdigit() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word} is not a whole number above 0")
    return int(word)


if __name__ == "__main__":
    sys.exit(main())
