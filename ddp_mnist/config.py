"""All settings of a run, the recipes and the command line. No import of torch: `--help` answers at once."""

import contextlib
import functools
import json
import numbers
import os
import re
import reprlib
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tyro
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError, WrapValidator
from pydantic.dataclasses import dataclass
from tyro.conf import arg

from ddp_mnist.distributed.launcher import is_first_on_its_machine, suppress_output
from ddp_mnist.errors import UsageError

USER_DATA_PREFIX = "own-"
RESUME_FIELDS = (  # the fields that must match to resume a run
    "dataset", "batch_size", "accumulate", "epochs", "lr", "beta2", "schedule", "grad_clip", "seed", "widths",
    "init_from",
)  # fmt: skip

_numpy_to_python = BeforeValidator(lambda v: v.item() if isinstance(v, numbers.Number) and hasattr(v, "item") else v)
Int = Annotated[int, _numpy_to_python]
Float = Annotated[float, _numpy_to_python]
# A shell expands `--output-dir ~/runs`, but not `--output-dir=~/runs`.
_expand_home = AfterValidator(lambda path: Path(os.path.expanduser(path)))  # noqa: PTH111 - no error for ~no-such-user
UserPath = Annotated[Path, Field(strict=False), _expand_home]  # not strict: scripts and JSON give paths as strings
Width = Annotated[Int, Field(ge=1, le=4096)]
# `Workload` puts "own-<hash>" into `dataset` for the data of a script.
_or_user_data = WrapValidator(lambda v, check: v if isinstance(v, str) and v.startswith(USER_DATA_PREFIX) else check(v))
# Defaults are checked too: some come from the environment.
_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, validate_default=True)


def default_data_dir() -> Path:
    """Return $DDP_MNIST_DATA, or `data` where it is not set."""
    return Path(os.environ.get("DDP_MNIST_DATA") or "data")


def launcher_precision() -> Any:
    """Return the precision that `accelerate launch` was told to use, else "no"."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION") or "no"


def _hint(text: str, metavar: str | None = None) -> Any:
    """Return the annotation that shows `text` as a flag's default in `--help`."""
    return arg(metavar=metavar, help_behavior_hint=f"(default: {text})")


Precision = Annotated[Literal["no", "fp16", "bf16"], _hint("as given to accelerate launch, else no")]


