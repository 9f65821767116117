"""The W&B mirror with the real wandb client: without a server, with broken ones, and with the loopback's own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faults
import jobs
import psutil
import pytest
import wandb_server

from ddp_mnist.config import TrainConfig
from ddp_mnist.storage import directory
from ddp_mnist.wandb_mirror import mirror
from ddp_mnist.wandb_mirror.mirror import Mirror, Mode, decide

Train = Callable[..., jobs.Ended]
KEY = "0123456789abcdef0123456789abcdef01234567"
NEW_KEY = "wandb_v1_" + "ThisIsNotAKeyThisIsNotAKeyThisIsNotAKeyThisIsNotAKey"


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.delenv("WANDB_MODE")
    for name, value in account(tmp_path_factory.mktemp("home")).items():
        monkeypatch.setenv(name, value)


def account(home: Path) -> dict[str, str]:
    """Return the variables of a machine that has never seen W&B, whose server is a closed port of the loopback."""
    # wandb's service leaves a temporary folder when it is killed; NETRC is set where the tests run behind a proxy.
    folders = {"HOME": str(home), "TMPDIR": str(home), "NETRC": ""}
    return {**folders, "WANDB_BASE_URL": "http://127.0.0.1:1", "no_proxy": "127.0.0.1"}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[wandb_server.Server]:
    """A working W&B, and a key for it."""
    with wandb_server.serve() as found:
        monkeypatch.setenv("WANDB_BASE_URL", found.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield found


def attempts(run_dir: Path) -> list[SimpleNamespace]:
    """Return what lies in a run directory, oldest first, as wandb's own reader prints it."""
    found = []
    for path in sorted(run_dir.glob("wandb/*run-*")):
        text = jobs.run([sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]).out
        of: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for record in map(json.loads, text.splitlines()):
            of[record["type"]].append(record[record["type"]])
        summary: dict[str, Any] = {}
        for part in of["summary"]:
            summary |= part.get("update", {})
        (code,) = [part.get("exit_code", 0) for part in of["exit"]] or [None]
        ended = {"exit_code": code, "preempting": bool(of["preempting"]), "summary": summary}
        history, run = [part["item"] for part in of["history"]], of["run"][0] if of["run"] else {}
        found.append(SimpleNamespace(path=path, text=text, run=run, history=history, **ended))
    return found


def steps(lines: list[dict[str, Any]]) -> list[int]:
    return [line["step"] for line in lines]


def assert_mirrored(logged: list[dict[str, Any]], run_dir: Path) -> None:
    """Compare with metrics.jsonl: every line once, in order, with every plain value of it."""
    lines = jobs.read_metrics(run_dir)
    assert steps(logged) == steps(lines)
    for found, line in zip(logged, lines, strict=True):
        plain = {key: value for key, value in line.items() if not isinstance(value, list)}
        assert {key: found.get(key) for key in plain} == plain
        assert found["_step"] == line["step"]  # also wandb's own axis goes on in the next attempt


def assert_no_secret(secret: str, run_dir: Path, ended: jobs.Ended) -> None:
    assert secret not in ended.out + ended.err
    paths = [path for path in run_dir.rglob("*") if path.is_file()]
    assert [path for path in paths if secret.encode() in path.read_bytes()] == []


def grow(run_dir: Path, first: int, last: int) -> Path:
    """Write lines of metrics.jsonl, and the run directory around it, as a training would."""
    run_dir.mkdir(exist_ok=True)
    directory.write_json(run_dir / "config.json", {"settings": {"dataset": "fashion-mnist", "data_dir": "/nowhere"}})
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"step": step, "train/loss": 1 / step}) + "\n" for step in range(first, last + 1))
    return run_dir


def start(run_dir: Path, mode: Any) -> Mirror:
    started = Mirror(TrainConfig(output_dir=run_dir, wandb=mode), is_main=True)
    started.follow(run_dir)
    return started


def finish(started: Mirror, *, preempted: bool = False, exit_code: int = 0) -> str:
    started.end(preempted=preempted, exit_code=exit_code)
    return started.wait()


