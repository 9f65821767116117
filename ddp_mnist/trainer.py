"""The job: build, loop, score, close."""

from __future__ import annotations

import contextlib
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddp_mnist import data, rundir
from ddp_mnist.checkpoint import TrainState, load_weights, publish_weights
from ddp_mnist.config import TrainConfig
from ddp_mnist.data import Batch, TrainBatches, to_float
from ddp_mnist.errors import JobError
from ddp_mnist.evaluate import Score, evaluate
from ddp_mnist.model import CNN
from ddp_mnist.tracking import Tracker
from ddp_mnist.world import World


def fit(config: TrainConfig) -> dict[str, Any]:
    """Train as configured; every rank of the job calls it. Returns the run's summary, as in summary.json.

    Raises: JobError, the same on all ranks, with the exit code it deserves. Only rank 0 writes files.
    """
    with World(config) as world:
        config.check_world(world.size)
        run_dir, config = settle(config, world)
        trainer = Trainer(config, world, run_dir)
        try:
            return trainer.run()
        except JobError as error:
            trainer.summarise(error.stop_reason, exit_code=error.exit_code)
            raise


def settle(config: TrainConfig, world: World) -> tuple[Path, TrainConfig]:
    """What the flags leave open, decided by rank 0 for all: the run directory and which data set `auto` is."""
    run_dir = world.broadcast(world.agree(lambda: rundir.create(config) if world.is_main else None))
    dataset = world.broadcast(
        world.agree(lambda: data.resolve(config.dataset, config.data_dir) if world.is_main else "")
    )
    assert run_dir is not None
    return run_dir, config.replace(output_dir=run_dir, dataset=dataset)


class Trainer:
    """One attempt at a run, on one rank."""

    def __init__(self, config: TrainConfig, world: World, run_dir: Path) -> None:
        self.config = config
        self.world = world
        self.run_dir = run_dir
        train_set, test_set = world.agree(lambda: data.load(config.dataset, config.data_dir))
        self.train_set, self.test_set = train_set.to(world.device), test_set.to(world.device)
        self.batches = TrainBatches(
            self.train_set,
            batch_size=config.batch_size,
            rank=world.rank,
            world_size=world.size,
            seed=config.seed,
        )
        self.total_steps = len(self.batches) * config.epochs
        self.step = TrainStep(config, world)
        self.state = TrainState()
        self.samples_before, self.seconds_before = self.state.samples_seen, self.state.train_seconds
        sizes = [self.batches.global_size(step) for step in range(len(self.batches))]
        self.tracker = Tracker(config, world, run_dir, self.state, epoch_sizes=sizes)

    def run(self) -> dict[str, Any]:
        if self.world.is_main:
            settings = {"settings": self.config.to_dict(), **rundir.facts(self.world.size)}
            rundir.write_json(self.run_dir / rundir.CONFIG, settings)
        self.step.settle_buckets(self.batches)
        with self.tracker:
            self.tracker.say(self.banner())
            stop_reason = self.loop()
            return self.finish(stop_reason)

    def loop(self) -> str:
        """Train until done or stopped; returns why it ended."""
        config, state, tracker = self.config, self.state, self.tracker
        while state.epoch < config.epochs:
            lap = Stopwatch()
            for batch in self.batches.epoch(state.epoch, start=state.step_in_epoch):
                if config.max_steps and state.step >= config.max_steps:
                    return "max_steps"
                rate = learning_rate(config, state.step, self.total_steps)
                loss = self.step(batch, rate)
                state.advance(batch.global_size)
                tracker.train(state, loss)
                state.train_seconds += lap()
                if tracker.due(state):
                    tracker.line(state, rate)
                    lap()
            tracker.settle(state)
            state.train_seconds += lap()
            score = self.score(self.test_set)
            rate = learning_rate(config, state.step - 1, self.total_steps)
            tracker.line(state, rate, score)
            self.last_score = (state.step, score)
            state.end_epoch()
        return "finished"

    def score(self, split: data.Split) -> Score:
        lap = Stopwatch()
        result = evaluate(self.step.net, split, self.world)
        self.state.eval_seconds += lap()
        return result

    def finish(self, stop_reason: str) -> dict[str, Any]:
        """Final weights, both scores, summary."""
        self.tracker.settle(self.state)
        self.world.agree(self.publish)
        train = self.score(self.train_set)
        scored_step, test = getattr(self, "last_score", (-1, None))
        if test is None or scored_step != self.state.step:
            test = self.score(self.test_set)
        self.tracker.say(f"Checking accuracy on training data\n{train.sentence()}")
        self.tracker.say(f"Checking accuracy on test data\n{test.sentence()}")
        summary = self.summarise(stop_reason, exit_code=0, train=train, test=test)
        self.tracker.say(f"wrote {self.run_dir}")
        return summary

    def publish(self) -> None:
        if not self.world.is_main:
            return
        path = self.run_dir / rundir.WEIGHTS
        try:
            publish_weights(self.step.net, path)
        except OSError as error:
            raise JobError(f"{path} could not be written: {error.strerror}.") from error

    def summarise(
        self, stop_reason: str, *, exit_code: int, train: Score | None = None, test: Score | None = None
    ) -> dict[str, Any]:
        """summary.json's content; rank 0 writes it."""
        config, state, world = self.config, self.state, self.world
        state.wall_seconds = self.tracker.wall_seconds()
        seconds = state.train_seconds - self.seconds_before
        summary = {
            "finished": stop_reason == "finished",
            "stop_reason": stop_reason,
            "exit_code": exit_code,
            "dataset": config.dataset,
            "recipe": config.recipe,
            "epochs": config.epochs,
            "steps": state.step,
            "samples_seen": state.samples_seen,
            "world_size": world.size,
            "device": world.device.type,
            "mixed_precision": config.mixed_precision,
            "threads": world.threads,
            "skipped_steps": state.skipped_steps,
            "train_correct": train and train.correct,
            "train_count": train and train.count,
            "train_accuracy": train and train.accuracy,
            "train_loss": train and train.loss,
            "test_correct": test and test.correct,
            "test_count": test and test.count,
            "test_accuracy": test and test.accuracy,
            "test_loss": test and test.loss,
            "train_seconds": round(state.train_seconds, 3),
            "eval_seconds": round(state.eval_seconds, 3),
            "wall_seconds": round(state.wall_seconds, 3),
            "images_per_second": round((state.samples_seen - self.samples_before) / seconds, 1) if seconds else None,
            "resumed_from": None,
            "wandb_mode": config.wandb,
        }
        if world.is_main:
            rundir.write_json(self.run_dir / rundir.SUMMARY, summary)
        return summary

    def banner(self) -> str:
        config, world = self.config, self.world
        threads = f"{world.threads} thread" + ("s" if world.threads > 1 else "")
        ranks = f"{world.size} rank" + ("s" if world.size > 1 else "")
        device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else world.device.type
        share = f"{config.batch_size} images, {self.batches.local_size} per rank"
        if config.accumulate > 1:
            share += f" in {config.accumulate} parts"
        lines = [
            f"ddp_mnist: {config.recipe} recipe on {config.dataset}, "
            f"{len(self.train_set):,} training and {len(self.test_set):,} test images",
            f"  device  {device}, {ranks}, {threads} each, precision {config.mixed_precision}",
            f"  batch   {share}; {config.epochs} epoch{'s' if config.epochs > 1 else ''} of {len(self.batches)} steps; "
            f"Adam {config.lr:g} {config.schedule}",
            f"  output  {self.run_dir}",
        ]
        if config.dataset == "synthetic":
            lines.append(data.SYNTHETIC_WARNING)
        return "\n".join(lines)


