"""When a checkpoint is saved, and what goes into it."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from ddp_mnist.errors import JobError
from ddp_mnist.optimizer import load_state, save_state
from ddp_mnist.run import directory
from ddp_mnist.run.checkpoint import Checkpoints, Snapshot, TrainState, publish_weights, weights

if TYPE_CHECKING:
    from ddp_mnist.distributed.context import Context
    from ddp_mnist.run.metrics import Metrics
    from ddp_mnist.run.resume import Run
    from ddp_mnist.step import TrainStep

log = logging.getLogger(__name__)


class SaveClock:
    """When an automatic checkpoint is due: saving may take 1 % of the time, or 10 minutes have passed."""

    SHARE = 0.01
    SECONDS = 600.0

    def __init__(self) -> None:
        self._saved = time.monotonic()
        self._cost = 0.0

    def due(self, *, epoch_end: bool) -> bool:
        """Return whether to save now."""
        since = time.monotonic() - self._saved
        return since >= self.SECONDS or (epoch_end and self._cost <= self.SHARE * since)

    def saved(self, cost: float) -> None:
        """Note that a save has just ended. `cost`: the seconds it took, failed or not."""
        self._saved, self._cost = time.monotonic(), cost


class Saver:
    """Saves the state of a run: position, weights, optimizer and loss scaler. Every rank owns one; rank 0 writes."""

    def __init__(
        self,
        run: Run,
        context: Context,
        step: TrainStep,
        state: TrainState,
        metrics: Metrics,
    ) -> None:
        self.config, self.context = run.config, context
        self.checkpoints, self.run_dir = Checkpoints(run.path, run.config.keep_checkpoints), run.path
        self.step, self.state, self.metrics = step, state, metrics
        self.clock = SaveClock()

    def save_if_due(self, *, epoch_end: bool = False) -> None:
        """Save where `checkpoint_every` says so, or the clock. Collective.

        Training goes on when it fails, after a warning: the last checkpoint is kept.
        """
        if self.state.step_in_epoch == len(self.metrics.epoch_sizes):
            return  # the last step of an epoch is saved after scoring
        if self.config.checkpoint_every:
            due = self.state.step % self.config.checkpoint_every == 0
            if due:
                self.metrics.sync(self.state)
        else:
            # Rank 0 alone reads the clock, and only where no loss is pending: reading them is collective.
            due = self.context.is_main and not self.metrics.has_unread and self.clock.due(epoch_end=epoch_end)
        if due:
            self._save()
            self.metrics.resume_timer()

    def save(self) -> None:
        """Save now, at a stop or at the end. Collective.

        Raises:
            JobError: It failed; on all ranks.
        """
        self.metrics.sync(self.state)
        if failure := self.context.broadcast(self.context.run_on_all_ranks(self._save)):
            raise failure

    def publish_weights(self) -> None:
        """Write the final weights, `model.safetensors`. Collective. Raises: JobError, on all ranks."""
        path = self.run_dir / directory.WEIGHTS
        self.context.run_on_main(lambda: publish_weights(self.step.network, path))

    def _save(self) -> JobError | None:
        """Publish a checkpoint, on rank 0. Return what went wrong, after a warning."""
        if not self.context.is_main:
            return None
        started = time.perf_counter()
        try:
            self.checkpoints.publish(self._snapshot())
            return None
        except (OSError, JobError) as error:
            what = f"the checkpoint of step {self.state.step} could not be saved ({error})."
            last = self.checkpoints.last_step()
            kept = "There is none before it." if last is None else f"The one of step {last} is kept."
            log.warning("%s %s", what, kept)
            return JobError(what, stop_reason=error.stop_reason if isinstance(error, JobError) else "save_failed")
        finally:
            self.clock.saved(time.perf_counter() - started)

    def _snapshot(self) -> Snapshot:
        """Return the state of the run on the CPU.

        Raises:
            JobError: A weight is not finite.
            OSError: metrics.jsonl cannot be flushed.
        """
        network, scaler = self.step.network, self.context.accelerator.scaler
        self.state.wall_seconds = self.metrics.wall_seconds()
        return Snapshot(
            state=self.state,
            config=self.config.to_dict(),
            weights=weights(network),
            optimizer=save_state(network, self.step.optimizer),
            scaler=scaler.state_dict() if scaler is not None else {},
            metrics_bytes=self.metrics.metrics_bytes(),
        )


def restore(step: TrainStep, snapshot: Snapshot) -> None:
    """Give the optimizer and the loss scaler their saved state. The network has its weights already."""
    load_state(step.network, step.optimizer, snapshot.optimizer)
    scaler = step.context.accelerator.scaler
    if scaler is not None and snapshot.scaler:
        scaler.load_state_dict(snapshot.scaler)
