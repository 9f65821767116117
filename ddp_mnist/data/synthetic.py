"""Synthetic handwritten digits: a stand-in for MNIST that needs no download.

A training job should be testable, at full size, on a machine with no network. This module draws
60,000 training and 10,000 test images with the shapes, types and look of MNIST. They are not MNIST:
an accuracy reached on them says that training works, and is not to be compared with published results.

How an image comes about:

1. Each digit has several hand-made skeletons (with or without serif, bar, loop ...), as strokes through
   control points.
2. Each split has its own bank of "hands": skeletons with displaced control points, uneven pen pressure
   and now and then a gap. The bank stores, on a grid finer than the image, the distance to the stroke.
3. Each image looks one hand up through a random affine map and a smooth random bend, and inks the pixels
   that lie within a random pen's reach. Storing distances rather than ink is what lets one hand be
   written with any pen, and keeps the edges smooth.

The images are the same to the byte on every machine. That is why only uniform random numbers and the
operations that IEEE 754 rounds exactly (+ - * / sqrt floor, comparisons) are used: results of sin, exp,
normal deviates and of sums over an axis may differ with the processor or the maths library.
"""

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

VERSION = 1
"""To be raised with every change of what is drawn: the files have it in their folder's name."""
SIZE = 28
COUNTS = {"train": 60_000, "test": 10_000}

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

_SEED = 20_240_229
# Every block of images has its own generator and is always drawn whole, so an image does not depend on
# how many are asked for. 1,000 images make arrays of 3 MB, which stay near the processor.
_BLOCK = 1_000
_HANDS = 32  # per skeleton
_GRID = 52  # bank cells along a side
_CELLS_PER_PIXEL = np.float32(2.0)
_SAMPLE_STEP = 0.8  # largest distance between stroke samples, in skeleton units (about 0.5 pixel)
_HEIGHT = np.float32(17.6)  # pixels from the top to the bottom of a skeleton; the pen adds about 2

