"""Break the package on purpose, in one place after the other, and see the tests fail that are named for it.

    python tests/support/planted.py [WORDS ...]   `make faults`: those faults whose name holds a word; default: all

Each is planted alone, in a copy of the checkout. First the same tests must pass there without a fault.
tests/project/test_planted.py sees to it that the list stays true.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
COPIED = ("ddp_mnist", "docs", "launch", "slurm", "tests", "README.md", "pyproject.toml")

# Name → (text that stands once in the package, what replaces it, the tests of which each fails then).
FAULTS: dict[str, tuple[str, ...]] = {
    "scoring goes past hooks": (
        "outputs = call(network, inputs)\n            totals",
        "outputs = call(type(network).forward.__get__(network), inputs)\n            totals",
        "tests/training/test_evaluate.py::test_a_run_scores_the_module_that_it_trains[with_a_pre_hook]",
    ),
    "scoring is autocast": (
        "self.context.accelerator.prepare(AutocastWrapper(network), device_placement=[False])",
        "self.context.accelerator.prepare(network, device_placement=[False])",
        "tests/training/test_evaluate.py::test_scores_are_in_fp32_after_a_training_in_bf16",
    ),
    "another loss is ignored": (
        "loss = self.loss(outputs",
        "loss = cross_entropy(outputs",
        "tests/training/test_step.py::test_another_loss_is_trained_with",
    ),
    "backward goes past Accelerate": (
        "self.context.accelerator.backward(loss * self.context.world_size)",
        "(loss * self.context.world_size).backward()",
        "tests/training/test_step.py::test_every_step_is_a_backward_of_accelerate[1]",
    ),
    "scoring writes over the data": (
        "return self.inputs.index_select(0, rows), ",
        "return self.inputs[int(rows[0]) : int(rows[-1]) + 1], ",
        "tests/training/test_evaluate.py::test_a_network_that_writes_over_its_input_changes_no_data",
    ),
    "rank 1 exits before the reason is reported": (
        "context.broadcast(None)",
        "pass",
        "tests/training/test_train.py::test_no_rank_exits_before_the_error_is_reported",
    ),
    "the ranks do not wait for the one that reports": (
        "bool(psutil.wait_procs(first, timeout)[1])",
        "False",
        "tests/training/test_train.py::test_a_mistake_is_reported_under_torchrun_also_by_a_rank_0_that_starts_late[mistake1-error: --lr is -1.0]",
    ),
    "the shards are sharded again": (
        "return self.sampler.indices()[start",
        "return self.sampler.indices()[self.sampler.rank :: self.sampler.num_replicas][start",
        "tests/data/test_data.py::test_a_global_batch_is_the_same_images_at_every_world_size[2-0]",
    ),
    "training shards are padded with duplicates": (
        "return order[self.rank :: self.num_replicas]",
        "return order.repeat(2)[self.rank : -(-self.length // self.num_replicas) * self.num_replicas : self.num_replicas]",
        "tests/data/test_data.py::test_the_ranks_together_see_every_image_exactly_once[2-10007]",
    ),
    "padded duplicates are counted in a score": (
        "torch.arange(len(split)).split(size)",
        "(torch.arange(-(-len(split) // size) * size) % len(split)).split(size)",
        "tests/data/test_data.py::test_an_evaluation_sees_every_image_exactly_once[2-10007]",
        "tests/data/test_loader.py::test_a_score_sees_each_row_once_as_epoch_0_makes_it[3]",
        "tests/training/test_evaluate.py::test_loss_accuracy_and_confusion_are_those_of_a_plain_loop",
    ),
    "set_epoch is forgotten": (
        "self.sampler.set_epoch(epoch)",
        "pass",
        "tests/data/test_data.py::test_a_global_batch_is_the_same_images_at_every_world_size[1-1]",
        "tests/data/test_loader.py::test_every_item_of_every_epoch_is_drawn_anew",
    ),
    "random items are seeded by worker instead of by row": (
        "seed_generators((self._epoch_seed + row * 0x9E37_79B9_7F4A_7C15) % 2**63)",
        'seed_generators(getattr(torch.utils.data.get_worker_info(), "seed", 0))',
        "tests/data/test_loader.py::test_every_item_of_every_epoch_is_drawn_anew",
        "tests/data/test_loader.py::test_each_row_is_loaded_once_to_the_same_bits_at_any_number_of_ranks_and_workers[3]",
    ),
    "a continued epoch skips an item": (
        "self.sampler.indices()[start * self.local_size :]",
        "self.sampler.indices()[start * self.local_size + (start > 0) :]",
        "tests/data/test_data.py::test_an_epoch_entered_in_the_middle_goes_on_as_if_it_had_been_read_from_the_start",
        "tests/data/test_loader.py::test_each_row_is_loaded_once_to_the_same_bits_at_any_number_of_ranks_and_workers[0]",
    ),
    "an uneven last batch is averaged by rank": (
        ".sum() / global_size",
        ".sum() / max(1, count) / self.context.world_size",
        "tests/distributed/test_distributed.py::test_the_gradient_of_every_batch_is_the_single_process_one[2-whole]",
    ),
    "the ranks keep their gradients": (
        "outputs = call(self.wrapped, inputs)",
        "outputs = call(self.network, inputs)",
        "tests/distributed/test_distributed.py::test_the_gradient_of_every_batch_is_the_single_process_one[2-whole]",
    ),
    "a checkpoint is not flushed to the disk": (
        "directory.write_synced(temporary / name, content)",
        "(temporary / name).write_bytes(content)",
        "tests/storage/test_checkpoint.py::test_everything_is_on_the_disk_before_its_name_and_old_ones_go_after_it",
    ),
    "a checkpoint is not renamed into place": (
        "temporary.rename(target)",
        "shutil.copytree(temporary, target)",
        "tests/storage/test_checkpoint.py::test_everything_is_on_the_disk_before_its_name_and_old_ones_go_after_it",
    ),
    "a damaged checkpoint is loaded": (
        "if found != expected:\n            raise ValueError",
        "if False:\n            raise ValueError",
        "tests/storage/test_checkpoint.py::test_whatever_happens_to_a_files_bytes_a_checkpoint_is_right_or_not_used",
    ),
    "the ranks do not agree on a stop": (
        "if context.world_size == 1:\n            return self._local_reason()",
        "if context.world_size >= 1:\n            return self._local_reason()",
        "tests/distributed/test_distributed.py::test_all_ranks_stop_at_the_same_step_where_one_of_them_has_a_reason[2]",
    ),
    "a failure of wandb is not caught": (
        "self._process = self._start()\n        except OSError as error:",
        "self._process = self._start()\n        except ZeroDivisionError as error:",
        "tests/wandb_mirror/test_mirror.py::test_a_mirror_that_fails_is_not_missed[a file in the way]",
    ),
    "a continued epoch begins with its first batches": (
        "self.sampler.indices()[start * self.local_size :]",
        "self.sampler.indices()",
        "tests/data/test_data.py::test_an_epoch_entered_in_the_middle_goes_on_as_if_it_had_been_read_from_the_start",
        "tests/storage/test_properties.py::test_what_a_kill_takes_back_is_done_again_and_nothing_else",
    ),
    "Adam's averages are not restored": (
        'device="cpu").copy_(value)',
        'device="cpu").zero_()',
        "tests/storage/test_resume.py::test_every_kind_of_run_continues_with_the_same_bytes[--schedule]",
    ),
    "buckets are not warmed up at 4 ranks": (
        "for _ in range(2):\n                    self.network.zero_grad()",
        "for _ in range(0):\n                    self.network.zero_grad()",
        "tests/training/test_own.py::test_it_is_killed_and_resumed_bit_for_bit",
    ),
    "the exit code is lost": (
        "os._exit(code)",
        "os._exit(0)",
        "tests/training/test_train.py::test_a_bad_precision_of_accelerate_launch_is_named_like_a_flag",
    ),
    "every step draws the same dropout": (
        "seed_generators(batch.seed, ",
        "seed_generators(self.config.seed, ",
        "tests/training/test_own.py::test_every_step_draws_anew",
    ),
    "all ranks draw the same dropout": (
        'derive_seed("step", self.sampler.seed, epoch, step, self.sampler.rank)',
        'derive_seed("step", self.sampler.seed, epoch, step)',
        "tests/data/test_data.py::test_every_share_has_a_seed_of_its_own",
    ),
    "each rank scores with buffers of its own": (
        "broadcast(list(network.buffers()))",
        "pass",
        "tests/training/test_own.py::test_all_ranks_score_with_rank_0s_buffers",
    ),
    "resumed buffers are lost": (
        "try:\n                network.load_state_dict(snapshot.weights)",
        "try:\n                network.load_state_dict({**network.state_dict(), **{name: snapshot.weights[name] for name, _ in network.named_parameters()}})",
        "tests/training/test_own.py::test_buffers_go_on_where_they_were",
    ),
    "warm-up passes count in batch norm's averages": (
        "buffer.copy_(before)",
        "pass",
        "tests/training/test_own.py::test_the_averages_that_are_saved_are_those_that_were_scored",
    ),
    "a rank without an image trains on one that counts": (
        "self.loss(outputs, targets)[:count].sum()",
        "self.loss(outputs, targets).sum()",
        "tests/training/test_own.py::test_a_network_that_takes_no_empty_share_has_the_same_curve_at_two_ranks",
    ),
    "a rank without an image has no dummy batch": (
        "items or self.dummy",
        "items or tuple(each[:0] for each in self.dummy)",
        "tests/training/test_own.py::test_a_network_that_takes_no_empty_share_has_the_same_curve_at_two_ranks",
    ),
}


def plant(name: str, root: Path = ROOT) -> tuple[Path, str]:
    """Return the file of a fault, and its text with the fault. Raises: LookupError; SyntaxError: it is no Python."""
    search, replace, *_ = FAULTS[name]
    texts = {path: path.read_text() for path in (root / "ddp_mnist").rglob("*.py")}
    count = sum(text.count(search) for text in texts.values())
    if count != 1:
        raise LookupError(f"{name}: {search!r} stands {count} times in the package")
    (path,) = (path for path, text in texts.items() if search in text)
    text = texts[path].replace(search, replace)
    compile(text, path, "exec")
    return path, text


def run_tests(root: Path, tests: Sequence[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True)


def failed(output: str) -> set[str]:
    """Return the tests that failed themselves; one whose fixture or import broke has shown nothing."""
    return {line.removeprefix("FAILED ").split(" - ")[0] for line in output.splitlines() if line.startswith("FAILED ")}


def main(words: Sequence[str]) -> int:
    """Return 0 if each fault made each of its tests fail, else 1."""
    chosen = {name: tests for name, (_, _, *tests) in FAULTS.items() if any(word in name for word in words or [""])}
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        root, caught = Path(folder), 0
        for name in COPIED:
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, root / name)
        every = sorted({test for tests in chosen.values() for test in tests})
        ended = run_tests(root, every)
        if ended.returncode:
            print(f"without a fault these tests do not pass:\n{ended.stdout}{ended.stderr}")
            return 1
        for name, tests in chosen.items():
            path, text = plant(name, root)
            good = path.read_text()
            path.write_text(text)
            ended = run_tests(root, tests)
            path.write_text(good)
            missed = set(tests) - failed(ended.stdout)
            caught += not missed
            print(f"{'NOT CAUGHT' if missed else 'caught':10}  {name} ({path.name})", flush=True)
            if missed:
                print(f"pass or break: {', '.join(missed)}\n{ended.stdout[-3000:]}{ended.stderr[-3000:]}")
    print(f"{caught} of {len(chosen)} faults caught")
    return int(caught < len(chosen))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
