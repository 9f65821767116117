"""The modules of the package: which may import which, and how many."""

from __future__ import annotations

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import jobs

import ddp_mnist

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "ddp_mnist"
# `ddp_mnist/data/batches.py` → data.batches, `ddp_mnist/data/__init__.py` → data
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix("."): path
    for path in PACKAGE.rglob("*.py")
}


def imports_of(path: Path) -> set[str]:
    """Return the dotted names that a file imports, in functions too, but not under TYPE_CHECKING."""
    nodes, found = [ast.parse(path.read_text())], set()
    while nodes:
        node = nodes.pop()
        match node:
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                continue
            case ast.Import():
                found |= {each.name for each in node.names}
            case ast.ImportFrom():
                assert node.level == 0, "written with its full name, which can be searched for"
                found |= {f"{node.module}.{each.name}" for each in node.names}
        nodes += ast.iter_child_nodes(node)
    return found


def module_of(word: str) -> str | None:
    """Return the module of the package that holds the imported name, or None for another package's."""
    parts = word.split(".")[1:] if word.startswith("ddp_mnist.") else []
    found = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((name for name in found if name in FILES), None)


IMPORTS = {name: imports_of(path) for name, path in FILES.items()}
ARROWS = {name: {module for word in words if (module := module_of(word))} for name, words in IMPORTS.items()}
# Lowest first; a folder stands for its modules. A module imports its own layer and those below it.
LAYERS = (
    ("errors",),
    ("distributed.launcher",),
    ("config",),
    ("storage.directory",),
    ("model", "cuda_graph", "optimizer", "data", "distributed"),
    ("storage", "workload", "evaluate", "step"),
    ("wandb_mirror", "report", "predict"),
    ("trainer",),
    ("train", "doctor", ""),
)


def layer(name: str) -> int:
    """Return the layer of a module, by the longest name that fits."""
    layers = {each: number for number, names in enumerate(LAYERS) for each in names}
    fits = [each for each in layers if f"{name}.".startswith(f"{each}.") or name == each]
    assert fits, f"{name} has no place in LAYERS"
    return layers[max(fits, key=len)]


def test_arrows_point_downwards_in_no_circle_and_are_few() -> None:
    assert [f"{name} imports {each}" for name in ARROWS for each in ARROWS[name] if layer(each) > layer(name)] == []
    list(TopologicalSorter(ARROWS).static_order())  # CycleError names the circle
    assert max(map(len, ARROWS.values())) <= 12, max(ARROWS.items(), key=lambda each: len(each[1]))
    assert sum(map(len, ARROWS.values())) <= 110


def test_every_name_that_the_package_exports_stays_what_it_is_when_its_modules_are_imported() -> None:
    assert ddp_mnist.fit and [name for name in ddp_mnist.__all__ if not callable(getattr(ddp_mnist, name))] == []


def test_flags_are_read_before_anything_heavy_is_imported() -> None:
    ended = jobs.run([sys.executable, "-c", "import sys, ddp_mnist.config, ddp_mnist.train; print(*sys.modules)"])
    assert ended.code == 0, ended.err
    assert not {"torch", "torchvision", "accelerate", "matplotlib", "wandb", "numpy", "submitit"} & {*ended.out.split()}
