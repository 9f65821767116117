"""A network and data of the user: the README's example as it stands, killed and resumed; and bad input."""

from __future__ import annotations

import math
import random
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import documents
import faults
import jobs
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from documents import README, ROOT
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

from ddp_mnist import CNN, Result, TrainConfig, evaluate, fit, train
from ddp_mnist.errors import JobError, UsageError
from ddp_mnist.report.page import draw

STEPS = 3 * 32


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the README's example, as a file."""
    (code,) = re.findall(r"```python\n(.*?fit\(.*?)```", README.read_text(), re.DOTALL)
    path = tmp_path_factory.mktemp("own") / "mine.py"
    path.write_text(code)
    return path


@pytest.fixture(scope="module")
def finished(script: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of the example's undisturbed run on two ranks."""
    return run_example(script, 2, tmp_path_factory.mktemp("finished"))


def run_example(script: Path, world_size: int, folder: Path) -> Path:
    jobs.succeeded(jobs.run_ranks(world_size, program=[sys.executable, str(script)], cwd=folder))
    return folder / "runs" / "mine"


@pytest.mark.slow
@pytest.mark.distributed
def test_the_readmes_example_learns(finished: Path) -> None:
    summary = jobs.read_json(finished / "summary.json")
    assert (summary["world_size"], summary["steps"], summary["finished"]) == (2, STEPS, True)
    assert summary["samples_seen"] == 3 * summary["train_count"]
    assert summary["test_accuracy"] > 0.9
    assert len(summary["test_confusion"]) == 4


@pytest.mark.slow
@pytest.mark.distributed
def test_it_is_killed_and_resumed_bit_for_bit(script: Path, tmp_path: Path) -> None:
    """Dropout's draws and batch norm's averages included; from three ranks on, DDP chooses the order of its sums."""
    expected = run_example(script, 4, tmp_path)
    (folder := tmp_path / "killed").mkdir()
    command = [sys.executable, str(script)]
    environments = [jobs.environment(own) for own in jobs.rank_variables(4)]
    run_dir = folder / "runs" / "mine"
    with faults.Job([command] * 4, environments, cwd=folder) as job:
        faults.wait_for(lambda: faults.checkpoint_steps(run_dir) or not job.running(), "a checkpoint", job)
        job.kill()
    assert not (run_dir / "summary.json").exists(), "the example is too short for this test"
    run_example(script, 4, folder)
    assert 0 < jobs.read_json(run_dir / "summary.json")["resumed_from"] < STEPS
    faults.assert_same_result(run_dir, expected)


@pytest.mark.slow
@pytest.mark.distributed
def test_it_stops_on_a_signal_with_75_and_the_command_that_resumes(
    script: Path, finished: Path, tmp_path: Path
) -> None:
    command = [sys.executable, str(script)]
    environments = [jobs.environment(own) for own in jobs.rank_variables(2)]
    run_dir = tmp_path / "runs" / "mine"
    with faults.Job([command] * 2, environments, cwd=tmp_path) as job:
        faults.wait_for(lambda: faults.checkpoint_steps(run_dir) or not job.running(), "a checkpoint", job)
        job.signal(signal.SIGTERM, 1)
        ended = job.wait()
    assert [process.code for process in ended] == [75, 0]
    assert faults.printed_command(ended[0].out).endswith(f"python {script}")
    faults.assert_same_result(run_example(script, 2, tmp_path), finished)


@pytest.mark.slow
@pytest.mark.distributed
def test_the_averages_that_are_saved_are_those_that_were_scored(script: Path, finished: Path) -> None:
    """Rank 0's buffers; the passes of the warm-up do not count."""
    tensors = load_file(finished / "model.safetensors")
    assert tensors["1.num_batches_tracked"].item() == STEPS
    assert tensors["1.num_batches_tracked"].dtype == torch.int64
    namespace: dict[str, Any] = {}
    exec(script.read_text().split("config =")[0], namespace)
    net = namespace["network"]()
    net.load_state_dict(tensors)
    test = namespace["stripes"](503, seed=1)
    with torch.no_grad():
        correct = (net.eval()(test.tensors[0]).argmax(1) == test.tensors[1]).sum().item()
    assert correct == jobs.read_json(finished / "summary.json")["test_correct"]


SEVERAL = """
for seed in 0, 1, 2:
    config = TrainConfig(batch_size=64, epochs=1, seed=seed, output_dir=f"runs/{seed}", wandb="disabled", threads=1)
    result = fit(config, model=network, data=(stripes(317, seed=0), stripes(103, seed=1)))
    if result.exit_code:
        break
result.exit()
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_several_fits_in_one_script_give_the_results_of_a_script_each(script: Path, tmp_path: Path) -> None:
    """They set up the process group again and again at the same port, with torchrun's store and with their own."""
    several, alone = tmp_path / "several.py", tmp_path / "alone.py"
    several.write_text(script.read_text().split("config =")[0] + SEVERAL)
    alone.write_text(several.read_text().replace("in 0, 1, 2:", "in (2,):"))
    folders = [tmp_path / name for name in ("torchrun", "variables", "alone")]
    for folder in folders:
        folder.mkdir()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--master-port", str(jobs.free_port())]
    jobs.succeeded([jobs.run([*torchrun, "--nproc-per-node", "2", str(several)], cwd=folders[0])])
    for folder, program in zip(folders[1:], (several, alone), strict=True):
        jobs.succeeded(jobs.run_ranks(2, program=[sys.executable, str(program)], cwd=folder))
    assert len({(folders[0] / "runs" / name / "model.safetensors").read_bytes() for name in ("0", "1", "2")}) == 3
    for folder in folders[:2]:
        faults.assert_same_result(folder / "runs" / "2", folders[2] / "runs" / "2")


@pytest.mark.slow
def test_a_path_means_what_it_meant_before_data_changed_the_directory(script: Path, tmp_path: Path) -> None:
    text = script.read_text().split("config =")[0].replace("import TrainConfig, fit", "import run")
    path = tmp_path / "command.py"
    code = "def data():\n    os.makedirs('elsewhere')\n    os.chdir('elsewhere')\n    return (stripes(64, 0),) * 2"
    path.write_text(f"import os\n{text}\n{code}\n\nrun(model=network, data=data)\n")
    ended = jobs.run([sys.executable, str(path), "--epochs", "1", "--output-dir", "run"], cwd=tmp_path)
    jobs.succeeded([ended])
    assert f"wrote {tmp_path / 'run'}" in ended.out and (tmp_path / "run" / "summary.json").exists()


@pytest.mark.slow
def test_run_gives_a_script_the_flags_and_exit_codes_of_the_command(script: Path, tmp_path: Path) -> None:
    text = script.read_text().split("config =")[0].replace("import TrainConfig, fit", "import run")
    path = tmp_path / "command.py"
    path.write_text(f"{text}\nrun(model=network, data=lambda: (stripes(201, seed=0), stripes(53, seed=1)))\n")
    program = [sys.executable, str(path)]
    assert "--epochs is 0; it should be" in jobs.the_message([jobs.run([*program, "--epochs", "0"])], 2)
    ended = jobs.run([*program, "--epochs", "2", "--max-steps", "3", "--output-dir", "run"], cwd=tmp_path)
    jobs.succeeded([ended])
    assert jobs.read_json(tmp_path / "run" / "summary.json")["steps"] == 3
    assert faults.printed_command(ended.out).endswith(f"python {path} --output-dir run --epochs 2")


# --- docs/your-own.md, as it stands there

YOUR_OWN = ROOT / "docs" / "your-own.md"
PICTURES, REGRESSION, DICTS = (code for _, code in documents.blocks(YOUR_OWN, "python"))


def run_mine(folder: Path, code: str, line: str = "python mine.py") -> str:
    """Run a script by a command line of the document. Return what it prints."""
    (folder / "mine.py").write_text(code)
    torchrun = f"-m torch.distributed.run --master-port {jobs.free_port()}"
    words = line.replace("torchrun", torchrun).removeprefix("python ").split()
    ended = jobs.run([sys.executable, *words], cwd=folder)
    jobs.succeeded([ended])
    return ended.out


@pytest.mark.slow
@pytest.mark.distributed
def test_pictures_from_a_folder_are_trained_with_two_groups_of_adamw(tmp_path: Path) -> None:
    for name, count in (("train/cat", 20), ("train/dog", 20), ("test/cat", 3), ("test/dog", 6)):
        (folder := tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(count):
            Image.effect_noise((32, 32), 20 + 60 * ("dog" in name)).convert("RGB").save(folder / f"{number}.png")
    line = "torchrun --nproc-per-node 2 mine.py --workers 2 --batch-size 16 --epochs 2 --output-dir runs/mine"
    assert line in documents.commands(YOUR_OWN)
    out = run_mine(tmp_path, PICTURES, line)
    assert "2 ranks" in out and "AdamW 0.001 constant" in out
    summary = jobs.read_json(tmp_path / "runs" / "mine" / "summary.json")
    assert (summary["finished"], summary["world_size"], summary["samples_seen"]) == (True, 2, 80)
    assert (summary["train_count"], summary["test_count"], len(summary["test_confusion"])) == (40, 9, 2)


@pytest.mark.slow
def test_a_regression_is_trained(tmp_path: Path) -> None:
    run_mine(tmp_path, REGRESSION)
    summary = jobs.read_json(tmp_path / "runs" / "sine" / "summary.json")
    assert summary["test_loss"] < 0.1 and summary["test_accuracy"] is None


DATASETS = """
import torch
class Reviews(dict):
    def with_format(self, name):
        assert name == "torch"
        return self
def review(number):
    words = 500 * (number % 2) + torch.arange(7) * number % 500
    return {"label": torch.tensor(number % 2), "input_ids": words, "attention_mask": torch.ones(7, dtype=torch.int64)}
def load_dataset(kind, data_dir):
    return Reviews(train=[review(number) for number in range(900)], test=[review(number) for number in range(99)])
"""


@pytest.mark.slow
def test_dicts_become_pairs(tmp_path: Path) -> None:
    """With a stand-in for Hugging Face's package."""
    (tmp_path / "datasets.py").write_text(DATASETS)
    run_mine(tmp_path, DICTS)
    assert jobs.read_json(tmp_path / "runs" / "reviews" / "summary.json")["test_accuracy"] > 0.6


# --- In this process


def linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(12, 3))


def points(count: int, seed: int = 0) -> TensorDataset:
    draw = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.rand(count, 3, 4, generator=draw), torch.randint(3, (count,), generator=draw))


