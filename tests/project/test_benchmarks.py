"""The benchmark: its baselines are what they claim, and what was measured is printed and kept."""

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faults
import jobs
import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState

import ddp_mnist
from ddp_mnist.data.sources import load_mnist

Module = Callable[[str], Any]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Module]:
    """Import a file of the benchmark by its name."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield importlib.import_module
    AcceleratorState._reset_state(reset_partial_state=True)
    for name in ("baselines", "report", "run", "worker"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_the_baselines_have_our_network_and_learn_from_every_image(module: Module, tiny: Path) -> None:
    baselines, splits = (
        module("baselines"),
        [(split.inputs, split.targets) for split in load_mnist("fashion-mnist", tiny)],
    )
    theirs, ours, images = baselines.tutorial_net(), ddp_mnist.CNN(), torch.rand(20, 1, 28, 28)
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=0)
    files = "fashion-mnist", tiny
    example = baselines.AccelerateExample(*files)
    for side, batch in ((baselines.Tutorial(*files), 64), (example, 64), (baselines.Published(*splits), 256)):
        side.begin(seed=0)
        assert side.epoch(limit=2) == 2 * batch
        side.begin(seed=0)
        assert side.epoch() == len(splits[0][1]) and side.accuracy() > 0.3
    assert isinstance(example.loader, DataLoaderShard) and isinstance(example.optimizer, AcceleratedOptimizer)
    assert isinstance(example.backward.__self__, Accelerator)


def test_a_ratio_is_that_of_the_medians_and_is_held_against_its_target(module: Module) -> None:
    line = module("report").line
    found = line("x", "s", [1.0, 2.0, 9.0], ("other", [2.0, 8.0, 9.0]), "<= 0.42")
    assert found["met"] and (found["ratio"], found["ratios"]) == (0.25, [0.5, 0.25, 1.0])
    assert line("x", "%", [2.0, 4.0, 5.0], target="<= 3")["met"] is False
    assert line("x", "s", [], ("other", [1.0]), "<= 1")["met"] is None  # no seed has reached it


def test_the_first_epoch_that_reaches_the_target_has_its_time_and_so_have_all_epochs(
    module: Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, clock, scores = module("worker"), iter(range(100)), [0.97, 0.981, 0.979, 0.985]
    monkeypatch.setattr(worker.time, "perf_counter", lambda: next(clock))  # it is read before and after an epoch
    side = SimpleNamespace(epoch=lambda _: 60, accuracy=lambda: scores.pop(0))
    found = worker.take_turn(side, None, epochs=3, target=0.98)
    assert (found["reached"], found["seconds"], found["images"], found["accuracy"]) == (2, 3, 180, 0.979)
    assert worker.take_turn(side, None, target=0.99)["reached"] is None


@pytest.mark.parametrize(("second", "code"), [(KeyboardInterrupt(), 130), (RuntimeError("a side fails"), 1)])
def test_what_was_measured_before_an_interruption_is_printed_and_kept(
    module: Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, second: BaseException, code: int
) -> None:
    run = module("run")
    monkeypatch.setattr(run, "stage", lambda *_: None)
    done = [module("report").line("the first", "s", [2.0, 3.0])]
    monkeypatch.setattr(run, "ROWS", {"one": lambda _: done, "two": lambda _: (_ for _ in ()).throw(second)})
    file, words = tmp_path / "kept.json", ["run.py", "--dataset", "synthetic", "--rows", "one,two", "--json"]
    monkeypatch.setattr(sys, "argv", [*words, str(file)])
    assert run.main() == code
    printed, errors = capsys.readouterr()
    assert "| one | the first | s | 2.5 (2-3; 2) |" in printed and ("error: two: a side fails" in errors) == (code == 1)
    assert json.loads(file.read_text())["rows"] == {"one": done} and file.with_suffix(".md").read_text() == printed


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_take_turns_and_a_side_that_fails_says_why(module: Module, tiny: Path, tmp_path: Path) -> None:
    run = module("run")
    with ExitStack() as stack:
        setup = SimpleNamespace(dataset="fashion-mnist", data_dir=tiny, scratch=tmp_path, stack=stack)
        (two,) = run.start(run.Worker(setup, "ours", 1, ranks=2))
        assert two.ask(1, settings={"batch_size": 500})["images"] == 1501
        assert 0 < run.Worker(setup, "overhead", 1).ask()["share"] < 1
        setup.data_dir = tmp_path
        with pytest.raises(RuntimeError, match="RuntimeError: Dataset not found"):
            run.start(run.Worker(setup, "tutorial"))


@pytest.mark.slow
def test_runs_side_by_side_spin_only_where_they_are_to(
    module: Module, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    run = module("run")
    with ExitStack() as stack:
        names = {"dataset": "fashion-mnist", "data_dir": tiny, "scratch": tmp_path}
        setup = SimpleNamespace(**names, stack=stack, steps=3, turns=2)
        for side, spins in (("ours", False), ("ours", True), ("tutorial", False)):
            environment = Path(f"/proc/{run.Worker(setup, side, spins=spins).process.pid}/environ")
            faults.wait_for(environment.read_bytes, "the start of the worker's program")
            assert (b"GOMP_SPINCOUNT=" in environment.read_bytes()) == (side == "ours" and not spins)
        alone, at_once = run.side_by_side(setup, most=1)
        assert alone["ratio"] > 0 < at_once["ratio"]


@pytest.mark.slow
def test_a_quick_row_of_pictures_from_its_command_to_its_files(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/run.py")]
    ended = jobs.run([*command, "--rows", "step,stepp"])
    assert (ended.code, ended.out) == (2, "") and ended.err.startswith(
        "error: there is no row stepp; the rows are step"
    )
    # Threads that spin make a busy machine many times slower.
    passive = {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}
    flags = ["--quick", "--rows", "files", "--dataset", "synthetic", "--json", str(tmp_path)]
    ended = jobs.run([*command, *flags], passive)
    assert ended.code == 0, ended.err
    (file,) = tmp_path.glob("cpu-*.json")
    assert file.with_suffix(".md").read_text() == ended.out
    report = json.loads(file.read_text())
    assert report["dataset"] == "synthetic" and torch.__version__.startswith(report["machine"]["versions"]["torch"])
    assert [len(line["ratios"]) for line in report["rows"]["files"]] == [2, 2]
