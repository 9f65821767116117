"""Fail a test that leaves processes, files, variables or settings behind. conftest.py has these fixtures."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGPIPE")
# How the names begin of what torchrun, torch.compile, wandb and pytest leave in the temporary directory.
FOREIGN = ("torchelastic_", "torchinductor_", "debug-cli.", "pytest-of-")
# Variables that pytest sets, and torch when it is imported.
OF_OTHERS = ("PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR")
ENDING = ("process", "thread", "temporary file")  # may go away by themselves within moments
PATIENCE = 20.0  # seconds for what is ending already
MARK = "DDP_MNIST_TESTS"  # in the environment of all that these tests start
State = dict[str, Any]


@pytest.fixture(scope="session", autouse=True)
def temporary_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The system's, for these tests alone: what is left there is theirs. pytest's own files stay where they were."""
    tmp_path_factory.getbasetemp()
    folder = Path(tempfile.mkdtemp(prefix="ddp-mnist-"))
    folder.chmod(0o1777)  # as /tmp: SLURM's daemons are other users
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        patch.setenv(MARK, uuid.uuid4().hex)
        patch.setattr(tempfile, "tempdir", None)
        yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def no_orphans(temporary_directory: Path) -> Iterator[None]:
    """A module leaves no processes, whoever is their parent, no threads and no files."""
    yield from _compare("module", lambda: _ending(temporary_directory, _marked()))


@pytest.fixture(autouse=True)
def no_leaks(temporary_directory: Path, request: pytest.FixtureRequest) -> Iterator[None]:
    """A test leaves nothing behind. The fixtures of conftest.py that clean up ask for this one first."""
    # test_slurm.py runs its tests side by side: what others start and end is judged at the module's end.
    alone = "running" not in request.fixturenames

    def state() -> State:
        return _settings() | (_ending(temporary_directory, _children()) if alone else {})

    yield from _compare("test", state)


def _compare(whose: str, state: Callable[[], State]) -> Iterator[None]:
    before = state()
    yield
    end = time.monotonic() + PATIENCE
    while (left := _differences(before, state())) and time.monotonic() < end:
        if not any(line.startswith(ENDING) for line in left):
            break
        time.sleep(0.02)
    if left:
        pytest.fail(f"this {whose} leaves behind:\n  " + "\n  ".join(left), pytrace=False)


def _differences(before: State, after: State) -> list[str]:
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    # What ended meanwhile, or was imported first by this test, is no leak.
    ended = {name for name in before if name.startswith(ENDING)}
    imported = {name for name in after if name.startswith("torch") and name not in before}
    return [f"{name}: was {before.get(name)!r}, is {after.get(name)!r}" for name in sorted(changed - ended - imported)]


def _settings() -> State:
    """Return what a test may change in this process."""
    state: State = {f"environment {name}": value for name, value in os.environ.items() if name not in OF_OTHERS}
    state |= {name: signal.getsignal(getattr(signal, name)) for name in SIGNALS}
    os.umask(umask := os.umask(0o022))
    state |= {"umask": umask, "sys.path": list(sys.path), "sys.excepthook": sys.excepthook}
    with suppress(FileNotFoundError):  # it was removed
        state["working directory"] = Path.cwd()
    if torch := sys.modules.get("torch"):
        state |= {
            "torch's threads": torch.get_num_threads(),
            "torch's default type": torch.get_default_dtype(),
            "torch's deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
            "torch's gradients": torch.is_grad_enabled(),
            "torch's process group": torch.distributed.is_available() and torch.distributed.is_initialized(),
        }
    return state


def _ending(folder: Path, pids: set[int]) -> State:
    """Return what may end by itself: threads, files and these processes."""
    state: State = {f"thread {each.name}": "running" for each in threading.enumerate() if not each.daemon}
    state |= {f"temporary file {each.name}": "there" for each in folder.iterdir() if not each.name.startswith(FOREIGN)}
    for pid in pids:
        with suppress(psutil.Error):  # it has just ended
            process = psutil.Process(pid)
            if process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                state[f"process {pid}"] = " ".join(process.cmdline())[:200]
    return state


def _children() -> set[int]:
    """Return this process's children, without a look at all processes of the machine."""
    pids: set[int] = set()
    for task in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):  # a thread that has just ended
            pids |= {int(word) for word in task.read_text().split()}
    return pids


def _marked() -> set[int]:
    """Return all other processes that these tests have started."""
    mark, pids = f"{MARK}={os.environ[MARK]}".encode(), set()
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark in (entry / "environ").read_bytes():
                pids.add(int(entry.name))
    return pids - {os.getpid()}
