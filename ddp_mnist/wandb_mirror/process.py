"""The mirror's own process: it follows metrics.jsonl and summary.json, the truth, and tells Weights & Biases.

The only module that imports wandb. `mirror.py` starts it, as `python -m ddp_mnist.wandb_mirror.process`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ddp_mnist.data import mnist
from ddp_mnist.errors import JobError
from ddp_mnist.run import directory
from ddp_mnist.wandb_mirror.mirror import FOLDER, LOG, PATIENCE, STATE, latest_news, read_state, share_cpu

log = logging.getLogger(__name__)

START_SECONDS = 300.0
"""That wandb's own service has to start: where the training takes every core, it gets only what is left."""
PREDECESSOR_SECONDS = START_SECONDS + 120.0
"""That a killed attempt's mirror may still be at it: wandb's own limits, added up."""
POLL_SECONDS = 0.5
FLUSH_SECONDS = 1.0
"""Between two writes of wandb's file, so that a look at a running run is worth it; its own choice is 15."""


def main(argv: list[str] | None = None) -> int:
    """Follow a run until standard input closes. Returns the exit code: 0 if all went to the server, or to the disk."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1:
        print("error: the training starts its mirror itself: `python -m ddp_mnist.train --wandb ...`", file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):  # `scancel` and the like send them to everybody
        signal.signal(number, signal.SIG_IGN)
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # W&B's telemetry would try for 10 s without a network
    with contextlib.suppress(Exception):  # the next import fails in the same way, and can say so
        # Ahead of time, while the training imports torch; the others are what a run's start and its pictures import.
        import PIL.Image  # noqa: F401
        import wandb
        import wandb.apis.public  # noqa: F401
    said = told()
    if not said:  # the run has failed before it began, or is finished already
        return 0
    options: dict[str, Any] = json.loads(said) | {"watched": int(arguments[0])}
    run_dir = Path(options["run_dir"])
    with contextlib.suppress(OSError), open(run_dir / FOLDER / LOG, "ab") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    end = Ending()
    own_share = threading.Timer(options["yield_seconds"], share_cpu, (os.getpid(), 0))
    own_share.daemon = True
    own_share.start()
    try:
        # A killed attempt's mirror may still be at it.
        _holder = directory.lock(run_dir / FOLDER, PREDECESSOR_SECONDS)  # as long as this process lives
        log.info("begins in %g s, or at the end of the run", options["begin_seconds"])
        end.wait(options["begin_seconds"])
        log.info("begins, the run %s", "has ended" if end.come else "goes on")
        try:
            follow(run_dir, options, end)
        except (TimeoutError, JobError):
            raise
        except Exception:  # wandb's service does not ignore SIGTERM, say
            log.exception("once more")
            with contextlib.suppress(Exception):
                sys.modules["wandb"].teardown()
            follow(run_dir, options, end)
        return 0
    except Exception as error:  # the training's console names it; the log has the traceback
        log.exception("the mirror has failed")
        latest = latest_news(run_dir, options["attempt"]) or {"mode": "disabled"}
        problem = str(error) if isinstance(error, JobError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError, JobError):
            note(run_dir, options, latest=latest | {"problem": problem})
        return 1


def follow(run_dir: Path, options: dict[str, Any], end: Ending) -> None:
    """Mirror what is new in metrics.jsonl, until the training has ended. Raises: whatever wandb raises."""
    run, latest = init(run_dir, options)
    mode = latest["mode"]
    note(run_dir, options, latest=latest)
    done = last_step(run, mode, run_dir)
    images = None
    lines = Lines(run_dir / directory.METRICS)
    while True:
        last_look = end.come  # before reading: what was written before the end is read below
        before = done
        for record in lines.new():
            if record["step"] > done:
                if "test/mistakes" in record and images is None:
                    images = test_images(run_dir)
                log_record(run, record, images)
                done = record["step"]
        if done > before:
            note(run_dir, options, **{mode: done})
        if last_look:
            break
        end.wait(POLL_SECONDS)
    summary = directory.read_json(run_dir / directory.SUMMARY)
    for key, value in (summary | {"wandb_mode": mode}).items():
        if key not in ("test_confusion", "test_mistakes"):
            run.summary[key] = value
    if end.preempted:
        run.mark_preempting()
    if options["model"] and summary.get("finished"):
        send_model(run, run_dir, summary)
    run.finish(exit_code=end.exit_code)


def note(run_dir: Path, options: dict[str, Any], **news: Any) -> None:
    """Into wandb.json. Raises: OSError; JobError when `--fresh` has given the directory to another run."""
    state = read_state(run_dir)
    if state.get("id") != options["id"]:
        raise JobError(f"{run_dir} belongs to another W&B run by now")
    if "latest" in news:
        news["latest"] |= {"attempt": options["attempt"]}
    directory.write_json(run_dir / STATE, state | news)


def init(run_dir: Path, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(run, its `mode`, `url` and `refusal`): online as decided, or offline where the server turns out not to take it.

    Raises: JobError.
    """
    import wandb

    settings = wandb.Settings(
        console="off",
        silent=True,
        disable_code=True,
        disable_git=True,  # ours is in the config; a remote's address may hold a token
        x_stats_pid=options["watched"],
        x_transaction_log_flush_interval=FLUSH_SECONDS,
        x_service_wait=START_SECONDS,
        finish_timeout=PATIENCE - 5,
        finish_timeout_raises=True,
    )
    content = directory.read_json(run_dir / directory.CONFIG)
    latest: dict[str, Any] = {}
    for mode in dict.fromkeys((options["mode"], "offline")):
        settings.init_timeout = options["init_seconds"] if mode == "online" else START_SECONDS
        try:
            run = wandb.init(
                mode=mode,
                resume="allow",
                dir=run_dir,
                config=content,
                allow_val_change=True,
                settings=settings,
                **{key: options[key] for key in ("id", "project", "entity", "group", "name", "tags")},
            )
        except Exception as error:  # not only wandb.Error, when its service dies
            log.info("%s: %s", mode, error)
            latest["refusal"] = str(error).partition("\n")[0] or type(error).__name__
            wandb.teardown()
            continue
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run, latest | {"mode": mode, "url": run.url if mode == "online" else None}
    raise JobError(f"wandb does not even work offline: {latest['refusal']}")


