"""Pictures → images of MNIST → labels. What is drawn here is drawn by pillow, not by the package."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import zlib
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
from ddp_mnist.predict import PictureError, main, prepare

RunAt = Callable[[int], Path]
Command = Callable[..., jobs.Ended]


def stroke(digit: int, *, size: int = 200, margin: float = 0.3) -> Image.Image:
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


def palette(ink: Image.Image) -> Image.Image:
    """Mode P, black; colour 0 of the palette is transparent."""
    image = ink.point(lambda level: level > 127).convert("P")
    image.putpalette([255, 255, 255, 0, 0, 0])
    image.info["transparency"] = 0
    return image


INKS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "L dark on light": lambda ink: coloured(ink, 255, 0, "L"),
    "L light on dark": lambda ink: ink,
    "L grey on grey": lambda ink: coloured(ink, 150, 110, "L"),
    "1": lambda ink: coloured(ink, 255, 0, "L").convert("1", dither=Image.Dither.NONE),
    "RGB": lambda ink: coloured(ink, "khaki", "darkred"),
    "RGB of one brightness": lambda ink: coloured(ink, (200, 20, 20), (20, 200, 20)),
    "LA black": lambda ink: transparent(ink, "black").convert("LA"),
    "RGBA black": lambda ink: transparent(ink, "black"),
    "RGBA white": lambda ink: transparent(ink, "white"),
    "P": palette,
    "P without transparency": lambda ink: coloured(ink, "white", "black").convert("P"),
    "I;16": lambda ink: Image.fromarray(np.asarray(ink, dtype=np.uint16) * 257),
}
FILES = {"CMYK": ("jpg", "CMYK"), "JPEG": ("jpg", "RGB"), "BMP": ("bmp", "RGB"), "GIF": ("gif", "P")}


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def to(image: Image.Image, name: str = "picture.png", **options: Any) -> Path:
        image.save(tmp_path / name, **options)
        return tmp_path / name

    return to


def assert_laid_out(image: np.ndarray) -> None:
    """MNIST's own layout: 20 pixels on the longer side, mass in the middle, black around."""
    assert (image.shape, image.dtype, image.max()) == ((28, 28), np.uint8, 255)
    rows, columns = np.flatnonzero((image > 50).any(1)), np.flatnonzero((image > 50).any(0))
    assert 19 <= max(np.ptp(rows), np.ptp(columns)) + 1 <= 20
    mass = image.astype(float)
    for axis in (0, 1):
        assert 13.4 <= (mass.sum(1 - axis) * np.arange(28)).sum() / mass.sum() <= 14.6
    assert np.median(image) == 0


def unlike(image: np.ndarray, expected: np.ndarray) -> float:
    """Mean difference over all pixels, of 255, where they fit best: the centre is rounded to whole pixels."""
    shifts = [(down, across) for down in (-1, 0, 1) for across in (-1, 0, 1)]
    shifted = [np.roll(image, shift, (0, 1)).astype(float) for shift in shifts]
    return float(min(np.abs(one - expected).mean() for one in shifted))


def assert_alike(image: np.ndarray, expected: np.ndarray, *, limit: float = 4.0) -> None:
    """Two different digits differ by 10 and more."""
    assert unlike(image, expected) < limit


# --- What a picture is made into


@pytest.mark.parametrize("kind", INKS)
@pytest.mark.parametrize("digit", [1, 5])
def test_mode_colour_and_polarity_make_no_difference(save: Callable[..., Path], digit: int, kind: str) -> None:
    ink = stroke(digit)
    image = prepare(save(INKS[kind](ink)), "mnist")
    assert_laid_out(image)
    assert_alike(image, prepare(save(ink), "mnist"))


@pytest.mark.parametrize("kind", FILES)
def test_the_file_format_makes_no_difference(save: Callable[..., Path], kind: str) -> None:
    suffix, mode = FILES[kind]
    ink = stroke(4)
    image = prepare(save(coloured(ink, "white", "black").convert(mode), f"picture.{suffix}"), "mnist")
    assert_laid_out(image)
    assert_alike(image, prepare(save(ink), "mnist"))


