"""Each kind of leak fails the test that has it, and no other."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path

import jobs
import pytest

CONFTEST = "from leaks import no_leaks, no_orphans, temporary_directory\n"
LEAKS = {
    "environment": "os.environ['LEFT'] = '1'",
    "environment_gone": "del os.environ['GIVEN']",
    "signal": "signal.signal(signal.SIGUSR2, signal.SIG_IGN)",
    "process": "held.append(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']))",
    "file": "held.append(tempfile.mkstemp()[1])",
    "folder": "held.append(tempfile.mkdtemp())",
    "directory": "os.chdir('/')",
    "umask": "os.umask(0o077)",
    "path": "sys.path.append('/left')",
    "excepthook": "sys.excepthook = print",
    "thread": "held.append(threading.Thread(target=leave.wait)); held[-1].start()",
    "threads": "torch.set_num_threads(torch.get_num_threads() + 1)",
    "type": "torch.set_default_dtype(torch.float64)",
    "deterministic": "torch.use_deterministic_algorithms(True)",
    "gradients": "torch.set_grad_enabled(False)",
    "group": "group()",
}
HEAD = """
import os, signal, subprocess, sys, tempfile, threading
import torch, torch.distributed as dist
import leaks

leaks.PATIENCE = 0.3
held, leave = [], threading.Event()

def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

def test_ending():
    # What is on its way out is waited for.
    leaks.PATIENCE = 100
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.2)"])

def test_clean():
    leaks.PATIENCE = 0.3
    with tempfile.TemporaryDirectory():
        subprocess.run([sys.executable, "-c", ""], check=True)

"""
TAIL = """
def test_put_away():
    for one in held:
        if isinstance(one, subprocess.Popen):
            one.kill()
            one.wait()
        if isinstance(one, str):
            (os.rmdir if os.path.isdir(one) else os.remove)(one)
    leave.set()
"""
QUICK = """
import subprocess, sys, tempfile
import leaks

leaks.PATIENCE = 0.3

"""
ORPHAN = f"""{QUICK}
def test_its_parent_is_gone():
    code = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])." \\
        "pid, flush=True)"
    with open("orphan", "w") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, start_new_session=True, check=True)
"""
# As in tests/launch/test_slurm.py, where `running` has others start and end things while a test is judged.
SIDE_BY_SIDE = f"""{QUICK}
import os, pytest

@pytest.fixture(scope="module")
def running():
    pass

def test_processes(running):
    with open("left", "w") as out:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        out.write(str(child.pid))

def test_files(running):
    tempfile.mkstemp(prefix="left-")

def test_environment(running):
    os.environ["LEFT"] = "1"

def test_nothing(running):
    pass
"""


def pytest_on(folder: Path, content: str) -> jobs.Ended:
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_leaking.py").write_text(content)
    (folder / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", "test_leaking.py"]
    variables = {"PYTHONPATH": str(Path(jobs.__file__).parent), "GIVEN": "1", "OMP_NUM_THREADS": "1"}
    return jobs.run(command, variables, cwd=folder)


@pytest.mark.slow
def test_a_test_that_leaks_fails_and_is_told_what_it_leaves(tmp_path: Path) -> None:
    tests = "".join(f"def test_{name}():\n    {code}\n\n" for name, code in LEAKS.items())
    ended = pytest_on(tmp_path, HEAD + tests + TAIL)
    failed = re.findall(r"^ERROR test_leaking.py::test_(\w+)", ended.out, re.MULTILINE)
    assert failed == list(LEAKS), ended.out + ended.err
    for words in (
        "environment: LEFT was None, is '1'",
        "environment: GIVEN was '1', is None",
        "signal handlers: SIGUSR2 was <Handlers.SIG_DFL: 0>",
        "time.sleep(60)",
        "temporary files: tmp",
        "working directory: was",
        "umask: was",
        "sys.path: was",
        "sys.excepthook: was",
        "threads: Thread-",
        "torch's threads: was 1, is 2",
        "torch's default type: was torch.float32",
        "torch's deterministic algorithms: was False",
        "torch's gradients: was True",
        "a process group: was False",
    ):
        assert words in ended.out, words


def test_a_process_whose_parent_is_gone_fails_its_module(tmp_path: Path) -> None:
    ended = pytest_on(tmp_path, ORPHAN)
    pid = int((tmp_path / "orphan").read_text())
    os.kill(pid, signal.SIGKILL)
    assert "ERROR test_leaking.py::test_its_parent_is_gone - Failed: this module" in ended.out
    assert f"this module leaves behind:\n  processes: {pid} (" in ended.out
    assert ended.code == 1


@pytest.mark.slow
def test_what_tests_side_by_side_have_started_is_judged_at_their_modules_end(tmp_path: Path) -> None:
    ended = pytest_on(tmp_path, SIDE_BY_SIDE)
    pid = int((tmp_path / "left").read_text())
    os.kill(pid, signal.SIGKILL)
    failed = re.findall(r"^ERROR test_leaking.py::(\w+) - Failed: (\w+ \w+)", ended.out, re.MULTILINE)
    assert failed == [("test_environment", "this test"), ("test_nothing", "this module")], ended.out
    assert "this test leaves behind:\n  environment: LEFT was None, is '1'\n" in ended.out
    assert re.search(rf"this module leaves behind:\n  processes: {pid} \(.*\n  temporary files: left-\w+\n", ended.out)


@pytest.mark.slow
def test_nothing_is_left_of_the_tests_own_temporary_directory(tmp_path: Path) -> None:
    ended = pytest_on(tmp_path, f"{QUICK}def test_it():\n    open('where', 'w').write(tempfile.mkdtemp())\n")
    assert ended.code == 1
    folder = Path((tmp_path / "where").read_text()).parent
    assert folder.name.startswith("ddp-mnist-") and not folder.exists()
