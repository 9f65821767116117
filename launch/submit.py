"""Submit a training job with submitit: check its flags, hand it over, print where to look.

    python -m launch.submit --nodes 2 --gpus-per-node 8 --time-min 60 --follow -- --recipe fast --epochs 20

What follows `--` are training flags. Run it from the repository's root, on a disk that the nodes share.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError, pickle_load

from ddp_mnist.distributed.launcher import entry_point
from ddp_mnist.errors import JobError, UsageError
from launch.check import check
from launch.job import Job

NOT_ENDED = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "REQUEUED", "RESIZING")


def parse_options() -> argparse.Namespace:
    """Return the options, and as `flags` the words behind `--`. Exit with 2 on a mistake."""
    parser = argparse.ArgumentParser(prog="python -m launch.submit", usage="%(prog)s [options] -- TRAINING_FLAGS")
    add, usual = parser.add_argument, "(default: %(default)s)"
    places = f"local: run on this machine, in the background; debug: run in this process {usual}"
    add("--cluster", default="slurm", choices=["slurm", "local", "debug"], help=places)
    add("--nodes", default=1, type=int, help=f"machines {usual}")
    add("--gpus-per-node", default=0, type=int, help="GPUs per node, one rank for each GPU (default: 0, use CPUs)")
    add("--tasks-per-node", type=int, help="ranks per node (default: one per GPU; without GPUs 1)")
    add("--cpus-per-task", default=1, type=int, help=f"CPUs per rank {usual}")
    add("--mem-gb", type=float, help="memory per node in GB (default: the cluster's)")
    add("--time-min", default=60, type=int, help=f"time limit of an attempt in minutes {usual}")
    add("--partition", help="SLURM partition (default: the cluster's)")
    add("--account", help="SLURM account (default: yours)")
    add("--sbatch", default=[], action="append", metavar="NAME=VALUE", help="any other option of sbatch; repeatable")
    add("--setup", default=[], action="append", metavar="COMMAND", help="shell command to run before ranks; repeatable")
    add("--max-requeues", default=20, type=int, help=f"how often the job may be put back into the queue {usual}")
    add("--job-name", default="ddp_mnist", help=f"the name that squeue shows {usual}")
    add("--folder", default="runs/submitit/%j", help=f"folder for submitit's files and the logs {usual}")
    add("--follow", action="store_true", help="show rank 0's log until the job ends; exit with its exit code")
    add("flags", nargs="*", help="training flags, see python -m ddp_mnist.train --help")
    given = parser.parse_args()
    given.tasks_per_node = given.tasks_per_node or given.gpus_per_node or 1
    for name in ("nodes", "tasks_per_node", "cpus_per_task", "time_min"):
        if (value := getattr(given, name)) < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}, expected a whole number above 0")
    for cluster, name in (("local", "nodes"), ("debug", "nodes"), ("debug", "tasks_per_node")):
        if given.cluster == cluster and (value := getattr(given, name)) > 1:
            parser.error(f"--{name.replace('_', '-')} is {value}, expected 1 for --cluster {cluster}")
    return given


def make_executor(given: argparse.Namespace) -> submitit.AutoExecutor:
    """Return submitit's executor with everything but the job."""
    limits = {"slurm_max_num_timeout": given.max_requeues, "local_max_num_timeout": given.max_requeues}
    executor = submitit.AutoExecutor(folder=given.folder, cluster=given.cluster, **limits)
    # Tried before srun, or each rank would end with a traceback when it unpickles the job.
    advice = "error: keep this repository and its Python on a disk that all nodes share, or use --setup"
    import_check = f"{shlex.quote(sys.executable)} -m launch.check || {{ echo '{advice}' >&2; exit 1; }}"
    # srun does not take the CPUs over from sbatch, and one dead rank must not leave the others waiting.
    srun = [f"--cpus-per-task={given.cpus_per_task}", "--kill-on-bad-exit=1", "--wait=0", "--open-mode=append"]
    others = (word.partition("=") for word in given.sbatch)
    executor.update_parameters(
        name=given.job_name,
        nodes=given.nodes,
        gpus_per_node=given.gpus_per_node or None,
        tasks_per_node=given.tasks_per_node,
        cpus_per_task=given.cpus_per_task,
        mem_gb=given.mem_gb,
        timeout_min=given.time_min,
        stderr_to_stdout=True,
        slurm_partition=given.partition,
        slurm_account=given.account,
        slurm_signal_delay_s=120,  # as in slurm/train.sh: two minutes to save
        slurm_srun_args=srun,
        slurm_setup=[*given.setup, import_check],
        slurm_additional_parameters={"requeue": True} | {name: value or True for name, _, value in others},
    )
    return executor


