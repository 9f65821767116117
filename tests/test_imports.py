"""The rooms of the package and the doors between them: who imports whom, and who alone may do what."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from pathlib import Path

import jobs
import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ddp_mnist"
DEPTH = 9
"""Modules in the longest chain that the training hangs from: train, trainer, tracking, evaluate, checkpoint, rundir,
config, process, errors."""


@dataclass
class Module:
    at_once: set[str] = field(default_factory=set)
    """Dotted names that are imported when it is."""
    later: set[str] = field(default_factory=set)
    """Dotted names that are imported by a function, or when it is started as a program."""
    words: set[str] = field(default_factory=set)
    """Strings, names and attributes in its code."""


def read(path: Path) -> Module:
    found = Module()

    def visit(node: ast.AST, names: set[str]) -> None:
        match node:
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):  # for mypy alone
                return
            case ast.FunctionDef() | ast.Lambda() | ast.If(test=ast.Compare(left=ast.Name(id="__name__"))):
                names = found.later
            case ast.Import() | ast.ImportFrom():
                names.update(imported(node))
            case ast.Constant(value=str(word)) | ast.Name(id=word) | ast.Attribute(attr=word):
                found.words.add(word)
        for child in ast.iter_child_nodes(node):
            visit(child, names)

    visit(ast.parse(path.read_text()), found.at_once)
    return found


def imported(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (each.name for each in node.names)
    else:
        assert node.level == 0 and node.module, "written with its full name, which can be searched for"
        yield from (f"{node.module}.{each.name}" for each in node.names)


MODULES = {path.stem: read(path) for path in PACKAGE.glob("*.py")}


def doors(*, later: bool) -> dict[str, set[str]]:
    """Module → those of the package that it imports."""
    return {
        name: {
            word.split(".")[1]
            for word in module.at_once | (module.later if later else set())
            if word.startswith("ddp_mnist.") and word.split(".")[1] in MODULES
        }
        for name, module in MODULES.items()
    }


def importers(package: str) -> set[str]:
    """The modules that import it, at once or later."""
    return {
        name
        for name, module in MODULES.items()
        if any(word == package or word.startswith(f"{package}.") for word in module.at_once | module.later)
    }


@pytest.mark.parametrize("later", [False, True])
def test_no_module_imports_itself_round_a_corner(later: bool) -> None:
    list(TopologicalSorter(doors(later=later)).static_order())  # CycleError names the circle


def test_the_training_hangs_from_no_longer_a_chain_than_it_must() -> None:
    graph = doors(later=True)

    def chain(name: str) -> list[str]:
        return [name, *max((chain(each) for each in graph[name]), key=len, default=[])]

    longest = chain("train")
    assert len(longest) <= DEPTH, longest


@pytest.mark.parametrize(
    ("what", "rooms"),
    [
        ("wandb", {"mirror_process"}),
        # The mirror's own process leaves them to the training; the benchmark is not the training.
        ("signal", {"preemption", "mirror_process", "bench"}),
        ("triton", {"kernels"}),
        ("ddp_mnist.kernels", {"model", "step"}),
        ("matplotlib", {"figures"}),
        ("torchvision", {"files", "reference"}),
        ("torch.utils.data.DistributedSampler", {"data"}),
        ("torch.utils.data.DataLoader", {"reference"}),
        ("tyro", {"config"}),
        ("tqdm", {"tracking"}),
        ("filelock", {"files", "rundir", "doctor_job"}),
    ],
)
def test_what_only_one_room_does(what: str, rooms: set[str]) -> None:
    assert importers(what) == rooms


def test_only_the_doctor_reads_slurms_variables() -> None:
    found = {name for name, module in MODULES.items() if any(word.startswith("SLURM_") for word in module.words)}
    assert found == {"doctor_job", "doctor_machine"}


def test_only_the_data_deal_out_shares() -> None:
    """A rank's rows are taken in one place: another one would have to agree with it."""
    words = {"ShardSampler", "DistributedSampler", "num_replicas", "split_batches", "split_between_processes"}
    assert {name for name, module in MODULES.items() if module.words & words} == {"data"}


def test_the_package_imports_neither_tests_nor_launchers() -> None:
    others = {"tests", "launch", *(path.stem for path in (ROOT / "tests").glob("*.py"))}
    for name, module in MODULES.items():
        assert not {word.partition(".")[0] for word in module.at_once | module.later} & others, name


@pytest.mark.parametrize("name", ["ddp_mnist", "ddp_mnist.config", "ddp_mnist.train"])
def test_flags_are_read_before_anything_heavy_is_imported(name: str) -> None:
    ended = jobs.run([sys.executable, "-c", f"import sys, {name}; print(*sys.modules)"])
    assert ended.code == 0, ended.err
    heavy = {"torch", "torchvision", "accelerate", "matplotlib", "wandb", "numpy", "submitit"}
    assert not heavy & set(ended.out.split())