class TrainStep:
    """Network and optimizer under Accelerate: one call is one optimizer step on this rank's share of a batch."""

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.config = config
        self.world = world
        self.skipped = 0
        torch.manual_seed(config.seed)
        self.net = CNN(widths=config.widths)
        if config.init_from is not None:
            world.agree(lambda: load_weights(self.net, config.init_from))  # type: ignore[arg-type]
        self.net.to(world.device).to(memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(self.net.parameters(), lr=config.lr, fused=True)
        self.model, self.optimizer = world.accelerator.prepare(self.net, optimizer)

    def __call__(self, batch: Batch, rate: float) -> Tensor:
        """Returns this rank's part of the global mean loss, a scalar; the sum over the ranks is the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        loss = self.gradients(batch)
        if self.config.grad_clip:
            self.world.accelerator.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.skipped += self.optimizer.step_was_skipped
        return loss

    def gradients(self, batch: Batch) -> Tensor:
        """Forward and backward of a share, in `accumulate` parts; the ranks exchange gradients in the last one.

        DDP averages over the ranks, so a rank's loss is its sum / images in the global batch x world size: the
        average is then the true mean, also when the shares are uneven or one of them is empty.
        """
        accelerator = self.world.accelerator
        parts = self.config.accumulate
        total = torch.zeros((), device=self.world.device)
        shares = zip(batch.images.tensor_split(parts), batch.labels.tensor_split(parts), strict=True)
        for part, (images, labels) in enumerate(shares, start=1):
            exchange = contextlib.nullcontext() if part == parts else accelerator.no_sync(self.model)
            with exchange:
                logits = self.model(to_float(images))
                loss = F.cross_entropy(logits, labels, reduction="sum") / batch.global_size
                accelerator.backward(loss * self.world.size)
            total += loss.detach()
        return total

    def settle_buckets(self, batches: TrainBatches) -> None:
        """Two uncounted passes: DDP regroups its gradients after the first backward, which would change the order
        of sums between the first step of a run and the first step after a resume."""
        if self.world.size == 1:
            return
        batch = next(batches.epoch(0))
        for _ in range(2):
            self.gradients(batch)
        self.optimizer.zero_grad()


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """The rate of optimizer step `step` (from 0): a function of the step alone, so resuming needs no state.

    onecycle is torch's OneCycleLR with linear warm-up over the first quarter and a cosine down.
    """
    if config.schedule == "constant":
        return config.lr
    start, end, warm = config.lr / 25, config.lr / 250_000, 0.25 * total_steps - 1
    if step < warm:
        return start + (config.lr - start) * step / warm
    done = (step - warm) / (total_steps - 1 - warm)
    return end + (config.lr - end) * (1 + math.cos(math.pi * done)) / 2


class Stopwatch:
    """Each call returns the seconds since the one before."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def __call__(self) -> float:
        last, self._last = self._last, time.perf_counter()
        return self._last - last
