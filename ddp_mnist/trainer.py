"""The job: build, loop, score, close."""

from __future__ import annotations

import contextlib
import logging
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from ddp_mnist import provenance, rundir
from ddp_mnist.checkpoint import MODEL, Checkpoints, SaveClock, Snapshot, TrainState, publish_weights
from ddp_mnist.config import TrainConfig
from ddp_mnist.data import Pair, Split, TrainBatches, load
from ddp_mnist.data import own as own_data
from ddp_mnist.errors import STOPPED, JobError, UsageError
from ddp_mnist.evaluate import Score, class_count, evaluate
from ddp_mnist.mirror import HASTY_PATIENCE, PATIENCE, Mirror
from ddp_mnist.preemption import StopSignal
from ddp_mnist.process import code_of, each_machine_tells, leave, rank_from_environment, tell, tell_uncaught
from ddp_mnist.resume import Run, continue_command, open_run
from ddp_mnist.step import TrainStep, learning_rate
from ddp_mnist.summary import banner, summary_of
from ddp_mnist.tracking import Tracker
from ddp_mnist.world import World, lost_ranks_told

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What became of a run, on this rank."""

    run_dir: Path
    summary: dict[str, Any]
    """As in summary.json."""
    model: nn.Module
    """The trained network, unwrapped, on this rank's device, ready to be used: in evaluation mode."""

    @property
    def exit_code(self) -> int:
        """Of the job: 0 finished (or at `max_steps`), 75 stopped with a checkpoint: run it again."""
        return self.summary["exit_code"]

    def exit(self) -> NoReturn:
        """End this process as launchers and SLURM expect it of a rank of this job."""
        leave(code_of(self.exit_code))


def fit(config: TrainConfig, *, model: Callable[[], nn.Module] | None = None, data: Pair | None = None) -> Result:
    """Train as configured; every rank of the job calls it, with the same arguments. Only rank 0 writes files.

    `model` makes a network of the caller's own, images (n, ...) → logits (n, classes); default: the tutorial's CNN.
    `data`: a (training, test) pair of the caller's own tensors; default: `config.dataset`. uint8 images are scaled to
    0-1, others taken as they are.

    A run that `config.output_dir` holds is continued. Raises: JobError, the same on all ranks, with the exit code it
    deserves.
    """
    tell_uncaught()  # a user's mistake: one message also from a script
    return attempt(config, model=model, data=data, asked=config)


def attempt(
    config: TrainConfig,
    *,
    model: Callable[[], nn.Module] | None = None,
    data: Pair | None = None,
    stop: StopSignal | None = None,
    mirror: Mirror | None = None,
    asked: TrainConfig | None = None,
) -> Result:
    """What `fit` is, for programs that have more in hand. `stop`: signal handlers that are installed already; `mirror`:
    W&B's process, if it is started already. `asked`: what a script has in its source; None: the program has the flags
    of TrainConfig. The command that continues the run says so. Raises: JobError, as `fit`."""
    own: tuple[Split, Split] | None = None
    if data is not None:
        with each_machine_tells():
            name, own = own_data(data)
        config = config.replace(dataset=name)
    with contextlib.ExitStack() as stack:
        stop = stop or stack.enter_context(StopSignal())
        stop.limit(config.max_minutes)
        mirror = mirror or stack.enter_context(Mirror(config, is_main=rank_from_environment() == 0))
        mirror.decide()  # before any rank waits for another: it may take seconds
        world = stack.enter_context(World(config))
        config.check_world(world.size)
        if own is not None:
            same_data(config.dataset, world)
        run = trainer = None
        try:
            with lost_ranks_told(world):
                run = stack.enter_context(open_run(config, world))
                if run.finished:
                    return already_finished(run, world, model)
                trainer = Trainer(run, world, stop, mirror, model, own, asked)
                stack.callback(trainer.step.close)
                stack.enter_context(trainer.tracker)
                return Result(run.path, trainer.run(), trainer.step.net.eval())
        except JobError as error:
            if trainer is not None:
                trainer.give_up(error)
            elif run is not None and not run.finished and world.is_main:
                give_up_early(run, world, error)
            raise


def already_finished(run: Run, world: World, model: Callable[[], nn.Module] | None) -> Result:
    step = TrainStep(run.config.replace(compile=False), world, run.snapshot, model)
    step.close()
    if world.is_main:
        with contextlib.suppress(OSError):
            print(f"{run.path} is finished: {run.finished['test_accuracy']:.2%} test accuracy. Nothing to do.")
    return Result(run.path, run.finished, step.net.eval())