def family(started: Mirror) -> list[psutil.Process]:
    """Return the mirror's process, and wandb's own below it."""
    assert started._process is not None
    process = psutil.Process(started._process.pid)
    return [process, *process.children(recursive=True)]


def state(run_dir: Path) -> dict[str, Any]:
    return directory.read_json(run_dir / directory.WANDB_STATE)


def wait_for_step(run_dir: Path, step: int) -> None:
    faults.wait_for(lambda: state(run_dir).get("sent", -1) >= step, f"step {step} in the mirror")


# --- Where to ---------------------------------------------------------------------------------------------------------

LOGGED_IN = f"machine 127.0.0.1:1\n  login user\n  password {KEY}\n"  # as `wandb login` leaves it
OWN_SERVER = {"WANDB_BASE_URL": "", ".config/wandb/settings": "[default]\nbase_url = http://own\n"}
DISABLED = "[default]\nmode = disabled\n"  # as `wandb disabled` leaves it
EMPTY = [f"WANDB_{name}" for name in ("MODE", "API_KEY", "BASE_URL", "CONFIG_DIR", "DIR", "INIT_TIMEOUT", "PROJECT")]
DAMAGED = {".config/wandb/settings": "[\0", ".netrc": "\0 machine"}
REFUSED = "127.0.0.1:1 cannot be reached ([Errno 111] Connection refused)"
NO_KEY = "no key for 127.0.0.1:1 ("


@pytest.mark.parametrize(
    ("flag", "machine", "name", "surprising", "why"),
    [
        ("auto", {}, "offline", False, NO_KEY),
        ("auto", dict.fromkeys(EMPTY, ""), "offline", False, "no key for api.wandb.ai ("),
        ("auto", {"WANDB_BASE_URL": f"http://user:{KEY}@127.0.0.1:1/"}, "offline", False, NO_KEY),
        ("auto", OWN_SERVER, "offline", False, "no key for own ("),
        ("auto", DAMAGED, "offline", False, NO_KEY),
        ("auto", {"WANDB_MODE": "online"}, "offline", True, NO_KEY),
        ("auto", {"WANDB_MODE": "disabled"}, "disabled", False, ""),
        ("auto", {"WANDB_MODE": "on"}, "disabled", True, "WANDB_MODE is on; expected online, offline or disabled"),
        ("auto", {"wandb/settings": DISABLED}, "disabled", False, ""),
        ("auto", {".config/wandb/settings": DISABLED}, "disabled", False, ""),
        ("auto", {"WANDB_MODE": "offline", "wandb/settings": DISABLED}, "offline", False, ""),
        ("auto", {"WANDB_API_KEY": NEW_KEY}, "offline", False, REFUSED),
        ("auto", {"WANDB_IDENTITY_TOKEN_FILE": "/nowhere/token"}, "offline", False, REFUSED),
        ("auto", {".netrc": LOGGED_IN}, "offline", False, REFUSED),
        ("auto", {"NETRC": "given", "given": LOGGED_IN}, "offline", False, REFUSED),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://["}, "offline", False, "[ cannot be reached ("),
        ("offline", {"WANDB_MODE": "disabled", "wandb/settings": DISABLED}, "offline", False, ""),
        ("online", {"WANDB_MODE": "disabled"}, "offline", True, NO_KEY),
        ("online", {"WANDB_API_KEY": KEY}, "offline", True, REFUSED),
        ("disabled", {"WANDB_MODE": "online"}, "disabled", False, ""),
    ],
)
def test_the_mode_follows_flag_environment_settings_key_and_server(
    monkeypatch: pytest.MonkeyPatch, flag: Any, machine: dict[str, str], name: str, surprising: bool, why: str
) -> None:
    """`machine` has variables, and files in the user's home."""
    monkeypatch.chdir(os.environ["HOME"])
    for key, value in machine.items():
        if key.isupper():
            monkeypatch.setenv(key, value)
        else:
            Path(key).parent.mkdir(parents=True, exist_ok=True)
            Path(key).write_text(value)
    mode = decide(TrainConfig(wandb=flag))
    assert (mode.name, mode.surprising) == (name, surprising)
    assert why in mode.why and bool(why) == bool(mode.why)
    assert KEY not in mode.why and "\n" not in mode.why


