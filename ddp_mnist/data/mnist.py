"""MNIST-family files on disk → verified numpy arrays.

They lie as torchvision lays them, `<root>/MNIST/raw/train-images-idx3-ubyte[.gz]` and so on. A good file is
read and nothing else happens. A missing or damaged one is made again from the .gz beside it, from torchvision's
mirrors, or (synthetic) by drawing it. Many ranks and nodes may share a folder: only the holder of `.lock` writes,
and a file gets its name when it is complete, so readers need no lock. In a folder that cannot be written, which
is normal on clusters, what is missing is made in memory.
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import math
import os
import struct
import time
import urllib.request
import zlib
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Literal

import filelock
import numpy as np
from numpy.typing import NDArray

from ddp_mnist.data import synthetic
from ddp_mnist.errors import JobError
from ddp_mnist.run.directory import write_atomic

log = logging.getLogger(__name__)

SplitName = Literal["train", "test"]
Array = NDArray[np.uint8]

NAMES: dict[SplitName, tuple[str, str]] = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
FOLDERS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "synthetic": f"Synthetic-v{synthetic.VERSION}"}
"""The first two are also names of torchvision's classes."""
RAW_MD5 = {
    "mnist": {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
    "synthetic": synthetic.MD5,
}
"""Hashes of unpacked files; torchvision knows only those of the .gz, and takes seconds to import."""
LOCK = ".lock"
NO_FETCH = "downloading is not allowed"
DOWNLOAD_TIMEOUTS = 10  # that a mirror may take for one file: a trickle of bytes never runs into the time-out itself
LOCK_TIMEOUTS = 20  # to wait for another process that downloads
_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def class_names(dataset: str, count: int = 10) -> tuple[str, ...]:
    """Return the names of the labels from 0 to `count` - 1."""
    return _FASHION if dataset == "fashion-mnist" else tuple(map(str, range(count)))


class DataError(JobError):
    """A data file is missing or damaged and could not be made good."""


def read_split(
    dataset: str, root: str | Path, split: SplitName, *, fetch: bool = True, timeout: float = 30.0
) -> tuple[Array, Array]:
    """Return the split's images, uint8 (N, 28, 28), and labels, uint8 (N,) below 10, verified.

    `fetch` allows downloading. `timeout` (seconds) bounds each network operation, and 10 times that a file's download
    from one mirror, 20 times that the wait for the lock. Raises: DataError.
    """
    files = _Files(dataset, Path(root).expanduser(), fetch, timeout)
    good, bad = files.check(split)
    if bad:
        good = files.repair(split)
    images, labels = (good[name] for name in NAMES[split])
    if len(images) != len(labels):
        raise files.error(NAMES[split][0], f"{len(images)} images but {len(labels)} labels")
    return images, labels


def fetch(dataset: str, root: str | Path, *, timeout: float = 30.0) -> None:
    """Make all four unpacked files present and good on disk; `timeout` as for `read_split`. Raises: DataError."""
    for split in NAMES:
        read_split(dataset, root, split, timeout=timeout)
    for path, state in verify(dataset, root).items():
        if state != "ok":
            raise DataError(f"{path}: {state}; there is good data, but no way to write it")


def verify(dataset: str, root: str | Path) -> dict[Path, str]:
    """Return the state of each of the four unpacked files: ok, missing or damaged (how). Change nothing."""
    files = _Files(dataset, Path(root).expanduser())
    bad = files.check("train")[1] | files.check("test")[1]
    return {files.folder / name: bad.get(name, "ok") for names in NAMES.values() for name in names}


def published(dataset: str) -> tuple[list[str], dict[str, str]]:
    """Return torchvision's mirrors and its MD5 of each .gz. Raises: ImportError."""
    try:
        from torchvision import datasets  # takes seconds
    except Exception as error:  # one that was built for another torch may raise anything
        why = f"torchvision, which knows mirrors and hashes, cannot be imported ({type(error).__name__}: {error})"
        raise ImportError(f"{why}: first run `pip install --force-reinstall torch torchvision`") from error
    source = getattr(datasets, FOLDERS[dataset])
    return source.mirrors, dict(source.resources)


def pack(array: Array) -> bytes:
    """Return the IDX file that holds the array; its magic number says: unsigned bytes in so many dimensions."""
    return struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def _parse(name: str, content: bytes) -> Array:
    """Return the array in an IDX file, (N, 28, 28) for images and (N,) for labels. Raises: ValueError."""
    ndim = 3 if "images" in name else 1
    header = struct.Struct(f">{1 + ndim}I")
    magic, *shape = header.unpack(content[: header.size].ljust(header.size, b"\0"))
    if magic != 0x800 + ndim:
        raise ValueError(f"magic number {magic}, expected {0x800 + ndim}")
    if shape[1:] != [28, 28][: ndim - 1]:
        raise ValueError(f"images of {shape[1:]}, expected [28, 28]")
    if len(content) != header.size + math.prod(shape):
        raise ValueError(f"wrong length: {len(content)} bytes, expected {header.size + math.prod(shape)}")
    return np.frombuffer(content, np.uint8, offset=header.size).reshape(shape).copy()  # torch wants it writable


def _check_md5(content: bytes, expected: str) -> None:
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != expected:
        raise ValueError(f"MD5 {found}, expected {expected}")


@dataclass(frozen=True)
class _Files:
    """The files of a data set under one root, and how far to go for them."""

    dataset: str
    root: Path
    fetch: bool = False
    timeout: float = 0.0

    @property
    def folder(self) -> Path:
        return self.root / FOLDERS[self.dataset] / "raw"

    def error(self, name: str, *reasons: str) -> DataError:
        """Return the one message the user gets: which file, what was found, what to type next."""
        command = f"python -m ddp_mnist.data fetch --dataset {self.dataset} --data-dir {self.root}"
        advice = f"run `{command}` on a machine with internet access, or use --dataset synthetic"
        return DataError(f"{self.folder / name}: {'; '.join(reasons)}. To mend it, {advice}.")

    def check(self, split: SplitName) -> tuple[dict[str, Array], dict[str, str]]:
        """Return the good files' arrays, and what is wrong with the others, by name. Needs no lock."""
        good: dict[str, Array] = {}
        bad: dict[str, str] = {}
        for name in NAMES[split]:
            try:
                good[name] = self.read(name)
            except FileNotFoundError:
                bad[name] = "missing"
            except (OSError, ValueError) as error:
                bad[name] = f"damaged ({error})"
        return good, bad

    def read(self, name: str) -> Array:
        """Return the unpacked file's array. Raises: OSError or ValueError."""
        content = (self.folder / name).read_bytes()
        array = _parse(name, content)
        if self.dataset in RAW_MD5:
            _check_md5(content, RAW_MD5[self.dataset][name])
        elif os.path.exists(packed := self.folder / f"{name}.gz"):  # which ends with the CRC of its inside
            expected = int.from_bytes(packed.read_bytes()[-8:-4], "little")
            if zlib.crc32(content) != expected:
                raise ValueError(f"CRC {zlib.crc32(content):08x}, expected {expected:08x} as in {packed.name}")
        return array

    def repair(self, split: SplitName) -> dict[str, Array]:
        """Return the split's arrays, with its files made good on disk where possible. Raises: DataError."""
        if not (self.fetch or os.path.exists(self.folder)):  # a mistyped root does not come into being
            return self.make_again(split, blocked=NO_FETCH)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Whoever may write to the folder may take the lock, hence the mode.
            with filelock.FileLock(self.folder / LOCK, LOCK_TIMEOUTS * self.timeout, mode=0o666):
                for leftover in self.folder.glob(".*.tmp"):  # of a process that was killed while it wrote
                    leftover.unlink()
                return self.make_again(split)
        except OSError as error:  # read-only, full, or locked by another process for too long
            return self.make_again(split, blocked=f"cannot write: {error}")

    def make_again(self, split: SplitName, blocked: str = "") -> dict[str, Array]:
        """Return the split's arrays, bad ones made again: on disk too, unless that is `blocked`. Raises: DataError."""
        good, bad = self.check(split)  # another process may have mended them meanwhile
        drawn = synthetic.make_digits(split) if bad and self.dataset == "synthetic" else ()
        contents = dict(zip(NAMES[split], map(pack, drawn), strict=False))
        for name, why in bad.items():
            content = contents[name] if drawn else gzip.decompress(self.packed(name, why, blocked))
            good[name] = _parse(name, content)
            if not blocked:
                write_atomic(self.folder / name, content)
            level = logging.INFO if why == "missing" else logging.WARNING
            log.log(level, "%s: %s; made again%s", self.folder / name, why, blocked and f" in memory, {blocked}")
        return good

    def packed(self, name: str, why: str, blocked: str) -> bytes:
        """Return the .gz of that file, verified, downloaded if need be. Raises: DataError."""
        path = self.folder / f"{name}.gz"
        blocked = blocked or ("" if self.fetch else NO_FETCH)
        sources: list[Path | str] = [path] if os.path.exists(path) else []
        if blocked and not sources:  # torchvision need not be imported
            raise self.error(name, why, f"{path.name}: missing", blocked)
        try:
            mirrors, md5 = published(self.dataset)
        except ImportError as error:
            raise self.error(name, why, str(error)) from error
        sources += [f"{mirror}{path.name}" for mirror in mirrors if not blocked]
        failures = [blocked or "download failed"]
        for source in sources:
            try:
                content = source.read_bytes() if isinstance(source, Path) else _download(source, self.timeout)
                _check_md5(content, md5[path.name])
                if source != path:
                    write_atomic(path, content)
                return content
            except (OSError, HTTPException, ValueError) as error:
                failures.append(f"{source}: {error}")
        raise self.error(name, why, *failures)


def _download(url: str, timeout: float) -> bytes:
    """Return what is there. Raises: OSError, HTTPException or ValueError."""
    deadline = time.monotonic() + DOWNLOAD_TIMEOUTS * timeout
    content = bytearray()
    with urllib.request.urlopen(url, timeout=timeout) as response:
        while chunk := response.read1(1 << 16):
            content += chunk
            if time.monotonic() > deadline:
                raise TimeoutError(f"took more than {DOWNLOAD_TIMEOUTS * timeout:g} s")
    return bytes(content)
