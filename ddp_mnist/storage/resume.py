"""Find out which run this is: a new one, the continuation of a stopped one, or one that is finished."""

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddp_mnist.config import RESUME_FIELDS, USER_DATA_PREFIX, TrainConfig
from ddp_mnist.data import sources
from ddp_mnist.distributed.launcher import from_environment
from ddp_mnist.errors import JobError, UsageError
from ddp_mnist.storage import directory
from ddp_mnist.storage.checkpoint import MODEL, Checkpoints, Snapshot, TrainState

if TYPE_CHECKING:
    from ddp_mnist.distributed.context import Context
    from ddp_mnist.workload import Workload

OTHERWISE = "choose another --output-dir, or start over with --fresh."


@dataclass(frozen=True)
class Run:
    """The run as all ranks agree on it, before anything is built."""

    path: Path
    config: TrainConfig  # with nothing left open: `auto` and the output directory are resolved
    state: TrainState  # position and totals; training updates this object
    snapshot: Snapshot | None = None  # the checkpoint to go on from; None: from the start
    final_summary: dict[str, Any] = field(default_factory=dict)  # summary.json if nothing is left to do; else empty


@contextmanager
def open_run(config: TrainConfig, context: "Context") -> Iterator[Run]:
    """Find the run and lock its directory, on rank 0; yield the same `Run` on all ranks. Collective.

    Raises JobError: the directory cannot be used, or another job holds the lock; UsageError: it has another run.
    """
    with ExitStack() as stack:
        run = context.run_on_main(lambda: _find(config, stack))
        # The data files may be in another directory on each node.
        yield replace(run, config=run.config.replace(data_dir=config.data_dir))


def _find(config: TrainConfig, stack: ExitStack) -> Run:
    path = directory.create(config)
    if (found := directory.read_json(path / directory.CONFIG)) and "settings" not in found:
        raise UsageError(f"{path} holds a {directory.CONFIG} of another program. Choose another --output-dir.")
    # At most half of --timeout-minutes, in seconds: after the full time the other ranks give rank 0 up.
    holder = directory.lock(path, patience=min(directory.PATIENCE, 30 * config.timeout_minutes))
    if holder is not None:
        stack.callback(holder.release)
    if config.fresh and not from_environment("TORCHELASTIC_RESTART_COUNT"):
        directory.start_over(path)
    snapshot = Checkpoints(path, config.keep_checkpoints).newest()
    summary = directory.read_json(path / directory.SUMMARY)
    config = config.replace(output_dir=path, init_from=config.init_from and config.init_from.resolve())
    if snapshot is not None:
        dataset = str(snapshot.config["dataset"])
        if config.dataset == "auto" and not dataset.startswith(USER_DATA_PREFIX):
            config = config.replace(dataset=dataset)  # what `auto` was when the run began
        check_identity(snapshot, config)
        complete = summary.get("finished") and (path / directory.WEIGHTS).exists()
        if complete and snapshot.state.epoch >= config.epochs:
            return Run(path, config, snapshot.state, snapshot, summary)
    elif summary.get("finished"):
        raise UsageError(f"{path} holds a finished run without its checkpoints: {OTHERWISE}")
    else:
        config = config.replace(dataset=sources.resolve(config.dataset, config.data_dir))
    with directory.translate_write_errors(path / directory.SUMMARY) as file:
        file.unlink(missing_ok=True)  # else, after a kill, an earlier attempt's summary would pass for this attempt's
    return Run(path, config, snapshot.state if snapshot else TrainState(), snapshot)


