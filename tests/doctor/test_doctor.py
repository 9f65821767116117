"""What a launch would do, told before it is made: by real processes where ranks meet, else from facts given by hand."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
import platform
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import jobs
import pytest

from ddp_mnist.config import TrainConfig
from ddp_mnist.data import mnist as files
from ddp_mnist.data import synthetic
from ddp_mnist.doctor import __main__ as doctor
from ddp_mnist.doctor import finding as doctor_finding
from ddp_mnist.doctor import job as doctor_job
from ddp_mnist.doctor import machine as doctor_machine
from ddp_mnist.doctor.__main__ import Rank
from ddp_mnist.doctor.finding import Finding
from ddp_mnist.doctor.machine import Devices

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
    monkeypatch.setattr(doctor_machine, "look_for_devices", lambda local_rank: Devices("CUDA 13.2", False, []))
    monkeypatch.chdir(tmp_path)
    quiet = {"TORCH_CPP_LOG_LEVEL": "FATAL", "NETRC": str(tmp_path / "no-netrc"), "no_proxy": "", "NO_PROXY": ""}
    for name, value in {**jobs.OFFLINE, **quiet}.items():
        monkeypatch.setenv(name, value)

    def command(*arguments: Any) -> jobs.Ended:
        capfd.readouterr()
        try:
            code = doctor.main([*map(str, arguments)])
        except SystemExit as exit:
            assert isinstance(exit.code, int)
            code = exit.code
        return jobs.Ended(code, *capfd.readouterr())

    return command


def lines_of(ended: jobs.Ended, status: str) -> list[str]:
    """The lines with that status, each with the advice below it."""
    lines = re.sub(r"\n {20}-> ", " -> ", ended.out).splitlines()
    return [line for line in lines if line.startswith(status)]


# --- The command ------------------------------------------------------------------------------------------------------


def test_one_rank_that_would_start(run: Run, healthy: list[str], tmp_path: Path) -> None:
    ended = run(*healthy)
    assert (ended.code, ended.err) == (0, "")
    topics = [line.split()[1] for line in ended.out.splitlines()[:-1]]
    assert topics == list(doctor_finding.TOPICS)
    assert "1 rank: plain python" in ended.out
    assert ended.out.endswith("\nThe job would start.\n")
    assert list(tmp_path.iterdir()) == []  # no trace


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_meet_and_time_an_all_reduce_and_one_of_them_tells(healthy: list[str], tmp_path: Path) -> None:
    ended = jobs.run_ranks(2, *healthy, program=DOCTOR, cwd=tmp_path)
    jobs.succeeded(ended)
    assert ended[1].out == ""
    assert f"2 ranks met over gloo: 2 on {socket.gethostname()}" in ended[0].out
    found = re.search(r"all-reduce of 1 number (\S+) ms, of the 36 kB of gradients (\S+) ms", ended[0].out)
    assert found and all(float(figure) > 0 for figure in found.groups())
    assert "64 images a step, 32 of them on each rank" in ended[0].out


def test_json_is_the_text_as_data(run: Run, healthy: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 5e9}))
    arguments = [*healthy, "--mixed-precision", "bf16", "--batch-size", "1"]
    text, data = run(*arguments), run(*arguments, "--json")
    told = json.loads(data.out)
    assert (text.code, data.code, told["exit_code"]) == (0, 0, 0)
    findings = [Finding(**each) for each in told["findings"]]
    assert doctor_finding.as_text(findings) + "\n" == text.out
    assert [each.topic for each in findings if each.status == "warning"] == ["precision"]


@pytest.mark.parametrize(
    ("variables", "arguments", "code", "message"),
    [
        ({}, ["--epochs", "0"], 2, "--epochs is 0"),
        ({}, ["--timeout", "1"], 2, "--timeout is 1; expected seconds from 3 to 86400"),
        ({"WORLD_SIZE": "two"}, [], 1, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "0"}, [], 1, "WORLD_SIZE is '0'"),
    ],
)
def test_a_mistake_is_one_message(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert message in jobs.the_message([run(*arguments)], code)


def test_a_mistake_is_told_by_one_rank(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert run("--timeout", "1") == jobs.Ended(2, "", "")


def test_a_world_size_that_does_not_divide_the_batch(
    run: Run, healthy: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    ended = run(*healthy)
    assert ended.code == 1
    problem, alone = lines_of(ended, "problem")
    assert "--batch-size 64 does not divide by 3 ranks" in problem and "63 or 66" in problem
    assert "the 3 ranks could not be brought together" in alone  # nobody has set RANK
    assert doctor_job.batch(TrainConfig(batch_size=66), 3).status == "ok"


# --- Ranks that do not come -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.distributed
def test_rank_0_does_not_wait_for_ever_for_a_missing_rank(healthy: list[str], tmp_path: Path) -> None:
    ended = jobs.run([*DOCTOR, *healthy, "--timeout", "3"], jobs.rank_variables(2)[0], cwd=tmp_path)
    assert ended.code == 1
    (problem,) = lines_of(ended, "problem")
    assert "ranks" in problem and "the 2 ranks could not be brought together" in problem
    assert ended.out.endswith("would not start: 1 problem.\n")


@pytest.mark.slow
@pytest.mark.distributed
def test_rank_1_does_not_wait_for_ever_for_rank_0(healthy: list[str], tmp_path: Path) -> None:
    ended = jobs.run([*DOCTOR, *healthy, "--timeout", "3"], jobs.rank_variables(2)[1], cwd=tmp_path)
    assert "the 2 ranks could not be brought together" in jobs.the_message([ended], 1)
    assert (ended.out, ended.err.count("\n")) == ("", 1)


DIES = """
import os
from ddp_mnist.config import TrainConfig
from ddp_mnist.distributed.context import Context
with Context(TrainConfig(threads=1)):
    os._exit(3)
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_a_rank_that_dies_after_they_have_met(healthy: list[str], tmp_path: Path) -> None:
    environments = [jobs.environment(variables) for variables in jobs.rank_variables(2)]
    commands = [[*DOCTOR, *healthy, "--timeout", "20"], [sys.executable, "-c", DIES]]
    told, _ = jobs.run_together(commands, environments, cwd=tmp_path)
    assert told.code == 1
    assert "Traceback" not in told.err
    (problem,) = lines_of(told, "problem")
    # In which of the two the death is noticed is a matter of microseconds.
    assert "lost contact with another rank" in problem or "could not be brought together" in problem
    assert "--timeout-minutes" not in problem


