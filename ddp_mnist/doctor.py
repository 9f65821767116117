"""What will a launch do here? One line for each topic, and where it is not ok, what to type.

    python -m ddp_mnist.doctor [training flags]
    torchrun --nproc-per-node 4 -m ddp_mnist.doctor --dataset mnist

Start it as the job would be started. It trains nothing and leaves nothing behind; rank 0 prints. Exit code 0: the job
would start. 1: it would not. 2: a mistake in the flags.

SLURM_* are read here only to tell what they say: slurm/ is what acts on them.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
import os
import platform
import re
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
import tomllib
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import import_module, metadata, util
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from ddp_mnist.errors import JobError, UsageError

# Nothing that needs an installed package is imported up here: that one is missing is the first thing to tell.
if TYPE_CHECKING:
    from ddp_mnist.config import TrainConfig
    from ddp_mnist.world import World

TOPICS = ("packages", "launch", "batch", "device", "precision", "cpu", "data", "output", "wandb", "slurm", "ranks")
PROBE = 3.0
"""Seconds to wait for a connection."""
IMPORT_LIMIT = 120.0
"""Seconds for an import in another process: torchvision takes 6 with torch, on a cold network disk many more."""
REPEATS = 30
"""Timed all-reduces of each size."""
GRADIENTS = 9_098
"""Parameters of the default network: 36 kB of fp32 are exchanged in each step."""
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
MIRRORS = {
    "mnist": "https://ossci-datasets.s3.amazonaws.com",
    "fashion-mnist": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
}

Status = Literal["ok", "warning", "problem"]


@dataclasses.dataclass(frozen=True)
class Finding:
    status: Status
    """problem: the job would not start."""
    topic: str
    text: str
    advice: str = ""
    """What to type or to change."""


@dataclasses.dataclass(frozen=True)
class Rank:
    """What one rank tells the others."""

    host: str
    cpus: frozenset[int]
    """Numbers of the CPUs it may use."""
    threads: int
    versions: dict[str, str]
    findings: list[Finding]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ddp_mnist.doctor",
        description="What will a launch do here? Start it as the job would be started.",
        epilog="All flags of python -m ddp_mnist.train are taken too, and judged as the job would judge them.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--timeout", type=float, default=30.0, metavar="S", help="wait so long for the other ranks")
    options, flags = parser.parse_known_args(argv)
    logging.basicConfig(level=logging.ERROR, format="warning: %(message)s")
    # A rank that waits in vain would print 60 lines of C++ frames around its one message.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    try:
        findings = examine(flags, options.timeout)
    except JobError as error:
        if is_first() or error.local:
            print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
        return error.exit_code
    # As in training: a launcher ends the others with the first rank that fails, so one alone tells.
    if not is_first():
        return 0
    code = int(any(finding.status == "problem" for finding in findings))
    if options.json:
        print(json.dumps({"exit_code": code, "findings": [dataclasses.asdict(each) for each in findings]}, indent=2))
    else:
        print(as_text(findings))
    return code


def examine(flags: Sequence[str], timeout: float) -> list[Finding]:
    """All findings, the same on every rank that could meet the others; `timeout` in seconds.

    Raises: UsageError for wrong flags; JobError on a rank other than 0 that cannot join; SystemExit as config.parse.
    """
    if not 3 <= timeout <= 86_400:
        raise UsageError(f"--timeout is {timeout:g}; expected seconds from 3 to 86400.")
    mine = packages(requirements(), versions())
    if failure := cannot_import("ddp_mnist.config"):
        return [*mine, failure]
    from ddp_mnist.config import parse

    check_variables(os.environ)
    config = parse(flags).replace(timeout_minutes=timeout / 60)
    if failure := cannot_import("ddp_mnist.world"):  # torch and Accelerate: after the flags, it takes seconds
        return [*mine, failure]
    mine += own_findings(config)
    for each in mine:  # where the ranks cannot meet, waiting for it tells nothing
        if each.status == "problem" and each.topic in ("launch", "device", "precision"):
            if is_first_here() and not is_first():  # rank 0 is on another machine and will not hear of it
                raise JobError(f"{socket.gethostname()}: {each.text}", local=True)
            return in_order(mine)
    try:
        return in_order(meet(config, mine))
    except JobError as error:
        if not is_first():
            raise
        text = one_line(error).replace("--timeout-minutes", f"--timeout {timeout:g}")
        return in_order([*mine, Finding("problem", "ranks", text)])


def own_findings(config: TrainConfig) -> list[Finding]:
    """What this rank finds without the others. Files are looked at once a machine, the rest of the world once."""
    env = os.environ
    found = [*launch(env, parent_command()), batch(config, number(env, "WORLD_SIZE", default=1))]
    devices = look_for_devices(number(env, "LOCAL_RANK", default=0))
    found += [device(devices, env), precision(config.mixed_precision, devices)]
    found.append(cpu(len(allowed_cpus()), os.cpu_count() or 1, cpu_quota(), config.threads, env))
    staged = True
    if is_first_here():
        data = dataset(config.dataset, config.data_dir)
        staged = data.status == "ok"
        found.append(data)
    if is_first():
        found += torchvision(staged)
        found.append(output(config.output_dir or Path("runs")))
        found.append(wandb(config))
        found += slurm(env, shutil.which("sbatch") is not None, len(allowed_cpus()))
    return found


def is_first() -> bool:
    """Rank 0, also where the job would not notice that there are others."""
    return number(os.environ, *RANKS, default=0) == 0


def is_first_here() -> bool:
    """The first rank on its machine."""
    return number(os.environ, *LOCAL_RANKS, default=0) == 0


# --- Packages ---------------------------------------------------------------------------------------------------------


def requirements() -> list[str]:
    """What pyproject.toml asks for, Python first: from the installed package, else from the checkout."""
    with suppress(metadata.PackageNotFoundError):
        python = metadata.metadata("ddp_mnist")["Requires-Python"]
        needed = metadata.requires("ddp_mnist") or []
        return [f"python{python}", *(each for each in needed if "extra ==" not in each)]
    try:
        project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
        return [f"python{project['requires-python']}", *project["dependencies"]]
    except OSError:  # copied files: what is missing shows at the import
        return []


def versions() -> dict[str, str]:
    """Version by name, of Python and of every package that is required and installed."""
    found = {"python": platform.python_version()}
    for each in requirements()[1:]:
        name = re.split(r"[^\w.-]", each)[0]
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def packages(needed: Sequence[str], installed: Mapping[str, str]) -> list[Finding]:
    """`needed`: requirements as in pyproject.toml; `installed`: version by name."""
    try:
        from packaging.requirements import Requirement  # comes with Accelerate
    except ImportError:
        text = f"packaging is not installed for {sys.executable}"
        return [Finding("problem", "packages", text, "make install, or pip install --editable .")]
    bad = []
    for each in map(Requirement, needed):
        version = installed.get(each.name)
        if version is None:
            bad.append(Finding("problem", "packages", f"{each.name} is not installed", f"pip install '{each}'"))
        elif not each.specifier.contains(version, prereleases=True):
            advice = "a newer Python, and make install" if each.name == "python" else f"pip install '{each}'"
            bad.append(Finding("problem", "packages", f"{each.name} is {version}; expected {each.specifier}", advice))
    names = [name for name in ("python", "torch", "torchvision", "accelerate", "wandb") if name in installed]
    return bad or [Finding("ok", "packages", ", ".join(f"{name} {installed[name]}" for name in names))]


def cannot_import(module: str) -> Finding | None:
    try:
        import_module(module)
    except Exception as error:  # a broken installation may raise anything
        text = f"{module} cannot be imported with {sys.executable}: {one_line(error)}"
        return Finding("problem", "packages", text, "make install, or pip install --editable .")
    return None


def torchvision(staged: bool) -> list[Finding]:
    """Does it fit torch? Only the download needs it. Importing takes seconds, so only with a reason to doubt."""
    doubt = mismatch(build("torch"), build("torchvision"))
    failure = import_failure("torchvision", IMPORT_LIMIT) if doubt else ""
    if not failure:
        return []
    text = f"torchvision cannot be imported ({failure}): {doubt}"
    advice = "pip install --force-reinstall torch torchvision, both from the same index"
    return [Finding("warning" if staged else "problem", "packages", text, advice)]


def build(package: str) -> str:
    """The version with its build tag (2.15.0+cpu), from the package's own file: metadata often leaves the tag out."""
    with suppress(OSError, ImportError, AttributeError, TypeError, ValueError):
        text = Path(util.find_spec(package).origin).with_name("version.py").read_text()  # type: ignore[union-attr, arg-type]
        if match := re.search(r"^__version__\s*=\s*['\"]([^'\"]+)", text, re.MULTILINE):
            return match[1]
    return ""


