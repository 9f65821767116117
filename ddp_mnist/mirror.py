"""The run's mirror in Weights & Biases: a process beside the training, which it can never stop, slow or break.

metrics.jsonl and summary.json are the truth; the mirror follows them. It is the only module that imports wandb, and
only in its own process, `python -m ddp_mnist.mirror`: whatever wandb does there, wait for a server, fail, leave
threads or handlers behind, the training neither sees nor waits for it, except for a limited time at its very end.
"""

from __future__ import annotations

import configparser
import contextlib
import importlib.util
import json
import logging
import netrc
import os
import secrets
import shlex
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import filelock

from ddp_mnist import files, rundir
from ddp_mnist.config import TrainConfig
from ddp_mnist.errors import JobError

log = logging.getLogger(__name__)

STATE = rundir.WANDB_STATE
"""The W&B run's id, and the last mirrored step of each destination."""
FOLDER = rundir.WANDB
LOG = "mirror.log"
LOCK = ".lock"
PROBE_SECONDS = 5.0
"""That a server has to answer at all, before the training starts."""
INIT_SECONDS = 30.0
"""That it has to accept a run; the training goes on meanwhile."""
PATIENCE = 60.0
"""Seconds that the end of a finished run waits for the mirror."""
HASTY_PATIENCE = 10.0
"""The same for a run that was told to stop: its 25 seconds are for the checkpoint."""
POLL_SECONDS = 0.5
NICENESS = 19


@dataclass(frozen=True)
class Mode:
    """Where a run is mirrored to, decided before any rank waits for another."""

    name: str
    """online, offline or disabled"""
    why: str = ""
    """What the user should know of the choice; empty when it is the one that was asked for."""
    surprising: bool = False
    """The user asked for something else."""


def decide(config: TrainConfig) -> Mode:
    """What `--wandb` and WANDB_MODE ask for, as far as it can be had. Takes at most PROBE_SECONDS; raises nothing."""
    asked: str = config.wandb
    if asked == "auto":
        asked = os.environ.get("WANDB_MODE", "auto").lower()
        if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes"):
            asked = "disabled"
    asked = {"dryrun": "offline", "run": "online", "shared": "online"}.get(asked, asked)
    if asked not in ("auto", "online", "offline", "disabled"):
        return Mode("disabled", f"WANDB_MODE is {asked}; expected online, offline or disabled", surprising=True)
    if asked == "disabled":
        return Mode("disabled")
    if importlib.util.find_spec("wandb") is None:
        return Mode("disabled", "wandb is not installed", surprising=asked != "auto")
    if asked == "offline":
        return Mode("offline")
    obstacle = no_credentials() or no_server()
    if obstacle:
        return Mode("offline", obstacle, surprising=asked == "online")
    return Mode("online")


def server() -> str:
    """The W&B server's address: WANDB_BASE_URL, else what `wandb login --host` has left, else W&B's own."""
    settings = configparser.ConfigParser(interpolation=None)
    home = Path(os.environ.get("WANDB_CONFIG_DIR") or Path.home() / ".config" / "wandb")
    with contextlib.suppress(OSError, configparser.Error, UnicodeDecodeError):
        settings.read(home / "settings")
    found = os.environ.get("WANDB_BASE_URL") or settings.get("default", "base_url", fallback=None)
    return found or "https://api.wandb.ai"


