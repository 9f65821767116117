"""A launch is judged before it is made. The command runs in this process, and in others where ranks meet."""

from __future__ import annotations

import gzip
import hashlib
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
from conftest import write_digits

from ddp_mnist.data import mnist
from ddp_mnist.doctor import __main__ as doctor
from ddp_mnist.doctor import checks
from ddp_mnist.storage import directory

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
    topics = ["launch", "device", "precision", "data", "output", "wandb", "slurm", "ranks"]
    assert [re.split("[ :]+", line)[:2] for line in lines[:-1]] == [["ok", topic] for topic in topics]
    assert lines[-1] == "The job would start."
    assert found["exit_code"] == 0 and str(checks.Finding(**found["findings"][0])) == lines[0]
    assert [each["topic"] for each in found["findings"]] == topics
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]  # no trace


@pytest.mark.parametrize(
    ("flags", "variables", "message"),
    [
        ("--epochs=0", {}, "--epochs is 0"),
        ("--timeout=1", {}, "--timeout-minutes is 0.01"),
        ("", {"WORLD_SIZE": "3"}, "--batch-size 64 does not divide by 3 ranks"),
        ("", {"LOCAL_WORLD_SIZE": "none"}, "LOCAL_WORLD_SIZE=none"),
    ],
)
def test_a_mistake_is_one_message_of_one_rank(run: Run, flags: str, variables: dict[str, str], message: str) -> None:
    assert message in jobs.the_message([run(*flags.split(), **variables)], 2)
    assert run(*flags.split(), **{"WORLD_SIZE": "2"} | variables, RANK="1", LOCAL_RANK="1") == jobs.Ended(2, "", "")


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_meet_time_an_all_reduce_and_make_one_report(healthy: list[str], tmp_path: Path) -> None:
    """Two ranks, each the first one on its machine; the data are on one of the disks only."""
    ranks = [each | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"} for each in jobs.rank_variables(2)]
    shared = [*DOCTOR, *healthy]
    commands = [shared, [*shared, "--data-dir", str(tmp_path / "empty")]]
    first, second = jobs.run_together(commands, [jobs.environment(each) for each in ranks], cwd=tmp_path)
    assert (first.code, second) == (1, jobs.Ended(0, "", ""))
    (data,) = lines_of(first, "problem")
    assert lines_of(first, "ok launch") == [
        "ok launch: world size 2, as WORLD_SIZE says: 32 of a step's 64 images on each rank"
    ]
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


def test_what_keeps_ranks_of_another_machine_from_meeting_is_reported_there(run: Run, healthy: list[str]) -> None:
    arguments, job = [*healthy, "--mixed-precision", "fp16"], {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    message = jobs.the_message([run(*arguments, RANK="2", LOCAL_RANK="0", **job)], 1)
    assert "fp16 needs a GPU and there is none" in message
    assert run(*arguments, RANK="3", LOCAL_RANK="1", **job) == jobs.Ended(1, "", "")


def test_processes_that_know_nothing_of_each_other_make_one_report(run: Run, healthy: list[str]) -> None:
    step = {"SLURM_JOB_ID": "12", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4"}
    ended = run(*healthy, SLURM_PROCID="0", **step)
    (problem,) = lines_of(ended, "problem")
    assert ended.code == 1 and "there are 4 tasks, but WORLD_SIZE is not set: each process would" in problem
    assert run(*healthy, SLURM_PROCID="1", **step) == jobs.Ended(0, "", "")


def test_a_machine_whose_name_does_not_resolve(run: Run, healthy: list[str]) -> None:
    with patch.object(socket, "gethostname", lambda: "nowhere.invalid"):
        ended = run(*healthy)
    (warning,) = lines_of(ended, "warning")
    assert ended.code == 0
    assert "the name of this machine, nowhere.invalid, does not resolve: torchrun would hang" in warning
    assert "-> torchrun --local-addr 127.0.0.1" in warning


def test_a_gpu_that_cannot_compute_with_this_torch(run: Run, healthy: list[str]) -> None:
    with patch.object(torch, "zeros", side_effect=RuntimeError("CUDA error: no kernel image is available")):
        ended = run(*healthy)
    assert ended.code == 1 and lines_of(ended, "problem") == ["problem ranks: CUDA error: no kernel image is available"]


@pytest.mark.slow
def test_accelerate_launch_that_silently_starts_one_process(healthy: list[str], tmp_path: Path) -> None:
    launcher = [sys.executable, str(Path(sys.executable).with_name("accelerate")), "launch"]
    words = "--cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no -m ddp_mnist.doctor"
    ended = jobs.run([*launcher, *words.split(), *healthy], cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert "world size 1, as no launcher has set WORLD_SIZE" in lines_of(ended, "ok launch")[0]


JOB = {"SLURM_JOB_ID": "12", "SLURM_JOB_NUM_NODES": "2"}
STEP = JOB | {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "WORLD_SIZE": "4"}


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({}, "ok slurm: not in a job"),
        (JOB, "ok slurm: job 12, nodes: 2, tasks: 1, outside any srun step"),
        (JOB | {"SLURM_NTASKS": "4"}, "warning slurm: there are 4 tasks, but WORLD_SIZE is not set"),
        (STEP, "ok slurm: job 12, nodes: 2, tasks: 4, step 0"),
        (STEP | {"SLURM_CPUS_PER_TASK": "999"}, "warning slurm: 999 CPUs per task were asked for and"),
    ],
)
def test_the_traps_of_slurm(run: Run, environment: dict[str, str], line: str) -> None:
    with patch.dict(os.environ, environment):
        found = checks.slurm()
    assert [each for each in found if f"{each.status} {each.topic}: {each.text}".startswith(line)]
    assert [each.advice != "" for each in found if each.status != "ok"] == [True] * (not line.startswith("ok"))


@pytest.mark.parametrize(
    ("gpus", "case", "environment", "line"),
    [
        (0, "", {}, "ok device: CPU"),
        (0, "driver", {"CUDA_VISIBLE_DEVICES": ""}, "ok device: CPU, with CUDA_VISIBLE_DEVICES="),
        (0, "driver", {}, "warning device: CPU: there is an NVIDIA driver, but torch"),
        (0, "apple", {}, "ok device: an Apple GPU"),
        (0, "apple", {"LOCAL_WORLD_SIZE": "2"}, "ok device: CPU"),
        (2, "", {"LOCAL_WORLD_SIZE": "2"}, "ok device: 2 x NVIDIA H100"),
        (1, "", {"LOCAL_WORLD_SIZE": "2"}, "warning device: 2 ranks on this machine share 1 x NVIDIA H100, over"),
        (1, "bf16", {}, "ok precision: bf16 in training"),
        (1, "old bf16", {}, "warning precision: bf16, but no GPU here has arithmetic for it"),
        (0, "bf16", {}, "warning precision: bf16, but no GPU here has arithmetic for it"),
    ],
)
def test_device_and_precision(run: Run, gpus: int, case: str, environment: dict[str, str], line: str) -> None:
    if case == "driver":
        Path("bin", "nvidia-smi").touch(0o755)
    cuda = {"is_available": lambda: gpus > 0, "device_count": lambda: gpus, "get_device_name": lambda _: "NVIDIA H100"}
    able = patch.multiple(torch.cuda, **cuda, is_bf16_supported=lambda **_: not case.startswith("old"))
    apple = patch.object(torch.backends.mps, "is_available", lambda: case == "apple")
    with able, apple, patch.dict(os.environ, environment):
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
        ("mnist", "problem", "run `python -m ddp_mnist.data fetch --dataset mnist --data-dir data` on a machine with"),
        ("auto", "warning", ": the job would train on generated digits, which are not MNIST -> "),
        ("synthetic", "ok", "synthetic: the job draws its digits where they are missing"),
    ],
)
def test_data_that_are_not_staged(run: Run, tmp_path: Path, name: str, status: str, text: str) -> None:
    ended = run("--dataset", name, "--data-dir", "data")
    (line,) = lines_of(ended, f"{status} data")
    assert text in line and ("train-images-idx3-ubyte: missing" in line) == (status != "ok")
    assert lines_of(ended, "warning", "problem") == [line] * (status != "ok")
    assert (ended.code, "would not start" in ended.out) == ((1, True) if status == "problem" else (0, False))
    assert not (tmp_path / "data").exists()


