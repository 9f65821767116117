"""A real SLURM with four nodes on one machine: loopback, free ports, a temporary directory.

`Cluster()` starts munged, slurmctld and four slurmd, and stops exactly what it has started (see reaper.py). It needs
no system service, no /run/munge and no entry in /etc/hosts, and disturbs neither.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs import free_port, is_launch_variable

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
REAPER = Path(__file__).with_name("reaper.py")
PROGRAMS = {b"ddp_mnist.train", b"mine.py", b"submitit.core._submit"}
NOT_ENDED = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")
PATIENCE = 120.0
"""Seconds: a bound against hangs, never a measure. Idle machines need 5, crowded ones many more."""
# With this Python in front and the places where Debian keeps daemons.
PATH = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin"

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
# A requeued job waits until its old credentials have expired, by default two minutes. Not for less than it takes a
# busy machine to start a step; and StartTime=now in place of waiting gets jobs killed, their credential revoked.
AuthInfo=socket={dir}/munge.socket,cred_expire=20
SlurmctldPort={ports[0]}
StateSaveLocation={dir}/state
SlurmctldPidFile={dir}/slurmctld.pid
SlurmctldLogFile={dir}/slurmctld.log
SlurmdSpoolDir={dir}/spool-%n
SlurmdPidFile={dir}/slurmd-%n.pid
SlurmdLogFile={dir}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# A node may claim more CPUs than this machine has, so that several jobs fit.
SlurmdParameters=config_overrides
# What a cluster may have set and the scripts must not depend on: jobs are not requeued, logs are cut at a restart.
JobRequeue=0
JobFileAppend=0
# A slow machine is no dead node.
SlurmdTimeout=600
BatchStartTimeout=60
MessageTimeout=60
ReturnToService=2
# Look at the queue every second; keep ended jobs for the tests to ask about.
SchedulerParameters=sched_interval=1,batch_sched_delay=1
MinJobAge=7200
# Another one in each cluster: ranks meet at a port that follows from the job's number.
FirstJobId={ports[0]}
GresTypes=gpu
NodeName=DEFAULT CPUs=16 RealMemory=16000 Gres=gpu:4
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]}
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[3]}
NodeName=n3 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[4]}
PartitionName=debug Nodes=n[0-1] Default=YES MaxTime=INFINITE DefaultTime=30 State=UP
# Here a test may kill a node while others run.
PartitionName=mortal Nodes=n[2-3] MaxTime=INFINITE DefaultTime=30 State=UP
"""
# Devices that every machine has, in place of GPUs: SLURM deals them out, torch sees none and trains on the CPU.
GRES = "NodeName=n[0-3] Name=gpu File=/dev/null,/dev/zero,/dev/full,/dev/random\n"


def missing() -> str:
    """Return why SLURM cannot be started here; empty if it can."""
    if absent := [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]:
        return f"{', '.join(absent)} not installed (Debian: apt-get install slurm-wlm munge)"
    return "" if os.getuid() == 0 else "slurmd has to be started by root"


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Return when `condition()` is true."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE:.0f} s for {what}"
        time.sleep(0.2)


class Cluster:
    """Start the daemons in a `with` block."""

    def __init__(self) -> None:
        # Not below pytest's own folder, which only its owner may enter: munge would refuse its socket there.
        self.dir = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.dir.chmod(0o755)
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        host = socket.gethostname().split(".")[0]
        conf = CONF.format(dir=self.dir, ports=[free_port() for _ in range(5)], host=host, user=getpass.getuser())
        (self.dir / "slurm.conf").write_text(conf)
        (self.dir / "gres.conf").write_text(GRES)
        (self.dir / "state").mkdir()
        (self.dir / "munge.key").touch(mode=0o600)
        (self.dir / "munge.key").write_bytes(secrets.token_bytes(128))
        # Without a job that these tests run in, and what would make another checkout's package importable.
        others = ("SBATCH_", "SUBMITIT_", "DDP_MNIST_", "PYTHONPATH")
        kept = {name: value for name, value in os.environ.items() if not is_launch_variable(name)}
        self.env = {name: value for name, value in kept.items() if not name.startswith(others)}
        self.env |= {"SLURM_CONF": str(self.dir / "slurm.conf"), "PATH": PATH, "VIRTUAL_ENV": sys.prefix}
        self.env |= {"WANDB_MODE": "disabled"}

    def __enter__(self) -> Cluster:
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={self.dir}/munge.{name}" for option, name in files.items()]
        try:
            self._start("munged", "--foreground", "--force", *options)
            wait_for(lambda: (self.dir / "munge.socket").exists(), "munged's socket")
            self._start("slurmctld", "-D", "-i")
            for node in ("n0", "n1", "n2", "n3"):
                self.start_node(node)
            wait_for(lambda: self._idle() == 4, "four idle nodes")
        except BaseException as error:
            error.add_note(self.logs())
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if "slurmctld" in self.daemons:
            with contextlib.suppress(subprocess.TimeoutExpired):
                cancel = ["scancel", "--signal=KILL", "--full", f"--user={getpass.getuser()}"]
                subprocess.run(cancel, env=self.env, capture_output=True, timeout=30)
        while self.daemons:  # the last one started first
            _, daemon = self.daemons.popitem()
            assert daemon.stdin
            daemon.stdin.close()
            daemon.wait()
        shutil.rmtree(self.dir, ignore_errors=True)

    def start_node(self, name: str) -> None:
        self._start("slurmd", "-D", "-N", name, name=name)

    def kill_node(self, name: str) -> None:
        """Kill slurmd and everything under it, at once."""
        daemon = self.daemons.pop(name)
        daemon.send_signal(signal.SIGUSR1)
        daemon.wait()

    def run(self, *command: str, **options: Any) -> str:
        """Return the output of a client command."""
        options = {"env": self.env, "text": True, "timeout": PATIENCE} | options
        ended = subprocess.run(command, capture_output=True, **options)
        assert ended.returncode == 0, f"{command}\n{ended.stdout}\n{ended.stderr}"
        return ended.stdout

    def logs(self) -> str:
        """Return the last lines that each daemon has logged."""
        texts = {path.name: path.read_text(errors="replace") for path in sorted(self.dir.glob("*.log"))}
        return "\n".join(f"== {name}\n{text[-4000:]}" for name, text in texts.items())

    def _start(self, *command: str, name: str | None = None) -> None:
        name = name or command[0]
        with (self.dir / f"{name}.out.log").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                [sys.executable, str(REAPER), *command],
                stdin=subprocess.PIPE, stdout=log, stderr=log, env=self.env, cwd=self.dir, start_new_session=True,
            )  # fmt: skip

    def _idle(self) -> int:
        assert all(daemon.poll() is None for daemon in self.daemons.values()), "a daemon has ended"
        answer = subprocess.run(["sinfo", "-h", "-N", "-o", "%T"], env=self.env, capture_output=True, text=True)
        return answer.stdout.split().count("idle")


