"""The doctor's checks: flags and launcher, this machine, what the job will reach, the ranks together."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import statistics
import time
import urllib.error
import urllib.request
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from accelerate.utils import gather_object

from ddp_mnist.config import TrainConfig
from ddp_mnist.data import mnist
from ddp_mnist.distributed import launcher
from ddp_mnist.distributed.context import Context, translate_collective_errors
from ddp_mnist.distributed.threads import allowed_cpus
from ddp_mnist.errors import JobError, UsageError
from ddp_mnist.run import directory
from ddp_mnist.wandb_mirror import mirror

MIRROR_SECONDS = 3.0  # for a mirror of the data to answer
REPEATS = 30
GRADIENTS = 9_098  # parameters of the default network: 36 kB of fp32 are exchanged in each step
OTHER_LAUNCHERS = {"srun": "SLURM_STEP_NUM_TASKS", "mpirun": "OMPI_COMM_WORLD_SIZE", "mpiexec": "PMI_SIZE"}


@dataclass(frozen=True)
class Finding:
    """A line of the report: what was found, and where it is not ok, what to type."""

    status: Literal["ok", "warning", "problem"]  # problem: the job would not start
    topic: str
    text: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.status:7}  {self.topic}: {self.text}" + (f" -> {self.advice}" if self.advice else "")


def examine(config: TrainConfig, *, is_main: bool) -> list[Finding]:
    """Return all findings, on rank 0 those of the others too. Collective. Raise JobError as `meet` does."""
    found = [*launch(), batch(config), device(), precision(config.mixed_precision)]
    if launcher.is_first_on_its_machine():
        found.append(dataset(config.dataset, config.data_dir))
    if is_main:
        found += [output(config.output_dir or Path("runs")), wandb(config), *slurm()]
    bad = [each for each in found if each.status == "problem" and each.topic in ("launch", "device", "precision")]
    if not bad:
        return meet(config, found, is_main=is_main)
    if os.environ.get("LOCAL_RANK") == "0" and not is_main:  # rank 0 is on another machine
        raise JobError(f"{socket.gethostname()}: {bad[0].text} -> {bad[0].advice}", local=True)
    return found


def launch() -> list[Finding]:
    """Say how many ranks there are, and which launcher says so."""
    for other, variable in OTHER_LAUNCHERS.items():
        if "WORLD_SIZE" not in os.environ and (started := _integer(variable)) > 1:
            text = f"one of {started} processes of {other}, but WORLD_SIZE is not set: each would train alone"
            advice = f"srun slurm/rank.sh python -m ..., or torchrun --nproc-per-node {started} -m ..."
            return [Finding("problem", "launch", text, advice)]
    name = "a launcher unknown here, or the shell,"
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        name = "accelerate launch"
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        name = "torchrun"
    elif "SLURM_STEP_ID" in os.environ:
        name = "slurm/rank.sh"
    size = launcher.world_size_from_environment()
    text = f"{name} has set WORLD_SIZE={size}" if "WORLD_SIZE" in os.environ else "no launcher has set WORLD_SIZE"
    found = [Finding("ok", "launch", f"{_count(size, 'rank')}: {text}")]
    if (asked := _asked_processes()) > size:
        text = f"accelerate launch was asked for {asked} processes and has started {size}"
        advice = f"accelerate launch --config_file launch/cpu.yaml, or torchrun --nproc-per-node {asked}"
        found.append(Finding("warning", "launch", text, advice))
    return found


def _asked_processes() -> int:
    with suppress(OSError):  # no Linux
        command = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
        if match := re.search(r"accelerate\S* launch .*--num[_-]processes[ =](\d+)", command):
            return int(match[1])
    return 1


def batch(config: TrainConfig) -> Finding:
    """Say which share of the global batch a rank gets."""
    size = launcher.world_size_from_environment()
    try:
        config.check_world_size(size)
    except UsageError as error:
        return Finding("problem", "batch", str(error))
    text = f"{_count(config.batch_size, 'image')} a step, {config.batch_size // size} of them on each rank"
    return Finding("ok", "batch", text)


def device() -> Finding:
    """Say what the ranks on this machine would compute on, and try this rank's GPU."""
    ranks = launcher.local_world_size_from_environment()
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not visible:
        return _no_gpu(ranks)
    text = f"{_count(visible, 'GPU')}: {torch.cuda.get_device_name(0)}"
    # A GPU for which this torch has no kernels is listed all the same, and fails in the first step.
    try:
        torch.ones(8, device=f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % visible}").sum().item()
    except RuntimeError as error:
        text += f" cannot compute with torch {torch.__version__}: {_one_line(error)}"
        return Finding("problem", "device", text, "a torch that is built for this GPU, or a newer driver")
    if ranks > visible:
        advice = f"one rank per GPU is faster: --nproc-per-node {visible}"
        return Finding("warning", "device", f"{ranks} ranks on this machine share {text}, over gloo", advice)
    return Finding("ok", "device", text)


