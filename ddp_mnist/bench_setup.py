"""What the rows of `bench` share: digits staged for both sides, jobs in this process and in processes of their own."""

from __future__ import annotations

import contextlib
import io
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ddp_mnist import files
from ddp_mnist.config import RECIPES, TrainConfig
from ddp_mnist.data import Split
from ddp_mnist.errors import JobError
from ddp_mnist.trainer import fit

PATIENCE = 1800.0  # seconds for one child process: a bound against hangs, not an expectation


@dataclass(frozen=True)
class Setup:
    """What the rows share."""

    dataset: str
    """The name under which the job finds the staged files."""
    root: Path
    """torchvision's root with the raw files both sides read."""
    scratch: Path
    train: Split
    test: Split
    repeats: int
    seeds: int
    steps: int
    """Optimizer steps that the step, checkpoint and scaling rows take for one figure."""
    epochs: int
    """Of the runs that the overhead row compares; the default recipe's."""
    threads: int
    """What torch chooses by itself: what the competitors run with."""
    environment: dict[str, str]
    """For child processes: this one's, before runs of ours in it have set the threads."""

    def config(self, recipe: str = "tutorial", **changes: Any) -> TrainConfig:
        preset = RECIPES[recipe] | {"recipe": recipe, "dataset": self.dataset, "data_dir": self.root}
        return TrainConfig(**(preset | {"wandb": "disabled", "progress": False, "pictures": False} | changes))

    def job(self, recipe: str = "tutorial", **changes: Any) -> dict[str, Any]:
        """The summary of one whole run in this process. Raises: JobError; KeyboardInterrupt when it was stopped."""
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder, contextlib.redirect_stdout(io.StringIO()):
            summary = fit(self.config(recipe, output_dir=Path(folder), **changes)).summary
        if summary["exit_code"]:  # the job takes a Ctrl-C as the wish to save and leave
            raise KeyboardInterrupt
        return summary

    def as_the_tutorial(self) -> None:
        """Undo the thread count that a run of ours has set."""
        torch.set_num_threads(self.threads)


def stage(name: str, train: Split, test: Split, root: Path) -> str:
    """Write both splits as raw files below `root`; returns the data set's name for the job and for torchvision.

    Whole MNIST stays `mnist`. A slice of it, or generated digits, goes as `fashion-mnist`: neither side knows what its
    raw files must hash to.
    """
    whole = name == "mnist" and (len(train), len(test)) == (60_000, 10_000)
    folder = root / ("MNIST" if whole else "FashionMNIST") / "raw"
    folder.mkdir(parents=True)
    for prefix, split in {"train": train, "t10k": test}.items():
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(files.pack(split.images.squeeze(1).numpy()))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(files.pack(split.labels.to(torch.uint8).numpy()))
    return "mnist" if whole else "fashion-mnist"


# --- Processes --------------------------------------------------------------------------------------------------------


def on_cpu(setup: Setup, world_size: int, what: str, threads: int, count: int) -> dict[str, Any]:
    return run_ranks(setup, cpu_ranks(world_size), what, threads, count)


def run_ranks(
    setup: Setup, environments: Sequence[dict[str, str]], what: str, threads: int, count: int
) -> dict[str, Any]:
    """What rank 0 of `bench_rank` found. Raises: JobError."""
    with tempfile.TemporaryDirectory(dir=setup.scratch) as folder:
        words = [
            *("-m", "ddp_mnist.bench_rank", what, str(count), "--dataset", setup.dataset),
            *("--data-dir", str(setup.root), "--output-dir", folder),
            *("--threads", str(threads), "--epochs", str(setup.epochs)),
        ]
        return json.loads(run_together(setup, [words] * len(environments), environments)[0])


def child(setup: Setup, words: Sequence[str]) -> dict[str, Any]:
    return json.loads(run_together(setup, [words], [{}])[0])


def run_together(setup: Setup, commands: Sequence[Sequence[str]], environments: Sequence[dict[str, str]]) -> list[str]:
    """The last line each Python process prints; when one fails, the others are ended. Raises: JobError."""
    processes: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as stack:
        texts = [[stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)] for _ in commands]
        try:
            for words, variables, (out, err) in zip(commands, environments, texts, strict=True):
                own = setup.environment | variables
                processes.append(subprocess.Popen([sys.executable, *words], env=own, stdout=out, stderr=err))
            deadline = time.monotonic() + PATIENCE
            while None in (codes := [process.poll() for process in processes]):
                if any(codes) or time.monotonic() > deadline:
                    break
                time.sleep(0.005)
        finally:
            for process in processes:
                with suppress(ProcessLookupError):
                    process.kill()
                process.wait()
        lines = []
        for code, words, (out, err) in zip(codes, commands, texts, strict=True):
            out.seek(0), err.seek(0)
            if code:
                said = (err.read().strip().splitlines() or ["nothing"])[-1]
                raise JobError(f"`python {' '.join(words)}` ended with {code} and said: {said}")
            lines.append((out.read().strip().splitlines() or [""])[-1])
        if None in codes:
            hung = " ".join(commands[codes.index(None)])
            raise JobError(f"`python {hung}` did not end within {PATIENCE:.0f} s.")
        return lines


def rank_variables(world_size: int) -> list[dict[str, str]]:
    """What a launcher would set for each rank of one job on this machine; nothing for a single one."""
    if world_size == 1:
        return [{}]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common = meeting | {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]


def cpu_ranks(world_size: int) -> list[dict[str, str]]:
    """The same, where a GPU is not to be used."""
    return [variables | {"CUDA_VISIBLE_DEVICES": ""} for variables in rank_variables(world_size)]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]