@contextlib.contextmanager
def _usage_errors() -> Iterator[None]:
    """Turn pydantic's first complaint into a UsageError of one line: the flag, what was found, what was expected."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        name, *inside = map(str, first["loc"])
        if first["type"].startswith("unexpected"):
            known = ", ".join(TrainConfig.__annotations__)
            raise UsageError(f"unknown setting {name}; the settings are {known}.") from None
        found = f"{'has' if inside else 'is'} {reprlib.repr(first['input'])}"
        expected = first["msg"].replace("Input", "it")  # "Input should be greater than 0"
        raise UsageError(f"--{name.replace('_', '-')} {found}; {expected}.") from None


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TrainConfig:
    """Train the tutorial's CNN on MNIST. With one process or many, the global batches and the result are the same.

    Start it with `accelerate launch -m ddp_mnist.train`, `torchrun ... -m ddp_mnist.train` or
    `python -m ddp_mnist.train`. The same command with the same --output-dir continues a stopped run.
    """

    recipe: Literal["tutorial", "fast", "record"] = "tutorial"
    """Preset for the settings below. A flag that you give overrides the preset.
    tutorial: Adam 1e-3, batch 64, 5 epochs. fast: batch 256, one-cycle schedule; 98 % after one epoch.
    record: two epochs of a wider network, tuned for 99 %."""
    dataset: Annotated[Literal["auto", "mnist", "fashion-mnist", "synthetic"], _or_user_data] = "auto"
    """auto: MNIST if its files are there or can be downloaded; otherwise generated digits, with a warning."""
    data_dir: Annotated[UserPath, _hint("$DDP_MNIST_DATA, else data", "DIR")] = field(default_factory=default_data_dir)
    """torchvision's root: MNIST's files are in DIR/MNIST/raw."""
    output_dir: Annotated[UserPath | None, _hint("runs/<date>-<time>-<recipe>", "DIR")] = None
    """The run directory. If it holds a stopped run, the job continues that run."""

    epochs: Annotated[Int, Field(ge=1, le=100_000)] = 5
    """Passes over the training set."""
    batch_size: Annotated[Int, Field(ge=1, le=60_000)] = 64
    """Global batch: images per optimizer step over all ranks; a multiple of the world size times --accumulate."""
    accumulate: Annotated[Int, Field(ge=1, le=60_000)] = 1
    """Split each rank's share of the global batch into this many backward passes, to save memory."""
    lr: Annotated[Float, Field(gt=0, le=10)] = 1e-3
    """Adam's learning rate; with --schedule onecycle or linear, its peak."""
    beta2: Annotated[Float, Field(ge=0, lt=1)] = 0.999
    """Adam's decay of the squared gradients; a lower value suits a short run."""
    # A new schedule needs a branch in `rate_factor` and, if its runs may get more epochs, one in `check_identity`.
    schedule: Literal["constant", "onecycle", "linear"] = "constant"
    """onecycle: the rate rises to --lr over the first quarter of all steps, then falls to zero along a cosine.
    linear: the rate rises to --lr over the first tenth of all steps, then falls to zero in a straight line."""
    grad_clip: Annotated[Float, Field(ge=0, le=1_000_000)] = 0.0
    """Clip the norm of the gradient to this value; 0: do not clip."""
    widths: Annotated[tuple[Width, Width], Field(strict=False)] = (8, 16)
    """Output channels of the two convolutions."""
    seed: Annotated[Int, Field(ge=0, le=2**63 - 1)] = 0
    """Seed of all that is random: initial weights, batch order, dropout, augmentation of your own data."""

    mixed_precision: Precision = field(default_factory=launcher_precision)
    """Precision of training, by autocast; evaluation is always in fp32. fp16 needs a GPU."""
    threads: Annotated[Int, Field(ge=0, le=4096)] = 0
    """CPU threads per rank; 0: the CPUs that the job may use, divided by its ranks on this machine."""
    workers: Annotated[Int, Field(ge=0, le=1024)] = 0
    """Loader processes per rank, for a data set of your own that is not in memory; 0: the rank itself loads."""
    # `constructor=bool` makes the pair --x/--no-x; with neither given the value stays None.
    cuda_graphs: Annotated[bool | None, arg(constructor=bool), _hint("on one GPU, for the built-in network")] = None
    """Record the GPU kernels of one step, and replay them with one call. Never in fp16 or with your own optimizer.
    --cuda-graphs: do this for your own network too, if that network can be captured."""
    compile: bool = False
    """Compile the network before training. On a CPU, training is then slower."""
    init_from: Annotated[UserPath | None, _hint("random, from --seed", "FILE")] = None
    """Start from the weights in this model.safetensors."""
    checkpoint_every: Annotated[Int, Field(ge=0, le=2**53)] = 0
    """Save a checkpoint each time this many steps are done. A stop and the end of the run always save one.
    0: after an epoch if saving takes under 1 % of the time, and whenever the last checkpoint is 10 minutes old."""
    keep_checkpoints: Annotated[Int, Field(ge=2, le=1_000_000)] = 2
    """Keep this many of the newest checkpoints."""
    fresh: bool = False
    """Start a new run in a directory that holds a run. The old files move into a subfolder."""
    max_steps: Annotated[Int, Field(ge=0, le=2**53)] = 0
    """Stop after this step of the run, evaluate, and write the summary; 0: no limit.
    The same command with a larger value continues the run. The schedule still spans all --epochs."""
    max_minutes: Annotated[Float, Field(ge=0, le=1_000_000)] = 0.0
    """After this many minutes, stop with a checkpoint and exit code 75; 0: no limit."""
    timeout_minutes: Annotated[Float, Field(ge=0.05, le=1440)] = 5.0
    """End with an error if a rank has not answered the others for this many minutes."""

    log_every: Annotated[Int, Field(ge=1, le=10_000)] = 50
    """Steps between two lines of metrics.jsonl and of the log."""
    pictures: bool = True
    """Draw curves, confusion matrix, worst mistakes and report.html at the end."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Mirror the run to Weights & Biases. offline: write files that you can send later. disabled: start nothing.
    auto: the mode in WANDB_MODE; if that is not set, online if there is a key and the server answers, else offline.
    online: ignore WANDB_MODE; if there is no key or no answer, go offline with a warning."""
    wandb_project: Annotated[str | None, _hint("$WANDB_PROJECT, else ddp_mnist")] = None
    """The run's project."""
    wandb_entity: Annotated[str | None, _hint("the owner of the key")] = None
    """The user or team that the project belongs to."""
    wandb_group: Annotated[str | None, _hint("none")] = None
    """Runs of a group are shown together."""
    wandb_name: Annotated[str | None, _hint("$WANDB_NAME, else the run directory's name")] = None
    """The run's name."""
    wandb_tags: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Words to find the run by."""
    wandb_model: bool = False
    """Also send the final model to W&B, as an artifact."""
    progress: bool = True
    """Show a progress bar if the output is a terminal."""

    @property
    def has_user_data(self) -> bool:
        """Return True if the data are a script's own (see `fit`); `dataset` is then a hash of them."""
        return self.dataset.startswith(USER_DATA_PREFIX)

    def check_world_size(self, world_size: int) -> None:
        """Raise UsageError if the global batch is no multiple of world size x `accumulate`; name the next ones."""
        parts = world_size * self.accumulate
        below = self.batch_size // parts * parts
        if below != self.batch_size:
            works = " or ".join(str(size) for size in (below, below + parts) if size)
            shares = f"{world_size} ranks" + (f" x {self.accumulate} parts" if self.accumulate > 1 else "")
            raise UsageError(
                f"--batch-size {self.batch_size} does not divide by {shares}. Every rank must get the same "
                f"share of the global batch: use --batch-size {works}."
            )

    def flags(self) -> list[str]:
        """Return the flags that give this configuration in any environment; leave out flags that equal the defaults."""
        arguments: list[str] = []
        without_environment: dict[str, Any] = {  # None: the variable is set, so write the flag always
            "data_dir": None if os.environ.get("DDP_MNIST_DATA") else Path("data"),
            "mixed_precision": None if os.environ.get("ACCELERATE_MIXED_PRECISION") else "no",
        }
        for each in fields(self):
            name, value = each.name, getattr(self, each.name)
            default = RECIPES[self.recipe].get(name, without_environment.get(name, each.default))
            if value == default or (name == "dataset" and self.has_user_data):
                continue
            flag = f"--{name.replace('_', '-')}"
            if isinstance(value, bool):
                arguments.append(flag if value else f"--no-{flag[2:]}")
            else:
                arguments += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
        return arguments

    def replace(self, **changes: Any) -> Self:
        """Return a copy with `changes`, checked; a `recipe` among them brings no settings. Raises: UsageError."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON types; `TrainConfig(**settings)` is the inverse."""
        return json.loads(json.dumps(vars(self), default=str))