def test_a_certificate_that_python_does_not_know_is_for_wandb_to_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError(ssl.SSLCertVerificationError("self-signed certificate"))

    monkeypatch.setattr(urllib.request.OpenerDirector, "open", refuse)
    assert mirror.server_error() is None


def test_a_server_that_does_not_answer_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, server: wandb_server.Server
) -> None:
    assert decide(TrainConfig(wandb="auto")) == Mode("online")
    assert not any(server.contents)  # that was no login
    monkeypatch.setattr(mirror, "PROBE_SECONDS", 0.2)
    server.hanging.add("GET")
    assert decide(TrainConfig(wandb="auto")).name == "offline"
    done = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [done.wait(20)])
    assert "(no answer)" in decide(TrainConfig(wandb="auto")).why  # nor a name server
    done.set()


# --- An offline run ---------------------------------------------------------------------------------------------------

OPTIONS = [
    "--wandb-project",
    "p",
    "--wandb-entity",
    "e",
    "--wandb-group",
    "g",
    "--wandb-model",
    "--wandb-tags",
    "a",
    "b",
]
PROGRAM = "import sys; from ddp_mnist.train import main; code = main(); print('wandb' in sys.modules); sys.exit(code)"


@pytest.mark.slow
@pytest.mark.distributed
def test_an_offline_run_has_all_that_is_on_the_disk_and_no_secret(flags: list[str], tiny: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run 1"
    variables = account(tmp_path) | {"WANDB_MODE": "offline", "WANDB_API_KEY": NEW_KEY, "DDP_MNIST_JOB_ID": "17"}
    command = [sys.executable, "-c", PROGRAM, *flags, "--wandb", "auto", *OPTIONS, "--output-dir", str(run_dir)]
    with faults.Job([command] * 2, [jobs.environment(variables | rank) for rank in jobs.rank_variables(2)]) as job:
        ended = job.wait()  # also for wandb's processes
    jobs.succeeded(ended)
    (attempt,) = attempts(run_dir)  # only one rank has a mirror
    assert_mirrored(attempt.history, run_dir)
    assert attempt.exit_code == 0 and not attempt.preempting
    assert_no_secret(NEW_KEY, run_dir, ended[0])

    names = ("project", "entity", "run_group", "display_name", "tags")
    assert [attempt.run.get(name) for name in names] == ["p", "e", "g", "run 1", ["a", "b"]]
    config, sent = jobs.read_json(run_dir / "config.json"), attempt.run["config"]["update"]
    assert {name: sent[name] for name in config} == config
    assert sent["settings"]["recipe"] == "tutorial" and sent["launch"]["job_id"] == "17"
    summary = jobs.read_json(run_dir / "summary.json")
    plain = {name: value for name, value in summary.items() if not isinstance(value, list)}
    assert {name: attempt.summary.get(name) for name in plain} == plain
    assert f'"model-{attempt.run["run_id"]}"' in attempt.text

    assert ended[0].out.splitlines()[-1] == "False"  # the training itself never imports wandb
    command_line = f"wandb sync '{run_dir}/wandb'/offline-run-*-{state(run_dir)['id']}*"
    assert f"  W&B     offline; send it later with: {command_line}\n" in ended[0].out
    assert ended[0].out.count("W&B") == 2 and not ended[0].err
    sync = jobs.run(["bash", "-c", command_line.replace("wandb sync", f"{sys.executable} -m wandb sync --dry-run")])
    assert "Would sync 1 run(s)" in sync.out + sync.err

    logged, line, files = attempt.history[-1], jobs.read_metrics(run_dir)[-1], attempt.path / "files"
    table = json.loads((files / logged["test/confusion_table.path"]).read_text())["data"]
    assert table == [[str(a), str(b), line["test/confusion"][a][b]] for a in range(10) for b in range(10)]


@pytest.mark.slow
def test_a_run_is_one_curve_after_a_kill_and_a_stop(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], train: Train, tmp_path: Path
) -> None:
    monkeypatch.setattr("ddp_mnist.trainer.HASTY_PATIENCE", jobs.FOREVER)  # a busy machine takes long to start wandb
    run_dir = tmp_path / "run"
    endless = ["--epochs", "100000", "--log-every", "5", "--checkpoint-every", "40"]
    command = ["--wandb", "offline", "--output-dir", str(run_dir)]
    job = [[*jobs.TRAIN, *flags, *endless, *command]], [jobs.environment(account(tmp_path))]
    with faults.Job(*job) as killed:
        faults.wait_until_step(killed, run_dir, 45)
        killed.signal(signal.SIGSTOP)  # its CPU is the mirror's
        wait_for_step(run_dir, 45)
        killed.signal(signal.SIGKILL)
        faults.wait_for(lambda: not killed.left(), "the end of the mirror, by itself", killed)
    last = attempts(run_dir)[0].history[-1]["step"]
    assert faults.checkpoint_steps(run_dir)[-1] <= last  # some steps are taken twice
    while faults.last_step(run_dir) <= last:  # once, where the machine is not too busy
        assert train(*endless, *command, "--max-minutes", 0.02).code == 75

    found = attempts(run_dir)
    assert (found[0].exit_code, found[0].preempting) == (1, False)
    assert (found[-1].exit_code, found[-1].preempting) == (75, True)
    assert found[-1].summary["stop_reason"] == "max_minutes"
    assert {attempt.run["run_id"] for attempt in found} == {state(run_dir)["id"]}
    logged = [line for attempt in found for line in attempt.history]
    assert steps(logged) == steps(jobs.read_metrics(run_dir)) and len(set(steps(logged))) == len(logged)


