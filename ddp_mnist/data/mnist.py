"""MNIST-family files on disk → verified numpy arrays.

They lie as torchvision lays them, `<root>/MNIST/raw/train-images-idx3-ubyte[.gz]` and so on. A good file is
read and nothing else happens: no lock, no write, no torch import. A missing or damaged one is made again from
the .gz beside it, from torchvision's mirrors, or (synthetic) by drawing it. Many ranks and nodes may share a
folder: only the holder of `.lock` writes, and a file gets its name by `os.replace` when complete, so that
readers need no lock. Where it cannot be written, a normal case on clusters, what it lacks is made in memory.
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import os
import shutil
import socket
import struct
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, NamedTuple

import filelock
import numpy as np
from numpy.typing import NDArray

from ddp_mnist.errors import JobError, UsageError

log = logging.getLogger(__name__)

SplitName = Literal["train", "test"]
Array = NDArray[np.uint8]

LOCK = ".lock"
SUMS = "MD5SUMS"
TEMPORARY = ".incoming-"  # prefix of folders for unfinished files; the next lock holder removes left ones
DOWNLOAD_PATIENCE = 10  # time-outs one mirror may take for one file: a trickle never runs into the time-out
LOCK_PATIENCE = 20  # time-outs to wait for another process's download
_temporary = partial(TemporaryDirectory, prefix=TEMPORARY, ignore_cleanup_errors=True)
NO_FETCH = "downloading is not allowed"
NAMES: Mapping[SplitName, tuple[str, str]] = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


class Source(NamedTuple):
    """Where a dataset's files lie and what they must hash to."""

    folder: str  # also the name of torchvision's class
    md5: Mapping[str, tuple[str, str]]  # of the .gz and of the raw file ("": not known); none if it is drawn
    mirror: str = ""  # one of torchvision's, for the doctor to knock at


_MNIST = {
    "train-images-idx3-ubyte": ("f68b3c2dcbeaaa9fbdd348bbdeb94873", "6bbc9ace898e44ae57da46a324031adb"),
    "train-labels-idx1-ubyte": ("d53e105ee54ea40749a09fcbcd1e9432", "a25bea736e30d166cdddb491f175f624"),
    "t10k-images-idx3-ubyte": ("9fb629c4189551a2d022fa330f9573f3", "2646ac647ad5339dbf082846283269ea"),
    "t10k-labels-idx1-ubyte": ("ec29112dd5afa0611ce80d1b7f02629c", "27ae3e4e09519cfbb04c329615203637"),
}
_FASHION_MNIST = {
    "train-images-idx3-ubyte": ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", ""),
    "train-labels-idx1-ubyte": ("25c81989df183df01b3e8a0aad5dffbe", ""),
    "t10k-images-idx3-ubyte": ("bef4ecab320f06d8554ea6380940ec79", ""),
    "t10k-labels-idx1-ubyte": ("bb300cfdad3c16e7a12a480ee83cd310", ""),
}
SOURCES: dict[str, Source] = {
    "mnist": Source("MNIST", _MNIST, "https://ossci-datasets.s3.amazonaws.com"),
    "fashion-mnist": Source(
        "FashionMNIST", _FASHION_MNIST, "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
    ),
    "synthetic": Source("Synthetic", {}),
}
_FASHION_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


def class_names(dataset: str, count: int = 10) -> tuple[str, ...]:
    """What the labels from 0 to `count` - 1 are called."""
    return _FASHION_CLASSES if dataset == "fashion-mnist" else tuple(map(str, range(count)))


class DataError(JobError):
    """A data file is missing or damaged and could not be made good."""


class Finding(NamedTuple):
    """What `verify` found under one raw file's name; `reason` is empty when the status is ok."""

    path: Path
    status: Literal["ok", "missing", "damaged"]
    reason: str = ""


