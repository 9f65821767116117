"""The training's side of the W&B mirror: decide where to mirror to, start the mirror's process, report how it went.

That process (`process.py`) runs beside the training, which does not see what wandb does there. The training waits for
the server at its start and for the process at its end, each for a limited time.
"""

import configparser
import contextlib
import json
import logging
import netrc
import os
import secrets
import shlex
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ddp_mnist.config import TrainConfig
from ddp_mnist.storage import directory

log = logging.getLogger(__name__)

LOG = "mirror.log"
PROBE_SECONDS = 5.0  # for a server to answer at all, before the training starts
INIT_SECONDS = 30  # for a server to accept the run, while the training goes on
PATIENCE = 60.0  # seconds that a finished run waits for the mirror's end
HASTY_PATIENCE = 10.0  # the same after a stop or an error, since the job may be killed soon
NICENESS = 10  # the mirror gets a tenth of a CPU that training fills; at 19, importing wandb would take over a minute


@dataclass(frozen=True)
class Mode:
    """The place that a run is mirrored to."""

    name: str  # online, offline or disabled
    why: str = ""  # the reason, if the mode is not simply what was asked for
    surprising: bool = False  # the user has asked for something else

    def __str__(self) -> str:
        return f"{self.name}: {self.why}" if self.why else self.name


def decide(config: TrainConfig) -> Mode:
    """Return where to mirror to: what is asked for, or offline without a key or a server. Takes up to PROBE_SECONDS."""
    asked: str = config.wandb
    if asked == "auto":
        asked = (os.environ.get("WANDB_MODE") or _setting("mode") or "auto").lower()
    if asked in ("disabled", "offline"):
        return Mode(asked)
    if asked not in ("auto", "online"):
        return Mode("disabled", f"WANDB_MODE is {asked}; expected online, offline or disabled", surprising=True)
    error = credentials_error() or server_error()
    return Mode("offline", error, surprising=asked == "online") if error else Mode("online")


def _setting(name: str) -> str | None:
    """Return a setting of wandb's files: this folder's (`wandb disabled`) beats the user's (`wandb login`)."""
    settings = configparser.ConfigParser(interpolation=None)
    user = os.environ.get("WANDB_CONFIG_DIR") or Path(os.environ.get("HOME", ""), ".config", "wandb")
    with contextlib.suppress(configparser.Error, UnicodeDecodeError):
        settings.read([Path(user, "settings"), Path(os.environ.get("WANDB_DIR", ""), "wandb", "settings")])
    return settings.get("default", name, fallback=None)


def _server() -> tuple[str, str]:
    """Return the W&B server's scheme and host with port, without the password that its address may hold."""
    address = os.environ.get("WANDB_BASE_URL") or _setting("base_url") or "https://api.wandb.ai"
    scheme, _, rest = address.rpartition("://")
    return scheme, rest.partition("/")[0].rpartition("@")[2]