def test_what_keeps_ranks_of_another_machine_from_meeting_is_said_there(
    run: Run, healthy: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        doctor_machine, "look_for_devices", lambda local_rank: Devices("CUDA 13.2", True, [H100], failure="no kernel")
    )
    assert "cannot compute: no kernel" in jobs.the_message([run(*healthy)], 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run(*healthy) == jobs.Ended(0, "", "")


# --- Packages ---------------------------------------------------------------------------------------------------------

NEEDED = ["python>=3.11", "torch>=2.11", "torchvision"]


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        ({"python": "3.11.2", "torch": "2.15.0+cpu", "torchvision": "0.29"}, []),
        ({"python": "3.13.0", "torch": "2.16.0.dev20260101", "torchvision": "0.29"}, []),
        ({"python": "3.10.9", "torch": "2.11", "torchvision": "0.29"}, ["python is 3.10.9; expected >=3.11"]),
        ({"python": "3.11.2", "torch": "2.9.1", "torchvision": "0.24"}, ["torch is 2.9.1; expected >=2.11"]),
        ({"python": "3.11.2", "torch": "2.15"}, ["torchvision is not installed"]),
        ({"python": "3.9"}, ["python is 3.9", "torch is not installed", "torchvision is not installed"]),
    ],
)
def test_packages_are_compared_with_what_the_project_requires(installed: dict[str, str], expected: list[str]) -> None:
    found = doctor_machine.packages(NEEDED, installed)
    problems = [each for each in found if each.status == "problem"]
    assert len(problems) == len(expected)
    assert all(each.text.startswith(text) and each.advice for each, text in zip(problems, expected, strict=True))
    assert problems or [each.status for each in found] == ["ok"]


