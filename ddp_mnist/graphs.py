"""CUDA graphs: what a step launches is recorded once and replayed by one call.

The kernels of a step of this network take less time than Python takes to launch them one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ddp_mnist.errors import JobError

WARM_UP = 3
"""Runs before a recording: libraries choose kernels and take memory, torch.compile compiles."""

Results = list[Tensor | None]
Action = Callable[[Tensor], Results]
"""A step on the rows (n,) of a data set; returns what others read of it."""


@dataclass(frozen=True)
class Recording:
    rows: Tensor
    """Where the graph reads its rows."""
    results: Results
    """What it writes anew at each replay."""
    replay: Callable[[], None]
    action: Action
    """Kept, as it holds what else the graph reads: the data set."""


class Graphs:
    """One graph for each kind of step: an epoch's last batch is another."""

    def __init__(self, changed: Callable[[], Iterable[Tensor]]) -> None:
        """`changed`: all that a step changes, which is put back after a warm-up."""
        self._changed = changed
        self._recordings: dict[Hashable, Recording] = {}

    def replay(self, kind: Hashable, rows: Tensor, action: Action) -> Results:
        """Do `action` on these rows, by the recording of its kind. The results are overwritten by the next call."""
        found = self.recorded(kind, rows, action)
        found.rows.copy_(rows)
        found.replay()
        return found.results

    def recorded(self, kind: Hashable, rows: Tensor, action: Action) -> Recording:
        """The recording of that kind, made the first time."""
        if kind not in self._recordings:
            self._recordings[kind] = self._record(rows, action)
        return self._recordings[kind]

    def _record(self, rows: Tensor, action: Action) -> Recording:
        rows = rows.clone()
        changed = list(self._changed())
        # Detached: a clone that autograd knows of would tie the weights' gradients to this stream.
        before = [tensor.detach().clone() for tensor in changed]
        results, replay = capture(lambda: action(rows))
        for tensor, value in zip(changed, before, strict=True):
            tensor.detach().copy_(value)
        return Recording(rows, results, replay, action)


def capture(run: Callable[[], Results]) -> tuple[Results, Callable[[], None]]:
    """(what `run` returns, what does it again, into the same tensors). Raises: JobError when it cannot be recorded."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            results = run()
    except RuntimeError as error:  # what a fork's network does on the host, say, or CUDA_LAUNCH_BLOCKING
        why = str(error.__context__ or error).splitlines()[0]
        raise JobError(f"a step cannot be recorded as a CUDA graph ({why}). Use --no-cuda-graphs.") from error
    return results, graph.replay
