"""Faults that were planted in the package on purpose, each with the tests that catch it.

    python tests/support/planted.py [WORDS ...]   `make faults`: plant each whose name holds a word, see its tests fail

Each is planted alone, in a copy of the checkout. First the same tests must pass there without a fault.
tests/project/test_planted.py sees to it that the list stays true: every text is there once, every test exists.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
COPIED = ("ddp_mnist", "launch", "slurm", "tests", "README.md", "pyproject.toml")
LIMIT = 600.0  # seconds for the tests of one fault, on a busy machine


@dataclass(frozen=True)
class Fault:
    name: str
    search: str
    """Stands once in the package, in whichever file."""
    replace: str
    tests: tuple[str, ...]
    """Each of them fails."""


FAULTS = (
    Fault(
        "scoring goes past hooks",
        "logits = network(to_float(images.clone()))",
        "logits = type(network).forward(network, to_float(images.clone()))",
        ("tests/training/test_evaluate.py::test_a_run_scores_the_module_that_it_trains[with_a_pre_hook-no]",),
    ),
    Fault(
        "scoring is autocast",
        "accelerator.prepare(AutocastWrapper(network), device_placement=[False])",
        "accelerator.prepare(network, device_placement=[False])",
        ("tests/training/test_evaluate.py::test_scores_are_in_fp32_after_a_training_in_bf16",),
    ),
    Fault(
        "another loss is not heard",
        "loss = self.loss(outputs",
        "loss = cross_entropy(outputs",
        ("tests/training/test_step.py::test_another_loss_is_trained_with",),
    ),
    Fault(
        "backward goes past Accelerate",
        "self.context.accelerator.backward(loss * self.context.size)",
        "(loss * self.context.size).backward()",
        ("tests/training/test_step.py::test_every_step_is_a_backward_of_accelerate[1-ours]",),
    ),
    Fault(
        "scoring writes over the data",
        "logits = network(to_float(images.clone()))",
        "logits = network(to_float(images))",
        ("tests/training/test_evaluate.py::test_a_network_that_writes_over_its_input_changes_no_data",),
    ),
    Fault(
        "rank 1 leaves before the reason is told",
        "context.broadcast(None)",
        "pass",
        ("tests/training/test_train.py::test_nobody_leaves_before_the_reason_is_told",),
    ),
    Fault(
        "the shards are sharded again",
        "indices = self.sampler.indices().to(",
        "indices = self.sampler.indices()[self.sampler.rank :: self.sampler.num_replicas].to(",
        ("tests/data/test_data.py::test_a_global_batch_is_the_same_images_at_every_world_size[2-0]",),
    ),
    Fault(
        "training shards are padded with duplicates",
        "return self.permutation()[self.rank :: self.num_replicas]",
        "return self.permutation().repeat(2)[self.rank : -(-self.length // self.num_replicas) * self.num_replicas"
        " : self.num_replicas]",
        ("tests/data/test_data.py::test_the_ranks_together_see_every_image_exactly_once[2-10007]",),
    ),
    Fault(
        "padded duplicates are counted in a score",
        "rows = slice(chunk * size, (chunk + 1) * size)",
        "rows = torch.arange(chunk * size, (chunk + 1) * size) % len(split)",
        (
            "tests/data/test_data.py::test_an_evaluation_sees_every_image_exactly_once[2-10007]",
            "tests/training/test_evaluate.py::test_loss_accuracy_and_confusion_are_those_of_a_plain_loop",
        ),
    ),
    Fault(
        "set_epoch is forgotten",
        "self.sampler.set_epoch(epoch)",
        "pass",
        ("tests/data/test_data.py::test_a_global_batch_is_the_same_images_at_every_world_size[1-1]",),
    ),
    Fault(
        "an uneven last batch is averaged by rank",
        ".sum() / global_size",
        ".sum() / max(1, count) / self.context.size",
        (
            "tests/distributed/test_distributed.py::test_the_gradient_of_every_batch_is_the_single_process_one[2-1-as it is]",
        ),
    ),
    Fault(
        "the ranks keep their gradients",
        "outputs = self.model(to_float(images))",
        "outputs = self.network(to_float(images))",
        (
            "tests/distributed/test_distributed.py::test_the_gradient_of_every_batch_is_the_single_process_one[2-1-as it is]",
        ),
    ),
    Fault(
        "a checkpoint is not flushed to the disk",
        "directory.write_synced(temporary / name, content)",
        "(temporary / name).write_bytes(content)",
        ("tests/run/test_checkpoint.py::test_everything_is_on_the_disk_before_its_name_and_old_ones_go_after_it",),
    ),
    Fault(
        "a checkpoint is not renamed into place",
        "os.rename(temporary, target)",
        "shutil.copytree(temporary, target)",
        ("tests/run/test_checkpoint.py::test_everything_is_on_the_disk_before_its_name_and_old_ones_go_after_it",),
    ),
    Fault(
        "a damaged checkpoint is believed",
        "if found != expected:\n            raise ValueError",
        "if False:\n            raise ValueError",
        ("tests/run/test_properties.py::test_whatever_happens_to_a_files_bytes_a_checkpoint_is_right_or_not_used",),
    ),
    Fault(
        "the flag to stop is not agreed",
        "if context.size == 1:\n            return self._local_reason()",
        "if context.size >= 1:\n            return self._local_reason()",
        ("tests/distributed/test_preemption.py::test_all_ranks_get_the_same_answer_at_the_same_step",),
    ),
    Fault(
        "a failure of wandb is not caught",
        "self._process = self._start()\n        except OSError as error:",
        "self._process = self._start()\n        except ZeroDivisionError as error:",
        (
            "tests/wandb_mirror/test_mirror.py::test_a_run_directory_without_room_for_the_mirror_is_trained_in[a file in the way]",
        ),
    ),
    Fault(
        "a continued epoch begins with its first batches",
        "for step in range(start, len(self)):",
        "for step in range(len(self) - start):",
        (
            "tests/data/test_data.py::test_an_epoch_entered_in_the_middle_goes_on_as_if_it_had_been_read_from_the_start",
            "tests/run/test_properties.py::test_batches_before_and_after_any_stops_are_the_uninterrupted_order",
        ),
    ),
    Fault(
        "Adam's averages are not restored",
        "optimizer.state[parameter][key] = home.copy_(value)",
        "optimizer.state[parameter][key] = home.zero_()",
        ("tests/run/test_checkpoint.py::test_a_step_restored_from_its_snapshot_is_the_same_step[no]",),
    ),
    Fault(
        "buckets are not settled at 4 ranks",
        "range(2 if self.context.size > 1 else 0)",
        "range(0)",
        ("tests/training/test_own.py::test_it_is_killed_and_continued_bit_for_bit[4]",),
    ),
    Fault(
        "the exit code is lost",
        "os._exit(code)",
        "os._exit(0)",
        ("tests/training/test_train.py::test_a_bad_precision_of_accelerate_launch_is_named_like_a_flag",),
    ),
    Fault(
        "every step draws the same dropout",
        "self._seed(batch.seed)",
        "self._seed(self.config.seed)",
        ("tests/training/test_own.py::test_every_step_draws_anew",),
    ),
    Fault(
        "all ranks draw the same dropout",
        "hash_integers(self.sampler.seed, epoch, step, self.sampler.rank)",
        "hash_integers(self.sampler.seed, epoch, step)",
        ("tests/data/test_data.py::test_every_share_has_a_seed_of_its_own",),
    ),
    Fault(
        "each rank scores with buffers of its own",
        "context.broadcast_tensors(network.buffers())",
        "pass",
        ("tests/training/test_own.py::test_all_ranks_score_with_rank_0s_buffers",),
    ),
    Fault(
        "resumed buffers are lost",
        "network.load_state_dict(snapshot.weights)",
        "network.load_state_dict({**network.state_dict(), **{name: snapshot.weights[name]"
        " for name, _ in network.named_parameters()}})",
        ("tests/training/test_own.py::test_buffers_go_on_where_they_were",),
    ),
    Fault(
        "the passes that settle the buckets count in batch norm's averages",
        "buffer.copy_(before)",
        "pass",
        ("tests/training/test_own.py::test_the_averages_that_are_saved_are_those_that_were_scored",),
    ),
    Fault(
        "a rank without an image trains on one that counts",
        "self.loss(outputs, labels)[:count].sum()",
        "self.loss(outputs, labels).sum()",
        ("tests/training/test_own.py::test_a_network_that_takes_no_empty_share_has_the_same_curve_at_two_ranks",),
    ),
    Fault(
        "a rank without an image has none to spare",
        "self.split.take(rows if len(rows) else indices.new_zeros(1))",
        "self.split.take(rows)",
        ("tests/training/test_own.py::test_a_network_that_takes_no_empty_share_has_the_same_curve_at_two_ranks",),
    ),
)


def place(search: str, root: Path = ROOT) -> Path:
    """The file of the package that holds the text. Raises: LookupError unless it stands there exactly once."""
    found = {path: path.read_text().count(search) for path in sorted((root / "ddp_mnist").rglob("*.py"))}
    holders = [path for path, count in found.items() if count]
    if sum(found.values()) != 1:
        raise LookupError(f"{search!r} stands {sum(found.values())} times in {[str(path) for path in holders]}")
    return holders[0]


def planted(fault: Fault, root: Path = ROOT) -> tuple[Path, str]:
    """(file, its text with the fault). Raises: LookupError; SyntaxError when the result is no Python."""
    path = place(fault.search, root)
    text = path.read_text().replace(fault.search, fault.replace)
    compile(text, path, "exec")
    return path, text


def run_tests(root: Path, tests: Sequence[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    try:
        return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"not done within {LIMIT} s")  # no test has failed


def failed(output: str) -> set[str]:
    """The tests that failed themselves; one whose fixture or import broke has shown nothing."""
    return {line.removeprefix("FAILED ").split(" - ")[0] for line in output.splitlines() if line.startswith("FAILED ")}


def why(output: str) -> str:
    reasons = re.findall(r"^E  +(.+)", output, re.MULTILINE)
    return reasons[0][:110] if reasons else "no reason"


def main(words: Sequence[str]) -> int:
    """Exit code 0: every fault was caught by every test that is named for it."""
    chosen = [fault for fault in FAULTS if not words or any(word in fault.name for word in words)]
    bad = 0
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        root = Path(folder)
        for name in COPIED:
            source = ROOT / name
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, root / name)
        every = list(dict.fromkeys(test for fault in chosen for test in fault.tests))
        ended = run_tests(root, every)
        if ended.returncode:
            print(f"without a fault these tests do not pass:\n{ended.stdout}{ended.stderr}")
            return 1
        print(f"without a fault: {len(every)} tests pass", flush=True)
        for fault in chosen:
            path, text = planted(fault, root)
            good = path.read_text()
            began = time.monotonic()
            path.write_text(text)
            try:
                ended = run_tests(root, fault.tests)
            finally:
                path.write_text(good)
            missed = set(fault.tests) - failed(ended.stdout)
            bad += bool(missed)
            verdict = "NOT CAUGHT" if missed else "caught"
            print(f"{verdict:10}  {fault.name} ({path.name}, {time.monotonic() - began:.0f} s)")
            for test in fault.tests:
                print(f"            {'passes or breaks: ' if test in missed else ''}{test}")
            print(f"            {why(ended.stdout)}", flush=True)
            if missed:
                print(ended.stdout[-3000:] + ended.stderr[-3000:])
    print(f"{len(chosen) - bad} of {len(chosen)} faults caught")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
