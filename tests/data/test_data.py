"""Arrays → batches: who gets which image, in which order."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import jobs
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DistributedSampler
from torchvision.transforms import ToTensor

from ddp_mnist.data import mnist as files
from ddp_mnist.data import sources
from ddp_mnist.data.__main__ import main
from ddp_mnist.data.batches import Batches, ShardSampler, Split, evaluation_batches, to_float

WORLD_SIZES = [1, 2, 3, 4, 7, 8, 64, 1024]


def numbered(count: int) -> Split:
    """A data set whose labels are its indices."""
    return Split(torch.zeros(count, 1, 1, 1, dtype=torch.uint8), torch.arange(count))


def shards(length: int, world_size: int, *, seed: int = 0, epoch: int = 0) -> list[list[int]]:
    samplers = [ShardSampler(length, rank=rank, world_size=world_size, seed=seed) for rank in range(world_size)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    return [list(sampler) for sampler in samplers]


def order(*, seed: int = 0, epoch: int = 0, length: int = 1000) -> list[int]:
    return shards(length, 1, seed=seed, epoch=epoch)[0]


def test_shards_are_every_nth_row_of_the_order() -> None:
    assert shards(10, 1) == [[8, 1, 4, 2, 0, 6, 9, 3, 7, 5]]
    assert shards(10, 2) == [[8, 4, 0, 9, 7], [1, 2, 6, 3, 5]]
    assert shards(10, 3) == [[8, 2, 9, 5], [1, 0, 3], [4, 6, 7]]
    assert shards(10, 4) == [[8, 0, 7], [1, 6, 5], [4, 9], [2, 3]]
    assert shards(2, 3) == [[0], [1], []]


@pytest.mark.parametrize(
    ("seed", "epoch", "first"),
    [
        (0, 0, [23328, 43846, 50650, 36670, 41114, 59786, 26717, 57685]),
        (0, 1, [40814, 16078, 42469, 22802, 24370, 46324, 39449, 3084]),
        (1, 0, [40357, 25063, 52867, 8941, 40869, 44280, 58133, 20612]),
    ],
)
def test_the_order_of_mnist_is_this_one_for_ever(seed: int, epoch: int, first: list[int]) -> None:
    assert order(seed=seed, epoch=epoch, length=60_000)[:8] == first


@pytest.mark.parametrize("length", [10_007, 5])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_ranks_together_see_every_image_exactly_once(world_size: int, length: int) -> None:
    parts = shards(length, world_size)
    assert Counter(index for part in parts for index in part) == Counter(range(length))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_sampler_knows_its_length_and_is_torchs_kind() -> None:
    for rank, expected in enumerate([4, 3, 3]):
        sampler = ShardSampler(10, rank=rank, world_size=3, seed=0)
        assert isinstance(sampler, DistributedSampler)
        assert len(sampler) == len(list(sampler)) == expected


def test_an_epoch_repeats_and_differs_from_the_next() -> None:
    assert order(epoch=4) == order(epoch=4)
    orders = {tuple(order(epoch=epoch)) for epoch in range(20)}
    assert len(orders) == 20
    assert all(sorted(one) == list(range(1000)) for one in orders)


def test_an_epoch_does_not_repeat_the_one_before_of_the_next_seed() -> None:
    assert len({tuple(order(seed=seed, epoch=epoch)) for seed in range(5) for epoch in range(5)}) == 25


def test_the_order_does_not_depend_on_what_was_drawn_before_nor_disturb_it() -> None:
    torch.manual_seed(1)
    first, after = order(), torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)
    assert order() == first


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_global_batch_is_the_same_images_at_every_world_size(world_size: int, epoch: int) -> None:
    length, batch_size = 2500, 1024 if world_size in (1, 2, 4, 8, 64, 1024) else 1029
    expected = order(length=length, epoch=epoch)
    ranks = [
        Batches(numbered(length), batch_size=batch_size, rank=rank, world_size=world_size, seed=0)
        for rank in range(world_size)
    ]
    assert {len(batches) for batches in ranks} == {3}
    for step, shares in enumerate(zip(*(batches.epoch(epoch) for batches in ranks), strict=True)):
        rows = expected[step * batch_size : (step + 1) * batch_size]
        assert sorted(label for share in shares for label in share.labels[: share.count].tolist()) == sorted(rows)
        assert {share.global_size for share in shares} == {len(rows)} == {ranks[0].global_size(step)}
        sizes = [share.count for share in shares]
        assert max(sizes) - min(sizes) <= 1
        assert [len(share.images) for share in shares] == [max(1, size) for size in sizes]


def test_a_share_is_every_nth_row_of_its_global_batch() -> None:
    ranks = [Batches(numbered(10), batch_size=6, rank=rank, world_size=3, seed=0) for rank in range(3)]
    shares = [[batch.labels.tolist() for batch in batches.epoch(0)] for batches in ranks]
    assert shares == [[[8, 2], [9, 5]], [[1, 0], [3]], [[4, 6], [7]]]


def test_a_rank_without_a_share_of_the_last_batch_has_one_image_that_does_not_count() -> None:
    ranks = [Batches(numbered(7), batch_size=6, rank=rank, world_size=3, seed=0) for rank in range(3)]
    last = [list(batches.epoch(0))[-1] for batches in ranks]
    assert [batch.count for batch in last] == [1, 0, 0]
    assert [batch.global_size for batch in last] == [1, 1, 1]
    assert [batch.images.shape for batch in last] == [(1, 1, 1, 1)] * 3
    assert [len(batch.labels) for batch in last] == [1, 1, 1]


def test_images_travel_with_their_labels() -> None:
    split = Split(torch.arange(200, dtype=torch.uint8).view(200, 1, 1, 1), torch.arange(200))
    for rank in range(2):
        for batch in Batches(split, batch_size=16, rank=rank, world_size=2, seed=5).epoch(3):
            assert batch.images.flatten().tolist() == batch.labels.tolist()


def test_every_share_has_a_seed_of_its_own() -> None:
    """What dropout draws: another for each seed, epoch, step and rank, the same whenever it is asked for."""

    def seeds() -> list[int]:
        return [
            batch.seed
            for seed in range(3)
            for rank in range(4)
            for epoch in range(3)
            for batch in Batches(numbered(50), batch_size=8, rank=rank, world_size=4, seed=seed).epoch(epoch)
        ]

    found = seeds()
    assert len(set(found)) == len(found) == 3 * 4 * 3 * 7
    assert found == seeds()
    assert all(0 <= seed < 2**63 for seed in found)


def test_an_epoch_entered_in_the_middle_goes_on_as_if_it_had_been_read_from_the_start() -> None:
    batches = Batches(numbered(100), batch_size=16, rank=1, world_size=2, seed=0)
    whole = [batch.labels.tolist() for batch in batches.epoch(2)]
    assert [batch.labels.tolist() for batch in batches.epoch(2, start=4)] == whole[4:]
    assert list(batches.epoch(2, start=7)) == []


def test_a_batch_larger_than_the_data_set_is_the_data_set() -> None:
    (batch,) = Batches(numbered(10), batch_size=64, rank=0, world_size=1, seed=0).epoch(0)
    assert (sorted(batch.labels.tolist()), batch.global_size) == (list(range(10)), 10)


@pytest.mark.parametrize("length", [10_007, 5, 3000])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_an_evaluation_sees_every_image_exactly_once(world_size: int, length: int) -> None:
    seen: Counter[int] = Counter()
    for rank in range(world_size):
        for images, labels in evaluation_batches(numbered(length), rank=rank, world_size=world_size, size=250):
            assert len(images) == len(labels) <= 1000
            seen.update(labels.tolist())
    assert seen == Counter(range(length))


def test_an_evaluation_has_the_same_chunks_at_every_world_size() -> None:
    def chunks(world_size: int) -> set[tuple[int, ...]]:
        return {
            tuple(labels.tolist())
            for rank in range(world_size)
            for _, labels in evaluation_batches(numbered(95), rank=rank, world_size=world_size, size=10)
        }

    assert chunks(1) == chunks(2) == chunks(3) == {tuple(range(95)[start : start + 10]) for start in range(0, 95, 10)}


def test_scaling_gives_the_very_bits_of_torchvisions_totensor() -> None:
    values = torch.arange(256, dtype=torch.uint8).repeat(4)[: 28 * 28].view(1, 1, 28, 28)
    noise = torch.randint(0, 256, (50, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = torch.cat([values, noise])
    expected = torch.stack([ToTensor()(Image.fromarray(image.numpy()[0])) for image in images])
    scaled = to_float(images)
    assert scaled.dtype == expected.dtype == torch.float32
    assert torch.equal(scaled, expected)
    assert images[0].flatten()[255] == 255  # the batch itself is left alone


def test_loaded_splits_are_the_files_bytes(tiny: Path) -> None:
    folder = tiny / "FashionMNIST" / "raw"
    for split, prefix, count in zip(sources.load("fashion-mnist", tiny), ("train", "t10k"), (1501, 2303), strict=True):
        raw = np.frombuffer((folder / f"{prefix}-images-idx3-ubyte").read_bytes(), np.uint8, offset=16)
        marks = np.frombuffer((folder / f"{prefix}-labels-idx1-ubyte").read_bytes(), np.uint8, offset=8)
        assert (split.images.dtype, split.labels.dtype) == (torch.uint8, torch.int64)
        assert split.images.shape == (count, 1, 28, 28)
        assert split.images.numpy().tobytes() == raw.tobytes()
        assert split.labels.tolist() == marks.tolist()
        assert len(split) == count


def test_auto_is_the_real_data_where_it_is_there_and_generated_digits_where_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def there(dataset: str, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        return torch.empty(0), torch.empty(0)

    def gone(dataset: str, *_: object, **__: object) -> None:
        raise files.DataError("train-images-idx3-ubyte: missing")

    monkeypatch.setattr(files, "read_split", there)
    assert sources.resolve("auto", tmp_path) == "mnist"
    assert not caplog.records
    monkeypatch.setattr(files, "read_split", gone)
    assert sources.resolve("auto", tmp_path) == "synthetic"
    assert "missing" in caplog.text
    assert "THIS IS NOT MNIST" in caplog.text
    for name in ("mnist", "fashion-mnist", "synthetic"):
        assert sources.resolve(name, tmp_path) == name


# --- python -m ddp_mnist.data


@pytest.mark.parametrize("seconds", ["0", "-1", "inf", "nan"])
def test_a_timeout_that_is_none_is_a_wrong_flag(
    seconds: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["fetch", "--data-dir", str(tmp_path), "--timeout", seconds])
    assert exit.value.code == 2
    assert f"--timeout is {float(seconds)}; expected seconds above 0" in capsys.readouterr().err


def test_files_that_cannot_be_fetched_are_one_message_and_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    root = tmp_path / "file" / "data"
    ended = jobs.Ended(main(["fetch", "--data-dir", str(root)]), *capsys.readouterr())
    assert f"cannot write: [Errno 20] Not a directory: '{root}/MNIST/raw'" in jobs.the_message([ended], 1)
    assert ended.out == ""