def mismatch(torch: str, torchvision: str) -> str:
    """Why these two builds may not fit; empty where nothing speaks against them or nothing is known."""
    tags = [version.partition("+")[2] for version in (torch, torchvision)]
    if torch and torchvision and tags[0] != tags[1]:
        return f"torch is {torch}, torchvision {torchvision}"
    return ""


def import_failure(module: str, limit: float) -> str:
    """The error's last line when another Python imports `module` within `limit` seconds; empty if it can."""
    try:
        command = [sys.executable, "-c", f"import {module}"]
        ended = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=limit)
    except subprocess.TimeoutExpired:
        return f"not done after {limit:.0f} s"
    return (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1] if ended.returncode else ""


# --- Launch and machine -----------------------------------------------------------------------------------------------


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
        config.check_world(world_size)
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


class Devices(NamedTuple):
    """What torch and the system know of GPUs."""

    build: str
    """`CUDA 13.2`, `ROCm 7.1`; empty for a CPU-only torch"""
    driver: bool
    gpus: list[tuple[str, int]]
    """Visible GPUs: name, bytes of memory."""
    bf16: bool = False
    mps: bool = False
    complaint: str = ""
    """What torch warned of while looking."""
    failure: str = ""
    """Of computing something on this rank's GPU."""


def look_for_devices(local_rank: int) -> Devices:
    import torch

    version: Any = torch.version
    kind = f"CUDA {version.cuda}" if version.cuda else f"ROCm {version.hip}" if version.hip else ""
    driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    failure = ""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
        properties = [torch.cuda.get_device_properties(index) for index in range(visible)]
        bf16 = bool(properties) and torch.cuda.is_bf16_supported(including_emulation=False)
        if visible:
            try:  # a GPU for which this torch has no kernels is listed all the same, and fails in the first step
                torch.ones(8, device=f"cuda:{local_rank % visible}").sum().item()
            except RuntimeError as error:
                failure = one_line(error)
    complaint = "; ".join(one_line(each.message) for each in said)
    gpus = [(each.name, each.total_memory) for each in properties]
    return Devices(kind, driver, gpus, bf16, torch.backends.mps.is_available(), complaint, failure)


