"""What a launch would do, said before it is made. The command runs in this process, and in others where ranks meet."""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jobs
import pytest
import torch

from ddp_mnist.data import mnist, synthetic
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

    def command(*arguments: Any) -> jobs.Ended:
        capfd.readouterr()
        try:
            code = doctor.main([*map(str, arguments)])
        except SystemExit as exit:
            assert isinstance(exit.code, int)
            code = exit.code
        return jobs.Ended(code, *capfd.readouterr())

    return command


@pytest.fixture
def setenv(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """Set environment variables, as a launcher does."""

    def each(values: dict[str, str]) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return each


def program(path: Path) -> None:
    """A command that does nothing."""
    path.touch(0o755)


def lines_of(ended: jobs.Ended, *starts: str) -> list[str]:
    """The lines of that status, or of that status and topic."""
    lines = [re.sub(r"  +", " ", line) for line in ended.out.splitlines()]
    return [line for line in lines if line.startswith(starts)]


# --- The command ------------------------------------------------------------------------------------------------------


def test_one_rank_that_would_start(run: Run, healthy: list[str], tmp_path: Path) -> None:
    ended = run(*healthy)
    assert (ended.code, ended.err) == (0, "")
    lines = ended.out.splitlines()
    topics = ["launch", "batch", "device", "precision", "data", "output", "wandb", "slurm", "ranks"]
    assert [re.split("[ :]+", line)[:2] for line in lines[:-1]] == [["ok", topic] for topic in topics]
    assert lines[-1] == "The job would start."
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]  # no trace


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_meet_and_time_an_all_reduce_and_one_of_them_reports(healthy: list[str], tmp_path: Path) -> None:
    ended = jobs.run_ranks(2, *healthy, program=DOCTOR, cwd=tmp_path)
    jobs.succeeded(ended)
    assert ended[1].out == ""
    assert f"2 ranks met over gloo: 2 on {socket.gethostname()}" in ended[0].out
    found = re.search(r"all-reduce of 1 number (\S+) ms, of the 36 kB of gradients (\S+) ms", ended[0].out)
    assert found and all(float(figure) > 0 for figure in found.groups())
    assert "64 images a step, 32 of them on each rank" in ended[0].out


@pytest.mark.slow
@pytest.mark.distributed
def test_findings_of_other_machines_are_reported_once(healthy: list[str], tmp_path: Path) -> None:
    """Two ranks, each the first one on its machine; the data are on one of the disks only."""
    ranks = [each | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"} for each in jobs.rank_variables(2)]
    shared = [*DOCTOR, *healthy, "--batch-size", "63"]
    commands = [shared, [*shared, "--data-dir", str(tmp_path / "empty")]]
    first, second = jobs.run_together(commands, [jobs.environment(each) for each in ranks], cwd=tmp_path)
    assert (first.code, second) == (1, jobs.Ended(0, "", ""))
    batch, data = lines_of(first, "problem")
    assert "--batch-size 63 does not divide by 2 ranks" in batch
    assert f"rank 1 on {socket.gethostname()}: fashion-mnist is not staged" in data


def test_json_is_the_text_as_data(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 5e9}))
    text, data = run("--dataset", "mnist"), run("--dataset", "mnist", "--json")
    told = json.loads(data.out)
    assert (text.code, data.code, told["exit_code"]) == (1, 1, 1)
    lines = [str(checks.Finding(**each)) for each in told["findings"]]
    assert text.out.splitlines() == [*lines, "The job would not start."]


@pytest.mark.parametrize(
    ("values", "arguments", "message"),
    [
        ({}, ["--epochs", "0"], "--epochs is 0"),
        ({}, ["--timeout", "1"], "--timeout is 1; expected seconds from 3 to 86400"),
        ({"WORLD_SIZE": "two"}, [], "WORLD_SIZE=two"),
        ({"LOCAL_RANK": "-1"}, [], "LOCAL_RANK=-1"),
    ],
)
def test_a_mistake_is_one_message(
    run: Run, setenv: Any, values: dict[str, str], arguments: list[str], message: str
) -> None:
    setenv(values)
    assert message in jobs.the_message([run(*arguments)], 2)


