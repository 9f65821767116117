"""Two machines that are two: network namespaces with names, addresses and /etc/hosts of their own, and a cable."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import documents
import faults
import jobs
import psutil
import pytest
from faults import Job

IP = shutil.which("ip", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
NAMESPACES = ("--net", "--uts", "--mount")
# Its own name is a loopback address, as Debian and Ubuntu write it.
BOOT = 'hostname "$0" && mount --bind "$1" /etc/hosts && echo booted && exec cat'
HOSTS = "127.0.0.1 localhost\n::1 localhost\n127.0.1.1 {name}\n"
TORCHRUN = "torchrun --nnodes 2 --nproc-per-node 1 --node-rank 0 --master-addr fd00::1 --master-port 29400"
INTERFACES = """
import json, os, sys
from ddp_mnist.distributed.machine import choose_interface

before = dict(os.environ)
for variables in json.loads(sys.argv[1]):
    os.environ.clear()
    os.environ.update(before | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"} | variables)
    choose_interface()
    print(os.environ.get("GLOO_SOCKET_IFNAME"), os.environ.get("NCCL_SOCKET_IFNAME"))
"""
HANDSHAKE = """
import sys, time
from pathlib import Path
from ddp_mnist.config import TrainConfig
from ddp_mnist.distributed.context import Context
from ddp_mnist.distributed.launcher import hard_exit

last_words = Path(sys.argv[1])
with Context(TrainConfig()) as context:
    context.wait_for_peers_to_exit(timeout=600)
    if context.rank == 1:
        time.sleep(0.5)  # a rank 0 that did not wait would be gone
        last_words.touch()
    hard_exit(0 if last_words.exists() else 1)
"""

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


class Machine:
    """Namespaces that are gone with the last process in them; the first one ends when this test does, however."""

    def __init__(self, number: int, folder: Path) -> None:
        hosts = folder / f"hosts-{number}"
        hosts.write_text(HOSTS.format(name=f"machine{number}"))
        boot = ["unshare", *NAMESPACES, "sh", "-c", BOOT, f"machine{number}", str(hosts)]
        self.addresses = (f"10.0.0.{number}/24", f"fd00::{number}/64")
        self.init = subprocess.Popen(boot, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.init.stdout and self.init.stdout.readline() == b"booted\n"

    def inside(self, *command: str) -> list[str]:
        return ["nsenter", f"--target={self.init.pid}", *NAMESPACES, *command]

    def ip(self, *words: str) -> None:
        subprocess.run(self.inside(str(IP), *words), check=True)

    def plug_in(self) -> None:
        self.ip("link", "set", "eth0", "up")
        self.ip("address", "replace", self.addresses[0], "dev", "eth0")
        self.ip("address", "replace", self.addresses[1], "dev", "eth0", "nodad")  # it is no other machine's

    def unplug(self) -> None:
        self.ip("link", "set", "eth0", "down")

    def kill(self, job: Job) -> None:
        """Send kill -9 to all processes of the job on this machine."""
        here = Path(f"/proc/{self.init.pid}/ns/net").readlink()
        for process in job.left():
            with suppress(OSError, psutil.Error):  # it has just ended
                if Path(f"/proc/{process.pid}/ns/net").readlink() == here:
                    process.kill()

    def close(self) -> None:
        self.init.communicate(timeout=30)


def missing() -> str:
    """Return why there can be no machines here; empty if there can."""
    if IP is None:
        return "ip is not installed (Debian: apt-get install iproute2)"
    if not Path("/proc/net/if_inet6").exists():
        return "the kernel has no IPv6"
    tried = subprocess.run(["unshare", *NAMESPACES, "true"], capture_output=True, text=True)
    return f"needs root and the right to make network namespaces: {tried.stderr.strip()}" if tried.returncode else ""


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Machine]]:
    if reason := missing():
        if "network" in os.environ.get("DDP_MNIST_REQUIRE", ""):
            pytest.fail(f"DDP_MNIST_REQUIRE demands a network: {reason}")
        pytest.skip(reason)
    with ExitStack() as stack:
        both = []
        for number in (1, 2):
            both.append(Machine(number, tmp_path_factory.mktemp("machine")))
            stack.callback(both[-1].close)
        ends = [["eth0", "netns", str(machine.init.pid)] for machine in both]
        subprocess.run([str(IP), "link", "add", *ends[0], "type", "veth", "peer", *ends[1]], check=True)
        for machine in both:
            machine.ip("link", "set", "lo", "up")
            machine.plug_in()
        yield both


@pytest.fixture(scope="module")
def long(flags: list[str]) -> list[str]:
    """312 steps: enough that the job is still training when a test that has seen one of the first acts."""
    return [*flags, "--epochs", "12", "--checkpoint-every", "20"]


def start(machines: list[Machine], line: str, *arguments: str) -> Job:
    """Type a launcher's line on the first machine, and on the second one with its own rank."""
    commands = []
    for rank, machine in enumerate(machines):
        launcher, *words = line.replace("rank 0", f"rank {rank}").split()
        program = str(Path(sys.executable).with_name(launcher))
        commands.append(machine.inside(program, *words, "-m", "ddp_mnist.train", *arguments))
    return Job(commands, [jobs.environment()] * 2)


@pytest.fixture(scope="module")
def undisturbed(machines: list[Machine], long: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of README's lines, with one process on each machine."""
    run_dir = tmp_path_factory.mktemp("undisturbed")
    (line,) = [each for each in documents.commands(documents.README) if "--num_machines 2" in each]
    launch = line.partition(" -m ")[0].replace("--num_processes 8", "--num_processes 2")
    with start(machines, launch, *long, "--output-dir", str(run_dir)) as job:
        jobs.succeeded(job.wait())
    return run_dir


def test_readmes_lines_train_on_two_machines(undisturbed: Path) -> None:
    summary = jobs.read_json(undisturbed / "summary.json")
    assert (summary["finished"], summary["world_size"], summary["steps"]) == (True, 2, 312)


def assert_contact_was_lost(ended: jobs.Ended, rank: int, run_dir: Path) -> None:
    assert ended.code == 1
    assert ended.err.count("error: ") == 1
    assert f"error: rank {rank} on machine{rank + 1} lost contact with another rank" in ended.err
    assert f"Continue from step {faults.checkpoint_steps(run_dir)[-1]} with" in ended.err
    assert str(run_dir) in faults.printed_command(ended.err)


def test_a_run_that_loses_its_network_and_then_a_machine_ends_as_an_undisturbed_one(
    machines: list[Machine], long: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    arguments = [*long, "--output-dir", str(tmp_path)]
    with start(machines, TORCHRUN, *arguments, "--timeout-minutes", "0.1") as job:
        faults.wait_until_step(job, tmp_path, 45)
        machines[1].unplug()
        ended = job.wait()
        machines[1].plug_in()
    for rank in (0, 1):
        assert_contact_was_lost(ended[rank], rank, tmp_path)
    with start(machines, TORCHRUN, *arguments) as job:
        faults.wait_for(lambda: "resumed at step" in job.output(), "the resume", job)
        faults.wait_until_step(job, tmp_path, faults.last_step(tmp_path) + 25)
        machines[1].kill(job)
        ended = job.wait()
    assert_contact_was_lost(ended[0], 0, tmp_path)
    with start(machines, TORCHRUN, *arguments) as job:
        jobs.succeeded(job.wait())
    faults.assert_same_result(tmp_path, undisturbed)


def test_the_first_machine_leaves_last_and_soon_also_with_addresses_of_ipv6(
    machines: list[Machine], tmp_path: Path
) -> None:
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "fd00::1", "MASTER_PORT": "29400"}
    command = (sys.executable, "-c", HANDSHAKE, str(tmp_path / "last words"))
    environments = [jobs.environment(common | {"RANK": str(rank), "LOCAL_RANK": "0"}) for rank in (0, 1)]
    jobs.succeeded(jobs.run_together([machine.inside(*command) for machine in machines], environments))


def test_the_interface_is_the_one_that_leads_to_the_first_machine(machines: list[Machine]) -> None:
    machines[0].ip("route", "replace", "default", "dev", "eth0")
    first = [
        ({"MASTER_ADDR": "10.0.0.1"}, "eth0 =eth0"),  # its own address
        ({"MASTER_ADDR": "machine1"}, "eth0 =eth0"),  # 127.0.1.1, but there is a default route
        ({"MASTER_ADDR": "127.0.0.1"}, "None None"),  # started by hand, on one machine
        ({"MASTER_ADDR": "10.0.0.1", "LOCAL_WORLD_SIZE": "2"}, "None None"),
        ({"MASTER_ADDR": "10.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": ""}, "lo =eth0"),
    ]
    second = [
        ({"MASTER_ADDR": "10.0.0.1"}, "eth0 =eth0"),
        ({"MASTER_ADDR": "fd00::1"}, "eth0 =eth0"),
        ({"MASTER_ADDR": "machine2"}, "None None"),  # and there is no default route
        ({"MASTER_ADDR": "203.0.113.1"}, "None None"),
        ({"MASTER_ADDR": "no.such.name.invalid"}, "None None"),
    ]
    for machine, cases in zip(machines, (first, second), strict=True):
        variables, expected = zip(*cases, strict=True)
        command = machine.inside(sys.executable, "-c", INTERFACES, json.dumps(variables))
        ended = jobs.run(command)
        assert (ended.code, ended.out.splitlines()) == (0, list(expected)), ended.err