@pytest.fixture
def fit_here(tmp_path: Path, process_of_a_job: None) -> Callable[..., Result]:
    common: dict[str, Any] = {"batch_size": 20, "epochs": 2, "threads": 1, "pictures": False}

    def run(name: str = "run", model: Any = linear, data: Any = None, **settings: Any) -> Result:
        config = TrainConfig(output_dir=tmp_path / name, **common, **settings)
        return fit(config, model=model, data=data or (points(101), points(31, seed=1)))

    return run


def test_a_result_has_the_summary_and_the_trained_network(fit_here: Callable[..., Result]) -> None:
    result = fit_here()
    assert result.summary == jobs.read_json(result.run_dir / "summary.json")
    assert (result.exit_code, result.summary["steps"], result.summary["samples_seen"]) == (0, 12, 202)
    saved = load_file(result.run_dir / "model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in result.model.state_dict().items())
    assert jobs.read_json(result.run_dir / "config.json")["steps_per_epoch"] == 6
    again = fit_here()  # finished: the network is loaded, nothing is trained
    assert all(torch.equal(value, saved[name]) for name, value in again.model.state_dict().items())
    assert again.summary == result.summary


class Moded(nn.Module):
    """Notes the modes of itself and of a frozen layer whenever it is trained."""

    modes: set[tuple[bool, bool]]

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.head = nn.Dropout().eval(), nn.LazyLinear(4)
        self.register_buffer("mask", torch.tensor(-math.inf))  # as attention has them, and it is saved

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            self.modes.add((self.training, self.frozen.training))
        return self.head(images.flatten(1))


def test_a_network_is_in_training_mode_and_layers_that_it_has_frozen_are_not(fit_here: Callable[..., Result]) -> None:
    Moded.modes = set()
    fit_here(model=Moded)
    assert Moded.modes == {(True, False)}
    Moded.modes = set()
    fit_here("loaded", model=lambda: Moded().eval())  # as Hugging Face's come
    assert Moded.modes == {(True, True)}


class Noisy(nn.Module):
    """A network that keeps what it has drawn and counts its calls, as batch norm does."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(12, 3)
        self.calls = nn.Buffer(torch.zeros((), dtype=torch.int64))
        self.drawn: list[tuple[float, ...]] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.drawn.append((torch.rand(()).item(), random.random(), np.random.rand()))
            self.calls += 1
        return self.out(images.flatten(1))


def test_every_step_draws_anew(fit_here: Callable[..., Result]) -> None:
    net, again = (fit_here(name, model=Noisy).model for name in ("run", "again"))
    assert isinstance(net, Noisy) and isinstance(again, Noisy)
    assert all(len(set(numbers)) == 12 for numbers in zip(*net.drawn, strict=True))
    assert net.drawn == again.drawn


def test_our_network_with_a_layer_of_the_scripts_own_draws_as_if_it_had_not_been_stopped(
    fit_here: Callable[..., Result],
) -> None:
    def network() -> nn.Module:
        net = CNN()
        net.fc1 = nn.Sequential(nn.Dropout(), net.fc1)  # type: ignore[assignment]
        return net

    images = TensorDataset(torch.rand(101, 1, 28, 28), torch.arange(101) % 10)
    whole = fit_here("whole", model=network, data=(images, images)).run_dir
    fit_here("pieces", model=network, data=(images, images), max_steps=8)
    pieces = fit_here("pieces", model=network, data=(images, images)).run_dir
    faults.assert_same_result(pieces, whole)


def test_an_error_of_a_network_reaches_the_caller_unchanged(fit_here: Callable[..., Result]) -> None:
    class Failing(nn.Linear):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("a mistake of its own")

    with pytest.raises(RuntimeError, match=r"^a mistake of its own$"):
        fit_here(model=lambda: Failing(12, 3))


def test_memory_that_is_not_there_is_one_message(fit_here: Callable[..., Result], tmp_path: Path) -> None:
    class Hungry(nn.Linear):
        calls = 0

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.calls += self.training
            torch.empty((self.calls > 3) << 50)
            return super().forward(images.flatten(1))

    with pytest.raises(JobError, match=r"has no more memory.*--accumulate"):
        fit_here(model=lambda: Hungry(12, 3))
    summary = jobs.read_json(tmp_path / "run" / "summary.json")
    assert (summary["steps"], summary["stop_reason"]) == (3, "out_of_memory")
    assert summary["train_seconds"] > 0 < summary["images_per_second"]  # of steps that no line has counted yet


def test_many_classes_are_scored_without_a_confusion_matrix(
    fit_here: Callable[..., Result], capfd: pytest.CaptureFixture[str]
) -> None:
    result = fit_here(model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 101)))
    assert result.summary["test_count"] == 31 and result.summary["test_confusion"] is None
    scored = [line for line in jobs.read_metrics(result.run_dir) if "test/accuracy" in line]
    assert len(scored) == 2 and not any("test/confusion" in line for line in scored)
    assert capfd.readouterr().out.count("more than 100 classes") == 1
    draw([result.run_dir])
    assert {path.name for path in result.run_dir.glob("*.png")} == {"curves.png"}


def test_steps_that_fp16_skips_are_counted_and_a_resumed_run_keeps_its_scale(
    fit_here: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scaler as fp16 has it on a GPU; the network's gradients overflow until its fourth step finds the scale."""
    scalers: list[torch.amp.GradScaler] = []
    make_accelerator, make_adam = Accelerator.__init__, torch.optim.Adam.__init__

    def accelerator_with_scaler(self: Accelerator, **options: Any) -> None:
        make_accelerator(self, **options)
        self.scaler = torch.amp.GradScaler("cpu")
        scalers.append(self.scaler)

    def adam_in_steps(self: torch.optim.Adam, *arguments: Any, **options: Any) -> None:
        make_adam(self, *arguments, **options | {"fused": False})

    def overflowing() -> nn.Module:
        net = linear()
        next(net.parameters()).register_hook(lambda gradient: gradient / (scalers[-1].get_scale() <= 2.0**13))
        return net

    monkeypatch.setattr(Accelerator, "__init__", accelerator_with_scaler)
    monkeypatch.setattr(torch.optim.Adam, "__init__", adam_in_steps)
    settings: dict[str, Any] = {"model": overflowing, "log_every": 1}
    whole = fit_here("whole", **settings)
    assert (whole.summary["steps"], whole.summary["skipped_steps"]) == (12, 3)
    assert [line.get("train/skipped_steps") for line in jobs.read_metrics(whole.run_dir)] == [1, 2, *[3] * 10]
    for stopped_at in (2, 5):
        fit_here("pieces", **settings, fresh=True, max_steps=stopped_at)
        pieces = fit_here("pieces", **settings)
        assert (pieces.summary["resumed_from"], pieces.summary["skipped_steps"]) == (stopped_at, 3)
        faults.assert_same_result(pieces.run_dir, whole.run_dir)


def test_buffers_go_on_where_they_were(fit_here: Callable[..., Result]) -> None:
    fit_here(model=Noisy, max_steps=5)
    result = fit_here(model=Noisy)
    assert result.summary["resumed_from"] == 5
    assert load_file(result.run_dir / "model.safetensors")["calls"].item() == 12


def other_linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 4))


