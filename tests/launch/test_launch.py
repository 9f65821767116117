"""launch/: what is submitted, what is refused, the local and the debug executor, files for `accelerate launch`.

Jobs through submitit on a real SLURM are in test_slurm.py.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jobs
import pytest
import yaml
from conftest import STEPS, TEST_IMAGES

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("golden") / "sbatch.txt"
SUBMIT = (sys.executable, "-m", "launch.submit")
ACCELERATE = (str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file")

FakeSlurm = Callable[..., dict[str, str]]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Where a user stands when submitting: the repository's root."""
    for name in ("launch", "ddp_mnist"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.fixture
def fake_slurm(tmp_path: Path) -> FakeSlurm:
    """Put stand-ins for SLURM's commands on PATH: name=what it does; returns the environment."""

    def install(**commands: str) -> dict[str, str]:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        for name, body in ({"sbatch": "echo Submitted batch job 42", "srun": "exit 1"} | commands).items():
            (folder / name).write_text(f"#!/bin/sh\necho called >>{tmp_path}/{name}.calls\n{body}\n")
            (folder / name).chmod(0o755)
        return {"PATH": f"{folder}:/usr/bin:/bin"}

    return install


def submit(checkout: Path, *words: str, **variables: str) -> jobs.Ended:
    return jobs.run([*SUBMIT, *words], variables, cwd=checkout)


# What is submitted


def test_the_batch_script_is_the_pinned_one(checkout: Path, fake_slurm: FakeSlurm, flags: list[str]) -> None:
    options = ["--nodes=2", "--gpus-per-node=2", "--cpus-per-task=3", "--partition=gpu", "--time-min=90", "--mem-gb=16"]
    options += ["--sbatch=constraint=a100", "--setup=module load cuda"]
    ended = submit(checkout, *options, "--", *flags, **fake_slurm())
    assert ended.code == 0, ended.err
    text = (checkout / "runs" / "submitit" / "42" / "42_submission.sh").read_text()
    text = text.replace(sys.executable, "PYTHON").replace(str(checkout), "CHECKOUT")
    assert text == GOLDEN.read_text()
    assert "job 42 on slurm: 4 ranks" in ended.out
    assert str(checkout / "runs" / "submitit" / "42" / "42_0_log.out") in ended.out
    assert "runs/slurm-42" in ended.out


def test_nothing_heavy_is_imported_to_submit(checkout: Path) -> None:
    code = "import launch.submit, sys; print({'torch', 'wandb', 'accelerate'} & set(sys.modules))"
    assert jobs.run([sys.executable, "-c", code], cwd=checkout).out == "set()\n"


# What is refused


@pytest.mark.parametrize(
    ("words", "variables", "code", "message"),
    [
        ("-- --epochz 3", {}, 2, "--epochz"),
        ("-- --lr -1", {}, 2, "--lr is -1"),
        ("--nodes=2 --tasks-per-node=4 -- --batch-size 60", {}, 2, "does not divide by 8 ranks"),
        ("--", {}, 1, "the mnist files are not staged"),
        ("-- --data-dir elsewhere", {}, 1, "python -m ddp_mnist.data fetch --dataset mnist --data-dir elsewhere"),
        ("--gpus", {}, 2, "--gpus"),
        ("--cluster=local --nodes=2", {}, 2, "--nodes is 2, expected 1"),
        ("--cluster=debug --tasks-per-node=2", {}, 2, "2 ranks were asked for, expected 1"),
        ("--nodes=0", {}, 2, "0 is not a whole number above 0"),
        ("--sbatch=requeue", {}, 2, "expected NAME=VALUE"),
        ("-- --dataset synthetic", {"PATH": "/nowhere"}, 2, "error: there is no sbatch on PATH: submit from a login"),
        ("-- --dataset synthetic", {"PROGRAM": "mine.py"}, 2, "error: PROGRAM is 'mine.py', which is for slurm/train"),
    ],
)
def test_mistakes_are_found_before_anything_is_submitted(
    checkout: Path, fake_slurm: FakeSlurm, words: str, variables: dict[str, str], code: int, message: str
) -> None:
    ended = submit(checkout, *words.split(), **(fake_slurm() | {"DDP_MNIST_DATA": "data"} | variables))
    assert (ended.code, ended.out) == (code, "")
    assert message in re.sub(r"[\s│]+", " ", ended.err)
    assert "Traceback" not in ended.err
    assert not (checkout / "sbatch.calls").exists()


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ("echo see you tomorrow", 'error: Could not make sense of sbatch output "see you tomorrow'),
        ("echo 'sbatch: error: no such thing' >&2; exit 1", "sbatch: error: no such thing\n"),
    ],
)
def test_what_sbatch_says_is_passed_on(
    checkout: Path, fake_slurm: FakeSlurm, flags: list[str], answer: str, told: str
) -> None:
    ended = submit(checkout, "--", *flags, **fake_slurm(sbatch=answer))
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith(told) and "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("program", "runs"),
    [
        *(("mine.py", True), ("-m mine", True), ("-m ddp_mnist.train", True)),
        *(("yours.py", False), ("mine.py --epochs 3", False), ("-m yours", False), ("-m yours.job", False)),
        ("-m ", False),
    ],
)
def test_a_program_of_ones_own_must_be_there_and_has_data_of_its_own(checkout: Path, program: str, runs: bool) -> None:
    (checkout / "mine.py").touch()
    command = [sys.executable, "-m", "launch.check", f"--program={program}", "--", "--dataset", "mnist"]
    ended = jobs.run(command, {"DDP_MNIST_DATA": "nowhere"}, cwd=checkout)
    if not runs:
        assert ended.code == 2
        assert ended.err.startswith(f"error: PROGRAM is {program!r}, which cannot be run in {checkout}; expected ")
    elif program == "-m ddp_mnist.train":
        assert "the mnist files are not staged" in ended.err
    else:
        assert (ended.code, ended.err) == (0, "")


