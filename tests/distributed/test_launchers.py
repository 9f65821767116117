"""Launchers' variables, ranks that wait for others, and scripts with ranks of their own."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import faults
import jobs
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from ddp_mnist import fit
from ddp_mnist.config import parse
from ddp_mnist.distributed import machine
from ddp_mnist.errors import UsageError

Train = Callable[..., jobs.Ended]


def is_open(port: str) -> bool:
    with suppress(OSError):
        socket.create_connection(("127.0.0.1", int(port))).close()
        return True
    return False


@pytest.mark.slow
def test_a_signal_ends_a_rank_whose_peers_do_not_come(flags: list[str], tmp_path: Path) -> None:
    """Two jobs at the same time, of each the first of two ranks. SLURM starts those again that end with 75."""
    ranks = [jobs.rank_variables(2)[0] for _ in range(2)]
    command = [*jobs.TRAIN, *flags, "--output-dir", str(tmp_path / "run")]
    with faults.Job([command] * 2, [jobs.environment(each) for each in ranks]) as job:
        for each in ranks:
            faults.wait_for(lambda port=each["MASTER_PORT"]: is_open(port), "a rank that waits", job)
        job.signal(signal.SIGTERM, 0)
        while job.processes[1].poll() is None:  # Ctrl-C again and again: several that are pending count as one
            job.signal(signal.SIGINT, 1)
        ended = job.wait(30)
    assert [(each.code, each.out) for each in ended] == [(75, ""), (130, "")]
    assert ended[0].err.count("stopped by SIGTERM while rank 0 waited for the others\n") == 1
    assert "Traceback" not in ended[0].err + ended[1].err and "stopped" not in ended[1].err
    assert not (tmp_path / "run").exists()


@pytest.fixture
def own_ranks(request: pytest.FixtureRequest, process_of_a_job: None) -> Iterator[Callable[[], None]]:
    """Ranks that the script itself has brought together; yields a collective of theirs."""
    if request.param == "process group":
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        yield dist.barrier
        dist.destroy_process_group()
    else:
        accelerator = Accelerator(cpu=True)
        yield lambda: accelerator.reduce(torch.ones(1))
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("own_ranks", ["process group", "Accelerator"], indirect=True)
def test_ranks_of_the_scripts_own_are_refused_and_left_alone(
    own_ranks: Callable[[], None], flags: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="Take init_process_group and Accelerator"):
        fit(parse([*flags, "--output-dir", str(tmp_path / "run")]))
    own_ranks()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("backend", "count"), [("inductor", 1), ("NO", 0), ("", 0)])
def test_a_compiler_that_accelerate_was_asked_for_is_ignored_and_said_so(
    train: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    backend: str,
    count: int,
) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", backend)
    assert train("--max-steps", 1, "--output-dir", tmp_path).code == 0
    warnings = [each.getMessage() for each in caplog.records if "ACCELERATE_DYNAMO_BACKEND" in each.getMessage()]
    assert len(warnings) == count and all("inductor is ignored; --compile" in each for each in warnings)


@pytest.mark.parametrize(("rank", "count"), [("0", 1), ("1", 0)])
def test_an_interface_that_is_not_there_is_named_once_with_those_that_are(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str, count: int
) -> None:
    variables = jobs.rank_variables(2)[int(rank)] | {"GLOO_SOCKET_IFNAME": "lo,ib7"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    ended = train("--output-dir", tmp_path)
    assert ended.code == 2 and len(jobs.messages([ended])) == count
    assert ("GLOO_SOCKET_IFNAME=ib7" in ended.err and "there are: lo" in ended.err) == bool(count)


@pytest.mark.parametrize(
    ("quota", "expected"), [("max 100000", None), ("100000 100000", 1), ("50000 100000", 1), ("9900000 100000", None)]
)
def test_threads_keep_to_the_cpu_quota_of_a_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, expected: int | None
) -> None:
    (tmp_path / "cpu.max").write_text(quota + "\n")
    monkeypatch.setattr(machine, "CPU_QUOTA", tmp_path / "cpu.max")
    assert machine.default_threads() == (expected or len(os.sched_getaffinity(0)))


# The training command; rank 1 of the first start is killed in the middle of an epoch.
KILLED_ONCE = """
import os, signal, sys
from ddp_mnist.step import TrainStep
from ddp_mnist.train import run

def step(self, batch, rate):
    calls.append(rate)
    if len(calls) == 20 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return call(self, batch, rate)

calls, call = [], TrainStep.__call__
TrainStep.__call__ = step
run()
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_torchrun_changes_nothing_also_where_it_restarts_the_ranks(
    flags: list[str], run_at: Callable[[int], Path], tmp_path: Path
) -> None:
    (tmp_path / "train.py").write_text(KILLED_ONCE)
    line = f"torchrun --nproc-per-node 2 --max-restarts 1 --master-port {{port}} {tmp_path / 'train.py'}"
    with faults.launch(line, *flags, "--fresh", "--checkpoint-every", 10, "--output-dir", tmp_path / "run") as job:
        (ended,) = job.wait()
    assert ended.code == 0, ended.err
    assert ended.out.count("Checking accuracy on test data") == 1
    assert jobs.read_json(tmp_path / "run" / "summary.json")["resumed_from"] == 10
    faults.assert_same_result(tmp_path / "run", run_at(2))