def device(found: Devices, env: Mapping[str, str]) -> Finding:
    here, hidden = number(env, "LOCAL_WORLD_SIZE", default=1), env.get("CUDA_VISIBLE_DEVICES")
    if found.gpus:
        return gpu(found, here, alone="SLURM_STEP_ID" in env and len(found.gpus) == 1)
    if found.mps and here == 1:
        return Finding("ok", "device", "an Apple GPU (MPS); several ranks would use the CPU")
    if not found.driver:
        return Finding("ok", "device", f"CPU: no NVIDIA driver here (torch is built for {found.build or 'the CPU'})")
    if not found.build:
        text = "CPU: there is an NVIDIA driver, but this torch is built for the CPU"
        return Finding("warning", "device", text, "pip install --force-reinstall torch torchvision, with CUDA")
    if hidden is None:
        text = f"CPU: there is an NVIDIA driver, but torch sees no GPU ({found.complaint or 'it does not say why'})"
        return Finding("warning", "device", text, f"nvidia-smi: is there a GPU, and a driver for {found.build}?")
    return Finding("ok", "device", f"CPU: CUDA_VISIBLE_DEVICES={hidden} hides the GPUs")


def gpu(found: Devices, here: int, *, alone: bool) -> Finding:
    """`here`: ranks on this machine; `alone`: SLURM may show each of them another GPU."""
    kinds = Counter(f"{name}, {memory / 2**30:.0f} GiB" for name, memory in found.gpus)
    text = "; ".join(f"{count(many, 'GPU')}: {kind}" for kind, many in kinds.items()) + f" ({found.build})"
    if found.failure:
        advice = "a torch that is built for this GPU, or a newer driver"
        return Finding("problem", "device", f"{text} cannot compute: {found.failure}", advice)
    if here > len(found.gpus) and alone:
        text = f"{count(here, 'rank')} on this machine, and this one sees {text}: --gpus-per-task calls each GPU 0"
        return Finding("warning", "device", text, "--gpus-per-node in its place")
    if here > len(found.gpus):
        advice = f"one rank per GPU is faster: --nproc-per-node {len(found.gpus)}"
        return Finding("warning", "device", f"{count(here, 'rank')} on this machine share {text}, over gloo", advice)
    if found.complaint:
        return Finding(
            "warning", "device", f"{text}: {found.complaint}", "a torch that is built for this GPU and driver"
        )
    return Finding("ok", "device", text)


