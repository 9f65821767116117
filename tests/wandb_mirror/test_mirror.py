"""The W&B mirror with the real wandb client: without a server, with broken ones, and with the loopback's own."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import faults
import jobs
import psutil
import pytest
import wandb_server
from safetensors.torch import save_file

from ddp_mnist.config import TrainConfig
from ddp_mnist.data import mnist
from ddp_mnist.model import CNN
from ddp_mnist.run import directory
from ddp_mnist.wandb_mirror import mirror
from ddp_mnist.wandb_mirror.mirror import Mirror, Mode, decide

Train = Callable[..., jobs.Ended]
KEY = "0123456789abcdef0123456789abcdef01234567"
NEW_KEY = "wandb_v1_" + "ThisIsNotAKeyThisIsNotAKeyThisIsNotAKeyThisIsNotAKey"
ROOT = str(Path(__file__).parents[2])
ENDLESS = ["--epochs", "100000", "--log-every", "5"]
AT_ONCE = "import sys; from ddp_mnist import train; from ddp_mnist.wandb_mirror import mirror; "
AT_ONCE += "mirror.BEGIN_SECONDS = 0.0; sys.exit(train.main())"


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A machine that has never seen W&B, whose server is a closed port of the loopback. Mirrors begin at once."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setattr(mirror, "BEGIN_SECONDS", 0.0)
    monkeypatch.delenv("WANDB_MODE")
    for name, value in account(home).items():
        monkeypatch.setenv(name, value)


def account(home: Path) -> dict[str, str]:
    return {
        "HOME": str(home),
        "TMPDIR": str(home),  # wandb's service leaves a folder when it is killed
        "WANDB_BASE_URL": f"http://127.0.0.1:{jobs.free_port()}",
        "PYTHONPATH": ROOT,
        "no_proxy": "127.0.0.1",
        # The real ones, where the tests run behind a proxy.
        "NETRC": str(home / ".netrc"),
        "WANDB_CONFIG_DIR": str(home / "config"),
    }


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[wandb_server.Server]:
    """A working W&B, and a key for it."""
    with wandb_server.serve() as found:
        monkeypatch.setenv("WANDB_BASE_URL", found.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield found


@dataclass(frozen=True)
class Attempt:
    """A local run, as wandb's own reader tells it."""

    path: Path
    text: str
    run: dict[str, Any]
    history: list[dict[str, Any]]
    summary: dict[str, Any]
    exit_code: int | None
    preempting: bool


def attempts(run_dir: Path) -> list[Attempt]:
    """Of all that lies in a run directory, oldest first."""
    return [read(path) for path in sorted(run_dir.glob("wandb/*run-*"))]


def read(path: Path) -> Attempt:
    told = jobs.run([sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]).out  # 1: cut short
    records = [json.loads(line) for line in told.splitlines()]

    def of(kind: str) -> list[dict[str, Any]]:
        return [record[kind] for record in records if record["type"] == kind]

    summary: dict[str, Any] = {}
    for part in of("summary"):
        summary |= part.get("update", {})
    (code,) = [part.get("exit_code", 0) for part in of("exit")] or [None]
    run, history = (of("run") or [{}])[0], [part["item"] for part in of("history")]
    return Attempt(path, told, run, history, summary, code, bool(of("preempting")))


def steps(found: list[Attempt]) -> list[int]:
    return [line["step"] for attempt in found for line in attempt.history]


def assert_mirrored(logged: list[dict[str, Any]], run_dir: Path) -> None:
    """Every line of metrics.jsonl once, in order, with every plain value of it."""
    lines = jobs.read_metrics(run_dir)
    assert [line["step"] for line in logged] == [line["step"] for line in lines]
    for found, line in zip(logged, lines, strict=True):
        plain = {key: value for key, value in line.items() if not isinstance(value, list)}
        assert {key: found.get(key) for key in plain} == plain
        assert found["_step"] == line["step"]  # also wandb's own axis goes on in the next attempt


def hand_made(run_dir: Path, last: int = 5) -> Path:
    """A run directory as the training's writes it, without the training."""
    run_dir.mkdir(exist_ok=True)
    directory.write_json(run_dir / "config.json", {"settings": {"dataset": "fashion-mnist", "data_dir": "/nowhere"}})
    grow(run_dir, 1, last)
    return run_dir


def grow(run_dir: Path, first: int, last: int) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"step": step, "train/loss": 1 / step}) + "\n" for step in range(first, last + 1))


def start(run_dir: Path, mode: str) -> Mirror:
    found = Mirror(TrainConfig(output_dir=run_dir, wandb=mode), is_main=True)  # type: ignore[arg-type]
    found.mode = Mode(mode)  # as decided: there may be no key here
    found.follow(run_dir)
    return found


