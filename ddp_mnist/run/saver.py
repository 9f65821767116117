"""Decide when a checkpoint is saved, and what goes into it."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from ddp_mnist.errors import JobError
from ddp_mnist.optimizer import load_state, save_state
from ddp_mnist.run import directory
from ddp_mnist.run.checkpoint import Checkpoints, Snapshot, publish_weights, weights

if TYPE_CHECKING:
    from ddp_mnist.distributed.context import Context
    from ddp_mnist.run.metrics import Metrics
    from ddp_mnist.step import TrainStep

log = logging.getLogger(__name__)

MAX_SHARE_OF_TIME = 0.01
"""An epoch ends with an automatic checkpoint if saving takes at most this share of the time since the last one."""
MAX_SECONDS = 600.0
"""After so long without one, an automatic checkpoint is due within an epoch too."""


class Saver:
    """Saves the state of a run: position, weights, optimizer and loss scaler. Every rank owns one; rank 0 writes."""

    def __init__(self, context: Context, train_step: TrainStep, metrics: Metrics) -> None:
        """Note what to save; the run directory is that of the metrics."""
        self.context, self.train_step, self.metrics = context, train_step, metrics
        self.run_dir, self.config, self.state = metrics.run.path, metrics.config, metrics.state
        self.checkpoints = Checkpoints(self.run_dir, self.config.keep_checkpoints)
        self._last_save, self._cost = time.monotonic(), 0.0

    def save_if_due(self, *, epoch_end: bool = False) -> None:
        """Save where `checkpoint_every` says so, or the clock. Collective.

        Training goes on when it fails, after a warning: the last checkpoint is kept.
        """
        if self.state.step_in_epoch == self.metrics.steps_per_epoch:
            return  # the last step of an epoch is saved after scoring
        if self.config.checkpoint_every:
            due = self.state.step % self.config.checkpoint_every == 0
            if due:
                self.metrics.sync()
        else:
            # Rank 0 decides by its own clock, and the others do not hear of it: this save must need no collective. So
            # it waits while losses are still to be summed over the ranks.
            due = self.context.is_main and not self.metrics.has_unread and self._is_time(epoch_end=epoch_end)
        if due:
            self._try_to_save()
            self.metrics.resume_timer()

    def _is_time(self, *, epoch_end: bool) -> bool:
        since = time.monotonic() - self._last_save
        return since >= MAX_SECONDS or (epoch_end and self._cost <= MAX_SHARE_OF_TIME * since)

    def save(self) -> None:
        """Save now, at a stop or at the end. Collective. Raises: JobError, on all ranks."""
        self.metrics.sync()
        self.context.run_on_main(self._save)

    def publish_weights(self) -> None:
        """Write the final weights, `model.safetensors`. Collective. Raises: JobError, on all ranks."""
        path = self.run_dir / directory.WEIGHTS
        self.context.run_on_main(lambda: publish_weights(self.train_step.network, path))

    def _try_to_save(self) -> None:
        if self.context.is_main:
            try:
                self._save()
            except JobError as error:
                log.warning("%s", error)

    def _save(self) -> None:
        """Publish a checkpoint. Raises: JobError."""
        started = time.monotonic()
        try:
            self.checkpoints.publish(self._snapshot())
        except (OSError, JobError) as error:
            last = self.checkpoints.last_step()
            kept = "There is none before it." if last is None else f"The one of step {last} is kept."
            raise JobError(
                f"the checkpoint of step {self.state.step} could not be saved ({error}). {kept}",
                stop_reason=error.stop_reason if isinstance(error, JobError) else "save_failed",
            ) from error
        finally:
            self._last_save = time.monotonic()
            self._cost = self._last_save - started

    def _snapshot(self) -> Snapshot:
        """Return the state of the run on the CPU. Raises: JobError or OSError."""
        network, scaler = self.train_step.network, self.context.accelerator.scaler
        self.state.wall_seconds = self.metrics.wall_seconds()
        return Snapshot(
            state=self.state,
            config=self.config.to_dict(),
            weights=weights(network),
            optimizer=save_state(network, self.train_step.optimizer),
            scaler=scaler.state_dict() if scaler is not None else {},
            metrics_bytes=self.metrics.metrics_bytes(),
        )


def restore(train_step: TrainStep, snapshot: Snapshot) -> None:
    """Give the optimizer and the loss scaler their saved state. The network has its weights already."""
    load_state(train_step.network, train_step.optimizer, snapshot.optimizer)
    scaler = train_step.context.accelerator.scaler
    if scaler is not None and snapshot.scaler:
        scaler.load_state_dict(snapshot.scaler)
