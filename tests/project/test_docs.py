"""The documents say what is true: each command in them is run, here or by the file named here, links lead somewhere,
flags exist, and figures are those of the benchmark's file."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import documents
import jobs
import pytest
import yaml
from documents import DOCUMENTS, README, ROOT

# Run here, by bash, where a user would stand: (what it prints, what `tiny` and two cores put in place of its words).
TRAINED = "wrote runs/"
PORT = ("accelerate launch", "accelerate launch --main_process_port PORT")
TINY = ("ddp_mnist.train", "ddp_mnist.train FLAGS")
DIGITS = " --dataset fashion-mnist"
HERE: dict[str, tuple[str, dict[str, str]]] = {
    "make train": ("-m ddp_mnist.train", {"make": "make --dry-run"}),
    "python -m ddp_mnist.train": (TRAINED, dict([TINY])),
    "torchrun --nproc-per-node 2 -m ddp_mnist.train": (TRAINED, dict([TINY])),
    "accelerate launch --config_file launch/cpu.yaml -m ddp_mnist.train": (TRAINED, dict([TINY, PORT])),
    "accelerate launch --multi_gpu --num_processes 4 -m ddp_mnist.train": (TRAINED, dict([TINY, PORT, (" 4", " 2")])),
    "accelerate launch mine.py": ("wrote runs/mine", dict([PORT])),
    "torchrun --nproc-per-node 2 mine.py": ("wrote runs/mine", {}),
    "python -m ddp_mnist.data fetch": ("ok", {"fetch": f"fetch{DIGITS}"}),
    "python -m ddp_mnist.data verify": ("ok", {"verify": f"verify{DIGITS}"}),
    "python -m ddp_mnist.report runs/*-fast --output compare": ("compare/report.html", {}),
    "python -m ddp_mnist.evaluate runs/fast": ("Checking accuracy on test data", {}),
    "python -m ddp_mnist.predict runs/fast photo.png": ("photo.png", {}),
    "torchrun --nproc-per-node 4 -m ddp_mnist.doctor": ("ok ", {" 4": " 2", "doctor": f"doctor{DIGITS}"}),
    "source .venv/bin/activate": ("", {}),
    "export DDP_MNIST_DATA=/scratch/data": ("", {}),
    "export SBATCH_PARTITION=gpu SBATCH_ACCOUNT=me": ("", {}),
    "export GLOO_SOCKET_IFNAME=... NCCL_SOCKET_IFNAME=...": ("", {}),
    "cat rates.txt": ("--lr 3e-3", {}),
}
MAKE_FAST = 'make train ARGS="--recipe fast --epochs 2 --output-dir runs/fast"'
TWO_MACHINES = (
    "accelerate launch --multi_gpu --num_machines 2 --num_processes 8 --machine_rank 0 --main_process_ip 10.0.0.1 "
    "--main_process_port 29400 -m ddp_mnist.train --output-dir runs/two-machines"
)
# Run by a file, which has the flags.
ELSEWHERE = {
    "tests/project/test_docs.py": {
        *(MAKE_FAST, "python -m ddp_mnist.train --help", "python -m launch.submit --help"),
        TWO_MACHINES,  # as it stands in README, by tests/distributed/test_two_machines.py
    },
    ".ci/run": {
        *("make install", "make install check", "make test", "make check", "make fast", "make coverage faults"),
        "make test PYTEST_ARGS=tests/data/test_data.py",
    },
    "tests/project/test_benchmarks.py": {
        *("make bench", 'make bench ARGS="--quick"', "python benchmarks/run.py"),
        'make bench ARGS="--rows step,ranks --json benchmarks/results"',
    },
    "tests/project/test_package.py": {"pip install .", ".venv/bin/pre-commit install"},
    "tests/doctor/test_doctor.py": {
        *("python -m ddp_mnist.doctor", "python -m ddp_mnist.doctor --recipe fast"),
        "accelerate launch --cpu --num_processes 2",
    },
    "tests/training/test_own.py": {
        "torchrun --nproc-per-node 2 mine.py --workers 2 --batch-size 16 --epochs 2 --output-dir runs/mine",
    },
    "tests/report/test_report.py": {
        *("python -m ddp_mnist.report runs/fast", "python -m ddp_mnist.report runs/slurm-<job>"),
    },
    "tests/wandb_mirror/test_mirror.py": {"wandb sync", "wandb leet runs/fast/wandb"},
    "tests/launch/test_slurm.py": {
        "srun slurm/rank.sh python -m ddp_mnist.doctor",
        "sbatch slurm/train.sh",
        "sbatch --gpus-per-node=1 slurm/train.sh --recipe fast",
        "sbatch --gpus-per-node=8 --cpus-per-gpu=4 slurm/train.sh",
        "sbatch --nodes=4 --gpus-per-node=8 --cpus-per-gpu=4 slurm/train.sh --epochs 20",
        "sbatch --nodes=2 --ntasks-per-node=4 --cpus-per-task=2 slurm/train.sh",
        'ENV_SETUP="module load python/3.11; source ~/envs/ddp/bin/activate" sbatch slurm/train.sh',
        'ENV_SETUP="source ~/miniforge3/etc/profile.d/conda.sh; conda activate ddp" sbatch slurm/train.sh',
        *("sbatch --time=30 slurm/train.sh", "sbatch --signal=USR2@600"),
        *("PROGRAM=mine.py sbatch slurm/train.sh", "PROGRAM=mine.py sbatch slurm/train.sh --epochs 20"),
        "PROGRAM=mine.py slurm/sweep.sh rates.txt",
        "slurm/sweep.sh rates.txt --gpus-per-node=1 -- --epochs 3",
        "sbatch --array=2 --gpus-per-node=1 slurm/train.sh @runs/sweep-20240229-120000-x7Qa.txt --epochs 3",
        *("squeue --me", 'sinfo -o "%P %G %c"', "tail -f slurm-<job>.out", "scontrol show job <job>"),
        *("scontrol requeue <job>", "scancel --signal=TERM <job>", "scancel <job>"),
    },
    "tests/distributed/test_launchers.py": {"torchrun --max-restarts"},
    "tests/launch/test_launch.py": {
        "python -m launch.submit --sbatch NAME=VALUE",
        "python -m launch.submit --nodes 2 --gpus-per-node 8 --cpus-per-task 4 --partition gpu --follow "
        "-- --recipe fast",
    },
}
# Not run: those that take a GPU, and names of programs.
NOT_RUN = {"make gpu", "make gpu BIN=/path/to/env/bin", "accelerate launch", "accelerate launch --config_file"}

FOUND = {command for document in DOCUMENTS for command in documents.commands(document)}


def test_every_command_is_run_or_it_is_known_why_not() -> None:
    assert set(HERE).union(NOT_RUN, *ELSEWHERE.values()) == FOUND
    languages = {language for document in DOCUMENTS for language, _ in documents.blocks(document)}
    assert languages == {"python", "text", "console"}, "of other blocks no command is seen"


@pytest.fixture
def checkout(tmp_path: Path, run_at: Callable[[int], Path], tiny: Path) -> Callable[..., jobs.Ended]:
    """Stand where a user does after `make install` and a few runs; return what runs a line there, as bash does."""
    from PIL import Image

    folder, venv = tmp_path / "checkout", tmp_path / "checkout" / ".venv"
    venv.mkdir(parents=True)
    for name in ("ddp_mnist", "launch", "slurm", "docs", "Makefile", "pyproject.toml", "constraints.txt"):
        (folder / name).symlink_to(ROOT / name)
    for path in Path(sys.prefix).iterdir():
        if path.name != ".installed":
            (venv / path.name).symlink_to(path)
    (venv / ".installed").touch()  # newer than what it follows from: make installs nothing
    for name in ("runs/fast", "runs/20260101-120000-fast", "runs/20260101-130000-fast"):
        shutil.copytree(run_at(1), folder / name)
    image = Image.new("L", (90, 120), 255)
    image.paste(0, (40, 20, 50, 100))
    image.save(folder / "photo.png")
    (folder / "mine.py").write_text(documents.blocks(README, "python")[0][1])
    ((_, console),) = documents.blocks(ROOT / "docs/cluster.md", "console")
    (folder / "rates.txt").write_text(console.partition("$ cat rates.txt\n")[2].partition("\n\n")[0] + "\n")

    flags = "--dataset fashion-mnist --threads 1 --no-pictures --batch-size 60 --epochs 1"

    def run(command: str, swap: dict[str, str] | None = None) -> jobs.Ended:
        for old, new in ((swap or {}) | {"FLAGS": flags, "PORT": str(jobs.free_port())}).items():
            assert old in command or old in ("FLAGS", "PORT"), old
            command = command.replace(old, new)
        environment = {
            "PATH": f"{venv / 'bin'}:{os.environ['PATH']}",
            "DDP_MNIST_DATA": str(tiny),
            "OMP_WAIT_POLICY": "passive",  # threads that spin make a busy machine many times slower
            "PET_MASTER_PORT": str(jobs.free_port()),  # torchrun's --master-port
            "ACCELERATE_USE_CPU": "1",  # --multi_gpu where there is none
        }
        ended = jobs.run(["bash", "-ec", command], environment, cwd=folder)
        assert ended.code == 0 and "Traceback" not in ended.err, ended.err + ended.out
        return ended

    return run


@pytest.mark.slow
@pytest.mark.parametrize("command", HERE)
def test_the_command_does_what_it_is_for(command: str, checkout: Callable[..., jobs.Ended]) -> None:
    prints, swap = HERE[command]
    assert prints in checkout(command, swap).out


def test_the_file_for_two_machines_says_the_same_as_the_readme() -> None:
    says = yaml.safe_load((ROOT / "launch/multi_node.yaml").read_text())
    for name in ("num_machines", "num_processes", "main_process_port"):
        assert f" --{name} {says[name]} " in TWO_MACHINES


def shape(line: str) -> str:
    """Return a line of output without its numbers and names."""
    line = re.sub(r"\d[\d,.]*", "0", line.replace("fashion-mnist", "mnist"))
    return re.sub(r"offline-run-\*-\w+", "offline-run", line)


@pytest.mark.slow
def test_the_main_job_prints_what_the_readme_shows(checkout: Callable[..., jobs.Ended]) -> None:
    shown = documents.blocks(README, "text")[0][1].splitlines()
    swap = {'ARGS="': 'ARGS="FLAGS --threads 2 --fresh --wandb offline '}
    printed = [shape(line) for line in checkout(f"WANDB_MODE=offline {MAKE_FAST}", swap).out.splitlines()]
    position = 0
    for line in shown:
        if line != "...":
            assert shape(line) in printed[position:], f"not printed, or not in this order: {line}"
            position += printed[position:].index(shape(line)) + 1


@pytest.mark.slow
def test_the_python_in_watching_md_loads_a_trained_model(checkout: Callable[..., jobs.Ended]) -> None:
    ((_, code),) = documents.blocks(ROOT / "docs/watching.md", "python")
    assert checkout(f"python -c {shlex.quote(code + 'print(net)')}").out.startswith("CNN(")


PROGRAMS = {
    *(f"-m ddp_mnist.{name}" for name in ("train", "data", "report", "evaluate", "predict", "doctor")),
    *("-m launch.submit", "-m launch.check", "benchmarks/run.py", "-m accelerate.commands.launch"),
    "-m torch.distributed.run",
}
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9_-]*[a-z0-9]")
# A machine without SLURM cannot be asked; `sbatch --help` has them.
SBATCH = {
    *("--account", "--array", "--constraint", "--cpus-per-gpu", "--cpus-per-task", "--gpus-per-node", "--me", "--mem"),
    *("--nodes", "--ntasks-per-node", "--partition", "--signal", "--time"),
}


@pytest.mark.slow
def test_every_flag_in_a_document_is_in_the_help_of_a_program() -> None:
    known = set(SBATCH)
    for program in PROGRAMS:
        ended = jobs.run([sys.executable, *program.split(), "--help"], {"COLUMNS": "200"}, cwd=ROOT)
        assert ended.code == 0 and "--help" in ended.out, ended.err
        known |= set(FLAG.findall(ended.out))
    used = {flag for document in DOCUMENTS for flag in FLAG.findall(document.read_text())}
    assert used - known == set()


@pytest.mark.parametrize("file", ELSEWHERE)
def test_the_file_that_is_said_to_run_a_command_has_its_flags(file: str) -> None:
    of_the_training = {"--recipe", "--epochs"}
    flags = {flag for command in ELSEWHERE[file] for flag in FLAG.findall(command)} - of_the_training
    text = (ROOT / file).read_text()
    assert {flag for flag in flags if flag not in text} <= {"--cpus-per-gpu"}  # no node of the tests has GPUs


@pytest.mark.parametrize("document", DOCUMENTS, ids=documents.name)
def test_links_and_named_files_exist(document: Path) -> None:
    for link in documents.links(document):
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        if not re.match(r"https?:", link):
            assert target.exists() and target.is_relative_to(ROOT), link
            assert not anchor or anchor in documents.anchors(target), link
    spans = [span.partition("::")[0] for span in documents.spans(document)]
    named = [span for span in spans if re.fullmatch(r"[\w./-]+\.(py|sh|md|yaml|toml|txt)", span)]
    folders = [ROOT, document.parent, ROOT / "ddp_mnist", ROOT / "launch"]
    of_the_reader = {"mine.py", "rates.txt"}
    assert [each for each in named if each not in of_the_reader and not any((f / each).exists() for f in folders)] == []


def test_each_claim_names_the_test_that_proves_it() -> None:
    claims = documents.section_rows(README, "Why you can trust it")
    assert len(claims) > 5
    for claim, proof in claims:
        tests = re.findall(r"`(tests/\w+/test_\w+\.py)(?:::(test_\w+))?`", proof)
        assert tests, claim
        for file, test in tests:
            assert not test or f"\ndef {test}(" in (ROOT / file).read_text(), f"{file} has no {test}"


def test_the_readme_is_short_and_its_results_are_the_benchmarks_own() -> None:
    """Each row stands as it is in the table that the benchmark has written, and that the README links to."""
    assert len(README.read_text().splitlines()) <= 200
    (link,) = [link for link in documents.links(README) if "/cpu-" in link]
    results = documents.section_rows(README, "Results")
    assert 4 <= len(results) <= 8
    written = documents.rows((ROOT / link).read_text())
    assert [row for row in results if row not in written] == []
