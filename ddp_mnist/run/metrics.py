"""The metrics of a run: console lines, a bar on a terminal, and `metrics.jsonl`.

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
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from ddp_mnist.errors import JobError
from ddp_mnist.run import directory

if TYPE_CHECKING:
    from ddp_mnist.distributed.context import Context
    from ddp_mnist.evaluate import Score
    from ddp_mnist.run.checkpoint import TrainState
    from ddp_mnist.run.resume import Run

log = logging.getLogger(__name__)


class Metrics:
    """Collects losses on the device; every `log_every` steps they are summed over the ranks, read and written."""

    def __init__(
        self,
        run: Run,
        context: Context,
        state: TrainState,
        gradient_norm: Callable[[], Tensor],
        epoch_sizes: list[int],
    ) -> None:
        """Open metrics.jsonl, on rank 0, and cut it to what the run's checkpoint knows of.

        Args:
            run: The run directory, its settings and its checkpoint.
            context: The ranks of the job.
            state: The position, and the totals of the attempts before this one.
            gradient_norm: Returns the norm of the last step's gradient, a scalar.
            epoch_sizes: Items in each global batch of an epoch.

        Raises:
            JobError: metrics.jsonl cannot be opened.
        """
        self.config, self.context, self.run_dir = run.config, context, run.path
        self.epoch_sizes = epoch_sizes
        self.total_steps = len(epoch_sizes) * run.config.epochs
        self._gradient_norm = gradient_norm
        # Of the steps that have not been read from the device yet.
        self._losses: list[Tensor] = []
        self._correct: list[Tensor] = []
        self._wall_before = state.wall_seconds
        self._started = self._resumed = time.perf_counter()
        self._last_line = (state.step, state.samples_seen, state.train_seconds)
        self._file: MetricsFile | None = None
        self._bar: Any = None
        if context.is_main:
            keep = run.snapshot.metrics_bytes if run.snapshot else 0
            self._file = MetricsFile(run.path / directory.METRICS, keep=keep)
            if run.config.progress and sys.stderr is not None and sys.stderr.isatty():
                self._bar = tqdm(total=self.total_steps, initial=state.step, unit="step", dynamic_ncols=True)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._file is not None:
            self._file.close()

    # --- Steps and scores ---

    def resume_timer(self) -> None:
        """Count time as training time from now on; scores, lines and checkpoints are not part of it."""
        self._resumed = time.perf_counter()

    def record(self, state: TrainState, rate: float, loss: Tensor, correct: Tensor) -> None:
        """Take this rank's part of a step's mean loss and correct items, after `state.advance`. Collective.

        Writes a line where an interval is full, except at the end of an epoch, where `record_score` does.

        Raises:
            JobError: A loss of the interval is not finite; on all ranks.
        """
        self._rate = rate
        self._losses.append(loss)  # as they are: copying each into a buffer is two more operations a step
        self._correct.append(correct)
        interval_full = state.step % self.config.log_every == 0
        if interval_full:
            self._read(state)  # on a GPU this waits for the steps, which is part of their time
        self._stop_timer(state)
        if interval_full and state.step_in_epoch < len(self.epoch_sizes):
            self._write_line(state)
        self.resume_timer()

    def record_score(self, state: TrainState, score: Score) -> None:
        """Write the line of an epoch's end, with its test score. Collective.

        Raises:
            JobError: A loss is not finite; on all ranks.
        """
        self.sync(state)
        self._write_line(state, score)

    @property
    def has_unread(self) -> bool:
        """Whether losses have not been read from the device yet."""
        return bool(self._losses)

    def sync(self, state: TrainState) -> None:
        """Read what the device still has into `state`; the wait is part of the training time. Collective.

        Raises:
            JobError: A loss is not finite; on all ranks.
        """
        if self._losses:
            self.resume_timer()
            self._read(state)
            self._stop_timer(state)

    def _stop_timer(self, state: TrainState) -> None:
        state.train_seconds += time.perf_counter() - self._resumed

    def _read(self, state: TrainState) -> None:
        parts = torch.stack([torch.stack(self._losses), torch.stack(self._correct).float()])
        self._losses, self._correct = [], []
        losses, correct = self.context.sum(parts).tolist()
        for step, loss in enumerate(losses, start=state.step - len(losses) + 1):
            if not math.isfinite(loss):
                raise JobError(f"the loss became {loss} at step {step}.", stop_reason="nan")
        state.losses += losses
        state.correct += int(sum(correct))

    def _write_line(self, state: TrainState, score: Score | None = None) -> None:
        """Write one line for the steps since the last one. Collective."""
        state.wall_seconds = self.wall_seconds()
        sizes = self.epoch_sizes[state.step_in_epoch - len(state.losses) : state.step_in_epoch]
        record: dict[str, Any] = {
            "step": state.step,
            "epoch": state.epoch,
            "wall_seconds": round(state.wall_seconds, 3),
            "lr": self._rate,
            "train/loss": sum(loss * size for loss, size in zip(state.losses, sizes, strict=True)) / sum(sizes),
            "train/accuracy": state.correct / sum(sizes),
            "train/gradient_norm": self._gradient_norm().item(),
        } | self._speed(state)
        if state.skipped_steps:
            record["train/skipped_steps"] = state.skipped_steps
        if score is not None:
            record |= {
                "test/loss": score.loss,
                "test/accuracy": score.accuracy,
                "test/class_accuracy": score.class_accuracy(),
                "test/confusion": score.confusion,
                "test/mistakes": [asdict(mistake) for mistake in score.mistakes],
            }
        state.losses, state.correct = [], 0
        if self._file is not None:
            self._file.append(record)
            self._show(record)

    def _speed(self, state: TrainState) -> dict[str, Any]:
        """Return this attempt's speed since the last line, with each rank's seconds a step. Collective."""
        step, samples, seconds = self._last_line
        self._last_line = (state.step, state.samples_seen, state.train_seconds)
        passed = state.train_seconds - seconds
        by_rank = torch.zeros(self.context.size, device=self.context.device)
        by_rank[self.context.rank] = passed / (state.step - step)
        each = self.context.sum(by_rank).tolist()
        speed = {
            "train/images_per_second": round((state.samples_seen - samples) / passed, 1),
            "train/step_seconds_min": min(each),
            "train/step_seconds_mean": sum(each) / len(each),
            "train/step_seconds_max": max(each),
        }
        if self.context.device.type == "cuda":
            speed["gpu/memory_bytes"] = torch.cuda.max_memory_allocated(self.context.device)
        return speed

    def metrics_bytes(self) -> int:
        """Return the length of metrics.jsonl so far, flushed to disk; 0 on other ranks than 0.

        Raises:
            OSError: The disk is full, say.
        """
        return self._file.sync() if self._file is not None else 0

    def wall_seconds(self) -> float:
        """Return the seconds since the run's start, over all attempts."""
        return self._wall_before + time.perf_counter() - self._started

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


class MetricsFile:
    """Appends whole lines to metrics.jsonl. What a full disk refuses is kept and tried again with the next line."""

    def __init__(self, path: Path, keep: int) -> None:
        """Open the file and cut it to its first `keep` bytes. Raises: JobError."""
        self.path = path
        self._waiting = b""
        try:
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed in close()
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
        if not self._waiting:
            return
        try:
            written = self._file.write(self._waiting)
            if written != len(self._waiting):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self._file.truncate(self._end)  # no half line
            raise
        self._end += len(self._waiting)
        self._waiting = b""
