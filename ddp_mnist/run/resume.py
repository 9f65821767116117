"""Find out which run this is: a new one, the continuation of a stopped one, or one that is finished."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddp_mnist.config import RESUME_FIELDS, USER_DATA_PREFIX, TrainConfig
from ddp_mnist.data import sources
from ddp_mnist.distributed.launcher import local_world_size_from_environment
from ddp_mnist.errors import JobError, UsageError
from ddp_mnist.run import directory
from ddp_mnist.run.checkpoint import MODEL, Checkpoints, Snapshot, TrainState

if TYPE_CHECKING:
    from ddp_mnist.distributed.context import Context
    from ddp_mnist.workload import Workload

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """The run as all ranks agree on it, before anything is built."""

    path: Path
    config: TrainConfig
    """With nothing left open: `auto` and the output directory are resolved."""
    state: TrainState
    """Position and totals, which training moves on."""
    snapshot: Snapshot | None = None
    """Checkpoint to go on from; None: from the start."""
    finished: dict[str, Any] = field(default_factory=dict)
    """The summary of a run with nothing left to do; else empty."""


@contextmanager
def open_run(config: TrainConfig, context: Context) -> Iterator[Run]:
    """Find the run and hold its directory for this job, on rank 0; yield the same on all ranks. Collective.

    Raises:
        JobError: The directory cannot be used, or another job keeps it.
        UsageError: It holds a run of other settings.
    """
    with ExitStack() as stack:

        def find() -> Run | None:
            if not context.is_main:
                return None
            path = directory.create(config)
            # Half of the time that the other ranks, which wait for this one, have before they give it up.
            holder = directory.lock(path, patience=min(directory.PATIENCE, 30 * config.timeout_minutes))
            if holder is not None:
                stack.callback(holder.release)
            found = _find(config, path)
            if not found.finished:  # after a kill, an earlier attempt's summary would pass for this one's
                with directory.translate_write_errors(path / directory.SUMMARY) as summary:
                    summary.unlink(missing_ok=True)
            return found

        run = context.broadcast(context.run_on_all_ranks(find))
        assert run is not None
        # Where the files are is each node's own matter.
        yield replace(run, config=run.config.replace(data_dir=config.data_dir))


def _find(config: TrainConfig, path: Path) -> Run:
    try:
        if config.fresh:
            directory.start_over(path)
        newest = Checkpoints(path, config.keep_checkpoints).newest()
    except OSError as error:
        raise JobError(f"{path} cannot be used: {error}.") from error
    config = config.replace(output_dir=path)
    if config.init_from is not None:
        config = config.replace(init_from=config.init_from.resolve())
    if newest is None:
        if directory.read_json(path / directory.SUMMARY).get("finished"):
            raise UsageError(
                f"{path} holds a finished run without its checkpoints. Choose another --output-dir, or --fresh."
            )
        dataset = sources.resolve(config.dataset, config.data_dir)
        return Run(path, config.replace(dataset=dataset), TrainState())
    _, snapshot = newest
    saved = snapshot.config
    if str(saved["dataset"]).startswith(USER_DATA_PREFIX) and not config.has_user_data:
        raise UsageError(
            f"{path} holds a run of a script with data of its own: start that script again, choose another "
            "--output-dir, or start over with --fresh."
        )
    if config.dataset == "auto":  # the run has decided
        config = config.replace(dataset=saved["dataset"])
    check_identity(saved, config)
    summary = directory.read_json(path / directory.SUMMARY)
    done = snapshot.state.epoch >= config.epochs
    finished = done and summary.get("finished") and (path / directory.WEIGHTS).exists()
    return Run(path, config, snapshot.state, snapshot, summary if finished else {})


def check_identity(saved: dict[str, Any], config: TrainConfig) -> None:
    """Refuse to continue a run as another one. Raises: UsageError naming the field and both values."""
    now = config.to_dict()
    for name in RESUME_FIELDS:
        was, is_ = saved.get(name), now[name]
        more_epochs = name == "epochs" and config.schedule == "constant" and was is not None and is_ > was
        if was != is_ and not more_epochs:
            flag = f"--{name.replace('_', '-')}"
            if name == "dataset" and config.has_user_data and str(was).startswith(USER_DATA_PREFIX):
                raise UsageError(
                    f"{config.output_dir} holds a run on other tensors than the script gives now. Seed whatever draws "
                    "or splits them, choose another output_dir, or start over with fresh=True."
                )
            hint = " (more epochs are possible with --schedule constant only)" if name == "epochs" else ""
            old = f"no {flag}" if was is None else f"{flag} {directory.format_setting(was)}"
            new = "has none" if is_ is None else f"says {directory.format_setting(is_)}"
            raise UsageError(
                f"{config.output_dir} holds a run with {old}; this command {new}{hint}. "
                f"Continue it with {old}, choose another --output-dir, or start over with --fresh."
            )


def continue_command(config: TrainConfig, context: Context, workload: Workload) -> str:
    """Return what to type to go on: launcher, script and flags."""
    config, asked = replace(config, fresh=False), workload.script_config
    name = shlex.quote(sys.argv[0]) if workload.is_script else "-m ddp_mnist.train"
    flags = config.flags() if asked is None else sys.argv[1:]
    command = f"{_launcher(context, name, precision=asked is not None)} {shlex.join(flags)}".strip()
    if asked is None:
        return command
    changes = [
        f"{name}={str(value) if isinstance(value, Path) else value!r}"
        for name in ("fresh", "output_dir", "lr", "init_from", "max_steps")
        if (value := getattr(config, name)) != getattr(asked, name)
    ]
    return f"{command}  # with {', '.join(changes)} in its TrainConfig" if changes else command


def advise(error: JobError, config: TrainConfig, command: Callable[[TrainConfig], str]) -> None:
    """Add to the error what to type next; `command` returns how to start a run with these settings."""
    assert config.output_dir is not None
    checkpoints = Checkpoints(config.output_dir, config.keep_checkpoints)
    kept = checkpoints.steps()
    if error.stop_reason == "nan":
        again = config.replace(output_dir=None, lr=float(f"{config.lr / 3:.2g}"))
        again = again.replace(init_from=kept[-1] / MODEL) if kept else again
        error.add(f"A lower rate may help:\n  {command(again)}")
    elif kept:
        error.add(f"Continue from step {checkpoints.last_step()} with\n  {command(config)}")


def _launcher(context: Context, module: str, *, precision: bool) -> str:
    """Return how to start `module` again. `precision`: repeat that of `accelerate launch`, which no flag has."""
    if "DDP_MNIST_LAUNCHER" in os.environ:  # a cluster script says what starts it
        return os.environ["DDP_MNIST_LAUNCHER"]
    local = local_world_size_from_environment()
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        several = "--multi_gpu " if context.world_size > 1 else ""
        several += f"--num_processes {context.world_size} "  # the default is all GPUs
        if context.world_size > local:
            several += f"--num_machines {context.world_size // local} --machine_rank ... --main_process_ip ... "
        if precision:
            several += f"--mixed_precision {shlex.quote(os.environ['ACCELERATE_MIXED_PRECISION'])} "
        on_cpu = "ACCELERATE_USE_CPU=1 " if context.world_size > 1 and context.device.type == "cpu" else ""
        return f"{on_cpu}accelerate launch {several}{module}"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        nodes = context.world_size // local
        several = f"--nnodes {nodes} --node-rank ... --master-addr ... " if nodes > 1 else ""
        return f"torchrun {several}--nproc-per-node {local} {module}"
    return f"python {module}"
