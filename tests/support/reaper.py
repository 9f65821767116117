"""Run a command; end it and everything it has started, daemons included, when standard input closes.

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
    """Send TERM, and KILL after `grace` seconds, until no descendant is left."""
    began = time.monotonic()
    signalled: set[int] = set()
    while children := descendants():
        late = time.monotonic() - began >= grace
        send(signal.SIGKILL if late else signal.SIGTERM, children if late else children - signalled)
        signalled |= children
        reap()
        time.sleep(0.02)


def send(number: int, processes: set[int]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def descendants() -> set[int]:
    """Return the processes below this one, also those that wait to be reaped."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.name))
    found: set[int] = set()
    front = [os.getpid()]
    while front:
        front = [child for parent in front for child in children.get(parent, ())]
        found.update(front)
    return found


def reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def power_cut(*_: object) -> None:
    """End everything in one moment: what is killed last must not live to report how the first one ended."""
    stopped: set[int] = set()
    while running := descendants() - stopped:
        send(signal.SIGSTOP, running)
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
    while not select.select([sys.stdin], [], [], 0.5)[0] and daemon.pid in descendants():
        reap()
    end_all(grace=10)


if __name__ == "__main__":
    main()