def test_requirements_come_from_the_installed_package_or_the_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def missing(name: str) -> None:
        raise doctor_machine.metadata.PackageNotFoundError(name)

    installed = doctor_machine.requirements()
    monkeypatch.setattr(doctor_machine.metadata, "requires", missing)
    for found in installed, doctor_machine.requirements():
        assert found[0] == "python>=3.11" and "torch>=2.11" in found
        assert not any("pytest" in each for each in found)
    monkeypatch.setattr(doctor_machine, "__file__", str(tmp_path / "ddp_mnist" / "doctor" / "machine.py"))
    (found,) = doctor_machine.packages(doctor_machine.requirements(), doctor_machine.versions())
    assert (found.status, found.text) == ("ok", f"python {platform.python_version()}")


def test_a_package_that_cannot_be_imported_is_a_problem_not_a_traceback(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ddp_mnist.distributed.context", None)
    ended = run("--dataset", "synthetic")
    assert ended.code == 1
    (problem,) = lines_of(ended, "problem")
    assert "ddp_mnist.distributed.context cannot be imported with" in problem and "-> make install" in problem


def test_without_packaging_no_version_is_judged(run: Run, healthy: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    ended = run(*healthy)
    assert ended.code == 1
    (problem,) = lines_of(ended, "problem")
    assert f"packages   packaging is not installed for {sys.executable} -> make install" in problem


def test_it_still_answers_without_the_first_package_that_the_job_imports(tmp_path: Path) -> None:
    without = "import runpy, sys; sys.modules['tyro'] = None; runpy.run_module('ddp_mnist.doctor', run_name='__main__')"
    ended = jobs.run([sys.executable, "-c", without], cwd=tmp_path)
    assert (ended.code, ended.err) == (1, "")
    (problem,) = lines_of(ended, "problem")
    assert "ddp_mnist.config cannot be imported with" in problem and "tyro" in problem and "-> make install" in problem


@pytest.mark.parametrize(
    ("torch", "torchvision", "doubtful"),
    [
        ("2.15.0+cpu", "0.29.2+cu132", True),
        ("2.15.0+cpu", "0.29.2", True),
        ("2.15.0+cu126", "0.29.2+cu132", True),
        ("2.15.0+cu132", "0.29.2+cu132", False),
        ("2.15.0+cpu", "0.29.2+cpu", False),
        ("2.15.0", "0.29.2", False),
        ("2.15.0+cpu", "", False),
    ],
)
def test_builds_that_may_not_fit_are_told_by_their_tags(torch: str, torchvision: str, doubtful: bool) -> None:
    assert bool(doctor_machine.mismatch(torch, torchvision)) == doubtful


@pytest.mark.parametrize(("staged", "status"), [(True, "warning"), (False, "problem")])
def test_a_torchvision_built_for_another_torch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, staged: bool, status: str
) -> None:
    broken = tmp_path / "torchvision"
    broken.mkdir()
    (broken / "__init__.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")')
    (broken / "version.py").write_text("__version__ = '0.29.2+cu132'\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor_machine, "build", {"torch": "2.15.0+cpu", "torchvision": "0.29.2+cu132"}.__getitem__)
    (found,) = doctor_machine.torchvision(staged)
    assert found.status == status
    assert "operator torchvision::nms does not exist" in found.text
    assert "torch is 2.15.0+cpu, torchvision 0.29.2+cu132" in found.text
    (broken / "__init__.py").write_text("")
    assert doctor_machine.torchvision(staged) == []  # doubtful and works: not a word


def test_an_import_that_hangs_is_given_up() -> None:
    assert doctor_machine.import_failure("time; time.sleep(1000)", limit=0.1) == "not done after 0 s"


def test_the_build_is_read_without_importing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    (tmp_path / "of_another_form").mkdir()
    (tmp_path / "of_another_form" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (tmp_path / "of_another_form" / "version.py").write_text("VERSION = (1, 2)\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor_machine.build("torch") == torch.__version__
    for name in ("no_such_package", "json", "of_another_form"):
        assert doctor_machine.build(name) == ""


# --- Launchers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "1 rank: plain python, no launcher has set WORLD_SIZE"),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, "1 rank: accelerate launch, one process"),
        ({"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}, "2 ranks: torchrun has set WORLD_SIZE=2"),
        (
            {"WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "none", "ACCELERATE_MIXED_PRECISION": "no"},
            "4 ranks: accelerate launch has set WORLD_SIZE=4",
        ),
        (
            {"WORLD_SIZE": "8", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8"},
            "8 ranks: slurm/rank.sh has set WORLD_SIZE=8",
        ),
        ({"WORLD_SIZE": "3"}, "3 ranks: a launcher unknown here, or the shell, has set WORLD_SIZE=3"),
    ],
)
def test_the_world_size_and_who_has_set_it(variables: dict[str, str], expected: str) -> None:
    assert doctor_job.launch(variables, []) == [Finding("ok", "launch", expected)]


@pytest.mark.parametrize(
    ("variables", "text", "advice"),
    [
        ({"SLURM_STEP_NUM_TASKS": "4"}, "one of 4 tasks of an srun step, but WORLD_SIZE is not set", "slurm/rank.sh"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "one of 2 processes of mpirun", "torchrun --nproc-per-node 2"),
        ({"PMI_SIZE": "2"}, "one of 2 processes of mpirun", "torchrun --nproc-per-node 2"),
    ],
)
def test_processes_that_would_each_train_alone(variables: dict[str, str], text: str, advice: str) -> None:
    (found,) = doctor_job.launch(variables, [])
    assert found.status == "problem" and found.text.startswith(text) and advice in found.advice
    assert doctor_job.launch({**variables, "WORLD_SIZE": "2"}, [])[0].status == "ok"


@pytest.mark.parametrize(
    ("command", "asked"),
    [
        ("python accelerate launch --cpu --num_processes 2 -m ddp_mnist.doctor", 2),
        ("python accelerate launch --num-processes=3 -m ddp_mnist.doctor", 3),
        ("python -m accelerate.commands.accelerate_cli launch --config_file {config} -m ddp_mnist.doctor", 4),
        ("python accelerate launch --config_file nowhere.yaml -m ddp_mnist.doctor", 0),
        ("python accelerate launch -m ddp_mnist.doctor", 0),
        ("bash --num_processes 2", 0),
        ("", 0),
    ],
)
def test_what_accelerate_launch_was_asked_for(tmp_path: Path, command: str, asked: int) -> None:
    config = tmp_path / "cpu.yaml"
    config.write_text("distributed_type: MULTI_CPU\nnum_processes: 4\n")
    assert doctor_job.asked_processes(command.format(config=config).split(" ")) == asked


def test_a_parent_that_is_not_in_sight_has_asked_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getppid", lambda: 0)  # as in a container that was entered from outside
    assert doctor_job.parent_command() == []
    assert [each.status for each in doctor_job.launch({}, doctor_job.parent_command())] == ["ok"]


@pytest.mark.slow
def test_accelerate_launch_that_silently_starts_one_process(healthy: list[str], tmp_path: Path) -> None:
    launcher = [sys.executable, str(Path(sys.executable).with_name("accelerate")), "launch"]
    words = "--cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no -m ddp_mnist.doctor"
    ended = jobs.run([*launcher, *words.split(), *healthy], cwd=tmp_path)
    assert ended.code == 0, ended.err
    (warning,) = lines_of(ended, "warning")
    assert "was asked for 2 processes and has started 1 -> accelerate launch --config_file launch/cpu.yaml" in warning


# --- The machine ------------------------------------------------------------------------------------------------------

H100 = ("NVIDIA H100", 80 * 2**30)


@pytest.mark.parametrize(
    ("found", "variables", "status", "text"),
    [
        (Devices("CUDA 13.2", False, []), {}, "ok", "CPU: no NVIDIA driver here (torch is built for CUDA 13.2)"),
        (Devices("", False, []), {}, "ok", "CPU: no NVIDIA driver here (torch is built for the CPU)"),
        (Devices("", True, []), {}, "warning", "but this torch is built for the CPU"),
        (Devices("CUDA 13.2", True, []), {"CUDA_VISIBLE_DEVICES": ""}, "ok", "CPU: CUDA_VISIBLE_DEVICES= hides"),
        (Devices("CUDA 13.2", True, [], complaint="driver too old"), {}, "warning", "no GPU (driver too old)"),
        (Devices("", False, [], mps=True), {}, "ok", "an Apple GPU"),
        (Devices("", False, [], mps=True), {"LOCAL_WORLD_SIZE": "2"}, "ok", "CPU: no"),
        (Devices("CUDA 13.2", True, [H100] * 2), {"LOCAL_WORLD_SIZE": "2"}, "ok", "2 GPUs: NVIDIA H100, 80 GiB"),
        (
            Devices("CUDA 13.2", True, [H100]),
            {"LOCAL_WORLD_SIZE": "2"},
            "warning",
            "2 ranks on this machine share 1 GPU",
        ),
        (
            Devices("CUDA 13.2", True, [H100]),
            {"LOCAL_WORLD_SIZE": "2", "SLURM_STEP_ID": "0"},
            "warning",
            "calls each GPU 0",
        ),
        (Devices("CUDA 13.2", True, [H100], failure="no kernel image"), {}, "problem", "compute: no kernel image"),
        (Devices("CUDA 13.2", True, [H100], complaint="capability"), {}, "warning", "capability"),
    ],
)
def test_the_device(found: Devices, variables: dict[str, str], status: str, text: str) -> None:
    told = doctor_machine.device(found, variables)
    assert told.status == status and text in told.text
    assert bool(told.advice) == (status != "ok")


def test_looking_for_devices_needs_none() -> None:
    found = doctor_machine.look_for_devices(0)
    assert not found.failure and (found.gpus or found.bf16 == doctor_machine.cpu_has_bf16())


def test_a_gpu_for_which_torch_has_no_kernels_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def ones(*_: Any, device: str) -> None:
        raise RuntimeError(f"CUDA error: no kernel image\nis available for {device}")

    named = SimpleNamespace(name=H100[0], total_memory=H100[1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: named)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation: True)
    monkeypatch.setattr(torch, "ones", ones)
    told = doctor_machine.device(doctor_machine.look_for_devices(local_rank=5), {})
    assert told.status == "problem"
    assert told.text.startswith("4 GPUs: NVIDIA H100, 80 GiB")
    assert told.text.endswith("cannot compute: CUDA error: no kernel image is available for cuda:1")


@pytest.mark.parametrize(
    ("asked", "gpus", "bf16", "status"),
    [
        ("no", [], False, "ok"),
        ("no", [H100], True, "ok"),
        ("bf16", [H100], True, "ok"),
        ("bf16", [H100], False, "warning"),
        ("bf16", [], False, "warning"),
        ("bf16", [], True, "ok"),
        ("fp16", [H100], False, "ok"),
        ("fp16", [], False, "problem"),
    ],
)
def test_the_precision(asked: str, gpus: list[Any], bf16: bool, status: str) -> None:
    assert doctor_machine.precision(asked, Devices("CUDA 13.2", bool(gpus), gpus, bf16)).status == status


@pytest.mark.parametrize(("flags", "has"), [("fpu avx512f avx512_bf16", True), ("fpu avx512f", False), (None, False)])
def test_a_cpu_with_arithmetic_for_bf16(tmp_path: Path, flags: str | None, has: bool) -> None:
    facts = tmp_path / "cpuinfo"
    if flags:
        facts.write_text(f"processor : 0\nflags : {flags}\n")
    assert doctor_machine.cpu_has_bf16(facts) is has


@pytest.mark.parametrize(
    ("quota", "threads", "ranks", "status", "text"),
    [
        (None, 0, 1, "ok", "8 of 16 CPUs allowed; 1 rank here with 8 threads each"),
        (None, 0, 4, "ok", "4 ranks here with 2 threads each"),
        (None, 0, 16, "ok", "16 ranks here with 1 thread each"),
        (8.0, 0, 2, "ok", "with 4 threads each"),
        (2.0, 0, 2, "warning", "with 4 threads each, but a quota of 2 CPUs"),
        (2.0, 1, 2, "ok", "with 1 thread each"),
    ],
)
def test_cpus_and_threads(quota: float | None, threads: int, ranks: int, status: str, text: str) -> None:
    told = doctor_machine.cpu(8, 16, quota, threads, {"LOCAL_WORLD_SIZE": str(ranks)})
    assert told.status == status and told.text.endswith(text)
    assert told.advice == ("--threads 1" if status == "warning" else "")


def test_where_a_process_is_bound_to_no_cpus_it_may_use_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")  # as on a Mac
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert doctor_machine.allowed_cpus() == {0, 1, 2}


@pytest.mark.parametrize(
    ("own", "contents", "quota"),
    [
        ("0::/job/task\n", {"job/cpu.max": "150000 100000\n", "job/task/cpu.max": "max 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("4:memory:/box\n3:cpu,cpuacct:/box\n", {"cpu,cpuacct/box/cpu.cfs_quota_us": "400000"}, 4.0),
        ("3:cpu,cpuacct:/box\n", {"cpu,cpuacct/box/cpu.cfs_quota_us": "-1"}, None),
        ("0::/\n", {}, None),
    ],
)
def test_the_quota_of_a_container(tmp_path: Path, own: str, contents: dict[str, str], quota: float | None) -> None:
    (tmp_path / "own").write_text(own)
    for name, content in contents.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        path.with_name("cpu.cfs_period_us").write_text("100000")
    assert doctor_machine.cpu_quota(tmp_path / "cgroup", tmp_path / "own") == quota
    assert doctor_machine.cpu_quota(tmp_path / "nowhere", tmp_path / "nothing") is None


# --- Files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_data_that_are_not_staged(run: Run, tmp_path: Path, name: str) -> None:
    ended = run("--dataset", name, "--data-dir", tmp_path / "data")
    assert ended.code == 1
    (problem,) = lines_of(ended, "problem")
    assert f"{name} is not staged" in problem and "train-images-idx3-ubyte is missing" in problem
    which = "" if name == "mnist" else f" --dataset {name}"
    assert f"-> python -m ddp_mnist.data fetch{which} --data-dir {tmp_path / 'data'}" in problem
    assert not (tmp_path / "data").exists()


def test_digits_that_are_still_to_be_drawn(run: Run, tmp_path: Path) -> None:
    ended = run("--dataset", "synthetic", "--data-dir", tmp_path / "data")
    assert ended.code == 0 and lines_of(ended, "warning") == []
    folder = tmp_path / "data" / f"Synthetic-v{synthetic.VERSION}" / "raw"
    assert f"data       synthetic: the job draws the digits into {folder}\n" in ended.out
    assert not (tmp_path / "data").exists()


def test_auto_says_that_it_would_not_be_mnist(run: Run) -> None:
    ended = run("--dataset", "auto", "--data-dir", "data")
    assert ended.code == 0
    (warning,) = lines_of(ended, "warning")
    assert "the job would train on generated digits, which are not MNIST -> python -m ddp_mnist.data fetch" in warning


def test_data_that_could_be_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor_job, "reachable", lambda url: True)
    told = doctor_job.dataset("mnist", tmp_path / "data")
    assert told.status == "warning" and told.text.endswith("the job would download it at its start")


def test_data_that_are_only_there_as_gz(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: Path) -> None:
    monkeypatch.setattr(doctor_job, "reachable", lambda url: False)
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    sums = {}
    for path in (tiny / "FashionMNIST" / "raw").glob("*-ubyte"):
        content = gzip.compress(path.read_bytes())
        (folder / f"{path.name}.gz").write_bytes(content)
        sums[path.name] = (hashlib.md5(content).hexdigest(), "")
    monkeypatch.setitem(files.SOURCES, "mnist", files.Source("MNIST", sums))
    before = sorted(folder.iterdir())
    told = doctor_job.dataset("mnist", tmp_path)
    assert told.status == "ok" and "the .gz files" in told.text
    assert sorted(folder.iterdir()) == before  # still packed
    damaged = folder / "t10k-labels-idx1-ubyte.gz"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    told = doctor_job.dataset("mnist", tmp_path)
    assert told.status == "problem" and "t10k-labels-idx1-ubyte is missing" in told.text


def test_data_that_are_damaged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor_job, "reachable", lambda url: False)
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    (tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(b"\0" * 100)
    told = doctor_job.dataset("mnist", tmp_path)
    assert told.status == "problem" and "train-images-idx3-ubyte is damaged (magic number 0" in told.text


def test_an_output_directory_with_a_file_in_the_way(run: Run, healthy: list[str], tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    for flags in [], ["--output-dir", "runs/below"]:
        ended = run(*healthy, *flags)
        assert ended.code == 1
        (problem,) = lines_of(ended, "problem")
        assert "output" in problem and "cannot be written: Not a directory -> --output-dir DIR" in problem


def test_a_disk_without_room_or_locks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert doctor_job.output(tmp_path / "runs" / "deep").status == "ok"
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1e6}))
        told = doctor_job.output(tmp_path)
        assert told.status == "warning" and "0.0 GB free" in told.text and "make room" in told.advice
    with monkeypatch.context() as patch:
        patch.setattr("fcntl.flock", lambda *arguments: None)  # says yes to everybody
        told = doctor_job.output(tmp_path)
        assert told.status == "warning" and "no locks" in told.text
    with monkeypatch.context() as patch:
        patch.setattr("fcntl.flock", Mock(side_effect=OSError(errno.ENOSYS, "Function not implemented")))
        told = doctor_job.output(tmp_path)
        assert told.status == "warning" and "no locks" in told.text
    assert list(tmp_path.iterdir()) == []


# --- Services ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of something that takes connections; no proxy in front."""
    for name in jobs.OFFLINE:
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_no_part_of_a_key_or_a_password_is_shown(
    run: Run, healthy: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, form: list[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "")
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("https_proxy", f"http://user:{SECRET}@127.0.0.1:9")
    ended = run(*healthy, *form)
    assert ended.code == 0 and "api.wandb.ai cannot be reached" in ended.out
    monkeypatch.delenv("WANDB_API_KEY")
    (tmp_path / "no-netrc").write_text(f"machine api.wandb.ai login user password {SECRET}")
    again = run(*healthy, *form)
    assert "api.wandb.ai cannot be reached" in again.out
    for text in (ended.out, ended.err, again.out, again.err):
        assert not any(SECRET[start : start + 4] in text for start in range(len(SECRET) - 3))


class NotFound(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def answering(server: str) -> Iterator[str]:
    """The address of something that answers."""
    with ThreadingHTTPServer(("127.0.0.1", 0), NotFound) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


def test_wandb_with_and_without_server_and_credentials(
    answering: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(mode: str, key: str = "", url: str = answering) -> tuple[str, str]:
        for name, value in {"WANDB_MODE": mode, "WANDB_API_KEY": key, "WANDB_BASE_URL": url}.items():
            monkeypatch.setenv(name, value)
        finding = doctor_job.wandb(TrainConfig())
        assert finding.topic == "wandb" and bool(finding.advice) == (finding.status != "ok")
        return finding.status, finding.text

    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    nowhere = f"http://127.0.0.1:{jobs.free_port()}"
    assert told("")[0] == "ok" and told("")[1].startswith("offline: no key for 127.0.0.1")
    assert told("offline", SECRET) == ("ok", "offline")
    assert told("disabled", SECRET) == ("ok", "disabled")
    assert told("", SECRET) == ("ok", "online")
    status, text = told("", SECRET, nowhere)
    assert status == "warning" and text.startswith("offline: ")
    assert told("online", "", nowhere)[0] == "warning"


def test_a_probe_goes_through_the_proxy(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = "https://nothing.invalid"
    assert doctor_job.reachable(server) and not doctor_job.reachable(nowhere)
    monkeypatch.setenv("https_proxy", server)
    assert doctor_job.reachable(nowhere)
    assert not doctor_job.reachable("http://127.0.0.1:port")


def test_a_probe_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()

    def hang(*arguments: Any) -> None:
        over.wait()
        raise OSError("too late")

    monkeypatch.setattr(socket, "create_connection", hang)
    assert not doctor_job.reachable("http://127.0.0.1", limit=0.05)
    over.set()


JOB = {"SLURM_JOB_ID": "12", "SLURM_JOB_NUM_NODES": "2"}
STEP = {**JOB, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "WORLD_SIZE": "4"}


@pytest.mark.parametrize(
    ("variables", "sbatch", "told", "trap"),
    [
        ({}, False, "none here", None),
        ({}, True, "not in a job; submit with sbatch slurm/train.sh", None),
        (JOB, True, "job 12 on 2 nodes, outside any srun step, 9:59 left", None),
        (STEP, True, "job 12 on 2 nodes, step 0 of 4 tasks, 9:59 left", None),
        ({**JOB, "SLURM_NTASKS": "4"}, True, "job 12", "SLURM_NTASKS=4, but what is typed here is one process"),
        ({**STEP, "SLURM_NTASKS": "4"}, True, "job 12", None),
        ({**STEP, "SLURM_GPUS_PER_TASK": "1"}, True, "job 12", "--gpus-per-task shows each rank one GPU only"),
        ({**STEP, "SLURM_CPUS_PER_TASK": "4"}, True, "job 12", "4 CPUs per task were asked for and 2 can be used"),
    ],
)
def test_slurm_and_its_traps(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], sbatch: bool, told: str, trap: str | None
) -> None:
    monkeypatch.setattr(doctor_job, "time_left", lambda job: ", 9:59 left")
    first, *traps = doctor_job.slurm(variables, sbatch, allowed=2)
    assert first.status == "ok" and first.text.startswith(told)
    assert [each.status for each in traps] == ["warning"] * (trap is not None)
    assert all(each.text.find(trap or "") >= 0 and each.advice for each in traps)


@pytest.mark.parametrize(
    ("squeue", "told"), [("echo 9:59", ", 9:59 left"), ("true", ""), ("echo 9:59; exit 1", ""), (None, "")]
)
def test_the_time_left_is_told_where_squeue_knows_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, squeue: str | None, told: str
) -> None:
    if squeue:
        (tmp_path / "squeue").write_text(f"#!/bin/sh\n{squeue}\n")
        (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    (found,) = doctor_job.slurm({"SLURM_JOB_ID": "12"}, sbatch=True, allowed=2)
    assert found == Finding("ok", "slurm", f"job 12 on 1 node, outside any srun step{told}")


# --- Ranks compared ---------------------------------------------------------------------------------------------------


def rank(host: str, *findings: Finding, cpus: str = "01", threads: int = 1, torch: str = "2.15.0") -> Rank:
    return Rank(host, frozenset(map(int, cpus)), threads, {"torch": torch}, list(findings))


def test_what_is_not_ok_on_another_rank_is_told_once() -> None:
    fine, bad = Finding("ok", "data", "here"), Finding("problem", "data", "gone", "fetch")
    merged = doctor.merge([rank("n0", fine), rank("n0", fine), rank("n1", bad), rank("n2", bad)])
    assert merged == [fine, Finding("problem", "data", "rank 2 on n1: gone", "fetch")]
    assert doctor.merge([rank("n0", bad), rank("n1", bad)]) == [bad]


def test_ranks_per_machine_versions_and_threads() -> None:
    fine = doctor.together([rank("n0"), rank("n0"), rank("n1"), rank("n1")], "gloo", [0.6, 2.1])
    assert [each.text for each in fine] == [
        "4 ranks met over gloo: 2 on n0, 2 on n1",
        "all-reduce of 1 number 0.60 ms, of the 36 kB of gradients 2.10 ms (median of 30)",
    ]
    ranks = [rank("n0"), rank("n1", torch="2.14.0"), rank("n2", threads=2), rank("n2", threads=2)]
    strange = doctor.together(ranks, "nccl", [1, 1])[2:]
    assert {each.text for each in strange} == {
        "torch is 2.15.0 on rank 0 and 2.14.0 on rank 1 (n1)",
        "4 threads of 2 ranks on n2 share 2 CPUs; is LOCAL_WORLD_SIZE set?",
    }
    assert all(each.status == "warning" and each.advice for each in strange)
    apart = [rank("n0", cpus="01", threads=2), rank("n0", cpus="23", threads=2)]  # as srun binds them
    assert len(doctor.together(apart, "gloo", [1, 1])) == 2