def test_a_mistake_is_reported_by_one_rank(run: Run, setenv: Any) -> None:
    setenv({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"})
    assert run("--timeout", "1") == jobs.Ended(2, "", "")


@pytest.mark.parametrize(("missing", "importing"), [("tyro", "config"), ("accelerate", "doctor.checks")])
def test_a_package_that_cannot_be_imported_is_one_message(tmp_path: Path, missing: str, importing: str) -> None:
    code = (
        f"import runpy, sys; sys.modules['{missing}'] = None; runpy.run_module('ddp_mnist.doctor', run_name='__main__')"
    )
    message = jobs.the_message([jobs.run([sys.executable, "-c", code], cwd=tmp_path)], 1)
    assert f"ddp_mnist.{importing} cannot be imported with {sys.executable}: " in message and f"{missing}" in message
    assert "pip check" in message and "torch.utils.collect_env" in message


# --- Ranks that do not come -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("rank", [0, 1])
def test_no_rank_waits_for_ever_for_a_missing_one(healthy: list[str], tmp_path: Path, rank: int) -> None:
    ended = jobs.run([*DOCTOR, *healthy, "--timeout", "3"], jobs.rank_variables(2)[rank], cwd=tmp_path)
    assert ended.code == 1
    lines = ended.err.splitlines() if rank else lines_of(ended, "problem")
    expected = f"{'error' if rank else 'problem ranks'}: the 2 ranks could not be brought together"
    assert [line.startswith(expected) for line in lines] == [True]
    assert bool(ended.out) == (rank == 0)


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
    environments = [jobs.environment(each) for each in jobs.rank_variables(2)]
    commands = [[*DOCTOR, *healthy, "--timeout", "20"], [sys.executable, "-c", DIES]]
    told, _ = jobs.run_together(commands, environments, cwd=tmp_path)
    assert told.code == 1
    assert "Traceback" not in told.err
    (problem,) = lines_of(told, "problem")
    # In which of the two the death is noticed is a matter of microseconds.
    assert "lost contact with another rank" in problem or "could not be brought together" in problem
    assert "--timeout-minutes" not in problem


def test_what_keeps_ranks_of_another_machine_from_meeting_is_reported_there(
    run: Run, healthy: list[str], setenv: Any
) -> None:
    arguments = [*healthy, "--mixed-precision", "fp16"]
    setenv({"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"})
    assert "fp16 needs a GPU and there is none" in jobs.the_message([run(*arguments)], 1)
    setenv({"RANK": "3", "LOCAL_RANK": "1"})
    assert run(*arguments) == jobs.Ended(0, "", "")


# --- Launchers and batch ----------------------------------------------------------------------------------------------

ELASTIC = {"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no"}


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({}, "ok launch: 1 rank: plain python, no launcher has set WORLD_SIZE"),
        (ACCELERATE, "ok launch: 1 rank: accelerate launch, one process"),
        (ELASTIC, "ok launch: 2 ranks: torchrun has set WORLD_SIZE=2"),
        (ELASTIC | ACCELERATE, "ok launch: 2 ranks: accelerate launch has set WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2", "SLURM_STEP_ID": "0"}, "ok launch: 2 ranks: slurm/rank.sh has set WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2"}, "ok launch: 2 ranks: a launcher unknown here, or the shell, has set WORLD_SIZE=2"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "problem launch: one of 4 processes of srun, but WORLD_SIZE is not set"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "problem launch: one of 2 processes of mpirun, but WORLD_SIZE is not set"),
    ],
)
def test_the_world_size_and_who_has_set_it(setenv: Any, values: dict[str, str], line: str) -> None:
    setenv(values)
    (found,) = checks.launch()
    assert re.sub("  +", " ", str(found)).startswith(line)


