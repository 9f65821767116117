"""The training's side of the W&B mirror: decide where to mirror to, start the mirror's process, report how it went.

That process (`process.py`) runs beside the training. Whatever wandb does there, the training neither sees it nor waits
for it, except for a limited time at its very end.
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
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from ddp_mnist.config import TrainConfig
from ddp_mnist.run import directory

log = logging.getLogger(__name__)

LOG = "mirror.log"
PROBE_SECONDS = 5.0  # for a server to answer at all, before the training starts
INIT_SECONDS = 30.0  # for a server to accept the run, while the training goes on
BEGIN_SECONDS = 15.0  # until wandb starts, or at the end of a shorter run: the first steps need the CPU
PATIENCE = 60.0  # that the end of a finished run waits for the mirror
HASTY_PATIENCE = 10.0  # the same after a stop, whose 25 seconds are for the checkpoint
NICENESS = 10  # a tenth of a CPU that the training fills; 19 would leave too little to import wandb in a minute


@dataclass(frozen=True)
class Mode:
    """Where a run is mirrored to."""

    name: str  # online, offline or disabled; auto while it is not decided
    why: str = ""  # the reason, where it is not simply what was asked for
    surprising: bool = False  # the user has asked for something else


def decide(config: TrainConfig) -> Mode:
    """Return where to mirror to: what is asked for, or offline without a key or a server. Takes up to PROBE_SECONDS."""
    asked = asked_for(config)
    if asked.name in ("disabled", "offline"):
        return asked
    error = credentials_error() or server_error(PROBE_SECONDS)
    return Mode("offline", error, surprising=asked.name == "online") if error else Mode("online")


def asked_for(config: TrainConfig) -> Mode:
    """Return what `--wandb` and WANDB_MODE ask for, maybe `auto`; disabled where wandb is not installed."""
    asked: str = config.wandb
    if asked == "auto":
        asked = (os.environ.get("WANDB_MODE") or "auto").lower()
        if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes"):
            asked = "disabled"
    if asked not in ("auto", "online", "offline", "disabled"):
        return Mode("disabled", f"WANDB_MODE is {asked}; expected online, offline or disabled", surprising=True)
    if asked != "disabled":
        spec = importlib.util.find_spec("wandb")
        if spec is None or spec.origin is None:  # no origin: a folder that wandb left where it once ran
            return Mode("disabled", "wandb is not installed", surprising=asked != "auto")
    return Mode(asked)


def server_host() -> str:
    """Return the W&B server's name and port, without the password that its address may hold."""
    return _server_url().split("//")[-1].partition("/")[0].rpartition("@")[2]


def _server_url() -> str:
    settings = configparser.ConfigParser(interpolation=None)
    folder = os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb"
    with contextlib.suppress(configparser.Error, UnicodeDecodeError):
        settings.read(Path(folder, "settings").expanduser())  # of `wandb login --host`
    saved = settings.get("default", "base_url", fallback="https://api.wandb.ai")
    return os.environ.get("WANDB_BASE_URL") or saved


