"""Synthetic handwritten digits: a stand-in for MNIST that needs no download.

They have MNIST's counts, shapes and types, and roughly its look: each image is one of ten glyphs, bent at random and
drawn with a pen of random width. An accuracy on them says that training works, no more.

The images are the same to the byte on every machine. So the code uses only uniform random numbers and operations that
IEEE 754 rounds exactly; sin, exp, normal random numbers and sums over an axis differ between processors and libraries.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

VERSION = 3  # part of the folder's name: increase it with every change to the images
_COUNTS = {"train": 60_000, "test": 10_000}
_BLOCK = 1_000  # images drawn together; a block is always drawn whole, so that no image depends on `count`
_GLYPHS = """
    .###. ..#.. .###. .###. ...#. ##### ..##. ##### .###. .###.
    #...# .##.. #...# #...# ..##. #.... .#... ....# #...# #...#
    #...# ..#.. ....# ....# .#.#. ####. #.... ...#. #...# #...#
    #...# ..#.. ...#. ..##. #..#. ....# ####. ..#.. .###. .####
    #...# ..#.. ..#.. ....# ##### ....# #...# ..#.. #...# ....#
    #...# ..#.. .#... #...# ...#. #...# #...# .#... #...# ...#.
    .###. ..#.. ##### .###. ...#. .###. .###. .#... .###. .##..
"""
_MARGINS = ((0, 0), (2, 2), (3, 3))  # empty pixels around each glyph; with them it is 11 x 11
_CELLS = 8  # cells of a height map per glyph pixel, in each direction


def make_digits(split: Literal["train", "test"], count: int | None = None) -> tuple[Bytes, Bytes]:
    """Draw one split, or its first `count` images. The two splits share no image.

    Return the images (N, 28, 28), from 0 (black background) to 255, and their digits (N,), in random order.
    """
    total = _COUNTS[split] if count is None else count
    rng = np.random.Generator(np.random.PCG64([VERSION, _COUNTS[split]]))
    heights = _height_maps()
    blocks = [_draw_block(rng, heights) for _ in range(0, total, _BLOCK)]
    images, labels = (np.concatenate(parts)[:total] for parts in zip(*blocks, strict=True))
    return images, labels


def _height_maps() -> Floats:
    """Return the glyphs as smooth hills, highest in the middle of a stroke: (10, cells, cells)."""
    pixels = np.array([[list(glyph) for glyph in line.split()] for line in _GLYPHS.strip().splitlines()])
    heights = np.pad((pixels == "#").swapaxes(0, 1).astype(np.float32), _MARGINS)
    heights = heights.repeat(_CELLS, axis=1).repeat(_CELLS, axis=2)
    for shift, axis in 24 * ((1, 1), (-1, 1), (1, 2), (-1, 2)):
        heights = (heights + np.roll(heights, shift, axis)) / 2
    return heights


def _draw_block(rng: np.random.Generator, heights: Floats) -> tuple[Bytes, Bytes]:
    """Return images (B, 28, 28) and their digits (B,)."""

    def spread(reach: float) -> Floats:
        """Return a random number in (-reach, reach) for each image; small numbers are more likely."""
        shape = (_BLOCK, 1, 1)
        return (rng.random(shape, np.float32) - rng.random(shape, np.float32)) * np.float32(reach)

    x = (np.arange(28, dtype=np.float32) - np.float32(13.5)) / np.float32(14)  # from -1 to 1, as on the height map
    y = x[:, None]
    # A random quadratic function maps pixels to the height map: it moves, scales, turns, shears and bends the digit.
    column, row = x + spread(0.12), y + spread(0.12)
    for term in (x, y, x * x, x * y, y * y):
        column, row = column + spread(0.5) * term, row + spread(0.5) * term
    cells = heights.shape[1]
    columns, rows = (np.clip((place + 1) * (cells / 2), 0, cells - 1).astype(np.intp) for place in (column, row))
    labels = (rng.random(_BLOCK) * 10).astype(np.uint8)
    height = heights[labels[:, None, None], rows, columns]
    ink = np.clip((height - spread(0.2) - 0.35) * (spread(1.5) + 5), 0, 1)  # a pen of random width and softness
    return (ink * (spread(30) + 225) + 0.5).astype(np.uint8), labels