def no_credentials() -> str:
    """Why the server would not know who this is; empty if there is a key. Reads no key into any text."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return ""
    host = urlsplit(server()).netloc
    given = os.environ.get("NETRC")
    for path in [Path(given)] if given else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(path.expanduser()).authenticators(host):
                return ""
    return f"no key for {host} (WANDB_API_KEY, or `wandb login`)"


def no_server(seconds: float = PROBE_SECONDS) -> str:
    """Why the server cannot be reached; empty if it answers, whatever it says, within `seconds`."""
    found = [f"{server()} does not answer within {seconds:.0f} s"]

    def probe() -> None:
        try:
            urllib.request.urlopen(server(), timeout=seconds).close()
            found[0] = ""
        except urllib.error.HTTPError:
            found[0] = ""  # it is there, and does not like the question
        except TimeoutError:
            pass
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            if not isinstance(reason, TimeoutError):
                found[0] = f"{server()} cannot be reached ({getattr(reason, 'strerror', None) or reason})"

    # In a thread, as looking up a name has no time limit of its own.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0]


class Mirror:
    """The training's end of it, on rank 0. Nothing here raises."""

    def __init__(self, run_dir: Path, mode: Mode, config: TrainConfig) -> None:
        self.run_dir = run_dir
        self.mode = mode
        self._child: subprocess.Popen[bytes] | None = None
        self._before: dict[str, Any] = {}
        if mode.name == "disabled":
            return
        try:
            self._before = remember(run_dir)
            self._child = start(run_dir, mode, config)
        except OSError as error:
            log.warning("W&B: the mirror could not be started (%s); metrics.jsonl has everything.", error)
            self.mode = Mode("disabled")

    def greeting(self) -> str:
        """One line about where the run can be seen; empty when there is nothing to say."""
        if self.mode.name != "offline":
            return f"  W&B     {self.mode.name}: {self.mode.why}" if self.mode.why else ""
        why = f": {self.mode.why}" if self.mode.why else ""
        return f"  W&B     offline{why}; send it later with\n            {self.sync_command()}"

    def sync_command(self) -> str:
        """What sends all that lies in the run directory and is not on the server yet."""
        folder = shlex.quote(str(self.run_dir / FOLDER))
        return f"wandb sync {folder}/*run-*-{self._before.get('id', '*')}"

    def actual(self) -> str:
        """The mode by now: offline also where the server answered, but did not take the run."""
        return read_state(self.run_dir).get("mode", self.mode.name) if self._child else self.mode.name

    def end(self, *, preempted: bool, exit_code: int) -> None:
        """Tell it that nothing more comes. Returns at once; `wait` waits."""
        if self._child is None or self._child.stdin is None:
            return
        with contextlib.suppress(OSError):
            self._child.stdin.write(json.dumps({"preempted": preempted, "exit_code": exit_code}).encode() + b"\n")
            self._child.stdin.close()

    def wait(self, patience: float = PATIENCE) -> str:
        """Until the mirror has sent everything, at most `patience` seconds. Returns what the user should know."""
        if self._child is None:
            return ""
        child, self._child = self._child, None
        try:
            child.wait(patience)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            return f"W&B did not take everything within {patience:.0f} s; send the rest with\n  {self.sync_command()}"
        now = read_state(self.run_dir)
        if child.returncode or "problem" in now:
            problem = now.get("problem", f"its process ended with {child.returncode}")
            where = self.run_dir / FOLDER / LOG
            return f"W&B: {problem} (see {where}); what it has not got is in metrics.jsonl."
        if now.get("mode") == "offline":
            fell = "the server did not take the run; it is" if self.mode.name == "online" else "the run is"
            return f"W&B: {fell} in {self.run_dir / FOLDER}; send it with\n  {self.sync_command()}"
        return f"W&B: {now['url']}" if now.get("url") else ""


def remember(run_dir: Path) -> dict[str, Any]:
    """The state in the run directory, made if it is not there: the id is stored before wandb hears of it.

    Raises: OSError.
    """
    fresh = {"id": os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4), "online": -1, "offline": -1}
    known = read_state(run_dir)
    state = {key: known.get(key, value) for key, value in fresh.items()}  # not how the last attempt went
    rundir.write_json(run_dir / STATE, state)
    (run_dir / FOLDER).mkdir(exist_ok=True)
    return state


def read_state(run_dir: Path) -> dict[str, Any]:
    return rundir.read_json(run_dir / STATE)


def start(run_dir: Path, mode: Mode, config: TrainConfig) -> subprocess.Popen[bytes]:
    """The mirror's process. It leaves by itself when its standard input closes, as it does when this process dies.

    Raises: OSError.
    """
    options = {
        "mode": mode.name,
        "project": config.wandb_project or os.environ.get("WANDB_PROJECT") or "ddp_mnist",
        "entity": config.wandb_entity,
        "group": config.wandb_group,
        "name": config.wandb_name or os.environ.get("WANDB_NAME") or run_dir.resolve().name,
        "tags": list(config.wandb_tags) or None,
        "model": config.wandb_model,
        "watched": os.getpid(),
    }
    command = [sys.executable, "-m", "ddp_mnist.mirror", str(run_dir), json.dumps(options)]
    with open(run_dir / FOLDER / LOG, "ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            # Ctrl-C and a launcher's signals to the group are the training's to answer.
            start_new_session=True,
        )


# --- The mirror's own process -----------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Follow a run until standard input closes. Not for users: the training starts it."""
    run_dir, options = (sys.argv[1:] if argv is None else argv)[:2]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):  # `scancel` and the like send them to everybody
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICENESS)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    return follow(Path(run_dir), json.loads(options))


