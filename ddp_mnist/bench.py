"""This job against the tutorial's script and the published fast recipe, in turn, on one machine.

`python -m ddp_mnist.bench` (`make bench`) measures, prints one table and, with --json, keeps every figure with the
machine's facts, in a folder under the name of device and date; `--table FILE...` prints the table of such files again,
side by side. What is measured is in `bench_rows.py`, in what surroundings in `bench_setup.py`, the other side in
`reference.py`; the table is `bench_table.py`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import re
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddp_mnist import provenance, rundir
from ddp_mnist.bench_table import MOST, device, read_report, table
from ddp_mnist.config import default_data_dir
from ddp_mnist.errors import JobError, UsageError
from ddp_mnist.process import world_size_from_environment

if TYPE_CHECKING:
    from ddp_mnist.bench_rows import Line
    from ddp_mnist.bench_setup import Setup
    from ddp_mnist.data import Split

ROWS = (
    *("loader", "step", "epoch", "time-to-98", "time-to-99", "evaluation"),
    *("checkpoint", "start-up", "command", "ranks", "overhead", "scaling"),
)
FEWEST = 1_200
"""Images: two whole batches of 512 and five of the fast recipe's."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: measured, or the table printed. 1: the world, 2: a bad flag, 130: Ctrl-C, or SIGTERM."""
    options = _parse(argv)
    report: dict[str, Any] | None = None
    file: Path | None = None
    in_folder = options.json is not None and options.json.is_dir()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit's: as Ctrl-C
    try:
        if options.table:
            print(table([read_report(path) for path in options.table]))
            return 0
        if world_size_from_environment() > 1:
            raise UsageError(
                "the benchmark starts its own ranks: type `python -m ddp_mnist.bench`, without a launcher."
            )
        if options.json is not None and not options.json.absolute().parent.is_dir():
            raise JobError(f"--json {options.json}: there is no directory {options.json.parent}. Make it first.")
        for report in measure(options):
            if options.json is not None:
                file = file or _file(options.json, report)
                _write(file, json.dumps(report, indent=1, allow_nan=False))
                if in_folder:
                    _write(file.with_suffix(".md"), table([report]))
        assert report is not None
        print(table([report]))
        if in_folder:
            print(f"Kept in {file}, its table beside it.", file=sys.stderr)
        return 0
    except (JobError, KeyboardInterrupt) as error:
        if report is not None:
            print(table([report]))  # minutes of measuring are not thrown away
        kept = f", and in {file}" if file is not None else ""
        if isinstance(error, JobError):
            if report is not None and in_folder:
                print(f"the rows done are above{kept}", file=sys.stderr)
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        print(f"stopped: the rows done are above{kept}" if report else "stopped: no row was done", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _file(given: Path, report: dict[str, Any]) -> Path:
    """That file; in a folder a new one, named by device and date."""
    if not given.is_dir():
        return given
    name = re.sub(r"[^a-z0-9]+", "-", f"{device(report)} {report['machine']['date']}".lower())
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(given / f"{each}.json" for each in names if not list(given.glob(f"{each}.*")))


def _write(path: Path, text: str) -> None:
    """Raises: JobError."""
    try:
        rundir.write_atomic(path, f"{text}\n".encode())
    except OSError as error:
        raise JobError(f"--json {path} cannot be written: {error.strerror}.") from error


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ddp_mnist.bench", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rows", metavar="A,B", help=f"measure these only: {', '.join(ROWS)}")
    parser.add_argument("--quick", action="store_true", help="under 2 minutes: every row, on few images, once")
    parser.add_argument("--repeats", type=int, metavar="N", help="measure both sides so often (default: 5; quick: 1)")
    parser.add_argument("--seeds", type=int, metavar="N", help="runs to 99 %% (default: 10, on a GPU 30; quick: 2)")
    parser.add_argument("--images", type=int, metavar="N", help="use the first N (default: 60000; quick: 1500)")
    parser.add_argument("--dataset", choices=["auto", "mnist", "synthetic"], default="auto", help="as for train")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="default: $DDP_MNIST_DATA, else data")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write all figures and the machine's facts there; in a folder, with the table, named by device and date",
    )
    parser.add_argument("--table", type=Path, nargs="+", metavar="FILE", help="measure nothing; print these files")
    options = parser.parse_args(argv)
    options.rows = tuple(dict.fromkeys(options.rows.split(","))) if options.rows is not None else ROWS
    if unknown := [name for name in options.rows if name not in ROWS]:
        parser.error(f"--rows has {', '.join(map(repr, unknown))}; expected some of {','.join(ROWS)}")
    for name, low, high in (("repeats", 1, 1000), ("seeds", 1, 1000), ("images", FEWEST, MOST)):
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            parser.error(f"--{name} is {value}; expected a number from {low} to {high}")
    return options


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The chosen rows as JSON types, after each of them with what is done. Raises: JobError."""
    environment = _environment()
    load = [round(value, 2) for value in os.getloadavg()]
    import torch

    from ddp_mnist import bench_setup

    threads = torch.get_num_threads()
    cuda = torch.cuda.is_available()
    quick = options.quick
    name, train, test = _digits(options, options.images or (1_500 if quick else MOST))
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ddp-mnist-bench-") as folder:
        root = Path(folder, "data")
        setup = bench_setup.Setup(
            dataset=bench_setup.stage(name, train, test, root),
            root=root,
            scratch=Path(folder),
            train=train,
            test=test,
            repeats=options.repeats or (1 if quick else 5),
            seeds=options.seeds or (2 if quick else 30 if cuda else 10),
            steps=10 if quick else 200,
            epochs=1 if quick else 5,
            threads=threads,
            environment=environment,
        )
        report = {
            "what": "ddp_mnist against the tutorial's script and the published fast recipe",
            "machine": _machine(threads) | {"load_average": load},
            "data": {"name": name, "train_images": len(train), "test_images": len(test)},
            "settings": {
                "quick": quick,
                "rows": list(options.rows),
                "repeats": setup.repeats,
                "seeds": setup.seeds,
                "steps": setup.steps,
                "epochs": setup.epochs,
            },
        }
        done: list[str] = []
        for done_now, rows, scaling in _rows(setup, options.rows):
            done.append(done_now)
            yield report | {
                "seconds": round(time.monotonic() - started, 1),
                "missing": [name for name in options.rows if name not in done],
                "rows": rows,
                "scaling": scaling,
            }


def _environment() -> dict[str, str]:
    """This process's, with this very package in front, also where another one is installed."""
    path = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return dict(os.environ) | {"PYTHONPATH": os.pathsep.join(path)}


