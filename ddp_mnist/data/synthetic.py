"""Synthetic handwritten digits: a stand-in for MNIST that needs no download.

They have MNIST's counts, shapes and types, and roughly its look. A skeleton is a digit in straight strokes. A hand is
a skeleton with its points moved at random, kept as a grid of distances to the strokes. An image is a hand, bent at
random and drawn with a pen of random width. An accuracy on them says that training works, no more.

The images are the same to the byte on every machine. So they use uniform random numbers and operations that IEEE 754
rounds exactly; sin, exp, normal random numbers and sums over an axis differ between processors and libraries.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

VERSION = 2
"""Raise it with every change of what is drawn; it is part of the folder's name."""
MD5 = {
    "train-images-idx3-ubyte": "edde8e66b3896eec8fe7fb1813215758",
    "train-labels-idx1-ubyte": "bf9d03412ad932f88d1a445bcb0e3e07",
    "t10k-images-idx3-ubyte": "ea71384d4460da73317e48b4c6b70227",
    "t10k-labels-idx1-ubyte": "7213cd27bf47b47fa150ffbeb1c4881c",
}
"""Hashes of the files that hold the images and labels."""
SIZE = 28
COUNTS = {"train": 60_000, "test": 10_000}

_BLOCK = 1_000  # images drawn at once, always as a whole: an image does not depend on how many are asked for
_HANDS = 32  # per skeleton
_CELLS = 3  # of a hand's grid, per pixel
_HEIGHT = np.float32(17.6)  # of a skeleton, in pixels; the pen adds about 2

# Strokes as "x,y x,y ... | next stroke", y downwards, about 20 wide and 30 high. As many for each digit, in order.
_SKELETONS = (
    "10,0 5,2 1,9 0,15 1,21 5,28 10,30 15,28 19,21 20,15 19,9 15,2 10,0",  # 0: closed
    "13,1 8,1 4,5 1,11 1,21 6,29 13,28 17,24 18,15 18,9 14,2",  # 0: open at the top
    "13,0 11,15 8,30",  # 1: bare
    "4,7 11,0 11,15 11,30",  # 1: with a serif
    "1,7 4,2 10,0 16,3 17,9 12,18 1,30 10,29 20,30",  # 2: pointed
    "2,6 7,0 14,1 16,8 12,18 5,27 1,28 2,24 7,25 14,30 20,27",  # 2: looped
    "2,4 5,1 9,0 16,3 16,9 13,13 8,14 16,17 18,24 15,29 10,30 1,26",  # 3: round
    "2,1 17,1 8,12 16,15 18,23 15,28 11,30 5,29 1,27",  # 3: flat top
    "3,1 2,10 3,16 10,17 20,15 | 17,0 16,15 15,30",  # 4: open
    "14,0 0,20 20,20 | 14,0 14,30",  # 4: closed
    "17,0 4,0 3,13 10,11 17,15 18,23 16,28 11,30 1,27",  # 5: angular
    "4,2 3,13 10,12 16,17 17,22 16,25 9,30 1,28 | 4,2 18,1",  # 5: with a separate hat
    "14,0 6,6 2,12 1,17 2,26 9,30 16,26 16,19 10,16 3,21",  # 6: curved
    "6,0 2,12 1,22 5,29 12,30 17,25 14,18 7,18 2,23",  # 6: straight back
    "1,2 18,1 12,14 8,30",  # 7: bare
    "1,2 18,1 12,15 8,30 | 5,15 17,14",  # 7: barred
    "16,4 9,0 3,4 5,11 13,17 17,24 15,29 10,30 4,29 2,25 5,17 14,11 16,4",  # 8: crossing
    "10,14 4,10 4,3 10,0 16,3 16,10 10,14 3,18 2,26 10,30 18,26 17,18 10,14",  # 8: two rings
    "16,6 10,0 3,4 2,11 8,15 15,10 17,3 16,15 14,30",  # 9: straight stem
    "16,5 10,0 3,4 3,12 10,15 16,10 16,5 17,15 12,27 4,30",  # 9: curved tail
)