def read_split(
    dataset: str, root: str | Path, split: SplitName, *, fetch: bool = True, timeout: float = 30.0, again: bool = False
) -> tuple[Array, Array]:
    """Return the split's images, uint8 (N, 28, 28), and labels, uint8 (N,) below 10, verified.

    Missing or damaged files are made good first, in memory where the folder cannot be written; `fetch` allows
    downloading. `timeout` (seconds) bounds each network operation, 10 times that one mirror's file, 20 times
    that the wait for the lock. `again`: the next call for this split returns the very arrays.
    Raises: DataError; UsageError for an unknown dataset or split.
    """
    place = _place(dataset, root, split, fetch, timeout)
    kept = _kept.pop((place.folder, split), None)
    good, bad = (kept, {}) if kept else _survey(place)
    if bad:
        good = _repair(place, bad)
    if again:
        _kept[place.folder, split] = good
    images, labels = (good[name] for name in NAMES[split])
    if len(images) != len(labels):
        raise place.failure(NAMES[split][0], f"{len(images)} images but {len(labels)} labels")
    return images, labels


def forget() -> None:
    """Let go of what was kept for another reader that has not come: 55 MB."""
    _kept.clear()


def fetch(dataset: str, root: str | Path, *, timeout: float = 30.0) -> None:
    """Make all four raw files present and good on disk; `timeout` as for `read_split`. Raises: DataError."""
    for split in NAMES:
        read_split(dataset, root, split, timeout=timeout)
    for finding in verify(dataset, root):
        if finding.status != "ok":
            raise DataError(f"{finding.path}: {finding.reason}; there is good data, but no way to write it")


def verify(dataset: str, root: str | Path) -> list[Finding]:
    """Look at the four raw files; changes nothing."""
    findings = []
    for split in NAMES:
        place = _place(dataset, root, split, fetch=False, timeout=0)
        good, bad = _survey(place)
        findings += [Finding(place.folder / name, "ok") for name in good]
        for name, why in bad.items():
            findings.append(Finding(place.folder / name, "missing" if why == "missing" else "damaged", why))
    return findings


class _Place(NamedTuple):
    """One split of a dataset under one root, and how far to go for it."""

    dataset: str
    root: Path
    split: SplitName
    fetch: bool
    timeout: float
    folder: Path
    md5: Mapping[str, tuple[str, str]]

    def failure(self, name: str, *reasons: str, first: str = "") -> DataError:
        """The one message the user gets: which file, what was found, what to type next; `first`: what before that."""
        advice = f"run `python -m ddp_mnist.data fetch --dataset {self.dataset} --data-dir {self.root}`"
        if first:
            advice = f"`{first}`, then {advice}"
        advice += " on a machine with internet access, or use --dataset synthetic"
        return DataError(f"{self.folder / name}: {'; '.join(reasons)}. To mend it, {advice}.")


_kept: dict[tuple[Path, SplitName], dict[str, Array]] = {}
"""The files of a split, for its next reader alone."""


def _place(dataset: str, root: str | Path, split: SplitName, fetch: bool, timeout: float) -> _Place:
    for given, known in (dataset, SOURCES), (split, NAMES):
        if given not in known:
            raise UsageError(f"there is no {given!r}: choose from {', '.join(known)}")
    folder, md5, _ = SOURCES[dataset]
    if not md5:
        from ddp_mnist.data import synthetic

        folder += f"-v{synthetic.VERSION}"  # what an older version drew is never picked up
    root = Path(root).expanduser()
    return _Place(dataset, root, split, fetch, timeout, root / folder / "raw", md5)


def _survey(place: _Place) -> tuple[dict[str, Array], dict[str, str]]:
    """Return the good files' arrays and what is wrong with the others, by name. Needs no lock."""
    good: dict[str, Array] = {}
    bad: dict[str, str] = {}
    for name in NAMES[place.split]:
        try:
            good[name] = _examine(place, name)
        except (OSError, ValueError) as error:
            bad[name] = _why(error)
    if len({len(array) for array in good.values()}) > 1:
        why = " but ".join(f"{len(array)} items in {name}" for name, array in good.items())
        return {}, dict.fromkeys(good, why)
    return good, bad


