"""The doctor's checks: flags and launcher, this machine, what the job will reach, the ranks together."""

import os
import shutil
import socket
import timeit
import urllib.error
import urllib.request
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from accelerate.utils import gather_object

from ddp_mnist.config import TrainConfig
from ddp_mnist.data import mnist
from ddp_mnist.distributed import launcher
from ddp_mnist.distributed.context import Context, translate_errors
from ddp_mnist.distributed.machine import allowed_cpus
from ddp_mnist.errors import JobError
from ddp_mnist.storage import directory
from ddp_mnist.wandb_mirror import mirror


@dataclass(frozen=True)
class Finding:
    """A line of the report: what was found, and where it is not ok, what to type."""

    status: Literal["ok", "warning", "problem"]  # problem: the job would not start
    topic: str
    text: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.status:7}  {self.topic}: {self.text}" + (f" -> {self.advice}" if self.advice else "")


def examine(config: TrainConfig) -> list[Finding]:
    """Return the findings of all ranks on rank 0, and none on the others. Collective. Raises: JobError, as `meet`."""
    is_main = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"  # the latter: srun without rank.sh
    found = [*launch(config), device(), precision(config.mixed_precision)]
    if launcher.is_first_on_its_machine():
        found.append(dataset(config.dataset, config.data_dir))
    if is_main:
        found += [output(config.output_dir or Path("runs")), wandb(config), *slurm()]
    found = meet(config, found)
    return found if is_main else []


def launch(config: TrainConfig) -> list[Finding]:
    """Say how many ranks there are and why, and what a rank gets of each batch."""
    size = launcher.from_environment("WORLD_SIZE")
    why = "WORLD_SIZE says" if "WORLD_SIZE" in os.environ else "no launcher has set WORLD_SIZE"
    share = f"{config.batch_size // size} of a step's {config.batch_size} images on each rank"
    found = [Finding("ok", "launch", f"world size {size}, as {why}: {share}")]
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        text = f"the name of this machine, {socket.gethostname()}, does not resolve: torchrun would hang"
        advice = "torchrun --local-addr 127.0.0.1 ..., or a line with the name in /etc/hosts"
        found.append(Finding("warning", "launch", text, advice))
    return found


def device() -> Finding:
    """Say what the ranks on this machine would compute on."""
    ranks = launcher.from_environment("LOCAL_WORLD_SIZE")
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        text = f"{gpus} x {torch.cuda.get_device_name(0)}"
        if ranks <= gpus:
            return Finding("ok", "device", text)
        advice = f"one rank per GPU is faster: --nproc-per-node {gpus}, or --gpus-per-node instead of --gpus-per-task"
        return Finding("warning", "device", f"{ranks} ranks on this machine share {text}, over gloo", advice)
    if torch.backends.mps.is_available() and ranks == 1:
        return Finding("ok", "device", "an Apple GPU (MPS); several ranks would use the CPU")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shutil.which("nvidia-smi") and hidden is None:
        text = f"CPU: there is an NVIDIA driver, but torch {torch.__version__} sees no GPU"
        return Finding("warning", "device", text, "python -m torch.utils.collect_env: which CUDA, which driver?")
    return Finding("ok", "device", "CPU" if hidden is None else f"CPU, with CUDA_VISIBLE_DEVICES={hidden}")


def precision(asked: str) -> Finding:
    """Say in which arithmetic the job would train."""
    if asked == "bf16" and not (torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)):
        text = "bf16, but no GPU here has arithmetic for it: mostly slower than fp32"
        return Finding("warning", "precision", text, "--mixed-precision no")
    return Finding("ok", "precision", "fp32" if asked == "no" else f"{asked} in training, fp32 in evaluation")


def dataset(name: str, root: Path) -> Finding:
    """Say where the data would come from. Change nothing: what is only there as .gz stays packed."""
    wanted = "mnist" if name == "auto" else name
    if wanted == "synthetic":
        return Finding("ok", "data", "synthetic: the job draws its digits where they are missing")
    try:
        for split in mnist.NAMES:
            mnist.read_split(wanted, root, split, fetch=False)
        return Finding("ok", "data", f"{wanted}: verified in {root}")
    except mnist.DataError as error:
        advice = str(error)
    try:
        mirrors, _ = mnist.published(wanted)
        with suppress(urllib.error.HTTPError):  # it answers
            urllib.request.urlopen(mirrors[0], timeout=3).close()
        return Finding("warning", "data", f"{wanted} is not staged: the job would download it at its start", advice)
    except (ImportError, OSError) as error:
        text = f"{wanted} is not staged and cannot be downloaded here ({error})"
    if name != "auto":
        return Finding("problem", "data", text, advice)
    text += ": the job would train on generated digits, which are not MNIST"
    return Finding("warning", "data", text, advice)


