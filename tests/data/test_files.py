"""The data files against all that a shared folder and a network do to them; loopback only, small files."""

from __future__ import annotations

import ctypes
import fcntl
import gzip
import hashlib
import json
import os
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from ddp_mnist.data import mnist as files
from ddp_mnist.data import synthetic

NAMES = [name for names in files.NAMES.values() for name in names]
IMAGES, LABELS = files.NAMES["train"]
COUNTS = {"train": 300, "t10k": 70}

DRIVER = """
import hashlib, json, logging, os, sys, time
from pathlib import Path
from ddp_mnist.data import mnist as files
config = json.loads(sys.argv[1])
logging.basicConfig(level=logging.INFO)
files.RAW_MD5["mnist"] = config["md5"]
if config.get("hang"):
    os.fsync = lambda descriptor: time.sleep(600)
if config.get("ready"):
    Path(config["ready"], str(os.getpid())).touch()
    while not Path(config["ready"], "go").exists():
        time.sleep(0.005)
try:
    Path(config["root"], "MNIST", "raw", "probe").write_bytes(bytes(1000))
    wrote = True
except OSError:
    wrote = False
Path(config["root"], "MNIST", "raw", "probe").unlink(missing_ok=True) if wrote else None
try:
    images, labels = files.read_split("mnist", config["root"], "train", fetch=bool(config["mirrors"]))
    answer = hashlib.md5(images.tobytes() + labels.tobytes()).hexdigest()
except files.DataError as error:
    answer = str(error)
torch = sorted({"torch", "torchvision"} & set(sys.modules))
print(json.dumps({"answer": answer, "wrote": wrote, "torch": torch}))
"""


