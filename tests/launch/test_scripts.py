"""Shell scripts: what can be checked without running a job."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import is_launch_variable

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted([*ROOT.glob("slurm/*.sh"), ROOT / ".ci" / "run"])
OUTSIDE = {name: value for name, value in os.environ.items() if not is_launch_variable(name)}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_it_can_be_run_and_stops_at_the_first_failure_and_shellcheck_has_nothing_to_say(script: Path) -> None:
    assert os.access(script, os.X_OK)
    assert script.read_text().startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in script.read_text()
    if shutil.which("shellcheck") is None:
        if "slurm" in os.environ.get("DDP_MNIST_REQUIRE", ""):
            pytest.fail("DDP_MNIST_REQUIRE demands shellcheck")
        pytest.skip("shellcheck is not installed")
    command = ["shellcheck", "--external-sources", script]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stdout


def test_slurm_reads_the_directives_of_the_job() -> None:
    """It reads lines that begin with exactly #SBATCH, up to the first command, and passes over the others."""
    head = (ROOT / "slurm" / "train.sh").read_text().partition("\nset -")[0].splitlines()
    assert all(line.startswith("#") for line in head if line)
    found = [line for line in head if re.fullmatch(r"#SBATCH --[a-z-]+(=\S+)?", line)]
    assert {"#SBATCH --signal=USR2@120", "#SBATCH --requeue", "#SBATCH --open-mode=append"} <= set(found)


@pytest.mark.parametrize(("on_node", "expected"), [("5", 1), ("4,5,6", 3)])
def test_a_rank_gets_torchs_variables_and_all_signals(on_node: str, expected: int) -> None:
    step = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_GTIDS": on_node}
    step |= {"SLURM_STEP_NUM_TASKS": "7", "SLURM_NTASKS": "99"}  # the latter as a shell inside salloc leaves it
    command = [ROOT / "slurm" / "rank.sh", "bash", "-c", "echo $$ $RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE"]
    env = OUTSIDE | step | {"MASTER_ADDR": "10.1.0.4"}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as rank:
        pid, *variables = rank.communicate()[0].split()
    assert variables == ["5", "1", "7", str(expected)]
    assert int(pid) == rank.pid, "the command does not have the wrapper's process id: signals miss it"


def run_at_a_site(folder: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a checkout, where sbatch prints a cluster's name too, and scontrol knows of one job."""
    for name in ("slurm", "launch", "ddp_mnist"):
        (folder / name).symlink_to(ROOT / name)
    answers = {"sbatch": "touch submitted; echo '4712;c1'", "scontrol": "echo JobId=12 Restarts=0"}
    for name, answer in answers.items():
        (folder / name).write_text(f"#!/bin/sh\n{answer}\n")
        (folder / name).chmod(0o755)
    env = OUTSIDE | {"PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"} | variables
    return subprocess.run(command, env=env, capture_output=True, text=True, cwd=folder)


def test_a_sweep_refuses_a_line_with_an_unmatched_quote(tmp_path: Path) -> None:
    (tmp_path / "rates.txt").write_text("--lr 1e-3\n--wandb-tags a Bob's\n")
    ended = run_at_a_site(tmp_path, "slurm/sweep.sh", "rates.txt", "--", "--dataset=synthetic")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "unexpected EOF while looking for matching `''" in ended.stderr
    assert ended.stderr.endswith("error: in rates.txt: --wandb-tags a Bob's\n")
    assert not (tmp_path / "submitted").exists()


def test_a_sweep_reads_comments_and_keeps_its_flags_from_the_set_up(tmp_path: Path) -> None:
    """And what it prints names the job's files, also on one of several clusters."""
    (tmp_path / "rates.txt").write_text("# rates\n--lr 1e-3  # the usual\n\n--lr 1e-2\n")
    words = ("slurm/sweep.sh", "rates.txt", "--clusters=c1", "--", "--dataset=synthetic")
    ended = run_at_a_site(tmp_path, *words, ENV_SETUP='echo "set up with $# words"')
    assert ended.returncode == 0, ended.stderr
    first, second, log, table = ended.stdout.splitlines()
    assert first == "set up with 0 words" and second.startswith("Submitted batch job 4712: 2 runs, from runs/sweep-")
    assert log.endswith("slurm-4712_<line>.out") and table.endswith("runs/slurm-4712_*")


def test_a_number_of_requeues_that_is_none_is_named_before_the_job_trains(tmp_path: Path) -> None:
    job = {"SLURM_JOB_ID": "12", "SLURM_SUBMIT_DIR": str(tmp_path), "MAX_REQUEUES": "many"}
    ended = run_at_a_site(tmp_path, "slurm/train.sh", **job)
    assert (ended.returncode, ended.stderr) == (2, "error: MAX_REQUEUES is many; expected a whole number\n")


@pytest.mark.parametrize(
    ("script", "message"),
    [
        *(("train.sh", "sbatch slurm/train.sh"), ("rank.sh", "srun slurm/rank.sh python")),
        *(("meet.sh", "usage: slurm/meet.sh"), ("sweep.sh", "usage: slurm/sweep.sh")),
    ],
)
def test_outside_of_slurm_it_says_what_to_type(script: str, message: str) -> None:
    ended = subprocess.run([ROOT / "slurm" / script], env=OUTSIDE, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode != 0
    assert message in ended.stderr
