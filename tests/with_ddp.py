"""The training command where ranks exchange gradients as they do on GPUs: through autograd's hooks and DDP.

python tests/with_ddp.py FLAG...
"""

from __future__ import annotations

import sys

from ddp_mnist import train
from ddp_mnist.step import TrainStep

if __name__ == "__main__":
    TrainStep.needs_no_autograd = lambda *_: False  # type: ignore[method-assign]
    train.leave(train.main(sys.argv[1:]))
