"""Arrays → batches: who gets which image, in which order."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import jobs
import numpy as np
import pytest
import torch
from PIL import Image

from ddp_mnist.data import mnist as files
from ddp_mnist.data import sources
from ddp_mnist.data.__main__ import main
from ddp_mnist.data.batches import Batches, ShardSampler, TensorSet, evaluation_batches, to_float

WORLD_SIZES = [1, 2, 3, 4, 7, 8, 64, 1024]


def numbered(count: int) -> TensorSet:
    """A data set whose images and labels are its indices."""
    return TensorSet(torch.arange(count).view(count, 1, 1, 1), torch.arange(count))


def shards(length: int, world_size: int, *, seed: int = 0, epoch: int = 0) -> list[list[int]]:
    samplers = [ShardSampler(length, rank=rank, world_size=world_size, seed=seed) for rank in range(world_size)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    parts = [list(sampler) for sampler in samplers]
    assert list(map(len, samplers)) == list(map(len, parts))
    return parts


def test_shards_are_every_nth_row_of_the_order() -> None:
    assert shards(10, 1) == [[8, 1, 4, 2, 0, 6, 9, 3, 7, 5]]
    assert shards(10, 2) == [[8, 4, 0, 9, 7], [1, 2, 6, 3, 5]]
    assert shards(10, 3) == [[8, 2, 9, 5], [1, 0, 3], [4, 6, 7]]
    assert shards(10, 4) == [[8, 0, 7], [1, 6, 5], [4, 9], [2, 3]]
    assert shards(2, 3) == [[0], [1], []]


def test_the_order_of_mnist_is_this_one_for_ever() -> None:
    assert shards(60_000, 1)[0][:8] == [23328, 43846, 50650, 36670, 41114, 59786, 26717, 57685]
    assert shards(60_000, 1, epoch=1)[0][:8] == [40814, 16078, 42469, 22802, 24370, 46324, 39449, 3084]
    assert shards(60_000, 1, seed=1)[0][:8] == [40357, 25063, 52867, 8941, 40869, 44280, 58133, 20612]


@pytest.mark.parametrize("length", [10_007, 5])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_ranks_together_see_every_image_exactly_once(world_size: int, length: int) -> None:
    parts = shards(length, world_size)
    assert Counter(index for part in parts for index in part) == Counter(range(length))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_every_seed_and_epoch_has_an_order_of_its_own_which_repeats_whatever_else_is_drawn() -> None:
    orders = {(seed, epoch): shards(1000, 1, seed=seed, epoch=epoch)[0] for seed in range(5) for epoch in range(5)}
    assert len(set(map(tuple, orders.values()))) == 25
    before = torch.get_rng_state()
    torch.rand(1)
    after = torch.get_rng_state()
    assert shards(1000, 1, seed=3, epoch=2)[0] == orders[3, 2]
    assert torch.equal(torch.get_rng_state(), after) and not torch.equal(before, after)


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_global_batch_is_the_same_images_at_every_world_size(world_size: int, epoch: int) -> None:
    length, batch_size = 2500, 1029 if world_size in (3, 7) else 1024
    expected = shards(length, 1, epoch=epoch)[0]
    ranks = [
        Batches(numbered(length), batch_size=batch_size, rank=rank, world_size=world_size, seed=0)
        for rank in range(world_size)
    ]
    assert {len(batches) for batches in ranks} == {3}
    for step, shares in enumerate(zip(*(batches.epoch(epoch) for batches in ranks), strict=True)):
        rows = expected[step * batch_size : (step + 1) * batch_size]
        assert sorted(label for share in shares for label in share.targets[: share.count].tolist()) == sorted(rows)
        assert {share.global_size for share in shares} == {len(rows)}
        sizes = [share.count for share in shares]
        assert max(sizes) - min(sizes) <= 1
        for share in shares:
            assert share.inputs.flatten().tolist() == share.targets.tolist()
            assert len(share.targets) == max(1, share.count)  # a rank without an item has one that does not count


def test_every_share_has_a_seed_of_its_own() -> None:
    """Dropout draws another for each seed, epoch, step and rank, the same whenever it is asked for."""
    found, again = (
        [
            batch.seed
            for seed in range(3)
            for rank in range(4)
            for epoch in range(3)
            for batch in Batches(numbered(50), batch_size=8, rank=rank, world_size=4, seed=seed).epoch(epoch)
        ]
        for _ in range(2)
    )
    assert len(set(found)) == len(found) == 3 * 4 * 3 * 7
    assert found == again
    assert all(0 <= seed < 2**63 for seed in found)


def test_an_epoch_entered_in_the_middle_goes_on_as_if_it_had_been_read_from_the_start() -> None:
    batches = Batches(numbered(100), batch_size=16, rank=1, world_size=2, seed=0)
    whole = [batch.targets.tolist() for batch in batches.epoch(2)]
    assert [batch.targets.tolist() for batch in batches.epoch(2, start=4)] == whole[4:]
    assert list(batches.epoch(2, start=7)) == []


@pytest.mark.parametrize("length", [10_007, 5, 3000])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_an_evaluation_sees_every_image_exactly_once(world_size: int, length: int) -> None:
    """In chunks that are the same at every world size."""
    chunks: list[list[int]] = []
    for rank in range(world_size):
        for images, labels in evaluation_batches(numbered(length), rank=rank, world_size=world_size, size=250):
            assert images.flatten().tolist() == labels.tolist()
            chunks.append(labels.tolist())
    assert sorted(chunks) == [[*range(start, min(start + 250, length))] for start in range(0, length, 250)]


def test_scaling_gives_the_very_bits_of_torchvisions_totensor() -> None:
    from torchvision.transforms import ToTensor  # takes seconds

    images = torch.arange(256, dtype=torch.uint8).repeat(49).view(16, 1, 28, 28)
    expected = torch.stack([ToTensor()(Image.fromarray(image.numpy()[0])) for image in images])
    scaled = to_float(images)
    assert scaled.dtype == expected.dtype == torch.float32
    assert torch.equal(scaled, expected)
    assert images.flatten()[255] == 255  # the batch itself is left alone


def test_loaded_splits_are_the_files_bytes(tiny: Path) -> None:
    folder = tiny / "FashionMNIST" / "raw"
    for split, prefix, count in zip(
        sources.load_mnist("fashion-mnist", tiny), ("train", "t10k"), (1501, 2303), strict=True
    ):
        assert (split.inputs.dtype, split.targets.dtype) == (torch.uint8, torch.int64)
        assert split.inputs.shape == (count, 1, 28, 28) and len(split) == count
        assert split.inputs.numpy().tobytes() == (folder / f"{prefix}-images-idx3-ubyte").read_bytes()[16:]
        assert bytes(split.targets.tolist()) == (folder / f"{prefix}-labels-idx1-ubyte").read_bytes()[8:]


def test_auto_is_the_real_data_where_it_is_there_and_generated_digits_where_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(files, "published", lambda dataset: ([], {}))
    assert sources.resolve("auto", tmp_path) == "synthetic"
    assert "missing; download failed" in caplog.text and "which are not MNIST" in caplog.text
    caplog.clear()
    monkeypatch.setattr(files, "_check_md5", lambda content, expected: None)
    for name, array in zip((*files.NAMES["train"], *files.NAMES["test"]), ([[[0] * 28] * 28], [0]) * 2, strict=True):
        (tmp_path / "MNIST" / "raw" / name).write_bytes(files.pack(np.array(array, np.uint8)))
    assert sources.resolve("auto", tmp_path) == "mnist"
    assert not caplog.records
    assert sources.resolve("fashion-mnist", tmp_path) == "fashion-mnist"


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan")])
def test_a_timeout_that_is_none_is_a_wrong_flag(seconds: float, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["fetch", "--timeout", str(seconds)])
    assert f"--timeout is {seconds}; expected seconds above 0" in capsys.readouterr().err


def test_files_that_cannot_be_fetched_are_one_message_and_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    root = tmp_path / "file" / "data"
    ended = jobs.Ended(main(["fetch", "--data-dir", str(root)]), *capsys.readouterr())
    assert f"cannot write: [Errno 20] Not a directory: '{root}/MNIST/raw'" in jobs.the_message([ended], 1)
    assert ended.out == ""