def give_up_early(run: Run, world: World, error: JobError) -> None:
    """Leave a summary of an attempt that failed before anything was built: the data, say. Raises nothing."""
    state = run.snapshot.state if run.snapshot else TrainState()
    summary = summary_of(run.config, world, state, stop_reason=error.stop_reason, exit_code=error.exit_code)
    with contextlib.suppress(OSError):
        rundir.write_json(run.path / rundir.SUMMARY, summary)


def same_data(name: str, world: World) -> None:
    """Raises: UsageError, on all ranks, when a rank was given other data than rank 0."""
    first = world.broadcast(name)

    def compare() -> None:
        if name != first:
            raise UsageError("it was given other data than rank 0. Seed whatever draws or splits them.")

    world.agree(compare)


class Trainer:
    """One attempt at a run, on one rank."""

    def __init__(
        self,
        run: Run,
        world: World,
        stop: StopSignal,
        mirror: Mirror,
        model: Callable[[], nn.Module] | None,
        own: tuple[Split, Split] | None,
        asked: TrainConfig | None,
    ) -> None:
        self.run_dir, self.config = run.path, run.config
        self.world = world
        self.stop = stop
        self.program: dict[str, Any] = {"script": bool(asked or model or own), "asked": asked}
        """What was started, for `continue_command`."""
        config = self.config
        train_set, test_set = own or world.agree(lambda: load(config.dataset, config.data_dir))
        self.train_set, self.test_set = train_set.to(world.device), test_set.to(world.device)
        self.batches = TrainBatches(
            self.train_set,
            batch_size=config.batch_size,
            rank=world.rank,
            world_size=world.size,
            seed=config.seed,
        )
        self.total_steps = len(self.batches) * config.epochs
        self.step = TrainStep(config, world, run.snapshot, model, spare=self.train_set)
        with contextlib.ExitStack() as unless_built:
            unless_built.callback(self.step.close)
            for split in (self.train_set, self.test_set):
                class_count(self.step.net, split)
            self.state = run.snapshot.state if run.snapshot else TrainState()
            self.resumed_from = self.state.step if run.snapshot else None
            self.before = (self.state.samples_seen, self.state.train_seconds)
            self.banner = banner(run, world, self.batches, len(self.test_set))
            self.scored: tuple[int, Score] | None = None
            sizes = [self.batches.global_size(step) for step in range(len(self.batches))]
            metrics_bytes = run.snapshot.metrics_bytes if run.snapshot else 0
            self.tracker = world.agree(
                lambda: Tracker(
                    config, world, run.path, self.state, mirror=mirror, epoch_sizes=sizes, metrics_bytes=metrics_bytes
                )
            )
            unless_built.pop_all()
        self.checkpoints = Checkpoints(run.path, config.keep_checkpoints)
        self.clock = SaveClock()
        self.lap = Stopwatch()
        """Of the training; what is not part of it ends with a call that counts nothing."""

    def run(self) -> dict[str, Any]:
        """The whole attempt; returns what summary.json has. Raises: JobError, the same on all ranks."""
        self.world.agree(self.write_config)
        self.step.settle(self.batches)
        self.tracker.say(self.banner)
        self.tracker.start_mirror()
        reason = self.loop()
        self.stop.close()
        return self.finish(reason) if reason in ("finished", "max_steps") else self.leave(reason)

    def loop(self) -> str:
        """Train until done or stopped; returns why it ended."""
        config, state, tracker, lap = self.config, self.state, self.tracker, self.lap
        while state.epoch < config.epochs:
            tracker.go()
            lap()
            for batch in self.batches.epoch(state.epoch, start=state.step_in_epoch):
                if config.max_steps and state.step >= config.max_steps:
                    return "max_steps"
                if reason := self.stop.agreed(self.world, state.step):
                    return reason
                rate = learning_rate(config, state.step, self.total_steps)
                loss, correct = self.step(batch, rate)
                state.advance(batch.global_size)
                state.skipped_steps += self.step.optimizer.step_was_skipped
                tracker.train(state, loss, correct)
                state.train_seconds += lap()
                if tracker.due(state):
                    self.line()
                    if not tracker.finishes_later:  # else training goes on meanwhile
                        lap()
                    self.save_if_due()
                elif config.checkpoint_every and state.step_in_epoch < len(self.batches):  # else below, with its score
                    self.save_if_due()
            self.settle()
            score = self.score(self.test_set)
            self.scored = (state.step, score)
            self.line(score)
            state.end_epoch()
            lap()
            self.save_if_due(epoch_end=True)
        return "finished"

    def line(self, score: Score | None = None) -> None:
        """Of the log and of metrics.jsonl; a collective."""
        rate = learning_rate(self.config, self.state.step - 1, self.total_steps)
        self.tracker.line(self.state, rate, self.step.gradient_norm(), score)

    def save_if_due(self, *, epoch_end: bool = False) -> None:
        """Called where all ranks have the same step. Training goes on when a save fails: the last one is kept."""
        if self.config.checkpoint_every:
            if self.state.step % self.config.checkpoint_every == 0:
                self.save_between_steps()  # at a step that all ranks can work out
        elif self.world.is_main and self.clock.due(epoch_end=epoch_end):
            # An interval has just ended: nothing to collect from the other ranks, rank 0 decides alone.
            self.save_between_steps(collect=self.world.size == 1)

    def save_between_steps(self, *, collect: bool = True) -> None:
        """The clock of the training stands still meanwhile. `collect`: a collective."""
        if collect:
            self.settle()
        self.save()
        self.lap()
        self.tracker.go()

    def settle(self) -> None:
        """Wait for the steps so far, which is part of their time; a collective."""
        waits = self.tracker.waits()
        self.tracker.settle(self.state)
        if waits:
            self.state.train_seconds += self.lap()

    def save(self) -> JobError | None:
        """Rank 0 publishes a checkpoint. Returns what went wrong, after a warning."""
        if not self.world.is_main:
            return None
        lap = Stopwatch()
        try:
            self.state.wall_seconds = self.tracker.wall_seconds()
            weights, optimizer, scaler = self.step.snapshot()
            settings = self.config.to_dict()
            metrics_bytes = self.tracker.metrics_bytes()
            self.checkpoints.publish(Snapshot(self.state, settings, weights, optimizer, scaler, metrics_bytes))
            return None
        except (OSError, JobError) as error:
            what = f"the checkpoint of step {self.state.step} could not be saved ({error})."
            last = self.checkpoints.last_step()
            kept = "There is none before it." if last is None else f"The one of step {last} is kept."
            log.warning("%s %s", what, kept)
            return JobError(what, stop_reason=error.stop_reason if isinstance(error, JobError) else "save_failed")
        finally:
            self.clock.saved(lap())

    def save_or_fail(self) -> None:
        """The save that must succeed, at a stop and at the end. Raises: JobError on all ranks."""
        self.settle()
        failure = self.world.broadcast(self.save())
        if failure is not None:
            raise failure

    def leave(self, reason: str) -> dict[str, Any]:
        """Stopped early: save, say how to go on."""
        self.save_or_fail()
        summary = self.summarise(reason, exit_code=STOPPED)
        try:
            self.write_summary(summary)
        except JobError as error:  # the checkpoint is what counts
            log.warning("%s", error)
        self.tracker.say(
            f"stopped by {reason} after step {self.state.step} of {self.total_steps}; continue with\n"
            f"  {self.continue_command(self.config)}"
        )
        self.tracker.end(preempted=True, exit_code=STOPPED)
        self.world.let_others_leave()
        return self.mirrored(summary, HASTY_PATIENCE)

    def give_up(self, error: JobError) -> None:
        """Leave a summary of a failure, and add to the error what can be done about it. Raises nothing."""
        if self.world.is_main:
            summary = self.summarise(error.stop_reason, exit_code=error.exit_code)
            with contextlib.suppress(JobError):
                self.write_summary(summary)
            self.tracker.end(preempted=False, exit_code=error.exit_code)
        if self.world.is_main or (error.local and self.world.rank == 1):  # whom rank 0 may have been lost to
            self.advise(error)
            tell(error)
        if self.world.is_main:
            self.mirrored(summary, HASTY_PATIENCE)
        if not error.local:
            # srun --kill-on-bad-exit ends rank 0 with the first that leaves, be it in the middle of a word.
            with contextlib.suppress(RuntimeError):
                self.world.broadcast(None)

    def advise(self, error: JobError) -> None:
        """Add what to type."""
        kept = self.checkpoints.steps()
        if error.stop_reason == "nan":
            again = self.config.replace(output_dir=None, lr=float(f"{self.config.lr / 3:.2g}"))
            if kept:
                again = again.replace(init_from=kept[-1] / MODEL)
            error.add(f"A lower rate may help:\n  {self.continue_command(again)}")
        elif kept:
            error.add(f"Continue from step {self.checkpoints.last_step()} with\n  {self.continue_command(self.config)}")

    def continue_command(self, config: TrainConfig) -> str:
        return continue_command(config, self.world, **self.program)

    def write_config(self) -> None:
        """Raises: JobError."""
        if self.world.is_main:
            content = {
                "settings": self.config.to_dict(),
                "network": self.step.name,
                "steps_per_epoch": len(self.batches),
            }
            with writing(self.run_dir / rundir.CONFIG) as path:
                rundir.write_json(path, content | provenance.facts(self.world.size))

    def score(self, split: Split) -> Score:
        """`evaluate`, on the clock; a collective."""
        lap = Stopwatch()
        result = evaluate(self.step.net, split, self.world)
        self.state.eval_seconds += lap()
        return result

    def finish(self, reason: str) -> dict[str, Any]:
        """Done, or at --max-steps: checkpoint, final weights, both scores, summary."""
        self.save_or_fail()
        self.world.agree(self.publish)
        train = self.score(self.train_set)
        if self.scored is None or self.scored[0] != self.state.step:
            self.scored = (self.state.step, self.score(self.test_set))
        test = self.scored[1]
        self.tracker.say(f"Checking accuracy on training data\n{train.sentence()}")
        self.tracker.say(f"Checking accuracy on test data\n{test.sentence()}")
        summary = self.summarise(reason, exit_code=0, train=train, test=test)
        self.world.agree(lambda: self.write_summary(summary))
        self.tracker.end(preempted=False, exit_code=0)
        if self.config.pictures and self.world.is_main:
            self.draw()
        self.tracker.say(f"wrote {self.run_dir}")
        if reason == "max_steps":
            self.tracker.say(f"continue with\n  {self.continue_command(self.config.replace(max_steps=0))}")
        return self.mirrored(summary)

    def mirrored(self, summary: dict[str, Any], patience: float = PATIENCE) -> dict[str, Any]:
        """The summary once the mirror has had at most `patience` seconds to end: only then its mode is certain."""
        self.tracker.wait(patience)
        if (mode := self.tracker.wandb_mode()) != summary["wandb_mode"]:
            summary |= {"wandb_mode": mode}
            with contextlib.suppress(JobError):
                self.write_summary(summary)
        return summary

    def publish(self) -> None:
        """The final weights. Raises: JobError."""
        if self.world.is_main:
            with writing(self.run_dir / rundir.WEIGHTS) as path:
                publish_weights(self.step.net, path)

    def draw(self) -> None:
        """Pictures and page. Raises nothing."""
        try:
            from ddp_mnist import report  # matplotlib: half a second

            report.draw(self.run_dir, data_dir=self.config.data_dir)
        except Exception as error:  # the run is done and saved: no picture is worth its exit code
            command = f"python -m ddp_mnist.report {shlex.quote(str(self.run_dir))}"
            log.warning("the pictures could not be drawn (%s: %s); try  %s", type(error).__name__, error, command)

    def summarise(
        self, stop_reason: str, *, exit_code: int, train: Score | None = None, test: Score | None = None
    ) -> dict[str, Any]:
        """summary.json's content."""
        state = self.state
        state.wall_seconds = self.tracker.wall_seconds()
        samples, seconds = state.samples_seen - self.before[0], state.train_seconds - self.before[1]
        speed = round(samples / seconds, 1) if seconds else None
        return summary_of(
            self.config,
            self.world,
            state,
            stop_reason=stop_reason,
            exit_code=exit_code,
            train=train,
            test=test,
            images_per_second=speed,
            resumed_from=self.resumed_from,
            wandb_mode=self.tracker.wandb_mode(),
        )

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Raises: JobError."""
        if self.world.is_main:
            with writing(self.run_dir / rundir.SUMMARY) as path:
                rundir.write_json(path, summary)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Raises: JobError where the file cannot be written."""
    try:
        yield path
    except OSError as error:
        raise JobError(f"{path} could not be written: {error.strerror}.") from error


class Stopwatch:
    """Each call returns the seconds since the one before."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def __call__(self) -> float:
        last, self._last = self._last, time.perf_counter()
        return self._last - last
