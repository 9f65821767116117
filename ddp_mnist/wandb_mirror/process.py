"""The mirror's own process: follow metrics.jsonl and summary.json, the truth, and send them to Weights & Biases.

The only module that imports wandb. `mirror.py` starts it as `python -m ddp_mnist.wandb_mirror.process OPTIONS`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import sys
from pathlib import Path
from typing import Any

import wandb

from ddp_mnist.data import mnist
from ddp_mnist.errors import JobError
from ddp_mnist.run import directory
from ddp_mnist.wandb_mirror.mirror import PATIENCE

log = logging.getLogger(__name__)

START_SECONDS = 300.0  # for wandb's service to start: a training on every core leaves it little CPU
LOCK_SECONDS = START_SECONDS + 180.0  # for the mirror of a killed attempt to end: wandb's limits, added up
POLL_SECONDS = 0.5


def main() -> int:
    """Mirror a run until it ends. Return the exit code: 0 if everything went to the server, or to the disk."""
    for name in ("HUP", "USR1", "XCPU", "USR2", "INT", "TERM"):  # `scancel` signals every process
        signal.signal(signal.Signals["SIG" + name], signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    options = json.loads(sys.argv[1])
    training = Training(options["news"])
    try:
        _lock = directory.lock(Path(options["init"]["dir"], directory.WANDB), LOCK_SECONDS)  # until this process ends
        try:
            mirror(options, training)
        except Exception:  # signals to every process, as SLURM sends them, end wandb's service
            log.exception("once more")
            with contextlib.suppress(Exception):
                wandb.teardown()
            mirror(options, training)
    except Exception as error:
        log.exception("the mirror has failed")
        training.report(problem=f"{type(error).__name__}: {error}")
        return 1
    return 0


class Training:
    """The training, at the other end of standard input and of the pipe `news`."""

    def __init__(self, news: int) -> None:
        self.ended = self.preempted = False
        self.exit_code = 1  # of a training that is killed and cannot say it
        self._news = news

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
            os.write(self._news, json.dumps(news).encode() + b"\n")


def mirror(options: dict[str, Any], training: Training) -> None:
    """Send what is new in metrics.jsonl until the training has ended, then its summary. Raises what wandb raises."""
    run_dir, run = Path(options["init"]["dir"]), start_run(options, training)
    mode = "offline" if run.offline else "online"
    training.report(mode=mode, url=run.url or "")
    path = run_dir / directory.WANDB_STATE
    # Online the server knows best what it has, also from a killed mirror; offline, wandb.json says what was written.
    sent = int(run.summary.get("step") or -1) if mode == "online" else directory.read_json(path).get("sent", -1)
    rest, ended = b"", False
    with (run_dir / directory.METRICS).open("rb") as file:
        while not ended:
            ended = training.wait_for_end(POLL_SECONDS)  # asked before reading: no line from before the end is missed
            state = directory.read_json(path)
            if state.get("id") != run.id:  # after --fresh
                sys.exit(f"{run_dir} belongs to another W&B run by now")
            *lines, rest = (rest + file.read()).split(b"\n")
            for record in map(json.loads, lines):
                if record["step"] > sent:
                    log_record(run, record, run_dir)
                    sent = record["step"]
            if sent > state.get("sent", -1):
                directory.write_json(path, state | {"sent": sent})
    summary = directory.read_json(run_dir / directory.SUMMARY) | {"wandb_mode": mode}
    run.summary.update({key: value for key, value in summary.items() if not isinstance(value, list)})
    if options["model"] and summary.get("finished"):
        model = wandb.Artifact(f"model-{run.id}", type="model", metadata={"test_accuracy": summary["test_accuracy"]})
        model.add_file(str(run_dir / directory.WEIGHTS))
        run.log_artifact(model)
    if training.preempted:
        run.mark_preempting()
    run.finish(exit_code=training.exit_code)


def start_run(options: dict[str, Any], training: Training) -> wandb.Run:
    """Return wandb's run: offline also where the server turns out not to take it. Raises what wandb raises."""
    settings = wandb.Settings(
        console="off",
        disable_code=True,
        disable_git=True,  # ours is in the config; a remote's address may hold a token
        x_stats_pid=os.getppid(),  # the training's
        x_transaction_log_flush_interval=1.0,  # seconds of lines that a kill loses; wandb's default is 15
        x_service_wait=START_SECONDS,
        finish_timeout=PATIENCE - 5,
        finish_timeout_raises=True,
    )
    config = directory.read_json(Path(options["init"]["dir"], directory.CONFIG))
    given = {**options["init"], "config": config, "resume": "allow", "allow_val_change": True, "settings": settings}
    if options["mode"] == "online":
        try:
            return wandb.init(**given, mode="online")
        except Exception as error:  # not only wandb.Error, when its service dies
            training.report(refusal=str(error).partition("\n")[0] or type(error).__name__)
            wandb.teardown()
    settings.init_timeout = START_SECONDS
    return wandb.init(**given, mode="offline")


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
    found: dict[str, Any] = {}
    if confusion := record.get("test/confusion"):
        rows = [[str(a), str(b), count] for a, line in enumerate(confusion) for b, count in enumerate(line)]
        fields = {name: name for name in ("Actual", "Predicted", "nPredictions")}
        table = wandb.Table(columns=list(fields), data=rows)
        title = {"title": "Confusion matrix of the test set"}
        found["test/confusion"] = wandb.plot_table("wandb/confusion_matrix/v1", table, fields, title)
    if mistakes := record.get("test/mistakes"):
        with contextlib.suppress(JobError, KeyError):  # there are no pictures of a user's own data
            settings = directory.read_json(run_dir / directory.CONFIG)["settings"]
            images, _ = mnist.read_split(settings["dataset"], settings["data_dir"], "test", fetch=False)
            found["test/mistakes"] = [
                wandb.Image(
                    images[mistake["index"]].repeat(4, 0).repeat(4, 1),
                    caption=f"{mistake['label']} read as {mistake['prediction']}, {mistake['confidence']:.0%} sure",
                )
                for mistake in mistakes
            ]
    return found


if __name__ == "__main__":
    sys.exit(main())