def _rows(setup: Setup, names: Sequence[str]) -> Iterator[tuple[str, list[dict[str, Any]], dict[str, Any] | None]]:
    """The name of the row just done, the figures of all rows so far, the scaling once it is there."""
    from ddp_mnist import bench_rows

    found: list[dict[str, Any]] = []
    scaling = None
    for name in names:
        started = time.monotonic()
        setup.as_the_tutorial()
        if name == "scaling":
            scaling = bench_rows.scaling(setup)
        else:
            found += [_figures(name, line) for line in bench_rows.ROWS[name](setup)]
        print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        yield name, list(found), scaling


def _digits(options: argparse.Namespace, images: int) -> tuple[str, Split, Split]:
    """(name, train, test): the first `images` of the training set, and in proportion of the test set."""
    from ddp_mnist import data, synthetic

    root = options.data_dir or default_data_dir()
    name = data.resolve(options.dataset, root)
    if name == "synthetic":
        print(data.SYNTHETIC_WARNING, file=sys.stderr)
        train = data.as_split(*synthetic.make_digits("train", count=images))
        return name, train, data.as_split(*synthetic.make_digits("test", count=images // 6))
    train, test = data.load(name, root)
    return (
        name,
        data.Split(train.images[:images], train.labels[:images]),
        data.Split(test.images[: images // 6], test.labels[: images // 6]),
    )


def _machine(threads: int) -> dict[str, Any]:
    import torch

    facts = provenance.facts(1)
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cuda = torch.cuda.is_available()
    return {
        "cpu": _cpu_model(),
        "cores": allowed,
        "threads": threads,
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "gpus": torch.cuda.device_count(),
        "cuda": torch.version.cuda if cuda else None,
        "platform": platform.platform(terse=True),
        "versions": facts["versions"],
        "git": facts["git"],
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_model() -> str:
    """platform.processor() is empty on many Linuxes."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _figures(row: str, line: Line) -> dict[str, Any]:
    """One line as JSON; null for the other side and the ratio where there is none.

    `ratio`: ours / other's, of the figures shown; `ratio_min` and `ratio_max` over the pairs measured one after the
    other.
    """
    ours, other = _statistics(line.ours), _statistics(line.other) if line.other else None
    shown = "mean" if line.mean else "median"
    pairs = [a / b for a, b in zip(line.ours, line.other, strict=True)] if line.other else []
    return {
        "row": row,
        "what": line.what,
        "unit": line.unit,
        "shown": shown,
        "against": line.against,
        "ours": ours,
        "other": other,
        "ratio": _short(ours[shown] / other[shown]) if other else None,
        "ratio_min": _short(min(pairs)) if pairs else None,
        "ratio_max": _short(max(pairs)) if pairs else None,
    }


def _statistics(values: Sequence[float]) -> dict[str, Any]:
    return {
        "n": len(values),
        "median": _short(statistics.median(values)),
        "min": _short(min(values)),
        "max": _short(max(values)),
        "mean": _short(statistics.fmean(values)),
        "sd": _short(statistics.stdev(values)) if len(values) > 1 else 0.0,
        "values": [_short(value) for value in values],
    }


def _short(value: float) -> float:
    """Six digits: more than a clock is worth."""
    assert math.isfinite(value), value
    return float(f"{value:.6g}")


if __name__ == "__main__":
    sys.exit(main())
