"""The training set and the test set: from files, generated digits, or the script's own.

A script's sets are tensors in memory, or any map-style data set, whose items a DataLoader loads. Random augmentations
draw from the generators of the process that makes an item: their results would depend on the number of ranks and
workers, and on stops. So `SeededItems` seeds the generators before each item, by (seed, epoch, row).
"""

import contextlib
import ctypes
import hashlib
import logging
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from accelerate.utils import recursively_apply, send_to_device
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from ddp_mnist.data import mnist
from ddp_mnist.data.batches import Items, Split, TensorSet, check_labels, derive_seed, seed_generators
from ddp_mnist.distributed.preemption import SIGNALS
from ddp_mnist.errors import JobError, UsageError

if TYPE_CHECKING:
    from ddp_mnist.config import TrainConfig

log = logging.getLogger(__name__)

UserSet = TensorDataset | tuple[Tensor, Tensor] | Dataset[Any]
"""Inputs (n, ...) and targets (n, ...) in memory, or anything with `__len__` and `__getitem__` → (input, target)."""
UserData = tuple[UserSet, UserSet]  # the training set and the test set


def resolve(dataset: str, root: Path) -> str:
    """Return the data set to use. `auto` becomes `mnist` if its files are there or can be fetched, else `synthetic`."""
    if dataset != "auto":
        return dataset
    try:
        for split in mnist.NAMES:
            mnist.read_split("mnist", root, split, timeout=5)
        return "mnist"
    except mnist.DataError as error:
        log.warning("%s The digits will be generated ones, which are not MNIST.", error)
        return "synthetic"


def load_mnist(dataset: str, root: Path) -> tuple[TensorSet, TensorSet]:
    """Return (training set, test set). If files are missing, fetch or draw them first. Raises: DataError."""
    arrays = (mnist.read_split(dataset, root, split) for split in mnist.NAMES)
    train, test = (TensorSet(torch.from_numpy(x).unsqueeze(1), torch.from_numpy(y).long()) for x, y in arrays)
    return train, test


def validate_user_data(data: UserData, config: "TrainConfig") -> tuple[str, tuple[Split, Split]]:
    """Return (a hash of these data, (training set, test set)).

    Raises UsageError: the data are not what `fit` expects; JobError, with its traceback: a data set raised an error.
    """
    if not isinstance(data, tuple | list) or len(data) != 2:
        found = f"{len(data)} of them" if isinstance(data, tuple | list) else f"a {type(data).__name__}"
        raise UsageError(f"the data are {found}; expected a (training, test) pair.")
    sets = tuple(_validate_set(name, each, config) for name, each in zip(("training", "test"), data, strict=True))
    kinds = [(each.inputs.dtype, *each.inputs.shape[1:]) for each in sets if isinstance(each, TensorSet)]
    if len(set(kinds)) > 1:
        raise UsageError(f"a training input is {kinds[0]}, a test input {kinds[1]}; expected the same of both.")
    ids = [each.identity() if isinstance(each, DataLoaderSet) else _hash((each.inputs, each.targets)) for each in sets]
    return hashlib.sha256(" ".join(ids).encode()).hexdigest()[:12], (sets[0], sets[1])


def _validate_set(name: str, data: Any, config: "TrainConfig") -> Split:
    tensors = data.tensors if type(data) is TensorDataset else data  # not a subclass, which may augment
    if isinstance(tensors, tuple):
        return _validate_tensors(name, tensors)
    expected = "expected (inputs, targets), a TensorDataset, or a data set with __len__ and __getitem__"
    if isinstance(data, IterableDataset) or not hasattr(data, "__getitem__"):
        raise UsageError(f"the {name} set is a {type(data).__name__}; {expected}, so that its order can be chosen.")
    try:
        length = len(data)
    except (TypeError, NotImplementedError):
        raise UsageError(f"the {name} set, a {type(data).__name__}, has no length; {expected}.") from None
    if not length:
        raise UsageError(f"the {name} set, a {type(data).__name__}, is empty; expected at least one item.")
    return DataLoaderSet(name, data, seed=config.seed, workers=config.workers)


