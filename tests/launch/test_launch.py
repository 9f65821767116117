"""launch/: what is submitted, what is refused, the local and the debug executor, files for `accelerate launch`.

Jobs through submitit on a real SLURM are in test_slurm.py.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
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


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Where a user stands when submitting: the repository's root."""
    for name in ("launch", "ddp_mnist"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.fixture
def fake_slurm(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Put stand-ins for SLURM's commands on PATH: name=what it prints; returns the environment."""

    def install(**commands: str) -> dict[str, str]:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        for name, body in commands.items():
            (folder / name).write_text(f"#!/bin/sh\necho called >>{tmp_path}/{name}.calls\n{body}\n")
            (folder / name).chmod(0o755)
        return {"PATH": f"{folder}:/usr/bin:/bin"}

    return install


def submit(checkout: Path, *words: str, **variables: str) -> jobs.Ended:
    return jobs.run([*SUBMIT, *words], variables, cwd=checkout)


# What is submitted


def test_the_batch_script_is_the_pinned_one(
    checkout: Path, fake_slurm: Callable[..., dict[str, str]], flags: list[str]
) -> None:
    env = fake_slurm(sbatch="echo Submitted batch job 42", srun="exit 1")
    options = ["--nodes=2", "--gpus-per-node=2", "--cpus-per-task=3", "--partition=gpu", "--time-min=90", "--mem-gb=16"]
    ended = submit(checkout, *options, "--sbatch=constraint=a100", "--setup=module load cuda", "--", *flags, **env)
    assert ended.code == 0, ended.err
    text = (checkout / "runs" / "submitit" / "42" / "42_submission.sh").read_text()
    text = text.replace(sys.executable, "PYTHON").replace(str(checkout), "CHECKOUT")
    assert text == GOLDEN.read_text()
    assert "job 42 on slurm: 4 ranks" in ended.out
    assert str(checkout / "runs" / "submitit" / "42" / "42_0_log.out") in ended.out
    assert "runs/slurm-42" in ended.out


def test_nothing_heavy_is_imported_to_submit(checkout: Path) -> None:
    code = "import launch.submit, launch.table, sys; print({'torch', 'wandb', 'accelerate'} & set(sys.modules))"
    assert jobs.run([sys.executable, "-c", code], cwd=checkout).out == "set()\n"


# What is refused


@pytest.mark.parametrize(
    ("options", "training", "code", "message"),
    [
        ([], ["--epochz", "3"], 2, "--epochz"),
        ([], ["--lr", "-1"], 2, "--lr is -1"),
        (["--nodes=2", "--tasks-per-node=4"], ["--batch-size", "60"], 2, "does not divide by 8 ranks"),
        ([], [], 1, "run `python -m ddp_mnist.data fetch` on the login node"),
        ([], ["--data-dir", "elsewhere"], 1, "run `python -m ddp_mnist.data fetch --data-dir elsewhere` on the login"),
        (["--gpus"], [], 2, "--gpus"),
        (["--cluster=local", "--nodes=2"], [], 2, "--nodes is 2, expected 1"),
        (["--cluster=debug", "--tasks-per-node=2"], [], 2, "2 ranks were asked for, expected 1"),
        (["--nodes=0"], [], 2, "0 is not a whole number above 0"),
        (["--sbatch=requeue"], [], 2, "expected NAME=VALUE"),
    ],
)
def test_mistakes_are_found_before_anything_is_submitted(
    checkout: Path,
    fake_slurm: Callable[..., dict[str, str]],
    options: list[str],
    training: list[str],
    code: int,
    message: str,
) -> None:
    env = fake_slurm(sbatch="echo Submitted batch job 42", srun="exit 1")
    ended = submit(checkout, *options, "--", *training, DDP_MNIST_DATA="data", **env)
    assert ended.code == code
    assert message in re.sub(r"[\s│]+", " ", ended.err)
    assert "Traceback" not in ended.err
    assert not (checkout / "sbatch.calls").exists()


@pytest.mark.parametrize(
    ("program", "runs"),
    [
        ("mine.py", True),
        ("-m mine", True),
        ("-m ddp_mnist.train", True),
        ("yours.py", False),
        ("mine.py --epochs 3", False),
        ("-m yours", False),
        ("-m yours.job", False),
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


def test_without_sbatch_it_says_where_to_go(checkout: Path, flags: list[str]) -> None:
    ended = submit(checkout, "--", *flags, PATH="/nowhere")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("error: there is no sbatch on PATH: submit from a login node")


def test_an_answer_of_sbatch_that_names_no_job_is_told(
    checkout: Path, fake_slurm: Callable[..., dict[str, str]], flags: list[str]
) -> None:
    ended = submit(checkout, "--", *flags, **fake_slurm(sbatch="echo see you tomorrow", srun="exit 1"))
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith('error: Could not make sense of sbatch output "see you tomorrow')
    assert "Traceback" not in ended.err


def test_what_sbatch_says_is_passed_on_unchanged(
    checkout: Path, fake_slurm: Callable[..., dict[str, str]], flags: list[str]
) -> None:
    env = fake_slurm(sbatch="echo 'sbatch: error: no such thing' >&2; exit 1", srun="exit 1")
    ended = submit(checkout, "--", *flags, **env)
    assert (ended.code, ended.err) == (1, "sbatch: error: no such thing\n")


# How a followed job ends


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("echo 'JobId=7 JobState=RUNNING ExitCode=0:0'", None),
        ("echo 'JobId=7 JobState=PENDING ExitCode=0:0'", None),
        ("echo 'JobId=7 JobState=COMPLETED ExitCode=0:0'", 0),
        ("echo 'JobId=7 JobState=FAILED ExitCode=75:0'", 75),
        ("echo 'JobId=7 JobState=FAILED ExitCode=2:0'", 2),
        ("echo 'JobId=7 JobState=CANCELLED ExitCode=0:15'", 143),
        ("echo 'JobId=7 JobState=TIMEOUT ExitCode=0:0'", 1),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", 1),
        ("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", None),
    ],
)
def test_a_followed_job_ends_as_slurm_says(
    tmp_path: Path,
    fake_slurm: Callable[..., dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    expected: int | None,
) -> None:
    from launch.submit import slurm_outcome

    monkeypatch.setenv("PATH", fake_slurm(scontrol=answer)["PATH"])
    job: Any = SimpleNamespace(job_id="7", paths=SimpleNamespace(result_pickle=tmp_path / "none"))
    assert slurm_outcome(job) == expected


def test_ctrl_c_ends_the_following_and_not_the_job(
    checkout: Path, fake_slurm: Callable[..., dict[str, str]], flags: list[str]
) -> None:
    answer = "kill -INT $PPID; echo JobId=42 JobState=RUNNING ExitCode=0:0"
    env = fake_slurm(sbatch="echo Submitted batch job 42", srun="exit 1", scontrol=answer, scancel="")
    ended = submit(checkout, "--follow", "--", *flags, **env)
    assert (ended.code, ended.err) == (130, "\nno longer following; job 42 goes on\n")
    assert not (checkout / "scancel.calls").exists()


# What the job does before it trains


def test_only_a_jobs_first_start_is_fresh_and_the_leftover_of_a_killed_requeue_is_removed(tmp_path: Path) -> None:
    from launch.job import Job

    job = Job(("--fresh",), "python -m launch.submit --")
    (tmp_path / "7_submitted.pkl.save_tmp").touch()  # with it submitit would not requeue again
    kept = tmp_path / "7_submitted.pkl"
    kept.touch()

    def fresh(rank: int) -> bool:
        paths = SimpleNamespace(folder=tmp_path)
        env: Any = SimpleNamespace(cluster="slurm", job_id="7", global_rank=rank, num_tasks=2, paths=paths)
        config = job.config(env)
        assert config.output_dir == Path("runs/slurm-7")
        return config.fresh

    assert [fresh(0), fresh(0)] == [True, False]
    assert sorted(tmp_path.iterdir()) == [tmp_path / "7_started", kept]


@pytest.mark.parametrize(
    ("scontrol", "expected"),
    [
        ("echo 'NodeName=node1 Arch=x86_64'; echo '   NodeAddr=10.0.0.7 NodeHostName=node1'", "10.0.0.7"),
        ("echo 'Node node1 not found' >&2; exit 1", "node1"),
        (None, "node1"),
    ],
    ids=["known to SLURM", "unknown to SLURM", "no scontrol"],
)
def test_a_node_whose_name_does_not_resolve_is_met_at_the_address_that_slurm_has(
    fake_slurm: Callable[..., dict[str, str]], monkeypatch: pytest.MonkeyPatch, scontrol: str | None, expected: str
) -> None:
    from launch.job import _address

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    assert _address("127.0.0.1") == "127.0.0.1"
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setenv("PATH", fake_slurm(scontrol=scontrol)["PATH"] if scontrol else "/nowhere")
    assert _address("node1") == expected


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


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + jobs.FOREVER
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


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
        wait_for(lambda: metrics.exists() and metrics.read_text().count("\n"), process)
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


@pytest.mark.slow
def test_the_debug_executor_trains_in_this_process(
    checkout: Path, flags: list[str], run_at: Callable[[int], Path]
) -> None:
    ended = submit(checkout, "--cluster=debug", "--", *flags, "--output-dir=run", "--epochs=1")
    assert ended.code == 0, ended.err
    assert jobs.read_json(checkout / "run" / "summary.json")["test_count"] == TEST_IMAGES
    again = submit(checkout, "--cluster=debug", "--", *flags, "--output-dir=run", "--lr=0.5")
    assert again.code == 2
    assert "--lr" in again.err and "Traceback" not in again.err


@pytest.mark.slow
def test_the_debug_executor_leaves_with_75_when_stopped(checkout: Path, flags: list[str]) -> None:
    ended = submit(checkout, "--cluster=debug", "--", *flags, "--output-dir=run", "--epochs=500", "--max-minutes=0.01")
    assert ended.code == 75, ended.err
    assert "python -m launch.submit --cluster=debug --" in ended.out


# Files for `accelerate launch`


CONFIGS = sorted((ROOT / "launch").glob("*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
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
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file", str(config)]
    several = ["--main_process_ip=127.0.0.1", f"--main_process_port={jobs.free_port()}"] if processes > 1 else []
    ended = jobs.run_together(
        [
            [*launch, *several, *([f"--machine_rank={machine}"] if machines > 1 else []), str(probe)]
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
    launch = [
        str(Path(sys.executable).with_name("accelerate")),
        "launch",
        "--config_file",
        str(ROOT / "launch/cpu.yaml"),
    ]
    port = f"--main_process_port={jobs.free_port()}"
    ended = jobs.run([*launch, port, "-m", "ddp_mnist.train", *flags, "--output-dir=run"], cwd=checkout)
    assert ended.code == 0, ended.err
    assert jobs.read_json(checkout / "run" / "summary.json")["world_size"] == 2
    assert (checkout / "run" / "model.safetensors").read_bytes() == (run_at(2) / "model.safetensors").read_bytes()


# The table of a sweep


def make_run(path: Path, settings: dict[str, Any], **summary: Any) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"settings": settings}))
    if summary:
        (path / "summary.json").write_text(json.dumps(summary))
    return path


def test_the_table_has_one_row_per_run_and_the_best_first(tmp_path: Path) -> None:
    from launch.table import table

    same = {"seed": 0, "output_dir": "x", "threads": 1}
    runs = [
        make_run(
            tmp_path / "a",
            same | {"lr": 0.1, "output_dir": "a"},
            finished=True,
            test_accuracy=0.9,
            test_loss=0.3,
            steps=8,
        ),
        make_run(tmp_path / "b", same | {"lr": 0.2}, finished=True, test_accuracy=0.95, test_loss=0.21, steps=8),
        make_run(tmp_path / "c", same | {"lr": 0.3}),
        make_run(
            tmp_path / "d", same | {"lr": 0.4}, finished=False, stop_reason="SIGUSR2", test_accuracy=None, steps=3
        ),
    ]
    empty = tmp_path / "e"
    empty.mkdir()
    assert table([*runs, empty]).splitlines() == [
        "run  test accuracy  test loss  steps  lr   state",
        "b    95.00%         0.2100     8      0.2  finished",
        "a    90.00%         0.3000     8      0.1  finished",
        "c    -              -          -      0.3  no summary yet",
        "d    -              -          3      0.4  stopped: SIGUSR2",
        "e    -              -          -      -    not started",
    ]


def test_the_table_of_runs_that_are_not_there(tmp_path: Path) -> None:
    ended = jobs.run([sys.executable, "-m", "launch.table", "runs/slurm-1_*"], cwd=ROOT)
    assert (ended.code, ended.out) == (2, "")
    assert "no run directory runs/slurm-1_*" in ended.err


def test_submitit_has_no_program_of_ones_own(checkout: Path, flags: list[str]) -> None:
    ended = submit(checkout, "--cluster", "debug", "--", *flags, PROGRAM="mine.py")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("error: PROGRAM is 'mine.py', which is for slurm/train.sh")
