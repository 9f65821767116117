"""Shell scripts: what can be checked without running a job."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted([*ROOT.glob("slurm/*.sh"), ROOT / ".ci" / "run"])
JOBS = [ROOT / "slurm" / "train.sh", ROOT / "slurm" / "sweep.sh"]

each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
each_job = pytest.mark.parametrize("job", JOBS, ids=lambda path: path.name)


def directives(job: Path) -> list[str]:
    return [line for line in job.read_text().splitlines() if line.startswith("#SBATCH")]


@each_script
def test_bash_can_read_it(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)


@each_script
def test_shellcheck_has_nothing_to_say(script: Path) -> None:
    if shutil.which("shellcheck") is None:
        if "slurm" in os.environ.get("DDP_MNIST_REQUIRE", ""):
            pytest.fail("DDP_MNIST_REQUIRE demands shellcheck")
        pytest.skip("shellcheck is not installed")
    found = subprocess.run(["shellcheck", script], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@each_script
def test_it_can_be_run_and_stops_at_the_first_failure(script: Path) -> None:
    assert os.access(script, os.X_OK)
    assert script.read_text().startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in script.read_text()


@each_job
def test_no_directive_is_inert(job: Path) -> None:
    """SLURM reads lines that begin with exactly #SBATCH, up to the first command, and passes over the others."""
    lines = job.read_text().splitlines()
    meant = [line for line in lines if re.match(r"\s*#+\s*SBATCH", line)]
    assert meant == directives(job)
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(lines.index(line) < first_command for line in meant)
    assert all(re.fullmatch(r"#SBATCH --[a-z-]+(=\S+)?", line) for line in meant)


@each_job
def test_each_directive_has_a_comment(job: Path) -> None:
    lines = job.read_text().splitlines()
    for number, line in enumerate(lines):
        if line.startswith("#SBATCH"):
            assert re.match(r"# [A-Z]", lines[number - 1]), line


def test_a_sweep_has_the_directives_of_a_job() -> None:
    train, sweep = map(directives, JOBS)
    assert train == sweep
    assert {"#SBATCH --signal=USR2@120", "#SBATCH --requeue", "#SBATCH --open-mode=append"} <= set(train)


@pytest.mark.parametrize(
    ("tasks_per_node", "node", "expected"),
    [("1", 0, 1), ("8", 0, 8), ("2(x3)", 2, 2), ("2(x3),1", 2, 2), ("2(x3),1", 3, 1), ("4,2(x10),1", 10, 2)],
)
def test_a_rank_gets_torchs_variables(tasks_per_node: str, node: int, expected: int) -> None:
    variables = {
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NUM_TASKS": "7",
        "SLURM_NTASKS": "99",  # as a shell inside salloc leaves it
        "SLURM_NODEID": str(node),
        "SLURM_STEP_TASKS_PER_NODE": tasks_per_node,
    }
    command = [ROOT / "slurm" / "rank.sh", "bash", "-c", "echo $$ $RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE"]
    with subprocess.Popen(command, env=os.environ | variables, stdout=subprocess.PIPE, text=True) as rank:
        words = rank.communicate()[0].split()
    # The command has the wrapper's process id: signals reach it.
    assert words == [str(rank.pid), "5", "1", "7", str(expected)]


@pytest.mark.parametrize("script", ["train.sh", "rank.sh", "sweep.sh"])
def test_outside_of_slurm_it_says_what_to_type(script: str) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    ended = subprocess.run([ROOT / "slurm" / script], env=env, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode != 0
    assert {"train.sh": "sbatch slurm/train.sh", "rank.sh": "slurm/train.sh", "sweep.sh": "usage:"}[
        script
    ] in ended.stderr
