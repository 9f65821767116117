"""The mirror's own process: follow metrics.jsonl and summary.json, the truth, and send them to Weights & Biases.

The only module that imports wandb. `mirror.py` starts it as `python -m ddp_mnist.wandb_mirror.process OPTIONS`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import select
import signal
import sys
from pathlib import Path
from typing import Any

from ddp_mnist.data import mnist
from ddp_mnist.errors import JobError
from ddp_mnist.run import directory
from ddp_mnist.wandb_mirror.mirror import PATIENCE

log = logging.getLogger(__name__)

START_SECONDS = 300.0  # for wandb's service to start: a training on every core leaves it little CPU
LOCK_SECONDS = START_SECONDS + 120.0  # for the mirror of a killed attempt to end: wandb's limits, added up
POLL_SECONDS = 0.5
FLUSH_SECONDS = 1.0  # between writes of wandb's file, which a kill would lose; wandb's default is 15


def main() -> int:
    """Mirror a run until it ends. Return the exit code: 0 if everything went to the server, or to the disk."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):  # `scancel` signals every process
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    os.environ.pop("WANDB_MODE", None)  # it is decided, and wandb refuses an empty one
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # W&B's telemetry would try for 10 s without a network
    options = json.loads(sys.argv[1])
    run_dir, training = Path(options["run_dir"]), Training()
    try:
        import wandb

        _lock = directory.lock(run_dir / directory.WANDB, LOCK_SECONDS)  # until this process ends
        log.info("begins in %g s, or at the end of the run", options["begin_seconds"])
        training.wait_for_end(options["begin_seconds"])
        try:
            mirror(run_dir, options, training)
        except (TimeoutError, JobError):
            raise
        except Exception:  # signals to every process, as SLURM sends them, end wandb's service
            log.exception("once more")
            with contextlib.suppress(Exception):
                wandb.teardown()
            mirror(run_dir, options, training)
    except Exception as error:
        log.exception("the mirror has failed")
        training.report(problem=str(error) if isinstance(error, JobError) else f"{type(error).__name__}: {error}")
        return 1
    return 0


class Training:
    """The training, at the other end of standard input and output."""

    def __init__(self) -> None:
        self.ended = self.preempted = False
        self.exit_code = 1  # of a training that is killed and cannot say it
        self._output = os.dup(1)  # not for wandb's service, which inherits standard output
        os.dup2(2, 1)

    def wait_for_end(self, seconds: float) -> bool:
        """Wait up to `seconds` for the end of the training. Return True if it has come."""
        if not self.ended and select.select([sys.stdin], [], [], seconds)[0]:
            self.ended = True
            with contextlib.suppress(ValueError):  # cut short, or empty
                said = json.loads(sys.stdin.read())
                self.preempted, self.exit_code = said["preempted"], said["exit_code"]
        return self.ended

    def report(self, **news: str) -> None:
        """Send `mode`, `url`, `refusal` or `problem` to the training, if it is still there."""
        with contextlib.suppress(OSError):
            os.write(self._output, json.dumps(news).encode() + b"\n")


def mirror(run_dir: Path, options: dict[str, Any], training: Training) -> None:
    """Send what is new in metrics.jsonl until the training has ended, then its summary. Raises what wandb raises."""
    import wandb

    run, mode = start_run(run_dir, options, training)
    state = directory.read_json(run_dir / directory.WANDB_STATE)
    # A server knows best what it has, also of a mirror that was killed; offline adds to what the server got.
    sent = int(run.summary.get("step") or -1) if mode == "online" else max(state["online"], state["offline"])
    rest, ended = b"", False
    with open(run_dir / directory.METRICS, "rb") as file:
        while not ended:
            ended = training.wait_for_end(POLL_SECONDS)  # before reading what was written before it
            state, before = directory.read_json(run_dir / directory.WANDB_STATE), sent
            if state.get("id") != options["id"]:  # after --fresh
                raise JobError(f"{run_dir} belongs to another W&B run by now")
            *lines, rest = (rest + file.read()).split(b"\n")
            for record in map(json.loads, lines):
                if record["step"] > sent:
                    log_record(run, record, run_dir)
                    sent = record["step"]
            if sent > before:
                directory.write_json(run_dir / directory.WANDB_STATE, state | {mode: sent})
    summary = directory.read_json(run_dir / directory.SUMMARY)
    for key, value in (summary | {"wandb_mode": mode}).items():
        if key not in ("test_confusion", "test_mistakes"):
            run.summary[key] = value
    if options["model"] and summary.get("finished"):
        model = wandb.Artifact(f"model-{run.id}", type="model", metadata={"test_accuracy": summary["test_accuracy"]})
        model.add_file(str(run_dir / directory.WEIGHTS))
        run.log_artifact(model)
    if training.preempted:
        run.mark_preempting()
    run.finish(exit_code=training.exit_code)