def check_identity(snapshot: Snapshot, config: TrainConfig) -> None:
    """Refuse to continue a run as another one. Raises: UsageError naming the field and both values."""
    now = config.to_dict()
    is_adam = snapshot.optimizer_values["identity"]["class"].startswith("ddp_mnist.")
    for name in RESUME_FIELDS:
        was, is_ = snapshot.config.get(name), now[name]
        more_epochs = name == "epochs" and config.schedule == "constant" and is_ > was
        unused = name in ("lr", "beta2") and not is_adam  # the script's optimizer has its own values
        if was == is_ or more_epochs or unused:
            continue
        if str(was).startswith(USER_DATA_PREFIX):
            raise UsageError(
                f"{config.output_dir} holds a run on other data, of a script with data of its own: start that script "
                f"again, with a seed for whatever draws or splits them, {OTHERWISE}"
            )
        flag = f"--{name.replace('_', '-')}"
        old, new = (f"no {flag}" if v is None else f"{flag} {directory.format_setting(v)}" for v in (was, is_))
        hint = " (more epochs are possible with --schedule constant only)" if name == "epochs" else ""
        raise UsageError(
            f"{config.output_dir} holds a run with {old}; this command has {new}{hint}. "
            f"Continue it with {old}, {OTHERWISE}"
        )


def continue_command(config: TrainConfig, context: "Context", workload: "Workload") -> str:
    """Return the command that continues the run: launcher, script and flags."""
    config, asked = config.replace(fresh=False), workload.script_config
    spec: Any = getattr(sys.modules["__main__"], "__spec__", None)  # of `python -m package.module`
    script = f"-m {spec.name}" if getattr(spec, "origin", None) == sys.argv[0] else shlex.quote(sys.argv[0])
    name = script if workload.is_script else "-m ddp_mnist.train"
    flags = config.flags() if asked is None else sys.argv[1:]
    command = f"{_launcher(context, name, with_precision=asked is not None)} {shlex.join(flags)}".strip()
    if asked is None:
        return command
    changes = [
        f"{name}={str(value) if isinstance(value, Path) else value!r}"
        for name in ("fresh", "output_dir", "lr", "init_from", "max_steps")
        if (value := getattr(config, name)) != getattr(asked, name)
    ]
    return f"{command}  # with {', '.join(changes)} in its TrainConfig" if changes else command


def advise(error: JobError, config: TrainConfig, context: "Context", workload: "Workload") -> None:
    """Add to the error the command that continues the run or, after NaN, starts a new run from its newest weights."""
    assert config.output_dir is not None
    checkpoints = Checkpoints(config.output_dir, config.keep_checkpoints)
    kept = checkpoints.steps()
    if error.stop_reason == "nan":
        start = checkpoints.path(kept[-1]) / MODEL if kept else config.init_from
        changes = {} if workload.make_optimizer else {"lr": float(f"{config.lr / 3:.2g}")}
        again = config.replace(output_dir=None, init_from=start, **changes)
        error.args = (f"{error}\nA lower rate may help:\n  {continue_command(again, context, workload)}",)
    elif kept:
        command = continue_command(config, context, workload)
        error.args = (f"{error}\nContinue from step {kept[-1]} with\n  {command}",)


def _launcher(context: "Context", module: str, *, with_precision: bool) -> str:
    """Return how to start `module` again. `with_precision`: add --mixed_precision, which a script needs."""
    if "DDP_MNIST_LAUNCHER" in os.environ:  # set by slurm/train.sh, slurm/rank.sh or launch/job.py
        return os.environ["DDP_MNIST_LAUNCHER"]
    local = from_environment("LOCAL_WORLD_SIZE")
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        several = "--multi_gpu " if context.world_size > 1 else ""
        several += f"--num_processes {context.world_size} "  # the default is all GPUs
        if context.world_size > local:
            several += f"--num_machines {context.world_size // local} --machine_rank ... --main_process_ip ... "
        if with_precision:
            several += f"--mixed_precision {shlex.quote(os.environ['ACCELERATE_MIXED_PRECISION'])} "
        on_cpu = "ACCELERATE_USE_CPU=1 " if context.world_size > 1 and context.device.type == "cpu" else ""
        return f"{on_cpu}accelerate launch {several}{module}"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        nodes = context.world_size // local
        several = f"--nnodes {nodes} --node-rank ... --master-addr ... " if nodes > 1 else ""
        return f"torchrun {several}--nproc-per-node {local} {module}"
    return f"python {module}"
