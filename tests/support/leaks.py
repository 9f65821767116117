"""What a test must leave as it found it: conftest.py has these fixtures, test_leaks.py proves them."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGPIPE")
FOREIGN = ("torchelastic_", "torchinductor_", "debug-cli.", "pytest-of-")
"""How the names begin of what torchrun, torch.compile, wandb and pytest leave in the temporary directory."""
PATIENCE = 20.0  # seconds for what is ending already
MARK = "DDP_MNIST_TESTS"  # in the environment of all that these tests start
OF_OTHERS = ("PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR")
"""Variables that pytest sets, and torch when it is imported."""


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
    """Once a module's fixtures are gone, so are all processes that its tests have started, whoever is their parent, and
    their threads and files."""

    def state() -> dict[str, Any]:
        found = _state(temporary_directory) | {"processes": set(_marked())}
        return {what: found[what] for what in ENDING}

    before = state()
    yield
    _wait_until(lambda: not _differences(before, state()))
    found = _differences(before, state())
    if found:
        pytest.fail("this module leaves behind:\n" + "\n".join(f"  {line}" for line in found), pytrace=False)


@pytest.fixture(autouse=True)
def no_leaks(temporary_directory: Path, request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails the test that leaves something behind, and says what. It ends after all other fixtures of a test, which
    clean up: those of conftest.py ask for it first."""
    before = _state(temporary_directory)
    if "running" in request.fixturenames:  # test_slurm.py runs others at the same time: they start and end things
        before = {what: value for what, value in before.items() if what not in ENDING}
    yield
    found = _differences(before, _state(temporary_directory))
    if found:
        _wait_until(lambda: not _differences(before, _state(temporary_directory), ending=True))
        found = _differences(before, _state(temporary_directory))
    if found:
        pytest.fail("this test leaves behind:\n" + "\n".join(f"  {line}" for line in found), pytrace=False)


def _state(temporary: Path) -> dict[str, Any]:
    """Cheap: it is done twice for every test."""
    state: dict[str, Any] = {
        "environment": {name: value for name, value in os.environ.items() if name not in OF_OTHERS},
        "signal handlers": {name: signal.getsignal(getattr(signal, name)) for name in SIGNALS},
        "processes": _children(),
        "threads": {thread for thread in threading.enumerate() if not thread.daemon},
        "temporary files": {name for name in os.listdir(temporary) if not name.startswith(FOREIGN)},
        "umask": _umask(),
        "working directory": _working_directory(),
        "sys.path": list(sys.path),
        "sys.excepthook": sys.excepthook,
    }
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        state |= {
            "torch's threads": torch.get_num_threads(),
            "torch's default type": torch.get_default_dtype(),
            "torch's deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
            "torch's gradients": torch.is_grad_enabled(),
            "a process group": torch.distributed.is_available() and torch.distributed.is_initialized(),
        }
    return state


ENDING = ("processes", "threads", "temporary files")
"""What may go away by itself within moments."""


def _differences(before: dict[str, Any], after: dict[str, Any], *, ending: bool = False) -> list[str]:
    found = []
    for what in before.keys() & (set(ENDING) if ending else after.keys()):
        was, is_ = before[what], after[what]
        if was == is_:
            continue
        if isinstance(was, set):
            if new := is_ - was:
                found.append(f"{what}: {_described(new)}")
        elif isinstance(was, dict):
            changed = [name for name in {**was, **is_} if was.get(name) != is_.get(name)]
            found += [f"{what}: {name} was {was.get(name)!r}, is {is_.get(name)!r}" for name in changed]
        else:
            found.append(f"{what}: was {was!r}, is {is_!r}")
    return sorted(found)


def _described(left: Any) -> str:
    texts = []
    for one in left:
        if isinstance(one, int | psutil.Process):
            with suppress(psutil.Error):  # it has ended by now
                process = psutil.Process(one) if isinstance(one, int) else one
                texts.append(f"{process.pid} ({' '.join(process.cmdline())[:200]})")
        else:
            texts.append(str(getattr(one, "name", one)))
    return ", ".join(sorted(texts))


def _children() -> set[int]:
    """This process's children that run, without a look at all processes of the machine."""
    found: set[int] = set()
    for task in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):  # a thread that has just ended
            found |= {int(word) for word in task.read_text().split()}
    return {pid for pid in found if not _is_zombie(pid)}


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def _marked() -> list[psutil.Process]:
    """All other processes that run and were started by these tests."""
    found = []
    mark = f"{MARK}={os.environ[MARK]}".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, psutil.Error):
            if mark in (entry / "environ").read_bytes() and int(entry.name) != os.getpid():
                found.append(psutil.Process(int(entry.name)))
    return [process for process in found if not _is_zombie(process.pid)]


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _working_directory() -> str:
    try:
        return os.getcwd()
    except OSError:
        return "removed"


def _wait_until(condition: Any) -> None:
    end = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
