"""A network and data of a user's own: the README's example as it stands there, killed and continued, and bad input."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faults
import jobs
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

from ddp_mnist import Result, TrainConfig, fit, optimizer, train
from ddp_mnist.distributed import context
from ddp_mnist.errors import JobError, UsageError
from ddp_mnist.run.checkpoint import open_saved
from ddp_mnist.run.summary import without_secrets

README = Path(__file__).parents[2] / "README.md"
STEPS = 3 * 32
LAST = Path("checkpoints", "step-00000012")


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The README's example, as a file."""
    (code,) = re.findall(r"```python\n(.*?fit\(.*?)```", README.read_text(), re.DOTALL)
    path = tmp_path_factory.mktemp("own") / "mine.py"
    path.write_text(code)
    return path


@pytest.fixture(scope="module")
def finished(script: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the example was run on two ranks, without a disturbance."""
    return run_of(script, 2, tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="module")
def finished_by_four(script: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(script, 4, tmp_path_factory.mktemp("finished"))


def run_of(script: Path, world_size: int, folder: Path) -> Path:
    jobs.succeeded(jobs.run_ranks(world_size, program=[sys.executable, str(script)], cwd=folder))
    return folder / "runs" / "mine"


@pytest.mark.slow
@pytest.mark.distributed
def test_the_readmes_example_is_short_and_learns(script: Path, finished: Path) -> None:
    assert len([line for line in script.read_text().splitlines() if line.strip()]) <= 25
    summary = jobs.read_json(finished / "summary.json")
    assert (summary["world_size"], summary["steps"], summary["finished"]) == (2, STEPS, True)
    assert summary["samples_seen"] == 3 * summary["train_count"]
    assert summary["test_accuracy"] > 0.9
    assert len(summary["test_confusion"]) == 4


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 4])
def test_it_is_killed_and_continued_bit_for_bit(
    script: Path, request: pytest.FixtureRequest, tmp_path: Path, world_size: int
) -> None:
    """Dropout's draws and batch norm's averages included. From three ranks on the order in which gradients are summed
    is DDP's to choose."""
    command = [sys.executable, str(script)]
    finished = request.getfixturevalue("finished" if world_size == 2 else "finished_by_four")
    environments = [jobs.environment(own) for own in jobs.rank_variables(world_size)]
    run_dir = tmp_path / "runs" / "mine"
    with faults.Job([command] * world_size, environments, cwd=tmp_path) as job:
        faults.wait_for(lambda: faults.checkpoint_steps(run_dir) or not job.running(), "a checkpoint", job)
        job.kill()
    assert not (run_dir / "summary.json").exists(), "the example is too short for this test"
    jobs.succeeded(jobs.run_ranks(world_size, program=command, cwd=tmp_path))
    assert 0 < jobs.read_json(run_dir / "summary.json")["resumed_from"] < STEPS
    faults.assert_same_result(run_dir, finished)


@pytest.mark.slow
@pytest.mark.distributed
def test_it_stops_on_a_signal_with_75_and_the_command_that_continues(
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
    jobs.succeeded(jobs.run_ranks(2, program=command, cwd=tmp_path))
    faults.assert_same_result(run_dir, finished)


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
@pytest.mark.parametrize("launcher", ["variables", "torchrun"])
def test_several_fits_in_one_script_are_those_of_a_script_each(script: Path, tmp_path: Path, launcher: str) -> None:
    """They meet again and again at the same port."""
    several, alone = tmp_path / "several.py", tmp_path / "alone.py"
    several.write_text(script.read_text().split("config =")[0] + SEVERAL)
    alone.write_text(several.read_text().replace("in 0, 1, 2:", "in (2,):").replace("runs/{seed}", "runs/alone"))
    if launcher == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--master-port", str(jobs.free_port())]
        ended = jobs.run([*command, "--nproc-per-node", "2", str(several)], cwd=tmp_path)
        assert ended.code == 0, ended.err
    else:
        jobs.succeeded(jobs.run_ranks(2, program=[sys.executable, str(several)], cwd=tmp_path))
    jobs.succeeded(jobs.run_ranks(2, program=[sys.executable, str(alone)], cwd=tmp_path))
    assert len({(tmp_path / "runs" / name / "model.safetensors").read_bytes() for name in ("0", "1", "2")}) == 3
    faults.assert_same_result(tmp_path / "runs" / "2", tmp_path / "runs" / "alone")


MEETINGS = """
import torch
from ddp_mnist import TrainConfig
from ddp_mnist.distributed import context
from ddp_mnist.errors import JobError
from ddp_mnist.distributed.launcher import hard_exit

Accelerator = context.Accelerator
def failing(**_):
    torch.distributed.barrier()  # both are there: a group that only one has made cannot be made again
    raise RuntimeError("no such device")
errors = []
for number in range(30):
    context.Accelerator = failing if number % 2 else Accelerator
    try:
        with context.Context(TrainConfig(threads=1, timeout_minutes=1)) as met:
            assert met.sum(torch.ones(1)).item() == 2
    except JobError as error:
        errors.append(str(error))
assert len(errors) == 15, errors
assert all("could not be brought together" in each and "no such device" in each for each in errors), errors
hard_exit(0)
"""


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("launcher", ["variables", "torchrun"])
def test_ranks_meet_again_and_again_also_after_a_meeting_that_failed(tmp_path: Path, launcher: str) -> None:
    """Where they meet, the addresses of all meetings before are still written down, also of those that failed."""
    path = tmp_path / "meetings.py"
    path.write_text(MEETINGS)
    if launcher == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--master-port", str(jobs.free_port())]
        jobs.succeeded([jobs.run([*command, "--nproc-per-node", "2", str(path)])])
    else:
        jobs.succeeded(jobs.run_ranks(2, program=[sys.executable, str(path)]))


@pytest.mark.slow
def test_as_a_whole_command_it_has_the_flags_and_exit_codes(script: Path, tmp_path: Path) -> None:
    text = script.read_text().split("config =")[0].replace("import TrainConfig, fit", "import run")
    path = tmp_path / "command.py"
    path.write_text(f"{text}\nrun(model=network, data=lambda: (stripes(201, seed=0), stripes(53, seed=1)))\n")
    program = [sys.executable, str(path)]
    assert "expected a value from 1" in jobs.the_message([jobs.run([*program, "--epochs", "0"])], 2)
    ended = jobs.run([*program, "--epochs", "2", "--max-steps", "3", "--output-dir", "run"], cwd=tmp_path)
    jobs.succeeded([ended])
    assert jobs.read_json(tmp_path / "run" / "summary.json")["steps"] == 3
    assert faults.printed_command(ended.out).endswith(f"python {path} --output-dir run --epochs 2")


# In this process


def linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(12, 3))


def points(count: int, seed: int = 0) -> TensorDataset:
    draw = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.rand(count, 3, 4, generator=draw), torch.randint(3, (count,), generator=draw))


