"""The documents say what is true: each command in them is run, here or by the test named here, links lead somewhere,
flags exist, and figures are those of the benchmark's file."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import documents
import jobs
import pytest
import yaml
from documents import DOCUMENTS, README, ROOT

# What is known of each command


@dataclass(frozen=True)
class Here:
    """Run by this file, by bash, where a user would stand, as it is written but for what `tiny` puts in its place."""

    prints: str
    swap: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class By:
    """Run by a test (or a file), whose source has these words."""

    where: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Not:
    """Not run by any test, for this reason."""

    because: str


def here(prints: str, *swap: tuple[str, str]) -> Here:
    return Here(prints, swap)


def by(where: str, *words: str) -> By:
    return By(where, words)


TRAINED = "wrote runs/"
PORT = ("accelerate launch", "accelerate launch --main_process_port PORT")
TINY = ("ddp_mnist.train", "ddp_mnist.train FLAGS")
DIGITS = ("ddp_mnist.data fetch", "ddp_mnist.data fetch --dataset fashion-mnist")
CHECK = ("ddp_mnist.data verify", "ddp_mnist.data verify --dataset fashion-mnist")
DOCTOR = ("ddp_mnist.doctor", "ddp_mnist.doctor --dataset fashion-mnist")
A_NAME = "the name of a program, not a command"
SETS_UP = "tests/launch/test_slurm.py::test_requeues_are_counted"
SHAPES = "tests/launch/test_slurm.py::test_shapes"
SWEEP = "tests/launch/test_slurm.py::test_a_sweep_with_one_task_requeued_alone"
OWN = "tests/launch/test_slurm.py::test_a_program_of_ones_own_is_requeued_to_its_end"
AGAIN = "tests/launch/test_slurm.py::test_a_line_of_a_sweep_once_more"
SUBMIT = "tests/launch/test_launch.py::test_the_batch_script_is_the_pinned_one"
BENCH = "tests/project/test_benchmarks.py"

COMMANDS: dict[str, Here | By | Not] = {
    # make, and what leads to it
    "make train": here(TRAINED),
    'make train ARGS="--recipe fast --epochs 2 --output-dir runs/fast"': here(
        TRAINED, ('ARGS="', 'ARGS="FLAGS --fresh ')
    ),
    "make install": by(".ci/run", "make check"),  # which needs it
    "make install check": by(".ci/run", "make check"),
    "make test": by(".ci/run", "make test"),
    "make check": by(".ci/run", "make check"),
    "make fast": by(".ci/run", "make fast"),
    "make coverage faults": by(".ci/run", "make coverage", "make faults"),
    "make test PYTEST_ARGS=tests/data/test_data.py": by(".ci/run", "make test PYTEST_ARGS=tests/data/test_data.py"),
    "make bench": by(BENCH, "benchmarks"),
    'make bench ARGS="--quick"': by(BENCH, "--quick"),
    'make bench ARGS="--rows step,ranks --json benchmarks/results"': by(BENCH, "--rows", "--json"),
    "python benchmarks/run.py": by(BENCH, "benchmarks"),
    "make gpu BIN=/path/to/env/bin": Not("it takes a GPU; each of its parts is run elsewhere"),
    "source .venv/bin/activate": here(""),
    "export DDP_MNIST_DATA=/scratch/data": here(""),
    "pip install .": by(
        "tests/project/test_package.py::test_the_wheel_trains_where_there_is_neither_checkout_nor_git",
        '"install"',
        "jobs.TRAIN",
    ),
    ".venv/bin/pre-commit install": by(
        "tests/project/test_package.py::test_git_refuses_to_commit_data_and_weights", '"pre-commit", "install"'
    ),
    "make gpu": Not("it takes a GPU; each of its parts is run elsewhere"),
    # training
    "python -m ddp_mnist.train": here(TRAINED, TINY),
    "python -m ddp_mnist.train --help": here("--batch-size"),
    "torchrun --nproc-per-node 2 -m ddp_mnist.train": here(TRAINED, TINY),
    "accelerate launch --config_file launch/cpu.yaml -m ddp_mnist.train": here(TRAINED, TINY, PORT),
    "accelerate launch --multi_gpu --num_processes 4 -m ddp_mnist.train": here(TRAINED, TINY, PORT),
    "accelerate launch --multi_gpu --num_machines 2 --num_processes 8 --machine_rank 0 --main_process_ip 10.0.0.1 "
    "--main_process_port 29400 -m ddp_mnist.train --output-dir runs/two-machines": by(
        "tests/project/test_docs.py::test_two_machines_without_slurm", "command.replace"
    ),
    "accelerate launch --cpu --num_processes 2": by(
        "tests/doctor/test_doctor.py::test_accelerate_launch_that_silently_starts_one_process",
        "--cpu --num_processes 2",
    ),
    "accelerate launch mine.py": here("wrote runs/mine", PORT),
    "torchrun --nproc-per-node 2 mine.py": here("wrote runs/mine"),
    "accelerate launch": Not(A_NAME),
    "accelerate launch --config_file": Not(A_NAME),
    # data
    "python -m ddp_mnist.data fetch": here("ok", DIGITS),
    "python -m ddp_mnist.data verify": here("ok", CHECK),
    # runs
    "python -m ddp_mnist.report runs/fast": here("runs/fast/report.html"),
    "python -m ddp_mnist.report runs/*-fast --output compare": here("compare/report.html"),
    "python -m ddp_mnist.report runs/slurm-<job>": here("report.html"),
    "python -m ddp_mnist.evaluate runs/fast": here("Checking accuracy on test data"),
    "python -m ddp_mnist.predict runs/fast photo.png": here("photo.png"),
    "wandb sync": by(
        "tests/wandb_mirror/test_mirror.py::test_offline_attempts_are_synced_into_one_curve", "wandb sync"
    ),
    "wandb leet runs/fast/wandb": by(
        "tests/wandb_mirror/test_mirror.py::test_an_offline_run_equals_metrics_jsonl", '"leet", "inspect"'
    ),
    # the doctor
    "python -m ddp_mnist.doctor": here("ok ", DOCTOR),
    "python -m ddp_mnist.doctor --recipe fast": here("ok ", DOCTOR),
    "torchrun --nproc-per-node 4 -m ddp_mnist.doctor": here("ok ", DOCTOR),
    "srun slurm/rank.sh python -m ddp_mnist.doctor": by(
        "tests/launch/test_slurm.py::test_by_hand_inside_an_allocation",
        '"srun", "slurm/rank.sh", "python", "-m", "ddp_mnist.doctor"',
    ),
    # SLURM
    "sbatch slurm/train.sh": by(SHAPES, 'site.sbatch("slurm/train.sh"'),
    "sbatch --gpus-per-node=1 slurm/train.sh --recipe fast": by(SHAPES, "--gpus-per-node=", "slurm/train.sh"),
    "sbatch --gpus-per-node=8 --cpus-per-gpu=4 slurm/train.sh": by(SHAPES, "--gpus-per-node=", "slurm/train.sh"),
    "sbatch --nodes=4 --gpus-per-node=8 --cpus-per-gpu=4 slurm/train.sh --epochs 20": by(
        SHAPES, "--nodes=2", "--gpus-per-node=2", "slurm/train.sh"
    ),
    "sbatch --nodes=2 --ntasks-per-node=4 --cpus-per-task=2 slurm/train.sh": by(
        SHAPES, "--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=2", "slurm/train.sh"
    ),
    'ENV_SETUP="module load python/3.11; source ~/envs/ddp/bin/activate" sbatch slurm/train.sh': by(
        SETS_UP, "ENV_SETUP=", "slurm/train.sh"
    ),
    'ENV_SETUP="source ~/miniforge3/etc/profile.d/conda.sh; conda activate ddp" sbatch slurm/train.sh': by(
        SETS_UP, "ENV_SETUP=", "slurm/train.sh"
    ),
    "sbatch --time=30 slurm/train.sh": by(OWN, '"--time=30"', '"slurm/train.sh"'),
    "PROGRAM=mine.py sbatch slurm/train.sh": by(OWN, '"slurm/train.sh"', 'PROGRAM="mine.py"'),
    "PROGRAM=mine.py sbatch slurm/train.sh --epochs 20": by(OWN, '"slurm/train.sh"', 'PROGRAM="mine.py"', "--epochs="),
    "PROGRAM=mine.py slurm/sweep.sh rates.txt": by(AGAIN, '"PROGRAM": "mine.py"', 'run("slurm/sweep.sh"'),
    "sbatch --signal=USR2@600": by(OWN, '"--signal=USR2@600"'),
    "squeue --me": by(SETS_UP, '"squeue", "--me"'),
    'sinfo -o "%P %G %c"': by(SETS_UP, '"sinfo", "-o", "%P %G %c"'),
    "tail -f slurm-<job>.out": by(SETS_UP, '"tail", "-f", job.log_path.name'),
    "scontrol show job <job>": by("tests/support/slurm_cluster.py::Job", '"scontrol"', '"show", "job"'),
    "scontrol requeue <job>": by(
        "tests/launch/test_slurm.py::test_scontrol_requeue_while_running", '"scontrol", "requeue", job.id'
    ),
    "scancel --signal=TERM <job>": by(SETS_UP, '"scancel", "--signal=TERM", job.id'),
    "scancel <job>": by("tests/launch/test_slurm.py::test_scancel_is_the_end", '"scancel", job.id'),
    "export SBATCH_PARTITION=gpu SBATCH_ACCOUNT=me": here(""),
    "export GLOO_SOCKET_IFNAME=... NCCL_SOCKET_IFNAME=...": here(
        TRAINED,
        ("=... NCCL", "=lo NCCL"),
        ("IFNAME=...", "IFNAME=lo && torchrun --nproc-per-node 2 -m ddp_mnist.train FLAGS"),
    ),
    "cat rates.txt": here("--lr 3e-3"),
    "slurm/sweep.sh rates.txt --gpus-per-node=1 -- --epochs 3": by(SWEEP, '"slurm/sweep.sh"', '"--"'),
    "sbatch --array=2 --gpus-per-node=1 slurm/sweep.sh rates.txt -- --epochs 3": by(
        AGAIN, 'site.sbatch("--array=2", "slurm/sweep.sh"', '"--"'
    ),
    "python -m launch.submit --help": here("--sbatch"),
    "python -m launch.submit --sbatch NAME=VALUE": by(SUBMIT, "launch.submit", "--sbatch=constraint=a100"),
    "python -m launch.submit --nodes 2 --gpus-per-node 8 --cpus-per-task 4 --partition gpu --follow "
    "-- --recipe fast": by(
        SUBMIT, "launch.submit", "--nodes=2", "--gpus-per-node=", "--cpus-per-task=", "--partition=gpu", '"--"'
    ),
}

FOUND = {command: document for document in reversed(DOCUMENTS) for command in documents.commands(document)}


def of_kind(kind: type) -> list[str]:
    return [command for command, how in COMMANDS.items() if isinstance(how, kind)]


def test_every_command_is_run_or_it_is_known_why_not() -> None:
    unknown = {command: documents.name(path) for command, path in FOUND.items() if command not in COMMANDS}
    assert not unknown, "say in COMMANDS what runs them"
    assert not set(COMMANDS) - set(FOUND), "no document has these any more"


@pytest.mark.parametrize("document", DOCUMENTS, ids=documents.name)
def test_every_block_says_what_it_is(document: Path) -> None:
    assert {language for language, _ in documents.blocks(document)} <= {"python", "text", "console"}
    assert document.read_text().count("```") == 2 * len(documents.blocks(document))


@cache
def top_level(path: Path) -> dict[str, ast.stmt]:
    found: dict[str, ast.stmt] = {}
    for node in ast.parse(path.read_text()).body:
        names = [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
        found |= dict.fromkeys(names, node)
    return found


def source(where: str) -> str:
    """Of a test, with the constants, helpers and fixtures of its module that it uses; or a whole file."""
    file, _, test = where.partition("::")
    text = (ROOT / file).read_text()
    if not test:
        return "\n" + text
    nodes, lines = top_level(ROOT / file), text.splitlines()
    assert test in nodes, f"{file} has no {test}"
    seen, todo, pieces = set(), [test], []
    while todo:
        if (name := todo.pop()) in seen or name not in nodes:
            continue
        seen.add(name)
        node = nodes[name]
        first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))])
        pieces += lines[first - 1 : node.end_lineno]
        for part in ast.walk(node):
            todo += [part.id] if isinstance(part, ast.Name) else [part.arg] if isinstance(part, ast.arg) else []
    return "\n".join(pieces)


@pytest.mark.parametrize("command", of_kind(By))
def test_what_is_said_to_run_a_command_has_its_words(command: str) -> None:
    how = COMMANDS[command]
    assert isinstance(how, By)
    text = source(how.where)
    assert [word for word in how.words if word not in text] == []


# The commands that are run here


@pytest.fixture
def checkout(tmp_path: Path, run_at: Callable[[int], Path], tiny: Path) -> Callable[..., jobs.Ended]:
    """Where a user stands after `make install` and a few runs; returns what runs a line there, as bash does."""
    from PIL import Image

    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("ddp_mnist", "launch", "slurm", "docs", "Makefile", "pyproject.toml", "constraints.txt"):
        (folder / name).symlink_to(ROOT / name)
    venv = folder / ".venv"
    venv.mkdir()
    for path in Path(sys.prefix).iterdir():
        (venv / path.name).symlink_to(path)
    (venv / ".installed").unlink(missing_ok=True)
    (venv / ".installed").touch()  # newer than what it follows from: make installs nothing
    for name in ("runs/fast", "runs/20260101-120000-fast", "runs/20260101-130000-fast", "runs/slurm-4711"):
        shutil.copytree(run_at(1), folder / name)
    image = Image.new("L", (90, 120), 255)
    image.paste(0, (40, 20, 50, 100))
    image.save(folder / "photo.png")
    (folder / "mine.py").write_text(next(code for language, code in documents.blocks(README) if language == "python"))
    (console,) = [code for language, code in documents.blocks(ROOT / "docs/cluster.md") if language == "console"]
    (folder / "rates.txt").write_text(console.partition("$ cat rates.txt\n")[2].partition("\n\n")[0] + "\n")

    flags = "--dataset fashion-mnist --threads 1 --no-pictures --batch-size 60 --epochs 1 --wandb disabled"

    def run(command: str, **variables: str) -> jobs.Ended:
        places = {"FLAGS": flags, "PORT": str(jobs.free_port()), "<job>": "4711"}
        for place, value in places.items():
            command = command.replace(place, value)
        environment = {
            "PATH": f"{venv / 'bin'}:{os.environ['PATH']}",
            "DDP_MNIST_DATA": str(tiny),
            "ARGS": flags,  # `make train` takes them from here where its command line has none
            "OMP_WAIT_POLICY": "passive",  # threads that spin make a busy machine many times slower
            "PET_MASTER_PORT": str(jobs.free_port()),  # torchrun's --master-port
            "ACCELERATE_USE_CPU": "1",  # --multi_gpu where there is none
        }
        return jobs.run(["bash", "-ec", command], environment | variables, cwd=folder)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("command", of_kind(Here))
def test_the_command_does_what_it_is_for(command: str, checkout: Callable[..., jobs.Ended]) -> None:
    how = COMMANDS[command]
    assert isinstance(how, Here)
    line = command
    for old, new in how.swap:
        assert old in line
        line = line.replace(old, new)
    ended = checkout(line)
    assert ended.code == 0, ended.err + ended.out
    assert how.prints in ended.out
    assert "Traceback" not in ended.err


@pytest.mark.slow
def test_two_machines_without_slurm(checkout: Callable[..., jobs.Ended]) -> None:
    """The README's line, on two machines of one process each that are this one."""
    (command,) = [command for command in documents.commands(README) if "--num_machines" in command]
    here = [("10.0.0.1", "127.0.0.1"), ("29400", str(jobs.free_port())), ("--num_processes 8", "--num_processes 2")]
    for old, new in [*here, TINY]:
        assert command.count(old) == 1
        command = command.replace(old, new)
    second = command.replace("--machine_rank 0", "--machine_rank 1")
    ended = checkout(f"{second} & {command} && wait $!")
    assert ended.code == 0, ended.err
    assert ended.out.count("wrote runs/two-machines") == 1
    told = checkout("cat runs/two-machines/summary.json").out
    assert (json.loads(told)["world_size"], json.loads(told)["finished"]) == (2, True)


