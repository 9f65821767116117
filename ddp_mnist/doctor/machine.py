"""The doctor's look at this machine and what is installed on it: packages, GPUs and what they can compute, CPUs.

Nothing that needs an installed package is imported up here: that one is missing is the first thing to tell.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import import_module, metadata, util
from pathlib import Path
from typing import Any, NamedTuple

from ddp_mnist.doctor.finding import Finding, count, number, one_line

IMPORT_LIMIT = 120.0
"""Seconds for an import in another process: torchvision takes 6 with torch, on a cold network disk many more."""


# --- Packages ---------------------------------------------------------------------------------------------------------


def requirements() -> list[str]:
    """What pyproject.toml asks for, Python first: from the installed package, else from the checkout."""
    with suppress(metadata.PackageNotFoundError):
        python = metadata.metadata("ddp_mnist")["Requires-Python"]
        needed = metadata.requires("ddp_mnist") or []
        return [f"python{python}", *(each for each in needed if "extra ==" not in each)]
    try:
        project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
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


# --- GPUs and CPUs ----------------------------------------------------------------------------------------------------


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


def cpu_has_bf16(facts: Path = Path("/proc/cpuinfo")) -> bool:
    """Arithmetic, not only conversions; False also where Linux does not say."""
    try:
        return bool(re.search(r"\b(avx512_bf16|amx_bf16)\b", facts.read_text()))
    except OSError:
        return False


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
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if properties else cpu_has_bf16()
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
        device = "GPU" if found.gpus else "CPU"
        text = f"bf16, but this {device} has no arithmetic for it: slower than fp32 (measured on a CPU: 3 times)"
        return Finding("warning", "precision", text, "--mixed-precision no")
    if asked != "no":
        return Finding("ok", "precision", f"{asked} in training, fp32 in evaluation")
    possible = [name for name, can in {"bf16": found.bf16, "fp16": bool(found.gpus)}.items() if can]
    return Finding("ok", "precision", "fp32" + (f"; {' and '.join(possible)} can be had as well" if possible else ""))


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
