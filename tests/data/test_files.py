"""The data files against all that a shared folder and a network do to them; loopback only, small files."""

from __future__ import annotations

import ctypes
import gzip
import hashlib
import json
import re
import resource
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jobs
import numpy as np
import pytest

from ddp_mnist.data import mnist as files
from ddp_mnist.data import synthetic
from ddp_mnist.data.__main__ import main

IMAGES, LABELS = files.NAMES["train"]


def idx(array: np.ndarray) -> bytes:
    """An IDX file, written independently of the package."""
    header = b"\0\0\x08" + bytes([array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.tobytes()


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


RNG = np.random.default_rng(0)
RAW = {
    f"{prefix}-{kind}-ubyte": idx(RNG.integers(0, high, (count, *item), dtype=np.uint8))
    for prefix, count in (("train", 300), ("t10k", 70))
    for kind, high, item in (("images-idx3", 256, (28, 28)), ("labels-idx1", 10, ()))
}
PACKED = {f"{name}.gz": gzip.compress(data, mtime=0) for name, data in RAW.items()}
MD5 = {name: md5(data) for name, data in RAW.items()}
PACKED_MD5 = {name: md5(data) for name, data in PACKED.items()}
TRAIN = md5(RAW[IMAGES][16:] + RAW[LABELS][8:])
GONE = "http://127.0.0.1:9/"  # discard: nobody listens there

# Reads the training set of each folder in another process.
DRIVER = """
import hashlib, json, logging, os, sys, time
from ddp_mnist.data import mnist as files
config = json.loads(sys.argv[1])
logging.basicConfig(level=logging.INFO)
files.MNIST_MD5 = config["md5"]
asked = []  # torchvision
files.published = lambda dataset: asked.append(dataset) or (config["mirrors"], config["packed"])
if config["hang"]:
    os.fsync = lambda descriptor: time.sleep(600)
answers = []
for root in config["roots"]:
    try:
        images, labels = files.read_split("mnist", root, "train")
        answers.append(hashlib.md5(images.tobytes() + labels.tobytes()).hexdigest())
    except files.DataError as error:
        answers.append(str(error))
print(json.dumps([answers, len(asked), "torch" in sys.modules]))
"""


def start(*roots: Path, hang: bool = False, preexec: Any = None) -> subprocess.Popen[str]:
    config = {"roots": [*map(str, roots)], "mirrors": [GONE], "md5": MD5, "packed": PACKED_MD5, "hang": hang}
    command = [sys.executable, "-c", DRIVER, json.dumps(config)]
    variables = jobs.environment({"no_proxy": "127.0.0.1"})
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, preexec_fn=preexec, env=variables)


class Handler(BaseHTTPRequestHandler):
    """`/<behaviour>/<name>.gz`; downloads are counted."""

    def do_GET(self) -> None:
        _, behaviour, filename = self.path.split("/")
        body = gzip.compress(idx(np.zeros(300, np.uint8))) if behaviour == "other" else PACKED[filename]
        self.server.downloads[self.path] += 1
        if behaviour == "busy":
            self.send_error(503)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        bodies = {"good": body, "wrong": body[:-1] + bytes([body[-1] ^ 1]), "other": body}
        self.wfile.write(bodies.get(behaviour, body[: len(body) // 2]))  # "cut": and the connection ends
        if behaviour == "stall":
            self.server.closing.wait()


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Torchvision knows a mirror that is gone and those that `use` adds; the small files pass for the real ones."""
    monkeypatch.setattr(files, "MNIST_MD5", MD5)
    monkeypatch.setattr(urllib.request, "_opener", None)  # it keeps the proxies of an earlier test's environment
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.downloads, server.closing = Counter(), threading.Event()
        server.url = f"http://127.0.0.1:{server.server_address[1]}/"

        def use(*behaviours: str) -> None:
            urls = [GONE, *(f"{server.url}{behaviour}/" for behaviour in behaviours)]
            monkeypatch.setattr(files, "published", lambda dataset: (urls, PACKED_MD5))

        server.use = use
        use()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()


def fill(root: Path, content: dict[str, bytes], folder: str = "MNIST") -> Path:
    (path := root / folder / "raw").mkdir(parents=True)
    for name, data in content.items():
        (path / name).write_bytes(data)
    return path


def read(root: Path, dataset: str = "mnist", **options: float) -> str:
    images, labels = files.read_split(dataset, root, "train", **options)  # type: ignore[arg-type]
    return md5(images.tobytes() + labels.tobytes())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_good_files_are_read_as_they_are_without_torch_lock_or_write(tmp_path: Path) -> None:
    folder = fill(tmp_path, RAW)
    out, err = start(tmp_path).communicate()
    assert json.loads(out) == [[TRAIN], 0, False], err
    assert {path.name for path in folder.iterdir()} == set(RAW)
    images, labels = files.read_split("mnist", tmp_path, "test")
    assert (images.dtype, images.shape, images.flags.writeable) == (np.uint8, (70, 28, 28), True)
    assert (labels.dtype, labels.shape, labels.flags.writeable) == (np.uint8, (70,), True)
    with pytest.raises(files.DataError, match=r"missing.*not allowed"):
        read(tmp_path / "typo", fetch=False)
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda data: None, "missing"),
        (lambda data: data[:-5], "235211 bytes that begin with (2051, 300, 28, 28)"),
        (lambda data: b"", "0 bytes"),
        (lambda data: data + b"x", "235217 bytes"),
        (lambda data: data[:3] + b"\2" + data[4:], "begin with (2050, 300, 28, 28)"),
        (lambda data: data[:11] + b"\35" + data[12:], "begin with (2051, 300, 29, 28)"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), f"expected {MD5[IMAGES]}"),
    ],
    ids=["missing", "short", "empty", "long", "magic", "size", "byte"],
)
def test_damage_is_one_clear_error_and_repaired_once_there_is_a_good_gz(
    tmp_path: Path, change: Callable[[bytes], bytes | None], found: str
) -> None:
    packed, damaged = f"{IMAGES}.gz", change(RAW[IMAGES])
    folder = fill(tmp_path, {name: data for name, data in (RAW | {IMAGES: damaged}).items() if data is not None})
    before = contents(folder)
    assert [found in state for state in files.verify("mnist", tmp_path).values()] == [True, False, False, False]
    with pytest.raises(files.DataError) as caught:
        read(tmp_path, fetch=False)
    for part in (f"{folder / IMAGES}: ", found, f"fetch --dataset mnist --data-dir {tmp_path}", "--dataset synthetic"):
        assert part in str(caught.value)
    (folder / packed).write_bytes(PACKED[packed][:-1])
    with pytest.raises(files.DataError, match=rf"{packed}: damaged \(Compressed file ended.*; download failed"):
        read(tmp_path)
    (folder / packed).write_bytes(PACKED[packed])
    assert read(tmp_path, fetch=False) == TRAIN
    assert contents(folder) == before | {packed: PACKED[packed]}, "without fetching nothing is written"
    assert read(tmp_path) == TRAIN
    assert contents(folder) == RAW | {packed: PACKED[packed]}


def test_fashion_mnist_has_no_known_hash_unpacked_but_images_must_fit_labels(tmp_path: Path, server: Any) -> None:
    folder = fill(tmp_path, RAW, "FashionMNIST")
    (folder / LABELS).write_bytes(idx(np.zeros(299, np.uint8)))
    with pytest.raises(files.DataError, match=f"{IMAGES}: 300 images but 299 labels"):
        read(tmp_path, "fashion-mnist")
    (folder / LABELS).unlink()
    server.use("other")
    with pytest.raises(files.DataError, match=f"other/{LABELS}.gz: MD5 .*, expected"):
        read(tmp_path, "fashion-mnist")
    (folder / f"{LABELS}.gz").write_bytes(PACKED[f"{LABELS}.gz"])
    assert read(tmp_path, "fashion-mnist") == TRAIN


def read_only_also_for_root() -> None:
    """In a child about to start: permission bits bind root, too (CAP_DAC_OVERRIDE goes)."""
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)


def full_disk() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))


@pytest.mark.parametrize("preexec", [read_only_also_for_root, full_disk])
def test_a_folder_that_cannot_be_written_is_read_and_what_is_missing_made_in_memory(
    tmp_path: Path, preexec: Callable[[], None]
) -> None:
    roots = [tmp_path / name for name in ("good", "packed", "damaged", "empty")]
    held = (RAW, PACKED, RAW | PACKED | {LABELS: b"damaged"}, {})
    folders = [fill(root, content) for root, content in zip(roots, held, strict=True)]
    for folder in folders:
        folder.chmod(0o555 if preexec is read_only_also_for_root else 0o755)
    out, err = start(*roots, preexec=preexec).communicate()
    (*answers, last), asked, _ = json.loads(out)
    assert answers == [TRAIN] * 3, err
    assert [len(re.findall(f":{folder}/.*made again in memory, cannot", err)) for folder in folders] == [0, 2, 1, 0]
    assert f"{folders[3] / IMAGES}: missing" in last
    if preexec is read_only_also_for_root:
        assert "cannot write" in last and asked == 0, "it takes seconds to import"
    assert tuple(contents(folder) for folder in folders) == held


def test_many_readers_download_once(tmp_path: Path, server: Any, caplog: pytest.LogCaptureFixture) -> None:
    server.use("good")
    caplog.set_level("INFO")
    together = threading.Barrier(8)

    def reader(_: int) -> str:
        together.wait()
        return read(tmp_path)

    with ThreadPoolExecutor(8) as pool:  # a file lock keeps threads apart as it does processes
        assert list(pool.map(reader, range(8))) == [TRAIN] * 8
    assert server.downloads == {f"/good/{IMAGES}.gz": 1, f"/good/{LABELS}.gz": 1}
    assert caplog.text.count("made again") == 2, "the others look again and find them"


@pytest.mark.slow
def test_a_killed_writer_holds_up_others_while_it_lives_and_leaves_no_bad_file(tmp_path: Path) -> None:
    folder = fill(tmp_path, PACKED)
    with start(tmp_path, hang=True) as writer:
        try:
            until = time.monotonic() + 120
            while not list(folder.glob(f".{IMAGES}*.tmp")):
                assert writer.poll() is None and time.monotonic() < until
                time.sleep(0.01)
            assert read(tmp_path, timeout=0.01) == TRAIN
            assert main(["fetch", "--data-dir", str(tmp_path), "--timeout", "0.01"]) == 1, "it is not on the disk"
        finally:
            writer.kill()
    assert set(files.verify("mnist", tmp_path).values()) == {"missing"}
    assert read(tmp_path) == TRAIN
    assert {name for name in contents(folder) if not name.endswith(".tmp")} == {IMAGES, LABELS, *PACKED}


def test_torchvision_knows_mirrors_and_a_hash_of_each_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for dataset in ("mnist", "fashion-mnist"):
        mirrors, md5 = files.published(dataset)
        assert mirrors and set(md5) == set(PACKED)


def test_fetch_gets_all_four_files_once_and_verify_looks(
    tmp_path: Path, server: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    server.use("good")
    arguments, folder = ["--data-dir", str(tmp_path)], tmp_path / "MNIST" / "raw"
    assert main(["verify", *arguments]) == 1
    assert capsys.readouterr().out == "".join(f"{folder / name}: missing\n" for name in RAW)
    assert not folder.exists()
    for command in ("fetch", "fetch", "verify"):
        assert main([command, *arguments]) == 0
        assert capsys.readouterr().out == "".join(f"{folder / name}: ok\n" for name in RAW)
    assert server.downloads == {f"/good/{name}.gz": 1 for name in RAW}
    assert contents(folder) == RAW | PACKED
    assert {path.stat().st_mode & 0o444 for path in folder.iterdir()} == {0o444}, "others must be able to read"


@pytest.mark.parametrize("bad", ["stall", "cut", "busy", "wrong"])
def test_after_a_bad_mirror_comes_the_next(tmp_path: Path, server: Any, bad: str) -> None:
    folder, packed = fill(tmp_path, RAW), f"{IMAGES}.gz"
    (folder / IMAGES).unlink()
    server.use(bad, "good")
    assert read(tmp_path, timeout=0.3) == TRAIN
    assert server.downloads == {f"/{bad}/{packed}": 1, f"/good/{packed}": 1}
    assert contents(folder) == RAW | {packed: PACKED[packed]}


def test_mirrors_that_all_fail_are_one_message(tmp_path: Path, server: Any) -> None:
    server.use("busy")
    with pytest.raises(files.DataError) as caught:
        read(tmp_path)
    for part in (f"raw/{IMAGES}: missing", f"{GONE}{IMAGES}.gz: <", f"{server.url}busy/{IMAGES}.gz: HTTP", "fetch"):
        assert part in str(caught.value)
    assert contents(tmp_path / "MNIST" / "raw") == {}


def test_a_broken_torchvision_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(files.DataError) as caught:
        read(tmp_path / "data")
    for part in (IMAGES, "missing", "RuntimeError: operator", "`pip install", "--dataset synthetic"):
        assert part in str(caught.value)


def test_synthetic_digits_are_drawn_once_and_a_damaged_file_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    drawn = {split: synthetic.make_digits(split, count=50) for split in files.NAMES}
    hashes = [md5(idx(array)) for arrays in drawn.values() for array in arrays]
    monkeypatch.setattr(files, "_make_digits", drawn.get)
    caplog.set_level("INFO")
    for _ in range(2):
        assert main(["fetch", "--dataset", "synthetic", "--data-dir", str(tmp_path)]) == 0
    assert caplog.text.count("made again") == 4
    (tmp_path / f"Synthetic-v{synthetic.VERSION}" / "raw" / LABELS).write_bytes(b"damaged")
    images, labels = files.read_split("synthetic", tmp_path, "train")
    assert [md5(idx(images)), md5(idx(labels))] == hashes[:2]
    assert set(files.verify("synthetic", tmp_path).values()) == {"ok"}
