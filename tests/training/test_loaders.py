"""Jobs whose items are made by processes of their own: killed, stopped, slow, broken; as real processes."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import faults
import jobs
import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

# Augmented points; MISHAP is what happens in a row. 13 batches an epoch, in the last of which one rank has no item.
SCRIPT = """
import multiprocessing, os, random, time
import numpy as np
import torch
from torch import nn
from ddp_mnist import run

class Points(torch.utils.data.Dataset):
    def __init__(self, length):
        self.length = length
    def __len__(self):
        return self.length
    def __getitem__(self, row):
        is_worker = torch.utils.data.get_worker_info() is not None
        MISHAP
        noise = torch.rand(4) + random.random() + np.random.rand()
        return (torch.arange(4.0) * row / 145 + noise).float(), row % 3

if __name__ == "__main__":
    START
    network = lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 3))
    run(model=network, data=lambda: (Points(145), Points(41)))
"""
FLAGS = ("--batch-size", "12", "--epochs", "3", "--threads", "1", "--no-pictures", "--log-every", "1", "--lr", "0.01")


START = 'multiprocessing.set_start_method("{}")'


def program(folder: Path, mishap: str = "pass", start: str = "pass") -> tuple[str, str]:
    path = folder / "points.py"
    path.write_text(SCRIPT.replace("MISHAP", mishap).replace("START", start))
    return sys.executable, str(path)


def start(script: tuple[str, str], ranks: int, run_dir: Path, *more: Any) -> faults.Job:
    return faults.start(ranks, *FLAGS, "--output-dir", run_dir, *more, program=script)


def finish(script: tuple[str, str], ranks: int, run_dir: Path, *more: Any) -> Path:
    """Run the job to its end, of which no process outlives the ranks."""
    with start(script, ranks, run_dir, *more) as job:
        jobs.succeeded(job.wait())
    return run_dir


def workers(job: faults.Job) -> list[psutil.Process]:
    return [process for process in job.left() if process.pid not in job.pids]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Return the directories of whole runs, by number of ranks; loaded by other numbers of workers than elsewhere."""
    folder = tmp_path_factory.mktemp("expected")
    script = program(folder)
    return {ranks: finish(script, ranks, folder / str(ranks), "--workers", count) for ranks, count in ((1, 0), (2, 1))}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_killed_in_mid_epoch_ends_with_the_same_bytes_and_no_loader_is_left(
    tmp_path: Path, expected: dict[int, Path], ranks: int
) -> None:
    run_dir, more = tmp_path / "run", ("--workers", 2, "--checkpoint-every", 7)
    with start(program(tmp_path, "time.sleep(0.02)"), ranks, run_dir, *more) as job:
        faults.wait_for(lambda: faults.checkpoint_steps(run_dir) or not job.running(), "a checkpoint", job)
        assert len(workers(job)) >= 2 * ranks
        job.signal(signal.SIGKILL)  # the ranks alone
        faults.wait_for(lambda: not job.left(), "the end of the loaders", job)
    assert not (run_dir / "summary.json").exists(), "the run is too short for this test"
    method = {1: "spawn", 2: "fork"}[ranks]
    finish(program(tmp_path, start=START.format(method)), ranks, run_dir, *more)
    assert jobs.read_json(run_dir / "summary.json")["resumed_from"] % 13
    faults.assert_same_result(run_dir, expected[ranks])


