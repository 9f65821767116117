"""The benchmark: its baselines are what they claim, and what was measured is printed and kept."""

import importlib
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jobs
import pytest
import torch
from accelerate.data_loader import DataLoaderShard
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState

import ddp_mnist
from ddp_mnist.data.batches import to_float
from ddp_mnist.data.sources import load

Module = Callable[[str], Any]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Module]:
    """Import a file of the benchmark by its name."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    handler = signal.getsignal(signal.SIGTERM)
    yield importlib.import_module
    signal.signal(signal.SIGTERM, handler)
    AcceleratorState._reset_state(reset_partial_state=True)
    for name in ("baselines", "report", "run"):
        sys.modules.pop(name, None)


def test_the_tutorials_network_fits_ours_and_gives_the_same_logits(module: Module) -> None:
    theirs, ours = module("baselines").TutorialCNN(), ddp_mnist.CNN()
    ours.load_state_dict(theirs.state_dict())
    images = torch.rand(20, 1, 28, 28)
    torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["Tutorial", "AccelerateExample", "Published"])
def test_a_baseline_learns_from_every_image(module: Module, tiny: Path, name: str) -> None:
    splits = [(split.images, split.labels) for split in load("fashion-mnist", tiny)]
    side = getattr(module("baselines"), name)(*splits if name == "Published" else ("fashion-mnist", str(tiny)))
    side.begin(seed=0)
    assert side.epoch(limit=2) == 2 * (256 if name == "Published" else 64)
    side.begin(seed=0)
    assert side.epoch() == len(splits[0][1]) and side.accuracy() > 0.3


def test_accelerates_example_has_prepared_loader_model_and_optimizer(module: Module, tiny: Path) -> None:
    side = module("baselines").AccelerateExample("fashion-mnist", str(tiny))
    side.begin(seed=0)
    assert isinstance(side.loader, DataLoaderShard) and isinstance(side.optimizer, AcceleratedOptimizer)
    assert side.accelerator._models == [side.model]
    images, every = next(iter(side.loader))[0].cpu(), to_float(load("fashion-mnist", tiny)[0].images)
    assert len(images) == 64 and all((every == image).flatten(1).all(1).any() for image in images)  # to the last bit


def test_a_ratio_is_that_of_the_medians_and_is_held_against_its_target(module: Module) -> None:
    line = module("report").line
    found = line("x", "s", [1.0, 2.0, 9.0], "other", [2.0, 8.0, 9.0], "<= 0.42")
    assert found["met"] and list(found["ratio"].values())[:4] == [3, 0.25, 0.25, 1.0]  # n, median, min, max
    assert line("x", "images/s", [24.0], "other", [10.0], ">= 2.5")["met"] is False
    assert line("x", "%", [2.0, 4.0, 5.0], target="<= 3")["met"] is False
    assert line("x", "s", [], "other", [1.0], "<= 1")["met"] is None  # no seed has reached it


@pytest.mark.parametrize(("second", "code"), [(KeyboardInterrupt(), 130), (RuntimeError("a side fails"), 1)])
def test_what_was_measured_before_an_interruption_is_printed_and_kept(
    module: Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, second: BaseException, code: int
) -> None:
    run = module("run")
    monkeypatch.setattr(run, "stage", lambda *_: ("synthetic", tmp_path))
    done = [module("report").line("the first", "s", [2.0, 3.0])]
    monkeypatch.setattr(run, "ROWS", {"one": lambda _: done, "two": lambda _: (_ for _ in ()).throw(second)})
    file, words = tmp_path / "kept.json", ["run.py", "--dataset", "synthetic", "--rows", "one,two", "--json"]
    monkeypatch.setattr(sys, "argv", [*words, str(file)])
    assert run.main() == code
    printed = capsys.readouterr().out
    assert "| one | the first | s | 2.5 (2-3; 2) |" in printed and ("two: a side fails" in printed) == (code == 1)
    assert json.loads(file.read_text())["rows"] == {"one": done} and file.with_suffix(".md").read_text() == printed


def test_a_wrong_row_is_one_message(module: Module, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--rows", "step,stepp"])
    assert module("run").main() == 2
    message = "error: there is no row stepp; the rows are step, epoch, to-98, to-99, command, ranks, overhead.\n"
    assert capsys.readouterr().err == message


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_take_turns_and_a_side_that_fails_says_why(module: Module, tiny: Path, tmp_path: Path) -> None:
    run = module("run")
    with ExitStack() as stack:
        setup = run.SimpleNamespace(dataset="fashion-mnist", data_dir=tiny, scratch=tmp_path, stack=stack)
        (two,) = run.start(run.Worker(setup, "ours", 1, ranks=2))
        assert two.ask(1, settings={"batch_size": 500})["images"] == 1501
        assert 0 < run.Worker(setup, "overhead", 1, ranks=2).ask()["share"] < 1
        setup.data_dir = tmp_path
        with pytest.raises(RuntimeError, match="RuntimeError: Dataset not found"):
            run.start(run.Worker(setup, "tutorial"))


@pytest.mark.slow
def test_a_quick_row_of_generated_digits_from_its_command_to_its_files(tmp_path: Path) -> None:
    flags = ["--quick", "--rows", "step", "--dataset", "synthetic", "--json", str(tmp_path)]
    ended = jobs.run([sys.executable, str(ROOT / "benchmarks/run.py"), *flags])
    assert ended.code == 0, ended.err
    (file,) = tmp_path.glob("cpu-*.json")
    assert file.with_suffix(".md").read_text() == ended.out
    report = json.loads(file.read_text())
    assert report["dataset"] == "synthetic" and torch.__version__.startswith(report["machine"]["versions"]["torch"])
    assert [line["ratio"]["n"] for line in report["rows"]["step"]] == [2, 2]
