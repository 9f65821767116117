"""The run's mirror in Weights & Biases: a process beside the training, which it can never stop, slow or break.

metrics.jsonl and summary.json are the truth; the mirror follows them. It is the only module that imports wandb, and
only in its own process, `python -m ddp_mnist.mirror`: whatever wandb does there, wait for a server, fail, leave
threads or handlers behind, the training neither sees nor waits for it, except for a limited time at its very end.
"""

from __future__ import annotations

import configparser
import contextlib
import http.client
import importlib.util
import json
import logging
import netrc
import os
import secrets
import shlex
import signal
import ssl
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddp_mnist import files, rundir
from ddp_mnist.config import TrainConfig
from ddp_mnist.errors import JobError

log = logging.getLogger(__name__)

STATE = rundir.WANDB_STATE
"""The W&B run's id, the last step mirrored to each destination, and how the latest attempt went."""
FOLDER = rundir.WANDB
LOG = "mirror.log"
PROBE_SECONDS = 5.0
"""That a server has to answer at all, before the training starts."""
INIT_SECONDS = 30.0
"""That it has to accept a run; the training goes on meanwhile."""
START_SECONDS = 300.0
"""That wandb's own service has to start: where the training takes every core, it gets only what is left."""
PATIENCE = 60.0
"""Seconds that the end of a finished run waits for the mirror."""
HASTY_PATIENCE = 10.0
"""The same for a run that was told to stop: its 25 seconds are for the checkpoint."""
PREDECESSOR_SECONDS = 120.0
"""That a killed attempt's mirror may still be at it: wandb's own limits, added up."""
POLL_SECONDS = 0.5
FLUSH_SECONDS = 1.0
"""Between two writes of wandb's file, so that a look at a running run is worth it; its own choice is 15."""
NICENESS = 10
"""A tenth of what the training gets where they meet: it hardly notices, and the mirror is there in seconds."""


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
        asked = (os.environ.get("WANDB_MODE") or "auto").lower()
        if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes"):
            asked = "disabled"
    asked = {"dryrun": "offline", "run": "online", "shared": "online"}.get(asked, asked)
    if asked not in ("auto", "online", "offline", "disabled"):
        return Mode("disabled", f"WANDB_MODE is {asked}; expected online, offline or disabled", surprising=True)
    if asked == "disabled":
        return Mode("disabled")
    found = importlib.util.find_spec("wandb")
    if found is None or found.origin is None:  # a mere folder `wandb`, as wandb leaves them where it ran
        return Mode("disabled", "wandb is not installed", surprising=asked != "auto")
    if asked == "offline":
        return Mode("offline")
    obstacle = no_credentials() or no_server()
    if obstacle:
        return Mode("offline", obstacle, surprising=asked == "online")
    return Mode("online")


def server() -> str:
    """The W&B server's address: WANDB_BASE_URL, else what `wandb login --host` has left, else W&B's own."""
    return os.environ.get("WANDB_BASE_URL") or saved_setting("base_url") or "https://api.wandb.ai"


def host() -> str:
    """The server's name and port, without a password that its address may hold."""
    return server().split("//")[-1].split("/")[0].rpartition("@")[2]


def saved_setting(name: str) -> str:
    """From wandb's settings files, the working directory's before the user's; empty if it is in neither."""
    settings = configparser.ConfigParser(interpolation=None)
    users = os.environ.get("WANDB_CONFIG_DIR") or os.path.join("~", ".config", "wandb")
    for folder in (users, os.path.join(os.environ.get("WANDB_DIR") or ".", "wandb")):
        with contextlib.suppress(OSError, configparser.Error, UnicodeDecodeError):
            settings.read(os.path.join(os.path.expanduser(folder), "settings"))
    return settings.get("default", name, fallback="")