def make_digits(split: Literal["train", "test"], count: int | None = None) -> tuple[Bytes, Bytes]:
    """Draw one split, or its first `count` images. The two splits have different hands and share no image.

    Returns:
        The images (N, 28, 28), 0 for the black ground up to 255, and their digits (N,), in random order.
    """
    total = COUNTS[split] if count is None else count
    rng = _generator(split, 0)
    hands = np.concatenate([_draw_hands(rng, skeleton) for skeleton in _SKELETONS])
    blocks = [_draw_block(_generator(split, 1 + start // _BLOCK), hands) for start in range(0, total, _BLOCK)]
    images, labels = (np.concatenate(parts)[:total] for parts in zip(*blocks, strict=True))
    return images, labels


def _generator(split: str, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([20_240_229, COUNTS[split], stream]))


def _spread(rng: np.random.Generator, shape: tuple[int, ...], reach: float) -> Floats:
    """Return bell-shaped random numbers in (-reach, reach), of standard deviation 0.41 reach."""
    return (rng.random(shape, np.float32) - rng.random(shape, np.float32)) * np.float32(reach)


def _draw_hands(rng: np.random.Generator, skeleton: str) -> Floats:
    """Return each cell's distance to the strokes, in pixels, (hands, cells, cells)."""
    strokes = [[tuple(map(int, pair.split(","))) for pair in stroke.split()] for stroke in skeleton.split(" | ")]
    points = sorted({point for stroke in strokes for point in stroke})  # each once, so that joins stay joined
    places = np.array(points, np.float32) + _spread(rng, (_HANDS, len(points), 2), 4.2)
    low, high = places.min(axis=1, keepdims=True), places.max(axis=1, keepdims=True)
    places = (places - (low + high) * np.float32(0.5)) * (_HEIGHT / (high - low)[:, :, 1:])
    centres = (np.arange(SIZE * _CELLS, dtype=np.float32) + np.float32(0.5)) / np.float32(_CELLS) - SIZE // 2
    nearest = np.full((_HANDS, SIZE * _CELLS, SIZE * _CELLS), np.inf, np.float32)
    for start, end in (pair for stroke in strokes for pair in pairwise(stroke)):
        origin, way = places[:, points.index(start)], places[:, points.index(end)] - places[:, points.index(start)]
        across, down = way[:, None, None, 0], way[:, None, None, 1]
        x, y = centres - origin[:, None, None, 0], centres[:, None] - origin[:, None, None, 1]
        along = np.clip((x * across + y * down) / (across * across + down * down), 0, 1)
        x, y = x - along * across, y - along * down
        nearest = np.minimum(nearest, x * x + y * y)
    return np.sqrt(nearest)


def _draw_block(rng: np.random.Generator, hands: Floats) -> tuple[Bytes, Bytes]:
    """Return images (B, 28, 28) and their digits (B,)."""
    chosen = np.floor(rng.random(_BLOCK) * len(hands)).astype(np.intp)
    x = (np.arange(SIZE, dtype=np.float32) - np.float32((SIZE - 1) / 2)) / np.float32(SIZE / 2)
    cells = []
    for mean_x, mean_y, reach_x, reach_y in ((0.0, 1.1, 0.2, 0.2), (1.0, 0.0, 0.25, 0.5)):  # down, then across
        # A random quadratic function of the place in the image moves, scales, turns, shears and bends.
        reaches = (0.12, reach_x, reach_y, 0.2, 0.2, 0.2)
        move, by_x, by_y, xx, yy, xy = (_spread(rng, (_BLOCK, 1), reach) for reach in reaches)
        place = (move + (np.float32(mean_x) + by_x + xx * x) * x)[:, None, :]
        place = place + ((np.float32(mean_y) + by_y + yy * x) * x)[:, :, None] + xy[:, :, None] * x[:, None] * x
        cell = np.floor((place + 1) * np.float32(_CELLS * SIZE / 2))
        cells.append(np.clip(cell, 0, _CELLS * SIZE - 1).astype(np.intp))
    distance = hands[chosen[:, None, None], cells[0], cells[1]]
    column = (_BLOCK, 1, 1)
    pen = np.float32(1.25) + _spread(rng, column, 0.55)
    ink = np.clip((pen - distance) * (np.float32(0.75) + rng.random(column, np.float32) / 2) + np.float32(0.5), 0, 1)
    peak = np.float32(195) + rng.random(column, np.float32) * np.float32(60)
    images = np.floor(ink * peak + np.float32(0.5)).astype(np.uint8)
    return images, (chosen // (len(hands) // 10)).astype(np.uint8)