def credentials_error() -> str | None:
    """Return why the server would not know the user, or None if there is a key. The text has no key in it."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return None
    with contextlib.suppress(OSError, netrc.NetrcParseError, UnicodeDecodeError):
        if netrc.netrc(os.path.expanduser(os.environ.get("NETRC") or "~/.netrc")).authenticators(server_host()):
            return None
    return f"no key for {server_host()} (WANDB_API_KEY, or `wandb login`)"


def server_error(seconds: float = PROBE_SECONDS) -> str | None:
    """Return why the W&B server cannot be reached, or None if it answers, whatever it says, within `seconds`."""
    host = server_host()
    url = f"{_server_url().partition('://')[0]}://{host}"  # without a password: messages quote it
    error: str | None = f"{host} does not answer within {seconds:g} s"

    def probe() -> None:
        nonlocal error
        try:
            with contextlib.suppress(urllib.error.HTTPError):  # a 404 is an answer, too
                urllib.request.urlopen(url, timeout=seconds).close()
            error = None
        except (OSError, ValueError, http.client.HTTPException) as raised:
            reason = getattr(raised, "reason", raised)
            # wandb may know a certificate that Python does not.
            error = None if isinstance(reason, ssl.SSLError) else f"{host} cannot be reached ({reason})"

    # In a thread, as looking up a name has no time limit of its own.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(seconds)
    return error


class Mirror(contextlib.AbstractContextManager["Mirror"]):
    """The mirror's process as rank 0 sees it; on other ranks nothing. No method raises."""

    def __init__(self, config: TrainConfig, *, is_main: bool) -> None:
        self.config = config
        self.mode = asked_for(config) if is_main else Mode("disabled")
        self.run_dir = Path()
        self.id = ""
        self._process: subprocess.Popen[bytes] | None = None

    def __exit__(self, *_: object) -> None:
        """End the process after a bug; otherwise it has heard how the run ended, and is gone."""
        self.end(preempted=False, exit_code=1)
        self.wait(HASTY_PATIENCE)

    def decide(self) -> Mode:
        """Decide where to mirror to. Takes up to PROBE_SECONDS."""
        if self.mode.name != "disabled":
            self.mode = decide(self.config)
        return self.mode

    def follow(self, run_dir: Path) -> None:
        """Mirror that run, whose config.json is written, from now on."""
        self.run_dir = run_dir
        if self.mode.name == "disabled":
            return
        try:
            self.id = store_run_id(run_dir)
            self._process = self._start()
        except OSError as error:
            log.warning("W&B: the mirror could not be started (%s); metrics.jsonl has everything.", error)
            self.mode = Mode("disabled")

    def _start(self) -> subprocess.Popen[bytes]:
        """Start the process. It also ends when its standard input closes, as it does when this process dies."""
        config = self.config
        options = {
            "run_dir": str(self.run_dir.absolute()),
            "mode": self.mode.name,
            "model": config.wandb_model,
            "begin_seconds": BEGIN_SECONDS,
            "init_seconds": INIT_SECONDS,
            "id": self.id,
            "project": config.wandb_project or os.environ.get("WANDB_PROJECT") or "ddp_mnist",
            "entity": config.wandb_entity,
            "group": config.wandb_group,
            "name": config.wandb_name or os.environ.get("WANDB_NAME") or self.run_dir.resolve().name,
            "tags": list(config.wandb_tags) or None,
        }
        with open(self.run_dir / directory.WANDB / LOG, "ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "ddp_mnist.wandb_mirror.process", json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                # Ctrl-C and a launcher's signals to the group are the training's to answer. A session of its own would
                # be too much: Linux shares the CPU out by sessions, and niceness counts only within one.
                process_group=0,
            )
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, process.pid, NICENESS)
        return process

    def greeting(self) -> str:
        """Return one line about where the run can be seen; empty when there is nothing to say."""
        why = f": {self.mode.why}" if self.mode.why else ""
        if self.mode.name == "offline":
            return f"offline{why}; send it later with: {self._sync_command()}"
        return self.mode.name + why if why else ""

    def actual(self) -> str:
        """Return the mode: after `wait` as it turned out, before as it was decided."""
        return self.mode.name

    def end(self, *, preempted: bool, exit_code: int) -> None:
        """Say that the run has ended. Returns at once; `wait` waits. Only the first call counts."""
        if self._process and (stdin := self._process.stdin) and not stdin.closed:
            with contextlib.suppress(OSError):
                stdin.write(json.dumps({"preempted": preempted, "exit_code": exit_code}).encode())
            with contextlib.suppress(OSError):
                stdin.close()

    def wait(self, patience: float = PATIENCE) -> str:
        """Wait up to `patience` seconds until all is sent. Return what the user should know; empty if nothing."""
        if self._process is None:
            return ""
        process, self._process = self._process, None
        news = {"mode": "disabled"}  # until it reports another one
        try:
            if code := process.wait(patience):
                news["problem"] = f"its process ended with {code}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            news["problem"] = f"not everything was sent within {patience:.0f} s"
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                news |= json.loads(line)
        self.mode = Mode(news["mode"])
        folder = self.run_dir / directory.WANDB
        if "problem" in news:
            advice = "" if self.mode.name == "disabled" else f" Send what is missing with: {self._sync_command()}"
            return f"W&B: {news['problem']} (see {folder / LOG}); metrics.jsonl has everything.{advice}"
        if self.mode.name == "offline":
            refused = f"; the server did not take it ({news['refusal']})" if "refusal" in news else ""
            return f"W&B: the run is in {folder}{refused}; send it with: {self._sync_command()}"
        return f"W&B: {news['url']}" if "url" in news else ""

    def _sync_command(self) -> str:
        """Return the command that sends what is not on the server; wandb takes what began online for sent."""
        option, prefix = ("", "offline-") if self.mode.name == "offline" else (" --include-online", "*")
        # The last star: of attempts that begin in one second, wandb gives the later ones a number behind the id.
        return f"wandb sync{option} {shlex.quote(str(self.run_dir / directory.WANDB))}/{prefix}run-*-{self.id}*"


def store_run_id(run_dir: Path) -> str:
    """Return the id of the directory's W&B run, stored before wandb hears of it. Raises: OSError."""
    state = directory.read_json(run_dir / directory.WANDB_STATE)
    if "id" not in state:
        state = {"id": os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4), "online": -1, "offline": -1}
        directory.write_json(run_dir / directory.WANDB_STATE, state)
    (run_dir / directory.WANDB).mkdir(exist_ok=True)
    return state["id"]
