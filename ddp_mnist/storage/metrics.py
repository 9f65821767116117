"""Write the output of a run: console, progress bar, config.json, metrics.jsonl and summary.json.

Every rank owns a `Metrics` and calls it at the same steps, since a line's loss is a mean over all ranks; rank 0 writes.
"""

import json
import logging
import math
import os
import platform
import re
import socket
import subprocess
import sys
import time
from contextlib import suppress
from copy import copy
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor
from tqdm import tqdm

from ddp_mnist.data.sources import SYNTHETIC_WARNING
from ddp_mnist.distributed.launcher import from_environment
from ddp_mnist.errors import JobError
from ddp_mnist.storage import directory

if TYPE_CHECKING:
    from ddp_mnist.data.batches import Batches
    from ddp_mnist.distributed.context import Context
    from ddp_mnist.evaluate import Score
    from ddp_mnist.step import TrainStep
    from ddp_mnist.storage.resume import Run

log = logging.getLogger(__name__)

MAX_CLASSES = 100  # with more classes, the confusion matrix stays out of files, pictures and W&B
BUFFER_BYTES = 2**24  # for metrics.jsonl: lines that a full disk refuses stay in the buffer, to be tried again


class Metrics:
    """Collects losses on the device; every `log_every` steps they are summed over the ranks, read and written."""

    def __init__(self, run: "Run", context: "Context") -> None:
        self.run, self.config, self.context, self.state = run, run.config, context, run.state
        self._before, self._last_line = copy(self.state), copy(self.state)  # at the attempt's start; at the last line
        self._started = self._resumed = time.perf_counter()
        self.unread: list[tuple[Tensor, Tensor, int]] = []  # loss, correct, global size of the steps not yet read
        self._file: BinaryIO | None = None
        self._bar: Any = None

    def open(self, batches: "Batches", test_images: int, train_step: "TrainStep", network: str | None = None) -> None:
        """Write config.json, open metrics.jsonl, cut it to the length in the checkpoint, print the banner. Collective.

        `network`: the class name of the script's network; None: the network is our CNN. Raises JobError on all ranks: a
        file cannot be written.
        """
        self._started = time.perf_counter()  # loading the data is no part of the run's time
        self.steps_per_epoch, self._train_step = len(batches), train_step
        self.total_steps = self.steps_per_epoch * self.config.epochs
        self.context.run_on_main(lambda: self._open_files(network))
        self.say(self._banner(batches, test_images))

    def _open_files(self, network: str | None) -> None:
        content = {"settings": self.config.to_dict(), "network": network, "steps_per_epoch": self.steps_per_epoch}
        with directory.translate_write_errors(self.run.path / directory.CONFIG) as path:
            directory.write_json(path, content | provenance(self.context.world_size))
        expected = self.run.snapshot.metrics_bytes if self.run.snapshot else 0
        with directory.translate_write_errors(self.run.path / directory.METRICS) as path:
            self._file = path.open("ab", buffering=BUFFER_BYTES)
            found = path.stat().st_size
            self._file.truncate(min(expected, found))
        if found < expected:
            log.warning("%s has %d bytes, expected %d: earlier lines are missing.", path, found, expected)
        if self.config.progress and sys.stderr is not None and sys.stderr.isatty():
            self._bar = tqdm(total=self.total_steps, initial=self.state.step, unit="step", dynamic_ncols=True)

    def close(self) -> None:
        """Close what `open` has opened."""
        for each in (self._bar, self._file):
            if each is not None:
                with suppress(OSError):  # the disk is full to the end
                    each.close()

    def resume_timer(self) -> None:
        """Count training time from now on. The time since the last step was not training but a score or a save."""
        self._resumed = time.perf_counter()

    def _count_time(self) -> None:
        self.state.train_seconds += time.perf_counter() - self._resumed
        self.resume_timer()

    def record(self, loss: Tensor, correct: Tensor, global_size: int) -> None:
        """Take this rank's part of a step's mean loss and correct items, after `state.advance`. Collective.

        Writes a line every `log_every` steps, except at the end of an epoch: there `record_score` writes it. Raises
        JobError on all ranks: a loss since the last line is not finite.
        """
        self.unread.append((loss, correct, global_size))
        self._count_time()
        if self.state.step % self.config.log_every == 0:
            self.sync()
            if self.state.step_in_epoch < self.steps_per_epoch:
                self._write_line()
                self.resume_timer()

    def record_score(self, score: "Score") -> None:
        """Write the line of an epoch's end, with its test score. Collective: call it after `sync`."""
        self._write_line(score)
        if self.state.epoch == 0 and len(score.confusion or ()) > MAX_CLASSES:
            self.say(f"  more than {MAX_CLASSES} classes: no confusion matrix is kept")

    def sync(self) -> None:
        """Read the losses that are still on the device into the state. Collective. Raises: JobError, as `record`."""
        if not self.unread:
            return
        losses, correct, sizes = zip(*self.unread, strict=True)
        self.unread = []
        values = self.context.sum(torch.stack([torch.stack(losses), torch.stack(correct).float()])).tolist()
        self._count_time()  # reading the losses has waited until the GPU finished the steps
        first = self.state.step - len(sizes) + 1
        for step, (loss, right, size) in enumerate(zip(*values, sizes, strict=True), start=first):
            if not math.isfinite(loss):
                raise JobError(f"the loss became {loss} at step {step}.", stop_reason="nan")
            self.state.interval_loss += loss * size
            self.state.interval_correct += int(right)
            self.state.interval_images += size

    def _write_line(self, score: "Score | None" = None) -> None:
        """Write one line for the steps since the last one. Collective."""
        state, step = self.state, self._train_step
        state.wall_seconds = self.wall_seconds()
        accuracy = None if step.classes is None else state.interval_correct / state.interval_images
        record: dict[str, Any] = {
            "step": state.step,
            "epoch": state.epoch,
            "wall_seconds": round(state.wall_seconds, 3),
            "lr": step.rate,
            "train/loss": state.interval_loss / state.interval_images,
            "train/accuracy": accuracy,
            "train/gradient_norm": step.gradient_norm().item(),
        } | self._speed()
        if state.skipped_steps:
            record["train/skipped_steps"] = state.skipped_steps
        if score is not None:
            record |= {"test/loss": score.loss, "test/accuracy": score.accuracy}
            record["test/mistakes"] = [asdict(mistake) for mistake in score.mistakes]
            if confusion := _confusion(score):
                record["test/confusion"] = confusion
        state.interval_loss, state.interval_correct, state.interval_images = 0.0, 0, 0
        if self._file is not None:
            try:
                self._file.write((json.dumps(directory.finite(record)) + "\n").encode())
                self._file.flush()
            except OSError as error:
                log.warning("%s: %s; its lines are kept in memory and tried again.", self._file.name, error.strerror)
            self._show(record)

    def _speed(self) -> dict[str, Any]:
        """Return the speed since the last line, and least, mean and most seconds per step of a rank. Collective."""
        state, last, context = self.state, self._last_line, self.context
        self._last_line = copy(state)
        passed = state.train_seconds - last.train_seconds
        by_rank = torch.zeros(context.world_size, device=context.device)
        by_rank[context.rank] = passed / (state.step - last.step)
        seconds = context.sum(by_rank).tolist()
        speed = {
            "train/images_per_second": round((state.samples_seen - last.samples_seen) / passed, 1),
            "train/step_seconds_min": min(seconds),
            "train/step_seconds_mean": sum(seconds) / len(seconds),
            "train/step_seconds_max": max(seconds),
        }
        if context.device.type == "cuda":
            speed["gpu/memory_bytes"] = torch.cuda.max_memory_allocated(context.device)
        return speed

    def metrics_bytes(self) -> int:
        """Return the length of metrics.jsonl so far, flushed to disk, on rank 0. Raises: OSError."""
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def wall_seconds(self) -> float:
        """Return the seconds since the run's start, over all attempts."""
        return self._before.wall_seconds + time.perf_counter() - self._started

    def summary(self, stop_reason: str, exit_code: int, *, wandb_mode: str, **scores: "Score") -> dict[str, Any]:
        """Return summary.json's content; null for what is not known. `scores`: `train` and `test`, if known."""
        state, config, before, test = self.state, self.config, self._before, scores.get("test")
        state.wall_seconds = self.wall_seconds()
        seconds = state.train_seconds - before.train_seconds
        keys = [(name, key) for name in ("train", "test") for key in ("correct", "count", "accuracy", "loss")]
        return {
            "finished": stop_reason == "finished",
            "stop_reason": stop_reason,
            "exit_code": exit_code,
            "dataset": config.dataset,
            "recipe": config.recipe,
            "epochs": config.epochs,
            "steps": state.step,
            "samples_seen": state.samples_seen,
            "world_size": self.context.world_size,
            "device": self.context.device.type,
            "mixed_precision": config.mixed_precision,
            "threads": self.context.threads,
            "skipped_steps": state.skipped_steps,
            **{f"{name}_{key}": getattr(scores.get(name), key, None) for name, key in keys},
            "train_seconds": round(state.train_seconds, 3),
            "eval_seconds": round(state.eval_seconds, 3),
            "wall_seconds": round(state.wall_seconds, 3),
            "images_per_second": round((state.samples_seen - before.samples_seen) / seconds, 1) if seconds else None,
            "resumed_from": before.step if self.run.snapshot else None,
            "wandb_mode": wandb_mode,
            "test_confusion": test and _confusion(test),
            "test_mistakes": test and [asdict(mistake) for mistake in test.mistakes],
        }

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json, on rank 0. Raises: JobError."""
        if self.context.is_main:
            with directory.translate_write_errors(self.run.path / directory.SUMMARY) as path:
                directory.write_json(path, summary)

    def try_to_write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json, on rank 0; warn where it cannot be written."""
        try:
            self.write_summary(summary)
        except JobError as error:
            log.warning("%s", error)

    def say(self, text: str) -> None:
        """Print a line or a block, from rank 0 only."""
        if self.context.is_main:
            # A full disk under the log or a closed pipe is no reason to stop training.
            with suppress(OSError, UnicodeError):
                if self._bar is not None:
                    self._bar.write(text)
                else:
                    print(text, flush=True)

    def _banner(self, batches: "Batches", test_images: int) -> str:
        config, context = self.config, self.context
        ranks = _count(context.world_size, "rank") + (" sharing GPUs over gloo" if context.shares_gpus else "")
        device = torch.cuda.get_device_name(context.device) if context.device.type == "cuda" else context.device.type
        parts = f" in {config.accumulate} parts" if config.accumulate > 1 else ""
        threads = _count(context.threads, "thread")
        optimizer, rate = self._train_step.optimizer_identity["class"].rpartition(".")[2], self._train_step.rate
        lines = [
            f"ddp_mnist: {config.recipe} recipe on {config.dataset}, "
            f"{len(batches.train_set):,} training and {test_images:,} test images",
            f"  device  {device}, {ranks}, {threads} each, precision {config.mixed_precision}",
            f"  batch   {config.batch_size} images, {batches.local_size} per rank{parts}; "
            f"{_count(config.epochs, 'epoch')} of {len(batches)} steps; {optimizer} {rate:g} {config.schedule}",
            f"  output  {self.run.path}",
        ]
        if self.run.snapshot is not None:
            lines.append(f"  resumed at step {self.state.step} of {self.total_steps}")
        if config.dataset == "synthetic":
            lines.append(SYNTHETIC_WARNING)
        return "\n".join(lines)

    def _show(self, record: dict[str, Any]) -> None:
        loss, speed = record["train/loss"], record["train/images_per_second"]
        epoch = f"epoch {record['epoch'] + 1}/{self.config.epochs}"
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} images/s", refresh=False)
            self._bar.update(record["step"] - self._bar.n)
        elif "test/loss" not in record:
            images_left = (self.total_steps - record["step"]) * self.config.batch_size
            left = f", {images_left / speed:,.0f} s left" if speed else ""
            position = f"step {record['step']}/{self.total_steps}"
            self.say(f"{epoch} {position}: loss {loss:.4f}, {speed:,.0f} images/s{left}")
        if "test/loss" in record:
            accuracy = record["test/accuracy"]
            scored = "" if accuracy is None else f", test accuracy {100 * accuracy:.2f} %"
            self.say(f"{epoch} done: train loss {loss:.4f}, test loss {record['test/loss']:.4f}{scored}")


