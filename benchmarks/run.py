"""Measure the job against the tutorial, Accelerate's example and a published fast recipe, in turn on one machine."""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import baselines
import report
from report import line

from ddp_mnist.config import default_data_dir
from ddp_mnist.data import mnist
from ddp_mnist.data.sources import load_mnist, resolve
from ddp_mnist.distributed.launcher import entry_point, limit_spinning

HERE, TUTORIAL = Path(__file__).resolve().parent, "the tutorial's loop"
Lines = list[dict[str, Any]]
# How much is measured: images of the training set, steps of a turn, turns of what takes seconds and of what takes a
# minute, epochs of a whole command. A setup has these, `dataset`, `data_dir`, a `scratch` folder, a row's `stack`.
FULL = {"images": 60_000, "steps": 300, "turns": 10, "slow_turns": 3, "epochs": 5}
QUICK = {"images": 6_000, "steps": 50, "turns": 2, "slow_turns": 1, "epochs": 1}


class Worker:
    """Processes of `worker.py` for one side, until its row ends. `number`: threads, 0: all; or runs of `overhead`."""

    def __init__(self, setup: Any, side: str, number: int = 0, ranks: int = 0, *, spins: bool = False) -> None:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
        words = [str(HERE / "worker.py"), side, setup.dataset, str(setup.data_dir), str(number)]
        with mock.patch.dict(os.environ):
            if side in ("ours", "overhead") and not spins:
                limit_spinning()  # as the job's command does
            # In TMPDIR, loader processes that are ended leave folders. Ranks use the CPU: two could only share a GPU.
            variables = os.environ | {"TMPDIR": str(setup.scratch)}
            variables |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if ranks else {}
        self.side, self.errors = side, tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the row
        options: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors, "text": True}
        options |= {"env": variables, "cwd": setup.scratch, "start_new_session": True}  # Ctrl-C is not for them
        self.process: Any = subprocess.Popen([sys.executable, *launcher, *words], **options)
        for each in (self.errors, suppress(BrokenPipeError), self.process):
            setup.stack.enter_context(each)
        setup.stack.callback(self.process.terminate)

    def ask(self, seed: int | None = None, **request: Any) -> dict[str, Any]:
        """Let it take a turn, as `worker.take_turn` says, and return the figures. Raises: RuntimeError, it failed."""
        with suppress(BrokenPipeError):
            print(json.dumps({"seed": seed, **request}), file=self.process.stdin, flush=True)
        if text := self.process.stdout.readline():
            return json.loads(text)
        self.errors.seek(0)
        said = re.findall(r"^(?:\[rank\d+\]: )?([\w.]*[Ee]rror: .+)", self.errors.read(), re.MULTILINE)
        raise RuntimeError(f"{self.side} failed: {said[-1] if said else 'it said nothing'}")

    def speed(self, request: dict[str, int], seed: int, **settings: Any) -> float:
        """Return the images/s of a new network's turn as the request says, after a few steps that are not timed."""
        self.ask(seed, limit=5, settings=settings)
        found = self.ask(**request)
        return found["images"] / found["seconds"]


def start(*workers: Worker) -> tuple[Worker, ...]:
    """Wait until all are ready and have taken their first steps, which choose kernels."""
    for worker in workers:
        worker.ask(0, limit=5)
    return workers


def in_turn(turns: int, *actions: Callable[[int], Any]) -> list[list[Any]]:
    """Call each action with the number of each turn, and return its results. Another one begins each turn."""
    found: list[list[Any]] = [[] for _ in actions]
    for turn in range(turns):
        for place in range(turn, turn + len(actions)):
            found[place % len(actions)].append(actions[place % len(actions)](turn))
    return found


def step(setup: Any, what: str = "batch 64, Adam 1e-3", targets: Any = (">= 2.5", ">= 2.3"), **turn: int) -> Lines:
    """Compare the images/s of training with two loops. `turn`: what is timed, for `ask`; default: some steps."""
    sides = start(*(Worker(setup, side) for side in ("ours", "tutorial", "accelerate")))
    speeds = (partial(side.speed, turn or {"limit": setup.steps}) for side in sides)
    ours, tutorial, example = in_turn(setup.turns, *speeds)
    compare = partial(line, f"training, {what}", "images/s", ours)
    return [compare((TUTORIAL, tutorial), targets[0]), compare(("Accelerate's example", example), targets[1])]


