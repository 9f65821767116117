"""launch/: what is submitted, what is refused, how a followed job ends, local jobs, files for `accelerate launch`.

Jobs through submitit on a real SLURM are in test_slurm.py.
"""

from __future__ import annotations

import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jobs
import pytest
import yaml
from conftest import STEPS, TEST_IMAGES
from slurm_cluster import find_ranks

import launch.check
import launch.submit

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("golden") / "sbatch.txt"
SUBMIT = (sys.executable, "-m", "launch.submit")
ACCELERATE = (str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file")
Run = Callable[..., jobs.Ended]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand where a user does when submitting: in the repository's root, without data, with stand-ins for SLURM."""
    for name in ("launch", "ddp_mnist"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "mine.py").touch()
    (tmp_path / "bin").mkdir()
    fake(tmp_path, sbatch="echo Submitted batch job 42", srun="exit 1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # as `python -m` does
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    monkeypatch.delenv("DDP_MNIST_DATA", raising=False)
    return tmp_path


def fake(checkout: Path, **commands: str) -> None:
    """Put shell scripts on the PATH of `checkout`: name=script."""
    for name, script in commands.items():
        path = checkout / "bin" / name
        path.write_text(f"#!/bin/sh\necho called >>{checkout}/{name}.calls\n{script}\n")
        path.chmod(0o755)


@pytest.fixture
def run(checkout: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command of launch/ in this process, with these environment variables."""
    monkeypatch.setattr(time, "sleep", lambda _: None)

    def run(module: ModuleType, *words: str, **variables: str) -> jobs.Ended:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["command", *words])
        try:
            code = module.main()
        except SystemExit as exit:
            code = exit.code
        return jobs.Ended(code, *capfd.readouterr())

    return run


# What is submitted


def test_the_batch_script_is_the_pinned_one(checkout: Path, run: Run, flags: list[str]) -> None:
    options = ["--nodes=2", "--gpus-per-node=2", "--cpus-per-task=3", "--partition=gpu", "--time-min=90", "--mem-gb=16"]
    options += ["--sbatch=constraint=a100", "--setup=module load cuda"]
    ended = run(launch.submit, *options, "--", *flags)
    assert ended.code == 0, ended.err
    folder = checkout / "runs" / "submitit" / "42"
    text = (folder / "42_submission.sh").read_text()
    assert text.replace(sys.executable, "PYTHON").replace(str(checkout), "CHECKOUT") == GOLDEN.read_text()
    assert "job 42 on slurm, ranks: 4" in ended.out
    assert f"{folder}/42_0_log.out" in ended.out and "runs/slurm-42" in ended.out


def test_nothing_heavy_is_imported_to_submit(checkout: Path) -> None:
    code = "import launch.submit, sys; print({'torch', 'wandb', 'accelerate'} & set(sys.modules))"
    assert jobs.run([sys.executable, "-c", code]).out == "set()\n"


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
        ("--cluster=debug --tasks-per-node=2", {}, 2, "--tasks-per-node is 2, expected 1"),
        ("--nodes=0", {}, 2, "--nodes is 0, expected a whole number above 0"),
        ("-- --dataset synthetic", {"PATH": "/nowhere"}, 2, "error: there is no sbatch on PATH: submit from a login"),
        ("-- --dataset synthetic", {"PROGRAM": "mine.py"}, 2, "error: PROGRAM is 'mine.py', which is for slurm/train"),
    ],
)
def test_mistakes_are_found_before_anything_is_submitted(
    checkout: Path, run: Run, words: str, variables: dict[str, str], code: int, message: str
) -> None:
    ended = run(launch.submit, *words.split(), **variables)
    assert (ended.code, ended.out) == (code, "")
    assert message in re.sub(r"[\s│]+", " ", ended.err)
    assert not (checkout / "sbatch.calls").exists()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("echo see you tomorrow", 'error: Could not make sense of sbatch output "see you tomorrow'),
        ("echo 'sbatch: error: no such thing' >&2; exit 1", "sbatch: error: no such thing\n"),
    ],
)
def test_what_sbatch_says_is_passed_on(checkout: Path, run: Run, flags: list[str], answer: str, message: str) -> None:
    fake(checkout, sbatch=answer)
    ended = run(launch.submit, "--", *flags)
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith(message)


@pytest.mark.parametrize("program", ["yours.py", "mine.py --epochs 3", "-m yours", "-m yours.job"])
def test_a_program_that_is_not_there_is_refused(checkout: Path, run: Run, program: str) -> None:
    ended = run(launch.check, f"--program={program}", "--", "--dataset", "synthetic")
    assert ended.code == 2
    assert ended.err.startswith(f"error: PROGRAM is {program!r}, which cannot be run in {checkout}; expected ")


def test_only_our_own_program_needs_the_files_of_mnist(run: Run) -> None:
    codes = [run(launch.check, f"--program={program}", "--").code for program in ("mine.py", "-m mine")]
    assert codes == [0, 0]
    assert "the mnist files are not staged" in run(launch.check, "--", "--dataset", "mnist").err


# How a followed job ends


@pytest.mark.parametrize(
    ("answer", "code", "message"),
    [
        ("echo JobState=COMPLETED ExitCode=0:0", 0, ""),
        ("echo JobState=FAILED ExitCode=75:0", 75, "error: job 42 is FAILED, exit code 75\n"),
        ("echo JobState=CANCELLED ExitCode=0:15", 143, "error: job 42 is CANCELLED, exit code 143\n"),
        ("echo JobState=TIMEOUT ExitCode=0:0", 1, "error: job 42 is TIMEOUT, exit code 1\n"),
    ],
)
def test_a_followed_job_ends_as_slurm_says(
    checkout: Path, run: Run, flags: list[str], answer: str, code: int, message: str
) -> None:
    earlier = ["1) echo JobState=PENDING ExitCode=0:0 ;;", "2) echo Unable to contact slurm controller >&2; exit 1 ;;"]
    fake(checkout, scontrol="\n".join(["case $(wc -l <scontrol.calls) in", *earlier, f"*) {answer} ;;", "esac"]))
    ended = run(launch.submit, "--follow", "--", *flags)
    assert (ended.code, ended.err) == (code, message)


@pytest.mark.parametrize(("result", "code"), [(("success", 0), 0), (("error", "Traceback"), 1), (None, 1)])
def test_a_job_that_slurm_has_forgotten_ended_as_its_result_says(
    checkout: Path, run: Run, flags: list[str], result: tuple[str, Any] | None, code: int
) -> None:
    fake(checkout, scontrol="echo Invalid job id specified >&2; exit 1")
    folder = checkout / "runs" / "submitit" / "42"
    folder.mkdir(parents=True)
    if result is not None:
        (folder / "42_0_result.pkl").write_bytes(pickle.dumps(result))
    assert run(launch.submit, "--follow", "--", *flags).code == code


@pytest.mark.slow
def test_ctrl_c_ends_the_following_and_not_the_job(checkout: Path, flags: list[str]) -> None:
    fake(checkout, scontrol="kill -INT $PPID; echo JobState=RUNNING ExitCode=0:0", scancel="")
    ended = jobs.run([*SUBMIT, "--follow", "--", *flags])
    assert (ended.code, ended.err) == (130, "")
    assert "Ctrl-C ends that, not the job" in ended.out
    assert not (checkout / "scancel.calls").exists()


# Jobs on this machine


@pytest.mark.slow
@pytest.mark.distributed
def test_two_local_ranks_requeue_and_end_with_the_same_bits(
    checkout: Path, flags: list[str], run_at: Callable[[int], Path]
) -> None:
    """The second start does not throw away what the first one has done, though it has --fresh, too."""
    command = [*SUBMIT, "--cluster=local", "--tasks-per-node=2", "--follow", "--", *flags, "--fresh"]
    with subprocess.Popen(
        command, env=jobs.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout
        found = re.match(r"job (\d+) on local, ranks: 2", process.stdout.readline())
        assert found
        run_dir = checkout / process.stdout.readline().split()[1]
        metrics = run_dir / "metrics.jsonl"
        deadline = time.monotonic() + jobs.FOREVER
        while not (metrics.exists() and metrics.read_text()):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        ranks = find_ranks("SUBMITIT_LOCAL_GLOBALID", SUBMITIT_LOCAL_JOB_ID=found[1])
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
    ended = jobs.run([*SUBMIT, "--cluster=local", "--follow", "--", *flags, "--output-dir=taken"])
    assert ended.code == 1
    assert "error: --output-dir taken cannot be written: it is a file" in ended.out and "Traceback" not in ended.out
    assert re.search(r"^error: job \d+ is FAILED", ended.err, re.MULTILINE)


@pytest.mark.slow
def test_the_debug_executor_trains_in_this_process(checkout: Path, flags: list[str]) -> None:
    words = [*SUBMIT, "--cluster=debug", "--", *flags, "--output-dir=run"]
    stopped = jobs.run([*words, "--max-minutes=1e-6"])
    assert stopped.code == 75, stopped.err
    assert "python -m launch.submit --cluster=debug --" in stopped.out
    ended = jobs.run(words)
    assert ended.code == 0, ended.err
    assert jobs.read_json(checkout / "run" / "summary.json")["test_count"] == TEST_IMAGES


# Files for `accelerate launch`


@pytest.mark.parametrize("config", sorted((ROOT / "launch").glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.slow
@pytest.mark.distributed
def test_accelerate_starts_as_many_processes_as_the_file_says(config: Path, tmp_path: Path) -> None:
    says = yaml.safe_load(config.read_text())
    code = "import os; open(f\"{os.environ.get('RANK', 0)} of {os.environ.get('WORLD_SIZE', 1)}\", 'x')"
    (tmp_path / "probe.py").write_text(code)
    command = [*ACCELERATE, str(config), "--main_process_ip=127.0.0.1", f"--main_process_port={jobs.free_port()}"]
    machines = [[*command, f"--machine_rank={machine}", "probe.py"] for machine in range(says["num_machines"])]
    ended = jobs.run_together(machines, [jobs.environment()] * len(machines), cwd=tmp_path)
    jobs.succeeded(ended)
    # Not that stderr is empty: torch's second agent complains when the first is done before it.
    assert not any("values were not passed" in process.err for process in ended), "the file leaves something open"
    processes = says["num_processes"]
    assert {path.name for path in tmp_path.glob("* of *")} == {f"{rank} of {processes}" for rank in range(processes)}