def last_step(run: Any, mode: str, run_dir: Path) -> int:
    """What the destination has already; -1: nothing.

    It knows that better than wandb.json: of what wandb was given, a node that dies takes with it what was not sent or
    written yet, and a sync may have come between two attempts. Offline adds to what the server got.
    """
    state = read_state(run_dir)
    if mode == "online":
        return int(run.summary.get("step") or -1) if run.resumed else -1
    written = -1
    own = Path(run.dir).resolve().parent
    for path in sorted((run_dir / FOLDER).glob(f"offline-run-*-{run.id}*"), reverse=True):
        if path.resolve() == own:  # nothing in it yet, and the reader is a whole Python process
            continue
        written = max(steps_in(path), default=-1)
        if written >= 0:
            break
    return max(state["online"], state["offline"] if written < 0 else written)


def steps_in(path: Path) -> Iterator[int]:
    """The steps that wandb's own reader finds in a local run; none where it finds no run."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    told = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
    for line in told.splitlines():
        record = json.loads(line)
        if record["type"] == "history":
            yield record["history"]["item"]["step"]


def log_record(run: Any, record: dict[str, Any], images: mnist.Array | None) -> None:
    """Our step is also wandb's own, so that it goes on in the next attempt. Raises: whatever wandb raises."""
    try:
        run.log(as_logged(record, images), step=record["step"], commit=True)
    except Exception:  # a server that takes no tables may well take numbers; wandb's service being dead comes again
        log.exception("step %d: only its numbers are sent", record["step"])
        run.log(numbers(record), step=record["step"], commit=True)


def numbers(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if not isinstance(value, list)}


def as_logged(record: dict[str, Any], images: mnist.Array | None) -> dict[str, Any]:
    """A line of metrics.jsonl in W&B's words: its nested values as a chart, scalars and pictures.

    `images`: uint8 (N, 28, 28), the test set; None where it cannot be read.
    """
    import wandb

    logged = numbers(record)
    for label, accuracy in enumerate(record.get("test/class_accuracy", ())):
        logged[f"test/class_accuracy/{label}"] = accuracy
    confusion = record.get("test/confusion", ())
    if confusion:
        rows = [[str(a), str(b), count] for a, line in enumerate(confusion) for b, count in enumerate(line)]
        logged["test/confusion"] = wandb.plot_table(
            "wandb/confusion_matrix/v1",
            wandb.Table(columns=["Actual", "Predicted", "nPredictions"], data=rows),
            {"Actual": "Actual", "Predicted": "Predicted", "nPredictions": "nPredictions"},
            {"title": "Confusion matrix of the test set"},
        )
    if images is not None and record.get("test/mistakes"):
        logged["test/mistakes"] = [
            wandb.Image(
                images[mistake["index"]].repeat(4, 0).repeat(4, 1),
                caption=f"{mistake['label']} read as {mistake['prediction']}, {mistake['confidence']:.0%} sure",
            )
            for mistake in record["test/mistakes"]
        ]
    return logged


def test_images(run_dir: Path) -> mnist.Array | None:
    settings = directory.read_json(run_dir / directory.CONFIG).get("settings", {})
    try:
        return mnist.read_split(settings["dataset"], settings["data_dir"], "test", fetch=False)[0]
    except (JobError, KeyError) as error:
        log.info("no pictures of mistakes: %s", error)
        return None


def send_model(run: Any, run_dir: Path, summary: dict[str, Any]) -> None:
    import wandb

    artifact = wandb.Artifact(f"model-{run.id}", type="model", metadata={"test_accuracy": summary["test_accuracy"]})
    artifact.add_file(str(run_dir / directory.WEIGHTS))
    run.log_artifact(artifact)


class Lines:
    """The whole lines of a growing metrics.jsonl, each once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._position = 0

    def new(self) -> Iterator[dict[str, Any]]:
        with open(self.path, "rb") as file:
            file.seek(self._position)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._position += len(line)
                yield json.loads(line)


def told() -> bytes:
    """The next line from the training; empty when there is none to come."""
    # Raw: an interpreter that ends while a thread reads the buffered one aborts.
    with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as raw:
        return raw.readline()


class Ending:
    """What the training says at its end; without a word it was killed."""

    def __init__(self) -> None:
        self._come = threading.Event()
        self.preempted = False
        self.exit_code = 1
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def come(self) -> bool:
        return self._come.is_set()

    def wait(self, seconds: float) -> None:
        self._come.wait(seconds)

    def _listen(self) -> None:
        line = told()
        share_cpu(os.getpid(), 0)  # the training is over, and its end waits for this
        with contextlib.suppress(ValueError):  # cut short, or empty
            said = json.loads(line)
            self.preempted, self.exit_code = said["preempted"], said["exit_code"]
        self._come.set()


if __name__ == "__main__":
    sys.exit(main())