def test_a_rank_that_is_killed_takes_all_loaders_with_it(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with start(program(tmp_path, "time.sleep(0.02)"), 2, run_dir, "--workers", 2, "--checkpoint-every", 5) as job:
        faults.wait_until_step(job, run_dir, 7)
        job.signal(signal.SIGKILL, 1)
        survivor, killed = job.wait()
    assert (survivor.code, killed.code) == (1, -signal.SIGKILL)
    assert "lost contact with another rank" in survivor.err and "Continue from step 5" in survivor.err


@pytest.mark.parametrize("reason", ["SIGTERM", "max_minutes"])
def test_a_loader_slower_than_the_step_loses_neither_signal_nor_time_limit(tmp_path: Path, reason: str) -> None:
    """Every process of the job gets the signal, as from scancel."""
    run_dir, minutes = tmp_path / "run", 0.05 if reason == "max_minutes" else 0
    with start(
        program(tmp_path, "time.sleep(0.1)"), 1, run_dir, "--workers", 1, "--batch-size", 4, "--max-minutes", minutes
    ) as job:
        if not minutes:
            faults.wait_until_step(job, run_dir, 1)
            for process in job.left():
                process.send_signal(signal.SIGTERM)
        (ended,) = job.wait()
    assert ended.code == 75, ended.err
    assert f"stopped by {reason} after step " in ended.out
    summary = jobs.read_json(run_dir / "summary.json")
    assert faults.checkpoint_steps(run_dir) == [summary["steps"]] and summary["steps"] < 37


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_signal_while_workers_start_stops_the_job(tmp_path: Path, method: str) -> None:
    with start(program(tmp_path, start=START.format(method)), 1, tmp_path / "run", "--workers", 2) as job:
        faults.wait_for(lambda: workers(job) or not job.running(), "a worker", job)
        for process in job.left():
            process.send_signal(signal.SIGTERM)
        (ended,) = job.wait()
    assert ended.code == 75 and "stopped by SIGTERM after step " in ended.out, ended.err
    assert not jobs.messages([ended])


@pytest.mark.parametrize(
    ("mishap", "code", "words"),
    [
        ('if row == 7: raise KeyError("no such file")', 1, ["item 7 could not be made", "KeyError: 'no such file'"]),
        (
            "if row == 7 and is_worker: os._exit(1)",
            1,
            ["the training set could not be loaded: a worker has died", "--workers"],
        ),
        ("if row == 7: return torch.zeros(4), 5", 2, ["there is a label 5; the network tells 3 classes apart"]),
        ("if row == 39 and self.length == 41: [][1]", 1, ["the test set: item 39", "IndexError"]),
    ],
    ids=["raises", "dies", "a wrong label", "raises in a score"],
)
def test_what_goes_wrong_on_one_ranks_loader_is_one_message_and_all_leave(
    tmp_path: Path, mishap: str, code: int, words: list[str]
) -> None:
    path, script = tmp_path / "points.py", program(tmp_path, mishap)
    path.write_text(
        path.read_text().replace("nn.Dropout(0.2)", "nn.BatchNorm1d(8)").replace("Points(145)", "Points(150)")
    )
    with start(script, 2, tmp_path / "run", "--workers", 1) as job:
        ended = job.wait()
    assert [process.code for process in ended] == [code, code], [process.err for process in ended]
    (message,) = [process.err for process in ended if process.err]
    assert message.count("error: ") == 1 and message.count("Traceback") <= 1
    assert all(word in message for word in words), message
    assert jobs.read_json(tmp_path / "run" / "summary.json")["exit_code"] == code


def test_a_first_item_that_cannot_be_made_is_one_message_too(tmp_path: Path) -> None:
    """The ranks have not met yet."""
    with start(program(tmp_path, "if row == 0: [][1]"), 2, tmp_path / "run", "--workers", 1) as job:
        ended = job.wait()
    (message,) = [process.err for process in ended if process.err]
    assert [process.code for process in ended] == [1, 1] and message.count("error: ") == 1
    assert "the training set: item 0 could not be made" in message and "IndexError" in message


def test_an_item_that_fails_on_one_rank_alone_is_reported_by_that_rank(tmp_path: Path) -> None:
    """The others wait for it."""
    mishap = 'if row == 0 and os.environ["RANK"] == "1": [][1]'
    with start(program(tmp_path, mishap), 2, tmp_path / "run", "--workers", 1, "--timeout-minutes", "0.2") as job:
        ended = job.wait()
    assert "the training set: item 0 could not be made" in ended[1].err and [each.code for each in ended] == [1, 1]


CAUGHT = """
from pathlib import Path
import torch
from torch import nn
from ddp_mnist import TrainConfig, fit
from ddp_mnist.errors import JobError

class Items(torch.utils.data.Dataset):
    def __len__(self):
        return 40
    def __getitem__(self, row):
        assert not WHEN
        return torch.zeros(4), row % 3

config = TrainConfig(output_dir="run", workers=1, threads=1, batch_size=20, wandb="disabled")
try:
    fit(config, model=lambda: nn.Linear(4, 3), data=(Items(), Items()))
except JobError:
    print("caught")
"""


@pytest.mark.slow
@pytest.mark.parametrize("when", ["True", 'Path("run").exists()'])
def test_a_script_that_catches_the_error_ends_with_no_worker_left(tmp_path: Path, when: str) -> None:
    """In `Workload`, and when the ranks have met."""
    (tmp_path / "mine.py").write_text(CAUGHT.replace("WHEN", when))
    ended = jobs.run([sys.executable, "mine.py"], cwd=tmp_path)
    assert (ended.code, ended.out.split()[-1]) == (0, "caught"), ended.err


RESNET = """
from torch import nn
from torchvision.datasets import FakeData
from torchvision.models import resnet18
from torchvision.transforms import Compose, RandomCrop, RandomHorizontalFlip, ToTensor
from ddp_mnist import run

transform = Compose([RandomCrop(32, padding=4), RandomHorizontalFlip(), ToTensor()])
train, test = (FakeData(size, (3, 32, 32), num_classes=10, transform=transform) for size in (164, 17))
run(model=lambda: resnet18(num_classes=10), data=lambda: (train, test))
"""


def test_a_resnet_on_augmented_pictures_is_stopped_and_continued_to_equal_bytes(tmp_path: Path) -> None:
    """42 steps, two of them with half a batch; with rank 0's averages of batch norm."""
    (tmp_path / "resnet.py").write_text(RESNET)
    script = sys.executable, str(tmp_path / "resnet.py")
    flags = ("--workers", 2, "--batch-size", 8, "--epochs", 2, "--no-pictures")
    whole = finish(script, 2, tmp_path / "whole", *flags)
    with start(script, 2, tmp_path / "run", *flags) as job:
        faults.wait_until_step(job, tmp_path / "run", 5)
        job.signal(signal.SIGTERM, 1)
        assert [process.code for process in job.wait()] == [75, 0]
    stopped = jobs.read_json(tmp_path / "run" / "summary.json")["steps"]
    assert jobs.read_json(finish(script, 2, tmp_path / "run", *flags) / "summary.json")["resumed_from"] == stopped < 42
    faults.assert_same_result(tmp_path / "run", whole)
