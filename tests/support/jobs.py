"""Start the job as its users do, one operating-system process per rank, and let none of them outlive the test."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

TRAIN = (sys.executable, "-m", "ddp_mnist.train")
FOREVER = 150.0  # seconds: a bound against hangs on a busy machine, not an expectation
LAST_RANK = 30.0  # seconds the other ranks have to follow the first one that ended

# What launchers and Accelerate set; a test starts without any of it.
LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCH_PREFIXES = ("ACCELERATE_", "OMPI_", "PMI_", "MV2_", "TORCHELASTIC_", "WANDB_", "SLURM_")
# A closed loopback port in front of every download: offline, also where there is a network.
OFFLINE = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")


@dataclass(frozen=True)
class Ended:
    """A process that came to its end by itself."""

    code: int
    out: str
    err: str


def is_launch_variable(name: str) -> bool:
    return name in (*LAUNCH_VARIABLES, "OMP_NUM_THREADS") or name.startswith(LAUNCH_PREFIXES)


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the caller's, without launcher, network, GPU or W&B; with the package these tests belong to."""
    kept = {name: value for name, value in os.environ.items() if not is_launch_variable(name)}
    kept.pop("DDP_MNIST_DATA", None)
    path = [str(Path(__file__).parents[2]), *filter(None, [kept.get("PYTHONPATH")])]
    kept |= {"PYTHONPATH": os.pathsep.join(path), "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "disabled"}
    return kept | {"no_proxy": "", "NO_PROXY": ""} | OFFLINE | dict(extra or {})


def rank_variables(world_size: int) -> list[dict[str, str]]:
    """Return what a launcher would set for each rank of a job on this machine."""
    size, port = str(world_size), str(free_port())
    common = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]


def sizes(*world_sizes: int) -> list[Any]:
    """Return world sizes to parametrize a test with: with several ranks it is a slow one."""
    several = (pytest.mark.slow, pytest.mark.distributed)
    return [pytest.param(size, marks=several if size > 1 else ()) for size in world_sizes]


def free_port() -> int:
    """Return one below the ephemeral range: no outgoing connection takes it before the job listens."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def run_together(
    commands: Sequence[Sequence[str]], environments: Sequence[Mapping[str, str]], *, cwd: Path | None = None
) -> list[Ended]:
    """Run the commands at the same time; when one ends, the others have LAST_RANK seconds to follow.

    Raises: AssertionError for a process that outstays this; whatever happens, none is left.
    """
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as folder:
        outputs = [(Path(folder, f"{rank}.out"), Path(folder, f"{rank}.err")) for rank in range(len(commands))]
        # A session of its own: the whole group can be ended, launchers' children too.
        options: dict[str, Any] = {"cwd": cwd, "stdin": subprocess.DEVNULL, "start_new_session": True}
        try:
            for command, variables, (out, err) in zip(commands, environments, outputs, strict=True):
                with out.open("wb") as stdout, err.open("wb") as stderr:
                    started = subprocess.Popen(command, env=variables, stdout=stdout, stderr=stderr, **options)
                    processes.append(started)
            _until(lambda: any(process.poll() is not None for process in processes), FOREVER)
            _until(lambda: all(process.poll() is not None for process in processes), LAST_RANK)
            codes = [process.poll() for process in processes]
        finally:
            for process in processes:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait(timeout=30)
        texts = [[path.read_text(errors="replace") for path in pair] for pair in outputs]
    assert None not in codes, f"still running: exit codes {codes}, output {texts}"
    return [Ended(code, *text) for code, text in zip(codes, texts, strict=True) if code is not None]


def _until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)


def run(command: Sequence[str], variables: Mapping[str, str] | None = None, **options: Any) -> Ended:
    """Run one process, or a launcher and its children."""
    return run_together([command], [environment(variables)], **options)[0]


def run_ranks(
    world_size: int,
    *arguments: str,
    program: Sequence[str] = TRAIN,
    per_rank: Callable[[int], Sequence[str]] = lambda rank: (),
    variables: Mapping[str, str] | None = None,
    **options: Any,
) -> list[Ended]:
    """Run a command on `world_size` ranks, with what `per_rank` adds; a job of one rank has no launcher."""
    ranks = rank_variables(world_size) if world_size > 1 else [{}]
    return run_together(
        [[*program, *arguments, *per_rank(rank)] for rank in range(world_size)],
        [environment({**own, **(variables or {})}) for own in ranks],
        **options,
    )


def messages(ended: Sequence[Ended]) -> list[str]:
    """Return the messages to the user on stderr, over all ranks: one-liners of ours, and the flag parser's boxes."""
    found = []
    for process in ended:
        assert "Traceback" not in process.err + process.out, process.err
        found += re.findall(r"^error: .*", process.err, re.MULTILINE)
        for box in re.findall(r"^╭.*\n((?:│.*\n)*)╰", process.err, re.MULTILINE):
            found.append(" ".join(line.strip("│ ") for line in box.splitlines()))
    return found


def the_message(ended: Sequence[Ended], code: int) -> str:
    """Return the one message of a job all of whose ranks ended with `code`."""
    assert [process.code for process in ended] == [code] * len(ended), [process.err for process in ended]
    found = messages(ended)
    assert len(found) == 1, [process.err for process in ended]
    return found[0]


def succeeded(ended: Sequence[Ended]) -> None:
    assert [process.code for process in ended] == [0] * len(ended), [process.err for process in ended]


def read_json(path: Path) -> Any:
    """Read strictly: Python would also take NaN and Infinity, which no other reader does."""
    return json.loads(path.read_text(), parse_constant=_refuse)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=_refuse) for line in lines]


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