def idx(array: np.ndarray) -> bytes:
    """An IDX file, written independently of the package."""
    header = b"\0\0\x08" + bytes([array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.tobytes()


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def make_raw(seed: int) -> dict[str, bytes]:
    rng = np.random.default_rng(seed)
    raw = {}
    for prefix, count in COUNTS.items():
        raw[f"{prefix}-images-idx3-ubyte"] = idx(rng.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        raw[f"{prefix}-labels-idx1-ubyte"] = idx(rng.integers(0, 10, count, dtype=np.uint8))
    return raw


RAW = make_raw(0)
PACKED = {name: gzip.compress(data, mtime=0) for name, data in RAW.items()}
MD5 = {name: md5(data) for name, data in RAW.items()}
PACKED_MD5 = {name: md5(data) for name, data in PACKED.items()}
TRAIN = md5(RAW[IMAGES][16:] + RAW[LABELS][8:])
GONE = "http://127.0.0.1:9/"  # discard: nobody listens there


class Handler(BaseHTTPRequestHandler):
    """`/<behaviour>/<name>.gz`; downloads are counted."""

    server: Mirrors

    def do_GET(self) -> None:
        _, behaviour, filename = self.path.split("/")
        body = PACKED[filename.removesuffix(".gz")]
        self.server.downloads[self.path] += 1
        if behaviour == "silent":
            self.server.closing.wait()
            return
        if behaviour == "busy":
            self.send_error(503)
            return
        if behaviour == "wrong":
            body = body[:-1] + bytes([body[-1] ^ 1])
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        half = len(body) // 2
        if behaviour in ("good", "wrong"):
            self.wfile.write(body)
            return
        self.wfile.write(body[:half])
        self.wfile.flush()
        if behaviour == "stall":
            self.server.closing.wait()
        elif behaviour == "trickle":
            while not self.server.closing.wait(0.05):
                self.wfile.write(b"x")
        elif behaviour == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # "cut": the connection just ends

    def handle(self) -> None:
        with suppress(OSError):  # clients hang up, and are killed
            super().handle()

    def finish(self) -> None:
        with suppress(OSError):
            super().finish()

    def log_message(self, format: str, *args: object) -> None:
        pass


class Mirrors(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.downloads: Counter[str] = Counter()
        self.closing = threading.Event()

    def url(self, behaviour: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{behaviour}/"


@pytest.fixture
def server() -> Iterator[Mirrors]:
    with Mirrors() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()


def fake_torchvision(folder: Path, *urls: str) -> Path:
    """A torchvision that knows the small files and these mirrors, and is imported at once."""
    (folder / "torchvision").mkdir(parents=True)
    resources = [(f"{name}.gz", PACKED_MD5[name]) for name in NAMES]
    code = f"class MNIST:\n    mirrors = {list(urls)}\n    resources = {resources}\nFashionMNIST = MNIST\n"
    (folder / "torchvision" / "__init__.py").touch()
    (folder / "torchvision" / "datasets.py").write_text(code)
    return folder


@pytest.fixture
def mirrors(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """Set the mirrors torchvision knows, in this process; small files pass for MNIST and Fashion-MNIST."""
    monkeypatch.setitem(files.RAW_MD5, "mnist", MD5)

    def use(*urls: str) -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.syspath_prepend(fake_torchvision(tmp_path_factory.mktemp("site"), *urls))

    return use


@pytest.fixture
def small(mirrors: Callable[..., None]) -> None:
    mirrors(GONE)


def fill(root: Path, *, raw: bool = False, packed: bool = False, folder: str = "MNIST") -> Path:
    """Make the raw folder, with all raw files and/or all .gz in it."""
    path = root / folder / "raw"
    path.mkdir(parents=True)
    for name in NAMES:
        if raw:
            (path / name).write_bytes(RAW[name])
        if packed:
            (path / f"{name}.gz").write_bytes(PACKED[name])
    return path


def content(arrays: tuple[np.ndarray, np.ndarray]) -> str:
    return md5(arrays[0].tobytes() + arrays[1].tobytes())


def strays(folder: Path) -> list[str]:
    """What lies in the folder and should not."""
    known = {*NAMES, *(f"{name}.gz" for name in NAMES), files.LOCK}
    return sorted(path.name for path in folder.iterdir() if path.name not in known)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def start(root: Path, *urls: str, preexec: Callable[[], None] | None = None, **extra: object) -> subprocess.Popen[str]:
    config = {"root": str(root), "mirrors": urls, "md5": MD5, **extra}
    site = fake_torchvision(Path(tempfile.mkdtemp(dir=root.parent)), *urls)
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, json.dumps(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=preexec,
        cwd=Path(files.__file__).parents[2],
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(site)},
    )


def result(process: subprocess.Popen[str]) -> dict:
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    return json.loads(out) | {"log": err}


def wait_for(condition: Callable[[], object], what: str, limit: float = 120) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {limit} s"
        time.sleep(0.01)


# Constants and good files


@pytest.mark.parametrize("dataset", ["mnist", "fashion-mnist"])
def test_torchvision_knows_mirrors_and_a_hash_of_each_file(dataset: str) -> None:
    mirrors, md5 = files.published(dataset)
    assert mirrors and set(md5) == {f"{name}.gz" for name in NAMES}


def test_good_files_are_read_without_torch_lock_or_write(tmp_path: Path) -> None:
    folder = fill(tmp_path, raw=True)
    answer = result(start(tmp_path, GONE))
    assert (answer["answer"], answer["torch"]) == (TRAIN, [])
    assert sorted(path.name for path in folder.iterdir()) == sorted(NAMES)


def test_arrays_have_the_promised_form(tmp_path: Path, small: None) -> None:
    fill(tmp_path, raw=True)
    images, labels = files.read_split("mnist", tmp_path, "test", fetch=False)
    assert (images.dtype, images.shape, images.flags.writeable) == (np.uint8, (70, 28, 28), True)
    assert (labels.dtype, labels.shape, labels.flags.writeable) == (np.uint8, (70,), True)
    assert idx(images) == RAW["t10k-images-idx3-ubyte"] and idx(labels) == RAW["t10k-labels-idx1-ubyte"]


# Damage


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "missing"),
    "short": (shorten, "235211 bytes, expected 235216"),
    "empty": (lambda path: path.write_bytes(b""), "magic number 0"),
    "long": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "235217 bytes, expected 235216"),
    "magic": (lambda path: flip(path, 3), "magic number 2050, expected 2051"),
    "size": (lambda path: flip(path, 11), "images of [29, 28]"),
    "byte": (lambda path: flip(path, 5000), "expected " + MD5[IMAGES]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_repaired_from_gz(tmp_path: Path, small: None, damage: str) -> None:
    folder = fill(tmp_path, raw=True, packed=True)
    DAMAGE[damage][0](folder / IMAGES)
    assert content(files.read_split("mnist", tmp_path, "train", fetch=False)) == TRAIN
    assert (folder / IMAGES).read_bytes() == RAW[IMAGES]
    assert strays(folder) == []


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_without_gz_is_one_clear_error(tmp_path: Path, small: None, damage: str) -> None:
    folder = fill(tmp_path, raw=True)
    DAMAGE[damage][0](folder / IMAGES)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(files.DataError) as caught:
        files.read_split("mnist", tmp_path, "train", fetch=False)
    for part in (
        str(folder / IMAGES),
        DAMAGE[damage][1],
        f"fetch --dataset mnist --data-dir {tmp_path}",
        "synthetic",
    ):
        assert part in str(caught.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != files.LOCK} == before


def test_labels_that_do_not_fit_the_images(tmp_path: Path, small: None) -> None:
    folder = fill(tmp_path, raw=True, folder="FashionMNIST")  # no hash is known: the structure must do
    (folder / LABELS).write_bytes(idx(np.zeros(299, np.uint8)))
    with pytest.raises(files.DataError, match=rf"{IMAGES}: 300 images but 299 labels\. To mend it, run"):
        files.read_split("fashion-mnist", tmp_path, "train", fetch=False)
    (folder / f"{LABELS}.gz").write_bytes(PACKED[LABELS])
    assert content(files.read_split("fashion-mnist", tmp_path, "train", fetch=False)) == TRAIN


def test_flipped_byte_is_caught_in_fashion_mnist(tmp_path: Path, small: None) -> None:
    folder = fill(tmp_path, packed=True, folder="FashionMNIST")
    files.fetch("fashion-mnist", tmp_path)
    flip(folder / IMAGES, 5000)
    assert "expected" in files.verify("fashion-mnist", tmp_path)[folder / IMAGES]
    assert content(files.read_split("fashion-mnist", tmp_path, "train", fetch=False)) == TRAIN
    assert (folder / IMAGES).read_bytes() == RAW[IMAGES]


def test_damaged_gz_is_not_unpacked(tmp_path: Path, small: None) -> None:
    folder = fill(tmp_path, packed=True)
    flip(folder / f"{IMAGES}.gz", 5000)
    with pytest.raises(files.DataError, match=f"gz: MD5 .*, expected {PACKED_MD5[IMAGES]}"):
        files.read_split("mnist", tmp_path, "train", fetch=False)
    assert not (folder / IMAGES).exists()


def test_verify_finds_and_changes_nothing(tmp_path: Path, small: None) -> None:
    folder = fill(tmp_path, raw=True)
    flip(folder / IMAGES, 5000)
    (folder / "t10k-labels-idx1-ubyte").unlink()
    states = files.verify("mnist", tmp_path)
    assert list(states) == [folder / name for name in NAMES]
    assert states.pop(folder / IMAGES).startswith("damaged (MD5 ")
    assert list(states.values()) == ["ok", "ok", "missing"]
    assert len(list(folder.iterdir())) == 3


def test_a_mistyped_root_does_not_come_into_being(tmp_path: Path, small: None) -> None:
    with pytest.raises(files.DataError, match=r"missing.*not allowed"):
        files.read_split("mnist", tmp_path / "typo", "train", fetch=False)
    assert not (tmp_path / "typo").exists()


# Folders that cannot be written


def without_root_override() -> None:
    """In a child about to start: root, too, is to be held by permission bits (CAP_DAC_OVERRIDE goes)."""
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)


def tiny_disk() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))


@pytest.mark.parametrize("kind", ["read-only", "full"])
@pytest.mark.parametrize("have", ["raw", "gz", "raw, one damaged, and gz", "nothing"])
@pytest.mark.slow
def test_folder_that_cannot_be_written(tmp_path: Path, kind: str, have: str) -> None:
    folder = fill(tmp_path, raw="raw" in have, packed="gz" in have)
    if "damaged" in have:
        flip(folder / LABELS, 100)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    if kind == "read-only":
        folder.chmod(0o555)
    try:
        bound = without_root_override if kind == "read-only" else tiny_disk
        answer = result(start(tmp_path, GONE, preexec=bound))
    finally:
        folder.chmod(0o755)
    if answer["wrote"]:
        pytest.skip("permission bits do not bind this user")
    if have == "nothing":
        obstacle = "cannot write" if kind == "read-only" else "download failed"
        assert f"{folder / IMAGES}: missing" in answer["answer"] and obstacle in answer["answer"]
    else:
        assert answer["answer"] == TRAIN
        assert ("in memory" in answer["log"]) == (have != "raw")
    assert answer["torch"] == [] or have not in ("raw", "nothing") or kind == "full"
    left = {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("probe", files.LOCK)}
    assert {name: data for name, data in left.items() if name in before} == before
    if kind == "read-only":
        assert left == before
    assert strays(folder) in ([], ["probe"])


def test_lock_held_for_too_long(tmp_path: Path, mirrors: Callable[..., None]) -> None:
    folder = fill(tmp_path)
    mirrors(GONE)
    with open(folder / files.LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(files.DataError) as caught:
            files.read_split("mnist", tmp_path, "train", timeout=0.01)
        assert str(folder / files.LOCK) in str(caught.value)
        for name in NAMES:
            (folder / f"{name}.gz").write_bytes(PACKED[name])
        assert content(files.read_split("mnist", tmp_path, "train", timeout=0.01)) == TRAIN
        with pytest.raises(files.DataError, match="no way to write"):
            files.fetch("mnist", tmp_path, timeout=0.01)


# Downloads


@pytest.mark.slow
def test_eight_processes_download_once(tmp_path: Path, server: Mirrors) -> None:
    (ready := tmp_path / "ready").mkdir()
    (root := tmp_path / "data").mkdir()
    (folder := root / "MNIST" / "raw").mkdir(parents=True)
    (folder / f".{IMAGES}.0.tmp").touch()  # a killed process was writing it
    racers = [start(root, server.url("good"), ready=str(ready)) for _ in range(8)]
    wait_for(lambda: len(list(ready.iterdir())) == 8, "eight racers")
    (ready / "go").touch()
    answers = [result(racer) for racer in racers]
    assert [answer["answer"] for answer in answers] == [TRAIN] * 8
    assert server.downloads == {f"/good/{IMAGES}.gz": 1, f"/good/{LABELS}.gz": 1}
    assert sum(bool(answer["torch"]) for answer in answers) == 1
    assert sum(answer["log"].count("made again") for answer in answers) == 2, "the others look again and find them"
    assert strays(folder) == []


def test_fetch_gets_all_four(tmp_path: Path, server: Mirrors, mirrors: Callable[..., None]) -> None:
    mirrors(server.url("good"))
    files.fetch("mnist", tmp_path)
    files.fetch("mnist", tmp_path)
    assert list(files.verify("mnist", tmp_path).values()) == ["ok"] * 4
    assert set(server.downloads.values()) == {1} and len(server.downloads) == 4
    folder = tmp_path / "MNIST" / "raw"
    assert {path.stat().st_mode & 0o444 for path in folder.iterdir()} == {0o444}, "others must be able to read"


@pytest.mark.parametrize("bad", ["silent", "stall", "trickle", "cut", "reset", "busy", "wrong"])
def test_bad_mirrors(
    tmp_path: Path, server: Mirrors, mirrors: Callable[..., None], monkeypatch: pytest.MonkeyPatch, bad: str
) -> None:
    # Either limit alone must do: the socket's time-out, and, for what never runs into it, the patience.
    monkeypatch.setattr(files, "DOWNLOAD_TIMEOUTS", 3 if bad == "trickle" else 1000)
    folder = tmp_path / "MNIST" / "raw"
    mirrors(GONE, server.url(bad))
    with pytest.raises(files.DataError) as caught:
        files.read_split("mnist", tmp_path, "train", timeout=0.3)
    for part in (
        str(folder / IMAGES),
        "missing",
        f"{GONE}{IMAGES}.gz",
        f"{server.url(bad)}{IMAGES}.gz",
        "fetch",
    ):
        assert part in str(caught.value)
    assert sorted(path.name for path in folder.iterdir()) == [files.LOCK]
    mirrors(server.url(bad), server.url("good"))
    assert content(files.read_split("mnist", tmp_path, "train", timeout=0.3)) == TRAIN
    assert server.downloads[f"/good/{IMAGES}.gz"] == 1
    assert strays(folder) == []


def test_a_broken_torchvision_is_one_clear_error(tmp_path: Path, mirrors: Callable[..., None]) -> None:
    mirrors()
    code = "raise RuntimeError('operator torchvision::nms does not exist')"  # built for another torch
    (Path(sys.path[0]) / "torchvision" / "__init__.py").write_text(code)
    with pytest.raises(files.DataError) as caught:
        files.read_split("mnist", tmp_path / "data", "train")
    for part in (IMAGES, "missing", "RuntimeError: operator", "`pip install", "--dataset synthetic"):
        assert part in str(caught.value)
    assert "cannot write" not in str(caught.value)
    assert strays(tmp_path / "data" / "MNIST" / "raw") == []


@pytest.mark.parametrize("moment", ["downloading", "unpacking"])
@pytest.mark.slow
def test_kill_leaves_nothing_bad(tmp_path: Path, server: Mirrors, mirrors: Callable[..., None], moment: str) -> None:
    folder = fill(tmp_path, packed=moment == "unpacking")
    victim = start(tmp_path, server.url("good"), hang=True)
    try:
        wait_for(lambda: list(folder.glob(f".{IMAGES}*.tmp")), "temporary file")
    finally:
        victim.send_signal(signal.SIGKILL)
        victim.communicate()
    assert not (folder / IMAGES).exists() and strays(folder) != []
    mirrors(server.url("good"))
    assert content(files.read_split("mnist", tmp_path, "train")) == TRAIN
    assert strays(folder) == []


# Synthetic digits


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces the generator by a fast one; the list grows by a split's name at every draw."""
    drawn: list[str] = []
    arrays = {"train": (np.ones((50, 28, 28), np.uint8), np.ones(50, np.uint8))}
    arrays["test"] = arrays["train"]

    def make_digits(split: str) -> tuple[np.ndarray, np.ndarray]:
        drawn.append(split)
        return arrays[split]

    monkeypatch.setattr(synthetic, "make_digits", make_digits)
    sums = {
        name: md5(idx(array))
        for split, names in files.NAMES.items()
        for name, array in zip(names, arrays[split], strict=True)
    }
    monkeypatch.setitem(files.RAW_MD5, "synthetic", sums)
    return drawn


def test_digits_are_drawn_once_and_a_damaged_file_again(tmp_path: Path, draws: list[str]) -> None:
    first = files.read_split("synthetic", tmp_path, "train")
    again = files.read_split("synthetic", tmp_path, "train")
    assert draws == ["train"] and content(first) == content(again)
    files.fetch("synthetic", tmp_path)
    assert draws == ["train", "test"]
    folder = tmp_path / f"Synthetic-v{synthetic.VERSION}" / "raw"
    flip(folder / IMAGES, 5000)
    assert content(files.read_split("synthetic", tmp_path, "train")) == content(first)
    assert draws == ["train", "test", "train"]
    assert set(files.verify("synthetic", tmp_path).values()) == {"ok"} and strays(folder) == []


def test_digits_without_a_folder(tmp_path: Path, draws: list[str]) -> None:
    (tmp_path / "file").touch()
    images, labels = files.read_split("synthetic", tmp_path / "file", "test")
    assert (images.shape, labels.shape, draws) == ((50, 28, 28), (50,), ["test"])


# The real thing


@pytest.mark.mnist
def test_real_mnist(mnist: Path, tmp_path: Path) -> None:
    shutil.copytree(mnist / "MNIST" / "raw", tmp_path / "MNIST" / "raw")
    for split, count in (("train", 60_000), ("test", 10_000)):
        images, labels = files.read_split("mnist", tmp_path, split, fetch=False)  # type: ignore[arg-type]
        assert images.shape == (count, 28, 28) and labels.shape == (count,)
        assert np.bincount(labels).min() > 0.08 * count
    assert set(files.verify("mnist", mnist).values()) == {"ok"}
