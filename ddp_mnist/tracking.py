"""Showing a run: console lines, a bar on a terminal, `metrics.jsonl` and its mirror.

Every rank owns a Tracker and calls it at the same steps, since a line's loss is a mean over all ranks; rank 0 writes.

To read a figure is to wait for it. A GPU would be idle meanwhile, so alone on one, a line is begun at its step and
finished an interval later: the GPU has always work in hand, and the host is never more than two intervals ahead.
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
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ddp_mnist import rundir
from ddp_mnist.checkpoint import TrainState
from ddp_mnist.config import TrainConfig
from ddp_mnist.errors import JobError
from ddp_mnist.evaluate import Score
from ddp_mnist.mirror import HASTY_PATIENCE, PATIENCE, Mirror
from ddp_mnist.world import World

log = logging.getLogger(__name__)


class Tracker:
    """Losses go into a buffer on the device; once an interval they are summed over the ranks and read."""

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        run_dir: Path,
        state: TrainState,
        *,
        mirror: Mirror,
        epoch_sizes: list[int],
        metrics_bytes: int,
    ) -> None:
        """`mirror`: W&B's process. `epoch_sizes`: images in each global batch of an epoch. `metrics_bytes`: what to
        keep of metrics.jsonl.

        Raises: JobError on rank 0 when metrics.jsonl cannot be opened.
        """
        self.config = config
        self.world = world
        self.run_dir = run_dir
        self.epoch_sizes = epoch_sizes
        self.total_steps = len(epoch_sizes) * config.epochs
        self._losses: list[Tensor] = []
        self._correct: list[Tensor] = []
        """Of the steps not read so far; on the device."""
        self._wall_before = state.wall_seconds
        self._started = time.perf_counter()
        self._line_mark = (state.step, state.samples_seen, state.train_seconds)
        self.finishes_later = world.device.type == "cuda" and world.size == 1
        self._unfinished: Callable[[], None] | None = None
        self._running: Any = None
        """When the training went on, where lines are finished later; None: it stands still."""
        self._laps: list[tuple[Any, Any]] = []
        """From when to when it ran since the last line."""
        self._file: MetricsFile | None = None
        self._bar: Any = None
        self._mirror = mirror
        if world.is_main:
            self._file = MetricsFile(run_dir / rundir.METRICS, keep=metrics_bytes)
            if config.progress and sys.stderr is not None and sys.stderr.isatty():
                self._bar = tqdm(total=self.total_steps, initial=state.step, unit="step", dynamic_ncols=True)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):  # what has gone wrong is being told already
            self.finish_line()
        self.end(preempted=False, exit_code=1)  # a bug, if nobody has said how it ended
        self.wait(HASTY_PATIENCE)
        if self._bar is not None:
            self._bar.close()
        if self._file is not None:
            self._file.close()

    def start_mirror(self) -> None:
        """Once config.json is written, which the mirror reads."""
        self._mirror.follow(self.run_dir)
        if greeting := self._mirror.greeting():
            if self._mirror.mode.surprising:
                log.warning("W&B is %s", greeting)
            else:
                self.say(f"  W&B     {greeting}")

    def say(self, text: str) -> None:
        """One line (or block) on the console, from the main process only."""
        if self.world.is_main:
            # A full disk under the log or a closed pipe is no reason to stop training.
            with contextlib.suppress(OSError, UnicodeError):
                if self._bar is not None:
                    self._bar.write(text)
                else:
                    print(text, flush=True)

    def end(self, *, preempted: bool, exit_code: int) -> None:
        """The summary is written and nothing more comes; `wait` then waits for the mirror."""
        self._mirror.end(preempted=preempted, exit_code=exit_code)

    def wait(self, patience: float = PATIENCE) -> None:
        """Until the mirror has sent everything, at most `patience` seconds."""
        if news := self._mirror.wait(patience):
            self.say(news)

    def wandb_mode(self) -> str:
        return self._mirror.actual()

    def due(self, state: TrainState) -> bool:
        """An interval is full, and the epoch is not at its end, where `evaluated` writes the line."""
        return state.step % self.config.log_every == 0 and state.step_in_epoch < len(self.epoch_sizes)

    def train(self, state: TrainState, loss: Tensor, correct: Tensor) -> None:
        """Take this rank's part of the global mean loss and of the images recognised, after `state.advance`."""
        self._losses.append(loss)  # as they are: copying each into a buffer is two more operations a step
        self._correct.append(correct)
        if state.step % self.config.log_every == 0:  # here the wait is part of the steps' time
            if self.finishes_later:
                self.finish_line()
            else:
                self.settle(state)

    def waits(self) -> bool:
        """Whether there are steps whose figures have not been read."""
        return bool(self._losses) or self._unfinished is not None

    def settle(self, state: TrainState) -> None:
        """Move what was not read so far into `state.losses` and `state.correct`; a collective.

        Raises: JobError, on all ranks, when a loss is not finite.
        """
        self._halt()
        self.finish_line()
        if self._losses:
            losses, correct = self._summed().tolist()
            self._check(losses, state.step)
            state.losses += losses
            state.correct += int(sum(correct))

    def _summed(self) -> Tensor:
        """(2, n): over the ranks, the loss and the count of each step not read so far; a collective."""
        own = torch.stack([torch.stack(self._losses), torch.stack(self._correct).float()])
        self._losses, self._correct = [], []
        return self.world.sum(own)

    def _check(self, losses: list[float], last: int) -> None:
        """Raises: JobError when one, of the steps up to `last`, is not finite."""
        for step, loss in enumerate(losses, start=last - len(losses) + 1):
            if not math.isfinite(loss):
                raise JobError(f"the loss became {loss} at step {step}.", stop_reason="nan")

    def line(self, state: TrainState, rate: float, gradient_norm: Tensor, score: Score | None = None) -> None:
        """One line for the steps since the last, one at least, with the test score where there is one; a collective.

        Raises: JobError, on all ranks, when the loss is not finite; alone on a GPU `finish_line` does.
        """
        if not self.finishes_later or score is not None:
            self.settle(state)
        else:
            self._halt()
            self.go()
            self.finish_line()
        fresh = torch.cat([self._summed().flatten(), gradient_norm.float().view(1)]) if self._losses else gradient_norm
        state.wall_seconds = self.wall_seconds()
        record: dict[str, Any] = {
            "step": state.step,
            "epoch": state.epoch,
            "wall_seconds": round(state.wall_seconds, 3),
            "lr": rate,
        }
        speed = self._speed(state)
        more: dict[str, Any] = {}
        if state.skipped_steps:
            more["train/skipped_steps"] = state.skipped_steps
        if score is not None:
            more |= {
                "test/loss": score.loss,
                "test/accuracy": score.accuracy,
                "test/class_accuracy": score.class_accuracy(),
                "test/confusion": score.confusion,
                "test/mistakes": [asdict(mistake) for mistake in score.mistakes],
            }
        earlier, correct, end = state.losses, state.correct, state.step_in_epoch
        state.losses, state.correct = [], 0
        read = _on_its_way(fresh)

        def finish() -> None:
            *figures, norm = read()
            self._check(figures[: len(figures) // 2], record["step"])
            losses = earlier + figures[: len(figures) // 2]
            sizes = self.epoch_sizes[end - len(losses) : end]
            total = sum(loss * size for loss, size in zip(losses, sizes, strict=True))
            record["train/loss"] = total / sum(sizes)
            record["train/accuracy"] = (correct + int(sum(figures[len(figures) // 2 :]))) / sum(sizes)
            record["train/gradient_norm"] = norm
            record.update(speed() | more)
            if self._file is not None:
                self._file.append(record)
                self._show(record)

        self._unfinished = finish
        if not self.finishes_later or score is not None:
            self.finish_line()

    def go(self) -> None:
        """Training goes on, after what is not to be in its speed: scores, a checkpoint."""
        if self.finishes_later:
            self._running = _moment(self.world.device)

    def _halt(self) -> None:
        if self._running is not None:
            self._laps.append((self._running, _moment(self.world.device)))
            self._running = None

    def finish_line(self) -> None:
        """Wait for the figures of the line begun, and write it. Raises: JobError when a loss is not finite."""
        finish, self._unfinished = self._unfinished, None
        if finish is not None:
            finish()

    def _speed(self, state: TrainState) -> Callable[[], dict[str, Any]]:
        """This attempt's figures since the last line, to be asked for once the last of its steps is done: global images
        per second, seconds a step takes on each rank."""
        step, samples, seconds = self._line_mark
        self._line_mark = (state.step, state.samples_seen, state.train_seconds)
        steps, images, passed = state.step - step, state.samples_seen - samples, state.train_seconds - seconds
        laps, self._laps = self._laps, []
        each: list[float] = []
        if self.world.size > 1:
            own = torch.zeros(self.world.size, device=self.world.device)
            own[self.world.rank] = passed / steps
            each = self.world.sum(own).tolist()
        memory = torch.cuda.max_memory_allocated(self.world.device) if self.world.device.type == "cuda" else None

        def figures() -> dict[str, Any]:
            total = sum(_seconds(*lap) for lap in laps) if self.finishes_later else passed
            ranks = each or [total / steps]
            found: dict[str, Any] = {
                "train/images_per_second": round(images / total, 1),
                "train/step_seconds_min": min(ranks),
                "train/step_seconds_mean": sum(ranks) / len(ranks),
                "train/step_seconds_max": max(ranks),
            }
            return found | ({"gpu/memory_bytes": memory} if memory is not None else {})

        return figures

    def metrics_bytes(self) -> int:
        """Length of metrics.jsonl so far, flushed to disk; 0 on other ranks than 0. Raises: OSError."""
        return self._file.sync() if self._file is not None else 0

    def wall_seconds(self) -> float:
        """Over all attempts."""
        return self._wall_before + time.perf_counter() - self._started

    def _show(self, record: dict[str, Any]) -> None:
        loss, speed = record["train/loss"], record["train/images_per_second"]
        epoch = f"epoch {record['epoch'] + 1}/{self.config.epochs}"
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} images/s", refresh=False)
            self._bar.update(record["step"] - self._bar.n)
        elif "test/accuracy" not in record:
            images_left = (self.total_steps - record["step"]) * self.config.batch_size
            left = f", {images_left / speed:,.0f} s left" if speed else ""
            share = f"step {record['step']}/{self.total_steps}"
            self.say(f"{epoch} {share}: loss {loss:.4f}, {speed:,.0f} images/s{left}")
        if "test/accuracy" in record:
            accuracy, test_loss = 100 * record["test/accuracy"], record["test/loss"]
            self.say(f"{epoch} done: train loss {loss:.4f}, test loss {test_loss:.4f}, test accuracy {accuracy:.2f} %")


def _moment(device: torch.device) -> Any:
    """Now; on a GPU the moment when it is done with what was launched so far."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(begin: Any, end: Any) -> float:
    return end - begin if isinstance(end, float) else begin.elapsed_time(end) / 1000


def _on_its_way(figures: Tensor) -> Callable[[], list[float]]:
    """On a GPU: starts to copy them; returns what waits for them and has them, whatever was begun after them."""
    if figures.device.type != "cuda":
        return figures.reshape(-1).tolist
    home = torch.empty(figures.numel(), dtype=figures.dtype, pin_memory=True)
    home.copy_(figures.reshape(-1), non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> list[float]:
        copied.synchronize()
        return home.tolist()

    return read


class MetricsFile:
    """metrics.jsonl: whole lines only. What a full disk refuses is kept and tried again with the next line."""

    def __init__(self, path: Path, keep: int) -> None:
        """Cuts the file to its first `keep` bytes. Raises: JobError."""
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
        self._waiting += (json.dumps(rundir.finite(record)) + "\n").encode()
        try:
            self._flush()
        except OSError as error:
            log.warning("%s: %s; its lines are kept in memory and tried again.", self.path, error.strerror)

    def sync(self) -> int:
        """Flush to disk; returns the length. Raises: OSError."""
        self._flush()
        os.fsync(self._file.fileno())
        return self._end

    def close(self) -> None:
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
