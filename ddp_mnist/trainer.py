"""The job: build, train, then finish or stop."""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from torch import nn

from ddp_mnist.distributed import launcher
from ddp_mnist.distributed.context import Context, translate_errors
from ddp_mnist.distributed.preemption import StopSignal
from ddp_mnist.errors import STOPPED, JobError
from ddp_mnist.evaluate import Score, evaluate, raise_failure
from ddp_mnist.report.page import try_to_draw
from ddp_mnist.step import Loss, TrainStep, rate_factor
from ddp_mnist.storage.checkpoint import Saver, restore
from ddp_mnist.storage.metrics import Metrics
from ddp_mnist.storage.resume import Run, advise, continue_command, open_run
from ddp_mnist.wandb_mirror.mirror import HASTY_PATIENCE, PATIENCE, Mirror
from ddp_mnist.workload import Workload

if TYPE_CHECKING:
    from ddp_mnist.config import TrainConfig
    from ddp_mnist.data.batches import Split
    from ddp_mnist.data.sources import UserData
    from ddp_mnist.optimizer import MakeOptimizer


@dataclass(frozen=True)
class Result:
    """The outcome of a run, on this rank."""

    run_dir: Path
    summary: dict[str, Any]  # as in summary.json
    model: nn.Module  # the trained network, unwrapped, on this rank's device, in evaluation mode

    @property
    def exit_code(self) -> int:
        """Return the job's exit code. 0: finished, or at `max_steps`. 75: stopped with a checkpoint; start it again."""
        return self.summary["exit_code"]

    def exit(self) -> NoReturn:
        """End this process with the exit code that launchers and SLURM expect of this rank."""
        launcher.hard_exit(launcher.exit_code_for_rank(self.exit_code))


def fit(
    config: "TrainConfig",
    *,
    model: Callable[[], nn.Module] | None = None,
    data: "UserData | None" = None,
    optimizer: "MakeOptimizer | None" = None,
    loss: Loss | None = None,
) -> Result:
    """Train as configured and return the result. Collective: every rank of the job calls it, with the same arguments.

    If `config.output_dir` holds a run already, that run is continued. Only rank 0 writes files. Raises JobError, which
    has the exit code: the same error on all ranks.

    Args:
        config: All settings.
        model: A function () → your network, which maps inputs (n, ...) to outputs; default: the tutorial's CNN.
        data: A (training, test) pair of your own; default: `config.dataset`. Each of the two is a pair of tensors in
            memory, (inputs, targets), or a TensorDataset, or a data set with `__len__` and `__getitem__` → (input,
            target), which `config.workers` processes load. uint8 inputs are divided by 255; floats become fp32.
        optimizer: A function, network → its optimizer; default: Adam. A schedule peaks at each group's own rate.
        loss: A function, (outputs, targets) → one value per item, (n,); default: cross entropy of logits (n, classes).
    """
    launcher.install_excepthook()  # a script, too, ends with one message, not a traceback
    return run_attempt(config, model=model, data=data, optimizer=optimizer, loss=loss, script_config=config)


def run_attempt(config: "TrainConfig", *, stop: StopSignal | None = None, **parts: Any) -> Result:
    """Run one attempt, as `fit` does. Collective. `stop`: a StopSignal that is entered already; None: enter one."""
    workload = Workload(config, **parts)
    config = workload.config
    with ExitStack() as stack:
        for split in workload.sets or ():
            stack.callback(split.close)
        stop = stop or stack.enter_context(StopSignal())
        stop.limit(config.max_minutes)
        # The mirror comes first, before any rank waits for another: asking the W&B server may take seconds.
        mirror = stack.enter_context(Mirror(config, is_main=launcher.from_environment("RANK") == 0))
        context = stack.enter_context(Context(config, stop))
        trainer = None
        try:
            with translate_errors(context):
                config.check_world_size(context.world_size)
                workload.check_same_data()
                run = stack.enter_context(open_run(config, context))
                workload.config = run.config
                if run.final_summary:
                    network = workload.build_network(context, run.snapshot)
                    Metrics(run, context).say(f"{run.path} is finished; nothing to do. Its scores are in summary.json.")
                    return Result(run.path, run.final_summary, network.eval())
                trainer = Trainer(run, context, stop, mirror, workload)
                trainer.build(stack)
                return Result(run.path, trainer.run(), trainer.network.eval())
        except JobError as error:
            if trainer is not None:
                trainer.fail(error)
            launcher.report_error(error)
            if not error.local:
                # Wait until rank 0 has printed: srun --kill-on-bad-exit kills all ranks when the first one exits.
                with suppress(RuntimeError):
                    context.broadcast(None)
            raise