def _confusion(score: "Score") -> list[list[int]] | None:
    """Return the confusion matrix; None if there is none, or if it is too large to be kept."""
    rows = list(map(list, score.confusion or ()))
    return rows if 0 < len(rows) <= MAX_CLASSES else None


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number > 1 else "")


def provenance(world_size: int) -> dict[str, Any]:
    """Return `versions`, `git` (None outside a checkout) and `launch` of a job of `world_size` ranks."""
    versions = {"python": platform.python_version()}
    for name in ("ddp_mnist", "torch", "torchvision", "accelerate", "numpy", "safetensors", "wandb"):
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    # The values of --...key, --token=... and the like are not saved.
    secret = r"(?i)((?:^|\0)-[^\0=]*(?:key|token|secret|passw)[^\0=]*[\0=])[^\0]*"
    launch = {
        "command": re.sub(secret, r"\1***", "\0".join(sys.argv)).split("\0"),
        "host": socket.gethostname(),
        "world_size": world_size,
        "nodes": world_size // from_environment("LOCAL_WORLD_SIZE"),
        # slurm/train.sh and launch/job.py set the next two.
        "job_id": os.environ.get("DDP_MNIST_JOB_ID"),
        "restart_count": int(os.environ.get("DDP_MNIST_RESTARTS") or 0),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    return {"versions": versions, "git": _git(), "launch": launch}


def _git() -> dict[str, Any] | None:
    """Return commit and dirtiness of the checkout that tracks this file; None for an installed package."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None