def _no_gpu(ranks: int) -> Finding:
    if torch.backends.mps.is_available() and ranks == 1:
        return Finding("ok", "device", "an Apple GPU (MPS); several ranks would use the CPU")
    if shutil.which("nvidia-smi") is None:
        return Finding("ok", "device", "CPU: no NVIDIA driver here")
    if (hidden := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return Finding("ok", "device", f"CPU: CUDA_VISIBLE_DEVICES={hidden} hides the GPUs")
    text = f"CPU: there is an NVIDIA driver, but torch {torch.__version__} sees no GPU"
    return Finding("warning", "device", text, "python -m torch.utils.collect_env: which CUDA, which driver?")


def precision(asked: str) -> Finding:
    """Say whether the device has the arithmetic for --mixed-precision."""
    cuda = torch.cuda.is_available()
    if asked == "fp16" and not cuda and not torch.backends.mps.is_available():
        return Finding("problem", "precision", "fp16 needs a GPU and there is none", "--mixed-precision no, or bf16")
    if asked == "bf16" and not (cuda and torch.cuda.is_bf16_supported(including_emulation=False)):
        text = "bf16, but no GPU here has arithmetic for it: mostly slower than fp32"
        return Finding("warning", "precision", text, "--mixed-precision no")
    return Finding("ok", "precision", "fp32" if asked == "no" else f"{asked} in training, fp32 in evaluation")


def dataset(name: str, root: Path) -> Finding:
    """Say where the data would come from. Change nothing: what is only there as .gz stays packed."""
    wanted = "mnist" if name == "auto" else name
    states = mnist.verify(wanted, root)
    bad = [path for path, state in states.items() if state != "ok"]
    folder = next(iter(states)).parent
    if not bad:
        return Finding("ok", "data", f"{wanted}: {len(states)} files verified in {folder}")
    if wanted == "synthetic":
        return Finding("ok", "data", f"synthetic: the job draws the digits into {folder}")
    text = f"{wanted} is not staged, {bad[0]} is {states[bad[0]]}"
    advice = f"python -m ddp_mnist.data fetch --dataset {wanted} --data-dir {shlex.quote(str(root))} (needs internet)"
    try:
        mirrors, _ = mnist.published(wanted)
        if all(path.with_name(f"{path.name}.gz").exists() for path in bad):
            return Finding("ok", "data", f"{wanted}: the .gz files are in {folder}, the job verifies and unpacks them")
        if not os.access(_existing(root), os.W_OK):
            raise PermissionError(f"{root} cannot be written")
        with suppress(urllib.error.HTTPError):  # it answers
            urllib.request.urlopen(mirrors[0], timeout=MIRROR_SECONDS).close()
        return Finding("warning", "data", f"{text}: the job would download it at its start", advice)
    except (ImportError, OSError, ValueError, HTTPException) as error:
        text += f", and cannot be downloaded here ({_one_line(error)})"
    if name == "auto":
        text += ": the job would train on generated digits, which are not MNIST"
    return Finding("warning" if name == "auto" else "problem", "data", text, advice)


def output(path: Path) -> Finding:
    """Say whether a run could be written to `path`; tried in a folder that is removed again."""
    try:
        with TemporaryDirectory(prefix=".doctor-", dir=_existing(path)) as folder:
            free = shutil.disk_usage(folder).free
        if (path / directory.LOCK).exists() and (lock := directory.lock(path, patience=0)):
            lock.release()
    except JobError:
        text = f"{path} is held by another job that is still running"
        return Finding("problem", "output", text, "wait for it, stop it, or --output-dir DIR, another one")
    except OSError as error:
        text = f"{path} cannot be written: {error.strerror or error}"
        return Finding("problem", "output", text, "--output-dir DIR, where you may write")
    return Finding("ok", "output", f"{path} can be written, {free / 1e9:.1f} GB free")


def _existing(path: Path) -> Path:
    return next((each for each in (path, *path.parents) if each.exists()), Path())


def wandb(config: TrainConfig) -> Finding:
    """Say where the run would be mirrored to, as the mirror decides at the start of a run. No key is ever shown."""
    mode = mirror.decide(config)
    text = mode.name + (f": {mode.why}" if mode.why else "")
    if mode.surprising or (mode.why and mirror.credentials_error() is None):
        return Finding("warning", "wandb", text, "--wandb offline, if that is meant: the run is kept and sent later")
    return Finding("ok", "wandb", text)


def slurm() -> list[Finding]:
    """Say where in a SLURM job this is, and which of SLURM's traps it is in."""
    job, step, tasks = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_STEP_ID"), _integer("SLURM_STEP_NUM_TASKS")
    if job is None:
        text = "not in a job; submit with sbatch slurm/train.sh" if shutil.which("sbatch") else "none here"
        return [Finding("ok", "slurm", text)]
    place = f"step {step} of {_count(tasks, 'task')}" if step else "outside any srun step"
    found = [Finding("ok", "slurm", f"job {job} on {_count(_integer('SLURM_JOB_NUM_NODES'), 'node')}, {place}")]
    wanted, allowed = _integer("SLURM_CPUS_PER_TASK"), len(allowed_cpus())
    if _integer("SLURM_NTASKS") > 1 and "WORLD_SIZE" not in os.environ:
        text = f"the allocation has SLURM_NTASKS={_integer('SLURM_NTASKS')}, but what is typed here is one process"
        found.append(Finding("warning", "slurm", text, "srun slurm/rank.sh python -m ddp_mnist.train"))
    if "SLURM_GPUS_PER_TASK" in os.environ:
        text = "--gpus-per-task shows each rank one GPU only, and calls it 0 on all of them"
        found.append(Finding("warning", "slurm", text, "--gpus-per-node in its place"))
    if step and wanted > allowed:
        text = f"{wanted} CPUs per task were asked for and {allowed} can be used: srun does not take them from sbatch"
        found.append(Finding("warning", "slurm", text, f"srun --cpus-per-task={wanted}"))
    return found


def meet(config: TrainConfig, mine: list[Finding], *, is_main: bool) -> list[Finding]:
    """Bring the ranks together and return the findings of all. Collective. Raise JobError if that fails elsewhere."""
    try:
        with Context(config) as context, translate_collective_errors(context):
            everyone = gather_object([(socket.gethostname(), mine)])
            times = all_reduce_seconds(context)
            backend = context.accelerator.state.backend
    except JobError as error:
        text = _one_line(error).replace("--timeout-minutes", f"--timeout {60 * config.timeout_minutes:g}")
        if not is_main:
            raise JobError(text, local=True) from error
        return [*mine, Finding("problem", "ranks", text)]
    if len(everyone) == 1:
        return [*mine, Finding("ok", "ranks", f"1 rank with {_count(context.threads, 'thread')}, nothing to exchange")]
    merged = {each.text: each for each in everyone[0][1]}
    for rank, (host, findings) in enumerate(everyone):
        for each in findings:
            if each.status != "ok" and each.text not in merged:
                merged[each.text] = replace(each, text=f"rank {rank} on {host}: {each.text}")
    hosts = Counter(host for host, _ in everyone)
    places = ", ".join(f"{hosts[host]} on {host}" for host in hosts)
    met = f"{len(everyone)} ranks met over {backend}: {places}; {_count(context.threads, 'thread')} each"
    text = f"all-reduce of the 36 kB of gradients {1000 * statistics.median(times):.2f} ms (median of {REPEATS})"
    return [*merged.values(), Finding("ok", "ranks", met), Finding("ok", "ranks", text)]


def all_reduce_seconds(context: Context) -> list[float]:
    """Return how long it takes to sum as many fp32 numbers as there are gradients, REPEATS times. Collective."""
    values, times = torch.zeros(GRADIENTS, device=context.device), []
    for _ in range(3 + REPEATS):
        started = time.perf_counter()
        context.sum(values)[0].item()  # on a GPU: wait until it has happened
        times.append(time.perf_counter() - started)
    return times[3:]


def _integer(name: str) -> int:
    return int(os.environ.get(name, 1))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _one_line(message: object) -> str:
    return " ".join(str(message).split())
