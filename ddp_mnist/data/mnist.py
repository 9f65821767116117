"""MNIST-family files on disk → numpy arrays. MNIST's are verified by MD5, the others by their format.

They are where torchvision puts them, `<root>/MNIST/raw/train-images-idx3-ubyte[.gz]` and so on. A missing or damaged
file is made again from the .gz beside it, from torchvision's mirrors, or (synthetic) by drawing it. Many ranks and
nodes may share a folder: only the holder of `.lock` writes, and a file gets its name when it is complete, so readers
need no lock. If a folder cannot be written, which is normal on clusters, files are made again in memory.
"""

import gzip
import hashlib
import logging
import math
import shlex
import struct
import urllib.request
import zlib
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path
from typing import Literal

import filelock
import numpy as np
from numpy.typing import NDArray

from ddp_mnist.data import synthetic
from ddp_mnist.errors import JobError
from ddp_mnist.storage.directory import write_atomic

log = logging.getLogger(__name__)

SplitName = Literal["train", "test"]
Array = NDArray[np.uint8]

NAMES: dict[SplitName, tuple[str, str]] = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
FOLDERS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "synthetic": f"Synthetic-v{synthetic.VERSION}"}
"""Folder below the root; for downloads also the name of torchvision's class."""
MNIST_MD5 = {  # of MNIST's unpacked files; torchvision has the hashes of the .gz only, and takes seconds to import
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_make_digits = lru_cache(maxsize=1)(synthetic.make_digits)  # both files of a split come from one drawing


def class_names(dataset: str, count: int = 10) -> tuple[str, ...]:
    """Return the names of the labels from 0 to `count` - 1."""
    return (*(_FASHION if dataset == "fashion-mnist" else "0123456789"), *map(str, range(10, count)))[:count]


class DataError(JobError):
    """A data file is missing or damaged and could not be repaired."""


def read_split(
    dataset: str, root: str | Path, split: SplitName, *, fetch: bool = True, timeout: float = 30.0
) -> tuple[Array, Array]:
    """Return the split's images, uint8 (N, 28, 28), and labels, uint8 (N,), verified.

    Without `fetch` nothing is downloaded or written. `timeout`: seconds for each network operation; the wait for
    another process that downloads may take 20 times as long. Raises: DataError.
    """
    paths = _paths(dataset, root, split)
    images, labels = (_read_or_repair(dataset, path, fetch, timeout) for path in paths)
    if len(images) != len(labels):
        raise DataError(f"{paths[0]}: {len(images)} images but {len(labels)} labels. Delete both files.")
    return images, labels


def verify(dataset: str, root: str | Path) -> dict[Path, str]:
    """Return the state of each of the four unpacked files: ok, missing or damaged (how). Change nothing."""
    return {path: _read(dataset, path)[1] for split in NAMES for path in _paths(dataset, root, split)}


def published(dataset: str) -> tuple[list[str], dict[str, str]]:
    """Return torchvision's mirrors and its MD5 of each .gz. Raises: ImportError."""
    try:
        from torchvision import datasets  # takes seconds

        source = getattr(datasets, FOLDERS[dataset])
    except Exception as error:  # a torchvision that was built for another torch may raise anything
        why = f"torchvision, which knows mirrors and hashes, cannot be imported ({type(error).__name__}: {error})"
        raise ImportError(f"{why}: first run `pip install --force-reinstall torch torchvision`") from error
    return source.mirrors, dict(source.resources)


def pack(array: Array) -> bytes:
    """Return the IDX file that holds the array; its magic number encodes the type and the number of dimensions."""
    return struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def _paths(dataset: str, root: str | Path, split: SplitName) -> list[Path]:
    return [Path(root).expanduser() / FOLDERS[dataset] / "raw" / name for name in NAMES[split]]


def _read(dataset: str, path: Path) -> tuple[Array | None, str]:
    """Return (array, state) of an IDX file or its .gz. A bad file has array None; state: ok, missing, damaged (how)."""
    try:
        return _parse(dataset, path.name, path.read_bytes()), "ok"
    except FileNotFoundError:
        return None, "missing"
    except (OSError, ValueError, EOFError, zlib.error) as error:
        return None, f"damaged ({error})"


def _parse(dataset: str, name: str, content: bytes) -> Array:
    """Return the array in an IDX file or its .gz, (N, 28, 28) or (N,). Raises: what `_read` catches."""
    if name.endswith(".gz"):
        content = gzip.decompress(content)
    magic, start, item = (2051, 16, (28, 28)) if "images" in name else (2049, 8, ())
    header = struct.unpack(f">{start // 4}I", content[:start].ljust(start, b"\0"))
    if header != (magic, header[1], *item) or len(content) != start + header[1] * math.prod(item):
        raise ValueError(f"{len(content)} bytes that begin with {header}")
    if dataset == "mnist":
        _check_md5(content, MNIST_MD5[name.removesuffix(".gz")])
    return np.frombuffer(content, np.uint8, offset=start).reshape(-1, *item).copy()  # torch wants writable memory


def _check_md5(content: bytes, expected: str) -> None:
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != expected:
        raise ValueError(f"MD5 {found}, expected {expected}")


def _read_or_repair(dataset: str, path: Path, fetch: bool, timeout: float) -> Array:
    """Return the unpacked file's array, and repair the file on disk where possible. Raises: DataError."""
    array, _ = _read(dataset, path)
    if array is not None:
        return array
    if not fetch:
        return _make_again(dataset, path, timeout, why_blocked="downloading is not allowed")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.parent / ".lock", 20 * timeout, mode=0o666):  # other users lock it, too
            return _make_again(dataset, path, timeout)
    except OSError as error:  # read-only, full, or locked by another process for too long
        return _make_again(dataset, path, timeout, why_blocked=f"cannot write: {error}")


