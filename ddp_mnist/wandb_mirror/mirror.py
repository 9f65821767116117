"""The training's side of the run's mirror in Weights & Biases: where to mirror to, the mirror's process, its news.

That process, `mirror_process.py`, runs beside the training, which it can never stop, slow or break: whatever wandb
does there, wait for a server, fail, leave threads or handlers behind, the training neither sees nor waits for it,
except for a limited time at its very end.
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
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddp_mnist.config import TrainConfig
from ddp_mnist.run import directory

log = logging.getLogger(__name__)

STATE = directory.WANDB_STATE
"""The W&B run's id, the last step mirrored to each destination, and how the latest attempt went."""
FOLDER = directory.WANDB
LOG = "mirror.log"
PROBE_SECONDS = 5.0
"""That a server has to answer at all, before the training starts."""
INIT_SECONDS = 30.0
"""That it has to accept a run; the training goes on meanwhile."""
PATIENCE = 60.0
"""Seconds that the end of a finished run waits for the mirror."""
HASTY_PATIENCE = 10.0
"""The same for a run that was told to stop: its 25 seconds are for the checkpoint."""
NICENESS = 19
"""A sixtieth of what the training gets where they meet; what the training leaves free is enough."""
BEGIN_SECONDS = 15.0
"""Until a mirror begins, where its run has not ended before: wandb's start would take the CPU of the first steps, and a
short run is mirrored at its end, beside the drawing of its pictures."""
YIELD_SECONDS = 20.0
"""How long a mirror puts up with that: where others want the CPU as well, so little of it may be nothing."""


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
    wish = asked_for(config)
    if wish.name in ("disabled", "offline"):
        return wish
    obstacle = no_credentials() or no_server()
    if obstacle:
        return Mode("offline", obstacle, surprising=wish.name == "online")
    return Mode("online")


def asked_for(config: TrainConfig) -> Mode:
    """What `--wandb` and WANDB_MODE ask for, `auto` included; disabled where there is no wandb. Raises nothing."""
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
    return Mode(asked)


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
            with contextlib.suppress(urllib.error.HTTPError):  # it is there, and does not like the question
                urllib.request.build_opener().open(address, timeout=seconds).close()
            found[0] = ""
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
    """The mirror's process as rank 0 sees it; on other ranks nothing. Nothing here raises."""

    def __init__(self, config: TrainConfig, *, is_main: bool) -> None:
        """Starts the process, if there may be something to mirror to: it imports wandb while this one imports torch,
        on a core that has nothing else to do then. `is_main`: this is rank 0."""
        self.config = config
        self.mode = asked_for(config) if is_main else Mode("disabled")
        self.id = "*"
        self.run_dir = Path()
        """Known to `follow`."""
        self._attempt = secrets.token_hex(4)
        self._child: subprocess.Popen[bytes] | None = None
        if self.mode.name != "disabled":
            try:
                self._child = start()
            except OSError as error:
                self._give_up(error)

    def __enter__(self) -> Mirror:
        return self

    def __exit__(self, *_: object) -> None:
        if self._child is not None:  # it has nothing to follow yet, or nobody waits for it
            self._drop(self._child)

    def decide(self) -> Mode:
        """Where to mirror to, for good. Takes at most PROBE_SECONDS."""
        if self.mode.name != "disabled":
            self.mode = decide(self.config)
        return self.mode

    def follow(self, run_dir: Path) -> None:
        """Let it mirror that run, whose config.json is written, from now on."""
        self.run_dir = run_dir
        if self._child is None:
            return
        try:
            self.id = remember(run_dir)
            options = options_of(run_dir, self.mode, self.config, id=self.id, attempt=self._attempt)
            self._tell(self._child, options)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        log.warning("W&B: the mirror could not be started (%s); metrics.jsonl has everything.", error)
        self.mode = Mode("disabled")
        if self._child is not None:
            self._drop(self._child)

    def _tell(self, child: subprocess.Popen[bytes], said: dict[str, Any]) -> None:
        """Raises: OSError."""
        assert child.stdin is not None
        child.stdin.write(json.dumps(said).encode() + b"\n")
        child.stdin.flush()

    def _drop(self, child: subprocess.Popen[bytes]) -> None:
        self._child = None
        child.kill()
        child.wait()
        with contextlib.suppress(OSError):
            assert child.stdin is not None
            child.stdin.close()

    def greeting(self) -> str:
        """One line about where the run can be seen; empty when there is nothing to say."""
        why = f": {self.mode.why}" if self.mode.why else ""
        if self.mode.name == "offline":
            return f"offline{why}; send it later with: {self.sync_command()}"
        return self.mode.name + why if why else ""

    def sync_command(self, *, online: bool = False) -> str:
        """What sends all that lies in the run directory and is not on the server yet; `online`: also what began there,
        which wandb takes for sent."""
        option, began = ("--include-online ", "*") if online else ("", "offline-")
        # The last star: of attempts that begin in one second, wandb gives the later ones a number behind the id.
        return f"wandb sync {option}{shlex.quote(str(self.run_dir / FOLDER))}/{began}run-*-{self.id}*"

    def actual(self) -> str:
        """The mode by now: offline also where the server answered, but did not take the run; disabled where wandb
        did not work at all."""
        return self._news().get("mode", self.mode.name)

    def end(self, *, preempted: bool, exit_code: int) -> None:
        """Tell it that nothing more comes. Returns at once; `wait` waits. Only the first word counts."""
        if self._child is None or self._child.stdin is None or self._child.stdin.closed:
            return
        with contextlib.suppress(OSError):
            self._tell(self._child, {"preempted": preempted, "exit_code": exit_code})
        with contextlib.suppress(OSError):
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
        directory.write_json(run_dir / STATE, state)
    (run_dir / FOLDER).mkdir(exist_ok=True)
    return state["id"]


