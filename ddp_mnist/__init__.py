"""The tutorial's MNIST network as a distributed job that is right: change the machine, not the result.

    from ddp_mnist import TrainConfig, fit
    result = fit(TrainConfig(dataset="synthetic", epochs=1))

`fit` also trains a network and data of your own; `run` does so as a whole command with all flags. Nothing heavy is
imported before a name is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddp_mnist.config import TrainConfig
    from ddp_mnist.model import CNN
    from ddp_mnist.train import run
    from ddp_mnist.trainer import Result, fit

__all__ = ["CNN", "Result", "TrainConfig", "fit", "run"]

_MODULES = {"CNN": "model", "Result": "trainer", "TrainConfig": "config", "fit": "trainer", "run": "train"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
