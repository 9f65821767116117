"""The mirror's own process: follow metrics.jsonl and summary.json, the truth, and send them to Weights & Biases.

This is the only module that imports wandb. `mirror.py` starts it with the arguments MODE ID RUN_DIR.
"""

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

from ddp_mnist.storage import directory
from ddp_mnist.wandb_mirror.mirror import PATIENCE

log = logging.getLogger(__name__)

START_SECONDS = 300.0  # for wandb's service to start: a training on every core leaves it little CPU
POLL_SECONDS = 0.5
FLUSH_SECONDS = 0.1  # until wandb has a line on the disk, where it outlives a kill; wandb's default is 15


def main() -> None:
    """Mirror a run until it ends. A failure is raised: a traceback in mirror.log, and exit code 1."""
    for name in ("HUP", "USR1", "XCPU", "USR2", "INT", "TERM"):  # `scancel` signals every process
        signal.signal(signal.Signals["SIG" + name], signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    mode, run_id, run_dir = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    end: dict[str, Any] = {}
    # Held until this process ends. The mirror of a killed attempt may hold it for the sum of wandb's time limits.
    _lock = directory.lock(run_dir / directory.WANDB, START_SECONDS + 180)
    try:
        mirror(run_dir, run_id, mode, end)
    except Exception:  # SLURM signals every process, and that ends wandb's service: start again
        log.exception("wandb has failed; trying once more")
        with contextlib.suppress(Exception):
            wandb.teardown()
        mirror(run_dir, run_id, mode, end)


def mirror(run_dir: Path, run_id: str, mode: str, end: dict[str, Any]) -> None:
    """Send what is new in metrics.jsonl until the training has ended, then its summary. Raises what wandb raises."""
    run = start_run(run_dir, run_id, mode)
    mode = "offline" if run.offline else "online"
    # Online, the server knows what it has, also from a killed mirror; offline, wandb.json says what was written.
    sent = directory.read_json(run_dir / directory.WANDB_STATE).get("sent", -1)
    if mode == "online":
        sent = int(run.summary.get("step") or -1)
    rest, ended = b"", False
    with (run_dir / directory.METRICS).open("rb") as file:
        while not ended:
            ended = wait_for_end(end, POLL_SECONDS)  # before reading: no line from before the end is missed
            note(run_dir, run_id, mode=mode, url=run.url, sent=sent)  # sent in the last turn: on the disk by now
            *lines, rest = (rest + file.read()).split(b"\n")
            for record in map(json.loads, lines):
                if record["step"] > sent:
                    log_record(run, record)
                    sent = record["step"]
    summary = directory.read_json(run_dir / directory.SUMMARY) | {"wandb_mode": mode}
    run.summary.update({key: value for key, value in summary.items() if not isinstance(value, list)})
    if run.config["settings"].get("wandb_model") and summary.get("finished"):
        run.log_model(run_dir / directory.WEIGHTS, f"model-{run_id}")
    if end["preempted"]:
        run.mark_preempting()
    run.finish(exit_code=end["exit_code"])
    note(run_dir, run_id, sent=sent)


def wait_for_end(end: dict[str, Any], seconds: float) -> bool:
    """Wait up to `seconds` for the end of the training. Return True if it has come; `end` then says how."""
    if not end and select.select([sys.stdin], [], [], seconds)[0]:
        # One line, not to the end: a loader's process may keep the pipe open. It is empty if the training was killed.
        said = sys.stdin.readline()
        end.update(json.loads(said) if said else {"preempted": False, "exit_code": 1})
    return bool(end)


def note(run_dir: Path, run_id: str, **facts: Any) -> None:
    """Write facts into wandb.json. End the process if the run directory belongs to another W&B run by now."""
    state = directory.read_json(run_dir / directory.WANDB_STATE)
    if state.get("id") != run_id:  # after --fresh
        sys.exit(f"{run_dir} belongs to another W&B run by now")
    if not facts.items() <= state.items():
        directory.write_json(run_dir / directory.WANDB_STATE, state | facts)


def start_run(run_dir: Path, run_id: str, mode: str) -> wandb.Run:
    """Return wandb's run; if the server does not accept an online run, an offline run. Raises what wandb raises."""
    config = directory.read_json(run_dir / directory.CONFIG)
    asked = {name: config["settings"].get(f"wandb_{name}") for name in ("project", "entity", "group", "name", "tags")}
    asked["project"] = asked["project"] or os.environ.get("WANDB_PROJECT", "ddp_mnist")
    asked["name"] = asked["name"] or os.environ.get("WANDB_NAME", run_dir.resolve().name)
    settings = wandb.Settings(
        console="off",
        disable_code=True,
        disable_git=True,  # config.json has our git facts; a remote's address may hold a token
        x_stats_pid=os.getppid(),  # the training's
        x_transaction_log_flush_interval=FLUSH_SECONDS,
        x_service_wait=START_SECONDS,
        finish_timeout=PATIENCE - 5,
        finish_timeout_raises=True,
    )
    given = {**asked, "dir": str(run_dir), "id": run_id, "config": config, "settings": settings}
    given |= {"resume": "allow", "allow_val_change": True}
    if mode == "online":
        try:
            return wandb.init(**given, mode="online")
        except Exception as error:  # if wandb's service dies, this is no wandb.Error
            note(run_dir, run_id, refusal=str(error).partition("\n")[0] or type(error).__name__)
            wandb.teardown()
    settings.init_timeout = START_SECONDS
    return wandb.init(**given, mode="offline")


def log_record(run: wandb.Run, record: dict[str, Any]) -> None:
    """Log a line of metrics.jsonl. Our step is also wandb's step, so that the next attempt goes on counting."""
    numbers = {key: value for key, value in record.items() if not isinstance(value, list)}
    chart = {}
    try:
        if confusion := record.get("test/confusion"):
            rows = [[str(a), str(b), count] for a, line in enumerate(confusion) for b, count in enumerate(line)]
            fields = {name: name for name in ("Actual", "Predicted", "nPredictions")}
            table = wandb.Table(columns=list(fields), data=rows)
            title = {"title": "Confusion matrix of the test set"}
            chart["test/confusion"] = wandb.plot_table("wandb/confusion_matrix/v1", table, fields, title)
        run.log(numbers | chart, step=record["step"], commit=True)
    except Exception:  # a server that takes no tables may well take numbers
        log.exception("step %d: only its numbers are sent", record["step"])
        run.log(numbers, step=record["step"], commit=True)


if __name__ == "__main__":
    main()
