"""Pictures of digits → what a trained run takes them for: `python -m ddp_mnist.predict RUN_DIR IMAGE...`

A network knows only what it was trained on, so a picture is first made to look like an image of MNIST. Torch is
imported after arguments and pictures have been looked at.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ddp_mnist.data import mnist
from ddp_mnist.distributed.launcher import escape_unencodable_output
from ddp_mnist.errors import JobError
from ddp_mnist.run import directory

Floats = NDArray[np.float64]

SIZE = 28
DIGIT = 20
"""MNIST's digits fill a box of 20 x 20, in which they keep their shape."""
CENTRE = 14.5
"""Where MNIST puts a digit's centre of mass, in pixels from the image's edge; measured: within half a pixel, all."""
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")
MAX_PIXELS = 64_000_000
"""A photo of today's cameras; 256 MB when decoded."""
WORKING_SIZE = 1120
"""Longest side that is worked on; larger pictures are averaged down first, which also takes out noise."""
CONTRAST = 1 / 16
"""Least distance of ink and background, of the range of a colour channel."""
INK = 0.2
"""Share of the full ink from which a pixel counts for the bounding box: above what JPEG leaves around an edge."""
EVEN = 0.01
"""Standard deviation of a background that has neither noise nor shadows, of the full ink."""
TOP = 3


class PictureError(JobError):
    """A picture that cannot be used."""


def prepare(path: Path, dataset: str) -> NDArray[np.uint8]:
    """The picture as the data set would have it: uint8 (28, 28), light on black. Raises: PictureError."""
    level = _level(_pixels(_open(path)))
    if level is None:
        raise PictureError(f"{path} is of one colour: there is nothing to see in it.")
    if dataset == "fashion-mnist":  # its texture would pass for shadows and noise, its darker parts for background
        image = _whole(np.clip(level, 0, 1))
    else:
        ink = _ink(level)
        image = _whole(ink) if _is_laid_out(ink) else _digit(ink)
    return np.rint(255 * image / image.max()).astype(np.uint8)


