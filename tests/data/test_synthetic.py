"""The synthetic digits: the same everywhere, like MNIST in shape, and neither too easy nor too hard."""

import hashlib

import numpy as np
import pytest
import torch
from torch import nn

from ddp_mnist.data.mnist import NAMES, pack
from ddp_mnist.data.synthetic import MD5, make_digits


@pytest.fixture(scope="module")
def train():
    return make_digits("train")


@pytest.fixture(scope="module")
def test():
    return make_digits("test")


def test_both_splits_have_the_shapes_and_types_of_mnist_and_the_bytes_of_every_other_machine(train, test):
    for split, digits in (("train", train), ("test", test)):
        images, labels = digits
        count = {"train": 60_000, "test": 10_000}[split]
        assert (images.shape, images.dtype, labels.shape, labels.dtype) == (
            *((count, 28, 28), np.uint8),
            *((count,), np.uint8),
        )
        for name, array in zip(NAMES[split], digits, strict=True):
            assert hashlib.md5(pack(array)).hexdigest() == MD5[name]


@pytest.mark.parametrize("count", [0, 1, 999, 1000, 1500])
def test_a_smaller_count_gives_the_first_of_the_same_images(train, count):
    images, labels = make_digits("train", count=count)
    assert images.shape == (count, 28, 28)
    assert np.array_equal(images, train[0][:count])
    assert np.array_equal(labels, train[1][:count])


def test_drawing_leaves_the_global_random_state_alone():
    np.random.seed(1)
    expected = np.random.random(4)
    np.random.seed(1)
    make_digits("test", count=10)
    assert np.array_equal(np.random.random(4), expected)


def test_no_image_appears_twice_in_or_across_the_splits(train, test):
    seen = {image.tobytes() for images, _ in (train, test) for image in images}
    assert len(seen) == 70_000


def test_every_digit_is_about_a_tenth_of_each_split_at_any_point(train, test):
    for labels in (train[1], train[1][:6000], train[1][-6000:], test[1]):
        shares = np.bincount(labels, minlength=10) / len(labels)
        assert shares.shape == (10,) and shares.min() > 0.08 and shares.max() < 0.12


def test_images_are_bright_strokes_with_soft_edges_in_the_middle_of_a_black_ground(test):
    images, _ = test
    pixels = images.reshape(len(images), -1)
    assert np.median(images) == 0 and pixels.max(axis=1).min() > 100
    assert np.mean(np.sum(pixels > 100, axis=1) >= 20) > 0.99
    # MNIST has 19 % of its pixels inked; far from that, speed and accuracy of training would mislead.
    assert 0.12 < np.mean(images > 0) < 0.25
    assert len(np.unique(images)) > 200
    places = np.arange(28) - 13.5
    for axis in (0, 1):
        assert abs(np.average(places, weights=images.mean(axis=0).sum(axis=axis))) < 1


def test_a_mean_image_per_digit_is_a_fair_guess_but_no_more(train, test):
    """Learnable at once, yet not by comparing with ten pictures: the styles within a digit differ."""
    images, labels = train[0][:6000].reshape(6000, -1) / 255.0, train[1][:6000]
    means = np.stack([images[labels == digit].mean(axis=0) for digit in range(10)])
    seen = test[0][:1000].reshape(1000, -1) / 255.0
    nearest = ((seen[:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    assert 0.5 < np.mean(nearest == test[1][:1000]) < 0.95


@pytest.fixture
def one_thread():
    """Layers this small gain nothing from threads, and lose much where the cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_small_network_learns_the_digits_without_solving_them(train, test, one_thread):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(784, 10)),
        )
        inputs = torch.from_numpy(train[0][:6000]).float().div(255).unsqueeze(1)
        targets = torch.from_numpy(train[1][:6000]).long()
        optimizer = torch.optim.Adam(model.parameters(), 2e-3)
        for _ in range(3):
            for batch in torch.randperm(6000).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(inputs[batch]), targets[batch]).backward()
                optimizer.step()
        with torch.no_grad():
            guesses = model(torch.from_numpy(test[0][:1000]).float().div(255).unsqueeze(1)).argmax(1)
    accuracy = np.mean(guesses.numpy() == test[1][:1000])
    assert 0.85 < accuracy < 1