@pytest.fixture
def fit_here(tmp_path: Path, process_of_a_job: None) -> Callable[..., Result]:
    def run(name: str = "run", model: Any = linear, data: Any = None, **settings: Any) -> Result:
        config = TrainConfig(batch_size=20, epochs=2, threads=1, output_dir=tmp_path / name, **settings)
        return fit(config, model=model, data=data or (points(101), points(31, seed=1)))

    return run


def test_a_result_has_the_summary_and_the_trained_network(fit_here: Callable[..., Result]) -> None:
    result = fit_here()
    assert result.summary == jobs.read_json(result.run_dir / "summary.json")
    assert (result.exit_code, result.summary["steps"], result.summary["samples_seen"]) == (0, 12, 202)
    saved = load_file(result.run_dir / "model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in result.model.state_dict().items())
    again = fit_here()  # finished: the network is loaded, nothing is trained
    assert all(torch.equal(value, saved[name]) for name, value in again.model.state_dict().items())
    assert again.summary == result.summary


@pytest.mark.slow
def test_what_is_drawn_follows_from_the_seed_and_the_step(fit_here: Callable[..., Result]) -> None:
    whole = fit_here("whole").model.state_dict()
    fit_here("parts", max_steps=5)
    torch.rand(7)  # whatever else draws in between
    parts = fit_here("parts").model.state_dict()
    other = fit_here("other", seed=1).model.state_dict()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not all(torch.equal(whole[name], other[name]) for name in whole)


class Noisy(nn.Module):
    """Remembers what it has drawn, and how often it was called, as batch norm does."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(12, 3)
        self.calls = nn.Buffer(torch.zeros((), dtype=torch.int64))
        self.drawn: list[float] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.drawn.append(torch.rand(()).item())
            self.calls += 1
        return self.out(images.flatten(1))


def test_every_step_draws_anew(fit_here: Callable[..., Result]) -> None:
    net = fit_here(model=Noisy).model
    assert isinstance(net, Noisy)
    assert len(set(net.drawn)) == len(net.drawn) == 12


class Failing(nn.Linear):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            raise RuntimeError("a mistake of its own")
        return super().forward(images.flatten(1))


def test_what_a_network_raises_reaches_the_caller_as_it_is(fit_here: Callable[..., Result]) -> None:
    with pytest.raises(RuntimeError, match=r"^a mistake of its own$"):
        fit_here(model=lambda: Failing(12, 3))


@pytest.fixture
def half(monkeypatch: pytest.MonkeyPatch) -> Callable[[], nn.Module]:
    """A scaler as fp16 has it on a GPU, and a network whose gradients overflow until it has found its scale, in the
    fourth step."""
    accelerator, adam, scalers = context.Accelerator, optimizer.Adam, []

    def scaling(**options: Any) -> Any:
        made = accelerator(**options)
        made.scaler = torch.amp.GradScaler("cpu")
        scalers.append(made.scaler)
        return made

    def network() -> nn.Module:
        net = linear()
        next(net.parameters()).register_hook(lambda gradient: gradient / (scalers[-1].get_scale() <= 2.0**13))
        return net

    monkeypatch.setattr(context, "Accelerator", scaling)
    monkeypatch.setattr(optimizer, "Adam", lambda *found, fused, **options: adam(*found, fused=False, **options))
    return network


def test_steps_that_fp16s_scaler_skips_are_counted(
    fit_here: Callable[..., Result], half: Callable[[], nn.Module]
) -> None:
    result = fit_here(model=half, log_every=1)
    assert (result.summary["steps"], result.summary["skipped_steps"]) == (12, 3)
    assert [line.get("train/skipped_steps") for line in jobs.read_metrics(result.run_dir)] == [1, 2, *[3] * 10]


@pytest.mark.parametrize("at", [2, 5], ids=["before it has found it", "afterwards"])
def test_a_continued_run_goes_on_with_fp16s_scale(
    fit_here: Callable[..., Result], half: Callable[[], nn.Module], at: int
) -> None:
    settings: dict[str, Any] = {"model": half, "log_every": 1, "pictures": False}
    whole = fit_here("whole", **settings)
    fit_here("pieces", **settings, max_steps=at)
    pieces = fit_here("pieces", **settings)
    assert pieces.summary["resumed_from"] == at
    assert pieces.summary["skipped_steps"] == whole.summary["skipped_steps"] == 3
    faults.assert_same_result(pieces.run_dir, whole.run_dir)
    states = [json.loads((run.run_dir / LAST / "state.json").read_text()) for run in (pieces, whole)]
    assert states[0]["scaler"] == states[1]["scaler"] and states[0]["scaler"]["scale"] == 2.0**13


def test_a_run_is_drawn_over_epochs_of_its_own_size_from_its_first_line(fit_here: Callable[..., Result]) -> None:
    assert jobs.read_json(fit_here(max_steps=2).run_dir / "config.json")["steps_per_epoch"] == 6


def test_buffers_go_on_where_they_were(fit_here: Callable[..., Result]) -> None:
    fit_here(model=Noisy, max_steps=5)
    result = fit_here(model=Noisy)
    assert result.summary["resumed_from"] == 5
    assert load_file(result.run_dir / "model.safetensors")["calls"].item() == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": (points(101, seed=5), points(31))}, "holds a run on other tensors"),
        ({"model": lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 4))}, "holds a run of another network"),
    ],
    ids=["other data", "other network"],
)
def test_a_run_is_not_continued_as_another(
    fit_here: Callable[..., Result], change: dict[str, Any], message: str
) -> None:
    fit_here(max_steps=5)
    with pytest.raises(UsageError, match=message):
        fit_here(**change)


def test_a_finished_run_stays_finished_for_another_network(
    fit_here: Callable[..., Result], capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = fit_here().run_dir
    before = (run_dir / "summary.json").read_bytes()
    capfd.readouterr()
    with pytest.raises(UsageError, match="holds a run of another network"):
        fit_here(model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 4)))
    assert (run_dir / "summary.json").read_bytes() == before
    assert "is finished" not in capfd.readouterr().out


ONE = torch.zeros(4, 3, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": ((ONE, torch.zeros(4)), points(31))}, "the training set has torch.float32 labels"),
        ({"data": (points(101), (ONE, torch.zeros(3, dtype=torch.int64)))}, "the test set has torch.int64 labels"),
        ({"data": ((ONE, torch.tensor([0, 1, -1, 2])), points(31))}, "has a label -1"),
        ({"data": ((ONE, torch.tensor([0, 1, 3, 2])), points(31))}, "tells 3 classes apart; there is a label 3"),
        ({"data": (points(101),)}, r"the data are 1 of them; expected a \(training, test\) pair"),
        ({"data": "a pair"}, r"the data are a str; expected a \(training, test\) pair"),
        ({"model": lambda: nn.Linear(4, 3)}, "expected logits"),
        ({"data": (points(101), (torch.zeros(3, 3, 4).byte(), torch.arange(3)))}, "a test image torch.uint8"),
        (
            {"data": (points(101), (torch.zeros(3, 4, 4), torch.arange(3)))},
            r"\(3, 4\), a test image torch.float32 \(4, 4\)",
        ),
        ({"data": (points(101), [1, 2, 3])}, "the test set is a list"),
    ],
    ids=[
        *("float labels", "other length", "negative label", "too many classes", "one set", "no pair"),
        *("no logits", "type", "size", "list"),
    ],
)
def test_bad_data_and_networks_get_one_clear_message(
    fit_here: Callable[..., Result], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        fit_here(**change)


def test_uint8_images_are_scaled_and_others_are_not(fit_here: Callable[..., Result]) -> None:
    images, labels = points(101).tensors
    coarse = (images * 255).round()
    as_bytes = fit_here("bytes", data=((coarse.byte(), labels),) * 2)
    as_floats = fit_here("floats", data=((coarse / 255, labels),) * 2)
    assert as_bytes.summary["train_loss"] == pytest.approx(as_floats.summary["train_loss"], rel=1e-5)


class Tied(nn.Module):
    """Weights that share memory, the shape idiom that cannot take an empty batch, and a layer that stays frozen."""

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
    lazy = fit_here("lazy", model=lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(5)))
    assert lazy.summary["finished"]


def test_evaluate_and_predict_leave_a_network_of_ones_own_alone(fit_here: Callable[..., Result]) -> None:
    run_dir = fit_here().run_dir
    with pytest.raises(JobError, match="only that script can read it"):
        open_saved(run_dir)


SCRIPT = """
import os, torch
from torch import nn
from ddp_mnist import TrainConfig, fit

rank = int(os.environ.get("RANK", "0"))
def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
def points(count, seed):
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(count, 4, generator=draw), torch.arange(count) % LABELS
result = fit(TrainConfig(batch_size=20, epochs=2, SETTINGS), model=network, data=(points(101, SEED), points(31, 1)))
result.exit()
"""


# Its answer in evaluation follows from a buffer, which each rank has changed in another way after the last step.
SHIFTED = """
import os, torch
from torch import nn
from ddp_mnist import TrainConfig, fit

rank = int(os.environ.get("RANK", "0"))
class Shifted(nn.Module):
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
def points(count, seed):
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(count, 4, generator=draw), torch.arange(count) % 5
config = TrainConfig(batch_size=100, epochs=1, output_dir="run")
fit(config, model=Shifted, data=(points(3000, 0), points(2500, 1))).exit()
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_all_ranks_score_with_rank_0s_buffers(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(SHIFTED)
    jobs.succeeded(jobs.run_ranks(2, program=[sys.executable, str(path)], cwd=tmp_path))
    shift = load_file(tmp_path / "run" / "model.safetensors")["shift"].item()
    confusion = jobs.read_json(tmp_path / "run" / "summary.json")["test_confusion"]
    assert [[count > 0 for count in row] for row in confusion] == [[place == shift % 5 for place in range(5)]] * 5
    assert sum(map(sum, confusion)) == 2500


# 101 images in batches of 20: in the last step of an epoch rank 1 has none, and `view` cannot tell 0 rows from others.
VIEWED = SCRIPT.replace("nn.Flatten(), nn.Linear(4, 2)", "Viewed(), nn.Linear(4, 2)").replace(
    "def network", "class Viewed(nn.Module):\n    def forward(self, x):\n        return x.view(len(x), -1)\ndef network"
)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_network_that_takes_no_empty_share_has_the_same_curve_at_two_ranks(tmp_path: Path) -> None:
    assert "Viewed()" in VIEWED
    losses, accuracies = [], []
    for ranks in (1, 2):
        settings = f"output_dir='run-{ranks}', log_every=1, threads=1, lr=0.1"
        jobs.succeeded(run_script(tmp_path, ranks, settings=settings, script=VIEWED))
        lines = jobs.read_metrics(tmp_path / f"run-{ranks}")
        losses.append([line["train/loss"] for line in lines])
        accuracies.append([line["train/accuracy"] for line in lines])
    assert len(losses[0]) == 12
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert accuracies[1] == pytest.approx(accuracies[0], abs=1e-9)


# Its hook changes the images before its forward sees them. A plain loop counts what the returned model gets right.
HOOKED = """
import json, torch
from torch import nn
from ddp_mnist import TrainConfig, fit
from ddp_mnist.distributed.launcher import rank_from_environment

def network():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    net.register_forward_pre_hook(lambda m, a: ((a[0] - 1.0) * -30,))
    return net
def points(count, seed):
    images = torch.rand(count, 4, generator=torch.Generator().manual_seed(seed))
    return images, (images[:, 0] > images[:, 1]).long()
train, test = points(1001, 0), points(301, 1)
config = TrainConfig(batch_size=20, epochs=4, lr=0.01, output_dir="run", threads=1)
result = fit(config, model=network, data=(train, test))
@torch.no_grad()
def correct(call, images, labels):
    return sum(int(call(image[None]).argmax() == label) for image, label in zip(images, labels))
if rank_from_environment() == 0:
    without = correct(result.model.forward, *test)
    counts = {"train": correct(result.model, *train), "test": correct(result.model, *test), "without hooks": without}
    open("counts.json", "w").write(json.dumps(counts))
result.exit()
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_hooks_of_a_network_count_in_training_and_in_scores(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(HOOKED)
    jobs.succeeded(jobs.run_ranks(2, program=[sys.executable, str(path)], cwd=tmp_path))
    counts, summary = (jobs.read_json(tmp_path / name) for name in ("counts.json", "run/summary.json"))
    assert (summary["train_correct"], summary["test_correct"]) == (counts["train"], counts["test"])
    assert counts["test"] > 0.9 * 301 > counts["without hooks"], counts


def run_script(
    folder: Path, ranks: int, *, labels: str = "2", seed: str = "0", settings: str = "", script: str = SCRIPT
) -> list[jobs.Ended]:
    path = folder / "script.py"
    path.write_text(script.replace("LABELS", labels).replace("SEED", seed).replace("SETTINGS", settings))
    return jobs.run_ranks(ranks, program=[sys.executable, str(path)], cwd=folder)


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_that_were_given_different_data_are_told(tmp_path: Path) -> None:
    message = jobs.the_message(run_script(tmp_path, 2, seed="rank"), 2)
    assert "rank 1: it was given other data than rank 0" in message


@pytest.mark.slow
@pytest.mark.distributed
def test_a_mistake_in_a_script_is_one_message_and_2(tmp_path: Path) -> None:
    assert "there is a label 2" in jobs.the_message(run_script(tmp_path, 2, labels="3"), 2)


@pytest.mark.slow
def test_the_printed_command_says_what_the_script_has_to_change(tmp_path: Path) -> None:
    (ended,) = run_script(tmp_path, 1, settings="max_steps=3")
    jobs.succeeded([ended])
    command = faults.printed_command(ended.out)
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert command.endswith(f"script.py  # with output_dir='runs/{run_dir.name}', max_steps=0 in its TrainConfig")


def test_the_printed_command_has_the_precision_that_accelerate_launch_was_told(
    fit_here: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setattr(sys, "argv", ["mine.py"])
    assert fit_here(max_steps=3).summary["mixed_precision"] == "bf16"
    command = faults.printed_command(capfd.readouterr().out)
    assert command.startswith("accelerate launch --num_processes 1 --mixed_precision bf16 mine.py")


def test_secrets_among_a_scripts_arguments_are_not_kept() -> None:
    words = ["mine.py", "--token=abc", "--api-key", "def", "--keep", "ghi", "--lr", "1"]
    assert without_secrets(words) == ["mine.py", "--token=***", "--api-key", "***", "--keep", "ghi", "--lr", "1"]


@pytest.mark.slow
@pytest.mark.distributed
def test_lazy_layers_are_the_same_on_all_ranks_and_the_data_stay_as_they_are(tmp_path: Path) -> None:
    """An in-place first layer and a rank without an image included."""
    script = SCRIPT.replace("nn.Flatten(), nn.Linear(4, 2)", "nn.Flatten(), nn.ReLU(inplace=True), nn.LazyLinear(2)")
    script = script.replace(
        "result = fit(",
        "given = points(101, SEED)\nbefore = given[0].clone() - 0.5\ngiven = (before.clone(), given[1])\nresult = fit(",
    )
    script = script.replace("data=(points(101, SEED), ", "data=(given, ")
    script = script.replace("result.exit()", "assert torch.equal(given[0], before)\nresult.exit()")
    losses = []
    for ranks in (1, 2):
        settings = f"output_dir='run-{ranks}', log_every=1, threads=1"
        jobs.succeeded(run_script(tmp_path, ranks, settings=settings, script=script))
        losses.append([line["train/loss"] for line in jobs.read_metrics(tmp_path / f"run-{ranks}")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_run_with_data_of_ones_own_is_for_its_script_to_continue(
    fit_here: Callable[..., Result], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = fit_here(max_steps=2).run_dir
    before = (run_dir / "summary.json").read_bytes()
    for flags in ([], ["--dataset", "mnist"]):
        assert train.main(["--output-dir", str(run_dir), "--wandb", "disabled", *flags]) == 2
        told = capsys.readouterr().err
        assert "of a script with data of its own: start that script again" in told
    assert (run_dir / "summary.json").read_bytes() == before