class Job:
    """A job, or a task of an array (`id` is then 12_3)."""

    def __init__(self, cluster: Cluster, id: str, cwd: Path) -> None:
        self.cluster, self.id, self.cwd = cluster, id, cwd
        self.run_dir = cwd / "runs" / f"slurm-{id}"
        self.log_path = cwd / f"slurm-{id}.out"

    def show(self) -> dict[str, str]:
        """Return what `scontrol show job` says, field by field."""
        text = self.cluster.run("scontrol", "--oneliner", "show", "job", self.id)
        return dict(re.findall(r"(\S+?)=(\S*)", text.splitlines()[0]))

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def until(self, condition: Callable[[dict[str, str]], Any], what: str) -> dict[str, str]:
        """Wait while the job goes on, and return what SLURM says of it when the condition holds."""
        deadline = time.monotonic() + 300
        while not condition(found := self.show()):
            problem = f"job {self.id} is {found['JobState']}, not {what}:\n{self.log}\n{self.cluster.logs()}"
            assert found["JobState"] in NOT_ENDED and time.monotonic() < deadline, problem
            time.sleep(1.0)  # each question takes CPU from the ranks
        return found

    def wait(self, state: str) -> dict[str, str]:
        return self.until(lambda found: found["JobState"] == state, state)

    def wait_restarted(self) -> None:
        self.until(lambda found: int(found["Restarts"]) >= 1, "restarted")

    def train_until_saved(self) -> None:
        self._wait_for_files(lambda: any(self.run_dir.glob("checkpoints/step-*")))

    def _wait_for_files(self, condition: Callable[[], bool]) -> None:
        """Wait for the run's files without a question to SLURM: it may be answered when the training is over."""
        deadline = time.monotonic() + 300
        while not condition():
            ended = (self.run_dir / "summary.json").exists() or time.monotonic() > deadline
            assert not ended, f"job {self.id} does not train:\n{self.log}\n{self.cluster.logs()}"
            time.sleep(0.05)

    def ranks(self) -> list[int]:
        """Return the process ids of the ranks that are running on this machine, by rank."""
        number, _, task = self.id.partition("_")
        ids = {"SLURM_ARRAY_JOB_ID": number, "SLURM_ARRAY_TASK_ID": task} if task else {"SLURM_JOB_ID": number}
        return find_ranks("SLURM_PROCID", SLURM_CONF=self.cluster.env["SLURM_CONF"], **ids)

    def freeze(self) -> list[int]:
        """Stop all ranks in the middle of training, so that what comes next does not race with its end."""
        metrics = self.run_dir / "metrics.jsonl"
        self._wait_for_files(lambda: metrics.exists() and metrics.stat().st_size > 0)
        pids = self.ranks()
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        assert pids and not (self.run_dir / "summary.json").exists(), "the run is too short for this test"
        return pids

    def interrupt(self, arrives: signal.Signals, *command: str) -> None:
        """Run a command while the ranks are frozen, and thaw them when its signal has reached them all."""
        frozen = self.freeze()
        self.cluster.run(*command)
        thaw(frozen, after=arrives)

    def requeue(self, arrives: signal.Signals, *command: str) -> None:
        """Interrupt the job by a command that makes it requeue itself, and wait until it is completed."""
        self.interrupt(arrives, *command)
        self.wait_restarted()
        self.cluster.run("scontrol", "update", f"JobId={self.id}", "TimeLimit=60")
        self.wait("COMPLETED")


def thaw(pids: list[int], *, after: signal.Signals | None = None) -> None:
    """Let frozen ranks go on, once the signal has reached them all; some SLURM signals do that by themselves."""
    for pid in pids if after else ():
        wait_for(lambda pid=pid: _reached(pid, after), after.name)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _reached(pid: int, number: int) -> bool:
    """Return True if the signal waits for the frozen process, or the process is frozen no more."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
    masks = re.findall(r"^(?:Sig|Shd)Pnd:\s*(\w+)", status, re.MULTILINE)
    return "\nState:\tT" not in status or any(int(mask, 16) >> (number - 1) & 1 for mask in masks)


def find_ranks(rank: str, **variables: str) -> list[int]:
    """Return the process ids of the ranks on this machine that have these variables, sorted by the variable `rank`."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if not PROGRAMS & set(words) or words[0].endswith(b"srun"):
                continue
            pairs = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
            env = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
            if rank in env and variables.items() <= env.items():
                found[int(env[rank])] = int(entry.name)
    return [found[number] for number in sorted(found)]