def credentials_error() -> str | None:
    """Return why the server would not know the user, or None if there is a key. The text has no key in it."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return None
    _, host = _server()
    path = os.environ.get("NETRC") or Path(os.environ.get("HOME", ""), ".netrc")
    with contextlib.suppress(OSError, RuntimeError, netrc.NetrcParseError, UnicodeDecodeError):
        if netrc.netrc(Path(path).expanduser()).authenticators(host):
            return None
    return f"no key for {host} (WANDB_API_KEY, or `wandb login`)"


def server_error() -> str | None:
    """Return why the W&B server cannot be used, or None. Takes up to PROBE_SECONDS."""
    scheme, host = _server()
    # In a thread, because looking up a host name has no time limit of its own.
    answer = ThreadPoolExecutor(1).submit(urllib.request.urlopen, f"{scheme}://{host}", timeout=PROBE_SECONDS)
    try:
        answer.result(PROBE_SECONDS).close()
    except urllib.error.HTTPError:  # a 404 is an answer, too
        return None
    except Exception as error:  # a malformed address, or anything but an HTTP server at the port
        reason = getattr(error, "reason", error)
        if not isinstance(reason, ssl.SSLError):  # wandb may know a certificate that Python does not
            return f"{host} cannot be reached ({str(reason) or 'no answer'})"
    return None


class Mirror(contextlib.AbstractContextManager["Mirror"]):
    """The mirror's process, seen from rank 0. On other ranks the methods do nothing. No method raises."""

    def __init__(self, config: TrainConfig, *, is_main: bool) -> None:
        self.mode = decide(config) if is_main else Mode("disabled")  # what was decided; after `wait`, the outcome
        self._process: subprocess.Popen[bytes] | None = None

    def __exit__(self, *_: object) -> None:
        """End the process if it is still there, after a bug; usually `end` and `wait` were called before."""
        self.end(preempted=False, exit_code=1)
        self.wait(HASTY_PATIENCE)

    def follow(self, run_dir: Path) -> str:
        """Start to mirror the run; its config.json must exist. Return a line for the console, or warn and return ""."""
        self.folder = run_dir / directory.WANDB
        try:
            if self.mode.name != "disabled":
                self.folder.mkdir(exist_ok=True)
                before = directory.read_json(run_dir / directory.WANDB_STATE)
                self.id = before.get("id") or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
                state = {"id": self.id, "sent": before.get("sent", -1)}
                directory.write_json(run_dir / directory.WANDB_STATE, state)  # the process checks this id
                self._process = self._start()
        except OSError as error:
            self.mode = Mode("disabled", f"the mirror could not be started ({error})", surprising=True)
        text = str(self.mode)
        if self.mode.name == "offline":
            text += f"; send it later with: {self._sync_command()}"
        if self.mode.surprising:
            log.warning("W&B is %s", text)
        return "" if self.mode.surprising or text == "disabled" else text

    def _start(self) -> subprocess.Popen[bytes]:
        """Start the mirror's process. It also ends when its standard input closes, as when the training dies."""
        folder = self.folder.absolute()
        defaults = {
            "WANDB_ERROR_REPORTING": "false",  # without a network wandb would try for 10 s
            "WANDB_INIT_TIMEOUT": str(INIT_SECONDS),
            "WANDB_DATA_DIR": str(folder),  # files that `wandb sync` sends later; a home may be read-only
            "HOME": str(folder),  # for a container without a home
        }
        given = {name: value for name, value in os.environ.items() if value or not name.startswith("WANDB_")}
        fixed = {
            "WANDB_MODE": self.mode.name,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # the mirror finds modules where this process did
        }
        with (folder / LOG).open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "ddp_mnist.wandb_mirror.process", self.mode.name, self.id, folder.parent],
                env=defaults | given | fixed,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                process_group=0,  # a group of its own: Ctrl-C and a launcher's signals are for the training
            )
        os.setpriority(os.PRIO_PROCESS, process.pid, NICENESS)
        return process

    def end(self, *, preempted: bool, exit_code: int) -> None:
        """Tell the process that the run has ended. Returns at once; `wait` waits. Only the first call counts."""
        if self._process and (stdin := self._process.stdin) and not stdin.closed:
            with contextlib.suppress(OSError), stdin:
                stdin.write(json.dumps({"preempted": preempted, "exit_code": exit_code}).encode() + b"\n")

    def wait(self, patience: float = PATIENCE) -> str:
        """Wait up to `patience` seconds until all is sent. Return what the user should know; empty if nothing."""
        if self._process is None:
            return ""
        process, self._process = self._process, None
        problem = ""
        try:
            if code := process.wait(patience):
                problem = f"its process ended with {code}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            problem = f"not everything was sent within {patience:.0f} s"
        state = directory.read_json(self.folder.parent / directory.WANDB_STATE)
        self.mode = Mode(state.get("mode", "disabled"))
        if problem:
            advice = "" if self.mode.name == "disabled" else f" Send what wandb has with: {self._sync_command()}"
            return f"W&B: {problem} (see {self.folder / LOG}); metrics.jsonl has everything.{advice}"
        if self.mode.name == "offline":
            refused = f"; the server did not take it ({state['refusal']})" if "refusal" in state else ""
            return f"W&B: the run is in {self.folder}{refused}; send it with: {self._sync_command()}"
        return f"W&B: {state['url']}"

    def _sync_command(self) -> str:
        """Return the command that sends the rest. wandb leaves out runs that began online: hence the option."""
        option, prefix = ("", "offline-") if self.mode.name == "offline" else (" --include-online", "*")
        # The last star: if attempts begin in the same second, wandb puts a number behind the id of the later ones.
        return f"wandb sync{option} {shlex.quote(str(self.folder))}/{prefix}run-*-{self.id}*"
