"""slurm/ and launch/ on a real SLURM. Side by side: starting up is most of what a small job does."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import documents
import jobs
import pytest
import slurm_cluster
from conftest import write_digits
from slurm_cluster import Cluster, Job, thaw, wait_for

ROOT = Path(__file__).resolve().parents[2]
WORKERS = 6
"""Tests that run at once; most wait for imports, which two cores do not do faster in parallel."""

SHORT = ("--dataset", "fashion-mnist", "--epochs", "3", "--log-every", "5", "--no-pictures")
LONG = ("--dataset", "fashion-mnist", "--epochs", "24", "--log-every", "5", "--no-pictures")
"""384 steps: enough that a job is still training when a test that has seen its first line acts."""
EXPORT_PATH = f"export PATH={Path(sys.executable).parent}:$PATH"

pytestmark = [pytest.mark.slurm, pytest.mark.distributed, pytest.mark.timeout(900)]


class Site:
    """A user's checkout on the cluster with staged data, in which commands are typed."""

    undisturbed: dict[int, Job]
    """Runs of LONG by their number of ranks."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder, self.checkout = cluster, folder, folder / "checkout"
        self.checkout.mkdir(parents=True)
        for name in ("slurm", "launch", "ddp_mnist"):
            (self.checkout / name).symlink_to(ROOT / name)
        (self.checkout / "mine.py").write_text(own_program())
        write_digits(folder / "data", 1000, 301)
        self.env = cluster.env | {"DDP_MNIST_DATA": str(folder / "data")}

    def run(self, *command: str, **options: Any) -> str:
        return self.cluster.run(*command, **{"cwd": self.checkout, "env": self.env} | options)

    def sbatch(self, *arguments: str, cwd: Path | None = None, **env: str) -> Job:
        cwd = cwd or self.checkout
        return Job(self.cluster, self.run("sbatch", "--parsable", *arguments, cwd=cwd, env=self.env | env).strip(), cwd)

    def submitit(self, *arguments: str) -> tuple[subprocess.Popen[str], Job]:
        """Start `launch.submit --follow`. Return it and the job that it says it has submitted."""
        submission = subprocess.Popen(
            [sys.executable, "-m", "launch.submit", "--follow", *arguments],
            cwd=self.checkout, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert submission.stdout
        found = re.match(r"job (\d+) on slurm", submission.stdout.readline())
        assert found, submission.communicate()[0]
        job = Job(self.cluster, found[1], self.checkout)
        job.log_path = self.checkout / "runs" / "submitit" / job.id / f"{job.id}_0_log.out"
        return submission, job

    def typed(self, job: Job, pattern: str) -> Job:
        """Type what the log of a job says to type."""
        again = re.search(pattern, job.log, re.MULTILINE)
        assert again, job.log
        second = Job(self.cluster, self.run("bash", "-c", again[1]).split()[-1], self.checkout)
        second.run_dir = job.run_dir
        second.wait("COMPLETED")
        return second


def own_program() -> str:
    """Return the README's example with `run` in place of `fit`."""
    (code,) = [code for language, code in documents.blocks(documents.README) if language == "python"]
    parts = code.partition("config =")[0].replace("import TrainConfig, fit", "import run")
    return f"{parts}\nrun(model=network, data=lambda: (stripes(2017, seed=0), stripes(503, seed=1)))\n"


def result(job: Job) -> dict[str, Any]:
    return jobs.read_json(job.run_dir / "summary.json")