# How a followed job ends


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("echo 'JobId=7 JobState=RUNNING ExitCode=0:0'", None),
        ("echo 'JobId=7 JobState=PENDING ExitCode=0:0'", None),
        ("echo 'JobId=7 JobState=COMPLETED ExitCode=0:0'", ("COMPLETED", 0)),
        ("echo 'JobId=7 JobState=FAILED ExitCode=75:0'", ("FAILED", 75)),
        ("echo 'JobId=7 JobState=CANCELLED ExitCode=0:15'", ("CANCELLED", 143)),
        ("echo 'JobId=7 JobState=TIMEOUT ExitCode=0:0'", ("TIMEOUT", 1)),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", ("FAILED", 1)),
        ("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", None),
    ],
)
def test_a_followed_job_ends_as_slurm_says(
    tmp_path: Path,
    fake_slurm: FakeSlurm,
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    expected: tuple[str, int] | None,
) -> None:
    from launch.submit import outcome

    monkeypatch.setenv("PATH", fake_slurm(scontrol=answer)["PATH"])
    job: Any = SimpleNamespace(job_id="7", paths=SimpleNamespace(result_pickle=tmp_path / "none"))
    assert outcome(job, "slurm") == expected


def test_ctrl_c_ends_the_following_and_not_the_job(checkout: Path, fake_slurm: FakeSlurm, flags: list[str]) -> None:
    answer = "kill -INT $PPID; echo JobId=42 JobState=RUNNING ExitCode=0:0"
    ended = submit(checkout, "--follow", "--", *flags, **fake_slurm(scontrol=answer, scancel=""))
    assert (ended.code, ended.err) == (130, "\nno longer following; job 42 goes on\n")
    assert not (checkout / "scancel.calls").exists()


# What the job does before it trains


def test_only_a_jobs_first_start_is_fresh(tmp_path: Path) -> None:
    from launch.job import Job

    def config(rank: int) -> Any:
        paths = SimpleNamespace(folder=tmp_path)
        env: Any = SimpleNamespace(cluster="slurm", job_id="7", global_rank=rank, num_tasks=2, paths=paths)
        return Job(("--fresh",), "python -m launch.submit --").config(env)

    assert [config(0).fresh, config(0).fresh] == [True, False]
    assert config(1).output_dir == Path("runs/slurm-7")


# The local and the debug executor