@pytest.mark.parametrize("light", [False, True])
@pytest.mark.parametrize("margin", [0.05, 1.0])
@pytest.mark.parametrize("size", [24, 60, 300, 1500])
def test_the_margin_makes_no_difference(save: Callable[..., Path], size: int, margin: float, light: bool) -> None:
    for digit in (0, 1, 4, 8):
        ink = stroke(digit, size=size, margin=margin)
        image = prepare(save(ink if light else coloured(ink, 255, 0, "L")), "mnist")
        assert_laid_out(image)
        assert_alike(image, prepare(save(stroke(digit, size=size)), "mnist"))


def test_the_margins_need_not_be_equal(save: Callable[..., Path]) -> None:
    ink = stroke(3, margin=0)
    sheet = Image.new("L", (900, 500))
    sheet.paste(ink, (700, 20))
    assert_alike(prepare(save(sheet), "mnist"), prepare(save(ink), "mnist"))


def test_a_photo_is_turned_as_its_camera_says(save: Callable[..., Path]) -> None:
    upright = coloured(stroke(7), "white", "black")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    photo = save(upright.transpose(Image.Transpose.ROTATE_90), "photo.jpg", exif=exif, quality=95)
    assert_alike(prepare(photo, "mnist"), prepare(save(upright), "mnist"))


def test_of_several_frames_the_first_counts(save: Callable[..., Path]) -> None:
    frames = [stroke(3), stroke(3).transpose(Image.Transpose.ROTATE_180)]
    film = save(frames[0], "film.gif", save_all=True, append_images=frames[1:])
    assert_alike(prepare(film, "mnist"), prepare(save(frames[0]), "mnist"))


def test_clothing_is_neither_cropped_nor_moved(save: Callable[..., Path]) -> None:
    shoe = np.zeros((28, 28), dtype=np.uint8)
    shoe[12:20] = np.random.default_rng(0).integers(1, 256, (8, 28))
    shoe[12, 0] = 255
    for image in (shoe, 255 - shoe):
        picture = save(Image.fromarray(image.repeat(5, 0).repeat(5, 1)))
        assert (prepare(picture, "fashion-mnist") == shoe).all()
    wide = save(Image.fromarray(shoe[10:22].repeat(5, 0).repeat(5, 1)))
    found = prepare(wide, "fashion-mnist")
    assert (found[8:20] == shoe[10:22]).all() and not found[:8].any() and not found[20:].any()


# --- What cannot be used


def text_file(path: Path) -> None:
    path.write_text("a seven\n")


def empty_file(path: Path) -> None:
    path.touch()


def truncated_png(path: Path) -> None:
    stroke(7).save(path, "png")
    path.write_bytes(path.read_bytes()[:-200])


def directory(path: Path) -> None:
    path.mkdir()


def missing(path: Path) -> None:
    pass


def bomb(path: Path) -> None:
    """A few kB that would be 50 GB; nothing but a header is read."""
    stroke(7).save(path, "png")
    content = bytearray(path.read_bytes())
    content[16:24] = (120_000).to_bytes(4) * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4)
    path.write_bytes(content)


def one_colour(path: Path) -> None:
    Image.new("RGB", (60, 60), "teal").save(path, "png")


def all_transparent(path: Path) -> None:
    transparent(Image.new("L", (60, 60)), "red").save(path, "png")


BAD: dict[Callable[[Path], None], str] = {
    text_file: "is not a picture in one of the formats PNG, JPEG, BMP",
    empty_file: "is not a picture",
    truncated_png: "cannot be read",
    directory: "cannot be read: Is a directory",
    missing: "cannot be read: No such file or directory",
    bomb: "pixels, the limit",
    one_colour: "is of one colour",
    all_transparent: "is of one colour",
}


