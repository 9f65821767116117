"""slurm/ and launch/ on a real SLURM with two nodes. Side by side: starting up is most of what a small job does."""

from __future__ import annotations

import functools
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import documents
import jobs
import pytest
import slurm_cluster
from conftest import write_digits
from slurm_cluster import Cluster, Job, thaw, wait_for

ROOT = Path(__file__).resolve().parents[2]
WORKERS = 4
"""Tests that run at once; most wait for imports, which two cores do not do faster in parallel."""

SHORT = ("--dataset", "fashion-mnist", "--epochs", "3", "--log-every", "5", "--no-pictures")
LONG = ("--dataset", "fashion-mnist", "--epochs", "40", "--log-every", "5", "--no-pictures")
"""640 steps: enough that a job is still training when a test that has seen its first line acts."""

pytestmark = [pytest.mark.slurm, pytest.mark.distributed, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Site:
    """What a user of the cluster has: the cluster, and a checkout with staged data."""

    cluster: Cluster
    checkout: Path
    data: Path

    def sbatch(self, *arguments: str, **env: str) -> Job:
        return self.cluster.submit(*arguments, cwd=self.checkout, DDP_MNIST_DATA=str(self.data), **env)


def result(job: Job) -> dict[str, Any]:
    return jobs.read_json(job.run_dir / "summary.json")


def weights(job: Job) -> bytes:
    return (job.run_dir / "model.safetensors").read_bytes()


def own_program() -> str:
    """The README's example with `run` in place of `fit`."""
    (code,) = [code for language, code in documents.blocks(documents.README) if language == "python"]
    parts = code.partition("config =")[0].replace("import TrainConfig, fit", "import run")
    return f"{parts}\nrun(model=network, data=lambda: (stripes(2017, seed=0), stripes(503, seed=1)))\n"


def make_site(cluster: Cluster, folder: Path) -> Site:
    checkout, data = folder / "checkout", folder / "data"
    checkout.mkdir(parents=True)
    for name in ("slurm", "launch", "ddp_mnist"):
        (checkout / name).symlink_to(ROOT / name)
    (checkout / "mine.py").write_text(own_program())
    write_digits(data, 1000, 301)
    return Site(cluster, checkout, data)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    if reason := slurm_cluster.missing():
        if "slurm" in os.environ.get("DDP_MNIST_REQUIRE", ""):
            pytest.fail(f"DDP_MNIST_REQUIRE demands SLURM: {reason}")
        pytest.skip(reason)
    with Cluster() as cluster:
        yield make_site(cluster, tmp_path_factory.mktemp("slurm"))


Body = Callable[[Site], None]
BODIES: dict[str, Body] = {}


def side_by_side(body: Body) -> Callable[[dict[str, Future[None]]], None]:
    """The test's body runs in a thread that `running` starts for all of them; the test waits for its own."""
    BODIES[body.__name__] = body

    def test(running: dict[str, Future[None]]) -> None:
        running[body.__name__].result()

    test.__name__, test.__doc__ = body.__name__, body.__doc__
    return test


@pytest.fixture(scope="module")
def running(site: Site, request: pytest.FixtureRequest) -> Iterator[dict[str, Future[None]]]:
    chosen = [item.name for item in request.session.items if item.name in BODIES]
    with ThreadPoolExecutor(WORKERS) as pool:
        futures = {name: pool.submit(BODIES[name], site) for name in chosen}
        try:
            yield futures
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_locks = {ranks: threading.Lock() for ranks in (1, 2)}


@functools.cache
def _uninterrupted(site: Site, ranks: int) -> bytes:
    job = site.sbatch(f"--ntasks-per-node={ranks}", "slurm/train.sh", *LONG)
    job.wait("COMPLETED")
    assert result(job)["resumed_from"] is None
    return weights(job)


def uninterrupted(site: Site, ranks: int) -> bytes:
    """The final weights of a LONG run that nobody disturbed."""
    with _locks[ranks]:  # one run for all who ask
        return _uninterrupted(site, ranks)


def assert_continued(site: Site, job: Job, ranks: int) -> None:
    """The job was stopped on its way and ended as if it had not been."""
    summary = result(job)
    assert summary["finished"] and summary["world_size"] == ranks
    assert 0 < summary["resumed_from"] < 640 == summary["steps"]
    assert summary["samples_seen"] == 40 * 1000
    steps = [line["step"] for line in jobs.read_metrics(job.run_dir)]
    assert steps == sorted(set(steps))
    assert weights(job) == uninterrupted(site, ranks)


def assert_cancelled(job: Job) -> None:
    """The job has ended for good, but its ranks have saved."""
    job.wait("CANCELLED")
    wait_for(lambda: not job.ranks(), "the ranks to leave")
    assert (job.state, job.show()["Restarts"]) == ("CANCELLED", "0")
    assert list(job.run_dir.glob("checkpoints/step-*"))


def typed(site: Site, job: Job, pattern: str) -> Job:
    """What the log says to type, typed."""
    again = re.search(pattern, job.log, re.MULTILINE)
    assert again, job.log
    env = site.cluster.env | {"DDP_MNIST_DATA": str(site.data)}
    answer = site.cluster.run("bash", "-c", again[1], cwd=site.checkout, env=env)
    second = Job(site.cluster, answer.split()[-1], site.checkout)
    second.run_dir = job.run_dir
    second.wait("COMPLETED")
    return second


# The longest first: they mostly wait.


@side_by_side
def test_a_dead_node_requeues_the_job_and_the_run_continues_on_another(site: Site) -> None:
    with Cluster(dead_after=20) as cluster:  # of its own: the other tests need their nodes alive
        doomed = make_site(cluster, site.checkout.parent / "doomed-1")
        job = doomed.sbatch("slurm/train.sh", *LONG, "--checkpoint-every=10")
        job.train_until_saved()
        first = job.show()["BatchHost"]
        cluster.kill_node(first)
        job.wait_restarted()
        job.wait("COMPLETED")
        assert job.show()["BatchHost"] != first
        assert_continued(site, job, 1)


@side_by_side
def test_a_dead_node_of_two_requeues_the_job(site: Site) -> None:
    """The batch script and rank 0 are on the other one, which lives: their failure must not end the job."""
    with Cluster(dead_after=20) as cluster:
        doomed = make_site(cluster, site.checkout.parent / "doomed-2")
        job = doomed.sbatch("--nodes=2", "slurm/train.sh", *LONG, "--checkpoint-every=10")
        job.train_until_saved()
        assert job.show()["BatchHost"] == "n0"
        cluster.kill_node("n1")
        job.wait_restarted()
        assert "lost contact with another rank" in job.log
        cluster.start_node("n1")
        job.wait("COMPLETED")
        assert_continued(site, job, 2)


@side_by_side
def test_time_limit_near(site: Site) -> None:
    """USR2 → checkpoint → requeue → the very same result, on two nodes."""
    job = site.sbatch("--nodes=2", "slurm/train.sh", *LONG)
    job.requeue(signal.SIGUSR2, "scontrol", "update", f"JobId={job.id}", "TimeLimit=2")  # USR2@120: due at once
    assert "0: stopped by SIGUSR2" in job.log, "the requeue has emptied the log"
    assert job.log.count("back into the queue (requeue 1 of at most 20)") == 1
    assert len(set(re.findall(r"meeting at \S+:(\d+)", job.log))) == 2, "the restart took the same port"
    assert_continued(site, job, 2)


@side_by_side
def test_term_requeues_and_fresh_is_for_the_first_start(site: Site) -> None:
    job = site.sbatch("--ntasks-per-node=2", "slurm/train.sh", *LONG, "--fresh")
    job.requeue(signal.SIGTERM, "scancel", "--signal=TERM", job.id)
    assert "0: stopped by SIGTERM" in job.log
    assert_continued(site, job, 2)


@side_by_side
def test_scontrol_requeue_while_running(site: Site) -> None:
    job = site.sbatch("slurm/train.sh", *LONG)
    job.requeue(signal.SIGTERM, "scontrol", "requeue", job.id)  # SLURM sends TERM and waits for half a minute
    assert_continued(site, job, 1)


@side_by_side
def test_submitit_requeues_after_all_ranks_have_saved(site: Site) -> None:
    options = ["--nodes=2", "--partition=debug", "--time-min=30"]
    submission = start(site, "launch.submit", *options, "--follow", "--", *LONG)
    job = submitted(site, submission)
    job.requeue(signal.SIGUSR2, "scancel", "--signal=USR2", job.id)
    output = submission.communicate()[0]
    assert submission.returncode == 0, output
    assert "stopped by SIGUSR2" in output and "resumed at step" in output, "the log was not followed to its end"
    assert f"python -m launch.submit {shlex.join(options)} -- --dataset fashion-mnist" in output
    assert_continued(site, job, 2)


@side_by_side
def test_submitit_does_not_bring_a_cancelled_job_back(site: Site) -> None:
    submission = start(site, "launch.submit", "--follow", "--", *LONG)
    job = submitted(site, submission)
    job.interrupt(signal.SIGTERM, "scancel", job.id)
    output = submission.communicate()[0]
    assert submission.returncode != 0 and "CANCELLED" in output
    assert_cancelled(job)


@side_by_side
def test_scancel_is_the_end(site: Site) -> None:
    job = site.sbatch("--ntasks-per-node=2", "slurm/train.sh", *LONG)
    job.interrupt(signal.SIGTERM, "scancel", job.id)
    assert_cancelled(job)


@side_by_side
def test_one_killed_rank_fails_the_job_and_a_resubmission_continues(site: Site) -> None:
    job = site.sbatch("--ntasks-per-node=2", "slurm/train.sh", *LONG, "--checkpoint-every=10")
    job.train_until_saved()
    os.kill(job.ranks()[0], signal.SIGKILL)  # which would have said how to go on
    assert job.wait("FAILED")["ExitCode"] == "137:0"
    assert_continued(site, typed(site, job, r"^ *(sbatch --ntasks=2 slurm/train.sh .*)$"), 2)


@side_by_side
def test_a_rank_that_hangs_does_not_keep_a_failed_job_alive(site: Site) -> None:
    job = site.sbatch("--ntasks-per-node=2", "slurm/train.sh", *LONG)
    frozen = job.freeze()  # rank 0 notices nothing
    os.kill(frozen[1], signal.SIGKILL)
    assert job.wait("FAILED")["ExitCode"] == "137:0"
    wait_for(lambda: not job.ranks(), "the ranks to be killed")


@side_by_side
def test_a_sweep_with_one_task_requeued_alone(site: Site) -> None:
    lines = site.checkout / "lines.txt"
    lines.write_text("# rates\n\n--lr 1e-3\n  --lr 1e-2 --wandb 'disabled'\n--lr 3e-3\n")
    python = Path(sys.executable).parent  # where ENV_SETUP alone finds it
    env = site.cluster.env | {"DDP_MNIST_DATA": str(site.data), "PATH": "/usr/bin:/bin", "VIRTUAL_ENV": ""}
    env["ENV_SETUP"] = f"export PATH={python}:$PATH"
    answer = site.cluster.run("slurm/sweep.sh", "lines.txt", "--time=30", "--", *LONG, cwd=site.checkout, env=env)
    lines.write_text("--lr 7")  # too late to matter
    array = re.findall(r"batch job (\d+): 3 runs", answer)[0]
    tasks = [Job(site.cluster, f"{array}_{number}", site.checkout) for number in (1, 2, 3)]
    # One task has the array's own number: requeued by that, all of them would start again.
    tasks[2].interrupt(signal.SIGTERM, "scancel", "--signal=TERM", tasks[2].id)
    assert tasks[2].show()["JobId"] == array
    tasks[2].wait_restarted()
    for task in tasks:
        task.wait("COMPLETED")
        assert result(task)["steps"] == 640
    assert [task.show()["Restarts"] for task in tasks] == ["0", "0", "1"]
    assert result(tasks[2])["resumed_from"] > 0

    command = re.findall(r"^table  (.*)$", answer, re.MULTILINE)[0]
    table = site.cluster.run("bash", "-c", command, cwd=site.checkout)
    rates = {task.run_dir.name: rate for task, rate in zip(tasks, ("0.001", "0.01", "0.003"), strict=True)}
    best = sorted(tasks, key=lambda task: -result(task)["test_accuracy"])
    found = [(task.run_dir.name, rates[task.run_dir.name]) for task in best]
    rows = [line.split() for line in table.splitlines()[1:]]
    assert [row[0] for row in rows] == [name for name, _ in found]
    assert all(rate in row for row, (_, rate) in zip(rows, found, strict=True)), table


@side_by_side
def test_a_line_of_a_sweep_once_more(site: Site) -> None:
    """Its task is submitted by hand. And a sweep over a program of one's own."""
    (site.checkout / "rates.txt").write_text("--lr 1e-3\n# lower\n--lr 3e-3 --wandb-name 'the second'\n")
    again = site.sbatch("--array=2", "slurm/sweep.sh", "rates.txt", "--", *SHORT)
    (site.checkout / "own.txt").write_text("--lr 2e-3\n")
    env = site.cluster.env | {"PROGRAM": "mine.py"}
    answer = site.cluster.run("slurm/sweep.sh", "own.txt", "--", "--epochs=1", cwd=site.checkout, env=env)
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
    """1x1, 1x2, 2x1 and 2x2: exact counts and the same result."""
    shapes = {
        "1x1": site.sbatch("slurm/train.sh", *SHORT),
        "1x2": site.sbatch("--ntasks-per-node=2", "slurm/train.sh", *SHORT),
        "2x1": site.sbatch("--nodes=2", "--cpus-per-task=2", "slurm/train.sh", *SHORT, "--threads=1"),
        # One task per GPU; these share a CPU.
        "2x2": site.sbatch("--nodes=2", "--gpus-per-node=2", "slurm/train.sh", *SHORT),
    }
    # srun would refuse what it hears from sbatch of the one way to ask, beside what the script says in the other.
    by_gpu = site.sbatch("--gpus-per-node=2", "--ntasks-per-gpu=1", "slurm/train.sh", *SHORT)
    losses = {}
    for shape, job in shapes.items():
        job.wait("COMPLETED")
        nodes, per_node = map(int, shape.split("x"))
        summary = result(job)
        assert (summary["finished"], summary["world_size"], summary["threads"]) == (True, nodes * per_node, 1), shape
        counts = [summary[name] for name in ("samples_seen", "train_count", "test_count", "steps")]
        assert counts == [3000, 1000, 301, 48], shape
        losses[shape] = [line["train/loss"] for line in jobs.read_metrics(job.run_dir)]
        assert losses[shape] == pytest.approx(losses["1x1"], abs=1e-4), shape
        assert job.show()["NumNodes"] == str(nodes)
        assert re.search(r"^0: ", job.log, re.MULTILINE), "lines are labelled with their rank"
    by_gpu.wait("COMPLETED")
    assert result(by_gpu)["world_size"] == 2
    assert weights(shapes["1x2"]) == weights(shapes["2x1"])
    assert "hint: 2 ranks share 1 CPU on each node" in shapes["2x2"].log
    # And as on a laptop.
    laptop = site.checkout / "runs" / "laptop"
    env = site.cluster.env | {"DDP_MNIST_DATA": str(site.data)}
    command = [sys.executable, "-m", "ddp_mnist.train", *SHORT, "--threads=1", "--output-dir", str(laptop)]
    site.cluster.run(*command, cwd=site.checkout, env=env)
    assert (laptop / "model.safetensors").read_bytes() == weights(shapes["1x1"])


@side_by_side
def test_two_jobs_on_the_same_nodes_at_once(site: Site) -> None:
    both = [site.sbatch("--nodes=2", "slurm/train.sh", *LONG) for _ in range(2)]
    frozen = [job.freeze() for job in both]
    assert [(job.state, job.show()["NodeList"]) for job in both] == [("RUNNING", "n[0-1]")] * 2
    for pids in frozen:
        thaw(pids)
    for job in both:
        job.wait("COMPLETED")
        assert weights(job) == uninterrupted(site, 2)


@side_by_side
def test_requeues_are_counted(site: Site) -> None:
    """And ENV_SETUP makes Python available where nothing else does, --cpus-per-task sets the threads, and a rank has
    the job's environment where srun would hand over next to none."""
    kept = ",".join([*site.cluster.env.keys() & {"SLURM_CONF", "HOME", "USER"}, "PATH", "ENV_SETUP", "MAX_REQUEUES"])
    job = site.sbatch(
        "--cpus-per-task=2", f"--export={kept},DDP_MNIST_DATA", "slurm/train.sh", *LONG,
        MAX_REQUEUES="0", VIRTUAL_ENV="", PATH="/usr/bin:/bin",
        ENV_SETUP=f"cat $NO_SUCH_VARIABLE; false; export PATH={Path(sys.executable).parent}:$PATH",
    )  # fmt: skip
    frozen = job.freeze()
    assert re.search(rf"{job.id} .* R ", site.cluster.run("squeue", "--me"))
    assert re.search(r"^debug\* gpu:\d+ \d+$", site.cluster.run("sinfo", "-o", "%P %G %c"), re.MULTILINE)
    with subprocess.Popen(["tail", "-f", job.log_path.name], cwd=job.cwd, stdout=subprocess.PIPE, text=True) as tail:
        try:
            site.cluster.run("scancel", "--signal=TERM", job.id)
            thaw(frozen, after=signal.SIGTERM)
            assert job.wait("FAILED")["ExitCode"] == "75:0"
            assert tail.stdout and any("not requeued: MAX_REQUEUES=0 is reached" in line for line in tail.stdout)
        finally:
            tail.kill()
    assert result(job)["threads"] == 2
    assert re.search(r"^0: *sbatch --cpus-per-task=2 slurm/train\.sh .*--threads 2", job.log, re.MULTILINE), job.log


@side_by_side
def test_a_program_of_ones_own_is_requeued_to_its_end(site: Site) -> None:
    """MNIST is not staged: its data are its own. And with another --signal than the script's."""
    options, flags = ["--nodes=2", "--time=30", "--signal=USR2@600"], ["--epochs=40", "--log-every=5", "--no-pictures"]
    job = site.sbatch(*options, "slurm/train.sh", *flags, PROGRAM="mine.py")
    job.requeue(signal.SIGUSR2, "scontrol", "update", f"JobId={job.id}", "TimeLimit=10")  # USR2@600: due at once
    summary = result(job)
    assert (summary["finished"], summary["world_size"], summary["steps"]) == (True, 2, 40 * 32)
    assert 0 < summary["resumed_from"] < 40 * 32
    assert "is finished" in typed(site, job, r"^0: *(PROGRAM=mine\.py sbatch --nodes=2 slurm/train\.sh .*)$").log


@side_by_side
def test_by_hand_inside_an_allocation(site: Site) -> None:
    """The doctor's ranks meet, and then those of a job, whose printed command is typed."""
    env = site.cluster.env | {"DDP_MNIST_DATA": str(site.data)}

    def allocated(*command: str) -> str:
        return site.cluster.run("salloc", "--nodes=2", *command, cwd=site.checkout, env=env, timeout=300)

    found = allocated("srun", "slurm/rank.sh", "python", "-m", "ddp_mnist.doctor")
    assert "2 ranks: slurm/rank.sh has set WORLD_SIZE=2" in found
    assert "2 ranks met over gloo" in found
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
    empty = site.checkout.parent / "empty"
    empty.mkdir()
    bare = site.checkout.parent / "bare"
    bare.mkdir()
    (bare / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # without site-packages
    (bare / "python").chmod(0o755)
    fetch = "the mnist files are not staged"
    cases = [
        (["slurm/train.sh", "--epochz", "3"], {}, "2:0", "--epochz"),
        (["--nodes=2", "slurm/train.sh", "--batch-size=63", *SHORT], {}, "2:0", "does not divide by 2 ranks"),
        (["--nodes=2", "--gpus=3", "slurm/train.sh", *SHORT], {}, "2:0", "ask with --gpus-per-node"),
        (["slurm/train.sh"], {"DDP_MNIST_DATA": str(empty)}, "1:0", fetch),
        (["slurm/train.sh", *SHORT], {"ENV_SETUP": f"PATH={bare}:$PATH"}, "1:0", "not importable on"),
        (["slurm/train.sh", *SHORT], {"PROGRAM": "nowhere.py"}, "2:0", "PROGRAM is 'nowhere.py'"),
    ]
    sent = [
        site.cluster.submit(*arguments, cwd=site.checkout, **({"DDP_MNIST_DATA": str(site.data)} | env))
        for arguments, env, _, _ in cases
    ]
    for job, (_, _, code, message) in zip(sent, cases, strict=True):
        assert job.wait("FAILED")["ExitCode"] == code, job.log
        assert message in job.log
        assert not re.search(r"^\d: ", job.log, re.MULTILINE), "a rank was started"
    elsewhere = site.cluster.submit(str(site.checkout / "slurm" / "train.sh"), cwd=bare)
    assert elsewhere.wait("FAILED")["ExitCode"] == "2:0"
    assert "submit from there" in elsewhere.log


@side_by_side
def test_submitit_passes_on_what_slurm_and_a_node_say(site: Site) -> None:
    """A partition that is not there, and a node that cannot import the package."""
    cases = {"--partition=nope": "invalid partition", "--setup=cd /": "cannot import this repository in / with"}
    for option, message in cases.items():
        submission = start(site, "launch.submit", option, "--follow", "--", *SHORT)
        output = submission.communicate()[0]
        assert submission.returncode == 1
        assert message in output


def start(site: Site, *command: str) -> subprocess.Popen[str]:
    env = site.cluster.env | {"DDP_MNIST_DATA": str(site.data)}
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=site.checkout, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def submitted(site: Site, submission: subprocess.Popen[str]) -> Job:
    """The job that `launch.submit` says it has submitted."""
    assert submission.stdout
    line = submission.stdout.readline()
    found = re.match(r"job (\d+) on slurm", line)
    assert found, line + submission.communicate()[0]
    job = Job(site.cluster, found[1], site.checkout)
    job.log_path = site.checkout / "runs" / "submitit" / job.id / f"{job.id}_0_log.out"
    return job