# --- Nothing hurts the training ---------------------------------------------------------------------------------------

TROUBLES = {
    "a file in the way": "W&B is disabled: the mirror could not be started (",
    "a broken wandb": "W&B: its process ended with 1 (see {folder}/mirror.log); metrics.jsonl has everything.\n",
}


@pytest.mark.slow
@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_mirror_that_fails_is_not_missed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, train: Train, tmp_path: Path, trouble: str
) -> None:
    run_dir = tmp_path / "run"
    if trouble == "a file in the way":
        run_dir.mkdir()
        (run_dir / "wandb").touch()
    else:
        bad_wandb(monkeypatch, tmp_path / "bad")
    ended = train("--wandb", "offline", "--output-dir", run_dir)
    assert ended.code == 0, ended.err
    assert steps(jobs.read_metrics(run_dir)) == list(range(1, 53))
    assert jobs.read_json(run_dir / "summary.json")["wandb_mode"] == "disabled"
    assert TROUBLES[trouble].format(folder=run_dir / "wandb") in ended.out + caplog.text
    if trouble == "a broken wandb":
        text = (run_dir / "wandb" / mirror.LOG).read_text()
        assert "the first words" in text and "ImportError: broken" in text


@pytest.mark.slow
def test_a_run_that_the_server_does_not_take_is_written_offline(
    monkeypatch: pytest.MonkeyPatch, server: wandb_server.Server, tmp_path: Path
) -> None:
    monkeypatch.setattr(mirror, "INIT_SECONDS", 2)
    server.hanging.add("POST")
    started = start(grow(tmp_path, 1, 5), "online")
    news, sync = finish(started), f"wandb sync {tmp_path}/wandb/offline-run-*-{started.id}*"
    assert "; the server did not take it (" in news and news.endswith(f"; send it with: {sync}")
    assert started.mode == Mode("offline")
    (attempt,) = [attempt for attempt in attempts(tmp_path) if attempt.history]
    assert_mirrored(attempt.history, tmp_path)
    assert attempt.path.name.startswith("offline-run-") and attempt.summary["wandb_mode"] == "offline"


