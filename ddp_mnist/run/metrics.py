"""Write what a run says of itself: the console, a bar on a terminal, config.json, metrics.jsonl and summary.json.

Every rank owns a `Metrics` and calls it at the same steps, since a line's loss is a mean over all ranks; rank 0 writes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import sys
import time
from copy import copy
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from ddp_mnist.data.sources import SYNTHETIC_WARNING
from ddp_mnist.errors import JobError
from ddp_mnist.run import directory
from ddp_mnist.run.provenance import facts

if TYPE_CHECKING:
    from collections.abc import Callable

    from ddp_mnist.data.batches import Batches
    from ddp_mnist.distributed.context import Context
    from ddp_mnist.evaluate import Score
    from ddp_mnist.run.resume import Run

log = logging.getLogger(__name__)

MAX_CLASSES = 100
"""Above, what grows with their number or its square stays out of files, pictures and W&B."""


class Metrics:
    """Collects losses on the device; every `log_every` steps they are summed over the ranks, read and written."""

    def __init__(self, run: Run, context: Context) -> None:
        """Note the totals before this attempt."""
        self.run, self.config, self.context, self.state = run, run.config, context, run.state
        self._before = copy(self.state)
        self._last_line = copy(self.state)
        self._started = self._resumed = time.perf_counter()
        self._unread: list[tuple[Tensor, Tensor, int]] = []
        """Loss, correct predictions and global batch of each step that has not been read from the device."""
        self._rate = math.nan
        self._file: MetricsFile | None = None
        self._bar: Any = None

    def open(
        self, batches: Batches, test_images: int, network: str | None, gradient_norm: Callable[[], Tensor]
    ) -> None:
        """Write config.json, open metrics.jsonl, cut it to what the checkpoint knows of, print the banner. Collective.

        Args:
            batches: The training set.
            test_images: How many the test set has.
            network: The name of the script's own class; None: the network is ours.
            gradient_norm: Returns the norm of the last step's gradient, a scalar.

        Raises:
            JobError: A file cannot be written; on all ranks.
        """
        self._started = time.perf_counter()  # loading the data is no part of the run's time
        self.steps_per_epoch, self._gradient_norm = len(batches), gradient_norm
        self.total_steps = self.steps_per_epoch * self.config.epochs
        self.context.run_on_main(lambda: self._open_files(network))
        self.say(self._banner(batches, test_images))

    def _open_files(self, network: str | None) -> None:
        content = {"settings": self.config.to_dict(), "network": network, "steps_per_epoch": self.steps_per_epoch}
        with directory.translate_write_errors(self.run.path / directory.CONFIG) as path:
            directory.write_json(path, content | facts(self.context.world_size))
        keep = self.run.snapshot.metrics_bytes if self.run.snapshot else 0
        self._file = MetricsFile(self.run.path / directory.METRICS, keep=keep)
        if self.config.progress and sys.stderr is not None and sys.stderr.isatty():
            self._bar = tqdm(total=self.total_steps, initial=self.state.step, unit="step", dynamic_ncols=True)

    def close(self) -> None:
        """Close what `open` has opened."""
        for each in (self._bar, self._file):
            if each is not None:
                each.close()

    # --- Steps and scores ---

    def resume_timer(self) -> None:
        """Count time as training time from now on. What has passed since `_stop_timer` (a score, a save) is dropped."""
        self._resumed = time.perf_counter()

    def _stop_timer(self) -> None:
        self.state.train_seconds += time.perf_counter() - self._resumed

    def record(self, rate: float, loss: Tensor, correct: Tensor, global_size: int) -> None:
        """Take this rank's part of a step's mean loss and correct items, after `state.advance`. Collective.

        Writes a line where an interval is full, except at the end of an epoch, where `record_score` does.

        Raises:
            JobError: A loss of the interval is not finite; on all ranks.
        """
        self._rate = rate
        self._unread.append((loss, correct, global_size))
        interval_full = self.state.step % self.config.log_every == 0
        if interval_full:
            self._read()  # on a GPU this waits for the steps, which is part of their time
        self._stop_timer()
        if interval_full and self.state.step_in_epoch < self.steps_per_epoch:
            self._write_line()
        self.resume_timer()

    def record_score(self, score: Score) -> None:
        """Write the line of an epoch's end, with its test score. Collective.

        Raises:
            JobError: A loss is not finite; on all ranks.
        """
        self.sync()
        self._write_line(score)
        if self.state.epoch == 0 and len(score.confusion) > MAX_CLASSES:
            self.say(
                f"  more than {MAX_CLASSES} classes: no confusion matrix and no accuracy of single classes is kept"
            )

    @property
    def has_unread(self) -> bool:
        """Return whether losses have not been read from the device yet."""
        return bool(self._unread)

    def sync(self) -> None:
        """Read what the device still has into the state; the wait is part of the training time. Collective.

        Raises:
            JobError: A loss is not finite; on all ranks.
        """
        if self._unread:
            self.resume_timer()
            self._read()
            self._stop_timer()

    def _read(self) -> None:
        losses, correct, sizes = zip(*self._unread, strict=True)
        self._unread = []
        values = self.context.sum(torch.stack([torch.stack(losses), torch.stack(correct).float()])).tolist()
        first = self.state.step - len(sizes) + 1
        for step, (loss, right, size) in enumerate(zip(*values, sizes, strict=True), start=first):
            if not math.isfinite(loss):
                raise JobError(f"the loss became {loss} at step {step}.", stop_reason="nan")
            self.state.interval_loss += loss * size
            self.state.interval_correct += int(right)
            self.state.interval_images += size

    def _write_line(self, score: Score | None = None) -> None:
        """Write one line for the steps since the last one. Collective."""
        state = self.state
        state.wall_seconds = self.wall_seconds()
        record: dict[str, Any] = {
            "step": state.step,
            "epoch": state.epoch,
            "wall_seconds": round(state.wall_seconds, 3),
            "lr": self._rate,
            "train/loss": state.interval_loss / state.interval_images,
            "train/accuracy": state.interval_correct / state.interval_images,
            "train/gradient_norm": self._gradient_norm().item(),
        } | self._speed()
        if state.skipped_steps:
            record["train/skipped_steps"] = state.skipped_steps
        if score is not None:
            record |= {
                "test/loss": score.loss,
                "test/accuracy": score.accuracy,
                "test/mistakes": [asdict(mistake) for mistake in score.mistakes],
            }
            if len(score.confusion) <= MAX_CLASSES:
                record |= {"test/class_accuracy": score.class_accuracy(), "test/confusion": score.confusion}
        state.interval_loss, state.interval_correct, state.interval_images = 0.0, 0, 0
        if self._file is not None:
            self._file.append(record)
            self._show(record)

    def _speed(self) -> dict[str, Any]:
        """Return this attempt's speed since the last line, with each rank's seconds a step. Collective."""
        state, last, context = self.state, self._last_line, self.context
        self._last_line = copy(state)
        passed = state.train_seconds - last.train_seconds
        by_rank = torch.zeros(context.world_size, device=context.device)
        by_rank[context.rank] = passed / (state.step - last.step)
        each = context.sum(by_rank).tolist()
        speed = {
            "train/images_per_second": round((state.samples_seen - last.samples_seen) / passed, 1),
            "train/step_seconds_min": min(each),
            "train/step_seconds_mean": sum(each) / len(each),
            "train/step_seconds_max": max(each),
        }
        if context.device.type == "cuda":
            speed["gpu/memory_bytes"] = torch.cuda.max_memory_allocated(context.device)
        return speed

    def metrics_bytes(self) -> int:
        """Return the length of metrics.jsonl so far, flushed to disk, on rank 0. Raises: OSError."""
        assert self._file is not None
        return self._file.sync()

    def wall_seconds(self) -> float:
        """Return the seconds since the run's start, over all attempts."""
        return self._before.wall_seconds + time.perf_counter() - self._started

    # --- summary.json ---

    def summary(
        self,
        stop_reason: str,
        exit_code: int,
        *,
        wandb_mode: str,
        train: Score | None = None,
        test: Score | None = None,
    ) -> dict[str, Any]:
        """Return summary.json's content; null for what is not known."""
        state, config, before = self.state, self.config, self._before
        state.wall_seconds = self.wall_seconds()
        seconds = state.train_seconds - before.train_seconds
        confusion = None
        if test is not None and len(test.confusion) <= MAX_CLASSES:
            confusion = [list(row) for row in test.confusion]
        scores: dict[str, Any] = {}
        for name, score in {"train": train, "test": test}.items():
            for key in ("correct", "count", "accuracy", "loss"):
                scores[f"{name}_{key}"] = getattr(score, key, None)
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
            **scores,
            "train_seconds": round(state.train_seconds, 3),
            "eval_seconds": round(state.eval_seconds, 3),
            "wall_seconds": round(state.wall_seconds, 3),
            "images_per_second": round((state.samples_seen - before.samples_seen) / seconds, 1) if seconds else None,
            "resumed_from": before.step if self.run.snapshot else None,
            "wandb_mode": wandb_mode,
            "test_confusion": confusion,
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

    # --- The console ---

    def say(self, text: str) -> None:
        """Print a line or a block, from rank 0 only."""
        if self.context.is_main:
            # A full disk under the log or a closed pipe is no reason to stop training.
            with contextlib.suppress(OSError, UnicodeError):
                if self._bar is not None:
                    self._bar.write(text)
                else:
                    print(text, flush=True)

    def _banner(self, batches: Batches, test_images: int) -> str:
        config, context = self.config, self.context
        ranks = _count(context.world_size, "rank") + (" sharing GPUs over gloo" if context.shares_gpus else "")
        device = torch.cuda.get_device_name(context.device) if context.device.type == "cuda" else context.device.type
        parts = f" in {config.accumulate} parts" if config.accumulate > 1 else ""
        threads = _count(context.threads, "thread")
        lines = [
            f"ddp_mnist: {config.recipe} recipe on {config.dataset}, "
            f"{len(batches.split):,} training and {test_images:,} test images",
            f"  device  {device}, {ranks}, {threads} each, precision {config.mixed_precision}",
            f"  batch   {config.batch_size} images, {batches.local_size} per rank{parts}; "
            f"{_count(config.epochs, 'epoch')} of {len(batches)} steps; Adam {config.lr:g} {config.schedule}",
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
        elif "test/accuracy" not in record:
            images_left = (self.total_steps - record["step"]) * self.config.batch_size
            left = f", {images_left / speed:,.0f} s left" if speed else ""
            position = f"step {record['step']}/{self.total_steps}"
            self.say(f"{epoch} {position}: loss {loss:.4f}, {speed:,.0f} images/s{left}")
        if "test/accuracy" in record:
            accuracy, test_loss = 100 * record["test/accuracy"], record["test/loss"]
            self.say(f"{epoch} done: train loss {loss:.4f}, test loss {test_loss:.4f}, test accuracy {accuracy:.2f} %")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number > 1 else "")