def test_the_file_for_several_machines_says_what_the_readme_types() -> None:
    (command,) = [command for command in documents.commands(README) if "--num_machines" in command]
    says = yaml.safe_load((ROOT / "launch/multi_node.yaml").read_text())
    assert says["distributed_type"] == "MULTI_GPU"
    for name in ("num_machines", "num_processes", "main_process_port"):
        assert f" --{name} {says[name]} " in command


def shape(line: str) -> str:
    """A line of output without its numbers and names."""
    line = re.sub(r"\d[\d,.]*", "0", line.replace("fashion-mnist", "mnist"))
    return re.sub(r"offline-run-\*-\w+", "offline-run", line)


@pytest.mark.slow
def test_the_output_in_the_readme_is_what_is_printed(checkout: Callable[..., jobs.Ended]) -> None:
    shown = next(content for language, content in documents.blocks(README) if language == "text").splitlines()
    ended = checkout(
        "python -m ddp_mnist.train FLAGS --threads 2 --recipe fast --epochs 2 --wandb offline --output-dir runs/shown",
        WANDB_MODE="offline",
    )
    printed = [shape(line.replace("runs/shown", "runs/fast")) for line in ended.out.splitlines()]
    position = 0
    for line in shown:
        if line != "...":
            assert shape(line) in printed[position:], f"not printed, or not in this order: {line}"
            position += printed[position:].index(shape(line)) + 1


