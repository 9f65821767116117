"""Runs a command; ends it and everything it has started, daemons included, when standard input closes.

A test that is killed closes it too, so nothing is ever left behind. SIGUSR1 ends everything at once, as a power cut
would, and this process with it.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36


def end_all(grace: float) -> None:
    """TERM, then KILL after `grace` seconds; repeated until no descendant is left."""
    began = time.monotonic()
    told: set[int] = set()
    while children := descendants(os.getpid()):
        late = time.monotonic() - began >= grace
        for child in children if late else children - told:
            told.add(child)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL if late else signal.SIGTERM)
        reap()
        time.sleep(0.02)


def descendants(ancestor: int) -> set[int]:
    """Processes below `ancestor`, also those that wait to be reaped."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.name))
    found: set[int] = set()
    front = [ancestor]
    while front:
        front = [child for parent in front for child in children.get(parent, ())]
        found.update(front)
    return found


def reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def alive(pid: int) -> bool:
    """Whether our child has not ended; `reap` may have taken its status already."""
    return pid in descendants(os.getpid())


def power_cut(*_: object) -> None:
    """Everything ends in one moment: what is killed last must not live to report how the first one ended."""
    stopped: set[int] = set()
    while running := descendants(os.getpid()) - stopped:
        for child in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGSTOP)
        stopped |= running
    end_all(grace=0)
    os._exit(1)


def main() -> None:
    # Daemons detach from their parent; this makes them our children, not init's.
    if ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        sys.exit("prctl failed")
    signal.signal(signal.SIGUSR1, power_cut)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the test's terminal: the test closes our input
    daemon = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)
    while not select.select([sys.stdin], [], [], 0.5)[0] and alive(daemon.pid):
        reap()
    end_all(grace=10)


if __name__ == "__main__":
    main()