RECIPES: dict[str, dict[str, Any]] = {
    "tutorial": {},
    "fast": {"batch_size": 256, "lr": 3e-2, "beta2": 0.9, "schedule": "onecycle"},
    "record": {"widths": (8, 32), "batch_size": 160, "epochs": 2, "lr": 2.2e-2, "beta2": 0.95, "schedule": "linear"},
}


_checked_init = TrainConfig.__init__


@functools.wraps(_checked_init)
@_usage_errors()
def _init(self: TrainConfig, **given: Any) -> None:  # what is not given comes from the recipe
    _checked_init(self, **RECIPES.get(str(given.get("recipe")), {}) | given)


TrainConfig.__init__ = _init  # type: ignore[method-assign]


class _Unchecked(TrainConfig):
    # The class that tyro builds. It checks nothing: tyro would print our message in a box of its own. `parse` checks.
    __doc__ = TrainConfig.__doc__

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


_SWITCH = "(?i)^--(cuda[-_]graphs|pictures|progress|compile|fresh|wandb[-_]model)"


def parse(argv: Sequence[str] | None = None) -> TrainConfig:
    """Return the settings of a command line. Raises: UsageError.

    Exit with 2 on a wrong flag and 0 after `--help`, as argparse does; only the first rank of each machine prints.
    """
    words = sys.argv[1:] if argv is None else argv
    if re.search("--(output|data)[-_]dir[= ]( |$)", " ".join(words)):
        raise UsageError(f"a directory has no name: {shlex.join(words)}. Is a variable of the shell unset?")
    # W&B's sweeps write --pictures=True and --pictures=False for --pictures and --no-pictures.
    args = [re.sub(f"{_SWITCH}=true$", r"--\1", re.sub(f"{_SWITCH}=false$", r"--no-\1", word)) for word in words]
    # "--recipe X" or "--recipe=X": tyro starts from the recipe's settings, and flags beat them.
    recipes = re.findall(r"^--recipe[=\n](.*)", "\n".join(args), re.MULTILINE)
    defaults = next(({"recipe": name} for name in reversed(recipes) if name in RECIPES), {})
    if any(re.match("--mixed[-_]precision(=|$)", word) for word in args):
        defaults["mixed_precision"] = "no"  # the flag beats the launcher's variable, even a wrong value
    with contextlib.nullcontext() if is_first_on_its_machine() else suppress_output():
        read = tyro.cli(_Unchecked, args=args, default=TrainConfig(**defaults), prog="python -m ddp_mnist.train")
    return TrainConfig(**vars(read))
