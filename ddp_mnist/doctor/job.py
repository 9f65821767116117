"""The doctor's look at what the job was told and will reach: launcher, batch, data files, run directory, W&B, SLURM.

What needs an installed package is imported where it is used, as in `doctor_machine.py`.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import socket
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from ddp_mnist.doctor.finding import Finding, count, number
from ddp_mnist.errors import JobError, UsageError

if TYPE_CHECKING:
    from ddp_mnist.config import TrainConfig

PROBE = 3.0
"""Seconds to wait for a connection."""
LITTLE_SPACE = 200e6
"""Bytes: unpacked MNIST takes 66 MB, a run less than 1."""
MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "SLURM_PROCID")
LOCAL_RANKS = (
    "LOCAL_RANK",
    "MPI_LOCALRANKID",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MV2_COMM_WORLD_LOCAL_RANK",
    "SLURM_LOCALID",
)


# --- Launch -----------------------------------------------------------------------------------------------------------


def is_first() -> bool:
    """Rank 0, also where the job would not notice that there are others."""
    return number(os.environ, *RANKS, default=0) == 0


def is_first_here() -> bool:
    """The first rank on its machine."""
    return number(os.environ, *LOCAL_RANKS, default=0) == 0


def launch(env: Mapping[str, str], parent: Sequence[str]) -> list[Finding]:
    """How many ranks, and who says so. `parent`: the command line of the process that started this one."""
    size = number(env, "WORLD_SIZE", default=1)
    tasks, mpi = number(env, "SLURM_STEP_NUM_TASKS", default=1), number(env, *MPI_SIZES, default=1)
    if "WORLD_SIZE" not in env and tasks > 1:
        text = f"one of {tasks} tasks of an srun step, but WORLD_SIZE is not set: each would train alone"
        return [Finding("problem", "launch", text, "sbatch slurm/train.sh, or srun slurm/rank.sh python -m ...")]
    if "WORLD_SIZE" not in env and mpi > 1:
        text = f"one of {mpi} processes of mpirun, which does not set RANK and WORLD_SIZE: the job refuses"
        return [Finding("problem", "launch", text, f"torchrun --nproc-per-node {mpi} -m ddp_mnist.train")]
    found = [Finding("ok", "launch", f"{count(size, 'rank')}: {who_says(env)}")]
    asked = asked_processes(parent)
    if asked > size:
        text = f"accelerate launch was asked for {asked} processes and has started {size}"
        advice = f"accelerate launch --config_file launch/cpu.yaml, or torchrun --nproc-per-node {asked}"
        found.append(Finding("warning", "launch", text, advice))
    return found


def batch(config: TrainConfig, world_size: int) -> Finding:
    try:
        config.check_world_size(world_size)
    except UsageError as error:
        return Finding("problem", "batch", str(error))
    share = config.batch_size // world_size
    return Finding("ok", "batch", f"{count(config.batch_size, 'image')} a step, {share} of them on each rank")


def check_variables(env: Mapping[str, str]) -> None:
    """Raises: JobError where a variable of the launchers holds something else than they set."""
    for name, least in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}.items():
        value = env.get(name, "1")
        if not value.isdecimal() or int(value) < least:
            raise JobError(f"{name} is {value!r}; expected a whole number of at least {least}: `unset {name}`?")


def who_says(env: Mapping[str, str]) -> str:
    """Which launcher has set the world size, as far as its variables show."""
    accelerate = "ACCELERATE_MIXED_PRECISION" in env
    if "WORLD_SIZE" not in env:
        return "accelerate launch, one process" if accelerate else "plain python, no launcher has set WORLD_SIZE"
    if "TORCHELASTIC_RUN_ID" in env:
        name = "accelerate launch" if accelerate else "torchrun"
    elif "SLURM_STEP_ID" in env:
        name = "slurm/rank.sh"
    else:
        name = "a launcher unknown here, or the shell,"
    return f"{name} has set WORLD_SIZE={env['WORLD_SIZE']}"


def asked_processes(command: Sequence[str]) -> int:
    """What the command line of `accelerate launch` asks for, by flag or config file; 0 where it does not say."""
    if "launch" not in command or not any("accelerate" in word for word in command):
        return 0
    line = " ".join(command)
    if match := re.search(r"--num[_-]processes[ =](\d+)", line):
        return int(match[1])
    if file := re.search(r"--config[_-]file[ =](\S+)", line):
        with suppress(OSError, UnicodeDecodeError):
            match = re.search(r"^num_processes:\s*(\d+)", Path(file[1]).read_text(), re.MULTILINE)
            return int(match[1]) if match else 0
    return 0


def parent_command() -> list[str]:
    """Empty where there is no /proc."""
    with suppress(OSError):
        return Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
    return []


# --- Files ------------------------------------------------------------------------------------------------------------


def dataset(name: str, root: Path) -> Finding:
    """Changes nothing: what is only there as .gz stays packed."""
    from ddp_mnist.data import mnist

    wanted = "mnist" if name == "auto" else name
    seen = mnist.verify(wanted, root)
    folder, bad = seen[0].path.parent, [each for each in seen if each.status != "ok"]
    if not bad:
        return Finding("ok", "data", f"{wanted}: 4 files verified in {folder}")
    if wanted == "synthetic":
        return Finding("ok", "data", f"synthetic: the job draws the digits into {folder}")
    bad = [each for each in bad if not packed(each.path, mnist.SOURCES[wanted].md5)]
    if not bad:
        return Finding("ok", "data", f"{wanted}: the .gz files in {folder} are good, the job unpacks them")
    text = f"{wanted} is not staged, {bad[0].path} is {bad[0].status}"
    if bad[0].status == "damaged":
        text += f" ({bad[0].reason})"
    which = "" if wanted == "mnist" else f" --dataset {wanted}"
    advice = f"python -m ddp_mnist.data fetch{which} --data-dir {shlex.quote(str(root))}, where there is internet"
    if os.access(existing(root), os.W_OK) and reachable(mnist.SOURCES[wanted].mirror):
        return Finding("warning", "data", f"{text}: the job would download it at its start", advice)
    if name == "auto":
        text += ": the job would train on generated digits, which are not MNIST"
        return Finding("warning", "data", text, advice)
    return Finding("problem", "data", f"{text}, and cannot be downloaded here", advice)


def packed(path: Path, md5: Mapping[str, tuple[str, str]]) -> bool:
    """Is the .gz beside the raw file `path` what it must be? `md5`: as in mnist.Source."""
    with suppress(OSError):
        content = path.with_name(f"{path.name}.gz").read_bytes()
        return hashlib.md5(content, usedforsecurity=False).hexdigest() == md5[path.name][0]
    return False


def output(path: Path) -> Finding:
    """Could a run be written there and hold its lock? Tried in a folder that is removed again."""
    import filelock

    home = existing(path)
    try:
        with TemporaryDirectory(prefix=".doctor-", dir=home) as folder:
            lock = works = None
            with suppress(OSError):
                lock = filelock.FileLock(Path(folder, "lock"), timeout=0, fallback_to_soft=False)
                lock.acquire()
                works = not takes(Path(folder, "lock"))
                lock.release()
            free = shutil.disk_usage(folder).free
    except OSError as error:
        text = f"{path} cannot be written: {error.strerror or error}"
        return Finding("problem", "output", text, "--output-dir DIR, where you may write")
    text = f"{path} can be written, {free / 1e9:.1f} GB free"
    if not works:
        text += ", but the file system has no locks: two jobs in one directory would not notice"
        return Finding("warning", "output", text, "see to it that only one job uses a run directory")
    if free < LITTLE_SPACE:
        return Finding("warning", "output", text, "make room, or --output-dir DIR on another disk")
    return Finding("ok", "output", f"{text}, locks work")


def takes(path: Path) -> bool:
    """Can the lock be taken that another holder has? If so it locks nothing."""
    import filelock

    try:
        with filelock.FileLock(path, timeout=0, fallback_to_soft=False):
            return True
    except filelock.Timeout:
        return False


def existing(path: Path) -> Path:
    """`path`, or the nearest directory or file above it that is there."""
    path = path.expanduser()
    return next((each for each in (path, *path.parents) if each.exists()), Path())


# --- Services ---------------------------------------------------------------------------------------------------------


def wandb(config: TrainConfig) -> Finding:
    """Where would the run be mirrored to? The mirror decides, as at the start of a run; no key is ever shown."""
    from ddp_mnist.wandb_mirror import mirror

    mode = mirror.decide(config)
    text = mode.name + (f": {mode.why}" if mode.why else "")
    if mode.surprising or (mode.why and not mirror.no_credentials()):
        return Finding("warning", "wandb", text, "--wandb offline, if that is meant: the run is kept and sent later")
    return Finding("ok", "wandb", text)


def reachable(url: str, limit: float = PROBE) -> bool:
    """Does its host, or the proxy in front of it, take a connection within `limit` seconds?"""
    answered = threading.Event()

    def connect() -> None:
        with suppress(OSError, ValueError):
            at = urlsplit(url)
            proxy = getproxies().get(at.scheme)
            if proxy and not proxy_bypass(at.hostname or ""):
                at = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
            port = at.port or {"https": 443}.get(at.scheme, 80)
            with socket.create_connection((at.hostname or "", port), limit):
                answered.set()

    # Not in this thread: to look a name up has no time limit.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(limit)
    return answered.is_set()


def slurm(env: Mapping[str, str], sbatch: bool, allowed: int) -> list[Finding]:
    """Is this a job, and which of SLURM's traps is it in? `allowed`: CPUs that this process may use."""
    job = env.get("SLURM_JOB_ID")
    if job is None:
        text = "not in a job; submit with sbatch slurm/train.sh" if sbatch else "none here"
        return [Finding("ok", "slurm", text)]
    step, tasks = env.get("SLURM_STEP_ID"), number(env, "SLURM_STEP_NUM_TASKS", default=1)
    place = f"step {step} of {count(tasks, 'task')}" if step else "outside any srun step"
    text = f"job {job} on {count(number(env, 'SLURM_JOB_NUM_NODES', default=1), 'node')}, {place}{time_left(job)}"
    found = [Finding("ok", "slurm", text)]
    spread = number(env, "SLURM_NTASKS", default=1)
    if spread > 1 and tasks == 1 and "WORLD_SIZE" not in env:
        text = f"the allocation has SLURM_NTASKS={spread}, but what is typed here is one process"
        found.append(Finding("warning", "slurm", text, "srun slurm/rank.sh python -m ddp_mnist.train"))
    if "SLURM_GPUS_PER_TASK" in env:
        text = "--gpus-per-task shows each rank one GPU only, and calls it 0 on all of them"
        found.append(Finding("warning", "slurm", text, "--gpus-per-node in its place"))
    wanted = number(env, "SLURM_CPUS_PER_TASK", default=1)
    if step and wanted > allowed:
        text = (
            f"{wanted} CPUs per task were asked for and {allowed} can be used: srun does not take them over from sbatch"
        )
        found.append(Finding("warning", "slurm", text, f"srun --cpus-per-task={wanted}"))
    return found


def time_left(job: str) -> str:
    with suppress(OSError, subprocess.SubprocessError):
        command = ["squeue", "--noheader", "--jobs", job, "--format", "%L"]
        left = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PROBE).stdout.strip()
        return f", {left} left" if left else ""
    return ""
