"""The command line and the settings: no torch, frozen names, messages that name the field."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import jobs
import numpy as np
import pytest

from ddp_mnist.config import RECIPES, TrainConfig, parse
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
    ("--triton", [], "triton", True),
    ("--no-triton", [], "triton", False),
    ("--cuda-graphs", [], "cuda_graphs", True),
    ("--no-cuda-graphs", [], "cuda_graphs", False),
    ("--compile", [], "compile", True),
    ("--init-from", ["f"], "init_from", Path("f")),
    ("--checkpoint-every", ["25"], "checkpoint_every", 25),
    ("--keep-checkpoints", ["3"], "keep_checkpoints", 3),
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
    ("--wandb-model", [], "wandb_model", True),
    ("--progress", [], "progress", True),
    ("--no-progress", [], "progress", False),
]


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


@pytest.mark.parametrize(("flag", "words", "field", "value"), FLAGS, ids=[flag for flag, *_ in FLAGS])
def test_a_flag_sets_its_field(flag: str, words: list[str], field: str, value: Any) -> None:
    assert getattr(parse([flag, *words]), field) == value


def test_the_table_of_flags_covers_every_setting() -> None:
    assert {field for _, _, field, _ in FLAGS} == {field.name for field in dataclasses.fields(TrainConfig)}


def test_the_defaults_are_the_tutorials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DDP_MNIST_DATA", raising=False)
    config = parse([])
    assert config == TrainConfig()
    found = (config.recipe, config.batch_size, config.epochs, config.lr, config.schedule, config.widths, config.seed)
    assert found == ("tutorial", 64, 5, 1e-3, "constant", (8, 16), 0)
    assert (config.accumulate, config.grad_clip, config.mixed_precision) == (1, 0, "no")
    assert (config.data_dir, config.dataset) == (Path("data"), "auto")


def test_the_data_directory_comes_from_the_environment_unless_a_flag_names_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDP_MNIST_DATA", "/from/environment")
    assert parse([]).data_dir == Path("/from/environment")
    assert parse(["--data-dir", "/from/flag"]).data_dir == Path("/from/flag")


def test_the_fast_recipe_presets_a_one_cycle_schedule() -> None:
    config = parse(["--recipe", "fast"])
    assert (config.schedule, config.lr, config.batch_size) == ("onecycle", 1e-2, 64)
    assert config == TrainConfig(recipe="fast", **RECIPES["fast"])


@pytest.mark.parametrize("precision", [None, "no", "bf16", "fp16"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_flags_of_a_configuration_give_it_again(recipe: str, precision: str | None) -> None:
    config = parse(["--recipe", recipe, *(["--mixed-precision", precision] if precision else [])])
    assert config.mixed_precision == (precision or RECIPES[recipe].get("mixed_precision", "no"))
    assert parse(config.flags()) == config


@pytest.mark.parametrize("variables", [{"ACCELERATE_MIXED_PRECISION": "bf16"}, {"DDP_MNIST_DATA": "/elsewhere"}])
@pytest.mark.parametrize("words", [[], ["--mixed-precision", "no", "--data-dir", "data"]], ids=["default", "explicit"])
def test_the_flags_of_a_configuration_give_it_again_with_the_variables_and_without_them(
    monkeypatch: pytest.MonkeyPatch, words: list[str], variables: dict[str, str]
) -> None:
    for name in ("ACCELERATE_MIXED_PRECISION", "DDP_MNIST_DATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    config = parse(words)
    flags = config.flags()
    assert parse(flags) == config
    for name in variables:
        monkeypatch.delenv(name)
    assert parse(flags) == config


@pytest.mark.parametrize("order", [1, -1], ids=["recipe-first", "recipe-last"])
@pytest.mark.parametrize("recipe", [["--recipe", "fast"], ["--recipe=fast"]], ids=["space", "equals"])
def test_an_explicit_flag_beats_the_recipe_wherever_it_stands(recipe: list[str], order: int) -> None:
    first, second = [recipe, ["--lr", "0.001", "--schedule", "constant"]][::order]
    config = parse(first + second)
    assert (config.recipe, config.lr, config.schedule, config.batch_size) == ("fast", 1e-3, "constant", 64)


def test_the_precision_is_what_accelerate_launch_was_told_unless_a_flag_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert parse([]).mixed_precision == "bf16"
    assert parse(["--mixed-precision", "no"]).mixed_precision == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    for words in (["--mixed-precision", "bf16"], ["--mixed_precision=bf16"]):
        assert parse(words).mixed_precision == "bf16"
    with pytest.raises(UsageError, match=r"--mixed-precision is fp8; expected one of no, fp16, bf16"):
        parse([])


OTHER = {field: value for _, _, field, value in FLAGS} | {"wandb_model": True}


def test_the_flags_of_a_configuration_with_no_default_left_give_it_again() -> None:
    config = TrainConfig(**OTHER)
    assert parse(config.flags()) == config


def test_a_recipe_without_a_name_is_a_wrong_flag_with_its_message(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        parse(["--epochs", "3", "--recipe"])
    assert exit.value.code == 2
    assert "Missing value for argument '--recipe'" in " ".join(capsys.readouterr().err.split())


def test_settings_survive_json() -> None:
    config = TrainConfig(**OTHER)
    changed = [name for name in OTHER if getattr(config, name) != getattr(TrainConfig(), name)]
    assert sorted(changed) == sorted(OTHER)
    for settings in (config, TrainConfig()):
        assert TrainConfig.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


def test_saved_settings_with_an_unknown_field_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match="momentum"):
        TrainConfig.from_dict(TrainConfig().to_dict() | {"momentum": 0.9})


def test_settings_cannot_be_changed_but_a_changed_copy_is_checked() -> None:
    config = TrainConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 1.0  # type: ignore[misc]
    assert config.replace(lr=1.0).lr == 1.0
    with pytest.raises(UsageError, match="--lr"):
        config.replace(lr=-1.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("epochs", -1),
        ("epochs", 100_001),
        ("batch_size", 0),
        ("batch_size", -64),
        ("batch_size", 60_001),
        ("accumulate", 0),
        ("lr", 0.0),
        ("lr", -1e-3),
        ("lr", 10.1),
        ("lr", math.nan),
        ("lr", math.inf),
        ("beta2", 1.0),
        ("beta2", -0.1),
        ("beta2", math.nan),
        ("grad_clip", -1.0),
        ("grad_clip", math.nan),
        ("grad_clip", math.inf),
        ("seed", -1),
        ("threads", -1),
        ("max_steps", -1),
        ("max_minutes", -1.0),
        ("max_minutes", math.inf),
        ("checkpoint_every", -1),
        ("keep_checkpoints", 1),
        ("timeout_minutes", 0.0),
        ("timeout_minutes", math.nan),
        ("log_every", 0),
        ("widths", (0, 16)),
        ("widths", (8,)),
        ("recipe", "record-breaking"),
        ("dataset", "cifar"),
        ("schedule", "cosine"),
        ("mixed_precision", "fp8"),
    ],
)
def test_a_value_out_of_range_is_refused_with_field_value_and_what_is_expected(field: str, value: Any) -> None:
    with pytest.raises(UsageError) as caught:
        TrainConfig(**{field: value})
    message = str(caught.value)
    assert message.startswith(f"--{field.replace('_', '-')} is {value}; expected ")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("epochs", 2.5, "a whole number"),
        ("batch_size", 64.0, "a whole number"),
        ("epochs", True, "a whole number"),
        ("epochs", "5", "a whole number"),
        ("lr", "1e-3", "a finite number"),
        ("lr", None, "a finite number"),
        ("lr", 10**400, "a finite number"),
        ("lr", np.float32("nan"), "a finite number"),
        ("grad_clip", np.float16("-inf"), "a finite number"),
        ("pictures", 1, "True or False"),
        ("compile", "yes", "True or False"),
        ("widths", 8, "a list"),
        ("widths", (8, "16"), "a whole number"),
        ("wandb_tags", "mine", "a list"),
        ("wandb_tags", ["mine", 1], "a text"),
        ("wandb_name", 7, "a text"),
        ("data_dir", None, "a path"),
        ("output_dir", 7, "a path"),
        ("recipe", None, "a text"),
        ("dataset", 7, "a text"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_value_of_another_type_is_refused_in_the_same_words(field: str, value: Any, expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        TrainConfig(**{field: value})
    wrong = value[1] if isinstance(value, tuple | list) else value
    assert str(caught.value) == f"--{field.replace('_', '-')} is {wrong!r}; expected {expected}."


@pytest.mark.filterwarnings("error")
def test_what_scripts_and_arrays_have_is_taken() -> None:
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
    assert {type(config.lr), type(config.beta2)} == {float}
    assert (config.output_dir, config.wandb_tags) == (Path("runs/x"), ("a",))
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "world_size", "advice"),
    [(64, 1, 3, "63 or 66"), (64, 2, 3, "60 or 66"), (64, 1, 128, "128"), (2, 1, 3, "3"), (10, 4, 1, "8 or 12")],
)
def test_an_indivisible_batch_names_the_nearest_sizes_that_work(
    batch_size: int, accumulate: int, world_size: int, advice: str
) -> None:
    config = TrainConfig(batch_size=batch_size, accumulate=accumulate)
    with pytest.raises(UsageError, match=rf"--batch-size {batch_size} .*use --batch-size {advice}\.$"):
        config.check_world(world_size)
    for size in map(int, advice.split(" or ")):
        config.replace(batch_size=size).check_world(world_size)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 16, 32, 64])
def test_a_batch_that_divides_is_accepted(world_size: int) -> None:
    TrainConfig(batch_size=64).check_world(world_size)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--help"], 0), (["--bogus", "1"], 2), (["--epochs", "0"], 2), (["--batch-size", "63"], 2)],
    ids=["help", "unknown", "out-of-range", "indivisible"],
)
def test_help_and_a_wrong_flag_are_answered_without_torch(arguments: list[str], code: int) -> None:
    command = [jobs.TRAIN[0], "-X", "importtime", *jobs.TRAIN[1:], *arguments]
    ended = jobs.run(command, {"WORLD_SIZE": "2", "RANK": "0"})
    assert ended.code == code
    imported = set(re.findall(r"^import time:.*\| +(\S+)$", ended.err, re.MULTILINE))
    assert "ddp_mnist.config" in imported
    assert not imported & {"torch", "torchvision", "accelerate", "wandb", "numpy", "matplotlib"}


@pytest.mark.slow
def test_the_package_offers_its_names_without_importing_torch() -> None:
    code = (
        "import sys, ddp_mnist, ddp_mnist.config as config\n"
        "assert ddp_mnist.TrainConfig is config.TrainConfig\n"
        "assert 'torch' not in sys.modules\n"
        "from ddp_mnist import CNN, fit\n"
        "assert CNN.__module__ == 'ddp_mnist.model' and fit.__module__ == 'ddp_mnist.trainer'\n"
    )
    ended = jobs.run([jobs.TRAIN[0], "-c", code])
    assert ended.code == 0, ended.err


def test_a_path_may_begin_with_the_home_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A shell expands it in `--output-dir ~/runs`, but not in `--output-dir=~/runs`, nor in a script."""
    monkeypatch.setenv("HOME", str(tmp_path))
    config = parse(["--output-dir=~/runs/a", "--data-dir=~/data"])
    assert (config.output_dir, config.data_dir) == (tmp_path / "runs" / "a", tmp_path / "data")
    assert TrainConfig(init_from="~nobody-of-that-name/x").init_from == Path("~nobody-of-that-name/x")  # type: ignore[arg-type]