def weights(job: Job) -> bytes:
    return (job.run_dir / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    if reason := slurm_cluster.missing():
        if "slurm" in os.environ.get("DDP_MNIST_REQUIRE", ""):
            pytest.fail(f"DDP_MNIST_REQUIRE demands SLURM: {reason}")
        pytest.skip(reason)
    with Cluster() as cluster:
        yield Site(cluster, tmp_path_factory.mktemp("slurm"))


BODIES: dict[str, Callable[[Site], None]] = {}


def side_by_side(body: Callable[[Site], None]) -> Callable[[dict[str, Future[None]]], None]:
    """Run the test's body in a thread that `running` starts for all of them; the test waits for its own."""
    BODIES[body.__name__] = body

    def test(running: dict[str, Future[None]]) -> None:
        running[body.__name__].result()

    test.__name__, test.__doc__ = body.__name__, body.__doc__
    return test


@pytest.fixture(scope="module")
def running(site: Site, request: pytest.FixtureRequest) -> Iterator[dict[str, Future[None]]]:
    site.undisturbed = {ranks: site.sbatch(f"--ntasks-per-node={ranks}", "slurm/train.sh", *LONG) for ranks in (1, 2)}
    chosen = [item.name for item in request.session.items if item.name in BODIES]
    with ThreadPoolExecutor(WORKERS) as pool:
        try:
            yield {name: pool.submit(BODIES[name], site) for name in chosen}
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def assert_continued(job: Job, undisturbed: Job) -> None:
    """Assert that a LONG job was stopped on its way and ended as if it had not been."""
    undisturbed.wait("COMPLETED")
    summary, expected = result(job), result(undisturbed)
    assert expected["resumed_from"] is None and 0 < (summary["resumed_from"] or 0) < 384
    for name in ("finished", "world_size", "steps", "samples_seen"):
        assert summary[name] == expected[name]
    steps = [line["step"] for line in jobs.read_metrics(job.run_dir)]
    assert steps == sorted(set(steps))
    assert weights(job) == weights(undisturbed)


def assert_cancelled(job: Job) -> None:
    """Assert that the job has ended for good, but its ranks have saved."""
    job.wait("CANCELLED")
    wait_for(lambda: not job.ranks(), "the ranks to leave")
    found = job.show()
    assert (found["JobState"], found["Restarts"]) == ("CANCELLED", "0")
    assert list(job.run_dir.glob("checkpoints/step-*"))


# The longest first: they mostly wait.


@side_by_side
def test_a_dead_node_requeues_its_jobs(site: Site) -> None:
    """One continues on the other node. The other job has its batch script and rank 0 on the node that lives: their
    failure must not end it."""
    cluster, words = site.cluster, ["--partition=mortal", "slurm/train.sh", *LONG, "--checkpoint-every=10"]
    cluster.run("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=test")
    alone = site.sbatch(*words)
    assert alone.wait("RUNNING")["BatchHost"] == "n3"
    cluster.run("scontrol", "update", "NodeName=n2", "State=RESUME")
    spread = site.sbatch("--nodes=2", *words)
    alone.train_until_saved()
    alone.freeze()  # or it would be done before the other job has begun
    spread.train_until_saved()
    assert spread.show()["BatchHost"] == "n2"
    cluster.kill_node("n3")
    wait_for(lambda: "lost contact with another rank" in spread.log, "rank 0 to miss the dead one")
    # The controller would notice it by itself, later.
    cluster.run("scontrol", "update", "NodeName=n3", "State=DOWN", "Reason=dead")
    alone.wait_restarted()
    assert alone.wait("RUNNING")["BatchHost"] == "n2"
    cluster.start_node("n3")
    alone.wait("COMPLETED")
    assert_continued(alone, site.undisturbed[1])
    spread.wait_restarted()
    spread.wait("COMPLETED")
    assert_continued(spread, site.undisturbed[2])


@side_by_side
def test_time_limit_near(site: Site) -> None:
    """USR2 → checkpoint → requeue → the very same result, on two nodes. --fresh is for the first start."""
    job = site.sbatch("--nodes=2", "slurm/train.sh", *LONG, "--fresh")
    job.requeue(signal.SIGUSR2, "scontrol", "update", f"JobId={job.id}", "TimeLimit=2")  # USR2@120: due at once
    assert "0: stopped by SIGUSR2" in job.log, "the requeue has emptied the log"
    assert job.log.count("back into the queue (requeue 1 of at most 20)") == 1
    assert len(set(re.findall(r"meeting at \S+:(\d+)", job.log))) == 2, "the restart took the same port"
    assert_continued(job, site.undisturbed[2])


@side_by_side
def test_submitit_requeues_after_all_ranks_have_saved(site: Site) -> None:
    options = ["--nodes=2", "--partition=debug", "--time-min=30"]
    submission, job = site.submitit(*options, "--", *LONG)
    job.requeue(signal.SIGUSR2, "scancel", "--signal=USR2", job.id)
    output = submission.communicate()[0]
    assert submission.returncode == 0, output
    assert "stopped by SIGUSR2" in output and "resumed at step" in output, "the log was not followed to its end"
    assert f"python -m launch.submit {shlex.join(options)} -- --dataset fashion-mnist" in output
    assert_continued(job, site.undisturbed[2])


@side_by_side
def test_jobs_that_are_submitted_from_inside_another_job(site: Site) -> None:
    """They have a number, tasks and GPUs of their own. And submitit does not bring a cancelled job back."""
    commands = "sbatch --gpus-per-task=1 slurm/train.sh " + shlex.join(SHORT)
    commands += f"; python -m launch.submit -- {shlex.join(LONG)}"
    outer = site.sbatch("--array=7", "--ntasks=2", "--gpus-per-task=2", "--wrap", commands)
    outer = Job(site.cluster, f"{outer.id}_7", site.checkout)
    outer.wait("COMPLETED")
    batch, submitted = (Job(site.cluster, id, site.checkout) for id in re.findall(r"job (\d+)", outer.log))
    submitted.interrupt(signal.SIGTERM, "scancel", submitted.id)
    assert_cancelled(submitted)
    batch.wait("COMPLETED")
    assert (result(batch)["world_size"], result(batch)["threads"]) == (1, 1)
    assert "GPUs per node: 1" in batch.log


@side_by_side
def test_scancel_is_the_end(site: Site) -> None:
    job = site.sbatch("--nodes=2", "slurm/train.sh", *LONG)
    job.interrupt(signal.SIGTERM, "scancel", job.id)
    assert_cancelled(job)


@side_by_side
def test_a_killed_rank_fails_the_job_and_a_resubmission_continues(site: Site) -> None:
    """Rank 0, which would have noticed and said how to go on, hangs: that does not keep the job alive."""
    job = site.sbatch("--ntasks-per-node=2", "slurm/train.sh", *LONG, "--checkpoint-every=10")
    job.train_until_saved()
    os.kill(job.freeze()[1], signal.SIGKILL)
    assert job.wait("FAILED")["ExitCode"] == "137:0"
    wait_for(lambda: not job.ranks(), "the ranks to be killed")
    site.typed(job, r"^ *(sbatch --ntasks=2 slurm/train.sh .*)$")
    assert_continued(job, site.undisturbed[2])


@side_by_side
def test_a_sweep_with_one_task_requeued_alone(site: Site) -> None:
    lines = site.checkout / "lines.txt"
    lines.write_text("# rates\n\n--lr 1e-3\n  --lr 1e-2 --wandb 'disabled'\n")
    # Python is where ENV_SETUP alone finds it.
    env = site.env | {"PATH": "/usr/bin:/bin", "VIRTUAL_ENV": "", "ENV_SETUP": EXPORT_PATH}
    answer = site.run("slurm/sweep.sh", "lines.txt", "--time=30", "--signal=USR2@600", "--", *LONG, env=env)
    lines.write_text("--lr 7")  # too late to matter
    array = re.findall(r"batch job (\d+): 2 runs", answer)[0]
    tasks = [Job(site.cluster, f"{array}_{number}", site.checkout) for number in (1, 2)]
    # One task has the array's own number: requeued by that, all of them would start again.
    due_at_once = ("scontrol", "update", f"JobId={tasks[1].id}", "TimeLimit=10")
    tasks[1].interrupt(signal.SIGUSR2, *due_at_once)
    assert tasks[1].show()["JobId"] == array
    tasks[1].wait_restarted()
    site.run(*due_at_once[:-1], "TimeLimit=60")
    for task, restarts in zip(tasks, ("0", "1"), strict=True):
        assert task.wait("COMPLETED")["Restarts"] == restarts
        assert result(task)["steps"] == 384
    assert result(tasks[1])["resumed_from"] > 0

    table = site.run("bash", "-c", re.findall(r"^table  (.*)$", answer, re.MULTILINE)[0])
    rates = dict(zip((task.run_dir.name for task in tasks), ("0.001", "0.01"), strict=True))
    rows = {Path(line.split()[0]).name: line.split() for line in table.splitlines()[1:]}
    best = sorted(tasks, key=lambda task: -result(task)["test_accuracy"])
    assert list(rows) == [task.run_dir.name for task in best]
    assert all(rates[name] in row for name, row in rows.items()), table


@side_by_side
def test_a_line_of_a_sweep_once_more(site: Site) -> None:
    """Its task is submitted by hand. And a sweep over a program of one's own."""
    (site.checkout / "rates.txt").write_text("--lr 1e-3\n--lr 3e-3 --wandb-name 'the second'\n")
    again = site.sbatch("--array=2", "slurm/train.sh", "@rates.txt", *SHORT)
    (site.checkout / "own.txt").write_text("--lr 2e-3\n")
    answer = site.run("slurm/sweep.sh", "own.txt", "--", "--epochs=1", env=site.env | {"PROGRAM": "mine.py"})
    array = re.findall(r"batch job (\d+): 1 runs", answer)[0]
    runs = {f"{again.id}_2": ("fashion-mnist", 0.003, "the second", 48), f"{array}_1": ("own", 0.002, None, 32)}
    for number, expected in runs.items():
        job = Job(site.cluster, number, site.checkout)
        job.wait("COMPLETED")
        settings = jobs.read_json(job.run_dir / "config.json")["settings"]
        kind = "own" if settings["dataset"].startswith("own-") else settings["dataset"]
        assert (kind, settings["lr"], settings["wandb_name"], result(job)["steps"]) == expected


@side_by_side
def test_shapes(site: Site) -> None:
    """2x1 and 2x2, by GPUs: exact counts and the same result. And 1x1 as on a laptop."""
    words = ["--nodes=2", "slurm/train.sh", *SHORT]
    shapes = {
        # srun would refuse what it hears from sbatch of the one way to ask, beside what the script says in the other.
        "2x1": site.sbatch("--gpus-per-node=1", "--ntasks-per-gpu=1", "--cpus-per-task=2", *words, "--threads=1"),
        # One task per GPU; these share a CPU.
        "2x2": site.sbatch("--gpus-per-node=2", *words),
    }
    losses = []
    for shape, job in shapes.items():
        job.wait("COMPLETED")
        nodes, per_node = map(int, shape.split("x"))
        summary = result(job)
        assert (summary["finished"], summary["world_size"], summary["threads"]) == (True, nodes * per_node, 1), shape
        counts = [summary[name] for name in ("samples_seen", "train_count", "test_count", "steps")]
        assert counts == [3000, 1000, 301, 48], shape
        losses.append([line["train/loss"] for line in jobs.read_metrics(job.run_dir)])
        assert job.show()["NumNodes"] == str(nodes)
        assert re.search(r"^0: ", job.log, re.MULTILINE), "lines are labelled with their rank"
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert "hint: 2 ranks share 1 CPU on each node" in shapes["2x2"].log
    site.run(sys.executable, "-m", "ddp_mnist.train", *LONG, "--threads=1", "--output-dir=runs/laptop")
    site.undisturbed[1].wait("COMPLETED")
    assert (site.checkout / "runs" / "laptop" / "model.safetensors").read_bytes() == weights(site.undisturbed[1])


@side_by_side
def test_requeues_are_counted(site: Site) -> None:
    """And ENV_SETUP makes Python available where nothing else does, --cpus-per-task sets the threads, and a rank has
    the job's environment where srun would hand over next to none."""
    kept = ",".join([*site.env.keys() & {"SLURM_CONF", "HOME", "USER"}, "PATH", "ENV_SETUP", "MAX_REQUEUES"])
    job = site.sbatch(
        "--cpus-per-task=2", f"--export={kept},DDP_MNIST_DATA", "slurm/train.sh", *LONG, MAX_REQUEUES="0",
        VIRTUAL_ENV="", PATH="/usr/bin:/bin", ENV_SETUP=f"cat $NO_SUCH_VARIABLE; false; {EXPORT_PATH}",
    )  # fmt: skip
    frozen = job.freeze()
    assert re.search(rf"{job.id} .* R ", site.run("squeue", "--me"))
    assert re.search(r"^debug\* gpu:\d+ \d+$", site.run("sinfo", "-o", "%P %G %c"), re.MULTILINE)
    with subprocess.Popen(["tail", "-f", job.log_path.name], cwd=job.cwd, stdout=subprocess.PIPE, text=True) as tail:
        try:
            site.run("scancel", "--signal=TERM", job.id)
            thaw(frozen, after=signal.SIGTERM)
            assert job.wait("FAILED")["ExitCode"] == "75:0"
            assert tail.stdout and any("not requeued: MAX_REQUEUES=0 is reached" in line for line in tail.stdout)
        finally:
            tail.kill()
    assert result(job)["threads"] == 2
    assert re.search(r"^0: *sbatch --cpus-per-task=2 slurm/train\.sh .*--threads 2", job.log, re.MULTILINE), job.log


@side_by_side
def test_a_program_of_ones_own_is_requeued_to_its_end(site: Site) -> None:
    """MNIST is not staged: its data are its own."""
    job = site.sbatch("slurm/train.sh", "--epochs=12", "--log-every=5", "--no-pictures", PROGRAM="mine.py")
    job.requeue(signal.SIGTERM, "scontrol", "requeue", job.id)  # SLURM sends TERM and waits for half a minute
    summary = result(job)
    assert (summary["finished"], summary["steps"]) == (True, 12 * 32)
    assert 0 < summary["resumed_from"] < 12 * 32
    assert "is finished" in site.typed(job, r"^0: *(PROGRAM=mine\.py sbatch slurm/train\.sh .*)$").log


@side_by_side
def test_by_hand_inside_an_allocation(site: Site) -> None:
    """The doctor's ranks meet, and then those of a job, whose printed command is typed."""

    def allocated(*command: str) -> str:
        return site.run("salloc", "--nodes=2", *command, timeout=300)

    found = allocated("srun", "slurm/rank.sh", "python", "-m", "ddp_mnist.doctor")
    assert "world size 2, as WORLD_SIZE says" in found and "2 ranks met over gloo" in found
    train = ["srun", "slurm/rank.sh", "python", "-m", "ddp_mnist.train", *SHORT, "--max-steps=5"]
    again = re.search(r"^ *(srun .*)$", allocated(*train), re.MULTILINE)
    assert again
    run_dir = site.checkout / again[1].partition("--output-dir ")[2].split()[0]
    allocated("bash", "-c", again[1])
    summary = jobs.read_json(run_dir / "summary.json")
    assert (summary["finished"], summary["world_size"], summary["resumed_from"]) == (True, 2, 5)


@side_by_side
def test_mistakes_fail_before_any_rank_starts(site: Site) -> None:
    """Each with its code and its message in the log."""
    bare = site.folder / "bare"
    bare.mkdir()
    (bare / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # without site-packages
    (bare / "python").chmod(0o755)
    cases = [
        (["slurm/train.sh", "--epochz", "3"], {}, "2:0", "--epochz"),
        (["--nodes=2", "slurm/train.sh", "--batch-size=63", *SHORT], {}, "2:0", "does not divide by 2 ranks"),
        (["--nodes=2", "--gpus=3", "slurm/train.sh", *SHORT], {}, "2:0", "ask with --gpus-per-node"),
        (["slurm/train.sh"], {"DDP_MNIST_DATA": "nowhere"}, "1:0", "the mnist files are not staged"),
        (["slurm/train.sh", *SHORT], {"ENV_SETUP": f"PATH={bare}:$PATH"}, "1:0", "not importable on"),
        (["slurm/train.sh", *SHORT], {"PROGRAM": "nowhere.py"}, "2:0", "PROGRAM is 'nowhere.py'"),
    ]
    sent = [(site.sbatch(*arguments, **env), code, message) for arguments, env, code, message in cases]
    elsewhere = site.sbatch(str(site.checkout / "slurm" / "train.sh"), cwd=bare)
    for job, code, message in [*sent, (elsewhere, "2:0", "submit from there")]:
        assert job.wait("FAILED")["ExitCode"] == code, job.log
        assert message in job.log
        assert not re.search(r"^\d: ", job.log, re.MULTILINE), "a rank was started"


@side_by_side
def test_submitit_says_that_a_node_cannot_import_the_package(site: Site) -> None:
    submission, _ = site.submitit("--setup=cd /", "--", *SHORT)
    output = submission.communicate()[0]
    assert submission.returncode == 1
    assert "error: keep this repository and its Python on a disk that all nodes share" in output
    assert "Traceback" not in output