def follow(run_dir: Path, options: dict[str, Any]) -> int:
    """Returns the exit code: 0 if all went to where it should or to the disk beside it."""
    end = Ending()
    with filelock.FileLock(run_dir / FOLDER / LOCK, timeout=PATIENCE):  # a killed attempt's mirror may still be at it
        return _follow(run_dir, options, end)


def _follow(run_dir: Path, options: dict[str, Any], end: Ending) -> int:
    run, mode = init(run_dir, options)
    state = read_state(run_dir) | {"mode": mode, "url": run.url if mode == "online" else None}
    state.pop("problem", None)
    rundir.write_json(run_dir / STATE, state)
    # The server knows best what it has: a sync may have come between two attempts.
    done = max(state[mode], int(run.summary.get("step") or -1) if mode == "online" else state["online"])
    images = None
    lines = Lines(run_dir / rundir.METRICS)
    while True:
        last_look = end.come  # before reading: what was written before the end is read below
        for record in lines.new():
            if record["step"] > done:
                if "test/mistakes" in record and images is None:
                    images = test_images(run_dir)
                run.log(as_logged(record, images))
                done = state[mode] = record["step"]
                rundir.write_json(run_dir / STATE, state)
        if last_look:
            break
        end.wait(POLL_SECONDS)
    summary = rundir.read_json(run_dir / rundir.SUMMARY)
    for key, value in summary.items():
        if key not in ("test_confusion", "test_mistakes"):
            run.summary[key] = value
    if end.preempted:
        run.mark_preempting()
    if options["model"] and summary.get("finished"):
        send_model(run, run_dir, summary)
    run.finish(exit_code=end.exit_code)
    return 0


def init(run_dir: Path, options: dict[str, Any]) -> tuple[Any, str]:
    """(run, mode): online as decided, or offline where the server turns out not to take it."""
    import wandb

    settings = wandb.Settings(
        console="off",
        silent=True,
        disable_code=True,
        disable_git=True,  # ours is in the config; a remote's address may hold a token
        x_stats_pid=options["watched"],
        init_timeout=INIT_SECONDS,
        finish_timeout=PATIENCE - 5,
    )
    known = read_state(run_dir)
    content = rundir.read_json(run_dir / rundir.CONFIG)
    for mode in dict.fromkeys((options["mode"], "offline")):
        try:
            run = wandb.init(
                mode=mode,
                id=known["id"],
                resume="allow",
                dir=run_dir,
                config=content,
                allow_val_change=True,
                settings=settings,
                **{key: options[key] for key in ("project", "entity", "group", "name", "tags")},
            )
        except (wandb.Error, OSError) as error:
            log.info("%s: %s", mode, error)
            wandb.teardown()
            continue
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run, mode
    raise JobError("wandb cannot be used, not even offline")


def as_logged(record: dict[str, Any], images: files.Array | None) -> dict[str, Any]:
    """A line of metrics.jsonl in W&B's words: its nested values as a chart, scalars and pictures.

    `images`: uint8 (N, 28, 28), the test set; None where it cannot be read.
    """
    import wandb

    logged = {key: value for key, value in record.items() if not isinstance(value, list)}
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


def test_images(run_dir: Path) -> files.Array | None:
    settings = rundir.read_json(run_dir / rundir.CONFIG).get("settings", {})
    try:
        return files.read_split(settings["dataset"], settings["data_dir"], "test", fetch=False)[0]
    except (JobError, KeyError) as error:
        log.info("no pictures of mistakes: %s", error)
        return None


def send_model(run: Any, run_dir: Path, summary: dict[str, Any]) -> None:
    import wandb

    artifact = wandb.Artifact(f"model-{run.id}", type="model", metadata={"test_accuracy": summary["test_accuracy"]})
    artifact.add_file(str(run_dir / rundir.WEIGHTS))
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
        line = sys.stdin.buffer.readline()
        if line:
            said = json.loads(line)
            self.preempted, self.exit_code = said["preempted"], said["exit_code"]
        self._come.set()


if __name__ == "__main__":
    try:
        code = main()
    except Exception as error:  # the training's console names it; the log has the traceback
        log.exception("the mirror has failed")
        folder = Path(sys.argv[1])
        with contextlib.suppress(OSError):
            rundir.write_json(folder / STATE, read_state(folder) | {"problem": f"{type(error).__name__}: {error}"})
        code = 1
    sys.exit(code)