@pytest.mark.parametrize("make", BAD, ids=lambda make: make.__name__)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "bad.png")
    with pytest.raises(PictureError, match=r"bad\.png") as caught:
        prepare(tmp_path / "bad.png", "mnist")
    assert BAD[make] in str(caught.value) and "\n" not in str(caught.value)


def test_whatever_a_damaged_file_holds_is_told_or_prepared(tmp_path: Path) -> None:
    generator = random.Random(0)
    path = tmp_path / "damaged"
    for kind in ("png", "jpeg", "bmp", "gif", "tiff"):
        coloured(stroke(7, size=30), "white", "black").save(path, kind)
        whole = path.read_bytes()
        for attempt in range(40):
            content = bytearray(whole)
            if attempt % 2:
                del content[generator.randrange(len(content)) :]
            for place in generator.choices(range(len(content)), k=3) if content else ():
                content[place] = generator.randrange(256)
            path.write_bytes(content)
            try:
                assert prepare(path, "mnist").shape == (28, 28)
            except PictureError as error:
                assert str(path) in str(error)


# --- python -m ddp_mnist.predict RUN_DIR IMAGE...


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: Any) -> jobs.Ended:
        capfd.readouterr()
        return jobs.Ended(main([*map(str, arguments)]), *capfd.readouterr())

    return run


@pytest.fixture
def digits_run(run_at: RunAt, tmp_path: Path) -> Path:
    """The tiny run, whose images are digits, under their right name."""
    path = Path(shutil.copytree(run_at(1), tmp_path / "run"))
    config = jobs.read_json(path / "config.json")
    config["settings"]["dataset"] = "synthetic"
    (path / "config.json").write_text(json.dumps(config))
    return path


def probabilities(weights: Path, image: np.ndarray) -> list[float]:
    """By the tutorial's network."""
    net = TutorialCNN()
    net.load_state_dict(load_file(weights))
    with torch.no_grad():
        return F.softmax(net(torch.from_numpy(image)[None, None].float() / 255), 1)[0].tolist()


def test_each_picture_gets_its_three_best_labels(command: Command, digits_run: Path, save: Callable[..., Path]) -> None:
    pictures = [save(stroke(digit), f"{digit}.png") for digit in (0, 7)]
    ended = command(digits_run, *pictures, "--json")
    assert (ended.code, ended.err) == (0, "")
    for found, picture in zip(json.loads(ended.out), pictures, strict=True):
        expected = probabilities(digits_run / "model.safetensors", prepare(picture, "synthetic"))
        best = sorted(range(10), key=lambda label: -expected[label])[:3]
        assert found["image"] == str(picture)
        assert [top["label"] for top in found["top"]] == best
        assert [top["probability"] for top in found["top"]] == pytest.approx([expected[label] for label in best])
        assert {name: found[name] for name in ("label", "probability")} == found["top"][0]
        assert "name" not in found
    lines = command(digits_run, *pictures).out.splitlines()
    for line, found in zip(lines, json.loads(ended.out), strict=True):
        shown = ", ".join(f"{top['label']} {100 * top['probability']:.1f}%" for top in found["top"])
        assert line == f"{found['image']}: {shown}"


def test_clothing_is_called_by_its_name(command: Command, run_at: RunAt, save: Callable[..., Path]) -> None:
    picture = save(stroke(1))
    ended = command(run_at(1), picture, "--json")
    (found,) = json.loads(ended.out)
    assert found["name"] == class_names("fashion-mnist")[found["label"]]
    assert class_names("fashion-mnist")[7] == "Sneaker"
    assert f": {found['name']} " in command(run_at(1), picture).out


def test_a_run_that_goes_on_predicts_by_its_newest_checkpoint(
    command: Command, digits_run: Path, save: Callable[..., Path]
) -> None:
    picture = save(stroke(3))
    expected = command(digits_run, picture).out
    for name in ("summary.json", "model.safetensors"):
        (digits_run / name).unlink()
    ended = command(digits_run, picture)
    assert (ended.code, ended.out) == (0, expected)