@pytest.mark.parametrize(
    ("max_steps", "change", "message"),
    [
        (5, {"data": (points(101, seed=5), points(31))}, "holds a run on other data"),
        (5, {"model": other_linear}, "holds a run of another network"),
        (0, {"model": other_linear}, "holds a run of another network"),
    ],
    ids=["other data", "other network", "finished"],
)
def test_a_run_is_not_resumed_as_another(
    fit_here: Callable[..., Result], max_steps: int, change: dict[str, Any], message: str
) -> None:
    summary = fit_here(max_steps=max_steps).run_dir / "summary.json"
    before = summary.read_bytes()
    with pytest.raises(UsageError, match=message):
        fit_here(**change)
    assert max_steps or summary.read_bytes() == before


ONE = torch.zeros(4, 3, 4)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = linear()

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, int]:
        return self.net(images), 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": ((ONE, torch.zeros(4)), points(31))}, "a target is torch.float32 .*expects a class"),
        (
            {"data": (points(101), (ONE, torch.zeros(3, dtype=torch.int64)))},
            r"the test set has inputs \(4, 3, 4\) and targets \(3,\)",
        ),
        ({"data": ((ONE, torch.tensor([0, 1, -1, 2])), points(31))}, "there is a label -1"),
        (
            {"data": ((ONE, torch.tensor([0, 1, 3, 2])), points(31))},
            "there is a label 3; the network tells 3 classes apart",
        ),
        ({"data": (points(101),)}, r"the data are 1 of them; expected a \(training, test\) pair"),
        ({"data": "a pair"}, r"the data are a str; expected a \(training, test\) pair"),
        ({"model": lambda: nn.Linear(4, 3)}, "expected logits"),
        ({"model": nn.Linear(12, 3)}, "`model` is a network; expected a function"),
        ({"model": lambda: Pair()}, "the network gives a tuple; expected logits"),
        ({"model": lambda: linear().requires_grad_(False)}, "no parameter to train"),
        ({"model": lambda: torch.compile(linear(), backend="eager")}, "compiled already"),
        ({"model": lambda: nn.Sequential(linear(), nn.BatchNorm1d(3))}, "BatchNorm1d cannot be trained on one"),
        ({"data": (points(101), (torch.zeros(3, 4, 4), torch.arange(3)))}, r"a test input \(torch.float32, 4, 4\)"),
        ({"data": (points(101), [1, 2, 3])}, "the test set: an item is a int; expected a pair"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_data_and_networks_get_one_clear_message(
    fit_here: Callable[..., Result], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        fit_here(**change)


class Tied(nn.Module):
    """A network with shared weights, a `view` that cannot take an empty batch, and a layer that stays frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.BatchNorm1d(3).eval()
        self.into, self.back, self.out = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3)
        self.back.weight = self.into.weight

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        flat = self.frozen(images).view(images.size(0), -1)
        return self.out(self.back(self.into(flat).relu()))


def test_networks_of_many_kinds_are_trained_and_saved(fit_here: Callable[..., Result]) -> None:
    result = fit_here(model=Tied, accumulate=4)  # the last batch is one image: three parts would be empty
    assert result.summary["finished"]
    saved = load_file(result.run_dir / "model.safetensors")
    assert torch.equal(saved["into.weight"], saved["back.weight"])
    assert saved["frozen.num_batches_tracked"] == 0
    assert not result.model.training
    volume = fit_here(
        "volume",
        model=lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.Flatten(), nn.LazyLinear(3)),
        data=((torch.rand(41, 1, 3, 3, 3), torch.arange(41) % 3),) * 2,
    )
    assert volume.summary["finished"]


# --- Scripts of several ranks

SCRIPT = """
import os, torch
from torch import nn
from ddp_mnist import CNN, TrainConfig, fit

rank = int(os.environ.get("RANK", "0"))
NETWORK
def points(count, seed):
    return torch.rand(count, 4, generator=torch.Generator().manual_seed(seed)), torch.arange(count) % LABELS
data = points(101, SEED), points(2500, 1)
config = TrainConfig(**{"batch_size": 20, "epochs": 2, "output_dir": "run", "threads": 1} | SETTINGS)
result = fit(config, model=network, data=data)
assert torch.equal(data[0][0], points(101, SEED)[0]) and torch.equal(data[1][0], points(2500, 1)[0])
result.exit()
"""
NETWORK = "def network(): return nn.Sequential(nn.Flatten(), nn.Linear(4, 2))"


def write_script(folder: Path, network: str = NETWORK, *, labels: int = 2, seed: str = "0", **settings: Any) -> Path:
    text = SCRIPT
    for word, value in {"NETWORK": network, "LABELS": labels, "SEED": seed, "SETTINGS": settings}.items():
        text = text.replace(word, str(value))
    path = folder / "script.py"
    path.write_text(text)
    return path


def run_script(folder: Path, ranks: int, *network: str, **options: Any) -> list[jobs.Ended]:
    path = write_script(folder, *network, **options)
    return jobs.run_ranks(ranks, program=[sys.executable, str(path)], cwd=folder)


# What it answers in evaluation follows from a buffer that each rank has changed in another way after the last step.
SHIFTED = """
class network(nn.Module):
    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(4, 5)
        self.register_buffer("shift", torch.zeros((), dtype=torch.int64))
    def forward(self, images):
        logits = self.unused(images.flatten(1))
        if self.training:
            self.shift += 1 + rank
            return logits
        return 0 * logits + nn.functional.one_hot(self.shift % 5, 5)
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_all_ranks_score_with_rank_0s_buffers(tmp_path: Path) -> None:
    jobs.succeeded(run_script(tmp_path, 2, SHIFTED, labels=5))
    shift = load_file(tmp_path / "run" / "model.safetensors")["shift"].item()
    confusion = jobs.read_json(tmp_path / "run" / "summary.json")["test_confusion"]
    assert confusion == [[500 if answer == shift % 5 else 0 for answer in range(5)]] * 5


PART_UNUSED = """
class network(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused, self.used_by_rank_1 = nn.Linear(4, 2), nn.Linear(4, 5), nn.Linear(4, 2)
    def forward(self, images):
        logits = self.used(images.flatten(1))
        return logits + 0 * self.used_by_rank_1(images.flatten(1)) if rank else logits
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_a_layer_that_forward_does_not_use_is_trained_around_at_any_number_of_ranks(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    counts = []
    for ranks in (1, 2):
        jobs.succeeded(run_script(tmp_path, ranks, PART_UNUSED, output_dir=f"run-{ranks}", lr=0.1))
        counts.append(jobs.read_json(tmp_path / f"run-{ranks}" / "summary.json")["test_correct"])
        assert "unused.weight" in load_file(tmp_path / f"run-{ranks}" / "model.safetensors")
    assert counts[0] == pytest.approx(counts[1], abs=5)


# 101 images in batches of 20: in the last step of an epoch rank 1 has none, and `view` cannot tell 0 rows from others.
# The first layer writes over its input, and the last has no weights before it has seen an image.
VIEWED = """
class Viewed(nn.Module):
    def forward(self, images):
        return images.sub_(0.5).view(len(images), -1)
def network(): return nn.Sequential(Viewed(), nn.LazyLinear(2))
"""


def test_weights_that_numpy_draws_follow_from_the_seed(fit_here: Callable[..., Result]) -> None:
    def drawn() -> nn.Module:
        network = linear()
        nn.init.constant_(next(network.parameters()), np.random.rand() + random.random())
        return network

    found = [load_file(fit_here(name, model=drawn).run_dir / "model.safetensors") for name in ("one", "two")]
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.slow
@pytest.mark.distributed
def test_a_network_that_takes_no_empty_share_has_the_same_curve_at_two_ranks(tmp_path: Path) -> None:
    curves: list[dict[str, list[float]]] = []
    for ranks in (1, 2):
        jobs.succeeded(run_script(tmp_path, ranks, VIEWED, output_dir=f"run-{ranks}", lr=0.1, log_every=1))
        lines = jobs.read_metrics(tmp_path / f"run-{ranks}")
        curves.append({key: [line[key] for line in lines] for key in ("train/loss", "train/accuracy")})
    one, two = curves
    assert len(one["train/loss"]) == 12
    assert two["train/loss"] == pytest.approx(one["train/loss"], rel=1e-4)
    assert two["train/accuracy"] == pytest.approx(one["train/accuracy"], abs=1e-9)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("change", "message"),
    [({"seed": "rank"}, "rank 1 was given other data than rank 0"), ({"labels": 3}, "there is a label 2")],
    ids=["ranks with different data", "a label too many"],
)
def test_a_mistake_in_a_script_is_one_message_and_2(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    assert message in jobs.the_message(run_script(tmp_path, 2, **change), 2)


@pytest.mark.slow
def test_the_printed_command_says_what_the_script_has_to_change(tmp_path: Path) -> None:
    """The script runs as a module: it may import its neighbours."""
    write_script(tmp_path, max_steps=3, output_dir=None)
    ended = jobs.run_ranks(1, program=[sys.executable, "-m", "script"], cwd=tmp_path)
    jobs.succeeded(ended)
    (run_dir,) = (tmp_path / "runs").iterdir()
    expected = f"python -m script  # with output_dir='runs/{run_dir.name}', max_steps=0 in its TrainConfig"
    assert faults.printed_command(ended[0].out) == expected


def test_run_takes_a_pair_of_sets_for_a_function_and_refuses_an_optimizer_for_one(
    tmp_path: Path, process_of_a_job: None, capsys: pytest.CaptureFixture[str]
) -> None:
    pair: Any = points(101), points(31)
    flags = ["--batch-size", "20", "--epochs", "1", "--threads", "1", "--no-pictures", "--wandb", "disabled"]
    assert train.main([*flags, "--output-dir", str(tmp_path / "pair")], data=pair, model=linear) == 0
    optimizer = torch.optim.SGD(linear().parameters())
    words = [*flags, "--output-dir", str(tmp_path / "optimizer")]
    assert train.main(words, data=pair, model=linear, optimizer=optimizer) == 2
    assert "parameters that are not the network's" in capsys.readouterr().err


def test_secrets_among_a_scripts_arguments_are_not_saved(
    fit_here: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["mine.py", "--token=abc", "--api-key", "def", "--keep", "ghi", "--lr", "1"])
    command = jobs.read_json(fit_here(max_steps=1).run_dir / "config.json")["launch"]["command"]
    assert command == ["mine.py", "--token=***", "--api-key", "***", "--keep", "ghi", "--lr", "1"]


def test_only_its_script_can_resume_or_read_a_run_with_data_of_its_own(
    fit_here: Callable[..., Result], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = fit_here(max_steps=2).run_dir
    before = (run_dir / "summary.json").read_bytes()
    for flags in ([], ["--dataset", "mnist"]):
        assert train.main(["--output-dir", str(run_dir), "--wandb", "disabled", *flags]) == 2
        assert "of a script with data of its own: start that script again" in capsys.readouterr().err
    assert (run_dir / "summary.json").read_bytes() == before
    assert evaluate.main([str(run_dir)]) == 1
    assert "only that script can read it" in capsys.readouterr().err
