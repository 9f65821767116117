"""What a launch would do, said before it is made. The command runs in this process, and in others where ranks meet."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jobs
import pytest
import torch

from ddp_mnist.data import mnist
from ddp_mnist.doctor import __main__ as doctor
from ddp_mnist.doctor import checks
from ddp_mnist.run import directory

DOCTOR = (sys.executable, "-m", "ddp_mnist.doctor")
SECRET = "0123456789abcdef" * 2 + "01234567"
Run = Callable[..., jobs.Ended]


@pytest.fixture
def healthy(tiny: Path) -> list[str]:
    """Flags of a job that would start: its data are staged."""
    return ["--dataset", "fashion-mnist", "--data-dir", str(tiny)]


@pytest.fixture
def run(
    process_of_a_job: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> Run:
    """The command in this process: one rank on the CPU, no network, no credentials, an empty working directory."""
    (tmp_path / "bin").mkdir()
    monkeypatch.chdir(tmp_path)
    offline = {"PATH": str(tmp_path / "bin"), "NETRC": str(tmp_path / "no-netrc"), "no_proxy": "", "NO_PROXY": ""}
    for name, value in {**jobs.OFFLINE, **offline, "TORCH_CPP_LOG_LEVEL": "FATAL"}.items():
        monkeypatch.setenv(name, value)
    for name in ("CUDA_VISIBLE_DEVICES", "DDP_MNIST_DATA"):  # where the suite finds MNIST is not where these do
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("urllib.request._opener", None)  # it would keep the proxies of its first use
    # torchvision, which knows the mirrors, takes seconds to import.
    monkeypatch.setattr(mnist, "published", lambda dataset: (["http://127.0.0.1:9/"], {}))

    def command(*arguments: Any, **environment: str) -> jobs.Ended:
        capfd.readouterr()
        with patch.dict(os.environ, environment):
            code = doctor.main([*map(str, arguments)])
        return jobs.Ended(code, *capfd.readouterr())

    return command


def lines_of(ended: jobs.Ended, *starts: str) -> list[str]:
    """The lines of that status, or of that status and topic."""
    lines = [re.sub(r"  +", " ", line) for line in ended.out.splitlines()]
    return [line for line in lines if line.startswith(starts)]


def test_one_rank_that_would_start_and_the_same_as_json(run: Run, healthy: list[str], tmp_path: Path) -> None:
    ended, data = run(*healthy), run(*healthy, "--json")
    assert (ended.code, ended.err, data.code) == (0, "", 0)
    lines, found = ended.out.splitlines(), json.loads(data.out)
    topics = ["launch", "batch", "device", "precision", "data", "output", "wandb", "slurm", "ranks"]
    assert [re.split("[ :]+", line)[:2] for line in lines[:-1]] == [["ok", topic] for topic in topics]
    assert lines[-1] == "The job would start."
    assert found["exit_code"] == 0 and str(checks.Finding(**found["findings"][0])) == lines[0]
    assert [each["topic"] for each in found["findings"]] == topics
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]  # no trace


def test_a_mistake_is_one_message_of_one_rank(run: Run) -> None:
    assert "--epochs is 0" in jobs.the_message([run("--epochs=0")], 2)
    assert "--timeout is 1; expected seconds from 3 to 86400" in jobs.the_message([run("--timeout=1")], 2)
    assert "LOCAL_RANK=-1" in jobs.the_message([run(LOCAL_RANK="-1")], 2)
    assert run("--timeout=1", RANK="1", LOCAL_RANK="1", WORLD_SIZE="2") == jobs.Ended(2, "", "")


@pytest.mark.parametrize("broken", ["ddp_mnist.config", "ddp_mnist.doctor.checks"])
def test_what_cannot_be_imported_is_one_message(run: Run, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    monkeypatch.setitem(sys.modules, broken, None)
    message = jobs.the_message([run()], 1)
    assert f"{sys.executable} cannot import the job: " in message and broken in message and "pip check" in message


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_meet_time_an_all_reduce_and_make_one_report(healthy: list[str], tmp_path: Path) -> None:
    """Two ranks, each the first one on its machine; the data are on one of the disks only."""
    ranks = [each | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"} for each in jobs.rank_variables(2)]
    shared = [*DOCTOR, *healthy, "--batch-size", "63"]
    commands = [shared, [*shared, "--data-dir", str(tmp_path / "empty")]]
    first, second = jobs.run_together(commands, [jobs.environment(each) for each in ranks], cwd=tmp_path)
    assert (first.code, second) == (1, jobs.Ended(0, "", ""))
    batch, data = lines_of(first, "problem")
    assert "--batch-size 63 does not divide by 2 ranks" in batch
    assert f"rank 1 on {socket.gethostname()}: fashion-mnist is not staged" in data
    assert f"2 ranks met over gloo: 2 on {socket.gethostname()}" in first.out
    found = re.search(r"all-reduce of the 36 kB of gradients (\S+) ms", first.out)
    assert found and float(found[1]) > 0


@pytest.mark.slow
@pytest.mark.distributed
def test_no_rank_waits_for_ever_for_a_missing_one(healthy: list[str], tmp_path: Path) -> None:
    """Two at the same time: rank 0 of one job and rank 1 of another."""
    alone = [jobs.environment(jobs.rank_variables(2)[rank]) for rank in (0, 1)]
    main, other = jobs.run_together([[*DOCTOR, *healthy, "--timeout", "3"]] * 2, alone, cwd=tmp_path)
    assert (main.code, other.code, other.out) == (1, 1, "")
    (problem,), (error,) = lines_of(main, "problem"), other.err.splitlines()
    assert problem.startswith("problem ranks: the 2 ranks could not be brought together")
    assert error.startswith("error: the 2 ranks could not be brought together")


@pytest.mark.slow
@pytest.mark.distributed
def test_a_rank_that_dies_after_they_have_met(healthy: list[str], tmp_path: Path) -> None:
    dies = "import os; from ddp_mnist.doctor.checks import Context, TrainConfig; Context(TrainConfig()); os._exit(3)"
    environments = [jobs.environment(each) for each in jobs.rank_variables(2)]
    commands = [[*DOCTOR, *healthy, "--timeout", "20"], [sys.executable, "-c", dies]]
    ended, _ = jobs.run_together(commands, environments, cwd=tmp_path)
    assert ended.code == 1 and "Traceback" not in ended.err
    (problem,) = lines_of(ended, "problem")
    # In which of the two the death is noticed is a matter of microseconds.
    assert "lost contact with another rank" in problem or "could not be brought together" in problem
    assert "--timeout-minutes" not in problem


def test_what_keeps_ranks_of_another_machine_from_meeting_is_reported_there(run: Run, healthy: list[str]) -> None:
    arguments, job = [*healthy, "--mixed-precision", "fp16"], {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    message = jobs.the_message([run(*arguments, RANK="2", LOCAL_RANK="0", **job)], 1)
    assert "fp16 needs a GPU and there is none" in message
    assert run(*arguments, RANK="3", LOCAL_RANK="1", **job) == jobs.Ended(0, "", "")


def test_processes_that_know_nothing_of_each_other_make_one_report(run: Run, healthy: list[str]) -> None:
    assert len(lines_of(run(*healthy, SLURM_STEP_NUM_TASKS="2", SLURM_PROCID="0"), "problem launch")) == 1
    assert run(*healthy, SLURM_STEP_NUM_TASKS="2", SLURM_PROCID="1") == jobs.Ended(0, "", "")


def test_the_world_size_must_divide_the_batch(run: Run, healthy: list[str]) -> None:
    batch, ranks = lines_of(run(*healthy, WORLD_SIZE="3"), "problem")
    assert "--batch-size 64 does not divide by 3 ranks" in batch and "63 or 66" in batch
    assert "the 3 ranks could not be brought together" in ranks  # nobody has set RANK
    assert lines_of(run(*healthy, WORLD_SIZE="2"), "ok batch") == [
        "ok batch: 64 images a step, 32 of them on each rank"
    ]


@pytest.mark.slow
def test_accelerate_launch_that_silently_starts_one_process(healthy: list[str], tmp_path: Path) -> None:
    launcher = [sys.executable, str(Path(sys.executable).with_name("accelerate")), "launch"]
    words = "--cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no -m ddp_mnist.doctor"
    ended = jobs.run([*launcher, *words.split(), *healthy], cwd=tmp_path)
    assert ended.code == 0, ended.err
    (warning,) = lines_of(ended, "warning")
    text = "was asked for 2 processes and has started 1 -> accelerate launch --config_file launch/cpu.yaml"
    assert text in warning


TWO = {"WORLD_SIZE": "2"}
JOB = {"SLURM_JOB_ID": "12", "SLURM_JOB_NUM_NODES": "2"}
STEP = JOB | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "WORLD_SIZE": "4"}


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({}, "ok launch: 1 rank: no launcher has set WORLD_SIZE"),
        ({}, "ok slurm: none here"),
        (TWO | {"TORCHELASTIC_RUN_ID": "none"}, "ok launch: 2 ranks: torchrun has set WORLD_SIZE=2"),
        (TWO | {"ACCELERATE_MIXED_PRECISION": "no"}, "ok launch: 2 ranks: accelerate launch has set WORLD_SIZE=2"),
        (TWO, "ok launch: 2 ranks: a launcher unknown here, or the shell, has set WORLD_SIZE=2"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "problem launch: one of 4 processes of srun, but WORLD_SIZE is not set"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "problem launch: one of 2 processes of mpirun, but WORLD_SIZE is not set"),
        (JOB, "ok slurm: job 12 on 2 nodes, outside any srun step"),
        (JOB | {"SLURM_NTASKS": "4"}, "warning slurm: the allocation has SLURM_NTASKS=4, but what is typed here is"),
        (STEP, "ok launch: 4 ranks: slurm/rank.sh has set WORLD_SIZE=4"),
        (STEP | {"SLURM_NTASKS": "4"}, "ok slurm: job 12 on 2 nodes, step 0 of 4 tasks"),
        (STEP | {"SLURM_GPUS_PER_TASK": "1"}, "warning slurm: --gpus-per-task shows each rank one GPU only"),
        (STEP | {"SLURM_CPUS_PER_TASK": "999"}, "warning slurm: 999 CPUs per task were asked for and"),
    ],
)
def test_launchers_and_the_traps_of_slurm(run: Run, environment: dict[str, str], line: str) -> None:
    with patch.dict(os.environ, environment):
        found = [*checks.launch(), *checks.slurm()]
    assert [each for each in found if f"{each.status} {each.topic}: {each.text}".startswith(line)]
    assert [each.advice != "" for each in found if each.status != "ok"] == [True] * (not line.startswith("ok"))


@pytest.mark.parametrize(
    ("gpus", "case", "environment", "line"),
    [
        (0, "", {}, "ok device: CPU: no NVIDIA driver here"),
        (0, "driver", {"CUDA_VISIBLE_DEVICES": ""}, "ok device: CPU: CUDA_VISIBLE_DEVICES= hides the GPUs"),
        (0, "driver", {}, "warning device: CPU: there is an NVIDIA driver, but torch"),
        (0, "apple", {}, "ok device: an Apple GPU"),
        (0, "apple", {"LOCAL_WORLD_SIZE": "2"}, "ok device: CPU"),
        (2, "", {"LOCAL_WORLD_SIZE": "2"}, "ok device: 2 GPUs: NVIDIA H100"),
        (1, "", {"LOCAL_WORLD_SIZE": "2"}, "warning device: 2 ranks on this machine share 1 GPU: NVIDIA H100, over"),
        (4, "no kernel", {"LOCAL_RANK": "5"}, "problem device: 4 GPUs: NVIDIA H100 cannot compute with torch"),
        (1, "bf16", {}, "ok precision: bf16 in training"),
        (1, "old bf16", {}, "warning precision: bf16, but no GPU here has arithmetic for it"),
        (0, "bf16", {}, "warning precision: bf16, but no GPU here has arithmetic for it"),
        (0, "fp16", {}, "problem precision: fp16 needs a GPU"),
    ],
)
def test_device_and_precision(run: Run, gpus: int, case: str, environment: dict[str, str], line: str) -> None:
    if case == "driver":
        Path("bin", "nvidia-smi").touch(0o755)
    cuda = {"is_available": lambda: gpus > 0, "device_count": lambda: gpus, "get_device_name": lambda _: "NVIDIA H100"}
    able = patch.multiple(torch.cuda, **cuda, is_bf16_supported=lambda **_: not case.startswith("old"))
    ones = {"side_effect": RuntimeError(case)} if case == "no kernel" else {"return_value": torch.zeros(8)}
    apple = patch.object(torch.backends.mps, "is_available", lambda: case == "apple")
    with able, apple, patch.object(torch, "ones", **ones), patch.dict(os.environ, environment):
        found = [checks.device(), checks.precision(case.split()[-1] if "f" in case else "no")]
    (told,) = (each for each in found if f" {each.topic}: " in line)
    assert f"{told.status} {told.topic}: {told.text}".startswith(line) and (told.advice != "") == (told.status != "ok")


@pytest.fixture
def server(run: Run, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server that answers, though with an error; no proxy in front."""
    for name in jobs.OFFLINE:
        monkeypatch.delenv(name, raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as listening:
        threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


@pytest.mark.parametrize(
    ("name", "status", "text"),
    [
        ("mnist", "problem", "-> python -m ddp_mnist.data fetch --dataset mnist --data-dir data (needs internet)"),
        ("auto", "warning", ": the job would train on generated digits, which are not MNIST -> python -m ddp_mnist"),
        ("synthetic", "ok", "synthetic: the job draws the digits into data/Synthetic"),
    ],
)
def test_data_that_are_not_staged(run: Run, tmp_path: Path, name: str, status: str, text: str) -> None:
    ended = run("--dataset", name, "--data-dir", "data")
    (line,) = lines_of(ended, f"{status} data")
    assert text in line and ("train-images-idx3-ubyte is missing" in line) == (status != "ok")
    assert lines_of(ended, "warning", "problem") == [line] * (status != "ok")
    assert (ended.code, "would not start" in ended.out) == ((1, True) if status == "problem" else (0, False))
    assert not (tmp_path / "data").exists()


def test_data_that_are_packed_damaged_or_on_a_mirror(server: str, tmp_path: Path) -> None:
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name in (*mnist.NAMES["train"], *mnist.NAMES["test"]):
        (folder / f"{name}.gz").touch()
    before = sorted(folder.iterdir())
    found = checks.dataset("mnist", tmp_path)
    assert found.status == "ok" and "the .gz files are in" in found.text
    assert sorted(folder.iterdir()) == before  # still packed
    before[-2].unlink()
    (folder / "train-images-idx3-ubyte").write_bytes(b"\0" * 100)
    found = checks.dataset("mnist", tmp_path)
    assert found.status == "problem" and "train-images-idx3-ubyte is damaged (magic number 0" in found.text
    with patch.object(mnist, "published", lambda dataset: ([server], {})):
        found = checks.dataset("mnist", tmp_path)
    assert found.status == "warning" and found.text.endswith("the job would download it at its start")


def test_a_run_directory_that_cannot_be_used(run: Run, healthy: list[str], tmp_path: Path) -> None:
    holder = directory.lock(tmp_path)
    (problem,) = lines_of(run(*healthy, "--output-dir", tmp_path), "problem")
    assert problem.startswith(f"problem output: {tmp_path} is held by another job that is still running -> wait for it")
    assert holder
    holder.release()
    assert run(*healthy, "--output-dir", tmp_path).code == 0
    (tmp_path / "runs").touch()
    for flags in [], ["--output-dir", "runs/below"]:
        (problem,) = lines_of(run(*healthy, *flags), "problem")
        assert "cannot be written: Not a directory -> --output-dir DIR" in problem


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_no_part_of_a_key_or_a_password_is_shown(run: Run, form: list[str]) -> None:
    flags = ["--dataset", "synthetic", *form]
    reached = {"WANDB_MODE": "", "https_proxy": f"http://user:{SECRET}@127.0.0.1:9"}
    first = run(*flags, WANDB_API_KEY=SECRET, **reached)
    Path("no-netrc").write_text(f"machine api.wandb.ai login user password {SECRET}")
    for ended in first, run(*flags, **reached):
        assert ended.code == 0 and "api.wandb.ai cannot be reached" in ended.out
        assert not any(SECRET[at : at + 4] in ended.out + ended.err for at in range(len(SECRET) - 3))


def test_wandb_with_and_without_server_and_key(run: Run, server: str) -> None:
    def line(mode: str, key: str, url: str = server) -> str:
        ended = run("--dataset", "synthetic", WANDB_MODE=mode, WANDB_API_KEY=key, WANDB_BASE_URL=url)
        return lines_of(ended, "ok wandb", "warning wandb")[0]

    assert line("", "").startswith("ok wandb: offline: no key for 127.0.0.1")
    assert line("", SECRET) == "ok wandb: online"
    assert line("disabled", SECRET) == "ok wandb: disabled"
    refused = line("", SECRET, url=f"http://127.0.0.1:{jobs.free_port()}")
    assert re.match("warning wandb: offline: 127.0.0.1:.* -> --wandb offline, if that is meant", refused)
    assert line("online", "").startswith("warning wandb: offline: no key for 127.0.0.1")
