"""The synthetic digits: the same everywhere, like MNIST in shape, and neither too easy nor too hard."""

import hashlib

import numpy as np
import pytest

from ddp_mnist.data.mnist import NAMES, pack
from ddp_mnist.data.synthetic import MD5, make_digits

pytestmark = pytest.mark.slow  # 70,000 digits are drawn


@pytest.fixture(scope="module")
def train():
    return make_digits("train")


@pytest.fixture(scope="module")
def test():
    return make_digits("test")


def test_both_splits_have_the_shapes_and_types_of_mnist_and_the_bytes_of_every_other_machine(train, test):
    for split, count, (images, labels) in (("train", 60_000, train), ("test", 10_000, test)):
        assert (images.shape, images.dtype) == ((count, 28, 28), np.uint8)
        assert (labels.shape, labels.dtype) == ((count,), np.uint8)
        assert [hashlib.md5(pack(array)).hexdigest() for array in (images, labels)] == [MD5[n] for n in NAMES[split]]


def test_a_smaller_count_gives_the_first_of_the_same_images(train):
    for count in (1, 1500):
        images, labels = make_digits("train", count=count)
        assert np.array_equal(images, train[0][:count])
        assert np.array_equal(labels, train[1][:count])


def test_no_image_appears_twice_and_every_digit_is_about_a_tenth_of_each_split_at_any_point(train, test):
    assert len({image.tobytes() for images, _ in (train, test) for image in images}) == 70_000
    for labels in (train[1], train[1][:6000], train[1][-6000:], test[1]):
        shares = np.bincount(labels, minlength=10) / len(labels)
        assert shares.shape == (10,) and shares.min() > 0.08 and shares.max() < 0.12


def test_a_linear_classifier_learns_the_digits_without_solving_them(train, test):
    (seen, digits), (new, expected) = (
        (images[:count].reshape(count, 784) / 255, labels[:count])
        for (images, labels), count in ((train, 6000), (test, 1000))
    )
    weights = np.linalg.solve(seen.T @ seen + 10 * np.eye(784), seen.T @ np.eye(10)[digits])
    assert 0.75 < np.mean((new @ weights).argmax(axis=1) == expected) < 0.95
