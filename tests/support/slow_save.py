"""The training command on a slow machine: a stop's save lasts until a file appears, and ranks other than 0 take
seconds to leave.

python tests/support/slow_save.py FILE FLAG...      FILE.saving appears when a save has begun
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import NoReturn

from ddp_mnist import train
from ddp_mnist.distributed.preemption import StopSignal


def main(go: Path) -> NoReturn:
    rename = os.rename

    def slowly(source: Path, target: Path) -> None:
        go.with_name(f"{go.name}.saving").touch()
        while not go.exists():
            time.sleep(0.01)
        rename(source, target)

    agreed = StopSignal.agreed

    def and_then_slowly(self: StopSignal, context: object, step: int) -> str | None:
        reason = agreed(self, context, step)  # type: ignore[arg-type]
        if reason is not None:
            os.rename = slowly  # type: ignore[assignment]
        return reason

    StopSignal.agreed = and_then_slowly  # type: ignore[method-assign]
    code = train.main(sys.argv[2:])
    if os.environ.get("RANK", "0") != "0":
        time.sleep(2)
    train.hard_exit(code)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