def read_state(run_dir: Path) -> dict[str, Any]:
    return directory.read_json(run_dir / STATE)


def latest_news(run_dir: Path, attempt: str) -> dict[str, Any]:
    """How this attempt's mirror does: `mode`, `url`, `refusal`, `problem`; empty until it has written."""
    latest = read_state(run_dir).get("latest", {})
    return latest if latest.get("attempt") == attempt else {}


def start() -> subprocess.Popen[bytes]:
    """The mirror's process: it imports wandb, then reads `options_of` a run from its standard input. It leaves by
    itself when that closes, as it does when this process dies.

    Raises: OSError.
    """
    child = subprocess.Popen(
        [sys.executable, "-m", "ddp_mnist.wandb_mirror.process", str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,  # until it knows where its log is
        stderr=subprocess.DEVNULL,
        # Ctrl-C and a launcher's signals to the group are the training's to answer.
        start_new_session=True,
    )
    yield_cpu(child.pid)
    return child


def options_of(run_dir: Path, mode: Mode, config: TrainConfig, *, id: str, attempt: str) -> dict[str, Any]:
    """What the mirror's process needs to know of a run."""
    return {
        "run_dir": str(run_dir.absolute()),
        "mode": mode.name,
        "id": id,
        "attempt": attempt,
        "project": config.wandb_project or os.environ.get("WANDB_PROJECT") or "ddp_mnist",
        "entity": config.wandb_entity,
        "group": config.wandb_group,
        "name": config.wandb_name or os.environ.get("WANDB_NAME") or run_dir.resolve().name,
        "tags": list(config.wandb_tags) or None,
        "model": config.wandb_model,
        "init_seconds": INIT_SECONDS,
        "begin_seconds": BEGIN_SECONDS,
        "yield_seconds": YIELD_SECONDS,
    }


def yield_cpu(pid: int) -> None:
    """Let a process that leads a session run where the training does not: all its threads wait for one that is
    interrupted."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, NICENESS)
    with contextlib.suppress(OSError, AttributeError):  # Linux's: it never interrupts, and may be given back
        os.sched_setscheduler(pid, os.SCHED_BATCH, os.sched_param(0))
    share_cpu(pid, NICENESS)


def share_cpu(pid: int, niceness: int) -> None:
    """How a session's processes stand against those of other sessions, where Linux shares the CPU out by sessions
    (autogroups) and niceness counts only within one: a mirror that is merely nice would get half of it."""
    with contextlib.suppress(OSError):
        for _ in range(5):  # Linux takes one such wish in 0.1 s, of all its users together
            with contextlib.suppress(BlockingIOError):
                Path(f"/proc/{pid}/autogroup").write_text(str(niceness))
                return
            time.sleep(0.1)
