"""Every setting of a run: one frozen dataclass, its checks, the recipes and the command line.

Imports neither torch nor anything that does: `--help`, a wrong flag and the launchers answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import numbers
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro
from tyro.conf import arg

from ddp_mnist.errors import UsageError
from ddp_mnist.process import is_first_on_its_machine, muted

Recipe = Literal["tutorial", "fast", "record"]
Dataset = Literal["auto", "mnist", "fashion-mnist", "synthetic"]
# Another one is `step.learning_rate`'s to follow; may a run have more epochs later, `check_identity` must know it.
Schedule = Literal["constant", "onecycle", "linear"]
Precision = Literal["no", "fp16", "bf16"]
Wandb = Literal["auto", "online", "offline", "disabled"]

OWN = "own-"
# What a run is. A continued run must agree on all of these; everything else (world size, device, precision,
# threads, logging) may differ between attempts.
IDENTITY = (
    "dataset",
    "batch_size",
    "accumulate",
    "epochs",
    "lr",
    "beta2",
    "schedule",
    "grad_clip",
    "seed",
    "widths",
    "init_from",
)


def _launcher_precision() -> Any:
    """What `accelerate launch --mixed_precision` told its workers; checked like a flag."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def default_data_dir() -> Path:
    return Path(os.environ.get("DDP_MNIST_DATA", "data"))


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Train the tutorial's CNN on MNIST, on one process or many: same global batches, same result.

    Start it with `accelerate launch -m ddp_mnist.train`, `torchrun ... -m ddp_mnist.train` or
    `python -m ddp_mnist.train`. The same command with the same --output-dir continues a stopped run.
    """

    recipe: Recipe = "tutorial"
    """Preset of the command line for the settings below; an explicit flag beats it, and a script takes RECIPES[name].
    tutorial: Adam 1e-3, batch 64, 5 epochs. fast: one-cycle schedule, 98 % after one epoch. record: two epochs of a
    wider network, tuned for 99 %."""

    dataset: Dataset = "auto"
    """auto: MNIST if it is there or can be fetched, else generated digits, with a warning."""

    data_dir: Annotated[Path, arg(metavar="DIR", help_behavior_hint="(default: $DDP_MNIST_DATA, else data)")] = (
        dataclasses.field(default_factory=default_data_dir)
    )
    """torchvision's root: the files are in DIR/MNIST/raw."""

    output_dir: Annotated[
        Path | None, arg(metavar="DIR", help_behavior_hint="(default: runs/<date>-<time>-<recipe>)")
    ] = None
    """The run directory. One that holds a stopped run is continued."""

    epochs: int = 5
    """Passes over the training set."""

    batch_size: int = 64
    """Global batch: images per optimizer step over all ranks. The world size must divide it."""

    accumulate: int = 1
    """Split each rank's share of the global batch into this many backward passes, to save memory."""

    lr: float = 1e-3
    """Adam's learning rate; its peak unless --schedule is constant."""

    beta2: float = 0.999
    """Adam's decay of the squared gradients; short runs learn more with less."""

    schedule: Schedule = "constant"
    """onecycle: up to --lr over the first quarter of all steps, then down to zero along a cosine. linear: up over the
    first tenth, then down in a straight line."""

    grad_clip: float = 0.0
    """Clip the gradient's norm to this; 0: off."""

    widths: tuple[int, int] = (8, 16)
    """Output channels of the two convolutions."""

    seed: int = 0
    """Initial weights and batch order follow from it."""

    mixed_precision: Annotated[
        Precision, arg(help_behavior_hint="(default: what accelerate launch was told, else no)")
    ] = dataclasses.field(default_factory=_launcher_precision)
    """Autocast in training; evaluation is always fp32. fp16 needs a GPU."""

    threads: int = 0
    """CPU threads per rank; 0: allowed CPUs divided by the ranks on this machine."""

    triton: bool = True
    """On an NVIDIA GPU: our network's layers and loss in Triton kernels, whose sums are the same at every run."""

    cuda_graphs: bool = True
    """On one GPU: record a step's kernels once and replay them with one call. Not of other networks, nor in fp16."""

    compile: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Compile the network first, on a GPU into CUDA graphs. On a CPU it is slower."""

    init_from: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: random, from --seed)")] = None
    """Start from the weights in this model.safetensors."""

    checkpoint_every: int = 0
    """Save every so many steps exactly; 0: automatic, at an epoch's end where saving takes under 1 % of the time,
    and at least every 10 minutes. A stop and the end always save."""

    keep_checkpoints: int = 2
    """Newest checkpoints to keep."""

    fresh: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Start over in a directory that holds a run; what was there is set aside."""

    max_steps: int = 0
    """Stop at this global step, with evaluation and summary; 0: at the last epoch's end. A later start with
    a larger value goes on. Never changes the length of the schedule."""

    max_minutes: float = 0.0
    """Stop with a checkpoint and exit code 75 after this long; 0: no limit."""

    timeout_minutes: float = 5.0
    """Give up when a rank has not answered the others for this long."""

    log_every: int = 50
    """Steps between two lines of metrics.jsonl and of the log."""

    pictures: bool = True
    """Draw curves, confusion matrix, worst mistakes and report.html at the end."""

    wandb: Wandb = "auto"
    """Mirror to Weights & Biases. auto: as WANDB_MODE says, else online where there is a key and the server
    answers, else offline, to be sent later. online: the same, with a warning where it cannot be. disabled: start
    nothing."""

    wandb_project: Annotated[str | None, arg(help_behavior_hint="(default: $WANDB_PROJECT, else ddp_mnist)")] = None
    """The run's project."""

    wandb_entity: Annotated[str | None, arg(help_behavior_hint="(default: the key's own)")] = None
    """The user or team that the project belongs to."""

    wandb_group: Annotated[str | None, arg(help_behavior_hint="(default: none)")] = None
    """Runs of a group are shown together."""

    wandb_name: Annotated[str | None, arg(help_behavior_hint="(default: the run directory's)")] = None
    """The run's name."""

    wandb_tags: tuple[str, ...] = ()
    """Words to find the run by."""

    wandb_model: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Send the final model too, as an artifact."""

    progress: bool = True
    """Show a bar where the output is a terminal."""

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(TrainConfig).items():
            object.__setattr__(self, name, _converted(name, getattr(self, name), kind))
        for name, low, high in (
            ("epochs", 1, 100_000),
            ("batch_size", 1, 60_000),
            ("accumulate", 1, 60_000),
            ("grad_clip", 0, 1e6),
            ("seed", 0, 2**63 - 1),
            ("threads", 0, 4096),
            ("max_steps", 0, 2**53),
            ("checkpoint_every", 0, 2**53),
            ("keep_checkpoints", 2, 1_000_000),
            ("max_minutes", 0, 1e6),
            ("timeout_minutes", 0.05, 1440),
            ("log_every", 1, 10_000),
        ):
            if not low <= getattr(self, name) <= high:
                raise _bad(name, getattr(self, name), f"a value from {low} to {high}")
        if not 0 < self.lr <= 10:
            raise _bad("lr", self.lr, "a rate above 0, at most 10")
        if not 0 <= self.beta2 < 1:
            raise _bad("beta2", self.beta2, "a decay from 0 to below 1")
        if not all(1 <= width <= 4096 for width in self.widths):
            raise _bad("widths", self.widths, "two numbers from 1 to 4096")
        for name, kind in (
            ("recipe", Recipe),
            ("dataset", Dataset),
            ("schedule", Schedule),
            ("mixed_precision", Precision),
            ("wandb", Wandb),
        ):
            if getattr(self, name) not in get_args(kind) and not (name == "dataset" and self.own_data):
                raise _bad(name, getattr(self, name), "one of " + ", ".join(get_args(kind)))

    @property
    def own_data(self) -> bool:
        """The dataset is a caller's tensors, see `fit`: its name has a hash of them."""
        return self.dataset.startswith(OWN)

    def check_world(self, world_size: int) -> None:
        """Refuse a world size that does not divide the global batch, naming the nearest batches that work.

        Raises: UsageError.
        """
        parts = world_size * self.accumulate
        if self.batch_size % parts:
            below = self.batch_size // parts * parts
            works = [str(size) for size in (below, below + parts) if size]
            parts_text = f"{world_size} ranks" + (f" x {self.accumulate} parts" if self.accumulate > 1 else "")
            raise UsageError(
                f"--batch-size {self.batch_size} does not divide by {parts_text}. Every rank must get the same "
                f"share of the global batch: use --batch-size {' or '.join(works)}."
            )

    def flags(self) -> list[str]:
        """The command line that gives this configuration: what neither defaults nor the recipe say."""
        words = ["--recipe", self.recipe] if self.recipe != "tutorial" else []
        # What the environment says now is written out: where the command is typed it may be another, or not be set.
        plain: dict[str, Any] = {
            "data_dir": None if "DDP_MNIST_DATA" in os.environ else Path("data"),
            "mixed_precision": None if "ACCELERATE_MIXED_PRECISION" in os.environ else "no",
        }
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            default = RECIPES[self.recipe].get(name, plain.get(name, field.default))
            if name == "recipe" or value == default or (name == "dataset" and self.own_data):
                continue
            flag = f"--{name.replace('_', '-')}"
            if isinstance(value, bool):
                words.append(flag if value else f"--no-{flag[2:]}")
            else:
                words += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
        return words

    def replace(self, **changes: Any) -> TrainConfig:
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """JSON types only; `from_dict` is its inverse."""
        return {
            field.name: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
            for field in dataclasses.fields(self)
            for value in [getattr(self, field.name)]
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Raises: UsageError for a field that does not exist."""
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise UsageError(f"unknown setting {', '.join(unknown)} in a saved configuration")
        return cls(**values)


RECIPES: dict[str, dict[str, Any]] = {
    "tutorial": {},
    "fast": {"batch_size": 64, "lr": 1e-2, "schedule": "onecycle"},
    "record": {
        "widths": (8, 32),
        "batch_size": 160,
        "epochs": 2,
        "lr": 2.2e-2,
        "beta2": 0.95,
        "schedule": "linear",
    },
}


def parse(argv: Sequence[str] | None = None, *, quiet: bool | None = None) -> TrainConfig:
    """The command line → TrainConfig. `--recipe` is read first: its preset is the default for all the rest.

    `quiet` (default: on all ranks but a machine's first) keeps tyro's message for a wrong flag from coming once a rank.
    Exits with 2 on a wrong flag and 0 after `--help`, as argparse does. Raises: UsageError on a bad value.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--recipe", default="tutorial")
    try:
        recipe = first.parse_known_args(args)[0].recipe
    except argparse.ArgumentError:  # `--recipe` without a value: tyro says it better
        recipe = "tutorial"
    preset = RECIPES.get(recipe, {})
    if any(re.match("--mixed[-_]precision(=|$)", word) for word in args):
        preset = preset | {"mixed_precision": "no"}  # whatever the launcher was told: the flag beats it
    default = TrainConfig(recipe=recipe if recipe in RECIPES else "tutorial", **preset)
    if quiet is None:
        quiet = not is_first_on_its_machine()
    # tyro's console_outputs=False leaves out its help, but not its messages about values.
    with muted() if quiet else contextlib.nullcontext():
        return tyro.cli(TrainConfig, args=args, default=default, prog="python -m ddp_mnist.train")


def _converted(name: str, value: Any, kind: Any) -> Any:
    """A field's value as its type has it: strings for paths, lists and numpy's numbers are what scripts and JSON have.

    Raises: UsageError for another type, and for a number that is not finite.
    """
    if value is None and type(None) in get_args(kind):
        return None
    if kind is bool and not isinstance(value, bool):
        raise _bad(name, repr(value), "True or False")
    if kind is int:
        if not isinstance(value, numbers.Integral) or isinstance(value, bool):
            raise _bad(name, repr(value), "a whole number")
        return int(value)
    if kind is float:
        if not isinstance(value, numbers.Real) or isinstance(value, bool) or not _is_finite(value):
            raise _bad(name, repr(value), "a finite number")
        return value if type(value) in (int, float) else float(value)
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise _bad(name, repr(value), "a list")
        item, more = get_args(kind)
        if more is not ... and len(value) != 2:
            raise _bad(name, repr(value), "two numbers")
        return tuple(_converted(name, each, item) for each in value)
    if kind is Path or Path in get_args(kind):
        if not isinstance(value, str | os.PathLike):
            raise _bad(name, repr(value), "a path")
        return Path(os.path.expanduser(value))  # as a shell does, but for --flag=~/path
    if kind is not bool and not isinstance(value, str):
        raise _bad(name, repr(value), "a text")
    return value


def _is_finite(value: numbers.Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def _bad(name: str, found: object, expected: str) -> UsageError:
    return UsageError(f"--{name.replace('_', '-')} is {found}; expected {expected}.")