def _validate_tensors(name: str, tensors: tuple[Any, ...]) -> TensorSet:
    if len(tensors) != 2 or not all(isinstance(each, Tensor) for each in tensors):
        found = ", ".join(type(each).__name__ for each in tensors)
        raise UsageError(f"the {name} set is ({found}); expected two tensors, (inputs, targets).")
    inputs, targets = (each.detach().cpu() for each in tensors)
    if not inputs.dim() or not targets.dim() or len(inputs) != len(targets) or not len(targets):
        found = f"inputs {tuple(inputs.shape)} and targets {tuple(targets.shape)}"
        raise UsageError(f"the {name} set has {found}; expected at least one item, and a target for each input.")
    targets = targets.float() if targets.is_floating_point() else targets.long()
    return TensorSet(inputs.float() if inputs.is_floating_point() else inputs, targets)


class DataLoaderSet:
    """The training set or the test set behind a DataLoader. It has the methods of `TensorSet`."""

    failure: JobError | None = None  # why `iterate` has ended early on this rank; the other ranks do not know

    def __init__(self, name: str, dataset: Any, *, seed: int, workers: int = 0) -> None:
        """Wrap a data set that has `__len__` and `__getitem__` → (input, target); `name` is for messages."""
        self.name, self.workers = name, workers
        self._items, self._plan = SeededItems(dataset, seed), _Plan()
        self._classes: int | None = None
        self._device = torch.device("cpu")
        self._loader: DataLoader[Any] | None = None

    def __len__(self) -> int:
        return len(self._items.dataset)

    def to(self, device: torch.device) -> Self:
        """Copy batches to that device from now on. Return the set."""
        self._device = device
        return self

    def load(self, rows: Tensor, epoch: int) -> Items:
        """Return the items in `rows`, int64 (n,), as they are in that epoch.

        Workers load these, too, if there are any: a file that this process opens would be theirs, with one position for
        all. Raises JobError, with its traceback: the data set raised an error; UsageError: the items are no pairs, do
        not make a batch, or have labels that the network does not know.
        """
        if (items := next(self.iterate(rows, len(rows), epoch), None)) is None:
            raise self.failure or AssertionError
        return items

    def iterate(self, rows: Tensor, size: int, epoch: int) -> Iterator[Items]:
        """Yield the items in `rows` as they are in that epoch, `size` at a time; workers load them ahead.

        If an item fails or a worker dies, this does not raise: it sets `failure` and ends early. The other ranks are at
        other items, and wait for this rank in a collective.
        """
        try:
            self._plan.batches = (
                [(epoch, row) for row in rows[start : start + size].tolist()] for start in range(0, len(rows), size)
            )
            if self._loader is None:
                self._loader = self._make_loader()
            with signals_held():
                batches = iter(self._loader)
            while True:
                threads = torch.get_num_threads()
                torch.set_num_threads(1)  # as in a worker: with several, some operations round differently
                try:
                    batch = next(batches, None)
                finally:
                    torch.set_num_threads(threads)
                if batch is None:
                    return
                yield self._finish(batch)
        except JobError as error:
            self.failure = error
        except Exception as error:  # a worker died, with one of several messages; or pinning a batch failed
            why = f"a worker has died, memory is short, or it cannot be pickled ({error}). Fewer --workers need less"
            self.failure = JobError(f"the {self.name} set could not be loaded: {why}.")

    def limit_labels(self, classes: int) -> None:
        """Check each batch from now on: a label that is not 0 ... classes - 1 is a UsageError."""
        self._classes = classes

    def close(self) -> None:
        """End the workers even if a traceback holds the loader: they ignore the SIGTERM that Python's exit sends."""
        iterator: Any = getattr(self._loader, "_iterator", None)
        if iterator is not None:
            for worker in iterator._workers:
                worker.terminate = worker.kill
            iterator._shutdown_workers()
        self._loader = None

    def identity(self) -> str:
        """Return the data set's type and length, and a hash of three items, the same for every seed. Raises: as `load`.

        If the items differ from one load to the next, warn and leave the hash out.
        """
        dataset = self._items.dataset
        rows = torch.tensor([0, len(self) // 2, len(self) - 1])
        with contextlib.closing(DataLoaderSet(self.name, dataset, seed=0, workers=min(1, self.workers))) as probe:
            hashes = {_hash([probe.load(row, 0) for row in rows.split(1)]) for _ in range(2)}
        if len(hashes) > 1:
            log.warning(
                "an item of the %s set differs each time it is made, by random numbers of its own: a continued run "
                "will see others. Let it use random, numpy.random or torch, which are seeded for each item.",
                self.name,
            )
            hashes = {"-"}
        return f"{type(dataset).__module__}.{type(dataset).__qualname__} {len(self)} {hashes.pop()}"

    def _make_loader(self) -> DataLoader[Any]:
        return DataLoader(
            self._items,
            batch_sampler=self._plan,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            collate_fn=collate,
            pin_memory=self._device.type == "cuda",
            worker_init_fn=prepare_worker,
        )

    def _finish(self, batch: Any) -> Items:
        """Return the batch on the device. Raises: as `load`."""
        if isinstance(batch, JobError):
            batch.args = (f"the {self.name} set: {batch}",)
            raise batch
        if self._classes is not None:
            check_labels(batch[1], self._classes)
        inputs, targets = send_to_device(batch, self._device, non_blocking=self._device.type == "cuda")
        return inputs, targets


class SeededItems(Dataset[Any]):
    """A data set whose item (epoch, row) is the same whatever random numbers were drawn before.

    It has no `__getitems__`, so that a DataLoader asks for one item at a time. Errors are returned, not raised: an
    error that a worker raises arrives with another type and another text.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed
        self._epoch, self._epoch_seed = -1, 0

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, row = key
        if epoch != self._epoch:
            self._epoch, self._epoch_seed = epoch, derive_seed("items", self.seed, epoch)
        # Gives distant seeds to neighbouring rows. A hash of each row would take longer.
        seed_generators((self._epoch_seed + row * 0x9E37_79B9_7F4A_7C15) % 2**63)
        try:
            return self.dataset[row]
        except Exception:
            text = traceback.format_exc().strip()
            return JobError(f"item {row} could not be made.\n{text}")


class _Plan:
    """The `batch_sampler` of a DataLoader: for each batch to load, the list of its items' (epoch, row)."""

    batches: Iterator[list[tuple[int, int]]]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.batches


def collate(items: list[Any]) -> Items | JobError:
    """Return (inputs, targets) of a batch of items, as torch's default_collate makes them, or the error."""
    for item in items:
        if isinstance(item, JobError):
            return item
        if not isinstance(item, tuple | list) or len(item) != 2:
            advice = "docs/your-own.md makes pairs of dicts."
            return UsageError(f"an item is a {type(item).__name__}; expected a pair, (input, target). {advice}")
    try:
        inputs, targets = recursively_apply(_to_fp32, default_collate(items), error_on_other_type=True)
    except Exception as error:
        why = str(error).partition("\n")[0]
        return UsageError(
            f"its items do not make a batch ({why}). Expected tensors of one shape, or numbers, or tuples or dicts of "
            "them, such as a transform makes."
        )
    if not isinstance(targets, Tensor):
        return UsageError(f"a target is a {type(items[0][1]).__name__}; expected a tensor or a number.")
    return inputs, targets if targets.is_floating_point() else targets.long()


def prepare_worker(_number: int = 0) -> None:
    """Make a loader's process ignore the signals that stop a job, die with its rank, and let the training go first.

    Signals to a process group or to a whole job reach workers, too. The ranks handle them, and still need batches.
    """
    os.nice(5)  # a step's threads wait for each other: a worker that holds one of them up holds up the step
    for name in SIGNALS:
        signal.signal(signal.Signals[name], signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.Signals[name] for name in SIGNALS])
    with contextlib.suppress(OSError, AttributeError):  # not Linux: workers check every 5 s that the parent lives
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG of prctl.h


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Block signals while workers start inside: a signal would kill a worker that does not ignore it yet."""
    if multiprocessing.get_start_method() != "fork":
        resource_tracker.ensure_running()  # now, since its start unblocks SIGINT and SIGTERM
    sigchld_handler = signal.getsignal(signal.SIGCHLD)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.Signals[name] for name in SIGNALS])
    try:
        yield
    finally:
        # Undo torch's handler, which would raise a worker's death wherever this thread is then, such as in a save.
        if threading.current_thread() is threading.main_thread() and sigchld_handler is not None:
            signal.signal(signal.SIGCHLD, sigchld_handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _to_fp32(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return tensor.float() if tensor.is_floating_point() else tensor  # numpy's floats are float64


def _hash(value: Any) -> str:
    digest = hashlib.sha256()

    def update(tensor: Tensor) -> None:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)

    recursively_apply(update, value)
    return digest.hexdigest()
