"""Pictures → images of MNIST → labels. The pictures are drawn by pillow, not by the package."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jobs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file
from tutorial import TutorialCNN, read_raw

from ddp_mnist.data.mnist import class_names
from ddp_mnist.predict import main, prepare

RunAt = Callable[[int], Path]
Command = Callable[..., jobs.Ended]


def draw(digit: int, *, size: int = 200, margin: float = 0.3) -> Image.Image:
    """Mode L: the digit's ink, 255 on 0, in pillow's own font; `margin` is a part of `size` (pixels)."""
    font = ImageFont.load_default(size=size)
    left, top, right, bottom = font.getbbox(str(digit))
    edge = round(margin * size)
    image = Image.new("L", (int(right - left) + 2 * edge, int(bottom - top) + 2 * edge))
    ImageDraw.Draw(image).text((edge - left, edge - top), str(digit), fill=255, font=font)
    return image


def coloured(ink: Image.Image, on: Any, of: Any, mode: str = "RGB") -> Image.Image:
    """Ink of one colour on another."""
    return Image.composite(Image.new(mode, ink.size, of), Image.new(mode, ink.size, on), ink)


def transparent(ink: Image.Image, of: str) -> Image.Image:
    image = Image.new("RGBA", ink.size, of)
    image.putalpha(ink)
    return image


PICTURES: dict[str, tuple[str, Callable[[Image.Image], Image.Image]]] = {
    "dark on light": ("png", lambda ink: coloured(ink, 255, 0, "L")),
    "grey on grey": ("png", lambda ink: coloured(ink, 150, 110, "L")),
    "one bit": ("png", lambda ink: coloured(ink, 255, 0, "L").convert("1", dither=Image.Dither.NONE)),
    "colours of one brightness": ("png", lambda ink: coloured(ink, (200, 20, 20), (20, 112, 20))),
    "black on transparent": ("png", lambda ink: transparent(ink, "black")),
    "white on transparent": ("webp", lambda ink: transparent(ink, "white")),
    "palette": ("gif", lambda ink: coloured(ink, "white", "black").convert("P")),
    "CMYK": ("jpg", lambda ink: coloured(ink, "white", "black").convert("CMYK")),
}


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def to(image: Image.Image, name: str = "picture.png", **options: Any) -> Path:
        image.save(tmp_path / name, **options)
        return tmp_path / name

    return to


def assert_same_digit(image: np.ndarray, expected: np.ndarray) -> None:
    """It is laid out as in MNIST, and at most a pixel away from the expected one. Two digits differ by 10 and more."""
    assert (image.shape, image.dtype, image.max(), np.median(image)) == ((28, 28), np.uint8, 255, 0)
    rows, columns = np.flatnonzero((image > 50).any(1)), np.flatnonzero((image > 50).any(0))
    assert 19 <= max(np.ptp(rows), np.ptp(columns)) + 1 <= 20
    mass = image.astype(float)
    for axis in (0, 1):
        assert 13.4 <= (mass.sum(1 - axis) * np.arange(28)).sum() / mass.sum() <= 14.6
    shifts = [(down, across) for down in (-1, 0, 1) for across in (-1, 0, 1)]
    assert min(np.abs(np.roll(mass, shift, (0, 1)) - expected).mean() for shift in shifts) < 4.0


@pytest.mark.parametrize("kind", PICTURES)
def test_colours_and_file_format_make_no_difference(save: Callable[..., Path], kind: str) -> None:
    suffix, convert = PICTURES[kind]
    for digit in (1, 5):
        image = prepare(save(convert(draw(digit)), f"picture.{suffix}"), "mnist")
        assert_same_digit(image, prepare(save(draw(digit)), "mnist"))


@pytest.mark.parametrize(("size", "margin"), [(24, 1.0), (60, 0.05), (300, 0.5), (800, 0.05)])
def test_size_margin_and_place_make_no_difference(save: Callable[..., Path], size: int, margin: float) -> None:
    for digit in (1, 8):
        ink = draw(digit, size=size, margin=margin)
        sheet = Image.new("L", (ink.width + size, ink.height + size // 3))
        sheet.paste(ink, (size, 0))
        picture = save(sheet if digit == 8 else coloured(sheet, 255, 0, "L"), "picture.bmp")
        assert_same_digit(prepare(picture, "mnist"), prepare(save(draw(digit, size=size)), "mnist"))


def test_a_photo_is_turned_as_its_camera_says(save: Callable[..., Path]) -> None:
    upright = coloured(draw(7), "white", "black")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    photo = save(upright.transpose(Image.Transpose.ROTATE_90), "photo.jpg", exif=exif, quality=95)
    assert_same_digit(prepare(photo, "mnist"), prepare(save(upright), "mnist"))


def test_a_hairline_is_a_digit(save: Callable[..., Path]) -> None:
    hairline = save(Image.new("L", (1, 400), 255).crop((-200, -50, 200, 450)))
    assert prepare(hairline, "mnist").any(axis=1).sum() == 20


def test_clothing_is_neither_cropped_nor_moved(save: Callable[..., Path]) -> None:
    shoe = np.zeros((28, 28), dtype=np.uint8)
    shoe[12:20] = np.random.default_rng(0).integers(1, 256, (8, 28))
    shoe[12, 0] = 255
    for image in (shoe, 255 - shoe):
        picture = save(Image.fromarray(image.repeat(5, 0).repeat(5, 1)))
        assert (prepare(picture, "fashion-mnist") == shoe).all()


# --- python -m ddp_mnist.predict RUN_DIR IMAGE...


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: Any) -> jobs.Ended:
        capfd.readouterr()
        return jobs.Ended(main([*map(str, arguments)]), *capfd.readouterr())

    return run


def test_each_picture_gets_its_three_best_labels(command: Command, run_at: RunAt, save: Callable[..., Path]) -> None:
    pictures = [save(draw(digit), f"{digit}.png") for digit in (0, 7)]
    ended = command(run_at(1), *pictures, "--json")
    assert (ended.code, ended.err) == (0, "")
    lines = command(run_at(1), *pictures).out.splitlines()
    network = TutorialCNN()
    network.load_state_dict(load_file(run_at(1) / "model.safetensors"))
    for found, picture, line in zip(json.loads(ended.out), pictures, lines, strict=True):
        image = torch.from_numpy(prepare(picture, "fashion-mnist").copy())[None, None] / 255
        expected = F.softmax(network(image), 1)[0].tolist()
        best = sorted(range(10), key=lambda label: -expected[label])[:3]
        assert [top["label"] for top in found["top"]] == best
        assert [top["name"] for top in found["top"]] == [class_names("fashion-mnist")[label] for label in best]
        assert [top["probability"] for top in found["top"]] == pytest.approx([expected[label] for label in best])
        assert found == {"image": str(picture), **found["top"][0], "top": found["top"]}
        shown = ", ".join(f"{top['name']} {100 * top['probability']:.1f}%" for top in found["top"])
        assert line == f"{picture}: {shown}"


def test_pictures_that_cannot_be_used_do_not_keep_the_others_from_being_predicted(
    command: Command, run_at: RunAt, save: Callable[..., Path], tmp_path: Path
) -> None:
    text, cut, empty = tmp_path / "text.png", save(draw(7), "cut.png"), save(Image.new("RGBA", (60, 60)), "empty.png")
    text.write_text("a seven\n")
    cut.write_bytes(cut.read_bytes()[:-200])
    whats = {
        text: "is not a picture in one of the formats PNG, JPEG, BMP",
        cut: "cannot be read: ",
        tmp_path: "cannot be read: Is a directory",
        tmp_path / "nothing": "cannot be read: No such file or directory",
        empty: "is of one colour",
        save(Image.new("RGB", (60, 60), "teal"), "teal.png"): "is of one colour",
    }
    good = save(draw(3), "good.png")
    pictures = [*list(whats)[:2], good, *list(whats)[2:]]
    ended = command(run_at(1), *pictures)
    assert ended.code == 1
    assert len(ended.out.splitlines()) == 1 and ended.out.startswith(f"{good}: ")
    for line, (path, what) in zip(ended.err.splitlines(), whats.items(), strict=True):
        assert line.startswith(f"error: {path} ") and what in line
    listed = command(run_at(1), *pictures, "--json")
    found = json.loads(listed.out)
    assert (listed.code, [item["image"] for item in found]) == (1, [str(path) for path in pictures])
    assert ["label" in item for item in found] == [path == good for path in pictures]
    assert found[0]["error"] == ended.err.splitlines()[0].removeprefix("error: ")


def test_mistakes_are_reported_in_one_message_before_torch_is_imported(run_at: RunAt, tmp_path: Path) -> None:
    code = f"""
