"""For any data set, batch, world sizes and kills: the batches of a run in pieces are those of a run in one piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddp_mnist.data.batches import Batches, TensorSet
from ddp_mnist.storage.checkpoint import TrainState

Run = tuple[int, int, int, int]


@st.composite
def runs(draw: Callable[..., int]) -> Run:
    """(images, global batch, epochs, seed), fit for a few world sizes."""
    batch = draw(st.sampled_from([1, 2, 3, 4, 6, 12, 24, 60]))
    return draw(st.integers(1, 150)), batch, draw(st.integers(1, 3)), draw(st.integers(0, 2**63 - 1))


def train(run: Run, world_size: int, state: TrainState, until: int) -> Iterator[tuple[int, list[int]]]:
    """Yield (step, global batch) as a job of that many ranks feeds them to its steps, from `state` to `until`."""
    images, batch, epochs, seed = run
    # Image i has the label i, so that a batch says which images it holds.
    split = TensorSet(torch.zeros(images, 1, 1, 1, dtype=torch.uint8), torch.arange(images))
    ranks = [
        Batches(split, batch_size=batch, rank=rank, world_size=world_size, seed=seed) for rank in range(world_size)
    ]
    while state.epoch < epochs:
        start = state.step_in_epoch
        for shares in zip(*(rank.epoch(state.epoch, start=start) for rank in ranks), strict=True):
            if state.step >= until:
                return
            labels = sorted(label for share in shares for label in share.targets[: share.count].tolist())
            assert {share.global_size for share in shares} == {len(labels)}
            state.advance(len(labels))
            yield state.step, labels
        state.end_epoch()


@settings(deadline=None, max_examples=60)
@given(run=runs(), data=st.data())
def test_what_a_kill_takes_back_is_done_again_and_nothing_else(run: Run, data: st.DataObject) -> None:
    """A job dies some steps after its last checkpoint, or right after it, and goes on from there on other ranks."""
    images, batch, epochs, _ = run
    steps_per_epoch = -(-images // batch)
    steps = steps_per_epoch * epochs
    every = data.draw(st.integers(1, 20), label="checkpoint every")
    world_sizes = st.sampled_from([size for size in range(1, 9) if batch % size == 0])
    deaths = sorted(data.draw(st.lists(st.integers(0, steps), max_size=4), label="deaths"))
    saved, seen = TrainState(), []
    for death in [*deaths, steps]:
        state, seen = replace(saved), seen[: saved.step]
        for step, labels in train(run, data.draw(world_sizes, label="world size"), state, until=death):
            seen.append((step, labels))
            if step % every == 0:
                saved = replace(state)
    assert state.samples_seen == images * epochs
    assert seen == list(train(run, 1, TrainState(), until=steps))
    assert [step for step, _ in seen] == list(range(1, steps + 1))
    for epoch in range(epochs):
        part = seen[epoch * steps_per_epoch : (epoch + 1) * steps_per_epoch]
        assert sorted(label for _, labels in part for label in labels) == list(range(images))
