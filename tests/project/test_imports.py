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

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "ddp_mnist"


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


def name_of(path: Path) -> str:
    """`ddp_mnist/data/batches.py` → data.batches, `ddp_mnist/data/__init__.py` → data"""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): read(path) for path in PACKAGE.rglob("*.py")}


def module_of(word: str) -> str | None:
    """The module of the package that holds the imported name; None: it is somebody else's."""
    parts = word.split(".")[1:] if word.startswith("ddp_mnist.") else []
    found = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((name for name in found if name in MODULES), None)


def doors(*, later: bool) -> dict[str, set[str]]:
    """Module → those of the package that it imports."""
    return {
        name: {
            found
            for word in module.at_once | (module.later if later else set())
            if (found := module_of(word)) is not None
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


# Lowest first; a folder stands for its modules. A module imports its own layer and those below it.
LAYERS = (
    ("errors",),
    ("distributed.launcher",),
    ("config",),
    ("run.directory",),
    ("model", "cuda_graph", "optimizer", "data", "distributed"),
    ("run", "program", "evaluate", "step"),
    ("wandb_mirror", "report", "predict"),
    ("trainer",),
    ("train", "doctor", ""),
)


def layer(name: str) -> int:
    """Return the layer of a module, by the longest name that fits."""
    fits = [
        (len(each), number)
        for number, names in enumerate(LAYERS)
        for each in names
        if name == each or name.startswith(f"{each}.")
    ]
    assert fits, f"{name} has no place in LAYERS"
    return max(fits)[1]


def test_arrows_point_downwards_and_in_no_circle() -> None:
    arrows = doors(later=True)
    upwards = [f"{name} imports {each}" for name in arrows for each in arrows[name] if layer(each) > layer(name)]
    assert upwards == []
    list(TopologicalSorter(arrows).static_order())  # CycleError names the circle


def test_no_room_imports_half_the_house() -> None:
    arrows = doors(later=True)
    assert max(map(len, arrows.values())) <= 15, max(arrows.items(), key=lambda each: len(each[1]))
    assert sum(map(len, arrows.values())) <= 116


@pytest.mark.parametrize(
    ("what", "rooms"),
    [
        ("wandb", {"wandb_mirror.process"}),
        # The mirror's own process leaves them to the training.
        ("signal", {"distributed.preemption", "wandb_mirror.process"}),
        ("matplotlib", {"report.figures"}),
        ("torchvision", {"data.mnist"}),
        ("torch.utils.data.DistributedSampler", {"data.batches"}),
        ("tyro", {"config"}),
        ("tqdm", {"run.metrics"}),
        ("filelock", {"data.mnist", "run.directory"}),
    ],
)
def test_what_only_one_room_does(what: str, rooms: set[str]) -> None:
    assert importers(what) == rooms


def test_only_the_doctor_reads_slurms_variables() -> None:
    found = {name for name, module in MODULES.items() if any(word.startswith("SLURM_") for word in module.words)}
    assert found == {"doctor.__main__", "doctor.checks"}


def test_only_the_data_deal_out_shares() -> None:
    """A rank's rows are taken in one place: another one would have to agree with it."""
    words = {"ShardSampler", "DistributedSampler", "num_replicas", "split_batches", "split_between_processes"}
    assert {name for name, module in MODULES.items() if module.words & words} == {"data.batches"}


def test_the_package_imports_neither_tests_nor_launchers() -> None:
    others = {"tests", "launch", *(path.stem for path in (ROOT / "tests").rglob("*.py"))}
    for name, module in MODULES.items():
        assert not {word.partition(".")[0] for word in module.at_once | module.later} & others, name


@pytest.mark.parametrize("name", ["ddp_mnist", "ddp_mnist.config", "ddp_mnist.train"])
def test_flags_are_read_before_anything_heavy_is_imported(name: str) -> None:
    ended = jobs.run([sys.executable, "-c", f"import sys, {name}; print(*sys.modules)"])
    assert ended.code == 0, ended.err
    heavy = {"torch", "torchvision", "accelerate", "matplotlib", "wandb", "numpy", "submitit"}
    assert not heavy & set(ended.out.split())