def local_ranks(job_id: str) -> list[int]:
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        env = dict(word.split("=", 1) for word in words if "=" in word)
        if env.get("SUBMITIT_LOCAL_JOB_ID") == job_id:
            found[int(env["SUBMITIT_LOCAL_GLOBALID"])] = int(entry.name)
    return [found[rank] for rank in sorted(found)]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_local_ranks_requeue_and_end_with_the_same_bits(
    checkout: Path, flags: list[str], run_at: Callable[[int], Path]
) -> None:
    command = [*SUBMIT, "--cluster=local", "--tasks-per-node=2", "--follow", "--", *flags, "--fresh"]
    with subprocess.Popen(
        command, cwd=checkout, env=jobs.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout
        found = re.match(r"job (\d+) on local: 2 ranks", process.stdout.readline())
        assert found
        run_dir = checkout / process.stdout.readline().split()[1]
        metrics = run_dir / "metrics.jsonl"
        deadline = time.monotonic() + jobs.FOREVER
        while not (metrics.exists() and metrics.read_text()):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        ranks = local_ranks(found[1])
        for number in (signal.SIGSTOP, signal.SIGUSR2, signal.SIGCONT):
            for rank in ranks:
                os.kill(rank, number)
        output = process.stdout.read()
    assert process.returncode == 0, output
    assert len(ranks) == 2
    assert "stopped by SIGUSR2" in output and "resumed at step" in output
    summary = jobs.read_json(run_dir / "summary.json")
    assert summary["finished"] and summary["world_size"] == 2 and 0 < summary["resumed_from"] < STEPS
    assert [line["step"] for line in jobs.read_metrics(run_dir)] == list(range(1, STEPS + 1))
    assert (run_dir / "model.safetensors").read_bytes() == (run_at(2) / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_local_job_that_fails_is_no_success(checkout: Path, flags: list[str]) -> None:
    (checkout / "taken").touch()
    ended = submit(checkout, "--cluster=local", "--follow", "--", *flags, "--output-dir=taken")
    assert ended.code == 1
    assert "error: --output-dir taken is a file" in ended.out and "Traceback" not in ended.out
    assert re.search(r"^error: job \d+ is FAILED", ended.err, re.MULTILINE)


@pytest.mark.slow
def test_the_debug_executor_trains_in_this_process(checkout: Path, flags: list[str]) -> None:
    words = ["--cluster=debug", "--", *flags, "--output-dir=run"]
    stopped = submit(checkout, *words, "--max-minutes=1e-6")
    assert stopped.code == 75, stopped.err
    assert "python -m launch.submit --cluster=debug --" in stopped.out
    ended = submit(checkout, *words)
    assert ended.code == 0, ended.err
    assert jobs.read_json(checkout / "run" / "summary.json")["test_count"] == TEST_IMAGES
    again = submit(checkout, *words, "--lr=0.5")
    assert again.code == 2
    assert "--lr" in again.err and "Traceback" not in again.err


# Files for `accelerate launch`


@pytest.mark.parametrize("config", sorted((ROOT / "launch").glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.slow
@pytest.mark.distributed
def test_accelerate_starts_as_many_processes_as_the_file_says(config: Path, tmp_path: Path) -> None:
    says = yaml.safe_load(config.read_text())
    machines, processes = says["num_machines"], says["num_processes"]
    probe = tmp_path / "probe.py"
    probe.write_text(
        "import os, pathlib, sys\n"
        "rank, world = (os.environ.get(name, default) for name, default in (('RANK', '0'), ('WORLD_SIZE', '1')))\n"
        f"pathlib.Path({str(tmp_path)!r}, f'{{rank}}-of-{{world}}').touch()\n"
    )
    several = ["--main_process_ip=127.0.0.1", f"--main_process_port={jobs.free_port()}"] if processes > 1 else []
    ended = jobs.run_together(
        [
            [*ACCELERATE, str(config), *several, *([f"--machine_rank={machine}"] if machines > 1 else []), str(probe)]
            for machine in range(machines)
        ],
        [jobs.environment()] * machines,
    )
    jobs.succeeded(ended)
    # Not that stderr is empty: torch's second agent complains when the first is done before it.
    assert not any("values were not passed" in process.err for process in ended), "the file leaves something open"
    assert sorted(path.name for path in tmp_path.glob("*-of-*")) == sorted(
        f"{rank}-of-{processes}" for rank in range(processes)
    )


@pytest.mark.slow
@pytest.mark.distributed
def test_the_cpu_file_trains_on_several_processes(
    checkout: Path, flags: list[str], run_at: Callable[[int], Path]
) -> None:
    launch = [*ACCELERATE, str(ROOT / "launch" / "cpu.yaml"), f"--main_process_port={jobs.free_port()}"]
    ended = jobs.run([*launch, "-m", "ddp_mnist.train", *flags, "--output-dir=run"], cwd=checkout)
    assert ended.code == 0, ended.err
    assert jobs.read_json(checkout / "run" / "summary.json")["world_size"] == 2
    assert (checkout / "run" / "model.safetensors").read_bytes() == (run_at(2) / "model.safetensors").read_bytes()