import sys
from ddp_mnist.predict import main
assert main([{str(tmp_path / "none")!r}, "x.png"]) == main([{str(run_at(1))!r}, "missing.png"]) == 1
assert not {{"torch", "accelerate", "wandb"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], env=jobs.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    foreign, missing = done.stderr.splitlines()
    assert foreign.startswith(f"error: {tmp_path / 'none'} is not a run directory of ddp_mnist")
    assert missing == "error: missing.png cannot be read: No such file or directory."


def test_test_images_resized_inverted_and_padded_keep_their_label(
    command: Command, mnist: Path, save: Callable[..., Path], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    arguments = ["--recipe", "fast", "--epochs", "1", "--dataset", "mnist", "--data-dir", str(mnist), "--no-pictures"]
    jobs.succeeded(jobs.run_ranks(1, *arguments, "--wandb", "disabled", "--threads", "1", "--output-dir", str(run_dir)))
    images, _ = read_raw(mnist / "MNIST" / "raw", "t10k")
    network = TutorialCNN()
    network.load_state_dict(load_file(run_dir / "model.safetensors"))
    expected = network(images[:100]).argmax(1).tolist()
    generator = random.Random(0)
    pictures = []
    for row, image in enumerate(images[:100, 0].mul(255).to(torch.uint8).numpy()):
        ground, size = 255 * (row % 2), generator.randint(28, 280)
        resample = (Image.Resampling.NEAREST, Image.Resampling.BICUBIC)[row // 2 % 2]
        sheet = Image.new("L", (size + generator.randint(0, size), size + generator.randint(0, size)), ground)
        digit = Image.fromarray(255 - image if row % 2 else image).resize((size, size), resample)
        sheet.paste(digit, (generator.randint(0, sheet.width - size), generator.randint(0, sheet.height - size)))
        pictures.append(save(sheet, f"{row}.png"))
    ended = command(run_dir, *pictures, "--json")
    assert ended.code == 0
    found = json.loads(ended.out)
    assert sum(item["label"] == label for item, label in zip(found, expected, strict=True)) >= 97