def _open(path: Path) -> Image.Image:
    """Decoded, first frame, upright, in mode L, RGB, RGBA or one of the wider greys. Raises: PictureError."""
    if not path.is_file():
        found = "is a directory" if path.is_dir() else "is not a file" if path.exists() else "does not exist"
        raise PictureError(f"{path} {found}; expected a picture.")
    try:
        if path.stat().st_size == 0:
            raise PictureError(f"{path} is empty; expected a picture.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pillow's doubts about size and metadata; the size is judged below
            with Image.open(path, formats=FORMATS) as file:
                if file.width * file.height > MAX_PIXELS:
                    raise Image.DecompressionBombError
                image = ImageOps.exif_transpose(file)  # decodes
            if image.mode.startswith(("I", "F")):
                return image
            return image.convert("RGBA" if image.has_transparency_data else "L" if image.mode in ("1", "L") else "RGB")
    except PictureError:
        raise
    except Image.DecompressionBombError as error:
        raise PictureError(f"{path} has more than {MAX_PIXELS:,} pixels, the limit; scale it down first.") from error
    except Image.UnidentifiedImageError as error:
        raise PictureError(f"{path} is not a picture in one of the formats {', '.join(FORMATS)}.") from error
    except Exception as error:  # pillow's decoders raise almost anything on damaged files
        raise PictureError(f"{path} cannot be read: {str(error).rstrip('.')}.") from error


def _pixels(image: Image.Image) -> Floats:
    """(H, W, channels) in 0-1, opaque, at most WORKING_SIZE high and wide."""
    if image.mode.startswith(("I", "F")):
        levels = np.nan_to_num(np.asarray(image, dtype=np.float64))
        low, high = min(0.0, levels.min()), levels.max()
        # Wide files often hold bytes, which tells only their largest value.
        high = next((usual for usual in (1.0, 255.0, 65_535.0) if high <= usual), high)
        return _reduced(Image.fromarray(((levels - low) / (high - low)).astype(np.float32)))
    pixels = _reduced(image) / 255
    if image.mode != "RGBA":
        return pixels
    colour, alpha = pixels[..., :3], pixels[..., 3:]
    opaque = colour[alpha[..., 0] > 0.5]
    if len(opaque) == 0:
        return np.zeros_like(colour)
    # A stroke on nothing needs a ground to stand out from; a card with transparent corners needs more of the card.
    middle = np.median(opaque, axis=0)
    is_stroke = np.abs(opaque - middle).max() < 0.25
    ground = float(middle.mean() < 0.5) if is_stroke else middle
    return colour * alpha + ground * (1 - alpha)


def _reduced(image: Image.Image) -> Floats:
    factor = -(-max(image.size) // WORKING_SIZE)
    pixels = np.asarray(image.reduce(factor) if factor > 1 else image, dtype=np.float64)
    return pixels.reshape(*pixels.shape[:2], -1)


def _level(pixels: Floats) -> Floats | None:
    """(H, W, channels) → (H, W): 0 the background, 1 the most of what is on it, be it darker or lighter.

    None for a picture of one colour.
    """
    difference = pixels - _background(pixels)
    distance = np.abs(difference).max(axis=2, keepdims=True)
    if distance.max() < CONTRAST:
        return None
    # Ink lies to one side of the background in colour space: what is on the other side, noise say, is below zero.
    direction = (difference * distance**2).sum(axis=(0, 1))
    if not direction.any():  # as much on both sides
        direction = difference.reshape(-1, len(direction))[distance.argmax()]
    level = difference @ direction
    return level / level.max()


def _ink(level: Floats) -> Floats:
    """(H, W) in 0-1, without the background's shadows and noise."""
    if _unevenness(level) > EVEN:  # a photo, say; else the picture is left as it is
        for _ in range(3):
            flat = level - _shading(level)
            if flat.max() < INK:
                break
            level = flat / flat.max()
    floor = min(0.3, 3 * _unevenness(level))
    return np.clip((level - floor) / (1 - floor), 0, 1)


def _unevenness(level: Floats) -> float:
    """Standard deviation of the background, from the median so that the rims of the ink do not count."""
    background = level[level < 0.5]
    return 1.4826 * float(np.median(np.abs(background))) if background.size else 0.0


def _shading(level: Floats) -> Floats:
    """(H, W): the plane through the background."""
    y, x = (axis.ravel() for axis in np.meshgrid(*(np.linspace(-1, 1, side) for side in level.shape), indexing="ij"))
    terms = np.stack([np.ones_like(x), x, y], axis=1)
    chosen = level.ravel() < 0.5
    return (terms @ np.linalg.lstsq(terms[chosen], level.ravel()[chosen], rcond=None)[0]).reshape(level.shape)


def _background(pixels: Floats) -> Floats:
    """(channels,): the colour that most of the border and most of the picture have, by equal votes.

    The border alone is fooled by a tightly cropped 1, the whole alone by thick ink.
    """
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    everything = pixels.reshape(-1, pixels.shape[2])
    edges = np.linspace(0, 1 + 1e-9, 17)
    votes = np.zeros(16)
    for part in (border, everything):
        counts = np.histogram(part.mean(axis=1), edges)[0] / len(part)
        votes += np.convolve(counts, [0.5, 1, 0.5], "same")  # a colour may lie on the edge of two bins
    bin_ = int(votes.argmax())
    low, high = edges[max(bin_ - 1, 0)], edges[min(bin_ + 2, 16)]
    inside = [part[(part.mean(axis=1) >= low) & (part.mean(axis=1) < high)] for part in (border, everything)]
    return np.median(inside[0] if len(inside[0]) else inside[1], axis=0)


def _is_laid_out(ink: Floats) -> bool:
    """Whether this is an image of MNIST, perhaps enlarged: square, the box as large and the mass where it puts them."""
    height, width = ink.shape
    if height != width or height < SIZE:
        return False
    scale = SIZE / height
    box, (y, x) = _box(ink), _mass(ink)
    side = max(box[2] - box[0], box[3] - box[1]) * scale
    return abs(side - DIGIT) <= 1.5 and max(abs(y * scale - CENTRE), abs(x * scale - CENTRE)) <= 0.8


def _digit(ink: Floats) -> Floats:
    """(28, 28): the ink's bounding box scaled to 20 on its longer side, its centre of mass in the middle."""
    top, left, bottom, right = _box(ink)
    scale = DIGIT / max(bottom - top, right - left)
    height, width = (max(1, round(scale * side)) for side in (bottom - top, right - left))
    scaled = _resized(ink[top:bottom, left:right], height, width)
    y, x = _mass(scaled)
    image = np.zeros((SIZE, SIZE))
    down, across = (min(max(round(CENTRE - mass), 0), SIZE - side) for mass, side in ((y, height), (x, width)))
    image[down : down + height, across : across + width] = scaled
    return image


def _whole(ink: Floats) -> Floats:
    """(28, 28): the whole picture, centred, its shape kept."""
    scale = SIZE / max(ink.shape)
    height, width = (max(1, round(scale * side)) for side in ink.shape)
    down, across = (SIZE - height) // 2, (SIZE - width) // 2
    image = np.zeros((SIZE, SIZE))
    image[down : down + height, across : across + width] = _resized(ink, height, width)
    return image


def _resized(ink: Floats, height: int, width: int) -> Floats:
    # An average undoes an enlargement by whole numbers exactly, and of smooth ones enough: of 1,000 test images between
    # 28 and 280 pixels 0 (nearest) to 6 (bilinear) were taken for another digit than before.
    filter_ = Image.Resampling.BOX if height <= ink.shape[0] else Image.Resampling.BICUBIC
    image = Image.fromarray(ink.astype(np.float32)).resize((width, height), filter_)
    return np.clip(np.asarray(image, dtype=np.float64), 0, 1)


def _box(ink: Floats) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of the pixels that hold ink."""
    rows, columns = (np.flatnonzero((ink >= INK).any(axis=axis)) for axis in (1, 0))
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def _mass(ink: Floats) -> tuple[float, float]:
    """(y, x) of the centre of mass, in pixels from the top left edge."""
    y, x = ((ink.sum(axis=axis) * (np.arange(ink.shape[1 - axis]) + 0.5)).sum() / ink.sum() for axis in (1, 0))
    return float(y), float(x)


def predict(run_dir: Path, images: Sequence[NDArray[np.uint8]]) -> Floats:
    """(N, 10): the probability of each label, by the run's weights, on one CPU. Raises: JobError."""
    import torch

    from ddp_mnist.data.batches import to_float
    from ddp_mnist.run.checkpoint import open_saved

    net = open_saved(run_dir).net
    with torch.no_grad():
        logits = net(to_float(torch.from_numpy(np.stack(images)).unsqueeze(1)))
    return logits.double().softmax(1).numpy()


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: every picture is predicted. 1: one was not, or the run could not be read. 2: a wrong flag."""
    escape_unencodable_output()
    options = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="warning: %(message)s")
    try:
        dataset = directory.read_settings(options.run_dir).dataset
        found: list[NDArray[np.uint8] | PictureError] = [_attempt(path, dataset) for path in options.images]
        good = [image for image in found if not isinstance(image, PictureError)]
        rows = iter(predict(options.run_dir, good)) if good else iter(())
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    names = mnist.class_names(dataset)
    results = []
    for path, image in zip(options.images, found, strict=True):
        if isinstance(image, PictureError):
            print(f"error: {image}", file=sys.stderr)
            results.append({"image": str(path), "error": str(image)})
            continue
        result = _result(path, next(rows), names)
        results.append(result)
        if not options.json:
            chances = ", ".join(f"{names[top['label']]} {top['probability']:.1%}" for top in result["top"])
            print(f"{path}: {chances}")
    if options.json:
        print(json.dumps(results, indent=2))
    return int(len(good) < len(found))


def _attempt(path: Path, dataset: str) -> NDArray[np.uint8] | PictureError:
    try:
        return prepare(path, dataset)
    except PictureError as error:
        return error


def _result(path: Path, probabilities: Floats, names: Sequence[str]) -> dict[str, Any]:
    ranking = np.argsort(-probabilities, kind="stable")[:TOP].tolist()
    top = [
        {"label": label, "probability": float(probabilities[label])}
        | ({} if names[label] == str(label) else {"name": names[label]})
        for label in ranking
    ]
    return {"image": str(path), **top[0], "top": top}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ddp_mnist.predict",
        description="Say what a trained run takes pictures for, with the three highest probabilities.",
        epilog="Assumed of a picture: one digit, upright, in one ink on an even background, darker or lighter than "
        "it, with any margin. It is cropped to its ink, scaled into 20 x 20 and centred by mass in 28 x 28, as MNIST "
        "was made; a square picture that has this layout already is only scaled. For a run on fashion-mnist: one "
        "piece of clothing that fills the picture, which is only scaled. Transparent parts are background; of several "
        f"frames the first is used. {', '.join(FORMATS)}; at most {MAX_PIXELS:,} pixels.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a run that has a checkpoint, finished or not")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    parser.add_argument("--json", action="store_true", help="print a list with one object per image")
    return parser


if __name__ == "__main__":
    sys.exit(main())