def test_data_that_are_packed_damaged_or_on_a_mirror(server: str, tmp_path: Path) -> None:
    folder = write_digits(tmp_path, 20, 10)
    packed = {path.with_name(f"{path.name}.gz"): gzip.compress(path.read_bytes()) for path in folder.iterdir()}
    hashes = {path.name: hashlib.md5(content).hexdigest() for path, content in packed.items()}
    for path, content in packed.items():
        path.write_bytes(content)
        path.with_suffix("").unlink()
    with patch.object(mnist, "published", lambda dataset: ([server], hashes)):
        assert checks.dataset("fashion-mnist", tmp_path).status == "ok"
        assert sorted(folder.iterdir()) == sorted(packed)  # still packed
        min(packed).write_bytes(b"damaged")
        found = checks.dataset("fashion-mnist", tmp_path)
    assert (found.status, found.text.partition(": ")[2]) == ("warning", "the job would download it at its start")
    assert f"{min(packed).name}: " in found.advice


def test_a_run_directory_that_cannot_be_used(run: Run, healthy: list[str], tmp_path: Path) -> None:
    holder = directory.lock(tmp_path)
    (problem,) = lines_of(run(*healthy, "--output-dir", tmp_path), "problem")
    assert problem.startswith(f"problem output: --output-dir {tmp_path} is held by another job that is still running.")
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
