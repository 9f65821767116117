"""Pictures of digits → the labels a trained run gives them: `python -m ddp_mnist.predict RUN_DIR IMAGE...`

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

from ddp_mnist.data.mnist import class_names
from ddp_mnist.distributed.launcher import command, report_error
from ddp_mnist.errors import JobError
from ddp_mnist.run import directory

Floats = NDArray[np.float64]

SIZE = 28
DIGIT = 20
"""Longer side of a digit in MNIST, in pixels."""
CENTRE = 14.5
"""Place of a digit's centre of mass in MNIST, in pixels from the edge; measured: within half a pixel, all."""
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")
WORKING_SIZE = 1120
"""Longest side that is worked on; larger pictures are averaged down first."""
CONTRAST = 1 / 16
"""Smallest difference between ink and background, of the range of a colour channel."""
INK = 0.2
"""Share of the full ink from which a pixel counts for the bounding box: above what JPEG leaves around an edge."""


class PictureError(JobError):
    """A picture that cannot be used."""


def prepare(path: Path, dataset: str) -> NDArray[np.uint8]:
    """Return the picture as the data set would have it: uint8 (28, 28), light on black.

    Raises:
        PictureError: It cannot be read, or there is nothing on it.
    """
    pixels = _pixels(_open(path))
    background = np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]), axis=0)
    ink = np.abs(pixels - background).max(axis=2)  # darker or lighter, whatever the colours
    if ink.max() < CONTRAST:
        raise PictureError(f"{path} is of one colour: there is nothing to see in it.")
    ink /= ink.max()
    if dataset == "fashion-mnist":  # fills its images
        image = _scaled(ink, SIZE)
        top, left = ((SIZE - side) // 2 for side in image.shape)
    else:
        rows, columns = (np.flatnonzero((ink >= INK).any(axis=axis)) for axis in (1, 0))
        image = _scaled(ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], DIGIT)
        masses = (image.sum(axis=axis) / image.sum() for axis in (1, 0))
        centres = ((mass * (np.arange(len(mass)) + 0.5)).sum() for mass in masses)
        top, left = (
            min(max(round(CENTRE - centre), 0), SIZE - side) for centre, side in zip(centres, image.shape, strict=True)
        )
    whole = np.zeros((SIZE, SIZE))
    whole[top : top + image.shape[0], left : left + image.shape[1]] = image
    return np.rint(255 * whole / whole.max()).astype(np.uint8)


def _open(path: Path) -> Image.Image:
    """Return the first frame, decoded and upright. Raises: PictureError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pillow's doubts about metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as file:
                return ImageOps.exif_transpose(file)  # upright, as the camera says
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        limit = f"{Image.MAX_IMAGE_PIXELS:,}"
        raise PictureError(f"{path} has more than {limit} pixels, the limit; scale it down first.") from error
    except Image.UnidentifiedImageError as error:
        raise PictureError(f"{path} is not a picture in one of the formats {', '.join(FORMATS)}.") from error
    except Exception as error:  # pillow's decoders raise almost anything on damaged files
        why = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise PictureError(f"{path} cannot be read: {why}.") from error


def _pixels(image: Image.Image) -> Floats:
    """Return (H, W, channels) in 0-1, opaque, at most WORKING_SIZE high and wide."""
    is_wide = image.mode.startswith(("I", "F"))  # greys of more than 8 bits
    image = image.convert("F" if is_wide else "RGBA")
    image.thumbnail((WORKING_SIZE, WORKING_SIZE), Image.Resampling.BOX)
    pixels = np.asarray(image, dtype=np.float64)
    if is_wide:
        return np.nan_to_num(pixels)[..., None] / max(np.nan_to_num(pixels).max(), 1e-9)
    colour, alpha = pixels[..., :3] / 255, pixels[..., 3:] / 255
    is_dark = (colour * alpha).sum() < 1.5 * alpha.sum()  # what is drawn; what is transparent gets the other shade
    return colour * alpha + float(is_dark) * (1 - alpha)


def _scaled(ink: Floats, side: int) -> Floats:
    """Return the picture with its longer side of `side` pixels, its shape kept."""
    height, width = (max(1, round(side * each / max(ink.shape))) for each in ink.shape)
    method = Image.Resampling.BOX if side <= max(ink.shape) else Image.Resampling.BICUBIC
    image = Image.fromarray(ink.astype(np.float32)).resize((width, height), method)
    return np.clip(np.asarray(image, dtype=np.float64), 0, 1)


def predict(run_dir: Path, images: Sequence[NDArray[np.uint8]]) -> Floats:
    """Return the probability of each label, (N, classes), by the run's weights, on the CPU. Raises: JobError."""
    if not images:
        return np.empty((0, 0))
    import torch

    from ddp_mnist.data.batches import to_float
    from ddp_mnist.run.checkpoint import open_saved

    net = open_saved(run_dir).network
    with torch.no_grad():
        logits = net(to_float(torch.from_numpy(np.stack(images)).unsqueeze(1)))
    return logits.double().softmax(1).numpy()


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 0 when every picture is predicted, 1 when one is not."""
    options = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="warning: %(message)s")
    dataset = directory.read_settings(options.run_dir).dataset
    images: dict[Path, NDArray[np.uint8]] = {}
    found: dict[Path, dict[str, Any]] = {}
    for path in options.images:
        try:
            images[path] = prepare(path, dataset)
        except PictureError as error:
            found[path] = {"error": str(error)}
            report_error(error)
    names = class_names(dataset)
    for path, row in zip(images, predict(options.run_dir, list(images.values())), strict=True):
        top = _best(row, names)
        found[path] = {**top[0], "top": top}
        if not options.json:
            print(f"{path}: " + ", ".join(f"{names[each['label']]} {each['probability']:.1%}" for each in top))
    if options.json:
        print(json.dumps([{"image": str(path), **found[path]} for path in options.images], indent=2))
    return int(len(images) < len(found))


def _best(probabilities: Floats, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the three likeliest labels."""
    best: list[dict[str, Any]] = []
    for label in np.argsort(-probabilities, kind="stable")[:3].tolist():
        best.append({"label": label, "probability": float(probabilities[label])})
        if names[label] != str(label):
            best[-1]["name"] = names[label]
    return best


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ddp_mnist.predict",
        description="Say what a trained run takes pictures for, with the three highest probabilities.",
        epilog="Assumed of a picture: one digit, upright, in one ink on an even background, darker or lighter than "
        "it, with any margin. It is cropped to its ink, scaled into 20 x 20 and centred by mass in 28 x 28, as MNIST "
        "was made. For a run on fashion-mnist: one piece of clothing that fills the picture, which is only scaled. "
        f"Transparent parts are background; of several frames the first is used. {', '.join(FORMATS)}.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a run that has a checkpoint, finished or not")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    parser.add_argument("--json", action="store_true", help="print a list with one object per image")
    return parser


if __name__ == "__main__":
    sys.exit(main())
