"""CUDA graphs: capture once what a function launches on the GPU, then replay all of it with one call.

The kernels of a training step of a small network take less time than Python takes to launch them one by one.
"""

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddp_mnist.errors import JobError

REHEARSALS = 3  # calls before a capture, in which libraries choose kernels and allocate, and torch.compile compiles


@dataclass(frozen=True)
class _Recording:
    inputs: list[Any]  # copies of the captured call's arguments; each replay reads these tensors
    output: Tensor  # each replay overwrites it
    graph: Any


class CUDAGraph:
    """Wrap a function of tensors and hashable constants that returns one tensor and does not wait for the GPU.

    One graph is captured for each combination of shapes, types and constants: a smaller last batch has its own.
    """

    def __init__(self, function: Callable[..., Tensor], mutable_state: Callable[[], Iterable[Tensor]]) -> None:
        """Wrap `function`. `mutable_state` () → the tensors that `function` changes in place: a capture resets them."""
        self._function, self._mutable_state = function, mutable_state
        self._recordings: dict[Hashable, _Recording] = {}

    def __call__(self, *arguments: Any) -> Tensor:
        """Replay the function's graph on these arguments. Return a copy of the output."""
        recording = self.capture(*arguments)
        for static, argument in zip(recording.inputs, arguments, strict=True):
            if isinstance(argument, Tensor):
                static.copy_(argument)
        recording.graph.replay()
        return recording.output.clone()

    def capture(self, *arguments: Any) -> _Recording:
        """Return the recording for arguments like these; the first time, make it. Raises JobError: that fails."""
        key = tuple((each.shape, each.dtype) if isinstance(each, Tensor) else each for each in arguments)
        if key not in self._recordings:
            changed = list(self._mutable_state())
            # Detached: a clone that autograd knows of would tie the gradients of the weights to this stream.
            before = [tensor.detach().clone() for tensor in changed]
            self._recordings[key] = self._record(arguments)
            for tensor, value in zip(changed, before, strict=True):
                tensor.detach().copy_(value)
        return self._recordings[key]

    def _record(self, arguments: tuple[Any, ...]) -> _Recording:
        static = [each.clone() if isinstance(each, Tensor) else each for each in arguments]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(REHEARSALS):
                self._function(*static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                output = self._function(*static)
        except RuntimeError as error:  # the network waits for the GPU, say, or CUDA_LAUNCH_BLOCKING is set
            why = str(error.__context__ or error).splitlines()[0]
            raise JobError(f"a step cannot be captured as a CUDA graph ({why}). Use --no-cuda-graphs.") from error
        return _Recording(static, output, graph)
