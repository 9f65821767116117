"""The entry point: flags → job → exit code. `trainer.py` has the loop.

Flags are parsed before torch is imported, so that `--help` is instant and a wrong flag fails at once.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ddp_mnist.config import parse
from ddp_mnist.distributed import launcher
from ddp_mnist.distributed.preemption import StopSignal

if TYPE_CHECKING:
    from torch import nn

    from ddp_mnist.data.sources import UserData
    from ddp_mnist.optimizer import MakeOptimizer
    from ddp_mnist.step import Loss


def run(
    *,
    model: "Callable[[], nn.Module] | None" = None,
    data: "Callable[[], UserData] | None" = None,
    optimizer: "MakeOptimizer | None" = None,
    loss: "Loss | None" = None,
    argv: Sequence[str] | None = None,
) -> NoReturn:
    """Run the training command, with all its flags, messages and exit codes, on parts of your own.

    Like `fit`, but `data` is a function that returns the two sets. The flags are checked before it is called.
    """
    launcher.hard_exit(main(argv, data=data, model=model, optimizer=optimizer, loss=loss))


@launcher.entry_point
def main(argv: Sequence[str] | None = None, *, data: "Callable[[], UserData] | None" = None, **parts: Any) -> int:
    """Run one rank's part of the job. Return the exit code: 0 done, 75 stopped with a checkpoint, 1 or 2 failed."""
    launcher.show_warnings(main=launcher.from_environment("RANK") == 0)
    launcher.limit_spinning()
    with launcher.report_once_per_host():
        config = parse(argv)
        config.check_world_size(launcher.from_environment("WORLD_SIZE"))
    with StopSignal(ignore_afterwards=True) as stop:
        from ddp_mnist.trainer import run_attempt  # imports torch

        here = Path.cwd()
        sets = data() if callable(data) else data
        if Path.cwd() != here:  # changed by `data`; the flags' paths start where the command was typed
            names = [name for name in ("output_dir", "data_dir", "init_from") if getattr(config, name)]
            config = config.replace(**{name: here / getattr(config, name) for name in names})
        return run_attempt(config, stop=stop, data=sets, **parts).exit_code


if __name__ == "__main__":
    run()