def outcome(job: submitit.Job, cluster: str) -> tuple[str, int] | None:
    """Return SLURM's word for how the job ended and its exit code, as a shell gives it; None while it goes on."""
    pickle = job.paths.result_pickle  # ("success", exit code) or ("error", traceback)
    finished = ("COMPLETED", 0) if pickle.exists() and pickle_load(pickle)[0] == "success" else ("FAILED", 1)
    if cluster == "local":  # which keeps no exit codes
        return finished if job.done() else None
    # submitit asks the accounting store, which not every cluster has; the controller knows, too.
    answer = subprocess.run(["scontrol", "--oneliner", "show", "job", job.job_id], capture_output=True, text=True)
    if "Invalid job id" in answer.stderr:  # it ended so long ago that the controller has forgotten it
        return finished
    found = dict(re.findall(r"(\S+?)=(\S*)", answer.stdout))
    state = found.get("JobState", "PENDING")  # a busy controller does not answer
    if state in NOT_ENDED:
        return None
    code, signal_number = map(int, found["ExitCode"].split(":"))
    return state, 0 if state == "COMPLETED" else code or (128 + signal_number if signal_number else 1)


def follow(job: submitit.Job, cluster: str) -> int:
    """Copy rank 0's log to the console until the job has ended. Return its exit code."""
    print("following the log; Ctrl-C ends that, not the job", flush=True)
    position, ended = 0, None
    while ended is None:
        time.sleep(2)
        ended = outcome(job, cluster)  # before reading, so that the last lines are not missed
        with suppress(FileNotFoundError), job.paths.stdout.open(errors="replace") as file:
            file.seek(position)
            print(file.read(), end="", flush=True)
            position = file.tell()
    state, code = ended
    if code:
        print(f"error: job {job.job_id} is {state}, exit code {code}", file=sys.stderr)
    return code


@entry_point
def main() -> int:
    """Run the command. Return its exit code."""
    given = parse_options()
    if program := os.environ.get("PROGRAM"):
        raise UsageError(f"PROGRAM is {program!r}, which is for slurm/train.sh: use sbatch, or `unset PROGRAM`.")
    if given.cluster == "slurm":  # it assigns CPUs to ranks; elsewhere the job itself divides them
        defaults = ["--threads", str(given.cpus_per_task)]
    else:  # not by the job's id, which is a process's and comes again
        defaults = ["--output-dir", f"runs/local-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"]
    ranks = given.nodes * given.tasks_per_node
    config = check(["--dataset", "mnist", *defaults, *given.flags], ranks)
    if given.cluster == "slurm" and shutil.which("sbatch") is None:
        raise UsageError("there is no sbatch on PATH: submit from a login node of a cluster, or use --cluster local.")
    # A job that is submitted from inside another one would inherit its number, tasks and GPUs.
    for name in [each for each in os.environ if each.startswith("SLURM_") and each != "SLURM_CONF"]:
        del os.environ[name]
    options = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    launcher = shlex.join(["python", "-m", "launch.submit", *(word for word in options if word != "--follow"), "--"])
    try:
        job = make_executor(given).submit(Job(config, launcher))
    except FailedJobError:  # submitit has printed what sbatch said
        return 1
    except FailedSubmissionError as error:
        raise JobError(str(error)) from error
    if given.cluster == "debug":
        return job.result()
    print(f"job {job.job_id} on {given.cluster}, ranks: {ranks}")
    print(f"  run   {config.output_dir or Path('runs') / f'slurm-{job.job_id}'}")
    print(f"  log   {job.paths.stdout}", flush=True)
    return follow(job, given.cluster) if given.follow else 0


if __name__ == "__main__":
    sys.exit(main())