class MetricsFile:
    """Appends whole lines to metrics.jsonl. What a full disk refuses is kept and tried again with the next line."""

    def __init__(self, path: Path, keep: int) -> None:
        """Open the file and cut it to its first `keep` bytes. Raises: JobError."""
        self.path = path
        self._waiting = b""
        try:
            self._file = path.open("ab", buffering=0)
            self._end = min(keep, os.fstat(self._file.fileno()).st_size)
            self._file.truncate(self._end)
        except OSError as error:
            raise JobError(f"{path} cannot be written: {error.strerror}.") from error
        if self._end < keep:
            log.warning("%s has %d bytes, expected %d: earlier lines are missing.", path, self._end, keep)

    def append(self, record: dict[str, Any]) -> None:
        """Write one line; warn where the disk is full."""
        self._waiting += (json.dumps(directory.finite(record)) + "\n").encode()
        try:
            self._flush()
        except OSError as error:
            log.warning("%s: %s; its lines are kept in memory and tried again.", self.path, error.strerror)

    def sync(self) -> int:
        """Flush to disk, and return the length. Raises: OSError."""
        self._flush()
        os.fsync(self._file.fileno())
        return self._end

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _flush(self) -> None:
        try:
            if self._waiting and self._file.write(self._waiting) != len(self._waiting):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self._file.truncate(self._end)  # no half line
            raise
        self._end += len(self._waiting)
        self._waiting = b""