# Skeletons as "x,y x,y ... | next stroke", y downwards, about 20 wide and 30 high. A curve runs smoothly
# through its points; a point given twice in a row is a corner. Four for each digit, in order.
_SKELETONS = (
    "10,0 3,4 0,15 3,26 10,30 17,26 20,15 17,4 10,0",  # 0: closed
    "14,2 7,1 1,9 1,21 7,29 15,27 19,17 17,6 11,0 6,4",  # 0: overlapping at the top
    "12,1 5,3 1,11 1,21 6,29 13,28 18,20 18,9 14,2",  # 0: open at the top
    "9,0 4,7 2,17 4,27 8,30 12,25 14,14 13,4 9,0",  # 0: narrow
    "10,0 10,15 10,30",  # 1: bare
    "13,0 11,15 8,30",  # 1: leaning
    "4,7 11,0 11,0 11,15 11,30",  # 1: with a serif
    "5,6 11,0 11,0 11,15 11,30 | 4,30 18,30",  # 1: with serif and base
    "1,7 4,2 10,0 16,3 17,9 12,18 1,30 1,30 10,29 20,30",  # 2: pointed
    "2,6 7,0 14,1 16,8 12,18 5,27 1,28 2,24 7,25 14,30 20,27",  # 2: looped
    "2,5 9,0 16,4 15,12 8,22 1,29 1,29 19,29",  # 2: flat base
    "3,4 9,0 15,3 15,10 9,20 2,28 2,28 8,26 14,30 20,28",  # 2: wavy base
    "2,4 9,0 16,3 16,9 8,14 8,14 16,17 18,24 10,30 1,26",  # 3: round
    "2,1 17,1 17,1 8,12 8,12 16,15 18,23 11,30 1,27",  # 3: flat top
    "2,4 9,0 16,4 14,11 8,14 6,12 10,13 17,18 17,26 9,30 1,27",  # 3: with a loop in the middle
    "3,2 10,0 16,4 13,11 7,14 14,16 17,23 10,29 2,29",  # 3: shallow
    "3,1 2,10 3,16 10,17 20,15 | 17,0 16,15 15,30",  # 4: open
    "4,2 1,16 1,16 18,16 | 15,3 14,16 13,30",  # 4: angular
    "14,0 0,20 0,20 20,20 | 14,0 14,30",  # 4: closed
    "10,0 1,18 1,18 19,17 | 15,9 14,18 11,30",  # 4: with a short stem
    "17,0 4,0 4,0 3,13 3,13 10,11 17,15 18,23 11,30 1,27",  # 5: angular
    "4,2 3,13 10,12 16,17 16,25 9,30 1,28 | 4,2 18,1",  # 5: with a separate hat
    "17,1 8,1 4,6 6,12 13,16 15,23 9,29 1,27",  # 5: rounded
    "5,3 5,13 5,13 12,13 16,19 14,27 7,30 2,27 | 6,3 12,2 19,0",  # 5: hat raised
    "14,0 6,6 1,17 2,26 9,30 16,26 16,19 10,16 3,21",  # 6: curved
    "6,0 2,12 1,22 5,29 12,30 17,25 14,18 7,18 2,23",  # 6: straight back
    "16,2 12,0 5,6 1,18 4,28 11,30 17,24 14,18 8,19 3,25",  # 6: curled top
    "12,0 5,9 1,20 3,28 9,30 13,26 12,21 7,20 2,24",  # 6: small bowl
    "1,2 18,1 18,1 12,14 8,30",  # 7: bare
    "1,2 18,1 18,1 12,15 8,30 | 5,15 17,14",  # 7: barred
    "1,6 2,1 2,1 18,1 18,1 13,13 10,30",  # 7: hooked
    "1,4 6,1 12,3 18,1 18,1 11,15 9,30",  # 7: wavy top
    "16,4 9,0 3,4 5,11 13,17 17,24 10,30 2,25 5,17 14,11 16,4",  # 8: crossing
    "10,14 4,10 4,3 10,0 16,3 16,10 10,14 10,14 3,18 2,26 10,30 18,26 17,18 10,14",  # 8: two rings
    "17,3 10,0 3,4 5,11 14,17 16,25 9,30 2,25 5,17 14,9 19,2",  # 8: open at the top
    "14,3 9,1 6,6 9,13 12,20 11,28 6,29 4,23 8,15 13,8 14,3",  # 8: slender
    "16,6 10,0 3,4 2,11 8,15 15,10 17,3 17,3 16,15 14,30",  # 9: straight stem
    "16,5 10,0 3,4 3,12 10,15 16,10 16,5 16,5 17,15 12,27 4,30",  # 9: curved tail
    "17,7 12,1 4,3 2,11 8,15 15,11 17,3 17,3 17,16 17,30",  # 9: ring and stem
    "14,5 9,0 4,4 4,10 9,13 13,9 14,4 14,4 12,16 7,30",  # 9: slender
)