def no_credentials() -> str:
    """Why the server would not know who this is; empty if there is a key. Reads no key into any text."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or saved_setting("api_key"):
        return ""
    given = os.environ.get("NETRC")
    for path in [given] if given else ["~/.netrc", "~/_netrc"]:
        with contextlib.suppress(OSError, netrc.NetrcParseError, UnicodeDecodeError):
            if netrc.netrc(os.path.expanduser(path)).authenticators(host()):
                return ""
    return f"no key for {host()} (WANDB_API_KEY, or `wandb login`)"


def no_server() -> str:
    """Why the server cannot be reached; empty if it answers, whatever it says, within PROBE_SECONDS."""
    seconds = PROBE_SECONDS
    found = [f"{host()} does not answer within {seconds:g} s"]

    def probe() -> None:
        try:
            # Without the password that the address may hold: it would stand in the message.
            address = f"{server().partition('://')[0]}://{host()}"
            urllib.request.build_opener().open(address, timeout=seconds).close()
            found[0] = ""
        except urllib.error.HTTPError:
            found[0] = ""  # it is there, and does not like the question
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLError):
                found[0] = ""  # wandb may know a certificate that Python does not
            elif not isinstance(reason, TimeoutError):
                found[0] = f"{host()} cannot be reached ({getattr(reason, 'strerror', None) or reason})"

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
        self.id = "*"
        self._attempt = secrets.token_hex(4)
        self._child: subprocess.Popen[bytes] | None = None
        if mode.name == "disabled":
            return
        try:
            self.id = remember(run_dir)
            self._child = start(run_dir, mode, config, id=self.id, attempt=self._attempt)
        except OSError as error:
            log.warning("W&B: the mirror could not be started (%s); metrics.jsonl has everything.", error)
            self.mode = Mode("disabled")

    def greeting(self) -> str:
        """One line about where the run can be seen; empty when there is nothing to say."""
        why = f": {self.mode.why}" if self.mode.why else ""
        if self.mode.name == "offline":
            return f"offline{why}; send it later with: {self.sync_command()}"
        return self.mode.name + why if why else ""

    def sync_command(self, *, online: bool = False) -> str:
        """What sends all that lies in the run directory and is not on the server yet; `online`: also what began there,
        which wandb takes for sent."""
        folder = shlex.quote(str(self.run_dir / FOLDER))
        return (
            f"wandb sync {'--include-online ' if online else ''}{folder}/{'*' if online else 'offline-'}run-*-{self.id}"
        )

    def actual(self) -> str:
        """The mode by now: offline also where the server answered, but did not take the run; disabled where wandb
        did not work at all."""
        return self._news().get("mode", self.mode.name)

    def end(self, *, preempted: bool, exit_code: int) -> None:
        """Tell it that nothing more comes. Returns at once; `wait` waits. Only the first word counts."""
        if self._child is None or self._child.stdin is None or self._child.stdin.closed:
            return
        with contextlib.suppress(OSError):
            self._child.stdin.write(json.dumps({"preempted": preempted, "exit_code": exit_code}).encode() + b"\n")
            self._child.stdin.close()

    def wait(self, patience: float = PATIENCE) -> str:
        """Until the mirror has sent everything, at most `patience` seconds. Returns what the user should know."""
        if self._child is None:
            return ""
        child, self._child = self._child, None
        killed = False
        try:
            child.wait(patience)
        except subprocess.TimeoutExpired:
            killed = True
            child.kill()
            child.wait()
        news = self._news()
        if not news:
            self.mode = Mode("disabled")  # as far as it got
        mode = self.actual()
        sync = "" if mode == "disabled" else f" Send what is missing with: {self.sync_command(online=mode == 'online')}"
        if killed:
            return f"W&B did not take everything within {patience:.0f} s; metrics.jsonl has it.{sync}"
        if child.returncode or "problem" in news:
            problem = news.get("problem", f"its process ended with {child.returncode}")
            return f"W&B: {problem} (see {self.run_dir / FOLDER / LOG}); metrics.jsonl has everything.{sync}"
        if mode == "offline":
            refused = f"; the server did not take it ({news['refusal']})" if "refusal" in news else ""
            return f"W&B: the run is in {self.run_dir / FOLDER}{refused}; send it with: {self.sync_command()}"
        return f"W&B: {news['url']}" if news.get("url") else ""

    def _news(self) -> dict[str, Any]:
        return latest_news(self.run_dir, self._attempt)


def remember(run_dir: Path) -> str:
    """The W&B run's id. It is stored before wandb hears of it, and never changes. Raises: OSError."""
    state = read_state(run_dir)
    if "id" not in state:
        state = {"id": os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4), "online": -1, "offline": -1}
        rundir.write_json(run_dir / STATE, state)
    (run_dir / FOLDER).mkdir(exist_ok=True)
    return state["id"]


def read_state(run_dir: Path) -> dict[str, Any]:
    return rundir.read_json(run_dir / STATE)


def latest_news(run_dir: Path, attempt: str) -> dict[str, Any]:
    """How this attempt's mirror does: `mode`, `url`, `refusal`, `problem`; empty until it has written."""
    latest = read_state(run_dir).get("latest", {})
    return latest if latest.get("attempt") == attempt else {}