def precision(asked: str, found: Devices) -> Finding:
    if asked == "fp16" and not found.gpus and not found.mps:
        return Finding("problem", "precision", "fp16 needs a GPU and there is none", "--mixed-precision no, or bf16")
    if asked == "bf16" and not found.bf16:
        where = "this GPU has no" if found.gpus else "few CPUs have"
        text = f"bf16, but {where} arithmetic for it: slower than fp32 (measured on a CPU: 3 times)"
        return Finding("warning", "precision", text, "--mixed-precision no")
    if asked != "no":
        return Finding("ok", "precision", f"{asked} in training, fp32 in evaluation")
    possible = "; bf16 and fp16 are possible" if found.bf16 else "; fp16 is possible" if found.gpus else ""
    return Finding("ok", "precision", f"fp32{possible}")


def cpu(allowed: int, present: int, quota: float | None, threads: int, env: Mapping[str, str]) -> Finding:
    """`allowed`: CPUs by affinity; `quota`: CPUs' worth of time that the container may use; `threads` 0: default."""
    here = number(env, "LOCAL_WORLD_SIZE", default=1)
    each = threads or max(1, allowed // here)
    text = f"{allowed} of {present} CPUs allowed; {count(here, 'rank')} here with {count(each, 'thread')} each"
    if quota is not None and each * here > quota + 0.5:
        return Finding(
            "warning", "cpu", f"{text}, but a quota of {quota:g} CPUs", f"--threads {max(1, int(quota / here))}"
        )
    return Finding("ok", "cpu", text)


def allowed_cpus() -> frozenset[int]:
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """CPUs' worth of time that this process's control groups (version 2 or 1) allow; None: no limit known."""
    limits: list[float] = []
    with suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            home = root / controllers if controllers else root
            inner = home / path.lstrip("/")
            for folder in (inner, *inner.parents):  # any level may limit what is below
                if folder.is_relative_to(home):
                    limits += _limits(folder)
    return min(limits, default=None)


def _limits(folder: Path) -> Iterator[float]:
    with suppress(OSError, ValueError):  # ValueError: "max", no limit
        quota, period = (folder / "cpu.max").read_text().split()
        yield int(quota) / int(period)
    with suppress(OSError, ValueError):
        if (microseconds := int((folder / "cpu.cfs_quota_us").read_text())) > 0:
            yield microseconds / int((folder / "cpu.cfs_period_us").read_text())


# --- Files ------------------------------------------------------------------------------------------------------------


def dataset(name: str, root: Path) -> Finding:
    """Changes nothing: what is only there as .gz stays packed."""
    from ddp_mnist import files

    wanted = "mnist" if name == "auto" else name
    seen = files.verify(wanted, root)
    folder, bad = seen[0].path.parent, [each for each in seen if each.status != "ok"]
    if not bad:
        return Finding("ok", "data", f"{wanted}: 4 files verified in {folder}")
    if wanted == "synthetic":
        return Finding("ok", "data", f"synthetic: the job draws the digits into {folder}")
    bad = [each for each in bad if not packed(each.path, files.SOURCES[wanted].md5)]
    if not bad:
        return Finding("ok", "data", f"{wanted}: the .gz files in {folder} are good, the job unpacks them")
    text = f"{wanted} is not staged, {bad[0].path} is {bad[0].status}"
    if bad[0].status == "damaged":
        text += f" ({bad[0].reason})"
    which = "" if wanted == "mnist" else f" --dataset {wanted}"
    advice = f"python -m ddp_mnist.data fetch{which} --data-dir {shlex.quote(str(root))}, where there is internet"
    if os.access(existing(root), os.W_OK) and reachable(MIRRORS[wanted]):
        return Finding("warning", "data", f"{text}: the job would download it at its start", advice)
    if name == "auto":
        text += ": the job would train on generated digits, which are not MNIST"
        return Finding("warning", "data", text, advice)
    return Finding("problem", "data", f"{text}, and cannot be downloaded here", advice)


def packed(path: Path, md5: Mapping[str, tuple[str, str]]) -> bool:
    """Is the .gz beside the raw file `path` what it must be? `md5`: as in files.Source."""
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
            with suppress(NotImplementedError, OSError):
                lock = filelock.FileLock(Path(folder, "lock"), timeout=0)
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
        with filelock.FileLock(path, timeout=0):
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
    from ddp_mnist import mirror

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


# --- All ranks together -----------------------------------------------------------------------------------------------


def meet(config: TrainConfig, mine: list[Finding]) -> list[Finding]:
    """Bring the ranks together as the job does; the findings of all of them. Raises: JobError when one is missing."""
    from ddp_mnist.world import World, is_lost_rank, lost_rank

    with World(config) as world:
        try:
            everyone = gather(world, Rank(socket.gethostname(), allowed_cpus(), world.threads, versions(), mine))
            milliseconds = [all_reduce_milliseconds(world, length) for length in (1, GRADIENTS)]
        except RuntimeError as error:
            if not is_lost_rank(error):
                raise
            raise lost_rank(error, world) from error
        backend = world.accelerator.state.backend
    return merge(everyone) + together(everyone, backend, milliseconds)


def gather(world: World, mine: Rank) -> list[Rank]:
    import torch.distributed as dist

    everyone: list[Any] = [mine] * world.size
    if world.size > 1:
        dist.all_gather_object(everyone, mine)
    return everyone


def all_reduce_milliseconds(world: World, length: int) -> float:
    """Median over REPEATS of summing `length` fp32 numbers over all ranks, as this rank sees it; a collective."""
    import torch

    values = torch.zeros(length, device=world.device)
    times = []
    for _ in range(3 + REPEATS):
        started = time.perf_counter()
        world.sum(values)
        values[0].item()  # on a GPU: wait until it has happened
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times[3:])