def test_processes_that_know_nothing_of_each_other_make_one_report(run: Run, healthy: list[str], setenv: Any) -> None:
    setenv({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"})
    assert len(lines_of(run(*healthy), "problem launch")) == 1
    setenv({"SLURM_PROCID": "1"})
    assert run(*healthy) == jobs.Ended(0, "", "")


@pytest.mark.slow
@pytest.mark.parametrize(("asked", "silent"), [("2", True), ("1", False)])
def test_accelerate_launch_that_silently_starts_one_process(
    healthy: list[str], tmp_path: Path, asked: str, silent: bool
) -> None:
    launcher = [sys.executable, str(Path(sys.executable).with_name("accelerate")), "launch"]
    words = "--cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no -m ddp_mnist.doctor"
    ended = jobs.run([*launcher, *words.replace("2", asked).split(), *healthy], cwd=tmp_path)
    assert ended.code == 0, ended.err
    text = "was asked for 2 processes and has started 1 -> accelerate launch --config_file launch/cpu.yaml"
    assert [text in line for line in lines_of(ended, "warning")] == [True] * silent


def test_a_world_size_that_does_not_divide_the_batch(run: Run, healthy: list[str], setenv: Any) -> None:
    setenv({"WORLD_SIZE": "3"})
    ended = run(*healthy)
    assert ended.code == 1
    batch, ranks = lines_of(ended, "problem")
    assert "--batch-size 64 does not divide by 3 ranks" in batch and "63 or 66" in batch
    assert "the 3 ranks could not be brought together" in ranks  # nobody has set RANK


# --- The machine ------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpus(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that torch sees that many GPUs."""

    def pretend(number: int, *, failure: str = "", bf16: bool = True) -> None:
        def ones(*_: Any, device: str) -> torch.Tensor:
            if failure:
                raise RuntimeError(f"{failure}\nfor {device}")
            return torch.zeros(8)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100")
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation: bf16)
        monkeypatch.setattr(torch, "ones", ones)

    return pretend


@pytest.mark.parametrize(
    ("number", "failure", "values", "status", "text"),
    [
        (0, "", {}, "ok", "CPU: no NVIDIA driver here"),
        (0, "driver", {"CUDA_VISIBLE_DEVICES": ""}, "ok", "CPU: CUDA_VISIBLE_DEVICES= hides the GPUs"),
        (0, "driver", {}, "warning", "CPU: there is an NVIDIA driver, but torch"),
        (2, "", {"LOCAL_WORLD_SIZE": "2"}, "ok", "2 GPUs: NVIDIA H100"),
        (1, "", {"LOCAL_WORLD_SIZE": "2"}, "warning", "2 ranks on this machine share 1 GPU: NVIDIA H100, over gloo"),
        (4, "no kernel image", {"LOCAL_RANK": "5"}, "problem", ": no kernel image for cuda:1"),
    ],
)
def test_the_device(
    gpus: Any, setenv: Any, tmp_path: Path, number: int, failure: str, values: dict[str, str], status: str, text: str
) -> None:
    if failure == "driver":
        program(tmp_path / "bin" / "nvidia-smi")
    gpus(number, failure=failure)
    setenv(values)
    found = checks.device()
    assert found.status == status and text in found.text
    assert bool(found.advice) == (status != "ok")


def test_an_apple_gpu_is_for_one_rank(run: Run, setenv: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert checks.device().text.startswith("an Apple GPU")
    setenv({"LOCAL_WORLD_SIZE": "2"})
    assert checks.device().text.startswith("CPU")


@pytest.mark.parametrize(
    ("asked", "number", "bf16", "status"),
    [
        ("no", 0, False, "ok"),
        ("bf16", 1, True, "ok"),
        ("bf16", 1, False, "warning"),
        ("bf16", 0, True, "ok"),
        ("bf16", 0, False, "warning"),
        ("fp16", 1, False, "ok"),
        ("fp16", 0, True, "problem"),
    ],
)
def test_the_precision(
    gpus: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: str, number: int, bf16: bool, status: str
) -> None:
    facts = tmp_path / "cpuinfo"
    facts.write_text(f"processor : 0\nflags : fpu avx512f{' avx512_bf16' if bf16 else ''}\n")
    monkeypatch.setattr(checks, "CPU_FACTS", facts)
    gpus(number, bf16=bf16)
    assert checks.precision(asked).status == status


# --- Data and run directory -------------------------------------------------------------------------------------------


class NotFound(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def answering(run: Run, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server that answers; no proxy in front."""
    for name in jobs.OFFLINE:
        monkeypatch.delenv(name, raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), NotFound) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


@pytest.mark.parametrize(
    ("name", "status", "advice"),
    [
        ("mnist", "problem", "-> python -m ddp_mnist.data fetch --data-dir data"),
        ("fashion-mnist", "problem", "-> python -m ddp_mnist.data fetch --dataset fashion-mnist --data-dir data"),
        ("auto", "warning", ": the job would train on generated digits, which are not MNIST -> python -m ddp_mnist"),
    ],
)
def test_data_that_are_not_staged(run: Run, tmp_path: Path, name: str, status: str, advice: str) -> None:
    ended = run("--dataset", name, "--data-dir", "data")
    assert ended.code == (status == "problem")
    (line,) = lines_of(ended, "warning", "problem")
    assert line.startswith(f"{status} data: ") and "train-images-idx3-ubyte is missing" in line and advice in line
    assert not (tmp_path / "data").exists()


def test_digits_that_are_still_to_be_drawn(run: Run, tmp_path: Path) -> None:
    ended = run("--dataset", "synthetic", "--data-dir", tmp_path / "data")
    assert ended.code == 0 and lines_of(ended, "warning") == []
    folder = tmp_path / "data" / f"Synthetic-v{synthetic.VERSION}" / "raw"
    assert lines_of(ended, "ok data") == [f"ok data: synthetic: the job draws the digits into {folder}"]
    assert not (tmp_path / "data").exists()


def test_data_that_could_be_downloaded(answering: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(mnist, "published", lambda dataset: ([answering], {}))
        found = checks.dataset("mnist", tmp_path / "data")
        assert found.status == "warning" and found.text.endswith("the job would download it at its start")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    found = checks.dataset("mnist", tmp_path)
    assert found.status == "problem" and "cannot be downloaded here (torchvision" in found.text


def test_data_that_are_only_there_as_gz_or_damaged(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name in (*mnist.NAMES["train"], *mnist.NAMES["test"]):
        (folder / f"{name}.gz").touch()
    before = sorted(folder.iterdir())
    found = checks.dataset("mnist", tmp_path)
    assert found.status == "ok" and "the .gz files are in" in found.text
    assert sorted(folder.iterdir()) == before  # still packed
    before[0].unlink()
    found = checks.dataset("mnist", tmp_path)
    assert found.status == "problem" and "ubyte is missing" in found.text
    (folder / "train-images-idx3-ubyte").write_bytes(b"\0" * 100)
    found = checks.dataset("mnist", tmp_path)
    assert found.status == "problem" and "train-images-idx3-ubyte is damaged (magic number 0" in found.text


@pytest.mark.parametrize("flags", [[], ["--output-dir", "runs/below"]])
def test_an_output_directory_with_a_file_in_the_way(
    run: Run, healthy: list[str], tmp_path: Path, flags: list[str]
) -> None:
    (tmp_path / "runs").write_text("")
    ended = run(*healthy, *flags)
    assert ended.code == 1
    (problem,) = lines_of(ended, "problem output")
    assert "cannot be written: Not a directory -> --output-dir DIR" in problem


def test_a_disk_without_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert checks.output(tmp_path / "runs" / "deep").status == "ok"
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1e6}))
    found = checks.output(tmp_path)
    assert found.status == "warning" and "0.0 GB free" in found.text and "make room" in found.advice
    assert list(tmp_path.iterdir()) == []


def test_a_run_directory_that_another_job_holds(run: Run, healthy: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    holder = directory.lock(run_dir)
    assert holder
    ended = run(*healthy, "--output-dir", run_dir)
    holder.release()
    (problem,) = lines_of(ended, "problem")
    assert problem.startswith(f"problem output: {run_dir} is held by another job that is still running -> wait for it")
    assert run(*healthy, "--output-dir", run_dir).code == 0


# --- Services ---------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("mode", "key", "answers", "line"),
    [
        ("", "", True, "ok wandb: offline: no key for 127.0.0.1"),
        ("", SECRET, True, "ok wandb: online"),
        ("", SECRET, False, "warning wandb: offline: 127.0.0.1"),
        ("online", "", True, "warning wandb: offline: no key for 127.0.0.1"),
        ("offline", SECRET, True, "ok wandb: offline"),
        ("disabled", SECRET, True, "ok wandb: disabled"),
    ],
)
def test_wandb_with_and_without_server_and_credentials(
    run: Run, healthy: list[str], setenv: Any, answering: str, mode: str, key: str, answers: bool, line: str
) -> None:
    url = answering if answers else f"http://127.0.0.1:{jobs.free_port()}"
    setenv({"WANDB_MODE": mode, "WANDB_API_KEY": key, "WANDB_BASE_URL": url})
    (found,) = (each for each in lines_of(run(*healthy), "ok", "warning") if " wandb: " in each)
    assert found.startswith(line) and (" -> " in found) == line.startswith("warning")


JOB = {"SLURM_JOB_ID": "12", "SLURM_JOB_NUM_NODES": "2"}
STEP = {**JOB, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "WORLD_SIZE": "4"}


@pytest.mark.parametrize(
    ("values", "sbatch", "text", "trap"),
    [
        ({}, False, "none here", None),
        ({}, True, "not in a job; submit with sbatch slurm/train.sh", None),
        (JOB, True, "job 12 on 2 nodes, outside any srun step", None),
        (STEP, True, "job 12 on 2 nodes, step 0 of 4 tasks", None),
        ({**JOB, "SLURM_NTASKS": "4"}, True, "job 12", "SLURM_NTASKS=4, but what is typed here is one process"),
        ({**STEP, "SLURM_NTASKS": "4"}, True, "job 12", None),
        ({**STEP, "SLURM_GPUS_PER_TASK": "1"}, True, "job 12", "--gpus-per-task shows each rank one GPU only"),
        ({**STEP, "SLURM_CPUS_PER_TASK": "999"}, True, "job 12", "999 CPUs per task were asked for and"),
    ],
)
def test_slurm_and_its_traps(
    run: Run, setenv: Any, tmp_path: Path, values: dict[str, str], sbatch: bool, text: str, trap: str | None
) -> None:
    if sbatch:
        program(tmp_path / "bin" / "sbatch")
    setenv(values)
    first, *traps = checks.slurm()
    assert first.status == "ok" and first.text.startswith(text)
    assert [each.status for each in traps] == ["warning"] * (trap is not None)
    assert all((trap or "") in each.text and each.advice for each in traps)