def family(found: Mirror) -> list[psutil.Process]:
    """The mirror's process, and wandb's own below it."""
    assert found._process is not None
    process = psutil.Process(found._process.pid)
    return [process, *process.children(recursive=True)]


def state(run_dir: Path) -> dict[str, Any]:
    return jobs.read_json(run_dir / directory.WANDB_STATE)


def wait_for_step(run_dir: Path, mode: str, step: int) -> None:
    path = run_dir / directory.WANDB_STATE
    faults.wait_for(lambda: directory.read_json(path).get(mode, -1) >= step, f"step {step} in the mirror")


def finished(found: Mirror, *, preempted: bool = False, exit_code: int = 0) -> str:
    found.end(preempted=preempted, exit_code=exit_code)
    return found.wait()


def assert_gone(processes: list[psutil.Process]) -> None:
    """wandb's service sees within seconds that its owner is dead."""
    faults.wait_for(lambda: not any(map(alive, processes)), f"the end of {processes}")


def alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


# --- Where to ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "variables", "name", "surprising", "why"),
    [
        ("auto", {}, "offline", False, "no key for 127.0.0.1:"),
        ("auto", {"WANDB_MODE": ""}, "offline", False, "no key for 127.0.0.1:"),
        ("auto", {"WANDB_BASE_URL": f"http://user:{KEY}@127.0.0.1/"}, "offline", False, "no key for 127.0.0.1 ("),
        ("auto", {"WANDB_MODE": "online"}, "offline", True, "no key for 127.0.0.1:"),
        ("auto", {"WANDB_MODE": "offline"}, "offline", False, ""),
        ("auto", {"WANDB_MODE": "disabled"}, "disabled", False, ""),
        ("auto", {"WANDB_DISABLED": "true"}, "disabled", False, ""),
        ("auto", {"WANDB_MODE": "on"}, "disabled", True, "WANDB_MODE is on; expected online, offline or disabled"),
        ("auto", {"WANDB_API_KEY": KEY}, "offline", False, "cannot be reached ([Errno 111] Connection refused)"),
        ("online", {}, "offline", True, "no key for 127.0.0.1:"),
        ("online", {"WANDB_API_KEY": KEY}, "offline", True, "cannot be reached ([Errno 111] Connection refused)"),
        ("online", {"WANDB_MODE": "disabled", "WANDB_DISABLED": "true"}, "offline", True, "no key"),
        ("online", {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "nonsense"}, "offline", True, "nonsense cannot be reached"),
        ("offline", {"WANDB_MODE": "disabled"}, "offline", False, ""),
        ("disabled", {"WANDB_MODE": "online"}, "disabled", False, ""),
    ],
)
def test_the_mode_follows_flag_environment_key_and_server(
    monkeypatch: pytest.MonkeyPatch, flag: Any, variables: dict[str, str], name: str, surprising: bool, why: str
) -> None:
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    mode = decide(TrainConfig(wandb=flag))
    assert (mode.name, mode.surprising) == (name, surprising)
    assert why in mode.why and bool(why) == bool(mode.why)
    assert KEY not in mode.why and "\n" not in mode.why


@pytest.mark.parametrize("folder_only", [False, True])
@pytest.mark.parametrize("flag", ["auto", "online"])
def test_without_wandb_there_is_no_mirror(monkeypatch: pytest.MonkeyPatch, flag: Any, folder_only: bool) -> None:
    # wandb leaves a folder of its name wherever it ran, which Python takes for a package without a file.
    found = ModuleSpec("wandb", None, is_package=True) if folder_only else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    assert decide(TrainConfig(wandb=flag)) == Mode("disabled", "wandb is not installed", surprising=flag == "online")


@pytest.mark.parametrize("kind", ["key", "identity token", "given netrc", "netrc at home", "own server"])
def test_credentials_are_found_where_wandb_finds_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: wandb_server.Server, kind: str
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.delenv("NETRC")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert decide(TrainConfig(wandb="auto")).name == "offline"
    if kind == "key":
        monkeypatch.setenv("WANDB_API_KEY", NEW_KEY)
    elif kind == "identity token":
        monkeypatch.setenv("WANDB_IDENTITY_TOKEN_FILE", "/nowhere/token")
    else:
        path = tmp_path / ("given" if kind == "given netrc" else ".netrc")
        path.write_text(f"machine {server.url.removeprefix('http://')}\n  login user\n  password {KEY}\n")
        path.chmod(0o600)
    if kind == "given netrc":
        monkeypatch.setenv("NETRC", str(path))
    if kind == "own server":  # as `wandb login --host` leaves it
        monkeypatch.delenv("WANDB_BASE_URL")
        monkeypatch.delenv("WANDB_CONFIG_DIR")
        (tmp_path / ".config" / "wandb").mkdir(parents=True)
        (tmp_path / ".config" / "wandb" / "settings").write_text(f"[default]\nbase_url = {server.url}\n")
    assert decide(TrainConfig(wandb="auto")) == Mode("online")
    assert not server.asked  # the probe is no login


