"""The benchmark: that it measures both sides of every row and says so. Never how long anything took."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jobs
import pytest
import torch

from ddp_mnist import bench, bench_rows, bench_setup, bench_table, data, reference
from ddp_mnist.bench_rows import Line
from ddp_mnist.bench_setup import Setup
from ddp_mnist.errors import JobError
from ddp_mnist.model import CNN
from ddp_mnist.step import TrainStep

IMAGES = 1_200
STATISTICS = {"n", "median", "min", "max", "mean", "sd", "values"}
LINE = {"row", "what", "unit", "shown", "against", "ours", "other", "ratio", "ratio_min", "ratio_max"}
ROWS = [
    *("loader", "step", "epoch", "time-to-98", "time-to-99", "evaluation"),
    *("checkpoint", "start-up", "command", "ranks", "overhead"),
]
LINES = {"time-to-98": 2, "time-to-99": 2, "checkpoint": 2, "start-up": 6, "command": 2, "ranks": 2, "overhead": 5}
"""Of a row that has more than one on a CPU."""
MACHINE = {"cpu", "cores", "threads", "gpu", "gpus", "cuda", "platform", "versions", "git", "date", "load_average"}
SCALING = {"estimate", "how", "device", "alone_seconds", "step_seconds", "all_reduce", "batches"}
WITHOUT_OTHER = {"checkpoint", "start-up"}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], jobs.Ended]:
    """The whole quick benchmark as CI can run it: without network, on a slice of the generated digits."""
    file = tmp_path_factory.mktemp("bench") / "figures.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "FOREVER", 280.0)
        words = ["--quick", "--dataset", "synthetic", "--images", str(IMAGES), "--json", str(file)]
        # Where other processes have the cores, threads that wait spinning make it ten times slower.
        ended = jobs.run([sys.executable, "-m", "ddp_mnist.bench", *words], {"OMP_WAIT_POLICY": "passive"})
    assert ended.code == 0, ended.err
    return jobs.read_json(file), ended


@pytest.fixture
def report(quick: tuple[dict[str, Any], jobs.Ended]) -> dict[str, Any]:
    return copy.deepcopy(quick[0])


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def setup(tiny: Path, tmp_path: Path) -> Setup:
    train, test = data.load("fashion-mnist", tiny)
    return Setup("fashion-mnist", tiny, tmp_path, train, test, 1, 1, 2, 1, 1, jobs.environment())


@pytest.mark.slow
def test_every_row_is_measured_on_both_sides_and_every_figure_is_finite(report: dict[str, Any]) -> None:
    assert Counter(line["row"] for line in report["rows"]) == Counter(ROWS) | Counter(LINES)
    assert len({(line["what"], line["unit"], line["against"]) for line in report["rows"]}) == len(report["rows"])
    for line in report["rows"]:
        assert line.keys() == LINE, line
        assert line["ours"].keys() == STATISTICS, line
        assert line["row"] in WITHOUT_OTHER or line["other"], line
        for side in filter(None, (line["ours"], line["other"])):
            assert side["n"] == len(side["values"]) > 0
            assert side["min"] <= side["median"] <= side["max"]
            assert all(value > 0 for value in side["values"]), line
        if line["other"]:
            assert line["against"]
            assert len(line["other"]["values"]) == len(line["ours"]["values"])
            ratio = line["ours"][line["shown"]] / line["other"][line["shown"]]
            assert line["ratio"] == pytest.approx(ratio, rel=1e-4)
    assert all(math.isfinite(value) for value in numbers(report))
    (inside,) = (line for line in report["rows"] if line["what"] == "the first of them, by its own clock")
    assert inside["ratio"] > 1  # the steps of a run are a part of it


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from numbers(item)
    elif isinstance(value, int | float):
        yield value


@pytest.mark.slow
def test_the_json_names_the_machine_and_what_was_measured_on(report: dict[str, Any]) -> None:
    machine = report["machine"]
    assert report.keys() == {"what", "machine", "data", "settings", "seconds", "missing", "rows", "scaling"}
    assert machine.keys() == MACHINE
    assert machine["cpu"] and machine["cores"] >= 1 and machine["threads"] >= 1 and machine["date"]
    assert machine["gpu"] is None and machine["gpus"] == 0  # hidden from it
    assert len(machine["load_average"]) == 3
    assert machine["versions"]["torch"] and machine["versions"]["accelerate"]
    assert report["data"] == {"name": "synthetic", "train_images": IMAGES, "test_images": IMAGES // 6}
    expected = {"quick": True, "rows": [*ROWS, "scaling"], "repeats": 1, "seeds": 2, "steps": 10, "epochs": 1}
    assert report["settings"] == expected


@pytest.mark.slow
def test_the_scaling_is_an_estimate_from_one_step_and_one_all_reduce(report: dict[str, Any]) -> None:
    scaling = report["scaling"]
    assert scaling.keys() == SCALING and scaling["estimate"] is True
    exchange = scaling["all_reduce"]
    assert (exchange["ranks"], exchange["bytes"], exchange["backend"]) == (2, 4 * 9098, "gloo")
    for found in scaling["batches"]:
        batch, speeds = found["batch"], found["images_per_second"]
        assert list(speeds) == ["1", "2", "4", "8", "16", "32", "64"]
        assert speeds["1"] == pytest.approx(batch / scaling["alone_seconds"][str(batch)], rel=1e-2)
        four = batch / (scaling["step_seconds"][str(batch // 4)] + 2 * exchange["seconds"])
        assert speeds["4"] == pytest.approx(four, rel=1e-2)
        assert found["efficiency"]["4"] == pytest.approx(speeds["4"] / speeds["1"] / 4, rel=1e-2)
        enough = found["enough_ranks"]
        assert enough == 64 or speeds[str(2 * enough)] < 1.1 * speeds[str(enough)]


@pytest.mark.slow
def test_it_prints_the_table_of_its_json_and_warns_of_generated_digits(
    quick: tuple[dict[str, Any], jobs.Ended],
) -> None:
    found, ended = quick
    assert ended.out == bench_table.table([found]) + "\n"
    assert "THIS IS NOT MNIST" in ended.err
    assert "a slice of generated digits, NOT MNIST" in ended.out


@pytest.mark.slow
def test_the_table_has_a_line_for_each_quantity_and_says_what_a_gpu_lacks(report: dict[str, Any]) -> None:
    lines = bench_table.table([report]).splitlines()
    for line in report["rows"]:
        cells = [[cell.strip() for cell in text.split("|")[1:-1]] for text in lines if f"| {line['what']} " in text]
        (found,) = [row for row in cells if row[:3] == [line["what"], line["unit"], line["against"] or ""]]
        assert len(found) == 7 and found[6] == "not measured"
        assert bool(found[3]) and bool(found[4]) == bool(line["other"])
        assert bool(found[5]) == (line["ratio"] is not None and line["unit"] != "%")
    assert sum("ESTIMATE" in line for line in lines) == 1
    assert sum("would bring less than 10 % more images/s" in line or "still help" in line for line in lines) == 2


@pytest.mark.slow
def test_the_estimate_alone_has_no_table_of_quantities(report: dict[str, Any]) -> None:
    lines = bench_table.table([report | {"rows": []}]).splitlines()
    assert not [line for line in lines if line.startswith("| what")]
    assert [line for line in lines if line.startswith("| global batch")]


@pytest.mark.slow
def test_two_reports_stand_side_by_side(
    report: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = copy.deepcopy(report)
    gpu["machine"]["gpu"] = "A Card"
    gpu["rows"] = [line for line in gpu["rows"] if line["row"] != "ranks"]
    gpu["scaling"] = None
    files = [tmp_path / "cpu.json", tmp_path / "gpu.json"]
    for file, content in zip(files, (report, gpu), strict=True):
        file.write_text(json.dumps(content))
    assert bench.main(["--table", *map(str, files)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (header,) = [line for line in lines if line.startswith("| what")]
    assert header.index("ours, CPU") < header.index("ours, A Card")
    assert "GPU" not in header
    assert [line.split("|")[1].strip() for line in lines if "not measured" in line] == [
        line["what"] for line in report["rows"] if line["row"] == "ranks"
    ]


def test_medians_spread_and_ratios_of_known_times() -> None:
    line = Line("what", "s", "them", ours=[1.0, 2.0, 4.0], other=[2.0, 2.0, 16.0])
    found = bench._figures("row", line)
    assert (found["ours"]["median"], found["ours"]["min"], found["ours"]["max"]) == (2, 1, 4)
    assert (found["ratio"], found["ratio_min"], found["ratio_max"]) == (1, 0.25, 1)
    assert bench_table._cells(found) == ["2 (1-4)", "2 (2-16)", "1 (0.25-1)"]
    line.mean = True
    assert bench_table._cells(bench._figures("row", line))[0] == "2.33 ± 1.53"


@pytest.mark.parametrize("alone", [True, False])
def test_a_share_of_several_ranks_has_the_work_of_their_exchange(
    setup: Setup, threads: None, monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    exchanges: list[int] = []
    exchange = TrainStep._exchange

    def counted(step: TrainStep) -> None:
        exchanges.append(step.config.batch_size)
        exchange(step)

    monkeypatch.setattr(TrainStep, "_exchange", counted)
    found = bench_rows.share_seconds(setup, {8, 16}, threads=1, alone=alone)
    assert list(found) == [8, 16] and all(found.values())
    assert set(exchanges) == (set() if alone else {8, 16})


@pytest.mark.parametrize(("repeats", "turns"), [(1, 1), (3, 9)])
def test_what_varies_most_has_more_turns(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, repeats: int, turns: int
) -> None:
    monkeypatch.setattr(bench_rows, "on_cpu", lambda *_: {"512": 1.0, "64": 1.0})
    lines = bench_rows.ranks(dataclasses.replace(setup, repeats=repeats))
    assert [(len(line.ours), len(line.other)) for line in lines] == [(turns, turns)] * 2


def test_both_sides_come_first_in_turn() -> None:
    order: list[str] = []
    bench_rows.in_turn(3, lambda n: order.append(f"ours {n}"), lambda n: order.append(f"other {n}"))
    assert order == ["ours 0", "other 0", "other 1", "ours 1", "ours 2", "other 2"]


def test_a_slice_reaches_both_sides_with_the_same_images(tmp_path: Path, setup: Setup) -> None:
    train = data.Split(setup.train.images[:100], setup.train.labels[:100])
    name = bench_setup.stage("mnist", train, setup.test, tmp_path / "staged")
    ours, _ = data.load(name, tmp_path / "staged")
    assert torch.equal(ours.images, train.images) and torch.equal(ours.labels, train.labels)
    theirs = reference.tutorial_loaders(name, tmp_path / "staged")[0].dataset
    assert torch.equal(torch.stack([image for image, _ in theirs]), data.to_float(train.images))
    assert [label for _, label in theirs] == train.labels.tolist()


def test_the_restated_network_is_interchangeable_with_ours() -> None:
    torch.manual_seed(0)
    theirs = reference.TutorialCNN()
    torch.manual_seed(0)
    ours = CNN()
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in theirs.state_dict().items())
    torch.manual_seed(1)
    other = reference.TutorialCNN()
    ours.load_state_dict(other.state_dict())
    theirs.load_state_dict(ours.state_dict())
    images = torch.rand(20, 1, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_the_restated_tutorial_learns_and_counts_every_image(setup: Setup, threads: None) -> None:
    train, test = reference.tutorial_loaders(setup.dataset, setup.root)
    tutorial = reference.Tutorial()
    before, count = tutorial.score(test)
    assert count == len(setup.test)
    for _ in range(4):
        tutorial.epoch(train)
    after, _ = tutorial.score(test)
    assert before / count < 0.3 < 0.6 < after / count


def test_the_published_recipe_is_restated_and_learns(setup: Setup, threads: None) -> None:
    net = reference.PublishedNet()
    shapes = [tuple(value.shape) for name, value in net.named_parameters() if name.endswith("weight")]
    assert shapes == [(24, 1, 5, 5), (32, 24, 3, 3), (256, 800), (10, 256)]
    images, labels = reference.published_tensors(setup.train.images, setup.train.labels, torch.device("cpu"))
    plain = data.to_float(setup.train.images)
    assert images.mean().item() == pytest.approx((plain.mean().item() - 0.1307) / 0.3081, abs=1e-4)
    assert sorted(labels.tolist()) == sorted(setup.train.labels.tolist())
    assert not torch.equal(labels, setup.train.labels)
    again = reference.published_tensors(setup.train.images, setup.train.labels, torch.device("cpu"))
    assert torch.equal(images, again[0])  # one order for all seeds
    steps: list[float] = []
    adam = torch.optim.Adam.step

    def step(self: torch.optim.Adam, *arguments: Any) -> Any:
        group = self.param_groups[0]
        assert group["betas"] == (0.7, 0.9)
        steps.append(group["lr"])
        return adam(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", step)
        trained = reference.train_published(images, labels, seed=0)
    assert len(steps) == math.ceil(len(labels) / 256)
    assert steps[0] == pytest.approx(1e-2 / 25)
    assert steps[-1] < steps[0] < max(steps) <= 1e-2
    assert reference.published_accuracy(trained, images, labels) > 0.3


def figures() -> dict[str, Any]:
    """What `measure` gives where one row was asked for."""
    return {
        "machine": bench._machine(1) | {"load_average": [0.0, 0.0, 0.0]},
        "data": {"name": "mnist", "train_images": 60_000, "test_images": 10_000},
        "settings": {"repeats": 1, "seeds": 1},
        "rows": [bench._figures("loader", Line("loader alone", "images/s", "them", ours=[3.0], other=[2.0]))],
        "scaling": None,
    }


@pytest.mark.parametrize("kept", [True, False], ids=["--json", "only printed"])
def test_figures_are_printed_and_kept_where_it_was_asked(
    kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = figures()
    monkeypatch.setattr(bench, "measure", lambda options: iter([found]))
    monkeypatch.chdir(tmp_path)
    assert bench.main(["--json", "figures.json"] if kept else []) == 0
    assert capsys.readouterr() == (bench_table.table([found]) + "\n", "")
    assert [jobs.read_json(file) for file in tmp_path.iterdir()] == ([found] if kept else [])


def test_figures_that_cannot_be_written_are_printed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = figures()
    folder = tmp_path / "gone"
    folder.mkdir()
    file = folder / "figures.json"
    monkeypatch.setattr(bench, "measure", lambda options: (folder.rmdir(), iter([found]))[1])
    assert bench.main(["--json", str(file)]) == 1
    assert capsys.readouterr() == (
        bench_table.table([found]) + "\n",
        f"error: --json {file} cannot be written: No such file or directory.\n",
    )


@pytest.mark.parametrize(("gpu", "name"), [(None, "cpu-2-cores-2026-11-24"), ("NVIDIA H200", "nvidia-h200-2026-11-24")])
def test_in_a_folder_figures_and_table_have_the_name_of_device_and_date(
    gpu: str | None, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = figures()
    found["machine"] |= {"gpu": gpu, "cores": 2, "date": "2026-11-24"}
    half = found | {"rows": []}  # what is there when it is stopped
    monkeypatch.setattr(bench, "measure", lambda options: iter([half, found]))
    names = [name, f"{name}-2", f"{name}-3"]
    for each in names:  # none takes the place of another
        assert bench.main(["--json", str(tmp_path)]) == 0
        file = tmp_path / f"{each}.json"
        assert capsys.readouterr().err == f"Kept in {file}, its table beside it.\n"
        assert jobs.read_json(file) == found
        assert file.with_suffix(".md").read_text() == bench_table.table([found]) + "\n"
    assert len(list(tmp_path.iterdir())) == 2 * len(names)


@pytest.mark.parametrize("says", ["model name\t: A Chip\n", "processor\t: 0\n", None])
def test_the_processor_has_the_name_the_system_gives_it_or_that_of_its_kind(
    says: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path) -> str:
        assert str(path) == "/proc/cpuinfo"
        if says is None:
            raise FileNotFoundError(path)
        return says

    monkeypatch.setattr(Path, "read_text", read)
    kind = platform.processor() or platform.machine()
    assert bench._cpu_model() == ("A Chip" if says and "name" in says else kind) != ""


def test_a_slice_of_mnist_is_measured_and_said_to_be_one(mnist: Path, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    words = ["--quick", "--rows", "loader", "--dataset", "mnist", "--data-dir", str(mnist), "--json", str(file)]
    ended = jobs.run([sys.executable, "-m", "ddp_mnist.bench", *words])
    assert ended.code == 0, ended.err
    assert jobs.read_json(file)["data"] == {"name": "mnist", "train_images": 1_500, "test_images": 250}
    assert "1,500 training and 250 test images of a slice of MNIST: accuracies and ratios are not those" in ended.out
    assert "NOT MNIST" not in ended.out + ended.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rows", "loader,speed"], ["'speed'", "loader", "time-to-98"]),
        (["--rows", ""], ["''"]),
        (["--repeats", "0"], ["--repeats is 0", "from 1 to 1000"]),
        (["--seeds", "-1"], ["--seeds is -1"]),
        (["--images", "100"], ["--images is 100", "from 1200 to 60000"]),
        (["--dataset", "imagenet"], ["imagenet", "synthetic"]),
        (["--fast"], ["--fast"]),
    ],
)
def test_a_bad_flag_is_named(flags: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        bench.main(flags)
    assert exit.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert all(word in message for word in words), message


def test_what_cannot_work_is_said_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "measure", lambda options: pytest.fail("measured"))
    (tmp_path / "other.json").write_text('{"ratio": 2}')
    missing = tmp_path / "nowhere"
    for flags, message in {
        (
            "--json",
            f"{missing}/file.json",
        ): f"--json {missing}/file.json: there is no directory {missing}. Make it first.",
        ("--table", f"{missing}"): f"--table {missing} is not what `--json` writes: No such file or directory.",
        ("--table", f"{tmp_path}/other.json"): "it lacks machine, data, rows or scaling",
    }.items():
        assert bench.main(flags) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and message in line
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert bench.main([]) == 2
    assert "starts its own ranks" in capsys.readouterr().err


def test_a_failing_child_is_reported_in_its_own_words_and_ends_the_others(setup: Setup, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    commands = [
        ["-c", "import time; time.sleep(600)"],  # past the time limit of a test
        ["-c", f"import sys; open({str(mark)!r}, 'w'); sys.exit('the disk is gone')"],
    ]
    with pytest.raises(JobError, match=r"ended with 1 and said: the disk is gone") as error:
        bench_setup.run_together(setup, commands, [{}, {}])
    assert mark.exists() and "ended with -9" not in str(error.value)


def test_a_child_that_does_not_end_is_named_and_ended(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def wait_for_the_first_to_end(_: float) -> None:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
        now[0] = math.inf

    monkeypatch.setattr(bench_setup, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=wait_for_the_first_to_end))
    commands = [["-c", "print(1)"], ["-c", "import time; time.sleep(600)"]]
    with pytest.raises(JobError, match=r"^`python -c import time; time.sleep\(600\)` did not end within 1800 s\.$"):
        bench_setup.run_together(setup, commands, [{}, {}])


def test_ctrl_c_in_a_run_of_ours_ends_the_benchmark(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_setup, "fit", lambda config: SimpleNamespace(summary={"exit_code": 75}))

    def measure(_: Any) -> Iterator[dict[str, Any]]:
        yield setup.job()

    monkeypatch.setattr(bench, "measure", measure)
    assert bench.main([]) == 130
    assert capsys.readouterr().err == "stopped: no row was done\n"


@pytest.mark.slow
def test_a_benchmark_that_is_stopped_keeps_the_rows_that_are_done(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    words = ["--quick", "--rows", "loader,start-up,command", "--dataset", "synthetic", "--images", str(IMAGES)]
    command = [sys.executable, "-m", "ddp_mnist.bench", *words, "--json", str(file)]
    with subprocess.Popen(
        command, env=jobs.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            deadline = time.monotonic() + 120
            while not (file.exists() and jobs.read_json(file)["missing"] == ["command"]):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert f"stopped: the rows done are above, and in {file}" in err
    assert "Stopped before command." in out and "| loader alone" in out and "whole command" not in out
    assert {line["row"] for line in jobs.read_json(file)["rows"]} == {"loader", "start-up"}
    assert bench_table.table([jobs.read_json(file)]) + "\n" == out