def start(run_dir: Path, mode: Mode, config: TrainConfig, *, id: str, attempt: str) -> subprocess.Popen[bytes]:
    """The mirror's process. It leaves by itself when its standard input closes, as it does when this process dies.

    Raises: OSError.
    """
    options = {
        "mode": mode.name,
        "id": id,
        "attempt": attempt,
        "project": config.wandb_project or os.environ.get("WANDB_PROJECT") or "ddp_mnist",
        "entity": config.wandb_entity,
        "group": config.wandb_group,
        "name": config.wandb_name or os.environ.get("WANDB_NAME") or run_dir.resolve().name,
        "tags": list(config.wandb_tags) or None,
        "model": config.wandb_model,
        "watched": os.getpid(),
        "init_seconds": INIT_SECONDS,
    }
    command = [sys.executable, "-m", "ddp_mnist.mirror", str(run_dir), json.dumps(options)]
    with open(run_dir / FOLDER / LOG, "ab") as output:
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            # Ctrl-C and a launcher's signals to the group are the training's to answer.
            start_new_session=True,
        )
    yield_cpu(child.pid)
    return child


def yield_cpu(pid: int) -> None:
    """Let a process that leads a session run where the training does not: wandb's start alone takes seconds of CPU."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, NICENESS)
    share_cpu(pid, NICENESS)


def share_cpu(pid: int, niceness: int) -> None:
    """How a session's processes stand against those of other sessions, where Linux shares the CPU out by sessions
    (autogroups) and niceness counts only within one: a mirror that is merely nice would get half of it."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(str(niceness))


# --- The mirror's own process -----------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Follow a run until standard input closes. Returns the exit code: 0 if all went to the server, or to the disk."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 2:
        print("error: the training starts its mirror itself: `python -m ddp_mnist.train --wandb ...`", file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):  # `scancel` and the like send them to everybody
        signal.signal(number, signal.SIG_IGN)
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # W&B's telemetry would try for 10 s without a network
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    run_dir, options = Path(arguments[0]), json.loads(arguments[1])
    end = Ending()
    try:
        # A killed attempt's mirror may still be at it.
        holder = rundir.lock(run_dir / FOLDER, PREDECESSOR_SECONDS)
        try:
            follow(run_dir, options, end)
        except (TimeoutError, JobError):
            raise
        except Exception:  # wandb's service does not ignore SIGTERM, say
            log.exception("once more")
            with contextlib.suppress(Exception):
                sys.modules["wandb"].teardown()
            follow(run_dir, options, end)
        if holder is not None:
            holder.release()
        return 0
    except Exception as error:  # the training's console names it; the log has the traceback
        log.exception("the mirror has failed")
        latest = latest_news(run_dir, options["attempt"]) or {"mode": "disabled"}
        with contextlib.suppress(OSError, JobError):
            note(run_dir, options, latest=latest | {"problem": f"{type(error).__name__}: {error}"})
        return 1


def follow(run_dir: Path, options: dict[str, Any], end: Ending) -> None:
    """Mirror what is new in metrics.jsonl, until the training has ended. Raises: whatever wandb raises."""
    run, latest = init(run_dir, options)
    mode = latest["mode"]
    note(run_dir, options, latest=latest)
    done = last_step(run, mode, run_dir)
    images = None
    lines = Lines(run_dir / rundir.METRICS)
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
    summary = rundir.read_json(run_dir / rundir.SUMMARY)
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
    rundir.write_json(run_dir / STATE, state | news)


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
    content = rundir.read_json(run_dir / rundir.CONFIG)
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
    for path in sorted((run_dir / FOLDER).glob(f"offline-run-*-{run.id}"), reverse=True):
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


def log_record(run: Any, record: dict[str, Any], images: files.Array | None) -> None:
    """Our step is also wandb's own, so that it goes on in the next attempt. Raises: whatever wandb raises."""
    try:
        run.log(as_logged(record, images), step=record["step"], commit=True)
    except Exception:  # a server that takes no tables may well take numbers; wandb's service being dead comes again
        log.exception("step %d: only its numbers are sent", record["step"])
        run.log(numbers(record), step=record["step"], commit=True)


def numbers(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if not isinstance(value, list)}


def as_logged(record: dict[str, Any], images: files.Array | None) -> dict[str, Any]:
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
        # Raw: an interpreter that ends while a thread reads the buffered one aborts.
        with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as raw:
            line = raw.readline()
        share_cpu(os.getpid(), 0)  # the training is over, and its end waits for this
        with contextlib.suppress(ValueError):  # cut short, or empty
            said = json.loads(line)
            self.preempted, self.exit_code = said["preempted"], said["exit_code"]
        self._come.set()


if __name__ == "__main__":
    sys.exit(main())