@pytest.mark.parametrize("key", ["", KEY])
def test_a_damaged_account_is_no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, key: str) -> None:
    for name in ("settings", ".netrc"):
        (tmp_path / name).write_bytes(b"\xff\xfe[\0 machine")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://[")
    monkeypatch.setenv("WANDB_API_KEY", key)
    assert decide(TrainConfig(wandb="auto")).name == "offline"


def test_a_certificate_that_python_does_not_know_is_for_wandb_to_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    def open_(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError(ssl.SSLCertVerificationError("self-signed certificate"))

    monkeypatch.setattr(urllib.request.OpenerDirector, "open", open_)
    assert mirror.server_error() is None


def test_the_waits_are_those_of_the_documentation() -> None:
    assert (mirror.PROBE_SECONDS, mirror.PATIENCE, mirror.HASTY_PATIENCE) == (5, 60, 10)


# --- An offline run ---------------------------------------------------------------------------------------------------

OPTIONS = ["--wandb-project", "p", "--wandb-entity", "e", "--wandb-group", "g", "--wandb-name", "n"]
OPTIONS += ["--wandb-tags", "a", "b", "--wandb-model"]
PROGRAM = "import sys; from ddp_mnist.train import main; code = main(); print('wandb' in sys.modules); sys.exit(code)"


@dataclass(frozen=True)
class Offline:
    run_dir: Path
    ended: jobs.Ended


@pytest.fixture(scope="module")
def offline(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Offline:
    """A whole run, mirrored offline, on a machine with a key."""
    run_dir, home = tmp_path_factory.mktemp("offline") / "run 1", tmp_path_factory.mktemp("home")
    variables = account(home) | {"WANDB_MODE": "offline", "WANDB_API_KEY": NEW_KEY, "DDP_MNIST_JOB_ID": "17"}
    command = [sys.executable, "-c", PROGRAM, *flags, "--wandb", "auto", *OPTIONS, "--output-dir", str(run_dir)]
    with faults.Job([command], [jobs.environment(variables)]) as job:
        (ended,) = job.wait()  # also of wandb's processes
    assert ended.code == 0, ended.err
    return Offline(run_dir, ended)


@pytest.fixture(scope="module")
def mirrored(offline: Offline) -> Attempt:
    (attempt,) = attempts(offline.run_dir)
    return attempt


@pytest.mark.slow
def test_an_offline_run_equals_metrics_jsonl(
    offline: Offline, mirrored: Attempt, run_at: Callable[[int], Path]
) -> None:
    assert_mirrored(mirrored.history, offline.run_dir)
    last = jobs.read_metrics(offline.run_dir)[-1]
    names = {"train/loss", "train/accuracy", "lr", "train/gradient_norm", "train/images_per_second"}
    names |= {f"train/step_seconds_{name}" for name in ("min", "mean", "max")} | {"test/loss", "test/accuracy"}
    assert last.keys() >= names
    assert mirrored.exit_code == 0 and not mirrored.preempting
    faults.assert_same_result(offline.run_dir, run_at(1))


@pytest.mark.slow
def test_an_epoch_has_its_classes_confusion_and_mistakes(offline: Offline, mirrored: Attempt, tiny: Path) -> None:
    from PIL import Image

    lines = jobs.read_metrics(offline.run_dir)
    pairs = [(x, y) for x, y in zip(mirrored.history, lines, strict=True) if "test/loss" in y]
    assert len(pairs) == 2
    files = mirrored.path / "files"
    for logged, line in pairs:
        assert [logged[f"test/class_accuracy/{label}"] for label in range(10)] == line["test/class_accuracy"]
        table = json.loads((files / flat(logged, "test/confusion_table.path")).read_text())["data"]
        assert table == [[str(a), str(b), line["test/confusion"][a][b]] for a in range(10) for b in range(10)]
        names, captions = flat(logged, "test/mistakes.filenames"), flat(logged, "test/mistakes.captions")
        assert len(names) == len(line["test/mistakes"]) == 25
        for name, caption, mistake in zip(names, captions, line["test/mistakes"], strict=True):
            sure = f"{mistake['confidence']:.0%}"
            assert caption == f"{mistake['label']} read as {mistake['prediction']}, {sure} sure"
            with Image.open(files / name) as picture:
                assert picture.size == (112, 112) and picture.getextrema() != (0, 0)
    # The picture is that row of the test set.
    images, _ = mnist.read_split("fashion-mnist", tiny, "test", fetch=False)
    logged, line = pairs[-1]
    with Image.open(files / flat(logged, "test/mistakes.filenames")[0]) as picture:
        small = picture.resize((28, 28), Image.Resampling.NEAREST)
        assert small.tobytes() == images[line["test/mistakes"][0]["index"]].tobytes()


def flat(record: dict[str, Any], name: str) -> Any:
    """A value of a record whose nested keys the reader joins by dots, or leaves nested."""
    if name in record:
        return record[name]
    head, _, tail = name.rpartition(".")
    return record[head][tail]


@pytest.mark.slow
def test_a_run_arrives_with_its_names_config_and_summary(offline: Offline, mirrored: Attempt) -> None:
    run = mirrored.run
    names = ("project", "entity", "run_group", "display_name", "tags", "run_id")
    expected = ["p", "e", "g", "n", ["a", "b"], state(offline.run_dir)["id"]]
    assert [run.get(name) for name in names] == expected
    config = jobs.read_json(offline.run_dir / "config.json")
    sent = run["config"]["update"]
    assert {name: sent[name] for name in config} == config
    assert sent["settings"]["recipe"] == "tutorial" and sent["versions"]["torch"]
    assert sent["git"] is None or sent["git"].keys() == {"commit", "dirty"}
    assert sent["launch"].keys() >= {"job_id", "nodes", "restart_count"} and sent["launch"]["job_id"] == "17"
    summary = jobs.read_json(offline.run_dir / "summary.json")
    plain = {name: value for name, value in summary.items() if name not in ("test_confusion", "test_mistakes")}
    assert {name: mirrored.summary.get(name) for name in plain} == plain
    assert summary["wandb_mode"] == "offline"
    assert f'"model-{run["run_id"]}"' in mirrored.text
    assert_no_secret(NEW_KEY, offline.run_dir, offline.ended)
    assert offline.ended.out.splitlines()[-1] == "False"  # the training itself never imports wandb


@pytest.mark.slow
def test_an_offline_run_says_how_to_send_it(offline: Offline) -> None:
    command = f"wandb sync '{offline.run_dir}/wandb'/offline-run-*-{state(offline.run_dir)['id']}*"
    assert f"  W&B     offline; send it later with: {command}\n" in offline.ended.out
    assert offline.ended.out.count("W&B") == 2 and not offline.ended.err
    ended = jobs.run(["bash", "-c", command.replace("wandb sync", f"{sys.executable} -m wandb sync --dry-run")])
    assert "Would sync 1 run(s)" in ended.out + ended.err


def assert_no_secret(secret: str, run_dir: Path, ended: jobs.Ended) -> None:
    assert secret not in ended.out + ended.err
    paths = [path for path in run_dir.rglob("*") if path.is_file()]
    assert len(paths) > 10
    assert [path for path in paths if secret.encode() in path.read_bytes()] == []


# --- Several attempts at a run ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_continued_run_has_one_id_and_every_step_once_until_a_fresh_start(train: Train, tmp_path: Path) -> None:
    command = ["--wandb", "offline", "--output-dir", tmp_path]
    assert train(*command, "--max-steps", 20).code == 0
    assert train(*command).code == 0
    found = attempts(tmp_path)
    assert [attempt.exit_code for attempt in found] == [0, 0]
    assert {attempt.run["run_id"] for attempt in found} == {state(tmp_path)["id"]}
    assert steps(found) == list(range(1, 53)) and len(found[0].history) == 20
    assert_mirrored(found[0].history + found[1].history, tmp_path)

    assert train(*command, "--max-steps", 2, "--fresh").code == 0
    (fresh,) = attempts(tmp_path)
    assert fresh.run["run_id"] == state(tmp_path)["id"] != found[0].run["run_id"]
    assert steps([fresh]) == [1, 2]


def offline_job(run_dir: Path, *arguments: Any, flags: list[str]) -> faults.Job:
    words = [*flags, *ENDLESS, "--wandb", "offline", "--output-dir", run_dir, *arguments]
    command = [sys.executable, "-c", AT_ONCE, *words]
    return faults.Job([list(map(str, command))], [jobs.environment(account(run_dir.parent))])


@pytest.mark.slow
def test_a_killed_run_is_marked_failed_and_continues_its_curve(flags: list[str], train: Train, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with offline_job(run_dir, "--checkpoint-every", 40, flags=flags) as job:
        wait_for_step(run_dir, "offline", 45)
        os.kill(job.pids[0], signal.SIGKILL)
        faults.wait_for(lambda: not job.left(), "the end of the mirror, by itself", job)
    (killed,) = attempts(run_dir)
    assert killed.exit_code == 1 and not killed.preempting
    last = killed.history[-1]["step"]
    assert faults.checkpoint_steps(run_dir)[-1] <= last  # some steps are taken twice
    again = ["--wandb", "offline", *ENDLESS, "--checkpoint-every", 40, "--max-steps", last + 7]
    assert train(*again, "--output-dir", run_dir).code == 0
    found = attempts(run_dir)
    assert [attempt.exit_code for attempt in found] == [1, 0]
    assert len({attempt.run["run_id"] for attempt in found}) == 1
    assert steps(found) == [line["step"] for line in jobs.read_metrics(run_dir)]
    assert len(set(steps(found))) == len(steps(found)) and found[1].history[0]["step"] > last


@pytest.mark.slow
def test_a_stopped_run_is_marked_preempting(flags: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with offline_job(run_dir, flags=flags) as job:
        wait_for_step(run_dir, "offline", 5)
        os.killpg(job.pids[0], signal.SIGTERM)
        (ended,) = job.wait()
    assert ended.code == 75 and "error" not in ended.err
    (attempt,) = attempts(run_dir)
    assert attempt.preempting and attempt.exit_code == 75
    assert_mirrored(attempt.history, run_dir)
    assert attempt.summary["stop_reason"] == "SIGTERM"


@pytest.mark.slow
def test_a_failed_run_is_marked_failed(train: Train, tmp_path: Path) -> None:
    init, run_dir, weights = tmp_path / "init.safetensors", tmp_path / "run", CNN().state_dict()
    save_file(weights | {"fc1.weight": weights["fc1.weight"] * 1e38}, init)
    ended = train("--wandb", "offline", "--init-from", init, "--output-dir", run_dir)
    assert "the loss became" in jobs.the_message([ended], 1)
    (attempt,) = attempts(run_dir)
    assert attempt.exit_code == 1 and not attempt.preempting
    assert attempt.summary["stop_reason"] == "nan"


# --- Nothing hurts the training ---------------------------------------------------------------------------------------


def assert_unhurt(ended: jobs.Ended, run_dir: Path, expected: Path, mode: str) -> None:
    """The same weights and curve as without a mirror, a summary that tells the truth, and no process left."""
    assert ended.code == 0, ended.err
    faults.assert_same_result(run_dir, expected)
    assert jobs.read_json(run_dir / "summary.json")["wandb_mode"] == mode
    assert_gone(psutil.Process().children(recursive=True))


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["no key", "dead server", "silent server", "hanging server", "failing server"])
def test_a_server_that_cannot_be_had_means_offline_and_is_said_once(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    train: Train,
    run_at: Callable[[int], Path],
    tmp_path: Path,
    trouble: str,
) -> None:
    monkeypatch.setattr(mirror, "INIT_SECONDS", 2.0)
    moods = {"silent server": {"GET": "hang"}, "hanging server": {"POST": "hang"}, "failing server": {"POST": "500"}}
    if trouble in moods:
        request.getfixturevalue("server").moods |= moods[trouble]
    if trouble == "silent server":
        monkeypatch.setattr(mirror, "PROBE_SECONDS", 0.5)
    if trouble == "dead server":
        monkeypatch.setenv("WANDB_API_KEY", KEY)
    ended = train("--wandb", "online", "--output-dir", tmp_path)
    assert_unhurt(ended, tmp_path, run_at(1), "offline")
    command = f"wandb sync {tmp_path}/wandb/offline-run-*-{state(tmp_path)['id']}*"
    if trouble in ("hanging server", "failing server"):
        assert f"W&B: the run is in {tmp_path}/wandb; the server did not take it (" in ended.out
        assert f"; send it with: {command}\n" in ended.out
    else:
        (line,) = [record.getMessage() for record in caplog.records]
        assert line.startswith("W&B is offline: ") and line.endswith(f"; send it later with: {command}")
    (attempt,) = [attempt for attempt in attempts(tmp_path) if attempt.history]
    assert attempt.path.name.startswith("offline-run-")
    assert_mirrored(attempt.history, tmp_path)
    assert attempt.summary["wandb_mode"] == "offline"
    assert_no_secret(KEY, tmp_path, ended)


@pytest.mark.slow
@pytest.mark.distributed
def test_of_several_ranks_one_has_a_mirror(flags: list[str], tmp_path: Path) -> None:
    words = [*flags, "--wandb", "offline", "--output-dir", str(tmp_path)]
    ranks = [variables | account(tmp_path) for variables in jobs.rank_variables(2)]
    with faults.Job([[*jobs.TRAIN, *words]] * 2, [jobs.environment(variables) for variables in ranks]) as job:
        jobs.succeeded(job.wait())
    (attempt,) = attempts(tmp_path)
    assert_mirrored(attempt.history, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("is killed", "its process ended with -9 (see {log})"),
        ("does not import", "ImportError: broken (see {log})"),
        ("takes no run", "wandb does not even work offline: Run ID cannot contain"),
    ],
)
def test_a_mirror_that_fails_is_not_missed(
    monkeypatch: pytest.MonkeyPatch,
    train: Train,
    run_at: Callable[[int], Path],
    tmp_path: Path,
    trouble: str,
    message: str,
) -> None:
    real, run_dir = Mirror.follow, tmp_path / "run"

    def follow_and_kill(self: Mirror, run_dir: Path) -> None:
        real(self, run_dir)
        family(self)[0].kill()

    if trouble == "is killed":
        monkeypatch.setattr(Mirror, "follow", follow_and_kill)
    elif trouble == "does not import":
        bad_wandb(monkeypatch, tmp_path / "bad")
    else:
        monkeypatch.setenv("WANDB_RUN_ID", "a:b")  # which wandb refuses
    ended = train("--wandb", "offline", "--output-dir", run_dir)
    assert_unhurt(ended, run_dir, run_at(1), "disabled")
    assert f"W&B: {message.format(log=run_dir / 'wandb' / mirror.LOG)}" in ended.out
    assert "; metrics.jsonl has everything.\n" in ended.out


@pytest.mark.parametrize("case", ["--wandb disabled", "WANDB_MODE=disabled", "finished already"])
def test_a_run_with_nothing_to_mirror_starts_no_process(
    monkeypatch: pytest.MonkeyPatch, train: Train, tmp_path: Path, case: str
) -> None:
    flag = {"--wandb disabled": "disabled", "WANDB_MODE=disabled": "auto"}.get(case, "offline")
    if case == "finished already":
        assert train("--wandb", "disabled", "--output-dir", tmp_path / "run").code == 0
    marker = bad_wandb(monkeypatch, tmp_path / "bad")
    monkeypatch.setenv("WANDB_MODE", "disabled" if flag == "auto" else "online")
    monkeypatch.setattr(Mirror, "_start", lambda self: pytest.fail("a process"))
    ended = train("--wandb", flag, "--output-dir", tmp_path / "run")
    assert ended.code == 0 and "W&B" not in ended.out + ended.err
    assert not marker.exists() and not list((tmp_path / "run").glob("wandb*"))
    assert jobs.read_json(tmp_path / "run" / "summary.json")["wandb_mode"] == "disabled"


@pytest.mark.slow
def test_a_short_run_is_mirrored_at_its_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """wandb's start takes CPU, which the first steps need; what it takes then is what the training leaves."""
    monkeypatch.setattr(mirror, "BEGIN_SECONDS", jobs.FOREVER)
    monkeypatch.setenv("WANDB_MODE", "")
    run_dir = hand_made(tmp_path)
    found = start(run_dir, "offline")
    record = run_dir / "wandb" / mirror.LOG
    faults.wait_for(lambda: "at the end of the run" in record.read_text(), "the mirror's waiting")
    (process,) = family(found)  # wandb's own is not there yet
    assert process.nice() == mirror.NICENESS
    assert os.getsid(process.pid) == os.getsid(0)  # niceness counts only within a session
    assert "send it with" in finished(found)
    assert steps(attempts(run_dir)) == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_a_training_that_fails_without_a_word_takes_its_mirror_along(tmp_path: Path) -> None:
    with contextlib.suppress(ZeroDivisionError), start(hand_made(tmp_path), "offline") as found:
        processes = family(found)
        1 / 0  # noqa: B018
    assert_gone(processes)
    (attempt,) = attempts(tmp_path)
    assert attempt.exit_code == 1


def bad_wandb(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """A wandb, found before the real one, that cannot be imported; returns what it leaves when that is tried."""
    (folder / "wandb").mkdir(parents=True)
    marker = folder / "imported"
    (folder / "wandb" / "__init__.py").write_text(f"open({str(marker)!r}, 'w')\nraise ImportError('broken')\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), ROOT]))
    monkeypatch.syspath_prepend(folder)
    return marker


@pytest.mark.parametrize("trouble", ["a file in the way", "a full disk", "no program"])
def test_a_run_directory_without_room_for_the_mirror_is_trained_in(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, train: Train, tmp_path: Path, trouble: str
) -> None:
    real = directory.write_json

    def write(path: Path, value: dict[str, Any]) -> None:
        if path.name == directory.WANDB_STATE:
            raise OSError(28, "No space left on device")
        real(path, value)

    if trouble == "a full disk":
        monkeypatch.setattr(directory, "write_json", write)
    elif trouble == "no program":
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    else:
        (tmp_path / "wandb").touch()
    assert train("--wandb", "offline", "--max-steps", 2, "--output-dir", tmp_path).code == 0
    assert "W&B: the mirror could not be started (" in caplog.text
    assert jobs.read_json(tmp_path / "summary.json")["wandb_mode"] == "disabled"


# --- With a server ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_online_run_sends_every_step_once_over_its_attempts(
    server: wandb_server.Server, train: Train, run_at: Callable[[int], Path], tmp_path: Path
) -> None:
    command = ["--wandb", "auto", "--output-dir", tmp_path]
    assert train(*command, "--max-steps", 20).code == 0
    run = state(tmp_path)["id"]
    assert [line["step"] for line in server.history(run)] == list(range(1, 21))
    assert server.run(run)["exit_code"] == 0
    ended = train(*command)
    assert_unhurt(ended, tmp_path, run_at(1), "online")
    assert list(server.runs) == [run]
    assert server.run(run)["sent"] == 52
    assert [line["step"] for line in server.history(run)] == list(range(1, 53))
    assert server.run(run)["summary"]["finished"] is True
    assert all(name in server.history(run)[-1] for name in ("train/loss", "test/accuracy"))
    assert f"W&B: {server.url}/{wandb_server.ENTITY}/ddp_mnist/runs/{run}\n" in ended.out
    assert_no_secret(KEY, tmp_path, ended)


@pytest.mark.slow
def test_a_rewound_run_sends_only_what_the_server_has_not(server: wandb_server.Server, tmp_path: Path) -> None:
    run_dir = hand_made(tmp_path, last=7)
    assert "/runs/" in finished(start(run_dir, "online"), preempted=True, exit_code=75)
    run = server.run(state(run_dir)["id"])
    assert (run["states"], run["exit_code"]) == (["preempting"], 75)
    (run_dir / "metrics.jsonl").unlink()  # back to a checkpoint at step 3, and on
    grow(run_dir, 1, 3)
    found = start(run_dir, "online")
    grow(run_dir, 4, 9)
    assert "/runs/" in finished(found)
    assert run["sent"] == 9 and run["exit_code"] == 0
    assert [line["step"] for line in server.history(found.id)] == list(range(1, 10))


@pytest.mark.slow
def test_what_a_killed_mirror_has_not_sent_is_sent_by_the_next(server: wandb_server.Server, tmp_path: Path) -> None:
    run_dir = hand_made(tmp_path)
    server.moods["PUT"] = server.moods["STREAM"] = "hang"
    found = start(run_dir, "online")
    wait_for_step(run_dir, "online", 5)  # wandb has taken them, the server has not
    processes = family(found)
    found.end(preempted=False, exit_code=0)
    told = found.wait(0.1)
    assert told.startswith("W&B: not everything was sent within 0 s") and "wandb sync --include-online" in told
    assert_gone(processes)
    assert not server.history(found.id)
    server.moods.clear()
    assert "/runs/" in finished(start(run_dir, "online"))
    assert [line["step"] for line in server.history(found.id)] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_offline_goes_on_where_the_server_was_left(server: wandb_server.Server, tmp_path: Path) -> None:
    run_dir = hand_made(tmp_path)
    finished(start(run_dir, "online"))
    grow(run_dir, 6, 8)
    finished(start(run_dir, "offline"))
    assert steps([attempt for attempt in attempts(run_dir) if "offline" in attempt.path.name]) == [6, 7, 8]
    grow(run_dir, 9, 10)
    finished(start(run_dir, "online"))
    run = server.run(state(run_dir)["id"])
    assert [json.loads(line)["step"] for line in run["lines"]["wandb-history.jsonl"]] == list(range(1, 11))


@pytest.mark.slow
def test_offline_attempts_are_synced_into_one_curve(server: wandb_server.Server, tmp_path: Path) -> None:
    run_dir = hand_made(tmp_path)
    finished(start(run_dir, "offline"))
    grow(run_dir, 6, 8)
    told = finished(start(run_dir, "offline"))
    first, second = sorted(run_dir.glob("wandb/offline-run-*"))
    second.rename(f"{first}-1")  # what wandb itself calls it where both began in one second
    command = told.partition("send it with: ")[2].replace("wandb sync", f"{sys.executable} -m wandb sync")
    account = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.url, "WANDB_ERROR_REPORTING": "false"}
    ended = jobs.run(["bash", "-c", command], account, cwd=tmp_path)  # where wandb leaves a folder
    assert ended.code == 0, ended.err
    (run,) = server.runs
    assert [line["step"] for line in server.history(run)] == list(range(1, 9))
    grow(run_dir, 9, 10)
    finished(start(run_dir, "online"))
    assert [line["step"] for line in server.history(run)] == list(range(1, 11))


@pytest.mark.slow
def test_no_secret_of_the_checkout_is_sent(
    monkeypatch: pytest.MonkeyPatch, server: wandb_server.Server, tmp_path: Path
) -> None:
    checkout, token = tmp_path / "checkout", "ghp_ThisIsNotAToken"
    checkout.mkdir()
    for words in (
        ["init", "-q"],
        ["remote", "add", "origin", f"https://user:{token}@example.com/repository"],
        ["-c", "user.name=n", "-c", "user.email=e", "commit", "-q", "--allow-empty", "-m", "first"],
    ):
        subprocess.run(["git", *words], cwd=checkout, check=True)
    monkeypatch.chdir(checkout)
    found = start(hand_made(tmp_path / "run"), "online")
    assert "/runs/" in finished(found)
    assert_no_secret(token, tmp_path / "run", jobs.Ended(0, "", ""))
    for secret in (token, "example.com", KEY):
        assert secret not in json.dumps(server.runs) and secret.encode() not in b"".join(server.contents)


# --- The mirror's process ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_signals_for_everybody_do_not_end_the_mirror(server: wandb_server.Server, tmp_path: Path) -> None:
    """Ctrl-C in a terminal does not reach it; a cluster's signal may, and ends wandb's own service."""
    run_dir = hand_made(tmp_path)
    found = start(run_dir, "online")
    wait_for_step(run_dir, "online", 5)
    first, *others = family(found)
    assert os.getpgid(first.pid) != os.getpgid(0)
    for process in others:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    assert_gone(others)
    for number in (signal.SIGINT, signal.SIGUSR2, signal.SIGTERM):
        first.send_signal(number)
    grow(run_dir, 6, 7)
    assert "/runs/" in finished(found, preempted=True, exit_code=75)
    run = server.run(found.id)
    assert (run["states"], run["exit_code"]) == (["preempting"], 75)
    assert [line["step"] for line in server.history(found.id)] == list(range(1, 8))


@pytest.mark.slow
def test_an_attempt_right_after_another_waits_for_its_mirror(tmp_path: Path) -> None:
    run_dir = hand_made(tmp_path)
    first = start(run_dir, "offline")
    wait_for_step(run_dir, "offline", 5)
    second = start(run_dir, "offline")
    record = run_dir / "wandb" / mirror.LOG
    faults.wait_for(lambda: "is held by another job; waiting" in record.read_text(), "the second mirror", seconds=60)
    grow(run_dir, 6, 8)
    wait_for_step(run_dir, "offline", 8)
    second.end(preempted=False, exit_code=0)
    finished(first, exit_code=1)
    assert "send it with" in second.wait()
    assert steps(attempts(run_dir)) == list(range(1, 9))
    assert [attempt.exit_code for attempt in attempts(run_dir)] == [1, 0]


@pytest.mark.slow
@pytest.mark.parametrize("begun", [True, False])
def test_a_mirror_of_a_run_that_was_started_over_leaves_the_new_one_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, begun: bool
) -> None:
    run_dir, record = hand_made(tmp_path), tmp_path / "wandb" / mirror.LOG
    with monkeypatch.context() as patch:
        patch.setattr(mirror, "BEGIN_SECONDS", 0.0 if begun else jobs.FOREVER)
        old = start(run_dir, "offline")
    faults.wait_for(lambda: "at the end of the run" in record.read_text(), "the old mirror")
    if begun:
        wait_for_step(run_dir, "offline", 5)
    directory.start_over(run_dir)
    new = start(hand_made(run_dir, last=9), "offline")
    old.end(preempted=False, exit_code=1)
    assert old.wait()
    assert new.id != old.id
    finished(new)
    (attempt,) = [attempt for attempt in attempts(run_dir) if attempt.history]
    assert (attempt.run["run_id"], steps([attempt])) == (new.id, list(range(1, 10)))


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["no data", "no config.json"])
def test_half_a_line_waits_for_its_rest_and_missing_pictures_are_left_out(tmp_path: Path, trouble: str) -> None:
    run_dir = hand_made(tmp_path)
    if trouble == "no config.json":
        (run_dir / "config.json").unlink()
    mistake = {"index": 0, "label": 3, "prediction": 5, "confidence": 0.9}
    line = json.dumps({"step": 6, "test/loss": 0.5, "test/mistakes": [mistake]}) + "\n"
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(line[:9])
        file.flush()
        found = start(run_dir, "offline")
        wait_for_step(run_dir, "offline", 5)
        file.write(line[9:])
    assert "send it with" in finished(found)
    assert "no pictures of mistakes: " in (run_dir / "wandb" / mirror.LOG).read_text()
    (attempt,) = attempts(run_dir)
    assert_mirrored(attempt.history, run_dir)
    assert not any("mistakes" in key for key in attempt.history[-1])