class Trainer:
    """One attempt at a run, on one rank."""

    def __init__(self, run: Run, context: Context, stop: StopSignal, mirror: Mirror, workload: Workload) -> None:
        """Take what the ranks have agreed on. `build` makes the rest, which may fail."""
        self.run_dir, self.config, self.context = run.path, run.config, context
        self.stop, self.mirror, self.workload = stop, mirror, workload
        self.metrics, self.state, self.snapshot = Metrics(run, context), run.state, run.snapshot
        self.is_built = False
        self.test_score: Score | None = None  # of the last epoch that this attempt has finished

    def build(self, stack: ExitStack) -> None:
        """Load the data, build network and optimizer, restore the run's checkpoint if there is one. Collective.

        `stack` will close what this opens. Raises JobError on all ranks: a part is missing or does not fit the others.
        """
        config, context, snapshot, workload = self.config, self.context, self.snapshot, self.workload
        self.batches, self.test_set = workload.load_data(context)
        self.total_steps = len(self.batches) * config.epochs
        network = self.network = workload.build_network(context, snapshot, self.batches.dummy[0])
        # Parts that do not fit each other fail here, not after an epoch.
        self.classes = context.run_on_all_ranks(lambda: workload.try_out(network, self.batches, self.test_set))
        self.train_step = TrainStep(
            config, context, network, loss=workload.loss, optimizer=workload.make_optimizer, classes=self.classes
        )
        stack.callback(self.train_step.close)
        if snapshot is not None:
            restore(self.train_step, snapshot)
        stack.callback(self.metrics.close)
        name = f"{type(self.network).__module__}.{type(self.network).__qualname__}" if workload.make_network else None
        self.metrics.open(self.batches, len(self.test_set), self.train_step, name)
        self.saver = Saver(context, self.train_step, self.metrics)
        self.is_built = True

    def run(self) -> dict[str, Any]:
        """Do the whole attempt and return what summary.json has. Collective. Raises JobError: the same on all ranks."""
        if where := self.mirror.follow(self.run_dir):
            self.metrics.say(f"  W&B     {where}")
        self.train_step.rehearse(self.batches)
        try:
            reason = self._train()
            self.stop.close()
            return self._finish(reason) if reason in ("finished", "max_steps") else self._stop_early(reason)
        except JobError as error:
            if error.stop_reason == "nan":  # this NaN may stand for a loading error, see `_train`
                self.context.run_on_all_ranks(lambda: raise_failure(self.batches.train_set))
            raise

    def _train(self) -> str:
        """Train until done or stopped; return why it ended."""
        config, state = self.config, self.state
        while state.epoch < config.epochs:
            self.metrics.resume_timer()
            for batch in self.batches.epoch(state.epoch, start=state.step_in_epoch):
                if config.max_steps and state.step >= config.max_steps:
                    return "max_steps"
                if reason := self.stop.agreed(self.context, state.step):
                    return reason
                loss, correct = self.train_step(batch, rate_factor(config, state.step, self.total_steps))
                if self.batches.train_set.failure is not None:
                    # Loading has failed on this rank, and this batch is a dummy. NaN reaches all ranks with the next
                    # sum of losses, before any save; then `run` raises the real error.
                    loss = loss * math.nan
                state.advance(batch.global_size, skipped=self.context.accelerator.optimizer_step_was_skipped)
                self.metrics.record(loss, correct, batch.global_size)
                self.saver.save_if_due()
            self.test_score = self._score(self.test_set)
            self.metrics.record_score(self.test_score)
            state.end_epoch()
            self.saver.save_if_due(epoch_end=True)
        return "finished"

    def _score(self, split: "Split") -> Score:
        self.metrics.sync()  # wait for the device first: its pending steps are training time
        started = time.perf_counter()
        score = evaluate(self.network, split, self.context, loss=self.workload.loss, classes=self.classes)
        self.state.eval_seconds += time.perf_counter() - started
        return score

    def _finish(self, reason: str) -> dict[str, Any]:
        """Save, score both sets and return the summary: all epochs are done, or `max_steps` is reached. Collective."""
        self.saver.save()
        self.saver.publish_weights()
        train = self._score(self.batches.train_set)
        test = self.test_score
        if test is None or self.state.step_in_epoch > 0:
            test = self._score(self.test_set)
        self.metrics.say(f"Checking accuracy on training data\n{train.sentence()}")
        self.metrics.say(f"Checking accuracy on test data\n{test.sentence()}")
        summary = self.metrics.summary(reason, 0, wandb_mode=self.mirror.mode.name, train=train, test=test)
        self.context.run_on_main(lambda: self.metrics.write_summary(summary))
        self.mirror.end(preempted=False, exit_code=0)
        if self.config.pictures and self.context.is_main:
            try_to_draw(self.run_dir, self.config.data_dir)
        self.metrics.say(f"wrote {self.run_dir}")
        if reason == "max_steps":
            command = continue_command(self.config.replace(max_steps=0), self.context, self.workload)
            self.metrics.say(f"continue with\n  {command}")
        return self._wait_for_mirror(summary)

    def _stop_early(self, reason: str) -> dict[str, Any]:
        """Save, say how to go on, and return the summary. Collective."""
        self.saver.save()
        summary = self.metrics.summary(reason, STOPPED, wandb_mode=self.mirror.mode.name)
        self.metrics.try_to_write_summary(summary)  # the checkpoint is what counts
        command = continue_command(self.config, self.context, self.workload)
        position = f"after step {self.state.step} of {self.total_steps}"
        self.metrics.say(f"stopped by {reason} {position}; continue with\n  {command}")
        self.mirror.end(preempted=True, exit_code=STOPPED)
        self.context.wait_for_peers_to_exit()
        return self._wait_for_mirror(summary, HASTY_PATIENCE)

    def _wait_for_mirror(self, summary: dict[str, Any], patience: float = PATIENCE) -> dict[str, Any]:
        """Give the mirror `patience` seconds to end. Return the summary, with the mode that the mirror ended in."""
        if news := self.mirror.wait(patience):
            self.metrics.say(news)
        if (mode := self.mirror.mode.name) != summary["wandb_mode"]:
            summary = summary | {"wandb_mode": mode}
            self.metrics.try_to_write_summary(summary)
        return summary

    def fail(self, error: JobError) -> None:
        """Write the summary and report the error once, with what can be done about it."""
        summary = self.metrics.summary(error.stop_reason, error.exit_code, wandb_mode=self.mirror.mode.name)
        self.metrics.try_to_write_summary(summary)
        self.mirror.end(preempted=False, exit_code=error.exit_code)
        if self.context.is_main or (error.local and self.context.rank == 1):  # rank 0 may be the one that was lost
            if self.is_built:
                advise(error, self.config, self.context, self.workload)
            launcher.report_error(error)
        self._wait_for_mirror(summary, HASTY_PATIENCE)
