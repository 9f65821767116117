"""The command line and the settings: names that stay, messages that name the flag, answers without torch."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jobs
import numpy as np
import pytest

from ddp_mnist.config import RECIPES, USER_DATA_PREFIX, TrainConfig, parse
from ddp_mnist.errors import UsageError

# The command line is a contract: whoever changes it changes this table. Flag, words after it, field, value.
FLAGS: list[tuple[str, list[str], str, Any]] = [
    ("--recipe", ["fast"], "recipe", "fast"),
    ("--dataset", ["synthetic"], "dataset", "synthetic"),
    ("--data-dir", ["d"], "data_dir", Path("d")),
    ("--output-dir", ["o"], "output_dir", Path("o")),
    ("--epochs", ["3"], "epochs", 3),
    ("--batch-size", ["32"], "batch_size", 32),
    ("--accumulate", ["2"], "accumulate", 2),
    ("--lr", ["0.5"], "lr", 0.5),
    ("--beta2", ["0.9"], "beta2", 0.9),
    ("--schedule", ["onecycle"], "schedule", "onecycle"),
    ("--grad-clip", ["1.5"], "grad_clip", 1.5),
    ("--widths", ["4", "6"], "widths", (4, 6)),
    ("--seed", ["7"], "seed", 7),
    ("--mixed-precision", ["bf16"], "mixed_precision", "bf16"),
    ("--threads", ["2"], "threads", 2),
    ("--workers", ["2"], "workers", 2),
    ("--cuda-graphs", [], "cuda_graphs", True),
    ("--no-cuda-graphs", [], "cuda_graphs", False),
    ("--no-compile", [], "compile", False),
    ("--compile", [], "compile", True),
    ("--init-from", ["f"], "init_from", Path("f")),
    ("--checkpoint-every", ["25"], "checkpoint_every", 25),
    ("--keep-checkpoints", ["3"], "keep_checkpoints", 3),
    ("--no-fresh", [], "fresh", False),
    ("--fresh", [], "fresh", True),
    ("--max-steps", ["9"], "max_steps", 9),
    ("--max-minutes", ["1.5"], "max_minutes", 1.5),
    ("--timeout-minutes", ["2.5"], "timeout_minutes", 2.5),
    ("--log-every", ["4"], "log_every", 4),
    ("--pictures", [], "pictures", True),
    ("--no-pictures", [], "pictures", False),
    ("--wandb", ["disabled"], "wandb", "disabled"),
    ("--wandb-project", ["p"], "wandb_project", "p"),
    ("--wandb-entity", ["e"], "wandb_entity", "e"),
    ("--wandb-group", ["g"], "wandb_group", "g"),
    ("--wandb-name", ["n"], "wandb_name", "n"),
    ("--wandb-tags", ["a", "b"], "wandb_tags", ("a", "b")),
    ("--no-wandb-model", [], "wandb_model", False),
    ("--wandb-model", [], "wandb_model", True),
    ("--progress", [], "progress", True),
    ("--no-progress", [], "progress", False),
]
NO_DEFAULT = {field: value for _, _, field, value in FLAGS}


@pytest.fixture(autouse=True)
def no_data_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DDP_MNIST_DATA", raising=False)


@pytest.mark.parametrize(
    ("word", "name", "value"),
    [
        ("--pictures=False", "pictures", False),
        ("--pictures=true", "pictures", True),
        ("--cuda_graphs=false", "cuda_graphs", False),
        ("--fresh=false", "fresh", False),
        ("--fresh=True", "fresh", True),
    ],
)
def test_switches_may_be_written_as_sweeps_of_wandb_do(word: str, name: str, value: bool) -> None:
    assert getattr(parse([word]), name) is value


def test_the_command_line_has_exactly_these_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        parse(["--help"])
    assert exit.value.code == 0
    offered = []
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)  # colours, where they are forced
    for line in text.splitlines():
        if declared := re.match(r". (-h, )?(--[a-z0-9-]+(, --[a-z0-9-]+)*)", line):
            offered += declared.group(2).split(", ")
    assert sorted(offered) == sorted(["--help", *(flag for flag, *_ in FLAGS)])
    assert {field for _, _, field, _ in FLAGS} == {field.name for field in dataclasses.fields(TrainConfig)}


@pytest.mark.parametrize(("flag", "words", "field", "value"), FLAGS, ids=[flag for flag, *_ in FLAGS])
def test_a_flag_sets_its_field(flag: str, words: list[str], field: str, value: Any) -> None:
    assert getattr(parse([flag, *words]), field) == value


def test_the_defaults_are_the_tutorials() -> None:
    config = parse([])
    assert config == TrainConfig()
    found = (config.recipe, config.batch_size, config.epochs, config.lr, config.schedule, config.widths, config.seed)
    assert found == ("tutorial", 64, 5, 1e-3, "constant", (8, 16), 0)
    assert (config.accumulate, config.grad_clip, config.mixed_precision) == (1, 0, "no")
    assert (config.data_dir, config.dataset, config.cuda_graphs) == (Path("data"), "auto", None)


def test_data_directory_and_precision_come_from_the_environment_unless_a_flag_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DDP_MNIST_DATA", "/from/environment")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert (parse([]).data_dir, parse([]).mixed_precision) == (Path("/from/environment"), "bf16")
    config = parse(["--data-dir", "/from/flag", "--mixed-precision", "no"])
    assert (config.data_dir, config.mixed_precision) == (Path("/from/flag"), "no")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    assert parse(["--mixed_precision=bf16"]).mixed_precision == "bf16"
    with pytest.raises(UsageError, match=r"^--mixed-precision is 'fp8'; it should be 'no', 'fp16' or 'bf16'\.$"):
        TrainConfig()


@pytest.mark.parametrize(
    "words",
    [["--recipe=fast", "--lr=0.001", "--epochs=7"], ["--lr=0.001", "--epochs=7", "--recipe", "fast"]],
    ids=["recipe first", "recipe last"],
)
def test_an_explicit_flag_beats_the_recipe_wherever_it_stands(words: list[str]) -> None:
    expected = TrainConfig(**RECIPES["fast"] | {"recipe": "fast", "lr": 0.001, "epochs": 7})
    assert parse(words) == TrainConfig(recipe="fast", lr=0.001, epochs=7) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bogus", "1"], "--bogus"),
        (["--epochs", "many"], "--epochs"),
        (["--recipe", "slow"], "invalid choice 'slow' for argument '--recipe'"),
        (["--epochs", "3", "--recipe"], "Missing value for argument '--recipe'"),
        (["--dataset", f"{USER_DATA_PREFIX}0123"], "--dataset"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_a_wrong_flag_exits_with_2_and_a_message_of_the_first_rank(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for quiet in (False, True):
        monkeypatch.setenv("RANK", str(int(quiet)))
        with pytest.raises(SystemExit) as exit:
            parse(words)
        assert exit.value.code == 2
        printed = capsys.readouterr()
        assert not printed.out
        assert (printed.err == "") if quiet else (message in " ".join(printed.err.split()))


@pytest.mark.parametrize("words", [["--output-dir", ""], ["--epochs", "2", "--output-dir="]])
def test_an_empty_value_is_not_the_current_folder(words: list[str]) -> None:
    with pytest.raises(UsageError, match=f"no name: .*{words[-1]}.*unset"):
        parse(words)


@pytest.mark.parametrize("variable", [None, ("ACCELERATE_MIXED_PRECISION", "bf16"), ("DDP_MNIST_DATA", "/elsewhere")])
@pytest.mark.parametrize(
    "words",
    [
        *([f"--recipe={recipe}"] for recipe in RECIPES),
        ["--mixed-precision", "no", "--data-dir", "data"],
        ["--recipe=record", "--lr=0.001", "--schedule=constant", "--widths", "8", "16", "--beta2=0.999"],
        ["--cuda-graphs"],
        TrainConfig(**NO_DEFAULT | {"wandb_model": True}).flags(),
    ],
    ids=" ".join,
)
def test_the_flags_of_a_configuration_give_it_again_with_and_without_the_variables(
    monkeypatch: pytest.MonkeyPatch, words: list[str], variable: tuple[str, str] | None
) -> None:
    if variable:
        monkeypatch.setenv(*variable)
    config = parse(words)
    assert parse(config.flags()) == config
    flags = config.flags()
    if variable:
        monkeypatch.delenv(variable[0])
    assert parse(flags) == config


def test_a_default_needs_no_flag() -> None:
    assert TrainConfig().flags() == []
    assert TrainConfig(recipe="fast", epochs=2).flags() == ["--recipe", "fast", "--epochs", "2"]
    assert TrainConfig(dataset=USER_DATA_PREFIX + "0123").flags() == []  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "copied",
    [
        lambda config: TrainConfig(**json.loads(json.dumps(config.to_dict()))),
        lambda config: pickle.loads(pickle.dumps(config)),
        copy.deepcopy,
        dataclasses.replace,
    ],
    ids=["json", "pickle", "deepcopy", "replace"],
)
def test_settings_survive_being_saved_and_copied(copied: Callable[[TrainConfig], TrainConfig]) -> None:
    user_data = TrainConfig(dataset=USER_DATA_PREFIX + "0123")  # type: ignore[arg-type]
    for config in (TrainConfig(**NO_DEFAULT), user_data):
        again = copied(config)
        assert again == config and hash(again) == hash(config)
        assert again != config.replace(seed=1)


def test_an_unknown_setting_is_refused_with_a_list_of_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"^unknown setting momentum; the settings are recipe, dataset, .*\.$"):
        TrainConfig(momentum=0.9)  # type: ignore[call-arg]


def test_settings_cannot_be_changed_but_a_changed_copy_is_checked() -> None:
    config = TrainConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 1.0  # type: ignore[misc]
    assert config.replace(lr=1.0).lr == 1.0
    with pytest.raises(UsageError, match=r"^--lr is -1\.0; it should be "):
        dataclasses.replace(config, lr=-1.0)


# Field, values at the ends of its range, values outside of it.
LIMITS: list[tuple[str, list[Any], list[Any]]] = [
    ("epochs", [1, 100_000], [-1, 0, 100_001]),
    ("batch_size", [1, 60_000], [-64, 0, 60_001]),
    ("accumulate", [1, 60_000], [0, 60_001]),
    ("lr", [1e-300, 10], [-1e-3, 0, 0.0, 10.1]),
    ("beta2", [0, 1 - 1e-16], [-0.1, 1, 1.0]),
    ("grad_clip", [0, 1e6], [-1.0, 1e7]),
    ("seed", [0, 2**63 - 1], [-1, 2**63, 10**30]),
    ("threads", [0, 4096], [-1, 4097]),
    ("checkpoint_every", [0, 2**53], [-1, 2**53 + 1]),
    ("keep_checkpoints", [2, 1_000_000], [1, 1_000_001]),
    ("max_steps", [0, 2**53], [-1, 2**53 + 1]),
    ("max_minutes", [0, 1e6], [-1.0, 1e7]),
    ("timeout_minutes", [0.05, 1440], [0, 1441]),
    ("log_every", [1, 10_000], [0, 10_001]),
    ("recipe", ["record"], ["record-breaking", None]),
    ("dataset", ["auto"], ["cifar", 7]),
    ("schedule", ["linear"], ["cosine"]),
    ("mixed_precision", ["fp16"], ["fp8"]),
    ("wandb", ["online"], ["on", True]),
    ("epochs", [], [2.5, 64.0, True, "5", None, np.True_, [1], math.nan]),
    ("lr", [], ["1e-3", None, True, math.nan, math.inf, 1j]),
    ("pictures", [], [1, 0, None, "yes"]),
    ("widths", [], [8, "ab", None, (), (8,), (8, 9, 10), (0, 16), [8, 4097]]),
    ("wandb_tags", [], ["mine", None]),
    ("wandb_name", [], [7, True]),
    ("output_dir", [], [7, True]),
]
REFUSED = [(field, value) for field, _, values in LIMITS for value in values]


@pytest.mark.parametrize(("field", "value"), REFUSED)
def test_a_wrong_value_is_refused_in_one_line_with_its_flag(field: str, value: Any) -> None:
    with pytest.raises(UsageError, match=rf"^--{field.replace('_', '-')} (is|has) .*; .*\.$") as caught:
        TrainConfig(**{field: value})
    assert caught.value.exit_code == 2
    assert caught.value.__suppress_context__, "a traceback would show pydantic's own words"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "--epochs is 0; it should be greater than or equal to 1."),
        ({"beta2": 1}, "--beta2 is 1; it should be less than 1."),
        ({"lr": math.inf}, "--lr is inf; it should be a finite number."),
        ({"schedule": "cosine"}, "--schedule is 'cosine'; it should be 'constant', 'onecycle' or 'linear'."),
        ({"widths": (0, 16)}, "--widths has 0; it should be greater than or equal to 1."),
        ({"wandb_tags": ["mine", 1]}, "--wandb-tags has 1; it should be a valid string."),
        ({"epochs": np.float32(3)}, "--epochs is 3.0; it should be a valid integer."),
        ({"lr": "a\nb" * 100}, r"--lr is 'a\nba\nba\nb...ba\nba\nba\nb'; it should be a valid number."),
        ({"log_every": 0, "epochs": 0, "wandb": "on"}, "--epochs is 0; it should be greater than or equal to 1."),
    ],
    ids=["below", "above", "infinite", "choice", "item", "tag", "numpy", "long", "several"],
)
@pytest.mark.filterwarnings("error")
def test_wrong_values_make_one_short_line_about_the_first_of_them(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        TrainConfig(**settings)
    assert str(caught.value) == message


@pytest.mark.parametrize(("field", "values"), [row[:2] for row in LIMITS if row[1]])
def test_values_at_the_ends_of_a_range_are_taken(field: str, values: list[Any]) -> None:
    assert [getattr(TrainConfig(**{field: value}), field) for value in values] == values


@pytest.mark.filterwarnings("error")
def test_values_of_scripts_and_arrays_are_converted() -> None:
    config = TrainConfig(
        epochs=np.int64(3),  # type: ignore[arg-type]
        lr=np.float32(0.5),  # type: ignore[arg-type]
        beta2=np.float64(0.5),
        grad_clip=1,
        widths=[4, np.int32(8)],  # type: ignore[arg-type]
        output_dir="runs/x",  # type: ignore[arg-type]
        wandb_tags=["a"],  # type: ignore[arg-type]
    )
    assert (config.epochs, config.lr, config.grad_clip, config.widths) == (3, 0.5, 1, (4, 8))
    assert {type(config.epochs), type(config.widths[1])} == {int}
    assert {type(config.lr), type(config.beta2)} == {float}
    assert (config.output_dir, config.wandb_tags) == (Path("runs/x"), ("a",))


def test_a_path_may_begin_with_the_home_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A shell expands it in `--output-dir ~/runs`, but not in `--output-dir=~/runs`, nor in a script."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DDP_MNIST_DATA", "~/data")
    config = parse(["--output-dir=~/runs/a"])
    assert (config.output_dir, config.data_dir) == (tmp_path / "runs" / "a", tmp_path / "data")
    assert TrainConfig().data_dir == tmp_path / "data"
    assert TrainConfig(init_from="~nobody-of-that-name/x").init_from == Path("~nobody-of-that-name/x")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "world_size", "advice"),
    [(64, 1, 3, "63 or 66"), (64, 2, 3, "60 or 66"), (64, 1, 128, "128"), (2, 1, 3, "3"), (10, 4, 1, "8 or 12")],
)
def test_an_indivisible_batch_names_the_nearest_sizes_that_work(
    batch_size: int, accumulate: int, world_size: int, advice: str
) -> None:
    config = TrainConfig(batch_size=batch_size, accumulate=accumulate)
    with pytest.raises(UsageError, match=rf"^--batch-size {batch_size} .*use --batch-size {advice}\.$"):
        config.check_world_size(world_size)
    for size in map(int, advice.split(" or ")):
        config.replace(batch_size=size).check_world_size(world_size)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--help"], 0, ""),
        (["--bogus", "1"], 2, "--bogus"),
        (["--epochs", "0"], 2, "error: --epochs is 0; it should be greater than or equal to 1.\n"),
        (["--batch-size", "63"], 2, "error: --batch-size 63 does not divide by 2 ranks. "),
    ],
    ids=["help", "unknown", "out of range", "indivisible"],
)
def test_help_and_a_wrong_flag_are_answered_without_torch(arguments: list[str], code: int, message: str) -> None:
    command = [jobs.TRAIN[0], "-X", "importtime", *jobs.TRAIN[1:], *arguments]
    ended = jobs.run(command, {"WORLD_SIZE": "2", "RANK": "0"})
    assert ended.code == code
    assert ended.err.count(message) == 1 or not message
    assert "Traceback" not in ended.err
    imported = set(re.findall(r"^import time:.*\| +(\S+)$", ended.err, re.MULTILINE))
    assert "ddp_mnist.config" in imported
    assert not imported & {"torch", "torchvision", "accelerate", "wandb", "numpy", "matplotlib"}