def bad_wandb(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Put a wandb that cannot be imported before the real one, on this process's path alone."""
    (folder / "wandb").mkdir(parents=True)
    (folder / "wandb" / "__init__.py").write_text("print('the first words')\nraise ImportError('broken')\n")
    monkeypatch.syspath_prepend(folder)


@pytest.mark.slow
def test_a_run_with_nothing_to_mirror_starts_no_process(
    monkeypatch: pytest.MonkeyPatch, train: Train, tmp_path: Path
) -> None:
    bad_wandb(monkeypatch, tmp_path / "bad")
    for flag in ("disabled", "offline"):  # the second time it is finished already
        ended = train("--wandb", flag, "--output-dir", tmp_path / "run")
        assert ended.code == 0 and "W&B" not in ended.out + ended.err
        assert "wandb" not in sys.modules and not list((tmp_path / "run").glob("wandb*"))
        assert jobs.read_json(tmp_path / "run" / "summary.json")["wandb_mode"] == "disabled"


@pytest.mark.slow
def test_a_training_that_fails_without_a_word_is_mirrored_to_its_last_whole_line(tmp_path: Path) -> None:
    run_dir = grow(tmp_path, 1, 5)
    no_labels = dict.fromkeys(["train/accuracy", "test/accuracy", "test/confusion"])
    line = json.dumps({"step": 6, "test/loss": 0.5} | no_labels) + "\n"
    line += json.dumps({"step": 7, "test/confusion": [[2, 1], [0, 3]]}) + "\n"
    directory.write_json(run_dir / "summary.json", {"test_loss": 0.5, "test_accuracy": None, "test_confusion": None})
    with contextlib.suppress(ZeroDivisionError), start(run_dir, "offline"):
        with (run_dir / "metrics.jsonl").open("a") as file:
            file.write(line[:9])
            file.flush()
            wait_for_step(run_dir, 5)
            file.write(line[9:] + line[:9])
        raise ZeroDivisionError
    (attempt,) = attempts(run_dir)
    assert attempt.exit_code == 1 and steps(attempt.history) == list(range(1, 8))
    assert attempt.history[5]["test/loss"] == attempt.summary["test_loss"] == 0.5
    assert attempt.history[5].get("test/accuracy") is attempt.summary.get("test_accuracy") is None
    assert "test/confusion" in " ".join(attempt.history[-1])


@pytest.mark.slow
def test_a_service_that_is_killed_is_started_again_and_the_second_time_the_user_is_told(tmp_path: Path) -> None:
    run_dir = grow(tmp_path, 1, 5)
    started = start(run_dir, "offline")
    for last in (5, 8):
        wait_for_step(run_dir, last)
        for process in family(started)[1:]:
            process.kill()
        grow(run_dir, last + 1, last + 3)
    news = finish(started)
    assert re.fullmatch(r"W&B: .* \(see .*mirror.log\); metrics.jsonl has everything. .*: wandb sync .*", news)
    assert [steps(attempt.history) for attempt in attempts(run_dir)] == [[*range(1, 6)], [6, 7, 8]]


@pytest.mark.slow
def test_a_user_without_home_and_name_and_with_empty_variables_has_an_offline_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run_dir = grow(tmp_path / "run", 1, 3)
    for name in EMPTY:
        monkeypatch.setenv(name, "")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    (tmp_path / "sitecustomize.py").write_text("import pwd\npwd.getpwuid = {}.__getitem__\n")  # for the mirror
    monkeypatch.syspath_prepend(tmp_path)
    assert decide(TrainConfig()).name == "offline"
    assert "send it with" in finish(start(run_dir, "offline"))
    monkeypatch.undo()
    (attempt,) = attempts(run_dir)
    assert steps(attempt.history) == [1, 2, 3] and attempt.run["project"] == "ddp_mnist"


@pytest.mark.slow
def test_an_online_run_sends_every_step_and_no_secret(
    monkeypatch: pytest.MonkeyPatch, server: wandb_server.Server, train: Train, tmp_path: Path
) -> None:
    checkout, run_dir, token = tmp_path / "checkout", tmp_path / "run", "ghp_ThisIsNotAToken"
    checkout.mkdir()
    remote = f"git remote add origin https://user:{token}@example.com/repository"
    commit = "git -c user.name=n -c user.email=e commit -q --allow-empty -m first"
    subprocess.run(f"git init -q && {remote} && {commit}", shell=True, cwd=checkout, check=True)
    monkeypatch.chdir(checkout)
    ended = train("--wandb", "auto", "--output-dir", run_dir)
    assert ended.code == 0 and jobs.read_json(run_dir / "summary.json")["wandb_mode"] == "online"
    (name,) = server.runs
    run, history = server.run(name), server.history(name)
    assert name == state(run_dir)["id"] and run["exit_code"] == 0 and run["summary"]["finished"] is True
    assert steps(history) == list(range(1, 53)) and {"train/loss", "test/accuracy"} <= history[-1].keys()
    assert f"W&B: {server.url}/{wandb_server.ENTITY}/ddp_mnist/runs/{name}\n" in ended.out
    for secret in (KEY, token, "example.com"):
        assert_no_secret(secret, run_dir, ended)
        assert secret.encode() not in b"".join(server.contents)


@pytest.mark.slow
def test_the_server_gets_every_step_once_after_a_killed_mirror_signals_to_everybody_and_a_rewound_run(
    server: wandb_server.Server, tmp_path: Path
) -> None:
    run_dir = grow(tmp_path, 1, 7)
    server.hanging |= {"PUT", "file_stream"}
    started = start(run_dir, "online")
    run = server.run(started.id)
    wait_for_step(run_dir, 7)  # wandb has taken them, the server has not
    started.end(preempted=False, exit_code=0)
    news = started.wait(0.1)
    assert news.startswith("W&B: not everything was sent within 0 s") and "wandb sync --include-online" in news
    assert not server.history(started.id)

    # Ctrl-C in a terminal does not reach the mirror; a cluster's signal may, and ends wandb's own service.
    server.hanging.clear()
    started = start(run_dir, "online")
    faults.wait_for(lambda: server.history(started.id), "what the killed mirror had not sent")
    first, *others = family(started)
    assert os.getpgid(first.pid) != os.getpgid(0) and first.nice() == mirror.NICENESS
    for process in reversed(others):
        process.terminate()
    for number in (signal.SIGINT, signal.SIGUSR2, signal.SIGTERM):
        first.send_signal(number)
    grow(run_dir, 8, 9)
    assert "/runs/" in finish(started, preempted=True, exit_code=75)
    assert steps(server.history(started.id)) == list(range(1, 10))
    assert (run["states"], run["exit_code"]) == (["preempting"], 75)

    (run_dir / "metrics.jsonl").unlink()  # back to a checkpoint at step 3, and on
    grow(run_dir, 1, 11)
    assert "/runs/" in finish(start(run_dir, "online"))
    assert steps(server.history(started.id)) == list(range(1, 12))
    assert run["sent"] == 11 and run["exit_code"] == 0


@pytest.mark.slow
def test_attempts_wait_for_each_other_and_are_synced_into_one_curve_until_a_fresh_start(
    server: wandb_server.Server, tmp_path: Path
) -> None:
    run_dir = grow(tmp_path / "run", 1, 5)
    first = start(run_dir, "offline")
    wait_for_step(run_dir, 5)
    second = start(run_dir, "offline")
    record = run_dir / "wandb" / mirror.LOG
    faults.wait_for(lambda: "is held by another job; waiting" in record.read_text(), "the second mirror")
    grow(run_dir, 6, 8)
    finish(first, exit_code=1)
    grow(run_dir, 9, 10)
    news = finish(second)
    assert [steps(attempt.history) for attempt in attempts(run_dir)] == [[*range(1, 9)], [9, 10]]

    older, newer = sorted(run_dir.glob("wandb/offline-run-*"))
    newer.rename(f"{older}-1")  # what wandb itself calls it where both began in one second
    command = news.partition("send it with: ")[2].replace("wandb sync", f"{sys.executable} -m wandb sync")
    variables = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.url, "WANDB_ERROR_REPORTING": "false"}
    ended = jobs.run(["bash", "-c", command], variables, cwd=tmp_path)  # where wandb leaves a folder
    assert ended.code == 0, ended.err
    assert [*server.runs] == [first.id] and steps(server.history(first.id)) == list(range(1, 11))
    online = start(grow(run_dir, 11, 12), "online")
    faults.wait_for(lambda: len(server.history(first.id)) == 12, "the rest, once")

    directory.start_over(run_dir)
    fresh = start(grow(run_dir, 1, 9), "offline")
    online.end(preempted=False, exit_code=1)
    assert online.wait() and "send it with" in finish(fresh)
    (attempt,) = attempts(run_dir)
    assert attempt.run["run_id"] == fresh.id != online.id and steps(attempt.history) == list(range(1, 10))