def output(path: Path) -> Finding:
    """Say whether a run could be written to `path`; tried in a folder that is removed again."""
    existing = next(each for each in (path, *path.parents) if each.exists())
    try:
        with TemporaryDirectory(prefix=".doctor-", dir=existing) as folder:
            free = shutil.disk_usage(folder).free
        if (path / directory.LOCK).exists() and (lock := directory.lock(path, patience=0)):
            lock.release()
    except JobError as error:  # another job has it
        return Finding("problem", "output", str(error))
    except OSError as error:
        text = f"{path} cannot be written: {error.strerror or error}"
        return Finding("problem", "output", text, "--output-dir DIR, where you may write")
    return Finding("ok", "output", f"{path} can be written, {free / 1e9:.1f} GB free")


def wandb(config: TrainConfig) -> Finding:
    """Say where the run would be mirrored to, as the mirror decides at the start of a run. No key is ever shown."""
    mode = mirror.decide(config)
    if mode.surprising or (mode.why and mirror.credentials_error() is None):
        advice = "--wandb offline, if that is meant: the run is kept and sent later"
        return Finding("warning", "wandb", str(mode), advice)
    return Finding("ok", "wandb", str(mode))


def slurm() -> list[Finding]:
    """Say where in a SLURM job this is, and which of SLURM's traps it is in."""
    job, step = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_STEP_ID")
    if job is None:
        return [Finding("ok", "slurm", "not in a job")]
    place = f"step {step}" if step else "outside any srun step"
    names = ("SLURM_JOB_NUM_NODES", "SLURM_NTASKS", "SLURM_CPUS_PER_TASK")
    nodes, tasks, wanted = (int(os.environ.get(name, 1)) for name in names)
    found = [Finding("ok", "slurm", f"job {job}, nodes: {nodes}, tasks: {tasks}, {place}")]
    if tasks > 1 and "WORLD_SIZE" not in os.environ:
        text = f"there are {tasks} tasks, but WORLD_SIZE is not set: each process would train alone"
        advice = "srun slurm/rank.sh python -m ddp_mnist.train"
        found.append(Finding("problem" if step else "warning", "slurm", text, advice))
    allowed = len(allowed_cpus())
    if step and wanted > allowed:
        text = f"{wanted} CPUs per task were asked for and {allowed} can be used: srun does not take them from sbatch"
        found.append(Finding("warning", "slurm", text, f"srun --cpus-per-task={wanted}"))
    return found


def meet(config: TrainConfig, mine: list[Finding]) -> list[Finding]:
    """Bring the ranks together, and add what the others have found and how they meet. Collective.

    Where that fails, rank 0 returns it as a finding; the others raise it as a JobError.
    """
    try:
        with Context(config) as context, translate_errors(context):
            everyone = gather_object([(socket.gethostname(), mine)])
            gradients = torch.zeros(9_098, device=context.device)  # of the default network
            # On a GPU `item` waits until the sum is there.
            seconds = timeit.repeat(lambda: context.sum(gradients)[0].item(), number=1, repeat=30)
            backend = context.accelerator.state.backend
    except (JobError, RuntimeError) as error:  # the latter: a GPU for which this torch has no kernels
        text = " ".join(str(error).split()).replace("--timeout-minutes", f"--timeout {60 * config.timeout_minutes:g}")
        if launcher.from_environment("RANK") > 0:
            raise JobError(text, local=getattr(error, "local", True)) from error
        return [*mine, Finding("problem", "ranks", text)]
    for rank, (host, findings) in enumerate(everyone):
        new = [each for each in findings if each.status != "ok" and each not in mine]
        mine += [replace(each, text=f"rank {rank} on {host}: {each.text}") for each in new]
    text = f"1 rank, threads: {context.threads}, nothing to exchange"
    if len(everyone) > 1:
        places = ", ".join(f"{ranks} on {host}" for host, ranks in Counter(host for host, _ in everyone).items())
        text = f"{len(everyone)} ranks met over {backend}: {places}; threads of each: {context.threads}; "
        text += f"all-reduce of the 36 kB of gradients {1000 * median(seconds):.2f} ms (median of 30)"
    return [*mine, Finding("ok", "ranks", text)]
