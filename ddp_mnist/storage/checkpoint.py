"""Checkpoints and weights on disk: written whole or not at all, verified before they are used.

`checkpoints/step-XXXXXXXX/` holds model.safetensors, optimizer.safetensors, state.json and MANIFEST.json (sizes and
SHA-256). Nothing is pickled. The batch order follows from (seed, epoch), so the position is three integers and there
is no random state to keep. `Saver` decides when to save and what.
"""

import hashlib
import json
import logging
import re
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ddp_mnist.errors import JobError, UsageError
from ddp_mnist.model import CNN
from ddp_mnist.optimizer import check_same, load_state, save_state
from ddp_mnist.storage import directory

if TYPE_CHECKING:
    from ddp_mnist.config import TrainConfig
    from ddp_mnist.distributed.context import Context
    from ddp_mnist.step import TrainStep
    from ddp_mnist.storage.metrics import Metrics

log = logging.getLogger(__name__)

MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
MANIFEST = "MANIFEST.json"
NAME = re.compile(r"step-(\d{8}|[1-9]\d{8,})")
TEMPORARY = ".tmp-"
DAMAGE = (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, KeyError, TypeError, SafetensorError)
"""Exceptions of reading a damaged checkpoint; a disk that does not answer raises another OSError."""
MAX_SHARE_OF_TIME = 0.01  # an epoch ends with an automatic checkpoint if saving takes at most this share of the time
MAX_SECONDS = 600.0  # after so long without a checkpoint, an automatic one is due even within an epoch


@dataclass
class TrainState:
    """The position and totals of a run; with weights, optimizer and scaler, all that is needed to continue.

    One object for the whole attempt: the trainer updates the position, `Metrics` the sums and seconds.
    """

    epoch: int = 0  # in progress, from 0
    step_in_epoch: int = 0  # global batches done in this epoch
    step: int = 0  # optimizer steps done in the whole run
    samples_seen: int = 0
    skipped_steps: int = 0  # by fp16's loss scaler
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    wall_seconds: float = 0.0  # over all attempts
    interval_loss: float = 0.0  # sum over the images since the last line of metrics.jsonl
    interval_correct: int = 0
    interval_images: int = 0

    def advance(self, global_size: int, *, skipped: bool = False) -> None:
        """Count a step on a global batch of `global_size` items. `skipped`: fp16's loss scaler has skipped the step."""
        self.step += 1
        self.step_in_epoch += 1
        self.samples_seen += global_size
        self.skipped_steps += skipped

    def end_epoch(self) -> None:
        """Go to the beginning of the next epoch."""
        self.epoch += 1
        self.step_in_epoch = 0


@dataclass(frozen=True)
class Snapshot:
    """The content of one checkpoint."""

    state: TrainState
    config: dict[str, Any]
    weights: dict[str, Tensor]  # fp32, on the CPU, by parameter name
    optimizer: dict[str, Tensor]  # `<parameter>.<name of the state>`, on the CPU
    optimizer_values: dict[str, Any]  # state in JSON types; "groups": settings now; "identity": `describe` at the start
    scaler: dict[str, Any]  # fp16's loss scaler; empty for other precisions
    metrics_bytes: int  # length of metrics.jsonl at this save: a resumed run cuts later lines off