def files(setup: Any) -> Lines:
    """Compare the same with PNGs, which two processes of each side decode, crop and flip."""
    folder, count = setup.scratch / "pictures", setup.images // 30
    baselines.write_pictures(folder, count)
    setup = SimpleNamespace(**vars(setup) | {"dataset": "own-files", "data_dir": folder})
    return step(setup, f"{count:,} PNGs, 2 loader processes", (">= 0.94", ""), epochs=3)


def epoch(setup: Any) -> Lines:
    """Compare the seconds of a whole epoch of training."""
    sides = start(Worker(setup, "ours"), Worker(setup, "tutorial"))
    ours, theirs = in_turn(setup.slow_turns, *(lambda turn, side=side: side.ask(turn)["seconds"] for side in sides))
    return [line("one epoch of training", "s", ours, (TUTORIAL, theirs))]


def until(target: float, recipe: str, epochs: int, baseline: tuple[str, str, int], setup: Any) -> Lines:
    """Compare the seconds to the first epoch's end that scores `target` with a baseline's: to its own, and in all."""
    side, name, most = baseline
    workers = start(Worker(setup, "ours"), Worker(setup, side))
    ours = partial(workers[0].ask, epochs=epochs, target=target, settings={"recipe": recipe, "epochs": epochs})
    theirs = partial(workers[1].ask, epochs=most, target=target)
    found = in_turn(setup.turns // 2 if side == "tutorial" else setup.turns, ours, theirs)
    reached = [[run["reached"] for run in runs if run["reached"]] for runs in found]
    notes = []
    for whose, runs, seconds in zip(("ours", "baseline"), found, reached, strict=True):
        values = [100 * run["accuracy"] for run in runs]
        accuracy = f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f}) %"
        notes.append(f"{whose}: {len(seconds)} of {len(runs)} seeds reach it; accuracy of all at the end: {accuracy}")
    compare = partial(line, f"training until {target:.0%}: `--recipe {recipe} --epochs {epochs}`", "s", reached[0])
    lines = [compare((f"{name} until then", reached[1]), note="; ".join(notes)) | {"seeds": found}]
    if most > 1:  # the target: 12 times less
        lines.append(compare((f"{name}, all {most} epochs", [run["seconds"] for run in found[1]]), "<= 0.083"))
    return lines


def command(setup: Any) -> Lines:
    """Compare the seconds of the whole command with the tutorial's script."""

    def seconds(*words: Any) -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, *map(str, words)], check=True, capture_output=True)
        return time.perf_counter() - started

    data = "--dataset", setup.dataset, "--data-dir", setup.data_dir, "--epochs", setup.epochs
    job = "-m", "ddp_mnist.train", *data, "--wandb", "disabled", "--output-dir"
    script = HERE / "baselines.py", setup.data_dir, setup.epochs
    found = in_turn(setup.slow_turns, lambda turn: seconds(*job, setup.scratch / str(turn)), lambda _: seconds(*script))
    what = f"`python -m ddp_mnist.train`, epochs {setup.epochs}, scores, pictures"
    return [line(what, "s", found[0], ("the tutorial's script", found[1]), "<= 0.42")]


