"""Print the digits that a trained run sees in pictures: `python -m ddp_mnist.predict RUN_DIR IMAGE...`.

A network knows only what it was trained on, so a picture is first made to look like an image of MNIST.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from ddp_mnist.data.mnist import class_names
from ddp_mnist.distributed.launcher import entry_point, report_error, show_warnings
from ddp_mnist.errors import JobError
from ddp_mnist.storage import directory

SIZE, DIGIT = 28, 20  # sides of MNIST's images and of the digits in them, in pixels
CENTRE = 14.5  # of a digit's mass in MNIST, in pixels from the edge; measured: all are within half a pixel of it
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")
SCALING = Image.Resampling.BOX
CONTRAST = 16  # smallest difference between ink and background, of the 255 of a colour channel
INK = 50  # part of the full ink, of 255, from which a pixel counts: above JPEG's noise around an edge


def prepare(path: Path, dataset: str) -> NDArray[np.uint8]:
    """Return the picture as the data set would have it: uint8 (28, 28), light on black.

    Raises JobError: it cannot be read, or there is nothing on it.
    """
    pixels = np.asarray(_read(path), dtype=np.float32)
    background = np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]), axis=0)
    ink = np.abs(pixels - background).max(axis=2)  # darker or lighter, whatever the colours
    if ink.max() < CONTRAST:
        raise JobError(f"{path} is of one colour: there is nothing to see in it.")
    image = Image.fromarray(np.rint(ink * (255 / ink.max())).astype(np.uint8))
    if dataset == "fashion-mnist":  # an object fills its whole image: not cropped and centred as a digit
        return np.asarray(ImageOps.pad(image, (SIZE, SIZE), SCALING))
    digit = image.crop(image.point(lambda level: level >= INK).getbbox())
    digit = digit.resize([max(1, round(DIGIT * side / max(digit.size))) for side in digit.size], SCALING)
    mass = np.asarray(digit, dtype=np.float64)
    centre = [mass.sum(axis) @ (np.arange(side) + 0.5) / mass.sum() for axis, side in enumerate(digit.size)]
    whole = Image.new("L", (SIZE, SIZE))
    whole.paste(digit, (round(CENTRE - centre[0]), round(CENTRE - centre[1])))
    return np.asarray(ImageOps.autocontrast(whole))


def _read(path: Path) -> Image.Image:
    """Return the first frame upright, RGB, on grey where it is transparent. Raises: JobError."""
    try:
        with Image.open(path, formats=FORMATS) as file:
            image = ImageOps.exif_transpose(file).convert("RGBA")
    except UnidentifiedImageError as error:
        raise JobError(f"{path} is not a picture in one of the formats {', '.join(FORMATS)}.") from error
    except Exception as error:  # pillow's decoders raise almost anything on damaged files
        why = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise JobError(f"{path} cannot be read: {why}.") from error
    image.thumbnail((1120, 1120), SCALING)  # a photo has more pixels than a digit needs
    return Image.alpha_composite(Image.new("RGBA", image.size, "grey"), image).convert("RGB")


def predict(run_dir: Path, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float64]:
    """Return each label's probability by the run's weights, on the CPU: (N, classes). Raises: JobError."""
    import torch  # after arguments and pictures: it takes a second or more

    from ddp_mnist.storage.checkpoint import load_saved_run

    network = load_saved_run(run_dir).network
    with torch.no_grad():
        logits = network(torch.from_numpy(np.stack(images)).unsqueeze(1) / 255)
    return logits.double().softmax(1).numpy()


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 0 when every picture is predicted, 1 when one is not."""
    parser = argparse.ArgumentParser(
        prog="python -m ddp_mnist.predict",
        description="Classify pictures with a run's network; print the three most probable classes of each.",
        epilog="A picture must show one upright digit in one colour on an even background, dark or light, with any "
        f"margin. With fashion-mnist, one piece of clothing must fill the picture. Formats: {', '.join(FORMATS)}.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a run with a checkpoint, finished or not")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    parser.add_argument("--json", action="store_true", help="print a list with one object per image")
    options = parser.parse_args(argv)
    show_warnings(main=True)
    dataset = directory.read_settings(options.run_dir).dataset
    images: dict[Path, NDArray[np.uint8]] = {}
    results: dict[Path, dict[str, Any]] = {}
    for path in options.images:
        try:
            images[path] = prepare(path, dataset)
        except JobError as error:
            results[path] = {"error": str(error)}
            report_error(error)
    names = class_names(dataset)
    rows = predict(options.run_dir, list(images.values())) if images else ()
    for path, chances in zip(images, rows, strict=True):
        best = np.argsort(-chances, kind="stable")[:3].tolist()
        top = [{"label": label, "name": names[label], "probability": float(chances[label])} for label in best]
        results[path] = {**top[0], "top": top}
        if not options.json:
            print(f"{path}: " + ", ".join(f"{each['name']} {each['probability']:.1%}" for each in top))
    if options.json:
        print(json.dumps([{"image": str(path), **results[path]} for path in options.images], indent=2))
    return int(len(images) < len(results))


if __name__ == "__main__":
    sys.exit(main())
