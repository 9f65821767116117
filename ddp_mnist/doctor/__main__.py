"""What will a launch do here? One line for each topic, and where it is not ok, what to type.

    python -m ddp_mnist.doctor [training flags]
    torchrun --nproc-per-node 4 -m ddp_mnist.doctor --dataset mnist

Start it as the job would be started. It trains nothing and leaves nothing behind; rank 0 prints. Exit code 0: the job
would start. 1: it would not. 2: a mistake in the flags.

The checks are in `doctor_machine.py` and `doctor_job.py`; here they are put together, and the ranks compared. SLURM_*
are read in all of these only to tell what they say: slurm/ is what acts on them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import shutil
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddp_mnist.distributed.launcher import hard_exit
from ddp_mnist.doctor import job, machine
from ddp_mnist.doctor.finding import Finding, as_text, in_order, number, one_line
from ddp_mnist.doctor.job import is_first, is_first_here
from ddp_mnist.errors import JobError, UsageError

if TYPE_CHECKING:
    from ddp_mnist.config import TrainConfig
    from ddp_mnist.distributed.context import Context

REPEATS = 30
"""Timed all-reduces of each size."""
GRADIENTS = 9_098
"""Parameters of the default network: 36 kB of fp32 are exchanged in each step."""


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
    mine = machine.packages(machine.requirements(), machine.versions())
    if failure := machine.cannot_import("ddp_mnist.config"):
        return [*mine, failure]
    from ddp_mnist.config import parse

    job.check_variables(os.environ)
    config = parse(flags).replace(timeout_minutes=timeout / 60)
    if failure := machine.cannot_import(
        "ddp_mnist.distributed.context"
    ):  # torch and Accelerate: after the flags, it takes seconds
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
    env, cpus = os.environ, len(machine.allowed_cpus())
    found = [*job.launch(env, job.parent_command()), job.batch(config, number(env, "WORLD_SIZE", default=1))]
    devices = machine.look_for_devices(number(env, "LOCAL_RANK", default=0))
    found += [machine.device(devices, env), machine.precision(config.mixed_precision, devices)]
    found.append(machine.cpu(cpus, os.cpu_count() or 1, machine.cpu_quota(), config.threads, env))
    staged = True
    if is_first_here():
        data = job.dataset(config.dataset, config.data_dir)
        staged = data.status == "ok"
        found.append(data)
    if is_first():
        found += machine.torchvision(staged)
        found.append(job.output(config.output_dir or Path("runs")))
        found.append(job.wandb(config))
        found += job.slurm(env, shutil.which("sbatch") is not None, cpus)
    return found


# --- All ranks together -----------------------------------------------------------------------------------------------


def meet(config: TrainConfig, mine: list[Finding]) -> list[Finding]:
    """Bring the ranks together as the job does; the findings of all of them. Raises: JobError when one is missing."""
    from ddp_mnist.distributed.context import Context, translate_collective_errors

    with Context(config) as context:
        with translate_collective_errors(context):
            me = Rank(socket.gethostname(), machine.allowed_cpus(), context.threads, machine.versions(), mine)
            everyone = gather(context, me)
            milliseconds = [all_reduce_milliseconds(context, length) for length in (1, GRADIENTS)]
        backend = context.accelerator.state.backend
    return merge(everyone) + together(everyone, backend, milliseconds)


def gather(context: Context, mine: Rank) -> list[Rank]:
    import torch.distributed as dist

    everyone: list[Any] = [mine] * context.size
    if context.size > 1:
        dist.all_gather_object(everyone, mine)
    return everyone


def all_reduce_milliseconds(context: Context, length: int) -> float:
    """Median over REPEATS of summing `length` fp32 numbers over all ranks, as this rank sees it; a collective."""
    import torch

    values = torch.zeros(length, device=context.device)
    times = []
    for _ in range(3 + REPEATS):
        started = time.perf_counter()
        context.sum(values)
        values[0].item()  # on a GPU: wait until it has happened
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times[3:])


def merge(everyone: Sequence[Rank]) -> list[Finding]:
    """Rank 0's findings, and what is not ok elsewhere, once."""
    merged = list(everyone[0].findings)
    known = {(each.topic, each.text) for each in merged}
    for index, rank in enumerate(everyone):
        for each in rank.findings:
            if each.status != "ok" and (each.topic, each.text) not in known:
                known.add((each.topic, each.text))
                merged.append(dataclasses.replace(each, text=f"rank {index} on {rank.host}: {each.text}"))
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
    for index, rank in enumerate(everyone):
        for name, version in everyone[0].versions.items():
            if (other := rank.versions.get(name)) != version:
                text = f"{name} is {version} on rank 0 and {other} on rank {index} ({rank.host})"
                found.append(Finding("warning", "ranks", text, "one environment, on a disk that all machines share"))
    return found


if __name__ == "__main__":
    hard_exit(main())