def ranks(setup: Any) -> Lines:
    """Compare 2 ranks with 2 threads."""
    sides, lines = start(Worker(setup, "ours", 1, ranks=2), Worker(setup, "ours", 2, ranks=1)), []
    for batch, steps, target in ((64, setup.steps, ""), (512, setup.steps // 5, ">= 0.8")):
        speeds = (partial(side.speed, {"limit": steps}, batch_size=batch) for side in sides)
        ours, theirs = in_turn(setup.turns, *speeds)
        what = f"CPU, batch {batch}: 2 ranks x 1 thread"
        lines.append(line(what, "images/s", ours, ("1 rank x 2 threads", theirs), target))
    return lines


def side_by_side(setup: Any, most: int = 3) -> Lines:
    """Compare one run, and each of `most` at once, with and without our bound on how long OpenMP's threads spin."""
    bound, free = (start(*(Worker(setup, "ours", spins=spins) for _ in range(most))) for spins in (False, True))

    def speed(runs: tuple[Worker, ...], turn: int) -> float:
        with ThreadPoolExecutor() as threads:
            return statistics.mean(threads.map(lambda run: run.speed({"limit": setup.steps // 3}, turn), runs))

    lines = []
    for what, count in (("one run alone", 1), (f"each of {most} runs at once", most)):
        ours, theirs = in_turn(setup.turns // 2, partial(speed, bound[:count]), partial(speed, free[:count]))
        lines.append(line(what, "images/s", ours, ("without GOMP_SPINCOUNT=5000", theirs)))
    return lines


def overhead(setup: Any) -> Lines:
    """Measure what a run takes beside steps and scores."""
    lines, what = [], "time for tracking, checkpoints and agreeing when to stop; ranks on the CPU:"
    for count in (1, 2):
        worker = Worker(setup, "overhead", setup.slow_turns, ranks=count)
        shares = [100 * worker.ask()["share"] for _ in range(setup.slow_turns)]
        lines.append(line(f"{what} {count}", "% of the loop", shares, target="<= 3"))
    return lines


ROWS: dict[str, Callable[[Any], Lines]] = {
    "step": step,
    "epoch": epoch,
    "to-98": partial(until, 0.98, "fast", 1, ("tutorial", TUTORIAL, 5)),
    "to-99": partial(until, 0.99, "record", 2, ("published", "the published fast recipe", 1)),
    "command": command,
    "ranks": ranks,
    "side-by-side": side_by_side,
    "files": files,
    "overhead": overhead,
}


def stage(name: str, data_dir: Path, images: int, root: Path) -> None:
    """Write the first `images` digits to train with, and a sixth as many to test with, for every side."""
    # By the names of Fashion-MNIST: the job checks those of MNIST by hash.
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for prefix, split, count in zip(("train", "t10k"), load_mnist(name, data_dir), (images, images // 6), strict=True):
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(mnist.pack(split.inputs[:count, 0].numpy()))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(mnist.pack(split.targets[:count].byte().numpy()))


@entry_point
def main() -> int:
    """Return 0: measured, 1: a row failed, 2: a wrong flag, 130: interrupted. What was measured is printed and kept."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rows", type=lambda names: names.split(","), default=",".join(ROWS), help="of %(default)s")
    parser.add_argument("--quick", action="store_true", help="2 minutes, to see that everything works")
    parser.add_argument("--dataset", choices=["auto", "mnist", "synthetic"], default="auto", help="as for train")
    parser.add_argument("--data-dir", type=Path, default=default_data_dir(), help="default: $DDP_MNIST_DATA, else data")
    parser.add_argument("--json", type=Path, help="keep figures and table there; in a folder, by device and time")
    options = parser.parse_args()
    if unknown := [row for row in options.rows if row not in ROWS]:
        print(f"error: there is no row {', '.join(unknown)}; the rows are {', '.join(ROWS)}.", file=sys.stderr)
        return 2
    found: dict[str, Any] = {"machine": report.machine(), "quick": options.quick, "rows": {}}
    with tempfile.TemporaryDirectory(prefix="ddp-mnist-bench-") as folder:
        setup = SimpleNamespace(**QUICK if options.quick else FULL, dataset="fashion-mnist")
        setup.scratch = setup.data_dir = Path(folder)
        found |= {"dataset": resolve(options.dataset, options.data_dir), "images": setup.images}
        stage(found["dataset"], options.data_dir, setup.images, setup.data_dir)
        try:
            for row in options.rows:
                started = time.monotonic()
                try:
                    with ExitStack() as setup.stack:
                        found["rows"][row] = ROWS[row](setup)
                    print(f"{row}: {time.monotonic() - started:.0f} s", file=sys.stderr)
                except (RuntimeError, subprocess.CalledProcessError) as error:
                    print(f"error: {row}: {error}", file=sys.stderr)
                if options.json is not None:
                    report.write(options.json, found)
        finally:  # also where it is interrupted
            print(report.table(found))
    return 0 if found["rows"].keys() >= set(options.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