def merge(everyone: Sequence[Rank]) -> list[Finding]:
    """Rank 0's findings, and what is not ok elsewhere, once."""
    merged = list(everyone[0].findings)
    known = {(each.topic, each.text) for each in merged}
    for number, rank in enumerate(everyone):
        for each in rank.findings:
            if each.status != "ok" and (each.topic, each.text) not in known:
                known.add((each.topic, each.text))
                merged.append(dataclasses.replace(each, text=f"rank {number} on {rank.host}: {each.text}"))
    return merged


def together(everyone: Sequence[Rank], backend: str | None, milliseconds: Sequence[float]) -> list[Finding]:
    """What only shows when the ranks are compared. `milliseconds`: of an all-reduce of 1 number, of the gradients."""
    if len(everyone) == 1:
        return [Finding("ok", "ranks", "1 rank, nothing to exchange")]
    hosts = Counter(rank.host for rank in everyone)
    places = ", ".join(f"{number} on {host}" for host, number in hosts.items())
    one, gradients = milliseconds
    found = [
        Finding("ok", "ranks", f"{len(everyone)} ranks met over {backend}: {places}"),
        Finding(
            "ok",
            "ranks",
            f"all-reduce of 1 number {one:.2f} ms, of the 36 kB of gradients {gradients:.2f} ms (median of {REPEATS})",
        ),
    ]
    for host in hosts:
        ranks = [rank for rank in everyone if rank.host == host]
        threads, cpus = sum(rank.threads for rank in ranks), len(frozenset[int]().union(*(rank.cpus for rank in ranks)))
        if threads > max(cpus, len(ranks)):
            text = f"{threads} threads of {len(ranks)} ranks on {host} share {cpus} CPUs; is LOCAL_WORLD_SIZE set?"
            found.append(Finding("warning", "ranks", text, f"--threads {max(1, cpus // len(ranks))}"))
    for number, rank in enumerate(everyone):
        for name, version in everyone[0].versions.items():
            if (other := rank.versions.get(name)) != version:
                text = f"{name} is {version} on rank 0 and {other} on rank {number} ({rank.host})"
                found.append(Finding("warning", "ranks", text, "one environment, on a disk that all machines share"))
    return found


# --- Words ------------------------------------------------------------------------------------------------------------


def number(env: Mapping[str, str], *names: str, default: int) -> int:
    """The first of these variables that holds a whole number."""
    return next((int(env[name]) for name in names if env.get(name, "").isdecimal()), default)


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def one_line(message: object) -> str:
    return " ".join(str(message).split())


def in_order(findings: Sequence[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda each: TOPICS.index(each.topic))


def as_text(findings: Sequence[Finding]) -> str:
    lines = []
    for each in findings:
        lines.append(f"{each.status:8} {each.topic:9}  {each.text}")
        if each.advice:
            lines.append(f"{'':20}-> {each.advice}")
    problems = sum(each.status == "problem" for each in findings)
    warned = sum(each.status == "warning" for each in findings)
    extra = f", {count(warned, 'warning')}" if warned else ""
    verdict = f"would not start: {count(problems, 'problem')}" if problems else "would start"
    return "\n".join([*lines, f"The job {verdict}{extra}."])


if __name__ == "__main__":
    from ddp_mnist.train import leave

    leave(main())
