"""A test that leaves something behind fails, and is told what."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path

import jobs
import pytest

LEAKS = {
    "environment": ("os.environ['LEFT'] = '1'", "environment LEFT: was None, is '1'"),
    "signal": ("signal.signal(signal.SIGUSR2, signal.SIG_IGN)", "SIGUSR2: was <Handlers.SIG_DFL: 0>"),
    "process": ("held.append(subprocess.Popen(['sleep', '60']))", "is 'sleep 60'"),
    "file": ("held.append(Path(tempfile.mkstemp()[1]))", "temporary file tmp"),
    "directory": ("os.chdir('/')", "working directory: was"),
    "path": ("sys.path.append('/left')", "sys.path: was"),
    "thread": ("threading.Thread(target=leave.wait).start()", "thread Thread-"),
}
HEAD = """
import os, signal, subprocess, sys, tempfile, threading
from pathlib import Path
import leaks

held, leave = [], threading.Event()

def test_what_ends_by_itself_is_waited_for():
    leaks.PATIENCE = 100
    subprocess.Popen(["sleep", "0.2"])

def test_clean():
    leaks.PATIENCE = 0.1
    with tempfile.TemporaryDirectory():
        subprocess.run(["true"], check=True)

"""
TAIL = """
def test_that_ends_it_all():
    held[0].kill()
    held[0].wait()
    held[1].unlink()
    leave.set()

def test_orphan():
    command = f"sleep 60 & echo $! > {Path(__file__).with_name('orphan')}"
    subprocess.run(command, shell=True, start_new_session=True, check=True)
"""


@pytest.mark.slow
def test_a_test_that_leaks_fails_and_is_told_what_it_leaves(tmp_path: Path) -> None:
    tests = "".join(f"def test_{name}():\n    {code}\n\n" for name, (code, _) in LEAKS.items())
    (tmp_path / "conftest.py").write_text("from leaks import no_leaks, no_orphans, temporary_directory\n")
    (tmp_path / "test_leaking.py").write_text(HEAD + tests + TAIL)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", "test_leaking.py"]
    ended = jobs.run(command, {"PYTHONPATH": str(Path(jobs.__file__).parent)}, cwd=tmp_path)
    pid = int((tmp_path / "orphan").read_text())
    os.kill(pid, signal.SIGKILL)
    failed = re.findall(r"^ERROR test_leaking.py::test_(\w+) - Failed: (this \w+)", ended.out, re.MULTILINE)
    # An orphan is no child of the tests' process: the module has left it.
    assert failed == [*((name, "this test") for name in LEAKS), ("orphan", "this module")], ended.out + ended.err
    for message in (*(message for _, message in LEAKS.values()), f"process {pid}: was None, is 'sleep 60'"):
        assert message in ended.out