def _examine(place: _Place, name: str) -> Array:
    """Return the raw file's array. Raises: OSError or ValueError saying what is wrong with it."""
    with open(place.folder / name, "rb") as file:
        data = np.fromfile(file, np.uint8)  # into huge pages, where Linux has them
        size = os.fstat(file.fileno()).st_size
    if len(data) < size:
        raise OSError(f"only {len(data)} of {size} bytes could be read")
    array, actual = _parse(name, data), _md5(data.data)
    expected = place.md5.get(name, ("", ""))[1] or _recorded(place.folder).get(name)
    if expected is None:
        with suppress(OSError, ValueError):  # torchvision's own download records no hash, but keeps the .gz
            expected = _md5(_unpack(place, name))
    if expected not in (None, actual):
        raise ValueError(f"MD5 {actual}, expected {expected}")
    return array


def _why(error: Exception) -> str:
    return "missing" if isinstance(error, FileNotFoundError) else str(error)


def _repair(place: _Place, bad: Mapping[str, str]) -> dict[str, Array]:
    """Return the split's arrays, with its files made good on disk where possible. Raises: DataError."""
    if place.md5 and not place.fetch and not place.folder.exists():
        raise place.failure(*next(iter(bad.items())), NO_FETCH)  # a mistyped root does not come into being
    try:
        place.folder.mkdir(parents=True, exist_ok=True)
        # Whoever may write to the folder may take the lock, hence the mode.
        with filelock.FileLock(place.folder / LOCK, LOCK_PATIENCE * place.timeout, mode=0o666):
            for leftover in place.folder.glob(f"{TEMPORARY}*"):
                shutil.rmtree(leftover, ignore_errors=True)
            good, bad = _survey(place)  # another process may have mended them meanwhile
            return good | _mend(place, bad)
    except OSError as error:  # read-only, full, or locked by another process for too long
        good, bad = _survey(place)
        return good | _mend(place, bad, blocked=f"cannot write: {error}")


def _mend(place: _Place, bad: Mapping[str, str], blocked: str = "") -> dict[str, Array]:
    """Make the `bad` files again, in memory only if writing is `blocked`, and return their arrays."""
    made: dict[str, Array] = {}
    for name, why in bad.items():
        if name in made:
            continue
        try:
            contents = _remake(place, name)
        except (OSError, ValueError) as error:
            reasons = why, f"{name}.gz: {_why(error)}"
            if blocked or not place.fetch:
                raise place.failure(name, *reasons, blocked if place.fetch else NO_FETCH) from error
            _download(place, name, *reasons)
            contents = _remake(place, name)
        made |= {key: _parse(key, np.frombuffer(bytearray(data), np.uint8)) for key, data in contents.items()}
        if not blocked:
            _install(place.folder, contents)
        level = logging.INFO if why == "missing" else logging.WARNING
        log.log(level, "%s: %s; made again%s", place.folder / name, why, blocked and f" in memory, {blocked}")
    return made


def _remake(place: _Place, name: str) -> dict[str, bytes]:
    """Return what `name` must contain, by name: drawing yields both files of the split."""
    if place.md5:
        return {name: _unpack(place, name)}
    from ddp_mnist.data import synthetic

    files = {}
    for key, array in zip(NAMES[place.split], synthetic.make_digits(place.split), strict=True):
        files[key] = pack(array)
    return files


def _unpack(place: _Place, name: str) -> bytes:
    """Return the inside of the .gz, which must be torchvision's. Raises: OSError or ValueError."""
    packed = (place.folder / f"{name}.gz").read_bytes()
    actual, expected = _md5(packed), place.md5[name][0]
    if actual != expected:
        raise ValueError(f"MD5 {actual}, expected {expected}")
    return gzip.decompress(packed)


