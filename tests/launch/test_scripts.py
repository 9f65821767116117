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
JOBS = [ROOT / "slurm" / "train.sh", ROOT / "slurm" / "sweep.sh"]
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


@pytest.mark.parametrize("job", JOBS, ids=lambda path: path.name)
def test_no_directive_is_inert_and_each_has_a_comment(job: Path) -> None:
    """SLURM reads lines that begin with exactly #SBATCH, up to the first command, and passes over the others."""
    lines = job.read_text().splitlines()
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    for number, line in enumerate(lines):
        if re.match(r"\s*#+\s*SBATCH", line):
            assert re.fullmatch(r"#SBATCH --[a-z-]+(=\S+)?", line) and number < first_command, line
            assert re.match(r"# [A-Z]", lines[number - 1]), line


def test_a_sweep_has_the_directives_of_a_job() -> None:
    train, sweep = ([line for line in job.read_text().splitlines() if line.startswith("#SBATCH")] for job in JOBS)
    assert train == sweep
    assert {"#SBATCH --signal=USR2@120", "#SBATCH --requeue", "#SBATCH --open-mode=append"} <= set(train)


SCONTROL = """#!/bin/sh
case "$2 $3" in
"hostnames n[4-5]") printf 'n4\\nn5\\n' ;;
"node n4") echo 'NodeName=n4 NodeAddr=10.1.0.4 NodeHostName=n4' ;;
*) exit 1 ;;
esac
"""


def rank_says(folder: Path, words: str, **variables: str) -> list[str]:
    """What a rank of a step on n4 and n5 of a larger job echoes; `folder` is for a stand-in for scontrol."""
    (folder / "scontrol").write_text(SCONTROL)
    (folder / "scontrol").chmod(0o755)
    step = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "n[0-9]", "SLURM_STEP_NODELIST": "n[4-5]"}
    step |= {"SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"}
    step |= {"SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    step |= {"SLURM_NTASKS": "99"}  # as a shell inside salloc leaves it
    env = OUTSIDE | step | {"PATH": f"{folder}:{os.environ['PATH']}"} | variables
    command = [ROOT / "slurm" / "rank.sh", "bash", "-c", f"echo $$ {words}"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as rank:
        pid, *said = rank.communicate()[0].split()
    assert int(pid) == rank.pid, "the command has the wrapper's process id: signals reach it"
    return said


@pytest.mark.parametrize(
    ("tasks_per_node", "node", "expected"),
    [("1", 0, 1), ("8", 0, 8), ("2(x3)", 2, 2), ("2(x3),1", 2, 2), ("2(x3),1", 3, 1), ("4,2(x10),1", 10, 2)],
)
def test_a_rank_gets_torchs_variables(tmp_path: Path, tasks_per_node: str, node: int, expected: int) -> None:
    step = {"SLURM_NODEID": str(node), "SLURM_STEP_TASKS_PER_NODE": tasks_per_node}
    said = rank_says(tmp_path, "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE", **step)
    assert said == ["5", "1", "7", str(expected)]


def test_the_ranks_of_a_step_meet_on_its_first_node(tmp_path: Path) -> None:
    def meeting(**variables: str) -> str:
        return rank_says(tmp_path, "$MASTER_ADDR:$MASTER_PORT", **variables)[0]

    first = meeting()
    assert re.fullmatch(r"10\.1\.0\.4:[123]\d{4}", first)
    assert meeting(SLURM_PROCID="1", SLURM_NODEID="1") == first
    others = [{"SLURM_STEP_ID": "1"}, {"SLURM_RESTART_COUNT": "2"}, {"SLURM_JOB_ID": "4712"}]
    assert len({first, *(meeting(**other) for other in others)}) == 4
    assert meeting(MASTER_ADDR="10.9.9.9", MASTER_PORT="12345") == "10.9.9.9:12345"


@pytest.mark.parametrize("place", [{}, {"SLURM_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "2"}], ids=["login node", "task"])
@pytest.mark.parametrize("line", ["--wandb-tags a Bob's", '--wandb-tags a "b c'])
def test_a_sweep_refuses_a_line_with_an_unmatched_quote(tmp_path: Path, place: dict[str, str], line: str) -> None:
    """xargs gives the words before it, which are flags too."""
    for name in ("slurm", "launch", "ddp_mnist"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "rates.txt").write_text(f"--lr 1e-3\n{line}\n")
    (tmp_path / "sbatch").write_text("#!/bin/sh\ntouch submitted\n")
    (tmp_path / "sbatch").chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = OUTSIDE | {"PATH": path, "SLURM_SUBMIT_DIR": str(tmp_path)} | place
    command = ["slurm/sweep.sh", "rates.txt", "--", "--dataset=synthetic"]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f'error: unmatched quote in rates.txt: {line}. Quote as in a shell: "Bob\'s"\n'
    assert not (tmp_path / "submitted").exists()


@pytest.mark.parametrize(
    ("script", "says"),
    [
        *(("train.sh", "sbatch slurm/train.sh"), ("rank.sh", "srun slurm/rank.sh python")),
        *(("meet.sh", "usage: slurm/meet.sh"), ("sweep.sh", "usage: slurm/sweep.sh")),
    ],
)
def test_outside_of_slurm_it_says_what_to_type(script: str, says: str) -> None:
    ended = subprocess.run([ROOT / "slurm" / script], env=OUTSIDE, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode != 0
    assert says in ended.stderr