def _make_again(dataset: str, path: Path, timeout: float, why_blocked: str = "") -> Array:
    """Return the array; a bad file is made again: in memory only, if `why_blocked` is not "". Raises: DataError."""
    array, state = _read(dataset, path)  # another process may have repaired the file meanwhile
    if array is not None:
        return array
    try:
        if dataset == "synthetic":
            images, labels = _make_digits("train" if path.name in NAMES["train"] else "test")
            array = images if "images" in path.name else labels
        else:
            array = _unpack(dataset, path.with_name(f"{path.name}.gz"), timeout, why_blocked)
    except (ImportError, ValueError) as error:
        command = f"python -m ddp_mnist.data fetch --dataset {dataset} --data-dir {shlex.quote(str(path.parents[2]))}"
        advice = f"run `{command}` on a machine with internet access, or use --dataset synthetic"
        raise DataError(f"{path}: {state}; {error}. To mend it, {advice}.") from error
    if not why_blocked:
        write_atomic(path, pack(array))
    log.info("%s: %s; made again%s", path, state, why_blocked and f" in memory, {why_blocked}")
    return array


def _unpack(dataset: str, packed: Path, timeout: float, why_blocked: str) -> Array:
    """Return the array in a .gz; download a bad .gz if `why_blocked` is "". Raises: ImportError or ValueError."""
    array, state = _read(dataset, packed)
    if array is not None:
        return array
    failures = [f"{packed.name}: {state}", why_blocked or "download failed"]
    mirrors, md5 = ([], {}) if why_blocked else published(dataset)
    for mirror in mirrors:
        try:
            with urllib.request.urlopen(f"{mirror}{packed.name}", timeout=timeout) as response:
                content = response.read()
            _check_md5(content, md5[packed.name])
            write_atomic(packed, content)
            return _parse(dataset, packed.name, content)
        except (OSError, HTTPException, ValueError) as error:
            failures.append(f"{mirror}{packed.name}: {error}")
    raise ValueError("; ".join(failures))
