"""The synthetic digits: the same everywhere, like MNIST in shape, and neither too easy nor too hard."""

import hashlib

import numpy as np
import pytest

from ddp_mnist.data.mnist import pack
from ddp_mnist.data.synthetic import make_digits

pytestmark = pytest.mark.slow  # 70,000 digits are drawn

COUNTS = {"train": 60_000, "test": 10_000}
MD5 = {  # of the files of images and labels
    "train": ["9bcc0b87dd9587bba62afeb51643fc8d", "7aa2dfe8b4d34de6b5fb405a32641591"],
    "test": ["8545b9c8ff2a85b40fff538a50d2598c", "e2dc6086b77aa982f02c0ef939871d6a"],
}


@pytest.fixture(scope="module")
def digits():
    return {split: make_digits(split) for split in COUNTS}


@pytest.mark.parametrize("split", COUNTS)
def test_a_split_has_the_shapes_and_types_of_mnist_and_the_bytes_of_every_other_machine(digits, split):
    images, labels = digits[split]
    assert (images.shape, images.dtype) == ((COUNTS[split], 28, 28), np.uint8)
    assert (labels.shape, labels.dtype) == ((COUNTS[split],), np.uint8)
    assert [hashlib.md5(pack(array)).hexdigest() for array in (images, labels)] == MD5[split]


@pytest.mark.parametrize("count", [1, 1500])
def test_a_smaller_count_gives_the_first_of_the_same_images(digits, count):
    for part, whole in zip(make_digits("train", count=count), digits["train"], strict=True):
        assert np.array_equal(part, whole[:count])


def test_no_image_appears_twice_and_every_digit_is_about_a_tenth_of_each_split_at_any_point(digits):
    assert len({image.tobytes() for images, _ in digits.values() for image in images}) == 70_000
    for labels in (digits["train"][1], *digits["train"][1].reshape(10, -1), digits["test"][1]):
        shares = np.bincount(labels, minlength=10) / len(labels)
        assert shares.shape == (10,) and shares.min() > 0.08 and shares.max() < 0.12


def test_a_linear_classifier_learns_the_digits_without_solving_them(digits):
    seen, new = (digits[split][0][:6000].reshape(-1, 784) / 255 for split in COUNTS)
    weights = np.linalg.solve(seen.T @ seen + 10 * np.eye(784), seen.T @ np.eye(10)[digits["train"][1][:6000]])
    assert 0.75 < np.mean((new @ weights).argmax(axis=1) == digits["test"][1][:6000]) < 0.95