def make_digits(split: Literal["train", "test"], count: int | None = None) -> tuple[Bytes, Bytes]:
    """Draw one split; the two have different hands and share no image.

    Returns the images, (N, 28, 28), 0 for the black ground up to 255 for full ink, and their digits,
    (N,), both uint8 and in random order of digit. N is 60,000 for "train" and 10,000 for "test", or
    ``count``, which gives the first ``count`` of the same images.
    """
    if split not in COUNTS:
        raise ValueError(f"split must be one of {', '.join(COUNTS)}, not {split!r}")
    total = COUNTS[split] if count is None else count
    if not 0 <= total <= COUNTS[split]:
        raise ValueError(f"count must be between 0 and {COUNTS[split]} for {split}, not {count}")
    bank = _draw_bank(_generator(split, 0))
    images, labels = np.empty((total, SIZE, SIZE), np.uint8), np.empty(total, np.uint8)
    for start in range(0, total, _BLOCK):
        part = slice(start, min(start + _BLOCK, total))
        drawn, digits = _draw_block(_generator(split, 1 + start // _BLOCK), bank)
        images[part], labels[part] = drawn[: part.stop - start], digits[: part.stop - start]
    return images, labels


def _generator(split: str, stream: int) -> np.random.Generator:
    # The size serves as the split's number. Stream 0 draws the bank, stream 1 + b the block b.
    return np.random.Generator(np.random.PCG64([_SEED, COUNTS[split], stream]))


def _spread(rng: np.random.Generator, shape: tuple[int, ...], reach: float) -> Floats:
    """Bell-shaped random numbers in (-reach, reach), standard deviation about 0.41 reach.

    The sum of two uniform numbers rather than a normal deviate, whose tails go through log and exp.
    """
    return (rng.random(shape, np.float32) - rng.random(shape, np.float32)) * np.float32(reach)


def _spline(t: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """Weights of four neighbouring control points for a Catmull-Rom curve between the middle two."""
    t2, half = t * t, np.float32(0.5)
    before, after = half * (2 * t2 - t2 * t - t), half * (t2 * t - t2)
    step = 3 * t2 - 2 * t2 * t
    return before, 1 - step - after, step - before, after


def _sample_plan(skeleton: str) -> tuple[Floats, NDArray[np.intp], Floats]:
    """Control points (P, 2), and for each of S samples its 4 control points (4, S) and their places (S,)."""
    order: dict[tuple[int, int], int] = {}  # a point met again is one point, so jitter keeps joins joined
    quads: list[tuple[int, int, int, int]] = []
    places: list[float] = []
    for stroke in skeleton.split(" | "):
        points = [(int(x), int(y)) for x, y in (pair.split(",") for pair in stroke.split())]
        ids = [order.setdefault(point, len(order)) for point in points]
        padded = [ids[0], *ids, ids[-1]]
        if ids[0] == ids[-1]:  # a closed curve is smooth where it closes
            padded[0], padded[-1] = ids[-2], ids[1]
        for k in range(len(ids) - 1):
            (x0, y0), (x1, y1) = points[k], points[k + 1]
            length = math.sqrt((x1 - x0) ** 2 + (y1 - y0) ** 2)
            steps = int(length / _SAMPLE_STEP) + 1 if length else 0
            quads += [(padded[k], padded[k + 1], padded[k + 2], padded[k + 3])] * steps
            places += [step / steps for step in range(steps)]
        quads.append((ids[-1],) * 4)
        places.append(0.0)
    return np.array(list(order), np.float32), np.array(quads, np.intp).T, np.array(places, np.float32)


def _draw_bank(rng: np.random.Generator) -> Floats:
    """Every hand of every skeleton, in order, as a distance map in pixels: (hands, cells, cells)."""
    hands: list[Floats] = []
    centres = (np.arange(_GRID, dtype=np.float32) - np.float32((_GRID - 1) / 2)) / _CELLS_PER_PIXEL
    for skeleton in _SKELETONS:
        points, quads, places = _sample_plan(skeleton)
        jittered = points + _spread(rng, (_HANDS, *points.shape), 3.2)
        curve = np.zeros((_HANDS, len(places), 2), np.float32)
        for quad, weight in zip(quads, _spline(places), strict=True):
            curve += jittered[:, quad] * weight[:, None]
        low, high = curve.min(axis=1, keepdims=True), curve.max(axis=1, keepdims=True)
        curve = (curve - (low + high) * np.float32(0.5)) * (_HEIGHT / (high - low)[:, :, 1:])
        hands.append(_distances(curve, _lifts(rng, len(places)), centres))
    return np.concatenate(hands)


def _lifts(rng: np.random.Generator, samples: int) -> Floats:
    """How far the pen is off the paper at each sample, (hands, samples), in square pixels."""
    along = np.arange(samples, dtype=np.float32)
    where = rng.random((_HANDS, 1), np.float32) * np.float32(samples)
    fade = rng.random((_HANDS, 1), np.float32) * np.float32(0.8)
    gap = np.where(rng.random((_HANDS, 1), np.float32) < 0.12, np.float32(4), np.float32(0))
    distance = np.abs(along - where)
    return fade * distance / np.float32(samples) + gap * (distance < 2.5)


def _distances(curve: Floats, lifts: Floats, centres: Floats) -> Floats:
    """Distance of each grid cell to the nearest sample of each curve, (hands, cells, cells)."""
    dx, dy = centres - curve[:, :, :1], centres - curve[:, :, 1:]
    dx2, dy2 = dx * dx + lifts[:, :, None], dy * dy
    nearest = np.full((len(curve), _GRID, _GRID), np.float32(np.inf))
    squares = np.empty_like(nearest)
    for sample in range(curve.shape[1]):
        np.add(dx2[:, sample, None, :], dy2[:, sample, :, None], out=squares)
        np.minimum(nearest, squares, out=nearest)
    return np.sqrt(nearest)


def _waves(rng: np.random.Generator, reach: float, knots: int = 6) -> Floats:
    """One smooth random function of the pixel position per image, (images, 28), as a quadratic B-spline."""
    heights = _spread(rng, (_BLOCK, knots), reach)
    place = np.arange(SIZE, dtype=np.float32) * np.float32((knots - 2) / SIZE)
    k, half = place.astype(np.intp), np.float32(0.5)
    f = place - np.floor(place)
    left, right = half * (1 - f) * (1 - f), half * f * f
    return heights[:, k] * left + heights[:, k + 1] * (1 - left - right) + heights[:, k + 2] * right


def _draw_block(rng: np.random.Generator, bank: Floats) -> tuple[Bytes, Bytes]:
    """One block of images (B, 28, 28) and their digits (B,)."""
    hands = np.floor(rng.random(_BLOCK) * len(bank)).astype(np.intp)
    labels = hands // (len(bank) // 10)

    # The affine map from image to hand. The tangent gives the rotation without sine and cosine.
    column = (_BLOCK, 1)
    tangent = _spread(rng, column, 0.33)
    cosine = 1 / np.sqrt(1 + tangent * tangent)
    sine, shear = tangent * cosine, _spread(rng, column, 0.35)
    wide = np.float32(0.96) + _spread(rng, column, 0.24)
    high = np.float32(1.08) + _spread(rng, column, 0.12)
    axis = np.arange(SIZE, dtype=np.float32) - np.float32((SIZE - 1) / 2)
    x, y = axis + _spread(rng, column, 1.2), axis + _spread(rng, column, 1.2)

    # Each source coordinate is p(x) + q(y) + r(y) x, or its mirror image: bends that vary over the plane
    # for the price of two operations per pixel.
    p, q, r = _waves(rng, 1.4), _waves(rng, 1.4), _waves(rng, 0.22)
    p, q = p + wide * (cosine - shear * sine) * x, q + wide * (sine + shear * cosine) * y
    across = p[:, None, :] + q[:, :, None] + r[:, :, None] * x[:, None, :]
    p, q, r = _waves(rng, 1.4), _waves(rng, 1.4), _waves(rng, 0.22)
    p, q = p - high * sine * x, q + high * cosine * y
    down = p[:, None, :] + q[:, :, None] + r[:, None, :] * y[:, :, None]
    distance = _look_up(bank, hands, across, down)

    pen = np.float32(1.25) + _spread(rng, column, 0.55)
    reach = (pen + _waves(rng, 0.5))[:, :, None] + _waves(rng, 0.5)[:, None, :]
    rough = (rng.random(distance.shape, np.float32) - np.float32(0.5)) * np.float32(0.35)
    softness = np.float32(0.75) + rng.random((_BLOCK, 1, 1), np.float32) * np.float32(0.5)
    ink = np.clip((reach - distance + rough) * softness + np.float32(0.5), 0, 1)
    peak = np.float32(195) + rng.random((_BLOCK, 1, 1), np.float32) * np.float32(60)
    return np.floor(ink * peak + np.float32(0.5)).astype(np.uint8), labels.astype(np.uint8)


def _look_up(bank: Floats, hands: NDArray[np.intp], across: Floats, down: Floats) -> Floats:
    """Distances to the stroke at source coordinates in pixels, bilinear between the bank's cells."""
    middle, limit = np.float32((_GRID - 1) / 2), np.float32(_GRID - 1.001)
    u, v = (np.clip(place * _CELLS_PER_PIXEL + middle, 0, limit) for place in (across, down))
    column, row = np.floor(u), np.floor(v)
    u, v = u - column, v - row
    corner = (row * np.float32(_GRID) + column).astype(np.intp) + (hands * (_GRID * _GRID))[:, None, None]
    flat = bank.reshape(-1)
    # Each view starts one cell further on, so one index serves all four corners.
    upper_left, upper_right = flat.take(corner), flat[1:].take(corner)
    lower_left, lower_right = flat[_GRID:].take(corner), flat[_GRID + 1 :].take(corner)
    upper = upper_left + (upper_right - upper_left) * u
    lower = lower_left + (lower_right - lower_left) * u
    return upper + (lower - upper) * v
