"""For any data set, batch, world sizes and stop points: the images of a run in pieces are those of one in one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddp_mnist.config import TrainConfig
from ddp_mnist.data.batches import Batches, Split
from ddp_mnist.errors import UsageError
from ddp_mnist.run import checkpoint
from ddp_mnist.run.checkpoint import Checkpoints, Snapshot, TrainState


@st.composite
def runs(draw: Callable[..., int]) -> tuple[int, int, int, int]:
    """(images, global batch, epochs, seed), fit for a few world sizes."""
    batch = draw(st.sampled_from([1, 2, 3, 4, 6, 12, 24, 60]))
    return draw(st.integers(1, 150)), batch, draw(st.integers(1, 3)), draw(st.integers(0, 2**63 - 1))


def split(images: int) -> Split:
    """Image i has the label i, so that a batch says which images it holds."""
    return Split(torch.zeros(images, 1, 1, 1, dtype=torch.uint8), torch.arange(images))


def train(
    run: tuple[int, int, int, int], world_size: int, state: TrainState, until: int
) -> Iterator[tuple[int, list[int]]]:
    """What a job of that many ranks feeds to its steps, from `state` to the step `until`: (step, global batch)."""
    images, batch, epochs, seed = run
    ranks = [
        Batches(split(images), batch_size=batch, rank=rank, world_size=world_size, seed=seed)
        for rank in range(world_size)
    ]
    while state.epoch < epochs:
        start = state.step_in_epoch
        for shares in zip(*(rank.epoch(state.epoch, start=start) for rank in ranks), strict=True):
            if state.step >= until:
                return
            assert len({share.global_size for share in shares}) == 1
            images_of_step = sorted(label for share in shares for label in share.labels[: share.count].tolist())
            assert len(images_of_step) == shares[0].global_size
            state.advance(shares[0].global_size)
            yield state.step, images_of_step
        state.end_epoch()


def saved(state: TrainState) -> TrainState:
    """Through a checkpoint: only these numbers survive."""
    position = (state.epoch, state.step_in_epoch, state.step, state.samples_seen)
    return TrainState(*position)


@settings(deadline=None, max_examples=200)
@given(run=runs(), data=st.data())
def test_batches_before_and_after_any_stops_are_the_uninterrupted_order(
    run: tuple[int, int, int, int], data: st.DataObject
) -> None:
    images, batch, epochs, _ = run
    steps = -(-images // batch) * epochs
    divisors = [size for size in range(1, 9) if batch % size == 0]
    whole_state = TrainState()
    whole = list(train(run, 1, whole_state, until=steps))
    stops = sorted(data.draw(st.lists(st.integers(0, steps), max_size=4), label="stops"))
    state, pieces = TrainState(), []
    for stop in [*stops, steps]:
        world_size = data.draw(st.sampled_from(divisors), label="world size")
        pieces += train(run, world_size, state, until=stop)
        state = saved(state)
    assert pieces == whole
    assert [step for step, _ in whole] == list(range(1, steps + 1))
    for epoch in range(epochs):
        seen = [
            label for _, labels in whole[epoch * steps // epochs : (epoch + 1) * steps // epochs] for label in labels
        ]
        assert sorted(seen) == list(range(images))
    assert whole_state.samples_seen == state.samples_seen == images * epochs


@settings(deadline=None, max_examples=200)
@given(run=runs(), data=st.data())
def test_what_a_kill_takes_back_is_done_again_and_nothing_else(
    run: tuple[int, int, int, int], data: st.DataObject
) -> None:
    """A job dies some steps after its last checkpoint; what the run has learned is what a checkpoint has seen."""
    images, batch, epochs, _ = run
    steps = -(-images // batch) * epochs
    every = data.draw(st.integers(1, 20), label="checkpoint every")
    divisors = [size for size in range(1, 9) if batch % size == 0]
    kept: list[tuple[int, list[int]]] = []
    last_save = TrainState()
    for death in [*sorted(data.draw(st.lists(st.integers(0, steps), max_size=4), label="deaths")), steps]:
        world_size = data.draw(st.sampled_from(divisors), label="world size")
        state, attempt = saved(last_save), kept[: last_save.step]
        for step, labels in train(run, world_size, state, until=death):
            attempt.append((step, labels))
            if step % every == 0:
                last_save = saved(state)
                kept = list(attempt)
        if death == steps:
            kept = attempt
    assert kept == list(train(run, 1, TrainState(), until=steps))


@settings(deadline=None)
@given(images=st.integers(2, 300), seed=st.integers(0, 2**63 - 1))
def test_epochs_and_seeds_have_their_own_order(images: int, seed: int) -> None:
    orders = {}
    for key in ((seed, 0), (seed, 1), (seed ^ 1, 0)):
        sampler = Batches(split(images), batch_size=1, rank=0, world_size=1, seed=key[0]).sampler
        sampler.set_epoch(key[1])
        orders[key] = tuple(sampler.permutation().tolist())
        assert sorted(orders[key]) == list(range(images))
    if images > 20:  # by chance alone less often than once in 10**18
        assert len(set(orders.values())) == 3


@given(batch=st.integers(1, 1000), parts=st.integers(1, 12), world_size=st.integers(1, 64))
def test_a_world_that_does_not_divide_the_batch_is_told_the_nearest_that_do(
    batch: int, parts: int, world_size: int
) -> None:
    config = TrainConfig(batch_size=batch, accumulate=parts)
    if batch % (world_size * parts) == 0:
        config.check_world_size(world_size)
        return
    try:
        config.check_world_size(world_size)
        raise AssertionError("taken")
    except UsageError as error:
        works = [int(word) for word in str(error).rstrip(".").split("use --batch-size ")[1].split(" or ")]
    assert works and all(size > 0 and size % (world_size * parts) == 0 for size in works)
    assert all(later - earlier == world_size * parts for earlier, later in pairwise(works))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 1 and 2."""
    run_dir = tmp_path_factory.mktemp("run")
    for step in (1, 2):
        tensors = {"weight": torch.arange(9.0) + step}
        Checkpoints(run_dir, keep=2).publish(Snapshot(TrainState(step=step), {}, tensors, tensors, {}, 0))
    return run_dir


@settings(deadline=None, max_examples=200)
@given(
    name=st.sampled_from([checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.STATE, checkpoint.MANIFEST]),
    position=st.integers(0, 10_000),
    change=st.integers(1, 255),
    length=st.integers(0, 10_000) | st.none(),
)
def test_whatever_happens_to_a_files_bytes_a_checkpoint_is_right_or_not_used(
    published: Path, name: str, position: int, change: int, length: int | None
) -> None:
    store = Checkpoints(published, keep=2)
    newest = published / "checkpoints" / "step-00000002"
    good = (newest / name).read_bytes()
    bad = bytearray(good)
    bad[position % len(good)] ^= change
    (newest / name).write_bytes(bytes(bad)[:length])
    found = store.newest()
    assert found is not None
    path, snapshot = found
    # A manifest may be written in another way and say the same.
    assert snapshot.state.step == (2 if path == newest else 1)
    assert torch.equal(snapshot.weights["weight"], torch.arange(9.0) + snapshot.state.step)
    assert path != newest or name == checkpoint.MANIFEST
    for aside in published.glob("checkpoints/damaged-*"):
        aside.rename(newest)
    (newest / name).write_bytes(good)