@pytest.mark.slow
def test_the_python_in_watching_md_loads_a_trained_model(checkout: Callable[..., jobs.Ended]) -> None:
    (code,) = [content for language, content in documents.blocks(ROOT / "docs/watching.md") if language == "python"]
    ended = checkout(f"python -c {shlex.quote(code + 'print(net)')}")
    assert ended.code == 0, ended.err
    assert ended.out.startswith("CNN(")


# Flags

PROGRAMS = {
    **{f"ddp_mnist.{name}": ("-m", f"ddp_mnist.{name}") for name in ("train", "data", "report", "evaluate")},
    **{f"ddp_mnist.{name}": ("-m", f"ddp_mnist.{name}") for name in ("predict", "doctor")},
    **{f"launch.{name}": ("-m", f"launch.{name}") for name in ("submit", "check")},
    "benchmarks/run.py": ("benchmarks/run.py",),
}
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9_-]*[a-z0-9]")
# A machine without SLURM cannot be asked; `sbatch --help` has them.
SBATCH = {
    *("--account", "--array", "--constraint", "--cpus-per-gpu", "--cpus-per-task", "--gpus-per-node", "--me", "--mem"),
    *("--nodes", "--ntasks-per-node", "--partition", "--signal", "--time"),
}


@cache
def flags_of(program: str) -> frozenset[str]:
    """That its help tells of."""
    ended = jobs.run([sys.executable, *PROGRAMS[program], "--help"], {"COLUMNS": "200"}, cwd=ROOT)
    assert ended.code == 0, ended.err
    return frozenset(FLAG.findall(ended.out))


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_each_program_has_help(program: str) -> None:
    assert "--help" in flags_of(program)