def test_bad_pictures_do_not_keep_the_good_ones_from_being_predicted(
    command: Command, digits_run: Path, save: Callable[..., Path], tmp_path: Path
) -> None:
    good = save(stroke(3))
    bad = [tmp_path / make.__name__ for make in BAD]
    for make, path in zip(BAD, bad, strict=True):
        make(path)
    ended = command(digits_run, *bad[:2], good, *bad[2:])
    assert ended.code == 1
    assert len(ended.out.splitlines()) == 1 and ended.out.startswith(f"{good}: ")
    for line, path, what in zip(ended.err.splitlines(), bad, BAD.values(), strict=True):
        assert line.startswith(f"error: {path} ") and what in line
    listed = command(digits_run, *bad[:2], good, *bad[2:], "--json")
    found = json.loads(listed.out)
    assert (listed.code, [item["image"] for item in found]) == (1, [str(path) for path in [*bad[:2], good, *bad[2:]]])
    assert [item.keys() == {"image", "error"} for item in found] == [True] * 2 + [False] + [True] * (len(bad) - 2)
    assert found[0]["error"] == ended.err.splitlines()[0].removeprefix("error: ")


def test_a_bad_run_directory_is_told_in_one_message(
    command: Command, digits_run: Path, save: Callable[..., Path], tmp_path: Path
) -> None:
    picture = save(stroke(3))
    message = jobs.the_message([command(tmp_path / "nothing", picture)], 1)
    assert f"{tmp_path / 'nothing'} does not exist; expected a run directory" in message
    (digits_run / "model.safetensors").write_bytes(b"short")
    message = jobs.the_message([command(digits_run, picture)], 1)
    assert "model.safetensors is not a whole safetensors file" in message


def test_mistakes_are_told_before_torch_is_imported(run_at: RunAt, tmp_path: Path) -> None:
    code = f"""
import sys
from ddp_mnist.predict import main
assert main([{str(run_at(1))!r}, {str(tmp_path / "missing.png")!r}]) == 1
assert not {{"torch", "accelerate", "wandb"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], env=jobs.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"error: {tmp_path / 'missing.png'} cannot be read: No such file or directory.\n"


# --- On the real MNIST


@pytest.fixture(scope="module")
def mnist_run(mnist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("mnist-run")
    arguments = ["--recipe", "fast", "--epochs", "1", "--dataset", "mnist", "--data-dir", str(mnist)]
    arguments += ["--wandb", "disabled", "--threads", "1", "--output-dir", str(run_dir)]
    jobs.succeeded(jobs.run_ranks(1, *arguments))
    return run_dir


@pytest.mark.mnist
@pytest.mark.parametrize("resample", [Image.Resampling.NEAREST, Image.Resampling.BICUBIC])
def test_test_images_resized_inverted_and_padded_keep_their_label(
    command: Command, mnist_run: Path, mnist: Path, save: Callable[..., Path], resample: Image.Resampling
) -> None:
    images, _ = read_raw(mnist / "MNIST" / "raw", "t10k")
    net = TutorialCNN()
    net.load_state_dict(load_file(mnist_run / "model.safetensors"))
    with torch.no_grad():
        expected = net(images[:100]).argmax(1).tolist()
    generator = random.Random(0)
    pictures = []
    for row, image in enumerate(images[:100, 0].mul(255).to(torch.uint8).numpy()):
        ground, size = 255 * (row % 2), generator.randint(28, 280)
        sheet = Image.new("L", (size + generator.randint(0, size), size + generator.randint(0, size)), ground)
        digit = Image.fromarray(255 - image if row % 2 else image).resize((size, size), resample)
        sheet.paste(digit, (generator.randint(0, sheet.width - size), generator.randint(0, sheet.height - size)))
        pictures.append(save(sheet, f"{row}.png"))
    ended = command(mnist_run, *pictures, "--json")
    assert ended.code == 0
    found = [item["label"] for item in json.loads(ended.out)]
    assert sum(a == b for a, b in zip(found, expected, strict=True)) >= 97


def test_help_says_what_is_assumed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "one digit, upright" in text and "For a run on fashion" in text