def start_run(run_dir: Path, options: dict[str, Any], training: Training) -> tuple[Any, str]:
    """Return wandb's run and its mode: offline also where the server turns out not to take it.

    Raises:
        JobError: wandb does not work at all.
    """
    import wandb

    settings = wandb.Settings(
        console="off",
        silent=True,
        disable_code=True,
        disable_git=True,  # ours is in the config; a remote's address may hold a token
        x_stats_pid=os.getppid(),  # the training's
        x_transaction_log_flush_interval=FLUSH_SECONDS,
        x_service_wait=START_SECONDS,
        finish_timeout=PATIENCE - 5,
        finish_timeout_raises=True,
    )
    for mode in dict.fromkeys((options["mode"], "offline")):
        settings.init_timeout = options["init_seconds"] if mode == "online" else START_SECONDS
        try:
            run = wandb.init(
                mode=mode,
                resume="allow",
                dir=run_dir,
                config=directory.read_json(run_dir / directory.CONFIG),
                allow_val_change=True,
                settings=settings,
                **{key: options[key] for key in ("id", "project", "entity", "group", "name", "tags")},
            )
        except Exception as error:  # not only wandb.Error, when its service dies
            log.info("%s: %s", mode, error)
            training.report(refusal=(refusal := str(error).partition("\n")[0] or type(error).__name__))
            wandb.teardown()
            continue
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        training.report(mode=mode, **({"url": run.url} if mode == "online" and run.url else {}))
        return run, mode
    raise JobError(f"wandb does not even work offline: {refusal}")


def log_record(run: Any, record: dict[str, Any], run_dir: Path) -> None:
    """Log a line of metrics.jsonl. Our step is also wandb's own, so that it goes on in the next attempt."""
    numbers = {key: value for key, value in record.items() if not isinstance(value, list)}
    for label, accuracy in enumerate(record.get("test/class_accuracy", ())):
        numbers[f"test/class_accuracy/{label}"] = accuracy
    try:
        run.log(numbers | media(record, run_dir), step=record["step"], commit=True)
    except Exception:  # a server that takes no tables may well take numbers
        log.exception("step %d: only its numbers are sent", record["step"])
        run.log(numbers, step=record["step"], commit=True)


def media(record: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """Return the confusion matrix of a record as a chart, and its mistakes as pictures."""
    import wandb

    found: dict[str, Any] = {}
    if confusion := record.get("test/confusion"):
        rows = [[str(a), str(b), count] for a, line in enumerate(confusion) for b, count in enumerate(line)]
        names = ("Actual", "Predicted", "nPredictions")
        table = wandb.Table(columns=list(names), data=rows)
        title = {"title": "Confusion matrix of the test set"}
        found["test/confusion"] = wandb.plot_table(
            "wandb/confusion_matrix/v1", table, {name: name for name in names}, title
        )
    mistakes = record.get("test/mistakes", ())
    images = test_images(run_dir) if mistakes else None
    if images is not None:
        found["test/mistakes"] = [
            wandb.Image(
                images[mistake["index"]].repeat(4, 0).repeat(4, 1),
                caption=f"{mistake['label']} read as {mistake['prediction']}, {mistake['confidence']:.0%} sure",
            )
            for mistake in mistakes
        ]
    return found


@functools.cache
def test_images(run_dir: Path) -> mnist.Array | None:
    """Return the run's test set, uint8 (N, 28, 28); None where it cannot be read."""
    settings = directory.read_json(run_dir / directory.CONFIG).get("settings", {})
    try:
        return mnist.read_split(settings["dataset"], settings["data_dir"], "test", fetch=False)[0]
    except (JobError, KeyError) as error:
        log.info("no pictures of mistakes: %s", error)
        return None


if __name__ == "__main__":
    sys.exit(main())