def pack(array: Array) -> bytes:
    """The IDX file that holds the array, whose magic number says: unsigned bytes in so many dimensions."""
    return struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def _parse(name: str, data: Array) -> Array:
    """Return the array in the bytes of an IDX file, (N, 28, 28) for images and (N,) for labels. Raises: ValueError."""
    ndim, item, size = (3, [28, 28], 784) if "images" in name else (1, [], 1)
    header = 4 + 4 * ndim
    if len(data) < header:
        raise ValueError(f"short: {len(data)} bytes, expected a header of {header}")
    magic, count, *rest = struct.unpack_from(f">{1 + ndim}I", data.data)
    if magic != 0x800 + ndim:  # 2051 or 2049, see `pack`
        raise ValueError(f"magic number {magic}, expected {0x800 + ndim}")
    if count == 0 or rest != item:
        raise ValueError(f"dimensions {[count, *rest]}, expected {['N', *item]}")
    if len(data) != header + count * size:
        raise ValueError(f"wrong length: {len(data)} bytes, expected {header + count * size}")
    array = data[header:].reshape(count, *rest)
    if ndim == 1 and array.max() > 9:
        raise ValueError(f"label {array.max()}, expected 0 to 9")
    return array


def _md5(data: bytes | memoryview) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _recorded(folder: Path) -> dict[str, str]:
    """Return the hashes in MD5SUMS by name; none if there is no such file."""
    try:
        lines = [line.split() for line in (folder / SUMS).read_text(errors="replace").splitlines()]
    except OSError:
        return {}
    return {line[1].lstrip("*"): line[0] for line in lines if len(line) == 2}


def _install(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write each file whole or not at all, then their hashes. Runs under the lock. Raises: OSError."""
    hashes = _recorded(folder) | {name: _md5(data) for name, data in files.items()}
    sums = "".join(f"{md5}  {name}\n" for name, md5 in sorted(hashes.items()))  # as `md5sum -c` reads it
    for name, data in [*files.items(), (SUMS, sums.encode())]:
        with _temporary(dir=folder) as temporary:
            with open(Path(temporary, name), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(file.name, folder / name)


def _download(place: _Place, name: str, *found: str) -> None:
    """Put the .gz of `name` into the folder. Raises: DataError with all mirrors' errors; OSError."""
    try:
        from torchvision import datasets  # takes seconds, hence not above
    except Exception as error:  # one that was built for another torch may raise anything
        why = f"torchvision, which knows the mirrors, cannot be imported ({type(error).__name__}: {error})"
        again = "pip install --force-reinstall torch torchvision"
        raise place.failure(name, *found, why, first=again) from error
    published = getattr(datasets, SOURCES[place.dataset].folder)
    filename = f"{name}.gz"
    errors = []
    for url in [f"{mirror}{filename}" for mirror in published.mirrors]:
        log.info("downloading %s to %s", url, place.folder)
        with _temporary(dir=place.folder) as temporary:
            try:
                _download_url(url, temporary, filename, dict(published.resources)[filename], place.timeout)
            except (OSError, HTTPException, RuntimeError, ValueError) as error:
                errors.append(f"{url}: {type(error).__name__}: {str(error) or 'took too long'}")
                continue
            os.replace(Path(temporary, filename), place.folder / filename)
            return
    raise place.failure(name, *found, "download failed", *errors)


def _download_url(url: str, folder: str, filename: str, md5: str, timeout: float) -> None:
    """torchvision's download_url with limits to its patience and without its progress bar."""
    from torchvision.datasets import utils

    done: Future[None] = Future()

    def work() -> None:
        try:
            done.set_result(utils.download_url(url, folder, filename, md5))
        except Exception as error:
            done.set_exception(error)

    old_timeout, progress_bar = socket.getdefaulttimeout(), utils.tqdm
    socket.setdefaulttimeout(timeout)
    utils.tqdm = partial(progress_bar, disable=True)
    try:
        # Not in this thread: it can be left to a trickle, which then goes into a deleted file.
        threading.Thread(target=work, daemon=True).start()
        done.result(DOWNLOAD_PATIENCE * timeout)
    finally:
        socket.setdefaulttimeout(old_timeout)
        utils.tqdm = progress_bar