class Checkpoints:
    """The checkpoints of one run directory. Only rank 0 writes."""

    def __init__(self, run_dir: Path, keep: int) -> None:
        self.folder = run_dir / directory.CHECKPOINTS
        self.keep = keep

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, oldest first. A user's copies (`step-00000050-good`) do not count."""
        matches = [NAME.fullmatch(path.name) for path in self.folder.glob("step-*") if path.is_dir()]
        return sorted(int(match[1]) for match in matches if match)

    def path(self, step: int) -> Path:
        """Return the directory of the checkpoint of that step."""
        return self.folder / f"step-{step:08d}"

    def publish(self, snapshot: Snapshot) -> None:
        """Write a checkpoint, flush it, rename it into place; then keep only the `keep` newest. Raises: OSError."""
        target = self.path(snapshot.state.step)
        if target.exists():  # a stop right after a resume: the very same state
            return
        if not self.folder.exists():
            self.folder.mkdir(parents=True)
            directory.sync_directory(self.folder.parent)
        values = vars(snapshot) | {"state": asdict(snapshot.state)}
        contents = {
            MODEL: safetensors.torch.save(values.pop("weights")),
            OPTIMIZER: safetensors.torch.save(values.pop("optimizer")),
            STATE: directory.format_json(values).encode(),
        }
        manifest = {name: _fingerprint(content) for name, content in contents.items()}
        contents[MANIFEST] = directory.format_json(manifest).encode()
        temporary = target.with_name(TEMPORARY + target.name)
        try:
            temporary.mkdir()
            for name, content in contents.items():
                directory.write_synced(temporary / name, content)
            directory.sync_directory(temporary)
            temporary.rename(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        directory.sync_directory(self.folder)
        for old in map(self.path, self.steps()[: -self.keep]):
            # Renamed first, so that a kill in between leaves no half checkpoint.
            shutil.rmtree(old.rename(old.with_name(TEMPORARY + old.name)), ignore_errors=True)

    def newest(self, *, read_only: bool = False) -> Snapshot | None:
        """Return the newest checkpoint that verifies, or None. Warn of damaged ones, and set them aside.

        `read_only`: the run may be going on, so leave everything where it is. Raises JobError: the disk does not
        answer; the checkpoint may be whole.
        """
        for leftover in () if read_only else self.folder.glob(f"{TEMPORARY}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        paths = list(map(self.path, self.steps()))
        while paths:
            path = paths.pop()
            try:
                return read_checkpoint(path)
            except DAMAGE as error:
                then = f"using {paths[-1].name}" if paths else "there is none before it"
                if not read_only:
                    with directory.translate_write_errors(path):
                        aside = path.rename(directory.make_new(path.with_name(f"damaged-{path.name}")))
                    then = f"set aside as {aside.name}, {then}" + ("" if paths else ": the run starts over")
                log.warning("%s is damaged (%s); %s.", path, error, then)
            except OSError as error:
                raise JobError(f"{path} cannot be read: {error}.") from error
        return None


def read_checkpoint(path: Path) -> Snapshot:
    """Return the content of a checkpoint. Raises: OSError, or one of DAMAGE where a byte is not as it was written."""
    manifest = json.loads((path / MANIFEST).read_bytes())
    contents = {}
    for name in (MODEL, OPTIMIZER, STATE):
        contents[name] = (path / name).read_bytes()
        found, expected = _fingerprint(contents[name]), manifest[name]
        if found != expected:
            raise ValueError(f"{name} has {found}, expected {expected}")
    values = json.loads(contents[STATE])
    tensors = [safetensors.torch.load(contents[name]) for name in (MODEL, OPTIMIZER)]
    try:  # no byte is damaged, so an error means another version
        _ = [group["params"] for group in values["optimizer_values"]["groups"]]  # missing in an older layout
        values["state"] = TrainState(**values["state"])
        return Snapshot(weights=tensors[0], optimizer=tensors[1], **values)
    except (TypeError, KeyError) as error:
        raise JobError(f"{path} is of another version of ddp_mnist: continue it with that one, or --fresh.") from error


def _fingerprint(content: bytes) -> dict[str, Any]:
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


class Saver:
    """Saves the state of a run: position, weights, optimizer and loss scaler. Every rank owns one; rank 0 writes."""

    def __init__(self, context: "Context", train_step: "TrainStep", metrics: "Metrics") -> None:
        self.context, self.train_step, self.metrics = context, train_step, metrics
        self.run_dir, self.config, self.state = metrics.run.path, metrics.config, metrics.state
        self.checkpoints = Checkpoints(self.run_dir, self.config.keep_checkpoints)
        self._last_save, self._save_seconds, self._state_was_checked = time.monotonic(), 0.0, False

    def save_if_due(self, *, epoch_end: bool = False) -> None:
        """Save every `checkpoint_every` steps or, if that is 0, when the clock says so. Collective.

        If saving fails, there is a warning and training goes on: the last checkpoint is kept.
        """
        if not self._state_was_checked:  # an optimizer that cannot be saved ends the run after its first step
            self._state_was_checked = True
            save_state(self.train_step.network, self.train_step.optimizer)
        if self.state.step_in_epoch == self.metrics.steps_per_epoch:
            return  # the last step of an epoch is saved after scoring
        if self.config.checkpoint_every:
            if self.state.step % self.config.checkpoint_every:
                return
            self.metrics.sync()
        else:
            # Only rank 0 knows that a save is due, so it must not call a collective. It waits until no loss has to be
            # summed over the ranks, as after each line of the log.
            elapsed = time.monotonic() - self._last_save
            due = elapsed >= MAX_SECONDS or (epoch_end and self._save_seconds <= MAX_SHARE_OF_TIME * elapsed)
            if self.metrics.unread or not due:
                return
        if self.context.is_main:
            try:
                self._save()
            except JobError as error:
                log.warning("%s", error)
        self.metrics.resume_timer()

    def save(self) -> None:
        """Save now, at a stop or at the end. Collective. Raises: JobError, on all ranks."""
        self.metrics.sync()
        self.context.run_on_main(self._save)

    def _save(self) -> None:
        started = time.monotonic()
        try:
            self.checkpoints.publish(self._snapshot())
        except (OSError, JobError) as error:
            steps = self.checkpoints.steps()
            kept = f"The one of step {steps[-1]} is kept." if steps else "There is none before it."
            raise JobError(
                f"the checkpoint of step {self.state.step} could not be saved ({error}). {kept}",
                stop_reason=getattr(error, "stop_reason", "save_failed"),
            ) from error
        finally:
            self._last_save = time.monotonic()
            self._save_seconds = self._last_save - started

    def _snapshot(self) -> Snapshot:
        network, scaler = self.train_step.network, self.context.accelerator.scaler
        self.state.wall_seconds = self.metrics.wall_seconds()
        tensors, values = save_state(network, self.train_step.optimizer)
        return Snapshot(
            state=self.state,
            config=self.config.to_dict(),
            weights=weights(network),
            optimizer=tensors,
            optimizer_values=values | {"identity": self.train_step.optimizer_identity},
            scaler=scaler.state_dict() if scaler is not None else {},
            metrics_bytes=self.metrics.metrics_bytes(),
        )

    def publish_weights(self) -> None:
        """Write the final weights, without metadata: equal weights give equal files. Collective. Raises: JobError."""

        def write() -> None:
            with directory.translate_write_errors(self.run_dir / directory.WEIGHTS) as path:
                directory.write_atomic(path, safetensors.torch.save(weights(self.train_step.network)))

        self.context.run_on_main(write)


def restore(train_step: "TrainStep", snapshot: Snapshot) -> None:
    """Give the optimizer and the loss scaler their saved state. The network has its weights already.

    Raises UsageError: the run was trained by another optimizer.
    """
    values = dict(snapshot.optimizer_values)
    check_same(values.pop("identity"), train_step.optimizer_identity)
    load_state(train_step.network, train_step.optimizer, snapshot.optimizer, values)
    scaler = train_step.context.accelerator.scaler
    if scaler is not None and snapshot.scaler:
        scaler.load_state_dict(snapshot.scaler)


def weights(network: nn.Module) -> dict[str, Tensor]:
    """Return the network's state dict on the CPU, floats as fp32. Raises JobError: a parameter is not finite."""
    tensors = {}
    parameters = dict(network.named_parameters())
    for name, value in network.state_dict().items():
        value = value.detach().cpu()
        # A buffer may be infinite on purpose, as masks of attention are.
        if value.isnan().any() or (name in parameters and value.isinf().any()):
            raise JobError(f"the weights of {name} are not finite; they are not saved.", stop_reason="nan")
        # A copy: safetensors refuses tensors that share memory, as tied weights do.
        tensors[name] = (value.float() if value.is_floating_point() else value).contiguous().clone()
    return tensors


def load_weights(network: nn.Module, path: Path, *, flag: str = "") -> None:
    """Fill the network from a `model.safetensors`. `flag`: the flag that named the file, for messages.

    Raises JobError: the file is missing, damaged or not finite; UsageError: its weights are of another network.
    """
    try:
        network.load_state_dict(safetensors.torch.load_file(path))
    except (OSError, SafetensorError) as error:
        raise JobError(f"{flag}{path} cannot be read: {error}") from error
    except RuntimeError as error:
        raise UsageError(f"{flag}{path} does not fit this network; is it of other --widths? {error}") from error
    if not all(value.isfinite().all() for value in network.parameters()):
        raise JobError(f"{flag}{path} holds weights that are not finite; use another file.")


@dataclass(frozen=True)
class SavedRun:
    """The weights that a run directory holds, and what they belong to."""

    config: "TrainConfig"
    network: CNN
    source: Path  # the file or checkpoint that the weights are from
    step: int | None  # None: unknown
    summary: dict[str, Any]  # summary.json if it has the counts of these weights; else empty


def load_saved_run(run_dir: Path) -> SavedRun:
    """Return the final weights of a run or, if it is not finished, those of its newest checkpoint that verifies.

    Raises JobError: there are no weights, or the network is a script's; UsageError: the weights do not fit config.json.
    """
    config = directory.read_settings(run_dir)
    if config.has_user_data or directory.read_json(run_dir / directory.CONFIG).get("network"):
        raise JobError(f"{run_dir} is of a script with a network and data of its own: only that script can read it.")
    summary = directory.read_json(run_dir / directory.SUMMARY)
    network, path = CNN(widths=config.widths), run_dir / directory.WEIGHTS
    if summary.get("test_count") is None or not path.exists():
        summary = {}  # without counts, `model.safetensors` may be older than the newest checkpoint
        checkpoints = Checkpoints(run_dir, config.keep_checkpoints)
        if snapshot := checkpoints.newest(read_only=True):
            network.load_state_dict(snapshot.weights)
            return SavedRun(config, network, checkpoints.path(snapshot.state.step), snapshot.state.step, {})
    if not path.exists():
        raise JobError(f"{run_dir} holds no weights yet. Wait for its first checkpoint, or continue the run.")
    load_weights(network, path)
    return SavedRun(config, network, path, summary.get("steps"), summary)