def launcher_flags(name: str) -> set[str]:
    if name == "torchrun":
        from torch.distributed.run import get_args_parser

        return {option for action in get_args_parser()._actions for option in action.option_strings}
    from accelerate.commands.launch import launch_command_parser

    return {option for action in launch_command_parser()._actions for option in action.option_strings}


def split(command: str) -> Iterator[tuple[str, str]]:
    """(program, flag) for each flag of a command, for a launcher's and its program's alike."""
    program = ""
    for word in shlex.split(command):
        name = word.rpartition("/")[2]
        if word in PROGRAMS or name in ("accelerate", "torchrun", "sbatch", "sweep.sh", "mine.py", "squeue", "scancel"):
            program = word if word in PROGRAMS else name
        elif word == "slurm/train.sh" or (word == "--" and program):
            program = "ddp_mnist.train"
        elif flag := FLAG.match(word):
            yield program, flag[0]


@pytest.mark.slow
def test_every_flag_of_a_command_is_one_of_its_program() -> None:
    known: dict[str, set[str] | frozenset[str]] = {name: flags_of(name) for name in PROGRAMS}
    known["ddp_mnist.doctor"] = known["ddp_mnist.doctor"] | known["ddp_mnist.train"]
    known |= {name: launcher_flags(name) for name in ("accelerate", "torchrun")}
    known |= dict.fromkeys(("sbatch", "sweep.sh", "squeue", "scancel"), SBATCH)
    wrong = [
        (command, flag)
        for command in FOUND
        if not command.startswith("make")
        for program, flag in split(command)
        if flag not in known[program]
    ]
    assert not wrong
    # And where a flag is only spoken of, some program has it.
    anywhere = set().union(*known.values())
    told = {flag for document in DOCUMENTS for flag in FLAG.findall(documents.prose(document))}
    assert told - anywhere == set()


