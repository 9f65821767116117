from __future__ import annotations

import functools
import os
import shutil
import signal
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # as in the job: tests that compute side by side do not starve
import jobs
import pytest
from leaks import no_leaks, no_orphans, temporary_directory  # noqa: F401

# 25 batches of 60 and one image more: in each epoch's last step all ranks but one have nothing. The test images
# are three chunks of an evaluation, the last one short, and neither 2 nor 3 divides them.
TRAIN_IMAGES, TEST_IMAGES, BATCH, EPOCHS = 1501, 2303, 60, 2
STEPS = 26 * EPOCHS


# As at a terminal, also where a script has started pytest in its background, or by nohup.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Add the markers that follow from others, or from what a test asks for."""
    for item in items:
        if "mnist" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.mnist)
        if any(item.get_closest_marker(name) for name in ("mnist", "slurm", "gpu")):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def no_launcher(no_leaks: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:  # noqa: F811
    """Hide the launcher and precision of whoever started pytest, and remove a test's own."""
    for name in list(os.environ):
        if jobs.is_launch_variable(name):
            monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "disabled")  # as for `jobs.environment`
    yield
    for name in list(os.environ):  # a job in this process sets some for its children
        if jobs.is_launch_variable(name):
            del os.environ[name]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A torchvision root with a few generated digits under the name of a data set whose raw hashes are not known."""
    root = tmp_path_factory.mktemp("tiny")
    write_digits(root, TRAIN_IMAGES, TEST_IMAGES)
    return root


def write_digits(root: Path, train: int, test: int) -> Path:
    """Write the four raw files, independently of the package. Return their folder."""
    from ddp_mnist.data.synthetic import make_digits

    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for prefix, split, count in (("train", "train", train), ("t10k", "test", test)):
        for name, array in zip(("images-idx3", "labels-idx1"), make_digits(split, count=count), strict=True):
            header = b"\0\0\x08" + bytes([array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
            (folder / f"{prefix}-{name}-ubyte").write_bytes(header + array.tobytes())
    return folder


@pytest.fixture(scope="session")
def flags(tiny: Path) -> list[str]:
    """A job of seconds on the tiny data set."""
    words = "--dataset fashion-mnist --wandb disabled --threads 1 --no-pictures --log-every 1"
    return [*words.split(), "--batch-size", str(BATCH), "--epochs", str(EPOCHS), "--data-dir", str(tiny)]


@pytest.fixture(scope="session")
def run_at(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The directory of the finished tiny run at a world size; each is run once, when first asked for."""
    done: dict[int, Path] = {}

    def run(world_size: int) -> Path:
        if world_size not in done:
            path = tmp_path_factory.mktemp("runs") / f"world-{world_size}"
            jobs.succeeded(jobs.run_ranks(world_size, *flags, "--output-dir", str(path)))
            done[world_size] = path
        return done[world_size]

    return run


@pytest.fixture
def process_of_a_job(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let this process be a rank on the CPU; then put back its signals, excepthook and threads."""
    import torch

    from ddp_mnist.distributed.preemption import SIGNALS

    monkeypatch.setattr(urllib.request, "_opener", None)  # it would keep this test's proxies
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", functools.cache(lambda: False))
    numbers = [signal.Signals[name] for name in SIGNALS]
    handlers = [signal.getsignal(number) for number in numbers]
    hook, threads = sys.excepthook, torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    sys.excepthook = hook
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def train(
    flags: list[str], process_of_a_job: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., jobs.Ended]:
    """Run the tiny job with more flags in this process, one rank on the CPU: what the command does, less its start."""
    from ddp_mnist.train import main

    for name, value in jobs.OFFLINE.items():
        monkeypatch.setenv(name, value)

    def run(*arguments: Any) -> jobs.Ended:
        capfd.readouterr()
        try:
            code = main([*flags, *map(str, arguments)])
        except SystemExit as exit:
            assert isinstance(exit.code, int)
            code = exit.code
        return jobs.Ended(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the real MNIST; without one the test is skipped, or fails where DDP_MNIST_REQUIRE names mnist."""
    given = os.environ.get("DDP_MNIST_DATA")
    source = Path(given or "", "MNIST", "raw")
    if not given or not source.is_dir():
        found = f"DDP_MNIST_DATA is {given}: no MNIST/raw there" if given else "DDP_MNIST_DATA is not set"
        reason = f"needs the real MNIST: {found}"
        if "mnist" in os.environ.get("DDP_MNIST_REQUIRE", ""):
            pytest.fail(reason)
        pytest.skip(reason)
    root = tmp_path_factory.mktemp("mnist")
    shutil.copytree(source, root / "MNIST" / "raw")
    return root


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=5, help="random kill -9 of tests/storage/test_kill.py (default: 5)")