# Links, names, order, length


@pytest.mark.parametrize("document", DOCUMENTS, ids=documents.name)
def test_links_lead_somewhere(document: Path) -> None:
    for link in documents.links(document):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists() and target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in documents.anchors(target), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=documents.name)
def test_files_that_are_named_exist(document: Path) -> None:
    spans = [span.partition("::")[0] for span in documents.spans(document)]
    named = [span for span in spans if re.fullmatch(r"[\w./-]+\.(py|sh|md|yaml|toml|txt)", span)]
    folders = [ROOT, document.parent, ROOT / "ddp_mnist", ROOT / "launch"]
    of_the_reader = {"mine.py", "rates.txt"}
    assert [each for each in named if each not in of_the_reader and not any((f / each).exists() for f in folders)] == []


def test_each_claim_names_the_test_that_proves_it() -> None:
    claims = documents.rows(documents.section(README, "Why you can trust it"))
    assert len(claims) > 5
    for claim, proof in claims:
        tests = re.findall(r"`(tests/\w+/test_\w+\.py)(?:::(test_\w+))?`", proof)
        assert tests, claim
        for file, test in tests:
            assert not test or test in top_level(ROOT / file), f"{file} has no {test}"


def test_the_readme_is_short_and_in_order() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= 200
    assert [line[3:] for line in lines if line.startswith("## ")] == [
        "Two commands",
        "What you have → what you type",
        "Results",
        "Why you can trust it",
        "Read the code in this order",
        "Make it yours",
        "When it stops",
        "Watching a run",
        "What is not here",
        "More",
    ]


def test_the_results_in_the_readme_are_the_benchmarks_own() -> None:
    """Each row stands as it is in the table that the benchmark has written, and that the README links to."""
    (link,) = [link for link in documents.links(README) if "/cpu-" in link]
    rows = documents.rows(documents.section(README, "Results"))
    assert 4 <= len(rows) <= 8
    written = documents.rows((ROOT / link).read_text())
    assert [row for row in rows if row not in written] == []
